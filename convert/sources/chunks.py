"""Rows of one HDF5 dataset without HDF5: the index is read once, then a chunk is one pread and one inflate.

Both run outside Python's lock. Every filter but gzip and shuffle goes through h5py, in the one thread that may call it
(`convert/hdf5.py`): slower, never wrong. The rows that share chunks are a *group*; its chunks, "tiles" of its rows, are
unpacked straight to their places in these rows, and the padding of edge tiles is cropped. A group too large to hold is
unpacked into a scratch file, chunk after chunk, and rows come out of it a band at a time.
"""

import math
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a helper process does without h5py
    from convert.sources.hdf5 import StoredDataset

_libdeflate: Callable[[Any, int], Any] | None
try:
    from deflate import zlib_decompress as _libdeflate
except ImportError:  # the extra `fast` is not installed
    _libdeflate = None

MAX_GROUP_BYTES = 24 << 20  # rows decoded together; more goes through a scratch file
READ_BYTES = 4 << 20  # unpacked bytes whose chunks are read in one go
DEFLATE, SHUFFLE = 1, 2  # HDF5's numbers of these filters
DIRECT_FILTERS: tuple[list[int], ...] = ([], [DEFLATE], [SHUFFLE, DEFLATE])


class Damaged(ValueError):
    """Bytes of the source that cannot be what was written there."""


class Unreadable(Exception):
    """HDF5 gave an error where it should have given data: the file may be damaged, or the library at fault."""


def inflate(data: bytes | memoryview, n_bytes: int) -> bytes | bytearray:
    """Undo zlib into exactly `n_bytes`. Raises Damaged."""
    try:
        out = _libdeflate(data, n_bytes) if _libdeflate else _inflate(data, n_bytes)
    except MemoryError:
        raise
    except Exception as error:  # the bindings raise their own types
        raise Damaged(f"a compressed chunk is damaged ({error})") from None
    if len(out) != n_bytes:
        raise Damaged(f"a chunk holds {len(out)} bytes, expected {n_bytes}")
    return out


def _inflate(data: bytes | memoryview, n_bytes: int) -> bytes:
    """By Python's own zlib, which would unpack a bomb whole: one byte too many is enough to know it by."""
    stream = zlib.decompressobj()
    out = stream.decompress(data, n_bytes + 1)
    if len(out) >= n_bytes and not stream.eof:
        raise ValueError("it is longer than it should be, or its end is missing")
    return out


@dataclass(frozen=True)
class ChunkIndex:
    """Where every chunk lies in the file, as arrays in grid order. `offset` -1 = never written (the fill value)."""

    offset: np.ndarray
    n_bytes: np.ndarray
    filter_mask: np.ndarray


def _telling(index: ChunkIndex, written: np.ndarray) -> list[int]:
    """A few chunks whose content is least likely to be found elsewhere: those that pack worst, and some far apart."""
    largest = written[np.argsort(-index.n_bytes[written], kind="stable")[:8]]
    spread = written[np.linspace(0, len(written) - 1, 8).astype(int)]
    return list(dict.fromkeys([*largest.tolist(), *spread.tolist()]))


