"""Is every byte of a set right, and is it what the source gives."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.decode import blaming
from convert.resize import Resizer
from convert.sources.base import RowReader, Source, camera_shares_of, filled_columns
from convert.sources.errors import BadRow
from convert.sources.opening import SourceOptions, open_source
from shards.dataset import ShardSet, StoredSet, verify
from shards.errors import DamagedSet, OtherSet, WrongSource
from shards.files import log
from shards.manifest import RIGHT_ROW, Column, ColumnValues, shard_file
from shards.progress import Progress, megabytes
from shards.spec import SPLITS, DatasetSpec
from shards.texts import Texts

LONG_BYTES = 100 << 20  # what takes a disk a second or more is announced
SHOWN = 3  # of the wrong files
SHOWN_LETTERS = 100  # of a text


class WrongFiles(DamagedSet):
    """Files of a set that are not as its manifest says, and those that are no part of it.

    wrong: file -> what is wrong. foreign: those of them that are not part of the set.
    """

    def __init__(self, found: StoredSet, wrong: Mapping[str, str]) -> None:
        said = [f"{found.address}/{name} {problem}" for name, problem in wrong.items()]
        more = f" (and {len(said) - SHOWN} more)" if len(said) > SHOWN else ""
        first_name, first_problem = next(iter(wrong.items()))
        problems = "; ".join([first_problem, *said[1:SHOWN]])
        subject = f"{found.address}/{first_name}"
        super().__init__(found.address, f"{problems}{more}", subject=subject)
        self.found = found
        self.wrong = dict(wrong)
        self.foreign = [name for name in wrong if name not in found.manifest.files]


class OtherRows(OtherSet):
    """Rows, columns or names that are not what the source gives, in a set whose every byte is as
    it was written.
    """


def verify_all(found: StoredSet) -> int:
    """Check every file; how many are right. Raises WrongFiles."""
    wrong = {name: problem for name, problem in checked(found) if problem}
    if wrong:
        raise WrongFiles(found, wrong)
    return len(found.manifest.files)


def checked(found: StoredSet) -> Iterator[tuple[str, str | None]]:
    """What `shards.dataset.verify` yields, and how far it is is said meanwhile."""
    files = found.manifest.files
    n_bytes = sum(entry.n_bytes for entry in files.values())
    if n_bytes >= LONG_BYTES:
        log(f"checking {len(files)} files of {found.address}, {megabytes(n_bytes)}")
    with Progress("checking", n_bytes) as progress:
        for name, problem in verify(found):
            progress.add(files[name].n_bytes if name in files else 0)
            yield name, problem


def against(found: StoredSet, path: Path, options: SourceOptions, n_rows: int) -> int:
    """`against_source` for the source at `path`. Raises WrongSource where it is not the set's."""
    with closing(open_source(path, found.settings, options)) as source:
        if source.identity().content() != found.manifest.source.content():
            what = f"is not what {found.address} was made from"
            raise WrongSource(path, what, "Convert it by itself")
        return against_source(found, source, n_rows)


def against_source(found: StoredSet, source: Source, n_rows: int) -> int:
    """Compare what is stored with the source: label names, every column, and the fields of
    `n_rows` random rows, which are read again and have to be the same byte for byte.

    Returns how many rows were read again; raises OtherRows for the first difference, WrongSource
    where its pictures are decoded by something else now.
    """
    if source.decoder != found.manifest.decoder:
        theirs = f"{found.address} was by {found.manifest.decoder}"
        what = f"is decoded by {source.decoder} here, {theirs}"
        raise WrongSource(source, what, "Install that version to compare them byte for byte")
    _compare_columns(found, source)
    n_compared = min(n_rows, found.n_rows)
    chosen = np.random.default_rng().choice(found.n_rows, n_compared, replace=False)
    rows = sorted(chosen.tolist())
    for reader in source.readers(list(found.manifest.fields)):
        _compare(found, reader, source, rows)
    return n_compared


# ----------------------------------------------------------------------------------------- columns


def _compare_columns(found: StoredSet, source: Source) -> None:
    """Raise OtherRows for the first label name, or value of a column, that is another one."""
    if found.n_rows != source.n_rows:
        raise _other(found, f"has {found.n_rows} rows, {source} has {source.n_rows}")
    facts = source.row_facts()
    _compare_label_names(found, facts.dataset, source)

    columns = dict(facts.columns)
    if source.rows_differ:  # compared row by row, as they are read
        columns |= {name: found.column(name) for name in ("size", "status")}
    if facts.camera_px is not None:
        columns["camera"] = camera_shares_of(facts.camera_px, found.column("size"))
    crop = found.settings.crop
    of_source = filled_columns(columns, found.n_rows, facts.dataset, crop)
    for name in found.manifest.columns:
        if name not in of_source:
            raise _other(found, f"has a column {name}, {source} has none")

    for name, values in of_source.items():  # in the order of the format
        if name not in found.manifest.columns:
            raise _other(found, f"has no column {name}, {source} has one")
        column = found.manifest.columns[name]
        stored = _meanings(column, found.column(name), found.manifest.scenes, found.dataset)
        given = _meanings(column, values, facts.scenes, facts.dataset)
        other_rows = np.flatnonzero(_differs(stored, given))
        if len(other_rows):
            row = int(other_rows[0])
            problem = f"says {_shown(stored[row])}, {source} says {_shown(given[row])}"
            raise _other(found, problem, f"column {name}, row {row},")


