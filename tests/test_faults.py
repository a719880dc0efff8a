"""Clusters, job arrays and buckets under faults: real processes, killed, and servers that fail.

After each fault the set is the one that a single machine makes, byte by byte, or there is one line
and a status, and the same command goes on and ends so. Never is there a manifest over bytes that
are wrong or missing, and nothing hangs.
"""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO

for package in ("distributed", "s3fs", "moto", "boto3"):
    pytest.importorskip(package, reason="needs the extras s3 and cluster, and moto")

import boto3
from helpers.commands import conversion
from helpers.dask_processes import DaskProcesses, dask_processes
from helpers.fault_proxy import ALL, OF_ANY, OF_LISTING, FaultProxy, Plan, counted
from helpers.frames import write_frames_of, write_table
from helpers.servers import serving
from helpers.sets import committed
from helpers.sets import content as content_of
from moto.server import ThreadedMotoServer

from shards.dataset import NOT_CONTENT
from shards.manifest import MANIFEST

BUCKET = "sets"
N_ROWS = 36
AS_IS = ("--size", 8, "--rows-per-shard", 2)  # 18 shards of three fields
WITHIN_S = 240  # of one command, on a busy machine
TOLD: Counter[str] = Counter()  # faults by kind, and how commands ended
Files = dict[str, bytes]
Disturb = Callable[["subprocess.Popen[str]"], None]


# ------------------------------------------------------------------------------------------ places


