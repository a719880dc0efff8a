"""Places by what a command line or a program calls them: a path, or an address such as s3://..."""

from collections.abc import Collection
from pathlib import Path

from shards.addresses import path_of, without_secrets
from shards.dataset import DIRECTORY_NAME, resolve_set
from shards.errors import MissingSet, SeveralSets, WrongPlace
from shards.files import Folder, LocalFolder
from shards.manifest import MANIFEST
from stores.base import Root, Store
from stores.local import LocalStore
from stores.object_store import ObjectStore
from stores.web import WebFolder

ON_THE_WEB = ("http://", "https://")


def root_at(place: Path | str, *, replaces: bool = False) -> Root:
    """Where sets can be written.

    replaces: whether objects of a store that hold other bytes may be overwritten. Raises WrongPlace
    for an address that can only be read. Nothing is opened yet.
    """
    path = path_of(place)
    return LocalStore(path) if isinstance(path, Path) else store_at(path, replaces=replaces)


def store_at(place: str, *, replaces: bool = False) -> Store:
    """As `root_at`, of an address."""
    if place.lower().startswith(ON_THE_WEB):
        what = "can only be read"
        raise WrongPlace(without_secrets(place), what, "Use a bucket, or a folder of this machine")
    return ObjectStore(place, replaces)


def folder_at(place: Path | str) -> Folder:
    """Where a set can be read. Nothing is opened yet."""
    if isinstance(place, str) and place.lower().startswith(ON_THE_WEB):
        return WebFolder(place)
    return root_at(place)


def resolve_in(folder: Folder) -> Folder:
    """The folder of a finished set: this one, or that of the only one in it, by one listing.

    A web server lists nothing: there it is this one. Raises MissingSet or SeveralSets.
    """
    if isinstance(folder, LocalFolder):
        return LocalFolder(resolve_set(folder.path))
    if not isinstance(folder, ObjectStore) or DIRECTORY_NAME.fullmatch(folder.name):
        return folder
    names = folder.names()
    if MANIFEST in names:
        return folder
    sets = [folder.child(name) for name in names if DIRECTORY_NAME.fullmatch(name)]
    finished = {each.name: each for each in sets if each.size(MANIFEST) >= 0}
    found = [each for name, each in finished.items() if not _is_packed(name, finished)]
    if not found:
        raise MissingSet(str(folder), "is not a finished set, nor is one in it")
    if len(found) > 1:
        raise SeveralSets(str(folder), sorted(map(str, found)))
    return found[0]


def _is_packed(name: str, names: Collection[str]) -> bool:
    """Whether it is the compressed form of another set of these."""
    return name.endswith(".zarr") and name.removesuffix(".zarr") in names
