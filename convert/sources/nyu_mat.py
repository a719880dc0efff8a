"""What is in the .mat: the only place that knows MATLAB's axis order, references and character codes.

Planes come out (W, H), as MATLAB stores them: the picture is their transpose (`resize` transposes the small result).
Rows are read by `chunks.Reader`; everything else here is asked of HDF5, in its own thread (`convert/hdf5.py`).
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

from convert.sources.chunks import Reader
from convert.sources.hdf5 import HDF5, NOT_THE_FILES, VERSIONS, StoredDataset, in_hdf5_thread
from shards.errors import UserError, one_line
from shards.files import log
from shards.spec import SourceIdentity

ORIGINAL_BYTES = 2_972_037_809
ORIGINAL_MD5 = "520609c519fba3ba5ac58c8fefcc3530"
# A library or this program may be at fault too: nobody is sent to fetch 3 GB again before he has looked.
LOOK_FIRST = f"Before you fetch it again compare its md5 with the original's, {ORIGINAL_MD5}; then run: make convert"
CLOSE_S = 3.0
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
KEYS = {
    "rgb": "images",
    "depth": "depths",
    "raw_depth": "rawDepths",
    "label": "labels",
    "instance": "instances",
}
KINDS = {"rgb": "u1", "depth": "f4", "raw_depth": "f4", "label": "u2", "instance": "u1"}
CELLS = ("names", "scenes", "sceneTypes", "rawRgbFilenames", "rawDepthFilenames")
MAX_CHUNK_BYTES = 64 << 20
MAX_DEFLATE = 1100  # deflate never packs better than 1032 to 1
MAX_ROWS, MAX_SIDE = 1_000_000, 2048  # and pixels of a picture
MAX_TILES = 16384  # chunks in one row


@runtime_checkable
class Elsewhere(Protocol):
    """A .mat that is no file: some of a Path's methods, and `pread`, which threads may call at once."""

    name: str

    def exists(self) -> bool: ...
    def stat(self) -> os.stat_result: ...
    def open(self, mode: str, /) -> Any: ...
    def pread(self, n_bytes: int, offset: int) -> bytes: ...


Source = Path | Elsewhere


