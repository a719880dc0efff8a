"""Has the shards fetched that the loaders of this process read, and says how far they are.

Of all processes of a machine that train together the one that gets the lock starts the fetcher
(train.fetcher), and hands the lock on to it. Where a fetcher is lost, whoever gets the lock next
starts another: it goes on from the positions.
"""

import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet, finalize

import numpy as np

from shards.errors import UserError
from shards.files import OURS, log
from shards.lock import let_go, take
from shards.progress import megabytes
from stores.cache import (
    FETCHING,
    N_BYTES,
    SERVED,
    CacheState,
    NobodyReads,
    Reader,
    ReaderFile,
    begin_reading,
    failure,
    tell_failure,
)
from train.order import RowOrder
from train.streams import ELSEWHERE, FetchJob

END_S = 5.0  # for the fetcher to end in
LONG_S = 60.0  # who lived so long was not lost one after the other
LOOK_S = 0.1  # how often it is seen to that somebody fetches
MOST_LOST = 5  # fetchers, one after the other
SPEAK_S = 10.0  # while batches are waited for


class Feeder:
    """Of one process. job: what is to be fetched; its `feed` is given here. states: of its parts.

    Of loaders that read other fields of a set, and where shards have to go of any others, only the
    last ones have shards fetched: those made before in this process read from now on what is there,
    and the rest row by row. Raises CacheInUse where another training uses the cache in another way.
    """

    def __init__(self, job: FetchJob, states: Sequence[CacheState], world: int) -> None:
        _take_the_place_of_others(job)
        name = job_name(world)
        self.job = replace(job, feed=_feed_of(job, name))
        self._files = []
        for part in job.parts:
            fields = ",".join(sorted(part.fields))
            reader = Reader(
                job=name, feed=self.feed, fields=fields, removes=job.removes, pid=os.getpid()
            )
            self._files.append(begin_reading(part.path, reader))
        self.positions = self._files[0].positions
        self._owner = os.getpid()
        FEEDERS.add(self)
        keeper = Keeper(self.job, states, self.positions)
        thread = threading.Thread(target=keeper.work, name="feeder", daemon=True)
        thread.start()
        self._end = finalize(self, _end, os.getpid(), keeper, thread, self._files)

    @property
    def feed(self) -> int:
        return self.job.feed

    def is_at(self, stream: int, position: int) -> None:
        """Of an order: the batch that is delivered next, counted from the first epoch on."""
        if os.getpid() == self._owner:  # a forked child's loader is its own
            self.positions[stream] = position

    def close(self) -> None:
        """Nothing is fetched for these loaders any more."""
        self._end()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Feeder":
        return self  # copies of a loader are fed by one


FEEDERS: WeakSet[Feeder] = WeakSet()  # those of this process, and of the one it was forked from


def _take_the_place_of_others(job: FetchJob) -> None:
    """Close the feeders of this process that the new one cannot be beside."""
    fields = {part.path: set(part.fields) for part in job.parts}
    for other in list(FEEDERS):
        shared = [part for part in other.job.parts if part.path in fields]
        has_others = any(set(part.fields) != fields[part.path] for part in shared)
        if shared and (job.removes or other.job.removes or has_others):
            if has_others:
                what = "loaders of other fields that were made before read row by row from now on"
                log(f"cache: {shared[0].path.parent}: {what}")
            other.close()


def _end(owner: int, keeper: "Keeper", thread: threading.Thread, files: list[ReaderFile]) -> None:
    if os.getpid() != owner:
        return
    keeper.is_over.set()
    if thread is not threading.current_thread():  # where it is freed in that very thread
        thread.join()
    for file in files:
        file.close()
    keeper.end_fetcher()


def job_name(world: int) -> str:
    """The same in all processes of one training on this machine, whichever way they are started."""
    if world == 1:
        return f"{os.getpid()}-{OURS}"
    meeting = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    started_by = "-".join(meeting) if all(meeting) else str(os.getppid())
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return f"{started_by}-{world}-{run}-{restart}"


def _feed_of(job: FetchJob, name: str) -> int:
    """A number that is another one for other orders, and for another job."""
    digest = hashlib.sha256(name.encode() + job.digest()).digest()
    return 1 + int.from_bytes(digest[:7], "little")


