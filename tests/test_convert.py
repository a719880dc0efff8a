"""Converting: the same bytes whatever the layout and the workers, resumable, and one line for every
bad input.
"""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import SHARED, SMALL, shared
from helpers.commands import Run
from helpers.sets import FIELDS, convert, flip, manifest_json, shard_bytes, write_manifest_json

from convert.resize import Resizer
from convert.sample import write_sample
from convert.sources.nyu_mat import KEYS, sampled_identity
from convert.sources.nyu_tables import split_of, tables
from shards.dataset import open_set
from shards.errors import UserError
from shards.lock import only_one
from shards.spec import KNOWN_FIELDS, SPLITS, ConversionSettings, fingerprint
from shards.writing import set_name


def test_rows_are_what_h5py_gives_through_the_resize_rules(mat: Path, small_set: Path) -> None:
    found = open_set(small_set)
    with h5py.File(mat) as file:
        for field in FIELDS:
            stored = np.concatenate(found.shards(field))
            for i in range(36):
                expected = Resizer(field=KNOWN_FIELDS[field], size=32)(file[KEYS[field]][i])
                np.testing.assert_array_equal(stored[i], expected, f"{field} row {i}")
        scenes = [file[r][:].astype("<u2").tobytes().decode("utf-16-le") for r in file["scenes"][0]]
        np.testing.assert_array_equal(found.column("accel"), file["accelData"][()].T)
    assert [found.manifest.scenes[k] for k in found.column("scene")] == scenes


@pytest.mark.parametrize("chunks", ["resaved", "none"])
def test_any_layout_gives_the_same_bytes(small_set: Path, tmp_path: Path, chunks: str) -> None:
    write_sample(tmp_path / "a.mat", 36, size_wh=(64, 48), chunks=chunks)
    assert shard_bytes(convert(tmp_path / "a.mat", tmp_path / "out", SMALL)) == shard_bytes(
        small_set
    )


def test_chunks_across_all_rows_go_through_a_scratch_file_and_give_the_same_bytes(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.sources.chunks.MAX_GROUP_BYTES", 1000)
    write_sample(tmp_path / "a.mat", 36, size_wh=(64, 48), chunks="resaved")
    made = convert(tmp_path / "a.mat", tmp_path / "out", SMALL)
    assert shard_bytes(made) == shard_bytes(small_set)
    assert not list(made.glob(".*"))


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    mat: Path, small_set: Path, tmp_path: Path, workers: int
) -> None:
    made = convert(mat, tmp_path, SMALL, workers)
    assert shard_bytes(made) == shard_bytes(small_set)
    assert (made / "manifest.json").read_bytes() == (small_set / "manifest.json").read_bytes()


def test_other_settings_are_another_directory(mat: Path, small_set: Path, tmp_path: Path) -> None:
    names = {small_set.name}
    for other in (
        ConversionSettings(size=16),
        ConversionSettings(size=32),
        ConversionSettings(size=32, rows_per_shard=10, fields=("rgb",)),
    ):
        names.add(convert(mat, tmp_path, other).name)
    assert len(names) == 4


