"""One command, every session: the cheapest way to a finished set under ROOT, and a copy on Drive.

whole on this disk                        -> nothing to do
whole on Drive                            -> pulled
the .mat: given, on Drive, or fetched     -> what is not right on this disk, else on Drive, is
                                             converted; then pushed
"""

import shutil
import time
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from convert.follower import Follower, take_up
from convert.pipeline import Execution, convert_to_set, find_set, make_plan
from convert.sources.base import Source, SourceFilter
from convert.sources.nyu_mat import Elsewhere, check_opens, sampled_identity
from convert.sources.nyu_tables import NYU_DOWNLOAD
from convert.sources.opening import open_source
from convert.transfer import (
    NO_FILES,
    Files,
    fetch,
    missing_files,
    pull,
    pull_right_files,
    push,
    refuse_newer,
)
from convert.verify import checked
from shards.copy import codecs_of, copy_set
from shards.dataset import ShardSet, open_set
from shards.errors import IncompleteCopy, UserError
from shards.files import LocalFolder, log
from shards.manifest import MANIFEST, RECEIPTS, read_provenance, remove_older_receipts
from shards.spec import Codecs, ConversionSettings
from stores.local import exists
from stores.mounted import MountedStore, check_mounted, patiently

PLAIN = ""
PACKED = ".zarr"  # the form on Drive
CODEC = "blosc-zstd"
# A folder under ROOT, there while a session prepares a set: the packed form, on its way from Drive
# or to it. What a session that was stopped left there is found by this name and used.
TRANSIT = ".shelf"


Origin = Path | Elsewhere | Source  # what is converted


@dataclass(frozen=True, kw_only=True)
class SetRequest:
    """Which set is asked for, and from where it may be had.

    source: the .mat, or any open source; None: the .mat is found, else fetched. root: where the set
    is to be, on this disk. drive: a folder of finished sets on a mount. url: of the .mat; None: its
    home. workers, codecs, max_failed: where the set has to be converted, as of
    `convert.pipeline.convert`.
    """

    root: Path
    settings: ConversionSettings
    source: Origin | None = None
    drive: Path | None = None
    url: str | None = None
    workers: int | None = None
    codecs: Codecs = None
    max_failed: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ExistingSets:
    """What is there already of the settings and the source that are asked for.

    Of each set only the manifest was read.
    """

    local: ShardSet | None  # under ROOT
    on_drive: ShardSet | None
    # Drive has a copy that needs no mending, as far as the sizes of its files tell.
    is_drive_whole: bool


def prepare(request: SetRequest) -> Path:
    """The finished set that is asked for. Says what it chose and what that saved.

    Raises UserError for anything a user can mend; what was done until then is kept, and the same
    call goes on.
    """
    if request.drive:
        check_mounted(request.drive)
    existing = existing_sets(request)

    made = _from_this_disk(existing.local)
    read_back: Files = NO_FILES
    if made is None and existing.on_drive is not None:
        made = _from_drive(request, existing.on_drive)
        existing = replace(existing, is_drive_whole=made is not None)
    if made is None:
        source = _source_of(request)
        if request.drive and not (existing.local or existing.on_drive):
            made, read_back = _converted_onto_drive(request, request.drive, source)
        else:
            made = _converted(request, existing, source)

    if request.drive and not existing.is_drive_whole:
        form = existing.on_drive.path.suffix if existing.on_drive else PACKED
        _copy_to_drive(made, request, form, read_back)
    shutil.rmtree(request.root / TRANSIT, ignore_errors=True)
    return made.path


# ------------------------------------------------------------------------------- what is there


