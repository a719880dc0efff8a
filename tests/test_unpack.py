"""A compressed set on a read-only place trains from an unpacked copy in the cache folder, and from
no other set's.
"""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.disks import make_read_only, small_disk
from helpers.sets import manifest_json, repack, verify

from shards.errors import UserError
from shards.files import LocalFolder
from shards.manifest import read_manifest, write_manifest
from train.data import ShardDataset
from train.unpack import cache_folder


@pytest.fixture(scope="module")
def packed(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(small_set, tmp_path_factory.mktemp("packed"), "zarr", "blosc-zstd")


@pytest.fixture
def read_only(packed: Path, tmp_path: Path) -> Iterator[Path]:
    """The compressed set on a mount that cannot be written to, by root neither."""
    with small_disk(tmp_path / "input", 64 << 20) as place:
        shutil.copytree(packed, place / packed.name)
        make_read_only(place)
        yield place / packed.name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nyuv2-shards"


def right(dataset: ShardDataset, small_set: Path) -> bool:
    pairs = zip(dataset.batch(range(8)), ShardDataset(small_set).batch(range(8)), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_read_only_set_is_unpacked_into_the_cache_once_and_named(
    read_only: Path, cache: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ShardDataset(read_only)
    assert capsys.readouterr().err.startswith(
        f"{read_only} is compressed: unpacking it once, into {cache}/nyuv2-32-"
    )
    again = ShardDataset(read_only.parent)
    assert "unpacking" not in capsys.readouterr().err
    assert first.path == again.path == cache / small_set.name
    assert right(again, small_set)


def test_without_xdg_the_cache_is_in_the_home(
    read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (None, "", "relative/is/invalid"):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert ShardDataset(read_only).path.parent == tmp_path / "home" / ".cache" / "nyuv2-shards"


def test_where_the_home_is_read_only_too_the_variable_is_named(
    read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(read_only.parent / "cache"))
    with pytest.raises(
        UserError, match=r"neither .*/input nor .*nyuv2-shards can be written to.*XDG_CACHE_HOME="
    ) as error:
        ShardDataset(read_only)
    assert "\n" not in str(error.value)


def test_a_user_without_a_home_has_no_cache_folder() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become a user without a home")
    code = (
        "import os; from train.unpack import cache_folder; os.setuid(54321); print(cache_folder())"
    )
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize("damage", ["half", "truncated", "missing", "manifest"])
def test_a_damaged_copy_is_never_taken(
    damage: str, read_only: Path, cache: Path, small_set: Path
) -> None:
    copy = ShardDataset(read_only).path
    if damage == "half":
        (copy / "manifest.json").unlink()
        (copy / "rgb-00002.npy").write_bytes(b"")
    elif damage == "truncated":
        (copy / "rgb-00000.npy").write_bytes((copy / "rgb-00000.npy").read_bytes()[:-1])
    elif damage == "missing":
        (copy / "depth-00000.npy").unlink()
    else:
        (copy / "manifest.json").write_text("{}")
    dataset = ShardDataset(read_only)
    assert right(dataset, small_set)
    assert [problem for _, problem in verify(dataset.path) if problem] == []


def other_set(small_set: Path, at: Path) -> None:
    """A finished set of the same name with another fingerprint, and other rows."""
    shutil.copytree(small_set, at)
    manifest = read_manifest(at)
    other = replace(manifest, source=replace(manifest.source, sha256="0" * 64))
    data = bytearray((at / "rgb-00000.npy").read_bytes())
    data[128:] = bytes(len(data) - 128)
    (at / "rgb-00000.npy").write_bytes(bytes(data))
    write_manifest(LocalFolder(at), other)


def test_another_set_of_the_same_name_in_the_cache_is_not_confused(
    read_only: Path, cache: Path, small_set: Path
) -> None:
    other_set(small_set, cache / small_set.name)
    before = manifest_json(cache / small_set.name)
    for _ in range(2):
        assert right(ShardDataset(read_only), small_set)
    assert manifest_json(cache / small_set.name) == before


def test_another_set_of_the_same_name_beside_it_is_not_confused(
    packed: Path, tmp_path: Path, cache: Path, small_set: Path
) -> None:
    path = Path(shutil.copytree(packed, tmp_path / "root" / packed.name))
    other_set(small_set, tmp_path / "root" / small_set.name)
    assert right(ShardDataset(path), small_set)
    assert ShardDataset(path).path == cache / small_set.name


def test_two_processes_at_once_take_one_copy(read_only: Path, cache: Path, small_set: Path) -> None:
    code = f"from train.data import ShardDataset; d = ShardDataset({str(read_only)!r}); print(d.path, int(d[3][0].sum()))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {run.communicate(timeout=180)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert said == {f"{cache / small_set.name} {int(ShardDataset(small_set)[3][0].sum())}\n"}


def test_a_spawned_worker_opens_the_copy_and_unpacks_nothing(
    read_only: Path, cache: Path, small_set: Path
) -> None:
    data = pickle.dumps(ShardDataset(read_only))
    (cache / small_set.name).rename(cache / "elsewhere")
    with pytest.raises(UserError, match="no manifest"):
        pickle.loads(data)
    (cache / "elsewhere").rename(cache / small_set.name)
    assert np.array_equal(pickle.loads(data)[0][0], ShardDataset(small_set)[0][0])


def test_a_dataset_whose_set_was_replaced_does_not_open_the_other(
    small_set: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    data = pickle.dumps(ShardDataset(path))
    shutil.rmtree(path)
    other_set(small_set, path)
    with pytest.raises(UserError, match="was replaced by another set"):
        pickle.loads(data)


def test_the_cache_folder_is_named_after_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/nyuv2-shards")
