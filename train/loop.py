"""The training loop: a converted set in, checkpoints, metrics.csv and a TrainingResult out.

    train(settings)
      make_setup, only_writer        data and task; the directory is this process's
      _begin                       a new run, or the one that was left
      _train_epochs                for each epoch: _train_epoch (train_step ...), evaluate, save

What is drawn and tabulated of a finished run is `report`'s, which imports this and not the other
way round.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from loader.memory import Meter
from shards.dataset import ShardSet
from shards.errors import one_line
from shards.files import log
from stores.mirror import Mirror
from train import ranks
from train.answers import Answers, Collector
from train.augment import WHOLE, Draws, Pictures, augment, resize, views
from train.checkpoint import (
    CHECKPOINT,
    METRICS,
    Run,
    only_writer,
    remove_unfinished,
    restore,
    save,
    write_csv,
)
from train.errors import BatchTooSmall, Diverged, NoKnownPixel
from train.inputs import Batch, network_inputs, on_device
from train.job import (
    Loaders,
    NetworkSetup,
    TaskSetup,
    make_setup,
    new_run,
    open_loaders,
    reported_split,
    seed_of,
    to_learn,
)
from train.model import compiled, start_from
from train.order import common_batches
from train.progress import VOICE, Progress
from train.settings import Settings
from train.signals import DUE, NOTHING, REQUESTS, SAVE, STOP, Stopped

MIRROR_WAIT_S = 60.0  # what the end of a run grants the copy to its mirror
DENSE_ROWS = 16  # scored at once at full resolution


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished training.

    epochs: finished ones, of which n_trained now, not in an earlier call. last, best: their rows of
    metrics.csv; best is by the task's main score on the rows of `setup.eval_split`, the first of
    equals, and the last row where nothing could be scored. test: the scores of the test rows, once,
    where epochs were scored on others. loaders: of the rows that a report shows, which are the test
    rows where there are some. answers: what the network says of each of these, kept as they were
    scored. baseline: top-1 of always naming the most frequent train class; None for other tasks
    than scenes. files: what `train` itself wrote. mirror: where copies of the run's files go.
    """

    run: Run
    setup: TaskSetup
    loaders: Loaders
    answers: Answers
    epochs: int
    n_trained: int
    last: dict[str, float]
    best: dict[str, float]
    test: dict[str, float]
    baseline: float | None
    files: tuple[Path, ...]
    mirror: Mirror


# ---------------------------------------------------------------- one batch


def lr_at(step: int, n_warmup: int, n_steps: int, peak: float) -> float:
    """Linear warmup to `peak`, then a cosine to zero at n_steps."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(n_steps - n_warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def _forward(
    net: nn.Module, run: Run, setup: NetworkSetup, pictures: Pictures, target: Tensor
) -> Tensor:
    """Pictures as stored or augmented -> float32 outputs, dense ones at the target's resolution.

    net: the run's `net` where it learns, else its model itself.
    """
    inputs = network_inputs(setup, *pictures)
    inputs = [picture.contiguous(memory_format=run.layout) for picture in inputs]

    dtype = setup.autocast_dtype
    with torch.autocast(setup.device.type, dtype=dtype, enabled=dtype is not None):
        out: Tensor = net(*inputs)
    out = out.float()
    if target.ndim == 1:
        return out
    return F.interpolate(out, target.shape[-2:], mode="bilinear")


def _sums(setup: TaskSetup, out: Tensor, target: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
    """What is added up over batches and ranks: loss, its weight, the task's counts; float64."""
    return torch.cat((torch.stack((loss, weight)).double(), setup.task.count(out, target)))


