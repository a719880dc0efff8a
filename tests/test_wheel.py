"""The wheel: every row once, a pure function of (seed, epoch), whoever asks for which batch; and
the shards that an order reads, and when.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.made_up import FIELDS, LAB
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.dataset import ShardSet
from shards.errors import UserError
from shards.manifest import Manifest, ShardEntry, bounds_of
from shards.spec import ConversionSettings, SourceIdentity
from train.caching import shards_of_rows
from train.joined import JoinedSet
from train.order import Batches, RowOrder, Visits
from train.wheel import Wheel, WheelBatches

SHARD_ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(np.array)
IN_PLAY = st.integers(1, 15)  # also more than there are shards
EPOCHS = st.integers(0, 5)
few = settings(max_examples=60)


@st.composite
def wheels(draw: st.DrawFn) -> WheelBatches:
    """Of one rank of 1 to 4; some with shards of which a split has no row."""
    shard_rows = draw(SHARD_ROWS)
    if draw(st.booleans()):
        shard_rows = np.insert(shard_rows, draw(st.integers(0, len(shard_rows))), 0)
    world = draw(st.integers(1, min(4, int(shard_rows.sum()))))
    return WheelBatches(
        shard_rows=shard_rows,
        in_play=draw(IN_PLAY),
        batch_size=draw(st.integers(1, 60)),
        seed=draw(st.integers(0, 2**64 - 1)),
        rank=draw(st.integers(0, world - 1)),
        world=world,
    )


@st.composite
def plain_orders(draw: st.DrawFn) -> tuple[Batches, np.ndarray]:
    """Rows shuffled all together, or in order, and how many of them lie in each shard."""
    shard_rows = draw(SHARD_ROWS)
    n_rows = int(shard_rows.sum())
    world = draw(st.integers(1, min(4, n_rows)))
    order = Batches(
        n_rows=n_rows,
        batch_size=draw(st.integers(1, 60)),
        seed=draw(st.none() | st.integers(0, 9)),
        rank=draw(st.integers(0, world - 1)),
        world=world,
    )
    return order, shard_rows


def of_every_rank(order: WheelBatches, epoch: int) -> list[list[np.ndarray]]:
    return [list(replace(order, rank=rank)(epoch)) for rank in range(order.world)]


def shard_of_position(shard_rows: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(shard_rows)), shard_rows)


# ---------------------------------------------------------------- rows


@few
@given(wheels(), EPOCHS)
def test_every_row_comes_once_but_a_remainder_smaller_than_a_batch_of_all_ranks(
    order: WheelBatches, epoch: int
) -> None:
    rows = np.concatenate([batch for each in of_every_rank(order, epoch) for batch in each])
    assert len(np.unique(rows)) == len(rows)
    assert set(rows.tolist()) <= set(range(order.n_rows))
    n_left_out = order.n_rows - len(rows)
    assert n_left_out < min(order.batch_size * order.world, order.n_rows)
    assert n_left_out < order.world or n_left_out == order.n_rows % (order.batch_size * order.world)


@few
@given(SHARD_ROWS, IN_PLAY, EPOCHS)
def test_the_slots_of_an_epoch_are_all_its_rows(
    shard_rows: np.ndarray, in_play: int, epoch: int
) -> None:
    n_rows = int(shard_rows.sum())
    wheel = Wheel(shard_rows, in_play, 0, epoch)
    assert wheel.starts[0] == 0
    assert wheel.starts[-1] == n_rows
    assert sorted(wheel.rows(0, n_rows)) == list(range(n_rows))


@few
@given(wheels(), EPOCHS)
def test_the_ranks_batches_together_are_those_of_one_process(
    order: WheelBatches, epoch: int
) -> None:
    together = order.of_all_ranks()(epoch)
    of_ranks = of_every_rank(order, epoch)
    assert {len(each) for each in of_ranks} == {len(together)}
    for step, expected in enumerate(together):
        rows = np.concatenate([each[step] for each in of_ranks])
        assert sorted(rows) == expected.tolist()


@few
@given(wheels(), EPOCHS)
def test_every_rank_knows_where_its_rows_stand_in_the_batch_of_all(
    order: WheelBatches, epoch: int
) -> None:
    together = order.of_all_ranks()(epoch)
    for mine, places, expected in zip(order(epoch), order.places(epoch), together, strict=True):
        np.testing.assert_array_equal(expected[places], mine)
        assert (np.diff(mine) > 0).all()


@few
@given(wheels(), st.lists(st.tuples(EPOCHS, st.integers(0, 999)), max_size=12))
def test_a_batch_is_the_same_whatever_was_asked_for_before(
    order: WheelBatches, asked: list[tuple[int, int]]
) -> None:
    whole = {epoch: list(order(epoch)) for epoch, _ in asked}
    begun = {epoch: order(epoch) for epoch in whole}
    for epoch, number in asked:
        step = number % len(begun[epoch])
        np.testing.assert_array_equal(begun[epoch][step], whole[epoch][step])
        np.testing.assert_array_equal(order(epoch)[step], whole[epoch][step])


def test_a_batch_is_asked_for_by_its_number_from_either_end_or_by_a_slice() -> None:
    batches = WheelBatches(np.array([5, 5, 5]), 2, 4, 0)(1)
    assert len(batches) == 3
    np.testing.assert_array_equal(batches[-1], batches[2])
    assert [each.tolist() for each in batches[1:]] == [batches[1].tolist(), batches[2].tolist()]
    with pytest.raises(IndexError):
        batches[3]


def test_epochs_and_seeds_differ() -> None:
    shard_rows = np.full(10, 10)
    orders = {
        np.concatenate(list(WheelBatches(shard_rows, 4, 10, seed)(epoch))).tobytes()
        for seed in (0, 1, 2**32, 2**63)
        for epoch in range(3)
    }
    assert len(orders) == 12


def test_the_order_is_the_one_that_runs_were_begun_with() -> None:
    batches = WheelBatches(np.array([4, 4, 3, 4]), 2, 5, 7)(3)
    assert [batch.tolist() for batch in batches] == [
        [0, 2, 9, 10, 13],
        [1, 3, 4, 6, 12],
        [5, 7, 8, 11, 14],
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("in_play", 0), ("batch_size", 0), ("world", 0), ("rank", 2), ("seed", -1), ("in_play", 1.5)],
)
def test_what_is_no_order_is_refused_by_name(name: str, value: float) -> None:
    right = {"in_play": 2, "batch_size": 2, "seed": 0, "rank": 0, "world": 2}
    with pytest.raises(UserError, match=name):
        WheelBatches(np.array([4]), **{**right, name: value})  # type: ignore[arg-type]


# ---------------------------------------------------------------- shards


@few
@given(st.integers(1, 12), IN_PLAY, EPOCHS)
def test_a_slot_mixes_w_shards_and_the_next_one_all_of_these_but_one(
    n_shards: int, in_play: int, epoch: int
) -> None:
    shard_rows = np.full(n_shards, 16)
    wheel = Wheel(shard_rows, in_play, 0, epoch)
    shard_of = shard_of_position(shard_rows)
    slots = [
        set(shard_of[wheel.rows(int(wheel.starts[t]), int(wheel.starts[t + 1]))].tolist())
        for t in range(n_shards)
    ]
    w = min(in_play, n_shards)
    assert {len(slot) for slot in slots} == {w}
    for slot, following in pairwise(slots):
        assert len(slot & following) == (w - 1 if w < n_shards else w)


def assert_covered(order: RowOrder, epoch: int, shard_rows: np.ndarray, visits: Visits) -> None:
    """Every row of every batch is of a shard that is visited then."""
    assert len(visits.shards) == len(visits.first) == len(visits.last) == len(visits)
    assert (np.diff(visits.first) >= 0).all()
    shard_of = shard_of_position(shard_rows)
    for step, batch in enumerate(order.of_all_ranks()(epoch)):
        is_visited = (visits.first <= step) & (step <= visits.last)
        assert set(shard_of[batch].tolist()) <= set(visits.shards[is_visited].tolist())


@few
@given(wheels(), EPOCHS)
def test_visits_of_a_wheel_cover_every_row_of_every_batch(order: WheelBatches, epoch: int) -> None:
    visits = order.visits(epoch, order.shard_rows)
    assert_covered(order, epoch, order.shard_rows, visits)
    n_steps = len(order(epoch))
    assert ((visits.first >= 0) & (visits.first < n_steps) & (visits.last < n_steps)).all()
    assert len(visits) <= len(order.shard_rows) + order.in_play - 1


@few
@given(st.integers(1, 12), st.integers(1, 20), IN_PLAY, st.integers(1, 50), EPOCHS)
def test_a_shard_is_visited_no_longer_than_w_slots_take(
    n_shards: int, n_rows: int, in_play: int, batch_size: int, epoch: int
) -> None:
    """Of shards of one size a slot is as many rows."""
    shard_rows = np.full(n_shards, n_rows)
    order = WheelBatches(shard_rows, in_play, batch_size, 3)
    visits = order.visits(epoch)
    w = min(in_play, n_shards)
    size = min(batch_size, order.n_rows)
    assert (visits.last - visits.first + 1 <= (w * n_rows - 1) // size + 2).all()

    n_slots = (size - 1) // n_rows + 2  # that rows of one batch can be of
    for step in range(len(order(epoch))):
        is_visited = (visits.first <= step) & (step <= visits.last)
        assert len(set(visits.shards[is_visited].tolist())) <= w - 1 + n_slots


@few
@given(plain_orders(), EPOCHS)
def test_visits_of_rows_shuffled_together_or_in_order_are_from_the_first_row_to_the_last(
    order_and_shards: tuple[Batches, np.ndarray], epoch: int
) -> None:
    order, shard_rows = order_and_shards
    visits = order.visits(epoch, shard_rows)
    assert_covered(order, epoch, shard_rows, visits)

    shard_of = shard_of_position(shard_rows)
    steps_of: dict[int, list[int]] = {}
    for step, batch in enumerate(order.of_all_ranks()(epoch)):
        for shard in shard_of[batch].tolist():
            steps_of.setdefault(shard, []).append(step)
    found = zip(visits.shards.tolist(), visits.first.tolist(), visits.last.tolist(), strict=True)
    assert {shard: (first, last) for shard, first, last in found} == {
        shard: (min(steps), max(steps)) for shard, steps in steps_of.items()
    }
    assert len(visits) == len(steps_of)


@few
@given(plain_orders(), EPOCHS)
def test_every_rank_and_one_process_read_the_same_shards_at_the_same_time(
    order_and_shards: tuple[Batches, np.ndarray], epoch: int
) -> None:
    order, shard_rows = order_and_shards
    of_rank = order.visits(epoch, shard_rows)
    together = order.of_all_ranks().visits(epoch, shard_rows)
    for name in ("shards", "first", "last"):
        np.testing.assert_array_equal(getattr(of_rank, name), getattr(together, name))


def set_of(n_rows: int, rows_per_shard: int) -> ShardSet:
    """As its manifest says; nothing of it is on disk."""
    entries = [
        ShardEntry(start=start, stop=stop, files={}, sums={})
        for start, stop in bounds_of(n_rows, rows_per_shard)
    ]
    manifest = Manifest(
        dataset=LAB,
        source=SourceIdentity(kind="table", name="lab", n_bytes=n_rows, sha256="0" * 64),
        settings=ConversionSettings(rows_per_shard=rows_per_shard),
        n_rows=n_rows,
        fields=FIELDS,
        shards=entries,
        scenes=("here",),
    )
    return ShardSet(Path("nowhere"), manifest)


PARTS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 12)), min_size=1, max_size=4)


@few
@given(PARTS, st.integers(0, 2**32 - 1))
def test_the_shards_of_rows_are_counted_on_from_set_to_set(
    parts: list[tuple[int, int]], seed: int
) -> None:
    sets = [set_of(*each) for each in parts]
    found = sets[0]
    if len(sets) > 1:
        found = JoinedSet(sets[0].path, sets[0].manifest, tuple(sets))
    shard_of_row: list[int] = []
    n_shards = 0
    for n_rows, rows_per_shard in parts:
        shard_of_row += [n_shards + row // rows_per_shard for row in range(n_rows)]
        n_shards += len(bounds_of(n_rows, rows_per_shard))

    is_in_split = np.random.default_rng(seed).random(len(shard_of_row)) < 0.5
    numbers, n_of_each = shards_of_rows(found, np.flatnonzero(is_in_split))
    expected = np.array(shard_of_row)[is_in_split].tolist()
    assert np.repeat(numbers, n_of_each).tolist() == expected
    assert (n_of_each > 0).all()
