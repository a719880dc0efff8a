"""Stored depths become the millimetres that whoever made the dataset meant."""

import math

import numpy as np
import pytest
from conftest import shared

from convert.sources.depth_encodings import ENCODINGS, DepthRule, check_names, looks_undecoded
from convert.sources.errors import BadRow
from convert.sources.pictures import decode
from shards.errors import WrongSetting

SAMPLES = "rgbd_samples/open3d"


def sample(name: str, *, little_endian: bool = False) -> np.ndarray:
    """A real depth picture, as stored; the test skips where there is none."""
    data = shared(f"{SAMPLES}/{name}").read_bytes()
    return decode(data, "depth", little_endian=little_endian).pixels


def mm(values: list[float], dtype: str = "u2", **rule: object) -> list[int]:
    found = DepthRule(**rule).to_mm(np.array([values], dtype))
    assert found.dtype == np.uint16
    assert found.shape == (1, len(values))
    return found[0].tolist()


# ---------------------------------------------------------------- each name


def test_whole_numbers_are_millimetres_and_floats_metres_by_default() -> None:
    assert mm([0, 1, 1500, 32767]) == [0, 1, 1500, 32767]
    assert mm([0, 1, 1500, 32767], "u4") == [0, 1, 1500, 32767]
    for dtype in ("f4", "f8"):
        assert mm([0, 0.001, 1.5, 32.767], dtype) == [0, 1, 1500, 32767]


def test_a_scale_is_stored_units_a_metre_and_divides() -> None:
    assert mm([0, 5000, 12075], scale=5000) == [0, 1000, 2415]
    assert mm([255, 128], "u1", scale=25.5) == [10000, 5020]
    assert mm([1250.0], "f4", scale=1000) == [1250]


@pytest.mark.parametrize(
    ("encoding", "stored", "expected"),
    [
        ("mm", [0, 7, 32767], [0, 7, 32767]),
        ("metres", [0, 2, 32], [0, 2000, 32000]),
        # 8,191 mm has no low bit; 8,192 has the first of them; 9,870 is 8,192 + 1,678.
        ("sunrgbd", [0, 8, 8191 << 3, 1, (1678 << 3) | 1], [0, 1, 8191, 8192, 9870]),
        ("tum", [0, 5, 12500, 65535], [0, 1, 2500, 13107]),
        ("matterport", [0, 4, 4000, 65535], [0, 1, 1000, 16384]),
        ("2d3ds", [0, 512, 5120, 65535], [0, 1000, 10000, 0]),
        ("nyu_raw", [600, 1000, 2047, 1093], [713, 3798, 0, 0]),
    ],
)
def test_an_encoding_gives_its_millimetres(
    encoding: str, stored: list[float], expected: list[int]
) -> None:
    assert mm(stored, encoding=encoding) == expected


def test_every_name_is_tested_and_can_be_chosen() -> None:
    assert set(ENCODINGS) == {
        *("mm", "metres", "sunrgbd", "tum", "matterport", "2d3ds", "nyu_raw", "hypersim")
    }
    for name in ENCODINGS:
        check_names(encoding=name)


@pytest.mark.parametrize("encoding", ["sunrgbd", "tum", "matterport", "nyu_raw"])
def test_the_table_holds_what_is_computed(encoding: str) -> None:
    rule = DepthRule(encoding=encoding, trunc_m=20)
    stored = np.arange(2048 if encoding == "nyu_raw" else 65536, dtype=np.uint16)[None]
    assert (rule.to_mm(stored) == rule.computed(stored)).all()


def test_halves_are_rounded_to_even() -> None:
    assert mm([5, 15, 25], scale=10_000) == [0, 2, 2]
    assert mm([0.0005, 0.0015, 0.0025], "f8") == [0, 2, 2]


def test_nyu_raw_beyond_ten_metres_is_none() -> None:
    exact = [351.3 / (1092.5 - v) for v in (1057, 1058)]
    assert exact[0] < 10 < exact[1]
    assert mm([1057, 1058], encoding="nyu_raw") == [round(exact[0] * 1000), 0]


