"""A .mat on a web server: fetched whole (resumed, retried, checked), or read in place through range requests."""

import hashlib
import http.client
import io
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from . import format as fmt
from .format import UserError
from .shelf import Progress, say

T = TypeVar("T")

MAT_NAME = "nyu_depth_v2_labeled.mat"
OFFICIAL = "https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat"
ORIGINAL = (2_972_037_809, "2d724b0c0ab358aa1ce5df855e5bd14a2279ab7202efe22f32a30d612dcb86aa")
PAUSES = (1.0, 4.0, 16.0)  # seconds before another try; progress starts over
TIMEOUT = 30.0
READERS = 8  # range requests in flight
FINAL = (400, 401, 403, 404, 405, 410, 416)  # HTTP answers that another try does not change
BY_HAND = """by hand, any one of:
  the data set's page    https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html
  a mirror               academictorrents.com 47a9a46bb784b394e398228d4c85a8d61d01dfa8
                         kaggle.com rmzhang0526/nyu-depth-v2-labeled
  somebody's copy        2972037809 bytes, md5 520609c519fba3ba5ac58c8fefcc3530
then put it into your Drive folder as nyu_depth_v2_labeled.mat, or say where it is with MAT="""


def fetch(url: str, path: Path) -> Path:
    """Download `url` to `path`. What an earlier run got of the same file is kept in a .part file and goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        n_bytes, version = patiently(lambda: probe(url)[:2])
        part = path.with_name(f".{path.name}.{hashlib.sha256(f'{url} {version}'.encode()).hexdigest()[:8]}.part")
        _fetch_rest(url, part, n_bytes)
    except (OSError, http.client.HTTPException) as error:
        say(BY_HAND)
        raise UserError(f"{url} cannot be fetched ({error}). Run: make convert (it resumes)") from None
    if part.stat().st_size != n_bytes or (url == OFFICIAL and (n_bytes, fmt.sha256_file(part)) != ORIGINAL):
        part.unlink()
        raise UserError(f"{url} gave other bytes than it should (size, SHA-256). Run: make convert (from the start)")
    os.replace(part, path)
    return path


def patiently(action: Callable[[], T]) -> T:
    """Call `action`, again after a pause where the network fails."""
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


def _open(url: str, start: int, stop: int | str = "") -> Any:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop}", "User-Agent": "nyuv2-shards"})
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def probe(url: str) -> tuple[int, str, bool]:
    """Size, version (ETag or date), and whether the server answers ranges."""
    with _open(url, 0, 0) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{url} is a web page, not a .mat. Open it in a browser, then: make convert MAT=THE_FILE")
        ranges = answer.status == 206
        size = answer.headers["Content-Range"].rpartition("/")[2] if ranges else answer.headers["Content-Length"]
        return int(size), answer.headers["ETag"] or answer.headers["Last-Modified"] or size, ranges


def _fetch_rest(url: str, part: Path, n_bytes: int) -> None:
    with open(part, "ab") as file:
        if n_bytes - file.tell() > (free := shutil.disk_usage(part.parent).free):
            raise UserError(
                f"{url} has {n_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. Run: make convert OUT=..."
            )
        say(f"fetching {url}: {n_bytes / 1e6:.0f} MB" + (f", {file.tell() / 1e6:.0f} are here" if file.tell() else ""))
        with Progress("fetching", n_bytes, file.tell()) as progress:
            while (have := file.tell()) < n_bytes:
                patiently(lambda have=have: _some(url, file, have, progress))  # type: ignore[misc]
        os.fsync(file.fileno())


def _some(url: str, file: Any, have: int, progress: Progress) -> None:
    """Append what one request gives. A connection that drops after some bytes is no error: the next goes on there."""
    with _open(url, have) as answer:
        if have and answer.status != 206:  # no ranges: from the start
            file.truncate(0)
        while block := _block(answer):
            file.write(block)
            progress.add(len(block))
    if file.tell() <= have:
        raise OSError("the connection drops before any byte")


def _block(answer: Any) -> bytes:
    try:
        return answer.read(1 << 20)  # type: ignore[no-any-return]
    except (OSError, http.client.HTTPException):
        return b""


class Remote:
    """A .mat on a web server, used like a Path: only what is read of it travels, in ranges, several at once."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec

            self.system: Any = fsspec.filesystem("http")
        except ImportError:
            raise UserError("reading from a URL needs fsspec. Run: pip install 'nyuv2-shards[remote]'") from None
        self.url, self.name, self.n_read, self.n_requests = url, url.rpartition("/")[2], 0, 0
        try:
            self.n_bytes, _, ranges = patiently(lambda: probe(url))
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url} cannot be read ({error}). Run: make convert MAT=/path/to/{MAT_NAME}") from None
        if not ranges:
            raise UserError(f"{url}: its server gives whole files only (no ranges). Run: make convert URL={url}")

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        return True

    is_file = exists

    def is_dir(self) -> bool:
        return False

    def stat(self) -> os.stat_result:
        return os.stat_result((0o100444, 0, 0, 1, 0, 0, self.n_bytes, 0, 0, 0))

    def open(self, _mode: str) -> io.BufferedIOBase:
        return _Blocks(self)

    def pread(self, n_bytes: int, offset: int) -> bytes:
        """One range request, again where the connection drops. Threads may call it at once."""
        stop = min(self.n_bytes, offset + n_bytes)

        def ask() -> bytes:
            try:
                data: bytes = self.system.cat_file(self.url, offset, stop)
            except Exception as error:  # aiohttp's own types
                raise OSError(f"{type(error).__name__}: {error}") from None
            if len(data) != stop - offset:
                raise OSError(f"{len(data)} bytes came, {stop - offset} were asked for")
            return data

        data = patiently(ask)
        self.n_read, self.n_requests = self.n_read + len(data), self.n_requests + 1
        return data

    def report(self) -> str:
        read, of = self.n_read / 1e6, self.n_bytes / 1e6
        return f"read {read:.1f} of {of:.1f} MB ({read / of:.0%}) in {self.n_requests} requests"


class _Blocks(io.BufferedIOBase):
    """What h5py reads through: small things near each other, so in blocks that are kept."""

    SIZE, MOST = 64 << 10, 512

    def __init__(self, remote: Remote) -> None:
        self.remote, self.at, self.kept = remote, 0, lru_cache(self.MOST)(self._block)

    def _block(self, k: int) -> bytes:
        return self.remote.pread(self.SIZE, k * self.SIZE)

    def seekable(self) -> bool:
        return True

    readable = seekable

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.remote.n_bytes)[whence]
        return self.at

    def read(self, n_bytes: int | None = -1) -> bytes:
        end = self.remote.n_bytes if n_bytes is None or n_bytes < 0 else min(self.remote.n_bytes, self.at + n_bytes)
        first, last = self.at // self.SIZE, -(-end // self.SIZE)
        data = b"".join(self.kept(k) for k in range(first, last))[self.at - first * self.SIZE : end - first * self.SIZE]
        self.at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(memoryview(buffer).nbytes)
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)
