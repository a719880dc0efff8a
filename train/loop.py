"""The training loop: converted set in; checkpoints, metrics.csv, two pictures and a summary out."""

from __future__ import annotations

import math
import shlex
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from convert.format import UserError, open_set, resolve_set, void, write_atomically
from train.augment import DepthStats, augment, resize, to_input
from train.checkpoint import CHECKPOINT, METRICS, Run, Settings, mirror, one_line, restore, save, say
from train.data import create_dataloaders
from train.memory import TreeMemory, tree_memory
from train.model import TwoStreamResNet, build, load_imagenet

MIRROR_EVERY = 5  # epochs; a checkpoint holds three copies of the weights, which a mounted Drive takes seconds to write
SHOW_EVERY_S = 1.0  # each refresh of the bar waits for the device and reads /proc


def check(settings: Settings) -> None:
    """Refuse settings that no run can start from."""
    if settings.task != "scene":
        raise UserError(
            f"--task {settings.task}: the command trains scene; other targets: create_dataloaders(target=...)"
        )
    if settings.size != 0 and settings.size < 32:
        raise UserError(f"--size {settings.size}: the network halves it five times. Use 32 or more, or 0 (as stored)")
    for name in ("epochs", "batch_size"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: choose 1 or more")
    if settings.weights and settings.model != "resnet18":
        raise UserError(f"--weights is for --model resnet18; load them inside {settings.model}")


# ---------------------------------------------------------------- pieces


def seed_of(*parts: int) -> int:
    """One 63-bit seed for (seed, epoch, step)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def half_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the GPU has it in hardware (a T4 only emulates it), else float16; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    dtype = half_dtype(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def lr_at(step: int, n_warmup: int, n_steps: int, peak: float) -> float:
    """Linear warmup to `peak`, then a cosine to zero at n_steps."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(n_steps - n_warmup, 1)))


def class_weights(labels_n: np.ndarray, num_classes: int, power: float) -> Tensor:
    """frequency ** -power, scaled to a mean of 1 over the train rows; 0 for a class without train rows."""
    counts = np.bincount(labels_n, minlength=num_classes)
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** -power, 0.0)
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()


def accuracies(confusion_kk: Tensor) -> tuple[float, float]:
    """Top-1, and the mean of the class accuracies over the classes that have rows."""
    counts = confusion_kk.double()
    rows_k = counts.sum(dim=1)
    present = rows_k > 0
    per_class = counts.diagonal()[present] / rows_k[present]
    return float(counts.trace() / counts.sum()), float(per_class.mean())


def baseline(train_labels_n: np.ndarray, test_labels_n: np.ndarray) -> float:
    """Test accuracy of always naming the most frequent train class."""
    return float((test_labels_n == np.bincount(train_labels_n).argmax()).mean())


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; biases and norms (one-dimensional) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


