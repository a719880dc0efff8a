"""What a network sees beyond rgb and depth, and the cameras of rows as a field."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("PIL", reason="needs pillow")
pytest.importorskip("pyarrow", reason="needs pyarrow")

import torch
from helpers.frames import AS_IS, SIDE, converted, stored, write_file, write_table
from torch import Tensor, nn

from convert.sample_frames import png
from shards.dataset import ShardSet
from shards.errors import MissingField, UserError, WrongSetting
from shards.spec import ConversionSettings
from train.__main__ import main
from train.augment import Draws, augment
from train.data import ShardDataset, create_dataloaders
from train.geometry import rays_of_cameras
from train.inputs import network_inputs, on_device
from train.job import TaskSetup, make_setup, new_run
from train.settings import Settings

CPU = torch.device("cpu")
KINDS = {"thermal": "grey", "normals": "colour", "infrared": "grey16", "lidar": "depth"}
INPUTS = "rgb,depth,thermal,normals,infrared,lidar"
N_ROWS = 16
FULL: ConversionSettings = replace(AS_IS, kinds=KINDS, fields=("rgb", "depth", "label", *KINDS))
TINY = ("--epochs", "1", "--batch-size", "4", "--width", "4", "--size", "32", "--num-workers", "0")


pytestmark = pytest.mark.usefixtures("one_thread")


def write_rows(folder: Path) -> list[dict[str, str]]:
    """Frames of 8x8 pixels with all fields, each of another camera; types and splits in turn."""
    rows = []
    for k in range(N_ROWS):
        rng = np.random.default_rng(k)
        row = {"split": ("train", "train", "val", "test")[k % 4], "scene": f"place{k}"}
        row["scene_type"] = ("kitchen", "office")[k // 4 % 2]
        row |= {"fx": f"{6 + k / 8}", "fy": f"{7 + k / 8}", "cx": "3.25", "cy": f"{3.5 + k / 16}"}
        of_field = {
            "rgb": rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
            "depth": rng.integers(0, 4000, (SIDE, SIDE), dtype=np.uint16),
            "label": rng.integers(0, 4, (SIDE, SIDE), dtype=np.uint8),
            "thermal": rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8),
            "normals": rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
            "infrared": rng.integers(0, 65536, (SIDE, SIDE), dtype=np.uint16),
            "lidar": rng.integers(0, 3000, (SIDE, SIDE), dtype=np.uint16),
        }
        for field, picture in of_field.items():
            row[field] = f"{field}{k}.png"
            write_file(folder / row[field], png(picture))
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rooms")
    write_table(folder / "rows.csv", write_rows(folder))
    return folder


@pytest.fixture(scope="module")
def full_set(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return converted(rooms / "rows.csv", tmp_path_factory.mktemp("full"), FULL)


def setup_of(found: ShardSet, **changes: object) -> TaskSetup:
    settings = Settings(str(found.path), "run", size=32, width=4, **changes)  # type: ignore[arg-type]
    return make_setup(settings, CPU, found)


def first_batch(setup: TaskSetup) -> tuple[Tensor, ...]:
    return setup.train_set.batch(np.arange(4))


# ---------------------------------------------------------------- which fields are named


@pytest.mark.parametrize(
    ("given", "task", "fields"),
    [
        ("rgbd", "scene", ("rgb", "depth")),
        ("rgb,depth", "scene", ("rgb", "depth")),
        ("thermal,depth,rgb", "scene", ("rgb", "depth", "thermal")),
        ("depth", "scene", ("depth",)),
        ("rgbd", "depth", ("rgb",)),
        ("depth", "depth", ("rgb",)),
        ("rgb,depth,thermal", "depth", ("rgb", "thermal")),
    ],
)
def test_inputs_are_names_of_fields(given: str, task: str, fields: tuple[str, ...]) -> None:
    assert Settings("set", "run", task=task, inputs=given).input_fields == fields


def test_rgb_and_depth_are_one_setting_under_both_names() -> None:
    assert Settings("set", "run", inputs="depth,rgb") == Settings("set", "run", inputs="rgbd")


@pytest.mark.parametrize("given", ["", "rgb,", "rgb,rgb", "rgbd,thermal", "Thermal", "rgb depth"])
def test_what_names_no_fields_is_refused(given: str) -> None:
    with pytest.raises(WrongSetting, match="inputs"):
        Settings("set", "run", inputs=given)


def test_what_tells_the_depth_that_is_learnt_is_no_input() -> None:
    with pytest.raises(WrongSetting, match="raw_depth tells the depth"):
        Settings("set", "run", task="depth", inputs="rgb,raw_depth")


def test_a_field_that_the_set_has_not_is_one_line(full_set: ShardSet) -> None:
    with pytest.raises(UserError, match="sonar"):
        setup_of(full_set, inputs="rgb,sonar")


def test_ids_are_no_input(full_set: ShardSet) -> None:
    with pytest.raises(UserError, match="label"):
        setup_of(full_set, inputs="rgb,label")


# ---------------------------------------------------------------- what the network is given


def test_each_field_is_given_as_its_kind_is_normalised(full_set: ShardSet) -> None:
    setup = setup_of(full_set, inputs=INPUTS)
    colours, planes, _ = on_device(setup, first_batch(setup))
    given = dict(zip(setup.network_fields, network_inputs(setup, colours, planes), strict=True))
    assert list(given) == INPUTS.split(",")
    rows = setup.train_set.rows[:4]
    for name in KINDS:
        statistics = full_set.field(name).statistics
        assert statistics is not None
        values = stored(full_set, name)[rows].astype(np.float64).reshape(4, -1, SIDE, SIDE)
        mean = np.reshape(statistics.mean, (-1, 1, 1))
        expected = (values - mean) / np.reshape(statistics.std, (-1, 1, 1))
        if KINDS[name] == "depth":
            expected[values == 0] = 0
        np.testing.assert_allclose(given[name], expected, atol=2e-4)


def test_the_network_has_a_stream_for_each_and_listens_to_it(full_set: ShardSet) -> None:
    setup = setup_of(full_set, inputs=INPUTS)
    run = new_run(setup)
    run.model.eval()
    colours, planes, _ = on_device(setup, first_batch(setup))
    pictures = [each.clone() for each in network_inputs(setup, colours, planes)]
    before = run.model(*pictures)
    for k in range(len(pictures)):
        changed = [*pictures]
        changed[k] = pictures[k] + 3
        assert not torch.equal(run.model(*changed), before), setup.network_fields[k]


def test_augmentation_moves_all_fields_alike_and_jitters_rgb_alone(full_set: ShardSet) -> None:
    rng = np.random.default_rng(3)
    rgb = torch.from_numpy(rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8))
    colours = torch.cat([rgb, rgb[:, :1]], dim=1)
    alike = Settings(str(full_set.path), "run", jitter=0.0)
    moved, _ = augment(colours, [], Draws(5, 6), 24, alike)
    torch.testing.assert_close(moved[:, 3], moved[:, 0], atol=1e-3, rtol=0)

    jittered, _ = augment(colours, [], Draws(5, 6), 24, replace(alike, jitter=0.4))
    assert torch.equal(jittered[:, 3], moved[:, 3])
    assert not torch.allclose(jittered[:, 0], moved[:, 0], atol=1)


class TakesAll(nn.Module):
    """A network of a user's own: rgb, depth and a thermal picture."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.head = nn.Linear(5, n_out)

    def forward(self, rgb: Tensor, depth: Tensor, thermal: Tensor) -> Tensor:
        pooled_bc = torch.cat([rgb, depth, thermal], dim=1).mean(dim=(2, 3))
        logits: Tensor = self.head(pooled_bc)
        return logits


