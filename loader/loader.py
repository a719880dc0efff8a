"""Batches at the speed of memory: the slots of a ring, filled by the caller, by one thread, or by worker processes."""

import gc
import multiprocessing as mp
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Event
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from loader.buffers import N_SLOTS, Arena, Ring, arrays_in, n_bytes_of, private_memory, slots_of
from loader.forks import HOLDERS, ProcessLock, starting_a_worker, use_one_thread_in_a_fork
from loader.memory import check_room
from loader.messages import Layout, Message, Raised, Returned, Written, add_note, packed, unpacked

BYTES_A_VALUE = 16  # room for what a transform makes of each number; a page of it exists once it is written
HIDDEN_MS = 10  # a batch made by one thread in less than this is ready before any training step ends
LOOK_S = 1.0  # how often a worker looks whether its parent is alive, and the other way round
PIPE_BYTES = 1 << 14  # that are written at once, whoever reads; a pipe holds at least 64 KB
PARENTS_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]
OF_NUMPY = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32,
    torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip
OF_ONE_PROCESS = {"source", "_at", "_turn", "_alone"}  # of a loader
DRAWS = ProcessLock()  # whoever draws from the seeds of a batch: they are the whole process's
N_THREADS = ProcessLock()  # whoever changes torch's number of threads for a moment

Batches = Callable[[int], Sequence[np.ndarray]]  # epoch -> the row numbers of each of its batches
Transform = Callable[[tuple[Tensor, ...]], Any]
Job = tuple[int, int, np.ndarray]  # epoch, step, row numbers
Position = tuple[int, int]  # epoch, step
Jobs = Iterator[tuple[Job, Position]]  # and the position after each
Member = tuple[Any, Connection]  # of a crew: a process, and the pipe to it


class Rows(Protocol):
    """A dataset; workers that are not forked get it pickled."""

    def batch(self, indices: np.ndarray) -> Any:
        """These rows in new memory: a tuple of tensors; anything else is delivered as it is, without a buffer."""

    def fill(self, buffer: memoryview, indices: np.ndarray) -> Layout | None:
        """Write the same into `buffer`: how it lies there (`slots.arrays_in`); or None, and `batch` is asked."""


# ---------------------------------------------------------------- one batch


@dataclass(frozen=True)
class Maker:
    """Makes one batch in a slot. Every worker has a copy."""

    dataset: Rows
    transform: Transform | None
    seed: int

    def __call__(self, buffer: memoryview, job: Job) -> Message:
        """What became of the batch; it raises nothing."""
        epoch, step, indices = job
        use_one_thread_in_a_fork()
        try:
            if self.transform is None:
                layout = self.dataset.fill(buffer, indices)
                return Written(self._checked(layout)) if layout is not None else self._batch(buffer, indices)
            with _seeded(self.seed, epoch, step):  # the same draws wherever the batch is made
                return _put(self.transform(self.dataset.batch(indices)), buffer)
        except Exception as error:
            with suppress(Exception):  # of the dataset's __repr__
                rows = ", ".join(map(str, np.asarray(indices).tolist()))
                add_note(error, f"in the loader, epoch {epoch}, step {step}, rows {rows} of {self.dataset!r}")
            return Raised(error)
        except BaseException as error:
            return Raised(error)

    def _batch(self, buffer: memoryview, indices: np.ndarray) -> Message:
        return _put(self.dataset.batch(indices), buffer)

    def _checked(self, layout: Any) -> Layout:
        if type(layout) is list and all(type(part) is tuple and len(part) == 2 for part in layout):
            return layout
        raise TypeError(
            f"{type(self.dataset).__name__}.fill() returned a {type(layout).__name__}: it returns the layout of what "
            "it wrote, a list of (dtype, shape), or None, and then batch() is asked"
        )

    def slot_bytes(self, n_rows: int) -> tuple[int, int]:
        """What a slot will hold, and room for it."""
        use_one_thread_in_a_fork()
        made = self.dataset.batch(np.zeros(1, np.int64))
        row = [part for part in made if _is_plain(part)] if type(made) is tuple else []
        n_bytes, n_values = (n_rows * sum(sizes) for sizes in ([p.nbytes for p in row], [p.numel() for p in row]))
        return n_bytes, n_values * BYTES_A_VALUE if self.transform else n_bytes

    def seconds(self, n_rows: int) -> float:
        """What the first `n_rows` take to make: the least of five, as the first touches what is cold."""
        buffer, seconds = private_memory(self.slot_bytes(n_rows)[0]), []
        for _ in range(5):
            started = time.perf_counter()
            made = self(buffer, (0, 0, np.arange(n_rows)))
            if isinstance(made, Raised) and not isinstance(made.error, Exception):
                raise made.error  # Ctrl-C
            seconds.append(time.perf_counter() - started)
        return min(seconds)


