"""A run's state and its checkpoints: written atomically, the newest valid one continued."""

import csv
import errno
import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import one_line
from shards.files import UNFINISHED, log, write_atomically
from shards.lock import hold
from stores.mirror import copy_file
from train import ranks
from train.errors import CannotWrite, OtherNetwork, OtherRun
from train.room import AUTO, shuffle_of
from train.settings import MAY_CHANGE, Settings

CHECKPOINT = "last.pt"
PREVIOUS = "previous.pt"
METRICS = "metrics.csv"
CLASS_TABLE = "classes.csv"  # of a reported run
# Of settings that runs of earlier versions do not have: what trainings did then.
BEFORE = {
    "shuffle": "full",
    "trunk_lr": 1.0,
    "freeze_norms": "never",
    "freeze_maps": 0,
    "logit_adjustment": 0.0,
}
LOCK = ".lock"  # in a run's directory, held while something writes there


@dataclass
class Run:
    """What changes while training: `net` and `layout`, and all that a checkpoint restores."""

    model: nn.Module
    net: nn.Module  # the model, compiled or wrapped for several ranks: what is trained
    layout: torch.memory_format  # of the network and its input
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: Tensor  # float64: loss, its weight, the task's counts; of this rank's steps in this epoch
    counts: Tensor  # float64: the task's counts of the last evaluation
    history: list[dict[str, float]]  # one row a finished epoch, as in metrics.csv
    step: int = 0  # next one in the current epoch

    @property
    def epoch(self) -> int:
        """Finished epochs, and the number of the current one."""
        return len(self.history)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run as it was stored, every byte checked.

    epoch: finished ones; step: the next one in the current epoch. batch: rows of all ranks
    together. settings: by name, as the version that wrote them knew them. learnt: what
    `train.learnt` keeps of the set; None in checkpoints of earlier versions.
    """

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    epoch: int
    step: int
    sums: Tensor
    counts: Tensor
    history: list[dict[str, float]]
    settings: dict[str, Any]
    batch: int
    fingerprint: str
    learnt: dict[str, Any] | None = None

    @property
    def place(self) -> tuple[int, int]:
        """How far the run is; the greater, the farther."""
        return self.epoch, self.step


STORED = tuple(each.name for each in fields(Checkpoint) if each.name not in ("path", "learnt"))


@contextmanager
def only_writer(directory: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a run's directory, which is made if need be.

    doing: "trained" or "written", for the error of a second process. Raises Busy where another
    process holds it, and WrongPlace where the directory cannot be made.
    """
    with hold(directory / LOCK, directory, doing):
        yield


def remove_unfinished(directory: Path) -> None:
    """Checkpoints that were being written when a run was killed; for the directory's writer.

    Not in folders below: of them others are the writers, such as a predict.
    """
    for path in directory.glob(UNFINISHED):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- writing


def write_file(path: Path, write: Callable[[Any], object]) -> None:
    """Write it whole or not at all. Raises CannotWrite that names the file where that fails."""
    try:
        write_atomically(path, write)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if is_full else error.strerror or one_line(error)
        mend = "Make room" if is_full else "Mend that"
        raise CannotWrite(f"{path} cannot be written: {what}", mend, path=path) from error


class _RememberingFile:
    """A file for torch.save, which answers a failed write with errors of its own.

    These ("unexpected pos") do not say that the disk is full: the write's own error is kept.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _torch_save(state: dict[str, Any], file: Any) -> None:
    """Raises the OSError of the write that failed."""
    remembering = _RememberingFile(file)
    try:
        torch.save(state, remembering)  # type: ignore[arg-type]
    except RuntimeError:
        if remembering.error:
            raise remembering.error from None
        raise


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the last row, then those of earlier ones alone: a run may come to score other rows."""
    names = [*rows[-1], *(name for row in rows for name in row)]
    return list(dict.fromkeys(names))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with the columns of its last row. Raises CannotWrite."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=_columns_of(rows), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, lambda file: file.write(text.getvalue().encode()))


def save(run: Run, settings: Settings, fingerprint: str, learnt: dict[str, Any]) -> None:
    """metrics.csv, then last.pt (the one before stays as previous.pt).

    Every rank calls it, the first one writes. fingerprint: of the set; learnt: what else of it is
    kept. Raises CannotWrite.
    """
    sums = ranks.all_reduce_sum(run.sums)
    if ranks.RANK > 0:
        return

    out = Path(settings.out)
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "sums": sums,
        "counts": run.counts,
        "history": run.history,
        "settings": asdict(settings),
        "batch": settings.batch_size * ranks.WORLD,
        "fingerprint": fingerprint,
        "learnt": learnt,
    }
    if run.history:
        write_csv(out / METRICS, run.history)
    if (out / CHECKPOINT).exists():
        os.replace(out / CHECKPOINT, out / PREVIOUS)
    write_file(out / CHECKPOINT, lambda file: _torch_save(state, file))


# ---------------------------------------------------------------- reading


def set_aside(path: Path, error: Exception) -> None:
    """A damaged file; only who holds the run's directory may."""
    # Else the next save would put it in the place of the good one before.
    with suppress(OSError):
        os.replace(path, path.with_suffix(".broken"))
    log(f"{path} is damaged, renamed to .broken and skipped: {one_line(error)}")


def say_skipped(path: Path, error: Exception) -> None:
    """A damaged file, which stays where it is."""
    log(f"{path} is damaged and skipped: {one_line(error)}")


