"""How one HDF5 dataset lies in chunks: plain facts, without HDF5, for every module here."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Protocol

import numpy as np

Block = tuple[slice, ...]


def ceil_div(total: int, each: int) -> int:
    """How many parts of size `each` hold `total`; the last one may be part empty."""
    return -(-total // each)


def block_at(first: tuple[int, ...], shape: tuple[int, ...]) -> Block:
    """The block of `shape` whose first element is `first`, as what an array is indexed with."""
    return tuple(slice(begin, begin + side) for begin, side in zip(first, shape, strict=True))


@dataclass(frozen=True)
class ChunkGrid:
    """A dataset of `shape` (rows, ...) cut into chunks of `chunk_shape`, numbered in C order.

    Chunks at the edges reach beyond the dataset: what lies outside is padding.
    """

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]

    @cached_property
    def n_along(self) -> tuple[int, ...]:
        """The number of chunks along each axis."""
        sides = zip(self.shape, self.chunk_shape, strict=True)
        return tuple(ceil_div(side, chunk_side) for side, chunk_side in sides)

    @property
    def n_chunks(self) -> int:
        return math.prod(self.n_along)

    @property
    def n_tiles(self) -> int:
        """The number of chunks that hold one row."""
        return math.prod(self.n_along[1:])

    @cached_property
    def padded_row_shape(self) -> tuple[int, ...]:
        """The shape of a row with the padding of the chunks at its edges."""
        sides = zip(self.n_along[1:], self.chunk_shape[1:], strict=True)
        return tuple(n * chunk_side for n, chunk_side in sides)

    @cached_property
    def tiles(self) -> list[Block]:
        """Where in a padded row the tiles lie that its chunks hold, in the order of the chunks."""
        tile_shape = self.chunk_shape[1:]
        sides = zip(self.padded_row_shape, tile_shape, strict=True)
        begins_along = [range(0, padded_side, tile_side) for padded_side, tile_side in sides]
        return [block_at(corner, tile_shape) for corner in product(*begins_along)]

    def first_element(self, k: int) -> tuple[int, ...]:
        """Where in the dataset chunk `k` begins."""
        place = np.unravel_index(k, self.n_along)
        return tuple(int(p) * side for p, side in zip(place, self.chunk_shape, strict=True))

    def without_padding(self, k: int) -> Block:
        """The part of chunk `k` that lies in the dataset."""
        sides = zip(self.chunk_shape, self.shape, self.first_element(k), strict=True)
        return tuple(slice(0, min(chunk_side, side - begin)) for chunk_side, side, begin in sides)


@dataclass(frozen=True)
class ChunkIndex:
    """Where every chunk lies in the file, as int64 arrays in the order of the grid.

    offset: of the first byte; -1 = never written (the fill value). n_bytes: as stored. filter_mask:
    bit i is set where filter i was skipped.
    """

    offset: np.ndarray
    n_bytes: np.ndarray
    filter_mask: np.ndarray

    @property
    def written(self) -> np.ndarray:
        """The numbers of the chunks that lie in the file."""
        return np.flatnonzero(self.offset >= 0)

    def counted_from(self, base: int) -> "ChunkIndex":
        """The same chunks, where the offsets were counted from byte `base` of the file."""
        offset = np.where(self.offset >= 0, self.offset + base, -1)
        return ChunkIndex(offset, self.n_bytes, self.filter_mask)


class ChunkedDataset(Protocol):
    """What is asked of a stored dataset; `hdf5.StoredDataset` answers.

    shape: (rows, ...). chunks: of one chunk, None where the dataset is contiguous. filters: HDF5's
    numbers of them, in the order in which they were applied. is_elsewhere: its bytes lie in other
    files. user_block_bytes: what the file has before HDF5's first byte.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: tuple[int, ...] | None
    fill_value: Any
    filters: list[int]
    is_elsewhere: bool
    user_block_bytes: int

    def contiguous_offset(self) -> int | None: ...
    def chunk_index(self, grid: ChunkGrid) -> ChunkIndex: ...
    def read(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray: ...
