"""Directories that are laid out in a known way, as tables of frames.

DIR/rgb/kitchen/0001.jpg  DIR/depth/kitchen/0001.png  ...      frames: by equal names
DIR/train/rgb/0001.jpg    DIR/train/depth/0001.png    ...      the same in each split
DIR/rgb/train/0001.jpg    DIR/depth/train/0001.png    ...      or so
DIR/0001.jpg              DIR/depth/0001.png          ...      pictures that lie in DIR itself
"""

import csv
import hashlib
import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.sources.tables import SPLIT_NAMES, FrameTable, Names
from shards.errors import WrongSource
from shards.files import HashingFile, log, write_atomically
from shards.spec import KNOWN_FIELDS, SPLITS
from shards.texts import Texts

# What people call the folder of a field.
FOLDERS = {
    "rgb": ("rgb", "image", "images", "color", "colour"),
    "depth": ("depth", "depths"),
    "raw_depth": ("raw_depth", "depth_raw"),
    "label": ("label", "labels", "semantic", "seg", "masks"),
    "instance": ("instance", "instances"),
}
SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".pnm", ".npy"),
    *(".tif", ".tiff", ".bmp", ".webp", ".gif"),
}
SHOWN = 2  # names in a message


@dataclass(frozen=True)
class Found:
    """A picture: its path in the directory, and what one listing tells of the file."""

    path: str
    n_bytes: int
    changed_ns: int


Pictures = Mapping[str, Found]  # by the name that the pictures of one row have in common


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A directory as a table. stamp: differs once a file of it was changed, added or removed; the
    last number is when, in nanoseconds. notes: what is left out of the table.
    """

    table: FrameTable
    stamp: tuple[int, ...]
    notes: tuple[str, ...]


def list_frames(
    directory: Path, kinds: Mapping[str, str], fields: Collection[str] = tuple(KNOWN_FIELDS)
) -> Listing:
    """The frames of a directory, each with the pictures of its name. kinds: of further fields, each
    in a folder of its name. fields: of the known ones those that are wanted; others are passed
    over. Raises WrongSource where it is not laid out so, and OSError.
    """
    wanted = [name for name in (*KNOWN_FIELDS, *kinds) if name in ("rgb", *fields, *kinds)]
    folders = _folders(directory, wanted)
    is_alone = all(folder.field == "rgb" for folder in folders)
    found: dict[str, dict[str, Found]] = {}
    for folder in folders:
        pictures = _pictures_in(directory, folder, with_suffix=is_alone)
        found.setdefault(folder.field, {}).update(pictures)
    if not found.get("rgb"):
        raise WrongSource(directory, f"has no pictures in {FOLDERS['rgb'][0]}/")
    _check_paired(directory, found)
    return Listing(
        table=_table(found, sorted(found["rgb"])),
        stamp=_stamp(found),
        notes=(*_not_looked_into(directory, folders), *_notes(found)),
    )


def write_table(directory: Path, kinds: Mapping[str, str], out: Path) -> int:
    """The table that a directory is read as, as CSV; how many lines. Raises WrongSource."""
    listing = list_frames(directory, kinds)
    for note in listing.notes:
        log(f"{directory}: {note}")
    table = listing.table
    header = [*table.paths, *(["split"] if table.split is not None else []), *table.columns]

    def lines() -> Iterator[list[str]]:
        for line in range(table.n_rows):
            cells = [paths[line] for paths in table.paths.values()]
            if table.split is not None:
                cells.append(SPLITS[table.split[line]])
            cells += [named.names[named.numbers[line]] for named in table.columns.values()]
            yield cells

    def write(file: HashingFile) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines())
        text.flush()
        text.detach()

    write_atomically(out, write)
    return table.n_rows


# ---------------------------------------------------------------- what lies where


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where pictures of a field lie. part: "", or the folder of a split that it is in. name: in
    that; "" for pictures that lie in the directory itself, of which the folders are not looked
    into: they may hold anything.
    """

    field: str
    part: str
    name: str

    @property
    def path(self) -> str:
        """In the directory; "" for itself."""
        return "/".join(filter(None, (self.part, self.name)))


def _folders(directory: Path, fields: Sequence[str]) -> list[Folder]:
    """Of the fields that have one. Raises WrongSource where there is none of rgb."""
    parts = [""] if _folder_of(directory, "rgb") is not None else _splits_in(directory)
    found = [
        Folder(field=field, part=part, name=name)
        for part in parts
        for field in fields
        if (name := _folder_of(directory / part, field)) is not None
    ]
    if parts:
        return found
    if next(_pictures_under(directory, is_deep=False), None) is None:
        what = "is no directory of a known layout: it has no folder rgb, no train/rgb, no pictures"
        raise WrongSource(directory, what, "Put pictures into rgb/ and depth/, by equal names")
    others = [(field, _folder_of(directory, field)) for field in fields if field != "rgb"]
    return [
        Folder(field="rgb", part="", name=""),
        *(Folder(field=field, part="", name=name) for field, name in others if name is not None),
    ]


def _splits_in(directory: Path) -> list[str]:
    """The folders of splits that have a folder of rgb in them."""
    splits = [
        entry.name
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name)
        if entry.is_dir() and entry.name.lower() in SPLIT_NAMES
    ]
    return [name for name in splits if _folder_of(directory / name, "rgb") is not None]


