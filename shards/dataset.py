"""A finished set, opened: found, checked once, then handed on. Maps and facts of rows are given out
on request.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from shards.containers import (
    NPY_HEADER,
    MappedForm,
    ShardSequence,
    fetch_row,
    is_mapped,
    mapped_form,
    npy_header,
    open_field,
)
from shards.errors import DamagedSet, MissingField, MissingSet, SeveralSets
from shards.files import FileEntry, Folder, LocalFolder, check_size, open_handle
from shards.gather import RowGather
from shards.manifest import (
    FAILED,
    MANIFEST,
    PROVENANCE,
    RIGHT_ROW,
    Column,
    ColumnValues,
    Manifest,
    address,
    column_file,
    read_manifest,
    shard_file,
)
from shards.maps import CannotReserve, mapped_shards
from shards.spec import NO_SCENE_TYPE, SPLITS, Codecs, ConversionSettings, DatasetSpec, Field
from shards.texts import Texts

DIRECTORY_NAME = re.compile(r"[a-z][a-z0-9_]*-\d+-[0-9a-f]{8}(\.zarr)?")
# Beside a set's files: how it was made; receipts that a kill just after the commit left; what
# version 1 called two of the columns, left by a kill just after an upgrade.
NOT_CONTENT = re.compile(
    rf"{re.escape(MANIFEST)}|{re.escape(PROVENANCE)}|{re.escape(FAILED)}|receipt-\d+\.json"
    r"|rows-raw_(rgb|depth)(\.npy|(/.*)?)"
)
# What file managers, network file systems and editors leave in any folder that they show: no
# damage, and nobody's work.
LITTER = (
    ".DS_Store",
    "._*",
    "Icon\r",
    "[Tt]humbs.db",
    "[Dd]esktop.ini",
    ".directory",
    ".nfs*",
    ".fuse_hidden*",
    ".~lock*",
)

MAX_TEXT_BYTES = 1 << 16  # of one row's text


class StoredSet:
    """A finished set, wherever it lies: what its manifest says, and its files read on request."""

    manifest: Manifest

    @property
    def folder(self) -> Folder:
        """Its files."""
        raise NotImplementedError

    @property
    def address(self) -> Path | str:
        """Where it is, for messages and the next command."""
        return address(self.folder)

    @property
    def settings(self) -> ConversionSettings:
        return self.manifest.settings

    @property
    def dataset(self) -> DatasetSpec:
        return self.manifest.dataset

    @property
    def codecs(self) -> Codecs:
        return self.manifest.codecs

    @property
    def n_rows(self) -> int:
        return self.manifest.n_rows

    @property
    def n_shards(self) -> int:
        return len(self.manifest.shards)

    def field(self, name: str) -> Field:
        """Raises MissingField."""
        if name not in self.manifest.fields:
            raise MissingField(self.address, name, list(self.manifest.fields))
        return self.manifest.fields[name]

    def shards(self, field: str) -> Sequence[np.ndarray]:
        """The field's shards in row order, each [n, ...], had when it is asked for.

        Raises MissingField now, DamagedSet then.
        """
        return FetchedShards(self.folder, self.manifest, self.field(field))

    def shard(self, field: str, k: int) -> np.ndarray:
        """Shard k [n, ...]: a read-only memory map, or, where compressed, decoded into memory.

        Raises MissingField, or DamagedSet where its file is not as the manifest says.
        """
        return open_field(self.folder, self.manifest, self.field(field), k)

    def row(self, field: str, row: int) -> np.ndarray:
        """One row of a field. Raises as `shard` does."""
        shard, place = divmod(row, self.settings.rows_per_shard)
        return self.shard(field, shard)[place]

    def column(self, name: str) -> np.ndarray:
        """One value a row [N, ...]: numbers as stored, texts as str. Hashed, and in range.

        As an array every text takes as much memory as the longest one: `texts` does not. Raises
        DamagedSet, or KeyError for a column that the set does not have.
        """
        column = self.manifest.columns[name]
        if column.dtype == "text":
            return np.array(list(self.texts(name)), dtype=str)
        values = self._array(f"rows-{name}", column)
        if len(values) != self.n_rows or not self._is_in_range(name, values):
            raise DamagedSet(self._column_address(f"rows-{name}", column), "is damaged")
        return values

    def values(self, name: str) -> ColumnValues:
        """A column of either kind, as it is stored. Raises as `column` does."""
        is_text = self.manifest.columns[name].dtype == "text"
        return self.texts(name) if is_text else self.column(name)

    def texts(self, name: str) -> Texts:
        """The texts of a column, one a row: no Python object each. Hashed.

        Raises DamagedSet, or KeyError for a column of texts that the set does not have.
        """
        column = self.manifest.columns[name]
        if column.dtype != "text":
            raise KeyError(name)
        offsets_name, bytes_name = column.arrays
        offsets = self._array(offsets_name, column)
        utf8 = self._array(bytes_name, column)
        try:
            found = Texts(offsets, utf8)
            is_right = len(found) == self.n_rows and found.lengths.max() <= MAX_TEXT_BYTES
        except ValueError:
            is_right = False
        if not is_right:
            raise DamagedSet(self._column_address(offsets_name, column), "is damaged")
        if not found.are_utf8():
            raise DamagedSet(self._column_address(bytes_name, column), "is damaged")
        return found

    def _column_address(self, array: str, column: Column) -> str:
        return f"{self.folder}/{column_file(array, column, self.manifest.is_zarr)}"

    def _array(self, array: str, column: Column) -> np.ndarray:
        """The array [n, ...] of a column, its every byte as the manifest says."""
        name = column_file(array, column, self.manifest.is_zarr)
        entry = self.manifest.column_files[name]
        data = self.folder.read(name)
        dtype = np.dtype(column.arrays[array])
        start = 0 if self.manifest.is_zarr else NPY_HEADER
        n_items, rest = divmod(len(data) - start, dtype.itemsize * int(np.prod(column.shape)))
        shape = (n_items, *column.shape)
        is_right = hashlib.sha256(data).hexdigest() == entry.sha256 and not rest
        if is_right and not self.manifest.is_zarr:
            is_right = data[:start] == npy_header(dtype.str, shape)
        if not is_right:
            raise DamagedSet(self._column_address(array, column), "is damaged")
        return np.frombuffer(data, dtype, offset=start).reshape(shape)

    def _is_in_range(self, name: str, values: np.ndarray) -> bool:
        """Whether every number of a column stands for something."""
        if name == "split":
            return bool(values.max() < len(SPLITS))
        if name == "scene":
            return bool(values.max() < len(self.manifest.scenes))
        if name == "scene_type":
            return bool(
                np.all((values < len(self.dataset.scene_types)) | (values == NO_SCENE_TYPE))
            )
        return True


@dataclass(frozen=True)
class ShardSet(StoredSet):
    """A finished set on this machine's file systems. Its arrays are mapped on request."""

    path: Path
    manifest: Manifest

    @property
    def folder(self) -> Folder:
        return LocalFolder(self.path)

    def shards(self, field: str) -> Sequence[np.ndarray]:
        """The field's shards in row order, each [n, ...]: mapped, or decoded, when asked for.

        Mapped ones stay mapped while the sequence or one of its arrays is held. Raises MissingField
        now, DamagedSet then.
        """
        if is_mapped(self.codecs, self.field(field).name):
            return self.maps([field])[field]
        return super().shards(field)

    def maps(self, fields: Iterable[str]) -> dict[str, Sequence[np.ndarray]]:
        """The shards of several fields to be read together: as `shards`, in one address range.

        Compressed ones are decoded into memory now, all of them. Raises MissingField, DamagedSet,
        and UserError where they are more than the machine lets a process map.
        """
        found: dict[str, Sequence[np.ndarray]] = {}
        mapped = []
        for name in fields:
            field = self.field(name)
            if is_mapped(self.codecs, name):
                mapped.append(field)
            else:
                found[name] = list(FetchedShards(self.folder, self.manifest, field))
        if mapped:
            found |= self._mapped(mapped)
        return found

    def gather(self, fields: Sequence[str]) -> RowGather:
        """What takes many rows of several fields at once. Raises as `maps`."""
        return RowGather(self.maps(fields), self.settings.size)

    def are_here(self, rows: np.ndarray) -> np.ndarray:
        """[B] whether these rows [B] are on this machine."""
        return np.ones(len(rows), bool)

    def wait_for(self, rows: np.ndarray) -> None:
        """Return once these rows [B] are on this machine."""

    def _mapped(self, fields: Sequence[Field]) -> Mapping[str, Sequence[np.ndarray]]:
        try:
            return mapped_shards(self.path, self.manifest, fields)
        except CannotReserve:  # then a map and a descriptor of numpy's for each shard, all at once
            shards = range(self.n_shards)
            return {field.name: [self.shard(field.name, k) for k in shards] for field in fields}


