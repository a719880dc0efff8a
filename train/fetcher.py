"""python -m train.fetcher: the process that fetches shards for the trainings of a machine.

It is told on standard input what is read in which order (a pickled FetchJob, from its parent), and
looks in the cache how far each process is. Nothing else is said: what should be there follows from
the positions alone, so it can be killed and started again at any time.

    for each order   the shards that it reads next, the soonest first, as many as its room holds
    hold             those of all orders
    fetch            the first of these that is not there
    remove           where room is needed: what is not to be held

As the order is known for two epochs, what is removed is always what is needed last.
"""

import errno
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from shards.errors import StoreFailed, UserError
from shards.manifest import read_manifest
from shards.progress import megabytes
from stores.cache import (
    COMES,
    COMES_LATER,
    N_BYTES,
    N_REMOVED,
    N_REQUESTS,
    N_SHARDS,
    NOT_COMING,
    PASSES,
    SERVED,
    START,
    CacheFolder,
    readers,
    tell_failure,
    this_start,
)
from train.room import REACH
from train.streams import ELSEWHERE, CachedPart, FetchJob

AT_ONCE = 3  # shards that are fetched at the same time
PAUSE_S = 0.01  # where there is nothing to do
LOOK_S = 0.25  # how often it looks who reads
ALONE_S = 1.0  # without anybody, before it ends
FULL_S = 60.0  # how long a full disk is waited for
FULL_PAUSE_S = 0.1
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


# ------------------------------------------------------------------------------------- what it does


class PartOfCache:
    """One set's folder, as the fetcher has it. first: the number of its first shard of all."""

    def __init__(self, part: CachedPart, first: int) -> None:
        path = part.path
        self.folder = CacheFolder(path, read_manifest(path), part.fields)
        self.state = self.folder.state(writes=True)
        self.source = part.source
        self.first = first

    @property
    def n_shards(self) -> int:
        return len(self.folder.manifest.shards)

    def begin(self, feed: int) -> np.ndarray:
        """Take what is there: [S] which shards are; all readers see it."""
        self.folder.remove_unfinished()
        started = this_start()
        was_started_anew = started != 0 and int(self.state.numbers[START]) != started
        is_here = self.folder.look(reads=was_started_anew)
        self.state.numbers[START] = started
        for shard in np.flatnonzero(is_here != self.state.is_here(np.arange(self.n_shards))):
            self.state.set_here(int(shard), bool(is_here[shard]))
        self.state.coming[:] = NOT_COMING
        self.state.numbers[SERVED] = feed
        return is_here

    def fetch(self, shard: int) -> None:
        """Have its files here."""
        self.folder.fetch(shard, self.source)

    def say_here(self, shard: int) -> None:
        """Once it was fetched."""
        self.state.set_here(shard, True)
        self.state.numbers[N_SHARDS] += 1
        self.state.numbers[N_BYTES] += int(self.folder.shard_bytes[shard])
        self.state.numbers[N_REQUESTS] = getattr(self.source, "n_requests", 0)

    def remove(self, shard: int) -> None:
        self.state.set_here(shard, False)
        self.folder.remove(shard)
        self.state.numbers[N_REMOVED] += 1


class Audience:
    """Who reads in the orders of this job, and how far the last of them is.

    folders: of all parts; the positions are in the first.
    """

    def __init__(self, folders: Sequence[Path], feed: int, n_streams: int) -> None:
        self._folders = folders
        self._feed = feed
        self._n_streams = n_streams
        self._heard_at = time.monotonic()
        self._look()

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        of_folders = [readers(folder) for folder in self._folders]
        self._positions = [each for each, reader in of_folders[0] if reader.feed == self._feed]
        all_readers = [reader for found in of_folders for _, reader in found]
        self.has_others = any(reader.feed != self._feed for reader in all_readers)
        if self._positions:
            self._heard_at = self._looked_at

    def is_gone(self) -> bool:
        if time.monotonic() - self._looked_at > LOOK_S:
            self._look()
        return not self._positions and time.monotonic() - self._heard_at > ALONE_S

    def least(self) -> tuple[int, ...]:
        """Of each order the batch that is delivered next, where that is least; -1: nothing of it is
        wanted yet. The further orders begin with the first.
        """
        least: list[int] = []
        for stream in range(self._n_streams):
            begun = [int(each[stream]) for each in self._positions if each[stream] >= 0]
            begins = 0 if stream and least[0] >= 0 else -1
            least.append(min(begun, default=begins))
        return tuple(least)


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """What should be there. shards: to be held, the most urgent first. next_use: [S] in how many
    batches a shard is read; inf: not in this epoch or the next. is_held: [S] whether it is to be
    held. coming: [S] see CacheState.
    """

    shards: np.ndarray
    next_use: np.ndarray
    is_held: np.ndarray
    coming: np.ndarray


