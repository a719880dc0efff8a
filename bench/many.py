"""What a set of a million rows costs to open and to begin with.

    python -m bench.many [DIR] [--thousands 1000] [--rounds 5]

A set of rgb and depth and one of all five fields, at 224x224, with as many rows a shard as a
conversion takes for so many. Their shards are sparse files, a header and zeros that lie on no disk;
all else is as in any set. So this tells what the number of rows and files costs, and nothing of
disks. DIR keeps the sets (some 400 MB); without it they are made in a temporary folder.

A round is a process of its own that may have 1,024 open files. It opens the set for training
(manifest, every file's size and header, the columns), makes the order of an epoch, and a batch of
128 shuffled rows; the last round makes more of them. Memory is anonymous (the process's own) and
page tables, which map the files' pages; both over what Python and torch had before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from bench.command import add_number, exit_status, make_parser
from shards.containers import NPY_HEADER, npy_header
from shards.files import FileEntry, LocalFolder
from shards.flags import Parser, as_path
from shards.gather import RowGather
from shards.manifest import MANIFEST, ColumnValues, Manifest, ShardEntry, bounds_of, shard_file
from shards.spec import (
    KNOWN_FIELDS,
    ConversionSettings,
    DatasetSpec,
    Field,
    SourceIdentity,
    Statistics,
)
from shards.texts import Texts
from shards.writing import commit, set_name
from train.data import ShardDataset
from train.order import Batches

SIZE = 224
BATCH = 128
DESCRIPTORS = 1024
FIELDS_OF_SETS = (("rgb", "depth"), tuple(KNOWN_FIELDS))
SCENE_TYPES = ("bedroom", "kitchen", "office", "corridor", "shop")
ROWS_OF_SCENE = 100
VAL_FROM = 0.9  # of the rows; test from
TEST_FROM = 0.95
CHUNK = 1 << 20


# ------------------------------------------------------------------------------------ sparse sets


def make_sparse(root: Path, fields: tuple[str, ...], n_rows: int, size: int = SIZE) -> Path:
    """A finished set of that many rows, every pixel 0, under `root`; one that is there is taken."""
    asked = ConversionSettings(fields=fields, size=size)
    settings = asked.of_source([_with_statistics(name) for name in fields], n_rows)
    digest = hashlib.sha256(str(n_rows).encode()).hexdigest()
    source = SourceIdentity(kind="table", name="sparse.csv", n_bytes=0, sha256=digest)
    spec = DatasetSpec(name="sparse", width=640, height=480, scene_types=SCENE_TYPES)
    manifest = Manifest(
        dataset=spec,
        source=source,
        settings=settings,
        n_rows=n_rows,
        fields={name: _with_statistics(name) for name in fields},
        shards=[],
        scenes=[f"place {k:06d}" for k in range(-(-n_rows // ROWS_OF_SCENE))],
    )
    directory = root / set_name(spec.name, size, manifest.fingerprint, None)
    if not (directory / MANIFEST).exists():
        directory.mkdir(parents=True, exist_ok=True)
        shards = _write_shards(directory, manifest)
        commit(LocalFolder(directory), replace(manifest, shards=shards), _columns(n_rows))
    return directory


def _with_statistics(name: str) -> Field:
    field = KNOWN_FIELDS[name]
    if field.kind == "id":
        return field
    n = field.planes[0] if field.planes else 1
    statistics = Statistics(count=(1,) * n, mean=(100.0,) * n, std=(50.0,) * n)
    return replace(field, statistics=statistics)


def _write_shards(directory: Path, manifest: Manifest) -> list[ShardEntry]:
    size = manifest.settings.size
    digests: dict[bytes, str] = {}  # all whole shards of a field are the same
    shards = []
    for k, (start, stop) in enumerate(bounds_of(manifest.n_rows, manifest.settings.rows_per_shard)):
        files = {}
        sums = {}
        for name, field in manifest.fields.items():
            header = npy_header(field.dtype, (stop - start, *field.row_shape(size)))
            n_bytes = (stop - start) * field.row_bytes(size)
            if header not in digests:
                digests[header] = _digest_of_zeros(header, n_bytes)
            file = shard_file(field, k, False)
            (directory / file).write_bytes(header)
            os.truncate(directory / file, NPY_HEADER + n_bytes)
            files[file] = FileEntry(NPY_HEADER + n_bytes, digests[header])
            channels = 0 if field.kind == "id" else field.planes[0] if field.planes else 1
            sums[name] = ((n_bytes, 123456789, 98765432123),) * channels
        shards.append(ShardEntry(start=start, stop=stop, files=files, sums=sums))
    return shards


def _digest_of_zeros(header: bytes, n_bytes: int) -> str:
    digest = hashlib.sha256(header)
    for start in range(0, n_bytes, CHUNK):
        digest.update(bytes(min(CHUNK, n_bytes - start)))
    return digest.hexdigest()


def _columns(n_rows: int) -> dict[str, ColumnValues]:
    rows = np.arange(n_rows)
    scenes = rows // ROWS_OF_SCENE
    shares = rows / n_rows
    names = Texts.from_strings(
        f"scans/place_{row // ROWS_OF_SCENE:06d}/color/frame-{row:07d}.color.jpg" for row in rows
    )
    return {
        "split": np.where(shares < VAL_FROM, 0, np.where(shares < TEST_FROM, 2, 1)),
        "scene": scenes,
        "scene_type": scenes % len(SCENE_TYPES),
        "camera": np.tile(np.float32([0.9, 1.2, 0.5, 0.5]), (n_rows, 1)),
        "size": np.tile(np.uint16([480, 640]), (n_rows, 1)),
        "accel": np.zeros((n_rows, 4)),
        "rgb_file": names,
        "depth_file": names,
        "row": rows,
        "status": np.zeros(n_rows),
    }


# -------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one process measured: seconds, and bytes over what it had before."""

    open_s: float
    open_cpu_s: float
    order_s: float
    first_batch_s: float
    opened_bytes: int  # anonymous, once it is open
    peak_bytes: int  # the most of it until then
    batches_bytes: int  # anonymous, after the last batch
    tables_bytes: int  # page tables, then
    n_descriptors: int


