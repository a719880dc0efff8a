"""The network: a two-stream RGB-D ResNet-18, or one of the user's own.

The built-in one has a standard trunk for each picture, joined after pooling, or by a light decoder.
"""

import pkgutil
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shards.errors import UserError, one_line
from shards.files import sha256_file
from train.checkpoint import newest
from train.errors import WrongNetwork, WrongWeights
from train.settings import Settings

BUILT_IN = "resnet18"
# The name ends in the first 8 digits of the file's SHA-256.
IMAGENET = "https://download.pytorch.org/models/resnet18-f37072fd.pth"

# oneDNN's gradient of a strided 1x1 convolution gathers its input in a workspace of as many
# channels as there are, but writes whole blocks: 16 with AVX-512, 8 with AVX2. In channels_last,
# with fewer channels, it writes beyond it (uxlfoundation/oneDNN 6035, seen with torch 2.13): other
# weights in every run, or the process dies. With guard pages behind every buffer 4, 8, 12 and 15
# channels died, and 16, 17, 20 and 24 stayed inside, with AVX-512 and AVX2. Whole blocks leave
# nothing to write beyond; of other numbers those below two blocks are refused too, as a margin.
BLOCK = 16
FEWEST_CHANNELS = 2 * BLOCK


# ---------------------------------------------------------------- the built-in network


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; parameter names as in the standard checkpoints."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or n_in != n_out:
            projection = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(n_out))

    def forward(self, x_bchw: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H / stride, W / stride]."""
        shortcut = x_bchw if self.downsample is None else self.downsample(x_bchw)
        y_bchw = torch.relu_(self.bn1(self.conv1(x_bchw)))
        return torch.relu_(self.bn2(self.conv2(y_bchw)) + shortcut)


class ResNetTrunk(nn.Module):
    """ResNet-18 without its classifier; parameter names as in the standard checkpoints.

    [B, n_in, H, W] -> features at 1/4, 1/8, 1/16 and 1/32 of the resolution.
    """

    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, stride=2)

    @staticmethod
    def _stage(n_in: int, n_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(n_in, n_out, stride), BasicBlock(n_out, n_out))

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        """One feature map a stage, width to 8 * width channels."""
        stem = self.maxpool(torch.relu_(self.bn1(self.conv1(x_bchw))))
        stage1 = self.layer1(stem)
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        stage4 = self.layer4(stage3)
        return [stage1, stage2, stage3, stage4]


class TwoStreamResNet(nn.Module):
    """A trunk for each of `streams`, then pooled features -> dropout -> fc, or (dense) the decoder.

    n_out: classes, or 1 for depth. width: channels of the first layer; 64 is the standard size,
    11.18 M parameters a stream, half the width has a quarter of them. planes: of each field that it
    sees, in their order; None: RGB and plain depth. dense: an answer a pixel.
    """

    def __init__(
        self,
        n_out: int,
        *,
        width: int = 64,
        planes: Mapping[str, int] | None = None,
        dense: bool = False,
    ) -> None:
        super().__init__()
        planes = planes or {"rgb": 3, "depth": 1}
        self.streams = tuple(map(stream_of, planes))
        self.dense = dense
        for stream, n_planes in zip(self.streams, planes.values(), strict=True):
            self.add_module(stream, ResNetTrunk(n_planes, width))

        widths = [len(self.streams) * width * 2**k for k in range(4)]
        if dense:
            self.decoder = Decoder(widths, 2 * width, n_out)
        else:
            self.dropout = nn.Dropout(0.5)
            self.fc = nn.Linear(widths[-1], n_out)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if dense:
            nn.init.zeros_(self.decoder.head.weight)

    def forward(self, *pictures_bchw: Tensor) -> Tensor:
        """A picture of each stream, [B, its planes, H, W] -> logits.

        [B, n_out]; dense ones [B, n_out, H / 4, W / 4].
        """
        pairs = zip(self.streams, pictures_bchw, strict=True)
        features = [self.get_submodule(stream)(picture) for stream, picture in pairs]
        stages = [torch.cat(maps, dim=1) for maps in zip(*features, strict=True)]
        if self.dense:
            logits: Tensor = self.decoder(stages)
            return logits
        pooled_bc = stages[-1].mean(dim=(2, 3))
        logits = self.fc(self.dropout(pooled_bc))
        return logits


def stream_of(field: str) -> str:
    """What the trunk that sees a field is called in a network, where "training" is not free."""
    return field if field in ("rgb", "depth") else f"field_{field}"


class Decoder(nn.Module):
    """A feature pyramid: each stage is enlarged and added to the next finer one.

    widths: channels of the stages, fine to coarse. n_channels: inside. Logits come at 1/4 of the
    resolution.
    """

    def __init__(self, widths: list[int], n_channels: int, n_out: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(n_in, n_channels, 1) for n_in in widths)
        self.smooth = nn.Sequential(
            nn.Conv2d(n_channels, n_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_channels),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(n_channels, n_out, 1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Feature maps, fine to coarse -> [B, n_out, H / 4, W / 4]."""
        y_bchw = self.lateral[-1](stages[-1])
        for k in reversed(range(len(stages) - 1)):
            size = stages[k].shape[-2:]
            larger = F.interpolate(y_bchw, size, mode="bilinear", align_corners=False)
            y_bchw = larger + self.lateral[k](stages[k])
        logits: Tensor = self.head(self.smooth(y_bchw))
        return logits


