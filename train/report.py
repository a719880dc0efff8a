"""A finished training for people to look at: its pictures, its tables, and lines that sum it up.

report(result)
  tables_and_pictures     predictions.csv, classes.csv, confusion.png, mistakes.png
  curves.png
  summary                 last, best, the most frequent class, the files, how to continue
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.files import log
from shards.spec import class_colours
from train.checkpoint import CLASS_TABLE, Run, write_csv, write_file
from train.data import ShardDataset
from train.job import NetworkSetup, TaskSetup
from train.loop import TrainingResult, epoch_line, predict_batch
from train.plots import (
    CaptionedPanels,
    confusion_png,
    curves_png,
    depth_colours,
    label_colours,
    page_png,
)
from train.tasks import Depth

ROWS_AT_ONCE = 16
MOST_PICTURES = 24  # on a page
Batch = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One picture and what the network says of it.

    table_row: its line in predictions.csv. loss: 0 where the class is right or nothing is known.
    true, predicted: a class id, class ids [H, W], or metres [H, W]; true is None where not known.
    """

    table_row: dict[str, Any]
    loss: float
    rgb_hwc: np.ndarray
    depth_m_hw: np.ndarray
    true: np.ndarray | None
    predicted: np.ndarray


# ---------------------------------------------------------------- asking the network


@torch.inference_mode()
def predictions(
    run: Run, setup: TaskSetup, names: Sequence[str], batches: Iterator[Batch], *, is_judged: bool
) -> Iterator[Prediction]:
    """One a picture; `names` are theirs. Unless `is_judged`, the targets are only placeholders."""
    run.model.eval()
    name_of_next = iter(names)
    for batch in batches:
        out, (rgb, depth, target) = predict_batch(run, setup, batch)
        for k in range(len(rgb)):
            true = target[k] if is_judged else None
            yield prediction_of(setup, next(name_of_next), out[k], (rgb[k], depth[k]), true)


def prediction_of(
    setup: NetworkSetup,
    name: str,
    out: Tensor,
    pictures: tuple[Tensor, Tensor],
    true: Tensor | None,
) -> Prediction:
    """Of one picture: `pictures` are rgb [3, H, W] and depth in millimetres [1, H, W]."""
    rgb_chw, depth_mm_1hw = pictures
    predicted, answer = _answer(setup, out)
    judgement: dict[str, Any] = {}
    loss = 0.0
    if true is not None:
        judgement, loss = _judgement(setup, out[None], true[None])
    return Prediction(
        table_row={"picture": name, **judgement, **answer},
        loss=loss,
        rgb_hwc=rgb_chw.permute(1, 2, 0).cpu().numpy(),
        depth_m_hw=depth_mm_1hw[0].cpu().numpy() / 1000,
        true=None if true is None else _array(true),
        predicted=predicted,
    )


def _array(tensor: Tensor) -> np.ndarray:
    """On the CPU, without axes of length 1; class ids as int16."""
    array: np.ndarray = tensor.squeeze().cpu().numpy()
    return array.astype(np.int16) if array.dtype == np.int64 else array


def _answer(setup: NetworkSetup, out: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    """What the network says of one picture: to be drawn, and for the table.

    The column of the predicted class is called "named": programs of users read it.
    """
    if isinstance(setup.task, Depth):
        metres = _array(setup.task.metres(out))
        return metres, {"median_m": round(float(np.median(metres)), 3)}

    confidence, ids = out.softmax(0).max(0)
    most_frequent = int(torch.bincount(ids.flatten()).argmax())
    columns = {
        "named": setup.task.names[most_frequent],
        "confidence": round(float(confidence.mean()), 4),
    }
    return _array(ids), columns


def _judgement(setup: NetworkSetup, out: Tensor, target: Tensor) -> tuple[dict[str, Any], float]:
    """The true class, or the scores, of this one picture; and its loss."""
    loss_sum, weight = setup.task.loss(out, target)
    loss = float(loss_sum / weight) if weight > 0 else 0.0
    if target.ndim > 1:
        scores = setup.task.scores(setup.task.count(out, target))
        return {name: round(value, 4) for name, value in scores.items()}, loss

    is_right = bool(out.argmax() == target)
    return {"true": setup.task.names[int(target)]}, 0.0 if is_right else loss


def _names_of_rows(dataset: ShardDataset) -> list[str]:
    """`row 7: kitchen_0003` of every row of the dataset's split."""
    scenes = dataset.shard_set.manifest.scenes
    scene_of_row = dataset.row_facts("scene")
    return [
        f"row {row}: {scenes[scene]}" for row, scene in zip(dataset.rows, scene_of_row, strict=True)
    ]


def _test_predictions(run: Run, setup: TaskSetup, dataset: ShardDataset) -> Iterator[Prediction]:
    positions = np.arange(len(dataset))
    parts = np.split(positions, range(ROWS_AT_ONCE, len(dataset), ROWS_AT_ONCE))
    batches = (dataset.stored(part) for part in parts)
    return predictions(run, setup, _names_of_rows(dataset), batches, is_judged=True)


# ---------------------------------------------------------------- tables and pages


def write(path: Path, data: bytes) -> str:
    """The name of the file. Raises CannotWrite."""
    write_file(path, lambda file: file.write(data))
    return path.name


def tables_and_pictures(out: Path, run: Run, setup: TaskSetup, dataset: ShardDataset) -> list[str]:
    """predictions.csv, classes.csv, confusion.png and mistakes.png of the rows scored: their names.

    Without matplotlib no pictures, which is said.
    """
    table = []
    worst: list[Prediction] = []
    for prediction in _test_predictions(run, setup, dataset):
        table.append(prediction.table_row)
        worst.append(prediction)
        worst.sort(key=lambda each: -each.loss)
        del worst[MOST_PICTURES:]
    write_csv(out / "predictions.csv", table)

    files = ["predictions.csv", *_class_table(out, run, setup)]
    try:
        files += _confusion(out, run, setup, dataset.split)
        files += _mistakes(out, run, setup, dataset, worst)
    except ModuleNotFoundError as error:
        missing = f"no pictures: {error.name} is not installed"
        log(f"{missing}. Install the extra show: pip install 'nyuv2-shards[show]'")
    return files


def _mistakes(
    out: Path, run: Run, setup: TaskSetup, dataset: ShardDataset, worst: list[Prediction]
) -> list[str]:
    """mistakes.png; where there is none to show, it says so, and an older one is removed."""
    wrong = [prediction for prediction in worst if prediction.loss > 0]
    path = out / "mistakes.png"
    if wrong:
        title = f"the {len(wrong)} worst of {len(dataset)} {dataset.split} rows"
        return [write(path, page(setup, title, wrong))]

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


def _confusion(out: Path, run: Run, setup: TaskSetup, split: str) -> list[str]:
    if isinstance(setup.task, Depth):
        return []
    counts_kk = run.counts.view(setup.task.n_out, -1).long().numpy()
    png = confusion_png(counts_kk, setup.task.names, split)
    return [write(out / "confusion.png", png)]


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
    return page_png(title, heads, pictures, legend)


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
    names = tables_and_pictures(out, result.run, result.setup, result.loaders.eval_set)
    with suppress(ModuleNotFoundError):  # announced already
        names.append(write(out / "curves.png", curves_png(result.run.history, result.baseline)))

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
