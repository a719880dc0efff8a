"""tensordict: a memory-mapped TensorDict, from which a batch is one index operation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import MemoryMappedTensor, TensorDict

from bench.peers.rows import Batch, Rows
from bench.peers.with_memmap import as_it_is, loader_of


def build(rows: Rows, store: Path) -> None:
    """As its guide does: the maps first, then filled row by row."""
    n = len(rows)
    first = rows[0]
    empty = {
        "rgb": MemoryMappedTensor.empty((n, *first.rgb.shape), dtype=torch.uint8),
        "depth": MemoryMappedTensor.empty((n, *first.depth.shape), dtype=torch.int16),
        "row": MemoryMappedTensor.empty((n,), dtype=torch.int64),
    }
    stored = TensorDict(empty, batch_size=[n]).memmap_like(str(store))
    for row in rows:
        stored["rgb"][row.number] = torch.from_numpy(row.rgb.copy())
        stored["depth"][row.number] = torch.from_numpy(row.depth.copy())
        stored["row"][row.number] = row.number


class Loaded:
    """Its batches as three tensors."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield batch["rgb"], batch["depth"], batch["row"]


def batches(rows: Rows, store: Path, n_workers: int) -> Loaded:
    """torch's DataLoader over the TensorDict itself."""
    stored = TensorDict.load_memmap(str(store))
    return Loaded(loader_of(stored, n_workers, collate_fn=as_it_is))
