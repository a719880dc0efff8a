"""The dataset: official split, class sets, targets, and the same batches from any kind of worker."""

import csv
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import shared
from helpers.sets import convert
from torch.utils.data import DataLoader

from convert.inspect import picture
from convert.sources.nyu_tables import SCENE_TYPES_OF_10, SCENE_TYPES_OF_13, nyu
from shards.dataset import open_set
from shards.errors import UserError
from shards.spec import ConversionSettings
from train.data import ShardDataset, create_dataloaders


def test_no_scene_is_in_both_splits(small_set: Path) -> None:
    found = open_set(small_set)
    split, scene = found.column("split"), found.column("scene")
    assert not set(scene[split == 0]) & set(scene[split == 1])
    sizes = [len(ShardDataset(small_set, split=s)) for s in ("train", "test", "all")]
    assert sizes[0] + sizes[1] == sizes[2] == 36


@pytest.mark.parametrize(
    ("n", "train", "test"),
    [
        (
            10,
            [192, 119, 114, 63, 62, 40, 26, 26, 25, 128],
            [191, 106, 107, 58, 55, 38, 24, 23, 11, 41],
        ),
        (
            13,
            [192, 119, 114, 63, 62, 40, 26, 26, 25, 17, 14, 12, 85],
            [191, 106, 107, 58, 55, 38, 24, 23, 11, 14, 11, 5, 11],
        ),
    ],
)
def test_class_counts_on_the_real_scene_table(n: int, train: list[int], test: list[int]) -> None:
    with open(shared("nyu/meta/scenes_1449.csv")) as file:
        rows = list(csv.DictReader(file))
    dataset = replace(nyu(), scene_types=tuple(sorted({r["scene_type"] for r in rows})))
    classes = dataset.protocol(n).names
    ids = {name: i for i, name in enumerate(classes)}
    for split, expected in (("train", train), ("test", test)):
        labels = [ids.get(r["scene_type"], n - 1) for r in rows if r["split"] == split]
        assert np.bincount(labels, minlength=n).tolist() == expected


def test_class_lists_are_the_documented_ones() -> None:
    assert (len(SCENE_TYPES_OF_10), len(SCENE_TYPES_OF_13)) == (9, 12)
    with pytest.raises(UserError, match="num_classes 11"):
        nyu().protocol(11)


def test_a_row_is_what_the_shards_hold(small_set: Path) -> None:
    dataset = ShardDataset(small_set, split="test", num_classes=27)
    found = open_set(small_set)
    rows = np.flatnonzero(found.column("split") == 1)
    stored = {f: np.concatenate(found.shards(f)) for f in ("rgb", "depth")}
    for i in (0, 3, len(rows) - 1):
        rgb, depth, label = dataset[i]
        np.testing.assert_array_equal(rgb, stored["rgb"][rows[i]])
        np.testing.assert_array_equal(depth[0], stored["depth"][rows[i]])
        assert (rgb.dtype, depth.dtype, label.dtype) == (torch.uint8, torch.int16, torch.int64)
        assert int(label) == found.column("scene_type")[rows[i]]


