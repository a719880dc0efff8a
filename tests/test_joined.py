"""Several sets of one size, read and trained on as one."""

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("PIL", reason="needs pillow")
pytest.importorskip("pyarrow", reason="needs pyarrow")

import torch
from helpers.frames import AS_IS, SIDE, converted, stored, write_file, write_table

from convert.sample_frames import png
from convert.sample_sunrgbd import write_sunrgbd
from convert.sources.opening import SourceOptions
from shards.dataset import ShardSet
from shards.errors import DifferentSets, WrongSetting
from shards.manifest import RIGHT_ROW
from shards.spec import SPLITS, DatasetSpec, SceneProtocol
from train.__main__ import main
from train.data import ShardDataset, create_dataloaders, open_for_training
from train.job import make_setup
from train.joined import JoinedSet, _joined_spec, join, label_classes, parts_of_rows
from train.settings import Settings

HOUSE = {"kitchen": 6, "bedroom": 5, "hall": 3}  # rows by type
SCHOOL = {"classroom": 7, "kitchen": 4}
NAMES = {"house": ("wall", "bed", "chair"), "school": ("chair", "board", "wall")}
TINY = ("--epochs", "1", "--batch-size", "4", "--width", "4", "--size", "32", "--num-workers", "0")


pytestmark = pytest.mark.usefixtures("one_thread")


