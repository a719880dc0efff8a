"""Pictures that need no decoder: PNM (P2, P3, P5, P6) and .npy.

Pillow scales the samples of a PNM to the whole range of its mode; depths and ids have to stay as
they were written.
"""

import math
import re
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from convert.sources.errors import BadRow
from convert.sources.picture_headers import check_size, cut_short, undecodable
from shards.errors import one_line

PNM_MAGICS = (b"P2", b"P3", b"P5", b"P6")
NPY_MAGIC = b"\x93NUMPY"
# Width, height and the greatest sample, with white space and comments between them.
PNM_HEADER = re.compile(rb"P([2356])" + rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})" * 3 + rb"\s")
MAX_PNM_HEADER = 4096  # bytes in which one is looked for, where not the whole file is read
COMMENT = re.compile(rb"#[^\r\n]*")
MAX_NPY_HEADER = 10_000  # characters: numpy's own limit


@dataclass(frozen=True)
class Pnm:
    """samples: (H, W) or (H, W, 3), uint8 or uint16, as they were written. white: the greatest."""

    samples: np.ndarray
    white: int


def read_pnm(data: bytes, little_endian: bool) -> Pnm:
    """The first picture of the file.

    little_endian: how the two bytes of a sample lie; by the format's rule they are big-endian.
    Raises BadRow.
    """
    header = PNM_HEADER.match(data)
    if header is None:
        raise undecodable("PNM", "its header is incomplete")
    form, width, height, white = map(int, header.groups())
    check_size(width, height)
    if not 1 <= white <= 65535:
        raise undecodable("PNM", f"its greatest sample would be {white}")

    planes = (3,) if form in (3, 6) else ()
    dtype = np.dtype("u1" if white < 256 else "<u2" if little_endian else ">u2")
    body = memoryview(data)[header.end() :]
    n_samples = math.prod((width, height, *planes))
    if form in (2, 3):
        samples = _written_out(bytes(body), n_samples)
    elif len(body) < n_samples * dtype.itemsize:
        raise cut_short("PNM")
    else:
        samples = np.frombuffer(body, dtype, n_samples)
    may_be_greater = form in (2, 3) or white not in (255, 65535)
    if may_be_greater and samples.max() > white:
        raise undecodable("PNM", f"a sample is greater than {white}")
    native = samples.astype("u1" if white < 256 else "u2")
    return Pnm(native.reshape(height, width, *planes), white)


def pnm_bytes(head: bytes) -> int | None:
    """How long a file of samples in binary is, by its first bytes; None where they tell nothing."""
    header = PNM_HEADER.match(head)
    if header is None or header[1] not in (b"5", b"6"):
        return None
    form, width, height, white = map(int, header.groups())
    n_samples = width * height * (3 if form == 6 else 1)
    return header.end() + n_samples * (1 if white < 256 else 2)


def _written_out(body: bytes, n_samples: int) -> np.ndarray:
    """Samples that are written as decimal numbers. Raises BadRow."""
    if len(body) < 2 * n_samples - 1:  # no memory is taken for what cannot be there
        raise cut_short("PNM")
    words = COMMENT.sub(b"", body).split(maxsplit=n_samples)[:n_samples]
    if len(words) < n_samples:
        raise cut_short("PNM")
    if not all(word.isdigit() and len(word) < 6 for word in words):
        raise undecodable("PNM", "a sample is no number")
    return np.array([int(word) for word in words], np.uint32)


def read_npy(data: bytes) -> np.ndarray:
    """The array, of numbers or bools, in the byte order of this machine.

    Nothing is unpickled. Raises BadRow.
    """
    file = BytesIO(data)
    try:
        shape, is_fortran, dtype = _npy_header(file)
    except Exception as error:  # numpy hands the text to Python's own parser: nearly every type
        raise undecodable("npy", one_line(error)) from None
    if dtype.hasobject or dtype.kind not in "buif":
        raise BadRow(f"is an array of {dtype}, no picture")
    n_bytes = math.prod(shape) * dtype.itemsize
    if len(data) - file.tell() < n_bytes:
        raise cut_short("npy")
    if not n_bytes:
        raise BadRow(f"is an array of shape {shape}, no picture")

    flat = np.frombuffer(data, dtype, math.prod(shape), offset=file.tell())
    array = flat.reshape(shape, order="F" if is_fortran else "C")
    return array.astype(dtype.newbyteorder("="), order="C", copy=False)


def _npy_header(file: BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Raises what numpy does for a header that it did not write."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file, MAX_NPY_HEADER)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file, MAX_NPY_HEADER)
    raise ValueError(f"version {version} of the format")
