"""Nothing that takes long is silent, and nothing is done twice to be said."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.training import rows

from train.__main__ import main, train_and_report
from train.loop import train
from train.model import TwoStreamResNet
from train.progress import VOICE, Progress
from train.settings import Settings

TINY: dict[str, Any] = {
    "num_classes": 10, "epochs": 2, "batch_size": 8, "width": 4, "size": 32, "num_workers": 0,
}  # fmt: skip


@pytest.fixture
def _silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every moment is one in which somebody begins to wonder."""
    monkeypatch.setattr("train.progress.SILENT_S", 0.0)


@contextmanager
def counting_pictures() -> Iterator[list[int]]:
    """How many pictures each call of a network gets in evaluation mode."""
    seen: list[int] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, TwoStreamResNet) and not module.training:
            seen.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("task", ["scene", "semantic13"])
def test_the_network_is_asked_about_the_test_rows_once_after_the_last_epoch(
    task: str, small_set: Path, tmp_path: Path
) -> None:
    settings = Settings(str(small_set), str(tmp_path), **{**TINY, "task": task, "epochs": 1})
    with counting_pictures() as seen:
        train_and_report(settings)
    n_test = len(rows(tmp_path / "predictions.csv"))
    n_views = 6 if task == "scene" else 1
    assert sum(seen) == n_test * n_views * 2  # and its mirror image


def test_a_finished_run_that_is_run_again_has_the_same_tables(
    small_set: Path, tmp_path: Path
) -> None:
    settings = Settings(str(small_set), str(tmp_path), **TINY)
    train_and_report(settings)
    before = {each.name: each.read_bytes() for each in tmp_path.glob("*.csv")}
    train_and_report(settings)
    assert {each.name: each.read_bytes() for each in tmp_path.glob("*.csv")} == before


def test_the_answers_of_a_training_from_python_are_those_of_the_table(
    small_set: Path, tmp_path: Path
) -> None:
    settings = Settings(str(small_set), str(tmp_path / "a"), **TINY)
    answers = train(settings).answers
    train_and_report(settings)
    table = rows(tmp_path / "a" / "predictions.csv")
    as_text = [{name: str(value) for name, value in row.items()} for row in answers.table]
    assert as_text == table
    losses = [each.loss for each in answers.worst]
    assert losses == sorted(losses, reverse=True)
    assert all(loss > 0 for loss in losses)


def test_the_worst_pictures_are_kept_apart_from_the_buffers_of_the_loader(
    small_set: Path, tmp_path: Path
) -> None:
    result = train(Settings(str(small_set), str(tmp_path), **TINY))
    dataset = result.loaders.eval_set
    for _ in result.loaders.eval:  # its buffers are filled again
        pass
    row_of = {f"row {row}": k for k, row in enumerate(dataset.rows)}
    assert result.answers.worst
    for each in result.answers.worst:
        rgb, depth, _ = dataset[row_of[each.table_row["picture"].partition(":")[0]]]
        assert np.array_equal(each.rgb_hwc, rgb.permute(1, 2, 0).numpy())
        assert np.array_equal(each.depth_m_hw, depth[0].numpy() / 1000)


@pytest.mark.usefixtures("_silent")
def test_in_a_pipe_there_are_lines_while_it_learns_scores_and_draws(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_report(Settings(str(small_set), str(tmp_path), **TINY))
    said = capsys.readouterr()
    assert re.search(r"^epoch 1/2: 1 of \d+ steps", said.err, re.M)
    assert re.search(r"^scoring test: \d+ of \d+ rows", said.err, re.M)
    assert "\r" not in said.err
    for name in ("predictions.csv", "confusion.png", "curves.png"):
        assert f"writing {tmp_path / name}" in said.err


def test_nothing_is_said_on_the_way_before_somebody_would_wonder(
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.progress.SILENT_S", 1e9)
    VOICE.has_spoken()
    train(Settings(str(small_set), str(tmp_path), **TINY))
    assert " of " not in capsys.readouterr().err.replace("evaluation: on the", "")


def test_parts_of_rows_are_counted_and_only_whole_ones_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.progress.SILENT_S", 0.0)
    with Progress("counting", "rows", 2) as bar:
        for _ in range(6):
            bar.update(1 / 3)
    shown = re.findall(r"counting: (\d) of 2 rows", capsys.readouterr().err)
    assert shown == ["0", "0", "1", "1", "1"]  # that it is done is for others to say


def test_other_ranks_say_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.progress.SILENT_S", 0.0)
    with Progress("counting", "rows", 2, is_shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_even_where_its_width_is_unknown() -> None:
    program = (
        "from train.progress import Progress\n"
        "with Progress('scoring test', 'rows', 2) as bar:\n"
        "    bar.update()\n"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=REPO, stdin=theirs, stderr=theirs, check=True)
    shown = os.read(ours, 4096).decode()
    for end in (ours, theirs):
        os.close(end)
    assert "scoring test:   0%" in shown


def test_continuing_what_continue_says_adds_as_many_epochs_and_doubles_nothing(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    words = [f"--data={small_set}", f"--out={tmp_path}", *flags]
    for epochs in (4, 6):
        assert main(words) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        again = line.removeprefix("continue: python -m train ").split()
        assert again[again.index("--epochs") + 1] == str(epochs)
        assert all(again.count(word) == 1 for word in again if word.startswith("--"))
        words = again
