"""Grain: uncompressed ArrayRecord files, a MapDataset shuffled anew every epoch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import torch
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter

from bench.peers.rows import BATCH, Batch, Rows


def build(rows: Rows, store: Path) -> None:
    """One record a group: each is read alone."""
    writer = ArrayRecordWriter(str(store / "rows.array_record"), "group_size:1,uncompressed")
    for row in rows:
        number = np.int64(row.number).tobytes()
        writer.write(number + row.rgb.tobytes() + row.depth.tobytes())
    writer.close()


class Parse:
    """A record as arrays, without a copy."""

    def __init__(self, rows: Rows) -> None:
        self.rgb_shape = rows[0].rgb.shape
        self.depth_shape = rows[0].depth.shape
        self.depth_at = 8 + rows[0].rgb.nbytes

    def __call__(self, record: bytes) -> Any:
        """(rgb, depth, number)."""
        data = np.frombuffer(record, np.uint8)
        number = data[:8].view(np.int64)[0]
        rgb = data[8 : self.depth_at].reshape(self.rgb_shape)
        return rgb, data[self.depth_at :].view(np.int16).reshape(self.depth_shape), number


class Epochs:
    """One iteration over an endless dataset, which keeps its workers; an epoch at a time."""

    def __init__(self, dataset: Any, n_batches: int) -> None:
        self.batches = iter(dataset)
        self.n_batches = n_batches

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.n_batches):
            rgb, depth, numbers = next(self.batches)
            yield torch.from_numpy(rgb), torch.from_numpy(depth), torch.from_numpy(numbers)


def batches(rows: Rows, store: Path, n_workers: int) -> Epochs:
    """Batched before it is read, in workers of its own where there are some."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["bench"])
    source = grain.sources.ArrayRecordDataSource([str(store / "rows.array_record")])
    dataset = grain.MapDataset.source(source).seed(0).shuffle().map(Parse(rows))
    dataset = dataset.batch(BATCH, drop_remainder=True)
    n_batches = len(dataset)
    # As its options say: data that is in memory already is read with no threads of its own.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    endless = dataset.repeat().to_iter_dataset(options)
    if n_workers:
        workers = grain.MultiprocessingOptions(num_workers=n_workers, per_worker_buffer_size=2)
        endless = endless.mp_prefetch(workers)
    return Epochs(endless, n_batches)
