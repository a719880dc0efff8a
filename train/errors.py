"""What ends a training or a prediction, as a small tree below `shards.errors.UserError`.

    WrongSetting            name, given, choices    of shards.errors; a field of Settings, say
    WrongNetwork            model                   it cannot be made, or is no answer
    WrongWeights            weights                 they cannot be read, or do not fit
    NoCheckpoint            run                     there is no run to predict with
    WrongCheckpoint         run, path               made by another version, or by another network
    OtherRun                path, name, stored, given   the run that is there has other settings
      OtherNetwork          path, stored            ... or another network of the same name
    NothingToLearn          path                    no row that this task could use
      NoKnownPixel          path, known             ... or no pixel
    BatchTooSmall           n_rows, size            for the network's BatchNorm
    Diverged                epoch, lr               the loss is not a number any more
    OtherSize               path, size, wanted      of pictures: another than the run learnt from
    MissingDepth            path                    of a set, for a network that needs it
    NeedsSet                images, run, size, fields    a folder of pictures is given, no set
    CannotWrite             path                    a full disk, or no permission
    CacheTooSmall           needed_bytes, limit_bytes    for what has to be there at the same time
    CacheHasNoRoom          root, needed_bytes, has_bytes    its disk is full
    CannotUnpack            path, root              a compressed set, for training

Settings are called as in Python; the command line has the same texts told with its flags.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.errors import Naming, UserError, WrongPlace, as_argument
from shards.progress import megabytes


class WrongNetwork(UserError):
    """A network that cannot be made from its name, or that does not answer as the task needs.

    what: of the network `model`, as "returned int" or ": KeyError".
    """

    def __init__(self, model: str, what: str, right: str = "") -> None:
        self.model = model
        self.what = what
        self.right = right
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """The network, and what is wrong with it."""
        what = self.what if self.what.startswith(":") else f" {self.what}"
        return f"{naming('model', self.model)}{what}", self.right


class WrongWeights(UserError):
    """Weights to start from that cannot be read, or do not fit the network.

    network: as the setting `model` names it. advice: what would be right, where that is not simply
    other weights.
    """

    def __init__(
        self, weights: str, what: str, network: str = "resnet18", advice: str = ""
    ) -> None:
        self.weights = weights
        self.what = what
        self.network = network
        self.advice = advice
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """Which they are, and which would fit."""
        standard = f"weights of {self.network}"
        kept = naming("model")
        if self.network == "resnet18":
            standard = f"a ResNet-18 (and {naming('width', 64)})"
            kept = naming("width")
        run = f"a run with this one's {kept} and {naming('inputs')}"
        advice = self.advice or f"Give {standard}, or {run}"
        return f"{naming('weights', self.weights)}: {self.what}", advice


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


# What is compared of settings whose own values may change.
COMPARED = {"data": "with shards", "batch_size": "times ranks"}


class OtherRun(UserError):
    """The run that would be continued has another value of a setting that must not change.

    path: its checkpoint. name: of the setting, with its value there and now. Of `data` these are
    fingerprints, of `batch_size` the rows of all ranks together.
    """

    def __init__(self, path: Path, name: str, stored: Any, given: Any) -> None:
        self.path = path
        self.name = name
        self.stored = stored
        self.given = given
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """Both values, and the three ways on."""
        stored = self._called(naming, self.stored)
        what = f"{self.path} was trained with {stored}, this run has"
        others = f"another {naming('out')}, or {naming('reset', True)}"
        return f"{what} {self._called(naming, self.given)}", f"Use {stored}, {others}"

    def _called(self, naming: Naming, value: Any) -> str:
        if self.name in COMPARED:
            return f"{naming(self.name)} {COMPARED[self.name]} {value}"
        return naming(self.name, value)


class OtherNetwork(OtherRun):
    """The run that would be continued has another network of the same name."""

    def __init__(self, path: Path, model: str, what: str) -> None:
        self.what = what
        super().__init__(path, "model", model, model)

    def words(self, naming: Naming) -> tuple[str, str]:
        """What does not fit."""
        what = f"{self.path} does not fit {naming('model', self.stored)}: {self.what}"
        return what, f"Use {naming('reset', True)}"


class NothingToLearn(UserError):
    """The set has nothing from which this task could be learnt."""

    def __init__(self, problem: str, right: str = "", *, path: Path | str | None = None) -> None:
        super().__init__(problem, right)
        self.path = path


class NoKnownPixel(NothingToLearn):
    """No pixel of the train rows is `known`: measured, or labelled."""

    def __init__(self, path: Path | str, known: str) -> None:
        self.path = path
        self.known = known
        super().__init__(*self.words(as_argument), path=path)

    def words(self, naming: Naming) -> tuple[str, str]:
        """What another task could know."""
        what = f"no pixel of the train rows is {self.known}: nothing to learn"
        return f"{self.path}: {what}", f"Use another {naming('task')}"


class BatchTooSmall(UserError):
    """A channel has a single value in a whole batch: BatchNorm has nothing to normalise by."""

    def __init__(self, n_rows: int, size: int, why: str) -> None:
        self.n_rows = n_rows
        self.size = size
        self.why = why
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """What there is, and of which there should be more."""
        batch = f"a batch of {self.n_rows} at {self.size} px"
        what = f"{batch} is too little for BatchNorm ({self.why})"
        return what, f"Use a larger {naming('batch_size')} or {naming('size')}"


class Diverged(UserError):
    """The loss became infinite or not a number. epoch: the first is 1."""

    def __init__(self, epoch: int, lr: float) -> None:
        self.epoch = epoch
        self.lr = lr
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """When, and at which rate."""
        what = f"the loss became nan in epoch {self.epoch}"
        return what, f"Use a smaller {naming('lr')} than {self.lr}"


class OtherSize(UserError):
    """The pictures of a set are of another size than those that a run learnt from."""

    def __init__(self, path: Path, size: int, wanted: int) -> None:
        self.path = path
        self.size = size
        self.wanted = wanted
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """Both sizes, and what to convert with."""
        here = f"{self.path} has pictures of {self.size}x{self.size}"
        what = f"{here}, the run learnt from {self.wanted}x{self.wanted}"
        return what, f"Convert its source with {naming('size', self.wanted)}"


class MissingDepth(UserError):
    """A set without the depth that the network needs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """Which network does without."""
        without = naming("inputs", "rgb")
        return (
            f"{self.path} has no depth: the network needs it",
            f"Convert a source that has it, or train with {without}",
        )


