"""What users hold: a loader of batches at the speed of memory, and an iteration over one epoch."""

import multiprocessing as mp
import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NoReturn

import numpy as np

from loader.ahead import (
    AHEAD_BYTES,
    WORKER_BYTES,
    ReadAhead,
    reach,
)
from loader.batches import (
    BatchMaker,
    BatchOrder,
    BufferNeed,
    Position,
    RowDataset,
    Transform,
    batches_of,
    can_read_ahead,
    plan_from,
)
from loader.buffers import N_BUFFERS, BufferPool
from loader.forks import HOLDERS, ProcessLock
from loader.memory import check_room, room
from loader.messages import Raised
from loader.producers import InlineProducer, Producer, ThreadProducer
from loader.workers import ProcessProducer, WorkerStart

__all__ = [
    "BatchMaker",
    "BatchOrder",
    "Iteration",
    "Loader",
    "RowDataset",
    "Transform",
    "worker_count",
]

# A batch made by one thread in less than this is ready before any training step ends.
HIDDEN_MS = 10
N_TRIED = 16  # rows of the batches made to see how long one takes


class Loader:
    """Batches of a dataset, epoch after epoch. What is read ahead runs on into the next epoch.

    Iterating again goes on to the next epoch, or repeats one that was left early; `set_epoch`
    names one. Threads may share an iteration; a forked child, a pickle and a copy go on from the
    same place with buffers of their own.

    dataset: has `batch(indices)` and `fill(buffer, indices)`; see `RowDataset`.
    batches: a function, epoch -> the row numbers [B] of each of its batches. No batch may be
        larger than the largest of the epoch that begins when the loader is first used.
    num_workers: processes that make the batches. With 0 one thread does, ahead of the caller; the
        caller itself with prefetch=False, or for a transform, whose random draws would otherwise
        meet the caller's.
    start_method: of the workers: "fork", "forkserver", "spawn", or None for Python's own choice.
    transform: batch -> batch, run where the batch is made. What it draws comes from (seed, epoch,
        step), with any number of workers.

    Raises ValueError for a wrong argument. Iterating raises NoRoom where memory is too small for
    the buffers, RuntimeError where workers cannot start or one is gone, and whatever the dataset,
    `batches` or the transform raise; the next iteration begins anew.
    """

    def __init__(
        self,
        dataset: RowDataset,
        batches: BatchOrder,
        num_workers: int = 0,
        start_method: str | None = None,
        *,
        prefetch: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        _check_dataset(dataset)
        _check(callable(batches), "batches", batches, "a function, epoch -> arrays of row numbers")
        _check_count("num_workers", num_workers)
        _check_start_method(start_method)
        _check(isinstance(prefetch, bool), "prefetch", prefetch, "True or False")
        is_transform = transform is None or callable(transform)
        _check(is_transform, "transform", transform, "a function, batch -> batch, or None")
        _check_count("seed", seed)

        self.dataset = dataset
        self.batches = batches
        self.num_workers = int(num_workers)
        self.start_method = start_method
        self.runs_ahead = prefetch and transform is None  # in a thread, without workers
        self.batch_maker = BatchMaker(dataset=dataset, transform=transform, seed=seed)
        self.start = Position(epoch=0, step=0)  # of the next iteration
        self.stream = BatchStream()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration is over this epoch, from its batch `start` on.

        The order is a pure function of the epoch, so this resumes a run. Raises ValueError.
        """
        _check_count("epoch", epoch)
        _check_count("start", start)
        self.start = Position(epoch=epoch, step=start)

    @property
    def batch_size(self) -> int:
        """Rows of a batch: what `batches` has as its `batch_size`, else those of the largest."""
        declared = getattr(self.batches, "batch_size", None)
        if isinstance(declared, int):
            return declared
        return max(map(len, batches_of(self.batches, self.start.epoch)), default=0)

    @property
    def drop_last(self) -> bool:
        """Whether rows that fill no whole batch are left out: what `batches` says, else not."""
        return bool(getattr(self.batches, "drop_last", False))

    @property
    def sampler(self) -> "EpochRows":
        """The rows of the next iteration, and its `set_epoch`, as programs for torch's loaders
        look for them.
        """
        return EpochRows(self)

    def __len__(self) -> int:
        """How many batches the next iteration has."""
        return max(0, len(batches_of(self.batches, self.start.epoch)) - self.start.step)

    def __iter__(self) -> Iterator[Any]:
        """The batches of the epoch. An iteration that was begun before ends with a RuntimeError."""
        user = self.stream.user
        with user.held():
            user.check()
            user.is_busy = True
            try:
                return self._begin_iteration()
            finally:
                user.is_busy = False

    def _begin_iteration(self) -> "Iteration":
        number = self.stream.begin_iteration()
        n_batches = len(self)
        if n_batches:
            self.stream.go_to(self.start, self)
        return Iteration(self, number, n_batches)

    def new_producer(self, epoch: int) -> Producer:
        """Who makes the batches, with buffers for the largest of this epoch. Raises NoRoom."""
        n_rows = max(map(len, batches_of(self.batches, epoch)))
        need = self.batch_maker.buffer_need(n_rows)
        check_room(N_BUFFERS * need.used_bytes, f"{N_BUFFERS} batches of {n_rows} rows")

        pool = BufferPool(need.reserved_bytes, self.num_workers > 0)
        read_ahead = self._new_read_ahead(need)
        if self.num_workers:
            start = WorkerStart(count=self.num_workers, method=self.start_method)
            return ProcessProducer(self.batch_maker, pool, read_ahead, start)
        if self.runs_ahead:
            return ThreadProducer(self.batch_maker, pool, read_ahead)
        return InlineProducer(self.batch_maker, pool, read_ahead)

    def _new_read_ahead(self, need: BufferNeed) -> ReadAhead:
        if not can_read_ahead(self.dataset):
            return ReadAhead(None)
        left = room()
        if left is None:
            left_bytes = AHEAD_BYTES
        else:  # the buffers have no pages yet, and workers share what they are forked from
            to_come = N_BUFFERS * need.used_bytes + self.num_workers * WORKER_BYTES
            left_bytes = max(0, left.left_bytes - to_come)
        n_makers = max(1, min(self.num_workers, N_BUFFERS - 1))
        return ReadAhead(reach(need.used_bytes, left_bytes, n_makers))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "stream"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.stream = BatchStream()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Loader":
        try:
            state = deepcopy(self.__getstate__(), memo)
        except TypeError as error:
            text = "the dataset, the batches or the transform of this loader cannot be copied"
            raise TypeError(f"{text} ({error}): use copy.copy, which shares them") from error
        made = Loader.__new__(type(self))
        made.__setstate__(state)
        return made


class EpochRows:
    """The rows of a loader's next iteration, in their order: what torch calls a sampler."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def set_epoch(self, epoch: int) -> None:
        """The same as the loader's."""
        self._loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        for rows in self._batches():
            yield from np.asarray(rows).tolist()

    def __len__(self) -> int:
        return sum(map(len, self._batches()))

    def _batches(self) -> list[np.ndarray]:
        start = self._loader.start
        return list(batches_of(self._loader.batches, start.epoch))[start.step :]


class Iteration(Iterator[Any]):
    """The batches of one epoch from the loader's start on; over after an exception."""

    def __init__(self, loader: Loader, number: int, n_batches: int) -> None:
        self._loader = loader
        self._number = number
        self._begun_at = loader.start
        self._position = loader.start  # of the next batch
        self._n_left = n_batches
        self._is_over = False

    def __next__(self) -> Any:
        user = self._loader.stream.user
        with user.held():
            user.check()
            user.is_busy = True
            try:
                return self._next_batch()
            finally:
                user.is_busy = False

    def _next_batch(self) -> Any:
        if self._is_over or not self._n_left:
            self._finish()
        stream = self._loader.stream
        try:
            batch = stream.batch_at(self._position, self._number, self._loader)
        except BaseException:
            self._is_over = True
            raise
        # The stream's own object: whether it is still there is seen without comparing numbers,
        # which took the caller 26 us a batch where all is cold.
        position_after = stream.position
        assert position_after is not None  # as there was a batch
        self._position = position_after
        self._n_left -= 1
        return batch

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "an iteration over a loader cannot be copied or pickled: copy the loader, which begins "
            "the same epoch anew"
        )

    def _finish(self) -> NoReturn:
        """The loader goes on to the next epoch, unless it was told another one meanwhile."""
        if not self._is_over and self._loader.start == self._begun_at:
            self._loader.set_epoch(self._begun_at.epoch + 1)
        self._is_over = True
        raise StopIteration


