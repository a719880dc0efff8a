"""Rows a second of a conversion of frames, against bare decoding of the same files.

    python -m bench.frames [DIR] [--pairs 9] [--rows 2400] [--files 300]

imagecodecs, pillow, opencv   two processes read each file and decode it by that library, where it
                              is installed; nothing else: no checks, no resizing, no writing
ours      the same as the conversion decodes, with its checks
resized   the same, and each picture resized to 224x224: what a conversion cannot do without
convert   `python -m convert run`, two processes, 224x224 .npy shards: the whole command, from the
          start of Python to its end
beyond    what a conversion of more rows takes longer: its rate without its start

A round is every method once, in fresh processes; rounds alternate their order. Printed are medians
of the rounds with 95 % bootstrap intervals, and how many times as long as the first decoder a
method takes within a round. CPU is that of all processes, which other programs on the machine
disturb less. Files are read from the page cache.

DIR has rgb/ and depth/. Without it, made-up rooms of 640x480 with a camera's noise, as JPEG and
16-bit PNG, are written to a temporary folder first. The table has --rows lines: where there are
fewer frames their lines are repeated.
"""

import argparse
import csv
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import add_number, exit_status, make_parser
from bench.figures import Interval, median_interval
from convert.decode import KEEP_MEMORY
from convert.sample_frames import SampleFrames, jpeg, png
from shards.errors import WrongSource
from shards.flags import as_path

N_PROCESSES = 2
SIZE_WH = (640, 480)
STORED_SIZE = 224
N_DRAWN = 24  # rooms; the other files are these with other noise
NOISE = 4.0  # grey levels
NOISE_MM = 6.0
BLOCK = 16  # rows that a process takes at once
FEWER = 4  # the start of a conversion shows in one of so many times fewer rows
Frame = Mapping[str, str]  # of each field the path of its file


# ------------------------------------------------------------------------------------- the frames


def write_frames(folder: Path, n_files: int) -> None:
    """rgb/N.jpg and depth/N.png of made-up rooms, each with noise of its own."""
    sample = SampleFrames(seed=0, sizes_wh=[SIZE_WH])
    rooms = [sample.pictures("kitchen_0001", number, SIZE_WH) for number in range(N_DRAWN)]
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    for row in range(n_files):
        room = rooms[row % N_DRAWN]
        rng = np.random.default_rng(row)
        noise = rng.normal(0, NOISE, room["rgb"].shape)
        rgb = np.clip(room["rgb"] + noise, 0, 255).astype(np.uint8)
        noise_mm = rng.normal(0, NOISE_MM, room["depth"].shape)
        is_measured = room["depth"] > 0
        depth = np.where(is_measured, room["depth"] + noise_mm, 0).astype(np.uint16)
        (folder / "rgb" / f"{row:05d}.jpg").write_bytes(jpeg(rgb))
        (folder / "depth" / f"{row:05d}.png").write_bytes(png(depth))


def frames_of(folder: Path, n_rows: int) -> list[Frame]:
    """So many frames of the folder, in turn, with paths in it. Raises WrongSource for no frame."""
    from convert.sources.layouts_frames import list_frames
    from convert.sources.listings import Wanted

    table = list_frames(folder, Wanted()).table
    if not table.n_rows:
        raise WrongSource(folder, "has no frames")
    frames = [
        {field: paths[row] for field, paths in table.paths.items() if paths[row]}
        for row in range(min(table.n_rows, n_rows))
    ]
    return [frames[row % len(frames)] for row in range(n_rows)]


def write_table(path: Path, frames: Sequence[Frame]) -> None:
    """The frames as a table, a line each."""
    fields = sorted({field for frame in frames for field in frame})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(frames)


# ------------------------------------------------------------------------------------- decoders