def make(folder: Path, name: str, types: Mapping[str, int], **settings: object) -> ShardSet:
    """A set of frames of 8x8 pixels whose every picture tells which one it is."""
    names = folder / f"{name}.txt"
    names.write_text("\n".join(NAMES[name]) + "\n")
    rows = []
    all_types = [each for each, n in types.items() for _ in range(n)]
    for k, scene_type in enumerate(all_types):
        rng = np.random.default_rng([k, len(types)])
        row = {"scene": f"{name}{k}", "scene_type": scene_type}
        row["split"] = ("train", "test", "train")[k % 3]
        pictures = {
            "rgb": rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
            "depth": rng.integers(1, 4000, (SIDE, SIDE), dtype=np.uint16),
            "label": rng.integers(0, 4, (SIDE, SIDE), dtype=np.uint8),
        }
        for field, picture in pictures.items():
            row[field] = f"{name}/{field}{k}.png"
            write_file(folder / row[field], png(picture))
        rows.append(row)
    table = write_table(folder / f"{name}.csv", rows)
    changed = replace(AS_IS, fields=("rgb", "depth", "label"), **settings)  # type: ignore[arg-type]
    options = SourceOptions(label_names=names)
    return converted(table, folder / "sets", changed, options=options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("joined")


@pytest.fixture(scope="module")
def house(folder: Path) -> ShardSet:
    return make(folder, "house", HOUSE)


@pytest.fixture(scope="module")
def school(folder: Path) -> ShardSet:
    return make(folder, "school", SCHOOL, rows_per_shard=3)


@pytest.fixture(scope="module")
def both(house: ShardSet, school: ShardSet) -> JoinedSet:
    return join([house, school])


# ---------------------------------------------------------------- rows and what is known of them


def test_every_row_of_a_split_comes_as_its_own_set_has_it(
    both: JoinedSet, house: ShardSet, school: ShardSet
) -> None:
    for split in ("train", "test"):
        dataset = ShardDataset([house.path, school.path], split=split)
        alone = [ShardDataset(each, split=split) for each in (house, school)]
        assert len(dataset) == sum(map(len, alone))
        rgb, depth, label = dataset.batch(np.arange(len(dataset)))
        expected = [each.batch(np.arange(len(each))) for each in alone]
        assert torch.equal(rgb, torch.cat([each[0] for each in expected]))
        assert torch.equal(depth, torch.cat([each[1] for each in expected]))
        names = [
            alone_set.classes[number]
            for alone_set, batch in zip(alone, expected, strict=True)
            for number in batch[2].tolist()
        ]
        assert [dataset.classes[number] for number in label.tolist()] == names


def test_rows_of_both_in_any_order_come_as_they_are_stored(
    both: JoinedSet, house: ShardSet, school: ShardSet
) -> None:
    dataset = ShardDataset(both, split="all")
    of_both = np.concatenate([stored(house, "rgb"), stored(school, "rgb")])
    order = np.random.default_rng(0).permutation(len(dataset))
    np.testing.assert_array_equal(dataset.batch(order)[0], of_both[dataset.rows[order]])
    assert parts_of_rows(both, np.array([0, 13, 14, 24])).tolist() == [0, 0, 1, 1]


def test_labels_mean_what_their_own_set_says(
    both: JoinedSet, house: ShardSet, school: ShardSet
) -> None:
    names, _ = label_classes(both, None)
    assert names == ("wall", "bed", "chair", "board")
    target = ShardDataset(both, split="all", target="semantic").batch(np.arange(both.n_rows))[-1]
    first = 0
    for part in (house, school):
        ids = stored(part, "label")
        found = target[first : first + part.n_rows].numpy()
        of_name = np.array(["void", *part.dataset.label_names])
        of_class = np.array([*names, "void"])
        np.testing.assert_array_equal(
            of_class[np.where(found < 0, len(names), found)], of_name[ids]
        )
        first += part.n_rows


def test_places_types_and_splits_are_those_of_each_row(
    both: JoinedSet, house: ShardSet, school: ShardSet
) -> None:
    def told(found: ShardSet) -> list[tuple[str, str, str]]:
        places = [found.manifest.scenes[k] for k in found.column("scene")]
        types = [found.dataset.scene_types[k] for k in found.column("scene_type")]
        splits = [SPLITS[k] for k in found.column("split")]
        return list(zip(places, types, splits, strict=True))

    assert told(both) == told(house) + told(school)
    assert list(both.column("rgb_file")) == [*house.column("rgb_file"), *school.column("rgb_file")]
    assert list(both.texts("rgb_file")) == [*house.texts("rgb_file"), *school.texts("rgb_file")]


def test_statistics_are_of_all_train_rows_together(
    both: JoinedSet, house: ShardSet, school: ShardSet
) -> None:
    depth = []
    for part in (house, school):
        is_train = part.column("split") == SPLITS.index("train")
        depth.append(stored(part, "depth")[is_train].ravel())
    of_all = np.concatenate(depth)
    statistics = both.field("depth").statistics
    assert statistics is not None
    assert statistics.count == (len(of_all),)
    assert statistics.mean[0] == pytest.approx(of_all.mean())
    assert statistics.std[0] == pytest.approx(of_all.std())


def test_a_joined_dataset_is_pickled_by_its_paths(both: JoinedSet) -> None:
    dataset = ShardDataset(both)
    sent = pickle.dumps(dataset)
    assert len(sent) < 3000
    again = pickle.loads(sent)
    for ours, theirs in zip(dataset.batch(np.arange(5)), again.batch(np.arange(5)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_several_sets(workers: int, house: ShardSet, school: ShardSet) -> None:
    paths = [house.path, str(school.path)]
    train, test = create_dataloaders(paths, batch_size=4, num_workers=workers, eval_split="test")
    for loader, split in ((train, "train"), (test, "test")):
        seen = torch.cat([batch[0] for batch in loader])
        alone = ShardDataset(paths, split=split, normalize=True)
        everything = alone.batch(np.arange(len(alone)))[0]
        n_full = len(alone) // 4 * 4 if split == "train" else len(alone)
        assert len(seen) == n_full
        known = {row.numpy().tobytes() for row in everything}
        assert {row.numpy().tobytes() for row in seen} <= known


# ---------------------------------------------------------------- classes


def spec_of(name: str, types: tuple[str, ...], *protocols: SceneProtocol) -> DatasetSpec:
    default = len(protocols[0].names) if protocols else None
    return DatasetSpec(
        name=name,
        width=0,
        height=0,
        scene_types=types,
        protocols=protocols,
        default_n_classes=default,
    )


ROOMS = spec_of(
    "rooms",
    ("kitchen", "cellar", "attic"),
    SceneProtocol(classes=("kitchen",), others="others"),
)
WORLD = spec_of(
    "world",
    ("kitchen", "lab", "idk", "attic"),
    SceneProtocol(classes=("kitchen", "lab", "attic")),
)


def classes_of(spec: DatasetSpec, n_classes: int | None) -> dict[str, str]:
    protocol = spec.protocol(n_classes)
    ids = zip(spec.scene_types, protocol.ids_of(spec.scene_types), strict=True)
    return {name: protocol.names[number] for name, number in ids if number >= 0}


def test_a_type_has_the_class_of_its_name_where_any_set_has_that() -> None:
    spec = _joined_spec([ROOMS, WORLD], is_one_geometry=False)
    assert spec.protocol(None).names == ("kitchen", "others", "lab", "attic")
    assert classes_of(spec, None) == {
        "kitchen": "kitchen",
        "cellar": "others",
        "attic": "attic",
        "lab": "lab",
    }


def test_a_number_of_classes_is_that_of_the_set_that_has_it() -> None:
    spec = _joined_spec([ROOMS, WORLD], is_one_geometry=False)
    assert classes_of(spec, 3) == {"kitchen": "kitchen", "attic": "attic", "lab": "lab"}
    assert classes_of(spec, 2) == {"kitchen": "kitchen", "cellar": "others", "attic": "others"}
    assert len(classes_of(spec, 5)) == 5  # every type


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"size": 16}, "size 8 and 16"), ({"fields": ("rgb",), "kinds": {}}, "")],
)
def test_sets_that_differ_in_size_are_one_line(
    changes: dict[str, object], what: str, house: ShardSet, folder: Path
) -> None:
    other = converted(folder / "school.csv", folder / "others", replace(AS_IS, **changes))  # type: ignore[arg-type]
    if what:
        with pytest.raises(DifferentSets, match=what):
            open_for_training([house.path, other.path])
    else:  # the fields that all have
        assert list(open_for_training([house.path, other.path]).manifest.fields) == ["rgb"]


