"""A table of frames: one line a row, with paths and what is known of them.

    rgb,depth,split,scene
    kitchen_1/r/0001.jpg,kitchen_1/d/0001.png,train,kitchen_1

Columns go by the names that people already give them (`ALIASES`). What comes out is compact: texts
in two arrays, repeated ones as numbers, no Python object a line; a million lines take seconds and
little more memory than their paths.
"""

import hashlib
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.table_files import open_table
from convert.sources.table_json import JsonTable
from convert.sources.table_lines import MoreColumns, TableFile, memory_given_back, string_array
from shards.errors import WrongSource, shown
from shards.spec import SPLITS
from shards.texts import Texts

NONE = 2**32 - 1  # the number of an empty cell in `Names`
MAX_ROWS = 2**32
MAX_CELL_BYTES = 4096
MAX_NAMES = 1 << 18  # different texts of one column
MAX_NAMES_BYTES = 32 << 20  # all of them
CAMERA = ("fx", "fy", "cx", "cy")
ALIASES: dict[str, tuple[str, ...]] = {
    "rgb": (
        *("rgb", "image", "img", "color", "colour", "file_name", "filename", "rgb_path"),
        *("rgb_file", "rgb_file_name", "rgb_filename", "image_path", "image_file"),
        *("image_file_name", "img_path", "color_path", "colour_path"),
    ),
    "depth": (
        *("depth", "depth_path", "depth_file", "depth_file_name", "depth_filename"),
        *("depth_map", "depth_map_path"),
    ),
    "raw_depth": (
        *("raw_depth", "depth_raw", "raw_depth_path", "depth_raw_path", "raw_depth_file"),
        *("raw_depth_file_name", "depth_raw_file_name"),
    ),
    "label": (
        *("label", "semantic", "seg", "mask", "label_path", "label_file", "label_file_name"),
        *("semantic_path", "seg_path", "seg_map", "seg_map_path", "mask_path", "mask_file_name"),
    ),
    "instance": (
        *("instance", "instances", "instance_path", "instance_file", "instance_file_name"),
        "instance_map_path",
    ),
    "split": ("split", "subset", "split_partition_name"),
    "scene": ("scene", "scene_name", "place", "room"),
    "scene_type": ("scene_type", "scene_class", "category"),
    "depth_encoding": ("depth_encoding",),
    "instance_encoding": ("instance_encoding",),
    "registered": ("registered",),
    **{name: (name,) for name in CAMERA},
}
KNOWN_FIELDS = ("rgb", "depth", "raw_depth", "label", "instance")
NAMED = ("scene", "scene_type", "depth_encoding", "instance_encoding", "registered")
# What may stand in a column, where that is not for the settings to say.
CHOICES = {"instance_encoding": ("class1000",), "registered": ("yes", "no")}
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, kw_only=True)
class Names:
    """A column of repeated texts. numbers: [N] <u4, NONE where the cell is empty.

    names: what they stand for, in the order in which they first appear.
    """

    numbers: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FrameTable:
    """Lines in the order of the file.

    paths: of each field that has a column, as written; "" where a cell is empty or None.
    split: [N] |u1, numbers of shards.spec.SPLITS; None: no such column.
    columns: those of NAMED, and those asked for, as far as they are there.
    camera_px: [N, 4] <f4: fx, fy, cx, cy in pixels, 0 = unknown; None: no such column.
    sha256, n_bytes: of the texts of all columns used; the same in whatever form they are written.
    not_used: columns of the file that nothing reads. n_repeated: lines whose rgb another one has.
    """

    n_rows: int
    paths: Mapping[str, Texts]
    split: np.ndarray | None
    columns: Mapping[str, Names]
    camera_px: np.ndarray | None
    sha256: str
    n_bytes: int
    not_used: tuple[str, ...]
    n_repeated: int


