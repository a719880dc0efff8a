"""What schedulers send saves a run at the step it is in; what was ignored stays ignored; one run a
directory.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.training import assert_same, environment, settings

from shards import lock
from shards.errors import UserError
from shards.lock import hold
from train.__main__ import command, main
from train.loop import train


@pytest.fixture(scope="module")
def alone(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    train(settings(small_set, out, num_workers=0))
    return out


def begin(
    data: Path,
    out: Path,
    *launcher: str,
    ignored: Sequence[int] = (),
    workers: int = 0,
    variables: Mapping[str, str],
    **changes: Any,
) -> "subprocess.Popen[str]":
    """The command in a process group of its own, with the slow network; `ignored`: signals that it
    starts with so.
    """
    words = command(
        settings(data, out, num_workers=workers, model="helpers.networks:Slow", **changes)
    ).split()[1:]
    return subprocess.Popen(
        [sys.executable, *launcher, *words],
        cwd=REPO,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored],
    )


def wait_for(there: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def slow_from(mark: Path, s: str = "0.4") -> dict[str, str]:
    """Some steps into the second epoch: there is time for a signal."""
    return {"TRAINING": str(mark), "SLEEP_S": s}


def position(out: Path) -> tuple[int, int]:
    state = torch.load(out / "last.pt", weights_only=True)
    return state["epoch"], state["step"]


def finish(data: Path, out: Path) -> None:
    """What the same command does of a run that was left."""
    train(settings(data, out, num_workers=0, model="helpers.networks:Slow"))


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_to_the_whole_group_saves_the_step_it_came_in(
    workers: int, small_set: Path, alone: Path, tmp_path: Path
) -> None:
    run, mark = tmp_path / "run", tmp_path / "training"
    process = begin(small_set, run, workers=workers, variables=slow_from(mark))
    wait_for(mark.exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)  # a second one changes nothing
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130, lines
    epoch, step = position(run)
    assert epoch >= 1
    assert step >= 1
    assert lines[-1].startswith(f"train: stopped and saved after step {step} of ")
    assert lines[-1].endswith(f"of epoch {epoch + 1}; the same command continues there")
    assert not any("Traceback" in line for line in lines)
    finish(small_set, run)
    assert_same(alone, run)


def test_sigusr1_saves_the_step_it_came_in_and_goes_on(
    small_set: Path, alone: Path, tmp_path: Path
) -> None:
    run, mark = tmp_path / "run", tmp_path / "training"
    process = begin(small_set, run, variables=slow_from(mark))
    wait_for(mark.exists, process)
    process.send_signal(signal.SIGUSR1)
    assert process.stderr
    while "saved after step" not in (line := process.stderr.readline()):
        assert process.poll() is None
    assert position(run)[1] == int(line.split()[3])
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert_same(alone, run)


def test_sigterm_while_it_is_evaluated_keeps_the_training_of_the_epoch(
    small_set: Path, alone: Path, tmp_path: Path
) -> None:
    run, mark = tmp_path / "run", tmp_path / "evaluating"
    process = begin(small_set, run, variables={"EVALUATING": str(mark), "EVAL_SLEEP_S": "0.5"})
    wait_for(mark.exists, process)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    epoch, step = position(run)
    assert (epoch, f"after step {step} of {step} of epoch 1" in said) == (0, True)
    finish(small_set, run)
    assert_same(alone, run)


@pytest.mark.stress
def test_signals_that_were_ignored_stay_ignored(small_set: Path, tmp_path: Path) -> None:
    numbers = signal.SIGHUP, signal.SIGTERM, signal.SIGINT
    run, mark = tmp_path / "run", tmp_path / "training"
    process = begin(small_set, run, epochs=2, ignored=numbers, variables=slow_from(mark))
    wait_for(mark.exists, process)
    for number in numbers:
        process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert position(run) == (2, 0)


def test_torchrun_hands_sigterm_on_and_the_ranks_save_the_same_step(
    small_set: Path, tmp_path: Path
) -> None:
    run, mark = tmp_path / "run", tmp_path / "training"
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    process = begin(
        small_set,
        run,
        *launcher,
        batch_size=2,
        variables={**slow_from(mark), "OMP_NUM_THREADS": "1"},
    )
    wait_for(mark.exists, process)
    process.terminate()
    lines = process.communicate(timeout=60)[1].splitlines()
    epoch, step = position(run)
    assert step >= 1
    for rank in (0, 1):
        said = f"train: rank {rank} of 2: stopped and saved after step {step} of "
        assert [line for line in lines if said in line and f"epoch {epoch + 1};" in line], lines


# ---------------------------------------------------------------- one run a directory


def test_a_second_run_into_a_directory_is_told_who_trains_there(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--data",
        str(small_set),
        "--out",
        str(tmp_path),
        "--size",
        "32",
        "--width",
        "4",
        "--epochs",
        "1",
    ]
    mark = tmp_path.with_suffix(".training")
    process = begin(small_set, tmp_path, variables=slow_from(mark, "60"))
    try:
        wait_for(mark.exists, process)
        before = (tmp_path / "last.pt").stat().st_ino
        assert main([*flags, "--reset"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"train: {tmp_path} is being trained by pid {process.pid} on ")
        assert len(error.splitlines()) == 1
        assert (tmp_path / "last.pt").stat().st_ino == before
        assert main(["predict", str(tmp_path), "--out", str(tmp_path)]) == 2
        assert f"{tmp_path} is being written by pid {process.pid} on " in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()
    assert main([*flags, "--reset"]) == 0  # the dead hold nothing


def test_a_killed_holder_holds_nothing_though_its_children_live(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from shards.lock import hold\n"
        "with hold(Path(sys.argv[1]), Path(sys.argv[1]), 'held'):\n"
        "    child = os.fork()\n"
        "    if not child: print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(words, cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        try:
            with (
                pytest.raises(UserError, match=f"is being held by pid {process.pid}"),
                hold(tmp_path / ".lock", tmp_path, "held"),
            ):
                pass
            process.kill()
            process.wait()
            os.kill(child, 0)
            with hold(tmp_path / ".lock", tmp_path, "held"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


class SlowSet(set[int]):
    """Leaves other threads time behind each number that is taken out."""

    def discard(self, number: int) -> None:
        super().discard(number)
        time.sleep(0.3)


def test_a_child_that_is_forked_while_a_lock_is_let_go_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HELD", SlowSet())
    handle = lock.take(tmp_path / ".lock")
    assert handle is not None
    letting_go = threading.Thread(target=lock.let_go, args=(handle,))
    letting_go.start()
    time.sleep(0.1)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        letting_go.join()
        assert not lock.is_held(tmp_path / ".lock")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold(tmp_path / ".lock", tmp_path, "held"):
        assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} ")
