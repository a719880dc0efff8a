"""A folder of this machine that holds what there is room for of a set that lies elsewhere.

    CACHE/<fingerprint>/
        cache.json                   marks the folder as ours: nothing is removed from any other
        manifest.json, rows-*.npy    as in the set
        rgb-00007.npy ...            of some shards: whole, every byte as the manifest says
        .state                       which these are; one map that all processes share
        .reader-...                  one of each process that trains: how far it is, and whether
                                     fetching for it has failed
        .admission, .fetching        locks

A file comes under another name, is hashed on its way, and gets its own by a rename. What an earlier
run has left is taken: by names and sizes; by every byte where the machine was started anew since,
as no disk was waited for. One process of a machine fetches and removes; all others read, and look
into the shared map what is there.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol
from weakref import finalize

import numpy as np

from shards.containers import is_mapped
from shards.dataset import StoredSet
from shards.errors import CacheInUse, StoreFailed, UserError, WrongPlace, one_line
from shards.files import (
    FileEntry,
    LocalFolder,
    fleeting,
    json_bytes,
    what_is_wrong,
    write_bytes,
)
from shards.lock import hold, is_held, let_go, take
from shards.manifest import MANIFEST, Manifest, address, shard_file, signed
from stores.mounted import mount_of

MARK = "cache.json"
STATE = ".state"
ADMISSION = ".admission"
FETCHING = ".fetching"
READER = ".reader-"
UNREADY = ".unready-"  # a reader's file until it is locked
OVER_A_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "ceph", "beegfs")

STARTED = Path("/proc/sys/kernel/random/boot_id")

# Of CacheState.numbers.
SERVED, PASSES, START, N_SHARDS, N_BYTES, N_REMOVED, N_REQUESTS = range(7)
N_NUMBERS = 8
NOT_COMING, COMES_LATER, COMES = range(3)  # of CacheState.coming


class CacheState:
    """Which shards are there, as all processes of this machine see it at once.

    numbers: int64; whose order is served (SERVED), how often it was looked how far the readers are
    (PASSES), in which run of the machine shards came (START; see `this_start`), and counts since
    the folder was made. changes: [S] uint32, counted on whenever a shard comes or goes; odd: it is
    there. coming: [S] uint8, one of NOT_COMING, COMES_LATER (once the readers are some batches on)
    and COMES (whatever they do).
    """

    def __init__(self, path: Path, n_shards: int, *, writes: bool = False) -> None:
        mode: Literal["r+", "r"] = "r+" if writes else "r"
        data = np.memmap(path, np.uint8, mode, shape=(CacheState.n_bytes(n_shards),))
        numbers, rest = np.split(data, [8 * N_NUMBERS])
        changes, self.coming = np.split(rest, [4 * n_shards])
        self.numbers = numbers.view(np.int64)
        self.changes = changes.view(np.uint32)

    @staticmethod
    def n_bytes(n_shards: int) -> int:
        """Of the file."""
        return 8 * N_NUMBERS + 5 * n_shards

    @staticmethod
    def n_shards(n_bytes: int) -> int:
        """Of a file of so many bytes."""
        return (n_bytes - 8 * N_NUMBERS) // 5

    def is_here(self, shards: np.ndarray) -> np.ndarray:
        """[n] of these shards [n]."""
        return self.changes[shards] % 2 == 1

    def set_here(self, shard: int, is_here: bool) -> None:
        """Said after a shard has come, and before it goes."""
        if bool(self.changes[shard] % 2) != is_here:
            self.changes[shard] += 1


class Downloads(Protocol):
    """Where files come from; see stores.base.Store."""

    def download(self, name: str, target: Path, entry: FileEntry | None = None) -> None: ...


@dataclass(frozen=True)
class CacheFolder:
    """The folder of one set. fields: whose files are wanted; a shard is there when all of these
    are.
    """

    path: Path
    manifest: Manifest
    fields: tuple[str, ...]

    def state(self, *, writes: bool = False) -> CacheState:
        return CacheState(self.path / STATE, len(self.manifest.shards), writes=writes)

    def files(self, shard: int) -> dict[str, FileEntry]:
        """What is wanted of a shard, by name."""
        entries = self.manifest.shards[shard].files
        names = [
            shard_file(self.manifest.fields[field], shard, self.manifest.is_zarr)
            for field in self.fields
        ]
        return {name: entries[name] for name in names}

    @cached_property
    def shard_bytes(self) -> np.ndarray:
        """[S] int64 of the files of each shard."""
        shards = range(len(self.manifest.shards))
        sizes = [sum(entry.n_bytes for entry in self.files(k).values()) for k in shards]
        return np.array(sizes, np.int64)

    def look(self, *, reads: bool) -> np.ndarray:
        """[S] which shards are there, by names and sizes; reads: by every byte of them."""
        sizes = LocalFolder(self.path).sizes() or {}
        is_here = np.zeros(len(self.manifest.shards), bool)
        for shard in range(len(is_here)):
            files = self.files(shard)
            is_here[shard] = all(sizes.get(name) == e.n_bytes for name, e in files.items())
            if reads and is_here[shard]:
                paths = {self.path / name: entry for name, entry in files.items()}
                is_here[shard] = not any(what_is_wrong(*each) for each in paths.items())
        return is_here

    def fetch(self, shard: int, source: Downloads) -> None:
        """Have a shard's files here; the disk is not waited for where it can be told later whether
        this machine was started anew since. Raises what the store raises, and OSError of this disk.
        """
        with fleeting() if this_start() else nullcontext():
            for name, entry in self.files(shard).items():
                source.download(name, self.path / name, entry)

    def remove(self, shard: int) -> None:
        """Remove a shard's files. Who reads them keeps what is mapped."""
        if (self.path / MARK).is_file():
            for name in self.manifest.shards[shard].files:  # of all fields: an earlier run's too
                (self.path / name).unlink(missing_ok=True)

    def remove_unfinished(self) -> None:
        """What a fetcher that was killed has left; only who holds the lock may."""
        LocalFolder(self.path).remove_unfinished()


