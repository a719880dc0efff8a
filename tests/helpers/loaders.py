"""Loaders over the small set, their batches made without any loader, and loaders in a process of
their own.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from helpers.commands import REPO
from loader.loader import Loader
from loader.workers import ProcessProducer
from train.data import ShardDataset
from train.order import Batches

METHODS = ["fork", "forkserver", "spawn"]
KINDS: list[dict[str, Any]] = [{"prefetch": False}, {}, {"workers": 2, "method": "fork"}]


def make(path: Path, workers: int = 0, method: str | None = None, **how: Any) -> Loader:
    """A shuffled loader over all 36 rows: 9 batches of 4, more than there are buffers."""
    settings = {k: how.pop(k) for k in ("target", "normalize", "fields") if k in how}
    dataset = ShardDataset(path, split="all", **settings)
    return Loader(dataset, Batches(len(dataset), 4, 0), workers, method, **how)


def worker_pids(loader: Loader) -> list[int]:
    """Of a loader that is in use and has workers."""
    producer = loader.stream.producer
    assert isinstance(producer, ProcessProducer)
    return [worker.process.pid for worker in producer.workers]


def expected(
    path: Path, epoch: int = 0, start: int = 0, **settings: Any
) -> list[tuple[torch.Tensor, ...]]:
    """The same batches made without any loader."""
    dataset = ShardDataset(path, split="all", **settings)
    return [dataset.batch(indices) for indices in Batches(len(dataset), 4, 0)(epoch)[start:]]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p, q, strict=True)
    )


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = [{repo!r}, {tests!r}]
from helpers.loaders import make, worker_pids
if __name__ == "__main__":
    loader = make(Path({path!r}), {workers}, {method!r})
    batches = iter(loader)
    kept = next(batches)
    print(*(worker_pids(loader) if {workers} else []), flush=True)
    {end}
"""


def start(
    tmp_path: Path, small_set: Path, end: str, workers: int = 2, method: str = "fork"
) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    values = {"repo": str(REPO), "tests": str(REPO / "tests"), "path": str(small_set)}
    script.write_text(SCRIPT.format(end=end, workers=workers, method=method, **values))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, script], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def first_line(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]
