"""From an open .mat to a finished set: rows decoded in helper processes, one ordered writer, the manifest last.

Two shards of memory at most: one being filled, one being written. A shard is hashed, fsynced and renamed before its
receipt is written; a run that was killed resumes after the last receipt and ends byte-identical.
"""

import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.commit import check_space, find_set, is_finished, receipt_name, remove_receipts, resume, stamp
from convert.decode import Buffers, Decoder, Helper
from convert.machine import memory_of, n_cores
from convert.repack import CODECS, write_rest, write_shard
from convert.sources.chunks import Reader
from convert.sources.hdf5 import HDF5, Hdf5Thread
from convert.sources.nyu_mat import KEYS, LOOK_FIRST, Elsewhere, Mat, Source, sampled_identity
from convert.sources.nyu_tables import row_columns
from shards import format as fmt
from shards.format import FIELDS, Codecs, Settings, UserError, log
from shards.lock import only_one

ROWS_PER_TASK = 8
HELPERS_FROM = 256 << 20  # bytes to unpack; a helper takes 0.2 s to start
MAX_WORKERS = 256
Pool = ThreadPoolExecutor | Hdf5Thread


def convert(
    source: Source | str,
    root: Path | str,
    settings: Settings,
    workers: int | None = None,
    codecs: Codecs = None,
    *,
    repair: bool = False,
) -> Path:
    """Convert `source` into a directory under `root` and return it; a finished one is returned as it is.

    With `repair` a finished one is checked byte for byte, and the shards that are wrong are made again. Raises
    UserError for anything a user can mend. Peak memory is about 2 shards plus a few rows.
    """
    _check_arguments(settings, workers, codecs)
    mat: Source = source if isinstance(source, Elsewhere) else _path("source", source)
    return _convert(mat, _path("root", root), settings, workers, codecs, repair)


def _convert(source: Source, root: Path, settings: Settings, workers: int | None, codecs: Codecs, repair: bool) -> Path:
    started = time.perf_counter()
    form = ".zarr" if codecs else ""
    if not source.exists() and (found := find_set(root, settings, {"name": source.name}, form)):
        log(f"{source} is not there, nor needed: {fmt.open_set(found).path} is complete")
        return found
    mat = Mat(source, settings.fields, settings.axes)
    try:
        settings = mat.plain(settings)
        mat.check_crop(settings.crop)
        before, identity = stamp(source), sampled_identity(source)
        digest = fmt.fingerprint(settings, identity)
        directory = root / fmt.directory_name(settings, digest, codecs is not None)
        if not repair and is_finished(directory, digest, codecs):
            return directory
        with only_one(root, directory.name):
            if is_finished(directory, digest, codecs, repair):  # by another run, meanwhile
                return directory
            directory.mkdir(exist_ok=True)
            remove_receipts(directory, older_than=before[-1])
            job = Job(mat, directory, settings, codecs)
            columns, names = job.run(workers or n_cores())
            if (stamp(source), sampled_identity(source)) != (before, identity):
                remove_receipts(directory)
                raise UserError(f"{source} changed while it was read. When it is whole, run: make convert")
            manifest = _manifest(job, identity, digest, names)
            seconds = time.perf_counter() - started
            fmt.write_json(directory / fmt.PROVENANCE, _provenance(source, seconds, job.peak_memory))
            write_rest(directory, manifest, columns, codecs)
            remove_receipts(directory)
    finally:
        mat.close()
    log(f"{job.n_rows} rows in {seconds:.1f} s, peak memory {fmt.mebibytes(job.peak_memory)}")
    return directory


def _path(name: str, given: Any) -> Path:
    if not isinstance(given, str | Path) or not str(given) or "\0" in str(given):
        raise UserError(f"{name} {given!r}: expected a path")
    return Path(given)


def _check_arguments(settings: Settings, workers: int | None, codecs: Codecs) -> None:
    """Before anything is opened: a mistake from Python shows as one line too."""
    if not isinstance(settings, Settings):
        raise UserError(f"settings {settings!r}: expected convert.format.Settings(...)")
    if workers is not None and (not fmt.is_whole(workers) or not 1 <= workers <= MAX_WORKERS):
        raise UserError(f"workers {workers!r}: choose 1 to {MAX_WORKERS}, or None for one a core")
    if codecs is not None and not (isinstance(codecs, dict) and codecs.keys() == set(settings.fields)):
        raise UserError(f"codecs {codecs!r}: expected a codec for each of {','.join(settings.fields)}, or None")
    if unknown := [codec for codec in (codecs or {}).values() if codec not in CODECS]:
        raise UserError(f"codec {unknown[0]!r}: choose one of {', '.join(CODECS)}")


def _manifest(job: "Job", identity: dict[str, Any], digest: str, names: dict[str, Any]) -> dict[str, Any]:
    settings, receipts = job.settings, [job.done[k] for k in range(len(job.bounds))]
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
                "statistics": statistics(name, [r["sums"] for r in receipts]),
            }
            for name in settings.fields
        },
        "shards": [{key: r[key] for key in ("rows", "files", "sums")} for r in receipts],
        "names": names,
    }


