"""A compressed set is trained from an unpacked copy, made once: beside it, or in the cache where
that is read-only.
"""

import os
import subprocess
import sys
from pathlib import Path

from shards.dataset import ShardSet, open_set
from shards.errors import NewerSet, OldSet, UserError, WrongPlace
from shards.files import log
from shards.manifest import MANIFEST, read_manifest
from train.errors import CannotUnpack

CACHE = "nyuv2-shards"  # under $XDG_CACHE_HOME, else ~/.cache


def is_unpacked(found: ShardSet) -> bool:
    """Whether every shard of it is mapped as it lies."""
    return found.path.suffix != ".zarr" or set((found.codecs or {}).values()) <= {"none"}


def unpacked(found: ShardSet) -> ShardSet:
    """The set; of a compressed one the .npy copy, made by `shards.copy` in its own process: zarr is
    never loaded here.

    found: its path is absolute; of a compressed one only the manifest counts. A copy is taken where
    its manifest has the same fingerprint, every file the size and every shard the header that it
    names; the manifest is written last, so half a copy has none. Raises UserError where none can be
    made.
    """
    if is_unpacked(found):
        return found
    path = found.path
    digest = found.manifest.fingerprint
    name = path.with_suffix("").name
    cache = cache_folder()
    roots = [path.parent]
    if cache is not None:
        # The last one is for a set whose name, eight digits of its fingerprint, is another's too.
        roots += [cache, cache / digest]
    for root in roots:
        copy = copy_at(root / name, digest)
        if copy is not None:
            return copy
    for root in roots:
        if not is_other(root / name, digest) and is_writable(root):
            _unpack(path, root, digest)
            return open_set(root / name)
    where = cache or "a home"
    what = f"is compressed, and neither {path.parent} nor {where} can be written to"
    raise WrongPlace(path, what, "Set XDG_CACHE_HOME=/a/writable/folder and try again")


def cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/nyuv2-shards, by default under ~/.cache; None for a user without a home."""
    named = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # Relative ones are invalid by XDG.
        above = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return above / CACHE


def copy_at(path: Path, digest: str) -> ShardSet | None:
    """The set with this fingerprint that lies there, opened; None where there is no whole one."""
    try:
        found = open_set(path)
    except (UserError, OSError):
        return None
    return found if found.manifest.fingerprint == digest else None


def is_other(path: Path, digest: str) -> bool:
    """A finished set of another fingerprint or version: nothing may take its place."""
    try:
        return read_manifest(path).fingerprint != digest
    except (OldSet, NewerSet):
        return True
    except (UserError, OSError):
        return False


def is_writable(root: Path) -> bool:
    """Found out by writing: as root, permissions say nothing about a read-only mount."""
    probe = root / f".{os.getpid()}.probe"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _unpack(path: Path, root: Path, digest: str) -> None:
    """A second process waits for the first, inside `shards.copy`, and takes what it made.

    A damaged copy loses its manifest: it is half a copy then, which `shards.copy` goes on with,
    file by file. Raises CannotUnpack.
    """
    copy = root / path.with_suffix("").name
    log(f"{path} is compressed: unpacking it once, into {copy}")
    # In this order: it is not being made right now.
    if (copy / MANIFEST).exists() and copy_at(copy, digest) is None:
        (copy / MANIFEST).unlink(missing_ok=True)
    command = ["-m", "shards.copy", str(path), str(root)]
    done = subprocess.run(
        [sys.executable, *command], cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL
    )
    if done.returncode:
        raise CannotUnpack(path, root)