@dataclass(frozen=True)
class SetInStore(StoredSet):
    """A finished set in a store, such as a bucket: a shard is fetched when it is asked for."""

    store: Folder
    manifest: Manifest

    @property
    def folder(self) -> Folder:
        return self.store

    def row(self, field: str, row: int) -> np.ndarray:
        """One row of a field: no more of an uncompressed one is fetched. Raises as `shard`."""
        if not is_mapped(self.codecs, field):
            return super().row(field, row)
        shard, place = divmod(row, self.settings.rows_per_shard)
        return fetch_row(self.store, self.manifest, self.field(field), shard, place)


class FetchedShards(ShardSequence):
    """The shards of a field that are not mapped, each had anew whenever it is asked for."""

    def __init__(self, folder: Folder, manifest: Manifest, field: Field) -> None:
        """folder: of the set."""
        self._folder = folder
        self._manifest = manifest
        self._field = field

    def __len__(self) -> int:
        return len(self._manifest.shards)

    def get(self, number: int) -> np.ndarray:
        """In memory. Raises DamagedSet."""
        return open_field(self._folder, self._manifest, self._field, number)


def open_set(path: str | Path) -> ShardSet:
    """Open a finished set after checking the size of every file and the header of every shard; no
    data is read.

    Raises MissingSet, OldSet, NewerSet or DamagedSet.
    """
    path = Path(path)
    found = ShardSet(path, read_manifest(LocalFolder(path)))
    check_files(found)
    return found


