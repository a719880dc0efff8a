"""Sets that lie elsewhere, read through a cache: what was asked for, what a cache holds, and
trainings in processes of their own.
"""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch

from helpers.commands import REPO
from helpers.servers import Server, serving
from loader.loader import Loader
from shards.lock import is_held
from stores.cache import MARK
from train.data import create_dataloaders
from train.feeding import FedBatches

HOW: dict[str, Any] = {"target": "depth", "normalize": False, "batch_size": 2, "num_workers": 0}


@contextmanager
def serving_set(*directories: Path) -> Iterator[Server]:
    """A web server of these sets, each under its name."""
    with serving() as server:
        for directory in directories:
            for path in directory.rglob("*"):
                if path.is_file():
                    name = path.relative_to(directory.parent)
                    server.files[f"/{name}"] = path.read_bytes()
        yield server


def fetched(server: Server) -> Counter[str]:
    """How often each file of a shard was asked for from its start: as a fetcher does."""
    names = [path for path, asked in server.requests if (asked or "").startswith("bytes=0-")]
    return Counter(name for name in names if _is_of_shard(name))


def rows_asked(server: Server) -> list[tuple[str, str | None]]:
    """What was asked for row by row: of shards that were not there and not coming."""
    return [
        (path, asked)
        for path, asked in server.requests
        if _is_of_shard(path) and not (asked or "bytes=0-").startswith("bytes=0-")
    ]


def _is_of_shard(name: str) -> bool:
    return name.endswith(".npy") and not name.rpartition("/")[2].startswith("rows-")


def folder_of(cache: Path) -> Path:
    """Of the only set in a cache."""
    (found,) = [path.parent for path in cache.glob(f"*/{MARK}")]
    return found


def shard_bytes_in(cache: Path) -> int:
    """Of all shards, and of those under way."""
    n_bytes = 0
    for path in cache.rglob("*.npy*"):
        if not path.name.lstrip(".").startswith("rows-"):
            with suppress(FileNotFoundError):
                n_bytes += path.stat().st_size
    return n_bytes


class MostBytes:
    """The most that a cache's shards were, while it is looked."""

    def __init__(self, cache: Path) -> None:
        self.n_bytes = 0
        self._cache = cache
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._is_over.wait(0.002):
            self.n_bytes = max(self.n_bytes, shard_bytes_in(self._cache))

    def __enter__(self) -> "MostBytes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def sum_of(batch: tuple[torch.Tensor, ...]) -> str:
    sha256 = hashlib.sha256()
    for part in batch:
        sha256.update(np.ascontiguousarray(part.numpy()).tobytes())
    return sha256.hexdigest()[:16]


def sums(loader: Loader, n_epochs: int = 1) -> list[list[str]]:
    """Of every batch of the next epochs."""
    return [[sum_of(batch) for batch in loader] for _ in range(n_epochs)]


def shuffle_of(loader: Loader) -> str:
    """As a setting, of a loader through a cache."""
    assert isinstance(loader.batches, FedBatches)
    in_play = getattr(loader.batches.order, "in_play", 0)
    return f"wheel:{in_play}" if in_play else "full"


def right_sums(directory: Path, shuffle: str, n_epochs: int, **how: Any) -> list[list[list[str]]]:
    """Of both loaders over the set as it lies here."""
    loaders = create_dataloaders(directory, shuffle=shuffle, **{**HOW, **how})
    return [sums(loader, n_epochs) for loader in loaders]


# ------------------------------------------------------------------ trainings that are processes

# Both loaders, epoch after epoch, as a training reads; what it has read is a line of its output. It
# ends with a line and 2 as a command of ours does.
TRAINING = """
import faulthandler, json, signal, sys
faulthandler.register(signal.SIGUSR1, all_threads=True)
how = json.loads(sys.argv[1])
sys.path[:0] = [how.pop("repo"), how.pop("tests")]
import torch
from helpers.caches import sum_of
from shards.errors import UserError, one_line
from train.data import create_dataloaders

def main():
    torch.set_num_threads(1)
    start, n_epochs = how.pop("start"), how.pop("n_epochs")
    path = how.pop("path")
    loaders = create_dataloaders(path, **how)
    for loader in loaders:
        loader.set_epoch(start)
    for epoch in range(start, n_epochs):
        for which, loader in enumerate(loaders):
            for step, batch in enumerate(loader):
                print("batch", which, epoch, step, sum_of(batch), flush=True)
    print("done", flush=True)

def end_by_what_main_does():
    try:
        main()
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)

if __name__ == "__main__":
    end_by_what_main_does()
"""


