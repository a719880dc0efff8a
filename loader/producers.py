"""Who makes the batches: the caller, one thread, or worker processes.

A producer is given a plan (which rows make which batch, from a position on) by `seek`, and then
delivers one batch of it a `next`. All three have a `BatchMaker` make each batch in a buffer of a
`BufferPool`, so that a batch is the same whoever makes it.
"""

import gc
import multiprocessing as mp
import os
import random
import signal
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Event
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loader.buffers import (
    N_BUFFERS,
    Arena,
    BufferPool,
    arrays_in,
    buffers_of,
    n_bytes_of,
    private_memory,
)
from loader.forks import HOLDERS, ProcessLock, starting_a_worker, use_one_thread_in_a_fork
from loader.messages import (
    Layout,
    Message,
    Raised,
    Returned,
    Written,
    add_note,
    packed,
    unpacked,
)

# Room for what a transform makes of each number; a page of it exists once it is written.
BYTES_PER_VALUE = 16
LOOK_S = 1.0  # how often a worker looks whether its parent is alive, and the other way round
PIPE_BYTES = 1 << 14  # that are written at once, whoever reads; a pipe holds at least 64 KB
N_TIMED = 5  # batches made to see how long one takes
PARENTS_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
NUMPY_HAS = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip
DRAWS = ProcessLock()  # whoever draws from the seeds of a batch: they are the whole process's
N_THREADS = ProcessLock()  # whoever changes torch's number of threads for a moment

# epoch -> the row numbers of each of its batches
BatchOrder = Callable[[int], Sequence[np.ndarray]]
Transform = Callable[[tuple[Tensor, ...]], Any]


class RowDataset(Protocol):
    """What a loader needs of a dataset. Workers that are not forked get it pickled."""

    def batch(self, indices: np.ndarray) -> Any:
        """These rows in new memory.

        indices: [B] row numbers, as the order names them.

        Returns a tuple of tensors; anything else is delivered as it is, without a buffer.
        """

    def fill(self, buffer: memoryview, indices: np.ndarray) -> Layout | None:
        """Write the same into `buffer` (bytes; see `buffers.arrays_in`).

        Returns how it lies there, [(dtype, shape), ...]; or None, and `batch` is asked.
        """


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place in the endless order of batches."""

    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A batch to make; `indices` are the row numbers [B]."""

    epoch: int
    step: int
    indices: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """A request, and the position after it."""

    request: BatchRequest
    position_after: Position


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A batch, or what was raised instead.

    position_after: where it goes on; None where that is not known, as the plan has ended.
    """

    result: Returned | Raised
    position_after: Position | None


Plan = Iterator[PlannedBatch]


def plan_from(order: BatchOrder, position: Position) -> Plan:
    """All batches from there on, epoch after epoch; ends before an epoch that has none."""
    epoch = position.epoch
    first_step = position.step
    while True:
        rows_of_batches = order(epoch)
        n_batches = len(rows_of_batches)
        if not n_batches:
            return
        for step in range(first_step, n_batches):
            if step + 1 < n_batches:
                position_after = Position(epoch=epoch, step=step + 1)
            else:
                position_after = Position(epoch=epoch + 1, step=0)
            request = BatchRequest(epoch=epoch, step=step, indices=rows_of_batches[step])
            yield PlannedBatch(request=request, position_after=position_after)
        epoch += 1
        first_step = 0


def _end_of_plan(error: BaseException) -> Delivery:
    """What ended the plan, raised by the user's order; StopIteration where it only ran out."""
    if isinstance(error, StopIteration):
        text = "batches(epoch) gave more batches when it was asked first than it does now"
        return Delivery(result=Raised(RuntimeError(text)), position_after=None)
    return Delivery(result=Raised(error), position_after=None)


# ---------------------------------------------------------------- one batch


