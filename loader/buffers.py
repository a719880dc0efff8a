"""Four buffers that are used again and again: a fresh page of memory costs more than copying one.

A slot goes out under tensors and is refilled only after the last of them is gone; if too many are kept, a batch is
delivered as a copy. The memory is shared with workers, which hand over slot numbers, never rows.
"""

import math
import mmap
import os
import weakref
from multiprocessing.heap import Arena
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loader.forks import BUFFERS, HOLDERS
from loader.messages import Layout, Message, Raised, Returned, Written

N_SLOTS = 4  # batches held in all: one at the user, one being delivered, two ahead
COPY_BELOW = 4096  # bytes: a kept list of labels must not keep the whole batch's buffer


def n_bytes_of(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout)


def arrays_in(buffer: Any, layout: Layout) -> list[np.ndarray]:
    """The parts of a batch, back to back in `buffer`; the widest type lies first, so that all are aligned."""
    found, offset = dict[int, np.ndarray](), 0
    for k in sorted(range(len(layout)), key=lambda k: -layout[k][0].itemsize):
        found[k] = np.ndarray(layout[k][1], layout[k][0], buffer, offset)
        offset += found[k].nbytes
    return [found[k] for k in range(len(layout))]


def tensors_in(buffer: Any, layout: Layout, is_copied: bool = False) -> tuple[Tensor, ...]:
    """The same parts as tensors on the buffer; small ones, or all, as copies."""
    arrays = (a.copy() if is_copied or a.nbytes <= COPY_BELOW else a for a in arrays_in(buffer, layout))
    return tuple(torch.from_numpy(array) for array in arrays)


def private_memory(n_bytes: int) -> memoryview:
    """At a whole cache line: copies that land 16 bytes beyond their source (modulo 4096) are a fifth slower."""
    memory = np.empty(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes].data


def shared_memory(n_bytes: int) -> Arena:
    """Memory without a name, mapped by every process that it is handed to as it starts; not part of /dev/shm."""
    if not hasattr(os, "memfd_create"):
        return Arena(n_bytes)
    fd = os.memfd_create("loader")
    os.ftruncate(fd, n_bytes)
    arena = Arena(n_bytes, fd)
    weakref.finalize(arena, os.close, fd).atexit = False
    return arena


def slots_of(arena: Arena) -> list[memoryview]:
    view, size = memoryview(arena.buffer), arena.size // N_SLOTS
    return [view[k * size : (k + 1) * size] for k in range(N_SLOTS)]


def _can_pin() -> bool:
    """A forked child cannot, once its parent has used the GPU."""
    return torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()


class Ring:
    """N_SLOTS buffers. A slot goes out under tensors and comes back by itself when the last of them is gone."""

    def __init__(self, n_bytes: int, is_shared: bool) -> None:
        n_bytes = -(-max(n_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.arena = shared_memory(N_SLOTS * n_bytes) if is_shared else None
        self.buffers = slots_of(self.arena) if self.arena else [private_memory(n_bytes) for _ in range(N_SLOTS)]
        self.unseen = set(range(N_SLOTS)) if is_shared else set[int]()
        self.lent, self.events = dict[int, int](), dict[int, Any]()  # bytes in use; what copies to the GPU wait for
        self.kept = set[int]()  # lent, and never to be filled again
        self.free = list(range(N_SLOTS))  # the last one back goes out first: part of it is still in the CPU's cache
        self.pins: list[weakref.finalize[Any, Any]] = []
        self.is_pinned = _can_pin() and all(self._pin(buffer) for buffer in self.buffers)
        HOLDERS.add(self)
        if is_shared:
            BUFFERS.add(self)

    def _pin(self, buffer: memoryview) -> bool:
        cudart, array = torch.cuda.cudart(), np.frombuffer(buffer, np.uint8)
        if int(cudart.cudaHostRegister(array.ctypes.data, array.nbytes, 0)) != 0:
            return False
        self.pins.append(weakref.finalize(self, cudart.cudaHostUnregister, array.ctypes.data))
        self.pins[-1].atexit = False
        return True

    def forget(self) -> None:
        """In a forked child, which cannot use the parent's GPU: nothing is unregistered, no event recorded."""
        self.is_pinned = False
        self.events.clear()
        for pin in self.pins:
            pin.detach()

    def lent_to_others(self) -> list[memoryview]:
        return [self.buffers[slot][:n_bytes] for slot, n_bytes in list(self.lent.items())]

    def keep_lent(self) -> None:
        self.kept |= set(self.lent)

    def take(self) -> int:
        """A free slot, after the copies to the GPU that were under way when it came back."""
        slot = self.free.pop()
        if event := self.events.pop(slot, None):
            event.synchronize()
        return slot

    def deliver(self, slot: int, made: Message) -> Returned | Raised:
        """What was made in `slot`, with the batch that was written there as tensors on it."""
        if isinstance(made, Written):
            return Returned(self.lend(slot, made.layout))
        self.free.append(slot)
        return made

    def lend(self, slot: int, layout: Layout) -> tuple[Tensor, ...]:
        """The batch in `slot` as tensors; as copies where one slot more would leave none to go on with."""
        # A view of a memoryview owns its lifetime: numpy stops there when it looks for the base of the parts below.
        lease = np.frombuffer(self.buffers[slot], np.uint8)
        if slot in self.unseen:  # map the pages here too, else they count as private to the worker that wrote them
            self.unseen.remove(slot)
            lease[: n_bytes_of(layout) : mmap.PAGESIZE].max(initial=0)
        is_last = len(self.lent) >= N_SLOTS - 1
        batch = tensors_in(lease, layout, is_last)
        if is_last:
            self.free.append(slot)
        else:
            self.lent[slot] = n_bytes_of(layout)
            weakref.finalize(lease, self._back, slot).atexit = False
        return batch

    def _back(self, slot: int) -> None:
        """Runs wherever the last tensor is dropped, inside a garbage collection too."""
        if slot in self.kept:
            return
        if self.is_pinned:
            self.events[slot] = torch.cuda.Event()
            self.events[slot].record()
        self.lent.pop(slot, None)
        self.free.append(slot)
