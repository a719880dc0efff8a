"""What a place must offer so that finished sets can be kept there."""

from typing import Any, Protocol

from shards.files import FileEntry, Folder


class Store(Folder, Protocol):
    """A folder that can also put a file whole, and delete one; `names` lists what is there.

    Every method may be called again after it failed: the result is that of one call.
    """

    def put(self, name: str, data: Any) -> FileEntry:
        """Write one file whole or not at all, in the place of any other of this name.

        data: bytes, or a buffer of them. Returns what was written, which is durable then.
        """

    def delete(self, name: str) -> None:
        """Remove a file; where there is none, nothing happens."""

    def free_bytes(self) -> int:
        """How much more the place holds, as far as it tells."""

    def remove_unfinished(self, folder: str) -> None:
        """Remove what copies that were killed left in a folder of it ("" = the place itself)."""
