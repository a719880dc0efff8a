"""Directories that are laid out in a known way: a layout is a function that makes a table of one.

Each is a module with such a function, a line in LAYOUTS, and its name in `opening`.
"""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from convert.sources.layouts_bts import is_bts, list_bts
from convert.sources.layouts_frames import is_of_frames, list_frames
from convert.sources.layouts_nyu_raw import is_nyu_raw, list_nyu_raw
from convert.sources.layouts_scannet import is_scannet, list_scannet
from convert.sources.layouts_tum import is_tum, list_tum
from convert.sources.listings import Listing, Wanted
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
    also be given a list, a file whose paths are relative to its folder.
    """

    read: Callable[[Path, Wanted], Listing]
    is_one: Callable[[Path], bool]
    reads_files: bool = False


LAYOUTS: dict[str, Layout] = {
    ANY: Layout(read=list_frames, is_one=is_of_frames),
    "bts": Layout(read=list_bts, is_one=is_bts, reads_files=True),
    "nyu_raw": Layout(read=list_nyu_raw, is_one=is_nyu_raw),
    "scannet": Layout(read=list_scannet, is_one=is_scannet),
    "tum": Layout(read=list_tum, is_one=is_tum, reads_files=True),
}


def is_laid_out(source: Path, layout: str) -> bool:
    """Whether a layout makes the table of a source; else it is a table itself.

    Raises WrongSource for a file where only a directory can be.
    """
    if source.is_dir():
        return True
    if layout in (AUTO, ANY) or not source.exists():
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
    found = [each for each in LAYOUTS if each != ANY and LAYOUTS[each].is_one(directory)]
    if not found:
        return ANY  # which says what is missing
    if LAYOUTS[ANY].is_one(directory):
        found.append(ANY)
    if len(found) > 1:
        what = f"{directory} may be {' or '.join(found)}: choose one of them"
        raise WrongSetting("layout", AUTO, what)
    log(f"{directory}: laid out as {found[0]}")
    return found[0]


def write_table(directory: Path, layout: str, wanted: Wanted, out: Path) -> int:
    """The table that a directory is read as, as CSV; how many lines.

    Raises WrongSource, WrongSetting and OSError.
    """
    if not is_laid_out(directory, layout):
        raise WrongSource(directory, "is no directory" if directory.exists() else "is not there")
    listing = LAYOUTS[layout_of(directory, layout)].read(directory, wanted)
    warnings = listing.spec.warnings if listing.spec else ()
    for note in (*listing.notes, *warnings):
        log(f"{directory}: {note}")
    table = listing.table

    def write(file: HashingFile) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows(_lines(table))
        text.flush()
        text.detach()

    write_atomically(out, write)
    return table.n_rows


def _lines(table: FrameTable) -> Iterator[list[str]]:
    """The header, then a line a row."""
    has_split = table.split is not None
    has_camera = table.camera_px is not None
    header = [*table.paths, *(["split"] if has_split else []), *table.columns]
    yield [*header, *(CAMERA if has_camera else ())]
    for line in range(table.n_rows):
        cells = [paths[line] for paths in table.paths.values()]
        if table.split is not None:
            cells.append(SPLITS[table.split[line]])
        cells += [_cell(named, line) for named in table.columns.values()]
        if table.camera_px is not None:
            cells += [str(number) if number else "" for number in table.camera_px[line]]
        yield cells


def _cell(named: Names, line: int) -> str:
    number = int(named.numbers[line])
    return "" if number == NONE else named.names[number]
