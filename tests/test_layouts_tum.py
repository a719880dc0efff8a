"""Recordings as TUM's: which pictures are a frame, from lists of every kind, and what is stored."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from helpers.frames import (
    AS_IS,
    by_line,
    converted,
    image_at,
    lines_of,
    picture_of,
    stored_pixels,
    write_file,
)
from helpers.sets import shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.__main__ import main
from convert.sample_frames import png
from convert.sample_tum import FRAMES_A_RECORDING, place_of, write_tum
from convert.sources.layouts import layout_of
from convert.sources.opening import SourceOptions
from convert.sources.timed_lists import MOST_S, Pair, associated, read_pairs
from shards.errors import WrongSetting, WrongSource

START_S = 1305031102


def recording(folder: Path, rgb_ms: list[int], depth_ms: list[int], lists: bool = True) -> Path:
    """Pictures of 8x8 taken so many milliseconds after the start, and their lists."""
    lines: dict[str, list[str]] = {"rgb": ["# color images"], "depth": ["# depth maps", ""]}
    for field, times_ms in (("rgb", rgb_ms), ("depth", depth_ms)):
        for number, ms in enumerate(times_ms):
            time = f"{START_S + ms / 1000:.6f}"
            write_file(folder / field / f"{time}.png", png(picture_of(number)[field]))
            lines[field].append(f"{time} {field}/{time}.png")
        if lists:
            (folder / f"{field}.txt").write_text("\n".join(lines[field]) + "\n")
    return folder


def path_at(field: str, ms: int) -> str:
    return f"{field}/{START_S + ms / 1000:.6f}.png"


# ---------------------------------------------------------------- pairing


def plainly_associated(rgb: Mapping[float, str], depth: Mapping[float, str]) -> list[Pair]:
    """The closest two of all that are left, again and again."""
    free_rgb = set(rgb)
    free_depth = set(depth)
    pairs = []
    while True:
        near = [(abs(a - b), a, b) for a in free_rgb for b in free_depth if abs(a - b) < MOST_S]
        if not near:
            return sorted(pairs, key=lambda pair: pair.time_s)
        _, a, b = min(near)
        free_rgb.remove(a)
        free_depth.remove(b)
        pairs.append(Pair(a, rgb[a], depth[b]))


TIMES = st.lists(st.integers(0, 120).map(lambda ms: START_S + ms / 1000), max_size=12, unique=True)


@settings(max_examples=60, deadline=None)
@given(TIMES, TIMES, st.randoms())
def test_pairs_are_the_closest_first_each_picture_once_in_any_order_of_lines(
    rgb_s: list[float], depth_s: list[float], random: np.random.Generator
) -> None:
    rgb = {time: f"rgb/{time}" for time in rgb_s}
    depth = {time: f"depth/{time}" for time in depth_s}
    pairs = associated(rgb, depth)
    assert pairs == plainly_associated(rgb, depth)
    assert len({pair.depth for pair in pairs}) == len({pair.rgb for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert abs(pair.time_s - float(pair.depth.removeprefix("depth/"))) < MOST_S
    random.shuffle(depth_s)
    random.shuffle(rgb_s)
    again = associated({t: rgb[t] for t in rgb_s}, {t: depth[t] for t in depth_s})
    assert again == pairs


def test_the_closest_pair_comes_first_and_not_the_first_line(tmp_path: Path) -> None:
    """rgb at 0 is 15 ms from the depth, rgb at 20 is 5: the first one stays alone."""
    folder = recording(tmp_path / "desk", [0, 20, 100], [15, 119, 200])
    assert [(line["rgb"], line["depth"]) for line in lines_of(folder, "tum")] == [
        (path_at("rgb", 20), path_at("depth", 15)),
        (path_at("rgb", 100), path_at("depth", 119)),
    ]


def test_pictures_without_a_partner_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recording(tmp_path / "desk", [0, 50], [10, 500, 600])
    assert main(["table", str(folder), "--out", str(tmp_path / "t.csv")]) == 0
    said = capsys.readouterr().err
    assert "1 pictures of rgb and 2 of depth have no partner less than 0.02 s apart" in said


# ---------------------------------------------------------------- lists


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 9999)), min_size=1), st.booleans())
def test_a_list_of_pairs_reads_the_same_in_either_order(
    tmp_path_factory: pytest.TempPathFactory, pairs_ms: list[tuple[int, int]], is_first: bool
) -> None:
    path = tmp_path_factory.mktemp("list") / "associations.txt"
    lines = ["# a comment", ""]
    for rgb_ms, depth_ms in pairs_ms:
        rgb = f"{rgb_ms / 1000} rgb/{rgb_ms}.png"
        depth = f"{depth_ms / 1000}\tdepth/{depth_ms}.png "
        lines.append(f"{rgb} {depth}" if is_first else f"{depth}  {rgb}")
    path.write_text("\n".join(lines))
    assert read_pairs(path) == [
        Pair(rgb_ms / 1000, f"rgb/{rgb_ms}.png", f"depth/{depth_ms}.png")
        for rgb_ms, depth_ms in pairs_ms
    ]


@pytest.mark.parametrize("name", ["associations.txt", "my pairs.txt"])
@pytest.mark.parametrize("is_first", [True, False], ids=["rgb first", "depth first"])
def test_a_list_of_pairs_counts_whatever_the_times_are(
    name: str, is_first: bool, tmp_path: Path
) -> None:
    folder = recording(tmp_path / "desk", [0, 100], [900, 1900])
    cells = [f"0 {path_at('rgb', 100)}", f"7 {path_at('depth', 900)}"]
    (folder / name).write_text(" ".join(cells if is_first else cells[::-1]) + "\n")
    assert lines_of(folder, "tum") == [
        {
            "rgb": path_at("rgb", 100),
            "depth": path_at("depth", 900),
            "scene": "desk",
            "depth_encoding": "tum",
        }
    ]


def test_a_list_of_pairs_is_a_table_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --layout tum its depths have the unit that is given."""
    folder = recording(tmp_path / "desk", [0, 100], [10, 110], lists=False)
    path = folder / "pairs.txt"
    lines = [f"{ms} {path_at('depth', ms + 10)} {ms} {path_at('rgb', ms)}\n" for ms in (0, 100)]
    path.write_text("".join(lines))
    found = converted(path, tmp_path / "a")
    for line in range(2):
        np.testing.assert_array_equal(by_line(found, "depth")[line], picture_of(line)["depth"])
        rgb = by_line(found, "rgb")[line]
        np.testing.assert_array_equal(rgb.transpose(1, 2, 0), picture_of(line)["rgb"])

    of_layout = converted(path, tmp_path / "b", options=SourceOptions(layout="tum"))
    assert of_layout.manifest.scenes == ("desk",)
    for line in range(2):
        expected = np.rint(picture_of(line)["depth"] / 5)
        np.testing.assert_array_equal(by_line(of_layout, "depth")[line], expected)


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"a.txt": "0 rgb/1 0 depth/1\n", "b.txt": "0 depth/1 0 rgb/1\n"}, "has a.txt and b.txt, both"),
        ({"a.txt": "0 left/1 0 right/1\n"}, "line 1 has left/1 and right/1, and which is the depth"),
        ({"a.txt": "0 rgb/1 0 depth/1\n\n1 rgb/2 depth/2\n"}, "line 3 is not time, path, time, path"),
        ({"rgb.txt": "0 rgb/1\n1e999 rgb/2\n", "depth.txt": "0 depth/1\n"}, "line 2 is no time and a path"),
        ({"rgb.txt": "0 rgb/1\nx rgb/2\n", "depth.txt": "0 depth/1\n"}, "line 2 is no time and a path"),
        ({"rgb.txt": "0 rgb/1\n", "depth.txt": "5 depth/1\n"}, "has no rgb and depth less than 0.02 s"),
        ({"rgb.txt": "0 rgb/1\n"}, "has no rgb.txt and depth.txt, nor a list of pairs"),
        ({"rgb.txt": "0 rgb/1\n\xff", "depth.txt": "0 depth/1\n"}, "line 2 is not UTF-8"),
    ],
)  # fmt: skip
def test_lists_that_are_wrong_are_one_line(
    lists: dict[str, str], expected: str, tmp_path: Path
) -> None:
    for name, text in lists.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(WrongSource, match=expected):
        lines_of(tmp_path, "tum")


