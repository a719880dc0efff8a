"""`python -m convert sample OUT --layout sunrgbd`: made-up rooms as SUN RGB-D lays its rows out.

    OUT/SUNRGBD/kv1/NYUdata/NYU0001/image/NYU0001.jpg    depth/  depth_bfx/  scene.txt  ...
    OUT/SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat     which rows are train and which test
    OUT/SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat         labels, a picture a row
    OUT/SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat          the rows in their order

Pictures are a tenth of the real sizes, a size a sensor. What makes the real files hard to read is
here too: names of depth that do not follow the picture's, places in both halves, paths with slashes
at their end or doubled, a scene.txt without line break, two files of extrinsics. Which rows there
are and what they show is made up; of 10,335 rows each subset has as many as the real one has.
"""

import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import h5py
import numpy as np

from convert.furniture import ROOMS
from convert.rooms import FOCAL, draw_row
from convert.sample_frames import jpeg, png
from convert.sources.nyu_tables import split_of
from convert.sources.nyu_tables import tables as nyu_lists
from convert.sources.sunrgbd_tables import (
    LABEL_NAMES,
    LABELS_FILE,
    META_FILE,
    SCENE_TYPES_OF_19,
    SPLIT_FILE,
    nyu_scenes,
)
from shards.errors import WrongPlace, WrongSetting
from shards.files import fsync_dir
from shards.spec import SPLITS

ROWS = "SUNRGBD"
TOOLBOX = "SUNRGBDtoolbox"
PREFIX = "/n/fs/sun3d/data/SUNRGBD"  # of the paths in allsplit.mat
META_PREFIX = "SUNRGBD//"  # and of those in SUNRGBDMeta.mat
N_REAL = 10_335
SIZES_WH = {"kv1": (56, 43), "kv2": (73, 53), "realsense": (68, 53), "xtion": (59, 44)}
FAR_MM = 9000  # beyond what the upper 13 bits hold


@dataclass(frozen=True, kw_only=True)
class Subset:
    """name: its folder. n_test, n_train: rows of the real one. sequence: the folder of a row, by
    its number in the subset and in the set.
    """

    name: str
    n_test: int
    n_train: int
    sequence: Callable[[int], str]
    has_slash: bool = True  # behind its paths in allsplit.mat


def _kinect2(k: int) -> str:
    minutes = f"{10 + k // 60 % 10}-{k % 60:02d}-37"
    middle = "RobotInRoom_" if k == 5 else ""
    return f"{k:06d}_2014-05-26_{minutes}_260595134347_{middle}rgbf{k % 300:06d}-resize"


