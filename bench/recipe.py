"""How good a recipe is, without the test rows: python -m bench.recipe --data DIR --minutes 5 [flags of python -m train]

The train split's scenes are dealt into folds; one is left out and judged, so no scene is on both sides. --minutes is
what each training may take: a first epoch is timed and the number of epochs follows from it, so recipes are compared at
equal time; without it at equal --epochs. --semantic-epochs come first, on the 40 classes of the same rows' pixels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from loader.loader import Loader
from loader.memory import NoRoom
from shards.format import UserError, open_set
from train import ranks
from train.checkpoint import Run
from train.data import ShardDataset
from train.job import TrainingJob, make_job, new_run
from train.loop import evaluate, train_step
from train.model import start_from
from train.order import Batches
from train.settings import Settings, add_flags


def fold_of_rows(dataset: ShardDataset, n_folds: int) -> np.ndarray:
    """The fold of every train row; rows of one scene stay together."""
    scene = open_set(dataset.path).column("scene")[dataset._rows]
    names = np.unique(scene)
    deal = np.random.default_rng(0).permutation(len(names)) % n_folds
    return deal[np.searchsorted(names, scene)]


def part(job: TrainingJob, keep: np.ndarray, batch_size: int, seed: int | None) -> Loader:
    """A loader over some of the train rows."""
    s = job.settings
    chosen: Any = {"fields": job.train_set.fields, "target": s.task, "num_classes": s.num_classes}
    dataset = ShardDataset(job.train_set.path, split="train", **chosen)
    dataset._rows = dataset._rows[keep]
    return Loader(dataset, Batches(len(dataset), batch_size, seed))


def learn(job: TrainingJob, n_epochs: int, weights: str | None = None) -> tuple[Run, dict[str, float]]:
    """The run, and the scores of the fold left out, after n_epochs."""
    run = new_run(job)
    start_from(run.model, weights)
    job.net = run.model
    for epoch in range(n_epochs):
        job.train_loader.set_epoch(epoch)
        run.model.train()
        for batch in job.train_loader:
            train_step(run, job, batch, slice(None))
        run.history.append({})
        run.step = 0
    return run, evaluate(run, job)


def fold_job(settings: Settings, fold: int, n_folds: int) -> TrainingJob:
    """Trains without this fold of the train scenes, and is judged by it."""
    job = make_job(settings, ranks.join())
    folds = fold_of_rows(job.train_set, n_folds)
    job.train_loader = part(job, folds != fold, settings.batch_size, settings.seed)
    job.test_loader = part(job, folds == fold, 64, None)
    job.train_set = job.train_loader.dataset
    return job


def judge(settings: Settings, fold: int, n_folds: int, minutes: float, n_semantic: int) -> dict[str, float]:
    started, weights, n_epochs = time.perf_counter(), settings.weights, settings.epochs
    with tempfile.TemporaryDirectory() as directory:
        if n_semantic:
            semantic = replace(settings, task="semantic40", epochs=n_semantic)
            run, scores = learn(fold_job(semantic, fold, n_folds), n_semantic, weights)
            torch.save(run.model.state_dict(), weights := f"{directory}/semantic.pt")
            print(f"fold {fold}: semantic classes:", _text(scores), flush=True)
        job = fold_job(settings, fold, n_folds)
        if minutes:
            job.settings = replace(settings, epochs=1)
            learn(job, 1)  # warm: files, caches of the convolutions
            started = time.perf_counter()
            learn(job, 1)
            n_epochs = max(1, int(60 * minutes / (time.perf_counter() - started)))
            job.settings = replace(settings, epochs=n_epochs)
            started = time.perf_counter()
        scores = learn(job, n_epochs, weights)[1]
    return {"epochs": n_epochs, "seconds": time.perf_counter() - started, **scores}


def _text(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.recipe", description=(__doc__ or "").split("\n", 1)[0])
    add_flags(parser)
    parser.add_argument("--minutes", type=float, default=0.0, help="of each training, instead of --epochs")
    parser.add_argument("--semantic-epochs", type=int, default=0, help="before, on the pixels' classes")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--only", type=int, metavar="FOLD", help="leave out this fold only")
    parser.set_defaults(out=tempfile.gettempdir())
    next(a for a in parser._actions if a.dest == "out").required = False
    values = vars(parser.parse_args(argv))
    n_folds, only = values.pop("folds"), values.pop("only")
    how = values.pop("minutes"), values.pop("semantic_epochs")
    try:
        found = []
        for fold in range(n_folds) if only is None else [only]:
            found.append(judge(Settings(**values), fold, n_folds, *how))
            print(f"fold {fold}:", _text(found[-1]), flush=True)
    except (UserError, NoRoom) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print("mean:  ", _text({k: float(np.mean([each[k] for each in found])) for k in found[0]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