@dataclass(frozen=True, eq=False)
class FedBatches:
    """An order whose shards a feeder has fetched: told where its loader is."""

    order: RowOrder
    feeder: Feeder
    stream: int
    n_steps: int

    def __call__(self, epoch: int) -> Sequence[np.ndarray]:
        return self.order(epoch)

    @property
    def batch_size(self) -> int:
        return self.order.batch_size

    @property
    def drop_last(self) -> bool:
        return self.order.drop_last

    def is_at(self, epoch: int, step: int) -> None:
        """See loader.batches.BatchOrder."""
        self.feeder.is_at(self.stream, epoch * self.n_steps + step)

    def __reduce__(self) -> Any:
        return _same, (self.order,)  # in another process nobody has anything fetched


def _same(order: RowOrder) -> RowOrder:
    return order


class Keeper:
    """Sees to it that somebody fetches, as long as this process reads."""

    def __init__(self, job: FetchJob, states: Sequence[CacheState], positions: np.ndarray) -> None:
        self.is_over = threading.Event()
        self._job = job
        self._states = states
        self._positions = positions
        self._child: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._n_lost = 0
        self._said = WaitingReport(states)

    def work(self) -> None:
        """In a thread of its own."""
        try:
            while not self.is_over.is_set() and self._see_to_it():
                self.is_over.wait(LOOK_S)
        except Exception as error:
            tell_failure([part.path for part in self._job.parts], self._job.feed, error)

    def end_fetcher(self) -> None:
        """Unless other processes of the same training still read, which go on with it."""
        child = self._child
        if child is None or not self._is_last():
            return
        child.terminate()
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _is_last(self) -> bool:
        try:
            failure(self._job.parts[0].path, self._job.feed)
        except NobodyReads:
            return True
        return False

    def _see_to_it(self) -> bool:
        """Whether it has to be looked after any further."""
        if self._child is None:
            if self._has_all() or self._has_failed():
                return False
            self._child = self._started()
            return True
        status = self._child.poll()
        if status is None:
            self._said.look(self._positions)
            return True
        self._child = None
        if status == 2:  # it said why
            return False
        if not self._has_all():
            self._count_lost(status)
        return True

    def _has_failed(self) -> bool:
        """Whether all processes of this training were told so: nobody begins anew."""
        with suppress(NobodyReads):
            return failure(self._job.parts[0].path, self._job.feed) is not None
        return True

    def _has_all(self) -> bool:
        """Whether all that will ever be read is there, for good."""
        if self._job.removes or self._states[0].numbers[SERVED] != self._job.feed:
            return False
        is_here = np.concatenate([s.is_here(np.arange(len(s.changes))) for s in self._states])
        of_all = np.concatenate([stream.shards for stream in self._job.streams])
        return bool(is_here[of_all[of_all != ELSEWHERE]].all())

    def _count_lost(self, status: int) -> None:
        """Raises UserError where one after the other was lost."""
        if time.monotonic() - self._started_at > LONG_S:
            self._n_lost = 0
        self._n_lost += 1
        if self._n_lost >= MOST_LOST:
            what = f"the process that fetches shards ended {self._n_lost} times (status {status})"
            raise UserError(what, "Look whether the memory is full")

    def _started(self) -> "subprocess.Popen[bytes] | None":
        """None where another process of this machine fetches."""
        locks: list[int] = []
        folders = sorted(part.path for part in self._job.parts)
        try:
            for folder in folders:
                lock = take(folder / FETCHING)
                if lock is None:
                    return None
                locks.append(lock)
            return self._start(locks)
        finally:
            for lock in locks:
                let_go(lock)  # the child has it

    def _start(self, locks: Sequence[int]) -> "subprocess.Popen[bytes]":
        self._started_at = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "train.fetcher"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=locks,
            start_new_session=True,  # Ctrl-C is for who trains
        )
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin as pipe:  # it may be gone already
            pickle.dump(self._job, pipe)
        return child


class WaitingReport:
    """A line now and then, while batches wait for shards."""

    def __init__(self, states: Sequence[CacheState]) -> None:
        self._states = states
        self._bytes_at_first = self._n_bytes()
        self._n_said = self._bytes_at_first
        self._last: tuple[int, ...] = ()
        self._since = time.monotonic()

    def look(self, positions: np.ndarray) -> None:
        now = tuple(positions.tolist())
        if now != self._last:
            self._last = now
            self._since = time.monotonic()
        elif time.monotonic() - self._since > SPEAK_S and self._n_bytes() > self._n_said:
            self._since = time.monotonic()
            self._n_said = self._n_bytes()
            log(f"cache: {megabytes(self._n_said - self._bytes_at_first)} fetched so far")

    def _n_bytes(self) -> int:
        return sum(int(state.numbers[N_BYTES]) for state in self._states)
