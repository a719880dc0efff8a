"""A dataset is data: one that no package knows is converted, verified, loaded and trained on."""

import csv
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.made_up import (
    GROUP_ROWS,
    HEIGHT,
    LAB,
    N_ROWS,
    SMALL,
    WIDTH,
    WITHOUT_CAMERA,
    LabSource,
    MemoryReader,
)
from helpers.sets import convert, files_of, is_whole, shard_bytes

from convert.inspect import SheetRows, describe, picture
from convert.resize import Resizer
from convert.sources.base import Source
from convert.sources.errors import Unreadable
from convert.verify import OtherRows, against_source
from loader.loader import Loader
from shards.dataset import ShardSet, open_set
from shards.errors import DamagedSource, MissingSet, WrongSetting
from shards.spec import NO_SCENE_TYPE, SPLITS, VOID, ConversionSettings
from train.__main__ import main, parse
from train.data import ShardDataset, create_dataloaders
from train.geometry import scored_box_of
from train.job import make_setup
from train.loop import TrainingResult, train
from train.recipe import pixels_task
from train.settings import Settings

CODECS = {
    "rgb": "none",
    "depth": "blosc",
    "label": "zstd",
    "thermal": "blosc-zstd",
    "infrared": "zstd",
}
FIELDS = tuple(CODECS)
TINY = ("--batch-size", "4", "--width", "4", "--size", "32", "--num-workers", "0")
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lab() -> LabSource:
    return LabSource()


