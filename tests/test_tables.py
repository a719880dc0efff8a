"""Tables of frames: the forms and names that people have, and what is said of those that are wrong."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.sources import table_lines
from convert.sources.tables import ALIASES, CAMERA, MAX_NAMES, NONE, FrameTable, read_table
from shards.errors import UserError, WrongSource
from shards.spec import SPLITS

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")

from pyarrow import parquet

ROWS = [
    {"rgb": "a/1.jpg", "depth": "a/1.png", "split": "train", "scene": "a", "fx": "518.80"},
    {"rgb": "b/1.jpg", "depth": "", "split": "test", "scene": "b, c", "fx": ""},
    {"rgb": 'b/"2".jpg', "depth": "b/2.png", "split": "val", "scene": "a", "fx": "0500"},
    {"rgb": "a/1.jpg", "depth": "ä/日.png", "split": "train", "scene": "", "fx": "1e3"},
]
NAMES = list(ROWS[0])


def as_csv(rows: list[dict], **how: Any) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), **how)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def without_empty(rows: list[dict]) -> list[dict]:
    return [{name: cell for name, cell in row.items() if cell} for row in rows]


FORMS = {
    "t.csv": as_csv(ROWS),
    "quoted.csv": as_csv(ROWS, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "bom.CSV": b"\xef\xbb\xbf" + as_csv(ROWS),
    "blank lines.csv": as_csv(ROWS).replace(b"\r\n", b"\r\n\r\n"),
    "no end.csv": as_csv(ROWS).rstrip(),
    "t.tsv": as_csv(ROWS, delimiter="\t"),
    "t.jsonl": as_jsonl(ROWS),
    "bom.jsonl": b"\xef\xbb\xbf" + as_jsonl(ROWS),
    "keys missing.ndjson": as_jsonl(without_empty(ROWS)),
    "nulls.jsonl": as_jsonl([{name: row[name] or None for name in NAMES} for row in ROWS]),
    "numbers.jsonl": as_jsonl(ROWS).replace(b'"518.80"', b"518.80").replace(b'"1e3"', b"1e3"),
    "t.parquet": as_parquet(ROWS),
    "nulls.parquet": as_parquet(without_empty(ROWS)),
    "other order.csv": as_csv([{name: row[name] for name in NAMES[::-1]} for row in ROWS]),
    "other names.csv": as_csv(ROWS)
    .replace(b"rgb", b"Image Path", 1)
    .replace(b"scene", b"ROOM", 1)
    .replace(b"depth", b"depth-file-name", 1),
    "further column.csv": as_csv([{"note": "x\ny", **row} for row in ROWS]),
}


def read(folder: Path, name: str, data: bytes | str, **how: Any) -> FrameTable:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_table(path, **{"fields": {}, **how})


def texts(table: FrameTable) -> dict[str, list[str]]:
    return {name: list(paths) for name, paths in table.paths.items()}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_lines_in_any_form_are_the_same_table(name: str, tmp_path: Path) -> None:
    table = read(tmp_path, name, FORMS[name])
    assert table.n_rows == 4
    assert texts(table) == {key: [row[key] for row in ROWS] for key in ("rgb", "depth")}
    assert table.split is not None
    assert [SPLITS[number] for number in table.split] == [row["split"] for row in ROWS]
    assert table.columns["scene"].names == ("a", "b, c")
    assert table.columns["scene"].numbers.tolist() == [0, 1, 0, NONE]
    assert table.camera_px is not None
    assert table.camera_px[:, 0].tolist() == [np.float32(518.8), 0, 500, 1000]
    assert not table.camera_px[:, 1:].any()
    assert table.n_repeated == 2
    assert table.sha256 == read(tmp_path, "reference.csv", as_csv(ROWS)).sha256
    assert table.n_bytes == sum(len(cell.encode()) for row in ROWS for cell in row.values())
    assert table.not_used == (("note",) if name.startswith("further") else ())


def test_the_hash_differs_where_a_text_an_order_or_a_column_does(tmp_path: Path) -> None:
    swapped = [ROWS[1], ROWS[0], *ROWS[2:]]
    moved = [{**row, "rgb": row["rgb"] + "x"} if row is ROWS[0] else row for row in ROWS]
    # The same letters, parted elsewhere.
    shifted = [{**ROWS[0], "rgb": "a/1.jp"}, {**ROWS[1], "rgb": "gb/1.jpg"}, *ROWS[2:]]
    fewer = [{name: row[name] for name in NAMES if name != "fx"} for row in ROWS]
    others = [swapped, moved, shifted, fewer]
    hashes = {read(tmp_path, "t.csv", as_csv(rows)).sha256 for rows in [ROWS, *others]}
    assert len(hashes) == 5


LISTS = {
    "two.txt": ("a b.png\nc d\n", {"rgb": ["a", "c"], "depth": ["b.png", "d"]}),
    "tabs.lst": ("a\tb\r\nc \t d \r\n", {"rgb": ["a", "c"], "depth": ["b", "d"]}),
    "comments.list": (
        "# rgb depth\n\n  a b c#d\n\n#x\n e f g#\n",
        {"rgb": ["a", "e"], "depth": ["b", "f"], "label": ["c#d", "g#"]},
    ),
    "focal.txt": ("a b 518.8\n/c None 7\n", {"rgb": ["a", "/c"], "depth": ["b", ""]}),
    "no header.csv": (
        "a/b.jpg,c/d.png\ne,f\n",
        {"rgb": ["a/b.jpg", "e"], "depth": ["c/d.png", "f"]},
    ),
    "quotes.txt": ('"a" b"\n', {"rgb": ['"a"'], "depth": ['b"']}),
    "header.txt": ("rgb depth\na b\n", {"rgb": ["a"], "depth": ["b"]}),
    "one line.txt": ("a b", {"rgb": ["a"], "depth": ["b"]}),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_without_a_header_is_read(name: str, tmp_path: Path) -> None:
    data, expected = LISTS[name]
    table = read(tmp_path, name, data)
    assert texts(table) == expected
    assert table.not_used == (("focal",) if name.startswith("focal") else ())


def test_bts_list_of_nyu_is_read() -> None:
    table = read_table(shared("rgbd_samples/bts/nyudepthv2_test_files_with_gt.txt"), fields={})
    assert (table.n_rows, table.n_repeated, table.not_used) == (654, 0, ("focal",))
    assert table.paths["rgb"][0] == "bathroom/rgb_00045.jpg"
    assert table.paths["depth"][653] == "study_room/sync_depth_00278.png"


@pytest.mark.parametrize(
    "path",
    [
        "hypersim/metadata_images_split_scene_v1_excerpt.csv",
        "scannet/scannetv2-labels.combined.tsv",
    ],
)
def test_a_table_of_something_else_is_named_with_its_columns(path: str) -> None:
    with pytest.raises(WrongSource, match=r"no column of rgb paths. It has .*, .*; one of rgb, "):
        read_table(shared(f"rgbd_samples/{path}"), fields={})


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ours, name) for ours, names in ALIASES.items() for name in names]
)
def test_every_name_that_people_use_is_understood(ours: str, theirs: str, tmp_path: Path) -> None:
    cells = {"split": "train", "instance_encoding": "class1000", "registered": "yes"}
    cell = (cells | dict.fromkeys(CAMERA, "1")).get(ours, "x")
    row = {theirs.title(): cell} | ({} if ours == "rgb" else {"rgb": "a"})
    table = read(tmp_path, "t.csv", as_csv([row]))
    found = [*table.paths, *table.columns]
    found += ["split"] if table.split is not None else []
    found += ["fx", "fy", "cx", "cy"] if table.camera_px is not None else []
    assert ours in found
    assert table.not_used == ()


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("Train", "train"),
        ("VAL", "val"),
        ("validation", "val"),
        ("valid", "val"),
        (" dev ", "val"),
        ("test", "test"),
    ],
)
def test_a_split_goes_by_its_usual_names(word: str, split: str, tmp_path: Path) -> None:
    table = read(tmp_path, "t.csv", f"rgb,split\na,{word}\n")
    assert table.split is not None
    assert SPLITS[table.split[0]] == split


def test_further_fields_and_columns_are_read_by_name(tmp_path: Path) -> None:
    how = {"fields": {"thermal": "grey", "mask": "id"}, "also": ["Sensor", "scene"]}
    data = "rgb,thermal_file_name,mask,sensor,scene,left\na,t,m,kv1,s,x\n"
    table = read(tmp_path, "t.csv", data, **how)
    assert texts(table) == {"rgb": ["a"], "thermal": ["t"], "mask": ["m"]}
    assert {name: column.names for name, column in table.columns.items()} == {
        "scene": ("s",),
        "Sensor": ("kv1",),
    }
    assert table.not_used == ("left",)


def test_the_exact_name_wins_over_another_one(tmp_path: Path) -> None:
    table = read(tmp_path, "t.csv", "file_name,rgb,image\na,b,c\n")
    assert texts(table) == {"rgb": ["b"]}
    assert table.not_used == ("file_name", "image")


H = "rgb,depth,split\n"
L = "a,b,train\n"
# A name, its bytes, and what is said of it.
WRONG: dict[str, tuple[str, bytes | str, str]] = {
    "utf-16": ("t.csv", (H + L).encode("utf-16"), "is UTF-16, not UTF-8"),
    "utf-16 without its mark": ("t.csv", (H + L).encode("utf-16-le"), "is UTF-16 or UTF-32"),
    "latin-1": ("t.csv", (H + L + "é,b,test\n").encode("latin-1"), "line 3 is not UTF-8 (byte 0"),
    "latin-1 in a list": ("t.txt", b"a b\nc \xe9\n", "line 2 is not UTF-8 (byte 2"),
    "latin-1 further down in jsonl": ("t.jsonl", b'{"rgb":"a"}\n' * 1500 + b'{"rgb":"\xe9"}\n', "line 1501 is not UTF-8"),
    "latin-1 in parquet": ("t.parquet", as_parquet([{"rgb": "aX"}]).replace(b"aX", b"a\xe9"), "is damaged (Invalid UTF8"),
    "an open quote at the end": ("t.csv", "rgb,x\na,b\n" + 'c,"d\n' + "e\n" * 99, "line 3 opens a quote that never"),
    "latin-1 in jsonl": ("t.jsonl", b'{"rgb":"a"}\n{"rgb":"\xe9"}\n', "line 2 is not UTF-8"),
    "a byte 0": ("t.csv", H + L + "a\0,b,train\n", "byte 27 is 0"),
    "a byte 0 further down": ("t.csv", H + L * 999 + "a\0,b,train\n", "line 1001 has a byte 0"),
    "a byte 0 in jsonl": ("t.jsonl", '{"rgb":"a"}\n{"rgb":"\\u0000"}\n', "line 2 has a line break or"),
    "too few cells": ("t.csv", H + L + "a,b\n", "line 3 has 2 cells, the header has 3"),
    "too many cells": ("t.csv", H + "\n" + L + "a,b,train,\n", "line 4 has 4 cells, the header has 3"),
    "ragged tsv": ("t.tsv", "rgb\tdepth\na\n", "line 2 has 1 cell, the header has 2"),
    "ragged list": ("t.txt", "a b\n#\nc d e\n", "line 3 has 3 cells, the first line has 2 (a path"),
    "one path a line": ("t.txt", "scene0\nscene1\n", "has 1 cell in its first line"),
    "paths with blanks": ("t.txt", "a b c d e\n", "has 5 cells in its first line"),
    "times of one kind": ("t.txt", "0.1 rgb/a\n0.2 rgb/b\n", "lists times and the pictures of one kind"),
    "pairs of no kind": ("t.txt", "0.1 a 0.12 b\n", "pairs a with b, and which is the depth is not told"),
    "pairs of one kind": ("t.txt", "0.1 rgb/a 0.12 rgb/b\n", "which is the depth is not told"),
    "an open quote": ("t.csv", H + L + '"a,b,train\n' + L * 9, "line 3 opens a quote that never"),
    "an open quote in a long file": ("t.csv", H + L + '"' + L * 60_000, "line 3 opens a quote"),
    "nothing": ("t.csv", "", "is empty"),
    "blanks": ("t.csv", " \n\n", "is empty"),
    "only a header": ("t.csv", H, "has columns and no lines"),
    "only comments": ("t.txt", "#a\n\n", "has no line but comments"),
    "a column twice": ("t.csv", "rgb,rgb\na,b\n", "has two columns rgb"),
    "two names for one": ("t.csv", "image,file_name\na,b\n", "two columns for rgb: image and file_name"),
    "two that are exact": ("t.csv", "rgb,RGB\na,b\n", "has two columns for rgb: rgb and RGB"),
    "no rgb": ("t.csv", "foo,bar\na,b\n", "no column of rgb paths. It has foo, bar; one of rgb, image"),
    "semicolons": ("t.csv", "rgb;depth\na;b\n", "its cells are parted by another character"),
    "an rgb left out": ("t.csv", H + L + ",b,test\n" * 2, "line 3 has no rgb path (2 lines have none)"),
    "a split of its own": ("t.csv", H + L + "a,b,held\n", "line 3 has held as split. A split is train"),
    "no split": ("t.csv", H + L + "a,b,\n", "line 3 has no split"),
    "a focal length of letters": ("t.csv", "rgb,fx\na,5\nb,5px\n", "line 3 has 5px as fx"),
    "a focal length without end": ("t.csv", "rgb,fx\na,inf\n", "line 2 has inf as fx"),
    "a focal length too large": ("t.csv", "rgb,fx\na,1e99\n", "line 2 has 1e99 as fx"),
    "a path over two lines": ("t.csv", 'rgb,x\na,b\n"c\nd",e\n', "line 4 has a line break"),
    "a long path": ("t.csv", "rgb\na\n" + "b" * 4097 + "\n", "line 3 has 4097 bytes as rgb"),
    "a line without end": ("t.csv", H + "x" * 300_000, "line 2 is longer than 256 KB"),
    "a list without ends": ("t.txt", "a b\n" + "x" * 600_000, "line 2 is longer than 256 KB"),
    "junk": ("t.csv", bytes(range(1, 256)) * 50, "t.csv"),
    "a zip": ("t.csv", b"PK\x03\x04....", "is a zip or a spreadsheet"),
    "gzip": ("t.csv", b"\x1f\x8b\x08", "is compressed"),
    "parquet as csv": ("t.csv", FORMS["t.parquet"], "is a Parquet file under another name"),
    "junk as parquet": ("t.parquet", bytes(range(256)), "is no Parquet file, or damaged"),
    "half a parquet": ("t.parquet", FORMS["t.parquet"][:-9], "is no Parquet file, or damaged"),
    "a damaged parquet": ("t.parquet", FORMS["t.parquet"][:20] + b"zzzzzzzz" + FORMS["t.parquet"][28:], "is damaged"),
    "pictures in parquet": ("t.parquet", as_parquet([{"image": {"bytes": b"x", "path": "a"}}]), "column image holds struct"),
    "bytes in parquet": ("t.parquet", as_parquet([{"rgb": b"x"}]), "column rgb holds binary, not texts"),
    "an empty cell in parquet": ("t.parquet", as_parquet([{"rgb": "a"}, {"rgb": None}]), "row 1 has no rgb"),
    "no rows in parquet": ("t.parquet", as_parquet(ROWS[:1])[:0], "is no Parquet file"),
    "another suffix": ("t.xlsx", "a", "is no table that is known"),
    "no object": ("t.jsonl", '{"rgb":"a"}\n["rgb"]\n', 'line 2 is no JSON object but ["rgb"]'),
    "half an object": ("t.jsonl", '{"rgb":"a"}\n{"rgb":"b"\n', "line 2 is no JSON object (Expecting"),
    "two objects a line": ("t.jsonl", '{"rgb":"a"}{"rgb":"b"}\n', "line 1 is no JSON object (Extra"),
    "two objects a line, late": ("t.jsonl", '{"rgb":"a"}\n' * 1500 + '{"rgb":"a"}{"rgb":"b"}\n', "line 1501 is no JSON object"),
    "an object over two lines": ("t.jsonl", '{"rgb":\n"a"}\n', "line 1 is no JSON object"),
    "a key twice": ("t.jsonl", '{"rgb":"a"}\n{"rgb":"b","rgb":"c"}\n', "line 2 names a key twice"),
    "values inside": ("t.jsonl", '{"rgb":{"path":"a"}}\n', "line 1 has a value with values in it as rgb"),
    "true": ("t.jsonl", '{"rgb":"a"}\n{"rgb":true}\n', "line 2 has true or false as rgb"),
    "half a character": ("t.jsonl", '{"rgb":"\\ud800"}\n', "line 1 has half a character in rgb"),
    "no number": ("t.jsonl", '{"rgb":"a","fx":NaN}\n', "line 1 is no JSON object (NaN is no JSON)"),
    "a deep one": ("t.jsonl", "[" * 99_999, "line 1 is no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_said_in_one_line_with_its_line(case: str, tmp_path: Path) -> None:
    name, data, said = WRONG[case]
    with pytest.raises(WrongSource) as caught:
        read(tmp_path, name, data)
    message = str(caught.value)
    assert said in message
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message
    assert len(message) < 600


def test_a_field_or_column_that_is_asked_for_and_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongSource, match=r"has no column thermal. It has rgb, x$"):
        read(tmp_path, "t.csv", "rgb,x\na,b\n", fields={"thermal": "grey"})
    with pytest.raises(WrongSource, match=r"has no column sensor. It has rgb, x$"):
        read(tmp_path, "t.csv", "rgb,x\na,b\n", also=["sensor"])


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name, said in (
        ("folder.csv", "not a file"),
        ("pipe.csv", "not a file"),
        ("x.csv", "not there"),
    ):
        with pytest.raises(WrongSource, match=f"is {said}"):
            read_table(tmp_path / name, fields={})


def test_a_column_of_too_many_values_is_refused_before_it_takes_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"a,{k}\n" for k in range(2000))
    assert len(read(tmp_path, "t.csv", "rgb,scene\n" + lines).columns["scene"].names) == 2000
    monkeypatch.setattr("convert.sources.tables.MAX_NAMES", 1000)
    with pytest.raises(WrongSource, match="too many different values of scene"):
        read(tmp_path, "t.csv", "rgb,scene\n" + lines)
    assert MAX_NAMES < NONE


def test_keys_that_only_later_lines_have_are_columns_too(tmp_path: Path) -> None:
    rows = [{"rgb": f"{k}"} for k in range(3000)] + [{"rgb": "x", "depth": "d", "fx": 5, "y": [1]}]
    table = read(tmp_path, "t.jsonl", as_jsonl(rows))
    assert table.n_rows == 3001
    assert list(table.paths["rgb"]) == [row["rgb"] for row in rows]
    assert table.paths["depth"][3000] == "d"
    assert table.paths["depth"].offsets[-1] == 1
    assert table.camera_px is not None
    assert table.camera_px[3000, 0] == 5
    assert table.not_used == ("y",)


def test_values_that_nothing_uses_may_be_anything(tmp_path: Path) -> None:
    rows = [{"rgb": "a", "objects": {"bbox": [[1, 2]]}, "ok": True, "when": "2014-12-18"}] * 3
    table = read(tmp_path, "t.jsonl", as_jsonl(rows))
    assert table.n_rows == 3
    assert table.not_used == ("objects", "ok", "when")
    mixed = [{"rgb": "a", "x": 1}] * 3000 + [{"rgb": "a", "x": {"y": "z"}}]
    assert read(tmp_path, "t.jsonl", as_jsonl(mixed)).n_rows == 3001


def test_no_type_is_guessed(tmp_path: Path) -> None:
    rows = [
        {"rgb": "0001", "depth": "2014-12-18", "scene": "1.0"},
        {"rgb": "NA", "depth": "null", "scene": "01"},
    ]
    for name, data in (("t.csv", as_csv(rows)), ("t.jsonl", as_jsonl(rows))):
        table = read(tmp_path, name, data)
        assert texts(table) == {"rgb": ["0001", "NA"], "depth": ["2014-12-18", "null"]}
        assert table.columns["scene"].names == ("1.0", "01")


@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.jsonl", "t.parquet"])
def test_a_table_of_many_blocks_has_no_seam(name: str, tmp_path: Path) -> None:
    n_rows = 50_000
    rows = [{"rgb": f"räume/{k % 49_999:09d}.jpg", "depth": f"d/{k}.png"} for k in range(n_rows)]
    lines = "".join(f"{row['rgb']} {row['depth']}\n" for row in rows)
    data = {
        "csv": as_csv,
        "jsonl": as_jsonl,
        "parquet": as_parquet,
        "txt": lambda _: lines.encode(),
    }
    table = read(tmp_path, name, data[name[2:]](rows))
    assert table.n_rows == n_rows
    assert texts(table) == {key: [row[key] for row in rows] for key in ("rgb", "depth")}
    assert table.n_repeated == 2
    table.paths["rgb"].take(np.array([49_999]))
    assert not table.paths["rgb"].utf8.flags.writeable


CELLS = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\x85"),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(CELLS.map(lambda text: "r" + text), CELLS, CELLS), min_size=1, max_size=5),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([(",", "csv"), ("\t", "tsv")]),
)
def test_cells_are_what_the_csv_module_reads(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    quoting: Any,
    end: str,
    form: tuple[str, str],
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=form[0], quoting=quoting, lineterminator=end)
    writer.writerows([("rgb", "depth", "scene"), *rows])
    table = read(tmp_path_factory.getbasetemp(), f"h.{form[1]}", text.getvalue())
    expected = list(csv.reader(io.StringIO(text.getvalue(), newline=""), delimiter=form[0]))[1:]
    assert list(table.paths["rgb"]) == [row[0] for row in expected]
    assert list(table.paths["depth"]) == [
        row[1].replace("None", "") if row[1] == "None" else row[1] for row in expected
    ]
    scenes = [*table.columns["scene"].names, ""]
    assert [scenes[min(number, len(scenes) - 1)] for number in table.columns["scene"].numbers] == [
        row[2] for row in expected
    ]


WORDS = st.text(
    st.characters(blacklist_categories=("Cs", "Cc", "Zs", "Zl", "Zp"), blacklist_characters="\x85"),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(WORDS.map(lambda word: "r" + word), WORDS), min_size=1, max_size=5),
    st.lists(st.sampled_from(["", " ", "\t", "  \t"]), min_size=3, max_size=3),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n# x y z\n"]),
)
def test_a_list_is_what_splitting_its_lines_gives(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    blanks: list[str],
    end: str,
) -> None:
    before, between, behind = blanks
    text = "a b\n" + "".join(f"{before}{a}{between or ' '}{b}{behind}{end}" for a, b in rows)
    table = read(tmp_path_factory.getbasetemp(), "h.txt", text)
    lines = [line for line in re.split("\r?\n", text) if line.strip() and not line.startswith("#")]
    expected = [line.split() for line in lines]
    assert list(table.paths["rgb"]) == [row[0] for row in expected]
    assert list(table.paths["depth"]) == ["" if row[1] == "None" else row[1] for row in expected]


def test_every_prefix_of_a_table_is_read_or_said(tmp_path: Path) -> None:
    """A copy that ended early."""
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        whole = FORMS[name]
        for n_bytes in range(0, len(whole), 1 + len(whole) // 150):
            with suppress(WrongSource):  # and nothing else
                read(tmp_path, name, whole[:n_bytes])


def test_pyarrow_and_pandas_are_not_loaded_where_they_need_not_be(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(FORMS["t.csv"])
    (tmp_path / "t.jsonl").write_bytes(FORMS["numbers.jsonl"])
    (tmp_path / "t.parquet").write_bytes(FORMS["nulls.parquet"])
    code = (
        "import sys; from pathlib import Path; from convert.sources.tables import read_table\n"
        "assert 'pyarrow' not in sys.modules\n"
        f"read_table(Path({str(tmp_path / 't.csv')!r}), fields={{}})\n"
        f"read_table(Path({str(tmp_path / 't.jsonl')!r}), fields={{}})\n"
        f"read_table(Path({str(tmp_path / 't.parquet')!r}), fields={{}})\n"
        "assert 'pandas' not in sys.modules  # 50 MB"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow. Install it: .*\[frames\]"):
        read(tmp_path, "t.csv", FORMS["t.csv"])


def test_a_pyarrow_that_reads_no_json_in_blocks_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import json as reader

    expected = read(tmp_path, "t.jsonl", FORMS["t.jsonl"])
    monkeypatch.delattr(reader, "open_json", raising=False)  # which older ones have not
    assert read(tmp_path, "t.jsonl", FORMS["t.jsonl"]).sha256 == expected.sha256


def test_a_disk_that_fails_is_no_damaged_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "t.parquet").write_bytes(FORMS["t.parquet"])
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", fail)
    with pytest.raises(OSError, match="Input/output"):
        read_table(tmp_path / "t.parquet", fields={})
    assert table_lines.BLOCK_BYTES < 1 << 20