def measure(path: Path, n_batches: int) -> Round:
    """In a process that nothing else has run in."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    before = _memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with Timed() as opening:
        dataset = ShardDataset(path)
    opened = _memory()
    with Timed() as ordering:
        batches = Batches(len(dataset), BATCH, 0)(0)
    with Timed() as mapping:
        gather = RowGather(dataset.shard_set.maps(dataset.fields), dataset.size)
        gather_rows(gather, dataset, batches[0])
    for k in range(1, n_batches):
        gather_rows(gather, dataset, batches[k % len(batches)])
    after = _memory()
    return Round(
        open_s=opening.wall_s,
        open_cpu_s=opening.cpu_s,
        order_s=ordering.wall_s,
        first_batch_s=mapping.wall_s,
        opened_bytes=opened["RssAnon"] - before["RssAnon"],
        peak_bytes=opened["VmHWM"] - before["VmRSS"],
        batches_bytes=after["RssAnon"] - before["RssAnon"],
        tables_bytes=after["VmPTE"] - before["VmPTE"],
        n_descriptors=len(os.listdir("/proc/self/fd")),
    )


def gather_rows(gather: RowGather, dataset: ShardDataset, positions: np.ndarray) -> None:
    """A batch as it is stored. Nothing is read ahead: no zeros are made that nobody asked for."""
    rows = dataset.rows_of(positions)
    gather.expect_no_order(dataset.fields, rows)
    gather.into(dataset.fields, rows)


class Timed:
    """`with Timed() as it: ...` -> it.wall_s, it.cpu_s."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.cpu_s = 0.0

    def __enter__(self) -> Timed:
        self.wall_s = -time.perf_counter()
        self.cpu_s = -time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall_s += time.perf_counter()
        self.cpu_s += time.process_time()


def _memory() -> dict[str, int]:
    """Of this process, bytes by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    words = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in words}


def in_new_process(path: Path, n_batches: int) -> Round:
    """The same, in a process of its own."""
    command = [sys.executable, "-m", "bench.many", "--one", str(path), str(n_batches)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Round(**json.loads(done.stdout))


# ---------------------------------------------------------------------------------------- telling

WIDTHS = {
    "shards": 7,
    "files": 7,
    "open s": 8,
    "CPU s": 7,
    "order ms": 9,
    "batch ms": 9,
    "MiB open": 9,
    "peak": 6,
    "batches": 8,
    "tables": 7,
    "open files": 11,
}


def head() -> str:
    """The first line of the table."""
    return " " * 10 + "".join(f"{name:>{width}}" for name, width in WIDTHS.items())


def line_of(name: str, path: Path, rounds: Sequence[Round]) -> str:
    """Medians of the rounds, and what the last one had in the end."""
    last = rounds[-1]
    cells = [
        str(len(list(path.glob("rgb-*.npy")))),
        str(len(list(path.glob("*-[0-9]*.npy")))),
        f"{np.median([each.open_s for each in rounds]):.2f}",
        f"{np.median([each.open_cpu_s for each in rounds]):.2f}",
        f"{1000 * np.median([each.order_s for each in rounds]):.0f}",
        f"{1000 * np.median([each.first_batch_s for each in rounds]):.0f}",
        _mib(last.opened_bytes),
        _mib(last.peak_bytes),
        _mib(last.batches_bytes),
        _mib(last.tables_bytes),
        str(last.n_descriptors),
    ]
    widths = WIDTHS.values()
    row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{name:10}{row}"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f}"


def report_on(root: Path, args: argparse.Namespace) -> None:
    """Both sets, made where they are not there."""
    n_rows = 1000 * args.thousands
    print(
        f"{n_rows} rows at {SIZE}x{SIZE}, {args.rounds} rounds, {args.batches} batches in the last"
    )
    print(head(), flush=True)
    for fields in FIELDS_OF_SETS:
        path = make_sparse(root, fields, n_rows)
        rounds = [in_new_process(path, 1) for _ in range(args.rounds - 1)]
        rounds.append(in_new_process(path, args.batches))
        name = "rgb, depth" if len(fields) == 2 else "all five"
        print(line_of(name, path, rounds), flush=True)


def report(args: argparse.Namespace) -> None:
    """The table; the figures of one process where it is asked for."""
    if args.one:
        path, n_batches = args.one
        print(json.dumps(asdict(measure(Path(path), int(n_batches)))))
        return
    if args.root:
        report_on(args.root, args)
        return
    with tempfile.TemporaryDirectory() as root:
        report_on(Path(root), args)


def make_flags() -> Parser:
    """Those of the command line; one is for the processes that it starts."""
    parser = make_parser("many", __doc__)
    root_help = "keep the sets there (default: a temporary folder)"
    parser.add_argument("root", nargs="?", type=as_path, metavar="DIR", help=root_help)
    add_number(parser, "--thousands", 1000, "thousands of rows")
    add_number(parser, "--rounds", 5, "processes that open each set")
    add_number(parser, "--batches", 1000, "batches of the last round")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
