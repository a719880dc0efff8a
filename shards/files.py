"""Files: one atomic write, their size and SHA-256, plain files only; and what a folder is, wherever
it lies.
"""

import errno
import hashlib
import io
import json
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from shards.errors import DamagedSet, UserError, printable
from shards.strict_json import JsonObject

try:
    from fcntl import F_FULLFSYNC, fcntl  # type: ignore[attr-defined]
except ImportError:  # anything but macOS
    F_FULLFSYNC = None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file must be."""

    n_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.n_bytes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, value: JsonObject) -> "FileEntry":
        value.only("bytes", "sha256")
        return cls(value.whole("bytes"), value.text("sha256"))


_IS_QUIET = ContextVar("is_quiet", default=False)


def log(message: str) -> None:
    """A line for whoever watches; standard output is for results."""
    if not _IS_QUIET.get():
        print(printable(message), file=sys.stderr, flush=True)


@contextmanager
def quietly() -> Iterator[None]:
    """What is logged in here has been said already, by another process."""
    before = _IS_QUIET.set(True)
    try:
        yield
    finally:
        _IS_QUIET.reset(before)


def mebibytes(n_bytes: int | None) -> str:
    """For a message."""
    return "unknown" if n_bytes is None else f"{n_bytes / 2**20:.0f} MiB"


# ----------------------------------------------------------------------------------------- writing

UNFINISHED = ".*.tmp"  # as a file is called until it is whole
OURS = secrets.token_hex(4)  # machines that share a disk may have processes of one number


class HashingFile(io.BufferedWriter):
    """A new file that hashes what passes through it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return super().write(data)


def unfinished(path: Path) -> Path:
    """What a file is called until it is whole: each writer has a name of its own for it."""
    writer = f"{OURS}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.name}.{writer}.tmp")


