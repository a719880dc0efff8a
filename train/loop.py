"""The training loop: converted set in; checkpoints, metrics.csv, pictures and a summary out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from convert.format import UserError, open_set, resolve_set
from train import ranks
from train.augment import DepthStats, Draws, Strengths, augment, resize, to_input
from train.checkpoint import CHECKPOINT, METRICS, Mirror, Run, one_line, restore, save
from train.data import ShardDataset, create_dataloaders
from train.memory import TreeMemory, tree_memory, warn_near_limit
from train.model import build, load_imagenet, read_weights
from train.order import steps_per_epoch, train_batches
from train.settings import Settings
from train.tasks import Task, make_task

MIRROR_WAIT_S = 60.0  # what the end of a run grants the copy to --mirror
SHOW_EVERY_S = 1.0  # each refresh of the bar waits for the device and reads /proc
DENSE_ROWS = 16  # scored at once at full resolution


@dataclass
class Job:
    """What stays the same while a run trains."""

    settings: Settings
    train_set: ShardDataset
    task: Task
    stats: DepthStats
    device: torch.device
    net: Any = None  # run.model, compiled or wrapped
    train_loader: Any = None
    test_loader: Any = None

    @property
    def n_steps(self) -> int:
        return steps_per_epoch(len(self.train_set), self.settings.batch_size, ranks.WORLD)


# ---------------------------------------------------------------- pieces


def seed_of(*parts: int) -> int:
    """One 63-bit seed for (seed, epoch, step)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def half_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the GPU has it in hardware (a T4 only emulates it), else float16; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def lr_at(step: int, n_warmup: int, n_steps: int, peak: float) -> float:
    """Linear warmup to `peak`, then a cosine to zero at n_steps."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(n_steps - n_warmup, 1)))


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; biases and norms (one-dimensional) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


def pick_layout(settings: Settings) -> torch.memory_format:
    """Channels last doubles the speed of a CPU; but torch 2.13's strided 1x1 convolution of 4 channels in that layout
    writes beyond its memory there, so only for a network of multiples of 8."""
    fits = settings.model == "resnet18" and settings.width % 8 == 0
    return torch.channels_last if fits else torch.contiguous_format


def new_model(settings: Settings, n_out: int) -> nn.Module:
    width, dense = settings.width or (64 if settings.weights else 32), settings.task != "scene"
    inputs = "rgb" if settings.task == "depth" else settings.inputs
    model = build(settings.model, n_out, width=width, inputs=inputs, dense=dense)
    if settings.weights:
        try:
            load_imagenet(model, read_weights(settings.weights))  # type: ignore[arg-type]
        except Exception as error:  # a missing file, no network, a pickle of anything else
            hint = "Give a ResNet-18 state_dict (and --width 64)"
            raise UserError(f"--weights {settings.weights}: {one_line(error)}. {hint}") from error
    return model.to(memory_format=pick_layout(settings))  # type: ignore[call-overload, no-any-return]


def new_run(job: Job) -> Run:
    torch.manual_seed(seed_of(job.settings.seed))
    model = new_model(job.settings, job.task.n_out).to(job.device)
    if job.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if ranks.WORLD > 1 else model
    scaler = torch.amp.GradScaler(job.device.type, enabled=half_dtype(job.device) == torch.float16)
    sums = torch.zeros(2 + job.task.n_counts, dtype=torch.float64)
    return Run(model, _optimizer(model, job.settings), scaler, sums.to(job.device), sums[2:], [])


def start(settings: Settings, device: torch.device) -> Job:
    """Everything but the loaders: a mistake shows before they do anything."""
    directory, depth = resolve_set(settings.data), "raw_depth" if settings.task == "depth" else "depth"
    chosen = {"fields": ("rgb", depth), "target": settings.task, "num_classes": settings.num_classes}
    chosen["allow_remote"] = settings.allow_remote
    train_set = ShardDataset(directory, split="train", **chosen)  # type: ignore[arg-type]
    task = make_task(settings, train_set, open_set(directory).manifest["settings"]["crop"])
    job = Job(settings, train_set, task, DepthStats(train_set.depth_mean, train_set.depth_std), device)
    if job.n_steps == 0:
        raise UserError(f"{directory} has {len(train_set)} train rows for {ranks.WORLD} ranks. Use fewer ranks")
    return job


def open_loaders(job: Job) -> None:
    s, train_set = job.settings, job.train_set
    job.train_loader, job.test_loader = create_dataloaders(
        train_set.path,
        batch_size=s.batch_size,
        num_workers=s.num_workers,
        num_classes=s.num_classes,
        target=s.task,
        fields=train_set.fields,
        normalize=False,
        seed=s.seed,
        rank=ranks.RANK,
        world=ranks.WORLD,
        allow_remote=s.allow_remote,
    )


# ---------------------------------------------------------------- one epoch


class Meter:
    """Speed and memory of this process's part of an epoch; the bar asks once a second, as reading sums waits."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.rows, self.memory = bar, 0, TreeMemory(0, 0)
        self.started = self.shown = time.perf_counter()

    def rate(self) -> float:
        return self.rows * ranks.WORLD / (time.perf_counter() - self.started)

    def show(self, run: Run, n_rows: int, is_last: bool) -> None:
        """Measure the memory (the largest is kept) and refresh the bar, at most once a second, and at the end."""
        self.rows += n_rows
        self.bar.update()
        if time.perf_counter() - self.shown < SHOW_EVERY_S and not is_last:
            return
        self.shown = time.perf_counter()
        self.memory = TreeMemory(*(max(pair) for pair in zip(self.memory, tree_memory(), strict=True)))
        warn_near_limit()
        if not self.bar.disable:
            loss, gib = float(run.sums[0] / run.sums[1]), self.memory.pss_anon / 2**30
            self.bar.set_postfix_str(f"loss {loss:.3f}, {self.rate():.0f}/s, mem {gib:.2f} GiB")