def existing_sets(request: SetRequest) -> ExistingSets:
    """Look through both places for the same.

    Sets of version 1 that fit are upgraded where they lie.
    """
    wanted = _wanted(request.source)
    local = _set_in(request.root, request.settings, wanted)
    on_drive = None
    is_drive_whole = False
    if request.drive:
        find = partial(_set_in, request.drive, request.settings, wanted)
        on_drive = patiently(find, f"looking through {request.drive}", request.drive)
    if on_drive:
        is_drive_whole = not missing_files(MountedStore(on_drive.path), on_drive.manifest.files)
    return ExistingSets(local=local, on_drive=on_drive, is_drive_whole=is_drive_whole)


def _set_in(where: Path, settings: ConversionSettings, wanted: SourceFilter) -> ShardSet | None:
    if not exists(where):
        return None
    return find_set(where, settings, wanted, (PLAIN, PACKED))


def _wanted(source: Origin | None) -> SourceFilter:
    """What a set's source must be: the given one, or, where that is gone, one of its name."""
    if source is None:
        return SourceFilter(kind="mat")
    if isinstance(source, Source):
        return SourceFilter(identity=source.identity())
    if isinstance(source, Path):
        is_there = patiently(partial(exists, source), f"looking for {source}", source)
        if not is_there:
            return SourceFilter(name=source.name)
    where = source if isinstance(source, Path) else None
    identity = patiently(lambda: sampled_identity(source), f"reading {source}", where)
    return SourceFilter(identity=identity)


# ------------------------------------------------------------------------- one way each to a set


def _from_this_disk(local: ShardSet | None) -> ShardSet | None:
    """The set on this disk if every byte of it is right."""
    if local is None:
        return None
    started = time.perf_counter()
    files = local.manifest.files
    problems = [(name, problem) for name, problem in checked(local) if name in files]
    wrong = [f"{name} {problem}" for name, problem in problems if problem]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        log(f"{local.path} is damaged: {'; '.join(wrong[:3])}{more}")
        return None

    seconds = time.perf_counter() - started
    log(
        f"{local.path} is on this disk and whole: {len(files)} files checked in {seconds:.1f} s. "
        f"Not needed: Drive, {_cost(local)}"
    )
    return local


def _from_drive(request: SetRequest, on_drive: ShardSet) -> ShardSet | None:
    """A copy of the set on Drive, unpacked; None where it is not whole."""
    started = time.perf_counter()
    is_packed = on_drive.path.suffix == PACKED
    log(f"{on_drive.path} is on Drive: copying it here instead of making it again")
    try:
        pulled = pull(on_drive, request.root / TRANSIT if is_packed else request.root)
    except IncompleteCopy as error:
        log(f"{error}: what is right of it is used, the rest is made again")
        return None

    if is_packed:
        in_its_place = request.root / on_drive.path.stem
        refuse_newer(LocalFolder(in_its_place))
        # If there is a manifest, it is of a damaged set: a whole one would not be pulled.
        (in_its_place / MANIFEST).unlink(missing_ok=True)
        pulled = copy_set(pulled, request.root, None)
    seconds = time.perf_counter() - started
    log(f"pulled and verified in {seconds:.1f} s. Not needed: {_cost(pulled)}")
    return pulled


def _source_of(request: SetRequest) -> Origin:
    """The one that is given, or the .mat, found or fetched."""
    source = request.source or _find_mat(request.root, request.drive)
    if source is None:
        source = fetch(request.url or NYU_DOWNLOAD.url, request.root / NYU_DOWNLOAD.name)
    places = f"this disk or {request.drive}" if request.drive else "this disk"
    log(f"no whole set of these settings on {places}: converting {source}")
    return source