@pytest.fixture(scope="module")
def lab_set(lab: LabSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(lab, tmp_path_factory.mktemp("lab"), SMALL, workers=1)


@pytest.fixture(scope="module")
def found(lab_set: Path) -> ShardSet:
    return open_set(lab_set)


def rows_in(lab: LabSource, split: str, *, with_class: bool = False) -> np.ndarray:
    """Row numbers of a split; `with_class`: of a type that the default protocol has."""
    chosen = lab.split == SPLITS.index(split)
    if with_class:
        yard = LAB.scene_types.index("yard")
        chosen &= (lab.scene_type != NO_SCENE_TYPE) & (lab.scene_type != yard)
    return np.flatnonzero(chosen)


def dataset_of(loader: Loader) -> ShardDataset:
    assert isinstance(loader.dataset, ShardDataset)
    return loader.dataset


def stored(found: ShardSet, field: str) -> np.ndarray:
    return np.concatenate(found.shards(field))


# ---------------------------------------------------------------- converting


def test_the_parts_of_the_made_up_source_are_what_the_contract_asks_for(lab: LabSource) -> None:
    assert isinstance(lab, Source)
    (reader,) = lab.readers(["thermal"])
    pictures = reader.read_group(0)["thermal"]
    assert np.shape(pictures) == (GROUP_ROWS["thermal"], WIDTH, HEIGHT)
    LAB.check()


def test_every_row_is_what_the_resize_rules_make_of_it(lab: LabSource, found: ShardSet) -> None:
    assert list(found.manifest.fields) == ["rgb", "depth", "label", "thermal", "infrared"]
    for name, field in lab.fields.items():
        small = Resizer(field=field, size=32)
        expected = np.stack([small(row) for row in lab.arrays[name]])
        np.testing.assert_array_equal(stored(found, name), expected, name)


def test_a_crop_is_the_datasets_own(tmp_path: Path) -> None:
    source = LabSource(crop="centre")
    made = open_set(convert(source, tmp_path, replace(SMALL, crop="centre")))
    box = LAB.crops["centre"]
    part = source.arrays["thermal"][:, box.left : box.right, box.top : box.bottom]
    small = Resizer(field=source.fields["thermal"], size=32)
    expected = np.stack([small(row) for row in part])
    np.testing.assert_array_equal(stored(made, "thermal"), expected)
    with pytest.raises(WrongSetting, match="none, centre"):
        convert(source, tmp_path, replace(SMALL, crop="eigen"))


def test_depth_is_scored_in_the_datasets_own_crop(lab_set: Path) -> None:
    box = scored_box_of(ShardDataset(lab_set))
    assert (box.top, box.bottom, box.left, box.right) == (3, 33, 6, 38)
    with pytest.raises(ValueError, match="depth_crop eigen is none of its crops"):
        replace(LAB, depth_crop="eigen").check()


def test_any_number_of_workers_gives_the_same_bytes(
    lab: LabSource, lab_set: Path, tmp_path: Path
) -> None:
    made = convert(lab, tmp_path, SMALL, workers=3)
    assert made.name == lab_set.name
    assert shard_bytes(made) == shard_bytes(lab_set)
    assert (made / "manifest.json").read_bytes() == (lab_set / "manifest.json").read_bytes()


def test_a_compressed_zarr_set_has_the_same_rows_from_any_number_of_workers(
    lab: LabSource, found: ShardSet, tmp_path: Path
) -> None:
    one = open_set(convert(lab, tmp_path / "one", SMALL, workers=1, codecs=CODECS))
    three = open_set(convert(lab, tmp_path / "three", SMALL, workers=3, codecs=CODECS))
    assert one.path.name == f"{found.path.name}.zarr"
    assert files_of(one.path) == files_of(three.path)
    assert is_whole(one.path)
    for name in FIELDS:
        np.testing.assert_array_equal(stored(one, name), stored(found, name), name)
    for name in found.manifest.columns:
        np.testing.assert_array_equal(one.column(name), found.column(name), name)


class BrokenReader(MemoryReader):
    """The last rows cannot be read."""

    def read_group(self, group: int) -> np.ndarray:
        if (group + 1) * self.group_rows >= N_ROWS:
            raise Unreadable("the lens cap is on")
        return super().read_group(group)


class BrokenLab(LabSource):
    """Its thermal camera fails in the end."""

    def rows_of(self, field: str) -> MemoryReader:
        kind = BrokenReader if field == "thermal" else MemoryReader
        return kind(self.arrays[field], GROUP_ROWS[field])


@pytest.mark.parametrize("codecs", [None, CODECS], ids=["npy", "zarr"])
def test_a_run_that_failed_in_the_middle_goes_on_and_ends_the_same(
    codecs: dict[str, str] | None,
    lab: LabSource,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = convert(lab, tmp_path / "whole", SMALL, codecs=codecs)
    with pytest.raises(DamagedSource, match="the lab: the thermal camera row 26: the lens cap"):
        convert(BrokenLab(), tmp_path / "broken", SMALL, workers=1, codecs=codecs)
    capsys.readouterr()

    resumed = convert(lab, tmp_path / "broken", SMALL, codecs=codecs)
    assert "shards are done already: going on from there" in capsys.readouterr().err
    assert files_of(resumed) == files_of(whole)
    assert (resumed / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_a_second_run_does_nothing(
    lab: LabSource, lab_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(lab, lab_set.parent, SMALL) == lab_set
    assert "nothing to do" in capsys.readouterr().err


def test_the_directory_is_named_after_the_dataset(found: ShardSet) -> None:
    assert found.path.name == f"lab-32-{found.manifest.fingerprint[:8]}"
    assert found.dataset == LAB
    assert found.manifest.source.kind == "table"


def test_columns_are_as_given_and_neutral_where_nothing_is_given(
    lab: LabSource, found: ShardSet
) -> None:
    np.testing.assert_array_equal(found.column("split"), lab.split)
    np.testing.assert_array_equal(found.column("scene"), lab.scene)
    np.testing.assert_array_equal(found.column("scene_type"), lab.scene_type)
    assert found.column("size").tolist() == [[HEIGHT, WIDTH]] * N_ROWS
    assert found.column("rgb_file")[4] == "rgb/004 µ.png"
    assert found.manifest.scenes == tuple(f"room {k}" for k in range(10))

    assert found.column("depth_file").tolist() == [""] * N_ROWS
    assert found.column("row").tolist() == list(range(N_ROWS))
    assert not found.column("status").any()
    assert not found.column("accel").any()


@pytest.mark.parametrize("field", ["thermal", "infrared", "depth"])
def test_statistics_are_those_of_the_valid_train_pixels(
    lab: LabSource, found: ShardSet, field: str
) -> None:
    pixels = stored(found, field)[rows_in(lab, "train")].astype(np.float64)
    valid = pixels[pixels > 0] if field == "depth" else pixels.ravel()
    statistics = found.field(field).statistics
    assert statistics is not None
    assert statistics.count == (len(valid),)
    np.testing.assert_allclose(statistics.mean, valid.mean())
    np.testing.assert_allclose(statistics.std, valid.std())
    assert found.field("label").statistics is None


# ---------------------------------------------------------------- verify, inspect


def test_verify_finds_every_byte_right_and_rows_as_the_source_gives_them(
    lab: LabSource, found: ShardSet
) -> None:
    assert is_whole(found.path)
    assert against_source(found, lab, N_ROWS) == N_ROWS
    other = LabSource()
    other.arrays["thermal"] = 255 - other.arrays["thermal"]
    with pytest.raises(OtherRows, match=r"thermal-0000\d.npy: row \d+ is not what the lab gives"):
        against_source(found, other, N_ROWS)


def test_verify_names_what_another_source_says_of_the_rows(found: ShardSet) -> None:
    other = LabSource()
    other.scene_type[1] = LAB.scene_types.index("yard")
    with pytest.raises(
        OtherRows, match="column scene_type, row 1, says no type, the lab says 'yard'"
    ):
        against_source(found, other, 1)
    with pytest.raises(OtherRows, match="has 30 rows, the lab has 12"):
        against_source(found, LabSource(n_rows=12), 1)
    fewer = replace(LAB, label_names=LAB.label_names[:-1])
    with pytest.raises(OtherRows, match="has 7 label names, the lab has 6"):
        against_source(found, LabSource(dataset=fewer), 1)


def test_verify_of_a_crop_uses_the_datasets_box(tmp_path: Path) -> None:
    source = LabSource(crop="centre")
    made = open_set(convert(source, tmp_path, replace(SMALL, crop="centre")))
    assert against_source(made, source, N_ROWS) == N_ROWS


def test_inspect_says_what_is_in_it(found: ShardSet) -> None:
    text = describe(found)
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "rows 30: 15 train, 9 val, 6 test, 10 scenes (0 in several splits)" in lines
    assert "scene type train val test" in lines
    assert any(line.startswith("storage ") for line in lines)
    assert any(line.startswith("(none) ") for line in lines)
    assert "thermal |u1 (32, 32), grey level 0..255" in lines
    assert "infrared <u2 (32, 32), grey level 0..65535" in lines
    assert "note the robot was moved by hand" in lines


def test_inspect_draws_val_rows_and_the_datasets_names(
    found: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[SheetRows] = []

    def sheet(rows: SheetRows, out: Path) -> None:
        drawn.append(rows)

    with monkeypatch.context() as patch:
        patch.setattr("convert.inspect.contact_sheet", sheet)
        picture(found, tmp_path / "sheet.png", N_ROWS)
    assert drawn[0].label_names == LAB.label_names
    assert drawn[0].captions[4] == "row 4: room 1 (bench, val)"
    assert drawn[0].captions[16] == "row 16: room 5 (no type, val)"

    pytest.importorskip("matplotlib", reason="needs matplotlib")
    picture(found, tmp_path / "sheet.png", 3)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- loading


def test_a_batch_of_any_fields_is_what_the_shards_hold(lab: LabSource, found: ShardSet) -> None:
    fields = ("rgb", "thermal", "depth", "infrared")
    dataset = ShardDataset(found, split="val", fields=fields, target="semantic")
    rows = rows_in(lab, "val")
    assert dataset.rows.tolist() == rows.tolist()
    rgb, thermal, depth, infrared, label = dataset.batch(np.arange(len(rows)))

    assert tuple(rgb.shape) == (9, 3, 32, 32)
    assert tuple(thermal.shape) == tuple(depth.shape) == tuple(infrared.shape) == (9, 1, 32, 32)
    assert (thermal.dtype, depth.dtype) == (torch.uint8, torch.int16)
    assert (infrared.dtype, label.dtype) == (torch.uint16, torch.int64)
    np.testing.assert_array_equal(rgb, stored(found, "rgb")[rows])
    np.testing.assert_array_equal(thermal[:, 0], stored(found, "thermal")[rows])
    np.testing.assert_array_equal(depth[:, 0], stored(found, "depth")[rows])
    np.testing.assert_array_equal(infrared[:, 0], stored(found, "infrared")[rows])


@pytest.mark.parametrize("device", [None, "cpu"], ids=["mapped", "kept on the device"])
@pytest.mark.parametrize("field", ["thermal", "infrared"])
def test_grey_is_normalised_by_its_own_statistics(
    found: ShardSet, field: str, device: str | None
) -> None:
    dataset = ShardDataset(
        found, fields=("rgb", field, "depth"), target="semantic", normalize=True, device=device
    )
    _, grey, _, _ = dataset.batch([3, 0, 3])
    statistics = found.field(field).statistics
    assert statistics is not None
    levels = stored(found, field)[dataset.rows[[3, 0, 3]]].astype(np.float64)
    expected = (levels - statistics.mean[0]) / statistics.std[0]
    assert grey.dtype == torch.float32
    np.testing.assert_allclose(grey[:, 0], expected, atol=1e-4)


def test_rows_without_a_class_are_left_out_and_counted(
    lab: LabSource, found: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = ShardDataset(found)
    rows = rows_in(lab, "train", with_class=True)
    n_out = 15 - len(rows)
    n_out = 15 - len(rows)
    assert n_out > np.sum(lab.scene_type[rows_in(lab, "train")] == NO_SCENE_TYPE) > 0
    assert f"{n_out} of 15 train rows have no class: left out" in capsys.readouterr().err
    assert dataset.classes == ["storage", "bench", "corridor"]
    assert dataset.rows.tolist() == rows.tolist()

    names = [dataset.classes[k] for k in dataset.labels()]
    assert names == [LAB.scene_types[k] for k in lab.scene_type[rows]]
    labels = dataset.batch(np.arange(len(rows)))[-1]
    assert labels.tolist() == dataset.labels().tolist()


def test_every_type_is_a_class_where_that_is_asked_for(lab: LabSource, found: ShardSet) -> None:
    dataset = ShardDataset(found, num_classes=4)
    assert dataset.classes == list(LAB.scene_types)
    assert len(dataset) == np.sum(lab.scene_type[rows_in(lab, "train")] != NO_SCENE_TYPE)
    with pytest.raises(WrongSetting, match="num_classes 13: choose 3 or 4"):
        ShardDataset(found, num_classes=13)


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("semantic", LAB.label_names),
        ("semantic7", LAB.label_names),
        ("semantic3", ("structure", "furniture", "thing")),
    ],
)
def test_semantic_targets_are_the_datasets_labels_or_its_groups(
    lab: LabSource, found: ShardSet, target: str, names: tuple[str, ...]
) -> None:
    dataset = ShardDataset(found, split="all", target=target)
    assert dataset.classes == list(names)
    table = LAB.label_tables[0].ids if target == "semantic3" else tuple(range(8))
    classes = np.array([VOID if k == 0 else k - 1 for k in table])
    mask = dataset.batch(np.arange(N_ROWS))[-1]
    np.testing.assert_array_equal(mask, classes[stored(found, "label")])
    with pytest.raises(
        WrongSetting, match="semantic40: of its labels this set has semantic, semantic3"
    ):
        ShardDataset(found, target="semantic40")


def test_the_depth_target_is_in_metres(found: ShardSet) -> None:
    dataset = ShardDataset(found, split="all", target="depth", fields=("rgb", "thermal"))
    _, _, metres = dataset.batch([7, 2])
    assert (tuple(metres.shape), metres.dtype) == ((2, 1, 32, 32), torch.float32)
    np.testing.assert_allclose(metres[:, 0], stored(found, "depth")[[7, 2]] / 1000, atol=1e-6)


def test_a_compressed_set_is_loaded_from_its_unpacked_copy(
    lab: LabSource, lab_set: Path, tmp_path: Path
) -> None:
    packed = convert(lab, tmp_path, SMALL, codecs=CODECS)
    dataset = ShardDataset(packed, split="all", fields=FIELDS[:2] + FIELDS[3:], target="semantic")
    assert dataset.path == packed.with_suffix("")
    assert shard_bytes(dataset.path) == shard_bytes(lab_set)


# ---------------------------------------------------------------- loaders


def test_the_second_loader_is_of_the_val_rows_where_there_are_some(
    lab: LabSource, lab_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = create_dataloaders(lab_set, batch_size=4, num_workers=0)
    assert capsys.readouterr().err.count("evaluation: on the val rows") == 1
    assert dataset_of(val).rows.tolist() == rows_in(lab, "val", with_class=True).tolist()
    rgb, depth, label = next(iter(train))
    assert (tuple(rgb.shape), tuple(depth.shape)) == ((4, 3, 32, 32), (4, 1, 32, 32))
    assert set(label.tolist()) <= {0, 1, 2}


def test_the_second_loader_is_of_the_split_that_is_named(
    lab: LabSource, lab_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, test = create_dataloaders(
        lab_set, batch_size=4, num_workers=0, eval_split="test", target="semantic3"
    )
    assert "evaluation" not in capsys.readouterr().err
    assert dataset_of(test).rows.tolist() == rows_in(lab, "test").tolist()
    assert sum(len(label) for _, _, label in test) == 6


def test_the_second_loader_is_of_the_test_rows_where_there_is_no_val(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = convert(LabSource(splits=("train", "test")), tmp_path, SMALL)
    _, second = create_dataloaders(made, batch_size=4, num_workers=0)
    assert dataset_of(second).split == "test"
    assert "evaluation: on the test rows" in capsys.readouterr().err


def test_a_set_without_val_and_test_rows_cannot_be_scored(tmp_path: Path) -> None:
    made = convert(LabSource(splits=("train",)), tmp_path, SMALL)
    with pytest.raises(
        MissingSet, match=r"has neither val nor test rows\. Its source has to say which"
    ):
        create_dataloaders(made, batch_size=4, num_workers=0)


# ---------------------------------------------------------------- training


def flags_of(made: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(made), "--out", str(out), "--epochs", "2", *TINY, *more]


def quickly(made: Path, out: Path, *more: str) -> TrainingResult:
    """The same training, without a report."""
    words = flags_of(made, out, *more)
    return train(parse(words)[0])


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed: drawing takes longer than these trainings."""
    monkeypatch.setitem(sys.modules, "train.plots", None)


def table_in(path: Path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_training_scores_epochs_on_val_and_test_once_at_the_end(
    lab: LabSource, lab_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags_of(lab_set, tmp_path, "--inputs", "rgbd")) == 0
    metrics = table_in(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in metrics] == ["1", "2"]
    assert {"val_loss", "val_top1", "val_mean_class"} <= metrics[0].keys()
    assert not [name for name in metrics[0] if name.startswith("test_")]

    lines = capsys.readouterr().out.splitlines()
    kinds = [line.split()[0] for line in lines]
    assert kinds[:5] == ["epoch", "epoch", "last", "best", "test"]
    assert kinds.count("test") == 1
    assert "picked on the val rows" in lines[3]
    assert re.fullmatch(r"test  test loss \S+  test top1 \S+  test mean class \S+", lines[4])

    rows = rows_in(lab, "test", with_class=True)
    pictures = [row["picture"] for row in table_in(tmp_path / "predictions.csv")]
    assert pictures == [f"row {row}: room {row // 3}" for row in rows]
    names = [row["class"] for row in table_in(tmp_path / "classes.csv")]
    assert names == ["storage", "bench", "corridor"]


def test_a_finished_run_predicts_the_rows_that_it_was_reported_on(
    lab_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_pictures(monkeypatch)
    assert main(flags_of(lab_set, tmp_path)) == 0
    reported = (tmp_path / "predictions.csv").read_bytes()
    assert main(["predict", str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    assert "on the test rows: test_loss" in capsys.readouterr().out
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == reported


def test_where_there_are_no_test_rows_a_run_is_reported_on_the_val_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    made = convert(LabSource(splits=("train", "val")), tmp_path, SMALL)
    result = quickly(made, tmp_path / "run")
    assert (result.setup.eval_split, result.test) == ("val", {})
    assert main(["predict", str(tmp_path / "run")]) == 0
    assert "on the val rows: val_loss" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["semantic", "semantic3", "depth"])
def test_every_task_trains(
    task: str, lab_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = quickly(lab_set, tmp_path, "--task", task)
    score = "rmse" if task == "depth" else "miou"
    assert result.last[f"val_{score}"] >= 0
    assert result.test[f"test_{score}"] >= 0
    is_said = "has no raw_depth: depth is learnt" in capsys.readouterr().err
    assert is_said == (task == "depth")


def test_the_recipe_learns_the_finest_classes_first_but_not_hundreds(found: ShardSet) -> None:
    assert pixels_task(found) == "semantic7"
    many = replace(LAB, label_names=tuple(f"thing {k}" for k in range(101)))
    of_many = ShardSet(found.path, replace(found.manifest, dataset=many))
    assert pixels_task(of_many) == "semantic3"


@pytest.mark.parametrize("crop", ["none", "centre"])
def test_rays_are_those_of_the_datasets_camera_and_crop(crop: str, tmp_path: Path) -> None:
    source = LabSource(crop=crop)
    made = convert(source, tmp_path, ConversionSettings(size=16, rows_per_shard=8, crop=crop))
    box = LAB.crop_box(crop)
    centres = (np.arange(16) + 0.5) / 16
    columns = box.left + centres * (box.right - box.left)
    lines = box.top + centres * (box.bottom - box.top)

    setup = make_setup(Settings(str(made), str(tmp_path / "run")), CPU)
    x, y = (plane[0].numpy() for plane in setup.rays)
    np.testing.assert_allclose(x[5], (columns - 22.25) / 41.5, rtol=1e-5)
    np.testing.assert_allclose(y[:, 5], (lines - 18.5) / 40.0, rtol=1e-5)

    # The column says the same in shares of what is stored, to half a pixel of the whole picture.
    camera = open_set(made).column("camera")
    assert np.ptp(camera, axis=0).tolist() == [0] * 4
    fx, fy, cx, cy = camera[0]
    np.testing.assert_allclose((centres - cx) / fx, x[5], atol=0.501 / 41.5)
    np.testing.assert_allclose((centres - cy) / fy, y[:, 5], atol=0.501 / 40.0)


def test_a_dataset_without_a_camera_trains_on_plain_depth(tmp_path: Path) -> None:
    made = convert(LabSource(dataset=WITHOUT_CAMERA), tmp_path, SMALL)
    assert made.name.startswith("lab_blind-32-")
    assert not open_set(made).column("camera").any()
    result = quickly(made, tmp_path / "run")
    assert result.setup.rays == ()
    assert result.last["val_top1"] >= 0


def test_a_dataset_without_scene_types_learns_its_pixels(tmp_path: Path) -> None:
    spec = replace(LAB, name="plain", scene_types=(), protocols=(), default_n_classes=None)
    made = convert(LabSource(dataset=spec), tmp_path, SMALL)
    with pytest.raises(MissingSet, match=r"has no train rows with a scene type"):
        ShardDataset(made)
    assert quickly(made, tmp_path / "run", "--task", "semantic3").last["val_miou"] >= 0
    again = quickly(made, tmp_path / "run", "--task", "semantic3", "--epochs", "3")
    assert again.epochs == 3  # the checkpoint has no number of scene classes either
