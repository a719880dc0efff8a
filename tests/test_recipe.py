"""Which trainings a recipe is made of, and what make passes to it."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO, SMALL
from helpers.sets import convert

from shards.dataset import open_set
from shards.errors import UserError, WrongSetting
from train.__main__ import main, parse
from train.checkpoint import restore
from train.job import make_setup, new_run
from train.recipe import RECIPES, plan, stages
from train.settings import Settings

DEFAULT = ["--recipe", "default"]
QUICK = [
    "--epochs=1",
    "--size=32",
    "--width=4",
    "--inputs=rgb",
    "--batch-size=8",
    "--num-workers=0",
]


@pytest.fixture(scope="module")
def without_labels(mat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("no labels")
    return convert(mat, root, replace(SMALL, fields=("rgb", "depth")))


def planned(data: Path, *flags: str) -> list[Settings]:
    """What the command line trains, in order."""
    settings, recipe, start = parse(["--data", str(data), "--out", "runs/scene", *flags])
    return [stage.settings for stage in plan(settings, open_set(data), recipe, start)]


def test_the_default_recipe_learns_the_pixels_then_the_scenes_from_them(small_set: Path) -> None:
    first, second = planned(small_set, *DEFAULT)
    same = {"size": 64, "width": 16, "batch_size": 32, "lr": 2e-3, "epochs": 40}
    data = str(small_set)
    assert first == Settings(data, "runs/scene-parts", task="semantic40", **same)  # type: ignore[arg-type]
    assert second == Settings(data, "runs/scene", weights="runs/scene-parts", **same)  # type: ignore[arg-type]


def test_only_the_scenes_of_a_recipe_are_adjusted(small_set: Path) -> None:
    first, second = planned(small_set, *DEFAULT, "--logit-adjustment", "0.5")
    assert (first.logit_adjustment, second.logit_adjustment) == (0, 0.5)


def test_the_pretrained_recipe_is_one_run_from_imagenet(small_set: Path) -> None:
    for task in ("scene", "semantic40"):
        flags = ("--recipe", "pretrained", "--start", "auto", "--task", task)
        (run,) = planned(small_set, *flags)
        assert (run.model, run.weights, run.task) == ("lite0", "imagenet", task)
        assert run.trunk_lr < 1
        assert run.inputs == "rgb"
        assert run.freeze_maps == (3 if task == "scene" else 0)
        assert run.logit_adjustment == (0.5 if task == "scene" else 0)
        assert run.out == "runs/scene"
    flags = ("--recipe", "pretrained", "--inputs", "depth")
    assert planned(small_set, *flags, "--task", "semantic40")[0].logit_adjustment == 0
    (depth,) = planned(small_set, *flags, "--epochs", "5")
    assert (depth.inputs, depth.weights) == ("depth", "imagenet")
    assert (depth.freeze_maps, depth.freeze_norms, depth.trunk_lr) == (0, "never", 1.0)
    assert (depth.size, depth.epochs, depth.logit_adjustment) == (128, 5, 0.5)
    flags = ("--recipe", "pretrained", "--model", "timm:resnet18", "--size", "64")
    (other,) = planned(small_set, *flags)
    assert (other.model, other.weights, other.size) == ("timm:resnet18", "imagenet", 64)
    assert other.freeze_maps == 0


def test_networks_of_timm_begin_with_the_scenes(small_set: Path) -> None:
    (run,) = planned(small_set, *DEFAULT, "--model", "timm:resnet18")
    assert (run.task, run.weights) == ("scene", None)
    first, second = planned(small_set, *DEFAULT, "--model", "lite0")
    assert (first.model, second.model, second.weights) == ("lite0", "lite0", "runs/scene-parts")


def test_without_a_recipe_there_is_one_run_of_the_flags_defaults(small_set: Path) -> None:
    assert planned(small_set) == [Settings(str(small_set), "runs/scene")]
    assert planned(small_set, "--start", "") == planned(small_set, "--start", "auto")


def test_a_flag_that_is_given_is_kept_in_both_stages(small_set: Path) -> None:
    for stage in planned(small_set, "--epochs=3", *DEFAULT, "--inputs=rgb", "--num-classes=10"):
        assert (stage.epochs, stage.inputs, stage.num_classes) == (3, "rgb", 10)
        assert (stage.width, stage.lr) == (16, 2e-3)


@pytest.mark.parametrize(
    ("flags", "has_parts"),
    [
        (["--num-classes=10"], True),
        (["--task=depth"], True),
        (["--start="], False),
        (["--model=mine:Net"], False),
        (["--weights=imagenet"], False),
        (["--start=auto"], True),
        (["--start=runs/other"], True),
    ],
)
def test_the_pixels_are_learnt_first_where_that_can_help(
    flags: list[str], has_parts: bool, small_set: Path, without_labels: Path
) -> None:
    runs = planned(small_set, *DEFAULT, *flags)
    assert len(runs) == (2 if has_parts else 1)
    assert runs[-1].out == "runs/scene"
    if has_parts:
        parts = "runs/other" if "--start=runs/other" in flags else "runs/scene-parts"
        assert (runs[0].task, runs[0].out, runs[1].weights) == ("semantic40", parts, parts)
    if "runs/other" not in flags[0]:
        assert len(planned(without_labels, *DEFAULT, *flags)) == 1


def test_each_stage_has_a_mirror_of_its_own(small_set: Path) -> None:
    runs = planned(small_set, *DEFAULT, "--mirror", "/drive/scene/")
    assert [run.mirror for run in runs] == ["/drive/scene-parts", "/drive/scene/"]
    assert [run.mirror for run in planned(small_set, *DEFAULT)] == [None, None]


def test_a_reset_is_for_both_stages_but_not_for_a_run_that_is_named(
    small_set: Path, tmp_path: Path
) -> None:
    """A finished first stage was kept: the scenes started from what another set had taught."""
    settings, recipe, _ = parse([f"--data={small_set}", f"--out={tmp_path}/scene", *DEFAULT])
    other = str(tmp_path / "other")
    for run in ("scene-parts", "other"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "classes.csv").touch()  # it was reported
    found = open_set(small_set)
    reset = replace(settings, reset=True)
    for given, start, is_done in (
        (settings, "auto", True),
        (reset, "auto", False),
        (settings, other, True),
        (reset, other, True),
    ):
        first, second = plan(given, found, recipe, start)
        assert (first.is_done(), second.is_done()) == (is_done, False)
        assert first.settings.reset == (given.reset and start == "auto")
        assert second.settings.reset == given.reset


def test_a_run_that_is_reset_is_no_reported_one_any_more(small_set: Path, tmp_path: Path) -> None:
    """Else a first stage that was killed in its reset would be taken for a finished one."""
    for name in ("last.pt", "previous.pt", "classes.csv"):
        (tmp_path / name).touch()
    given = ["--data", str(small_set), "--out", str(tmp_path), "--reset", *QUICK]
    settings, _, _ = parse(given)
    setup = make_setup(settings, torch.device("cpu"))
    assert not restore(new_run(setup), settings, setup.train_set.fingerprint)
    assert not list(tmp_path.iterdir())


def test_what_does_not_go_together_is_refused(small_set: Path) -> None:
    settings = Settings("data", "run")
    found = open_set(small_set)
    with pytest.raises(WrongSetting, match="recipe best: choose one of default") as error:
        plan(settings, found, "best")
    assert (error.value.name, error.value.given) == ("recipe", "best")
    with pytest.raises(UserError, match="start='x' is for recipe='default'"):
        plan(settings, found, None, "x")
    with pytest.raises(UserError, match="start='x' does not go with weights='imagenet'"):
        stages(replace(settings, weights="imagenet"), "x", "semantic40")
    with pytest.raises(UserError, match="start='x' does not go with model='mine:Net'"):
        stages(replace(settings, model="mine:Net"), "x", "semantic40")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe=finetuned"], "invalid choice: 'finetuned'"),
        (["--recipe="], "invalid choice: ''"),
        (
            ["--start=runs/x"],
            "--start runs/x is for --recipe default. Add that, or leave --start out",
        ),
        (
            [*DEFAULT, "--weights=imagenet", "--start=x"],
            "--start x does not go with --weights imagenet",
        ),
        (["--recipe=pretrained", "--start=runs/x"], "--start runs/x does not go with --recipe"),
        ([*DEFAULT, "--data=nowhere"], "nowhere is not a finished set"),
        ([*DEFAULT, "--out="], "--out '': name a directory"),
        ([*DEFAULT, "--epochs=0"], "--epochs 0: choose"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    flags: list[str],
    words: str,
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status: object = main([f"--data={small_set}", "--out=run", *flags])
    except SystemExit as error:  # argparse
        status = error.code
    said = capsys.readouterr().err
    assert (status, len(said.splitlines())) == (2, 1)
    assert words in said
    assert not list(tmp_path.iterdir())


def test_what_ends_the_last_stage_is_told_before_the_first_one(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = [f"--data={small_set}", f"--out={out}", "--batch-size=8", "--epochs=1", "--size=32"]
    words += ["--width=4", "--num-workers=0"]
    assert main([*words, "--num-classes=10"]) == 0
    capsys.readouterr()
    assert main([*words, *DEFAULT]) == 2
    assert "trained with --num-classes 10, this run has" in capsys.readouterr().err
    assert not Path(f"{out}-parts").exists()


def test_a_narrower_run_is_named_by_its_width(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--data={small_set}", "--batch-size=8", "--epochs=1", "--size=32", "--num-workers=0"]
    words += ["--num-classes=10"]
    assert main([*words, f"--out={tmp_path}/a", "--width=4"]) == 0
    capsys.readouterr()
    assert main([*words, f"--out={tmp_path}/b", f"--weights={tmp_path}/a"]) == 2
    assert "its width is 4, this network's 64" in capsys.readouterr().err


def test_where_no_set_lies_the_advice_is_of_what_lies_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "my rooms" / "rgb"
    pictures.mkdir(parents=True)
    for path, advice in (
        (pictures.parent, f"python -m convert run '{pictures.parent}' --out data"),
        (tmp_path / "nowhere", "Look whether that is its path"),
        (pictures, "Run: make convert"),
    ):
        assert main([f"--data={path}", "--out", str(tmp_path / "run")]) == 2
        assert advice in capsys.readouterr().err


def test_every_recipe_is_made_of_settings_that_can_be_trained() -> None:
    for values in RECIPES.values():
        Settings("data", "run", **values)


@pytest.mark.stress
def test_a_finished_first_stage_is_taken_and_its_weights_are_those_that_are_continued(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scene"
    command = [f"--data={small_set}", f"--out={out}", *DEFAULT, *QUICK, "--lr=1e-9"]
    assert main([*command, "--weight-decay=0"]) == 0
    said = capsys.readouterr().out
    assert said.count("\ncontinue: ") == 2
    assert (tmp_path / "scene-parts" / "classes.csv").is_file()
    runs = [torch.load(tmp_path / name / "last.pt") for name in ("scene-parts", "scene")]
    first, second = (run["model"] for run in runs)
    for key in (key for key in first if key.endswith("conv1.weight")):
        torch.testing.assert_close(second[key], first[key], atol=1e-6, rtol=0)

    before = (tmp_path / "scene-parts" / "last.pt").stat().st_mtime_ns
    assert main([*command, "--weight-decay=0", "--epochs=2"]) == 0
    assert (tmp_path / "scene-parts" / "last.pt").stat().st_mtime_ns == before
    with open(out / "metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert "--weights" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.stress
def test_stages_in_one_process_have_the_weights_of_two(small_set: Path, tmp_path: Path) -> None:
    """In processes of their own, as the number of threads counts."""
    one = [f"--out={tmp_path}/one", *DEFAULT]
    parts = [f"--out={tmp_path}/two-parts", "--task=semantic40"]
    scenes = [f"--out={tmp_path}/two", f"--weights={tmp_path}/two-parts"]
    for flags in (one, parts, scenes):
        words = ["-m", "train", f"--data={small_set}", *QUICK, "--lr=2e-3", *flags]
        done = subprocess.run([sys.executable, *words], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for ours, theirs in (("one-parts", "two-parts"), ("one", "two")):
        a, b = (torch.load(tmp_path / run / "last.pt")["model"] for run in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), ours


# ---------------------------------------------------------------- make


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ([], '--recipe "default" --start "auto"'),
        (["RECIPE="], '--start "auto"'),
        (["START="], '--recipe "default" --start ""'),
        (["START=runs/x y"], '--recipe "default" --start "runs/x y"'),
        (["MIRROR=/my drive"], '--recipe "default" --start "auto" --mirror "/my drive"'),
        (["ARGS=--epochs 3"], '--recipe "default" --start "auto" --epochs 3'),
    ],
)
def test_make_train_is_one_command(given: list[str], flags: str) -> None:
    """Told by make, not run; as on Colab, so that no .venv is looked for."""
    environment = {**os.environ, "COLAB_RELEASE_TAG": "test"}
    command = ["make", "-n", "train", "DATA=my data", "RUN=runs/r", "READY=", "PYTHON=py", *given]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = " ".join(done.stdout.splitlines()[-1].split())
    assert line == f'py -m train --data "my data" --out "runs/r" {flags}'


def test_make_predict_asks_about_the_test_rows_or_makes_a_set_of_a_folder_first() -> None:
    environment = {**os.environ, "COLAB_RELEASE_TAG": "test"}
    command = ["make", "-n", "predict", "RUN=runs/r", "READY=", "PYTHON=py", "ARGS=--out x"]

    def told(*given: str) -> list[str]:
        done = subprocess.run(
            [*command, *given], cwd=REPO, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.replace("\\\n", "").split(" && ")

    assert [line.strip() for line in told()] == ['py -m train predict "runs/r" --out x']
    needs, convert, ask = told("IMAGES=my photos")
    assert needs.endswith('needs=$(py -m train predict "runs/r" --needs)')
    assert 'py -m convert run "my photos" --out "runs/r/images" $needs' in convert
    assert ask.strip() == 'py -m train predict "runs/r" --data "$set" --out x'
