"""In which order the loaders of a training read, and who has the shards fetched for them.

a set of this machine    shuffled all together, or by the wheel where that is asked for
through a cache          by the room that there is (train.room); a feeder has the shards come
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.dataset import ShardSet
from shards.errors import WrongSetting
from shards.files import log
from shards.spec import DEALT
from stores.cache import CacheFolder
from stores.cached_set import CachedSet
from train.feeding import FedBatches, Feeder
from train.joined import JoinedSet, parts_of
from train.order import Batches, RowOrder
from train.room import (
    FULL,
    GB,
    MOST_IN_PLAY,
    WHEEL,
    ReadShards,
    check_disk,
    limit_bytes_of,
    limit_of_disk,
    make_room,
    shuffle_of,
)
from train.streams import ELSEWHERE, CachedPart, FetchJob, Stream
from train.wheel import WheelBatches

if TYPE_CHECKING:
    from train.data import ShardDataset


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the train rows are read, and those to score on. shuffle, limit_gb: see
    `create_dataloaders`.
    """

    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    shuffle: str = "auto"
    limit_gb: float | None = None

    @property
    def n_rows_of_batch(self) -> int:
        """Of all ranks."""
        return self.batch_size * self.world


def cached_parts(found: ShardSet) -> list[CachedSet]:
    """The sets that are read through a cache."""
    return [part for part in parts_of(found) if isinstance(part, CachedSet)]


def with_feed(found: ShardSet, feed: int) -> ShardSet:
    """The same set, whose shards are waited for as whoever has that number has them fetched."""
    if isinstance(found, CachedSet):
        return replace(found, feed=feed)
    if isinstance(found, JoinedSet):
        return replace(found, parts=tuple(with_feed(part, feed) for part in found.parts))
    return found


# ------------------------------------------------------------------------------ which shards


