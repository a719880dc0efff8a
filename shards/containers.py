"""How a field's shards lie, are written and opened: one .npy a shard, or one Zarr v3 group.

Both hold the rows of an uncompressed shard back to back, so both are memory-mapped without reading
them:

    rgb-00000.npy     [128 bytes of header][row 0][row 1] ...
    rgb/c/0/0/0/0     [row 0][row 1] ... [index: (offset, bytes) a row, CRC32C]   one row a chunk

An uncompressed Zarr shard is written as it lies in memory, with its index behind it: what
zarr-python writes, to the byte, at several times its speed. Compressed shards, the metadata and the
columns are zarr-python's own output.
"""

import json
import math
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from shards.errors import DamagedSet, WrongSetting, one_line
from shards.files import (
    FileEntry,
    Folder,
    LocalFolder,
    OpenFile,
    WritableFolder,
    check_bytes,
    check_size,
    open_handle,
)
from shards.manifest import Column, Manifest, ShardEntry, column_file, shard_file
from shards.spec import Codecs, Field
from shards.texts import Texts

NPY_HEADER = 128  # bytes
CODECS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "zstd": {"name": "zstd", "configuration": {"level": 3}},
    "blosc": {
        "name": "blosc",
        "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"},
    },
    "blosc-zstd": {
        "name": "blosc",
        "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle"},
    },
}


def is_mapped(codecs: Codecs, field: str) -> bool:
    """Whether the field's shards are read by mapping their files, and not decoded."""
    return codecs is None or codecs[field] == "none"


def check_codecs(codecs: Codecs, fields: Sequence[str]) -> None:
    """Raise WrongSetting for what is no codec of each field."""
    if codecs is None:
        return
    if not isinstance(codecs, dict) or codecs.keys() != set(fields):
        raise WrongSetting("codecs", repr(codecs), f"give one for each of {','.join(fields)}")
    for codec in codecs.values():
        if codec not in CODECS:
            raise WrongSetting("codec", codec, f"choose one of {', '.join(CODECS)}")


# ----------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, kw_only=True)
class ShardForm:
    """How every shard of a set is stored.

    codecs: of each field of a Zarr set; None: .npy. n_slots: the rows that a shard of a Zarr array
    has room for; a set's last one may hold fewer.
    """

    codecs: Codecs
    n_slots: int


def write_field(
    folder: WritableFolder, field: Field, shard: int, rows: np.ndarray, form: ShardForm
) -> dict[str, FileEntry]:
    """Write rows [n, ...], at most `form.n_slots` of them, as that shard: the entry of its file."""
    codecs = form.codecs
    name = shard_file(field, shard, codecs is not None)
    if codecs is None:
        parts = npy_parts(rows)
    elif codecs[field.name] == "none":
        parts = raw(rows), shard_index(len(rows), rows[0].nbytes, form.n_slots)
    else:
        files: dict[str, Any] = {}
        _create_field(files, field, rows.shape, form.n_slots, codecs[field.name])[:] = rows
        parts = (files[shard_file(field, 0, True)].to_bytes(),)
    return {name: folder.put(name, *parts)}


def write_columns(
    folder: WritableFolder, manifest: Manifest, values: Mapping[str, np.ndarray]
) -> tuple[dict[str, FileEntry], dict[str, FileEntry]]:
    """Write the columns, and the metadata of a Zarr set: the entries of both.

    `values`: the content of every array, by its name (`rows-scene`; see `arrays_of_columns`).
    """
    arrays = {array: column for column in manifest.columns.values() for array in column.arrays}
    if not manifest.is_zarr:
        return write_npy_columns(folder, arrays, values), {}
    files = zarr_columns(arrays, values) | _zarr_group(manifest)
    written = {name: folder.put(name, data) for name, data in files.items()}
    metadata = {name: written.pop(name) for name in files if name.endswith("zarr.json")}
    folder.settle(manifest.files)
    return written, metadata


def write_npy_columns(
    folder: WritableFolder, arrays: Mapping[str, Column], values: Mapping[str, np.ndarray]
) -> dict[str, FileEntry]:
    """Write these arrays, one file each: their entries."""
    written = {}
    for array, column in arrays.items():
        name = column_file(array, column, False)
        written[name] = folder.put(name, *npy_parts(values[array]))
    return written


