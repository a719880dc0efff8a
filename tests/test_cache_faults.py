"""Trainings through a cache under faults: real processes, killed and stopped, a store that fails,
and a disk that is full.

Whatever happens, each batch is that of the set itself, or there is one line and a status; the same
command again goes on and ends right; nothing hangs, and nothing is left running.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")

from helpers.caches import (
    Nursery,
    batches_in,
    fetchers,
    nobody_is_left,
    right_sums,
    serving_set,
    shard_bytes_in,
    start_training,
)
from helpers.disks import fill, small_disk
from helpers.fault_proxy import (
    CUT,
    DELAY,
    INTERNAL,
    RESET,
    RESET_INSIDE,
    SLOW_DOWN,
    FaultProxy,
    Plan,
    counted,
)
from helpers.made_up import LabSource
from helpers.sets import convert

from shards.spec import ConversionSettings

N_ROWS = 96
SETTINGS = ConversionSettings(size=16, rows_per_shard=2)  # 48 shards
SHARD_BYTES = 2816
LIMIT_BYTES = 90_000  # of 132 KB that are read
IN_PLAY = {LIMIT_BYTES: "wheel:8", 10**7: "full"}
N_EPOCHS = 3
WITHIN_S = 150  # of one command, on a busy machine; then its stacks are shown
BAD_ANSWERS = (SLOW_DOWN, INTERNAL, RESET, DELAY, RESET_INSIDE, CUT)
TOLD: Counter[str] = Counter()  # faults by kind, and how trainings ended
Sums = list[list[list[str]]]


@dataclass(frozen=True)
class Ground:
    """What all rounds share. url: of the set, through the proxy. known: what `right` has worked
    out.
    """

    directory: Path
    url: str
    proxy: FaultProxy
    nursery: Nursery
    known: dict[tuple[int, int, int], Sums] = field(default_factory=dict)

    def right(self, limit: int, rank: int, world: int) -> Sums:
        key = limit, rank, world
        if key not in self.known:
            how = {"rank": rank, "world": world, "batch_size": 2 // world}
            self.known[key] = right_sums(self.directory, IN_PLAY[limit], N_EPOCHS, **how)
        return self.known[key]

    def faults(self, plan: Plan) -> AbstractContextManager[None]:
        """Meanwhile. What was done is counted."""
        return counted(self.proxy, plan, TOLD)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    directory = convert(LabSource(n_rows=N_ROWS, splits=("train", "val")), folder / "set", SETTINGS)
    with serving_set(directory) as server:
        proxy = FaultProxy(("127.0.0.1", server.server_address[1]), Plan(seed=0, share=0.0))
        with proxy.serving() as url:
            nursery = Nursery(folder)
            yield Ground(directory, f"{url}/{directory.name}", proxy, nursery)
            nursery.close()
    print("\nfaults, and how trainings ended:")
    for what, count in sorted(TOLD.items()):
        print(f"{count:6d}  {what}")


# ---------------------------------------------------------------------------------------- a training


@dataclass(frozen=True, kw_only=True)
class How:
    """Of a round's trainings."""

    limit: int
    world: int = 1
    workers: int = 0
    prefetch: bool = True

    def of_rank(self, rank: int) -> dict[str, Any]:
        return {
            **{"rank": rank, "world": self.world, "shuffle": IN_PLAY[self.limit]},
            **{"num_workers": self.workers, "prefetch": self.prefetch},
            **{"batch_size": 2 // self.world},  # of all ranks together the same
            "cache_limit_gb": self.limit / 1e9,
        }


class Ranks:
    """The processes of one training, which end together as under torchrun."""

    def __init__(self, ground: Ground, cache: Path, how: How, start: int = 0) -> None:
        self.ground = ground
        self.cache = cache
        self.how = how
        self.start = start
        self.processes = [
            ground.nursery.start(ground.url, cache, N_EPOCHS, start, **how.of_rank(rank))
            for rank in range(how.world)
        ]

    def are_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def end(self) -> list[int | None]:
        """Wait for all; where one is killed the others are too. What each has read is looked at."""
        until = time.monotonic() + WITHIN_S
        while any(process.poll() is None for process in self.processes):
            if any(process.poll() not in (None, 0) for process in self.processes):
                time.sleep(1.0)  # who fails by itself says so
                self._kill()
            if time.monotonic() > until:
                self._show_stacks()
            time.sleep(0.02)
        is_in_time = time.monotonic() < until
        for rank, process in enumerate(self.processes):
            self._check(rank, *process.said())
        assert is_in_time, [process.said()[1] for process in self.processes]
        assert nobody_is_left(self.cache), "a fetcher is left"
        return [process.poll() for process in self.processes]

    def _kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)

    def _show_stacks(self) -> None:
        """In the standard error of each, and then their end."""
        for process in self.processes:
            process.send_signal(signal.SIGUSR1)
        time.sleep(2.0)
        self._kill()

    def _check(self, rank: int, said: str, errors: str) -> None:
        status = self.processes[rank].poll()
        TOLD[f"ended with {status}"] += 1
        right = self.ground.right(self.how.limit, rank, self.how.world)
        found = batches_in(said)
        wrong = [key for key, each in found.items() if right[key[0]][key[1]][key[2]] != each]
        assert not wrong, (wrong, errors)
        assert status in (0, 2, -signal.SIGKILL), errors
        if status == 0:
            n_right = sum(len(epoch) for loader in right for epoch in loader[self.start :])
            assert len(found) == n_right
        if status == 2:
            assert "Traceback" not in errors, errors
            print("one line:", errors.splitlines()[-1])
            TOLD["one line: " + _kind_of(errors.splitlines()[-1])] += 1


