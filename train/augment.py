"""Batch augmentation on the device: stored integers in, network input out.

Every draw comes from a CPU torch.Generator and is then moved, so a batch is the same on any device.
Until `to_input`, RGB counts 0..255 (uint8, or float once resampled) and depth is int16 millimetres, 0 = no measurement.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.data import normalize_depth, normalize_rgb


class DepthStats(NamedTuple):
    """Mean and standard deviation of the valid train pixels, in metres."""

    mean_m: float
    std_m: float


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Uniform draws on the CPU, moved to the device of `like`."""
    return (low + (high - low) * torch.rand(shape, generator=generator)).to(like.device, non_blocking=True)


def to_input(rgb_bchw: Tensor, depth_mm_b1hw: Tensor, stats: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """RGB 0..255 -> ImageNet-normalised float32; depth -> (metres - mean) / std, exactly 0.0 where it was 0."""
    return normalize_rgb(rgb_bchw), normalize_depth(depth_mm_b1hw, *stats)


def _grey(rgb_bchw: Tensor) -> Tensor:
    """[B, 1, H, W]: luma by ITU-R BT.601."""
    red, green, blue = rgb_bchw.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def random_flip(rgb_bchw: Tensor, depth_b1hw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror each sample left to right with probability one half, RGB and depth together."""
    flip_b111 = _uniform((len(rgb_bchw), 1, 1, 1), 0.0, 1.0, generator, rgb_bchw) < 0.5
    return torch.where(flip_b111, rgb_bchw.flip(-1), rgb_bchw), torch.where(flip_b111, depth_b1hw.flip(-1), depth_b1hw)


def _sample(rgb_bchw: Tensor, depth_b1hw: Tensor, y_bs: Tensor, x_bs: Tensor) -> tuple[Tensor, Tensor]:
    """Read both pictures at the same positions (in pixels from the top left corner): bilinear RGB, nearest depth."""
    height, width = rgb_bchw.shape[-2:]
    size = y_bs.shape[1]
    grid_x = (2 * x_bs / width - 1)[:, None, :].expand(-1, size, -1)
    grid_y = (2 * y_bs / height - 1)[:, :, None].expand(-1, -1, size)
    grid = torch.stack((grid_x, grid_y), dim=-1)
    rgb = F.grid_sample(rgb_bchw.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    rows = y_bs.long().clamp(0, height - 1)[:, :, None]
    columns = x_bs.long().clamp(0, width - 1)[:, None, :]
    batch = torch.arange(len(depth_b1hw), device=depth_b1hw.device)[:, None, None]
    return rgb, depth_b1hw[batch, 0, rows, columns][:, None]


def resize(rgb_bchw: Tensor, depth_b1hw: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The whole picture at size x size, resampled as the training crops are."""
    height, width = rgb_bchw.shape[-2:]
    if (height, width) == (size, size):
        return rgb_bchw, depth_b1hw
    centres_bs = (torch.arange(size, device=rgb_bchw.device) + 0.5).expand(len(rgb_bchw), -1) / size
    return _sample(rgb_bchw, depth_b1hw, centres_bs * height, centres_bs * width)


def random_resized_crop(
    rgb_bchw: Tensor,
    depth_b1hw: Tensor,
    generator: torch.Generator,
    size: int,
    scale: tuple[float, float] = (0.5, 1.0),
) -> tuple[Tensor, Tensor]:
    """One crop per sample, shared by RGB and depth, resampled to size x size.

    `scale` is the crop's share of the area; its aspect ratio is 3/4..4/3, cut down to what fits into the picture.
    """
    height, width = rgb_bchw.shape[-2:]
    area = _uniform((len(rgb_bchw), 1), *scale, generator, rgb_bchw)
    aspect = torch.exp2(_uniform((len(rgb_bchw), 1), -0.415, 0.415, generator, rgb_bchw))
    high = (area / aspect).sqrt().clamp(max=1.0)
    wide = (area * aspect).sqrt().clamp(max=1.0)
    top = (1 - high) * _uniform((len(rgb_bchw), 1), 0.0, 1.0, generator, rgb_bchw)
    left = (1 - wide) * _uniform((len(rgb_bchw), 1), 0.0, 1.0, generator, rgb_bchw)
    centres_s = (torch.arange(size, device=rgb_bchw.device) + 0.5)[None, :] / size
    return _sample(rgb_bchw, depth_b1hw, (top + high * centres_s) * height, (left + wide * centres_s) * width)


def color_jitter(rgb_bchw: Tensor, generator: torch.Generator, strength: float = 0.4) -> Tensor:
    """Brightness, contrast and saturation, each scaled per sample by 1 - strength .. 1 + strength; float, 0..255."""
    shape = (len(rgb_bchw), 1, 1, 1)
    brightness, contrast, saturation = (
        _uniform(shape, 1 - strength, 1 + strength, generator, rgb_bchw) for _ in range(3)
    )
    rgb = (rgb_bchw.float() * brightness).clamp(0, 255)
    grey = _grey(rgb)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    rgb = (mean + (rgb - mean) * contrast).clamp(0, 255)
    grey = _grey(rgb)
    return (grey + (rgb - grey) * saturation).clamp(0, 255)


def augment(rgb_bchw: Tensor, depth_b1hw: Tensor, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Crop, flip and colour jitter: float RGB 0..255 and depth in millimetres, both size x size, for `to_input`."""
    rgb, depth = random_resized_crop(rgb_bchw, depth_b1hw, generator, size)
    rgb, depth = random_flip(rgb, depth, generator)
    return color_jitter(rgb, generator), depth
