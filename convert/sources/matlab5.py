"""Arrays of a MATLAB file before v7.3, by scipy, which reads each of them whole.

The last ones are kept, so that a table that names row after row reads the file once.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.errors import BadRow
from shards.errors import UserError, one_line

INSTALL = "Install the extra frames: pip install 'nyuv2-shards[frames]'"
MAX_DEFLATE = 1100  # deflate never packs better than 1032 to 1
N_KEPT = 2  # arrays in memory: of two fields
# MATLAB's classes of what may be pictures, with the bytes of an element; a cell's are not known.
CLASSES = {
    "cell": 0,
    "logical": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "single": 4,
    "double": 8,
}
Stamp = tuple[int, int]  # bytes, time of the last change in nanoseconds


def arrays_in(file: Path) -> tuple[str, ...]:
    """The names of its arrays that may be pictures, or cells of them.

    Raises BadRow where the file is damaged or claims more than it can hold, OSError where it cannot
    be read, UserError where scipy is not installed.
    """
    return _arrays_in(file, _stamp(file))


def read_array(file: Path, name: str) -> np.ndarray:
    """The array as MATLAB has it: (H, W), (H, W, 3), with the rows last; of objects for cells.

    Not to be written to. Raises what `arrays_in` does.
    """
    return _read_array(file, name, _stamp(file))


def _stamp(file: Path) -> Stamp:
    """Another one once anybody has written to the file."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=32)
def _arrays_in(file: Path, stamp: Stamp) -> tuple[str, ...]:
    n_file_bytes, _ = stamp
    with _reading():
        listed = _scipy_io().whosmat(str(file))
    names = []
    for name, shape, kind in listed:
        if kind not in CLASSES:
            continue
        if math.prod(shape) * CLASSES[kind] > n_file_bytes * MAX_DEFLATE:
            raise BadRow(f"claims {name} of {shape}, more than {n_file_bytes} bytes can hold")
        if kind == "cell" or sum(n > 1 for n in shape) >= 2:
            names.append(name)
    return tuple(names)


@lru_cache(maxsize=N_KEPT)
def _read_array(file: Path, name: str, stamp: Stamp) -> np.ndarray:
    with _reading():
        return _scipy_io().loadmat(str(file), variable_names=[name])[name]


def _scipy_io() -> Any:
    try:
        import scipy.io
    except ImportError:
        raise UserError("reading a file of MATLAB 5 needs scipy", INSTALL) from None
    return scipy.io


@contextmanager
def _reading() -> Iterator[None]:
    """BadRow for whatever scipy raises on damaged data: nearly every type there is."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadRow(f"cannot be read as MATLAB 5 ({one_line(error)})") from None
