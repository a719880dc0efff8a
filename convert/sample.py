"""A small .mat of made-up rooms in the layout of nyu_depth_v2_labeled.mat, for demos and tests.

Each row is a picture of a box-shaped room, ray-traced at half size: the scene type decides the palette, the furniture
and the size of the room; the scene its exact arrangement; the row the camera and the light. Scene names are official
ones, so the split is the official one.
"""

import json
import math
import os
import re
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from convert.format import UserError, fsync_dir

Chunks = Literal["original", "resaved", "none"]
Rgb = tuple[int, int, int]
Size3 = tuple[float, float, float]

HEADER = b"MATLAB 7.3 MAT-file, Platform: MADE-UP, Created on: Thu Jan  1 00:00:00 1970 HDF5 schema 1.00 ."
CHUNK_BYTES = 65536  # MATLAB splits a chunk until it is no larger
FIELDS: dict[str, tuple[int, str, str, tuple[int, ...]]] = {  # planes, dtype, MATLAB class, chunk of one row (W, H)
    "images": (3, "|u1", "uint8", (42, 480)),
    "depths": (0, "<f4", "single", (33, 480)),
    "rawDepths": (0, "<f4", "single", (33, 480)),
    "labels": (0, "<u2", "uint16", (64, 480)),
    "instances": (0, "|u1", "uint8", (128, 480)),
}
FOCAL = 519 / 640  # Kinect's focal length, in picture widths
NEAR_M, FAR_M = 0.7133, 9.9955


@dataclass(frozen=True)
class Piece:
    """A piece of furniture: centre (x, z) as fractions of the room, base above the floor, back turned to a wall."""

    label: str
    x: float
    z: float
    size: Size3  # width, height, depth in metres, seen from its front
    base: float = 0.0
    turn: int = 0  # back towards: 0 back wall, 1 left wall, 2 right wall, 3 the camera


@dataclass(frozen=True)
class RoomType:
    size: Size3  # width, height, depth in metres
    walls: list[Rgb]
    floors: list[Rgb]
    accents: list[Rgb]
    floor_texture: list[float]
    pieces: list[Piece]


@dataclass(frozen=True)
class Box:
    """One axis-aligned box of a room; `piece` counts the pieces, so that the parts of a chair are one instance."""

    low: Size3
    high: Size3
    label: str
    colour: np.ndarray
    piece: int


Part = tuple[float, float, float, float, float, float]  # x0 x1 y0 y1 z0 z1 as fractions of the piece, z = 1 its back
GLOWING = ("window", "lamp")
GLOSSY = ("window", "mirror", "television", "monitor")  # the sensor measures little on these
PLAIN = (9.0, 9.0, 0.0, 0.0)
# colours of furniture, its parts, its textures (period across and up in metres, variation of tone, width of the dark
# line as a fraction of the period), and what stands where in which type of room
_DRAWINGS: dict[str, Any] = json.loads(Path(__file__).with_name("rooms.json").read_text())
COLOURS: dict[str, list[Rgb]] = _DRAWINGS["colours"]
PARTS: dict[str, list[Part]] = _DRAWINGS["parts"]
TEXTURES: dict[str, list[float]] = _DRAWINGS["textures"]
ROOMS = {
    name: RoomType(**{**room, "pieces": [Piece(*piece) for piece in room["pieces"]]})
    for name, room in _DRAWINGS["rooms"].items()
}


