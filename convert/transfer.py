"""push and pull: verified copies of a finished set to a mounted Google Drive, or back.

The manifest goes last. Also `fetch`: the .mat from its home, or from any web server.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

from convert.failed import rows_read_of
from convert.sources.nyu_tables import NYU_DOWNLOAD
from convert.upgrade import is_old, read_version_1
from shards.dataset import SetInStore, ShardSet, StoredSet
from shards.errors import (
    DamagedSet,
    IncompleteCopy,
    IncompleteDownload,
    NewerSet,
    OtherBytes,
    UserError,
    WrongPlace,
)
from shards.files import FileEntry, Folder, LocalFolder, log
from shards.lock import only_one
from shards.manifest import (
    FAILED,
    MANIFEST,
    PROVENANCE,
    read_manifest,
    receipt_name,
    write_manifest,
    write_receipts,
)
from shards.progress import Progress, megabytes
from stores.base import Store
from stores.http import Download, RemoteFile, check_url
from stores.local import LocalStore
from stores.mounted import DRIVE, MountedStore, check_mounted, mount_of, patiently
from stores.object_store import ObjectStore

Files = Mapping[str, FileEntry]
NO_FILES: Files = {}


# ---------------------------------------------------------------------------------- whole sets


def set_on_mount(path: Path) -> ShardSet:
    """The finished set at `path` on a mount, of which only the manifest is read.

    Raises MissingSet, OldSet, NewerSet or DamagedSet, and StoreFailed where the mount fails.
    """
    return ShardSet(path, read_manifest(MountedStore(path)))


def missing_files(folder: Folder, files: Files) -> list[str]:
    """The files that are not there or have another size: no byte of them is read.

    Of a mount each is asked for, as a listing leaves out what cannot be looked at.
    """
    is_asked = isinstance(folder, LocalFolder | MountedStore)
    sizes = None if is_asked else folder.sizes()
    if sizes is None:
        sizes = {name: folder.size(name) for name in files}
    return [name for name, entry in files.items() if sizes.get(name) != entry.n_bytes]


def push(found: ShardSet, place: Path | Store, read_back: Files = NO_FILES) -> StoredSet:
    """Copy a finished set to a folder on a mount, or into a store: only what is missing or wrong
    there; the copy.

    Every file is read back, but for those that are as in `read_back`, which were a moment ago: of
    these only the size is looked at. A set that is there stays whole until the first of its files
    has to change: over one of version 1 of the same rows, to the end. Raises StoreFailed
    (IncompleteCopy where a file of the set itself is damaged) and WrongPlace where the copy would
    not fit.
    """
    root = _mounted(place) if isinstance(place, Path) else place
    root.create()
    source = LocalStore(found.path)
    target = root.child(found.path.name)
    target.create()
    files = found.manifest.files

    def copy(name: str, entry: FileEntry | None) -> None:
        was_read_back = entry is not None and read_back.get(name) == entry
        if not was_read_back or target.size(name) != files[name].n_bytes:
            target.upload(found.path / name, name, entry)

    _check_may_change(source, target)
    changed = _files_to_change(source, target, files)
    _make_room(target, files)
    kept = {name: entry for name, entry in files.items() if name not in changed}
    _copy_files(kept, "writing", copy)
    if changed:
        target.delete(MANIFEST)
        _copy_files(changed, "writing", copy)
    if source.size(FAILED) < 0:
        target.delete(FAILED)  # of the set as it was before its rows were mended
    for name in (PROVENANCE, FAILED, MANIFEST):
        if source.size(name) >= 0:
            copy(name, None)
    # Of a session that was cut, or that copied shard by shard.
    target.delete(*map(receipt_name, range(found.n_shards)))
    if not isinstance(target, MountedStore):
        return SetInStore(target, found.manifest)
    mount = mount_of(target.path)
    if mount is None or mount.remote != DRIVE:
        log("every file was read back")
    else:
        flush = "run drive.flush_and_unmount() in a cell before you close"
        log(f"read back from the mount. It reaches Google later: {flush}")
    return ShardSet(target.path, found.manifest)


def _check_may_change(source: Folder, target: Store) -> None:
    """Raise OtherBytes where another set lies in a store, of which nothing is overwritten."""
    if not isinstance(target, ObjectStore) or target.replaces or target.size(MANIFEST) < 0:
        return
    if not _have_same_manifest(source, target):
        raise OtherBytes(f"{target}/{MANIFEST}")


def _mounted(drive: Path) -> MountedStore:
    """Raises StoreFailed where nothing is mounted there."""
    check_mounted(drive)
    return MountedStore(drive)


def store_of(found: StoredSet) -> Store:
    """Where a set that is copied from lies: a mount, as far as it has a path."""
    if isinstance(found, ShardSet):
        return MountedStore(found.path)
    # As of stores.places.folder_at: each of these can also copy.
    return cast(Store, found.folder)


def pull(found: StoredSet, root: Path) -> ShardSet:
    """Copy a finished set from a mount or a store under `root`: only what is missing or wrong here;
    the copy.

    One that lies there itself is left as it is. Raises IncompleteCopy where a file there is
    missing, short or has other content, StoreFailed, WrongPlace where the copy would not fit, and
    Busy.
    """
    source = store_of(found)
    here = root / source.name
    if isinstance(found, ShardSet) and here.exists() and here.samefile(found.path):
        return found
    files = found.manifest.files
    missing = missing_files(source, files)
    if missing:
        what = f"{len(missing)} of {len(files)} files in {source} are missing or short"
        raise IncompleteCopy(what, missing=missing)

    root.mkdir(parents=True, exist_ok=True)
    with only_one(root, source.name):
        target = LocalStore(root / source.name)
        target.path.mkdir(exist_ok=True)

        def copy(name: str, entry: FileEntry | None) -> None:
            source.download(name, target.path / name, entry)

        _prepare(source, target, files)
        _copy_files(files, "reading", copy)
        target.delete(FAILED)
        for name in (PROVENANCE, FAILED):
            if source.size(name) >= 0:
                copy(name, None)
        write_manifest(target, found.manifest)  # as it was checked, not as it comes once more
    return ShardSet(target.path, found.manifest)


def pull_right_files(found: ShardSet, root: Path) -> Path:
    """Copy what is right of a damaged set on Drive: an unfinished set, to be converted further.

    Returns its directory under `root`. Raises as `pull` does, but for IncompleteCopy.
    """
    source = MountedStore(found.path)
    files = found.manifest.files
    wrong = set(missing_files(source, files))
    there = {name: entry for name, entry in files.items() if name not in wrong}

    root.mkdir(parents=True, exist_ok=True)
    with only_one(root, source.name):
        target = LocalStore(root / source.name)
        target.path.mkdir(exist_ok=True)

        def copy(name: str, entry: FileEntry | None) -> None:
            try:
                source.download(name, target.path / name, entry)
            except IncompleteCopy:
                wrong.add(name)

        _prepare(source, target, there)
        _copy_files(there, "reading", copy)
        write_receipts(target, found.manifest, wrong, rows_read_of(found))
    return target.path


def _prepare(source: Folder, target: LocalStore, files: Files) -> None:
    """Before files are copied: room for what is missing, and no manifest of other content."""
    if target.size(MANIFEST) >= 0 and not _have_same_manifest(source, target):
        refuse_newer(target)
        target.delete(MANIFEST)
    _make_room(target, files)


def _files_to_change(source: Folder, target: Store, files: Files) -> dict[str, FileEntry]:
    """Those of `files` of which the manifest there says something else.

    A damaged manifest is withdrawn at once. Raises NewerSet.
    """
    if target.size(MANIFEST) < 0 or _have_same_manifest(source, target):
        return {}
    refuse_newer(target)
    try:
        there = _files_in(target)
    except DamagedSet:
        target.delete(MANIFEST)
        return {}
    return {name: entry for name, entry in files.items() if there.get(name, entry) != entry}


def _files_in(target: Store) -> Files:
    """What the manifest there names. Raises DamagedSet."""
    if not isinstance(target, MountedStore):
        return read_manifest(target).files
    looking = f"reading {target.path / MANIFEST}"
    return patiently(partial(_files_of, target.path), looking, target.path)


def _files_of(directory: Path) -> Files:
    """What the manifest of a set names, of this version or the first."""
    if is_old(directory):
        return read_version_1(directory).files
    return read_manifest(directory).files


def _make_room(target: Store | LocalStore, files: Files) -> None:
    """Remove what copies that were killed left behind. Raises WrongPlace without room."""
    target.remove_unfinished()
    need = sum(files[name].n_bytes for name in missing_files(target, files))
    free = target.free_bytes()
    if free is not None and need > free:
        problem = f"needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
        raise WrongPlace(str(target), problem, "Free some and run it again")


def refuse_newer(folder: Folder) -> None:
    """Raise NewerSet where a set of a later version lies: what is known here may not replace it."""
    try:
        read_manifest(folder)
    except NewerSet:
        raise
    except UserError:  # none, an older one, or a damaged one
        pass


def _have_same_manifest(source: Folder, target: Folder) -> bool:
    try:
        return target.read(MANIFEST) == source.read(MANIFEST)
    except DamagedSet:  # no plain file
        return False


def _copy_files(files: Files, doing: str, copy: Callable[[str, FileEntry | None], object]) -> None:
    """Copy all but the manifest, and say how far it is."""
    n_bytes = sum(entry.n_bytes for entry in files.values())
    log(f"{doing}: {len(files)} files, {megabytes(n_bytes)}")
    with Progress(doing, n_bytes) as progress:
        for name, entry in _in_order(files):
            copy(name, entry)
            progress.add(entry.n_bytes)


def _in_order(files: Files) -> Iterable[tuple[str, FileEntry]]:
    return sorted(files.items(), key=lambda item: item[0])


# ------------------------------------------------------------------------------------- the .mat


def fetch(url: str, path: Path) -> Path:
    """Download the .mat at `url` to `path`. What an earlier run got of the same file goes on.

    Raises WrongSource for what is no address, or where NYU's file has other bytes than it should,
    Busy where another process fetches it, else IncompleteDownload.
    """
    check_url(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download = Download(RemoteFile(url), path)
    except (OSError, UserError) as error:
        raise _incomplete(error) from None
    with download.held():
        try:
            _fetch_rest(download)
        except (OSError, UserError) as error:
            raise _incomplete(error) from None
        return download.finish(NYU_DOWNLOAD.content if url == NYU_DOWNLOAD.url else None)


def _incomplete(error: Exception) -> IncompleteDownload:
    log(NYU_DOWNLOAD.by_hand)
    return IncompleteDownload(f"{error}. What was fetched is kept")


def _fetch_rest(download: Download) -> None:
    download.check_room()
    n_bytes = download.remote.n_bytes
    n_bytes_here = download.n_bytes_here
    here = f", {n_bytes_here / 1e6:.0f} are here" if n_bytes_here else ""
    log(f"fetching {download.remote}: {n_bytes / 1e6:.0f} MB{here}")
    with Progress("fetching", n_bytes, n_bytes_here) as progress:
        download.fetch_rest(progress.add)
