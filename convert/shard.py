"""One shard of a plan: decoded, written, and what is put down of it.

The bytes of shard k are one pure function of (plan, k), whoever makes it, however often: threads
and processes of this machine, or workers of a cluster.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from convert.plan import Plan
from convert.sources.base import RowFacts
from convert.statistics import train_sums
from shards.containers import write_field
from shards.files import FileEntry, WritableFolder
from shards.manifest import ChannelSums, Receipt, RowsRead, ShardEntry
from shards.spec import SPLITS

TRAIN = SPLITS.index("train")


@dataclass(frozen=True, kw_only=True)
class FullShard:
    """A shard whose every row was decoded.

    arrays: of each field, [n, ...]. sizes: [n, 2] <u2 height and width of each original picture; of
    planes as MATLAB stores them nothing is put down. failed: by the row's number in the set, what
    is wrong with it.
    """

    number: int
    arrays: Mapping[str, np.ndarray]
    sizes: np.ndarray
    failed: Mapping[int, str]


def is_train_of(facts: RowFacts, plan: Plan, shard: int) -> np.ndarray:
    """[n] of a shard's rows: whether they are train rows, of which statistics are made."""
    start, stop = plan.bounds_of(shard)
    if "split" not in facts.columns:
        return np.ones(stop - start, bool)
    split = np.asarray(facts.columns["split"])
    is_train: np.ndarray = split[start:stop] == TRAIN
    return is_train


def write_shard(
    plan: Plan, shard: FullShard, is_train: np.ndarray, folder: WritableFolder
) -> Receipt:
    """Make a shard durable in the set's folder; its receipt, which is written once all of it is.

    is_train: [n] of the shard's rows; statistics are of these, but for those that failed.
    """
    start, stop = plan.bounds_of(shard.number)
    is_counted = is_train.copy()
    is_counted[[row - start for row in shard.failed]] = False
    train_rows = np.flatnonzero(is_counted)
    files: dict[str, FileEntry] = {}
    sums: dict[str, tuple[ChannelSums, ...]] = {}
    for field in plan.fields:
        rows = shard.arrays[field.name]
        files |= write_field(folder, field, shard.number, rows, plan.form)
        sums[field.name] = train_sums(field, (rows[place] for place in train_rows))
    return Receipt(
        entry=ShardEntry(start=start, stop=stop, files=files, sums=sums),
        codecs=plan.codecs,
        decoder=plan.decoder,
        rows=_rows_read(plan, shard) if plan.rows_differ else None,
    )


def _rows_read(plan: Plan, shard: FullShard) -> RowsRead:
    ids = [field.name for field in plan.fields if field.kind == "id"]
    return RowsRead(
        sizes=shard.sizes.copy(),  # its buffer is used again
        failed=shard.failed,
        highest={name: int(shard.arrays[name].max()) for name in ids},
    )
