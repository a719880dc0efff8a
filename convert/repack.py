"""Write a set's files in either container: .npy, or one Zarr v3 group through zarr-python.

A Zarr array a field: `rows_per_shard` rows a shard file, one row an inner chunk. The rows of an uncompressed shard lie
back to back, so its bytes are written as they are, with the index behind them: what zarr-python writes, to the byte, at
several times its speed. Compressed shards, the metadata and the per-row columns are zarr-python's own output.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.commit import check_space, is_finished, receipt_name, remove_receipts, resume
from shards import format as fmt
from shards.format import FIELDS, Codecs, Settings, ShardSet, UserError
from shards.lock import only_one

CODECS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "zstd": {"name": "zstd", "configuration": {"level": 3}},
    "blosc": {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"}},
    "blosc-zstd": {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle"}},
}
Facts = dict[str, Any]


def codecs_of(container: str, codec: str, names: Iterable[str]) -> Codecs:
    """`--format` and `--codec` (one for all fields, or field=codec,... and none for the rest) -> a codec a field."""
    given = dict(pair.partition("=")[::2] for pair in codec.split(",")) if "=" in codec else dict.fromkeys(names, codec)
    if not set(given) <= set(names) or not set(given.values()) <= set(CODECS):
        raise UserError(f"--codec {codec}: choose one of {', '.join(CODECS)}, or rgb=none,depth=blosc,...")
    if container == "npy" and codec != "none":
        raise UserError(f"--codec {codec}: .npy files are never compressed. Add: --format zarr")
    return {name: given.get(name, "none") for name in names} if container == "zarr" else None


def write_shard(directory: Path, field: str, k: int, rows: np.ndarray, n_slots: int, codecs: Codecs) -> Facts:
    """Write rows as shard `k`, which has room for `n_slots` of them. Returns {file: {"bytes", "sha256"}}."""
    name = fmt.shard_name(field, k, codecs is not None)
    if codecs is None:
        parts = fmt.npy_parts(rows)
    elif codecs[field] == "none":
        parts = fmt.raw(rows), fmt.shard_index(len(rows), rows[0].nbytes, n_slots)
    else:
        files: dict[str, Any] = {}
        _field_array(files, field, rows.shape, n_slots, codecs[field])[:] = rows
        parts = (files[fmt.shard_name(field, 0, True)].to_bytes(),)
    return {name: fmt.write_bytes(directory / name, *parts)}


def write_rest(directory: Path, manifest: Facts, columns: dict[str, np.ndarray], codecs: Codecs) -> None:
    """Write all but the shards, then the manifest, which commits the set."""
    if codecs is None:
        files = {fmt.column_name(name): fmt.npy_parts(column) for name, column in columns.items()}
    else:
        files = {name: (data,) for name, data in _group(manifest, columns, codecs).items()}
    written = {name: fmt.write_bytes(directory / name, *parts) for name, parts in files.items()}
    metadata = {name: written.pop(name) for name in files if name.endswith("zarr.json")}
    manifest = {**manifest, "container": "npy", "columns": written}
    if codecs is not None:
        manifest |= {"container": "zarr", "codecs": codecs, "metadata": metadata}
    for path in {parent for name in fmt.all_files(manifest) for parent in Path(name).parents}:
        fmt.fsync_dir(directory / path)
    fmt.write_manifest(directory, manifest)


def repack(source: Path, root: Path, settings: Settings, container: str, codec: str) -> Path:
    """Copy a finished set under `root` in another container or codec; the rows and the fingerprint stay as they are.

    Every file is checked on the way. A second process waits for the first and takes what it made.
    """
    found = fmt.open_set(source)
    have, digest = found.settings, found.manifest["fingerprint"]
    if not settings.fits(have) and settings != Settings():
        raise UserError(f"{source} has other settings ({have}). Run: python -m convert run FILE.mat --out {root}")
    codecs = codecs_of(container, codec, have.fields)
    directory = root / fmt.directory_name(have, digest, codecs is not None)
    with only_one(root, directory.name, wait=True):
        if not is_finished(directory, digest, codecs):
            _copy(found, directory, codecs)
    return directory


def _copy(found: ShardSet, directory: Path, codecs: Codecs) -> None:
    manifest = {key: value for key, value in found.manifest.items() if key not in ("codecs", "metadata")}
    have = found.settings
    for name, facts in fmt.all_files(found.manifest).items():
        if problem := fmt.what_is_wrong(found.path / name, facts):
            raise UserError(f"{found.path / name} {problem}. {fmt.MEND}")
    shards = manifest["shards"]
    done = resume(directory, [shard["rows"] for shard in shards], have, codecs)
    todo = [k for k in range(len(shards)) if k not in done]
    plain = [field for field in have.fields if not codecs or codecs[field] == "none"]
    check_space(directory, len(todo) * min(have.rows_per_shard, found.n_rows) * fmt.row_bytes(plain, have.size))
    for k in tqdm(todo, desc="repack", unit="shard", disable=None):
        files: Facts = {}
        for field in have.fields:
            files |= write_shard(directory, field, k, found.shard(field, k), have.rows_per_shard, codecs)
        done[k] = {**shards[k], "files": files, "codecs": codecs}
        fmt.write_json(directory / receipt_name(k), done[k])
    manifest["shards"] = [{**shard, "files": done[k]["files"]} for k, shard in enumerate(shards)]
    if (found.path / fmt.PROVENANCE).is_file():
        fmt.write_bytes(directory / fmt.PROVENANCE, (found.path / fmt.PROVENANCE).read_bytes())
    write_rest(directory, manifest, {name: found.column(name) for name in fmt.COLUMNS}, codecs)
    remove_receipts(directory)


def _field_array(files: dict[str, Any], field: str, shape: tuple[int, ...], n_slots: int, codec: str) -> Any:
    """A field's array over `files` (a dict as the store)."""
    dims, row = ("row", *("channel", "y", "x")[1 - len(shape) :]), shape[1:]
    chunks = {"shards": (n_slots, *row), "chunks": (1, *row), "compressors": CODECS[codec]}
    attributes = {"units": FIELDS[field]["unit"], "invalid": FIELDS[field]["invalid"]}
    return _create(files, field, dims, attributes, shape=shape, dtype=FIELDS[field]["dtype"], **chunks)


