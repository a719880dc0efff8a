"""What a JPEG or PNG says of itself, before a pixel is decoded.

A walk over its markers or chunks, some microseconds long, finds size, mode and orientation, and
whether the file is whole. Decoders do not tell that: of a JPEG that was cut they make a picture
whose lower part is grey. It also finds what no stored pixel depends on: EXIF, thumbnails, colour
profiles, gamma, transparent colours. Decoders are given the file without it, for it makes them
warn, add planes or fail.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convert.sources.errors import BadRow

MAX_PIXELS = 100_000_000
MAX_SIDE = 65535
JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
ByteRange = tuple[int, int]  # first byte, and the one after the last


def undecodable(what: str, why: str) -> BadRow:
    """The error, to be raised, for bytes that are no picture of the format they begin like."""
    return BadRow(f"is no picture that can be decoded ({what}: {why})")


def cut_short(what: str) -> BadRow:
    """The error, to be raised, for a file that ends before its picture does."""
    return undecodable(what, "it ends too early")


def check_size(width: int, height: int) -> None:
    """Raise BadRow for what no camera takes, before memory is taken for it."""
    sides_fit = 1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE
    if not sides_fit or width * height > MAX_PIXELS:
        most = f"1 to {MAX_SIDE} a side and {MAX_PIXELS // 1_000_000} million in all are right"
        raise BadRow(f"says that it has {width} x {height} pixels: {most}")


# -------------------------------------------------------------------------------------------- EXIF

ORIENTATION_TAG = 0x0112
SHORT = 3  # TIFF's number of this type


def exif_orientation(tiff: bytes) -> int:
    """1 to 8; 1, as stored, where it says nothing of it, or is damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (n_entries,) = struct.unpack_from(f"{order}H", tiff, at)
        for k in range(n_entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, at + 2 + 12 * k)
            if tag == ORIENTATION_TAG:
                return value if kind == SHORT and 1 <= value <= 8 else 1
    except struct.error:  # it points beyond its end
        return 1
    return 1


# -------------------------------------------------------------------------------------------- JPEG

# As libjpeg looks for the next one: what lies between is passed over, and FF may be repeated.
MARKER = re.compile(rb"\xff+([^\x00\xff])")
SEQUENTIAL = (0xC0, 0xC1, 0xC9)  # frames: baseline, extended, arithmetic
PROGRESSIVE = (0xC2, 0xCA)
OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF)  # lossless, hierarchical
START_OF_IMAGE = 0xD8
END_OF_IMAGE = 0xD9
END = b"\xff\xd9"
START_OF_SCAN = 0xDA
WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))
APP1 = 0xE1
EXIF = b"Exif\0\0"
# APP0 and APP14 say which colour space the planes are in; the other APPn and the comment go.
LEFT_OUT = (*range(0xE1, 0xEE), 0xEF, 0xFE)


@dataclass(frozen=True, kw_only=True)
class JpegHeader:
    """left_out: the parts that no pixel depends on. scan: where the compressed data begin.

    end: where the marker lies that ends it; the last one in the file, which is another where
    garbage follows.
    """

    width: int
    height: int
    n_planes: int
    orientation: int
    left_out: tuple[ByteRange, ...]
    scan: int
    end: int

    def plain(self, data: bytes) -> bytes:
        """The file with nothing in it but the picture."""
        kept = []
        at = 0
        for first, end in self.left_out:
            kept.append(data[at:first])
            at = end
        return b"".join([*kept, data[at : self.end], END])

    def with_right_end(self, data: bytes) -> "JpegHeader":
        """Its own end, whatever follows it. Raises BadRow where there is none."""
        return replace(self, end=_end_of_picture(data, self.scan))


@dataclass(frozen=True)
class _Segment:
    marker: int
    first: int  # the marker's own first byte
    body: int
    end: int


def read_jpeg(data: bytes) -> JpegHeader:
    """Raises BadRow, also for a file that ends before its picture does."""
    segments = list(_segments(data, 2))
    frames = [each for each in segments if each.marker in (*SEQUENTIAL, *PROGRESSIVE)]
    if any(each.marker in OTHER_FRAMES for each in segments):
        raise undecodable("JPEG", "it is lossless or hierarchical")
    if not frames or frames[0].end - frames[0].body < 6:
        raise undecodable("JPEG", "no frame comes before its data")
    bits, height, width, n_planes = struct.unpack_from(">BHHB", data, frames[0].body)
    if bits != 8:
        raise undecodable("JPEG", f"it has {bits} bits a sample")
    check_size(width, height)

    scan = segments[-1].end
    # In one scan no byte can be taken for the marker; between the many of a progressive one it can.
    end = data.rfind(END, scan)
    if frames[0].marker in PROGRESSIVE:
        end = _end_of_picture(data, scan)
    if end < 0:
        raise cut_short("JPEG")
    return JpegHeader(
        width=width,
        height=height,
        n_planes=n_planes,
        orientation=_orientation_in(data, segments),
        left_out=tuple((each.first, each.end) for each in segments if each.marker in LEFT_OUT),
        scan=scan,
        end=end,
    )


