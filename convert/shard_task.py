"""Shards of a plan made by one task, in whatever process and on whatever machine it runs.

No engine is known here: a task is a function of plain data that may run twice, at once, or again
after its machine is gone. What it writes is the same each time, whole files alone; what it returns
are receipts, for whoever keeps the journal. It opens the source itself, once a process, reads it by
`pread` or over the network, and starts no process and no thread.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from convert.decode import SIZES, Buffers, Decoder, blaming, decoder_of
from convert.environment import check_environment, environment_of
from convert.plan import Plan, Task, plan_tasks
from convert.shard import FullShard, write_shard
from convert.sources.base import Source
from shards.errors import UserError
from shards.files import quietly
from shards.manifest import Receipt
from stores.places import root_at

Receipts = list[tuple[int, Receipt]]


@runtime_checkable
class Reopenable(Protocol):
    """A source that other processes can open too."""

    @property
    def opener(self) -> Callable[[], Source]:
        """Opens the same source again; it can be pickled, and names no relative path."""


class CannotMake(UserError):
    """A process that can make no shard of this conversion: it does not see what it has to."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A file that the one who collects has put into the set's folder: who sees it, sees that
    folder, and not an empty one of the same name.
    """

    path: Path
    content: bytes

    @classmethod
    def of(cls, folder: Path, run: str) -> "Token":
        """Named as unfinished files are, so that one of a killed run is swept away like them."""
        return cls(path=folder / f".token-{run}.tmp", content=run.encode())

    def is_seen(self) -> bool:
        try:
            return self.path.read_bytes() == self.content
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all tasks of one conversion have in common; it travels with each of them.

    key: of this conversion alone. folder: the address of the set's.
    environment: what the process has that collects the shards. token: None where the folder is on
    no file system.
    """

    key: str
    opener: Callable[[], Source]
    plan: Plan
    folder: str
    environment: Mapping[str, str]
    token: Token | None


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """Shards that are made together. is_train: of each, [n] of its rows."""

    shards: tuple[int, ...]
    is_train: Mapping[int, np.ndarray]


def make_shards(job: Job, task: ShardTask, where: str) -> Receipts:
    """Make these shards durable: their receipts.

    where: what this process is called in a message. Raises CannotMake and OtherVersions where it
    can make none, and whatever reading and writing raise.
    """
    check_here(job, where)
    with _OPENED.used(job, where) as opened:
        return list(opened.make(task))


def check_here(job: Job, where: str) -> None:
    """Raise CannotMake or OtherVersions where this process would make other bytes, or elsewhere."""
    check_environment(where, job.environment, environment_of(job.plan))
    if job.token is not None and not job.token.is_seen():
        folder = job.token.path.parent
        what = f"the worker {where} does not see {folder} as this program does"
        raise CannotMake(what, "Mount the same folder at the same path on every machine")


# ----------------------------------------------------------------------- which are made together


def shards_together(
    plan: Plan, group_rows: Sequence[int], wanted: Collection[int]
) -> list[tuple[int, ...]]:
    """The wanted shards, in order, those together that rows decoded together fall in.

    group_rows: of each reader. So no row of a source is decoded twice.
    """
    together: list[list[int]] = []
    for k in sorted(wanted):
        first_row = plan.bounds_of(k)[0]
        is_shared = any(first_row % rows for rows in group_rows)
        if is_shared and together and together[-1][-1] == k - 1:
            together[-1].append(k)
        else:
            together.append([k])
    return [tuple(shards) for shards in together]


# --------------------------------------------------------------------------- the source, opened


