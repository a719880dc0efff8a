"""One picture of an array in a MATLAB or HDF5 file, as a table names it: FILE.mat#ROW.

MATLAB's arrays lie the other way round in HDF5: a picture of H x W is (W, H) there, one of
H x W x 3 is (3, W, H), and the rows, MATLAB's last axis, come first. An array of MATLAB 5 is turned
to the same order. In files of others the axes lie as they are. A cell array has a picture a cell.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from convert.sources import matlab5
from convert.sources.errors import BadRow
from convert.sources.hdf5 import NOT_THE_FILES, in_hdf5_thread
from convert.sources.nyu_mat import HDF5_SIGNATURE, HEAD_BYTES, KEYS, MAX_DEFLATE
from convert.sources.picture_headers import check_size
from convert.sources.pictures import as_kind
from shards.errors import one_line

REFERENCE = re.compile(r"(.*?\.(?:mat|h5|hdf5))#(.+)", re.IGNORECASE | re.DOTALL)
NAME_AND_ROW = re.compile(r"(?P<name>.*?)(?:\[(?P<row>\d{1,9})\])?", re.DOTALL)
# The arrays of a field's pictures in the files that are known.
KNOWN_NAMES = {**{field: (key,) for field, key in KEYS.items()}, "label": ("labels", "seglabel")}
OF_MATLAB_ITSELF = ("#refs#", "#subsystem#")
MAX_LISTED = 1000  # arrays of a file that are looked at
MAX_DEPTH = 3  # groups inside each other
ERRNO = re.compile(r"errno = ([1-9]\d*)")  # in what HDF5 says of a disk


def split_reference(path: str) -> tuple[str, str | None]:
    """The file of a table's cell, and what of it is meant: "a.mat#7" gives ("a.mat", "7").

    None as the second where the whole file is meant.
    """
    found = REFERENCE.fullmatch(path)
    return (found[1], found[2]) if found else (path, None)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A picture of an array. name: "" where it goes by the field. row: None where it is alone."""

    name: str
    row: int | None
    field: str
    kind: str

    def has_rows(self, shape: tuple[int, ...], is_matlab: bool) -> bool:
        """Whether the first axis of an array is its rows. Raises BadRow where there is no such."""
        if is_matlab:
            is_one_colour = self.kind == "colour" and len(shape) == 3 and shape[0] == 3
            has_rows = len(shape) > 2 and not is_one_colour
        else:
            has_rows = self.row is not None
        self.check_row(shape[0] if has_rows and shape else 1)
        return has_rows

    def check_row(self, n_rows: int) -> None:
        """Raise BadRow where the array has not this row."""
        if self.row is None and n_rows != 1:
            raise BadRow(f"has {n_rows} rows, and none is named")
        if self.row is not None and self.row >= n_rows:
            raise BadRow(f"has no row {self.row}: the last one is {n_rows - 1}")


def _parse(what: str, field: str, kind: str) -> Wanted:
    if re.fullmatch(r"\d{1,9}", what):
        return Wanted(name="", row=int(what), field=field, kind=kind)
    found = NAME_AND_ROW.fullmatch(what)
    assert found is not None  # it takes any text
    row = None if found["row"] is None else int(found["row"])
    return Wanted(name=found["name"], row=row, field=field, kind=kind)


def read_plane(file: Path, what: str, field: str, kind: str) -> np.ndarray:
    """The pixels that `what` of a file names, as a field of `kind` has them (`pictures.Picture`).

    what: ROW, from 0 on; NAME[ROW]; or NAME of an array that is one picture. Without a name it is
    the array that the labelled NYU set or SUN RGB-D have for `field`, else the one that is called
    like the field, else the only one in the file.

    Raises BadRow where there is no such picture, or the file is damaged; OSError where it is not
    there or cannot be read, as the disk or the network gives it.
    """
    wanted = _parse(what, field, kind)
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    if head.startswith(b"MATLAB 5.0"):
        array = _from_matlab_5(file, wanted)
    elif HDF5_SIGNATURE in (head[:8], head[512:]):
        array = _from_hdf5(file, wanted)
    elif head:
        raise BadRow("is no file of MATLAB or HDF5")
    else:
        raise BadRow("is empty")
    return as_kind(array, kind)


def choose(names: list[str], wanted: Wanted) -> str:
    """The array that is meant, of those in a file. Raises BadRow."""
    if wanted.name in names:
        return wanted.name
    if not wanted.name:
        for known in (*KNOWN_NAMES.get(wanted.field, ()), wanted.field):
            found = [name for name in names if name.rpartition("/")[2] == known]
            if len(found) == 1:
                return found[0]
        if len(names) == 1:
            return names[0]
    there = ", ".join(names[:10]) or "none"
    raise BadRow(f"has no array {wanted.name or wanted.field} (there: {there})")


