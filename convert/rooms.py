"""One row of a made-up sample: furnish a room, trace what a camera sees, make its five fields.

Each row is a picture of a box-shaped room, ray-traced at half size (a quarter of the work; every
pixel is doubled at the end). The scene type decides the palette, the furniture and the size of the
room; the scene its exact arrangement; the row the camera and the light.

Coordinates are metres: x to the right, y up from the floor, z away from the camera, which stands
near x = z = 0. Planes are made as they are stored, (W, H), the picture's first line at H = 0; w and
h are half of these.

A row is a pure function of (scene, row, seed, size). Its bytes depend on the order in which random
numbers are drawn, on the order of multiplications, and on which steps are in float32 and which in
float64: two steps exchanged give another sample.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from convert.furniture import (
    COLOURS,
    GLOSSY,
    GLOWING,
    N_ALWAYS,
    PARTS,
    PATTERNS,
    PLAIN,
    ROOMS,
    TILES,
    WHOLE,
    Palette,
    Pattern,
    Piece,
    Room,
)


@dataclass(frozen=True, kw_only=True)
class FieldType:
    """What the .mat holds of a field."""

    planes: tuple[int, ...]  # before (W, H)
    dtype: str


FIELDS: dict[str, FieldType] = {
    "images": FieldType(planes=(3,), dtype="|u1"),
    "depths": FieldType(planes=(), dtype="<f4"),  # metres
    "rawDepths": FieldType(planes=(), dtype="<f4"),  # metres; 0 = not measured
    "labels": FieldType(planes=(), dtype="<u2"),
    "instances": FieldType(planes=(), dtype="|u1"),
}

# The Kinect's.
FOCAL = 519 / 640  # focal length in picture widths
NEAR_M = np.float32(0.7133)
FAR_M = np.float32(9.9955)
DISPARITY = np.float32(351.3)  # of something 1 m away; it measures whole disparities

# What is nearer than this is not seen: the camera may stand in a piece of furniture.
NEAREST_HIT_M = 0.45
BEHIND_M = 1.0  # how far the room goes on behind the camera's place
N_SIDES = 6  # of the room; they are the first of its surfaces

# Pixels of a 640x480 picture between which something is stored: left, right, top, bottom.
FRAMED_LRTB = (7, 632, 6, 473)  # the originals have a white frame around this
# The Kinect's depth, projected into the colour camera, ends here.
MEASURED_LRTB = (41, 601, 45, 471)


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A side of the room, or a box in it; a chair is several, which share its instance number."""

    label: str
    instance: int  # from 1, within its class
    ends_m: np.ndarray  # (2, 3): lowest and highest corner
    colour_rgb: np.ndarray  # (3,), 0 to 255
    pattern: Pattern


@dataclass(frozen=True, kw_only=True)
class View:
    """What the camera sees, at half size: w = W / 2, h = H / 2, rounded up."""

    depth_m: np.ndarray  # (w, h) along the camera's axis
    surface: np.ndarray  # (w, h) its number among the surfaces
    axis: np.ndarray  # (w, h) that its face is at right angles to: 0 x, 1 y, 2 z
    point_m: np.ndarray  # (3, w, h)


def scene_type(scene: str) -> str:
    """`living_room_0012a` -> `living_room`"""
    return scene.rpartition("_")[0]


