"""(seed, epoch, position, rank, world) -> row numbers. Pure: workers and world size never enter the order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


def permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's shuffled positions 0..n_rows-1."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_rows)


def steps_per_epoch(n_rows: int, batch_size: int, world: int = 1) -> int:
    """Full global batches; a set smaller than one is a single smaller batch."""
    return max(1, n_rows // (batch_size * world)) if n_rows >= world else 0


def train_batches(
    n_rows: int, batch_size: int, seed: int, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[np.ndarray]:
    """Positions of this rank's batches from step `start`; the ranks' batches together are the global ones.

    The remainder that does not fill a global batch is left out. Inside a batch positions ascend, so that reading
    walks each shard once.
    """
    order = permutation(n_rows, seed, epoch)
    size = min(batch_size, n_rows // world)
    for step in range(start, steps_per_epoch(n_rows, batch_size, world)):
        begin = (step * world + rank) * size
        yield np.sort(order[begin : begin + size])


def eval_batches(
    n_rows: int, batch_size: int, *, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[np.ndarray]:
    """Every position exactly once over all ranks, in order, never padded."""
    mine = np.arange(rank, n_rows, world)
    for begin in range(start * batch_size, len(mine), batch_size):
        yield mine[begin : begin + batch_size]


@dataclass
class Batches:
    """A rank's batches from (epoch, start): shuffled by (seed, epoch), or for evaluation (seed None)."""

    n_rows: int
    batch_size: int
    seed: int | None
    rank: int = 0
    world: int = 1
    epoch: int = 0
    start: int = 0

    def n_steps(self) -> int:
        if self.seed is None:
            return -(-len(range(self.rank, self.n_rows, self.world)) // self.batch_size)
        return steps_per_epoch(self.n_rows, self.batch_size, self.world)

    def __iter__(self) -> Iterator[np.ndarray]:
        where: dict[str, Any] = {"start": self.start, "rank": self.rank, "world": self.world}
        if self.seed is None:
            return eval_batches(self.n_rows, self.batch_size, **where)
        return train_batches(self.n_rows, self.batch_size, self.seed, self.epoch, **where)

    def endless(self, epoch: int, step: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(epoch, step, positions) from there on, epoch after epoch."""
        while True:
            yield from ((epoch, k, indices) for k, indices in enumerate(replace(self, epoch=epoch, start=step), step))
            epoch, step = epoch + 1, 0
