"""torch's DataLoader over memory maps of plain files, a batch an item."""

from pathlib import Path
from typing import Any

from bench.peers import with_memmap
from bench.peers.rows import Rows

build = with_memmap.build


def batches(rows: Rows, store: Path, n_workers: int) -> Any:
    """One indexing a field and batch."""
    dataset = with_memmap.MapsByBatch(rows, store)
    return with_memmap.loader_of(dataset, n_workers, collate_fn=with_memmap.as_it_is)
