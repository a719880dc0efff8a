"""The contract on disk: names, dtypes, the manifest, opening and checking a finished set.

A leaf: stdlib and numpy (and zarr where a compressed store is decoded), imported by `convert` and by `train`.

    ROOT/nyuv2-224-1f3a9c20/  ROOT/nyuv2-224-1f3a9c20.zarr/
      rgb-00000.npy ...         rgb/zarr.json, rgb/c/0/0/0/0 ...  one file a field a shard, rows in .mat order
      rows-scene.npy ...        rows-scene/c/0 ...                one value a row
      manifest.json             written last: its presence is the commit
      provenance.json           how it was made; not part of the set's identity
"""

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

FORMAT_VERSION = 1
RESIZE_VERSION = 2
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
NOT_CONTENT = r"manifest\.json|provenance\.json|receipt-\d+\.json"  # receipts: a kill just after the commit
MAX_DEPTH_MM = 32767
VOID = -100

FIELDS: dict[str, dict[str, Any]] = {
    "rgb": {"dtype": "|u1", "planes": 3, "unit": "grey level 0..255", "invalid": None},
    "depth": {"dtype": "<u2", "planes": 0, "unit": "millimetre", "invalid": 0},
    "raw_depth": {"dtype": "<u2", "planes": 0, "unit": "millimetre", "invalid": 0},
    "label": {"dtype": "<u2", "planes": 0, "unit": "class id 1..894", "invalid": 0},
    "instance": {"dtype": "|u1", "planes": 0, "unit": "number within its class", "invalid": 0},
}
COLUMNS = {"split": "|u1", "scene": "<u4", "scene_type": "<u2", "accel": "<f4", "raw_rgb": "S", "raw_depth": "S"}
NAME_TABLES = {"scenes": [str], "scene_types": [str], "classes": [str], "classes40": [str], "classes13": [str]}
MANIFEST_TYPES: dict[str, Any] = {
    "rows": int,
    "source": {"name": str, "bytes": int, "sampled_sha256": str},
    "names": {**NAME_TABLES, "to40": [int], "to13": [int]},
    "shards": [{"files": dict}],
    "files": [{"bytes": int, "sha256": str}],  # of the shards, the columns and the metadata
}
CROPS = ("none", "border", "eigen")
DEPTH_RESIZES = ("nearest", "area")
SPLITS = ("train", "test")
MEND = "Run: make convert ARGS=--repair, or make pull"
Codecs = dict[str, str] | None  # the codec of each field of a Zarr set; None for .npy
DIRECTORY_NAME = re.compile(r"nyuv2-\d+-[0-9a-f]{8}(\.zarr)?")


class UserError(Exception):
    """A user's mistake or a broken input: one line that ends in the next command to type (exit status 2)."""