def _compare_label_names(found: StoredSet, dataset: DatasetSpec, source: Source) -> None:
    stored = found.dataset.label_names
    given = dataset.label_names
    if source.rows_differ and len(given) < len(stored):  # the others are called by their numbers
        given = (*given, *map(str, range(len(given) + 1, len(stored) + 1)))
    if len(stored) != len(given):
        raise _other(found, f"has {len(stored)} label names, {source} has {len(given)}")
    for k, (ours, theirs) in enumerate(zip(stored, given, strict=True)):
        if ours != theirs:
            problem = f"says {_shown(ours)}, {source} says {_shown(theirs)}"
            raise _other(found, problem, f"the name of label {k + 1}")


def _meanings(
    column: Column, values: ColumnValues, scenes: Sequence[str], dataset: DatasetSpec
) -> np.ndarray:
    """[N, ...] what a column says of its rows: names where its numbers stand for names, as a name
    may have another number in the source. None is no scene type.
    """
    if isinstance(values, Texts):
        return np.array(list(values), dtype=str)
    if column.name == "split":
        return np.array(SPLITS, object)[values]
    if column.name == "scene":
        return np.array(scenes, object)[values]
    if column.name == "scene_type":
        types = np.array([*dataset.scene_types, None], object)
        return types[np.minimum(values, len(dataset.scene_types))]
    if column.dtype == "text":
        return values
    return np.ascontiguousarray(values, column.dtype)


def _differs(stored: np.ndarray, given: np.ndarray) -> np.ndarray:
    """[N] of which rows the values are not the same; of numbers, not the same bytes: where the
    source has a NaN, the same NaN is right.
    """
    if stored.dtype.kind in "OU":
        return np.asarray(stored != given)
    bytes_of_rows = (np.frombuffer(each.tobytes(), "|u1") for each in (stored, given))
    ours, theirs = (each.reshape(len(stored), -1) for each in bytes_of_rows)
    return np.asarray((ours != theirs).any(axis=1))


def _shown(value: Any) -> str:
    """One value of a column, for a message of one line."""
    if value is None:
        return "no type"
    if not isinstance(value, str):
        return str(value.tolist())
    more = "..." if len(value) > SHOWN_LETTERS else ""
    return repr(str(value)[:SHOWN_LETTERS]) + more


def _other(found: StoredSet, problem: str, where: str = "") -> OtherRows:
    """The error, to be raised. `where`: what in the set the sentence is about."""
    address = found.address
    subject = f"{address}: {where}" if where else str(address)
    right = "Give the flags that the set was made with; if its source is another one, delete it"
    return OtherRows(address, problem, right, subject=subject)


# ------------------------------------------------------------------------------------------ fields


def _compare(found: StoredSet, reader: RowReader, source: Source, rows: list[int]) -> None:
    """Raise OtherRows for the first of these rows that the reader gives otherwise."""
    resizers = {name: _resizer(found, name, source, reader) for name in reader.fields}
    rows_of = {name: _rows_of(found, name) for name in reader.fields}
    status = found.column("status")
    with closing(reader):
        with blaming(str(source), reader.called(), source.advice):
            reader.read_index()
            if reader.scratch_bytes:
                reader.fill_scratch(Path(tempfile.gettempdir()))
        for row in rows:
            with blaming(str(source), reader.called(row), source.advice):
                small = _read_again(reader, row, resizers)
            for name in reader.fields:
                stored = rows_of[name](row)
                given = small.get(name, np.zeros_like(stored))
                if not np.array_equal(given, stored):
                    raise _other_row(found, name, row, source)
            was_read = bool(status[row] == RIGHT_ROW)
            _compare_status(found, row, was_read, is_read=bool(small), source=source)


def _rows_of(found: StoredSet, field: str) -> Callable[[int], np.ndarray]:
    """Row -> what is stored of it, as often as it is asked for: mapped once where it can be."""
    if not isinstance(found, ShardSet):
        return partial(found.row, field)
    shards = found.shards(field)
    n_rows = found.settings.rows_per_shard
    return lambda row: shards[row // n_rows][row % n_rows]


def _read_again(
    reader: RowReader, row: int, resizers: Mapping[str, Resizer]
) -> dict[str, np.ndarray]:
    """One row as it is stored, read again; {} where it fails."""
    group, place_in_group = divmod(row, reader.group_rows)
    try:
        pictures = reader.read_group(group)
        return {name: resizers[name](pictures[name][place_in_group]) for name in reader.fields}
    except BadRow:
        return {}


def _compare_status(
    found: StoredSet, row: int, was_read: bool, *, is_read: bool, source: Source
) -> None:
    if source.rows_differ and was_read != is_read:
        said = {True: "can be read", False: "cannot be read"}
        problem = f"says it {said[was_read]}, of {source} it {said[is_read]}"
        raise _other(found, problem, f"column status, row {row},")


def _other_row(found: StoredSet, field: str, row: int, source: Source) -> OtherRows:
    shard = row // found.settings.rows_per_shard
    file = shard_file(found.field(field), shard, found.manifest.is_zarr)
    what = f"row {row} is not what {source} gives"
    address = found.address
    return OtherRows(address, what, f"Delete {address}", subject=f"{address}/{file}:")


def _resizer(found: StoredSet, field: str, source: Source, reader: RowReader) -> Resizer:
    crop = found.settings.crop
    return Resizer(
        field=replace(found.field(field), statistics=None),
        size=found.settings.size,
        box=None if crop == "none" else found.dataset.crop_box(crop),
        depth_resize=found.settings.depth_resize,
        highest_id=source.highest_id(field),
        is_hw=reader.is_hw,
    )
