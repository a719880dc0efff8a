"""How far converting is from its floor: python -m bench.convert X.mat [--pairs 9] [--fields images,...]

Every method is a process of its own, run in turn (A B C A B C ...), so that drift of the machine hits all alike.

floor       every chunk read and inflated once in two threads, the result dropped
whole load  each field read whole through h5py, then resized row by row with the same rules, saved
row loop    h5py row by row, resized with the same rules, saved
ours        python -m convert run, to a durable, hashed, finished set
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from convert.chunks import inflate
from convert.format import FIELDS, Settings, row_shape
from convert.mat import KEYS, Mat
from convert.resize import resize

DEFAULT_FIELDS = "rgb,depth,label,instance"
BATCH = 64


def floor(source: Path, fields: tuple[str, ...], out: Path) -> None:
    """Read and inflate every chunk once."""
    mat = Mat(source, fields)
    with ThreadPoolExecutor(2) as pool:
        for name in fields:
            reader = mat.reader(name)
            index = reader._locate()
            if index is None:
                raise SystemExit(f"{KEYS[name]} is not chunked with gzip: there is no floor to measure")
            order = np.argsort(index.offset, kind="stable")

            def work(ks: np.ndarray, index=index, size: int = reader.chunk_bytes) -> None:  # type: ignore[no-untyped-def]
                low, high = int(index.offset[ks[0]]), int(index.offset[ks[-1]] + index.n_bytes[ks[-1]])
                block = memoryview(os.pread(mat.handle, high - low, low))
                for k in ks.tolist():
                    begin = int(index.offset[k]) - low
                    inflate(block[begin : begin + int(index.n_bytes[k])], size)

            list(pool.map(work, [order[i : i + BATCH] for i in range(0, len(order), BATCH)]))


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
    from convert.write import convert

    convert(source, out, Settings(fields))


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
    text = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    shutil.rmtree(out)
    if process.returncode:
        raise SystemExit(f"{method} failed: {' '.join(command)}")
    return seconds, float(text.split()[-1]), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def interval(ratios: list[float]) -> str:
    """The median with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return f"{statistics.median(ratios):5.2f} ({np.quantile(medians, 0.025):.2f}-{np.quantile(medians, 0.975):.2f})"


def table(runs: dict[str, list[tuple[float, float, float, float]]]) -> Iterator[str]:
    yield f"{'method':<12} {'process s':>10} {'work s':>8} {'CPU s':>7} {'peak MiB':>9}   work / floor's, pair by pair"
    for name, values in runs.items():
        process, work, cpu, peak = (statistics.median(v[k] for v in values) for k in range(4))
        ratios = [v[1] / f[1] for v, f in zip(values, runs["floor"], strict=True)]
        yield f"{name:<12} {process:>10.2f} {work:>8.2f} {cpu:>7.2f} {peak:>9.0f}   {interval(ratios)}"
    for name in ("whole_load", "row_loop"):
        if name in runs:
            ratios = [v[0] / o[0] for v, o in zip(runs[name], runs["ours"], strict=True)]
            yield f"{name} / ours, whole processes: {interval(ratios)}"
    ratios = [o[0] / f[1] for o, f in zip(runs["ours"], runs["floor"], strict=True)]
    yield f"ours with process start / floor's work: {interval(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--fields", default=DEFAULT_FIELDS)
    parser.add_argument("--methods", default=",".join(METHODS), help="floor and ours, and others to compare with")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        started = time.perf_counter()
        METHODS[args.one](args.source, tuple(args.fields.split(",")), args.out)
        print(time.perf_counter() - started)
        return
    methods = args.methods.split(",")
    runs: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in methods}
    for k in range(args.pairs):
        for name in methods:
            runs[name].append(run_once(name, args.source, args.fields))
        print(f"round {k + 1} of {args.pairs}", file=sys.stderr)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