def decode_imagecodecs(path: str, field: str) -> Any:
    """By imagecodecs alone; what is neither JPEG nor PNG as the conversion does."""
    import imagecodecs

    data = Path(path).read_bytes()
    if data.startswith(b"\xff\xd8"):
        return imagecodecs.jpeg8_decode(data)
    if data.startswith(b"\x89PNG"):
        return imagecodecs.png_decode(data)
    return decode_ours(path, field)


def decode_pillow(path: str, field: str) -> Any:
    """By Pillow alone."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image)


def decode_opencv(path: str, field: str) -> Any:
    """By OpenCV, colours as they lie there (BGR)."""
    cv2: Any = importlib.import_module("cv2")
    data = np.fromfile(path, np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR if field == "rgb" else cv2.IMREAD_UNCHANGED)


def decode_ours(path: str, field: str) -> Any:
    """As the conversion decodes it."""
    from convert.sources.pictures import decode
    from shards.spec import KNOWN_FIELDS

    return decode(Path(path).read_bytes(), KNOWN_FIELDS[field].kind).pixels


def decode_resized(path: str, field: str) -> Any:
    """As the conversion decodes and resizes it."""
    from convert.resize import StoredPixels
    from convert.sources.depth_encodings import DepthRule

    pixels = decode_ours(path, field)
    if field == "depth":
        pixels = StoredPixels(pixels, DepthRule().to_mm)
    return resizer(field)(pixels)


@cache
def resizer(field: str) -> Callable[[Any], Any]:
    """Of the pictures of a field, to the size that is stored."""
    from convert.resize import Resizer
    from shards.spec import KNOWN_FIELDS

    return Resizer(field=KNOWN_FIELDS[field], size=STORED_SIZE, is_hw=True)


DECODERS: dict[str, Callable[[str, str], Any]] = {
    "imagecodecs": decode_imagecodecs,
    "pillow": decode_pillow,
    "opencv": decode_opencv,
    "ours": decode_ours,
    "resized": decode_resized,
}
NEEDS = {"imagecodecs": "imagecodecs", "pillow": "PIL", "opencv": "cv2"}


def installed_decoders() -> list[str]:
    """The names of those that can be measured here, the one to compare with first."""
    return [name for name in DECODERS if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]


# ------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one method. cpu_s: of all its processes."""

    n_rows: int
    seconds: float
    cpu_s: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.n_rows / self.seconds

    def beyond(self, smaller: "Run") -> "Run":
        """What this run took longer than one of fewer rows, for the rows that it has more."""
        return Run(
            n_rows=self.n_rows - smaller.n_rows,
            seconds=self.seconds - smaller.seconds,
            cpu_s=self.cpu_s - smaller.cpu_s,
        )


def decode_rows(job: tuple[str, Path, Sequence[Frame]]) -> float:
    """Decode all files of some frames in this process: CPU seconds."""
    name, folder, frames = job
    decode = DECODERS[name]
    began = time.process_time()
    for frame in frames:
        for field, path in frame.items():
            decode(str(folder / path), field)
    return time.process_time() - began


def decode_all(name: str, folder: Path, frames: Sequence[Frame]) -> Run:
    """Every file, in two processes that are there already, with the decoder loaded."""
    starts = range(0, len(frames), BLOCK)
    jobs = [(name, folder, frames[first : first + BLOCK]) for first in starts]
    with _environment_of_helpers(), get_context("spawn").Pool(N_PROCESSES) as pool:
        pool.map(decode_rows, [(name, folder, frames[:1])] * (4 * N_PROCESSES), chunksize=1)
        started = time.perf_counter()
        cpu_s = sum(pool.map(decode_rows, jobs, chunksize=1))
        seconds = time.perf_counter() - started
    return Run(n_rows=len(frames), seconds=seconds, cpu_s=cpu_s)


