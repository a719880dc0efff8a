"""Trainings in stages: which runs a recipe is made of, and with which settings.

The default recipe is the best of those compared that learn from the set alone
(docs/measurements/training.md): small pictures, a narrow network, and two runs. The first learns
the classes of the pixels, of which a row has thousands; the second learns the scenes, of which a
row has one, and starts from the first one's trunks. The pretrained one starts from ImageNet, which
knows colours: larger pictures of them, few epochs, only the last layers learn, at a slow rate, and
BatchNorm stays as it was. Of depth it knows edges and shapes at best: there all layers learn, for
longer. A run of each, asked together, is the best of all.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards.dataset import ShardSet
from shards.errors import ConflictingSettings, NeedsSetting, WrongSetting
from train.checkpoint import CLASS_TABLE
from train.settings import BUILT_IN, Settings

# What a recipe puts in the place of the settings' defaults; what is given is kept.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"size": 64, "width": 16, "batch_size": 32, "lr": 2e-3, "epochs": 40},
    "pretrained": {
        "model": "lite0",
        "weights": "imagenet",
        "inputs": "rgb",
        "size": 224,
        "batch_size": 32,
        "lr": 2e-3,
        "trunk_lr": 0.04,
        "freeze_norms": 0,
        "freeze_maps": 3,
        "epochs": 8,
        "warmup_epochs": 1,
        "logit_adjustment": 0.5,
    },
}
# The pretrained one where depth alone is seen: ImageNet has never seen that, so all has to learn.
OF_DEPTH = {
    "size": 128,
    "trunk_lr": 1.0,
    "freeze_norms": "never",
    "freeze_maps": 0,
    "epochs": 30,
}
# And where each pixel is answered, a guess that was tried once.
OF_PIXELS = {"trunk_lr": 0.2, "freeze_maps": 0}
PARTS_SUFFIX = "-parts"  # of the first stage's run, and of its mirror
AUTO = "auto"
FINEST = 100  # classes of pixels; a network of so many learns each of them from too few


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of a recipe.

    `is_skipped_once_done`: a finished run there is taken as it is, unless it is to be reset.
    """

    settings: Settings
    is_skipped_once_done: bool = False

    def is_done(self) -> bool:
        """Whether the run was trained and reported before."""
        is_kept = self.is_skipped_once_done and not self.settings.reset
        return is_kept and Path(self.settings.out, CLASS_TABLE).is_file()


def defaults(
    recipe: str | None, model: str = BUILT_IN[0], task: str = "scene", inputs: str = ""
) -> dict[str, Any]:
    """The values that take the place of the settings' defaults; those that a network of this name
    can be told, for what it learns and sees. Raises WrongSetting.
    """
    if recipe is None:
        return {}
    if recipe not in RECIPES:
        raise WrongSetting("recipe", recipe, f"choose one of {', '.join(RECIPES)}")
    values = RECIPES[recipe]
    if recipe == "pretrained" and inputs == "depth":
        values = {**values, **OF_DEPTH}
    elif recipe == "pretrained" and task != "scene":
        values = {**values, **OF_PIXELS}
    if task != "scene":
        values = {name: value for name, value in values.items() if name != "logit_adjustment"}
    if model in BUILT_IN:
        return values
    return {name: value for name, value in values.items() if name != "freeze_maps"}


def plan(
    settings: Settings, dataset: ShardSet, recipe: str | None = None, start: str = AUTO
) -> list[Stage]:
    """The trainings to be done, one after the other; the last one is of `settings.out`.

    dataset: the opened set. recipe: a key of RECIPES, whose `defaults` are in `settings` already;
    None: one training. start: the run that learns the pixels first, "" for none; "auto": OUT-parts,
    where that can help. A run that is named is the user's: `reset` is not for it. Raises
    WrongSetting for what does not go together.
    """
    defaults(recipe)  # raises for an unknown one
    settings.check_out()
    if recipe is None:
        if start not in (AUTO, ""):
            raise NeedsSetting("start", start, "recipe", "default")
        return [Stage(settings=settings)]
    is_named = start != AUTO
    of_recipe = RECIPES[recipe].get("weights")
    if is_named and start and of_recipe and settings.weights == of_recipe:
        raise ConflictingSettings("start", start, "recipe", recipe)
    if not is_named:
        helps = may_start_from_pixels(settings) and "label" in dataset.manifest.fields
        start = settings.out.rstrip("/") + PARTS_SUFFIX if helps else ""
    return stages(settings, os.path.expanduser(start), pixels_task(dataset), is_named=is_named)


def pixels_task(dataset: ShardSet) -> str:
    """The classes of the pixels to learn first: the finest grouping of the labels, or these
    themselves where they are few.
    """
    spec = dataset.dataset
    if not spec.label_tables:
        return "semantic"
    numbers = [len(spec.label_names), *(len(table.names) for table in spec.label_tables)]
    fine = [number for number in numbers if number <= FINEST]
    return f"semantic{max(fine, default=min(numbers))}"


def may_start_from_pixels(settings: Settings) -> bool:
    """Whether the network is a built-in one, without weights of the user's own. (timm's have other
    layers for pixels than for whole pictures.)
    """
    return settings.model in BUILT_IN and not settings.weights


def stages(settings: Settings, start: str, task: str, *, is_named: bool = False) -> list[Stage]:
    """The run `start`, which learns `task`, then `settings` from its weights; "": only these.

    is_named: `start` is a run of the user's choice, which is never reset.

    Raises ConflictingSettings where `settings` already start from something else.
    """
    if not start:
        return [Stage(settings=settings)]
    if not may_start_from_pixels(settings):
        other = "weights" if settings.weights else "model"
        raise ConflictingSettings("start", start, other, getattr(settings, other))

    mirror = settings.mirror
    first = replace(
        settings,
        task=task,
        out=start,
        mirror=mirror.rstrip("/") + PARTS_SUFFIX if mirror else None,
        reset=settings.reset and not is_named,
        logit_adjustment=0.0,  # which is for scenes
    )
    second = replace(settings, weights=start)
    return [Stage(settings=first, is_skipped_once_done=True), Stage(settings=second)]
