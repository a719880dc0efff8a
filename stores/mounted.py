"""A folder on a mounted Google Drive, and what else a mount can be.

A mounted Drive drops out (ENOTCONN), answers EIO or EAGAIN under load, refuses over quota, and
shows files that never arrived whole. So every call on it is tried again a few times, every byte is
hashed on its way, and what was written is read back: that proves the mount, not what Google has of
it. Plain buffered copies; nothing on a mount is mapped.
"""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, TypeVar

from shards.errors import IncompleteCopy, RemoteSet, StoreFailed, UserError
from shards.files import FileEntry, HashingFile, drop_from_cache, log, write_atomically
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


def patiently(action: Callable[[], T], doing: str, where: Path | None = None) -> T:
    """Call `action`, again after a pause where a mount answers with an error that passes.

    doing: what the action is, such as "reading manifest.json", for the message. where: a path on
    the mount, which is then called what it is; None: the path that the error names, if it names
    one. Returns what the action returns. Raises StoreFailed (IncompleteCopy for other content) once
    it has failed len(PAUSES) + 1 times, and at once whatever does not pass by itself.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except (OSError, UserError) as error:
            answer = _passing_answer(error)
            if answer is None:
                raise
            if pause is None:
                raise _given_up(answer, doing, where) from None
        time.sleep(pause)
    raise AssertionError


def _passing_answer(error: OSError | UserError) -> OSError | None:
    """A mount's answer that may be another the next time; None: it stays."""
    if isinstance(error, StoreFailed):  # it was tried again already
        return None
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError) and cause.errno in PASSING:
        return cause
    return None


def _given_up(answer: OSError, doing: str, where: Path | None) -> StoreFailed:
    n_tries = len(PAUSES) + 1
    number = answer.errno
    assert number is not None
    if number == OTHER_CONTENT:
        what = f"{doing} gave other content than the manifest has, {n_tries} times"
        return IncompleteCopy(what)
    if where is None and isinstance(answer.filename, str | os.PathLike):
        where = Path(answer.filename)
    place = Place.of(where)
    what = f"{place.name} answered {errno.errorcode[number]} {n_tries} times while {doing}"
    if number in FULL:
        problem = f"{what}: it is full or over its quota"
        return StoreFailed(problem, place.if_full, full=True)
    if number in GONE:
        return StoreFailed(what, place.if_gone, gone=True)
    return StoreFailed(what, place.if_busy)


@dataclass(frozen=True)
class Place:
    """What an answer came from, and what helps, by what it is."""

    name: str
    if_gone: str = "Mount it again"
    if_busy: str = "Look at that disk, or wait until it answers"
    if_full: str = "Free space there"

    @classmethod
    def of(cls, path: Path | None) -> "Place":
        """Of the mount on which `path` is."""
        mount = None if path is None else mount_of(path)
        # By its path too: of a mount that is gone nothing may be left in the table.
        on_colab = path is not None and path.is_relative_to(MOUNT)
        if on_colab or (mount is not None and mount.remote == DRIVE):
            remount = f"Remount it (drive.mount('{MOUNT}', force_remount=True))"
            return cls(
                name="Drive",
                if_gone=remount,
                if_busy=f"{remount} or wait (it may have been asked too much today)",
                if_full="Free space there (also its bin)",
            )
        if mount is None:
            return cls(name="the file system")
        return cls(name=f"{mount.point} ({mount.kind})")


# ---------------------------------------------------------------------------------- what is a mount

DRIVE = "a mounted Drive"
CLOUD = "a mounted cloud folder"
BUCKET = "a mounted bucket"
# Programs that fetch what is read from a service far away, a request a read.
REMOTE = {
    **dict.fromkeys(("drive", "drivefs", "google-drive-ocamlfuse"), DRIVE),
    **dict.fromkeys(("rclone", "rclonefs", "onedriver"), CLOUD),
    **dict.fromkeys(("gcsfuse", "s3fs", "goofys", "geesefs", "mountpoint-s3", "s3backer"), BUCKET),
    **dict.fromkeys(("blobfuse", "blobfuse2", "ossfs", "cosfs", "obsfs"), BUCKET),
}
# Programs behind which there is a disk of this machine, or of the laboratory's own servers.
OWN_DISKS = frozenset(
    (
        *("mergerfs", "unionfs", "unionfs-fuse", "fuse-overlayfs", "bindfs", "portal", "ntfs-3g"),
        *("exfat", "ext4fuse", "squashfuse", "gocryptfs", "encfs", "cryfs", "vmhgfs-fuse"),
        *("ceph", "ceph-fuse", "glusterfs", "juicefs", "mfs", "moosefs", "lizardfs", "saunafs"),
        *("quobyte", "daos", "dfuse"),
    )
)


@dataclass(frozen=True)
class Mount:
    """A file system in the tree: its type such as "fuse.drive", its source, its folder."""

    kind: str
    source: str
    point: Path

    @property
    def is_fuse(self) -> bool:
        return self.kind.split(".")[0] == "fuse"

    @property
    def program(self) -> str:
        """What serves a FUSE mount; "" where nothing tells.

        The type names it (fuse.sshfs); in older mounts the source does (sshfs#host:/path).
        """
        _, _, named = self.kind.partition(".")
        return named or os.path.basename(self.source.partition("#")[0])

    @property
    def remote(self) -> str:
        """What it is, where each read is a request to a service far away; else ""."""
        if self.point.is_relative_to(MOUNT):
            return DRIVE
        return REMOTE.get(self.program, "") if self.is_fuse else ""