def _provenance(source: Source, seconds: float, peak_memory: int | None) -> dict[str, Any]:
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
        "peak_memory_bytes": peak_memory,
        "python": platform.python_version(),
        "versions": packages,
    }


def train_sums(name: str, rows: Iterable[np.ndarray]) -> list[list[int]]:
    """[count, sum, sum of squares] a channel over the rows' valid pixels; exact (float64 holds a row's as integers)."""
    if name in ("label", "instance"):
        return []
    total = np.zeros((3 if name == "rgb" else 1, 3), np.int64)
    for row in rows:
        planes = row.reshape(len(total), -1).astype(np.float64)
        total[:, 0] += planes.shape[1] if name == "rgb" else np.count_nonzero(row)
        total[:, 1] += planes.sum(1).astype(np.int64)
        total[:, 2] += np.square(planes, out=planes).sum(1).astype(np.int64)
    return total.tolist()  # type: ignore[no-any-return]


def statistics(name: str, shard_sums: list[dict[str, list[list[int]]]]) -> dict[str, Any] | None:
    """Mean and standard deviation a channel over the train rows' valid pixels; None for ids and empty train splits."""
    found = [sums[name] for sums in shard_sums if sums.get(name)]
    total = [[sum(values) for values in zip(*channel, strict=True)] for channel in zip(*found, strict=True)]
    if not total or not all(count for count, _, _ in total):
        return None
    means = [s / n for n, s, _ in total]
    stds = [max(0.0, (q - s * s / n) / n) ** 0.5 for n, s, q in total]
    return {"count": [n for n, _, _ in total], "mean": means, "std": stds}


@dataclass
class Shard:
    """One shard being filled: which buffers it has, and how many rows of all fields are still to come."""

    number: int
    start: int
    stop: int
    slot: int
    remaining: int


