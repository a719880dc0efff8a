"""python -m train predict: what runs say, alone or together, about the test rows or a folder of pictures."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shards.format import CROP_BOXES, UserError, one_line
from shards.lock import hold
from train.checkpoint import LOCK, Run, newest, write_csv
from train.loop import Job, evaluate, new_run, open_loaders, start
from train.report import MOST, Batch, outcomes, page, tables_and_pictures, write
from train.settings import Settings


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
            settings = replace(settings, data=data or settings.data)
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
    words: Any = {"then": "Wait for it, or use another --out", "elsewhere": "Use another --out"}
    with hold(target / LOCK, is_held=f"{target} is being written by", **words):
        if images:
            files = _predict_folder(again, job, Path(images), target)
        else:
            print("on the test rows:", ", ".join(f"{k} {v:.4f}" for k, v in evaluate(again, job).items()))
            files = tables_and_pictures(target, again, job)
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
            files.append(write(target / f"{path.stem}.png", _answer_png(each.named)))
    return [*files, write(target / "page.png", page(job, f"{folder}", found[:MOST]))]


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
