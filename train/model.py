"""Two-stream RGB-D ResNet-18: one standard trunk a picture, joined after pooling, or by a light decoder."""

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

from shards.format import UserError, one_line, sha256_file
from train.checkpoint import newest
from train.settings import Settings

IMAGENET = "https://download.pytorch.org/models/resnet18-f37072fd.pth"  # the name ends in its SHA-256's first 8 digits
# oneDNN's gradient of a strided 1x1 convolution gathers its input in a workspace of as many channels as there are, but
# writes whole blocks: 16 with AVX-512, 8 with AVX2. In channels_last, with fewer channels, it writes beyond it
# (uxlfoundation/oneDNN 6035, seen with torch 2.13): other weights in every run, or the process dies. With guard pages
# behind every buffer 4, 8, 12 and 15 channels died, and 16, 17, 20 and 24 stayed inside, with AVX-512 and AVX2. Whole
# blocks leave nothing to write beyond; of other numbers those below two blocks are refused too, as a margin.
BLOCK = 16
FEWEST_CHANNELS = 2 * BLOCK
STREAMS = {"rgbd": ("rgb", "depth"), "rgb": ("rgb",), "depth": ("depth",)}


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
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x_bchw: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H / stride, W / stride]."""
        shortcut = x_bchw if self.downsample is None else self.downsample(x_bchw)
        y_bchw = torch.relu_(self.bn1(self.conv1(x_bchw)))
        return torch.relu_(self.bn2(self.conv2(y_bchw)) + shortcut)


class ResNetTrunk(nn.Module):
    """ResNet-18 without its classifier: [B, n_in, H, W] -> features at 1/4, 1/8, 1/16 and 1/32 of the resolution."""

    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for k, n in enumerate((width, width, 2 * width, 4 * width), start=1):
            n_out = width * 2 ** (k - 1)
            blocks = BasicBlock(n, n_out, 1 if k == 1 else 2), BasicBlock(n_out, n_out)
            self.add_module(f"layer{k}", nn.Sequential(*blocks))

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        """One feature map a stage, width to 8 * width channels."""
        features = [self.maxpool(torch.relu_(self.bn1(self.conv1(x_bchw))))]
        for k in range(1, 5):
            features.append(self.get_submodule(f"layer{k}")(features[-1]))
        return features[1:]


class TwoStreamResNet(nn.Module):
    """A trunk for each of `streams`, then pooled features -> dropout -> fc, or (dense) the decoder.

    Width 64 is the standard size, 11.18 M parameters a stream; half the width has a quarter of them.
    """

    def __init__(
        self, n_out: int, *, width: int = 64, inputs: str = "rgbd", depth_planes: int = 1, dense: bool = False
    ) -> None:
        super().__init__()
        self.streams, self.dense = STREAMS[inputs], dense
        for stream in self.streams:
            self.add_module(stream, ResNetTrunk(3 if stream == "rgb" else depth_planes, width))
        widths = [len(self.streams) * width * 2**k for k in range(4)]
        if dense:
            self.decoder = Decoder(widths, 2 * width, n_out)
        else:
            self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(widths[-1], n_out)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if dense:
            nn.init.zeros_(self.decoder.head.weight)

    def forward(self, rgb_bchw: Tensor, depth_bchw: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] and [B, depth_planes, H, W] -> logits [B, n_out], dense [B, n_out, H / 4, W / 4]."""
        pictures = {"rgb": rgb_bchw, "depth": depth_bchw}
        features = (getattr(self, stream)(pictures[stream]) for stream in self.streams)
        stages = [torch.cat(maps, dim=1) for maps in zip(*features, strict=True)]
        y: Tensor = self.decoder(stages) if self.dense else self.fc(self.dropout(stages[-1].mean(dim=(2, 3))))
        return y


