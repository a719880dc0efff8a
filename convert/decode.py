"""Decode and resize rows of one field into their shards' buffers: in a thread, or in a process.

The labelled set has 103,000 chunks of 60 KB, and threads of one process hand Python's lock to each
other around each of them. Helper processes do not (figures: docs/measurements/converting.md). They
get the chunk index through a pipe, read the source by themselves and write into shared memory; a
helper ends when its pipe does, so that none outlives a killed parent.
"""

import math
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
from convert.resize import Resizer, ValueRangeError
from convert.sources.base import RowReader
from convert.sources.errors import Damaged, Unreadable
from shards.errors import DamagedSource, UserError, WrongSource, one_line
from shards.spec import Field

# glibc keeps what a helper frees, instead of handing it back to the kernel for every row.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
}
CACHE_LINE = 64


class Buffers:
    """Shards being filled, in memory without a name that helpers map too: `arrays[slot][field]`."""

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
        """Of each field in one slot, in whole cache lines."""
        sizes = {field.name: self.n_rows * field.row_bytes(self.size) for field in self.fields}
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
            arrays.append(slot)
        return arrays

    def close(self) -> None:
        os.close(self.fd)


@dataclass
class Decoder:
    """What decoding needs; all of it can travel to a helper."""

    source: str
    names: Mapping[str, str]  # what the fields are called there
    advice: str  # for whose source is damaged
    rows_per_shard: int
    readers: Mapping[str, RowReader]
    resizers: Mapping[str, Resizer]
    buffers: Buffers

    def decode(self, field: str, groups: range, slots: Mapping[int, int]) -> dict[int, int]:
        """Put the rows of some groups into the open shards (number -> slot).

        Returns how many rows each of them got.
        """
        reader = self.readers[field]
        n_placed = dict.fromkeys(slots, 0)
        for group in groups:
            first = group * reader.group_rows
            with self.blaming(field, first):
                rows = reader.read_group(group)
            for number, row in enumerate(rows, first):
                shard, place = divmod(number, self.rows_per_shard)
                if shard in slots:  # else it was finished in an earlier run
                    with self.blaming(field, number):
                        small = self.resizers[field](row)
                    self.buffers.arrays[slots[shard]][field][place] = small
                    n_placed[shard] += 1
        return n_placed

    def blaming(self, field: str, row: int | None = None) -> AbstractContextManager[None]:
        return blaming(self.source, self.names[field], row, self.advice)


@contextmanager
def blaming(source: str, name: str, row: int | None, advice: str) -> Iterator[None]:
    """One line that names the field, and the row where one is known, for what is wrong with them.

    Errors of other kinds are this program's: they go on as they are, and blame no file.
    """
    where = f": {name}" if row is None else f": {name} row {row}"
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

    def decode(self, field: str, groups: range, slots: Mapping[int, int]) -> dict[int, int]:
        """Decoder.decode over there; raises what it raises, and HelperLost."""
        assert self.process.stdout
        self.send((field, groups, slots))
        try:
            answer: dict[int, int] | Exception = pickle.load(self.process.stdout)
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


def unpacked_bytes(reader: RowReader) -> int:
    """Of one decoded row."""
    return math.prod(reader.row_shape) * reader.dtype.itemsize