def open_in(folder: Folder) -> StoredSet:
    """Open a finished set in any folder: as `open_set` on this machine, elsewhere after comparing
    the sizes of all files by one listing, where the place can be listed.

    Raises as `open_set`, and what the folder raises.
    """
    if isinstance(folder, LocalFolder):
        return open_set(folder.path)
    found = SetInStore(folder, read_manifest(folder))
    sizes = folder.sizes()
    if sizes is not None:
        for name, entry in found.manifest.files.items():
            check_listed(folder, name, entry, sizes)
    return found


def check_listed(folder: Folder, name: str, entry: FileEntry, sizes: Mapping[str, int]) -> None:
    """Raise DamagedSet where a listing does not have a file as the manifest says."""
    n_bytes = sizes.get(name)
    if n_bytes is None:
        raise DamagedSet(f"{folder}/{name}", "is missing")
    if n_bytes != entry.n_bytes:
        said = f"has {n_bytes} bytes, the manifest says {entry.n_bytes}: the copy is incomplete"
        raise DamagedSet(f"{folder}/{name}", said)


def check_files(found: ShardSet) -> None:
    """What `open_set` looks at after the manifest: for a set of which only that was read.

    Raises DamagedSet.
    """
    forms = _forms_of_files(found)
    folders = PlainFolders(found.path)
    for name, entry in found.manifest.files.items():
        folders.check(name)
        path = f"{found.path}/{name}"
        file = open_handle(path)
        try:
            check_size(path, file, entry.n_bytes)
            if name in forms:
                forms[name].check(path, file)
        finally:
            os.close(file.handle)


