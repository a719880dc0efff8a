"""Which order there is room for in a cache, and how many shards in play: by a rule, which the text
of train/room.py tells.
"""

import pickle
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError, WrongSetting
from train.arguments import check_limit
from train.errors import CacheTooSmall
from train.room import (
    MOST_IN_PLAY,
    REACH,
    ReadShards,
    Room,
    limit_bytes_of,
    make_room,
    shuffle_named,
    shuffle_of,
)
from train.settings import Settings
from train.streams import Stream

few = settings(max_examples=40)


@st.composite
def read_shards(draw: st.DrawFn, first: int, of_one_size: bool) -> ReadShards:
    """Consecutive ones."""
    n_shards = draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = np.full(n_shards, draw(st.integers(1, 200)))
    unit = draw(st.sampled_from([1, 1000, 10**6]))
    n_bytes = np.full(n_shards, draw(st.integers(1, 300)) * unit)
    if not of_one_size:
        rows = rng.integers(1, rows + 1)
        n_bytes = rng.integers(1, n_bytes + 1)
    return ReadShards(
        numbers=first + np.arange(n_shards),
        rows=rows,
        n_bytes=n_bytes,
        n_rows_of_batch=draw(st.integers(1, 300)),
        are_dealt=draw(st.booleans()),
    )


@st.composite
def both_orders(draw: st.DrawFn, of_one_size: bool = False) -> tuple[ReadShards, ReadShards]:
    """Train rows and those to score on, which may lie in the same shard."""
    train = draw(read_shards(0, of_one_size))
    first = len(train.numbers) - draw(st.integers(0, 1))
    scored = draw(read_shards(first, of_one_size))
    if first < len(train.numbers):
        scored.n_bytes[0] = train.n_bytes[-1]
    return train, scored


def all_bytes(train: ReadShards, scored: ReadShards) -> int:
    sizes = dict(zip(train.numbers.tolist(), train.n_bytes.tolist(), strict=True))
    sizes.update(zip(scored.numbers.tolist(), scored.n_bytes.tolist(), strict=True))
    return sum(sizes.values())


SHARES = st.floats(0.001, 0.999)
SHUFFLES = st.sampled_from(["auto", "wheel", "wheel:1", "wheel:7", "wheel:1000"])


# ---------------------------------------------------------------- all of it


@few
@given(both_orders(), st.integers(0, 100))
def test_what_fits_is_shuffled_all_together_and_never_removed(
    both: tuple[ReadShards, ReadShards], more: int
) -> None:
    limit = all_bytes(*both) + more
    for shuffle in ("auto", "full"):
        room = make_room(*both, shuffle, limit)
        assert (room.shuffle, room.removes) == ("full", False)
    train, _ = both
    room = make_room(*both, "wheel", limit)
    assert (room.in_play, room.removes) == (min(MOST_IN_PLAY, len(train.numbers)), False)
    assert make_room(*both, "wheel:7", limit).shuffle == "wheel:7"


@few
@given(both_orders(), SHARES)
def test_what_does_not_fit_is_not_shuffled_all_together(
    both: tuple[ReadShards, ReadShards], share: float
) -> None:
    needed = all_bytes(*both)
    with pytest.raises(CacheTooSmall, match="shuffled all together") as caught:
        make_room(*both, "full", int(share * (needed - 1)))
    assert caught.value.needed_bytes == needed
    assert make_room(*both, "full", needed).shuffle == "full"


# ---------------------------------------------------------------- some of it


def assert_inside(room: Room, train: ReadShards, scored: ReadShards, limit: int) -> None:
    """What is in play, what the next batches reach, and the scored rows' part have room."""
    assert room.removes
    assert room.train_bytes + room.scored_bytes <= limit
    in_play = min(room.in_play, len(train.numbers))
    train_at_once = (in_play + train.n_in_reach) * train.largest_bytes
    assert min(train.total_bytes, train_at_once) <= room.train_bytes
    scored_at_once = (1 + scored.n_in_reach) * scored.largest_bytes
    assert min(scored.total_bytes, scored_at_once) <= room.scored_bytes


