"""Each field is resized by its own rule, upright, and nothing wraps."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.resize import (
    Resizer,
    ValueRangeError,
    _triangle_bands,
    area,
    depth_mm,
    nearest,
    nearest_indices,
    rgb,
    rgb_of_picture,
)
from convert.sources.nyu_tables import nyu
from shards.spec import KNOWN_FIELDS, field_of_kind

DTYPES = {
    "rgb": np.uint8,
    "depth": np.float32,
    "raw_depth": np.float32,
    "label": np.uint16,
    "instance": np.uint8,
}


def resized(name: str, planes: np.ndarray, size: int, **how: Any) -> np.ndarray:
    """As a conversion does it for the known field `name`."""
    return Resizer(field=KNOWN_FIELDS[name], size=size, **how)(planes)


@pytest.mark.parametrize("field", DTYPES)
def test_a_marker_top_right_of_the_picture_lands_top_right(field: str) -> None:
    planes = np.zeros((3, 640, 480) if field == "rgb" else (640, 480), DTYPES[field])
    planes[..., 560:600, 40:60] = 9  # x 560..600, y 40..60 of the picture
    small = resized(field, planes, 224)
    assert small.shape == ((3, 224, 224) if field == "rgb" else (224, 224))
    ys, xs = np.nonzero(small.reshape(-1, 224, 224)[0])
    assert 17 <= ys.min() <= ys.max() <= 29
    assert 194 <= xs.min() <= xs.max() <= 212


@given(st.integers(1, 900), st.integers(1, 900))
def test_nearest_is_the_pixel_under_the_centre(n_in: int, n_out: int) -> None:
    expected = [min(n_in - 1, int((2 * i + 1) * n_in // (2 * n_out))) for i in range(n_out)]
    assert nearest_indices(n_in, n_out).tolist() == expected


def test_depth_is_rounded_millimetres_of_a_real_pixel() -> None:
    metres = np.full((64, 48), 2.3456, np.float32)
    metres[20:30] = 0
    small = depth_mm(metres, 32, "nearest")
    assert small.dtype == np.dtype("<u2")
    assert set(np.unique(small)) == {0, 2346}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.001, 32.7676, 1e9])
def test_a_depth_that_cannot_be_stored_raises(bad: float) -> None:
    metres = np.ones((64, 48), np.float32)
    metres[3, 3] = bad
    with pytest.raises(ValueRangeError, match="depth outside"):
        depth_mm(metres, 32, "nearest")


def test_a_label_beyond_894_raises() -> None:
    with pytest.raises(ValueRangeError, match="895"):
        resized("label", np.full((64, 48), 895, np.uint16), 32, highest_id=894)


def test_area_never_averages_a_hole_in() -> None:
    rng = np.random.default_rng(0)
    metres = rng.uniform(2, 3, (64, 48)).astype(np.float32)
    metres[rng.random((64, 48)) < 0.5] = 0
    small = area(metres, 16)
    assert small.min() == 0 or small.min() >= 2
    assert small.max() <= 3
    assert np.all(area(np.zeros((64, 48), np.float32), 16) == 0)


def test_area_of_whole_pixels_is_their_mean() -> None:
    metres = np.arange(1, 65, dtype=np.float32).reshape(8, 8)
    expected = metres.reshape(4, 2, 4, 2).mean((1, 3)).T
    np.testing.assert_allclose(area(metres, 4), expected)


@pytest.mark.parametrize(
    ("crop", "top", "left", "height", "width"),
    [("eigen", 45, 41, 426, 560), ("sunrgbd", 44, 40, 427, 561)],
)
def test_a_crop_takes_its_box_of_the_picture(
    crop: str, top: int, left: int, height: int, width: int
) -> None:
    picture = np.arange(480 * 640).reshape(480, 640) % 251
    stored = picture.T.astype(np.uint8)
    rows = top + nearest_indices(height, 32)
    columns = left + nearest_indices(width, 32)
    small = resized("instance", stored, 32, box=nyu().crops[crop])
    np.testing.assert_array_equal(small, picture[np.ix_(rows, columns)])


PICTURES = {
    "noise": np.random.default_rng(0).integers(0, 256, (3, 640, 480)).astype(np.uint8),
    "stripes": np.broadcast_to(np.arange(480) // 3 % 2 * 255, (3, 640, 480)).astype(np.uint8),
    "white": np.full((3, 640, 480), 255, np.uint8),
}


@pytest.mark.parametrize("size", [8, 97, 224, 480])
@pytest.mark.parametrize("kind", PICTURES)
def test_rgb_is_the_exact_antialiased_result_to_one_grey_level(kind: str, size: int) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")

    planes = PICTURES[kind]
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(planes.transpose(0, 2, 1)[None].copy()).double(),
        (size, size),
        mode="bilinear",
        antialias=True,
    )[0].numpy()
    assert np.abs(resized("rgb", planes, size) - exact).max() <= 1


@pytest.mark.parametrize(("kind", "dtype"), [("grey", np.uint8), ("grey16", np.uint16)])
def test_grey_is_resized_as_the_planes_of_rgb_are(kind: str, dtype: type) -> None:
    """And of 16 bits no value wraps: a flat picture keeps its level."""
    field = field_of_kind("thermal", kind)
    plane = np.random.default_rng(1).integers(0, 256, (64, 48)).astype(dtype)
    small = Resizer(field=field, size=32)(plane)
    assert small.dtype == dtype
    as_rgb = resized("rgb", np.stack([plane.astype(np.uint8)] * 3), 32)
    np.testing.assert_array_equal(small, as_rgb[1])

    most = np.iinfo(dtype).max
    flat = Resizer(field=field, size=32)(np.full((64, 48), most, dtype))
    assert set(np.unique(flat)) == {most}


@pytest.mark.parametrize(
    ("n_in", "n_out"), [(640, 224), (480, 224), (640, 8), (480, 480), (560, 97), (8, 480)]
)
def test_rgb_sums_are_whole_numbers_that_float32_holds(n_in: int, n_out: int) -> None:
    for bits, gain, largest in ((16, 16.0, 255), (12, 1 / 16, 255 * 16)):
        bands = _triangle_bands(n_in, n_out, bits, gain)
        whole = [weights.astype(np.float64) * 2**bits / gain for _, _, weights in bands]
        for weights in whole:
            np.testing.assert_array_equal(weights, np.rint(weights))
            assert weights.min() >= 0
            np.testing.assert_array_equal(weights.sum(1), 2**bits)
            assert largest * 2**bits <= 2**24
        assert [o.start for o, _, _ in bands] == [0, *(o.stop for o, _, _ in bands[:-1])]
        assert bands[-1][0].stop == n_out


@pytest.mark.parametrize(
    ("height", "width", "size"), [(48, 64, 32), (31, 57, 24), (530, 730, 224), (20, 9, 32)]
)
def test_a_picture_and_its_planes_give_the_same_bytes(height: int, width: int, size: int) -> None:
    picture = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    planes = np.ascontiguousarray(picture.transpose(2, 1, 0))
    np.testing.assert_array_equal(rgb_of_picture(picture, size), rgb(planes, size))
    depth = np.random.default_rng(4).integers(0, 9000, (height, width)).astype(np.uint16)
    np.testing.assert_array_equal(
        nearest(depth.T, size), nearest(np.ascontiguousarray(depth.T), size)
    )
