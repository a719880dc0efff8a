"""What a system or a Python may lack is done without: each function is taken away, and the work
really done.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, SMALL
from helpers.disks import small_disk
from helpers.sets import convert, same_shards

from convert import machine
from convert.transfer import pull, push, set_on_mount
from shards import files
from shards.dataset import open_set
from shards.manifest import PROVENANCE

# memfd_create is absent on macOS and in the Pythons of uv and conda; the others on macOS.
ABSENT = ["memfd_create", "sched_getaffinity", "posix_fadvise"]


@pytest.mark.parametrize("name", ABSENT)
def test_without_it_helpers_make_the_same_set_and_it_travels(
    name: str, mat: Path, small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, name)
    monkeypatch.setattr("convert.executors.HELPERS_FROM", 0)  # this file is too small to start them
    made = Path(convert(mat, tmp_path, SMALL))
    assert same_shards(made, small_set)
    (tmp_path / "drive").mkdir()
    there = push(open_set(made), tmp_path / "drive").path
    assert same_shards(pull(set_on_mount(there), tmp_path / "back").path, small_set)


def refuse(*_: object) -> int:
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize("name", ABSENT[::2])
def test_where_the_system_refuses_it_the_same_is_done(
    name: str, mat: Path, small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a sandbox does, or an old kernel under a new Python."""
    monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("convert.executors.HELPERS_FROM", 0)
    made = Path(convert(mat, tmp_path, SMALL))
    (tmp_path / "drive").mkdir()
    assert same_shards(push(open_set(made), tmp_path / "drive").path, small_set)


def test_a_process_that_ends_has_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/smaps_rollup").write_text("00400000-7fff r 0\nRss: 12 kB\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    assert machine.memory_of([7]) is None


def test_without_proc_the_memory_is_unknown_and_not_0(
    mat: Path,
    small_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from convert.inspect import describe

    monkeypatch.setattr(machine, "PROC", tmp_path / "no proc here")
    made = Path(convert(mat, tmp_path / "out", SMALL))
    assert same_shards(made, small_set)
    assert "peak memory unknown" in capsys.readouterr().err
    assert json.loads((made / PROVENANCE).read_text())["peak_memory_bytes"] is None
    assert "peak memory unknown" in describe(open_set(made))


def test_with_proc_the_memory_is_that_of_the_helpers_too(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.executors.HELPERS_FROM", 0)
    made = Path(convert(mat, tmp_path, SMALL, workers=2))
    if not machine.PROC.exists():
        pytest.skip("this system has no /proc")
    assert json.loads((made / PROVENANCE).read_text())["peak_memory_bytes"] > 20 << 20


def test_memory_from_a_file_is_shared_between_descriptors_and_takes_its_room_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmap

    monkeypatch.delattr(os, "memfd_create", raising=False)
    n_bytes = (3 << 20) + 5
    handle = machine.shared_memory(n_bytes)
    other = os.dup(handle)
    one = np.frombuffer(mmap.mmap(handle, n_bytes), np.uint8)
    one[-1] = 7
    assert mmap.mmap(other, n_bytes)[n_bytes - 1] == 7
    assert os.fstat(handle).st_blocks * 512 >= n_bytes
    os.close(handle)
    os.close(other)


def test_a_full_temporary_folder_is_one_line_and_no_crash(mat: Path, tmp_path: Path) -> None:
    """Without memfd_create: a page with no room behind it would be a bus error."""
    code = (
        "import os, sys; del os.memfd_create; from convert.__main__ import main; sys.exit(main())"
    )
    with small_disk(tmp_path / "tmp", 1 << 20) as disk:
        words = [sys.executable, "-c", code, "run", str(mat), "--out", str(tmp_path / "out")]
        done = subprocess.run(
            words,
            cwd=REPO,
            env={**os.environ, "TMPDIR": str(disk)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_where_the_system_has_a_stronger_fsync_it_is_what_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS; where the file system refuses it, the plain one."""
    weak = list[int]()
    strong = list[int]()
    monkeypatch.setattr(os, "fsync", weak.append)
    monkeypatch.setattr(files, "F_FULLFSYNC", 51)
    monkeypatch.setattr(
        files, "fcntl", lambda handle, command: strong.append(command), raising=False
    )
    files.write_bytes(tmp_path / "a", b"x")
    assert strong == [51, 51]  # the file and its directory
    assert weak == []

    def refuses(*_: object) -> int:
        raise OSError("not here")

    monkeypatch.setattr(files, "fcntl", refuses)
    files.write_bytes(tmp_path / "b", b"x")
    assert len(weak) == 2