def test_a_set_is_not_joined_with_itself(house: ShardSet) -> None:
    with pytest.raises(WrongSetting, match="the same set"):
        open_for_training([house.path, house.path])


def test_no_set_at_all_is_one_line() -> None:
    with pytest.raises(WrongSetting, match="finished set"):
        open_for_training([])
    with pytest.raises(WrongSetting, match="data"):
        Settings((), "run")


# ---------------------------------------------------------------- training


def test_two_sets_train_as_one_and_the_run_is_continued_and_asked(
    house: ShardSet, school: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["--data", str(house.path), "--data", str(school.path), "--out", run, *TINY]
    status = main(words)
    said = capsys.readouterr()
    assert status == 0, said.err[-2000:]
    assert f"--data {house.path} --data {school.path}" in said.out
    assert main([*words, "--epochs", "2"]) == 0
    classes = (Path(run) / "classes.csv").read_text()
    assert all(name in classes for name in ("kitchen", "bedroom", "hall", "classroom"))
    capsys.readouterr()
    status = main(["predict", run, "--data", str(school.path)])
    assert status == 0, capsys.readouterr().err[-2000:]


def test_a_run_of_two_sets_does_not_go_on_with_one(
    house: ShardSet, school: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["--out", run, *TINY]
    assert main(["--data", str(house.path), "--data", str(school.path), *words]) == 0
    assert main(["--data", str(house.path), *words]) == 2
    assert "--data" in capsys.readouterr().err


# ---------------------------------------------------------------- the same picture in two sets


@pytest.fixture(scope="module")
def sun(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Made-up rows of SUN RGB-D, some of which are NYU's."""
    folder = tmp_path_factory.mktemp("sun")
    write_sunrgbd(folder / "made", 60)
    settings = replace(AS_IS, size=32, fields=("rgb", "depth", "label"))
    return converted(folder / "made", folder, settings)


@pytest.mark.parametrize("nyu_first", [True, False])
def test_a_picture_that_both_sets_hold_is_taken_once(
    nyu_first: bool, sun: ShardSet, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nyu = open_for_training(small_set)
    held = set(nyu.column("row").tolist())
    twins = [row for row in sun.column("row_of_nyuv2").tolist() if row in held]
    assert 0 < len(twins) < sun.n_rows

    joined = open_for_training([nyu, sun] if nyu_first else [sun, nyu])
    is_right = joined.column("status") == RIGHT_ROW
    first_of_nyu = 0 if nyu_first else sun.n_rows
    assert is_right[first_of_nyu : first_of_nyu + nyu.n_rows].all()
    assert int(np.sum(~is_right)) == len(twins)
    assert f"{len(twins)} rows are pictures of {small_set}" in capsys.readouterr().err

    rows = np.concatenate([ShardDataset(joined, split=s, target="depth").rows for s in SPLITS[:2]])
    assert len(np.unique(rows)) == len(rows) == nyu.n_rows + sun.n_rows - len(twins)


def test_what_is_left_out_is_said_once_and_not_by_each_worker(
    sun: ShardSet, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = ShardDataset([small_set, sun.path])
    said = capsys.readouterr().err.splitlines()
    assert sum("left out" in line for line in said) == len(said) == 2
    pickle.loads(pickle.dumps(dataset))  # as a worker that is not forked gets it
    assert capsys.readouterr().err == ""


def test_nyu_and_sun_have_13_classes_of_pixels_and_one_camera_a_row(
    sun: ShardSet, small_set: Path
) -> None:
    joined = open_for_training([small_set, sun.path])
    names = ShardDataset(joined, target="semantic13").classes
    assert names == ShardDataset(small_set, target="semantic13").classes
    both = ShardDataset(joined, target=("scene", "semantic13"))
    *_, pixels = both.batch(np.arange(len(both)))
    pixels_alone = ShardDataset(joined, target="semantic13")
    at = np.flatnonzero(np.isin(pixels_alone.rows, both.rows))
    assert torch.equal(pixels, pixels_alone.batch(at)[-1])
    scenes = ShardDataset(joined).classes
    for part in (small_set, sun):
        assert set(ShardDataset(part).classes) <= set(scenes)
    assert ShardDataset(joined, num_classes=19).classes == ShardDataset(sun).classes
    setup = make_setup(Settings((str(small_set), str(sun.path)), "run"), torch.device("cpu"))
    assert setup.sees_surfaces
    assert setup.rays == ()


def test_sets_of_other_crops_are_one_without_a_camera_for_all(small_set: Path) -> None:
    whole = open_for_training(small_set)
    settings = replace(whole.settings, crop="sunrgbd")
    cropped = ShardSet(whole.path, replace(whole.manifest, settings=settings))
    assert whole.dataset.camera is not None
    joined = join([whole, cropped])
    assert joined.dataset.camera is None
    assert joined.settings.crop == "none"
