"""What a cluster costs beside the helper processes of one machine, and how far it goes.

    python -m bench.cluster [DIR] [--rows 1200] [--rounds 3] [--thousands 1000]

scaling    the same table of made-up frames (640x480, JPEG and 16-bit PNG) converted by helper
           processes and by a cluster of this machine, each with one and with two: rows a second of
           whole commands, and one SHA-256 over all files of each set, which must be the same
overhead   a plan of so many thousand rows, 128 a shard, whose tasks are simulated: they check their
           process as all do, and answer with a receipt of the usual size, but read and write
           nothing. A scheduler and two workers, each a process of its own. Milliseconds a task,
           and the most memory that client and scheduler had: what Dask and our loop cost by
           themselves. The client keeps all receipts, as a conversion does
journal    receipts written, each durable, in the folder of DIR

DIR keeps the frames; without it they are made in a temporary folder.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from bench.command import add_number, exit_status, make_parser
from bench.figures import median_interval
from convert.cluster import Cluster, ClusterExecutor
from convert.plan import Plan
from convert.sample_frames import write_frames
from convert.shard_task import Job, Receipts, ShardTask, check_here
from convert.sources.base import RowFacts
from shards.errors import UserError
from shards.files import FileEntry, LocalFolder, WritableFolder
from shards.flags import as_path
from shards.manifest import PROVENANCE, Receipt, RowsRead, ShardEntry, shard_file, write_receipt
from shards.spec import KNOWN_FIELDS, ConversionSettings, DatasetSpec, SourceIdentity

SIZE_WH = (640, 480)
FIELDS = ("rgb", "depth")
N_JOURNALLED = 300
RATE = re.compile(r"(\d+) rows in ([\d.]+) s")
WAYS = {
    "helper processes": ["--scheduler", "local"],
    "cluster": ["--scheduler", "dask"],
}


# ------------------------------------------------------------------------------------- scaling


def convert(table: Path, out: Path, words: list[str]) -> tuple[float, str]:
    """(rows a second, as the command says it, one SHA-256 of the set)."""
    command = [sys.executable, "-m", "convert", "run", str(table), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    said = RATE.findall(done.stderr)[-1]
    return int(said[0]) / float(said[1]), sha256_of(Path(done.stdout.strip()))


def sha256_of(directory: Path) -> str:
    """Over names and contents of a set, without its provenance."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != PROVENANCE:
            digest.update(f"{path.relative_to(directory)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def scaling(table: Path, rounds: int) -> None:
    """Every way once a round, in alternating order."""
    rates: dict[tuple[str, int], list[float]] = {}
    digests = set()
    cases = [(way, n_workers) for way in WAYS for n_workers in (1, 2)]
    for turn in range(rounds):
        for way, n_workers in cases if turn % 2 == 0 else reversed(cases):
            words = [*WAYS[way], "--workers", str(n_workers)]
            with tempfile.TemporaryDirectory(dir=table.parent) as out:
                rate, digest = convert(table, Path(out), words)
            rates.setdefault((way, n_workers), []).append(rate)
            digests.add(digest)
    for (way, n_workers), found in sorted(rates.items()):
        rate = median_interval(found)
        interval = f"{rate.median:6.1f} rows/s ({rate.low:.1f} .. {rate.high:.1f})"
        print(f"{way:18} {n_workers}: {interval}")
    print(f"sets: {len(digests)} different, SHA-256 {', '.join(each[:16] for each in digests)}")


# ------------------------------------------------------------------------------------- overhead


class Nowhere:
    """A folder that nothing is written into."""

    def __str__(self) -> str:
        return "nowhere"


class ReaderOfNothing:
    """What an executor asks of readers before it begins."""

    group_rows = 1
    scratch_bytes = 0

    def close(self) -> None:
        """Nothing is open."""


class SourceOfNothing:
    """One that is never opened."""

    def opener(self) -> Any:
        """No task calls it."""
        raise NotImplementedError


def receipt_of(plan: Plan, k: int) -> Receipt:
    """As large as one of a table's shard."""
    start, stop = plan.bounds_of(k)
    digest = hashlib.sha256(str(k).encode()).hexdigest()
    files = {shard_file(field, k, False): FileEntry(k, digest) for field in plan.fields}
    sums = {"rgb": ((1, 2, 3),) * 3, "depth": ((1, 2, 3),)}
    sizes = np.full((stop - start, 2), 480, "<u2")
    entry = ShardEntry(start=start, stop=stop, files=files, sums=sums)
    rows = RowsRead(sizes=sizes, failed={}, highest={})
    return Receipt(entry=entry, decoder="simulated", rows=rows)


def simulated(job: Job, task: ShardTask, where: str) -> Receipts:
    """On a worker: what `make_shards` does, without a source, pixels and files."""
    check_here(job, where)
    return [(k, receipt_of(job.plan, k)) for k in task.shards]


class Simulated(ClusterExecutor):
    """An executor whose workers only answer."""

    make = staticmethod(simulated)


def plan_of(n_rows: int) -> Plan:
    """Of rgb and depth at 224, 128 rows a shard."""
    settings = ConversionSettings(fields=FIELDS, rows_per_shard=128)
    source = SourceIdentity(kind="table", name="simulated.csv", n_bytes=0, sha256="0" * 64)
    return Plan(
        dataset="simulated",
        settings=settings,
        source=source,
        fields=[KNOWN_FIELDS[name] for name in FIELDS],
        n_rows=n_rows,
    )


def facts_of(n_rows: int) -> "Future[RowFacts]":
    """All of them train rows."""
    facts: Future[RowFacts] = Future()
    split = np.zeros(n_rows, "|u1")
    spec = DatasetSpec(name="simulated", width=0, height=0)
    facts.set_result(RowFacts(columns={"split": split}, scenes=(), dataset=spec))
    return facts


def overhead(n_rows: int) -> None:
    """The client is this process; scheduler and workers are processes of their own."""
    from distributed import Client

    plan = plan_of(n_rows)
    n_shards = len(plan.bounds)
    with cluster_processes() as (file, pid), Client(scheduler_file=str(file)) as client:
        client.wait_for_workers(2)
        workers = list(client.run(os.getpid).values())
        pids = {"client": [os.getpid()], "scheduler": [pid], "workers": workers}
        before = {who: cpu_s(each) for who, each in pids.items()}
        memory_before = [peak_memory(os.getpid()), peak_memory(pid)]
        executor = Simulated(
            plan,
            cast(Any, SourceOfNothing()),
            cast(Any, [ReaderOfNothing()]),
            cast(WritableFolder, Nowhere()),
            Cluster(client=client),
        )
        started = time.perf_counter()
        with executor:
            done = dict(executor.run(range(n_shards), facts_of(n_rows)))
        seconds = time.perf_counter() - started
        assert len(done) == n_shards
        cpu = [f"{who} {1000 * (cpu_s(pids[who]) - s) / n_shards:.2f}" for who, s in before.items()]
        memory_after = [peak_memory(os.getpid()), peak_memory(pid)]
    print(f"{n_shards} simulated tasks, {seconds:.1f} s: {1000 * seconds / n_shards:.2f} ms a task")
    print(f"CPU ms a task: {', '.join(cpu)}")
    for who, first, last in zip(("client", "scheduler"), memory_before, memory_after, strict=True):
        print(f"most memory of the {who}: {last} MiB, {first} before")


@contextmanager
def cluster_processes() -> Iterator[tuple[Path, int]]:
    """(the scheduler's file, its process): `dask scheduler` and two `dask worker`s."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scheduler.json"
        where = ["--scheduler-file", str(file), "--no-dashboard"]
        commands = [
            ["scheduler", "--port", "0", "--no-show", *where],
            ["worker", "--nthreads", "1", *where],
            ["worker", "--nthreads", "1", *where],
        ]
        started = [start(words, Path(folder)) for words in commands]
        try:
            while not file.exists() or not file.stat().st_size:
                time.sleep(0.1)
            yield file, started[0].pid
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


def start(words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """A command of Dask that finds our modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "dask", *words]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=null, stderr=null)


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of these processes so far."""
    ticks = 0
    for pid in pids:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> int:
    """MiB, the most that it ever had."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) // 1024


