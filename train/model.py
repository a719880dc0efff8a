"""The network by its name: one of those in `train.networks`, or one of the user's own.

Its layout in memory, the weights that it starts from, and what is asked of a user's own.
"""

import pkgutil
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from shards.errors import UserError, one_line
from shards.files import sha256_file
from train.augment import IMAGENET_SCALING, Scaling
from train.checkpoint import newest
from train.errors import WrongNetwork, WrongWeights
from train.networks import lite, timm_trunk
from train.networks.lite import LiteTrunk
from train.networks.streams import StreamNetwork, TwoStreamResNet
from train.networks.timm_trunk import TimmTrunk, Use
from train.networks.trunk import Trunk
from train.settings import BUILT_IN, TIMM, Settings

IMAGENET = "imagenet"

# oneDNN's gradient of a strided 1x1 convolution gathers its input in a workspace of as many
# channels as there are, but writes whole blocks: 16 with AVX-512, 8 with AVX2. In channels_last,
# with fewer channels, it writes beyond it (uxlfoundation/oneDNN 6035, seen with torch 2.13): other
# weights in every run, or the process dies. With guard pages behind every buffer 4, 8, 12 and 15
# channels died, and 16, 17, 20 and 24 stayed inside, with AVX-512 and AVX2. Whole blocks leave
# nothing to write beyond; of other numbers those below two blocks are refused too, as a margin.
BLOCK = 16
FEWEST_CHANNELS = 2 * BLOCK


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
    assert isinstance(model, StreamNetwork)
    try:
        if weights == IMAGENET and not Path(weights).is_dir():
            for trunk in model.trunks():
                trunk.load_imagenet()
        else:
            load_trunks(model, read_weights(weights))
    except UserError as error:  # a package that is not there
        name = model.trunks()[0].name
        raise WrongWeights(weights, error.problem, name, error.right) from error
    except Exception as error:  # a missing file, no network, a pickle of anything else
        raise WrongWeights(weights, one_line(error), model.trunks()[0].name) from error


def load_trunks(model: StreamNetwork, state_dict: Mapping[str, Tensor]) -> None:
    """Load each stream's trunk from another run's, or all from one standard checkpoint.

    Of the latter, the stem of a stream that sees no colours is made from that of RGB. The head (fc,
    decoder) is left as it is.
    Raises RuntimeError naming missing, unknown or wrongly shaped keys.
    """
    for stream in model.streams:
        of_a_run = _of_stream(state_dict, stream)
        if of_a_run:
            _check_width(of_a_run, model.trunk(stream))
            model.trunk(stream).load_own(of_a_run)
        else:
            model.trunk(stream).load_standard(state_dict)


def _check_width(of_a_run: Mapping[str, Tensor], trunk: nn.Module) -> None:
    """Raise ValueError for a ResNet of another width: torch would name each of its layers."""
    name = "conv1.weight"
    own = trunk.state_dict()
    if name in of_a_run and name in own and len(of_a_run[name]) != len(own[name]):
        raise ValueError(f"its width is {len(of_a_run[name])}, this network's {len(own[name])}")


def _of_stream(state_dict: Mapping[str, Tensor], stream: str) -> dict[str, Tensor]:
    """What a trunk's stream is called in another run."""
    prefix = f"{stream}."
    return {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }


def read_weights(spec: str) -> Mapping[str, Tensor]:
    """The state_dict of a run's directory, or of a file.

    Raises ValueError for a run without a checkpoint, and for a file whose name has another hash
    than its content; else what reading raises.
    """
    if Path(spec).is_dir():
        found = newest(Settings("", spec))
        if found is None:
            raise ValueError("it has no checkpoint")
        return found.model

    named_hash = re.search(r"-([0-9a-f]{8})\.", spec)
    if named_hash:
        digest = sha256_file(Path(spec))[:8]
        if digest != named_hash[1]:
            raise ValueError(
                f"its name says SHA-256 {named_hash[1]}..., its content has {digest}..."
            )
    if spec.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(spec)
    return torch.load(spec, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------- a network of a user's own


def build(
    spec: str,
    n_out: int,
    *,
    width: int = 64,
    planes: Mapping[str, int] | None = None,
    dense: bool = False,
    size: int = 224,
) -> nn.Module:
    """The network that `spec` names, for `n_out` outputs.

    spec: a built-in one, or "timm:NAME", for these planes of each field, with an answer a picture
    or (dense) a pixel; or `package.module:callable`, which is called with n_out. width: of
    ResNet-18 alone. size: of the pictures, which some networks of timm are made for. Raises
    WrongNetwork.
    """
    planes = planes or {"rgb": 3, "depth": 1}
    if spec == "resnet18":
        return TwoStreamResNet(n_out, width=width, planes=planes, dense=dense)
    if spec == "lite0":
        trunks: dict[str, Trunk] = {field: LiteTrunk(n) for field, n in planes.items()}
        return StreamNetwork(trunks, n_out, dense=dense)
    if spec.startswith(TIMM):
        uses = {field: Use(n_in=n, dense=dense, size=size) for field, n in planes.items()}
        trunks = {field: TimmTrunk(spec, use) for field, use in uses.items()}
        return StreamNetwork(trunks, n_out, dense=dense)
    return _checked(spec, _made_by_user(spec, n_out))


def scaling_of(spec: str) -> Scaling:
    """How the network that `spec` names wants its colours. Raises WrongNetwork where timm has none
    of that name, or is not there.
    """
    if spec.startswith(TIMM):
        return timm_trunk.scaling_of(spec)
    return lite.SCALING if spec == "lite0" else IMAGENET_SCALING


def synchronized(spec: str, model: nn.Module) -> nn.Module:
    """With norms whose statistics are those of all ranks together; for GPUs."""
    if spec.startswith(TIMM):
        return timm_trunk.synchronized(spec, model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _checked(spec: str, model: nn.Module) -> nn.Module:
    """A user's network that can learn. Raises WrongNetwork."""

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
            f"expected {', '.join(BUILT_IN)}, {TIMM}NAME or package.module:callable. "
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