def _orientation_in(data: bytes, segments: Sequence[_Segment]) -> int:
    for segment in segments:
        if segment.marker == APP1 and data.startswith(EXIF, segment.body):
            return exif_orientation(data[segment.body + len(EXIF) : segment.end])
    return 1


def _segments(data: bytes, at: int) -> Iterator[_Segment]:
    """From there to the next START_OF_SCAN or END_OF_IMAGE, with that one.

    Raises BadRow where neither comes.
    """
    while found := MARKER.search(data, at):
        marker = found[1][0]
        body = found.end() + 2
        at = found.end()
        if marker in WITHOUT_LENGTH:
            continue
        if marker == END_OF_IMAGE:
            yield _Segment(marker, found.start(), at, at)
            return
        if marker == START_OF_IMAGE:  # of another picture
            break
        end = at + int.from_bytes(data[at:body], "big")
        if end < body or end > len(data):
            break
        yield _Segment(marker, found.start(), body, end)
        if marker == START_OF_SCAN:
            return
        at = end
    raise cut_short("JPEG")


def _end_of_picture(data: bytes, scan: int) -> int:
    """Where END_OF_IMAGE lies, behind the scan that begins there and all others.

    Raises BadRow where it does not come.
    """
    while True:
        *_, last = _segments(data, _end_of_scan(data, scan))
        if last.marker == END_OF_IMAGE:
            return last.first
        scan = last.end


def _end_of_scan(data: bytes, at: int) -> int:
    """Where the marker lies that ends the compressed data from `at` on.

    In it FF 00 is a byte FF, and FF D0 to FF D7 are restarts. numpy finds it in a tenth of the time
    that a regular expression takes.
    """
    values = np.frombuffer(data, np.uint8)[at:]
    places = np.flatnonzero(values[:-1] == 0xFF)
    after = values[places + 1]
    is_marker = (after != 0) & (after != 0xFF) & (after & 0xF8 != 0xD0)
    markers = places[is_marker]
    return at + int(markers[0]) if len(markers) else len(data)


# --------------------------------------------------------------------------------------------- PNG

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = (0, 2, 3, 4, 6)
N_PLANES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
BITS = {
    GREY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    RGB_ALPHA: (8, 16),
}
IHDR_BYTES = 13
IEND = bytes(4) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
ZLIB_HEADER = b"\x78\x01"
MAX_STORED = 65535  # bytes of a block that is not compressed
MAX_UNPACKED = 64 << 20  # bytes, which are in memory three times then
# Of interlaced ones: first column and row of each pass, and its steps.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