def draw_row(
    scene: str, row: int, ids: Mapping[str, int], seed: int, size_wh: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The five fields of one row, as the .mat holds them: planes of (W, H) in the dtypes of FIELDS.

    `ids`: the number of each class name, from 1. The scene's type must be one of ROOMS.
    """
    scene_rng = np.random.default_rng([seed, 2, zlib.crc32(scene.encode())])
    surfaces = _furnish(ROOMS[scene_type(scene)], scene_rng)

    row_rng = np.random.default_rng([seed, 3, row])
    view = _trace(surfaces, row_rng, size_wh)
    is_edge = _find_edges(surfaces, view, ids)
    label, instance = _annotate(surfaces, view, is_edge, ids, row_rng)
    raw_depth_m = _measure(surfaces, view, is_edge, row_rng, size_wh)
    rgb = _paint(surfaces, view, row_rng)

    half_size = {
        "images": rgb,
        "depths": view.depth_m,
        "rawDepths": raw_depth_m,
        "labels": label,
        "instances": instance,
    }
    fields = {name: _doubled(half_size[name], kind, size_wh) for name, kind in FIELDS.items()}
    _blank_outside(fields["images"], FRAMED_LRTB, 255, size_wh)
    _blank_outside(fields["rawDepths"], MEASURED_LRTB, 0, size_wh)
    return fields


# Furnish.


def _furnish(room: Room, rng: np.random.Generator) -> list[Surface]:
    """The sides of the room (left, right, floor, ceiling, behind, back), then the boxes in it."""
    # The right, upper, back corner: half the width, as x = 0 is in the middle; height; depth.
    far_m = np.array(room.size_m) * rng.uniform(0.88, 1.15, 3) * (0.5, 1, 1)
    surfaces = _build_sides(room, far_m, rng)

    for k, piece in enumerate(room.pieces):
        is_there = k < N_ALWAYS or rng.random() < 0.85
        if is_there:
            number = 1 + max((s.instance for s in surfaces if s.label == piece.label), default=0)
            surfaces += _build_piece(piece, number, room, far_m, rng)
    return surfaces


def _build_sides(room: Room, far_m: np.ndarray, rng: np.random.Generator) -> list[Surface]:
    """Two sides an axis, the lower one first: `_hit_sides` counts on that order.

    Each has the ends of the whole room.
    """
    ends_m = np.array([(-far_m[0], 0, -BEHIND_M), far_m])
    wall_rgb = _pick_colour(room.wall_colours, rng)
    floor_rgb = _pick_colour(room.floor_colours, rng)
    # Where the floor is tiled the walls often are too. No random number is drawn for other rooms.
    has_tiled_walls = room.floor == TILES and rng.random() < 0.6
    wall_pattern = TILES if has_tiled_walls else PLAIN

    side = partial(Surface, ends_m=ends_m)
    wall = partial(side, label="wall", colour_rgb=wall_rgb, pattern=wall_pattern)
    floor = side(label="floor", instance=1, colour_rgb=floor_rgb, pattern=room.floor)
    ceiling = side(label="ceiling", instance=1, colour_rgb=np.full(3, 224), pattern=PLAIN)
    left = wall(instance=1)
    right = wall(instance=2)
    back = wall(instance=3)
    behind = wall(instance=4)
    return [left, right, floor, ceiling, behind, back]


def _build_piece(
    piece: Piece, instance: int, room: Room, far_m: np.ndarray, rng: np.random.Generator
) -> list[Surface]:
    """The boxes of a piece, in one colour."""
    colour_rgb = _pick_colour(COLOURS.get(piece.label, room.furniture_colours), rng)
    pattern = PATTERNS.get(piece.label, PLAIN)
    return [
        Surface(
            label=piece.label,
            instance=instance,
            ends_m=ends_m,
            colour_rgb=colour_rgb,
            pattern=pattern,
        )
        for ends_m in _place(piece, far_m, rng)
    ]


def _pick_colour(palette: Palette, rng: np.random.Generator) -> np.ndarray:
    """(3,): one of the palette, a little lighter or darker, with a slight cast."""
    brightness = rng.uniform(0.85, 1.1)
    cast_rgb = rng.uniform(0.95, 1.05, 3)
    rgb = list(bytes.fromhex(str(rng.choice(palette))))
    return brightness * cast_rgb * rgb


def _place(piece: Piece, far_m: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(parts, 2, 3): lowest and highest corner of each part of a piece, in metres."""
    size_m = np.array(piece.size_m) * rng.uniform((0.92, 1, 0.92), (1.08, 1, 1.08))
    turn = _turn(piece)
    x = _shift(piece.x, rng)
    z = _shift(piece.z, rng)

    # At least half its own size away from every side of the room, and on the floor.
    half_m = np.abs(turn @ size_m) / 2
    wanted_m = [(2 * x - 1) * far_m[0], 0, z * far_m[2]]
    lowest_m = half_m - (far_m[0], 0, 0)
    highest_m = np.maximum(half_m, far_m - half_m)
    centre_m = np.clip(wanted_m, lowest_m, highest_m)

    parts = np.array(PARTS.get(piece.label, (WHOLE,)))
    around_centre_m = (parts - (0.5, 0, 0.5)) * size_m
    # Turned, the lowest corner may be another.
    corners_m = np.sort(around_centre_m @ turn.T, axis=1)
    return corners_m + np.array([centre_m[0], piece.base_m, centre_m[2]])


def _turn(piece: Piece) -> np.ndarray:
    """(3, 3): the rotation about y, by quarter turns, that brings a piece's back to its place."""
    turns = {"back wall": (1, 0), "left": (0, 1), "camera": (-1, 0), "right": (0, -1)}
    cos, sin = turns[piece.back_to]
    return np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])


