"""A run for people to look at: its pictures and tables, and what it says about other pictures."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from convert.format import CROP_BOXES, UserError, one_line, write_atomically
from train.checkpoint import CHECKPOINT, METRICS, Run, newest, write_csv
from train.loop import Job, apply, epoch_line, evaluate, new_run, open_loaders, start
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


def _write(path: Path, data: bytes) -> str:
    write_atomically(path, lambda file: file.write(data))
    return path.name


def _without_matplotlib(error: ModuleNotFoundError) -> list[str]:
    print(f"no pictures: {error.name} is not installed. Run: pip install -e .[show]", file=sys.stderr)
    return []


def _tables_and_pictures(out: Path, run: Run, job: Job) -> list[str]:
    """predictions.csv, classes.csv, confusion.png and mistakes.png of the test rows."""
    lines, worst = [], list[Outcome]()
    for each in _test_outcomes(run, job):
        lines.append(each.facts)
        worst = sorted([*worst, each], key=lambda each: -each.badness)[:MOST]
    write_csv(out / "predictions.csv", lines)
    files = ["predictions.csv", *_class_table(out, run, job)]
    worst = [each for each in worst if each.badness > 0]
    title = f"the {len(worst)} worst of {len(lines)} test rows"
    try:
        return [*files, *_confusion(out, run, job), _write(out / "mistakes.png", _page(job, title, worst))]
    except ModuleNotFoundError as error:
        return [*files, *_without_matplotlib(error)]


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
    from pictures.plots import confusion_png

    if isinstance(job.task, Depth):
        return []
    counts_kk = run.counts.view(job.task.n_out, -1).long().numpy()
    return [_write(out / "confusion.png", confusion_png(counts_kk, job.task.names))]


def _page(job: Job, title: str, found: list[Outcome]) -> bytes:
    """Every picture with its depth, and for dense tasks the truth and the answer."""
    from pictures.plots import class_colours, depth_colours, label_colours, page_png

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
    names = [CHECKPOINT, METRICS, *_tables_and_pictures(out, run, job)]
    with suppress(ModuleNotFoundError):  # announced above
        from pictures.plots import curves_png

        names.append(_write(out / "curves.png", curves_png(run.history, baseline)))
    main = f"test_{job.task.main}"
    last, best = run.history[-1], (min if main == "test_rmse" else max)(run.history, key=lambda row: row[main])
    print(f"last  {epoch_line(last, job.settings.epochs)}")
    print(f"best  epoch {best['epoch']}: {main} {best[main]:.3f} (picked on the test rows, so optimistic)")
    if baseline is not None:
        print(f"always the most frequent class: top-1 {baseline:.1%}")
    files = [str(out / name) for name in names]
    print("files:", *files)
    print("continue:", command(job.settings, epochs=2 * run.epoch), flush=True)
    return names, {"epochs": run.epoch, "last": last, "best": best, "baseline": baseline, "files": files}


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


# ---------------------------------------------------------------- python -m train predict


def predict_flags(parser: ArgumentParser) -> ArgumentParser:
    parser.description = "What a run says about the test rows, or about a folder of pictures."
    parser.add_argument("run", metavar="RUN", nargs="+", help="the --out of a run; of several: their mean")
    parser.add_argument("--images", metavar="DIR", help="DIR/rgb/NAME.png or .jpg, DIR/depth/NAME.png (16 bit, mm)")
    parser.add_argument("--data", metavar="DIR|ROOT", help="where the run's set is now")
    parser.add_argument("--out", metavar="DIR", help="default: RUN/predict, of the first")
    return parser


def predict(run: list[str], images: str | None, data: str | None, out: str | None) -> None:
    """Score the newest checkpoints of runs, together, on the test rows, or let them name the pictures of a folder."""
    jobs, members = [], []
    for each in run:
        found = newest(Settings("", each))
        if found is None:
            raise UserError(f"{each} has no checkpoint. Run: make train RUN={each}")
        path, state = found
        try:
            settings = Settings(**state["settings"])
            settings = replace(settings, data=data or settings.data, width=settings.channels, weights=None)
            jobs.append(start(settings, torch.device("cpu")))
            again = new_run(jobs[-1])
            again.model.load_state_dict(state["model"])
        except (TypeError, RuntimeError) as error:
            what = f"{path} is of another version or network ({one_line(error)})"
            raise UserError(f"{what}. Run: make train RUN={each} ARGS=--reset") from None
        members.append(again.model)
        print(f"{path}: {state['epoch']} epochs")
        if _learns(jobs[-1]) != _learns(jobs[0]):
            raise UserError(f"{each} does not learn what {run[0]} does, from the same pictures. Name runs that do")
    again.model, target = Average(members), Path(out or f"{run[0]}/predict")
    job = min(jobs, key=lambda job: job.layout is torch.channels_last)  # a layout that all of them can take
    open_loaders(job)
    target.mkdir(parents=True, exist_ok=True)
    if images:
        files = _predict_folder(again, job, Path(images), target)
    else:
        print("on the test rows:", ", ".join(f"{k} {v:.4f}" for k, v in evaluate(again, job).items()))
        files = _tables_and_pictures(target, again, job)
    print("files:", *(str(target / name) for name in files))


def _learns(job: Job) -> tuple[Any, ...]:
    """What networks must have in common to answer together."""
    s = job.settings
    return s.task, s.num_classes, s.inputs, s.size, len(job.rays), job.train_set.fingerprint


class Average(nn.Module):
    """Networks as one: the mean of their outputs."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.stack([member(*inputs) for member in self.members]).mean(dim=0)


