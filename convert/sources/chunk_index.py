"""Find out where the chunks of a dataset lie in the file, to read them without HDF5.

HDF5 says where they lie, but not always from where it counts: before 1.14.4 it leaves the user
block out (512 bytes in a .mat). So its index is only a claim, and is believed only where chunks
that h5py reads were seen to lie at their offsets: counted from the first byte of the file, or from
the end of the user block, and not from both, as where all chunks hold 0. What is not believed comes
through h5py, chunk by chunk: slower, never wrong.
"""

from dataclasses import dataclass

import numpy as np

from convert.sources.chunk_codec import ChunkCodec, FileBytes
from convert.sources.chunk_layout import ChunkedDataset, ChunkGrid, ChunkIndex
from convert.sources.errors import Damaged, Unreadable

N_LARGEST = 8  # chunks looked at because they pack worst
N_SPREAD = 8  # and because they lie far apart


@dataclass(frozen=True, kw_only=True)
class ChunkAccess:
    """The two ways to one chunk: through HDF5, and past it."""

    dataset: ChunkedDataset
    grid: ChunkGrid
    codec: ChunkCodec
    file_bytes: FileBytes

    def through_hdf5(self, k: int) -> np.ndarray:
        """Chunk `k` as h5py decodes it, padded with 0 to its full shape. Raises Unreadable."""
        out = np.zeros(self.grid.chunk_shape, self.dataset.dtype)
        part = self.dataset.read(self.grid.first_element(k), self.grid.chunk_shape)
        out[tuple(slice(0, side) for side in part.shape)] = part
        return out

    def past_hdf5(self, k: int, index: ChunkIndex) -> np.ndarray | None:
        """What lies where `index` says that chunk `k` does; None where that is no chunk."""
        n_bytes = int(index.n_bytes[k])
        try:
            self.codec.check_claim(n_bytes)
            stored = self.file_bytes.read(n_bytes, int(index.offset[k]))
            return self.codec.unpack(stored, int(index.filter_mask[k]))
        except Damaged:
            return None

    def are_same(self, k: int, chunk: np.ndarray, other: np.ndarray) -> bool:
        """Whether two readings of chunk `k` are the same bit for bit, padding left out."""
        inside = self.grid.without_padding(k)
        return chunk[inside].tobytes() == other[inside].tobytes()


def find_index(access: ChunkAccess) -> ChunkIndex | None:
    """Where the chunks lie, as was seen; None where they have to come through HDF5.

    It also knows what to say of a damaged file.
    Raises Damaged where none of the chunks looked at can be unpacked, and what
    `dataset.chunk_index` raises.
    """
    claimed = claimed_index(access)
    if claimed is None or not len(claimed.written):
        return claimed

    base = _find_base(access, claimed)
    return None if base is None else claimed.counted_from(base)


def claimed_index(access: ChunkAccess) -> ChunkIndex | None:
    """What HDF5 says, yet to be seen; None where the chunks cannot be read without it."""
    dataset = access.dataset
    if not access.codec.is_direct or dataset.is_elsewhere:
        return None
    if dataset.chunks:
        return dataset.chunk_index(access.grid)

    start = dataset.contiguous_offset()
    if start is None:
        return None
    chunk_bytes = access.codec.chunk_bytes
    offset = start + np.arange(access.grid.n_chunks, dtype=np.int64) * chunk_bytes
    return ChunkIndex(offset, np.full_like(offset, chunk_bytes), np.zeros_like(offset))


def _find_base(access: ChunkAccess, claimed: ChunkIndex) -> int | None:
    """The byte from which the claimed offsets are counted; None where that could not be seen."""
    index_from = {base: claimed.counted_from(base) for base in {0, access.dataset.user_block_bytes}}
    candidates = sorted(index_from)
    n_unpacked = 0
    n_compared = 0
    for k in _telling_chunks(claimed):
        found = {base: access.past_hdf5(k, index_from[base]) for base in candidates}
        chunks = {base: chunk for base, chunk in found.items() if chunk is not None}
        if not chunks:
            continue  # damaged, or a bomb that HDF5 would unpack whole: named when its turn comes
        n_unpacked += 1

        try:
            expected = access.through_hdf5(k)
        except Unreadable:
            continue
        n_compared += 1
        candidates = [base for base, chunk in chunks.items() if access.are_same(k, chunk, expected)]
        if len(candidates) < 2:
            break

    if not n_unpacked:
        raise Damaged("none of the chunks that were looked at can be unpacked")
    is_seen = n_compared > 0 and len(candidates) == 1
    return candidates[0] if is_seen else None


def _telling_chunks(index: ChunkIndex) -> list[int]:
    """A few chunks whose content is least likely to be found elsewhere.

    Those that pack worst, and some far apart.
    """
    written = index.written
    worst_first = np.argsort(-index.n_bytes[written], kind="stable")
    largest = written[worst_first[:N_LARGEST]]
    spread = written[np.linspace(0, len(written) - 1, N_SPREAD).astype(int)]
    each_once = dict.fromkeys([*largest.tolist(), *spread.tolist()])
    return list(each_once)
