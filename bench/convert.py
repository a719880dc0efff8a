"""How far converting is from its floor.

    python -m bench.convert X.mat [--pairs 9] [--fields rgb,...] [--profile]

The floor is the least that any converter has to do: every chunk read and unpacked once. Every
method is a process of its own, run in turn (A B C A B C ...), so that drift of the machine hits
all alike.

floor       every chunk read and unpacked once in two threads, in file order, the result dropped;
            the index not counted
whole_load  each field read whole through h5py, then resized row by row with the same rules, saved
row_loop    h5py row by row, resized with the same rules, saved
ours        python -m convert run, to a durable, hashed, finished set
"""

import argparse
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np

from bench.command import add_number, exit_status, make_parser
from bench.figures import median_interval
from convert.resize import Resizer
from convert.sources.chunks import Reader
from convert.sources.nyu_mat import KEYS, Mat
from shards.flags import Parser, as_path
from shards.spec import KNOWN_FIELDS, ConversionSettings

DEFAULT_FIELDS = "rgb,depth,label,instance"
SIZE = 224
CHUNKS_A_READ = 64  # that lie together
SAMPLE_S = 0.5  # the peak memory of the tree is the largest of samples


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method took, in a process of its own."""

    process_s: float  # from its start to its end
    work_s: float  # inside it, without the start of Python
    cpu_s: float
    peak_mib: float  # of the process and its children


# The methods: (source, fields, a place that does not exist yet) -> seconds of the work.


@dataclass(frozen=True, kw_only=True)
class StoredChunk:
    """Where a chunk lies in the file, and who can unpack it."""

    offset: int
    n_bytes: int
    filter_mask: int
    reader: Reader

    @property
    def end(self) -> int:
        return self.offset + self.n_bytes


def floor(source: Path, fields: tuple[str, ...], out: Path) -> float:
    """Read and unpack every chunk once; the index is not counted."""
    mat = Mat(source, fields)
    assert isinstance(mat.handle, int)  # a file here, not one that is read over a network
    readers = [mat.reader(name) for name in fields]
    for reader in readers:
        reader.read_index()
    chunks = [chunk for reader in readers for chunk in _stored_chunks(reader)]
    runs = list(_lying_together(chunks))
    through_hdf5 = [reader for reader in readers if reader.index is None]

    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(_read_and_unpack, mat.handle), runs))
    for reader in through_hdf5:
        for k in range(reader.grid.n_chunks):
            reader.read_through_hdf5(k)
    return time.perf_counter() - started


def _stored_chunks(reader: Reader) -> Iterator[StoredChunk]:
    """Those that were ever written, of a dataset that can be read without HDF5."""
    index = reader.index
    if index is None:
        return
    places = zip(
        index.offset.tolist(), index.n_bytes.tolist(), index.filter_mask.tolist(), strict=True
    )
    for offset, n_bytes, mask in places:
        if offset >= 0:
            yield StoredChunk(offset=offset, n_bytes=n_bytes, filter_mask=mask, reader=reader)


def _lying_together(chunks: Sequence[StoredChunk]) -> Iterator[list[StoredChunk]]:
    """In file order, CHUNKS_A_READ at most without a gap: one read each."""
    run: list[StoredChunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        if run and (chunk.offset != run[-1].end or len(run) == CHUNKS_A_READ):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


def _read_and_unpack(handle: int, run: list[StoredChunk]) -> None:
    """One read, then its chunks one by one, as the converter does."""
    low = run[0].offset
    block = memoryview(os.pread(handle, run[-1].end - low, low))
    for chunk in run:
        stored = block[chunk.offset - low : chunk.end - low]
        chunk.reader.codec.undo_filters(stored, chunk.filter_mask)


def whole_load(source: Path, fields: tuple[str, ...], out: Path) -> float:
    """What people write first: the arrays in RAM, then resized."""
    started = time.perf_counter()
    with h5py.File(source) as file:
        loaded = {name: file[KEYS[name]][()] for name in fields}
        _save_resized(loaded, out)
    return time.perf_counter() - started


def row_loop(source: Path, fields: tuple[str, ...], out: Path) -> float:
    """What a careful user writes: a row read, resized, forgotten."""
    started = time.perf_counter()
    with h5py.File(source) as file:
        on_disk = {name: file[KEYS[name]] for name in fields}
        _save_resized(on_disk, out)
    return time.perf_counter() - started


def _save_resized(rows_of: dict[str, Any], out: Path) -> None:
    """One .npy a field."""
    out.mkdir()
    for name, rows in rows_of.items():
        field = KNOWN_FIELDS[name]
        resizer = Resizer(field=field, size=SIZE)
        small = np.empty((len(rows), *field.row_shape(SIZE)), field.dtype)
        for i in range(len(rows)):
            small[i] = resizer(rows[i])
        np.save(out / f"{name}.npy", small)


def ours(source: Path, fields: tuple[str, ...], out: Path) -> float:
    """The command."""
    started = time.perf_counter()
    from convert.pipeline import convert  # here, as its imports are part of the command's time

    convert(source, out, ConversionSettings(fields))
    return time.perf_counter() - started


Method = Callable[[Path, tuple[str, ...], Path], float]
METHODS: dict[str, Method] = {
    "floor": floor,
    "whole_load": whole_load,
    "row_loop": row_loop,
    "ours": ours,
}
EVERY_ROUND = ("floor", "ours")  # the others are slow: --slow-pairs


# A method in a process of its own.


def run_once(method: str, source: Path, fields: str) -> Cost:
    """The cost of a method in a fresh process; what it makes is removed."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=source.parent))
    one = ["--fields", fields, "--one", method, "--out", str(folder / "o")]
    command = [sys.executable, "-m", "bench.convert", str(source), *one]

    started = time.perf_counter()
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True)
    assert process.stdout
    peak_mib = 0.0
    while not select.select([process.stdout], [], [], SAMPLE_S)[0]:
        peak_mib = max(peak_mib, tree_mib(process.pid))
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # not process.wait(): this tells the CPU time too
    process_s = time.perf_counter() - started

    process.returncode = os.waitstatus_to_exitcode(status)
    shutil.rmtree(folder)
    if process.returncode:
        raise SystemExit(f"{method} failed: {' '.join(command)}")
    return Cost(
        process_s=process_s,
        work_s=float(text.split()[-1]),
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_mib=peak_mib,
    )


