"""What no run can start from, or go on with, is one line and status 2, before anything is trained
or lost.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from helpers.disks import small_disk
from hypothesis import HealthCheck, example, given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from shards.errors import UserError
from train.__main__ import main, make_parser
from train.checkpoint import CHECKPOINT, PREVIOUS
from train.loop import train
from train.settings import Settings

TINY = {"num_classes": 10, "epochs": 1, "batch_size": 8, "width": 4, "size": 32, "num_workers": 0}


def flags(**changes: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, **changes}.items()]


def ends_with(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Status and the one line on standard error."""
    capsys.readouterr()
    try:
        status: object = main(words)
    except SystemExit as error:  # argparse
        status = error.code
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    return status, said


# ---------------------------------------------------------------- numbers and types

WRONG = {
    "lr": [float("nan"), float("inf"), -1.0, 0.0, "1e-3", True, None],
    "weight_decay": [-1.0, float("nan")],
    "label_smoothing": [2.0, -0.1, float("nan")],
    "logit_adjustment": [2.1, -0.1, float("nan")],
    "save_minutes": [float("nan"), -1.0, float("inf")],
    "seed": [-1, 2**63, 1.5, None, True],
    "width": [-8, 513, 16.0],
    "size": [5, 31, -32, 100_000, "224"],
    "epochs": [0, -1, 10**30, 2.5, True],
    "batch_size": [0, -3, "8", 8.0],
    "warmup_epochs": [-1, 1.5],
    "num_workers": [-1, 65, 1.5, "x", "-1", "1.5", "", None, True],
    "crop": [0.0, 7.0, float("nan")],
    "jitter": [-0.1, 1.1],
    "num_classes": [0, "10", 10.0, True],
    "task": ["scenes", None, 3],
    "compile": ["no", 0, None],
    "model": [None, 3, "a\0b"],
    "mirror": [3],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_value_out_of_range_or_of_another_type_is_refused_from_python(
    name: str, value: object
) -> None:
    with pytest.raises(UserError, match=f"^{name} .*: choose ") as error:
        Settings("data", "run", **{name: value})
    assert "\n" not in str(error.value)


def test_numpys_numbers_and_paths_become_pythons_own() -> None:
    s = Settings(
        Path("data"), Path("run"), lr=np.float32(0.5), epochs=np.int64(3), seed=np.uint8(1)
    )  # type: ignore[arg-type]
    assert [type(v) for v in (s.data, s.out, s.lr, s.epochs, s.seed)] == [str, str, float, int, int]
    assert Settings("data", "run", num_workers="3").num_workers == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, v) for name, values in WRONG.items() for v in values if isinstance(v, float | int) and v is not True
     and (name, v) not in (("seed", 2**63), ("num_classes", 10.0), ("width", 16.0), ("batch_size", 8.0))
     and name not in ("compile", "model", "mirror", "task")],
)  # fmt: skip
def test_and_from_the_command_line(
    name: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = ends_with(
        ["--data=absent", f"--out={tmp_path}/run", *flags(**{name: value})], capsys
    )
    assert status == 2
    assert f"--{name.replace('_', '-')}" in said
    assert not (tmp_path / "run").exists()


def test_help_names_the_range_of_every_number() -> None:
    text = " ".join(make_parser().format_help().split())
    ranged = [
        f
        for f in fields(Settings)
        if isinstance(f.default, int | float) and not isinstance(f.default, bool)
    ]
    for each in ranged:
        assert "choices" in each.metadata["argparse"] or each.metadata["values"] in text, each.name
    assert "(0 to 0.9)" in text


ANY_TEXT = st.text(max_size=12) | st.sampled_from(
    ["nan", "-1", "1e999", "0", "٣", "1_0", "auto", "--", "=", "\0", "a:b"]
)
FLAGS = [
    f"--{f.name.replace('_', '-')}"
    for f in fields(Settings)
    if f.name not in ("data", "out", "compile")
]


@bounds(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(st.tuples(st.sampled_from(FLAGS), ANY_TEXT), max_size=3),
    data=ANY_TEXT | st.just("set"),
)
@example(words=[("--model", "os:nothing\nelse")], data="set")
@example(words=[("--batch-size", "99999")], data="set")
def test_no_command_line_ends_in_a_traceback(
    words: list[tuple[str, str]], data: str, small_set: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever is given, the set or the network is absent: it never trains, and says why not in one
    line.
    """
    monkeypatch.chdir(tmp_path)
    last = ["--model", "absent:net"] if data == "set" else []
    command = ["--data", str(small_set) if data == "set" else data, "--out", str(tmp_path / "run")]
    for flag, text in words:
        command += [f"{flag}={text}"] if flag not in ("--reset", "--allow-remote") else [flag]
    status, said = ends_with([*command, *last], capsys)
    assert status == 2, said
    assert said.startswith("train: ")


@bounds(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.sampled_from(["--images", "--data", "--out", "--help=1", "-x", "run"]) | ANY_TEXT,
        max_size=4,
    )
)
def test_nor_does_one_of_predict(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = ends_with(["predict", *words], capsys)
    assert status == 2, said


# ---------------------------------------------------------------- sets and networks


@pytest.mark.parametrize(
    "changes", [{"model": "resnet18"}, {"model": "helpers.wrong:Normed", "size": 64}]
)
def test_a_batch_of_one_value_a_channel_is_refused(
    changes: dict[str, Any], small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        f"--data={small_set}",
        f"--out={tmp_path}",
        *flags(**{"batch_size": 1, "width": 0, **changes}),
    ]
    status, said = ends_with(command, capsys)
    assert (status, "Use a larger --batch-size or --size" in said) == (2, True)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.stress
def test_a_batch_of_one_row_trains_where_every_channel_has_more_values(
    small_set: Path, tmp_path: Path
) -> None:
    assert main([f"--data={small_set}", f"--out={tmp_path}", *flags(batch_size=1, size=64)]) == 0


@pytest.mark.parametrize(
    ("network", "task", "words"),
    [
        (
            "Eleven",
            "scene",
            r"answers two pictures with float32 \[2, 11\], expected floats \[2, 10\] for the task scene",
        ),
        ("OnlyRgb", "scene", r"called with pictures \[2, 3, 32, 32\], \[2, 1, 32, 32\]: TypeError"),
        ("Lazy", "scene", r"the shape of head\.weight is not known yet \(a lazy layer\)"),
        ("Pixelwise", "scene", r"float32 \[2, 10, 1, 1\], expected floats \[2, 10\]"),
        (
            "Right",
            "semantic13",
            r"float32 \[2, 13\], expected floats \[2, 13, H, W\] for the task semantic13",
        ),
        ("Right", "depth", r"called with pictures \[2, 3, 32, 32\]: TypeError"),
        ("Whole", "scene", r"int64 \[2, 10\], expected floats"),
        ("Pair", "scene", r"answers with tuple, expected floats"),
        ("Cut", "scene", r"depends on no parameter"),
        ("NoArgument", "scene", r"called with 10, the number of outputs: TypeError"),
        ("Frozen", "scene", r"has no parameters that can learn"),
        ("Empty", "scene", r"has no parameters that can learn"),
        ("Turned", "scene", r"Conv2d\(4, 4, .* gets its input in channels_last"),
        ("breaks", "scene", r"KeyError: 'weights.pth' \(wrong.py, line \d+\)"),
        ("leaves", "scene", r"SystemExit: usage: wrong.py"),
        ("TINY", "scene", r"has no attribute"),
        ("Any", "scene", r"called with 10"),
    ],
)
def test_a_network_that_is_no_answer_is_refused_before_it_trains(
    network: str,
    task: str,
    words: str,
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [
        f"--data={small_set}",
        f"--out={tmp_path}",
        f"--model=helpers.wrong:{network}",
        *flags(task=task),
    ]
    status, said = ends_with(command, capsys)
    assert status == 2
    assert said.startswith(f"train: --model helpers.wrong:{network}")
    assert re.search(words, said), said
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_module_that_fails_while_it_is_imported_is_one_line(
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "fails.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    status, said = ends_with(
        [f"--data={small_set}", f"--out={tmp_path}/run", "--model=fails:Net", *flags()], capsys
    )
    assert (status, "ZeroDivisionError: division by zero (fails.py, line 1)" in said) == (2, True)


def test_asking_a_network_first_changes_nothing_that_it_learns(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {**TINY, "model": "helpers.networks:Normed", "epochs": 2}
    train(Settings(str(small_set), str(tmp_path / "asked"), **same))  # type: ignore[arg-type]
    monkeypatch.setattr("train.job.probe", lambda *given: None)
    train(Settings(str(small_set), str(tmp_path / "not"), **same))  # type: ignore[arg-type]
    one, other = (torch.load(tmp_path / out / CHECKPOINT)["model"] for out in ("asked", "not"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "head.0.running_mean" in one


# ---------------------------------------------------------------- a full disk


@pytest.fixture(name="small_disk")
def three_mebibytes(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 3 << 20) as place:
        yield place


def fill(place: Path, leave: int) -> None:
    """Take what is free, but `leave` bytes."""
    stat = os.statvfs(place)
    with open(place / "filler", "wb") as file:
        file.write(b"x" * (stat.f_bavail * stat.f_frsize - leave))


@pytest.mark.parametrize(
    "leave",
    [
        0,
        pytest.param(8 << 10, marks=pytest.mark.stress),
        pytest.param(200 << 10, marks=pytest.mark.stress),
    ],
)
def test_a_full_disk_is_named_and_the_checkpoint_before_goes_on(
    leave: int,
    small_set: Path,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, whole = small_disk / "run", tmp_path / "whole"
    train(Settings(str(small_set), str(run), **TINY))  # type: ignore[arg-type]
    train(Settings(str(small_set), str(whole), **{**TINY, "epochs": 2}))  # type: ignore[arg-type]
    (run / PREVIOUS).unlink(missing_ok=True)
    fill(small_disk, leave)
    capsys.readouterr()
    assert main([f"--data={small_set}", f"--out={run}", *flags(epochs=2)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        f"train: {run}/(last.pt|metrics.csv) cannot be written: the disk is full. Make room", said
    ), said
    assert not list(run.glob(".*.tmp"))
    (small_disk / "filler").unlink()
    assert main([f"--data={small_set}", f"--out={run}", *flags(epochs=2)]) == 0
    assert "at epoch 2 of 2, step 1" in capsys.readouterr().err


def test_a_full_mirror_is_announced_and_training_goes_on(
    small_set: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(small_disk, 100 << 10)
    assert (
        main(
            [f"--data={small_set}", f"--out={tmp_path}/run", f"--mirror={small_disk}/run", *flags()]
        )
        == 0
    )
    assert "No space left on device; training goes on" in capsys.readouterr().err


def test_without_a_compiler_compile_is_one_line(small_set: Path, tmp_path: Path) -> None:
    words = ["-m", "train", f"--data={small_set}", f"--out={tmp_path}", "--compile"]
    words += flags(model="helpers.networks:Plain")  # two layers: a ResNet is long in coming to it
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
        "PATH": "",
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c"),
    }
    done = subprocess.run(
        [sys.executable, *words], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "train: --compile failed" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
