"""Rows of one HDF5 dataset without HDF5: the index is found once, then a chunk is one pread.

Chunks in any filter but gzip and shuffle come through h5py, in the one thread that may call it
(`hdf5.py`): slower, never wrong.

The rows that share chunks are a *group*. Its chunks are the *tiles* of its rows. A dataset of 6
rows of 5 x 7 pixels in chunks of (2, 3, 4), numbered as in the index:

                group 0: rows 0, 1      group 1: rows 2, 3      group 2: rows 4, 5

                 4 pixels  3
               +---------+------.-+    +---------+------.-+    +---------+------.-+
      3 pixels |    0    |   1  . |    |    4    |   5  . |    |    8    |   9  . |
               +---------+------.-+    +---------+------.-+    +---------+------.-+
            2  |    2    |   3  . |    |    6    |   7  . |    |   10    |  11  . |
               |.........|........|    |.........|........|    |.........|........|
               +---------+--------+    +---------+--------+    +---------+--------+

A group is decoded into rows that have room for whole tiles: each is unpacked straight to its place
in all of its rows, and the padding (beyond the dots) is cropped from the result. A group too large
to hold is unpacked into a scratch file, chunk after chunk, and its rows come out of it a band at a
time: those of their lines that one band needs lie together in each chunk.
"""

import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from convert.sources.chunk_codec import ChunkCodec, FileBytes, PRead
from convert.sources.chunk_index import ChunkAccess, find_index
from convert.sources.chunk_layout import ChunkedDataset, ChunkGrid, ChunkIndex

MAX_GROUP_BYTES = 24 << 20  # rows decoded together; more goes through a scratch file
READ_BYTES = 4 << 20  # unpacked bytes whose chunks are read in one go


