"""python -m train predict: the test rows again, or a folder of pictures."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.training import rows
from PIL import Image

from train.__main__ import main, train_and_report
from train.data import ShardDataset
from train.loop import train
from train.predict import Average
from train.settings import Settings


@pytest.fixture(scope="module")
def scene(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predict") / "scene"
    settings = Settings(
        str(small_set), str(out), num_classes=10, epochs=2, batch_size=8, width=4, size=32
    )
    train_and_report(settings)
    return out


def export(small_set: Path, folder: Path, n: int) -> None:
    """The first test rows as the pictures of a folder."""
    for part in ("rgb", "depth"):
        (folder / part).mkdir(parents=True)
    dataset = ShardDataset(small_set, split="test")
    for i in range(n):
        rgb, depth, _ = dataset[i]
        Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(folder / "rgb" / f"{i}.png")
        Image.fromarray(depth[0].numpy().astype(np.uint16)).save(folder / "depth" / f"{i}.png")


def predict(*words: object) -> int:
    return main(["predict", *map(str, words)])


def test_on_the_test_rows_it_gives_the_scores_of_the_run(
    scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(scene) == 0
    last = rows(scene / "metrics.csv")[-1]
    assert f"test_top1 {float(last['test_top1']):.4f}" in capsys.readouterr().out
    assert rows(scene / "predict" / "predictions.csv") == rows(scene / "predictions.csv")
    right = [row["true"] == row["named"] for row in rows(scene / "predictions.csv")]
    assert sum(right) / len(right) == pytest.approx(float(last["test_top1"]))


def test_several_runs_answer_with_the_mean_of_their_outputs(
    scene: Path, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = Settings(
        str(small_set),
        str(tmp_path / "other"),
        num_classes=10,
        epochs=1,
        batch_size=8,
        width=8,
        size=32,
    )
    train(same)
    capsys.readouterr()
    assert predict(scene, scene, "--out", tmp_path / "twice") == 0
    assert rows(tmp_path / "twice" / "predictions.csv") == rows(scene / "predictions.csv")
    members = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    x = torch.rand(5, 3)
    torch.testing.assert_close(Average(members)(x), (members[0](x) + members[1](x)) / 2)
    train(replace(same, out=str(tmp_path / "rgb"), inputs="rgb"))
    assert predict(scene, tmp_path / "rgb") == 2
    assert "does not learn what" in capsys.readouterr().err


def test_on_a_folder_of_the_same_pictures_it_says_the_same(
    scene: Path, small_set: Path, tmp_path: Path
) -> None:
    export(small_set, tmp_path / "photos", 3)
    assert predict(scene, "--images", tmp_path / "photos", "--out", tmp_path / "out") == 0
    for ours, theirs in zip(
        rows(tmp_path / "out" / "predictions.csv"), rows(scene / "predictions.csv"), strict=False
    ):
        assert ours["named"] == theirs["named"]
        assert float(ours["confidence"]) == pytest.approx(float(theirs["confidence"]), abs=1e-3)
    assert (tmp_path / "out" / "page.png").stat().st_size > 1000


def test_a_dense_network_writes_a_picture_for_each(small_set: Path, tmp_path: Path) -> None:
    train(
        Settings(
            str(small_set),
            str(tmp_path / "run"),
            task="depth",
            epochs=1,
            batch_size=8,
            width=4,
            size=32,
        )
    )
    export(small_set, tmp_path / "photos", 2)
    assert predict(tmp_path / "run", "--images", tmp_path / "photos") == 0
    with Image.open(tmp_path / "run" / "predict" / "1.png") as image:
        depth_mm = np.array(image)
    assert depth_mm.shape == (32, 32)
    assert depth_mm.dtype == np.uint16
    assert 1 <= depth_mm.min() <= depth_mm.max() <= 10000


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((), "no pictures in"),
        (("rgb",), "0.png is missing"),
        (("rgb", "RGB as depth"), "one channel"),
    ],
)
def test_a_mistake_is_one_line(
    made: tuple[str, ...],
    words: str,
    scene: Path,
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "photos"
    if made:
        export(small_set, folder, 1)
        (folder / "depth" / "0.png").unlink()
    if len(made) > 1:
        shutil.copy(folder / "rgb" / "0.png", folder / "depth" / "0.png")
    capsys.readouterr()
    assert predict(scene, "--images", folder) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("loader:")
    ]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_run_without_a_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tmp_path) == 2
    assert (
        f"{tmp_path} has no checkpoint. Run: make train RUN={tmp_path}\n" in capsys.readouterr().err
    )
