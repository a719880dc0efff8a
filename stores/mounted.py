"""A folder on a mounted Google Drive.

A mounted Drive drops out (ENOTCONN), answers EIO or EAGAIN under load, refuses over quota, and
shows files that never arrived whole. So every call on it is tried again a few times, every byte is
hashed on its way, and what was written is read back: that proves the mount, not what Google has of
it. Plain buffered copies; nothing on a mount is mapped.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from shards.errors import IncompleteCopy, RemoteSet, StoreFailed, UserError
from shards.files import FileEntry, HashingFile, drop_from_cache, write_atomically
from stores.local import LocalStore, exists

T = TypeVar("T")

BLOCK_BYTES = 4 << 20
PAUSES = (0.5, 2.0, 8.0)  # seconds before another try
MOUNT = Path("/content/drive")  # where Colab mounts Drive
MOUNTS = Path("/proc/self/mountinfo")
GONE = {errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ECONNABORTED, errno.ECONNRESET}
FULL = {errno.EDQUOT, errno.ENOSPC}
BUSY = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EINTR}
OTHER_CONTENT = errno.EBADMSG  # our own: the bytes that came are not those that should have
PASSING = GONE | FULL | BUSY | {OTHER_CONTENT}


# ------------------------------------------------------------------------------------------- tries


def patiently(action: Callable[[], T], doing: str) -> T:
    """Call `action`, again after a pause where a mount answers with an error that passes.

    doing: what the action is, such as "reading manifest.json", for the message. Returns what the
    action returns. Raises StoreFailed (IncompleteCopy for other content) once it has failed
    len(PAUSES) + 1 times, and at once whatever does not pass by itself.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except (OSError, UserError) as error:
            number = _passing_number(error)
            if number is None:
                raise
            if pause is None:
                raise _given_up(number, doing) from None
        time.sleep(pause)
    raise AssertionError


def _passing_number(error: OSError | UserError) -> int | None:
    """The number of a mount's answer that may be another the next time; None: it stays."""
    if isinstance(error, StoreFailed):  # it was tried again already
        return None
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError) and cause.errno in PASSING:
        return cause.errno
    return None


def _given_up(number: int, doing: str) -> StoreFailed:
    n_tries = len(PAUSES) + 1
    if number == OTHER_CONTENT:
        what = f"{doing} gave other content than the manifest has, {n_tries} times"
        return IncompleteCopy(what)
    what = f"Drive answered {errno.errorcode[number]} {n_tries} times while {doing}"
    if number in FULL:
        problem = f"{what}: it is full or over its quota"
        return StoreFailed(problem, "Free space there (also its bin)", full=True)
    remount = f"Remount it (drive.mount('{MOUNT}', force_remount=True))"
    if number in GONE:
        return StoreFailed(what, remount, gone=True)
    return StoreFailed(what, f"{remount} or wait (it may have been asked too much today)")


# ---------------------------------------------------------------------------------- what is a mount


def check_mounted(drive: Path) -> None:
    """Refuse a folder that is not on a mounted Drive.

    What is written there would be lost with the machine. drive: the folder, which need not be
    there yet, in one that is. Raises StoreFailed.
    """
    is_unmounted = drive.is_relative_to(MOUNT) and not os.path.ismount(MOUNT)
    if is_unmounted or not patiently(partial(exists, drive.parent), f"looking for {drive.parent}"):
        mount = f"run drive.mount('{MOUNT}') in a cell of its own"
        raise StoreFailed(f"{drive.parent} is not there: {mount}", gone=True)


def refuse_remote(path: Path) -> None:
    """Raise RemoteSet for a set on a FUSE mount (Google Drive).

    Each page that is read would be a request over the network.
    """
    kind = kind_of_mount(path)
    if kind.startswith("fuse"):
        raise RemoteSet(path, kind)


def kind_of_mount(path: Path) -> str:
    """The file system's type, such as "ext4"; "" where nothing tells: no /proc, or no such path."""
    try:
        device = os.stat(path).st_dev
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    of_path = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        words = line.split()
        if words[2] == of_path:
            return words[words.index("-") + 1]
    return ""


