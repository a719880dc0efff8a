"""How good a recipe is, without the test rows.

    python -m bench.recipe --data DIR --minutes 5 [flags of python -m train but --out]

The train split's scenes are dealt into folds; one is left out and judged, so no scene is on both
sides. --minutes is what each training may take: a first epoch is timed and the number of epochs
follows from it, so recipes are compared at equal time; without it at equal --epochs. Those of
--semantic-epochs come first, on the 40 classes of the same rows' pixels.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench.command import MOST, add_number, exit_status, make_parser
from bench.train_flags import parse_with_settings
from loader.loader import Loader
from shards.flags import Parser, whole
from train import ranks
from train.checkpoint import Run
from train.data import ShardDataset
from train.job import Loaders, TaskSetup, make_setup, new_run, to_learn
from train.loop import evaluate, train_step
from train.model import start_from
from train.order import Batches
from train.settings import Settings

Scores = dict[str, float]
BATCH_OF_SCORING = 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How each recipe is judged."""

    n_folds: int
    minutes: float  # of each training; 0: as many epochs as the settings say
    n_semantic_epochs: int


def fold_of_rows(dataset: ShardDataset, n_folds: int) -> np.ndarray:
    """The fold of every train row; rows of one scene stay together."""
    scene = dataset.row_facts("scene")
    scenes = np.unique(scene)
    fold_of_scene = np.random.default_rng(0).permutation(len(scenes)) % n_folds
    return fold_of_scene[np.searchsorted(scenes, scene)]


def loader_over(dataset: ShardDataset, batch_size: int, seed: int | None) -> Loader:
    """Without workers. No seed: in order."""
    return Loader(dataset, Batches(len(dataset), batch_size, seed))


def fold_setup(settings: Settings, fold: int, n_folds: int) -> tuple[TaskSetup, Loaders]:
    """Trains without this fold of the train scenes, and is judged by it."""
    setup = make_setup(settings, ranks.join())
    folds = fold_of_rows(setup.train_set, n_folds)
    left_in = setup.train_set.subset(folds != fold)
    left_out = setup.train_set.subset(folds == fold)
    loaders = Loaders(
        train=loader_over(left_in, settings.batch_size, settings.seed),
        eval=loader_over(left_out, BATCH_OF_SCORING, None),
        split=setup.eval_split,
    )
    return replace(setup, train_set=left_in), loaders


def learn(
    setup: TaskSetup, loaders: Loaders, n_epochs: int, weights: str | None = None
) -> tuple[Run, Scores]:
    """The run, and the scores of the fold left out, after n_epochs."""
    run = new_run(setup)
    start_from(run.model, weights)
    return run, learn_from(run, setup, loaders, n_epochs)


def learn_from(run: Run, setup: TaskSetup, loaders: Loaders, n_epochs: int) -> Scores:
    """Train a new run for n_epochs; the scores of the fold left out."""
    for epoch in range(n_epochs):
        loaders.train.set_epoch(epoch)
        to_learn(run.model, setup.settings, epoch)
        for batch in loaders.train:
            train_step(run, setup, batch, slice(None))
        run.history.append({})  # a run counts its epochs by these
        run.step = 0
    return evaluate(run, setup, loaders).scores


def learn_semantic(settings: Settings, fold: int, plan: Plan, path: Path) -> None:
    """Train on the pixels' classes of the same rows first; the weights go to `path`."""
    n_epochs = plan.n_semantic_epochs
    semantic = replace(settings, task="semantic40", epochs=n_epochs, logit_adjustment=0.0)
    setup, loaders = fold_setup(semantic, fold, plan.n_folds)
    run, scores = learn(setup, loaders, n_epochs, settings.weights)
    torch.save(run.model.state_dict(), path)
    print(f"fold {fold}: semantic classes:", as_text(scores), flush=True)


def epochs_within(minutes: float, setup: TaskSetup, loaders: Loaders) -> int:
    """How many fit, by the time that one takes."""
    one = replace(setup, settings=replace(setup.settings, epochs=1))
    learn(one, loaders, 1)  # warm: files, caches of the convolutions
    started = time.perf_counter()
    learn(one, loaders, 1)
    epoch_s = time.perf_counter() - started
    return max(1, int(60 * minutes / epoch_s))


def judge(settings: Settings, fold: int, plan: Plan) -> Scores:
    """The scores on a fold of training without it, and how many epochs and seconds that took."""
    started = time.perf_counter()
    n_epochs = settings.epochs
    weights = settings.weights
    with tempfile.TemporaryDirectory() as directory:
        if plan.n_semantic_epochs:
            path = Path(directory, "semantic.pt")
            learn_semantic(settings, fold, plan, path)
            weights = str(path)

        setup, loaders = fold_setup(settings, fold, plan.n_folds)
        if plan.minutes:
            n_epochs = epochs_within(plan.minutes, setup, loaders)
            setup = replace(setup, settings=replace(settings, epochs=n_epochs))
            started = time.perf_counter()
        _, scores = learn(setup, loaders, n_epochs, weights)
    return {"epochs": n_epochs, "seconds": time.perf_counter() - started, **scores}


def as_text(scores: Scores) -> str:
    """For a line of the table."""
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def make_flags() -> Parser:
    """Those of the command line, beside a training's."""
    parser = make_parser("recipe", __doc__)
    minutes_help = "of each training, instead of --epochs (default: %(default)s, by --epochs)"
    parser.add_argument("--minutes", type=float, default=0.0, metavar="N", help=minutes_help)
    semantic_help = f"before, on the pixels' classes (0 to {MOST}, default: %(default)s)"
    epochs = whole(0, MOST)
    parser.add_argument(
        "--semantic-epochs", type=epochs, default=0, metavar="N", help=semantic_help
    )
    add_number(parser, "--folds", 4, "in how many parts the scenes are dealt")
    only_help = f"leave out this fold only (0 to {MOST}, below --folds; default: each in turn)"
    parser.add_argument("--only", type=whole(0, MOST), metavar="FOLD", help=only_help)
    return parser


def report(argv: Sequence[str] | None) -> None:
    """The scores of each fold, then their mean."""
    settings, args = parse_with_settings(make_flags(), argv)
    plan = Plan(n_folds=args.folds, minutes=args.minutes, n_semantic_epochs=args.semantic_epochs)

    found = []
    for fold in range(plan.n_folds) if args.only is None else [args.only]:
        found.append(judge(settings, fold, plan))
        print(f"fold {fold}:", as_text(found[-1]), flush=True)
    means = {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}
    print("mean:  ", as_text(means))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return exit_status(lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main())
