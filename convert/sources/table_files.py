"""The lines of a table file as batches of texts, whatever its form: .csv, .tsv, .jsonl, .parquet,
or a list of paths without a header.

There are two readers of each form, which share no code. The quick one is pyarrow's: blocks of
256 KB, every cell as the text that is written there, no type guessed. Where it gives up, the plain
one (Python's csv and json, a line at a time) goes through the file from its start, finds the line
and says what is wrong with it. So no message depends on what pyarrow calls a fault.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert.sources.folder_names import rgb_is_first
from shards.errors import UserError, WrongSource, one_line, shown
from shards.texts import Texts

BLOCK_BYTES = 1 << 18  # read at once: of larger blocks the allocators keep 30 MB more
HEAD_BYTES = 4096  # looked at before anything is believed
BATCH_ROWS = 4096
MAX_LINE_BYTES = BLOCK_BYTES  # of a table of cells: pyarrow wants a line in two blocks
MAX_JSON_BYTES = 16 << 20  # of a line
BOM = b"\xef\xbb\xbf"  # which editors of Windows put in front of UTF-8
MAGIC = {
    b"\xff\xfe": ("is UTF-16, not UTF-8", "Save it as UTF-8"),
    b"\xfe\xff": ("is UTF-16, not UTF-8", "Save it as UTF-8"),
    b"PK\x03\x04": ("is a zip or a spreadsheet, not a table of text", "Export it as .csv"),
    b"\xd0\xcf\x11\xe0": ("is a spreadsheet, not a table of text", "Export it as .csv"),
    b"\x1f\x8b": ("is compressed", "Unpack it first"),
    b"PAR1": ("is a Parquet file under another name", "Call it .parquet"),
}
LOOKS_LIKE_PATH = re.compile(r".*([/\\]|\.[A-Za-z0-9]{2,5}$)")
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


def open_table(path: Path, is_column: Callable[[str], bool]) -> TableFile:
    """Read the header of a table file.

    is_column: whether a text is a name that columns have, by which a header is told from a path.
    Raises WrongSource, or UserError where pyarrow is missing.
    """
    _pyarrow()
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetTable(path)
    _check_head(path)
    if suffix in (".jsonl", ".ndjson"):
        return JsonTable(path)
    if suffix == ".csv":
        return DelimitedTable(path, ",", is_column)
    if suffix == ".tsv":
        return DelimitedTable(path, "\t", is_column)
    if suffix in (".txt", ".lst", ".list"):
        return DelimitedTable(path, " ", is_column)
    right = "Tables are .csv, .tsv, .jsonl, .parquet, or a list .txt of rgb and depth paths"
    raise WrongSource(path, "is no table that is known", right)


def _pyarrow() -> Any:
    try:
        import pyarrow

        return pyarrow
    except ImportError:
        how = "Install it: pip install 'nyuv2-shards[frames]'"
        raise UserError("reading a table needs pyarrow", how) from None


def string_array(strings: Sequence[str]) -> Any:
    """A pyarrow StringArray. Not by pyarrow.array(), which imports pandas: 50 MB."""
    pa = _pyarrow()
    texts = Texts.from_strings(strings)
    offsets = pa.py_buffer(texts.offsets.astype(np.int32).tobytes())
    utf8 = pa.py_buffer(texts.utf8.tobytes())
    return pa.Array.from_buffers(pa.string(), len(texts), [None, offsets, utf8])


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Meanwhile pyarrow allocates as others do: its own allocator keeps some 20 MB for later."""
    pa = _pyarrow()
    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)


def _check_head(path: Path) -> None:
    """Raise WrongSource for what is no text, by its first bytes."""
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    if not head.strip():
        raise WrongSource(path, "is empty")
    for magic, (problem, right) in MAGIC.items():
        if head.startswith(magic):
            raise WrongSource(path, problem, right)
    if b"\0" in head:
        n_zeros = head.count(b"\0")
        if n_zeros >= len(head) // 3:
            raise WrongSource(path, "is UTF-16 or UTF-32, not UTF-8", "Save it as UTF-8")
        raise WrongSource(path, f": byte {head.index(0)} is 0: it is no text file")


def open_regular(path: Path) -> io.FileIO:
    """Raises WrongSource where there is no plain file, or where it cannot be opened."""
    try:
        if not path.is_file():
            raise WrongSource(path, "is not a file" if path.exists() else "is not there")
        return io.FileIO(path, "rb")
    except OSError as error:
        raise WrongSource(path, f"cannot be read ({error.strerror})") from None


