"""Many rows of many shards in one copy.

Every shard is a memory map of its own, somewhere in the address space. Seen from the lowest of
their addresses, all of them together are one long array of bytes, with gaps that belong to others:

    low                                                                                      high
    |  rgb-00000  |   others'   |  depth-00001  |  rgb-00001  |   others'   |  depth-00000   |
       [piece][piece][piece]       [piece][piece]   ^ a piece may begin at any byte

    pieces[i]  =  the bytes  low + i  ...  low + i + piece        overlapping, strides (1, 1)

A row is a whole number of pieces, so a batch of any rows of any fields is one list of piece numbers
and one `index_select`: one pass over memory, outside Python's lock, which torch divides among its
threads. The plain way to say the same is `take_rows` below, against which this is tested.

Invariant: a piece number is only ever computed from a row that exists, so that its bytes lie
inside one shard. What lies between the shards may be anybody's memory or none at all.

Never do anything else to `pieces`: not even `pieces.sum()`, printing it, pickling it or moving it
to a device. It spans memory that is not mapped, and reading there ends the process. It lives no
longer than the maps it was made from, and is given to nobody.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# torch gives whole pieces to its threads below this many elements, and divides each of them above.
PIECE_BELOW = 32768


class RowGather:
    """The shards of some fields as one table of pieces; made as a whole, then never changed."""

    def __init__(self, shards: Mapping[str, Sequence[np.ndarray]], size: int) -> None:
        """shards: of each field, in row order, [n, ..., size, size]; all but the last equal."""
        self._shards = {field: list(maps) for field, maps in shards.items()}
        every = [shard for maps in self._shards.values() for shard in maps]
        low = min(shard.ctypes.data for shard in every)
        high = max(shard.ctypes.data + shard.nbytes for shard in every)
        self._low = low
        self._starts = {
            field: np.array([shard.ctypes.data for shard in maps]) - low
            for field, maps in self._shards.items()
        }
        self._piece_bytes = piece_bytes(size)
        self._pieces = _pieces_between(low, high, self._piece_bytes)

    def into(
        self, fields: Sequence[str], rows: np.ndarray, buffer: memoryview | None = None
    ) -> np.ndarray:
        """The bytes of these rows, field after field, the widest type first.

        rows [B]: numbers of rows that exist; nothing checks them again. Returns [n] uint8.
        """
        import torch

        index = self._piece_numbers(fields, rows)
        n_bytes = len(index) * self._piece_bytes
        # Python's lock is let go only for the copy (as numpy does above 500 numbers, and torch for
        # every operation): to get it back beside a training step that holds it takes 5 ms.
        out = (
            np.empty(n_bytes, np.uint8)
            if buffer is None
            else np.frombuffer(buffer, np.uint8, n_bytes)
        )
        into = torch.from_numpy(out.reshape(len(index), self._piece_bytes))
        torch.index_select(self._pieces, 0, torch.from_numpy(index), out=into)
        return out

    def row_spans(self, fields: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows [B] of these fields lie: (addresses, n_bytes), each [B * fields] int64.

        What is in memory is not looked at. rows: as in `into`.
        """
        addresses = []
        n_bytes = []
        for field in fields:
            rows_per_shard = len(self._shards[field][0])
            starts = self._low + self._starts[field][rows // rows_per_shard]
            addresses.append(starts + rows % rows_per_shard * self._row_bytes(field))
            n_bytes.append(np.full(len(rows), self._row_bytes(field)))
        return np.concatenate(addresses), np.concatenate(n_bytes)

    def _piece_numbers(self, fields: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Where the pieces of these rows begin, from the lowest address [B * pieces of a row]."""
        n_pieces = {field: self._row_bytes(field) // self._piece_bytes for field in fields}
        index = np.empty(len(rows) * sum(n_pieces.values()), np.int64)
        at = 0
        for field in widest_first(fields, self._shards):
            rows_per_shard = len(self._shards[field][0])
            shard_starts = self._starts[field][rows // rows_per_shard]
            row_starts = shard_starts + rows % rows_per_shard * self._row_bytes(field)
            end = at + len(rows) * n_pieces[field]
            for k in range(n_pieces[field]):
                index[at + k : end : n_pieces[field]] = row_starts + k * self._piece_bytes
            at = end
        return index

    def _row_bytes(self, field: str) -> int:
        return self._shards[field][0][0].nbytes


def take_rows(
    shards: Mapping[str, Sequence[np.ndarray]], fields: Sequence[str], rows: np.ndarray
) -> bytes:
    """What `RowGather.into` gives, said plainly: the reference that it is tested against."""
    taken = [
        np.take(np.concatenate(shards[field]), rows, axis=0)
        for field in widest_first(fields, shards)
    ]
    return b"".join(each.tobytes() for each in taken)


def widest_first(fields: Sequence[str], shards: Mapping[str, Sequence[np.ndarray]]) -> list[str]:
    """In the order in which they lie in a batch: so all of them are aligned."""
    return sorted(fields, key=lambda field: -shards[field][0].itemsize)


def piece_bytes(size: int) -> int:
    """The largest number of whole picture lines below PIECE_BELOW that divides every row."""
    lines = max(n for n in range(1, size + 1) if size % n == 0 and size * n < PIECE_BELOW)
    return size * lines


def _pieces_between(low: int, high: int, n_bytes: int) -> Any:
    """[high - low - n_bytes + 1, n_bytes] uint8: a piece at every byte, none of them copied."""
    import torch

    whole = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
    return torch.from_numpy(whole).as_strided((high - low - n_bytes + 1, n_bytes), (1, 1))
