"""Texts of many rows in two arrays, as they lie on disk: no Python object a row.

    offsets  [N + 1] int64      text k is the bytes offsets[k] .. offsets[k + 1]
    utf8     [n_bytes] uint8    all of them, one behind the other

A million paths of 60 bytes are 68 MB so, and some 110 MB as a list of str.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

BLOCK_ROWS = 16384  # worked on at once: what is needed beside the texts stays small
MAX_HASHED_BYTES = 1 << 16  # of one text; further bytes have the weights of the first ones


class Texts:
    """N texts, read-only. `texts[k]` is a str; `take` gives others of the same kind."""

    __slots__ = ("offsets", "utf8")

    def __init__(self, offsets: np.ndarray, utf8: np.ndarray) -> None:
        """offsets: [N + 1] int64 or <u8. utf8: [n_bytes] uint8. Neither is copied.

        Raises ValueError where they are not of each other. Whether the bytes are UTF-8 is seen
        once a text is asked for.
        """
        offsets = np.ascontiguousarray(offsets)
        is_whole = offsets.dtype.kind in "iu" and offsets.dtype.itemsize == 8
        if offsets.ndim != 1 or not len(offsets) or not is_whole:
            raise ValueError("offsets of texts are 64-bit whole numbers, one more than texts")
        if utf8.ndim != 1 or utf8.dtype != np.uint8:
            raise ValueError("the bytes of texts are uint8")
        offsets = offsets.astype(offsets.dtype.newbyteorder("="), copy=False).view(np.int64)
        starts = offsets[:-1]
        ends = offsets[1:]
        if offsets[0] != 0 or offsets[-1] != len(utf8) or bool(np.any(ends < starts)):
            raise ValueError("offsets of texts do not fit their bytes")
        self.offsets = offsets
        self.utf8 = utf8

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> "Texts":
        """The texts of any iterable, which is gone through once, a block at a time."""
        utf8 = bytearray()
        lengths = bytearray()
        remaining = iter(strings)
        while block := [str(text).encode() for text in islice(remaining, BLOCK_ROWS)]:
            utf8 += b"".join(block)
            lengths += np.array([len(text) for text in block], np.int64).tobytes()
        return cls.from_lengths(np.frombuffer(lengths, np.int64), np.frombuffer(utf8, np.uint8))

    @classmethod
    def from_lengths(cls, lengths: np.ndarray, utf8: np.ndarray) -> "Texts":
        """lengths: [N] in bytes."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(offsets, utf8)

    @classmethod
    def empty(cls, n_rows: int) -> "Texts":
        """That many texts without a letter."""
        return cls(np.zeros(n_rows + 1, np.int64), np.zeros(0, np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        """Raises IndexError, or UnicodeDecodeError where its bytes are no text."""
        n_rows = len(self)
        if not -n_rows <= row < n_rows:
            raise IndexError(f"text {row} of {n_rows}")
        row %= n_rows
        return self.utf8[self.offsets[row] : self.offsets[row + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), BLOCK_ROWS):
            bounds = self.offsets[first : first + BLOCK_ROWS + 1]
            data = self.utf8[bounds[0] : bounds[-1]].tobytes()
            ends = (bounds - bounds[0]).tolist()
            for k in range(len(ends) - 1):
                yield data[ends[k] : ends[k + 1]].decode()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Texts):
            return NotImplemented
        same_lengths = np.array_equal(self.offsets, other.offsets)
        return same_lengths and np.array_equal(self.utf8, other.utf8)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} texts, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.offsets.nbytes + self.utf8.nbytes

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64: bytes of each text."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Texts":
        """The texts of these rows, [M] whole numbers >= 0, in that order. Raises IndexError."""
        rows = np.asarray(rows)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {rows.min()} .. {rows.max()} of {len(self)} texts")
        rows = rows.astype(np.int64, copy=False)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.offsets[rows + 1] - self.offsets[rows], out=offsets[1:])
        utf8 = np.empty(offsets[-1], np.uint8)
        for first in range(0, len(rows), BLOCK_ROWS):
            block = rows[first : first + BLOCK_ROWS]
            bounds = offsets[first : first + len(block) + 1]
            # Byte j of the block lies so far from byte j of where its text is taken from.
            shifts = self.offsets[block] - bounds[:-1]
            places = np.arange(bounds[0], bounds[-1]) + np.repeat(shifts, np.diff(bounds))
            np.take(self.utf8, places, out=utf8[bounds[0] : bounds[-1]])
        return Texts(offsets, utf8)

    def hashes(self) -> np.ndarray:
        """[N] uint64: equal for equal texts; for others the chance is some 2 ** -57 a pair.

        The sum of each byte (from 1) by the weight of its place, modulo 2 ** 64: the same in every
        process and version.
        """
        found = np.zeros(len(self), np.uint64)
        for first in range(0, len(self), BLOCK_ROWS):
            bounds = self.offsets[first : first + BLOCK_ROWS + 1]
            lengths = np.diff(bounds)
            places = np.arange(bounds[-1] - bounds[0]) - np.repeat(bounds[:-1] - bounds[0], lengths)
            weights = _weights(min(int(lengths.max(initial=1)), MAX_HASHED_BYTES))
            products = self.utf8[bounds[0] : bounds[-1]].astype(np.uint64)
            products += np.uint64(1)
            products *= weights[places % len(weights)]
            # np.add.reduceat gives no 0 for a text without bytes: those are left out.
            is_there = lengths > 0
            if is_there.any():
                starts = (bounds[:-1] - bounds[0])[is_there]
                found[first : first + len(lengths)][is_there] = np.add.reduceat(products, starts)
        return found


def _weights(n: int) -> np.ndarray:
    """[n] uint64: splitmix64 of 1 .. n, which look random."""
    mixed = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