# ---------------------------------------------------------------------------------------- the store


class MountedStore:
    """A folder on a mount. See stores.base.Store; `upload` and `download` copy one file each way.

    Every method raises StoreFailed where the mount fails at each try, IncompleteCopy where other
    bytes came than those that should have, and OSError for what another try would not change.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = LocalStore(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def size(self, name: str) -> int:
        action = partial(self._files.size, name)
        return patiently(action, f"looking for {self.path / name}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        action = partial(self._files.read, name, start, stop)
        return patiently(action, f"reading {name}")

    def names(self) -> Iterator[str]:
        yield from patiently(lambda: list(self._files.names()), f"listing {self.path}")

    def create(self) -> None:
        """Make the folder, in one that is there."""
        patiently(partial(self.path.mkdir, exist_ok=True), f"making {self.path}")

    def put(self, name: str, data: Any) -> FileEntry:
        """Write a file whole, and read it back."""

        def write() -> FileEntry:
            written = self._files.put(name, data)
            self._read_back(name, written)
            return written

        return patiently(write, f"writing {name}")

    def delete(self, name: str) -> None:
        action = partial(self._files.delete, name)
        patiently(action, f"removing {self.path / name}")

    def free_bytes(self) -> int:
        return patiently(self._files.free_bytes, f"preparing {self.path}")

    def remove_unfinished(self, folder: str) -> None:
        action = partial(self._files.remove_unfinished, folder)
        patiently(action, f"preparing {self.path / folder}")

    def upload(self, source: Path, name: str, entry: FileEntry | None = None) -> None:
        """Copy a file of this machine there, and read it back; nothing where it is right already.

        entry: what the file must be; None: whatever it is, it is copied.
        """

        def copy() -> None:
            target = self.path / name
            if entry is None or not is_right(target, entry):
                self._read_back(name, copy_checked(source, target, entry))

        patiently(copy, f"writing {name}")

    def download(self, name: str, target: Path, entry: FileEntry | None = None) -> None:
        """Copy a file from there to this machine; nothing where it is right here already.

        entry: what the file must be; None: whatever it is, it is copied.
        """

        def copy() -> None:
            if entry is None or not is_right(target, entry):
                copy_checked(self.path / name, target, entry)

        patiently(copy, f"reading {name}")

    def _read_back(self, name: str, written: FileEntry) -> None:
        if not is_right(self.path / name, written):
            raise _other_content(self.path / name)


def copy_checked(source: Path, target: Path, entry: FileEntry | None) -> FileEntry:
    """Copy one file, hashed on its way, whole or not at all; what was written.

    Raises OSError, with the number OTHER_CONTENT where `source` is not what `entry` says.
    """

    def write(file: HashingFile) -> None:
        try:
            with open(source, "rb") as reading:
                while block := _read_block(reading):
                    file.write(block)
        except FileNotFoundError:  # a mount may list what it cannot open
            raise _other_content(source) from None
        if entry is not None and file.sha256.hexdigest() != entry.sha256:
            raise _other_content(source)

    return write_atomically(target, write)


def _read_block(file: IO[bytes]) -> bytes:
    """The next bytes, none at the end. A busy mount answers EAGAIN, for which Python gives None."""
    block: bytes | None = file.read(BLOCK_BYTES)
    if block is None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return block


def is_right(path: Path, entry: FileEntry) -> bool:
    """Whether a file's every byte is as it should be.

    It is read from where it lies, and not from the page cache. A file that is not there is not
    right; what else a mount answers is raised, as OSError.
    """
    try:
        with open(path, "rb") as file:
            drop_from_cache(file.fileno())
            if os.fstat(file.fileno()).st_size != entry.n_bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    except FileNotFoundError:
        return False


def _other_content(path: Path) -> OSError:
    return OSError(OTHER_CONTENT, "other content", str(path))
