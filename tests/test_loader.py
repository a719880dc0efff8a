"""The loader: the same batches however they are made, buffers that nobody can see reused, and ends
that are clean.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.commands import all_gone
from helpers.loaders import KINDS, METHODS, expected, first_line, make, same, start, worker_pids

from loader import loader as loader_module
from loader.buffers import N_BUFFERS, arrays_in
from loader.loader import Loader
from loader.messages import Layout
from loader.producers import ThreadProducer
from shards.errors import RemoteSet
from stores import mounted as mount
from train.data import ShardDataset, create_dataloaders
from train.order import Batches

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


kinds = pytest.mark.parametrize("kind", KINDS, ids=["inline", "thread", "fork"])


def flip(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return batch[0].flip(-1), *batch[1:], torch.tensor([os.getpid()])


def as_dict(batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return dict(zip(("rgb", "depth", "label"), batch, strict=True))


def noise(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return torch.rand(3), torch.from_numpy(np.random.random(3))  # noqa: NPY002


def fail(batch: tuple[torch.Tensor, ...]) -> None:
    raise ValueError("no such colour")


@pytest.mark.parametrize("method", METHODS)
def test_every_start_method_keeps_a_list_right(small_set: Path, method: str) -> None:
    assert same(list(make(small_set, 2, method)), expected(small_set))


@kinds
def test_kept_batches_are_never_overwritten(small_set: Path, kind: dict[str, Any]) -> None:
    loader = make(small_set, **kind)
    kept = [batch for _ in range(2) for batch in loader]
    assert same(kept, expected(small_set, 0) + expected(small_set, 1))


class Numbers:
    """Rows that are their own numbers."""

    def batch(self, indices: Any) -> tuple[torch.Tensor, ...]:
        return (torch.as_tensor(np.asarray(indices, np.int64)),)

    def fill(self, buffer: memoryview, indices: Any) -> Layout:
        layout = [(np.dtype("i8"), (len(indices),))]
        arrays_in(buffer, layout)[0][:] = indices
        return layout


class Interrupting:
    """Raises KeyboardInterrupt in this thread where Python would hear Ctrl-C: at the n-th entry of
    a function of the loader's, or behind the n-th call that one makes.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.n_places = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        is_ours = Path(frame.f_code.co_filename).parent.name == "loader"
        if is_ours and event in ("call", "c_return"):
            self.n_places += 1
            if self.n_places == self.at:
                raise KeyboardInterrupt