@pytest.mark.parametrize("positions", [[0, 1, 5], [7, 2, 2, 0], [9]])
def test_a_batch_is_its_rows_in_the_order_asked_for(small_set: Path, positions: list[int]) -> None:
    dataset = ShardDataset(small_set, split="all")
    for one, many in zip(
        [dataset[i] for i in positions], dataset.__getitems__(positions), strict=True
    ):
        for a, b in zip(one, many, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("index", [36, -37, 1000])
def test_an_index_out_of_range_raises(small_set: Path, index: int) -> None:
    dataset = ShardDataset(small_set, split="all")
    with pytest.raises(IndexError):
        dataset[index]
    with pytest.raises(IndexError):
        dataset.__getitems__([0, index])


@pytest.mark.parametrize(
    ("target", "n"), [("semantic13", 13), ("semantic40", 40), ("semantic894", 894)]
)
def test_semantic_targets_go_through_the_table_and_void_is_ignored(
    small_set: Path, target: str, n: int
) -> None:
    dataset = ShardDataset(small_set, split="all", target=target)
    found = open_set(small_set)
    stored = found.shards("label")[0][3]
    mask = dataset[3][-1].numpy()
    table = found.dataset.label_table(n).ids
    np.testing.assert_array_equal(mask[stored == 0], -100)
    for label in np.unique(stored[stored > 0]):
        assert set(mask[stored == label]) == {table[label] - 1}
    assert (len(dataset.classes), mask.dtype) == (n, np.int64)


def test_depth_and_instance_targets(small_set: Path) -> None:
    found = open_set(small_set)
    rgb, metres = ShardDataset(small_set, split="all", target="depth")[4]
    assert (tuple(rgb.shape), tuple(metres.shape), metres.dtype) == (
        (3, 32, 32),
        (1, 32, 32),
        torch.float32,
    )
    np.testing.assert_allclose(metres[0], found.shards("depth")[0][4] / 1000, atol=1e-6)
    instance = ShardDataset(small_set, split="all", target="instance")[4][-1]
    np.testing.assert_array_equal(instance, found.shards("instance")[0][4])


def test_normalised_depth_keeps_holes_at_exactly_zero(small_set: Path) -> None:
    raw = ShardDataset(small_set, split="all", fields=("rgb", "raw_depth"))
    ready = ShardDataset(small_set, split="all", fields=("rgb", "raw_depth"), normalize=True)
    stored, depth = raw[0][1], ready[0][1]
    assert (stored == 0).any()
    assert torch.all(depth[stored == 0] == 0.0)
    expected = (stored[stored > 0] / 1000 - ready.depth_mean) / ready.depth_std
    torch.testing.assert_close(depth[stored > 0], expected.float(), atol=1e-5, rtol=1e-5)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(ready[0][0], (raw[0][0] / 255 - mean) / std, atol=1e-5, rtol=1e-5)


def test_the_pickle_stays_small_after_use(small_set: Path) -> None:
    dataset = ShardDataset(small_set)
    dataset[0]
    data = pickle.dumps(dataset)
    assert len(data) < 4096
    assert torch.equal(pickle.loads(data)[3][0], dataset[3][0])


def epochs(small_set: Path, **how: object) -> list[list[torch.Tensor]]:
    train, test = create_dataloaders(small_set, batch_size=4, normalize=False, **how)  # type: ignore[arg-type]
    batches = []
    for epoch in range(2):
        train.set_epoch(epoch)
        batches += [list(b) for b in train]
    return batches + [list(b) for b in test]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_every_kind_deliver_the_same_batches(small_set: Path, method: str) -> None:
    alone = epochs(small_set, num_workers=0)
    helped = epochs(small_set, num_workers=2, start_method=method)
    assert len(alone) == len(helped) > 4
    for a, b in zip(alone, helped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_epochs_differ_and_repeat(small_set: Path) -> None:
    first, again = epochs(small_set), epochs(small_set)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], first[len(first) // 4][0])


def test_a_plain_dataloader_works(small_set: Path) -> None:
    loader = DataLoader(ShardDataset(small_set, split="all"), batch_size=8)
    shapes = [tuple(rgb.shape) for rgb, _, _ in loader]
    assert shapes == [(8, 3, 32, 32)] * 4 + [(4, 3, 32, 32)]


def test_the_notes_configuration_works_as_it_stands(small_set: Path) -> None:
    config = {
        "dataset_path": str(small_set.parent),
        "batch_size": 4,
        "num_workers": 0,
        "target_size": (32, 32),
    }
    train, _ = create_dataloaders(**config, num_classes=13)  # type: ignore[arg-type]
    rgb, depth, label = next(iter(train))
    assert (rgb.dtype, depth.dtype, label.dtype) == (torch.float32, torch.float32, torch.int64)
    assert (tuple(rgb.shape), tuple(depth.shape)) == ((4, 3, 32, 32), (4, 1, 32, 32))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_size": 64}, "convert it with that size"),
        ({"dataset_path": "nyu_depth_v2_labeled.mat"}, "is not a finished set"),
        ({"dataset_path": "/nowhere"}, "is not a finished set"),
        ({"num_workers": "many"}, "num_workers"),
        ({"target": "beauty"}, "beauty"),
        ({"fields": ("smell",)}, "smell"),
        ({"num_classes": 12}, "num_classes 12"),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_way_out(
    small_set: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        create_dataloaders(**{"dataset_path": small_set, **config})  # type: ignore[arg-type]


def test_more_than_one_set_under_a_root_is_a_list(small_set: Path, tmp_path: Path) -> None:
    shutil.copytree(small_set, tmp_path / small_set.name)
    shutil.copytree(small_set, tmp_path / "nyuv2-32-00000000")
    with pytest.raises(UserError, match="2 sets under") as error:
        ShardDataset(tmp_path)
    assert small_set.name in str(error.value)


def test_a_damaged_shard_is_refused_at_open(small_set: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    data = (made / "rgb-00000.npy").read_bytes()
    (made / "rgb-00000.npy").write_bytes(data[:-1])
    with pytest.raises(UserError, match="the copy is incomplete"):
        ShardDataset(made)


def test_a_set_of_rgb_alone_trains_on_rgb(mat: Path, tmp_path: Path) -> None:
    made = convert(mat, tmp_path, ConversionSettings(fields=("rgb",), size=32))
    train, _ = create_dataloaders(made, batch_size=4, num_workers=0, fields=("rgb",))
    picture(open_set(made), tmp_path / "sheet.png", 2)
    with pytest.raises(UserError, match="has no field depth"):
        create_dataloaders(made)
    rgb, label = next(iter(train))
    assert (rgb.dtype, tuple(rgb.shape), tuple(label.shape)) == (
        torch.float32,
        (4, 3, 32, 32),
        (4,),
    )
