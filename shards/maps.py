"""The shards of some fields in one range of addresses, each mapped when a row of it is wanted.

The range is reserved as a whole when a set is begun to be read: addresses without memory, which
cost nothing however many there are. Every shard has its place in it from then on:

    first field                                          second field
    | 00000 |       | 00002 |       |       | ... |      |       | 00001 |       | ... |
     mapped  nothing mapped   to be mapped
     <- the largest file in whole pages ->                low address of shard k = first + k * place

A shard's file is opened, checked as at the opening of the set, mapped over its place, and closed:
no descriptor is kept, whatever the number of shards (numpy's memory map keeps one each), and a set
of which some shards are read maps those alone. Mapped they stay, until nobody holds the range.

Invariant: an address is only ever handed out for a shard that is mapped. To read the range anywhere
else ends the process.

Two threads that want the same shard at once may both map it: the second map replaces the first one
in one step of the kernel's, with the same bytes, so that there is no lock, and none that a fork
could hold. A forked child has the range with all that is mapped in it, and maps further shards for
itself.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, overload
from weakref import finalize

import numpy as np

from shards.containers import MappedForm, mapped_form
from shards.errors import UserError
from shards.files import open_handle
from shards.manifest import Manifest, shard_file
from shards.spec import Field

PROT_NONE = 0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000  # of Linux
MAP_FAILED = ctypes.c_void_p(-1).value
MAX_MAPS = Path("/proc/sys/vm/max_map_count")
SPARE_MAPS = 4096  # for Python, torch, and all that is not ours


class CannotReserve(Exception):
    """This system has no such ranges, or none so large: shards are mapped as numpy does."""


# ------------------------------------------------------------------------------------- the range


@cache
def _kernel_calls() -> Any:
    """mmap and munmap of the C library. Raises CannotReserve where they are not known.

    Called with Python's lock held: to get it back beside a training step takes 5 ms, a map 10 us.
    """
    if sys.platform != "linux" or sys.maxsize < 2**32:
        raise CannotReserve(sys.platform)
    library = ctypes.PyDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    library.munmap.restype = ctypes.c_int
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library


class AddressRange:
    """Addresses without memory, of which nobody else in this process gets any."""

    def __init__(self, n_bytes: int) -> None:
        """Raises CannotReserve."""
        calls = _kernel_calls()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        address = calls.mmap(None, n_bytes, PROT_NONE, flags, -1, 0)
        if address == MAP_FAILED:
            raise CannotReserve(os.strerror(ctypes.get_errno()))
        self.first = int(address)
        self.n_bytes = n_bytes
        self._ended = finalize(self, calls.munmap, address, n_bytes)
        self._ended.atexit = False  # the process ends: threads may still read

    def __reduce__(self) -> str:
        raise TypeError("addresses are those of one process: they cannot be copied")

    @property
    def end(self) -> int:
        return self.first + self.n_bytes

    def map_file(self, address: int, handle: int, n_bytes: int) -> None:
        """Have an open file's first bytes at an address of the range. Raises OSError."""
        flags = mmap.MAP_SHARED | MAP_FIXED
        found = _kernel_calls().mmap(address, n_bytes, mmap.PROT_READ, flags, handle, 0)
        if found != address:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def array(self, address: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """What is mapped there, read-only; the range stays as long as the array does."""
        return np.asarray(_Memory(self, address, dtype, shape))


class _Memory:
    """What numpy asks for memory that is not its own."""

    def __init__(
        self, owner: AddressRange, address: int, dtype: str, shape: tuple[int, ...]
    ) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),  # read-only
            "typestr": dtype,
            "shape": shape,
        }


# ------------------------------------------------------------------------------------ the shards


@dataclass(frozen=True, kw_only=True)
class FieldFiles:
    """The files of a field's shards, in row order.

    form, last_form: how the rows lie in each, and in the last, which may have fewer.
    """

    path: str  # of the set
    names: Sequence[str]
    form: MappedForm
    last_form: MappedForm

    def form_of(self, shard: int) -> MappedForm:
        return self.last_form if shard == len(self.names) - 1 else self.form


