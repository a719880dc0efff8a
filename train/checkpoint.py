"""A run's state and its checkpoints: written atomically, the newest valid one continued."""

import csv
import errno
import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.format import UserError, log, one_line, write_atomically
from stores.mounted import copy_file
from train import ranks
from train.settings import MAY_CHANGE, Settings

CHECKPOINT, PREVIOUS, METRICS = "last.pt", "previous.pt", "metrics.csv"
LOCK = ".lock"  # in a run's directory, held while something writes there
PARTS = ("model", "optimizer", "scaler")  # of a Run, stored as their state_dict


@dataclass
class Run:
    """What changes while training, and all that a checkpoint restores."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: Tensor  # float64: loss, its weight, the task's counts; of this rank's steps in this epoch
    counts: Tensor  # float64: the task's counts of the last evaluation
    history: list[dict[str, float]]  # one row a finished epoch
    step: int = 0  # next one in the current epoch

    @property
    def epoch(self) -> int:
        """Finished epochs, and the number of the current one."""
        return len(self.history)


def write_file(path: Path, write: Callable[[Any], object]) -> None:
    """Write it whole or not at all. Raises UserError that names the file where that fails."""
    try:
        write_atomically(path, write)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else error.strerror or one_line(error)
        hint = "Make room" if full else "Mend that"
        raise UserError(f"{path} cannot be written: {what}. {hint}, then run the same command again") from error


class _Remembering:
    """A file for torch.save, which answers a failed write with errors of its own ("unexpected pos")."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)  # type: ignore[no-any-return]
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _torch_save(state: dict[str, Any], file: Any) -> None:
    """Raises the OSError of the write that failed."""
    remembering = _Remembering(file)
    try:
        torch.save(state, remembering)  # type: ignore[arg-type]
    except RuntimeError:
        if remembering.error:
            raise remembering.error from None
        raise


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[-1]))
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, lambda file: file.write(text.getvalue().encode()))


def save(run: Run, settings: Settings, fingerprint: str) -> None:
    """metrics.csv, then last.pt (the one before stays as previous.pt). Every rank calls it, the first one writes."""
    sums, out = ranks.total(run.sums), Path(settings.out)
    if ranks.RANK:
        return
    state: dict[str, Any] = {name: getattr(run, name).state_dict() for name in PARTS}
    state |= {"epoch": run.epoch, "step": run.step, "sums": sums, "counts": run.counts, "history": run.history}
    state |= {"settings": asdict(settings), "batch": settings.batch_size * ranks.WORLD, "fingerprint": fingerprint}
    if run.history:
        write_csv(out / METRICS, run.history)
    if (out / CHECKPOINT).exists():
        os.replace(out / CHECKPOINT, out / PREVIOUS)
    write_file(out / CHECKPOINT, lambda file: _torch_save(state, file))


def _read(path: Path) -> dict[str, Any] | None:
    """The stored state, every byte checked; a file that cannot be read is named, set aside and skipped."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch stores a checksum of every tensor and does not look at it
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "fingerprint" not in state:
            raise ValueError("it is not a checkpoint of this program")
        return state
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged zip or pickle raises almost anything
        with suppress(OSError):  # else the next save would put it in the place of the good one before
            os.replace(path, path.with_suffix(".broken"))
        log(f"{path} is damaged, renamed to .broken and skipped: {one_line(error)}")
        return None


def newest(settings: Settings) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint: last.pt, else the further one of previous.pt and --mirror's."""
    last, *others = (Path(settings.out, name) for name in (CHECKPOINT, PREVIOUS))
    if state := _read(last):
        return last, state
    others += [Path(settings.mirror, CHECKPOINT)] if settings.mirror else []
    found = [(path, state) for path in others if (state := _read(path))]
    return max(found, key=lambda each: (each[1]["epoch"], each[1]["step"]), default=None)


def _identity(settings: dict[str, Any], batch: int, fingerprint: str) -> dict[str, Any]:
    """What must not change when a run is continued, by flag."""
    kept = {"--" + name.replace("_", "-"): value for name, value in settings.items() if name not in MAY_CHANGE}
    return {"--data with shards": fingerprint[:8], "--batch-size times ranks": batch, **kept}


def restore(run: Run, settings: Settings, fingerprint: str) -> bool:
    """Continue from the newest valid checkpoint, if there is one; every rank gets what the first one read."""
    last, previous = (Path(settings.out, name) for name in (CHECKPOINT, PREVIOUS))
    if settings.reset and ranks.RANK == 0:
        for path in (last, previous):
            path.unlink(missing_ok=True)
    found = None if settings.reset else ranks.first(lambda: newest(settings))
    if found is None:
        return False
    path, state = found
    stored = _identity(state["settings"], state["batch"], state["fingerprint"])
    own = _identity(asdict(settings), settings.batch_size * ranks.WORLD, fingerprint)
    for flag in own | stored:
        if (before := stored.get(flag)) != (value := own.get(flag)):
            hint = f"Use {f'{flag} {before}' if before is not None else f'no {flag}'}, another --out, or --reset"
            raise UserError(f"{path} was trained with {flag} {before}, this run has {flag} {value}. {hint}")
    _load(run, state, path)
    if ranks.RANK == 0:
        if path != last:
            copy_file(path, last)
        log(f"continuing from {path} at epoch {run.epoch + 1} of {settings.epochs}, step {run.step + 1}")
    return True


def _load(run: Run, state: dict[str, Any], path: Path) -> None:
    """Put a stored state into the run; the sums of the epoch so far go on in the first rank."""
    try:
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        model = state["settings"]["model"]
        raise UserError(f"{path} does not fit --model {model}: {one_line(error)}. Use --reset") from error
    run.scaler.load_state_dict(state["scaler"] or run.scaler.state_dict())  # a CPU's run has none
    run.sums.copy_(state["sums"] * (ranks.RANK == 0))
    run.counts, run.history, run.step = state["counts"], state["history"], state["step"]
