"""Results that are empty or perfect: every report, plot and table is made or says why not."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")


from helpers.sets import convert
from helpers.training import rows

from convert.sample import write_sample
from shards.dataset import open_set
from shards.spec import ConversionSettings as Stored
from train.__main__ import main
from train.plots import CaptionedPanels, page_png

Make = Callable[..., Path]
FLAGS = [
    "--size",
    "64",
    "--width",
    "4",
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--num-classes",
    "10",
]
SCENE_0 = 0  # bedroom


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A set of so many made-up rows, of which fields are emptied in both splits or one, or all rows
    are bedrooms.
    """

    def build(
        rows: int = 12, empty: str = "", split: int | None = None, one_type: bool = False
    ) -> Path:
        root = tmp_path_factory.mktemp("set")
        write_sample(root / "rooms.mat", rows, size_wh=(64, 48))
        splits = open_set(convert(root / "rooms.mat", root / "as made", Stored(size=32))).column(
            "split"
        )
        with h5py.File(root / "rooms.mat", "r+") as file:
            if empty:
                field = file[empty][...]
                field[slice(None) if split is None else splits == split] = 0
                file[empty][...] = field
            if one_type:
                kinds = [
                    bytes(file[ref][...].astype("u1").ravel()).decode()
                    for ref in file["sceneTypes"][0]
                ]
                file["sceneTypes"][...] = file["sceneTypes"][0, kinds.index("bedroom")]
        return convert(root / "rooms.mat", root / "changed", Stored(size=32))

    return build


def run(data: Path, out: Path, *flags: str) -> list[str]:
    """Train, predict; the names of the files of both."""
    command = ["--data", str(data), "--out", str(out), *FLAGS, *flags]
    assert main(command) == 0
    assert main(["predict", str(out)]) == 0
    made = {p.name for p in out.iterdir() if p.suffix in (".png", ".csv")}
    again = {p.name for p in (out / "predict").iterdir() if p.suffix in (".png", ".csv")}
    assert made - {"metrics.csv", "curves.png"} == again
    return sorted(made)


ALL = [
    "classes.csv",
    "confusion.png",
    "curves.png",
    "metrics.csv",
    "mistakes.png",
    "predictions.csv",
]
OF_DEPTH = ["curves.png", "metrics.csv", "mistakes.png", "predictions.csv"]


def without(files: list[str], name: str) -> list[str]:
    return [each for each in files if each != name]


@pytest.mark.parametrize("task", ["scene", "semantic13", "depth"])
@pytest.mark.parametrize(("n_rows", "batch_size"), [(2, 4), (12, 1000)])
def test_one_row_a_split_and_a_batch_larger_than_the_set(
    n_rows: int, batch_size: int, task: str, make: Make, tmp_path: Path
) -> None:
    data = make(n_rows)
    files = run(data, tmp_path, "--task", task, "--batch-size", str(batch_size))
    assert without(files, "mistakes.png") == without(
        OF_DEPTH if task == "depth" else ALL, "mistakes.png"
    )
    assert (
        len(rows(tmp_path / "predictions.csv")) == np.sum(open_set(data).column("split") == 1) >= 1
    )


def test_no_mistake_is_said_and_an_older_picture_of_some_removed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, network = make(one_type=True), ("--model", "helpers.networks:Always")
    monkeypatch.setenv("ALWAYS", "1")
    assert run(data, tmp_path, *network) == ALL
    monkeypatch.setenv("ALWAYS", str(SCENE_0))
    assert run(data, tmp_path, *network, "--reset") == without(ALL, "mistakes.png")
    said = capsys.readouterr()
    assert "no mistakes.png: all 6 test rows are right" in said.err
    assert "test_top1 1.000" in said.out
    accuracy = {row["class"]: float(row["accuracy"]) for row in rows(tmp_path / "classes.csv")}
    assert accuracy.pop("bedroom") == 1.0
    assert all(math.isnan(value) for value in accuracy.values())  # no row is truly of them


@pytest.mark.parametrize(
    ("task", "field", "what"),
    [("semantic13", "labels", "labelled"), ("depth", "rawDepths", "measured")],
)
def test_nothing_to_learn_is_one_line(
    task: str,
    field: str,
    what: str,
    make: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.progress.SILENT_S", 1e9)  # a slow machine says how far it is
    data = make(empty=field)
    capsys.readouterr()
    assert (
        main(
            [
                "--data",
                str(data),
                "--out",
                str(tmp_path),
                *FLAGS,
                "--task",
                task,
                "--num-workers",
                "0",
            ]
        )
        == 2
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"no pixel of the train rows is {what}: nothing to learn" in said[0]


@pytest.mark.parametrize(("task", "field"), [("semantic13", "labels"), ("depth", "rawDepths")])
def test_nothing_to_score_is_said(
    task: str, field: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = run(make(empty=field, split=1), tmp_path, "--task", task)
    assert files == without(OF_DEPTH if task == "depth" else ALL, "mistakes.png")
    said = capsys.readouterr()
    assert "no mistakes.png: nothing is known of the test rows" in said.err
    assert "best  of no epoch" in said.out
    assert all(math.isnan(float(row["test_loss"])) for row in rows(tmp_path / "metrics.csv"))
    assert all(math.isfinite(float(row["train_loss"])) for row in rows(tmp_path / "metrics.csv"))


@pytest.mark.stress
@pytest.mark.parametrize("field", ["depths", "labels"])
def test_scenes_do_not_need_a_measured_or_labelled_pixel(
    field: str, make: Make, tmp_path: Path
) -> None:
    assert run(make(empty=field), tmp_path) == ALL


def test_scenes_of_one_class_train(make: Make, tmp_path: Path) -> None:
    assert set(run(make(one_type=True), tmp_path)) >= set(without(ALL, "mistakes.png"))
    named: list[Any] = rows(tmp_path / "predictions.csv")
    assert {row["true"] for row in named} == {"bedroom"}


@pytest.mark.parametrize("shape", [(32, 32), (48, 64), (64, 48)])
def test_a_page_shows_every_panel_whole_and_none_twice(shape: tuple[int, int]) -> None:
    Image = pytest.importorskip("PIL.Image", reason="needs pillow")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    colours = [(10 * k + 5, 255 - 10 * k, 128) for k in range(20)]
    panels = [np.full((*shape, 3), colour, np.uint8) for colour in colours]
    pictures = [
        CaptionedPanels(caption=f"row {k}\ntrue\nnamed", panels=panels[4 * k : 4 * k + 4])
        for k in range(5)
    ]
    legend = {f"class {k}": (0.0, 0.0, k / 20) for k in range(20)}
    drawn = page_png("the worst", ["rgb", "depth", "true", "predicted"], pictures, legend)
    pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB"))
    for colour in colours:
        where = np.argwhere((pixels == colour).all(-1))
        height, width = np.ptp(where, axis=0) + 1
        assert height * width == len(where)  # nothing lies over it
        assert max(height, width) > 200
        assert height / width == pytest.approx(shape[0] / shape[1], abs=0.02)
