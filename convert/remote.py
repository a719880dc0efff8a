"""A .mat on a web server: fetched whole (resumed, retried, checked), or read in place through range requests."""

import hashlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from . import format as fmt
from .format import UserError
from .shelf import Progress, say

T = TypeVar("T")

OFFICIAL = "https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat"
ORIGINAL = (2_972_037_809, "2d724b0c0ab358aa1ce5df855e5bd14a2279ab7202efe22f32a30d612dcb86aa")
PAUSES = (1.0, 4.0, 16.0)  # seconds before another try; progress starts over
TIMEOUT = 30.0
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
