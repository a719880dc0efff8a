"""Small file systems of their own, to be filled or made read-only; the test skips where none can be
mounted.
"""

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
