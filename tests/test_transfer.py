"""push and pull: nothing wrong is accepted and nothing is lost, whatever the mount does."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import REPO, SMALL
from helpers.commands import Run
from helpers.drives import ERRORS, Drive, why_no_fuse
from helpers.sets import content, flip, shard_bytes

from convert import session
from convert.sample import write_sample
from convert.transfer import pull, push, set_on_mount
from shards.copy import copy_set
from shards.dataset import ShardSet, finished_sets, open_set
from shards.errors import IncompleteCopy, OldSet, StoreFailed, UserError
from shards.files import FileEntry, HashingFile, write_atomically
from shards.manifest import FAILED, read_manifest
from shards.spec import ConversionSettings
from stores import mounted
from stores.mounted import patiently

VERSION_1 = REPO / "tests" / "fixtures" / "version-1"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounted, "PAUSES", (0.001, 0.002, 0.003))


# ---------------------------------------------------------------- copies


def test_push_then_pull_is_the_same_set_to_the_byte(
    small_set: Path, tmp_path: Path, command: Run
) -> None:
    drive, root = tmp_path / "my drive", tmp_path / "root"
    done = command("convert", "push", small_set, drive)
    assert "flush_and_unmount" not in done.stderr  # a disk is no Drive
    done = command("convert", "pull", drive, root)
    assert done.stdout.splitlines()[-1] == str(root / small_set.name)
    assert content(root / small_set.name) == content(small_set)


def test_a_set_that_is_pulled_to_where_it_lies_stays_as_it_is(
    small_set: Path, tmp_path: Path
) -> None:
    made = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    (made / FAILED).write_text("set_row,row,rgb_file,problem\n")
    before = content(made)
    assert pull(open_set(made), tmp_path).path == made
    assert content(made) == before


def test_only_what_is_missing_or_wrong_is_copied(small_set: Path, tmp_path: Path) -> None:
    made = push(open_set(small_set), tmp_path / "drive").path
    flip(made / "rgb-00000.npy")
    (made / "depth-00001.npy").unlink()
    os.truncate(made / "label-00002.npy", 0)
    before = {p.name: p.stat().st_mtime_ns for p in made.glob("*.npy")}
    push(open_set(small_set), tmp_path / "drive")
    after = {p.name: p.stat().st_mtime_ns for p in made.glob("*.npy")}
    assert content(made) == content(small_set)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"rgb-00000.npy", "depth-00001.npy", "label-00002.npy"}


def test_the_manifest_is_written_last_and_another_one_is_withdrawn_first(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "drive" / small_set.name
    target.mkdir(parents=True)
    (target / "manifest.json").write_text("{}")
    (target / ".rgb-00000.npy.99.tmp").write_text("left by a killed copy")
    seen = []

    def watching(path: Path, write: Callable[[HashingFile], object]) -> FileEntry:
        seen.append((path.name, (target / "manifest.json").exists()))
        return write_atomically(path, write)

    monkeypatch.setattr(mounted, "write_atomically", watching)
    push(open_set(small_set), tmp_path / "drive")
    assert seen[-1] == ("manifest.json", False)
    assert not any(had_manifest for _, had_manifest in seen)
    assert content(target) == content(small_set)


def test_a_half_synced_folder_is_recognised_before_anything_is_copied(
    small_set: Path, tmp_path: Path
) -> None:
    made = push(open_set(small_set), tmp_path / "drive").path
    os.truncate(made / "rgb-00003.npy", 0)  # as Drive shows a file that was never sent
    (made / "depth-00001.npy").unlink()
    with pytest.raises(IncompleteCopy, match=r"2 of \d+ files in .* are missing or short"):
        pull(set_on_mount(made), tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_changed_byte_on_drive_is_never_accepted(small_set: Path, tmp_path: Path) -> None:
    made = push(open_set(small_set), tmp_path / "drive").path
    flip(made / "rgb-00001.npy")
    with pytest.raises(IncompleteCopy, match=r"reading rgb-00001.npy gave other content"):
        pull(set_on_mount(made), tmp_path / "root")
    assert not finished_sets(tmp_path / "root")


def test_a_damaged_set_is_never_pushed(small_set: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    flip(copy / "rgb-00001.npy")
    with pytest.raises(IncompleteCopy, match=r"writing rgb-00001\.npy gave other content"):
        push(ShardSet(copy, read_manifest(copy)), tmp_path / "drive")
    assert not finished_sets(tmp_path / "drive")


@pytest.mark.parametrize("form", ["", ".zarr"])
def test_a_set_of_version_1_is_neither_pushed_nor_pulled_before_it_is_upgraded(
    tmp_path: Path, command: Run, form: str
) -> None:
    name = f"nyuv2-8-8ec8326e{form}"
    old = Path(shutil.copytree(VERSION_1 / name, tmp_path / name))
    before = content(old)
    with pytest.raises(OldSet):
        set_on_mount(old)
    for words in (("push", old, tmp_path / "drive"), ("pull", old, tmp_path / "root")):
        done = command("convert", *words)
        assert done.returncode == 2
        assert "is a set of version 1 of the format, and right as it is" in done.stderr
        assert "Run: make convert" in done.stderr
        assert done.stderr.count("\n") == 1
    assert content(old) == before
    assert os.listdir(tmp_path) == [name]


def test_too_little_room_is_said_before_copying(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"needs \d+ MB, 0 MB are free"):
        push(open_set(small_set), tmp_path / "drive")


def test_a_copy_without_a_terminal_says_a_few_lines(
    small_set: Path, tmp_path: Path, command: Run
) -> None:
    done = command("convert", "push", small_set, tmp_path / "drive")
    lines = done.stderr.splitlines()
    assert 2 <= len(lines) <= 10
    assert "\r" not in done.stderr
    assert lines[-2].startswith("writing: ")


# ---------------------------------------------------------------- what a mount answers


@pytest.mark.parametrize("name", ["ENOTCONN", "EIO", "EAGAIN", "EDQUOT", "ESTALE"])
def test_an_error_that_stays_is_one_line_with_the_cell_to_run(name: str) -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise OSError(getattr(errno, name), "as a mount does")

    with pytest.raises(StoreFailed) as error:
        patiently(fails, "reading rgb-00007.npy", Path("/content/drive/MyDrive/set"))
    assert len(calls) == 4
    text = str(error.value)
    assert text.startswith(f"Drive answered {name} 4 times while reading rgb-00007.npy")
    assert ("force_remount=True" in text) == (name != "EDQUOT")
    assert error.value.full == (name == "EDQUOT")
    assert error.value.gone == (name in ("ENOTCONN", "ESTALE"))
    assert "\n" not in text


def test_an_error_that_passes_is_not_seen() -> None:
    answers = iter([OSError(errno.EIO, ""), OSError(errno.EAGAIN, ""), None])

    def sometimes() -> int:
        if answer := next(answers):
            raise answer
        return 7

    assert patiently(sometimes, "reading") == 7


def test_an_error_that_is_not_the_mounts_is_not_tried_again() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        patiently(fails, "reading")
    assert len(calls) == 1


def test_a_drive_that_is_not_mounted_is_refused(
    small_set: Path, tmp_path: Path, command: Run
) -> None:
    for drive in ("/content/drive/MyDrive/nyuv2", tmp_path / "no" / "such"):
        done = command("convert", "push", small_set, drive)
        assert done.returncode == 2
        assert "drive.mount('/content/drive')" in done.stderr
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------- a mount that fails at random


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    if reason := why_no_fuse():
        pytest.skip(f"no FUSE mount to be had: {reason}")
    made = Drive(tmp_path / "fuse")
    yield made
    made.close()


def spoil(directory: Path, chance: random.Random) -> None:
    """What can happen to a folder on Drive between two sessions."""
    files = [p for p in directory.rglob("*") if p.is_file()]
    for path in chance.sample(files, min(len(files), chance.choice([0, 0, 1, 3]))):
        chance.choice([Path.unlink, flip, lambda p: os.truncate(p, 0)])(path)


def one_round(mat: Path, small_set: Path, drive: Drive, base: Path, seed: int) -> str:
    """A session with faults, then one without. Whatever was called done must be right."""
    chance, right, happened = random.Random(seed), shard_bytes(small_set), ""
    kinds = chance.sample([*ERRORS, "short", "forget", "stall"], 4)
    drive.fail(chance.choice([0.002, 0.01, 0.05]), *kinds)
    root = base / "root"
    try:
        session.prepare(
            session.SetRequest(root=root, settings=SMALL, source=mat, drive=drive.mount / "set")
        )
        happened = "done"
    except (UserError, OSError):
        happened = "refused"
    drive.fail(0)
    for finished in finished_sets(root):  # never a wrong byte under a manifest
        assert shard_bytes(finished) == right
    # On Drive there may be one, and it is never taken for right.
    for there in finished_sets(drive.back / "set"):
        with suppress(IncompleteCopy):
            packed = pull(set_on_mount(there), base / "other")
            assert shard_bytes(copy_set(packed, base / "other", None).path) == right
        shutil.rmtree(base / "other", ignore_errors=True)
    if chance.random() < 0.5:
        shutil.rmtree(root, ignore_errors=True)  # the machine is gone
    spoil(drive.back, chance)
    made = session.prepare(
        session.SetRequest(root=root, settings=SMALL, source=mat, drive=drive.mount / "set")
    )
    assert shard_bytes(made) == right
    if chance.random() < 0.5:
        shutil.rmtree(root)
    if chance.random() < 0.3:
        shutil.rmtree(drive.back / "set")
    return happened


@pytest.mark.stress
def test_a_mount_that_fails_at_random_loses_nothing_and_nothing_wrong_is_accepted(
    mat: Path, small_set: Path, drive: Drive, tmp_path: Path
) -> None:
    for seed in range(10):
        one_round(mat, small_set, drive, tmp_path, seed)


@pytest.mark.stress
def test_a_set_of_version_1_on_a_mount_that_fails_ends_whole(drive: Drive, tmp_path: Path) -> None:
    mat = tmp_path / "rooms.mat"
    write_sample(mat, 12, size_wh=(64, 48))
    settings = ConversionSettings(size=8, rows_per_shard=5)
    name = "nyuv2-8-8ec8326e"
    right = {
        file: data for file, data in shard_bytes(VERSION_1 / name).items() if "rows-" not in file
    }
    for seed in range(10):
        form = ("", ".zarr")[seed % 2]
        shutil.copytree(VERSION_1 / f"{name}{form}", drive.back / "set" / f"{name}{form}")
        kinds = random.Random(seed).sample([*ERRORS, "short", "forget", "stall"], 4)
        drive.fail(0.03, *kinds)
        with suppress(UserError, OSError):
            session.prepare(
                session.SetRequest(
                    root=tmp_path / "root", settings=settings, source=mat, drive=drive.mount / "set"
                )
            )
        drive.fail(0)
        made = session.prepare(
            session.SetRequest(
                root=tmp_path / "root", settings=settings, source=mat, drive=drive.mount / "set"
            )
        )
        assert shard_bytes(made).items() >= right.items()
        shutil.rmtree(tmp_path / "root")
        for there in finished_sets(drive.back / "set"):
            pulled = pull(set_on_mount(there), tmp_path / "other")
            assert (
                shard_bytes(copy_set(pulled, tmp_path / "other", None).path).items()
                >= right.items()
            )
            shutil.rmtree(tmp_path / "other")
        shutil.rmtree(drive.back / "set")


@pytest.mark.stress
@pytest.mark.parametrize("batch", range(30))
def test_300_rounds_with_a_failing_mount(
    mat: Path, small_set: Path, drive: Drive, tmp_path: Path, batch: int
) -> None:
    outcomes = [one_round(mat, small_set, drive, tmp_path, 10 + 10 * batch + k) for k in range(10)]
    print(
        f"10 rounds with a failing mount: {outcomes.count('done')} done, {outcomes.count('refused')} refused"
    )
