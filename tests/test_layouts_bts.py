"""Lists of rgb, depth and focal length: where their paths begin, splits, scenes, cameras."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from helpers.frames import by_line, converted, lines_of, picture_of, write_file
from helpers.sets import shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.__main__ import main
from convert.sample_frames import png
from convert.sources.layouts import LAYOUTS, layout_of
from convert.sources.layouts_bts import NYU_FOCAL
from convert.sources.listings import Wanted
from convert.sources.opening import SourceOptions
from shards.errors import WrongSource
from shards.spec import SPLITS

TRAIN = "nyudepthv2_train_files_with_gt.txt"
TEST = "nyudepthv2_test_files_with_gt.txt"
TRAIN_LINES = (
    "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579",
    "/bookstore_0001d/rgb_00001.jpg /bookstore_0001d/sync_depth_00001.png 518.8579",
    "/bookstore_0001j/rgb_00002.jpg None 518.8579",
)
TEST_LINES = ("bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579",)


def put(folder: Path, lines: Sequence[str], rgb: str, depth: str) -> None:
    """The pictures of a list, below these folders; each line has its own."""
    for number, line in enumerate(lines):
        paths = line.split()[:2]
        for field, where, path in zip(("rgb", "depth"), (rgb, depth), paths, strict=True):
            if path != "None":
                write_file(folder / where / path.lstrip("/"), png(picture_of(number)[field]))


def write_list(path: Path, lines: Sequence[str]) -> Path:
    write_file(path, "".join(f"{line}\n" for line in lines).encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both lists and the folders of both, as the authors lay them out."""
    made = tmp_path / "nyu"
    put(made, TRAIN_LINES, "sync", "sync")
    put(made, TEST_LINES, "official_splits/test", "official_splits/test")
    put(made, TEST_LINES, "official_splits/train", "official_splits/train")  # of the same names
    write_list(made / TRAIN, TRAIN_LINES)
    write_list(made / TEST, TEST_LINES)
    return made


def test_a_directory_with_lists_and_folders_is_read_by_both(folder: Path) -> None:
    assert layout_of(folder) == "bts"
    lines = lines_of(folder, "bts")
    test_row = {
        "rgb": "official_splits/test/bathroom/rgb_00045.jpg",
        "depth": "official_splits/test/bathroom/sync_depth_00045.png",
        "split": "test",
        "scene_type": "bathroom",
        "depth_encoding": "mm",
    }
    kitchen = {
        "rgb": "sync/kitchen_0028b/rgb_00045.jpg",
        "depth": "sync/kitchen_0028b/sync_depth_00045.png",
        "split": "train",
        "scene": "kitchen_0028",
        "scene_type": "kitchen",
        "depth_encoding": "mm",
    }
    assert test_row in lines
    assert kitchen in lines
    assert [line["depth"] for line in lines].count("") == 1
    assert len(lines) == 4


def test_train_frames_of_official_test_scenes_are_a_warning_that_the_set_keeps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = converted(folder, tmp_path / "out")
    said = capsys.readouterr().err
    expected = "2 train frames show scenes of NYU's official test rows, such as bookstore_0001"
    assert found.dataset.warnings == (expected,)
    assert said.count(expected) == 1
    assert "1 frames have no depth" in said
    assert [SPLITS[k] for k in found.column("split")] == ["train"] * 3 + ["test"]
    np.testing.assert_allclose(found.column("camera")[:, 0], [518.86 / 8] * 4, rtol=1e-5)


def test_the_table_of_the_directory_gives_the_same_rows(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    assert main(["table", str(folder), "--out", str(table)]) == 0
    of_table = converted(table, tmp_path / "a", options=SourceOptions(roots=(str(folder),)))
    assert shard_bytes(of_table.path) == shard_bytes(converted(folder, tmp_path / "b").path)


def test_two_roots_are_looked_into_each_for_its_own_field(tmp_path: Path) -> None:
    put(tmp_path, TRAIN_LINES[:2], "raw/pictures", "gt/deep/down")
    listed = write_list(tmp_path / "lists" / TRAIN, TRAIN_LINES[:2])
    roots = (str(tmp_path / "raw"), f"depth={tmp_path / 'gt'}")
    table = LAYOUTS["bts"].read(listed, Wanted(roots=roots)).table
    assert table.paths["rgb"][0] == "pictures/kitchen_0028b/rgb_00045.jpg"
    assert table.paths["depth"][0] == "deep/down/kitchen_0028b/sync_depth_00045.png"

    options = SourceOptions(layout="bts", roots=roots)
    found = converted(listed, tmp_path / "out", options=options)
    for line in range(2):
        np.testing.assert_array_equal(by_line(found, "depth")[line], picture_of(line)["depth"])


def test_a_list_in_an_archive_of_pictures_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "sync"), "zip", folder / "sync")
    options = SourceOptions(layout="bts", roots=(archive,))
    found = converted(folder / TRAIN, tmp_path / "out", options=options)
    assert not found.column("status").any()
    np.testing.assert_array_equal(by_line(found, "depth")[0], picture_of(0)["depth"])


