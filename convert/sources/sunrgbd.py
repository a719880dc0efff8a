"""SUN RGB-D, whole: 10,335 rows of four sensors, as they were published.

Which rows there are, and in which half, stands in the toolbox. Pictures lie in a folder a row, by
names that cannot be built; a row's scene type and camera are two small files beside them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert.sources.listings import (
    Found,
    Listing,
    Wanted,
    found_at,
    refuse_further_fields,
    table_of,
)
from convert.sources.sunrgbd_files import (
    FOLDERS,
    TEXTS,
    Pictures,
    RowFiles,
    SunPlaces,
    is_zip,
    places_of,
)
from convert.sources.sunrgbd_labels import label_planes
from convert.sources.sunrgbd_rows import SunRow, in_order_of_meta, read_split
from convert.sources.sunrgbd_tables import DEPTH_ENCODING, SCENE_TYPES, sunrgbd
from convert.sources.tables import FrameTable
from shards.errors import WrongSource
from shards.spec import DatasetSpec

SCENE_TYPE = re.compile(r"[a-z][a-z0-9_]{0,63}")
READERS = 8  # of small files at once: a mount answers each after a while
A_SAMPLE = 0.5  # a subset with less than this share of its rows was never meant to be whole
UNKNOWN = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """What lies in a row's folder. number: of the row, as in SUNRGBD2Dseg.mat, 0 first.

    camera_px: fx, fy, cx, cy; 0 where they are not known. scene_type: "" where it is not known.
    """

    number: int
    row: SunRow
    pictures: Pictures
    scene_type: str
    camera_px: tuple[float, float, float, float]

    @property
    def is_there(self) -> bool:
        return bool(self.pictures)


def list_sunrgbd(path: Path, wanted: Wanted) -> Listing:
    """The rows of SUN RGB-D in the order of SUNRGBDMeta.mat: those of the test half first.

    path: see `places_of`. Of a subset that is there as a whole, rows that are missing are lines
    that will fail; of a sample, those that are there are taken.

    Raises WrongSource where the split or every row is missing, or a file of the toolbox is damaged.
    """
    refuse_further_fields(path, wanted)
    places = places_of(path)
    rows, said = _rows_of(places)
    with closing(places.row_files()) as files:
        stamp = places.stamp(list(files.stamp([row.sequence for row in rows])))
        scanned = _scan(files, rows)
    kept = _kept(scanned)
    if not kept:
        what = f"has none of the {len(rows)} rows of {places.split}"
        raise WrongSource(path, what, "Unpack SUNRGBD.zip there, or give the archive itself")
    fields = _fields(kept, wanted)
    if "label" in wanted.fields and places.labels is not None:
        planes = label_planes(places.labels, len(rows))
        fields["label"] = [planes[each.number] for each in kept]
    notes = (*_missing(scanned, kept), *_unknown(kept), *_without_labels(places, wanted))
    return Listing(
        table=_table(fields, kept),
        stamp=stamp,
        notes=(*said, *notes),
        spec=_spec(kept),
        own_columns={"row_of_nyuv2": np.array([each.row.nyu_row for each in kept], "<u4")},
        roots=_roots(places),
        opened=files.opened,
    )


def stamp_sunrgbd(path: Path, wanted: Wanted) -> tuple[int, ...]:
    """That of the listing, without reading anything. Raises as that does."""
    places = places_of(path)
    if not places.rows.is_dir():
        return places.stamp([found_at(places.rows.parent, places.rows.name)])
    rows = read_split(places.split_data(), str(places.split))
    with closing(places.row_files()) as files:
        return places.stamp(list(files.stamp([row.sequence for row in rows])))


# ------------------------------------------------------------------------------------ what is there


def _rows_of(places: SunPlaces) -> tuple[Sequence[SunRow], list[str]]:
    """All rows in their order, there or not; and what is to be said of it."""
    rows = read_split(places.split_data(), str(places.split))
    if places.meta is None:
        return rows, []
    ordered, said = in_order_of_meta(rows, places.meta)
    return ordered, [said] if said else []


def _scan(files: RowFiles, rows: Sequence[SunRow]) -> list[Scanned]:
    def scan(number: int) -> Scanned:
        row = rows[number]
        pictures = files.pictures(row.sequence)
        scene, intrinsics = (
            files.text(f"{row.sequence}/{name}") if pictures else None for name in TEXTS
        )
        return Scanned(
            number=number,
            row=row,
            pictures=pictures,
            scene_type=scene_type_of(scene),
            camera_px=camera_of(intrinsics),
        )

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(scan, range(len(rows)), chunksize=64))


def scene_type_of(data: bytes | None) -> str:
    """Of a scene.txt, which has one word and no line break; "" where it has none."""
    word = (data or b"").decode("utf-8", "replace").strip()
    return word if SCENE_TYPE.fullmatch(word) else ""


def camera_of(data: bytes | None) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy of an intrinsics.txt: nine numbers of a matrix, row by row."""
    try:
        numbers = [float(word) for word in (data or b"").split()]
    except ValueError:
        return UNKNOWN
    if len(numbers) != 9 or not all(map(math.isfinite, numbers)):
        return UNKNOWN
    fx, _, cx, _, fy, cy = numbers[:6]
    return (fx, fy, cx, cy) if fx > 0 and fy > 0 else UNKNOWN