def _folder_of(directory: Path, field: str) -> str | None:
    """What the folder of a field is called here. Raises WrongSource where there are two."""
    there = [name for name in FOLDERS.get(field, (field,)) if (directory / name).is_dir()]
    if len(there) > 1:
        raise WrongSource(
            directory, f"has {there[0]}/ and {there[1]}/, both of {field}", "Keep one"
        )
    return there[0] if there else None


def _not_looked_into(directory: Path, folders: Sequence[Folder]) -> Iterator[str]:
    """Folders beside pictures that lie in the directory itself."""
    if folders[0].name:
        return
    used = {folder.name for folder in folders}
    others = [
        entry.name
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name)
        if entry.is_dir() and entry.name not in used and not entry.name.startswith(".")
    ]
    if others:
        listed = ", ".join(f"{name}/" for name in others[:SHOWN])
        rgb = FOLDERS["rgb"][0]
        yield f"{len(others)} folders are not looked into, such as {listed}: put all into {rgb}/"


def _pictures_in(directory: Path, folder: Folder, *, with_suffix: bool) -> Pictures:
    """By PART/NAME, NAME being the path in the folder.

    with_suffix: as part of the name, where nothing has to be of the same. Raises WrongSource where
    two pictures have one name.
    """
    found: dict[str, Found] = {}
    for entry in _pictures_under(directory / folder.path, is_deep=folder.name != ""):
        inside = os.path.relpath(entry.path, directory / folder.path).replace(os.sep, "/")
        path = "/".join(filter(None, (folder.path, inside)))
        stem = inside if with_suffix else os.path.splitext(inside)[0]
        name = "/".join(filter(None, (folder.part, stem)))
        if name in found:
            what = f"has {found[name].path} and {path}, of one name"
            raise WrongSource(directory, what, "Keep one of them")
        found[name] = _found(path, entry)
    return found


def _found(path: str, entry: "os.DirEntry[str]") -> Found:
    """A link to nowhere is listed too: its row fails, and says that the file is missing."""
    try:
        stat = entry.stat()
    except FileNotFoundError:
        return Found(path, 0, 0)
    return Found(path, stat.st_size, stat.st_mtime_ns)


def _pictures_under(folder: Path, *, is_deep: bool = True) -> Iterator["os.DirEntry[str]"]:
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
            yield from _pictures_under(Path(entry.path))


# ---------------------------------------------------------------- as a table


def _check_paired(directory: Path, found: Mapping[str, Pictures]) -> None:
    """Raise WrongSource where no picture of a field belongs to any of rgb."""
    rgb = found["rgb"]
    for field, pictures in found.items():
        if pictures and not rgb.keys() & pictures.keys():
            one = next(iter(pictures.values())).path
            other = next(iter(rgb.values())).path
            what = f"has no {field} of the name of an rgb picture, such as {one} and {other}"
            raise WrongSource(directory, what, "Pictures of one frame have equal names")


def _notes(found: Mapping[str, Pictures]) -> Iterator[str]:
    rgb = found["rgb"]
    for field, pictures in found.items():
        without = sorted(rgb.keys() - pictures.keys())
        if without:
            yield f"{len(without)} frames have no {field}, such as {', '.join(without[:SHOWN])}"
        alone = sorted(pictures.keys() - rgb.keys())
        if alone:
            listed = ", ".join(alone[:SHOWN])
            yield f"{len(alone)} pictures of {field} have no rgb, such as {listed}: left out"


def _table(found: Mapping[str, Pictures], names: list[str]) -> FrameTable:
    paths = {
        field: Texts.from_strings(pictures[name].path if name in pictures else "" for name in names)
        for field, pictures in found.items()
    }
    split, places = _splits_and_places(names)
    digest = hashlib.sha256()
    n_bytes = 0
    for field, pictures in found.items():
        digest.update(f"\0{field}\0".encode())
        for name in names:
            one = pictures.get(name)
            line = f"{one.path}\0{one.n_bytes}\n" if one else "\n"
            encoded = line.encode(errors="surrogateescape")
            digest.update(encoded)
            n_bytes += len(encoded)
    return FrameTable(
        n_rows=len(names),
        paths=paths,
        split=split,
        columns={} if places is None else {"scene": places},
        camera_px=None,
        sha256=digest.hexdigest(),
        n_bytes=n_bytes,
        not_used=(),
        n_repeated=0,
    )


def _splits_and_places(names: list[str]) -> tuple[np.ndarray | None, Names | None]:
    """What the folders of the frames say: a split comes first, the rest is the place.

    None where no frame lies in a folder of a split, or of a place.
    """
    folders = [name.split("/")[:-1] for name in names]
    split: np.ndarray | None = None
    if all(folder and folder[0].lower() in SPLIT_NAMES for folder in folders):
        numbers = [SPLITS.index(SPLIT_NAMES[folder[0].lower()]) for folder in folders]
        split = np.array(numbers, np.uint8)
        folders = [folder[1:] for folder in folders]
    if not any(folders):
        return split, None
    number_of: dict[str, int] = {}
    places = ["/".join(folder) for folder in folders]
    of_rows = [number_of.setdefault(place, len(number_of)) for place in places]
    return split, Names(numbers=np.array(of_rows, np.uint32), names=tuple(number_of))


def _stamp(found: Mapping[str, Pictures]) -> tuple[int, ...]:
    files = [each for pictures in found.values() for each in pictures.values()]
    digest = hashlib.sha256()
    for each in sorted(files, key=lambda each: each.path):
        line = f"{each.path}\0{each.n_bytes}\0{each.changed_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    newest_ns = max(each.changed_ns for each in files)
    return len(files), int.from_bytes(digest.digest()[:8], "big"), newest_ns
