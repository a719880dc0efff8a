"""Batch augmentation on the device: stored integers in, network input out.

Random numbers are drawn on the CPU for the whole batch of all ranks, so neither the device nor the
number of ranks changes a picture. Colours are RGB, [B,3,H,W], and further planes of colours or grey
levels behind it, [B,C,H,W]: they are averaged and sampled bilinear. `planes` are sampled nearest
beside them: depths, rays, dense targets; [B,1,H,W] or [B,H,W].

The order of the draws, and of the operations on floats, is part of what a run is: another order
gives other weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.settings import Settings

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
METRES_PER_MM = 1e-3
SMALLEST_STD = 1e-6  # metres, or grey levels
MAX_LOG2_ASPECT = 0.415  # of a random crop: 2**0.415 is 4/3

Pictures = tuple[Tensor, list[Tensor]]  # colours, and the planes beside them
View = tuple[float, float, float]  # top, left, side, as shares of the picture
WHOLE: View = (0.0, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a network wants its colours: (grey / 255 - mean) / std, a number a channel each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    # As one multiplication and one subtraction.
    @cached_property
    def scale_c11(self) -> Tensor:
        """[C, 1, 1]: by which grey levels are multiplied."""
        return torch.tensor([1 / (255 * std) for std in self.std])[:, None, None]

    @cached_property
    def shift_c11(self) -> Tensor:
        """[C, 1, 1]: what is then taken away."""
        shifts = [mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        return torch.tensor(shifts)[:, None, None]


IMAGENET_SCALING = Scaling(mean=IMAGENET_MEAN, std=IMAGENET_STD)


class Draws:
    """Uniform numbers for the rows of one batch.

    seed: of this step. n_rows: of the batch of all ranks together. mine: which of them are this
    rank's (an index). device: where the numbers are wanted.
    """

    def __init__(
        self, seed: int, n_rows: int, mine: Any = slice(None), device: Any = "cpu"
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.n_rows = n_rows
        self.mine = mine
        self.device = device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[rows of this rank, *shape] on the device."""
        drawn = low + (high - low) * torch.rand((self.n_rows, *shape), generator=self.generator)
        return drawn[self.mine].to(self.device, non_blocking=True)


# ---------------------------------------------------------------- the network's input


def normalize_rgb(
    rgb_bchw: Tensor, out: Tensor | None = None, scaling: Scaling = IMAGENET_SCALING
) -> Tensor:
    """Grey levels 0..255 [B,3,H,W] -> float32; without `scaling`: ImageNet's mean and deviation.

    out: float32 [B,3,H,W] to write to, here and below; None: new memory.
    """
    scaled = torch.mul(rgb_bchw, scaling.scale_c11.to(rgb_bchw.device), out=out)
    return scaled.sub_(scaling.shift_c11.to(rgb_bchw.device))


def normalize_depth(
    depth_mm_b1hw: Tensor, mean_m: float, std_m: float, out: Tensor | None = None
) -> Tensor:
    """int16 millimetres [B,1,H,W] -> float32 (metres - mean) / std; 0 where none was measured."""
    metres = torch.mul(depth_mm_b1hw, METRES_PER_MM, out=out)
    return metres.sub_(mean_m).div_(std_m).masked_fill_(depth_mm_b1hw <= 0, 0.0)


def normalize_levels(
    levels_bchw: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor | None = None
) -> Tensor:
    """Grey levels or colours [B,C,H,W] -> float32, by the mean and deviation of each plane."""
    shape = (1, -1, 1, 1)
    mean_1c11 = torch.tensor(mean, device=levels_bchw.device).view(shape)
    std_1c11 = torch.tensor(std, device=levels_bchw.device).view(shape)
    levels = levels_bchw.float() if out is None else out.copy_(levels_bchw)
    return levels.sub_(mean_1c11).div_(std_1c11.clamp(min=SMALLEST_STD))


def surface(
    depth_mm_b1hw: Tensor, x_b1hw: Tensor, y_b1hw: Tensor, stats: tuple[float, float]
) -> Tensor:
    """Depth as five planes [B,5,H,W]: normalised, metres below the camera's axis, normal (x, y, z).

    depth_mm: int16 [B,1,H,W]. x, y: the rays of these very pixels (`geometry.rays`), [B,1,H,W]; the
    picture's right is x also where it was mirrored. stats: mean and deviation of depth in metres.
    Where nothing was measured all five are 0. Normals point to the camera; they come from the
    differences between the means of 3x3 points on both sides of the pixel.
    """
    depth_m = depth_mm_b1hw * METRES_PER_MM
    is_known = depth_mm_b1hw > 0

    # -1 in a mirrored picture.
    to_the_right = torch.sign(x_b1hw[..., :1, -1:] - x_b1hw[..., :1, :1])
    x_b1hw = x_b1hw * to_the_right
    points_b4hw = torch.cat((depth_m * x_b1hw, depth_m * y_b1hw, depth_m, is_known), dim=1)

    normals_b3hw = _normals(points_b4hw)
    below_axis = points_b4hw[:, 1:2]
    planes = torch.cat((normalize_depth(depth_mm_b1hw, *stats), below_axis, normals_b3hw), dim=1)
    return torch.where(is_known, planes, 0.0)


