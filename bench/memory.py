"""Memory by number of workers, the note's method and ours: python -m bench.memory DIR [--mat X.mat] [--png FILE]

The note's method: images and depths of the .mat as arrays in RAM at 640x480, each row resized when it is asked for,
torch's DataLoader. Every line is a process of its own in a memory cgroup of 12.7 GB (what a free Colab has), and ours
again in 1 GB. Read while everything is alive after the last batch: private is memory only one process has written to
(dirty USS, summed over the tree), PSS adds what is shared, counted once; page cache is mapped pages of the shards'
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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from bench.cgroup import NoGroup, memory_group
from loader.loader import Loader
from loader.memory import PROC, sizes_in, tree_memory, tree_of
from shards.format import UserError, resolve_set
from train.data import ShardDataset
from train.order import Batches

COLAB, SMALL = 12_700_000_000, 1_000_000_000
BATCH, SIZE = 128, 224
WORKERS = (0, 1, 2, 4, 8, 16)
OURS = [("fork", n) for n in WORKERS] + [(m, n) for m in ("forkserver", "spawn") for n in (4, 16)]
NOTE = [("fork", n) for n in WORKERS] + [(m, n) for m in ("forkserver", "spawn") for n in (1, 2, 4)]


class NoteRows(Dataset[Any]):
    """Arrays in RAM at 640x480, a row resized when it is asked for."""

    def __init__(self, arrays: Path) -> None:
        self.images, self.depths = np.load(arrays / "images.npy"), np.load(arrays / "depths.npy")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        rgb = torch.from_numpy(self.images[i])[None].float()
        depth = torch.from_numpy(self.depths[i])[None, None]
        rgb = F.interpolate(rgb, (SIZE, SIZE), mode="bilinear", antialias=True)[0]
        return rgb, F.interpolate(depth, (SIZE, SIZE), mode="nearest-exact")[0], i % 13


def load_whole(mat: Path, out: Path) -> None:
    """The two arrays as .npy, so that not every process of the note's method inflates the .mat again."""
    import h5py

    with h5py.File(mat) as file:
        for name in ("images", "depths"):
            np.save(out / f"{name}.npy", file[name][()].swapaxes(-1, -2))


def measure(loader: Any) -> dict[str, float]:
    """Two epochs; the second one's time, and the memory of the tree after it, workers still alive."""
    for _ in range(2):
        started, n_rows = time.perf_counter(), 0
        for batch in loader:
            n_rows += len(batch[-1])
    seconds = time.perf_counter() - started
    private = sum(sizes_in(PROC / str(pid) / "smaps_rollup").get("Private_Dirty", 0) for pid in tree_of(os.getpid()))
    held = tree_memory()
    return {
        "rate": n_rows / seconds,
        "seconds": seconds,
        "private": private,
        "pss": held.pss_anon,
        "page_cache": held.page_cache,
    }


def one(what: str, source: str, method: str, workers: int) -> dict[str, float]:
    """Runs in a process of its own."""
    if what == "note":
        torch.set_num_threads(1)
        context = method if workers else None
        rows, keep = NoteRows(Path(source)), workers > 0
        return measure(
            DataLoader(
                rows, BATCH, shuffle=True, num_workers=workers, multiprocessing_context=context, persistent_workers=keep
            )
        )
    dataset = ShardDataset(source, split="all")
    return measure(Loader(dataset, Batches(len(dataset), BATCH, 0), workers, method))


def run_limited(limit: int, what: str, source: str, method: str, workers: int) -> dict[str, Any]:
    """One line of the table: what the process measured, or how it ended."""
    command = [sys.executable, "-m", "bench.memory", source, "--one", what, method, workers]
    line: dict[str, Any] = {"what": what, "limit": limit, "method": method, "workers": workers}
    with memory_group(limit) as group:
        try:
            done = group.run(command, timeout=240)
        except subprocess.TimeoutExpired:
            return line | {"safe": "no end in 240 s"}
        if group.oom_kills():
            return line | {"safe": "no: killed"}
        if done.returncode:
            return line | {"safe": f"no: status {done.returncode}, {done.stderr.strip().splitlines()[-1]}"}
    return line | {"safe": "yes"} | json.loads(done.stdout)


COLUMNS = {"private": 8, "PSS": 8, "page cache": 10, "samples/s": 10, "epoch s": 8}
HEAD = f"{'':5} {'limit':>7} {'start':11} workers " + " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def as_text(line: dict[str, Any]) -> str:
    limit = f"{line['limit'] / 1e9:.1f} GB"
    start = f"{line['what']:5} {limit:>7} {line['method']:11} {line['workers']:>7}"
    if "pss" not in line:
        return f"{start} {'':{sum(COLUMNS.values()) + len(COLUMNS) - 1}}  {line['safe']}"
    mib = [f"{line[key] / 2**20:.0f}" for key in ("private", "pss", "page_cache")]
    values = [*mib, f"{line['rate']:,.0f}", f"{line['seconds']:.2f}"]
    row = " ".join(f"{value:>{width}}" for value, width in zip(values, COLUMNS.values(), strict=True))
    return f"{start} {row}  {line['safe']}"


def lines_of(path: str, mat: str | None) -> Iterator[dict[str, Any]]:
    for method, workers in OURS:
        yield run_limited(COLAB, "ours", path, method, workers)
    for workers in WORKERS:
        yield run_limited(SMALL, "ours", path, "fork", workers)
    if mat:
        with tempfile.TemporaryDirectory(
            dir=Path(mat).parent if os.access(Path(mat).parent, os.W_OK) else None
        ) as arrays:
            load_whole(Path(mat), Path(arrays))
            killed = set()
            for method, workers in NOTE:
                if method not in killed:  # more workers would need more still
                    line = run_limited(COLAB, "note", arrays, method, workers)
                    killed |= set() if "pss" in line else {method}
                    yield line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.memory", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", metavar="DIR|ROOT")
    parser.add_argument("--mat", help="the original file, for the note's method")
    parser.add_argument("--png", help="draw the table there")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(args.one[0], args.data, args.one[1], int(args.one[2]))))
        return 0
    try:
        path = str(resolve_set(args.data))
        print(f"MiB of the process tree, 1449 rows in batches of {BATCH}, two epochs\n{HEAD}  safe?", flush=True)
        lines = []
        for line in lines_of(path, args.mat):
            print(as_text(line), flush=True)
            lines.append(line)
    except (UserError, NoGroup) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if args.png:
        from bench.memory_plot import memory_png

        Path(args.png).write_bytes(memory_png(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
