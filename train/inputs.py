"""What a network is asked with: a batch as stored, on the device; then as the network sees it.

batch (rgb, depth, thermal, ..., target)
  on_device          colours [B, 3 + n, H, W], planes [depth, x, y, ...], target
  ... augment or resize, which sample all colours alike and all planes alike ...
  network_inputs     a picture of each stream
"""

import torch
from torch import Tensor

from train.augment import to_input
from train.data import CAMERA
from train.geometry import rays_of_cameras
from train.job import NetworkSetup

Batch = tuple[Tensor, ...]
DEPTHS = ("depth", "raw_depth")  # of which a batch has the one that a task needs, or none


def on_device(setup: NetworkSetup, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor]:
    """Colours; planes; the target, a depth only where the sensor measured.

    batch: `setup.batch_fields`, then the target. Colours are RGB and the further fields of colours
    or grey levels [B, 3 + n, H, W]; planes are depth in millimetres, then the rays where the
    network sees surfaces, then further depths, [B, 1, H, W] each.
    """
    *parts, target = (part.to(setup.device, non_blocking=True) for part in batch)
    stored = dict(zip(setup.batch_fields, parts, strict=True))
    rgb = stored["rgb"]
    depth = _depth_of(stored)

    colours = [stored[each.name] for each in setup.further_colours]
    further_depths = [stored[each.name] for each in setup.further_depths]
    rays = [plane.expand_as(depth) for plane in setup.rays]
    if setup.sees_surfaces and not rays:
        rays = list(rays_of_cameras(depth.shape[-1], stored[CAMERA.name]))

    if setup.learns_depth:
        target = torch.where(depth > 0, target, 0.0)
    all_colours = torch.cat([_as_levels(each) for each in (rgb, *colours)], 1) if colours else rgb
    return all_colours, [depth, *rays, *further_depths], target


def _depth_of(stored: dict[str, Tensor]) -> Tensor:
    """As stored; all 0 where the set has none."""
    for name in DEPTHS:
        if name in stored:
            return stored[name]
    return torch.zeros_like(stored["rgb"][:, :1], dtype=torch.int16)


def _as_levels(stored: Tensor) -> Tensor:
    """Floats where they are of 16 bits, with which torch hardly computes."""
    return stored.float() if stored.dtype == torch.uint16 else stored


def network_inputs(setup: NetworkSetup, colours: Tensor, planes: list[Tensor]) -> list[Tensor]:
    """Pictures as stored or augmented -> what the network is called with, float32 [B,C,H,W] each.

    Of ours a picture a stream; a network of a user's own is given RGB, depth where it is not
    learnt, and the further fields.
    """
    n_further = len(setup.further_depths)
    n_depth = len(planes) - n_further
    statistics = setup.learnt.depth_statistics
    rgb, depth = to_input(colours[:, :3], planes[:n_depth], statistics, setup.scaling)
    seen = {"rgb": rgb, "depth": depth}

    start = 3
    for field in setup.further_colours:
        levels = colours[:, start : start + field.n_planes]
        seen[field.name] = field.normalized(levels)
        start += field.n_planes
    for field, plane in zip(setup.further_depths, planes[n_depth:], strict=True):
        seen[field.name] = field.normalized(plane)
    return [seen[name] for name in setup.network_fields]
