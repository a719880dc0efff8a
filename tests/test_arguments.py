"""Arguments and indices: what is accepted is meant, what is not is one line that names it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import UserError

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.loaders import make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader.loader import Loader
from train.data import ShardDataset, create_dataloaders
from train.order import Batches

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

# ---------------------------------------------------------------- indices

MASKS: list[Any] = [
    np.zeros(36, bool), [True, False], [0, True], (np.True_, 1), torch.zeros(36).bool(), np.zeros((36, 1), bool),
    [0.0, 1.0], np.array([1.5]), torch.tensor([1.0]), [1, 2.0], np.zeros(0, np.float32), [None], "rgb", ["1"], None,
    [[0, 1]], np.zeros((2, 2), int), 3, np.int64(3), [[0], [1, 2]], slice(0, 3), {0, 1}, [1j],
]  # fmt: skip


@pytest.mark.parametrize("indices", MASKS, ids=lambda value: repr(value)[:25])
@pytest.mark.parametrize("method", ["batch", "__getitems__", "stored", "rows_of", "fill"])
def test_what_are_no_positions_is_refused_in_words_that_name_batch(
    small_set: Path, indices: Any, method: str
) -> None:
    for how in ({}, {"device": "cpu"}) if method in ("batch", "stored") else ({},):
        dataset = ShardDataset(small_set, split="all", **how)  # type: ignore[arg-type]
        first = [memoryview(bytearray(1 << 20))] if method == "fill" else []
        with pytest.raises(TypeError, match=r"batch\(") as error:
            getattr(dataset, method)(*first, indices)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "indices",
    [[36], [-1], [0, 1000], [2**63], [2**70], np.array([2**64 - 1], np.uint64), [-(2**70)]],
)
@pytest.mark.parametrize("how", [{}, {"device": "cpu"}], ids=["maps", "device"])
def test_positions_that_do_not_exist_are_an_index_error(
    small_set: Path, indices: Any, how: dict[str, Any]
) -> None:
    dataset = ShardDataset(small_set, split="all", **how)
    for method in (dataset.batch, dataset.__getitems__):
        with pytest.raises(IndexError, match="positions"):
            method(indices)


@pytest.mark.parametrize(
    "kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "tensor", "list", "tuple", "range"]
)
@pytest.mark.parametrize("how", [{}, {"device": "cpu"}], ids=["maps", "device"])
def test_whole_numbers_of_any_width_are_the_rows(
    small_set: Path, kind: str, how: dict[str, Any]
) -> None:
    dataset, at = ShardDataset(small_set, split="all", **how), [3, 0, 35, 3]
    others: dict[str, Any] = {"tensor": torch.tensor(at), "list": at, "tuple": tuple(at)}
    given = range(2, 30, 9) if kind == "range" else others.get(kind)
    given = np.array(at, kind) if given is None else given
    rgb, _, label = dataset.batch(given)
    for k, i in enumerate(given):
        assert torch.equal(rgb[k], dataset[int(i)][0])
        assert torch.equal(label[k], dataset[i][2])


def test_no_rows_are_an_empty_batch(small_set: Path) -> None:
    dataset = ShardDataset(small_set, split="all")
    for none in ([], (), np.zeros(0, np.int64), range(0)):
        shapes = [tuple(part.shape) for part in dataset.batch(none)]
        assert shapes == [(0, 3, 32, 32), (0, 1, 32, 32), (0,)]
        assert dataset.__getitems__(none) == []


@pytest.mark.parametrize(
    "index", [slice(0, 2), [0, 1], (0, 1), np.arange(2), True, np.False_, 1.0, None, "0", torch.tensor(True),
              torch.tensor([1]), np.array([1]), np.array(True), ..., np.float32(1)]
)  # fmt: skip
def test_one_row_is_asked_for_by_one_whole_number(small_set: Path, index: Any) -> None:
    with pytest.raises(TypeError, match=r"one whole number; for several rows ds.batch\("):
        ShardDataset(small_set, split="all")[index]


@pytest.mark.parametrize(
    "index", [np.int8(-1), np.uint64(35), torch.tensor(35), 35, -1, np.array(35)]
)
def test_any_whole_number_is_one_row(small_set: Path, index: Any) -> None:
    dataset = ShardDataset(small_set, split="all")
    assert all(torch.equal(a, b) for a, b in zip(dataset[index], dataset[35], strict=True))


# ---------------------------------------------------------------- arguments

WRONG: list[tuple[str, Any]] = [
    *(("seed", value) for value in (None, -1, 1.0, "0", True, 2**64)),
    *(("batch_size", value) for value in ("8", 0, -1, 8.0, True, None, 2**40)),
    *(
        ("target_size", value)
        for value in ("32", "224", True, 32.0, (32,), (32, 32, 32), (32, "32"), 0, b"32")
    ),
    *(
        ("fields", value)
        for value in ("rgb", (), [], ("rgb", "rgb"), ("smell",), {"rgb"}, (1,), 3, ["label"])
    ),
    *(
        ("num_workers", value)
        for value in (-1, 1.5, "two", "-1", "", True, None, 65, "65", "٣", [], 2.0)
    ),
    *(("start_method", value) for value in ("thread", "", 1, True, "None", ["fork"])),
    *(
        ("target", value)
        for value in (None, "", "Scene", 13, ["colour"], (), ("scene", "scene"), True)
    ),
    *(("num_classes", value) for value in (11, 0, -13, "13", 13.0, True)),
    *(("normalize", value) for value in ("no", 1, None, 0)),
    *(("prefetch", value) for value in ("no", 1, None)),
    *(("allow_remote", value) for value in ("no", 1, None)),
    *(("transform", value) for value in (1, "flip", [len], False)),
    *(("val_transform", value) for value in (1, "flip")),
    *(("cache", value) for value in ("ram", True, 1, "", ["device"], np.zeros(2))),
    *(("rank", value) for value in (1, -1, True, 0.0, None, "0")),
    *(("world", value) for value in (0, -1, True, 1.0, None, "2")),
    *(("dataset_path", value) for value in (None, 3, b"data", "", "a\0b", "x" * 5000, [], [3])),
    ("device", "cpu"),  # without cache="device" nothing would be kept there
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:20])
def test_a_wrong_argument_is_one_line_that_names_it(small_set: Path, name: str, value: Any) -> None:
    how = {"dataset_path": small_set, "num_workers": 0, name: value}
    with pytest.raises(UserError) as error:
        create_dataloaders(**how)  # type: ignore[arg-type]
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(("rank", "world"), [(3, 2), (2, 2), (-1, 2)])
def test_a_rank_beyond_the_world_is_refused(small_set: Path, rank: int, world: int) -> None:
    with pytest.raises(UserError, match=f"rank {rank}: a whole number, 0 to 1"):
        create_dataloaders(small_set, rank=rank, world=world, num_workers=0)
    with pytest.raises(UserError, match=f"rank {rank}"):
        Batches(36, 4, 0, rank, world)


def test_more_ranks_than_train_rows_are_refused(small_set: Path) -> None:
    with pytest.raises(UserError, match="train rows for world 1000"):
        create_dataloaders(small_set, world=1000, num_workers=0)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "meta", 1.5, True, -7, object()])
def test_a_device_that_keeps_nothing_is_refused(small_set: Path, device: Any) -> None:
    with pytest.raises(UserError, match=r"^device "):
        create_dataloaders(small_set, cache="device", device=device)
    with pytest.raises(UserError, match=r"^device "):
        ShardDataset(small_set, device=device)


@pytest.mark.parametrize("split", ["validation", "", None, 1, ["train"]])
def test_a_split_that_is_none_is_refused(small_set: Path, split: Any) -> None:
    with pytest.raises(UserError, match="choose train, test, val or all"):
        ShardDataset(small_set, split=split)


def test_a_missing_set_and_an_unreadable_place_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (
        tmp_path / "nyuv2-224-00000000",
        tmp_path / "file",
        tmp_path / "file" / "x",
        tmp_path,
    ):
        with pytest.raises(UserError) as error:
            ShardDataset(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [0, 2, "2", np.int32(2), "auto"])
def test_a_number_of_workers_may_be_the_command_lines(small_set: Path, given: Any) -> None:
    train, _ = create_dataloaders(small_set, num_workers=given, batch_size=4)
    assert train.num_workers == (0 if given == "auto" else int(given))


LOADERS: list[tuple[str, Any]] = [
    ("num_workers", -1), ("num_workers", 1.5), ("num_workers", "2"), ("num_workers", True), ("num_workers", None),
    ("start_method", "thread"), ("start_method", 1), ("prefetch", 1), ("prefetch", None), ("transform", 3),
    ("seed", None), ("seed", -1), ("seed", 1.0), ("batches", [np.arange(3)]), ("batches", None), ("dataset", None),
    ("dataset", [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), LOADERS, ids=lambda value: repr(value)[:20])
def test_a_loaders_own_arguments_are_checked(small_set: Path, name: str, value: Any) -> None:
    how: dict[str, Any] = {
        "dataset": ShardDataset(small_set),
        "batches": Batches(8, 4, 0),
        name: value,
    }
    with pytest.raises(ValueError, match=f"^{name} ") as error:
        Loader(**how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("epoch", "start"), [(-1, 0), (None, 0), (0, -1), (0.5, 0), (0, "1"), (True, 0)]
)
def test_an_epoch_is_a_whole_number(small_set: Path, epoch: Any, start: Any) -> None:
    with pytest.raises(ValueError, match="a whole number, 0 or more"):
        make(small_set).set_epoch(epoch, start)


def is_one_line(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 400


junk = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.integers(), st.floats(), st.text(max_size=5), st.binary(),
    st.lists(st.integers(-1, 40), max_size=3), st.just(np.arange(3)), st.just(np.array(3)), st.just(np.int16(4)),
    st.just(torch.tensor(3)), st.just(object()), st.just(len), st.just(os.environ), st.just(np.float64(2)),
)  # fmt: skip
right: dict[str, st.SearchStrategy[Any]] = {
    "batch_size": st.integers(1, 50),
    "num_workers": st.sampled_from([0, "auto", "0"]),
    "num_classes": st.sampled_from([10, 13, 27]),
    "target": st.sampled_from(
        ["scene", "semantic", "semantic13", "semantic40", "depth", "instance"]
    )
    | st.sampled_from([("scene", "semantic13"), ["depth", "semantic40", "scene"]]),
    "normalize": st.booleans(),
    "target_size": st.sampled_from([None, 32, (32, 32), [32, 32]]),
    "seed": st.integers(0, 2**64 - 1),
    "fields": st.sampled_from([None, ("rgb",), ["depth", "rgb"], ("raw_depth",)]),
    "start_method": st.sampled_from([None, "fork", "spawn"]),
    "world": st.just(1),
    "rank": st.just(0),
    "transform": st.sampled_from([None, tuple]),
    "val_transform": st.sampled_from([None, tuple]),
    "prefetch": st.booleans(),
    "cache": st.sampled_from([None, "device"]),
    "allow_remote": st.booleans(),
}
few = (
    st.integers(-3, 0) | st.floats() | st.text(max_size=3).filter(lambda text: not text.isdecimal())
)


def wrong_for(name: str) -> st.SearchStrategy[Any]:
    """Mostly no value that this argument takes."""
    if name.endswith("transform"):
        return junk.filter(lambda value: not callable(value))
    return few if name == "num_workers" else junk


mostly_right = st.fixed_dictionaries(
    {},
    optional={name: one | wrong_for(name) for name, one in right.items()},
)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(mostly_right | st.fixed_dictionaries({}, optional=right))
def test_any_arguments_are_refused_in_one_line_or_give_what_they_say(
    small_set: Path, how: dict[str, Any]
) -> None:
    try:
        loaders = create_dataloaders(small_set, **how)
    except UserError as error:
        is_one_line(error)
        return
    if how.get("world", 1) != 1:  # what one of several ranks gets is in test_ddp
        return
    n_rows = [len(ShardDataset(small_set, split=split)) for split in ("train", "test")]
    batch_size = min(how.get("batch_size", 128), n_rows[0])
    target = how.get("target", "scene")
    targets = [target] if isinstance(target, str) else target
    n_inputs = len(how.get("fields") or (("rgb",) if "depth" in targets else ("rgb", "depth")))
    train = list(loaders[0])
    assert [len(batch[-1]) for batch in train] == [batch_size] * (n_rows[0] // batch_size)
    assert sum(len(batch[-1]) for batch in loaders[1]) == n_rows[1]
    assert {len(batch) for batch in train} == {n_inputs + len(targets)}
    for part in train[0][:n_inputs]:
        assert part.shape[0] == batch_size
        assert tuple(part.shape[-2:]) == (32, 32)
        assert (part.dtype == torch.float32) is bool(how.get("normalize", True))
    rows = np.concatenate(loaders[0].batches(0))
    assert len(set(rows.tolist())) == len(rows) == batch_size * (n_rows[0] // batch_size)
    assert how.get("seed", 0) == loaders[0].batches.seed  # type: ignore[attr-defined]


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(["split", "fields", "target", "num_classes", "normalize", "device"]), junk
    )
)
def test_any_arguments_of_a_dataset_are_refused_in_one_line_or_open_it(
    small_set: Path, how: dict[str, Any]
) -> None:
    try:
        dataset = ShardDataset(small_set, **how)
    except UserError as error:
        is_one_line(error)
        return
    assert dataset.batch([0])[-1].shape[0] == 1


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(junk | st.lists(junk, max_size=4))
def test_any_index_is_refused_in_one_line_or_is_those_rows(small_set: Path, indices: Any) -> None:
    dataset = ShardDataset(small_set, split="all")
    for ask in (dataset.batch, dataset.__getitem__):
        try:
            made = ask(indices)
        except (TypeError, IndexError) as error:
            is_one_line(error)
            continue
        assert made[0].shape[-3:] == (3, 32, 32)