class _OpenedJob:
    """The source of a job, opened in this process: threads may make shards of it at once."""

    def __init__(self, job: Job, where: str) -> None:
        self.n_users = 0
        self._plan = job.plan
        with quietly():  # whoever collects has said it
            self._source = job.opener()
        try:
            self._check(where)
            self._folder = root_at(job.folder)
            fields = [field.name for field in job.plan.fields]
            self._readers = self._source.readers(fields)
            if any(reader.scratch_bytes for reader in self._readers):
                raise CannotMake(f"{self._source} has to be unpacked first")
            for reader in self._readers:
                with blaming(str(self._source), reader.called(), self._source.advice):
                    reader.read_index()
        except BaseException:
            self._source.close()
            raise

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        self._source.close()

    def _check(self, where: str) -> None:
        found = self._source.identity()
        if found.content() != self._plan.source.content():
            what = f"is another one where the worker {where} reads it"
            digests = f"SHA-256 {found.sha256[:12]} there, {self._plan.source.sha256[:12]} here"
            raise CannotMake(f"{self._source} {what} ({digests})", "Give every machine the same")

    def make(self, task: ShardTask) -> Iterator[tuple[int, Receipt]]:
        """Group after group, shard after shard: as few are held as share a group."""
        group_rows = [reader.group_rows for reader in self._readers]
        steps = plan_tasks(self._plan, group_rows, task.shards)
        n_slots = max(len(step.shards) for step in steps)
        n_rows = min(self._plan.settings.rows_per_shard, self._plan.n_rows)
        buffers = Buffers(self._plan.fields, self._plan.settings.size, n_slots, n_rows)
        try:
            decoder = decoder_of(self._plan, self._source, self._readers, buffers)
            filling = _Filling(self._plan, decoder)
            for step in steps:
                for shard in filling.decode(step):
                    is_train = task.is_train[shard.number]
                    yield shard.number, write_shard(self._plan, shard, is_train, self._folder)
        finally:
            buffers.close()


class _Filling:
    """Shards on their way through the slots of a decoder's buffers."""

    def __init__(self, plan: Plan, decoder: Decoder) -> None:
        self._plan = plan
        self._decoder = decoder
        self._free_slots = list(range(decoder.buffers.n_slots))
        self._slots: dict[int, int] = {}
        self._n_missing: dict[int, int] = {}  # rows of all readers
        self._failed: dict[int, dict[int, str]] = {}

    def decode(self, step: Task) -> Iterator[FullShard]:
        """Its groups into their shards; those that are full now. Their buffers are used again."""
        for k in step.shards:
            if k not in self._slots:
                self._slots[k] = self._free_slots.pop()
                self._n_missing[k] = self._plan.n_rows_of(k) * len(self._decoder.readers)
                self._failed[k] = {}
        slots = {k: self._slots[k] for k in step.shards}
        decoded = self._decoder.decode(step.reader, step.groups, slots)
        for row, problem in decoded.failed.items():
            self._failed[row // self._plan.settings.rows_per_shard][row] = problem
        for k, n_rows in decoded.n_placed.items():
            self._n_missing[k] -= n_rows
            if self._n_missing[k] == 0:
                yield self._full(k)
                self._free_slots.append(self._slots.pop(k))

    def _full(self, k: int) -> FullShard:
        arrays = self._decoder.buffers.arrays[self._slots[k]]
        rows = {name: array[: self._plan.n_rows_of(k)] for name, array in arrays.items()}
        sizes = rows.pop(SIZES)
        failed = dict(sorted(self._failed.pop(k).items()))
        return FullShard(number=k, arrays=rows, sizes=sizes, failed=failed)


class _OpenedJobs:
    """What is open in this process: one job, but for tasks of another one that still run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, _OpenedJob] = {}

    @contextmanager
    def used(self, job: Job, where: str) -> Iterator[_OpenedJob]:
        """The job, opened once; nobody closes it meanwhile."""
        with self._lock:
            if job.key not in self._jobs:
                self._close_all_unused()
                self._jobs[job.key] = _OpenedJob(job, where)
            opened = self._jobs[job.key]
            opened.n_users += 1
        try:
            yield opened
        finally:
            with self._lock:
                opened.n_users -= 1

    def close_unused(self) -> None:
        with self._lock:
            self._close_all_unused()

    def _close_all_unused(self) -> None:
        for key, opened in list(self._jobs.items()):
            if opened.n_users == 0:
                del self._jobs[key]
                opened.close()


_OPENED = _OpenedJobs()


def close_sources() -> None:
    """Let go of the sources that tasks have opened in this process and that none reads now."""
    _OPENED.close_unused()
