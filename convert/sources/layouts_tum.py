"""Recordings of TUM RGB-D and what is laid out as they are, as tables of frames.

DIR/rgb.txt, depth.txt          times and paths: pictures less than 0.02 s apart are a frame
DIR/associations.txt            or which are a frame is listed; under any name, in either order
DIR/freiburg1_xyz/rgb.txt ...   or several recordings, each a place

Depths have 5000 units a metre.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
from convert.sources.timed_lists import (
    MOST_S,
    Pair,
    associated,
    first_cells,
    is_timed,
    is_timed_pair,
    read_pairs,
    read_times,
)
from shards.errors import WrongSource

RGB = "rgb.txt"
DEPTH = "depth.txt"
USUAL_PAIRS = ("associations.txt", "association.txt", "associate.txt", "associated.txt")
ENCODING = "tum"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Some frames. folder: "", or that of paths. lists: the files that told. n_alone: pictures of
    rgb and of depth that have no partner.
    """

    folder: str
    place: str
    pairs: list[Pair]
    lists: tuple[str, ...]
    n_alone: tuple[int, int] = (0, 0)


def list_tum(source: Path, wanted: Wanted) -> Listing:
    """The frames of a recording, of a folder of some, or of a list of pairs.

    Raises WrongSource where there is none, where it is not clear, and for a list that is wrong.
    """
    refuse_further_fields(source, wanted)
    if source.is_dir():
        directory = source
        recordings = _recordings_in(source)
    else:
        directory = source.parent
        place = source.resolve().parent.name
        lists = (source.name,)
        recordings = [Recording(folder="", place=place, pairs=read_pairs(source), lists=lists)]
    return _listing(source, directory, recordings)


def is_tum(directory: Path) -> bool:
    """Whether it has the lists, or a folder in it has."""
    if _is_usual(directory):
        return True
    return any(_is_usual(folder) for folder in folders_in(directory))


def _is_usual(folder: Path) -> bool:
    if any(is_timed_pair(first_cells(folder / name)) for name in USUAL_PAIRS):
        return True
    return _has_times(folder)


def _has_times(folder: Path) -> bool:
    """Whether both lists of times are there."""
    cells = [first_cells(folder / name) for name in (RGB, DEPTH)]
    return all(is_timed(each) and not is_timed_pair(each) for each in cells)


# ------------------------------------------------------------------------------------- recordings


def _recordings_in(directory: Path) -> list[Recording]:
    here = _recording(directory, "", directory.resolve().name)
    if here is not None:
        return [here]
    inside = [_recording(folder, folder.name, folder.name) for folder in folders_in(directory)]
    found = [recording for recording in inside if recording is not None]
    if not found:
        what = f"has no {RGB} and {DEPTH}, nor a list of pairs, nor a folder that has"
        raise WrongSource(directory, what)
    return found


def _recording(path: Path, folder: str, place: str) -> Recording | None:
    """None where a folder is none. Raises WrongSource where two lists of pairs are there."""
    lists = [name for name in lists_in(path) if is_timed_pair(first_cells(path / name))]
    if len(lists) > 1:
        what = f"has {lists[0]} and {lists[1]}, both lists of pairs"
        raise WrongSource(path, what, "Keep one, or give one instead of the folder")
    if lists:
        pairs = read_pairs(path / lists[0])
        return Recording(folder=folder, place=place, pairs=pairs, lists=tuple(lists))
    if not _has_times(path):
        return None
    rgb = read_times(path / RGB)
    depth = read_times(path / DEPTH)
    pairs = associated(rgb, depth)
    return Recording(
        folder=folder,
        place=place,
        pairs=pairs,
        lists=(RGB, DEPTH),
        n_alone=(len(rgb) - len(pairs), len(depth) - len(pairs)),
    )


# --------------------------------------------------------------------------------------- as a table


def _listing(source: Path, directory: Path, recordings: list[Recording]) -> Listing:
    files: dict[str, list[Found | None]] = {"rgb": [], "depth": []}
    places = []
    for recording in recordings:
        for pair in recording.pairs:
            files["rgb"].append(named(_path(recording.folder, pair.rgb)))
            files["depth"].append(named(_path(recording.folder, pair.depth)))
            places.append(recording.place)
    if not places:
        raise WrongSource(source, f"has no rgb and depth less than {MOST_S} s apart")
    lists = [
        found_at(directory, _path(recording.folder, name))
        for recording in recordings
        for name in recording.lists
    ]
    columns = {"scene": places, "depth_encoding": [ENCODING] * len(places)}
    return Listing(
        table=table_of(files, columns),
        stamp=stamp_of(lists),
        notes=tuple(_notes(recordings)),
    )


def _path(folder: str, path: str) -> str:
    return f"{folder}/{path}" if folder and not path.startswith("/") else path


def _notes(recordings: list[Recording]) -> Iterator[str]:
    n_rgb = sum(recording.n_alone[0] for recording in recordings)
    n_depth = sum(recording.n_alone[1] for recording in recordings)
    if n_rgb or n_depth:
        what = f"{n_rgb} pictures of rgb and {n_depth} of depth have no partner"
        yield f"{what} less than {MOST_S} s apart: left out"
    listed = [recording for recording in recordings if recording.lists != (RGB, DEPTH)]
    if listed:
        path = _path(listed[0].folder, listed[0].lists[0])
        more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
        yield f"pairs are those of {path}{more}"
