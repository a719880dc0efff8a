"""Directories of a known layout: which pictures are one frame, and what is said of the others."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.frames import (
    AS_IS,
    convert_frames,
    converted,
    lines_of,
    made_up_rooms,
    picture_of,
    read_csv,
    stored,
    write_file,
    write_frames_of,
    write_table,
)
from helpers.sets import shard_bytes

from convert.__main__ import main
from convert.sample_frames import npy, png
from convert.sources.folder_names import FOLDERS
from convert.sources.layouts import LAYOUTS, layout_of
from convert.sources.layouts_frames import list_frames
from convert.sources.listings import Wanted
from convert.sources.opening import OF_DIRECTORIES, SourceOptions
from shards.dataset import ShardSet
from shards.errors import WrongSource
from shards.spec import SPLITS


def put(folder: Path, *paths: str) -> Path:
    """Pictures at these paths, each another one; depths and rgb of them of one size."""
    for number, path in enumerate(paths):
        field = "rgb" if re.search(r"(^|/)(rgb|images?|colou?r)/", path) else "depth"
        encode = npy if path.endswith(".npy") else png
        write_file(folder / path, encode(picture_of(number)[field]))
    return folder


# ---------------------------------------------------------------- which pictures are one frame


def test_pictures_of_equal_names_are_one_frame_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "rgb/b.jpg", "rgb/a.png", "depth/a.png", "depth/b.npy", "label/b.png")
    assert lines_of(tmp_path, "frames") == [
        {"rgb": "rgb/a.png", "depth": "depth/a.png", "label": ""},
        {"rgb": "rgb/b.jpg", "depth": "depth/b.npy", "label": "label/b.png"},
    ]


@pytest.mark.parametrize(
    ("field", "name"), [(field, name) for field, names in FOLDERS.items() for name in names]
)
def test_every_name_that_people_give_a_folder_is_understood(
    field: str, name: str, tmp_path: Path
) -> None:
    put(tmp_path, f"{name}/1.png", *(["rgb/1.png"] if field != "rgb" else []))
    assert lines_of(tmp_path, "frames")[0][field] == f"{name}/1.png"


def test_two_folders_of_one_field_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "images/1.png")
    with pytest.raises(WrongSource, match=r"has rgb/ and images/, both of rgb\. Keep one"):
        list_frames(tmp_path, Wanted())


def test_further_fields_lie_in_a_folder_of_their_name(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "thermal/1.png", "other/1.png")
    assert lines_of(tmp_path, "frames", {"thermal": "grey"}) == [
        {"rgb": "rgb/1.png", "thermal": "thermal/1.png"}
    ]


@pytest.mark.parametrize("path", ["rgb/1.png", "1.png"])
def test_a_further_field_without_pictures_is_refused(path: str, tmp_path: Path) -> None:
    put(tmp_path, path)
    (tmp_path / "thermal").mkdir()
    with pytest.raises(WrongSource, match=r"has no pictures in thermal/\. A further field lies"):
        list_frames(tmp_path, Wanted(kinds={"thermal": "grey"}))


def test_places_are_the_folders_inside(tmp_path: Path) -> None:
    put(tmp_path, "rgb/kitchen/a/1.png", "rgb/kitchen/b/1.png", "rgb/2.png")
    found = {line["rgb"]: line["scene"] for line in lines_of(tmp_path, "frames")}
    assert found == {
        "rgb/2.png": "",
        "rgb/kitchen/a/1.png": "kitchen/a",
        "rgb/kitchen/b/1.png": "kitchen/b",
    }


@pytest.mark.parametrize(
    "paths",
    [
        ("train/rgb/x/1.png", "train/depth/x/1.png", "test/rgb/y/1.png", "test/depth/y/1.png"),
        ("rgb/train/x/1.png", "depth/train/x/1.png", "rgb/test/y/1.png", "depth/test/y/1.png"),
        ("Training/rgb/x/1.png", "Training/depth/x/1.png", "testing/rgb/y/1.png", "testing/depth/y/1.png"),
    ],
    ids=["outside", "inside", "other words"],
)  # fmt: skip
def test_split_folders_may_stand_outside_or_inside(paths: tuple[str, ...], tmp_path: Path) -> None:
    lines = lines_of(put(tmp_path, *paths), "frames")
    assert {line["rgb"]: (line["split"], line["scene"]) for line in lines} == {
        paths[0]: ("train", "x"),
        paths[2]: ("test", "y"),
    }
    assert [line["depth"] for line in lines] == [paths[3], paths[1]] or [
        line["depth"] for line in lines
    ] == [paths[1], paths[3]]


def test_equal_names_in_two_splits_are_two_frames(tmp_path: Path) -> None:
    put(tmp_path, "train/rgb/1.png", "train/depth/1.png", "val/rgb/1.png", "val/depth/1.png")
    lines = lines_of(tmp_path, "frames")
    assert [(line["split"], line["depth"]) for line in lines] == [
        ("train", "train/depth/1.png"),
        ("val", "val/depth/1.png"),
    ]


def test_one_name_in_two_file_types_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "rgb/a.jpg", "rgb/a.png", "depth/a.png")
    with pytest.raises(WrongSource, match=r"has rgb/a.jpg and rgb/a.png, of one name. Keep one"):
        list_frames(tmp_path, Wanted())


def test_what_is_hidden_or_no_picture_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "depth/1.png")
    for name in (".DS_Store", "._1.png", ".cache/2.png", "Thumbs.db", "notes.txt", "1.png.part"):
        write_file(tmp_path / "rgb" / name, b"no picture")
    assert len(lines_of(tmp_path, "frames")) == 1


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "depth/1.png")
    (tmp_path / "rgb" / "again").symlink_to(tmp_path)
    assert len(lines_of(tmp_path, "frames")) == 1


def test_a_link_to_nowhere_is_a_row_that_fails(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "depth/1.png")
    (tmp_path / "rgb" / "2.png").symlink_to(tmp_path / "nowhere.png")
    found = converted(tmp_path, tmp_path / "out", max_failed=0.5)
    assert sorted(found.column("status").tolist()) == [0, 1]


# ---------------------------------------------------------------- what is said


def test_depths_without_rgb_and_rgb_without_depth_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = put(
        tmp_path / "room", "rgb/1.png", "rgb/2.png", "depth/1.png", "depth/3.png", "depth/4.png"
    )
    found = converted(folder, tmp_path / "out")
    assert found.n_rows == 2
    errors = capsys.readouterr().err
    assert f"{folder}: 1 frames have no depth, such as 2" in errors
    assert f"{folder}: 2 pictures of depth have no rgb, such as 3, 4: left out" in errors

    assert main(["table", str(folder), "--out", str(tmp_path / "rows.csv")]) == 0
    assert "2 pictures of depth have no rgb" in capsys.readouterr().err


def test_no_pair_at_all_is_told_with_a_name_of_each(tmp_path: Path) -> None:
    put(tmp_path, "rgb/0001_rgb.png", "depth/0001_depth.png")
    expected = r"has no depth of the name of an rgb picture, such as depth/0001_depth.png and rgb/0001_rgb.png"
    with pytest.raises(WrongSource, match=expected):
        list_frames(tmp_path, Wanted())


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ((), "is no directory of a known layout"),
        (("kitchen/1.png",), "is no directory of a known layout"),
        (("depth/1.png",), "is no directory of a known layout"),
        (("rgb/notes.txt",), "has no pictures in rgb/"),
    ],
)
def test_a_directory_that_is_none_is_one_line(
    paths: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    put(tmp_path, *paths)
    with pytest.raises(WrongSource, match=expected):
        list_frames(tmp_path, Wanted())


def test_a_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png")
    try:
        os.rename(tmp_path / "rgb" / "1.png", os.fsencode(tmp_path) + b"/rgb/\xff.png")
    except OSError as error:
        pytest.skip(f"this file system has no such names: {error}")
    with pytest.raises(WrongSource, match="has a file called"):
        list_frames(tmp_path, Wanted())


def test_a_stamp_differs_once_a_file_was_added_changed_or_removed(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "rgb/2.png", "depth/1.png")
    stamps = [list_frames(tmp_path, Wanted()).stamp]
    assert list_frames(tmp_path, Wanted()).stamp == stamps[0]
    write_file(tmp_path / "rgb/3.png", png(picture_of(3)["rgb"]))
    stamps.append(list_frames(tmp_path, Wanted()).stamp)
    os.utime(tmp_path / "rgb/1.png", ns=(1, 1))
    stamps.append(list_frames(tmp_path, Wanted()).stamp)
    (tmp_path / "depth/1.png").write_bytes(b"shorter")
    stamps.append(list_frames(tmp_path, Wanted()).stamp)
    (tmp_path / "rgb/2.png").unlink()
    stamps.append(list_frames(tmp_path, Wanted()).stamp)
    assert len(set(stamps)) == len(stamps)


def test_another_size_of_a_file_is_another_source(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "depth/1.png")
    before = list_frames(tmp_path, Wanted()).table.sha256
    os.utime(tmp_path / "rgb/1.png", ns=(1, 1))
    assert list_frames(tmp_path, Wanted()).table.sha256 == before
    (tmp_path / "rgb/1.png").write_bytes(b"shorter")
    assert list_frames(tmp_path, Wanted()).table.sha256 != before


# ---------------------------------------------------------------- converted


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Frames in two splits and three places."""
    folder = tmp_path / "room"
    for number in range(9):
        split = "train" if number < 6 else "val"
        for field, picture in picture_of(number).items():
            path = f"{split}/{field}/place {number // 3}/{number}, of 9.png"
            write_file(folder / path, png(picture))
    return folder