def check_mounted(drive: Path) -> None:
    """Refuse a folder that is not on a mounted Drive.

    What is written there would be lost with the machine. drive: the folder, which need not be
    there yet, in one that is. Raises StoreFailed.
    """
    is_unmounted = drive.is_relative_to(MOUNT) and not os.path.ismount(MOUNT)
    looking = f"looking for {drive.parent}"
    if is_unmounted or not patiently(partial(exists, drive.parent), looking, drive):
        mount = f"run drive.mount('{MOUNT}') in a cell of its own"
        raise StoreFailed(f"{drive.parent} is not there: {mount}", gone=True)


def refuse_remote(path: Path) -> None:
    """Raise RemoteSet for a set on a mounted Drive, cloud folder or bucket.

    Each page that is read would be a request over the network. Disks that a program serves from
    this machine or from a laboratory's servers are read as any disk is; for a program that is in no
    list here, a line says once what may be slow.
    """
    mount = mount_of(path)
    if mount is None:
        return
    if mount.remote:
        raise RemoteSet(path, mount.kind, mount.remote)
    if mount.is_fuse and mount.program not in OWN_DISKS:
        _warn_of(path, mount)


@cache
def _warn_of(path: Path, mount: Mount) -> None:
    """Once a process and set."""
    served = f"{mount.kind}, from {mount.source}"
    advice = "if that is a network, copy the set to a disk first when training waits for batches"
    log(f"{path} is on {mount.point} ({served}), which a program serves: {advice}")


def kind_of_mount(path: Path) -> str:
    """The file system's type, such as "ext4"; "" where nothing tells: no /proc, or no such path."""
    mount = mount_of(path) if os.path.lexists(path) else None
    return mount.kind if mount else ""


def mount_of(path: Path) -> Mount | None:
    """On which mount a path is; None where nothing tells.

    By the number of the device. Where the path does not answer (a mount that is gone), or its file
    system numbers by folder (btrfs), by the deepest folder on the way to it.
    """
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return None
    try:
        device = os.stat(path).st_dev
        of_path = f"{os.major(device)}:{os.minor(device)}"
    except OSError:
        of_path = ""
    found = [(words[2], _mount_in(words)) for words in map(str.split, lines)]
    for number, mount in found:
        if number == of_path:
            return mount
    real = Path(os.path.realpath(path))
    around = [mount for _, mount in found if real.is_relative_to(mount.point)]
    return max(around, key=lambda mount: len(mount.point.parts), default=None)


def _mount_in(words: list[str]) -> Mount:
    """Of a line of mountinfo. A blank in a path is written as \\040."""
    kind, source = words[words.index("-") + 1 :][:2]
    return Mount(kind=kind, source=_unescaped(source), point=Path(_unescaped(words[4])))


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word)


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
        return self._patiently(action, f"looking for {self.path / name}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        action = partial(self._files.read, name, start, stop)
        return self._patiently(action, f"reading {name}")

    def sizes(self) -> dict[str, int] | None:
        return self._patiently(self._files.sizes, f"listing {self.path}")

    def what_is_wrong(self, name: str, entry: FileEntry) -> str | None:
        """From where the file lies, and not from the page cache."""
        if self.size(name) < 0:
            return "is missing"
        action = partial(is_right, self.path / name, entry)
        is_same = self._patiently(action, f"reading {name}")
        return None if is_same else "has other content than the manifest says (size, SHA-256)"

    def child(self, name: str) -> "MountedStore":
        return MountedStore(self.path / name)

    def create(self) -> None:
        """Make the folder, in one that is there."""
        self._patiently(partial(self.path.mkdir, exist_ok=True), f"making {self.path}")

    def put(self, name: str, *parts: Any) -> FileEntry:
        """Write a file whole, and read it back."""

        def write() -> FileEntry:
            written = self._files.put(name, *parts)
            self._read_back(name, written)
            return written

        return self._patiently(write, f"writing {name}")

    def delete(self, *names: str) -> None:
        for name in names:
            action = partial(self._files.delete, name)
            self._patiently(action, f"removing {self.path / name}")

    def settle(self, names: Iterable[str]) -> None:
        """Nothing is known of what a mount makes durable."""

    def free_bytes(self) -> int:
        return self._patiently(self._files.free_bytes, f"preparing {self.path}")

    def remove_unfinished(self, older_than_s: float = 0.0) -> None:
        action = partial(self._files.remove_unfinished, older_than_s)
        self._patiently(action, f"preparing {self.path}")

    def upload(self, source: Path, name: str, entry: FileEntry | None = None) -> None:
        """Copy a file of this machine there, and read it back; nothing where it is right already.

        entry: what the file must be; None: whatever it is, it is copied.
        """

        def copy() -> None:
            target = self.path / name
            if entry is None or not is_right(target, entry):
                self._read_back(name, copy_checked(source, target, entry))

        self._patiently(copy, f"writing {name}")

    def download(self, name: str, target: Path, entry: FileEntry | None = None) -> None:
        """Copy a file from there to this machine; nothing where it is right here already.

        entry: what the file must be; None: whatever it is, it is copied.
        """

        def copy() -> None:
            if entry is None or not is_right(target, entry):
                copy_checked(self.path / name, target, entry)

        self._patiently(copy, f"reading {name}")

    def _patiently(self, action: Callable[[], T], doing: str) -> T:
        return patiently(action, doing, self.path)

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
