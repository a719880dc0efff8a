"""A set that is being written: what is there of it already, and how it ends."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shards.containers import arrays_of_columns, write_columns
from shards.dataset import ShardSet, open_set
from shards.errors import OtherSet, WrongPlace
from shards.files import log, what_is_wrong
from shards.manifest import (
    MANIFEST,
    ColumnValues,
    Manifest,
    Receipt,
    ShardEntry,
    read_receipt,
    remove_receipts,
    shard_file,
    write_manifest,
)
from shards.spec import Codecs, Field

SPARE_BYTES = 8 << 20  # for the small files of a set


def set_name(dataset: str, size: int, fingerprint: str, codecs: Codecs) -> str:
    """DATASET-SIZE-FINGERPRINT, as Zarr with a suffix."""
    return f"{dataset}-{size}-{fingerprint[:8]}{'' if codecs is None else '.zarr'}"


def finished_set(directory: Path, fingerprint: str, codecs: Codecs) -> ShardSet | None:
    """The set if it is there and whole. Raises OtherSet where another one is, OldSet."""
    if not os.path.lexists(directory / MANIFEST):
        return None
    found = open_set(directory)
    take_as_finished(found, fingerprint, codecs)
    return found


def take_as_finished(found: ShardSet, fingerprint: str, codecs: Codecs) -> None:
    """Say that an opened set is what would be made. Raises OtherSet where it is another one."""
    directory = found.path
    if found.codecs != codecs:
        what = f"is there already, with codecs {found.codecs}"
        raise OtherSet(directory, what, "Delete it, or use another folder")
    if found.manifest.fingerprint != fingerprint:
        raise OtherSet(directory, "holds another set, renamed", "Move it elsewhere")
    remove_receipts(directory)  # a run killed just after its commit leaves them
    log(f"{directory} is already there and complete: nothing to do")


def commit(directory: Path, manifest: Manifest, columns: Mapping[str, ColumnValues]) -> ShardSet:
    """Write the columns and, last, the manifest; all shards are durable already."""
    arrays = arrays_of_columns(manifest.columns, columns)
    column_files, metadata_files = write_columns(directory, manifest, arrays)
    whole = replace(manifest, column_files=column_files, metadata_files=metadata_files)
    write_manifest(directory, whole)
    remove_receipts(directory)
    return ShardSet(directory, whole)


def resume(
    directory: Path, bounds: Sequence[tuple[int, int]], fields: Iterable[Field], codecs: Codecs
) -> dict[int, Receipt]:
    """The receipts of the shards that an earlier run finished, every byte of them.

    What it was writing when it ended is removed.
    """
    for path in directory.rglob(".*.tmp"):
        path.unlink()
    wanted = list(fields)
    done = {}
    for k, (start, stop) in enumerate(bounds):
        receipt = read_receipt(directory, k)
        if receipt is None or receipt.codecs != codecs:
            continue
        entry = receipt.entry
        names = {shard_file(field, k, codecs is not None) for field in wanted}
        is_of_shard = (entry.start, entry.stop) == (start, stop) and entry.files.keys() == names
        has_sums = entry.sums.keys() == {field.name for field in wanted}
        if is_of_shard and has_sums and _are_right(directory, entry):
            done[k] = receipt
    if done:
        log(f"{len(done)} of {len(bounds)} shards are done already: going on from there")
    return done


def _are_right(directory: Path, entry: ShardEntry) -> bool:
    return not any(what_is_wrong(directory / name, file) for name, file in entry.files.items())


def check_space(directory: Path, n_bytes: int) -> int:
    """How many bytes are free. Raises WrongPlace before the work where its result would not fit."""
    need = n_bytes + SPARE_BYTES
    free = shutil.disk_usage(directory.parent).free
    if need > free:
        what = f"has {free / 1e6:.0f} MB free, the shards need {need / 1e6:.0f} MB"
        raise WrongPlace(directory.parent, what, "Free some, or choose another disk")
    return free
