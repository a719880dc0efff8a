"""Training on SUN RGB-D: 19 classes by default, the labels whole and in 13 groups."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("PIL", reason="needs pillow")

from helpers.frames import converted

from convert.sample_sunrgbd import write_sunrgbd
from convert.sources.sunrgbd_tables import LABEL_NAMES, SCENE_TYPES_OF_19
from shards.dataset import ShardSet
from shards.spec import ConversionSettings
from train.__main__ import main
from train.data import ShardDataset, create_dataloaders

TINY = ("--epochs", "1", "--batch-size", "8", "--width", "4", "--size", "32", "--num-workers", "0")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("sun")
    write_sunrgbd(folder / "rooms", 48)
    settings = ConversionSettings(size=32, fields=("rgb", "depth", "label"))
    return converted(folder / "rooms", folder / "out", replace(settings, rows_per_shard=16))


def labels_of(found: ShardSet, target: str) -> np.ndarray:
    """All targets of the test rows."""
    _, loader = create_dataloaders(found.path, batch_size=8, num_workers=0, target=target)
    return np.concatenate([target.numpy().ravel() for *_, target in loader])


def test_the_19_of_the_usual_protocol_are_the_classes_and_other_rows_are_left_out(
    found: ShardSet,
) -> None:
    train, test = create_dataloaders(found.path, batch_size=8, num_workers=0, num_classes=None)
    dataset = test.dataset
    assert isinstance(dataset, ShardDataset)
    assert dataset.classes == list(SCENE_TYPES_OF_19)
    types = np.array(found.dataset.scene_types)[found.column("scene_type")]
    is_test = found.column("split") == 1
    n_left = int(np.isin(types[is_test], SCENE_TYPES_OF_19).sum())
    assert 0 < n_left == len(dataset) < is_test.sum()
    rgb, depth, label = next(iter(train))
    assert (tuple(rgb.shape[1:]), tuple(depth.shape[1:])) == ((3, 32, 32), (1, 32, 32))
    assert set(label.tolist()) <= set(range(19))


def test_labels_are_37_classes_or_13(found: ShardSet) -> None:
    of_37 = labels_of(found, "semantic")
    of_13 = labels_of(found, "semantic13")
    table = found.dataset.label_table(13)
    is_void = of_37 == -100
    assert len(LABEL_NAMES) > of_37.max() >= 13 > of_13.max()
    assert of_37.size == of_13.size
    for k in np.unique(of_37[~is_void]):
        assert set(np.unique(of_13[of_37 == k])) == {table.ids[k + 1] - 1}


@pytest.mark.parametrize("task", ["scene", pytest.param("semantic13", marks=pytest.mark.stress)])
def test_a_run_goes_to_its_end(found: ShardSet, tmp_path: Path, task: str) -> None:
    out = tmp_path / "run"
    assert main(["--data", str(found.path), "--out", str(out), "--task", task, *TINY]) == 0
    lines = (out / "classes.csv").read_text().splitlines()
    assert len(lines) - 1 == (19 if task == "scene" else 13)
