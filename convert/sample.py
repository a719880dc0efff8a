"""A small .mat of made-up rooms in the layout of nyu_depth_v2_labeled.mat, for demos and tests.

Each row is a picture of a box-shaped room, ray-traced at half size: the scene type decides the palette, the furniture
and the size of the room; the scene its exact arrangement; the row the camera and the light. Scene names are official
ones, so the split is the official one. Planes are drawn as they are stored, (W, H).
"""

import os
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np

from convert.sources.nyu_tables import tables as official_tables
from shards.format import UserError, fsync, fsync_dir

Chunks = Literal["original", "resaved", "none"]
Pattern = tuple[
    float, float, float, float
]  # period across and up in metres, tone variation, share of the dark joint
CHUNK_BYTES = 65536  # MATLAB splits a chunk until it is no larger
FIELDS: dict[str, tuple[tuple[int, ...], str, str]] = {  # planes, dtype, MATLAB class
    "images": ((3,), "|u1", "uint8"), "depths": ((), "<f4", "single"), "rawDepths": ((), "<f4", "single"),
    "labels": ((), "<u2", "uint16"), "instances": ((), "|u1", "uint8"),
}  # fmt: skip
FOCAL = 519 / 640  # Kinect's focal length, in picture widths
NEAR_M, FAR_M, DISPARITY = np.float32(0.7133), np.float32(9.9955), np.float32(351.3)


class Surface(NamedTuple):
    """A side of the room or a box in it; the parts of one chair have one instance number."""

    label: str
    instance: int
    ends: np.ndarray  # (2, 3): lowest and highest corner
    colour: np.ndarray
    pattern: Pattern


