"""How fast batches arrive, against the limit that copying memory sets.

    python -m bench.loader DIR [--pairs 15]

Work: one epoch over every row, shuffled, batches of 128, as stored (uint8 rgb, int16 depth, int64
label), delivered to this process as torch tensors, files in the page cache. Each way is run in
turn with the limit, so that a slow moment of the machine meets both; the figure is the median of
the pairs' ratios with a 95 % bootstrap interval.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.command import SET, add_number, exit_status, make_parser
from bench.figures import median_interval
from bench.in_memory import in_memory_loader, save_arrays
from loader.buffers import private_memory
from loader.loader import Loader
from shards.dataset import open_set, resolve_set
from shards.errors import UserError
from shards.flags import Parser, as_path
from train.data import ShardDataset
from train.order import Batches

BATCH = 128
STEP_S = 0.01
TO_ONE_PLACE = 0  # buffers
N_FIRST_BATCHES = 7  # processes that each way of getting a first batch is tried in

Epoch = Callable[[], int]  # runs one, and returns the number of rows in it


# The limit.


def memcpy_limit(
    dataset: ShardDataset,
    batches: list[np.ndarray],
    library: Any = ctypes.PyDLL,
    n_buffers: int = 1,
) -> Epoch:
    """The rows of an epoch copied one by one by C's memcpy into one reused buffer.

    Addresses are worked out before. `library`: PyDLL keeps Python's lock meanwhile, CDLL lets it
    go a row. `n_buffers`: each batch into the next of so many; TO_ONE_PLACE: each row over the one
    before it.
    """
    shards = {field: _mapped_shards(dataset, field) for field in dataset.fields}
    copies, memory = _plan_copies(dataset, batches, shards, n_buffers)
    n_rows = sum(map(len, batches))

    memmove = library(None).memmove
    memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    memmove.restype = None

    def epoch() -> int:
        for copy in copies:
            memmove(*copy)
        return n_rows if memory and shards else 0  # the addresses live as long as these do

    return epoch


def _mapped_shards(dataset: ShardDataset, field: str) -> list[np.ndarray]:
    return [np.asarray(shard) for shard in open_set(dataset.path).shards(field)]


def _plan_copies(
    dataset: ShardDataset,
    batches: list[np.ndarray],
    shards: dict[str, list[np.ndarray]],
    n_buffers: int,
) -> tuple[list[tuple[int, int, int]], list[memoryview]]:
    """(memcpy's arguments in the order of the epoch: destination, source, bytes; the buffers).

    A batch lies in a buffer field after field, and the next one in the next buffer.
    """
    bytes_of_all = sum(of_field[0][0].nbytes for of_field in shards.values())
    batch_bytes = bytes_of_all * max(map(len, batches))
    buffers = [private_memory(batch_bytes) for _ in range(max(1, n_buffers))]
    copies: list[tuple[int, int, int]] = []
    for k, indices in enumerate(batches):
        base = np.frombuffer(buffers[k % len(buffers)], np.uint8).ctypes.data
        rows = dataset.rows_of(indices).tolist()
        offset = 0
        for of_field in shards.values():
            rows_per_shard = len(of_field[0])
            row_bytes = of_field[0][0].nbytes
            for row in rows:
                shard, place = divmod(row, rows_per_shard)
                source = of_field[shard].ctypes.data + place * row_bytes
                place_at = base if n_buffers == TO_ONE_PLACE else base + offset
                copies.append((place_at, source, row_bytes))
                offset += row_bytes
    return copies, buffers


# The ways.


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of getting batches, a line of the table."""

    name: str
    make_loader: Callable[[], Any]
    most_pairs: int | None = None  # the slow ones are run less often


class PerSample(Dataset[Any]):
    """What people write next: a memory map a field, one row an item, torch's default collate."""

    def __init__(self, path: str) -> None:
        found = open_set(path)
        self.path = path
        self.n_rows = found.n_rows
        self.rows_per_shard = found.settings.rows_per_shard
        self.maps: list[list[np.ndarray]] | None = None  # opened in each worker
        self.labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, i: int) -> Any:
        """(rgb [3, S, S], depth [1, S, S], the scene's type)."""
        if self.maps is None or self.labels is None:
            found = open_set(self.path)
            self.maps = [found.shards("rgb"), found.shards("depth")]
            self.labels = found.column("scene_type").astype(np.int64)
        shard, place = divmod(i, self.rows_per_shard)
        rgb, depth = (shards[shard][place] for shards in self.maps)
        depth_mm = torch.from_numpy(depth.copy().view(np.int16))[None]
        return torch.from_numpy(rgb.copy()), depth_mm, self.labels[i]