def _converted_onto_drive(
    request: SetRequest, drive: Path, source: Origin
) -> tuple[ShardSet, Files]:
    """The set made from its source, each shard on Drive soon after; and the files that are there.

    A session that was cut, here or on another machine, is gone on with.
    """
    with _opened(source, request.settings) as opened:
        settings = opened.resolved(request.settings)
        codecs = request.codecs or codecs_of("zarr", CODEC, settings.fields)
        plan = make_plan(opened, settings, codecs)
        where = request.root if request.codecs else request.root / TRANSIT
        packed = where / plan.directory_name
        plain = request.root / packed.stem
        # As the conversion does with its own: they may be of the file as it was before.
        remove_older_receipts(packed, opened.stamp()[-1])
        is_begun_here = request.codecs is None and any(plain.glob(RECEIPTS))
        is_taken_up = not is_begun_here and take_up(plan, drive, packed) > 0
        if not is_taken_up:
            where = request.root

        with Follower(plan, packed, drive, codecs) as follower:
            execution = Execution(
                workers=request.workers,
                codecs=codecs if is_taken_up else request.codecs,
                repair=True,
                max_failed=request.max_failed,
                on_shard=follower,
            )
            made = _converted_here(opened, where, settings, execution)
    if where != request.root:
        made = copy_set(made, request.root, None)
    return made, follower.read_back


def _opened(source: Origin, settings: ConversionSettings) -> AbstractContextManager[Source]:
    """The source; one that was open stays so."""
    if isinstance(source, Source):
        return nullcontext(source)
    return closing(open_source(source, settings))


def _converted(request: SetRequest, existing: ExistingSets, source: Origin) -> ShardSet:
    """The set made from its source, but for what is right of a damaged one here or on Drive."""
    where, codecs = _begin(request, existing)
    execution = Execution(
        workers=request.workers, codecs=codecs, repair=True, max_failed=request.max_failed
    )
    made = _converted_here(source, where, request.settings, execution)
    if where != request.root:
        made = copy_set(made, request.root, None)
    if existing.local and existing.local.path != made.path:  # damaged, and of another source
        (existing.local.path / MANIFEST).unlink()
    return made


def _converted_here(
    source: Origin, where: Path, settings: ConversionSettings, execution: Execution
) -> ShardSet:
    """The whole set, on this disk."""
    made = convert_to_set(source, where, settings, execution)
    assert isinstance(made, ShardSet)
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
        if not patiently(partial(exists, path), f"looking for {path}", path):
            continue
        try:
            check_opens(path)
            return path
        except UserError as error:
            log(f"passed over: {error}")
    return None


def _begin(request: SetRequest, existing: ExistingSets) -> tuple[Path, Codecs]:
    """(where to convert, into which codecs) so that what is right of a damaged set is kept."""
    if existing.local:
        return request.root, existing.local.codecs
    if existing.on_drive:
        codecs = existing.on_drive.codecs
        where = request.root / TRANSIT if codecs else request.root
        pull_right_files(existing.on_drive, where)
        return where, codecs
    return request.root, request.codecs


def _cost(found: ShardSet) -> str:
    """What it took to make the set, in words."""
    made = read_provenance(found.folder)
    seconds = "some"
    with suppress(ValueError):
        seconds = f"{made.number('seconds')}" if made else seconds
    source = found.manifest.source
    what = f"the .mat ({source.n_bytes / 1e6:.0f} MB)" if source.kind == "mat" else source.name
    return f"{what} and {seconds} s of converting it"


# ------------------------------------------------------------------------------ a copy on Drive


def _copy_to_drive(made: ShardSet, request: SetRequest, form: str, read_back: Files) -> None:
    """Push the set in this form (a suffix), PACKED unless Drive has its plain form.

    Packed it is 295 MB to copy instead of 727, unpacked in 5 s.
    """
    assert request.drive is not None
    log(f"{request.drive} gets a copy of {made.path.name} for the next session")
    if form != made.path.suffix:
        made = _packed(made, request.root / TRANSIT)
    push(made, request.drive, read_back)


def _packed(made: ShardSet, folder: Path) -> ShardSet:
    """The set in the form of Drive, in that folder.

    That is what was pulled or converted there, else a copy.
    """
    packed = folder / f"{made.path.stem}{PACKED}"
    if exists(packed / MANIFEST):
        return open_set(packed)
    codecs = codecs_of("zarr", CODEC, made.manifest.fields)
    return copy_set(made, folder, codecs)
