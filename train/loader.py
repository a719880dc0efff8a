"""Batches at the speed of memory: a ring of reused buffers, filled by one thread or by worker processes.

A fresh 4 KB page costs about 3 us, so a batch of 32 MB in new memory costs more than gathering it. Rows are therefore
gathered into 4 buffers that are used again. Workers share them and hand over slot numbers, never pictures. A buffer
is refilled only after the last tensor on it is gone; if too many are kept, a batch is delivered as a copy.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing as mp
import os
import pickle
import select
import signal
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from train import order

if TYPE_CHECKING:
    from train.data import ShardDataset, Transform

N_SLOTS = 4  # batches held in all: one at the user, one arriving, two ahead
HUGE_PAGE = 2 << 20
COPY_BELOW = 4096  # bytes: a kept list of labels must not keep the pictures' buffer
BYTES_A_PIXEL = 64  # room for whatever a transform returns; a page of it exists once it is written
LOOK_S = 1.0  # how often a waiting process looks whether the others are alive

Job = tuple[int, int, np.ndarray]  # epoch, step, positions in the split
Part = tuple[np.dtype[Any], tuple[int, ...]]


class Batches:
    """The positions of every batch, shuffled by (seed, epoch), or in order (seed None: evaluation)."""

    def __init__(self, n_rows: int, batch_size: int, seed: int | None, rank: int = 0, world: int = 1) -> None:
        self.n_rows, self.batch_size, self.seed, self.rank, self.world = n_rows, batch_size, seed, rank, world
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return max(0, self._n_steps() - self.position()[1])

    def _n_steps(self) -> int:
        if self.seed is not None:
            return order.steps_per_epoch(self.n_rows, self.batch_size, self.world)
        return -(-len(range(self.rank, self.n_rows, self.world)) // self.batch_size)

    def position(self) -> tuple[int, int]:
        """(epoch, step) of the first batch; evaluation is the same every epoch."""
        return (0, 0) if self.seed is None else (self.epoch, self.start)

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        if step + 1 < self._n_steps():
            return epoch, step + 1
        return (0, 0) if self.seed is None else (epoch + 1, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._epoch(*self.position())

    def _epoch(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        place = {"rank": self.rank, "world": self.world}
        if self.seed is None:
            return order.eval_batches(self.n_rows, self.batch_size, **place)
        return order.train_batches(self.n_rows, self.batch_size, self.seed, epoch, start=start, **place)

    def endless(self, epoch: int, step: int) -> Iterator[Job]:
        """Every batch from there on, epoch after epoch."""
        while True:
            for indices in self._epoch(epoch, step):
                yield epoch, step, indices
                epoch, step = self.after(epoch, step)


class Fill:
    """Makes one batch: in a slot where it is stored bytes, else as tensors. A copy of it runs in every worker."""

    def __init__(self, dataset: ShardDataset, transform: Transform | None, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    @property
    def is_stored(self) -> bool:
        return self.transform is None and self.dataset.is_stored

    def n_bytes(self, batch_size: int, shared: bool) -> int:
        """Room for a slot; none is needed where the thread computes tensors."""
        if self.is_stored:
            return _end(self.dataset.layout(batch_size))
        return batch_size * self.dataset.size**2 * BYTES_A_PIXEL if shared else 0

    def here(self, buffer: memoryview, indices: np.ndarray) -> list[Part] | Any:
        """The layout of the batch now in `buffer`, or the batch itself."""
        if self.is_stored:
            layout = self.dataset.layout(len(indices))
            self.dataset.fill(indices, _arrays(np.frombuffer(buffer, np.uint8), layout))
            return layout
        batch = self.dataset.batch(indices)
        return self.transform(batch) if self.transform else batch

    def there(self, buffer: memoryview, job: Job) -> list[Part] | bytes:
        """The same in a worker: tensors go into `buffer` if they fit, anything else is pickled."""
        epoch, step, indices = job
        if self.transform:  # the same draws whichever worker gets the batch
            seed = int(np.random.SeedSequence([self.seed, epoch, step]).generate_state(1)[0])
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 (what a user's transform may draw from)
        made = self.here(buffer, indices)
        if self.is_stored:
            return made
        if type(made) is tuple and all(type(part) is Tensor for part in made):
            arrays = [part.detach().numpy() for part in made]
            layout: list[Part] = [(a.dtype, a.shape) for a in arrays]
            if _end(layout) <= len(buffer):
                for to, array in zip(_arrays(np.frombuffer(buffer, np.uint8), layout), arrays, strict=True):
                    to[...] = array
                return layout
        return pickle.dumps(made)


def _offsets(layout: list[Part]) -> list[int]:
    """Where each part begins (a multiple of 64 bytes), then where the last ends."""
    offsets = [0]
    for dtype, shape in layout:
        offsets.append(offsets[-1] + -(-int(np.prod(shape)) * dtype.itemsize // 64) * 64)
    return offsets


def _end(layout: list[Part]) -> int:
    return _offsets(layout)[-1]


def _arrays(buffer_n: np.ndarray, layout: list[Part]) -> list[np.ndarray]:
    parts = zip(layout, _offsets(layout), strict=False)
    return [np.ndarray(shape, dtype, buffer=buffer_n, offset=start) for (dtype, shape), start in parts]  # type: ignore[arg-type]


# ---------------------------------------------------------------- the ring


class Shared:
    """Memory without a name, mapped by every process that this object is handed to as it starts."""

    def __init__(self, n_bytes: int, fd: int | None = None) -> None:
        self.n_bytes = n_bytes
        if fd is None:
            fd = _nameless_file()
            os.ftruncate(fd, n_bytes)
        self.fd = fd
        self.map = mmap.mmap(fd, n_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self.map.madvise(mmap.MADV_HUGEPAGE)
        weakref.finalize(self, os.close, fd).atexit = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.n_bytes, reduction.DupFd(self.fd))  # type: ignore[attr-defined]


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("loader")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _attach(n_bytes: int, handle: Any) -> Shared:
    return Shared(n_bytes, handle.detach())


class Ring:
    """N_SLOTS buffers. A slot goes out under tensors and comes back by itself when the last of them is gone."""

    def __init__(self, n_bytes: int, shared: bool) -> None:
        self.n_bytes, self.lent = n_bytes, set[int]()
        self._free: list[int] = []  # the last one back goes out first: part of it is still in the CPU's cache
        self._tokens = SimpleQueue[bool]()  # one True for each of them, so that a thread can wait; False is the end
        grain = HUGE_PAGE if n_bytes >= HUGE_PAGE else mmap.PAGESIZE
        n_bytes = -(-max(n_bytes, 1) // grain) * grain
        self.shared = Shared(N_SLOTS * n_bytes) if shared else None
        self.is_pinned = torch.cuda.is_available() and self.n_bytes > 0
        self.events: dict[int, Any] = {}
        self.buffers = [self._buffer(k, n_bytes) for k in range(N_SLOTS)]
        self.unseen = set(range(N_SLOTS)) if shared else set()
        for slot in range(N_SLOTS):
            self.give(slot)

    def give(self, slot: int) -> None:
        self._free.append(slot)
        self._tokens.put(True)

    def take(self) -> int | None:
        """A free slot, waiting for one; None once `end_wait` was called."""
        return self._free.pop() if self._tokens.get() else None

    def take_all(self) -> list[int]:
        return [self._free.pop() for token in _drained(self._tokens) if token]

    def end_wait(self) -> None:
        self._tokens.put(False)

    def _buffer(self, slot: int, n_bytes: int) -> memoryview:
        if self.shared is None:
            if self.is_pinned:
                return memoryview(torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).numpy().data)
            return memoryview(np.empty(n_bytes, np.uint8).data)
        view = memoryview(self.shared.map)[slot * n_bytes : (slot + 1) * n_bytes]
        if self.is_pinned:
            cudart, address = torch.cuda.cudart(), np.frombuffer(view, np.uint8).ctypes.data
            if int(cudart.cudaHostRegister(address, n_bytes, 0)) == 0:
                weakref.finalize(self, cudart.cudaHostUnregister, address).atexit = False
        return view

    def settle(self, slot: int) -> None:
        """Wait until the copies to the GPU that were under way when the slot came back are done."""
        if event := self.events.pop(slot, None):
            event.synchronize()

    def lend(self, slot: int, layout: list[Part]) -> tuple[Tensor, ...]:
        """The batch in `slot` as tensors; as copies where one slot more would leave none to go on with."""
        # A view of a memoryview owns its lifetime: numpy stops there when it looks for the base of the parts below.
        lease = np.frombuffer(self.buffers[slot], np.uint8)
        if slot in self.unseen:  # map the pages here too, else they count as private to the worker that wrote them
            self.unseen.remove(slot)
            lease[: _end(layout) : mmap.PAGESIZE].max(initial=0)
        arrays = _arrays(lease, layout)
        if len(self.lent) >= N_SLOTS - 1:
            arrays = [array.copy() for array in arrays]
            self.give(slot)
        else:
            arrays = [array.copy() if array.nbytes <= COPY_BELOW else array for array in arrays]
            self.lent.add(slot)
            weakref.finalize(lease, self._back, slot).atexit = False
        return tuple(torch.from_numpy(array) for array in arrays)

    def _back(self, slot: int) -> None:
        """Runs wherever the last tensor is dropped, inside a garbage collection too: SimpleQueue allows that."""
        if self.is_pinned:
            self.events[slot] = torch.cuda.Event()
            self.events[slot].record()
        self.lent.discard(slot)
        self.give(slot)


# ---------------------------------------------------------------- who fills it


class Inline:
    """Fills the slot when the batch is asked for."""

    def __init__(self, fill: Fill, batch_size: int) -> None:
        self.fill, self.ring = fill, Ring(fill.n_bytes(batch_size, False), False)

    def start(self, jobs: Iterator[Job]) -> None:
        self.jobs = jobs

    def next(self) -> Any:
        slot = self.ring.take()
        assert slot is not None
        try:
            made = _fill_noted(self.fill, self.ring, slot, next(self.jobs))
        except BaseException:
            self.ring.give(slot)
            raise
        return _deliver(self.fill, self.ring, slot, made)


def _fill_noted(fill: Fill, ring: Ring, slot: int, job: Job) -> Any:
    try:
        ring.settle(slot)
        return fill.here(ring.buffers[slot], job[2])
    except Exception as error:
        error.add_note(f"in the loader, {_name(fill, job)}")
        raise


def _name(fill: Fill, job: Job) -> str:
    positions = ", ".join(map(str, job[2].tolist()))
    return f"epoch {job[0]}, step {job[1]}, {fill.dataset.split} rows {positions}"


def _deliver(fill: Fill, ring: Ring, slot: int, made: Any) -> Any:
    if fill.is_stored:
        return ring.lend(slot, made)
    ring.give(slot)
    return made


class Thread(Inline):
    """One thread runs ahead of the user by as many slots as are free."""

    def __init__(self, fill: Fill, batch_size: int) -> None:
        super().__init__(fill, batch_size)
        self.ready, self.runs = SimpleQueue[tuple[int, Any]](), list[Any]()
        weakref.finalize(self, _stop_thread, os.getpid(), self.ring, self.ready, self.runs)

    def start(self, jobs: Iterator[Job]) -> None:
        _stop_thread(os.getpid(), self.ring, self.ready, self.runs)
        halt = threading.Event()
        thread = threading.Thread(target=_ahead, args=(self.fill, self.ring, self.ready, jobs, halt), daemon=True)
        thread.start()
        self.runs[:] = [thread, halt]

    def next(self) -> Any:
        slot, made = self.ready.get()
        if isinstance(made, BaseException):
            self.ring.give(slot)
            raise made
        return _deliver(self.fill, self.ring, slot, made)


def _ahead(fill: Fill, ring: Ring, ready: SimpleQueue[Any], jobs: Iterator[Job], halt: threading.Event) -> None:
    while (slot := ring.take()) is not None and not halt.is_set():
        try:
            ready.put((slot, _fill_noted(fill, ring, slot, next(jobs))))
        except BaseException as error:
            return ready.put((slot, error))
    if slot is not None:
        ring.give(slot)


def _stop_thread(owner: int, ring: Ring, ready: SimpleQueue[Any], runs: list[Any]) -> None:
    """End the thread, and put what it had filled back on the ring."""
    if not runs or os.getpid() != owner:
        return
    thread, halt = runs
    runs.clear()
    halt.set()
    ring.end_wait()
    if thread is not threading.current_thread():
        thread.join()
    for slot in [*ring.take_all(), *(slot for slot, _ in _drained(ready))]:
        ring.give(slot)


def _drained(queue: SimpleQueue[Any]) -> list[Any]:
    found = []
    try:
        while True:
            found.append(queue.get_nowait())
    except Empty:
        return found


class Workers:
    """Processes that fill shared slots; started with the first batch, kept until the loader is gone."""

    def __init__(self, fill: Fill, batch_size: int, count: int, start_method: str | None) -> None:
        self.fill, self.batch_size, self.count, self.context = fill, batch_size, count, mp.get_context(start_method)
        self.crew: list[tuple[Any, Connection]] = []
        self.n_sent = 0
        weakref.finalize(self, _end_crew, os.getpid(), self.crew)

    def start(self, jobs: Iterator[Job]) -> None:
        if not self.crew:
            self._launch()
        with self._whole_or_ended():
            while any(self.load_of):
                self._receive()
        for slot, _ in self.done.values():
            self.ring.give(slot)
        self.done: dict[int, tuple[int, Any]] = {}
        self.jobs, self.wanted = jobs, self.n_sent
        self._send()

    def _launch(self) -> None:
        self.ring = Ring(self.fill.n_bytes(self.batch_size, True), True)
        self.done, self.load_of, self.poll = {}, [0] * self.count, select.poll()
        if self.context.get_start_method() == "forkserver":
            self.context.set_forkserver_preload(["__main__", "train.data"])
        gc.freeze()  # else the first collection in a forked worker writes to every object's page
        try:
            for k in range(self.count):
                self._launch_one(k)
        except BaseException:
            _end_crew(os.getpid(), self.crew)
            raise
        finally:
            gc.unfreeze()

    def _launch_one(self, k: int) -> None:
        ours, theirs = self.context.Pipe()
        with theirs:
            process = self.context.Process(  # type: ignore[attr-defined]
                target=_work, args=(k, theirs, self.fill, self.ring.shared), name=f"loader-{k}", daemon=True
            )
            process.start()
        self.crew.append((process, ours))
        self.poll.register(ours, select.POLLIN)

    def next(self) -> Any:
        with self._whole_or_ended():
            while self.wanted not in self.done:
                self._receive()
                self._send()
        slot, made = self.done.pop(self.wanted)
        self.wanted += 1
        if isinstance(made, list):
            batch = self.ring.lend(slot, made)
        else:
            self.ring.give(slot)
            batch = pickle.loads(made)
        self._send()
        if isinstance(batch, Exception):
            raise batch
        return batch

    @contextmanager
    def _whole_or_ended(self) -> Iterator[None]:
        """Ctrl-C may leave half a message in a pipe: the next iteration starts new workers."""
        try:
            yield
        except BaseException:
            _end_crew(os.getpid(), self.crew)
            raise

    def _send(self) -> None:
        """A job for every free slot, to the worker that has least to do."""
        for slot in self.ring.take_all():
            self.ring.settle(slot)
            k = self.load_of.index(min(self.load_of))
            try:
                self.crew[k][1].send((self.n_sent, slot, next(self.jobs)))
            except OSError:
                self._dead(k)
            self.n_sent += 1
            self.load_of[k] += 1

    def _receive(self) -> None:
        """Take what has arrived; raise RuntimeError where a worker is gone."""
        ready = {fd for fd, _ in self.poll.poll(LOOK_S * 1000)}
        for k, (process, pipe) in enumerate(self.crew):
            if pipe.fileno() in ready:
                try:
                    number, slot, made = pipe.recv()
                except (EOFError, OSError):
                    self._dead(k)
                self.load_of[k] -= 1
                self.done[number] = slot, made
            elif not ready and process.exitcode is not None:
                self._dead(k)

    def _dead(self, k: int) -> None:
        process = self.crew[k][0]
        process.join(LOOK_S)
        code, pid = process.exitcode, process.pid
        _end_crew(os.getpid(), self.crew)
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended by itself (status {code})"
        raise RuntimeError(
            f"loader worker {k} (process {pid}) {how}: out of memory, or a crash in the transform. "
            "Use a smaller batch size or fewer workers (--num-workers 0 needs none)"
        )


def _end_crew(owner: int, crew: list[tuple[Any, Connection]]) -> None:
    """Ask, then insist: nothing of the workers outlives the loader."""
    if os.getpid() != owner:
        return
    for _, pipe in crew:
        with suppress(OSError, ValueError):
            pipe.send(None)
    deadline = time.monotonic() + LOOK_S
    for process, pipe in crew:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
        pipe.close()
    crew.clear()


def _work(k: int, pipe: Connection, fill: Fill, shared: Shared) -> None:
    """A worker's life: ends when told, or when the process that started it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    parent, n_bytes = os.getppid(), shared.n_bytes // N_SLOTS
    view = memoryview(shared.map)
    try:
        while True:
            while not pipe.poll(LOOK_S):
                if os.getppid() != parent:
                    return
            if (message := pipe.recv()) is None:
                return
            number, slot, job = message
            buffer = view[slot * n_bytes : (slot + 1) * n_bytes]
            pipe.send((number, slot, _attempt(k, fill, buffer, job)))
    except (EOFError, OSError):
        return