def _normals(points_b4hw: Tensor) -> Tensor:
    """Points (x, y, z, 1; all 0 where not known) -> unit normals [B,3,H,W].

    0 where too little is known beside a pixel.
    """
    wide = F.pad(points_b4hw, (2, 2, 2, 2), mode="replicate")
    sums_of_rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    sums_3x3 = sums_of_rows[..., :-2] + sums_of_rows[..., 1:-1] + sums_of_rows[..., 2:]

    left = sums_3x3[..., 1:-1, :-2]
    right = sums_3x3[..., 1:-1, 2:]
    above = sums_3x3[..., :-2, 1:-1]
    below = sums_3x3[..., 2:, 1:-1]
    across = _difference_of_means(left, right)
    down = _difference_of_means(above, below)

    # The cross product; faster than torch's own.
    product = down.roll(-1, 1) * across.roll(1, 1) - down.roll(1, 1) * across.roll(-1, 1)
    squared_length = product.square().sum(dim=1, keepdim=True)
    return product * (squared_length + 1e-18).rsqrt()


def _difference_of_means(before: Tensor, after: Tensor) -> Tensor:
    """Between the means of two sums of points (x, y, z, their number); 0 where one has none."""
    n_before = before[:, 3:]
    n_after = after[:, 3:]
    mean_before = before[:, :3] / n_before.clamp(min=1)
    mean_after = after[:, :3] / n_after.clamp(min=1)
    return (mean_after - mean_before) * ((n_before > 0) & (n_after > 0))


def to_input(
    rgb_bchw: Tensor,
    planes: list[Tensor],
    stats: tuple[float, float],
    scaling: Scaling = IMAGENET_SCALING,
) -> tuple[Tensor, Tensor]:
    """RGB and depth as the network sees them.

    planes: depth in millimetres, and its rays where the network sees surfaces. stats: mean and
    deviation of depth in metres. scaling: of the colours.
    """
    depth_mm_b1hw, *xy = planes
    if xy:
        depth = surface(depth_mm_b1hw, xy[0], xy[1], stats)
    else:
        depth = normalize_depth(depth_mm_b1hw, *stats)
    return normalize_rgb(rgb_bchw, scaling=scaling), depth


# ---------------------------------------------------------------- windows of pictures


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A window of each row's picture, as shares of the picture, [B, 1] each."""

    top_b1: Tensor
    left_b1: Tensor
    height_b1: Tensor
    width_b1: Tensor


def _cut(colours_bchw: Tensor, planes: list[Tensor], size: int, windows: Windows) -> Pictures:
    """Each row's window at size x size: bilinear colours, nearest planes."""
    height, width = colours_bchw.shape[-2:]
    centres_1s = (torch.arange(size, device=colours_bchw.device) + 0.5)[None, :] / size
    y_bs = (windows.top_b1 + windows.height_b1 * centres_1s) * height
    x_bs = (windows.left_b1 + windows.width_b1 * centres_1s) * width

    colours = _sample_bilinear(colours_bchw, y_bs, x_bs)
    return colours, [_sample_nearest(plane, y_bs, x_bs) for plane in planes]


