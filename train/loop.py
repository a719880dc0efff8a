"""The training loop: converted set in; checkpoints, metrics.csv, pictures and a summary out."""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from loader.memory import Meter
from shards.format import UserError, log, one_line
from shards.lock import hold
from stores.mounted import Mirror
from train import ranks
from train.augment import WHOLE, Draws, augment, rays, resize, to_input, views
from train.checkpoint import CHECKPOINT, LOCK, METRICS, Run, restore, save
from train.data import ShardDataset, create_dataloaders
from train.model import ask, build, compiled, layout_for, start_from, unused_parameters
from train.order import steps_per_epoch
from train.settings import Settings
from train.signals import DUE, NOTHING, REQUESTS, SAVE, STOP, Stopped
from train.tasks import Task, make_task

MIRROR_WAIT_S = 60.0  # what the end of a run grants the copy to --mirror
DENSE_ROWS = 16  # scored at once at full resolution
Batch = tuple[Tensor, ...]


@dataclass
class Job:
    """What stays the same while a run trains."""

    settings: Settings
    train_set: ShardDataset
    task: Task
    device: torch.device
    rays: tuple[Tensor, ...] = ()  # of the stored pixels, where the network sees surfaces; [1, S, S] each
    layout: torch.memory_format = torch.contiguous_format  # of the network and its input
    net: Any = None  # run.model, compiled or wrapped
    train_loader: Any = None
    test_loader: Any = None

    @property
    def n_steps(self) -> int:
        return steps_per_epoch(len(self.train_set), self.settings.batch_size, ranks.WORLD)

    @property
    def half(self) -> torch.dtype | None:
        """bfloat16 where the GPU has it in hardware (a T4 only emulates it), else float16; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.get_device_capability(self.device) >= (8, 0) else torch.float16


def start(settings: Settings, device: torch.device) -> Job:
    """Everything but the loaders: a mistake shows before they do anything."""
    s, fields = settings, ("rgb", "raw_depth" if settings.task == "depth" else "depth")
    chosen: Any = {"fields": fields, "target": s.task, "num_classes": s.num_classes, "allow_remote": s.allow_remote}
    train_set = ShardDataset(s.data, **chosen)
    job = Job(settings, train_set, make_task(settings, train_set), device)
    if s.model == "resnet18" and s.inputs != "rgb" and s.task != "depth":
        job.rays = tuple(plane.to(device) for plane in rays(train_set.size, train_set.crop))
    if job.n_steps == 0:
        raise UserError(f"{train_set.path} has {len(train_set)} train rows for {ranks.WORLD} ranks. Use fewer ranks")
    return job


def new_run(job: Job) -> Run:
    """Fresh weights, optimizer and counts."""
    s = job.settings
    torch.manual_seed(seed_of(s.seed))
    inputs = "rgb" if s.task == "depth" else s.inputs
    shape = {"width": s.channels, "inputs": inputs, "depth_planes": 5 if job.rays else 1, "dense": s.task != "scene"}
    model = build(s.model, job.task.n_out, **shape)
    if s.model == "resnet18":  # a network of a user's own may flatten its features, which channels_last forbids
        job.layout = layout_for(model, job.device)
    model = model.to(job.device, memory_format=job.layout)  # type: ignore[call-overload]
    if job.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if ranks.WORLD > 1 else model
    if s.model != "resnet18":
        probe(model, job)
    decayed, plain = ([p for p in model.parameters() if (p.ndim > 1) is is_matrix] for is_matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.half == torch.float16)
    sums = torch.zeros(2 + job.task.n_counts, dtype=torch.float64, device=job.device)
    return Run(model, torch.optim.AdamW(groups, lr=s.lr, fused=True), scaler, sums, sums[2:], [])


def probe(model: nn.Module, job: Job) -> None:
    """Refuse a network of a user's own that does not answer as the task needs, from two grey pictures.

    In evaluation mode, and with torch's random numbers put back: what it learns afterwards does not change.
    """
    s = job.settings
    size = s.size or job.train_set.size
    pictures = [torch.full((2, n, size, size), 0.5, device=job.device) for n in ((3,) if s.task == "depth" else (3, 1))]
    n_dims = 2 if s.task == "scene" else 4
    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        model.eval()
        out = ask(s.model, model, pictures)
        model.train()
    shape = f"[2, {job.task.n_out}]" if n_dims == 2 else f"[2, {job.task.n_out}, H, W]"
    expected = f"expected floats {shape} for --task {s.task}"
    if not isinstance(out, Tensor):
        raise UserError(f"--model {s.model} answers with {type(out).__name__}, {expected}")
    if not out.is_floating_point() or out.ndim != n_dims or out.shape[:2] != (2, job.task.n_out):
        kind = str(out.dtype).removeprefix("torch.")
        raise UserError(f"--model {s.model} answers two pictures with {kind} {list(out.shape)}, {expected}")
    if not out.requires_grad:
        raise UserError(f"--model {s.model}: its answer depends on no parameter that can learn. Leave one unfrozen")
    unused = unused_parameters(model, out) if ranks.WORLD > 1 else []
    if unused:
        raise UserError(
            f"--model {s.model} does not use {', '.join(unused[:3])}: with several ranks it must, or freeze it"
        )


def open_loaders(job: Job) -> None:
    names = "batch_size", "num_workers", "num_classes", "seed", "allow_remote"
    same: dict[str, Any] = {name: getattr(job.settings, name) for name in names}
    same |= {"fields": job.train_set.fields, "target": job.settings.task, "rank": ranks.RANK, "world": ranks.WORLD}
    job.train_loader, job.test_loader = create_dataloaders(job.train_set.path, normalize=False, **same)


def seed_of(*parts: int) -> int:
    """One 63-bit seed for (seed, epoch, step)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def lr_at(step: int, n_warmup: int, n_steps: int, peak: float) -> float:
    """Linear warmup to `peak`, then a cosine to zero at n_steps."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(n_steps - n_warmup, 1)))


def _forward(job: Job, net: nn.Module, rgb: Tensor, planes: list[Tensor], target: Tensor) -> Tensor:
    """Pictures as stored or augmented -> float32 outputs, dense ones at the target's resolution."""
    inputs = to_input(rgb, planes, (job.train_set.depth_mean, job.train_set.depth_std))
    n_inputs = 1 if job.settings.task == "depth" else 2
    with torch.autocast(job.device.type, dtype=job.half, enabled=job.half is not None):
        out: Tensor = net(*(part.contiguous(memory_format=job.layout) for part in inputs[:n_inputs]))
    return out.float() if target.ndim == 1 else F.interpolate(out.float(), target.shape[-2:], mode="bilinear")