def _create(files: dict[str, Any], name: str, dims: Sequence[str], attributes: Facts, **how: Any) -> Any:
    """An array where no row is left out for being all 0."""
    from zarr import create_array
    from zarr.storage import MemoryStore

    how |= {"dimension_names": dims, "attributes": attributes, "config": {"write_empty_chunks": True}}
    return create_array(MemoryStore(files), name=name, fill_value=0, **how)


def _group(manifest: Facts, columns: dict[str, np.ndarray], codecs: dict[str, str]) -> dict[str, bytes]:
    """Every file of the store but the shards. Text becomes rows of UTF-8 bytes, which every reader knows."""
    from zarr import create_group
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    facts = {key: manifest[key] for key in ("fingerprint", "settings", "names")}
    create_group(MemoryStore(files), attributes=json.loads(json.dumps(facts, sort_keys=True)))
    settings = Settings.from_dict(manifest["settings"])
    for field in settings.fields:
        shape = (manifest["rows"], *fmt.row_shape(field, settings.size))
        _field_array(files, field, shape, settings.rows_per_shard, codecs[field])
    for name, column in columns.items():
        is_text = column.dtype.kind == "S"
        values = column.view(np.uint8).reshape(len(column), -1) if is_text else column
        dims, attributes = ("row", f"{name}_axis")[: values.ndim], {"encoding": "utf-8"} if is_text else {}
        _create(files, f"rows-{name}", dims, attributes, data=values, chunks=values.shape, compressors=None)
    return {name: data.to_bytes() for name, data in files.items()}