def test_hypersim_is_measured_along_the_ray() -> None:
    distance_m = np.full((768, 1024), 2.0, np.float16)
    distance_m[0, 0] = np.nan
    depth_mm = DepthRule(encoding="hypersim").to_mm(distance_m)
    assert depth_mm[0, 0] == 0
    assert depth_mm[384, 512] == 2000
    for row, column in ((0, 1023), (767, 0), (100, 900)):
        x, y = column + 0.5 - 512, row + 0.5 - 384
        expected = 2000 * 886.81 / math.sqrt(x * x + y * y + 886.81**2)
        assert depth_mm[row, column] == round(expected)
    half = DepthRule(encoding="hypersim").to_mm(np.full((384, 512), 2.0, np.float32))
    assert abs(int(half[0, -1]) - int(depth_mm[0, -1])) <= 1


# ---------------------------------------------------------------- real pictures


def test_pixels_beyond_eight_metres_of_a_real_sun3d_picture_are_there() -> None:
    stored = sample("other_formats/SUN_depth.png")
    depth_mm = DepthRule(encoding="sunrgbd").to_mm(stored)
    far = depth_mm[depth_mm > 8191]
    assert (len(far), far.min(), far.max()) == (7149, 8212, 9870)
    shifted_alone = stored[depth_mm > 8191] >> 3
    assert (shifted_alone.min(), shifted_alone.max()) == (20, 1678)


def test_a_real_tum_picture_is_a_room() -> None:
    depth_mm = DepthRule(encoding="tum").to_mm(sample("other_formats/TUM_depth.png"))
    assert np.median(depth_mm[depth_mm > 0]) == 2415
    assert depth_mm.max() == 9331


def test_a_real_redwood_picture_is_millimetres() -> None:
    stored = sample("redwood/depth/00000.png")
    depth_mm = DepthRule().to_mm(stored)
    assert (depth_mm == stored).all()
    assert (depth_mm[depth_mm > 0].min(), depth_mm.max()) == (955, 2702)


def test_a_real_raw_picture_of_nyu_is_a_room_in_the_right_byte_order_alone() -> None:
    rule = DepthRule(encoding="nyu_raw")
    assert rule.is_little_endian_pnm
    stored = sample("other_formats/NYU_depth.pgm", little_endian=True)
    assert (stored.min(), stored.max()) == (839, 2047)
    depth_mm = rule.to_mm(stored)
    assert (depth_mm[stored == 2047] == 0).all()
    assert depth_mm[depth_mm > 0].min() == round(351_300 / (1092.5 - 839))
    assert depth_mm.max() <= 10_000
    with pytest.raises(BadRow, match="the order of their bytes may be the other one"):
        rule.to_mm(sample("other_formats/NYU_depth.pgm"))


# ---------------------------------------------------------------- what is none, and what is refused


def test_farther_than_the_cut_is_none() -> None:
    assert mm([7000, 7001, 40000, 65535], trunc_m=7) == [7000, 0, 0, 0]
    assert mm([1.0, 4.0005, np.inf, 1e30], "f4", trunc_m=4) == [1000, 0, 0, 0]
    assert mm([65535, 512 * 30], encoding="2d3ds", trunc_m=32) == [0, 30000]


def test_not_a_number_is_none_in_every_float_depth() -> None:
    assert mm([np.nan, 2.0], "f4") == [0, 2000]
    assert mm([np.nan, 2.0], "f2", scale=1) == [0, 2000]


