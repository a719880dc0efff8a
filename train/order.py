"""(seed, epoch, position, rank, world) -> row numbers.

Pure: workers and world size never enter the order.
"""

from dataclasses import dataclass, replace

import numpy as np

from train.arguments import check_whole


def permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's shuffled positions 0..n_rows-1."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_rows)


def steps_per_epoch(n_rows: int, batch_size: int, world: int = 1) -> int:
    """Full global batches; a set smaller than one is a single smaller batch."""
    return max(1, n_rows // (batch_size * world)) if n_rows >= world else 0


def common_batches(n_rows: int, batch_size: int, world: int = 1) -> int:
    """Batches of an evaluation that every rank has; some ranks may have one more."""
    n_rows_of_every_rank = n_rows // world
    return -(-n_rows_of_every_rank // batch_size)  # rounded up


@dataclass(frozen=True)
class Batches:
    """A rank's batches of an epoch: shuffled by (seed, epoch), or in order (seed None: evaluation).

    The ranks' batches together are the global ones, of which a remainder is left out. In a shuffled
    batch positions ascend, so that reading walks each shard once. Evaluation counts every row once
    over all ranks, never padded.
    """

    n_rows: int
    batch_size: int
    seed: int | None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Raises UserError: a wrong rank would train on another's rows, or on none."""
        check_whole("n_rows", self.n_rows, 0, 2**62)
        check_whole("batch_size", self.batch_size, 1, 2**62)
        check_whole("world", self.world, 1, 2**31)
        check_whole("rank", self.rank, 0, self.world - 1)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, 2**64 - 1)

    def __call__(self, epoch: int) -> list[np.ndarray]:
        """The positions of each batch, int64 arrays."""
        if self.seed is None:
            mine = np.arange(self.rank, self.n_rows, self.world)
            return [mine[at : at + self.batch_size] for at in range(0, len(mine), self.batch_size)]

        order = permutation(self.n_rows, self.seed, epoch)
        size = min(self.batch_size, self.n_rows // self.world)
        steps = np.arange(steps_per_epoch(self.n_rows, self.batch_size, self.world))
        starts = (self.rank + self.world * steps) * size
        return [np.sort(order[at : at + size]) for at in starts]

    @property
    def drop_last(self) -> bool:
        """Of a shuffled order rows that fill no whole batch of all ranks are left out."""
        return self.seed is not None

    def places(self, epoch: int) -> list[np.ndarray]:
        """Where these rows stand in each batch of all ranks together."""
        mine = self(epoch)
        together = replace(self, batch_size=len(mine[0]) * self.world, rank=0, world=1)
        return [
            np.searchsorted(batch, own) for batch, own in zip(together(epoch), mine, strict=False)
        ]
