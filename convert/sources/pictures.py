"""A picture's bytes to pixels of one kind of field, the same ones on every machine.

JPEG and PNG, nearly all there is, are decoded by imagecodecs where it is installed: the fastest of
those compared, and equal to the others bit by bit (docs/measurements/converting.md). Without it
Pillow decodes them, and always TIFF, BMP, GIF, WebP and bitmaps; PNM and .npy are read here. What a
file is its first bytes tell, never its name: pictures named .png that hold JPEG data exist.

Colour profiles and gamma are passed over, as every reader of these datasets does; so is
transparency: alpha says how a picture is laid over another, and the colours under it are what was
photographed. Of animated files the first picture is taken.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np

from convert.sources.errors import BadRow
from convert.sources.picture_headers import (
    EXIF,
    GREY,
    JPEG_MAGIC,
    N_PLANES,
    PALETTE,
    PNG_MAGIC,
    JpegHeader,
    PngHeader,
    check_size,
    cut_short,
    exif_orientation,
    read_jpeg,
    read_png,
    undecodable,
)
from convert.sources.plain_arrays import NPY_MAGIC, PNM_MAGICS, read_npy, read_pnm
from shards.errors import UserError, one_line
from shards.spec import KINDS

INSTALL = "Install the extra frames: pip install 'nyuv2-shards[frames]'"
# What Pillow is asked for, by first bytes. Not among them: formats for which it starts programs.
PILLOW_FORMATS = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"RIFF": "WEBP",
    b"P1": "PPM",
    b"P4": "PPM",
}
MAX_ID = 65535
# In front of the end of a JPEG: a decoder that has its whole picture passes over them.
JUNK = np.random.default_rng(0).integers(0, 255, 4096, dtype=np.uint8).tobytes()
GREY_WITHOUT_DATA = (128, [128, 128, 128])  # the pixels for which a JPEG has no data


@dataclass(frozen=True)
class Picture:
    """The pixels of one file, as one kind of field has them.

    pixels: colour (H, W, 3) uint8; grey (H, W) uint8; grey16 (H, W) uint16; id (H, W) uint16;
    depth (H, W) uint8, uint16, uint32 or float, as stored. orientation: EXIF's, 1 to 8, which has
    been applied to the pixels.
    """

    pixels: np.ndarray
    orientation: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The samples of a picture, before it is known what they are for.

    samples: (H, W), or (H, W, 3) for colours. white: the sample that means white; 0 where none is
    known, as for floats. palette: (n, 3) uint8, the colours of which the samples are the indices.
    is_lossy: the samples are not exactly those that were saved. is_inverted: 0 was white.
    orientation: EXIF's; is_upright: it has been applied.
    """

    what: str  # the format
    samples: np.ndarray
    white: int
    orientation: int = 1
    palette: np.ndarray | None = None
    is_lossy: bool = False
    is_inverted: bool = False
    is_upright: bool = False


# ---------------------------------------------------------------------------------------- decoders


@cache
def _imagecodecs() -> Any:
    """The module; None where it is not installed, or was built without JPEG or PNG."""
    try:
        import imagecodecs

        is_whole = imagecodecs.JPEG8.available and imagecodecs.PNG.available
    except (ImportError, AttributeError):
        return None
    return imagecodecs if is_whole else None