@few
@given(both_orders(), SHARES, SHUFFLES)
def test_w_and_what_comes_ahead_are_inside_the_limit_or_the_limit_that_is_named_works(
    both: tuple[ReadShards, ReadShards], share: float, shuffle: str
) -> None:
    limit = int(share * all_bytes(*both))
    try:
        room = make_room(*both, shuffle, limit)
    except CacheTooSmall as error:
        needed = error.needed_bytes
        room = make_room(*both, shuffle, needed)
        is_named_right = limit < needed <= all_bytes(*both)
        limit = needed if is_named_right else -1
    assert limit >= 0
    if limit < all_bytes(*both):
        assert_inside(room, *both, limit)
        _, in_play = shuffle_of(shuffle)
        assert room.in_play == in_play if in_play else 1 <= room.in_play <= MOST_IN_PLAY


@few
@given(both_orders(), SHARES, st.integers(1, 10**6))
def test_the_limit_in_the_words_of_the_error_works_as_it_is_typed(
    both: tuple[ReadShards, ReadShards], share: float, unit: int
) -> None:
    train, scored = both
    for each in both:
        each.n_bytes[:] *= unit
    with pytest.raises(CacheTooSmall) as caught:
        make_room(train, scored, "full", int(share * (all_bytes(train, scored) - 1)))
    named = re.search(r"cache_limit_gb=([\d.e+-]+) or more", caught.value.right)
    assert named is not None
    limit_gb = check_limit("cache_limit_gb", float(named[1]))
    assert limit_gb is not None
    assert make_room(train, scored, "full", limit_bytes_of(limit_gb)).shuffle == "full"


@given(st.integers(1, 10**15))
def test_a_limit_keeps_its_bytes_as_it_is_handed_on_in_gigabytes(n_bytes: int) -> None:
    assert limit_bytes_of(n_bytes / 10**9) == n_bytes


def test_a_tenth_of_a_large_set_gives_64_shards_and_a_quarter_of_the_room_is_ahead() -> None:
    n_rows = np.full(7000, 128)
    train = ReadShards(
        numbers=np.arange(7000),
        rows=n_rows,
        n_bytes=np.full(7000, 32 * 10**6),
        n_rows_of_batch=256,
    )
    scored = ReadShards(
        numbers=7000 + np.arange(500),
        rows=n_rows[:500],
        n_bytes=np.full(500, 32 * 10**6),
        n_rows_of_batch=256,
    )
    assert make_room(train, scored, "auto", 24 * 10**9).shuffle == "wheel:64"
    # 3 GB: a quarter is for scored rows, that leaves 70 shards, of which 17 are ahead.
    assert make_room(train, scored, "auto", 3 * 10**9).shuffle == "wheel:53"
    assert make_room(train, scored, "auto", 2 * 10**9).shuffle == "wheel:33"
    # Of rows that are dealt half of them are ahead.
    dealt = replace(train, are_dealt=True)
    assert make_room(dealt, scored, "auto", 3 * 10**9).shuffle == "wheel:35"


# ---------------------------------------------------------------- what a fetcher makes of it


def stream_of(read: ReadShards, in_play: int, seed: int | None, room_bytes: int) -> Stream:
    return Stream(
        shards=read.numbers,
        rows=read.rows,
        in_play=in_play,
        seed=seed,
        n_rows_of_batch=min(read.n_rows_of_batch, int(read.rows.sum())),
        room_bytes=room_bytes,
    )