# ---------------------------------------------------------------- several recordings


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "rooms"
    write_tum(folder, 3 * FRAMES_A_RECORDING + 2, size_wh=(48, 36))
    return folder


def test_the_made_up_recordings_have_lists_of_every_kind(rooms: Path) -> None:
    lists = [sorted(path.name for path in folder.glob("*.txt")) for folder in rooms.iterdir()]
    assert sorted(lists) == [["associations.txt"]] * 2 + [["depth.txt", "rgb.txt"]] * 2
    first_folders = {
        path.read_text().split()[1].split("/")[0] for path in rooms.glob("*/associations.txt")
    }
    assert first_folders == {"rgb", "depth"}


def test_the_made_up_recordings_are_recognised_and_each_is_a_place(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert layout_of(rooms) == "tum"
    found = converted(rooms, tmp_path)
    assert found.n_rows == 3 * FRAMES_A_RECORDING + 2
    assert sorted(found.manifest.scenes) == sorted(place_of(k) for k in range(4))
    assert not found.column("status").any()
    said = capsys.readouterr().err
    assert "2 pictures of rgb and 2 of depth have no partner" in said
    assert "a median pixel of depth is" in said
    for row, path in enumerate(found.column("rgb_file")):
        assert path.startswith(found.manifest.scenes[found.column("scene")[row]])
        times = [
            float(Path(name[row]).stem) for name in map(found.column, ("rgb_file", "depth_file"))
        ]
        assert abs(times[0] - times[1]) < MOST_S


def test_a_folder_of_recordings_gives_the_set_of_its_own_table(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_directory = converted(rooms, tmp_path / "a")
    table = tmp_path / "rows.csv"
    assert main(["table", str(rooms), "--layout", "tum", "--out", str(table)]) == 0
    options = SourceOptions(roots=(str(rooms),))
    of_table = converted(table, tmp_path / "b", options=options)
    assert shard_bytes(of_table.path) == shard_bytes(of_directory.path)


def test_an_encoding_that_is_given_counts_and_not_the_layouts(rooms: Path, tmp_path: Path) -> None:
    usual = converted(rooms, tmp_path / "a")
    settings_given = replace(AS_IS, depth_scale=2500.0)
    given_scale = converted(rooms, tmp_path / "b", settings_given)
    depths = [np.concatenate(found.shards("depth")) for found in (usual, given_scale)]
    np.testing.assert_allclose(depths[1], depths[0] * 2.0, atol=1)


def test_pictures_of_equal_names_and_a_list_of_pairs_may_be_either(tmp_path: Path) -> None:
    for field in ("rgb", "depth"):
        write_file(tmp_path / field / "1.png", png(picture_of(1)[field]))
    (tmp_path / "associations.txt").write_text("1 depth/1.png 1 rgb/1.png\n")
    with pytest.raises(WrongSetting, match="may be tum or frames: choose one of them"):
        layout_of(tmp_path)


# ---------------------------------------------------------------- a real pair


def test_a_real_frame_of_tum_is_paired_and_has_5000_a_metre(tmp_path: Path) -> None:
    real = shared("rgbd_samples") / "open3d" / "other_formats"
    folder = tmp_path / "freiburg"
    paths = {"rgb": "rgb/1305031102.175304.png", "depth": "depth/1305031102.160407.png"}
    for field, name in (("rgb", "TUM_color.png"), ("depth", "TUM_depth.png")):
        write_file(folder / paths[field], (real / name).read_bytes())
        time = Path(paths[field]).stem
        (folder / f"{field}.txt").write_text(f"# {field}\n{time} {paths[field]}\n")
    chosen = replace(AS_IS, size=640)
    found = converted(folder, tmp_path / "out", chosen)
    assert list(found.column("depth_file")) == [paths["depth"]]
    mm = stored_pixels(by_line(found, "depth")[0], (480, 640))
    assert mm[240, 320] == 2184  # 10920 in the file
    in_file = np.asarray(image_at(real / "TUM_depth.png")).astype(np.int64)
    np.testing.assert_array_equal(mm, np.rint(in_file / 5))
