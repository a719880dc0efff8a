"""The rows that every reader is given: pictures, depths and numbers of a set of ours."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.dataset import open_set
from train.data import ShardDataset

BATCH = 128

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rgb uint8 [B,3,S,S], depth int16
# [B,S,S], row int64 [B]


@dataclass(frozen=True)
class Row:
    """One row as it is stored: rgb uint8 [3,S,S], depth int16 [S,S] (the bytes of uint16), which.

    The number stands where a label would: as many bytes, and it tells what was delivered.
    """

    rgb: np.ndarray
    depth: np.ndarray
    number: int


class Rows:
    """Those of a finished set that a training sees, mapped; a row's number is its position there.

    A row without a class of scene is none of them.
    """

    def __init__(self, path: Path) -> None:
        found = open_set(path)
        self.path = path
        dataset = ShardDataset(path, split="all")
        self.stored_at = dataset.rows_of(np.arange(len(dataset)))
        self.rows_per_shard = found.settings.rows_per_shard
        self.size = found.settings.size
        self._rgb = [np.asarray(shard) for shard in found.shards("rgb")]
        self._depth = [np.asarray(shard).view(np.int16) for shard in found.shards("depth")]

    def __len__(self) -> int:
        return len(self.stored_at)

    def __getitem__(self, number: int) -> Row:
        shard, place = divmod(int(self.stored_at[number]), self.rows_per_shard)
        return Row(self._rgb[shard][place], self._depth[shard][place], number)

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    @property
    def row_bytes(self) -> int:
        """Of picture and depth."""
        first = self[0]
        return first.rgb.nbytes + first.depth.nbytes


class WrongRows(Exception):
    """What a reader delivered is not what it was given."""


def check_epoch(rows: Rows, batches: Any, n_workers: int) -> int:
    """Compare every byte of an epoch with the set; the number of rows in it.

    A reader may leave out a last batch that is not full, and so may each of its workers. Raises
    WrongRows for other bytes, a row that comes twice, too few of them, or the order of the set.
    """
    seen: list[int] = []
    for rgb, depth, numbers in batches:
        for at, number in enumerate(numbers.tolist()):
            row = rows[number]
            if not np.array_equal(row.rgb, rgb[at].numpy()):
                raise WrongRows(f"the picture of row {number} has other bytes")
            if not np.array_equal(row.depth, depth[at].numpy().reshape(row.depth.shape)):
                raise WrongRows(f"the depth of row {number} has other bytes")
        seen += numbers.tolist()

    if len(set(seen)) != len(seen):
        raise WrongRows(f"{len(seen) - len(set(seen))} rows came twice in an epoch")
    fewest = len(rows) - (BATCH - 1) * max(1, n_workers)
    if len(seen) < fewest:
        raise WrongRows(f"{len(seen)} rows in an epoch, of {len(rows)}")
    if set(seen[:BATCH]) == set(range(BATCH)):
        raise WrongRows("the first batch has the first rows of the set: nothing was shuffled")
    return len(seen)
