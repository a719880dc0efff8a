"""Rows of the .mat: the only place that knows MATLAB's axis order, references, character codes and HDF5 chunks.

Planes come out as they are stored, (W, H): the picture is their transpose (`resize` transposes the small result).

Chunks are read without HDF5 where that is possible (gzip with or without shuffle, or no filter): the index is read
once, then each chunk is one pread and one inflate, both outside Python's lock, so that threads scale. Every other
filter goes through h5py: slower, never wrong.
"""

import errno
import hashlib
import itertools
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .format import UserError

_libdeflate: Callable[[Any, int], Any] | None
try:
    from deflate import zlib_decompress as _libdeflate
except ImportError:  # the extra `fast` is not installed
    _libdeflate = None

ORIGINAL_BYTES = 2_972_037_809
KEYS = {"rgb": "images", "depth": "depths", "raw_depth": "rawDepths", "label": "labels", "instance": "instances"}
KINDS = {"rgb": "u1", "depth": "f4", "raw_depth": "f4", "label": "u2", "instance": "u1"}
CELLS = ("names", "scenes", "sceneTypes", "rawRgbFilenames", "rawDepthFilenames")
MAX_CHUNK_BYTES = 64 << 20
MAX_DEFLATE = 1100  # deflate never packs better than 1032 to 1
MAX_SIDE = 2048  # of a picture
MAX_TILES = 16384  # chunks in one row
MAX_GROUP_BYTES = 64 << 20  # rows decoded together; more goes through a scratch file
DIRECT_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}


def inflate(data: bytes | memoryview, n_bytes: int) -> bytes | bytearray:
    """Undo zlib into exactly `n_bytes`. Raises ValueError where the data is damaged."""
    try:
        out = _libdeflate(data, n_bytes) if _libdeflate else zlib.decompress(data, bufsize=n_bytes)
    except Exception as error:  # the bindings raise their own types
        raise ValueError(f"a compressed chunk is damaged ({error})") from None
    if len(out) != n_bytes:
        raise ValueError(f"a chunk holds {len(out)} bytes, expected {n_bytes}")
    return out


def sampled_identity(path: Path, n_blocks: int = 16, block: int = 65536) -> dict[str, Any]:
    """The source's identity in milliseconds: its size and a SHA-256 over head, tail and fixed positions."""
    n_bytes = path.stat().st_size
    digest = hashlib.sha256(str(n_bytes).encode())
    with open(path, "rb") as file:
        for k in range(n_blocks):
            file.seek(max(0, n_bytes - block) * k // (n_blocks - 1))
            digest.update(file.read(block))
    return {"name": path.name, "bytes": n_bytes, "sampled_sha256": digest.hexdigest()}


# ---------------------------------------------------------------- opening, and saying what is wrong


def open_mat(path: Path) -> h5py.File:
    """Open a v7.3 .mat for reading; anything else is a UserError that says what it is."""
    if not path.exists():
        raise UserError(f"{path}: no such file. Download nyu_depth_v2_labeled.mat, then run: make convert MAT=...")
    if path.is_dir():
        raise UserError(f"{path} is a directory. Run: python -m convert run {path}/nyu_depth_v2_labeled.mat --out data")
    head = _head(path)
    if not head:
        raise UserError(f"{path} is empty: the download failed. Delete it and run: make convert")
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path} is a web page, not a .mat: the download failed. Delete it and run: make convert")
    if head.startswith(b"MATLAB 5.0"):
        raise UserError(f"{path} is MATLAB v5; the labelled set is v7.3. In MATLAB: save -v7.3, then run: make convert")
    try:
        return h5py.File(path, "r", locking=False)
    except Exception as error:  # h5py raises whatever HDF5 comes upon
        n_bytes = path.stat().st_size
        if "truncated" in str(error):
            raise UserError(
                f"{path} is {n_bytes} bytes and its end is missing (the original has {ORIGINAL_BYTES}): "
                "the download was cut. Fetch the rest with curl -C -, then run: make convert"
            ) from None
        raise UserError(
            f"{path} is not a MATLAB v7.3 file ({_one_line(error)}). Download it again, then run: make convert"
        ) from None


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError(errno.EINVAL, "not a regular file")
        with open(path, "rb") as file:
            return file.read(520)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Check its permissions, then run: make convert"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


