"""A run that is killed, damaged or moved goes on to the very same weights."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.training import assert_same, environment, run_and_kill, settings

import train.loop as loop
from shards import files
from shards.errors import UserError
from train.__main__ import command, train_and_report
from train.checkpoint import CHECKPOINT, PREVIOUS, newest, set_aside
from train.errors import OtherRun
from train.loop import train


@pytest.fixture(scope="module")
def whole(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(settings(small_set, out))
    return out


def kill_until_done(data: Path, out: Path, kills: int, seed: int, longest_s: float) -> int:
    """Kill at random moments, each time with another number of workers; how often it was killed."""
    random_ = random.Random(seed)
    killed = 0
    for k in range(kills):
        killed += run_and_kill(data, out, random_.uniform(0.01, longest_s), k % 3) == -9
    train(settings(data, out, num_workers=1, save_minutes=0.0))
    return killed


def test_killed_twice_inside_epochs_it_ends_with_the_same_weights(
    small_set: Path, whole: Path, tmp_path: Path
) -> None:
    assert kill_until_done(small_set, tmp_path / "run", 2, 0, 0.2) == 2
    assert_same(whole, tmp_path / "run")


def test_sigterm_is_one_line_and_the_same_command_goes_on(
    small_set: Path, whole: Path, tmp_path: Path
) -> None:
    words = command(settings(small_set, tmp_path / "run", num_workers=0, save_minutes=0.0)).split()[
        1:
    ]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, *words], cwd=REPO, env=environment(), **piped
    ) as process:  # type: ignore[call-overload]
        while not (tmp_path / "run" / "last.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130
    assert "the same command continues" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert run_and_kill(small_set, tmp_path / "run", None, 0) == 0
    assert_same(whole, tmp_path / "run")


@pytest.mark.stress
@pytest.mark.parametrize("turn", range(1, 11))
def test_killed_twenty_times_it_ends_with_the_same_weights(
    turn: int, small_set: Path, whole: Path, tmp_path: Path
) -> None:
    for attempt in range(5):  # a run that ends before its moment was not killed: another one
        run = tmp_path / str(attempt)
        killed = kill_until_done(small_set, run, 2, 10 * turn + attempt, 0.08)
        assert_same(whole, run)
        if killed == 2:
            return
    raise AssertionError("not one of five runs was killed twice")


def stopped_inside(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, n_saves: int) -> None:
    """A run that saved after each of some steps and was then stopped."""
    original, saves = loop.save, [0]

    def save_and_stop(*args: object) -> None:
        original(*args)  # type: ignore[arg-type]
        saves[0] += 1
        if saves[0] == n_saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings(data, out, save_minutes=0.0))


@pytest.mark.parametrize("n_saves", [2, 7])
def test_stopped_at_any_step_it_goes_on_exactly_there(
    n_saves: int, small_set: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_inside(small_set, tmp_path, monkeypatch, n_saves)
    train(settings(small_set, tmp_path))
    assert_same(whole, tmp_path)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("<html>quota exceeded</html>"),
    "another file": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a changed bit": lambda path: flip(path, 0.5),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_continued(
    damage: object, small_set: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stopped_inside(small_set, tmp_path, monkeypatch, 6)
    damage(tmp_path / CHECKPOINT)  # type: ignore[operator]
    train(settings(small_set, tmp_path))
    error = capsys.readouterr().err
    assert f"{tmp_path / CHECKPOINT} is damaged" in error
    assert f"continuing from {tmp_path / PREVIOUS}" in error
    assert_same(whole, tmp_path)


def test_a_checkpoint_that_cannot_be_read_for_now_is_kept_and_not_replaced_by_an_older_one(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_inside(small_set, tmp_path, monkeypatch, 6)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # no file can be opened
    try:
        with pytest.raises(OSError, match="Too many open files"):
            newest(settings(small_set, tmp_path), set_aside)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (tmp_path / CHECKPOINT).is_file()
    assert not (tmp_path / CHECKPOINT).with_suffix(".broken").exists()


def test_what_a_save_that_was_killed_has_left_is_removed_by_the_next_run(
    small_set: Path, whole: Path, tmp_path: Path
) -> None:
    code = (
        "import os\n"
        "from train import checkpoint\n"
        "real = checkpoint._torch_save\n"
        "def killed(state, file): real(state, file); os.kill(os.getpid(), 9)\n"
        "checkpoint._torch_save = killed\n"
        "from train.__main__ import main\n"
        "main()"
    )
    run = tmp_path / "run"
    words = command(settings(small_set, run, save_minutes=0.0)).split()[3:]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=REPO, env=environment())
    assert done.returncode == -9
    assert list(run.glob(files.UNFINISHED))
    train(settings(small_set, run))
    assert not list(run.glob(files.UNFINISHED))
    assert_same(whole, run)


@pytest.mark.parametrize(
    ("name", "stored", "given", "words"),
    [
        ("lr", 0.001, 0.5, "trained with lr=0.001, this run has lr=0.5. Use lr=0.001, another out"),
        ("num_classes", 10, 13, "with num_classes=10, this run has num_classes=13"),
        (
            "batch_size",
            4,
            8,
            "with batch_size times ranks 4, this run has batch_size times ranks 8",
        ),
    ],
)
def test_other_settings_are_refused_with_both_values(
    name: str, stored: float, given: float, words: str, small_set: Path, whole: Path
) -> None:
    with pytest.raises(OtherRun, match=words) as error:
        train(settings(small_set, whole, **{name: given}))
    facts = error.value
    assert (facts.path, facts.name, facts.stored, facts.given) == (
        whole / CHECKPOINT,
        name,
        stored,
        given,
    )


def test_another_set_is_refused_with_both_fingerprints(small_set: Path, whole: Path) -> None:
    state = torch.load(whole / CHECKPOINT, weights_only=True)
    path = whole.parent / "other" / CHECKPOINT
    path.parent.mkdir()
    torch.save(state | {"fingerprint": "1f3a9c20" + 56 * "0"}, path)
    with pytest.raises(UserError, match=f"1f3a9c20.*this run has.*{state['fingerprint'][:8]}"):
        train(settings(small_set, path.parent))


def test_a_new_disk_starts_from_the_mirror(small_set: Path, whole: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "drive"
    train_and_report(settings(small_set, tmp_path / "one", epochs=6, mirror=str(mirror)))
    assert {p.name for p in mirror.iterdir()} >= {"last.pt", "metrics.csv", "curves.png"}
    state = torch.load(mirror / CHECKPOINT, weights_only=True)
    assert (state["epoch"], state["step"]) == (6, 0)
    train(settings(small_set, tmp_path / "two", mirror=str(mirror)))
    assert (tmp_path / "two" / "metrics.csv").is_file()
    assert_same(whole, tmp_path / "two")


def test_what_was_reset_does_not_come_back_from_the_mirror(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(small_set, tmp_path / "run", epochs=2, mirror=str(tmp_path / "drive"))
    train(run)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_epoch", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(replace(run, reset=True))
    assert train(run).n_trained == 2


def test_nothing_is_begun_over_a_mirror_that_cannot_be_read(
    small_set: Path, tmp_path: Path
) -> None:
    drive = tmp_path / "drive"
    drive.mkdir()
    (drive / CHECKPOINT).symlink_to(CHECKPOINT)  # leads to itself: an error of the file system
    with pytest.raises(OSError, match="symbolic links"):
        train(settings(small_set, tmp_path / "run", mirror=str(drive)))
    assert not (tmp_path / "run" / CHECKPOINT).exists()
    assert (drive / CHECKPOINT).is_symlink()


def test_copies_that_were_killed_on_the_mirror_go_after_an_hour(
    small_set: Path, tmp_path: Path
) -> None:
    drive = tmp_path / "drive"
    drive.mkdir()
    for name in (".last.pt.1.tmp", ".last.pt.2.tmp", ".photo.tmp"):
        (drive / name).write_bytes(b"half")
        if name != ".last.pt.2.tmp":  # another run's, under way
            os.utime(drive / name, (0, 0))
    train(settings(small_set, tmp_path / "run", epochs=1, mirror=str(drive)))
    assert {path.name for path in drive.glob(".*")} == {".last.pt.2.tmp", ".photo.tmp"}


def test_a_mirror_that_fails_is_announced_and_training_goes_on(
    small_set: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    train(settings(small_set, tmp_path / "run", mirror=str(tmp_path / "file" / "drive")))
    assert "training goes on" in capsys.readouterr().err
    assert_same(whole, tmp_path / "run")


def test_a_mirror_that_hangs_does_not_hold_the_run(
    small_set: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(loop, "MIRROR_WAIT_S", 0.2)
    mirror = tmp_path / "drive"
    mirror.mkdir()
    # Opening it waits for a reader, for ever. Its name has the writing thread's number otherwise.
    pipe = mirror / ".metrics.csv.tmp"
    os.mkfifo(pipe)
    name_of = files.unfinished
    monkeypatch.setattr(
        files, "unfinished", lambda path: pipe if path.parent == mirror else name_of(path)
    )
    train(settings(small_set, tmp_path / "run", mirror=str(mirror)))
    assert "not done after" in capsys.readouterr().err
    assert_same(whole, tmp_path / "run")
    os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))  # let the thread end
