"""Small file systems of their own, to be filled or made read-only; the test skips where none can be
mounted.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, n_bytes: int) -> Iterator[Path]:
    """A tmpfs of that size at a path that is not there yet; gone at the end, whoever still uses it."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(path)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
        reason = made.stderr.strip() if made.returncode else ""
    except FileNotFoundError:
        reason = "there is no mount"
    if reason:
        pytest.skip(
            f"a small disk cannot be mounted here, a full or read-only one is not tested: {reason}"
        )
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def make_read_only(disk: Path) -> None:
    """For root too."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (disk / "x").touch()


def fill(disk: Path) -> None:
    """With one file, `filler`, whatever else is written meanwhile."""
    with open(disk / "filler", "wb") as filler:
        free = shutil.disk_usage(disk).free
        while free > 0:
            try:
                os.posix_fallocate(filler.fileno(), 0, filler.seek(0, os.SEEK_END) + free)
            except OSError:
                free = min(free // 2, shutil.disk_usage(disk).free)
