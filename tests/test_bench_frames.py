"""The benchmark of conversions of frames: what it makes of the times that it measured."""

import csv
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="needs pillow")

from bench.frames import Run, frames_of, table, write_frames, write_table
from shards.errors import WrongSource


def run(n_rows: int, seconds: float, cpu_s: float = 1.0) -> Run:
    return Run(n_rows=n_rows, seconds=seconds, cpu_s=cpu_s)


def test_the_start_of_a_conversion_is_told_apart_from_its_rows() -> None:
    runs = {
        "imagecodecs": [run(100, 5.0)] * 3,
        "ours": [run(100, 4.0)] * 3,
        "convert": [run(100, 11.0, cpu_s=2.0)] * 3,
        "fewer": [run(20, 3.0, cpu_s=0.8)] * 3,
    }
    *lines, start = table(runs)
    assert [line.split()[:2] for line in lines[1:]] == [
        ["imagecodecs", "20"],
        ["ours", "25"],
        ["convert", "9"],
        ["beyond", "10"],
    ]
    assert [line.split()[3] for line in lines[1:]] == ["10.00", "10.00", "20.00", "15.00"]
    assert [line.split()[4] for line in lines[1:]] == ["1.00", "0.80", "2.20", "2.00"]
    assert start == "start of a conversion: 1.00 (1.00-1.00) s"


def test_lines_are_repeated_where_frames_are_few(tmp_path: Path) -> None:
    write_frames(tmp_path / "rooms", 2)
    frames = frames_of(tmp_path / "rooms", 5)
    write_table(tmp_path / "rooms.csv", frames)
    with open(tmp_path / "rooms.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert found == frames
    assert [row["rgb"] for row in found] == [f"rgb/0000{k % 2}.jpg" for k in range(5)]
    assert all((tmp_path / "rooms" / row["depth"]).is_file() for row in found)


def test_a_folder_without_frames_is_told(tmp_path: Path) -> None:
    (tmp_path / "rgb").mkdir()
    (tmp_path / "depth").mkdir()
    with pytest.raises(WrongSource):
        frames_of(tmp_path, 5)
