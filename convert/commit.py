"""What a directory is: a finished set, an unfinished one with receipts, or a damaged one.

A receipt is a shard's entry in the manifest, written as soon as the shard is durable; the manifest collects them. So a
damaged set is taken back to an unfinished one by writing out the entries of the shards that are right.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from convert.sources.nyu_mat import Source
from shards import format as fmt
from shards.format import Codecs, Settings, UserError, log


def receipt_name(shard: int) -> str:
    return f"receipt-{shard:05d}.json"


def stamp(source: Source) -> tuple[int, ...]:
    """Differs once anybody has written to the file or put another in its place; the last is when."""
    facts = source.stat()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def find_set(root: Path, settings: Settings, wanted: dict[str, Any], *forms: str) -> Path | None:
    """The finished set of these settings under `root`, of the wanted source where one is known, in any of the forms."""
    found: dict[str, Path] = {}
    for path in fmt.finished_sets(root):
        try:
            manifest = fmt.read_manifest(path)
        except UserError as error:
            cause = error.__context__
            if isinstance(cause, OSError) and cause.errno != errno.ELOOP:  # such as a mount that fails
                raise
            log(f"passed over: {error}")
            continue
        fits = settings.fits(Settings.from_dict(manifest["settings"]))
        same = fits and wanted.items() <= manifest["source"].items()
        if same and path.suffix in forms:
            found.setdefault(manifest["fingerprint"], path)
    if len(found) > 1:
        names = ", ".join(sorted(p.name for p in found.values()))
        raise UserError(f"{root} has {names}, of other sources. Say which is meant: make convert MAT=/path/to/it.mat")
    return next(iter(found.values()), None)


def is_finished(directory: Path, digest: str, codecs: Codecs, repair: bool = False) -> bool:
    """Whether the set is there; another in its place is an error. `repair` checks every byte, and takes it back."""
    if not os.path.lexists(directory / fmt.MANIFEST) or (repair and _take_back(directory)):
        return False
    found = fmt.open_set(directory)
    if found.codecs != codecs:
        raise UserError(f"{directory} is there already, with codecs {found.codecs}. Delete it, or use another --out")
    if found.manifest["fingerprint"] != digest:
        raise UserError(f"{directory} holds another set, renamed. Move it elsewhere, then run: make convert")
    remove_receipts(directory)  # a run killed just after its commit leaves them
    log(f"{directory} is already there and complete: nothing to do")
    return True


def _take_back(directory: Path) -> bool:
    """Make a damaged set an unfinished one again, with receipts of the shards that are right. False: none is wrong."""
    manifest: dict[str, Any] = {"shards": []}
    try:
        manifest = fmt.read_manifest(directory)
        wrong = {name: problem for name, problem in fmt.verify(directory) if problem}
    except UserError as error:
        wrong = {fmt.MANIFEST: str(error)}
    for name, problem in wrong.items():
        log(f"{directory / name} {problem}")
    if wrong:
        write_receipts(directory, manifest, wrong.keys())
        (directory / fmt.MANIFEST).unlink()
    return bool(wrong)


def write_receipts(directory: Path, manifest: dict[str, Any], wrong: Set[str]) -> None:
    """Receipts of the shards without a wrong file: a conversion into `directory` makes the others only."""
    for k, shard in enumerate(manifest["shards"]):
        if not wrong & shard["files"].keys():
            fmt.write_json(directory / receipt_name(k), {"codecs": manifest.get("codecs"), **shard})


def resume(
    directory: Path, bounds: Sequence[Sequence[int]], settings: Settings, codecs: Codecs
) -> dict[int, dict[str, Any]]:
    """The receipts of the shards that an earlier run finished, every byte of them; what it was writing is removed."""
    for path in directory.rglob(".*.tmp"):
        path.unlink()
    done = {}
    for k, rows in enumerate(bounds):
        with suppress(OSError, UserError, ValueError, KeyError, TypeError, AttributeError):
            receipt = json.loads((directory / receipt_name(k)).read_text())
            files, names = receipt["files"], {fmt.shard_name(f, k, codecs is not None) for f in settings.fields}
            found = receipt["rows"], receipt["codecs"], set(files), set(receipt["sums"])
            right = found == (list(rows), codecs, names, set(settings.fields))
            if right and not any(fmt.what_is_wrong(directory / name, files[name]) for name in names):
                done[k] = receipt
    if done:
        log(f"{len(done)} of {len(bounds)} shards are done already: going on from there")
    return done


def check_space(directory: Path, n_bytes: int) -> None:
    """Refuse before the work what would not fit after it."""
    need, free = n_bytes + (8 << 20), shutil.disk_usage(directory.parent).free
    if need > free:
        what = f"{directory.parent} has {free / 1e6:.0f} MB free, the shards need {need / 1e6:.0f} MB"
        raise UserError(f"{what}. Free some, or run: make convert OUT=/another/disk")


def remove_receipts(directory: Path, older_than: float = math.inf) -> None:
    """All, or those from before the source's last change. On a read-only disk they stay; nobody minds."""
    with suppress(OSError):
        for receipt in directory.glob("receipt-*.json"):
            if receipt.stat().st_mtime_ns < older_than:
                receipt.unlink(missing_ok=True)
