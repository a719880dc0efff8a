"""What is in the .mat: the one place that knows MATLAB's axis order, references and text.

Planes come out (W, H), as MATLAB stores them: the picture is their transpose (`resize` transposes
the small result). Rows are read by `chunks.Reader`; everything else here is asked of HDF5, in its
own thread (`hdf5.py`).
"""

import errno
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import h5py
import numpy as np

from convert.sources.chunk_layout import ceil_div
from convert.sources.chunks import Reader
from convert.sources.hdf5 import HDF5, NOT_THE_FILES, VERSIONS, StoredDataset, in_hdf5_thread
from shards.errors import DamagedSource, UserError, WrongSetting, WrongSource, one_line
from shards.files import log
from shards.spec import SourceIdentity

ORIGINAL_BYTES = 2_972_037_809
ORIGINAL_MD5 = "520609c519fba3ba5ac58c8fefcc3530"
# A library or this program may be at fault too: nobody fetches 3 GB again before he has looked.
LOOK_FIRST = f"Before you fetch it again compare its md5 with the original's, {ORIGINAL_MD5}"
CLOSE_S = 3.0  # that closing may take
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HEAD_BYTES = 520  # with the signature of HDF5 behind a user block of 512
KEYS = {
    "rgb": "images",
    "depth": "depths",
    "raw_depth": "rawDepths",
    "label": "labels",
    "instance": "instances",
}
DTYPES = {"rgb": "u1", "depth": "f4", "raw_depth": "f4", "label": "u2", "instance": "u1"}
CELLS = ("names", "scenes", "sceneTypes", "rawRgbFilenames", "rawDepthFilenames")
MAX_CHUNK_BYTES = 64 << 20
MAX_DEFLATE = 1100  # deflate never packs better than 1032 to 1
MAX_ROWS = 1_000_000
MIN_SIDE = 8  # pixels of a picture
MAX_SIDE = 2048
MAX_TILES = 16384  # chunks in one row
MAX_CODES = 4096  # characters of one string
MAX_STRINGS = 65535  # in one cell array, where it has not one a row


@runtime_checkable
class Elsewhere(Protocol):
    """A .mat that is no file: some of a Path's methods, and `pread`, for many threads."""

    name: str

    def exists(self) -> bool: ...
    def stat(self) -> os.stat_result: ...
    def open(self, mode: str, /) -> Any: ...
    def pread(self, n_bytes: int, offset: int) -> bytes: ...


Source = Path | Elsewhere


def sampled_identity(path: Source, n_blocks: int = 16, block: int = 65536) -> SourceIdentity:
    """The source's identity in milliseconds: its size and a hash over sampled blocks.

    They are the head, the tail, and fixed positions between.
    """
    n_bytes = path.stat().st_size
    digest = hashlib.sha256(str(n_bytes).encode())
    with path.open("rb") as file:
        for k in range(n_blocks):
            file.seek(max(0, n_bytes - block) * k // (n_blocks - 1))
            digest.update(file.read(block))
    return SourceIdentity(kind="mat", name=path.name, n_bytes=n_bytes, sha256=digest.hexdigest())


def _open(path: Source) -> h5py.File:
    """Open a v7.3 .mat for reading; anything else is a WrongSource that says what it is."""
    head = None
    try:
        if isinstance(path, Path) and path.is_fifo():  # it would be waited for
            raise OSError(errno.EINVAL, "not a regular file")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        opened = path if isinstance(path, Path) else path.open("rb")
        return h5py.File(opened, "r", locking=False)
    except NOT_THE_FILES:
        raise
    except Exception as error:  # h5py raises whatever HDF5 comes upon
        if head is None:
            raise _unreadable(path, error) from None
        raise _something_else(path, head, error) from None


def _unreadable(path: Source, error: Exception) -> WrongSource:
    """Not a byte of it could be read."""
    why = str(getattr(error, "strerror", None) or error).lower()
    right = "Check its permissions, and the disk it lies on"
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        right = "Give the path of nyu_depth_v2_labeled.mat, or download it"
    return WrongSource(path, f"cannot be read ({why})", right)


def _something_else(path: Source, head: bytes, error: Exception) -> WrongSource:
    """What it is instead of a .mat that HDF5 opens, by its first bytes."""
    if not head:
        return WrongSource(path, "is empty: the download failed", "Delete it")
    if head.lstrip()[:1] == b"<":
        return WrongSource(path, "is a web page, not a .mat: the download failed", "Delete it")
    if head.startswith(b"MATLAB 5.0"):
        what = "is MATLAB v5; the labelled set is v7.3"
        return WrongSource(path, what, "In MATLAB: save -v7.3")
    if "truncated file" in str(error):
        n_bytes = path.stat().st_size
        size = f"{n_bytes} bytes and its end is missing (the original has {ORIGINAL_BYTES})"
        return WrongSource(
            path, f"is {size}: the download was cut", "Fetch the rest with curl -C -"
        )
    if HDF5_SIGNATURE in (head[:8], head[512:]):
        what = f"is not opened by {VERSIONS} ({one_line(error)})"
        return DamagedSource(path, what, LOOK_FIRST)
    what = f"is not a MATLAB v7.3 file ({one_line(error)})"
    return WrongSource(path, what, "Give the path of nyu_depth_v2_labeled.mat")


@in_hdf5_thread
def check_opens(path: Source) -> None:
    """Raise WrongSource where it is no .mat that can be read."""
    _open(path).close()


class Mat:
    """The labelled set in an open .mat: names, per-row facts, and readers for the fields asked for.

    Its methods may be called from any thread: what they ask of HDF5 is asked in HDF5's. `axes`:
    "wh" or "hw", how the pictures lie, or "auto": they are wider than tall. Raises WrongSource for
    any other file, WrongSetting for axes that its pictures do not have.

    n_rows: of every field. sides: of a picture, in the order in which they are stored. handle: of
    the file, as `chunks.Reader` takes it.
    """

    @in_hdf5_thread
    def __init__(self, path: Source, fields: tuple[str, ...], axes: str = "auto") -> None:
        self.path = path
        self.file = _open(path)
        self.handle: int | Callable[[int, int], bytes]
        if isinstance(path, Path):
            self.handle = self.file.id.get_vfd_handle()
        else:
            self.handle = path.pread
        try:
            with self._refusing("it"):
                self.n_rows, self.sides = self._check_shapes(fields)
            self.axes = self._axes(axes)
        except BaseException:
            self.file.close()
            raise

    def close(self) -> None:
        """Not waited for where a call hangs, as on a network that is gone."""
        with suppress(TimeoutError):
            HDF5.submit(self._close).result(CLOSE_S)

    def _close(self) -> None:
        self.file.close()

    def _axes(self, wanted: str) -> str:
        """ "wh" or "hw": the longer side is W.

        Raises WrongSetting where `wanted` contradicts what is seen, or is needed.
        """
        first, second = self.sides
        if first == second:
            if wanted == "auto":
                square = f"the pictures of {self.path} are square ({first}x{second})"
                what = f"{square}, which axis comes first cannot be seen"
                right = "choose wh (as MATLAB writes pictures), or hw"
                raise WrongSetting("axes", wanted, f"{what}: {right}")
            return wanted

        found = "wh" if first > second else "hw"
        if wanted not in ("auto", found):
            lie = f"the pictures of {self.path} lie as {first}x{second}"
            what = f"{lie}, and pictures are wider than tall"
            raise WrongSetting("axes", wanted, f"{what}: choose {found}, or auto")
        if found == "hw":
            log(f"{self.path}: pictures lie as {first}x{second}: taken as height x width")
        return found

    def refuse(self, what: str) -> DamagedSource:
        """The error, to be raised, for content that the labelled set cannot have."""
        return DamagedSource(self.path, f": {what}", LOOK_FIRST)

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """One line for whatever h5py raises on a damaged file: nearly every type."""
        try:
            yield
        except (UserError, *NOT_THE_FILES):
            raise
        except Exception as error:
            raise self.refuse(f"{what} cannot be read by {VERSIONS} ({one_line(error)})") from None

    def _dataset(self, key: str) -> h5py.Dataset:
        """A dataset whose data is in this very file: nothing is followed to other files."""
        link = self.file.get(key, getlink=True)
        if link is None:
            what = f"has no {key}: it is another file (NYU Depth v1?), not nyu_depth_v2_labeled.mat"
            raise WrongSource(self.path, what, "Give the path of nyu_depth_v2_labeled.mat")
        if not isinstance(link, h5py.HardLink):
            raise self.refuse(f"{key} is a link, expected a dataset")

        dset = self.file[key]
        if not isinstance(dset, h5py.Dataset):
            raise self.refuse(f"{key} is a group, expected a dataset")
        _check_stored_here(dset.id)
        return dset

    def _check_shapes(self, fields: tuple[str, ...]) -> tuple[int, tuple[int, int]]:
        """Rows and the sides of a picture as stored: every field agrees on them.

        No memory is taken for anything yet.
        """
        for key in CELLS:
            self._dataset(key)
        dsets = {name: self._dataset(KEYS[name]) for name in fields}

        n_file_bytes = self.path.stat().st_size
        for name, dset in dsets.items():
            if problem := _problem(name, dset, n_file_bytes):
                raise self.refuse(f"{KEYS[name]} {problem}")

        found = {KEYS[name]: (dset.shape[0], dset.shape[-2:]) for name, dset in dsets.items()}
        if len(set(found.values())) != 1:
            raise self.refuse(f"its fields disagree on rows and picture size: {found}")
        return next(iter(found.values()))

    @in_hdf5_thread
    def strings(self, key: str, n: int | None = None) -> list[str]:
        """A cell array of strings: an array of references to uint16 character codes.

        Raises DamagedSource where it is something else, or where there are not `n` of them.
        """
        with self._refusing(f"the text in {key}"):
            cell = self._dataset(key)
            is_references = h5py.check_ref_dtype(cell.dtype) is h5py.Reference
            if not is_references or cell.size > max(self.n_rows, MAX_STRINGS):
                raise ValueError(f"{cell.dtype}{cell.shape} is not a cell array")
            if n is not None and n != cell.size:
                raise self.refuse(f"{key} has {cell.size} entries for {n} rows")
            return [self._string(ref) for ref in cell[()].ravel()]

    def _string(self, ref: Any) -> str:
        """One string, through h5py's low level: twice as fast, for the 6,690 of a file."""
        dset = h5py.h5r.dereference(ref, self.file.id)
        if not isinstance(dset, h5py.h5d.DatasetID):
            raise ValueError("a reference leads to no dataset")
        _check_stored_here(dset)
        if h5py.h5a.exists(dset, b"MATLAB_empty"):
            return ""

        dtype = dset.dtype
        is_codes = dtype.kind == "u" and dtype.itemsize == 2
        if not is_codes or math.prod(dset.shape) > MAX_CODES:
            raise ValueError(f"{dtype}{dset.shape} is not character data")
        codes = np.zeros(dset.shape, "<u2")
        dset.read(h5py.h5s.ALL, h5py.h5s.ALL, codes, h5py.h5t.STD_U16LE)

        text = codes.tobytes().decode("utf-16-le")
        if not text.isprintable():
            raise ValueError("control characters")
        return text

    @in_hdf5_thread
    def accel(self) -> np.ndarray:
        """(N, 4) float32: roll, yaw, pitch, tilt; zeros where the file has none.

        Raises DamagedSource.
        """
        if self.file.get("accelData", getlink=True) is None:
            return np.zeros((self.n_rows, 4), "<f4")
        with self._refusing("accelData"):
            dset = self._dataset("accelData")
            if dset.shape != (4, self.n_rows) or dset.dtype.kind != "f":
                raise ValueError(f"{dset.dtype}{dset.shape}, expected float32 (4, {self.n_rows})")
            return np.ascontiguousarray(dset[()].T.astype("<f4"))

    @in_hdf5_thread
    def reader(self, name: str) -> Reader:
        """A reader of the rows of field `name`, whose `read_index` is yet to be called.

        Raises DamagedSource.
        """
        with self._refusing(KEYS[name]):
            dataset = StoredDataset(self.file[KEYS[name]])
            return Reader(dataset, self.handle, is_hw=self.axes == "hw")


def _problem(name: str, dset: h5py.Dataset, n_file_bytes: int) -> str | None:
    """What the labelled set cannot have, or what so small a file cannot hold.

    None where all is right.
    """
    dtype = np.dtype(DTYPES[name])
    if dset.dtype.newbyteorder("=") != dtype:
        return f"is {dset.dtype}, expected {dtype}"

    shape: tuple[int, ...] = dset.shape or ()
    planes = (3,) if name == "rgb" else ()
    if not _is_right_shape(shape, planes):
        return f"has shape {shape}, expected (rows, {'3, ' if planes else ''}640, 480)"
    if math.prod(shape) * dtype.itemsize > n_file_bytes * MAX_DEFLATE:
        return f"claims shape {shape}, more than {n_file_bytes} bytes can hold"

    if not dset.chunks:
        return None
    if math.prod(dset.chunks) * dtype.itemsize > MAX_CHUNK_BYTES:
        return f"has chunks of {dset.chunks}, more than {MAX_CHUNK_BYTES >> 20} MiB each"
    n_along = [
        ceil_div(side, chunk_side) for side, chunk_side in zip(shape, dset.chunks, strict=True)
    ]
    n_chunks = math.prod(n_along)
    n_tiles = math.prod(n_along[1:])
    if n_tiles > MAX_TILES or n_chunks > n_file_bytes:
        return f"has {n_chunks} chunks of {dset.chunks}"
    return None


def _is_right_shape(shape: tuple[int, ...], planes: tuple[int, ...]) -> bool:
    """Whether it is (rows, *planes, side, side)."""
    if len(shape) < 3 or shape[1:-2] != planes:
        return False
    sides_fit = all(MIN_SIDE <= side <= MAX_SIDE for side in shape[-2:])
    return sides_fit and 1 <= shape[0] <= MAX_ROWS


def _check_stored_here(dset: h5py.h5d.DatasetID) -> None:
    """Raise ValueError where the data lies in another file, which nobody has named."""
    if dset.get_offset() is not None:  # contiguous in this file: spares each string a property list
        return
    plist = dset.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise ValueError("its data lies in another file")
