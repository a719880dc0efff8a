"""The raw recordings of NYU Depth v2: which pictures are a frame, and what is left out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from helpers.frames import (
    AS_IS,
    Row,
    by_line,
    converted,
    lines_of,
    picture_of,
    raw_pgm,
    stored_pixels,
    write_file,
)
from helpers.sets import shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.__main__ import main
from convert.sample_frames import pnm
from convert.sources.layouts import layout_of
from convert.sources.layouts_nyu_raw import FAULTY, Taken, _nearest
from convert.sources.listings import Found
from convert.sources.opening import SourceOptions
from shards.errors import WrongSource


def readings_of(number: int) -> np.ndarray:
    """(8, 8) of a Kinect, some of them none."""
    readings = np.random.default_rng(number).integers(400, 1080, (8, 8)).astype(np.uint16)
    readings[number % 8, 3] = 2047
    return readings


def put(folder: Path, name: str, number: int = 0) -> Path:
    """A picture of that name."""
    is_rgb = name.startswith("r-")
    data = pnm(picture_of(number)["rgb"]) if is_rgb else raw_pgm(readings_of(number))
    write_file(folder / name, data)
    return folder / name


def names_of(lines: list[Row]) -> list[tuple[str, str]]:
    return [(Path(line["rgb"]).name, Path(line["depth"]).name) for line in lines]


# ---------------------------------------------------------------- pairing


def by_pointers(rgb_s: list[float], depth_s: list[float]) -> list[int]:
    """As the toolbox goes through both lists: on to the next rgb while that is as near or nearer."""
    found = []
    place = 0
    for time_s in depth_s:
        while place + 1 < len(rgb_s):
            if abs(rgb_s[place + 1] - time_s) > abs(rgb_s[place] - time_s):
                break
            place += 1
        found.append(place)
    return found


TIME = st.integers(0, 60).map(float)
RGB_TIMES = st.lists(TIME, min_size=1, max_size=15, unique=True).map(sorted)
DEPTH_TIMES = st.lists(TIME, min_size=1, max_size=15).map(sorted)


@settings(max_examples=80, deadline=None)
@given(RGB_TIMES, DEPTH_TIMES)
def test_every_depth_has_the_rgb_nearest_in_time_and_none_goes_back(
    rgb_s: list[float], depth_s: list[float]
) -> None:
    file = Found("x", 1, 1)
    found = _nearest([Taken(t, file) for t in rgb_s], [Taken(t, file) for t in depth_s])
    assert found == by_pointers(rgb_s, depth_s)
    assert found == sorted(found)
    for time_s, k in zip(depth_s, found, strict=True):
        assert abs(rgb_s[k] - time_s) == min(abs(each - time_s) for each in rgb_s)


def test_one_rgb_may_serve_twice_and_one_may_serve_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "kitchen_0028a"
    for name in ("r-10.000000-1.ppm", "r-10.300000-2.ppm", "r-99.000000-3.ppm"):
        put(folder, name)
    for name in ("d-9.900000-5.pgm", "d-10.100000-4.pgm", "d-10.280000-9.pgm"):
        put(folder, name)
    put(folder, "a-10.000000-7.dump")
    assert names_of(lines_of(tmp_path, "nyu_raw")) == [
        ("r-10.000000-1.ppm", "d-9.900000-5.pgm"),
        ("r-10.000000-1.ppm", "d-10.100000-4.pgm"),
        ("r-10.300000-2.ppm", "d-10.280000-9.pgm"),
    ]


# ---------------------------------------------------------------- what is left out


def test_files_that_are_cut_short_or_empty_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the next one is taken; and the one that is known to be faulty, whole or not."""
    folder = tmp_path / "kitchen_0028a"
    put(folder, "r-10.000000-1.ppm")
    put(folder, "r-10.100000-2.ppm")
    cut = put(folder, "r-10.050000-3.ppm")
    cut.write_bytes(cut.read_bytes()[:-1])
    put(folder, "d-10.049000-4.pgm")
    put(folder, "d-11.000000-5.pgm").write_bytes(b"")
    put(folder, "d-12.000000-6.pgm").write_bytes(b"P5 8 8")
    put(folder, FAULTY)
    assert main(["table", str(tmp_path), "--out", str(tmp_path / "t.csv")]) == 0
    assert "4 files are empty, cut short or known to be faulty" in capsys.readouterr().err
    assert names_of(lines_of(tmp_path, "nyu_raw")) == [("r-10.000000-1.ppm", "d-10.049000-4.pgm")]