def arrays_of_columns(
    columns: Mapping[str, Column], values: Mapping[str, np.ndarray | Sequence[str] | Texts]
) -> dict[str, np.ndarray]:
    """One value a row -> the arrays that are stored; texts as UTF-8, offsets [N + 1] and bytes.

    `Texts` are handed on as they are.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, column in columns.items():
        if column.dtype != "text":
            arrays[f"rows-{name}"] = np.ascontiguousarray(values[name], column.dtype)
            continue
        value = values[name]
        texts = value if isinstance(value, Texts) else Texts.from_strings(value)
        arrays[f"rows-{name}-offsets"] = texts.offsets.astype("<u8", copy=False)
        arrays[f"rows-{name}-bytes"] = texts.utf8
    return arrays


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first NPY_HEADER bytes of every .npy here, as numpy writes them."""
    lengths = tuple(map(int, shape))
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {lengths}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(NPY_HEADER - 11).encode() + b"\n"


def npy_parts(array: np.ndarray) -> tuple[Any, ...]:
    """Header and content of a .npy."""
    return npy_header(array.dtype.str, array.shape), raw(array)


def raw(array: np.ndarray) -> Any:
    """Its bytes, not copied where it is C-contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


CASTAGNOLI = 0x82F63B78  # the polynomial of CRC32C, lowest bit first


@cache
def shard_index(n_rows: int, row_bytes: int, n_slots: int) -> bytes:
    """The end of an uncompressed Zarr shard: (offset, bytes) a row, then their CRC32C.

    Where there is no row every bit is 1.
    """
    index = np.full((n_slots, 2), 2**64 - 1, "<u8")
    index[:n_rows, 0] = np.arange(n_rows) * row_bytes
    index[:n_rows, 1] = row_bytes
    return index.tobytes() + crc32c(index.tobytes())


def crc32c(data: bytes) -> bytes:
    """The Castagnoli CRC, little-endian, as Zarr puts it behind a shard's index."""
    table = np.arange(256)
    for _ in range(8):
        is_odd = (table & 1) == 1
        table = (table >> 1) ^ np.where(is_odd, CASTAGNOLI, 0)
    of_byte: list[int] = table.tolist()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = of_byte[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


# ----------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class MappedForm:
    """How the rows of an uncompressed shard lie in its file.

    header: in front of them, of a .npy. index: behind them, of a Zarr shard.
    """

    dtype: str
    shape: tuple[int, ...]  # [n, ...]
    header: bytes = b""
    index: bytes = b""

    @property
    def n_bytes_of_rows(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def n_bytes(self) -> int:
        """Of the file."""
        return len(self.header) + self.n_bytes_of_rows + len(self.index)

    def check(self, path: str | Path, file: OpenFile) -> None:
        """Size, header and index of an opened file; no row is read. Raises DamagedSet."""
        if self.index:
            start = max(0, file.n_bytes - len(self.index))
            self._check_index(path, start, os.pread(file.handle, len(self.index), start))
        else:
            check_size(path, file, self.n_bytes)
            check_bytes(path, file, 0, self.header)

    def rows_in(self, address: str, data: bytes) -> np.ndarray:
        """The rows [n, ...] of a file that was read whole; not copied. Raises DamagedSet."""
        if self.index:
            start = max(0, len(data) - len(self.index))
            self._check_index(address, start, data[start:])
        elif len(data) != self.n_bytes or not data.startswith(self.header):
            raise DamagedSet(address, "is damaged (its size or header is not the manifest's)")
        values = np.frombuffer(data, self.dtype, math.prod(self.shape), len(self.header))
        return values.reshape(self.shape)

    def _check_index(self, path: str | Path, start: int, found: bytes) -> None:
        """Raise DamagedSet where what lies there does not say that the rows lie back to back from
        byte 0.
        """
        if (start, found) != (self.n_bytes_of_rows, self.index):
            is_whole = crc32c(found[:-4]) == found[-4:]
            problem = "does not hold its rows back to back: it cannot be mapped"
            raise DamagedSet(path, problem if is_whole else "has a damaged shard index")


def mapped_form(manifest: Manifest, field: Field, n_rows: int) -> MappedForm:
    """Of the shards of an uncompressed field that have so many rows."""
    shape = (n_rows, *field.row_shape(manifest.settings.size))
    if not manifest.is_zarr:
        return npy_form(field.dtype, shape)
    return zarr_form(field.dtype, shape, manifest.settings.rows_per_shard)


def npy_form(dtype: str, shape: tuple[int, ...]) -> MappedForm:
    """Of a .npy with rows [n, ...]."""
    return MappedForm(dtype=dtype, shape=shape, header=npy_header(dtype, shape))


def zarr_form(dtype: str, shape: tuple[int, ...], n_slots: int) -> MappedForm:
    """Of a Zarr shard with rows [n, ...], which has room for n_slots."""
    row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    return MappedForm(dtype=dtype, shape=shape, index=shard_index(shape[0], row_bytes, n_slots))


def map_file(path: Path, form: MappedForm) -> np.ndarray:
    """Memory-map a shard [n, ...] read-only after checking its file; a descriptor stays open with
    it. Raises DamagedSet.
    """
    file = open_handle(path)
    try:
        form.check(path, file)
    finally:
        os.close(file.handle)
    offset = len(form.header)
    return np.memmap(path, dtype=form.dtype, mode="r", offset=offset, shape=form.shape)


class ShardSequence(Sequence[np.ndarray]):
    """The shards of a field in row order, each [n, ...], had when it is asked for."""

    @overload
    def __getitem__(self, shard: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, shard: slice) -> list[np.ndarray]: ...
    def __getitem__(self, shard: int | slice) -> np.ndarray | list[np.ndarray]:
        """One, or those of a slice. Raises IndexError, and what `get` raises."""
        if isinstance(shard, slice):
            return [self[k] for k in range(*shard.indices(len(self)))]
        return self.get(range(len(self))[shard])

    @abstractmethod
    def get(self, number: int) -> np.ndarray:
        """The shard of a number that exists."""


def open_field(folder: Folder, manifest: Manifest, field: Field, shard: int) -> np.ndarray:
    """One shard [n, ...] of a field.

    Of a folder of this machine it is a read-only memory map; from elsewhere, and where it is
    compressed, it is in memory. Raises DamagedSet where its file is not as the manifest says.
    """
    entry = manifest.shards[shard]
    name = shard_file(field, shard, manifest.is_zarr)
    if is_mapped(manifest.codecs, field.name):
        form = mapped_form(manifest, field, entry.n_rows)
        if isinstance(folder, LocalFolder):
            return map_file(folder.path / name, form)
        return form.rows_in(f"{folder}/{name}", folder.read(name))
    if isinstance(folder, LocalFolder):
        path = folder.path / field.name
        return _decoded(_array_of(path, path, manifest, field), path, entry)
    address = f"{folder}/{field.name}"
    metadata = f"{field.name}/zarr.json"
    files = {each: folder.read(each) for each in (metadata, name)}
    array = _array_of(_in_memory(files, field.name), address, manifest, field)
    return _decoded(array, address, entry)


def fetch_row(
    folder: Folder, manifest: Manifest, field: Field, shard: int, place: int
) -> np.ndarray:
    """One row of a shard of an uncompressed field, of which nothing else is read.

    Raises DamagedSet.
    """
    entry = manifest.shards[shard]
    form = mapped_form(manifest, field, entry.n_rows)
    shape = form.shape[1:]
    n_bytes = math.prod(shape) * np.dtype(form.dtype).itemsize
    start = len(form.header) + place * n_bytes
    name = shard_file(field, shard, manifest.is_zarr)
    data = folder.read(name, start, start + n_bytes)
    if len(data) != n_bytes:
        raise DamagedSet(f"{folder}/{name}", "is damaged (its size is not the manifest's)")
    return np.frombuffer(data, form.dtype).reshape(shape)


UNREADABLE = (ValueError, TypeError, KeyError, RuntimeError, OSError)  # what zarr-python raises


def _array_of(store: Any, address: Path | str, manifest: Manifest, field: Field) -> Any:
    """zarr-python's array of a compressed field; none of its data is read.

    Raises DamagedSet where its metadata say another shape, type or rows a chunk than the manifest:
    as much memory is taken as they say.
    """
    from zarr import open_array

    try:
        array = open_array(store, mode="r")
        said = (array.shape, array.dtype.str, array.shards, array.chunks)
    except UNREADABLE as error:
        raise DamagedSet(address, f"is damaged ({one_line(error)})") from None
    row = field.row_shape(manifest.settings.size)
    shards = (manifest.settings.rows_per_shard, *row)
    if said != ((manifest.n_rows, *row), field.dtype, shards, (1, *row)):
        raise DamagedSet(address, f"is damaged (an array {said[0]} of {said[1]}, no such field)")
    return array


def _decoded(array: Any, address: Path | str, entry: ShardEntry) -> np.ndarray:
    """The rows of a shard of a compressed field's array, in memory."""
    try:
        return np.asarray(array[entry.start : entry.stop])
    except UNREADABLE as error:
        raise DamagedSet(address, f"is damaged ({one_line(error)})") from None


def _in_memory(files: Mapping[str, bytes], array: str) -> Any:
    """A store of zarr-python's that holds these files of one array."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore, StorePath

    buffer = default_buffer_prototype().buffer
    return StorePath(
        MemoryStore({name: buffer.from_bytes(data) for name, data in files.items()}), array
    )


# -------------------------------------------------------------------------------- zarr-python's par


def zarr_columns(
    arrays: Mapping[str, Column], values: Mapping[str, np.ndarray]
) -> dict[str, bytes]:
    """The files of the columns' arrays: data and metadata."""
    files: dict[str, Any] = {}
    for name, column in arrays.items():
        value = values[name]
        attributes = {"encoding": "utf-8"} if name.endswith("-bytes") else {}
        axes = ["row", f"{column.name}_axis"] if value.ndim == 2 else [_axis_of(name)]
        chunks = tuple(max(1, n) for n in value.shape)
        _create(files, name, axes, attributes, data=value, chunks=chunks, compressors=None)
        if not value.size:  # Zarr stores no chunk of an array without elements
            files[column_file(name, column, True)] = b""
    return {
        name: data if isinstance(data, bytes) else data.to_bytes() for name, data in files.items()
    }


def _axis_of(array: str) -> str:
    """Only columns with one value a row have rows as their axis: xarray wants equal lengths."""
    if array.endswith(("-offsets", "-bytes")):
        return f"{array.removeprefix('rows-')}_axis"
    return "row"


def _zarr_group(manifest: Manifest) -> dict[str, bytes]:
    """The metadata of the group and its fields; the group's attributes are those of version 1."""
    from zarr import create_group
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    facts = {
        "fingerprint": manifest.fingerprint,
        "settings": manifest.settings.to_json(),
        "names": names_of(manifest),
    }
    create_group(MemoryStore(files), attributes=json.loads(json.dumps(facts, sort_keys=True)))
    assert manifest.codecs is not None
    for name, field in manifest.fields.items():
        shape = (manifest.n_rows, *field.row_shape(manifest.settings.size))
        n_slots = manifest.settings.rows_per_shard
        _create_field(files, field, shape, n_slots, manifest.codecs[name])
    return {name: data.to_bytes() for name, data in files.items()}


def names_of(manifest: Manifest) -> dict[str, Any]:
    """What the numbers in columns and labels stand for, for readers of the Zarr group."""
    dataset = manifest.dataset
    names: dict[str, Any] = {
        "scenes": list(manifest.scenes),
        "scene_types": list(dataset.scene_types),
        "classes": list(dataset.label_names),
    }
    for table in dataset.label_tables:
        names[f"classes{len(table.names)}"] = list(table.names)
        names[f"to{len(table.names)}"] = list(table.ids)
    return names


def _create_field(
    files: dict[str, Any], field: Field, shape: tuple[int, ...], n_slots: int, codec: str
) -> Any:
    """A field's array over `files` (a dict as the store)."""
    row = shape[1:]
    axes = ("row", *("channel", "y", "x")[-len(row) :])
    return _create(
        files,
        field.name,
        axes,
        {"units": field.unit, "invalid": field.invalid},
        shape=shape,
        dtype=field.dtype,
        shards=(n_slots, *row),
        chunks=(1, *row),
        compressors=CODECS[codec],
    )


def _create(
    files: dict[str, Any], name: str, axes: Iterable[str], attributes: dict[str, Any], **how: Any
) -> Any:
    """An array where no row is left out for being all 0."""
    from zarr import create_array
    from zarr.storage import MemoryStore

    return create_array(
        MemoryStore(files),
        name=name,
        fill_value=0,
        dimension_names=tuple(axes),
        attributes=attributes,
        config={"write_empty_chunks": True},
        **how,
    )