def _kind_of(line: str) -> str:
    for kind in (
        "the disk is full",
        "failed (",
        "other content",
        "ended 5 times",
        "is to hold",
        "No space left",
    ):
        if kind in line:
            return kind
    return line[:80]


# --------------------------------------------------------------------------------------- disturbances


class Disturbance:
    """What is done to a training while it runs."""

    def __init__(self, seed: int, ranks: Ranks, disk: Path | None) -> None:
        self.rng = random.Random(seed)
        self.ranks = ranks
        self.disk = disk

    def act(self) -> None:
        kinds = [self.kill_fetcher, self.kill_fetcher, self.kill_rank, self.stop_one, self.nothing]
        if self.disk is not None:
            kinds = [self.fill_for_a_while, self.fill_for_a_while, self.kill_fetcher]
        for _ in range(self.rng.randint(1, 3)):
            self._wait_until_it_reads()
            time.sleep(self.rng.uniform(0, 0.6))
            if self.ranks.are_running():
                self.rng.choice(kinds)()

    def _wait_until_it_reads(self) -> None:
        while self.ranks.are_running() and not fetchers(self.ranks.cache):
            if list(self.ranks.cache.glob("*/rgb-*.npy")):
                return
            time.sleep(0.02)

    def kill_fetcher(self) -> None:
        for pid in fetchers(self.ranks.cache):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                TOLD["fetcher gets SIGKILL"] += 1

    def kill_rank(self) -> None:
        self.rng.choice(self.ranks.processes).send_signal(signal.SIGKILL)
        TOLD["rank gets SIGKILL"] += 1

    def stop_one(self) -> None:
        pids = [*fetchers(self.ranks.cache), *(each.pid for each in self.ranks.processes)]
        pid = self.rng.choice(pids)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1.0)
            os.kill(pid, signal.SIGCONT)
            TOLD["SIGSTOP for a second"] += 1

    def nothing(self) -> None:
        """The network alone."""

    def fill_for_a_while(self) -> None:
        assert self.disk is not None
        fill(self.disk)
        time.sleep(self.rng.uniform(0.5, 3.0))
        (self.disk / "filler").unlink()
        TOLD["disk full for a while"] += 1


def how_of(rng: random.Random) -> How:
    return How(
        limit=rng.choice([LIMIT_BYTES, LIMIT_BYTES, 10**7]),
        world=rng.choice([1, 1, 2]),
        workers=rng.choice([0, 0, 2]),
        prefetch=rng.random() < 0.7,
    )


def round_of(seed: int, ground: Ground, tmp_path: Path) -> None:
    rng = random.Random(f"cache {seed}")
    how = how_of(rng)
    start = rng.choice([0, 0, 1])
    has_disk = rng.random() < 0.25
    share = rng.choice([0.0, 0.02, 0.1, 0.3])
    plan = Plan(seed=seed, share=share, kinds=BAD_ANSWERS, most=40)
    with ExitStack() as held:
        disk = held.enter_context(small_disk(tmp_path / "disk", 1 << 20)) if has_disk else None
        cache = (disk or tmp_path) / "cache"
        for attempt in range(2):
            with ground.faults(plan):
                ranks = Ranks(ground, cache, how, start)
                Disturbance(10 * seed + attempt, ranks, disk).act()
                ranks.end()
            assert shard_bytes_in(cache) <= how.limit
        assert set(Ranks(ground, cache, how, start).end()) == {0}
        TOLD["rounds"] += 1


N_ROUNDS = int(os.environ.get("CACHE_ROUNDS", "100"))
FIRST_ROUND = int(os.environ.get("CACHE_FIRST_ROUND", "0"))


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(FIRST_ROUND, FIRST_ROUND + N_ROUNDS))
def test_a_round_of_faults(seed: int, ground: Ground, tmp_path: Path) -> None:
    round_of(seed, ground, tmp_path)


# ----------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.stress), 2])
def test_a_disk_that_holds_little_more_than_the_limit_is_enough(
    workers: int, ground: Ground, tmp_path: Path
) -> None:
    how = How(limit=LIMIT_BYTES, workers=workers)
    n_files = 2 * (LIMIT_BYTES // SHARD_BYTES)  # each takes a whole page of a tmpfs
    with small_disk(tmp_path / "disk", 4096 * n_files + (160 << 10)) as disk:
        assert Ranks(ground, disk / "cache", how).end() == [0]


def test_a_disk_that_is_full_is_one_line_and_nothing_is_left(
    ground: Ground, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        (disk / "filler").write_bytes(bytes(100 << 10))
        process = start_training(ground.url, disk / "cache", 1, cache_limit_gb=10**7 / 1e9)
        _, errors = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 2, errors
    assert "is to hold" in errors.splitlines()[-1]
    assert "Traceback" not in errors
