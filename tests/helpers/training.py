"""Runs of training: tables they leave, whether two are the same, and one in a process that is
killed.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

from helpers.commands import REPO
from train.__main__ import command
from train.checkpoint import CHECKPOINT
from train.settings import Settings

SETTINGS = {
    "num_classes": 10,
    "epochs": 6,
    "batch_size": 4,
    "size": 32,
    "warmup_epochs": 1,
    "model": "helpers.networks:Normed",
}


def rows(path: Path) -> list[dict[str, str]]:
    """A table of a run."""
    with open(path) as file:
        return list(csv.DictReader(file))


def settings(data: Path, out: Path, **changes: object) -> Settings:
    return Settings(str(data), str(out), **{**SETTINGS, **changes})  # type: ignore[arg-type]


def weights(out: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(out / CHECKPOINT, weights_only=True)["model"]
    return state


def assert_same(a: Path, b: Path) -> None:
    """Weights to the bit, and every figure that does not depend on the clock."""
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert figures(a) == figures(b)


def figures(out: Path) -> list[list[str]]:
    with open(out / "metrics.csv") as file:
        return [
            [v for k, v in row.items() if k.startswith(("train", "test", "lr"))]
            for row in csv.DictReader(file)
        ]


def environment(**more: str) -> dict[str, str]:
    """Of a command that trains a network of ours, with as many threads as this process has: sums
    depend on their number.
    """
    paths = f"{REPO}:{REPO / 'tests'}"
    threads = str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": threads, **more}


def run_and_kill(data: Path, out: Path, after_s: float | None, workers: int) -> int:
    """The command; killed with -9 so long after its first step began."""
    words = command(settings(data, out, num_workers=workers, save_minutes=0.0)).split()[1:]
    when = {} if after_s is None else {"KILL_AFTER_S": str(after_s)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=REPO,
        env=environment(**when),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode
