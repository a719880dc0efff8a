"""python -m train predict: what runs say, alone or together, about test rows or another set."""

from __future__ import annotations

import math
import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from shards.errors import UserError, WrongSetting
from train.any_set import AnySet
from train.checkpoint import only_writer
from train.errors import NeedsSet
from train.job import TaskSetup, open_loaders, reported_split
from train.learnt import Learnt
from train.loop import evaluate
from train.progress import VOICE
from train.report import tables_and_pictures
from train.set_answers import answer_all
from train.together import (
    Together,
    is_own_set,
    load_runs,
    newest_of,
    open_asked,
    own_set,
    settings_of,
)


def predict_flags(parser: ArgumentParser) -> ArgumentParser:
    """The flags of `python -m train predict` are the arguments of `predict`."""
    parser.description = "What a run says about the test rows, or about every row of another set."
    parser.add_argument(
        "run", metavar="RUN", nargs="+", help="the --out of a run; of several: their mean"
    )
    parser.add_argument(
        "--data",
        metavar="SET|ROOT",
        help="another set of the same size, or where the run's own is now "
        "(default: its own, where it was)",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="a folder of pictures: names the two commands that make a set of it and ask about it "
        "(default: none)",
    )
    parser.add_argument(
        "--needs",
        action="store_true",
        help="print how a set is to be converted for it, and end (default: answer)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where the answers go (default: RUN/predict, of the first)"
    )
    parser.add_argument(
        "--shares",
        type=_numbers,
        metavar="X,X,...",
        help="how much each run counts, such as 1,0.3; in the order of the runs, more than 0 each "
        "(default: all the same)",
    )
    return parser


def _numbers(text: str) -> list[float]:
    """Of a flag: numbers parted by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text!r}: give numbers parted by commas") from None


def predict(
    run: list[str],
    images: str | None = None,
    data: str | None = None,
    out: str | None = None,
    shares: Sequence[float] | None = None,
) -> None:
    """Ask the newest checkpoints of runs, together, about the rows of a set.

    run: directories of runs. data: another set, all rows of which are asked about; or where the
    runs' own set is now, whose test rows are scored; None: that one, where it was. out: where
    tables and pages go. images: a folder of pictures, of which a set has to be made first: NeedsSet
    says which. shares: how much each run counts, None: as much as the others. Raises UserError.
    """
    _check_paths(run=run, images=images, data=data, out=out)
    shares = _checked_shares(shares, len(run))
    VOICE.has_spoken()
    run = [os.path.expanduser(each) for each in run]
    if images is not None:
        raise needed_set(run, os.path.expanduser(images))
    checkpoints = [newest_of(directory) for directory in run]
    given = open_asked(data, checkpoints[0]) if data else None
    together = Together(load_runs(run, checkpoints, given), shares)
    target = Path(os.path.expanduser(out or f"{run[0]}/predict"))
    if isinstance(together.setup, TaskSetup) and is_own_set(checkpoints[0], given):
        files = _score_own_rows(together, together.setup, target)
    else:
        assert given is not None
        files = answer_all(together, AnySet(together.setup, given), target)
    print("files:", *(str(target / name) for name in files))


def _check_paths(**paths: list[str] | str | None) -> None:
    """Raise WrongSetting for an empty one: a variable of a script that was never set."""
    for name, given in paths.items():
        if "" in (given if isinstance(given, list) else [given]):
            raise WrongSetting(name, "''", "an empty path. Give one, or leave it out")


def _checked_shares(shares: Sequence[float] | None, n_runs: int) -> Sequence[float]:
    """One for each run. Raises WrongSetting."""
    if shares is None:
        return [1.0] * n_runs
    are_positive = all(share > 0 for share in shares)
    if len(shares) != n_runs or not are_positive or not math.isfinite(sum(shares)):
        given = ",".join(f"{share:g}" for share in shares)
        advice = f"give {n_runs} numbers above 0, one for each run"
        raise WrongSetting("shares", given, advice)
    return shares


def _score_own_rows(together: Together, setup: TaskSetup, target: Path) -> list[str]:
    """Of the set that the runs learnt from: scores, tables and pictures of its test rows."""
    run = together.run
    loaders = open_loaders(setup, reported_split(setup))
    with only_writer(target, "written"):
        evaluation = evaluate(run, setup, loaders, ask=together.ask)
        scores = evaluation.scores.items()
        listed = ", ".join(f"{name} {value:.4f}" for name, value in scores)
        print(f"on the {loaders.split} rows:", listed, flush=True)
        assert evaluation.answers is not None
        return tables_and_pictures(target, run, evaluation.answers)


def needed_set(run: Sequence[str], images: str) -> NeedsSet:
    """What a set of a folder of pictures is to be like, so that runs can be asked about it.

    Raises NoCheckpoint, and UserError where that cannot be told.
    """
    checkpoints = [newest_of(each) for each in run]
    settings = [settings_of(*each) for each in zip(checkpoints, run, strict=True)]
    if images and not Path(images).is_dir():
        raise UserError(f"{images} is no folder", "Name one with pictures in it")
    first = checkpoints[0]
    if first.learnt is None:
        size = own_set(settings[0], first, is_asked_about=False).settings.size
    else:
        size = Learnt.from_plain(first.learnt).size
    is_alone = all(each.input_fields == ("rgb",) for each in settings)
    return NeedsSet(images, run, size, "rgb" if is_alone else None)