def our_loader(
    path: str, n_workers: int = 0, method: str | None = None, prefetch: bool = True
) -> Loader:
    """As `create_dataloaders` makes it, of the train rows."""
    dataset = ShardDataset(path, split="all")
    return Loader(dataset, Batches(len(dataset), BATCH, 0), n_workers, method, prefetch=prefetch)


def per_sample_loader(path: str, n_workers: int) -> DataLoader[Any]:
    """torch's own DataLoader, a row at a time."""
    return DataLoader(
        PerSample(path),
        BATCH,
        shuffle=True,
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
        drop_last=True,
    )


def our_ways(path: str, spawn_too: bool) -> Iterator[Way]:
    """The loader of this project: in the caller, in a thread ahead, in processes.

    Of a mapped Zarr store too, if there is one beside the set.
    """
    name = "ours, no worker, gathered when asked for"
    yield Way(name=name, make_loader=partial(our_loader, path, prefetch=False))
    yield Way(name="ours, no worker, one thread ahead", make_loader=partial(our_loader, path))

    store = Path(f"{path}.zarr")  # python -m convert run DIR --out ROOT --format zarr
    if store.is_dir() and set((open_set(store).codecs or {}).values()) == {"none"}:
        name = "... of the mapped Zarr store, when asked for"
        yield Way(name=name, make_loader=partial(our_loader, str(store), prefetch=False))
        name = "... of the mapped Zarr store, a thread ahead"
        yield Way(name=name, make_loader=partial(our_loader, str(store)))

    for n_workers in (1, 2, 4, 8):
        make_loader = partial(our_loader, path, n_workers, "fork")
        yield Way(name=f"ours, {n_workers} workers (fork)", make_loader=make_loader)
    if spawn_too:
        make_loader = partial(our_loader, path, 2, "spawn")
        yield Way(name="ours, 2 workers (spawn)", make_loader=make_loader)


def torch_ways(path: str) -> Iterator[Way]:
    """torch's DataLoader, a row an item, and over this project's dataset, which gathers batches."""
    for n_workers in (0, 1, 2, 4, 8):
        name = f"DataLoader, a row an item, {n_workers} workers"
        make_loader = partial(per_sample_loader, path, n_workers)
        yield Way(name=name, make_loader=make_loader, most_pairs=5)
    yield Way(
        name="DataLoader(ShardDataset), 0 workers",
        make_loader=lambda: DataLoader(ShardDataset(path, split="all"), BATCH),
        most_pairs=5,
    )


def in_memory_ways(arrays: Path) -> Iterator[Way]:
    """Arrays in RAM at 640x480, each row resized when it is asked for."""
    for n_workers in (0, 2):
        make_loader = partial(in_memory_loader, arrays, BATCH, n_workers)
        name = f"arrays in RAM, {n_workers} workers"
        yield Way(name=name, make_loader=make_loader, most_pairs=1)


