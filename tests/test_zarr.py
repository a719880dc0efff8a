"""Zarr: the same rows as .npy, mapped by us without zarr, read by everybody else's readers."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from conftest import REPO, SMALL, needs_torch
from helpers.commands import Run
from helpers.sets import (
    FIELDS,
    committed,
    convert,
    flip,
    manifest_json,
    repack,
    verify,
    write_manifest_json,
)

from convert.sample import write_sample
from convert.sources.nyu_mat import KEYS
from shards.containers import CODECS, crc32c, map_file, write_field, zarr_form
from shards.dataset import open_set, resolve_set
from shards.errors import UserError
from shards.files import FileEntry, LocalFolder
from shards.manifest import COLUMNS
from shards.spec import Field

# zarr-python warns of files in a group that are not Zarr's: the manifest and the provenance lie
# there on purpose
pytestmark = pytest.mark.filterwarnings(
    "ignore:Object at (manifest|provenance).json is not recognized"
)
VARIANTS = [*CODECS, "depth=blosc,label=zstd"]
ZERO_ROWS = [
    3,
    10,
    *range(20, 30),
    35,
]  # within a shard, its first, all of one, the last row of a shard that is not full


@pytest.fixture(scope="module")
def zero_mat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 rows, some of them zero in every field."""
    path = tmp_path_factory.mktemp("mat") / "rooms.mat"
    write_sample(path, 36, size_wh=(64, 48))
    with h5py.File(path, "r+") as file:
        for key in KEYS.values():
            values = file[key][()]
            values[ZERO_ROWS] = 0
            file[key][...] = values
    return path


