"""python -m train predict: what runs say, alone or together, about test rows or other pictures."""

from __future__ import annotations

import io
import os
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shards.dataset import ShardSet
from shards.errors import UserError, WrongSetting, one_line
from shards.spec import MAX_DEPTH_MM, VOID
from train.answers import MOST_PICTURES, Prediction, answer_of, prediction_of
from train.checkpoint import Run, newest, only_writer, write_csv
from train.errors import MissingDepth, NoCheckpoint, WrongCheckpoint
from train.geometry import crop_box_of
from train.job import TaskSetup, make_setup, new_run, open_loaders, reported_split
from train.loop import Batch, evaluate, predict_batch
from train.progress import VOICE, Progress
from train.report import page, tables_and_pictures, write
from train.settings import Settings

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def predict_flags(parser: ArgumentParser) -> ArgumentParser:
    """The flags of `python -m train predict` are the arguments of `predict`."""
    parser.description = (
        "What a run says about the test rows, or about a folder of pictures: scores, tables, pages."
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="+", help="the --out of a run; of several: their mean"
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="DIR/rgb/NAME.png or .jpg, DIR/depth/NAME.png (16 bit, mm); default the test rows",
    )
    parser.add_argument(
        "--data", metavar="DIR|ROOT", help="where the run's set is now; default where it was"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where tables and pages go; default RUN/predict, of the first"
    )
    return parser


def predict(run: list[str], images: str | None, data: str | None, out: str | None) -> None:
    """Score the newest checkpoints of runs, together, on the test rows, or predict for pictures.

    run: directories of runs. images: a folder of pictures, or None for the test rows. data: where
    the runs' set is now, or None for where it was. out: where tables and pages go.
    Raises UserError.
    """
    _check_paths(run=run, images=images, data=data, out=out)
    VOICE.has_spoken()
    run = [os.path.expanduser(each) for each in run]
    opened: dict[str, ShardSet] = {}
    loaded = [load_run(each, data, opened) for each in run]
    for each in loaded:
        if _what_is_learnt(each.setup) != _what_is_learnt(loaded[0].setup):
            what = f"{each.directory} does not learn what {run[0]} does, from the same pictures"
            raise UserError(what, "Name runs that do")
    together, setup = _together(loaded)
    loaders = open_loaders(setup, reported_split(setup))

    target = Path(os.path.expanduser(out or f"{run[0]}/predict"))
    with only_writer(target, "written"):
        if images:
            files = _predict_folder(together, setup, Path(images), target)
        else:
            evaluation = evaluate(together, setup, loaders)
            scores = evaluation.scores.items()
            listed = ", ".join(f"{name} {value:.4f}" for name, value in scores)
            print(f"on the {loaders.split} rows:", listed, flush=True)
            assert evaluation.answers is not None
            files = tables_and_pictures(target, together, evaluation.answers)
    print("files:", *(str(target / name) for name in files))


def _check_paths(**paths: list[str] | str | None) -> None:
    """Raise WrongSetting for an empty one: a variable of a script that was never set."""
    for name, given in paths.items():
        if "" in (given if isinstance(given, list) else [given]):
            raise WrongSetting(name, "''", "an empty path. Give one, or leave it out")


# ---------------------------------------------------------------- runs, and several as one


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run with the weights of its newest checkpoint, on the CPU."""

    directory: str
    setup: TaskSetup
    run: Run


def load_run(
    directory: str, data: str | None, opened: dict[str, ShardSet] | None = None
) -> LoadedRun:
    """The newest checkpoint of a run; says how far it is.

    data: where its set is now, or None for where it was. opened: sets by their place, to which its
    own is added: runs of one set open it once. Raises NoCheckpoint, WrongCheckpoint.
    """
    found = newest(Settings("", directory))
    if found is None:
        raise NoCheckpoint(f"{directory} has no checkpoint", run=directory)

    path = found.path
    try:
        settings = Settings(**found.settings)
        if data:
            settings = replace(settings, data=data)
        setup = make_setup(settings, torch.device("cpu"), (opened or {}).get(settings.data))
        if opened is not None:
            opened[settings.data] = setup.train_set.shard_set
        run = new_run(setup)
        run.model.load_state_dict(found.model)
    except (TypeError, RuntimeError) as error:
        what = f"{path} is of another version or network ({one_line(error)})"
        raise WrongCheckpoint(what, run=directory, path=path) from None
    print(f"{path}: {found.epoch} epochs")
    return LoadedRun(directory=directory, setup=setup, run=run)


def _what_is_learnt(setup: TaskSetup) -> tuple[Any, ...]:
    """What networks must have in common to answer together."""
    settings = setup.settings
    return (
        settings.task,
        settings.num_classes,
        settings.inputs,
        settings.size,
        len(setup.rays),
        setup.train_set.fingerprint,
    )


class Average(nn.Module):
    """Networks as one: the mean of their outputs."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What each member takes -> the mean of what they give."""
        return torch.stack([member(*inputs) for member in self.members]).mean(dim=0)


