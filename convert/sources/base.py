"""What a conversion needs of a source: its dataset, facts of its rows, readers of its fields.

A source of another kind is a class with these attributes and methods; nothing else in the project
needs to know it. `convert.pipeline.convert` takes one in the place of a path.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shards.manifest import COLUMNS
from shards.spec import DatasetSpec, Field, SourceIdentity


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """One value a row of every column, and what their numbers stand for.

    columns: by the names in shards.manifest.COLUMNS; those left out are filled with neutral values.
    dataset: the specification, with names that only the source itself has.
    """

    columns: Mapping[str, np.ndarray | Sequence[str]]
    scenes: Sequence[str]
    dataset: DatasetSpec


class RowReader(Protocol):
    """The rows of one field, decoded a group at a time. Threads may call `read_group` at once."""

    group_rows: int  # rows that are decoded together
    row_shape: tuple[int, ...]
    dtype: np.dtype

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

    def read_group(self, group: int) -> np.ndarray:
        """Rows [group * group_rows, ...): (rows, [planes,] W, H), planes as MATLAB stores them.

        Colour and grey levels as uint8, depth as float metres (0 = none), ids as whole numbers.
        """

    def close(self) -> None:
        """Nothing is read afterwards."""


@runtime_checkable
class Source(Protocol):
    """Rows of RGB-D pictures, opened. str() is what messages call it."""

    dataset: DatasetSpec
    fields: Mapping[str, Field]
    n_rows: int
    # A file descriptor that readers travel with; None: they stay in this process.
    handle: int | None
    advice: str  # what to do first where bytes of it are damaged
    may_hang: bool  # whether reading waits for a server

    def identity(self) -> SourceIdentity:
        """Which source it is; reads little."""

    def stamp(self) -> tuple[int, ...]:
        """Differs once anybody has written to it; the last number is when, in nanoseconds."""

    def row_facts(self) -> RowFacts:
        """All of its columns. Called in another thread than the readers."""

    def reader(self, field: str) -> RowReader:
        """A reader of one field's rows."""

    def name_of(self, field: str) -> str:
        """What the field is called in the source, for messages."""

    def highest_id(self, field: str) -> int | None:
        """The highest id that the field may hold; None: what its type can hold."""

    def check_crop(self, crop: str) -> None:
        """Raise WrongSetting where the dataset's box of that name is not one of these pictures."""

    def close(self) -> None:
        """Let go of files."""


@dataclass(frozen=True, kw_only=True)
class SourceFilter:
    """Which sources a set may be of: those of that name, or with that identity; empty: any."""

    name: str | None = None
    identity: SourceIdentity | None = None

    def accepts(self, source: SourceIdentity) -> bool:
        if self.identity is not None:
            return self.identity.content() == source.content()
        return self.name is None or self.name == source.name


def filled_columns(
    columns: Mapping[str, np.ndarray | Sequence[str]], n_rows: int, dataset: DatasetSpec, crop: str
) -> dict[str, np.ndarray]:
    """Every column of the format: those given, and neutral values where the source says nothing.

    Neutral is 0, and for texts empty; a row's number is its place, its camera the dataset's.
    """
    filled: dict[str, np.ndarray] = {}
    for name, column in COLUMNS.items():
        if name in columns:
            filled[name] = np.asarray(columns[name])
        elif column.dtype == "text":
            filled[name] = np.full(n_rows, "")
        elif name == "camera" and dataset.camera is not None:
            filled[name] = np.tile(camera_shares(dataset, crop), (n_rows, 1))
        elif name == "row":
            filled[name] = np.arange(n_rows, dtype=column.dtype)
        else:
            filled[name] = np.zeros((n_rows, *column.shape), column.dtype)
        if len(filled[name]) != n_rows:
            raise ValueError(f"column {name} has {len(filled[name])} values for {n_rows} rows")
    return filled


def camera_shares(dataset: DatasetSpec, crop: str) -> np.ndarray:
    """[4] float32: the one camera of a dataset, as shares of what `crop` leaves of its pictures."""
    assert dataset.camera is not None
    shares = dataset.camera.as_shares(dataset.crop_box(crop))
    return np.array(shares, "<f4")