def _say_nothing(path: Path, error: Exception) -> None:
    """A damaged file that is read again soon, and named then."""


def _may_pass(error: Exception) -> bool:
    """Whether it says nothing of the file's content: a full memory, a disk or mount that fails."""
    if isinstance(error, OSError):
        # EINVAL: a place before the start, which a damaged zip names.
        return error.errno not in (None, errno.EINVAL)
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def _read(path: Path, if_damaged: Callable[[Path, Exception], None]) -> Checkpoint | None:
    """The checkpoint in a file; None where there is none, or a damaged one: see `newest`."""
    try:
        # torch stores a checksum of every tensor and does not look at it.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= set(STORED):
            raise ValueError("it is not a checkpoint of this program")
        stored = {name: state[name] for name in STORED}
        return Checkpoint(path=path, learnt=state.get("learnt"), **stored)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # a damaged zip or pickle raises almost anything
        if _may_pass(error):
            raise
        if_damaged(path, error)
        return None


def newest(
    settings: Settings, if_damaged: Callable[[Path, Exception], None] = say_skipped
) -> Checkpoint | None:
    """The newest valid checkpoint: last.pt, else the further of previous.pt and the mirror's.

    if_damaged: `set_aside`, `say_skipped`: what happens to a damaged one. Raises OSError,
    MemoryError and torch's RuntimeError of a full memory where one cannot be read, which may be
    right all the same: an older one is no substitute for it.
    """
    last = _read(Path(settings.out, CHECKPOINT), if_damaged)
    if last is not None:
        return last

    others = [_read(Path(settings.out, PREVIOUS), if_damaged)]
    if settings.mirror:
        others.append(_read(Path(settings.mirror, CHECKPOINT), if_damaged))
    there = [each for each in others if each is not None]
    return max(there, key=lambda each: each.place, default=None)


def shuffle_of_run(settings: Settings) -> str | None:
    """How the rows of the run that is there are shuffled; None where there is no run.

    Raises OtherRun where the settings want them otherwise.
    """
    found = None if settings.reset else newest(settings, _say_nothing)
    if found is None:
        return None
    begun = str((BEFORE | found.settings)["shuffle"])
    if settings.shuffle not in (AUTO, begun, shuffle_of(begun)[0]):
        raise OtherRun(found.path, "shuffle", begun, settings.shuffle)
    return begun


def check_run_there(settings: Settings, fingerprint: str) -> None:
    """Raise OtherRun where these settings do not continue the run that is there."""
    found = None if settings.reset else newest(settings, _say_nothing)
    if found is not None:
        _check_identity(found, settings, fingerprint)


def _identity(settings: dict[str, Any], batch: int, fingerprint: str) -> dict[str, Any]:
    """What must not change when a run is continued, by setting: see OtherRun."""
    all_settings = BEFORE | settings
    kept = {name: value for name, value in all_settings.items() if name not in MAY_CHANGE}
    return {"data": fingerprint[:8], "batch_size": batch, **kept}


def _check_identity(checkpoint: Checkpoint, settings: Settings, fingerprint: str) -> None:
    """Raise OtherRun, with both values, where the checkpoint is of a run with other settings."""
    stored = _identity(checkpoint.settings, checkpoint.batch, checkpoint.fingerprint)
    given = _identity(asdict(settings), settings.batch_size * ranks.WORLD, fingerprint)
    for name in given | stored:
        before = stored.get(name)
        now = given.get(name)
        if before != now:
            raise OtherRun(checkpoint.path, name, before, now)


def restore(run: Run, settings: Settings, fingerprint: str) -> bool:
    """Continue from the newest valid checkpoint; False where there is none.

    Every rank gets what the first one read. Raises OtherRun for a checkpoint of other settings.
    """
    last = Path(settings.out, CHECKPOINT)
    if settings.reset:
        if ranks.RANK == 0:
            for name in (CHECKPOINT, PREVIOUS, CLASS_TABLE):  # it is no reported run any more
                last.with_name(name).unlink(missing_ok=True)
        return False

    found: Checkpoint | None = ranks.broadcast_from_first(lambda: newest(settings, set_aside))
    if found is None:
        return False
    _check_identity(found, settings, fingerprint)
    _load(run, found)

    if ranks.RANK == 0:
        if found.path != last:
            copy_file(found.path, last)
        if run.epoch < settings.epochs:
            at = f"epoch {run.epoch + 1} of {settings.epochs}, step {run.step + 1}"
            log(f"continuing from {found.path} at {at}")
        else:
            log(f"{found.path}: all {run.epoch} epochs are done; what is reported is made again")
    return True


def _load(run: Run, checkpoint: Checkpoint) -> None:
    """Put what is stored into the run. Raises OtherNetwork where the network is another.

    The sums of the epoch so far go on in the first rank.
    """
    try:
        run.model.load_state_dict(checkpoint.model)
        run.optimizer.load_state_dict(checkpoint.optimizer)
    except (RuntimeError, ValueError) as error:
        model = checkpoint.settings["model"]
        raise OtherNetwork(checkpoint.path, model, one_line(error)) from error
    if checkpoint.scaler:  # a CPU's run has none
        run.scaler.load_state_dict(checkpoint.scaler)

    is_first = ranks.RANK == 0
    run.sums.copy_(checkpoint.sums * is_first)
    run.counts = checkpoint.counts
    run.history = checkpoint.history
    run.step = checkpoint.step