def test_a_folder_without_one_kind_is_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "attic_0001", "d-10.000000-1.pgm")
    with pytest.raises(WrongSource, match=r"has no folder with r-TIME-ID\.ppm and d-TIME-ID\.pgm"):
        lines_of(tmp_path, "nyu_raw")
    put(tmp_path / "cafe_0001a", "d-10.000000-1.pgm")
    put(tmp_path / "cafe_0001a", "r-10.000000-1.ppm")
    assert main(["table", str(tmp_path), "--out", str(tmp_path / "t.csv")]) == 0
    assert "1 folders have no rgb or no depth, such as attic_0001" in capsys.readouterr().err


# ---------------------------------------------------------------- scenes, and what is stored


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Two recordings of a test scene, one of a train scene, one of none of NYU's."""
    folder = tmp_path / "raw"
    names = ("bookstores/bookstore_0001d", "bookstores/bookstore_0001j", "kitchen_0028a", "attic")
    for number, name in enumerate(names):
        put(folder / name, f"r-10.{number}00000-1.ppm", number)
        put(folder / name, f"d-10.{number}10000-1.pgm", number)
    return folder


def test_recordings_of_one_scene_are_one_place_in_its_official_split(recordings: Path) -> None:
    lines = {line["rgb"].split("/")[-2]: line for line in lines_of(recordings, "nyu_raw")}
    facts = {
        folder: (line["scene"], line.get("scene_type", ""), line["split"])
        for folder, line in lines.items()
        if folder != "attic"
    }
    assert facts == {
        "bookstore_0001d": ("bookstore_0001", "bookstore", "test"),
        "bookstore_0001j": ("bookstore_0001", "bookstore", "test"),
        "kitchen_0028a": ("kitchen_0028", "kitchen", "train"),
    }
    assert lines["attic"]["scene"] == "attic"


def test_readings_become_millimetres_and_that_depth_is_not_registered_is_kept(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert layout_of(recordings) == "nyu_raw"
    found = converted(recordings, tmp_path / "a")
    said = capsys.readouterr().err
    assert "depth is not registered to rgb" in said
    assert "depth is not registered to rgb" in found.dataset.warnings[0]
    for row, path in enumerate(found.column("depth_file")):
        number = int(Path(path).name[5])
        readings = readings_of(number).astype(np.float64)
        expected = np.rint(351_300 / (1092.5 - readings))
        expected[(expected < 0) | (expected > 10_000)] = 0
        np.testing.assert_array_equal(np.concatenate(found.shards("depth"))[row], expected)

    assert main(["table", str(recordings), "--out", str(tmp_path / "t.csv")]) == 0
    options = SourceOptions(roots=(str(recordings),))
    of_table = converted(tmp_path / "t.csv", tmp_path / "b", options=options)
    assert shard_bytes(of_table.path) == shard_bytes(found.path)


def test_a_real_frame_of_nyu_is_paired_and_read_in_its_own_byte_order(tmp_path: Path) -> None:
    real = shared("rgbd_samples") / "open3d" / "other_formats"
    folder = tmp_path / "raw" / "basement_0001a"
    write_file(folder / "r-1316653580.471513-1.ppm", (real / "NYU_color.ppm").read_bytes())
    write_file(folder / "d-1316653580.484909-2.pgm", (real / "NYU_depth.pgm").read_bytes())
    found = converted(tmp_path / "raw", tmp_path / "out", replace(AS_IS, size=640))
    mm = stored_pixels(by_line(found, "depth")[0], (480, 640))
    assert mm[240, 320] == 3042  # the reading 977
    assert found.manifest.scenes == ("basement_0001",)
