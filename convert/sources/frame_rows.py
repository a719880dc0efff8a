"""The pictures of one row of a table: found, decoded, brought to one meaning, and of one size.

What a reader holds travels to helper processes: the paths of all rows as shared memory, the rest as
a few numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.resize import StoredPixels
from convert.sources.base import Picture
from convert.sources.depth_encodings import DepthRule, check_names
from convert.sources.errors import BadRow
from convert.sources.pictures import decode
from convert.sources.planes import read_plane, split_reference
from convert.sources.roots import Roots
from convert.sources.shared_arrays import SharedArrays
from convert.sources.tables import NONE, Names
from shards.spec import MAX_ID, ConversionSettings, Field
from shards.texts import Texts

# Columns that say how the pictures of a row are to be understood.
SAID = ("depth_encoding", "instance_encoding", "registered")
IDS_A_CLASS = 1000  # of the instance encoding "class1000": class * 1000 + number within the class


class FrameRows:
    """What is known of each row before it is read, in the order of the set.

    paths: of each field as written, "" where there is none. lines: [N] <u4 of the table, 0 first.
    names: what stands in each column of SAID, as far as the table has it.
    """

    def __init__(
        self, paths: dict[str, Texts], columns: Mapping[str, Names], lines: np.ndarray
    ) -> None:
        """paths: of each field, by lines; they are taken out of the dictionary, as each is let go
        of before the next one is put in order. columns: by lines. lines: [N] of each row.
        """
        self.fields = tuple(paths)
        self.names = {name: columns[name].names for name in SAID if name in columns}
        shapes = {name: ("<u4", lines.shape) for name in ("lines", *self.names)}
        for field, texts in paths.items():
            shapes[f"{field}.offsets"] = ("<i8", texts.offsets.shape)
            shapes[f"{field}.utf8"] = ("|u1", texts.utf8.shape)
        self.arrays = SharedArrays(shapes)
        self.arrays.write("lines", lines)
        for name in self.names:
            self.arrays.write(name, columns[name].numbers[lines])
        for field in self.fields:
            of_rows = paths.pop(field).take(lines)
            self.arrays.write(f"{field}.offsets", of_rows.offsets)
            self.arrays.write(f"{field}.utf8", of_rows.utf8)
        self._paths: dict[str, Texts] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_paths": {}}  # views of memory that is mapped again

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lines(self) -> np.ndarray:
        return self.arrays["lines"]

    def paths(self, field: str) -> Texts:
        if field not in self._paths:  # checking their offsets takes a while
            texts = Texts(self.arrays[f"{field}.offsets"], self.arrays[f"{field}.utf8"])
            self._paths[field] = texts
        return self._paths[field]

    def said(self, name: str, row: int) -> str | None:
        """What stands in a column of SAID; None where the table says nothing."""
        if name not in self.names:
            return None
        number = int(self.arrays[name][row])
        return None if number == NONE else self.names[name][number]

    def encoding_of(self, row: int) -> str | None:
        """Of its depth; None where the table says nothing of it."""
        return self.said("depth_encoding", row)


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """void: the stored id that is void; other ids move up by one where it is not 0. None: 0 is
    void, and ids stay.
    """

    void: int | None

    def stored(self, ids: np.ndarray) -> np.ndarray:
        """(H, W) uint16 as in the file -> as in the set, 0 = void. Raises BadRow."""
        if self.void:
            is_void = ids == self.void
            if ids.max(initial=0, where=~is_void) == MAX_ID:
                raise BadRow(f"has the id {MAX_ID}, which leaves no room for the void")
            ids = np.where(is_void, 0, ids + np.uint16(1)).astype(np.uint16)
        return ids


@dataclass(frozen=True, kw_only=True)
class DepthRules:
    """How depth is stored: as each row's own column says, else as one rule for all."""

    usual: DepthRule
    by_name: Mapping[str, DepthRule]

    @classmethod
    def of(cls, rows: FrameRows, settings: ConversionSettings) -> "DepthRules":
        """Raises WrongSetting for a name that is no encoding."""
        usual = DepthRule(
            encoding=settings.depth_encoding,
            scale=settings.depth_scale,
            trunc_m=settings.depth_trunc,
        )
        by_name = {}
        for name in rows.names.get("depth_encoding", ()):
            check_names(name, None, None)
            by_name[name] = replace(usual, encoding=name, scale=None)
        return cls(usual=usual, by_name=by_name)

    def of_row(self, rows: FrameRows, row: int) -> DepthRule:
        name = rows.encoding_of(row)
        return self.usual if name is None else self.by_name[name]


