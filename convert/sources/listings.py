"""What a layout makes of a directory: a table of its frames, and what is said of it."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.roots import Root
from convert.sources.tables import NONE, FrameTable, Names
from shards.errors import WrongSource
from shards.spec import KNOWN_FIELDS, SPLITS, DatasetSpec
from shards.texts import Texts

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".pnm", ".npy"),
    *(".tif", ".tiff", ".bmp", ".webp", ".gif"),
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a layout.

    kinds: of further fields, by name. known: of the known fields those that are wanted; others may
    be passed over. roots: where paths lead, as the user wrote them.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    known: Sequence[str] = tuple(KNOWN_FIELDS)
    roots: tuple[str, ...] = ()

    @property
    def fields(self) -> list[str]:
        """All that are wanted, rgb among them in any case."""
        all_of_them = ("rgb", *self.known, *self.kinds)
        return [name for name in (*KNOWN_FIELDS, *self.kinds) if name in all_of_them]


@dataclass(frozen=True)
class Found:
    """A file: its path in the directory, and what one listing tells of it."""

    path: str
    n_bytes: int
    changed_ns: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A directory as a table.

    stamp: differs once a file of it was changed, added or removed; the last number is when, in
    nanoseconds. notes: what is left out of the table. spec: what is known of the dataset; its
    warnings are said, and scene types that it has not are behind those that it has. roots: where
    paths lead, if not into the directory. opened: of these the ones that are open. own_columns:
    [N] of the lines, by name; further columns of the set.
    """

    table: FrameTable
    stamp: tuple[int, ...]
    notes: tuple[str, ...] = ()
    spec: DatasetSpec | None = None
    roots: tuple[str, ...] = ()
    opened: Mapping[str, Root] = field(default_factory=dict)
    own_columns: Mapping[str, np.ndarray] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------- files


def status_of(path: str, entry: "os.DirEntry[str]") -> Found:
    """A link to nowhere is listed too: its row fails, and says that the file is missing."""
    try:
        stat = entry.stat()
    except FileNotFoundError:
        return Found(path, 0, 0)
    return Found(path, stat.st_size, stat.st_mtime_ns)


def found_at(directory: Path, path: str) -> Found:
    """A file that is there. Raises OSError."""
    stat = os.stat(directory / path)
    return Found(path, stat.st_size, stat.st_mtime_ns)


def named(path: str) -> Found:
    """A picture that a list names, which is not looked at: of a list, as of a table, the lines are
    what makes it another source. Its row fails where it is not there.
    """
    return Found(path, 0, 0)


def entries_of(folder: Path) -> list["os.DirEntry[str]"]:
    """What lies in a folder, by name, without what is hidden.

    Raises WrongSource for a name that is no text, and OSError.
    """
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if not entry.name.isprintable():  # such as bytes that are no UTF-8
            raise WrongSource(folder, f"has a file called {entry.name!r}", "Give it another name")
        found.append(entry)
    return found


def folders_in(folder: Path) -> list[Path]:
    """The folders in it, by name, without those that are hidden or whose name is no text."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return [folder / name for name in sorted(names) if name[0] != "." and name.isprintable()]


def lists_in(folder: Path) -> list[str]:
    """The names of the .txt files in it, without those that are no text."""
    names = [entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(".txt")]
    return [name for name in sorted(names) if name[0] != "." and name.isprintable()]


def pictures_under(folder: Path, *, is_deep: bool = True) -> Iterator["os.DirEntry[str]"]:
    """Every picture file; what is hidden, as .DS_Store and ._x.png, is none."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        is_picture = os.path.splitext(entry.name)[1].lower() in SUFFIXES
        # A link may lead to a folder that it lies in.
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name.startswith(".") or not (is_picture or is_folder):
            continue
        if not entry.name.isprintable():  # such as bytes that are no UTF-8
            raise WrongSource(folder, f"has a file called {entry.name!r}", "Give it another name")
        if is_picture and not is_folder:
            yield entry
        elif is_folder and is_deep:
            yield from pictures_under(Path(entry.path))


