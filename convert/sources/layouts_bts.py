"""Lists as those of BTS, with the folders of their pictures, as tables of frames.

DIR/nyudepthv2_train_files_with_gt.txt      rgb depth focal, a line a frame
    /kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579
DIR/nyudepthv2_test_files_with_gt.txt       of the 654 official test rows; 00045 is the .mat's row
    bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579
DIR/sync/kitchen_0028b/...                  paths begin somewhere in DIR, or in a root that is given
DIR/official_splits/test/bathroom/...

A path may begin with /, and `None` is no depth.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.sources.listings import (
    Found,
    Listing,
    Wanted,
    folders_in,
    found_at,
    lists_in,
    named,
    refuse_further_fields,
    stamp_of,
    table_of,
)
from convert.sources.nyu_scenes import scene_of, type_of
from convert.sources.nyu_tables import nyu, tables
from convert.sources.roots import parted
from convert.sources.table_lines import IS_NUMBER, Fault, path_lines
from convert.sources.tables import SPLIT_NAMES, FrameTable
from convert.sources.timed_lists import first_cells
from shards.errors import WrongSource, shown
from shards.spec import DatasetSpec

NYU_FOCAL = 518.8579  # of lists of NYU: then its camera is known whole
FIELDS = ("rgb", "depth")
TRIED_LINES = 8  # by which it is found out where paths begin
DEEPEST = 2  # folders below a root in which they may
SHOWN = 2  # names in a message


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A line: paths from where they begin, "" for none; focal length in pixels."""

    rgb: str
    depth: str
    focal_px: float


@dataclass(frozen=True, kw_only=True)
class FrameList:
    """A list. split: as its name tells, "" where it does not. begins: of each field, the folder in
    its root in which the paths begin, with / behind it, or "".
    """

    name: str
    split: str
    frames: Sequence[Frame]
    begins: Mapping[str, str]


def list_bts(source: Path, wanted: Wanted) -> Listing:
    """The frames of a list, or of those that lie in a directory.

    Raises WrongSource where there is none, for a line that is wrong, and where it is not clear
    where paths begin, or which list is of which split.
    """
    refuse_further_fields(source, wanted)
    directory = source if source.is_dir() else source.parent
    names = _lists_in(source) if source.is_dir() else [source.name]
    roots = _roots(directory, wanted.roots)
    lists = [_read(directory / name, roots) for name in names]
    _check_splits(source, lists)

    frames = [(each, frame) for each in lists for frame in each.frames]
    scenes = [_scene_and_type(frame.rgb) for _, frame in frames]
    return Listing(
        table=_table(frames, scenes),
        stamp=stamp_of(found_at(directory, name) for name in names),
        notes=tuple(_notes(frames)),
        spec=DatasetSpec(name="", width=0, height=0, warnings=tuple(_warnings(frames, scenes))),
    )


def is_bts(directory: Path) -> bool:
    """Whether such a list lies in it."""
    return bool(_lists_in(directory))


# ------------------------------------------------------------------------------------------ lists


def _lists_in(directory: Path) -> list[str]:
    return [name for name in lists_in(directory) if _is_line(first_cells(directory / name))]


def _is_line(cells: Sequence[str]) -> bool:
    """rgb depth focal"""
    if len(cells) != 3 or not IS_NUMBER.fullmatch(cells[2]):
        return False
    return "." in cells[0] and not IS_NUMBER.fullmatch(cells[0])


def _read(path: Path, roots: Mapping[str, Path | None]) -> FrameList:
    frames = list(_frames(path))
    if not frames:
        raise WrongSource(path, "has no line but comments")
    split = _split_of(path.name)
    begins = {
        field: _begin(path, field, roots[field], split, frames)
        for field in FIELDS
        if any(getattr(frame, field) for frame in frames)
    }
    return FrameList(name=path.name, split=split, frames=frames, begins=begins)


def _frames(path: Path) -> Iterator[Frame]:
    """Raises WrongSource for a line that is none."""
    try:
        for number, cells in path_lines(path):
            if len(cells) != 3 or not IS_NUMBER.fullmatch(cells[2]):
                raise Fault(number, "is not rgb, depth, focal length")
            if cells[0] == "None":
                raise Fault(number, "has no rgb path")
            rgb, depth = ("" if cell == "None" else cell for cell in cells[:2])
            yield Frame(rgb=rgb, depth=depth, focal_px=float(cells[2]))
    except Fault as fault:
        raise fault.about(path) from None


def _split_of(name: str) -> str:
    """By a word in the name of a list; "" where there is none, or more than one."""
    words = re.split(r"[^a-z]+", name.lower().rpartition(".")[0])
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else ""


def _check_splits(source: Path, lists: Sequence[FrameList]) -> None:
    """Raise WrongSource where it is open which list is of which split."""
    if not lists:
        raise WrongSource(source, "has no list of rgb, depth and focal length")
    if len(lists) == 1:
        return
    list_of: dict[str, str] = {}
    for each in lists:
        if not each.split or each.split in list_of:
            others = list_of.get(each.split, "others")
            what = f"has {each.name} beside {others}, and its name tells no split of its own"
            raise WrongSource(source, what, "Call the lists train and test, or give one of them")
        list_of[each.split] = each.name