class FramesReader:
    """Rows of a table, all fields of one together. See convert.sources.base.RowReader."""

    group_rows = 1
    is_hw = True
    scratch_bytes = 0
    can_travel = True

    def __init__(
        self,
        fields: Sequence[Field],
        rows: FrameRows,
        roots: Roots,
        depth_rules: DepthRules,
        label_rule: LabelRule,
    ) -> None:
        self.fields = tuple(field.name for field in fields)
        self.row_bytes = 0  # until a row was read
        self._kinds = {field.name: field for field in fields}
        self._rows = rows
        self._roots = roots
        self._depth_rules = depth_rules
        self._label_rule = label_rule

    def called(self, row: int | None = None) -> str:
        if row is None:
            return "its pictures"
        return f"row {self._rows.lines[row]}"

    def read_index(self) -> None:
        """Paths are all that is needed."""

    def fill_scratch(self, directory: Path, run: Callable[..., Any] = map) -> None:
        """Nothing has to be unpacked first."""

    def close(self) -> None:
        """The source closes what readers share."""

    def read_group(self, group: int) -> Mapping[str, Sequence[Picture]]:
        """The pictures of the row `group`. Raises BadRow, which names the row and its file."""
        found: dict[str, Picture] = {}
        for name in self.fields:
            path = self._path(name, group)
            if path:
                with self._naming(group, path):
                    found[name] = self._picture(self._kinds[name], path, group)
        size = self._common_size(group, found)
        return {name: [self._or_nothing(name, found, size)] for name in self.fields}

    def stored_depth(self, field: str, row: int) -> np.ndarray | None:
        """(H, W) as in the file, before any encoding; None where the row has none.

        Raises BadRow.
        """
        path = self._path(field, row)
        if not path:
            return None
        with self._naming(row, path):
            return self._as_in_file(self._kinds[field], path, row)

    # ------------------------------------------------------------------ one picture

    def _path(self, field: str, row: int) -> str:
        return self._rows.paths(field)[row] if field in self._rows.fields else ""

    @contextmanager
    def _naming(self, row: int, path: str) -> Iterator[None]:
        try:
            yield
        except BadRow as error:
            problem = str(error)
            names_it = problem.startswith(path)  # as roots do, and decoders do not
            said = problem if names_it else f"{path} {problem}"
            raise BadRow(f"{self.called(row)}: {said}") from None

    def _picture(self, field: Field, path: str, row: int) -> Picture:
        """(H, W[, 3]) with the meaning that the field has in a set."""
        pixels = self._as_in_file(field, path, row)
        if field.kind not in ("depth", "id"):
            return pixels
        meaning = partial(self._meaning, field, path, row)
        rule = self._depth_rules.of_row(self._rows, row)
        if field.kind == "depth" and not rule.is_of_each_pixel:
            return meaning(pixels)
        return StoredPixels(pixels, meaning)

    def _meaning(self, field: Field, path: str, row: int, pixels: np.ndarray) -> np.ndarray:
        """Pixels of one picture as a set has them. Raises BadRow."""
        with self._naming(row, path):
            if field.kind == "depth":
                return self._depth_rules.of_row(self._rows, row).to_mm(pixels)
            if field.name == "label":
                return self._label_rule.stored(pixels)
            if field.name == "instance" and self._rows.said("instance_encoding", row):
                pixels = pixels % IDS_A_CLASS
            highest = int(np.iinfo(field.dtype).max)
            if pixels.max() > highest:
                raise BadRow(f"has the id {pixels.max()}, beyond {highest}")
            return pixels

    def _as_in_file(self, field: Field, path: str, row: int) -> np.ndarray:
        file, part = split_reference(path)
        if part is not None:
            return read_plane(self._roots.file(field.name, file), part, field.name, field.kind)
        data = self._roots.read(field.name, path)
        rule = self._depth_rules.of_row(self._rows, row)
        is_swapped = field.kind == "depth" and rule.is_little_endian_pnm
        return decode(data, field.kind, little_endian=is_swapped).pixels

    # ------------------------------------------------------------------ all pictures of a row

    def _common_size(self, row: int, found: Mapping[str, Picture]) -> tuple[int, int]:
        """(H, W) of every picture of the row; of its first, where they show the same in any size.

        Raises BadRow where they differ, or none is there.
        """
        if not found:
            raise BadRow(f"{self.called(row)}: no picture of {', '.join(self.fields)}")
        sizes = {name: picture.shape[:2] for name, picture in found.items()}
        first_name, first = next(iter(sizes.items()))
        if self._rows.said("registered", row) == "yes":
            return first[0], first[1]
        for name, size in sizes.items():
            if size != first:
                what = f"{name} is {size[1]}x{size[0]}, {first_name} {first[1]}x{first[0]}"
                raise BadRow(f"{self.called(row)}: {self._path(name, row)}: {what} pixels")
        return first[0], first[1]

    def _or_nothing(
        self, name: str, found: Mapping[str, Picture], size: tuple[int, int]
    ) -> Picture:
        """The picture, or, where its cell is empty, one of 0."""
        if name in found:
            return found[name]
        field = self._kinds[name]
        channels = field.planes  # before (H, W) in a set, behind it in a picture
        return np.zeros((*size, *channels), field.dtype)
