"""python -m train predict: the test rows again, or every row of another set, such as a folder's."""

import csv
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.made_up import LabSource
from helpers.sets import SMALL, convert, copied
from helpers.training import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convert import pipeline
from shards.dataset import open_set
from train.__main__ import main, train_and_report
from train.any_set import AnySet, answer_file
from train.data import ShardDataset
from train.inputs import on_device
from train.job import make_setup, open_loaders
from train.loop import predict_batch, train
from train.set_answers import answer_png
from train.settings import Settings
from train.together import Together, load_runs, newest_of

TINY: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "width": 4,
    "size": 32,
    "num_workers": 0,
}
Said = pytest.CaptureFixture[str]
MAX_FAILED = 1.0


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scene(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sees colours and depth."""
    out = tmp_path_factory.mktemp("predict") / "scene"
    settings = Settings(str(small_set), str(out), num_classes=10, **{**TINY, "epochs": 2})
    train_and_report(settings)
    return out


@pytest.fixture(scope="module")
def rgb(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sees colours alone."""
    out = tmp_path_factory.mktemp("predict") / "rgb"
    train(Settings(str(small_set), str(out), num_classes=10, inputs="rgb", **TINY))
    return out


@pytest.fixture(scope="module")
def depth(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predict") / "depth"
    train(Settings(str(small_set), str(out), task="depth", **TINY))
    return out


def export(small_set: Path, folder: Path, n: int) -> None:
    """The first test rows as the pictures of a folder."""
    for part in ("rgb", "depth"):
        (folder / part).mkdir(parents=True)
    dataset = ShardDataset(small_set, split="test")
    for i in range(n):
        rgb, depth, _ = dataset[i]
        Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(folder / "rgb" / f"{i}.png")
        Image.fromarray(depth[0].numpy().astype(np.uint16)).save(folder / "depth" / f"{i}.png")


def picture(seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(levels.repeat(6, 0).repeat(6, 1))


def folder_of(folder: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(path)
    return folder


def set_of(folder: Path, **changes: Any) -> Path:
    """What `make predict` makes of a folder."""
    settings = replace(SMALL, **changes)
    root = folder.parent / "sets"
    return Path(pipeline.convert(folder, root, settings, max_failed=MAX_FAILED))


def predict(*words: object) -> int:
    return main(["predict", *map(str, words)])


def answers(out: Path) -> dict[str, dict[str, str]]:
    """By the names of the pictures."""
    return {row["picture"]: row for row in rows(out / "predictions.csv")}


def image(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.array(opened)


# ---------------------------------------------------------------- the test rows of its own set


def test_on_the_test_rows_it_gives_the_scores_of_the_run(scene: Path, capsys: Said) -> None:
    assert predict(scene) == 0
    last = rows(scene / "metrics.csv")[-1]
    assert f"test_top1 {float(last['test_top1']):.4f}" in capsys.readouterr().out
    assert rows(scene / "predict" / "predictions.csv") == rows(scene / "predictions.csv")
    right = [row["true"] == row["named"] for row in rows(scene / "predictions.csv")]
    assert sum(right) / len(right) == pytest.approx(float(last["test_top1"]))


def test_several_runs_answer_with_the_mean_of_their_outputs(
    scene: Path, rgb: Path, tmp_path: Path, capsys: Said
) -> None:
    assert predict(scene, scene, "--out", tmp_path / "twice") == 0
    assert rows(tmp_path / "twice" / "predictions.csv") == rows(scene / "predictions.csv")


def test_networks_of_other_inputs_sizes_and_kinds_answer_together_each_as_it_does_alone(
    scene: Path, rgb: Path, small_set: Path, tmp_path: Path
) -> None:
    """Their outputs are averaged, by how much each counts."""
    large = tmp_path / "large"
    changes = {**TINY, "size": 64, "model": "lite0"}
    train(Settings(str(small_set), str(large), num_classes=10, **changes))
    directories = [str(each) for each in (scene, rgb, large)]
    shares = [1.0, 0.5, 2.5]
    together = Together(
        load_runs(directories, [newest_of(each) for each in directories], None), shares
    )
    batch = next(iter(open_loaders(together.setup, "test").eval))  # type: ignore[arg-type]
    with torch.inference_mode():
        found, _ = together.ask(batch)
        alone = []
        for each in directories:
            (one,) = load_runs([each], [newest_of(each)], None)
            of_one = open_loaders(one.setup, "test").eval  # type: ignore[arg-type]
            alone.append(predict_batch(one.run, one.setup, next(iter(of_one)))[0])
    expected = sum(share / 4 * out for share, out in zip(shares, alone, strict=True))
    torch.testing.assert_close(found, expected)


def test_a_share_of_a_run_counts_it_that_much(
    scene: Path, rgb: Path, tmp_path: Path, capsys: Said
) -> None:
    assert predict(scene, rgb, "--shares", "1,1e-9", "--out", tmp_path / "one") == 0
    assert rows(tmp_path / "one" / "predictions.csv") == rows(scene / "predictions.csv")
    capsys.readouterr()
    for shares in ("1", "1,2,3", "1,0", "1,-1", "1,nan", "1,inf", "1e308,1e308"):
        assert predict(scene, rgb, "--shares", shares) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for shares in ("a", "", "1,"):
        with pytest.raises(SystemExit, match="2"):
            predict(scene, rgb, "--shares", shares)
        assert capsys.readouterr().err.count("\n") == 1


def test_runs_of_other_classes_or_sets_do_not_answer_together(
    scene: Path, small_set: Path, tmp_path: Path, capsys: Said
) -> None:
    train(Settings(str(small_set), str(tmp_path / "other"), num_classes=27, **TINY))
    assert predict(scene, tmp_path / "other") == 2
    said = capsys.readouterr().err
    assert "number of classes" in said
    assert f"{scene} has 10, {tmp_path / 'other'} 27" in said


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path, capsys: Said) -> None:
    for more in ((), ("--needs",), ("--images", REPO), ("--data", REPO)):
        assert predict(tmp_path, *more) == 2
        said = capsys.readouterr().err
        assert said == f"train: {tmp_path} has no checkpoint. Run: make train RUN={tmp_path}\n"


def test_another_set_in_the_place_of_its_own_is_not_taken_for_it(
    small_set: Path, scene: Path, lab: Path, tmp_path: Path, capsys: Said
) -> None:
    run = shutil.copytree(scene, tmp_path / "run")
    other = copied(lab, tmp_path / "data" / lab.name)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    checkpoint["settings"]["data"] = str(tmp_path / "data")
    torch.save(checkpoint, run / "last.pt")
    assert predict(run) == 2
    said = capsys.readouterr().err
    assert f"was trained on shards {small_set.name[-8:]}" in said
    assert f"holds {other.name[-8:]} now" in said


# ---------------------------------------------------------------- a folder, by the commands


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a shell, where `python` is this one."""
    (folder / "bin").mkdir(exist_ok=True)
    python = folder / "bin" / "python"
    python.unlink(missing_ok=True)
    python.symlink_to(sys.executable)
    paths = f"{REPO}:{os.pathsep.join(sys.path)}"
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": paths, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", "-c", line]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.stress
def test_the_two_commands_that_a_folder_is_answered_with_work_as_printed(
    small_set: Path, scene: Path, tmp_path: Path, capsys: Said
) -> None:
    run = shutil.copytree(scene, tmp_path / "my runs" / "scene")
    export(small_set, tmp_path / "my photos", 3)
    (tmp_path / "my photos" / "rgb" / "torn.png").write_bytes(b"")
    assert predict(run, "--images", tmp_path / "my photos") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    (printed,) = re.findall(r" Run: (.*)$", said.strip())
    assert "--size 32" in printed

    done = typed(printed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "answered 3 of 4 pictures" in done.stdout
    assert re.search(r"not answered: row 3: rgb/torn\.png .*is empty", done.stdout)


def test_make_predict_does_both(rgb: Path, tmp_path: Path) -> None:
    run = shutil.copytree(rgb, tmp_path / "run")
    photos = folder_of(tmp_path / "photos", "a.jpg", "a.png")
    (photos / "b.jpg").write_bytes(b"\xff\xd8\xff no picture")
    make = f"make -C {REPO} --no-print-directory predict READY= PY=python"
    line = f"{make} RUN={run} IMAGES={photos}"
    done = typed(line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "answered 2 of 3 pictures" in done.stdout
    assert "not answered: row 2: b.jpg is no picture that can be decoded" in done.stdout
    (made,) = (run / "images").glob("photos-32-*")
    (failed,) = rows(made / "failed.csv")
    assert failed["rgb_file"] == "b.jpg"
    assert answers(run / "predict").keys() == {"a.jpg", "a.png"}


def test_other_pictures_in_a_folder_are_another_set_and_the_same_ones_the_same(
    rgb: Path, tmp_path: Path, capsys: Said
) -> None:
    photos = folder_of(tmp_path / "photos", "a.jpg", "b.jpg")
    (photos / "b.jpg").write_bytes(b"")
    made = set_of(photos, fields=("rgb",))
    assert set_of(photos, fields=("rgb",)) == made
    assert "nothing to do" in capsys.readouterr().err
    assert predict(rgb, "--data", made, "--out", tmp_path / "out") == 0
    assert [row["picture"] for row in rows(tmp_path / "out" / "unanswered.csv")] == ["b.jpg"]

    picture(7).save(photos / "b.jpg")
    again = set_of(photos, fields=("rgb",))
    assert again != made
    assert predict(rgb, "--data", again, "--out", tmp_path / "out") == 0
    assert answers(tmp_path / "out").keys() == {"a.jpg", "b.jpg"}
    assert not (tmp_path / "out" / "unanswered.csv").exists()


def test_a_run_that_was_moved_is_asked_though_another_lies_where_it_was(
    small_set: Path, tmp_path: Path
) -> None:
    settings = Settings(str(small_set), str(tmp_path / "a"), num_classes=10, **TINY)
    train(settings)
    (tmp_path / "a").rename(tmp_path / "b")
    train(replace(settings, shuffle="wheel:2"))
    assert predict(tmp_path / "b") == 0


def test_a_damaged_checkpoint_is_skipped_by_who_asks_and_stays(
    scene: Path, tmp_path: Path, capsys: Said
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scene, run)
    (run / "last.pt").write_bytes(b"nonsense")
    assert predict(run) == 0
    assert f"{run / 'last.pt'} is damaged and skipped" in capsys.readouterr().err
    assert (run / "last.pt").read_bytes() == b"nonsense"


def test_a_run_of_a_later_version_is_one_line_and_no_advice_to_remove_it(
    scene: Path, tmp_path: Path, capsys: Said
) -> None:
    state = torch.load(scene / "last.pt", weights_only=True)
    state["settings"]["of_tomorrow"] = 1
    run = tmp_path / "run"
    run.mkdir()
    torch.save(state, run / "last.pt")
    for more in ((), ("--needs",)):
        assert predict(run, *more) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "this version does not know (of_tomorrow)" in line
        assert "reset" not in line


def test_what_a_run_needs_of_a_set_is_told(rgb: Path, scene: Path, capsys: Said) -> None:
    for runs, flags in (
        ([rgb], "--size 32 --fields rgb --max-failed 1"),
        ([scene], "--size 32 --max-failed 1"),
        ([rgb, scene], "--size 32 --max-failed 1"),
    ):
        assert predict(*runs, "--needs") == 0
        assert capsys.readouterr().out.strip() == flags


def test_several_runs_are_asked_about_a_folder_together(
    rgb: Path, scene: Path, tmp_path: Path, capsys: Said
) -> None:
    photos = folder_of(tmp_path / "photos", "a.png")
    assert predict(rgb, scene, "--images", photos) == 2
    assert f'python -m train predict {rgb} {scene} --data "$set"' in capsys.readouterr().err


def test_a_folder_that_is_none_is_named(scene: Path, tmp_path: Path, capsys: Said) -> None:
    assert predict(scene, "--images", tmp_path / "phtos") == 2
    assert f"{tmp_path / 'phtos'} is no folder" in capsys.readouterr().err


# ---------------------------------------------------------------- what is answered


def test_on_a_folder_of_the_same_pictures_it_says_the_same(
    scene: Path, small_set: Path, tmp_path: Path
) -> None:
    export(small_set, tmp_path / "photos", 3)
    made = set_of(tmp_path / "photos")
    assert predict(scene, "--data", made, "--out", tmp_path / "out") == 0
    found = rows(tmp_path / "out" / "predictions.csv")
    assert [row["picture"] for row in found] == ["rgb/0.png", "rgb/1.png", "rgb/2.png"]
    for ours, theirs in zip(found, rows(scene / "predictions.csv"), strict=False):
        assert ours["named"] == theirs["named"]
        assert float(ours["confidence"]) == pytest.approx(float(theirs["confidence"]), abs=1e-3)
    assert (tmp_path / "out" / "page.png").stat().st_size > 1000


def test_a_dense_network_writes_a_picture_for_each_and_no_two_are_one(
    depth: Path, tmp_path: Path
) -> None:
    names = ["rgb/a.jpg", "rgb/a.png", "rgb/k/a.png", "rgb/m/a.png", "rgb/page.png"]
    made = set_of(folder_of(tmp_path / "photos", *names))
    assert predict(depth, "--data", made, "--out", tmp_path / "out") == 0
    found = answers(tmp_path / "out")
    assert sorted(found) == names
    files = {tmp_path / "out" / row["answer"] for row in found.values()}
    assert len(files) == len(names)
    assert tmp_path / "out" / "answers" / "rgb" / "k" / "a.png.png" in files
    for file in files:
        depth_mm = image(file)
        assert depth_mm.shape == (32, 32)
        assert depth_mm.dtype == np.uint16
        assert 1 <= depth_mm.min() <= depth_mm.max() <= 10000


def test_a_picture_is_read_as_a_set_reads_it(rgb: Path, tmp_path: Path) -> None:
    """Turned as EXIF says, 16-bit grey as colours, what is hidden not at all."""
    photos = folder_of(tmp_path / "photos", "upright.png")
    upright = picture()
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    turned.save(photos / "turned.png", exif=exif)
    grey = np.asarray(upright.convert("L"))
    Image.fromarray(np.stack([grey] * 3, -1)).save(photos / "grey8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(photos / "grey16.png")
    (photos / "._upright.png").write_bytes(b"of a Mac")
    (photos / "Thumbs.db").write_bytes(b"of Windows")

    assert predict(rgb, "--data", set_of(photos, fields=("rgb",)), "--out", tmp_path / "o") == 0
    said = {
        name: (row["named"], row["confidence"]) for name, row in answers(tmp_path / "o").items()
    }
    assert said.keys() == {"upright.png", "turned.png", "grey8.png", "grey16.png"}
    assert said["turned.png"] == said["upright.png"]
    assert said["grey16.png"] == said["grey8.png"]


def test_a_run_of_colours_does_not_look_at_depth_that_cannot_be_used(
    rgb: Path, tmp_path: Path
) -> None:
    photos = folder_of(tmp_path / "photos", "rgb/a.png", "rgb/b.png", "depth/a.png", "depth/x.png")
    assert predict(rgb, "--data", set_of(photos, fields=("rgb",)), "--out", tmp_path / "o") == 0
    assert answers(tmp_path / "o").keys() == {"rgb/a.png", "rgb/b.png"}


def test_a_picture_without_the_depth_that_is_needed_is_named_and_the_rest_answered(
    small_set: Path, scene: Path, tmp_path: Path, capsys: Said
) -> None:
    export(small_set, tmp_path / "photos", 3)
    (tmp_path / "photos" / "depth" / "1.png").unlink()
    made = set_of(tmp_path / "photos")
    assert predict(scene, "--data", made, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "answered 2 of 3 pictures" in said
    assert "not answered: rgb/1.png: has no depth, which the network needs" in said
    assert answers(tmp_path / "out").keys() == {"rgb/0.png", "rgb/2.png"}


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path, small_set: Path) -> None:
    export(small_set, tmp_path / "photos", 1)
    shutil.copy(tmp_path / "photos" / "rgb" / "0.png", tmp_path / "photos" / "depth" / "0.png")
    (tmp_path / "none").mkdir()
    for folder, words in (("none", "no pictures"), ("photos", "depth/0.png .* channel")):
        done = typed(f"python -m convert run {folder} --out o --size 32 --max-failed 1", tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert re.search(words, done.stderr.splitlines()[-1]), done.stderr


# ---------------------------------------------------------------- sets that do not fit


def test_a_set_of_another_size_or_without_depth_is_refused_by_one_line(
    mat: Path, scene: Path, tmp_path: Path, capsys: Said
) -> None:
    larger = convert(mat, tmp_path, replace(SMALL, size=48))
    flat = convert(mat, tmp_path, replace(SMALL, fields=("rgb",)))
    for made, words in ((larger, "Convert its source with --size 32"), (flat, "has no depth")):
        capsys.readouterr()
        assert predict(scene, "--data", made, "--out", tmp_path / "out") == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert words in said[0]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another dataset, whole pictures."""
    return convert(LabSource(), tmp_path_factory.mktemp("lab"), SMALL)


@pytest.fixture(scope="module")
def centres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the same pictures."""
    source = LabSource(crop="centre")
    return convert(source, tmp_path_factory.mktemp("lab"), replace(SMALL, crop="centre"))


def test_another_crop_is_said_and_each_split_has_scores_of_its_own(
    lab: Path, centres: Path, tmp_path: Path, capsys: Said
) -> None:
    train(Settings(str(lab), str(tmp_path / "run"), **TINY))
    capsys.readouterr()
    assert predict(tmp_path / "run", "--data", centres, "--out", tmp_path / "out") == 0
    told = capsys.readouterr()
    assert "learnt from whole pictures, here are those of the crop centre" in told.err
    found = rows(tmp_path / "out" / "predictions.csv")
    assert len(found) == 30
    n_known = 0
    for split in ("train", "val", "test"):
        dataset = ShardDataset(centres, split=split)
        which = f"on the {len(dataset)} {split} rows whose answer is known"
        (score,) = re.findall(rf"{which}: top1 (\S+),", told.out)
        of_split = [found[row] for row in dataset.rows]
        right = [row["named"] == row["true"] for row in of_split]
        assert np.mean(right) == pytest.approx(float(score), abs=1e-4)
        assert [row["true"] for row in of_split] == [dataset.classes[k] for k in dataset.labels()]
        n_known += len(dataset)
    assert n_known == sum(row["true"] != "" for row in found)  # others have no type, or no class


def test_classes_of_another_set_are_known_by_their_names(
    scene: Path, small_set: Path, tmp_path: Path, capsys: Said
) -> None:
    """And rows that are only dealt to splits have one score."""
    pytest.importorskip("pyarrow", reason="tables are read by pyarrow")
    export(small_set, tmp_path / "photos", 4)
    table = tmp_path / "rows.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rgb", "depth", "scene_type"])
        for k, name in enumerate(["kitchen", "bathroom", "spaceship", ""]):
            writer.writerow([f"photos/rgb/{k}.png", f"photos/depth/{k}.png", name])
    made = Path(pipeline.convert(table, tmp_path / "sets", SMALL))
    assert predict(scene, "--data", made, "--out", tmp_path / "out") == 0
    assert "on the 2 rows whose answer is known: top1" in capsys.readouterr().out
    found = rows(tmp_path / "out" / "predictions.csv")
    assert [row["true"] for row in found] == ["kitchen", "bathroom", "", ""]


@pytest.mark.parametrize("task", ["semantic", "semantic3", "depth"])
def test_what_is_known_of_each_pixel_of_another_set_is_what_its_own_dataset_gives(
    task: str, lab: Path, centres: Path
) -> None:
    setup = make_setup(Settings(str(lab), "", task=task, **TINY), torch.device("cpu"))
    found = open_set(centres)
    asked = next(AnySet(setup, found).asked())
    assert asked.setup.batch_fields[:2] == ("rgb", "depth")
    dataset = ShardDataset(found, split="all", fields=asked.setup.batch_fields, target=task)
    for ours, theirs in zip(asked.batch, dataset.stored(asked.rows), strict=True):
        assert torch.equal(ours, theirs)
    assert len(asked.batch[-1].unique()) > 2


# ---------------------------------------------------------------- without its own set


def test_a_run_answers_though_its_own_set_is_gone(
    small_set: Path, depth: Path, tmp_path: Path, capsys: Said
) -> None:
    """What is needed of the set is in the checkpoint; in those of before it is not."""
    data = shutil.copytree(small_set, tmp_path / "data" / small_set.name)
    export(small_set, tmp_path / "photos", 2)
    made = set_of(tmp_path / "photos")
    assert predict(depth, "--data", made, "--out", tmp_path / "expected") == 0

    run = shutil.copytree(depth, tmp_path / "run")
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    checkpoint["settings"]["data"] = str(data)
    torch.save(checkpoint, run / "last.pt")
    old = shutil.copytree(run, tmp_path / "old")
    del checkpoint["learnt"]
    torch.save(checkpoint, old / "last.pt")

    assert predict(old, "--data", made, "--out", tmp_path / "of old") == 0
    shutil.rmtree(data)
    assert predict(run, "--data", made, "--out", tmp_path / "of new") == 0
    for name in ("of old", "of new"):
        assert rows(tmp_path / name / "predictions.csv") == rows(
            tmp_path / "expected" / "predictions.csv"
        )
    capsys.readouterr()
    assert predict(old, "--data", made) == 2
    said = capsys.readouterr().err
    assert "does not say what its classes are, and its own set is gone" in said
    assert len(said.splitlines()) == 1


def test_the_rays_of_a_row_are_those_of_its_own_camera(small_set: Path, lab: Path) -> None:
    setup = make_setup(Settings(str(small_set), "", **TINY), torch.device("cpu"))
    own = next(AnySet(setup, setup.train_set.shard_set).asked())
    _, (_, *own_rays), _ = on_device(own.setup, own.batch)
    for ours, learnt in zip(own_rays, setup.rays, strict=True):
        torch.testing.assert_close(ours, learnt.expand_as(ours), atol=0.001, rtol=0)

    other = open_set(lab)
    fx, fy, cx, cy = other.column("camera")[0]
    asked = next(AnySet(setup, other).asked())
    _, (_, x, y), _ = on_device(asked.setup, asked.batch)
    assert x[3, 0, 9, 20] == pytest.approx((20.5 / 32 - cx) / fx)
    assert y[3, 0, 9, 20] == pytest.approx((9.5 / 32 - cy) / fy)


# ---------------------------------------------------------------- files of answers


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=9) | st.sampled_from(["a", "a.png/b", "../a", "/a"]), max_size=4))
def test_no_two_pictures_have_one_answer_and_none_leads_out(names: list[str]) -> None:
    different = {name for name in names if name.isprintable()}
    files = {answer_file(name) for name in different}
    assert len(files) == len(different)
    folders = {folder for file in files for folder in file.parents}
    assert not files & folders
    assert not any(file.is_absolute() or ".." in file.parts for file in files)


@pytest.mark.parametrize(
    ("n_classes", "dtype"), [(40, np.uint8), (256, np.uint8), (894, np.uint16)]
)
def test_a_picture_of_classes_holds_their_numbers(
    n_classes: int, dtype: type, tmp_path: Path
) -> None:
    ids = np.arange(32 * 30).reshape(32, 30).astype(np.int16) % n_classes
    (tmp_path / "a.png").write_bytes(answer_png(ids, n_classes))
    found = image(tmp_path / "a.png")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, ids)
