"""Killed, terminated, out of space, read-only, a source that changes: the next run goes on and ends
byte-identical.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPO, SMALL
from helpers.cgroup import drop_from_cache, memory_group
from helpers.commands import Run, conversion, ends_in_one_line, running, until_a_shard_is_done
from helpers.disks import fill, make_read_only, small_disk
from helpers.sets import committed, convert, files_of, verify

from convert.__main__ import read_set
from convert.verify import verify_all
from shards.dataset import finished_sets, open_set, resolve_set
from shards.errors import UserError
from shards.manifest import MANIFEST
from shards.spec import ConversionSettings

SLOW = ("--rows-per-shard", "1", "--workers", "1")  # 36 shards: time to do something in between


def nothing_temporary(root: Path) -> bool:
    return not [p for p in root.rglob(".*") if not p.name.endswith(".lock")]


# ---------------------------------------------------------------- kill -9


def kill_at_random(mat: Path, whole: Path, root: Path, n_kills: int, *more: object) -> int:
    """Kill that many runs, some of them repairing a damaged set; returns how many sets were
    finished in between.
    """
    rng, n_finished, kills = random.Random(n_kills), 0, 0
    directory = root / whole.name
    started = time.monotonic()
    convert_once = subprocess.run(conversion(mat, root / "once"), cwd=REPO, capture_output=True)
    assert convert_once.returncode == 0, convert_once.stderr
    seconds = time.monotonic() - started  # of a whole run, on this machine, now
    while kills < n_kills:
        repair = directory.exists() and (directory / MANIFEST).exists()
        with running(
            mat, root, "--size", 32, "--rows-per-shard", 10, *(["--repair"] if repair else [])
        ) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.2, 1.1) * seconds)
            if process.poll() is None:
                process.kill()
                kills += 1
        if (directory / MANIFEST).exists() and not repair:  # committed: then it is whole
            assert verify_all_but_leftovers(directory)
            n_finished += 1
            if n_finished % 2:
                (directory / "rgb-00001.npy").write_bytes(b"damaged")
            else:
                shutil.rmtree(directory)
        elif not (directory / MANIFEST).exists():
            with pytest.raises(UserError):
                resolve_set(root) and open_set(directory)
    done = convert(mat, root, SMALL, repair=True)
    assert committed(done) == committed(whole)
    return n_finished


def verify_all_but_leftovers(directory: Path) -> bool:
    files = files_of(directory)
    return not [name for name, problem in verify(directory) if problem and name in files]


def test_killed_runs_resume_and_end_byte_identical(
    mat: Path, small_set: Path, tmp_path: Path
) -> None:
    kill_at_random(mat, small_set, tmp_path, 10)
    assert nothing_temporary(tmp_path)


@pytest.mark.stress
def test_200_kills_at_random_moments(mat: Path, small_set: Path, tmp_path: Path) -> None:
    print("sets finished in between:", kill_at_random(mat, small_set, tmp_path, 200))
    assert nothing_temporary(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_one_line_and_leaves_no_temporary_file(
    mat: Path, tmp_path: Path, number: int
) -> None:
    with running(mat, tmp_path, *SLOW) as process:
        until_a_shard_is_done(process, tmp_path)
        process.send_signal(number)
        assert ends_in_one_line(process, 130).startswith("interrupted: what is finished is kept")
    assert list(tmp_path.glob("*/receipt-*"))
    assert not list(tmp_path.glob("*/manifest.json"))
    assert nothing_temporary(tmp_path)


def test_of_two_runs_one_works_and_the_other_says_who(
    mat: Path, tmp_path: Path, command: Run
) -> None:
    with running(mat, tmp_path, *SLOW) as process:
        until_a_shard_is_done(process, tmp_path)
        process.send_signal(signal.SIGSTOP)
        other = command("convert", "run", mat, "--out", tmp_path, *SLOW)
        assert other.returncode == 2
        assert f"is being converted by pid {process.pid} on " in other.stderr
        assert " since 20" in other.stderr
        process.kill()
        process.wait()
    # A dead process's lock holds nobody up.
    done = command("convert", "run", mat, "--out", tmp_path, *SLOW)
    assert done.returncode == 0, done.stderr
    assert "shards are done already" in done.stderr


# ---------------------------------------------------------------- disks and sources


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    mat: Path, tmp_path: Path, command: Run
) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        done = command("convert", "run", mat, "--out", disk)
        assert done.returncode == 2
        assert "MB free, the shards need" in done.stderr
        assert not list(disk.rglob("*.npy"))


def test_a_disk_that_fills_up_ends_in_one_line_and_keeps_what_is_done(
    mat: Path, tmp_path: Path, command: Run
) -> None:
    with small_disk(tmp_path / "disk", 40 << 20) as disk:
        with running(mat, disk / "out", *SLOW) as process:
            until_a_shard_is_done(process, disk / "out")
            fill(disk)
            assert "No space left on device" in ends_in_one_line(process, 2)
        assert nothing_temporary(disk)
        assert list(disk.glob("out/*/receipt-*"))
        (disk / "filler").unlink()
        done = command("convert", "run", mat, "--out", disk / "out", *SLOW)
        assert done.returncode == 0, done.stderr
        assert "shards are done already" in done.stderr
        assert verify_all(read_set(Path(done.stdout.strip())))


def test_a_read_only_disk_serves_a_finished_set_and_refuses_another(
    mat: Path, small_set: Path, tmp_path: Path, command: Run
) -> None:
    small = ("--size", 32, "--rows-per-shard", 10)
    with small_disk(tmp_path / "disk", 40 << 20) as disk:
        shutil.copytree(small_set, disk / small_set.name)
        make_read_only(disk)
        again = command("convert", "run", mat, "--out", disk, *small)
        assert again.returncode == 0, again.stderr
        assert "nothing to do" in again.stderr
        assert command("convert", "inspect", disk).returncode == 0
        other = command("convert", "run", mat, "--out", disk, "--size", 16)
        assert (other.returncode, other.stderr.count("\n")) == (2, 1)
        assert "Read-only file system" in other.stderr


def test_a_source_that_changes_while_it_is_read_is_not_published(
    mat: Path, tmp_path: Path, command: Run
) -> None:
    source, root = tmp_path / "x.mat", tmp_path / "out"
    shutil.copy(mat, source)
    with running(source, root, *SLOW) as process:
        until_a_shard_is_done(process, root)
        with open(source, "r+b") as file:
            file.seek(200)
            file.write(b"x")
        assert "changed while it was read" in ends_in_one_line(process, 2)
    assert not list(root.glob("*/receipt-*"))
    assert not list(root.glob("*/manifest.json"))


def test_a_source_cut_off_while_it_is_read_is_one_line(mat: Path, tmp_path: Path) -> None:
    source, root = tmp_path / "x.mat", tmp_path / "out"
    shutil.copy(mat, source)
    with running(source, root, *SLOW) as process:
        until_a_shard_is_done(process, root)
        os.truncate(source, 100_000)
        assert str(source) in ends_in_one_line(process, 2)
    assert nothing_temporary(root)


def test_a_pipe_is_not_waited_for(tmp_path: Path, command: Run) -> None:
    os.mkfifo(tmp_path / "x.mat")
    done = command("convert", "run", tmp_path / "x.mat", "--out", tmp_path / "out", timeout=30)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not a regular file" in done.stderr


@pytest.mark.parametrize("what", ["file", "broken link"])
def test_an_out_that_is_no_directory_is_one_line(
    mat: Path, tmp_path: Path, command: Run, what: str
) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("")
    else:
        out.symlink_to(tmp_path / "nowhere")
    done = command("convert", "run", mat, "--out", out)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot be made" in done.stderr


def test_paths_with_spaces_other_scripts_and_bytes_that_are_no_text(
    mat: Path, tmp_path: Path, command: Run
) -> None:
    where = tmp_path / "a b ' \u00e9\u4e2d" / os.fsdecode(b"\xff")
    where.mkdir(parents=True)
    shutil.copy(mat, where / "x y.mat")
    done = subprocess.run(
        [sys.executable, "-m", "convert", "run", "x y.mat", "--out", "o \u00fc", "--size", "16"],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    made = where / os.fsdecode(done.stdout.strip())
    assert verify_all(read_set(made))
    verified = subprocess.run(
        [sys.executable, "-m", "convert", "verify", made], cwd=REPO, capture_output=True
    )
    assert os.fsencode(made) in verified.stdout, verified.stderr


# ---------------------------------------------------------------- which set


def test_without_its_source_a_set_is_found_by_its_settings(
    mat: Path, small_set: Path, tmp_path: Path, command: Run
) -> None:
    small = ("--size", 32, "--rows-per-shard", 10)
    shutil.copytree(small_set, tmp_path / "out" / small_set.name)
    done = command(
        "convert", "run", tmp_path / "gone" / mat.name, "--out", tmp_path / "out", *small
    )
    assert done.stdout.strip() == str(tmp_path / "out" / small_set.name), done.stderr
    assert (
        command(
            "convert", "run", tmp_path / "gone" / mat.name, "--out", tmp_path / "out"
        ).returncode
        == 2
    )
    other = tmp_path / "other" / mat.name
    other.parent.mkdir()
    shutil.copy(mat, other)
    with open(other, "r+b") as file:
        file.write(b"M")
        file.seek(100)
        file.write(b"another source")
    convert(other, tmp_path / "out", SMALL)
    done = command(
        "convert", "run", tmp_path / "gone" / mat.name, "--out", tmp_path / "out", *small
    )
    assert done.returncode == 2
    assert all(p.name in done.stderr for p in finished_sets(tmp_path / "out"))


def test_a_set_under_another_sets_name_is_refused(
    mat: Path, small_set: Path, tmp_path: Path
) -> None:
    other = convert(mat, tmp_path, ConversionSettings(size=16))
    shutil.copytree(small_set, tmp_path / "kept")
    name = other.name
    shutil.rmtree(other)
    (tmp_path / "kept").rename(tmp_path / name)
    with pytest.raises(UserError, match="holds another set, renamed"):
        convert(mat, tmp_path, ConversionSettings(size=16))


# ---------------------------------------------------------------- memory


def memory_limited(source: Path, root: Path, limit: int, *more: object) -> dict[str, int]:
    """Convert inside a group; its most anonymous memory as seen every 10 ms, and its peak with page
    cache.
    """
    drop_from_cache(source)
    seen, ended = [0], threading.Event()
    with memory_group(limit) as group:

        def watch() -> None:
            while not ended.wait(0.01):
                seen.append(group.anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            done = group.run(conversion(source, root, *more), cwd=REPO, timeout=570)
        finally:
            ended.set()
            watcher.join()
        assert done.returncode == 0, done.stderr[-2000:]
        assert group.oom_kills() == 0
        return {"anonymous": max(seen), "peak": group.peak_bytes()}


def test_a_conversion_fits_in_512_mb(mat: Path, tmp_path: Path) -> None:
    memory_limited(mat, tmp_path, 512 << 20)


@pytest.mark.stress
def test_the_full_size_converts_in_512_mb(tmp_path: Path) -> None:
    """NYUV2_FULL_MAT names a .mat of the original's size; without it one is made up (1449 rows,
    some minutes).
    """
    from convert.sample import write_sample

    source = Path(os.environ.get("NYUV2_FULL_MAT", tmp_path / "full.mat"))
    if not source.exists():
        write_sample(source, 1449)
    print(memory_limited(source, tmp_path / "out", 512 << 20))
    assert verify_all(read_set(tmp_path / "out"))
