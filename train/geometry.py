"""Where a stored pixel lies in the sensor's picture, and the ray on which the sensor saw it.

What is special to a dataset (its camera, its crops, the size of the sensor's pictures) is asked for
in this file alone.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from shards.format import CROP_BOXES
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

    def scaled_to(self, height: int, width: int) -> "CropBox":
        """The same window in the picture at another size."""
        return CropBox(
            top=self.top * height / self.height,
            bottom=self.bottom * height / self.height,
            left=self.left * width / self.width,
            right=self.right * width / self.width,
            height=height,
            width=width,
        )


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Focal lengths and centre of a pinhole camera, in pixels of the whole picture."""

    fx: float
    fy: float
    cx: float
    cy: float


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


# ---------------------------------------------------------------- what a dataset says of itself


NYU_CAMERA = Camera(fx=518.86, fy=519.47, cx=325.58, cy=253.74)  # from the set's toolbox
NYU_HEIGHT = 480
NYU_WIDTH = 640


def crop_box(name: str) -> CropBox:
    """The window that a crop of this name keeps."""
    top, bottom, left, right = CROP_BOXES[name]
    return CropBox(
        top=top, bottom=bottom, left=left, right=right, height=NYU_HEIGHT, width=NYU_WIDTH
    )


def crop_box_of(dataset: ShardDataset) -> CropBox:
    """The window of the sensor's picture that the dataset stores."""
    return crop_box(dataset.crop)


def scored_box() -> CropBox:
    """The window of the sensor's picture in which depth is scored: the crop of Eigen et al."""
    return crop_box("eigen")


def camera_of(dataset: ShardDataset) -> Camera:
    """The camera that took every picture of the dataset: so far there is one dataset."""
    return NYU_CAMERA