class BatchStream:
    """What of a loader belongs to one process: who makes its batches, and how far they are.

    A forked child, a pickle and a copy of the loader begin with a new one.
    """

    def __init__(self) -> None:
        self.user = OneUser()
        self.producer: Producer | None = None
        # Of the batch that the producer delivers next. None: the producer must be made anew, as
        # before the first batch and after an exception.
        self.position: Position | None = None
        self._n_iterations = 0  # that were begun; the last one may go on
        HOLDERS.add(self)

    def forget(self) -> None:
        """In a forked child: thread, workers and buffers are the parent's, the place is the
        iteration's."""
        self.producer = None
        self.position = None
        self.user.forget()

    def begin_iteration(self) -> int:
        """The number of a new iteration; those before it have ended."""
        self._n_iterations += 1
        return self._n_iterations

    def go_to(self, position: Position, loader: Loader) -> None:
        """Have the batch at this position be the next one."""
        if self.position == position:
            return
        if self.position is None:
            if self.producer is not None:
                self.producer.close()
            self.producer = loader.new_producer(position.epoch)
        assert self.producer is not None
        self.position = None
        _tell(loader.batches, position)
        self.producer.seek(plan_from(loader.batches, position))
        self.position = position

    def batch_at(self, position: Position, iteration: int, loader: Loader) -> Any:
        """The batch; what was raised instead of it is raised here."""
        if iteration != self._n_iterations:
            text = "this iteration ended when another one over the same loader began"
            raise RuntimeError(f"{text}: make two loaders")
        if self.position is not position:  # a forked child begins anew
            self.go_to(position, loader)
        assert self.producer is not None
        self.position = None
        delivery = self.producer.next()
        if isinstance(delivery.result, Raised):
            error = delivery.result.error
            if isinstance(error, StopIteration):  # would end the caller's loop without a word
                text = "the transform or the dataset raised StopIteration"
                raise RuntimeError(text) from error
            raise error
        self.position = delivery.position_after
        if delivery.position_after is not None:
            _tell(loader.batches, delivery.position_after)
        return delivery.result.value


