"""Single members of a .zip or a plain .tar, read where it lies: nothing is unpacked.

50,000 small files on a mounted Drive take hours, one archive does not. An archive's list of members
is read once, when it is opened, and kept as columns of numbers, 32 bytes a member; its names are
kept as 64-bit hashes. A member is then one read at a known place. A pickled archive goes to another
process of this machine with its list, and opens the file there.
"""

import hashlib
import os
import stat
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.errors import BadRow
from shards.errors import ChangedSource, WrongSource, one_line
from stores.mounted import patiently

MAX_MEMBER_BYTES = 512 << 20
LISTED = np.dtype(  # a member
    [
        ("offset", "<u8"),  # zip: of its local header; tar: of its bytes
        ("n_stored", "<u4"),  # bytes in the archive; TOO_LARGE from 4 GB on
        ("n_bytes", "<u4"),
        ("crc", "<u4"),
        ("method", "<u2"),  # zip: as in the archive; tar: STORED, or why it cannot be read
        ("flags", "<u2"),
    ]
)
TOO_LARGE = 2**32 - 1
STORED = 0
DEFLATED = 8
LINK = 1001  # above all methods of zip
SPARSE = 1002
ENCRYPTED = 1  # a flag
BLOCK_BYTES = 1 << 20
BLOCK_MEMBERS = 8192
OnName = Callable[[bytes], object]
INCOMPLETE = "Copy or download it again"


class Archive:
    """An archive, listed and open. Threads may read at once."""

    def __init__(self, path: Path, on_name: OnName | None = None) -> None:
        """on_name: told of each member as it is listed, by its name with slashes.

        Raises WrongSource where it is none, damaged, or not whole.
        """
        self.path = path
        self._lock = threading.Lock()
        self._handle: int | None = None
        found = os.fstat(self._open())
        self._stamp = (found.st_size, found.st_mtime_ns)
        try:
            listed = Listing(on_name)
            self._list(listed)
        except OSError as error:
            self.close()
            raise WrongSource(path, f"cannot be read ({one_line(error)})") from None
        except BaseException:
            self.close()
            raise
        self._top = listed.top
        hashes, members = listed.take_members()
        # Of several members with one name the last one counts, as it does for unpackers.
        order = np.argsort(hashes, kind="stable")
        is_last = np.ones(len(order), bool)
        is_last[:-1] = np.diff(hashes[order]) != 0
        order = order[is_last]
        self._hashes = hashes[order]  # apart from the rest: searched as they lie
        self._members = members[order]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def nbytes(self) -> int:
        """Memory of the list."""
        return self._hashes.nbytes + self._members.nbytes

    def close(self) -> None:
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
            self._handle = None

    def size_of(self, name: str) -> int | None:
        """The bytes that a member has by the list, found as by `read`; None: it is not there."""
        member, _ = self._find(name)
        return None if member is None else int(member["n_bytes"])

    def read(self, name: str) -> bytes:
        """The bytes of a member: by its name, else by its name in the one folder that all are in.

        Raises BadRow where it is missing, empty or damaged; WrongSource where the archive is
        another one by now; StoreFailed where a mount fails at each try.
        """
        member, raw_name = self._find(name)
        if member is None:
            raise BadRow(f"{name} is not in {self.path}")
        what = f"{name} in {self.path}"
        self._check_unchanged()
        if member["n_bytes"] > MAX_MEMBER_BYTES or member["n_stored"] > MAX_MEMBER_BYTES:
            raise BadRow(f"{what} is larger than {MAX_MEMBER_BYTES >> 20} MB")
        data = self._read_member(member, raw_name, what)
        if not data:
            raise BadRow(f"{what} is empty")
        return data

    def _find(self, name: str) -> tuple[np.void | None, bytes]:
        """A member of that name, and the name as it may stand there; None: there is none."""
        for raw_name in self._raw_names(name):
            found = self._place(raw_name)
            if found is not None:
                return self._members[found], raw_name
        return None, b""

    def _raw_names(self, name: str) -> Iterator[bytes]:
        raw_names = [name.encode(errors="surrogateescape")]
        if not name.isascii():  # of a zip that does not say how its names are encoded
            with suppress(UnicodeEncodeError):
                raw_names.append(name.encode("cp437"))
        for raw_name in raw_names:
            yield raw_name
            if self._top:
                yield self._top + b"/" + raw_name

    def _place(self, raw_name: bytes) -> int | None:
        wanted = np.frombuffer(_hash_of(raw_name), "<u8")[0]
        k = int(np.searchsorted(self._hashes, wanted))
        is_there = k < len(self._hashes) and self._hashes[k] == wanted
        return k if is_there else None

    def _open(self) -> int:
        handle = self._handle
        if handle is not None:
            return handle
        with self._lock:
            if self._handle is None:
                self._handle = _open_regular(self.path)
            return self._handle

    def _check_unchanged(self) -> None:
        found = os.fstat(self._open())
        if (found.st_size, found.st_mtime_ns) != self._stamp:
            what = "was changed while it was read"
            raise ChangedSource(self.path, what, "Begin again once it is whole")

    def _pread(self, n_bytes: int, offset: int) -> bytes:
        """So many bytes, fewer at the end of the file."""
        read = partial(_pread, self._open(), n_bytes, offset)
        return patiently(read, f"reading {self.path}", Path(self.path))

    @property
    def n_bytes(self) -> int:
        """Of the archive."""
        return self._stamp[0]

    def _list(self, listing: "Listing") -> None:
        raise NotImplementedError

    def _read_member(self, member: np.void, raw_name: bytes, what: str) -> bytes:
        raise NotImplementedError