def worker_count(wanted: int | str, maker: Maker, batch_size: int, n_rows: int, name: str) -> int:
    """How many processes: `wanted`, or for "auto" none where one thread makes batches fast enough; then it says so."""
    if wanted != "auto":
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n_rows = min(batch_size, n_rows, 16)
    ms = maker.seconds(n_rows) * 1e3 * batch_size / n_rows
    count = min(cores, N_SLOTS - 1) if ms > HIDDEN_MS and cores > 1 else 0
    facts = f"a batch takes {ms:.1f} ms to make, {cores} cores"
    print(f"loader: {name}: num_workers=auto is {count} ({facts})", file=sys.stderr, flush=True)
    return count


def _put(made: Any, buffer: memoryview) -> Written | Returned:
    """A tuple of plain tensors goes into `buffer`, contiguous; what is no such tuple, or too large, stays as it is."""
    if type(made) is tuple and all(map(_is_plain, made)):
        arrays = [part.numpy() for part in made]
        layout: Layout = [(a.dtype, a.shape) for a in arrays]
        if n_bytes_of(layout) <= len(buffer):
            for to, array in zip(arrays_in(buffer, layout), arrays, strict=True):
                to[...] = array
            return Written(layout)
    return Returned(made)


def _is_plain(part: Any) -> bool:
    """Nothing is lost where its numbers are copied by numpy."""
    if type(part) is not Tensor or not part.is_cpu or part.layout != torch.strided or part.dtype not in OF_NUMPY:
        return False
    return not (part.is_nested or part.requires_grad or part.is_conj() or part.is_neg() or part.__dict__)


