"""What an order that needs only some shards at a time costs in accuracy, on a real set.

    python -m bench.orders_of_set --data DIR [--in-play 2 4] [--seeds 3] [flags of python -m train]

Each order trains the network of `python -m train` with its settings, without workers, and is scored
on the rows that such a run is scored on; a figure is the mean of the seeds, with their standard
deviation. Rows lie as they are stored, or dealt: the same shards with as many rows in each, but
which rows these are is dealt once, by the hash that deals a table's rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bench.command import add_number, add_numbers, exit_status, make_parser
from bench.orders import mean_and_spread
from bench.recipe import BATCH_OF_SCORING, Scores, as_text, learn, loader_over
from bench.train_flags import parse_with_settings
from convert.sources.dealing import dealt_order
from loader.loader import Loader
from shards.flags import Parser
from shards.spec import SPLITS
from train import ranks
from train.caching import shards_of_rows
from train.job import Loaders, TaskSetup, make_setup, rows_of_split
from train.order import Batches
from train.settings import Settings
from train.wheel import WheelBatches

DEFAULTS = {"size": 32, "width": 8, "epochs": 6, "batch_size": 32, "num_workers": 0}
Epochs = Callable[[int], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Dealt:
    """An order over rows that are dealt. rows: [N] which row of the set each position is."""

    order: Epochs
    rows: np.ndarray

    def __call__(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch."""
        return [np.sort(self.rows[batch]) for batch in self.order(epoch)]


def orders(setup: TaskSetup, in_play: Sequence[int]) -> dict[str, Epochs]:
    """What is compared, by name."""
    settings = setup.settings
    n_rows = len(setup.train_set)
    split = np.full(n_rows, SPLITS.index("train"), np.uint8)
    dealt_rows = dealt_order(split).astype(np.int64)
    _, shard_rows = shards_of_rows(setup.train_set.shard_set, setup.train_set.rows)

    found: dict[str, Epochs] = {"full": Batches(n_rows, settings.batch_size, settings.seed)}
    for w in in_play:
        wheel = WheelBatches(shard_rows, w, settings.batch_size, settings.seed)
        found[f"wheel of {w}"] = wheel
        found[f"wheel of {w}, rows dealt"] = Dealt(wheel, dealt_rows)
    return found


def scores_of(settings: Settings, name: str, in_play: Sequence[int]) -> Scores:
    """After a training in this order."""
    setup = make_setup(settings, ranks.join())
    order = orders(setup, in_play)[name]
    scored = rows_of_split(setup.train_set, setup.eval_split)
    loaders = Loaders(
        train=Loader(setup.train_set, order),
        eval=loader_over(scored, BATCH_OF_SCORING, None),
        split=setup.eval_split,
    )
    _, scores = learn(setup, loaders, settings.epochs, settings.weights)
    return scores


def report(settings: Settings, args: argparse.Namespace) -> None:
    """A line of each training as it ends, then a table with a line of each order."""
    torch.set_num_threads(1)
    setup = make_setup(settings, ranks.join())
    _, shard_rows = shards_of_rows(setup.train_set.shard_set, setup.train_set.rows)
    print(f"{len(setup.train_set)} train rows in {len(shard_rows)} shards: {shard_rows.tolist()}")
    found: dict[str, list[Scores]] = {name: [] for name in orders(setup, args.in_play)}
    for seed in range(settings.seed, settings.seed + args.seeds):
        for name, scores in found.items():
            scores.append(scores_of(replace(settings, seed=seed), name, args.in_play))
            print(f"seed {seed}, {name}: {as_text(scores[-1])}", flush=True)

    titles = list(found["full"][0])
    print(f"\n| order | {' | '.join(titles)} |")
    print("|---" * (len(titles) + 1) + "|")
    for name, scores in found.items():
        cells = [mean_and_spread([each[title] for each in scores], 3) for title in titles]
        print(f"| {name} | {' | '.join(cells)} |")


def make_flags() -> Parser:
    """Those of the command line, beside a training's."""
    parser = make_parser("orders_of_set", __doc__)
    add_numbers(parser, "--in-play", [2, 4], "shards of each wheel")
    add_number(parser, "--seeds", 3, "trainings of each order")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""

    def run() -> None:
        settings, args = parse_with_settings(make_flags(), argv, **DEFAULTS)
        report(settings, args)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
