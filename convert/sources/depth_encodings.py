"""From the depths of a file to millimetres: uint16, 0 = none.

Pictures of 8 and 16 bits are looked up in a table of every value, made once for a rule; other types
are computed. Both round to the nearest millimetre, half to even, from exact numbers in float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from convert.sources.errors import BadRow
from shards.errors import WrongSetting
from shards.spec import MAX_DEPTH_MM

TOO_FAR = 65535  # stands for millimetres that do not fit
NYU_RAW_NOTHING = 2047  # the greatest value of the sensor's 11 bits
NYU_RAW_ZERO = 1092.5  # readings from here on are of no distance
NYU_RAW_MAX_MM = 10_000
VOID_2D3DS = 65535
HYPERSIM_FOCAL = 886.81 / 1024  # focal length as a share of the picture's width


# ------------------------------------------------------------------------------------- encodings


def _units(units_a_metre: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda stored: stored * 1000.0 / units_a_metre


def _sunrgbd(stored: np.ndarray) -> np.ndarray:
    """The bits are rotated by 3; the low three hold what is beyond 8,191 mm."""
    bits = stored.astype(np.uint16)
    return ((bits >> 3) | (bits << 13)).astype(np.float64)


def _2d3ds(stored: np.ndarray) -> np.ndarray:
    return np.where(stored == VOID_2D3DS, 0.0, stored * 1000.0 / 512)


def _nyu_raw(stored: np.ndarray) -> np.ndarray:
    """The readings of a Kinect; what comes out negative, or beyond 10 m, is none."""
    mm = 351_300.0 / (NYU_RAW_ZERO - stored)
    return np.where((mm < 0) | (mm > NYU_RAW_MAX_MM), 0.0, mm)


def _hypersim(stored: np.ndarray) -> np.ndarray:
    """Metres along the ray of each pixel become depths.

    Scenes taken with a tilted lens, of which Hypersim has some, come out approximately.
    """
    return stored * 1000.0 * _depth_of_a_ray(*stored.shape)


@lru_cache(maxsize=8)
def _depth_of_a_ray(height: int, width: int) -> np.ndarray:
    """(H, W): the depth of a point one metre along the ray of each pixel's centre."""
    focal = HYPERSIM_FOCAL * width
    x = np.arange(width) + 0.5 - width / 2
    y = np.arange(height) + 0.5 - height / 2
    return focal / np.sqrt(x[None, :] ** 2 + y[:, None] ** 2 + focal**2)


@dataclass(frozen=True)
class Encoding:
    """to_mm: of stored values as float64, to exact millimetres. kinds: of numpy's types that files
    in it have, "u" whole and "f" floats. is_16_bit: it says what each of the 16 bits means.
    """

    to_mm: Callable[[np.ndarray], np.ndarray]
    kinds: str = "uf"
    is_16_bit: bool = False


ENCODINGS = {
    "mm": Encoding(_units(1000)),
    "metres": Encoding(_units(1)),
    "sunrgbd": Encoding(_sunrgbd, "u", is_16_bit=True),
    "tum": Encoding(_units(5000)),
    "matterport": Encoding(_units(4000)),
    "2d3ds": Encoding(_2d3ds, "u", is_16_bit=True),
    "nyu_raw": Encoding(_nyu_raw, "u", is_16_bit=True),
    "hypersim": Encoding(_hypersim, "f"),
}


# ------------------------------------------------------------------------------------------ a rule