@dataclass(frozen=True)
class Bucket:
    """A prefix of the bucket, read past the proxy."""

    client: Any
    prefix: str

    @property
    def out(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/")
        return [each["Key"] for each in found.get("Contents", ())]

    def files(self) -> Files:
        found = {}
        for key in self.names():
            data = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            found[key.removeprefix(f"{self.prefix}/").partition("/")[2]] = data
        return found


@dataclass(frozen=True)
class Folder:
    path: Path

    @property
    def out(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        return [str(path) for path in self.path.glob("*/*") if path.name[0] != "."]

    def files(self) -> Files:
        found = {}
        for directory in self.path.glob("*-8-*"):
            found |= {n: d for n, d in content_of(directory).items() if not n.endswith(".tmp")}
        return found


Place = Bucket | Folder


def check(place: Place, right: Files, *, may_lack_rows: bool = False) -> bool:
    """Whether the set is finished. No file of it has other bytes than it should, finished or not.

    may_lack_rows: where rows failed, the shards of an unfinished set have nothing in their place.
    """
    files = place.files()
    wrong = [name for name, data in files.items() if name in right and data != right[name]]
    assert not wrong or (may_lack_rows and MANIFEST not in files), wrong
    unknown = [n for n in files.keys() - right.keys() if not NOT_CONTENT.fullmatch(n)]
    assert not unknown
    if MANIFEST not in files:
        return False
    assert right.keys() <= files.keys(), "a manifest over files that are not there"
    return True


# ------------------------------------------------------------------------------------- the grounds


@dataclass(frozen=True)
class Ground:
    """What all tests share. right: the set's files as one machine makes them, without a fault."""

    table: Path
    right: Files
    client: Any
    proxy: FaultProxy
    folder: Path

    def bucket(self, name: str) -> Bucket:
        return Bucket(self.client, name)

    @property
    def env(self) -> dict[str, str]:
        return {**KEYS, "AWS_ENDPOINT_URL": self.proxy.url}

    def faults(self, plan: Plan) -> AbstractContextManager[None]:
        """Meanwhile. What was done is counted."""
        return counted(self.proxy, plan, TOLD)


KEYS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "a-word-that-is-shown-nowhere",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    rows = write_frames_of(folder / "frames", N_ROWS, split="train")
    table = write_table(folder / "frames" / "rows.csv", rows)
    made = subprocess.run(
        conversion(table, folder / "right", *AS_IS), cwd=REPO, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    proxy = FaultProxy(server.get_host_and_port(), Plan(seed=0, share=0.0))
    with pytest.MonkeyPatch.context() as patch, proxy.serving():
        for name, value in KEYS.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url="http://{}:{}".format(*server.get_host_and_port()))
        client.create_bucket(Bucket=BUCKET)
        right = committed(Path(made.stdout.strip()))
        yield Ground(table=table, right=right, client=client, proxy=proxy, folder=folder)
    server.stop()
    print("\nfaults, and how commands ended:")
    for what, count in sorted(TOLD.items()):
        print(f"{count:6d}  {what}")


@pytest.fixture(scope="module")
def cluster(ground: Ground) -> Iterator[DaskProcesses]:
    with dask_processes(ground.folder, ground.env) as found:
        yield found


# ---------------------------------------------------------------------------------------- commands


def started(ground: Ground, place: Place, *more: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        conversion(ground.table, place.out, *AS_IS, *more),
        cwd=REPO,
        env={**os.environ, **ground.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", disturb: Disturb | None = None) -> int:
    """Its status, after what it says was looked at: one line where it is no success."""
    try:
        if disturb is not None:
            disturb(process)
        said, errors = process.communicate(timeout=WITHIN_S)
    finally:
        process.kill()
    status = process.returncode
    TOLD[f"ended with {status}"] += 1
    assert status in (0, 2, 130, -signal.SIGKILL), errors
    assert "Traceback" not in errors, errors
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in errors + said
    # No bytes are ever wrong in here: whoever says so would have them made again, with --repair.
    assert "other bytes" not in errors, errors
    if status == 2:
        print("one line:", errors.splitlines()[-1])
    return status


def until_right(
    ground: Ground,
    place: Place,
    disturbances: Sequence[Disturb | None],
    *more: object,
    may_lack_rows: bool = False,
) -> list[int]:
    """Run the same command again and again, each time with the next disturbance, then with none;
    the last one has to make the set.
    """
    statuses = []
    for disturb in (*disturbances, None, None):
        statuses.append(ended(started(ground, place, *more), disturb))
        is_finished = check(place, ground.right, may_lack_rows=may_lack_rows)
        if statuses[-1] == 0:
            assert is_finished
            return statuses
    raise AssertionError(f"the same command does not end: {statuses}")


def once_there_are(place: Place, n_files: int, act: Callable[[Any], object], what: str) -> Disturb:
    """Do something to the command, or to anything, once there are so many files and one more than
    at first: not while Python itself still starts.
    """

    def disturb(process: "subprocess.Popen[str]") -> None:
        wanted = max(n_files, len(place.names()) + 1)
        while process.poll() is None and not _has_begun(process.pid):
            time.sleep(0.01)
        while process.poll() is None and len(place.names()) < wanted:
            time.sleep(0.005)
        if process.poll() is None:
            act(process)
            TOLD[what] += 1

    return disturb


def _has_begun(pid: int) -> bool:
    """Whether a command has read its words: it catches SIGTERM then."""
    with suppress(OSError):
        caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)
    return False


def signalled(place: Place, n_files: int, number: signal.Signals) -> Disturb:
    act = lambda process: process.send_signal(number)  # noqa: E731
    return once_there_are(place, n_files, act, f"client gets {number.name}")


# ---------------------------------------------------------------------------- one machine, a bucket

SEEDS = [pytest.param(seed, marks=pytest.mark.stress) for seed in range(16)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_store_that_fails_at_random(seed: int, ground: Ground) -> None:
    place = ground.bucket(f"random-{seed}")
    share = (0.04, 0.1, 0.25, 0.5)[seed % 4]
    plan = Plan(seed=seed, share=share, most=25)
    with ground.faults(plan):
        until_right(ground, place, [None] * 3)


@pytest.mark.stress
@pytest.mark.parametrize("kind", ALL)
def test_a_store_that_fails_in_one_way(kind: str, ground: Ground) -> None:
    place = ground.bucket(f"kind-{ALL.index(kind)}")
    share = 1.0 if kind in OF_LISTING else 0.4
    with ground.faults(Plan(seed=1, share=share, kinds=(kind,), most=12)):
        until_right(ground, place, [None] * 3)


@pytest.mark.stress
def test_a_store_that_is_gone_for_long(ground: Ground) -> None:
    place = ground.bucket("gone")
    with ground.faults(Plan(seed=1, share=1.0, kinds=OF_ANY[:3], after=20)):
        assert ended(started(ground, place)) == 2
        assert not check(place, ground.right)
    assert until_right(ground, place, [])[-1] == 0


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(9))
def test_a_client_that_is_killed_while_it_writes_to_a_bucket(seed: int, ground: Ground) -> None:
    place = ground.bucket(f"client-{seed}")
    rng = random.Random(seed)
    number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[seed % 3]
    disturbances = [signalled(place, rng.randint(1, 72), number) for _ in range(3)]
    with ground.faults(Plan(seed=seed, share=0.05, kinds=OF_ANY)):
        until_right(ground, place, disturbances)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(5))
def test_two_clients_at_once_in_one_bucket(seed: int, ground: Ground) -> None:
    place = ground.bucket(f"two-{seed}")
    with ground.faults(Plan(seed=seed, share=0.08, most=12)):
        both = [started(ground, place), started(ground, place)]
        TOLD["two clients at once"] += 1
        statuses = [ended(process) for process in both]
        check(place, ground.right)
        if 0 not in statuses:
            until_right(ground, place, [])
    until_right(ground, place, [])


# --------------------------------------------------------------------------------------- job arrays


def parts_at_once(ground: Ground, place: Place, seed: int) -> None:
    """Three parts and one of them twice, some killed; then each again until the set is there."""
    rng = random.Random(seed)
    for _ in range(6):
        jobs = [(part, started(ground, place, "--part", f"{part}/3")) for part in (1, 2, 3, 2)]
        TOLD["a part twice at once"] += 1
        for _, process in jobs:
            if rng.random() < 0.4:
                signalled(place, rng.randint(1, 60), signal.SIGKILL)(process)
        statuses = [ended(process) for _, process in jobs]
        is_finished = check(place, ground.right)
        if is_finished:
            return
        assert statuses != [0, 0, 0, 0], "all parts are done, and there is no set"
    raise AssertionError("parts do not end")


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(5))
def test_parts_in_a_bucket(seed: int, ground: Ground) -> None:
    place = ground.bucket(f"parts-{seed}")
    kinds = [kind for kind in ALL if kind not in OF_LISTING]
    with ground.faults(Plan(seed=seed, share=0.05, kinds=kinds, most=15)):
        parts_at_once(ground, place, seed)
    assert ended(started(ground, place)) == 0
    assert check(place, ground.right)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(1, 6))]
)
def test_parts_in_a_folder(seed: int, ground: Ground, tmp_path: Path) -> None:
    place = Folder(tmp_path / "out")
    parts_at_once(ground, place, seed)
    assert ended(started(ground, place)) == 0
    assert check(place, ground.right)