class Mat:
    """The labelled set in an open .mat: names, per-row facts, and readers for the fields asked for."""

    handle = -1

    def __init__(self, path: Path, fields: tuple[str, ...]) -> None:
        self.path, self.file = path, open_mat(path)
        try:
            self.handle = os.open(path, os.O_RDONLY)
            with self._refusing("it"):
                self._check_keys(fields)
                self.n_rows = self._check_shapes(fields)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.close()
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _refuse(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}. Download it again, then run: make convert")

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """One line for whatever h5py raises on a damaged file: nearly every type there is."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise self._refuse(f"{what} cannot be read ({_one_line(error)})") from None

    def _check_keys(self, fields: tuple[str, ...]) -> None:
        keys = [*(KEYS[f] for f in fields), *CELLS]
        missing = [k for k in keys if self.file.get(k, getlink=True) is None]
        if missing:
            v1 = self.file.get("images", getlink=True) and not self.file.get("instances", getlink=True)
            raise UserError(
                f"{self.path} has no {', '.join(missing)}: it is {'NYU Depth v1' if v1 else 'another file'}, "
                "not nyu_depth_v2_labeled.mat. Run: make convert MAT=/path/to/nyu_depth_v2_labeled.mat"
            )

    def _dataset(self, key: str) -> h5py.Dataset:
        """A dataset whose data is in this very file: nothing that leads to other files is followed."""
        hard = isinstance(self.file.get(key, getlink=True), h5py.HardLink)
        dset = self.file[key] if hard else None
        if not isinstance(dset, h5py.Dataset):
            raise self._refuse(f"{key} is {'a group' if hard else 'a link'}, expected a dataset")
        _check_stored_here(dset.id)
        return dset

    def _check_shapes(self, fields: tuple[str, ...]) -> int:
        """The number of rows, after checking that every field agrees on it, before memory is taken."""
        found = {}
        for name in fields:
            dset = self._dataset(KEYS[name])
            self._check_field(name, dset)
            found[KEYS[name]] = (dset.shape[0], dset.shape[-2:])
        if len(set(found.values())) != 1:
            raise self._refuse(f"its fields disagree on rows and picture size: {found}")
        count: int = next(iter(found.values()))[0]
        if not 1 <= count <= 1_000_000:
            raise self._refuse(f"it has {count} rows")
        return count

    def _check_field(self, name: str, dset: h5py.Dataset) -> None:
        """Type, shape and chunks within what the labelled set can be, and no larger than so small a file can hold."""
        key, kind = KEYS[name], np.dtype(KINDS[name])
        shape: tuple[int, ...] = dset.shape or ()
        if dset.dtype.newbyteorder("=") != kind:
            raise self._refuse(f"{key} is {dset.dtype}, expected {kind}")
        wanted = 4 if name == "rgb" else 3
        sides = all(8 <= s <= MAX_SIDE for s in shape[-2:])
        if len(shape) != wanted or (name == "rgb" and shape[1] != 3) or not sides:
            raise self._refuse(f"{key} has shape {shape}, expected (rows, {'3, ' if wanted == 4 else ''}640, 480)")
        n_bytes = os.fstat(self.handle).st_size
        if math.prod(shape) * kind.itemsize > n_bytes * MAX_DEFLATE:
            raise self._refuse(f"{key} claims shape {shape}, more than {n_bytes} bytes can hold")
        if not dset.chunks:
            return
        if math.prod(dset.chunks) * kind.itemsize > MAX_CHUNK_BYTES:
            raise self._refuse(f"{key} has chunks of {dset.chunks}, more than {MAX_CHUNK_BYTES >> 20} MiB each")
        grid = [-(-s // c) for s, c in zip(shape, dset.chunks, strict=True)]
        if math.prod(grid[1:]) > MAX_TILES or math.prod(grid) > n_bytes:
            raise self._refuse(f"{key} has {math.prod(grid)} chunks of {dset.chunks}")

    def strings(self, key: str) -> list[str]:
        """A cell array of strings: a (1, N) array of references to uint16 character codes."""
        with self._refusing(f"the text in {key}"):
            cell = self._dataset(key)
            if h5py.check_ref_dtype(cell.dtype) is not h5py.Reference or cell.size > max(self.n_rows, 65535):
                raise ValueError(f"{cell.dtype}{cell.shape} is not a cell array")
            return [self._string(ref) for ref in cell[()].ravel()]

    def _string(self, ref: Any) -> str:
        """One string, through h5py's low level: a file has 6,690 of them, and this is twice as fast."""
        dset = h5py.h5r.dereference(ref, self.file.id)
        if not isinstance(dset, h5py.h5d.DatasetID):
            raise ValueError("a reference leads to no dataset")
        _check_stored_here(dset)
        if h5py.h5a.exists(dset, b"MATLAB_empty"):
            return ""
        dtype, shape = dset.dtype, dset.shape
        if dtype.kind != "u" or dtype.itemsize != 2 or math.prod(shape) > 4096:
            raise ValueError(f"{dtype}{shape} is not character data")
        codes = np.zeros(shape, "<u2")
        dset.read(h5py.h5s.ALL, h5py.h5s.ALL, codes)
        text = codes.tobytes().decode("utf-16-le")
        if not text.isprintable():
            raise ValueError("control characters")
        return text

    def row_strings(self, key: str) -> list[str]:
        values = self.strings(key)
        if len(values) != self.n_rows:
            raise self._refuse(f"{key} has {len(values)} entries for {self.n_rows} rows")
        return values

    def accel(self) -> np.ndarray:
        """(N, 4) float32: roll, yaw, pitch, tilt; zeros where the file has none."""
        if self.file.get("accelData", getlink=True) is None:
            return np.zeros((self.n_rows, 4), "<f4")
        with self._refusing("accelData"):
            dset = self._dataset("accelData")
            if dset.shape != (4, self.n_rows) or dset.dtype.kind != "f":
                raise ValueError(f"{dset.dtype}{dset.shape}, expected float32 (4, {self.n_rows})")
            return np.ascontiguousarray(dset[()].T.astype("<f4"))

    def reader(self, name: str) -> "Reader":
        """A reader of `name`'s rows."""
        with self._refusing(KEYS[name]):
            return Reader(self.file[KEYS[name]], self.handle)