def write_atomically(
    path: Path, write: Callable[[HashingFile], object], *, keep_same: bool = False
) -> FileEntry:
    """Write under a temporary name, fsync, rename: whole or not at all. Returns what was written.

    keep_same: a file that holds these very bytes already stays as it is. Raises OSError.
    """
    temporary = unfinished(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with HashingFile(temporary) as file:
            write(file)
            file.flush()
            fsync(file.fileno())
            entry = FileEntry(file.tell(), file.sha256.hexdigest())
        if not keep_same or what_is_wrong(path, entry):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return entry


def write_bytes(path: Path, *parts: Any) -> FileEntry:
    """Write buffers, one behind the other."""

    def write(file: HashingFile) -> None:
        for part in parts:
            file.write(part)

    return write_atomically(path, write, keep_same=True)


def json_bytes(value: dict[str, Any]) -> bytes:
    """An object as a file of JSON, its keys sorted."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


_IS_FLEETING = ContextVar("is_fleeting", default=False)


@contextmanager
def fleeting() -> Iterator[None]:
    """What is written in here need not outlive a loss of power: no disk is waited for."""
    before = _IS_FLEETING.set(True)
    try:
        yield
    finally:
        _IS_FLEETING.reset(before)


def fsync(handle: int) -> None:
    """Have what was written outlive a loss of power; on macOS plain fsync leaves it in the disk's
    own cache.
    """
    if _IS_FLEETING.get():
        return
    if F_FULLFSYNC is not None:
        with suppress(OSError):  # a file system that has none
            fcntl(handle, F_FULLFSYNC)
            return
    os.fsync(handle)


def fsync_dir(path: Path) -> None:
    """Make a rename in `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot
        fsync(handle)
    os.close(handle)


# ----------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class OpenFile:
    """The descriptor of a plain file, the bytes that it has, and its number on its disk."""

    handle: int
    n_bytes: int
    inode: int


def open_handle(path: str | Path) -> OpenFile:
    """Open a regular file to read: no symbolic link is followed, no pipe is waited for.

    Whoever calls closes it. Raises DamagedSet where it is none, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        known = {errno.ENOENT: "is missing", errno.ELOOP: "is not a plain file"}  # a link
        problem = known.get(error.errno or 0, f"cannot be read ({error.strerror})")
        raise DamagedSet(Path(path), problem) from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise DamagedSet(Path(path), "is not a plain file")
    return OpenFile(handle, found.st_size, found.st_ino)


def open_plain(path: Path) -> IO[bytes]:
    """`open_handle`, as a file of Python's."""
    return open(open_handle(path).handle, "rb", buffering=0)


def check_file(path: str | Path, n_bytes: int, header: bytes = b"") -> None:
    """Size and first bytes: 8 us a file, no data read. Raises DamagedSet."""
    file = open_handle(path)
    try:
        check_size(path, file, n_bytes)
        check_bytes(path, file, 0, header)
    finally:
        os.close(file.handle)


def check_size(path: str | Path, file: OpenFile, n_bytes: int) -> None:
    """Raise DamagedSet where an opened file has another one."""
    if file.n_bytes != n_bytes:
        said = f"has {file.n_bytes} bytes, the manifest says {n_bytes}: the copy is incomplete"
        raise DamagedSet(Path(path), said)


def check_bytes(path: str | Path, file: OpenFile, start: int, expected: bytes) -> None:
    """Raise DamagedSet where other bytes lie there in an opened file."""
    if expected and os.pread(file.handle, len(expected), start) != expected:
        raise DamagedSet(Path(path), "is damaged (its header is not the manifest's)")


def sha256_file(path: Path) -> str:
    """Of a plain file. Raises DamagedSet."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def hash_of(blocks: Iterable[bytes]) -> FileEntry:
    """What a file is that holds these, one behind the other."""
    sha256 = hashlib.sha256()
    n_bytes = 0
    for block in blocks:
        sha256.update(block)
        n_bytes += len(block)
    return FileEntry(n_bytes, sha256.hexdigest())


def what_is_wrong(path: Path, entry: FileEntry) -> str | None:
    """None where the file's every byte is right."""
    try:
        check_file(path, entry.n_bytes)
        same = sha256_file(path) == entry.sha256
        return None if same else "has other content than the manifest says (SHA-256)"
    except (UserError, OSError) as error:
        return str(error).removeprefix(f"{path} ")


def drop_from_cache(handle: int) -> None:
    """So that the next read comes from where the file lies; a hint that some systems ignore."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes(file: IO[bytes], n_bytes: int) -> bytes:
    """So many bytes, or up to the end. A busy mount may give fewer at once, or none (EAGAIN)."""
    parts = []
    while n_bytes > 0:
        part = file.read(n_bytes)
        if part is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if not part:
            break
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


# ----------------------------------------------------------------------------------------- folders


class Folder(Protocol):
    """Files by name, wherever they lie; a name may have slashes in it. str() is the address.

    A set is read from one: its manifest, and what that names.
    """

    @property
    def name(self) -> str:
        """The last part of the address."""

    def size(self, name: str) -> int:
        """Bytes; -1 where there is no such file."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes start .. stop of a file. Raises DamagedSet where there is no plain file."""

    def sizes(self) -> dict[str, int] | None:
        """The bytes of every file, by one listing; None where the place cannot be listed."""

    def what_is_wrong(self, name: str, entry: FileEntry) -> str | None:
        """None where the file's every byte is right."""


class WritableFolder(Folder, Protocol):
    """A folder that a set can be written into, file by file.

    Every method may be called again after it failed: the result is that of one call.
    """

    def put(self, name: str, *parts: Any) -> FileEntry:
        """Write one file whole or not at all: buffers of bytes, one behind the other.

        Returns what was written, which is durable then.
        """

    def delete(self, *names: str) -> None:
        """Remove files; where there is none, nothing happens."""

    def remove_unfinished(self, older_than_s: float = 0.0) -> None:
        """Remove what writers that were killed left behind, so many seconds ago or more."""

    def settle(self, names: Iterable[str]) -> None:
        """Have the folders of these files, as far as they were made for them, outlive a loss of
        power.
        """


class LocalFolder:
    """A folder of this machine's file systems, which need not be there yet. See WritableFolder.

    What fails is an OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalFolder) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def size(self, name: str) -> int:
        try:
            return os.stat(self.path / name).st_size
        except (FileNotFoundError, NotADirectoryError):
            return -1

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with open_plain(self.path / name) as file:
            end = file.seek(0, os.SEEK_END) if stop is None else stop
            file.seek(start)
            return _read_bytes(file, end - start)

    def sizes(self) -> dict[str, int] | None:
        found = {}
        for path in self.path.rglob("*"):
            with suppress(FileNotFoundError):  # others write here too: it was a temporary file
                if not path.is_dir():
                    found[str(path.relative_to(self.path))] = path.lstat().st_size
        return found

    def what_is_wrong(self, name: str, entry: FileEntry) -> str | None:
        return what_is_wrong(self.path / name, entry)

    def put(self, name: str, *parts: Any) -> FileEntry:
        return write_bytes(self.path / name, *parts)

    def delete(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def remove_unfinished(self, older_than_s: float = 0.0) -> None:
        for path in self.path.rglob(UNFINISHED):
            with suppress(FileNotFoundError):
                if time.time() - path.lstat().st_mtime >= older_than_s:
                    path.unlink()

    def settle(self, names: Iterable[str]) -> None:
        for folder in {parent for name in names for parent in Path(name).parents}:
            fsync_dir(self.path / folder)
