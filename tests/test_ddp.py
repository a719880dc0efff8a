"""Two real processes under torchrun: the same losses as one with the whole batch, every test row
once, one writer.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.training import rows

from train.__main__ import command
from train.data import ShardDataset
from train.loop import train
from train.order import Batches
from train.settings import Settings

SETTINGS = {
    "num_classes": 10,
    "epochs": 3,
    "size": 32,
    "warmup_epochs": 0,
    "model": "helpers.networks:Plain",
    "num_workers": 0,
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}


def settings(data: Path, out: Path, **changes: object) -> Settings:
    return Settings(str(data), str(out), **{**SETTINGS, **changes})  # type: ignore[arg-type]


def arguments(data: Path, out: Path, **changes: object) -> list[str]:
    """-m train and its flags."""
    return command(settings(data, out, **changes)).split()[1:]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def two(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run and the standard output of two processes with 4 rows each."""
    out = tmp_path_factory.mktemp("two") / "run"
    flags = arguments(small_set, out, batch_size=4)
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_losses_equal_one_process_with_the_same_global_batch(
    two: tuple[Path, str], small_set: Path, tmp_path: Path
) -> None:
    train(settings(small_set, tmp_path, batch_size=8))
    for ours, theirs in zip(
        rows(tmp_path / "metrics.csv"), rows(two[0] / "metrics.csv"), strict=True
    ):
        for name in ("train_loss", "test_loss", "train_top1", "test_top1", "lr"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-5), name
    one, other = (
        torch.load(out / "last.pt", weights_only=True)["model"] for out in (tmp_path, two[0])
    )
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-4)


@pytest.mark.stress
def test_losses_are_those_of_one_process_where_ranks_have_unequal_shares_of_known_pixels(
    small_set: Path, tmp_path: Path
) -> None:
    pixels = {"model": "helpers.networks:Pixels", "task": "semantic13", "epochs": 4, "lr": 0.1}
    distributed = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    for out, words, batch_size in ((tmp_path / "1", (), 8), (tmp_path / "2", distributed, 4)):
        done = run(*words, *arguments(small_set, out, batch_size=batch_size, **pixels))
        assert done.returncode == 0, done.stderr
    for ours, theirs in zip(
        rows(tmp_path / "1" / "metrics.csv"), rows(tmp_path / "2" / "metrics.csv"), strict=True
    ):
        for name in ("train_loss", "test_loss", "train_pixel_accuracy"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-5), name


def test_every_test_row_counts_once_and_one_rank_writes_and_speaks(
    two: tuple[Path, str], small_set: Path
) -> None:
    out, text = two
    n_test = len(ShardDataset(small_set, split="test", num_classes=10))
    assert (
        sum(int(row["true"]) for row in rows(out / "classes.csv"))
        == n_test
        == len(rows(out / "predictions.csv"))
    )
    assert [line.split()[1] for line in text.splitlines() if line.startswith("epoch")] == [
        "1/3",
        "2/3",
        "3/3",
    ]
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_ranks_together_see_every_test_row_exactly_once(world: int, small_set: Path) -> None:
    n_test = len(ShardDataset(small_set, split="test"))
    seen = [
        i
        for rank in range(world)
        for batch in Batches(n_test, 4, None, rank, world)(0)
        for i in batch
    ]
    assert sorted(seen) == list(range(n_test))


def test_one_process_continues_what_two_began(
    two: tuple[Path, str], small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(two[0], tmp_path / "run")
    train(settings(small_set, tmp_path / "run", batch_size=8, epochs=4))
    assert "at epoch 4 of 4, step 1" in capsys.readouterr().err


def test_a_dead_rank_ends_the_run_with_a_clear_error(small_set: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = arguments(small_set, tmp_path, batch_size=4, model="helpers.networks:Mortal")
    processes = [
        subprocess.Popen(
            [sys.executable, *flags],
            cwd=REPO,
            env={
                **ENVIRONMENT,
                "RANK": str(k),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in (0, 1)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, -9], errors
    assert "rank 0 of 2: lost another rank" in errors[0]
    assert "continue" in errors[0]
    assert "Traceback" not in errors[0]
