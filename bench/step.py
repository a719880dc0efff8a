"""What the loader costs a training step.

    python -m bench.step --data DIR [--pairs 15] [flags of python -m train but --out]

Each pair times the same number of steps twice, with the real loader's batches and with one batch
over and over, in an order that alternates. The figure is the median of the pairs' ratios with a
95 % bootstrap interval; 1 is a loader that does not show. Before each timed part a few steps run
untimed, so that batches made during a pause do not count.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.command import add_number, exit_status, make_parser
from bench.figures import median_interval
from bench.train_flags import parse_with_settings
from loader.loader import Loader
from shards.flags import Parser
from train import ranks
from train.checkpoint import Run
from train.job import TaskSetup, make_setup, new_run, open_loaders, to_learn
from train.loop import train_step

N_UNTIMED = 4  # steps, more than the loader holds ready


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Seconds a step, of the two halves."""

    with_loader_s: float
    one_batch_s: float


def endless(loader: Loader) -> Iterator[Any]:
    """Epoch after epoch of the real loader."""
    while True:
        yield from loader


def repeated(loader: Loader) -> Iterator[Any]:
    """One batch, over and over."""
    first = next(iter(loader))
    # The loader's memory is used again.
    return itertools.repeat(tuple(part.clone() for part in first))


def time_steps(batches: Iterator[Any], run: Run, setup: TaskSetup, n_steps: int) -> float:
    """Seconds a step."""
    started = 0.0
    for k, batch in enumerate(itertools.islice(batches, N_UNTIMED + n_steps)):
        if k == N_UNTIMED:  # with the batch of the first timed step at hand
            synchronize(setup)
            started = time.perf_counter()
        train_step(run, setup, batch, slice(None))
    synchronize(setup)
    return (time.perf_counter() - started) / n_steps


def synchronize(setup: TaskSetup) -> None:
    """Wait for what a GPU still has to do."""
    if setup.device.type == "cuda":
        torch.cuda.synchronize()


def time_pairs(setup: TaskSetup, n_pairs: int, n_steps: int) -> Iterator[Pair]:
    """The halves in an order that alternates, beginning with the one batch."""
    run = new_run(setup)
    to_learn(run.model, setup.settings, 0)
    loader = open_loaders(setup, setup.eval_split).train
    real = endless(loader)
    one = repeated(loader)

    for k in range(n_pairs):
        if k % 2:
            with_loader_s = time_steps(real, run, setup, n_steps)
            one_batch_s = time_steps(one, run, setup, n_steps)
        else:
            one_batch_s = time_steps(one, run, setup, n_steps)
            with_loader_s = time_steps(real, run, setup, n_steps)
        yield Pair(with_loader_s=with_loader_s, one_batch_s=one_batch_s)


def print_table(pairs: Sequence[Pair]) -> None:
    """The medians of both, in milliseconds."""
    with_loader_ms = 1e3 * statistics.median(pair.with_loader_s for pair in pairs)
    one_batch_ms = 1e3 * statistics.median(pair.one_batch_s for pair in pairs)
    print(f"{'with the loader':20} {with_loader_ms:7.1f} ms a step")
    print(f"{'one batch repeated':20} {one_batch_ms:7.1f} ms a step")


def make_flags() -> Parser:
    """Those of the command line, beside a training's."""
    parser = make_parser("step", __doc__)
    add_number(parser, "--pairs", 15, "how often each pair is timed")
    add_number(parser, "--steps", 12, "timed steps of each half of a pair")
    return parser


def report(argv: Sequence[str] | None) -> None:
    """Time the pairs and print the table."""
    defaults = {"batch_size": 32, "size": 96, "width": 16, "num_classes": 10}
    settings, args = parse_with_settings(make_flags(), argv, **defaults)

    setup = make_setup(settings, ranks.join())
    pairs = list(time_pairs(setup, args.pairs, args.steps))
    print_table(pairs)
    ratio = median_interval([pair.with_loader_s / pair.one_batch_s for pair in pairs])
    network = f"size {settings.size}, width {settings.channels}"
    machine = f"{torch.get_num_threads()} threads, {setup.device}"
    where = f"batches of {settings.batch_size}, {network}, {machine}"
    bounds = f"({ratio.low:.3f}-{ratio.high:.3f}, 95 %)"
    print(f"ratio {ratio.median:.3f} {bounds}, {args.pairs} pairs of {args.steps} steps, {where}")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return exit_status(lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main())
