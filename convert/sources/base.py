"""What a conversion needs of a source: its dataset, facts of its rows, readers of its fields.

A source of another kind is a class with these attributes and methods; nothing else in the project
needs to know it. `convert.pipeline.convert` takes one in the place of a path.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from convert.resize import StoredPixels
from shards.manifest import COLUMNS, Column, ColumnValues
from shards.spec import ConversionSettings, DatasetSpec, Field, SourceIdentity
from shards.texts import Texts

Picture = np.ndarray | StoredPixels


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """One value a row of every column, and what their numbers stand for.

    columns: by the names in shards.manifest.COLUMNS; those left out are filled with neutral values.
    Others are columns of this source's own.
    dataset: the specification, with names that only the source itself has. camera_px: where rows
    differ, [N, 4] focal lengths and centre in pixels of the original picture, 0 = unknown.
    """

    columns: Mapping[str, ColumnValues | Sequence[str]]
    scenes: Sequence[str]
    dataset: DatasetSpec
    camera_px: np.ndarray | None = None


class Readable(Protocol):
    """What readers have in common: how they are made ready, and let go of."""

    @property
    def scratch_bytes(self) -> int:
        """Of the scratch file that it needs, as its chunks span too many rows; 0: none."""

    @property
    def can_travel(self) -> bool:
        """Whether another process on this machine can read the rows, given its pickle."""

    def read_index(self) -> None:
        """Find out where the rows lie; called once, before anything is read."""

    def fill_scratch(self, directory: Path, run: Callable[..., Any] = map) -> None:
        """Unpack everything once into a nameless file. `run` is a map, such as a pool's."""

    def close(self) -> None:
        """Nothing is read afterwards."""


class FieldRows(Readable, Protocol):
    """The rows of one field, decoded a group at a time. Threads may call `read_group` at once."""

    group_rows: int  # rows that are decoded together
    row_shape: tuple[int, ...]
    dtype: np.dtype

    def read_group(self, group: int) -> np.ndarray:
        """Rows [group * group_rows, ...): (rows, [planes,] W, H), planes as MATLAB stores them.

        Colour and grey levels as uint8, depth as float metres (0 = none), ids as whole numbers.
        """


class RowReader(Readable, Protocol):
    """Rows of some fields that are read together. Threads may call `read_group` at once.

    fields: by name, in the order of the plan. group_rows: how many rows are decoded together.
    row_bytes: of one decoded row of all its fields, about. is_hw: whether pictures are handed out
    as (H, W[, 3]); else as MATLAB stores them, ([3,] W, H).
    """

    fields: tuple[str, ...]
    group_rows: int
    row_bytes: int
    is_hw: bool

    def called(self, row: int | None = None) -> str:
        """How a message calls what is read, or one row of it."""

    def read_group(self, group: int) -> Mapping[str, Sequence[Picture]]:
        """Of each field the pictures of rows [group * group_rows, ...).

        Colour and grey levels as uint8 or uint16, depth as float metres or uint16 millimetres
        (0 = none), ids as whole numbers; or stored pixels that have such a meaning. Raises BadRow
        where group_rows is 1 and the row's bytes are at fault, Damaged or Unreadable where the
        source is, and OSError.
        """


class FieldReader:
    """A RowReader of one field, which messages call `name`."""

    is_hw = False

    def __init__(self, field: str, name: str, rows: FieldRows) -> None:
        self.fields: tuple[str, ...] = (field,)
        self.group_rows = rows.group_rows
        self.row_bytes = math.prod(rows.row_shape) * rows.dtype.itemsize
        self._name = name
        self._rows = rows

    def called(self, row: int | None = None) -> str:
        return self._name if row is None else f"{self._name} row {row}"

    @property
    def scratch_bytes(self) -> int:
        return self._rows.scratch_bytes

    @property
    def can_travel(self) -> bool:
        return self._rows.can_travel

    def read_index(self) -> None:
        self._rows.read_index()

    def fill_scratch(self, directory: Path, run: Callable[..., Any] = map) -> None:
        self._rows.fill_scratch(directory, run)

    def read_group(self, group: int) -> Mapping[str, Sequence[Picture]]:
        return {self.fields[0]: list(self._rows.read_group(group))}

    def close(self) -> None:
        self._rows.close()


