"""Rows of one HDF5 dataset without HDF5: the index is read once, then a chunk is one pread and one inflate.

Both run outside Python's lock. Every filter but gzip and shuffle goes through h5py: slower, never wrong. The rows that
share chunks are a *group*; its chunks, "tiles" of its rows, are unpacked straight to their places in these rows, and
the padding of edge tiles is cropped. A group too large to hold is unpacked into a scratch file, chunk after chunk,
and rows come out of it a band at a time.
"""

import math
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise, product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a helper process does without it
    import h5py

_libdeflate: Callable[[Any, int], Any] | None
try:
    from deflate import zlib_decompress as _libdeflate
except ImportError:  # the extra `fast` is not installed
    _libdeflate = None

MAX_GROUP_BYTES = 24 << 20  # rows decoded together; more goes through a scratch file
READ_BYTES = 4 << 20  # unpacked bytes whose chunks are read in one go
DEFLATE, SHUFFLE = 1, 2  # HDF5's numbers of these filters
DIRECT_FILTERS: tuple[list[int], ...] = ([], [DEFLATE], [SHUFFLE, DEFLATE])


def inflate(data: bytes | memoryview, n_bytes: int) -> bytes | bytearray:
    """Undo zlib into exactly `n_bytes`. Raises ValueError where the data is damaged."""
    try:
        out = _libdeflate(data, n_bytes) if _libdeflate else zlib.decompress(data, bufsize=n_bytes)
    except Exception as error:  # the bindings raise their own types
        raise ValueError(f"a compressed chunk is damaged ({error})") from None
    if len(out) != n_bytes:
        raise ValueError(f"a chunk holds {len(out)} bytes, expected {n_bytes}")
    return out


@dataclass(frozen=True)
class ChunkIndex:
    """Where every chunk lies in the file, as arrays in grid order. `offset` -1 = never written (the fill value)."""

    offset: np.ndarray
    n_bytes: np.ndarray
    filter_mask: np.ndarray


def read_index(dset: "h5py.Dataset", grid: tuple[int, ...]) -> ChunkIndex:
    """One pass over the file's own chunk index (60 ms for 29,000 chunks; asking chunk by chunk takes 40 s)."""
    table = np.full((3, math.prod(grid)), -1, np.int64)
    infos: list[Any] = []

    def flush() -> None:
        if infos:
            place = np.array([i.chunk_offset for i in infos]) // dset.chunks
            table[:, np.ravel_multi_index(tuple(place.T), grid)] = np.array(
                [(i.byte_offset, i.size, i.filter_mask) for i in infos], np.int64
            ).T
            infos.clear()

    def visit(info: Any) -> None:
        infos.append(info)
        if len(infos) == 65536:
            flush()

    dset.id.chunk_iter(visit)
    flush()
    return ChunkIndex(*table)


