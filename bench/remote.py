"""Training from a bucket through a cache smaller than the set.

    python -m bench.remote DIR [--rows 16384] [--limit-mb 1000] [--step-ms 30]

A set of random bytes is made in DIR (4.1 GB; it is kept), and put into a bucket of moto's server,
which runs on this machine, on the same cores.

server     shards' files read three at a time, as the fetcher asks for them, and thrown away
epochs     two processes, ranks of one training with 64 rows each, sleep a step between batches, for
           two epochs: rows a second, how long each waits for a batch, requests and bytes as the
           server counts them, the most that the cache held
resumed    the two are stopped in the middle of the first epoch, and one process with 128 rows goes
           on: the rows of every step must be those of the first run

Rows are told apart by their first bytes, which are random; each step's are compared.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import add_number, exit_status, make_parser
from bench.random_set import random_set
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.files import LocalFolder
from shards.flags import Parser, as_path, whole
from stores.object_store import ObjectStore
from train.data import create_dataloaders
from train.fetcher import AT_ONCE

SIZE = 224
ROWS_OF_STEP = 128
BUCKET = "bench"
N_EPOCHS = 2
N_SERVED = 24  # files, to see what the server gives
ASKED = re.compile(r'"(?:\x1b\[[0-9;]*m)*(GET|HEAD|PUT|POST) \S+ HTTP')
LOOK_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process does. first, last: the steps, counted from the first epoch on."""

    address: str
    cache: str
    limit_gb: float
    rank: int
    world: int
    step_ms: int
    first: int
    last: int
    out: str


