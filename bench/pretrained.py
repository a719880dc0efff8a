"""Which settings suit a network that starts from ImageNet, without the test rows.

    python -m bench.pretrained --data DIR [--try NAME ...] [flags of python -m train but --out]

Each trial is the recipe "pretrained" with some settings changed; what is given on the command line
counts for all of them. The train split's scenes are dealt into folds as in bench.recipe: a trial
learns from all but one, and is judged by that. One line a trial and fold, then a table.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from bench.command import MOST, add_number, exit_status, make_parser
from bench.recipe import Scores, as_text, fold_setup, learn_from
from bench.train_flags import parse_with_settings
from shards.flags import Parser, whole
from train.job import new_run
from train.model import start_from
from train.networks.streams import StreamNetwork
from train.recipe import RECIPES
from train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Settings that differ from the recipe's; is_depth_fresh: the depth stream starts from nothing,
    beside an RGB stream that does not. lr: times the recipe's.
    """

    changes: dict[str, Any]
    lr: float = 1.0
    is_depth_fresh: bool = False

    def settings(self, common: Settings) -> Settings:
        """Of a run."""
        return replace(common, lr=common.lr * self.lr, **self.changes)


ALL_LEARN = {"trunk_lr": 1.0, "freeze_norms": "never", "freeze_maps": 0}
TRIALS = {
    "recipe": Trial(changes={}),
    "from nothing": Trial(changes={"weights": None, **ALL_LEARN}),
    "with depth": Trial(changes={"inputs": "rgbd"}),
    "depth": Trial(changes={"inputs": "depth"}),
    "depth, all layers": Trial(changes={"inputs": "depth", **ALL_LEARN}),
    "depth from nothing": Trial(changes={"inputs": "depth", "weights": None, **ALL_LEARN}),
    "depth stream from nothing": Trial(
        changes={"inputs": "rgbd", **ALL_LEARN, "trunk_lr": 0.2}, is_depth_fresh=True
    ),
    "all layers": Trial(changes={"freeze_maps": 0}),
    "head alone": Trial(changes={"freeze_maps": 4}),
    "twice the rate": Trial(changes={}, lr=2.0),
    "half the rate": Trial(changes={}, lr=0.5),
    "trunks at a fiftieth": Trial(changes={"trunk_lr": 0.02}),
    "trunks at a tenth": Trial(changes={"trunk_lr": 0.1}),
    "norms that learn": Trial(changes={"freeze_norms": "never"}),
    "classes as they come": Trial(changes={"logit_adjustment": 0.0}),
    "classes all alike": Trial(changes={"logit_adjustment": 1.0}),
    "larger crops": Trial(changes={"crop": 0.7}),
    "smaller crops": Trial(changes={"crop": 0.3}),
}


def start(model: nn.Module, weights: str | None, *, is_depth_fresh: bool) -> None:
    """As a training does it, but for a depth stream that is to be left as it is."""
    if not is_depth_fresh:
        start_from(model, weights)
        return
    assert isinstance(model, StreamNetwork)
    depth = model.trunk("depth")
    fresh = copy.deepcopy(depth.state_dict())
    start_from(model, weights)
    depth.load_state_dict(fresh)


def judge(trial: Trial, common: Settings, fold: int, n_folds: int) -> Scores:
    """The scores of a fold after training without it, and the seconds that it took."""
    started = time.perf_counter()
    settings = trial.settings(common)
    setup, loaders = fold_setup(settings, fold, n_folds)
    run = new_run(setup)
    start(run.model, settings.weights, is_depth_fresh=trial.is_depth_fresh)
    scores = learn_from(run, setup, loaders, settings.epochs)
    prefix = f"{setup.eval_split}_"  # as if the fold were these rows
    named = {name.removeprefix(prefix): value for name, value in scores.items()}
    return {"seconds": time.perf_counter() - started, **named}


def table(found: dict[str, list[Scores]]) -> list[str]:
    """A line a trial: the means over its folds."""
    (first, *_) = found.values()
    names = list(first[0])
    lines = [f"| trial | folds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for trial, of_folds in found.items():
        cells = [f"{np.mean([scores[name] for scores in of_folds]):.3f}" for name in names]
        lines.append(f"| {trial} | {len(of_folds)} | {' | '.join(cells)} |")
    return lines


def make_flags() -> Parser:
    """Those of the command line, beside a training's."""
    parser = make_parser("pretrained", __doc__)
    parser.add_argument(
        "--try",
        dest="trials",
        action="append",
        choices=list(TRIALS),
        metavar="NAME",
        help=f"may be repeated; one of: {', '.join(TRIALS)} (default: all)",
    )
    add_number(parser, "--folds", 4, "in how many parts the scenes are dealt")
    only_help = f"leave out this fold only (0 to {MOST}, below --folds; default: each in turn)"
    parser.add_argument("--only", type=whole(0, MOST), metavar="FOLD", help=only_help)
    return parser


def report(argv: Sequence[str] | None) -> None:
    """A line a trial and fold, as they come, then the table."""
    common, args = parse_with_settings(make_flags(), argv, **RECIPES["pretrained"])
    folds = range(args.folds) if args.only is None else [args.only]
    found: dict[str, list[Scores]] = {}
    for name in args.trials or TRIALS:
        found[name] = []
        for fold in folds:
            scores = judge(TRIALS[name], common, fold, args.folds)
            found[name].append(scores)
            print(f"{name}, fold {fold}:", as_text(scores), flush=True)
    print(*table(found), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return exit_status(lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main())