def _shift(share: float, rng: np.random.Generator) -> float:
    """Moved by up to 5 % of the room; what is at a wall stays (its number is drawn too)."""
    by = rng.uniform(-0.05, 0.05)
    return share + by if 0 < share < 1 else share


# Trace.


def _trace(surfaces: list[Surface], rng: np.random.Generator, size_wh: tuple[int, int]) -> View:
    """What a hand-held camera sees, one ray a pixel: the nearest box, else a side of the room."""
    ends_m = np.array([s.ends_m for s in surfaces], np.float32)
    half_width_m = ends_m[0, 1, 0]
    eye_m = rng.uniform((-0.36, 1.2, -0.5), (0.36, 1.6, 0.1)) * (half_width_m, 1, 1)
    eye_m = eye_m.astype(np.float32)
    yaw, pitch = rng.uniform((-0.32, 0.08), (0.32, 0.3))

    rays = _cast_rays(yaw, pitch, size_wh)
    per_m = 1 / rays  # how much depth it takes to get 1 m further along each axis
    from_eye_m = (ends_m - eye_m)[..., None, None]  # (surfaces, 2, 3, 1, 1)
    depth_m, surface, axis = _hit_sides(from_eye_m[0], rays, per_m)

    for k in range(N_SIDES, len(surfaces)):
        is_hit, enter_m, enter_axis = _hit_box(from_eye_m[k], per_m, depth_m)
        depth_m[is_hit] = enter_m
        surface[is_hit] = k
        axis[is_hit] = enter_axis

    return View(
        depth_m=np.clip(np.round(depth_m * 1024) / 1024, NEAR_M, FAR_M),
        surface=surface,
        axis=axis,
        point_m=eye_m[:, None, None] + rays * depth_m,
    )


def _cast_rays(yaw: float, pitch: float, size_wh: tuple[int, int]) -> np.ndarray:
    """(3, w, h) float32: the direction of each ray, as long as makes it 1 along the camera's axis.

    A length along the ray, counted in rays, is then the depth that a depth camera gives.
    """
    w, h = size_wh
    focal = FOCAL * w
    # Of the picture's centre, at a depth of 1.
    right = (np.arange(0, w, 2) + 1 - w / 2)[:, None] / focal
    down = (np.arange(0, h, 2) + 1 - h / 2) / focal

    y = -down * np.cos(pitch) - np.sin(pitch)
    forward = np.cos(pitch) - down * np.sin(pitch)
    x = right * np.cos(yaw) + forward * np.sin(yaw)
    z = forward * np.cos(yaw) - right * np.sin(yaw)
    return np.stack(np.broadcast_arrays(x, y, z)).astype(np.float32)


