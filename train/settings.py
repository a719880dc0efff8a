"""A run's settings: each field is a flag of the command, and is stored in the run's checkpoints."""

from argparse import ArgumentParser
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from convert.format import UserError

# May change when a run is continued; batch_size is compared as the batch of all ranks together.
MAY_CHANGE = {
    "data", "out", "allow_remote", "epochs", "num_workers", "reset", "mirror", "save_minutes", "compile", "batch_size",
}  # fmt: skip


def _flag(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """What a run is made from."""

    data: str = _flag(MISSING, "a converted set, or a directory that holds exactly one", metavar="DIR|ROOT")
    out: str = _flag(MISSING, "directory of this run; a run found there is continued", metavar="RUN")
    task: str = _flag("scene", "what to learn", choices=["scene", "semantic13", "semantic40", "depth"])
    num_classes: int = _flag(13, "which scene classes", choices=[10, 13, 27])
    inputs: str = _flag("rgbd", "what the network sees (depth is learnt from rgb)", choices=["rgbd", "rgb", "depth"])
    size: int = _flag(128, "training resolution, 0 = as stored")
    epochs: int = _flag(90, "passes over the train rows")
    batch_size: int = _flag(128, "rows a step and process")
    num_workers: int | str = _flag("auto", "loader processes", metavar="N|auto")
    model: str = _flag("resnet18", "resnet18, or package.module:callable(outputs)", metavar="NAME")
    width: int = _flag(0, "channels of the first layer, 0 = 64 with --weights, else 32")
    weights: str | None = _flag(
        None, "start from an ImageNet ResNet-18, or from another run", metavar="imagenet|PATH|RUN"
    )
    lr: float = _flag(1e-3, "peak learning rate")
    weight_decay: float = _flag(0.05, "of AdamW, on weights but not on biases and norms")
    warmup_epochs: int = _flag(5, "rising learning rate, a quarter of --epochs at most")
    label_smoothing: float = _flag(0.1, "share of the target spread over all classes")
    crop: float = _flag(0.5, "smallest random crop, as a share of the area (task depth: whole pictures)")
    jitter: float = _flag(0.4, "brightness, contrast, saturation times 1 -+ X")
    seed: int = _flag(0, "of everything random")
    compile: bool = _flag(False, "torch.compile the network")
    save_minutes: float = _flag(5.0, "checkpoint at least this often, besides every epoch; 0 = every step")
    mirror: str | None = _flag(None, "copy checkpoints there in the background, and start from it", metavar="DIR")
    reset: bool = _flag(False, "forget the checkpoints in --out and start over")
    allow_remote: bool = _flag(False, "read a set on a mounted Drive (FUSE) all the same")

    def check(self) -> None:
        """Refuse what no run can start from."""
        if self.size != 0 and self.size < 32:
            raise UserError(f"--size {self.size}: the network halves it five times. Use 32 or more, or 0 (as stored)")
        for name, low, high in (("epochs", 1, 1e9), ("batch_size", 1, 1e9), ("crop", 0.05, 1), ("jitter", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: choose {low} to {high:g}")
        if self.weights and self.model != "resnet18":
            raise UserError(f"--weights is for --model resnet18; load them inside {self.model}")

    @property
    def channels(self) -> int:
        """`width`, its default worked out."""
        return self.width or (64 if self.weights else 32)


def add_flags(parser: ArgumentParser) -> None:
    """One flag a field; the type is that of the default."""
    for f in fields(Settings):
        more = {"required": True} if f.default is MISSING else {"default": f.default}
        if f.default is False:
            more = {"action": "store_true"}
        elif isinstance(f.default, int | float):
            more |= {"type": type(f.default)}
        parser.add_argument("--" + f.name.replace("_", "-"), **{**more, **f.metadata})
