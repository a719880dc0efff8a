"""What people who know torch's DataLoader write: it works, or one line says how it is written here."""

import copy
import multiprocessing as mp
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import UserError

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from torch.utils.data import DataLoader

from loader.batches import BatchMaker
from loader.loader import Loader, worker_count
from train.__main__ import main, make_parser
from train.data import ShardDataset, create_dataloaders, open_for_training
from train.settings import Settings
from train.torch_words import TorchWords

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


# ---------------------------------------------------------------- arguments of torch's DataLoader

HARMLESS: dict[str, list[Any]] = {
    "pin_memory": [True, False, None],
    "pin_memory_device": ["", "cuda"],
    "persistent_workers": [True, False],
    "in_order": [True],
    "prefetch_factor": [None, 2, 16],
    "timeout": [0, 30, 1.5],
    "shuffle": [True, None],
    "drop_last": [True],
    **{name: [None] for name in ("collate_fn", "sampler", "generator", "worker_init_fn")},
}
REFUSED: dict[str, tuple[Any, str]] = {
    "pin_memory": ("yes", "True or False"),
    "pin_memory_device": ("xpu", "'cuda'"),
    "persistent_workers": (1, "True or False"),
    "in_order": (False, "True"),
    "prefetch_factor": (0, "1 or more"),
    "timeout": (-1, "0 or more"),
    "shuffle": (False, r"loader\.loader\.Loader\(dataset, batches\)"),
    "drop_last": (False, r"loader\.loader\.Loader\(dataset, batches\)"),
    "collate_fn": (list, "Use transform"),
    "worker_init_fn": (print, "Use transform"),
    "sampler": ([0, 1], r"loader\.loader\.Loader"),
    "batch_sampler": ([[0, 1]], r"loader\.loader\.Loader"),
    "generator": (torch.Generator(), "Use seed"),
    "multiprocessing_context": (mp.get_context("spawn"), "Use start_method"),
}


def test_every_word_of_torchs_loader_is_known() -> None:
    import inspect

    torchs = set(inspect.signature(DataLoader.__init__).parameters) - {"self", "dataset"}
    ours = set(inspect.signature(create_dataloaders).parameters)
    assert torchs <= ours | set(TorchWords.__annotations__)
    assert set(REFUSED) == {*TorchWords.__annotations__, "shuffle"}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in HARMLESS.items() for value in values]
)
def test_what_changes_nothing_is_taken(small_set: Path, name: str, value: Any) -> None:
    plain, _ = create_dataloaders(small_set, batch_size=8, num_workers=0)
    loader, _ = create_dataloaders(small_set, batch_size=8, num_workers=0, **{name: value})
    assert torch.equal(next(iter(loader))[0], next(iter(plain))[0])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_called_otherwise_is_one_line_with_the_word_for_it(
    small_set: Path, name: str
) -> None:
    value, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as error:
        create_dataloaders(small_set, num_workers=0, **{name: value})
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)