def run_part(part: Part) -> None:
    """In a process of its own: waits in ms, and which rows each step had, into `out`.npz."""
    loader, _ = create_dataloaders(
        part.address,
        batch_size=ROWS_OF_STEP // part.world,
        num_workers=0,
        normalize=False,
        rank=part.rank,
        world=part.world,
        cache_dir=part.cache,
        cache_limit_gb=part.limit_gb,
    )
    n_steps = len(loader)
    loader.set_epoch(part.first // n_steps, part.first % n_steps)
    waits_ms: list[float] = []
    rows = []
    started = time.perf_counter()
    step = part.first
    while step < part.last:
        batches = iter(loader)
        for _ in range(len(loader)):
            if step >= part.last:
                break
            asked = time.perf_counter()
            rgb, _, _ = next(batches)
            waits_ms.append(1e3 * (time.perf_counter() - asked))
            rows.append(rgb[:, 0, 0, :8].contiguous().numpy().view(np.uint64)[:, 0].copy())
            step += 1
            time.sleep(part.step_ms / 1e3)
        next(batches, None)  # the next epoch
    seconds = time.perf_counter() - started
    np.savez(part.out, waits_ms=waits_ms, rows=np.array(rows), seconds=seconds, n_steps=n_steps)


def run_ranks(parts: Sequence[Part]) -> list[Any]:
    """What each of them found; they run at the same time."""
    words = [sys.executable, "-m", "bench.remote", "-", "--part"]
    started = [subprocess.Popen([*words, json.dumps(asdict(part))]) for part in parts]
    if any([process.wait() for process in started]):
        raise UserError("a process of the measurement failed: see above")
    return [np.load(f"{part.out}.npz") for part in parts]


# ------------------------------------------------------------------------------------ the bucket


class Server:
    """moto's, and what it was asked."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def n_requests(self) -> int:
        """Since it was started."""
        return len(ASKED.findall(self._log.read_text(errors="replace")))


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The server, until the end; the environment leads everybody there."""
    port = "5567"
    log = folder / "server.log"
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with open(log, "w") as file:
        words = [sys.executable, "-m", "moto.server", "-p", port]
        process = subprocess.Popen(words, stdout=file, stderr=file)
    try:
        _make_bucket()
        yield Server(log)
    finally:
        process.kill()
        process.wait()


def _make_bucket() -> None:
    import boto3

    client = boto3.client("s3")
    for _ in range(100):
        try:
            client.create_bucket(Bucket=BUCKET)
            return
        except Exception:  # it is not up yet
            time.sleep(0.2)
    raise UserError("moto's server does not answer")


def put(found: ShardSet) -> str:
    """The set's address in the bucket."""
    subprocess.run(
        [sys.executable, "-m", "convert", "push", str(found.path), f"s3://{BUCKET}/sets"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return f"s3://{BUCKET}/sets/{found.path.name}"


def rate_of_server(found: ShardSet, address: str) -> float:
    """Bytes a second of whole files, three at a time."""
    store = ObjectStore(address)
    names = [name for shard in found.manifest.shards for name in shard.files][:N_SERVED]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(store.read, names[:2]))  # connected
        started = time.perf_counter()
        n_bytes = sum(map(len, pool.map(store.read, names)))
    return n_bytes / (time.perf_counter() - started)


# ------------------------------------------------------------------------------------ the report


@contextmanager
def watching(cache: Path) -> Iterator[list[int]]:
    """The bytes that the folder holds, seen every now and then."""
    seen = [0]
    is_over = False

    def look() -> None:
        while not is_over:
            folders = [each for each in cache.glob("*") if each.is_dir()]
            seen.append(sum(sum((LocalFolder(each).sizes() or {}).values()) for each in folders))
            time.sleep(LOOK_S)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(look)
        try:
            yield seen
        finally:
            is_over = True


def report(args: argparse.Namespace) -> None:
    """All of it, as lines."""
    found = random_set(args.data, args.rows, SIZE)
    set_bytes = sum(
        entry.n_bytes for shard in found.manifest.shards for entry in shard.files.values()
    )
    row_bytes = set_bytes / found.n_rows
    folder = Path(tempfile.mkdtemp(dir=args.data))
    try:
        with serving(folder) as server:
            address = put(found)
            rate = rate_of_server(found, address)
            print(f"set: {found.n_rows} rows in {found.n_shards} shards, {set_bytes / 1e9:.2f} GB")
            print(f"server: {rate / 1e6:.0f} MB/s, {rate / row_bytes:.0f} rows/s", flush=True)
            report_epochs(Measurement(args, folder, address, server, rate / row_bytes))
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Measurement:
    """What the lines are measured with. rate: of the server, rows a second."""

    args: argparse.Namespace
    folder: Path
    address: str
    server: Server
    rate: float

    def part(self, name: str, rank: int, world: int, first: int, last: int) -> Part:
        return Part(
            address=self.address,
            cache=str(self.folder / f"cache-{name}"),
            limit_gb=self.args.limit_mb / 1e3,
            rank=rank,
            world=world,
            step_ms=self.args.step_ms,
            first=first,
            last=last,
            out=str(self.folder / f"{name}-{rank}-{first}"),
        )


def report_epochs(measured: Measurement) -> None:
    """Two epochs by two ranks, then the same stopped, and continued by one."""
    n_steps = (measured.args.rows - ROWS_OF_STEP) // ROWS_OF_STEP  # the last shard is val
    n_before = measured.server.n_requests()
    with watching(measured.folder / "cache-two") as held:
        parts = [measured.part("two", rank, 2, 0, N_EPOCHS * n_steps) for rank in range(2)]
        ranks = run_ranks(parts)
    waits = np.concatenate([rank["waits_ms"] for rank in ranks])
    seconds = max(float(rank["seconds"]) for rank in ranks)
    n_rows = N_EPOCHS * n_steps * ROWS_OF_STEP
    fetched, removed = counts_of(measured.folder / "cache-two")
    print(f"two ranks, {N_EPOCHS} epochs, steps of {measured.args.step_ms} ms: {seconds:.0f} s")
    rate = n_rows / seconds
    print(f"  {rate:.0f} rows/s, {rate / measured.rate:.2f} of the server's")
    late = waits[N_SETTLED:]
    print(f"  first batch {waits[0] / 1e3:.1f} s; then a wait of {np.median(late):.1f} ms")
    print(f"  in the median, {np.quantile(late, 0.95):.0f} ms at 95 %")
    print(f"  {measured.server.n_requests() - n_before} requests, {fetched / 1e9:.2f} GB fetched")
    print(
        f"  {removed} shards removed; the cache held {max(held) / 1e6:.0f} MB at most", flush=True
    )

    half = n_steps // 2
    begun = run_ranks([measured.part("again", rank, 2, 0, half) for rank in range(2)])
    rest = run_ranks([measured.part("again", 0, 1, half, N_EPOCHS * n_steps)])
    whole = steps_of(ranks)
    again = np.concatenate([steps_of(begun), steps_of(rest)])
    n_same = int((whole == again).all(axis=1).sum())
    print(f"resumed with one rank after step {half}: {n_same} of {len(whole)} steps the same")
    for epoch in range(N_EPOCHS):
        rows = whole[epoch * n_steps : (epoch + 1) * n_steps].ravel()
        print(f"  epoch {epoch}: {len(rows)} rows, {len(np.unique(rows))} of them different")


N_SETTLED = 20  # batches, after which only waits are looked at


def steps_of(ranks: Sequence[Any]) -> np.ndarray:
    """[steps, rows of a step] of all ranks together, in one order."""
    return np.sort(np.concatenate([rank["rows"] for rank in ranks], axis=1), axis=1)


def counts_of(cache: Path) -> tuple[int, int]:
    """(bytes fetched, shards removed) as the fetcher has counted them."""
    from stores.cache import N_BYTES, N_NUMBERS, N_REMOVED, STATE

    (state,) = cache.glob(f"*/{STATE}")
    numbers = np.fromfile(state, np.int64, N_NUMBERS)
    return int(numbers[N_BYTES]), int(numbers[N_REMOVED])


def make_flags() -> Parser:
    """Those of the command line; one is for the processes that it starts."""
    parser = make_parser("remote", __doc__)
    parser.add_argument("data", type=as_path, metavar="DIR", help="where the set is made, and kept")
    rows_help = "rows of the set, 250,880 bytes each (1024 to 1000000, default: %(default)s)"
    parser.add_argument(
        "--rows", type=whole(1024, 10**6), default=16384, metavar="N", help=rows_help
    )
    add_number(parser, "--limit-mb", 1000, "what the cache may hold, in MB")
    add_number(parser, "--step-ms", 30, "milliseconds of the training step")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    if args.part:
        return exit_status(lambda: run_part(Part(**json.loads(args.part))))
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
