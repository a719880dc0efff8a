"""The two real rows of SUN RGB-D beside the real split, as somebody has them who took a part."""

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs pillow")

from conftest import shared
from helpers.frames import by_line, converted, image_at, resized, stored

from convert.resize import nearest_indices
from shards.dataset import ShardSet
from shards.spec import SPLITS, ConversionSettings

KV2 = "kv2/align_kv2/2014-12-18_11-31-54_260595134347"
B3DO = "kv1/b3dodata/img_0063"
SIZE = 730  # the width of kv2's pictures: each of their columns is stored once
Y, X = 200, 300


def samples() -> Path:
    """Real files; the test skips where they are absent."""
    return shared("rgbd_samples")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """SUNRGBD/ is a link, as folders of large datasets often are."""
    folder = tmp_path_factory.mktemp("sun")
    (folder / "SUNRGBD").symlink_to(samples() / "sunrgbd/SUNRGBD")
    shutil.copy(samples() / "sunrgbd_lists/allsplit.mat", folder)
    return converted(folder, folder / "out", ConversionSettings(size=SIZE))


def in_file(path: str) -> np.ndarray:
    return np.asarray(image_at(samples() / "sunrgbd/SUNRGBD" / path)).astype(np.int64)


def test_a_test_row_of_kv2_and_a_train_row_of_kv1(found: ShardSet) -> None:
    rows = {
        str(path).partition("/image/")[0]: SPLITS[split]
        for path, split in zip(found.column("rgb_file"), found.column("split"), strict=True)
    }
    assert rows == {KV2: "test", B3DO: "train"}
    types = [found.dataset.scene_types[k] for k in found.column("scene_type").tolist()]
    assert types == ["office", "office"]
    assert found.column("row").tolist() == [1, 0]  # train first; the test half has the first lines
    assert tuple(found.manifest.fields) == ("rgb", "depth", "raw_depth")


@pytest.mark.parametrize(
    ("field", "folder", "value", "mm"),
    [("raw_depth", "depth", 19640, 2455), ("depth", "depth_bfx", 19616, 2452)],
)
def test_a_pixel_of_kv2_is_an_eighth_of_what_stands_in_the_file(
    found: ShardSet, field: str, folder: str, value: int, mm: int
) -> None:
    file = in_file(f"{KV2}/{folder}/0000144.png")
    assert (file.shape, file[Y, X]) == ((530, 730), value)
    line = nearest_indices(530, SIZE).tolist().index(Y)
    assert by_line(found, field)[0][line, X] == mm == value // 8


def test_every_pixel_is_the_rotated_one_and_abs_is_no_other_depth(found: ShardSet) -> None:
    for row, path, name in ((0, KV2, "0000144.png"), (1, B3DO, "img_0063_abs.png")):
        for field, folder in (("raw_depth", "depth"), ("depth", "depth_bfx")):
            file = in_file(f"{path}/{folder}/{name}")
            mm = ((file >> 3) | (file << 13 & 0xFFFF)).astype(np.uint16)
            right = resized(found.field(field), mm, SIZE)
            np.testing.assert_array_equal(by_line(found, field)[row], right)
    assert stored(found, "depth").min() > 0


def test_cameras_are_shares_of_pictures_of_two_sizes(found: ShardSet) -> None:
    lines = found.column("row").tolist()
    cameras = dict(zip(lines, found.column("camera").tolist(), strict=True))
    sizes = dict(zip(lines, found.column("size").tolist(), strict=True))
    assert sizes == {0: [530, 730], 1: [427, 561]}
    right = {
        0: (529.5 / 730, 529.5 / 530, 365.5 / 730, 265.5 / 530),
        1: (520.532 / 561, 520.7444 / 427, 278.4258 / 561, 215.615 / 427),
    }
    for line, camera in cameras.items():
        np.testing.assert_allclose(camera, right[line], rtol=1e-6)