def test_an_argument_that_nobody_has_is_named_with_the_one_that_was_meant(small_set: Path) -> None:
    with pytest.raises(TypeError, match=r"no argument batchsize\. Did you mean batch_size\?"):
        create_dataloaders(small_set, batchsize=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no argument colour\. There are dataset_path, batch_size"):
        create_dataloaders(small_set, colour=8)  # type: ignore[call-arg]


# ---------------------------------------------------------------- what others read of a loader


def test_the_loaders_have_what_programs_for_torchs_loaders_read(small_set: Path) -> None:
    train, val = create_dataloaders(small_set, batch_size=8, num_workers=0)
    assert (train.batch_size, val.batch_size) == (8, 8)
    assert (train.drop_last, val.drop_last) == (True, False)
    assert (train.num_workers, len(train)) == (0, 2)
    assert len(train.dataset) >= len(train.sampler) == 16  # type: ignore[arg-type]

    seen = [rows.tolist() for rows in train.batches(3)]
    train.sampler.set_epoch(3)
    assert list(train.sampler) == [row for rows in seen for row in rows]
    labels = [label for *_, labels in train for label in labels.tolist()]
    assert labels == train.dataset.labels()[list(np.concatenate(train.batches(3)))].tolist()  # type: ignore[attr-defined]
    assert sorted(val.sampler) == list(range(len(val.dataset)))  # type: ignore[arg-type]


def test_a_loader_of_any_order_knows_its_largest_batch() -> None:
    loader = Loader(Rows(), lambda epoch: [np.arange(2), np.arange(5)])
    assert (loader.batch_size, loader.drop_last, len(loader.sampler)) == (5, False, 7)


# ---------------------------------------------------------------- torch's own loader


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "spawn")])
def test_torchs_own_loader_gives_the_same_batches(
    small_set: Path, workers: int, method: str | None, normalize: bool
) -> None:
    dataset = ShardDataset(small_set, normalize=normalize)
    loader = DataLoader(dataset, batch_size=8, num_workers=workers, multiprocessing_context=method)
    n_rows = 0
    for rgb, depth, label in loader:
        expected = dataset.batch(np.arange(n_rows, n_rows + len(label)))
        n_rows += len(label)
        for part, right in zip((rgb, depth, label), expected, strict=True):
            assert part.dtype == right.dtype
            assert torch.equal(part, right)
    assert n_rows == len(dataset)


def test_rows_of_one_gather_are_handed_over_as_torch_asks_for_them(small_set: Path) -> None:
    dataset = ShardDataset(small_set, normalize=True)
    rows = dataset.__getitems__([5, 1])
    assert len(rows) == 2
    for row, position in zip(rows, (5, 1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, dataset[position], strict=True))


def test_a_batch_of_floats_is_one_piece_of_memory(small_set: Path) -> None:
    """Of tensors of torch's own, glibc's heap was left with holes: at real sizes a worker grew to
    1.2 GB in 65 batches.
    """
    rgb, depth, _ = ShardDataset(small_set, normalize=True).batch(np.arange(16))
    assert depth.data_ptr() == rgb.data_ptr() + rgb.nbytes


# ---------------------------------------------------------------- paths and splits


