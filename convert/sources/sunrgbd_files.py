"""Where the files of SUN RGB-D lie: unpacked, or in SUNRGBD.zip as it was downloaded.

    DIR/SUNRGBD/kv2/...    DIR/SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat    or
    DIR/SUNRGBD.zip        DIR/SUNRGBDtoolbox.zip                              or one of each

Of the 400,000 files only those are touched that a set is made of.
"""

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from convert.sources.archives import Archive, ZipArchive
from convert.sources.errors import BadRow
from convert.sources.listings import SUFFIXES, Found, entries_of, found_at, stamp_of, status_of
from convert.sources.roots import ArchiveRoot, Root
from convert.sources.sunrgbd_tables import HOME, LABELS_FILE, META_FILE, SENSORS, SPLIT_FILE
from shards.errors import WrongSource
from stores.mounted import patiently

ROWS = "SUNRGBD"
TOOLBOX = "SUNRGBDtoolbox"
FOLDERS = {"image": "rgb", "depth_bfx": "depth", "depth": "raw_depth"}  # of a row: its fields
TEXTS = ("scene.txt", "intrinsics.txt")
MAX_TEXT_BYTES = 4096
ABSENT = {errno.ENOENT, errno.ENOTDIR}
PICTURE_NAME = re.compile(
    rf"(?:(.*?)/)??((?:{'|'.join(SENSORS)})/.+)/({'|'.join(FOLDERS)})/([^/.][^/]*)"
)
Pictures = dict[str, list[Found]]  # by the folder of a row


class RowFiles(Protocol):
    """The files of rows, wherever they lie; all paths are relative to SUNRGBD/."""

    @property
    def place(self) -> Path:
        """The folder or archive."""

    @property
    def opened(self) -> Mapping[str, Root]:
        """By `place`, where it is open already."""

    def pictures(self, sequence: str) -> Pictures:
        """Of a row, those in each of FOLDERS; {} where it has no such folder."""

    def text(self, path: str) -> bytes | None:
        """The first bytes of a file; None where there is none."""

    def stamp(self, sequences: Sequence[str]) -> Iterator[Found]:
        """Files of these rows, or the one that they are in, which tell whether any was changed."""

    def close(self) -> None:
        """An archive is opened again where more is read of it."""


