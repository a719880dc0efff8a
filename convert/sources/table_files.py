"""The lines of a table file as batches of texts, whatever its form: .csv, .tsv, .jsonl, .parquet,
or a list of paths without a header.

There are two readers of each form, which share no code. The quick one is pyarrow's: blocks of
256 KB, every cell as the text that is written there, no type guessed. Where it gives up, the plain
one (Python's csv and json, a line at a time) goes through the file from its start, finds the line
and says what is wrong with it. So no message depends on what pyarrow calls a fault.
"""

from collections.abc import Callable
from pathlib import Path

from convert.sources.table_delimited import DelimitedTable
from convert.sources.table_json import JsonTable
from convert.sources.table_lines import TableFile, open_regular, pyarrow_module
from convert.sources.table_parquet import ParquetTable
from shards.errors import WrongSource

HEAD_BYTES = 4096  # looked at before anything is believed
MAGIC = {
    b"\xff\xfe": ("is UTF-16, not UTF-8", "Save it as UTF-8"),
    b"\xfe\xff": ("is UTF-16, not UTF-8", "Save it as UTF-8"),
    b"PK\x03\x04": ("is a zip or a spreadsheet, not a table of text", "Export it as .csv"),
    b"\xd0\xcf\x11\xe0": ("is a spreadsheet, not a table of text", "Export it as .csv"),
    b"\x1f\x8b": ("is compressed", "Unpack it first"),
    b"PAR1": ("is a Parquet file under another name", "Call it .parquet"),
}


def open_table(path: Path, is_column: Callable[[str], bool]) -> TableFile:
    """Read the header of a table file.

    is_column: whether a text is a name that columns have, by which a header is told from a path.
    Raises WrongSource, or UserError where pyarrow is missing.
    """
    pyarrow_module()
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