class Decoder(nn.Module):
    """A feature pyramid: from the coarsest stage up, each added to the one below; logits at 1/4 of the resolution."""

    def __init__(self, widths: list[int], n: int, n_out: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(n_in, n, 1) for n_in in widths)
        self.smooth = nn.Sequential(nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU())
        self.head = nn.Conv2d(n, n_out, 1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Feature maps, fine to coarse -> [B, n_out, H / 4, W / 4]."""
        y_bchw = self.lateral[-1](stages[-1])
        for lateral, stage in zip(list(self.lateral)[-2::-1], stages[-2::-1], strict=True):
            y_bchw = F.interpolate(y_bchw, stage.shape[-2:], mode="bilinear", align_corners=False) + lateral(stage)
        logits: Tensor = self.head(self.smooth(y_bchw))
        return logits


def overruns(layer: nn.Module) -> bool:
    """Whether oneDNN writes beyond its memory where this layer's input is in channels_last."""
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return False
    channels = [layer.in_channels, *([layer.out_channels] if layer.transposed else [])]
    is_strided_1x1 = max(layer.kernel_size) == 1 and max(layer.stride) > 1
    n_channels = min(channels) // layer.groups
    return is_strided_1x1 and n_channels < FEWEST_CHANNELS and n_channels % BLOCK != 0


def layout_for(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, twice the speed on a CPU, where every layer of the network is safe in it there."""
    is_safe = device.type != "cpu" or not any(map(overruns, model.modules()))
    return torch.channels_last if is_safe else torch.contiguous_format


def compiled(net: nn.Module) -> nn.Module:
    """torch.compile, which brings every convolution into channels_last by itself: not where one is not safe in it."""
    options: Any = {"layout_optimization": False} if any(map(overruns, net.modules())) else None
    return torch.compile(net, options=options)  # type: ignore[return-value]


def start_from(model: nn.Module, weights: str | None) -> None:
    """What --weights names into a new model, if anything. Raises UserError where it cannot be read or does not fit."""
    try:
        if weights:
            load_trunks(model, read_weights(weights))  # type: ignore[arg-type]
    except Exception as error:  # a missing file, no network, a pickle of anything else
        hint = "Give a ResNet-18 (and --width 64), or a run with this one's --width and --inputs"
        raise UserError(f"--weights {weights}: {one_line(error)}. {hint}") from error


def load_trunks(model: TwoStreamResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load each stream's trunk from another run's, or all from a standard ResNet-18 (the depth stem: mean over RGB).

    The head (fc, decoder) is left as it is. Raises RuntimeError naming missing, unknown or wrongly shaped keys.
    """
    for stream in model.streams:
        trunk, own = model.get_submodule(stream), f"{stream}."
        given = {key.removeprefix(own): value for key, value in state_dict.items() if key.startswith(own)}
        given = given or {key: value for key, value in state_dict.items() if not key.startswith("fc.")}
        if stream == "depth" and "conv1.weight" in state_dict:
            stem = trunk.get_parameter("conv1.weight")
            given["conv1.weight"] = given["conv1.weight"].mean(dim=1, keepdim=True).expand_as(stem)
        counters = {k: v for k, v in trunk.state_dict().items() if k.endswith("num_batches_tracked")}
        trunk.load_state_dict(counters | given)  # the oldest checkpoints have no counters


def read_weights(spec: str) -> Mapping[str, Tensor]:
    """The state_dict of "imagenet" (fetched once), of a run or a file; a hash in the file's name must be its own."""
    if Path(spec).is_dir():
        if not (found := newest(Settings("", spec))):
            raise ValueError("it has no checkpoint")
        return found[1]["model"]  # type: ignore[no-any-return]
    if spec == "imagenet":
        return torch.hub.load_state_dict_from_url(IMAGENET, map_location="cpu", check_hash=True, weights_only=True)
    expected = re.search(r"-([0-9a-f]{8})\.", spec)
    if expected and (digest := sha256_file(Path(spec))[:8]) != expected[1]:
        raise ValueError(f"its name says SHA-256 {expected[1]}..., its content has {digest}...")
    return torch.load(spec, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def build(spec: str, n_out: int, **shape: object) -> nn.Module:
    """The default "resnet18" of this `shape` (keywords), or what `package.module:callable` returns for n_out."""
    if spec == "resnet18":
        return TwoStreamResNet(n_out, **shape)  # type: ignore[arg-type]
    try:
        factory = pkgutil.resolve_name(spec)
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        hint = "expected resnet18 or package.module:callable. Run from the folder that holds the package, or install it"
        raise UserError(f"--model {spec}: {said(error)}; {hint}") from error
    try:
        model = factory(n_out) if callable(factory) else factory
    except (Exception, SystemExit) as error:
        raise UserError(f"--model {spec}: called with {n_out}, the number of outputs: {said(error)}") from error
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise UserError(f"--model {spec} returned {got}, expected a torch.nn.Module taking (rgb, depth)")
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        hint = "Give its layer the number of inputs, or call the network once before it is returned"
        raise UserError(f"--model {spec}: the shape of {lazy[0]} is not known yet (a lazy layer). {hint}")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--model {spec} has no parameters that can learn")
    return model


def said(error: BaseException) -> str:
    """An error of a user's code in one line, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{at}"


def ask(spec: str, model: nn.Module, pictures: list[Tensor]) -> Any:
    """What a user's network answers. Raises UserError where it cannot, or where a layer of it is not safe."""
    handles = [layer.register_forward_pre_hook(_refuse_overrun) for layer in model.modules() if overruns(layer)]
    try:
        return model(*pictures)
    except UserError as error:
        raise UserError(f"--model {spec}: {error}") from error
    except (Exception, SystemExit) as error:
        shapes = ", ".join(str(list(picture.shape)) for picture in pictures)
        raise UserError(f"--model {spec}: called with pictures {shapes}: {said(error)}") from error
    finally:
        for handle in handles:
            handle.remove()


def _refuse_overrun(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """It is given the plain layout; whoever changes that inside meets the kernel that writes beyond its memory."""
    x = inputs[0]
    if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        hint = "Leave it in the layout that it is given"
        raise UserError(f"{layer} gets its input in channels_last, in which oneDNN writes beyond its memory. {hint}")


def unused_parameters(model: nn.Module, out: Tensor) -> list[str]:
    """Names of those that learn, but have no part in `out`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out.sum(), [p for _, p in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]