def test_a_directory_gives_the_set_of_its_own_table(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_directory = convert_frames(room, tmp_path / "a", AS_IS)
    capsys.readouterr()
    assert main(["table", str(room), "--out", str(tmp_path / "rows.csv")]) == 0
    done = capsys.readouterr()
    assert done.out.strip() == str(tmp_path / "rows.csv")
    assert f"9 rows; convert them with --root {room}" in done.err

    words = ["run", tmp_path / "rows.csv", "--root", room, "--out", tmp_path / "b"]
    words += ["--size", 8, "--rows-per-shard", 4]
    assert main([str(word) for word in words]) == 0
    of_table = Path(capsys.readouterr().out.strip())
    assert of_table.name.startswith("rows-8-")
    assert of_directory.name.startswith("room-8-")
    assert shard_bytes(of_table) == shard_bytes(of_directory)


def test_a_directory_converts_with_its_splits_places_and_pixels(room: Path, tmp_path: Path) -> None:
    found = converted(room, tmp_path / "out")
    assert [SPLITS[k] for k in found.column("split")] == ["train"] * 6 + ["val"] * 3
    assert found.manifest.scenes == ("place 0", "place 1", "place 2")
    for row in range(9):
        number = int(Path(found.column("rgb_file")[row]).stem.split(",")[0])
        np.testing.assert_array_equal(stored(found, "depth")[row], picture_of(number)["depth"])
        assert found.manifest.scenes[found.column("scene")[row]] == f"place {number // 3}"


def test_without_splits_places_are_dealt(tmp_path: Path) -> None:
    paths = [f"rgb/place {k // 4}/{k}.png" for k in range(40)]
    found = converted(put(tmp_path / "room", *paths), tmp_path / "out")
    places = found.column("scene")
    split = found.column("split")
    assert {SPLITS[k] for k in np.unique(split)} == {"train", "val", "test"}
    for place in np.unique(places):
        assert len(np.unique(split[places == place])) == 1
    assert found.settings.split_by == "scene"


def test_what_was_dealt_is_said_where_it_is_not_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"rgb/place {k // 4}/{k}.png" for k in range(12)]
    converted(put(tmp_path / "room", *paths), tmp_path / "out")
    assert "dealt by scene: 33 % train, 33 % val, 33 % test" in capsys.readouterr().err


