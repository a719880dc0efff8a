"""The raw recordings of NYU Depth v2, as tables of frames.

DIR/kitchen_0028a/r-1294886360.208451-2996770081.ppm    rgb
                  d-1294886360.234552-3011109937.pgm    readings of a Kinect, their bytes swapped
                  a-1294886360.241553-3018312089.dump   the accelerometer: passed over
DIR/kitchen_0028b/...                                   one more recording of the scene kitchen_0028

A frame is a depth and the rgb that is nearest in time, as the authors' toolbox has it. It goes on
to register depth to rgb; that is not done here.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from convert.sources.listings import (
    Found,
    Listing,
    Wanted,
    entries_of,
    folders_in,
    refuse_further_fields,
    stamp_of,
    status_of,
    table_of,
)
from convert.sources.nyu_scenes import scene_of, type_of
from convert.sources.nyu_tables import splits_of
from convert.sources.plain_arrays import MAX_PNM_HEADER, pnm_bytes
from shards.errors import WrongSource
from shards.spec import SPLITS, DatasetSpec

FILE = re.compile(r"([rd])-(\d{1,12}\.\d{1,9})-\d+\.(ppm|pgm)")  # kind, seconds
FIELD_OF = {("r", "ppm"): "rgb", ("d", "pgm"): "depth"}
LOOKED_AT = 100  # of a folder's files, to see whether it is a recording
FAULTY = "d-1315166703.129542-2466101449.pgm"  # known to the authors' own scripts
ENCODING = "nyu_raw"
NOT_REGISTERED = (
    "depth is not registered to rgb, as NYU's toolbox would do it: the two cameras see a thing up "
    "to some 50 of 640 pixels apart"
)


@dataclass(frozen=True)
class Taken:
    """A picture of a recording: when it was taken, in seconds, and its file."""

    time_s: float
    file: Found


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A folder: its name, whole files by field, in the order of their times; what was left out."""

    name: str
    pictures: dict[str, list[Taken]] = field(default_factory=lambda: {"rgb": [], "depth": []})
    cut_short: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Found]:
        return [each.file for pictures in self.pictures.values() for each in pictures]


def list_nyu_raw(directory: Path, wanted: Wanted) -> Listing:
    """Every depth of the recordings with the rgb that is nearest in time.

    Raises WrongSource where there is none.
    """
    refuse_further_fields(directory, wanted)
    recordings = list(_recordings_under(directory, ""))
    files: dict[str, list[Found | None]] = {"rgb": [], "depth": []}
    folders = []
    for recording in recordings:
        depths = recording.pictures["depth"]
        rgbs = recording.pictures["rgb"]
        if not rgbs:
            continue
        for depth, nearest in zip(depths, _nearest(rgbs, depths), strict=True):
            files["rgb"].append(rgbs[nearest].file)
            files["depth"].append(depth.file)
            folders.append(recording.name)
    if not folders:
        raise WrongSource(directory, "has no folder with r-TIME-ID.ppm and d-TIME-ID.pgm in it")
    return _listing(recordings, files, folders)


def is_nyu_raw(directory: Path) -> bool:
    """Whether it has such files, or a folder in it has."""
    if _has_files(directory):
        return True
    return any(_has_files(folder) for folder in folders_in(directory))


def _has_files(folder: Path) -> bool:
    """Seen by the first ones: a folder of another kind may have many, too, or not be readable."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, LOOKED_AT)]
    except OSError:
        return False
    return any(FILE.fullmatch(name) for name in names)


# ------------------------------------------------------------------------------------- recordings


def _recordings_under(folder: Path, path: str) -> Iterator[Recording]:
    """Of the folder itself, if it is one, and of all below; `path` is that of the folder."""
    recording = Recording(name=folder.name if path else folder.resolve().name)
    size_of: dict[tuple[str, int], int] = {}
    below = []
    for entry in entries_of(folder):
        match = FILE.fullmatch(entry.name)
        if match is None:
            if entry.is_dir(follow_symlinks=False):
                below.append(entry)
            continue
        of_field = FIELD_OF.get((match[1], match[3]))
        if of_field is None:
            continue
        inside = f"{path}/{entry.name}" if path else entry.name
        found = status_of(inside, entry)
        if entry.name == FAULTY or _is_cut_short(Path(entry), of_field, found.n_bytes, size_of):
            recording.cut_short.append(inside)
        else:
            recording.pictures[of_field].append(Taken(float(match[2]), found))
    for pictures in recording.pictures.values():
        pictures.sort(key=lambda taken: (taken.time_s, taken.file.path))
    if recording.files or recording.cut_short:
        yield recording
    for entry in below:
        yield from _recordings_under(Path(entry), f"{path}/{entry.name}" if path else entry.name)


def _is_cut_short(
    path: Path, of_field: str, n_bytes: int, size_of: dict[tuple[str, int], int]
) -> bool:
    """Whether a file is shorter than its header says. Of those of one size the first is opened.

    size_of: how long those that were opened should be, by field and size.
    """
    if not n_bytes:  # or a link to nowhere
        return True
    key = (of_field, n_bytes)
    if key not in size_of:
        with open(path, "rb") as file:
            size_of[key] = pnm_bytes(file.read(MAX_PNM_HEADER)) or n_bytes + 1
    return n_bytes < size_of[key]


def _nearest(rgbs: list[Taken], depths: list[Taken]) -> list[int]:
    """Of each depth the rgb that is nearest in time; of two that are equally near the later one."""
    rgb_s = np.array([taken.time_s for taken in rgbs])
    depth_s = np.array([taken.time_s for taken in depths])
    later = np.minimum(np.searchsorted(rgb_s, depth_s, side="right"), len(rgb_s) - 1)
    earlier = np.maximum(later - 1, 0)
    is_later = np.abs(rgb_s[later] - depth_s) <= np.abs(rgb_s[earlier] - depth_s)
    return np.where(is_later, later, earlier).tolist()


# --------------------------------------------------------------------------------------- as a table


def _listing(
    recordings: list[Recording], files: dict[str, list[Found | None]], folders: list[str]
) -> Listing:
    notes = list(_notes(recordings))
    scenes = [scene_of(folder) for folder in folders]
    splits = splits_of(scenes, notes.append)
    columns = {
        "scene": scenes,
        "scene_type": [type_of(folder) for folder in folders],
        "depth_encoding": [ENCODING] * len(folders),
    }
    return Listing(
        table=table_of(files, columns, split=[SPLITS[number] for number in splits]),
        stamp=stamp_of([each for recording in recordings for each in recording.files]),
        notes=tuple(notes),
        spec=DatasetSpec(name="", width=0, height=0, warnings=(NOT_REGISTERED,)),
    )


def _notes(recordings: list[Recording]) -> Iterator[str]:
    cut_short = [path for recording in recordings for path in recording.cut_short]
    if cut_short:
        what = f"{len(cut_short)} files are empty, cut short or known to be faulty"
        yield f"{what}, such as {cut_short[0]}: left out"
    without = [recording.name for recording in recordings if not all(recording.pictures.values())]
    if without:
        yield f"{len(without)} folders have no rgb or no depth, such as {without[0]}: left out"