def _together(loaded: list[LoadedRun]) -> tuple[Run, TaskSetup]:
    """A run whose network is the mean of all, and a setup that fits it."""
    # A layout that all of them can take: the plain one, unless every network is in channels_last.
    plain = [each for each in loaded if each.run.layout is not torch.channels_last]
    chosen = plain[0] if plain else loaded[0]
    mean = Average([each.run.model for each in loaded])
    together = replace(loaded[-1].run, model=mean, net=mean, layout=chosen.run.layout)
    return together, chosen.setup


# ---------------------------------------------------------------- a folder of pictures


def _predict_folder(run: Run, setup: TaskSetup, folder: Path, target: Path) -> list[str]:
    """predictions.csv and page.png of DIR/rgb/NAME with DIR/depth/NAME.png; their names.

    Dense answers also as NAME.png. Raises UserError for pictures that are missing or unfit.
    """
    candidates = sorted((folder / "rgb").glob("*"))
    paths = [path for path in candidates if path.suffix.lower() in PICTURE_SUFFIXES]
    if not paths:
        raise UserError(
            f"no pictures in {folder / 'rgb'}: "
            f"put NAME.png or NAME.jpg there, depth in {folder / 'depth'}"
        )

    batches = _image_batches(setup, paths, folder / "depth")
    names = [path.name for path in paths]
    found = list(predictions(run, setup, names, batches))

    write_csv(target / "predictions.csv", [each.table_row for each in found])
    files = ["predictions.csv"]
    for path, each in zip(paths, found, strict=True):
        if each.predicted.ndim == 2:
            files.append(write(target / f"{path.stem}.png", _answer_png(each.predicted)))
    files.append(write(target / "page.png", page(setup, str(folder), found[:MOST_PICTURES])))
    return files


@torch.inference_mode()
def predictions(
    run: Run, setup: TaskSetup, names: Sequence[str], batches: Iterator[Batch]
) -> Iterator[Prediction]:
    """One a picture; `names` are theirs, and the batches' targets only placeholders."""
    run.model.eval()
    name_of_next = iter(names)
    with Progress("predicting", "pictures", len(names)) as bar:
        for batch in batches:
            out, (rgb, depth, _) = predict_batch(run, setup, batch, done=bar.update)
            for k in range(len(rgb)):
                answer = answer_of(setup, out[k], None)
                pictures = (rgb[k], depth[k])
                yield prediction_of(setup, next(name_of_next), answer, pictures, None)


def _image_batches(setup: TaskSetup, paths: Sequence[Path], depths: Path) -> Iterator[Batch]:
    """Batches of one, as the set stores them: RGB antialiased, depth nearest."""
    for path in paths:
        rgb_3hw = torch.from_numpy(_read_rgb(setup, path))
        depth_hw = torch.from_numpy(_read_depth_mm(setup, depths / f"{path.stem}.png"))
        yield rgb_3hw[None], depth_hw[None, None], _placeholder_target(setup)


def _read_rgb(setup: TaskSetup, path: Path) -> np.ndarray:
    """uint8 [3, S, S]: the part of the picture that the set stores."""
    from PIL import Image

    size = setup.train_set.size
    with Image.open(path) as image:
        box = crop_box_of(setup.train_set).scaled_to(image.height, image.width)
        part = (box.left, box.top, box.right, box.bottom)
        resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, part)
        return np.array(resized).transpose(2, 0, 1).copy()


def _read_depth_mm(setup: TaskSetup, path: Path) -> np.ndarray:
    """int16 [S, S], nearest; 0 where the network does without and there is none.

    Raises MissingDepth where the network needs it.
    """
    from PIL import Image

    size = setup.train_set.size
    is_needed = not setup.learns_depth and setup.settings.inputs != "rgb"
    nothing = np.zeros((size, size), np.int16)
    if not path.exists():
        if is_needed:
            raise MissingDepth(path)
        return nothing

    with Image.open(path) as image:
        stored = np.array(image)
    if stored.ndim != 2 or stored.max() > MAX_DEPTH_MM:
        if is_needed:
            expected = f"expected one channel of millimetres, 0..{MAX_DEPTH_MM}, 0 = no measurement"
            raise UserError(f"{path}: {expected}")
        return nothing

    box = crop_box_of(setup.train_set).scaled_to(*stored.shape)
    centres = (np.arange(size) + 0.5) / size
    rows = box.rows_at(centres).astype(np.int64)
    columns = box.columns_at(centres).astype(np.int64)
    return stored[rows][:, columns].astype(np.int16)


def _placeholder_target(setup: TaskSetup) -> Tensor:
    """Of the shape that the task's targets have, for a batch of one; nothing is known."""
    size = setup.train_set.size
    if setup.learns_depth:
        return torch.zeros((1, 1, size, size))
    shape = (1,) if setup.settings.task == "scene" else (1, size, size)
    return torch.full(shape, VOID, dtype=torch.int64)


def _answer_png(predicted: np.ndarray) -> bytes:
    """Class ids as 8-bit, metres as 16-bit millimetres."""
    from PIL import Image

    if predicted.dtype.kind == "f":
        stored = np.round(predicted * 1000).astype(np.uint16)
    else:
        stored = predicted.astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "png")
    return buffer.getvalue()