@pytest.mark.parametrize("slash", ["/", "\\"], ids=["as Unix", "as Windows"])
def test_a_table_without_scenes_takes_the_folders_of_its_pictures_as_places(
    slash: str, tmp_path: Path
) -> None:
    rows = write_frames_of(tmp_path, 4)
    for number, row in enumerate(rows):
        moved = f"rgb/place {number % 2}/{number}.png"
        write_file(tmp_path / moved, (tmp_path / row["rgb"]).read_bytes())
        row["rgb"] = moved.replace("/", slash)
    found = converted(write_table(tmp_path / "t.csv", rows), tmp_path / "out")
    assert found.manifest.scenes == ("rgb/place 0", "rgb/place 1")


def test_a_place_in_two_splits_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_frames_of(tmp_path, 4, scene="hall")
    for number, row in enumerate(rows):
        row["split"] = "train" if number else "test"
    found = converted(write_table(tmp_path / "t.csv", rows), tmp_path / "out")
    assert found.dataset.warnings == ("1 places are in more than one split, such as hall",)
    assert "such as hall" in capsys.readouterr().err


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_rooms(tmp_path_factory.mktemp("sample"), 8)


def test_the_made_up_directory_is_of_this_layout_and_its_table_names_the_same_files(
    made_up: Path, tmp_path: Path
) -> None:
    lines = lines_of(made_up, "frames")
    named = read_csv(made_up / "rows.csv")
    fields = ("rgb", "depth", "label")
    assert [[line[field] for field in fields] for line in lines] == [
        [row[field] for field in fields] for row in named
    ]
    found: ShardSet = converted(made_up, tmp_path)
    assert not found.column("status").any()


