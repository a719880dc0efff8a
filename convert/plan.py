"""What a conversion will do, as plain data: nothing here opens, reads or writes anything.

Plan        which rows, shards and fields: the bytes of shard k follow from (plan, k)
Part        which of its shards one of several commands makes
plan_tasks  Plan + how the rows lie in the source + the shards that are wanted  ->  list[Task]
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shards.containers import ShardForm
from shards.manifest import bounds_of
from shards.spec import Box, Codecs, ConversionSettings, Field, SourceIdentity, fingerprint
from shards.writing import ShardsOfSet, set_name

ROWS_PER_TASK = 8  # or one group of rows that are decoded together, where it is larger


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A set that is to be made.

    box: what is stored of each picture; None: all of it. decoder: of its pictures, with the
    version; None: nothing decodes any. rows_differ: as of its source.
    """

    dataset: str
    settings: ConversionSettings
    source: SourceIdentity
    fields: Sequence[Field]
    n_rows: int
    box: Box | None = None
    codecs: Codecs = None
    decoder: str | None = None
    rows_differ: bool = False

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings, self.source)

    @property
    def directory_name(self) -> str:
        return set_name(self.dataset, self.settings.size, self.fingerprint, self.codecs)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of each shard."""
        return bounds_of(self.n_rows, self.settings.rows_per_shard)

    @property
    def form(self) -> ShardForm:
        """How its shards are stored."""
        return ShardForm(codecs=self.codecs, n_slots=self.settings.rows_per_shard)

    @property
    def form_of_shards(self) -> ShardsOfSet:
        """What a receipt of one of them has to name."""
        return ShardsOfSet(bounds=self.bounds, fields=self.fields, codecs=self.codecs)

    @property
    def row_bytes(self) -> int:
        """Of one stored row of all fields."""
        return sum(each.row_bytes(self.settings.size) for each in self.fields)

    def bounds_of(self, shard: int) -> tuple[int, int]:
        """(first row, row after the last) of one shard."""
        first = shard * self.settings.rows_per_shard
        return first, min(first + self.settings.rows_per_shard, self.n_rows)

    def n_rows_of(self, shard: int) -> int:
        first = shard * self.settings.rows_per_shard
        return min(self.settings.rows_per_shard, self.n_rows - first)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of `of` commands that make a set together; `number` counts from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def shards(self, n_shards: int) -> range:
        """Those it makes, of so many: neighbours, which may share what has to be decoded."""
        return range((self.number - 1) * n_shards // self.of, self.number * n_shards // self.of)


@dataclass(frozen=True, order=True)
class Task:
    """Some groups of rows of one reader; in the order in which tasks are done.

    Shard by shard, and in a shard reader by reader: few shards are open at once.
    """

    shard: int  # that its first row falls in
    reader: int  # its place among the readers
    first_row: int
    groups: range = dataclasses.field(compare=False)
    # That its rows fall in and that are not done.
    shards: tuple[int, ...] = dataclasses.field(compare=False)


def plan_tasks(plan: Plan, group_rows: Sequence[int], wanted: Collection[int]) -> list[Task]:
    """All that is needed for these shards, in order.

    group_rows: of each reader, how many rows of the source are decoded together.
    """
    tasks = []
    todo_shards = set(wanted)
    for reader, rows_per_group in enumerate(group_rows):
        groups_per_task = max(1, ROWS_PER_TASK // rows_per_group)
        n_groups = -(-plan.n_rows // rows_per_group)
        for first_group in range(0, n_groups, groups_per_task):
            groups = range(first_group, min(first_group + groups_per_task, n_groups))
            first_row = groups.start * rows_per_group
            last_row = min(groups.stop * rows_per_group, plan.n_rows) - 1
            shards = _shards_between(plan, first_row, last_row)
            todo = tuple(k for k in shards if k in todo_shards)
            if todo:
                tasks.append(Task(shards.start, reader, first_row, groups=groups, shards=todo))
    return sorted(tasks)


def _shards_between(plan: Plan, first_row: int, last_row: int) -> range:
    """The shards that these rows fall in."""
    step = plan.settings.rows_per_shard
    return range(first_row // step, last_row // step + 1)
