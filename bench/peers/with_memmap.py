"""torch's DataLoader over memory maps of plain files, a row an item: what people write."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.peers.rows import BATCH, Rows


def build(rows: Rows, store: Path) -> None:
    """A file a field, with all rows behind each other."""
    with open(store / "rgb.bin", "wb") as rgb, open(store / "depth.bin", "wb") as depth:
        for row in rows:
            rgb.write(row.rgb)
            depth.write(row.depth)


class Maps(Dataset[Any]):
    """A row an item. Maps are opened where they are used: a map that is pickled is a copy."""

    def __init__(self, rows: Rows, store: Path) -> None:
        self.store = store
        self.n_rows = len(rows)
        self.size = rows.size
        self.rgb: np.ndarray | None = None
        self.depth: np.ndarray | None = None

    def __len__(self) -> int:
        return self.n_rows

    def open(self) -> tuple[np.ndarray, np.ndarray]:
        """(rgb [N,3,S,S], depth [N,S,S])."""
        if self.rgb is None or self.depth is None:
            shape = (self.n_rows, self.size, self.size)
            of_rgb = (self.n_rows, 3, self.size, self.size)
            self.rgb = np.memmap(self.store / "rgb.bin", np.uint8, "r", shape=of_rgb)
            self.depth = np.memmap(self.store / "depth.bin", np.int16, "r", shape=shape)
        return self.rgb, self.depth

    def __getitem__(self, i: int) -> Any:
        rgb, depth = self.open()
        return torch.from_numpy(rgb[i].copy()), torch.from_numpy(depth[i].copy()), i


class MapsByBatch(Maps):
    """The same, asked for a batch at once: one indexing a field, no collation."""

    def __getitems__(self, indices: list[int]) -> Any:
        """The rows of a batch, which torch hands on to `collate_fn`."""
        rgb, depth = self.open()
        numbers = np.array(indices)
        taken = np.take(rgb, numbers, 0), np.take(depth, numbers, 0), numbers
        return tuple(map(torch.from_numpy, taken))


def as_it_is(batch: Any) -> Any:
    """A collate_fn for batches that are batches already."""
    return batch


def loader_of(dataset: Any, n_workers: int, **more: Any) -> DataLoader[Any]:
    """torch's, shuffled, its workers kept."""
    return DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=n_workers,
        persistent_workers=n_workers > 0,
        **more,
    )


def batches(rows: Rows, store: Path, n_workers: int) -> DataLoader[Any]:
    """A row an item, torch's own collation."""
    return loader_of(Maps(rows, store), n_workers)
