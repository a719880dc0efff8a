"""Rows are asked for before they are read: which calls are made, what a disk reads, and that the
batches are the same ones.
"""

import ctypes
import errno
import gc
import mmap
import multiprocessing as mp
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.cgroup import drop_from_cache
from helpers.loaders import make, same
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.larger import resident_bytes
from bench.random_set import random_set
from loader import ahead
from loader.ahead import Reach, ReadAhead, reach
from loader.batches import Plan, Position, plan_from
from loader.disk import disk_use
from loader.loader import Loader
from loader.memory import PROC, tree_of
from shards import readahead
from shards.dataset import ShardSet
from shards.gather import RowGather
from train.data import ShardDataset

PAGE = mmap.PAGESIZE
N_ROWS = 192
CHOSEN = np.random.default_rng(0).permutation(N_ROWS)[:64]  # a third, in no order
BATCH = 16
MIB = 1 << 20


@pytest.fixture(scope="module")
def large_rows(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """48 MB in two shards, rows of 250 KB."""
    return random_set(tmp_path_factory.mktemp("large"), N_ROWS, 224)


@pytest.fixture
def cold(large_rows: ShardSet) -> ShardSet:
    """The same, nothing of it in memory. Skips where nobody counts what is read, as on tmpfs."""
    gc.collect()  # what an earlier test has mapped stays in memory
    mp.active_children()  # whose reading counts as this process's once they have ended
    files = [large_rows.path / name for shard in large_rows.manifest.shards for name in shard.files]
    for path in files:
        drop_from_cache(path)
    if any(map(resident_bytes, files)):
        pytest.skip("files stay in memory here: that less is read cannot be seen")
    before = disk_use()
    files[0].read_bytes()
    drop_from_cache(files[0])
    if disk_use() == before:
        pytest.skip("the kernel does not count what this disk reads")
    return large_rows


def chosen_batches(epoch: int) -> list[np.ndarray]:
    """One epoch, then no more: what is read is read for these."""
    if epoch:
        return []
    return [np.sort(CHOSEN[at : at + BATCH]) for at in range(0, len(CHOSEN), BATCH)]


def needed_bytes() -> int:
    return len(CHOSEN) * (3 * 224 * 224 + 2 * 224 * 224)


def read_by_all() -> int:
    """Bytes that a disk was asked for by this process and its workers."""
    total = 0
    for pid in tree_of(os.getpid()):
        lines = (PROC / str(pid) / "io").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    return total


# ---------------------------------------------------------------- what is asked for


spans = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3 * MIB)), min_size=0, max_size=30)