# ------------------------------------------------------------------------------------ a Dask cluster


def place_of(kind: str, name: str, ground: Ground, tmp_path: Path) -> Place:
    return ground.bucket(name) if kind == "bucket" else Folder(tmp_path / "out")


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("seed", range(6))
def test_workers_that_are_killed(
    seed: int, kind: str, ground: Ground, cluster: DaskProcesses, tmp_path: Path
) -> None:
    place = place_of(kind, f"workers-{seed}", ground, tmp_path)
    rng = random.Random(seed)

    def kill_some(process: "subprocess.Popen[str]") -> None:
        for n_files in sorted(rng.sample(range(1, 72), 2)):
            kill = lambda _: cluster.kill_one_that_works(rng.randrange(8))  # noqa: E731
            once_there_are(place, n_files, kill, "worker killed")(process)

    until_right(ground, place, [kill_some] * 2, "--scheduler", cluster.address)


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("seed", range(6))
def test_a_client_of_a_cluster_that_is_killed(
    seed: int, kind: str, ground: Ground, cluster: DaskProcesses, tmp_path: Path
) -> None:
    place = place_of(kind, f"dask-client-{seed}", ground, tmp_path)
    rng = random.Random(seed)
    number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[seed % 3]
    disturbances = [signalled(place, rng.randint(1, 72), number) for _ in range(3)]
    until_right(ground, place, disturbances, "--scheduler", cluster.address)


@pytest.mark.stress
@pytest.mark.parametrize("what", ["scheduler", "all", "all and the client"])
@pytest.mark.parametrize("seed", range(2))
def test_a_scheduler_that_is_killed(seed: int, what: str, ground: Ground, tmp_path: Path) -> None:
    place = Folder(tmp_path / "out")
    rng = random.Random(f"{seed} {what}")
    with dask_processes(tmp_path, ground.env) as cluster:

        def kill(process: "subprocess.Popen[str]") -> None:
            if what == "scheduler":
                cluster.kill_scheduler()
            else:
                cluster.kill_all()
            if what == "all and the client":
                process.kill()

        disturb = once_there_are(place, rng.randint(2, 40), kill, f"{what} killed")
        status = ended(started(ground, place, "--scheduler", cluster.address), disturb)
        is_finished = check(place, ground.right)
        assert is_finished == (status == 0)
        cluster.kill_all()
        cluster.start_scheduler()
        cluster.start_worker()
        until_right(ground, place, [], "--scheduler", cluster.address)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(4))
def test_two_clients_of_one_cluster_and_one_bucket(
    seed: int, ground: Ground, cluster: DaskProcesses
) -> None:
    place = ground.bucket(f"dask-two-{seed}")
    more = ("--scheduler", cluster.address)
    with ground.faults(Plan(seed=seed, share=0.05, most=10)):
        both = [started(ground, place, *more), started(ground, place, *more)]
        TOLD["two clients of a cluster"] += 1
        for process in both:
            ended(process)
        check(place, ground.right)
    until_right(ground, place, [], *more)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(6))