def tree_mib(pid: int) -> float:
    """MiB that a process and its children have now, shared pages once; mapped files too."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        texts = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in (pid, *children)]
    except OSError:  # one has just ended
        return 0
    kib = 0
    for text in texts:
        for line in text.splitlines()[1:]:
            words = line.split()
            if words[0] == "Pss:":
                kib += int(words[1])
    return kib / 1024


# The tables.


def table(runs: dict[str, list[Cost]]) -> Iterator[str]:
    """A line a method, then how the whole processes compare."""
    floor_s = [cost.work_s for cost in runs["floor"]]
    ours_s = [cost.process_s for cost in runs["ours"]]

    columns = f"{'process s':>10} {'work s':>8} {'CPU s':>7} {'peak MiB':>9}"
    yield f"{'method':<12} {columns}   work / floor's, pair by pair"
    for name, costs in runs.items():
        process_s = statistics.median(cost.process_s for cost in costs)
        work_s = statistics.median(cost.work_s for cost in costs)
        cpu_s = statistics.median(cost.cpu_s for cost in costs)
        peak_mib = statistics.median(cost.peak_mib for cost in costs)
        figures = f"{process_s:>10.2f} {work_s:>8.2f} {cpu_s:>7.2f} {peak_mib:>9.0f}"
        yield f"{name:<12} {figures}   {_ratio([cost.work_s for cost in costs], floor_s)}"

    for name in ("whole_load", "row_loop"):
        if name in runs:
            ratio = _ratio([cost.process_s for cost in runs[name]], ours_s)
            yield f"{name} / ours, whole processes: {ratio}"
    yield f"ours with process start / floor's work: {_ratio(ours_s, floor_s)}"


def _ratio(of: list[float], to: list[float]) -> str:
    """The median ratio with its interval, over as many rounds as both took part in."""
    found = median_interval([one / other for one, other in zip(of, to, strict=False)])
    return f"{found.median:5.2f} ({found.low:.2f}-{found.high:.2f})"


# Where the time of `ours` goes.


@dataclass(frozen=True)
class Call:
    """The time that one call took."""

    cpu_s: float  # of the thread that ran it
    wall_s: float


class Clock:
    """The calls of one stage. From any thread: to append is one step, to add to a sum is not."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @property
    def cpu_s(self) -> float:
        return sum(call.cpu_s for call in self.calls)

    @property
    def wall_s(self) -> float:
        return sum(call.wall_s for call in self.calls)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            cpu = time.thread_time()
            wall = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                cpu_s = time.thread_time() - cpu
                wall_s = time.perf_counter() - wall
                self.calls.append(Call(cpu_s, wall_s))

        return timed