PLAIN, TILES, PLANKS, CARPET = (
    (9, 9, 0, 0),
    (0.33, 0.33, 0.1, 0.03),
    (0.14, 1.6, 0.22, 0.03),
    (0.03, 0.03, 0.14, 0),
)
PATTERNS: dict[str, Pattern] = {
    "cabinet": (.45, .9, .06, .04), "dresser": (.6, .24, .06, .08), "rug": (.3, .3, .4, 0), "bed": (.25, .25, .14, 0),
    "bookshelf": (.2, .4, .9, .08), "picture": (.2, .15, .8, 0), "blinds": (9, .06, 0, .3), "window": (.6, .6, 0, .09),
}  # fmt: skip
WOODEN = ("table", "coffee table", "desk", "night stand", "bookshelf", "cabinet", "dresser")
WHITE = ("toilet", "bathtub", "sink", "lamp", "refridgerator", "whiteboard")
GLOWING, GLOSSY = (
    ("window", "lamp"),
    ("window", "mirror", "television", "monitor"),
)  # gloss: little is measured
COLOURS = {  # every other class has the room's own; later entries win
    **dict.fromkeys(WOODEN, "7a5234 9e744c 5c3e2c bc986c"), **dict.fromkeys(WHITE, "e2e2de ced2d4"), "stove": "3a3634",
    **dict.fromkeys(GLOSSY, "282a2e 3a3634"), **dict.fromkeys(("window", "mirror"), "d6e4f4 f0ecdc c4d8ec"),
}  # fmt: skip
LEGS = tuple((x, 0, z, x + 0.08, 0.9, z + 0.08) for x in (0, 0.92) for z in (0, 0.92))
PARTS: dict[str, tuple[tuple[float, ...], ...]] = {  # two corners x y z as shares of the piece, z = 1 its back
    **dict.fromkeys(("table", "coffee table", "desk"), ((0, .9, 0, 1, 1, 1), *LEGS)),
    "chair": ((0, .45, 0, 1, .52, 1), (0, .52, .88, 1, 1, 1), *((*leg[:4], .45, leg[5]) for leg in LEGS)),
    "sofa": ((0, .08, 0, 1, .5, 1), (0, .5, .74, 1, 1, 1), (0, 0, 0, .1, .72, 1), (.9, 0, 0, 1, .72, 1)),
    "bed": ((0, .15, 0, 1, .58, .96), (0, 0, .96, 1, 1, 1)), "lamp": ((.4, 0, .4, .6, .5, .6), (0, .5, 0, 1, 1, 1)),
    "toilet": ((.1, 0, 0, .9, .5, .7), (0, .4, .72, 1, 1, 1)), "bathtub":
        ((0, 0, 0, 1, .2, 1), (0, 0, 0, 1, 1, .1), (0, 0, .9, 1, 1, 1), (0, 0, 0, .1, 1, 1), (.9, 0, 0, 1, 1, 1)),
}  # fmt: skip
# Metres; floor; colours of walls, floor, furniture; pieces: class, centre x z as shares of the room, width height depth
# in metres, base above the floor, back (0 at the back wall, 1 left, 2 camera, 3 right); the first 3 are always there.
ROOMS: dict[str, tuple[tuple[float, float, float], Pattern, tuple[str, str, str], str]] = {
    "bedroom": ((3.9, 2.5, 4.3), CARPET, ("cec2ac b2becc d6cec4", "a8947c 8e827a", "80363e 485c8a 9680a8 c4b28e"),
        "bed .5 1 1.8 .95 2.1,night_stand .06 1 .5 .55 .42,pillow .4 .97 .6 .16 .4 .55,lamp .1 .98 .28 .45 .28 .55,"
        "dresser 0 .55 1.3 .9 .5 0 1,window 1 .55 1.4 1.2 .04 .95 3,picture .5 1 .8 .5 .03 1.5"),
    "kitchen": ((3.3, 2.5, 3.7), TILES, ("ded2ac ccd0c4 e2dcce", "b08e68 beb8ac", "aa3c2c deb240 96928c"),
        "cabinet .35 1 2.3 .88 .6,counter .35 1 2.3 .05 .64 .88,refridgerator 1 .55 .75 1.8 .7 0 3,"
        "stove .86 1 .65 .92 .66,cabinet 0 1 .9 .75 .36 1.5,cabinet .9 1 .9 .6 .36 1.6,window .45 1 .9 .9 .04 1.15"),
    "living_room": ((5.2, 2.7, 5.6), PLANKS, ("d2be98 c0b8a8 b0b69e", "7c5638 a48864", "7c5840 60685c 943c30 464a60"),
        "sofa .5 1 2.2 .85 .95,cabinet 1 .6 1.5 .6 .45 0 3,television 1 .6 1.1 .65 .12 .6 3,sofa 0 .6 1.6 .85 .9 0 1,"
        "rug .5 .62 2.4 .02 1.8,coffee_table .5 .64 1.2 .42 .65,lamp .02 .97 .45 1.6 .45,picture .4 1 1 .7 .03 1.35"),
    "bathroom": ((2.3, 2.4, 2.9), TILES, ("d4dcde c6d2c4 e4ded4", "b8baba 969ca4", "5c94a0 c4787c ece8dc"),
        "toilet .45 1 .45 .8 .7,bathtub 0 .75 1.6 .55 .72 0 1,cabinet 1 .78 1 .8 .52 0 3,sink 1 .78 .6 .06 .5 .8 3,"
        "mirror 1 .78 .9 .9 .03 1.1 3,towel .5 1 .5 .6 .05 1.25,rug .5 .6 .8 .02 .5"),
    "dining_room": ((4.3, 2.7, 4.7), PLANKS, ("c6b08c baa084 d0c8b4", "704a30 96704a", "744630 543e34 a08054"),
        "table .5 .62 1.7 .76 1,chair .36 .8 .46 .98 .46,chair .38 .44 .46 .98 .46 0 2,chair .62 .8 .46 .98 .46,"
        "chair .2 .62 .46 .98 .46 0 1,cabinet .2 1 1.4 1.1 .45,picture .25 1 .9 .6 .03 1.5,window .9 1 1 1.4 .04 .8"),
    "office": ((3.7, 2.8, 4.1), CARPET, ("ccceca bec6ce d6d2c6", "686c74 7e766c", "2c303c 3c5474 5c5c5a"),
        "desk .4 1 1.7 .75 .8,monitor .3 .96 .55 .42 .08 .8,bookshelf 1 .66 1.3 2 .3 0 3,chair .4 .6 .5 1 .5 0 2,"
        "whiteboard 0 .65 1.5 1 .03 1 1,keyboard .3 .88 .45 .03 .16 .75,blinds .85 1 1.2 1.3 .04 1"),
}  # fmt: skip