# -------------------------------------------------------------------------------------- plain lines


def _text_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, str]]:
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
    for number, line in _text_lines(path, MAX_LINE_BYTES):
        if line.strip() and not line.startswith("#"):
            yield number, line.split()


# ------------------------------------------------------------------------- csv, tsv, lists of paths


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
            yield from self._quoted_records(_text_lines(self.path, MAX_LINE_BYTES))

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
        return _nth(self.path, self._rows(), row)

    def batches(self, used: Sequence[str]) -> Iterator[list[Any]]:
        """See TableFile."""
        pa = _pyarrow()
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

    def _data_stream(self) -> "_CountedBytes":
        """The bytes of the lines below the header."""
        file = _open_behind_bom(self.path)
        if self.n_header_lines:
            start = file.tell()
            with io.BufferedReader(open_regular(self.path)) as lines:
                lines.seek(start)
                for _ in range(self.n_header_lines):
                    lines.readline()
                file.seek(lines.tell())
        return _ListLines(file) if self.is_list else _CountedBytes(file)


def _csv_problem(error: str) -> str:
    if "end of data" in error or "field limit" in error:
        return "opens a quote that never closes"
    if "new-line" in error:
        return "has a carriage return in it; a line ends with a line feed"
    return f"has a stray quote ({error})"


def _cells(n: int) -> str:
    return "1 cell" if n == 1 else f"{n} cells"


def _nth(path: Path, numbers: Iterator[int], row: int) -> int:
    """The line of a row. Raises WrongSource where a line before it is no right one."""
    try:
        return next(islice(numbers, row, None), row)
    except Fault as fault:
        raise fault.about(path) from None


def _open_behind_bom(path: Path) -> io.FileIO:
    file = open_regular(path)
    if file.read(len(BOM)) != BOM:
        file.seek(0)
    return file


class _CountedBytes(io.RawIOBase):
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


class _ListLines(_CountedBytes):
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
                raise _pyarrow().ArrowInvalid("a line is too long")
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


# -------------------------------------------------------------------------------------------- jsonl


