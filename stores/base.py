"""What a place must offer so that finished sets can be kept there."""

from pathlib import Path
from typing import Protocol

from shards.files import FileEntry, WritableFolder


class Root(WritableFolder, Protocol):
    """A folder in which sets are made, each in a folder of its own."""

    def child(self, name: str) -> WritableFolder:
        """The folder of this name in it, which need not be there yet."""


class Store(WritableFolder, Protocol):
    """A folder that sets are copied to and from."""

    def child(self, name: str) -> "Store":
        """The folder of this name in it, which need not be there yet."""

    def create(self) -> None:
        """Make the folder, in one that is there; where it is there already, nothing happens."""

    def free_bytes(self) -> int | None:
        """How much more the place holds; None where it does not tell, as a bucket."""

    def upload(self, source: Path, name: str, entry: FileEntry | None = None) -> None:
        """Copy a file of this machine there; nothing where it is right already.

        entry: what the file must be; None: whatever it is, it is copied.
        """

    def download(self, name: str, target: Path, entry: FileEntry | None = None) -> None:
        """Copy a file from there to this machine; nothing where it is right here already.

        entry: what the file must be; None: whatever it is, it is copied.
        """
