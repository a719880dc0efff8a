"""Real frames of the datasets that tables are made of: which pixel becomes which value."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from helpers.frames import AS_IS, by_line, converted, image_at, stored_pixels, write_table

from convert.sources.opening import SourceOptions
from shards.errors import WrongSetting

OTHER = "open3d/other_formats"
REDWOOD = "open3d/redwood"
HYPERSIM = "hypersim/ai_037_002/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
KV2 = "sunrgbd/SUNRGBD/kv2/align_kv2/2014-12-18_11-31-54_260595134347"
B3DO = "sunrgbd/SUNRGBD/kv1/b3dodata/img_0063"
Settings = dict[str, object]


def samples() -> Path:
    """Real frames; the test skips where they are absent."""
    return shared("rgbd_samples")


def one_depth(
    tmp_path: Path, rgb: str, depth: str, shape_hw: tuple[int, int], **settings: object
) -> np.ndarray:
    """(H, W) millimetres that are stored of a real frame."""
    table = write_table(tmp_path / "t.csv", [{"rgb": rgb, "depth": depth}])
    options = SourceOptions(roots=(str(samples()),))
    chosen = replace(AS_IS, size=max(shape_hw), fields=("rgb", "depth"), **settings)
    found = converted(table, tmp_path / "out", chosen, options=options)
    assert found.column("size").tolist() == [list(shape_hw)]
    return stored_pixels(by_line(found, "depth")[0], shape_hw)


def in_file(path: str) -> np.ndarray:
    return np.asarray(image_at(samples() / path)).astype(np.int64)


def test_sun3d_has_depths_beyond_8_metres_in_its_low_bits(tmp_path: Path) -> None:
    path = f"{OTHER}/SUN_depth.png"
    mm = one_depth(tmp_path, f"{OTHER}/SUN_color.jpg", path, (480, 640), depth_encoding="sunrgbd")
    assert np.sum(mm > 8191) == 7149
    stored = in_file(path)
    np.testing.assert_array_equal(mm, (stored >> 3) | (stored << 13 & 0xFFFF))


def test_tum_has_5000_a_metre(tmp_path: Path) -> None:
    path = f"{OTHER}/TUM_depth.png"
    mm = one_depth(tmp_path, f"{OTHER}/TUM_color.png", path, (480, 640), depth_encoding="tum")
    assert mm[240, 320] == 2184  # 10920 in the file
    np.testing.assert_array_equal(mm, np.rint(in_file(path) / 5))


def test_redwood_has_millimetres(tmp_path: Path) -> None:
    path = f"{REDWOOD}/depth/00000.png"
    mm = one_depth(tmp_path, f"{REDWOOD}/color/00000.jpg", path, (480, 640))
    assert (mm[240, 320], mm.max()) == (2195, 2702)
    np.testing.assert_array_equal(mm, in_file(path))


def test_nyu_raw_has_readings_of_a_kinect_in_the_wrong_byte_order(tmp_path: Path) -> None:
    path = f"{OTHER}/NYU_depth.pgm"
    rgb = f"{OTHER}/NYU_color.ppm"
    mm = one_depth(tmp_path, rgb, path, (480, 640), depth_encoding="nyu_raw")
    readings = in_file(path).astype(np.uint16).byteswap().astype(np.float64)
    assert readings[240, 320] == 977  # the file's 53507, its bytes exchanged
    expected = np.rint(351_300 / (1092.5 - readings))
    expected[(expected < 0) | (expected > 10_000)] = 0
    np.testing.assert_array_equal(mm, expected)


@pytest.mark.parametrize(
    ("rgb", "depth", "named"),
    [
        (f"{OTHER}/NYU_color.ppm", f"{OTHER}/NYU_depth.pgm", "nyu_raw"),
        (f"{KV2}/image/0000144.jpg", f"{KV2}/depth/0000144.png", "sunrgbd"),
    ],
)
def test_real_depths_that_nobody_named_are_refused_with_their_name(
    rgb: str, depth: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(WrongSetting, match=f"looks like {named}"):
        one_depth(tmp_path, rgb, depth, (480, 640))


@pytest.mark.parametrize(
    ("row", "picture", "shape_hw", "centre_mm"),
    [(KV2, "0000144", (530, 730), 2872), (B3DO, "img_0063", (427, 561), 0)],
    ids=["kv2", "b3do"],
)
def test_rows_of_sun_rgbd_decode_by_the_rotation(
    row: str, picture: str, shape_hw: tuple[int, int], centre_mm: int, tmp_path: Path
) -> None:
    suffix = "_abs" if "b3do" in row else ""
    path = f"{row}/depth/{picture}{suffix}.png"
    rgb = f"{row}/image/{picture}.jpg"
    mm = one_depth(tmp_path, rgb, path, shape_hw, depth_encoding="sunrgbd")
    assert mm[shape_hw[0] // 2, shape_hw[1] // 2] == centre_mm
    stored = in_file(path)
    np.testing.assert_array_equal(mm, (stored >> 3) | (stored << 13 & 0xFFFF))


def test_hypersim_is_read_from_its_hdf5_as_depths_along_the_axis(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    from convert.sample_frames import png

    root = samples()
    (tmp_path / "rgb.png").write_bytes(png(np.zeros((768, 1024, 3), np.uint8)))
    row = {"rgb": "rgb.png", "depth": f"{HYPERSIM}#dataset"}
    table = write_table(tmp_path / "t.csv", [row])
    options = SourceOptions(roots=(f"rgb={tmp_path}", str(root)))
    chosen = replace(AS_IS, size=1024, fields=("rgb", "depth"), depth_encoding="hypersim")
    found = converted(table, tmp_path / "out", chosen, options=options)
    mm = stored_pixels(by_line(found, "depth")[0], (768, 1024)).astype(np.int64)

    with h5py.File(root / HYPERSIM) as file:
        along_ray_m = file["dataset"][()].astype(np.float64)
    y, x = np.indices((768, 1024)) + 0.5
    length = np.sqrt((x - 512) ** 2 + (y - 384) ** 2 + 886.81**2)
    expected = np.nan_to_num(along_ray_m) * 1000 * 886.81 / length
    assert np.abs(mm - expected).max() <= 0.5 + 1e-6