def _to_device(job: Job, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor]:
    """RGB; depth and the rays; the target, a depth only where the sensor measured."""
    rgb, depth, target = (part.to(job.device, non_blocking=True) for part in batch)
    target = torch.where(depth > 0, target, 0.0) if job.settings.task == "depth" else target
    return rgb, [depth, *(plane.expand_as(depth) for plane in job.rays)], target


def _sums(job: Job, out: Tensor, target: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((torch.stack((loss, weight)).double(), job.task.count(out, target)))


def train_step(run: Run, job: Job, batch: Batch, mine: Any) -> None:
    """One step; every draw in it comes from (seed, epoch, step)."""
    s, at = job.settings, (job.settings.seed, run.epoch, run.step)
    torch.manual_seed(seed_of(*at, ranks.RANK))  # dropout
    rgb, planes, target = _to_device(job, batch)
    draws = Draws(seed_of(*at), len(rgb) * ranks.WORLD, mine, job.device)
    planes += [target] if target.ndim > 1 else []
    rgb, planes = augment(rgb, planes, draws, s.size or rgb.shape[-1], s)
    target = planes.pop() if target.ndim > 1 else target
    try:
        out = _forward(job, job.net, rgb, planes, target)
    except (ValueError, RuntimeError) as error:
        if "Expected more than 1" not in str(error):  # BatchNorm, where a channel has one value: nothing to normalise
            raise
        what = f"a batch of {len(rgb)} at {rgb.shape[-1]} px is too little for BatchNorm ({one_line(error)})"
        raise UserError(f"{what}. Use a larger --batch-size or --size") from error
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


class Keeper:
    """Saves a run where that is due or was asked for, and ends it where a signal wants that; for every rank alike."""

    def __init__(self, run: Run, job: Job, mirror: Mirror) -> None:
        self.run, self.job, self.mirror = run, job, mirror
        self.saved = time.perf_counter()

    def look(self, *, can_wait: bool = False) -> None:
        """Between steps. `can_wait`: a checkpoint that is only due comes soon anyway."""
        is_due = not can_wait and time.perf_counter() - self.saved >= 60 * self.job.settings.save_minutes
        wanted = ranks.most(max(REQUESTS.take(), DUE if is_due else NOTHING), self.job.device)
        if wanted == NOTHING:
            return
        self.save()
        where = f"after step {self.run.step} of {self.job.n_steps} of epoch {self.run.epoch + 1}"
        if wanted == STOP:
            raise Stopped(f"stopped and saved {where}; the same command continues there")
        if wanted == SAVE and ranks.RANK == 0:
            log(f"saved {where}")

    def save(self, *files: str) -> None:
        """A checkpoint, and copies of it and `files`."""
        save(self.run, self.job.settings, self.job.train_set.fingerprint)
        self.mirror.copy(*files, CHECKPOINT)
        self.saved = time.perf_counter()


def _train_epoch(run: Run, job: Job, keeper: Keeper) -> dict[str, float]:
    """The rest of an epoch, with checkpoints in between."""
    s, n_steps = job.settings, job.n_steps
    job.train_loader.set_epoch(run.epoch, run.step)
    run.model.train()
    name, places = f"epoch {run.epoch + 1}/{s.epochs}", job.train_loader.batches.places(run.epoch)[run.step :]
    with tqdm(total=n_steps, initial=run.step, desc=name, disable=ranks.RANK > 0 or None, leave=False) as bar:
        meter = Meter(bar, ranks.WORLD)
        for batch, mine in zip(job.train_loader, places, strict=False):
            train_step(run, job, batch, mine)
            meter.show(len(batch[0]), run.step == n_steps, lambda: float(run.sums[0] / run.sums[1]))
            keeper.look(can_wait=run.step == n_steps)
    sums = ranks.total(run.sums)
    if sums[1] == 0:
        what = "is measured" if s.task == "depth" else "is labelled"
        raise UserError(
            f"{job.train_set.path}: no pixel of the train rows {what}: nothing to learn. Use another --task"
        )
    row = {"lr": run.optimizer.param_groups[0]["lr"], **_scores(job, "train", sums), **meter.values()}
    if not math.isfinite(row["train_loss"]):
        raise UserError(f"the loss became nan in epoch {run.epoch + 1}. Use a smaller --lr than {s.lr}")
    return row


def _scores(job: Job, split: str, sums: Tensor) -> dict[str, float]:
    scores = {"loss": float(sums[0] / sums[1]), **job.task.scores(sums[2:])}
    return {f"{split}_{name}": value for name, value in scores.items()}


def apply(net: nn.Module, job: Job, batch: Batch, thorough: bool = True) -> tuple[Tensor, Batch]:
    """Outputs for pictures as stored, averaged over each and its mirror image; and these, on the device.

    `thorough`: scenes averaged over five crops of each too, dense outputs at the stored resolution, not the network's.
    """
    rgb, planes, target = _to_device(job, batch)
    size = job.settings.size or rgb.shape[-1]
    if target.ndim > 1 and not thorough:
        rgb, planes = resize(rgb, [*planes, target], size)
        target = planes.pop()
    outs = []
    for view in views(job.settings.crop) if target.ndim == 1 and thorough else [WHOLE]:
        pictures, planes_small = resize(rgb, planes, size, view)
        outs.append(_forward(job, net, pictures, planes_small, target))
        mirrored = _forward(job, net, pictures.flip(-1), [plane.flip(-1) for plane in planes_small], target)
        outs.append(mirrored if target.ndim == 1 else mirrored.flip(-1))
    return sum(outs[1:], outs[0]) / len(outs), (rgb, planes[0], target)


@torch.inference_mode()
def evaluate(run: Run, job: Job, thorough: bool = True, keeper: Keeper | None = None) -> dict[str, float]:
    """Every test row once over all ranks; leaves the counts in the run. `keeper` looks after every batch."""
    run.model.eval()
    for buffer in run.model.buffers() if ranks.WORLD > 1 else ():  # on gloo each rank has BatchNorm statistics
        dist.broadcast(buffer, 0)
    sums = torch.zeros_like(run.sums)
    n_common = -(-len(job.test_loader.dataset) // ranks.WORLD // job.settings.batch_size)  # batches that every rank has
    for k, batch in enumerate(job.test_loader):
        n = DENSE_ROWS if batch[-1].ndim > 1 else len(batch[-1])
        for part in zip(*(each.split(n) for each in batch), strict=True):
            out, (*_, target) = apply(run.model, job, part, thorough)
            sums += _sums(job, out, target, *job.task.loss(out, target))
        if keeper and k < n_common:
            keeper.look(can_wait=True)
    sums = ranks.total(sums).cpu()
    run.counts = sums[2:]
    return _scores(job, "test", sums)


def epoch_line(row: dict[str, float], epochs: int) -> str:
    scores = [f"{k.replace('_', ' ')} {v:.3f}" for k, v in row.items() if k.startswith(("train_", "test_"))]
    speed = f"{row['samples_per_s']:.0f} samples/s  {row['seconds']:.1f} s"
    gib = row["memory_bytes"] / 2**30
    memory = "unknown" if math.isnan(gib) else f"{gib:.2f} GiB"
    return f"epoch {row['epoch']}/{epochs}  {'  '.join(scores)}  {speed}  memory {memory}"


def train(settings: Settings) -> dict[str, Any]:
    """Train until settings.epochs, continuing what settings.out holds. Raises UserError for a user's mistake.

    Returns the summary: epochs, the last and the best row of metrics.csv, the baseline, the files; {} in ranks above 0.
    """
    if not settings.out:
        raise UserError("--out '': name a directory")
    job = start(settings, ranks.join())
    words: Any = {"then": "Wait for it, or use another --out", "elsewhere": "Use another --out"}
    with ExitStack() as held:
        lock = hold(Path(settings.out, LOCK), is_held=f"{settings.out} is being trained by", **words)
        ranks.first(lambda: held.enter_context(lock))
        run, mirror = _begin(job)
        with REQUESTS.training():
            _train_epochs(run, job, Keeper(run, job, mirror))
        if ranks.RANK:
            return {}
        from train.report import report

        files, summary = report(run, job)
        mirror.copy(*files, wait_s=MIRROR_WAIT_S)
        return summary


def _begin(job: Job) -> tuple[Run, Mirror]:
    """The run as it was left, or a new one, and its loaders."""
    s = job.settings
    run, mirror = new_run(job), Mirror(s.out, s.mirror if ranks.RANK == 0 else None)
    if not restore(run, s, job.train_set.fingerprint):
        start_from(run.model, s.weights)
    job.net = ranks.wrap(run.model, job.device)
    job.net = compiled(job.net) if s.compile else job.net
    open_loaders(job)
    return run, mirror


def _train_epochs(run: Run, job: Job, keeper: Keeper) -> None:
    n_epochs = job.settings.epochs
    while run.epoch < n_epochs:
        started = time.perf_counter()
        row: dict[str, float] = {"epoch": run.epoch + 1}
        row |= _train_epoch(run, job, keeper)
        row |= evaluate(run, job, run.epoch + 1 == n_epochs, keeper)
        run.history.append(row | {"seconds": time.perf_counter() - started})
        run.step = 0
        run.sums.zero_()
        keeper.save(METRICS)
        if ranks.RANK == 0:
            print(epoch_line(run.history[-1], n_epochs), flush=True)
