"""Runs with the weights of their newest checkpoints, asked as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.dataset import ShardSet
from shards.errors import MissingSet, UserError, one_line
from train.any_set import asked_setup
from train.checkpoint import Checkpoint, Run, newest
from train.errors import NoCheckpoint, WrongCheckpoint
from train.inputs import Batch
from train.job import NetworkSetup, make_setup, network_setup, new_run, open_set_of
from train.learnt import Learnt
from train.loop import predict_batch
from train.opening import is_elsewhere, open_for_training
from train.settings import Settings

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run with the weights of its newest checkpoint, on the CPU."""

    directory: str
    fingerprint: str  # of the set that it learnt from
    setup: NetworkSetup
    run: Run


def newest_of(directory: str) -> Checkpoint:
    """Raises NoCheckpoint."""
    found = newest(Settings("", directory))
    if found is None:
        what = "has no checkpoint" if Path(directory).is_dir() else "does not exist"
        raise NoCheckpoint(f"{directory} {what}", run=directory)
    return found


def settings_of(found: Checkpoint, directory: str) -> Settings:
    """Of a run that lies in `directory`, wherever it was trained.

    Raises UserError where a later version wrote them.
    """
    known = {field.name for field in fields(Settings)}
    unknown = [name for name in found.settings if name not in known]
    if unknown:
        what = f"{found.path} has settings that this version does not know"
        raise UserError(f"{what} ({', '.join(unknown)})", "Use the version that trained it")
    return Settings(**{**found.settings, "out": directory})


def open_asked(data: str, checkpoint: Checkpoint) -> ShardSet:
    """The set that a run is asked about, read as the run read its own."""
    settings = checkpoint.settings
    allow_remote = bool(settings.get("allow_remote"))
    cache_dir = settings.get("cache_dir") if is_elsewhere(data) else None
    return open_for_training(data, allow_remote=allow_remote, cache_dir=cache_dir)


def is_own_set(checkpoint: Checkpoint, given: ShardSet | None) -> bool:
    """Whether a set is the one that the run learnt from; None stands for that."""
    return given is None or given.manifest.fingerprint == checkpoint.fingerprint


def load_runs(
    run: Sequence[str], checkpoints: Sequence[Checkpoint], given: ShardSet | None
) -> list[LoadedRun]:
    """Raises UserError for runs that cannot answer together, and as `load_run` does."""
    opened: dict[str | tuple[str, ...], ShardSet] = {}
    pairs = zip(run, checkpoints, strict=True)
    loaded = [load_run(directory, found, given, opened) for directory, found in pairs]
    for each in loaded[1:]:
        _check_alike(loaded[0], each)
    return loaded


def load_run(
    directory: str,
    found: Checkpoint,
    given: ShardSet | None,
    opened: dict[str | tuple[str, ...], ShardSet],
) -> LoadedRun:
    """The run of a checkpoint; says how far it is.

    given: the set to be asked about, or None for the run's own. opened: sets by their place, to
    which its own is added: runs of one set open it once. Raises WrongCheckpoint, and UserError
    where its own set is needed and absent.
    """
    settings = settings_of(found, directory)
    try:
        setup = _setup_of(settings, found, given, opened)
        run = new_run(setup)
        run.model.load_state_dict(found.model)
        run.model.eval()
    except (TypeError, KeyError, RuntimeError) as error:
        what = f"{found.path} is of another version or network ({one_line(error)})"
        raise WrongCheckpoint(what, run=directory, path=found.path) from None
    print(f"{found.path}: {found.epoch} epochs")
    return LoadedRun(directory=directory, fingerprint=found.fingerprint, setup=setup, run=run)


def _setup_of(
    settings: Settings,
    found: Checkpoint,
    given: ShardSet | None,
    opened: dict[str | tuple[str, ...], ShardSet],
) -> NetworkSetup:
    """With its own set where that is given or needed; else what the checkpoint keeps of it."""
    if given is not None and is_own_set(found, given):
        return make_setup(replace(settings, data=str(given.path)), CPU, given)
    if given is not None and found.learnt is not None:
        return network_setup(settings, Learnt.from_plain(found.learnt), CPU)

    own = opened.get(settings.data) or own_set(settings, found, is_asked_about=given is None)
    opened[settings.data] = own
    return make_setup(settings, CPU, own)


def own_set(settings: Settings, found: Checkpoint, *, is_asked_about: bool) -> ShardSet:
    """The set that the run learnt from, where it was. Raises UserError where it is not there."""
    try:
        own = open_set_of(settings)
    except MissingSet as error:
        if is_asked_about:
            what = f"is where {found.path} had its set"
            raise MissingSet(settings.data, what, "Say where that is now") from None
        # Checkpoints of earlier versions keep nothing of the set.
        what = f"{found.path} does not say what its classes are, and its own set is gone"
        raise UserError(f"{what}: {error.problem}", "Put it there again") from None
    if not is_own_set(found, own):
        what = f"{found.path} was trained on shards {found.fingerprint[:8]}"
        now = f"{settings.data} holds {own.manifest.fingerprint[:8]} now"
        raise MissingSet(own.path, f": {what}, {now}", "Say which set is meant")
    return own


def _check_alike(one: LoadedRun, other: LoadedRun) -> None:
    """Raise UserError for runs that cannot answer together, with what differs."""
    pairs = zip(_what_is_learnt(one).items(), _what_is_learnt(other).values(), strict=True)
    for (what, ours), theirs in pairs:
        if ours != theirs:
            differs = f"{one.directory} has {ours}, {other.directory} {theirs}"
            problem = f"runs of another {what} do not answer together: {differs}"
            raise UserError(problem, "Name runs that learn the same")


def _what_is_learnt(loaded: LoadedRun) -> dict[str, Any]:
    """What runs must have in common to answer together."""
    settings = loaded.setup.settings
    return {
        "task": settings.task,
        "number of classes": settings.num_classes,
        "choice of further fields": ",".join(settings.further_fields) or "none",
        "set": loaded.fingerprint[:8],
    }


class Together:
    """Runs as one, whatever each of their networks sees: the mean of their outputs, by `shares`.

    run, setup: of the one that is handed the most of each row.
    """

    def __init__(self, members: list[LoadedRun], shares: Sequence[float]) -> None:
        self._members = members
        self._shares = [share / sum(shares) for share in shares]
        reader = max(members, key=lambda each: (each.setup.sees_depth, each.setup.sees_surfaces))
        self.run = reader.run
        self.setup = reader.setup

    def about_any_set(self) -> Together:
        """The same, to be asked about rows of another set."""
        members = [replace(each, setup=asked_setup(each.setup)) for each in self._members]
        return Together(members, self._shares)

    def ask(
        self,
        batch: Batch,
        *,
        test_time_augmentation: bool = True,
        done: Callable[[float], object] | None = None,
    ) -> tuple[Tensor, Batch]:
        """As `predict_batch`. batch: `setup.batch_fields` and the target."""
        stored = dict(zip(self.setup.batch_fields, batch, strict=False))
        mean: Tensor | None = None
        for member, share in zip(self._members, self._shares, strict=True):
            own = [stored[name] for name in member.setup.batch_fields]
            out, seen = predict_batch(
                member.run,
                member.setup,
                (*own, batch[-1]),
                test_time_augmentation=test_time_augmentation,
                done=None if done is None else lambda rows: done(rows / len(self._members)),
            )
            mean = share * out if mean is None else mean + share * out
        assert mean is not None
        return mean, seen
