"""(seed, epoch, position, rank, world) -> row numbers. Pure: workers and world size never enter the order."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Batches:
    """A rank's batches of an epoch: shuffled by (seed, epoch), or for evaluation (seed None)."""

    n_rows: int
    batch_size: int
    seed: int | None
    rank: int = 0
    world: int = 1

    def __call__(self, epoch: int) -> list[np.ndarray]:
        if self.seed is None:
            return list(eval_batches(self.n_rows, self.batch_size, rank=self.rank, world=self.world))
        sizes = self.n_rows, self.batch_size, self.seed, epoch
        return list(train_batches(*sizes, rank=self.rank, world=self.world))

    def places(self, epoch: int) -> list[np.ndarray]:
        """Where these rows stand in each batch of all ranks together."""
        mine = self(epoch)
        whole = replace(self, batch_size=len(mine[0]) * self.world, rank=0, world=1)
        return list(map(np.searchsorted, whole(epoch), mine))