@contextmanager
def _environment_of_helpers() -> Iterator[None]:
    """That in which a conversion's processes start: memory is kept, and BLAS takes one thread."""
    before = dict(os.environ)
    os.environ.update({**KEEP_MEMORY, "OPENBLAS_NUM_THREADS": "1"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def convert_all(folder: Path, frames: Sequence[Frame]) -> Run:
    """The whole command, for a table of these frames."""
    with tempfile.TemporaryDirectory(prefix="bench-frames-") as out:
        table = Path(out) / "frames.csv"
        write_table(table, frames)
        command = [sys.executable, "-m", "convert", "run", str(table), "--root", str(folder)]
        command += ["--out", out, "--workers", str(N_PROCESSES), "--size", str(STORED_SIZE)]
        cpu_before = _cpu_of_children()
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        return Run(n_rows=len(frames), seconds=seconds, cpu_s=_cpu_of_children() - cpu_before)


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


# ------------------------------------------------------------------------------------- the table


def measure(folder: Path, n_rows: int, n_pairs: int) -> dict[str, list[Run]]:
    """Of each method a run a round."""
    frames = frames_of(folder, n_rows)
    n_fewer = max(1, n_rows // FEWER)
    methods: dict[str, Callable[[], Run]] = {
        "convert": lambda: convert_all(folder, frames),
        "fewer": lambda: convert_all(folder, frames[:n_fewer]),
    }
    for name in installed_decoders():
        methods[name] = lambda name=name: decode_all(name, folder, frames)  # type: ignore[misc]
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for k in range(n_pairs):
        for name in list(methods) if k % 2 == 0 else list(methods)[::-1]:
            runs[name].append(methods[name]())
        print(f"round {k + 1} of {n_pairs}", file=sys.stderr)
    return runs


def table(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """A line a method, then what a conversion takes to start."""
    names = [name for name in DECODERS if name in runs]
    pairs = list(zip(runs["convert"], runs["fewer"], strict=True))
    of_methods = {name: runs[name] for name in (*names, "convert")}
    of_methods["beyond"] = [whole.beyond(fewer) for whole, fewer in pairs]
    lines = [
        f"{'method':<12} {'rows/s':>7}  {'95 %':<11} {'CPU ms':>7}  times as long as {names[0]}"
    ]
    lines += [_line(name, each, runs[names[0]]) for name, each in of_methods.items()]
    starts = [fewer.seconds - fewer.n_rows / whole.beyond(fewer).rate for whole, fewer in pairs]
    return [*lines, f"start of a conversion: {_shown(median_interval(starts), 2)} s"]


def _line(name: str, runs: Sequence[Run], first: Sequence[Run]) -> str:
    rate = median_interval([run.rate for run in runs])
    cpu_ms = np.median([run.cpu_s / run.n_rows * 1e3 for run in runs])
    ratio = median_interval([one.rate / run.rate for one, run in zip(first, runs, strict=True)])
    interval = f"{rate.low:.0f}-{rate.high:.0f}"
    return f"{name:<12} {rate.median:>7.0f}  {interval:<11} {cpu_ms:>7.2f}  {_shown(ratio, 2)}"


def _shown(found: Interval, digits: int) -> str:
    return f"{found.median:.{digits}f} ({found.low:.{digits}f}-{found.high:.{digits}f})"


def report(args: argparse.Namespace) -> None:
    """Every method in turn, then the table."""
    from convert.sources.pictures import decoder_name

    if args.folder is not None:
        runs = measure(args.folder.absolute(), args.rows, args.pairs)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-frames-") as temporary:
            folder = Path(temporary) / "made_up"
            write_frames(folder, args.files)
            runs = measure(folder, args.rows, args.pairs)
    print(f"decoders: {decoder_name()}; {N_PROCESSES} processes, {args.rows} rows")
    print("\n".join(table(runs)))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = make_parser("frames", __doc__)
    folder_help = "a directory with rgb/ and depth/ (default: made-up rooms)"
    parser.add_argument("folder", type=as_path, nargs="?", metavar="DIR", help=folder_help)
    add_number(parser, "--pairs", 9, "rounds of every method")
    add_number(parser, "--rows", 2400, "lines of the table")
    add_number(parser, "--files", 300, "made-up frames")
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
