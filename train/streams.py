"""What a fetcher is told: which sets, and in which orders their shards are read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.order import Batches, RowOrder, Visits
from train.wheel import Remembered, WheelBatches

ELSEWHERE = -1  # the number of a shard that is not read through a cache


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """An order, and where its positions lie.

    shards: [S] numbers of the shards that it reads, in row order, counted through all cached sets;
    ELSEWHERE: of a set that is not cached. rows: [S] how many of the positions lie in each.
    in_play: of a wheel, else 0. seed: None: rows stay in order. n_rows_of_batch: of all ranks.
    room_bytes: what it may keep.
    """

    shards: np.ndarray
    rows: np.ndarray
    in_play: int
    seed: int | None
    n_rows_of_batch: int
    room_bytes: int

    def __getstate__(self) -> dict[str, Any]:
        """Without what was worked out of it, perhaps by another thread at this moment."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def order(self) -> RowOrder:
        """The batches of all ranks."""
        if self.in_play:
            assert self.seed is not None
            return WheelBatches(self.rows, self.in_play, self.n_rows_of_batch, self.seed)
        return Batches(int(self.rows.sum()), self.n_rows_of_batch, self.seed)

    @cached_property
    def n_steps(self) -> int:
        """Batches of an epoch."""
        return len(self.order(0))

    @cached_property
    def _visits(self) -> Remembered[Visits]:
        return Remembered(lambda epoch: self.order.visits(epoch, self.rows), 3)

    def next_shards(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards that are read from a batch on, each once, the soonest first; and in how many
        batches. position: of the batch, counted from the first epoch on.
        """
        first_epoch = position // max(1, self.n_steps)
        shards = []
        later = []
        for epoch in (first_epoch, first_epoch + 1):
            visits = self._visits[epoch]
            start = epoch * self.n_steps
            is_to_come = visits.last + start >= position
            shards.append(self.shards[visits.shards[is_to_come]])
            later.append(visits.first[is_to_come] + start - position)
        all_shards = np.concatenate(shards)
        _, once = np.unique(all_shards, return_index=True)
        once.sort()
        is_cached = all_shards[once] != ELSEWHERE
        return all_shards[once][is_cached], np.concatenate(later)[once][is_cached]


@dataclass(frozen=True, kw_only=True)
class CachedPart:
    """A set. path: the cache's folder. source: a stores.base.Store. fields: that are read of it."""

    path: Path
    source: Any
    fields: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FetchJob:
    """All of it. feed, removes: see stores.cache.Reader."""

    parts: Sequence[CachedPart]
    streams: Sequence[Stream]
    limit_bytes: int
    removes: bool
    feed: int = 0

    def digest(self) -> bytes:
        """Another one for other orders of other sets."""
        sha256 = hashlib.sha256(f"{self.limit_bytes} {self.removes}".encode())
        for part in self.parts:
            sha256.update(f"{part.path} {part.source} {part.fields}".encode())
        for stream in self.streams:
            numbers = stream.in_play, stream.seed, stream.n_rows_of_batch, stream.room_bytes
            sha256.update(repr(numbers).encode())
            sha256.update(stream.shards.tobytes() + stream.rows.tobytes())
        return sha256.digest()
