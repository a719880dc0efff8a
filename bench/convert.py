"""How far converting is from its floor: python -m bench.convert X.mat [--pairs 9] [--fields rgb,...] [--profile]

Every method is a process of its own, run in turn (A B C A B C ...), so that drift of the machine hits all alike.

floor       every chunk read and unpacked once in two threads, in file order, the result dropped; the index not counted
whole load  each field read whole through h5py, then resized row by row with the same rules, saved
row loop    h5py row by row, resized with the same rules, saved
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convert.resize import resize
from convert.sources.chunks import Reader
from convert.sources.nyu_mat import KEYS, Mat
from shards.format import FIELDS, Settings, row_shape

DEFAULT_FIELDS = "rgb,depth,label,instance"
RUN = 64  # chunks that lie together, in one read
SAMPLE_S = 0.5  # the peak memory of the tree is the largest of samples


def floor(source: Path, fields: tuple[str, ...], out: Path) -> float:
    """Read and unpack every chunk once; the seconds that took, the index not counted."""
    mat = Mat(source, fields)
    readers = [mat.reader(name) for name in fields]
    for reader in readers:
        reader.read_index()
    indices = [reader.index for reader in readers]
    chunks = [
        (int(o), int(n), int(m), reader)
        for reader, index in zip(readers, indices, strict=True)
        if index is not None
        for o, n, m in zip(index.offset, index.n_bytes, index.filter_mask, strict=True)
        if o >= 0
    ]
    chunks.sort(key=lambda c: c[0])
    runs: list[list[tuple[int, int, int, Reader]]] = []
    for chunk in chunks:
        last = runs[-1][-1] if runs else None
        if last and chunk[0] == last[0] + last[1] and len(runs[-1]) < RUN:
            runs[-1].append(chunk)
        else:
            runs.append([chunk])

    def work(run: list[tuple[int, int, int, Reader]]) -> None:
        low = run[0][0]
        block = memoryview(os.pread(mat.handle, run[-1][0] + run[-1][1] - low, low))
        for offset, n_bytes, mask, reader in run:
            reader.codec.undo_filters(block[offset - low : offset - low + n_bytes], mask)

    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, runs))
    for reader, index in zip(readers, indices, strict=True):
        for k in range(0 if index else reader.grid.n_chunks):
            reader.read_through_hdf5(k)
    return time.perf_counter() - started


def _save(source: Path, fields: tuple[str, ...], out: Path, whole: bool) -> None:
    import h5py

    out.mkdir()
    with h5py.File(source) as file:
        loaded = {name: file[KEYS[name]][()] if whole else file[KEYS[name]] for name in fields}
        for name, rows in loaded.items():
            small = np.empty((len(rows), *row_shape(name, 224)), FIELDS[name]["dtype"])
            for i in range(len(rows)):
                small[i] = resize(name, rows[i], 224, "none", "nearest")
            np.save(out / f"{name}.npy", small)


def whole_load(source: Path, fields: tuple[str, ...], out: Path) -> None:
    """What the note does: the arrays in memory, then resized."""
    _save(source, fields, out, True)


def row_loop(source: Path, fields: tuple[str, ...], out: Path) -> None:
    """What a careful user writes."""
    _save(source, fields, out, False)


def ours(source: Path, fields: tuple[str, ...], out: Path) -> None:
    """The command."""
    from convert.pipeline import convert

    convert(source, out, Settings(fields))


def profile(source: Path, fields: tuple[str, ...], out: Path) -> None:
    """A clock around each stage of one worker in this process: CPU seconds of the thread that runs it, and seconds."""
    from convert import decode
    from convert import pipeline as write
    from convert.sources import chunk_codec

    stages = [
        ("index", Reader, "read_index"),
        ("names and per-row facts", write, "row_columns"),
        ("read", chunk_codec.FileBytes, "read"),
        ("inflate", chunk_codec, "inflate"),
        *((f"resize {name}", None, name) for name in fields),
        ("statistics", write, "train_sums"),
        ("hash, write, fsync", write, "write_shard"),
    ]
    spent: dict[str, list[float]] = {name: [] for name, _, _ in stages}
    walls: dict[str, list[float]] = {name: [] for name, _, _ in stages}

    def clocked(function: Callable[..., Any], stage: str | None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            cpu, wall = time.thread_time(), time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                name = stage or f"resize {args[0]}"
                spent[name].append(time.thread_time() - cpu)
                walls[name].append(time.perf_counter() - wall)

        return run

    for name, owner, attribute in stages:
        if owner is not None:
            setattr(owner, attribute, clocked(getattr(owner, attribute), name))
    decode.resize = clocked(decode.resize, None)  # type: ignore[assignment]
    before, started = time.process_time(), time.perf_counter()
    write.convert(source, out, Settings(fields), workers=1)
    total, seconds = time.process_time() - before, time.perf_counter() - started
    lines = [(name, sum(spent[name]), sum(walls[name]), len(spent[name])) for name in spent]
    lines.append(("rest: Python, threads, copies", total - sum(cpu for _, cpu, _, _ in lines), 0, 0))
    print(f"{'stage':<30} {'CPU s':>7} {'share':>6} {'thread s':>9} {'calls':>7}")
    for name, cpu, wall, calls in [*lines, ("work in all", total, seconds, 1)]:
        print(f"{name:<30} {cpu:>7.2f} {cpu / total:>6.1%} {wall:>9.2f} {calls:>7}")


METHODS = {f.__name__: f for f in (floor, whole_load, row_loop, ours)}


def run_once(method: str, source: Path, fields: str) -> tuple[float, float, float, float]:
    """(seconds of the process, seconds of the work inside it, CPU seconds, peak MiB) of one fresh process."""
    out = Path(tempfile.mkdtemp(prefix="bench-", dir=source.parent))
    command = [
        sys.executable,
        "-m",
        "bench.convert",
        str(source),
        "--fields",
        fields,
        "--one",
        method,
        "--out",
        str(out / "o"),
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peaks = [0.0]
    while not select.select([process.stdout], [], [], SAMPLE_S)[0]:
        peaks.append(tree_mib(process.pid))
    text = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    shutil.rmtree(out)
    if process.returncode:
        raise SystemExit(f"{method} failed: {' '.join(command)}")
    return seconds, float(text.split()[-1]), usage.ru_utime + usage.ru_stime, max(peaks)


def tree_mib(pid: int) -> float:
    """MiB that a process and its children have now, shared pages once; mapped files too."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        texts = [Path(f"/proc/{p}/smaps_rollup").read_text() for p in (pid, *children)]
    except OSError:  # one has just ended
        return 0
    lines = [line.split() for text in texts for line in text.splitlines()[1:]]
    return sum(int(words[1]) for words in lines if words[0] == "Pss:") / 1024


