"""A folder of this machine's file systems as a store."""

import os
import shutil
from pathlib import Path

from shards.files import LocalFolder


def exists(path: Path) -> bool:
    """Whether anything is there. Raises OSError: Path.exists() hides what a mount answers."""
    try:
        os.stat(path)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


class LocalStore(LocalFolder):
    """Files under `path`, which need not be there yet. What fails is an OSError."""

    def child(self, name: str) -> "LocalStore":
        return LocalStore(self.path / name)

    def free_bytes(self) -> int:
        """Raises FileNotFoundError where the folder is not there."""
        return shutil.disk_usage(self.path).free