# ---------------------------------------------------------------- the layout in memory


def overruns(layer: nn.Module) -> bool:
    """Whether oneDNN writes beyond its memory where this layer's input is in channels_last."""
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return False
    is_strided_1x1 = max(layer.kernel_size) == 1 and max(layer.stride) > 1
    n_channels = layer.in_channels
    if layer.transposed:  # its weights' gradient is that of a convolution the other way round
        n_channels = min(layer.in_channels, layer.out_channels)
    n_in_a_group = n_channels // layer.groups
    is_whole_blocks = n_in_a_group % BLOCK == 0
    return is_strided_1x1 and n_in_a_group < FEWEST_CHANNELS and not is_whole_blocks


def has_overrun(model: nn.Module) -> bool:
    """Whether any layer of the network is not safe in channels_last on a CPU."""
    return any(overruns(layer) for layer in model.modules())


def layout_for(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, twice the speed on a CPU, where every layer of the network is safe in it."""
    if device.type == "cpu" and has_overrun(model):
        return torch.contiguous_format
    return torch.channels_last


def compiled(net: nn.Module) -> nn.Module:
    """torch.compile; without its change to channels_last where a layer is not safe in it."""
    options: Any = {"layout_optimization": False} if has_overrun(net) else None
    return torch.compile(net, options=options)  # type: ignore[return-value]


# ---------------------------------------------------------------- weights to start from


def start_from(model: nn.Module, weights: str | None) -> None:
    """Put what `weights` names into a new model, if anything.

    Raises WrongWeights where it cannot be read or does not fit.
    """
    if not weights:
        return
    try:
        load_trunks(model, read_weights(weights))  # type: ignore[arg-type]
    except Exception as error:  # a missing file, no network, a pickle of anything else
        raise WrongWeights(weights, one_line(error)) from error


def load_trunks(model: TwoStreamResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load each stream's trunk from another run's, or all from a standard ResNet-18.

    Of the latter, a stem that sees no colours gets the mean over RGB. The head (fc, decoder) is
    left as it is.
    Raises RuntimeError naming missing, unknown or wrongly shaped keys.
    """
    for stream in model.streams:
        trunk = model.get_submodule(stream)
        given = _of_stream(state_dict, stream)
        stem = trunk.get_parameter("conv1.weight")
        is_standard = "conv1.weight" in state_dict
        if is_standard and stem.shape[1] != given["conv1.weight"].shape[1]:
            mean_over_rgb = given["conv1.weight"].mean(dim=1, keepdim=True)
            given["conv1.weight"] = mean_over_rgb.expand_as(stem)

        # The oldest standard checkpoints have no counters of batches.
        own = trunk.state_dict()
        counters = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
        trunk.load_state_dict(counters | given)


def _of_stream(state_dict: Mapping[str, Tensor], stream: str) -> dict[str, Tensor]:
    """What a trunk's stream is called in another run; else everything but a classifier."""
    prefix = f"{stream}."
    of_a_run = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    if of_a_run:
        return of_a_run
    return {key: value for key, value in state_dict.items() if not key.startswith("fc.")}


def read_weights(spec: str) -> Mapping[str, Tensor]:
    """The state_dict of "imagenet" (fetched once), of a run's directory, or of a file.

    Raises ValueError for a run without a checkpoint, and for a file whose name has another hash
    than its content; else what reading or fetching raises.
    """
    if Path(spec).is_dir():
        found = newest(Settings("", spec))
        if found is None:
            raise ValueError("it has no checkpoint")
        return found.model

    if spec == "imagenet":
        return torch.hub.load_state_dict_from_url(
            IMAGENET, map_location="cpu", check_hash=True, weights_only=True
        )

    named_hash = re.search(r"-([0-9a-f]{8})\.", spec)
    if named_hash:
        digest = sha256_file(Path(spec))[:8]
        if digest != named_hash[1]:
            raise ValueError(
                f"its name says SHA-256 {named_hash[1]}..., its content has {digest}..."
            )
    return torch.load(spec, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------- a network of a user's own


def build(spec: str, n_out: int, **shape: object) -> nn.Module:
    """The network that `spec` names, for `n_out` outputs.

    spec: "resnet18", the built-in one of this `shape` (keywords of TwoStreamResNet), or
    `package.module:callable`, which is called with n_out. Raises WrongNetwork.
    """
    if spec == BUILT_IN:
        return TwoStreamResNet(n_out, **shape)  # type: ignore[arg-type]
    model = _made_by_user(spec, n_out)

    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise WrongNetwork(
            spec,
            f": the shape of {lazy[0]} is not known yet (a lazy layer)",
            "Give its layer the number of inputs, or call the network once before it is returned",
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise WrongNetwork(spec, "has no parameters that can learn")
    return model


def _made_by_user(spec: str, n_out: int) -> nn.Module:
    """Whatever the user's code raises, SystemExit too, becomes a WrongNetwork."""
    try:
        factory = pkgutil.resolve_name(spec)
    except (Exception, SystemExit) as error:  # of the user's module while it is imported
        hint = (
            "expected resnet18 or package.module:callable. "
            "Run from the folder that holds the package, or install it"
        )
        raise WrongNetwork(spec, f": {said(error)}; {hint}") from error

    try:
        model = factory(n_out) if callable(factory) else factory
    except (Exception, SystemExit) as error:
        what = f": called with {n_out}, the number of outputs: {said(error)}"
        raise WrongNetwork(spec, what) from error

    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        expected = "expected a torch.nn.Module taking (rgb, depth)"
        raise WrongNetwork(spec, f"returned {kind}, {expected}")
    return model


def said(error: BaseException) -> str:
    """An error of a user's code in one line, with where it was raised."""
    text = f"{type(error).__name__}: {one_line(error)}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def ask(spec: str, model: nn.Module, pictures: list[Tensor]) -> Any:
    """What a user's network answers.

    Raises WrongNetwork where it cannot, or where a layer of it is not safe.
    """
    unsafe = [layer for layer in model.modules() if overruns(layer)]
    handles = [layer.register_forward_pre_hook(_refuse_overrun) for layer in unsafe]
    try:
        return model(*pictures)
    except UserError as error:
        raise WrongNetwork(spec, f": {error.problem}", error.right) from error
    except (Exception, SystemExit) as error:
        shapes = ", ".join(str(list(picture.shape)) for picture in pictures)
        what = f": called with pictures {shapes}: {said(error)}"
        raise WrongNetwork(spec, what) from error
    finally:
        for handle in handles:
            handle.remove()


def _refuse_overrun(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise where a layer that is not safe in channels_last gets its input so.

    The network is given the plain layout; whoever changes that inside meets the kernel that writes
    beyond its memory.
    """
    x = inputs[0]
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type == "cpu" and is_last and not x.is_contiguous():
        raise UserError(
            f"{layer} gets its input in channels_last, in which oneDNN writes beyond its memory",
            "Leave it in the layout that it is given",
        )


def check_answer(spec: str, out: Any, n_out: int, task: str) -> None:
    """Raise WrongNetwork unless `out`, about two pictures, is what the task needs.

    That is float [2, n_out] for scenes, [2, n_out, H, W] of any H and W for the other tasks.
    """
    is_dense = task != "scene"
    shape = f"[2, {n_out}, H, W]" if is_dense else f"[2, {n_out}]"
    expected = f"expected floats {shape} for the task {task}"

    if not isinstance(out, Tensor):
        kind = type(out).__name__
        raise WrongNetwork(spec, f"answers with {kind}, {expected}")

    n_dims = 4 if is_dense else 2
    is_right_shape = out.ndim == n_dims and out.shape[:2] == (2, n_out)
    if not out.is_floating_point() or not is_right_shape:
        dtype = str(out.dtype).removeprefix("torch.")
        found = f"{dtype} {list(out.shape)}"
        raise WrongNetwork(spec, f"answers two pictures with {found}, {expected}")

    if not out.requires_grad:
        what = ": its answer depends on no parameter that can learn"
        raise WrongNetwork(spec, what, "Leave one unfrozen")


def unused_parameters(model: nn.Module, out: Tensor) -> list[str]:
    """Names of those that learn, but have no part in `out`."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(out.sum(), list(learning.values()), allow_unused=True)
    found = zip(learning, gradients, strict=True)
    return [name for name, gradient in found if gradient is None]
