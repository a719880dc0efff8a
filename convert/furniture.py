"""What the made-up rooms consist of: their sizes, surfaces, colours and furniture, as tables.

Nothing is drawn here; `convert/rooms.py` furnishes a room from these. All of it decides the bytes
of the sample: a changed value, and also a changed order of pieces or colours, gives other pictures.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

Point = tuple[float, float, float]  # x y z
Corners = tuple[Point, Point]  # the lowest, the highest
Palette = tuple[str, ...]  # one is drawn for each thing; RRGGBB in hexadecimal


class Pattern(NamedTuple):
    """How a surface is divided into cells of different tones, with a dark joint between them."""

    across_m: float  # a cell's width
    up_m: float  # a cell's height; on a floor its depth
    variation: float  # of the tone, from one cell to the next: 0.1 is +-5 %
    joint: float  # its share of a cell's width and of its height


@dataclass(frozen=True)
class Piece:
    """A piece of furniture, as it stands in the rooms of a type; each scene varies it a little."""

    label: str  # one of the 894 class names, with their spelling
    _: KW_ONLY
    x: float  # of its centre, as a share of the room's width: 0 is at the left wall, 1 the right
    z: float  # of its centre, as a share of the room's depth: 0 is at the camera, 1 the back wall
    size_m: tuple[float, float, float]  # width, height, depth, seen from its front
    base_m: float = 0.0  # above the floor
    back_to: Literal["back wall", "left", "camera", "right"] = "back wall"


@dataclass(frozen=True, kw_only=True)
class Room:
    """A scene type. The first N_ALWAYS pieces are in every scene of it, each other one in most."""

    size_m: tuple[float, float, float]  # width, height, depth
    floor: Pattern
    wall_colours: Palette
    floor_colours: Palette
    furniture_colours: Palette  # of every class that is not in COLOURS
    pieces: tuple[Piece, ...]


N_ALWAYS = 3

PLAIN = Pattern(across_m=9, up_m=9, variation=0, joint=0)
TILES = Pattern(across_m=0.33, up_m=0.33, variation=0.1, joint=0.03)
PLANKS = Pattern(across_m=0.14, up_m=1.6, variation=0.22, joint=0.03)
CARPET = Pattern(across_m=0.03, up_m=0.03, variation=0.14, joint=0)

PATTERNS: dict[str, Pattern] = {  # every other class is PLAIN
    "cabinet": Pattern(across_m=0.45, up_m=0.9, variation=0.06, joint=0.04),
    "dresser": Pattern(across_m=0.6, up_m=0.24, variation=0.06, joint=0.08),
    "rug": Pattern(across_m=0.3, up_m=0.3, variation=0.4, joint=0),
    "bed": Pattern(across_m=0.25, up_m=0.25, variation=0.14, joint=0),
    "bookshelf": Pattern(across_m=0.2, up_m=0.4, variation=0.9, joint=0.08),
    "picture": Pattern(across_m=0.2, up_m=0.15, variation=0.8, joint=0),
    "blinds": Pattern(across_m=9, up_m=0.06, variation=0, joint=0.3),
    "window": Pattern(across_m=0.6, up_m=0.6, variation=0, joint=0.09),
}

WOODEN = ("table", "coffee table", "desk", "night stand", "bookshelf", "cabinet", "dresser")
WHITE = ("toilet", "bathtub", "sink", "lamp", "refridgerator", "whiteboard")
PANES = ("window", "mirror")
SCREENS = ("television", "monitor")
GLOSSY = (*PANES, *SCREENS)  # an infrared sensor measures little of these
GLOWING = ("window", "lamp")

COLOURS: dict[str, Palette] = {
    **dict.fromkeys(WOODEN, ("7a5234", "9e744c", "5c3e2c", "bc986c")),
    **dict.fromkeys(WHITE, ("e2e2de", "ced2d4")),
    **dict.fromkeys(PANES, ("d6e4f4", "f0ecdc", "c4d8ec")),
    **dict.fromkeys(SCREENS, ("282a2e", "3a3634")),
    "stove": ("3a3634",),
}


def _legs(top: float) -> tuple[Corners, ...]:
    """One in each corner, from the floor to `top`."""
    side = 0.08
    corners = [(x, z) for x in (0, 0.92) for z in (0, 0.92)]
    return tuple(((x, 0, z), (x + side, top, z + side)) for x, z in corners)


WHOLE: Corners = ((0, 0, 0), (1, 1, 1))
TABLE = (((0, 0.9, 0), (1, 1, 1)), *_legs(top=0.9))

# The boxes that a piece is made of: corners as shares of its width, height and depth (back: 1).
PARTS: dict[str, tuple[Corners, ...]] = {  # every other class is one box, WHOLE
    "table": TABLE,
    "coffee table": TABLE,
    "desk": TABLE,
    "chair": (
        ((0, 0.45, 0), (1, 0.52, 1)),  # seat
        ((0, 0.52, 0.88), (1, 1, 1)),  # back
        *_legs(top=0.45),
    ),
    "sofa": (
        ((0, 0.08, 0), (1, 0.5, 1)),  # seat
        ((0, 0.5, 0.74), (1, 1, 1)),  # back
        ((0, 0, 0), (0.1, 0.72, 1)),  # arms
        ((0.9, 0, 0), (1, 0.72, 1)),
    ),
    "bed": (
        ((0, 0.15, 0), (1, 0.58, 0.96)),  # mattress
        ((0, 0, 0.96), (1, 1, 1)),  # headboard
    ),
    "lamp": (
        ((0.4, 0, 0.4), (0.6, 0.5, 0.6)),  # stand
        ((0, 0.5, 0), (1, 1, 1)),  # shade
    ),
    "toilet": (
        ((0.1, 0, 0), (0.9, 0.5, 0.7)),  # bowl
        ((0, 0.4, 0.72), (1, 1, 1)),  # cistern
    ),
    "bathtub": (
        ((0, 0, 0), (1, 0.2, 1)),  # bottom
        ((0, 0, 0), (1, 1, 0.1)),  # front, back, left, right
        ((0, 0, 0.9), (1, 1, 1)),
        ((0, 0, 0), (0.1, 1, 1)),
        ((0.9, 0, 0), (1, 1, 1)),
    ),
}

ROOMS: dict[str, Room] = {
    "bedroom": Room(
        size_m=(3.9, 2.5, 4.3),
        floor=CARPET,
        wall_colours=("cec2ac", "b2becc", "d6cec4"),
        floor_colours=("a8947c", "8e827a"),
        furniture_colours=("80363e", "485c8a", "9680a8", "c4b28e"),
        pieces=(
            Piece("bed", x=0.5, z=1, size_m=(1.8, 0.95, 2.1)),
            Piece("night stand", x=0.06, z=1, size_m=(0.5, 0.55, 0.42)),
            Piece("pillow", x=0.4, z=0.97, size_m=(0.6, 0.16, 0.4), base_m=0.55),
            Piece("lamp", x=0.1, z=0.98, size_m=(0.28, 0.45, 0.28), base_m=0.55),
            Piece("dresser", x=0, z=0.55, size_m=(1.3, 0.9, 0.5), back_to="left"),
            Piece("window", x=1, z=0.55, size_m=(1.4, 1.2, 0.04), base_m=0.95, back_to="right"),
            Piece("picture", x=0.5, z=1, size_m=(0.8, 0.5, 0.03), base_m=1.5),
        ),
    ),
    "kitchen": Room(
        size_m=(3.3, 2.5, 3.7),
        floor=TILES,
        wall_colours=("ded2ac", "ccd0c4", "e2dcce"),
        floor_colours=("b08e68", "beb8ac"),
        furniture_colours=("aa3c2c", "deb240", "96928c"),
        pieces=(
            Piece("cabinet", x=0.35, z=1, size_m=(2.3, 0.88, 0.6)),
            Piece("counter", x=0.35, z=1, size_m=(2.3, 0.05, 0.64), base_m=0.88),
            Piece("refridgerator", x=1, z=0.55, size_m=(0.75, 1.8, 0.7), back_to="right"),
            Piece("stove", x=0.86, z=1, size_m=(0.65, 0.92, 0.66)),
            Piece("cabinet", x=0, z=1, size_m=(0.9, 0.75, 0.36), base_m=1.5),
            Piece("cabinet", x=0.9, z=1, size_m=(0.9, 0.6, 0.36), base_m=1.6),
            Piece("window", x=0.45, z=1, size_m=(0.9, 0.9, 0.04), base_m=1.15),
        ),
    ),
    "living_room": Room(
        size_m=(5.2, 2.7, 5.6),
        floor=PLANKS,
        wall_colours=("d2be98", "c0b8a8", "b0b69e"),
        floor_colours=("7c5638", "a48864"),
        furniture_colours=("7c5840", "60685c", "943c30", "464a60"),
        pieces=(
            Piece("sofa", x=0.5, z=1, size_m=(2.2, 0.85, 0.95)),
            Piece("cabinet", x=1, z=0.6, size_m=(1.5, 0.6, 0.45), back_to="right"),
            Piece("television", x=1, z=0.6, size_m=(1.1, 0.65, 0.12), base_m=0.6, back_to="right"),
            Piece("sofa", x=0, z=0.6, size_m=(1.6, 0.85, 0.9), back_to="left"),
            Piece("rug", x=0.5, z=0.62, size_m=(2.4, 0.02, 1.8)),
            Piece("coffee table", x=0.5, z=0.64, size_m=(1.2, 0.42, 0.65)),
            Piece("lamp", x=0.02, z=0.97, size_m=(0.45, 1.6, 0.45)),
            Piece("picture", x=0.4, z=1, size_m=(1, 0.7, 0.03), base_m=1.35),
        ),
    ),
    "bathroom": Room(
        size_m=(2.3, 2.4, 2.9),
        floor=TILES,
        wall_colours=("d4dcde", "c6d2c4", "e4ded4"),
        floor_colours=("b8baba", "969ca4"),
        furniture_colours=("5c94a0", "c4787c", "ece8dc"),
        pieces=(
            Piece("toilet", x=0.45, z=1, size_m=(0.45, 0.8, 0.7)),
            Piece("bathtub", x=0, z=0.75, size_m=(1.6, 0.55, 0.72), back_to="left"),
            Piece("cabinet", x=1, z=0.78, size_m=(1, 0.8, 0.52), back_to="right"),
            Piece("sink", x=1, z=0.78, size_m=(0.6, 0.06, 0.5), base_m=0.8, back_to="right"),
            Piece("mirror", x=1, z=0.78, size_m=(0.9, 0.9, 0.03), base_m=1.1, back_to="right"),
            Piece("towel", x=0.5, z=1, size_m=(0.5, 0.6, 0.05), base_m=1.25),
            Piece("rug", x=0.5, z=0.6, size_m=(0.8, 0.02, 0.5)),
        ),
    ),
    "dining_room": Room(
        size_m=(4.3, 2.7, 4.7),
        floor=PLANKS,
        wall_colours=("c6b08c", "baa084", "d0c8b4"),
        floor_colours=("704a30", "96704a"),
        furniture_colours=("744630", "543e34", "a08054"),
        pieces=(
            Piece("table", x=0.5, z=0.62, size_m=(1.7, 0.76, 1)),
            Piece("chair", x=0.36, z=0.8, size_m=(0.46, 0.98, 0.46)),
            Piece("chair", x=0.38, z=0.44, size_m=(0.46, 0.98, 0.46), back_to="camera"),
            Piece("chair", x=0.62, z=0.8, size_m=(0.46, 0.98, 0.46)),
            Piece("chair", x=0.2, z=0.62, size_m=(0.46, 0.98, 0.46), back_to="left"),
            Piece("cabinet", x=0.2, z=1, size_m=(1.4, 1.1, 0.45)),
            Piece("picture", x=0.25, z=1, size_m=(0.9, 0.6, 0.03), base_m=1.5),
            Piece("window", x=0.9, z=1, size_m=(1, 1.4, 0.04), base_m=0.8),
        ),
    ),
    "office": Room(
        size_m=(3.7, 2.8, 4.1),
        floor=CARPET,
        wall_colours=("ccceca", "bec6ce", "d6d2c6"),
        floor_colours=("686c74", "7e766c"),
        furniture_colours=("2c303c", "3c5474", "5c5c5a"),
        pieces=(
            Piece("desk", x=0.4, z=1, size_m=(1.7, 0.75, 0.8)),
            Piece("monitor", x=0.3, z=0.96, size_m=(0.55, 0.42, 0.08), base_m=0.8),
            Piece("bookshelf", x=1, z=0.66, size_m=(1.3, 2, 0.3), back_to="right"),
            Piece("chair", x=0.4, z=0.6, size_m=(0.5, 1, 0.5), back_to="camera"),
            Piece("whiteboard", x=0, z=0.65, size_m=(1.5, 1, 0.03), base_m=1, back_to="left"),
            Piece("keyboard", x=0.3, z=0.88, size_m=(0.45, 0.03, 0.16), base_m=0.75),
            Piece("blinds", x=0.85, z=1, size_m=(1.2, 1.3, 0.04), base_m=1),
        ),
    ),
}
