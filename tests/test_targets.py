"""Several targets in one batch: each is what it is alone."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")

import torch

from shards.errors import UserError, WrongSetting
from shards.spec import VOID
from train.data import ShardDataset, create_dataloaders

BOTH = ("scene", "semantic40")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(
    "targets", [BOTH, ("depth", "scene"), ("semantic13", "semantic40", "instance", "scene")]
)
def test_of_several_targets_each_is_what_it_is_alone(
    small_set: Path, targets: tuple[str, ...], normalize: bool, device: str | None
) -> None:
    how = {"fields": ("rgb", "depth"), "normalize": normalize, "device": device}
    together = ShardDataset(small_set, target=targets, **how)  # type: ignore[arg-type]
    positions = np.array([3, 0, 2, 2])
    rgb, depth, *parts = together.batch(positions)
    assert len(parts) == len(targets)
    for target, part in zip(targets, parts, strict=True):
        alone = ShardDataset(small_set, target=target, **how)  # type: ignore[arg-type]
        at = np.searchsorted(alone.rows, together.rows[positions])
        own_rgb, own_depth, own = alone.batch(at)
        assert torch.equal(rgb, own_rgb)
        assert torch.equal(depth, own_depth)
        assert torch.equal(part, own)
        assert part.dtype == own.dtype
        assert together.classes_of(target) == alone.classes
    assert together.classes == together.classes_of(targets[0])


def test_a_loader_hands_over_several_targets_with_and_without_workers(small_set: Path) -> None:
    def first_epoch(num_workers: int) -> list[tuple[torch.Tensor, ...]]:
        loader, _ = create_dataloaders(
            small_set, batch_size=4, num_workers=num_workers, target=BOTH, normalize=False
        )
        return [tuple(part.clone() for part in batch) for batch in loader]

    alone, helped = first_epoch(0), first_epoch(2)
    dataset = ShardDataset(small_set, target=BOTH)
    n_classes = len(dataset.classes_of("semantic40"))
    for ours, theirs in zip(alone, helped, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
        _, _, scene, pixels = ours
        assert (scene.dtype, tuple(scene.shape)) == (torch.int64, (len(scene),))
        assert tuple(pixels.shape) == (len(scene), dataset.size, dataset.size)
        assert set(pixels.unique().tolist()) <= {VOID, *range(n_classes)}


@pytest.mark.parametrize("target", [(), ("scene", "scene"), ("scene", "colour"), ("scene", 3), 3])
def test_targets_that_are_none_are_one_line(small_set: Path, target: object) -> None:
    with pytest.raises(WrongSetting, match="each once"):
        ShardDataset(small_set, target=target)  # type: ignore[arg-type]


def test_labels_of_scenes_are_there_wherever_scenes_are_learnt(small_set: Path) -> None:
    both = ShardDataset(small_set, target=("semantic13", "scene"))
    np.testing.assert_array_equal(both.labels(), ShardDataset(small_set).labels())
    with pytest.raises(UserError, match="scene"):
        ShardDataset(small_set, target=("semantic13", "depth")).labels()
