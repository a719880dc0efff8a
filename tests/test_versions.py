"""Sets of version 1 are right and are brought to this one; those of a later one are left alone.

The fixture was made by the last program of version 1: a set of .npy files, the same as Zarr, and a
run trained on it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO, needs_torch
from helpers.disks import make_read_only, small_disk
from helpers.sets import flip, is_whole, manifest_json, verify, write_manifest_json

from convert.pipeline import convert
from convert.sample import write_sample
from convert.session import SetRequest, prepare
from convert.sources.nyu import NyuSource
from convert.sources.nyu_mat import sampled_identity
from convert.transfer import pull, push, set_on_mount
from convert.upgrade import KEPT_COLUMNS, is_old, read_version_1, upgrade
from convert.verify import against_source
from shards.containers import column_file
from shards.dataset import ShardSet, open_set
from shards.errors import DamagedSet, NewerSet, OldSet, WrongSource
from shards.files import FileEntry, HashingFile, write_atomically
from shards.manifest import COLUMNS, FORMAT_VERSION, MANIFEST, read_manifest
from shards.spec import ConversionSettings
from stores import mounted

# zarr-python warns of files in a group that are not Zarr's, which are there on purpose
pytestmark = pytest.mark.filterwarnings(
    "ignore:Object at (manifest|provenance).json is not recognized"
)
Run = Callable[..., subprocess.CompletedProcess[str]]
Said = pytest.CaptureFixture[str]

VERSION_1 = REPO / "tests" / "fixtures" / "version-1"
VERSION_2 = REPO / "tests" / "fixtures" / "version-2"
NAME = "nyuv2-8-8ec8326e"
MAT = "rooms.mat"  # that it was made from
SETTINGS = ConversionSettings(size=8, rows_per_shard=5)
ARGS = ("--size", 8, "--rows-per-shard", 5)
NEWER = FORMAT_VERSION + 1
LATER = "is a set of version 3 of the format, this program reads up to 2. Use a newer version"
each_form = pytest.mark.parametrize("form", ["", ".zarr"])


def old_set(root: Path, form: str = "") -> Path:
    """A copy of the fixture."""
    return Path(shutil.copytree(VERSION_1 / f"{NAME}{form}", root / f"{NAME}{form}"))


def newer_set(root: Path, form: str = "") -> Path:
    """A set of a version to come, which has keys that nobody knows yet."""
    path = Path(shutil.copytree(VERSION_2 / f"{NAME}{form}", root / f"{NAME}{form}"))
    value = {**manifest_json(path), "format_version": NEWER, "settings": {"of": "another kind"}}
    write_manifest_json(path, value)
    return path


def content(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every file: when it was written, and its bytes."""
    files = (each for each in sorted(path.rglob("*")) if each.is_file())
    return {
        str(each.relative_to(path)): (each.stat().st_mtime_ns, each.read_bytes()) for each in files
    }


def bytes_of(path: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in content(path).items()}


def set_bytes(path: Path) -> dict[str, bytes]:
    """The set itself, without how it was made."""
    return {name: data for name, data in bytes_of(path).items() if name != "provenance.json"}


def kept_files(old: Path) -> set[str]:
    """What both versions have: shards, four columns, and their metadata."""
    version_1 = read_version_1(old)
    is_zarr = old.suffix == ".zarr"
    names = {name for shard in version_1.shards for name in shard.files}
    names |= {column_file(f"rows-{name}", COLUMNS[name], is_zarr) for name in KEPT_COLUMNS}
    gone = ("rows-raw_rgb/", "rows-raw_depth/")
    names |= {name for name in version_1.metadata_files if not name.startswith(gone)}
    return names


def train_here(said: Said, *words: object) -> subprocess.CompletedProcess[str]:
    """`python -m train` in this process, which has torch already."""
    from train.__main__ import main

    said.readouterr()
    status = main([str(word) for word in words])
    return subprocess.CompletedProcess(words, status, *said.readouterr())


# ---------------------------------------------------------------- the upgrade


