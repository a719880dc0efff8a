"""A file on a web server.

It is fetched whole (resumed, retried, checked), or read in place through range requests.
"""

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shards.addresses import hidden, name_of, without_secrets
from shards.errors import Busy, UserError, WrongPlace, WrongSource, how_to_install
from shards.files import FileEntry, fsync, sha256_file
from shards.lock import let_go, take

T = TypeVar("T")

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before another try; each range has its own
TIMEOUT_S = 30.0
READERS = 8  # threads that convert from a URL
IN_FLIGHT = 4  # ranges of a download that travel at once
RANGE_BYTES = 8 << 20  # of a download
BLOCK_BYTES = 64 << 10  # of what is read in place through `RemoteFile.open`
BLOCKS_KEPT = 512
FINAL = (400, 401, 403, 404, 405, 410, 416)  # HTTP answers that another try does not change


# ---------------------------------------------------------------------------------------- requests


def patiently(action: Callable[[], T]) -> T:
    """Call `action`, again after a pause where the network fails.

    Raises what it raised the last time.
    """
    for pause in PAUSES:
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                if error.code in FINAL:
                    raise
            time.sleep(pause)
    return action()


def ask(url: str, start: int, stop: int) -> Any:
    """The answer to one range request, for the bytes start .. stop."""
    headers = {"Range": f"bytes={start}-{stop - 1}", "User-Agent": "nyuv2-shards"}
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _ask_bytes(url: str, start: int, stop: int) -> bytes:
    with ask(url, start, stop) as answer:
        return answer.read(stop - start + 1)  # one byte too many tells a server that sends all


def check_url(url: str) -> None:
    """Raise WrongSource for what is no address, which no further try would mend."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        str(parts.hostname).encode("idna")
    except (ValueError, UnicodeError):
        is_right = False
    if not is_right:
        what = "is no address of a file: it is like https://host/file.mat"
        raise WrongSource(repr(without_secrets(url)), what)


def probe(url: str) -> tuple[int, str]:
    """Size and version (ETag or date) of the file at an address.

    Raises WrongSource where that is no file to be read in ranges.
    """
    shown = without_secrets(url)
    with ask(url, 0, 1) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise WrongSource(shown, "is a web page, not a .mat", "Open it in a browser")
        size = (answer.headers["Content-Range"] or "").rpartition("/")[2]
        if answer.status != 206 or not size.isdecimal():
            how = f"Fetch it whole, as with curl -O {shown}"
            raise WrongSource(shown, ": its server gives no ranges", how)
        version = answer.headers["ETag"] or answer.headers["Last-Modified"] or size
        return int(size), version


# --------------------------------------------------------------------------------- reading in place


class RemoteFile:
    """A file on a web server, used like a Path.

    Only what is read of it travels, in ranges, several at once.
    """

    def __init__(self, url: str) -> None:
        """Raises WrongSource where that is no address, or no file that can be read in ranges."""
        check_url(url)
        self.system = _http_file_system()
        self.url = url
        self.name = name_of(url.partition("?")[0])
        self.n_bytes_read = 0
        self.n_requests = 0
        try:
            self.n_bytes, self.version = patiently(partial(probe, url))
        except (OSError, http.client.HTTPException) as error:
            what = hidden(f"cannot be read ({error})", url)
            raise WrongSource(without_secrets(url), what) from None

    def __str__(self) -> str:
        return without_secrets(self.url)

    def exists(self) -> bool:
        return True

    def stat(self) -> os.stat_result:
        """A plain file's, of which only the size is known."""
        return os.stat_result((0o100444, 0, 0, 1, 0, 0, self.n_bytes, 0, 0, 0))

    def open(self, _mode: str) -> Any:
        """What h5py reads its small things through: blocks of 64 KB, the last 512 of them kept.

        Not through fsspec's event loop: a garbage collection in its thread may free an h5py
        object, and so wait for h5py, which would wait here for the loop.
        """
        from fsspec.spec import AbstractBufferedFile

        class Stream(AbstractBufferedFile):
            def _fetch_range(self, start: int, stop: int) -> bytes:
                return self.fs.read_range(_ask_bytes, start, stop)

        return Stream(
            self,
            self.url,
            "rb",
            BLOCK_BYTES,
            cache_type="blockcache",
            cache_options={"maxblocks": BLOCKS_KEPT},
            size=self.n_bytes,
        )

    def pread(self, n_bytes: int, offset: int) -> bytes:
        """One range request, again where the connection drops. Threads may call it at once."""
        return self.read_range(self.system.cat_file, offset, offset + n_bytes)

    def read_range(self, get: Callable[[str, int, int], bytes], start: int, stop: int) -> bytes:
        """The bytes start .. stop, or up to the file's end, as `get` fetches them from the address.

        Raises ConnectionError where they do not come at any try.
        """
        end = min(stop, self.n_bytes)

        def read() -> bytes:
            try:
                data = get(self.url, start, end)
            except Exception as error:  # aiohttp's own types
                what = f"{type(error).__name__}: {error}"
                raise ConnectionError(f"{self}: {hidden(what, self.url)}") from None
            if len(data) != end - start:
                what = f"{len(data)} bytes came, {end - start} were asked for"
                raise ConnectionError(f"{self}: {what}")
            return data

        data = patiently(read)
        self.n_bytes_read += len(data)
        self.n_requests += 1
        return data

    def report(self) -> str:
        """How much of it was read, in words."""
        read_mb = self.n_bytes_read / 1e6
        all_mb = self.n_bytes / 1e6
        share = read_mb / all_mb
        return f"read {read_mb:.1f} of {all_mb:.1f} MB ({share:.0%}) in {self.n_requests} requests"


