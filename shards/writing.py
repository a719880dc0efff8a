"""A set that is being written: what is there of it already, and how it ends."""

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from shards.containers import arrays_of_columns, write_columns
from shards.dataset import ShardSet, StoredSet, open_in, open_set
from shards.errors import OtherSet, WrongPlace
from shards.files import LocalFolder, WritableFolder, log
from shards.manifest import (
    MANIFEST,
    ColumnValues,
    Manifest,
    Receipt,
    read_receipt,
    receipts_in,
    remove_receipts,
    shard_file,
    write_manifest,
)
from shards.spec import Codecs, Field

SPARE_BYTES = 8 << 20  # for the small files of a set
READERS_OF_RECEIPTS = 16  # of a store: each is a request


def set_name(dataset: str, size: int, fingerprint: str, codecs: Codecs) -> str:
    """DATASET-SIZE-FINGERPRINT, as Zarr with a suffix."""
    return f"{dataset}-{size}-{fingerprint[:8]}{'' if codecs is None else '.zarr'}"


def finished_set(directory: Path, fingerprint: str, codecs: Codecs) -> ShardSet | None:
    """The set if it is there and whole. Raises OtherSet where another one is, OldSet."""
    if not os.path.lexists(directory / MANIFEST):
        return None
    found = open_set(directory)
    take_as_finished(found, LocalFolder(directory), fingerprint, codecs)
    return found


def finished_in(folder: WritableFolder, fingerprint: str, codecs: Codecs) -> StoredSet | None:
    """The same of any folder."""
    if isinstance(folder, LocalFolder):
        return finished_set(folder.path, fingerprint, codecs)
    if folder.size(MANIFEST) < 0:
        return None
    found = open_in(folder)
    take_as_finished(found, folder, fingerprint, codecs)
    return found


def take_as_finished(
    found: StoredSet, folder: WritableFolder, fingerprint: str, codecs: Codecs
) -> None:
    """Say that an opened set is what would be made. Raises OtherSet where it is another one."""
    if found.codecs != codecs:
        what = f"is there already, with codecs {found.codecs}"
        raise OtherSet(found.address, what, "Delete it, or use another folder")
    if found.manifest.fingerprint != fingerprint:
        raise OtherSet(found.address, "holds another set, renamed", "Move it elsewhere")
    remove_receipts(folder)  # a run killed just after its commit leaves them
    log(f"{found.address} is already there and complete: nothing to do")


def commit(
    folder: WritableFolder, manifest: Manifest, columns: Mapping[str, ColumnValues]
) -> Manifest:
    """Write the columns and, last, the manifest; all shards are durable already.

    Returns the manifest as it was written, with the files of the columns.
    """
    arrays = arrays_of_columns(manifest.columns, columns)
    column_files, metadata_files = write_columns(folder, manifest, arrays)
    whole = replace(manifest, column_files=column_files, metadata_files=metadata_files)
    write_manifest(folder, whole)
    remove_receipts(folder)
    return whole


@dataclass(frozen=True, kw_only=True)
class ShardsOfSet:
    """Which shards a set that is being written has: their rows, fields and codecs."""

    bounds: Sequence[tuple[int, int]]
    fields: Sequence[Field]
    codecs: Codecs

    def has(self, shard: int, receipt: Receipt) -> bool:
        """Whether it is a receipt of that shard: it names no other file."""
        entry = receipt.entry
        names = {shard_file(field, shard, self.codecs is not None) for field in self.fields}
        has_rows = (entry.start, entry.stop) == self.bounds[shard]
        has_files = entry.files.keys() == names
        has_sums = entry.sums.keys() == {field.name for field in self.fields}
        return has_rows and has_files and has_sums and receipt.codecs == self.codecs


def resume(
    folder: WritableFolder,
    shards: ShardsOfSet,
    among: Collection[int] | None = None,
    *,
    are_hashed: bool = True,
) -> dict[int, Receipt]:
    """The receipts of the shards that are done, in order.

    among: only these; None: all. are_hashed: whether every byte of them is read, as a loss of power
    may have taken some. In a store, where an object is whole or not there, the sizes of one listing
    do.
    """
    sizes = folder.sizes() or {}
    numbers = range(len(shards.bounds)) if among is None else set(among)
    there = [k for k in receipts_in(sizes) if k in numbers]

    def right_receipt(k: int) -> Receipt | None:
        receipt = read_receipt(folder, k)
        if receipt is None or not shards.has(k, receipt):
            return None
        files = receipt.entry.files
        if are_hashed and isinstance(folder, LocalFolder):
            is_right = not any(folder.what_is_wrong(name, file) for name, file in files.items())
        else:
            is_right = all(sizes.get(name) == file.n_bytes for name, file in files.items())
        return receipt if is_right else None

    is_local = isinstance(folder, LocalFolder)
    with ThreadPoolExecutor(1 if is_local else READERS_OF_RECEIPTS) as pool:
        receipts = dict(zip(there, pool.map(right_receipt, there), strict=True))
    done = {k: receipt for k, receipt in receipts.items() if receipt is not None}
    if done and are_hashed:
        log(f"{len(done)} of {len(numbers)} shards are done already: going on from there")
    return done


def check_space(directory: Path, n_bytes: int) -> int:
    """How many bytes are free. Raises WrongPlace before the work where its result would not fit."""
    need = n_bytes + SPARE_BYTES
    free = shutil.disk_usage(directory.parent).free
    if need > free:
        what = f"has {free / 1e6:.0f} MB free, the shards need {need / 1e6:.0f} MB"
        raise WrongPlace(directory.parent, what, "Free some, or choose another disk")
    return free
