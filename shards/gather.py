"""Many rows of many shards in one copy.

Shards lie in a range of addresses of their own (shards/maps.py); what is decoded, or mapped where
there are no such ranges, lies somewhere. Seen from the lowest of all their addresses they are one
long array of bytes, with gaps where nothing is mapped, or which belong to others:

    low                                                                                      high
    |  rgb-00000  |             |  rgb-00002  |             |  depth-00000  |  depth-00001  |
       [piece][piece][piece]       [piece][piece]   ^ a piece may begin at any byte

    pieces[i]  =  the bytes  low + i  ...  low + i + piece        overlapping, strides (1, 1)

A row is a whole number of pieces, so a batch of any rows of any fields is one list of piece numbers
and one `index_select`: one pass over memory, outside Python's lock, which torch divides among its
threads. The plain way to say the same is `take_rows` below, against which this is tested. The
table spans shards that are mapped later, so it never changes.

Invariant: a piece number is only ever computed from a row that exists, after its shard was mapped,
so that its bytes lie inside one shard.

Never do anything else to `pieces`: not even `pieces.sum()`, printing it, pickling it or moving it
to a device. It spans memory that is not mapped, and reading there ends the process. It lives no
longer than the shards it was made from, and is given to nobody.
"""

import ctypes
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from shards.containers import ShardSequence
from shards.maps import MappedShards
from shards.readahead import advise, whole_pages

# torch gives whole pieces to its threads below this many elements, and divides each of them above.
PIECE_BELOW = 32768


class PlacedShards(Protocol):
    """The shards of a field, where they lie or will lie."""

    row_bytes: int
    itemsize: int
    low: int  # no shard lies below it
    high: int  # nor beyond

    def addresses(self, rows: np.ndarray) -> np.ndarray:
        """[B] int64: of the first byte of each of these rows, which are there from now on."""

    def count_reads(self, rows: np.ndarray) -> None:
        """These rows [B] are about to be touched."""

    def expect_no_order(self, rows: np.ndarray) -> None:
        """Have the shards of these rows [B] read from the disk as they are touched, and no more."""

    def expects_order(self, rows: np.ndarray) -> bool:
        """Whether that was said of none of the shards of these rows [B]."""


