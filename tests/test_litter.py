"""What file managers and file systems leave in any folder is no damage to a set."""

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.sets import FIELDS, SMALL, convert

from convert.__main__ import main
from convert.transfer import pull, push, set_on_mount
from shards.dataset import LITTER, open_set, verify
from shards.flags import as_typed

NAMES = (
    ".DS_Store",
    "._rgb-00000.npy",
    "Thumbs.db",
    "desktop.ini",
    "Icon\r",
    ".nfs000001",
    ".~lock.x#",
)


@pytest.fixture
def set_with_litter(small_set: Path, tmp_path: Path) -> Path:
    path = tmp_path / "root" / small_set.name
    shutil.copytree(small_set, path)
    for name in NAMES:
        (path / name).write_bytes(b"x")
    return path


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_verify_warns_of_litter_names_the_line_that_removes_it_and_ends_well(
    set_with_litter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(set_with_litter)]) == 0
    said = capsys.readouterr()
    assert "every byte as the manifest says" in said.out
    (warning,) = said.err.splitlines()
    assert "6 more was left by a file manager" in warning
    command = warning.partition("To remove: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert not {path.name for path in set_with_litter.iterdir()} & set(NAMES)
    assert main(["verify", str(set_with_litter)]) == 0
    assert capsys.readouterr().err == ""


def test_much_litter_is_removed_by_its_patterns_and_nothing_else_is(
    mat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = convert(mat, tmp_path, SMALL, codecs=dict.fromkeys(FIELDS, "none"))
    before = sorted(path.rglob("*"))
    for folder in [each for each in before if each.is_dir()]:
        for name in NAMES:
            (folder / name).touch()
    assert main(["verify", str(path)]) == 0
    command = capsys.readouterr().err.partition("To remove: ")[2].strip()
    assert len(command) < 500
    subprocess.run(["bash", "-c", command], check=True)
    assert sorted(path.rglob("*")) == before


@pytest.mark.parametrize("name", ["notes.txt", "DS_Store", "copy of rgb-00000.npy", ".hidden"])
def test_another_foreign_file_is_named_as_before(
    name: str, set_with_litter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (set_with_litter / name).touch()
    assert main(["verify", str(set_with_litter)]) == 2
    assert f"{name} is not part of the set" in capsys.readouterr().err


def test_a_folder_or_a_link_of_such_a_name_is_foreign(set_with_litter: Path) -> None:
    (set_with_litter / "._folder").mkdir()
    (set_with_litter / "._link").symlink_to("/etc/hosts")
    wrong = {name for name, problem in verify(open_set(set_with_litter)) if problem}
    assert wrong == {"._folder", "._link"}


def test_damage_beside_litter_is_damage(
    set_with_litter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(set_with_litter / "depth-00000.npy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert main(["verify", str(set_with_litter)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "depth-00000.npy" in error
    assert ".DS_Store" not in error


def test_litter_is_no_reason_to_convert_again(
    mat: Path, set_with_litter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(set_with_litter)
    convert(mat, set_with_litter.parent, SMALL, repair=True)
    assert bytes_of(set_with_litter) == before
    assert "made again" not in capsys.readouterr().err


def test_litter_does_not_travel_and_does_not_stop_a_copy(
    small_set: Path, set_with_litter: Path, tmp_path: Path
) -> None:
    drive = tmp_path / "drive"
    copy = push(open_set(set_with_litter), drive).path
    assert {path.name for path in copy.iterdir()} == {path.name for path in small_set.iterdir()}
    (copy / "Icon\r").touch()
    back = pull(set_on_mount(copy), tmp_path / "back").path
    assert bytes_of(back) == bytes_of(small_set)


def test_every_pattern_is_one_of_files_that_nobody_writes_by_hand() -> None:
    assert all(not pattern.startswith("*") for pattern in LITTER)


@pytest.mark.parametrize(
    "name", ["a b", "it's", "Icon\r", "new\nline's", "back\\slash\t", "", "ü", "\udcff"]
)
def test_a_name_is_typed_in_one_line_as_the_shell_reads_it(name: str) -> None:
    line = as_typed(["printf", "%s", name])
    assert line.isprintable()
    assert subprocess.run(["bash", "-c", line], capture_output=True).stdout == name.encode(
        "utf-8", "surrogateescape"
    )