@dataclass(frozen=True)
class Settings:
    """What a set contains. Other settings are another directory, never a mixture."""

    fields: tuple[str, ...] = tuple(FIELDS)
    size: int = 224
    crop: str = "none"
    depth_resize: str = "nearest"
    rows_per_shard: int = 128

    def __post_init__(self) -> None:
        unknown = sorted(set(self.fields) - set(FIELDS))
        if unknown or not self.fields or len(set(self.fields)) != len(self.fields):
            raise UserError(f"--fields {','.join(self.fields)}: choose one or more of {','.join(FIELDS)}, each once")
        for name, low, high in (("size", 8, 480), ("rows_per_shard", 1, 100_000)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: choose {low} to {high}")
        for name, choices in (("crop", CROPS), ("depth_resize", DEPTH_RESIZES)):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: choose one of {', '.join(choices)}")
        object.__setattr__(self, "fields", tuple(f for f in FIELDS if f in self.fields))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fields": list(self.fields)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Raises TypeError where one is unknown."""
        return cls(**{**values, "fields": tuple(values["fields"])})


def row_shape(field: str, size: int) -> tuple[int, ...]:
    """The shape of one stored row: (3, S, S) for rgb, (S, S) for the rest."""
    planes = FIELDS[field]["planes"]
    return (planes, size, size) if planes else (size, size)


def row_bytes(names: Iterable[str], size: int) -> int:
    """Of one stored row of these fields."""
    return sum(int(np.prod(row_shape(f, size))) * np.dtype(FIELDS[f]["dtype"]).itemsize for f in names)


def fingerprint(settings: Settings, source: dict[str, Any]) -> str:
    """SHA-256 over everything that decides the content; the container and the codec do not."""
    content = {
        "format": FORMAT_VERSION,
        "resize": RESIZE_VERSION,
        "settings": settings.to_dict(),
        "source": {"bytes": source["bytes"], "sampled_sha256": source["sampled_sha256"]},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def directory_name(settings: Settings, digest: str, zarr: bool = False) -> str:
    return f"nyuv2-{settings.size}-{digest[:8]}{'.zarr' if zarr else ''}"


def shard_name(field: str, shard: int, zarr: bool = False) -> str:
    return f"{field}/c/{shard}" + "/0" * len(row_shape(field, 0)) if zarr else f"{field}-{shard:05d}.npy"


def column_name(name: str, zarr: bool = False) -> str:
    more = "/0" if COLUMNS[name] in ("S", "<f4") else ""  # several bytes or numbers a row
    return f"rows-{name}/c/0{more}" if zarr else f"rows-{name}.npy"


# ---------------------------------------------------------------- writing one file


class HashingFile:
    """A file that hashes and counts what passes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.n_bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.n_bytes += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def fsync_dir(path: Path) -> None:
    """Make a rename in `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[HashingFile], object], *, keep_same: bool = False) -> dict[str, Any]:
    """Write under a temporary name, fsync, rename. Returns {"bytes", "sha256"} of what was written.

    With `keep_same` a file that holds these very bytes already is left untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            hashing = HashingFile(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        facts = {"bytes": hashing.n_bytes, "sha256": hashing.sha256.hexdigest()}
        if not keep_same or what_is_wrong(path, facts):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return facts


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The first 128 bytes of every .npy here, as numpy writes them."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(map(int, shape))}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"


def write_npy(path: Path, array: np.ndarray) -> dict[str, Any]:
    return write_bytes(path, npy_header(array.dtype.str, array.shape), raw(array))


def raw(array: np.ndarray) -> Any:
    """Its bytes, not copied where it is C-contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


def write_bytes(path: Path, *parts: Any) -> dict[str, Any]:
    return write_atomically(path, lambda file: [file.write(part) for part in parts], keep_same=True)


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    return write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """The commit."""
    write_bytes(directory / MANIFEST, _signed(json.dumps(manifest, indent=2, sort_keys=True)[:-2]).encode())


def _signed(body: str) -> str:
    """A JSON object without its end -> with a last key, the SHA-256 of the object without that key."""
    digest = hashlib.sha256(f"{body}\n}}".encode()).hexdigest()
    return f'{body},\n  "sha256": "{digest}"\n}}\n'


# ---------------------------------------------------------------- opening


def open_plain(path: Path) -> IO[bytes]:
    """Open a regular file to read: no symbolic link is followed, no pipe is waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UserError(f"{path} is missing. {MEND}") from None
    except OSError as error:
        what = "is not a plain file" if path.is_symlink() else f"cannot be read ({error.strerror})"
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
        state = f"the conversion did not finish ({done} shards are done)" if done else "it is not a finished set"
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


def _like(value: Any, kind: Any) -> bool:
    """Whether a JSON value has these types; a list's one item stands for all of its items."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_like(value[key], inner) for key, inner in kind.items())
    if isinstance(kind, list):
        return isinstance(value, list) and all(_like(item, kind[0]) for item in value)
    return type(value) is kind


def _check_manifest(manifest: dict[str, Any]) -> None:
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {manifest['format_version']}, this program reads {FORMAT_VERSION}")
    if not _like({**manifest, "files": [*all_files(manifest).values()]}, MANIFEST_TYPES):
        raise ValueError("a value has the wrong type")
    settings, n_rows = Settings.from_dict(manifest["settings"]), manifest["rows"]
    if manifest["fingerprint"] != fingerprint(settings, manifest["source"]):
        raise ValueError("its fingerprint is not that of its settings and source")
    starts = range(0, n_rows, settings.rows_per_shard)
    if n_rows < 1 or len(manifest["shards"]) != len(starts):
        raise ValueError(f"it has {n_rows} rows in {len(manifest['shards'])} shards")
    zarr, names = manifest["container"] == "zarr", set(settings.fields)
    for k, (start, shard) in enumerate(zip(starts, manifest["shards"], strict=True)):
        rows, files = [start, min(start + starts.step, n_rows)], {shard_name(f, k, zarr) for f in names}
        if (shard["rows"], set(shard["files"])) != (rows, files):
            raise ValueError(f"shard {k} is not that of its rows and fields, or outside the set")
    found = [set(manifest.get(key, ())) for key in ("fields", "columns", "metadata", "codecs")]
    metadata = {f"{array}/zarr.json" for array in (*names, *(f"rows-{name}" for name in COLUMNS))} | {"zarr.json"}
    only_zarr = [metadata, names] if zarr else [set(), set()]
    if found != [names, {column_name(name, zarr) for name in COLUMNS}, *only_zarr]:
        raise ValueError("its fields or columns are not those of a set, or outside the set")


def all_files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every file of the set -> {"bytes", "sha256"}."""
    parts = [manifest["columns"], manifest.get("metadata", {}), *(shard["files"] for shard in manifest["shards"])]
    return {name: facts for files in parts for name, facts in files.items()}


def check_file(path: Path, n_bytes: int, header: bytes = b"") -> None:
    """Size and first bytes: 15 us a file, no data read."""
    with open_plain(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found != n_bytes:
            raise UserError(f"{path} has {found} bytes, the manifest says {n_bytes}: the copy is incomplete. {MEND}")
        if file.read(len(header)) != header:
            raise UserError(f"{path} is damaged (its header is not the manifest's). {MEND}")


def map_npy(path: Path, *, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map a .npy read-only after checking that its header and size are what the manifest says."""
    header = npy_header(dtype, shape)
    check_file(path, len(header) + int(np.prod(shape)) * np.dtype(dtype).itemsize, header)
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
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    expected = shard_index(shape[0], n_bytes // shape[0], n_slots)
    with open_plain(path) as file:
        offset = file.seek(max(0, os.fstat(file.fileno()).st_size - len(expected)))
        found = file.read()
    if (offset, found) != (n_bytes, expected):
        whole = crc32c(found[:-4]) == found[-4:]
        problem = "does not hold its rows back to back: it cannot be mapped" if whole else "has a damaged shard index"
        raise UserError(f"{path} {problem}. {MEND}")
    return np.memmap(path, dtype=dtype, mode="r", shape=tuple(shape))


def decode_zarr(path: Path, start: int, stop: int) -> np.ndarray:
    """Rows start..stop of a compressed array, in memory."""
    from zarr import open_array

    try:
        return np.asarray(open_array(path, mode="r")[start:stop])
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}). {MEND}") from None


@dataclass(frozen=True)
class ShardSet:
    """A finished set: where it is and what its manifest says. Arrays are mapped on request."""

    path: Path
    manifest: dict[str, Any]

    @property
    def n_rows(self) -> int:
        return int(self.manifest["rows"])

    @property
    def size(self) -> int:
        return int(self.manifest["settings"]["size"])

    @property
    def codecs(self) -> Codecs:
        return self.manifest.get("codecs")

    def shards(self, field: str) -> list[np.ndarray]:
        """The field's shards in row order: read-only memory maps, or, where compressed, decoded into memory."""
        if field not in self.manifest["fields"]:
            have = ", ".join(self.manifest["fields"])
            raise UserError(
                f"{self.path} has no field {field} (it has {have}). Run: make convert ARGS='--fields {field},...'"
            )
        return [self.shard(field, k) for k in range(len(self.manifest["shards"]))]

    def shard(self, field: str, k: int) -> np.ndarray:
        start, stop = self.manifest["shards"][k]["rows"]
        dtype, shape = FIELDS[field]["dtype"], (stop - start, *row_shape(field, self.size))
        path = self.path / shard_name(field, k, self.codecs is not None)
        if self.codecs is None:
            return map_npy(path, dtype=dtype, shape=shape)
        if self.codecs[field] == "none":
            return map_zarr(path, dtype=dtype, shape=shape, n_slots=self.manifest["settings"]["rows_per_shard"])
        return decode_zarr(self.path / field, start, stop)

    def column(self, name: str) -> np.ndarray:
        """One value a row, e.g. "split", "scene", "scene_type", "accel"; hashed, and in range for its names."""
        file = column_name(name, self.codecs is not None)
        try:
            with open_plain(self.path / file) as opened:
                data = opened.read()
            if hashlib.sha256(data).hexdigest() != self.manifest["columns"][file]["sha256"]:
                raise ValueError("SHA-256")
            dtype = {"S": f"S{len(data) // self.n_rows}", "<f4": "(4,)<f4"}.get(COLUMNS[name], COLUMNS[name])
            npy = self.codecs is None
            values: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False) if npy else np.frombuffer(data, dtype)
            tables = self.manifest["names"]
            names = {"split": SPLITS, "scene": tables["scenes"]}.get(name, tables["scene_types"])
            if values.dtype.kind != np.dtype(COLUMNS[name]).kind or len(values) != self.n_rows:
                raise ValueError(f"{values.dtype}{values.shape}")
            if values.dtype.kind == "u" and values.max() >= len(names):
                raise ValueError(f"{values.max()} is beyond the names")
            return values
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{self.path / file} is damaged ({error}). {MEND}") from None


def open_set(path: str | Path) -> ShardSet:
    """Open a finished set after checking the size of every file and the header of every shard; no data is read."""
    found = ShardSet(Path(path), read_manifest(Path(path)))
    root = found.path.resolve()
    for name, facts in all_files(found.manifest).items():
        if "/" in name and (found.path / name).parent.resolve() != (root / name).parent:
            raise UserError(f"{found.path / name} lies behind a symbolic link. {MEND}")
        check_file(found.path / name, facts["bytes"])
    for field in found.manifest["fields"]:
        if found.codecs is None or found.codecs[field] == "none":
            found.shards(field)  # checks each header, or each index of a Zarr store
    return found


def finished_sets(root: Path) -> list[Path]:
    """The finished sets directly under `root`, by name."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if DIRECTORY_NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


def resolve_set(path: str | Path) -> Path:
    """A finished set, or the only one under a ROOT. More than one is an error that lists them."""
    path = Path(path)
    if path.suffix in (".mat", ".h5", ".hdf5"):
        raise UserError(f"{path} is not a converted set. Run: python -m convert run {path} --out data")
    if not path.is_dir():
        raise UserError(f"{path}: no such directory. Run: make convert")
    if (path / MANIFEST).is_file() or DIRECTORY_NAME.fullmatch(path.name):
        return path
    there = finished_sets(path)
    found = [p for p in there if p.suffix != ".zarr" or p.with_suffix("") not in there]  # the same rows, unpacked
    if not found:
        raise UserError(f"no finished set under {path}. Run: make convert")
    if len(found) > 1:
        raise UserError(f"{len(found)} sets under {path}: {', '.join(p.name for p in found)}. Use --data {found[0]}")
    return found[0]


# ---------------------------------------------------------------- checking


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
