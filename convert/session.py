"""One command, every session: the cheapest way to a finished set under ROOT, and a copy on Drive.

whole on this disk                        -> nothing to do
whole on Drive                            -> pulled
the .mat: given, on Drive, or fetched     -> what is not right on this disk, else on Drive, is
                                             converted; then pushed
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from convert.pipeline import Execution, convert_to_set, find_set
from convert.sources.base import SourceFilter
from convert.sources.nyu_mat import Source, check_opens, sampled_identity
from convert.sources.nyu_tables import NYU_DOWNLOAD
from convert.transfer import fetch, missing_files, pull, pull_right_files, push, refuse_newer
from shards.copy import codecs_of, copy_set
from shards.dataset import ShardSet, open_set, verify
from shards.errors import IncompleteCopy, UserError
from shards.files import LocalFolder, log
from shards.manifest import MANIFEST, PROVENANCE
from shards.spec import Codecs, ConversionSettings
from stores.local import exists
from stores.mounted import MountedStore, check_mounted, patiently

PLAIN = ""
PACKED = ".zarr"  # the form on Drive
CODEC = "blosc-zstd"
SHELF = ".shelf"  # under ROOT: that form on its way


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is wanted, and from where it may be had."""

    source: Source | None  # the .mat; None: found, else fetched
    root: Path  # where the set is to be, on this disk
    settings: ConversionSettings
    drive: Path | None  # a folder of finished sets on a mount
    url: str | None  # of the .mat; None: its home
    workers: int | None
    codecs: Codecs  # of the set, where it has to be converted


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is there already of the wanted settings and source.

    Of each only the manifest was read.
    """

    here: ShardSet | None  # under ROOT
    there: ShardSet | None  # on Drive
    # Drive has a copy that needs no mending, as far as the sizes of its files tell.
    is_shelved: bool


def prepare(
    source: Source | None,
    root: Path,
    settings: ConversionSettings,
    drive: Path | None,
    url: str | None,
    workers: int | None = None,
    codecs: Codecs = None,
) -> Path:
    """A finished set of `settings` under `root`. Says what it chose and what that saved.

    Arguments: see Wish. Raises UserError for anything a user can mend; what was done until then
    is kept, and the same call goes on.
    """
    wish = Wish(
        source=source,
        root=root,
        settings=settings,
        drive=drive,
        url=url,
        workers=workers,
        codecs=codecs,
    )
    if drive:
        check_mounted(drive)
    found = _look(wish)

    made = _from_this_disk(found.here)
    if made is None and found.there is not None:
        made = _from_drive(wish, found.there)
        found = replace(found, is_shelved=made is not None)
    if made is None:
        made = _converted(wish, found)

    if drive and not found.is_shelved:
        _shelve(made, wish, found.there.path.suffix if found.there else PACKED)
    shutil.rmtree(root / SHELF, ignore_errors=True)
    return made.path


# ------------------------------------------------------------------------------- what is there


def _look(wish: Wish) -> Found:
    """Look through both places for the same.

    Sets of version 1 that fit are upgraded where they lie.
    """
    wanted = _wanted(wish.source)
    here = _set_in(wish.root, wish.settings, wanted)
    there = None
    is_shelved = False
    if wish.drive:
        find = partial(_set_in, wish.drive, wish.settings, wanted)
        there = patiently(find, f"looking through {wish.drive}")
    if there:
        is_shelved = not missing_files(MountedStore(there.path), there.manifest.files)
    return Found(here=here, there=there, is_shelved=is_shelved)


def _set_in(where: Path, settings: ConversionSettings, wanted: SourceFilter) -> ShardSet | None:
    if not exists(where):
        return None
    return find_set(where, settings, wanted, (PLAIN, PACKED))


def _wanted(source: Source | None) -> SourceFilter:
    """What a set's source must be: the given .mat, or, where that is gone, one of its name."""
    if source is None:
        return SourceFilter()
    if isinstance(source, Path):
        is_there = patiently(partial(exists, source), f"looking for {source}")
        if not is_there:
            return SourceFilter(name=source.name)
    identity = patiently(lambda: sampled_identity(source), f"reading {source}")
    return SourceFilter(identity=identity)


# ------------------------------------------------------------------------- one way each to a set


