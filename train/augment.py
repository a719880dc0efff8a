"""Batch augmentation on the device: stored integers in, network input out.

Random numbers are drawn on the CPU for the whole batch of all ranks, so neither the device nor the number of ranks
changes a picture. `planes` are sampled nearest, beside RGB: depth, its rays, dense targets; [B,1,H,W] or [B,H,W].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.format import CROP_BOXES
from train.settings import Settings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE_C11 = torch.tensor([1 / (255 * s) for s in IMAGENET_STD])[:, None, None]
SHIFT_C11 = torch.tensor([m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)])[:, None, None]
Pictures = tuple[Tensor, list[Tensor]]
View = tuple[float, float, float]  # top, left, side, as shares of the picture
WHOLE: View = (0.0, 0.0, 1.0)


class Draws:
    """Uniform numbers for the rows of one batch: `mine` of the `n_rows` of all ranks."""

    def __init__(self, seed: int, n_rows: int, mine: Any = slice(None), device: Any = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.n_rows, self.mine, self.device = n_rows, mine, device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """[rows of this rank, *shape] on the device."""
        drawn = low + (high - low) * torch.rand((self.n_rows, *shape), generator=self.generator)
        return drawn[self.mine].to(self.device, non_blocking=True)


def normalize_rgb(rgb_bchw: Tensor) -> Tensor:
    """Grey levels 0..255 [B,3,H,W] -> float32, ImageNet mean and standard deviation."""
    return rgb_bchw * SCALE_C11.to(rgb_bchw.device) - SHIFT_C11.to(rgb_bchw.device)


def normalize_depth(depth_mm_b1hw: Tensor, mean_m: float, std_m: float) -> Tensor:
    """int16 millimetres [B,1,H,W] -> float32 (metres - mean) / std; a pixel without a measurement is exactly 0."""
    return torch.where(depth_mm_b1hw > 0, (depth_mm_b1hw * 1e-3 - mean_m) / std_m, 0.0)


def rays(size: int, crop: str) -> tuple[Tensor, Tensor]:
    """[1, S, S] each: how far right of the camera's axis and below it a pixel's point lies, per metre of depth."""
    top, bottom, left, right = CROP_BOXES[crop]
    share = (torch.arange(size) + 0.5) / size
    x, y = left + (right - left) * share, top + (bottom - top) * share
    x, y = (x - 325.58) / 518.86, (y - 253.74) / 519.47  # the camera's centre and focal lengths, from the set's toolbox
    return x.expand(1, size, size), y[:, None].expand(1, size, size)


def surface(depth_mm_b1hw: Tensor, x_b1hw: Tensor, y_b1hw: Tensor, stats: tuple[float, float]) -> Tensor:
    """[B,5,H,W]: normalised depth, metres below the camera's axis, the normal; 0 where nothing was measured.

    `x`, `y`: the rays of these very pixels; the picture's right is x also where it was mirrored. Normals point to the
    camera: differences between means of 3x3 points beside the pixel. `stats`: depth's mean and deviation in metres.
    """
    metres, known = depth_mm_b1hw * 1e-3, depth_mm_b1hw > 0
    x_b1hw = x_b1hw * torch.sign(x_b1hw[..., :1, -1:] - x_b1hw[..., :1, :1])
    points = torch.cat((metres * x_b1hw, metres * y_b1hw, metres, known), dim=1)
    wide = F.pad(points, (2, 2, 2, 2), mode="replicate")
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    left, right, above, below = sums[..., 1:-1, :-2], sums[..., 1:-1, 2:], sums[..., :-2, 1:-1], sums[..., 2:, 1:-1]
    across, down = _difference(left, right), _difference(above, below)
    product = down.roll(-1, 1) * across.roll(1, 1) - down.roll(1, 1) * across.roll(-1, 1)  # faster than torch's cross
    normals = product * (product.square().sum(dim=1, keepdim=True) + 1e-18).rsqrt()
    planes = torch.cat((normalize_depth(depth_mm_b1hw, *stats), points[:, 1:2], normals), dim=1)
    return torch.where(known, planes, 0.0)


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """Between the means of two sums of points (x, y, z, their number); 0 where one of them has none."""
    n_before, n_after = before[:, 3:], after[:, 3:]
    between = after[:, :3] / n_after.clamp(min=1) - before[:, :3] / n_before.clamp(min=1)
    return between * ((n_before > 0) & (n_after > 0))


def to_input(rgb_bchw: Tensor, planes: list[Tensor], stats: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """RGB and depth as the network sees them; `planes`: depth, and its rays where it sees surfaces."""
    depth_mm_b1hw, *xy = planes
    depth = surface(depth_mm_b1hw, xy[0], xy[1], stats) if xy else normalize_depth(depth_mm_b1hw, *stats)
    return normalize_rgb(rgb_bchw), depth


def _window(rgb_bchw: Tensor, planes: list[Tensor], size: int, corner: list[Tensor], extent: list[Tensor]) -> Pictures:
    """A window of each row (from the top left, as shares [B, 1] of the picture): bilinear RGB, nearest planes.

    RGB is first averaged down to at most twice `size`: bilinear sampling alone would skip pixels.
    """
    height, width = rgb_bchw.shape[-2:]
    centres_s = (torch.arange(size, device=rgb_bchw.device) + 0.5)[None, :] / size
    y_bs, x_bs = ((at + n * centres_s) * side for at, n, side in zip(corner, extent, (height, width), strict=True))
    n = -(-height // (2 * size))
    coarse = F.avg_pool2d(rgb_bchw.float(), n, ceil_mode=True)
    y, x = (2 * at / (n * side) - 1 for at, side in zip((y_bs, x_bs), coarse.shape[-2:], strict=True))
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    rgb = F.grid_sample(coarse, grid, mode="bilinear", padding_mode="border", align_corners=False)
    rows = y_bs.long().clamp(0, height - 1)[:, :, None]
    columns = x_bs.long().clamp(0, width - 1)[:, None, :]
    batch = torch.arange(len(rgb), device=rgb.device)[:, None, None]
    return rgb, [p.view(len(p), height, width)[batch, rows, columns].view(*p.shape[:-2], size, size) for p in planes]


def views(smallest: float) -> list[View]:
    """The whole picture, its corners and its centre; these as large as training crops are in the mean."""
    side = ((1 + smallest) / 2) ** 0.5
    far = 1 - side
    crops = [(0.0, 0.0), (0.0, far), (far, 0.0), (far, far), (far / 2, far / 2)]
    return list(dict.fromkeys([WHOLE, *((*corner, side) for corner in crops)]))


def resize(rgb_bchw: Tensor, planes: list[Tensor], size: int, view: View = WHOLE) -> Pictures:
    """The same view of every picture at size x size, resampled as the training crops are."""
    if rgb_bchw.shape[-2:] == (size, size) and view == WHOLE:
        return rgb_bchw, planes
    top, left, side = (torch.full((len(rgb_bchw), 1), share, device=rgb_bchw.device) for share in view)
    return _window(rgb_bchw, planes, size, [top, left], [side, side])


def random_resized_crop(rgb_bchw: Tensor, planes: list[Tensor], draws: Draws, size: int, smallest: float) -> Pictures:
    """One crop a row, resampled to size x size: `smallest`..1 of the area, its aspect ratio 3/4..4/3 where it fits."""
    area, aspect = draws.uniform(1, low=smallest), torch.exp2(draws.uniform(1, low=-0.415, high=0.415))
    high, wide = ((area * ratio).sqrt().clamp(max=1.0) for ratio in (1 / aspect, aspect))
    top, left = (1 - high) * draws.uniform(1), (1 - wide) * draws.uniform(1)
    return _window(rgb_bchw, planes, size, [top, left], [high, wide])


def random_flip(rgb_bchw: Tensor, planes: list[Tensor], draws: Draws) -> Pictures:
    """Mirror each row left to right with probability one half."""
    flip_b = draws.uniform() < 0.5
    flipped = [torch.where(flip_b.view(-1, *[1] * (p.ndim - 1)), p.flip(-1), p) for p in (rgb_bchw, *planes)]
    return flipped[0], flipped[1:]


def _grey(rgb_bchw: Tensor) -> Tensor:
    """[B, 1, H, W]: luma by ITU-R BT.601."""
    red, green, blue = rgb_bchw.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def color_jitter(rgb_bchw: Tensor, draws: Draws, strength: float) -> Tensor:
    """Brightness, contrast and saturation, each scaled by a row's own 1 - strength .. 1 + strength; float, 0..255."""
    brightness, contrast, saturation = (draws.uniform(1, 1, 1, low=1 - strength, high=1 + strength) for _ in range(3))
    rgb = (rgb_bchw.float() * brightness).clamp(0, 255)
    mean = _grey(rgb).mean(dim=(1, 2, 3), keepdim=True)
    rgb = (mean + (rgb - mean) * contrast).clamp(0, 255)
    grey = _grey(rgb)
    return (grey + (rgb - grey) * saturation).clamp(0, 255)


def augment(rgb_bchw: Tensor, planes: list[Tensor], draws: Draws, size: int, how: Settings) -> Pictures:
    """Crop, flip and colour jitter: float RGB 0..255 and the planes, all size x size."""
    smallest = 1.0 if how.task == "depth" else how.crop  # a zoom would change what is a metre
    rgb, planes = random_resized_crop(rgb_bchw, planes, draws, size, smallest)
    rgb, planes = random_flip(rgb, planes, draws)
    return color_jitter(rgb, draws, how.jitter), planes