@each_form
def test_an_upgrade_leaves_shards_and_common_columns_untouched(form: str, tmp_path: Path) -> None:
    old = old_set(tmp_path, form)
    before = content(old)
    kept = kept_files(old)
    upgrade(old)
    after = content(old)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["provenance.json"] == before["provenance.json"]
    gone = before.keys() - after.keys()
    assert gone
    assert all(name.startswith(("rows-raw_rgb", "rows-raw_depth")) for name in gone)


@each_form
def test_an_upgraded_set_has_the_bytes_of_one_that_this_version_made(
    form: str, tmp_path: Path
) -> None:
    """Of Zarr but for its metadata, where another version of zarr-python wrote that."""
    found = upgrade(old_set(tmp_path, form))
    made = VERSION_2 / f"{NAME}{form}"
    now, then = set_bytes(found.path), set_bytes(made)
    assert now.keys() == then.keys()
    is_free = (MANIFEST, "zarr.json") if form else ()
    assert [name for name in now if now[name] != then[name] and not name.endswith(is_free)] == []
    ours, theirs = manifest_json(found.path), manifest_json(made)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key] != theirs[key] and key != "metadata_files"] == []


@each_form
def test_an_upgraded_set_is_whole_and_keeps_name_and_fingerprint(form: str, tmp_path: Path) -> None:
    old = old_set(tmp_path, form)
    fingerprint = read_version_1(old).source, manifest_json(old)["fingerprint"]
    found = upgrade(old)
    assert found.path == old
    assert (found.manifest.source, found.manifest.fingerprint) == fingerprint
    assert [name for name, problem in verify(old) if problem] == []
    assert open_set(old).manifest == found.manifest
    assert len(found.column("rgb_file")) == 12


@each_form
@pytest.mark.parametrize("version", [1, 2])
def test_a_set_of_any_version_is_what_its_source_gives(
    version: int, form: str, tmp_path: Path
) -> None:
    write_sample(tmp_path / MAT, 12, size_wh=(64, 48))
    found = (
        upgrade(old_set(tmp_path, form)) if version == 1 else open_set(VERSION_2 / f"{NAME}{form}")
    )
    with closing(NyuSource(tmp_path / MAT, SETTINGS)) as source:
        assert against_source(found, source, 12) == 12


def test_the_new_columns_say_what_the_old_ones_said(tmp_path: Path) -> None:
    old = old_set(tmp_path)
    texts = {name: np.load(old / f"rows-{name}.npy") for name in ("raw_rgb", "raw_depth")}
    found = upgrade(old)
    assert found.column("rgb_file").tolist() == [text.decode() for text in texts["raw_rgb"]]
    assert found.column("depth_file").tolist() == [text.decode() for text in texts["raw_depth"]]
    assert found.column("row").tolist() == list(range(12))
    assert not found.column("status").any()
    camera = found.column("camera")
    expected = [518.86 / 640, 519.47 / 480, (325.58 + 0.5) / 640, (253.74 + 0.5) / 480]
    np.testing.assert_allclose(camera, np.tile(expected, (12, 1)), rtol=1e-6)


def test_zarr_python_reads_an_upgraded_set(tmp_path: Path) -> None:
    import zarr

    found = upgrade(old_set(tmp_path, ".zarr"))
    group = zarr.open_group(found.path, mode="r")
    arrays = {array for column in COLUMNS.values() for array in column.arrays}
    assert set(group.array_keys()) == {*found.manifest.fields, *arrays}
    assert group.attrs["fingerprint"] == found.manifest.fingerprint
    names: Any = group.attrs["names"]
    assert names["scenes"] == list(found.manifest.scenes)
    assert len(names["to40"]) == len(found.dataset.label_names) + 1
    for field in found.manifest.fields:
        expected = np.concatenate(found.shards(field))
        np.testing.assert_array_equal(np.asarray(group[field][:]), expected)
    np.testing.assert_array_equal(np.asarray(group["rows-camera"][:]), found.column("camera"))
    data = np.asarray(group["rows-rgb_file-bytes"][:]).tobytes()
    assert data.decode() == "".join(found.column("rgb_file"))


@each_form
def test_an_upgrade_of_an_upgraded_set_does_nothing(form: str, tmp_path: Path) -> None:
    first = upgrade(old_set(tmp_path, form))
    before = content(first.path)
    again = upgrade(first.path)
    assert again.manifest == first.manifest
    assert content(first.path) == before