def _attempt(k: int, fill: Fill, buffer: memoryview, job: Job) -> list[Part] | bytes:
    """The batch; or the exception, pickled, with the worker and its rows as a note."""
    try:
        return fill.there(buffer, job)
    except Exception as error:
        where = f"in loader worker {k}, {_name(fill, job)}\n{traceback.format_exc()}"
        try:
            error.add_note(where)
            data = pickle.dumps(error)
            pickle.loads(data)
            return data
        except Exception:  # one that cannot travel
            return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}\n{where}"))


# ---------------------------------------------------------------- what users hold


class Loader:
    """Batches of a ShardDataset, epoch after epoch. What is read ahead runs on into the next epoch.

    Iterating again goes on to the next epoch, or repeats one that was left early; `set_epoch` names one.
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
        self.dataset, self.batches, self.num_workers = dataset, batches, num_workers
        fill, size = Fill(dataset, transform, batches.seed or 0), min(batches.batch_size, len(dataset))
        self._source: Inline | Workers = (
            Workers(fill, size, num_workers, start_method)
            if num_workers
            else (Thread if prefetch else Inline)(fill, size)
        )
        self._at: tuple[int, int] | None = None
        self._turn = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The order is a pure function of (seed, epoch); `start` resumes at that step."""
        self.batches.epoch, self.batches.start = epoch, start

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        position, n_batches = self.batches.position(), len(self.batches)
        self._turn += 1
        if n_batches and self._at != position:
            self._at = None
            self._source.start(self.batches.endless(*position))
            self._at = position
        return self._run(self._turn, position, n_batches)

    def _run(self, turn: int, position: tuple[int, int], n_batches: int) -> Iterator[Any]:
        for _ in range(n_batches):
            if self._turn != turn:
                raise RuntimeError("this iteration ended when another one over the same loader began: make two loaders")
            yield self._next()
        if self.batches.position() == position:
            self.set_epoch(self.batches.epoch + 1)

    def _next(self) -> Any:
        """The next batch; after an exception the following iteration starts afresh."""
        at, self._at = self._at, None
        assert at is not None
        batch = self._source.next()
        self._at = self.batches.after(*at)
        return batch


class DeviceLoader:
    """The split's rows as tensors on the device (1 row at 224 is 250 KB); a batch is one index_select a part."""

    def __init__(
        self, dataset: ShardDataset, batches: Batches, device: Any = None, transform: Transform | None = None
    ) -> None:
        self.dataset, self.batches, self.num_workers, self.transform = dataset, batches, 0, transform
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chunks = [dataset.stored(np.arange(a, min(a + 128, len(dataset)))) for a in range(0, len(dataset), 128)]
        self.parts = [torch.cat([c.to(self.device) for c in chunk]) for chunk in zip(*chunks, strict=True)]

    set_epoch = Loader.set_epoch
    __len__ = Loader.__len__

    def __iter__(self) -> Iterator[Any]:
        position = self.batches.position()
        for indices in self.batches:
            rows = torch.from_numpy(indices).to(self.device)
            batch = tuple(part.index_select(0, rows) for part in self.parts)
            batch = self.dataset.normalized(batch) if self.dataset.normalize else batch
            yield self.transform(batch) if self.transform else batch
        if self.batches.position() == position:
            self.batches.epoch, self.batches.start = self.batches.epoch + 1, 0