def _kept(scanned: Sequence[Scanned]) -> list[Scanned]:
    """Every row of the subsets that are whole, or nearly; of others those that are there."""
    n_there = Counter(each.row.subset for each in scanned if each.is_there)
    n_rows = Counter(each.row.subset for each in scanned)
    whole = {name for name, n in n_rows.items() if n_there[name] >= A_SAMPLE * n}
    return [each for each in scanned if each.is_there or each.row.subset in whole]


def _fields(kept: Sequence[Scanned], wanted: Wanted) -> dict[str, list[Found | None]]:
    """The file of each row, by field: of those wanted that any row has."""
    found: dict[str, list[Found | None]] = {}
    for folder, field in FOLDERS.items():
        is_there = any(each.pictures.get(folder) for each in kept)
        if field == "rgb" or (is_there and field in wanted.fields):
            found[field] = [_the_one(each, folder) for each in kept]
    return found


def _table(fields: Mapping[str, Sequence[Found | None]], kept: Sequence[Scanned]) -> FrameTable:
    columns = {
        "scene": [each.row.place for each in kept],
        "scene_type": [each.scene_type for each in kept],
        "depth_encoding": [DEPTH_ENCODING] * len(kept),
    }
    return table_of(
        fields,
        columns,
        split=[each.row.split for each in kept],
        camera_px=np.array([each.camera_px for each in kept]),
    )


def _the_one(scanned: Scanned, folder: str) -> Found:
    """The picture of a folder; where there is not one, the folder, which fails the row."""
    pictures = scanned.pictures.get(folder, [])
    return pictures[0] if len(pictures) == 1 else Found(f"{scanned.row.sequence}/{folder}", 0, 0)


def _spec(kept: Sequence[Scanned]) -> DatasetSpec:
    """The dataset as published, and what words of scene.txt are not in it."""
    known = set(SCENE_TYPES)
    strange = sorted({each.scene_type for each in kept} - known - {""})
    return replace(sunrgbd(), scene_types=(*SCENE_TYPES, *strange))


def _roots(places: SunPlaces) -> tuple[str, ...]:
    rows = str(places.rows.absolute())
    return (rows,) if places.labels is None else (rows, f"label={places.labels.parent.absolute()}")


# ------------------------------------------------------------------------------- what is to be said


def _missing(scanned: Sequence[Scanned], kept: Sequence[Scanned]) -> Iterator[str]:
    if len(kept) < len(scanned):
        halves = Counter(each.row.split for each in scanned)
        taken = Counter(each.row.split for each in kept)
        of = " and ".join(f"{taken[name]} of {n} {name}" for name, n in halves.items())
        yield f"a part of SUN RGB-D: {len(kept)} of its {len(scanned)} rows are there, {of} rows"
    absent = [each.row.sequence for each in kept if not each.is_there]
    if absent:
        yield f"{len(absent)} rows are missing and will fail, such as {absent[0]}"
    for folder in FOLDERS:
        several = [each for each in kept if len(each.pictures.get(folder, [])) > 1]
        if several:
            sequence = several[0].row.sequence
            yield f"{len(several)} rows will fail, as {folder}/ has several pictures: {sequence}"


def _unknown(kept: Sequence[Scanned]) -> Iterator[str]:
    there = [each for each in kept if each.is_there]
    checks: dict[str, Callable[[Scanned], bool]] = {
        "a scene type": lambda each: not each.scene_type,
        "a camera": lambda each: each.camera_px == UNKNOWN,
    }
    for what, is_unknown in checks.items():
        without = [each.row.sequence for each in there if is_unknown(each)]
        if without:
            yield f"{len(without)} rows are without {what}, such as {without[0]}"
    strange = sorted({each.scene_type for each in there} - set(SCENE_TYPES) - {""})
    if strange:
        yield f"{len(strange)} scene types are not among the 45 published, such as {strange[0]}"


def _without_labels(places: SunPlaces, wanted: Wanted) -> Iterator[str]:
    if "label" not in wanted.fields or places.labels is not None:
        return
    what = "no labels: they are Metadata/SUNRGBD2Dseg.mat of SUNRGBDtoolbox.zip"
    yield f"{what}, and have to be unpacked" if is_zip(places.split) else what
