"""make convert, session after session: the cheapest way to a finished set, said in words."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPO, SMALL
from helpers.commands import copy_of_the_checkout
from helpers.commands import make as make_in
from helpers.servers import serving
from helpers.sets import flip, is_whole, same_shards

from convert.__main__ import main
from convert.pipeline import SourceFilter, convert, find_set
from convert.sample import write_sample
from convert.session import SetRequest, prepare
from convert.sources.nyu_mat import sampled_identity
from convert.sources.nyu_tables import NYU_DOWNLOAD
from convert.transfer import push
from convert.upgrade import read_version_1
from shards.dataset import finished_sets, open_set
from shards.errors import SeveralSets, StoreFailed
from shards.manifest import MANIFEST, read_manifest, shard_file
from shards.spec import KNOWN_FIELDS, ConversionSettings
from stores import mounted

MAT_NAME = NYU_DOWNLOAD.name
RGB = KNOWN_FIELDS["rgb"]

ARGS = ("--size", 32, "--rows-per-shard", 10)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """The command of `make convert DRIVE=`, with this test's folders, in this process."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(*more: object) -> Done:
        capsys.readouterr()
        argv = [
            "convert",
            "run",
            "--out",
            tmp_path / "root",
            "--drive",
            tmp_path / "drive",
            *ARGS,
            *more,
        ]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        return Done(main(), *capsys.readouterr())

    return call