@given(spans=spans)
@settings(deadline=None, max_examples=50)
def test_every_page_of_the_rows_is_asked_for_once_and_no_other(spans: list[Any]) -> None:
    starts = np.array([page * PAGE // 2 for page, _ in spans], np.int64)
    sizes = np.array([size for _, size in spans], np.int64)
    wanted: set[int] = set()
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        wanted.update(range(start // PAGE, -(-(start + size) // PAGE)))

    pages = readahead.whole_pages(starts, starts + sizes)
    asked_starts, asked_sizes = readahead.in_pieces(*readahead.merged(*pages))
    asked: list[int] = []
    for start, size in zip(asked_starts.tolist(), asked_sizes.tolist(), strict=True):
        assert start % PAGE == 0
        assert 0 < size <= readahead.PIECE_BYTES
        asked.extend(range(start // PAGE, (start + size) // PAGE))
    assert len(asked) == len(set(asked))
    assert set(asked) == wanted


def test_neighbours_are_one_request() -> None:
    starts = np.array([8, 0, 4, 20]) * PAGE
    sizes = np.array([4, 4, 4, 1]) * PAGE
    merged_starts, merged_sizes = readahead.merged(starts, sizes)
    assert (merged_starts // PAGE).tolist() == [0, 20]
    assert (merged_sizes // PAGE).tolist() == [12, 1]


def test_the_spans_of_rows_are_where_their_bytes_lie() -> None:
    rng = np.random.default_rng(0)
    shards = {
        "rgb": [rng.integers(0, 256, (n, 3, 8, 8), np.uint8) for n in (4, 4, 2)],
        "depth": [rng.integers(0, 9999, (n, 8, 8), np.uint16) for n in (4, 4, 2)],
    }
    rows = np.array([9, 0, 5, 5])
    addresses, n_bytes = RowGather(shards, 8).row_spans(["rgb", "depth"], rows)
    assert addresses.dtype == n_bytes.dtype == np.int64
    found = [ctypes.string_at(a, n) for a, n in zip(addresses.tolist(), n_bytes, strict=True)]
    whole = {name: np.concatenate(parts) for name, parts in shards.items()}
    assert found == [whole[name][row].tobytes() for name in ("rgb", "depth") for row in rows]


# ---------------------------------------------------------------- what a disk reads


def test_what_was_asked_for_is_read_and_touching_it_waits_for_nothing(cold: ShardSet) -> None:
    dataset = ShardDataset(cold, split="all")
    before = disk_use()
    dataset.read_ahead(CHOSEN)
    asked = disk_use()
    n_read = (asked.n_blocks - before.n_blocks) * 512
    assert needed_bytes() <= n_read <= 1.1 * needed_bytes()
    dataset.batch(CHOSEN)
    assert disk_use().n_blocks == asked.n_blocks


def test_rows_in_order_are_left_to_the_kernel_until_it_was_told_that_there_is_no_order(
    cold: ShardSet,
) -> None:
    dataset = ShardDataset(cold, split="all")
    dataset.read_ahead(np.array([150, 140]))  # of the other shard: headers are read now
    before = disk_use()
    dataset.read_ahead(np.arange(0, 32))
    assert disk_use() == before
    dataset.read_ahead(np.array([40, 3]))  # of the same shard
    asked = disk_use()
    assert asked.n_blocks > before.n_blocks
    dataset.read_ahead(np.arange(64, 96))
    assert (disk_use().n_blocks - asked.n_blocks) * 512 >= 32 * 250_880
    assert not readahead.follow_one_another(np.array([5]))


def test_one_call_for_each_place_where_the_kernel_takes_no_list(
    cold: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "REFUSED", {mmap.MADV_RANDOM, mmap.MADV_WILLNEED})
    before = disk_use()
    ShardDataset(cold, split="all").read_ahead(CHOSEN)
    n_read = (disk_use().n_blocks - before.n_blocks) * 512
    assert needed_bytes() <= n_read <= 1.1 * needed_bytes()


@pytest.mark.parametrize(("workers", "prefetch"), [(0, False), (0, True), (2, True)])
def test_a_disk_reads_the_rows_of_a_loader_and_hardly_more(
    cold: ShardSet, workers: int, prefetch: bool
) -> None:
    before = read_by_all()
    dataset = ShardDataset(cold, split="all")
    method = "fork" if workers else None
    loader = Loader(dataset, chosen_batches, workers, method, prefetch=prefetch)
    batches = [[part.clone() for part in batch] for batch in loader]
    n_read = read_by_all() - before
    assert loader.stream.producer is not None
    loader.stream.producer.close()
    assert needed_bytes() * 0.98 <= n_read <= 1.1 * needed_bytes() + 4 * PAGE * len(batches)
    assert same(batches, [dataset.batch(rows) for rows in chosen_batches(0)])


def test_reading_without_advice_is_right_too(
    cold: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(mmap, "MADV_WILLNEED")
    dataset = ShardDataset(cold, split="all")
    assert not readahead.can_advise()
    batches = [[part.clone() for part in batch] for batch in Loader(dataset, chosen_batches)]
    assert same(batches, [dataset.batch(rows) for rows in chosen_batches(0)])


# ---------------------------------------------------------------- when it is asked for


class Listening(ShardDataset):
    """Remembers how many rows were asked for, by whoever is in this process."""

    asked: list[int]

    def read_ahead(self, indices: Any) -> None:
        self.asked.append(len(indices))
        super().read_ahead(indices)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_set_in_memory_is_asked_for_at_the_beginning_and_then_never(
    small_set: Path, prefetch: bool
) -> None:
    dataset = Listening(small_set, split="all")
    dataset.asked = []
    dataset.batch(np.arange(36))  # all of it is in memory now
    loader = Loader(dataset, lambda epoch: [np.arange(4)] * 50, prefetch=prefetch)
    list(loader)
    n_first = len(dataset.asked)
    assert n_first <= 4 + ahead.MOST_AHEAD + 2 * ahead.QUIET
    list(loader)
    assert len(dataset.asked) == n_first


def plan_of(n_batches: int) -> Plan:
    batches = [np.array([k]) for k in range(n_batches)]
    return plan_from(lambda epoch: [] if epoch else batches, Position(epoch=0, step=0))


def asked_by(plan: Plan) -> list[list[int] | None]:
    """Of each batch, which later ones it asks for."""
    asked: list[list[int] | None] = []
    for planned in plan:
        later = planned.request.ahead
        asked.append(None if later is None else [int(rows[0]) for rows in later])
    return asked


def test_each_batch_is_asked_for_once_that_far_ahead() -> None:
    read_ahead = ReadAhead(Reach(n_ahead=2, n_wanted=3))
    assert asked_by(read_ahead.plan(plan_of(6))) == [[1, 2], [3], [4], [5], [], []]


def test_who_cannot_be_told_is_asked_for_nothing() -> None:
    assert asked_by(ReadAhead(None).plan(plan_of(3))) == [None, None, None]
    never = ReadAhead(None)
    never.learn(True)
    assert not never.is_on


def test_it_is_off_while_nothing_is_read_and_on_again_with_the_first_batch_that_was() -> None:
    read_ahead = ReadAhead(Reach(n_ahead=1, n_wanted=2))
    states = []
    plan = read_ahead.plan(plan_of(12))
    for k, planned in enumerate(plan):
        states.append(planned.request.ahead is not None)
        read_ahead.learn(k == 4)
    assert states == [True] * 2 + [False] * 3 + [True] * 7


def test_a_disk_that_asking_hides_is_asked_longer_each_time() -> None:
    """As of a file system that does not count: what was asked for is never seen to be read."""
    read_ahead = ReadAhead(Reach(n_ahead=1, n_wanted=2))
    n_off = 0
    for _ in range(2000):
        is_on = read_ahead.is_on
        n_off += not is_on
        read_ahead.learn(not is_on)
    assert n_off < 12


def test_what_the_order_raises_comes_after_the_batches_before_it() -> None:
    def order(epoch: int) -> Sequence[np.ndarray]:
        if epoch:
            raise LookupError("no second epoch")
        return [np.array([0]), np.array([1])]

    plan = ReadAhead(Reach(n_ahead=5, n_wanted=6)).plan(plan_from(order, Position(epoch=0, step=0)))
    assert [int(next(plan).request.indices[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(LookupError, match="no second epoch"):
        next(plan)


@given(batch_mib=st.integers(1, 4000), left_mib=st.integers(0, 100_000), n_makers=st.integers(1, 3))
@settings(deadline=None, max_examples=100)
def test_what_is_asked_for_fits_what_is_left(batch_mib: int, left_mib: int, n_makers: int) -> None:
    found = reach(batch_mib * MIB, left_mib * MIB, n_makers)
    assert 1 <= found.n_wanted <= ahead.MOST_AHEAD
    assert found.n_wanted == 1 or found.n_wanted * batch_mib <= left_mib / 2
    assert found.n_ahead <= max(1, found.n_wanted - n_makers)
    assert n_makers > 1 or found.n_ahead >= 1  # else nothing runs while a batch is made


def test_rows_that_do_not_exist_are_an_error_of_their_own_batch(small_set: Path) -> None:
    dataset = ShardDataset(small_set, split="all")
    loader = Loader(dataset, lambda epoch: [np.array([0]), np.array([1]), np.array([99])])
    batches = iter(loader)
    next(batches)
    next(batches)
    with pytest.raises(IndexError):
        next(batches)


def test_major_faults_and_blocks_are_those_of_this_thread(cold: ShardSet) -> None:
    before = disk_use()
    other = threading.Thread(target=lambda: ShardDataset(cold, split="all").batch(CHOSEN))
    other.start()
    other.join()
    after = disk_use()
    if hasattr(resource, "RUSAGE_THREAD"):
        assert after == before
    assert errno.EPERM in readahead.NOT_ALLOWED


# ---------------------------------------------------------------- one thread for ours

THREADS = """
import os, sys, threading
import torch
torch.set_num_threads(3)

def n_threads():
    return len(os.listdir("/proc/self/task"))

def enlarge():
    torch.ones(1 << 22).add_(1)

from loader.threads import use_one_thread_here
counts = []
has_counted = threading.Event()
may_end = threading.Event()

def work():
    is_one = use_one_thread_here()
    before = n_threads()
    enlarge()
    counts.extend([is_one, torch.get_num_threads(), n_threads() - before])
    has_counted.set()
    may_end.wait()

ours = threading.Thread(target=work)
ours.start()
has_counted.wait()
before = n_threads()
enlarge()
print(counts, torch.get_num_threads(), n_threads() - before)
may_end.set()
"""


def test_our_thread_uses_one_core_and_the_callers_next_operation_all_of_its_own() -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads cannot be counted here")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, env=environment
    )
    if done.stdout.startswith("[False"):
        pytest.skip("torch is built without OpenMP here: nothing is changed")
    assert done.stdout.strip() == "[True, 1, 0] 3 2", done.stderr


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_callers_number_of_threads_is_never_another(
    three_threads: None, small_set: Path
) -> None:
    """Looked at from other threads all the while, also from ones that have just begun."""
    seen: set[int] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            fresh = threading.Thread(target=lambda: seen.add(torch.get_num_threads()))
            fresh.start()
            fresh.join()

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(20):
        next(iter(make(small_set)))
        seen.add(torch.get_num_threads())
    stop.set()
    looking.join()
    assert seen == {3}
