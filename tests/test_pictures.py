"""Whatever a picture's file is, it becomes the right pixels of its kind, or one phrase."""

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.sources import picture_headers, pictures
from convert.sources.errors import BadRow
from convert.sources.pictures import decode, decoder_name
from shards.errors import UserError
from shards.spec import KINDS

Image = pytest.importorskip("PIL.Image", reason="needs pillow")
codecs = pytest.importorskip("imagecodecs", reason="needs imagecodecs")

RNG = np.random.default_rng(0)
H, W = 10, 12
GREY8 = RNG.integers(0, 256, (H, W), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (H, W), dtype=np.uint16)
COLOUR8 = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
COLOUR16 = RNG.integers(0, 65536, (H, W, 3), dtype=np.uint16)
ALPHA8 = RNG.integers(0, 256, (H, W, 1), dtype=np.uint8)
FEW = RNG.integers(0, 16, (H, W), dtype=np.uint8)  # of 4 bits
PALETTE = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
ORIENTATION = 0x0112


@pytest.fixture(params=["imagecodecs", "pillow alone"])
def by_each_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pillow alone":
        monkeypatch.setattr(pictures, "_imagecodecs", lambda: None)


# ---------------------------------------------------------------- files made up


def saved(image: "Image.Image", form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    samples: np.ndarray, bits: int, colour_type: int, *others: bytes, interlaced: bool = False
) -> bytes:
    """A PNG of samples (H, W) or (H, W, planes), packed into `bits` each; `others` stand before its
    pixels.
    """
    height, width = samples.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced)
    passes = pictures_of_passes(samples) if interlaced else [samples]
    raw = b"".join(b"\0" + packed(line, bits) for part in passes for line in part)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            *others,
            chunk(b"IDAT", zlib.compress(raw)),
            chunk(b"IEND", b""),
        ]
    )


def pictures_of_passes(samples: np.ndarray) -> list[np.ndarray]:
    """Adam7."""
    steps = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    parts = [samples[y::down, x::right] for y, x, down, right in [*steps, (1, 0, 2, 1)]]
    return [part for part in parts if part.size]


