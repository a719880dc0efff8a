"""Texts of many rows in two arrays, as they lie on disk: no Python object a row.

    offsets  [N + 1] int64      text k is the bytes offsets[k] .. offsets[k + 1]
    utf8     [n_bytes] uint8    all of them, one behind the other

A million paths of 60 bytes are 68 MB so, and some 110 MB as a list of str.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

BLOCK_ROWS = 16384  # worked on at once: what is needed beside the texts stays small
HASHED_ROWS = 2048


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

    def are_utf8(self) -> bool:
        """Whether each of them can be asked for."""
        starts = self.offsets[:-1][self.lengths > 0]
        if np.any((self.utf8[starts] & 0xC0) == 0x80):  # in the middle of a character
            return False
        try:
            for first in range(0, len(self), BLOCK_ROWS):
                last = min(first + BLOCK_ROWS, len(self))
                self.utf8[self.offsets[first] : self.offsets[last]].tobytes().decode()
        except UnicodeDecodeError:
            return False
        return True

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
        """[N] uint64: equal for equal texts; for others the chance is some 2 ** -64 a pair.

        The same in every process and version.
        """
        found = np.empty(len(self), np.uint64)
        for first in range(0, len(self), HASHED_ROWS):
            bounds = self.offsets[first : first + HASHED_ROWS + 1]
            data = self.utf8[bounds[0] : bounds[-1]]
            found[first : first + HASHED_ROWS] = _hashes(bounds - bounds[0], data)
        return found


def _hashes(offsets: np.ndarray, utf8: np.ndarray) -> np.ndarray:
    """Of each text: the sum of its words of 8 bytes, each mixed with its place, and its length."""
    lengths = np.diff(offsets)
    padded = np.zeros(len(utf8) + 8, np.uint8)
    padded[: len(utf8)] = utf8
    # A word at every byte: strides of 1, as texts begin anywhere.
    words_at = np.ndarray((len(utf8) + 1,), "<u8", padded, strides=(1,))

    n_words = (lengths + 7) // 8
    first_words = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(n_words, out=first_words[1:])
    places = np.arange(first_words[-1]) - np.repeat(first_words[:-1], n_words)
    words = words_at[np.repeat(offsets[:-1], n_words) + 8 * places].astype(np.uint64)

    # The last word of a text ends with the next one's bytes: away with them.
    is_text = n_words > 0
    last_words = (first_words[1:] - 1)[is_text]
    n_foreign = (8 * n_words - lengths)[is_text].astype(np.uint64)
    words[last_words] &= np.uint64(2**64 - 1) >> (np.uint64(8) * n_foreign)

    mixed = _mixed(words ^ _mixed(places.astype(np.uint64)))
    found = _mixed(lengths.astype(np.uint64))
    if len(last_words):
        found[is_text] += np.add.reduceat(mixed, first_words[:-1][is_text])
    return _mixed(found)


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64 of each, uint64: a change of one bit changes half of them."""
    mixed = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