def test_other_focal_lengths_leave_camera_and_unit_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["2011/drive_1/data/1.png 2011/drive_1/proj/1.png 721.5377"]
    put(tmp_path, lines, "", "")
    write_list(tmp_path / "eigen_train_files.txt", lines)
    assert lines_of(tmp_path, "bts") == [
        {
            "rgb": "2011/drive_1/data/1.png",
            "depth": "2011/drive_1/proj/1.png",
            "split": "train",
            "scene": "2011/drive_1/data",
        }
    ]
    assert main(["table", str(tmp_path), "--out", str(tmp_path / "t.csv")]) == 0
    assert "1 frames have other focal lengths than NYU, such as 721.538" in capsys.readouterr().err


PATHS = st.lists(
    st.from_regex(r"[a-z]{1,8}_[0-9]{4}[a-f]?/rgb_[0-9]{5}\.jpg", fullmatch=True),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(PATHS, st.sampled_from(["", "/"]), st.sampled_from([" ", "\t", "   "]), st.data())
def test_a_list_reads_the_same_with_any_blanks_and_slashes_in_front(
    tmp_path_factory: pytest.TempPathFactory,
    paths: list[str],
    slash: str,
    blanks: str,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("list")
    depths = [data.draw(st.sampled_from([path.replace("rgb", "depth"), "None"])) for path in paths]
    lines = []
    for rgb, depth in zip(paths, depths, strict=True):
        (folder / rgb).parent.mkdir(exist_ok=True)
        (folder / rgb).write_bytes(b"a picture")
        if depth != "None":
            (folder / depth).write_bytes(b"a picture")
        cells = (slash + rgb, depth if depth == "None" else slash + depth, str(NYU_FOCAL))
        lines.append(blanks.join(cells) + data.draw(st.sampled_from(["", " ", "\r"])))
    write_list(folder / "train.txt", ["# rgb depth focal", "", *lines])
    table = LAYOUTS["bts"].read(folder, Wanted()).table
    assert list(table.paths["rgb"]) == paths
    assert list(table.paths["depth"]) == ["" if depth == "None" else depth for depth in depths]


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"train.txt": "a/1.jpg a/1.png\n"}, "has no list of rgb, depth and focal length"),
        ({"train.txt": "x/1.jpg x/1.png 5\n"}, "x/1.jpg is in no folder of .*begin as its root"),
        ({"train.txt": "1.jpg 1.png 5\n"}, "1.jpg is in .*/a/ and in .*/b/. Give one"),
        ({"train.txt": "a/1.jpg a/1.png 5\na/1.jpg a/1.png\n"}, "line 2 is not rgb, depth, focal"),
        ({"train.txt": "a/1.jpg a/1.png 5\nNone a/1.png 5\n"}, "line 2 has no rgb path"),
        ({"x.txt": "a/1.jpg a/1.png 5\n", "train.txt": "a/1.jpg a/1.png 5\n"}, "name tells no split"),
        ({"my_train.txt": "a/1.jpg a/1.png 5\n", "train.txt": "a/1.jpg a/1.png 5\n"}, "of its own"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(lists: dict[str, str], expected: str, tmp_path: Path) -> None:
    for path in ("a/1.jpg", "a/1.png", "b/1.jpg", "b/1.png"):
        write_file(tmp_path / path, b"a picture")
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(WrongSource, match=expected):
        lines_of(tmp_path, "bts")


def test_a_file_that_is_missing_is_a_row_that_fails(tmp_path: Path) -> None:
    put(tmp_path, TRAIN_LINES[:2], "", "")
    write_list(tmp_path / TRAIN, TRAIN_LINES[:2])
    (tmp_path / "bookstore_0001d" / "rgb_00001.jpg").unlink()
    found = converted(tmp_path, tmp_path.parent / f"{tmp_path.name}_out", max_failed=0.5)
    assert sorted(found.column("status").tolist()) == [0, 1]


def test_the_real_list_of_the_official_test_rows_names_rows_of_the_mat(tmp_path: Path) -> None:
    real = shared("rgbd_samples") / "bts" / TEST
    lines = real.read_text().splitlines()
    put(tmp_path, lines[:1], "test", "test")
    write_file(tmp_path / TEST, real.read_bytes())
    found = lines_of(tmp_path, "bts")
    assert len(found) == 654
    assert {line["split"] for line in found} == {"test"}
    assert found[0]["rgb"] == "test/bathroom/rgb_00045.jpg"
    assert all("scene_type" in line and "scene" not in line for line in found)
    numbers = [int(Path(line["rgb"]).stem.removeprefix("rgb_")) for line in found]
    assert (min(numbers), max(numbers)) == (0, 1448)