def write_sample(
    path: Path,
    rows: int = 48,
    *,
    chunks: Chunks = "original",
    seed: int = 0,
    size_wh: tuple[int, int] = (640, 480),
) -> None:
    """Write `rows` made-up rows; the file appears under its name only when complete and durable."""
    if path.exists():
        raise UserError(
            f"{path} exists already. Remove it, or choose another name: python -m convert sample OTHER.mat"
        )
    if rows < 1 or min(size_wh) < 32:
        raise UserError(
            f"{rows} rows of {size_wh}: too few. Run: python -m convert sample {path} --rows 48"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_hdf5(temporary, rows, chunks, seed, size_wh)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as error:
        what = f"{path} cannot be written ({error.strerror or error})"
        raise UserError(
            f"{what}. Choose another place: python -m convert sample OTHER.mat"
        ) from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def scene_type(scene: str) -> str:
    """`living_room_0012a` -> `living_room`"""
    return scene.rpartition("_")[0]


def plan_scenes(rows: int, tables: dict[str, Any], seed: int) -> list[str]:
    """The scene of each row: train and test in turn, the types in turn, three rows a scene; then shuffled by scene."""
    scenes = []
    for k in range(rows):
        split, kind = (
            tables[("train_scenes", "test_scenes")[k % 2]],
            list(ROOMS)[k // 2 % len(ROOMS)],
        )
        official = [s for s in split if scene_type(s) == kind]
        scenes.append(official[(seed + k // (6 * len(ROOMS))) % len(official)])
    return sorted(scenes, key=lambda scene: zlib.crc32(f"{seed} {scene}".encode()))


def draw_row(
    scene: str, row: int, ids: dict[str, int], seed: int, size_wh: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The five fields of one row, as the .mat holds them."""
    (w, h), rng = size_wh, np.random.default_rng([seed, 3, row])
    made = _furnish(scene_type(scene), np.random.default_rng([seed, 2, zlib.crc32(scene.encode())]))
    depth, surface, *_ = seen = _trace(np.array([s.ends for s in made], np.float32), rng, w, h)
    part = np.array([ids[s.label] + 6 if k > 5 else k for k, s in enumerate(made)])[surface]
    edge = (np.diff(part, axis=0, prepend=part[:1]) != 0) | (
        np.diff(part, axis=1, prepend=part[:, :1]) != 0
    )
    left_out = rng.choice(["ceiling", *sorted({s.label for s in made[6:]})])  # by the annotators
    label = np.array([ids[s.label] * (s.label != left_out) for s in made])[surface] * ~edge
    instance = np.array([s.instance for s in made])[surface] * (label > 0)
    # What the Kinect gives: whole disparities; nothing in the shadows beside edges, on much of gloss, in a few blobs.
    blobs = (
        rng.random((w // 10 + 1, h // 10 + 1))
        .repeat(5, 0)
        .repeat(5, 1)[: len(edge), : edge.shape[1]]
    )
    hole = blobs < np.array([0.7 if s.label in GLOSSY else 0.02 for s in made])[surface]
    hole |= edge | np.roll(edge, -1, 0) | np.roll(edge, -2, 0)
    raw = np.where(hole, 0, np.minimum(DISPARITY / np.round(DISPARITY / depth), FAR_M))
    half = dict(zip(FIELDS, (_paint(made, seen, rng), depth, raw, label, instance), strict=True))
    out = {
        k: p.astype(FIELDS[k][1]).repeat(2, -2).repeat(2, -1)[..., :w, :h] for k, p in half.items()
    }
    for name, (x0, x1, y0, y1), blank in (
        ("images", (7, 632, 6, 473), 255),
        ("rawDepths", (41, 601, 45, 471), 0),
    ):
        out[name][..., : x0 * w // 640, :] = out[name][..., x1 * w // 640 :, :] = (
            blank  # as around the originals
        )
        out[name][..., : y0 * h // 480] = out[name][..., y1 * h // 480 :] = blank
    return out


def _pick(palette: str, rng: np.random.Generator) -> np.ndarray:
    return (
        rng.uniform(0.85, 1.1)
        * rng.uniform(0.95, 1.05, 3)
        * list(bytes.fromhex(str(rng.choice(palette.split()))))
    )


def _furnish(kind: str, rng: np.random.Generator) -> list[Surface]:
    """The sides of the room (left, right, floor, ceiling, behind, back), then the boxes in it."""
    size, ground, (walls, floors, own), pieces = ROOMS[kind]
    high = np.array(size) * rng.uniform(0.88, 1.15, 3) * (0.5, 1, 1)
    ends, wall, floor = np.array([(-high[0], 0, -1), high]), _pick(walls, rng), _pick(floors, rng)
    tiled = TILES if ground == TILES and rng.random() < 0.6 else PLAIN
    made = [Surface("wall", k, ends, wall, tiled) for k in (1, 2, 4, 3)]
    made[2:2] = [
        Surface("floor", 1, ends, floor, ground),
        Surface("ceiling", 1, ends, np.full(3, 224), PLAIN),
    ]
    for k, piece in enumerate(pieces.split(",")):
        if k < 3 or rng.random() < 0.85:
            label, *numbers = piece.replace("_", " ").rsplit(maxsplit=piece.count(" "))
            instance = 1 + max((s.instance for s in made if s.label == label), default=0)
            colour, pattern = _pick(COLOURS.get(label, own), rng), PATTERNS.get(label, PLAIN)
            boxes = _place(label, [*map(float, numbers), 0, 0], high, rng)
            made += [Surface(label, instance, box, colour, pattern) for box in boxes]
    return made


def _place(
    label: str, numbers: list[float], high: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(parts, 2, 3): lowest and highest corner of each part of a piece, in metres."""
    size, (base, turn) = (
        np.array(numbers[2:5]) * rng.uniform((0.92, 1, 0.92), (1.08, 1, 1.08)),
        numbers[5:7],
    )
    cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[int(turn)]
    turned = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    x, z = (n + rng.uniform(-0.05, 0.05) * (0 < n < 1) for n in numbers[:2])
    half = np.abs(turned @ size) / 2
    centre = np.clip(
        [(2 * x - 1) * high[0], 0, z * high[2]],
        half - (high[0], 0, 0),
        np.maximum(half, high - half),
    )
    parts = np.array(PARTS.get(label, ((0, 0, 0, 1, 1, 1),))).reshape(-1, 2, 3)
    return np.sort((parts - (0.5, 0, 0.5)) * size @ turned.T, 1) + np.array(
        [centre[0], base, centre[2]]
    )


def _trace(ends: np.ndarray, rng: np.random.Generator, w: int, h: int) -> tuple[np.ndarray, ...]:
    """What a hand-held camera sees: depth in metres, surface, axis of its normal, point: all (..., W / 2, H / 2)."""
    eye = (rng.uniform((-0.36, 1.2, -0.5), (0.36, 1.6, 0.1)) * (ends[0, 1, 0], 1, 1)).astype(
        np.float32
    )
    yaw, pitch = rng.uniform((-0.32, 0.08), (0.32, 0.3))
    u, v = ((np.arange(0, n, 2) + 1 - n / 2) / (FOCAL * w) for n in (w, h))
    y, forward = -v * np.cos(pitch) - np.sin(pitch), np.cos(pitch) - v * np.sin(pitch)
    x, z = (
        u[:, None] * np.cos(yaw) + forward * np.sin(yaw),
        forward * np.cos(yaw) - u[:, None] * np.sin(yaw),
    )
    rays = np.stack(np.broadcast_arrays(x, y, z)).astype(np.float32)
    planes, inverse = (ends - eye)[..., None, None], 1 / rays
    far = np.where(rays > 0, planes[0, 1], planes[0, 0]) * inverse
    axis, depth = far.argmin(0), far.min(0)
    surface = 2 * axis + (np.take_along_axis(rays, axis[None], 0)[0] > 0)
    for k, (low, high) in enumerate(planes[6:], 6):
        one, two = low * inverse, high * inverse
        near = np.minimum(one, two)
        enter = near.max(0)
        hit = (enter < np.maximum(one, two).min(0)) & (enter > 0.45) & (enter < depth)
        depth[hit], surface[hit], axis[hit] = enter[hit], k, near[:, hit].argmax(0)
    return (
        np.clip(np.round(depth * 1024) / 1024, NEAR_M, FAR_M),
        surface,
        axis,
        eye[:, None, None] + rays * depth,
    )


def _paint(
    made: list[Surface], seen: tuple[np.ndarray, ...], rng: np.random.Generator
) -> np.ndarray:
    """(3, W, H) 0..255: pattern, then shading by face, corner and distance to the lamp, then grain."""
    _, surface, axis, point = seen
    across, up = np.where(axis == 0, point[2], point[0]), np.where(axis == 1, point[2], point[1])
    step_a, step_b, variation, joint = np.array([s.pattern for s in made], np.float32).T.copy()[
        :, surface
    ]
    a, b = (across + 20) / step_a, (up + 20) / step_b
    cell_a, cell_b = a.astype(np.int32), b.astype(np.int32)
    tone = (
        (cell_a * 7919 ^ cell_b * 104729 ^ surface.astype(np.int32) * 83492)
        % 1009
        / np.float32(1009)
    )
    tone = 1 + variation * (tone.astype(np.float32) - 0.5)
    tone[(a - cell_a < joint) | (b - cell_b < joint)] *= 0.66
    high = made[0].ends[1].astype(np.float32)
    gaps = np.stack(
        [high[0] - np.abs(point[0]), np.minimum(point[1], high[1] - point[1]), high[2] - point[2]]
    )
    lamp = (high * (rng.uniform(-0.5, 0.5), 1, rng.uniform(0.3, 0.8)))[:, None, None].astype(
        np.float32
    )
    light = 0.62 + 0.9 / (1 + 0.14 * ((point - lamp) ** 2).sum(0))
    shade = (
        tone
        * light
        * np.prod(1 - 0.3 / (1 + 25 * gaps**2), 0)
        * np.array([0.8, 1, 0.9], np.float32)[axis]
    )
    shade = np.maximum(
        shade, np.array([0.92 * (s.label in GLOWING) for s in made], np.float32)[surface]
    )
    colours = (
        np.array([s.colour for s in made]) * rng.uniform(0.82, 1.08) * rng.uniform(0.94, 1.06, 3)
    )
    return np.clip(colours.astype(np.float32).T.copy()[:, surface] * shade, 4, 246) + rng.integers(
        0, 8, shade.shape
    )


def matlab_chunk(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """MATLAB's chunk for an array: split its longest axis not yet split, the last of equals, until it fits."""
    chunk = list(shape)
    for axis in sorted(range(len(shape)), key=lambda i: (shape[i], i), reverse=True):
        chunk[axis] = max(1, chunk[axis] // -(-item_bytes * int(np.prod(chunk)) // CHUNK_BYTES))
    return tuple(chunk)


def _write_hdf5(path: Path, rows: int, chunks: Chunks, seed: int, size_wh: tuple[int, int]) -> None:
    """The whole file, made durable; its first 128 bytes make MATLAB take it for its own."""
    tables = official_tables()
    ids, scenes = (
        {n: i for i, n in enumerate(tables["classes"], 1)},
        plan_scenes(rows, tables, seed),
    )
    stamps = [
        f"{1294851097 + 7 * i}.{i * 7919 % 1000000:06d}-{i * 2654435761 % 2**32}"
        for i in range(rows)
    ]
    accel = (
        np.random.default_rng([seed, 4])
        .normal([[0], [-1], [0], [0]], 0.05, (4, rows))
        .astype("<f4")
    )
    cells = {
        "names": tables["classes"],
        "scenes": scenes,
        "sceneTypes": [scene_type(s) for s in scenes],
    }
    cells["rawRgbFilenames"] = [f"{s}/r-{t}.ppm" for s, t in zip(scenes, stamps, strict=True)]
    cells["rawDepthFilenames"] = [f"{s}/d-{t}.pgm" for s, t in zip(scenes, stamps, strict=True)]
    with h5py.File(path, "w", userblock_size=512, libver="earliest") as file:
        empty = _dataset(
            file, "#refs#/a", "canonical empty", data=np.zeros(2, "<u8")
        )  # MATLAB's stubs of an object
        _dataset(
            file,
            "namesToIds",
            "containers.Map",
            data=np.array([[3707764736, 2, 1, 1, 1, 1]], "<u4"),
        )
        _dataset(
            file, "#subsystem#/MCOS", "FileWrapper__", data=np.array([[empty.ref]], h5py.ref_dtype)
        )
        _dataset(file, "accelData", "single", accel.shape, data=accel)
        _write_arrays(
            file, rows, lambda row: draw_row(scenes[row], row, ids, seed, size_wh), chunks, size_wh
        )
        for (
            name,
            strings,
        ) in (
            cells.items()
        ):  # (1, N) references, each to the (length, 1) character codes of a string
            codes = [
                np.frombuffer(text.encode("utf-16-le"), "<u2").reshape(-1, 1) for text in strings
            ]
            targets = [
                _dataset(file, f"#refs#/{name}{k}", "char", data=c).ref for k, c in enumerate(codes)
            ]
            _dataset(file, name, "cell", data=np.array([targets], h5py.ref_dtype))
    with open(path, "r+b", buffering=0) as raw:
        raw.write(
            b"MATLAB 7.3 MAT-file, Platform: MADE-UP, HDF5 schema 1.00 .".ljust(116)
            + bytes(8)
            + b"\0\2IM"
        )
        fsync(raw.fileno())


def _write_arrays(
    file: Any, rows: int, draw: Any, chunks: Chunks, size_wh: tuple[int, int]
) -> None:
    """The five arrays, as many rows at a time as the widest chunk spans, so that each chunk is deflated once."""
    for name, (planes, dtype, matlab_class) in FIELDS.items():
        shape, item = (rows, *planes, *size_wh), np.dtype(dtype).itemsize
        original = tuple(map(min, shape, matlab_chunk((1449, *planes, 640, 480), item)))
        chunk = {"original": original, "resaved": matlab_chunk(shape, item), "none": None}[chunks]
        _dataset(file, name, matlab_class, chunk, shape=shape, dtype=dtype)
    step = max((file[name].chunks or (1,))[0] for name in FIELDS)
    for low in range(0, rows, step):
        drawn = [draw(row) for row in range(low, min(low + step, rows))]
        for name in FIELDS:
            file[name][low : low + step] = np.stack([fields[name] for fields in drawn])


def _dataset(
    file: Any, name: str, matlab_class: str, chunk: tuple[int, ...] | None = None, **how: Any
) -> Any:
    packed = {"chunks": chunk, "compression": "gzip", "compression_opts": 3} if chunk else {}
    made = file.create_dataset(name, **how, **packed)
    made.attrs["MATLAB_class"] = np.bytes_(matlab_class)
    return made
