"""This project's loader: as `create_dataloaders` makes it."""

from collections.abc import Iterator
from pathlib import Path

import torch

from bench.loader import our_loader
from bench.peers.rows import BATCH, Batch, Rows
from loader.loader import Loader
from train.order import Batches


def build(rows: Rows, store: Path) -> None:
    """Nothing: the set is the store."""


class Ours:
    """Its batches, with the numbers of their rows in place of the labels."""

    def __init__(self, loader: Loader, n_rows: int) -> None:
        self.loader = loader
        self.order = Batches(n_rows, BATCH, 0)  # as the loader has it
        self.epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        batches = zip(self.loader, self.order(self.epoch), strict=True)
        self.epoch += 1
        for (rgb, depth, _), positions in batches:
            yield rgb, depth, torch.from_numpy(positions)


def batches(rows: Rows, store: Path, n_workers: int) -> Ours:
    """A thread ahead, or forked workers."""
    path = str(rows.path)
    method = "fork" if n_workers else None
    return Ours(our_loader(path, n_workers, method), len(rows))
