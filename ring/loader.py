"""Batches at the speed of memory: the slots of a ring, filled by the caller, by one thread, or by worker processes."""

import gc
import multiprocessing as mp
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ring.memory import check_room
from ring.slots import N_SLOTS, Arena, Layout, Ring, arrays_in, n_bytes_of, private_memory, slots_of

BYTES_A_VALUE = 16  # room for what a transform makes of each number; a page of it exists once it is written
HIDDEN_MS = 10  # a batch made by one thread in less than this is ready before any training step ends
LOOK_S = 1.0  # how often a worker looks whether its parent is alive

Batches = Callable[[int], Sequence[np.ndarray]]  # epoch -> the row numbers of each of its batches
Transform = Callable[[tuple[Tensor, ...]], Any]
Job = tuple[int, int, np.ndarray]  # epoch, step, row numbers
Position = tuple[int, int]  # epoch, step
Jobs = Iterator[tuple[Job, Position]]  # and the position after each
Member = tuple[Any, Connection]  # of a crew: a process, and the pipe to it


class Rows(Protocol):
    """A dataset; workers that are not forked get it pickled."""

    def batch(self, indices: np.ndarray) -> tuple[Tensor, ...]:
        """These rows in new memory."""

    def fill(self, buffer: memoryview, indices: np.ndarray) -> Layout | tuple[Tensor, ...]:
        """The same in `buffer`, and how they lie there (`slots.arrays_in`); or `batch`, where there is no other way."""


# ---------------------------------------------------------------- one batch


@dataclass(frozen=True)
class Maker:
    """Makes one batch in a slot. Every worker has a copy."""

    dataset: Rows
    transform: Transform | None
    seed: int

    def __call__(self, buffer: memoryview, job: Job) -> Any:
        """The layout (a list) of what is in `buffer` now; the batch itself if it does not fit; or the exception."""
        epoch, step, indices = job
        try:
            if self.transform is None:
                return _packed(self.dataset.fill(buffer, indices), buffer)
            with _seeded(self.seed, epoch, step):  # the same draws wherever the batch is made
                return _packed(self.transform(self.dataset.batch(indices)), buffer)
        except Exception as error:
            rows = ", ".join(map(str, indices.tolist()))
            error.add_note(f"in the loader, epoch {epoch}, step {step}, rows {rows} of {self.dataset!r}")
            return error

    def slot_bytes(self, n_rows: int) -> tuple[int, int]:
        """What a slot will hold, and room for it."""
        row = [part for part in self.dataset.batch(np.zeros(1, np.int64)) if part.is_cpu]
        n_bytes, n_values = (n_rows * sum(sizes) for sizes in ([p.nbytes for p in row], [p.numel() for p in row]))
        return n_bytes, n_values * BYTES_A_VALUE if self.transform else n_bytes

    def seconds(self, n_rows: int) -> float:
        """What the first `n_rows` take to make: the least of five, as the first touches what is cold."""
        buffer, seconds = private_memory(self.slot_bytes(n_rows)[0]), []
        for _ in range(5):
            started = time.perf_counter()
            self(buffer, (0, 0, np.arange(n_rows)))
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


def _packed(made: Any, buffer: memoryview) -> Any:
    """The layout after a tuple of tensors was put into `buffer`; what is no such tuple, or too large, as it is."""
    if type(made) is tuple and all(type(part) is Tensor and part.is_cpu for part in made):
        arrays = [part.detach().numpy() for part in made]
        layout: Layout = [(a.dtype, a.shape) for a in arrays]
        if n_bytes_of(layout) <= len(buffer):
            for to, array in zip(arrays_in(buffer, layout), arrays, strict=True):
                to[...] = array
            return layout
    return made