def _predict_folder(run: Run, job: Job, folder: Path, target: Path) -> list[str]:
    """predictions.csv and page.png of DIR/rgb/NAME with DIR/depth/NAME; dense answers also as NAME.png."""
    paths = sorted(p for p in (folder / "rgb").glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"no pictures in {folder / 'rgb'}: put NAME.png or NAME.jpg there, depth in {folder / 'depth'}")
    needs_depth = job.settings.task != "depth" and job.settings.inputs != "rgb"
    size = job.train_set.size
    batches = (_image_batch(job, p, folder / "depth" / f"{p.stem}.png", size, needs_depth) for p in paths)
    found = list(outcomes(run, job, [p.name for p in paths], batches, False))
    write_csv(target / "predictions.csv", [each.facts for each in found])
    files = ["predictions.csv"]
    for path, each in zip(paths, found, strict=True):
        if each.named.ndim == 2:
            files.append(_write(target / f"{path.stem}.png", _answer_png(each.named)))
    return [*files, _write(target / "page.png", _page(job, f"{folder}", found[:MOST]))]


def _box(job: Job, height: int, width: int) -> tuple[float, float, float, float]:
    """The set's crop (top, bottom, left, right) in a picture of any size."""
    top, bottom, left, right = CROP_BOXES[job.train_set.crop]
    return top * height / 480, bottom * height / 480, left * width / 640, right * width / 640


def _image_batch(job: Job, rgb_path: Path, depth_path: Path, size: int, needs_depth: bool) -> Batch:
    """A batch of one as the set stores it (RGB antialiased, depth nearest), with a placeholder target."""
    from PIL import Image

    with Image.open(rgb_path) as image:
        top, bottom, left, right = _box(job, image.height, image.width)
        rgb = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom)))
    depth_mm = np.zeros((size, size), np.int16)
    if needs_depth and not depth_path.exists():
        raise UserError(f"{depth_path} is missing: the network needs it. Put it there, or train with --inputs rgb")
    if depth_path.exists():
        with Image.open(depth_path) as image:
            stored = np.array(image)
        if stored.ndim == 2 and stored.max() <= 32767:
            top, bottom, left, right = _box(job, *stored.shape)
            share = (np.arange(size) + 0.5) / size
            y, x = top + (bottom - top) * share, left + (right - left) * share
            depth_mm = stored[y.astype(np.int64)][:, x.astype(np.int64)].astype(np.int16)
        elif needs_depth:
            raise UserError(f"{depth_path}: expected one channel of millimetres, 0..32767, 0 = no measurement")
    is_dense, is_metres = job.settings.task != "scene", job.settings.task == "depth"
    target = (
        torch.zeros((1, 1, size, size))
        if is_metres
        else torch.zeros((1, size, size) if is_dense else 1, dtype=torch.int64)
    )
    return torch.from_numpy(rgb.transpose(2, 0, 1).copy())[None], torch.from_numpy(depth_mm)[None, None], target


def _answer_png(named: np.ndarray) -> bytes:
    """Class ids as 8-bit, metres as 16-bit millimetres."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    array = np.round(named * 1000).astype(np.uint16) if named.dtype.kind == "f" else named.astype(np.uint8)
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()
