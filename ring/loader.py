"""Batches at the speed of memory: the slots of a ring, filled by the caller, by one thread, or by worker processes."""

import gc
import multiprocessing as mp
import os
import pickle
import signal
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ring.memory import check_room
from ring.slots import N_SLOTS, Arena, Layout, Ring, arrays_in, n_bytes_of, private_memory, slots_of

BYTES_A_VALUE = 16  # room for what a transform makes of each number; a page of it exists once it is written
LOOK_S = 1.0  # how often a worker looks whether its parent is alive

Batches = Callable[[int], Sequence[np.ndarray]]  # epoch -> the row numbers of each of its batches
Transform = Callable[[tuple[Tensor, ...]], Any]
Job = tuple[int, int, np.ndarray]  # epoch, step, row numbers
Position = tuple[int, int]  # epoch, step
Answer = Callable[[], Any]  # waits for a batch: its layout in the slot, or itself, or the exception


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
        """What the first `n_rows` take to make, the second time."""
        buffer = private_memory(self.slot_bytes(n_rows)[0])
        for _ in range(2):
            started = time.perf_counter()
            self(buffer, (0, 0, np.arange(n_rows)))
        return time.perf_counter() - started


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


# ---------------------------------------------------------------- who makes it


class Here:
    """The caller when it asks, or one thread that runs ahead of it."""

    def __init__(self, make: Maker, ring: Ring, in_thread: bool) -> None:
        self.make, self.buffers, self.depth = make, ring.buffers, N_SLOTS - 1 if in_thread else 1
        self.pool = ThreadPoolExecutor(1, "loader") if in_thread else None
        if self.pool:
            n_threads = torch.get_num_threads()
            self.pool.submit(torch.set_num_threads, 1).result()  # holds for that thread, and for every one to come:
            torch.set_num_threads(n_threads)  # undone for those

    def submit(self, slot: int, job: Job) -> Answer:
        if self.pool:
            return self.pool.submit(self.make, self.buffers[slot], job).result
        return partial(self.make, self.buffers[slot], job)


class Workers:
    """Processes that share the slots and take turns; kept until the loader is gone."""

    depth = N_SLOTS - 1

    def __init__(self, make: Maker, ring: Ring, count: int, start_method: str | None) -> None:
        self.crew: list[tuple[Any, Connection]] = []
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

    def submit(self, slot: int, job: Job) -> Answer:
        process, pipe = next(self.turns)
        with suppress(OSError):  # a worker that is gone is noticed where its answer is awaited
            pipe.send((slot, job))
        return partial(_answer, process, pipe)


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    parent, slots = os.getppid(), slots_of(arena)
    with suppress(EOFError, OSError):
        while True:
            while not pipe.poll(LOOK_S):
                if os.getppid() != parent:
                    return
            if (work := pipe.recv()) is None:
                return
            pipe.send_bytes(_pickled(make(slots[work[0]], work[1])))


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


def _endless(batches: Batches, epoch: int, step: int) -> Iterator[tuple[Job, Position]]:
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
        self.source: Here | Workers | None = None
        self._epoch, self._start = 0, 0  # where the next iteration begins
        self._turn, self._pending = 0, deque[tuple[int, Answer, Position]]()  # slots being filled
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
        while self._pending:  # made ahead for another position
            slot, answer, _ = self._pending.popleft()
            answer()
            self.ring.free.append(slot)
        self._jobs, self._at = _endless(self.batches, epoch, step), (epoch, step)
        self._submit(source)

    def _open(self, epoch: int) -> Here | Workers:
        if isinstance(self.source, Workers):
            self.source.close()
        n_rows = max(map(len, self.batches(epoch)))
        n_bytes, room = self.make.slot_bytes(n_rows)
        check_room(N_SLOTS * n_bytes, f"{N_SLOTS} batches of {n_rows} rows")
        self.ring = Ring(room, self.num_workers > 0)
        self._pending.clear()
        if self.num_workers:
            self.source = Workers(self.make, self.ring, self.num_workers, self.start_method)
        else:
            self.source = Here(self.make, self.ring, self.in_thread)
        return self.source

    def _submit(self, source: Any) -> None:
        while self.ring.free and len(self._pending) < source.depth:
            slot, (job, after) = self.ring.take(), next(self._jobs)
            self._pending.append((slot, source.submit(slot, job), after))

    def _next(self) -> Any:
        assert self._at is not None
        self._at = None
        self._submit(self.source)
        slot, answer, after = self._pending.popleft()
        batch = answer()
        if isinstance(batch, Exception):
            raise batch
        if isinstance(batch, list):
            batch = self.ring.lend(slot, batch)
        else:
            self.ring.free.append(slot)
        self._at = after
        return batch