@contextmanager
def _seeded(*parts: int) -> Iterator[None]:
    """Torch, numpy and random draw from these numbers, and afterwards go on from where they were."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    with DRAWS.held():
        before = np.random.get_state(), random.getstate()  # noqa: NPY002
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 (what a user's transform may draw from)
            random.seed(seed)
            try:
                yield
            finally:
                np.random.set_state(before[0])  # noqa: NPY002
                random.setstate(before[1])


# ---------------------------------------------------------------- who makes it: `seek` a place, then one `next` a batch


Delivered = tuple[Returned | Raised, Position | None]  # None: where it goes on is not known


class Here:
    """The caller, when it asks."""

    def __init__(self, make: Maker, ring: Ring) -> None:
        self.make, self.ring = make, ring
        self.jobs: Jobs = iter(())

    def close(self) -> None:
        """Nothing runs."""

    def seek(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def next(self) -> Delivered:
        try:
            job, after = next(self.jobs)
        except Exception as error:  # of the user's batches
            return Raised(_as_raised(error)), None
        slot = self.ring.take()
        return self.ring.deliver(slot, self.make(self.ring.buffers[slot], job)), after


class Ahead:
    """A thread that does all there is to do for a batch: the user takes it out of a queue.

    A batch is lent out when the user comes for the one before it: what was had before that is back by then, or is kept
    for good. Python's lock is asked for once a batch, after the copy.
    """

    def __init__(self, make: Maker, ring: Ring) -> None:
        self.make, self.ring = make, ring
        self.turns, self.ready = SimpleQueue[bool](), SimpleQueue[Delivered]()
        self._end: weakref.finalize[Any, Any] | None = None
        HOLDERS.add(self)

    def close(self) -> None:
        if self._end:
            self._end()

    def forget(self) -> None:
        if self._end:
            self._end.detach()

    def seek(self, jobs: Jobs) -> None:
        self.close()
        self.turns, self.ready = SimpleQueue(), SimpleQueue()
        has_begun = threading.Event()
        work = self.make, self.ring, jobs, self.turns, self.ready, has_begun
        thread = threading.Thread(target=_run_ahead, args=work, name="loader", daemon=True)
        use_one_thread_in_a_fork()
        with N_THREADS.held():
            n_threads = torch.get_num_threads()
            thread.start()
            self._end = weakref.finalize(self, _end_thread, self.turns, thread)
            has_begun.wait()  # it has asked for one core, which holds for itself and for every thread to come:
            torch.set_num_threads(n_threads)  # undone for those

    def next(self) -> Delivered:
        self.turns.put(True)
        return self.ready.get()


def _run_ahead(
    make: Maker, ring: Ring, jobs: Jobs, turns: SimpleQueue[bool], ready: SimpleQueue[Delivered], has_begun: Event
) -> None:
    torch.set_num_threads(1)
    has_begun.set()
    turns.put(True)  # the first batch is lent out at once
    try:
        for job, after in jobs:
            slot = ring.take()
            made = make(ring.buffers[slot], job)
            if not turns.get():
                ring.free.append(slot)
                return
            ready.put((ring.deliver(slot, made), after))
        error: BaseException = StopIteration()
    except BaseException as raised:  # by the user's batches
        error = raised
    ready.put((Raised(_as_raised(error)), None))


def _end_thread(turns: SimpleQueue[bool], thread: threading.Thread) -> None:
    """At exit too: a thread that comes back from torch to an interpreter that is gone takes the process down."""
    turns.put(False)
    if thread is not threading.current_thread():
        thread.join()


@dataclass(frozen=True)
class Sent:
    """A job under way: the slot that is being filled, by whom, and the position after it."""

    slot: int
    member: Member
    after: Position


class Workers:
    """Processes that share the slots and take turns; kept until the loader is gone."""

    def __init__(self, make: Maker, ring: Ring, count: int, start_method: str | None) -> None:
        self.ring, self.pending = ring, deque[Sent]()
        self.crew: list[Member] = []
        self.jobs: Jobs = iter(())
        self.job: tuple[Job, Position] | None = None  # the next one, not sent yet
        self.failed: Raised | None = None  # instead of further jobs
        self.close = weakref.finalize(self, _end_crew, os.getpid(), self.crew)
        util.Finalize(self, self.close, exitpriority=10)  # before multiprocessing itself ends what runs at exit
        HOLDERS.add(self)
        context: Any = mp.get_context(start_method)
        method = context.get_start_method()
        if method == "forkserver":
            context.set_forkserver_preload(["__main__", __name__, type(make.dataset).__module__])
        gc.freeze()  # else the first collection in a forked worker writes to every object's page
        try:
            # A forkserver would hand the mask on to processes that are not ours.
            with starting_a_worker(), nullcontext() if method == "forkserver" else _signals_wait():
                for k in range(count):
                    self._start(context, f"loader-{k}", make)
        except AssertionError as error:  # "daemonic processes are not allowed to have children"
            raise RuntimeError(f"a loader cannot start workers here ({error}): use num_workers=0") from None
        except ChildProcessError:  # it asks after the server that its parent has started
            raise RuntimeError("a forked child cannot use its parent's forkserver: use start_method='spawn'") from None
        finally:
            gc.unfreeze()
        self.turn = 0  # whose it is

    def _start(self, context: Any, name: str, make: Maker) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, make, self.ring.arena), name=name, daemon=True)
        self.crew.append((process, ours))
        process.start()
        theirs.close()

    def forget(self) -> None:
        """In a forked child the workers are the parent's: pipes are closed here, and at exit nobody is ended."""
        self.close.detach()
        for process, pipe in self.crew:
            pipe.close()
            mp.process._children.discard(process)  # type: ignore[attr-defined]
        self.crew.clear()

    def seek(self, jobs: Jobs) -> None:
        while self.pending:  # made ahead for another position
            sent = self.pending.popleft()
            _answer(*sent.member)
            self.ring.free.append(sent.slot)
        self.jobs, self.job, self.failed = jobs, None, None
        self._send()

    def _send(self) -> None:
        while self.ring.free and len(self.pending) < N_SLOTS - 1 and self._find_job():
            assert self.job
            (job, after), member = self.job, self.crew[self.turn]
            if job[2].nbytes > PIPE_BYTES and any(sent.member is member for sent in self.pending):
                return  # the pipe cannot hold it: both would write, and neither read
            slot = self.ring.take()
            with suppress(OSError):  # a worker that is gone is noticed where its answer is awaited
                member[1].send((slot, job))
            self.pending.append(Sent(slot, member, after))
            self.job, self.turn = None, (self.turn + 1) % len(self.crew)

    def _find_job(self) -> bool:
        """Whether there is one; what ended them is told after the batches before it."""
        try:
            if self.job is None and self.failed is None:
                self.job = next(self.jobs)
        except Exception as error:  # of the user's batches
            self.failed = Raised(_as_raised(error))
        return self.job is not None

    def next(self) -> Delivered:
        self._send()
        if self.failed and not self.pending:
            return self.failed, None
        sent = self.pending.popleft()
        return self.ring.deliver(sent.slot, _answer(*sent.member)), sent.after