class TreeFiles:
    """An unpacked SUNRGBD/."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.opened: Mapping[str, Root] = {}

    def pictures(self, sequence: str) -> Pictures:
        """See RowFiles."""
        found: Pictures = {}
        for folder in FOLDERS:
            entries = self._entries(f"{sequence}/{folder}")
            if entries is not None:
                found[folder] = entries
        return found

    def text(self, path: str) -> bytes | None:
        """See RowFiles."""
        return patiently(partial(self._text, path), f"reading {path}")

    def stamp(self, sequences: Sequence[str]) -> Iterator[Found]:
        """See RowFiles."""
        for sequence in sequences:
            for pictures in self.pictures(sequence).values():
                yield from pictures
            for name in TEXTS:
                with suppress(FileNotFoundError, NotADirectoryError):
                    yield found_at(self.place, f"{sequence}/{name}")

    def close(self) -> None:
        """No file stays open."""

    def _entries(self, folder: str) -> list[Found] | None:
        try:
            entries = patiently(partial(entries_of, self.place / folder), f"reading {folder}")
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise
        return [
            status_of(f"{folder}/{entry.name}", entry)
            for entry in entries
            if Path(entry.name).suffix.lower() in SUFFIXES
        ]

    def _text(self, path: str) -> bytes | None:
        try:
            with open(self.place / path, "rb") as file:
                return file.read(MAX_TEXT_BYTES)
        except OSError as error:
            if error.errno in ABSENT:
                return None
            raise


class ZipFiles:
    """SUNRGBD.zip. Of its names only those of pictures are kept, as they cannot be guessed."""

    def __init__(self, place: Path) -> None:
        """Raises WrongSource where it is no zip, or damaged."""
        self.place = place
        self._folder: str | None = None  # that all rows are in
        self._names: dict[tuple[str, str], list[str]] = {}
        self.archive: Archive = ZipArchive(place, self._note)

    @property
    def opened(self) -> Mapping[str, Root]:
        """See RowFiles."""
        return {str(self.place): ArchiveRoot(self.archive, self._folder or "")}

    def pictures(self, sequence: str) -> Pictures:
        """See RowFiles."""
        found: Pictures = {}
        for folder in FOLDERS:
            names = self._names.get((sequence, folder))
            if names is not None:
                paths = [f"{sequence}/{folder}/{name}" for name in sorted(names)]
                found[folder] = [Found(path, self._size_of(path), 0) for path in paths]
        return found

    def text(self, path: str) -> bytes | None:
        """See RowFiles."""
        n_bytes = self.archive.size_of(self._inside(path))
        if n_bytes is None:
            return None
        try:
            return self.archive.read(self._inside(path))[:MAX_TEXT_BYTES]
        except BadRow:  # such as an empty one
            return b""

    def stamp(self, sequences: Sequence[str]) -> Iterator[Found]:
        """See RowFiles."""
        yield found_at(self.place.parent, self.place.name)

    def close(self) -> None:
        """See RowFiles."""
        self.archive.close()

    def _note(self, raw_name: bytes) -> None:
        parts = raw_name.rsplit(b"/", 2)
        if len(parts) != 3 or parts[1].decode("latin-1") not in FOLDERS:
            return
        found = PICTURE_NAME.fullmatch(raw_name.decode("utf-8", "replace"))
        if found is None or Path(found[4]).suffix.lower() not in SUFFIXES:
            return
        folder = found[1] or ""
        if self._folder is None:
            self._folder = folder
        if folder == self._folder:
            self._names.setdefault((found[2], found[3]), []).append(found[4])

    def _inside(self, path: str) -> str:
        return f"{self._folder}/{path}" if self._folder else path

    def _size_of(self, path: str) -> int:
        return self.archive.size_of(self._inside(path)) or 0


# ------------------------------------------------------------------------------------ what is where


@dataclass(frozen=True, kw_only=True)
class SunPlaces:
    """rows: SUNRGBD/ or its archive.

    split: allsplit.mat, or the archive that it is in. labels: SUNRGBD2Dseg.mat, and meta:
    SUNRGBDMeta.mat; None: not there.
    """

    rows: Path
    split: Path
    labels: Path | None
    meta: Path | None

    def row_files(self) -> RowFiles:
        """Raises WrongSource for a damaged archive."""
        return TreeFiles(self.rows) if self.rows.is_dir() else ZipFiles(self.rows)

    def split_data(self) -> bytes:
        """The bytes of allsplit.mat. Raises WrongSource, OSError."""
        if not is_zip(self.split):
            return patiently(self.split.read_bytes, f"reading {self.split}")
        with closing(ZipArchive(self.split)) as archive:
            for name in (f"{TOOLBOX}/{SPLIT_FILE}", SPLIT_FILE):
                if archive.size_of(name) is not None:
                    return archive.read(name)
        raise _no_split(self.split)

    def stamp(self, files: Sequence[Found]) -> tuple[int, ...]:
        """Of these files of rows, of the split and of the labels."""
        files_of_toolbox = (self.split, self.labels, self.meta)
        others = [each for each in files_of_toolbox if each is not None]
        return stamp_of([*files, *(found_at(each.parent, each.name) for each in others)])


def places_of(path: Path) -> SunPlaces:
    """path: the folder of SUNRGBD/ and SUNRGBDtoolbox/, SUNRGBD/ itself, or an archive of it.

    Raises WrongSource where one of them is missing.
    """
    rows = _rows_at(path)
    if rows is None:
        what = f"has no {ROWS}/ with kv1/, kv2/, ... in it, nor {ROWS}.zip"
        raise WrongSource(path, what, "Unpack it, or put it there as it was downloaded")
    folders = list(dict.fromkeys(each for each in (path, rows.parent, rows) if each.is_dir()))
    split = _first_of(folders, SPLIT_FILE, f"{TOOLBOX}.zip")
    if split is None:
        raise _no_split(path)
    return SunPlaces(
        rows=rows,
        split=split,
        labels=_first_of(folders, LABELS_FILE),
        meta=_first_of(folders, META_FILE),
    )


def is_sunrgbd(path: Path) -> bool:
    """Whether a directory, or a file by its name, is one for `places_of`; little is looked at."""
    if not path.is_dir():
        return is_zip(path) and path.name.lower().startswith("sunrgbd")
    rows = _rows_at(path)
    n_sensors = sum((path / sensor).is_dir() for sensor in SENSORS)
    return rows is not None and (rows != path or path.name == ROWS or n_sensors > 1)


def is_zip(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == ".zip"


def _rows_at(path: Path) -> Path | None:
    if not path.is_dir():
        return path if is_zip(path) else None
    for folder in (path / ROWS, path):
        if any((folder / sensor).is_dir() for sensor in SENSORS):
            return folder
    archive = path / f"{ROWS}.zip"
    return archive if archive.is_file() else None


def _first_of(folders: Sequence[Path], name: str, archive: str = "") -> Path | None:
    """A file of the toolbox: in it, by itself, or in the archive of it."""
    for folder in folders:
        for place in (f"{TOOLBOX}/{name}", name, Path(name).name, archive):
            if place and (folder / place).is_file():
                return folder / place
    return None


def _no_split(path: Path) -> WrongSource:
    """The error, to be raised."""
    what = f"has no allsplit.mat, which says what is train and test: it is {SPLIT_FILE} of"
    right = f"Put {HOME} beside {ROWS}, or unpack it there"
    return WrongSource(path, f"{what} {TOOLBOX}.zip", right)