@cache
def this_start() -> int:
    """A number of the time since this machine was started; 0 where nothing tells."""
    try:
        return int.from_bytes(sha256(STARTED.read_bytes()).digest()[:7], "little")
    except OSError:
        return 0


# ----------------------------------------------------------------------------------------- made


def make_cache(root: Path, source: StoredSet) -> Path:
    """The folder under `root` for a set, with its manifest and columns; shards come later.

    Raises WrongPlace where it is somebody else's, on a network, or cannot be made; UserError where
    the set is compressed; and what the set's store raises.
    """
    manifest = source.manifest
    refuse_compressed(source)
    refuse_network(root)
    path = root / (manifest.fingerprint + (".zarr" if manifest.is_zarr else ""))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with hold(path / ADMISSION, path, "made", wait=True):
            _mark(path, source)
            _copy_facts(path, source)
            _make_state(path / STATE, len(manifest.shards))
    except OSError as error:
        what = f"cannot be made or written to ({error.strerror})"
        raise WrongPlace(path, what, "Choose another folder for the cache") from None
    return path


def refuse_compressed(source: StoredSet) -> None:
    """Raise UserError for a set whose rows are not read as they lie."""
    if not all(is_mapped(source.codecs, name) for name in source.manifest.fields):
        what = f"{source.address} is compressed: it cannot be read in part"
        raise UserError(what, "Copy it to this machine, or put it there uncompressed")


def refuse_network(root: Path) -> None:
    """Raise WrongPlace for a folder that is not on a disk of this machine."""
    above = root
    while not above.exists() and above != above.parent:
        above = above.parent
    mount = mount_of(above)
    if mount and (mount.remote or mount.kind in OVER_A_NETWORK):
        what = f"is on {mount.point} ({mount.kind}), over a network"
        raise WrongPlace(root, what, "Choose a folder on a disk of this machine")


def _mark(path: Path, source: StoredSet) -> None:
    """Raise WrongPlace where another's files lie there."""
    is_ours = (path / MARK).is_file()
    if not is_ours and any(_is_foreign(each.name) for each in path.iterdir()):
        raise WrongPlace(path, "holds files that are not of a cache", "Choose another folder")
    if not is_ours:
        what = {"cache of": str(address(source.folder)), "safe to remove": True}
        write_bytes(path / MARK, json_bytes(what))


def _is_foreign(name: str) -> bool:
    """In a folder without our mark: a process may have been killed while it wrote that."""
    return name != ADMISSION and not name.startswith(f".{MARK}.")


def _copy_facts(path: Path, source: StoredSet) -> None:
    """Manifest and columns, as far as they are not there already."""
    manifest = signed(source.manifest.to_json()).encode()
    if not (path / MANIFEST).is_file() or (path / MANIFEST).read_bytes() != manifest:
        write_bytes(path / MANIFEST, manifest)  # not again: the disk may be full of shards
    for name, entry in source.manifest.column_files.items():
        if what_is_wrong(path / name, entry) is not None:
            write_bytes(path / name, source.folder.read(name))


def _make_state(path: Path, n_shards: int) -> None:
    """Never a new file where there is one: others have it mapped.

    With all its space: on a disk that is full later, to touch what has none ends the process.
    """
    n_bytes = CacheState.n_bytes(n_shards)
    with open(path, "ab") as file:
        if file.tell() < n_bytes:
            file.write(bytes(n_bytes - file.tell()))


