"""The gather of rows over an address range gives what plain indexing gives, whatever lies where."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.gather import PIECE_BELOW, RowGather, piece_bytes, take_rows, widest_first

SPARE_BYTES = 64  # of a buffer, behind the batch


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shards of some fields, where they shall lie, and which rows of which fields are wanted."""

    size: int
    shards: dict[str, list[np.ndarray]]
    mapped_in_order: list[tuple[str, int]]  # (field, shard), the first ones first
    in_memory: set[str]  # fields that are not mapped, as those of compressed sets
    fields: list[str]
    rows: np.ndarray

    def opened(self, directory: Path) -> dict[str, list[np.ndarray]]:
        """The shards as files, mapped in that order."""
        maps: dict[tuple[str, int], np.ndarray] = {}
        for field, k in self.mapped_in_order:
            path = directory / f"{field}-{k:05d}.npy"
            path.unlink(missing_ok=True)  # an earlier map of it stays whole
            np.save(path, self.shards[field][k])
            maps[field, k] = np.load(path, mmap_mode="r")
        return {
            field: shards
            if field in self.in_memory
            else [maps[field, k] for k in range(len(shards))]
            for field, shards in self.shards.items()
        }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.integers(1, 40))
    rows_per_shard = draw(st.integers(1, 6))
    n_rows = draw(st.integers(1, 5 * rows_per_shard))
    kinds = draw(
        st.dictionaries(
            st.sampled_from(["rgb", "depth", "label", "thermal", "flow"]),
            st.tuples(st.sampled_from(["|u1", "<u2"]), st.sampled_from([(), (3,)])),
            min_size=1,
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    starts = range(rows_per_shard, n_rows, rows_per_shard)
    shards = {}
    for field, (dtype, planes) in kinds.items():
        whole = rng.integers(0, 1 << 16, (n_rows, *planes, size, size)).astype(dtype)
        shards[field] = [part.copy() for part in np.split(whole, starts)]

    every = [(field, k) for field, parts in shards.items() for k in range(len(parts))]
    return Case(
        size=size,
        shards=shards,
        mapped_in_order=draw(st.permutations(every)),
        in_memory=draw(st.sets(st.sampled_from(sorted(kinds)))),
        fields=draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, unique=True)),
        rows=np.array(draw(st.lists(st.integers(0, n_rows - 1), max_size=20)), np.int64),
    )


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@given(case=cases())
@settings(deadline=None)
def test_any_rows_of_any_shards_are_what_plain_indexing_gives(case: Case, directory: Path) -> None:
    gather = RowGather(case.opened(directory), case.size)
    expected = take_rows(case.shards, case.fields, case.rows)
    assert gather.into(case.fields, case.rows).tobytes() == expected


@given(case=cases())
@settings(deadline=None)
def test_rows_go_into_a_buffer_and_not_beyond(case: Case, directory: Path) -> None:
    gather = RowGather(case.opened(directory), case.size)
    expected = take_rows(case.shards, case.fields, case.rows)
    memory = bytearray(b"\xa5" * (len(expected) + SPARE_BYTES))
    out = gather.into(case.fields, case.rows, memoryview(memory))
    assert bytes(memory) == expected + b"\xa5" * SPARE_BYTES
    assert np.shares_memory(out, np.frombuffer(memory, np.uint8)) or not len(out)
    assert (out.dtype, out.shape) == (np.uint8, (len(expected),))


@given(case=cases())
@settings(deadline=None)
def test_a_second_batch_is_as_right_as_the_first(case: Case, directory: Path) -> None:
    gather = RowGather(case.opened(directory), case.size)
    for rows in (case.rows, case.rows[::-1].copy()):
        for field in case.fields:
            expected = take_rows(case.shards, [field], rows)
            assert gather.into([field], rows).tobytes() == expected


def test_the_plain_reference_is_numpys_indexing_field_after_field_the_widest_first() -> None:
    bytes_first = np.arange(24, dtype="u1").reshape(6, 2, 2)
    words = np.arange(24, dtype="<u2").reshape(6, 2, 2) + 1000
    shards = {"a": [bytes_first[:4], bytes_first[4:]], "b": [words[:4], words[4:]]}
    rows = np.array([5, 0, 5])
    assert widest_first(["a", "b"], shards) == ["b", "a"]
    expected = words[rows].tobytes() + bytes_first[rows].tobytes()
    assert take_rows(shards, ["a", "b"], rows) == expected


@given(size=st.integers(1, 1024))
def test_a_piece_is_whole_lines_and_divides_every_row(size: int) -> None:
    n_bytes = piece_bytes(size)
    assert n_bytes % size == 0
    assert size * size % n_bytes == 0
    assert n_bytes < PIECE_BELOW


def test_the_copy_is_the_same_with_one_thread_and_with_several(directory: Path) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 256, (40, 3, 64, 64)).astype("u1")
    shards = {"rgb": [whole[:16].copy(), whole[16:32].copy(), whole[32:].copy()]}
    gather = RowGather(shards, 64)
    rows = rng.integers(0, 40, 200)
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            assert gather.into(["rgb"], rows).tobytes() == whole[rows].tobytes()
    finally:
        torch.set_num_threads(n_threads)