def _sample_bilinear(colours_bchw: Tensor, y_bs: Tensor, x_bs: Tensor) -> Tensor:
    """Colours at these pixels' coordinates (0 is the picture's edge), float32 [B,C,S,S].

    The picture is first averaged down to at most twice S: bilinear sampling alone would skip
    pixels.
    """
    size = y_bs.shape[1]
    n_averaged = -(-colours_bchw.shape[-2] // (2 * size))  # rounded up
    coarse = F.avg_pool2d(colours_bchw.float(), n_averaged, ceil_mode=True)

    # grid_sample counts from -1 to 1. Where n_averaged does not divide the picture, the coarse one
    # is a little larger than it: its own size counts.
    coarse_height, coarse_width = coarse.shape[-2:]
    y = 2 * y_bs / (n_averaged * coarse_height) - 1
    x = 2 * x_bs / (n_averaged * coarse_width) - 1
    grid_bss2 = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(
        coarse, grid_bss2, mode="bilinear", padding_mode="border", align_corners=False
    )


def _sample_nearest(plane: Tensor, y_bs: Tensor, x_bs: Tensor) -> Tensor:
    """The values of the pixels in which these lie: [B,S,S], or [B,1,S,S] of [B,1,H,W]."""
    n_rows, size = y_bs.shape
    height, width = plane.shape[-2:]
    rows = y_bs.long().clamp(0, height - 1)[:, :, None]
    columns = x_bs.long().clamp(0, width - 1)[:, None, :]

    batch = torch.arange(n_rows, device=plane.device)[:, None, None]
    sampled_bss = plane.view(n_rows, height, width)[batch, rows, columns]
    return sampled_bss.view(*plane.shape[:-2], size, size)


def views(smallest: float) -> list[View]:
    """The whole picture, its four corners and its centre.

    smallest: the share of the area that training crops have at least; the five are as large as
    these are in the mean. With 1 only the whole picture is left.
    """
    side = ((1 + smallest) / 2) ** 0.5
    far = 1 - side
    corners = [(0.0, 0.0), (0.0, far), (far, 0.0), (far, far), (far / 2, far / 2)]
    crops = [(top, left, side) for top, left in corners]
    return list(dict.fromkeys([WHOLE, *crops]))


def resize(colours_bchw: Tensor, planes: list[Tensor], size: int, view: View = WHOLE) -> Pictures:
    """The same view of every picture at size x size, resampled as the training crops are."""
    if colours_bchw.shape[-2:] == (size, size) and view == WHOLE:
        return colours_bchw, planes

    shape = (len(colours_bchw), 1)
    top_b1, left_b1, side_b1 = (
        torch.full(shape, share, device=colours_bchw.device) for share in view
    )
    windows = Windows(top_b1=top_b1, left_b1=left_b1, height_b1=side_b1, width_b1=side_b1)
    return _cut(colours_bchw, planes, size, windows)


# ---------------------------------------------------------------- random changes


def random_resized_crop(
    colours_bchw: Tensor, planes: list[Tensor], draws: Draws, size: int, smallest: float
) -> Pictures:
    """One crop a row, at size x size.

    `smallest`..1 of the area, its aspect ratio 3/4..4/3 where it fits.
    """
    area_b1 = draws.uniform(1, low=smallest)
    aspect_b1 = torch.exp2(draws.uniform(1, low=-MAX_LOG2_ASPECT, high=MAX_LOG2_ASPECT))
    height_b1 = (area_b1 * (1 / aspect_b1)).sqrt().clamp(max=1.0)
    width_b1 = (area_b1 * aspect_b1).sqrt().clamp(max=1.0)

    top_b1 = (1 - height_b1) * draws.uniform(1)
    left_b1 = (1 - width_b1) * draws.uniform(1)
    windows = Windows(top_b1=top_b1, left_b1=left_b1, height_b1=height_b1, width_b1=width_b1)
    return _cut(colours_bchw, planes, size, windows)


def random_flip(colours_bchw: Tensor, planes: list[Tensor], draws: Draws) -> Pictures:
    """Mirror each row left to right with probability one half."""
    is_flipped_b = draws.uniform() < 0.5

    def flip(part: Tensor) -> Tensor:
        is_flipped = is_flipped_b.view(-1, *[1] * (part.ndim - 1))
        return torch.where(is_flipped, part.flip(-1), part)

    return flip(colours_bchw), [flip(plane) for plane in planes]


def _grey(rgb_bchw: Tensor) -> Tensor:
    """[B,1,H,W]: luma by ITU-R BT.601."""
    red, green, blue = rgb_bchw.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def color_jitter(rgb_bchw: Tensor, draws: Draws, strength: float) -> Tensor:
    """Brightness, contrast and saturation, each times a row's own 1 - strength .. 1 + strength.

    Returns floats [B,3,H,W], 0..255.
    """
    low = 1 - strength
    high = 1 + strength
    brightness = draws.uniform(1, 1, 1, low=low, high=high)
    contrast = draws.uniform(1, 1, 1, low=low, high=high)
    saturation = draws.uniform(1, 1, 1, low=low, high=high)

    rgb = (rgb_bchw.float() * brightness).clamp(0, 255)

    mean = _grey(rgb).mean(dim=(1, 2, 3), keepdim=True)
    rgb = (mean + (rgb - mean) * contrast).clamp(0, 255)

    grey = _grey(rgb)
    return (grey + (rgb - grey) * saturation).clamp(0, 255)


def augment(
    colours_bchw: Tensor, planes: list[Tensor], draws: Draws, size: int, settings: Settings
) -> Pictures:
    """Crop, flip and, of RGB, colour jitter as `settings` say -> floats, and the planes."""
    # Of depth no crop: a zoom would change what is a metre.
    smallest = 1.0 if settings.task == "depth" else settings.crop
    colours, planes = random_resized_crop(colours_bchw, planes, draws, size, smallest)
    colours, planes = random_flip(colours, planes, draws)
    rgb = color_jitter(colours[:, :3], draws, settings.jitter)
    if colours.shape[1] == 3:
        return rgb, planes
    return torch.cat((rgb, colours[:, 3:]), dim=1), planes
