"""A finished set in another container or codec: `python -m shards.copy SET ROOT [--format npy|zarr]
[--codec ...]`

The rows and the fingerprint stay as they are, every file is checked on its way, and a copy that was
cut off goes on from its last shard. Training unpacks a compressed set with it, in a process of its
own: zarr is never loaded there.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shards.containers import (
    CODECS,
    ShardForm,
    is_mapped,
    write_field,
)
from shards.dataset import SetInStore, ShardSet, StoredSet, open_set, shards_with_failed_rows
from shards.errors import DamagedSet, NeedsSetting, UserError, WrongSetting, printable
from shards.files import FileEntry, Folder, LocalFolder, WritableFolder, log
from shards.flags import Parser, as_flag, as_path
from shards.lock import only_one
from shards.manifest import (
    FAILED,
    PROVENANCE,
    Manifest,
    Receipt,
    write_receipt,
)
from shards.progress import Progress, megabytes
from shards.spec import Codecs
from shards.writing import ShardsOfSet, check_space, commit, finished_in, resume, set_name


def codecs_of(container: str, codec: str, fields: Iterable[str]) -> Codecs:
    """A codec a field; None for .npy.

    container: "npy" or "zarr". codec: one for all fields, or "depth=blosc,label=zstd" and none for
    the rest. Raises WrongSetting.
    """
    names = list(fields)
    if "=" in codec:
        given = dict(pair.partition("=")[::2] for pair in codec.split(","))
    else:
        given = dict.fromkeys(names, codec)
    if not set(given) <= set(names) or not set(given.values()) <= set(CODECS):
        choices = f"choose one of {', '.join(CODECS)}, or rgb=none,depth=blosc,..."
        raise WrongSetting("codec", codec, choices)
    if container == "npy":
        if codec != "none":
            advice = "Files of .npy are never compressed"
            raise NeedsSetting("codec", codec, "container", "zarr", advice)
        return None
    return {name: given.get(name, "none") for name in names}


def copy_set(found: StoredSet, root: Path, codecs: Codecs) -> ShardSet:
    """Copy a finished set under `root`, into the container and codecs given; returns the copy.

    A second process waits for the first and takes what it made. Raises DamagedSet where a file is
    not as the manifest says, OtherSet where another set lies in the place of the copy, WrongPlace.
    """
    directory = root / name_of_copy(found, codecs)
    with only_one(root, directory.name, wait=True):
        made = copy_into(found, LocalFolder(directory), codecs)
    return ShardSet(directory, made.manifest)


def name_of_copy(found: StoredSet, codecs: Codecs) -> str:
    """What the folder of a copy in these codecs is called."""
    manifest = found.manifest
    return set_name(manifest.dataset.name, manifest.settings.size, manifest.fingerprint, codecs)


def copy_into(found: StoredSet, folder: WritableFolder, codecs: Codecs) -> StoredSet:
    """Copy a finished set into a folder of its own, which may be one of a store; the copy.

    Raises as `copy_set`, and what the folder raises.
    """
    existing = finished_in(folder, found.manifest.fingerprint, codecs)
    if existing is not None:
        return existing
    manifest = _copy(found, folder, codecs)
    if isinstance(folder, LocalFolder):
        return ShardSet(folder.path, manifest)
    return SetInStore(folder, manifest)


class HashedFolder:
    """A folder of a set in a store, each file of which is hashed as it is read whole: fetched once,
    where a check before would fetch it twice.
    """

    def __init__(self, folder: Folder, files: Mapping[str, FileEntry]) -> None:
        self._folder = folder
        self._files = files

    def __str__(self) -> str:
        return str(self._folder)

    @property
    def name(self) -> str:
        return self._folder.name

    def size(self, name: str) -> int:
        return self._folder.size(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = self._folder.read(name)
        entry = self._files.get(name)
        if entry is not None and hashlib.sha256(data).hexdigest() != entry.sha256:
            raise DamagedSet(f"{self}/{name}", "has other content than the manifest says (SHA-256)")
        return data[start:stop]

    def sizes(self) -> dict[str, int] | None:
        return self._folder.sizes()

    def what_is_wrong(self, name: str, entry: FileEntry) -> str | None:
        return self._folder.what_is_wrong(name, entry)


def _copy(found: StoredSet, folder: WritableFolder, codecs: Codecs) -> Manifest:
    if isinstance(found, ShardSet):
        _check_every_file(found)
    else:
        found = SetInStore(HashedFolder(found.folder, found.manifest.files), found.manifest)
    fields = found.manifest.fields
    folder.remove_unfinished()
    bounds = found.manifest.bounds
    shards = ShardsOfSet(bounds=bounds, fields=list(fields.values()), codecs=codecs)
    # A receipt there may be of a conversion that was not finished, on a machine that had another
    # decoder or could not read a row. Of a row that failed it says less than has to be known.
    with_failed = shards_with_failed_rows(found)
    decoder = found.manifest.decoder
    ours = [Receipt(entry=shard, decoder=decoder) for shard in found.manifest.shards]
    done = {
        k: receipt
        for k, receipt in resume(folder, shards).items()
        if k not in with_failed and receipt.has_rows_of(ours[k])
    }
    todo = [k for k in range(found.n_shards) if k not in done]
    if isinstance(folder, LocalFolder):
        check_space(folder.path, _bytes_to_write(found, len(todo), codecs))

    form = ShardForm(codecs=codecs, n_slots=found.settings.rows_per_shard)
    n_bytes = _n_bytes_of_rows(found, todo)
    log(f"copying {len(todo)} of {found.n_shards} shards, {megabytes(n_bytes)} as arrays")
    with Progress("copying", n_bytes) as progress:
        for k in todo:
            files: dict[str, FileEntry] = {}
            for name, field in fields.items():
                rows = found.shard(name, k)
                files |= write_field(folder, field, k, rows, form)
                progress.add(rows.nbytes)
            entry = replace(found.manifest.shards[k], files=files)
            done[k] = Receipt(entry=entry, codecs=codecs, decoder=decoder)
            if k not in with_failed:
                write_receipt(folder, k, done[k])

    for name in (PROVENANCE, FAILED):
        if found.folder.size(name) >= 0:
            folder.put(name, found.folder.read(name))
        else:
            folder.delete(name)
    manifest = replace(
        found.manifest.without_files(),
        codecs=codecs,
        shards=[done[k].entry for k in range(found.n_shards)],
    )
    columns = {name: found.values(name) for name in manifest.columns}
    return commit(folder, manifest, columns)


def _check_every_file(found: StoredSet) -> None:
    """Raise DamagedSet for the first that is not as the manifest says."""
    files = found.manifest.files
    with Progress("checking", sum(entry.n_bytes for entry in files.values())) as progress:
        for name, entry in files.items():
            if problem := found.folder.what_is_wrong(name, entry):
                raise DamagedSet(f"{found.address}/{name}", problem)
            progress.add(entry.n_bytes)


def _n_bytes_of_rows(found: StoredSet, shards: Iterable[int]) -> int:
    """Of all fields of these shards, as arrays."""
    n_rows = sum(found.manifest.shards[k].stop - found.manifest.shards[k].start for k in shards)
    fields = found.manifest.fields.values()
    return n_rows * sum(field.row_bytes(found.settings.size) for field in fields)


def _bytes_to_write(found: StoredSet, n_shards: int, codecs: Codecs) -> int:
    """Of what is not compressed."""
    fields = [field for name, field in found.manifest.fields.items() if is_mapped(codecs, name)]
    n_rows = n_shards * min(found.settings.rows_per_shard, found.n_rows)
    return n_rows * sum(field.row_bytes(found.settings.size) for field in fields)


def parser() -> argparse.ArgumentParser:
    """The flags of the command line."""
    made = Parser(
        "python -m shards.copy",
        "Copy a finished set into another container, as training unpacks one.",
        "example: python -m shards.copy data/nyuv2-224-1f3a9c20.zarr data",
    )
    made.add_argument("set", type=as_path, metavar="SET", help="the directory of a finished set")
    root_help = "the folder in which the copy's own is made"
    made.add_argument("root", type=as_path, metavar="ROOT", help=root_help)
    format_help = "npy: files that are mapped; zarr: one group (default: %(default)s)"
    made.add_argument("--format", choices=("npy", "zarr"), default="npy", help=format_help)
    codec_help = f"of zarr: {', '.join(CODECS)}, or one a field: depth=blosc (default: %(default)s)"
    made.add_argument("--codec", default="none", metavar="CODEC", help=codec_help)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: prints the copy; a mistake is one line and status 2."""
    args = parser().parse_args(argv)
    try:
        found = open_set(args.set)
        codecs = codecs_of(args.format, args.codec, found.manifest.fields)
        print(copy_set(found, args.root, codecs).path)
        return 0
    except (UserError, OSError) as error:
        text = error.told(as_flag) if isinstance(error, UserError) else str(error)
        print(printable(" ".join(text.split())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is copied is kept, and the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