@dataclass(frozen=True, kw_only=True)
class BufferNeed:
    """Bytes of a buffer: what a batch will use of it, and the room to reserve."""

    used_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Makes one batch in a buffer. Every worker has a copy.

    transform: batch -> batch, or None: what the dataset writes is delivered.
    seed: of what a transform draws, with epoch and step.
    """

    dataset: RowDataset
    transform: Transform | None
    seed: int

    def make(self, buffer: memoryview, request: BatchRequest) -> Message:
        """What became of the batch; it raises nothing."""
        use_one_thread_in_a_fork()
        try:
            if self.transform is None:
                return self._filled(buffer, request.indices)
            # The same draws wherever the batch is made.
            with _seeded(self.seed, request.epoch, request.step):
                return _stored(self.transform(self.dataset.batch(request.indices)), buffer)
        except Exception as error:
            self._note_rows(error, request)
            return Raised(error)
        except BaseException as error:
            return Raised(error)

    def buffer_need(self, n_rows: int) -> BufferNeed:
        """Of a batch of so many rows, judged by the dataset's first row."""
        use_one_thread_in_a_fork()
        made = self.dataset.batch(np.zeros(1, np.int64))
        row = [part for part in made if _is_plain(part)] if type(made) is tuple else []
        used_bytes = n_rows * sum(part.nbytes for part in row)
        if self.transform is None:
            return BufferNeed(used_bytes=used_bytes, reserved_bytes=used_bytes)
        n_values = n_rows * sum(part.numel() for part in row)
        return BufferNeed(used_bytes=used_bytes, reserved_bytes=n_values * BYTES_PER_VALUE)

    def seconds(self, n_rows: int) -> float:
        """What the first `n_rows` take to make: the least of five, as the first touches what is
        cold. Raises what is no Exception: Ctrl-C."""
        buffer = private_memory(self.buffer_need(n_rows).used_bytes)
        request = BatchRequest(epoch=0, step=0, indices=np.arange(n_rows))
        seconds = []
        for _ in range(N_TIMED):
            started = time.perf_counter()
            made = self.make(buffer, request)
            if isinstance(made, Raised) and not isinstance(made.error, Exception):
                raise made.error
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    def _filled(self, buffer: memoryview, indices: np.ndarray) -> Message:
        layout = self.dataset.fill(buffer, indices)
        if layout is None:
            return _stored(self.dataset.batch(indices), buffer)
        return Written(self._checked(layout))

    def _checked(self, layout: Any) -> Layout:
        if type(layout) is list and all(type(part) is tuple and len(part) == 2 for part in layout):
            return layout
        raise TypeError(
            f"{type(self.dataset).__name__}.fill() returned a {type(layout).__name__}: it returns "
            "the layout of what it wrote, a list of (dtype, shape), or None, and then batch() is "
            "asked"
        )

    def _note_rows(self, error: Exception, request: BatchRequest) -> None:
        with suppress(Exception):  # of the dataset's __repr__
            rows = ", ".join(map(str, np.asarray(request.indices).tolist()))
            place = f"epoch {request.epoch}, step {request.step}, rows {rows} of {self.dataset!r}"
            add_note(error, f"in the loader, {place}")


def _stored(made: Any, buffer: memoryview) -> Written | Returned:
    """A tuple of plain tensors goes into `buffer`, contiguous; what is no such tuple, or too large,
    stays as it is."""
    if type(made) is not tuple or not all(map(_is_plain, made)):
        return Returned(made)
    sources = [part.numpy() for part in made]
    layout: Layout = [(source.dtype, source.shape) for source in sources]
    if n_bytes_of(layout) > len(buffer):
        return Returned(made)
    for target, source in zip(arrays_in(buffer, layout), sources, strict=True):
        target[...] = source
    return Written(layout)


def _is_plain(part: Any) -> bool:
    """Nothing is lost where its numbers are copied by numpy."""
    if type(part) is not Tensor or not part.is_cpu or part.layout != torch.strided:
        return False
    if part.dtype not in NUMPY_HAS or part.is_nested or part.requires_grad:
        return False
    return not (part.is_conj() or part.is_neg() or part.__dict__)


@contextmanager
def _seeded(*parts: int) -> Iterator[None]:
    """Torch, numpy and random draw from these numbers, and go on from where they were afterwards.

    They draw through their global states, as that is what a user's transform may draw from.
    """
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    with DRAWS.held():
        numpy_state = np.random.get_state()  # noqa: NPY002 (see above)
        python_state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            try:
                yield
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002
                random.setstate(python_state)


