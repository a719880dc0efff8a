"""Rows that could not be read: told in failed.csv and in the column status, and how many may be.

A row fails for what its bytes are; what the disk or the network does ends the conversion instead.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shards.dataset import StoredSet
from shards.errors import DamagedSet, Naming, UserError, WrongSource, as_argument
from shards.files import LocalFolder, WritableFolder, log
from shards.manifest import (
    FAILED,
    FAILED_ROW,
    RIGHT_ROW,
    ColumnValues,
    Receipt,
    RowsRead,
    receipt_name,
)

SHOWN = 3  # failed rows in a message
# More than are allowed, after which a conversion gives up: a wrong root fails every row.
MANY_FAILED = 100
HEADER = ("set_row", "row", "rgb_file", "problem")


class FailedRows(WrongSource):
    """More rows cannot be read than may fail.

    failed: by the row's number in the set, what is wrong. listed: the file that has all of them.
    is_early: whether the conversion gave up before its last row.
    """

    def __init__(
        self, source: Any, failed: Mapping[int, str], n_rows: int, listed: str, is_early: bool
    ) -> None:
        self.source = source
        self.failed = dict(failed)
        self.n_rows = n_rows
        self.listed = listed
        self.is_early = is_early
        problem, right = self.words(as_argument)
        super().__init__(source, problem.removeprefix(f"{source} "), right)

    def words(self, naming: Naming) -> tuple[str, str]:
        n_failed = len(self.failed)
        first = "; ".join(list(self.failed.values())[:SHOWN])
        more = f"; all are in {self.listed}"
        if self.is_early:
            so_far = f"{n_failed} rows cannot be read, the rest was not tried: {first}{more}"
            return f"{self.source}: {so_far}", "Check where its paths lead, mend them"
        share = -(-n_failed * 10_000 // self.n_rows) / 10_000
        allowed = naming("max_failed", share)
        what = f"{n_failed} of {self.n_rows} rows cannot be read: {first}{more}"
        return f"{self.source}: {what}", f"Mend them and convert it again, or go without: {allowed}"


def most_failed(n_rows: int, share: float) -> int:
    """How many rows of so many may fail."""
    return int(share * n_rows + 1e-9)


def try_failed_again(folder: WritableFolder, done: dict[int, Receipt], n_allowed: int) -> None:
    """Leave out of `done` the shards with failed rows, where those are more than that: their files
    may have been mended since.

    A store keeps what is there, so they are removed from it.
    """
    with_failed = {k: receipt.failed for k, receipt in done.items()}
    if sum(map(len, with_failed.values())) <= n_allowed:
        return
    again = {k: done.pop(k) for k, failed in with_failed.items() if failed}
    if not isinstance(folder, LocalFolder):  # a receipt last: what it names is there until then
        folder.delete(*(name for receipt in again.values() for name in receipt.entry.files))
        folder.delete(*map(receipt_name, again))


def write_failed(
    folder: WritableFolder, failed: Mapping[int, str], columns: Mapping[str, ColumnValues]
) -> None:
    """failed.csv, or none where no row failed."""
    if not failed:
        folder.delete(FAILED)
        return
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(HEADER)
    for row, problem in failed.items():
        writer.writerow([row, int(columns["row"][row]), columns["rgb_file"][row], problem])
    folder.put(FAILED, table.getvalue().encode(errors="surrogateescape"))


def say_failed(failed: Mapping[int, str], n_rows: int, folder: WritableFolder) -> None:
    """A line for whoever watches, where rows failed in a set that is published."""
    if failed:
        first = next(iter(failed.values()))
        what = f"{len(failed)} of {n_rows} rows are left empty, and out of training"
        log(f"{what}: {first}; all are in {folder}/{FAILED}")


# ------------------------------------------------------------------- between receipts and columns


def columns_of_rows_read(rows: Sequence[RowsRead]) -> dict[str, np.ndarray]:
    """The columns size and status, of the shards in order."""
    sizes = np.concatenate([each.sizes for each in rows])
    status = np.full(len(sizes), RIGHT_ROW, "|u1")
    for each in rows:
        status[list(each.failed)] = FAILED_ROW
    return {"size": sizes, "status": status}


def rows_read_of(found: StoredSet) -> dict[int, RowsRead]:
    """By shard, what was found out when a finished set's rows were read; {} of a set whose source
    told it, or that has lost it: all of its shards are to be made again then.

    Why a row failed is in failed.csv alone: without it, it says so.
    """
    if found.settings.order_version == 0:
        return {}
    try:
        sizes = found.column("size")
        status = found.column("status")
    except DamagedSet:
        return {}
    problems = _problems(found)
    n_labels = len(found.dataset.label_names)
    ids = [name for name, field in found.manifest.fields.items() if field.kind == "id"]
    rows = {}
    for k, (start, stop) in enumerate(found.manifest.bounds):
        failed_rows = start + np.flatnonzero(status[start:stop] != RIGHT_ROW)
        rows[k] = RowsRead(
            sizes=sizes[start:stop].astype("<u2"),
            failed={int(row): problems.get(int(row), "was not readable") for row in failed_rows},
            highest={name: n_labels if name == "label" else 0 for name in ids},
        )
    return rows


def _problems(found: StoredSet) -> dict[int, str]:
    """From failed.csv, which nothing vouches for: a set is right without it."""
    try:
        lines = io.StringIO(found.folder.read(FAILED).decode(), newline="")
        return {int(line["set_row"]): line["problem"] for line in csv.DictReader(lines)}
    except (OSError, UserError, ValueError, KeyError, TypeError, csv.Error):
        return {}