class JsonTable:
    """One object a line. Columns are the keys of all of them; one that a line lacks is empty."""

    row_word = "line"

    def __init__(self, path: Path, names: Sequence[str] = ()) -> None:
        """names: columns that are known already, as MoreColumns says them."""
        self.path = path
        known = dict.fromkeys(names)
        try:
            for (_, pairs), _ in zip(self._objects(), range(1000), strict=False):
                known.update(dict.fromkeys(key for key, _ in pairs))
        except Fault as fault:
            raise fault.about(path) from None
        self.names = tuple(known)

    def _objects(self) -> Iterator[tuple[int, tuple[tuple[str, Any], ...]]]:
        """(line, pairs) of each object. Raises Fault where a line is none."""
        decode = json.JSONDecoder(
            object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=_refuse_constant
        ).decode
        for number, line in _text_lines(self.path, MAX_JSON_BYTES):
            if line.isspace():
                continue
            try:
                pairs = decode(line)
            except json.JSONDecodeError as error:
                what = f"is no JSON object ({error.msg}, character {error.pos + 1})"
                raise Fault(number, what) from None
            except (ValueError, RecursionError) as error:
                raise Fault(number, f"is no JSON object ({one_line(error)})") from None
            if not isinstance(pairs, tuple):
                raise Fault(number, f"is no JSON object but {shown(line)}")
            if len(dict(pairs)) < len(pairs):
                raise Fault(number, "names a key twice")
            yield number, pairs

    def number_of(self, row: int) -> int:
        return _nth(self.path, (number for number, _ in self._objects()), row)

    def batches(self, used: Sequence[str]) -> Iterator[list[Any]]:
        """See TableFile. Numbers are the texts that stand there."""
        pa = _pyarrow()
        n_rows = 0
        try:
            for columns in self._quick_batches(used):
                n_rows += len(columns[0])
                yield columns
        except pa.ArrowInvalid:
            yield from self._plain_batches(used, n_rows)

    def _quick_batches(self, used: Sequence[str]) -> Iterator[list[Any]]:
        """Raises ArrowInvalid at the first block that is not as the lines before: see the other."""
        import pyarrow as pa
        from pyarrow import json as reader

        if not hasattr(reader, "open_json"):
            raise pa.ArrowInvalid("this pyarrow reads no JSON in blocks")
        parsing = reader.ParseOptions(
            explicit_schema=pa.schema([(name, pa.string()) for name in used])
        )
        reading = reader.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
        with _CountedBytes(_open_behind_bom(self.path)) as stream:
            batches = reader.open_json(stream, read_options=reading, parse_options=parsing)
            if not set(batches.schema.names) <= set(self.names):
                raise pa.ArrowInvalid("more columns")
            n_rows = 0
            for batch in batches:
                n_rows += len(batch)
                for name in used:
                    batch.column(name).validate(full=True)  # whether all bytes are UTF-8
                yield [_without_nulls(batch.column(name)) for name in used]
            if n_rows > stream.n_lines:
                raise pa.ArrowInvalid("several objects a line")

    def _plain_batches(self, used: Sequence[str], first_row: int) -> Iterator[list[Any]]:
        places = {name: k for k, name in enumerate(used)}
        known = dict.fromkeys(self.names)
        cells: list[list[str]] = [[] for _ in used]
        try:
            for row, (number, pairs) in enumerate(self._objects()):
                if row < first_row:
                    continue
                for column in cells:
                    column.append("")
                for key, value in pairs:
                    place = places.get(key)
                    if place is not None:
                        cells[place][-1] = _cell_of(value, key, number)
                    elif key not in known:
                        known[key] = None
                if len(cells[0]) == BATCH_ROWS:
                    yield [string_array(column) for column in cells]
                    cells = [[] for _ in used]
        except Fault as fault:
            raise fault.about(self.path) from None
        if len(known) > len(self.names):
            raise MoreColumns(tuple(known))
        if cells[0]:
            yield [string_array(column) for column in cells]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _cell_of(value: Any, key: str, line: int) -> str:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can name half a character
            raise Fault(line, f"has half a character in {shown(key)}") from None
        return value
    if value is None:
        return ""
    kind = "true or false" if isinstance(value, bool) else "a value with values in it"
    raise Fault(line, f"has {kind} as {shown(key)}", "A text or a number is right there")


def _without_nulls(column: Any) -> Any:
    return column.fill_null(string_array([""])[0]) if column.null_count else column


# ------------------------------------------------------------------------------------------ parquet


class ParquetTable:
    """A Parquet file of texts and numbers."""

    row_word = "row"

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        self.path = path
        open_regular(path).close()
        try:
            with ParquetFile(path) as file:
                schema = file.schema_arrow
        except (pa.ArrowException, OSError) as error:
            _raise_if_of_disk(error)
            raise WrongSource(path, f"is no Parquet file, or damaged ({one_line(error)})") from None
        self.names = tuple(schema.names)
        self._types = {field.name: field.type for field in schema}

    def number_of(self, row: int) -> int:
        return row

    def batches(self, used: Sequence[str]) -> Iterator[list[Any]]:
        """See TableFile."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        for name in used:
            self._check_type(name)
        options = {"pre_buffer": False, "buffer_size": BLOCK_BYTES}
        try:
            with ParquetFile(self.path, **options) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=list(used), use_threads=False):
                    yield [_as_texts(batch.column(name)) for name in used]
        except (pa.ArrowException, OSError) as error:
            _raise_if_of_disk(error)
            raise WrongSource(self.path, f"is damaged ({one_line(error)})") from None

    def _check_type(self, name: str) -> None:
        import pyarrow.types as kinds

        kind = self._types[name]
        if kinds.is_dictionary(kind):
            kind = kind.value_type
        is_text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
        is_number = kinds.is_integer(kind) or kinds.is_floating(kind)
        if is_text or is_number or kinds.is_null(kind):
            return
        what = f": column {shown(name)} holds {shown(kind)}, not texts"
        right = "Pictures inside a table are not read: save them as files, and their paths here"
        raise WrongSource(self.path, what, right)


def _raise_if_of_disk(error: Exception) -> None:
    """pyarrow raises OSError, without a number, for damaged bytes too."""
    if isinstance(error, OSError) and error.errno:
        raise error


def _as_texts(column: Any) -> Any:
    import pyarrow as pa

    texts = column.cast(pa.string())
    texts.validate(full=True)  # whether all bytes are UTF-8
    return _without_nulls(texts)
