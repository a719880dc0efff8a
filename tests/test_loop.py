"""python -m train: learns, continues bit for bit, refuses what does not fit, skips what is damaged."""

import csv
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from convert.format import UserError
from train.__main__ import make_parser
from train.checkpoint import Settings
from train.loop import accuracies, lr_at, train

Run = Callable[..., subprocess.CompletedProcess[str]]
TINY = {"num_classes": 10, "epochs": 3, "batch_size": 8, "width": 4, "size": 32, "warmup_epochs": 0}


def weights(out: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / "last.pt", weights_only=True)["model"]
    return state


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def whole(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(Settings(str(small_set), str(out), **TINY))  # type: ignore[arg-type]
    return out


def test_a_run_leaves_checkpoint_curves_confusion_and_one_csv_row_an_epoch(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == {
        "last.pt", "previous.pt", "metrics.csv", "curves.png", "confusion.png",
    }  # fmt: skip
    with open(whole / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(0 <= float(row["test_top1"]) <= 1 and float(row["memory_bytes"]) > 0 for row in rows)


def test_a_run_stopped_between_epochs_continues_bit_for_bit(
    small_set: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.loop as loop

    original, seen = loop.save, []

    def stop_after_two(*args: object) -> None:
        original(*args)  # type: ignore[arg-type]
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            train(Settings(str(small_set), str(tmp_path), **TINY))  # type: ignore[arg-type]
    train(Settings(str(small_set), str(tmp_path), **TINY))  # type: ignore[arg-type]
    assert same(whole, tmp_path)


def test_a_broken_checkpoint_is_named_and_the_one_before_used(
    small_set: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(str(small_set), str(tmp_path), **TINY)  # type: ignore[arg-type]
    train(settings)
    os.truncate(tmp_path / "last.pt", 5000)
    train(settings)
    assert "last.pt is damaged" in capsys.readouterr().err
    assert same(whole, tmp_path)


@pytest.mark.parametrize(("change", "words"), [({"lr": 0.5}, "--lr 0.001"), ({"num_classes": 13}, "--num-classes 10")])
def test_a_checkpoint_of_other_settings_is_refused_with_both_values(
    small_set: Path, whole: Path, change: dict[str, float], words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        train(Settings(str(small_set), str(whole), **{**TINY, **change}))  # type: ignore[arg-type]
    assert str(next(iter(change.values()))) in str(error.value)


def test_a_users_own_network_and_mistakes(small_set: Path, tmp_path: Path, command: Run) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, k):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(4, k)\n"
        "    def forward(self, rgb, depth):\n"
        "        return self.fc(torch.cat((rgb, depth), 1).mean((2, 3)))\n"
    )
    base = ["train", "--data", small_set, "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 8, "--size", 32]
    done = command(*base, "--model", "mine:Net", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continue: python -m train" in done.stdout
    for extra, words in (
        (["--model", "mine:Absent"], "Absent"),
        (["--size", 5], "--size 5"),
        (["--frobnicate"], "help"),
    ):
        done = command(*base, *extra, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
        assert words in done.stderr


def test_the_flags_are_the_settings(small_set: Path) -> None:
    args = make_parser().parse_args(["--data", str(small_set), "--out", "x"])
    assert Settings(**vars(args)) == Settings(str(small_set), "x")


def test_mean_class_accuracy_leaves_out_classes_without_rows() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 1, 1]])
    top1, mean_class = accuracies(confusion)
    assert (top1, mean_class) == (pytest.approx(4 / 6), pytest.approx((0.75 + 0.5) / 2))


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    values = [lr_at(step, 10, 100, 1.0) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == values[9] == values[10] == 1.0
    assert values[100] == pytest.approx(0)
