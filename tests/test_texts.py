"""Texts of many rows lie in two arrays, and are the same as a list of str."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.containers import arrays_of_columns
from shards.manifest import COLUMNS
from shards.texts import BLOCK_ROWS, HASHED_ROWS, Texts

ANY = ["a", "", "räume/küche.png", "", "日本\U0001f600", "x" * 300, "a"]


def test_they_are_a_list_of_str_in_two_arrays() -> None:
    texts = Texts.from_strings(iter(ANY))
    assert list(texts) == ANY
    assert [texts[k] for k in range(len(texts))] == ANY
    assert texts[-1] == "a"
    assert texts.offsets.dtype == np.int64
    assert texts.utf8.tobytes().decode() == "".join(ANY)
    assert texts == Texts(texts.offsets.astype("<u8"), texts.utf8)
    assert texts != Texts.from_strings(ANY[:-1])
    assert list(pickle.loads(pickle.dumps(texts))) == ANY
    assert list(Texts.from_strings([])) == []
    assert list(Texts.empty(2)) == ["", ""]


@pytest.mark.parametrize("row", [7, -8])
def test_a_row_that_is_not_there_is_an_error(row: int) -> None:
    texts = Texts.from_strings(ANY)
    with pytest.raises(IndexError):
        texts[row]
    with pytest.raises(IndexError):
        texts.take(np.array([0, row]))


@pytest.mark.parametrize(
    ("offsets", "n_bytes"),
    [([1, 2], 2), ([0, 2], 3), ([0, 3, 2], 2), ([], 0), ([[0, 1]], 1), ([0.0, 1.0], 1)],
)
def test_offsets_that_do_not_fit_are_refused(offsets: list, n_bytes: int) -> None:
    dtype = np.int64 if not offsets or not isinstance(offsets[-1], float) else np.float64
    with pytest.raises(ValueError, match="offsets"):
        Texts(np.array(offsets, dtype), np.zeros(n_bytes, np.uint8))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=9), max_size=9), st.data())
def test_taking_rows_is_indexing_a_list(strings: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from(range(len(strings))), max_size=12)) if strings else []
    taken = Texts.from_strings(strings).take(np.array(rows, np.uint32))
    assert list(taken) == [strings[row] for row in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=4) | st.text(max_size=3).map(str.encode), max_size=6))
def test_texts_are_utf8_where_each_of_them_is(parts: list[bytes]) -> None:
    lengths = np.array([len(part) for part in parts], np.int64)
    texts = Texts.from_lengths(lengths, np.frombuffer(b"".join(parts), np.uint8))
    try:
        for part in parts:
            part.decode()
        are_right = True
    except UnicodeDecodeError:
        are_right = False
    assert texts.are_utf8() == are_right


def test_a_character_cut_in_two_is_in_no_text() -> None:
    whole = "aä".encode()
    texts = Texts(np.array([0, 2, 3]), np.frombuffer(whole, np.uint8))
    assert not texts.are_utf8()
    assert Texts(np.array([0, 1, 3]), texts.utf8).are_utf8()


def test_blocks_meet_without_a_seam() -> None:
    """Taking, hashing, iterating and making work on so many rows at once."""
    n_rows = 2 * BLOCK_ROWS + 5
    assert BLOCK_ROWS % HASHED_ROWS == 0
    strings = [f"{k % 1000}é" if k % 3 else "" for k in range(n_rows)]
    texts = Texts.from_strings(strings)
    assert list(texts) == strings
    rows = np.random.default_rng(0).permutation(n_rows)
    taken = texts.take(rows)
    assert list(taken) == [strings[row] for row in rows]
    assert np.array_equal(taken.hashes(), texts.hashes()[rows])
    assert len(np.unique(texts.hashes())) == len(set(strings))


def test_hashes_tell_texts_apart_that_are_nearly_the_same() -> None:
    near = [
        "",
        "\0",
        "\0\0",
        "a",
        "a\0",
        "b",
        "ab",
        "ba",
        "abcdefgh",
        "abcdefgh\0",
        "abcdefghabcdefgh",
    ]
    near += ["x" * n for n in range(2, 40)] + [f"{k:020d}" for k in range(1000)]
    assert len(set(near)) == len(np.unique(Texts.from_strings(near).hashes())) == len(near)


def test_a_hash_is_the_same_for_ever() -> None:
    """It may be written down."""
    assert [
        f"{each:016x}" for each in Texts.from_strings(["", "a", "rgb/0001.jpg"]).hashes()
    ] == HASHES


HASHES = ["8630c2ba6daab072", "be4231c98ac77662", "fa1535b86d1c49f5"]


def test_a_column_of_texts_is_stored_as_a_list_of_str_is() -> None:
    columns = {"rgb_file": COLUMNS["rgb_file"]}
    texts = Texts.from_strings(ANY)
    stored = arrays_of_columns(columns, {"rgb_file": texts})
    of_list = arrays_of_columns(columns, {"rgb_file": ANY})
    of_array = arrays_of_columns(columns, {"rgb_file": np.array(ANY)})
    for name in stored:
        assert stored[name].tobytes() == of_list[name].tobytes() == of_array[name].tobytes()
        assert stored[name].dtype.str == of_list[name].dtype.str
    assert stored["rows-rgb_file-bytes"] is texts.utf8  # not copied
