"""Frames of ScanNet as its benchmark hands them out (scannet_frames_25k), as tables.

DIR/scene0000_00/color/000000.jpg       one scan; _00 is the first of the place scene0000
                 depth/000000.png       millimetres
                 label/000000.png       8 bits: NYU's 40 classes
                 instance/000000.png    16 bits: class * 1000 + number within the class
                 intrinsics_color.txt   4x4: the camera
DIR/scannetv2_train.txt, _val, _test    the scans of each split, where they are there

Colour and depth differ in size, but not in what they show: each is stretched to the set's size.
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
    pictures_under,
    refuse_further_fields,
    stamp_of,
    status_of,
    table_of,
)
from convert.sources.nyu_tables import tables
from convert.sources.tables import FrameTable
from shards.errors import WrongSource
from shards.spec import SPLITS, DatasetSpec, LabelTable

SCAN = re.compile(r"(scene\d{4})_\d{2}")
FOLDERS = {"rgb": "color", "depth": "depth", "label": "label", "instance": "instance"}
# Which intrinsics are those of the field that comes first in a set, by which cameras are measured.
INTRINSICS = {"rgb": "intrinsics_color.txt", "depth": "intrinsics_depth.txt"}
SCENE_TYPE = re.compile(r"(?m)^sceneType = (.+)$")
SHOWN = 2  # names in a message


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One scan. path: of its folder, with / behind it, or "". pictures: of each field, by name.

    facts: files that tell of all of it. camera_px: fx, fy, cx, cy; 0 = unknown.
    """

    name: str
    path: str
    pictures: Mapping[str, Mapping[str, Found]]
    facts: Sequence[Found]
    camera_px: tuple[float, ...]
    scene_type: str


def list_scannet(directory: Path, wanted: Wanted) -> Listing:
    """The frames of all scans, or of one. Raises WrongSource where there is none."""
    refuse_further_fields(directory, wanted)
    scans = [_scan(directory, folder, wanted) for folder in _scans_in(directory)]
    splits, lists = _splits(directory)
    used = [scan for scan in scans if not splits or scan.name in splits]
    if not any(scan.pictures["rgb"] for scan in used):
        of_splits = f" that {lists[0].path} and the like name" if lists else ""
        what = f"has no pictures in scene0000_00/color or the like{of_splits}"
        raise WrongSource(directory, what)
    frames = [(scan, name) for scan in used for name in sorted(scan.pictures["rgb"])]
    files = {
        field: [scan.pictures[field].get(name) for scan, name in frames]
        for field in FOLDERS
        if field in wanted.fields and any(scan.pictures[field] for scan in used)
    }
    n_left_out = len(scans) - len(used)
    left_out = [f"{n_left_out} scans are in no split's list: left out"] if n_left_out else []
    return Listing(
        table=_table([scan for scan, _ in frames], files, splits),
        stamp=stamp_of([*lists, *_files(scans)]),
        notes=(*left_out, *_notes(used, files)),
        spec=_nyu40(),
    )


def _table(
    scans: Sequence[Scan],
    files: Mapping[str, Sequence[Found | None]],
    splits: Mapping[str, str],
) -> FrameTable:
    """scans: of each row. splits: of the scans by name; empty: none is known."""
    columns = {
        "scene": [_place_of(scan.name) for scan in scans],
        "scene_type": [scan.scene_type for scan in scans],
        "depth_encoding": ["mm"] * len(scans),
        "instance_encoding": ["class1000"] * len(scans),
        "registered": ["yes"] * len(scans),
    }
    of_rows = [splits[scan.name] for scan in scans] if splits else None
    cameras = np.array([scan.camera_px for scan in scans])
    return table_of(files, columns, split=of_rows, camera_px=cameras)


def is_scannet(directory: Path) -> bool:
    """Whether it is a scan, or a folder in it is."""
    return any(_is_scan(folder) for folder in (directory, *folders_in(directory)))


def _is_scan(folder: Path) -> bool:
    is_named_so = SCAN.fullmatch(folder.resolve().name) is not None
    return is_named_so and (folder / FOLDERS["rgb"]).is_dir()


def _place_of(scan: str) -> str:
    match = SCAN.fullmatch(scan)
    return match[1] if match else scan


# ------------------------------------------------------------------------------------------ scans


