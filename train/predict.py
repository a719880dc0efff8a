"""python -m train predict: what runs say, alone or together, about test rows or another set."""

from __future__ import annotations

import csv
import math
import os
import struct
import zlib
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.dataset import ShardSet
from shards.errors import MissingSet, UserError, WrongSetting, one_line
from shards.files import log
from shards.manifest import FAILED, RIGHT_ROW
from shards.spec import SPLITS, VOID
from train.answers import MOST_PICTURES, Prediction, answer_of, prediction_of
from train.any_set import AnySet, AskedRows, answer_file, asked_setup
from train.checkpoint import Checkpoint, Run, newest, only_writer, write_csv
from train.errors import MissingDepth, NeedsSet, NoCheckpoint, WrongCheckpoint
from train.inputs import Batch
from train.job import (
    NetworkSetup,
    TaskSetup,
    make_setup,
    network_setup,
    new_run,
    open_loaders,
    open_set_of,
    reported_split,
)
from train.learnt import Learnt
from train.loop import evaluate, predict_batch
from train.opening import is_elsewhere, open_for_training
from train.progress import VOICE, Progress
from train.report import draw, page, tables_and_pictures, write
from train.settings import Settings

ANSWERS = "answers"  # the folder of dense ones
PREDICTIONS = "predictions.csv"
UNANSWERED = "unanswered.csv"
SHOWN = 10  # pictures that are named on the terminal
CPU = torch.device("cpu")


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
    checkpoints = [_newest(directory) for directory in run]
    given = _opened(data, checkpoints[0]) if data else None
    together = Together(_load_all(run, checkpoints, given), shares)
    target = Path(os.path.expanduser(out or f"{run[0]}/predict"))
    if isinstance(together.setup, TaskSetup) and _is_own(checkpoints[0], given):
        files = _score_own_rows(together, together.setup, target)
    else:
        assert given is not None
        files = _answer_all(together, AnySet(together.setup, given), target)
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