class Listing:
    """Members as they are found, and the one folder that all are in (b"": there is none)."""

    def __init__(self, on_name: OnName | None = None) -> None:
        self._on_name = on_name
        self._hashes = bytearray()
        self._blocks: list[np.ndarray] = []
        self._rows: list[tuple[int, ...]] = []
        self._tops: set[bytes] = set()

    def add(self, raw_name: bytes, *numbers: int) -> None:
        """numbers: those of LISTED."""
        name = _plain_name(raw_name)
        first, slash, _ = name.partition(b"/")
        if first != b"__MACOSX" and len(self._tops) < 2:
            self._tops.add(first if slash else b"")
        if self._on_name is not None:
            self._on_name(name)
        self._hashes += _hash_of(name)
        self._rows.append(numbers)
        if len(self._rows) == BLOCK_MEMBERS:
            self._put_away()

    def _put_away(self) -> None:
        self._blocks.append(np.array(self._rows, LISTED))
        self._rows = []

    def take_members(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of the names [N] uint64 and [N] LISTED, in the order of the archive.

        They are not kept here.
        """
        self._put_away()
        hashes = np.frombuffer(self._hashes, "<u8")
        members = np.concatenate(self._blocks)
        self._hashes = bytearray()
        self._blocks = []
        return hashes, members

    @property
    def top(self) -> bytes:
        return next(iter(self._tops)) if len(self._tops) == 1 else b""


def _plain_name(raw_name: bytes) -> bytes:
    """With slashes, and without "./" in front."""
    name = raw_name.replace(b"\\", b"/").lstrip(b"/")
    while name.startswith(b"./"):
        name = name[2:].lstrip(b"/")
    return name


def _hash_of(name: bytes) -> bytes:
    """8 bytes. Two of a million names have the same one in 1 of 10 ** 7 archives."""
    return hashlib.blake2b(name, digest_size=8).digest()


def _open_regular(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise WrongSource(path, f"cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise WrongSource(path, "is no plain file")
    return handle


def _pread(handle: int, n_bytes: int, offset: int) -> bytes:
    parts = []
    while n_bytes > 0:
        part = os.pread(handle, n_bytes, offset)
        if not part:
            break
        parts.append(part)
        n_bytes -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# --------------------------------------------------------------------------------------------- zip

END = struct.Struct("<4s4H2LH")  # end of central directory
END_64_PLACE = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")  # of the central directory
LOCAL = struct.Struct("<4s5H3L2H")  # in front of a member
EXTRA_BYTES = 256  # behind a local header's name, guessed: read along with it


class ZipArchive(Archive):
    """Stored and deflated members. Their sizes and sums are those of the central directory."""

    def _list(self, listing: Listing) -> None:
        """Not by zipfile, which takes some 1 KB a member. Raises WrongSource."""
        start, stop, shift = self._directory()
        buffer = b""
        place = 0  # in the buffer
        next_read = start
        while next_read < stop or place < len(buffer):
            if len(buffer) - place < ENTRY.size + 3 * 2**16 and next_read < stop:
                n_bytes = min(BLOCK_BYTES, stop - next_read)
                buffer = buffer[place:] + self._pread(n_bytes, next_read)
                next_read += n_bytes
                place = 0
            place = self._list_entry(listing, buffer, place, shift)

    def _list_entry(self, listing: Listing, buffer: bytes, place: int, shift: int) -> int:
        """Add the entry at `place`; where the next one begins."""
        if len(buffer) - place < ENTRY.size:
            raise self._damaged()
        entry = ENTRY.unpack_from(buffer, place)
        signature, _, _, flags, method, _, _, crc, n_stored, n_bytes = entry[:10]
        n_name, n_extra, n_comment, _, _, _, offset = entry[10:]
        name_end = place + ENTRY.size + n_name
        stop = name_end + n_extra + n_comment
        if signature != b"PK\1\2" or stop > len(buffer):
            raise self._damaged()
        name = buffer[name_end - n_name : name_end]
        if TOO_LARGE in (n_bytes, n_stored, offset):
            extra = buffer[name_end : name_end + n_extra]
            n_bytes, n_stored, offset = self._zip64(extra, n_bytes, n_stored, offset)
        offset += shift
        if not 0 <= offset < self.n_bytes:
            raise self._damaged()
        if not name.endswith((b"/", b"\\")):
            n_stored = min(n_stored, TOO_LARGE)
            n_bytes = min(n_bytes, TOO_LARGE)
            listing.add(name, offset, n_stored, n_bytes, crc, method, flags)
        return stop

    def _zip64(self, extra: bytes, *numbers: int) -> list[int]:
        """The numbers, each that does not fit in 32 bits replaced by the one in the extra field."""
        place = 0
        while place + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, place)
            if kind == 1:
                values = extra[place + 4 : place + 4 + length]
                break
            place += 4 + length
        else:
            return list(numbers)
        found = list(numbers)
        for k, number in enumerate(numbers):
            if number == TOO_LARGE:
                if len(values) < 8:
                    raise self._damaged()
                found[k] = int.from_bytes(values[:8], "little")
                values = values[8:]
        return found

    def _directory(self) -> tuple[int, int, int]:
        """Where the central directory begins and ends, and by how much all offsets are too small
        (something stands in front of the archive).
        """
        tail_start = max(0, self.n_bytes - END.size - 2**16 - END_64_PLACE.size)
        tail = self._pread(self.n_bytes - tail_start, tail_start)
        place = tail.rfind(b"PK\5\6")
        if place < 0 or len(tail) - place < END.size:
            what = "is no zip, or its end is missing"
            raise WrongSource(self.path, what, INCOMPLETE)
        _, disk, _, _, _, n_directory, offset, _ = END.unpack_from(tail, place)
        stop = tail_start + place
        place_64 = place - END_64_PLACE.size
        if place_64 >= 0 and tail[place_64 : place_64 + 4] == b"PK\6\7":
            stop, disk, n_directory, offset = self._end_64(tail, place_64, tail_start)
        if disk not in (0, 0xFFFF):
            raise WrongSource(self.path, "is one part of several", "Join them first")
        start = stop - n_directory
        if start < 0 or offset > start:
            raise self._damaged()
        return start, stop, start - offset

    def _end_64(self, tail: bytes, place: int, tail_start: int) -> tuple[int, int, int, int]:
        """The same of an archive above 4 GB: where its directory ends, disk, bytes, offset."""
        offset = END_64_PLACE.unpack_from(tail, place)[2]
        # Where nothing stands in front, it is there; else right before what names its place.
        for start in (offset, tail_start + place - END_64.size):
            record = self._pread(END_64.size, start) if start >= 0 else b""
            if record.startswith(b"PK\6\6") and len(record) == END_64.size:
                _, _, _, _, disk, _, _, _, n_directory, directory = END_64.unpack(record)
                return start, disk, n_directory, directory
        raise self._damaged()

    def _damaged(self) -> WrongSource:
        return WrongSource(self.path, ": its list of members is damaged", INCOMPLETE)

    def _read_member(self, member: np.void, raw_name: bytes, what: str) -> bytes:
        method = int(member["method"])
        if member["flags"] & ENCRYPTED:
            raise BadRow(f"{what} is encrypted")
        if method not in (STORED, DEFLATED):
            raise BadRow(f"{what} is packed by method {method}, which is not read: unpack it")
        stored = self._stored_bytes(member, raw_name, what)
        n_bytes = int(member["n_bytes"])
        data = _inflated(stored, n_bytes) if method == DEFLATED else stored
        if data is None or len(data) != n_bytes or zlib.crc32(data) != member["crc"]:
            raise BadRow(f"{what} is damaged")
        return data

    def _stored_bytes(self, member: np.void, raw_name: bytes, what: str) -> bytes:
        """What lies behind the local header, which names the member again."""
        offset = int(member["offset"])
        n_stored = int(member["n_stored"])
        read = self._pread(LOCAL.size + len(raw_name) + EXTRA_BYTES + n_stored, offset)
        if len(read) < LOCAL.size or not read.startswith(b"PK\3\4"):
            raise BadRow(f"{what} is damaged (it does not begin where the list says)")
        n_name, n_extra = LOCAL.unpack_from(read)[-2:]
        name = read[LOCAL.size : LOCAL.size + n_name]
        if _plain_name(name) != raw_name:
            raise BadRow(f"{what} is damaged (another name stands there)")
        start = LOCAL.size + n_name + n_extra
        stop = start + n_stored
        if len(read) < stop:
            read += self._pread(stop - len(read), offset + len(read))
        if len(read) < stop:
            raise BadRow(f"{what} is damaged (it ends too early)")
        return read[start:stop]


def _inflated(stored: bytes, n_bytes: int) -> bytes | None:
    """At most so many bytes, whatever the data would become; None: they are no right ones."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflate.decompress(stored, n_bytes + 1)
        return data if inflate.eof else None
    except zlib.error:
        return None


# --------------------------------------------------------------------------------------------- tar


class TarArchive(Archive):
    """A tar that is not compressed: GNU's and POSIX' long names; no links, no sparse files."""

    def _list(self, listing: Listing) -> None:
        """One pass over all headers. Raises WrongSource."""
        try:
            with open(self.path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    self._list_member(listing, member)
                end = archive.offset
        except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
            what = f"is no plain tar, or not whole ({one_line(error)})"
            raise WrongSource(self.path, what, f"{INCOMPLETE}, or unpack it") from None
        # tarfile ends as silently at damage as at the block of zeros that ends a tar.
        if self._pread(512, end) != bytes(512):
            raise WrongSource(self.path, f"is damaged or not whole from byte {end}", INCOMPLETE)

    def _list_member(self, listing: Listing, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        kind = SPARSE if member.issparse() else STORED if member.isreg() else LINK
        if kind == STORED and member.offset_data + member.size > self.n_bytes:
            raise WrongSource(self.path, f"ends within {member.name}", INCOMPLETE)
        n_bytes = min(member.size, TOO_LARGE)
        name = member.name.encode(errors="surrogateescape")
        listing.add(name, member.offset_data, n_bytes, n_bytes, 0, kind, 0)

    def _read_member(self, member: np.void, raw_name: bytes, what: str) -> bytes:
        if member["method"] == LINK:
            raise BadRow(f"{what} is a link or a device: unpack it")
        if member["method"] == SPARSE:
            raise BadRow(f"{what} is a sparse file: unpack it")
        n_bytes = int(member["n_bytes"])
        data = self._pread(n_bytes, int(member["offset"]))
        if len(data) != n_bytes:
            raise BadRow(f"{what} is damaged (it ends too early)")
        return data
