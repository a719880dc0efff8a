"""The contract on disk: names, dtypes, the manifest, opening and checking a finished set.

A leaf: stdlib and numpy only, imported by `convert` (which writes) and `train` (which reads).

    ROOT/nyuv2-224-1f3a9c20/
      rgb-00000.npy ...    one file a field a shard, rows in .mat order
      rows-scene.npy ...   one value a row
      manifest.json        written last: its presence is the commit
      provenance.json      how it was made; not part of the set's identity
"""

import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

FORMAT_VERSION = 1
RESIZE_VERSION = 1
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
CROPS = ("none", "border", "eigen")
DEPTH_RESIZES = ("nearest", "area")
SPLITS = ("train", "test")
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
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise UserError(f"unknown settings in the manifest: {', '.join(unknown)}. Run: make convert")
        return cls(**{**values, "fields": tuple(values["fields"])})


def row_shape(field: str, size: int) -> tuple[int, ...]:
    """The shape of one stored row: (3, S, S) for rgb, (S, S) for the rest."""
    planes = FIELDS[field]["planes"]
    return (planes, size, size) if planes else (size, size)


def fingerprint(settings: Settings, source: dict[str, Any]) -> str:
    """SHA-256 over everything that decides the content; the container and the codec do not."""
    content = {
        "format": FORMAT_VERSION,
        "resize": RESIZE_VERSION,
        "settings": settings.to_dict(),
        "source": {"bytes": source["bytes"], "sampled_sha256": source["sampled_sha256"]},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def directory_name(settings: Settings, digest: str) -> str:
    return f"nyuv2-{settings.size}-{digest[:8]}"


def shard_name(field: str, shard: int) -> str:
    return f"{field}-{shard:05d}.npy"


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
        os.fsync(handle)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[HashingFile], None]) -> dict[str, Any]:
    """Write under a temporary name, fsync, rename. Returns {"bytes", "sha256"} of what was written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            hashing = HashingFile(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)
    return {"bytes": hashing.n_bytes, "sha256": hashing.sha256.hexdigest()}


def write_npy(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write a C-contiguous array as .npy, atomically and durably."""

    def write(file: HashingFile) -> None:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))  # type: ignore[arg-type]
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b"")

    return write_atomically(path, write)


def write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    return write_atomically(path, lambda file: void(file.write(text.encode())))