def test_a_network_of_a_users_own_is_called_with_the_further_fields(full_set: ShardSet) -> None:
    name = f"{__name__}:{TakesAll.__name__}"
    setup = setup_of(full_set, inputs="rgb,depth,thermal", model=name)
    assert isinstance(new_run(setup).model, TakesAll)  # it was asked once


@pytest.mark.parametrize(
    "task", ["scene", "depth", pytest.param("semantic", marks=pytest.mark.stress)]
)
def test_every_task_trains_on_further_fields_and_answers_about_another_set(
    task: str, full_set: ShardSet, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["--data", str(full_set.path), "--out", run, "--task", task, "--inputs", INPUTS]
    status = main([*words, *TINY])
    assert status == 0, capsys.readouterr().err[-2000:]
    if task == "scene":
        assert main([*words, *TINY, "--epochs", "2"]) == 0  # continued

    other = converted(rooms / "rows.csv", tmp_path / "other", replace(FULL, rows_per_shard=5))
    status = main(["predict", run, "--data", str(other.path)])
    said = capsys.readouterr()
    assert status == 0, said.err[-2000:]
    lines = (Path(run) / "predict" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + N_ROWS


def test_a_set_without_the_field_is_not_asked_about(
    full_set: ShardSet, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["--data", str(full_set.path), "--out", run, "--inputs", "rgb,thermal"]
    assert main([*words, *TINY]) == 0
    bare = converted(rooms / "rows.csv", tmp_path / "bare", replace(AS_IS, fields=("rgb", "depth")))
    capsys.readouterr()
    assert main(["predict", run, "--data", str(bare.path)]) == 2
    assert "has no field thermal" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_has_room_for_16_bits_of_grey(workers: int, rooms: Path, tmp_path: Path) -> None:
    found = converted(rooms / "rows.csv", tmp_path, replace(FULL, size=32))
    train, _ = create_dataloaders(
        found.path,
        batch_size=8,
        num_workers=workers,
        fields=("infrared",),
        normalize=False,
    )
    assert isinstance(train.dataset, ShardDataset)
    ((infrared, _),) = list(train)
    assert infrared.dtype == torch.uint16
    of_all = stored(found, "infrared")
    expected = sorted(of_all[row].tobytes() for row in train.dataset.rows)
    assert sorted(each.numpy().tobytes() for each in infrared) == expected


# ---------------------------------------------------------------- sets without depth


def test_a_set_without_depth_trains_on_rgb(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = converted(rooms / "rows.csv", tmp_path, replace(AS_IS, fields=("rgb", "label")))
    words = ["--data", str(bare.path), "--out", str(tmp_path / "run"), *TINY]
    assert main(words) == 2
    assert "has no field depth" in capsys.readouterr().err
    for task in ("scene", "semantic"):
        out = str(tmp_path / task)
        status = main([*words, "--out", out, "--task", task, "--inputs", "rgb"])
        assert status == 0, capsys.readouterr().err[-2000:]


# ---------------------------------------------------------------- cameras


def test_the_camera_of_each_row_is_handed_out_by_name(full_set: ShardSet) -> None:
    fields = ("rgb", "camera", "depth")
    for normalize in (True, False):
        train, _ = create_dataloaders(
            full_set.path,
            batch_size=4,
            num_workers=0,
            fields=fields,
            normalize=normalize,
            target="depth",
        )
        assert isinstance(train.dataset, ShardDataset)
        dataset = train.dataset
        rgb, camera, depth, target = dataset.batch(np.arange(4))
        rows = dataset.rows[:4]
        np.testing.assert_array_equal(camera, full_set.column("camera")[rows])
        assert camera.dtype == torch.float32
        np.testing.assert_allclose(target[:, 0], stored(full_set, "depth")[rows] / 1000, rtol=1e-6)
        if not normalize:
            np.testing.assert_array_equal(rgb, stored(full_set, "rgb")[rows])
            np.testing.assert_array_equal(depth[:, 0], stored(full_set, "depth")[rows])
        batches = [batch[1] for batch in train]
        assert all(each.shape == (4, 4) for each in batches)


def test_a_field_of_pictures_has_to_be_asked_for_too(full_set: ShardSet) -> None:
    with pytest.raises(WrongSetting, match="a field of pictures too"):
        ShardDataset(full_set, fields=("camera",))


def test_rows_with_cameras_of_their_own_are_seen_as_surfaces(full_set: ShardSet) -> None:
    setup = setup_of(full_set)
    assert setup.sees_surfaces
    assert setup.planes_of_fields == {"rgb": 3, "depth": 5}
    _, (depth, x, y), _ = on_device(setup, first_batch(setup))
    assert depth.shape == x.shape == y.shape == (4, 1, SIDE, SIDE)
    for k, row in enumerate(setup.train_set.rows[:4]):
        fx, fy, cx, cy = full_set.column("camera")[row]
        centres = (np.arange(SIDE) + 0.5) / SIDE
        np.testing.assert_allclose(x[k, 0, 3], (centres - cx) / fx, rtol=1e-5)
        np.testing.assert_allclose(y[k, 0, :, 3], (centres - cy) / fy, rtol=1e-5)


def test_a_row_without_a_camera_makes_depth_a_plane(rooms: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path)
    rows[5] |= {"fx": "", "fy": "", "cx": "", "cy": ""}
    found = converted(write_table(tmp_path / "rows.csv", rows), tmp_path / "sets", AS_IS)
    setup = setup_of(found)
    assert not setup.sees_surfaces
    assert len(on_device(setup, first_batch(setup))[1]) == 1


def test_the_usual_camera_of_a_set_with_one_says_what_its_rays_say(full_set: ShardSet) -> None:
    learnt = setup_of(full_set).learnt
    cameras = full_set.column("camera")[setup_of(full_set).train_set.rows]
    assert learnt.usual_camera == tuple(np.median(cameras, axis=0).tolist())
    x, y = rays_of_cameras(SIDE, torch.tensor([learnt.usual_camera]))
    assert x.shape == y.shape == (1, 1, SIDE, SIDE)
    assert torch.all(x[0, 0, 0].diff() > 0)


def test_a_missing_field_is_told_from_a_camera(rooms: Path, full_set: ShardSet) -> None:
    with pytest.raises(MissingField):
        full_set.field("camera")
