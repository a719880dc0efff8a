"""A folder of this machine's file systems as a store."""

import os
import shutil
from pathlib import Path
from typing import Any

from shards.files import FileEntry, LocalFolder, write_atomically

UNFINISHED = ".*.tmp"  # as `write_atomically` calls a file until it is whole


def exists(path: Path) -> bool:
    """Whether anything is there. Raises OSError: Path.exists() hides what a mount answers."""
    try:
        os.stat(path)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


class LocalStore(LocalFolder):
    """Files under `path`, which need not be there yet; see stores.base.Store.

    What fails is an OSError.
    """

    def put(self, name: str, data: Any) -> FileEntry:
        return write_atomically(self.path / name, lambda file: file.write(data))

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Raises FileNotFoundError where the folder is not there."""
        return shutil.disk_usage(self.path).free

    def remove_unfinished(self, folder: str) -> None:
        for path in (self.path / folder).glob(UNFINISHED):
            path.unlink(missing_ok=True)