def test_a_second_run_does_nothing(
    mat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = convert(mat, tmp_path, SMALL)
    before = {p: p.stat().st_mtime_ns for p in made.iterdir()}
    assert convert(mat, tmp_path, SMALL) == made
    assert {p: p.stat().st_mtime_ns for p in made.iterdir()} == before
    assert "nothing to do" in capsys.readouterr().err


def test_the_manifest_holds_its_own_hash_last_and_no_clock(small_set: Path) -> None:
    text = (small_set / "manifest.json").read_text()
    assert list(json.loads(text))[-1] == "sha256"
    assert "seconds" not in text


def test_statistics_are_those_of_the_valid_train_pixels(small_set: Path) -> None:
    found = open_set(small_set)
    train = found.column("split") == 0
    depth = np.concatenate(found.shards("raw_depth"))[train].astype(np.float64)
    statistics = found.field("raw_depth").statistics
    assert statistics
    assert statistics.count == (np.count_nonzero(depth),)
    expected = [depth[depth > 0].mean(), depth[depth > 0].std()]
    np.testing.assert_allclose([statistics.mean[0], statistics.std[0]], expected)


def test_finished_shards_survive_a_failure_and_are_not_redone(
    mat: Path,
    small_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resize = Resizer.__call__
    n_calls = itertools.count(1)

    def failing(resizer: Resizer, row: np.ndarray) -> np.ndarray:
        if next(n_calls) > 5 * 30:
            raise OSError(28, "No space left on device")
        return resize(resizer, row)

    with monkeypatch.context() as patch:
        patch.setattr(Resizer, "__call__", failing)
        with pytest.raises(OSError, match="No space"):
            convert(mat, tmp_path, SMALL, 1)
    assert shard_bytes(convert(mat, tmp_path, SMALL)) == shard_bytes(small_set)
    assert "shards are done already" in capsys.readouterr().err


def test_two_runs_into_one_root_do_not_mix(mat: Path, tmp_path: Path) -> None:
    name = set_name("nyuv2", SMALL.size, fingerprint(SMALL, sampled_identity(mat)), None)
    with only_one(tmp_path, name), pytest.raises(UserError, match=f"pid {os.getpid()}"):
        convert(mat, tmp_path, SMALL)
    assert convert(mat, tmp_path, SMALL).name == name


# ---------------------------------------------------------------- bad input


def no_traceback(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "make " in done.stderr or "python -m" in done.stderr or "save -v7.3" in done.stderr


def v1_file(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for key in ("images", "depths", "labels", "names"):
            file[key] = np.zeros((2, 64, 48), np.uint8)


def truncated(path: Path, mat: Path) -> None:
    path.write_bytes(mat.read_bytes()[: mat.stat().st_size // 2])


BAD = {
    "v1": (lambda p, m: v1_file(p), "NYU Depth v1"),
    "truncated": (truncated, "download was cut"),
    "v5": (lambda p, m: p.write_bytes(b"MATLAB 5.0 MAT-file, Platform".ljust(600)), "MATLAB v5"),
    "web page": (lambda p, m: p.write_bytes(b"\n<!DOCTYPE html><html>404</html>"), "web page"),
    "empty": (lambda p, m: p.write_bytes(b""), "is empty"),
    "noise": (lambda p, m: p.write_bytes(b"\0" + os.urandom(5000)), "not a MATLAB v7.3"),
    "directory": (lambda p, m: p.mkdir(), "is a directory"),
    "absent": (lambda p, m: None, "no such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    kind: str, mat: Path, tmp_path: Path, command: Run
) -> None:
    make, words = BAD[kind]
    path, out = tmp_path / "x.mat", tmp_path / "out"
    make(path, mat)
    done = command("convert", "run", path, "--out", out)
    no_traceback(done)
    assert words in done.stderr
    assert not out.exists()
    assert path.exists() == (kind != "absent")


def mutate(path: Path, mat: Path, change: Callable[[h5py.File], None]) -> Path:
    shutil.copy(mat, path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replaced(key: str, value: np.ndarray) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[key]
        file[key] = value

    return change


def corrupt_chunk(file: h5py.File) -> None:
    file["depths"].id.write_direct_chunk((7, 0, 0), b"not zlib at all")


def set_depth(value: float) -> Callable[[h5py.File], None]:
    return lambda file: file["depths"].__setitem__((5, 3, 3), value)


HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "no images": (lambda f: f.__delitem__("images"), "has no images"),
    "no scenes": (lambda f: f.__delitem__("scenes"), "has no scenes"),
    "labels as bytes": (replaced("labels", np.zeros((36, 64, 48), np.uint8)), "labels is uint8"),
    "labels as a group": (lambda f: (f.__delitem__("labels"), f.create_group("labels")), "a group"),
    "flat images": (replaced("images", np.zeros((36, 64, 48), np.uint8)), "images has shape"),
    "fewer rows": (replaced("labels", np.zeros((35, 64, 48), np.uint16)), "disagree"),
    "short cell": (lambda f: replaced("scenes", f["scenes"][:, :9])(f), "9 entries for 36 rows"),
    "numbers as text": (replaced("scenes", np.zeros((1, 36))), "cannot be read"),
    "references to nowhere": (
        replaced("scenes", np.full((1, 36), h5py.Reference(), h5py.ref_dtype)),
        "cannot be read",
    ),
    "corrupt chunk": (corrupt_chunk, "depths row 7"),
    "NaN": (set_depth(np.nan), "depths row 5: depth outside"),
    "negative": (set_depth(-1), "depth outside"),
    "too far": (set_depth(70), "depth outside"),
    "label 895": (lambda f: f["labels"].__setitem__((0, 0, 0), 895), "label 895"),
    "absurd chunks": (
        lambda f: (
            f.__delitem__("depths"),
            f.create_dataset("depths", (36, 2048, 2048), "f4", chunks=(36, 2048, 2048)),
        ),
        "MiB each",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_content_is_one_line_and_publishes_nothing(
    kind: str, mat: Path, tmp_path: Path
) -> None:
    change, words = HOSTILE[kind]
    path = mutate(tmp_path / "x.mat", mat, change)
    with pytest.raises(UserError, match=words) as error:
        convert(path, tmp_path / "out", SMALL)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*/manifest.json"))


@pytest.mark.skipif(not SHARED.exists(), reason="reference material is not beside this checkout")
def test_real_matlab_files_that_are_not_the_dataset_are_one_line(tmp_path: Path) -> None:
    files = sorted(shared("matlab73").glob("*.mat"))
    assert len(files) > 30
    for path in files:
        with pytest.raises(UserError) as error:
            convert(path, tmp_path / "out", SMALL)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- tables, verify, inspect


def test_the_official_table_gives_795_and_654_rows() -> None:
    import csv

    with open(shared("nyu/meta/scenes_1449.csv")) as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert split_of(row["scene"]) == (SPLITS.index(row["split"]), True)
    assert sum(split_of(r["scene"])[0] == 0 for r in rows) == 795
    assert len(rows) == 1449


def test_the_tables_are_complete() -> None:
    t = tables()
    assert [len(t.classes), len(t.classes40), len(t.classes13)] == [894, 40, 13]
    assert [len(t.to40), len(t.to13), len(t.scene_types)] == [894, 894, 27]
    assert (len(t.train_scenes), len(t.test_scenes)) == (249, 215)
    assert not set(t.train_scenes) & set(t.test_scenes)


@pytest.fixture
def copy(small_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / small_set.name))


def swap(directory: Path) -> None:
    a, b = directory / "rgb-00000.npy", directory / "rgb-00001.npy"
    a.rename(directory / "t")
    b.rename(a)
    (directory / "t").rename(b)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda d: flip(d / "depth-00002.npy"), "depth-00002.npy has other content"),
    "truncation": (
        lambda d: os.truncate(d / "label-00000.npy", 300),
        "label-00000.npy has 300 bytes",
    ),
    "missing": (lambda d: (d / "rgb-00003.npy").unlink(), "rgb-00003.npy is missing"),
    "swapped": (swap, "rgb-00000.npy has other content"),
    "foreign": (lambda d: (d / "notes.txt").write_text("x"), "notes.txt is not part"),
    "manifest": (lambda d: flip(d / "manifest.json"), "manifest.json is damaged"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_verify_names_the_damaged_file(kind: str, copy: Path, command: Run) -> None:
    damage, words = DAMAGES[kind]
    damage(copy)
    done = command("convert", "verify", copy)
    no_traceback(done)
    assert words in done.stderr


def test_verify_against_the_source_compares_rows(mat: Path, copy: Path, command: Run) -> None:
    done = command("convert", "verify", copy, "--against", mat)
    assert (done.returncode, "36 files" in done.stdout or "every byte" in done.stdout) == (
        0,
        True,
    ), done.stderr


def test_a_manifest_that_names_files_elsewhere_is_refused(copy: Path) -> None:
    manifest = manifest_json(copy)
    manifest["column_files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    write_manifest_json(copy, manifest)
    with pytest.raises(UserError, match="outside the set"):
        open_set(copy)


def test_pickled_content_is_never_loaded(copy: Path) -> None:
    np.save(copy / "rows-split.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises((UserError, ValueError)):
        open_set(copy).column("split")


def test_inspect_tells_rows_splits_and_classes(
    small_set: Path, tmp_path: Path, command: Run
) -> None:
    done = command("convert", "inspect", small_set, "--picture", tmp_path / "a.png", "--rows", 3)
    assert done.returncode == 0, done.stderr
    for words in ("36:", "(0 in both splits)", "millimetre", "void", "bedroom", "made 20"):
        assert words in done.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
