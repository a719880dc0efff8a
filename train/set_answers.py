"""What runs say of every row of a set that they did not learn from."""

from __future__ import annotations

import csv
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.files import log
from shards.manifest import FAILED, RIGHT_ROW
from shards.spec import SPLITS, VOID
from train.answers import MOST_PICTURES, Prediction, answer_of, prediction_of
from train.any_set import AnySet, AskedRows, answer_file
from train.checkpoint import only_writer, write_csv
from train.errors import MissingDepth
from train.job import NetworkSetup
from train.progress import Progress
from train.report import draw, page, write
from train.together import Together

ANSWERS = "answers"  # the folder of dense ones
PREDICTIONS = "predictions.csv"
UNANSWERED = "unanswered.csv"
SHOWN = 10  # pictures that are named on the terminal


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


def answer_all(together: Together, rows: AnySet, target: Path) -> list[str]:
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