class Job:
    """The decoding, resizing and writing of all shards that have no valid receipt.

    Threads decode, or helper processes for them; one writer thread makes full shards durable. Two shards are held, or
    as many as one group of rows spans, and one more.
    """

    def __init__(self, mat: Mat, directory: Path, settings: Settings, codecs: Codecs = None) -> None:
        self.mat, self.directory, self.settings, self.codecs = mat, directory, settings, codecs
        self.n_rows = mat.n_rows
        step = settings.rows_per_shard
        self.bounds = [(lo, min(lo + step, self.n_rows)) for lo in range(0, self.n_rows, step)]
        self.done = resume(directory, self.bounds, settings, codecs)
        self.n_todo = sum(hi - lo for k, (lo, hi) in enumerate(self.bounds) if k not in self.done)
        self.open: dict[int, Shard] = {}
        self.helpers = SimpleQueue[Helper]()
        self.lock, self.n_running, self.ended = threading.Lock(), 0, SimpleQueue[Future[Any]]()
        self.processes = [os.getpid()]
        self.peak_memory: int | None = 0  # bytes; None where the system does not tell

    def run(self, workers: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Do all of it; returns what `row_columns` found in the file meanwhile."""
        readers = {name: self.mat.reader(name) for name in self.settings.fields}
        row = fmt.row_bytes(self.settings.fields, self.settings.size)
        scratch = sum(r.scratch_bytes for r in readers.values()) * bool(self.n_todo)
        check_space(self.directory, self.n_todo * row + scratch)
        most_rows = max(max(r.group_rows, ROWS_PER_TASK) for r in readers.values())
        n_slots = max(2, (most_rows - 2) // self.settings.rows_per_shard + 2)  # so many shards can one task touch
        buffers = Buffers(self.settings, n_slots, min(self.settings.rows_per_shard, self.n_rows))
        self.free = list(range(n_slots))
        self.decoder = Decoder(str(self.mat.path), KEYS, LOOK_FIRST, self.settings, readers, buffers)
        self.bar = tqdm(total=self.n_todo, unit="row", desc="convert", disable=None, smoothing=0.05)
        self.pool, self.writer = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)
        has_hung = False
        try:
            self._start_helpers(workers)
            self.facts = self._submit(HDF5, row_columns, self.mat, log)  # its thread reads text while others decode
            self._work(readers)
            return self.facts.result()  # type: ignore[no-any-return]
        except KeyboardInterrupt:
            has_hung = not isinstance(self.mat.handle, int)  # threads may be waiting for a server that says nothing
            raise
        finally:
            self.pool.shutdown(wait=not has_hung, cancel_futures=True)
            self.writer.shutdown(cancel_futures=True)
            self.bar.close()
            while not self.helpers.empty():
                self.helpers.get().close()
            for reader in readers.values():
                reader.close()
            buffers.close()

    def _start_helpers(self, workers: int) -> None:
        """One a thread, where there is enough to do for them; they load while the indexes are read."""
        readers = self.decoder.readers
        n_bytes = self.n_todo * sum(math.prod(r.row_shape) * r.dtype.itemsize for r in readers.values())
        if workers > 1 and n_bytes >= HELPERS_FROM and isinstance(self.mat.handle, int):
            for _ in range(workers):
                self.helpers.put(Helper((self.mat.handle, self.decoder.buffers.fd)))
        for name, reader in readers.items():
            if self.n_todo:
                with self.decoder.blaming(name):
                    reader.read_index()
        n_helpers = self.helpers.qsize()
        self.travels = {name for name, reader in readers.items() if reader.can_travel and n_helpers}
        for _ in range(n_helpers):
            helper = self.helpers.get()
            self.helpers.put(helper)
            helper.send(replace(self.decoder, readers={name: readers[name] for name in self.travels}))
            self.processes.append(helper.process.pid)

    def _work(self, readers: dict[str, Reader]) -> None:
        for name, reader in readers.items():
            if reader.needs_scratch and self.n_todo:
                log(f"{KEYS[name]} is chunked across rows: unpacking it into a scratch file first")
                with self.decoder.blaming(name):
                    reader.fill_scratch(self.directory, self.pool.map)
        for name, groups in self._tasks(readers):
            shards = self._shards_of(readers[name], groups)
            for k in shards:
                while k not in self.open and not self.free:
                    self._wait()
                if k not in self.open:
                    start, stop = self.bounds[k]
                    self.open[k] = Shard(k, start, stop, self.free.pop(), (stop - start) * len(readers))
            self._submit(self.pool, self._decode, name, groups, {k: self.open[k].slot for k in shards})
        while self.n_running:
            self._wait()

    def _submit(self, pool: Pool, work: Callable[..., Any], *args: Any) -> Future[Any]:
        with self.lock:
            self.n_running += 1
        future = pool.submit(work, *args)
        future.add_done_callback(self.ended.put)
        return future

    def _wait(self) -> None:
        """Until something ends; raises what it raised."""
        self.ended.get().result()
        with self.lock:
            self.n_running -= 1

    def _tasks(self, readers: dict[str, Reader]) -> Iterator[tuple[str, range]]:
        """(field, groups of rows), shard by shard and field by field, without what only finished shards need."""
        tasks = []
        for place, (name, reader) in enumerate(readers.items()):
            step = max(1, ROWS_PER_TASK // reader.group_rows)
            n_groups = -(-self.n_rows // reader.group_rows)
            for first in range(0, n_groups, step):
                groups = range(first, min(first + step, n_groups))
                if self._shards_of(reader, groups):
                    row = first * reader.group_rows
                    tasks.append((row // self.settings.rows_per_shard, place, row, name, groups))
        for *_, name, groups in sorted(tasks, key=lambda t: t[:3]):
            yield name, groups

    def _shards_of(self, reader: Reader, groups: range) -> list[int]:
        """The unfinished shards that the groups' rows fall in."""
        step = self.settings.rows_per_shard
        first = groups.start * reader.group_rows
        last = min(groups.stop * reader.group_rows, self.n_rows) - 1
        return [k for k in range(first // step, last // step + 1) if k not in self.done]

    def _decode(self, name: str, groups: range, slots: dict[int, int]) -> None:
        """Some groups of one field into their shards; those that are full now are written."""
        if name in self.travels:
            helper = self.helpers.get()
            try:
                placed = helper.decode(name, groups, slots)
            finally:
                self.helpers.put(helper)
        else:
            placed = self.decoder.decode(name, groups, slots)
        for k, n_rows in placed.items():
            with self.lock:
                self.open[k].remaining -= n_rows
                is_full = not self.open[k].remaining
            if is_full:
                self._submit(self.writer, self._write, self.open[k])

    def _write(self, shard: Shard) -> None:
        """Make a full shard durable, then its receipt; then its buffers can be used again."""
        n, n_slots = shard.stop - shard.start, self.settings.rows_per_shard
        train = np.flatnonzero(self.facts.result()[0]["split"][shard.start : shard.stop] == 0)
        files: dict[str, Any] = {}
        sums = {}
        for field, rows in self.decoder.buffers.arrays[shard.slot].items():
            files |= write_shard(self.directory, field, shard.number, rows[:n], n_slots, self.codecs)
            sums[field] = train_sums(field, (rows[i] for i in train))
        receipt = {"rows": [shard.start, shard.stop], "codecs": self.codecs, "files": files, "sums": sums}
        fmt.write_json(self.directory / receipt_name(shard.number), receipt)
        self.done[shard.number] = receipt
        del self.open[shard.number]
        self.free.append(shard.slot)
        now = memory_of(self.processes)
        self.peak_memory = None if now is None or self.peak_memory is None else max(self.peak_memory, now)
        self.bar.update(shard.stop - shard.start)
        if self.bar.disable:
            log(f"shard {shard.number + 1} of {len(self.bounds)}: rows {shard.start}..{shard.stop - 1}")
