"""Any command line of `python -m convert` and any arguments from Python: right, or one line that
says what is wrong.
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from helpers.sets import FIELDS, convert
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from convert.__main__ import main
from shards.dataset import open_set
from shards.errors import UserError
from shards.spec import AUTO_ROWS, ConversionSettings
from shards.strict_json import JsonObject

NO_NUL = st.characters(exclude_characters="\0")  # a command line cannot hold one
NUMBERS = st.sampled_from(
    [
        "0",
        "-1",
        "1",
        "7",
        "8",
        "9",
        "32",
        "480",
        "481",
        "1.5",
        "nan",
        "inf",
        "1e3",
        "",
        "x",
        "٣",
        "99999999999999999999",
        "9" * 5000,
    ]
)
WORDS = st.one_of(
    st.text(NO_NUL, max_size=12),
    NUMBERS,
    st.sampled_from(["none", "npy", "zarr", "rgb", "rgb,depth", "--", "-h"]),
)
FLAGS = {
    "--format": ["npy", "zarr", "tar"],
    "--codec": ["none", "zstd", "blosc", "rgb=zstd", "rgb=", "=", "depth=none,depth=zstd"],
    "--fields": ["rgb", "rgb,depth", "label,rgb", "rgb,rgb", "", ",", "rgb,nothing"],
    "--crop": ["none", "border", "eigen", "sunrgbd", "all"],
    "--depth-resize": ["nearest", "area", "cubic"],
    "--axes": ["auto", "wh", "hw", "xy"],
    "--size": [],
    "--rows-per-shard": [],
    "--workers": [],
    "--drive": [],
    "--url": ["ftp://x/y", "x", "http://"],
    "--repair": [],
}


@contextmanager
def inside(path: Path) -> Iterator[None]:
    """What a nonsense path makes is made in there, and gone afterwards: no line finds what another
    made.
    """
    before = Path.cwd()
    path.mkdir()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
        shutil.rmtree(path)


@st.composite
def run_lines(draw: st.DrawFn) -> list[str]:
    words = [
        "run",
        draw(
            st.sampled_from(["MAT", "SET", "nowhere.mat", "", "EMPTY"])
            | st.text(NO_NUL, max_size=6)
        ),
        "--out",
        "made",
    ]
    for flag in draw(st.lists(st.sampled_from(sorted(FLAGS)), max_size=3, unique=True)):
        if flag == "--repair":
            words.append(flag)
        else:
            words += [
                flag,
                draw(
                    st.one_of(
                        st.sampled_from(FLAGS[flag]) if FLAGS[flag] else NUMBERS, NUMBERS, WORDS
                    )
                ),
            ]
    return words


VERBS = ["verify", "inspect", "push", "pull", "sample", "run"]
OTHERS = st.lists(
    st.one_of(st.sampled_from([*VERBS, "SET", "--rows", "--picture", "p.png", "--out"]), WORDS),
    max_size=5,
)


def check(words: list[str], known: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [known.get(word, word) for word in words]
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as ended:  # argparse: its own refusals, and --help
        status = int(ended.code or 0)
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1:] or [""]
    assert status in (0, 2), (shlex.join(words), status, said.err)
    assert "Traceback" not in said.err
    if status == 2:
        assert len(last[0]) > 10, (words, said.err)
        assert "compare its md5" not in said.err  # no file here is damaged
    elif words[:1] == ["run"] and not {"-h", "--help"} & set(words):
        open_set(said.out.splitlines()[-1])  # what is printed is a finished set


FUZZ: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@given(run_lines())
@settings(max_examples=60, **FUZZ)
@example(["run", "MAT", "--out", "made", "--size", "9" * 5000])
@example(["run", "MAT", "--out", "made", "--workers", "100000"])
@example(["run", "MAT", "--out", ""])
@example(["run", "MAT", "--out", "made", "--url", "ftp://x/y", "--drive", "somewhere"])
@example(["run", "--out", "made", "--url", "x"])
def test_any_command_line_of_run_ends_right_or_in_one_line(
    mat: Path, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "empty").mkdir(exist_ok=True)
    known = {"MAT": str(mat), "SET": str(small_set), "EMPTY": str(tmp_path / "empty")}
    with inside(tmp_path / "here"):
        check(words, known, capsys)


@given(OTHERS)
@settings(max_examples=75, **FUZZ)
@example(["inspect", "SET", "--picture", "p.png", "--rows", "99999999"])
@example(["inspect", "SET", "--picture", "SET"])
@example(["verify", "SET", "--against", "SET"])
@example(["verify", "SET", "--rows", "0"])
@example(["push", "SET", ""])
@example(["sample", "here.mat", "--rows", "99999999999"])
def test_any_other_command_line_ends_right_or_in_one_line(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with inside(tmp_path / "here"):
        check(words, {"SET": str(small_set)}, capsys)


CHOICES = [
    "rgb",
    ("rgb",),
    ["depth", "rgb"],
    {"rgb"},
    tuple(FIELDS),
    "nearest",
    "none",
    "eigen",
    "wh",
    b"rgb",
    224.0,
]
ANYTHING: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 500),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(CHOICES),
)


@given(st.dictionaries(st.sampled_from(sorted(ConversionSettings.__dataclass_fields__)), ANYTHING))
@settings(max_examples=150, **FUZZ)
@example({"size": 224.0})
@example({"size": True})
@example({"rows_per_shard": True})
@example({"fields": "rgb"})
@example({"crop": ["none"]})
def test_settings_from_python_are_right_or_refused_in_one_line(values: dict[str, Any]) -> None:
    refused = None
    try:
        made = ConversionSettings(**values)
    except UserError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused
        return
    rows = made.rows_per_shard
    settled = replace(made, rows_per_shard=128) if rows == AUTO_ROWS else made  # as in a manifest
    assert ConversionSettings.from_json(JsonObject(settled.to_json(), "it")) == settled
    assert {type(x) for x in (made.size, made.rows_per_shard)} == {int}
    assert len(set(made.fields)) == len(made.fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": None}, "source None: expected a path"),
        ({"source": ""}, "source '': expected a path"),
        ({"source": "x" * 300}, r"x cannot be read \(file name too long\)"),
        ({"repair": "yes"}, "repair 'yes': True or False"),
        ({"repair": None}, "repair None: True or False"),
        ({"root": 3}, "out 3: expected a path"),
        ({"root": "a\0b"}, "out 'a.*b': expected a path"),
        ({"workers": "2"}, "workers '2'"),
        ({"workers": 0}, "workers 0"),
        ({"workers": True}, "workers True"),
        ({"workers": 2.0}, "workers 2.0"),
        ({"settings": {"size": 32}}, r"settings .*ConversionSettings\(\.\.\.\)"),
        ({"codecs": "zstd"}, "codecs 'zstd'"),
        ({"codecs": {"rgb": "zstd"}}, "codecs .*give one for each"),
        ({"codecs": dict.fromkeys(FIELDS, "lzma")}, "codec lzma"),
    ],
)
def test_arguments_of_convert_are_refused_by_name(
    mat: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {"source": mat, "root": tmp_path, "settings": SMALL, **change}
    with pytest.raises(UserError, match=words):
        convert(**given)
    assert not list(tmp_path.iterdir())


def test_paths_may_be_text(mat: Path, small_set: Path, tmp_path: Path) -> None:
    made = convert(str(mat), str(tmp_path), SMALL)
    assert made.name == small_set.name
