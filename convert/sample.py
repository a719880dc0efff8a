"""`python -m convert sample`: a small .mat of made-up rooms, laid out as nyu_depth_v2_labeled.mat.

For demos and tests. Scene names are official ones, so the split is the official one. What a row
shows is drawn by `convert/rooms.py`; here is the file: which scenes are in it, its HDF5 layout as
MATLAB writes it, and that it appears all at once.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from convert.furniture import ROOMS
from convert.rooms import FIELDS, draw_row, scene_type
from convert.sources.nyu_tables import NyuTables
from convert.sources.nyu_tables import tables as official_tables
from shards.errors import WrongPlace, WrongSetting
from shards.files import fsync, fsync_dir

# How the five arrays are split: as in the published file; as MATLAB splits arrays of these few rows
# when it saves them again (a chunk then spans rows); or not at all.
Chunks = Literal["original", "resaved", "none"]

CHUNK_BYTES = 65536  # MATLAB splits a chunk until it is no larger
ORIGINAL_ROWS = 1449
ORIGINAL_SIZE_WH = (640, 480)
USER_BLOCK_BYTES = 512  # before the HDF5 file; MATLAB's own header is in it
MATLAB_CLASSES = {"|u1": "uint8", "<u2": "uint16", "<f4": "single"}
ROWS_A_SCENE = 3


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """What was asked for, and what follows from it before a row is drawn."""

    n_rows: int
    chunks: Chunks
    seed: int
    size_wh: tuple[int, int]
    classes: Sequence[str]
    scenes: Sequence[str]  # of each row

    def draw(self, row: int) -> dict[str, np.ndarray]:
        """The five fields of a row."""
        ids = {name: number for number, name in enumerate(self.classes, 1)}
        return draw_row(self.scenes[row], row, ids, self.seed, self.size_wh)


def write_sample(
    path: Path,
    rows: int = 48,
    *,
    chunks: Chunks = "original",
    seed: int = 0,
    size_wh: tuple[int, int] = ORIGINAL_SIZE_WH,
) -> None:
    """Write `rows` made-up rows; the file appears under its name only when complete and durable.

    The bytes are a function of the arguments. Raises UserError where `path` exists or cannot be
    written, for no rows, and for pictures under 32 pixels.
    """
    if path.exists():
        raise WrongPlace(path, "exists already", "Remove it, or choose another name")
    if rows < 1 or min(size_wh) < 32:
        raise WrongSetting("rows", f"{rows} of {size_wh}", "choose 1 or more, of 32 pixels or more")

    tables = official_tables()
    sample = SampleFile(
        n_rows=rows,
        chunks=chunks,
        seed=seed,
        size_wh=size_wh,
        classes=tables.classes,
        scenes=plan_scenes(rows, tables, seed),
    )
    _write_whole(path, sample)


def _write_whole(path: Path, sample: SampleFile) -> None:
    """Under a temporary name first, which is removed whatever happens; folders are made.

    Not by the atomic write of `shards`: h5py opens the file itself, by its name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_mat(temporary, sample)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise WrongPlace(path, what, "Choose another place for it") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def plan_scenes(rows: int, tables: NyuTables, seed: int) -> list[str]:
    """The scene of each row, shuffled by scene.

    Train and test take turns, within them the types, and after three such rounds the next scene of
    each type comes: so three rows are of one scene, and few rows have every type in both splits.
    """
    kinds = list(ROOMS)
    rows_a_round = 2 * ROWS_A_SCENE * len(kinds)  # a scene of every type in both splits
    scenes = []
    for k in range(rows):
        split = tables.test_scenes if k % 2 else tables.train_scenes
        kind = kinds[k // 2 % len(kinds)]
        of_kind = [scene for scene in split if scene_type(scene) == kind]
        scenes.append(of_kind[(seed + k // rows_a_round) % len(of_kind)])
    return sorted(scenes, key=lambda scene: zlib.crc32(f"{seed} {scene}".encode()))


def matlab_chunk(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """MATLAB's chunk for an array: the longest axis is split, then the next, until it fits.

    Of equally long axes the last is split first.
    """
    chunk = list(shape)
    longest_first = sorted(range(len(shape)), key=lambda axis: (shape[axis], axis), reverse=True)
    for axis in longest_first:
        n_bytes = item_bytes * int(np.prod(chunk))
        n_parts = -(-n_bytes // CHUNK_BYTES)  # rounded up; 1 where it fits already
        chunk[axis] = max(1, chunk[axis] // n_parts)
    return tuple(chunk)


def _write_mat(path: Path, sample: SampleFile) -> None:
    """The whole file, made durable; its bytes depend on the order in which parts are created."""
    with h5py.File(path, "w", userblock_size=USER_BLOCK_BYTES, libver="earliest") as file:
        _write_object_stubs(file)
        _write_accel(file, sample)
        _write_arrays(file, sample)
        for name, strings in _string_cells(sample).items():
            _write_cell(file, name, strings)

    # The first 128 bytes of the user block make MATLAB take the file for its own.
    header = b"MATLAB 7.3 MAT-file, Platform: MADE-UP, HDF5 schema 1.00 ."
    version_and_byte_order = b"\0\2IM"
    with open(path, "r+b", buffering=0) as raw:
        raw.write(header.ljust(116) + bytes(8) + version_and_byte_order)
        fsync(raw.fileno())


def _write_object_stubs(file: h5py.File) -> None:
    """What MATLAB leaves in the original of an object (namesToIds) that only MATLAB can read."""
    empty = _create(file, "#refs#/a", "canonical empty", data=np.zeros(2, "<u8"))
    object_number = np.array([[3707764736, 2, 1, 1, 1, 1]], "<u4")
    _create(file, "namesToIds", "containers.Map", data=object_number)
    objects = np.array([[empty.ref]], h5py.ref_dtype)
    _create(file, "#subsystem#/MCOS", "FileWrapper__", data=objects)


def _write_accel(file: h5py.File, sample: SampleFile) -> None:
    """(4, N): what the accelerometer of a camera held level could have read."""
    level = [[0], [-1], [0], [0]]
    rng = np.random.default_rng([sample.seed, 4])
    accel = rng.normal(level, 0.05, (4, sample.n_rows)).astype("<f4")
    _create(file, "accelData", "single", chunk=accel.shape, data=accel)


def _write_arrays(file: h5py.File, sample: SampleFile) -> None:
    """The five arrays, as many rows at a time as the widest chunk spans: each is deflated once."""
    for name, kind in FIELDS.items():
        shape = (sample.n_rows, *kind.planes, *sample.size_wh)
        _create(
            file,
            name,
            MATLAB_CLASSES[kind.dtype],
            chunk=_chunk_of(name, shape, sample.chunks),
            shape=shape,
            dtype=kind.dtype,
        )

    chunks = [file[name].chunks for name in FIELDS]
    step = max(chunk[0] if chunk else 1 for chunk in chunks)
    for low in range(0, sample.n_rows, step):
        high = min(low + step, sample.n_rows)
        drawn = [sample.draw(row) for row in range(low, high)]
        for name in FIELDS:
            file[name][low:high] = np.stack([fields[name] for fields in drawn])


def _chunk_of(name: str, shape: tuple[int, ...], chunks: Chunks) -> tuple[int, ...] | None:
    """The chunk of one of the five arrays, None for one piece."""
    item_bytes = np.dtype(FIELDS[name].dtype).itemsize
    if chunks == "none":
        return None
    if chunks == "resaved":
        return matlab_chunk(shape, item_bytes)
    original_shape = (ORIGINAL_ROWS, *FIELDS[name].planes, *ORIGINAL_SIZE_WH)
    original = matlab_chunk(original_shape, item_bytes)
    return tuple(min(n, n_chunk) for n, n_chunk in zip(shape, original, strict=True))


def _string_cells(sample: SampleFile) -> dict[str, Sequence[str]]:
    """The strings of each of the file's cell arrays.

    Names of raw files have the time and a counter in them, as those that the Kinect's driver gave.
    """
    numbers = range(sample.n_rows)
    seconds = [f"{1294851097 + 7 * i}.{i * 7919 % 1000000:06d}" for i in numbers]
    stamps = [f"{seconds[i]}-{i * 2654435761 % 2**32}" for i in numbers]
    return {
        "names": sample.classes,
        "scenes": sample.scenes,
        "sceneTypes": [scene_type(scene) for scene in sample.scenes],
        "rawRgbFilenames": [f"{sample.scenes[i]}/r-{stamps[i]}.ppm" for i in numbers],
        "rawDepthFilenames": [f"{sample.scenes[i]}/d-{stamps[i]}.pgm" for i in numbers],
    }


def _write_cell(file: h5py.File, name: str, strings: Sequence[str]) -> None:
    """(1, N) references, each to the (length, 1) character codes of a string."""
    targets = []
    for k, text in enumerate(strings):
        codes = np.frombuffer(text.encode("utf-16-le"), "<u2").reshape(-1, 1)
        targets.append(_create(file, f"#refs#/{name}{k}", "char", data=codes).ref)
    _create(file, name, "cell", data=np.array([targets], h5py.ref_dtype))


def _create(
    file: h5py.File,
    name: str,
    matlab_class: str,
    chunk: tuple[int, ...] | None = None,
    **content: Any,
) -> h5py.Dataset:
    """A dataset that MATLAB knows the class of; deflated as MATLAB does where it is chunked."""
    if chunk:
        content |= {"chunks": chunk, "compression": "gzip", "compression_opts": 3}
    dataset = file.create_dataset(name, **content)
    dataset.attrs["MATLAB_class"] = np.bytes_(matlab_class)
    return dataset
