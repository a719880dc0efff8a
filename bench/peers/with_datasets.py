"""Hugging Face datasets: bytes in Arrow columns, taken a batch at a time as an Arrow table.

Its arrays (`Array3D`, `with_format("torch")`) are what its guide begins with; columns of bytes
read as Arrow are faster, as no element becomes a Python number on the way.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value, load_from_disk

from bench.peers.rows import Rows
from bench.peers.with_memmap import as_it_is, loader_of

BINARY = {"rgb": Value("large_binary"), "depth": Value("large_binary"), "row": Value("int64")}


def build(rows: Rows, store: Path) -> None:
    """Columns of bytes."""

    def each() -> Iterator[dict[str, Any]]:
        for row in rows:
            rgb = row.rgb.tobytes()
            yield {"rgb": rgb, "depth": row.depth.tobytes(), "row": row.number}

    cache = str(store / "cache")
    made = Dataset.from_generator(each, features=Features(BINARY), cache_dir=cache)
    made.save_to_disk(str(store / "arrow"))


class Columns(torch.utils.data.Dataset[Any]):
    """A batch an item: the values of a column are copied into the batch."""

    def __init__(self, rows: Rows, store: Path) -> None:
        self.stored = load_from_disk(str(store / "arrow")).with_format("arrow")
        self.shapes = {"rgb": rows[0].rgb.shape, "depth": rows[0].depth.shape}
        self.types = {"rgb": np.uint8, "depth": np.int16}

    def __len__(self) -> int:
        return len(self.stored)

    def __getitems__(self, indices: list[int]) -> Any:
        """(rgb, depth, numbers) of a batch."""
        table = self.stored[indices]
        parts = [self._array(table, name) for name in ("rgb", "depth")]
        numbers = torch.from_numpy(table["row"].to_numpy().copy())
        return *map(torch.from_numpy, parts), numbers

    def _array(self, table: Any, name: str) -> np.ndarray:
        batch = np.empty((len(table), *self.shapes[name]), self.types[name])
        at = 0
        for chunk in table[name].chunks:
            _, offsets, data = chunk.buffers()
            starts = np.frombuffer(offsets, np.int64)[chunk.offset :][: len(chunk) + 1]
            values = np.frombuffer(data, np.uint8)[starts[0] : starts[-1]]
            rows = values.view(self.types[name]).reshape(len(chunk), *self.shapes[name])
            batch[at : at + len(chunk)] = rows
            at += len(chunk)
        return batch


def batches(rows: Rows, store: Path, n_workers: int) -> Any:
    """torch's DataLoader."""
    return loader_of(Columns(rows, store), n_workers, collate_fn=as_it_is)
