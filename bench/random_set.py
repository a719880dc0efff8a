"""A set of random bytes, as large as one likes: what reading is measured on.

Nothing of it compresses and no file has holes, so a disk has to read every byte. It is written as
fast as the disk takes it: nothing is decoded.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.sources.base import filled_columns
from shards.containers import ShardForm, write_field
from shards.dataset import ShardSet, open_set
from shards.errors import MissingSet
from shards.files import LocalFolder
from shards.manifest import Manifest, ShardEntry, bounds_of
from shards.spec import (
    KNOWN_FIELDS,
    SPLITS,
    ConversionSettings,
    DatasetSpec,
    Field,
    SourceIdentity,
    Statistics,
)
from shards.writing import check_space, commit, set_name

NAME = "random"
SCENE_TYPES = ("kitchen", "office", "garage", "attic")
HIGHEST_MM = 10_000  # of depth
TRAIN = SPLITS.index("train")
VAL = SPLITS.index("val")
FIELDS = ("rgb", "depth")
ROWS_PER_SHARD = 128


def random_set(root: Path, n_rows: int, size: int) -> ShardSet:
    """The set of so many rows of rgb and depth under `root`; one that is there is taken.

    All rows are train rows. Raises WrongPlace where there is no room.
    """
    settings = ConversionSettings(fields=FIELDS, size=size, rows_per_shard=ROWS_PER_SHARD)
    identity = SourceIdentity(
        kind="table",
        name=NAME,
        n_bytes=n_rows,
        sha256=hashlib.sha256(f"{NAME} {n_rows}".encode()).hexdigest(),
    )
    fields = {name: _with_statistics(KNOWN_FIELDS[name]) for name in FIELDS}
    manifest = Manifest(
        dataset=DatasetSpec(name=NAME, width=640, height=480, scene_types=SCENE_TYPES),
        source=identity,
        settings=settings,
        n_rows=n_rows,
        fields=fields,
        shards=[],
        scenes=["somewhere"],
    )
    directory = root / set_name(NAME, size, manifest.fingerprint, None)
    try:
        return open_set(directory)
    except MissingSet:
        directory.mkdir(parents=True, exist_ok=True)

    row_bytes = sum(field.row_bytes(size) for field in fields.values())
    check_space(directory, n_rows * row_bytes)
    shards = [
        _written_shard(directory, manifest, k)
        for k in range(len(bounds_of(n_rows, ROWS_PER_SHARD)))
    ]
    types = np.arange(n_rows) % len(SCENE_TYPES)
    split = np.where(np.arange(n_rows) < n_rows - ROWS_PER_SHARD, TRAIN, VAL)
    given = {"scene_type": types, "split": split.astype(np.uint8)}
    columns = filled_columns(given, n_rows, manifest.dataset, settings.crop)
    whole = commit(LocalFolder(directory), replace(manifest, shards=shards), columns)
    return ShardSet(directory, whole)


def _with_statistics(field: Field) -> Field:
    """About those of the random rows: who trains divides by them."""
    n_channels = 3 if field.kind == "colour" else 1
    highest = HIGHEST_MM if field.kind == "depth" else 256
    return replace(
        field,
        statistics=Statistics(
            count=(1,) * n_channels,
            mean=(highest / 2,) * n_channels,
            std=(highest / 12**0.5,) * n_channels,
        ),
    )


def _written_shard(directory: Path, manifest: Manifest, shard: int) -> ShardEntry:
    start, stop = bounds_of(manifest.n_rows, ROWS_PER_SHARD)[shard]
    form = ShardForm(codecs=None, n_slots=ROWS_PER_SHARD)
    files = {}
    for field in manifest.fields.values():
        rows = _random_rows(field, (shard, start), (stop - start, manifest.settings.size))
        files |= write_field(LocalFolder(directory), field, shard, rows, form)
    return ShardEntry(
        start=start, stop=stop, files=files, sums={name: () for name in manifest.fields}
    )


def _random_rows(field: Field, seed: tuple[int, int], n_and_size: tuple[int, int]) -> np.ndarray:
    n_rows, size = n_and_size
    shape = (n_rows, *field.row_shape(size))
    rng = np.random.default_rng([*seed, field.itemsize])
    if field.kind == "depth":
        return rng.integers(0, HIGHEST_MM, shape, field.dtype)
    return rng.integers(0, 256, shape, field.dtype)
