"""Reading a set that memory does not hold, against what the disk gives.

    python -m bench.larger DIR [--rows 8192] [--rounds 3] [--step-ms 30]
    python -m bench.larger DIR --rows 40960 --limit-mb 1000 --curve FILE.csv [--train]

A set of random bytes is made in DIR (2.1 GB; it is kept). Each line is a fresh process in a memory
cgroup of a quarter of the set, with nothing of the set in memory before: every file is dropped, and
that is checked. The disk's rate is that of 8 threads that pread the same rows of a shuffled epoch,
measured again in every round right before the ways; a share is of that in the same round, the
figure the median with a 95 % bootstrap interval. "Bytes" is what the processes had the disk read
over what the rows take. Memory is the tree's own and shared, page cache apart. With a curve: one
epoch, and every half second what the tree holds.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.cgroup import drop_from_cache, memory_group
from bench.command import add_number, exit_status, make_parser
from bench.figures import median_interval
from bench.random_set import random_set
from loader.loader import Loader
from loader.memory import PROC, tree_memory, tree_of
from shards.containers import NPY_HEADER
from shards.dataset import ShardSet, open_set
from shards.errors import UserError
from shards.flags import Parser, as_path
from train.data import ShardDataset
from train.order import Batches

SIZE = 224
BATCH = 128
TIMES_THE_LIMIT = 4
N_THREADS = 8
PIECE_BYTES = 1 << 20  # of one read in sequence
TIMEOUT_S = 900
LOOK_S = 0.5

DISK = "the disk: 8 threads pread the rows"
IN_SEQUENCE = "the disk: files one after the other"
SHUFFLED = "shuffled"
IN_ORDER = "in order"
FIRST_EPOCH = "the first epoch"
SECOND_EPOCH = "the second epoch"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A line of the table."""

    name: str
    order: str = SHUFFLED
    n_workers: int = 0
    method: str | None = None
    asks_ahead: bool = True  # as it is; False: rows are read when they are touched, as before
    prefetch: bool = True
    most_batches: int = 10_000  # the slow ones are cut short
    step_ms: int = 0
    n_epochs: int = 1  # only the last one is measured


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one process tree. Waits are from the third batch on."""

    rows_per_s: float
    first_s: float  # until the first batch, workers started meanwhile
    read_over_needed: float
    wait_ms: float
    wait_95_ms: float
    own_bytes: float


# ---------------------------------------------------------------- what runs within the limit


class Touched(ShardDataset):
    """A set whose rows are read when they are touched: it cannot be told what comes."""

    read_ahead = None  # type: ignore[assignment]


def run_way(path: str, way: Way) -> Measured:
    """In this process."""
    if way.name == DISK:
        return read_rows(path, way)
    if way.name == IN_SEQUENCE:
        return read_files(path)
    dataset = (ShardDataset if way.asks_ahead else Touched)(path, split="all")
    batches = Batches(len(dataset), BATCH, 0 if way.order == SHUFFLED else None)
    row_bytes = bytes_of_row(dataset.shard_set)

    loader = Loader(
        dataset,
        # It ends there: what would be read ahead for a further epoch is not needed for this one.
        lambda epoch: batches(epoch)[: way.most_batches] if epoch < way.n_epochs else [],
        way.n_workers,
        way.method,
        prefetch=way.prefetch,
    )
    for _ in range(way.n_epochs):
        before = read_bytes_of_tree()
        n_rows, waits_s, seconds = _one_epoch(loader, way.step_ms / 1e3)
        n_read = read_bytes_of_tree() - before
    waits_ms = 1e3 * np.array(waits_s[2:])
    return Measured(
        rows_per_s=n_rows / seconds,
        first_s=waits_s[0],
        read_over_needed=n_read / (n_rows * row_bytes),
        wait_ms=float(np.median(waits_ms)),
        wait_95_ms=float(np.quantile(waits_ms, 0.95)),
        own_bytes=tree_memory().pss_anon,
    )


def _one_epoch(loader: Loader, step_s: float) -> tuple[int, list[float], float]:
    """(rows, seconds waited for each batch, seconds in all)."""
    waits_s = []
    n_rows = 0
    started = time.perf_counter()
    batches = iter(loader)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return n_rows, waits_s, time.perf_counter() - started
        waits_s.append(time.perf_counter() - asked)
        n_rows += len(batch[-1])
        time.sleep(step_s)


def read_rows(path: str, way: Way) -> Measured:
    """The rows of a shuffled epoch, read into one row's place by threads."""
    found = open_set(path)
    rows = np.concatenate(Batches(found.n_rows, BATCH, 0)(0)[: way.most_batches]).tolist()
    files = {name: _opened(found, name) for name in found.manifest.fields}

    def read(some: Sequence[int]) -> None:
        for name, field in found.manifest.fields.items():
            n_bytes = field.row_bytes(SIZE)
            place = bytearray(n_bytes)
            for row in some:
                shard, k = divmod(row, found.settings.rows_per_shard)
                os.preadv(files[name][shard], [place], NPY_HEADER + k * n_bytes)

    before = read_bytes_of_tree()
    started = time.perf_counter()
    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(read, [rows[k::N_THREADS] for k in range(N_THREADS)]))
    seconds = time.perf_counter() - started
    return _of_the_disk(found, len(rows), seconds, read_bytes_of_tree() - before)