def write_sample(
    path: Path, rows: int = 48, *, chunks: Chunks = "original", seed: int = 0, size_wh: tuple[int, int] = (640, 480)
) -> None:
    """Write `rows` made-up rows; the file appears under its name only when complete and durable."""
    if path.exists():
        raise UserError(f"{path} exists already. Remove it, or choose another name: python -m convert sample OTHER.mat")
    if rows < 1 or min(size_wh) < 32:
        what = f"{rows} rows of {size_wh[0]}x{size_wh[1]}: too few"
        raise UserError(f"{what}. Run: python -m convert sample {path} --rows 48")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_hdf5(temporary, rows, chunks, seed, size_wh)
        _write_user_block(temporary)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as error:
        hint = "Choose another place: python -m convert sample OTHER.mat"
        raise UserError(f"{path} cannot be written ({error.strerror or error}). {hint}") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def plan_scenes(rows: int, tables: dict[str, Any], seed: int) -> list[str]:
    """The scene of each row: half train and half test, the types in equal parts, about three rows a scene."""
    rng = np.random.default_rng([seed, 1])
    scenes: list[str] = []
    for quota, split in ((rows - rows // 2, "train_scenes"), (rows // 2, "test_scenes")):
        for k, kind in enumerate(ROOMS):
            official = [s for s in tables[split] if scene_type(s) == kind]
            n_rows = len(range(k, quota, len(ROOMS)))
            picked = rng.permutation(official)[: max(1, round(n_rows / 3))]
            scenes += [str(picked[i % len(picked)]) for i in range(n_rows)]
    place = {scene: k for k, scene in enumerate(rng.permutation(sorted(set(scenes))))}
    return sorted(scenes, key=place.__getitem__)


def scene_type(scene: str) -> str:
    """`living_room_0012a` -> `living_room`"""
    return re.sub(r"_\d+[a-z]?$", "", scene)


# ---------------------------------------------------------------- the picture


def draw_row(scene: str, row: int, ids: dict[str, int], seed: int, size_wh: tuple[int, int]) -> dict[str, np.ndarray]:
    """One row as the .mat holds it: every plane transposed to (width, height)."""
    kind = ROOMS[scene_type(scene)]
    room_rng = np.random.default_rng([seed, 2, zlib.crc32(scene.encode())])
    rng = np.random.default_rng([seed, 3, row])
    size = tuple(s * room_rng.uniform(0.88, 1.15) for s in kind.size)
    low, high = np.array([-size[0] / 2, 0, -1]), np.array([size[0] / 2, size[1], size[2]])
    boxes = _furnish(kind, low, high, room_rng)
    depth, surface, axis, point = _trace(low, high, boxes, rng, (-(-size_wh[0] // 2), -(-size_wh[1] // 2)))
    colours, textures, label_names, instances = _surfaces(kind, boxes, room_rng)
    rgb = _paint(depth, surface, axis, point, high, colours, textures, rng)
    glow = np.isin(label_names, GLOWING)[surface]
    rgb[:, glow] = np.maximum(rgb[:, glow], colours[surface[glow]].T * 0.92)
    edge = _edges(np.where(surface < 6, surface, np.unique(label_names, return_inverse=True)[1][surface] + 6))
    label = _label_plane(surface, edge, label_names, ids, rng)
    raw = _as_sensed(depth, edge, np.isin(label_names, GLOSSY)[surface], rng)
    planes = {"depths": depth, "rawDepths": raw, "labels": label, "instances": instances[surface] * (label > 0)}
    out = {name: _double(p, size_wh).astype(FIELDS[name][1]).T for name, p in planes.items()}
    out["images"] = _finish_rgb(rgb, size_wh, rng).transpose(0, 2, 1)
    _clear_frame(out["rawDepths"].T)
    return out


def _furnish(kind: RoomType, low: np.ndarray, high: np.ndarray, rng: np.random.Generator) -> list[Box]:
    boxes: list[Box] = []
    for k, piece in enumerate(kind.pieces):
        optional = k > 1 and piece.label not in ("cabinet", "counter", "table", "toilet", "desk")
        if optional and rng.random() < 0.15:
            continue
        colour = _pick(COLOURS.get(piece.label, kind.accents), rng)
        size = np.array(piece.size) * rng.uniform(0.92, 1.08)
        if piece.turn in (1, 2):
            size = size[[2, 1, 0]]
        at = np.array([piece.x, 0, piece.z])
        at = np.where((at > 0) & (at < 1), at + rng.uniform(-0.05, 0.05, 3), at)
        centre = low + (high - low) * at - [0, 0, (1 - at[2]) * low[2]]  # z counts from the camera, not from behind it
        corner = np.clip(centre - size / 2, low, np.maximum(low, high - size))
        corner[1] = piece.base
        for part in PARTS.get(piece.label, ((0, 1, 0, 1, 0, 1),)):
            start, stop = _turned(part, piece.turn)
            boxes.append(Box(tuple(corner + size * start), tuple(corner + size * stop), piece.label, colour, k))
    return boxes


def _pick(colours: list[Rgb], rng: np.random.Generator) -> np.ndarray:
    colour = np.array(colours[rng.integers(len(colours))], np.float64)
    return np.clip(colour * rng.uniform(0.85, 1.1) * rng.uniform(0.95, 1.05, 3), 0, 255)


def _turned(part: Part, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """The part's two corners after the piece is turned."""
    x0, x1, y0, y1, z0, z1 = part
    if turn == 1:
        x0, x1, z0, z1 = 1 - z1, 1 - z0, x0, x1
    elif turn == 2:
        x0, x1, z0, z1 = z0, z1, x0, x1
    elif turn == 3:
        z0, z1 = 1 - z1, 1 - z0
    return np.array([x0, y0, z0]), np.array([x1, y1, z1])


def _rays(rng: np.random.Generator, size_wh: tuple[int, int]) -> np.ndarray:
    """(3, H, W) directions of a hand-held camera, scaled so that the distance along one is the planar depth."""
    w, h = size_wh
    yaw, pitch, roll = rng.uniform(-0.32, 0.32), rng.uniform(0.08, 0.3), rng.uniform(-0.03, 0.03)
    u = np.broadcast_to((np.arange(w) + 0.5 - w / 2) / (FOCAL * w), (h, w))
    v = np.broadcast_to(((h / 2 - np.arange(h) - 0.5) / (FOCAL * w))[:, None], (h, w))
    u, v = u * math.cos(roll) - v * math.sin(roll), u * math.sin(roll) + v * math.cos(roll)
    y, forward = v * math.cos(pitch) - math.sin(pitch), math.cos(pitch) + v * math.sin(pitch)
    x, z = u * math.cos(yaw) + forward * math.sin(yaw), forward * math.cos(yaw) - u * math.sin(yaw)
    rays = np.stack([x, y, z]).astype(np.float32)
    return np.where(np.abs(rays) < 1e-6, np.float32(1e-6), rays)


def _trace(
    low: np.ndarray, high: np.ndarray, boxes: list[Box], rng: np.random.Generator, size_wh: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Depth in metres, surface (0-5 the room's sides, 6... the boxes), axis of its normal, point: all (..., H, W)."""
    eye = np.array([rng.uniform(-0.18, 0.18) * high[0] * 2, rng.uniform(1.2, 1.6), rng.uniform(-0.5, 0.1)])
    eye = eye.astype(np.float32)[:, None, None]
    rays = _rays(rng, size_wh)
    inverse = 1 / rays
    far = np.maximum(*_slabs(low, high, eye, inverse))
    axis, depth = far.argmin(0), far.min(0)
    surface = 2 * axis + (np.take_along_axis(rays, axis[None], 0)[0] > 0)
    for k, box in enumerate(boxes, start=6):
        one, two = _slabs(np.array(box.low), np.array(box.high), eye, inverse)
        near = np.minimum(one, two)
        enter, leave = near.max(0), np.maximum(one, two).min(0)
        hit = (enter < leave) & (enter > 0.45) & (enter < depth)
        depth[hit], surface[hit], axis[hit] = enter[hit], k, near[:, hit].argmax(0)
    point = eye + rays * depth
    noise = rng.normal(0, 0.0015, depth.shape).astype(np.float32) * depth
    return np.clip(depth + noise, NEAR_M, FAR_M), surface, axis, point


def _slabs(low: np.ndarray, high: np.ndarray, eye: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances along each ray to a box's two planes across each axis."""
    first, second = (c.astype(np.float32)[:, None, None] - eye for c in (low, high))
    return first * inverse, second * inverse


def _surfaces(
    kind: RoomType, boxes: list[Box], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per surface: colour, texture, class name, instance number within its class."""
    wall, floor, ceiling = _pick(kind.walls, rng), _pick(kind.floors, rng), np.array([226.0, 224, 218])
    colours = np.stack([wall, wall, floor, ceiling, wall, wall, *(b.colour for b in boxes)]).astype(np.float32)
    names = ["wall", "wall", "floor", "ceiling", "wall", "wall", *(b.label for b in boxes)]
    tiled = kind.floor_texture[0] == 0.33 and rng.random() < 0.6
    tiled_walls = kind.floor_texture if tiled else PLAIN
    room = {"floor": kind.floor_texture, "wall": tiled_walls}
    textures = np.array([room.get(n, TEXTURES.get(n, PLAIN)) for n in names], np.float32)
    numbers, seen, latest = [1, 2, 1, 1, 4, 3], Counter[str](), -1
    for box in boxes:
        seen[box.label] += box.piece != latest
        latest = box.piece
        numbers.append(seen[box.label])
    return colours, textures, np.array(names), np.array(numbers, np.uint8)


def _paint(
    depth: np.ndarray, surface: np.ndarray, axis: np.ndarray, point: np.ndarray, high: np.ndarray,
    colours: np.ndarray, textures: np.ndarray, rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """(3, H, W) float32 colours 0..255: texture, then shading by face, height, corner and distance."""
    across, up = np.where(axis == 0, point[2], point[0]), np.where(axis == 1, point[2], point[1])
    step_a, step_b, variation, line = textures[surface].transpose(2, 0, 1)
    a, b = (across + 20) / step_a, (up + 20) / step_b
    hashed = (a.astype(np.int64) * 73856093 ^ b.astype(np.int64) * 19349663 ^ surface * 83492791) % 1009 / 1009
    tone = 1 + variation * (hashed.astype(np.float32) - 0.5)
    tone[(a % 1 < line) | (b % 1 < line)] *= 0.66
    to_walls = np.stack([high[0] - np.abs(point[0]), np.minimum(point[1], high[1] - point[1]), high[2] - point[2]])
    corner = 1 - 0.32 * np.exp(-np.sort(to_walls, 0)[1] / 0.22)
    face = np.array([0.80, 1.0, 0.9], np.float32)[axis]
    lamp = np.array([rng.uniform(-0.5, 0.5) * high[0], high[1], rng.uniform(0.3, 0.8) * high[2]])[:, None, None]
    light = 0.55 + 0.75 / (1 + 0.14 * ((point - lamp) ** 2).sum(0))
    tint = rng.uniform(0.82, 1.08) * rng.uniform(0.94, 1.06, 3)
    shade = (tone * corner * face * light / (1 + 0.02 * depth)).astype(np.float32)
    return colours[surface].transpose(2, 0, 1) * shade * tint.astype(np.float32)[:, None, None]


def _edges(identity: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the left or above."""
    edge = np.zeros(identity.shape, bool)
    edge[:, 1:] = identity[:, 1:] != identity[:, :-1]
    edge[1:] |= identity[1:] != identity[:-1]
    return edge


def _label_plane(
    surface: np.ndarray, edge: np.ndarray, names: np.ndarray, ids: dict[str, int], rng: np.random.Generator
) -> np.ndarray:
    """Class ids; 0 along edges and on something that the annotators left out."""
    of_surface = np.array([ids[n] for n in names])
    of_surface[names == rng.choice(["ceiling", *sorted(set(names[6:]))])] = 0
    return np.where(edge, 0, of_surface[surface])


def _as_sensed(depth: np.ndarray, edge: np.ndarray, glossy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the Kinect gives: whole disparities; nothing in shadows beside edges, on gloss, in blobs, far away."""
    raw = np.float32(351.3) / np.round(np.float32(351.3) / depth)
    hole = edge | (depth > 9.5)
    for shift in (1, 2, 3):
        hole[:, :-shift] |= edge[:, shift:]
    blobs = rng.random((-(-depth.shape[0] // 5), -(-depth.shape[1] // 5)))
    blobs = blobs.repeat(5, 0).repeat(5, 1)[: depth.shape[0], : depth.shape[1]]
    hole |= np.where(glossy, blobs < 0.7, blobs < 0.02)
    return np.where(hole, np.float32(0), np.minimum(raw, np.float32(FAR_M)))


def _double(plane: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    return plane.repeat(2, -2).repeat(2, -1)[..., : size_wh[1], : size_wh[0]]


def _finish_rgb(rgb: np.ndarray, size_wh: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Full size, with noise and the white frame of the original (rows 0-5 and 473-479, columns 0-6 and 632-639)."""
    full = _double(np.clip(rgb, 4, 246).astype(np.uint8), size_wh)
    full = full + rng.integers(0, 8, full.shape, np.uint8)
    h, w = full.shape[1:]
    full[:, : h * 6 // 480], full[:, h - h * 7 // 480 :] = 255, 255
    full[:, :, : w * 7 // 640], full[:, :, w - w * 8 // 640 :] = 255, 255
    return full


def _clear_frame(raw: np.ndarray) -> None:
    """No measurement outside [45:471, 41:601], as in the original."""
    h, w = raw.shape
    raw[: h * 45 // 480], raw[h * 471 // 480 :] = 0, 0
    raw[:, : w * 41 // 640], raw[:, w * 601 // 640 :] = 0, 0


# ---------------------------------------------------------------- the file


def matlab_chunk(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """MATLAB's chunk for an array: split its longest axis not yet split, the last of equals, until it fits."""
    chunk = list(shape)
    for axis in sorted(range(len(shape)), key=lambda i: (shape[i], i), reverse=True):
        n_bytes = item_bytes * math.prod(chunk)
        if n_bytes <= CHUNK_BYTES:
            break
        chunk[axis] = max(1, chunk[axis] // -(-n_bytes // CHUNK_BYTES))
    return tuple(chunk)


def _write_hdf5(path: Path, rows: int, chunks: Chunks, seed: int, size_wh: tuple[int, int]) -> None:
    tables = json.loads(Path(__file__).with_name("tables.json").read_text())
    scenes = plan_scenes(rows, tables, seed)
    stamps = [f"{1294851097 + 7 * i}.{i * 7919 % 1000000:06d}-{i * 2654435761 % 2**32}" for i in range(rows)]
    with h5py.File(path, "w", userblock_size=512, libver="earliest") as file:
        empty = _write_stubs(file)
        _write_accel(file, rows, seed)
        _write_arrays(file, scenes, {n: i for i, n in enumerate(tables["classes"], 1)}, chunks, seed, size_wh)
        _write_cell(file, "names", tables["classes"], empty)
        _write_cell(file, "scenes", scenes, empty)
        _write_cell(file, "sceneTypes", [scene_type(s) for s in scenes], empty)
        _write_cell(file, "rawRgbFilenames", [f"{s}/r-{t}.ppm" for s, t in zip(scenes, stamps, strict=True)], empty)
        _write_cell(file, "rawDepthFilenames", [f"{s}/d-{t}.pgm" for s, t in zip(scenes, stamps, strict=True)], empty)


def _write_arrays(
    file: Any, scenes: list[str], ids: dict[str, int], chunks: Chunks, seed: int, size_wh: tuple[int, int]
) -> None:
    """The five arrays, as many rows at a time as the widest chunk spans, so that each chunk is deflated once."""
    for name, (planes, dtype, matlab_class, tile) in FIELDS.items():
        shape = (len(scenes), *((planes,) if planes else ()), *size_wh)
        one_row = (1, *shape[1:-2], min(tile[0], size_wh[0]), min(tile[1], size_wh[1]))
        chunk = one_row if chunks == "original" else matlab_chunk(shape, np.dtype(dtype).itemsize)
        how = {} if chunks == "none" else {"chunks": chunk, "compression": "gzip", "compression_opts": 3}
        _tag(file.create_dataset(name, shape, dtype, **how), matlab_class)
    step = max((file[name].chunks or (1,))[0] for name in FIELDS)
    for low in range(0, len(scenes), step):
        group = range(low, min(low + step, len(scenes)))
        drawn = [draw_row(scenes[i], i, ids, seed, size_wh) for i in group]
        for name in FIELDS:
            file[name][low : group.stop] = np.stack([row[name] for row in drawn])


def _write_accel(file: Any, rows: int, seed: int) -> None:
    """(4, N): roll, yaw, pitch, tilt; gravity is about -1 on the second."""
    rng = np.random.default_rng([seed, 4])
    accel = rng.normal(0, 0.05, (4, rows)).astype("<f4")
    accel[1] -= 1
    how = {"chunks": accel.shape, "compression": "gzip", "compression_opts": 3}
    _tag(file.create_dataset("accelData", data=accel, **how), "single")


def _write_stubs(file: Any) -> Any:
    """What MATLAB leaves behind for the object `namesToIds`. Returns the shared empty array of #refs#."""
    empty = file.create_group("#refs#").create_dataset("a", data=np.zeros(2, "<u8"))
    _tag(empty, "canonical empty")
    empty.attrs.create("MATLAB_empty", np.uint8(1))
    stub = file.create_dataset("namesToIds", data=np.array([[3707764736, 2, 1, 1, 1, 1]], "<u4"))
    _tag(stub, "containers.Map", MATLAB_object_decode=3)
    objects = file.create_group("#subsystem#").create_dataset("MCOS", (1, 1), h5py.ref_dtype)
    objects[0, 0] = empty.ref
    _tag(objects, "FileWrapper__", MATLAB_object_decode=3)
    return empty


def _write_cell(file: Any, name: str, strings: list[str], empty: Any) -> None:
    """A (1, N) array of references, each to the (length, 1) uint16 character codes of one string."""
    cell = file.create_dataset(name, (1, len(strings)), h5py.ref_dtype)
    _tag(cell, "cell")
    targets = []
    for text in strings:
        codes = np.frombuffer(text.encode("utf-16-le"), "<u2").reshape(-1, 1)
        target = file["#refs#"].create_dataset(_letters(len(file["#refs#"])), data=codes) if text else empty
        if text:
            _tag(target, "char", MATLAB_int_decode=2)
        targets.append(target.ref)
    cell[0, :] = targets


def _letters(number: int) -> str:
    """MATLAB's names in #refs#: a ... z A ... Z, then two letters, and so on."""
    alphabet, name = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", ""
    while number >= 0:
        name, number = alphabet[number % 52] + name, number // 52 - 1
    return name


def _tag(target: Any, matlab_class: str, **numbers: int) -> None:
    target.attrs.create("MATLAB_class", np.bytes_(matlab_class), dtype=h5py.string_dtype("ascii", len(matlab_class)))
    for key, value in numbers.items():
        target.attrs.create(key, np.int32(value))


def _write_user_block(path: Path) -> None:
    """The 128 bytes that make MATLAB take the file for its own, then onto the disk."""
    with open(path, "r+b") as file:
        file.write(HEADER.ljust(116) + bytes(8) + struct.pack("<H", 0x0200) + b"IM")
        file.flush()
        os.fsync(file.fileno())
