"""Directories of pictures that go by equal names, as tables of frames.

DIR/rgb/kitchen/0001.jpg  DIR/depth/kitchen/0001.png  ...      a frame: pictures of one name
DIR/train/rgb/0001.jpg    DIR/train/depth/0001.png    ...      the same in each split
DIR/rgb/train/0001.jpg    DIR/depth/train/0001.png    ...      or so
DIR/0001.jpg              DIR/depth/0001.png          ...      pictures that lie in DIR itself
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.sources.folder_names import FOLDERS
from convert.sources.listings import (
    Found,
    Listing,
    Wanted,
    hash_of_files,
    numbered,
    pictures_under,
    stamp_of,
    status_of,
)
from convert.sources.tables import SPLIT_NAMES, FrameTable, Names
from shards.errors import UserError, WrongSource
from shards.spec import SPLITS
from shards.texts import Texts

SHOWN = 2  # names in a message

Pictures = Mapping[str, Found]  # by the name that the pictures of one row have in common


def list_frames(directory: Path, wanted: Wanted) -> Listing:
    """The frames of a directory, each with the pictures of its name; further fields lie in a folder
    of their name. Raises WrongSource where it is not laid out so, or has no picture of a further
    field, and OSError.
    """
    found, folders = _pictures(directory, wanted)
    for name in wanted.kinds:
        if not found.get(name):
            what = f"has no pictures in {name}/"
            raise WrongSource(directory, what, "A further field lies in a folder of its name")
    files = [each for pictures in found.values() for each in pictures.values()]
    return Listing(
        table=_table(found, sorted(found["rgb"])),
        stamp=stamp_of(files),
        notes=(*_not_looked_into(directory, folders), *_notes(found)),
    )


def is_of_frames(directory: Path) -> bool:
    """Whether it is laid out so; all of it is listed."""
    try:
        _pictures(directory, Wanted())
    except UserError:
        return False
    return True


def _pictures(
    directory: Path, wanted: Wanted
) -> tuple[dict[str, dict[str, Found]], list["Folder"]]:
    """Those of each field, and where they lie. Raises WrongSource, and OSError."""
    folders = _folders(directory, wanted.fields)
    is_alone = all(folder.field == "rgb" for folder in folders)
    found: dict[str, dict[str, Found]] = {}
    for folder in folders:
        pictures = _pictures_in(directory, folder, with_suffix=is_alone)
        found.setdefault(folder.field, {}).update(pictures)
    if not found.get("rgb"):
        raise WrongSource(directory, f"has no pictures in {FOLDERS['rgb'][0]}/")
    _check_paired(directory, found)
    return found, folders


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
    if next(pictures_under(directory, is_deep=False), None) is None:
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
    for entry in pictures_under(directory / folder.path, is_deep=folder.name != ""):
        inside = os.path.relpath(entry.path, directory / folder.path).replace(os.sep, "/")
        path = "/".join(filter(None, (folder.path, inside)))
        stem = inside if with_suffix else os.path.splitext(inside)[0]
        name = "/".join(filter(None, (folder.part, stem)))
        if name in found:
            what = f"has {found[name].path} and {path}, of one name"
            raise WrongSource(directory, what, "Keep one of them")
        found[name] = status_of(path, entry)
    return found


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
    digest, n_bytes = hash_of_files(
        {field: [pictures.get(name) for name in names] for field, pictures in found.items()}
    )
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
    return split, numbered(["/".join(folder) for folder in folders])
