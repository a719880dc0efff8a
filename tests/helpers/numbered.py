"""A set whose every pixel of depth tells the number of its row, and what writes down which rows a
loader gave.

    torchrun ... -m helpers.numbered '{"data": ..., "out": ..., ...}'

writes OUT/RANK.jsonl: of each batch its epoch, its step and its rows, then those of the rows to
score on.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.base import filled_columns
from shards.containers import ShardForm, write_field
from shards.files import LocalFolder
from shards.manifest import ColumnValues, FileEntry, Manifest, ShardEntry, bounds_of
from shards.spec import (
    KNOWN_FIELDS,
    SPLITS,
    ConversionSettings,
    DatasetSpec,
    SourceIdentity,
    Statistics,
)
from shards.writing import commit, set_name

SIZE = 16
FIELDS = ("rgb", "depth")
SPEC = DatasetSpec(name="numbered", width=32, height=24, scene_types=("kitchen", "office"))


def numbered_set(root: Path, n_rows: int, n_train: int, rows_per_shard: int) -> Path:
    """Row k, from 0, has a depth of k + 1 mm everywhere; the first rows are train rows, the others
    test rows.
    """
    fields = {}
    for name, n_channels in (("rgb", 3), ("depth", 1)):
        statistics = Statistics(
            count=(1,) * n_channels, mean=(100.0,) * n_channels, std=(50.0,) * n_channels
        )
        fields[name] = replace(KNOWN_FIELDS[name], statistics=statistics)
    manifest = Manifest(
        dataset=SPEC,
        source=SourceIdentity(
            kind="table",
            name=SPEC.name,
            n_bytes=n_rows,
            sha256=hashlib.sha256(f"{n_rows} {n_train}".encode()).hexdigest(),
        ),
        settings=ConversionSettings(fields=FIELDS, size=SIZE, rows_per_shard=rows_per_shard),
        n_rows=n_rows,
        fields=fields,
        shards=[],
        scenes=("somewhere",),
    )
    path = root / set_name(SPEC.name, SIZE, manifest.fingerprint, None)
    path.mkdir(parents=True)
    bounds = bounds_of(n_rows, rows_per_shard)
    shards = [_written(path, manifest, k, *each) for k, each in enumerate(bounds)]
    is_train = np.arange(n_rows) < n_train
    split = np.where(is_train, SPLITS.index("train"), SPLITS.index("test"))
    columns: dict[str, ColumnValues] = {
        "scene_type": np.arange(n_rows) % 2,
        "split": split.astype(np.uint8),
    }
    filled = filled_columns(columns, n_rows, SPEC, manifest.settings.crop)
    commit(LocalFolder(path), replace(manifest, shards=shards), filled)
    return path


def _written(path: Path, manifest: Manifest, shard: int, start: int, stop: int) -> ShardEntry:
    form = ShardForm(codecs=None, n_slots=manifest.settings.rows_per_shard)
    files: dict[str, FileEntry] = {}
    for field in manifest.fields.values():
        numbers = np.arange(start, stop).reshape(-1, *[1] * len(field.row_shape(SIZE))) + 1
        is_depth = field.kind == "depth"
        values = (numbers if is_depth else numbers * 37 % 251).astype(field.dtype)
        rows = np.ascontiguousarray(np.broadcast_to(values, (stop - start, *field.row_shape(SIZE))))
        files |= write_field(LocalFolder(path), field, shard, rows, form)
    sums: dict[str, Any] = {name: () for name in manifest.fields}
    return ShardEntry(start=start, stop=stop, files=files, sums=sums)


def rows_of(batch: Any) -> list[int]:
    """The rows of a batch of (rgb, depth in metres), by what their pixels say."""
    depth_mm = (1000 * batch[-1][:, 0]).round().long()
    numbers = depth_mm.amin((1, 2))
    assert (numbers == depth_mm.amax((1, 2))).all()
    return [int(number) - 1 for number in numbers]


def write_down(told: dict[str, Any]) -> None:
    """As this rank. told: "data" and "out", "batch_size" of all ranks, "begin" and "stop": [epoch,
    step] each, "how": by name, further arguments of the loaders.
    """
    import torch.distributed as dist

    from train.data import create_dataloaders

    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    for name, how in told["how"].items():
        train_loader, test_loader = create_dataloaders(
            told["data"],
            batch_size=told["batch_size"] // world,
            rank=rank,
            world=world,
            target="depth",
            normalize=False,
            num_workers=0,
            **how,
        )
        out = Path(told["out"], name)
        out.mkdir(parents=True, exist_ok=True)
        with open(out / f"{rank}.jsonl", "w") as file:
            step = told["begin"][1]
            for epoch in range(told["begin"][0], told["stop"][0] + 1):
                train_loader.set_epoch(epoch, step)
                for batch in train_loader:
                    if [epoch, step] == told["stop"]:
                        break
                    print(json.dumps([epoch, step, rows_of(batch)]), file=file)
                    if world > 1:
                        dist.barrier()  # ranks keep step, as those of a training do
                    step += 1
                step = 0
            for step, batch in enumerate(test_loader):
                print(json.dumps(["test", step, rows_of(batch)]), file=file)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    write_down(json.loads(sys.argv[1]))
