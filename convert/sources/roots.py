"""Where the paths of a table lead."""

from collections.abc import Sequence
from pathlib import Path

from convert.sources.errors import BadRow


class Roots:
    """Files under one folder."""

    may_hang = False

    def __init__(self, folder: Path, given: Sequence[str], follow: bool) -> None:
        self.folder = folder

    def read(self, field: str, path: str) -> bytes:
        """Raises BadRow."""
        try:
            return (self.folder / path).read_bytes()
        except FileNotFoundError:
            raise BadRow("is missing") from None

    def file(self, field: str, path: str) -> Path:
        """Where it lies."""
        return self.folder / path

    def close(self) -> None:
        """Nothing is open."""
