"""A run for people to look at: its pictures and tables, and what it says about other pictures."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.checkpoint import CHECKPOINT, METRICS, Run, write_csv, write_file
from train.loop import Job, apply, epoch_line
from train.settings import Settings
from train.tasks import Depth

BATCH, MOST = 16, 24
Batch = tuple[Tensor, ...]


class Outcome(NamedTuple):
    """One picture and what the network says of it."""

    facts: dict[str, Any]  # its line in predictions.csv
    badness: float  # its loss; 0 where the class is right or nothing is known
    rgb: np.ndarray
    depth_m: np.ndarray
    true: np.ndarray | None
    named: np.ndarray  # class id, class ids [H, W], or metres [H, W]


# ---------------------------------------------------------------- asking the network


@torch.inference_mode()
def outcomes(run: Run, job: Job, names: list[str], batches: Iterator[Batch], is_judged: bool) -> Iterator[Outcome]:
    """One Outcome a picture; where the truth is not known the targets are only placeholders."""
    run.model.eval()
    at = iter(names)
    for batch in batches:
        out, (rgb, depth, target) = apply(run.model, job, batch)
        for one, rgb_chw, depth_1hw, true in zip(out, rgb, depth, target, strict=True):
            named, answer = _answer(job, one)
            facts, badness = _judgement(job, one[None], true[None]) if is_judged else ({}, 0.0)
            pictures = rgb_chw.permute(1, 2, 0).cpu().numpy(), depth_1hw[0].cpu().numpy() / 1000
            line = {"picture": next(at), **facts, **answer}
            yield Outcome(line, badness, *pictures, _array(true) if is_judged else None, named)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.squeeze().cpu().numpy()
    return array.astype(np.int16) if array.dtype == np.int64 else array


def _answer(job: Job, out: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    """What the network says of one picture: to be drawn, and for the table."""
    if isinstance(job.task, Depth):
        metres = _array(job.task.metres(out))
        return metres, {"median_m": round(float(np.median(metres)), 3)}
    share, ids = out.softmax(0).max(0)
    most = int(torch.bincount(ids.flatten()).argmax())
    return _array(ids), {"named": job.task.names[most], "confidence": round(float(share.mean()), 4)}


def _judgement(job: Job, out: Tensor, target: Tensor) -> tuple[dict[str, Any], float]:
    """The class or the scores of this one picture, and its loss."""
    loss, weight = job.task.loss(out, target)
    badness = float(loss / weight) if weight > 0 else 0.0
    if target.ndim > 1:
        scores = job.task.scores(job.task.count(out, target))
        return {name: round(value, 4) for name, value in scores.items()}, badness
    return {"true": job.task.names[int(target)]}, badness if out.argmax() != target else 0.0


def _test_outcomes(run: Run, job: Job) -> Iterator[Outcome]:
    dataset = job.test_loader.dataset
    scenes, of_row = dataset._set.manifest["names"]["scenes"], dataset._set.column("scene")
    names = [f"row {row}: {scenes[of_row[row]]}" for row in dataset._rows]
    starts = range(0, len(dataset), BATCH)
    batches = (dataset.stored(np.arange(a, min(a + BATCH, len(dataset)))) for a in starts)
    return outcomes(run, job, names, batches, True)


# ---------------------------------------------------------------- tables and pages


def write(path: Path, data: bytes) -> str:
    write_file(path, lambda file: file.write(data))
    return path.name


def _without_matplotlib(error: ModuleNotFoundError) -> list[str]:
    print(f"no pictures: {error.name} is not installed. Run: pip install -e .[show]", file=sys.stderr)
    return []


def tables_and_pictures(out: Path, run: Run, job: Job) -> list[str]:
    """predictions.csv, classes.csv, confusion.png and mistakes.png of the test rows."""
    lines, worst = [], list[Outcome]()
    for each in _test_outcomes(run, job):
        lines.append(each.facts)
        worst = sorted([*worst, each], key=lambda each: -each.badness)[:MOST]
    write_csv(out / "predictions.csv", lines)
    files = ["predictions.csv", *_class_table(out, run, job)]
    try:
        return [*files, *_confusion(out, run, job), *_mistakes(out, run, job, len(lines), worst)]
    except ModuleNotFoundError as error:
        return [*files, *_without_matplotlib(error)]


def _mistakes(out: Path, run: Run, job: Job, n_rows: int, worst: list[Outcome]) -> list[str]:
    """mistakes.png; where there is none to show, it says so, and an older one is removed."""
    worst = [each for each in worst if each.badness > 0]
    if worst:
        return [write(out / "mistakes.png", page(job, f"the {len(worst)} worst of {n_rows} test rows", worst))]
    (out / "mistakes.png").unlink(missing_ok=True)
    why = f"all {n_rows} test rows are right" if float(run.counts.sum()) else "nothing is known of the test rows"
    print(f"no mistakes.png: {why}", file=sys.stderr)
    return []


def _class_table(out: Path, run: Run, job: Job) -> list[str]:
    if isinstance(job.task, Depth):
        return []
    true_k = run.counts.view(job.task.n_out, -1).sum(1).long().tolist()
    accuracy_k, iou_k = (np.round(values.numpy(), 4).tolist() for values in job.task.per_class(run.counts))
    columns = {"class": job.task.names, "true": true_k, "accuracy": accuracy_k, "iou": iou_k}
    write_csv(
        out / "classes.csv", [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]
    )
    return ["classes.csv"]


def _confusion(out: Path, run: Run, job: Job) -> list[str]:
    from train.plots import confusion_png

    if isinstance(job.task, Depth):
        return []
    counts_kk = run.counts.view(job.task.n_out, -1).long().numpy()
    return [write(out / "confusion.png", confusion_png(counts_kk, job.task.names))]


def page(job: Job, title: str, found: list[Outcome]) -> bytes:
    """Every picture with its depth, and for dense tasks the truth and the answer."""
    from train.plots import class_colours, depth_colours, label_colours, page_png

    n = job.task.n_out
    draw: Callable[[Any], Any] = depth_colours if isinstance(job.task, Depth) else lambda ids: label_colours(ids, n)
    heads, rows = ["rgb", "depth"], []
    if job.settings.task != "scene":
        heads += ["true", "named"] if found and found[0].true is not None else ["named"]
    for each in found:
        answers = [draw(x) for x in (each.true, each.named) if x is not None and x.ndim == 2]
        rows.append((_caption(each.facts), [each.rgb, depth_colours(each.depth_m), *answers]))
    is_coloured = job.settings.task.startswith("semantic")
    legend = dict(zip(job.task.names, class_colours(n)[1:], strict=True)) if is_coloured else {}
    return page_png(title, heads, rows, legend)


def _caption(facts: dict[str, Any]) -> str:
    if "true" in facts:
        return f"{facts['picture']}\n{facts['true']}, named {facts['named']} {facts['confidence']:.0%}"
    return f"{facts['picture']}\n" + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in list(facts.items())[1:3])


def report(run: Run, job: Job) -> tuple[list[str], dict[str, Any]]:
    """Draw, tabulate and sum up a finished run: the names of its files, and the summary as a dict."""
    out, baseline = Path(job.settings.out), _baseline(job)
    write_csv(out / METRICS, run.history)
    names = [CHECKPOINT, METRICS, *tables_and_pictures(out, run, job)]
    with suppress(ModuleNotFoundError):  # announced above
        from train.plots import curves_png

        names.append(write(out / "curves.png", curves_png(run.history, baseline)))
    main = f"test_{job.task.main}"
    last, best = run.history[-1], _best(run, main)
    print(f"last  {epoch_line(last, job.settings.epochs)}")
    if math.isnan(best[main]):
        print("best  of no epoch: nothing is known of the test rows to score by")
    else:
        print(f"best  epoch {best['epoch']}: {main} {best[main]:.3f} (picked on the test rows, so optimistic)")
    if baseline is not None:
        print(f"always the most frequent class: top-1 {baseline:.1%}")
    files = [str(out / name) for name in names]
    print("files:", *files)
    print("continue:", command(job.settings, epochs=2 * run.epoch), flush=True)
    return names, {"epochs": run.epoch, "last": last, "best": best, "baseline": baseline, "files": files}


def _best(run: Run, main: str) -> dict[str, float]:
    """The row of the best epoch, the first of equals; the last one where nothing was scored."""
    scored = [row for row in run.history if not math.isnan(row[main])]
    sign = -1 if main == "test_rmse" else 1
    return max(scored, key=lambda row: sign * row[main], default=run.history[-1])


def _baseline(job: Job) -> float | None:
    """Top-1 of always naming the most frequent train class."""
    if job.settings.task != "scene":
        return None
    most = np.bincount(job.train_set.labels()).argmax()
    return float((job.test_loader.dataset.labels() == most).mean())


def command(settings: Settings, **changes: Any) -> str:
    """The command line of these settings, defaults left out."""
    values, words = {**asdict(settings), "reset": False, **changes}, ["python", "-m", "train"]
    for f in fields(settings):
        if values[f.name] != f.default:
            words += ["--" + f.name.replace("_", "-"), *([] if values[f.name] is True else [str(values[f.name])])]
    return shlex.join(words)
