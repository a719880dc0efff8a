"""How fast batches arrive, against the limit that copying memory sets: python -m bench.loader DIR [--pairs 15]

Work: one epoch over every row, shuffled, batches of 128, as stored (uint8 rgb, int16 depth, int64 label), delivered to
this process as torch tensors, files in the page cache. Each way is run in turn with the limit, so that a slow moment of
the machine meets both; the figure is the median of the pairs' ratios with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.memory import NoteRows, load_whole
from loader.loader import Loader
from shards.format import UserError, open_set, resolve_set
from train.data import ShardDataset
from train.order import Batches

BATCH = 128
STEP_S = 0.01
Epoch = Callable[[], int]


class PerSample(Dataset[Any]):
    """What people write: a memory map a field, one row an item, torch's default collate."""

    def __init__(self, path: str) -> None:
        self.path, self.maps = path, None
        self.n_rows = open_set(path).n_rows

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, i: int) -> Any:
        if self.maps is None:
            found = open_set(self.path)
            self.step = found.manifest["settings"]["rows_per_shard"]
            self.maps = [found.shards("rgb"), found.shards("depth")]
            self.labels = found.column("scene_type").astype(np.int64)
        rgb, depth = (shards[i // self.step][i % self.step] for shards in self.maps)
        return torch.from_numpy(rgb.copy()), torch.from_numpy(depth.copy().view(np.int16))[None], self.labels[i]


def memcpy_limit(
    dataset: ShardDataset, batches: list[np.ndarray], library: Any = ctypes.PyDLL, one_row: bool = False
) -> Epoch:
    """The rows of an epoch copied one by one by C's memcpy into one reused buffer; addresses are worked out before."""
    found = open_set(dataset.path)
    fields = [[np.asarray(shard) for shard in found.shards(field)] for field in dataset.fields]
    step, jobs = len(fields[0][0]), []
    for indices in batches:
        offset = 0
        for shards in fields:
            n_bytes = shards[0][0].nbytes
            for row in dataset.rows_of(indices).tolist():
                jobs.append((offset, shards[row // step].ctypes.data + (row % step) * n_bytes, n_bytes))
                offset += n_bytes
    buffer = np.zeros(max(offset + n for offset, _, n in jobs), np.uint8)
    copies = [(buffer.ctypes.data + (0 if one_row else offset), source, n) for offset, source, n in jobs]
    memmove, n_rows = library(None).memmove, sum(map(len, batches))
    memmove.argtypes, memmove.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None

    def epoch() -> int:
        for copy in copies:
            memmove(*copy)
        return n_rows if buffer.size and fields else 0  # the addresses above live as long as these do

    return epoch


def epochs_of(loader: Any) -> Epoch:
    """One epoch of the loader; the next call is the next epoch."""

    def epoch() -> int:
        n_rows = 0
        for batch in loader:
            n_rows += len(batch[-1])
        return n_rows

    return epoch


def per_sample(path: str, workers: int) -> DataLoader[Any]:
    return DataLoader(
        PerSample(path), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )


def note(arrays: Path | None, workers: int) -> DataLoader[Any]:
    """Arrays in RAM at 640x480, each row resized when it is asked for."""
    assert arrays
    rows = NoteRows(arrays)
    return DataLoader(rows, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def ways(path: str, arrays: Path | None, spawn_too: bool = True) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, how to make its loader), in the order of the table."""

    def ours(workers: int = 0, method: str | None = None, prefetch: bool = True, path: str = path) -> Loader:
        dataset = ShardDataset(path, split="all")
        return Loader(dataset, Batches(len(dataset), BATCH, 0), workers, method, prefetch=prefetch)

    yield "ours, no worker, gathered when asked for", lambda: ours(prefetch=False)
    yield "ours, no worker, one thread ahead", ours
    store = Path(f"{path}.zarr")  # python -m convert run DIR --out ROOT --format zarr
    if store.is_dir() and set((open_set(store).codecs or {}).values()) == {"none"}:
        yield "... of the mapped Zarr store, when asked for", lambda: ours(prefetch=False, path=str(store))
        yield "... of the mapped Zarr store, a thread ahead", lambda: ours(path=str(store))
    for workers in (1, 2, 4, 8):
        yield f"ours, {workers} workers (fork)", lambda workers=workers: ours(workers, "fork")
    if spawn_too:
        yield "ours, 2 workers (spawn)", lambda: ours(2, "spawn")
    for workers in (0, 1, 2, 4, 8):
        yield f"DataLoader, a row an item, {workers} workers", lambda workers=workers: per_sample(path, workers)
    yield (
        "DataLoader(ShardDataset), 0 workers",
        lambda: DataLoader(ShardDataset(path, split="all"), BATCH),
    )
    for workers in (0, 2) if arrays else ():
        yield f"the note's method, {workers} workers", lambda workers=workers: note(arrays, workers)


def rate(epoch: Epoch) -> tuple[float, float]:
    """Samples a second, and CPU milliseconds of this process, over the second of two epochs without a pause.

    Batches made before the clock starts must not count: after a pause a loader that runs ahead has 3 of 11 ready.
    """
    epoch()
    cpu, started = time.process_time(), time.perf_counter()
    n_rows = epoch()
    return n_rows / (time.perf_counter() - started), (time.process_time() - cpu) * 1e3


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


def sleeping() -> None:
    time.sleep(STEP_S)


def holding_the_gil() -> None:
    end = time.perf_counter() + STEP_S
    while time.perf_counter() < end:
        pass


def wait_ms(loader: Any, step: Callable[[], None], n_steps: int) -> float:
    """Median wait for the next batch, the first two of an iteration apart."""
    waits: list[float] = []
    while len(waits) < n_steps:
        batches, mine = iter(loader), []
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            mine.append(time.perf_counter() - started)
            step()
        waits += mine[2:] or mine
    return float(np.median(waits)) * 1e3


def report_speed(path: str, arrays: Path | None, n_pairs: int, limit: Epoch) -> None:
    print(f"{'':44}{'samples/s':>10} {'of the limit':>13} {'(95 %)':>12} {'CPU ms':>7}")
    for name, make in ways(path, arrays):
        epoch = epochs_of(make())
        epoch(), limit()
        count = n_pairs if name.startswith(("ours", "...")) else min(n_pairs, 1 if "note" in name else 5)
        pairs = [(*rate(epoch), rate(limit)[0]) for _ in range(count)]
        del epoch  # and its workers
        middle, low, high = interval([ours / most for ours, _, most in pairs])
        speed, cpu, _ = np.median(pairs, axis=0)
        print(f"{name:44}{speed:10,.0f} {middle:13.2f} {f'{low:.2f}-{high:.2f}':>12} {cpu:7.0f}", flush=True)
    print(f"{'the limit: C memcpy of the rows, one thread':44}{np.median([rate(limit)[0] for _ in range(9)]):10,.0f}")


def report_waits(path: str, n_steps: int) -> None:
    print(f"\n{'ms waited for a batch beside a step of 10 ms':44}{'sleeping':>10} {'holding the GIL':>16}")
    for name, make in ways(path, None, spawn_too=False):
        loader = make()
        sleep, gil = (wait_ms(loader, step, n_steps) for step in (sleeping, holding_the_gil))
        print(f"{name:44}{sleep:10.2f} {gil:16.2f}", flush=True)
        del loader


FIRST = """
import sys, time
from loader.loader import Loader
from train.data import ShardDataset
from train.order import Batches
started = time.perf_counter()
dataset = ShardDataset(sys.argv[1], split="all")
next(iter(Loader(dataset, Batches(len(dataset), 128, 0), int(sys.argv[2]), "fork")))
print(time.perf_counter() - started)
"""


def report_first_batch(path: str, n_runs: int) -> None:
    """Each time in a fresh process, from opening the set to the first batch; imports are not counted."""
    print(f"\n{'seconds from opening the set to the first batch':44}")
    for workers, name in ((0, "ours, no worker, one thread ahead"), (2, "ours, 2 workers (fork)")):
        command = [sys.executable, "-c", FIRST, path, str(workers)]
        seconds = [float(subprocess.run(command, capture_output=True, text=True).stdout) for _ in range(n_runs)]
        print("{:44}{:10.3f} ({:.3f}-{:.3f})".format(name, *interval(seconds)), flush=True)


def control_variants(dataset: ShardDataset, batches: list[np.ndarray]) -> None:
    """Why the limit is copied as it is: what else a C copy of the same rows could be measured as."""
    print(f"\n{'C memcpy of the same rows, one thread':44}{'rows/s':>10}")
    for name, how in (
        ("into one batch buffer, GIL kept (the limit)", {}),
        ("the same, GIL released a row (ctypes.CDLL)", {"library": ctypes.CDLL}),
        ("into one row's place: nothing is delivered", {"one_row": True}),
    ):
        epoch = memcpy_limit(dataset, batches, **how)  # type: ignore[arg-type]
        epoch()
        print(f"{name:44}{np.median([rate(epoch)[0] for _ in range(7)]):10,.0f}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.loader", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", metavar="DIR|ROOT")
    parser.add_argument("--mat", type=Path, help="the original file, for the note's method (3.1 GB in memory)")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60, help="steps of 10 ms for each wait")
    args = parser.parse_args(argv)
    try:
        path = str(resolve_set(args.data))
        dataset = ShardDataset(path, split="all")
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", "This DataLoader will create")
    torch.set_num_threads(1)  # with more, torch.stack in the DataLoader without workers can be 100 times slower here
    limit = memcpy_limit(dataset, Batches(len(dataset), BATCH, 0)(0))
    limit()
    print(f"{path}: {len(dataset)} rows of {dataset.size}x{dataset.size}, batches of {BATCH}, {args.pairs} pairs\n")
    with tempfile.TemporaryDirectory(dir=args.mat and args.mat.parent) as folder:
        if args.mat:
            load_whole(args.mat, Path(folder))
        report_speed(path, Path(folder) if args.mat else None, args.pairs, limit)
    report_waits(path, args.steps)
    report_first_batch(path, 7)
    control_variants(dataset, Batches(len(dataset), BATCH, 0)(0))
    torch.set_num_threads(2)
    epoch = epochs_of(Loader(dataset, Batches(len(dataset), BATCH, 0), prefetch=False))
    pairs = [(rate(epoch)[0], rate(limit)[0]) for _ in range(args.pairs)]
    middle, low, high = interval([ours / most for ours, most in pairs])
    print(f"ours, gathered when asked for, 2 torch threads: {middle:.2f} ({low:.2f}-{high:.2f}) of the limit")
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB (RSS)")
    print(
        "CPU ms: of this process an epoch, workers not included. A wait is the median over steps, the first two apart."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
