"""python -m train: what a run leaves, a user's own network, mistakes."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.commands import Run

from train.__main__ import main, parse, train_and_report
from train.loop import lr_at, train
from train.settings import Settings

TINY = {"num_classes": 10, "epochs": 3, "batch_size": 8, "width": 4, "size": 32, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def whole(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_and_report(Settings(str(small_set), str(out), **TINY))  # type: ignore[arg-type]
    return out


def test_a_run_leaves_checkpoint_curves_confusion_and_one_csv_row_an_epoch(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {
        "last.pt", "previous.pt", "metrics.csv", "predictions.csv", "classes.csv",
        "curves.png", "confusion.png", "mistakes.png", ".lock",
    }  # fmt: skip
    with open(whole / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(0 <= float(row["test_top1"]) <= 1 and float(row["memory_bytes"]) > 0 for row in rows)


def test_train_from_python_gives_its_result_and_draws_nothing(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(str(small_set), str(tmp_path), **TINY)  # type: ignore[arg-type]
    result = train(settings)
    assert {p.name for p in tmp_path.iterdir()} == {
        "last.pt",
        "previous.pt",
        "metrics.csv",
        ".lock",
    }
    assert result.files == (tmp_path / "last.pt", tmp_path / "metrics.csv")
    assert result.epochs == 3
    assert result.last is result.run.history[-1]
    assert result.best["test_top1"] == max(row["test_top1"] for row in result.run.history)
    assert result.baseline is not None
    assert 0 < result.baseline < 1
    assert result.setup.settings == replace(settings, shuffle="full")  # as was decided
    assert all(line.startswith("epoch ") for line in capsys.readouterr().out.splitlines())


def test_a_users_own_network_trains_from_the_command_line(
    small_set: Path, tmp_path: Path, command: Run
) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, k):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(4, k)\n"
        "    def forward(self, rgb, depth):\n"
        "        return self.fc(torch.cat((rgb, depth), 1).mean((2, 3)))\n"
    )
    base = [
        "train",
        "--data",
        small_set,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        "--batch-size",
        8,
        "--size",
        32,
    ]
    done = command(*base, "--model", "mine:Net", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continue: python -m train" in done.stdout


def test_a_run_starts_from_another_run(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "--data",
        str(small_set),
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--width",
        "4",
        "--size",
        "32",
    ]
    parts, scene = str(tmp_path / "parts"), str(tmp_path / "scene")
    from_parts = [*base, "--out", scene, "--weights", parts, "--lr", "1e-9", "--weight-decay", "0"]
    for words in ([*base, "--out", parts, "--task", "semantic40"], from_parts):
        train(parse(words)[0])
    before, after = (torch.load(Path(run) / "last.pt")["model"] for run in (parts, scene))
    weights = [key for key in before if key.endswith("conv1.weight")]
    assert len(weights) == 2 * (1 + 8)
    for key in weights:
        torch.testing.assert_close(after[key], before[key], atol=1e-6, rtol=0)
    # A run that goes on does not need it.
    (tmp_path / "parts" / "last.pt").rename(tmp_path / "moved.pt")
    train(parse(from_parts)[0])
    capsys.readouterr()
    (tmp_path / "moved.pt").rename(tmp_path / "parts" / "last.pt")
    assert main([*base, "--out", parts, "--task", "semantic40", "--weights", scene]) == 2
    assert (
        f"with no --weights, this run has --weights {scene}. Use no --weights, another"
        in capsys.readouterr().err
    )
    for other, words in ((tmp_path, "it has no checkpoint"), (parts, "its width is 4")):
        assert (
            main([*base, "--out", str(tmp_path / "new"), "--weights", str(other), "--width", "8"])
            == 2
        )
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights", "absent.pth", "--model", "helpers.networks:Tiny"], "--model resnet18"),
        (["--crop", "7"], "--crop 7"),
        (["--model", "helpers.networks:Absent"], "Absent"),
        (["--weights", "absent.pth", "--width", "64"], "absent.pth"),
        (["--size", "5"], "--size 5"),
        (["--frobnicate"], "--help"),
        (["--out", "/dev/null"], "/dev/null"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    flags: list[str],
    words: str,
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        status: object = main(["--data", str(small_set), "--out", str(tmp_path), *flags])
    except SystemExit as error:  # argparse
        status = error.code
    lines = capsys.readouterr().err.splitlines()
    assert (status, len(lines)) == (2, 1)
    assert words in lines[0]


@pytest.mark.stress
def test_a_path_need_not_be_utf_8(small_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "run\udcff"
    flags = ["--epochs=1", "--batch-size=8", "--width=4", "--size=32", "--num-workers=0"]
    words = [sys.executable, "-m", "train", f"--data={small_set}", f"--out={out}", *flags]
    done = subprocess.run(
        words, cwd=REPO, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (out / "last.pt").exists()
    assert b"run\xff/last.pt" in done.stdout


def test_the_flags_are_the_settings(small_set: Path) -> None:
    settings, recipe, start = parse(["--data", str(small_set), "--out", "x"])
    assert settings == Settings(str(small_set), "x")
    assert (recipe, start) == (None, "auto")


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    values = [lr_at(step, 10, 100, 1.0) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == values[9] == values[10] == 1.0
    assert values[100] == pytest.approx(0)