@pytest.mark.races
def test_two_processes_may_upgrade_a_set_at_once(tmp_path: Path) -> None:
    old = old_set(tmp_path)
    code = "import sys, pathlib, convert.upgrade as u; u.upgrade(pathlib.Path(sys.argv[1]))"
    running = [
        subprocess.Popen([sys.executable, "-c", code, old], cwd=REPO, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    assert set_bytes(old) == set_bytes(VERSION_2 / NAME)


# ---------------------------------------------------------------- killed

# Upgrades the sets that are given, each in a child. The first dies before the first rename or
# removal, as if it were killed: nothing is cleaned up. The next one dies a step later, and so on.
DYING = """if True:
    import os, sys
    from pathlib import Path
    import zarr  # once, and not in every child
    from convert.upgrade import upgrade

    def dies_after(n_steps):
        def counted(function):
            def wrapped(path, *args, **kwargs):
                nonlocal n_steps
                if not str(path).endswith(".tmp") or function is os_replace:
                    n_steps -= 1
                if n_steps < 0:
                    os._exit(77)
                return function(path, *args, **kwargs)
            return wrapped

        os_replace = os.replace
        os.replace, os.unlink, os.rmdir = map(counted, (os.replace, os.unlink, os.rmdir))

    for n_steps, path in enumerate(sys.argv[1:]):
        child = os.fork()
        if child == 0:
            dies_after(n_steps)
            upgrade(Path(path))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def killed_upgrades(sets: Sequence[Path]) -> list[bool]:
    """Whether each was killed, after as many steps as its place, or ended before."""
    words = [sys.executable, "-c", DYING, *map(str, sets)]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=120)
    statuses = done.stdout.split()
    assert len(statuses) == len(sets), done.stderr
    assert set(statuses) <= {"0", "77"}, done.stderr
    return [status == "77" for status in statuses]


def is_whole_in_version_1(path: Path) -> bool:
    """Every file that its manifest names is there, as it was."""
    now = bytes_of(path)
    then = bytes_of(VERSION_1 / path.name)
    return now.items() >= then.items()


@each_form
def test_an_upgrade_that_is_killed_anywhere_leaves_a_whole_set(form: str, tmp_path: Path) -> None:
    end = set_bytes(upgrade(old_set(tmp_path / "end", form)).path)
    sets = [old_set(tmp_path / str(n_steps), form) for n_steps in range(32)]
    were_killed = killed_upgrades(sets)
    assert were_killed == sorted(were_killed, reverse=True)
    assert were_killed[8]
    assert not were_killed[-1]

    versions = []
    for n_steps, old in enumerate(sets):
        versions.append(manifest_json(old)["format_version"])
        if versions[-1] == 1:
            assert is_whole_in_version_1(old), n_steps
        else:
            assert [name for name, problem in verify(old) if problem] == [], n_steps

        ended = upgrade(old)
        assert [name for name, problem in verify(old) if problem] == [], n_steps
        assert set_bytes(old).items() >= end.items(), n_steps
        assert ended.manifest == read_manifest(old)
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}


@each_form
def test_commands_go_on_after_a_killed_upgrade(form: str, tmp_path: Path, command: Run) -> None:
    old = old_set(tmp_path, form)
    spare = [old_set(tmp_path / str(n_steps), form) for n_steps in range(4)]
    assert all(killed_upgrades([*spare, old]))
    done = command("convert", "run", tmp_path / MAT, "--out", tmp_path, *ARGS, *zarr_args(form))
    assert (done.returncode, done.stdout) == (0, f"{old}\n"), done.stderr
    assert "damaged" not in done.stderr
    checked = command("convert", "verify", old)
    assert checked.returncode == 0, checked.stderr


def zarr_args(form: str) -> list[str]:
    codecs = "rgb=none,depth=zstd,raw_depth=blosc,label=zstd,instance=blosc"
    return ["--format", "zarr", "--codec", codecs] if form else []


# ---------------------------------------------------------------- damage is named


@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("", "rows-scene.npy"),
        ("", "rows-raw_rgb.npy"),
        (".zarr", "rows-split/c/0"),
        (".zarr", "rows-raw_depth/c/0/0"),
    ],
)
def test_a_damaged_column_of_version_1_is_named(form: str, file: str, tmp_path: Path) -> None:
    old = old_set(tmp_path, form)
    flip(old / file, -1)
    before = content(old)
    with pytest.raises(DamagedSet, match=f"{file} is damaged"):
        upgrade(old)
    assert content(old) == before


def test_a_damaged_column_is_named_by_the_command_and_mended_by_repair(
    tmp_path: Path, command: Run
) -> None:
    old = old_set(tmp_path)
    flip(old / "rows-scene.npy", -1)
    done = command("convert", "run", old, "--out", tmp_path / "other")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "rows-scene.npy is damaged" in done.stderr
    assert "--repair" in done.stderr
    write_sample(tmp_path / MAT, 12, size_wh=(64, 48))
    where = tmp_path if is_its_source(tmp_path / MAT, old) else tmp_path / "new"
    done = command("convert", "run", tmp_path / MAT, "--out", where, *ARGS, "--repair")
    assert done.returncode == 0, done.stderr
    assert is_whole(Path(done.stdout.strip()))


def is_its_source(mat: Path, old: Path) -> bool:
    """Whether the set was made from this very .mat: another version of h5py may write other bytes."""
    return sampled_identity(mat).content() == read_version_1(old).source.content()


def test_a_damaged_manifest_of_version_1_is_damage(tmp_path: Path) -> None:
    old = old_set(tmp_path)
    flip(old / MANIFEST)
    with pytest.raises(DamagedSet, match="SHA-256 does not match"):
        upgrade(old)


def test_a_damaged_shard_is_found_after_the_upgrade(tmp_path: Path) -> None:
    old = old_set(tmp_path)
    flip(old / "rgb-00001.npy", -1)
    upgrade(old)
    assert [name for name, problem in verify(old) if problem] == ["rgb-00001.npy"]


# ---------------------------------------------------------------- what is typed


def words_on(old: Path, elsewhere: Path) -> dict[str, list[object]]:
    return {
        "verify": ["convert", "verify", old],
        "inspect": ["convert", "inspect", old],
        "push": ["convert", "push", old, elsewhere / "drive"],
        "pull": ["convert", "pull", old, elsewhere / "root"],
        "train": ["train", "--data", old, "--out", elsewhere / "run"],
    }


@each_form
@pytest.mark.parametrize(
    "verb",
    ["verify", "inspect", "push", "pull", pytest.param("train", marks=needs_torch)],
)
def test_every_other_command_says_one_line_and_touches_nothing(
    verb: str, form: str, tmp_path: Path, command: Run, capsys: Said
) -> None:
    old = old_set(tmp_path / "sets", form)
    before = content(tmp_path)
    words = words_on(old, tmp_path)[verb]
    done = train_here(capsys, *words[1:]) if verb == "train" else command(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "is a set of version 1 of the format, and right as it is" in done.stderr
    assert said_command(done.stderr).startswith("make convert MAT=")
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == ["sets"]


def said_command(stderr: str) -> str:
    return stderr.rstrip("\n").rpartition(" Run: ")[2]


commands_on_each_form = pytest.mark.parametrize(
    ("verb", "form"),
    [
        ("verify", ""),
        ("verify", ".zarr"),
        pytest.param("train", "", marks=needs_torch),
        pytest.param("train", ".zarr", marks=[needs_torch, pytest.mark.stress]),
    ],
)


def run_as_said(line: str) -> subprocess.CompletedProcess[str]:
    """In a shell, in the checkout, which needs no .venv of its own for it."""
    given = {"COLAB_RELEASE_TAG": "test", "MAKEFLAGS": f" -- READY= PYTHON={sys.executable}"}
    return subprocess.run(
        line, shell=True, cwd=REPO, env=os.environ | given, capture_output=True, text=True
    )


@commands_on_each_form
def test_the_command_that_is_said_upgrades_this_very_set_and_makes_no_other(
    verb: str, form: str, tmp_path: Path, command: Run
) -> None:
    """Of other settings than the usual ones, in a folder of another name, with its source gone."""
    old = old_set(tmp_path / "my sets", form)
    said = command(*words_on(old, tmp_path)[verb]).stderr
    done = run_as_said(said_command(said))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(old)), done.stderr
    assert is_whole(old)
    assert [path for path in old.parent.iterdir() if not path.name.endswith(".lock")] == [old]


@commands_on_each_form
def test_of_a_set_that_cannot_be_written_to_a_command_is_said_that_copies_it(
    verb: str, form: str, tmp_path: Path, command: Run
) -> None:
    with small_disk(tmp_path / "read only", 8 << 20) as disk:
        old = old_set(disk, form)
        before = bytes_of(old)
        make_read_only(disk)
        said = command(*words_on(old, tmp_path)[verb]).stderr
        other = tmp_path / "other"
        other.mkdir()
        line = said_command(said).replace("/another/disk", str(other))
        done = run_as_said(line)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(other / old.name)), line
        assert is_whole(other / old.name)
        assert bytes_of(old) == before


def test_a_conversion_says_that_an_old_set_cannot_be_written_to(
    tmp_path: Path, command: Run
) -> None:
    words = ("convert", "run", tmp_path / MAT, "--out")
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        old = old_set(disk)
        make_read_only(disk)
        for more in ((disk,), (tmp_path / "root", "--drive", disk)):
            done = command(*words, *more, *ARGS)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert "but cannot be written to (Read-only file system)" in done.stderr
            assert said_command(done.stderr).startswith(f"cp -r {old} /another/disk && ")


@needs_torch
def test_prediction_on_a_set_of_version_1_says_the_same(tmp_path: Path, capsys: Said) -> None:
    old = old_set(tmp_path)
    run = shutil.copytree(VERSION_1 / "run", tmp_path / "run")
    before = content(tmp_path)
    done = train_here(capsys, "predict", run, "--data", old)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "is a set of version 1" in done.stderr
    assert said_command(done.stderr).startswith("make convert MAT=")
    assert content(tmp_path) == before


@each_form
def test_a_conversion_upgrades_what_it_finds_though_the_source_is_gone(
    form: str, tmp_path: Path, command: Run
) -> None:
    old = old_set(tmp_path, form)
    done = command("convert", "run", tmp_path / MAT, "--out", tmp_path, *ARGS, *zarr_args(form))
    assert (done.returncode, done.stdout) == (0, f"{old}\n"), done.stderr
    assert f"{old} is brought to version 2 of the format: nothing was decoded" in done.stderr
    assert "damaged" not in done.stderr
    assert is_whole(old)


@each_form
def test_make_convert_without_a_source_upgrades_what_it_finds(
    form: str, tmp_path: Path, command: Run
) -> None:
    old = old_set(tmp_path, form)
    done = command("convert", "run", "--out", tmp_path, *ARGS, "--url", "http://127.0.0.1:9/no")
    assert (done.returncode, done.stdout) == (0, f"{old}\n"), done.stderr
    assert f"{old} is brought to version 2 of the format: nothing was decoded" in done.stderr
    assert is_whole(old)


@each_form
def test_a_copy_of_a_set_of_version_1_upgrades_it_first(
    form: str, tmp_path: Path, command: Run
) -> None:
    old = old_set(tmp_path, form)
    target = "npy" if form else "zarr"
    words = ("convert", "run", old, "--out", tmp_path / "other", "--format", target)
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert f"{old} is brought to version 2 of the format: nothing was decoded" in done.stderr
    made = Path(done.stdout.strip())
    assert made.parent == tmp_path / "other"
    assert is_whole(old)
    assert is_whole(made)
    for name in read_manifest(old).fields:
        ours, theirs = open_set(made).shards(name), open_set(old).shards(name)
        assert all(map(np.array_equal, ours, theirs))


def test_a_set_with_other_settings_stays_of_version_1(tmp_path: Path, command: Run) -> None:
    old = old_set(tmp_path)
    before = content(old)
    write_sample(tmp_path / MAT, 12, size_wh=(64, 48))
    convert(tmp_path / MAT, tmp_path, ConversionSettings(size=16))
    prepare(SetRequest(root=tmp_path, settings=ConversionSettings(size=32), source=tmp_path / MAT))
    done = command("convert", "run", old, "--out", tmp_path / "other", "--size", 16)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "has other settings" in done.stderr
    assert content(old) == before
    assert is_old(old)


def test_a_set_of_another_source_stays_of_version_1(tmp_path: Path) -> None:
    old = old_set(tmp_path)
    before = content(old)
    with pytest.raises(WrongSource):
        convert(tmp_path / "other.mat", tmp_path, SETTINGS)
    assert content(old) == before


def test_a_conversion_of_the_source_upgrades_the_set_in_its_place(tmp_path: Path) -> None:
    old = old_set(tmp_path)
    write_sample(tmp_path / MAT, 12, size_wh=(64, 48))
    if not is_its_source(tmp_path / MAT, old):
        pytest.skip("this h5py writes another .mat")
    before = content(old)
    kept = kept_files(old)
    assert convert(tmp_path / MAT, tmp_path, SETTINGS) == str(old)
    after = content(old)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert convert(tmp_path / MAT, tmp_path, SETTINGS, repair=True) == str(old)
    assert content(old) == after


def test_an_unpacked_copy_of_version_1_is_not_taken_away(tmp_path: Path) -> None:
    """Training unpacks a compressed set beside it, and once did so with version 1."""
    from train import unpack

    packed = upgrade(old_set(tmp_path, ".zarr"))
    copy = old_set(tmp_path)
    before = content(copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        unpacked = unpack.unpacked(packed).path
    assert content(copy) == before
    assert unpacked.is_relative_to(tmp_path / "cache")
    assert is_whole(unpacked)


# ---------------------------------------------------------------- pushed over


@each_form
def test_a_push_over_a_set_of_version_1_leaves_one_that_is_whole_at_every_moment(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drive may fill up in the middle, or the machine go: its only set was unusable then."""
    there = old_set(tmp_path / "drive", form)
    found = upgrade(old_set(tmp_path / "here", form))
    seen = []

    def watching(path: Path, write: Callable[[HashingFile], object]) -> FileEntry:
        assert is_whole_in_version_1_or_2(there)
        seen.append(path.name)
        return write_atomically(path, write)

    monkeypatch.setattr(mounted, "write_atomically", watching)
    push(found, there.parent)
    assert len(seen) > 5
    assert is_whole(there)
    assert open_set(there).manifest == found.manifest


def is_whole_in_version_1_or_2(path: Path) -> bool:
    if manifest_json(path)["format_version"] == 1:
        names = {*read_version_1(path).files, MANIFEST}
        now, then = bytes_of(path), bytes_of(VERSION_1 / path.name)
        return all(now[name] == then[name] for name in names)
    return is_whole(path)


def test_a_push_over_a_set_of_other_bytes_withdraws_it_before_the_first_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = old_set(tmp_path / "drive")
    value = manifest_json(there)
    value["shards"][1]["files"]["rgb-00001.npy"]["sha256"] = "0" * 64
    write_manifest_json(there, value)
    flip(there / "rgb-00001.npy", -1)
    had_manifest = {}

    def watching(path: Path, write: Callable[[HashingFile], object]) -> FileEntry:
        had_manifest[path.name] = (there / MANIFEST).exists()
        return write_atomically(path, write)

    monkeypatch.setattr(mounted, "write_atomically", watching)
    push(upgrade(old_set(tmp_path / "here")), there.parent)
    withdrawn = {name for name, was_there in had_manifest.items() if not was_there}
    assert withdrawn == {"rgb-00001.npy", "provenance.json", MANIFEST}
    assert len(had_manifest) > len(withdrawn)
    assert is_whole(there)


# ---------------------------------------------------------------- a later version


@each_form
def test_a_later_version_is_refused_by_its_number_and_never_called_damaged(
    form: str, tmp_path: Path
) -> None:
    newer = newer_set(tmp_path, form)
    before = content(newer)
    for read in (read_manifest, open_set, upgrade, set_on_mount):
        with pytest.raises(NewerSet, match=LATER) as caught:
            read(newer)  # type: ignore[operator]
        assert caught.value.version == NEWER
    assert not is_old(newer)
    assert content(newer) == before


@each_form
@pytest.mark.parametrize(
    "verb",
    ["verify", "inspect", "push", "pull", "run", pytest.param("train", marks=needs_torch)],
)
def test_every_command_refuses_a_later_version_in_one_line(
    verb: str, form: str, tmp_path: Path, command: Run, capsys: Said
) -> None:
    newer = newer_set(tmp_path / "sets", form)
    before = content(tmp_path)
    run = ["convert", "run", newer, "--out", tmp_path / "out"]
    words = run if verb == "run" else words_on(newer, tmp_path)[verb]
    done = train_here(capsys, *words[1:]) if verb == "train" else command(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert LATER in done.stderr
    assert "damaged" not in done.stderr
    assert content(tmp_path) == before


@pytest.mark.parametrize("repair", [False, True])
def test_a_conversion_never_takes_the_place_of_a_later_version(
    repair: bool, tmp_path: Path
) -> None:
    write_sample(tmp_path / MAT, 12, size_wh=(64, 48))
    made = Path(convert(tmp_path / MAT, tmp_path, SETTINGS))
    write_manifest_json(made, {**manifest_json(made), "format_version": NEWER, "new": 1})
    before = content(made)
    with pytest.raises(NewerSet, match=LATER):
        convert(tmp_path / MAT, tmp_path, SETTINGS, repair=repair)
    with pytest.raises(NewerSet, match=LATER):
        prepare(SetRequest(root=tmp_path, settings=SETTINGS, source=tmp_path / MAT))
    assert content(made) == before


def test_a_copy_never_takes_the_place_of_a_later_version(tmp_path: Path) -> None:
    newer = newer_set(tmp_path / "there")
    before = content(newer)
    found = open_set(VERSION_2 / NAME)
    with pytest.raises(NewerSet, match=LATER):
        push(found, tmp_path / "there")
    with pytest.raises(NewerSet, match=LATER):
        pull(found, tmp_path / "there")
    assert content(newer) == before


def test_a_session_never_takes_the_place_of_a_later_version(tmp_path: Path) -> None:
    """Drive has the set of this version, packed; where it would be unpacked lies a later one."""
    newer = newer_set(tmp_path / "root")
    before = content(newer)
    shutil.copytree(VERSION_2 / f"{NAME}.zarr", tmp_path / "drive" / f"{NAME}.zarr")
    with pytest.raises(NewerSet, match=LATER):
        prepare(SetRequest(root=tmp_path / "root", settings=SETTINGS, drive=tmp_path / "drive"))
    assert content(newer) == before


# ---------------------------------------------------------------- checkpoints


@pytest.mark.stress
@needs_torch
def test_a_run_of_version_1_is_continued_on_the_upgraded_set(tmp_path: Path, command: Run) -> None:
    """The same command as then, for one epoch more."""
    old = old_set(tmp_path)
    run = Path(shutil.copytree(VERSION_1 / "run", tmp_path / "run"))
    then = (run / "metrics.csv").read_text().splitlines()
    words = ["train", "--data", old, "--out", run, "--width", 1, "--size", 32, "--batch-size", 2]
    words += ["--seed", 5, "--num-workers", 0, "--epochs", 2]
    refused = command(*words)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "is a set of version 1" in refused.stderr

    upgraded = command("convert", "run", tmp_path / MAT, "--out", tmp_path, *ARGS)
    assert upgraded.returncode == 0, upgraded.stderr
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert f"continuing from {run / 'last.pt'} at epoch 2 of 2, step 1" in done.stderr
    now = (run / "metrics.csv").read_text().splitlines()
    assert now[:2] == then
    assert len(now) == 3


@needs_torch
def test_a_run_of_version_1_predicts_on_the_upgraded_set(tmp_path: Path, capsys: Said) -> None:
    old = upgrade(old_set(tmp_path)).path
    run = shutil.copytree(VERSION_1 / "run", tmp_path / "run")
    done = train_here(capsys, "predict", run, "--data", old)
    assert done.returncode == 0, done.stderr


def test_old_is_an_error_of_its_own_with_the_number_as_a_fact(tmp_path: Path) -> None:
    old = old_set(tmp_path)
    with pytest.raises(OldSet) as caught:
        open_set(old)
    assert caught.value.version == 1
    assert isinstance(upgrade(old), ShardSet)
