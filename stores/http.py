"""A .mat on a web server: fetched whole (resumed, retried, checked), or read in place through range requests."""

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from convert.transfer import Progress
from shards import format as fmt
from shards.format import UserError, log

T = TypeVar("T")

MAT_NAME = "nyu_depth_v2_labeled.mat"
OFFICIAL = "https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat"
ORIGINAL = (2_972_037_809, "2d724b0c0ab358aa1ce5df855e5bd14a2279ab7202efe22f32a30d612dcb86aa")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before another try; each range has its own
TIMEOUT = 30.0
READERS = 8  # threads that convert from a URL
IN_FLIGHT, STEP = 4, 8 << 20  # ranges of a download
FINAL = (400, 401, 403, 404, 405, 410, 416)  # HTTP answers that another try does not change
BY_HAND = """by hand, any one of:
  the data set's page    https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html
  a mirror               academictorrents.com 47a9a46bb784b394e398228d4c85a8d61d01dfa8
                         kaggle.com rmzhang0526/nyu-depth-v2-labeled
  somebody's copy        2972037809 bytes, md5 520609c519fba3ba5ac58c8fefcc3530
then put it into your Drive folder as nyu_depth_v2_labeled.mat, or say where it is with MAT="""


def fetch(url: str, path: Path) -> Path:
    """Download `url` to `path`. What an earlier run got of the same file is kept in a .part file and goes on."""
    check_url(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        remote = Remote(url)
        part = path.with_name(f".{path.name}.{hashlib.sha256(f'{url} {remote.version}'.encode()).hexdigest()[:8]}.part")
        _fetch_rest(remote, part)
    except (OSError, UserError) as error:
        log(BY_HAND)
        raise UserError(f"{error}. What was fetched is kept. Run: make convert (it resumes)") from None
    if url == OFFICIAL and (remote.n_bytes, fmt.sha256_file(part)) != ORIGINAL:
        part.unlink()
        raise UserError(f"{url} gave other bytes than it should (size, SHA-256). Run: make convert (from the start)")
    os.replace(part, path)
    return path


def _fetch_rest(remote: "Remote", part: Path) -> None:
    """Append what is missing, a few ranges in flight, written in order."""
    with open(part, "ab") as file, ThreadPoolExecutor(IN_FLIGHT) as pool:
        have, free = file.tell(), shutil.disk_usage(part.parent).free
        if remote.n_bytes - have > free:
            raise OSError(f"{remote} has {remote.n_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
        log(f"fetching {remote}: {remote.n_bytes / 1e6:.0f} MB" + (f", {have / 1e6:.0f} are here" if have else ""))
        starts = range(have, remote.n_bytes, STEP)
        with Progress("fetching", remote.n_bytes, have) as progress:
            for lo in range(0, len(starts), IN_FLIGHT):
                for data in pool.map(partial(remote.pread, STEP), starts[lo : lo + IN_FLIGHT]):
                    file.write(data)
                    progress.add(len(data))
        file.flush()
        fmt.fsync(file.fileno())


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


def ask(url: str, start: int, stop: int) -> Any:
    """The answer to one range request."""
    headers = {"Range": f"bytes={start}-{stop - 1}", "User-Agent": "nyuv2-shards"}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def check_url(url: str) -> None:
    """Raise UserError for what is no address, which no further try would mend."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        str(parts.hostname).encode("idna")
    except (ValueError, UnicodeError):
        is_right = False
    if not is_right:
        raise UserError(
            f"{url!r} is no address of a file: it is like https://host/{MAT_NAME}. Run: make convert URL=..."
        )


def probe(url: str) -> tuple[int, str]:
    """Size and version (ETag or date). UserError where that is no file that can be read in ranges."""
    with ask(url, 0, 1) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise UserError(f"{url} is a web page, not a .mat. Open it in a browser, then: make convert MAT=THE_FILE")
        size = (answer.headers["Content-Range"] or "").rpartition("/")[2]
        if answer.status != 206 or not size.isdecimal():
            raise UserError(f"{url}: its server gives no ranges. Run: curl -O {url}, then: make convert MAT=THE_FILE")
        return int(size), answer.headers["ETag"] or answer.headers["Last-Modified"] or size


class Remote:
    """A .mat on a web server, used like a Path: only what is read of it travels, in ranges, several at once."""

    def __init__(self, url: str) -> None:
        check_url(url)
        try:
            import fsspec

            self.system: Any = fsspec.filesystem("http")
        except ImportError:
            raise UserError("reading from a URL needs fsspec. Run: pip install 'nyuv2-shards[remote]'") from None
        self.url, self.name, self.n_read, self.n_requests = url, url.rpartition("/")[2], 0, 0
        try:
            self.n_bytes, self.version = patiently(lambda: probe(url))
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{url} cannot be read ({error}). Run: make convert MAT=/path/to/{MAT_NAME}") from None

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        return True

    def stat(self) -> os.stat_result:
        return os.stat_result((0o100444, 0, 0, 1, 0, 0, self.n_bytes, 0, 0, 0))

    def open(self, _mode: str) -> Any:
        """What h5py reads its small things through: blocks of 64 KB, the last 512 of them kept.

        Not through fsspec's event loop: a garbage collection in its thread may free an h5py object, and so wait for
        h5py, which would wait here for the loop.
        """
        from fsspec.spec import AbstractBufferedFile

        class Stream(AbstractBufferedFile):  # type: ignore[misc]
            def _fetch_range(self, start: int, stop: int) -> bytes:
                return self.fs._read(_in_this_thread, start, stop)  # type: ignore[no-any-return]

        return Stream(
            self, self.url, "rb", 64 << 10, cache_type="blockcache", cache_options={"maxblocks": 512}, size=self.n_bytes
        )

    def pread(self, n_bytes: int, offset: int) -> bytes:
        """One range request, again where the connection drops. Threads may call it at once."""
        return self._read(self.system.cat_file, offset, offset + n_bytes)

    def _read(self, cat: Callable[[str, int, int], bytes], start: int, stop: int) -> bytes:
        stop = min(stop, self.n_bytes)

        def read() -> bytes:
            try:
                data = cat(self.url, start, stop)
            except Exception as error:  # aiohttp's own types
                raise ConnectionError(f"{self.url}: {type(error).__name__}: {error}") from None
            if len(data) != stop - start:
                raise ConnectionError(f"{self.url}: {len(data)} bytes came, {stop - start} were asked for")
            return data

        data = patiently(read)
        self.n_read, self.n_requests = self.n_read + len(data), self.n_requests + 1
        return data

    def report(self) -> str:
        read, of = self.n_read / 1e6, self.n_bytes / 1e6
        return f"read {read:.1f} of {of:.1f} MB ({read / of:.0%}) in {self.n_requests} requests"


def _in_this_thread(url: str, start: int, stop: int) -> bytes:
    with ask(url, start, stop) as answer:
        return answer.read()  # type: ignore[no-any-return]
