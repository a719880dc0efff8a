"""Every layout of the same content gives the same rows, each chunk decoded once, as h5py does."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import REPO, SMALL
from helpers.sets import convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert.sources.chunk_codec as codec_module
import convert.sources.chunk_index as index_module
import convert.sources.chunks as chunks_module
from convert.sources.chunk_index import ChunkAccess, claimed_index
from convert.sources.chunk_layout import ChunkGrid, ChunkIndex, block_at
from convert.sources.chunks import Reader
from convert.sources.hdf5 import StoredDataset
from convert.sources.nyu_mat import HDF5_SIGNATURE, KEYS, check_opens
from shards.errors import DamagedSource, UserError, WrongSource

GZIP = {"compression": "gzip", "compression_opts": 3}
FILTERS = [
    {},
    GZIP,
    {**GZIP, "shuffle": True},
    {"shuffle": True},
    {"compression": "lzf"},
    {**GZIP, "fletcher32": True},
]


def open_reader(dset: h5py.Dataset, handle: int) -> Reader:
    reader = Reader(StoredDataset(dset), handle)
    reader.read_index()
    return reader


def all_rows(reader: Reader) -> np.ndarray:
    n_groups = -(-reader.n_rows // reader.group_rows)
    return np.concatenate([reader.read_group(g) for g in range(n_groups)])


@st.composite
def layouts(
    draw: st.DrawFn,
) -> tuple[tuple[int, ...], tuple[int, ...] | None, str, dict[str, object], int]:
    shape = tuple(draw(st.integers(1, 9)) for _ in range(draw(st.integers(2, 4))))
    chunk = tuple(draw(st.integers(1, s)) for s in shape)
    chunked = draw(st.booleans())
    dtype = draw(st.sampled_from(["<u1", "<u2", ">u2", "<f4", ">f4"]))
    return (
        shape,
        chunk if chunked else None,
        dtype,
        draw(st.sampled_from(FILTERS)) if chunked else {},
        draw(st.integers(0, 99)),
    )


@given(layouts(), st.booleans(), st.booleans(), st.integers(1, 9))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_are_what_h5py_reads_and_no_chunk_is_decoded_twice(
    tmp_path: Path, layout: tuple, written: bool, scratch: bool, band: int
) -> None:
    shape, chunk, dtype, filters, seed = layout
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        dset = file.create_dataset("x", shape, dtype, chunks=chunk, fillvalue=7, **filters)
        values = np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)
        if written:
            dset[...] = values
        else:
            dset[: (shape[0] + 1) // 2] = values[: (shape[0] + 1) // 2]
    with h5py.File(path) as file, open(path, "rb") as raw:
        reader = open_reader(file["x"], raw.fileno())
        if chunk and scratch:
            reader.group_rows = band
            reader.fill_scratch(tmp_path)
        rows = all_rows(reader)
        assert rows.dtype.isnative
        np.testing.assert_array_equal(rows, file["x"][()])
        if chunk:
            assert reader.n_decoded == np.prod(
                [-(-s // c) for s, c in zip(shape, chunk, strict=True)]
            )
        reader.close()
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]


@pytest.mark.parametrize("chunk", [(1, 16, 48), (1, 8, 8), None], ids=str)
@pytest.mark.parametrize("leaves_out", [True, False], ids=["without the user block", "with it"])
def test_offsets_are_right_whether_hdf5_counts_the_user_block_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: tuple[int, ...] | None, leaves_out: bool
) -> None:
    """Most of it is 0: many a chunk is also found 512 bytes further on."""
    path = tmp_path / "x.h5"
    values = np.zeros((4, 64, 48), "<u2")
    values[2, 8:16, 8:16] = np.arange(64).reshape(8, 8)
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("x", data=values, chunks=chunk, **(GZIP if chunk else {}))

    def as_another_hdf5(access: ChunkAccess) -> ChunkIndex | None:
        index = claimed_index(access)
        assert index is not None
        counts = access.dataset.chunks is None or h5py.version.hdf5_version_tuple >= (1, 14, 4)
        if leaves_out == counts:
            return index.counted_from(-512 if leaves_out else 512)
        return index

    monkeypatch.setattr(index_module, "claimed_index", as_another_hdf5)
    with h5py.File(path) as file, open(path, "rb") as raw:
        reader = open_reader(file["x"], raw.fileno())
        np.testing.assert_array_equal(all_rows(reader), values)
        assert reader.index is not None


def test_a_chunk_written_without_its_filter_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    values = np.arange(32, dtype="<u2").reshape(2, 16)
    with h5py.File(path, "w") as file:
        dset = file.create_dataset("x", data=values, chunks=(1, 16), **GZIP)
        dset.id.write_direct_chunk((1, 0), values[1].tobytes(), filter_mask=1)
    with h5py.File(path) as file, open(path, "rb") as raw:
        np.testing.assert_array_equal(all_rows(open_reader(file["x"], raw.fileno())), values)


def test_both_inflaters_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    data = np.random.default_rng(0).integers(0, 9, 50_000).astype(np.uint8).tobytes()
    packed = zlib.compress(data, 3)
    fast = bytes(codec_module.inflate(packed, len(data)))
    monkeypatch.setattr(codec_module, "libdeflate", None)
    assert fast == bytes(codec_module.inflate(packed, len(data))) == data
    with pytest.raises(ValueError, match="damaged"):
        codec_module.inflate(packed[:-9] + b"123456789", len(data))
    with pytest.raises(ValueError, match="expected"):
        codec_module.inflate(packed, len(data) + 1)


@given(layouts())
def test_tiles_cover_each_row_once_and_chunks_begin_where_h5py_says(layout: tuple) -> None:
    shape, chunk, *_ = layout
    grid = ChunkGrid(shape, chunk or (1, *shape[1:]))
    assert len(grid.tiles) == grid.n_tiles
    n_seen = np.zeros(grid.padded_row_shape, int)
    for tile in grid.tiles:
        n_seen[tile] += 1
    assert np.all(n_seen == 1)

    inside = np.zeros(shape, int)
    for k in range(grid.n_chunks):
        first = grid.first_element(k)
        part = grid.without_padding(k)
        inside[block_at(first, tuple(side.stop for side in part))] += 1
    assert np.all(inside == 1)


def test_a_reader_that_was_sent_to_another_process_reads_without_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    values = np.arange(5 * 7 * 9, dtype="<u2").reshape(5, 7, 9)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, chunks=(2, 3, 4), **GZIP)
    with open(path, "rb") as raw:
        with h5py.File(path) as file:
            reader = open_reader(file["x"], raw.fileno())
        assert reader.can_travel
        sent = pickle.loads(pickle.dumps(reader))
        assert sent.access is None
        np.testing.assert_array_equal(all_rows(sent), values)


WRONG_FILES = {
    "empty": b"",
    "web page": b"\n<!DOCTYPE html>",
    "MATLAB v5": b"MATLAB 5.0 MAT-file" + bytes(600),
    "noise": bytes(range(256)) * 9,
    "cut": HDF5_SIGNATURE + bytes(600),
    "absent": None,
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_file_that_is_no_source_says_what_is_wrong_and_what_would_be_right(
    kind: str, tmp_path: Path
) -> None:
    """As fields, without a command: whoever calls from Python has none to run."""
    path = tmp_path / "x.mat"
    if (content := WRONG_FILES[kind]) is not None:
        path.write_bytes(content)
    with pytest.raises(WrongSource) as caught:
        check_opens(path)
    error = caught.value
    assert error.source == path
    assert str(error) == f"{error.problem}. {error.right}"
    assert not any(command in str(error) for command in ("make ", "python -m", "Run: "))
    assert isinstance(error, DamagedSource) == (kind == "cut")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# ---------------------------------------------- whole sets: the same bytes from every layout


def shards(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.glob("*.npy"))}


def repacked(
    path: Path, mat: Path, chunk: Callable[[tuple[int, ...]], tuple[int, ...]], **filters: Any
) -> Path:
    """The same content, every field in chunks of `chunk(shape)`."""
    shutil.copy(mat, path)
    with h5py.File(path, "r+") as file:
        for key in KEYS.values():
            values = file[key][()]
            del file[key]
            file.create_dataset(key, data=values, chunks=chunk(values.shape), **filters)
    return path


LAYOUTS: dict[str, tuple[Callable[[tuple[int, ...]], tuple[int, ...]], dict[str, Any]]] = {
    "several rows": (lambda s: (5, *s[1:-2], 10, s[-1]), GZIP),
    "a plane": (lambda s: (*(1,) * (len(s) - 2), *s[-2:]), GZIP),
    "small tiles": (lambda s: (*(1,) * (len(s) - 2), 7, 9), GZIP),
    "all rows": (lambda s: (*s[:-2], 3, 20), {**GZIP, "shuffle": True}),
    "uncompressed": (lambda s: (1, *s[1:-2], 10, s[-1]), {}),
    "unknown filter": (lambda s: (4, *s[1:-2], 33, s[-1]), {"compression": "lzf"}),
}


@pytest.mark.races
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("by", ["threads", "helpers", "a scratch file"])
def test_every_layout_gives_the_same_bytes(
    kind: str, by: str, mat: Path, small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, filters = LAYOUTS[kind]
    path = repacked(tmp_path / "x.mat", mat, chunk, **filters)
    if by == "a scratch file":
        monkeypatch.setattr(chunks_module, "MAX_GROUP_BYTES", 50_000)
    if by == "helpers":
        monkeypatch.setattr("convert.executors.HELPERS_FROM", 0)
    made = convert(path, tmp_path / "out", SMALL, workers=3)
    assert shards(made) == shards(small_set)
    assert not list(made.glob(".*"))


def test_zlib_instead_of_libdeflate_and_sixteen_workers_give_the_same_bytes(
    mat: Path, small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec_module, "libdeflate", None)
    assert shards(convert(mat, tmp_path, SMALL, workers=16)) == shards(small_set)


def test_converting_needs_no_torch(mat: Path, small_set: Path, tmp_path: Path) -> None:
    code = f"""import sys; sys.modules["torch"] = None
from pathlib import Path
from shards.spec import ConversionSettings
from convert.pipeline import convert
settings = ConversionSettings(size=32, rows_per_shard=10)
convert(Path({str(mat)!r}), Path({str(tmp_path)!r}), settings)"""
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, capture_output=True)
    assert shards(tmp_path / small_set.name) == shards(small_set)


def test_the_disk_is_asked_for_the_scratch_files_too(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk, filters = LAYOUTS["all rows"]
    path = repacked(tmp_path / "x.mat", mat, chunk, **filters)
    n_bytes = 36 * 64 * 48 * 14  # of the five fields, unpacked
    usage = shutil.disk_usage(tmp_path)._replace(free=n_bytes + (8 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    convert(path, tmp_path / "a", SMALL)
    monkeypatch.setattr(chunks_module, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(UserError, match="MB free"):
        convert(path, tmp_path / "b", SMALL)
