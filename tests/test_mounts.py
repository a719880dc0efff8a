"""Which mounts are read row by row, which are refused, and how each is called when it fails."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import needs_torch
from helpers.drives import Drive, why_no_fuse
from helpers.sets import content

from convert.transfer import push
from shards.dataset import open_set
from shards.errors import RemoteSet, StoreFailed
from stores import mounted
from stores.mounted import kind_of_mount, mount_of, patiently, refuse_remote

Mounting = Callable[[str, str], Path]


@pytest.fixture
def mounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mounting:
    """Let the table of mounts say that a folder is one, of a type and a source."""

    def mount(kind: str, source: str) -> Path:
        folder = tmp_path / "a disk"
        folder.mkdir(exist_ok=True)
        point = str(folder).replace(" ", "\\040")
        table = tmp_path / "mountinfo"
        root = "1 0 0:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        table.write_text(f"{root}2 1 0:2 / {point} rw shared:2 master:1 - {kind} {source} rw\n")
        monkeypatch.setattr(mounted, "MOUNTS", table)
        return folder

    return mount


# As the programs name themselves in the table of mounts.
REFUSED = [
    ("fuse.drive", "drive", "a mounted Drive"),
    ("fuse.drivefs", "drivefs", "a mounted Drive"),
    ("fuse.google-drive-ocamlfuse", "google-drive-ocamlfuse", "a mounted Drive"),
    ("fuse", "google-drive-ocamlfuse", "a mounted Drive"),
    ("fuse.rclone", "remote:", "a mounted cloud folder"),
    ("fuse.gcsfuse", "my-bucket", "a mounted bucket"),
    ("fuse.s3fs", "s3fs", "a mounted bucket"),
    ("fuse", "s3fs", "a mounted bucket"),
    ("fuse", "mountpoint-s3", "a mounted bucket"),
    ("fuse.goofys", "my-bucket", "a mounted bucket"),
    ("fuse.blobfuse2", "blobfuse2", "a mounted bucket"),
]
OWN = [
    *(("ext4", "/dev/sdb1"), ("nfs4", "server:/data"), ("lustre", "10.0.0.1@tcp:/scratch")),
    *(("beegfs", "beegfs_nodev"), ("ceph", "10.0.0.1:/"), ("virtiofs", "shared"), ("9p", "C:")),
    *(("fuseblk", "/dev/sdc1"), ("fuseblk.ntfs-3g", "/dev/sdc1"), ("fuse.mergerfs", "1:2:3")),
    *(("fuse.juicefs", "JuiceFS:lab"), ("fuse.ceph-fuse", "ceph-fuse"), ("fuse.ceph", "ceph")),
    *(("fuse.glusterfs", "server:/volume"), ("fuse.fuse-overlayfs", "fuse-overlayfs")),
    *(("fuse.portal", "portal"), ("fuse.bindfs", "/data"), ("fuse", "/usr/bin/mergerfs")),
    *(("fusectl", "fusectl"), ("fuse3ish", "drive")),
]
UNKNOWN = [("fuse.sshfs", "me@server:/data"), ("fuse", "sshfs#me@server:/x"), ("fuse", "labfs")]


@pytest.mark.parametrize(("kind", "source", "place"), REFUSED)
def test_what_is_fetched_from_far_away_is_refused_by_what_it_is(
    mounting: Mounting, kind: str, source: str, place: str
) -> None:
    with pytest.raises(RemoteSet) as caught:
        refuse_remote(mounting(kind, source) / "set")
    assert f"is on {place} ({kind}): training would read it over the network" in str(caught.value)
    assert (caught.value.kind, caught.value.place) == (kind, place)


@pytest.mark.parametrize(("kind", "source"), OWN)
def test_a_disk_of_the_machine_or_of_the_lab_is_read_without_a_word(
    mounting: Mounting, capsys: pytest.CaptureFixture[str], kind: str, source: str
) -> None:
    refuse_remote(mounting(kind, source) / "set")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("kind", "source"), UNKNOWN)
def test_a_program_that_nobody_knows_is_said_once_and_read(
    mounting: Mounting, capsys: pytest.CaptureFixture[str], kind: str, source: str
) -> None:
    path = mounting(kind, source) / "set"
    for _ in range(3):
        refuse_remote(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path} is on {path.parent} ({kind}, from {source}), which a program")


def test_whatever_is_mounted_where_colab_mounts_drive_is_drive(
    mounting: Mounting, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mounting("fuse", "anything")
    monkeypatch.setattr(mounted, "MOUNT", folder)
    with pytest.raises(RemoteSet, match="is on a mounted Drive"):
        refuse_remote(folder / "MyDrive" / "set")


@pytest.mark.parametrize(("kind", "is_drive"), [("fuse.drive", True), ("fuse.sshfs", False)])
def test_what_was_pushed_to_drive_alone_still_has_to_reach_google(
    mounting: Mounting,
    small_set: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    is_drive: bool,
) -> None:
    push(open_set(small_set), mounting(kind, "source"))
    assert ("run drive.flush_and_unmount()" in capsys.readouterr().err) is is_drive


def test_a_path_is_on_the_deepest_mount_around_it(mounting: Mounting) -> None:
    folder = mounting("nfs4", "server:/a\\040b")
    found = mount_of(folder / "set")
    assert found is not None
    assert (found.kind, found.source, found.point) == ("nfs4", "server:/a b", folder)
    beside = mount_of(folder.parent)
    assert beside is not None
    assert beside.kind == "ext4"
    assert kind_of_mount(folder / "no such path") == ""


# ------------------------------------------------------------------------------ what an answer says


@pytest.mark.parametrize(
    ("kind", "name", "advice"),
    [
        ("fuse.drive", "Drive", "force_remount=True"),
        ("fuse.sshfs", "a disk (fuse.sshfs)", "Mount it again"),
        ("nfs4", "a disk (nfs4)", "Mount it again"),
        ("ext4", "a disk (ext4)", "Mount it again"),
    ],
)
def test_an_answer_that_stays_is_told_of_by_what_the_place_is(
    mounting: Mounting, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, advice: str
) -> None:
    monkeypatch.setattr(mounted, "PAUSES", (0.001,))
    path = mounting(kind, "source") / "rgb-00007.npy"

    def answering(number: int, named: bool) -> Callable[[], None]:
        def fails() -> None:
            raise OSError(number, "no", *([str(path)] if named else []))

        return fails

    for number in (errno.ENOTCONN, errno.ESTALE):
        for where in (path, None):  # told by the caller, or by the error
            with pytest.raises(StoreFailed) as caught:
                patiently(answering(number, where is None), "reading it", where)
            text = str(caught.value)
            assert f"{name} answered {errno.errorcode[number]} 2 times while reading it" in text
            assert advice in text
            assert caught.value.gone
    for number, said in ((errno.EIO, "wait"), (errno.EDQUOT, "Free space there")):
        with pytest.raises(StoreFailed, match=said) as caught:
            patiently(answering(number, False), "reading it", path)
        assert ("bin" in str(caught.value)) == (name == "Drive" and number == errno.EDQUOT)


def test_where_nothing_tells_of_the_place_it_is_a_file_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mounted, "PAUSES", ())

    def fails() -> None:
        raise OSError(errno.EIO, "no")

    with pytest.raises(StoreFailed, match="the file system answered EIO 1 times while reading"):
        patiently(fails, "reading")


# -------------------------------------------------------------------------------------- real mounts


@pytest.fixture
def mounted_as(tmp_path: Path) -> Iterator[Callable[[str, Path], Path]]:
    """Mount a copy of a set by a program of this name; where it then is."""
    if reason := why_no_fuse():
        pytest.skip(f"no FUSE mount to be had: {reason}")
    made: list[Drive] = []

    def mount(program: str, source: Path) -> Path:
        drive = Drive(tmp_path / program, program)
        made.append(drive)
        for name, data in content(source).items():
            path = drive.back / source.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return drive.mount / source.name

    yield mount
    for drive in made:
        drive.close()


@needs_torch
def test_training_reads_from_a_labs_own_mount_and_not_from_a_bucket(
    mounted_as: Callable[[str, Path], Path], small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.data import ShardDataset

    right = ShardDataset(small_set, split="all")
    n_lines = len(capsys.readouterr().err.splitlines())  # what is said of this set anywhere
    for program, n_more in (("mergerfs", 0), ("labfs", 1), ("gcsfuse", None)):
        path = mounted_as(program, small_set)
        assert kind_of_mount(path) == f"fuse.{program}"
        if n_more is None:
            with pytest.raises(RemoteSet, match=r"is on a mounted bucket \(fuse\.gcsfuse\)"):
                ShardDataset(path, split="all")
        dataset = ShardDataset(path, split="all", allow_remote=n_more is None)
        assert (dataset[3][0] == right[3][0]).all()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == n_lines + (n_more or 0)
        assert os.path.ismount(path.parent)