def _answer(process: Any, pipe: Connection) -> Message:
    try:
        while not (ready := wait([pipe, process.sentinel], LOOK_S)):
            if process.exitcode is not None:  # what another process inherited keeps the sentinel silent
                raise EOFError
        if pipe not in ready:
            raise EOFError
        data = pipe.recv_bytes()
    except (EOFError, OSError):
        process.join(LOOK_S)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended by itself (status {code})"
        raise RuntimeError(
            f"{process.name} (process {process.pid}) {how}: out of memory, or a crash in the transform. "
            "Use a smaller batch size or fewer workers (0 needs none)"
        ) from None
    return unpacked(data, process.name)


def _end_crew(owner: int, crew: list[Member]) -> None:
    """Ask, then insist: nothing of the workers outlives the loader."""
    if os.getpid() != owner:
        return
    for _, pipe in crew:
        with suppress(OSError):
            pipe.send(None)
    for process, pipe in crew:
        if process.pid:  # else Ctrl-C came before it was started
            process.join(LOOK_S / len(crew))
            process.kill()
            process.join()
        pipe.close()
    crew.clear()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """What is started meanwhile is not ended by a signal before it can ignore it; it begins with the mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, make: Maker, arena: Arena) -> None:
    """A worker's life: ends when told, or when the process that started it is gone."""
    for number in PARENTS_SIGNALS:  # sent to the whole group by a terminal or a scheduler; a worker follows its parent
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    torch.set_num_threads(1)
    parent_of = getattr(os, "getppid", int)  # without it the end of the pipe is what tells
    parent, slots = parent_of(), slots_of(arena)
    with suppress(EOFError, OSError):
        while True:
            while not pipe.poll(LOOK_S):
                if parent_of() != parent:
                    return
            if (work := pipe.recv()) is None:
                return
            pipe.send_bytes(packed(make(slots[work[0]], work[1]), mp.current_process().name))


# ---------------------------------------------------------------- what users hold


def _endless(batches: Batches, epoch: int, step: int) -> Jobs:
    """Jobs from there on, epoch after epoch, and what comes after each."""
    while len(found := batches(epoch)):
        for k in range(step, len(found)):
            yield (epoch, k, found[k]), (epoch, k + 1) if k + 1 < len(found) else (epoch + 1, 0)
        epoch, step = epoch + 1, 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 0)


def _check(is_right: bool, name: str, given: Any, choices: str) -> None:
    if not is_right:
        raise ValueError(f"{name} {' '.join(repr(given).split())[:80]}: {choices}")


def _as_raised(error: BaseException) -> BaseException:
    """What ended the jobs; StopIteration where they only ran out."""
    if isinstance(error, StopIteration):
        return RuntimeError("batches(epoch) gave more batches when it was asked first than it does now")
    return error


class Alone:
    """One thread at a time uses a loader; and nobody from inside what it is doing, a transform or a signal handler.

    No generator as a context manager: between two batches each line of Python is cold, and that one took 30 us.
    """

    def __init__(self) -> None:
        self._lock = ProcessLock()
        self._taken: Any = None  # the very lock to let go, should the loader's code fork; its holder alone looks at it

    def forget(self) -> None:
        self._taken = None

    def __enter__(self) -> None:
        lock = self._lock.held()
        lock.acquire()
        if self._taken is not None:
            lock.release()
            raise RuntimeError("a loader cannot be used inside its own transform or dataset: make two loaders")
        self._taken = lock

    def __exit__(self, *_: object) -> None:
        lock, self._taken = self._taken, None
        if lock is not None:  # else this is a child, forked by a transform
            lock.release()