def assert_next_batches_fit(stream: Stream, read: ReadShards) -> None:
    """At any position the shards of the batches of this epoch that may be asked for then are to be
    held; of the last ones of an epoch those of the next do not count.
    """
    bytes_of = dict(zip(read.numbers.tolist(), read.n_bytes.tolist(), strict=True))
    positions = np.unique(np.linspace(0, 2 * stream.n_steps, 12).astype(int))
    for position in positions.tolist():
        shards, later = stream.next_shards(position)
        there = np.cumsum([bytes_of[shard] for shard in shards.tolist()])
        n_left = stream.n_steps - position % stream.n_steps
        assert (there[later < min(REACH, n_left)] <= stream.room_bytes).all()


@few
@given(both_orders(of_one_size=True), SHARES, SHUFFLES)
def test_shards_of_the_batches_that_may_be_asked_for_at_once_have_room_together(
    both: tuple[ReadShards, ReadShards], share: float, shuffle: str
) -> None:
    train, scored = both
    try:
        room = make_room(train, scored, shuffle, int(share * all_bytes(*both)))
    except CacheTooSmall as error:
        room = make_room(train, scored, shuffle, error.needed_bytes)
    if room.removes:
        assert_next_batches_fit(stream_of(train, room.in_play, 0, room.train_bytes), train)
        assert_next_batches_fit(stream_of(scored, 0, None, room.scored_bytes), scored)


@pytest.mark.parametrize("in_play", [0, 3])
def test_a_fetcher_is_sent_an_order_whatever_was_worked_out_of_it_meanwhile(in_play: int) -> None:
    read = ReadShards(
        numbers=np.arange(8),
        rows=np.full(8, 5),
        n_bytes=np.full(8, 100),
        n_rows_of_batch=4,
    )
    stream = stream_of(read, in_play, 0, 800)
    sent = pickle.dumps(stream)
    shards, later = stream.next_shards(stream.n_steps // 2)
    assert pickle.dumps(stream) == sent  # what another thread may change is no part of it
    there: Stream = pickle.loads(sent)
    for expected, found in zip(
        (shards, later), there.next_shards(stream.n_steps // 2), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("given_as", "found"),
    [
        ("auto", ("auto", 0)),
        ("full", ("full", 0)),
        ("wheel", ("wheel", 0)),
        ("wheel:1", ("wheel", 1)),
        ("wheel:64", ("wheel", 64)),
        (True, ("auto", 0)),
        (None, ("auto", 0)),
    ],
)
def test_an_order_is_named_by_a_word(given_as: Any, found: tuple[str, int]) -> None:
    assert shuffle_of(given_as) == found
    named = shuffle_named(given_as)
    assert shuffle_of(named) == found
    assert Settings("data", "runs", shuffle=given_as).shuffle == named


NO_SHUFFLES = (
    *("", "Wheel", "wheel:", "wheel:0", "wheel:-1", "wheel:x", "wheel:1.5", "wheel:1 ", "full:3"),
    *("auto:2", "wheel:1000000", "wheel:٣", "full\n"),
    *(False, 1, 0.5, float("nan"), b"full", ["full"]),
)


@pytest.mark.parametrize("value", NO_SHUFFLES, ids=repr)
def test_what_is_no_order_is_refused_with_those_there_are(value: Any) -> None:
    with pytest.raises(WrongSetting, match=r"auto, full(,| or) wheel"):
        shuffle_of(value)
    with pytest.raises(WrongSetting):
        Settings("data", "runs", shuffle=value)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 0, -1, -0.5, True, "10", b"1", [1], 1e9, 1j], ids=repr
)
def test_what_is_no_limit_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UserError, match="cache_limit_gb"):
        check_limit("cache_limit_gb", value)
    with pytest.raises(UserError, match="cache_limit_gb"):
        Settings("data", "runs", cache_limit_gb=value)


@pytest.mark.parametrize("value", [0.001, 1, 2.5, np.float32(0.5), np.int64(3)], ids=repr)
def test_a_limit_is_a_number_of_gigabytes(value: float) -> None:
    assert check_limit("cache_limit_gb", value) == float(value)
    assert Settings("data", "runs", cache_limit_gb=value).cache_limit_gb == float(value)
