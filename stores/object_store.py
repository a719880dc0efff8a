"""A folder of a bucket, or of what else fsspec opens: s3://bucket/sets, memory://sets.

An object is written by one PUT, whole or not at all, and what a set is made of is only ever
created: where an object lies already it holds these very bytes, or that is an error. Nothing is
known of credentials here: fsspec and what it stands on find them, and no message shows any.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from shards.addresses import hidden, name_of, without_secrets
from shards.errors import (
    DamagedSet,
    IncompleteCopy,
    OtherBytes,
    StoreFailed,
    UserError,
    WrongPlace,
)
from shards.files import FileEntry, HashingFile, what_is_wrong, write_atomically
from shards.manifest import FAILED, PROVENANCE, RECEIPT
from stores.backends import (
    NO_BUCKET,
    Backend,
    described,
    is_beyond_the_end,
    is_conflict,
    joined,
    open_backend,
    passes,
    status_of,
)

T = TypeVar("T")

PAUSES = (0.5, 2.0, 8.0)  # seconds before another try; botocore has tried a few times by then
RANGE_BYTES = 8 << 20  # of one request
IN_FLIGHT = 4  # ranges of an object that travel at once
DOWNLOADS = 2  # of a file whose bytes come wrong
WRITES = 3  # of an object that is said to be there, and then is not
MISSING = "is missing"


class OtherLength(Exception):
    """An object has other bytes than were asked for: so many."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__(n_bytes)
        self.n_bytes = n_bytes


class CutShort(ConnectionError):
    """Fewer bytes came than were asked for, of an object that has them."""