def _check_stored_here(dset: h5py.h5d.DatasetID) -> None:
    plist = dset.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise ValueError("its data lies in another file")


# ---------------------------------------------------------------- chunks


@dataclass
class ChunkIndex:
    """Where every chunk lies in the file, as arrays in grid order. `offset` -1 = never written (the fill value)."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    offset: np.ndarray
    n_bytes: np.ndarray
    filter_mask: np.ndarray
    grid: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.grid = tuple(-(-s // c) for s, c in zip(self.shape, self.chunk, strict=True))


def read_index(dset: h5py.Dataset) -> ChunkIndex:
    """One pass over the file's own chunk index (20 ms for 23,000 chunks; asking chunk by chunk takes 40 s)."""
    index = ChunkIndex(dset.shape, dset.chunks, *(np.empty(0, np.int64),) * 3)
    n_chunks = math.prod(index.grid)
    if n_chunks > 50_000_000:
        raise ValueError(f"{n_chunks} chunks")
    index.offset = np.full(n_chunks, -1, np.int64)
    index.n_bytes, index.filter_mask = np.zeros(n_chunks, np.int64), np.zeros(n_chunks, np.int64)

    def visit(info: Any) -> None:
        k = 0
        for start, c, g in zip(info.chunk_offset, index.chunk, index.grid, strict=True):
            k = k * g + start // c
        index.offset[k], index.n_bytes[k], index.filter_mask[k] = info.byte_offset, info.size, info.filter_mask

    dset.id.chunk_iter(visit)
    return index


