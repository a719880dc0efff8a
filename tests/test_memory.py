"""The promise in the title: a worker holds next to nothing; and what is left of memory is known
before it is needed.
"""

import multiprocessing as mp
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.loaders import worker_pids

from loader import memory
from loader.loader import Loader
from loader.memory import PROC, sizes_in, tree_memory
from train.__main__ import main
from train.data import ShardDataset
from train.order import Batches

MOST = 8 << 20
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def private_dirty(pid: int) -> int:
    return sizes_in(PROC / str(pid) / "smaps_rollup")["Private_Dirty"]


def empty(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return ()


class Nothing:
    """A dataset that holds and delivers nothing: what a worker costs that only exists."""

    def batch(self, indices: object) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(1),)

    def fill(self, buffer: object, indices: object) -> None:
        return None


def worker_memory(dataset: Any, workers: int, method: str) -> list[int]:
    loader = Loader(dataset, Batches(36, 4, 0), workers, method)
    for _ in range(2 * max(1, workers // 4)):  # every worker gets jobs
        for batch in loader:
            del batch
    return [private_dirty(pid) for pid in worker_pids(loader)]


@pytest.mark.parametrize(
    ("method", "workers"),
    [("fork", 1), ("fork", 4), ("fork", 16), ("forkserver", 1), ("forkserver", 4), ("spawn", 2)],
)
def test_a_worker_holds_next_to_nothing(small_set: Path, method: str, workers: int) -> None:
    bare = worker_memory(Nothing(), 1, method)[0]
    held = worker_memory(ShardDataset(small_set, split="all"), workers, method)
    assert max(held) - bare <= MOST


@pytest.mark.stress
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_sixteen_workers_hold_next_to_nothing(small_set: Path, method: str) -> None:
    test_a_worker_holds_next_to_nothing(small_set, method, 16)


def test_the_tree_counts_shared_pages_once() -> None:
    data = torch.ones(32 << 20, dtype=torch.uint8)
    before = tree_memory().pss_anon
    context = mp.get_context("fork")
    stop = context.Event()
    processes = [context.Process(target=stop.wait) for _ in range(3)]
    for process in processes:
        process.start()
    after = tree_memory().pss_anon
    stop.set()
    for process in processes:
        process.join()
    assert after - before < data.nbytes


def test_a_training_that_does_not_fit_is_one_line_and_status_2(
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable: 4 kB\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert (
        main(
            [
                "--data",
                str(small_set),
                "--out",
                str(tmp_path / "run"),
                "--size",
                "32",
                "--num-workers",
                "0",
            ]
        )
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: 4 batches of ")
    assert line.endswith(
        " MiB of memory, the machine has 0 MiB left. Use a smaller batch size (--batch-size)"
    )
