"""Batches at the speed of memory: the slots of a ring, filled by the caller, by one thread, or by worker processes."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import pickle
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from train.memory import check_room
from train.order import Batches
from train.ring import N_SLOTS, Arena, Layout, Ring, arrays_in, n_bytes_of, slots_of

if TYPE_CHECKING:
    from train.data import ShardDataset, Transform

BYTES_A_PIXEL = 64  # room for what a transform returns; a page of it exists once it is written
LOOK_S = 1.0  # how often a worker looks whether its parent is alive

Job = tuple[int, int, np.ndarray]  # epoch, step, positions in the split


# ---------------------------------------------------------------- one batch


@dataclass(frozen=True)
class Failure:
    """An exception on its way to the user."""

    error: Exception


@dataclass(frozen=True)
class Maker:
    """Makes one batch in a slot. Every worker has a copy."""

    dataset: ShardDataset
    transform: Transform | None
    seed: int

    def __call__(self, buffer: memoryview, job: Job) -> Any:
        """The layout (a list) of what is in `buffer` now; the batch itself if it does not fit there; or a Failure."""
        epoch, step, indices = job
        try:
            if self.transform is None:
                if self.dataset.is_stored:
                    return self.dataset.fill(buffer, indices)
                return _packed(self.dataset.batch(indices), buffer)
            with _seeded(self.seed, epoch, step):  # the same draws wherever the batch is made
                return _packed(self.transform(self.dataset.batch(indices)), buffer)
        except Exception as error:
            rows = ", ".join(map(str, indices.tolist()))
            error.add_note(f"in the loader, epoch {epoch}, step {step}, {self.dataset.split} rows {rows}")
            return Failure(error)

    def slot_bytes(self, n_rows: int) -> tuple[int, int]:
        """What a slot will hold, and room for it."""
        n_bytes = n_rows * sum(part.nbytes for part in self.dataset.batch(np.zeros(1, np.int64)) if part.is_cpu)
        return n_bytes, n_rows * self.dataset.size**2 * BYTES_A_PIXEL if self.transform else n_bytes


def _packed(made: Any, buffer: memoryview) -> Any:
    """The layout after a tuple of tensors was put into `buffer`; anything else, or too large, as it is."""
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


# ---------------------------------------------------------------- who fills it: submit, then result in the same order


class Here:
    """The caller at once, or one thread that runs ahead of it."""

    def __init__(self, make: Maker, ring: Ring, in_thread: bool) -> None:
        self.make, self.buffers, self.depth = make, ring.buffers, N_SLOTS - 1 if in_thread else 1
        self.jobs, self.results = SimpleQueue[Any](), SimpleQueue[Any]()
        if in_thread:
            n_threads = torch.get_num_threads()
            thread = threading.Thread(target=_serve, args=(self.jobs, self.results, make), name="loader", daemon=True)
            thread.start()
            self.close = weakref.finalize(self, _end_thread, self.jobs, thread)
            self.results.get()  # it has asked for one core; that holds for itself, and for every thread to come:
            torch.set_num_threads(n_threads)  # undone for those

    def submit(self, slot: int, job: Job) -> None:
        if self.depth > 1:
            self.jobs.put((self.buffers[slot], job))
        else:
            self.results.put(self.make(self.buffers[slot], job))

    def result(self) -> Any:
        return self.results.get()


def _end_thread(jobs: SimpleQueue[Any], thread: threading.Thread) -> None:
    """At exit too: a thread that comes back from torch to an interpreter that is gone takes the process down."""
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()


def _serve(jobs: SimpleQueue[Any], results: SimpleQueue[Any], make: Maker) -> None:
    torch.set_num_threads(1)
    results.put(None)
    while (work := jobs.get()) is not None:
        results.put(make(*work))


class Workers:
    """Processes that share the slots and take turns; kept until the loader is gone."""

    depth = N_SLOTS - 1

    def __init__(self, make: Maker, ring: Ring, count: int, start_method: str | None) -> None:
        self.crew: list[tuple[Any, Connection]] = []
        self.close = weakref.finalize(self, _end_crew, os.getpid(), self.crew)
        self.n_sent = self.n_received = 0
        context: Any = mp.get_context(start_method)
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["__main__", "train.data"])
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

    def submit(self, slot: int, job: Job) -> None:
        with suppress(OSError):  # a worker that is gone is noticed where its answer is awaited
            self.crew[self.n_sent % len(self.crew)][1].send((slot, job))
        self.n_sent += 1

    def result(self) -> Any:
        process, pipe = self.crew[self.n_received % len(self.crew)]
        try:
            if not pipe.poll() and pipe not in wait([pipe, process.sentinel]):
                raise EOFError
            made = pipe.recv()
        except (EOFError, OSError):
            process.join(LOOK_S)
            code = process.exitcode
            how = f"was killed by signal {-code}" if code and code < 0 else f"ended by itself (status {code})"
            raise RuntimeError(
                f"{process.name} (process {process.pid}) {how}: out of memory, or a crash in the transform. "
                "Use a smaller batch size or fewer workers (--num-workers 0 needs none)"
            ) from None
        self.n_received += 1
        return pickle.loads(made) if isinstance(made, bytes) else made


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
            made = make(slots[work[0]], work[1])
            pipe.send(made if isinstance(made, list) else _pickled(made))


def _pickled(made: Any) -> bytes:
    try:
        if isinstance(made, Failure):
            made.error.add_note(f"in {mp.current_process().name}\n{''.join(traceback.format_exception(made.error))}")
            pickle.loads(pickle.dumps(made))
        return pickle.dumps(made)
    except Exception as error:  # it cannot travel
        text = "".join(traceback.format_exception(made.error if isinstance(made, Failure) else error))
        return pickle.dumps(Failure(RuntimeError(text)))


# ---------------------------------------------------------------- what users hold


class Loader:
    """Batches of a ShardDataset, epoch after epoch. What is read ahead runs on into the next epoch.

    Iterating again goes on to the next epoch, or repeats one that was left early; `set_epoch` names one. Without
    workers one thread gathers; the caller does with prefetch=False, or for a transform, whose random draws would
    otherwise meet the caller's.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        batches: Batches,
        num_workers: int = 0,
        start_method: str | None = None,
        *,
        prefetch: bool = True,
        transform: Transform | None = None,
    ) -> None:
        self.dataset, self.batches, self.num_workers, self.start_method = dataset, batches, num_workers, start_method
        self.make, self.in_thread = Maker(dataset, transform, batches.seed or 0), prefetch and not transform
        self.source: Any = None
        self._turn, self._pending = 0, deque[int]()  # slots submitted
        self._at: tuple[int, int] | None = None  # of the next batch; None before the first and after an exception

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The order is a pure function of (seed, epoch); `start` resumes at that step."""
        self.batches.epoch, self.batches.start = epoch, start

    def __len__(self) -> int:
        return max(0, self.batches.n_steps() - self.batches.start)

    def __iter__(self) -> Iterator[Any]:
        self._turn += 1
        position = self.batches.epoch, self.batches.start
        if len(self) and self._at != position:
            self._restart(*position)
        return self._run(self._turn, position, len(self))

    def _run(self, turn: int, position: tuple[int, int], n_batches: int) -> Iterator[Any]:
        for _ in range(n_batches):
            if self._turn != turn:
                raise RuntimeError("this iteration ended when another one over the same loader began: make two loaders")
            yield self._next()
        if position == (self.batches.epoch, self.batches.start):
            self.set_epoch(self.batches.epoch + 1)

    def _restart(self, epoch: int, step: int) -> None:
        source = self.source if self._at else self._open()
        self._at = None
        while self._pending:  # made ahead for another position
            source.result()
            self.ring.free.append(self._pending.popleft())
        self._jobs, self._at = self.batches.endless(epoch, step), (epoch, step)
        self._submit(source)

    def _open(self) -> Any:
        if isinstance(self.source, Workers):
            self.source.close()
        n_rows = min(self.batches.batch_size, len(self.dataset))
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
            self._pending.append(self.ring.take())
            source.submit(self._pending[-1], next(self._jobs))

    def _next(self) -> Any:
        assert self._at is not None
        (epoch, step), self._at = self._at, None
        self._submit(self.source)
        batch, slot = self.source.result(), self._pending.popleft()
        if isinstance(batch, Failure):
            raise batch.error
        if isinstance(batch, list):
            batch = self.ring.lend(slot, batch)
        else:
            self.ring.free.append(slot)
        self._at = (epoch, step + 1) if step + 1 < self.batches.n_steps() else (epoch + 1, 0)
        return batch
