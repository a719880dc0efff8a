"""Directories that are laid out in a known way: a layout is a function that makes a table of one.

Each is a module with such a function, a line in LAYOUTS, and its name in `opening`.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.sources.layouts_bts import is_bts, list_bts
from convert.sources.layouts_frames import is_of_frames, list_frames
from convert.sources.layouts_nyu_raw import is_nyu_raw, list_nyu_raw
from convert.sources.layouts_scannet import is_scannet, list_scannet
from convert.sources.layouts_tum import is_tum, list_tum
from convert.sources.listings import Listing, Wanted
from convert.sources.roots import parted
from convert.sources.sunrgbd import list_sunrgbd, stamp_sunrgbd
from convert.sources.sunrgbd_files import is_sunrgbd
from convert.sources.tables import CAMERA, NONE, FrameTable, Names
from shards.errors import WrongSetting, WrongSource
from shards.files import HashingFile, log, write_atomically
from shards.spec import SPLITS

AUTO = "auto"
ANY = "frames"  # the layout of a directory that looks like none in particular


@dataclass(frozen=True, kw_only=True)
class Layout:
    """read: the frames of a directory. is_one: whether one looks like it, for which little is read.

    read raises WrongSource where it is not laid out so, and OSError. reads_files: whether it may
    also be given a list, a file whose paths are relative to its folder, or an archive. stamp: that
    of the listing, where it is told with less; None: by reading again.
    """

    read: Callable[[Path, Wanted], Listing]
    is_one: Callable[[Path], bool]
    reads_files: bool = False
    stamp: Callable[[Path, Wanted], tuple[int, ...]] | None = None


LAYOUTS: dict[str, Layout] = {
    ANY: Layout(read=list_frames, is_one=is_of_frames),
    "bts": Layout(read=list_bts, is_one=is_bts, reads_files=True),
    "nyu_raw": Layout(read=list_nyu_raw, is_one=is_nyu_raw),
    "scannet": Layout(read=list_scannet, is_one=is_scannet),
    "sunrgbd": Layout(read=list_sunrgbd, is_one=is_sunrgbd, reads_files=True, stamp=stamp_sunrgbd),
    "tum": Layout(read=list_tum, is_one=is_tum, reads_files=True),
}
OF_ARCHIVES = ["sunrgbd"]  # those that are told by the archive's name


def is_laid_out(source: Path, layout: str) -> bool:
    """Whether a layout makes the table of a source; else it is a table itself.

    Raises WrongSource for a file where only a directory can be.
    """
    if source.is_dir():
        return True
    if not source.exists():
        return False
    if layout == AUTO:
        return any(LAYOUTS[each].is_one(source) for each in OF_ARCHIVES)
    if layout == ANY:
        return False
    if not LAYOUTS[layout].reads_files:
        raise WrongSource(source, f"is a file, and {layout} a layout of directories")
    return True


def layout_of(directory: Path, name: str = "auto") -> str:
    """The layout of a directory: the one given, else what it looks like.

    Raises WrongSetting where it looks like several.
    """
    if name != AUTO:
        return name
    is_archive = not directory.is_dir()
    choices = OF_ARCHIVES if is_archive else [each for each in LAYOUTS if each != ANY]
    found = [each for each in choices if LAYOUTS[each].is_one(directory)]
    if not found:
        return ANY  # which says what is missing
    if not is_archive and LAYOUTS[ANY].is_one(directory):
        found.append(ANY)
    if len(found) > 1:
        what = f"{directory} may be {' or '.join(found)}: choose one of them"
        raise WrongSetting("layout", AUTO, what)
    log(f"{directory}: laid out as {found[0]}")
    return found[0]


def write_table(
    directory: Path, layout: str, wanted: Wanted, out: Path
) -> tuple[int, tuple[str, ...]]:
    """The table that a directory is read as, as CSV; how many lines, and the roots of its paths.

    Raises WrongSource, WrongSetting and OSError.
    """
    if not is_laid_out(directory, layout):
        raise WrongSource(directory, "is no directory" if directory.exists() else "is not there")
    listing = LAYOUTS[layout_of(directory, layout)].read(directory, wanted)
    warnings = listing.spec.warnings if listing.spec else ()
    for note in (*listing.notes, *warnings):
        log(f"{directory}: {note}")
    roots, prefixes = _roots_of_table(directory, wanted.roots or listing.roots)

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

    roots: where a layout says that its paths lead. Within a directory that can be said by the paths
    themselves, and it is the root of all of them.
    """
    parts = [parted(root) for root in roots]
    if not parts:
        return (str(directory if directory.is_dir() else directory.parent),), {}
    if not directory.is_dir() or not all(Path(place).is_dir() for _, place in parts):
        return tuple(roots), {}
    prefixes = {}
    for field, place in parts:
        inside = os.path.relpath(place, directory)
        is_outside = inside.split(os.sep)[0] == os.pardir
        prefixes[field] = "" if inside == os.curdir else f"{place if is_outside else inside}/"
    return (str(directory),), prefixes


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
