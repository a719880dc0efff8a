"""A set, found and opened to train from: on this machine, or through a cache of one that lies
elsewhere.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shards.addresses import is_address, path_of
from shards.dataset import ShardSet, check_files, open_in, resolve_set
from shards.errors import WrongPlace, WrongSetting
from shards.files import Folder
from shards.manifest import read_manifest
from stores.cache import make_cache
from stores.cached_set import CachedSet
from stores.mounted import MountedStore, refuse_remote
from stores.places import folder_at, resolve_in
from train.arguments import check_path
from train.joined import JoinedSet, join
from train.unpack import cache_folder, is_unpacked, unpacked

DatasetPath = str | Path | ShardSet | Sequence[str | Path | ShardSet]  # of a set, or of several


def open_for_training(
    path: DatasetPath, *, allow_remote: bool = False, cache_dir: str | Path | None = None
) -> ShardSet:
    """Find, check and open a set, or several as one; of a compressed one the unpacked copy, which
    is made first if need be.

    cache_dir: shards are read from a folder there, into which they are fetched as they are needed;
    of a set that an address names, by default from one under the user's caches. Raises UserError
    where there is no set, where it is damaged, where it lies on a mounted Drive, cloud folder or
    bucket and that is not allowed, or where several do not go together.
    """
    if isinstance(path, list | tuple):
        if not path:
            raise WrongSetting("dataset_path", path, "name a finished set")
        parts = [_opened(each, allow_remote, cache_dir) for each in path]
        if len(parts) == 1:
            return parts[0]
        joined = join(parts)
        joined.say_what_is_left_out()
        return joined
    return _opened(path, allow_remote, cache_dir)  # type: ignore[arg-type]


def _opened(
    path: str | Path | ShardSet, allow_remote: bool, cache_dir: str | Path | None
) -> ShardSet:
    if isinstance(path, JoinedSet | CachedSet):
        return path
    # Maps are opened later, perhaps from another working directory: the path is absolute.
    if isinstance(path, ShardSet):
        return unpacked(replace(path, path=path.path.absolute()))
    check_path(path)
    place = path_of(os.path.expanduser(str(path)))
    if isinstance(place, str):
        return open_cached(resolve_in(folder_at(place)), cache_dir)
    directory = resolve_set(place)
    if cache_dir is not None:
        return open_cached(MountedStore(directory.absolute()), cache_dir)
    if not allow_remote:
        refuse_remote(directory)
    directory = directory.absolute()
    found = ShardSet(directory, read_manifest(directory))
    if is_unpacked(found):
        check_files(found)
    return unpacked(found)


def open_cached(source: Folder, cache_dir: str | Path | None) -> CachedSet:
    """A set in any store, of which shards are read from a folder of this machine.

    Raises as `open_for_training`, and WrongPlace where there is no such folder.
    """
    root = cache_folder() if cache_dir is None else Path(os.path.expanduser(cache_dir)).absolute()
    if root is None:
        raise WrongPlace(source, "needs a cache on this machine, and there is no home", "Name one")
    found = open_in(source)
    return CachedSet(make_cache(root, found), found.manifest, source)


def is_elsewhere(path: str | Path) -> bool:
    """Whether a set is named by the address of a store."""
    return is_address(path) and isinstance(path_of(path), str)