def sampled_identity(path: Source, n_blocks: int = 16, block: int = 65536) -> SourceIdentity:
    """The source's identity in milliseconds: its size and a SHA-256 over head, tail and fixed positions."""
    n_bytes = path.stat().st_size
    digest = hashlib.sha256(str(n_bytes).encode())
    with path.open("rb") as file:
        for k in range(n_blocks):
            file.seek(max(0, n_bytes - block) * k // (n_blocks - 1))
            digest.update(file.read(block))
    return SourceIdentity(kind="mat", name=path.name, n_bytes=n_bytes, sha256=digest.hexdigest())


def _open(path: Source) -> h5py.File:
    """Open a v7.3 .mat for reading; anything else is a UserError that says what it is."""
    head = None
    try:
        if isinstance(path, Path) and path.is_fifo():  # it would be waited for
            raise OSError(errno.EINVAL, "not a regular file")
        with path.open("rb") as file:
            head = file.read(520)
        return h5py.File(path if isinstance(path, Path) else path.open("rb"), "r", locking=False)
    except NOT_THE_FILES:
        raise
    except Exception as error:  # h5py raises whatever HDF5 comes upon
        raise UserError(f"{path} {_instead(path, head, error)}") from None


def _instead(path: Source, head: bytes | None, error: Exception) -> str:
    """What it is instead of a .mat that can be read, and what to do."""
    if head is None:
        why = str(getattr(error, "strerror", None) or error).lower()
        how = "Check its permissions, and the disk it lies on"
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            how = "Give the path of nyu_depth_v2_labeled.mat, or download it"
        return f"cannot be read ({why}). {how}, then run: make convert"
    if not head or head.lstrip()[:1] == b"<":
        what = "a web page, not a .mat" if head else "empty"
        return f"is {what}: the download failed. Delete it, then run: make convert"
    if head.startswith(b"MATLAB 5.0"):
        return (
            "is MATLAB v5; the labelled set is v7.3. In MATLAB: save -v7.3, then run: make convert"
        )
    if "truncated file" in str(error):
        size = f"{path.stat().st_size} bytes and its end is missing (the original has {ORIGINAL_BYTES})"
        return f"is {size}: the download was cut. Fetch the rest with curl -C -, then run: make convert"
    if HDF5_SIGNATURE in (head[:8], head[512:]):
        return f"is not opened by {VERSIONS} ({one_line(error)}). {LOOK_FIRST}"
    return f"is not a MATLAB v7.3 file ({one_line(error)}). Run: make convert MAT=/path/to/nyu_depth_v2_labeled.mat"


@in_hdf5_thread
def check_opens(path: Source) -> None:
    """Raise UserError where it is no .mat that can be read."""
    _open(path).close()


class Mat:
    """The labelled set in an open .mat: names, per-row facts, and readers for the fields asked for.

    Its methods may be called from any thread: what they ask of HDF5 is asked in HDF5's. `axes`: "wh" or "hw", how the
    pictures lie, or "auto": they are wider than tall. Raises UserError for any other file.
    """

    @in_hdf5_thread
    def __init__(self, path: Source, fields: tuple[str, ...], axes: str = "auto") -> None:
        self.path = path
        self.file = _open(path)
        self.handle: int | Callable[[int, int], bytes] = (
            self.file.id.get_vfd_handle() if isinstance(path, Path) else path.pread
        )
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
        """ "wh" or "hw": the longer side is W."""
        first, second = self.sides
        if first == second:
            if wanted == "auto":
                what = f"its pictures are square ({first}x{second}): which axis comes first cannot be seen"
                raise UserError(
                    f"{self.path}: {what}. Add --axes wh (as MATLAB writes pictures), or --axes hw"
                )
            return wanted
        found = "wh" if first > second else "hw"
        if wanted not in ("auto", found):
            what = f"its pictures lie as {first}x{second}, and pictures are wider than tall: that is --axes {found}"
            raise UserError(f"{self.path}: {what}. Leave --axes {wanted} out")
        if found == "hw":
            log(f"{self.path}: pictures lie as {first}x{second}: taken as height x width")
        return found

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}. {LOOK_FIRST}")

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """One line for whatever h5py raises on a damaged file: nearly every type there is."""
        try:
            yield
        except (UserError, *NOT_THE_FILES):
            raise
        except Exception as error:
            raise self.refuse(f"{what} cannot be read by {VERSIONS} ({one_line(error)})") from None

    def _dataset(self, key: str) -> h5py.Dataset:
        """A dataset whose data is in this very file: nothing that leads to other files is followed."""
        link = self.file.get(key, getlink=True)
        if link is None:
            what = f"has no {key}: it is another file (NYU Depth v1?), not nyu_depth_v2_labeled.mat"
            raise UserError(
                f"{self.path} {what}. Run: make convert MAT=/path/to/nyu_depth_v2_labeled.mat"
            )
        dset = self.file[key] if isinstance(link, h5py.HardLink) else None
        if not isinstance(dset, h5py.Dataset):
            raise self.refuse(
                f"{key} is {'a link' if dset is None else 'a group'}, expected a dataset"
            )
        _check_stored_here(dset.id)
        return dset

    def _check_shapes(self, fields: tuple[str, ...]) -> tuple[int, tuple[int, int]]:
        """Rows and the sides of a picture as stored: every field agrees on them. Nothing is taken memory for yet."""
        for key in CELLS:
            self._dataset(key)
        dsets = {name: self._dataset(KEYS[name]) for name in fields}
        for name, dset in dsets.items():
            if problem := self._problem(name, dset):
                raise self.refuse(f"{KEYS[name]} {problem}")
        found = {KEYS[name]: (dset.shape[0], dset.shape[-2:]) for name, dset in dsets.items()}
        if len(set(found.values())) != 1:
            raise self.refuse(f"its fields disagree on rows and picture size: {found}")
        return next(iter(found.values()))

    def _problem(self, name: str, dset: h5py.Dataset) -> str | None:
        """Type, shape or chunks beyond what the labelled set can be, or larger than so small a file can hold."""
        kind, planes, n_bytes = (
            np.dtype(KINDS[name]),
            (3,) if name == "rgb" else (),
            self.path.stat().st_size,
        )
        shape: tuple[int, ...] = dset.shape or ()
        if dset.dtype.newbyteorder("=") != kind:
            return f"is {dset.dtype}, expected {kind}"
        sides_fit = all(8 <= side <= MAX_SIDE for side in shape[-2:])
        if (
            len(shape) < 3
            or shape[1:-2] != planes
            or not sides_fit
            or not 1 <= shape[0] <= MAX_ROWS
        ):
            return f"has shape {shape}, expected (rows, {'3, ' if planes else ''}640, 480)"
        if math.prod(shape) * kind.itemsize > n_bytes * MAX_DEFLATE:
            return f"claims shape {shape}, more than {n_bytes} bytes can hold"
        if dset.chunks:
            grid = [-(-s // c) for s, c in zip(shape, dset.chunks, strict=True)]
            if math.prod(dset.chunks) * kind.itemsize > MAX_CHUNK_BYTES:
                return f"has chunks of {dset.chunks}, more than {MAX_CHUNK_BYTES >> 20} MiB each"
            if math.prod(grid[1:]) > MAX_TILES or math.prod(grid) > n_bytes:
                return f"has {math.prod(grid)} chunks of {dset.chunks}"
        return None

    @in_hdf5_thread
    def strings(self, key: str, n: int | None = None) -> list[str]:
        """A cell array of (`n`) strings: an array of references to uint16 character codes."""
        with self._refusing(f"the text in {key}"):
            cell = self._dataset(key)
            if h5py.check_ref_dtype(cell.dtype) is not h5py.Reference or cell.size > max(
                self.n_rows, 65535
            ):
                raise ValueError(f"{cell.dtype}{cell.shape} is not a cell array")
            if n not in (None, cell.size):
                raise self.refuse(f"{key} has {cell.size} entries for {n} rows")
            return [self._string(ref) for ref in cell[()].ravel()]

    def _string(self, ref: Any) -> str:
        """One string, through h5py's low level: a file has 6,690 of them, and this is twice as fast."""
        dset = h5py.h5r.dereference(ref, self.file.id)
        if not isinstance(dset, h5py.h5d.DatasetID):
            raise ValueError("a reference leads to no dataset")
        _check_stored_here(dset)
        if h5py.h5a.exists(dset, b"MATLAB_empty"):
            return ""
        dtype, shape = dset.dtype, dset.shape
        if dtype.kind != "u" or dtype.itemsize != 2 or math.prod(shape) > 4096:
            raise ValueError(f"{dtype}{shape} is not character data")
        codes = np.zeros(shape, "<u2")
        dset.read(h5py.h5s.ALL, h5py.h5s.ALL, codes, h5py.h5t.STD_U16LE)
        text = codes.tobytes().decode("utf-16-le")
        if not text.isprintable():
            raise ValueError("control characters")
        return text

    @in_hdf5_thread
    def accel(self) -> np.ndarray:
        """(N, 4) float32: roll, yaw, pitch, tilt; zeros where the file has none."""
        if self.file.get("accelData", getlink=True) is None:
            return np.zeros((self.n_rows, 4), "<f4")
        with self._refusing("accelData"):
            dset = self._dataset("accelData")
            if dset.shape != (4, self.n_rows) or dset.dtype.kind != "f":
                raise ValueError(f"{dset.dtype}{dset.shape}, expected float32 (4, {self.n_rows})")
            return np.ascontiguousarray(dset[()].T.astype("<f4"))

    @in_hdf5_thread
    def reader(self, name: str) -> Reader:
        """A reader of `name`'s rows, whose `read_index` is yet to be called."""
        with self._refusing(KEYS[name]):
            return Reader(
                StoredDataset(self.file[KEYS[name]]), self.handle, is_hw=self.axes == "hw"
            )


def _check_stored_here(dset: h5py.h5d.DatasetID) -> None:
    if dset.get_offset() is not None:  # contiguous in this file: spares each string a property list
        return
    plist = dset.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise ValueError("its data lies in another file")