def start_training(
    path: object, cache: Path, n_epochs: int, start: int = 0, **how: Any
) -> "subprocess.Popen[str]":
    """how: of `create_dataloaders`. Ranks that one process starts are one training."""
    said = {
        **{"repo": str(REPO), "tests": str(REPO / "tests"), "path": str(path)},
        **{"cache_dir": str(cache), "start": start, "n_epochs": n_epochs},
        **{**HOW, **how},
    }
    return subprocess.Popen(
        [sys.executable, "-c", TRAINING, json.dumps(said)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Imports once, and forks a training for each line that it is told; says when one has ended.
NURSERY = (
    TRAINING.partition("if __name__")[0]
    .replace("how = json.loads(sys.argv[1])", "how = {}")
    .replace('sys.path[:0] = [how.pop("repo"), how.pop("tests")]', "sys.path[:0] = sys.argv[1:]")
    + """
import os, select

def end_as_told(told):
    for number, path in ((1, told["out"]), (2, told["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    how.update(told["how"])
    end_by_what_main_does()

while True:
    if select.select([0], [], [], 0.02)[0]:
        line = sys.stdin.buffer.raw.readline()
        if not line:
            break
        pid = os.fork()
        if not pid:
            end_as_told(json.loads(line))
        print("began", pid, flush=True)
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        continue
    if pid:
        print("ended", pid, os.waitstatus_to_exitcode(status), flush=True)
"""
)


class Nursery:
    """Starts trainings quickly: they are forked from a process that has imported all. Not two at
    the same moment.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n_started = 0
        self._begun = Queue[int]()
        self._statuses: dict[int, int] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(REPO), str(REPO / "tests")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, *numbers = line.split()
            if what == "began":
                self._statuses.pop(int(numbers[0]), None)  # of an earlier process of this number
                self._begun.put(int(numbers[0]))
            else:
                self._statuses[int(numbers[0])] = int(numbers[1])

    def start(self, path: object, cache: Path, n_epochs: int, start: int, **how: Any) -> "Started":
        """As `start_training`."""
        self._n_started += 1
        out = self._folder / f"{self._n_started}.out"
        err = self._folder / f"{self._n_started}.err"
        said = {"path": str(path), "cache_dir": str(cache), "start": start, "n_epochs": n_epochs}
        told = {"how": {**said, **HOW, **how}, "out": str(out), "err": str(err)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        return Started(self._begun.get(), out, err, self._statuses)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._listener.join()


@dataclass(frozen=True)
class Started:
    """A training of a nursery. statuses: of those that have ended, by their numbers."""

    pid: int
    out: Path
    err: Path
    statuses: dict[int, int]

    def poll(self) -> int | None:
        return self.statuses.get(self.pid)

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def ended(self, within_s: float) -> int | None:
        """Its status; None: it has not ended in that time."""
        until = time.monotonic() + within_s
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return self.poll()

    def said(self) -> tuple[str, str]:
        """What is in its standard output, and error."""
        return self.out.read_text(), self.err.read_text()


def batches_in(said: str) -> dict[tuple[int, int, int], str]:
    """What a training printed: (loader, epoch, step) -> sum."""
    words = [line.split() for line in said.splitlines() if line.startswith("batch ")]
    return {(int(w[1]), int(w[2]), int(w[3])): w[4] for w in words if len(w) == 5}


def fetchers(cache: Path) -> list[int]:
    """Numbers of the processes that fetch into folders of a cache: they hold its locks."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (each / "cmdline").read_bytes().split(b"\0")
            if b"train.fetcher" in words:
                opened = [os.readlink(link) for link in (each / "fd").iterdir()]
                if any(path.startswith(f"{cache}/") for path in opened):
                    found.append(int(each.name))
    return found


def nobody_is_left(cache: Path, within_s: float = 30.0) -> bool:
    """Whether soon nobody fetches into a cache or reads there; of a process that was killed its
    reader's file stays until the next one comes.
    """
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not fetchers(cache) and not any(map(is_held, cache.glob("*/.reader-*"))):
            return True
        time.sleep(0.02)
    return False


def has_ended(cache: Path, within_s: float = 8.0) -> bool:
    """Whether soon nobody fetches into a cache, and nobody is left as its reader."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        gc.collect()  # what was raised may hold a loader, in a cycle
        if not fetchers(cache) and not list(cache.glob("*/.reader-*")):
            return True
        time.sleep(0.02)
    return False
