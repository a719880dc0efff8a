"""Four buffers that are used again and again: a fresh page of memory costs more than copying one.

A buffer's life, with the method of `BufferPool` that takes it on:

             take                the batch is written            deliver
    free ------------> filling ------------------------> ready ---------> lent
     ^                    |                                |                |
     |  put_back, deliver |        put_back, or deliver    |                |  the last tensor
     +--------------------+--------------------------------+----------------+  on it is gone
       (nothing lies in it)  (delivered as a copy, or not wanted)

Lent buffers have tensors of the user on them. They come back by themselves: all tensors of a batch
are views of one numpy array, its `lease`, and a finalizer of that array puts the buffer back. Where
too many batches are kept, a further one is delivered as a copy and its buffer is free at once. The
memory is shared with workers, which are told a buffer's number; rows are never sent.

Invariant: each buffer is in one place: in `free`, with whoever fills it, or in `lent`; nobody
writes to one that is lent.

Never do this:
- keep a reference to a delivered batch (a local variable of a thread's loop is enough): its buffer
  does not come back while the next batch is being made;
- build tensors on `buffers[k]` itself instead of on the lease: nobody would know when they are
  gone;
- put a buffer back while a worker may still write to it: take the worker's answer first;
- take a lock, or do anything long, where the lease is finalized: that runs wherever the last tensor
  is dropped, inside a garbage collection too.
"""

import ctypes
import math
import mmap
import os
import weakref
from multiprocessing.heap import Arena
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loader.forks import HOLDERS, SHARED
from loader.messages import Layout, Message, Raised, Returned, Written

N_BUFFERS = 4  # batches held in all: one at the user, one being delivered, two ahead
COPY_BELOW = 4096  # bytes: a kept list of labels must not keep the whole batch's buffer
CACHE_LINE = 64  # bytes


def n_bytes_of(layout: Layout) -> int:
    """How much of a buffer a batch of this layout takes."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout)


def arrays_in(buffer: Any, layout: Layout) -> list[np.ndarray]:
    """The parts of a batch as arrays on `buffer`, back to back.

    buffer: writable memory, aligned for the widest type; at least `n_bytes_of(layout)` bytes.
    layout: (dtype, shape) of each part.

    Returns an array a part, in the layout's order; in memory the widest type lies first, so that
    all are aligned. Raises TypeError where the buffer is too small.
    """
    n_bytes = n_bytes_of(layout)
    n_there = memoryview(buffer).nbytes
    if n_bytes > n_there:
        raise TypeError(
            f"buffer is too small: it has {n_there} bytes, a batch of {_shapes_of(layout)} takes "
            f"{n_bytes}. A loader's buffers are made for the largest batch of the epoch that it "
            "begins with: no later one may be larger"
        )

    widest_first = sorted(range(len(layout)), key=lambda k: -layout[k][0].itemsize)
    arrays: dict[int, np.ndarray] = {}
    offset = 0
    for k in widest_first:
        dtype, shape = layout[k]
        arrays[k] = np.ndarray(shape, dtype, buffer, offset)
        offset += arrays[k].nbytes
    return [arrays[k] for k in range(len(layout))]


def _shapes_of(layout: Layout) -> str:
    return ", ".join(f"{dtype} {list(shape)}" for dtype, shape in layout)


def tensors_in(buffer: Any, layout: Layout, is_copied: bool = False) -> tuple[Tensor, ...]:
    """The same parts as tensors on the buffer; small ones, or all where `is_copied`, as copies."""
    tensors = []
    for array in arrays_in(buffer, layout):
        is_own = is_copied or array.nbytes <= COPY_BELOW
        tensors.append(torch.from_numpy(array.copy() if is_own else array))
    return tuple(tensors)


def private_memory(n_bytes: int) -> memoryview:
    """Memory of this process, at a whole cache line.

    Copies that land 16 bytes beyond their source (modulo 4096) are a fifth slower.
    """
    memory = np.empty(n_bytes + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return memory[start : start + n_bytes].data


def shared_memory(n_bytes: int) -> Arena:
    """Memory without a name, mapped by every process that it is handed to as it starts.

    It is no part of /dev/shm where the system has memfd_create.
    """
    if not hasattr(os, "memfd_create"):
        return Arena(n_bytes)
    fd = os.memfd_create("loader")
    os.ftruncate(fd, n_bytes)
    arena = Arena(n_bytes, fd)
    weakref.finalize(arena, os.close, fd).atexit = False
    return arena


def buffers_of(arena: Arena) -> list[memoryview]:
    """The same N_BUFFERS parts of shared memory in every process."""
    view = memoryview(arena.buffer)
    size = arena.size // N_BUFFERS
    return [view[k * size : (k + 1) * size] for k in range(N_BUFFERS)]


def _whole_pages(n_bytes: int) -> int:
    """At least that much, and at least one page."""
    n_pages = -(-max(n_bytes, 1) // mmap.PAGESIZE)
    return n_pages * mmap.PAGESIZE


def _can_pin() -> bool:
    """A forked child cannot, once its parent has used the GPU."""
    if not torch.cuda.is_available():
        return False
    return not torch.cuda._is_in_bad_fork()  # noqa: SLF001 (torch has no public name for it)


def _never_free(value: object) -> None:
    """Not at exit either: one reference too many is held by nobody."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


