"""A finished training for people to look at: its pictures, its tables, and lines that sum it up.

Nothing is asked of the network again: what it says of the rows was kept as they were scored.

report(result)
  tables_and_pictures     predictions.csv, classes.csv, confusion.png, mistakes.png
  curves.png
  summary                 last, best, the most frequent class, the files, how to continue
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from shards.files import log
from shards.spec import class_colours
from train.answers import Answers, Prediction
from train.checkpoint import CLASS_TABLE, Run, write_csv, write_file
from train.job import NetworkSetup, TaskSetup
from train.loop import TrainingResult, epoch_line
from train.plots import (
    CaptionedPanels,
    check_drawing,
    confusion_png,
    curves_png,
    depth_colours,
    label_colours,
    page_png,
)
from train.tasks import Depth

# ---------------------------------------------------------------- tables and pages


def write(path: Path, data: bytes) -> str:
    """The name of the file. Raises CannotWrite."""
    write_file(path, lambda file: file.write(data))
    return path.name


def draw(path: Path, make: Callable[[], bytes]) -> str:
    """Say which picture is being drawn, as that takes seconds; write it; its name."""
    check_drawing()
    log(f"writing {path}")
    return write(path, make())


def tables_and_pictures(out: Path, run: Run, answers: Answers) -> list[str]:
    """predictions.csv, classes.csv, confusion.png and mistakes.png of the rows scored: their names.

    run: its `counts` are of the same rows. Without matplotlib no pictures, which is said.
    """
    log(f"writing {out / 'predictions.csv'}")
    write_csv(out / "predictions.csv", answers.table)

    files = ["predictions.csv", *_class_table(out, run, answers.setup)]
    try:
        files += _confusion(out, run, answers)
        files += _mistakes(out, run, answers)
    except ModuleNotFoundError as error:
        missing = f"no pictures: {error.name} is not installed"
        log(f"{missing}. Install the extra show: pip install 'nyuv2-shards[show]'")
    return files


def _mistakes(out: Path, run: Run, answers: Answers) -> list[str]:
    """mistakes.png; where there is none to show, it says so, and an older one is removed."""
    dataset = answers.dataset
    path = out / "mistakes.png"
    if answers.worst:
        title = f"the {len(answers.worst)} worst of {len(dataset)} {dataset.split} rows"
        return [draw(path, lambda: page(answers.setup, title, answers.worst))]

    path.unlink(missing_ok=True)
    is_anything_known = float(run.counts.sum()) > 0
    if is_anything_known:
        why = f"all {len(dataset)} {dataset.split} rows are right"
    else:
        why = f"nothing is known of the {dataset.split} rows"
    print(f"no mistakes.png: {why}", file=sys.stderr)
    return []


def _class_table(out: Path, run: Run, setup: TaskSetup) -> list[str]:
    """classes.csv: for each class its true rows or pixels, accuracy and intersection over union."""
    if isinstance(setup.task, Depth):
        return []
    true_k = run.counts.view(setup.task.n_out, -1).sum(1).long().tolist()
    accuracy_k, iou_k = setup.task.per_class(run.counts)
    accuracy = np.round(accuracy_k.numpy(), 4).tolist()
    iou = np.round(iou_k.numpy(), 4).tolist()
    table = [
        {"class": name, "true": true_k[k], "accuracy": accuracy[k], "iou": iou[k]}
        for k, name in enumerate(setup.task.names)
    ]
    write_csv(out / CLASS_TABLE, table)
    return [CLASS_TABLE]


def _confusion(out: Path, run: Run, answers: Answers) -> list[str]:
    task = answers.setup.task
    if isinstance(task, Depth):
        return []
    counts_kk = run.counts.view(task.n_out, -1).long().numpy()
    split = answers.dataset.split
    path = out / "confusion.png"
    return [draw(path, lambda: confusion_png(counts_kk, task.names, split))]


def page(setup: NetworkSetup, title: str, shown: list[Prediction]) -> bytes:
    """A PNG of every picture with its depth, and for dense tasks the truth and the answer."""
    heads = ["rgb", "depth"]
    if setup.settings.task != "scene":
        has_truth = bool(shown) and shown[0].true is not None
        heads += ["true", "predicted"] if has_truth else ["predicted"]

    pictures = []
    for each in shown:
        panels = [each.rgb_hwc, depth_colours(each.depth_m_hw), *_dense_panels(setup, each)]
        pictures.append(CaptionedPanels(caption=_caption(each.table_row), panels=panels))

    legend = {}
    if setup.settings.task.startswith("semantic"):
        colours = class_colours(setup.task.n_out)[1:]  # the first is of void
        legend = dict(zip(setup.task.names, colours, strict=True))
    return page_png(f"{title}: {', '.join(heads)}", heads, pictures, legend)


def _dense_panels(setup: NetworkSetup, prediction: Prediction) -> list[np.ndarray]:
    """The truth, where it is known, and the answer, in colours; of a dense task."""
    answers = [prediction.true, prediction.predicted]
    planes = [plane for plane in answers if plane is not None and plane.ndim == 2]
    if isinstance(setup.task, Depth):
        return [depth_colours(plane) for plane in planes]
    return [label_colours(plane, setup.task.n_out) for plane in planes]


def _caption(table_row: dict[str, Any]) -> str:
    """The picture's name, and below it the truth and the answer, or the first two scores."""
    picture = table_row["picture"]
    if "true" in table_row:
        answer = f"predicted {table_row['named']} {table_row['confidence']:.0%}"
        return f"{picture}\n{table_row['true']}\n{answer}"  # side by side they met the next title
    scores = [f"{name.replace('_', ' ')} {value}" for name, value in list(table_row.items())[1:3]]
    return f"{picture}\n" + ", ".join(scores)


# ---------------------------------------------------------------- the report


def report(result: TrainingResult) -> list[Path]:
    """Draw, tabulate and sum up a finished run, in its directory and on standard output.

    Returns all files of the run, those of `train` first. Raises CannotWrite.
    """
    out = Path(result.setup.settings.out)
    names = tables_and_pictures(out, result.run, result.answers)
    history = result.run.history
    with suppress(ModuleNotFoundError):  # announced already
        names.append(draw(out / "curves.png", lambda: curves_png(history, result.baseline)))

    files = [*result.files, *(out / name for name in names)]
    print_summary(result, files)
    return files


def print_summary(result: TrainingResult, files: Sequence[Path]) -> None:
    """The last and the best epoch, the baseline, the files."""
    settings = result.setup.settings
    split = result.setup.eval_split
    main = f"{split}_{result.setup.task.main}"
    print(f"last  {epoch_line(result.last, settings.epochs)}")

    score = result.best.get(main, math.nan)
    if math.isnan(score):
        print(f"best  of no epoch: nothing is known of the {split} rows to score by")
    else:
        epoch = result.best["epoch"]
        print(
            f"best  epoch {epoch}: {main} {score:.3f} (picked on the {split} rows, so optimistic)"
        )
    if result.test:
        scores = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in result.test.items()]
        print("test  " + "  ".join(scores))
    if result.baseline is not None:
        print(f"always the most frequent class: top-1 {result.baseline:.1%}")

    print("files:", *map(str, files))