# Measuring.


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one epoch."""

    rows_per_s: float
    cpu_ms: float  # of this process, workers not included


def speed_of(epoch: Epoch) -> Speed:
    """Of the second of two epochs without a pause.

    Batches made before the clock starts must not count: after a pause a loader that runs ahead has
    3 of 11 ready.
    """
    epoch()
    cpu = time.process_time()
    started = time.perf_counter()
    n_rows = epoch()
    wall_s = time.perf_counter() - started
    cpu_s = time.process_time() - cpu
    return Speed(rows_per_s=n_rows / wall_s, cpu_ms=cpu_s * 1e3)


def epochs_of(loader: Any) -> Epoch:
    """One epoch of the loader; the next call is the next epoch."""

    def epoch() -> int:
        n_rows = 0
        for batch in loader:
            n_rows += len(batch[-1])
        return n_rows

    return epoch


def sleep_a_step() -> None:
    """A training step that leaves the cores alone."""
    time.sleep(STEP_S)


def hold_the_lock_a_step() -> None:
    """Python's, as a training step does between its kernels."""
    end = time.perf_counter() + STEP_S
    while time.perf_counter() < end:
        pass


def median_wait_ms(loader: Any, step: Callable[[], None], n_steps: int) -> float:
    """For the next batch, beside that step; the first two of an iteration apart."""
    waits_s: list[float] = []
    while len(waits_s) < n_steps:
        of_epoch = _waits_of_epoch(loader, step)
        waits_s += of_epoch[2:] or of_epoch
    return float(np.median(waits_s)) * 1e3


def _waits_of_epoch(loader: Any, step: Callable[[], None]) -> list[float]:
    batches = iter(loader)
    waits_s: list[float] = []
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return waits_s
        waits_s.append(time.perf_counter() - started)
        step()


# The tables.


def report_speed(ways: Sequence[Way], n_pairs: int, limit: Epoch) -> None:
    """Each way's speed, and its share of the limit, measured right after it."""
    print(f"{'':44}{'samples/s':>10} {'of the limit':>13} {'(95 %)':>12} {'CPU ms':>7}")
    for way in ways:
        epoch = epochs_of(way.make_loader())
        epoch()
        limit()
        n_here = n_pairs if way.most_pairs is None else min(n_pairs, way.most_pairs)
        speeds = []
        shares = []
        for _ in range(n_here):
            speeds.append(speed_of(epoch))
            shares.append(speeds[-1].rows_per_s / speed_of(limit).rows_per_s)
        del epoch  # and its workers

        share = median_interval(shares)
        bounds = f"{share.low:.2f}-{share.high:.2f}"
        rows_per_s = np.median([speed.rows_per_s for speed in speeds])
        cpu_ms = np.median([speed.cpu_ms for speed in speeds])
        figures = f"{rows_per_s:10,.0f} {share.median:13.2f} {bounds:>12} {cpu_ms:7.0f}"
        print(f"{way.name:44}{figures}", flush=True)
    print_speed("the limit: C memcpy of the rows, one thread", limit, n_epochs=9)


def print_speed(name: str, epoch: Epoch, n_epochs: int) -> None:
    """The median of some epochs, as a line."""
    rows_per_s = np.median([speed_of(epoch).rows_per_s for _ in range(n_epochs)])
    print(f"{name:44}{rows_per_s:10,.0f}", flush=True)


def report_waits(ways: Sequence[Way], n_steps: int) -> None:
    """How long a training step of 10 ms would wait for its batch."""
    title = "ms waited for a batch beside a step of 10 ms"
    print(f"\n{title:44}{'sleeping':>10} {'holding the GIL':>16}")
    for way in ways:
        loader = way.make_loader()
        sleeping = median_wait_ms(loader, sleep_a_step, n_steps)
        holding = median_wait_ms(loader, hold_the_lock_a_step, n_steps)
        print(f"{way.name:44}{sleeping:10.2f} {holding:16.2f}", flush=True)
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


def report_first_batch(path: str) -> None:
    """Each time in a fresh process, from opening the set on; imports are not counted."""
    print(f"\n{'seconds from opening the set to the first batch':44}")
    for n_workers, name in (
        (0, "ours, no worker, one thread ahead"),
        (2, "ours, 2 workers (fork)"),
    ):
        command = [sys.executable, "-c", FIRST, path, str(n_workers)]
        seconds = []
        for _ in range(N_FIRST_BATCHES):
            done = subprocess.run(command, capture_output=True, text=True)
            seconds.append(float(done.stdout))
        first_s = median_interval(seconds)
        bounds = f"({first_s.low:.3f}-{first_s.high:.3f})"
        print(f"{name:44}{first_s.median:10.3f} {bounds}", flush=True)


