"""Decode and resize some rows of one field into their shards' buffers: in a thread, or in a helper process.

The labelled set has 103,000 chunks of 60 KB, and threads of one process hand Python's lock to each other around each of
them. Helper processes do not (figures: docs/converting.md). They get the chunk index through a pipe, read the .mat
by themselves and write into shared memory; a helper ends when its pipe does, so that none outlives a killed parent.
"""

import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np

from convert.machine import shared_memory
from convert.resize import ValueRangeError, resize
from convert.sources.chunks import Reader
from convert.sources.errors import Damaged, Unreadable
from shards.errors import DamagedSource
from shards.format import FIELDS, Settings, UserError, one_line, row_shape

MALLOC = {f"MALLOC_{name}_": str(1 << 28) for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD")}


class Buffers:
    """Shards being filled, in memory without a name that helpers map too: `arrays[slot][field]`."""

    def __init__(self, settings: Settings, n_slots: int, n_rows: int) -> None:
        self.settings = settings
        self.n_slots = n_slots
        self.n_rows = n_rows
        self.fd = shared_memory(n_slots * sum(self._field_bytes().values()))
        self.arrays = self._map()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.arrays = self._map()

    def _shape(self, field: str) -> tuple[int, ...]:
        return (self.n_rows, *row_shape(field, self.settings.size))

    def _field_bytes(self) -> dict[str, int]:
        """Of each field in one slot, in whole cache lines."""
        sizes = {f: math.prod(self._shape(f)) * np.dtype(FIELDS[f]["dtype"]).itemsize for f in self.settings.fields}
        return {field: -(-size // 64) * 64 for field, size in sizes.items()}

    def _map(self) -> list[dict[str, np.ndarray]]:
        sizes = self._field_bytes()
        memory = mmap.mmap(self.fd, self.n_slots * sum(sizes.values()))
        arrays: list[dict[str, np.ndarray]] = [{} for _ in range(self.n_slots)]
        offset = 0
        for slot in arrays:
            for field, n_bytes in sizes.items():
                slot[field] = np.ndarray(self._shape(field), FIELDS[field]["dtype"], memory, offset)
                offset += n_bytes
        return arrays

    def close(self) -> None:
        os.close(self.fd)


@dataclass
class Decoder:
    """What decoding needs; all of it can travel to a helper."""

    source: str
    keys: dict[str, str]  # what the fields are called there
    advice: str  # for whose source is damaged
    settings: Settings
    readers: dict[str, Reader]
    buffers: Buffers

    def decode(self, field: str, groups: range, slots: dict[int, int]) -> dict[int, int]:
        """Put the rows of some groups into the open shards (number -> slot); how many rows each of them got."""
        reader, s, placed = self.readers[field], self.settings, dict.fromkeys(slots, 0)
        for group in groups:
            first = group * reader.group_rows
            with self.blaming(field, first):
                rows = reader.read_group(group)
            for i, row in enumerate(rows, first):
                shard, place = divmod(i, s.rows_per_shard)
                if shard in slots:  # else it was finished in an earlier run
                    with self.blaming(field, i):
                        small = resize(field, row, s.size, s.crop, s.depth_resize)
                    self.buffers.arrays[slots[shard]][field][place] = small
                    placed[shard] += 1
        return placed

    def blaming(self, field: str, row: int | None = None) -> AbstractContextManager[None]:
        return blaming(self.source, self.keys[field], row, self.advice)


@contextmanager
def blaming(source: str, key: str, row: int | None, advice: str) -> Iterator[None]:
    """One line that names the field, and the row where one is known, for what is wrong with them.

    Errors of other kinds are this program's: they go on as they are, and blame no file.
    """
    where = f": {key}" + ("" if row is None else f" row {row}")
    try:
        yield
    except (Damaged, ValueRangeError, Unreadable) as error:
        raise DamagedSource(source, f"{where}: {one_line(error)}", advice) from None
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise
        what = f"{source}{where} could not be read ({one_line(error)})"
        raise UserError(f"{what}. When the disk or network answers again, run: make convert") from None


class Helper:
    """A process of its own that decodes for the thread that asks it, once it was sent its Decoder."""

    def __init__(self, fds: tuple[int, ...]) -> None:
        paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from convert.decode import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            process_group=0,  # Ctrl-C is the parent's to handle
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", **MALLOC},
        )

    def send(self, message: Any) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # noticed where its answer is awaited
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()

    def decode(self, *what: Any) -> dict[int, int]:
        """Decoder.decode over there; raises what it raises."""
        assert self.process.stdout
        self.send(what)
        try:
            answer: dict[int, int] | Exception = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):  # nothing, or half an answer
            status = self.process.wait()
            hint = " (out of memory?)" if status == -signal.SIGKILL else ""
            how = f"was killed by signal {-status}{hint}" if status < 0 else f"ended with status {status}"
            raise UserError(
                f"a helper process {how}. What is finished is kept. Run the command with --workers 1"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """A helper's life: the decoder, then what to decode, until the pipe ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(EOFError, BrokenPipeError):
        decoder: Decoder = pickle.load(requests)
        while True:
            what = pickle.load(requests)
            try:
                answer: Any = decoder.decode(*what)
            except Exception as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
