"""A set of version 1 becomes one of version 2: columns and a manifest are written, no row decoded.

Version 1 held the labelled set of NYU Depth v2 alone. Its shards, and the columns split, scene,
scene_type and accel, are what version 2 has, to the byte; so are its fingerprint, its name, and
checkpoints of it. Files that both have are not touched and the manifest is replaced last, so that a
run which is killed leaves a whole set of version 1.
"""

import errno
import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert.sources.base import SourceFilter, filled_columns
from convert.sources.nyu_tables import NYU_FIELDS, nyu
from shards.containers import NPY_HEADER, arrays_of_columns, write_npy_columns, zarr_columns
from shards.dataset import ShardSet
from shards.errors import DamagedSet, OldSet, WrongSetting
from shards.files import FileEntry, LocalFolder, log, write_atomically, write_bytes
from shards.manifest import (
    COLUMNS,
    MANIFEST,
    ColumnValues,
    Manifest,
    ShardEntry,
    column_file,
    files_from_json,
    read_manifest,
    read_signed,
    signed,
)
from shards.spec import (
    Codecs,
    ConversionSettings,
    DatasetSpec,
    Field,
    LabelTable,
    SourceIdentity,
    Statistics,
    fingerprint,
)
from shards.strict_json import JsonObject
from stores.mounted import is_right

VERSION_1 = 1
MANIFEST_TRIES = 4
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
KEPT_COLUMNS = {"split": "|u1", "scene": "<u4", "scene_type": "<u2", "accel": "<f4"}
RENAMED_COLUMNS = {"raw_rgb": "rgb_file", "raw_depth": "depth_file"}


@dataclass(frozen=True, kw_only=True)
class Version1:
    """What a manifest of version 1 says."""

    settings: ConversionSettings
    source: SourceIdentity
    n_rows: int
    fields: Mapping[str, Field]
    shards: list[ShardEntry]
    scenes: tuple[str, ...]
    dataset: DatasetSpec
    column_files: Mapping[str, FileEntry]
    metadata_files: Mapping[str, FileEntry]
    codecs: Codecs

    @property
    def files(self) -> dict[str, FileEntry]:
        """Every file of the set but the manifest itself."""
        files = {**self.column_files, **self.metadata_files}
        for shard in self.shards:
            files |= shard.files
        return files


def is_old(directory: Path) -> bool:
    """Whether a set of version 1 lies there. Raises MissingSet or DamagedSet."""
    try:
        return read_signed(LocalFolder(directory)).whole("format_version") == VERSION_1
    except ValueError:
        return False  # reading it as one of this version says what is wrong


def upgraded_if_it_fits(
    directory: Path, settings: ConversionSettings, wanted: SourceFilter
) -> ShardSet | None:
    """The upgraded set; None for one of other settings or another source, which stays as it is."""
    old = read_version_1(directory)
    if not settings.fits(old.settings) or not wanted.accepts(old.source):
        return None
    return upgrade(directory)


def read_or_upgrade(directory: Path) -> ShardSet:
    """The set, of which only the manifest is read; one of version 1 is brought to this version."""
    try:
        return ShardSet(directory, read_manifest(directory))
    except OldSet:
        return upgrade(directory)


def upgrade(directory: Path) -> ShardSet:
    """Bring a set of version 1 to this version; of one of this version the manifest is read.

    May be called again after a failure, and works on a mount: few small files are written and read
    back, and no shard is looked at, as a copy on a mount may not be whole: what reads them says so.
    Two processes may do it at once: they write the same bytes.
    Raises DamagedSet where the manifest or a column is not as it was written, OldSet where the set
    cannot be written to, and OSError.
    """
    if not is_old(directory):
        return ShardSet(directory, read_manifest(directory))
    try:
        return _upgraded(directory)
    except (DamagedSet, OSError) as error:
        if is_old(directory):
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                raise _unwritable(directory, error) from error
            raise
        return ShardSet(directory, read_manifest(directory))  # another process was faster