def _load_weights(model: nn.Module, path: str) -> None:
    assert isinstance(model, TwoStreamResNet)
    try:
        load_imagenet(model, torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file. Give a ResNet-18 state_dict saved with torch.save") from None
    except Exception as error:  # a pickle of anything else fails in many ways
        raise UserError(f"--weights {path}: {one_line(error)}. Give a ResNet-18 state_dict (and --width 64)") from error


def _new_run(settings: Settings, device: torch.device) -> Run:
    torch.manual_seed(seed_of(settings.seed))
    width = settings.width or (64 if settings.weights else 32)
    model = build(settings.model, settings.num_classes, width=width)
    if settings.weights:
        _load_weights(model, settings.weights)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler(device.type, enabled=half_dtype(device) == torch.float16)
    confusion = torch.zeros((settings.num_classes,) * 2, dtype=torch.int64)
    return Run(model, _optimizer(model, settings), scaler, [], confusion)


# ---------------------------------------------------------------- one epoch


class Meter:
    """Running sums of an epoch, kept on the device: reading them waits for it, so the bar asks once a second."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device, dtype=torch.float64)  # loss * rows, right answers
        self.rows = 0
        self.started = self.shown = time.perf_counter()
        self.memory = TreeMemory(0, 0)

    def add(self, loss: Tensor, logits_bk: Tensor, labels_b: Tensor) -> None:
        right = (logits_bk.argmax(dim=1) == labels_b).sum()
        self.sums += torch.stack((loss.detach().double() * len(labels_b), right.double()))
        self.rows += len(labels_b)

    def measure(self) -> None:
        """Keep the largest memory seen."""
        now = tree_memory()
        self.memory = TreeMemory(*(max(pair) for pair in zip(self.memory, now, strict=True)))

    def values(self) -> tuple[float, float, float]:
        """Loss, accuracy, samples a second."""
        loss, right = (self.sums / max(self.rows, 1)).tolist()
        return loss, right, self.rows / (time.perf_counter() - self.started)

    def show(self, bar: Any, is_last: bool) -> None:
        """Measure the memory and refresh the bar, at most once a second; the last step is always measured."""
        if time.perf_counter() - self.shown < SHOW_EVERY_S and not is_last:
            return
        self.shown = time.perf_counter()
        self.measure()
        if bar.disable:
            return
        loss, top1, rate = self.values()
        bar.set_postfix_str(f"loss {loss:.3f}, acc {top1:.1%}, {rate:.0f}/s, mem {_gigabytes(self.memory.pss_anon)}")


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def _to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rgb, depth, label = (part.to(device, non_blocking=True) for part in batch)
    return rgb, depth, label


def _forward(model: nn.Module, rgb_bchw: Tensor, depth_b1hw: Tensor, stats: DepthStats) -> Tensor:
    """Pictures as stored or augmented -> float32 logits."""
    rgb, depth = to_input(rgb_bchw, depth_b1hw, stats)
    if rgb.device.type == "cuda":
        rgb = rgb.contiguous(memory_format=torch.channels_last)
    with _autocast(rgb.device):
        logits: Tensor = model(rgb, depth)
    return logits.float()


def _step(run: Run, loss: Tensor, lr: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()


def train_epoch(
    run: Run, loader: Any, settings: Settings, stats: DepthStats, weights_k: Tensor, device: torch.device
) -> dict[str, float]:
    """One pass over the train rows; every draw in it comes from (seed, epoch, step)."""
    epoch, n_batches, lr = run.next_epoch, len(loader), 0.0
    n_warmup = min(settings.warmup_epochs, settings.epochs // 4) * n_batches
    loader.set_epoch(epoch)
    run.model.train()
    meter = Meter(device)
    with tqdm(total=n_batches, desc=f"epoch {epoch + 1}/{settings.epochs}", disable=None, leave=False) as bar:
        for step, batch in enumerate(loader):
            seed = seed_of(settings.seed, epoch, step)
            torch.manual_seed(seed)  # dropout
            rgb, depth, label = _to_device(batch, device)
            rgb, depth = augment(rgb, depth, torch.Generator().manual_seed(seed), settings.size or rgb.shape[-1])
            logits = _forward(run.model, rgb, depth, stats)
            loss = F.cross_entropy(logits, label, weight=weights_k, label_smoothing=settings.label_smoothing)
            lr = lr_at(epoch * n_batches + step, n_warmup, settings.epochs * n_batches, settings.lr)
            _step(run, loss, lr)
            meter.add(loss, logits, label)
            meter.show(bar, step + 1 == n_batches)
            bar.update()
    loss_mean, top1, rate = meter.values()
    if not math.isfinite(loss_mean):
        raise UserError(f"the loss became {loss_mean} in epoch {epoch + 1}. Use a smaller --lr than {settings.lr}")
    memory = {"memory_bytes": meter.memory.pss_anon, "page_cache_bytes": meter.memory.page_cache}
    return {"lr": lr, "train_loss": loss_mean, "train_top1": top1, "samples_per_s": rate, **memory}


@torch.inference_mode()
def evaluate(run: Run, loader: Any, settings: Settings, stats: DepthStats, device: torch.device) -> dict[str, float]:
    """Every test row once; leaves the confusion counts in the run."""
    run.model.eval()
    k = settings.num_classes
    counts_kk = torch.zeros(k * k, dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for batch in loader:
        rgb, depth, label = _to_device(batch, device)
        rgb, depth = resize(rgb, depth, settings.size or rgb.shape[-1])
        logits = _forward(run.model, rgb, depth, stats)
        loss_sum += F.cross_entropy(logits, label, reduction="sum").double()
        counts_kk += torch.bincount(label * k + logits.argmax(dim=1), minlength=k * k)
    run.confusion_kk = counts_kk.view(k, k).cpu()
    top1, mean_class = accuracies(run.confusion_kk)
    n_rows = int(run.confusion_kk.sum())
    return {"test_loss": float(loss_sum) / n_rows, "test_top1": top1, "test_mean_class": mean_class}


# ---------------------------------------------------------------- a run


def _loaders(settings: Settings, directory: Path) -> tuple[Any, Any]:
    train_loader, test_loader = create_dataloaders(
        directory,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,  # type: ignore[arg-type]
        num_classes=settings.num_classes,
        target=settings.task,
        normalize=False,
        seed=settings.seed,
    )
    if len(train_loader) == 0:
        n_rows = len(train_loader.dataset)  # type: ignore[arg-type]
        raise UserError(f"{directory} has {n_rows} train rows, less than one batch. Use --batch-size {max(n_rows, 1)}")
    return train_loader, test_loader


def _epoch_line(row: dict[str, float], epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.3f}  train {row['train_top1']:.1%}  "
        f"test {row['test_top1']:.1%}  mean class {row['test_mean_class']:.1%}  {row['samples_per_s']:.0f} samples/s  "
        f"{row['seconds']:.1f} s  memory {_gigabytes(row['memory_bytes'])}"
    )


def command(settings: Settings, **changes: Any) -> str:
    """The command line of these settings, defaults left out."""
    values = {**asdict(settings), "reset": False, **changes}
    words = ["python", "-m", "train"]
    for field in fields(settings):
        value = values[field.name]
        if value is not None and value is not False and (field.default is MISSING or value != field.default):
            words += ["--" + field.name.replace("_", "-"), str(value)]
    return shlex.join(words)


def _pictures(run: Run, out: Path, names: list[str], base: float) -> list[str]:
    """Draw curves.png and confusion.png; returns their paths, or says what is missing."""
    try:
        from pictures.plots import confusion_png, curves_png

        drawn = {"curves.png": curves_png(run.history, base)}
        drawn["confusion.png"] = confusion_png(run.confusion_kk.numpy(), names)
    except ModuleNotFoundError as error:
        say(f"no curves.png and confusion.png: {error.name} is not installed. Run: pip install -e .[show]")
        return []
    for name, data in drawn.items():
        write_atomically(out / name, lambda file, data=data: void(file.write(data)))  # type: ignore[misc]
    return [str(out / name) for name in drawn]


def _finish(run: Run, settings: Settings, names: list[str], base: float) -> dict[str, Any]:
    """Pictures, summary on standard output, and the same as a dict."""
    out = Path(settings.out)
    files = [str(out / CHECKPOINT), str(out / METRICS), *_pictures(run, out, names, base)]
    mirror(settings, CHECKPOINT, METRICS, "curves.png", "confusion.png")
    last, best = run.history[-1], max(run.history, key=lambda row: row["test_top1"])
    print(f"last  epoch {last['epoch']}: top-1 {last['test_top1']:.1%}, mean class {last['test_mean_class']:.1%}")
    print(f"best  epoch {best['epoch']}: top-1 {best['test_top1']:.1%} (picked on the test rows, so optimistic)")
    print(f"always the most frequent class: top-1 {base:.1%}")
    print("files:", *files)
    print("continue:", command(settings, epochs=2 * len(run.history)), flush=True)
    return {"epochs": len(run.history), "last": last, "best": best, "baseline": base, "files": files}


def train(settings: Settings) -> dict[str, Any]:
    """Train until settings.epochs, continuing what settings.out holds. Raises UserError for a user's mistake."""
    check(settings)
    directory, out, device = resolve_set(settings.data), Path(settings.out), pick_device()
    fingerprint: str = open_set(directory).manifest["fingerprint"]
    out.mkdir(parents=True, exist_ok=True)
    run = _new_run(settings, device)
    restore(run, settings, fingerprint)
    train_loader, test_loader = _loaders(settings, directory)
    train_set, test_set = train_loader.dataset, test_loader.dataset
    stats = DepthStats(train_set.depth_mean, train_set.depth_std)
    weights_k = class_weights(train_set.labels(), settings.num_classes, settings.class_balance).to(device)
    while run.next_epoch < settings.epochs:
        started = time.perf_counter()
        row: dict[str, float] = {"epoch": run.next_epoch + 1}
        row |= train_epoch(run, train_loader, settings, stats, weights_k, device)
        row |= evaluate(run, test_loader, settings, stats, device)
        run.history.append(row | {"seconds": time.perf_counter() - started})
        save(run, settings, fingerprint)
        print(_epoch_line(run.history[-1], settings.epochs), flush=True)
        if run.next_epoch % MIRROR_EVERY == 0:
            mirror(settings, CHECKPOINT, METRICS)
    return _finish(run, settings, list(train_set.classes), baseline(train_set.labels(), test_set.labels()))