def _forms_of_files(found: ShardSet) -> dict[str, MappedForm]:
    """How the rows lie in each file that is mapped, by its name."""
    manifest = found.manifest
    forms: dict[str, MappedForm] = {}
    for field in manifest.fields.values():
        if not is_mapped(found.codecs, field.name):
            continue
        of_rows: dict[int, MappedForm] = {}  # the last shard may have fewer
        for k, entry in enumerate(manifest.shards):
            if entry.n_rows not in of_rows:
                of_rows[entry.n_rows] = mapped_form(manifest, field, entry.n_rows)
            forms[shard_file(field, k, manifest.is_zarr)] = of_rows[entry.n_rows]
    return forms


class PlainFolders:
    """Folders of a set, each looked at once: none is a symbolic link, that could lead out of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._are_plain = {""}

    def check(self, name: str) -> None:
        """Raise DamagedSet where a file of the set lies behind a link."""
        if not self._is_plain(name.rpartition("/")[0]):
            raise DamagedSet(self._path / name, "lies behind a symbolic link")

    def _is_plain(self, folder: str) -> bool:
        if folder not in self._are_plain:
            above = folder.rpartition("/")[0]
            if not self._is_plain(above) or os.path.islink(f"{self._path}/{folder}"):
                return False
            self._are_plain.add(folder)
        return True


def finished_sets(root: Path) -> list[Path]:
    """The finished sets directly under `root`, by name."""
    there = root.iterdir() if root.is_dir() else ()
    return sorted(p for p in there if DIRECTORY_NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def resolve_set(path: str | Path) -> Path:
    """A finished set, or the only one under a ROOT. Raises MissingSet or SeveralSets."""
    path = Path(path)
    if (path / MANIFEST).is_file() or DIRECTORY_NAME.fullmatch(path.name):
        return path
    there = finished_sets(path)
    unpacked = [p for p in there if p.suffix != ".zarr" or p.with_suffix("") not in there]
    if not unpacked:
        raise MissingSet(path, "is not a finished set, nor is one in it")
    if len(unpacked) > 1:
        raise SeveralSets(path, unpacked)
    return unpacked[0]


def verify(found: StoredSet) -> Iterator[tuple[str, str | None]]:
    """Check every byte: yields (file, None) or (file, what is wrong).

    Foreign files are yielded too, but for the litter of file managers.
    """
    files = found.manifest.files
    for name, entry in sorted(files.items()):
        yield name, found.folder.what_is_wrong(name, entry)
    if isinstance(found, ShardSet):
        yield from foreign_files(found.path, found.manifest)
        return
    for name in sorted((found.folder.sizes() or {}).keys() - files.keys()):
        if not NOT_CONTENT.fullmatch(name):
            yield name, "is not part of the set"


def shards_with_failed_rows(found: StoredSet) -> set[int]:
    """Their numbers. Raises DamagedSet."""
    failed_rows = np.flatnonzero(found.column("status") != RIGHT_ROW)
    return set((failed_rows // found.settings.rows_per_shard).tolist())


def foreign_files(directory: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What lies in a set's directory and is no part of it, litter left out: (name, what it is)."""
    for name in _not_of_the_set(directory, manifest):
        if not is_litter(directory / name):
            yield name, "is not part of the set"


def litter_in(directory: Path, manifest: Manifest) -> list[str]:
    """The names of what file managers and the like have left in a set's directory."""
    return [name for name in _not_of_the_set(directory, manifest) if is_litter(directory / name)]


def is_litter(path: Path) -> bool:
    """Whether it is a plain file that nobody meant to be there: see LITTER."""
    has_name = any(fnmatchcase(path.name, pattern) for pattern in LITTER)
    return has_name and path.is_file() and not path.is_symlink()


def _not_of_the_set(directory: Path, manifest: Manifest) -> Iterator[str]:
    files = manifest.files
    directories = {str(parent) for name in files for parent in Path(name).parents}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        is_known = name in files or (name in directories and not path.is_symlink())
        if not is_known and not NOT_CONTENT.fullmatch(name):
            yield name
