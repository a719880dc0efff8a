"""Lists of pictures with times, as TUM's recordings have them, and which pictures are a pair.

    rgb.txt             time path               1305031102.175304 rgb/1305031102.175304.png
    associations.txt    time path time path     in either order

Times are seconds. Lines that begin with # are comments.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.sources.folder_names import rgb_is_first
from convert.sources.table_lines import IS_NUMBER, Fault, path_lines
from shards.errors import WrongSource, shown

MOST_S = 0.02  # between the pictures of a pair: as TUM's associate.py has it
WHICH = "Name the folders rgb and depth, or give a table with these columns"


@dataclass(frozen=True)
class Pair:
    """Paths as written. time_s: of the rgb picture."""

    time_s: float
    rgb: str
    depth: str


def read_times(path: Path) -> dict[float, str]:
    """The path of each time; of equal times the last counts. Raises WrongSource."""
    found = {}
    for number, cells in _lines(path):
        if not is_timed(cells):
            raise WrongSource(path, f": line {number} is no time and a path")
        found[float(cells[0])] = cells[1]
    return found


def read_pairs(path: Path) -> list[Pair]:
    """Those of a list of pairs, in its order. Raises WrongSource."""
    found = []
    for number, cells in _lines(path):
        if not is_timed_pair(cells):
            raise WrongSource(path, f": line {number} is not time, path, time, path")
        is_first = rgb_is_first(cells[1], cells[3])
        if is_first is None:
            what = f": line {number} has {shown(cells[1])} and {shown(cells[3])}"
            raise WrongSource(path, f"{what}, and which is the depth is not told", WHICH)
        rgb, depth = (1, 3) if is_first else (3, 1)
        found.append(Pair(float(cells[rgb - 1]), cells[rgb], cells[depth]))
    return found


def is_timed(cells: Sequence[str]) -> bool:
    """Whether a line is time, path, and perhaps more."""
    return len(cells) >= 2 and _is_time(cells[0]) and not _is_time(cells[1])


def is_timed_pair(cells: Sequence[str]) -> bool:
    """Whether a line is time, path, time, path."""
    return len(cells) == 4 and is_timed(cells[:2]) and is_timed(cells[2:])


def _is_time(cell: str) -> bool:
    return IS_NUMBER.fullmatch(cell) is not None and math.isfinite(float(cell))


def first_cells(path: Path) -> list[str]:
    """Of a list's first line; none where it has no line, or is no text."""
    try:
        return next(path_lines(path), (0, []))[1]
    except (Fault, WrongSource, OSError):
        return []


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        yield from path_lines(path)
    except Fault as fault:
        raise fault.about(path) from None


# ----------------------------------------------------------------------------------------- pairing


def associated(rgb: Mapping[float, str], depth: Mapping[float, str]) -> list[Pair]:
    """Pairs of pictures taken less than MOST_S apart, by the time of rgb. Each is in one at most.

    The two that are closest of all are a pair, then the closest of those that are left, and so on.
    """
    rgb_s = np.array(sorted(rgb))
    depth_s = np.array(sorted(depth))
    first = np.searchsorted(depth_s, rgb_s - MOST_S, "left")
    last = np.searchsorted(depth_s, rgb_s + MOST_S, "right")
    n_near = last - first
    of_rgb = np.repeat(np.arange(len(rgb_s)), n_near)
    places = np.arange(len(of_rgb)) - np.repeat(np.cumsum(n_near) - n_near, n_near)
    of_depth = np.repeat(first, n_near) + places
    apart_s = np.abs(rgb_s[of_rgb] - depth_s[of_depth])

    is_rgb_free = np.ones(len(rgb_s), bool)
    is_depth_free = np.ones(len(depth_s), bool)
    depth_of = {}
    for k in np.lexsort((of_depth, of_rgb, apart_s)):
        if apart_s[k] < MOST_S and is_rgb_free[of_rgb[k]] and is_depth_free[of_depth[k]]:
            is_rgb_free[of_rgb[k]] = False
            is_depth_free[of_depth[k]] = False
            depth_of[float(rgb_s[of_rgb[k]])] = float(depth_s[of_depth[k]])
    return [Pair(time_s, rgb[time_s], depth[depth_of[time_s]]) for time_s in sorted(depth_of)]