def _from_this_disk(here: ShardSet | None) -> ShardSet | None:
    """The set on this disk if every byte of it is right."""
    if here is None:
        return None
    started = time.perf_counter()
    files = here.manifest.files
    checked = [(name, problem) for name, problem in verify(here) if name in files]
    wrong = [f"{name} {problem}" for name, problem in checked if problem]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        log(f"{here.path} is damaged: {'; '.join(wrong[:3])}{more}")
        return None

    seconds = time.perf_counter() - started
    log(
        f"{here.path} is on this disk and whole: {len(files)} files checked in {seconds:.1f} s. "
        f"Not needed: Drive, {_cost(here)}"
    )
    return here


def _from_drive(wish: Wish, there: ShardSet) -> ShardSet | None:
    """A copy of the set on Drive, unpacked; None where it is not whole."""
    started = time.perf_counter()
    is_packed = there.path.suffix == PACKED
    log(f"{there.path} is on Drive: copying it here instead of making it again")
    try:
        pulled = pull(there, wish.root / SHELF if is_packed else wish.root)
    except IncompleteCopy as error:
        log(f"{error}: what is right of it is used, the rest is made again")
        return None

    if is_packed:
        in_its_place = wish.root / there.path.stem
        refuse_newer(LocalFolder(in_its_place))
        # If there is a manifest, it is of a damaged set: a whole one would not be pulled.
        (in_its_place / MANIFEST).unlink(missing_ok=True)
        pulled = copy_set(pulled, wish.root, None)
    seconds = time.perf_counter() - started
    log(f"pulled and verified in {seconds:.1f} s. Not needed: {_cost(pulled)}")
    return pulled


def _converted(wish: Wish, found: Found) -> ShardSet:
    """The set made from the .mat, but for what is right of a damaged one here or on Drive."""
    source = wish.source or _find_mat(wish.root, wish.drive)
    if source is None:
        source = fetch(wish.url or NYU_DOWNLOAD.url, wish.root / NYU_DOWNLOAD.name)
    places = f"this disk or {wish.drive}" if wish.drive else "this disk"
    log(f"no whole set of these settings on {places}: converting {source}")

    where, codecs = _begin(wish, found)
    execution = Execution(workers=wish.workers, codecs=codecs, repair=True)
    made = convert_to_set(source, where, wish.settings, execution)
    if where != wish.root:
        made = copy_set(made, wish.root, None)
    if found.here and found.here.path != made.path:  # damaged, and of another source
        (found.here.path / MANIFEST).unlink()
    return made


def _find_mat(root: Path, drive: Path | None) -> Path | None:
    """The .mat under its published name.

    It is looked for under ROOT, in this folder, on Drive, and beside the folder there.
    """
    folders = [root, Path()]
    if drive:
        folders += [drive, drive.parent]
    for folder in dict.fromkeys(folders):
        path = folder / NYU_DOWNLOAD.name
        if not patiently(partial(exists, path), f"looking for {path}"):
            continue
        try:
            check_opens(path)
            return path
        except UserError as error:
            log(f"passed over: {error}")
    return None


def _begin(wish: Wish, found: Found) -> tuple[Path, Codecs]:
    """(where to convert, into which codecs) so that what is right of a damaged set is kept."""
    if found.here:
        return wish.root, found.here.codecs
    if found.there:
        codecs = found.there.codecs
        where = wish.root / SHELF if codecs else wish.root
        pull_right_files(found.there, where)
        return where, codecs
    return wish.root, wish.codecs


def _cost(found: ShardSet) -> str:
    """What it took to make the set, in words."""
    try:
        seconds = json.loads((found.path / PROVENANCE).read_text())["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        seconds = "some"
    size_mb = found.manifest.source.n_bytes / 1e6
    return f"the .mat ({size_mb:.0f} MB) and {seconds} s of converting it"


# ------------------------------------------------------------------------------ a copy on Drive


def _shelve(made: ShardSet, wish: Wish, form: str) -> None:
    """Push the set in this form (a suffix), PACKED unless Drive has its plain form.

    Packed it is 295 MB to copy instead of 727, unpacked in 5 s.
    """
    assert wish.drive is not None
    log(f"{wish.drive} gets a copy of {made.path.name} for the next session")
    if form != made.path.suffix:
        made = _packed(made, wish.root / SHELF)
    push(made, wish.drive)


def _packed(made: ShardSet, shelf: Path) -> ShardSet:
    """The set in the form of Drive, in the folder `shelf`.

    That is what was pulled or converted there, else a copy.
    """
    packed = shelf / f"{made.path.stem}{PACKED}"
    if exists(packed / MANIFEST):
        return open_set(packed)
    codecs = codecs_of("zarr", CODEC, made.manifest.fields)
    return copy_set(made, shelf, codecs)
