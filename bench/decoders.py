"""CPU time of picture decoders, and of what a conversion makes of them.

    python -m bench.decoders FILE ... [--rounds 40]

Decoders that are not installed are left out. They take turns, each in one thread; figures are
medians of milliseconds. Memory that is freed is kept, as helpers of a conversion keep it. `off` is
how far a decoder's samples are from Pillow's at most.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from bench.command import exit_status, make_parser
from convert.decode import KEEP_MEMORY
from convert.sources.pictures import decode

Decoder = Callable[[bytes], np.ndarray]
JPEG = b"\xff\xd8"


def _by_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(BytesIO(data)))


def _by_imagecodecs(data: bytes) -> np.ndarray:
    import imagecodecs

    codec = imagecodecs.jpeg8_decode if data.startswith(JPEG) else imagecodecs.png_decode
    return codec(data)


def _by_opencv(data: bytes) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return found[:, :, ::-1] if found.ndim == 3 else found


def _by_simplejpeg(data: bytes) -> np.ndarray:
    import simplejpeg

    return simplejpeg.decode_jpeg(data)


DECODERS: dict[str, Decoder] = {
    "pillow": _by_pillow,
    "opencv": _by_opencv,
    "simplejpeg": _by_simplejpeg,
    "imagecodecs": _by_imagecodecs,
}


def that_work(data: bytes) -> dict[str, Decoder]:
    """Those that are installed and read this file, and ours."""
    found: dict[str, Decoder] = {}
    for name, decoder in DECODERS.items():
        if name == "simplejpeg" and not data.startswith(JPEG):
            continue
        try:
            decoder(data)
        except ImportError:
            continue
        found[name] = decoder
    kind = "colour" if _by_pillow(data).ndim == 3 else "depth"
    return {**found, "ours": lambda each: decode(each, kind).pixels}


def median_ms(data: bytes, decoders: dict[str, Decoder], rounds: int) -> dict[str, float]:
    """CPU time of each; who begins changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    names = list(decoders)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            began = time.process_time()
            decoders[name](data)
            seconds[name].append(time.process_time() - began)
    return {name: float(np.median(each)) * 1e3 for name, each in seconds.items()}


def _off(samples: np.ndarray, reference: np.ndarray) -> int:
    return int(np.abs(samples.astype(np.int64) - reference.astype(np.int64)).max())


def report(args: argparse.Namespace) -> None:
    """A line a file."""
    for path in args.files:
        data = path.read_bytes()
        decoders = that_work(data)
        reference = _by_pillow(data)
        medians = median_ms(data, decoders, args.rounds)
        cells = [f"{path.name} {reference.shape[1]}x{reference.shape[0]}"]
        for name, decoder in decoders.items():
            cells.append(f"{name} {medians[name]:.2f} (off {_off(decoder(data), reference)})")
        print("  ".join(cells), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = make_parser("decoders", __doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    if not KEEP_MEMORY.items() <= os.environ.items():  # glibc reads them as a process begins
        command = [sys.executable, "-m", "bench.decoders", *(argv or sys.argv[1:])]
        return subprocess.run(command, env={**os.environ, **KEEP_MEMORY}).returncode
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
