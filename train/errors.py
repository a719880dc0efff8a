"""What ends a training or a prediction, as a small tree below `shards.errors.UserError`.

    WrongSetting            name, given, choices    of shards.errors; a flag, or a field of Settings
    WrongNetwork            model                   --model: it cannot be made, or is no answer
    WrongWeights            weights                 --weights: cannot be read, or do not fit
    NoCheckpoint            run                     there is no run to predict with
    WrongCheckpoint         run, path               made by another version, or by another network
    OtherRun                path, flag, stored, given   the run that is there has other settings
    NothingToLearn          path                    no row, or no pixel, that this task could use
    BatchTooSmall           n_rows, size            for the network's BatchNorm
    Diverged                epoch, lr               the loss is not a number any more
    CannotWrite             path                    a full disk, or no permission

The facts are keywords with defaults, so that every error can be pickled: ranks hand theirs on.
"""

from pathlib import Path
from typing import Any

from shards.errors import UserError


class WrongNetwork(UserError):
    """A network that cannot be made from its name, or that does not answer as the task needs."""

    def __init__(self, problem: str, right: str = "", *, model: str = "") -> None:
        super().__init__(problem, right)
        self.model = model


class WrongWeights(UserError):
    """Weights to start from that cannot be read, or do not fit the network."""

    def __init__(self, problem: str, right: str = "", *, weights: str = "") -> None:
        super().__init__(problem, right)
        self.weights = weights


class NoCheckpoint(UserError):
    """The directory holds no checkpoint."""

    def __init__(self, problem: str, right: str = "", *, run: str = "") -> None:
        super().__init__(problem, right)
        self.run = run


class WrongCheckpoint(UserError):
    """A checkpoint that this version cannot use, or that was made from another network."""

    def __init__(
        self, problem: str, right: str = "", *, run: str = "", path: Path | None = None
    ) -> None:
        super().__init__(problem, right)
        self.run = run
        self.path = path


class OtherRun(UserError):
    """The run that would be continued has another value of a setting that must not change."""

    def __init__(
        self,
        problem: str,
        right: str = "",
        *,
        path: Path | None = None,
        flag: str = "",
        stored: Any = None,
        given: Any = None,
    ) -> None:
        super().__init__(problem, right)
        self.path = path
        self.flag = flag
        self.stored = stored
        self.given = given


class NothingToLearn(UserError):
    """The set has nothing from which this task could be learnt."""

    def __init__(self, problem: str, right: str = "", *, path: Path | None = None) -> None:
        super().__init__(problem, right)
        self.path = path


class BatchTooSmall(UserError):
    """A channel has a single value in a whole batch: BatchNorm has nothing to normalise by."""

    def __init__(self, problem: str, right: str = "", *, n_rows: int = 0, size: int = 0) -> None:
        super().__init__(problem, right)
        self.n_rows = n_rows
        self.size = size


class Diverged(UserError):
    """The loss became infinite or not a number."""

    def __init__(self, problem: str, right: str = "", *, epoch: int = 0, lr: float = 0.0) -> None:
        super().__init__(problem, right)
        self.epoch = epoch
        self.lr = lr


class CannotWrite(UserError):
    """A file of the run cannot be written."""

    def __init__(self, problem: str, right: str = "", *, path: Path | None = None) -> None:
        super().__init__(problem, right)
        self.path = path
