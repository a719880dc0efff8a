"""Tables of cells: .csv, .tsv, and lists of paths without a header."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.sources.folder_names import rgb_is_first
from convert.sources.table_lines import (
    BLOCK_BYTES,
    IS_NUMBER,
    MAX_LINE_BYTES,
    CountedBytes,
    Fault,
    line_of_row,
    open_behind_bom,
    open_regular,
    path_lines,
    pyarrow_module,
    text_lines,
)
from shards.errors import WrongSource, one_line, shown

LOOKS_LIKE_PATH = re.compile(r".*([/\\]|\.[A-Za-z0-9]{2,5}$)")


class DelimitedTable:
    """Cells parted by `delimiter`: "," or a tab with quotes, " " for runs of blanks without.

    Without a header the columns are rgb, depth and, where the third cell is a path, label; a third
    cell that is a number is the focal length that BTS writes. Four that begin with a time are
    TUM's pairs, in the order that the folders of the first line tell.
    """

    row_word = "line"

    def __init__(self, path: Path, delimiter: str, is_column: Callable[[str], bool]) -> None:
        self.path = path
        self.delimiter = delimiter
        self.is_list = delimiter == " "
        try:
            self.n_header_lines, first = next(self._records(), (0, []))
        except Fault as fault:
            raise fault.about(path) from None
        if not first:
            raise WrongSource(path, "has no line but comments")
        self.n_cells = len(first)
        self.has_header = any(map(is_column, first)) or not (
            self.is_list or LOOKS_LIKE_PATH.fullmatch(first[0].strip())
        )
        if not self.has_header:
            self.n_header_lines = 0
        self.names = tuple(first) if self.has_header else self._names_of_list(first)

    def _names_of_list(self, first: list[str]) -> tuple[str, ...]:
        is_time = [bool(IS_NUMBER.fullmatch(cell.strip())) for cell in first]
        if is_time == [True, False, True, False]:
            return self._names_of_pairs(first[1], first[3])
        if is_time == [True, False]:
            what = "lists times and the pictures of one kind, as TUM's rgb.txt does"
            raise WrongSource(self.path, what, "Give the folder that it lies in")
        if self.n_cells not in (2, 3):
            what = f"has {_cells(self.n_cells)} in its first line and no header that is known"
            right = "A list has two or three: rgb, depth, label. Paths with blanks need a .csv"
            raise WrongSource(self.path, what, right)
        third = "focal" if IS_NUMBER.fullmatch(first[-1].strip()) else "label"
        return ("rgb", "depth", third)[: self.n_cells]

    def _names_of_pairs(self, first: str, second: str) -> tuple[str, ...]:
        is_first = rgb_is_first(first, second)
        if is_first is None:
            what = f"pairs {shown(first)} with {shown(second)}, and which is the depth is not told"
            right = "Name the folders rgb and depth, or give a table with these columns"
            raise WrongSource(self.path, what, right)
        names = ("rgb_time", "rgb", "depth_time", "depth")
        return names if is_first else (*names[2:], *names[:2])

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(number of its last line, cells) of each record, lines without any left out."""
        if self.is_list:
            yield from path_lines(self.path)
        else:
            yield from self._quoted_records(text_lines(self.path, MAX_LINE_BYTES))

    def _quoted_records(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
        texts = (line for _, line in lines)
        reader = csv.reader(texts, delimiter=self.delimiter, strict=True)
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise Fault(start, _csv_problem(str(error))) from None
            if cells is None:
                return
            if cells:
                yield reader.line_num, cells

    def _rows(self) -> Iterator[int]:
        """The line of every row. Raises Fault where one has other cells than the first line."""
        for number, cells in self._records():
            if len(cells) != self.n_cells:
                than = "the header has" if self.has_header else "the first line has"
                blanks = " (a path with blanks needs a .csv)" if self.is_list else ""
                raise Fault(number, f"has {_cells(len(cells))}, {than} {self.n_cells}{blanks}")
            if number > self.n_header_lines:
                yield number

    def number_of(self, row: int) -> int:
        return line_of_row(self.path, self._rows(), row)

    def batches(self, used: Sequence[str]) -> Iterator[list[Any]]:
        """See TableFile."""
        pa = pyarrow_module()
        keys = [str(self.names.index(name)) for name in used]
        try:
            for batch in self._quick_batches(keys):
                yield [batch.column(key) for key in keys]
        except pa.ArrowInvalid as error:
            self._check_rows()
            raise WrongSource(self.path, f"cannot be read ({one_line(error)})") from None

    def _check_rows(self) -> None:
        """Raise WrongSource for the first line that the plain reader finds wrong."""
        try:
            for _ in self._rows():
                pass
        except Fault as fault:
            raise fault.about(self.path) from None

    def _quick_batches(self, keys: list[str]) -> Iterator[Any]:
        import pyarrow as pa
        from pyarrow.csv import ConvertOptions, ParseOptions, ReadOptions, open_csv

        reading = ReadOptions(
            use_threads=False,
            block_size=BLOCK_BYTES,
            column_names=[str(k) for k in range(self.n_cells)],
        )
        parsing = ParseOptions(
            delimiter=self.delimiter,
            quote_char=False if self.is_list else '"',
            newlines_in_values=not self.is_list,
        )
        converting = ConvertOptions(
            column_types=dict.fromkeys(keys, pa.string()),
            include_columns=keys,
            strings_can_be_null=False,
        )
        with self._data_stream() as stream:
            options = {"parse_options": parsing, "convert_options": converting}
            try:
                batches = open_csv(stream, read_options=reading, **options)
            except pa.ArrowInvalid as error:
                if "Empty CSV file" in str(error):
                    return
                raise
            yield from batches
            # pyarrow takes all lines behind a quote that never closes for one cell.
            if not self.is_list and stream.n_quotes % 2:
                self._check_rows()

    def _data_stream(self) -> "CountedBytes":
        """The bytes of the lines below the header."""
        file = open_behind_bom(self.path)
        if self.n_header_lines:
            start = file.tell()
            with io.BufferedReader(open_regular(self.path)) as lines:
                lines.seek(start)
                for _ in range(self.n_header_lines):
                    lines.readline()
                file.seek(lines.tell())
        return _ListLines(file) if self.is_list else CountedBytes(file)


def _csv_problem(error: str) -> str:
    if "end of data" in error or "field limit" in error:
        return "opens a quote that never closes"
    if "new-line" in error:
        return "has a carriage return in it; a line ends with a line feed"
    return f"has a stray quote ({error})"


def _cells(n: int) -> str:
    return "1 cell" if n == 1 else f"{n} cells"


class _ListLines(CountedBytes):
    """A list of paths as pyarrow can read it: one blank between cells, no comments."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__(file)
        self._rest = b""  # of a line that is not whole yet
        self._ready = b""
        self._place = 0

    def read(self, n_bytes: int = -1) -> bytes:
        while self._place == len(self._ready):
            block = self._file.read(BLOCK_BYTES)
            lines = self._rest + block
            end = lines.rfind(b"\n") + 1 if block else len(lines)
            self._rest = lines[end:]
            if len(self._rest) > MAX_LINE_BYTES:
                raise pyarrow_module().ArrowInvalid("a line is too long")
            self._ready = _one_blank_each(lines[:end])
            self._place = 0
            if not block and not self._ready:
                return b""
        stop = len(self._ready) if n_bytes < 0 else self._place + n_bytes
        part = self._ready[self._place : stop]
        self._place += len(part)
        return part


def _one_blank_each(lines: bytes) -> bytes:
    """Whole lines; most lists need nothing but the first test."""
    is_odd = any(odd in lines for odd in (b"\t", b"\r", b"#", b"  ", b" \n", b"\n ", b"\n\n"))
    if not is_odd and not lines.startswith((b" ", b"\n")) and not lines.endswith(b" "):
        return lines
    lines = re.sub(rb"(?m)^#.*\n?", b"", lines)
    lines = re.sub(rb"[ \t\r\f\v]+", b" ", lines)
    return re.sub(rb"(?m)^ | $", b"", lines)