def shards_of_rows(found: ShardSet, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, n_rows): the shards that hold these ascending rows, counted on from set to set, and
    how many of the rows lie in each.
    """
    first_row = 0
    first_shard = 0
    shards = np.empty(len(rows), np.int64)
    for part in parts_of(found):
        is_of_part = (rows >= first_row) & (rows < first_row + part.n_rows)
        of_part = (rows[is_of_part] - first_row) // part.settings.rows_per_shard
        shards[is_of_part] = of_part + first_shard
        first_row += part.n_rows
        first_shard += part.n_shards
    return np.unique(shards, return_counts=True)


def _cache_numbers(found: ShardSet) -> np.ndarray:
    """[S] what each shard is called by a fetcher: ELSEWHERE, or counted through the cached sets."""
    numbers = []
    n_cached = 0
    for part in parts_of(found):
        if isinstance(part, CachedSet):
            numbers.append(n_cached + np.arange(part.n_shards))
            n_cached += part.n_shards
        else:
            numbers.append(np.full(part.n_shards, ELSEWHERE))
    return np.concatenate(numbers)


def _shard_bytes(found: ShardSet, fields: tuple[str, ...]) -> np.ndarray:
    """[S] bytes of the files of these fields; 0 where a set is not read through a cache."""
    sizes = []
    for part in parts_of(found):
        n_bytes = np.zeros(part.n_shards, np.int64)
        if isinstance(part, CachedSet):
            n_bytes = CacheFolder(part.path, part.manifest, fields).shard_bytes
        sizes.append(n_bytes)
    return np.concatenate(sizes)


SAID: set[tuple[Path, str]] = set()


class Plan:
    """What is read of a set that lies elsewhere, wholly or in part, and the room for it."""

    def __init__(self, train: "ShardDataset", scored: "ShardDataset", reading: Reading) -> None:
        """Raises UserError where the cache's limit, or its disk, is too small."""
        self.reading = reading
        self.found = train.shard_set
        self.parts = cached_parts(self.found)
        self.fields = tuple(dict.fromkeys([*train.mapped_fields(), *scored.mapped_fields()]))
        self._numbers = _cache_numbers(self.found)
        self._shard_bytes = _shard_bytes(self.found, self.fields)
        self.train = self._read_shards(train)
        self.scored = self._read_shards(scored)

        root = self.parts[0].path.parent
        folders = [part.path for part in self.parts]
        self.limit_bytes = limit_of_disk(root, folders)
        if reading.limit_gb is not None:
            self.limit_bytes = limit_bytes_of(reading.limit_gb)
        self.room = make_room(self.train, self.scored, reading.shuffle, self.limit_bytes)
        check_disk(root, folders, self.room.kept_bytes)

    def _read_shards(self, dataset: "ShardDataset") -> ReadShards:
        numbers, n_rows = shards_of_rows(self.found, dataset.rows)
        return ReadShards(
            numbers=numbers,
            rows=n_rows,
            n_bytes=self._shard_bytes[numbers],
            n_rows_of_batch=self.reading.n_rows_of_batch,
            are_dealt=all(part.settings.order_version == DEALT for part in parts_of(self.found)),
        )

    def job(self) -> FetchJob:
        """For a fetcher."""
        parts = [
            CachedPart(path=part.path, source=part.source, fields=self.fields)
            for part in self.parts
        ]
        room = self.room
        train = self._stream(self.train, room.in_play, self.reading.seed, room.train_bytes)
        scored = self._stream(self.scored, 0, None, room.scored_bytes)
        return FetchJob(
            parts=parts,
            streams=(train, scored),
            limit_bytes=self.limit_bytes,
            removes=room.removes,
        )

    def _stream(self, read: ReadShards, in_play: int, seed: int | None, room_bytes: int) -> Stream:
        n_rows = self.reading.n_rows_of_batch
        if seed is not None:  # a set smaller than a batch of all ranks is one smaller batch
            n_rows = min(n_rows, int(read.rows.sum()) // self.reading.world * self.reading.world)
        return Stream(
            shards=self._numbers[read.numbers],
            rows=read.rows,
            in_play=in_play,
            seed=seed,
            n_rows_of_batch=n_rows,
            room_bytes=room_bytes,
        )

    def say(self) -> None:
        """How it is read, and why; once in a process, which may have several loaders of it."""
        shuffle = f"shuffle: {in_words(self.room.in_play)}: {self.room.why}"
        folder = self.parts[0].path.parent
        if (folder, shuffle) in SAID:
            return
        SAID.add((folder, shuffle))
        states = [(part, part.state.is_here(np.arange(part.n_shards))) for part in self.parts]
        n_here = sum(int(is_here.sum()) for _, is_here in states)
        n_shards = sum(part.n_shards for part in self.parts)
        log(f"cache: {folder}: {n_here} of {n_shards} shards are there")
        log(shuffle)
        n_rows = int(self.train.rows.sum())
        n_of_step = self.reading.n_rows_of_batch
        n_left_out = n_rows % n_of_step if n_rows > n_of_step else 0
        if n_left_out:
            of_all = f"{n_left_out} of {n_rows} train rows"
            log(f"each epoch leaves out {of_all}, others each time: they fill no whole step")
        if self.room.in_play:
            say_if_in_order(self.found, self.room.in_play)


def in_words(in_play: int) -> str:
    """For the log."""
    return f"wheel, {in_play} shards in play" if in_play else "full"


def say_if_in_order(found: ShardSet, in_play: int) -> None:
    """A wheel mixes rows of some shards: of a set whose rows lie in an order that is not enough."""
    for part in parts_of(found):
        if part.n_shards > in_play and part.settings.order_version != DEALT:
            what = f"the rows of {part.address} lie as in its source"
            log(f"{what}: a batch mixes those of {in_play} shards that may be alike")


# ------------------------------------------------------------------------------ in which order


def orders_of(
    train: "ShardDataset", scored: "ShardDataset", reading: Reading
) -> tuple[RowOrder | FedBatches, RowOrder | FedBatches]:
    """Of the train rows, shuffled, and of those to score on. Raises UserError."""
    in_order = Batches(len(scored), reading.batch_size, None, reading.rank, reading.world)
    if not cached_parts(train.shard_set):
        in_play = local_in_play(train, reading.shuffle)
        if in_play and reading.rank == 0:
            say_if_in_order(train.shard_set, in_play)
        return _shuffled(train, reading, in_play), in_order
    if reading.world > 1 and reading.limit_gb is None:
        what = "several ranks need a number, by which all of them work out the same order"
        raise WrongSetting("cache_limit_gb", None, what)

    plan = Plan(train, scored, reading)
    if reading.rank == 0:
        plan.say()
    states = [part.state for part in plan.parts]
    feeder = Feeder(plan.job(), states, reading.world)
    for dataset in (train, scored):
        dataset.wait_for_shards_of(feeder.feed)
    shuffled = _shuffled(train, reading, plan.room.in_play)
    steps = [stream.n_steps for stream in feeder.job.streams]
    return (
        FedBatches(shuffled, feeder, 0, steps[0]),
        FedBatches(in_order, feeder, 1, steps[1]),
    )


def local_in_play(train: "ShardDataset", shuffle: str) -> int:
    """Shards in play of a set that is all here; 0: shuffled all together."""
    name, in_play = shuffle_of(shuffle)
    if name != WHEEL:
        return 0
    numbers, _ = shards_of_rows(train.shard_set, train.rows)
    return in_play or min(MOST_IN_PLAY, len(numbers))


def _shuffled(train: "ShardDataset", reading: Reading, in_play: int) -> RowOrder:
    if not in_play:
        return Batches(len(train), reading.batch_size, reading.seed, reading.rank, reading.world)
    _, n_rows = shards_of_rows(train.shard_set, train.rows)
    return WheelBatches(
        n_rows, in_play, reading.batch_size, reading.seed, reading.rank, reading.world
    )


def decided(train: "ShardDataset", scored: "ShardDataset", reading: Reading) -> Reading:
    """The same with its shuffle worked out, and a limit where there is a cache."""
    if not cached_parts(train.shard_set):
        in_play = local_in_play(train, reading.shuffle)
        return replace(reading, shuffle=f"{WHEEL}:{in_play}" if in_play else FULL)
    plan = Plan(train, scored, reading)
    return replace(reading, shuffle=plan.room.shuffle, limit_gb=plan.limit_bytes / GB)
