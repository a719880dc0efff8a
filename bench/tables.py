"""How long a table of a million frames takes to read, and how much memory.

    python -m bench.tables DIR [--rows 1000000]

Work: rgb, depth, split, scene and scene_type, paths of 60 bytes, written to DIR in each form (a
list has the first two alone), each read in a process of its own. Seconds are of `read_table`;
memory is the peak of that process above what it held with numpy and pyarrow imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench.command import exit_status, make_parser

COLUMNS = ("rgb", "depth", "split", "scene", "scene_type")
TYPES = ("kitchen", "bathroom", "office")
SUFFIXES = ("csv", "tsv", "txt", "jsonl", "parquet")
ROWS_A_SCENE = 700

# Run with the path of a table: prints seconds and bytes.
READ = """
import sys, time
from pathlib import Path
import numpy, pyarrow
from convert.sources.tables import read_table

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

before = peak_bytes()
started = time.perf_counter()
table = read_table(Path(sys.argv[1]), fields={})
print(time.perf_counter() - started, peak_bytes() - before)
"""


def lines(n_rows: int) -> Iterator[tuple[str, ...]]:
    """The cells of each."""
    for row in range(n_rows):
        scene = row // ROWS_A_SCENE
        folder = f"scene_{scene:05d}/sequence_{row % 7:04d}"
        rgb = f"{folder}/color/frame_{row:012d}_color.jpg"
        depth = f"{folder}/depth/frame_{row:012d}_depth.png"
        split = "train" if row % 10 else "test"
        yield rgb, depth, split, f"scene_{scene:05d}", TYPES[scene % len(TYPES)]


def write_tables(folder: Path, n_rows: int) -> None:
    """The same lines as table.csv, .tsv, .txt, .jsonl and .parquet."""
    from pyarrow import csv, parquet

    with ExitStack() as files:
        of = {
            suffix: files.enter_context(open(folder / f"table.{suffix}", "w"))
            for suffix in SUFFIXES
            if suffix != "parquet"
        }
        of["csv"].write(",".join(COLUMNS) + "\n")
        of["tsv"].write("\t".join(COLUMNS) + "\n")
        for cells in lines(n_rows):
            of["csv"].write(",".join(cells) + "\n")
            of["tsv"].write("\t".join(cells) + "\n")
            of["txt"].write(" ".join(cells[:2]) + "\n")
            of["jsonl"].write(json.dumps(dict(zip(COLUMNS, cells, strict=True))) + "\n")
    parquet.write_table(csv.read_csv(folder / "table.csv"), folder / "table.parquet")


def main(folder: Path, n_rows: int) -> None:
    """Write the tables, read each, print a line for it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, n_rows)
    print(f"{n_rows} lines")
    for suffix in SUFFIXES:
        path = folder / f"table.{suffix}"
        command = [sys.executable, "-c", READ, str(path)]
        words = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        seconds = float(words[0])
        mebibytes = int(words[1]) / 2**20
        size_mb = path.stat().st_size / 1e6
        print(f"  {suffix:8} {size_mb:6.0f} MB  {seconds:6.2f} s  {mebibytes:6.0f} MiB")


def _arguments() -> argparse.Namespace:
    parser = make_parser("tables", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the tables are written")
    parser.add_argument("--rows", type=int, default=1_000_000, help="lines (1000000)")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _arguments()
    sys.exit(exit_status(lambda: main(arguments.folder, arguments.rows)))
