"""Memory by number of workers, of arrays in RAM and of shards.

    python -m bench.memory DIR [--mat X.mat] [--png FILE]

Arrays in RAM is what people write first: images and depths of the .mat as arrays at 640x480, each
row resized when it is asked for, torch's DataLoader. Every line is a process of its own in a
memory cgroup of 12.7 GB (what a free Colab has), and shards again in 1 GB. Read while everything
is alive after the last batch: private is memory only one process has written to (dirty USS, summed
over the tree), PSS adds what is shared, counted once; page cache is mapped pages of the shards'
files, which the kernel drops when it needs to.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.cgroup import memory_group
from bench.command import SET, exit_status, make_parser
from bench.in_memory import in_memory_loader, save_arrays
from bench.memory_lines import IN_RAM, SHARDS, Line, Measured
from loader.loader import Loader
from loader.memory import PROC, sizes_in, tree_memory, tree_of
from shards.dataset import resolve_set
from shards.flags import Parser, as_path
from train.data import ShardDataset
from train.order import Batches

COLAB_BYTES = 12_700_000_000
SMALL_BYTES = 1_000_000_000
TIMEOUT_S = 240
BATCH = 128

WORKERS = (0, 1, 2, 4, 8, 16)
FORKED = [("fork", n) for n in WORKERS]
RUNS_OF_SHARDS = [*FORKED, *((method, n) for method in ("forkserver", "spawn") for n in (4, 16))]
RUNS_IN_RAM = [*FORKED, *((method, n) for method in ("forkserver", "spawn") for n in (1, 2, 4))]

WIDTHS = {"private": 8, "PSS": 8, "page cache": 10, "samples/s": 10, "epoch s": 8}


def measure(loader: Any) -> Measured:
    """Two epochs: the second one's time, and the tree's memory after it, workers still alive."""
    for _ in range(2):
        started = time.perf_counter()
        n_rows = 0
        for batch in loader:
            n_rows += len(batch[-1])
    epoch_s = time.perf_counter() - started

    tree = [sizes_in(PROC / str(pid) / "smaps_rollup") for pid in tree_of(os.getpid())]
    held = tree_memory()
    return Measured(
        rows_per_s=n_rows / epoch_s,
        epoch_s=epoch_s,
        private_bytes=sum(sizes.get("Private_Dirty", 0) for sizes in tree),
        pss_bytes=held.pss_anon,
        page_cache_bytes=held.page_cache,
    )


def measure_here(what: str, source: str, method: str, n_workers: int) -> Measured:
    """In a process that nothing else has run in. `source`: a set, or the folder of the arrays."""
    if what == IN_RAM:
        torch.set_num_threads(1)
        return measure(in_memory_loader(Path(source), BATCH, n_workers, method))
    dataset = ShardDataset(source, split="all")
    return measure(Loader(dataset, Batches(len(dataset), BATCH, 0), n_workers, method))


def run_limited(line: Line, source: str) -> Line:
    """The line, with what a process of its own measured within the limit, or how that ended."""
    one = ["--one", line.what, line.method, line.n_workers]
    command = [sys.executable, "-m", "bench.memory", source, *one]
    with memory_group(line.limit_bytes) as group:
        try:
            done = group.run(command, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return replace(line, outcome=f"no end in {TIMEOUT_S} s")
        if group.oom_kills():
            return replace(line, outcome="no: killed")

    if done.returncode:
        last_words = done.stderr.strip().splitlines()[-1]
        return replace(line, outcome=f"no: status {done.returncode}, {last_words}")
    return replace(line, measured=Measured(**json.loads(done.stdout)))


def lines_of(path: str, mat: Path | None) -> Iterator[Line]:
    """Every line of the table, measured when it is asked for."""
    for method, n_workers in RUNS_OF_SHARDS:
        line = Line(what=SHARDS, limit_bytes=COLAB_BYTES, method=method, n_workers=n_workers)
        yield run_limited(line, path)
    for method, n_workers in FORKED:
        line = Line(what=SHARDS, limit_bytes=SMALL_BYTES, method=method, n_workers=n_workers)
        yield run_limited(line, path)
    if mat:
        yield from _lines_in_ram(mat)


def _lines_in_ram(mat: Path) -> Iterator[Line]:
    """Those of arrays in RAM.

    Where a number of workers did not end well the larger ones are left out: they need more still.
    """
    beside_it = mat.parent if os.access(mat.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=beside_it) as arrays:
        save_arrays(mat, Path(arrays))
        ended: set[str] = set()
        for method, n_workers in RUNS_IN_RAM:
            if method in ended:
                continue
            line = Line(what=IN_RAM, limit_bytes=COLAB_BYTES, method=method, n_workers=n_workers)
            line = run_limited(line, arrays)
            if line.measured is None:
                ended.add(method)
            yield line


def head() -> str:
    """The first line of the table."""
    names = " ".join(f"{name:>{width}}" for name, width in WIDTHS.items())
    return f"{'':13} {'limit':>7} {'start':11} workers {names}  safe?"


def as_text(line: Line) -> str:
    """A line of the table."""
    limit = f"{line.limit_bytes / 1e9:.1f} GB"
    start = f"{line.what:13} {limit:>7} {line.method:11} {line.n_workers:>7}"
    cells = [""] * len(WIDTHS)
    if line.measured:
        cells = [
            f"{line.measured.private_bytes / 2**20:.0f}",
            f"{line.measured.pss_bytes / 2**20:.0f}",
            f"{line.measured.page_cache_bytes / 2**20:.0f}",
            f"{line.measured.rows_per_s:,.0f}",
            f"{line.measured.epoch_s:.2f}",
        ]
    widths = WIDTHS.values()
    row = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{start} {row}  {line.outcome}"


def report(args: argparse.Namespace) -> None:
    """The table, line by line as it is measured, and the picture of it."""
    if args.one:
        what, method, n_workers = args.one
        measured = measure_here(what, args.data, method, int(n_workers))
        print(json.dumps(asdict(measured)))
        return

    path = resolve_set(args.data)
    print(f"MiB of the process tree, {path.name} in batches of {BATCH}, two epochs")
    print(head(), flush=True)
    lines = []
    for line in lines_of(str(path), args.mat):
        print(as_text(line), flush=True)
        lines.append(line)
    if args.png:
        from bench.memory_plot import memory_png

        args.png.write_bytes(memory_png(lines))


def make_flags() -> Parser:
    """Those of the command line; one is for the processes that it starts."""
    parser = make_parser("memory", __doc__)
    parser.add_argument("data", type=as_path, metavar="SET", help=SET)
    mat_help = "the original file, for arrays in RAM (default: without that script)"
    parser.add_argument("--mat", type=as_path, metavar="X.mat", help=mat_help)
    png_help = "draw the table there (default: text alone)"
    parser.add_argument("--png", type=as_path, metavar="FILE.png", help=png_help)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