class Reader:
    """Rows of one dataset, whatever its layout: each chunk is read and inflated exactly once.

    `group_rows` rows are decoded together by `read_group`, which threads may call at once.
    """

    def __init__(self, dset: "h5py.Dataset", handle: int | Callable[[int, int], bytes]) -> None:
        self.dset, self.lock = dset, threading.Lock()
        self.pread = handle if callable(handle) else partial(os.pread, handle)  # (bytes, offset)
        self.dtype, self.n_rows, self.row_shape = dset.dtype, dset.shape[0], dset.shape[1:]
        self.chunk = dset.chunks or (1, *self.row_shape)  # a contiguous dataset is read as chunks of one row
        self.grid = tuple(-(-s // c) for s, c in zip(dset.shape, self.chunk, strict=True))
        self.n_tiles = math.prod(self.grid[1:])
        self.tile_bytes = math.prod(self.chunk[1:]) * self.dtype.itemsize  # of one row
        self.chunk_bytes = self.chunk[0] * self.tile_bytes
        self.fill = np.full(1, 0 if dset.fillvalue is None else dset.fillvalue, self.dtype).tobytes()
        padded_row = self.n_tiles * self.tile_bytes
        self.needs_scratch = self.chunk[0] * padded_row > MAX_GROUP_BYTES and self.chunk[0] > 1
        self.group_rows = max(1, MAX_GROUP_BYTES // 2 // padded_row) if self.needs_scratch else self.chunk[0]
        self.scratch: IO[bytes] | None = None
        self.n_decoded = 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("dset", "lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())

    def close(self) -> None:
        if self.scratch:
            self.scratch.close()

    @property
    def can_travel(self) -> bool:
        """Whether another process on this machine can read the rows without HDF5."""
        return self.index is not None and isinstance(self.pread, partial) and not self.needs_scratch

    @cached_property
    def filters(self) -> list[int]:
        plist = self.dset.id.get_create_plist()
        return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]

    @cached_property
    def index(self) -> ChunkIndex | None:
        """Read at first use; None where the bytes must come through h5py.

        Offsets that were seen to be right: HDF5 before 1.14.4 leaves the user block out of them.
        """
        if self.filters not in DIRECT_FILTERS or self.dset.id.get_create_plist().get_external_count():
            return None
        if self.dset.chunks:
            index = read_index(self.dset, self.grid)
        elif (start := self.dset.id.get_offset()) is not None:
            offset = start + np.arange(self.n_rows, dtype=np.int64) * self.chunk_bytes
            index = ChunkIndex(offset, np.full_like(offset, self.chunk_bytes), np.zeros_like(offset))
        else:
            return None
        written = np.flatnonzero(index.offset >= 0)
        if not len(written):
            return index
        first, size = int(written[0]), int(index.n_bytes[written[0]])
        if size > 2 * self.chunk_bytes + 4096:  # HDF5 would unpack it whole, then drop what is too much
            raise ValueError(f"a chunk claims {size} compressed bytes for {self.chunk_bytes}")
        if self.dset.chunks:
            place = np.unravel_index(first, self.grid)
            expected = self.dset.id.read_direct_chunk(
                tuple(int(p * c) for p, c in zip(place, self.chunk, strict=True))
            )[1]
        else:
            expected = self.dset[0].tobytes()
        for base in (0, self.dset.file.userblock_size):
            if self.pread(size, int(index.offset[first]) + base) == expected:
                index.offset[written] += base
                return index
        return None

    def _unpack(self, first: int, places: Sequence[np.ndarray]) -> None:
        """Chunks first, first + 1, ... into these places."""
        index = self.index
        with self.lock:
            self.n_decoded += len(places)
        if index is None:
            for t, place in enumerate(places):
                place[...] = self._through_hdf5(first + t)
            return
        step = max(1, READ_BYTES // self.chunk_bytes)
        for lo in range(0, len(places), step):
            part = slice(first + lo, first + min(lo + step, len(places)))
            stored = self._stored(index.offset[part], index.n_bytes[part])
            for t, (data, mask) in enumerate(zip(stored, index.filter_mask[part].tolist(), strict=True), lo):
                unpacked = self.fill * (self.chunk_bytes // len(self.fill)) if data is None else self._undo(data, mask)
                places[t][...] = np.frombuffer(unpacked, self.dtype).reshape(self.chunk)

    def _stored(self, offsets: np.ndarray, sizes: np.ndarray) -> Iterator[memoryview | None]:
        """The stored bytes of these chunks, in one read where they lie together. None: never written."""
        if sizes.max() > 2 * self.chunk_bytes + 4096:
            raise ValueError(f"a chunk claims {sizes.max()} compressed bytes for {self.chunk_bytes}")
        written = offsets >= 0
        low = int(offsets[written].min()) if written.any() else 0
        high = int((offsets + sizes)[written].max()) if written.any() else 0
        together = high - low <= 2 * int(sizes[written].sum())
        block = self._pread(high - low, low) if together else None
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            if offset < 0:
                yield None
            elif block is None:
                yield self._pread(size, offset)
            else:
                yield block[offset - low : offset - low + size]

    def _pread(self, n_bytes: int, offset: int) -> memoryview:
        data = self.pread(n_bytes, offset)
        if len(data) != n_bytes:
            raise ValueError("the file ends inside a chunk")
        return memoryview(data)

    def _undo(self, data: Any, mask: int) -> Any:
        """Undo the filters of one stored chunk, last one first, except those its mask says were skipped."""
        for i in reversed(range(len(self.filters))):
            if mask >> i & 1:
                continue
            if self.filters[i] == DEFLATE:
                data = inflate(data, self.chunk_bytes)
            else:
                data = np.frombuffer(data, np.uint8).reshape(self.dtype.itemsize, -1).T.tobytes()
        if len(data) != self.chunk_bytes:
            raise ValueError(f"a chunk holds {len(data)} bytes, expected {self.chunk_bytes}")
        return data

    def _through_hdf5(self, k: int) -> np.ndarray:
        """One chunk as h5py decodes it, padded to its full shape."""
        begin = [int(g) * c for g, c in zip(np.unravel_index(k, self.grid), self.chunk, strict=True)]
        out = np.zeros(self.chunk, self.dtype)
        with self.lock:
            part = self.dset[tuple(slice(b, b + c) for b, c in zip(begin, self.chunk, strict=True))]
        out[tuple(slice(0, n) for n in part.shape)] = part
        return out

    def read_group(self, group: int) -> np.ndarray:
        """Rows [group * group_rows, ...) as an array (rows, ...) in native byte order."""
        start, stop = group * self.group_rows, min((group + 1) * self.group_rows, self.n_rows)
        if self.scratch:
            cuts = [start, *range((start // self.chunk[0] + 1) * self.chunk[0], stop, self.chunk[0]), stop]
            return np.concatenate([self._band(lo, hi) for lo, hi in pairwise(cuts)])
        rows, tiles = self._empty_rows(self.chunk[0])
        self._unpack(group * self.n_tiles, tiles)
        return self._cropped(rows[: stop - start])

    def _empty_rows(self, n_rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows with the padding of edge tiles, and the views of them that tiles go into."""
        tile = self.chunk[1:]
        rows = np.empty((n_rows, *(g * c for g, c in zip(self.grid[1:], tile, strict=True))), self.dtype)
        corners = product(*(range(0, g * c, c) for g, c in zip(self.grid[1:], tile, strict=True)))
        return rows, [rows[:, *(slice(b, b + c) for b, c in zip(corner, tile, strict=True))] for corner in corners]

    def _cropped(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, *(slice(0, s) for s in self.row_shape)].astype(self.dtype.newbyteorder("="), copy=False)

    @property
    def scratch_bytes(self) -> int:
        return math.prod(self.grid) * self.chunk_bytes if self.needs_scratch else 0

    def fill_scratch(self, directory: Path, run: Callable[..., Any] = map) -> None:
        """Unpack every chunk once into a nameless file, in grid order. `run` is a map, such as a pool's."""
        self.scratch = tempfile.TemporaryFile(dir=directory, buffering=0)
        step, n_chunks = max(1, READ_BYTES // self.chunk_bytes), math.prod(self.grid)

        def unpack(first: int) -> None:
            assert self.scratch is not None
            buffer = np.empty((min(step, n_chunks - first), self.chunk_bytes), np.uint8)
            self._unpack(first, buffer.view(self.dtype).reshape(-1, *self.chunk))
            data, at = buffer.reshape(-1).data, 0
            while at < len(data):
                at += os.pwrite(self.scratch.fileno(), data[at:], first * self.chunk_bytes + at)

        list(run(unpack, range(0, n_chunks, step)))

    def _band(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop of one group, from the scratch file."""
        assert self.scratch is not None
        group, skipped = divmod(start, self.chunk[0])
        rows, tiles = self._empty_rows(stop - start)
        line = np.empty((stop - start, *self.chunk[1:]), self.dtype)
        for t, tile in enumerate(tiles, group * self.n_tiles):
            at = t * self.chunk_bytes + skipped * self.tile_bytes
            if os.preadv(self.scratch.fileno(), [line.reshape(-1).view(np.uint8).data], at) != line.nbytes:
                raise ValueError("the scratch file ends inside a chunk")
            tile[...] = line
        return self._cropped(rows)
