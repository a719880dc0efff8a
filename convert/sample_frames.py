"""`python -m convert sample OUT --layout frames`: a directory of made-up rooms, and its table.

    OUT/rgb/kitchen_0001/000017.jpg   OUT/depth/kitchen_0001/000017.png   OUT/label/...
    OUT/rows.csv                      a line a row: its three files, split, scene, type, camera
    OUT/label_names.txt               the name of a label a line, from id 1 on

For demos and tests, so it is as mixed as pictures from several sources are: each place has a camera
of its own, files are of every type, some JPEGs lie on their side and say so. What a row shows is
drawn by `convert/rooms.py`.
"""

import csv
import io
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.furniture import ROOMS
from convert.rooms import FOCAL, draw_row
from shards.errors import UserError, WrongPlace, WrongSetting, how_to_install
from shards.files import fsync, fsync_dir
from shards.spec import class_colours

TABLE = "rows.csv"
LABEL_NAMES = "label_names.txt"
HEADER = ("rgb", "depth", "label", "split", "scene", "scene_type", "fx", "fy", "cx", "cy")
SIZES_WH = ((320, 240), (288, 216), (240, 320))  # of the places in turn
SMALLEST = 32  # pixels a side
SIDES = ("wall", "floor", "ceiling")  # of every room
TURN = ("train", "val", "train", "test")  # the splits of rows
TYPES = tuple(ROOMS)
ROUNDS_A_PLACE = 2  # then each type goes on in another place of each split
JPEG_QUALITY = 92
ON_ITS_SIDE = 6  # EXIF: to be turned by 90 degrees clockwise
ORIENTATION_TAG = 0x0112
BROKEN = "broken_0001"  # the place of the bad frames
BOMB_SIDE = 60_000  # pixels that a header tells of

Files = dict[str, bytes]  # by path
Encode = Callable[[np.ndarray], bytes]


# ------------------------------------------------------------------------------------- file types


def _pillow() -> Any:
    """The module PIL.Image. Raises UserError where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        right = how_to_install("frames", "pillow")
        raise UserError("writing pictures needs pillow", right) from None
    return Image


def _saved(image: Any, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def jpeg(samples: np.ndarray) -> bytes:
    """Of (H, W, 3) or (H, W) uint8."""
    return _saved(_pillow().fromarray(samples), "JPEG", quality=JPEG_QUALITY)


def jpeg_on_its_side(rgb_hwc: np.ndarray) -> bytes:
    """Stored as a camera that was held upright stores it; EXIF says how it is to be turned."""
    lying = np.ascontiguousarray(np.rot90(rgb_hwc))
    exif = _pillow().Exif()
    exif[ORIENTATION_TAG] = ON_ITS_SIDE
    return _saved(_pillow().fromarray(lying), "JPEG", quality=JPEG_QUALITY, exif=exif)


def png(samples: np.ndarray) -> bytes:
    """Of (H, W, 3) uint8, or of (H, W) uint8 or uint16."""
    return _saved(_pillow().fromarray(samples), "PNG")


def palette_png(ids_hw: np.ndarray) -> bytes:
    """Of (H, W) uint8; its colours are for eyes."""
    image = _pillow().fromarray(ids_hw)
    image.putpalette(colours_of_labels().tobytes())
    return _saved(image, "PNG")


def npy(samples: np.ndarray) -> bytes:
    """Of any array."""
    file = io.BytesIO()
    np.save(file, samples)
    return file.getvalue()


def pnm(samples: np.ndarray) -> bytes:
    """PPM of (H, W, 3) uint8, PGM of (H, W) uint8 or uint16."""
    height, width = samples.shape[:2]
    magic = "P6" if samples.ndim == 3 else "P5"
    white = np.iinfo(samples.dtype).max
    head = f"{magic}\n{width} {height}\n{white}\n"
    return head.encode() + samples.astype(samples.dtype.newbyteorder(">")).tobytes()


def npy_metres(depth_mm_hw: np.ndarray) -> bytes:
    """float32, as networks write depth."""
    return npy((depth_mm_hw / 1000).astype("<f4"))


# The files of rows, in turn; the splits take turns of 4, so none of these is even.
ENCODINGS: dict[str, Sequence[tuple[str, Encode]]] = {
    "rgb": (
        (".jpg", jpeg),
        (".png", png),
        (".jpeg", jpeg_on_its_side),
        (".npy", npy),
        (".ppm", pnm),
    ),
    "depth": ((".png", png), (".pgm", pnm), (".npy", npy_metres)),
    "label": (
        (".png", palette_png),
        (".png", png),
        (".npy", npy),
        (".png", palette_png),
        (".pgm", pnm),
        (".png", palette_png),
        (".png", png),
    ),
}


# ------------------------------------------------------------------------------------------ frames


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A row of the table: where its pictures are, and what is known of them.

    paths: of rgb, depth and label. camera_px: fx, fy, cx, cy.
    """

    paths: Mapping[str, str]
    split: str
    place: str
    scene_type: str
    camera_px: tuple[float, float, float, float]

    def line(self) -> list[str]:
        numbers = [f"{number:g}" for number in self.camera_px]
        return [*self.paths.values(), self.split, self.place, self.scene_type, *numbers]