def test_a_folder_that_holds_pictures_itself_is_a_table_of_rgb_alone(tmp_path: Path) -> None:
    """And says which folders it does not look into."""
    (tmp_path / "more").mkdir()
    for name in ("a.jpg", "a.png", ".hidden.png", "notes.txt", "more/b.png"):
        (tmp_path / name).write_bytes(b"bytes")
    listing = list_frames(tmp_path, Wanted())
    assert list(listing.table.paths) == ["rgb"]
    assert list(listing.table.paths["rgb"]) == ["a.jpg", "a.png"]
    assert listing.notes == ("1 folders are not looked into, such as more/: put all into rgb/",)


def test_pictures_that_lie_in_the_folder_itself_are_paired_with_a_folder_of_depth(
    tmp_path: Path,
) -> None:
    (tmp_path / "depth").mkdir()
    for name in ("a.jpg", "b.jpg", "depth/a.png"):
        (tmp_path / name).write_bytes(b"bytes")
    table = list_frames(tmp_path, Wanted()).table
    assert list(table.paths["rgb"]) == ["a.jpg", "b.jpg"]
    assert list(table.paths["depth"]) == ["depth/a.png", ""]


# ---------------------------------------------------------------- which layout


def test_every_layout_has_a_name_on_the_command_line() -> None:
    assert set(LAYOUTS) == set(OF_DIRECTORIES)


def test_a_directory_that_looks_like_none_in_particular_is_one_of_frames(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "depth/1.png")
    write_file(tmp_path / "notes.txt", b"bought a lamp 5\n")
    assert layout_of(tmp_path) == "frames"
    assert layout_of(tmp_path, "tum") == "tum"


def test_a_directory_that_looks_like_two_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "rgb/1.png", "depth/1.png")
    write_file(tmp_path / "train.txt", b"rgb/1.png depth/1.png 518.8579\n")
    assert main(["run", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert said == f"--layout auto: {tmp_path} may be bts or frames: choose one of them"
    chosen = converted(tmp_path, tmp_path / "out", options=SourceOptions(layout="bts"))
    assert chosen.n_rows == 1


def test_what_lies_beside_the_pictures_does_not_disturb_recognition(tmp_path: Path) -> None:
    put(tmp_path, "rgb/1.png", "depth/1.png", "more/rgb/1.png")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "scene0000_00").symlink_to(tmp_path / "nothing")
    write_file(tmp_path / "binary.txt", bytes(range(256)))
    write_file(tmp_path / "rgb.txt", b"\xff\xfe1 rgb/1.png")
    (tmp_path / "closed").mkdir(mode=0)
    assert layout_of(tmp_path) == "frames"


@pytest.mark.parametrize("layout", ["scannet", "nyu_raw"])
def test_a_file_is_no_directory_of_a_layout(layout: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", write_frames_of(tmp_path, 1))
    with pytest.raises(WrongSource, match=f"is a file, and {layout} a layout of directories"):
        converted(table, tmp_path / "out", options=SourceOptions(layout=layout))


@pytest.mark.parametrize("layout", ["auto", *OF_DIRECTORIES])
def test_the_table_of_what_is_not_there_is_one_line(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--layout", layout, "--out", str(tmp_path / "t.csv")]
    assert main(["table", str(tmp_path / "nothing"), *words]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'nothing'} is not there\n"


def test_a_table_has_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t.csv", write_frames_of(tmp_path, 1))
    assert main(["table", str(table), "--out", str(tmp_path / "u.csv")]) == 2
    assert capsys.readouterr().err == f"{table} is no directory\n"


@pytest.mark.parametrize("layout", [name for name in OF_DIRECTORIES if name != "frames"])
def test_layouts_without_further_fields_say_so(layout: str, tmp_path: Path) -> None:
    with pytest.raises(WrongSource, match="has no thermal in its layout"):
        lines_of(tmp_path, layout, {"thermal": "grey"})


@pytest.mark.parametrize("layout", OF_DIRECTORIES)
def test_an_empty_directory_is_none_of_any_layout(layout: str, tmp_path: Path) -> None:
    assert not LAYOUTS[layout].is_one(tmp_path)
    with pytest.raises(WrongSource):
        lines_of(tmp_path, layout)


def test_fields_that_are_not_wanted_are_not_looked_at(tmp_path: Path) -> None:
    for name in ("rgb/a.jpg", "rgb/a.png", "depth/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"bytes")
    with pytest.raises(WrongSource, match="of one name"):
        list_frames(tmp_path, Wanted())
    assert list_frames(tmp_path, Wanted(known=["rgb"])).table.n_rows == 2
