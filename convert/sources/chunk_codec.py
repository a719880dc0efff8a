"""From the bytes of the file to the elements of a chunk: one pread and one inflate, without HDF5.

Both run outside Python's lock.
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from convert.sources.errors import Damaged

libdeflate: Callable[[Any, int], Any] | None
try:
    from deflate import zlib_decompress as libdeflate
except ImportError:  # the extra `fast` is not installed
    libdeflate = None

DEFLATE = 1  # HDF5's numbers of these filters
SHUFFLE = 2
DIRECT_FILTERS: tuple[list[int], ...] = ([], [DEFLATE], [SHUFFLE, DEFLATE])
Bytes = bytes | bytearray | memoryview
PRead = Callable[[int, int], bytes]  # (n_bytes, offset)


class FileBytes:
    """The bytes of the file, which threads may read at once.

    handle: a descriptor, or what reads as `os.pread` does: (n_bytes, offset) -> bytes.
    """

    def __init__(self, handle: int | PRead) -> None:
        # Another process of this machine can be given it.
        self.has_descriptor = isinstance(handle, int)
        self.pread: PRead = partial(os.pread, handle) if isinstance(handle, int) else handle

    def read(self, n_bytes: int, offset: int) -> memoryview:
        """Exactly `n_bytes` from `offset` on. Raises Damaged where the file ends before."""
        data = self.pread(n_bytes, offset)
        if len(data) != n_bytes:
            raise Damaged("the file ends inside a chunk")
        return memoryview(data)


def inflate(data: Bytes, n_bytes: int) -> Bytes:
    """Undo zlib into exactly `n_bytes`. Raises Damaged."""
    try:
        out: Bytes = libdeflate(data, n_bytes) if libdeflate else _inflate_by_zlib(data, n_bytes)
    except MemoryError:
        raise
    except Exception as error:  # the bindings raise their own types
        raise Damaged(f"a compressed chunk is damaged ({error})") from None

    if len(out) != n_bytes:
        raise Damaged(f"a chunk holds {len(out)} bytes, expected {n_bytes}")
    return out


def _inflate_by_zlib(data: Bytes, n_bytes: int) -> bytes:
    """By Python's own zlib, which would unpack a bomb whole: one byte too many tells it."""
    stream = zlib.decompressobj()
    out = stream.decompress(data, n_bytes + 1)
    if len(out) >= n_bytes and not stream.eof:
        raise ValueError("it is longer than it should be, or its end is missing")
    return out


@dataclass(frozen=True)
class ChunkCodec:
    """How the chunks of one dataset are stored. chunk_bytes: of one, unpacked, with padding."""

    filters: list[int]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    chunk_bytes: int

    @property
    def is_direct(self) -> bool:
        """Whether chunks can be unpacked here. Every other filter is left to HDF5."""
        return self.filters in DIRECT_FILTERS

    def check_claim(self, n_bytes: int) -> None:
        """Raise Damaged for a stored size that no such chunk has, before memory is taken for it."""
        if n_bytes > 2 * self.chunk_bytes + 4096:
            raise Damaged(f"a chunk claims {n_bytes} compressed bytes for {self.chunk_bytes}")

    def undo_filters(self, data: Bytes, filter_mask: int) -> Bytes:
        """The `chunk_bytes` of one stored chunk: filters undone, last one first.

        filter_mask: bit i is set where filter i was skipped when the chunk was written. Raises
        Damaged.
        """
        for i in reversed(range(len(self.filters))):
            was_skipped = filter_mask >> i & 1
            if was_skipped:
                continue
            if self.filters[i] == DEFLATE:
                data = inflate(data, self.chunk_bytes)
            elif len(data) == self.chunk_bytes:  # else it is refused below
                data = self._unshuffle(data)

        if len(data) != self.chunk_bytes:
            raise Damaged(f"a chunk holds {len(data)} bytes, expected {self.chunk_bytes}")
        return data

    def _unshuffle(self, data: Bytes) -> bytes:
        """HDF5 puts the first bytes of all elements first, then all second bytes, and so on."""
        by_place = np.frombuffer(data, np.uint8).reshape(self.dtype.itemsize, -1)
        return by_place.T.tobytes()

    def as_elements(self, unpacked: Bytes) -> np.ndarray:
        """The unpacked bytes as an array of `chunk_shape`; a view."""
        return np.frombuffer(unpacked, self.dtype).reshape(self.chunk_shape)

    def unpack(self, data: Bytes, filter_mask: int) -> np.ndarray:
        """One stored chunk as an array of `chunk_shape`. Raises Damaged."""
        return self.as_elements(self.undo_filters(data, filter_mask))
