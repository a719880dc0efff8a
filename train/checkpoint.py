"""A run's settings and state, and its checkpoints: written atomically, the newest valid one continued."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convert.format import UserError, void, write_atomically

CHECKPOINT, PREVIOUS, METRICS = "last.pt", "previous.pt", "metrics.csv"
NOT_COMPARED = {"data", "out", "epochs", "num_workers", "reset", "mirror"}  # may change between resumed runs


@dataclass(frozen=True)
class Settings:
    """What a run is made from; the command's flags, and stored in its checkpoint."""

    data: str
    out: str
    task: str = "scene"
    num_classes: int = 13
    epochs: int = 90
    batch_size: int = 128
    num_workers: int | str = "auto"
    model: str = "resnet18"
    width: int = 0  # 0: 64 with weights, else 32
    size: int = 128  # training resolution; 0: as stored
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 5  # at most a quarter of the epochs
    label_smoothing: float = 0.1
    class_balance: float = 0.0  # loss weight = frequency ** -class_balance; 0: none, 1: fully balanced
    seed: int = 0
    weights: str | None = None
    mirror: str | None = None
    reset: bool = False


@dataclass
class Run:
    """What changes while training, and all that a checkpoint restores."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[dict[str, float]]
    confusion_kk: Tensor  # int64 [true, named], of the last epoch

    @property
    def next_epoch(self) -> int:
        """Finished epochs: the history has one row each."""
        return len(self.history)


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def save(run: Run, settings: Settings, fingerprint: str) -> None:
    """metrics.csv, then last.pt (the one before stays as previous.pt)."""
    out = Path(settings.out)
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.next_epoch,
        "history": run.history,
        "confusion": run.confusion_kk,
        "settings": asdict(settings),
        "fingerprint": fingerprint,
    }
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(run.history[-1]))
    writer.writeheader()
    writer.writerows(run.history)
    write_atomically(out / METRICS, lambda file: void(file.write(text.getvalue().encode())))
    if (out / CHECKPOINT).exists():
        os.replace(out / CHECKPOINT, out / PREVIOUS)
    write_atomically(out / CHECKPOINT, lambda file: torch.save(state, file))  # type: ignore[arg-type]


def mirror(settings: Settings, *names: str) -> None:
    """Copy files of the run to --mirror; a failing Drive is announced and does not stop the training."""
    if settings.mirror is None:
        return
    target = Path(settings.mirror)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            source = Path(settings.out) / name
            if source.exists():
                _copy(source, target / name)
    except OSError as error:
        say(f"--mirror {target}: {error}; training goes on, the run is whole in {settings.out}")


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))


def _fetch_mirror(settings: Settings) -> None:
    """A new session starts with an empty disk: take the run back from --mirror."""
    if settings.mirror is None or (Path(settings.out) / CHECKPOINT).exists():
        return
    source = Path(settings.mirror) / CHECKPOINT
    if source.exists():
        _copy(source, Path(settings.out) / CHECKPOINT)
        say(f"took {source} back")


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The stored state; a file that cannot be read is named, set aside and skipped."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and {"model", "optimizer", "epoch", "settings", "fingerprint"} <= state.keys():
            return state
        reason = "it is not a checkpoint of this program"
    except FileNotFoundError:
        return None
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError and others here
        reason = one_line(error)
    os.replace(path, path.with_suffix(".broken"))
    say(f"{path} is damaged, kept as {path.with_suffix('.broken').name} and skipped: {reason}")
    return None


def _refuse_other(state: dict[str, Any], settings: Settings, fingerprint: str, path: Path) -> None:
    """A checkpoint of another set or other settings is never continued."""
    if state["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} was trained on shards {state['fingerprint'][:8]}, this directory is {fingerprint[:8]}. "
            "Use --data with that set, another --out, or --reset"
        )
    for name, value in asdict(settings).items():
        stored = state["settings"].get(name)
        if name not in NOT_COMPARED and stored != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{path} was trained with {flag} {stored}, this run has {flag} {value}. "
                f"Use {flag} {stored}, another --out, or --reset"
            )


def restore(run: Run, settings: Settings, fingerprint: str) -> None:
    """Continue from last.pt, else from previous.pt, else from the start."""
    out = Path(settings.out)
    if settings.reset:
        for name in (CHECKPOINT, PREVIOUS):
            (out / name).unlink(missing_ok=True)
        return
    _fetch_mirror(settings)
    for path in (out / CHECKPOINT, out / PREVIOUS):
        state = _read_checkpoint(path)
        if state is None:
            continue
        _refuse_other(state, settings, fingerprint, path)
        try:
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} does not fit --model {settings.model}: {one_line(error)} Use --reset") from error
        run.scaler.load_state_dict(state["scaler"])
        run.history, run.confusion_kk = state["history"], state["confusion"]
        say(f"continuing from {path} at epoch {run.next_epoch + 1} of {settings.epochs}")
        return