def _http_file_system() -> Any:
    try:
        import fsspec

        return fsspec.filesystem("http")
    except ImportError:
        how = how_to_install("remote", "fsspec[http]")
        raise UserError("reading from a URL needs fsspec", how) from None


# --------------------------------------------------------------------------------------- downloads


class Download:
    """A file on its way to `path`.

    What an earlier run got of the same file is in a .part file, and goes on. The name of that one
    has a hash of the address and of the server's version of the file in it, so that another file
    at the same address is never glued to an old part.
    """

    def __init__(self, remote: RemoteFile, path: Path) -> None:
        version = hashlib.sha256(f"{remote.url} {remote.version}".encode()).hexdigest()[:8]
        self.remote = remote
        self.path = path
        self.part = path.with_name(f".{path.name}.{version}.part")
        self.n_bytes_here = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """To be fetched and finished in: two that append to one part would spoil it.

        Raises Busy where another process fetches the same file, WrongPlace where none can be made.
        """
        handle = take(self.part)
        if handle is None:
            raise Busy(self.path, "is being fetched by", "another process", "Wait for it")
        try:
            self.n_bytes_here = os.fstat(handle).st_size
            yield
        finally:
            if not os.fstat(handle).st_size:
                self.part.unlink(missing_ok=True)
            let_go(handle)

    def check_room(self) -> None:
        """Raise WrongPlace where the rest would not fit."""
        free = shutil.disk_usage(self.part.parent).free
        if self.remote.n_bytes - self.n_bytes_here > free:
            size_mb = self.remote.n_bytes / 1e6
            problem = f"has {size_mb:.0f} MB, {free / 1e6:.0f} MB are free"
            raise WrongPlace(self.part.parent, problem, subject=str(self.remote))

    def fetch_rest(self, on_bytes: Callable[[int], object]) -> None:
        """Append what is missing, a few ranges in flight, written in order.

        on_bytes: called with the number of bytes of each range that was written. Raises OSError;
        what was written until then stays.
        """
        pool = ThreadPoolExecutor(IN_FLIGHT)
        try:
            with open(self.part, "ab") as file:
                for data in self._ranges(pool):
                    file.write(data)
                    self.n_bytes_here += len(data)
                    on_bytes(len(data))
                file.flush()
                fsync(file.fileno())
        finally:  # after Ctrl-C nobody waits for a server that says nothing
            pool.shutdown(wait=False, cancel_futures=True)

    def _ranges(self, pool: ThreadPoolExecutor) -> Iterator[bytes]:
        """The rest of the file in order; IN_FLIGHT ranges are held in memory."""
        starts = range(self.n_bytes_here, self.remote.n_bytes, RANGE_BYTES)
        for first in range(0, len(starts), IN_FLIGHT):
            together = starts[first : first + IN_FLIGHT]
            yield from pool.map(partial(self.remote.pread, RANGE_BYTES), together)

    def finish(self, expected: FileEntry | None = None) -> Path:
        """Give the file its name, and return it.

        Raises WrongSource where it is not as expected, and removes it.
        """
        if self.part.stat().st_size != self.remote.n_bytes or not self._is(expected):
            self.part.unlink()
            raise WrongSource(self.remote, "gave other bytes than it should (size, SHA-256)")
        os.replace(self.part, self.path)
        return self.path

    def _is(self, expected: FileEntry | None) -> bool:
        if expected is None:
            return True
        return FileEntry(self.remote.n_bytes, sha256_file(self.part)) == expected
