"""Directories that are laid out in a known way: a layout is a function that makes a table of one.

Each is a module with such a function, a line in LAYOUTS, and its name in `opening`.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.sources.layouts_frames import is_of_frames, list_frames
from convert.sources.listings import Listing, Wanted
from convert.sources.sunrgbd import list_sunrgbd, stamp_sunrgbd
from convert.sources.sunrgbd_files import is_sunrgbd
from convert.sources.tables import CAMERA, NONE, FrameTable, Names
from shards.errors import WrongSetting
from shards.files import HashingFile, log, write_atomically
from shards.spec import KNOWN_FIELDS, SPLITS

ANY = "frames"  # the layout of a directory that looks like none in particular


@dataclass(frozen=True, kw_only=True)
class Layout:
    """read: the frames of a directory. is_one: whether one looks like it, for which little is read.

    stamp: that of the listing, where it can be told with less; None: by reading again. Both raise
    WrongSource where it is not laid out so, and OSError. of_archives: whether the directory may be
    a .zip.
    """

    read: Callable[[Path, Wanted], Listing]
    is_one: Callable[[Path], bool]
    stamp: Callable[[Path, Wanted], tuple[int, ...]] | None = None
    of_archives: bool = False


LAYOUTS: dict[str, Layout] = {
    ANY: Layout(read=list_frames, is_one=is_of_frames),
    "sunrgbd": Layout(read=list_sunrgbd, is_one=is_sunrgbd, stamp=stamp_sunrgbd, of_archives=True),
}


def is_listed(path: Path, name: str) -> bool:
    """Whether it is a directory, or the archive of one, and no table."""
    if path.is_dir() or path.suffix.lower() != ".zip":
        return path.is_dir()
    layouts = {each: layout for each, layout in LAYOUTS.items() if layout.of_archives}
    is_one = any(layout.is_one(path) for layout in layouts.values())
    return name in layouts or (name == "auto" and is_one)


def layout_of(directory: Path, name: str = "auto") -> str:
    """The layout of a directory: the one given, else what it looks like.

    Raises WrongSetting where it looks like several.
    """
    if name != "auto":
        return name
    found = [each for each in LAYOUTS if each != ANY and LAYOUTS[each].is_one(directory)]
    if not found:
        return ANY  # which says what is missing
    if directory.is_dir() and LAYOUTS[ANY].is_one(directory):
        found.append(ANY)
    if len(found) > 1:
        what = f"{directory} may be {' or '.join(found)}: choose one of them"
        raise WrongSetting("layout", "auto", what)
    log(f"{directory}: laid out as {found[0]}")
    return found[0]


def write_table(
    directory: Path, layout: str, wanted: Wanted, out: Path
) -> tuple[int, tuple[str, ...]]:
    """The table that a directory is read as, as CSV; how many lines, and the roots of its paths.

    Raises WrongSource, WrongSetting and OSError.
    """
    listing = LAYOUTS[layout_of(directory, layout)].read(directory, wanted)
    warnings = listing.spec.warnings if listing.spec else ()
    for note in (*listing.notes, *warnings):
        log(f"{directory}: {note}")
    roots, prefixes = _roots_of_table(directory, listing.roots)

    def write(file: HashingFile) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(_lines(listing.table, prefixes))
        text.flush()
        text.detach()

    write_atomically(out, write)
    return listing.table.n_rows, roots


def _roots_of_table(
    directory: Path, roots: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The roots of a table, and what stands before the paths of a field in it, "" for all others.

    All paths of a directory can have it as their root; those in an archive cannot.
    """
    if not directory.is_dir() or any(not Path(_place_of(root)[1]).is_dir() for root in roots):
        return tuple(roots) or (str(directory),), {}
    prefixes = {}
    for root in roots:
        field, place = _place_of(root)
        inside = os.path.relpath(place, directory)
        is_outside = inside.split(os.sep)[0] == os.pardir
        prefixes[field] = "" if inside == os.curdir else f"{place if is_outside else inside}/"
    return (str(directory),), prefixes


def _place_of(root: str) -> tuple[str, str]:
    """FIELD=PLACE, as layouts give it, or PLACE: (field, place)."""
    field, is_named, place = root.partition("=")
    return (field, place) if is_named and field in KNOWN_FIELDS else ("", root)


def _lines(table: FrameTable, prefixes: Mapping[str, str]) -> Iterator[list[str]]:
    """The header, then a line a row."""
    before = {field: prefixes.get(field, prefixes.get("", "")) for field in table.paths}
    has_split = table.split is not None
    has_camera = table.camera_px is not None
    header = [*table.paths, *(["split"] if has_split else []), *table.columns]
    yield [*header, *(CAMERA if has_camera else ())]
    for line in range(table.n_rows):
        cells = [
            paths[line] and before[field] + paths[line] for field, paths in table.paths.items()
        ]
        if table.split is not None:
            cells.append(SPLITS[table.split[line]])
        cells += [_cell(named, line) for named in table.columns.values()]
        if table.camera_px is not None:
            cells += [str(number) if number else "" for number in table.camera_px[line]]
        yield cells


def _cell(named: Names, line: int) -> str:
    number = int(named.numbers[line])
    return "" if number == NONE else named.names[number]
