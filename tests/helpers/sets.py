"""Sets for tests: how they are made, what is on disk of them, and how they are damaged."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert import pipeline
from shards.copy import codecs_of, copy_set
from shards.dataset import ShardSet, open_set
from shards.dataset import verify as verify_set
from shards.files import sha256_file
from shards.manifest import MANIFEST, PROVENANCE, read_manifest, signed
from shards.spec import KNOWN_FIELDS, Codecs, ConversionSettings

FIELDS = tuple(KNOWN_FIELDS)
SMALL = ConversionSettings(size=32, rows_per_shard=10)


def convert(
    source: Any,
    root: Path,
    settings: ConversionSettings,
    workers: int | None = None,
    codecs: Codecs = None,
    *,
    repair: bool = False,
) -> Path:
    """`convert.pipeline.convert`, its path as a Path."""
    made = pipeline.convert(source, root, settings, workers=workers, codecs=codecs, repair=repair)
    return Path(made)


def repack(source: Path, root: Path, container: str, codec: str) -> Path:
    """A copy of a set in another container or codec."""
    found = open_set(source)
    return copy_set(found, root, codecs_of(container, codec, found.manifest.fields)).path


def manifest_json(directory: Path) -> dict[str, Any]:
    """What manifest.json says, without its signature, as anybody may read it."""
    value: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
    del value["sha256"]
    return value


def write_manifest_json(directory: Path, value: dict[str, Any]) -> None:
    """Sign whatever it says."""
    (directory / MANIFEST).write_text(signed(value))


def files_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Every file of a set -> {"bytes", "sha256"}, from the JSON."""
    manifest = manifest_json(directory)
    parts = [manifest["column_files"], manifest.get("metadata_files", {})]
    parts += [shard["files"] for shard in manifest["shards"]]
    return {name: entry for files in parts for name, entry in files.items()}


def verify(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Every file, with what is wrong of it; nothing is looked at before."""
    return verify_set(ShardSet(directory, read_manifest(directory)))


def is_whole(directory: Path) -> bool:
    return not [problem for _, problem in verify(directory) if problem]


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit of a file, by default in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    path.write_bytes(data)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a set, by its path inside."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def committed(directory: Path) -> dict[str, bytes]:
    """The same without the provenance, which tells one conversion from another."""
    return {name: data for name, data in content(directory).items() if name != PROVENANCE}


def shard_bytes(directory: Path) -> dict[str, bytes]:
    """Every shard and column of a set of .npy files; its manifest names the source."""
    return {name: data for name, data in content(directory).items() if name.endswith(".npy")}


def same_shards(made: Path, expected: Path) -> bool:
    """Whether a set has the shards and columns of another of .npy files."""
    wanted = shard_bytes(expected)
    return len(wanted) > 5 and shard_bytes(made) == wanted


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