class Loader:
    """Batches of a dataset, epoch after epoch. What is read ahead runs on into the next epoch.

    Iterating again goes on to the next epoch, or repeats one that was left early; `set_epoch` names one. Without
    workers one thread gathers; the caller does with prefetch=False, or for a transform (batch -> batch), whose random
    draws would otherwise meet the caller's. A transform's draws come from (seed, epoch, step). Threads may share an
    iteration; a forked child, a pickle and a copy go on from the same place with buffers of their own. Raises NoRoom
    where memory is too small for the buffers: no batch may be larger than the largest of the epoch that begins.
    """

    def __init__(
        self,
        dataset: Rows,
        batches: Batches,
        num_workers: int = 0,
        start_method: str | None = None,
        *,
        prefetch: bool = True,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        has_both = all(callable(getattr(dataset, name, None)) for name in ("batch", "fill"))
        methods = mp.get_all_start_methods()
        is_method = start_method is None or (isinstance(start_method, str) and start_method in methods)
        _check(has_both, "dataset", dataset, "an object with batch(indices) and fill(buffer, indices)")
        _check(callable(batches), "batches", batches, "a function, epoch -> arrays of row numbers")
        _check(_is_count(num_workers), "num_workers", num_workers, "a whole number, 0 or more")
        _check(is_method, "start_method", start_method, f"None, {', '.join(methods)}")
        _check(isinstance(prefetch, bool), "prefetch", prefetch, "True or False")
        _check(transform is None or callable(transform), "transform", transform, "a function, batch -> batch, or None")
        _check(_is_count(seed), "seed", seed, "a whole number, 0 or more")
        self.dataset, self.batches = dataset, batches
        self.num_workers, self.start_method = int(num_workers), start_method
        self.make, self.in_thread = Maker(dataset, transform, seed), prefetch and not transform
        self._epoch, self._start = 0, 0  # where the next iteration begins
        self._begin()

    def _begin(self) -> None:
        self.source: Here | Ahead | Workers | None = None
        self._at: Position | None = None  # of the next batch; None before the first and after an exception
        self._turn = 0
        self._alone = Alone()
        HOLDERS.add(self)

    def forget(self) -> None:
        """In a forked child: thread, workers and buffers are the parent's, the place is kept."""
        self.source, self._at = None, None
        self._alone.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in OF_ONE_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The order is a pure function of the epoch; `start` resumes at that step."""
        _check(_is_count(epoch), "epoch", epoch, "a whole number, 0 or more")
        _check(_is_count(start), "start", start, "a whole number, 0 or more")
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return len(self.batches(self._epoch)[self._start :])

    def __iter__(self) -> Iterator[Any]:
        with self._alone:
            self._turn += 1
            position, n_batches = (self._epoch, self._start), len(self)
            if n_batches and self._at != position:
                self._restart(*position)
            return Iteration(self, self._turn, position, n_batches)

    def _restart(self, epoch: int, step: int) -> None:
        source, self._at = self.source if self._at else self._open(epoch), None
        assert source
        source.seek(_endless(self.batches, epoch, step))
        self._at = epoch, step

    def _open(self, epoch: int) -> Here | Ahead | Workers:
        if self.source:
            self.source.close()
        n_rows = max(map(len, self.batches(epoch)))
        n_bytes, room = self.make.slot_bytes(n_rows)
        check_room(N_SLOTS * n_bytes, f"{N_SLOTS} batches of {n_rows} rows")
        ring = Ring(room, self.num_workers > 0)
        if self.num_workers:
            self.source = Workers(self.make, ring, self.num_workers, self.start_method)
        else:
            self.source = (Ahead if self.in_thread else Here)(self.make, ring)
        return self.source

    def _batch_at(self, position: Position) -> Any:
        if self._at != position:  # a forked child begins anew
            self._restart(*position)
        assert self.source
        self._at = None
        made, after = self.source.next()
        if isinstance(made, Raised):
            if isinstance(made.error, StopIteration):  # would end the caller's loop without a word
                raise RuntimeError("the transform or the dataset raised StopIteration") from made.error
            raise made.error
        self._at = after
        return made.value


class Iteration(Iterator[Any]):
    """The batches of one epoch from a step on; over after an exception."""

    def __init__(self, loader: Loader, turn: int, position: Position, n_batches: int) -> None:
        self._loader, self._turn, self._begun_at = loader, turn, position
        self._epoch, self._step = position
        self._end = self._step + n_batches
        self._is_over = False

    def __next__(self) -> Any:
        with self._loader._alone:
            if self._is_over or self._step == self._end:
                self._finish()
            try:
                batch = self._next()
            except BaseException:
                self._is_over = True
                raise
            self._step += 1
            return batch

    def _finish(self) -> NoReturn:
        loader = self._loader
        if not self._is_over and (loader._epoch, loader._start) == self._begun_at:
            loader.set_epoch(self._epoch + 1)
        self._is_over = True
        raise StopIteration

    def _next(self) -> Any:
        if self._loader._turn != self._turn:
            raise RuntimeError("this iteration ended when another one over the same loader began: make two loaders")
        return self._loader._batch_at((self._epoch, self._step))