class Fetcher:
    """See the module."""

    def __init__(self, job: FetchJob) -> None:
        self.job = job
        self.parts: list[PartOfCache] = []
        first = 0
        for part in job.parts:
            self.parts.append(PartOfCache(part, first))
            first += self.parts[-1].n_shards
        self.shard_bytes = np.concatenate([part.folder.shard_bytes for part in self.parts])
        self.is_here = np.zeros(first, bool)
        self._under_way: dict[Future[None], int] = {}
        self._full_since: float | None = None

    def run(self) -> None:
        """Until nobody reads any more, or all that will ever be read is there.

        Raises UserError and OSError where it cannot go on.
        """
        self.is_here = np.concatenate([part.begin(self.job.feed) for part in self.parts])
        folders = [part.folder.path for part in self.parts]
        audience = Audience(folders, self.job.feed, len(self.job.streams))
        known: tuple[int, ...] = ()
        pool = ThreadPoolExecutor(AT_ONCE)
        while not audience.is_gone():
            positions = audience.least()
            if positions != known:
                wanted = self.wanted(positions)
                self._say_what_is_coming(wanted)
                if not audience.has_others:
                    self._make_room(0, wanted)  # an earlier run may have left more
                known = positions
            for part in self.parts:
                part.state.numbers[PASSES] += 1
            self._begin_fetching(wanted, pool, may_remove=not audience.has_others)
            if self._has_all():
                return
            self._take_in()
        for part in self.parts:  # who still asks has not to wait
            part.state.coming[:] = NOT_COMING

    def leave_nothing_unfinished(self) -> None:
        """Before the process ends, whatever is under way."""
        for part in self.parts:
            part.folder.remove_unfinished()

    # ------------------------------------------------------------------------------ what is wanted

    def wanted(self, positions: Sequence[int]) -> Wanted:
        """Of orders that are at these positions."""
        shards = [np.empty(0, np.int64)]
        urgency = [np.empty(0, np.int64)]
        next_use = np.full(len(self.is_here), np.inf)
        coming = np.full(len(self.is_here), NOT_COMING, np.uint8)
        for stream, position in zip(self.job.streams, positions, strict=True):
            if position < 0:
                continue
            soonest_first, later = stream.next_shards(position)
            next_use[soonest_first] = np.minimum(next_use[soonest_first], later)
            fits = np.cumsum(self.shard_bytes[soonest_first]) <= stream.room_bytes
            held = soonest_first[fits]
            in_reach = later < REACH
            # Where an epoch ends there is no room yet for all that the next one begins with.
            later_ones = soonest_first[in_reach & ~fits]
            coming[later_ones] = np.maximum(coming[later_ones], COMES_LATER)
            coming[soonest_first[in_reach & fits] if self.job.removes else held] = COMES
            shards.append(held)
            urgency.append(np.where(in_reach[fits], 0, 1))
        all_shards = np.concatenate(shards)
        by_urgency = np.argsort(np.concatenate(urgency), kind="stable")
        is_held = np.zeros(len(self.is_here), bool)
        is_held[all_shards] = True
        return Wanted(
            shards=all_shards[by_urgency],
            next_use=next_use,
            is_held=is_held,
            coming=coming,
        )

    def _say_what_is_coming(self, wanted: Wanted) -> None:
        for part in self.parts:
            part.state.coming[:] = wanted.coming[part.first : part.first + part.n_shards]

    def _has_all(self) -> bool:
        """Whether all is there that will ever be read."""
        if self.job.removes:
            return False
        read = np.concatenate([stream.shards for stream in self.job.streams])
        return bool(self.is_here[read[read != ELSEWHERE]].all())

    # -------------------------------------------------------------------------- fetched and removed

    def _begin_fetching(self, wanted: Wanted, pool: ThreadPoolExecutor, may_remove: bool) -> None:
        under_way = list(self._under_way.values())
        is_missing = ~self.is_here[wanted.shards] & ~np.isin(wanted.shards, under_way)
        missing = dict.fromkeys(wanted.shards[is_missing][: 2 * AT_ONCE].tolist())
        for shard in missing:
            if len(self._under_way) >= AT_ONCE:
                return
            n_bytes = int(self.shard_bytes[shard])
            if may_remove:
                self._make_room(n_bytes, wanted)
            if not self._has_room(n_bytes):
                if not may_remove and not self._under_way:
                    self._say_not_coming(list(missing))  # as long as others read here
                return
            part = self._part_of(shard)
            if shutil.disk_usage(part.folder.path).free < n_bytes:
                self._wait_for_space()
                return
            self._under_way[pool.submit(part.fetch, shard - part.first)] = shard

    def _say_not_coming(self, shards: Sequence[int]) -> None:
        for shard in shards:
            part = self._part_of(shard)
            part.state.coming[shard - part.first] = NOT_COMING

    def _part_of(self, shard: int) -> PartOfCache:
        return next(part for part in reversed(self.parts) if part.first <= shard)

    def _has_room(self, n_bytes: int) -> bool:
        """For so much more."""
        there = int(self.shard_bytes[self.is_here].sum())
        to_come = int(self.shard_bytes[list(self._under_way.values())].sum())
        return there + to_come + n_bytes <= self.job.limit_bytes

    def _make_room(self, n_bytes: int, wanted: Wanted) -> None:
        """Remove what is not to be held, what is read last first, until there is room for more."""
        if self._has_room(n_bytes):
            return
        may_go = np.flatnonzero(self.is_here & ~wanted.is_held)
        for each in may_go[np.argsort(-wanted.next_use[may_go], kind="stable")].tolist():
            if self._has_room(n_bytes):
                return
            part = self._part_of(each)
            part.remove(each - part.first)
            self.is_here[each] = False

    def _take_in(self) -> None:
        """Wait a moment for what is under way, and count what came. Raises what came instead."""
        if not self._under_way:
            time.sleep(PAUSE_S)
            return
        done, _ = wait(self._under_way, PAUSE_S, FIRST_COMPLETED)
        for future in done:
            shard = self._under_way.pop(future)
            try:
                future.result()
            except (OSError, StoreFailed) as error:
                if not is_of_full_disk(error):
                    raise
                self._wait_for_space()
                continue
            part = self._part_of(shard)
            part.say_here(shard - part.first)
            self.is_here[shard] = True
            self._full_since = None

    def _wait_for_space(self) -> None:
        """What was removed takes its space until the last reader has let it go.

        Raises UserError where that takes too long: something else fills the disk.
        """
        now = time.monotonic()
        self._full_since = self._full_since or now
        if now - self._full_since > FULL_S:
            there = megabytes(int(self.shard_bytes[self.is_here].sum()))
            limit = megabytes(self.job.limit_bytes)
            what = f"the disk is full: the cache has {there} there, and may hold {limit}"
            raise UserError(f"{self.parts[0].folder.path}: {what}", "Free space there")
        time.sleep(FULL_PAUSE_S)


def is_of_full_disk(error: OSError | StoreFailed) -> bool:
    """Of this machine: nothing is written anywhere else."""
    if isinstance(error, StoreFailed):  # a store on a mount calls it so
        return error.full
    return error.errno in FULL_DISK


# ------------------------------------------------------------------------------------- the process


def main() -> NoReturn:
    """Fetch; the status is 2 where that failed, which the readers are told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who reads ends it, by ending
    job: FetchJob = pickle.load(sys.stdin.buffer)
    status = 0
    fetcher = None
    try:
        fetcher = Fetcher(job)
        signal.signal(signal.SIGTERM, lambda *_: end(fetcher, 0))
        fetcher.run()
    except Exception as error:
        tell_failure([part.path for part in job.parts], job.feed, error)
        status = 2
    end(fetcher, status)


def end(fetcher: Fetcher | None, status: int) -> NoReturn:
    """At once: a server that does not answer is waited for by nobody."""
    if fetcher is not None:
        with suppress(OSError):
            fetcher.leave_nothing_unfinished()
    os._exit(status)


if __name__ == "__main__":
    main()
