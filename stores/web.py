"""A set on a web server: read in ranges, never written to. The names come from its manifest, as
such a server lists nothing.
"""

import base64
import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from shards.addresses import hidden, name_of, without_secrets
from shards.errors import DamagedSet, IncompleteCopy, StoreFailed, WrongPlace, one_line
from shards.files import FileEntry, HashingFile, hash_of, what_is_wrong, write_atomically
from stores.http import IN_FLIGHT, RANGE_BYTES, TIMEOUT_S, check_url, patiently

T = TypeVar("T")

# Not there, for all that is known: a bucket that may not be listed answers 403 for what is missing.
MISSING = (403, 404, 410)


class OtherContent(Exception):
    """An answer that is not what should lie there."""


class WebFolder:
    """Files under an http or https address. See stores.base.Store: what would write refuses.

    Raises StoreFailed where the server fails at each try.
    """

    def __init__(self, address: str) -> None:
        """Raises WrongSource for what is no address. No request is made."""
        check_url(address)
        parts = urllib.parse.urlsplit(address)
        user, _, host = parts.netloc.rpartition("@")
        self._host = parts._replace(netloc=host, path=parts.path.rstrip("/"), fragment="")
        self._user = urllib.parse.unquote(user)
        self.n_requests = 0

    def __str__(self) -> str:
        return without_secrets(urllib.parse.urlunsplit(self._host._replace(query="")))

    @property
    def name(self) -> str:
        return name_of(self._host.path)

    def size(self, name: str) -> int:
        try:
            return self._patiently(partial(self._length, name), f"looking for {name}")
        except FileNotFoundError:
            return -1

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            return b"".join(self._blocks(name, start, stop))
        except FileNotFoundError:
            raise DamagedSet(f"{self}/{name}", "is missing") from None

    def sizes(self) -> dict[str, int] | None:
        """None: nothing can be listed."""
        return None

    def what_is_wrong(self, name: str, entry: FileEntry) -> str | None:
        try:
            found = hash_of(self._blocks(name))
        except FileNotFoundError:
            return "is missing"
        if found.n_bytes != entry.n_bytes:
            counted = f"{found.n_bytes} bytes, the manifest says {entry.n_bytes}"
            return f"has {counted}: the copy is incomplete"
        is_same = found == entry
        return None if is_same else "has other content than the manifest says (SHA-256)"

    def download(self, name: str, target: Path, entry: FileEntry | None = None) -> None:
        """Copy a file to this machine, whole or not at all; nothing where it is right already.

        entry: what it must be; None: whatever it is. Raises IncompleteCopy.
        """
        if entry is not None and what_is_wrong(target, entry) is None:
            return

        def write(file: HashingFile) -> None:
            for block in self._blocks(name):
                file.write(block)
            if entry is not None and file.sha256.hexdigest() != entry.sha256:
                raise OtherContent

        try:
            write_atomically(target, write)
        except FileNotFoundError:
            raise IncompleteCopy(f"{self}/{name} is missing", missing=[name]) from None
        except OtherContent:
            what = f"{self}/{name} has other content than the manifest has"
            raise IncompleteCopy(what) from None

    # ------------------------------------------------------------------------------------ requests

    def _patiently(self, action: Callable[[], T], doing: str) -> T:
        """Raises FileNotFoundError where there is no such file, else StoreFailed."""
        try:
            return patiently(action)
        except urllib.error.HTTPError as error:
            if error.code in MISSING:
                raise FileNotFoundError(doing) from None
            answer = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            answer = hidden(one_line(error), f"https://{self._user}@")
        raise StoreFailed(f"{self}: {doing} failed ({answer})", "Wait until it answers")

    def _request(self, name: str, **headers: str) -> urllib.request.Request:
        path = f"{self._host.path}/{urllib.parse.quote(name)}"
        url = urllib.parse.urlunsplit(self._host._replace(path=path))
        headers |= {"User-Agent": "nyuv2-shards", "Accept-Encoding": "identity"}
        request = urllib.request.Request(url, headers=headers)
        if self._user:  # not handed on to where the server may send us
            basic = base64.b64encode(self._user.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        self.n_requests += 1
        return request

    def _length(self, name: str) -> int:
        request = self._request(name)
        request.method = "HEAD"
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return int(answer.headers["Content-Length"] or -1)

    def _blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes start .. stop in order, or up to the end; a few ranges in flight.

        Raises FileNotFoundError.
        """
        end = start + RANGE_BYTES if stop is None else min(stop, start + RANGE_BYTES)
        first, n_bytes = self._range(name, start, end)
        last = n_bytes if stop is None else min(stop, n_bytes)
        yield first[: max(0, last - start)]
        starts = range(start + len(first), last, RANGE_BYTES)
        if not starts:
            return

        def block(at: int) -> bytes:
            data, _ = self._range(name, at, min(at + RANGE_BYTES, last))
            return data[:RANGE_BYTES]

        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for k in range(0, len(starts), IN_FLIGHT):
                yield from pool.map(block, starts[k : k + IN_FLIGHT])

    def _range(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """The bytes start .. stop, or more, as far as there are any, and how many the file has."""
        return self._patiently(partial(self._ask_range, name, start, stop), f"reading {name}")

    def _ask_range(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        request = self._request(name, Range=f"bytes={start}-{stop - 1}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return _data_of(answer, start, stop)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            error.close()  # it ends before: an empty file has no range at all
            return b"", start

    # -------------------------------------------------------------------- what a store does beside

    def child(self, name: str) -> "WebFolder":
        whole = self._host._replace(path=f"{self._host.path}/{name}")
        child = WebFolder(urllib.parse.urlunsplit(whole))
        child._user = self._user
        return child

    def _refuse(self) -> NoReturn:
        raise WrongPlace(str(self), "can only be read", "Use a bucket, or a folder of this machine")

    def put(self, name: str, *parts: Any) -> FileEntry:
        self._refuse()

    def delete(self, *names: str) -> None:
        self._refuse()

    def create(self) -> None:
        self._refuse()

    def upload(self, source: Path, name: str, entry: FileEntry | None = None) -> None:
        self._refuse()

    def free_bytes(self) -> int | None:
        self._refuse()

    def remove_unfinished(self, older_than_s: float = 0.0) -> None:
        self._refuse()

    def settle(self, names: Any) -> None:
        self._refuse()


def _data_of(answer: Any, start: int, stop: int) -> tuple[bytes, int]:
    """Of an answer to a request for a range; of a server without ranges all from there on.

    Raises ConnectionError where it was cut short.
    """
    data: bytes = answer.read()
    if answer.status != 206:
        length = answer.headers["Content-Length"]
        if length is not None and int(length) != len(data):
            raise ConnectionError(f"{len(data)} of {length} bytes came")
        return data[start:], len(data)
    n_bytes = int((answer.headers["Content-Range"] or "").rpartition("/")[2])
    expected = min(stop, n_bytes) - start
    if len(data) != expected:
        raise ConnectionError(f"{len(data)} of {expected} bytes came")
    return data, n_bytes
