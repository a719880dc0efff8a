"""One pure function per kind of field: the plane as stored (W, H) -> the picture at SIZE x SIZE.

Every function takes the transposed planes that MATLAB stores, works on them as they lie, and
transposes only the small result. The same pixels as a picture (H, W[, 3]) give the same bytes: of
one plane it is seen as (W, H), of colour it has a function that adds up the same products.

rgb        antialiased bilinear (a triangle filter as wide as the scale): without it thin edges
           alias; at most one grey level from the exact result, and the same bytes on every machine.
depth      nearest by default: source index floor((i + 0.5) * in / out). Every value is one that was
           measured, and an edge stays an edge; averaging across an edge invents points in mid-air.
           `area` averages over valid pixels.
raw_depth  as depth; holes (0) are never averaged in.
label      nearest: an average of class ids is another class.
instance   nearest, with the same indices as label, so that (label, instance) stays a pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shards.spec import MAX_DEPTH_MM, Box, Field

ROWS_AT_ONCE = 120  # of 640 pixels: few enough to stay in a processor's cache


class ValueRangeError(ValueError):
    """A value that the stored dtype cannot hold, or that the field cannot have."""


@lru_cache(maxsize=32)
def nearest_indices(n_in: int, n_out: int) -> np.ndarray:
    """Pixel centres: floor((i + 0.5) * in / out), in integers."""
    return (2 * np.arange(n_out, dtype=np.intp) + 1) * n_in // (2 * n_out)


def nearest(plane_wh: np.ndarray, size: int) -> np.ndarray:
    """(W, H) -> (size, size) rows x columns, values unchanged."""
    columns, rows = (nearest_indices(side, size) for side in plane_wh.shape)
    # No index is beyond the end: "clip" only saves the buffer that numpy takes in case one was.
    if plane_wh.flags.f_contiguous:  # it lies as (H, W): whole rows are taken first
        return plane_wh.T.take(rows, 0, mode="clip").take(columns, 1, mode="clip")
    return plane_wh.take(columns, 0, mode="clip").take(rows, 1, mode="clip").T


@lru_cache(maxsize=32)
def _area_weights(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): the share of each source pixel inside each output pixel."""
    edges = np.arange(n_out + 1) * (n_in / n_out)
    pixels = np.arange(n_in)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None)


def area(metres_wh: np.ndarray, size: int) -> np.ndarray:
    """(W, H) metres -> (size, size) metres: the mean of the valid (> 0) pixels inside.

    0 where there is none.
    """
    width, height = metres_wh.shape
    across = _area_weights(width, size)
    down = _area_weights(height, size)
    valid = across @ (metres_wh > 0).astype(np.float64) @ down.T
    total = across @ metres_wh.astype(np.float64) @ down.T
    return np.divide(total, valid, out=np.zeros_like(total), where=valid > 1e-9).T


@lru_cache(maxsize=32)
def _triangle_bands(
    n_in: int, n_out: int, bits: int, gain: float
) -> list[tuple[slice, slice, np.ndarray]]:
    """The antialiased bilinear weights as narrow blocks.

    Each is (outputs, the inputs they need, float32 weights x gain). Weights are whole multiples of
    2**-bits that add up to 1: rounded running sums, so that errors do not add up.
    """
    scale = n_in / n_out
    centres = (np.arange(n_out)[:, None] + 0.5) * scale
    exact = np.clip(1 - np.abs(np.arange(n_in) + 0.5 - centres) / max(scale, 1.0), 0, None)
    running = np.cumsum(exact / exact.sum(1, keepdims=True), axis=1)
    weights = np.diff(np.rint(running * 2**bits), axis=1, prepend=0) * 2.0**-bits * gain

    bands = []
    for start in range(0, n_out, 8):  # small products, which BLAS does in the calling thread
        rows = weights[start : start + 8]
        used = np.flatnonzero(rows.any(0))
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((slice(start, start + len(rows)), inputs, rows[:, inputs].astype(np.float32)))
    return bands


def rgb(planes_cwh: np.ndarray, size: int) -> np.ndarray:
    """(3, W, H) uint8 -> (3, size, size) uint8, antialiased bilinear, across and then down.

    Every product and sum is a whole number below 2**24 (times a power of two), which float32 holds
    exactly: the result is the same on every processor, whatever the order of summation. Between the
    passes 1/16 of a grey level is kept. Any number of planes will do; of uint16 the same holds in
    float64, below 2**53.
    """
    working = np.float32 if planes_cwh.dtype == np.uint8 else np.float64
    channels, width, height = planes_cwh.shape

    across = np.empty((channels, size, height), working)
    for outputs, inputs, weights in _triangle_bands(width, size, 16, 16.0):
        np.matmul(weights, planes_cwh[:, inputs].astype(working), out=across[:, outputs])

    columns = np.rint(across, out=across).transpose(0, 2, 1)
    small = np.empty((channels, size, size), working)
    for outputs, inputs, weights in _triangle_bands(height, size, 12, 1 / 16):
        np.matmul(weights, columns[:, inputs], out=small[:, outputs])
    return np.rint(small, out=small).astype(planes_cwh.dtype)