@pytest.fixture
def at_home(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, in which `data` leads to the set."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(small_set.parent)
    return tmp_path


def test_a_tilde_is_the_home_where_no_shell_has_seen_it(at_home: Path, tmp_path: Path) -> None:
    assert len(ShardDataset("~/data")) == len(ShardDataset(at_home / "data"))
    assert open_for_training(Path("~/data")).path.is_relative_to(at_home)
    settings = Settings("~/data", "~/run", mirror="~/mirror", weights="~/w.pth")
    assert (settings.data, settings.out) == (f"{at_home}/data", f"{at_home}/run")
    assert (settings.mirror, settings.weights) == (f"{at_home}/mirror", f"{at_home}/w.pth")


def test_a_split_that_a_set_lacks_is_an_error_that_names_those_it_has(small_set: Path) -> None:
    with pytest.raises(UserError, match=r"has no val rows\. Choose train or test, or"):
        ShardDataset(small_set, split="val")
    with pytest.raises(UserError, match=r"has no val rows\. Choose train or test, or"):
        create_dataloaders(small_set, eval_split="val")


def test_moving_over_takes_one_import_and_one_path(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own script, with a set and a batch size of this size."""
    page = (REPO / "docs" / "moving-over.md").read_text()
    before, after = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "data").symlink_to(small_set.parent)
    monkeypatch.chdir(tmp_path)
    own_lines = [line for line in before.splitlines() if "create_dataloaders" not in line]
    new_lines = [line for line in after.splitlines() if not line.startswith("!")]
    program = "\n".join([*own_lines, *new_lines]).replace("(224, 224)", "(32, 32)")
    names: dict[str, Any] = {}
    exec(program.replace("128", "8"), names)
    assert names["rgb"].shape[1:] == (3, 32, 32)
    assert names["rgb"].dtype == names["depth"].dtype == torch.float32
    assert names["label"].dtype == torch.int64


# ---------------------------------------------------------------- sets of one's own


class Rows:
    """Batches without a buffer."""

    def batch(self, indices: np.ndarray) -> Any:
        return (torch.from_numpy(np.asarray(indices)),)

    def fill(self, buffer: Any, indices: np.ndarray) -> None:
        return None


class Locked(Rows):
    """What no copy and no pickle makes again."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def order(epoch: int) -> list[np.ndarray]:
    return [np.arange(3), np.arange(2)]


def test_a_set_smaller_than_a_batch_is_measured_by_its_own_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    maker = BatchMaker(dataset=Rows(), transform=None, seed=0)
    assert worker_count("auto", maker, 10**9, 20, "mine") == 0
    assert "num_workers=auto is 0 (a batch takes 0." in capsys.readouterr().err
    assert worker_count("auto", maker, 8, 0, "mine") == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_used_loader_is_copied_or_says_why_not(workers: int) -> None:
    loader = Loader(Rows(), order, workers, "fork" if workers else None)
    assert len(list(loader)) == 2
    assert [len(rows) for (rows,) in copy.deepcopy(loader)] == [3, 2]

    locked = Loader(Locked(), order, workers, "fork" if workers else None)
    list(locked)
    with pytest.raises(TypeError, match=r"cannot be copied \(.*lock.*\): use copy\.copy"):
        copy.deepcopy(locked)
    assert [len(rows) for (rows,) in copy.copy(locked)] == [3, 2]
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="copy the loader"):
            duplicate(iter(loader))


def test_what_cannot_be_sent_to_a_worker_is_said(small_set: Path) -> None:
    for given in (Locked(), Rows()):
        transform = (lambda batch: batch) if type(given) is Rows else None
        loader = Loader(given, order, 1, "spawn", transform=transform)
        with pytest.raises(
            RuntimeError, match=r"cannot be sent to a worker .*: define it in a mod"
        ):
            next(iter(loader))


def test_batches_that_are_no_list_are_said() -> None:
    loader = Loader(Rows(), lambda epoch: (rows for rows in order(epoch)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"batches\(0\) returned a generator: it returns a list"):
        list(loader)


# ---------------------------------------------------------------- the command's own help


def test_every_flag_of_train_has_a_text_and_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["--help"], ["predict", "--help"], ["look", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
        text = capsys.readouterr().out
        assert text.startswith("usage: python -m train ")
        flags = re.findall(r"^  (--.*?)(?=^  \S|^\S|\Z)", text, re.M | re.S)
        assert flags
        for flag in flags:
            assert re.search(r"\b(default|required)\b", flag), flag
    assert all(action.help for action in make_parser()._actions)


@pytest.mark.parametrize("flag", ["--data=", "--out=", "--mirror=", "--weights="])
def test_an_empty_path_is_refused(
    flag: str, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--data={small_set}", f"--out={tmp_path}/run", flag]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train: {flag.removesuffix('=')} '': ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [[""], ["run", "--data="], ["run", "--out="]])
def test_nor_is_one_of_predict(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *words]) == 2
    assert "'': an empty path. Give one, or leave it out" in capsys.readouterr().err


# ---------------------------------------------------------------- what augmentation does


def test_a_page_shows_rows_as_stored_and_as_three_steps_see_them(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs pillow")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = tmp_path / "look.png"
    for extra in ([], ["--jitter=0", "--crop=1", "--task=depth"]):
        assert main(["look", str(path), f"--data={small_set}", *extra]) == 0
        assert capsys.readouterr().out == f"{path}\n"
        with Image.open(path) as image:
            assert image.width > 2000
    assert main(["look", "look.jpg", f"--data={small_set}"]) == 2
    assert "Use one that ends in .png" in capsys.readouterr().err
