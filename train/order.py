"""(seed, epoch, position, rank, world) -> row numbers.

Pure: workers and world size never enter the order. Here rows are shuffled all together, or stay in
order; see `train.wheel` for sets of which only some shards are at hand.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Visits:
    """Which shards the batches of an epoch are made of, and when: arrays of one length, in the
    order of `first`.

    shards: numbers, some more than once. first, last: the batches of all ranks together between
    which rows of that shard are read.
    """

    shards: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def __len__(self) -> int:
        return len(self.shards)


class RowOrder(ABC):
    """A rank's batches of an epoch, of positions 0 .. n_rows-1. A function of the epoch.

    The ranks' batches together are the global ones. In a shuffled batch positions ascend, so that
    reading walks each shard once.
    """

    batch_size: int

    @abstractmethod
    def __call__(self, epoch: int) -> Sequence[np.ndarray]:
        """The positions of each batch, int64 arrays."""

    @property
    @abstractmethod
    def drop_last(self) -> bool:
        """Whether rows that fill no whole batch of all ranks are left out."""

    @abstractmethod
    def of_all_ranks(self) -> Self:
        """The global batches: as one rank would have them."""

    @abstractmethod
    def visits(self, epoch: int, shard_rows: np.ndarray) -> Visits:
        """When the shards are read. shard_rows: [S] how many of the positions lie in each."""

    def places(self, epoch: int) -> Sequence[np.ndarray]:
        """Where these rows stand in each batch of all ranks together."""
        mine = self(epoch)
        together = self.of_all_ranks()(epoch)
        return Places(mine, together)


class Places(Sequence[np.ndarray]):
    """Found when they are asked for: of each batch once, in turn."""

    def __init__(self, mine: Sequence[np.ndarray], together: Sequence[np.ndarray]) -> None:
        self._mine = mine
        self._together = together

    def __len__(self) -> int:
        return len(self._mine)

    def __getitem__(self, step: Any) -> Any:
        """Of one batch. Raises IndexError; no slices."""
        return np.searchsorted(self._together[step], self._mine[step])


@dataclass(frozen=True)
class Batches(RowOrder):
    """Batches shuffled by (seed, epoch), or in order (seed None: evaluation).

    Of a shuffled order a remainder is left out. Evaluation counts every row once over all ranks,
    never padded.
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

    def of_all_ranks(self) -> "Batches":
        size = self.batch_size
        if self.seed is not None:
            size = min(size, self.n_rows // self.world)
        return replace(self, batch_size=size * self.world, rank=0, world=1)

    def visits(self, epoch: int, shard_rows: np.ndarray) -> Visits:
        order = np.arange(self.n_rows)
        together = self.of_all_ranks()
        if self.seed is not None:
            order = permutation(self.n_rows, self.seed, epoch)
            order = order[: len(together(epoch)) * together.batch_size]
        shard_of_position = np.repeat(np.arange(len(shard_rows)), shard_rows)
        shards = shard_of_position[order]
        batches = np.arange(len(order)) // together.batch_size

        read, first_places = np.unique(shards, return_index=True)
        _, places_from_the_end = np.unique(shards[::-1], return_index=True)
        first = batches[first_places]
        last = batches[::-1][places_from_the_end]
        in_order = np.argsort(first, kind="stable")
        return Visits(shards=read[in_order], first=first[in_order], last=last[in_order])