# -------------------------------------------------------------------------------------- readers


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A process that trains from a cache.

    job: the same in all processes of one training on a machine. feed: the number of the orders in
    which it reads; not 0. fields: that it reads of a shard, which is there when all of them are;
    their names parted by commas. removes: whether it has shards removed that it is past. pid: of
    the process.
    """

    job: str
    feed: int
    fields: str = ""  # readers of earlier versions do not say
    removes: bool
    pid: int

    def goes_with(self, other: "Reader") -> bool:
        """Whether both may read from one folder at the same time."""
        if self.fields != other.fields:
            return False
        return self.job == other.job or not (self.removes or other.removes)


# A reader's file: how far it is, eight numbers; which it is; from FAILURE_AT on why nothing is
# fetched for it any more. All of its space is taken at once: a full disk has to be told of.
NOT_BEGUN = b"\xff"  # -1 as a position
POSITION_BYTES = 64
FAILURE_AT = 1024
READER_BYTES = 4096
MOST_SAID = 700  # characters of a problem, and of its advice: with four bytes each that fits


def begin_reading(path: Path, reader: Reader) -> "ReaderFile":
    """Be a reader of a cache's folder from now on.

    Raises CacheInUse where another training uses the folder in another way, WrongPlace where
    nothing can be written there.
    """
    try:
        return _admitted(path, reader)
    except OSError as error:
        raise WrongPlace(path, f"cannot be written to ({error.strerror})") from None


def _admitted(path: Path, reader: Reader) -> "ReaderFile":
    with hold(path / ADMISSION, path, "opened", wait=True):
        for file in [*path.glob(f"{READER}*"), *path.glob(f"{UNREADY}*")]:
            if not is_held(file):
                file.unlink(missing_ok=True)
        others = readers(path)
        for _, other in others:
            if not reader.goes_with(other):
                raise CacheInUse(path, other.pid)
        if not others:
            _forget_what_is_here(path / STATE)
        return ReaderFile(path / f"{READER}{reader.pid}-{secrets.token_hex(4)}", reader)


def _forget_what_is_here(path: Path) -> None:
    """Until whoever fetches has looked: files may have been removed since the last training."""
    state = CacheState(path, CacheState.n_shards(path.stat().st_size), writes=True)
    state.numbers[SERVED] = 0
    state.coming[:] = NOT_COMING
    state.changes[:] += state.changes % 2


class ReaderFile:
    """What says that this process reads, and how far it is.

    positions: int64, for all to see: of each order the batch that is delivered next, counted from
    the first epoch on; -1 before it is begun.
    """

    def __init__(self, path: Path, reader: Reader) -> None:
        """Under the lock of admission."""
        text = NOT_BEGUN * POSITION_BYTES + json.dumps(asdict(reader)).encode()
        unready = path.with_name(path.name.replace(READER, UNREADY))
        unready.write_bytes(text.ljust(READER_BYTES, b"\0"))
        handle = take(unready)
        assert handle is not None  # nobody else looks at it under this name
        os.rename(unready, path)
        self.path = path
        self.positions = np.memmap(path, np.int64, "r+", shape=(POSITION_BYTES // 8,))
        self._end = finalize(self, _end_reading, os.getpid(), path, handle)

    def close(self) -> None:
        self._end()


def _end_reading(owner: int, path: Path, handle: int) -> None:
    if os.getpid() == owner:  # else this is a forked child
        path.unlink(missing_ok=True)
        let_go(handle)


def readers(path: Path) -> list[tuple[np.ndarray, Reader]]:
    """Those that live, with their positions; a process that is gone holds nothing."""
    found: list[tuple[np.ndarray, Reader]] = []
    for each, reader in _living(path):
        with suppress(OSError, ValueError):  # it goes right now
            found.append((np.memmap(each, np.int64, "r", shape=(POSITION_BYTES // 8,)), reader))
    return found


def _living(path: Path) -> Iterator[tuple[Path, Reader]]:
    for each in sorted(path.glob(f"{READER}*")):
        if not is_held(each):
            continue
        with suppress(OSError, ValueError, TypeError):  # it goes right now
            text = each.read_bytes()[POSITION_BYTES:FAILURE_AT].rstrip(b"\0")
            reader = Reader(**json.loads(text))
            yield each, reader


def tell_failure(folders: Iterable[Path], feed: int, error: BaseException) -> None:
    """Let all readers of these orders know why nothing is fetched for them any more.

    folders: of all sets that they read: who waits for one looks into that one's alone.
    """
    said = [one_line(error), ""]
    if isinstance(error, UserError):
        said = [error.problem, error.right]
    text = json.dumps([part[:MOST_SAID] for part in said], ensure_ascii=False).encode()
    for each, reader in chain.from_iterable(map(_living, folders)):
        if reader.feed == feed:
            with suppress(OSError), open(each, "r+b") as file:
                file.seek(FAILURE_AT)
                file.write(text)


def failure(path: Path, feed: int) -> StoreFailed | None:
    """Why nothing is fetched any more for the readers of these orders.

    Raises NobodyReads where none of them lives.
    """
    n_readers = 0
    for each, reader in _living(path):
        if reader.feed == feed:
            n_readers += 1
            with suppress(OSError, ValueError):  # none; or it is being written
                problem, right = json.loads(each.read_bytes()[FAILURE_AT:].rstrip(b"\0"))
                return StoreFailed(problem, right)
    if not n_readers:
        raise NobodyReads
    return None


class NobodyReads(Exception):
    """No process reads in these orders any more, so that nobody has anything fetched."""
