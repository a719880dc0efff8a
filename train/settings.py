"""A run's settings: each field is a flag of the command, and is stored in the run's checkpoints."""

import os
import re
from argparse import ArgumentParser
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from shards.errors import NeedsSetting, WrongSetting
from shards.flags import flag_of
from shards.spec import NAME
from train.room import shuffle_named

# May change when a run is continued; batch_size is compared as the batch of all ranks together.
MAY_CHANGE = {
    "data", "out", "allow_remote", "cache_dir", "cache_limit_gb", "epochs", "num_workers", "reset",
    "mirror", "save_minutes", "compile", "batch_size", "eval_split",
}  # fmt: skip
PATHS = {"data", "out", "mirror", "weights", "cache_dir"}  # in which ~ is the user's home
TASK = re.compile(r"scene|depth|semantic([1-9]\d{0,4})?")
RGBD = "rgbd"  # stands for its two fields
BUILT_IN = ("resnet18", "lite0")  # networks that need no name of a callable
TIMM = "timm:"  # in front of the name of one of timm's


def _flag(default: Any, help: str, **more: Any) -> Any:
    """A field; `more` is for argparse."""
    return field(default=default, metadata={"argparse": {"help": help, **more}})


def _number(default: Any, help: str, low: float, high: float, also: Any = None, **more: Any) -> Any:
    """A field from `low` to `high`, or `also`; --help shows the range."""
    highest = str(high) if isinstance(high, int) else f"{high:g}"
    values = f"{low:g} to {highest}"
    if also is not None:
        values += f", or {also}"
    metadata = {
        "argparse": {"help": f"{help} ({values})", **more},
        "bounds": (low, high),
        "also": also,
        "values": values,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """What a run is made from: the same from the command line and from Python.

    Raises WrongSetting for a value that no run can start from.
    """

    data: str | tuple[str, ...] = _flag(
        MISSING,
        "a converted set, or a directory that holds exactly one; given again: several sets of one "
        "size, trained on as one",
        metavar="DIR|ROOT",
        action="append",
    )
    out: str = _flag(
        MISSING, "directory of this run; a run found there is continued", metavar="RUN"
    )
    task: str = _flag(
        "scene",
        "what to learn: scene, depth, semantic (every class of the pixels), or semanticN, such as "
        "semantic40 of NYU",
        metavar="TASK",
    )
    num_classes: int | None = _number(
        None,
        "how many scene classes, of those groupings that the dataset has; default its own",
        1,
        10_000,
        type=int,
    )
    eval_split: str = _flag(
        "auto",
        "rows to score on after each epoch (auto: val where the set has such rows, else test)",
        choices=["auto", "val", "test"],
    )
    inputs: str = _flag(
        "rgbd",
        "what the network sees: names of fields parted by commas, such as rgb,depth,thermal; rgbd "
        "stands for rgb,depth (depth is learnt from the others)",
        metavar="FIELD,FIELD,...",
    )
    # The network halves it five times.
    size: int = _number(128, "training resolution, 0 = as stored", 32, 1024, also=0)
    epochs: int = _number(90, "passes over the train rows", 1, 1_000_000)
    batch_size: int = _number(128, "rows of a step, in each process", 1, 100_000)
    num_workers: int | str = _number(
        "auto", "processes that make the batches", 0, 64, also="auto", metavar="N|auto"
    )
    model: str = _flag(
        "resnet18",
        "the network: resnet18, lite0 (EfficientNet-Lite0), timm:NAME, or "
        "package.module:callable, which is given the number of outputs",
        metavar="NAME",
    )
    width: int = _number(
        0,
        "channels of the first layer of resnet18, 0 = 64 with --weights, else 32",
        1,
        512,
        also=0,
    )
    weights: str | None = _flag(
        None,
        "start from the network's ImageNet weights, or from another run",
        metavar="imagenet|PATH|RUN",
    )
    lr: float = _number(1e-3, "peak learning rate", 1e-10, 100)
    trunk_lr: float = _number(
        1.0, "that of a built-in network without its head, as a share of --lr", 0, 1
    )
    freeze_norms: int | str = _number(
        "never",
        "finished epochs after which BatchNorm of a built-in network without its head keeps its "
        "statistics",
        0,
        1_000_000,
        also="never",
        metavar="N|never",
    )
    freeze_maps: int = _number(
        0,
        "how many of the maps of a built-in network's trunks, fine to coarse, come from layers "
        "that keep their weights and statistics",
        0,
        4,
    )
    weight_decay: float = _number(
        0.05, "decay of AdamW, on weights but not on biases and norms", 0, 10
    )
    warmup_epochs: int = _number(
        5, "epochs of a rising learning rate, a quarter of --epochs at most", 0, 1_000_000
    )
    label_smoothing: float = _number(0.1, "share of the target spread over all classes", 0, 0.9)
    logit_adjustment: float = _number(
        0.0,
        "how far rare scene classes are made up for: 0 answers as often as train rows have each, 1 "
        "as if all were equally frequent",
        0,
        2,
    )
    crop: float = _number(
        0.5, "smallest random crop, as a share of the area (task depth: whole pictures)", 0.05, 1
    )
    jitter: float = _number(
        0.4, "random brightness, contrast and saturation, each times 1-X to 1+X", 0, 1
    )
    seed: int = _number(0, "of everything random: order, augmentation, first weights", 0, 2**63 - 1)
    compile: bool = _flag(False, "compile the network with torch.compile (a minute; for GPUs)")
    save_minutes: float = _number(
        5.0, "checkpoint at least this often, besides every epoch; 0 = every step", 0, 1e6
    )
    mirror: str | None = _flag(
        None, "copy checkpoints there in the background, and start from it", metavar="DIR"
    )
    reset: bool = _flag(
        False, "forget the checkpoints in --out (and OUT-parts of a recipe) and start over"
    )
    allow_remote: bool = _flag(
        False, "read a set on a mounted Drive, cloud folder or bucket all the same"
    )
    shuffle: str = _flag(
        "auto",
        "how train rows are shuffled: full, all together; wheel, those of some shards at a time, "
        "or wheel:N (auto: full where all that is read fits this machine, else wheel)",
        metavar="auto|full|wheel",
    )
    cache_dir: str | None = _flag(
        None,
        "folder of this machine for shards of a set that lies elsewhere: they come as they are "
        "needed (without it, of a set in a bucket: a folder of the user's caches)",
        metavar="DIR",
    )
    cache_limit_gb: float | None = _number(
        None,
        "most that the cache holds, in 10^9 bytes; default 90 %% of what its disk has",
        0.001,
        1e6,
        type=float,
        metavar="GB",
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _checked(each, getattr(self, each.name)))
        if self.task == "depth" and "raw_depth" in self.input_fields:
            raise WrongSetting("inputs", self.inputs, "raw_depth tells the depth that is learnt")
        if self.weights and not self.has_trunks:
            advice = f"Load them inside {self.model}"
            raise NeedsSetting("weights", self.weights, "model", "resnet18", advice)

        for name, default in (("trunk_lr", 1.0), ("freeze_norms", "never")):
            value = getattr(self, name)
            if value != default and not self.has_trunks:
                raise NeedsSetting(name, value, "model", BUILT_IN[0], "Leave it out")
        if self.logit_adjustment and self.task != "scene":
            raise NeedsSetting("logit_adjustment", self.logit_adjustment, "task", "scene")
        if self.freeze_maps and self.model not in BUILT_IN:
            raise NeedsSetting("freeze_maps", self.freeze_maps, "model", "lite0", "Leave it out")
        if self.freeze_maps and not self.weights:  # they would stay as they were drawn
            raise NeedsSetting("freeze_maps", self.freeze_maps, "weights", "imagenet")

    @property
    def has_trunks(self) -> bool:
        """Whether the network has a trunk a field: a built-in one or timm's, not a user's own."""
        return self.model in BUILT_IN or self.model.startswith(TIMM)

    @property
    def channels(self) -> int:
        """`width`, its default worked out."""
        return self.width or (64 if self.weights else 32)

    @property
    def input_fields(self) -> tuple[str, ...]:
        """The fields that `inputs` names, rgb first, then depth; where depth is learnt it is not
        among them, and rgb is where nothing else is.
        """
        names = ("rgb", "depth") if self.inputs == RGBD else tuple(self.inputs.split(","))
        if self.task != "depth":
            return names
        return tuple(name for name in names if name != "depth") or ("rgb",)

    @property
    def further_fields(self) -> tuple[str, ...]:
        """Those beyond rgb and depth."""
        return tuple(name for name in self.input_fields if name not in ("rgb", "depth"))

    def freezes_norms(self, epoch: int) -> bool:
        """Whether the trunks' BatchNorm learns no statistics in an epoch; the first is 0."""
        return isinstance(self.freeze_norms, int) and epoch >= self.freeze_norms

    def check_out(self) -> None:
        """Raise WrongSetting where `out` names no directory, as it may where nothing is written, or
        another path is empty: a variable of a script that was never set.
        """
        if not self.out:
            raise WrongSetting("out", "''", "name a directory")
        for name in sorted(PATHS):
            value = getattr(self, name)
            if "" in (value if isinstance(value, tuple) else [value]):
                raise WrongSetting(name, "''", "an empty path. Give one, or leave it out")


def _checked(each: "Field[Any]", value: Any) -> Any:
    """The value as Python's own int, float, bool or str, which a checkpoint can hold.

    Raises WrongSetting.
    """
    if each.name == "task":
        if not isinstance(value, str) or not TASK.fullmatch(value):
            raise _wrong(each, value, "scene, depth, semantic or semanticN")
        return value

    if each.name == "data":
        several = value if isinstance(value, list | tuple) else [value]
        paths = tuple(_checked_text(each, one) for one in several)
        if not paths:
            raise _wrong(each, value, "text")
        return paths[0] if len(paths) == 1 else paths

    if each.name == "shuffle":
        return shuffle_named(value)

    if each.name == "inputs":
        return _checked_inputs(each, value)

    if "bounds" in each.metadata:
        return None if value is None and each.default is None else _checked_number(each, value)

    choices = each.metadata["argparse"].get("choices")
    if choices:
        # True is 1 and 10.0 is 10 in Python; neither is one of the choices.
        if value not in choices or isinstance(value, bool | float):
            raise _wrong(each, value, f"one of {', '.join(map(str, choices))}")
        return next(choice for choice in choices if choice == value)

    if isinstance(each.default, bool):
        if not isinstance(value, bool):
            raise _wrong(each, value, "True or False")
        return value

    if value is None and each.default is None:
        return None
    return _checked_text(each, value)


def _checked_text(each: "Field[Any]", value: Any) -> str:
    """Raises WrongSetting."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or "\0" in value:
        raise _wrong(each, value, "text")
    # A shell leaves the ~ of --out=~/run as it is.
    return os.path.expanduser(value) if each.name in PATHS else value


def _checked_inputs(each: "Field[Any]", value: Any) -> str:
    """Names of fields as one text, rgb first, then depth. Raises WrongSetting."""
    names = value.split(",") if isinstance(value, str) else []
    are_names = all(NAME.fullmatch(name) for name in names)
    is_clear = RGBD not in names or len(names) == 1
    if not names or not are_names or len(set(names)) < len(names) or not is_clear:
        raise _wrong(each, value, "rgbd, or names of fields such as rgb,depth,thermal, each once")
    names.sort(key=lambda name: ("rgb", "depth").index(name) if name in ("rgb", "depth") else 2)
    return RGBD if names == ["rgb", "depth"] else ",".join(names)


def _checked_number(each: "Field[Any]", value: Any) -> Any:
    """A float where the default is one, else an int. Raises WrongSetting."""
    also = each.metadata["also"]
    low, high = each.metadata["bounds"]

    if isinstance(also, str) and isinstance(value, str):  # a flag that is a number or a word
        if value == also:
            return value
        if value.isascii() and value.isdecimal() and len(value) < 10:
            value = int(value)

    is_float = isinstance(each.default, float) or isinstance(low, float)
    is_number = isinstance(value, Real if is_float else Integral) and not isinstance(value, bool)
    is_also = also is not None and value == also
    if not is_number or not (low <= value <= high or is_also):
        kind = "a number" if is_float else "a whole number"
        raise _wrong(each, value, f"{kind}, {each.metadata['values']}")
    return float(value) if is_float else int(value)


def _wrong(each: "Field[Any]", value: Any, choices: str) -> WrongSetting:
    given = repr(value) if isinstance(value, str) else value
    return WrongSetting(each.name, given, f"choose {choices}")


def add_flags(parser: ArgumentParser, *, needs_out: bool = True) -> None:
    """One flag a field, `out` only where it is needed; the type is that of the default, which
    --help shows.
    """
    for each in fields(Settings):
        if each.name == "out" and not needs_out:
            parser.set_defaults(out="")
            continue
        options: dict[str, Any] = {"default": each.default}
        shown = dict(each.metadata["argparse"])
        shown["help"] += _default_in_words(each)
        is_number = "bounds" in each.metadata and "metavar" not in shown
        if is_number:
            shown["metavar"] = "X" if isinstance(each.default, float) else "N"
        if each.default is MISSING:
            options = {"required": True}
        elif each.default is False:
            options = {"action": "store_true"}
        elif isinstance(each.default, int | float):
            options["type"] = type(each.default)
        parser.add_argument(flag_of(each.name), dest=each.name, **options, **shown)


def _default_in_words(each: "Field[Any]") -> str:
    """After the text of a flag; that of num_classes is in its text."""
    if each.default is MISSING:
        return "; required"
    if each.default is False:
        return "; default off"
    if each.default is None:
        return "" if "; default" in each.metadata["argparse"]["help"] else "; default none"
    return f"; default {each.default}"
