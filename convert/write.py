"""From an open .mat to a finished set: decode and resize in threads, one ordered writer, the manifest last.

Two shards of memory at most: one being filled, one being written. A shard is hashed, fsynced and renamed before its
receipt is written; a run that was killed resumes after the last receipt and ends byte-identical.
"""

import json
import os
import platform
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import format as fmt
from .format import FIELDS, Settings, UserError
from .lock import only_one
from .mat import KEYS, Mat, Reader, sampled_identity
from .pack import Codecs, already, write_rest, write_shard
from .resize import resize
from .tables import row_columns

ROWS_PER_TASK = 8


def receipt_name(shard: int) -> str:
    return f"receipt-{shard:05d}.json"


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def convert(source: Path, root: Path, settings: Settings, workers: int | None = None, codecs: Codecs = None) -> Path:
    """Convert `source` into a directory under `root` and return it; a finished one is returned as it is.

    Raises UserError for anything a user can mend. Peak memory is about 2 shards plus a few rows.
    """
    started = time.perf_counter()
    mat = Mat(source, settings.fields)
    try:
        identity = sampled_identity(source)
        digest = fmt.fingerprint(settings, identity)
        directory = root / fmt.directory_name(settings, digest, codecs is not None)
        if already(directory, codecs):
            _remove_receipts(directory)  # a run killed just after its commit leaves them
            log(f"{directory} is already there and complete: nothing to do")
            return directory
        _make_directory(root)
        with only_one(root, directory.name):
            _make_directory(directory)
            columns, names = row_columns(mat, log)
            job = Job(mat, directory, settings, columns["split"] == 0, codecs)
            job.run(workers or len(os.sched_getaffinity(0)))
            if sampled_identity(source) != identity:
                raise UserError(f"{source} changed while it was read. Delete {directory}, then run: make convert")
            manifest = _manifest(job, identity, digest, names)
            seconds = time.perf_counter() - started
            fmt.write_json(directory / fmt.PROVENANCE, _provenance(source, seconds))
            write_rest(directory, manifest, columns, codecs)
            _remove_receipts(directory)
    finally:
        mat.close()
    log(f"{job.n_rows} rows in {seconds:.1f} s, peak memory {peak_memory() / 2**20:.0f} MiB")
    return directory


def _remove_receipts(directory: Path) -> None:
    for receipt in directory.glob("receipt-*.json"):
        receipt.unlink(missing_ok=True)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be made ({error.strerror}). Run: make convert OUT=/a/writable/directory"
        ) from None


def peak_memory() -> int:
    """Bytes: the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _manifest(job: "Job", identity: dict[str, Any], digest: str, names: dict[str, Any]) -> dict[str, Any]:
    settings = job.settings
    return {
        "format_version": fmt.FORMAT_VERSION,
        "fingerprint": digest,
        "source": identity,
        "settings": settings.to_dict(),
        "rows": job.n_rows,
        "fields": {
            name: {
                **{k: FIELDS[name][k] for k in ("dtype", "unit", "invalid")},
                "shape": list(fmt.row_shape(name, settings.size)),
                "statistics": statistics(name, [r["sums"] for r in job.receipts]),
            }
            for name in settings.fields
        },
        "shards": [{"rows": r["rows"], "files": r["files"]} for r in job.receipts],
        "names": names,
    }


def _provenance(source: Path, seconds: float) -> dict[str, Any]:
    packages = {}
    for name in ("nyuv2-shards", "numpy", "h5py", "torch", "deflate"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    return {
        "command": " ".join(sys.argv),
        "source_path": str(source),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
        "python": platform.python_version(),
        "versions": packages,
    }


# ---------------------------------------------------------------- statistics from integer sums


def row_sums(name: str, row: np.ndarray) -> list[list[int]]:
    """[count, sum, sum of squares] a channel over the row's valid pixels; exact (float64 holds them as integers)."""
    if name in ("label", "instance"):
        return []
    planes = row.reshape(3 if name == "rgb" else 1, -1).astype(np.float64)
    return [
        [int(p.size if name == "rgb" else np.count_nonzero(p)), int(p.sum()), int(np.square(p).sum())] for p in planes
    ]


def add_sums(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
    return [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)] if a else b


def statistics(name: str, shard_sums: list[dict[str, list[list[int]]]]) -> dict[str, Any] | None:
    """Mean and standard deviation a channel over the train rows' valid pixels; None for ids and empty train splits."""
    total: list[list[int]] = []
    for sums in shard_sums:
        total = add_sums(total, sums[name]) if sums.get(name) else total
    if not total or not all(count for count, _, _ in total):
        return None
    means = [s / n for n, s, _ in total]
    stds = [max(0.0, (q - s * s / n) / n) ** 0.5 for n, s, q in total]
    return {"count": [n for n, _, _ in total], "mean": means, "std": stds}