def _tell(order: BatchOrder, position: Position) -> None:
    """Where the loader is, to an order that wants to know."""
    is_at = getattr(order, "is_at", None)
    if is_at is not None:
        is_at(position.epoch, position.step)


class OneUser:
    """One thread at a time uses a loader; and nobody from inside what it is doing, a transform or
    a signal handler.

        with user.held():
            user.check()
            user.is_busy = True
            try: ...
            finally: user.is_busy = False

    is_busy: its holder alone looks at it. These lines stand where they are used: Ctrl-C comes
    between the calls of Python's functions, and one on the way out would leave the loader busy for
    ever. (A generator as a context manager took 30 us besides, as each line is cold between two
    batches.)
    """

    def __init__(self) -> None:
        self._lock = ProcessLock()
        self.is_busy = False

    def forget(self) -> None:
        self.is_busy = False

    def held(self) -> Any:
        """See ProcessLock.held."""
        return self._lock.held()

    def check(self) -> None:
        if self.is_busy:
            raise RuntimeError(
                "a loader cannot be used inside its own transform or dataset: make two loaders"
            )


# ---------------------------------------------------------------- how many workers


def worker_count(
    wanted: int | str, maker: BatchMaker, batch_size: int, n_rows: int, name: str
) -> int:
    """How many processes should make the batches.

    wanted: a number, which is taken; or "auto": none where one thread makes batches fast enough,
        else one a core, as far as there are buffers; then it says so on standard error.
    n_rows: of the dataset; some of them are made to measure. No batch has more.
    name: of the loader, in what is said.
    """
    if wanted != "auto":
        return int(wanted)
    if n_rows == 0:
        return 0

    n_cores = _n_cores()
    n_tried = min(batch_size, n_rows, N_TRIED)
    ms_per_row = maker.seconds(n_tried) * 1e3 / n_tried
    ms = ms_per_row * min(batch_size, n_rows)
    count = workers_unmeasured(is_work=ms > HIDDEN_MS)
    print(
        f"loader: {name}: num_workers=auto is {count} "
        f"(a batch takes {ms:.1f} ms to make, {n_cores} cores)",
        file=sys.stderr,
        flush=True,
    )
    return count


def workers_unmeasured(*, is_work: bool) -> int:
    """How many processes should make the batches, where it is known whether that is work for them:
    then one a core, as far as there are buffers.
    """
    n_cores = _n_cores()
    return min(n_cores, N_BUFFERS - 1) if is_work and n_cores > 1 else 0


def _n_cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------- arguments


def _check(is_right: bool, name: str, given: Any, choices: str) -> None:
    if not is_right:
        given_text = " ".join(repr(given).split())[:80]
        raise ValueError(f"{name} {given_text}: {choices}")


def _check_count(name: str, given: Any) -> None:
    is_whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
    _check(is_whole and bool(given >= 0), name, given, "a whole number, 0 or more")


def _check_dataset(dataset: Any) -> None:
    has_both = all(callable(getattr(dataset, name, None)) for name in ("batch", "fill"))
    _check(has_both, "dataset", dataset, "an object with batch(indices) and fill(buffer, indices)")


def _check_start_method(start_method: Any) -> None:
    methods = mp.get_all_start_methods()
    is_right = start_method is None or (isinstance(start_method, str) and start_method in methods)
    _check(is_right, "start_method", start_method, f"None, {', '.join(methods)}")