def journal(folder: Path) -> None:
    """Receipts as the client writes them, one after the other."""
    plan = plan_of(128 * N_JOURNALLED)
    with tempfile.TemporaryDirectory(dir=folder) as where:
        receipts = [receipt_of(plan, k) for k in range(N_JOURNALLED)]
        started = time.perf_counter()
        for k, receipt in enumerate(receipts):
            write_receipt(LocalFolder(Path(where)), k, receipt)
        seconds = time.perf_counter() - started
    print(f"a receipt: {1000 * seconds / N_JOURNALLED:.2f} ms to write it, durable")


# ------------------------------------------------------------------------------------ the command


def make_flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser("cluster", __doc__)
    folder_help = "keeps the frames (default: a temporary folder)"
    parser.add_argument("folder", type=as_path, nargs="?", metavar="DIR", help=folder_help)
    add_number(parser, "--rows", 1200, "frames")
    add_number(parser, "--rounds", 3, "of each way to convert them")
    add_number(parser, "--thousands", 1000, "thousand rows of the simulated plan")
    return parser


def measure(folder: Path, args: argparse.Namespace) -> None:
    """All of it, with the machine's load before and after."""
    frames = folder / f"frames-{args.rows}"
    if not frames.exists():
        write_frames(frames, args.rows, sizes_wh=[SIZE_WH])
    print(f"load {os.getloadavg()[0]:.1f}")
    scaling(frames / "rows.csv", args.rounds)
    overhead(1000 * args.thousands)
    journal(folder)
    print(f"load {os.getloadavg()[0]:.1f}")


def main() -> int:
    """Measure, and print."""
    args = make_flags().parse_args()

    def run() -> None:
        if args.folder:
            args.folder.mkdir(parents=True, exist_ok=True)
            measure(args.folder, args)
            return
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), args)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