class MappedShards(Sequence[np.ndarray]):
    """The shards of one field, each [n, ...], in a range that may be shared with other fields."""

    def __init__(self, files: FieldFiles, addresses: AddressRange, first: int) -> None:
        """first: the address of the place of shard 0."""
        self._files = files
        self._range = addresses
        place_bytes = _whole_pages(files.form.n_bytes)
        n_shards = len(files.names)
        self._is_mapped = np.zeros(n_shards, bool)
        self._places = first + place_bytes * np.arange(n_shards, dtype=np.int64)
        self._starts = self._places + len(files.form.header)  # of the first row of each
        self._rows_per_shard = files.form.shape[0]
        self.row_bytes = files.form.n_bytes_of_rows // self._rows_per_shard
        self.itemsize = np.dtype(files.form.dtype).itemsize
        self.low = addresses.first
        self.high = addresses.end

    def addresses(self, rows: np.ndarray) -> np.ndarray:
        """[B] int64: of the first byte of each of these rows, whose shards are mapped from now on.

        Raises what `need` raises.
        """
        shards = rows // self._rows_per_shard
        self.need(shards)
        found: np.ndarray = self._starts[shards] + rows % self._rows_per_shard * self.row_bytes
        return found

    def need(self, shards: np.ndarray) -> None:
        """Have these shards, [n] numbers, mapped.

        Raises DamagedSet where a file is not what it was when the set was opened, UserError where
        the machine lets no process map so many.
        """
        wanted = shards[~self._is_mapped[shards]]
        if len(wanted):
            for shard in np.unique(wanted).tolist():
                self._map(shard)

    def _map(self, shard: int) -> None:
        form = self._files.form_of(shard)
        path = f"{self._files.path}/{self._files.names[shard]}"
        file = open_handle(path)
        try:
            form.check(path, file)
            self._range.map_file(int(self._places[shard]), file.handle, form.n_bytes)
        finally:
            os.close(file.handle)
        self._is_mapped[shard] = True

    def __len__(self) -> int:
        return len(self._files.names)

    @overload
    def __getitem__(self, shard: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, shard: slice) -> list[np.ndarray]: ...
    def __getitem__(self, shard: int | slice) -> np.ndarray | list[np.ndarray]:
        """Shard k [n, ...], read-only. Raises IndexError, and what `need` raises."""
        if isinstance(shard, slice):
            return [self[k] for k in range(*shard.indices(len(self)))]
        number = range(len(self))[shard]
        self.need(np.array([number]))
        form = self._files.form_of(number)
        return self._range.array(int(self._starts[number]), form.dtype, form.shape)


def mapped_shards(
    path: Path, manifest: Manifest, fields: Sequence[Field]
) -> dict[str, MappedShards]:
    """The shards of these fields, none of which is compressed, in one range; none is mapped yet.

    Raises CannotReserve, or UserError where they are more than the machine lets a process map.
    """
    files = {field.name: _files_of(path, manifest, field) for field in fields}
    _check_count(path, sum(len(each.names) for each in files.values()))
    n_bytes = {
        name: len(each.names) * _whole_pages(each.form.n_bytes) for name, each in files.items()
    }
    addresses = AddressRange(sum(n_bytes.values()))
    found = {}
    first = addresses.first
    for name, each in files.items():
        found[name] = MappedShards(each, addresses, first)
        first += n_bytes[name]
    return found


def _files_of(path: Path, manifest: Manifest, field: Field) -> FieldFiles:
    shards = manifest.shards
    return FieldFiles(
        path=str(path),
        names=[shard_file(field, k, manifest.is_zarr) for k in range(len(shards))],
        form=mapped_form(manifest, field, shards[0].n_rows),
        last_form=mapped_form(manifest, field, shards[-1].n_rows),
    )


def _whole_pages(n_bytes: int) -> int:
    return -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _check_count(path: Path, n_files: int) -> None:
    """Raise UserError where the kernel would refuse the last of them, in the middle of an epoch."""
    try:
        allowed = int(MAX_MAPS.read_text())
    except (OSError, ValueError):  # not told here
        return
    # Mapped files and what is still reserved between them: at most one more than there are places.
    if n_files + SPARE_MAPS > allowed:
        what = f"has {n_files} files to be mapped, this machine allows a process {allowed} maps"
        right = f"Set vm.max_map_count to {n_files + SPARE_MAPS} or more"
        raise UserError(f"{path} {what}", right)
