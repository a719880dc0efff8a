"""One command, every session: the cheapest way to a finished set under ROOT, and a copy of it on Drive.

whole on this disk                        -> nothing to do
whole on Drive                            -> pulled
the .mat: given, on Drive, or fetched     -> what is not right on this disk, else on Drive, is converted; then pushed
"""

import json
import shlex
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from convert.commit import find_set
from convert.pipeline import convert
from convert.repack import repack
from convert.sources.nyu_mat import Source, check_opens, sampled_identity
from convert.transfer import Incomplete, check_mounted, exists, not_whole, patiently, pull, push
from shards import format as fmt
from shards.format import Codecs, Settings, UserError, log
from stores.http import MAT_NAME, OFFICIAL, fetch

PACKED, CODEC = ".zarr", "blosc-zstd"  # the form on Drive
SHELF = ".shelf"  # under ROOT: that form on its way


def prepare(
    source: Source | None,
    root: Path,
    settings: Settings,
    drive: Path | None,
    url: str | None,
    workers: int | None = None,
    codecs: Codecs = None,
) -> Path:
    """A finished set of `settings` under `root`. Says what it chose and what that saved."""
    command = "make convert" + (f" DRIVE={shlex.quote(str(drive))}" if drive else "")
    if drive:
        check_mounted(drive, command)
    wanted = _wanted(source, command)

    def find(where: Path) -> Path | None:
        return find_set(where, settings, wanted, "", PACKED) if exists(where) else None

    here = find(root)
    there = patiently(lambda: find(drive), f"looking through {drive}", command) if drive else None
    shelved = bool(there and not not_whole(there, _files_of(there, command), command))
    directory = here and _checked(here)
    if not directory and there:
        directory = _pulled(there, root, settings, command)
        shelved = directory is not None
    if not directory:
        mat = source or _find_mat(root, drive, command) or fetch(url or OFFICIAL, root / MAT_NAME)
        log(
            f"no whole set of these settings on {f'this disk or {drive}' if drive else 'this disk'}: converting {mat}"
        )
        where, codecs = _begun(here, there, root, codecs, command)
        directory = convert(mat, where, settings, workers, codecs, repair=True)
        settings = fmt.open_set(
            directory
        ).settings  # without axes that the pictures told by themselves
        if where != root:
            directory = repack(directory, root, settings, "npy", "none")
        if here and here != directory:  # of another source
            (here / fmt.MANIFEST).unlink()
    if drive and not shelved:
        _shelve(directory, drive, there.suffix if there else PACKED, settings, command)
    shutil.rmtree(root / SHELF, ignore_errors=True)
    if len(fmt.finished_sets(root)) > 1:
        log(
            f"{root} has other sets too, which are kept. Train on this one with: make train DATA={directory}"
        )
    return directory


def _files_of(there: Path, command: str) -> dict[str, dict[str, Any]]:
    return fmt.all_files(patiently(lambda: fmt.read_manifest(there), f"reading {there}", command))


def _wanted(source: Source | None, command: str) -> dict[str, object]:
    """What a set's source must be: the given .mat, or, where that is gone, one of its name."""
    if source is None:
        return {}
    if not patiently(
        lambda: not isinstance(source, Path) or exists(source), f"looking for {source}", command
    ):
        return {"name": source.name}
    return patiently(lambda: sampled_identity(source), f"reading {source}", command)


def _find_mat(root: Path, drive: Path | None, command: str) -> Path | None:
    for where in dict.fromkeys([root, Path(), *([drive, drive.parent] if drive else [])]):
        path = where / MAT_NAME
        if patiently(partial(exists, path), f"looking for {path}", command):
            try:
                check_opens(path)
                return path
            except UserError as error:
                log(f"passed over: {error}")
    return None


def _cost(directory: Path) -> str:
    try:
        seconds = json.loads((directory / fmt.PROVENANCE).read_text())["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        seconds = "some"
    return f"the .mat ({fmt.read_manifest(directory)['source']['bytes'] / 1e6:.0f} MB) and {seconds} s of converting it"


def _checked(here: Path) -> Path | None:
    """The set on this disk if every byte of it is right."""
    started, files = time.perf_counter(), fmt.all_files(fmt.read_manifest(here))
    wrong = [f"{name} {problem}" for name, problem in fmt.verify(here) if problem and name in files]
    if wrong:
        log(
            f"{here} is damaged: {'; '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
        return None
    log(
        f"{here} is on this disk and whole: {len(files)} files checked in {time.perf_counter() - started:.1f} s. "
        f"Not needed: Drive, {_cost(here)}"
    )
    return here


def _pulled(there: Path, root: Path, settings: Settings, command: str) -> Path | None:
    started, packed = time.perf_counter(), there.suffix == PACKED
    try:
        log(f"{there} is on Drive: copying it here instead of making it again")
        directory = pull(there, root / SHELF if packed else root, command)
    except Incomplete as error:
        log(
            f"{str(error).partition('. Run:')[0]}: what is right of it is used, the rest is made again"
        )
        return None
    if packed:
        (root / there.stem / fmt.MANIFEST).unlink(missing_ok=True)  # of a damaged set
        directory = repack(directory, root, settings, "npy", "none")
    log(
        f"pulled and verified in {time.perf_counter() - started:.1f} s. Not needed: {_cost(directory)}"
    )
    return directory


def _begun(
    here: Path | None, there: Path | None, root: Path, codecs: Codecs, command: str
) -> tuple[Path, Codecs]:
    """(where to convert, into which codecs) so that what is right of a damaged set here or on Drive is kept."""
    if here:
        return root, fmt.read_manifest(here).get("codecs")
    if there:
        codecs = patiently(lambda: fmt.read_manifest(there), f"reading {there}", command).get(
            "codecs"
        )
        where = root / SHELF if codecs else root
        pull(there, where, command, in_part=True)
        return where, codecs
    return root, codecs


def _shelve(directory: Path, drive: Path, form: str, settings: Settings, command: str) -> None:
    """Push the set, compressed unless Drive has its plain form: 295 MB to copy instead of 727, unpacked in 5 s."""
    log(f"{drive} gets a copy of {directory.name} for the next session")
    if form != directory.suffix:
        packed = directory.parent / SHELF / f"{directory.name}{PACKED}"
        finished = exists(packed / fmt.MANIFEST)
        directory = (
            packed if finished else repack(directory, packed.parent, settings, "zarr", CODEC)
        )
    push(directory, drive, command)
