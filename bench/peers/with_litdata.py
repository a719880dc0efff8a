"""LitData: chunks of 64 MB of tensors, by its StreamingDataset and StreamingDataLoader."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

from bench.peers.rows import BATCH, Batch, Rows


class AsSample:
    """A row by its number, for `optimize`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: Rows | None = None  # opened in the process that reads it

    def __call__(self, number: int) -> dict[str, Any]:
        """Tensors and a number."""
        if self.rows is None:
            self.rows = Rows(self.path)
        row = self.rows[number]
        rgb = torch.from_numpy(row.rgb.copy())
        return {"rgb": rgb, "depth": torch.from_numpy(row.depth.copy()), "row": number}


def build(rows: Rows, store: Path) -> None:
    """By one process, so that each chunk but the last is full."""
    optimize(
        fn=AsSample(rows.path),
        inputs=list(range(len(rows))),
        output_dir=str(store / "chunks"),
        chunk_bytes="64MB",
        num_workers=1,
    )


class Loaded:
    """Its batches as three tensors."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield batch["rgb"], batch["depth"], batch["row"]


def batches(rows: Rows, store: Path, n_workers: int) -> Loaded:
    """The chunks where they lie: nothing is copied to a cache."""
    dataset = StreamingDataset(str(store / "chunks"), shuffle=True, drop_last=True)
    kept = n_workers > 0
    loader = StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=n_workers, persistent_workers=kept, drop_last=True
    )
    return Loaded(loader)