@dataclass(frozen=True, kw_only=True)
class PngHeader:
    """colour_type: as PNG numbers them. palette: R, G, B of each index, b"" where there is none.

    pixel_chunks: where the chunks IDAT lie. is_plain: nothing else is in the file.
    """

    width: int
    height: int
    bits: int
    colour_type: int
    is_interlaced: bool
    orientation: int
    palette: bytes
    pixel_chunks: tuple[ByteRange, ...]
    is_plain: bool

    @property
    def white(self) -> int:
        """The greatest sample."""
        return 2**self.bits - 1

    def plain(self, data: bytes) -> bytes:
        """The file with nothing in it but the picture; one with a palette as grey.

        So its values are its indices, which decoders would replace by colours.
        """
        if self.is_plain:
            return data
        pixels = [data[first:end] for first, end in self.pixel_chunks]
        return b"".join([*self._start(), *pixels, IEND])

    def _start(self) -> list[bytes]:
        """All that is in front of the pixels."""
        colour_type = GREY if self.colour_type == PALETTE else self.colour_type
        facts = (self.width, self.height, self.bits, colour_type, 0, 0, self.is_interlaced)
        head = b"IHDR" + struct.pack(">IIBBBBB", *facts)
        return [PNG_MAGIC, struct.pack(">I", IHDR_BYTES), head, _crc(head)]

    def lines(self, data: bytes, codecs: Any) -> bytes | None:
        """The pixels inflated: of each line its filter's number and the bytes that it left.

        codecs: imagecodecs, with libdeflate in it. None for data that is anything but so many whole
        lines with right sums, and for more than MAX_UNPACKED bytes.
        """
        n_bytes = self._n_bytes_inflated()
        if n_bytes > MAX_UNPACKED:
            return None
        view = memoryview(data)
        for first, end in self.pixel_chunks:
            if codecs.deflate_crc32(view[first + 4 : end - 4]) != _number(view[end - 4 : end]):
                return None

        packed = b"".join(view[first + 8 : end - 4] for first, end in self.pixel_chunks)
        try:
            found: bytes = codecs.deflate_decode(packed, out=n_bytes)
        except codecs.DeflateError:
            return None
        return found if len(found) == n_bytes else None

    def unpacked(self, lines: bytes, codecs: Any) -> bytearray:
        """What `plain` gives, but with the lines in it as they are."""
        adler = struct.pack(">I", codecs.deflate_adler32(lines))
        pixels = [ZLIB_HEADER, *_stored_blocks(lines), adler]
        n_bytes = sum(map(len, pixels))
        start = b"".join([*self._start(), struct.pack(">I", n_bytes)])
        file = bytearray().join([start, b"IDAT", *pixels, bytes(4), IEND])

        first = len(start)
        end = first + 4 + n_bytes
        crc = codecs.deflate_crc32(memoryview(file)[first:end])
        file[end : end + 4] = struct.pack(">I", crc)
        return file

    def check_whole(self, data: bytes) -> None:
        """Raise BadRow where a sum is wrong or pixels are missing, for decoders that do not look.

        The pixels are inflated for it, and thrown away.
        """
        for first, end in self.pixel_chunks:
            _body(data, _Chunk(b"IDAT", first, end))
        inflate = zlib.decompressobj()
        packed = b"".join(data[first + 8 : end - 4] for first, end in self.pixel_chunks)
        n_bytes = self._n_bytes_inflated()
        try:
            found = len(inflate.decompress(packed, n_bytes))
            more = inflate.decompress(inflate.unconsumed_tail, 1)
        except zlib.error as error:
            raise undecodable("PNG", str(error)) from None
        if found < n_bytes or not (more or inflate.eof):
            raise undecodable("PNG", "pixels are missing")

    def _n_bytes_inflated(self) -> int:
        """Each line of each pass has a byte before it."""
        bits_a_pixel = self.bits * N_PLANES[self.colour_type]
        n_bytes = 0
        for x, y, step_x, step_y in ADAM7 if self.is_interlaced else ((0, 0, 1, 1),):
            n_columns = len(range(x, self.width, step_x))
            n_lines = len(range(y, self.height, step_y))
            if n_columns:
                n_bytes += n_lines * (1 + (n_columns * bits_a_pixel + 7) // 8)
        return n_bytes


def _crc(chunk: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(chunk))


def _stored_blocks(data: bytes) -> Iterator[bytes | memoryview]:
    """As deflate has them that leaves data as it is: a head of each, then its bytes."""
    view = memoryview(data)
    for first in range(0, len(data), MAX_STORED):
        block = view[first : first + MAX_STORED]
        is_last = first + MAX_STORED >= len(data)
        yield struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF)
        yield block


def _number(four_bytes: memoryview) -> int:
    return int.from_bytes(four_bytes, "big")


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    first: int
    end: int


def read_png(data: bytes) -> PngHeader:
    """Raises BadRow, also for a file that ends before its picture does."""
    chunks = list(_chunks(data))
    head = chunks[0]
    if head.name != b"IHDR" or head.end - head.first != IHDR_BYTES + 12:
        raise undecodable("PNG", "it does not begin with its header")
    facts = struct.unpack(">IIBBBBB", _body(data, head))
    width, height, bits, colour_type, compression, filtering, interlace = facts
    check_size(width, height)
    if bits not in BITS.get(colour_type, ()) or compression or filtering or interlace > 1:
        raise undecodable("PNG", f"no mode is {facts[2:]}")

    others = [chunk for chunk in chunks[1:] if chunk.name not in (b"IDAT", b"IEND")]
    _check_known(others)
    found = {each.name: _body(data, each) for each in others if each.name in (b"PLTE", b"eXIf")}
    pixel_chunks = tuple((each.first, each.end) for each in chunks if each.name == b"IDAT")
    return PngHeader(
        width=width,
        height=height,
        bits=bits,
        colour_type=colour_type,
        is_interlaced=interlace == 1,
        orientation=exif_orientation(found.get(b"eXIf", b"")),
        palette=found.get(b"PLTE", b"") if colour_type == PALETTE else b"",
        pixel_chunks=pixel_chunks,
        is_plain=not others and colour_type != PALETTE,
    )


def _body(data: bytes, chunk: _Chunk) -> bytes:
    """Raises BadRow where its sum is wrong."""
    if data[chunk.end - 4 : chunk.end] != _crc(data[chunk.first + 4 : chunk.end - 4]):
        raise undecodable("PNG", f"{ascii(chunk.name)[2:-1]}: CRC error")
    return data[chunk.first + 8 : chunk.end - 4]


def _check_known(others: Sequence[_Chunk]) -> None:
    """Raise BadRow for a chunk without which the picture is not understood, as Apple's CgBI."""
    for chunk in others:
        is_optional = chunk.name[0] & 0x20
        if not is_optional and chunk.name != b"PLTE":
            raise undecodable("PNG", f"no reader knows the chunk {ascii(chunk.name)[2:-1]}")


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """All up to IEND, which comes too. Raises BadRow where it is not there."""
    at = len(PNG_MAGIC)
    while at + 12 <= len(data):
        n_bytes, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + n_bytes
        if end > len(data):
            break
        yield _Chunk(name, at, end)
        if name == b"IEND":
            return
        at = end
    raise cut_short("PNG")