def _opened(found: ShardSet, field: str) -> list[int]:
    """Descriptors of a field's files, from each of which places are read at random."""
    files = []
    for k in range(found.n_shards):
        file = os.open(found.path / f"{field}-{k:05d}.npy", os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        files.append(file)
    return files


def read_files(path: str) -> Measured:
    """Every shard from its beginning to its end, one after the other."""
    found = open_set(path)
    place = bytearray(PIECE_BYTES)
    before = read_bytes_of_tree()
    started = time.perf_counter()
    for name in shard_files(found):
        with open(found.path / name, "rb", buffering=0) as file:
            while file.readinto(place):
                pass
    seconds = time.perf_counter() - started
    return _of_the_disk(found, found.n_rows, seconds, read_bytes_of_tree() - before)


def _of_the_disk(found: ShardSet, n_rows: int, seconds: float, n_read: int) -> Measured:
    nothing = float("nan")
    return Measured(
        rows_per_s=n_rows / seconds,
        first_s=nothing,
        read_over_needed=n_read / (n_rows * bytes_of_row(found)),
        wait_ms=1e3 * seconds * BATCH / n_rows,
        wait_95_ms=nothing,
        own_bytes=nothing,
    )


def read_bytes_of_tree() -> int:
    """That this process and those it started have had a disk read."""
    n_bytes = 0
    for pid in tree_of(os.getpid()):
        lines = (PROC / str(pid) / "io").read_text().splitlines()
        n_bytes += next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    return n_bytes


def bytes_of_row(found: ShardSet) -> int:
    """Of all fields."""
    return sum(field.row_bytes(SIZE) for field in found.manifest.fields.values())


# ---------------------------------------------------------------- nothing of it in memory


def shard_files(found: ShardSet) -> list[str]:
    """Those of all shards."""
    return [name for shard in found.manifest.shards for name in shard.files]


def forget(found: ShardSet) -> None:
    """Drop every shard from the page cache. Raises UserError where some of one stays."""
    for name in shard_files(found):
        drop_from_cache(found.path / name)
    n_bytes = sum(resident_bytes(found.path / name) for name in shard_files(found))
    if n_bytes:
        what = f"{n_bytes / 2**20:.0f} MiB of {found.path} stay in memory: another process has"
        raise UserError(f"{what} them mapped. End it first")


def resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    n_pages = -(-path.stat().st_size // mmap.PAGESIZE)
    is_there = np.zeros(n_pages, np.uint8)
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    mapped = np.memmap(path, np.uint8, "r")
    if mincore(mapped.ctypes.data, len(mapped), is_there.ctypes.data):
        raise UserError(f"the kernel does not tell what of {path} is in memory")
    return int((is_there & 1).sum()) * mmap.PAGESIZE


def run_limited(found: ShardSet, way: Way, limit_bytes: int) -> Measured:
    """In a process of its own, within the limit, with nothing of the set in memory before."""
    forget(found)
    one = json.dumps(asdict(way))
    command = [sys.executable, "-m", "bench.larger", str(found.path), "--one", one]
    with memory_group(limit_bytes) as group:
        done = group.run(command, timeout=TIMEOUT_S)
        if group.oom_kills():
            raise UserError(f"{way.name}: ended for want of memory")
    if done.returncode:
        raise UserError(f"{way.name}: {done.stderr.strip().splitlines()[-1]}")
    return Measured(**json.loads(done.stdout))


# ---------------------------------------------------------------- the tables


def ways_of_reading() -> Iterator[Way]:
    """Those of a set that is larger than memory, the disk itself first."""
    yield Way(name=DISK)
    for order in (SHUFFLED, IN_ORDER):
        yield Way(name="when asked for", order=order, prefetch=False)
        yield Way(name="a thread ahead", order=order)
        for n_workers in (2, 8):
            name = f"{n_workers} workers (fork)"
            yield Way(name=name, order=order, n_workers=n_workers, method="fork")


def ways_before() -> Iterator[Way]:
    """The same without asking ahead, cut short."""
    how: dict[str, Any] = {"asks_ahead": False, "most_batches": 8}
    for order in (SHUFFLED, IN_ORDER):
        yield Way(name="before: a thread ahead", order=order, **how)
        name = "before: 2 workers (fork)"
        yield Way(name=name, order=order, n_workers=2, method="fork", **how)


def ways_of_a_step(step_ms: int) -> Iterator[Way]:
    """Beside a training step."""
    for way in ways_of_reading():
        if way.name != DISK and way.prefetch:
            yield replace(way, step_ms=step_ms)


def ways_that_fit() -> Iterator[Way]:
    """Of a set that memory holds: once through, and again."""
    yield Way(name=IN_SEQUENCE)
    yield Way(name=FIRST_EPOCH)
    yield Way(name=SECOND_EPOCH, n_epochs=2)
    for n_epochs, name in ((1, FIRST_EPOCH), (2, SECOND_EPOCH)):
        name = f"{name}, 2 workers"
        yield Way(name=name, n_epochs=n_epochs, n_workers=2, method="fork")


def report_ways(found: ShardSet, ways: Sequence[Way], limit_bytes: int, n_rounds: int) -> None:
    """A line each, after `n_rounds` rounds through all of them; the first one is the disk."""
    rounds = []
    for _ in range(n_rounds):
        rounds.append([run_limited(found, way, limit_bytes) for way in ways])
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    disk = [each[0] for each in rounds]
    for k, way in enumerate(ways):
        measured = [each[k] for each in rounds]
        pairs = zip(measured, disk, strict=True)
        shares = [ours.rows_per_s / of_disk.rows_per_s for ours, of_disk in pairs]
        print(as_text(way, measured, shares), flush=True)


HEADS = ("order", "rows/s", "of the disk", "(95 %)", "bytes", "wait ms", "95 %", "own MiB")
WIDTHS = (-9, 8, 11, 11, 6, 8, 7, 8)  # negative: from the left
NAME_WIDTH = -34


def table_line(name: str, cells: Sequence[str]) -> str:
    """A line of a table, each cell in its column."""
    padded = [_padded(name, NAME_WIDTH)]
    for cell, width in zip(cells, WIDTHS, strict=True):
        padded.append(_padded(cell, width))
    return " ".join(padded)


def _padded(text: str, width: int) -> str:
    return text.ljust(-width) if width < 0 else text.rjust(width)


def head(title: str) -> str:
    """The first line of a table."""
    return "\n" + table_line(title, HEADS)


def as_text(way: Way, measured: Sequence[Measured], shares: Sequence[float]) -> str:
    """A line of the table."""
    share = median_interval(shares)

    def median(name: str) -> float:
        return float(np.median([getattr(each, name) for each in measured]))

    own_mib = median("own_bytes") / 2**20
    cells = (
        way.order,
        f"{median('rows_per_s'):,.0f}",
        f"{share.median:.2f}",
        f"{share.low:.2f}-{share.high:.2f}",
        f"{median('read_over_needed'):.2f}",
        f"{median('wait_ms'):.2f}",
        f"{median('wait_95_ms'):.2f}",
        f"{own_mib:.0f}",
    )
    return table_line(way.name, cells)


def report(args: argparse.Namespace) -> None:
    """All tables, one after the other; or the curve alone."""
    if args.one:
        print(json.dumps(asdict(run_way(str(args.data), Way(**json.loads(args.one))))))
        return

    found = random_set(args.data, args.rows, SIZE)
    n_bytes = found.n_rows * bytes_of_row(found)
    limit_bytes = args.limit_mb * 10**6 if args.limit_mb else n_bytes // TIMES_THE_LIMIT
    what = f"{found.n_rows} rows, {n_bytes / 1e9:.2f} GB, within {limit_bytes / 1e9:.2f} GB"
    print(f"{found.path}: {what}, batches of {BATCH}, {args.rounds} rounds")
    if args.curve:
        draw_curve(found, limit_bytes, args.curve, is_training=args.train)
        return

    print(head("larger than memory"))
    report_ways(found, list(ways_of_reading()), limit_bytes, args.rounds)
    print(head(f"beside a step of {args.step_ms} ms"))
    disk = Way(name=DISK)
    report_ways(found, [disk, *ways_of_a_step(args.step_ms)], limit_bytes, args.rounds)
    print(head("in memory of twice its size"))
    report_ways(found, list(ways_that_fit()), 2 * n_bytes, args.rounds)
    if not args.no_before:
        print(head("rows read when they are touched"))
        report_ways(found, [replace(disk, most_batches=8), *ways_before()], limit_bytes, 1)
    print("\nThe disk's own wait: what it takes for a batch. The rest from the third batch on.")


# ---------------------------------------------------------------- the curve


def draw_curve(found: ShardSet, limit_bytes: int, path: Path, *, is_training: bool) -> None:
    """One epoch within the limit: what the tree holds, every LOOK_S, as a table in a file.

    Batches are read and dropped, or a small network is trained on them by `python -m train`.
    """
    forget(found)
    if is_training:
        words = ["train", "--data", str(found.path), "--out", str(path.with_suffix(""))]
        words += ["--epochs", "1", "--width", "8", "--size", "64", "--reset"]
    else:
        words = ["bench.larger", str(found.path), "--one", json.dumps(asdict(Way(name="curve")))]
    command = [sys.executable, "-m", *words]
    with memory_group(limit_bytes) as group:
        process = subprocess.Popen(group.command(command), stdout=subprocess.PIPE, text=True)
        lines = []
        watcher = threading.Thread(target=_watch, args=(process, lines))
        watcher.start()
        out = process.communicate(timeout=TIMEOUT_S)[0]
        watcher.join()
        n_killed = group.oom_kills()
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["seconds", "own_mib", "page_cache_mib", "read_mb"])
        table.writerows(lines)
    if n_killed or process.returncode:
        raise UserError(f"the epoch did not get to its end (killed for memory: {n_killed})")
    if not is_training:
        way = Measured(**json.loads(out))
        print(f"{way.rows_per_s:,.0f} rows/s, {way.read_over_needed:.2f} times the bytes needed")
    own = [line[1] for line in lines]
    print(
        f"own memory {min(own[len(own) // 4 :]):.0f} to {max(own):.0f} MiB after the first quarter"
    )


def _watch(process: subprocess.Popen[str], lines: list[tuple[float, ...]]) -> None:
    """Until it ends."""
    started = time.perf_counter()
    while process.poll() is None:
        held = tree_memory(process.pid)
        seconds = time.perf_counter() - started
        own_mib = held.pss_anon / 2**20
        try:
            text = (PROC / str(process.pid) / "io").read_text().splitlines()
            read_mb = next(int(x.split()[1]) for x in text if x.startswith("read_bytes")) / 1e6
        except (OSError, StopIteration):
            return
        lines.append((round(seconds, 2), own_mib, held.page_cache / 2**20, read_mb))
        time.sleep(LOOK_S)


def make_flags() -> Parser:
    """Those of the command line; one is for the processes that it starts."""
    parser = make_parser("larger", __doc__)
    parser.add_argument("data", type=as_path, metavar="DIR", help="where the set is made, and kept")
    rows_help = "rows of the set, 250,880 bytes each (default: %(default)s)"
    parser.add_argument("--rows", type=int, default=8192, metavar="N", help=rows_help)
    limit_help = "memory of each process in MB, page cache included (default: a quarter of the set)"
    parser.add_argument("--limit-mb", type=int, metavar="N", help=limit_help)
    add_number(parser, "--rounds", 3, "how often each line is measured")
    add_number(parser, "--step-ms", 30, "milliseconds of the training step")
    curve_help = "memory over one epoch, as a table in this file, and nothing else"
    parser.add_argument("--curve", type=as_path, metavar="FILE.csv", help=curve_help)
    train_help = "the curve is of training a small network for an epoch, and not of reading alone"
    parser.add_argument("--train", action="store_true", help=train_help)
    before_help = "leave out the lines without reading ahead, which take minutes"
    parser.add_argument("--no-before", action="store_true", help=before_help)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
