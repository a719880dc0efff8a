"""What a network that has learnt elsewhere knows of the scenes before it learns from this set.

    python -m bench.probe --data DIR --sizes 128 192 224 [flags of python -m train but --out]

Its trunks stay as they start. A linear classifier learns from what they say of each train picture
and of its mirror image, and is judged on scenes that it has not seen: those of a fold, as in
bench.recipe. One line a size and each stream, then all streams together: a size or an input that is
poor here is poor to begin a training with, and asking costs a minute where training costs an hour.
--adapt-norms: BatchNorm first takes the statistics of an epoch of train pictures, as it does in a
training whose norms are not kept; nothing else changes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.command import add_numbers, exit_status, make_parser
from bench.recipe import BATCH_OF_SCORING, Scores, as_text, fold_of_rows, loader_over
from bench.train_flags import parse_with_settings
from shards.flags import Parser
from train import ranks
from train.augment import Draws, augment, resize
from train.inputs import Batch, network_inputs, on_device
from train.job import TaskSetup, make_setup, new_run, seed_of
from train.model import start_from
from train.networks.streams import StreamNetwork
from train.recipe import RECIPES
from train.settings import Settings
from train.tasks import Task

N_FOLDS = 4
STEPS = 60  # of L-BFGS
WEIGHT_DECAY = 0.03
SMALLEST_STD = 1e-3


@torch.inference_mode()
def features_of(setup: TaskSetup, model: StreamNetwork) -> tuple[dict[str, Tensor], Tensor]:
    """(by stream [rows, 2, channels]: of each picture and its mirror image; classes [rows])."""
    model.eval()
    found: dict[str, list[Tensor]] = {stream: [] for stream in model.streams}
    classes = []
    for batch in loader_over(setup.train_set, BATCH_OF_SCORING, None):
        inputs, target = _seen(setup, batch)
        classes.append(target)
        for stream, pictures in zip(model.streams, inputs, strict=True):
            trunk = model.trunk(stream)
            both = [trunk(seen)[-1].mean(dim=(2, 3)) for seen in pictures]
            found[stream].append(torch.stack(both, dim=1))
    return {stream: torch.cat(parts) for stream, parts in found.items()}, torch.cat(classes)


@torch.no_grad()
def adapt_norms(setup: TaskSetup, model: StreamNetwork) -> None:
    """An epoch of augmented pictures, of which only BatchNorm's statistics are kept."""
    settings = setup.settings
    model.train()
    loader = loader_over(setup.train_set, settings.batch_size, settings.seed)
    for step, batch in enumerate(loader):
        colours, planes, _ = on_device(setup, batch)
        draws = Draws(seed_of(settings.seed, 0, step), len(colours))
        size = settings.size or colours.shape[-1]
        model(*network_inputs(setup, *augment(colours, planes, draws, size, settings)))


def _seen(setup: TaskSetup, batch: Batch) -> tuple[list[list[Tensor]], Tensor]:
    """Of each stream, its pictures and their mirror images as the network sees them; the target."""
    colours, planes, target = on_device(setup, batch)
    colours, planes = resize(colours, planes, setup.settings.size or colours.shape[-1])
    mirrored = [plane.flip(-1) for plane in planes]
    one = network_inputs(setup, colours, planes)
    other = network_inputs(setup, colours.flip(-1), mirrored)
    return [list(pair) for pair in zip(one, other, strict=True)], target


def judge(task: Task, features: Tensor, classes: Tensor, is_left_out: Tensor) -> Scores:
    """The task's scores, and the cross entropy, of the rows left out, learnt from the others.

    features: [rows, views, channels]; the answer is the mean over the views.
    """
    learnt = features[~is_left_out]
    n_views, n_channels = learnt.shape[1:]
    mean = learnt.mean(dim=(0, 1))
    std = learnt.std(dim=(0, 1)) + SMALLEST_STD
    layer = torch.nn.Linear(n_channels, task.n_out)
    torch.nn.init.zeros_(layer.weight)

    inputs = ((learnt - mean) / std).flatten(0, 1)
    targets = classes[~is_left_out].repeat_interleave(n_views)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        decay = WEIGHT_DECAY * layer.weight.square().sum()
        total = F.cross_entropy(layer(inputs), targets) + decay
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[arg-type]  # it calls it more than once

    with torch.no_grad():
        answers = layer((features[is_left_out] - mean) / std).softmax(-1).mean(dim=1)
    right = classes[is_left_out]
    entropy = float(F.nll_loss(answers.log(), right))
    return {**task.scores(task.count(answers, right)), "cross_entropy": entropy}


def lines_of(common: Settings, size: int, *, is_adapted: bool) -> Iterator[str]:
    """Of one size: a line each stream and, where there are several, one of all."""
    started = time.perf_counter()
    setup = make_setup(replace(common, task="scene", size=size), ranks.join())
    model = new_run(setup).model
    start_from(model, common.weights)
    assert isinstance(model, StreamNetwork)
    if is_adapted:
        adapt_norms(setup, model)
    features, classes = features_of(setup, model)
    seconds = time.perf_counter() - started

    folds = torch.from_numpy(fold_of_rows(setup.train_set, N_FOLDS))
    if len(features) > 1:
        features["all"] = torch.cat(list(features.values()), dim=-1)
    for stream, of_stream in features.items():
        found = [judge(setup.task, of_stream, classes, folds == k) for k in range(N_FOLDS)]
        means = {name: float(np.mean([scores[name] for scores in found])) for name in found[0]}
        yield f"{size} px, {stream}: {as_text(means)}  ({seconds:.0f} s for the size)"


def make_flags() -> Parser:
    """Those of the command line, beside a training's."""
    parser = make_parser("probe", __doc__)
    add_numbers(parser, "--sizes", [128, 192, 224], "resolutions to ask at", low=32, high=1024)
    parser.add_argument(
        "--adapt-norms", action="store_true", help="let BatchNorm take this set's statistics first"
    )
    return parser


def report(argv: Sequence[str] | None) -> None:
    """The lines as they come."""
    common, args = parse_with_settings(make_flags(), argv, **RECIPES["pretrained"])
    for size in args.sizes:
        for line in lines_of(common, size, is_adapted=args.adapt_norms):
            print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return exit_status(lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main())