def train_step(run: Run, setup: TaskSetup, batch: Batch, mine: Any) -> None:
    """One step; every draw in it comes from (seed, epoch, step).

    mine: where the batch's rows stand in the batch of all ranks. Raises BatchTooSmall.
    """
    at = (setup.settings.seed, run.epoch, run.step)
    torch.manual_seed(seed_of(*at, ranks.RANK))  # dropout
    draws = Draws(seed_of(*at), len(batch[0]) * ranks.WORLD, mine, setup.device)
    colours, planes, target = _augmented(setup, batch, draws)

    out = _forward_to_learn(run, setup, (colours, planes), target)
    loss, weight = setup.task.loss(out, target)

    _set_learning_rate(run, setup)
    run.optimizer.zero_grad(set_to_none=True)
    # Ranks average their gradients: times their number it is the mean over the batch of all.
    mean_loss = loss * ranks.WORLD / ranks.all_reduce_sum(weight)
    run.scaler.scale(mean_loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()

    run.sums += _sums(setup, out.detach(), target, loss.detach(), weight)
    run.step += 1


def _augmented(setup: TaskSetup, batch: Batch, draws: Draws) -> tuple[Tensor, list[Tensor], Tensor]:
    """Colours, planes and target of a batch, changed at random; a dense target as its picture."""
    settings = setup.settings
    colours, planes, target = on_device(setup, batch)
    size = settings.size or colours.shape[-1]
    if target.ndim == 1:
        colours, planes = augment(colours, planes, draws, size, settings)
        return colours, planes, target

    colours, planes = augment(colours, [*planes, target], draws, size, settings)
    *planes, target = planes
    return colours, planes, target


def _forward_to_learn(run: Run, setup: TaskSetup, pictures: Pictures, target: Tensor) -> Tensor:
    try:
        return _forward(run.net, run, setup, pictures, target)
    except (ValueError, RuntimeError) as error:
        # Of BatchNorm, where a channel has a single value: there is nothing to normalise.
        if "Expected more than 1" not in str(error):
            raise
        colours, _ = pictures
        raise BatchTooSmall(len(colours), colours.shape[-1], one_line(error)) from error


def _set_learning_rate(run: Run, setup: TaskSetup) -> None:
    settings = setup.settings
    n_warmup_epochs = min(settings.warmup_epochs, settings.epochs // 4)
    step = run.epoch * setup.n_steps + run.step
    lr = lr_at(step, n_warmup_epochs * setup.n_steps, settings.epochs * setup.n_steps, settings.lr)
    for group in run.optimizer.param_groups:  # those of earlier checkpoints have no shares
        group["lr"] = lr * group.get("share", 1.0)


# ---------------------------------------------------------------- checkpoints


class CheckpointKeeper:
    """Saves a run where that is due or was asked for, and ends it where a signal wants that.

    All ranks do the same, whichever of them got the signal.
    """

    def __init__(self, run: Run, setup: TaskSetup, mirror: Mirror) -> None:
        self.run = run
        self.setup = setup
        self.mirror = mirror
        self.saved_at = time.perf_counter()

    def look(self, *, can_wait: bool = False) -> None:
        """Between steps. `can_wait`: a checkpoint that is only due comes soon anyway.

        Raises Stopped, once the run is saved, where a signal wants it to end.
        """
        since_saved_s = time.perf_counter() - self.saved_at
        is_due = not can_wait and since_saved_s >= 60 * self.setup.settings.save_minutes
        own = max(REQUESTS.take(), DUE if is_due else NOTHING)
        wanted = ranks.all_reduce_max(own, self.setup.device)
        if wanted == NOTHING:
            return

        self.save()
        where = f"after step {self.run.step} of {self.setup.n_steps} of epoch {self.run.epoch + 1}"
        if wanted == STOP:
            raise Stopped(f"stopped and saved {where}")
        if wanted == SAVE and ranks.RANK == 0:
            log(f"saved {where}")

    def save(self, *files: str) -> None:
        """A checkpoint, and copies of it and `files` to the mirror."""
        setup = self.setup
        save(self.run, setup.settings, setup.train_set.fingerprint, setup.learnt.to_plain())
        self.mirror.copy(*files, CHECKPOINT)
        self.saved_at = time.perf_counter()


# ---------------------------------------------------------------- one epoch


def _train_epoch(
    run: Run, setup: TaskSetup, loaders: Loaders, keeper: CheckpointKeeper
) -> dict[str, float]:
    """The rest of an epoch, with checkpoints in between; its part of the row of metrics.csv.

    Raises NoKnownPixel where no pixel was known, Diverged where the loss is no number.
    """
    loaders.train.set_epoch(run.epoch, run.step)
    places = loaders.train_places(run.epoch, run.step)
    to_learn(run.model, setup.settings, run.epoch)

    with _progress_bar(run, setup) as bar:
        meter = Meter(bar, ranks.WORLD)
        for batch, mine in zip(loaders.train, places, strict=False):
            train_step(run, setup, batch, mine)
            is_last = run.step == setup.n_steps
            meter.show(len(batch[0]), is_last, lambda: float(run.sums[0] / run.sums[1]))
            keeper.look(can_wait=is_last)

    sums = ranks.all_reduce_sum(run.sums)
    if sums[1] == 0:
        known = "measured" if setup.learns_depth else "labelled"
        raise NoKnownPixel(setup.train_set.path, known)

    lr = run.optimizer.param_groups[0]["lr"]
    row = {"lr": lr, **_scores(setup, "train", sums), **meter.values()}
    if not math.isfinite(row["train_loss"]):
        raise Diverged(run.epoch + 1, setup.settings.lr)
    return row


def _progress_bar(run: Run, setup: TaskSetup) -> Progress:
    what = f"epoch {run.epoch + 1}/{setup.settings.epochs}"
    is_shown = ranks.RANK == 0
    return Progress(what, "steps", setup.n_steps, n_done=run.step, is_shown=is_shown)


def _scores(setup: TaskSetup, split: str, sums: Tensor) -> dict[str, float]:
    """Mean loss and the task's scores, as columns of metrics.csv."""
    scores = {"loss": float(sums[0] / sums[1]), **setup.task.scores(sums[2:])}
    return {f"{split}_{name}": value for name, value in scores.items()}


# ---------------------------------------------------------------- scoring


def predict_batch(
    run: Run,
    setup: NetworkSetup,
    batch: Batch,
    *,
    test_time_augmentation: bool = True,
    done: Callable[[float], object] | None = None,
) -> tuple[Tensor, Batch]:
    """Outputs for pictures as stored, averaged over each and its mirror image.

    test_time_augmentation: scenes are averaged over five crops of each too, and dense outputs are
    at the stored resolution, not the network's. done: told, after each picture of a row, for how
    many rows' worth the network was asked. Returns the outputs, and (rgb, depth, target) on the
    device, at the outputs' resolution where they are dense.
    """
    colours, planes, target = on_device(setup, batch)
    is_dense = target.ndim > 1
    size = setup.settings.size or colours.shape[-1]
    if is_dense and not test_time_augmentation:
        colours, planes = resize(colours, [*planes, target], size)
        *planes, target = planes

    is_cropped = test_time_augmentation and not is_dense
    all_views = views(setup.settings.crop) if is_cropped else [WHOLE]
    outs = []
    for view in all_views:
        small, planes_small = resize(colours, planes, size, view)
        outs.append(_forward(run.model, run, setup, (small, planes_small), target))
        mirrored_planes = [plane.flip(-1) for plane in planes_small]
        mirrored_pictures = (small.flip(-1), mirrored_planes)
        mirrored = _forward(run.model, run, setup, mirrored_pictures, target)
        outs.append(mirrored.flip(-1) if is_dense else mirrored)
        if done is not None:
            done(len(colours) / len(all_views))

    mean = sum(outs[1:], outs[0]) / len(outs)
    return mean, (colours[:, :3], planes[0], target)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of the rows of a split. scores: their part of the row of metrics.csv. answers: what the
    network says of each of them; None where it was asked without test-time augmentation.
    """

    scores: dict[str, float]
    answers: Answers | None


@torch.inference_mode()
def evaluate(
    run: Run,
    setup: TaskSetup,
    loaders: Loaders,
    test_time_augmentation: bool = True,
    keeper: CheckpointKeeper | None = None,
    ask: Callable[..., tuple[Tensor, Batch]] | None = None,
) -> Evaluation:
    """Every row of `loaders.split` once over all ranks.

    Leaves the counts in the run. `keeper` looks after every batch. ask: in the place of
    `predict_batch` of this run.
    """
    ask = ask or partial(predict_batch, run, setup)
    run.model.eval()
    if ranks.WORLD > 1:
        _share_statistics(run.model)

    sums = torch.zeros_like(run.sums)
    positions = loaders.eval_positions()
    collector = Collector(setup, loaders.eval_set, positions) if test_time_augmentation else None
    n_common = common_batches(len(loaders.eval_set), setup.settings.batch_size, ranks.WORLD)
    with _scoring_bar(loaders, len(positions)) as bar:
        for k, batch in enumerate(loaders.eval):
            for part in _parts(batch):
                out, on_device = ask(
                    part, test_time_augmentation=test_time_augmentation, done=bar.update
                )
                target = on_device[-1]
                loss, weight = setup.task.loss(out, target)
                sums += _sums(setup, out, target, loss, weight)
                if collector is not None:
                    collector.add(out, on_device)
            # Looking is one all_reduce: every rank must come to it as often as the others.
            if keeper and k < n_common:
                keeper.look(can_wait=True)

    sums = ranks.all_reduce_sum(sums).cpu()
    run.counts = sums[2:]
    answers = None if collector is None else collector.answers()
    return Evaluation(scores=_scores(setup, loaders.split, sums), answers=answers)


def _scoring_bar(loaders: Loaders, n_rows: int) -> Progress:
    what = f"scoring {loaders.split}"
    return Progress(what, "rows", n_rows, is_shown=ranks.RANK == 0)


def _share_statistics(model: nn.Module) -> None:
    """Rank 0's BatchNorm statistics in every rank: on gloo each has its own."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def _parts(batch: Batch) -> Iterator[Batch]:
    """A batch with dense targets in smaller ones: its outputs at full resolution are large."""
    target = batch[-1]
    n_rows = DENSE_ROWS if target.ndim > 1 else len(target)
    return zip(*(part.split(n_rows) for part in batch), strict=True)


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """A row of metrics.csv for people."""
    scores = [
        f"{name.replace('_', ' ')} {value:.3f}"
        for name, value in row.items()
        if name.startswith(("train_", "val_", "test_"))
    ]
    speed = f"{row['samples_per_s']:.0f} samples/s  {row['seconds']:.1f} s"
    gib = row["memory_bytes"] / 2**30
    memory = "unknown" if math.isnan(gib) else f"{gib:.2f} GiB"
    return f"epoch {row['epoch']}/{epochs}  {'  '.join(scores)}  {speed}  memory {memory}"


# ---------------------------------------------------------------- the whole training


@contextmanager
def training(settings: Settings, found: ShardSet | None = None) -> Iterator[TrainingResult]:
    """Train, and hold the run's directory until the caller has done with the result.

    See `train`. found: the set, where it is open already. In every rank: the same result, of which
    the first one's `counts` and files count.
    """
    settings.check_out()
    VOICE.has_spoken()  # whatever happened before is no silence of this training
    setup = make_setup(settings, ranks.join(), found)
    with ExitStack() as held:
        lock = only_writer(Path(settings.out), "trained")
        ranks.broadcast_from_first(lambda: held.enter_context(lock))
        if ranks.RANK == 0:
            remove_unfinished(Path(settings.out))

        yield _train_to_the_end(setup)


def _train_to_the_end(setup: TaskSetup) -> TrainingResult:
    """A run, begun or continued, and what it ends with."""
    run, mirror = _begin(setup)
    n_before = run.epoch
    loaders = open_loaders(setup, setup.eval_split)
    keeper = CheckpointKeeper(run, setup, mirror)
    with REQUESTS.training():
        if setup.settings.reset and setup.settings.mirror:
            keeper.save()  # else the mirror's was continued, if this run ended before its first
        answers = _train_epochs(run, setup, loaders, keeper)

    baseline = _baseline(setup, loaders)
    test: dict[str, float] = {}
    if setup.eval_split != "test" and reported_split(setup) == "test":
        loaders = open_loaders(setup, "test")  # the others, and their workers, end here
        evaluation = evaluate(run, setup, loaders)
        test = evaluation.scores
        answers = evaluation.answers
    elif answers is None:  # every epoch was done before
        answers = evaluate(run, setup, loaders).answers
    assert answers is not None

    out = Path(setup.settings.out)
    if ranks.RANK == 0:  # again: of a run that starts from the mirror there is only the checkpoint
        write_csv(out / METRICS, run.history)
    return TrainingResult(
        run=run,
        setup=setup,
        loaders=loaders,
        answers=answers,
        epochs=run.epoch,
        n_trained=run.epoch - n_before,
        last=run.history[-1],
        best=_best(run.history, f"{setup.eval_split}_{setup.task.main}"),
        test=test,
        baseline=baseline,
        files=(out / CHECKPOINT, out / METRICS),
        mirror=mirror,
    )


def train(settings: Settings) -> TrainingResult:
    """Train until settings.epochs, continuing what settings.out holds.

    Writes checkpoints and metrics.csv there, and copies of them to settings.mirror; prints a line
    an epoch. `train.report.report` makes pictures and tables of the result. Raises UserError for a
    user's mistake, and Stopped after SIGTERM or SIGHUP where `signals.REQUESTS` listens.
    """
    with training(settings) as result:
        result.mirror.copy(METRICS, CHECKPOINT, wait_s=MIRROR_WAIT_S)
        return result


def _begin(setup: TaskSetup) -> tuple[Run, Mirror]:
    """The run as it was left, or a new one."""
    settings = setup.settings
    run = new_run(setup)
    mirror = Mirror(settings.out, settings.mirror if ranks.RANK == 0 else None)
    is_continued = restore(run, settings, setup.train_set.fingerprint)
    if not is_continued:
        start_from(run.model, settings.weights)

    run.net = ranks.wrap(run.model, setup.device)
    if settings.compile:
        run.net = compiled(run.net)
    return run, mirror


def _train_epochs(
    run: Run, setup: TaskSetup, loaders: Loaders, keeper: CheckpointKeeper
) -> Answers | None:
    """What the network says of the rows after the last epoch; None where none was left to train."""
    answers = None
    is_said = ranks.RANK > 0
    n_epochs = setup.settings.epochs
    while run.epoch < n_epochs:
        started = time.perf_counter()
        is_last = run.epoch + 1 == n_epochs
        row: dict[str, float] = {"epoch": run.epoch + 1}
        row |= _train_epoch(run, setup, loaders, keeper)
        if not is_said:
            log(_what_is_scored(setup))
            is_said = True
        evaluation = evaluate(run, setup, loaders, test_time_augmentation=is_last, keeper=keeper)
        answers = evaluation.answers
        row |= evaluation.scores
        row["seconds"] = time.perf_counter() - started

        run.history.append(row)
        run.step = 0
        run.sums.zero_()
        keeper.save(METRICS)
        if ranks.RANK == 0:
            print(epoch_line(row, n_epochs), flush=True)
            VOICE.has_spoken()
    return answers


def _what_is_scored(setup: TaskSetup) -> str:
    """Said once: a score of the val rows is no score of the test rows."""
    once = "" if reported_split(setup) == setup.eval_split else "; the test rows once, at the end"
    return f"scored after each epoch: the {setup.eval_split} rows{once}"


def _best(history: list[dict[str, float]], column: str) -> dict[str, float]:
    """The row of the best epoch, the first of equals; the last one where nothing was scored."""
    scored = [row for row in history if not math.isnan(row.get(column, math.nan))]
    if not scored:
        return history[-1]
    if column.endswith("_rmse"):
        return min(scored, key=lambda row: row[column])
    return max(scored, key=lambda row: row[column])


def _baseline(setup: TaskSetup, loaders: Loaders) -> float | None:
    """Top-1 on the scored rows of always naming the most frequent train class."""
    if setup.settings.task != "scene":
        return None
    most_frequent = np.bincount(setup.train_set.labels()).argmax()
    return float((loaders.eval_set.labels() == most_frequent).mean())
