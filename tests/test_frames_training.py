"""Training on a set of frames: its own types are the classes, failed rows are never seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

from helpers.frames import (
    SIZES_WH,
    by_line,
    converted,
    made_up_rooms,
    read_csv,
    write_file,
    write_table,
)

from convert.sample_frames import FAULTS, TABLE, TYPES, png
from loader.loader import Loader
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.manifest import RIGHT_ROW
from shards.spec import SPLITS, ConversionSettings
from train.__main__ import main
from train.data import ShardDataset, create_dataloaders

SETTINGS = ConversionSettings(size=32, rows_per_shard=10)
N_ROWS = 24
TINY = ("--epochs", "1", "--batch-size", "4", "--width", "4", "--size", "32", "--num-workers", "0")
KINDS = {"thermal": "grey", "normals": "colour"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With bad rows, and with two further fields in another table."""
    folder = made_up_rooms(tmp_path_factory.mktemp("sample"), N_ROWS, bad=True)
    rows = read_csv(folder / TABLE)[:N_ROWS]
    for number, row in enumerate(rows):
        rng = np.random.default_rng(number)
        row["thermal"] = f"thermal/{row['rgb']}.png"
        row["normals"] = f"normals/{row['rgb']}.png"
        size = (SIZES_WH[0][1], SIZES_WH[0][0])
        write_file(folder / row["thermal"], png(rng.integers(0, 256, size, dtype=np.uint8)))
        write_file(folder / row["normals"], png(rng.integers(0, 256, (*size, 3), dtype=np.uint8)))
    write_table(folder / "more.csv", rows)
    return folder


@pytest.fixture(scope="module")
def bad_set(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return converted(rooms / TABLE, tmp_path_factory.mktemp("bad"), SETTINGS, max_failed=0.5)


def dataset_of(loader: Loader) -> ShardDataset:
    assert isinstance(loader.dataset, ShardDataset)
    return loader.dataset


def test_its_own_types_are_the_classes(bad_set: ShardSet) -> None:
    train, val = create_dataloaders(bad_set.path, batch_size=4, num_workers=0, num_classes=None)
    assert dataset_of(train).classes == sorted(TYPES)
    assert dataset_of(val).split == "val"
    rgb, depth, label = next(iter(train))
    assert tuple(rgb.shape) == (4, 3, 32, 32)
    assert tuple(depth.shape) == (4, 1, 32, 32)
    assert set(label.tolist()) <= set(range(len(TYPES)))


def test_the_second_loader_is_test_where_that_is_asked_for(bad_set: ShardSet) -> None:
    _, test = create_dataloaders(bad_set.path, batch_size=4, num_workers=0, eval_split="test")
    rows = dataset_of(test).rows
    split = bad_set.column("split")[rows]
    assert {SPLITS[k] for k in split} == {"test"}
    assert len(rows) == N_ROWS // 4


@pytest.mark.parametrize("target", ["scene", "semantic", "depth"])
def test_failed_rows_are_never_seen(target: str, bad_set: ShardSet) -> None:
    status = bad_set.column("status")
    assert np.sum(status != RIGHT_ROW) == len(FAULTS)
    dataset = ShardDataset(bad_set, target=target)
    assert len(dataset) == N_ROWS // 2
    assert (status[dataset.rows] == RIGHT_ROW).all()


def test_a_set_of_which_no_train_row_could_be_read_is_one_line(rooms: Path, tmp_path: Path) -> None:
    rows = read_csv(rooms / TABLE)
    rows = [row for row in rows if row["split"] != "train" or "broken" in row["rgb"]]
    table = write_table(rooms / "no_train.csv", rows)
    found = converted(table, tmp_path, SETTINGS, max_failed=1)
    with pytest.raises(UserError):
        create_dataloaders(found.path, batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def more_set(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Of pictures of one size, as the further fields are."""
    rows = read_csv(rooms / "more.csv")
    sizes = {}
    for row in rows:
        width = round(float(row["cx"]) * 2 + 1)
        sizes.setdefault(width, []).append(row)
    table = write_table(rooms / "more_of_one_size.csv", sizes[SIZES_WH[0][0]])
    settings = replace(SETTINGS, kinds=KINDS, fields=("rgb", "depth", *KINDS))
    return converted(table, tmp_path_factory.mktemp("more"), settings)


def test_a_grey_and_a_colour_field_are_handed_out_by_name(more_set: ShardSet) -> None:
    fields = ("rgb", "thermal", "normals")
    train, _ = create_dataloaders(
        more_set.path, batch_size=2, num_workers=0, fields=fields, normalize=False
    )
    rgb, thermal, normals, label = next(iter(train))
    assert tuple(rgb.shape) == tuple(normals.shape) == (2, 3, 32, 32)
    assert tuple(thermal.shape) == (2, 1, 32, 32)
    assert label.shape == (2,)
    dataset = dataset_of(train)
    batch = dataset.batch(np.arange(2))
    lines = more_set.column("row")[dataset.rows[:2]].tolist()
    for found, field in ((batch[1][:, 0], "thermal"), (batch[2], "normals")):
        of_line = by_line(more_set, field)
        np.testing.assert_array_equal(found, np.stack([of_line[line] for line in lines]))


def test_an_epoch_on_frames_ends_with_scores_of_val_and_test(
    bad_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--data", str(bad_set.path), "--out", str(tmp_path / "run"), *TINY])
    said = capsys.readouterr()
    assert status == 0, said.err[-2000:]
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "val_" in header