@cache
def _pillow() -> Any:
    """The module PIL.Image; None where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return None
    # Sizes are checked here, and damaged EXIF is no news. A filter of warnings that is put up for
    # each call would be taken down again by another thread.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
    return Image


def decoder_name() -> str:
    """The decoders with their versions: "imagecodecs 2026.3.6, pillow 13.0.0".

    Raises UserError where none is installed.
    """
    found = []
    if _imagecodecs() is not None:
        found.append(f"imagecodecs {_imagecodecs().__version__}")
    if _pillow() is not None:
        found.append(f"pillow {_pillow().__version__}")
    if not found:
        raise UserError("reading pictures needs imagecodecs and pillow", INSTALL)
    return ", ".join(found)


def _needed_pillow(what: str) -> Any:
    """Raises UserError where it is not installed."""
    if _pillow() is None:
        raise UserError(f"reading {what} pictures needs pillow", INSTALL)
    return _pillow()


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """BadRow for whatever a decoder raises on damaged data: nearly every type there is."""
    try:
        yield
    except (BadRow, UserError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise undecodable(what, _reason(error)) from None


def _reason(error: Exception) -> str:
    """Without the address of an object that Pillow writes."""
    return one_line(error).partition(" <_io")[0]


# ------------------------------------------------------------------------------------------- facade


def decode(data: bytes, kind: str, *, little_endian: bool = False) -> Picture:
    """The pixels of a file, as a field of `kind` (a key of `shards.spec.KINDS`) has them.

    colour: a palette, grey and CMYK become RGB; 16 bits are scaled to 8 and rounded. grey: colours
    become their luma (ITU-R 601, as Pillow's mode L); 16 bits are scaled. grey16: 16-bit samples as
    they are. depth: one channel as stored, and none that was compressed with loss. id: of a palette
    the indices, of grey the samples unscaled, of 1, 2 and 4 bits too.

    little_endian: the two bytes of a PNM's sample, which are big-endian by its rule: NYU's raw
    depths break it.

    Raises BadRow, and UserError where the decoder for it is not installed.
    """
    return picture_of(_read(data, little_endian), kind)


def picture_of(stored: Stored, kind: str) -> Picture:
    """The samples as a field of `kind` has them, upright. Raises BadRow as `decode` does."""
    pixels = AS_KIND[kind](stored)
    turn = 1 if stored.is_upright else stored.orientation
    return Picture(_upright(pixels, turn), stored.orientation)


def as_kind(samples: np.ndarray, kind: str) -> np.ndarray:
    """The pixels of an array that is in no picture's format, by the rules for .npy.

    samples: (H, W), (H, W, 3) or (3, H, W). Returns what `Picture.pixels` are. Raises BadRow.
    """
    return picture_of(_of_array(samples), kind).pixels


def _read(data: bytes, little_endian: bool) -> Stored:
    if data.startswith(JPEG_MAGIC):
        return _read_jpeg(data)
    if data.startswith(PNG_MAGIC):
        return _read_png(data)
    if data.startswith(PNM_MAGICS):
        pnm = read_pnm(data, little_endian)
        return Stored(what="PNM", samples=pnm.samples, white=pnm.white)
    if data.startswith(NPY_MAGIC):
        return _of_array(read_npy(data))
    if not data:
        raise BadRow("is empty")
    return _read_by_pillow(data)


def _of_array(samples: np.ndarray) -> Stored:
    """An array as .npy has it: (H, W), (1, H, W), (H, W, 1), (H, W, 3) or (3, H, W)."""
    if samples.ndim == 3 and samples.shape[2] not in (1, 3) and samples.shape[0] in (1, 3):
        samples = np.moveaxis(samples, 0, 2)
    if samples.ndim == 3 and samples.shape[2] == 1:
        samples = samples[:, :, 0]
    if samples.ndim != 2 and (samples.ndim != 3 or samples.shape[2] != 3):
        raise BadRow(f"is an array of shape {samples.shape}, no picture")
    check_size(samples.shape[1], samples.shape[0])
    if samples.dtype.kind not in "buif":
        raise BadRow(f"is an array of {samples.dtype}, no picture")
    white = {"u1": 255, "u2": 65535, "b1": 1}.get(samples.dtype.str[1:], 0)
    return Stored(what="npy", samples=samples, white=white)


# ------------------------------------------------------------------------------------ JPEG and PNG


def _read_jpeg(data: bytes) -> Stored:
    header = read_jpeg(data)
    plain = header.plain(data)
    codecs = _imagecodecs()
    # Pillow alone makes colours of CMYK.
    by_codecs = codecs is not None and header.n_planes != 4
    decoder = codecs.jpeg8_decode if by_codecs else _jpeg_by_pillow
    with _decoding("JPEG"):
        samples = decoder(plain)
        if samples[-1, -1].tolist() in GREY_WITHOUT_DATA:
            _check_has_its_end(samples, data, header, decoder)
    n_planes = 1 if header.n_planes == 1 else 3
    _check_decoded("JPEG", samples, (header.height, header.width, n_planes))
    return Stored(
        what="JPEG", samples=samples, white=255, orientation=header.orientation, is_lossy=True
    )


def _jpeg_by_pillow(plain: bytes) -> np.ndarray:
    image = _needed_pillow("JPEG").open(BytesIO(plain), formats=["JPEG"])
    image.load()
    return np.asarray(image.convert("RGB") if image.mode == "CMYK" else image)


def _check_has_its_end(
    samples: np.ndarray, data: bytes, header: JpegHeader, decoder: Callable[[bytes], np.ndarray]
) -> None:
    """Raise BadRow where the data ends before the last pixel, though its end is marked.

    Decoders fill up with grey then, and say nothing. So where the last pixel is of that grey they
    are asked whether more data would change the picture.
    """
    plain = header.with_right_end(data).plain(data)
    with_more = plain[:-2] + JUNK + plain[-2:]
    if not np.array_equal(samples, decoder(with_more)):
        raise cut_short("JPEG")


def _read_png(data: bytes) -> Stored:
    header = read_png(data)
    with _decoding("PNG"):
        if _imagecodecs() is None or _is_better_by_pillow(header):
            samples = _png_by_pillow(data, header)
        else:
            samples = _png_by_codecs(data, header)
    n_planes = N_PLANES[header.colour_type]
    _check_decoded("PNG", samples, (header.height, header.width, n_planes))
    return Stored(
        what="PNG",
        samples=_unscaled(_without_alpha(samples), header.bits),
        white=header.white,
        orientation=header.orientation,
        palette=_palette(header.palette) if header.colour_type == PALETTE else None,
    )


def _is_better_by_pillow(header: PngHeader) -> bool:
    """imagecodecs has libpng print a warning for every interlaced one, though it is right."""
    return header.is_interlaced and not _has_16_bit_colours(header) and _pillow() is not None


def _has_16_bit_colours(header: PngHeader) -> bool:
    return header.bits == 16 and header.colour_type != GREY


def _png_by_codecs(data: bytes, header: PngHeader) -> np.ndarray:
    """Into an array of our own, which is emptied where decoding fails.

    imagecodecs (2026.3 to 2026.10 at least) then never lets go of the array. One that it makes
    itself it loses whole, and a reference to None with it: after some thousand damaged files that
    ends a process of Python 3.11.

    libpng inflates by zlib. libdeflate does in a third of the time: so where all is whole libpng
    gets the lines unpacked, and has their filters to undo (docs/measurements/converting.md).
    """
    n_planes = N_PLANES[header.colour_type]
    shape = (
        (header.height, header.width) if n_planes == 1 else (header.height, header.width, n_planes)
    )
    samples = np.empty(shape, np.uint16 if header.bits == 16 else np.uint8)
    codecs = _imagecodecs()
    lines = header.lines(data, codecs) if codecs.DEFLATE.available else None
    plain = header.plain(data) if lines is None else header.unpacked(lines, codecs)
    try:
        codecs.png_decode(plain, out=samples)
    except Exception:
        samples.resize(0, refcheck=False)
        raise
    return samples


def _png_by_pillow(data: bytes, header: PngHeader) -> np.ndarray:
    """As imagecodecs decodes it: samples of fewer than 8 bits scaled to 0..255.

    Raises UserError for colours of 16 bits, of which Pillow gives the upper 8 alone.
    """
    if _has_16_bit_colours(header):
        raise UserError("reading colours of 16 bits from PNG needs imagecodecs", INSTALL)
    header.check_whole(data)
    image = _needed_pillow("PNG").open(BytesIO(header.plain(data)), formats=["PNG"])
    image.load()
    samples = np.asarray(image)
    if image.mode == "1":
        return samples * np.uint8(255)
    return samples.astype(np.uint16) if header.bits == 16 else samples


def _check_decoded(what: str, samples: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Raise BadRow where the decoder found another picture than the header tells of."""
    n_planes = samples.shape[2] if samples.ndim == 3 else 1
    if (*samples.shape[:2], n_planes) != shape:
        raise undecodable(what, f"its header says {shape}, its data {samples.shape}")


def _without_alpha(samples: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) of samples that may have alpha behind them."""
    if samples.ndim == 2:
        return samples
    n_planes = samples.shape[2]
    return samples[:, :, :3] if n_planes >= 3 else samples[:, :, 0]


def _unscaled(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of 1, 2 or 4 bits as they were written, of which decoders make 0..255."""
    return samples // np.uint8(255 // (2**bits - 1)) if bits < 8 else samples


def _palette(colours: bytes) -> np.ndarray:
    """(256, 3): the colour of each index; black where none was given."""
    palette = np.zeros((256, 3), np.uint8)
    given = np.frombuffer(colours[: palette.size], np.uint8)
    palette.reshape(-1)[: len(given)] = given
    return palette


# ------------------------------------------------------------------------------- what Pillow reads

TIFF_BITS = 258  # its tags
TIFF_COMPRESSION = 259
TIFF_PHOTOMETRIC = 262
WHITE_IS_ZERO = 0
TIFF_JPEG = (6, 7)


def _read_by_pillow(data: bytes) -> Stored:
    """Any other format. Raises BadRow for what is none."""
    names = [name for magic, name in PILLOW_FORMATS.items() if data.startswith(magic)]
    if not names:
        raise BadRow(f"is no picture of a known format (it begins with {ascii(data[:8])[1:]})")
    what = names[0]
    pillow = _needed_pillow(what)
    with _decoding(what):
        image = pillow.open(BytesIO(data), formats=[what])
        check_size(*image.size)
        image.load()
    if what == "TIFF":
        return _of_tiff(image, data)

    exif = image.info.get("exif", b"").removeprefix(EXIF)
    # The other forms of WebP are lossy, or may be.
    is_lossy = what == "WEBP" and data[12:16] != b"VP8L"
    return replace(_of_image(image, what), orientation=exif_orientation(exif), is_lossy=is_lossy)


def _of_tiff(image: Any, data: bytes) -> Stored:
    """One that Pillow has turned upright while it decoded it. Raises BadRow."""
    stored = replace(
        _of_image(image, "TIFF"),
        orientation=exif_orientation(data),
        is_upright=True,
        is_lossy=image.tag_v2.get(TIFF_COMPRESSION) in TIFF_JPEG,
        is_inverted=image.tag_v2.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO,
    )
    bits = max(image.tag_v2.get(TIFF_BITS, (1,)))
    if bits > 8 and stored.samples.ndim == 3:  # Pillow gives the upper 8
        raise BadRow(f"is a TIFF with colours of {bits} bits: as PNG they can be read")
    if image.mode == "L" and bits < 8:
        unscaled = _unscaled(stored.samples, bits)
        return replace(stored, samples=unscaled, white=2**bits - 1)
    return stored


def _of_image(image: Any, what: str) -> Stored:
    """A loaded image of Pillow's. Raises BadRow for a mode that no camera has."""
    if image.mode in ("P", "PA"):
        palette = _palette(bytes(image.getpalette("RGB")))
        samples = np.asarray(image)
        indices = samples if samples.ndim == 2 else samples[:, :, 0]
        return Stored(what=what, samples=indices, white=255, palette=palette)
    if image.mode == "1":
        return Stored(what=what, samples=np.asarray(image).astype(np.uint8), white=1)
    if image.mode.startswith("I;16"):
        return Stored(what=what, samples=np.asarray(image).astype(np.uint16), white=65535)
    if image.mode in ("I", "F"):  # 32 bits, whole or not
        return Stored(what=what, samples=np.asarray(image), white=0)
    if image.mode in ("CMYK", "YCbCr", "LAB"):
        return Stored(what=what, samples=np.asarray(image.convert("RGB")), white=255)
    if image.mode in ("L", "LA", "RGB", "RGBA", "RGBX"):
        return Stored(what=what, samples=_without_alpha(np.asarray(image)), white=255)
    raise BadRow(f"is a picture of mode {image.mode}")


# ------------------------------------------------------------------------------- kinds of fields


def _as_colour(stored: Stored) -> np.ndarray:
    samples = _to_8_bits(stored)
    if samples.ndim == 2:
        return np.repeat(samples[:, :, None], 3, axis=2)
    return samples


def _as_grey(stored: Stored) -> np.ndarray:
    samples = _to_8_bits(stored)
    return samples if samples.ndim == 2 else _luma(samples)


def _as_grey16(stored: Stored) -> np.ndarray:
    if stored.palette is not None or stored.samples.ndim == 3:
        raise BadRow("is a colour picture, and a field of kind grey16 has one channel")
    if stored.samples.dtype != np.uint16:
        raise BadRow(f"has samples of type {stored.samples.dtype}: its kind would be grey")
    return stored.samples


def _as_depth(stored: Stored) -> np.ndarray:
    _check_measured(stored, "depths")
    if stored.palette is not None:
        raise BadRow("is a palette picture, and a depth is a number")
    if stored.samples.ndim == 3:
        raise BadRow("is a colour picture, and a depth is one channel")
    if 1 <= stored.white.bit_length() < 8:
        raise BadRow(f"has {stored.white.bit_length()} bits a pixel: no depth")
    if stored.samples.dtype.kind == "f":
        return stored.samples
    return _unsigned(stored.samples)


def _unsigned(whole: np.ndarray) -> np.ndarray:
    """uint8, uint16 or uint32, whichever is as wide as the type. Raises BadRow."""
    if whole.dtype.kind == "i" and whole.min() < 0:
        raise BadRow(f"has negative depths, down to {whole.min()}")
    if whole.dtype.itemsize > 4:
        if whole.max() >= 2**32:
            raise BadRow(f"has depths up to {whole.max()}: no unit makes them millimetres")
        return whole.astype(np.uint32)
    return whole.astype(f"u{whole.dtype.itemsize}", copy=False)


def _as_id(stored: Stored) -> np.ndarray:
    _check_measured(stored, "ids")
    ids = stored.samples
    if ids.ndim == 3:
        first = ids[:, :, :1]
        if (ids != first).any():
            raise BadRow("is a colour picture: its labels are colours, not ids")
        ids = first[:, :, 0]
    if ids.dtype.kind == "f" and (ids != np.rint(ids)).any():  # of NaN too
        raise BadRow("has ids that are not whole")
    if ids.min() < 0 or ids.max() > MAX_ID:
        raise BadRow(f"has ids from {ids.min()} to {ids.max()}: 0 to {MAX_ID} are right")
    return ids.astype(np.uint16)


def _check_measured(stored: Stored, what: str) -> None:
    """Raise BadRow for pictures whose samples are not those that were saved."""
    if stored.is_lossy:
        raise BadRow(f"is a {stored.what} compressed with loss, which changes {what}")
    if stored.is_inverted:
        raise BadRow(f"is a {stored.what} in which 0 is white: whether {what} are turned is open")


AS_KIND: dict[str, Callable[[Stored], np.ndarray]] = {
    "colour": _as_colour,
    "grey": _as_grey,
    "grey16": _as_grey16,
    "depth": _as_depth,
    "id": _as_id,
}
assert AS_KIND.keys() == KINDS.keys()


def _to_8_bits(stored: Stored) -> np.ndarray:
    """Colours or grey of 0..255. Raises BadRow."""
    if stored.palette is not None:
        return stored.palette.take(stored.samples, axis=0)
    if stored.white == 255:
        return stored.samples
    if stored.white == 0:
        raise BadRow(f"has samples of type {stored.samples.dtype}: which of them is white is open")
    return _scale_to_8_bits(stored.white).take(stored.samples.astype(np.uint16, copy=False))


@cache
def _scale_to_8_bits(white: int) -> np.ndarray:
    """What each sample up to `white` becomes."""
    return np.rint(np.arange(white + 1) * 255 / white).astype(np.uint8)


# Of ITU-R 601, in 65536ths, the last with a half for rounding: Pillow's numbers.
LUMA = [np.arange(256, dtype=np.uint32) * weight for weight in (19595, 38470, 7471)]
LUMA[2] += 0x8000


def _luma(colours: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of (H, W, 3) uint8."""
    red, green, blue = (LUMA[k].take(colours[:, :, k]) for k in range(3))
    return ((red + green + blue) >> 16).astype(np.uint8)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF says that it is to be looked at; contiguous."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
