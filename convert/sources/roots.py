"""Where the paths of a table lead: a folder, an archive that is read in place, or a web server.

A path is relative to the root of its field: the one that was given for it, else the one for all
fields, else the table's folder. `/x` is absolute where that exists, else under the root, as the
lists of BTS have it. Nothing leaves a root, by `..` or by symbolic links, unless that is wanted.

A file that is missing or empty is a fault of its row. A disk, a mount or a server that fails is
tried again, and then fails the task.
"""

import errno
import http.client
import os
import re
import stat
import urllib.error
import urllib.parse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from convert.sources.archives import Archive, TarArchive, ZipArchive
from convert.sources.errors import BadRow
from shards.addresses import without_secrets
from shards.errors import StoreFailed, WrongSetting, WrongSource, one_line
from stores.http import ask, check_url
from stores.http import patiently as patiently_asked
from stores.mounted import patiently

MAX_FILE_BYTES = 512 << 20
MAX_FOLDERS = 4096  # of which it is remembered that they lie inside their root
OF_ONE_FIELD = re.compile(r"([a-z][a-z0-9_]{0,63})=(.+)", re.DOTALL)
IS_URL = re.compile(r"https?://", re.IGNORECASE)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO}


class Root(Protocol):
    """What paths are relative to. str() is what messages call it."""

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises BadRow, OSError or UserError: see Roots."""

    def file(self, path: str) -> Path:
        """Where the file lies on this machine."""

    def close(self) -> None:
        """Nothing is read afterwards."""


class Roots:
    """The root of every field. A copy by pickle is for another process of this machine."""

    def __init__(
        self,
        table_folder: Path,
        given: Sequence[str] = (),
        follow: bool = False,
        opened: Mapping[str, Root] | None = None,
    ) -> None:
        """given: as the user wrote them, DIR, URL, X.zip or X.tar; FIELD=DIR for one field.
        opened: of these places the ones that are open already; they are closed with the others.

        Raises WrongSetting for what can be no root, WrongSource for an archive that is damaged.
        """
        self._opened: dict[str, Root] = dict(opened or {})
        self._of_field: dict[str, Root] = {}
        self._default: Root = FolderRoot(table_folder.absolute(), follow)
        self._web = WebRoot("")
        try:
            self._open_all(given, follow)
        except BaseException:
            self.close()
            raise

    def _open_all(self, given: Sequence[str], follow: bool) -> None:
        there = set()
        for text in given:
            field, place = parted(text)
            if field in there:
                raise WrongSetting("root", text, "one is given for that already")
            there.add(field)
            if place not in self._opened:
                self._opened[place] = _opened(place, text, follow)
            if field:
                self._of_field[field] = self._opened[place]
            else:
                self._default = self._opened[place]

    @property
    def fields(self) -> tuple[str, ...]:
        """Those that have a root of their own."""
        return tuple(self._of_field)

    def read(self, field: str, path: str) -> bytes:
        """The bytes of a file, at least one and at most 512 MB.

        Raises BadRow where it is missing, empty, too large, damaged or outside its root; OSError or
        StoreFailed where a disk, a mount or a server fails at every try; WrongSource where an
        archive is another one by now.
        """
        return self._root(field, path).read(path)

    def file(self, field: str, path: str) -> Path:
        """Where the file lies, for what can only be read so. Raises as `read` does."""
        return self._root(field, path).file(path)

    def _root(self, field: str, path: str) -> Root:
        if IS_URL.match(path):
            return self._web
        return self._of_field.get(field, self._default)

    @property
    def may_hang(self) -> bool:
        """Whether reading waits for a server; a path may be an address itself, untold."""
        roots = (self._default, *self._of_field.values())
        return any(isinstance(root, WebRoot) for root in roots)

    def close(self) -> None:
        for root in self._opened.values():
            root.close()


def parted(text: str) -> tuple[str, str]:
    """(field, place) of a root as a user writes it; "" as the field for all of them."""
    match = OF_ONE_FIELD.fullmatch(text)
    if match is None or Path(text).exists():
        return "", text
    return match[1], match[2]


def _opened(place: str, text: str, follow: bool) -> Root:
    if IS_URL.match(place):
        try:
            check_url(place)
        except WrongSource:
            raise WrongSetting("root", text, "that is no address") from None
        if urllib.parse.urlsplit(place).path.lower().endswith((".zip", ".tar", *COMPRESSED)):
            raise WrongSetting("root", text, "an archive is read from this machine: fetch it first")
        return WebRoot(place)
    if "://" in place:
        raise WrongSetting("root", text, "of addresses, http:// and https:// are read")
    path = Path(place).expanduser().absolute()
    if path.is_dir():
        return FolderRoot(path, follow)
    name = path.name.lower()
    if name.endswith(COMPRESSED):
        how = "it cannot be read in place: unpack it, or make it a plain .tar or a .zip"
        raise WrongSetting("root", text, how)
    if not path.exists():
        raise WrongSetting("root", text, "there is no such folder or archive")
    if name.endswith(".zip"):
        return ArchiveRoot(ZipArchive(path))
    if name.endswith(".tar"):
        return ArchiveRoot(TarArchive(path))
    raise WrongSetting("root", text, "choose a folder, a URL, a .zip or a .tar")


def _inside(path: str) -> str:
    """A path without `.` and `..`, relative. Raises BadRow where it leaves its root."""
    parts: list[str] = []
    for part in path.replace("\\", "/").split("/"):
        if part == ".." and not parts:
            raise BadRow(f"{path} leaves its root")
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


# ----------------------------------------------------------------------------------------- folders


class FolderRoot:
    """A folder of this machine, which may be a mount."""

    def __init__(self, path: Path, follow: bool) -> None:
        self.path = path
        self.follow = follow
        self._real = os.path.realpath(path)
        self._inside: set[str] = set()  # folders that are known to lie in it

    def __str__(self) -> str:
        return str(self.path)

    def read(self, path: str) -> bytes:
        """See Roots.read."""
        return patiently(partial(self._read, path), f"reading {path}", self.path)

    def file(self, path: str) -> Path:
        """See Roots.file."""
        return patiently(partial(self._file, path), f"reading {path}", self.path)

    def close(self) -> None:
        """No file stays open."""

    def _read(self, path: str) -> bytes:
        handle, _ = self._open(path)
        with open(handle, "rb", buffering=0) as file:
            n_bytes = os.fstat(handle).st_size
            if n_bytes > MAX_FILE_BYTES:
                raise BadRow(f"{path} is larger than {MAX_FILE_BYTES >> 20} MB")
            parts = []
            while n_bytes > 0:
                part = file.read(n_bytes)
                if part is None:  # a busy mount
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                if not part:
                    raise BadRow(f"{path} became shorter while it was read")
                parts.append(part)
                n_bytes -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _file(self, path: str) -> Path:
        handle, found = self._open(path)
        os.close(handle)
        return found

    def _open(self, path: str) -> tuple[int, Path]:
        """A handle of a plain file that is not empty, and where it lies."""
        handle, found = self._open_any(path)
        status = os.fstat(handle)
        problem = ""
        if not stat.S_ISREG(status.st_mode):
            problem = "is no plain file"
        elif not status.st_size:
            problem = "is empty"
        if problem:
            os.close(handle)
            raise BadRow(f"{path} {problem}")
        return handle, Path(found)

    def _open_any(self, path: str) -> tuple[int, str]:
        for found, is_under_root in self._candidates(path):
            if is_under_root and not self.follow:
                found = self._checked(found, path)
            handle = _handle_of(found)
            if handle is not None:
                return handle, found
        if not self.path.is_dir():  # a mount that is gone has no files: no fault of the row
            raise StoreFailed(f"{self.path} is not there any more", gone=True)
        raise BadRow(f"{path} is missing in {self.path}")

    def _candidates(self, path: str) -> list[tuple[str, bool]]:
        """Where the file may lie, and whether that must be under the root."""
        ways = [path]
        if "\\" in path:
            ways.append(path.replace("\\", "/"))
        found = []
        for way in ways:
            if way.startswith("/"):
                found.append((way, False))
            found.append((os.path.join(self.path, way.lstrip("/")), True))
        return found

    def _checked(self, found: str, path: str) -> str:
        """Where a file of the root really lies. Raises BadRow where that is outside of it."""
        folder, name = os.path.split(found)
        if folder not in self._inside:
            real_folder = os.path.realpath(folder)
            if not self._holds(real_folder):
                raise BadRow(f"{path} leaves {self.path}")
            if len(self._inside) >= MAX_FOLDERS:
                self._inside.clear()
            self._inside.add(folder)
        if name != ".." and not os.path.islink(found):
            return found
        real = os.path.realpath(found)
        if not self._holds(real):
            raise BadRow(f"{path} leaves {self.path}")
        return real

    def _holds(self, real: str) -> bool:
        return real == self._real or real.startswith(self._real.rstrip("/") + "/")


def _handle_of(path: str) -> int | None:
    """None where there is no such file. Raises OSError for what another try may change."""
    try:
        # A pipe is not waited for.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a byte 0, or half a character
        return None
    except OSError as error:
        if error.errno in MISSING:
            return None
        raise


# ---------------------------------------------------------------------------------------- archives


class ArchiveRoot:
    """The members of an archive, or of a folder in it."""

    def __init__(self, archive: Archive, folder: str = "") -> None:
        self.archive = archive
        self.folder = folder

    def __str__(self) -> str:
        return str(self.archive)

    def read(self, path: str) -> bytes:
        """See Roots.read."""
        inside = _inside(path)
        return self.archive.read(f"{self.folder}/{inside}" if self.folder else inside)

    def file(self, path: str) -> Path:
        """No file of its own."""
        raise BadRow(
            f"{path} is in {self.archive}, and can only be read as a file: unpack it first"
        )

    def close(self) -> None:
        self.archive.close()


# --------------------------------------------------------------------------------------------- web


class WebRoot:
    """Files under an address; "": paths are addresses themselves."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __str__(self) -> str:
        return without_secrets(self.base)

    def read(self, path: str) -> bytes:
        """See Roots.read."""
        url = self._url(path)
        shown = without_secrets(url)
        path = without_secrets(path)
        try:
            data = patiently_asked(partial(_fetched, url))
        except (OSError, http.client.HTTPException) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else 0
            if code in (404, 410):
                raise BadRow(f"{path} is missing: {shown} answers {code}") from None
            if code == 416:
                raise BadRow(f"{path} is empty") from None
            raise StoreFailed(f"{shown} cannot be read ({one_line(error)})") from None
        if not data:
            raise BadRow(f"{path} is empty")
        return data

    def file(self, path: str) -> Path:
        """No file of this machine."""
        shown = without_secrets(path)
        what = "is on a web server, and can only be read as a file: fetch it first"
        raise BadRow(f"{shown} {what}")

    def close(self) -> None:
        """No connection stays open."""

    def _url(self, path: str) -> str:
        if IS_URL.match(path):
            try:
                check_url(path)
            except WrongSource as error:
                raise BadRow(str(error)) from None
            return urllib.parse.quote(path, safe="%:/?#[]@!$&'()*+,;=~")
        base = urllib.parse.urlsplit(self.base)
        whole = f"{base.path.rstrip('/')}/{urllib.parse.quote(_inside(path))}"
        return base._replace(path=whole, fragment="").geturl()


def _fetched(url: str) -> bytes:
    """The file at an address, in one request. Raises BadRow where it is too large."""
    with ask(url, 0, MAX_FILE_BYTES + 1) as answer:
        n_bytes = answer.length  # None: it does not say
        if n_bytes is not None and n_bytes > MAX_FILE_BYTES:
            raise BadRow(f"{without_secrets(url)} is larger than {MAX_FILE_BYTES >> 20} MB")
        data = answer.read() if n_bytes is not None else answer.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise BadRow(f"{without_secrets(url)} is larger than {MAX_FILE_BYTES >> 20} MB")
        return data
