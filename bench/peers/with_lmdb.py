"""LMDB: the bytes of a row as one value, read without a copy (buffers=True) and without a lock."""

from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch

from bench.peers.rows import Rows
from bench.peers.with_memmap import as_it_is, loader_of

SPARE = 2  # the map is made this many times as large as the rows; the file grows as it is filled


def key_of(number: int) -> bytes:
    """Big-endian, so that keys are in the order of the rows."""
    return number.to_bytes(8, "big")


def build(rows: Rows, store: Path) -> None:
    """All rows in one transaction."""
    map_size = SPARE * len(rows) * rows.row_bytes + (1 << 24)
    environment = lmdb.open(str(store), map_size=map_size)
    with environment.begin(write=True) as transaction:
        for row in rows:
            value = row.rgb.tobytes() + row.depth.tobytes()
            transaction.put(key_of(row.number), value, append=True)
    environment.close()


class Values(torch.utils.data.Dataset[Any]):
    """A batch an item: values are copied once, into the batch."""

    def __init__(self, rows: Rows, store: Path) -> None:
        self.store = str(store)
        self.n_rows = len(rows)
        self.rgb_shape = rows[0].rgb.shape
        self.depth_shape = rows[0].depth.shape
        self.environment: Any = None  # opened where it is used: it must not be carried over a fork

    def __len__(self) -> int:
        return self.n_rows

    def __getitems__(self, indices: list[int]) -> Any:
        """(rgb, depth, numbers) of a batch."""
        if self.environment is None:
            settings = {"readonly": True, "lock": False, "readahead": False}
            self.environment = lmdb.open(self.store, **settings)
        rgb = np.empty((len(indices), *self.rgb_shape), np.uint8)
        depth = np.empty((len(indices), *self.depth_shape), np.int16)
        n_bytes = rgb[0].nbytes
        with self.environment.begin(buffers=True) as transaction:
            for at, number in enumerate(indices):
                value = np.frombuffer(transaction.get(key_of(number)), np.uint8)
                rgb[at] = value[:n_bytes].reshape(self.rgb_shape)
                depth[at] = value[n_bytes:].view(np.int16).reshape(self.depth_shape)
        return torch.from_numpy(rgb), torch.from_numpy(depth), torch.tensor(indices)


def batches(rows: Rows, store: Path, n_workers: int) -> Any:
    """torch's DataLoader."""
    return loader_of(Values(rows, store), n_workers, collate_fn=as_it_is)
