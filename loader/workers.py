"""Worker processes that make the batches, into buffers which they share with their parent."""

import gc
import multiprocessing as mp
import os
import pickle
import signal
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from loader.ahead import ReadAhead
from loader.batches import (
    BatchMaker,
    BatchRequest,
    Delivery,
    Plan,
    PlannedBatch,
    Position,
    end_of_plan,
)
from loader.buffers import (
    N_BUFFERS,
    Arena,
    BufferPool,
    buffers_of,
)
from loader.forks import HOLDERS, starting_a_worker
from loader.messages import (
    Message,
    packed,
    unpacked,
)
from loader.producers import Producer

LOOK_S = 1.0  # how often a worker looks whether its parent is alive, and the other way round
PIPE_BYTES = 1 << 14  # that are written at once, whoever reads; a pipe holds at least 64 KB
PARENTS_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


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


@dataclass(frozen=True, kw_only=True)
class WorkerStart:
    """How many workers, and how they are started; None: Python's own choice."""

    count: int
    method: str | None


class ProcessProducer(Producer):
    """Worker processes that share the buffers and take turns; kept until the loader is gone.

    Raises RuntimeError where processes cannot be started here.
    """

    def __init__(
        self, maker: BatchMaker, pool: BufferPool, read_ahead: ReadAhead, start: WorkerStart
    ) -> None:
        self.pool = pool
        self.read_ahead = read_ahead
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
            self._start_all(maker, start.count, mp.get_context(start.method))
        except AssertionError as error:  # "daemonic processes are not allowed to have children"
            text = f"a loader cannot start workers here ({error}): use num_workers=0"
            raise RuntimeError(text) from None
        except ChildProcessError:  # it asks after the server that its parent has started
            text = "a forked child cannot use its parent's forkserver: use start_method='spawn'"
            raise RuntimeError(text) from None
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            text = f"the dataset or the transform cannot be sent to a worker ({error})"
            mend = "define it in a module, or use start_method='fork' or num_workers=0"
            raise RuntimeError(f"{text}: {mend}") from error
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
        self._plan = self.read_ahead.plan(plan)
        self._upcoming = None
        self._plan_end = None
        self._send_ahead()

    def next(self) -> Delivery:
        self._send_ahead()
        if self._plan_end is not None and not self._pending:
            return self._plan_end
        pending = self._pending.popleft()
        made = pending.worker.answer()
        self.read_ahead.learn(made.was_read)
        result = self.pool.deliver(pending.buffer_id, made)
        return Delivery(result=result, position_after=pending.position_after)

    def close(self) -> None:
        self._end()

    def forget(self) -> None:
        """Pipes are closed here, and at exit nobody is ended."""
        self._end.detach()
        for worker in self.workers:
            worker.pipe.close()
            # multiprocessing joins these at exit, and has no public way to leave one out.
            children: Any = mp.process._children  # type: ignore[attr-defined]  # noqa: SLF001
            children.discard(worker.process)
        self.workers.clear()

    def _send_ahead(self) -> None:
        """Hand out what there are buffers for; one is left to the batch that is delivered."""
        most = min(N_BUFFERS - 1, self.read_ahead.most_in_work)
        while self.pool.free and len(self._pending) < most:
            self._look_ahead()
            if self._upcoming is None:
                return
            request = self._upcoming.request
            worker = self.workers[self._turn]
            if request.n_bytes > PIPE_BYTES and self._is_busy(worker):
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
            self._plan_end = end_of_plan(error)

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