def test_the_first_session_fetches_converts_and_pushes_and_the_next_need_less(
    mat: Path, small_set: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    made = tmp_path / "root" / small_set.name
    with serving(x_mat=mat.read_bytes()) as server:
        first = run("--url", server.url("x.mat"))
        assert first.returncode == 0, first.stderr
        assert first.stdout == f"{made}\n"
        assert "fetching http" in first.stderr
        assert "gets a copy" in first.stderr
        n_requests = len(server.requests)
        again = run("--url", server.url("x.mat"))
        assert "on this disk and whole" in again.stderr
        shutil.rmtree(tmp_path / "root")  # another machine
        second = run("--url", server.url("x.mat"))
        assert len(server.requests) == n_requests
    assert second.stdout == f"{made}\n"
    assert re.search(
        r"pulled and verified in .* s. Not needed: the .mat \(\d+ MB\) and .* s of converting",
        second.stderr,
    )
    assert same_shards(made, small_set)


@pytest.mark.parametrize("where", ["drive", "", "root"])
def test_a_mat_on_drive_beside_it_or_on_this_disk_is_found(
    mat: Path, small_set: Path, tmp_path: Path, run: Callable[..., Done], where: str
) -> None:
    (tmp_path / where).mkdir(exist_ok=True)
    shutil.copy(mat, tmp_path / where / MAT_NAME)
    done = run("--url", "http://127.0.0.1:9/not-asked")
    assert done.returncode == 0, done.stderr
    assert f"converting {tmp_path / where / MAT_NAME}" in done.stderr


def test_a_found_mat_that_is_cut_is_passed_over(
    mat: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / MAT_NAME).write_bytes(mat.read_bytes()[:100_000])
    with serving(x_mat=mat.read_bytes()) as server:
        done = run("--url", server.url("x.mat"))
    assert done.returncode == 0, done.stderr
    assert "passed over" in done.stderr


def written(directory: Path) -> dict[str, int]:
    """Which file of a set is which, and when it was written."""
    return {name: (directory / name).stat().st_mtime_ns for name in read_manifest(directory).files}


@pytest.mark.parametrize("form", [".zarr", ""])
@pytest.mark.parametrize(
    "spoil", [lambda path: os.truncate(path, 0), flip, os.unlink], ids=["empty", "flipped", "gone"]
)
def test_of_a_half_synced_drive_only_what_is_wrong_is_made_and_copied_again(
    mat: Path,
    small_set: Path,
    tmp_path: Path,
    run: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    form: str,
) -> None:
    monkeypatch.setattr(mounted, "PAUSES", (0.001,))
    if not form:
        push(open_set(small_set), tmp_path / "drive")
    run(mat)
    there = tmp_path / "drive" / f"{small_set.name}{form}"
    before, wrong = written(there), shard_file(RGB, 1, bool(form))
    spoil(there / wrong)
    shutil.rmtree(tmp_path / "root")
    done = run(mat)
    assert re.search(r"1 of \d+ files .* missing or short|gave other content", done.stderr)
    assert "3 of 4 shards are done already" in done.stderr
    assert same_shards(tmp_path / "root" / small_set.name, small_set)
    assert is_whole(there)
    assert {name for name, when in written(there).items() if when != before[name]} == {wrong}
    assert sorted(p.name for p in (tmp_path / "root").iterdir() if p.name[0] != ".") == [
        small_set.name
    ]
    assert not (tmp_path / "root" / ".shelf").exists()


def test_of_a_half_synced_drive_with_another_mat_at_hand_nothing_is_taken(
    mat: Path, small_set: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    there = push(open_set(small_set), tmp_path / "drive").path
    (there / "rgb-00001.npy").unlink()
    (tmp_path / "drive" / MAT_NAME).write_bytes(mat.read_bytes() + b"\0")
    done = run()
    assert done.returncode == 0, done.stderr
    made = Path(done.stdout.strip())
    assert made.name != small_set.name
    assert [p.name for p in finished_sets(tmp_path / "root")] == [made.name]


def test_a_plain_set_that_somebody_pushed_is_used_and_mended(
    mat: Path, small_set: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    there = push(open_set(small_set), tmp_path / "drive").path
    assert run(mat).returncode == 0
    os.truncate(there / "rgb-00001.npy", 0)
    assert run(mat).returncode == 0
    assert same_shards(there, small_set)
    assert os.listdir(tmp_path / "drive") == [small_set.name]


def test_a_damaged_set_here_is_replaced_from_drive(
    mat: Path, small_set: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    run(mat)
    made = tmp_path / "root" / small_set.name
    os.truncate(made / "rgb-00001.npy", 0)
    done = run()
    assert done.returncode == 0, done.stderr
    assert "is damaged: rgb-00001.npy has 0 bytes" in done.stderr
    assert same_shards(made, small_set)


@pytest.mark.parametrize("codecs", [None, dict.fromkeys(SMALL.fields, "zstd")], ids=["npy", "zarr"])
def test_of_a_damaged_set_here_only_what_is_wrong_is_made_again(
    mat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], codecs: dict[str, str] | None
) -> None:
    root = tmp_path / "root"
    made = Path(convert(mat, root, SMALL, codecs=codecs))
    before, wrong = written(made), shard_file(RGB, 1, codecs is not None)
    flip(made / wrong)
    assert prepare(SetRequest(root=root, settings=SMALL, source=mat)) == made
    assert "3 of 4 shards are done already" in capsys.readouterr().err
    assert is_whole(made)
    assert {name for name, when in written(made).items() if when != before[name]} == {wrong}


def test_a_damaged_manifest_here_is_mended_and_no_right_file_is_written_again(
    mat: Path, tmp_path: Path
) -> None:
    made = Path(convert(mat, tmp_path / "root", SMALL))
    before = written(made)
    flip(made / MANIFEST)
    assert prepare(SetRequest(root=tmp_path / "root", settings=SMALL, source=mat)) == made
    assert written(made) == before


def test_other_settings_keep_the_old_set(
    mat: Path, small_set: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    run(mat)
    done = run(mat, "--size", 16)
    other = Path(done.stdout.strip())
    assert done.stderr.splitlines()[-1].endswith(f"make train DATA={other}")
    for root, form in (("root", ""), ("drive", ".zarr")):
        names = {p.name for p in finished_sets(tmp_path / root)}
        assert names == {small_set.name + form, other.name + form}


def test_a_given_mat_that_is_gone_is_matched_by_name(
    mat: Path, small_set: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    run(mat)
    shutil.rmtree(tmp_path / "root")
    assert run(tmp_path / "gone" / mat.name).stdout.strip().endswith(small_set.name)
    done = run(tmp_path / "gone" / "other.mat")
    assert done.returncode == 2
    assert "no such file" in done.stderr


def test_sets_of_two_sources_are_an_error_that_names_them(
    mat: Path, small_set: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(small_set.parent, tmp_path / "root"))
    other = tmp_path / "other.mat"
    other.write_bytes(mat.read_bytes() + b"\0")
    second = Path(convert(other, root, SMALL))
    forms = ("",)
    with pytest.raises(SeveralSets, match=min(small_set.name, second.name)):
        find_set(root, SMALL, SourceFilter(), forms)
    found = find_set(root, SMALL, SourceFilter(name="other.mat"), forms)
    assert found is not None
    assert found.path == second
    assert find_set(root, ConversionSettings(), SourceFilter(), forms) is None


# ---------------------------------------------------------------- sets of version 1

OLD_NAME = "nyuv2-8-8ec8326e"  # of a .mat that `write_sample` makes
OLD_ARGS = ("--size", 8, "--rows-per-shard", 5)


def old_set(root: Path, form: str) -> Path:
    name = f"{OLD_NAME}{form}"
    return Path(shutil.copytree(REPO / "tests" / "fixtures" / "version-1" / name, root / name))


def shards_written(directory: Path) -> dict[str, int]:
    """When each shard's file was written."""
    shards = read_manifest(directory).shards
    names = [name for shard in shards for name in shard.files]
    return {name: (directory / name).stat().st_mtime_ns for name in names}


@pytest.mark.parametrize("form", ["", ".zarr"])
def test_a_set_of_version_1_on_drive_is_upgraded_where_it_lies_then_pulled(
    tmp_path: Path, run: Callable[..., Done], form: str
) -> None:
    there = old_set(tmp_path / "drive", form)
    copied = max(path.stat().st_mtime_ns for path in there.rglob("*"))
    done = run(*OLD_ARGS, "--url", "http://127.0.0.1:9/not-asked")
    assert done.returncode == 0, done.stderr
    assert f"{there} is brought to version 2" in done.stderr
    assert "pulled and verified" in done.stderr
    assert "damaged" not in done.stderr
    assert "passed over" not in done.stderr
    assert max(shards_written(there).values()) <= copied
    assert is_whole(there)
    made = Path(done.stdout.strip())
    assert made == tmp_path / "root" / OLD_NAME
    assert is_whole(made)


def test_a_set_of_version_1_on_drive_is_upgraded_though_this_disk_has_one(
    tmp_path: Path, run: Callable[..., Done]
) -> None:
    there = old_set(tmp_path / "drive", ".zarr")
    here = old_set(tmp_path / "root", "")
    done = run(*OLD_ARGS)
    assert done.returncode == 0, done.stderr
    assert "on this disk and whole" in done.stderr
    assert done.stderr.count("brought to version 2") == 2
    assert "copying it here" not in done.stderr
    assert "gets a copy" not in done.stderr
    for path in (here, there):
        assert is_whole(path)


def test_a_set_of_version_1_with_other_settings_stays_as_it_is(
    mat: Path, tmp_path: Path, run: Callable[..., Done]
) -> None:
    there = old_set(tmp_path / "drive", "")
    before = {path: path.read_bytes() for path in there.iterdir()}
    assert run(mat).returncode == 0
    assert {path: path.read_bytes() for path in there.iterdir()} == before


def test_of_a_half_synced_set_of_version_1_what_is_right_is_used(
    tmp_path: Path, run: Callable[..., Done]
) -> None:
    write_sample(tmp_path / "rooms.mat", 12, size_wh=(64, 48))
    there = old_set(tmp_path / "drive", "")
    if sampled_identity(tmp_path / "rooms.mat").sha256 != read_version_1(there).source.sha256:
        pytest.skip("this h5py writes another .mat")
    (there / "rgb-00001.npy").unlink()
    done = run(tmp_path / "rooms.mat", *OLD_ARGS)
    assert done.returncode == 0, done.stderr
    assert "are missing or short: what is right of it is used" in done.stderr
    assert "2 of 3 shards are done already" in done.stderr
    assert "damaged" not in done.stderr
    assert is_whole(there)


def test_a_dead_mount_stops_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounted, "PAUSES", (0.001,))
    (tmp_path / "drive").mkdir()
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 0:99 / {tmp_path}/drive rw - fuse.drive drive rw\n")
    monkeypatch.setattr(mounted, "MOUNTS", table)
    real = os.stat

    def dead(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(path).startswith(str(tmp_path)):
            raise OSError(107, "Transport endpoint is not connected")
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", dead)
    with pytest.raises(
        StoreFailed, match=r"ENOTCONN 2 times while looking for .*force_remount=True"
    ):
        prepare(
            SetRequest(
                root=tmp_path / "root",
                settings=SMALL,
                drive=tmp_path / "drive",
                url="http://127.0.0.1:9/",
            )
        )


# ---------------------------------------------------------------- the Makefile


@pytest.fixture
def colab_folder(tmp_path: Path) -> Path:
    return copy_of_the_checkout(tmp_path / "my repo")


def make(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """make as on Colab, with this Python."""
    return make_in(folder, f"PYTHON={sys.executable}", *args, COLAB_RELEASE_TAG="test")


def test_make_convert_then_make_train_need_no_argument_and_spaces_are_fine(
    mat: Path, small_set: Path, tmp_path: Path, colab_folder: Path
) -> None:
    drive = tmp_path / "My Drive" / "nyu v2"
    drive.parent.mkdir()
    args = "ARGS=--size 32 --rows-per-shard 10"
    done = make(colab_folder, "convert", f"MAT={mat}", f"DRIVE={drive}", args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"data/{small_set.name}"
    shutil.rmtree(colab_folder / "data")
    done = make(colab_folder, "convert", f"DRIVE={drive}", args)
    assert same_shards(colab_folder / "data" / small_set.name, small_set)
    pytest.importorskip("torch", reason="needs torch for make train")
    train = "ARGS=--epochs 1 --size 32 --width 8 --batch-size 8"
    mirror = tmp_path / "My Drive" / "scene"
    for _ in range(2):  # the second time there is nothing left to learn
        done = make(colab_folder, "train", train, f"MIRROR={mirror}")
        assert done.returncode == 0, done.stderr + done.stdout
    assert "semantic40" not in "".join(
        line for line in done.stdout.splitlines() if line.startswith("continue:")
    )
    assert (colab_folder / "runs" / "scene-parts" / "classes.csv").is_file()
    assert (mirror / "last.pt").is_file()
    assert (tmp_path / "My Drive" / "scene-parts" / "last.pt").is_file()


@pytest.mark.parametrize("target", ["push", "pull"])
def test_make_push_without_a_folder_copies_nothing(colab_folder: Path, target: str) -> None:
    done = make(colab_folder, target)
    assert done.returncode == 2
    assert f"make {target} DRIVE=/content/drive/MyDrive/nyuv2" in done.stderr


def test_a_read_only_folder_puts_everything_into_the_home_folder(colab_folder: Path) -> None:
    done = make(colab_folder, "-n", "convert", "WRITABLE=", "HOME=/home/me")
    assert '--out "/home/me/nyuv2-shards/data"' in done.stdout
    assert "-e '." not in done.stdout


def test_a_read_only_folder_converts_and_trains_all_the_same(
    mat: Path, small_set: Path, tmp_path: Path, colab_folder: Path
) -> None:
    mount = (
        ["mount", "--bind", colab_folder, colab_folder],
        ["mount", "-o", "remount,bind,ro", colab_folder],
    )
    if subprocess.run(mount[0], capture_output=True).returncode:
        pytest.skip("a folder cannot be mounted read-only here (not root)")
    try:
        subprocess.run(mount[1], check=True)
        made = tmp_path / "home" / "nyuv2-shards"
        made.mkdir(parents=True)
        (made / ".installed-colab").touch()
        home = f"HOME={tmp_path / 'home'}"
        done = make(
            colab_folder, "convert", f"MAT={mat}", home, "ARGS=--size 32 --rows-per-shard 10"
        )
        assert done.returncode == 0, done.stderr
        assert same_shards(made / "data" / small_set.name, small_set)
        pytest.importorskip("torch", reason="needs torch for make train")
        done = make(
            colab_folder, "train", home, "ARGS=--epochs 1 --size 32 --width 8 --batch-size 8"
        )
        assert done.returncode == 0, done.stderr
        assert (made / "runs" / "scene").is_dir()
    finally:
        subprocess.run(["umount", "-l", colab_folder], check=True)


OLDER = ("fsspec==2025.3.0", "psutil==5.9.5", "pillow==11.3.0", "tqdm==4.67.3")


@pytest.mark.stress
def test_make_on_colab_leaves_what_is_installed_as_it_is(tmp_path: Path) -> None:
    """A venv with older packages of its own and the torch of this one, as a stand-in for Colab's
    system.
    """
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "colab"], check=True)
    python = tmp_path / "colab" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "numpy==2.3.2", "h5py==3.14.0", *OLDER], check=True
    )
    site = Path(
        subprocess.check_output(
            [python, "-c", "import h5py; print(h5py.__path__[0])"], text=True
        ).strip()
    ).parent
    # Behind the venv's own packages.
    (site / "system.pth").write_text(sysconfig.get_paths()["purelib"])
    repo = copy_of_the_checkout(tmp_path / "my repo")
    shutil.copy(REPO / "README.md", repo)
    (repo / ".installed-colab").unlink()
    listed = [python, "-m", "pip", "list", "--format", "freeze"]
    before = subprocess.check_output(listed, text=True).split()
    env = {**os.environ, "COLAB_RELEASE_TAG": "test"}
    command = [
        "make",
        "-C",
        repo,
        f"PYTHON={python}",
        "convert",
        f"MAT={tmp_path / 'x.mat'}",
        "ARGS=--size 32",
    ]
    write_sample(tmp_path / "x.mat", 36, size_wh=(64, 48))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(before) <= set(subprocess.check_output(listed, text=True).split())
    assert {"numpy==2.3.2", "h5py==3.14.0", *OLDER} <= set(before)