# ---------------------------------------------------------------- runs, and several as one


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run with the weights of its newest checkpoint, on the CPU."""

    directory: str
    fingerprint: str  # of the set that it learnt from
    setup: NetworkSetup
    run: Run


def _newest(directory: str) -> Checkpoint:
    """Raises NoCheckpoint."""
    found = newest(Settings("", directory))
    if found is None:
        raise NoCheckpoint(f"{directory} has no checkpoint", run=directory)
    return found


def _opened(data: str, checkpoint: Checkpoint) -> ShardSet:
    settings = checkpoint.settings
    allow_remote = bool(settings.get("allow_remote"))
    cache_dir = settings.get("cache_dir") if is_elsewhere(data) else None
    return open_for_training(data, allow_remote=allow_remote, cache_dir=cache_dir)


def _is_own(checkpoint: Checkpoint, given: ShardSet | None) -> bool:
    """Whether a set is the one that the run learnt from; None stands for that."""
    return given is None or given.manifest.fingerprint == checkpoint.fingerprint


def _load_all(
    run: Sequence[str], checkpoints: Sequence[Checkpoint], given: ShardSet | None
) -> list[LoadedRun]:
    """Raises UserError for runs that cannot answer together, and as `load_run` does."""
    opened: dict[str | tuple[str, ...], ShardSet] = {}
    pairs = zip(run, checkpoints, strict=True)
    loaded = [load_run(directory, found, given, opened) for directory, found in pairs]
    for each in loaded:
        if _what_is_learnt(each) != _what_is_learnt(loaded[0]):
            what = f"{each.directory} does not learn what {run[0]} does, from the same set"
            raise UserError(what, "Name runs that do")
    return loaded


def load_run(
    directory: str,
    found: Checkpoint,
    given: ShardSet | None,
    opened: dict[str | tuple[str, ...], ShardSet],
) -> LoadedRun:
    """The run of a checkpoint; says how far it is.

    given: the set to be asked about, or None for the run's own. opened: sets by their place, to
    which its own is added: runs of one set open it once. Raises WrongCheckpoint, and UserError
    where its own set is needed and absent.
    """
    try:
        settings = Settings(**found.settings)
        setup = _setup_of(settings, found, given, opened)
        run = new_run(setup)
        run.model.load_state_dict(found.model)
        run.model.eval()
    except (TypeError, KeyError, RuntimeError) as error:
        what = f"{found.path} is of another version or network ({one_line(error)})"
        raise WrongCheckpoint(what, run=directory, path=found.path) from None
    print(f"{found.path}: {found.epoch} epochs")
    return LoadedRun(directory=directory, fingerprint=found.fingerprint, setup=setup, run=run)


def _setup_of(
    settings: Settings,
    found: Checkpoint,
    given: ShardSet | None,
    opened: dict[str | tuple[str, ...], ShardSet],
) -> NetworkSetup:
    """With its own set where that is given or needed; else what the checkpoint keeps of it."""
    if given is not None and _is_own(found, given):
        return make_setup(replace(settings, data=str(given.path)), CPU, given)
    if given is not None and found.learnt is not None:
        return network_setup(settings, Learnt.from_plain(found.learnt), CPU)

    own = opened.get(settings.data) or _own_set(settings, found, is_asked_about=given is None)
    opened[settings.data] = own
    return make_setup(settings, CPU, own)


def _own_set(settings: Settings, found: Checkpoint, *, is_asked_about: bool) -> ShardSet:
    """The set that the run learnt from, where it was. Raises UserError where it is not there."""
    try:
        own = open_set_of(settings)
    except MissingSet as error:
        if is_asked_about:
            raise
        # Checkpoints of earlier versions keep nothing of the set.
        what = f"{found.path} does not say what its classes are, and its own set is gone"
        raise UserError(f"{what}: {error.problem}", "Put it there again") from None
    if not _is_own(found, own):
        what = f"{found.path} was trained on shards {found.fingerprint[:8]}"
        now = f"{settings.data} holds {own.manifest.fingerprint[:8]} now"
        raise MissingSet(own.path, f": {what}, {now}", "Say which set is meant")
    return own


def _what_is_learnt(loaded: LoadedRun) -> tuple[Any, ...]:
    """What networks must have in common to answer together."""
    settings = loaded.setup.settings
    return (settings.task, settings.num_classes, settings.further_fields, loaded.fingerprint)


class Together:
    """Runs as one, whatever each of their networks sees: the mean of their outputs, by `shares`.

    run, setup: of the one that is handed the most of each row.
    """

    def __init__(self, members: list[LoadedRun], shares: Sequence[float]) -> None:
        self._members = members
        self._shares = [share / sum(shares) for share in shares]
        reader = max(members, key=lambda each: (each.setup.sees_depth, each.setup.sees_surfaces))
        self.run = reader.run
        self.setup = reader.setup

    def about_any_set(self) -> Together:
        """The same, to be asked about rows of another set."""
        members = [replace(each, setup=asked_setup(each.setup)) for each in self._members]
        return Together(members, self._shares)

    def ask(
        self,
        batch: Batch,
        *,
        test_time_augmentation: bool = True,
        done: Callable[[float], object] | None = None,
    ) -> tuple[Tensor, Batch]:
        """As `predict_batch`. batch: `setup.batch_fields` and the target."""
        stored = dict(zip(self.setup.batch_fields, batch, strict=False))
        mean: Tensor | None = None
        for member, share in zip(self._members, self._shares, strict=True):
            own = [stored[name] for name in member.setup.batch_fields]
            out, seen = predict_batch(
                member.run,
                member.setup,
                (*own, batch[-1]),
                test_time_augmentation=test_time_augmentation,
                done=None if done is None else lambda rows: done(rows / len(self._members)),
            )
            mean = share * out if mean is None else mean + share * out
        assert mean is not None
        return mean, seen


def needed_set(run: Sequence[str], images: str) -> NeedsSet:
    """What a set of a folder of pictures is to be like, so that runs can be asked about it.

    Raises NoCheckpoint, and UserError where that cannot be told.
    """
    checkpoints = [_newest(each) for each in run]
    found = checkpoints[0]
    if images and not Path(images).is_dir():
        raise UserError(f"{images} is no folder", "Name one with pictures in it")
    settings = Settings(**found.settings)
    if found.learnt is None:
        size = _own_set(settings, found, is_asked_about=False).settings.size
    else:
        size = Learnt.from_plain(found.learnt).size
    seen = [Settings(**each.settings).input_fields for each in checkpoints]
    is_alone = all(fields == ("rgb",) for fields in seen)
    return NeedsSet(images, run, size, "rgb" if is_alone else None)


# ---------------------------------------------------------------- every row of another set


class SetAnswers:
    """What is said of the rows of a set, as they come.

    table: lines of predictions.csv. shown: the first ones, with their pictures. unanswered: lines
    of unanswered.csv. files: dense answers, by their paths in `target`. counts: of the task, by
    split ("" where that means nothing), of the rows whose right answer is known; n_known: how many
    these are.
    """

    def __init__(self, setup: NetworkSetup, rows: AnySet, target: Path) -> None:
        self.setup = setup
        self.rows = rows
        self.target = target
        self.table: list[dict[str, Any]] = []
        self.shown: list[Prediction] = []
        self.unanswered = _unreadable(rows)
        self.files: set[Path] = set()
        self.counts: dict[str, Tensor] = {}
        self.n_known: dict[str, int] = {}

    @torch.inference_mode()
    def ask(self, together: Together, asked: AskedRows, bar: Progress) -> None:
        """Ask about some rows, and write dense answers. Raises CannotWrite."""
        out, (rgb, depth, true) = together.ask(asked.batch, done=bar.update)
        splits = self.rows.split_of(asked.rows)
        for k, row in enumerate(asked.rows.tolist()):
            if not asked.can_be_asked[k]:
                problem = "has no depth, which the network needs"
                self.unanswered.append(_unanswered(self.rows, row, problem))
                continue
            known = true[k] if _is_known(true[k]) else None
            answer = answer_of(self.setup, out[k], known)
            name = self.rows.names[row]
            pictures = (rgb[k], depth[k])
            self._keep(row, prediction_of(self.setup, name, answer, pictures, known))
            if known is not None:
                counts = self.setup.task.count(out[k : k + 1], true[k : k + 1])
                self._count(splits[k], counts)

    def sort(self) -> None:
        """As in the source: rows of a table are stored in an order of their own."""
        lines = self.rows.found.column("row")
        self.table.sort(key=lambda line: int(lines[line["row"]]))
        self.unanswered.sort(key=lambda line: int(lines[line["row"]]))

    def _keep(self, row: int, found: Prediction) -> None:
        line = {"row": row, **found.table_row}
        if found.predicted.ndim == 2:
            line["answer"] = str(self._write_dense(row, found))
        self.table.append(line)
        if len(self.shown) < MOST_PICTURES:
            self.shown.append(found)

    def _write_dense(self, row: int, found: Prediction) -> Path:
        file = Path(ANSWERS, answer_file(found.table_row["picture"]))
        if file in self.files:  # of another row that names the same picture
            file = file.with_suffix(f".%row{row}.png")
        self.files.add(file)
        path = self.target / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, answer_png(found.predicted, self.setup.task.n_out))
        return file

    def _count(self, split: str, counts: Tensor) -> None:
        before = self.counts.get(split)
        self.counts[split] = counts if before is None else before + counts
        self.n_known[split] = self.n_known.get(split, 0) + 1


def _answer_all(together: Together, rows: AnySet, target: Path) -> list[str]:
    """Tables, a page and dense answers about every right row of a set; the files' names."""
    setup = together.setup
    about = together.about_any_set()
    with only_writer(target, "written"):
        answers = SetAnswers(setup, rows, target)
        with Progress("predicting", "pictures", len(rows)) as bar:
            for asked in rows.asked():
                answers.ask(about, asked, bar)
        if not answers.table and setup.sees_depth and len(rows):
            raise MissingDepth(rows.found.path)
        answers.sort()
        files = _write_tables(answers)
    _say(answers)
    return files


