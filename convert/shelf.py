"""push and pull: a verified copy of a finished set, to Google Drive or back. The manifest goes last."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import format as fmt
from .format import UserError

BLOCK = 4 << 20


def copy_set(source: Path, root: Path) -> Path:
    """Copy a finished set under `root`, only what is missing or wrong there, and read every copied file back."""
    manifest = fmt.read_manifest(source)
    target = root / source.name
    target.mkdir(parents=True, exist_ok=True)
    files = fmt.all_files(manifest)
    _check_space(files, target)
    with tqdm(
        total=sum(f["bytes"] for f in files.values()), unit="B", unit_scale=True, desc="copy", disable=None
    ) as bar:
        for name, facts in sorted(files.items()):
            if not _is_right(target / name, facts):
                _copy_file(source / name, target / name, facts)
            bar.update(facts["bytes"])
    for name in (fmt.PROVENANCE, fmt.MANIFEST):
        if (source / name).is_file():
            data = (source / name).read_bytes()
            fmt.write_atomically(target / name, lambda file, data=data: fmt.void(file.write(data)))  # type: ignore[misc]
    return target


def _check_space(files: dict[str, dict[str, Any]], target: Path) -> None:
    need = sum(f["bytes"] for name, f in files.items() if not (target / name).exists())
    free = shutil.disk_usage(target).free
    if need > free:
        raise UserError(
            f"{target} needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. Free some, then run the same command"
        )


def _is_right(path: Path, facts: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == facts["bytes"] and fmt.sha256_file(path) == facts["sha256"]


def _copy_file(source: Path, target: Path, facts: dict[str, Any]) -> None:
    """Copy in blocks, hashed on the way, then read back and hashed again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with open(source, "rb") as reading, open(temporary, "wb") as writing:
            while block := reading.read(BLOCK):
                digest.update(block)
                writing.write(block)
            writing.flush()
            os.fsync(writing.fileno())
        if digest.hexdigest() != facts["sha256"]:
            raise UserError(f"{source} is damaged (SHA-256). Delete its directory there and push it again: make push")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if not _is_right(target, facts):
        raise UserError(
            f"{target} reads back differently from what was written. Remount Drive, then run the same command"
        )