# --------------------------------------------------------------------------- where paths begin


def _roots(directory: Path, given: Sequence[str]) -> dict[str, Path | None]:
    """Of each field; None: no folder of this machine, in which nothing is looked for."""
    places = dict(parted(text) for text in given)
    roots: dict[str, Path | None] = {}
    for field in FIELDS:
        place = places.get(field, places.get(""))
        path = directory if place is None else Path(place).expanduser()
        roots[field] = path if path.is_dir() else None
    return roots


def _begin(path: Path, field: str, root: Path | None, split: str, frames: Sequence[Frame]) -> str:
    """Where in the root a list's paths of a field begin: "", or a folder with / behind it.

    Raises WrongSource where none of some lines is there, and where two folders have them.
    """
    if root is None:
        return ""
    named = [text for frame in frames if (text := getattr(frame, field))]
    places = np.unique(np.linspace(0, len(named) - 1, min(TRIED_LINES, len(named))).astype(int))
    tried = [named[place].lstrip("/") for place in places]
    candidates = list(_folders_under(root, DEEPEST))
    for text in tried:
        found = [folder for folder in candidates if (root / f"{folder}{text}").is_file()]
        of_split = [folder for folder in found if split and split in _words(folder)]
        best = found if len(found) == 1 else of_split
        if len(best) == 1:
            return best[0]
        if "" in found:
            return ""
        if found:
            what = f": {text} is in {root}/{found[0]} and in {root}/{found[1]}"
            raise WrongSource(path, what, f"Give one of them as the root of {field}")
    what = f": {shown(tried[0])} is in no folder of {root}"
    raise WrongSource(path, what, f"Give the folder where paths of {field} begin as its root")


def _folders_under(root: Path, depth: int) -> Iterator[str]:
    """The root as "", then the folders in it, each with / behind it."""
    yield ""
    if not depth:
        return
    for folder in folders_in(root):
        for below in _folders_under(folder, depth - 1):
            yield f"{folder.name}/{below}"


def _words(folder: str) -> set[str]:
    """The splits that a folder's path names."""
    words = re.split(r"[^a-z]+", folder.lower())
    return {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}


def _file(of_list: FrameList, field: str, path: str) -> Found | None:
    return named(of_list.begins[field] + path.lstrip("/")) if path else None


# ---------------------------------------------------------------------------------- what is said


def _scene_and_type(rgb: str) -> tuple[str, str]:
    """The place of a frame, and the type of its scene; each "" where its path does not tell."""
    folders = rgb.strip("/").split("/")[:-1]
    if not folders:
        return "", ""
    if type_of(folders[-1]):
        return scene_of(folders[-1]), type_of(folders[-1])
    if len(folders) == 1 and folders[0] in tables().scene_types:  # the official test rows
        return "", folders[0]
    return "/".join(folders), ""


def _table(
    frames: Sequence[tuple[FrameList, Frame]], scenes: Sequence[tuple[str, str]]
) -> FrameTable:
    files = {
        "rgb": [_file(of_list, "rgb", frame.rgb) for of_list, frame in frames],
        "depth": [_file(of_list, "depth", frame.depth) for of_list, frame in frames],
    }
    is_nyu = [frame.focal_px == NYU_FOCAL for _, frame in frames]
    columns = {
        "scene": [scene for scene, _ in scenes],
        "scene_type": [kind for _, kind in scenes],
        "depth_encoding": ["mm" if each else "" for each in is_nyu],
    }
    has_splits = frames[0][0].split != ""
    splits = [of_list.split for of_list, _ in frames] if has_splits else None
    return table_of(files, columns, split=splits, camera_px=_cameras(is_nyu))


def _cameras(is_nyu: Sequence[bool]) -> np.ndarray | None:
    """[N, 4] fx, fy, cx, cy, 0 where a focal length is all that is known."""
    camera = nyu().camera
    if camera is None or not any(is_nyu):
        return None
    of_nyu = (camera.fx, camera.fy, camera.cx, camera.cy)
    return np.array(is_nyu)[:, None] * np.array([of_nyu], np.float64)


def _notes(frames: Sequence[tuple[FrameList, Frame]]) -> Iterator[str]:
    n_without = sum(not frame.depth for _, frame in frames)
    if n_without:
        yield f"{n_without} frames have no depth"
    others = [frame.focal_px for _, frame in frames if frame.focal_px != NYU_FOCAL]
    if others:
        what = f"{len(others)} frames have other focal lengths than NYU, such as {others[0]:g}"
        yield f"{what}: their cameras are unknown, their depths millimetres if not said otherwise"


def _warnings(
    frames: Sequence[tuple[FrameList, Frame]], scenes: Sequence[tuple[str, str]]
) -> Iterator[str]:
    official = set(tables().test_scenes)
    leaks = [
        scene
        for (of_list, _), (scene, _) in zip(frames, scenes, strict=True)
        if of_list.split == "train" and scene in official
    ]
    if leaks:
        listed = ", ".join(sorted(set(leaks))[:SHOWN])
        yield f"{len(leaks)} train frames show scenes of NYU's official test rows, such as {listed}"