def _sums(job: Job, out: Tensor, target: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((torch.stack((loss, weight)).double(), job.task.count(out, target)))


def _forward(job: Job, net: nn.Module, rgb: Tensor, depth: Tensor, target: Tensor) -> Tensor:
    """Pictures as stored or augmented -> float32 outputs, dense ones at the target's resolution."""
    inputs = list(to_input(rgb, depth, job.stats))[: 1 if job.settings.task == "depth" else 2]
    inputs[0] = inputs[0].contiguous(memory_format=pick_layout(job.settings))
    half = half_dtype(job.device)
    with torch.autocast(job.device.type, dtype=half) if half else nullcontext():
        out: Tensor = net(*inputs)
    out = out.float()
    return out if target.ndim == 1 else F.interpolate(out, target.shape[-2:], mode="bilinear", align_corners=False)


def _to_device(job: Job, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """RGB, depth, target; a depth target counts only where the sensor measured."""
    rgb, depth, target = (part.to(job.device, non_blocking=True) for part in batch)
    return rgb, depth, torch.where(depth > 0, target, 0.0) if job.settings.task == "depth" else target


def _places(job: Job, epoch: int, start: int) -> Iterator[Any]:
    """Where this rank's rows stand in each batch of all ranks."""
    if ranks.WORLD == 1:
        return repeat(slice(None))
    n_rows, s = len(job.train_set), job.settings
    whole = train_batches(n_rows, s.batch_size * ranks.WORLD, s.seed, epoch, start=start)
    mine = train_batches(n_rows, s.batch_size, s.seed, epoch, start=start, rank=ranks.RANK, world=ranks.WORLD)
    return (np.searchsorted(a, b) for a, b in zip(whole, mine, strict=True))


def _step(run: Run, job: Job, batch: tuple[Tensor, ...], mine: Any) -> None:
    """One step; every draw in it comes from (seed, epoch, step)."""
    s, at = job.settings, (job.settings.seed, run.epoch, run.step)
    torch.manual_seed(seed_of(*at, ranks.RANK))  # dropout
    rgb, depth, target = _to_device(job, batch)
    dense, size = target.ndim > 1, s.size or rgb.shape[-1]
    draws = Draws(seed_of(*at), len(rgb) * ranks.WORLD, mine, job.device)
    strengths = Strengths(1.0 if s.task == "depth" else s.crop, s.jitter, s.erase, s.depth_noise)
    rgb, (depth, *targets) = augment(rgb, [depth, target] if dense else [depth], draws, size, strengths)
    target = targets[0] if dense else target
    out = _forward(job, job.net, rgb, depth, target)
    loss, weight = job.task.loss(out, target)
    n_warmup = min(s.warmup_epochs, s.epochs // 4) * job.n_steps
    for group in run.optimizer.param_groups:
        group["lr"] = lr_at(run.epoch * job.n_steps + run.step, n_warmup, s.epochs * job.n_steps, s.lr)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss * ranks.WORLD / ranks.total(weight)).backward()  # ranks average their gradients
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.sums += _sums(job, out.detach(), target, loss.detach(), weight)
    run.step += 1


def _is_due(saved: float, minutes: float) -> bool:
    return time.perf_counter() - saved >= 60 * minutes


def _train_epoch(run: Run, job: Job, mirror: Mirror) -> dict[str, float]:
    """The rest of an epoch, with checkpoints in between."""
    s, n_steps, saved = job.settings, job.n_steps, time.perf_counter()
    job.train_loader.set_epoch(run.epoch, run.step)
    run.model.train()
    name, places = f"epoch {run.epoch + 1}/{s.epochs}", _places(job, run.epoch, run.step)
    with tqdm(total=n_steps, initial=run.step, desc=name, disable=ranks.RANK > 0 or None, leave=False) as bar:
        meter = Meter(bar)
        for batch, mine in zip(job.train_loader, places, strict=False):
            _step(run, job, batch, mine)
            meter.show(run, len(batch[0]), run.step == n_steps)
            due = ranks.first(partial(_is_due, saved, s.save_minutes))
            if due and run.step < n_steps:
                save(run, s, job.train_set.fingerprint)
                mirror.copy(CHECKPOINT)
                saved = time.perf_counter()
    sums = ranks.total(run.sums)
    loss = float(sums[0] / sums[1])
    if not math.isfinite(loss):
        raise UserError(f"the loss became {loss} in epoch {run.epoch + 1}. Use a smaller --lr than {s.lr}")
    row = {"lr": run.optimizer.param_groups[0]["lr"], "train_loss": loss, "samples_per_s": meter.rate()}
    row |= {f"train_{name}": value for name, value in job.task.scores(sums[2:]).items()}
    return row | {"memory_bytes": meter.memory.pss_anon, "page_cache_bytes": meter.memory.page_cache}


def apply(net: nn.Module, job: Job, batch: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs at the target's resolution for whole pictures as stored; and these, on the device."""
    rgb, depth, target = _to_device(job, batch)
    small, (small_depth,) = resize(rgb, [depth], job.settings.size or rgb.shape[-1])
    return _forward(job, net, small, small_depth, target), (rgb, depth, target)


@torch.inference_mode()
def evaluate(run: Run, job: Job) -> dict[str, float]:
    """Every test row once over all ranks; leaves the counts in the run."""
    run.model.eval()
    ranks.same_buffers(run.model)
    sums = torch.zeros_like(run.sums)
    for batch in job.test_loader:
        n = DENSE_ROWS if batch[-1].ndim > 1 else len(batch[-1])
        for part in zip(*(each.split(n) for each in batch), strict=True):
            out, (*_, target) = apply(run.model, job, part)
            sums += _sums(job, out, target, *job.task.loss(out, target))
    sums = ranks.total(sums).cpu()
    run.counts = sums[2:]
    scores = {f"test_{name}": value for name, value in job.task.scores(run.counts).items()}
    return {"test_loss": float(sums[0] / sums[1]), **scores}


# ---------------------------------------------------------------- a run


def _epoch_line(row: dict[str, float], epochs: int) -> str:
    scores = "  ".join(
        f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.items() if name.startswith(("train_", "test_"))
    )
    speed = f"{row['samples_per_s']:.0f} samples/s  {row['seconds']:.1f} s"
    memory = f"memory {row['memory_bytes'] / 2**30:.2f} GiB + {row['page_cache_bytes'] / 2**30:.2f} page cache"
    return f"epoch {row['epoch']}/{epochs}  {scores}  {speed}  {memory}"


def train(settings: Settings) -> dict[str, Any]:
    """Train until settings.epochs, continuing what settings.out holds. Raises UserError for a user's mistake."""
    settings.check()
    job = start(settings, ranks.join())
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    run, mirror = new_run(job), Mirror(settings)
    restore(run, settings, job.train_set.fingerprint)
    job.net = ranks.wrap(run.model, job.device)
    if settings.compile:
        job.net = torch.compile(job.net)
    open_loaders(job)
    while run.epoch < settings.epochs:
        started = time.perf_counter()
        row: dict[str, float] = {"epoch": run.epoch + 1}
        row |= {**_train_epoch(run, job, mirror), **evaluate(run, job)}
        run.history.append(row | {"seconds": time.perf_counter() - started})
        run.step, run.sums = 0, torch.zeros_like(run.sums)
        save(run, settings, job.train_set.fingerprint)
        if ranks.RANK == 0:
            print(_epoch_line(run.history[-1], settings.epochs), flush=True)
        mirror.copy(METRICS, CHECKPOINT)
    return _finish(run, job, mirror) if ranks.RANK == 0 else {}


def _finish(run: Run, job: Job, mirror: Mirror) -> dict[str, Any]:
    """Pictures and tables, and the summary on standard output and as a dict."""
    from pictures.report import report

    s, main, out = job.settings, f"test_{job.task.main}", Path(job.settings.out)
    last, best = run.history[-1], (min if main == "test_rmse" else max)(run.history, key=lambda row: row[main])
    names, baseline = report(run, job)
    mirror.copy(*names, wait_s=MIRROR_WAIT_S)
    print(f"last  {_epoch_line(last, s.epochs)}")
    print(f"best  epoch {best['epoch']}: {main} {best[main]:.3f} (picked on the test rows, so optimistic)")
    if baseline is not None:
        print(f"always the most frequent class: top-1 {baseline:.1%}")
    files = [str(out / name) for name in names]
    print("files:", *files)
    print("continue:", s.command(epochs=2 * run.epoch), flush=True)
    return {"epochs": run.epoch, "last": last, "best": best, "baseline": baseline, "files": files}
