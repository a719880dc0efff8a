"""Where a stored pixel lies in the sensor's picture, and the ray on which the sensor saw it.

What is special to a dataset (its camera, its crops, the size of the sensor's pictures) is in the
specification that the set carries.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from shards.spec import Box, Camera, DatasetSpec
from train.data import ShardDataset

Shares = TypeVar("Shares", Tensor, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class CropBox:
    """A window of a picture, in its pixels; `bottom` and `right` are the first ones outside.

    `height` and `width` are those of the whole picture.
    """

    top: float
    bottom: float
    left: float
    right: float
    height: int
    width: int

    def rows_at(self, shares: Shares) -> Shares:
        """0..1, from the top of the window to its bottom -> rows of the picture."""
        return self.top + (self.bottom - self.top) * shares

    def columns_at(self, shares: Shares) -> Shares:
        """0..1, from the left of the window to its right -> columns of the picture."""
        return self.left + (self.right - self.left) * shares


def rays(size: int, box: CropBox, camera: Camera) -> tuple[Tensor, Tensor]:
    """How far right of the camera's axis, and below it, a pixel's point lies, per metre of depth.

    size: of the stored pictures. box: the window of the sensor's picture that they show. Returns
    (x, y), float32 [1, size, size] each.
    """
    centres = (torch.arange(size) + 0.5) / size
    x_of_column = (box.columns_at(centres) - camera.cx) / camera.fx
    y_of_row = (box.rows_at(centres) - camera.cy) / camera.fy

    x_1hw = x_of_column.expand(1, size, size)
    y_1hw = y_of_row[:, None].expand(1, size, size)
    return x_1hw, y_1hw


def rays_of_cameras(size: int, cameras_b4: Tensor) -> tuple[Tensor, Tensor]:
    """The same of pictures that each have a camera of their own.

    cameras: [B, 4] focal lengths and centres as shares of the stored pictures, none of them 0.
    Returns (x, y), float32 [B, 1, size, size] each.
    """
    n_rows = len(cameras_b4)
    centres = (torch.arange(size, device=cameras_b4.device) + 0.5) / size
    fx, fy, cx, cy = cameras_b4.float().view(n_rows, 4, 1).unbind(1)
    x_of_column_bs = (centres - cx) / fx
    y_of_row_bs = (centres - cy) / fy

    x_b1hw = x_of_column_bs[:, None, None, :].expand(n_rows, 1, size, size)
    y_b1hw = y_of_row_bs[:, None, :, None].expand(n_rows, 1, size, size)
    return x_b1hw, y_b1hw


# ---------------------------------------------------------------- what a dataset says of itself


def crop_box_of(dataset: ShardDataset) -> CropBox:
    """The window of the sensor's picture that the dataset stores."""
    return window(dataset.shard_set.dataset, dataset.crop_box)


def scored_box_of(dataset: ShardDataset) -> CropBox:
    """The window of the sensor's picture in which depth is scored."""
    spec = dataset.shard_set.dataset
    return window(spec, spec.crop_box(spec.depth_crop))


def window(spec: DatasetSpec, box: Box) -> CropBox:
    """A box of a dataset's pictures, with their size; where they differ in size, all of each."""
    if not spec.width:
        return CropBox(top=0, bottom=1, left=0, right=1, height=1, width=1)
    return CropBox(
        top=box.top,
        bottom=box.bottom,
        left=box.left,
        right=box.right,
        height=spec.height,
        width=spec.width,
    )