@dataclass(frozen=True, kw_only=True)
class DepthRule:
    """How the depths of a source become millimetres.

    encoding: a name of ENCODINGS. scale: stored units a metre, by which is divided, as in Open3D.
    Where neither is given, whole numbers are millimetres and floats metres. trunc_m: what is
    farther, in metres, becomes 0; infinity is farther than that.
    """

    encoding: str | None = None
    scale: float | None = None
    trunc_m: float | None = None

    @property
    def is_little_endian_pnm(self) -> bool:
        """Whether its 16-bit PNM have their bytes against the format's rule."""
        return self.encoding == "nyu_raw"

    @property
    def is_of_each_pixel(self) -> bool:
        """Whether a value means the same wherever in the picture it is."""
        return self.encoding != "hypersim"

    def to_mm(self, stored_hw: np.ndarray) -> np.ndarray:
        """(H, W) uint16 millimetres, 0 = none, of (H, W) uint8, uint16, uint32 or float.

        NaN, as renderers write where a ray met nothing, is none. Raises BadRow for negative depths,
        for what is beyond 32.767 m and not cut off, and for a type that the encoding has not.
        """
        self._check_type(stored_hw)
        if stored_hw.dtype in (np.uint8, np.uint16):
            mm_hw = _table(self).take(stored_hw, mode="clip")  # the fastest mode
        else:
            mm_hw = self.computed(stored_hw)
        if mm_hw.max() == TOO_FAR:
            most = f"{MAX_DEPTH_MM / 1000} m"
            raise BadRow(f"has depths beyond {most}: a depth_trunc would set them to 0")
        return mm_hw

    def _check_type(self, stored: np.ndarray) -> None:
        dtype = stored.dtype
        is_named = self.encoding is not None or self.scale is not None
        if dtype == np.uint8 and not is_named:
            raise BadRow("is an 8-bit picture, and 8-bit depth needs a named encoding")
        if self.encoding is None:
            return

        encoding = ENCODINGS[self.encoding]
        is_right_size = not encoding.is_16_bit or dtype == np.uint16
        if dtype.kind not in encoding.kinds or not is_right_size:
            raise BadRow(f"has depths of type {dtype}, which are not {self.encoding}")
        if self.encoding == "nyu_raw" and stored.max() > NYU_RAW_NOTHING:
            what = f"up to {stored.max()}, and nyu_raw ends at {NYU_RAW_NOTHING}"
            raise BadRow(f"has readings {what}: the order of their bytes may be the other one")

    def computed(self, stored: np.ndarray) -> np.ndarray:
        """uint16, pixel by pixel, without a table; TOO_FAR for what does not fit. Raises BadRow."""
        values = stored.astype(np.float64)
        if (values < 0).any():
            raise BadRow(f"has negative depths, down to {np.nanmin(values):g}")
        values[np.isnan(values)] = 0
        mm = self._exact_mm(values, stored.dtype)
        if self.trunc_m is not None:
            mm[mm > self.trunc_m * 1000] = 0
        mm = np.rint(mm)
        mm[mm > MAX_DEPTH_MM] = TOO_FAR
        return mm.astype(np.uint16)

    def _exact_mm(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        if self.encoding is not None:
            return ENCODINGS[self.encoding].to_mm(values)
        usual = 1 if dtype.kind == "f" else 1000
        return _units(self.scale or usual)(values)


@lru_cache(maxsize=16)
def _table(rule: DepthRule) -> np.ndarray:
    """(65536,): what each stored value becomes."""
    return rule.computed(np.arange(65536, dtype=np.uint16))


def check_names(
    encoding: str | None = None, scale: float | None = None, trunc_m: float | None = None
) -> None:
    """Raise WrongSetting for settings of which no DepthRule can be made."""
    if encoding is not None and encoding not in ENCODINGS:
        raise WrongSetting("depth_encoding", encoding, f"choose one of {', '.join(ENCODINGS)}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise WrongSetting("depth_scale", scale, "give the stored units a metre, such as 1000")
    if scale is not None and encoding is not None:
        already = f"the encoding {encoding} says that already: leave one of them out"
        raise WrongSetting("depth_scale", scale, already)
    if trunc_m is not None and not (math.isfinite(trunc_m) and trunc_m > 0):
        raise WrongSetting("depth_trunc", trunc_m, "give metres, such as 10")


# -------------------------------------------------------------------------- what a unit looks like

NEARLY_ALL = 0.9
FAR_FOR_A_ROOM = 10_000  # millimetres, as the median of a picture


def looks_undecoded(planes: Sequence[np.ndarray]) -> str | None:
    """The encoding of which a few uint16 planes are, that would be read as millimetres.

    planes: (H, W) each, as stored. None where they may well be millimetres. Only what is sure is
    named: depths rotated as in SUN RGB-D are multiples of 8 (but for those beyond 8 m), and TUM's,
    whose sensor gave millimetres, of 5; both with a median that would be farther than a room. A
    Kinect's readings end below 1,093, but for the 2,047 of pixels without one; their bytes may lie
    the other way round.
    """
    measured = [plane[plane > 0] for plane in planes if plane.dtype == np.uint16]
    values = np.concatenate([*measured, np.zeros(0, np.uint16)])
    if not len(values):
        return None
    if _are_readings(values) or _are_readings(values.byteswap()):
        return "nyu_raw"
    if np.median(values) <= FAR_FOR_A_ROOM:
        return None
    for name, divisor in (("sunrgbd", 8), ("tum", 5)):
        if np.mean(values % divisor == 0) > NEARLY_ALL:
            return name
    return None


def _are_readings(values: np.ndarray) -> bool:
    """Whether the 11 bits of a Kinect fit: nothing lies between its last reading and `none`."""
    if values.max() != NYU_RAW_NOTHING:
        return False
    readings = values[values < NYU_RAW_NOTHING]
    return len(readings) > 0 and readings.max() < NYU_RAW_ZERO