def _unwritable(directory: Path, error: OSError) -> OldSet:
    codecs = read_version_1(directory).codecs
    return OldSet(directory, VERSION_1, dict(codecs) if codecs else None, error.strerror or "")


def _upgraded(directory: Path) -> ShardSet:
    old = read_version_1(directory)
    try:
        manifest = _with_columns(directory, old)
    except (ValueError, KeyError) as error:  # signed, and yet of no set
        raise DamagedSet(directory / MANIFEST, f"is damaged: {error}") from None
    _replace_manifest(directory, manifest)
    _remove_renamed(directory, old)
    _remove_unfinished(directory)
    log(f"{directory} is brought to version 2 of the format: nothing was decoded")
    return ShardSet(directory, manifest)


def read_version_1(directory: Path) -> Version1:
    """Every value of its manifest checked. Raises DamagedSet."""
    value = read_signed(LocalFolder(directory))
    try:
        return _parsed(value)
    except (ValueError, WrongSetting) as error:
        raise DamagedSet(directory / MANIFEST, f"is damaged: {error}") from None


def _parsed(value: JsonObject) -> Version1:
    if value.whole("format_version") != VERSION_1:
        raise ValueError("it is not of version 1")
    settings = ConversionSettings.from_json(value.object("settings"))
    source = _source(value.object("source"))
    if value.text("fingerprint") != fingerprint(settings, source):
        raise ValueError("its fingerprint is not that of its settings and source")
    names = value.object("names")
    codecs = value.object("codecs") if "codecs" in value else None
    has_metadata = "metadata" in value
    n_rows = value.whole("rows")
    shards = [ShardEntry.from_json(shard) for shard in value.objects("shards")]
    n_shards = -(-n_rows // settings.rows_per_shard)
    if not n_rows or len(shards) != n_shards:
        raise ValueError(f"it has {n_rows} rows in {len(shards)} shards")
    return Version1(
        settings=settings,
        source=source,
        n_rows=n_rows,
        fields=_fields(value.object("fields"), settings),
        shards=shards,
        scenes=names.texts("scenes"),
        dataset=_dataset(names),
        column_files=files_from_json(value.object("columns")),
        metadata_files=files_from_json(value.object("metadata")) if has_metadata else {},
        codecs={name: codecs.text(name) for name in codecs.keys()} if codecs else None,  # noqa: SIM118
    )


def _source(value: JsonObject) -> SourceIdentity:
    return SourceIdentity(
        kind="mat",
        name=value.text("name"),
        n_bytes=value.whole("bytes"),
        sha256=value.text("sampled_sha256"),
    )


def _fields(value: JsonObject, settings: ConversionSettings) -> dict[str, Field]:
    fields = {}
    for name, each in value.items():
        if name not in settings.fields or name not in NYU_FIELDS:
            raise ValueError("its fields are not those of its settings")
        known = NYU_FIELDS[name]
        if known.kind == "depth":
            known = replace(known, resampling=settings.depth_resize)
        stored = each.object_or_none("statistics")
        fields[name] = replace(known, statistics=Statistics.from_json(stored) if stored else None)
    if fields.keys() != set(settings.fields):
        raise ValueError("its fields are not those of its settings")
    return fields


def _dataset(names: JsonObject) -> DatasetSpec:
    """NYU's, with the names that the set has."""
    tables = tuple(
        LabelTable(names=names.texts(f"classes{n}"), ids=names.wholes(f"to{n}")) for n in (40, 13)
    )
    return replace(
        nyu(),
        scene_types=names.texts("scene_types"),
        label_names=names.texts("classes"),
        label_tables=tables,
    )


def _with_columns(directory: Path, old: Version1) -> Manifest:
    """Write the columns that version 1 does not have; the manifest of all files."""
    manifest = Manifest(
        dataset=old.dataset,
        source=old.source,
        settings=old.settings,
        n_rows=old.n_rows,
        fields={name: old.fields[name] for name in old.settings.fields},
        shards=old.shards,
        scenes=old.scenes,
        codecs=old.codecs,
    )
    arrays = arrays_of_columns(COLUMNS, _columns(directory, old))
    added = {
        array: column
        for column in COLUMNS.values()
        for array in column.arrays
        if column.name not in KEPT_COLUMNS
    }
    kept_files = {
        _kept_file(name, old): old.column_files[_kept_file(name, old)] for name in KEPT_COLUMNS
    }
    if not manifest.is_zarr:
        written = write_npy_columns(LocalFolder(directory), added, arrays)
        _read_back(directory, written)
        return _checked(replace(manifest, column_files={**kept_files, **written}))

    files = zarr_columns(added, arrays)
    # With the first array zarr-python makes a group without attributes; the set's own, which has
    # the tables of names, is right and stays.
    files.pop("zarr.json", None)
    written = {name: write_bytes(directory / name, data) for name, data in files.items()}
    _read_back(directory, written)
    gone = {f"rows-{name}/zarr.json" for name in RENAMED_COLUMNS}
    metadata = {name: entry for name, entry in old.metadata_files.items() if name not in gone}
    metadata |= {name: written.pop(name) for name in files if name.endswith("zarr.json")}
    column_files = {**kept_files, **written}
    return _checked(replace(manifest, column_files=column_files, metadata_files=metadata))


def _read_back(directory: Path, written: Mapping[str, FileEntry]) -> None:
    """Raise OSError where a mount forgot what was written. The old manifest is there still."""
    for name, entry in written.items():
        if not is_right(directory / name, entry):
            raise OSError(errno.EBADMSG, "other content", str(directory / name))


def _replace_manifest(directory: Path, manifest: Manifest) -> None:
    """The commit. It is written again where it is not read back: the old one is gone by then."""
    data = signed(manifest.to_json()).encode()
    path = directory / MANIFEST
    for _ in range(MANIFEST_TRIES):
        entry = write_atomically(path, lambda file: file.write(data))
        if is_right(path, entry):
            return
    raise OSError(errno.EBADMSG, "other content", str(path))


def _checked(manifest: Manifest) -> Manifest:
    manifest.check()
    return manifest


def _kept_file(name: str, old: Version1) -> str:
    return column_file(f"rows-{name}", COLUMNS[name], old.codecs is not None)


def _columns(directory: Path, old: Version1) -> dict[str, ColumnValues]:
    """Every column of version 2."""
    values: dict[str, np.ndarray] = {}
    for name, dtype in KEPT_COLUMNS.items():
        data = _content(directory, _kept_file(name, old), old)
        values[name] = np.frombuffer(data, dtype).reshape(old.n_rows, *COLUMNS[name].shape)
    for old_name, name in RENAMED_COLUMNS.items():
        is_zarr = old.codecs is not None
        file = f"rows-{old_name}/c/0/0" if is_zarr else f"rows-{old_name}.npy"
        data = _content(directory, file, old)
        width = len(data) // old.n_rows
        texts = np.frombuffer(data, f"S{width}").reshape(old.n_rows)
        values[name] = np.char.decode(texts, "utf-8")
    return filled_columns(values, old.n_rows, old.dataset, old.settings.crop)


def _content(directory: Path, file: str, old: Version1) -> bytes:
    """The values in a column's file, after its hash was checked."""
    entry = old.column_files.get(file)
    if entry is None:
        raise DamagedSet(directory / MANIFEST, f"is damaged: it has no {file}")
    data = LocalFolder(directory).read(file)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DamagedSet(directory / file, "is damaged")
    return data if old.codecs is not None else data[NPY_HEADER:]


def _remove_renamed(directory: Path, old: Version1) -> None:
    for name in RENAMED_COLUMNS:
        if old.codecs is None:
            (directory / f"rows-{name}.npy").unlink(missing_ok=True)
        else:
            shutil.rmtree(directory / f"rows-{name}", ignore_errors=True)


def _remove_unfinished(directory: Path) -> None:
    """What an upgrade that was killed was writing; after the commit nobody needs it any more."""
    with suppress(OSError):
        for path in directory.rglob(".*.tmp"):
            path.unlink(missing_ok=True)
