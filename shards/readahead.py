"""Rows of mapped shards, asked for before they are read: a disk then has many requests at once.

What is mapped comes from the disk when it is touched, and whoever touches it waits: for one place
after the other. Worse, the kernel then reads around each place, some hundred KB to some MB, which
helps who reads in order. Of a set that is larger than memory, read in shuffled order, that is
thrown away unread: 37 times the bytes came from the disk (docs/measurements/loading.md). So

    WILLNEED   a row is asked for some batches ahead; the call only begins to read
    RANDOM     of a whole shard, once: what is touched all the same comes alone

Nothing depends on either: advice that a system does not know, or refuses, is not given, and rows
come when they are touched.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np

# The kernel reads no more of a call than this, or its readahead, or the device's largest request.
PIECE_BYTES = 1 << 20
MOST_PIECES = 1024  # of one call: the kernel's limit (UIO_MAXIOV)
NOT_ALLOWED = (errno.EPERM, errno.ENOSYS, errno.EINVAL)
REFUSED: set[int] = set()  # advice that is given a piece at a time here


class Rows(Protocol):
    """Where rows lie in memory; see `shards.gather.RowGather`."""

    def row_spans(self, fields: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(addresses, n_bytes), each [n] int64: of these rows of these fields, in any order."""

    def expect_no_order(self, fields: Sequence[str], rows: np.ndarray) -> None:
        """Have nothing read around what is touched of the shards of these rows."""

    def expects_order(self, fields: Sequence[str], rows: np.ndarray) -> bool:
        """Whether that was said of none of the shards of these rows."""

    def at_hand(self, rows: np.ndarray) -> np.ndarray:
        """Those of these rows that are not waited for."""


class RowsAhead:
    """Asks for rows of some fields of a set."""

    def __init__(self, rows: Rows, fields: Sequence[str]) -> None:
        self._rows = rows
        self._fields = list(fields)

    def ask_for(self, rows: np.ndarray) -> None:
        """Have the system begin to read these rows [B]; those that are in memory cost little.

        It waits only while the disk has more requests than it takes. Python's lock is free. Rows
        that follow one another are left to the kernel, which is faster then: it reads ahead by
        itself, and in larger pages.
        """
        rows = self._rows.at_hand(rows)
        if not len(rows):
            return
        if follow_one_another(rows) and self._rows.expects_order(self._fields, rows):
            return
        if len(rows) > 1:  # one alone says nothing of an order, and its shard may be read in order
            self._rows.expect_no_order(self._fields, rows)
        addresses, n_bytes = self._rows.row_spans(self._fields, rows)
        will_need(addresses, n_bytes)


def follow_one_another(rows: np.ndarray) -> bool:
    """Whether several rows are in order, and none between them is left out."""
    return len(rows) > 1 and bool((np.diff(rows) == 1).all())


def will_need(addresses: np.ndarray, n_bytes: np.ndarray) -> None:
    """Begin to read what lies at these addresses [n]; neighbours are one request."""
    if not can_advise():
        return
    starts, sizes = whole_pages(addresses, addresses + n_bytes)
    starts, sizes = in_pieces(*merged(starts, sizes))
    advise(starts, sizes, mmap.MADV_WILLNEED)


def can_advise() -> bool:
    """Whether this system takes advice about mapped memory."""
    return hasattr(mmap, "MADV_WILLNEED") and hasattr(_library(), "madvise")


# ------------------------------------------------------------------------------- what is asked


def whole_pages(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, sizes) of the pages that hold these bytes [n]."""
    page_starts = starts // mmap.PAGESIZE * mmap.PAGESIZE
    page_ends = -(-ends // mmap.PAGESIZE) * mmap.PAGESIZE
    return page_starts, page_ends - page_starts


def merged(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same bytes in ascending order, what touches or overlaps (of equal sizes) as one."""
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    ends = np.maximum.accumulate(starts + sizes[order])
    is_first = np.ones(len(starts), bool)
    is_first[1:] = starts[1:] > ends[:-1]
    is_last = np.roll(is_first, -1)
    return starts[is_first], ends[is_last] - starts[is_first]


def in_pieces(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same bytes in pieces of at most PIECE_BYTES."""
    n_pieces = -(-sizes // PIECE_BYTES)
    first_piece = np.cumsum(n_pieces) - n_pieces
    offsets = (np.arange(n_pieces.sum()) - np.repeat(first_piece, n_pieces)) * PIECE_BYTES
    piece_starts = np.repeat(starts, n_pieces) + offsets
    left = np.repeat(sizes, n_pieces) - offsets
    return piece_starts, np.minimum(left, PIECE_BYTES)


# ------------------------------------------------------------------------------ how it is said


def advise(starts: np.ndarray, sizes: np.ndarray, advice: int) -> None:
    """Say one thing of many places [n], whole pages.

    Where the kernel lets a process say much of itself at once (older ones ask for rights) that is
    one call for 1024 places. Else it is one for each: beside a thread that never lets Python's lock
    go, each waits for it.
    """
    if not can_advise():
        return
    places = np.stack([starts, sizes], axis=1).astype(np.int64)
    for at in range(0, len(places), MOST_PIECES):
        some = np.ascontiguousarray(places[at : at + MOST_PIECES])
        if advice in REFUSED or not _advise_at_once(some, advice):
            _advise_one_by_one(some, advice)


def _advise_at_once(places: np.ndarray, advice: int) -> bool:
    """Whether the kernel took it. places: [n, 2] int64, as C's iovec."""
    process_madvise = getattr(_library(), "process_madvise", None)
    if process_madvise is None or not hasattr(os, "pidfd_open"):
        REFUSED.add(advice)
        return False
    try:
        myself = os.pidfd_open(os.getpid())  # anew: a forked child is another
    except OSError:
        return False  # no descriptor is left
    try:
        said = process_madvise(myself, places.ctypes.data, len(places), advice, 0)
        if said < 0 and ctypes.get_errno() in NOT_ALLOWED:
            REFUSED.add(advice)
        return bool(said >= 0)
    finally:
        os.close(myself)


def _advise_one_by_one(places: np.ndarray, advice: int) -> None:
    madvise = _library().madvise
    for start, size in places.tolist():
        madvise(start, size, advice)


@cache
def _library() -> Any:
    """The C library; Python's lock is let go in each call."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "madvise"):
        library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if hasattr(library, "process_madvise"):
        library.process_madvise.restype = ctypes.c_ssize_t
        library.process_madvise.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_uint,
        )
    return library
