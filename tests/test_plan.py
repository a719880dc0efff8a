"""A plan is plain data: each row of each field is decoded once, and bytes follow from it."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.executors import MIN_SLOTS
from convert.plan import ROWS_PER_TASK, Part, Plan, Task, plan_tasks
from convert.shard import FullShard, write_shard
from shards.files import LocalFolder
from shards.spec import Codecs, ConversionSettings, SourceIdentity, field_of_kind

FIELDS = [
    field_of_kind("rgb", "colour"),
    field_of_kind("depth", "depth"),
    field_of_kind("label", "id"),
    field_of_kind("thermal", "grey"),
]
NAMES = tuple(field.name for field in FIELDS)
READERS = range(len(FIELDS))  # one a field here
IDENTITY = SourceIdentity(kind="table", name="made up", n_bytes=1, sha256="0" * 64)


def plan_of(n_rows: int, rows_per_shard: int, codecs: Codecs = None) -> Plan:
    return Plan(
        dataset="lab",
        settings=ConversionSettings(
            fields=NAMES, size=8, rows_per_shard=rows_per_shard, kinds={"thermal": "grey"}
        ),
        source=IDENTITY,
        fields=FIELDS,
        n_rows=n_rows,
        codecs=codecs,
    )


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, list[int], set[int]]:
    """A plan, how many rows each reader decodes together, and the shards that are done."""
    plan = plan_of(draw(st.integers(1, 150)), draw(st.integers(1, 40)))
    group_rows = [draw(st.integers(1, 60)) for _ in NAMES]
    done = draw(st.sets(st.integers(0, len(plan.bounds) - 1)))
    return plan, group_rows, done


def rows_of(task: Task, plan: Plan, group_rows: list[int]) -> range:
    step = group_rows[task.reader]
    return range(task.groups.start * step, min(task.groups.stop * step, plan.n_rows))


def shards_of(rows: range, plan: Plan) -> set[int]:
    return {row // plan.settings.rows_per_shard for row in rows}


def still_to_do(plan: Plan, done: Collection[int]) -> set[int]:
    return set(range(len(plan.bounds))) - set(done)


@given(plans())
@settings(deadline=None)
def test_every_row_of_every_reader_is_in_exactly_one_tasks_groups(
    planned: tuple[Plan, list[int], set[int]],
) -> None:
    plan, group_rows, _ = planned
    tasks = plan_tasks(plan, group_rows, range(len(plan.bounds)))
    counts = Counter(
        (task.reader, row) for task in tasks for row in rows_of(task, plan, group_rows)
    )
    assert counts == Counter((k, row) for k in READERS for row in range(plan.n_rows))


@given(plans())
@settings(deadline=None)
def test_tasks_cover_once_what_is_not_done_and_touch_no_shard_that_is(
    planned: tuple[Plan, list[int], set[int]],
) -> None:
    plan, group_rows, done = planned
    counts: Counter[tuple[int, int]] = Counter()
    for task in plan_tasks(plan, group_rows, still_to_do(plan, done)):
        rows = rows_of(task, plan, group_rows)
        assert task.shards
        assert set(task.shards) == shards_of(rows, plan) - done
        counts.update((task.reader, row) for row in rows)

    step = plan.settings.rows_per_shard
    todo = [row for row in range(plan.n_rows) if row // step not in done]
    assert all(counts[k, row] == 1 for k in READERS for row in todo)
    assert not counts or max(counts.values()) == 1


@given(plans())
@settings(deadline=None)
def test_the_order_is_by_shard_then_reader_then_row(
    planned: tuple[Plan, list[int], set[int]],
) -> None:
    plan, group_rows, done = planned
    tasks = plan_tasks(plan, group_rows, still_to_do(plan, done))
    step = plan.settings.rows_per_shard
    places = []
    for task in tasks:
        first_row = rows_of(task, plan, group_rows)[0]
        places.append((first_row // step, task.reader, first_row))
    assert places == sorted(set(places))
    assert places == [(task.shard, task.reader, task.first_row) for task in tasks]


@given(plans())
@settings(deadline=None)
def test_a_task_is_one_large_group_or_a_few_small_ones(
    planned: tuple[Plan, list[int], set[int]],
) -> None:
    plan, group_rows, done = planned
    for task in plan_tasks(plan, group_rows, still_to_do(plan, done)):
        assert len(rows_of(task, plan, group_rows)) <= max(ROWS_PER_TASK, group_rows[task.reader])


@given(plans())
@settings(deadline=None)
def test_where_everything_is_done_there_is_no_task(
    planned: tuple[Plan, list[int], set[int]],
) -> None:
    plan, group_rows, _ = planned
    assert plan_tasks(plan, group_rows, ()) == []


def most_open_at_once(tasks: Collection[Task], plan: Plan, group_rows: list[int]) -> int:
    """Shards that some prefix of the tasks has begun and not ended."""
    n_missing = {k: plan.n_rows_of(k) * len(NAMES) for task in tasks for k in task.shards}
    is_open: set[int] = set()
    most = 0
    for task in tasks:
        is_open |= set(task.shards)
        most = max(most, len(is_open))
        for row in rows_of(task, plan, group_rows):
            shard = row // plan.settings.rows_per_shard
            if shard in n_missing:
                n_missing[shard] -= 1
        is_open = {k for k in is_open if n_missing[k] > 0}
    assert not is_open
    return most


@given(plans())
@settings(max_examples=300, deadline=None)
def test_no_more_shards_are_open_at_once_than_an_executor_holds(
    planned: tuple[Plan, list[int], set[int]],
) -> None:
    plan, group_rows, done = planned
    tasks = plan_tasks(plan, group_rows, still_to_do(plan, done))
    n_slots = max(MIN_SLOTS, *(len(task.shards) for task in tasks), 0)  # as LocalExecutor takes
    assert most_open_at_once(tasks, plan, group_rows) <= n_slots


@given(plans())
@settings(deadline=None)
def test_the_same_plan_gives_the_same_tasks(
    planned: tuple[Plan, list[int], set[int]],
) -> None:
    plan, group_rows, done = planned
    first = plan_tasks(plan, group_rows, still_to_do(plan, done))
    wanted = sorted(still_to_do(plan, done), reverse=True)
    again = plan_tasks(plan, tuple(group_rows), wanted)
    assert [vars(task) for task in first] == [vars(task) for task in again]


def test_bounds_and_sizes_follow_from_the_plan() -> None:
    plan = plan_of(21, 8)
    assert plan.bounds == [(0, 8), (8, 16), (16, 21)]
    assert [plan.n_rows_of(k) for k in range(3)] == [8, 8, 5]
    assert plan.row_bytes == 64 * (3 + 2 + 2 + 1)
    assert plan.directory_name == f"lab-8-{plan.fingerprint[:8]}"


# ---------------------------------------------------------------- the bytes of a shard


def files_in(directory: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "codecs",
    [None, dict.fromkeys(NAMES, "none"), dict.fromkeys(NAMES, "zstd")],
    ids=["npy", "zarr", "zstd"],
)
def test_a_shard_written_twice_is_the_same_bytes(codecs: Codecs, tmp_path: Path) -> None:
    plan = plan_of(21, 8, codecs)
    rng = np.random.default_rng(3)
    is_train = rng.random(21) < 0.6
    for k in range(3):
        n_rows = plan.n_rows_of(k)
        arrays = {
            field.name: rng.integers(0, 200, (n_rows, *field.row_shape(8))).astype(field.dtype)
            for field in FIELDS
        }
        receipts = []
        for where in ("once", "twice"):
            (tmp_path / where).mkdir(exist_ok=True)
            shard = FullShard(
                number=k, arrays=arrays, sizes=np.zeros((n_rows, 2), "<u2"), failed={}
            )
            of_shard = is_train[slice(*plan.bounds[k])]
            folder = LocalFolder(tmp_path / where)
            receipts.append(write_shard(plan, shard, of_shard, folder))
        assert receipts[0] == receipts[1]
        assert (receipts[0].entry.start, receipts[0].entry.stop) == plan.bounds[k]
        thermal = arrays["thermal"][is_train[slice(*plan.bounds[k])]].astype(int)
        sums = (thermal.size, int(thermal.sum()), int((thermal**2).sum()))
        assert receipts[0].entry.sums["thermal"] == (sums,)

    once = files_in(tmp_path / "once")
    assert once == files_in(tmp_path / "twice")
    assert len(once) == 3 * len(NAMES)


@given(n_shards=st.integers(1, 300), of=st.integers(1, 40))
def test_each_shard_is_in_one_part_and_parts_differ_by_one_shard_at_most(
    n_shards: int, of: int
) -> None:
    parts = [Part(number=number, of=of).shards(n_shards) for number in range(1, of + 1)]
    assert [k for part in parts for k in part] == list(range(n_shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
