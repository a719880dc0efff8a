"""`make convert DRIVE=` that is killed in the middle: the next session, on another machine, goes on
from what is on Drive.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import REPO
from helpers.sets import content, convert, flip, is_whole

from convert import follower, run
from convert.plan import Plan
from convert.session import SetRequest, prepare
from convert.shard import FullShard
from shards.dataset import finished_sets
from shards.errors import WrongSource
from shards.manifest import PROVENANCE, Receipt
from shards.spec import ConversionSettings
from stores import mounted

SETTINGS = ConversionSettings(size=32, rows_per_shard=8)  # 5 shards
N_SHARDS = 5
# The command, killed when so many shards are on Drive and the next one is not begun.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import convert.run as run
from convert.__main__ import main
drive, n_shards = Path(sys.argv[1]), int(sys.argv[2])
write = run.write_shard
begun = []
def write_or_die(*args):
    if len(begun) == n_shards:
        while len(list(drive.glob("*/receipt-*.json"))) < n_shards_before + n_shards:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    begun.append(args)
    return write(*args)
n_shards_before = len(list(drive.glob("*/receipt-*.json")))
run.write_shard = write_or_die
sys.exit(main(sys.argv[3:]))
"""


def words(mat: Path, machine: Path, drive: Path) -> list[str]:
    how = ["--size", "32", "--rows-per-shard", "8", "--workers", "1"]
    return ["run", str(mat), "--out", str(machine), "--drive", str(drive), *how]


def session(mat: Path, machine: Path, drive: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *words(mat, machine, drive)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)


def cut_session(mat: Path, machine: Path, drive: Path, n_shards: int) -> None:
    command = [sys.executable, "-c", KILLED, str(drive), str(n_shards), *words(mat, machine, drive)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not finished_sets(drive)


def n_shards_made(stderr: str) -> int:
    """As the conversion says how many rows it has to convert: shards have 8, the last one fewer."""
    (n_rows,) = re.findall(r"^(\d+) rows to convert", stderr, re.M)
    return -(-int(n_rows) // SETTINGS.rows_per_shard)


def assert_all_is_well(mat: Path, machine: Path, drive: Path, tmp_path: Path) -> None:
    """A whole set on this disk, the one that an uncut conversion makes, and a whole one on Drive."""
    (made,) = finished_sets(machine)
    uncut = convert(mat, tmp_path / "uncut", SETTINGS)
    ours, theirs = ({**content(each), PROVENANCE: b""} for each in (made, uncut))
    assert ours == theirs
    (on_drive,) = finished_sets(drive)
    assert is_whole(on_drive)
    assert not list(drive.rglob("receipt-*"))
    assert not (machine / ".shelf").exists()


def test_a_killed_session_keeps_its_shards_for_another_machine(mat: Path, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    cut_session(mat, tmp_path / "first", drive, 2)
    cut_session(mat, tmp_path / "second", drive, 1)
    done = session(mat, tmp_path / "third", drive)
    assert done.returncode == 0, done.stderr
    assert "has 3 shards of a session that was cut" in done.stderr
    assert n_shards_made(done.stderr) == 2
    assert_all_is_well(mat, tmp_path / "third", drive, tmp_path)


def test_a_killed_session_goes_on_from_this_disk_where_it_is_the_same_machine(
    mat: Path, tmp_path: Path
) -> None:
    drive = tmp_path / "drive"
    cut_session(mat, tmp_path / "machine", drive, 3)
    done = session(mat, tmp_path / "machine", drive)
    assert done.returncode == 0, done.stderr
    assert "of a session that was cut" not in done.stderr  # nothing had to be fetched
    assert n_shards_made(done.stderr) == 2
    assert_all_is_well(mat, tmp_path / "machine", drive, tmp_path)


def test_a_shard_that_is_damaged_on_drive_is_made_again(mat: Path, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    cut_session(mat, tmp_path / "first", drive, 3)
    (unfinished,) = drive.iterdir()
    flip(unfinished / "depth/c/1/0/0")
    (unfinished / "receipt-00002.json").write_text("{}")
    done = session(mat, tmp_path / "second", drive)
    assert done.returncode == 0, done.stderr
    assert "that shard is made again" in done.stderr
    assert n_shards_made(done.stderr) == 4
    assert_all_is_well(mat, tmp_path / "second", drive, tmp_path)


def test_a_receipt_on_drive_reaches_no_file_outside(mat: Path, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    cut_session(mat, tmp_path / "first", drive, 1)
    (receipt,) = drive.glob("*/receipt-*.json")
    receipt.write_text(receipt.read_text().replace("depth/c/0/0/0", "../../../stolen"))
    done = session(mat, tmp_path / "second", drive)
    assert done.returncode == 0, done.stderr
    assert n_shards_made(done.stderr) == 5
    assert not list(tmp_path.rglob("stolen"))


def request(mat: Path, tmp_path: Path) -> SetRequest:
    return SetRequest(
        root=tmp_path / "root", settings=SETTINGS, source=mat, drive=tmp_path / "drive"
    )


def test_a_drive_that_fails_meanwhile_does_not_end_the_conversion(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mounted, "PAUSES", ())
    create = follower.MountedStore.create
    calls = []

    def fails_once(store: mounted.MountedStore) -> None:
        calls.append(store)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        create(store)

    monkeypatch.setattr(follower.MountedStore, "create", fails_once)
    made = prepare(request(mat, tmp_path))
    assert is_whole(made)
    said = capsys.readouterr().err
    assert said.count("shards do not go to") == 1
    assert is_whole(finished_sets(tmp_path / "drive")[0])


def test_shards_of_a_source_that_changed_meanwhile_are_withdrawn(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copy(mat, tmp_path / "changing.mat"))
    write = run.write_shard
    seen: list[Path] = []

    def write_and_change(plan: Plan, shard: FullShard, *more: Any) -> Receipt:
        if shard.number == 3:
            while not seen:
                seen.extend((tmp_path / "drive").glob("*/receipt-*.json"))
                time.sleep(0.01)
            os.utime(source)
        return write(plan, shard, *more)

    monkeypatch.setattr(run, "write_shard", write_and_change)
    with pytest.raises(WrongSource, match="changed while it was read"):
        prepare(request(source, tmp_path))
    assert seen
    assert not list(tmp_path.rglob("receipt-*.json"))


def test_packing_never_takes_the_room_that_the_conversion_needs(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follower, "SPARE_BYTES", 1 << 62)
    assert is_whole(prepare(request(mat, tmp_path)))
    assert "are free on this disk" in capsys.readouterr().err


def test_files_that_were_read_back_are_not_read_again_at_the_end(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[str] = []
    upload = mounted.MountedStore.upload

    def counted(store: mounted.MountedStore, source: Path, name: str, *entry: object) -> None:
        uploads.append(name)
        upload(store, source, name, *entry)  # type: ignore[arg-type]

    monkeypatch.setattr(mounted.MountedStore, "upload", counted)
    made = prepare(request(mat, tmp_path))
    shards = [name for name in uploads if re.match(r"[a-z_]+/c/", name)]
    assert len(shards) == len(set(shards)) == 5 * N_SHARDS
    assert is_whole(made)
