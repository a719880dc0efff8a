"""`python -m convert sample OUT --layout tum`: made-up recordings, laid out as those of TUM RGB-D.

    OUT/kitchen_0001/rgb.txt                        time path, a line a picture
    OUT/kitchen_0001/depth.txt
    OUT/kitchen_0001/rgb/1305031102.004411.png      named by its time
    OUT/kitchen_0001/depth/1305031102.011963.png    16 bits, 5000 a metre
    OUT/bedroom_0001/associations.txt               time path time path, instead of the two lists

As in real ones no two times are equal, each recording has a picture of either kind without a
partner, and lists of pairs come in both orders. What a picture shows is drawn by
`convert/rooms.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.sample_frames import TYPES, SampleFrames, png, write_file, written_whole
from shards.errors import WrongSetting

SIZE_WH = (320, 240)
FRAMES_A_RECORDING = 6
START_S = 1305031102.0
BETWEEN_RECORDINGS_S = 1000.0
BETWEEN_FRAMES_S = 0.2
MOST_APART_S = 0.015  # the pictures of a frame
UNITS_A_MM = 5  # 5000 a metre
# Which lists a recording has, in turn: None is rgb.txt and depth.txt.
ORDERS: tuple[tuple[str, str] | None, ...] = (None, ("rgb", "depth"), None, ("depth", "rgb"))


@dataclass(frozen=True)
class Timed:
    """A picture of a recording: when it was taken, and its path in it."""

    time_s: float
    path: str

    def __str__(self) -> str:
        return f"{self.time_s:.6f} {self.path}"


def write_tum(
    out: Path, n_rows: int = 48, *, seed: int = 0, size_wh: tuple[int, int] = SIZE_WH
) -> None:
    """Write made-up recordings with so many frames in all; the directory has its name only when it
    is complete and durable.

    The bytes are a function of the arguments, and of Pillow's version. Raises UserError where
    `out` exists or cannot be written, for no rows, and where Pillow is not installed.
    """
    if n_rows < 1:
        raise WrongSetting("rows", n_rows, "choose 1 or more")
    sample = SampleFrames(seed=seed, sizes_wh=(size_wh,))
    with written_whole(out) as folder:
        for recording, first in enumerate(range(0, n_rows, FRAMES_A_RECORDING)):
            frames = range(first, min(first + FRAMES_A_RECORDING, n_rows))
            _write_recording(folder, sample, recording, frames)


def place_of(recording: int) -> str:
    """The folder of a recording."""
    nth_place, kind = divmod(recording, len(TYPES))
    return f"{TYPES[kind]}_{1 + nth_place:04d}"


def times_of(recording: int, n_frames: int) -> tuple[list[float], list[float]]:
    """When the rgb and when the depth of each frame is taken, in seconds."""
    rng = np.random.default_rng(recording)
    start_s = START_S + recording * BETWEEN_RECORDINGS_S
    rgb_s = start_s + BETWEEN_FRAMES_S * np.arange(n_frames) + rng.uniform(0, 0.01, n_frames)
    sign = rng.choice((-1, 1), n_frames)
    apart_s = sign * rng.uniform(0.001, MOST_APART_S, n_frames)
    return [round(each, 6) for each in rgb_s], [round(each, 6) for each in rgb_s + apart_s]


def _write_recording(folder: Path, sample: SampleFrames, recording: int, frames: range) -> None:
    place = place_of(recording)
    size_wh = sample.sizes_wh[0]
    taken: dict[str, list[Timed]] = {"rgb": [], "depth": []}
    rgb_s, depth_s = times_of(recording, len(frames))
    for number, *times_s in zip(frames, rgb_s, depth_s, strict=True):
        pictures = _pictures(sample, place, number, size_wh)
        for (field, picture), time_s in zip(pictures.items(), times_s, strict=True):
            taken[field].append(_written(folder / place, field, picture, time_s))

    order = ORDERS[recording % len(ORDERS)]
    if order is not None:
        _write_pairs(folder / place, taken[order[0]], taken[order[1]])
        return
    _write_alone(folder / place, sample, place, frames, taken)
    for field, pictures_taken in taken.items():
        what = {"rgb": "color images", "depth": "depth maps"}[field]
        head = [f"# {what}", f"# file: '{place}.bag'", "# timestamp filename"]
        _write_list(folder / place / f"{field}.txt", [*head, *map(str, pictures_taken)])


def _pictures(
    sample: SampleFrames, place: str, number: int, size_wh: tuple[int, int]
) -> dict[str, np.ndarray]:
    """rgb (H, W, 3) uint8, depth (H, W) uint16 with 5000 units a metre."""
    drawn = sample.pictures(place, number, size_wh)
    return {"rgb": drawn["rgb"], "depth": drawn["depth"] * np.uint16(UNITS_A_MM)}


def _written(folder: Path, field: str, picture: np.ndarray, time_s: float) -> Timed:
    path = f"{field}/{time_s:.6f}.png"
    write_file(folder / path, png(picture))
    return Timed(time_s, path)


def _write_alone(
    folder: Path, sample: SampleFrames, place: str, frames: range, taken: dict[str, list[Timed]]
) -> None:
    """A picture of either kind that has no partner: the last of all, and the first."""
    pictures = _pictures(sample, place, frames[0], sample.sizes_wh[0])
    before_s = taken["depth"][0].time_s - BETWEEN_FRAMES_S
    behind_s = taken["rgb"][-1].time_s + BETWEEN_FRAMES_S
    taken["depth"].insert(0, _written(folder, "depth", pictures["depth"], before_s))
    taken["rgb"].append(_written(folder, "rgb", pictures["rgb"], behind_s))


def _write_pairs(folder: Path, first: Sequence[Timed], second: Sequence[Timed]) -> None:
    lines = [f"{one} {other}" for one, other in zip(first, second, strict=True)]
    _write_list(folder / "associations.txt", lines)


def _write_list(path: Path, lines: Sequence[str]) -> None:
    write_file(path, "".join(f"{line}\n" for line in lines).encode())
