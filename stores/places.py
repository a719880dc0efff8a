"""Places by what a command line or a program calls them: a path, or an address such as s3://..."""

import re
from pathlib import Path

from stores.base import Root
from stores.local import LocalStore

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_address(place: Path | str) -> bool:
    """Whether it is the address of a store, and no path of this machine."""
    return isinstance(place, str) and bool(ADDRESS.match(place))


def root_at(place: Path | str) -> Root:
    """Where sets can be written. Raises UserError where no such place can be opened."""
    if not is_address(place):
        return LocalStore(Path(place))
    raise NotImplementedError
