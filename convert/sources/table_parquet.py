"""Tables of .parquet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convert.sources.table_lines import BATCH_ROWS, BLOCK_BYTES, open_regular, without_nulls
from shards.errors import WrongSource, one_line, shown


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
    return without_nulls(texts)
