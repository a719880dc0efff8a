"""manifest.json and receipts: parsed once, with every value checked, then attributes.

A receipt is a shard's entry of the manifest, written as soon as the shard is durable. The manifest
collects them and is written last: its presence is the commit. docs/format.md describes both, key by
key.
"""

import gc
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import (
    DamagedSet,
    MissingSet,
    NewerSet,
    OldSet,
    StoreFailed,
    UnfinishedSet,
    UserError,
    WrongSetting,
)
from shards.files import FileEntry, Folder, LocalFolder, WritableFolder, json_bytes
from shards.spec import (
    FORMAT_VERSION,
    NAME,
    SPLITS,
    Codecs,
    ConversionSettings,
    DatasetSpec,
    Field,
    SourceIdentity,
    fingerprint,
)
from shards.strict_json import JsonObject
from shards.texts import Texts

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
FAILED = "failed.csv"
RECEIPTS = "receipt-*.json"
RECEIPT = re.compile(r"receipt-(\d{5,})\.json")
RIGHT_ROW = 0  # in the column status
FAILED_ROW = 1
MAX_SIDE = 65535  # pixels of an original picture
ChannelSums = tuple[int, int, int]  # valid pixels, their sum, the sum of their squares


# ----------------------------------------------------------------------------------------- columns


ColumnValues = Texts | np.ndarray  # one value a row


@dataclass(frozen=True, kw_only=True)
class Column:
    """One value a row. `dtype` "text": UTF-8, in two arrays, offsets [N + 1] and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()  # of one row's value

    @property
    def arrays(self) -> dict[str, str]:
        """The names of its arrays, and their types."""
        if self.dtype == "text":
            return {f"rows-{self.name}-offsets": "<u8", f"rows-{self.name}-bytes": "|u1"}
        return {f"rows-{self.name}": self.dtype}

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, name: str, value: JsonObject) -> "Column":
        value.only("dtype", "shape")
        column = cls(name=name, dtype=value.text("dtype"), shape=value.wholes("shape"))
        if not NAME.fullmatch(name) or column.dtype not in COLUMN_DTYPES or len(column.shape) > 1:
            raise ValueError(f"column {name[:80]} is none that is known")
        if column.dtype == "text" and column.shape:
            raise ValueError(f"column {name} has several texts a row")
        return column


COLUMN_DTYPES = ("text", "|u1", "<u2", "<u4", "<u8", "<i4", "<i8", "<f4", "<f8")
COLUMNS = {
    column.name: column
    for column in (
        Column(name="split", dtype="|u1"),  # a number of SPLITS
        Column(name="scene", dtype="<u4"),  # the place, by its number in `scenes`
        Column(name="scene_type", dtype="<u2"),  # by its number in the dataset's scene_types
        Column(name="camera", dtype="<f4", shape=(4,)),  # fx, fy, cx, cy as shares; 0 = unknown
        Column(name="size", dtype="<u2", shape=(2,)),  # height, width of the original picture
        Column(name="accel", dtype="<f4", shape=(4,)),  # of a Kinect: roll, yaw, pitch, tilt
        Column(name="rgb_file", dtype="text"),
        Column(name="depth_file", dtype="text"),
        Column(name="row", dtype="<u4"),  # the source's line, 0 first
        Column(name="status", dtype="|u1"),  # 0 = right
    )
}


# ------------------------------------------------------------------------------------------ shards


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Rows start .. stop, the files that hold them, and what statistics are made from."""

    start: int
    stop: int
    files: Mapping[str, FileEntry]
    sums: Mapping[str, tuple[ChannelSums, ...]]  # a field; one a channel, () of ids

    @property
    def n_rows(self) -> int:
        return self.stop - self.start

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [self.start, self.stop],
            "files": files_to_json(self.files),
            "sums": {name: [list(channel) for channel in sums] for name, sums in self.sums.items()},
        }

    @classmethod
    def from_json(cls, value: JsonObject) -> "ShardEntry":
        rows = value.wholes("rows")
        if len(rows) != 2:
            raise ValueError("a shard has no two bounds")
        sums = value.object("sums")
        return cls(
            start=rows[0],
            stop=rows[1],
            files=files_from_json(value.object("files")),
            sums={name: _channel_sums(sums, name) for name in sums.keys()},  # noqa: SIM118
        )


