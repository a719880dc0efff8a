"""Decode and resize rows into their shards' buffers: in a thread, or in a process.

The labelled set has 103,000 chunks of 60 KB, and threads of one process hand Python's lock to each
other around each of them. Helper processes do not (figures: docs/measurements/converting.md). They
get the chunk index through a pipe, read the source by themselves and write into shared memory; a
helper ends when its pipe does, so that none outlives a killed parent.
"""

import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np

from convert.machine import shared_memory
from convert.plan import Plan
from convert.resize import Resizer, ValueRangeError
from convert.sources.base import RowReader, Source
from convert.sources.errors import BadRow, Damaged, Unreadable
from shards.errors import DamagedSource, UserError, WrongSource, one_line
from shards.spec import Field

# glibc keeps what a helper frees, instead of handing it back to the kernel for every row.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
}
CACHE_LINE = 64
SIZES = "*sizes"  # no name of a field
SIZE_BYTES = 4  # two <u2 a row


class Buffers:
    """Shards being filled, in memory without a name that helpers map too: `arrays[slot][field]`.

    SIZES is there beside the fields: [n_rows, 2] height and width of each original picture.
    """

    def __init__(self, fields: Sequence[Field], size: int, n_slots: int, n_rows: int) -> None:
        self.fields = tuple(fields)
        self.size = size
        self.n_slots = n_slots
        self.n_rows = n_rows
        self.fd = shared_memory(n_slots * sum(self._field_bytes().values()))
        self.arrays = self._map()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = self._map()

    def _field_bytes(self) -> dict[str, int]:
        """Of each field, and of the sizes, in one slot, in whole cache lines."""
        sizes = {field.name: self.n_rows * field.row_bytes(self.size) for field in self.fields}
        sizes[SIZES] = self.n_rows * SIZE_BYTES
        return {name: -(-size // CACHE_LINE) * CACHE_LINE for name, size in sizes.items()}

    def _map(self) -> list[dict[str, np.ndarray]]:
        sizes = self._field_bytes()
        memory = mmap.mmap(self.fd, self.n_slots * sum(sizes.values()))
        arrays: list[dict[str, np.ndarray]] = []
        offset = 0
        for _ in range(self.n_slots):
            slot = {}
            for field in self.fields:
                shape = (self.n_rows, *field.row_shape(self.size))
                slot[field.name] = np.ndarray(shape, field.dtype, memory, offset)
                offset += sizes[field.name]
            slot[SIZES] = np.ndarray((self.n_rows, 2), "<u2", memory, offset)
            offset += sizes[SIZES]
            arrays.append(slot)
        return arrays

    def close(self) -> None:
        os.close(self.fd)


@dataclass(frozen=True)
class Decoded:
    """What became of some rows: of each shard how many it got, and what is wrong with which."""

    n_placed: Mapping[int, int]
    failed: Mapping[int, str]  # by the row's number in the set


@dataclass
class Decoder:
    """What decoding needs; all of it can travel to a helper."""

    source: str
    advice: str  # for whose source is damaged
    rows_per_shard: int
    readers: Mapping[int, RowReader]  # by their place among all
    resizers: Mapping[str, Resizer]  # by field
    buffers: Buffers

    def decode(self, reader: int, groups: range, slots: Mapping[int, int]) -> Decoded:
        """Put the rows of some groups into the open shards (number -> slot)."""
        n_placed = dict.fromkeys(slots, 0)
        failed: dict[int, str] = {}
        for group in groups:
            if not self._is_missing(self.readers[reader], group, slots):
                continue
            try:
                self._decode_group(self.readers[reader], group, slots, n_placed)
            except BadRow as error:  # its group is that row
                failed[group] = one_line(error)
                self._leave_empty(self.readers[reader], group, slots, n_placed)
        return Decoded(n_placed=n_placed, failed=failed)

    def _is_missing(self, reader: RowReader, group: int, slots: Mapping[int, int]) -> bool:
        """Whether a shard with rows of the group is open; else an earlier run finished it."""
        first = group * reader.group_rows
        last = first + reader.group_rows - 1
        shards = range(first // self.rows_per_shard, last // self.rows_per_shard + 1)
        return any(shard in slots for shard in shards)

    def _decode_group(
        self, reader: RowReader, group: int, slots: Mapping[int, int], n_placed: dict[int, int]
    ) -> None:
        first = group * reader.group_rows
        with self.blaming(reader, first):
            pictures = reader.read_group(group)
        n_rows = len(pictures[reader.fields[0]])
        for place_in_group in range(n_rows):
            row = first + place_in_group
            shard, place = divmod(row, self.rows_per_shard)
            if shard not in slots:  # it was finished in an earlier run
                continue
            arrays = self.buffers.arrays[slots[shard]]
            for field in reader.fields:
                picture = pictures[field][place_in_group]
                with self.blaming(reader, row):
                    arrays[field][place] = self.resizers[field](picture)
            if reader.is_hw:
                arrays[SIZES][place] = pictures[reader.fields[0]][place_in_group].shape[:2]
            n_placed[shard] += 1

    def _leave_empty(
        self, reader: RowReader, row: int, slots: Mapping[int, int], n_placed: dict[int, int]
    ) -> None:
        """A row that failed is all 0: buffers hold what was in them before."""
        shard, place = divmod(row, self.rows_per_shard)
        arrays = self.buffers.arrays[slots[shard]]
        for name in (*reader.fields, SIZES):
            arrays[name][place] = 0
        n_placed[shard] += 1

    def blaming(self, reader: RowReader, row: int | None = None) -> AbstractContextManager[None]:
        return blaming(self.source, reader.called(row), self.advice)


def decoder_of(
    plan: Plan, source: Source, readers: Sequence[RowReader], buffers: Buffers
) -> Decoder:
    """readers: of all fields of the plan, by whose places among them it is asked to decode."""
    is_hw = {name: reader.is_hw for reader in readers for name in reader.fields}
    resizers = {
        field.name: Resizer(
            field=field,
            size=plan.settings.size,
            box=plan.box,
            depth_resize=plan.settings.depth_resize,
            highest_id=source.highest_id(field.name),
            is_hw=is_hw[field.name],
        )
        for field in plan.fields
    }
    return Decoder(
        source=str(source),
        advice=source.advice,
        rows_per_shard=plan.settings.rows_per_shard,
        readers=dict(enumerate(readers)),
        resizers=resizers,
        buffers=buffers,
    )


@contextmanager
def blaming(source: str, called: str, advice: str) -> Iterator[None]:
    """One line that names what was read (`called`) for what is wrong with it.

    Errors of other kinds are this program's: they go on as they are, and blame no file.
    """
    where = f": {called}"
    try:
        yield
    except (Damaged, ValueRangeError, Unreadable) as error:
        raise DamagedSource(source, f"{where}: {one_line(error)}", advice) from None
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise
        what = f"{where} could not be read ({one_line(error)})"
        raise WrongSource(source, what, "Wait until the disk or network answers again") from None


class HelperLost(UserError):
    """A helper process ended before it was told to."""


class Helper:
    """A process that decodes for the thread that asks it, once it was sent its Decoder."""

    def __init__(self, fds: tuple[int, ...]) -> None:
        paths = [str(Path(__file__).resolve().parents[1])]
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        environment = {
            **os.environ,
            **KEEP_MEMORY,
            "PYTHONPATH": os.pathsep.join(paths),
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from convert.decode import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            process_group=0,  # Ctrl-C is the parent's to handle
            env=environment,
        )

    def send(self, message: Any) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # noticed where its answer is awaited
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def decode(self, reader: int, groups: range, slots: Mapping[int, int]) -> Decoded:
        """Decoder.decode over there; raises what it raises, and HelperLost."""
        assert self.process.stdout
        self.send((reader, groups, slots))
        try:
            answer: Decoded | Exception = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):  # nothing, or half an answer
            raise self._lost() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _lost(self) -> HelperLost:
        status = self.process.wait()
        how = f"ended with status {status}"
        if status < 0:
            hint = " (out of memory?)" if status == -signal.SIGKILL else ""
            how = f"was killed by signal {-status}{hint}"
        return HelperLost(f"a helper process {how}", "What is finished is kept. Use fewer workers")

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """A helper's life: the decoder, then what to decode, until the pipe ends."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed here goes to standard error
    with suppress(EOFError, BrokenPipeError):
        decoder: Decoder = pickle.load(requests)
        while True:
            request = pickle.load(requests)
            try:
                answer: Any = decoder.decode(*request)
            except Exception as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