class Clocks:
    """One a stage, in the order of the table."""

    def __init__(self) -> None:
        self.by_stage: dict[str, Clock] = {}

    def put_around(self, stage: str, owner: ModuleType | type, name: str) -> None:
        """Time every call of this function of a module or class."""
        clock = self.by_stage[stage] = Clock()
        setattr(owner, name, clock.around(getattr(owner, name)))

    def put_around_resize(self, fields: Sequence[str]) -> None:
        """The resizer's call, a stage for each field."""
        resize = Resizer.__call__
        resizes = {}
        for name in fields:
            clock = self.by_stage[f"resize {name}"] = Clock()
            resizes[name] = clock.around(resize)
        owner: Any = Resizer
        owner.__call__ = lambda resizer, row: resizes[resizer.field.name](resizer, row)


def profile(source: Path, fields: tuple[str, ...], out: Path) -> None:
    """Convert with one worker, in this process, a clock around each stage; print the table.

    A stage's CPU time is that of the thread that ran it, so `rest` is what no clock was around.
    """
    from convert import pipeline, shard
    from convert.sources import chunk_codec
    from convert.sources.chunk_codec import FileBytes
    from convert.sources.nyu import NyuSource

    clocks = Clocks()
    clocks.put_around("index", Reader, "read_index")
    clocks.put_around("names and per-row facts", NyuSource, "row_facts")
    clocks.put_around("read", FileBytes, "read")
    clocks.put_around("inflate", chunk_codec, "inflate")
    clocks.put_around_resize(fields)
    clocks.put_around("statistics", shard, "train_sums")
    clocks.put_around("hash, write, fsync", shard, "write_field")

    cpu = time.process_time()
    wall = time.perf_counter()
    pipeline.convert(source, out, ConversionSettings(fields), workers=1)
    whole = Call(time.process_time() - cpu, time.perf_counter() - wall)

    print(f"{'stage':<30} {'CPU s':>7} {'share':>6} {'thread s':>9} {'calls':>7}")
    for stage, clock in clocks.by_stage.items():
        print(_profile_line(stage, Call(clock.cpu_s, clock.wall_s), len(clock.calls), whole))
    in_stages_s = sum(clock.cpu_s for clock in clocks.by_stage.values())
    rest = Call(whole.cpu_s - in_stages_s, 0)
    print(_profile_line("rest: Python, threads, copies", rest, 0, whole))
    print(_profile_line("work in all", whole, 1, whole))


def _profile_line(stage: str, spent: Call, n_calls: int, whole: Call) -> str:
    share = spent.cpu_s / whole.cpu_s
    figures = f"{spent.cpu_s:>7.2f} {share:>6.1%} {spent.wall_s:>9.2f} {n_calls:>7}"
    return f"{stage:<30} {figures}"


# The command.


def report(args: argparse.Namespace) -> None:
    """Every method in turn, then the tables."""
    fields = tuple(args.fields.split(","))
    if args.one:
        print(METHODS[args.one](args.source, fields, args.out))
        return

    methods = args.methods.split(",")
    runs: dict[str, list[Cost]] = {name: [] for name in methods}
    for k in range(args.pairs):
        for name in methods:
            if name in EVERY_ROUND or k < args.slow_pairs:
                runs[name].append(run_once(name, args.source, args.fields))
        print(f"round {k + 1} of {args.pairs}", file=sys.stderr)
    print("\n".join(table(runs)))

    if args.profile:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=args.source.parent) as folder:
            profile(args.source, fields, Path(folder) / "o")


def make_flags() -> Parser:
    """Those of the command line; two are for the processes that it starts."""
    parser = make_parser("convert", __doc__)
    parser.add_argument("source", type=as_path, metavar="X.mat", help="the file to convert")
    add_number(parser, "--pairs", 9, "rounds of every method")
    add_number(parser, "--slow-pairs", 3, "of these, rounds of whole_load and row_loop")
    parser.add_argument(
        "--profile", action="store_true", help="also say where our time goes, by stage"
    )
    fields_help = "which fields are converted (default: %(default)s)"
    parser.add_argument("--fields", default=DEFAULT_FIELDS, metavar="A,B,...", help=fields_help)
    methods_help = "those to run, by name (default: %(default)s)"
    every = ",".join(METHODS)
    parser.add_argument("--methods", default=every, metavar="A,B,...", help=methods_help)
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