@pytest.mark.parametrize("kind", KINDS[:2], ids=["inline", "thread"])
def test_ctrl_c_at_any_moment_of_an_iteration_leaves_a_loader_that_works(
    kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # heard while a batch is freed
    order = Batches(8, 4, None)
    loader = Loader(Numbers(), order, 0, prefetch=kind.get("prefetch", True))
    at = 0
    was_reached = True
    while was_reached:
        at += 1
        interrupting = Interrupting(at)
        with suppress(KeyboardInterrupt):
            sys.setprofile(interrupting)
            for _ in loader:
                pass
        sys.setprofile(None)
        was_reached = interrupting.n_places >= at
        loader.set_epoch(0)
        assert [rows.tolist() for (rows,) in loader] == [list(rows) for rows in order(0)]
        loader.set_epoch(0)
    assert at > 50


@kinds
def test_buffers_are_reused_when_nothing_is_kept(small_set: Path, kind: dict[str, Any]) -> None:
    loader = make(small_set, **kind)
    addresses = [rgb.data_ptr() for _ in range(3) for rgb, _, _ in loader]
    assert len(addresses) == 27
    assert len(set(addresses)) <= N_BUFFERS


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@kinds
def test_a_view_of_one_part_keeps_its_buffer_and_labels_keep_none(
    small_set: Path, kind: dict[str, Any]
) -> None:
    loader = make(small_set, **kind)
    want = expected(small_set)
    view, labels = next(iter(loader))[0][1, 2].numpy()[3:], []
    for _ in range(2):
        labels += [batch[2] for batch in loader]
    np.testing.assert_array_equal(view, want[0][0][1, 2].numpy()[3:])

    producer = loader.stream.producer
    n_ready = (0,)
    if isinstance(producer, ThreadProducer):
        # It has one ready for the next iteration: in a buffer, or as a copy where it came to that
        # while this loop still held two batches.
        assert eventually(lambda: not producer._ready.empty())
        n_ready = (0, 1)
    lent = producer.pool.lent  # type: ignore[union-attr]
    assert eventually(lambda: len(lent) - 1 in n_ready)
    n_lent = len(lent)
    del view
    assert eventually(lambda: len(lent) == n_lent - 1)


@kinds
def test_left_early_and_begun_again_is_the_same_epoch(
    small_set: Path, kind: dict[str, Any]
) -> None:
    loader, want = make(small_set, **kind), expected(small_set)
    for _, batch in zip(range(3), loader, strict=False):
        assert batch is not None
    assert same(list(loader), want)


@kinds
def test_resumes_at_a_step_and_then_runs_on(small_set: Path, kind: dict[str, Any]) -> None:
    loader = make(small_set, **kind)
    next(iter(loader))  # what was read ahead must not be delivered
    loader.set_epoch(3, start=5)
    assert len(loader) == 4
    assert same(list(loader), expected(small_set, 3, 5))
    assert same(list(loader), expected(small_set, 4))
    loader.set_epoch(1)
    assert same(list(loader), expected(small_set, 1))


@kinds
def test_an_older_iteration_does_not_take_from_a_newer_one(
    small_set: Path, kind: dict[str, Any]
) -> None:
    loader = make(small_set, **kind)
    old = iter(loader)
    next(old)
    new = iter(loader)
    with pytest.raises(RuntimeError, match="two loaders"):
        next(old)
    assert same(list(new), expected(small_set))


@kinds
def test_two_loaders_at_once(small_set: Path, kind: dict[str, Any]) -> None:
    pairs = list(zip(make(small_set, **kind), make(small_set, **kind), strict=True))
    assert same([a for a, _ in pairs], expected(small_set))
    assert same([b for _, b in pairs], expected(small_set))


def test_workers_start_with_the_first_batch_and_stay(small_set: Path) -> None:
    loader = make(small_set, 2, "fork")
    assert loader.stream.producer is None
    pids = []
    for _ in range(3):
        list(loader)
        pids.append(worker_pids(loader))
    assert pids[0] == pids[1] == pids[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": True},
        {"target": "semantic40"},
        {"target": "depth", "normalize": True},
        {"target": "instance", "fields": ("rgb", "raw_depth")},
    ],
)
@kinds
def test_computed_values_are_the_datasets(
    small_set: Path, kind: dict[str, Any], settings: dict[str, Any]
) -> None:
    assert same(list(make(small_set, **kind, **settings)), expected(small_set, **settings))


def test_a_transform_runs_in_the_workers(small_set: Path) -> None:
    got, want = list(make(small_set, 2, "spawn", transform=flip)), expected(small_set)
    assert same([b[:3] for b in got], [(rgb.flip(-1), depth, label) for rgb, depth, label in want])
    assert os.getpid() not in {int(b[3]) for b in got}


def test_a_transform_may_return_anything(small_set: Path) -> None:
    got = list(make(small_set, 2, "fork", transform=as_dict))
    assert same([tuple(b.values()) for b in got], expected(small_set))


def test_a_random_transform_draws_the_same_with_any_number_of_workers(small_set: Path) -> None:
    one, three = (list(make(small_set, n, "fork", transform=noise)) for n in (1, 3))
    assert same(one, three)
    assert len({float(b[0][0]) for b in one}) == len({float(b[1][0]) for b in one}) == 9


@kinds
def test_an_exception_names_the_rows_and_the_loader_goes_on(
    small_set: Path, kind: dict[str, Any]
) -> None:
    loader = make(small_set, **kind, transform=fail)
    first = Batches(36, 4, 0)(0)[0].tolist()
    for _ in range(2):
        with pytest.raises(ValueError, match="no such colour") as error:
            list(loader)
        assert ", ".join(map(str, first)) in error.value.__notes__[0]
        assert (error.value.__notes__[-1].startswith("in loader-0")) == ("workers" in kind)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_killed_worker_is_an_error_soon_and_new_ones_follow(small_set: Path, method: str) -> None:
    loader = make(small_set, 2, method)
    batches = iter(loader)
    next(batches)
    os.kill(worker_pids(loader)[0], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="killed by signal 9"):
        list(batches)
    assert time.monotonic() - started < 2
    assert same(list(loader), expected(small_set))