def _hit_sides(
    ends_m: np.ndarray, rays: np.ndarray, per_m: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(depth in metres, surface, axis), each (w, h): where the rays leave the room.

    `ends_m`: (2, 3, 1, 1), the room's corners as seen from the eye.
    """
    low_m, high_m = ends_m
    leave_m = np.where(rays > 0, high_m, low_m) * per_m  # through the side ahead on each axis
    axis = leave_m.argmin(0)
    ray_on_axis = np.take_along_axis(rays, axis[None], 0)[0]
    surface = 2 * axis + (ray_on_axis > 0)
    return leave_m.min(0), surface, axis


def _hit_box(
    ends_m: np.ndarray, per_m: np.ndarray, depth_m: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(is hit: (w, h), depth and axis of those pixels only): where a box is nearer than `depth_m`.

    `ends_m`: (2, 3, 1, 1), the box's corners as seen from the eye. A ray is in the box while it is
    between the two planes of every axis: from the last that it enters to the first that it leaves.
    """
    one_m = ends_m[0] * per_m
    other_m = ends_m[1] * per_m
    near_m = np.minimum(one_m, other_m)
    enter_m = near_m.max(0)
    leave_m = np.maximum(one_m, other_m).min(0)

    is_hit = (enter_m < leave_m) & (enter_m > NEAREST_HIT_M) & (enter_m < depth_m)
    return is_hit, enter_m[is_hit], near_m[:, is_hit].argmax(0)


# Annotate.


def _find_edges(surfaces: list[Surface], view: View, ids: Mapping[str, int]) -> np.ndarray:
    """(w, h) bool: pixels whose left or upper neighbour is of another class or side of the room."""
    kinds = [*range(N_SIDES), *(N_SIDES + ids[s.label] for s in surfaces[N_SIDES:])]
    kind = np.array(kinds)[view.surface]
    differs_left = np.diff(kind, axis=0, prepend=kind[:1]) != 0
    differs_above = np.diff(kind, axis=1, prepend=kind[:, :1]) != 0
    return differs_left | differs_above


def _annotate(
    surfaces: list[Surface],
    view: View,
    is_edge: np.ndarray,
    ids: Mapping[str, int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """(class, instance), each (w, h), 0 where a person left something out.

    That is the edges, and one class of the scene that was overlooked.
    """
    could_miss = ["ceiling", *sorted({s.label for s in surfaces[N_SIDES:]})]
    missed = rng.choice(could_miss)

    classes = np.array([0 if s.label == missed else ids[s.label] for s in surfaces])
    label = classes[view.surface] * ~is_edge
    instances = np.array([s.instance for s in surfaces])
    instance = instances[view.surface] * (label > 0)
    return label, instance


# What the Kinect gives.


def _measure(
    surfaces: list[Surface],
    view: View,
    is_edge: np.ndarray,
    rng: np.random.Generator,
    size_wh: tuple[int, int],
) -> np.ndarray:
    """(w, h) metres, coarser with distance (the Kinect measures whole disparities).

    Holes are 0: in shadows beside edges, on much of what is glossy, and in a few blobs anywhere.
    """
    w, h = size_wh
    blob = 5  # pixels of the half-size picture, both ways
    chances = rng.random((w // (2 * blob) + 1, h // (2 * blob) + 1))
    chances = chances.repeat(blob, 0).repeat(blob, 1)[: is_edge.shape[0], : is_edge.shape[1]]
    hole_share = np.array([0.7 if s.label in GLOSSY else 0.02 for s in surfaces])

    is_hole = chances < hole_share[view.surface]
    is_hole |= is_edge | np.roll(is_edge, -1, 0) | np.roll(is_edge, -2, 0)
    whole_disparities = np.round(DISPARITY / view.depth_m)
    return np.where(is_hole, 0, np.minimum(DISPARITY / whole_disparities, FAR_M))


# Paint.


def _paint(surfaces: list[Surface], view: View, rng: np.random.Generator) -> np.ndarray:
    """(3, w, h) 0..255: pattern, shading by lamp, corner and face, then white balance and grain."""
    far_m = surfaces[0].ends_m[1].astype(np.float32)
    lit_share = np.array([0.8, 1, 0.9], np.float32)  # of faces across x, y, z
    shade = _pattern_tone(surfaces, view)
    shade = shade * _lamp_light(view, far_m, rng)
    shade = shade * _corner_shade(view, far_m)
    shade = shade * lit_share[view.axis]

    least_light = np.array([0.92 if s.label in GLOWING else 0 for s in surfaces], np.float32)
    shade = np.maximum(shade, least_light[view.surface])

    exposure = rng.uniform(0.82, 1.08)
    balance_rgb = rng.uniform(0.94, 1.06, 3)
    colours = np.array([s.colour_rgb for s in surfaces]) * exposure * balance_rgb
    planes = np.ascontiguousarray(colours.astype(np.float32).T)  # (3, surfaces)
    grain = rng.integers(0, 8, shade.shape)
    return np.clip(planes[:, view.surface] * shade, 4, 246) + grain


def _pattern_tone(surfaces: list[Surface], view: View) -> np.ndarray:
    """(w, h) around 1: the tone of each cell of a pattern, a hash of its place; joints are dark."""
    x, y, z = view.point_m
    across_m = np.where(view.axis == 0, z, x)
    up_m = np.where(view.axis == 1, z, y)
    patterns = np.array([s.pattern for s in surfaces], np.float32)
    by_pixel = np.ascontiguousarray(patterns.T)[:, view.surface]
    cell_across_m, cell_up_m, variation, joint = by_pixel

    # + 20 m: positive everywhere, so that the whole part counts cells without a double one at 0.
    across = (across_m + 20) / cell_across_m
    up = (up_m + 20) / cell_up_m
    column = across.astype(np.int32)
    line = up.astype(np.int32)

    hashed = column * 7919 ^ line * 104729 ^ view.surface.astype(np.int32) * 83492
    share = (hashed % 1009 / np.float32(1009)).astype(np.float32)
    tone = 1 + variation * (share - 0.5)
    is_joint = (across - column < joint) | (up - line < joint)
    tone[is_joint] *= 0.66
    return tone


def _lamp_light(view: View, far_m: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(w, h): ambient light, and more the nearer the lamp under the ceiling is."""
    x_share = rng.uniform(-0.5, 0.5)
    z_share = rng.uniform(0.3, 0.8)
    lamp_m = (far_m * (x_share, 1, z_share)).astype(np.float32)
    squared_m = ((view.point_m - lamp_m[:, None, None]) ** 2).sum(0)
    return 0.62 + 0.9 / (1 + 0.14 * squared_m)


def _corner_shade(view: View, far_m: np.ndarray) -> np.ndarray:
    """(w, h): less light towards the walls, floor, ceiling and back, product of the three axes."""
    x, y, z = view.point_m
    gaps_m = np.stack([far_m[0] - np.abs(x), np.minimum(y, far_m[1] - y), far_m[2] - z])
    return np.prod(1 - 0.3 / (1 + 25 * gaps_m**2), 0)


# As stored.


def _doubled(plane: np.ndarray, kind: FieldType, size_wh: tuple[int, int]) -> np.ndarray:
    """(..., w, h) -> (..., W, H) in the field's dtype; an odd size loses the last line."""
    w, h = size_wh
    return plane.astype(kind.dtype).repeat(2, -2).repeat(2, -1)[..., :w, :h]


def _blank_outside(
    planes: np.ndarray, box_lrtb: tuple[int, int, int, int], value: int, size_wh: tuple[int, int]
) -> None:
    """Set what lies outside the box, given in pixels of 640x480, to `value`, in place."""
    w, h = size_wh
    left, right, top, bottom = box_lrtb
    planes[..., : left * w // 640, :] = value
    planes[..., right * w // 640 :, :] = value
    planes[..., : top * h // 480] = value
    planes[..., bottom * h // 480 :] = value
