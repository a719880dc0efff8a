"""What is there already: finished sets under a folder, and what lies in the place of a new one."""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from convert.failed import rows_read_of
from convert.plan import Plan
from convert.sources.base import Source, SourceFilter
from convert.upgrade import read_or_upgrade, read_version_1, upgrade, upgraded_if_it_fits
from shards.dataset import (
    SetInStore,
    ShardSet,
    StoredSet,
    check_files,
    finished_sets,
    shards_with_failed_rows,
    verify,
)
from shards.errors import DamagedSet, OldSet, SeveralSets, UserError
from shards.files import LocalFolder, WritableFolder, log
from shards.manifest import MANIFEST, Receipt, read_manifest, write_receipt, write_receipts
from shards.spec import ConversionSettings
from shards.writing import finished_in, take_as_finished


def find_set(
    root: Path, settings: ConversionSettings, wanted: SourceFilter, forms: Sequence[str]
) -> ShardSet | None:
    """The finished set of these settings under `root`, of a wanted source; None: there is none.

    Only manifests are read, but a set of version 1 that fits is brought to this version. Raises
    SeveralSets where sets of several sources fit, and OSError where a mount fails.
    """
    found: dict[str, ShardSet] = {}
    for path in finished_sets(root):
        if path.suffix not in forms:
            continue
        try:
            candidate = _read_or_upgrade(path, settings, wanted)
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno not in (errno.ELOOP, errno.ENOENT):
                raise  # such as a mount that fails
            log(f"passed over: {error}")
            continue
        if candidate is None:
            continue
        manifest = candidate.manifest
        if settings.fits(manifest.settings) and wanted.accepts(manifest.source):
            found.setdefault(manifest.fingerprint, candidate)
    if len(found) > 1:
        raise SeveralSets(root, [each.path for each in found.values()])
    return next(iter(found.values()), None)


def _read_or_upgrade(
    path: Path, settings: ConversionSettings, wanted: SourceFilter
) -> ShardSet | None:
    try:
        return ShardSet(path, read_manifest(path))
    except OldSet:
        return upgraded_if_it_fits(path, settings, wanted)


def finished(folder: WritableFolder, plan: Plan) -> StoredSet | None:
    """The set if it is there; a set of version 1 in its place is brought to this one."""
    try:
        return finished_in(folder, plan.fingerprint, plan.codecs)
    except OldSet:
        if not isinstance(folder, LocalFolder):
            raise
        upgrade(folder.path)
        return finished_in(folder, plan.fingerprint, plan.codecs)


def say_other_names(found: StoredSet, source: Source) -> None:
    """Names of labels decide no stored byte: a finished set keeps those that it has."""
    given = source.dataset.label_names
    if given and given != found.dataset.label_names:
        log(f"{found.address} keeps the label names that it has: to change them, delete it first")


def right_or_taken_back(folder: WritableFolder, plan: Plan) -> StoredSet | None:
    """The set if every byte of it is right; None where it has to be made.

    A damaged one is made an unfinished one again, with receipts of the shards that are right.
    """
    try:
        found = _to_be_checked(folder)
    except DamagedSet as error:
        log(str(error))
        _keep_shards_of_version_1(folder)
        _take_back(folder)
        return None
    if found is None:
        return None

    wrong = {name: problem for name, problem in verify(found) if problem}
    for name, problem in wrong.items():
        log(f"{folder}/{name} {problem}")
    try:
        failed = shards_with_failed_rows(found)
    except DamagedSet:  # its column is one of those that are wrong
        failed = set()
    if wrong or failed:
        to_be_made = [name for k in failed for name in found.manifest.shards[k].files]
        write_receipts(folder, found.manifest, {*wrong, *to_be_made}, rows_read_of(found))
        _take_back(folder)
        return None
    if isinstance(found, ShardSet):
        check_files(found)
    take_as_finished(found, folder, plan.fingerprint, plan.codecs)
    return found


def _to_be_checked(folder: WritableFolder) -> StoredSet | None:
    """The set, of which only the manifest is read; None: there is none. Raises DamagedSet."""
    if isinstance(folder, LocalFolder):
        if not os.path.lexists(folder.path / MANIFEST):
            return None
        return read_or_upgrade(folder.path)
    if folder.size(MANIFEST) < 0:
        return None
    return SetInStore(folder, read_manifest(folder))


def _take_back(folder: WritableFolder) -> None:
    """Without its manifest a set is an unfinished one."""
    folder.delete(MANIFEST)
    log(f"{folder} is made again where it is wrong")


def _keep_shards_of_version_1(folder: WritableFolder) -> None:
    """Receipts of its shards, which are checked again: only something else may be damaged."""
    if not isinstance(folder, LocalFolder):
        return
    with suppress(DamagedSet):
        old = read_version_1(folder.path)
        for k, shard in enumerate(old.shards):
            write_receipt(folder, k, Receipt(entry=shard, codecs=old.codecs))
