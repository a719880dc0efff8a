"""Decode and resize some rows of one field into their shards' buffers: in a thread, or in a helper process.

The labelled set has 103,000 chunks of 60 KB, and threads of one process hand Python's lock to each other around each of
them. Helper processes do not (figures: docs/converting.md). They get the chunk index through a pipe, read the .mat
by themselves and write into shared memory; a helper ends when its pipe does, so that none outlives a killed parent.
"""

import mmap
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np

from .chunks import Reader
from .format import FIELDS, Settings, UserError, one_line, row_shape
from .resize import resize

MALLOC = {f"MALLOC_{name}_": str(1 << 28) for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD")}


class Buffers:
    """Shards being filled, in memory without a name that helpers map too: `arrays[slot][field]`."""

    def __init__(self, settings: Settings, n_slots: int, n_rows: int) -> None:
        fd = os.memfd_create("shards") if hasattr(os, "memfd_create") else os.dup(tempfile.TemporaryFile().fileno())
        self.__setstate__((settings, n_slots, n_rows, fd))

    def __getstate__(self) -> tuple[Any, ...]:
        return self.settings, self.n_slots, self.n_rows, self.fd

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.settings, self.n_slots, self.n_rows, self.fd = state
        shapes = {f: (self.n_rows, *row_shape(f, self.settings.size)) for f in self.settings.fields}
        sizes = {f: -(-int(np.prod(s)) * np.dtype(FIELDS[f]["dtype"]).itemsize // 64) * 64 for f, s in shapes.items()}
        os.ftruncate(self.fd, self.n_slots * sum(sizes.values()))
        memory, offset = mmap.mmap(self.fd, self.n_slots * sum(sizes.values())), 0
        self.arrays = list[dict[str, np.ndarray]]()
        for _ in range(self.n_slots):
            self.arrays.append({})
            for field, shape in shapes.items():
                self.arrays[-1][field] = np.ndarray(shape, FIELDS[field]["dtype"], memory, offset)
                offset += sizes[field]

    def close(self) -> None:
        os.close(self.fd)


@dataclass
class Decoder:
    """What decoding needs; all of it can travel to a helper."""

    source: str
    keys: dict[str, str]  # what the fields are called there
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

    @contextmanager
    def blaming(self, field: str, row: int) -> Iterator[None]:
        """One line that names the field and the row, for whatever is wrong with them."""
        try:
            yield
        except (ValueError, OverflowError, RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
                raise
            what = f"{self.keys[field]} row {row}: {one_line(error)}"
            raise UserError(f"{self.source}: {what}. Download the file again, then run: make convert") from None


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
            how = f"was killed by signal {-status} (out of memory?)" if status < 0 else f"ended with status {status}"
            raise UserError(
                f"a helper process {how}. What is finished is kept. Run the command with --workers 1"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.process.communicate()


def memory_of(processes: list[int]) -> int:
    """Bytes in memory: of all of these now, shared pages once, or the most that the first one ever had. 0 off Linux."""
    try:
        now = sum(_kb(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in processes)
        return 1024 * max(now, _kb(f"/proc/{processes[0]}/status", "VmHWM:"))
    except OSError:
        return 0


def _kb(path: str, key: str) -> int:
    return next(int(words[1]) for words in map(str.split, Path(path).read_text().splitlines()) if words[0] == key)


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