def read_table(path: Path, *, fields: Mapping[str, str], also: Sequence[str] = ()) -> FrameTable:
    """Read a table file.

    fields: kinds of further fields by name; their columns are NAME, NAME_path, NAME_file or
    NAME_file_name. also: further columns to be read, by name. Raises WrongSource, which names the
    line; OSError where the file cannot be read; UserError where pyarrow is missing.
    """
    aliases = {**{name: _aliases_of_field(name) for name in fields}, **ALIASES}
    known = {name for names in aliases.values() for name in names}
    file = open_table(path, lambda text: _plain_name(text) in known)
    while True:
        chosen = _Chosen.of(path, file, aliases, also)
        try:
            return _read(path, file, chosen)
        except MoreColumns as more:
            file = JsonTable(path, more.names)


# ----------------------------------------------------------------------------- which column is what


def _plain_name(text: str) -> str:
    return re.sub(r"[\s-]+", "_", text.strip()).casefold()


def _aliases_of_field(name: str) -> tuple[str, ...]:
    if name in ALIASES:
        return ALIASES[name]
    return (name, f"{name}_path", f"{name}_file", f"{name}_file_name")


@dataclass(frozen=True)
class _Chosen:
    """The columns that are read: ours -> the file's."""

    fields: dict[str, str]
    split: str | None
    named: dict[str, str]
    camera: dict[str, str]
    not_used: tuple[str, ...]

    @classmethod
    def of(
        cls,
        path: Path,
        file: TableFile,
        aliases: Mapping[str, tuple[str, ...]],
        also: Sequence[str],
    ) -> "_Chosen":
        """Raises WrongSource where it is not clear, or where there is no rgb."""
        _check_names(path, file.names)
        found: dict[str, str] = {}
        free = [name for name in file.names if name]
        for ours, theirs in aliases.items():
            candidates = [name for name in free if _plain_name(name) in theirs]
            if candidates:
                found[ours] = _the_one(path, ours, candidates)
                free.remove(found[ours])
        if "rgb" not in found:
            _no_rgb(path, file.names)
        others = [name for name in aliases if name not in ALIASES]
        fields = [name for name in (*KNOWN_FIELDS, *others) if name in found]
        missing = [name for name in others if name not in found]
        if missing:
            raise WrongSource(path, f"has no column {missing[0]}", _it_has(file.names))
        named = {name: found[name] for name in NAMED if name in found}
        for name in also:
            if name not in named:
                named[name] = _column_called(path, name, file.names)
        return cls(
            fields={name: found[name] for name in fields},
            split=found.get("split"),
            named=named,
            camera={name: found[name] for name in CAMERA if name in found},
            not_used=tuple(name for name in free if name not in named.values()),
        )


def _check_names(path: Path, names: Sequence[str]) -> None:
    there = set()
    for name in names:
        if name and name in there:
            raise WrongSource(path, f"has two columns {shown(name)}", "Rename one of them")
        there.add(name)


def _the_one(path: Path, ours: str, candidates: list[str]) -> str:
    exact = [name for name in candidates if _plain_name(name) == ours]
    best = exact or candidates
    if len(best) > 1:
        names = " and ".join(map(shown, best[:2]))
        raise WrongSource(path, f"has two columns for {ours}: {names}", f"Call one of them {ours}")
    return best[0]


def _column_called(path: Path, name: str, names: Sequence[str]) -> str:
    same = [each for each in names if each == name]
    same = same or [each for each in names if _plain_name(each) == _plain_name(name)]
    if len(same) != 1:
        raise WrongSource(path, f"has no column {shown(name)}", _it_has(names))
    return same[0]