def check_claim(shape: tuple[int, ...], dtype: np.dtype, n_file_bytes: int) -> None:
    """Raise BadRow for a picture that a file cannot hold, before memory is taken for it.

    shape: the picture's; two of its axes are sides, a third is of planes.
    """
    if dtype.kind not in "buif" or not 2 <= len(shape) <= 3:
        raise BadRow(f"has an array of {dtype}{shape} there, no picture")
    sides = sorted(shape)[-2:]
    check_size(*sides)
    if np.prod(shape, dtype=object) * dtype.itemsize > n_file_bytes * MAX_DEFLATE:
        raise BadRow(f"claims {dtype}{shape}, more than {n_file_bytes} bytes can hold")


# ------------------------------------------------------------------------------------------ HDF5


@in_hdf5_thread
def _from_hdf5(file: Path, wanted: Wanted) -> np.ndarray:
    """(H, W), or planes first or last. Raises BadRow, OSError."""
    is_matlab = file.suffix.lower() == ".mat"
    n_file_bytes = file.stat().st_size
    with _reading(file), h5py.File(file, "r", locking=False) as opened:
        dset = _dataset(opened, wanted)
        if h5py.check_ref_dtype(dset.dtype) is h5py.Reference:
            dset = _cell(opened, dset, wanted)
            has_rows = False
        else:
            has_rows = wanted.has_rows(dset.shape or (), is_matlab)
        check_claim((dset.shape or ())[has_rows:], dset.dtype, n_file_bytes)
        _check_stored_here(dset, n_file_bytes)
        plane = dset[wanted.row] if has_rows else dset[()]
    return plane.T if is_matlab else plane


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """BadRow for whatever h5py raises on damaged data; OSError where it was the disk."""
    try:
        yield
    except (BadRow, *NOT_THE_FILES):
        raise
    except Exception as error:
        found = ERRNO.search(str(error))
        if found:
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from None
        raise BadRow(f"cannot be read as HDF5 ({one_line(error)})") from None


def _dataset(opened: h5py.File, wanted: Wanted) -> h5py.Dataset:
    """Raises BadRow where it is not there. No link is followed: it may lead to another file."""
    if wanted.name:
        found = opened
        for part in wanted.name.strip("/").split("/"):
            is_there = isinstance(found, h5py.Group) and _is_hard(found, part)
            found = found[part] if is_there else None
        if isinstance(found, h5py.Dataset):
            return found
    return opened[choose(list(_array_names(opened)), wanted)]


def _is_hard(group: h5py.Group, name: str) -> bool:
    return isinstance(group.get(name, getlink=True), h5py.HardLink)


def _array_names(group: h5py.Group, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Of what may be pictures: arrays of numbers with two sides, and cell arrays."""
    for k, name in enumerate(group):
        if k == MAX_LISTED:
            return
        if name in OF_MATLAB_ITSELF or not _is_hard(group, name):
            continue
        found = group[name]
        if isinstance(found, h5py.Dataset) and _may_be_pictures(found):
            yield prefix + name
        elif isinstance(found, h5py.Group) and depth < MAX_DEPTH:
            yield from _array_names(found, f"{prefix}{name}/", depth + 1)


def _may_be_pictures(dset: h5py.Dataset) -> bool:
    if h5py.check_ref_dtype(dset.dtype) is h5py.Reference:
        return True
    long_axes = [n for n in dset.shape or () if n > 1]
    is_text = dset.attrs.get("MATLAB_class") == b"char"
    return dset.dtype.kind in "buif" and len(long_axes) >= 2 and not is_text


def _cell(opened: h5py.File, cells: h5py.Dataset, wanted: Wanted) -> h5py.Dataset:
    """The array that a cell refers to. Raises BadRow."""
    wanted.check_row(cells.size or 0)
    if not cells.size:
        raise BadRow("has no rows")
    place = np.unravel_index(wanted.row or 0, cells.shape)
    found = opened[cells[place]]
    if not isinstance(found, h5py.Dataset):
        raise BadRow(f"has no array in its row {wanted.row or 0}")
    return found


def _check_stored_here(dset: h5py.Dataset, n_file_bytes: int) -> None:
    """Raise BadRow where the data lies in another file, which nobody has named, or cannot be."""
    plist = dset.id.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise BadRow("has its data in another file")
    if dset.chunks:
        n_chunk_bytes = np.prod(dset.chunks, dtype=object) * dset.dtype.itemsize
        if n_chunk_bytes > n_file_bytes * MAX_DEFLATE:
            raise BadRow(f"has chunks of {dset.chunks}, more than {n_file_bytes} bytes can hold")


# --------------------------------------------------------------------------------------- MATLAB 5


def _from_matlab_5(file: Path, wanted: Wanted) -> np.ndarray:
    """(H, W) or (H, W, 3). Raises BadRow, OSError."""
    array = matlab5.read_array(file, choose(matlab5.array_names(file), wanted))
    with matlab5.reading():
        if array.is_cells:
            wanted.check_row(math.prod(array.shape))
            plane = array.cell(wanted.row or 0).numbers()
        else:
            has_rows = wanted.has_rows(array.shape, is_matlab=True)
            numbers = array.numbers()
            plane = numbers[wanted.row] if has_rows else numbers
    check_claim(plane.shape, plane.dtype, file.stat().st_size)
    return plane.T
