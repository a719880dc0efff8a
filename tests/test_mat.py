"""Every layout of the same content gives the same rows, each chunk decoded once, with h5py as the reference."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert.chunks as chunks_module
from convert.chunks import Reader

GZIP = {"compression": "gzip", "compression_opts": 3}
FILTERS = [{}, GZIP, {**GZIP, "shuffle": True}, {"shuffle": True}, {"compression": "lzf"}, {**GZIP, "fletcher32": True}]


def all_rows(reader: Reader) -> np.ndarray:
    n_groups = -(-reader.n_rows // reader.group_rows)
    return np.concatenate([reader.read_group(g) for g in range(n_groups)])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...] | None, str, dict[str, object], int]:
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
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
        reader = Reader(file["x"], raw.fileno())
        if chunk and scratch:
            reader.group_rows = band
            reader.fill_scratch(tmp_path)
        rows = all_rows(reader)
        assert rows.dtype.isnative
        np.testing.assert_array_equal(rows, file["x"][()])
        if chunk:
            assert reader.n_decoded == np.prod([-(-s // c) for s, c in zip(shape, chunk, strict=True)])
        reader.close()
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]


def test_offsets_without_the_user_block_are_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.h5"
    values = np.arange(4 * 64 * 48, dtype="<u2").reshape(4, 64, 48)
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("x", data=values, chunks=(1, 16, 48), **GZIP)
    original = chunks_module.read_index

    def as_old_hdf5(*args: Any) -> chunks_module.ChunkIndex:
        index = original(*args)
        np.subtract(index.offset, 512, out=index.offset)
        return index

    monkeypatch.setattr(chunks_module, "read_index", as_old_hdf5)
    with h5py.File(path) as file, open(path, "rb") as raw:
        reader = Reader(file["x"], raw.fileno())
        np.testing.assert_array_equal(all_rows(reader), values)
        assert reader.index is not None


def test_a_chunk_written_without_its_filter_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    values = np.arange(32, dtype="<u2").reshape(2, 16)
    with h5py.File(path, "w") as file:
        dset = file.create_dataset("x", data=values, chunks=(1, 16), **GZIP)
        dset.id.write_direct_chunk((1, 0), values[1].tobytes(), filter_mask=1)
    with h5py.File(path) as file, open(path, "rb") as raw:
        np.testing.assert_array_equal(all_rows(Reader(file["x"], raw.fileno())), values)


def test_both_inflaters_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    data = np.random.default_rng(0).integers(0, 9, 50_000).astype(np.uint8).tobytes()
    packed = zlib.compress(data, 3)
    fast = bytes(chunks_module.inflate(packed, len(data)))
    monkeypatch.setattr(chunks_module, "_libdeflate", None)
    assert fast == bytes(chunks_module.inflate(packed, len(data))) == data
    with pytest.raises(ValueError, match="damaged"):
        chunks_module.inflate(packed[:-9] + b"123456789", len(data))
    with pytest.raises(ValueError, match="expected"):
        chunks_module.inflate(packed, len(data) + 1)