@pytest.fixture(scope="module")
def npy_set(zero_mat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(zero_mat, tmp_path_factory.mktemp("npy"), SMALL)


@pytest.fixture(scope="module")
def stores(npy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The set as Zarr with each codec."""
    return {v: repack(npy_set, tmp_path_factory.mktemp("zarr"), "zarr", v) for v in VARIANTS}


@pytest.fixture
def copy(stores: dict[str, Path], tmp_path: Path) -> Path:
    """An uncompressed store to be damaged."""
    return Path(shutil.copytree(stores["none"], tmp_path / stores["none"].name))


# ---------------------------------------------------------------- other people's readers


def by_zarr(path: Path, field: str) -> np.ndarray:
    return np.asarray(zarr.open_group(path, mode="r")[field][:])


def by_xarray(path: Path, field: str) -> np.ndarray:
    xarray = pytest.importorskip("xarray", reason="needs xarray")
    return np.asarray(xarray.open_zarr(path, consolidated=False)[field].values)


def by_tensorstore(path: Path, field: str) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore", reason="needs tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / field}/"}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def by_us(path: Path, field: str) -> np.ndarray:
    return np.concatenate(open_set(path).shards(field))


@pytest.mark.parametrize("reader", [by_us, by_zarr, by_xarray, by_tensorstore])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_reader_gives_the_bytes_of_the_npy_shards(
    variant: str, reader: Callable[[Path, str], np.ndarray], stores: dict[str, Path], npy_set: Path
) -> None:
    for field in FIELDS:
        expected = by_us(npy_set, field)
        found = reader(stores[variant], field)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes(), field
        assert not found[ZERO_ROWS].any()
        assert found[[0, 34]].any()


def test_xarray_shows_named_dimensions_units_and_the_tables_of_names(
    stores: dict[str, Path],
) -> None:
    xarray = pytest.importorskip("xarray", reason="needs xarray")
    opened = xarray.open_zarr(stores["none"], consolidated=False)
    assert opened["rgb"].dims == ("row", "channel", "y", "x")
    assert opened["depth"].dims == ("row", "y", "x")
    assert opened["depth"].attrs == {"units": "millimetre", "invalid": 0}
    names, types = opened.attrs["names"]["scene_types"], opened["rows-scene_type"].values
    assert names[types[0]] in (
        "bathroom",
        "bedroom",
        "dining_room",
        "kitchen",
        "living_room",
        "office",
    )


@pytest.mark.parametrize("variant", ["none", "blosc"])
def test_per_row_columns_are_arrays_of_the_store(
    variant: str, stores: dict[str, Path], npy_set: Path
) -> None:
    ours, theirs = open_set(npy_set), zarr.open_group(stores[variant], mode="r")
    arrays = {array for column in COLUMNS.values() for array in column.arrays}
    assert set(theirs.array_keys()) == set(FIELDS) | arrays
    for name, column in COLUMNS.items():
        expected = ours.column(name)
        stored = open_set(stores[variant]).column(name)
        assert stored.dtype == expected.dtype
        np.testing.assert_array_equal(stored, expected)
        if column.dtype != "text":
            assert np.asarray(theirs[f"rows-{name}"][:]).tobytes() == expected.tobytes()
            continue
        offsets = np.asarray(theirs[f"rows-{name}-offsets"][:]).tolist()
        data = np.asarray(theirs[f"rows-{name}-bytes"][:]).tobytes()
        bounds = itertools.pairwise(offsets)
        assert [data[start:stop].decode() for start, stop in bounds] == expected.tolist()


def test_uncompressed_shards_are_what_zarr_python_writes_to_the_byte(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    made = stores["none"]
    for field in FIELDS:
        ours = zarr.open_array(made / field, mode="r")
        theirs = zarr.create_array(
            tmp_path / field, shape=ours.shape, shards=ours.shards, chunks=ours.chunks, dtype=ours.dtype,
            compressors=None, config={"write_empty_chunks": True},
        )  # fmt: skip
        theirs[:] = ours[:]
        for path in (tmp_path / field / "c").rglob("*"):
            if path.is_file():
                assert (
                    path.read_bytes()
                    == (made / field / path.relative_to(tmp_path / field)).read_bytes()
                )


def test_the_crc_is_castagnolis() -> None:
    assert crc32c(b"123456789") == (0xE3069283).to_bytes(4, "little")


# ---------------------------------------------------------------- converting


@pytest.mark.parametrize(
    ("workers", "variant"), [(1, "none"), (3, "none"), (2, "depth=blosc,label=zstd")]
)
def test_from_the_mat_or_from_a_set_it_is_the_same_store(
    workers: int, variant: str, zero_mat: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    codecs = open_set(stores[variant]).codecs
    assert committed(convert(zero_mat, tmp_path, SMALL, workers, codecs)) == committed(
        stores[variant]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_byte_identical(
    variant: str, stores: dict[str, Path], npy_set: Path, tmp_path: Path, command: Run
) -> None:
    done = command("convert", "run", stores[variant], "--out", tmp_path)
    assert done.stdout.splitlines()[-1] == str(tmp_path / npy_set.name), done.stderr
    assert committed(tmp_path / npy_set.name) == committed(npy_set)


def test_the_fingerprint_is_that_of_the_content(stores: dict[str, Path], npy_set: Path) -> None:
    digest = manifest_json(npy_set)["fingerprint"]
    assert {manifest_json(path)["fingerprint"] for path in stores.values()} == {digest}
    assert {path.name for path in stores.values()} == {f"{npy_set.name}.zarr"}


def test_killed_runs_resume_and_end_byte_identical(
    zero_mat: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "convert",
        "run",
        str(zero_mat),
        "--out",
        str(tmp_path),
        "--format",
        "zarr",
    ]
    command += ["--size", "32", "--rows-per-shard", "10"]
    for k in range(5):
        with subprocess.Popen(
            command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            time.sleep(0.5 + 0.2 * k)
            process.kill()
        if not (tmp_path / stores["none"].name / "manifest.json").exists():
            with pytest.raises(UserError):
                resolve_set(tmp_path)
    made = convert(zero_mat, tmp_path, SMALL, codecs=dict.fromkeys(FIELDS, "none"))
    assert committed(made) == committed(stores["none"])


def test_shards_of_another_codec_are_not_taken_over(
    zero_mat: Path, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("convert.pipeline.commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(zero_mat, tmp_path, SMALL, codecs=dict.fromkeys(FIELDS, "zstd"))
    made = convert(zero_mat, tmp_path, SMALL, codecs=dict.fromkeys(FIELDS, "none"))
    assert committed(made) == committed(stores["none"])


MISTAKES = {
    "npy compressed": (["--codec", "zstd"], "--format zarr"),
    "unknown codec": (["--format", "zarr", "--codec", "gzip"], "choose one of none, zstd, blosc"),
    "half a pair": (
        ["--format", "zarr", "--codec", "rgb=zstd,depth"],
        "choose one of none, zstd, blosc",
    ),
    "unknown field": (
        ["--format", "zarr", "--codec", "rbg=zstd"],
        "choose one of none, zstd, blosc",
    ),
    "another size": (["--format", "zarr", "--size", "64"], "has other settings"),
    "another codec there": (["--format", "zarr", "--codec", "zstd"], "is there already"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line(kind: str, stores: dict[str, Path], command: Run) -> None:
    words, message = MISTAKES[kind]
    done = command("convert", "run", stores["none"], "--out", stores["none"].parent, *words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert message in done.stderr


def test_a_damaged_set_is_not_repacked(copy: Path, tmp_path: Path) -> None:
    flip(copy / "rgb/c/1/0/0/0", 77)
    with pytest.raises(UserError, match="rgb/c/1/0/0/0 has other content"):
        repack(copy, tmp_path / "out", "npy", "none")
    assert not list(tmp_path.glob("out/*/manifest.json"))


@pytest.mark.parametrize("codec", ["", "none", "blosc-zstd"])
def test_a_repack_that_was_stopped_goes_on_with_the_rest(
    npy_set: Path,
    stores: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    codec: str,
) -> None:
    source, end = (npy_set, stores[codec]) if codec else (stores["zstd"], npy_set)
    again = partial(repack, source, tmp_path, "zarr" if codec else "npy", codec or "none")

    def interrupt(folder: LocalFolder, field: Field, k: int, *rest: Any) -> dict[str, FileEntry]:
        if k == 2 and field.name == "label":
            raise KeyboardInterrupt
        return write_field(folder, field, k, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("shards.copy.write_field", interrupt)
        with pytest.raises(KeyboardInterrupt):
            again()
    assert not list(tmp_path.glob("*/manifest.json"))
    assert committed(again()) == committed(end)
    assert "2 of 4 shards are done already" in capsys.readouterr().err


def test_a_repack_that_would_not_fit_is_refused_before_it_starts(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 8 << 20)
    )  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"8 MB free, the shards need 9 MB.*another disk"):
        repack(stores["zstd"], tmp_path, "npy", "none")
    assert not list(tmp_path.glob("nyuv2-*"))


# ---------------------------------------------------------------- mapping


def rows_swapped(path: Path) -> None:
    """A right store of the same size, its first two rows stored the other way round."""
    data = path.read_bytes()
    n = len(data) - 10 * 16 - 4
    index = np.frombuffer(data[n:-4], "<u8").reshape(10, 2).copy()
    index[[0, 1]] = index[[1, 0]]
    path.write_bytes(data[:n] + index.tobytes() + crc32c(index.tobytes()))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "index flipped": (lambda p: flip(p, -20), "has a damaged shard index"),
    "crc flipped": (lambda p: flip(p, -1), "has a damaged shard index"),
    "rows swapped": (rows_swapped, "does not hold its rows back to back"),
    "too short": (lambda p: os.truncate(p, 100), "has 100 bytes, the manifest says"),
    "missing": (os.remove, "is missing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_shard_that_cannot_be_mapped_is_refused(kind: str, copy: Path) -> None:
    damage, words = BROKEN[kind]
    damage(copy / "depth/c/2/0/0")
    with pytest.raises(UserError, match=words):
        open_set(copy).shards("depth")


def test_a_store_that_leaves_out_rows_of_zeros_is_refused(copy: Path, npy_set: Path) -> None:
    ours = zarr.open_array(copy / "label", mode="r")
    theirs = zarr.create_array(
        copy / "label", shape=ours.shape, shards=ours.shards, chunks=ours.chunks, dtype=ours.dtype, compressors=None,
        config={"write_empty_chunks": False}, overwrite=True,
    )  # fmt: skip
    theirs[:] = by_us(npy_set, "label")
    with pytest.raises(UserError, match="back to back"):
        map_file(copy / "label/c/0/0/0", zarr_form("<u2", (10, 32, 32), n_slots=10))


@needs_torch
def test_training_on_an_uncompressed_store_does_not_import_zarr(stores: dict[str, Path]) -> None:
    code = f"""if True:
        import sys
        from train.data import create_dataloaders
        train, test = create_dataloaders({str(stores["none"])!r}, batch_size=4, target="semantic40", num_workers=0)
        assert sum(len(batch[-1]) for batch in train) > 0
        sys.exit(bool(sys.modules.keys() & {{"zarr", "numcodecs", "h5py"}}))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


@needs_torch
def test_a_compressed_set_is_unpacked_once_and_says_so(
    stores: dict[str, Path], npy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.data import ShardDataset

    path = Path(shutil.copytree(stores["depth=blosc,label=zstd"], tmp_path / stores["none"].name))
    first, expected = ShardDataset(path), ShardDataset(npy_set)
    assert "unpacking it once" in capsys.readouterr().err
    again = ShardDataset(tmp_path)
    assert "unpacking" not in capsys.readouterr().err
    assert first.path == again.path == tmp_path / npy_set.name
    assert all((a == b).all() for a, b in zip(again[5], expected[5], strict=True))
    assert resolve_set(tmp_path) == tmp_path / npy_set.name


# ---------------------------------------------------------------- verify, inspect, push, pull

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda d: flip(d / "depth/c/2/0/0", 9), "depth/c/2/0/0 has other content"),
    "metadata": (lambda d: flip(d / "rgb/zarr.json", 30), "rgb/zarr.json has other content"),
    "missing": (lambda d: (d / "rgb/c/3/0/0/0").unlink(), "rgb/c/3/0/0/0 is missing"),
    "foreign": (lambda d: (d / "rgb/c/notes.txt").write_text("x"), "rgb/c/notes.txt is not part"),
    "foreign directory": (lambda d: (d / "rgb/d").mkdir(), "rgb/d is not part"),
    "link": (
        lambda d: (d / "rgb").rename(d.parent / "rgb") and (d / "rgb").symlink_to(d.parent / "rgb"),
        "rgb is not part",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_verify_names_the_damaged_file(kind: str, copy: Path) -> None:
    damage, words = DAMAGES[kind]
    damage(copy)
    wrong = [f"{name} {problem}" for name, problem in verify(copy) if problem]
    assert wrong
    assert all(words in line for line in wrong)


@pytest.mark.parametrize(
    "name",
    ["rgb/c/../../../x", "/etc/passwd", "rgb/../zarr.json", "rgb/c/0/0/0/0/", "../zarr.json"],
)
def test_a_manifest_that_names_files_elsewhere_is_refused(name: str, copy: Path) -> None:
    manifest = manifest_json(copy)
    manifest["shards"][0]["files"][name] = {"bytes": 1, "sha256": ""}
    write_manifest_json(copy, manifest)
    with pytest.raises(UserError, match="outside the set"):
        open_set(copy)


@pytest.mark.parametrize("variant", ["none", "blosc-zstd"])
def test_verify_inspect_push_and_pull_work_on_a_store(
    variant: str, stores: dict[str, Path], zero_mat: Path, tmp_path: Path, command: Run
) -> None:
    store = stores[variant]
    assert command("convert", "push", store, tmp_path / "drive").returncode == 0
    done = command("convert", "pull", tmp_path / "drive", tmp_path / "root")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "root" / store.name), done.stderr
    assert committed(tmp_path / "root" / store.name) == committed(store)
    done = command("convert", "verify", store, "--against", zero_mat)
    assert (done.returncode, "every byte" in done.stdout) == (0, True), done.stderr
    done = command("convert", "inspect", store)
    assert (done.returncode, "classes present" in done.stdout) == (0, True), done.stderr