def _scans_in(directory: Path) -> list[Path]:
    """Their folders; the directory itself is one where it is a scan."""
    if (directory / FOLDERS["rgb"]).is_dir():
        return [directory]
    return [folder for folder in folders_in(directory) if (folder / FOLDERS["rgb"]).is_dir()]


def _scan(directory: Path, folder: Path, wanted: Wanted) -> Scan:
    path = "" if folder == directory else f"{folder.name}/"
    name = folder.resolve().name
    first = "rgb" if "rgb" in wanted.known else "depth"
    paths = [f"{path}{INTRINSICS[first]}", f"{path}{name}.txt"]
    facts = [found_at(directory, each) for each in paths if (directory / each).is_file()]
    return Scan(
        name=name,
        path=path,
        pictures={field: _pictures(directory, path, field) for field in FOLDERS},
        facts=facts,
        camera_px=_camera(folder / INTRINSICS[first]),
        scene_type=_scene_type(folder / f"{name}.txt"),
    )


def _pictures(directory: Path, path: str, field: str) -> dict[str, Found]:
    """By their names without the ending."""
    folder = directory / f"{path}{FOLDERS[field]}"
    if not folder.is_dir():
        return {}
    found: dict[str, Found] = {}
    for entry in pictures_under(folder, is_deep=False):
        inside = f"{path}{FOLDERS[field]}/{entry.name}"
        name = entry.name.rpartition(".")[0]
        if name in found:
            what = f"has {found[name].path} and {inside}, of one name"
            raise WrongSource(directory, what, "Keep one of them")
        found[name] = status_of(inside, entry)
    return found


def _camera(path: Path) -> tuple[float, ...]:
    """fx, fy, cx, cy of a 4x4 matrix; 0 where there is no file. Raises WrongSource."""
    if not path.is_file():
        return (0.0, 0.0, 0.0, 0.0)
    try:
        matrix = np.loadtxt(path, dtype=np.float64)
    except ValueError:
        matrix = np.zeros(0)
    if matrix.shape not in ((3, 3), (4, 4)) or not np.isfinite(matrix).all():
        raise WrongSource(path, "is no matrix of a camera, 4 lines of 4 numbers")
    return (matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])


def _scene_type(path: Path) -> str:
    """As the scan's own file of facts has it; "" without."""
    if not path.is_file():
        return ""
    match = SCENE_TYPE.search(path.read_text(encoding="utf-8", errors="replace"))
    return match[1].strip() if match else ""


def _files(scans: Sequence[Scan]) -> Iterator[Found]:
    for scan in scans:
        yield from scan.facts
        for pictures in scan.pictures.values():
            yield from pictures.values()


# ----------------------------------------------------------------------------------------- splits


def _splits(directory: Path) -> tuple[dict[str, str], list[Found]]:
    """The split of each scan that a list names, and the lists. Raises WrongSource for one in two
    of them.
    """
    found: dict[str, str] = {}
    lists = []
    for split in SPLITS:
        name = f"scannetv2_{split}.txt"
        if not (directory / name).is_file():
            continue
        lists.append(found_at(directory, name))
        for scan in (directory / name).read_text(encoding="utf-8", errors="replace").split():
            if found.setdefault(scan, split) != split:
                what = f"has {scan} in the lists of {found[scan]} and of {split}"
                raise WrongSource(directory, what, "Take it out of one of them")
    return found, lists


# ---------------------------------------------------------------------------------- what is said


def _notes(scans: Sequence[Scan], files: Mapping[str, Sequence[Found | None]]) -> Iterator[str]:
    for field, of_rows in files.items():
        n_without = sum(each is None for each in of_rows)
        if n_without:
            yield f"{n_without} frames have no {field}"
    for field in files:
        alone = [
            found.path
            for scan in scans
            for name, found in scan.pictures[field].items()
            if name not in scan.pictures["rgb"]
        ]
        if alone:
            listed = ", ".join(alone[:SHOWN])
            yield f"{len(alone)} pictures of {field} have no color, such as {listed}: left out"


def _nyu40() -> DatasetSpec:
    """The names of NYU's 40 classes, and the 13 that they are parts of."""
    official = tables()
    to13 = dict(zip(official.to40, official.to13, strict=True))
    ids = (0, *(to13.get(k, 0) for k in range(1, len(official.classes40) + 1)))
    return DatasetSpec(
        name="",
        width=0,
        height=0,
        label_names=official.classes40,
        label_tables=(LabelTable(names=official.classes13, ids=ids),),
    )
