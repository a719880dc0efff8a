"""What a fork must not share: threads and workers that only the parent has, and memory that both
would write to.

A forked child has a copy of every loader at the place where it was; it starts a thread or workers
of its own. Batches that are held while a process forks stay what they are on both sides. On
buffers shared with workers that takes a copy:

    parent   opens a gate -- fork -- waits until the child has closed it -- refills its buffers
    child                       \\--- puts pages of its own under the lent buffers, closes the gate

Invariant: while a child may still read a lent buffer through the parent's pages, the parent runs
no Python but the wait, so nobody drops a tensor and no buffer is given to a worker. Never let the
parent go on before the child is done.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Buffers that workers write to."""

    def lent_to_others(self) -> list[memoryview]:
        """Those with tensors on them."""

    def keep_lent(self) -> None:
        """Never fill these again."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A pipe through which nothing is written: the parent waits for the end of it."""

    parents_end: int
    childs_end: int


class ThreadState(threading.local):
    """Of each thread its own."""

    def __init__(self) -> None:
        self.starts_worker = False  # what it forks now is a worker of ours
        self.is_forked = False  # it was forked, and torch has not been told yet


HOLDERS = WeakSet[Holder]()
SHARED = WeakSet[SharedBuffers]()
GATES: dict[int, Gate] = {}  # by the thread that is forking
THIS_THREAD = ThreadState()


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
    THIS_THREAD.starts_worker = True
    try:
        yield
    finally:
        THIS_THREAD.starts_worker = False


def use_one_thread_in_a_fork() -> None:
    """Call before torch is used.

    In the thread that was forked it would wait for the parent's OpenMP threads for ever.
    """
    if THIS_THREAD.is_forked:
        THIS_THREAD.is_forked = False
        torch.set_num_threads(1)


def _before() -> None:
    if THIS_THREAD.starts_worker:
        return
    if any(buffers.lent_to_others() for buffers in list(SHARED)):
        parents_end, childs_end = os.pipe()
        gate = Gate(parents_end=parents_end, childs_end=childs_end)
        GATES[threading.get_ident()] = gate


def _in_child() -> None:
    THIS_THREAD.is_forked = True
    try:
        if not THIS_THREAD.starts_worker:
            _own_what_is_lent()
    finally:
        _close_gates()
    for holder in list(HOLDERS):
        holder.forget()


def _own_what_is_lent() -> None:
    for buffers in list(SHARED):
        for buffer in buffers.lent_to_others():
            _own_pages(buffer)


def _close_gates() -> None:
    """Those of other threads too: their parents must not wait for this process."""
    for gate in GATES.values():
        os.close(gate.parents_end)
        os.close(gate.childs_end)
    GATES.clear()


def _in_parent() -> None:
    gate = GATES.pop(threading.get_ident(), None)
    if gate is None:
        return

    os.close(gate.childs_end)
    is_done = wait([gate.parents_end], WAIT_S)  # ready at its end, as nobody writes
    os.close(gate.parents_end)
    if not is_done:
        for buffers in list(SHARED):
            buffers.keep_lent()


def _own_pages(buffer: memoryview) -> None:
    """Put private pages with the same content at the same addresses."""
    bytes_there = np.frombuffer(buffer, np.uint8)
    content = bytes_there.copy()
    address = bytes_there.ctypes.data
    n_pages = -(-len(content) // mmap.PAGESIZE)

    map_at = ctypes.CDLL(None, use_errno=True).mmap
    map_at.restype = ctypes.c_void_p
    map_at.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    access = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    if map_at(address, n_pages * mmap.PAGESIZE, access, flags, -1, 0) != address:
        reason = os.strerror(ctypes.get_errno())
        raise MemoryError(f"no memory for the batches that are held: {reason}")
    bytes_there[:] = content


if hasattr(os, "register_at_fork"):  # else nothing forks
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