# ---------------------------------------------------------------- producers


class Producer(ABC):
    """Delivers the batches of a plan, in its order."""

    pool: BufferPool

    @abstractmethod
    def seek(self, plan: Plan) -> None:
        """Go on with this plan; what was made ahead for another is dropped."""

    @abstractmethod
    def next(self) -> Delivery:
        """The next batch. Raises RuntimeError where whoever should make it is gone."""

    @abstractmethod
    def close(self) -> None:
        """End whatever runs. A thread begins again with the next `seek`, processes do not."""

    @abstractmethod
    def forget(self) -> None:
        """In a forked child: what runs is the parent's, and nothing of it is ended here."""


class InlineProducer(Producer):
    """The caller makes a batch when it asks."""

    def __init__(self, maker: BatchMaker, pool: BufferPool) -> None:
        self.maker = maker
        self.pool = pool
        self._plan: Plan = iter(())

    def seek(self, plan: Plan) -> None:
        self._plan = plan

    def next(self) -> Delivery:
        try:
            planned = next(self._plan)
        except Exception as error:  # of the user's order
            return _end_of_plan(error)
        buffer_id = self.pool.take()
        made = self.maker.make(self.pool.buffers[buffer_id], planned.request)
        result = self.pool.deliver(buffer_id, made)
        return Delivery(result=result, position_after=planned.position_after)

    def close(self) -> None:
        """Nothing runs."""

    def forget(self) -> None:
        """Nothing is the parent's."""


class ThreadProducer(Producer):
    """A thread that does all there is to do for a batch: the user takes it out of a queue.

    A batch is lent out when the user comes for the one before it: what was had before that is back
    by then, or is kept for good. Python's lock is asked for once a batch, after the copy.
    """

    def __init__(self, maker: BatchMaker, pool: BufferPool) -> None:
        self.maker = maker
        self.pool = pool
        self._turns = SimpleQueue[bool]()
        self._ready = SimpleQueue[Delivery]()
        self._end: weakref.finalize | None = None  # of the thread that runs
        HOLDERS.add(self)

    def seek(self, plan: Plan) -> None:
        self.close()
        self._turns = SimpleQueue()
        self._ready = SimpleQueue()
        run = ThreadRun(
            maker=self.maker,
            pool=self.pool,
            plan=plan,
            turns=self._turns,
            ready=self._ready,
            has_begun=threading.Event(),
        )
        thread = threading.Thread(target=run.work, name="loader", daemon=True)

        use_one_thread_in_a_fork()
        with N_THREADS.held():
            n_threads = torch.get_num_threads()
            thread.start()
            self._end = weakref.finalize(self, _end_thread, self._turns, thread)
            # It has asked for one core, which holds for itself and for every thread to come: undone
            # for those.
            run.has_begun.wait()
            torch.set_num_threads(n_threads)

    def next(self) -> Delivery:
        self._turns.put(True)
        return self._ready.get()

    def close(self) -> None:
        if self._end is not None:
            self._end()

    def forget(self) -> None:
        if self._end is not None:
            self._end.detach()


@dataclass(frozen=True, kw_only=True)
class ThreadRun:
    """What the thread of a producer works with; the producer itself it never sees, else that would
    live as long as the thread.

    turns: True for each batch that may be lent out, False to end.
    """

    maker: BatchMaker
    pool: BufferPool
    plan: Plan
    turns: SimpleQueue[bool]
    ready: SimpleQueue[Delivery]
    has_begun: Event

    def work(self) -> None:
        torch.set_num_threads(1)
        self.has_begun.set()
        self.turns.put(True)  # the first batch is lent out at once
        try:
            for planned in self.plan:
                buffer_id = self.pool.take()
                made = self.maker.make(self.pool.buffers[buffer_id], planned.request)
                if not self.turns.get():
                    self.pool.put_back(buffer_id)
                    return
                # In one expression: a local would hold the batch while the next is being made.
                self.ready.put(
                    Delivery(
                        result=self.pool.deliver(buffer_id, made),
                        position_after=planned.position_after,
                    )
                )
            end: BaseException = StopIteration()
        except BaseException as error:  # by the user's order
            end = error
        self.ready.put(_end_of_plan(end))


