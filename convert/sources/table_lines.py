"""What the readers of every form of table share: what a table is, its plain lines, pyarrow."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shards.errors import UserError, WrongSource
from shards.texts import Texts

BLOCK_BYTES = 1 << 18  # read at once: of larger blocks the allocators keep 30 MB more
BATCH_ROWS = 4096
MAX_LINE_BYTES = BLOCK_BYTES  # of a table of cells: pyarrow wants a line in two blocks
BOM = b"\xef\xbb\xbf"  # which editors of Windows put in front of UTF-8
IS_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class TableFile(Protocol):
    """A table, its header read."""

    names: tuple[str, ...]  # of its columns, as written
    row_word: str  # what messages call a row: "line" (1 first), or "row" (0 first)

    def batches(self, used: Sequence[str]) -> Iterator[list[Any]]:
        """Some rows at a time, in order: a pyarrow StringArray a column of `used`, no nulls.

        Raises WrongSource where a line is wrong, MoreColumns where there are others than `names`.
        """

    def number_of(self, row: int) -> int:
        """Of the row 0, 1, .. of what `batches` gives: its line."""


class MoreColumns(Exception):
    """Lines further down name columns that the first ones do not. `names`: all of them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.names = tuple(names)


class Fault(Exception):
    """What is wrong with a line; its number, 1 first."""

    def __init__(self, line: int, problem: str, right: str = "") -> None:
        super().__init__(line, problem, right)
        self.line = line
        self.problem = problem
        self.right = right

    def about(self, path: Path) -> WrongSource:
        return WrongSource(path, f": line {self.line} {self.problem}", self.right)


# -------------------------------------------------------------------------------------- plain lines


def open_regular(path: Path) -> io.FileIO:
    """Raises WrongSource where there is no plain file, or where it cannot be opened."""
    try:
        if not path.is_file():
            raise WrongSource(path, "is not a file" if path.exists() else "is not there")
        return io.FileIO(path, "rb")
    except OSError as error:
        raise WrongSource(path, f"cannot be read ({error.strerror})") from None


def open_behind_bom(path: Path) -> io.FileIO:
    """The same, at the first byte of its text."""
    file = open_regular(path)
    if file.read(len(BOM)) != BOM:
        file.seek(0)
    return file


def text_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, str]]:
    """(number, text) of every line, with its end. Raises Fault for what is no UTF-8."""
    with io.BufferedReader(open_regular(path), BLOCK_BYTES) as file:
        number = 0
        while line := file.readline(max_bytes):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if len(line) == max_bytes:
                raise Fault(number, f"is longer than {max_bytes >> 10} KB: is this a table?")
            if b"\0" in line:
                raise Fault(number, f"has a byte 0 (byte {line.index(0)} of the line)")
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                what = f"is not UTF-8 (byte {error.start} of the line: 0x{line[error.start]:02x})"
                raise Fault(number, what, "Save the table as UTF-8") from None


def path_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of each line of a list without quotes; comments and empty ones left out.

    Raises Fault, and WrongSource where there is no file.
    """
    for number, line in text_lines(path, MAX_LINE_BYTES):
        if line.strip() and not line.startswith("#"):
            yield number, line.split()


def line_of_row(path: Path, numbers: Iterator[int], row: int) -> int:
    """The line of a row. Raises WrongSource where a line before it is no right one."""
    try:
        return next(islice(numbers, row, None), row)
    except Fault as fault:
        raise fault.about(path) from None


# ------------------------------------------------------------------------------------------ pyarrow


def pyarrow_module() -> Any:
    """Raises UserError where it is not installed."""
    try:
        import pyarrow

        return pyarrow
    except ImportError:
        how = "Install it: pip install 'nyuv2-shards[frames]'"
        raise UserError("reading a table needs pyarrow", how) from None


def string_array(strings: Sequence[str]) -> Any:
    """A pyarrow StringArray. Not by pyarrow.array(), which imports pandas: 50 MB."""
    pa = pyarrow_module()
    texts = Texts.from_strings(strings)
    offsets = pa.py_buffer(texts.offsets.astype(np.int32).tobytes())
    utf8 = pa.py_buffer(texts.utf8.tobytes())
    return pa.Array.from_buffers(pa.string(), len(texts), [None, offsets, utf8])


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Meanwhile pyarrow allocates as others do: its own allocator keeps some 20 MB for later."""
    pa = pyarrow_module()
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


def without_nulls(column: Any) -> Any:
    """A StringArray whose nulls are empty texts."""
    return column.fill_null(string_array([""])[0]) if column.null_count else column


class CountedBytes(io.RawIOBase):
    """The rest of a file, for pyarrow, and what was read of it: lines and quotes."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._n_ends = 0
        self._last = b""
        self.n_quotes = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def read(self, n_bytes: int = -1) -> bytes:
        block = self._file.read(n_bytes)
        self._n_ends += block.count(b"\n")
        self._last = block[-1:] or self._last
        self.n_quotes += block.count(b'"')
        return block

    @property
    def n_lines(self) -> int:
        return self._n_ends + (self._last != b"\n")
