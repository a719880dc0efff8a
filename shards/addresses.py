"""Addresses of stores, such as s3://bucket/sets: what is one, and how it is shown."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# user:password@, where the password may have slashes. Of a web server a token may stand alone;
# elsewhere that is a name, as in abfs://container@account.
USER = re.compile(r"(?<=://)[^/\s:@]*:[^\s@]*@|(?<=http://)[^/\s@]*@|(?<=https://)[^/\s@]*@")
SIGNED = re.compile(
    r"([?&][^=&\s]*(?:sig|token|credential|key|secret|password)[^=&\s]*)=[^&\s'\"]+", re.I
)


def is_address(place: Any) -> bool:
    """Whether it is the address of a store, and no path of this machine."""
    return isinstance(place, str) and bool(ADDRESS.match(place))


def path_of(place: Path | str) -> Path | str:
    """A place of this machine as a path, also one that is called file:///...; else the address."""
    if not isinstance(place, str) or not is_address(place):
        return Path(place)
    if place.lower().startswith("file://"):
        return Path(unquote(urlsplit(place).path))
    return place


def without_secrets(text: str) -> str:
    """A text as it may be printed and stored: no passwords and signatures of addresses in it."""
    return SIGNED.sub(r"\1=...", USER.sub("", text))


def hidden(text: str, address: str) -> str:
    """The text of an error about an address, without what that has of secrets, also by itself."""
    found = USER.search(address)
    user = found[0].rstrip("@") if found else ""
    for secret in (user, user.partition(":")[2]):
        text = text.replace(secret, "...") if secret else text
    return without_secrets(text)


def parent_of(place: Path | str) -> Path | str:
    """The folder that a path or an address is in."""
    return place.parent if isinstance(place, Path) else place.rpartition("/")[0]


def name_of(place: Path | str) -> str:
    """The last part of a path or an address."""
    return place.name if isinstance(place, Path) else place.rstrip("/").rpartition("/")[2]