def _channel_sums(sums: JsonObject, name: str) -> tuple[ChannelSums, ...]:
    table = sums.table(name)
    if not {len(channel) for channel in table} <= {3}:
        raise ValueError(f"the sums of {name} are not three a channel")
    return table  # type: ignore[return-value]


def files_to_json(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """By name."""
    return {name: entry.to_json() for name, entry in files.items()}


def files_from_json(value: JsonObject) -> dict[str, FileEntry]:
    """Raises ValueError where it is none."""
    return {name: FileEntry.from_json(entry) for name, entry in value.items()}


# ---------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished set: what it was made from, what is in it, and every byte of it."""

    dataset: DatasetSpec
    source: SourceIdentity
    settings: ConversionSettings
    n_rows: int
    fields: Mapping[str, Field]
    shards: Sequence[ShardEntry]
    scenes: Sequence[str]  # the places, by their numbers in the column scene
    columns: Mapping[str, Column] = field(default_factory=lambda: dict(COLUMNS))
    column_files: Mapping[str, FileEntry] = field(default_factory=dict)
    codecs: Codecs = None
    metadata_files: Mapping[str, FileEntry] = field(default_factory=dict)  # of a Zarr set
    decoder: str | None = None  # of pictures, with its version; None: no picture was decoded

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings, self.source)

    @property
    def files(self) -> dict[str, FileEntry]:
        """Every file of the set but the manifest itself."""
        files = {**self.column_files, **self.metadata_files}
        for shard in self.shards:
            files |= shard.files
        return files

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return bounds_of(self.n_rows, self.settings.rows_per_shard)

    @property
    def is_zarr(self) -> bool:
        return self.codecs is not None

    def without_files(self) -> "Manifest":
        """The same rows, before they were written into any container."""
        shards = [replace(shard, files={}) for shard in self.shards]
        return replace(self, shards=shards, column_files={}, metadata_files={}, codecs=None)

    def to_json(self) -> dict[str, Any]:
        size = self.settings.size
        value: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "dataset": self.dataset.to_json(),
            "source": self.source.to_json(),
            "settings": self.settings.to_json(),
            "decoder": self.decoder,
            "rows": self.n_rows,
            "fields": {name: each.to_json(size) for name, each in self.fields.items()},
            "splits": list(SPLITS),
            "scenes": list(self.scenes),
            "columns": {name: column.to_json() for name, column in self.columns.items()},
            "column_files": files_to_json(self.column_files),
            "shards": [shard.to_json() for shard in self.shards],
            "container": "npy" if self.codecs is None else "zarr",
        }
        if self.codecs is not None:
            value["codecs"] = dict(self.codecs)
            value["metadata_files"] = files_to_json(self.metadata_files)
        return value

    @classmethod
    def from_json(cls, value: JsonObject) -> "Manifest":
        """Raises ValueError or WrongSetting where it is none that a writer made."""
        value.only(*MANIFEST_KEYS)
        settings = ConversionSettings.from_json(value.object("settings"))
        stored = value.object("fields")
        if set(stored.keys()) != set(settings.fields):
            raise ValueError("its fields are not those of its settings")
        fields = {
            name: Field.from_json(name, stored.object(name), settings.size)
            for name in settings.fields
        }
        if value.text("container") not in ("npy", "zarr"):
            raise ValueError("its container is not known")
        is_zarr = value.text("container") == "zarr"
        codecs = value.object("codecs") if is_zarr else None
        manifest = cls(
            dataset=DatasetSpec.from_json(value.object("dataset")),
            source=SourceIdentity.from_json(value.object("source")),
            settings=settings,
            n_rows=value.whole("rows"),
            fields=fields,
            shards=[ShardEntry.from_json(shard) for shard in value.objects("shards")],
            scenes=value.texts("scenes"),
            columns={n: Column.from_json(n, each) for n, each in value.object("columns").items()},
            column_files=files_from_json(value.object("column_files")),
            codecs={name: codecs.text(name) for name in codecs.keys()} if codecs else None,  # noqa: SIM118
            metadata_files=files_from_json(value.object("metadata_files")) if is_zarr else {},
            decoder=value.text_or_none("decoder"),
        )
        if value.texts("splits") != SPLITS:
            raise ValueError("its splits are not train, test and val")
        if value.text("fingerprint") != manifest.fingerprint:
            raise ValueError("its fingerprint is not that of its settings and source")
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raise ValueError where what readers rely on is not as in a set."""
        bounds = [(shard.start, shard.stop) for shard in self.shards]
        n_shards = -(-self.n_rows // self.settings.rows_per_shard)
        # Counted before any is listed: whoever signs a manifest may claim any number of rows.
        if not bounds or len(bounds) != n_shards or bounds != self.bounds:
            raise ValueError(f"it has {self.n_rows} rows in {len(bounds)} shards")
        names = set(self.settings.fields)
        of_codecs = names if self.codecs is None else self.codecs.keys()
        if not names == self.fields.keys() == of_codecs:
            raise ValueError("its fields are not those of its settings")
        if any(shard.sums.keys() != names for shard in self.shards):
            raise ValueError("a shard has sums of other fields")
        if any(self.columns.get(name) != column for name, column in COLUMNS.items()):
            raise ValueError("a column is missing, or has another type")
        if self.files.keys() != self._names_of_files():
            raise ValueError("its files are not those of a set, or outside the set")

    def _names_of_files(self) -> set[str]:
        arrays = {array for column in self.columns.values() for array in column.arrays}
        names = {
            column_file(array, column, self.is_zarr)
            for column in self.columns.values()
            for array in column.arrays
        }
        for each in self.fields.values():
            names |= {shard_file(each, k, self.is_zarr) for k in range(len(self.shards))}
        if self.is_zarr:
            groups = [*self.fields, *arrays]
            names |= {"zarr.json", *(f"{group}/zarr.json" for group in groups)}
        return names


def shard_file(of: Field, shard: int, is_zarr: bool) -> str:
    """The name of a shard's file: `rgb-00000.npy`, or `rgb/c/0/0/0/0` in a Zarr array."""
    if is_zarr:
        return f"{of.name}/c/{shard}" + "/0" * len(of.row_shape(0))
    return f"{of.name}-{shard:05d}.npy"