class Reader:
    """Rows of one dataset, whatever its layout: each chunk is read and inflated exactly once.

    `read_index` comes first, once. Then nothing here changes but the count of decoded chunks, and threads may call
    `read_group` at once: it decodes `group_rows` rows together. Rows come out (..., W, H); `is_hw` says that they are
    stored (..., H, W).
    """

    def __init__(
        self,
        dataset: "StoredDataset",
        handle: int | Callable[[int, int], bytes],
        *,
        is_hw: bool = False,
    ) -> None:
        self.dataset = dataset
        self.pread = handle if callable(handle) else partial(os.pread, handle)  # (bytes, offset)
        self.is_hw = is_hw
        self.filters = dataset.filters
        self.dtype = dataset.dtype
        self.n_rows = dataset.shape[0]
        self.row_shape = dataset.shape[1:]  # as stored
        self.chunk = dataset.chunks or (
            1,
            *self.row_shape,
        )  # a contiguous dataset is read as chunks of one row
        self.grid = tuple(-(-s // c) for s, c in zip(dataset.shape, self.chunk, strict=True))
        self.n_tiles = math.prod(self.grid[1:])
        self.tile_bytes = math.prod(self.chunk[1:]) * self.dtype.itemsize  # of one row
        self.chunk_bytes = self.chunk[0] * self.tile_bytes
        self.fill = np.full(1, dataset.fill_value, self.dtype).tobytes()
        padded_row = self.n_tiles * self.tile_bytes
        self.needs_scratch = self.chunk[0] * padded_row > MAX_GROUP_BYTES and self.chunk[0] > 1
        self.group_rows = (
            max(1, MAX_GROUP_BYTES // 2 // padded_row) if self.needs_scratch else self.chunk[0]
        )
        self.index: ChunkIndex | None = None  # None: the bytes come through h5py
        self.scratch: IO[bytes] | None = None
        self.n_decoded = 0
        self.lock = threading.Lock()  # of the count

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("dataset", "lock")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())

    def close(self) -> None:
        if self.scratch:
            self.scratch.close()

    @property
    def can_travel(self) -> bool:
        """Whether another process on this machine can read the rows without HDF5."""
        return self.index is not None and isinstance(self.pread, partial) and not self.needs_scratch

    def read_index(self) -> None:
        """Find out where the chunks lie, if they can be read without HDF5. Raises Damaged or Unreadable.

        HDF5 before 1.14.4 leaves the user block out of what it says, so an index is believed only where chunks that
        h5py reads were seen to lie: with the user block or without, and not with both, as where all is 0. Otherwise
        the chunks come through h5py, which also knows what to say of a damaged file.
        """
        index = self._claimed_index()
        if index is None:
            return
        written = np.flatnonzero(index.offset >= 0)
        if not len(written):
            self.index = index
            return
        bases = sorted({0, self.dataset.user_block_bytes})
        n_unpacked = n_seen = 0
        for k in _telling(index, written):
            found = {base: self._unpacked_at(k, index, base) for base in bases}
            if all(chunk is None for chunk in found.values()):
                continue  # a damaged one, or a bomb that HDF5 would unpack whole: when its turn comes it is named
            n_unpacked += 1
            try:
                expected = self._through_hdf5(k)
            except Unreadable:
                continue
            bases = [
                base
                for base, chunk in found.items()
                if chunk is not None and self._are_same(k, chunk, expected)
            ]
            n_seen += 1
            if len(bases) < 2:
                break
        if not n_unpacked:
            raise Damaged("none of the chunks that were looked at can be unpacked")
        if n_seen and len(bases) == 1:
            index.offset[written] += bases[0]
            self.index = index

    def _claimed_index(self) -> ChunkIndex | None:
        """What HDF5 says, which is yet to be seen; None where the chunks cannot be read without it."""
        if self.filters not in DIRECT_FILTERS or self.dataset.is_elsewhere:
            return None
        if self.dataset.chunks:
            return self.dataset.chunk_index(self.grid)
        start = self.dataset.contiguous_offset()
        if start is None:
            return None
        offset = start + np.arange(self.n_rows, dtype=np.int64) * self.chunk_bytes
        return ChunkIndex(offset, np.full_like(offset, self.chunk_bytes), np.zeros_like(offset))

    def _check_claim(self, n_bytes: int) -> None:
        """Before memory is taken for it."""
        if n_bytes > 2 * self.chunk_bytes + 4096:
            raise Damaged(f"a chunk claims {n_bytes} compressed bytes for {self.chunk_bytes}")

    def _unpacked_at(self, k: int, index: ChunkIndex, base: int) -> np.ndarray | None:
        """What lies at the offset of chunk `k`, counted from `base`; None where that is no chunk."""
        n_bytes = int(index.n_bytes[k])
        try:
            self._check_claim(n_bytes)
            unpacked = self._undo(
                self._pread(n_bytes, int(index.offset[k]) + base), int(index.filter_mask[k])
            )
        except Damaged:
            return None
        return np.frombuffer(unpacked, self.dtype).reshape(self.chunk)

    def _are_same(self, k: int, chunk: np.ndarray, other: np.ndarray) -> bool:
        """Two readings of chunk `k`, bit for bit, without the padding at the edges of the dataset."""
        ends = (
            min(n, s - b)
            for n, s, b in zip(
                self.chunk, (self.n_rows, *self.row_shape), self._begin(k), strict=True
            )
        )
        inside = tuple(slice(0, end) for end in ends)
        return chunk[inside].tobytes() == other[inside].tobytes()

    def _begin(self, k: int) -> tuple[int, ...]:
        """The first element of chunk `k`."""
        return tuple(
            int(g) * c for g, c in zip(np.unravel_index(k, self.grid), self.chunk, strict=True)
        )

    def _unpack(self, first: int, places: Sequence[np.ndarray] | np.ndarray) -> None:
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
            for t, (data, mask) in enumerate(
                zip(stored, index.filter_mask[part].tolist(), strict=True), lo
            ):
                unpacked = (
                    self.fill * (self.chunk_bytes // len(self.fill))
                    if data is None
                    else self._undo(data, mask)
                )
                places[t][...] = np.frombuffer(unpacked, self.dtype).reshape(self.chunk)

    def _stored(self, offsets: np.ndarray, sizes: np.ndarray) -> Iterator[memoryview | None]:
        """The stored bytes of these chunks, in one read where they lie together. None: never written."""
        self._check_claim(int(sizes.max()))
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
            raise Damaged("the file ends inside a chunk")
        return memoryview(data)

    def _undo(self, data: Any, mask: int) -> Any:
        """Undo the filters of one stored chunk, last one first, except those its mask says were skipped."""
        for i in reversed(range(len(self.filters))):
            if mask >> i & 1:
                continue
            if self.filters[i] == DEFLATE:
                data = inflate(data, self.chunk_bytes)
            elif len(data) == self.chunk_bytes:
                data = np.frombuffer(data, np.uint8).reshape(self.dtype.itemsize, -1).T.tobytes()
        if len(data) != self.chunk_bytes:
            raise Damaged(f"a chunk holds {len(data)} bytes, expected {self.chunk_bytes}")
        return data

    def _through_hdf5(self, k: int) -> np.ndarray:
        """One chunk as h5py decodes it, padded with 0 to its full shape."""
        out = np.zeros(self.chunk, self.dtype)
        part = self.dataset.read(self._begin(k), self.chunk)
        out[tuple(slice(0, n) for n in part.shape)] = part
        return out

    def read_group(self, group: int) -> np.ndarray:
        """Rows [group * group_rows, ...) as an array (rows, ..., W, H) in native byte order."""
        start, stop = group * self.group_rows, min((group + 1) * self.group_rows, self.n_rows)
        if self.scratch:
            cuts = [
                start,
                *range((start // self.chunk[0] + 1) * self.chunk[0], stop, self.chunk[0]),
                stop,
            ]
            return np.concatenate([self._band(lo, hi) for lo, hi in pairwise(cuts)])
        rows, tiles = self._empty_rows(self.chunk[0])
        self._unpack(group * self.n_tiles, tiles)
        return self._cropped(rows[: stop - start])

    def _empty_rows(self, n_rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows with the padding of edge tiles, and the views of them that tiles go into."""
        tile = self.chunk[1:]
        rows = np.empty(
            (n_rows, *(g * c for g, c in zip(self.grid[1:], tile, strict=True))), self.dtype
        )
        corners = product(*(range(0, g * c, c) for g, c in zip(self.grid[1:], tile, strict=True)))
        return rows, [
            rows[:, *(slice(b, b + c) for b, c in zip(corner, tile, strict=True))]
            for corner in corners
        ]

    def _cropped(self, rows: np.ndarray) -> np.ndarray:
        inside = rows[:, *(slice(0, s) for s in self.row_shape)]
        native = inside.astype(self.dtype.newbyteorder("="), copy=False)
        return native.swapaxes(-1, -2) if self.is_hw else native

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
        n_bytes = (stop - start) * self.tile_bytes
        for t, tile in enumerate(tiles, group * self.n_tiles):
            at = t * self.chunk_bytes + skipped * self.tile_bytes
            line = os.pread(self.scratch.fileno(), n_bytes, at)
            tile[...] = np.frombuffer(line, self.dtype).reshape(tile.shape)
        return self._cropped(rows)
