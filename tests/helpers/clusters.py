"""A source that the processes of a cluster open by themselves, and what happens while they read it.

Workers import this file, so what they are to do while they read is a function of it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from helpers.commands import REPO
from helpers.made_up import GROUP_ROWS, LabSource, MemoryReader
from shards.spec import ConversionSettings

Hook = Callable[[str, int], object]  # told of the field and the first row of what is read

# 30 rows in 8 shards, each of which is decoded by itself.
SETTINGS = ConversionSettings(fields=("rgb", "label"), size=8, rows_per_shard=4)


class HookedReader(MemoryReader):
    def __init__(self, field: str, rows: np.ndarray, hook: Hook) -> None:
        super().__init__(rows, GROUP_ROWS[field])
        self._field = field
        self._hook = hook

    def read_group(self, group: int) -> np.ndarray:
        self._hook(self._field, group * self.group_rows)
        return super().read_group(group)


class SharedLab(LabSource):
    """The laboratory, for several processes. hook: None: they just read it."""

    def __init__(self, hook: Hook | None = None) -> None:
        super().__init__()
        self._hook = hook
        self.opener = partial(SharedLab, hook)

    def rows_of(self, field: str) -> MemoryReader:
        if self._hook is None:
            return super().rows_of(field)
        return HookedReader(field, self.arrays[field], self._hook)


def first_time(path: Path) -> bool:
    """Whether nobody has asked for it yet, in whatever process."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def die_once(folder: Path, field: str, row: int) -> None:
    """As by kill -9, in the middle of shard 2."""
    if (field, row) == ("label", 8) and first_time(folder / "died"):
        os.kill(os.getpid(), signal.SIGKILL)


def die_always(field: str, row: int) -> None:
    if (field, row) == ("label", 8):
        os.kill(os.getpid(), signal.SIGKILL)


def fail_while_there(path: Path, field: str, row: int) -> None:
    """Shard 2 cannot be read as long as there is such a file."""
    if (field, row) == ("label", 8) and path.exists():
        raise RuntimeError("the weather is bad")


def unreadable(path: Path, field: str, row: int) -> None:
    if (field, row) == ("label", 8) and path.exists():
        raise OSError(5, "Input/output error")


def wait_while_there(path: Path, field: str, row: int) -> None:
    """From shard 2 on nothing is read as long as there is such a file."""
    while row >= 8 and path.exists():
        time.sleep(0.01)


def write_count(folder: Path, field: str, row: int) -> None:
    """How often each group was read."""
    with open(folder / f"{field}-{row}", "a") as file:
        file.write("x")


# ------------------------------------------------------------------------------ real processes


@contextmanager
def real_cluster(folder: Path, n_workers: int) -> Iterator[Path]:
    """`dask scheduler` and `dask worker` processes: the scheduler's file."""
    file = folder / "scheduler.json"
    with processes(folder) as start:
        start("scheduler", "--port", "0", "--no-dashboard", "--no-show", "--scheduler-file", file)
        for _ in range(n_workers):
            start("worker", "--scheduler-file", file, "--nthreads", "1", "--no-dashboard")
        until(file.exists)
        yield file


@contextmanager
def processes(folder: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Dask's commands in that folder; they end with the block."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dask", *map(str, words)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]),
        }
        log = open(folder / f"dask-{len(started)}.log", "w")
        with log:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, text=True
            )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(is_so: Callable[[], object], within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def words_of(settings: ConversionSettings) -> Sequence[str]:
    """The flags of a conversion with this size and these shards."""
    return ("--size", str(settings.size), "--rows-per-shard", str(settings.rows_per_shard))