class Reader:
    """Rows of one dataset, whatever its layout: each chunk is read and inflated exactly once.

    dataset: shape (rows, ..., W, H), or (rows, ..., H, W) where `is_hw`. handle: of the same file,
    see `FileBytes`.

    `read_index` comes first, once. Then nothing here changes but the count of decoded chunks, and
    threads may call `read_group` at once: it decodes `group_rows` rows together. Where
    `needs_scratch`, `fill_scratch` comes before that.
    """

    def __init__(
        self, dataset: ChunkedDataset, handle: int | PRead, *, is_hw: bool = False
    ) -> None:
        self.is_hw = is_hw
        self.dtype = dataset.dtype
        self.n_rows = dataset.shape[0]
        self.row_shape = dataset.shape[1:]  # as stored

        # A contiguous dataset is read as chunks of one row.
        chunk_shape = dataset.chunks or (1, *self.row_shape)
        self.grid = ChunkGrid(dataset.shape, chunk_shape)
        self.chunk_rows = chunk_shape[0]
        self.tile_bytes = math.prod(chunk_shape[1:]) * self.dtype.itemsize  # of one row
        self.chunk_bytes = self.chunk_rows * self.tile_bytes
        self.chunks_per_read = max(1, READ_BYTES // self.chunk_bytes)
        self.fill = np.full(1, dataset.fill_value, self.dtype).tobytes()

        self.group_rows = _rows_together(self.chunk_rows, self.grid.n_tiles * self.tile_bytes)
        self.needs_scratch = self.group_rows < self.chunk_rows

        self.codec = ChunkCodec(dataset.filters, self.dtype, chunk_shape, self.chunk_bytes)
        self.file_bytes = FileBytes(handle)
        # None in a helper process, which does without HDF5.
        self.access: ChunkAccess | None = ChunkAccess(
            dataset=dataset, grid=self.grid, codec=self.codec, file_bytes=self.file_bytes
        )
        self.index: ChunkIndex | None = None  # None: the chunks come through h5py
        self.scratch: IO[bytes] | None = None
        self.n_decoded = 0
        self.lock = threading.Lock()  # of the count

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["access"] = None
        del state["lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()

    def close(self) -> None:
        """Give the scratch file back."""
        if self.scratch:
            self.scratch.close()

    @property
    def can_travel(self) -> bool:
        """Whether another process on this machine can read the rows without HDF5."""
        return self.index is not None and self.file_bytes.has_descriptor and not self.needs_scratch

    @property
    def scratch_bytes(self) -> int:
        """What the scratch file will take on the disk."""
        return self.grid.n_chunks * self.chunk_bytes if self.needs_scratch else 0

    def read_index(self) -> None:
        """Find out where the chunks lie, if they can be read without HDF5.

        Raises Damaged or Unreadable.
        """
        assert self.access is not None
        self.index = find_index(self.access)

    def read_through_hdf5(self, k: int) -> np.ndarray:
        """Chunk `k` as h5py decodes it, padded with 0 to its full shape. Raises Unreadable."""
        assert self.access is not None
        return self.access.through_hdf5(k)

    def read_group(self, group: int) -> np.ndarray:
        """Rows from `group * group_rows` on, `group_rows` of them or what is left.

        Returns an array (rows, ..., W, H) in native byte order. Raises Damaged, Unreadable or
        OSError.
        """
        start = group * self.group_rows
        stop = min(start + self.group_rows, self.n_rows)
        if self.scratch:
            bands = [self._read_band(first, last) for first, last in self._bands(start, stop)]
            return np.concatenate(bands)

        rows, tiles = self._empty_rows(self.chunk_rows)
        self._unpack(group * self.grid.n_tiles, tiles)
        return self._finished(rows[: stop - start])

    def _empty_rows(self, n_rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows with the padding of edge tiles, and the views that tiles go into."""
        rows = np.empty((n_rows, *self.grid.padded_row_shape), self.dtype)
        tiles = [rows[:, *tile] for tile in self.grid.tiles]
        return rows, tiles

    def _finished(self, rows: np.ndarray) -> np.ndarray:
        """Decoded rows as they are given out: no padding, native byte order, (..., W, H)."""
        inside = rows[:, *(slice(0, side) for side in self.row_shape)]
        native = inside.astype(self.dtype.newbyteorder("="), copy=False)
        return native.swapaxes(-1, -2) if self.is_hw else native

    # ------------------------------------------------------------ chunks

    def _unpack(self, first_chunk: int, places: Sequence[np.ndarray] | np.ndarray) -> None:
        """Chunks first_chunk, first_chunk + 1, ... into these places, of the shape of a chunk."""
        with self.lock:
            self.n_decoded += len(places)

        if self.index is None:
            for k, place in enumerate(places, first_chunk):
                place[...] = self.read_through_hdf5(k)
            return

        for start in range(0, len(places), self.chunks_per_read):
            run = places[start : start + self.chunks_per_read]
            self._unpack_run(self.index, first_chunk + start, run)

    def _unpack_run(
        self, index: ChunkIndex, first_chunk: int, places: Sequence[np.ndarray] | np.ndarray
    ) -> None:
        """Chunks that are read in one go where they lie together."""
        run = slice(first_chunk, first_chunk + len(places))
        stored = self._stored(index.offset[run], index.n_bytes[run])
        filter_masks = index.filter_mask[run].tolist()
        for place, data, filter_mask in zip(places, stored, filter_masks, strict=True):
            if data is None:
                place[...] = self.codec.as_elements(self._unwritten_chunk())
            else:
                place[...] = self.codec.unpack(data, filter_mask)

    def _unwritten_chunk(self) -> bytes:
        return self.fill * (self.chunk_bytes // len(self.fill))

    def _stored(self, offsets: np.ndarray, sizes: np.ndarray) -> Iterator[memoryview | None]:
        """The stored bytes of these chunks, one after the other. None: never written."""
        self.codec.check_claim(int(sizes.max()))
        low, block = self._block_of(offsets, sizes)
        for offset, n_bytes in zip(offsets.tolist(), sizes.tolist(), strict=True):
            if offset < 0:
                yield None
            elif block is None:
                yield self.file_bytes.read(n_bytes, offset)
            else:
                yield block[offset - low : offset - low + n_bytes]

    def _block_of(self, offsets: np.ndarray, sizes: np.ndarray) -> tuple[int, memoryview | None]:
        """(Offset, bytes) of the part of the file that has these chunks.

        No bytes where they lie too far apart: each is then read by itself.
        """
        is_written = offsets >= 0
        if not is_written.any():
            return 0, None

        low = int(offsets[is_written].min())
        high = int((offsets + sizes)[is_written].max())
        wanted_bytes = int(sizes[is_written].sum())
        if high - low > 2 * wanted_bytes:
            return low, None
        return low, self.file_bytes.read(high - low, low)

    # ------------------------------------------------------------ the scratch file

    def fill_scratch(self, directory: Path, run: Callable[..., Any] = map) -> None:
        """Unpack every chunk once into a nameless file, in the order of the grid.

        run: a map, such as a pool's. Raises Damaged, Unreadable, or OSError where the disk is full.
        """
        self.scratch = tempfile.TemporaryFile(dir=directory, buffering=0)
        firsts = range(0, self.grid.n_chunks, self.chunks_per_read)
        # A map does nothing until it is asked for its results.
        for _ in run(self._copy_to_scratch, firsts):
            pass

    def _copy_to_scratch(self, first_chunk: int) -> None:
        assert self.scratch is not None
        n_chunks = min(self.chunks_per_read, self.grid.n_chunks - first_chunk)
        unpacked = np.empty(n_chunks * self.chunk_bytes, np.uint8)
        self._unpack(
            first_chunk, unpacked.view(self.dtype).reshape(n_chunks, *self.grid.chunk_shape)
        )
        _write_all(self.scratch.fileno(), unpacked.data, first_chunk * self.chunk_bytes)

    def _bands(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows start .. stop, cut where other chunks begin."""
        while start < stop:
            next_chunk = (start // self.chunk_rows + 1) * self.chunk_rows
            end = min(next_chunk, stop)
            yield start, end
            start = end

    def _read_band(self, start: int, stop: int) -> np.ndarray:
        """Rows start .. stop, which share their chunks, from the scratch file."""
        assert self.scratch is not None
        chunk_row, n_skipped = divmod(start, self.chunk_rows)
        first_chunk = chunk_row * self.grid.n_tiles
        rows, tiles = self._empty_rows(stop - start)
        n_bytes = (stop - start) * self.tile_bytes
        for k, tile in enumerate(tiles, first_chunk):
            offset = k * self.chunk_bytes + n_skipped * self.tile_bytes
            data = os.pread(self.scratch.fileno(), n_bytes, offset)
            tile[...] = np.frombuffer(data, self.dtype).reshape(tile.shape)
        return self._finished(rows)


def _rows_together(chunk_rows: int, padded_row_bytes: int) -> int:
    """How many rows are decoded at once: those that share chunks, or fewer of them."""
    if chunk_rows * padded_row_bytes <= MAX_GROUP_BYTES:
        return chunk_rows
    half = MAX_GROUP_BYTES // 2  # the bands that a group is put together from are held beside it
    return min(chunk_rows, max(1, half // padded_row_bytes))


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    """`os.pwrite` may write a part only."""
    n_written = 0
    while n_written < len(data):
        n_written += os.pwrite(handle, data[n_written:], offset + n_written)
