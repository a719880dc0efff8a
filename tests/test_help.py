"""--help says of every option what it is, its default and its range; paths are read one way."""

import argparse
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import needs_torch
from helpers.commands import REPO, make

import convert.__main__ as command_line
import convert.parser as convert_parser
import shards.copy as copy_line
from convert.__main__ import main
from shards.containers import CODECS
from shards.errors import WrongSetting
from shards.flags import Parser, as_path
from shards.spec import AUTO_ROWS, ConversionSettings

MAGIC = {".png": b"\x89PNG", ".jpg": b"\xff\xd8\xff", ".svg": b"<?xml", ".pdf": b"%PDF"}


def commands_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser itself, or those of its commands."""
    below = [action for action in parser._actions if isinstance(action.choices, dict)]
    for action in below:
        yield from action.choices.values()
    if not below:
        yield parser


def parsers() -> list[argparse.ArgumentParser]:
    return [
        *commands_of(convert_parser.parser(command_line.VERBS)),
        *commands_of(copy_line.parser()),
    ]


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All that --help shows but --help."""
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return [action for action in shown if "--help" not in action.option_strings]


def lacks(action: argparse.Action) -> str:
    """What its text does not say, or ''."""
    text = action.help or ""
    takes_a_value = action.nargs != 0
    if len(text) < 10:
        return "what it is"
    if action.option_strings and takes_a_value and not action.required and "default" not in text:
        return "its default"
    is_number = isinstance(action.default, int) or "whole" in getattr(
        action.type, "__qualname__", ""
    )
    if is_number and takes_a_value and not re.search(r"\d to \d+", text):
        return "its range"
    return ""


def assert_every_option_is_told(parser: argparse.ArgumentParser) -> None:
    silent = {action.dest: lacks(action) for action in options_of(parser) if lacks(action)}
    assert silent == {}, parser.prog


@pytest.mark.parametrize("parser", parsers(), ids=lambda parser: parser.prog)
def test_every_option_says_what_it_is_its_default_and_its_range(
    parser: argparse.ArgumentParser,
) -> None:
    assert_every_option_is_told(parser)


@pytest.mark.parametrize(
    "name",
    [
        "cluster",
        "convert",
        "pack",
        *(
            pytest.param(name, marks=needs_torch)
            for name in (
                "loader",
                "memory",
                "orders",
                "orders_of_set",
                "peers.__main__",
                "pretrained",
                "probe",
                "recipe",
                "remote",
                "step",
            )
        ),
    ],
)
def test_every_option_of_a_benchmark_does_too(name: str) -> None:
    assert_every_option_is_told(import_module(f"bench.{name}").make_flags())


def test_an_option_that_says_too_little_is_found() -> None:
    parser = Parser("it")
    parser.add_argument("--silent")
    parser.add_argument("--rows", type=int, default=3, help="how many rows (default: 3)")
    parser.add_argument("--out", help="where it is written to")
    assert [lacks(action) for action in options_of(parser)] == [
        "what it is",
        "its range",
        "its default",
    ]


@pytest.mark.parametrize("parser", parsers(), ids=lambda parser: parser.prog)
def test_every_command_says_what_it_does_and_has_an_example_that_it_takes(
    parser: argparse.ArgumentParser,
) -> None:
    assert parser.description
    assert parser.epilog
    examples = re.findall(rf"{re.escape(parser.prog)} (.*)", parser.epilog)
    assert examples
    for example in examples:
        parser.parse_args(example.split())


def test_the_first_help_speaks_to_users() -> None:
    text = convert_parser.parser(command_line.VERBS).format_help()
    assert "parse, call" not in text
    assert "python -m convert run" in text


def test_help_names_every_codec() -> None:
    for parser in parsers():
        for action in parser._actions:
            if "--codec" in action.option_strings:
                assert all(codec in str(action.help) for codec in CODECS)


@pytest.mark.parametrize(
    ("flag", "name", "auto"),
    [("--size", "size", None), ("--rows-per-shard", "rows_per_shard", AUTO_ROWS)],
)
def test_the_range_in_the_help_is_the_one_that_counts(
    flag: str, name: str, auto: int | None
) -> None:
    of_run = next(commands_of(convert_parser.parser(command_line.VERBS)))
    action = next(action for action in of_run._actions if flag in action.option_strings)
    low, high = map(int, re.findall(r"(\d+) to (\d+)", str(action.help))[0])
    for right in (low, high):
        ConversionSettings(**{name: right})
    for wrong in (low - 1 if low - 1 != auto else low - 2, high + 1):
        with pytest.raises(WrongSetting):
            ConversionSettings(**{name: wrong})


# ------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "words",
    [
        ["run", "X.mat", "--out", ""],
        ["run", "", "--out", "data"],
        ["run", "--out", "data", "--drive", ""],
        ["verify", ""],
        ["verify", "data", "--against", ""],
        ["inspect", ""],
        ["inspect", "data", "--picture", ""],
        ["push", "data", ""],
        ["pull", "", "data"],
        ["sample", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert "it is empty" in said


def test_a_home_that_the_shell_left_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert as_path("~/x") == Path("/home/me/x")
    assert as_path("~") == Path("/home/me")
    assert as_path("~/my data") == Path("/home/me/my data")
    assert as_path("a/~/x") == Path("a/~/x")
    assert as_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")


def test_a_set_is_made_and_found_under_the_home(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["run", str(mat), "--out=~/sets", "--size", "8", "--fields", "depth"]) == 0
    made = Path(capsys.readouterr().out.splitlines()[-1])
    assert made.parent == tmp_path / "sets"
    assert main(["verify", "~/sets"]) == 0


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".svg", ".pdf"])
def test_a_picture_is_what_its_suffix_says_in_a_folder_that_is_made(
    suffix: str, small_set: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    out = tmp_path / "new" / "folder" / f"rows{suffix}"
    assert main(["inspect", str(small_set), "--picture", str(out), "--rows", "1"]) == 0
    assert out.read_bytes().startswith(MAGIC[suffix])


@pytest.mark.parametrize("name", ["rows", "rows.mat", "rows.tiff"])
def test_a_picture_of_another_suffix_is_refused(
    name: str, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(small_set), "--picture", str(tmp_path / name)]) == 2
    assert f"{name} has not the suffix of a picture. Choose one of .png" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sample_is_written_into_a_folder_that_is_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "rooms.mat"
    assert main(["sample", str(out), "--rows", "1"]) == 0
    assert out.is_file()


@pytest.mark.parametrize(
    ("target", "variable"), [("bench-convert", "MAT=/"), ("push", "DRIVE=/"), ("pull", "DRIVE=/")]
)
def test_make_says_which_variable_is_missing_before_it_installs(
    target: str, variable: str, tmp_path: Path
) -> None:
    done = make(REPO, target)
    assert done.returncode == 2
    assert f"make {target} {variable}" in done.stderr.splitlines()[0]
