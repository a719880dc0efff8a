"""Tables of .jsonl."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.sources.table_lines import (
    BATCH_ROWS,
    BLOCK_BYTES,
    CountedBytes,
    Fault,
    MoreColumns,
    line_of_row,
    open_behind_bom,
    pyarrow_module,
    string_array,
    text_lines,
    without_nulls,
)
from shards.errors import one_line, shown

MAX_JSON_BYTES = 16 << 20  # of a line


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
        for number, line in text_lines(self.path, MAX_JSON_BYTES):
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
        return line_of_row(self.path, (number for number, _ in self._objects()), row)

    def batches(self, used: Sequence[str]) -> Iterator[list[Any]]:
        """See TableFile. Numbers are the texts that stand there."""
        pa = pyarrow_module()
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
        with CountedBytes(open_behind_bom(self.path)) as stream:
            batches = reader.open_json(stream, read_options=reading, parse_options=parsing)
            if not set(batches.schema.names) <= set(self.names):
                raise pa.ArrowInvalid("more columns")
            n_rows = 0
            for batch in batches:
                n_rows += len(batch)
                for name in used:
                    batch.column(name).validate(full=True)  # whether all bytes are UTF-8
                yield [without_nulls(batch.column(name)) for name in used]
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
