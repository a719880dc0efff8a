"""Which rows real ranks get, by what the rows' own pixels say: every row once an epoch but the
remainder that is told, the same batches of all ranks with any number of them, through a cache
smaller than the set and without one, and where a run goes on with another number.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.commands import REPO
from helpers.numbered import numbered_set, write_down
from helpers.training import environment, rows

from bench.orders import orders as compared_orders
from train.__main__ import command, main
from train.job import make_setup
from train.loop import train
from train.settings import Settings

N_ROWS = 800
N_TRAIN = 605
ROWS_PER_SHARD = 20
BATCH_ROWS = 8  # of all ranks
TRAINED_AT_ONCE = 50  # the same, where a network learns
N_STEPS = N_TRAIN // BATCH_ROWS
N_EPOCHS = 2
SET_BYTES = N_ROWS * 16 * 16 * 5
LIMIT_GB = SET_BYTES * 0.6e-9
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"
Batch = list[int]  # the rows of a batch of all ranks, ascending
How = dict[str, dict[str, Any]]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered_set(tmp_path_factory.mktemp("numbered"), N_ROWS, N_TRAIN, ROWS_PER_SHARD)


def every_way(cache: Path) -> How:
    """Arguments of the loaders."""
    return {
        "full": {"shuffle": "full"},
        "wheel": {"shuffle": "wheel:5"},
        "full, cached": {"cache_dir": str(cache / "full"), "cache_limit_gb": 1.0},
        "wheel, cached": {"cache_dir": str(cache / "part"), "cache_limit_gb": LIMIT_GB},
    }


@dataclass(frozen=True)
class Given:
    """What all ranks got of one way. batches: by (epoch, step); scored: rows in any order."""

    batches: dict[tuple[int, int], Batch]
    scored: Batch

    def of_epoch(self, epoch: int) -> Batch:
        return [row for (of, _), batch in self.batches.items() if of == epoch for row in batch]


def given(out: Path, world: int) -> Given:
    """Of the ranks' files; ranks have the same batches, of as many rows each."""
    batches: dict[tuple[int, int], Batch] = {}
    scored: Batch = []
    for rank in range(world):
        lines = [json.loads(line) for line in (out / f"{rank}.jsonl").read_text().splitlines()]
        for epoch, step, found in lines:
            if epoch == "test":
                scored += found
            else:
                assert len(found) == BATCH_ROWS // world
                batches.setdefault((epoch, step), []).extend(found)
    assert {len(batch) for batch in batches.values()} <= {BATCH_ROWS}
    return Given({at: sorted(batch) for at, batch in batches.items()}, sorted(scored))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of a run: the batches from one [epoch, step] to before another, then the test rows."""

    how: How
    begin: list[int]
    stop: list[int]

    def told(self, data: Path, out: Path) -> dict[str, Any]:
        places = {"data": str(data), "out": str(out)}
        steps = {"batch_size": BATCH_ROWS, "begin": self.begin, "stop": self.stop}
        return {**places, **steps, "how": self.how}

    def of_one_process(self, data: Path, out: Path) -> dict[str, Given]:
        """Of this one, by way."""
        write_down(self.told(data, out))
        return {name: given(out / name, 1) for name in self.how}

    def of_ranks(self, world: int, data: Path, out: Path) -> dict[str, Given]:
        """Of torchrun's, by way."""
        told = json.dumps(self.told(data, out))
        done = subprocess.run(
            [sys.executable, *TORCHRUN, str(world), "-m", "helpers.numbered", told],
            cwd=REPO,
            env=environment(OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return {name: given(out / name, world) for name in self.how}


def assert_exact(found: Given) -> None:
    """Of whole epochs: each row once but the remainder, and every test row once."""
    for epoch in range(N_EPOCHS):
        of_epoch = found.of_epoch(epoch)
        assert len(of_epoch) == N_STEPS * BATCH_ROWS
        assert len(set(of_epoch)) == len(of_epoch)
        assert set(of_epoch) <= set(range(N_TRAIN))
    assert found.of_epoch(0) != found.of_epoch(1)
    assert found.scored == list(range(N_TRAIN, N_ROWS))


def joined(parts: Sequence[Given]) -> Given:
    """What runs gave that went on from each other; no batch comes twice."""
    batches = {at: batch for part in parts for at, batch in part.batches.items()}
    assert len(batches) == sum(len(part.batches) for part in parts)
    return Given(dict(sorted(batches.items())), parts[-1].scored)


END = [N_EPOCHS - 1, N_STEPS]


@pytest.mark.stress
def test_two_ranks_then_one_process_read_what_one_alone_reads_through_a_cache_that_is_too_small(
    numbered: Path, tmp_path: Path
) -> None:
    how = {name: every_way(tmp_path)[name] for name in ("full", "wheel, cached")}
    middle = [0, N_STEPS // 2]
    begun = Part(how=how, begin=[0, 0], stop=middle).of_ranks(2, numbered, tmp_path / "begun")
    ended = Part(how=how, begin=middle, stop=END).of_one_process(numbered, tmp_path / "ended")
    alone = Part(how=how, begin=[0, 0], stop=END).of_one_process(numbered, tmp_path / "alone")
    for name in how:
        assert_exact(alone[name])
        assert joined([begun[name], ended[name]]) == alone[name]


def test_the_orders_that_are_compared_with_the_wheel_give_every_row_once() -> None:
    for name, order in compared_orders(4096, 3).items():
        for epoch in range(2):
            found = np.concatenate(list(order(epoch)))
            assert sorted(found) == list(range(4096)), name


@pytest.mark.stress
def test_1_2_and_4_ranks_that_go_on_from_each_other_read_what_each_alone_reads(
    numbered: Path, tmp_path: Path
) -> None:
    how = every_way(tmp_path / "cache")
    all_of_it = Part(how=how, begin=[0, 0], stop=END)
    whole = {
        world: all_of_it.of_ranks(world, numbered, tmp_path / f"whole{world}")
        for world in (1, 2, 4)
    }
    places = [[0, 0], [0, 31], [0, 70], [1, 20], END]
    parts = [
        Part(how=how, begin=begin, stop=stop).of_ranks(world, numbered, tmp_path / f"part{begin}")
        for world, (begin, stop) in zip((4, 1, 2, 4), pairwise(places), strict=True)
    ]
    for name in how:
        assert_exact(whole[1][name])
        assert whole[1][name] == whole[2][name] == whole[4][name]
        assert joined([part[name] for part in parts]) == whole[1][name]
    assert whole[1]["full"].batches == whole[1]["full, cached"].batches
    assert whole[1]["full"].batches != whole[1]["wheel"].batches


# ---------------------------------------------------------------- python -m train


def settings(data: Path, out: Path, **changes: object) -> Settings:
    known = {
        "epochs": 2,
        "batch_size": TRAINED_AT_ONCE,
        "warmup_epochs": 0,
        "model": "helpers.networks:Asking",
        "num_workers": 0,
        "cache_dir": str(out.parent / "cache"),
        "cache_limit_gb": 0.001,
    }
    return Settings(str(data), str(out), **{**known, **changes})  # type: ignore[arg-type]


def checkpoint(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / "last.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somewhat more than the least limit of a cache that can be named."""
    return numbered_set(tmp_path_factory.mktemp("large"), 1200, 1000, ROWS_PER_SHARD)


@pytest.fixture(scope="module")
def begun(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch of two."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train(settings(large, out, epochs=1))
    return out


def test_a_run_goes_on_with_its_wheel_also_where_another_limit_would_make_another(
    large: Path, begun: Path, tmp_path: Path
) -> None:
    kept = checkpoint(begun)["settings"]["shuffle"]
    assert re.fullmatch(r"wheel:\d+", kept)
    other = settings(large, tmp_path / "run", cache_limit_gb=0.0012)
    assert make_setup(other, torch.device("cpu")).settings.shuffle not in (kept, "full")
    goes_on = settings(large, begun, cache_limit_gb=0.0012)
    assert make_setup(goes_on, torch.device("cpu")).settings.shuffle == kept
    assert (
        make_setup(replace(goes_on, shuffle="wheel"), torch.device("cpu")).settings.shuffle == kept
    )


@pytest.mark.parametrize("other", ["full", "wheel:3"])
def test_a_run_of_a_wheel_does_not_go_on_with_another_order(
    other: str, large: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = checkpoint(begun)["settings"]["shuffle"]
    words = command(settings(large, begun, cache_limit_gb=1.0)).split()[3:]
    assert main([*words, "--shuffle", other]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"was trained with --shuffle {kept}, this run has --shuffle {other}" in said


@pytest.mark.stress
def test_one_process_goes_on_with_the_wheel_that_two_ranks_began(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = command(settings(large, out, batch_size=TRAINED_AT_ONCE // 2)).split()[1:]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", *words],
        cwd=REPO,
        env=environment(OMP_NUM_THREADS="1", ASK_TO_END_IN_STEP="10"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    stored = checkpoint(out)
    assert (stored["epoch"], stored["step"]) == (0, 10), done.stderr

    train(settings(large, out, cache_limit_gb=0.0012))
    assert "at epoch 1 of 2, step 11" in capsys.readouterr().err
    train(settings(large, tmp_path / "alone"))
    ours = checkpoint(out)
    theirs = checkpoint(tmp_path / "alone")
    kept = stored["settings"]["shuffle"]
    assert ours["settings"]["shuffle"] == theirs["settings"]["shuffle"] == kept
    for one, another in zip(
        rows(out / "metrics.csv"), rows(tmp_path / "alone" / "metrics.csv"), strict=True
    ):
        for name in ("train_loss", "test_loss", "train_top1", "test_top1", "lr"):
            assert float(one[name]) == pytest.approx(float(another[name]), abs=1e-5), name
    for key in ours["model"]:
        torch.testing.assert_close(ours["model"][key], theirs["model"][key], atol=1e-5, rtol=1e-4)