def test_a_cluster_whose_store_fails(seed: int, ground: Ground, cluster: DaskProcesses) -> None:
    place = ground.bucket(f"dask-random-{seed}")
    with ground.faults(Plan(seed=seed, share=(0.05, 0.15, 0.4)[seed % 3], most=25)):
        until_right(ground, place, [None] * 3, "--scheduler", cluster.address)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(3))
def test_a_shared_folder_that_disappears(
    seed: int, ground: Ground, cluster: DaskProcesses, tmp_path: Path
) -> None:
    place = Folder(tmp_path / "shared" / "out")
    place.path.mkdir(parents=True)
    aside = tmp_path / "unmounted"

    def unmount(process: "subprocess.Popen[str]") -> None:
        (tmp_path / "shared").rename(aside)

    disturb = once_there_are(place, 5 + 20 * seed, unmount, "shared folder gone")
    status = ended(started(ground, place, "--scheduler", cluster.address), disturb)
    if aside.exists():
        assert status == 2
        shutil.rmtree(tmp_path / "shared", ignore_errors=True)  # what lies under a mount is hidden
        aside.rename(tmp_path / "shared")
    check(place, ground.right)
    until_right(ground, place, [], "--scheduler", cluster.address)


@pytest.mark.stress
def test_a_worker_with_another_version_of_ours(ground: Ground, tmp_path: Path) -> None:
    place = Folder(tmp_path / "out")
    other = tmp_path / "other"
    for name in ("shards", "loader", "stores", "convert", "train"):
        shutil.copytree(REPO / name, other / name)
    with open(other / "convert" / "resize.py", "a") as file:
        file.write("# of another commit\n")
    with dask_processes(tmp_path, ground.env, n_workers=1) as cluster:
        worker = cluster.start_worker(checkout=other)
        time.sleep(8)
        TOLD["worker of another version"] += 1
        process = started(ground, place, "--scheduler", cluster.address)
        assert ended(process) == 2
        assert not check(place, ground.right)
        worker.terminate()
        worker.wait()
        until_right(ground, place, [], "--scheduler", cluster.address)


@pytest.mark.stress
def test_a_worker_over_its_memory_limit(ground: Ground, tmp_path: Path) -> None:
    place = Folder(tmp_path / "out")
    with dask_processes(tmp_path, ground.env, n_workers=0) as cluster:
        worker = cluster.start_worker("--memory-limit", "115MB")
        TOLD["worker over its memory limit"] += 1
        status = ended(started(ground, place, "--scheduler", cluster.address))
        check(place, ground.right)
        worker.terminate()
        worker.wait()
        cluster.start_worker()
        print("with too little memory:", status)
        until_right(ground, place, [], "--scheduler", cluster.address)


# ------------------------------------------------------------------------------------- a web server


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("seed", range(4))
def test_pictures_on_a_web_server_that_fails(
    seed: int, kind: str, ground: Ground, tmp_path: Path
) -> None:
    place = place_of(kind, f"web-{seed}", ground, tmp_path)
    folder = ground.table.parent
    with serving() as server:
        for path in folder.glob("*/*.png"):
            server.files[f"/{path.relative_to(folder)}"] = path.read_bytes()
        plan = Plan(seed=seed, share=0.15, most=20)
        proxy = FaultProxy(("127.0.0.1", server.server_address[1]), plan)
        with proxy.serving() as url:
            until_right(ground, place, [None] * 3, "--root", url, may_lack_rows=True)
    TOLD.update({f"web server: {what}": count for what, count in proxy.done.items()})


# ------------------------------------------------------------------------------------ copies, reads


def command(ground: Ground, *words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=REPO,
        env={**os.environ, **ground.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(5))
def test_copies_to_and_from_a_store_that_fails(seed: int, ground: Ground, tmp_path: Path) -> None:
    place = ground.bucket(f"copies-{seed}")
    local = next((ground.folder / "right").glob("*-8-*"))
    with ground.faults(Plan(seed=seed, share=0.15, most=30)):
        for _ in range(6):
            status = ended(command(ground, "convert", "push", local, place.out))
            is_finished = check(place, ground.right)
            if status == 0:
                break
        assert status == 0
        assert is_finished
    with ground.faults(Plan(seed=seed + 100, share=0.15, most=30)):
        for _ in range(6):
            status = ended(command(ground, "convert", "pull", place.out, tmp_path / "back"))
            is_finished = check(Folder(tmp_path / "back"), ground.right)
            if status == 0:
                break
        assert status == 0
        assert is_finished
    with ground.faults(Plan(seed=seed + 200, share=0.1, most=10)):
        for _ in range(6):
            status = ended(command(ground, "convert", "verify", place.out))
            if status == 0:
                break
        assert status == 0