@dataclass(frozen=True, kw_only=True)
class SampleFrames:
    """What was asked for, and what follows from it before a row is drawn."""

    seed: int
    sizes_wh: Sequence[tuple[int, int]]

    def draw(self, number: int) -> tuple[Frame, Files]:
        """The frame of that number, and its files."""
        n_rounds, place_in_round = divmod(number, len(TYPES) * len(TURN))
        kind = TYPES[place_in_round // len(TURN)]
        split = TURN[place_in_round % len(TURN)]
        nth_place = 1 + 3 * (n_rounds // ROUNDS_A_PLACE) + ("train", "val", "test").index(split)
        place = f"{kind}_{nth_place:04d}"
        return self.draw_in(place, kind, split, number)

    def draw_in(self, place: str, kind: str, split: str, number: int) -> tuple[Frame, Files]:
        """The frame of that number in a place, and its files."""
        # A place keeps its camera.
        size_wh = self.sizes_wh[sum(place.encode()) % len(self.sizes_wh)]
        pictures = self.pictures(place, number, size_wh)
        paths: dict[str, str] = {}
        files: Files = {}
        for field, picture in pictures.items():
            encodings = ENCODINGS[field]
            suffix, encode = encodings[number % len(encodings)]
            paths[field] = f"{field}/{place}/{number:06d}{suffix}"
            files[paths[field]] = encode(picture)

        width, height = size_wh
        focal = FOCAL * width
        frame = Frame(
            paths=paths,
            split=split,
            place=place,
            scene_type=kind,
            camera_px=(focal, focal, (width - 1) / 2, (height - 1) / 2),
        )
        return frame, files

    def pictures(self, place: str, number: int, size_wh: tuple[int, int]) -> dict[str, np.ndarray]:
        """rgb (H, W, 3) uint8, depth (H, W) uint16 millimetres with holes, label (H, W) uint8."""
        ids = {name: k for k, name in enumerate(label_names(), 1)}
        # A scene of `rooms` is called TYPE_NUMBER.
        drawn = draw_row(place, number, ids, self.seed, size_wh)
        return {
            "rgb": np.ascontiguousarray(drawn["images"].transpose(2, 1, 0)),
            "depth": np.rint(drawn["rawDepths"].T * 1000.0).astype(np.uint16, order="C"),
            "label": drawn["labels"].T.astype(np.uint8, order="C"),
        }


def colours_of_labels() -> np.ndarray:
    """(n + 1, 3) uint8, the first of what has no label."""
    return np.rint(class_colours(len(label_names())) * 255).astype(np.uint8)


def label_names() -> tuple[str, ...]:
    """Of all that is in the rooms, from id 1 on."""
    pieces = {piece.label for room in ROOMS.values() for piece in room.pieces}
    return (*SIDES, *sorted(pieces))


# ------------------------------------------------------------------------------------- bad frames


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with a frame: a field's file under another suffix, path or with other bytes.

    data: made of the right pixels; None: the file is not there.
    """

    field: str
    suffix: str
    data: Callable[[np.ndarray], bytes | None]
    path: str = ""


def _bomb(_: np.ndarray) -> bytes:
    """A PNG of some bytes that claims 3.6 thousand million pixels."""
    one_pixel = png(np.zeros((1, 1, 3), np.uint8))
    side = BOMB_SIDE.to_bytes(4, "big")
    head = one_pixel[12:16] + side + side + one_pixel[24:29]
    sum_of_head = zlib.crc32(head).to_bytes(4, "big")
    return one_pixel[:12] + head + sum_of_head + one_pixel[33:]


FAULTS: dict[str, Fault] = {
    "missing": Fault(field="rgb", suffix=".jpg", data=lambda _: None),
    "empty": Fault(field="rgb", suffix=".jpg", data=lambda _: b""),
    "truncated": Fault(field="rgb", suffix=".jpg", data=lambda rgb: jpeg(rgb)[:-400]),
    "jpeg_depth": Fault(
        field="depth", suffix=".jpg", data=lambda mm: jpeg((mm // 40).astype(np.uint8))
    ),
    "colour_label": Fault(
        field="label", suffix=".png", data=lambda ids: png(colours_of_labels()[ids])
    ),
    "other_size": Fault(field="depth", suffix=".png", data=lambda mm: png(mm[:-2, :-2].copy())),
    "depth_of_8_bits": Fault(
        field="depth", suffix=".png", data=lambda mm: png((mm // 40).astype(np.uint8))
    ),
    "bomb": Fault(field="rgb", suffix=".png", data=_bomb),
    "text": Fault(field="rgb", suffix=".png", data=lambda _: b"404: not found\n"),
    "outside": Fault(field="rgb", suffix=".jpg", data=lambda _: None, path="../outside.jpg"),
}


def bad_frame(sample: SampleFrames, name: str, number: int) -> tuple[Frame, Files]:
    """The frame of that number, spoilt by the fault of that name, which its files are called."""
    fault = FAULTS[name]
    pictures = sample.pictures(f"{TYPES[0]}_0001", number, sample.sizes_wh[0])
    right: dict[str, tuple[str, Encode]] = {
        "rgb": (".jpg", jpeg),
        "depth": (".png", png),
        "label": (".png", palette_png),
    }
    paths: dict[str, str] = {}
    files: Files = {}
    for field, picture in pictures.items():
        if field == fault.field:
            path = fault.path or f"{field}/{BROKEN}/{name}{fault.suffix}"
            data = fault.data(picture)
        else:
            suffix, encode = right[field]
            path = f"{field}/{BROKEN}/{name}{suffix}"
            data = encode(picture)
        paths[field] = path
        if data is not None:
            files[path] = data
    frame = Frame(
        paths=paths, split="train", place=BROKEN, scene_type=TYPES[0], camera_px=(0, 0, 0, 0)
    )
    return frame, files


# ---------------------------------------------------------------------------------- the directory


def write_frames(
    out: Path,
    n_rows: int = 48,
    *,
    seed: int = 0,
    sizes_wh: Sequence[tuple[int, int]] = SIZES_WH,
    bad: bool = False,
) -> None:
    """Write made-up frames; the directory has its name only when it is complete and durable.

    sizes_wh: of the pictures, those of a place all of one. bad: also a row of every fault in
    FAULTS, behind the others. The bytes are a function of the arguments, and of Pillow's version.
    Raises UserError where `out` exists or cannot be written, for no rows, for pictures under 32
    pixels, and where Pillow is not installed.
    """
    smallest = min(min(size_wh) for size_wh in sizes_wh)
    if n_rows < 1 or smallest < SMALLEST:
        asked = f"{n_rows} of {smallest} pixels"
        raise WrongSetting("rows", asked, f"choose 1 or more, of {SMALLEST} pixels or more")
    sample = SampleFrames(seed=seed, sizes_wh=sizes_wh)
    with written_whole(out) as folder:
        _write_rooms(folder, sample, n_rows, FAULTS if bad else {})


def _write_rooms(
    folder: Path, sample: SampleFrames, n_rows: int, faults: Mapping[str, Fault]
) -> None:
    frames = sorted(
        (_write_frame(folder, *sample.draw(number)) for number in range(n_rows)),
        key=lambda frame: frame.paths["rgb"],
    )
    for number, name in enumerate(faults, n_rows):
        frames.append(_write_frame(folder, *bad_frame(sample, name, number)))
    names = "".join(f"{name}\n" for name in label_names())
    write_file(folder / LABEL_NAMES, names.encode())
    write_file(folder / TABLE, _table(frames))


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """The folder to write into, under a temporary name; it gets its own when all is written, and is
    removed where that fails. Folders above are made.

    Raises WrongPlace where `out` exists or cannot be written, UserError without Pillow.
    """
    if os.path.lexists(out):
        raise WrongPlace(out, "exists already", "Remove it, or choose another name")
    _pillow()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for folder in sorted(path for path in temporary.rglob("*") if path.is_dir()):
            fsync_dir(folder)
        fsync_dir(temporary)
        os.rename(temporary, out)
        fsync_dir(out.parent)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise WrongPlace(out, what, "Choose another place for it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_frame(folder: Path, frame: Frame, files: Files) -> Frame:
    for path, data in files.items():
        write_file(folder / path, data)
    return frame


def write_file(path: Path, data: bytes) -> None:
    """A durable file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        fsync(file.fileno())


def _table(frames: Sequence[Frame]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(frame.line() for frame in frames)
    return text.getvalue().encode()