class NeedsSet(UserError):
    """A folder of pictures, where runs are asked about a set.

    images: the folder. runs: the runs. size: of the pictures that they learnt from. fields: what a
    set of the folder has to have; None: all that is there.
    """

    def __init__(self, images: str, runs: Sequence[str], size: int, fields: str | None) -> None:
        verb = "is" if len(runs) == 1 else "are"
        what = f"{images} is a folder of pictures: a set is made of it first"
        super().__init__(f"{what}, then {' and '.join(runs)} {verb} asked")
        self.images = images
        self.runs = tuple(runs)
        self.size = size
        self.fields = fields


class CannotWrite(UserError):
    """A file of the run cannot be written."""

    def __init__(self, problem: str, right: str = "", *, path: Path | None = None) -> None:
        super().__init__(problem, right)
        self.path = path


class CannotUnpack(WrongPlace):
    """A compressed set cannot be unpacked into `root`."""

    def __init__(self, path: Path, root: Path) -> None:
        what = f"could not be unpacked into {root}"
        super().__init__(path, what, "What `shards.copy` said of it is on standard error")
        self.root = root


class CacheTooSmall(UserError):
    """The cache's limit is less than what has to be there at the same time.

    what: which shards these are, and their sum.
    """

    def __init__(self, what: str, needed_bytes: int, limit_bytes: int) -> None:
        self.what = what
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """The sum, and a limit that would do."""
        limit_gb = self.limit_bytes / 10**9
        needed_gb = math.ceil(self.needed_bytes / 10**6) / 1000
        problem = f"{naming('cache_limit_gb', float(f'{limit_gb:.3g}'))} is too small: {self.what}"
        return problem, f"Choose {naming('cache_limit_gb', needed_gb)} or more"


class CacheHasNoRoom(UserError):
    """The disk of the cache does not hold what will be kept there."""

    def __init__(self, root: Path, needed_bytes: int, has_bytes: int) -> None:
        self.root = root
        self.needed_bytes = needed_bytes
        self.has_bytes = has_bytes
        super().__init__(*self.words(as_argument))

    def words(self, naming: Naming) -> tuple[str, str]:
        """Both sizes."""
        has = megabytes(self.has_bytes)
        problem = f"{self.root} is to hold {megabytes(self.needed_bytes)}, and has room for {has}"
        right = f"Free space there, or choose a smaller {naming('cache_limit_gb')}"
        return problem, f"{right}, or another {naming('cache_dir')}"