def packed(line: np.ndarray, bits: int) -> bytes:
    values = line.reshape(-1)
    if bits == 16:
        return values.astype(">u2").tobytes()
    if bits == 8:
        return values.astype("u1").tobytes()
    as_bits = (values[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(as_bits.reshape(-1)).tobytes()


def npy(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[ORIENTATION] = orientation
    return made.tobytes()


PLTE = chunk(b"PLTE", PALETTE.tobytes())
WITH_PALETTE = png(FEW, 4, 3, PLTE)
JPEG = saved(Image.fromarray(COLOUR8), "JPEG", quality=95)
JPEG_PIXELS = np.asarray(Image.open(io.BytesIO(JPEG)))


def scaled(samples: np.ndarray, white: int) -> np.ndarray:
    return np.rint(samples.astype(np.float64) * 255 / white).astype(np.uint8)


def luma(colours: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(colours).convert("L"))


def grey(samples: np.ndarray) -> np.ndarray:
    """(H, W, 3)."""
    return np.stack([samples] * 3, axis=2)


# ---------------------------------------------------------------- colour and grey


def of_tiff(array: np.ndarray, **options: object) -> bytes:
    return saved(Image.fromarray(array), "TIFF", **options)


CMYK = Image.fromarray(COLOUR8).convert("CMYK")
COLOURS = {
    "8-bit PNG": (png(COLOUR8, 8, 2), COLOUR8),
    "an interlaced PNG": (png(COLOUR8, 8, 2, interlaced=True), COLOUR8),
    "PNG with alpha": (png(np.concatenate([COLOUR8, ALPHA8], 2), 8, 6), COLOUR8),
    "PNG with a transparent colour": (png(COLOUR8, 8, 2, chunk(b"tRNS", bytes(6))), COLOUR8),
    "PNG with gamma": (png(COLOUR8, 8, 2, chunk(b"gAMA", struct.pack(">I", 100_000))), COLOUR8),
    "PNG with a broken profile": (png(COLOUR8, 8, 2, chunk(b"iCCP", b"x\0\0abc")), COLOUR8),
    "an animated PNG": (
        saved(
            Image.fromarray(COLOUR8), "PNG", save_all=True, append_images=[Image.fromarray(255 - COLOUR8)]
        ),
        COLOUR8,
    ),
    "PNG with a palette": (WITH_PALETTE, PALETTE[FEW]),
    "PNG with a palette and transparency": (
        png(FEW, 8, 3, PLTE, chunk(b"tRNS", bytes(16))),
        PALETTE[FEW],
    ),
    "PNG with a palette that is short": (
        png(FEW, 4, 3, chunk(b"PLTE", PALETTE[:8].tobytes())),
        np.where(FEW[..., None] < 8, PALETTE[FEW], 0),
    ),
    "grey PNG": (png(GREY8, 8, 0), grey(GREY8)),
    "grey PNG with alpha": (png(np.dstack([GREY8, ALPHA8]), 8, 4), grey(GREY8)),
    "PNG of 1 bit": (png(FEW & 1, 1, 0), grey(scaled(FEW & 1, 1))),
    "PNG of 2 bits": (png(FEW & 3, 2, 0), grey(scaled(FEW & 3, 3))),
    "PNG of 4 bits": (png(FEW, 4, 0), grey(scaled(FEW, 15))),
    "grey PNG of 16 bits": (png(GREY16, 16, 0), grey(scaled(GREY16, 65535))),
    "JPEG": (JPEG, JPEG_PIXELS),
    "JPEG with a comment and garbage behind": (
        saved(Image.fromarray(COLOUR8), "JPEG", quality=95, comment=b"\xff\xd9") + b"garbage" * 99,
        JPEG_PIXELS,
    ),
    "progressive JPEG": (
        saved(Image.fromarray(COLOUR8), "JPEG", quality=95, progressive=True),
        JPEG_PIXELS,
    ),
    "TIFF": (of_tiff(COLOUR8), COLOUR8),
    "TIFF, packed": (of_tiff(COLOUR8, compression="tiff_lzw"), COLOUR8),
    "TIFF of CMYK": (saved(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB"))),
    "TIFF of 1 bit": (of_tiff(GREY8 > 99), grey(scaled(GREY8 > 99, 1))),
    "TIFF of 16 bits": (of_tiff(GREY16), grey(scaled(GREY16, 65535))),
    "BMP": (saved(Image.fromarray(COLOUR8), "BMP"), COLOUR8),
    "WebP": (saved(Image.fromarray(COLOUR8), "WEBP", lossless=True), COLOUR8),
    "PPM": (saved(Image.fromarray(COLOUR8), "PPM"), COLOUR8),
    "PPM of 16 bits": (b"P6 12 10 65535\n" + COLOUR16.astype(">u2").tobytes(), scaled(COLOUR16, 65535)),
    "PGM with a comment": (b"P5\n# made up\n12 10\n# more\n255\n" + GREY8.tobytes(), grey(GREY8)),
    "PGM of up to 15": (b"P5 12 10 15\n" + FEW.tobytes(), grey(scaled(FEW, 15))),
    "PPM in words": (
        b"P3 12 10 # no number: 9\n255\n" + " ".join(map(str, COLOUR8.reshape(-1))).encode(),
        COLOUR8,
    ),
    "PBM": (saved(Image.fromarray(GREY8 > 99), "PPM"), grey(scaled(GREY8 > 99, 1))),
    "npy": (npy(COLOUR8), COLOUR8),
    "npy, planes first": (npy(COLOUR8.transpose(2, 0, 1)), COLOUR8),
    "npy of 16 bits": (npy(COLOUR16.astype(">u2")), scaled(COLOUR16, 65535)),
    "npy in Fortran's order": (npy(np.asfortranarray(GREY8)), grey(GREY8)),
}  # fmt: skip


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("case", COLOURS)
def test_any_picture_becomes_colours(case: str) -> None:
    data, expected = COLOURS[case]
    found = decode(data, "colour")
    assert (found.pixels.dtype, found.orientation) == (np.uint8, 1)
    assert found.pixels.flags.c_contiguous
    np.testing.assert_array_equal(found.pixels, expected)


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("case", COLOURS)
def test_any_picture_becomes_grey(case: str) -> None:
    data, expected = COLOURS[case]
    found = decode(data, "grey").pixels
    assert found.shape == (H, W)
    np.testing.assert_array_equal(found, luma(expected))


@pytest.mark.parametrize(
    ("samples", "colour_type", "planes"),
    [
        (COLOUR16, 2, slice(0, 3)),
        (np.dstack([COLOUR16, GREY16]), 6, slice(0, 3)),
        (np.dstack([GREY16, GREY16[::-1]]), 4, [0, 0, 0]),
    ],
    ids=["RGB", "RGB and alpha", "grey and alpha"],
)
def test_colours_of_16_bits_are_scaled_and_rounded(
    samples: np.ndarray, colour_type: int, planes: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = png(samples, 16, colour_type)
    found = decode(data, "colour").pixels
    np.testing.assert_array_equal(found, scaled(samples[:, :, planes], 65535))

    monkeypatch.setattr(pictures, "_imagecodecs", lambda: None)
    with pytest.raises(UserError, match=r"needs imagecodecs.*pip install 'nyuv2-shards\[frames\]'"):
        decode(data, "colour")


@pytest.mark.parametrize("what", ["grey of 16 bits", "colours", "more than is unpacked"])
def test_pixels_inflated_beforehand_are_those_that_pillow_decodes(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several stored blocks, and of every filter that Pillow chooses."""
    if what == "more than is unpacked":
        monkeypatch.setattr(picture_headers, "MAX_UNPACKED", 1000)
    shape = (151, 230, 3) if what == "colours" else (201, 310)
    dtype = np.uint8 if what == "colours" else np.uint16
    smooth = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) * 30
    noise = RNG.integers(0, 40, shape)
    picture = (smooth.reshape(*smooth.shape, *(1,) * noise[0, 0].ndim) + noise).astype(dtype)
    data = saved(Image.fromarray(picture), "PNG")
    found = decode(data, "colour" if what == "colours" else "depth").pixels
    np.testing.assert_array_equal(found, picture)


def test_what_follows_the_pixels_within_their_chunk_changes_nothing() -> None:
    packed_lines = zlib.compress(b"".join(b"\0" + bytes(range(k, k + 10)) for k in range(10)))
    expected = np.add.outer(np.arange(10), np.arange(10))
    for more in (b"", b"more", zlib.compress(b"a second stream")):
        found = decode(packed_png(packed_lines + more), "id").pixels
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("by_each_decoder")
def test_cmyk_is_turned_as_pillow_turns_it() -> None:
    data = saved(CMYK, "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data, "colour").pixels, expected)


def test_an_animated_picture_is_its_first() -> None:
    first, second = (Image.fromarray(part).quantize(16) for part in (COLOUR8, 255 - COLOUR8))
    data = saved(first, "GIF", save_all=True, append_images=[second])
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data, "colour").pixels, expected)


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("size_wh", [(16, 16), (8, 8), (50, 33)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_that_is_grey_to_its_end_is_whole(size_wh: tuple[int, int], mode: str) -> None:
    """So is the part of a JPEG for which there is no data."""
    all_grey = Image.new(mode, size_wh, (128, 128, 128) if mode == "RGB" else 128)
    for options in ({}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}):
        found = decode(saved(all_grey, "JPEG", **options), "colour").pixels
        assert (found == 128).all()


# ---------------------------------------------------------------- grey16, depth, id


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("kind", ["grey16", "depth", "id"])
@pytest.mark.parametrize(
    "data",
    [
        png(GREY16, 16, 0),
        png(GREY16, 16, 0, interlaced=True),
        png(GREY16, 16, 0, chunk(b"tRNS", bytes(2)), chunk(b"gAMA", struct.pack(">I", 1))),
        of_tiff(GREY16),
        b"P5 12 10 65535\n" + GREY16.astype(">u2").tobytes(),
        npy(GREY16),
        npy(GREY16[None]),
        npy(GREY16[:, :, None].astype(">u2")),
    ],
    ids=["PNG", "interlaced", "PNG with more", "TIFF", "PGM", "npy", "npy, a plane", "npy, turned"],
)
def test_16_bits_stay_as_they_are(data: bytes, kind: str) -> None:
    found = decode(data, kind).pixels
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, GREY16)


def test_the_bytes_of_a_pgm_may_be_said_to_lie_the_other_way() -> None:
    data = b"P5 12 10 65535\n" + GREY16.astype("<u2").tobytes()
    np.testing.assert_array_equal(decode(data, "depth", little_endian=True).pixels, GREY16)
    np.testing.assert_array_equal(decode(data, "depth").pixels, GREY16.byteswap())


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (png(GREY8, 8, 0), "u1"),
        (npy(GREY8), "u1"),
        (npy(GREY8.astype(np.int16)), "u2"),
        (npy(GREY8.astype(np.int64)), "u4"),
        (npy(GREY8.astype(np.float16)), "f2"),
        (npy(GREY8.astype(">f8")), "f8"),
        (of_tiff(GREY8.astype(np.float32)), "f4"),
        (of_tiff(GREY8.astype(np.int32)), "u4"),
    ],
)
def test_a_depth_is_handed_out_as_it_is_stored(data: bytes, dtype: str) -> None:
    found = decode(data, "depth").pixels
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, GREY8)


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_of_few_bits_are_not_scaled(bits: int) -> None:
    ids = GREY8 & (2**bits - 1)
    for data in (
        png(ids, bits, 0),
        png(ids, bits, 0, interlaced=True),
        png(ids, bits, 3, chunk(b"PLTE", bytes(3))),
        png(ids, bits, 3, chunk(b"PLTE", RNG.bytes(3 * 2**bits)), chunk(b"tRNS", bytes(1))),
    ):
        found = decode(data, "id").pixels
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, ids)


@pytest.mark.parametrize(
    ("data", "ids"),
    [
        (WITH_PALETTE, FEW),
        (saved(Image.open(io.BytesIO(WITH_PALETTE)), "GIF", optimize=False), FEW),
        (saved(Image.open(io.BytesIO(WITH_PALETTE)), "BMP"), FEW),
        (saved(Image.open(io.BytesIO(WITH_PALETTE)), "TIFF"), FEW),
        (png(grey(FEW), 8, 2), FEW),
        (png(np.dstack([grey(GREY8), ALPHA8]), 8, 6), GREY8),
        (png(np.dstack([GREY8, ALPHA8]), 8, 4), GREY8),
        (saved(Image.fromarray(grey(FEW)), "WEBP", lossless=True), FEW),
        (b"P5 12 10 15\n" + FEW.tobytes(), FEW),
        (b"P2 12 10 40000\n" + " ".join(map(str, FEW.reshape(-1))).encode(), FEW),
        (npy(FEW > 7), FEW > 7),
        (npy(FEW.astype(np.int64)), FEW),
        (npy(FEW.astype(np.float32)), FEW),
    ],
)
def test_ids_are_what_was_written(data: bytes, ids: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(data, "id").pixels, ids)


def test_ids_of_a_tiff_of_4_bits_are_not_scaled() -> None:
    """Pillow writes none: a header and samples by hand."""
    entries = [(256, 4, W), (257, 4, H), (258, 3, 4), (259, 3, 1), (262, 3, 1), (273, 4, 200)]
    entries += [(277, 3, 1), (278, 4, H), (279, 4, H * W // 2)]
    fields = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4)
    body = b"".join(packed(line, 4) for line in FEW)
    data = head.ljust(200, b"\0") + body
    np.testing.assert_array_equal(decode(data, "id").pixels, FEW)
    np.testing.assert_array_equal(decode(data, "grey").pixels, scaled(FEW, 15))


# ---------------------------------------------------------------- orientation


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_as_pillow_does(form: str, orientation: int) -> None:
    from PIL import ImageOps

    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(Image.fromarray(COLOUR8), form, exif=exif(orientation), **options)
    # Of a TIFF Pillow 10.0 applies it twice.
    reference = (
        data if form == "JPEG" else saved(Image.fromarray(COLOUR8), "PNG", exif=exif(orientation))
    )
    with Image.open(io.BytesIO(reference)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    found = decode(data, "colour")
    assert found.orientation == orientation
    np.testing.assert_array_equal(found.pixels, expected)


def test_depths_and_ids_are_turned_like_their_colours() -> None:
    data = png(GREY16, 16, 0, chunk(b"eXIf", exif(6).removeprefix(b"Exif\0\0")))
    for kind in ("depth", "id", "grey16"):
        found = decode(data, kind)
        assert found.orientation == 6
        np.testing.assert_array_equal(found.pixels, np.rot90(GREY16, -1))


@pytest.mark.parametrize(
    "body", [b"", b"II*\0", b"MM\0*\0\0\0\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(30), exif(9)[6:]]
)
def test_damaged_exif_turns_nothing(body: bytes) -> None:
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body
    found = decode(JPEG[:2] + segment + JPEG[2:], "colour")
    assert found.orientation == 1
    np.testing.assert_array_equal(found.pixels, JPEG_PIXELS)


# ---------------------------------------------------------------- what is refused


REFUSED = {
    "nothing": (b"", "colour", "is empty"),
    "a web page": (b"<html>", "colour", "is no picture of a known format (it begins with '<html>')"),
    "a pickle in npy": (npy(np.array([[{}]]), allow_pickle=True), "depth", "is an array of object"),
    "text in npy": (npy(np.array([["a"]])), "id", "is an array of <U1"),
    "complex npy": (npy(np.zeros((4, 4), complex)), "depth", "is an array of complex128"),
    "npy of no picture": (npy(np.zeros((2, 3, 4, 5))), "depth", "is an array of shape (2, 3, 4, 5)"),
    "npy of no pixels": (npy(np.zeros((0, 4))), "depth", "is an array of shape (0, 4)"),
    "npy of a number": (npy(np.float32(1)), "depth", "is an array of shape ()"),
    "npy that claims more": (
        npy(np.zeros((4, 4))).replace(b"(4, 4)", b"(9, 9)"),
        "depth",
        "(npy: it ends too early)",
    ),
    "a JPEG as depth": (JPEG, "depth", "is a JPEG compressed with loss, which changes depths"),
    "a JPEG as ids": (JPEG, "id", "is a JPEG compressed with loss, which changes ids"),
    "a lossy WebP as ids": (saved(Image.fromarray(grey(FEW)), "WEBP"), "id", "compressed with loss"),
    "a JPEG in a TIFF as ids": (of_tiff(GREY8, compression="jpeg"), "id", "compressed with loss"),
    "colours as depth": (png(COLOUR8, 8, 2), "depth", "is a colour picture, and a depth is one channel"),
    "a palette as depth": (WITH_PALETTE, "depth", "is a palette picture, and a depth is a number"),
    "4 bits as depth": (png(FEW, 4, 0), "depth", "has 4 bits a pixel: no depth"),
    "a mask as depth": (npy(FEW > 7), "depth", "has 1 bits a pixel: no depth"),
    "negative depths": (npy(-GREY8.astype(np.int16)), "depth", "has negative depths, down to -"),
    "huge depths": (npy(GREY8.astype(np.uint64) << 40), "depth", "no unit makes them millimetres"),
    "colours as ids": (png(COLOUR8, 8, 2), "id", "its labels are colours, not ids"),
    "halves as ids": (npy(FEW / 2), "id", "has ids that are not whole"),
    "no number as ids": (npy(np.full((4, 4), np.nan)), "id", "has ids that are not whole"),
    "infinite ids": (npy(np.full((4, 4), np.inf)), "id", "has ids from inf to inf"),
    "negative ids": (npy(FEW.astype(np.int32) - 1), "id", "has ids from -1 to 14: 0 to 65535 are right"),
    "large ids": (npy(FEW.astype(np.int32) + 65535), "id", "0 to 65535 are right"),
    "8 bits as grey16": (png(GREY8, 8, 0), "grey16", "has samples of type uint8: its kind would be grey"),
    "colours as grey16": (png(COLOUR16, 16, 2), "grey16", "is a colour picture"),
    "a palette as grey16": (WITH_PALETTE, "grey16", "is a colour picture"),
    "floats as colours": (npy(np.zeros((4, 4, 3), np.float32)), "colour", "has samples of type float32"),
    "floats as grey": (of_tiff(GREY8.astype(np.float32)), "grey", "has samples of type float32"),
    "a PNM without a header": (b"P5 12 10", "grey", "(PNM: its header is incomplete)"),
    "a PNM that is cut": (b"P5 12 10 255\n" + bytes(119), "grey", "(PNM: it ends too early)"),
    "a PNM beyond its white": (b"P5 12 10 9\n" + b"\xff" * 120, "grey", "a sample is greater than 9"),
    "a PNM of words": (b"P2 1 2 9\nab c", "grey", "a sample is no number"),
    "a PNM of words that is cut": (b"P2 2 2 9\n1 2 3       ", "grey", "(PNM: it ends too early)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_phrase(case: str) -> None:
    data, kind, said = REFUSED[case]
    with pytest.raises(BadRow) as caught:
        decode(data, kind)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tiff_in_which_0_is_white_is_colour_but_no_measurement() -> None:
    data = of_tiff(GREY8, tiffinfo={262: 0})
    np.testing.assert_array_equal(decode(data, "grey").pixels, GREY8)
    for kind in ("depth", "id"):
        with pytest.raises(BadRow, match="in which 0 is white"):
            decode(data, kind)


HUGE = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
SIZES = {
    "PNG": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", HUGE) + chunk(b"IEND", b""),
    "no pixels": png(GREY8, 8, 0)[:16] + bytes(8) + png(GREY8, 8, 0)[24:],
    "JPEG": JPEG.replace(struct.pack(">BHH", 8, H, W), struct.pack(">BHH", 8, 65500, 65500)),
    "PNM": b"P5 999999999 999999999 255\n",
    "npy": npy(np.zeros((4, 4), "u1")).replace(b"(4, 4), }    ", b"(1, 70000), }")[:128] + bytes(70000),
    "GIF": saved(Image.fromarray(FEW), "GIF").replace(b"\x0c\0\x0a\0", b"\xff\xff\xff\xff", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES)
def test_absurd_sizes_are_refused_before_anything_is_decoded(case: str) -> None:
    data = SIZES[case]
    if case == "no pixels":  # with a right sum
        data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    with pytest.raises(BadRow, match=r"says that it has|exceeds limit"):
        decode(data, "colour")


# ---------------------------------------------------------------- damage


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("shape", [(50, 60, 3), (50, 60)], ids=["colours", "grey"])
def test_a_jpeg_that_ends_early_is_no_half_picture(
    options: dict[str, object], shape: tuple[int, ...]
) -> None:
    whole = saved(Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)), "JPEG", **options)
    for n_bytes in (*range(1, 30), len(whole) // 2, *range(len(whole) - 30, len(whole))):
        for tail in (b"", bytes(500)):
            with pytest.raises(BadRow):
                decode(whole[:n_bytes] + tail, "colour")


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_a_jpeg_that_is_cut_and_ended_is_no_half_picture(share: float) -> None:
    """Programs that mend files write the marker of the end, and the rest stays grey."""
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), "JPEG", quality=90)
    cut = whole[: int(len(whole) * share)].rstrip(b"\xff") + b"\xff\xd9"
    assert (np.asarray(Image.open(io.BytesIO(cut)))[-1, -1] == 128).all()
    with pytest.raises(BadRow, match="ends too early"):
        decode(cut, "colour")


@pytest.mark.usefixtures("by_each_decoder")
def test_a_jpeg_that_is_cut_and_followed_by_another_is_no_half_picture() -> None:
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), "JPEG", quality=90)
    with pytest.raises(BadRow, match="JPEG: "):
        decode(whole[: len(whole) // 2].rstrip(b"\xff") + whole, "colour")
    two = decode(whole + whole, "colour").pixels
    np.testing.assert_array_equal(two, decode(whole, "colour").pixels)


@pytest.mark.usefixtures("by_each_decoder")
def test_a_jpeg_with_restarts_is_whole_and_its_half_is_not() -> None:
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = codecs.jpeg8_encode(noise, level=90)
    with_restarts = saved(Image.fromarray(noise), "JPEG", restart_marker_rows=1)
    if b"\xff\xd0" not in with_restarts:
        pytest.skip("this Pillow writes no restarts")
    expected = np.asarray(Image.open(io.BytesIO(with_restarts)))
    np.testing.assert_array_equal(decode(with_restarts, "colour").pixels, expected)
    assert decode(whole, "colour").pixels.shape == noise.shape
    with pytest.raises(BadRow):
        decode(with_restarts[: len(with_restarts) // 2], "colour")


DEPTH_PNG = png(GREY16, 16, 0)
AT_PIXELS = DEPTH_PNG.find(b"IDAT") + 4


def with_flip(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def packed_png(raw: bytes) -> bytes:
    """Of 10 x 10 pixels of 8 bits, whose compressed data are these."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 10, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", raw) + chunk(b"IEND", b"")


PNGS = {
    **{f"cut to {n}": DEPTH_PNG[:n] for n in (8, 20, 33, 60, len(DEPTH_PNG) - 12)},
    "its last byte is missing": DEPTH_PNG[:-1],
    "a header of another sum": with_flip(DEPTH_PNG, 30),
    "pixels of another sum": with_flip(DEPTH_PNG, AT_PIXELS + 30),
    "another sum of the pixels": with_flip(DEPTH_PNG, len(DEPTH_PNG) - 13),
    "a palette of another sum": with_flip(WITH_PALETTE, WITH_PALETTE.find(b"PLTE") + 5),
    "half the pixels": packed_png(zlib.compress(bytes(55))),
    "half the compressed data": packed_png(zlib.compress(RNG.bytes(1) * 110)[:-6]),
    "no sum behind the compressed data": packed_png(zlib.compress(bytes(110))[:-4]),
    "an unknown filter": packed_png(zlib.compress(b"\x09" + bytes(109))),
    "no pixels": DEPTH_PNG[: AT_PIXELS - 8] + chunk(b"IEND", b""),
    "no header": DEPTH_PNG[:8] + chunk(b"IEND", b""),
    "no palette": png(FEW, 4, 7),
    "three bits": png(FEW, 3, 0),
    "Apple's own": png(FEW, 8, 0, chunk(b"CgBI", bytes(4))),
}


@pytest.mark.usefixtures("by_each_decoder")
@pytest.mark.parametrize("case", PNGS)
def test_a_damaged_png_fails_by_any_decoder(case: str) -> None:
    kind = "colour" if "palette" in case else "id"
    with pytest.raises(BadRow, match=r"^is no picture that can be decoded \(PNG: "):
        decode(PNGS[case], kind)


def test_damaged_pngs_cost_no_memory() -> None:
    """imagecodecs loses the array of each that fails, or a reference to None."""
    whole = png(np.zeros((500, 500), np.uint8), 8, 0)
    damaged = with_flip(whole, len(whole) - 17)

    def fail_often(n: int) -> None:
        for _ in range(n):
            with pytest.raises(BadRow):
                decode(damaged, "id")

    fail_often(3)
    n_references = sys.getrefcount(None)
    tracemalloc.start()
    try:
        fail_often(200)
        n_bytes_left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_bytes_left < 4 * 250_000
    assert sys.getrefcount(None) > n_references - 100


@pytest.mark.parametrize("form", ["TIFF", "BMP", "GIF", "WEBP", "PPM"])
def test_half_a_file_of_any_format_fails(form: str) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8))
    image = noise.convert("RGB") if form == "WEBP" else noise
    data = saved(image, form)
    with pytest.raises(BadRow):
        decode(data[: len(data) // 2], "grey")


SEEDS = [
    *(JPEG, WITH_PALETTE, DEPTH_PNG, png(COLOUR8, 8, 2), npy(GREY16), of_tiff(GREY16)),
    *(saved(Image.fromarray(FEW), form) for form in ("BMP", "GIF", "PPM", "WEBP")),
    saved(Image.fromarray(COLOUR8), "JPEG", progressive=True, exif=exif(6)),
    b"P2 3 1 9\n1 2 3",
]


def check_is_picture_or_phrase(data: bytes, kind: str) -> None:
    try:
        n_axes = decode(data, kind).pixels.ndim
        said = "a picture"
    except BadRow as error:
        n_axes = len(KINDS[kind].planes) + 2
        said = str(error)
    assert n_axes == len(KINDS[kind].planes) + 2
    assert 0 < len(said) < 400
    assert "\n" not in said


@given(data=st.binary(max_size=80), kind=st.sampled_from(list(KINDS)), seed=st.sampled_from(SEEDS))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_picture_or_one_phrase(data: bytes, kind: str, seed: bytes) -> None:
    check_is_picture_or_phrase(data, kind)
    check_is_picture_or_phrase(seed[:12] + data, kind)


@given(
    seed=st.sampled_from(SEEDS),
    kind=st.sampled_from(list(KINDS)),
    where=st.floats(0, 0.999),
    patch=st.binary(min_size=1, max_size=4),
    end=st.floats(0.3, 1),
)
@settings(max_examples=200, deadline=None)
def test_a_damaged_picture_is_a_picture_or_one_phrase(
    seed: bytes, kind: str, where: float, patch: bytes, end: float
) -> None:
    at = int(where * len(seed))
    changed = seed[:at] + patch + seed[at + len(patch) :]
    check_is_picture_or_phrase(changed, kind)
    check_is_picture_or_phrase(changed[: int(end * len(changed))], kind)


# ---------------------------------------------------------------- real files

REAL = "rgbd_samples"


def real(name: str) -> bytes:
    return shared(f"{REAL}/{name}").read_bytes()


def real_files() -> Iterator[Path]:
    root = shared(REAL)
    for pattern in ("*.jpg", "*.png", "*.ppm"):
        yield from sorted(root.rglob(pattern))


@pytest.mark.usefixtures("by_each_decoder")
def test_every_real_picture_is_what_pillow_says() -> None:
    n_files = 0
    for path in real_files():
        with Image.open(path) as image:
            expected = np.asarray(image)
        kind = "colour" if expected.ndim == 3 else "depth"
        np.testing.assert_array_equal(decode(path.read_bytes(), kind).pixels, expected)
        n_files += 1
    assert n_files > 20


def test_jpeg_data_in_a_file_named_png_is_read() -> None:
    data = real("sunrgbd_is/train/color/0001.png")
    assert data.startswith(b"\xff\xd8")
    assert decode(data, "colour").pixels.shape == (530, 730, 3)


def test_a_raw_depth_of_nyu_is_read_in_its_byte_order() -> None:
    data = real("open3d/other_formats/NYU_depth.pgm")
    found = decode(data, "depth", little_endian=True).pixels
    assert (found.shape, found.min(), found.max()) == ((480, 640), 839, 2047)


# ---------------------------------------------------------------- decoders


def test_the_decoders_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import PIL

    assert decoder_name() == f"imagecodecs {codecs.__version__}, pillow {PIL.__version__}"
    monkeypatch.setattr(pictures, "_imagecodecs", lambda: None)
    assert decoder_name() == f"pillow {PIL.__version__}"
    monkeypatch.setattr(pictures, "_pillow", lambda: None)
    with pytest.raises(UserError, match=r"^reading pictures needs .*nyuv2-shards\[frames\]'$"):
        decoder_name()
    with pytest.raises(UserError, match="reading TIFF pictures needs pillow"):
        decode(of_tiff(GREY8), "grey")


WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from convert.sources.pictures import decode, decoder_name
import convert.sources.pictures
print(decoder_name(), decode(sys.stdin.buffer.read(), "colour").pixels.sum())
"""


@pytest.mark.parametrize(("absent", "left"), [("imagecodecs", "pillow"), ("PIL", "imagecodecs")])
def test_one_of_the_decoders_is_enough_for_a_jpeg(absent: str, left: str) -> None:
    command = [sys.executable, "-c", WITHOUT, absent]
    done = subprocess.run(command, cwd=REPO, input=JPEG, capture_output=True, check=True)
    assert done.stdout.decode().startswith(f"{left} ")
    assert done.stdout.decode().endswith(f" {JPEG_PIXELS.sum()}\n")
    assert done.stderr == b""


DECODE = """
import sys
from convert.sources.errors import BadRow
from convert.sources.pictures import decode
try:
    decode(sys.stdin.buffer.read(), "grey16")
except BadRow:
    print("failed")
"""
LARGE = saved(Image.new("1", (9999, 9999)), "TIFF", compression="group4")


@pytest.mark.parametrize(
    "data",
    [of_tiff(GREY8, exif=exif(6))[:-7], LARGE, COLOURS["PNG with a broken profile"][0]],
    ids=["damaged EXIF", "nearly 100 million pixels", "a broken profile"],
)
def test_no_decoder_says_anything_of_its_own(data: bytes) -> None:
    command = [sys.executable, "-W", "always", "-c", DECODE]
    done = subprocess.run(command, cwd=REPO, input=data, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"failed\n", b"")


def test_importing_it_loads_no_decoder() -> None:
    code = "import sys, convert.sources.pictures; sys.exit('PIL' in sys.modules or 'imagecodecs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