def test_nothing_is_left_when_the_loader_is_dropped(small_set: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    loader = make(small_set, 2, "fork")
    kept = next(iter(loader))[0]
    pids = worker_pids(loader)
    want = kept.clone()
    del loader
    assert all_gone(pids, 4)
    assert torch.equal(kept, want)
    del kept
    assert set(os.listdir("/proc/self/fd")) <= before


def left_behind(before: Iterable[str], within_s: float) -> set[str]:
    """What is new in /dev/shm and belongs to nobody, after some seconds at most: other tests may run
    beside this one, and what a living process has open or mapped is its own.
    """
    end = time.monotonic() + within_s
    while left := set(os.listdir("/dev/shm")) - set(before) - in_use("/dev/shm/"):
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return left


def in_use(folder: str) -> set[str]:
    """Names of the files in a folder that a living process has open or mapped."""
    paths: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines = (process / "maps").read_text(errors="replace").splitlines()
            paths += (line.split(maxsplit=5)[-1] for line in lines)
            paths += map(os.readlink, (process / "fd").iterdir())
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return {path.removeprefix(folder) for path in paths if path.startswith(folder)}


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_when_their_parent_is_killed(
    small_set: Path, tmp_path: Path, method: str
) -> None:
    before = os.listdir("/dev/shm")
    with start(tmp_path, small_set, "time.sleep(60)", method=method) as process:
        pids = first_line(process)
        process.kill()
    assert len(pids) == 2
    assert all_gone(pids, 4)
    assert left_behind(before, 4) == set()


def test_ctrl_c_ends_everything_with_one_traceback(small_set: Path, tmp_path: Path) -> None:
    with start(tmp_path, small_set, "time.sleep(60)") as process:
        pids = first_line(process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert all_gone(pids, 4)
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(("workers", "method"), [(0, "fork"), (2, "fork"), (1, "spawn")])
def test_the_interpreter_exits_in_mid_epoch_without_a_word(
    small_set: Path, tmp_path: Path, workers: int, method: str
) -> None:
    with start(tmp_path, small_set, "sys.exit(0)", workers, method) as process:
        pids = first_line(process)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert all_gone(pids, 4)


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_kept_on_the_device_are_the_same_batches(small_set: Path, normalize: bool) -> None:
    how: dict[str, Any] = {"batch_size": 4, "normalize": normalize, "num_workers": 0}
    plain, _ = create_dataloaders(small_set, **how)
    cached, _ = create_dataloaders(small_set, **how, cache="device", device="cpu")
    for _ in range(2):
        assert same(list(cached), list(plain))


def slow(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    time.sleep(0.02)
    return batch


def test_auto_measures_a_batch_and_says_what_it_chose(
    small_set: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for hidden_ms, count in ((10, 2), (1e9, 0)):  # a batch sleeps for 20 ms
        monkeypatch.setattr(loader_module, "HIDDEN_MS", hidden_ms)
        train, _ = create_dataloaders(small_set, batch_size=4, transform=slow, normalize=False)
        assert train.num_workers == count
        lines = capsys.readouterr().err.splitlines()
        said = next(line for line in lines if line.startswith("loader: train"))
        assert said.startswith(f"loader: train: num_workers=auto is {count} (a batch takes ")
        assert said.endswith(" ms to make, 2 cores)")


@pytest.mark.parametrize(("kind", "refused"), [("fuse.drivefs", True), ("ext4", False)])
def test_a_set_on_a_fuse_mount_is_refused_unless_insisted(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, refused: bool
) -> None:
    drive = tmp_path / "My Drive"
    drive.mkdir()
    (drive / small_set.name).symlink_to(small_set)
    mounts = tmp_path / "mountinfo"
    device = os.stat(small_set).st_dev
    at = f"{os.major(device)}:{os.minor(device)}"
    mounts.write_text(
        f"1 0 0:0 / / rw - overlay o rw\n2 1 {at} / /My\\040Drive rw shared:1 - {kind} drive rw\n"
    )
    monkeypatch.setattr(mount, "MOUNTS", mounts)
    assert len(ShardDataset(small_set, allow_remote=True)) > 0
    if refused:
        with pytest.raises(RemoteSet, match="is on a mounted Drive"):
            create_dataloaders(drive / small_set.name)
    else:
        assert len(ShardDataset(drive / small_set.name)) > 0