@pytest.mark.parametrize(
    ("values", "dtype", "rule", "said"),
    [
        ([32768], "u2", {}, "beyond 32.767 m: a depth_trunc would set them to 0"),
        ([65535], "u2", {}, "beyond 32.767 m"),
        ([70000], "u4", {}, "beyond 32.767 m"),
        ([np.inf], "f4", {}, "beyond 32.767 m"),
        ([33.0], "f4", {}, "beyond 32.767 m"),
        ([65535 - 1], "u2", {"encoding": "2d3ds"}, "beyond 32.767 m"),
        ([-0.5, 1.0], "f4", {}, "has negative depths, down to -0.5"),
        ([-np.inf], "f4", {"trunc_m": 3}, "has negative depths"),
        ([200], "u1", {}, "is an 8-bit picture, and 8-bit depth needs a named encoding"),
        ([200], "u1", {"trunc_m": 3}, "8-bit depth needs a named encoding"),
        ([200], "u1", {"encoding": "sunrgbd"}, "has depths of type uint8, which are not sunrgbd"),
        ([1.0], "f4", {"encoding": "2d3ds"}, "has depths of type float32, which are not 2d3ds"),
        ([1000], "u2", {"encoding": "hypersim"}, "of type uint16, which are not hypersim"),
        ([2048], "u2", {"encoding": "nyu_raw"}, "has readings up to 2048, and nyu_raw ends at"),
    ],
)
def test_what_cannot_be_is_one_phrase(
    values: list[float], dtype: str, rule: dict[str, object], said: str
) -> None:
    with pytest.raises(BadRow) as caught:
        mm(values, dtype, **rule)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "name", "said"),
    [
        ({"encoding": "cm"}, "depth_encoding", "choose one of mm, metres, sunrgbd"),
        ({"scale": 0.0}, "depth_scale", "stored units a metre"),
        ({"scale": -1.0}, "depth_scale", "stored units a metre"),
        ({"scale": math.nan}, "depth_scale", "stored units a metre"),
        ({"scale": math.inf}, "depth_scale", "stored units a metre"),
        ({"scale": 5000.0, "encoding": "tum"}, "depth_scale", "leave one of them out"),
        ({"trunc_m": 0.0}, "depth_trunc", "give metres"),
        ({"trunc_m": math.nan}, "depth_trunc", "give metres"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], name: str, said: str) -> None:
    with pytest.raises(WrongSetting, match=said) as caught:
        check_names(**settings)
    assert caught.value.name == name


def test_right_settings_pass() -> None:
    check_names()
    check_names(encoding="tum", trunc_m=4)
    check_names(scale=25.5)


# ---------------------------------------------------------------- what a unit looks like


@pytest.mark.parametrize(
    ("name", "looks_like"),
    [
        ("other_formats/SUN_depth.png", "sunrgbd"),
        ("other_formats/TUM_depth.png", "tum"),
        ("other_formats/NYU_depth.pgm", "nyu_raw"),
        ("redwood/depth/00000.png", None),
        ("redwood/depth/00001.png", None),
    ],
)
def test_a_real_picture_is_told_by_its_values(name: str, looks_like: str | None) -> None:
    assert looks_undecoded([sample(name)]) == looks_like


def test_every_real_picture_of_sun_looks_rotated() -> None:
    root = shared("rgbd_samples/sunrgbd")
    paths = sorted(root.glob("SUNRGBD/*/*/*/depth*/*.png"))
    assert len(paths) == 4
    for path in paths:
        assert looks_undecoded([decode(path.read_bytes(), "depth").pixels]) == "sunrgbd"


def test_millimetres_are_not_taken_for_anything_else() -> None:
    rng = np.random.default_rng(0)
    room = rng.integers(500, 9000, (48, 64), dtype=np.uint16)
    near = rng.integers(300, 2048, (48, 64), dtype=np.uint16)
    for plane in (room, near, room // 8 * 8, room // 5 * 5, np.zeros((4, 4), np.uint16)):
        assert looks_undecoded([plane]) is None
    assert looks_undecoded([]) is None
    assert looks_undecoded([np.ones((4, 4), np.float32)]) is None


def test_raw_readings_are_told_in_either_byte_order() -> None:
    readings = np.array([[839, 986, 1050, 2047]], np.uint16)
    assert looks_undecoded([readings]) == "nyu_raw"
    assert looks_undecoded([readings.byteswap()]) == "nyu_raw"