def _stamped(form: str) -> Callable[[int], str]:
    return lambda k: form.format(h=9 + k // 3600 % 12, m=k // 60 % 60, s=k % 60, n=260595134347 + k)


def _sun3d(k: int) -> str:
    """PLACE/SEQUENCE/FRAME. Twelve frames a sequence and half; every sixth is in both halves, and
    every second place has another sequence.
    """
    number, half = divmod(k, 2)
    sequence, frame = divmod(number, 12)
    is_shared = sequence % 6 == 0
    place = 2 * (sequence // 2) + (0 if is_shared else half)
    name = f"mit_{place:03d}_d{500 + place}"
    frame += 12 * half
    return f"{name}/{name}_{1 + sequence % 2}/{frame * 40:07d}-{frame * 33333:012d}"


SUBSETS = (
    Subset(name="kv2/kinect2data", n_test=1711, n_train=1774, sequence=_kinect2, has_slash=False),
    Subset(
        name="kv2/align_kv2",
        n_test=149,
        n_train=150,
        sequence=_stamped("2014-12-18_{h:02d}-{m:02d}-{s:02d}_{n}"),
    ),
    Subset(name="kv1/NYUdata", n_test=654, n_train=795, sequence=lambda k: f"NYU{k + 1:04d}"),
    Subset(name="kv1/b3dodata", n_test=276, n_train=278, sequence=lambda k: f"img_{k + 1:04d}"),
    Subset(name="xtion/sun3ddata", n_test=1539, n_train=1551, sequence=_sun3d),
    Subset(
        name="xtion/xtion_align_data",
        n_test=149,
        n_train=150,
        sequence=_stamped("2014_12_18_{h:02d}_{m:02d}_{s:02d}"),
    ),
    Subset(
        name="realsense/lg",
        n_test=548,
        n_train=0,
        sequence=_stamped("2014_10_24-{h:02d}_{m:02d}_{s:02d}-1311000073"),
    ),
    Subset(
        name="realsense/sa",
        n_test=24,
        n_train=415,
        sequence=_stamped("2014_10_21-{h:02d}_{m:02d}_{s:02d}-1311000073"),
    ),
    Subset(
        name="realsense/sh",
        n_test=0,
        n_train=21,
        sequence=_stamped("2014_10_21-{h:02d}_{m:02d}_{s:02d}-1311000041"),
    ),
    Subset(
        name="realsense/shr",
        n_test=0,
        n_train=151,
        sequence=_stamped("2014_12_18-{h:02d}_{m:02d}_{s:02d}-1311000073"),
    ),
)
N_ODD = 3  # test rows of kv2/kinect2data whose paths do end in a slash
# What stands in a room of a type that is not among the made-up ones.
ROOM_OF = {
    **{"classroom": "office", "computer_room": "office", "home_office": "office"},
    **dict.fromkeys(("classroom", "computer_room", "library", "study_space"), "office"),
    **dict.fromkeys(("conference_room", "dining_area", "discussion_area"), "dining_room"),
    **dict.fromkeys(("furniture_store", "rest_space"), "living_room"),
    "lab": "kitchen",
}
OTHER_TYPES = ("idk", "gym")  # of rows that the usual protocol leaves out
TYPES_IN_TURN = (*SCENE_TYPES_OF_19, OTHER_TYPES[0], *SCENE_TYPES_OF_19, OTHER_TYPES[1])


# -------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class MadeUpRow:
    """number: in SUNRGBDMeta.mat, 0 first. path: of its folder in SUNRGBD/."""

    number: int
    subset: Subset
    sequence: str
    split: str
    scene_type: str

    @property
    def path(self) -> str:
        return f"{self.subset.name}/{self.sequence}"

    @property
    def file_name(self) -> str:
        """Of its picture, without the ending; not to be told from the folder's in all subsets."""
        if self.subset.name.startswith("kv1") or self.subset.name == "xtion/sun3ddata":
            return self.sequence.rpartition("/")[2]
        return f"{self.number % 300:07d}"

    @property
    def depth_name(self) -> str:
        is_other = self.subset.name == "kv1/b3dodata"
        return f"{self.file_name}_abs" if is_other else self.file_name

    @property
    def sensor(self) -> str:
        return self.subset.name.partition("/")[0]

    @property
    def size_wh(self) -> tuple[int, int]:
        return SIZES_WH[self.sensor]


def made_up_rows(n_rows: int) -> list[MadeUpRow]:
    """The rows in the order of SUNRGBDMeta.mat: the test half of each subset, then the train half.

    Of fewer than 10,335 each subset has its share, in the same order.
    """
    halves = [(subset, split) for split in ("test", "train") for subset in SUBSETS]
    counts = [subset.n_test if split == "test" else subset.n_train for subset, split in halves]
    bounds = np.rint(np.cumsum([0, *counts]) * n_rows / N_REAL).astype(int)
    rows: list[MadeUpRow] = []
    for k, (subset, split) in enumerate(halves):
        for place in range(int(bounds[k + 1] - bounds[k])):
            number = len(rows)
            rows.append(
                MadeUpRow(
                    number=number,
                    subset=subset,
                    sequence=_sequence(subset, split, place),
                    split=split,
                    scene_type=TYPES_IN_TURN[number % len(TYPES_IN_TURN)],
                )
            )
    return rows


def _sequence(subset: Subset, split: str, place: int) -> str:
    """Halves take turns, so that some places of SUN3D are in both, as they are in the real one."""
    if subset.name == "kv1/NYUdata":
        return subset.sequence(_nyu_rows(split)[place])
    if subset.n_test == 0 or subset.n_train == 0:
        return subset.sequence(place)
    return subset.sequence(2 * place + (split == "train"))


@cache
def _nyu_rows(split: str) -> tuple[int, ...]:
    """Those that are in that half of NYU's own split, which SUN RGB-D has kept."""
    number = SPLITS.index(split)
    return tuple(k for k, scene in enumerate(nyu_scenes()) if split_of(scene)[0] == number)


# ------------------------------------------------------------------------------------------- files


def rotated(depth_mm: np.ndarray) -> np.ndarray:
    """uint16 millimetres as the PNGs have them: the bits rotated left by 3."""
    return (depth_mm << 3) | (depth_mm >> 13)


@cache
def _ids() -> dict[str, int]:
    """Of each of NYU's 894 names its class of 37; those beyond are void."""
    lists = nyu_lists()
    named = zip(lists.classes, lists.to40, strict=True)
    return {name: group if group <= len(LABEL_NAMES) else 0 for name, group in named}


def pictures(row: MadeUpRow, seed: int = 0) -> dict[str, np.ndarray]:
    """rgb (H, W, 3) uint8; depth, raw_depth (H, W) uint16 millimetres; label (H, W) uint8.

    As in the real ones depth has no holes and is not raw_depth elsewhere either, and some of both
    is beyond 8,191 mm.
    """
    known = row.scene_type if row.scene_type in ROOMS else ROOM_OF.get(row.scene_type, "office")
    drawn = draw_row(f"{known}_{row.number % 97:04d}", row.number, _ids(), seed, row.size_wh)
    raw_mm = np.rint(drawn["rawDepths"].T * 1000.0).astype(np.uint16)
    filled_mm = np.rint(drawn["depths"].T * 1000.0).astype(np.uint16)
    smooth_mm = np.maximum(filled_mm // 4 * 4, 1)
    for mm in (raw_mm, smooth_mm):
        mm[2:4, 2:5] = FAR_MM
    return {
        "rgb": np.ascontiguousarray(drawn["images"].transpose(2, 1, 0)),
        "depth": smooth_mm,
        "raw_depth": raw_mm,
        "label": np.ascontiguousarray(drawn["labels"].T.astype(np.uint8)),
    }


def intrinsics(row: MadeUpRow) -> str:
    """Of a picture's own size, row by row, as the real ones have them."""
    width, height = row.size_wh
    focal = FOCAL * width
    lines = ((focal, 0, width / 2), (0, focal, height / 2), (0, 0, 1))
    return "".join(" ".join(f"{number:.6f}" for number in line) + "\n" for line in lines)


def files_of(row: MadeUpRow, drawn: dict[str, np.ndarray]) -> Iterator[tuple[str, bytes]]:
    """Every file of a row: its path in SUNRGBD/, and its bytes."""
    yield f"{row.path}/image/{row.file_name}.jpg", jpeg(drawn["rgb"])
    yield f"{row.path}/depth/{row.depth_name}.png", png(rotated(drawn["raw_depth"]))
    yield f"{row.path}/depth_bfx/{row.depth_name}.png", png(rotated(drawn["depth"]))
    yield f"{row.path}/scene.txt", row.scene_type.encode()
    yield f"{row.path}/intrinsics.txt", intrinsics(row).encode()
    level = b"1.000000 0.000000 0.000000 0.000000\n0.000000 1.000000 0.000000 0.000000\n"
    level += b"0.000000 0.000000 1.000000 0.000000\n"
    yield f"{row.path}/extrinsics/20141221170930.txt", level
    if row.number == 1:
        yield f"{row.path}/extrinsics/20150101000000.txt", level


# -------------------------------------------------------------------------------------- MATLAB 5

MATRIX = 14
CELL_CLASS = 1
STRUCT_CLASS = 2
CHAR_CLASS = 4


def _element(kind: int, body: bytes) -> bytes:
    return struct.pack("<II", kind, len(body)) + body.ljust(-(-len(body) // 8) * 8, b"\0")


def _array(matlab_class: int, sides: Sequence[int], content: bytes, name: str = "") -> bytes:
    head = _element(6, struct.pack("<II", matlab_class, 0))
    head += _element(5, struct.pack(f"<{len(sides)}i", *sides))
    return _element(MATRIX, head + _element(1, name.encode()) + content)


def text_cell(text: str) -> bytes:
    """A char array of one line."""
    return _array(CHAR_CLASS, (1, len(text)), _element(16, text.encode()))


def cell_array(cells: Sequence[bytes], name: str = "", is_column: bool = False) -> bytes:
    """A cell array of arrays that are written already, (1, N), or (N, 1) as a column."""
    sides = (len(cells), 1) if is_column else (1, len(cells))
    return _array(CELL_CLASS, sides, b"".join(cells), name)


def _struct(fields: Sequence[str], rows: Sequence[Sequence[bytes]], name: str) -> bytes:
    length = 32  # of a field's name
    names = b"".join(field.encode().ljust(length, b"\0") for field in fields)
    content = _element(5, struct.pack("<i", length)) + _element(1, names)
    return _array(STRUCT_CLASS, (1, len(rows)), content + b"".join(map(b"".join, rows)), name)


def matlab_5(arrays: Sequence[bytes]) -> bytes:
    """A file of these arrays, as MATLAB before v7.3 writes it without packing."""
    head = b"MATLAB 5.0 MAT-file, made up".ljust(124) + b"\x00\x01IM"
    return head + b"".join(arrays)


def allsplit(rows: Sequence[MadeUpRow]) -> bytes:
    """allsplit.mat, each path in a cell of its own in a cell, with the real one's slashes."""
    odd = {row.number for row in rows[: 4 * N_ODD : 4] if not row.subset.has_slash}

    def path(row: MadeUpRow) -> bytes:
        slash = "/" if row.subset.has_slash or row.number in odd else ""
        return cell_array([text_cell(f"{PREFIX}/{row.path}{slash}")])

    train = [path(row) for row in rows if row.split == "train"]
    test = [path(row) for row in rows if row.split == "test"]
    n_val = len(train) // 2
    parts = [
        cell_array(train[n_val:], is_column=True),
        cell_array(train[:n_val], is_column=True),
    ]
    return matlab_5(
        [
            cell_array(train, "alltrain"),
            cell_array(test, "alltest"),
            _struct(("train", "val"), [parts], "trainvalsplit"),
        ]
    )


def meta(rows: Sequence[MadeUpRow]) -> bytes:
    """SUNRGBDMeta.mat, with the fields that name files."""
    fields = ("sequenceName", "rgbname", "depthname", "sensorType")
    cells = []
    for row in rows:
        names = (f"{row.file_name}.jpg", f"{row.depth_name}.png")
        texts = (f"{META_PREFIX}{row.path}", *names, row.sensor)
        cells.append([text_cell(text) for text in texts])
    return matlab_5([_struct(fields, cells, "SUNRGBDMeta")])


# -------------------------------------------------------------------------------------- the labels


class LabelsFile:
    """SUNRGBD2Dseg.mat, as MATLAB v7.3 writes it: references to pictures of doubles, (W, H)."""

    def __init__(self, path: Path, n_rows: int) -> None:
        self._file = h5py.File(path, "w", userblock_size=512)
        self._targets = self._file.create_group("#refs#")
        self._of_37 = np.empty((n_rows, 1), h5py.ref_dtype)
        self._of_all = np.empty((n_rows, 1), h5py.ref_dtype)

    def put(self, row: int, label_hw: np.ndarray) -> None:
        """The label of a row, (H, W) of 0..37."""
        stored_wh = label_hw.T.astype("<f8")
        self._of_37[row, 0] = self._picture(f"a{row}", stored_wh)
        if row < 2:  # their other labels are not read: two stand for all
            self._of_all[row, 0] = self._picture(f"b{row}", stored_wh + 100)
        else:
            self._of_all[row, 0] = self._of_37[row, 0]

    def close(self) -> None:
        group = self._file.create_group("SUNRGBD2Dseg")
        group.attrs["MATLAB_class"] = np.bytes_("struct")
        for name, references in (("seglabel", self._of_37), ("seglabelall", self._of_all)):
            cells = group.create_dataset(name, data=references, dtype=h5py.ref_dtype)
            cells.attrs["MATLAB_class"] = np.bytes_("cell")
        self._file.close()

    def _picture(self, name: str, stored_wh: np.ndarray) -> h5py.Reference:
        dset = self._targets.create_dataset(
            name, data=stored_wh, chunks=stored_wh.shape, compression="gzip", compression_opts=3
        )
        dset.attrs["MATLAB_class"] = np.bytes_("double")
        return dset.ref


# ---------------------------------------------------------------------------------- the directory


def write_sunrgbd(out: Path, n_rows: int = 48, *, seed: int = 0) -> None:
    """Write made-up rows; the directory has its name only when it is complete.

    Raises UserError where `out` exists or cannot be written, for no rows or more than there are in
    the real one, and where Pillow is not installed.
    """
    if os.path.lexists(out):
        raise WrongPlace(out, "exists already", "Remove it, or choose another name")
    if not 1 <= n_rows <= N_REAL:
        raise WrongSetting("rows", n_rows, f"choose 1 to {N_REAL}")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _write_all(temporary, made_up_rows(n_rows), seed)
        os.rename(temporary, out)
        fsync_dir(out.parent)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise WrongPlace(out, what, "Choose another place for it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_all(folder: Path, rows: Sequence[MadeUpRow], seed: int) -> None:
    toolbox = folder / TOOLBOX
    _write_file(toolbox / SPLIT_FILE, allsplit(rows))
    _write_file(toolbox / META_FILE, meta(rows))
    labels = LabelsFile(toolbox / LABELS_FILE, len(rows))
    for row in rows:
        drawn = pictures(row, seed)
        labels.put(row.number, drawn["label"])
        for path, data in files_of(row, drawn):
            _write_file(folder / ROWS / path, data)
    labels.close()


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