def refuse_further_fields(source: Path, wanted: Wanted) -> None:
    """Raise WrongSource for fields that a layout has no folder of."""
    if wanted.kinds:
        name = next(iter(wanted.kinds))
        what = f"has no {name} in its layout"
        raise WrongSource(source, what, "Write its table, and add a column")


def stamp_of(files: Iterable[Found]) -> tuple[int, ...]:
    """How many, a hash over their names, sizes and times, and when the newest was changed."""
    ordered = sorted(files, key=lambda each: each.path)
    digest = hashlib.sha256()
    for each in ordered:
        line = f"{each.path}\0{each.n_bytes}\0{each.changed_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    newest_ns = max(each.changed_ns for each in ordered)
    return len(ordered), int.from_bytes(digest.digest()[:8], "big"), newest_ns


# ----------------------------------------------------------------------------------------- tables


def numbered(texts: Iterable[str]) -> Names:
    """A column of repeated texts; "" is a text like any other."""
    number_of: dict[str, int] = {}
    of_rows = [number_of.setdefault(text, len(number_of)) for text in texts]
    return Names(numbers=np.array(of_rows, np.uint32), names=tuple(number_of))


def column_of(texts: Iterable[str]) -> Names:
    """A column of repeated texts; "" is an empty cell."""
    number_of = {"": NONE}
    of_rows = [number_of.setdefault(text, len(number_of) - 1) for text in texts]
    return Names(numbers=np.array(of_rows, np.uint32), names=tuple(number_of)[1:])


def hash_of_files(fields: Mapping[str, Sequence[Found | None]]) -> tuple[Any, int]:
    """(a SHA-256 that may go on, bytes): over the paths and sizes of each field's files."""
    digest = hashlib.sha256()
    n_bytes = 0
    for name, files in fields.items():
        digest.update(f"\0{name}\0".encode())
        for one in files:
            line = f"{one.path}\0{one.n_bytes}\n" if one else "\n"
            encoded = line.encode(errors="surrogateescape")
            digest.update(encoded)
            n_bytes += len(encoded)
    return digest, n_bytes


def table_of(
    fields: Mapping[str, Sequence[Found | None]],
    columns: Mapping[str, Sequence[str]],
    *,
    split: Sequence[str] | None = None,
    camera_px: np.ndarray | None = None,
) -> FrameTable:
    """A table of rows that are given by columns. fields: each row's file, None where there is none.

    columns: texts, "" for an empty cell; a column of those alone is left out. split: of
    shards.spec.SPLITS. camera_px: [N, 4], see FrameTable. All of that is in the hash, with the
    sizes of files.
    """
    numbers = {name: column_of(texts) for name, texts in columns.items() if any(texts)}
    splits = None if split is None else np.array([SPLITS.index(name) for name in split], np.uint8)
    cameras = None if camera_px is None else np.asarray(camera_px, "<f4")
    digest, n_bytes = hash_of_files(fields)
    for name, column in numbers.items():
        digest.update("\0".join((f"\0{name}", *column.names)).encode(errors="surrogateescape"))
        digest.update(column.numbers.astype("<u4").tobytes())
    for name, array in (("split", splits), ("camera", cameras)):
        if array is not None:
            digest.update(f"\0{name}\0".encode() + array.tobytes())

    return FrameTable(
        n_rows=len(fields["rgb"]),
        paths={
            name: Texts.from_strings(each.path if each else "" for each in files)
            for name, files in fields.items()
        },
        split=splits,
        columns=numbers,
        camera_px=cameras,
        sha256=digest.hexdigest(),
        n_bytes=n_bytes,
        not_used=(),
        n_repeated=_n_repeated(fields["rgb"]),
    )


def _n_repeated(files: Sequence[Found | None]) -> int:
    """How many are there more than once."""
    n_of_path = Counter(each.path for each in files if each)
    return sum(n for n in n_of_path.values() if n > 1)
