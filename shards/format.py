"""The contract on disk: names, dtypes, the manifest, opening and checking a finished set.

A leaf: stdlib and numpy (and zarr where a compressed store is decoded), imported by `convert` and by `train`.

    ROOT/nyuv2-224-1f3a9c20/  ROOT/nyuv2-224-1f3a9c20.zarr/
      rgb-00000.npy ...         rgb/zarr.json, rgb/c/0/0/0/0 ...  one file a field a shard, rows in .mat order
      rows-scene.npy ...        rows-scene/c/0 ...                one value a row
      manifest.json             written last: its presence is the commit
      provenance.json           how it was made; not part of the set's identity
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from shards.errors import UserError, one_line, shown  # noqa: F401

try:
    from fcntl import F_FULLFSYNC, fcntl  # type: ignore[attr-defined]
except ImportError:  # anything but macOS
    F_FULLFSYNC = None

FORMAT_VERSION = 1
RESIZE_VERSION = 2
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
NOT_CONTENT = (
    r"manifest\.json|provenance\.json|receipt-\d+\.json"  # receipts: a kill just after the commit
)
NPY_HEADER = 128  # bytes
MAX_DEPTH_MM = 32767
VOID = -100

FIELDS: dict[str, dict[str, Any]] = {
    "rgb": {"dtype": "|u1", "planes": (3,), "unit": "grey level 0..255", "invalid": None},
    "depth": {"dtype": "<u2", "planes": (), "unit": "millimetre", "invalid": 0},
    "raw_depth": {"dtype": "<u2", "planes": (), "unit": "millimetre", "invalid": 0},
    "label": {"dtype": "<u2", "planes": (), "unit": "class id 1..894", "invalid": 0},
    "instance": {"dtype": "|u1", "planes": (), "unit": "number within its class", "invalid": 0},
}
COLUMNS = {  # "S": text, as long as the longest
    "split": "|u1", "scene": "<u4", "scene_type": "<u2", "accel": "(4,)<f4", "raw_rgb": "S", "raw_depth": "S",
}  # fmt: skip
TABLES = {  # of names, and of the classes' numbers among fewer
    "scenes": str, "scene_types": str, "classes": str, "classes40": str, "classes13": str, "to40": int, "to13": int,
}  # fmt: skip
SPLITS = ("train", "test")
# top, bottom, left, right in the 640x480 picture
CROP_BOXES = {
    "none": (0, 480, 0, 640),
    "border": (6, 473, 7, 632),
    "eigen": (45, 471, 41, 601),
}
DEPTH_RESIZES = ("nearest", "area")
AXES = ("auto", "wh", "hw")
MEND = "Run: make convert ARGS=--repair, or make pull"
Codecs = dict[str, str] | None  # the codec of each field of a Zarr set; None for .npy
DIRECTORY_NAME = re.compile(r"nyuv2-\d+-[0-9a-f]{8}(\.zarr)?")


def is_whole(value: Any) -> bool:
    """A whole number of Python's or numpy's, which True is not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def mebibytes(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**20:.0f} MiB"


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Settings:
    """What a set contains. Other settings are another directory, never a mixture."""

    fields: tuple[str, ...] = tuple(FIELDS)
    size: int = 224
    crop: str = "none"
    depth_resize: str = "nearest"
    rows_per_shard: int = 128
    axes: str = (
        "auto"  # wh | hw where pictures are square; left out of the fingerprint where they are not
    )

    def __post_init__(self) -> None:
        if not isinstance(self.fields, tuple | list) or not self._are_fields(list(self.fields)):
            given = (
                ",".join(map(str, self.fields))
                if isinstance(self.fields, tuple | list)
                else repr(self.fields)
            )
            raise UserError(f"--fields {shown(given)}: choose from {','.join(FIELDS)}, each once")
        object.__setattr__(self, "fields", tuple(f for f in FIELDS if f in self.fields))
        for name, low, high in (("size", 8, 480), ("rows_per_shard", 1, 100_000)):
            value = getattr(self, name)
            if not is_whole(value) or not low <= value <= high:
                raise UserError(
                    f"--{name.replace('_', '-')} {shown(value)}: choose {low} to {high}"
                )
            object.__setattr__(self, name, int(value))
        for name, choices in (
            ("crop", tuple(CROP_BOXES)),
            ("depth_resize", DEPTH_RESIZES),
            ("axes", AXES),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise UserError(
                    f"--{name.replace('_', '-')} {shown(value)}: choose one of {', '.join(choices)}"
                )

    @staticmethod
    def _are_fields(names: list[Any]) -> bool:
        known = [name for name in names if isinstance(name, str) and name in FIELDS]
        return 0 < len(names) == len(set(known))

    def fits(self, stored: "Settings") -> bool:
        """Whether a set of these is what is asked for; `axes` were left out of it where the pictures told them."""
        return stored in (self, replace(self, axes="auto"))

    def to_dict(self) -> dict[str, Any]:
        """For the manifest and the fingerprint; what came after the first sets is left out at its default."""
        values = {**asdict(self), "fields": list(self.fields)}
        if self.axes == "auto":
            del values["axes"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Raises TypeError where one is unknown."""
        return cls(**{**values, "fields": tuple(values["fields"])})


def row_shape(field: str, size: int) -> tuple[int, ...]:
    """The shape of one stored row: (3, S, S) for rgb, (S, S) for the rest."""
    return (*FIELDS[field]["planes"], size, size)


def row_bytes(names: Iterable[str], size: int) -> int:
    """Of one stored row of these fields."""
    return sum(math.prod(row_shape(f, size)) * np.dtype(FIELDS[f]["dtype"]).itemsize for f in names)


def fingerprint(settings: Settings, source: dict[str, Any]) -> str:
    """SHA-256 over everything that decides the content; the container and the codec do not."""
    identity = {key: source[key] for key in ("bytes", "sampled_sha256")}
    content = {
        "format": FORMAT_VERSION,
        "resize": RESIZE_VERSION,
        "settings": settings.to_dict(),
        "source": identity,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def directory_name(settings: Settings, digest: str, zarr: bool = False) -> str:
    return f"nyuv2-{settings.size}-{digest[:8]}{'.zarr' if zarr else ''}"


def shard_name(field: str, shard: int, zarr: bool = False) -> str:
    return (
        f"{field}/c/{shard}" + "/0" * len(row_shape(field, 0))
        if zarr
        else f"{field}-{shard:05d}.npy"
    )


def column_name(name: str, zarr: bool = False) -> str:
    more = "/0" if COLUMNS[name][0] in "S(" else ""  # several bytes or numbers a row
    return f"rows-{name}/c/0{more}" if zarr else f"rows-{name}.npy"


class HashingFile(io.BufferedWriter):
    """A new file that hashes what passes through it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return super().write(data)


def fsync_dir(path: Path) -> None:
    """Make a rename in `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot
        fsync(handle)
    os.close(handle)


def fsync(handle: int) -> None:
    """Have what was written outlive a loss of power; on macOS plain fsync leaves it in the disk's own cache."""
    if F_FULLFSYNC is not None:
        with suppress(OSError):  # a file system that has none
            fcntl(handle, F_FULLFSYNC)
            return
    os.fsync(handle)


def write_atomically(
    path: Path, write: Callable[[HashingFile], object], *, keep_same: bool = False
) -> dict[str, Any]:
    """Write under a temporary name, fsync, rename; `keep_same`: not over a file that holds these very bytes already."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with HashingFile(temporary) as file:
            write(file)
            file.flush()
            fsync(file.fileno())
            facts = {"bytes": file.tell(), "sha256": file.sha256.hexdigest()}
        if not keep_same or what_is_wrong(path, facts):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return facts


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first NPY_HEADER bytes of every .npy here, as numpy writes them."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(map(int, shape))}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(NPY_HEADER - 11).encode() + b"\n"


def npy_parts(array: np.ndarray) -> tuple[Any, ...]:
    return npy_header(array.dtype.str, array.shape), raw(array)


def raw(array: np.ndarray) -> Any:
    """Its bytes, not copied where it is C-contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


def write_bytes(path: Path, *parts: Any) -> dict[str, Any]:
    return write_atomically(path, lambda file: [file.write(part) for part in parts], keep_same=True)


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    return write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """The commit."""
    write_bytes(
        directory / MANIFEST, _signed(json.dumps(manifest, indent=2, sort_keys=True)[:-2]).encode()
    )


def _signed(body: str) -> str:
    """A JSON object without its end -> with a last key, the SHA-256 of the object without that key."""
    digest = hashlib.sha256(f"{body}\n}}".encode()).hexdigest()
    return f'{body},\n  "sha256": "{digest}"\n}}\n'


def open_plain(path: Path) -> IO[bytes]:
    """Open a regular file to read: no symbolic link is followed, no pipe is waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        known = {errno.ENOENT: "is missing", errno.ELOOP: "is not a plain file"}  # a link
        what = known.get(error.errno or 0, f"cannot be read ({error.strerror})")
        raise UserError(f"{path} {what}. {MEND}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is not a plain file. {MEND}")
    return open(handle, "rb", buffering=0)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished set: every byte of it checked, and everything that readers rely on."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        done = len(list(directory.glob("receipt-*.json")))
        state = (
            f"the conversion did not finish ({done} shards are done)"
            if done
            else "it is not a finished set"
        )
        raise UserError(f"no {MANIFEST} in {directory}: {state}. Run: make convert")
    with open_plain(path) as file:
        data = file.read()
    try:
        text = data.decode()
        if text != _signed(text.rpartition(',\n  "sha256": ')[0]):
            raise ValueError("its SHA-256 does not match its content")
        manifest: dict[str, Any] = json.loads(text)
        del manifest["sha256"]
        _check_manifest(manifest)
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}. {MEND}") from None
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise where what readers rely on is not as in a set: whoever signs a manifest may write anything into it."""
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"format version {manifest['format_version']}, this program reads {FORMAT_VERSION}"
        )
    source, n_rows, tables, files = (
        manifest["source"],
        manifest["rows"],
        manifest["names"],
        all_files(manifest),
    )
    typed = [
        (source["name"], str),
        (source["sampled_sha256"], str),
        (source["bytes"], int),
        (n_rows, int),
    ]
    typed += [(tables[key], list) for key in TABLES] + [
        (x, kind) for key, kind in TABLES.items() for x in tables[key]
    ]
    typed += [
        (facts[key], kind)
        for facts in files.values()
        for key, kind in (("bytes", int), ("sha256", str))
    ]
    if any(type(value) is not kind for value, kind in typed):
        raise ValueError("a value has the wrong type")
    settings, shards, zarr = (
        Settings.from_dict(manifest["settings"]),
        manifest["shards"],
        "codecs" in manifest,
    )
    if manifest["fingerprint"] != fingerprint(settings, source):
        raise ValueError("its fingerprint is not that of its settings and source")
    step = settings.rows_per_shard
    rows = [[k * step, min((k + 1) * step, n_rows)] for k in range(len(shards))]
    if not 0 < len(shards) == -(-n_rows // step) or [shard["rows"] for shard in shards] != rows:
        raise ValueError(f"it has {n_rows} rows in {len(shards)} shards")
    fields = set(settings.fields)
    names = {shard_name(field, k, zarr) for field in fields for k in range(len(shards))}
    names |= {column_name(name, zarr) for name in COLUMNS}
    if zarr:
        names |= {
            "zarr.json",
            *(f"{array}/zarr.json" for array in (*fields, *(f"rows-{name}" for name in COLUMNS))),
        }
    found = (
        files.keys(),
        manifest["fields"].keys(),
        manifest.get("codecs", manifest["fields"]).keys(),
    )
    if found != (names, fields, fields):
        raise ValueError("its fields or files are not those of a set, or outside the set")


def all_files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every file of the set -> {"bytes", "sha256"}."""
    parts = [
        manifest["columns"],
        manifest.get("metadata", {}),
        *(shard["files"] for shard in manifest["shards"]),
    ]
    return {name: facts for files in parts for name, facts in files.items()}


def check_file(path: Path, n_bytes: int, header: bytes = b"") -> None:
    """Size and first bytes: 15 us a file, no data read."""
    with open_plain(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != n_bytes:
            raise UserError(
                f"{path} has {found} bytes, the manifest says {n_bytes}: the copy is incomplete. {MEND}"
            )
        if file.read(len(header)) != header:
            raise UserError(f"{path} is damaged (its header is not the manifest's). {MEND}")


def map_npy(path: Path, *, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map a .npy read-only after checking that its header and size are what the manifest says."""
    header = npy_header(dtype, shape)
    check_file(path, len(header) + math.prod(shape) * np.dtype(dtype).itemsize, header)
    return np.memmap(path, dtype=dtype, mode="r", offset=len(header), shape=tuple(shape))


@cache
def shard_index(n_rows: int, row_bytes: int, n_slots: int) -> bytes:
    """The end of an uncompressed Zarr shard: (offset, bytes) a row, ones where there is no row, their CRC32C."""
    index = np.full((n_slots, 2), 2**64 - 1, "<u8")
    index[:n_rows, 0], index[:n_rows, 1] = np.arange(n_rows) * row_bytes, row_bytes
    return index.tobytes() + crc32c(index.tobytes())


def crc32c(data: bytes) -> bytes:
    """The Castagnoli CRC, little-endian, as Zarr puts it behind a shard's index."""
    table, crc = np.arange(256), 0xFFFFFFFF
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * 0x82F63B78
    steps: list[int] = table.tolist()
    for byte in data:
        crc = steps[(crc ^ byte) & 0xFF] ^ crc >> 8
    return (crc ^ 0xFFFFFFFF).to_bytes(4, "little")


def map_zarr(path: Path, *, dtype: str, shape: tuple[int, ...], n_slots: int) -> np.ndarray:
    """Memory-map an uncompressed Zarr shard after checking that its index has the rows back to back from byte 0."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    expected = shard_index(shape[0], n_bytes // shape[0], n_slots)
    with open_plain(path) as file:
        offset = file.seek(max(0, os.fstat(file.fileno()).st_size - len(expected)))
        found = file.read()
    if (offset, found) != (n_bytes, expected):
        whole = crc32c(found[:-4]) == found[-4:]
        problem = (
            "does not hold its rows back to back: it cannot be mapped"
            if whole
            else "has a damaged shard index"
        )
        raise UserError(f"{path} {problem}. {MEND}")
    return np.memmap(path, dtype=dtype, mode="r", shape=tuple(shape))


@dataclass(frozen=True)
class ShardSet:
    """A finished set: where it is and what its manifest says. Arrays are mapped on request."""

    path: Path
    manifest: dict[str, Any]
    settings: Settings
    n_rows: int
    codecs: Codecs

    def check_has(self, field: str) -> None:
        if field not in (have := self.settings.fields):
            hint = f"make convert ARGS='--fields {','.join((*have, field))}'"
            raise UserError(f"{self.path} has no field {field}. Run: {hint}")

    def shards(self, field: str) -> list[np.ndarray]:
        """The field's shards in row order: read-only memory maps, or, where compressed, decoded into memory."""
        self.check_has(field)
        return [self.shard(field, k) for k in range(len(self.manifest["shards"]))]

    def shard(self, field: str, k: int) -> np.ndarray:
        start, stop = self.manifest["shards"][k]["rows"]
        dtype, shape = FIELDS[field]["dtype"], (stop - start, *row_shape(field, self.settings.size))
        path = self.path / shard_name(field, k, self.codecs is not None)
        if self.codecs is None:
            return map_npy(path, dtype=dtype, shape=shape)
        if self.codecs[field] == "none":
            return map_zarr(path, dtype=dtype, shape=shape, n_slots=self.settings.rows_per_shard)
        from zarr import open_array

        try:
            return np.asarray(open_array(self.path / field, mode="r")[start:stop])
        except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
            raise UserError(f"{self.path / field} is damaged ({error}). {MEND}") from None

    def column(self, name: str) -> np.ndarray:
        """One value a row, e.g. "split", "scene", "scene_type", "accel"; hashed, and in range for its names."""
        file, tables = column_name(name, self.codecs is not None), self.manifest["names"]
        with open_plain(self.path / file) as opened:
            data = opened.read()
        body = data if self.codecs else data[NPY_HEADER:]
        n_bytes, rest = divmod(len(body), self.n_rows)
        dtype = np.dtype(f"S{n_bytes}" if COLUMNS[name] == "S" else COLUMNS[name])
        right = hashlib.sha256(data).hexdigest() == all_files(self.manifest)[file]["sha256"]
        right = right and rest == 0 < n_bytes == dtype.itemsize
        names = {
            "split": SPLITS,
            "scene": tables["scenes"],
            "scene_type": tables["scene_types"],
        }.get(name)
        if not right or (names is not None and np.frombuffer(body, dtype).max() >= len(names)):
            raise UserError(f"{self.path / file} is damaged. {MEND}")
        return np.frombuffer(body, dtype)


def open_set(path: str | Path) -> ShardSet:
    """Open a finished set after checking the size of every file and the header of every shard; no data is read."""
    path, manifest = Path(path), read_manifest(Path(path))
    found = ShardSet(
        path,
        manifest,
        Settings.from_dict(manifest["settings"]),
        manifest["rows"],
        manifest.get("codecs"),
    )
    for name, facts in all_files(manifest).items():
        if "/" in name and (path / name).parent.resolve() != (path.resolve() / name).parent:
            raise UserError(f"{path / name} lies behind a symbolic link. {MEND}")
        check_file(path / name, facts["bytes"])
    for field in found.settings.fields:
        if found.codecs is None or found.codecs[field] == "none":
            found.shards(field)  # checks each header, or each index of a Zarr store
    return found


def finished_sets(root: Path) -> list[Path]:
    """The finished sets directly under `root`, by name."""
    there = root.iterdir() if root.is_dir() else ()
    return sorted(p for p in there if DIRECTORY_NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def resolve_set(path: str | Path) -> Path:
    """A finished set, or the only one under a ROOT. More than one is an error that lists them."""
    path = Path(path)
    if (path / MANIFEST).is_file() or DIRECTORY_NAME.fullmatch(path.name):
        return path
    there = finished_sets(path)
    found = [
        p for p in there if p.suffix != ".zarr" or p.with_suffix("") not in there
    ]  # the same rows, unpacked
    if not found:
        is_source, quoted = path.suffix in (".mat", ".h5", ".hdf5"), shlex.quote(str(path))
        how = f"python -m convert run {quoted} --out data" if is_source else "make convert"
        raise UserError(f"{path} is not a finished set, nor is one in it. Run: {how}")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise UserError(
            f"{len(found)} sets under {path}: {names}. Use {found[0]} (with make: DATA={found[0]})"
        )
    return found[0]


def sha256_file(path: Path) -> str:
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def verify(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Check every byte: yields (file, None) or (file, what is wrong), then foreign files as wrong too."""
    files = all_files(read_manifest(directory))
    for name, facts in sorted(files.items()):
        yield name, what_is_wrong(directory / name, facts)
    directories = {str(parent) for name in files for parent in Path(name).parents}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        known = name in files or (name in directories and not path.is_symlink())
        if not known and not re.fullmatch(NOT_CONTENT, name):
            yield name, "is not part of the set"


def what_is_wrong(path: Path, facts: dict[str, Any]) -> str | None:
    """None where the file's every byte is right."""
    try:
        check_file(path, facts["bytes"])
        same = sha256_file(path) == facts["sha256"]
        return None if same else "has other content than the manifest says (SHA-256)"
    except (UserError, OSError) as error:
        return str(error).removeprefix(f"{path} ").partition(". Run:")[0]
