"""Rows a second of a conversion of frames, against bare decoding of the same files.

    python -m bench.frames [DIR] [--pairs 9] [--rows 300]

convert      `python -m convert run`, two processes, 224x224 .npy shards: its own seconds
convert all  the same with the start of Python and its imports
decode       read each file and decode it by the decoder that the conversion uses, two processes;
             nothing else: no resizing, no writing
pillow       the same by Pillow; others: by OpenCV, where it is installed

A round is every method once, in a fresh process; rounds alternate their order. Printed are medians
of the rounds with 95 % bootstrap intervals, and ratios of methods within a round. Files are read
from the page cache.

DIR has rgb/ and depth/. Without it, made-up rooms of 640x480 with a camera's noise, as JPEG and
16-bit PNG, are written to a temporary folder first.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import add_number, exit_status, make_parser
from bench.figures import median_interval
from convert.sample_frames import SampleFrames, jpeg, png
from shards.errors import WrongSource
from shards.flags import as_path

N_PROCESSES = 2
SIZE_WH = (640, 480)
N_DRAWN = 24  # rooms; the other rows are these with other noise
NOISE = 4.0  # grey levels
NOISE_MM = 6.0
BLOCK = 16  # files that a process takes at once


# ------------------------------------------------------------------------------------- the frames


def write_frames(folder: Path, n_rows: int) -> None:
    """rgb/N.jpg and depth/N.png of made-up rooms, each with noise of its own."""
    sample = SampleFrames(seed=0, sizes_wh=[SIZE_WH])
    rooms = [sample.pictures("kitchen_0001", number, SIZE_WH) for number in range(N_DRAWN)]
    for name in ("rgb", "depth"):
        (folder / name).mkdir(parents=True)
    for row in range(n_rows):
        room = rooms[row % N_DRAWN]
        rng = np.random.default_rng(row)
        noise = rng.normal(0, NOISE, room["rgb"].shape)
        rgb = np.clip(room["rgb"] + noise, 0, 255).astype(np.uint8)
        noise_mm = rng.normal(0, NOISE_MM, room["depth"].shape)
        is_measured = room["depth"] > 0
        depth = np.where(is_measured, room["depth"] + noise_mm, 0).astype(np.uint16)
        (folder / "rgb" / f"{row:05d}.jpg").write_bytes(jpeg(rgb))
        (folder / "depth" / f"{row:05d}.png").write_bytes(png(depth))


def frames_of(folder: Path) -> list[dict[str, str]]:
    """Of each row the path of each field's file."""
    from convert.sources.layouts import list_frames

    table = list_frames(folder, {}).table
    return [
        {field: str(folder / paths[row]) for field, paths in table.paths.items() if paths[row]}
        for row in range(table.n_rows)
    ]


# ------------------------------------------------------------------------------------- the methods


def decode_ours(path: str, field: str) -> Any:
    """As the conversion decodes it."""
    from convert.sources.pictures import decode
    from shards.spec import KNOWN_FIELDS

    return decode(Path(path).read_bytes(), KNOWN_FIELDS[field].kind)


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


DECODERS: dict[str, Callable[[str, str], Any]] = {
    "decode": decode_ours,
    "pillow": decode_pillow,
    "opencv": decode_opencv,
}
NEEDS = {"opencv": "cv2", "pillow": "PIL"}


def decode_rows(job: tuple[str, Sequence[Mapping[str, str]]]) -> None:
    """All files of some rows, by one decoder, in this process."""
    decode = DECODERS[job[0]]
    for row in job[1]:
        for field, path in row.items():
            decode(path, field)


def decode_all(name: str, frames: Sequence[Mapping[str, str]]) -> float:
    """Seconds for every file in two processes that are there already, with the decoder loaded."""
    blocks = [(name, frames[first : first + BLOCK]) for first in range(0, len(frames), BLOCK)]
    with get_context("spawn").Pool(N_PROCESSES) as pool:
        pool.map(decode_rows, [(name, frames[:1])] * (4 * N_PROCESSES), chunksize=1)
        started = time.perf_counter()
        pool.map(decode_rows, blocks, chunksize=1)
        return time.perf_counter() - started


def convert_all(folder: Path, out: Path) -> tuple[float, float]:
    """Seconds that a conversion says it took, and seconds of its whole process."""
    command = [sys.executable, "-m", "convert", "run", str(folder), "--out", str(out)]
    command += ["--workers", str(N_PROCESSES)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole_s = time.perf_counter() - started
    said = next(line for line in done.stderr.splitlines() if " rows in " in line)
    return float(said.partition(" rows in ")[2].split()[0]), whole_s


# ------------------------------------------------------------------------------------- the table


def measure(folder: Path, n_pairs: int) -> dict[str, list[float]]:
    """Rows a second of each method, one number a round."""
    frames = frames_of(folder)
    if not frames:
        raise WrongSource(folder, "has no frames")
    names = [
        name for name in DECODERS if name not in NEEDS or importlib.util.find_spec(NEEDS[name])
    ]
    rates: dict[str, list[float]] = {name: [] for name in ("convert", "convert all", *names)}
    for k in range(n_pairs):
        methods = ["convert", *names] if k % 2 == 0 else [*names[::-1], "convert"]
        for method in methods:
            if method != "convert":
                rates[method].append(len(frames) / decode_all(method, frames))
                continue
            with tempfile.TemporaryDirectory(prefix="bench-frames-") as out:
                own_s, whole_s = convert_all(folder, Path(out))
            rates["convert"].append(len(frames) / own_s)
            rates["convert all"].append(len(frames) / whole_s)
        print(f"round {k + 1} of {n_pairs}", file=sys.stderr)
    return rates


def table(rates: Mapping[str, Sequence[float]]) -> list[str]:
    """A line a method."""
    lines = [
        f"{'method':<12} {'rows/s':>8}  {'95 %':<15}  decode's rows / its rows, round by round"
    ]
    for name, of_rounds in rates.items():
        found = median_interval(of_rounds)
        against = [one / other for one, other in zip(rates["decode"], of_rounds, strict=True)]
        ratio = median_interval(against)
        interval = f"{found.low:.0f}-{found.high:.0f}"
        shown = f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
        lines.append(f"{name:<12} {found.median:>8.0f}  {interval:<15}  {shown}")
    return lines


def report(args: argparse.Namespace) -> None:
    """Every method in turn, then the table."""
    from convert.sources.pictures import decoder_name

    if args.folder is not None:
        rates = measure(args.folder, args.pairs)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-frames-") as folder:
            write_frames(Path(folder) / "made_up", args.rows)
            rates = measure(Path(folder) / "made_up", args.pairs)
    print(f"decoders: {decoder_name()}; {N_PROCESSES} processes")
    print("\n".join(table(rates)))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = make_parser("frames", __doc__)
    folder_help = "a directory with rgb/ and depth/ (default: made-up rooms)"
    parser.add_argument("folder", type=as_path, nargs="?", metavar="DIR", help=folder_help)
    add_number(parser, "--pairs", 9, "rounds of every method")
    add_number(parser, "--rows", 300, "made-up frames")
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
