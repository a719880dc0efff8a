"""The order is a pure function of (seed, epoch): workers, ranks and resuming never change it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.order import Batches, common_batches, permutation, steps_per_epoch

counts = st.integers(1, 400)


@given(counts, st.integers(1, 64), st.integers(0, 9), st.integers(1, 4), st.integers(0, 9))
def test_ranks_together_get_the_global_batches(
    n: int, batch: int, epoch: int, world: int, seed: int
) -> None:
    if n < world:
        return
    per_rank = [Batches(n, batch, seed, r, world)(epoch) for r in range(world)]
    size = min(batch, n // world)
    order = permutation(n, seed, epoch)
    for step in range(steps_per_epoch(n, batch, world)):
        together = np.concatenate([batches[step] for batches in per_rank])
        assert sorted(together) == sorted(order[step * size * world : (step + 1) * size * world])


@given(counts, st.integers(1, 64), st.integers(0, 9), st.integers(1, 4))
def test_every_rank_knows_where_its_rows_stand_in_the_batch_of_all(
    n: int, batch: int, epoch: int, world: int
) -> None:
    if n < world:
        return
    per_rank = [Batches(n, batch, 0, rank, world) for rank in range(world)]
    found = [[b(epoch) for b in per_rank], [b.places(epoch) for b in per_rank]]
    for step in range(steps_per_epoch(n, batch, world)):
        rows, places = (np.concatenate([batches[step] for batches in each]) for each in found)
        together = np.full(len(rows), -1)
        together[places] = rows
        assert together.tolist() == sorted(rows)


@given(counts, st.integers(1, 64), st.integers(1, 5))
def test_evaluation_counts_every_row_once(n: int, batch: int, world: int) -> None:
    rows = [
        row
        for r in range(world)
        for b in Batches(n, batch, None, r, world)(0)
        for row in b.tolist()
    ]
    assert sorted(rows) == list(range(n))


@given(counts, st.integers(1, 64), st.integers(1, 5))
def test_common_batches_are_those_of_the_rank_with_the_fewest(
    n: int, batch: int, world: int
) -> None:
    per_rank = [len(Batches(n, batch, None, rank, world)(0)) for rank in range(world)]
    assert common_batches(n, batch, world) == min(per_rank)


def test_epochs_and_seeds_differ() -> None:
    orders = {permutation(100, seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