def void(_: Any) -> None:
    """Drop a result, where a callback may not return one."""


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """The commit. The last key is the SHA-256 of the text of the rest."""
    body = json.dumps(manifest, indent=2, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    text = f'{body[:-2]},\n  "sha256": "{digest}"\n}}\n'
    write_atomically(directory / MANIFEST, lambda file: void(file.write(text.encode())))


# ---------------------------------------------------------------- opening


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished set, its own hash and its file names checked."""
    path = directory / MANIFEST
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(_unfinished(directory)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Run: make pull, or make convert") from None
    try:
        manifest: dict[str, Any] = json.loads(text)
        digest = manifest.pop("sha256")
        if hashlib.sha256(json.dumps(manifest, indent=2, sort_keys=True).encode()).hexdigest() != digest:
            raise ValueError("its SHA-256 does not match its content")
        if manifest["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {manifest['format_version']}, this program reads {FORMAT_VERSION}")
        for name in all_files(manifest):
            if not re.fullmatch(r"[a-z_]+-[a-z0-9_]+\.npy", name):
                raise ValueError(f"it names a file outside the set: {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}. Delete the directory, then run: make convert") from None
    return manifest


def _unfinished(directory: Path) -> str:
    done = len(list(directory.glob("receipt-*.json"))) if directory.is_dir() else 0
    state = f"the conversion did not finish ({done} shards are done)" if done else "it is not a finished set"
    return f"no {MANIFEST} in {directory}: {state}. Run: make convert"


def all_files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every file of the set -> {"bytes", "sha256"}."""
    files = dict(manifest["columns"])
    for shard in manifest["shards"]:
        files.update(shard["files"])
    return files


def map_npy(path: Path, *, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map a .npy read-only after checking that its header and size are what the manifest says."""
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not .npy version 1.0")
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(file)
            offset, n_bytes = file.tell(), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run: make pull, or make convert") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}). Run: make pull, or make convert") from None
    if (found_shape, found_dtype, fortran) != (tuple(shape), np.dtype(dtype), False):
        raise UserError(
            f"{path} holds {found_dtype}{found_shape}, expected {dtype}{shape}. Run: make pull, or make convert"
        )
    expected = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
    if n_bytes != expected:
        raise UserError(f"{path} has {n_bytes} bytes, expected {expected}: the copy is incomplete. Run: make pull")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=tuple(shape))


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

    def shards(self, field: str) -> list[np.ndarray]:
        """The field's shards as read-only memory maps, in row order."""
        if field not in self.manifest["fields"]:
            have = ", ".join(self.manifest["fields"])
            raise UserError(
                f"{self.path} has no field {field} (it has {have}). Run: make convert ARGS='--fields {field},...'"
            )
        shape = row_shape(field, self.size)
        return [
            map_npy(self.path / shard_name(field, k), dtype=FIELDS[field]["dtype"], shape=(stop - start, *shape))
            for k, (start, stop) in enumerate(s["rows"] for s in self.manifest["shards"])
        ]

    def column(self, name: str) -> np.ndarray:
        """One value a row, e.g. "split", "scene", "scene_type", "accel"."""
        file = f"rows-{name}.npy"
        if file not in self.manifest["columns"]:
            raise UserError(f"{self.path} has no column {name}. Run: make convert")
        return np.load(self.path / file, allow_pickle=False)


def open_set(path: str | Path) -> ShardSet:
    """Open a finished set and check the size and header of every file of it (about 60 opens, no data read)."""
    found = ShardSet(Path(path), read_manifest(Path(path)))
    for name, facts in all_files(found.manifest).items():
        try:
            n_bytes = (found.path / name).stat().st_size
        except FileNotFoundError:
            raise UserError(f"{found.path / name} is missing. Run: make pull, or make convert") from None
        if n_bytes != facts["bytes"]:
            raise UserError(
                f"{found.path / name} has {n_bytes} bytes, the manifest says {facts['bytes']}: the copy is incomplete. "
                "Run: make pull, or make convert"
            )
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
    found = finished_sets(path)
    if not found:
        raise UserError(f"no finished set under {path}. Run: make convert")
    if len(found) > 1:
        raise UserError(f"{len(found)} sets under {path}: {', '.join(p.name for p in found)}. Use --data {found[0]}")
    return found[0]


# ---------------------------------------------------------------- checking


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Check every byte: yields (file, None) or (file, what is wrong), then foreign files as wrong too."""
    files = all_files(read_manifest(directory))
    for name, facts in sorted(files.items()):
        yield name, _what_is_wrong(directory / name, facts)
    for path in sorted(directory.iterdir()):
        if path.name not in files and not re.fullmatch(NOT_CONTENT, path.name):
            yield path.name, "is not part of the set"


def _what_is_wrong(path: Path, facts: dict[str, Any]) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is missing" if not path.exists() else "is not a plain file"
    n_bytes = path.stat().st_size
    if n_bytes != facts["bytes"]:
        return f"has {n_bytes} bytes, the manifest says {facts['bytes']}"
    return None if sha256_file(path) == facts["sha256"] else "has other content than the manifest says (SHA-256)"


@contextmanager
def only_one(root: Path, name: str) -> Iterator[None]:
    """Hold a lock on `ROOT/.NAME.lock`; a second process is told who holds it. A dead process holds nothing."""
    path = root / f".{name}.lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{root / name} is being converted by {holder}. Wait for it, then run: make convert"
            ) from None
        except OSError:  # a file system without locks: go on
            pass
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