class BufferPool:
    """N_BUFFERS buffers, each known by its number; their life is drawn at the top of this file.

    n_bytes: of each buffer; rounded up to whole pages.
    is_shared: worker processes fill them too.
    """

    def __init__(self, n_bytes: int, is_shared: bool) -> None:
        n_bytes = _whole_pages(n_bytes)
        self.arena: Arena | None = None  # what workers are handed
        if is_shared:
            self.arena = shared_memory(N_BUFFERS * n_bytes)
            self.buffers = buffers_of(self.arena)
        else:
            self.buffers = [private_memory(n_bytes) for _ in range(N_BUFFERS)]

        # The last one back goes out first: part of it is still in the CPU's cache.
        self.free = list(range(N_BUFFERS))
        self.lent: dict[int, int] = {}  # the bytes in use of each
        self.kept: set[int] = set()  # lent, and never to be filled again
        self.unmapped = set(self.free) if is_shared else set[int]()  # pages not seen here yet

        self.events: dict[int, Any] = {}  # what copies to the GPU wait for
        self.pins: list[weakref.finalize] = []
        self.is_pinned = _can_pin() and all(self._pin(buffer) for buffer in self.buffers)

        HOLDERS.add(self)
        if is_shared:
            SHARED.add(self)

    def _pin(self, buffer: memoryview) -> bool:
        """Lock its pages for copies to the GPU; whether that is done."""
        cudart = torch.cuda.cudart()
        array = np.frombuffer(buffer, np.uint8)
        address = array.ctypes.data
        if int(cudart.cudaHostRegister(address, array.nbytes, 0)) != 0:
            return False
        pin = weakref.finalize(self, cudart.cudaHostUnregister, address)
        pin.atexit = False
        self.pins.append(pin)
        return True

    # ---------------------------------------------------------------- forks

    def forget(self) -> None:
        """In a forked child, which cannot use the parent's GPU: nothing is unregistered there.

        Freeing an event asks the GPU too, which ends such a process: they stay for ever.
        """
        self.is_pinned = False  # and no event is recorded
        for event in self.events.values():
            _never_free(event)
        self.events.clear()
        for pin in self.pins:
            pin.detach()

    def lent_to_others(self) -> list[memoryview]:
        """What of the buffers lies under tensors."""
        return [self.buffers[buffer_id][:n_bytes] for buffer_id, n_bytes in list(self.lent.items())]

    def keep_lent(self) -> None:
        """Whatever is lent now is not filled again: a forked child may read it for ever."""
        self.kept |= set(self.lent)

    # ---------------------------------------------------------------- a buffer's life

    def take(self) -> int:
        """A free buffer's number, after the copies to the GPU that were under way as it came back.

        Raises IndexError where none is free.
        """
        buffer_id = self.free.pop()
        event = self.events.pop(buffer_id, None)
        if event is not None:
            event.synchronize()
        return buffer_id

    def put_back(self, buffer_id: int) -> None:
        """What was taken is not delivered."""
        self.free.append(buffer_id)

    def deliver(self, buffer_id: int, made: Message) -> Returned | Raised:
        """What was made, with a batch that was written to the buffer as tensors on it."""
        if isinstance(made, Written):
            return Returned(self._lend(buffer_id, made.layout))
        self.free.append(buffer_id)
        return made

    def _lend(self, buffer_id: int, layout: Layout) -> tuple[Tensor, ...]:
        """The batch as tensors; as copies where one buffer more would leave none to go on with."""
        # A view of a memoryview owns its lifetime: numpy stops there when it looks for the base of
        # the parts below.
        lease = np.frombuffer(self.buffers[buffer_id], np.uint8)
        if buffer_id in self.unmapped:
            # Map the pages here too, else they count as private to the worker that wrote them.
            self.unmapped.remove(buffer_id)
            lease[: n_bytes_of(layout) : mmap.PAGESIZE].max(initial=0)

        is_last = len(self.lent) >= N_BUFFERS - 1
        batch = tensors_in(lease, layout, is_last)
        if is_last:
            self.free.append(buffer_id)
        else:
            self.lent[buffer_id] = n_bytes_of(layout)
            weakref.finalize(lease, self._come_back, buffer_id).atexit = False
        return batch

    def _come_back(self, buffer_id: int) -> None:
        """Runs wherever the last tensor is dropped, inside a garbage collection too.

        Ctrl-C comes between calls, and what is raised in here is lost: the last lines call nothing.
        """
        if buffer_id in self.kept:
            return
        if self.is_pinned:
            event = torch.cuda.Event()
            event.record()
            self.events[buffer_id] = event
        if buffer_id in self.lent:
            del self.lent[buffer_id]
        self.free += (buffer_id,)