def report_other_limits(dataset: ShardDataset, batches: list[np.ndarray]) -> None:
    """Why the limit is copied as it is: what else a copy of the same rows could be measured as."""
    print(f"\n{'C memcpy of the same rows, one thread':44}{'rows/s':>10}")
    limit_of = partial(memcpy_limit, dataset, batches)
    for name, make_limit in (
        ("into one batch buffer, GIL kept (the limit)", limit_of),
        ("the same, GIL released a row (ctypes.CDLL)", partial(limit_of, library=ctypes.CDLL)),
        ("into one row's place: nothing is delivered", partial(limit_of, n_buffers=TO_ONE_PLACE)),
        ("into two in turn (ours, when asked for)", partial(limit_of, n_buffers=2)),
        ("into three in turn (ours, a thread ahead)", partial(limit_of, n_buffers=3)),
        ("into four in turn (ours, workers)", partial(limit_of, n_buffers=4)),
    ):
        epoch = make_limit()
        epoch()
        print_speed(name, epoch, n_epochs=7)


def report_two_threads(dataset: ShardDataset, n_pairs: int, limit: Epoch) -> None:
    """The gather alone, with a second thread of torch's beside it."""
    torch.set_num_threads(2)
    epoch = epochs_of(Loader(dataset, Batches(len(dataset), BATCH, 0), prefetch=False))
    pairs = [(speed_of(epoch), speed_of(limit)) for _ in range(n_pairs)]
    share = median_interval([ours.rows_per_s / most.rows_per_s for ours, most in pairs])
    figures = f"{share.median:.2f} ({share.low:.2f}-{share.high:.2f}) of the limit"
    print(f"ours, gathered when asked for, 2 torch threads: {figures}")


def report(args: argparse.Namespace) -> None:
    """All tables, one after the other."""
    path = str(resolve_set(args.data))
    dataset = ShardDataset(path, split="all")
    if len(dataset) < BATCH:  # a way that drops the last batch would never deliver one
        raise UserError(f"{path} has {len(dataset)} rows. Use a set with {BATCH} rows or more")

    warnings.filterwarnings("ignore", "This DataLoader will create")
    # With more, torch.stack in the DataLoader can be 100 times slower here.
    torch.set_num_threads(1)
    batches = Batches(len(dataset), BATCH, 0)(0)
    limit = memcpy_limit(dataset, batches)
    limit()
    what = f"{len(dataset)} rows of {dataset.size}x{dataset.size}, batches of {BATCH}"
    print(f"{path}: {what}, {args.pairs} pairs\n")

    with tempfile.TemporaryDirectory(dir=args.mat and args.mat.parent) as folder:
        ways = [*our_ways(path, spawn_too=True), *torch_ways(path)]
        if args.mat:
            save_arrays(args.mat, Path(folder))
            ways += in_memory_ways(Path(folder))
        report_speed(ways, args.pairs, limit)
    report_waits([*our_ways(path, spawn_too=False), *torch_ways(path)], args.steps)
    report_first_batch(path)
    report_other_limits(dataset, batches)
    report_two_threads(dataset, args.pairs, limit)

    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak memory of this process: {peak_mib:.0f} MiB (RSS)")
    print("CPU ms: of this process an epoch, workers not included.")
    print("A wait is the median over steps, the first two apart.")


def make_flags() -> Parser:
    """Those of the command line."""
    parser = make_parser("loader", __doc__)
    parser.add_argument("data", type=as_path, metavar="SET", help=SET)
    mat_help = "the original file, for arrays in RAM, 3.1 GB (default: without that script)"
    parser.add_argument("--mat", type=as_path, metavar="X.mat", help=mat_help)
    add_number(parser, "--pairs", 15, "how often each pair is timed")
    add_number(parser, "--steps", 60, "steps of 10 ms for each wait")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
