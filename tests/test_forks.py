"""Threads and forks: neither side ever gets a wrong batch or waits for ever, with datasets and
loaders, used and fresh.

Every child is a real fork; it answers over a pipe, and one that is silent for WAIT_S is killed and
fails the test.
"""

import atexit
import copy
import gc
import multiprocessing as mp
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.commands import all_gone
from helpers.loaders import KINDS, METHODS, expected, first_line, make, same, start, worker_pids
from torch.utils.data import DataLoader

from loader import forks
from loader.buffers import BufferPool
from loader.loader import Loader
from train.data import ShardDataset, create_dataloaders
from train.order import Batches

WAIT_S = 60
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
kinds = pytest.mark.parametrize("kind", KINDS, ids=["inline", "thread", "fork"])
used = pytest.mark.parametrize("is_used", [False, True], ids=["fresh", "used"])


class Fork:
    """A forked child that runs `work`; `answer` is what it returned, or the error it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        ours, theirs = mp.Pipe()
        self.pipe: Connection = ours
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            try:
                theirs.send_bytes(pickle.dumps(work()))
            except BaseException:
                theirs.send_bytes(pickle.dumps(RuntimeError(traceback.format_exc())))
            finally:
                os._exit(0)
        theirs.close()

    def answer(self) -> Any:
        try:
            assert self.pipe.poll(WAIT_S), "the child waits for ever"
            made = pickle.loads(self.pipe.recv_bytes())
        finally:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if isinstance(made, RuntimeError):
            raise made
        return made


def in_a_fork(work: Callable[[], Any]) -> Any:
    return Fork(work).answer()


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """What each returned or raised, all begun at once."""
    found: list[Any] = [None] * len(works)
    gate = threading.Barrier(len(works))

    def run(k: int) -> None:
        gate.wait(WAIT_S)
        try:
            found[k] = works[k]()
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return found


def as_numpy(batches: list[Any]) -> list[Any]:
    """To travel: their bytes."""
    return [tuple(part.numpy().copy() for part in batch) for batch in batches]


def same_bytes(got: list[Any], want: list[Any]) -> bool:
    return len(got) == len(want) and all(
        a.dtype == b.numpy().dtype
        and a.shape == tuple(b.shape)
        and a.tobytes() == b.numpy().tobytes()
        for p, q in zip(got, want, strict=True)
        for a, b in zip(p, q, strict=True)
    )


# ---------------------------------------------------------------- datasets


def test_threads_that_read_a_fresh_dataset_first_get_its_rows(small_set: Path) -> None:
    want = ShardDataset(small_set, split="all").batch(np.arange(36))
    for _ in range(20):
        dataset = ShardDataset(small_set, split="all")
        for got in in_threads([lambda d=dataset: d.batch(np.arange(36))] * 4):  # type: ignore[misc]
            assert same([got], [want]), got


@used
@pytest.mark.parametrize(
    "how", [{}, {"device": "cpu"}, {"normalize": True}], ids=["maps", "device", "normalised"]
)
def test_a_dataset_is_right_on_both_sides_of_a_fork(
    small_set: Path, is_used: bool, how: dict[str, Any]
) -> None:
    dataset = ShardDataset(small_set, split="all", **how)
    want = [ShardDataset(small_set, split="all", **how).batch(np.arange(36))] * 3
    if is_used:
        dataset.batch(np.arange(36))
        torch.randn(1 << 22).add_(1)  # starts torch's threads, which no child has
    child = Fork(lambda: as_numpy([dataset.batch(np.arange(36)) for _ in range(3)]))
    assert same([dataset.batch(np.arange(36)) for _ in range(3)], want)
    assert same_bytes(child.answer(), want)
    assert same([dataset.batch(np.arange(36))], want[:1])


def test_a_large_gather_in_a_fork_does_not_wait_for_the_parents_threads(small_set: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        dataset = ShardDataset(small_set, split="all")
        rows = np.tile(np.arange(36), 200)
        want = dataset.batch(rows)  # by two threads
        assert in_a_fork(lambda: same([dataset.batch(rows)], [want]))
    finally:
        torch.set_num_threads(before)


def test_a_fork_while_a_thread_reads_is_right(small_set: Path) -> None:
    dataset, stop = ShardDataset(small_set, split="all"), threading.Event()
    want = [dataset.batch(np.arange(36))]

    def read() -> bool:
        right = True
        while not stop.is_set():
            fresh = ShardDataset(small_set, split="all")
            right = (
                right
                and same([fresh.batch(np.arange(36))], want)
                and same([dataset.batch(np.arange(36))], want)
            )
        return right

    def fork() -> bool:
        try:
            return all(
                in_a_fork(lambda: same([dataset.batch(np.arange(36))], want)) for _ in range(10)
            )
        finally:
            stop.set()

    assert in_threads([read, fork]) == [True, True]


@used
@pytest.mark.parametrize(
    ("workers", "method"), [(0, None), (2, "fork"), (2, "forkserver"), (1, "spawn")]
)
def test_torchs_own_loader_gets_the_rows(
    small_set: Path, is_used: bool, workers: int, method: str | None
) -> None:
    dataset = ShardDataset(small_set, split="all")
    if is_used:
        dataset.batch(np.arange(36))
    loader = DataLoader(
        dataset,
        8,
        num_workers=workers,
        multiprocessing_context=method,
        timeout=WAIT_S * (workers > 0),
    )
    got = [torch.cat(parts) for parts in zip(*loader, strict=True)]
    assert same([tuple(got)], [ShardDataset(small_set, split="all").batch(np.arange(36))])


@used
def test_copies_and_pickles_of_a_dataset_have_its_rows_wherever_they_are_opened(
    small_set: Path, tmp_path: Path, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_set.parent)
    for how in ({}, {"device": "cpu"}):
        dataset = ShardDataset(small_set.name, split="all", **how)  # type: ignore[arg-type]
        want = [ShardDataset(small_set, split="all").batch(np.arange(36))]
        if is_used:
            dataset[0]
        data = pickle.dumps(dataset)
        monkeypatch.chdir(tmp_path)  # maps that are opened later lie where they lay
        for other in (pickle.loads(data), copy.copy(dataset), copy.deepcopy(dataset), dataset):
            assert same([other.batch(np.arange(36))], want)
            assert other.device == dataset.device
        monkeypatch.chdir(small_set.parent)


# ---------------------------------------------------------------- loaders: threads


@kinds
def test_threads_may_share_an_iteration(small_set: Path, kind: dict[str, Any]) -> None:
    batches = iter(make(small_set, **kind))
    found = in_threads([lambda: as_numpy(list(batches))] * 3)
    want = {batch[0].numpy().tobytes() for batch in expected(small_set)}
    got = [batch[0].tobytes() for each in found for batch in each]
    assert (len(got), set(got)) == (9, want)


@kinds
def test_a_loader_begun_by_two_threads_is_right_or_says_so(
    small_set: Path, kind: dict[str, Any]
) -> None:
    loader, n_right = make(small_set, **kind), 0
    want = [expected(small_set, epoch) for epoch in range(12)]
    for _ in range(5):
        for found in in_threads([lambda: as_numpy(list(loader))] * 2):
            if isinstance(found, RuntimeError):
                assert "make two loaders" in str(found)
                continue
            assert any(same_bytes(found, epoch) for epoch in want)
            n_right += 1
    assert n_right >= 5  # the later one of each pair


def test_transforms_in_two_threads_draw_what_they_draw_alone(small_set: Path) -> None:
    def noise(batch: Any) -> Any:
        return tuple(torch.rand(1000) for _ in range(20))

    alone = list(make(small_set, transform=noise))
    for found in in_threads([lambda: list(make(small_set, transform=noise))] * 3):
        assert same(found, alone)


def test_a_loader_inside_its_own_transform_is_an_error(small_set: Path) -> None:
    def again(batch: Any) -> Any:
        return next(iter(loader))

    loader = make(small_set, transform=again)
    for error in in_threads([lambda: list(loader)]):
        assert isinstance(error, RuntimeError)
        assert "inside its own transform" in str(error)


# ---------------------------------------------------------------- loaders: forks


@kinds
@pytest.mark.parametrize("n_had", [None, 0, 4], ids=["fresh", "used", "half-way"])
def test_a_loader_goes_on_in_a_fork_and_in_its_parent(
    small_set: Path, kind: dict[str, Any], n_had: int | None
) -> None:
    loader, epoch = make(small_set, **kind), 0
    if n_had == 0:
        epoch = 1
        list(loader)
    batches = iter(loader)
    kept = [next(batches) for _ in range(n_had or 0)]
    rest = expected(small_set, epoch, len(kept))

    def both() -> list[Any]:
        return as_numpy(list(batches)) + as_numpy(list(loader))

    children = [Fork(both) for _ in range(2)]
    assert same(list(batches), rest)
    assert same(list(loader), expected(small_set, epoch + 1))
    for child in children:
        assert same_bytes(child.answer(), rest + expected(small_set, epoch + 1))
    assert same(kept, expected(small_set, epoch)[: len(kept)])
    assert same(list(loader), expected(small_set, epoch + 2))


@kinds
def test_batches_held_through_a_fork_are_nobody_elses(
    small_set: Path, kind: dict[str, Any]
) -> None:
    loader = make(small_set, **kind)
    batches, want = iter(loader), expected(small_set)
    held = [next(batches) for _ in range(2)]
    parent_is_done, child_has_written = mp.Pipe(), mp.Pipe()

    def child() -> list[Any]:
        assert parent_is_done[0].poll(WAIT_S)
        seen = as_numpy(held)
        for part in (part for batch in held for part in batch):
            part.zero_()
        child_has_written[1].send(True)
        return seen

    kept, fork = held[0], Fork(child)
    held = []
    # The second one's buffer is filled again.
    n_left = sum(1 for _ in batches) + sum(1 for _ in loader)
    parent_is_done[1].send(True)
    assert child_has_written[0].poll(WAIT_S)
    assert same([kept], want[:1])
    assert same_bytes(fork.answer(), want[:2])
    assert n_left == 7 + 9


def test_a_child_that_is_stopped_costs_the_parent_buffers_but_no_batch(
    small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "WAIT_S", 0.01)
    monkeypatch.setattr(forks, "_own_pages", lambda buffer: threading.Event().wait(1))
    loader = make(small_set, 2, "fork")
    batches = iter(loader)
    held = [next(batches)]
    child = Fork(lambda: as_numpy(held))
    held.clear()
    assert same(list(batches), expected(small_set, 0, 1))
    assert same(list(loader), expected(small_set, 1))
    assert same_bytes(child.answer(), expected(small_set)[:1])


def test_what_ends_in_a_child_ends_nothing_of_the_parents(small_set: Path) -> None:
    loader = make(small_set, 2, "fork")
    batches = iter(loader)
    first, pids = next(batches), worker_pids(loader)
    pid = os.fork()
    if pid == 0:
        del loader, batches
        atexit._run_exitfuncs()  # what sys.exit would do, multiprocessing's part too
        os._exit(0)
    for _ in range(WAIT_S * 100):
        if os.waitpid(pid, os.WNOHANG)[0]:
            break
        threading.Event().wait(0.01)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the child does not end")
    assert same([first, *batches], expected(small_set))
    assert worker_pids(loader) == pids


@pytest.mark.parametrize("method", METHODS)
def test_signals_to_the_whole_group_leave_the_workers_to_their_parent(
    small_set: Path, method: str
) -> None:
    loader = make(small_set, 2, method)
    batches = iter(loader)
    got = [next(batches)] if method == "forkserver" else []  # at once, while they start
    got += [next(batches)] if method == "forkserver" else []  # the second worker's
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        for pid in worker_pids(loader):
            os.kill(pid, number)
    assert same(got + list(batches), expected(small_set))


@pytest.mark.parametrize("method", METHODS)
def test_a_loader_with_workers_inside_a_forked_child_is_right_or_says_so(
    small_set: Path, method: str
) -> None:
    list(make(small_set, 1, method))  # the forkserver runs
    made = in_a_fork(lambda: errors_of(lambda: as_numpy(list(make(small_set, 1, method)))))
    if method == "forkserver":
        assert "start_method='spawn'" in made
    else:
        assert same_bytes(made, expected(small_set))


def errors_of(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RuntimeError as error:
        return str(error)


def test_a_daemonic_process_that_cannot_have_workers_says_so(small_set: Path) -> None:
    ours, theirs = mp.Pipe()

    def work() -> None:
        theirs.send(errors_of(lambda: len(list(make(small_set, 1, "fork")))))
        theirs.send(len(list(make(small_set))))

    process = mp.get_context("fork").Process(target=work, daemon=True)
    process.start()
    assert ours.poll(WAIT_S)
    assert "num_workers=0" in ours.recv()
    assert ours.poll(WAIT_S)
    assert ours.recv() == 9
    process.join(WAIT_S)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_killed_parent_though_a_child_of_it_lives(
    small_set: Path, tmp_path: Path, method: str
) -> None:
    end = (
        "import os\n    if os.fork() == 0:\n        time.sleep(60); os._exit(0)\n    time.sleep(60)"
    )
    with start(tmp_path, small_set, end, method=method) as process:
        pids = first_line(process)
        threading.Event().wait(0.5)  # for the fork
        process.kill()
        try:
            assert len(pids) == 2
            assert all_gone(pids, 6)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@kinds
@used
def test_pickles_and_copies_of_a_loader_go_on_from_its_place(
    small_set: Path, kind: dict[str, Any], is_used: bool
) -> None:
    loader = make(small_set, **kind)
    epoch = 0
    if is_used:
        epoch = 1
        list(loader)
    for other in (pickle.loads(pickle.dumps(loader)), copy.copy(loader), copy.deepcopy(loader)):
        assert same(list(other), expected(small_set, epoch))
        assert same(list(other), expected(small_set, epoch + 1))
    assert same(list(loader), expected(small_set, epoch))


def test_a_job_larger_than_a_pipe_is_waited_for_by_nobody() -> None:
    class Wide:
        """Batches that neither fit into a buffer nor into a pipe."""

        def batch(self, indices: np.ndarray) -> Any:
            return [indices + 1, bytes(1 << 20)]

        def fill(self, buffer: Any, indices: np.ndarray) -> None:
            return None

    rows = [np.arange(200_000) + k for k in range(12)]
    loader = Loader(Wide(), lambda epoch: rows, 1, "fork")
    found = in_threads([lambda: [batch[0] for batch in loader]])[0]
    assert all(np.array_equal(a, b + 1) for a, b in zip(found, rows, strict=True))


def test_batches_that_end_are_no_error_with_workers() -> None:
    class Rows:
        def batch(self, indices: np.ndarray) -> Any:
            return (torch.from_numpy(indices),)

        def fill(self, buffer: Any, indices: np.ndarray) -> None:
            return None

    for workers in (0, 2):
        loader = Loader(
            Rows(), lambda epoch: [np.arange(3)] * (2 if epoch == 0 else 0), workers, "fork"
        )
        assert [batch[0].tolist() for batch in loader] == [[0, 1, 2]] * 2
        assert list(loader) == []


def test_the_order_of_rows_needs_no_process(small_set: Path) -> None:
    batches = Batches(36, 4, 0)
    assert in_a_fork(lambda: [part.tolist() for part in batches(3)]) == [
        part.tolist() for part in batches(3)
    ]


class GpuEvent:
    """Frees itself as torch's does: in a forked child that ends the process."""

    def __init__(self) -> None:
        self.owner = os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.owner:
            os._exit(13)


def test_what_the_parent_noted_of_its_gpu_is_never_freed_in_a_child() -> None:
    pool = BufferPool(64, is_shared=False)
    pool.events[0] = GpuEvent()
    pid = os.fork()
    if not pid:
        del pool
        gc.collect()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    pool.events.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_start_after_batches_went_to_the_gpu_are_right(
    small_set: Path, method: str
) -> None:
    ahead, _ = create_dataloaders(small_set, batch_size=8, num_workers=0, normalize=False)
    for batch in ahead:
        assert batch[0].is_pinned()
        batch[0].to("cuda", non_blocking=True)
    with_workers, _ = create_dataloaders(
        small_set, batch_size=8, num_workers=2, normalize=False, start_method=method
    )
    ahead.set_epoch(0)
    for before, got in zip(ahead, with_workers, strict=True):
        assert all(torch.equal(a.cuda().cpu(), b) for a, b in zip(got, before, strict=True))
