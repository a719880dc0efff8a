"""What the loader costs a training step: python -m bench.step --data DIR [--pairs 15] [flags of python -m train]

Each pair times the same number of steps twice, with the real loader's batches and with one batch over and over, in an
order that alternates. The figure is the median of the pairs' ratios with a 95 % bootstrap interval; 1 is a loader that
does not show. Before each timed part a few steps run untimed, so that batches made during a pause do not count.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.loader import interval
from loader.memory import NoRoom
from shards.format import UserError
from train import ranks
from train.job import TrainingJob, make_job, new_run, open_loaders
from train.loop import train_step
from train.settings import Settings, add_flags

BEFORE = 4  # untimed steps, more than the loader holds ready


def endless(job: TrainingJob) -> Iterator[Any]:
    while True:
        yield from job.train_loader


def timed(batches: Iterator[Any], run: Any, job: TrainingJob, n_steps: int) -> float:
    """Seconds a step."""
    for k, batch in enumerate(itertools.islice(batches, BEFORE + n_steps)):
        if k == BEFORE:
            synchronize(job)
            started = time.perf_counter()
        train_step(run, job, batch, slice(None))
    synchronize(job)
    return (time.perf_counter() - started) / n_steps


def synchronize(job: TrainingJob) -> None:
    if job.device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.step", description=(__doc__ or "").split("\n", 1)[0])
    add_flags(parser)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each half of a pair")
    parser.set_defaults(batch_size=32, size=96, width=16, out=tempfile.gettempdir(), **{"num_classes": 10})
    next(a for a in parser._actions if a.dest == "out").required = False
    values = vars(parser.parse_args(argv))
    n_pairs, n_steps = values.pop("pairs"), values.pop("steps")
    try:
        job = make_job(Settings(**values), ranks.join())
        run = new_run(job)
        job.net = run.model.train()
        open_loaders(job)
        real, one = endless(job), itertools.repeat(tuple(part.clone() for part in next(iter(job.train_loader))))
    except (UserError, NoRoom) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    pairs = []
    for k in range(n_pairs):
        order = (real, one) if k % 2 else (one, real)
        first, second = (timed(batches, run, job, n_steps) for batches in order)
        pairs.append((second, first) if order[0] is one else (first, second))
    middle, low, high = interval([with_loader / alone for with_loader, alone in pairs])
    names = ("with the loader", "one batch repeated")
    for name, values_s in zip(names, zip(*pairs, strict=True), strict=True):
        print(f"{name:20} {1e3 * statistics.median(values_s):7.1f} ms a step")
    s = job.settings
    where = (
        f"batches of {s.batch_size}, size {s.size}, width {s.channels}, {torch.get_num_threads()} threads, {job.device}"
    )
    print(f"ratio {middle:.3f} ({low:.3f}-{high:.3f}, 95 %), {n_pairs} pairs of {n_steps} steps, {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