def _unreadable(rows: AnySet) -> list[dict[str, Any]]:
    """The rows that were not converted; why is in the set's failed.csv alone, which may be gone."""
    failed = np.flatnonzero(rows.found.column("status") != RIGHT_ROW).tolist()
    why: dict[int, str] = {}
    try:
        with open(rows.found.path / FAILED, encoding="utf-8", newline="") as file:
            why = {int(line["set_row"]): line["problem"] for line in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        pass
    return [_unanswered(rows, row, why.get(row, "could not be read")) for row in failed]


def _unanswered(rows: AnySet, row: int, problem: str) -> dict[str, Any]:
    return {"row": row, "picture": rows.names[row], "problem": problem}


def _is_known(true: Tensor) -> bool:
    """Whether anything of a target is: a class, or metres."""
    if true.is_floating_point():
        return bool((true > 0).any())
    return bool((true != VOID).any())


def _write_tables(answers: SetAnswers) -> list[str]:
    """The names of the files, the folder of dense answers as one."""
    target = answers.target
    files = []
    for name, table in ((PREDICTIONS, answers.table), (UNANSWERED, answers.unanswered)):
        if table:
            write_csv(target / name, table)
            files.append(name)
        else:
            (target / name).unlink(missing_ok=True)
    if answers.files:
        files.append(ANSWERS)
    if answers.shown:
        files += _page(answers)
    return files


def _page(answers: SetAnswers) -> list[str]:
    title = str(answers.rows.found.path)
    path = answers.target / "page.png"
    try:
        return [draw(path, lambda: page(answers.setup, title, answers.shown))]
    except ModuleNotFoundError as error:
        missing = f"no page.png: {error.name} is not installed"
        log(f"{missing}. Install the extra show: pip install 'nyuv2-shards[show]'")
        return []


def _say(answers: SetAnswers) -> None:
    """Scores where something is known, then how many were answered and which were not."""
    for split in ("", *SPLITS):
        if split in answers.counts:
            scores = answers.setup.task.scores(answers.counts[split])
            listed = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            which = f"{split} rows" if split else "rows"
            print(f"on the {answers.n_known[split]} {which} whose answer is known:", listed)

    n_rows = len(answers.table) + len(answers.unanswered)
    print(f"answered {len(answers.table)} of {n_rows} pictures of {answers.rows.found.path}")
    for each in answers.unanswered[:SHOWN]:
        is_named = each["picture"] in each["problem"]
        name = "" if is_named else f"{each['picture']}: "
        print(f"not answered: {name}{each['problem']}")
    n_more = len(answers.unanswered) - SHOWN
    if n_more > 0:
        print(f"not answered: {n_more} more, all in {answers.target / UNANSWERED}")


# ---------------------------------------------------------------- pictures of answers


def answer_png(predicted_hw: np.ndarray, n_classes: int) -> bytes:
    """Numbers of classes, the first is 0: 8 bits, 16 where there are more than 256 of them. Metres
    as millimetres, 16 bits.
    """
    if predicted_hw.dtype.kind == "f":
        return _grey_png(np.round(predicted_hw * 1000).astype(">u2"))
    return _grey_png(predicted_hw.astype("|u1" if n_classes <= 256 else ">u2"))


def _grey_png(levels_hw: np.ndarray) -> bytes:
    """A PNG of whole numbers, 8 bits or 16 with the high byte first."""
    height, width = levels_hw.shape
    n_bits = 8 * levels_hw.itemsize
    header = struct.pack(">IIBBBBB", width, height, n_bits, 0, 0, 0, 0)
    # In front of each line is the number of its filter: 0, none.
    lines = b"".join(b"\0" + line.tobytes() for line in levels_hw)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, data) for name, data in parts)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)
