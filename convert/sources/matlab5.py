"""Arrays of numbers and texts, and cells of them, in a MATLAB file before v7.3.

scipy reads such files too, but a damaged one ends its process: it believes the counts and types
that it reads. Here each is checked against the bytes that are there.

A file is a head of 128 bytes and elements: a type, a number of bytes, and these. An array is an
element of elements: flags, sides, name, numbers; or, of a cell array, an array a cell. It may be
compressed. The numbers are MATLAB's, first axis fastest: read the other way round they lie as in
the HDF5 of v7.3, rows first, each picture (W, H).
"""

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convert.sources.errors import BadRow, Damaged
from shards.errors import one_line

FILE_HEAD_BYTES = 128
MATRIX = 14  # MATLAB's numbers of an element's types
COMPRESSED = 15
NUMBERS = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
CELLS = 1  # and of an array's classes
STRUCT = 2
TEXT = 4
CLASSES = {
    **{6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2"},
    **{12: "i4", 13: "u4", 14: "i8", 15: "u8"},
}
# How the letters of a text are written: their codes as numbers, or UTF-8, -16, -32.
LETTERS = {2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
IS_COMPLEX = 0x08
MAX_AXES = 8
MAX_DEFLATE = 1100  # deflate never packs better than 1032 to 1
MAX_ELEMENTS = 10_000  # arrays in a file
MAX_TEXT_BYTES = 4096
MAX_NESTED = 4  # cells in a cell, each alone in its own
MAX_STRUCT_FIELDS = 256
MAX_STRUCTS = 1 << 20
BLOCK_BYTES = 1 << 16
PEEK_BYTES = 4096  # of an array, in which its name is
N_KEPT = 2  # arrays in memory: of two fields
Stamp = tuple[int, int]  # bytes, time of the last change in nanoseconds


@dataclass(frozen=True)
class Element:
    """kind: its type. body: its bytes, in memory. end: where the next one begins."""

    kind: int
    body: memoryview
    end: int


@dataclass(frozen=True, kw_only=True)
class Array:
    """One array of a file, its numbers not yet looked at.

    shape: as in HDF5, MATLAB's sides the other way round. kind: of its class. body: what comes
    behind the name. order: of bytes, "<" or ">".
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    is_complex: bool
    body: memoryview
    order: str

    @property
    def is_cells(self) -> bool:
        return self.kind == CELLS

    @property
    def may_be_pictures(self) -> bool:
        """Whether it is of cells, or of real numbers with two sides at least."""
        if self.is_cells:
            return True
        n_long = sum(side > 1 for side in self.shape)
        return self.kind in CLASSES and not self.is_complex and n_long >= 2

    def numbers(self) -> np.ndarray:
        """Of `shape`. Raises Damaged, and BadRow for what is not of real numbers."""
        if self.kind not in CLASSES or self.is_complex:
            raise BadRow("has no array of numbers there")
        element = _element(self.body, 0, self.order)
        if element.kind not in NUMBERS:
            raise Damaged(f"numbers of type {element.kind}")
        # MATLAB writes whole doubles as the smallest type that holds them.
        written = np.dtype(self.order + NUMBERS[element.kind])
        if len(element.body) != math.prod(self.shape) * written.itemsize:
            raise Damaged(f"{len(element.body)} bytes for numbers of shape {self.shape}")
        flat = np.frombuffer(element.body, written)
        return flat.astype(CLASSES[self.kind], copy=False).reshape(self.shape)

    def cell(self, k: int) -> "Array":
        """The k-th, in MATLAB's order. Raises Damaged."""
        at = 0
        for _ in range(k):
            at = _element(self.body, at, self.order).end
        return self._cell_at(at)[0]

    def texts(self) -> Iterator[str]:
        """Of each cell in MATLAB's order, whose text may be in one cell more, as MATLAB's textscan
        leaves it. Raises Damaged, and BadRow where this is no cell array of texts.
        """
        if not self.is_cells:
            raise BadRow("has no cell array there")
        n_cells = math.prod(self.shape)
        if n_cells * 8 > len(self.body):  # each has a head of 8 bytes at least
            raise Damaged(f"{n_cells} cells in {len(self.body)} bytes")
        at = 0
        for _ in range(n_cells):
            cell, at = self._cell_at(at)
            yield cell.text()

    def text(self) -> str:
        """One line of text. Raises Damaged, and BadRow where there is none."""
        found = self
        for _ in range(MAX_NESTED):
            if not found.is_cells or math.prod(found.shape) != 1:
                break
            found = found.cell(0)
        if found.kind != TEXT:
            raise BadRow("has no text there")
        if math.prod(found.shape) == 0:
            return ""
        element = _element(found.body, 0, self.order)
        encoding = LETTERS.get(element.kind)
        if encoding is None or len(element.body) > MAX_TEXT_BYTES:
            raise Damaged(f"a text of type {element.kind} and {len(element.body)} bytes")
        if encoding in ("utf-16", "utf-32"):
            encoding += "-le" if self.order == "<" else "-be"
        return bytes(element.body).decode(encoding)

    def _cell_at(self, at: int) -> tuple["Array", int]:
        """The cell that begins there, and where the next one does. Raises Damaged."""
        element = _element(self.body, at, self.order)
        if element.kind != MATRIX:
            raise Damaged(f"a cell of type {element.kind}")
        return _array(element.body, self.order), element.end


def array_names(file: Path) -> list[str]:
    """Of its arrays that may be pictures.

    Raises BadRow where the file is damaged, OSError where it cannot be read.
    """
    return [name for name, (_, is_one) in _places(file, _stamp(file)).items() if is_one]


def read_array(file: Path, name: str) -> Array:
    """One of `array_names`; the last ones are kept. Raises what that does."""
    return _read_array(file, name, _stamp(file))


def arrays_in(data: bytes) -> dict[str, Array]:
    """All arrays of a small file that was read already. Raises BadRow where it is damaged."""
    with reading():
        opened = BytesIO(data)
        order = _byte_order(opened)
        places = _list_arrays(opened, len(data), order)
        return {name: _array_at(opened, at, order) for name, (at, _) in places.items()}


def struct_texts(file: Path, name: str, field: str) -> list[str]:
    """A field of text of each struct of an array, in MATLAB's order.

    The array is unpacked a block at a time, and what is in other fields is passed over: they may be
    hundreds of megabytes. Raises BadRow where there is no such array or field, or the file is
    damaged; OSError.
    """
    places = _places(file, _stamp(file))
    if name not in places:
        raise BadRow(f"has no array {name}")
    with file.open("rb") as opened, reading():
        order = _byte_order(opened)
        at, _ = places[name]
        return list(_texts_of_field(_Stream(opened, at, order), field))


@contextmanager
def reading() -> Iterator[None]:
    """BadRow for whatever damaged data leads to."""
    try:
        yield
    except (Damaged, struct.error, zlib.error, ValueError, OverflowError) as error:
        raise BadRow(f"cannot be read as MATLAB 5 ({one_line(error)})") from None


def _stamp(file: Path) -> Stamp:
    """Another one once anybody has written to the file."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=32)
def _places(file: Path, stamp: Stamp) -> dict[str, tuple[int, bool]]:
    """Where each array begins, and whether it may be pictures."""
    n_file_bytes, _ = stamp
    with file.open("rb") as opened, reading():
        return _list_arrays(opened, n_file_bytes, _byte_order(opened))


def _list_arrays(opened: BinaryIO, n_file_bytes: int, order: str) -> dict[str, tuple[int, bool]]:
    """As `_places`. Raises Damaged and what `reading` takes."""
    places: dict[str, tuple[int, bool]] = {}
    at = FILE_HEAD_BYTES
    while at + 8 <= n_file_bytes:
        kind, n_bytes = struct.unpack(f"{order}II", _read(opened, at, 8))
        if at + 8 + n_bytes > n_file_bytes:
            raise Damaged("it ends too early")
        if len(places) == MAX_ELEMENTS:
            raise Damaged(f"more than {MAX_ELEMENTS} arrays")
        head = _read(opened, at + 8, min(n_bytes, PEEK_BYTES))
        if kind == COMPRESSED:
            head = zlib.decompressobj().decompress(head, PEEK_BYTES)[8:]
        if kind in (MATRIX, COMPRESSED):
            array = _array(memoryview(head), order)
            places[array.name] = (at, array.may_be_pictures)
        at += 8 + n_bytes
    return places


@lru_cache(maxsize=N_KEPT)
def _read_array(file: Path, name: str, stamp: Stamp) -> Array:
    at, _ = _places(file, stamp)[name]
    with file.open("rb") as opened, reading():
        return _array_at(opened, at, _byte_order(opened))


def _array_at(opened: BinaryIO, at: int, order: str) -> Array:
    """The array whose element begins there. Raises Damaged and what `reading` takes."""
    kind, n_bytes = struct.unpack(f"{order}II", _read(opened, at, 8))
    data = _read(opened, at + 8, n_bytes)
    if kind == COMPRESSED:
        data = _inflate(data, order)
    return _array(memoryview(data), order)


class _Stream:
    """What is in one array's element, from its head on, packed or not."""

    def __init__(self, opened: BinaryIO, at: int, order: str) -> None:
        self.order = order
        self._opened = opened
        kind, self._n_left = struct.unpack(f"{order}II", _read(opened, at, 8))
        self._inflate = zlib.decompressobj() if kind == COMPRESSED else None
        self._ready = b""
        if self._inflate is not None:
            self.read(8)  # the head of what was packed

    def read(self, n_bytes: int) -> bytes:
        """So many bytes. Raises Damaged where there are fewer."""
        while len(self._ready) < n_bytes:
            self._ready += self._next()
        data = self._ready[:n_bytes]
        self._ready = self._ready[n_bytes:]
        return data

    def skip(self, n_bytes: int) -> None:
        """Pass over so many."""
        while n_bytes > len(self._ready):
            n_bytes -= len(self._ready)
            self._ready = self._next()
        self._ready = self._ready[n_bytes:]

    def element(self) -> Element:
        """The next one, read whole. Raises Damaged."""
        head = self.read(8)
        (first, second) = struct.unpack(f"{self.order}II", head)
        if first >> 16:
            return Element(first & 0xFFFF, memoryview(head)[4 : 4 + (first >> 16)], 0)
        if second > BLOCK_BYTES:
            raise Damaged(f"an element of {second} bytes where a small one was expected")
        body = self.read(-(-second // 8) * 8)
        return Element(first, memoryview(body)[:second], 0)

    def _next(self) -> bytes:
        """A block more; never empty. Raises Damaged at the end."""
        while True:
            if self._inflate is not None and self._inflate.unconsumed_tail:
                packed = self._inflate.unconsumed_tail
            else:
                packed = self._opened.read(min(BLOCK_BYTES, self._n_left))
                self._n_left -= len(packed)
            if not packed:
                raise Damaged("it ends too early")
            data = packed
            if self._inflate is not None:
                data = self._inflate.decompress(packed, BLOCK_BYTES)
            if data:
                return data


def _texts_of_field(stream: _Stream, field: str) -> Iterator[str]:
    """Raises Damaged, BadRow and what `reading` takes."""
    order = stream.order
    (word,) = struct.unpack_from(f"{order}I", stream.element().body)
    sides = stream.element().body
    n_structs = math.prod(struct.unpack(f"{order}{len(sides) // 4}I", sides))
    stream.element()  # its name
    if word & 0xFF != STRUCT:
        raise BadRow("has no array of structs there")
    if n_structs > MAX_STRUCTS:
        raise Damaged(f"{n_structs} structs")
    names = _field_names(stream)
    if field not in names:
        raise BadRow(f"has no field {field} in its structs")
    for _ in range(n_structs):
        for name in names:
            kind, n_bytes = struct.unpack(f"{order}II", stream.read(8))
            if kind != MATRIX:
                raise Damaged(f"a field of type {kind}")
            if name == field:
                if n_bytes > BLOCK_BYTES:
                    raise Damaged(f"a text of {n_bytes} bytes")
                yield _array(memoryview(stream.read(n_bytes)), order).text()
            else:
                stream.skip(n_bytes)


def _field_names(stream: _Stream) -> list[str]:
    """Of an array of structs, each in so many letters as the longest needs. Raises Damaged."""
    (n_letters,) = struct.unpack(f"{stream.order}I", stream.element().body)
    letters = bytes(stream.element().body)
    if not 1 <= n_letters <= len(letters) <= n_letters * MAX_STRUCT_FIELDS:
        raise Damaged(f"names of {n_letters} letters in {len(letters)}")
    starts = range(0, len(letters) - n_letters + 1, n_letters)
    return [letters[at : at + n_letters].rstrip(b"\0").decode("latin-1") for at in starts]


def _byte_order(opened: BinaryIO) -> str:
    mark = _read(opened, FILE_HEAD_BYTES - 2, 2)
    order = {b"IM": "<", b"MI": ">"}.get(mark)
    if order is None:
        raise Damaged("no mark of its byte order")
    return order


def _read(opened: BinaryIO, at: int, n_bytes: int) -> bytes:
    opened.seek(at)
    data = opened.read(n_bytes)
    if len(data) < n_bytes:
        raise Damaged("it ends too early")
    return data


def _inflate(packed: bytes, order: str) -> bytes:
    """What is in a compressed element, whose own head says how long it is."""
    inflate = zlib.decompressobj()
    head = inflate.decompress(packed, 8)
    kind, n_bytes = struct.unpack(f"{order}II", head)
    if kind != MATRIX or n_bytes > len(packed) * MAX_DEFLATE:
        raise Damaged(f"an element of type {kind} and {n_bytes} bytes")
    data = inflate.decompress(inflate.unconsumed_tail, n_bytes)
    inflate.decompress(inflate.unconsumed_tail, 8)  # to its end, where its sum is
    if len(data) < n_bytes or not inflate.eof:
        raise Damaged("it ends too early")
    return data


def _element(data: memoryview, at: int, order: str) -> Element:
    """The one that begins there: of up to 4 bytes these lie in its head. Raises Damaged."""
    (first,) = struct.unpack_from(f"{order}I", data, at)
    if first >> 16:
        kind = first & 0xFFFF
        n_bytes = first >> 16
        begin = at + 4
        end = at + 8
    else:
        kind = first
        (n_bytes,) = struct.unpack_from(f"{order}I", data, at + 4)
        begin = at + 8
        end = begin + -(-n_bytes // 8) * 8
    if begin + n_bytes > len(data):
        raise Damaged("an element goes on beyond its end")
    return Element(kind, data[begin : begin + n_bytes], end)


def _array(data: memoryview, order: str) -> Array:
    """Raises Damaged, struct.error."""
    flags = _element(data, 0, order)
    (word,) = struct.unpack_from(f"{order}I", flags.body)
    sides = _element(data, flags.end, order)
    n_axes = len(sides.body) // 4
    if not 2 <= n_axes <= MAX_AXES:
        raise Damaged(f"{n_axes} axes")
    shape = struct.unpack_from(f"{order}{n_axes}I", sides.body)
    name = _element(data, sides.end, order)
    return Array(
        name=bytes(name.body).decode("ascii", "replace"),
        shape=shape[::-1],
        kind=word & 0xFF,
        is_complex=bool((word >> 8) & IS_COMPLEX),
        body=data[name.end :],
        order=order,
    )
