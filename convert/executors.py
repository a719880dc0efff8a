"""The tasks of a plan done on this machine: out come receipts of shards, as they are durable.

Threads decode, or helper processes for them; one writer thread makes full shards durable. Two
shards are held, or as many as one task touches: memory does not depend on the number of rows.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from convert.decode import SIZES, Buffers, Helper, decoder_of
from convert.machine import memory_of
from convert.plan import Plan, Task
from convert.shard import FullShard
from convert.sources.base import RowReader, Source
from shards.files import log
from shards.manifest import Receipt
from shards.progress import Progress, n_rows_text

HELPERS_FROM = 256 << 20  # bytes to unpack; a helper takes 0.2 s to start
MIN_SLOTS = 2  # one shard is filled while another is written
WriteShard = Callable[[FullShard], Receipt]
Receipts = list[tuple[int, Receipt]]
Made = Generator[tuple[int, Receipt], None, None]  # each shard with its receipt


@dataclass
class OpenShard:
    """A shard being filled: its buffers, and how many rows of all readers are still to come."""

    number: int
    slot: int
    n_rows: int
    n_missing: int
    failed: dict[int, str] = dataclasses.field(default_factory=dict)


class LocalExecutor:
    """Does the tasks of one plan, once, in a `with` block."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        readers: Sequence[RowReader],
        tasks: Sequence[Task],
        workers: int,
    ) -> None:
        """readers: of all fields; closed at the end. tasks: those that are still to do.

        workers: threads, and as many helper processes where there is enough to do for them.
        """
        self.peak_memory: int | None = 0  # bytes; None where the system does not tell
        # What is unpacked into files before anything is made.
        self.scratch_bytes = sum(reader.scratch_bytes for reader in readers) if tasks else 0
        self._plan = plan
        self._source = source
        self._tasks = list(tasks)
        self._n_workers = workers
        self._readers = readers
        self._open: dict[int, OpenShard] = {}
        # Of what is missing of the open shards, and of the count below.
        self._lock = threading.Lock()
        self._n_running = 0
        self._ended = SimpleQueue[Future[Receipts]]()
        self._helpers = SimpleQueue[Helper]()
        self._readers_of_helpers: set[int] = set()
        self._processes = [os.getpid()]

        n_slots = max(MIN_SLOTS, *(len(task.shards) for task in tasks), 0)
        self._free_slots = list(range(n_slots))
        n_rows = min(plan.settings.rows_per_shard, plan.n_rows)
        self._buffers = Buffers(plan.fields, plan.settings.size, n_slots, n_rows)
        self._decoder = decoder_of(plan, source, readers, self._buffers)
        self._pool = ThreadPoolExecutor(workers)
        self._writer = ThreadPoolExecutor(1)
        self._n_todo = sum(plan.n_rows_of(k) for k in {k for task in tasks for k in task.shards})
        # Rows of every reader: a row is done once all of them have decoded theirs.
        self._n_decoded = 0
        self._progress = Progress("converting", self._n_todo, unit="row", amount=n_rows_text)

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After Ctrl-C threads may be waiting for a server that says nothing.
        may_hang = kind is KeyboardInterrupt and self._source.may_hang
        self._pool.shutdown(wait=not may_hang, cancel_futures=True)
        self._writer.shutdown(wait=not may_hang, cancel_futures=True)
        self._progress.close()
        while not self._helpers.empty():
            self._helpers.get().close()
        for reader in self._readers:
            reader.close()
        self._buffers.close()

    def run(self, scratch: Path, write: WriteShard, facts: "Future[Any]") -> Made:
        """Yields (shard, receipt) as soon as it is durable; raises what any of its threads raised.

        scratch: a directory for what has to be unpacked first. write: called in one thread, a full
        shard at a time. facts: what `write` waits for; where it fails, everything ends.
        """
        facts.add_done_callback(self._note_failure)
        self._prepare(scratch)
        for task in self._tasks:
            for k in task.shards:
                while k not in self._open and not self._free_slots:
                    yield from self._wait()
                if k not in self._open:
                    self._begin(k)
            slots = {k: self._open[k].slot for k in task.shards}
            self._submit(self._pool, self._decode, task, slots, write)
        while self._n_running:
            yield from self._wait()

    def _note_failure(self, facts: "Future[Any]") -> None:
        if not facts.cancelled() and facts.exception():
            with suppress(RuntimeError):  # everything ended already, for another reason
                self._submit(self._writer, facts.result)

    def _prepare(self, scratch: Path) -> None:
        """Helpers load while the indexes are read; then they get them."""
        if not self._tasks:
            return
        self._start_helpers()
        for reader in self._readers:
            with self._decoder.blaming(reader):
                reader.read_index()
        self._send_decoder()
        for reader in self._readers:
            if reader.scratch_bytes:
                what = "is chunked across rows: unpacking it into a scratch file first"
                log(f"{reader.called()} {what}")
                with self._decoder.blaming(reader):
                    reader.fill_scratch(scratch, self._pool.map)

    def _start_helpers(self) -> None:
        """One a thread, where that pays and several processes can read the source."""
        n_bytes = self._n_todo * sum(reader.row_bytes for reader in self._readers)
        if self._source.handles is None or self._n_workers < 2 or n_bytes < HELPERS_FROM:
            return
        for _ in range(self._n_workers):
            helper = Helper((*self._source.handles, self._buffers.fd))
            self._helpers.put(helper)
            self._processes.append(helper.process.pid)

    def _send_decoder(self) -> None:
        n_helpers = self._helpers.qsize()
        if not n_helpers:
            return
        travelling = {k: each for k, each in enumerate(self._readers) if each.can_travel}
        self._readers_of_helpers = set(travelling)
        for _ in range(n_helpers):
            helper = self._helpers.get()
            self._helpers.put(helper)
            helper.send(replace(self._decoder, readers=travelling))

    def _begin(self, k: int) -> None:
        n_rows = self._plan.n_rows_of(k)
        self._open[k] = OpenShard(
            number=k,
            slot=self._free_slots.pop(),
            n_rows=n_rows,
            n_missing=n_rows * len(self._readers),
        )

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[..., Receipts], *args: Any) -> None:
        with self._lock:
            self._n_running += 1
        pool.submit(work, *args).add_done_callback(self._ended.put)

    def _wait(self) -> Iterator[tuple[int, Receipt]]:
        """Until something ends: the receipts that it gave."""
        receipts = self._ended.get().result()
        with self._lock:
            self._n_running -= 1
        for k, receipt in receipts:
            self._end(k)
            yield k, receipt

    def _decode(self, task: Task, slots: dict[int, int], write: WriteShard) -> Receipts:
        """Some groups of one reader into their shards; those that are full now are written."""
        if task.reader in self._readers_of_helpers:
            helper = self._helpers.get()
            try:
                decoded = helper.decode(task.reader, task.groups, slots)
            finally:
                self._helpers.put(helper)
        else:
            decoded = self._decoder.decode(task.reader, task.groups, slots)

        self._count(sum(decoded.n_placed.values()))
        for k, n_rows in decoded.n_placed.items():
            start, stop = self._plan.bounds_of(k)
            with self._lock:
                shard = self._open[k]
                shard.n_missing -= n_rows
                shard.failed |= {r: why for r, why in decoded.failed.items() if start <= r < stop}
                is_full = shard.n_missing == 0
            if is_full:
                self._submit(self._writer, self._write, shard, write)
        return []

    def _count(self, n_decoded: int) -> None:
        """So many rows of one reader more."""
        with self._lock:
            self._n_decoded += n_decoded
            n_done = self._n_decoded // len(self._readers)
            self._progress.add(n_done - self._progress.n_done)

    def _write(self, shard: OpenShard, write: WriteShard) -> Receipts:
        arrays = self._buffers.arrays[shard.slot]
        rows = {name: rows[: shard.n_rows] for name, rows in arrays.items()}
        sizes = rows.pop(SIZES)
        failed = dict(sorted(shard.failed.items()))
        receipt = write(FullShard(number=shard.number, arrays=rows, sizes=sizes, failed=failed))
        now = memory_of(self._processes)
        if now is None or self.peak_memory is None:
            self.peak_memory = None
        else:
            self.peak_memory = max(self.peak_memory, now)
        return [(shard.number, receipt)]

    def _end(self, k: int) -> None:
        """Its buffers can be used again."""
        self._free_slots.append(self._open.pop(k).slot)