# ---------------------------------------------------------------- the work


@dataclass
class Shard:
    """One shard being filled: its buffers, how many rows of how many fields are still to come, its sums."""

    number: int
    start: int
    stop: int
    buffers: dict[str, np.ndarray]
    remaining: int
    sums: dict[str, list[list[int]]]


class Job:
    """The decoding, resizing and writing of all shards that have no valid receipt."""

    def __init__(
        self, mat: Mat, directory: Path, settings: Settings, is_train: np.ndarray, codecs: Codecs = None
    ) -> None:
        self.mat, self.directory, self.settings, self.is_train, self.codecs = mat, directory, settings, is_train, codecs
        self.n_rows = mat.n_rows
        step = settings.rows_per_shard
        self.bounds = [(lo, min(lo + step, self.n_rows)) for lo in range(0, self.n_rows, step)]
        self.done = {k: r for k in range(len(self.bounds)) if (r := self._valid_receipt(k))}
        self.open: dict[int, Shard] = {}
        self.free: list[dict[str, np.ndarray]] = []
        self.lock = threading.Lock()

    @property
    def receipts(self) -> list[dict[str, Any]]:
        return [self.done[k] for k in range(len(self.bounds))]

    def _valid_receipt(self, shard: int) -> dict[str, Any] | None:
        try:
            receipt: dict[str, Any] = json.loads((self.directory / receipt_name(shard)).read_text())
            if receipt["rows"] != list(self.bounds[shard]) or receipt["codecs"] != self.codecs:
                return None
            for name, facts in receipt["files"].items():
                if fmt.sha256_file(self.directory / name) != facts["sha256"]:
                    return None
            return receipt
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def run(self, workers: int) -> None:
        self._remove_leftovers()
        self._check_space()
        if self.done:
            log(f"{len(self.done)} of {len(self.bounds)} shards are done already: going on from there")
        readers = {name: self.mat.reader(name) for name in self.settings.fields}
        self._fill_scratch(readers)
        n_todo = sum(hi - lo for k, (lo, hi) in enumerate(self.bounds) if k not in self.done)
        bar = tqdm(total=n_todo, initial=0, unit="row", desc="convert", disable=None, smoothing=0.05)
        pool, writer = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)
        try:
            self._work(readers, pool, writer, workers, bar)
        finally:
            pool.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
            bar.close()

    def _work(self, readers: dict[str, Reader], pool: Any, writer: Any, workers: int, bar: Any) -> None:
        """Keep the pool busy, hand each filled shard to the writer, hold two shards, or as many as one task spans."""
        step = self.settings.rows_per_shard
        most_rows = max(max(r.group_rows, ROWS_PER_TASK) for r in readers.values())
        limit = max(2, (most_rows - 2) // step + 2)  # so many shards can one task touch
        pending: set[Future[None]] = set()
        writes: dict[int, Future[None]] = {}
        for name, groups in self._tasks(readers):
            reader = readers[name]
            for k in self._shards_of(reader, groups):
                while k not in self.open and len(self.open) >= limit:
                    pending = self._collect(pending, writes, writer, bar)
                if k not in self.open:
                    self._open_shard(k)
            pending.add(pool.submit(self._do, name, reader, groups))
            while len(pending) >= 8 * workers:
                pending = self._collect(pending, writes, writer, bar)
        while pending or self.open:
            pending = self._collect(pending, writes, writer, bar)

    def _collect(self, pending: set[Any], writes: dict[int, Any], writer: Any, bar: Any) -> set[Any]:
        """Wait until something ends; start writing the shards that are full; drop those that are written."""
        for k, shard in list(self.open.items()):
            if shard.remaining == 0 and k not in writes:
                writes[k] = writer.submit(self._write, shard)
        done, _ = wait(pending | set(writes.values()), return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        for k in [k for k, future in writes.items() if future in done]:
            del writes[k]
            shard = self.open.pop(k)
            self.free.append(shard.buffers)
            bar.update(shard.stop - shard.start)
            if bar.disable:
                log(f"shard {k + 1} of {len(self.bounds)}: rows {shard.start}..{shard.stop - 1}")
        return pending - done

    def _tasks(self, readers: dict[str, Reader]) -> Iterator[tuple[str, range]]:
        """(field, groups of rows), in row order, leaving out what only finished shards need."""
        tasks = []
        for name, reader in readers.items():
            step = max(1, ROWS_PER_TASK // reader.group_rows)
            n_groups = -(-self.n_rows // reader.group_rows)
            for g in range(0, n_groups, step):
                groups = range(g, min(g + step, n_groups))
                if self._shards_of(reader, groups):
                    tasks.append((g * reader.group_rows, name, groups))
        order = list(self.settings.fields)
        for _, name, groups in sorted(tasks, key=lambda t: (t[0], order.index(t[1]))):
            yield name, groups

    def _shards_of(self, reader: Reader, groups: range) -> list[int]:
        """The unfinished shards that the groups' rows fall in."""
        step = self.settings.rows_per_shard
        first = groups.start * reader.group_rows
        last = min(groups.stop * reader.group_rows, self.n_rows) - 1
        return [k for k in range(first // step, last // step + 1) if k not in self.done]

    def _open_shard(self, k: int) -> None:
        start, stop = self.bounds[k]
        buffers = (
            self.free.pop()
            if self.free
            else {
                name: np.empty(
                    (self.settings.rows_per_shard, *fmt.row_shape(name, self.settings.size)), FIELDS[name]["dtype"]
                )
                for name in self.settings.fields
            }
        )
        self.open[k] = Shard(k, start, stop, buffers, (stop - start) * len(self.settings.fields), {})

    def _do(self, name: str, reader: Reader, groups: range) -> None:
        """Decode some groups of one field and resize their rows into their shards."""
        for group in groups:
            first = group * reader.group_rows
            try:
                rows = reader.read_group(group)
            except (ValueError, OSError, RuntimeError) as error:
                raise UserError(self._bad(name, first, error)) from None
            for i, row in enumerate(rows):
                self._place(name, first + i, row)

    def _place(self, name: str, row_number: int, row: np.ndarray) -> None:
        shard = self.open.get(row_number // self.settings.rows_per_shard)
        if shard is None:  # finished in an earlier run
            return
        try:
            small = resize(name, row, self.settings.size, self.settings.crop, self.settings.depth_resize)
        except ValueError as error:
            raise UserError(self._bad(name, row_number, error)) from None
        stored = shard.buffers[name][row_number - shard.start]
        stored[...] = small
        sums = row_sums(name, stored) if self.is_train[row_number] else []
        with self.lock:
            shard.remaining -= 1
            if sums:
                shard.sums[name] = add_sums(shard.sums.get(name, []), sums)

    def _bad(self, name: str, row: int, error: BaseException) -> str:
        text = " ".join(str(error).split())[:200]
        return f"{self.mat.path}: {KEYS[name]} row {row}: {text}. Download the file again, then run: make convert"

    def _write(self, shard: Shard) -> None:
        """Make a full shard durable, then its receipt."""
        n, n_slots = shard.stop - shard.start, self.settings.rows_per_shard
        files: dict[str, Any] = {}
        for field, rows in shard.buffers.items():
            files |= write_shard(self.directory, field, shard.number, rows[:n], n_slots, self.codecs)
        receipt = {"rows": [shard.start, shard.stop], "codecs": self.codecs, "files": files, "sums": shard.sums}
        fmt.write_json(self.directory / receipt_name(shard.number), receipt)
        self.done[shard.number] = receipt

    def _remove_leftovers(self) -> None:
        for path in self.directory.rglob(".*.tmp"):
            path.unlink()

    def _check_space(self) -> None:
        n_rows = sum(hi - lo for k, (lo, hi) in enumerate(self.bounds) if k not in self.done)
        row = sum(
            int(np.prod(fmt.row_shape(f, self.settings.size))) * np.dtype(FIELDS[f]["dtype"]).itemsize
            for f in self.settings.fields
        )
        need, free = n_rows * row + (8 << 20), shutil.disk_usage(self.directory).free
        if need > free:
            raise UserError(
                f"{self.directory.parent} has {free / 1e6:.0f} MB free, the shards need {need / 1e6:.0f} MB. "
                "Free some, or run: make convert OUT=/another/disk"
            )

    def _fill_scratch(self, readers: dict[str, Reader]) -> None:
        """Fields whose chunks span too many rows to hold go through a scratch file, each chunk inflated once."""
        for name, reader in readers.items():
            if reader.needs_scratch():
                log(f"{KEYS[name]} is chunked across rows: unpacking it into a scratch file first")
                reader.fill_scratch(self.directory / f".scratch-{name}.tmp")