@runtime_checkable
class Source(Protocol):
    """Rows of RGB-D pictures, opened. str() is what messages call it.

    handles: file descriptors that readers travel with to helper processes; None: readers stay in
    this one. advice: what to do first where bytes of it are damaged. may_hang: whether reading
    waits for a server. rows_differ: whether rows have sizes of their own, and may fail, which only
    reading them tells. decoder: what decodes its pictures, with the version; None: nothing does.
    """

    dataset: DatasetSpec
    fields: Mapping[str, Field]
    n_rows: int
    handles: tuple[int, ...] | None
    advice: str
    may_hang: bool
    rows_differ: bool
    decoder: str | None

    def resolved(self, settings: ConversionSettings) -> ConversionSettings:
        """What these settings are for this source, nothing left to be found out.

        Raises WrongSetting.
        """

    def identity(self) -> SourceIdentity:
        """Which source it is; reads little."""

    def stamp(self) -> tuple[int, ...]:
        """Differs once anybody has written to it; the last number is when, in nanoseconds."""

    def row_facts(self) -> RowFacts:
        """All of its columns. Called in another thread than the readers."""

    def readers(self, fields: Sequence[str]) -> Sequence[RowReader]:
        """Readers of these fields, each of which is read by one of them."""

    def highest_id(self, field: str) -> int | None:
        """The highest id that the field may hold; None: what its type can hold."""

    def check_crop(self, crop: str) -> None:
        """Raise WrongSetting where the dataset's box of that name is not one of these pictures."""

    def close(self) -> None:
        """Let go of files."""


@dataclass(frozen=True, kw_only=True)
class SourceFilter:
    """Which sources a set may be of: of that kind, of that name, with that identity; empty: any."""

    kind: str | None = None
    name: str | None = None
    identity: SourceIdentity | None = None

    def accepts(self, source: SourceIdentity) -> bool:
        if self.identity is not None:
            return self.identity.content() == source.content()
        is_of_kind = self.kind in (None, source.kind)
        return is_of_kind and self.name in (None, source.name)


def filled_columns(
    columns: Mapping[str, ColumnValues | Sequence[str]],
    n_rows: int,
    dataset: DatasetSpec,
    crop: str,
) -> dict[str, ColumnValues]:
    """Every column of the format, and those of the source's own: as given, or neutral values.

    Neutral is 0, and for texts empty; a row's number is its place, its camera the dataset's.
    """
    filled: dict[str, ColumnValues] = {}
    for name, column in COLUMNS.items():
        if name in columns:
            given = columns[name]
            filled[name] = given if isinstance(given, Texts) else np.asarray(given)
        elif column.dtype == "text":
            filled[name] = Texts.empty(n_rows)
        elif name == "camera" and dataset.camera is not None:
            filled[name] = np.tile(camera_shares(dataset, crop), (n_rows, 1))
        elif name == "row":
            filled[name] = np.arange(n_rows, dtype=column.dtype)
        else:
            filled[name] = np.zeros((n_rows, *column.shape), column.dtype)
    for name in columns.keys() - COLUMNS.keys():
        filled[name] = np.asarray(columns[name])
    for name, values in filled.items():
        if len(values) != n_rows:
            raise ValueError(f"column {name} has {len(values)} values for {n_rows} rows")
    return filled


def kinds_of_columns(columns: Mapping[str, ColumnValues]) -> dict[str, Column]:
    """What stands in the manifest of these columns; the source's own are of numbers."""
    own = {
        name: Column(name=name, dtype=values.dtype.str, shape=values.shape[1:])
        for name, values in sorted(columns.items())
        if name not in COLUMNS and isinstance(values, np.ndarray)
    }
    return {**COLUMNS, **own}


def camera_shares(dataset: DatasetSpec, crop: str) -> np.ndarray:
    """[4] float32: the one camera of a dataset, as shares of what `crop` leaves of its pictures."""
    assert dataset.camera is not None
    shares = dataset.camera.as_shares(dataset.crop_box(crop))
    return np.array(shares, "<f4")


def camera_shares_of(camera_px: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[N, 4] float32: cameras in pixels of pictures of these sizes ([N, 2], height and width) as
    shares of them. Those of unknown focal length, and of rows without a size, stay 0.
    """
    height = sizes[:, 0].astype(np.float64)
    width = sizes[:, 1].astype(np.float64)
    fx, fy, cx, cy = camera_px.T.astype(np.float64)
    is_known = (fx > 0) & (fy > 0) & (width > 0)
    shares = np.zeros((len(sizes), 4))
    pixels = np.stack([fx, fy, cx + 0.5, cy + 0.5], axis=1)
    sides = np.stack([width, height, width, height], axis=1)
    np.divide(pixels, sides, out=shares, where=is_known[:, None])
    return shares.astype("<f4")