def interval(ratios: list[float]) -> str:
    """The median with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return f"{statistics.median(ratios):5.2f} ({np.quantile(medians, 0.025):.2f}-{np.quantile(medians, 0.975):.2f})"


def table(runs: dict[str, list[tuple[float, float, float, float]]]) -> Iterator[str]:
    yield f"{'method':<12} {'process s':>10} {'work s':>8} {'CPU s':>7} {'peak MiB':>9}   work / floor's, pair by pair"
    for name, values in runs.items():
        process, work, cpu, peak = (statistics.median(v[k] for v in values) for k in range(4))
        ratios = [v[1] / f[1] for v, f in zip(values, runs["floor"], strict=False)]
        yield f"{name:<12} {process:>10.2f} {work:>8.2f} {cpu:>7.2f} {peak:>9.0f}   {interval(ratios)}"
    for name in ("whole_load", "row_loop"):
        if name in runs:
            ratios = [v[0] / o[0] for v, o in zip(runs[name], runs["ours"], strict=False)]
            yield f"{name} / ours, whole processes: {interval(ratios)}"
    ratios = [o[0] / f[1] for o, f in zip(runs["ours"], runs["floor"], strict=True)]
    yield f"ours with process start / floor's work: {interval(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--slow-pairs", type=int, default=3, help="rounds of whole_load and row_loop")
    parser.add_argument("--profile", action="store_true", help="also say where our time goes, by stage")
    parser.add_argument("--fields", default=DEFAULT_FIELDS)
    parser.add_argument("--methods", default=",".join(METHODS), help="floor and ours, and others to compare with")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        started = time.perf_counter()
        seconds = METHODS[args.one](args.source, tuple(args.fields.split(",")), args.out)
        print(seconds or time.perf_counter() - started)
        return
    methods = args.methods.split(",")
    runs: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in methods}
    for k in range(args.pairs):
        for name in methods if k < args.slow_pairs else [m for m in methods if m in ("floor", "ours")]:
            runs[name].append(run_once(name, args.source, args.fields))
        print(f"round {k + 1} of {args.pairs}", file=sys.stderr)
    print("\n".join(table(runs)))
    if args.profile:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=args.source.parent) as folder:
            profile(args.source, tuple(args.fields.split(",")), Path(folder) / "o")


if __name__ == "__main__":
    main()