def _end_thread(turns: SimpleQueue[bool], thread: threading.Thread) -> None:
    """At exit too: a thread that comes back from torch to an interpreter that is gone takes the
    process down."""
    turns.put(False)
    if thread is not threading.current_thread():
        thread.join()


# ---------------------------------------------------------------- worker processes


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker is sent: a request, and the buffer to make it in."""

    buffer_id: int
    request: BatchRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class WorkerProcess:
    """A process, and the pipe to it."""

    process: Any
    pipe: Connection

    def answer(self) -> Message:
        """Wait for what became of its oldest assignment. Raises RuntimeError where it is gone."""
        try:
            self._wait_for_answer()
            data = self.pipe.recv_bytes()
        except (EOFError, OSError):
            raise RuntimeError(self._how_it_ended()) from None
        return unpacked(data, self.process.name)

    def _wait_for_answer(self) -> None:
        ready = wait([self.pipe, self.process.sentinel], LOOK_S)
        while not ready:
            if self.process.exitcode is not None:
                raise EOFError  # what another process inherited keeps the sentinel silent
            ready = wait([self.pipe, self.process.sentinel], LOOK_S)
        if self.pipe not in ready:
            raise EOFError

    def _how_it_ended(self) -> str:
        self.process.join(LOOK_S)
        code = self.process.exitcode
        how = f"ended by itself (status {code})"
        if code and code < 0:
            how = f"was killed by signal {-code}"
        return (
            f"{self.process.name} (process {self.process.pid}) {how}: out of memory, or a crash in "
            "the transform. Use a smaller batch size or fewer workers (0 needs none)"
        )


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Pending:
    """A batch under way: the buffer that is being filled, by whom, and the position after it."""

    buffer_id: int
    worker: WorkerProcess
    position_after: Position


class ProcessProducer(Producer):
    """Worker processes that share the buffers and take turns; kept until the loader is gone.

    Raises RuntimeError where processes cannot be started here.
    """

    def __init__(
        self, maker: BatchMaker, pool: BufferPool, count: int, start_method: str | None
    ) -> None:
        self.pool = pool
        self.workers: list[WorkerProcess] = []
        self._turn = 0  # the worker whose it is
        self._pending = deque[Pending]()
        self._plan: Plan = iter(())
        self._upcoming: PlannedBatch | None = None  # not sent yet
        self._plan_end: Delivery | None = None  # instead of further batches

        self._end = weakref.finalize(self, _end_workers, os.getpid(), self.workers)
        # Before multiprocessing itself ends what runs at exit.
        util.Finalize(self, self._end, exitpriority=10)
        HOLDERS.add(self)

        gc.freeze()  # else the first collection in a forked worker writes to every object's page
        try:
            self._start_all(maker, count, mp.get_context(start_method))
        except AssertionError as error:  # "daemonic processes are not allowed to have children"
            text = f"a loader cannot start workers here ({error}): use num_workers=0"
            raise RuntimeError(text) from None
        except ChildProcessError:  # it asks after the server that its parent has started
            text = "a forked child cannot use its parent's forkserver: use start_method='spawn'"
            raise RuntimeError(text) from None
        finally:
            gc.unfreeze()

    def _start_all(self, maker: BatchMaker, count: int, context: Any) -> None:
        is_forkserver = context.get_start_method() == "forkserver"
        if is_forkserver:
            dataset_module = type(maker.dataset).__module__
            context.set_forkserver_preload(["__main__", __name__, dataset_module])
        # A forkserver would hand the mask on to processes that are not ours.
        with starting_a_worker(), nullcontext() if is_forkserver else _signals_wait():
            for k in range(count):
                self._start(context, f"loader-{k}", maker)

    def _start(self, context: Any, name: str, maker: BatchMaker) -> None:
        ours, theirs = context.Pipe()
        what = (theirs, maker, self.pool.arena)
        process = context.Process(target=_work, args=what, name=name, daemon=True)
        self.workers.append(WorkerProcess(process=process, pipe=ours))
        process.start()
        theirs.close()

    def seek(self, plan: Plan) -> None:
        while self._pending:  # made ahead for another position
            pending = self._pending.popleft()
            pending.worker.answer()
            self.pool.put_back(pending.buffer_id)
        self._plan = plan
        self._upcoming = None
        self._plan_end = None
        self._send_ahead()

    def next(self) -> Delivery:
        self._send_ahead()
        if self._plan_end is not None and not self._pending:
            return self._plan_end
        pending = self._pending.popleft()
        result = self.pool.deliver(pending.buffer_id, pending.worker.answer())
        return Delivery(result=result, position_after=pending.position_after)

    def close(self) -> None:
        self._end()

    def forget(self) -> None:
        """Pipes are closed here, and at exit nobody is ended."""
        self._end.detach()
        for worker in self.workers:
            worker.pipe.close()
            # What multiprocessing joins at exit; there is no public way out of it.
            children: Any = mp.process._children  # type: ignore[attr-defined]  # noqa: SLF001
            children.discard(worker.process)
        self.workers.clear()

    def _send_ahead(self) -> None:
        """Hand out what there are buffers for; one is left to the batch that is delivered."""
        while self.pool.free and len(self._pending) < N_BUFFERS - 1:
            self._look_ahead()
            if self._upcoming is None:
                return
            request = self._upcoming.request
            worker = self.workers[self._turn]
            if request.indices.nbytes > PIPE_BYTES and self._is_busy(worker):
                return  # the pipe cannot hold it: both would write, and neither read

            buffer_id = self.pool.take()
            with suppress(OSError):  # a worker that is gone is noticed where its answer is awaited
                worker.pipe.send(Assignment(buffer_id=buffer_id, request=request))
            pending = Pending(
                buffer_id=buffer_id,
                worker=worker,
                position_after=self._upcoming.position_after,
            )
            self._pending.append(pending)
            self._upcoming = None
            self._turn = (self._turn + 1) % len(self.workers)

    def _look_ahead(self) -> None:
        """Have an upcoming batch if there is one; what ended them is told after those before it."""
        if self._upcoming is not None or self._plan_end is not None:
            return
        try:
            self._upcoming = next(self._plan)
        except Exception as error:  # of the user's order
            self._plan_end = _end_of_plan(error)

    def _is_busy(self, worker: WorkerProcess) -> bool:
        return any(pending.worker is worker for pending in self._pending)


def _end_workers(owner_pid: int, workers: list[WorkerProcess]) -> None:
    """Ask, then insist: nothing of the workers outlives the loader."""
    if os.getpid() != owner_pid:
        return
    for worker in workers:
        with suppress(OSError):
            worker.pipe.send(None)
    for worker in workers:
        process = worker.process
        if process.pid:  # else Ctrl-C came before it was started
            process.join(LOOK_S / len(workers))
            process.kill()
            process.join()
        worker.pipe.close()
    workers.clear()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """What is started meanwhile is not ended by a signal before it can ignore it.

    It begins with the mask.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, maker: BatchMaker, arena: Arena) -> None:
    """A worker's life: ends when told, or when the process that started it is gone."""
    _leave_signals_to_the_parent()
    torch.set_num_threads(1)
    name = mp.current_process().name
    parent = _parent_pid()
    buffers = buffers_of(arena)
    with suppress(EOFError, OSError):
        while True:
            while not pipe.poll(LOOK_S):
                if _parent_pid() != parent:
                    return
            assignment: Assignment | None = pipe.recv()
            if assignment is None:
                return
            buffer = buffers[assignment.buffer_id]
            # In one expression: a local would hold the batch until the next one is asked for.
            pipe.send_bytes(packed(maker.make(buffer, assignment.request), name))


def _leave_signals_to_the_parent() -> None:
    """A terminal or a scheduler sends them to the whole group; a worker follows its parent."""
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)


def _parent_pid() -> int:
    """0 where the system does not tell: the end of the pipe is what does, then."""
    return os.getppid() if hasattr(os, "getppid") else 0
