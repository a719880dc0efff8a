"""Order and splits of a table's rows: pure functions of lines, places and a rule."""

import numpy as np
import pytest
from helpers.splitmix import dealt, splitmix64
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.sources import dealing
from convert.sources.dealing import FEWEST_PLACES, IN_ORDER, USUAL_SHARES, SplitRule, dealt_order
from shards.errors import WrongSetting
from shards.spec import SPLITS

SPLIT_NUMBERS = st.lists(st.integers(0, len(SPLITS) - 1), max_size=200)
PLACES = st.lists(st.integers(1, 30), min_size=1, max_size=60)  # rows of each
SHARES = st.tuples(st.integers(1, 10), st.integers(0, 5), st.integers(0, 5))
FEW = settings(max_examples=50, deadline=None)


def names_of(split: np.ndarray) -> list[str]:
    return [SPLITS[k] for k in split]


def shares_of(parts: tuple[int, int, int]) -> tuple[float, float, float]:
    train, val, test = (part / sum(parts) for part in parts)
    return train, val, test


def rows_of_places(sizes: list[int], seed: int) -> np.ndarray:
    """The place of each row, mixed; each number comes."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(groups)
    return groups


# ---------------------------------------------------------------- order


def test_the_hash_is_splitmix64() -> None:
    """Known values: of its author's generator with seed 0."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    numbers = [0, 1, 2, 1000, 2**32, 2**63, 2**64 - 1]
    found = dealing.splitmix64(np.array(numbers, np.uint64))
    assert found.tolist() == [splitmix64(number) for number in numbers]


@FEW
@given(SPLIT_NUMBERS)
def test_the_order_is_a_permutation_train_before_val_before_test(numbers: list[int]) -> None:
    split = np.array(numbers, np.uint8)
    order = dealt_order(split)
    assert sorted(order.tolist()) == list(range(len(numbers)))
    ranks = [IN_ORDER.index(name) for name in names_of(split[order])]
    assert ranks == sorted(ranks)


@FEW
@given(SPLIT_NUMBERS)
def test_within_a_split_lines_lie_by_their_hash(numbers: list[int]) -> None:
    split = np.array(numbers, np.uint8)
    assert dealt_order(split).tolist() == dealt(names_of(split))


def test_a_line_more_at_the_end_leaves_the_others_in_their_order() -> None:
    split = np.array([0, 1, 2, 0, 0, 1, 2, 0, 0, 0, 1, 2] * 10, np.uint8)
    longer = dealt_order(split).tolist()
    shorter = dealt_order(split[:-1]).tolist()
    assert [line for line in longer if line != len(split) - 1] == shorter


def test_any_run_of_rows_is_a_sample_of_the_whole_table() -> None:
    """Lines of one place lie one behind the other in a table; in a set they are spread."""
    places = np.repeat(np.arange(100), 100)
    order = dealt_order(np.zeros(10_000, np.uint8))
    for first in range(0, 10_000, 1000):
        assert len(np.unique(places[order[first : first + 1000]])) > 95


# ---------------------------------------------------------------- splits


@FEW
@given(PLACES, SHARES, st.integers(0, 100))
def test_rows_of_one_place_are_in_one_split(
    sizes: list[int], parts: tuple[int, int, int], seed: int
) -> None:
    groups = rows_of_places(sizes, seed)
    split = SplitRule(by="scene", shares=shares_of(parts)).of_groups(groups)
    assert len(split) == len(groups)
    for place in range(len(sizes)):
        assert len(set(split[groups == place].tolist())) == 1


@FEW
@given(PLACES, SHARES, st.integers(0, 100))
def test_each_split_with_a_share_gets_a_place_and_no_other_does(
    sizes: list[int], parts: tuple[int, int, int], seed: int
) -> None:
    shares = shares_of(parts)
    split = SplitRule(by="scene", shares=shares).of_groups(rows_of_places(sizes, seed))
    found = set(names_of(np.unique(split)))
    wanted = {name for name, share in zip(IN_ORDER, shares, strict=True) if share > 0}
    assert found <= wanted
    if len(sizes) >= len(wanted):
        assert found == wanted


@FEW
@given(PLACES, SHARES, st.integers(0, 100))
def test_shares_are_within_one_place_of_what_was_asked_where_there_are_many(
    sizes: list[int], parts: tuple[int, int, int], seed: int
) -> None:
    shares = shares_of(parts)
    n_rows = sum(sizes)
    # A share that is less than a place, or than what the others are rounded to, gets one all the
    # same; of others this holds.
    if any(0 < share * n_rows < 2 * max(sizes) for share in shares):
        return
    split = SplitRule(by="scene", shares=shares).of_groups(rows_of_places(sizes, seed))
    for name, share in zip(IN_ORDER, shares, strict=True):
        n_found = int(np.sum(split == SPLITS.index(name)))
        assert abs(n_found - share * n_rows) <= max(sizes)


def test_rows_dealt_one_by_one_have_the_shares_to_a_row() -> None:
    split = SplitRule(by="row").of_rows(1000)
    counts = {name: int(np.sum(split == SPLITS.index(name))) for name in IN_ORDER}
    assert counts == {"train": 800, "val": 100, "test": 100}


def test_a_place_that_has_nearly_all_rows_leaves_the_other_splits_their_own() -> None:
    groups = np.array([0] * 1000 + [1, 2])
    split = SplitRule(by="scene").of_groups(groups)
    assert set(names_of(np.unique(split))) == {"train", "val", "test"}


def test_where_no_split_is_asked_for_all_rows_are_train() -> None:
    assert names_of(SplitRule.parse("row:1,0,0").of_rows(5)) == ["train"] * 5


# ---------------------------------------------------------------- the rule as text


@pytest.mark.parametrize("text", ["scene", "row", "camera", "scene:0.5,0.25,0.25", "row:1,0,0"])
def test_a_rule_is_what_its_text_says(text: str) -> None:
    rule = SplitRule.parse(text)
    assert str(rule) == text
    assert SplitRule.parse(str(rule)) == rule


def test_the_usual_shares_are_left_out_of_the_text() -> None:
    assert str(SplitRule.parse("scene:0.8,0.1,0.1")) == "scene"
    assert SplitRule.parse("scene").shares == USUAL_SHARES
    assert len(IN_ORDER) == FEWEST_PLACES


@pytest.mark.parametrize(
    "text",
    ["scene:", "scene:1", "scene:0.5,0.5", "scene:a,b,c", "scene:0,0.5,0.5", "scene:0.5,0.2,0.2",
     "scene:nan,0,0", "scene:1.5,-0.5,0", "scene:0.5,0.7,-0.2", "scene:0.8,0.1,0.1,0"],
)  # fmt: skip
def test_shares_that_are_none_are_one_line(text: str) -> None:
    with pytest.raises(WrongSetting, match="give "):
        SplitRule.parse(text)
