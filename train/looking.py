"""What augmentation does, as a page to look at: rows as stored, and as a training sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.dataset import ShardSet
from shards.spec import class_colours
from train.answers import RowNames
from train.augment import Draws, augment
from train.data import ShardDataset
from train.job import seed_of
from train.plots import CaptionedPanels, Panel, depth_colours, label_colours, page_png
from train.recipe import pixels_task
from train.settings import Settings

N_ROWS = 8
N_STEPS = 3
MOST_NAMED = 16  # classes in the legend


@dataclass(frozen=True, kw_only=True)
class Version:
    """Some rows as they are stored, or after the draws of one step.

    rgb [B,3,H,W], depth [B,1,H,W] in millimetres, ids [B,H,W] of classes where the set has labels.
    """

    rgb: Tensor
    depth: Tensor
    ids: Tensor | None

    def panels(self, k: int, n_classes: int) -> list[Panel]:
        """Of its row k."""
        rgb_hwc = self.rgb[k].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
        panels = [rgb_hwc, depth_colours(self.depth[k, 0].numpy() / 1000)]
        if self.ids is not None:
            panels.append(label_colours(self.ids[k].numpy(), n_classes))
        return panels


def augmentations_png(settings: Settings, found: ShardSet) -> bytes:
    """A page of train rows across the set, as PNG: each as stored, then three times as `augment`
    changes it with these settings; rgb, depth and, where the set has them, labels.

    found: the opened set, in the place of `settings.data`. Raises MissingSet, MissingField, and
    ModuleNotFoundError without matplotlib.
    """
    has_labels = "label" in found.manifest.fields
    target = pixels_task(found) if has_labels else "depth"
    dataset = ShardDataset(found, fields=("rgb", "depth"), target=target)
    positions = np.unique(np.linspace(0, len(dataset) - 1, N_ROWS).astype(np.int64))
    rgb, depth, classes = dataset.stored(positions)
    stored = Version(rgb=rgb, depth=depth, ids=classes if has_labels else None)
    steps = [_augmented(stored, settings, step) for step in range(N_STEPS)]

    names = RowNames(dataset)
    n_classes = len(dataset.classes)
    pictures = []
    for k, position in enumerate(positions.tolist()):
        panels = [panel for each in (stored, *steps) for panel in each.panels(k, n_classes)]
        pictures.append(CaptionedPanels(caption=f"{names[position]}\nas stored", panels=panels))
    title = f"augmentation: crop {settings.crop:g}, jitter {settings.jitter:g}, mirrored or not"
    return page_png(title, _heads(has_labels), pictures, _legend(stored, dataset.classes))


def _augmented(stored: Version, settings: Settings, step: int) -> Version:
    """With the draws of this step of a first epoch."""
    size = settings.size or stored.rgb.shape[-1]
    planes = [stored.depth] if stored.ids is None else [stored.depth, stored.ids]
    draws = Draws(seed_of(settings.seed, 0, step), len(stored.rgb))
    rgb, planes = augment(stored.rgb, planes, draws, size, settings)
    return Version(rgb=rgb, depth=planes[0], ids=planes[1] if len(planes) > 1 else None)


def _heads(has_labels: bool) -> list[str]:
    """Of the panels of a row."""
    kinds = ["rgb", "depth", "label"] if has_labels else ["rgb", "depth"]
    return [*kinds, *(f"{kind}, step {step + 1}" for step in range(N_STEPS) for kind in kinds)]


def _legend(stored: Version, names: list[str]) -> dict[str, Panel]:
    """The classes that most of the pixels shown are of."""
    if stored.ids is None:
        return {}
    counts = torch.bincount(stored.ids[stored.ids >= 0], minlength=len(names))
    most = counts.argsort(descending=True, stable=True)[:MOST_NAMED].tolist()
    colours = class_colours(len(names))[1:]  # the first is of void
    return {names[k]: colours[k] for k in sorted(most) if counts[k]}
