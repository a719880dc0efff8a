"""The rows of SUN RGB-D: which there are, in which order, in which half, and where they were taken.

They are numbered as in SUNRGBDMeta.mat and SUNRGBD2Dseg.mat: first those of `alltest` in
allsplit.mat, then those of `alltrain`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from convert.sources.errors import BadRow
from convert.sources.matlab5 import Array, arrays_in, reading, struct_texts
from convert.sources.sunrgbd_tables import SENSORS, nyu_scenes
from shards.errors import WrongSource, shown

MARK = "/SUNRGBD/"  # what stands before it in a path is the machine on which the split was made
NYU_NAME = re.compile(r"kv1/NYUdata/NYU(\d{4})")
NO_NYU_ROW = 2**32 - 1
HALVES = {"alltest": "test", "alltrain": "train"}  # in the order of the rows
MAX_ROWS = 100_000


@dataclass(frozen=True, kw_only=True)
class SunRow:
    """A row of the split. sequence: its folder in SUNRGBD/, such as kv1/NYUdata/NYU0001."""

    sequence: str
    split: str

    @property
    def subset(self) -> str:
        """Two folders, of which the first is the sensor: kv1/NYUdata."""
        return "/".join(self.sequence.split("/")[:2])

    @property
    def nyu_row(self) -> int:
        """Its row in nyu_depth_v2_labeled.mat, 0 first; NO_NYU_ROW where it is none of those."""
        found = NYU_NAME.fullmatch(self.sequence)
        if found is None or not 1 <= int(found[1]) <= len(nyu_scenes()):
            return NO_NYU_ROW
        return int(found[1]) - 1

    @property
    def place(self) -> str:
        """What is nearest to a place: NYU's scene; of SUN3D the place and the sequence in it; else
        the row itself, as nothing tells which others show the same room.
        """
        if self.nyu_row != NO_NYU_ROW:
            return nyu_scenes()[self.nyu_row]
        if self.subset == "xtion/sun3ddata":
            return self.sequence.rpartition("/")[0]
        return self.sequence


@lru_cache(maxsize=2)
def read_split(data: bytes, where: str) -> tuple[SunRow, ...]:
    """The rows of an allsplit.mat. where: what messages call it. Raises WrongSource."""
    try:
        with reading():
            arrays = arrays_in(data)
            rows = tuple(row for name in HALVES for row in _rows_of(arrays, name))
    except BadRow as error:
        raise WrongSource(where, str(error), "Copy or download it again") from None
    _check(rows, where)
    return rows


def _rows_of(arrays: dict[str, Array], name: str) -> list[SunRow]:
    if name not in arrays:
        raise BadRow(f"has no cell array {name}")
    return [SunRow(sequence=sequence_of(path), split=HALVES[name]) for path in arrays[name].texts()]


def sequence_of(path: str) -> str:
    """What follows the last /SUNRGBD/ of a path, without the slashes that are doubled or last.

    Raises BadRow where that leads to no row.
    """
    _, mark, rest = re.sub("/+", "/", f"/{path}/").rpartition(MARK)
    parts = [part for part in rest.split("/") if part]
    is_inside = mark and len(parts) >= 3 and parts[0] in SENSORS and rest.isprintable()
    if not is_inside or any(part.startswith(".") for part in parts):
        raise BadRow(f"has {shown(path)}, which is no row of SUN RGB-D")
    return "/".join(parts)


def in_order_of_meta(rows: Sequence[SunRow], meta: Path) -> tuple[Sequence[SunRow], str]:
    """The rows in the order of SUNRGBDMeta.mat, which labels have too; and what is to be said.

    It is the order of the split as far as is known. A file that is damaged, or of other rows, does
    not count. Raises OSError.
    """
    try:
        paths = struct_texts(meta, "SUNRGBDMeta", "sequenceName")
        number_of = {sequence_of(path): number for number, path in enumerate(paths)}
    except BadRow as error:
        return rows, f"{meta.name} {error}: the order of rows is that of allsplit.mat"
    if number_of.keys() != {row.sequence for row in rows}:
        return rows, f"{meta.name} has other rows: their order is that of allsplit.mat"
    ordered = sorted(rows, key=lambda row: number_of[row.sequence])
    is_same = ordered == list(rows)
    return ordered, "" if is_same else f"rows are in the order of {meta.name}, not of allsplit.mat"


def _check(rows: Sequence[SunRow], where: str) -> None:
    """Raise WrongSource for a split that cannot be one."""
    if not 0 < len(rows) <= MAX_ROWS:
        raise WrongSource(where, f"has {len(rows)} rows")
    there: set[str] = set()
    for row in rows:
        if row.sequence in there:
            raise WrongSource(where, f"names {row.sequence} twice")
        there.add(row.sequence)