class Reader:
    """Rows of one dataset, whatever its layout: each chunk is read and inflated exactly once.

    `group_rows` rows share their chunks and are decoded together by `read_group`, which threads may call at once.
    """

    def __init__(self, dset: h5py.Dataset, handle: int) -> None:
        self.dset, self.handle, self.lock = dset, handle, threading.Lock()
        self.shape, self.chunks, self.fillvalue = dset.shape, dset.chunks, dset.fillvalue
        self.dtype, self.row_shape, self.n_rows = dset.dtype, self.shape[1:], self.shape[0]
        self.row_bytes = math.prod(self.row_shape) * self.dtype.itemsize
        self.n_decoded = 0
        self.scratch: np.memmap | None = None
        self.index: ChunkIndex | None = None
        self.group_rows = self.chunks[0] if self.chunks else 1
        self._tiles = list(self._tiles_of_a_row())
        self.chunk_bytes = math.prod(self.chunks or ()) * self.dtype.itemsize
        if self.chunks:
            self._try_direct()

    def _tiles_of_a_row(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(begin, size) inside a row of every chunk of a group, in grid order."""
        if self.chunks:
            axes = [
                [(b, min(c, s - b)) for b in range(0, s, c)]
                for s, c in zip(self.row_shape, self.chunks[1:], strict=True)
            ]
            for tile in itertools.product(*axes):
                yield tuple(b for b, _ in tile), tuple(n for _, n in tile)

    def _try_direct(self) -> None:
        """Read the index if every filter is one that is undone here and the bytes are where it says."""
        plist = self.dset.id.get_create_plist()
        filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        allowed: tuple[list[int], ...] = (
            [],
            [h5py.h5z.FILTER_DEFLATE],
            [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE],
        )
        if filters not in allowed or plist.get_external_count():
            return
        self._filters = filters
        index = read_index(self.dset)
        base = self._base(index)
        if base is not None:
            index.offset[index.offset >= 0] += base
            self.index = index

    def _base(self, index: ChunkIndex) -> int | None:
        """What to add to offsets: HDF5 before 1.14.4 leaves the user block out. None: use h5py."""
        written = np.flatnonzero(index.offset >= 0)
        if not len(written):
            return 0
        first = int(written[0])
        start = tuple(int(g * c) for g, c in zip(np.unravel_index(first, index.grid), index.chunk, strict=True))
        if index.n_bytes[first] > MAX_CHUNK_BYTES:
            return None
        _, expected = self.dset.id.read_direct_chunk(start)
        for base in (0, self.dset.file.userblock_size):
            if os.pread(self.handle, len(expected), int(index.offset[first]) + base) == expected:
                return base
        return None

    @property
    def group_bytes(self) -> int:
        return self.group_rows * self.row_bytes

    def read_group(self, group: int) -> np.ndarray:
        """Rows [group * group_rows, ...) as an array (rows, ...) in native byte order."""
        start, stop = group * self.group_rows, min((group + 1) * self.group_rows, self.n_rows)
        if self.scratch is not None:
            return np.array(self.scratch[start:stop])
        if not self.chunks:
            with self.lock:
                return self._native(self.dset[start:stop])
        out = np.empty((stop - start, *self.row_shape), self.dtype.newbyteorder("="))
        self._decode_group(group, out)
        return out

    def _decode_group(self, group: int, out: np.ndarray) -> None:
        """Decode every chunk of a group of rows into `out`, cropping the padding of edge chunks."""
        n_rows, n_tiles = len(out), len(self._tiles)
        with self.lock:
            self.n_decoded += n_tiles
        stored = None if self.index is None else self._read_stored(group * n_tiles, n_tiles)
        for t, (begin, size) in enumerate(self._tiles):
            where = (slice(0, n_rows), *(slice(b, b + n) for b, n in zip(begin, size, strict=True)))
            if stored is None:
                first = group * self.group_rows
                with self.lock:
                    out[where] = self.dset[(slice(first, first + n_rows), *where[1:])]
            elif (data := stored[t]) is None:
                out[where] = self.fillvalue
            else:
                chunk = self._unfilter(data, int(self.index.filter_mask[group * n_tiles + t]))  # type: ignore[union-attr]
                out[where] = chunk[(slice(0, n_rows), *(slice(0, n) for n in size))]

    def _read_stored(self, first: int, n: int) -> list[memoryview | None]:
        """The stored bytes of chunks first .. first + n, in one read where they lie together. None: never written."""
        assert self.index is not None
        offsets, sizes = self.index.offset[first : first + n], self.index.n_bytes[first : first + n]
        if sizes.max() > 2 * self.chunk_bytes + 4096:
            raise ValueError(f"a chunk claims {sizes.max()} compressed bytes for {self.chunk_bytes}")
        written = offsets >= 0
        low = int(offsets[written].min()) if written.any() else 0
        high = int((offsets + sizes)[written].max()) if written.any() else 0
        if high - low <= 2 * int(sizes.sum()):
            block = memoryview(self._pread(high - low, low))
            parts = zip((offsets - low).tolist(), sizes.tolist(), strict=True)
            return [block[o : o + s] if w else None for (o, s), w in zip(parts, written, strict=True)]
        pairs = zip(offsets.tolist(), sizes.tolist(), strict=True)
        return [memoryview(self._pread(s, o)) if o >= 0 else None for o, s in pairs]

    def _pread(self, n_bytes: int, offset: int) -> bytes:
        data = os.pread(self.handle, n_bytes, offset)
        if len(data) != n_bytes:
            raise ValueError("the file ends inside a chunk")
        return data

    def _unfilter(self, data: Any, mask: int) -> np.ndarray:
        """Undo the filters of one stored chunk, last one first, except those its mask says were skipped."""
        for i in reversed(range(len(self._filters))):
            if mask >> i & 1:
                continue
            if self._filters[i] == h5py.h5z.FILTER_DEFLATE:
                data = inflate(data, self.chunk_bytes)
            else:
                data = np.frombuffer(data, np.uint8).reshape(self.dtype.itemsize, -1).T.tobytes()
        if len(data) != self.chunk_bytes:
            raise ValueError(f"a chunk holds {len(data)} bytes, expected {self.chunk_bytes}")
        return np.frombuffer(data, self.dtype).reshape(self.chunks)

    @staticmethod
    def _native(array: np.ndarray) -> np.ndarray:
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def needs_scratch(self) -> bool:
        """Whether the rows that share chunks are too many to hold at once."""
        return self.group_bytes > MAX_GROUP_BYTES

    def fill_scratch(self, path: Path) -> None:
        """Decode every chunk once, into a scratch file of whole rows; later reads come from there."""
        scratch = np.memmap(path, self.dtype.newbyteorder("="), "w+", shape=self.shape)
        path.unlink()  # the mapping keeps it; nothing is left behind, whatever happens
        for group in range(-(-self.n_rows // self.group_rows)):
            self._decode_group(group, scratch[group * self.group_rows : (group + 1) * self.group_rows])
        self.scratch, self.group_rows = scratch, 1