def column_file(array: str, column: Column, is_zarr: bool) -> str:
    """The name of the file of one array of a column: `rows-scene.npy`, or `rows-scene/c/0`."""
    if is_zarr:
        return f"{array}/c/0" + "/0" * len(column.shape)
    return f"{array}.npy"


MANIFEST_KEYS = (
    *("format_version", "fingerprint", "dataset", "source", "settings", "decoder", "rows"),
    *("fields", "splits", "scenes", "columns", "column_files", "shards", "container"),
    *("codecs", "metadata_files"),
)


def bounds_of(n_rows: int, rows_per_shard: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of each shard."""
    starts = range(0, n_rows, rows_per_shard)
    return [(start, min(start + rows_per_shard, n_rows)) for start in starts]


def write_manifest(folder: WritableFolder, manifest: Manifest) -> None:
    """The commit."""
    folder.put(MANIFEST, signed(manifest.to_json()).encode())


def signed(value: dict[str, Any]) -> str:
    """JSON text whose last key is the SHA-256 of the same object without that key."""
    return _with_digest(json.dumps(value, indent=2, sort_keys=True).removesuffix("\n}"))


def _with_digest(body: str) -> str:
    digest = hashlib.sha256(f"{body}\n}}".encode()).hexdigest()
    return f'{body},\n  "sha256": "{digest}"\n}}\n'


def read_manifest(place: Path | Folder) -> Manifest:
    """The manifest of a finished set, every byte and every value of it checked.

    Raises MissingSet (UnfinishedSet), OldSet, NewerSet or DamagedSet.
    """
    folder = LocalFolder(place) if isinstance(place, Path) else place
    with _no_garbage():
        return _parsed(folder, read_signed(folder))


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Python's collector looks for none meanwhile.

    Of a million rows the manifest is 200,000 objects, all of which stay or are of no cycle: to look
    at them again and again took as long as to make them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parsed(folder: Folder, value: JsonObject) -> Manifest:
    """Raises as `read_manifest`, but for a set that is missing."""
    try:
        version = value.whole("format_version")
        if version < FORMAT_VERSION:
            raise OldSet(address(folder), version, _codecs_of_old(value))
        if version > FORMAT_VERSION:
            raise NewerSet(address(folder), version, FORMAT_VERSION)
        return Manifest.from_json(value)
    except (ValueError, WrongSetting) as error:
        raise DamagedSet(f"{folder}/{MANIFEST}", f"is damaged: {error}") from None


def _codecs_of_old(value: JsonObject) -> dict[str, str] | None:
    """As in a manifest of version 1; None: .npy."""
    if "codecs" not in value:
        return None
    codecs = value.object("codecs")
    return {name: codecs.text(name) for name in codecs.keys()}  # noqa: SIM118


def read_signed(folder: Folder) -> JsonObject:
    """The manifest of any version, of which only the signature was looked at.

    Raises MissingSet (UnfinishedSet) or DamagedSet.
    """
    _check_is_there(folder)
    data = folder.read(MANIFEST)
    try:
        text = data.decode()
        if text != _with_digest(text.rpartition(',\n  "sha256": ')[0]):
            raise ValueError("its SHA-256 does not match its content")
        value = json.loads(text)
        del value["sha256"]
        return JsonObject(value, "it")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedSet(f"{folder}/{MANIFEST}", f"is damaged: {error}") from None


def address(folder: Folder) -> Path | str:
    """For errors: a path where the folder has one."""
    path = getattr(folder, "path", None)
    return path if isinstance(path, Path) else str(folder)


def _check_is_there(folder: Folder) -> None:
    """Raise MissingSet where there is no manifest."""
    if isinstance(folder, LocalFolder):
        is_there = os.path.lexists(folder.path / MANIFEST)  # a link is there, and refused later
        n_done = len(list(folder.path.glob(RECEIPTS)))
    else:
        is_there = folder.size(MANIFEST) >= 0
        n_done = 0 if is_there else len(receipts_in(folder.sizes() or ()))
    if not is_there and n_done:
        raise UnfinishedSet(address(folder), n_done)
    if not is_there:
        raise MissingSet(
            address(folder), "it is not a finished set", subject=f"no {MANIFEST} in {folder}:"
        )


def read_provenance(folder: Folder) -> JsonObject | None:
    """How a set was made, by whoever made it; None where that is not told. Nothing rests on it."""
    try:
        return JsonObject(json.loads(folder.read(PROVENANCE)), PROVENANCE)
    except (OSError, UserError, ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------- receipts


@dataclass(frozen=True, kw_only=True)
class RowsRead:
    """What only reading the rows of a shard tells of them.

    sizes: [n, 2] <u2 height and width of each original picture, 0 of a row that failed. failed: by
    the row's number in the set, what is wrong with it. highest: of each field of ids, the highest.
    """

    sizes: np.ndarray
    failed: Mapping[int, str]
    highest: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Sizes that are all the same are written once."""
        sizes = self.sizes[:1] if (self.sizes == self.sizes[0]).all() else self.sizes
        return {
            "sizes": sizes.tolist(),
            "failed": {str(row): problem for row, problem in self.failed.items()},
            "highest": dict(self.highest),
        }

    @classmethod
    def from_json(cls, value: JsonObject, n_rows: int) -> "RowsRead":
        value.only("sizes", "failed", "highest")
        sizes = np.array(value.table("sizes"), np.int64)
        if sizes.shape not in ((1, 2), (n_rows, 2)) or sizes.max() > MAX_SIDE:
            raise ValueError("the sizes of its pictures are not two a row")
        failed = value.object("failed")
        highest = value.object("highest")
        return cls(
            sizes=np.ascontiguousarray(np.broadcast_to(sizes, (n_rows, 2)), "<u2"),
            failed={int(row): failed.text(row) for row in failed.keys()},  # noqa: SIM118
            highest={name: highest.whole(name) for name in highest.keys()},  # noqa: SIM118
        )


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A durable shard of a set that is not finished.

    rows: None where the source tells all of its rows before they are read.
    """

    entry: ShardEntry
    codecs: Codecs = None
    decoder: str | None = None
    rows: RowsRead | None = None

    @property
    def failed(self) -> Mapping[int, str]:
        """By the row's number in the set, what is wrong with it."""
        return {} if self.rows is None else self.rows.failed

    def has_rows_of(self, other: "Receipt") -> bool:
        """Whether another one, in whatever codecs, says the same of the rows: how they were
        decoded, what they add up to, which of them failed.
        """
        is_alike = (self.decoder, self.entry.sums) == (other.decoder, other.entry.sums)
        return is_alike and self.failed.keys() == other.failed.keys()

    def to_json(self) -> dict[str, Any]:
        value = {**self.entry.to_json(), "codecs": self.codecs}
        if self.decoder is not None:
            value["decoder"] = self.decoder
        if self.rows is not None:
            value["rows_read"] = self.rows.to_json()
        return value

    @classmethod
    def from_json(cls, value: JsonObject) -> "Receipt":
        value.only("rows", "files", "sums", "codecs", "decoder", "rows_read")
        codecs = value.object_or_none("codecs")
        entry = ShardEntry.from_json(value)
        rows = value.object("rows_read") if "rows_read" in value else None
        return cls(
            entry=entry,
            codecs={name: codecs.text(name) for name in codecs.keys()} if codecs else None,  # noqa: SIM118
            decoder=value.text_or_none("decoder") if "decoder" in value else None,
            rows=RowsRead.from_json(rows, entry.n_rows) if rows else None,
        )


def receipt_name(shard: int) -> str:
    """The name of the receipt of a shard."""
    return f"receipt-{shard:05d}.json"


def write_receipt(folder: WritableFolder, shard: int, receipt: Receipt) -> None:
    """The shard is done once it is there."""
    folder.put(receipt_name(shard), json_bytes(receipt.to_json()))


def read_receipt(folder: Folder, shard: int) -> Receipt | None:
    """None where there is none that is right: the shard is made again then.

    Raises what the folder's own failure is, but for a file of a disk that cannot be read.
    """
    try:
        value = json.loads(folder.read(receipt_name(shard)))
        return Receipt.from_json(JsonObject(value, "receipt"))
    except (OSError, DamagedSet, ValueError, RecursionError):
        return None


def write_receipts(
    folder: WritableFolder, manifest: Manifest, wrong: Iterable[str], rows: Mapping[int, RowsRead]
) -> None:
    """Receipts of the shards without a wrong file: a conversion makes the others only.

    rows: by shard, what was found out of its rows; empty where nothing had to be.
    """
    wrong_names = set(wrong)
    for k, shard in enumerate(manifest.shards):
        if not wrong_names & shard.files.keys():
            receipt = Receipt(
                entry=shard,
                codecs=manifest.codecs,
                decoder=manifest.decoder,
                rows=rows.get(k),
            )
            write_receipt(folder, k, receipt)


def receipts_in(names: Iterable[str]) -> list[int]:
    """The numbers of the shards whose receipts are among these files."""
    found = (RECEIPT.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def remove_receipts(folder: WritableFolder) -> None:
    """All of them; on a read-only disk, and where a store lets nobody delete, they stay."""
    with suppress(OSError, StoreFailed):
        folder.delete(*map(receipt_name, receipts_in(folder.sizes() or ())))


def remove_older_receipts(directory: Path, older_than_ns: float) -> None:
    """Those from before a source's last change; on a read-only disk they stay."""
    with suppress(OSError):
        for path in directory.glob(RECEIPTS):
            if path.stat().st_mtime_ns < older_than_ns:
                path.unlink(missing_ok=True)