class Connection:
    """What fsspec opens for an address, in each process anew: it does not outlive a fork."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._opened: tuple[Backend, str] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def opened(self) -> tuple[Backend, str]:
        """With the path of the address. Raises as `open_backend`."""
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._opened = None
            self._lock = threading.Lock()
        with self._lock:
            if self._opened is None:
                self._opened = open_backend(self._address)
            return self._opened


class ObjectStore:
    """See stores.base.Store. Pickles as its address; a forked child opens its own connections.

    What fails at each try, and what no further try would mend, is a StoreFailed.
    """

    def __init__(self, address: str, replaces: bool = False) -> None:
        """replaces: whether objects that hold other bytes may be overwritten: where a set is
        repaired.
        """
        self._address = address.rstrip("/") if not address.endswith("://") else address
        self.replaces = replaces
        self.n_requests = 0  # about: of several threads one may not be counted
        self._listed: dict[str, int] = {}  # bytes by name, of the last listing
        self._connection = Connection(self._address)
        self._below = ""  # of the connection's folder: "/name", of a child of it

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self._address, self.replaces)

    def __str__(self) -> str:
        return without_secrets(self._address)

    @property
    def name(self) -> str:
        return name_of(self._address)

    def child(self, name: str) -> "ObjectStore":
        """By the same connections."""
        child = ObjectStore(f"{self._address.rstrip('/')}/{name}", self.replaces)
        child._connection = self._connection
        child._below = f"{self._below}/{name}"
        return child

    # -------------------------------------------------------------------------------------- asking

    def _ask(self, doing: str, request: Callable[[Backend, str], T]) -> T:
        """What `request` gives, asked again after a pause where the store fails for a while.

        request: of (backend, the path of this folder). Raises FileNotFoundError and FileExistsError
        as they come, else StoreFailed.
        """
        for pause in (*PAUSES, None):
            try:
                backend, path = self._connection.opened()
                self.n_requests += 1
                return request(backend, f"{path}{self._below}")
            except (UserError, OtherLength):
                raise
            except Exception as error:  # of packages that are not imported here
                if is_conflict(error):
                    raise FileExistsError(str(self)) from None
                is_missing = isinstance(error, FileNotFoundError)
                if is_missing and status_of(error)[1] != NO_BUCKET:
                    raise
                if pause is None or not passes(error):
                    raise self._failed(doing, error, was_tried=pause is None) from None
            time.sleep(pause)
        raise AssertionError

    def _failed(self, doing: str, error: Exception, *, was_tried: bool) -> StoreFailed:
        answer = hidden(described(error), self._address)
        tries = f" {len(PAUSES) + 1} times" if was_tried else ""
        problem = f"{self}: {doing} failed{tries} ({answer})"
        status, code = status_of(error)
        if code == NO_BUCKET:
            return StoreFailed(problem, "Make that bucket, or mend its name", gone=True)
        if status in (401, 403) or isinstance(error, PermissionError):
            return StoreFailed(problem, "Use credentials that may do that")
        if "Credentials" in type(error).__name__:
            how = "Give credentials as the store's own tools take them"
            return StoreFailed(problem, how)
        if was_tried:
            return StoreFailed(problem, "Wait until it answers")
        return StoreFailed(problem, "Check the address and what its package is told")

    # ------------------------------------------------------------------------------------- reading

    def size(self, name: str) -> int:
        found = self._ask(f"looking for {name}", lambda backend, at: backend.head(f"{at}/{name}"))
        return -1 if found is None else found.n_bytes

    def sizes(self) -> dict[str, int] | None:
        found = self._ask("listing it", lambda backend, at: backend.find(at))
        self._listed = dict(found)
        return found

    def names(self) -> list[str]:
        """Of the folders and objects directly in it, by one listing."""
        return self._ask("listing it", lambda backend, at: backend.names_in(at))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            if stop is None:
                return self._whole(name)[start:]
            return self._up_to(name, start, stop)
        except FileNotFoundError:
            raise DamagedSet(f"{self}/{name}", "is missing") from None

    def _up_to(self, name: str, start: int, stop: int) -> bytes:
        try:
            return self._get(name, start, stop)
        except OtherLength as error:  # it ends before
            end = error.n_bytes
            return self._get(name, start, end) if start < end else b""

    def _whole(self, name: str) -> bytes:
        """By one request where it was listed and is not large, else by one more."""
        n_bytes = self._listed.get(name)
        if n_bytes is None:
            n_bytes = self._size_of(name)
        try:
            return b"".join(self._blocks(name, n_bytes))
        except OtherLength as error:  # it is another one since it was listed
            self._listed.pop(name, None)
            return b"".join(self._blocks(name, error.n_bytes))

    def _size_of(self, name: str) -> int:
        """Raises FileNotFoundError."""
        n_bytes = self.size(name)
        if n_bytes < 0:
            raise FileNotFoundError(name)
        return n_bytes

    def _blocks(self, name: str, n_bytes: int) -> Iterator[bytes]:
        """All of an object in order, a few ranges in flight.

        Raises FileNotFoundError, and OtherLength where it has not so many bytes.
        """
        if n_bytes == 0:  # there is no range of nothing
            found = self._size_of(name)
            if found:
                raise OtherLength(found)
            return
        starts = range(0, n_bytes, RANGE_BYTES)

        def block(start: int) -> bytes:
            stop = min(start + RANGE_BYTES, n_bytes)
            # A byte more than there should be: a longer object shows itself.
            return self._get(name, start, stop, beyond=int(stop == n_bytes))

        if len(starts) == 1:
            yield block(0)
            return
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for first in range(0, len(starts), IN_FLIGHT):
                yield from pool.map(block, starts[first : first + IN_FLIGHT])

    def _get(self, name: str, start: int, stop: int, beyond: int = 0) -> bytes:
        """The bytes start .. stop, and no more where `beyond` were asked for behind them.

        Raises FileNotFoundError, and OtherLength where the object does not end so.
        """

        def request(backend: Backend, at: str) -> bytes:
            path = f"{at}/{name}"
            try:
                data = backend.get(path, start, stop + beyond)
            except Exception as error:
                if not is_beyond_the_end(error):
                    raise
                data = b""
            if len(data) == stop - start:
                return data
            found = backend.head(path)
            if found is None:
                raise FileNotFoundError(name)
            if found.n_bytes < stop or (beyond and found.n_bytes > stop):
                raise OtherLength(found.n_bytes)
            raise CutShort(f"{len(data)} of {stop - start} bytes came")

        return self._ask(f"reading {name}", request)

    def what_is_wrong(self, name: str, entry: FileEntry) -> str | None:
        sha256 = hashlib.sha256()
        try:
            for block in self._blocks(name, entry.n_bytes):
                sha256.update(block)
        except FileNotFoundError:
            return MISSING
        except OtherLength as error:
            counted = f"{error.n_bytes} bytes, the manifest says {entry.n_bytes}"
            return f"has {counted}: the copy is incomplete"
        is_same = sha256.hexdigest() == entry.sha256
        return None if is_same else "has other content than the manifest says (SHA-256)"

    def download(self, name: str, target: Path, entry: FileEntry | None = None) -> None:
        """Copy an object to this machine, whole or not at all; nothing where it is right already.

        entry: what it must be; None: whatever it is. Raises IncompleteCopy.
        """
        if entry is not None and what_is_wrong(target, entry) is None:
            return
        try:
            n_bytes = self._size_of(name) if entry is None else entry.n_bytes
            for _ in range(DOWNLOADS):
                if self._downloaded(name, target, n_bytes, entry):
                    return
        except (FileNotFoundError, OtherLength):
            raise IncompleteCopy(f"{self}/{name} is missing or short", missing=[name]) from None
        what = f"{self}/{name} gave other content than the manifest has, {DOWNLOADS} times"
        raise IncompleteCopy(what)

    def _downloaded(self, name: str, target: Path, n_bytes: int, entry: FileEntry | None) -> bool:
        """Whether the right bytes came, and are at `target` now."""

        def write(file: HashingFile) -> None:
            for block in self._blocks(name, n_bytes):
                file.write(block)
            if entry is not None and file.sha256.hexdigest() != entry.sha256:
                raise OtherContent

        try:
            write_atomically(target, write)
        except OtherContent:
            return False
        return True

    # ------------------------------------------------------------------------------------- writing

    def put(self, name: str, *parts: Any) -> FileEntry:
        """Write an object by one request (of 256 MiB and more: several, none of which shows).

        Raises OtherBytes where one with other bytes is part of a set already.
        """
        data = joined(parts)
        entry = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        self._put(name, data, entry)
        return entry

    def _put(self, name: str, data: bytes, entry: FileEntry) -> None:
        is_new = not self.replaces and not _may_change(name)
        # Not by the request itself alone: there are stores that overwrite what they were to create.
        if is_new and name in self._listed and self._holds(name, entry):
            return

        def request(backend: Backend, at: str) -> None:
            if not backend.puts_whole:
                what = "cannot be written to: others would see files that are written in part"
                raise WrongPlace(str(self), what, "Use a bucket, or a folder of this machine")
            backend.put(f"{at}/{name}", data, entry.sha256, is_new=is_new)

        for _ in range(WRITES):
            try:
                self._ask(f"writing {name}", request)
                break
            except FileExistsError:  # of another writer, or of ours, whose answer did not come
                if self._holds(name, entry):
                    break
            except FileNotFoundError as error:
                raise self._failed(f"writing {name}", error, was_tried=False) from None
        else:
            raise StoreFailed(f"{self}/{name} is there, and is not", "Write it again")
        self._listed[name] = len(data)

    def _holds(self, name: str, entry: FileEntry) -> bool:
        """Whether an object has these very bytes; False where there is none. Raises OtherBytes."""
        looking = f"looking for {name}"
        found = self._ask(looking, lambda backend, at: backend.head(f"{at}/{name}"))
        if found is None:
            return False
        if found.n_bytes != entry.n_bytes:
            is_same = False
        elif found.sha256 is not None:
            is_same = found.sha256 == entry.sha256
        else:
            problem = self.what_is_wrong(name, entry)
            if problem == MISSING:  # gone since it was looked for
                return False
            is_same = problem is None
        if not is_same:
            raise OtherBytes(f"{self}/{name}")
        return True

    def upload(self, source: Path, name: str, entry: FileEntry | None = None) -> None:
        """Copy a file of this machine there, whole in memory; nothing where it is right already.

        entry: what the file must be; None: whatever it is. Raises IncompleteCopy where it is not,
        OtherBytes where other bytes are there.
        """
        try:
            data = source.read_bytes()
        except FileNotFoundError:
            raise IncompleteCopy(f"{source} is missing") from None
        found = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        if entry is not None and found != entry:
            raise IncompleteCopy(f"{source} has other content than the manifest says")
        if entry is not None and not self.replaces and self._holds(name, found):
            return
        self._put(name, data, found)

    def delete(self, *names: str) -> None:
        if not names:
            return
        self._ask(
            "removing objects",
            lambda backend, at: backend.delete([f"{at}/{name}" for name in names]),
        )
        for name in names:
            self._listed.pop(name, None)

    # ----------------------------------------------------------------- what a bucket has nothing of

    def create(self) -> None:
        """Nothing: a bucket has no folders."""

    def free_bytes(self) -> int | None:
        """None: it does not tell."""
        return None

    def remove_unfinished(self, older_than_s: float = 0.0) -> None:
        """Nothing: what is not whole is not there."""

    def settle(self, names: Iterable[str]) -> None:
        """Nothing: what is there is durable."""


class OtherContent(Exception):
    """Bytes came that are not those that should have."""


def _may_change(name: str) -> bool:
    """Whether a file of a set's folder is no part of the set: how it was made, what is done."""
    return name in (PROVENANCE, FAILED) or bool(RECEIPT.fullmatch(name))