def rgb_of_picture(picture_hwc: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, size, size) uint8: what `rgb` makes of its planes.

    Some rows at a time are taken apart into lines of one channel each.
    """
    height, width, channels = picture_hwc.shape
    across = np.empty((height, channels, size), np.float32)
    samples = np.empty((ROWS_AT_ONCE, channels, width), np.float32)
    for start in range(0, height, ROWS_AT_ONCE):
        rows = picture_hwc[start : start + ROWS_AT_ONCE].transpose(0, 2, 1)
        block = samples[: len(rows)]
        block[...] = rows
        lines = block.reshape(-1, width)
        lines_across = across[start : start + ROWS_AT_ONCE].reshape(-1, size)
        for outputs, inputs, weights in _triangle_bands(width, size, 16, 16.0):
            np.matmul(lines[:, inputs], weights.T, out=lines_across[:, outputs])
        np.rint(lines_across, out=lines_across)

    columns = across.reshape(height, channels * size)
    small = np.empty((size, channels * size), np.float32)
    for outputs, inputs, weights in _triangle_bands(height, size, 12, 1 / 16):
        np.matmul(weights, columns[inputs], out=small[outputs])
    whole = np.rint(small, out=small).astype(np.uint8)
    return whole.reshape(size, channels, size).transpose(1, 0, 2)


def depth_mm(metres_wh: np.ndarray, size: int, method: str) -> np.ndarray:
    """(W, H) float metres -> (size, size) uint16 millimetres; 0 = no measurement.

    Raises ValueRangeError for NaN, infinite, negative or beyond 32.767 m anywhere in the source
    plane.
    """
    low = metres_wh.min()  # NaN goes through both
    high = metres_wh.max()
    if not (low >= 0 and high * 1000 < MAX_DEPTH_MM + 0.5):
        raise ValueRangeError(f"depth outside 0 .. {MAX_DEPTH_MM / 1000} m (found {low} .. {high})")
    small = area(metres_wh, size) if method == "area" else nearest(metres_wh, size)
    return np.rint(small.astype(np.float64) * 1000).astype("<u2")


def depth_of_mm(mm_wh: np.ndarray, size: int, method: str) -> np.ndarray:
    """(W, H) uint16 millimetres, at most MAX_DEPTH_MM -> (size, size) uint16; 0 = none."""
    if method == "nearest":
        return nearest(mm_wh, size)
    return np.rint(area(mm_wh, size)).astype("<u2")


def ids(plane_wh: np.ndarray, size: int, highest: int | None) -> np.ndarray:
    """(W, H) ids -> (size, size), unchanged. Raises ValueRangeError above `highest`."""
    if highest is not None and plane_wh.max() > highest:
        raise ValueRangeError(f"label {plane_wh.max()} is beyond the {highest} classes")
    return nearest(plane_wh, size)


def grey(plane_wh: np.ndarray, size: int) -> np.ndarray:
    """(W, H) uint8 or uint16 -> (size, size) of the same, as one plane of rgb."""
    return rgb(plane_wh[None], size)[0]


@dataclass(frozen=True)
class StoredPixels:
    """A plane (H, W) as it is in its file. `meaning` makes of its values what a set has, each by
    itself: so it may be asked of the few pixels that are kept.
    """

    pixels: np.ndarray
    meaning: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pixels.shape

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes


def as_meant(row: np.ndarray | StoredPixels) -> np.ndarray:
    """(H, W[, 3]) with the meaning that it has in a set."""
    return row.meaning(row.pixels) if isinstance(row, StoredPixels) else row


@dataclass(frozen=True, kw_only=True)
class Resizer:
    """Rows of one field as they are decoded -> as they are stored.

    is_hw: whether rows are pictures (H, W[, 3]), and not planes ([3,] W, H).
    """

    field: Field
    size: int
    box: Box | None = None  # of the decoded picture; None: all of it
    depth_resize: str = "nearest"
    highest_id: int | None = None
    is_hw: bool = False

    def __call__(self, row: np.ndarray | StoredPixels) -> np.ndarray:
        """([3,] W, H), or where `is_hw` (H, W[, 3]) -> ([3,] size, size).

        Raises ValueRangeError, and what the meaning of stored pixels raises.
        """
        if isinstance(row, StoredPixels):
            if self._takes_nearest:
                return row.meaning(nearest(row.pixels.T, self.size))
            row = as_meant(row)
        if self.is_hw and self.field.kind == "colour":
            return rgb_of_picture(row, self.size)
        return self._of_planes(row.T if self.is_hw else row)

    @property
    def _takes_nearest(self) -> bool:
        """Whether a stored pixel is one of the picture's, and no average."""
        if self.field.kind == "depth":
            return self.depth_resize == "nearest"
        return self.field.kind == "id"

    def _of_planes(self, row: np.ndarray) -> np.ndarray:
        if self.box is not None:
            row = row[..., self.box.left : self.box.right, self.box.top : self.box.bottom]
        if self.field.kind == "colour":
            return rgb(row, self.size)
        if self.field.kind in ("grey", "grey16"):
            return grey(row, self.size)
        if self.field.kind == "depth" and row.dtype == np.uint16:
            return depth_of_mm(row, self.size, self.depth_resize)
        if self.field.kind == "depth":
            return depth_mm(row, self.size, self.depth_resize)
        return ids(row, self.size, self.highest_id)
