"""The made-up .mat has the real one's layout."""

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from convert.furniture import ROOMS
from convert.rooms import FIELDS, scene_type
from convert.sample import matlab_chunk, write_sample
from convert.sources.nyu_tables import tables as official_tables
from shards.errors import UserError

ROWS = 12
KEYS = {
    "#refs#", "#subsystem#", "accelData", "depths", "images", "instances", "labels", "names",
    "namesToIds", "rawDepthFilenames", "rawDepths", "rawRgbFilenames", "sceneTypes", "scenes",
}  # fmt: skip
LAYOUT = {
    "images": ((ROWS, 3, 640, 480), "|u1", (1, 3, 42, 480)),
    "depths": ((ROWS, 640, 480), "<f4", (1, 33, 480)),
    "rawDepths": ((ROWS, 640, 480), "<f4", (1, 33, 480)),
    "labels": ((ROWS, 640, 480), "<u2", (1, 64, 480)),
    "instances": ((ROWS, 640, 480), "|u1", (1, 128, 480)),
    "accelData": ((4, ROWS), "<f4", (4, ROWS)),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "made" / "of" / "rooms.mat"
    write_sample(path, ROWS)
    return path


def strings(file: Any, key: str) -> list[str]:
    return [file[r][:].astype("<u2").tobytes().decode("utf-16-le") for r in file[key][0]]


def small(path: Path, **how: Any) -> Path:
    write_sample(path, how.pop("rows", 4), size_wh=(64, 48), **how)
    return path


def test_header_is_matlabs(sample: Path) -> None:
    head = sample.read_bytes()[:520]
    assert head.startswith(b"MATLAB 7.3 MAT-file")
    assert head[124:128] == b"\x00\x02IM"
    assert head[512:520] == b"\x89HDF\r\n\x1a\n"


def test_keys_shapes_types_and_chunks_are_the_originals(sample: Path) -> None:
    with h5py.File(sample) as file:
        assert set(file) == KEYS
        assert file.userblock_size == 512
        for key, (shape, dtype, chunk) in LAYOUT.items():
            dataset = file[key]
            assert (dataset.shape, dataset.dtype.str, dataset.chunks) == (shape, dtype, chunk), key
            packed = (dataset.compression, dataset.compression_opts, dataset.shuffle)
            assert packed == ("gzip", 3, False), key
        for key in ("names", "scenes", "sceneTypes", "rawRgbFilenames", "rawDepthFilenames"):
            assert file[key].shape == (1, 894 if key == "names" else ROWS)
            assert file[key].attrs["MATLAB_class"] == b"cell"
            assert file[file[key][0, 0]].dtype == np.uint16


def test_references_decode_to_official_names(sample: Path) -> None:
    with h5py.File(sample) as file:
        names = strings(file, "names")
        scenes = strings(file, "scenes")
        types = strings(file, "sceneTypes")
        files = strings(file, "rawRgbFilenames")
    assert (names[0], names[20], names[156]) == ("book", "wall", "bed")
    assert types == [scene_type(s) for s in scenes]
    assert all(
        f.startswith(f"{s}/r-") and f.endswith(".ppm") for f, s in zip(files, scenes, strict=True)
    )


def test_half_the_rows_are_train_and_every_type_is_in_both(sample: Path) -> None:
    tables = official_tables()
    with h5py.File(sample) as file:
        scenes = strings(file, "scenes")
    for scenes_of_split in (tables.train_scenes, tables.test_scenes):
        mine = [s for s in scenes if s in scenes_of_split]
        assert len(mine) == ROWS // 2
        assert {scene_type(s) for s in mine} == set(ROOMS)


def test_values_are_like_the_originals(sample: Path) -> None:
    with h5py.File(sample) as file:
        depth = file["depths"][:]
        raw = file["rawDepths"][:]
        label = file["labels"][:]
        instance = file["instances"][:]
        image = file["images"][0]
        n_classes = file["names"].shape[1]
    assert depth.min() >= 0.713
    assert depth.max() < 9.996
    assert 0.05 < (raw == 0).mean() < 0.6
    assert np.median(np.abs(raw - depth)[raw > 0]) < 0.05
    assert 0 < (label == 0).mean() < 0.6
    assert label.max() <= n_classes
    assert instance[label > 0].min() == 1
    assert not instance[label == 0].any()
    assert (image[:, :7] == 255).all()
    assert image[:, 20:-20, 20:-20].std() > 20


def test_planes_are_stored_transposed_with_the_floor_below(sample: Path) -> None:
    with h5py.File(sample) as file:
        floor = strings(file, "names").index("floor") + 1
        label = file["labels"][:].transpose(0, 2, 1)
    assert (label[:, 240:] == floor).sum() > 20 * (label[:, :240] == floor).sum()


@pytest.mark.parametrize(("field", "expected"), [(k, LAYOUT[k]) for k in FIELDS])
def test_matlabs_rule_gives_the_originals_chunks(
    field: str, expected: tuple[Any, str, Any]
) -> None:
    shape, dtype, chunk = expected
    assert matlab_chunk((1449, *shape[1:]), np.dtype(dtype).itemsize) == chunk


def test_resaved_chunks_span_rows_and_none_is_contiguous(tmp_path: Path) -> None:
    paths = [small(tmp_path / f"{how}.mat", chunks=how) for how in ("original", "resaved", "none")]
    original, resaved, none = (h5py.File(p) for p in paths)
    assert matlab_chunk((48, 3, 640, 480), 1) == (48, 3, 1, 240)
    for field in FIELDS:
        assert original[field].chunks[0] == 1
        assert resaved[field].chunks[0] > 1
        assert none[field].chunks is None
        np.testing.assert_array_equal(original[field][:], resaved[field][:])
        np.testing.assert_array_equal(original[field][:], none[field][:])


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    one = small(tmp_path / "one.mat", seed=0).read_bytes()
    two = small(tmp_path / "two.mat", seed=0).read_bytes()
    other = small(tmp_path / "other.mat", seed=1).read_bytes()
    assert one == two
    assert one != other


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.mat"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"exists already.*another name"):
        write_sample(path)
    assert path.read_bytes() == b"mine"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr("convert.sample._write_arrays", full)
    with pytest.raises(UserError, match="No space left"):
        small(tmp_path / "full.mat")
    assert not list(tmp_path.iterdir())


def test_too_few_rows_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose 1 or more"):
        small(tmp_path / "x.mat", rows=0)


def test_contact_sheet_is_a_png(sample: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "matplotlib", reason="the extra `show` is not installed: no picture is drawn"
    )
    from convert.inspect import SheetRows, contact_sheet

    with h5py.File(sample) as file:
        shown = ("images", "rawDepths", "labels")
        rgb, depth_m, label = (file[k][:2, ..., ::4, ::4].swapaxes(-1, -2) for k in shown)
        names = strings(file, "names")
    out = tmp_path / "new" / "a.png"
    depth_mm = np.round(depth_m * 1000).astype("<u2")
    rows = SheetRows(
        rgb_nchw_u8=rgb,
        depth_nhw_mm=depth_mm,
        label_nhw=label,
        captions=["row 0", "row 1"],
        label_names=names,
    )
    contact_sheet(rows, out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert.inspect import SheetRows, contact_sheet

    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    none = np.zeros((0, 1, 1), np.uint16)
    rows = SheetRows(
        rgb_nchw_u8=none, depth_nhw_mm=none, label_nhw=none, captions=[], label_names=[]
    )
    with pytest.raises(
        UserError, match=r"pip install 'nyuv2-shards\[show\]' \(.* pip install 'matplotlib'\)"
    ):
        contact_sheet(rows, tmp_path / "a.png")
