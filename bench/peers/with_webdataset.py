"""WebDataset: tar files of raw bytes, shuffled in a buffer, batched in the workers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from bench.peers.rows import BATCH, Batch, Rows

ROWS_A_TAR = 128
SHUFFLED = 1000  # rows that wait to be drawn from, as its guide has it


def build(rows: Rows, store: Path) -> None:
    """Tar files of as many rows as our shards have."""
    pattern = str(store / "rows-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=ROWS_A_TAR, verbose=0) as writer:
        for row in rows:
            parts = {"rgb": row.rgb.tobytes(), "depth": row.depth.tobytes()}
            writer.write({"__key__": f"{row.number:08d}", **parts})


class AsBatch:
    """A list of samples as three tensors, each value copied once."""

    def __init__(self, rows: Rows) -> None:
        self.rgb_shape = rows[0].rgb.shape
        self.depth_shape = rows[0].depth.shape

    def __call__(self, samples: list[Any]) -> Batch:
        """(rgb, depth, numbers)."""
        rgb = np.empty((len(samples), *self.rgb_shape), np.uint8)
        depth = np.empty((len(samples), *self.depth_shape), np.int16)
        for at, (_, of_rgb, of_depth) in enumerate(samples):
            rgb[at] = np.frombuffer(of_rgb, np.uint8).reshape(self.rgb_shape)
            depth[at] = np.frombuffer(of_depth, np.int16).reshape(self.depth_shape)
        numbers = torch.tensor([int(key) for key, _, _ in samples])
        return torch.from_numpy(rgb), torch.from_numpy(depth), numbers


def batches(rows: Rows, store: Path, n_workers: int) -> Any:
    """Its WebLoader, which hands on what workers have batched."""
    tars = sorted(map(str, store.glob("rows-*.tar")))
    # Workers of torch get whole tar files, so that each row comes once.
    dataset = (
        wds.WebDataset(tars, shardshuffle=len(tars), detshuffle=True)
        .shuffle(SHUFFLED)
        .to_tuple("__key__", "rgb", "depth")
        .batched(BATCH, collation_fn=AsBatch(rows), partial=False)
    )
    kept = n_workers > 0
    return wds.WebLoader(dataset, batch_size=None, num_workers=n_workers, persistent_workers=kept)
