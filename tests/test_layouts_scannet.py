"""Frames of ScanNet: colour and depth of two sizes, labels of NYU's 40 classes, splits by scan."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from helpers.frames import (
    AS_IS,
    by_line,
    converted,
    lines_of,
    read_csv,
    resized,
    write_file,
    write_table,
)
from helpers.sets import shard_bytes

from convert.__main__ import main
from convert.sample_frames import png
from convert.sources.layouts import layout_of
from convert.sources.opening import SourceOptions
from shards.dataset import ShardSet
from shards.errors import WrongSource
from shards.manifest import RIGHT_ROW
from shards.spec import KNOWN_FIELDS

COLOUR_HW = (24, 36)
DEPTH_HW = (16, 20)
CAMERA = "1170.5 0 17.5 0\n0 1171.5 11.5 0\n0 0 1 0\n0 0 0 1\n"


def pictures_of(number: int) -> dict[str, np.ndarray]:
    """As the files have them: instances are class * 1000 + number, 0 where there is none."""
    rng = np.random.default_rng(number)
    label = rng.integers(0, 41, COLOUR_HW).astype(np.uint8)
    return {
        "color": rng.integers(0, 256, (*COLOUR_HW, 3), dtype=np.uint8),
        "depth": rng.integers(0, 9000, DEPTH_HW).astype(np.uint16),
        "label": label,
        "instance": (label * np.uint16(1000) + rng.integers(0, 40, COLOUR_HW)).astype(np.uint16),
    }


def put(folder: Path, scan: str, numbers: range) -> None:
    for number in numbers:
        for name, picture in pictures_of(number).items():
            write_file(folder / scan / name / f"{number:06d}.png", png(picture))
        write_file(folder / scan / "pose" / f"{number:06d}.txt", b"1 0 0 0\n")
    write_file(folder / scan / "intrinsics_color.txt", CAMERA.encode())
    write_file(folder / scan / "intrinsics_depth.txt", CAMERA.replace("117", "57").encode())


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans of two places, with the lists of two splits."""
    folder = tmp_path_factory.mktemp("scannet") / "frames"
    put(folder, "scene0191_00", range(2))
    put(folder, "scene0191_01", range(2, 3))
    put(folder, "scene0568_00", range(3, 5))
    (folder / "scannetv2_train.txt").write_text("scene0191_00\nscene0191_01\nscene0009_00\n")
    (folder / "scannetv2_val.txt").write_text("scene0568_00\n")
    return folder