@contextmanager
def _seeded(*parts: int) -> Iterator[None]:
    """Torch and numpy draw from these numbers, and afterwards go on from where they were."""
    seed, before = int(np.random.SeedSequence(parts).generate_state(1)[0]), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (what a user's transform may draw from)
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


# ---------------------------------------------------------------- who makes it: `seek` a place, then one `next` a batch


class Here:
    """The caller, when it asks."""

    def __init__(self, make: Maker, ring: Ring) -> None:
        self.make, self.ring = make, ring

    def seek(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def next(self) -> tuple[Any, Position]:
        (job, after), slot = next(self.jobs), self.ring.take()
        return self.ring.deliver(slot, self.make(self.ring.buffers[slot], job)), after


class Ahead:
    """A thread that does all there is to do for a batch: the user takes it out of a queue.

    A batch is lent out when the user comes for the one before it: what was had before that is back by then, or is kept
    for good. Python's lock is asked for once a batch, after the copy.
    """

    def __init__(self, make: Maker, ring: Ring) -> None:
        self.make, self.ring = make, ring
        self.close: Callable[[], Any] = int  # nothing to end yet

    def seek(self, jobs: Jobs) -> None:
        self.close()
        self.turns, self.ready, n_threads = SimpleQueue[bool](), SimpleQueue[Any](), torch.get_num_threads()
        work = self.make, self.ring, jobs, self.turns, self.ready
        thread = threading.Thread(target=_run_ahead, args=work, name="loader", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _end_thread, self.turns, thread)
        self.ready.get()  # it has asked for one core, which holds for itself and for every thread to come:
        torch.set_num_threads(n_threads)  # undone for those

    def next(self) -> tuple[Any, Position]:
        self.turns.put(True)
        return self.ready.get()  # type: ignore[no-any-return]


def _run_ahead(make: Maker, ring: Ring, jobs: Jobs, turns: SimpleQueue[bool], ready: SimpleQueue[Any]) -> None:
    torch.set_num_threads(1)
    ready.put(None)
    turns.put(True)  # the first batch is lent out at once
    try:
        for job, after in jobs:
            slot = ring.take()
            made = make(ring.buffers[slot], job)
            if not turns.get():
                ring.free.append(slot)
                return
            ready.put((ring.deliver(slot, made), after))
    except Exception as error:  # of the user's batches
        ready.put((error, None))


def _end_thread(turns: SimpleQueue[bool], thread: threading.Thread) -> None:
    """At exit too: a thread that comes back from torch to an interpreter that is gone takes the process down."""
    turns.put(False)
    if thread is not threading.current_thread():
        thread.join()


class Workers:
    """Processes that share the slots and take turns; kept until the loader is gone."""

    def __init__(self, make: Maker, ring: Ring, count: int, start_method: str | None) -> None:
        self.ring, self.pending = ring, deque[tuple[int, Member, Position]]()  # slots being filled
        self.crew: list[Member] = []
        self.close = weakref.finalize(self, _end_crew, os.getpid(), self.crew)
        context: Any = mp.get_context(start_method)
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["__main__", __name__, type(make.dataset).__module__])
        gc.freeze()  # else the first collection in a forked worker writes to every object's page
        try:
            for k in range(count):
                ours, theirs = context.Pipe()
                work = (theirs, make, ring.arena)
                self.crew.append((context.Process(target=_work, args=work, name=f"loader-{k}", daemon=True), ours))
                self.crew[-1][0].start()
                theirs.close()
        finally:
            gc.unfreeze()
        self.turns = cycle(self.crew)

    def seek(self, jobs: Jobs) -> None:
        while self.pending:  # made ahead for another position
            slot, member, _ = self.pending.popleft()
            _answer(*member)
            self.ring.free.append(slot)
        self.jobs = jobs
        self._send()

    def _send(self) -> None:
        while self.ring.free and len(self.pending) < N_SLOTS - 1:
            (job, after), member, slot = next(self.jobs), next(self.turns), self.ring.take()
            with suppress(OSError):  # a worker that is gone is noticed where its answer is awaited
                member[1].send((slot, job))
            self.pending.append((slot, member, after))

    def next(self) -> tuple[Any, Position]:
        self._send()
        slot, member, after = self.pending.popleft()
        return self.ring.deliver(slot, _answer(*member)), after


def _answer(process: Any, pipe: Connection) -> Any:
    try:
        if pipe not in wait([pipe, process.sentinel]):
            raise EOFError
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        process.join(LOOK_S)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended by itself (status {code})"
        raise RuntimeError(
            f"{process.name} (process {process.pid}) {how}: out of memory, or a crash in the transform. "
            "Use a smaller batch size or fewer workers (0 needs none)"
        ) from None


def _end_crew(owner: int, crew: list[tuple[Any, Connection]]) -> None:
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


def _work(pipe: Connection, make: Maker, arena: Arena) -> None:
    """A worker's life: ends when told, or when the process that started it is gone."""
    told = _leave_signals_to_parent()
    torch.set_num_threads(1)
    parent, slots = os.getppid(), slots_of(arena)
    with suppress(EOFError, OSError):
        while True:
            while not pipe.poll(LOOK_S):
                if told or os.getppid() != parent:
                    return
            if (work := pipe.recv()) is None:
                return
            pipe.send_bytes(_pickled(make(slots[work[0]], work[1])))


def _leave_signals_to_parent() -> list[int]:
    """Ctrl-C and what schedulers send to a whole group are the parent's to handle: it may want batches until it ends.

    The list gets SIGTERM: a worker that was sent one ends when it has nothing to do.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    told: list[int] = []
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    return told


def _pickled(made: Any) -> bytes:
    """An exception takes its traceback along; one that cannot travel, or a batch that cannot, arrives as text."""
    try:
        if isinstance(made, Exception):
            made.add_note(f"in {mp.current_process().name}\n{''.join(traceback.format_exception(made))}")
            pickle.loads(pickle.dumps(made))
        return pickle.dumps(made)
    except Exception as error:
        text = "".join(traceback.format_exception(made if isinstance(made, Exception) else error))
        return pickle.dumps(RuntimeError(text))


# ---------------------------------------------------------------- what users hold


def _endless(batches: Batches, epoch: int, step: int) -> Jobs:
    """Jobs from there on, epoch after epoch, and what comes after each."""
    while len(found := batches(epoch)):
        for k in range(step, len(found)):
            yield (epoch, k, found[k]), (epoch, k + 1) if k + 1 < len(found) else (epoch + 1, 0)
        epoch, step = epoch + 1, 0


class Loader:
    """Batches of a dataset, epoch after epoch. What is read ahead runs on into the next epoch.

    Iterating again goes on to the next epoch, or repeats one that was left early; `set_epoch` names one. Without
    workers one thread gathers; the caller does with prefetch=False, or for a transform (batch -> batch), whose random
    draws would otherwise meet the caller's. A transform's draws come from (seed, epoch, step). Raises NoRoom where
    memory is too small for the buffers: no batch may be larger than the largest of the epoch that begins.
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
        self.dataset, self.batches, self.num_workers, self.start_method = dataset, batches, num_workers, start_method
        self.make, self.in_thread = Maker(dataset, transform, seed), prefetch and not transform
        self.source: Here | Ahead | Workers | None = None
        self._epoch, self._start = 0, 0  # where the next iteration begins
        self._turn = 0
        self._at: Position | None = None  # of the next batch; None before the first and after an exception

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The order is a pure function of the epoch; `start` resumes at that step."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return len(self.batches(self._epoch)[self._start :])

    def __iter__(self) -> Iterator[Any]:
        self._turn += 1
        position, n_batches = (self._epoch, self._start), len(self)
        if n_batches and self._at != position:
            self._restart(*position)
        return self._run(self._turn, position, n_batches)

    def _run(self, turn: int, position: Position, n_batches: int) -> Iterator[Any]:
        for _ in range(n_batches):
            if self._turn != turn:
                raise RuntimeError("this iteration ended when another one over the same loader began: make two loaders")
            yield self._next()
        if position == (self._epoch, self._start):
            self.set_epoch(self._epoch + 1)

    def _restart(self, epoch: int, step: int) -> None:
        source, self._at = self.source if self._at else self._open(epoch), None
        assert source
        source.seek(_endless(self.batches, epoch, step))
        self._at = epoch, step

    def _open(self, epoch: int) -> Here | Ahead | Workers:
        if self.source and not isinstance(self.source, Here):
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

    def _next(self) -> Any:
        assert self.source
        self._at = None
        batch, after = self.source.next()
        if isinstance(batch, Exception):
            raise batch
        self._at = after
        return batch
