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

Invariant: an address is only ever handed out for a shard that is mapped, and what is mapped is
never unmapped while anybody may read it: not at all of a set that is whole (see stores.cached_set
for one that is not). To read it anywhere else ends the process.

To map a shard again, over itself, is always safe: the new map replaces the old one in one step of
the kernel's, with the same bytes. So two threads that want a shard at once may both map it, and
there is no lock, and none that a fork could hold. A forked child has the range with all that is
mapped in it, and maps further shards for itself.

The same frees page tables. The kernel keeps 4 KB of them for every 2 MB that were touched anywhere,
in each process and as long as the map lasts, whether the pages are still in memory or not: some
500 MB for a million rows. Where that is more than MOST_TABLES of a field, shards are mapped anew,
one after the other, as rows are read.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from weakref import finalize

import numpy as np

from shards.containers import MappedForm, ShardSequence, mapped_form
from shards.errors import DamagedSet, UserError
from shards.files import open_handle
from shards.manifest import Manifest, shard_file
from shards.spec import Field

PROT_NONE = 0
MAP_FIXED = 0x10
MAP_NORESERVE = 0x4000  # of Linux
MAP_FAILED = ctypes.c_void_p(-1).value
MAX_MAPS = Path("/proc/sys/vm/max_map_count")
SPARE_MAPS = 4096  # for Python, torch, and all that is not ours
TABLE_SPAN = 2 << 20  # bytes whose pages stand in one table, itself a page
MOST_TABLES = 16384  # of a field: 64 MB, which 32 GB of shards never need


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
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
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

    def unmap(self, address: int, n_bytes: int) -> None:
        """Have nothing there again, as at first; the file's space on the disk can be free then."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        found = _kernel_calls().mmap(address, n_bytes, PROT_NONE, flags, -1, 0)
        if found != address:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def expect_no_order(self, address: int, n_bytes: int) -> None:
        """Have the kernel read nothing around a place there that is touched: advice, no more."""
        _kernel_calls().madvise(address, n_bytes, mmap.MADV_RANDOM)

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


class MappedShards(ShardSequence):
    """The shards of one field, each [n, ...], in a range that may be shared with other fields."""

    def __init__(self, files: FieldFiles, addresses: AddressRange, first: int) -> None:
        """first: the address of the place of shard 0."""
        self._files = files
        self._range = addresses
        place_bytes = _whole_pages(files.form.n_bytes)
        n_shards = len(files.names)
        self._places = first + place_bytes * np.arange(n_shards, dtype=np.int64)
        # Of each shard:
        self._starts = self._places + len(files.form.header)  # of its first row
        self._is_mapped = np.zeros(n_shards, bool)
        self._is_random = np.zeros(n_shards, bool)
        self._inodes = np.zeros(n_shards, np.uint64)
        self._n_tables = np.zeros(n_shards, np.int64)  # about so many since it was mapped
        self._n_tables_in_all = 0
        self._most_tables_of_shard = 1 + place_bytes // TABLE_SPAN
        self._next_anew = 0
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

        Raises DamagedSet where a file is not what it was when the set was opened.
        """
        wanted = shards[~self._is_mapped[shards]]
        if len(wanted):
            for shard in np.unique(wanted).tolist():
                self._map(shard)

    def count_reads(self, rows: np.ndarray) -> None:
        """These rows [B] are about to be touched."""
        if len(self) * self._most_tables_of_shard > MOST_TABLES:
            self._count_tables(rows // self._rows_per_shard)
            self._free_tables()

    def expect_no_order(self, rows: np.ndarray) -> None:
        """Have the shards of these rows [B] mapped, and read as they are touched, no more."""
        shards = rows // self._rows_per_shard
        new = shards[~self._is_random[shards]]
        if len(new):
            self.need(new)
            for shard in np.unique(new).tolist():
                self._is_random[shard] = True
                self._advise(shard)

    def expects_order(self, rows: np.ndarray) -> bool:
        """Whether that was said of none of the shards of these rows [B]."""
        return not self._is_random[rows // self._rows_per_shard].any()

    def unmap(self, shards: np.ndarray) -> None:
        """Have these shards, [n] numbers, no longer mapped. Nobody may be reading them."""
        for shard in shards.tolist():
            self._is_mapped[shard] = False
            self._is_random[shard] = False
            self._n_tables_in_all -= int(self._n_tables[shard])
            self._n_tables[shard] = 0
            self._range.unmap(int(self._places[shard]), self._files.form_of(shard).n_bytes)

    def _map(self, shard: int) -> None:
        """Map a shard, or map it anew."""
        form = self._files.form_of(shard)
        path = f"{self._files.path}/{self._files.names[shard]}"
        file = open_handle(path)
        try:
            form.check(path, file)
            if self._is_mapped[shard] and self._inodes[shard] != file.inode:
                return  # another file has taken its place: what is read stays what it was
            # Where the kernel has no memory for the new map, the old one may be gone.
            self._is_mapped[shard] = False
            self._range.map_file(int(self._places[shard]), file.handle, form.n_bytes)
        finally:
            os.close(file.handle)
        self._inodes[shard] = file.inode
        self._is_mapped[shard] = True
        if self._is_random[shard]:
            self._advise(shard)

    def _advise(self, shard: int) -> None:
        n_bytes = self._files.form_of(shard).n_bytes
        self._range.expect_no_order(int(self._places[shard]), n_bytes)

    def _count_tables(self, shards: np.ndarray) -> None:
        """One more for each row, and for what it goes beyond, up to all that a shard can have."""
        numbers, n_rows = np.unique(shards, return_counts=True)
        before = self._n_tables[numbers]
        more = before + n_rows * (1 + self.row_bytes // TABLE_SPAN)
        after = np.minimum(more, self._most_tables_of_shard)
        self._n_tables[numbers] = after
        self._n_tables_in_all += int(np.sum(after - before))

    def _free_tables(self) -> None:
        """Map shards anew, in turn, until there are no more tables than is right."""
        for _ in range(len(self)):
            if self._n_tables_in_all <= MOST_TABLES:
                return
            shard = self._next_anew
            self._next_anew = (shard + 1) % len(self)
            n_tables = int(self._n_tables[shard])
            if n_tables:
                self._n_tables[shard] = 0
                self._n_tables_in_all -= n_tables
                with suppress(DamagedSet, OSError):  # gone since: what is mapped stays readable
                    self._map(shard)
        self._n_tables_in_all = 0  # threads that counted at once have lost some

    def __len__(self) -> int:
        return len(self._files.names)

    def get(self, number: int) -> np.ndarray:
        """Read-only. Raises what `need` raises."""
        self.need(np.array([number]))
        form = self._files.form_of(number)
        return self._range.array(int(self._starts[number]), form.dtype, form.shape)


Shards = TypeVar("Shards", bound=MappedShards)


def mapped_shards(
    path: Path,
    manifest: Manifest,
    fields: Sequence[Field],
    made: Callable[[FieldFiles, AddressRange, int], Shards] = MappedShards,  # type: ignore[assignment]
) -> dict[str, Shards]:
    """The shards of these fields, none of which is compressed, in one range; none is mapped yet.

    made: what holds those of one field. Raises CannotReserve, or UserError where they are more than
    the machine lets a process map.
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
        found[name] = made(each, addresses, first)
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