class HeldShards:
    """Shards that are there already: decoded, or mapped by numpy."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        """arrays: in row order, [n, ...]."""
        self._arrays = list(arrays)
        self._starts = np.array([array.ctypes.data for array in self._arrays], np.int64)
        self._rows_per_shard = len(self._arrays[0])
        self.row_bytes = self._arrays[0][0].nbytes
        self.itemsize = self._arrays[0].itemsize
        self.low = min(array.ctypes.data for array in self._arrays)
        self.high = max(array.ctypes.data + array.nbytes for array in self._arrays)
        self._is_random = np.zeros(len(self._arrays), bool)  # what the kernel was told of each

    def addresses(self, rows: np.ndarray) -> np.ndarray:
        """[B] int64: of the first byte of each of these rows."""
        shards = rows // self._rows_per_shard
        found: np.ndarray = self._starts[shards] + rows % self._rows_per_shard * self.row_bytes
        return found

    def count_reads(self, rows: np.ndarray) -> None:
        """Nothing is kept of what was touched."""

    def expect_no_order(self, rows: np.ndarray) -> None:
        """Have the shards of these rows [B] read from the disk as they are touched, and no more."""
        shards = np.unique(rows // self._rows_per_shard)
        new = shards[~self._is_random[shards]]
        if len(new):
            sizes = np.array([self._arrays[shard].nbytes for shard in new])
            starts = self._starts[new]
            advise(*whole_pages(starts, starts + sizes), mmap.MADV_RANDOM)
            self._is_random[new] = True

    def expects_order(self, rows: np.ndarray) -> bool:
        """Whether that was said of none of the shards of these rows [B]."""
        return not self._is_random[rows // self._rows_per_shard].any()


class JoinedShards(ShardSequence):
    """Those of a field of several sets, whose rows are counted behind each other."""

    def __init__(self, parts: Sequence[Sequence[np.ndarray]], first_rows: np.ndarray) -> None:
        """parts: the shards of each set; rows are of one size. first_rows: [parts + 1], where the
        rows of each begin.
        """
        self.parts = parts
        self._parts = [placed(part) for part in parts]
        self._first_rows = first_rows
        self.row_bytes = self._parts[0].row_bytes
        self.itemsize = self._parts[0].itemsize
        self.low = min(part.low for part in self._parts)
        self.high = max(part.high for part in self._parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def get(self, number: int) -> np.ndarray:
        """They are counted on from set to set."""
        for part in self.parts:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(number)

    def addresses(self, rows: np.ndarray) -> np.ndarray:
        """[B] int64: of the first byte of each of these rows, which are there from now on."""
        found = np.empty(len(rows), np.int64)
        for part, is_of_part, rows_of_part in self._of_parts(rows):
            found[is_of_part] = part.addresses(rows_of_part)
        return found

    def count_reads(self, rows: np.ndarray) -> None:
        """These rows [B] are about to be touched."""
        for part, _, rows_of_part in self._of_parts(rows):
            part.count_reads(rows_of_part)

    def expect_no_order(self, rows: np.ndarray) -> None:
        """Have the shards of these rows [B] read from the disk as they are touched, and no more."""
        for part, _, rows_of_part in self._of_parts(rows):
            part.expect_no_order(rows_of_part)

    def expects_order(self, rows: np.ndarray) -> bool:
        """Whether that was said of none of the shards of these rows [B]."""
        return all(part.expects_order(of_part) for part, _, of_part in self._of_parts(rows))

    def _of_parts(self, rows: np.ndarray) -> Iterator[tuple[PlacedShards, np.ndarray, np.ndarray]]:
        """Each set, which of the rows [B] are its own, and how it counts them."""
        part_of_row = np.searchsorted(self._first_rows, rows, side="right") - 1
        for number, part in enumerate(self._parts):
            is_of_part = part_of_row == number
            yield part, is_of_part, rows[is_of_part] - self._first_rows[number]


def placed(shards: Sequence[np.ndarray]) -> PlacedShards:
    """Where the shards of a field lie: as told by themselves, else as the arrays lie."""
    if isinstance(shards, MappedShards | JoinedShards):
        return shards
    return HeldShards(shards)


class RowGather:
    """The shards of some fields as one table of pieces; made as a whole, then never changed."""

    def __init__(self, shards: Mapping[str, Sequence[np.ndarray]], size: int) -> None:
        """shards: of each field, in row order, [n, ..., size, size]; all but the last equal."""
        self._fields = {field: placed(each) for field, each in shards.items()}
        self._low = min(each.low for each in self._fields.values())
        high = max(each.high for each in self._fields.values())
        self._piece_bytes = piece_bytes(size)
        self._pieces = _pieces_between(self._low, high, self._piece_bytes)

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
        """Where these rows lie in memory, field after field; their shards are mapped now.

        rows [B]: numbers of rows that exist. Returns addresses and bytes, each [fields * B] int64.
        """
        addresses = [self._fields[field].addresses(rows) for field in fields]
        n_bytes = [np.full(len(rows), self._fields[field].row_bytes, np.int64) for field in fields]
        return np.concatenate(addresses), np.concatenate(n_bytes)

    def expect_no_order(self, fields: Sequence[str], rows: np.ndarray) -> None:
        """Map the shards of these rows [B], and have nothing read around what is touched of them.

        Said of a shard once; it holds as long as the shards are mapped.
        """
        for field in fields:
            self._fields[field].expect_no_order(rows)

    def expects_order(self, fields: Sequence[str], rows: np.ndarray) -> bool:
        """Whether that was said of none of the shards of these rows [B]."""
        return all(self._fields[field].expects_order(rows) for field in fields)

    def at_hand(self, rows: np.ndarray) -> np.ndarray:
        """Those of these rows that are not waited for: all of them, of a set of this machine."""
        return rows

    def widest_first(self, fields: Sequence[str]) -> list[str]:
        """In the order in which they lie in a batch: so all of them are aligned."""
        return sorted(fields, key=lambda field: -self._fields[field].itemsize)

    def _piece_numbers(self, fields: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Where the pieces of these rows begin, from the lowest address [B * pieces of a row]."""
        n_pieces = {field: self._fields[field].row_bytes // self._piece_bytes for field in fields}
        index = np.empty(len(rows) * sum(n_pieces.values()), np.int64)
        at = 0
        for field in self.widest_first(fields):
            self._fields[field].count_reads(rows)
            row_starts = self._fields[field].addresses(rows) - self._low
            end = at + len(rows) * n_pieces[field]
            for k in range(n_pieces[field]):
                index[at + k : end : n_pieces[field]] = row_starts + k * self._piece_bytes
            at = end
        return index


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