@pytest.fixture(scope="module")
def found(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return converted(scans, tmp_path_factory.mktemp("root"))


def test_scans_of_one_place_are_one_scene_in_the_split_of_their_list(scans: Path) -> None:
    assert layout_of(scans) == "scannet"
    lines = lines_of(scans, "scannet")
    assert [(line["scene"], line["split"]) for line in lines] == [
        *[("scene0191", "train")] * 3,
        *[("scene0568", "val")] * 2,
    ]
    assert lines[2]["rgb"] == "scene0191_01/color/000002.png"
    assert lines[2]["instance"] == "scene0191_01/instance/000002.png"


def test_pictures_of_two_sizes_are_stretched_each_from_its_own_grid(found: ShardSet) -> None:
    assert (found.column("status") == RIGHT_ROW).all()
    assert found.column("size").tolist() == [list(COLOUR_HW)] * 5
    for number in range(5):
        pictures = pictures_of(number)
        for field, name in (("rgb", "color"), ("depth", "depth"), ("label", "label")):
            expected = resized(KNOWN_FIELDS[field], pictures[name], 8)
            np.testing.assert_array_equal(by_line(found, field)[number], expected, field)


def test_depth_is_the_nearest_pixel_of_its_own_picture(found: ShardSet) -> None:
    """Of 16 x 20 pixels at size 8: rows 1, 3, 5, ..., columns 1, 3, 6, ..."""
    of_line = by_line(found, "depth")[0]
    in_file = pictures_of(0)["depth"]
    assert of_line[0, 0] == in_file[1, 1]
    assert of_line[7, 2] == in_file[15, 6]


def test_instances_count_within_their_class(found: ShardSet) -> None:
    for number in range(5):
        of_file = pictures_of(number)["instance"] % 1000
        expected = resized(KNOWN_FIELDS["instance"], of_file.astype(np.uint8), 8)
        np.testing.assert_array_equal(by_line(found, "instance")[number], expected)


def test_labels_have_the_names_of_the_40_classes_and_the_13(found: ShardSet) -> None:
    names = found.dataset.label_names
    assert len(names) == 40
    assert names[:3] == ("wall", "floor", "cabinet")
    to13 = found.dataset.label_table(13)
    assert to13.names[to13.ids[1] - 1] == "wall"
    assert to13.names[to13.ids[4] - 1] == "bed"


def test_cameras_are_those_of_the_colour_as_shares_of_its_picture(found: ShardSet) -> None:
    expected = (1170.5 / 36, 1171.5 / 24, 18 / 36, 12 / 24)
    np.testing.assert_allclose(found.column("camera"), [expected] * 5, rtol=1e-6)


def test_without_rgb_they_are_those_of_the_depth(scans: Path, tmp_path: Path) -> None:
    found = converted(scans, tmp_path, replace(AS_IS, fields=("depth",)))
    np.testing.assert_allclose(found.column("camera")[0][:2], (570.5 / 20, 571.5 / 16), rtol=1e-6)


def test_the_table_of_a_directory_gives_the_same_rows(
    scans: Path, found: ShardSet, tmp_path: Path
) -> None:
    table = tmp_path / "rows.csv"
    assert main(["table", str(scans), "--out", str(table)]) == 0
    names = [
        *("rgb", "depth", "label", "instance", "split", "scene", "depth_encoding"),
        *("instance_encoding", "registered", "fx", "fy", "cx", "cy"),
    ]
    assert list(read_csv(table)[0]) == names
    of_table = converted(table, tmp_path / "out", options=SourceOptions(roots=(str(scans),)))
    assert shard_bytes(of_table.path) == shard_bytes(found.path)
    np.testing.assert_array_equal(of_table.column("camera"), found.column("camera"))


def test_sizes_that_differ_are_refused_where_nobody_says_that_they_show_the_same(
    scans: Path, tmp_path: Path
) -> None:
    row = {"rgb": "scene0191_00/color/000000.png", "depth": "scene0191_00/depth/000000.png"}
    for said in ("", "no"):
        table = write_table(tmp_path / "t.csv", [{**row, "registered": said}])
        with pytest.raises(WrongSource, match="depth is 20x16, rgb 36x24 pixels"):
            converted(table, tmp_path / "out", options=SourceOptions(roots=(str(scans),)))


@pytest.mark.parametrize(
    ("column", "text", "right"),
    [("registered", "perhaps", "yes or no"), ("instance_encoding", "coco", "class1000")],
)
def test_what_a_column_cannot_hold_is_one_line(
    column: str, text: str, right: str, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", [{"rgb": "a.png", column: text}])
    with pytest.raises(WrongSource, match=f"column {column} has {text}. It holds {right}"):
        converted(table, tmp_path / "out")


def test_scans_that_no_list_names_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "scene0191_00", range(1))
    put(tmp_path, "scene0707_00", range(1, 2))
    (tmp_path / "scannetv2_train.txt").write_text("scene0191_00\n")
    assert main(["table", str(tmp_path), "--out", str(tmp_path / "t.csv")]) == 0
    assert "1 scans are in no split's list: left out" in capsys.readouterr().err
    assert [line["scene"] for line in lines_of(tmp_path, "scannet")] == ["scene0191"]


def test_pictures_that_are_not_there_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "scene0000_00", range(2))
    (tmp_path / "scene0000_00/label/000000.png").unlink()
    (tmp_path / "scene0000_00/color/000001.png").unlink()
    assert main(["table", str(tmp_path), "--out", str(tmp_path / "t.csv")]) == 0
    said = capsys.readouterr().err
    assert "1 frames have no label" in said
    assert "1 pictures of depth have no color, such as scene0000_00/depth/000001.png" in said


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"scene0000_00/color/1.jpg": "", "scene0000_00/color/1.png": ""}, "of one name"),
        ({"scene0000_00/color/1.jpg": "", "scene0000_00/intrinsics_color.txt": "1 2\n"}, "no matrix"),
        ({"scene0000_00/color/1.jpg": "", "scannetv2_val.txt": "scene0001_00"}, "has no pictures in"),
        ({"scannetv2_val.txt": "a b", "scannetv2_test.txt": "b"}, "has b in the lists of"),
        ({"kitchen/1.jpg": ""}, "has no pictures in scene0000_00/color"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    for path, text in files.items():
        write_file(tmp_path / path, text.encode())
    with pytest.raises(WrongSource, match=expected):
        lines_of(tmp_path, "scannet")


def test_the_real_lists_of_splits_are_read(tmp_path: Path) -> None:
    real = shared("rgbd_samples") / "scannet"
    for split in ("train", "val", "test"):
        name = f"scannetv2_{split}.txt"
        write_file(tmp_path / name, (real / name).read_bytes())
    for number, scan in enumerate(("scene0191_00", "scene0568_02", "scene0707_00")):
        put(tmp_path, scan, range(number, number + 1))
    assert [line["split"] for line in lines_of(tmp_path, "scannet")] == ["train", "val", "test"]
