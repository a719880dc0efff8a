"""What a fork must not share: threads and workers that only the parent has, and memory that both would write to.

A forked child has a copy of every loader at the place where it was; it starts a thread or workers of its own. Batches
that are held while a process forks stay what they are on both sides. On buffers shared with workers that takes a copy:

    parent   opens a gate --- fork --- waits until the child has closed its end of the gate --- refills its buffers
    child                        \\---- puts pages of its own under the slots that are lent out, closes the gate

Invariant: while a child may still read a lent slot through the parent's pages, the parent runs no Python but the wait,
so nobody drops a tensor and no slot is given to a worker. Never let the parent go on before the child is done.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import torch

WAIT_S = 10.0  # for the child's copy, some milliseconds; a debugger may hold it for longer
MAP_FIXED = 0x10  # on Linux and macOS


class Holder(Protocol):
    """What does not survive a fork as it is."""

    def forget(self) -> None:
        """In the child: let go of what is the parent's, ending nothing of it."""


class SharedBuffers(Protocol):
    """Slots that workers write to."""

    def lent_to_others(self) -> list[memoryview]:
        """Those with tensors on them."""

    def keep_lent(self) -> None:
        """Never fill these again."""


HOLDERS, BUFFERS = WeakSet[Holder](), WeakSet[SharedBuffers]()
GATES: dict[int, tuple[int, int]] = {}  # of a thread that is forking: its pipe
HERE = threading.local()  # of each thread: `starts_worker`, `is_forked`


class ProcessLock:
    """A reentrant lock that a forked child finds free, whichever thread held it in the parent."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        HOLDERS.add(self)

    def forget(self) -> None:
        self._lock = threading.RLock()

    def held(self) -> Any:
        """`with lock.held():` lets go the very lock that it took, should the block fork."""
        return self._lock


@contextmanager
def starting_a_worker() -> Iterator[None]:
    """What is forked meanwhile is a worker of ours: it never looks at batches, and copies none."""
    HERE.starts_worker = True
    try:
        yield
    finally:
        HERE.starts_worker = False


def use_one_thread_in_a_fork() -> None:
    """Call before torch is: in the thread that was forked it would wait for the parent's OpenMP threads for ever."""
    if getattr(HERE, "is_forked", False):
        HERE.is_forked = False
        torch.set_num_threads(1)


def _before() -> None:
    if not getattr(HERE, "starts_worker", False) and any(shared.lent_to_others() for shared in list(BUFFERS)):
        GATES[threading.get_ident()] = os.pipe()


def _in_child() -> None:
    HERE.is_forked = True
    try:
        if not getattr(HERE, "starts_worker", False):
            for shared in list(BUFFERS):
                for slot in shared.lent_to_others():
                    _own_pages(slot)
    finally:
        for ends in GATES.values():  # those of other threads too: their parents must not wait for this process
            for fd in ends:
                os.close(fd)
        GATES.clear()
    for holder in list(HOLDERS):
        holder.forget()


def _in_parent() -> None:
    if ends := GATES.pop(threading.get_ident(), None):
        gate, childs = ends
        os.close(childs)
        is_done = wait([gate], WAIT_S)  # its end, as nobody writes
        os.close(gate)
        if not is_done:
            for shared in list(BUFFERS):
                shared.keep_lent()


def _own_pages(buffer: memoryview) -> None:
    """Put private pages with the same content at the same addresses."""
    bytes_there = np.frombuffer(buffer, np.uint8)
    content = bytes_there.copy()
    address, size = bytes_there.ctypes.data, -(-len(content) // mmap.PAGESIZE) * mmap.PAGESIZE
    map_at = ctypes.CDLL(None, use_errno=True).mmap
    map_at.restype = ctypes.c_void_p
    map_at.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    if map_at(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != address:
        raise MemoryError(f"no memory for the batches that are held: {os.strerror(ctypes.get_errno())}")
    bytes_there[:] = content


if hasattr(os, "register_at_fork"):  # else nothing forks
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