def _it_has(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"It has {', '.join(map(shown, names[:20]))}{more}"


def _no_rgb(path: Path, names: Sequence[str]) -> None:
    if len(names) == 1 and names[0].isprintable() and set(names[0]) & set(";|"):
        what = f"has one column, {shown(names[0])}: its cells are parted by another character"
        raise WrongSource(path, what, "Part them by commas in a .csv, by tabs in a .tsv")
    looked_for = ", ".join(ALIASES["rgb"])
    raise WrongSource(path, "has no column of rgb paths", f"{_it_has(names)}; one of {looked_for}")


# ------------------------------------------------------------------------------ a column being read


class _Growing:
    """Bytes that more are put behind, in memory of their own.

    As a bytearray it would move through the heap as it grows, and leave holes there as large as
    itself. What is reserved ahead costs nothing until it is written to.
    """

    def __init__(self) -> None:
        self.n_bytes = 0
        self._memory = _reserve(1 << 20)

    def append(self, data: np.ndarray) -> None:
        end = self.n_bytes + data.nbytes
        if end > len(self._memory):
            self._grow(end + end // 4)
        self._memory[self.n_bytes : end] = data.view(np.uint8).data
        self.n_bytes = end

    def array(self, dtype: str) -> np.ndarray:
        """[n] read-only, not copied. Nothing is appended afterwards."""
        found = np.frombuffer(self._memory, np.uint8)[: self.n_bytes].view(dtype)
        found.flags.writeable = False
        return found

    def _grow(self, n_bytes: int) -> None:
        try:
            self._memory.resize(n_bytes)
        except SystemError:  # macOS cannot: copied
            larger = _reserve(n_bytes)
            larger[: self.n_bytes] = self._memory[: self.n_bytes]
            self._memory = larger


def _reserve(n_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class _BadCell(Exception):
    """A cell that is wrong; `row` is of the whole table."""

    def __init__(self, row: int, problem: str, right: str = "") -> None:
        super().__init__(row, problem, right)
        self.row = row
        self.problem = problem
        self.right = right


class _Cells:
    """Some rows of one column, at least one: a pyarrow StringArray, seen through numpy.

    offsets: [n + 1] int32, 0 first. utf8: [n_bytes] uint8.
    """

    def __init__(self, array: Any) -> None:
        _, offsets, data = array.buffers()
        stop = array.offset + len(array) + 1
        bounds = np.frombuffer(offsets, np.int32)[array.offset : stop]
        has_bytes = data is not None and data.size > 0
        utf8 = np.frombuffer(data, np.uint8) if has_bytes else np.zeros(0, np.uint8)
        self.array = array
        self.utf8 = utf8[bounds[0] : bounds[-1]]
        self.offsets = bounds - bounds[0]
        self.lengths = np.diff(self.offsets)

    def row_of_byte(self, place: int) -> int:
        return int(np.searchsorted(self.offsets, place, side="right")) - 1


class _Column:
    """What was read of one column so far; its hash is over every text as it is written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.n_rows = 0
        self.n_bytes = 0
        self._lengths_hash = hashlib.sha256()
        self._bytes_hash = hashlib.sha256()

    def add(self, array: Any) -> None:
        """Raises _BadCell."""
        cells = _Cells(array)
        self._check(cells)
        self._keep(cells)
        self._lengths_hash.update(cells.lengths.astype("<u4").data)
        self._bytes_hash.update(cells.utf8.data)
        self.n_rows += len(cells.lengths)
        self.n_bytes += len(cells.utf8)

    def digest(self) -> bytes:
        return self._lengths_hash.digest() + self._bytes_hash.digest()

    def _check(self, cells: _Cells) -> None:
        is_long = cells.lengths > MAX_CELL_BYTES
        if is_long.any():
            k = int(is_long.argmax())
            what = f"has {cells.lengths[k]} bytes as {self.name}, more than {MAX_CELL_BYTES}"
            raise _BadCell(self.n_rows + k, what)
        # 0, line feed, carriage return: no path and no name has them.
        is_control = (cells.utf8 == 0) | (cells.utf8 == 10) | (cells.utf8 == 13)
        if is_control.any():
            row = self.n_rows + cells.row_of_byte(int(is_control.argmax()))
            raise _BadCell(row, f"has a line break or a byte 0 in {self.name}")

    def _keep(self, cells: _Cells) -> None:
        raise NotImplementedError


class _Paths(_Column):
    """A field's paths. Grown in place: memory that was reserved, but not written to, costs none."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._offsets = _Growing()
        self._offsets.append(np.zeros(1, np.int64))
        self._utf8 = _Growing()
        self.n_empty = 0
        self.first_empty = -1

    def add(self, array: Any) -> None:
        super().add(_without_none(array))

    def _keep(self, cells: _Cells) -> None:
        is_empty = cells.lengths == 0
        if is_empty.any():
            if self.first_empty < 0:
                self.first_empty = self.n_rows + int(is_empty.argmax())
            self.n_empty += int(np.count_nonzero(is_empty))
        self._offsets.append(cells.offsets[1:].astype(np.int64) + self.n_bytes)
        self._utf8.append(cells.utf8)

    def texts(self) -> Texts:
        return Texts(self._offsets.array("<i8"), self._utf8.array("|u1"))


def _without_none(array: Any) -> Any:
    """None, as BTS's lists have it, is an empty cell."""
    if not np.any(_Cells(array).lengths == 4):
        return array
    from pyarrow import compute

    none, empty = string_array(["None", ""])
    return compute.if_else(compute.equal(array, none), empty, array)


class _Named(_Column):
    """A column of repeated texts, as numbers."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._numbers = _Growing()
        self._number_of: dict[str, int] = {"": NONE}
        self._names_bytes = 0

    def _keep(self, cells: _Cells) -> None:
        encoded = cells.array.dictionary_encode()
        numbers = [self._number(text) for text in encoded.dictionary.to_pylist()]
        if len(self._number_of) > MAX_NAMES or self._names_bytes > MAX_NAMES_BYTES:
            what = f"or one soon after has too many different values of {self.name}"
            right = f"That column is for what lines share: at most {MAX_NAMES} values"
            raise _BadCell(self.n_rows, what, right)
        # Not to_numpy(), which imports pandas: 50 MB.
        _, data = encoded.indices.buffers()
        indices = np.frombuffer(data, np.int32)[: len(cells.lengths)]
        self._numbers.append(np.array(numbers, "<u4")[indices])

    def _number(self, text: str) -> int:
        number = self._number_of.get(text)
        if number is None:
            number = len(self._number_of) - 1
            self._number_of[text] = number
            self._names_bytes += len(text)
        return number

    def names(self) -> Names:
        numbers = self._numbers.array("<u4")
        return Names(numbers=numbers, names=tuple(self._number_of)[1:])


class _Split(_Named):
    """The column `split`."""

    def values(self, where: TableFile) -> np.ndarray:
        """[N] |u1. Raises _BadCell for a value that is no split."""
        found = self.names()
        words = [SPLIT_NAMES.get(name.strip().casefold()) for name in found.names]
        numbers = np.array([*(SPLITS.index(word) if word else 255 for word in words), 255], "|u1")
        values = numbers[np.minimum(found.numbers, len(words))]
        if np.any(values == 255):
            row = int((values == 255).argmax())
            number = found.numbers[row]
            said = "no split" if number == NONE else f"{shown(found.names[number])} as split"
            raise _BadCell(row, f"has {said}", "A split is train, val or test")
        return values


class _Numbers(_Column):
    """A column of the camera: pixels, 0 where a cell is empty."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._values = _Growing()

    def _keep(self, cells: _Cells) -> None:
        import pyarrow as pa
        from pyarrow import compute

        texts = compute.utf8_trim_whitespace(cells.array)
        empty, zero = string_array(["", "0"])
        texts = compute.if_else(compute.equal(texts, empty), zero, texts)
        try:
            numbers = texts.cast(pa.float64())
            values = np.frombuffer(numbers.buffers()[1], np.float64)[: len(numbers)]
        except pa.ArrowInvalid:
            values = np.array([_number_or_nan(text.as_py()) for text in texts])
        with np.errstate(over="ignore"):
            stored = values.astype("<f4")
        is_wrong = ~np.isfinite(stored)
        if is_wrong.any():
            k = int(is_wrong.argmax())
            said = shown(cells.array[k].as_py())
            raise _BadCell(self.n_rows + k, f"has {said} as {self.name}, which is no number")
        self._values.append(stored)

    def values(self) -> np.ndarray:
        return self._values.array("<f4")


def _number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


# ---------------------------------------------------------------------------------------- the whole


def _read(path: Path, file: TableFile, chosen: _Chosen) -> FrameTable:
    paths = {name: _Paths(name) for name in chosen.fields}
    named = {name: _Named(name) for name in chosen.named}
    split = None if chosen.split is None else _Split("split")
    camera = {name: _Numbers(name) for name in chosen.camera}
    columns: list[tuple[str, _Column]] = [
        *((chosen.fields[name], column) for name, column in paths.items()),
        *((chosen.named[name], column) for name, column in named.items()),
        *((chosen.camera[name], column) for name, column in camera.items()),
    ]
    if chosen.split is not None and split is not None:
        columns.append((chosen.split, split))
    try:
        n_rows = _read_columns(path, file, columns)
        if paths["rgb"].n_empty:
            n_empty = paths["rgb"].n_empty
            others = f" ({n_empty} lines have none)" if n_empty > 1 else ""
            raise _BadCell(paths["rgb"].first_empty, f"has no rgb path{others}")
        split_values = None if split is None else split.values(file)
    except _BadCell as bad:
        where = f"{file.row_word} {file.number_of(bad.row)}"
        raise WrongSource(path, f": {where} {bad.problem}", bad.right) from None
    columns_named = {name: column.names() for name, column in named.items()}
    _check_choices(path, columns_named)
    texts = {name: column.texts() for name, column in paths.items()}
    used = [column for _, column in columns]
    return FrameTable(
        n_rows=n_rows,
        paths=texts,
        split=split_values,
        columns=columns_named,
        camera_px=_camera(camera, n_rows),
        sha256=_sha256(used),
        n_bytes=sum(column.n_bytes for column in used),
        not_used=chosen.not_used,
        n_repeated=_n_repeated(texts["rgb"]),
    )


def _check_choices(path: Path, columns: Mapping[str, Names]) -> None:
    for name, choices in CHOICES.items():
        found = columns[name].names if name in columns else ()
        wrong = [text for text in found if text not in choices]
        if wrong:
            what = f": column {name} has {shown(wrong[0])}"
            raise WrongSource(path, what, f"It holds {' or '.join(choices)}, or nothing")


def _read_columns(path: Path, file: TableFile, columns: Sequence[tuple[str, _Column]]) -> int:
    """Fill them with all rows of the file; how many there are."""
    theirs = list(dict.fromkeys(name for name, _ in columns))
    n_rows = 0
    with memory_given_back():
        for arrays in file.batches(theirs):
            of_name = dict(zip(theirs, arrays, strict=True))
            if not len(arrays[0]):
                continue
            n_rows += len(arrays[0])
            if n_rows > MAX_ROWS:
                raise WrongSource(path, f"has more than {MAX_ROWS} lines", "Part it")
            for name, column in columns:
                column.add(of_name[name])
    if not n_rows:
        raise WrongSource(path, f"has columns and no {file.row_word}s")
    return n_rows


def _camera(columns: Mapping[str, _Numbers], n_rows: int) -> np.ndarray | None:
    if not columns:
        return None
    camera = np.zeros((n_rows, len(CAMERA)), "<f4")
    for name, column in columns.items():
        camera[:, CAMERA.index(name)] = column.values()
    return camera


def _sha256(columns: Sequence[_Column]) -> str:
    """Over each column in the order of our names: its name, the hash of its texts' lengths (<u4)
    and that of their bytes. A column that is not there is left out: an empty one is a field of 0.
    """
    found = hashlib.sha256()
    for column in sorted(columns, key=lambda each: each.name):
        found.update(column.name.encode() + b"\0" + column.digest())
    return found.hexdigest()


def _n_repeated(texts: Texts) -> int:
    """How many are equal to another one, by their 64-bit hashes."""
    hashes = texts.hashes()
    hashes.sort()
    is_next = hashes[1:] == hashes[:-1]
    is_repeated = np.zeros(len(hashes), bool)
    is_repeated[1:] = is_next
    is_repeated[:-1] |= is_next
    return int(np.count_nonzero(is_repeated))
