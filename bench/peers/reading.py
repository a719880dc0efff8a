"""One reader in a process of its own, which does what it is told on its standard input.

    python -m bench.peers.reading MODULE SET STORE WORKERS

A line in is a JSON list, [what, ...]; a line out is a JSON list too: ["done", what came of it], or
["failed", why]. Whatever the reader prints goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.loader import (
    epochs_of,
    hold_the_lock_a_step,
    median_wait_ms,
    sleep_a_step,
    speed_of,
)
from bench.peers.rows import Rows, check_epoch

STEPS = {"sleeping": sleep_a_step, "holding": hold_the_lock_a_step}


class Reading:
    """What can be asked of a reader."""

    def __init__(self, module: str, path: Path, store: Path, n_workers: int) -> None:
        self.module = importlib.import_module(module)
        self.rows = Rows(path)
        self.store = store
        self.n_workers = n_workers
        self._batches: Any = None

    @property
    def batches(self) -> Any:
        """Opened when they are first needed: a store must be built before."""
        if self._batches is None:
            self._batches = self.module.batches(self.rows, self.store, self.n_workers)
        return self._batches

    def build(self) -> None:
        """Write the rows as the reader wants them."""
        self.store.mkdir(parents=True, exist_ok=True)
        self.module.build(self.rows, self.store)

    def check(self) -> int:
        """Compare an epoch with the set; its number of rows."""
        return check_epoch(self.rows, self.batches, self.n_workers)

    def speed(self) -> float:
        """Rows a second of a whole epoch, the second of two without a pause."""
        return speed_of(epochs_of(self.batches)).rows_per_s

    def wait(self, step: str, n_steps: int) -> float:
        """Median milliseconds for a batch beside a step of 10 ms."""
        return median_wait_ms(self.batches, STEPS[step], n_steps)


def answers(reading: Reading, orders: Iterator[str]) -> Iterator[list[Any]]:
    """One to each order, until there are no more or one failed."""
    for order in orders:
        what, *given = json.loads(order)
        try:
            yield ["done", getattr(reading, what)(*given)]
        except BaseException as error:  # other people's code: whatever it raises is the answer
            yield ["failed", f"{type(error).__name__}: {error}"]
            raise


def main(words: list[str]) -> None:
    """Obey until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    # With more, torch.stack in the DataLoader can be 100 times slower on a small machine.
    torch.set_num_threads(1)
    module, path, store, n_workers = words
    try:
        reading = Reading(module, Path(path), Path(store), int(n_workers))
    except Exception as error:
        print(json.dumps(["failed", f"{type(error).__name__}: {error}"]), file=out, flush=True)
        raise
    for answer in answers(reading, iter(sys.stdin.readline, "")):
        print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # threads and workers of others do not all end by themselves


if __name__ == "__main__":
    main(sys.argv[1:])
