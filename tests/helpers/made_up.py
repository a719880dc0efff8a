"""A second dataset, made up: 48x36 pictures of a laboratory, in memory.

It is as unlike NYU as the contract allows. It has a thermal camera and a 16-bit infrared one, a
camera and crops of its own, seven labels in three groups, a scene protocol that leaves a type out,
rows without any type, and three splits.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.base import FieldReader, RowFacts, RowReader
from shards.errors import WrongSetting
from shards.spec import (
    NO_SCENE_TYPE,
    SPLITS,
    Box,
    Camera,
    ConversionSettings,
    DatasetSpec,
    Field,
    LabelTable,
    SceneProtocol,
    SourceIdentity,
    field_of_kind,
)

WIDTH = 48
HEIGHT = 36
N_ROWS = 30
HIGHEST_LABEL = 7
GROUP_ROWS = {"rgb": 1, "depth": 7, "label": 4, "thermal": 13, "infrared": 2}  # decoded together

LAB = DatasetSpec(
    name="lab",
    scene_types=("bench", "corridor", "storage", "yard"),
    protocols=(SceneProtocol(classes=("storage", "bench", "corridor")),),  # no yard
    default_n_classes=3,
    label_names=("floor", "wall", "bench", "stool", "flask", "robot", "person"),
    label_tables=(
        LabelTable(names=("structure", "furniture", "thing"), ids=(0, 1, 1, 2, 2, 3, 3, 0)),
    ),
    width=WIDTH,
    height=HEIGHT,
    crops={"centre": Box(top=3, bottom=33, left=6, right=38)},
    depth_crop="centre",
    camera=Camera(fx=41.5, fy=40.0, cx=22.25, cy=18.5),
    warnings=("the robot was moved by hand",),
)
WITHOUT_CAMERA = replace(LAB, name="lab_blind", camera=None)
FIELDS = {
    "rgb": field_of_kind("rgb", "colour"),
    "depth": field_of_kind("depth", "depth"),
    "label": field_of_kind("label", "id", unit="class id 1..7"),
    "thermal": field_of_kind("thermal", "grey"),
    "infrared": field_of_kind("infrared", "grey16"),
}
SMALL = ConversionSettings(size=32, rows_per_shard=8)


class MemoryReader:
    """Rows of one array [n, [3,] W, H]."""

    scratch_bytes = 0
    can_travel = False

    def __init__(self, rows: np.ndarray, group_rows: int) -> None:
        self.rows = rows
        self.group_rows = group_rows
        self.row_shape = rows.shape[1:]
        self.dtype = rows.dtype

    def read_index(self) -> None:
        """They lie where they lie."""

    def fill_scratch(self, directory: Path, run: Callable[..., Any] = map) -> None:
        raise AssertionError("nothing has to be unpacked")

    def read_group(self, group: int) -> np.ndarray:
        return self.rows[group * self.group_rows : (group + 1) * self.group_rows]

    def close(self) -> None:
        """Nothing is open."""


class LabSource:
    """See convert.sources.base.Source. `splits`: the names of those that have rows."""

    def __init__(
        self,
        *,
        dataset: DatasetSpec = LAB,
        n_rows: int = N_ROWS,
        splits: tuple[str, ...] = ("train", "val", "test"),
        crop: str = "none",
    ) -> None:
        self.dataset = dataset
        self.fields: Mapping[str, Field] = FIELDS
        self.n_rows = n_rows
        self.handles: tuple[int, ...] | None = None
        self.rows_differ = False
        self.decoder: str | None = None
        self.may_hang = False
        self.advice = "Make it up again"
        self.arrays = made_up_arrays(n_rows)
        self.scene_type, self.split, self.scene = made_up_rows(dataset, n_rows, splits)
        self._crop = crop

    def __str__(self) -> str:
        return "the lab"

    def identity(self) -> SourceIdentity:
        digest = hashlib.sha256(repr(self.dataset).encode())
        for array in (*self.arrays.values(), self.scene_type, self.split, self.scene):
            digest.update(array.tobytes())
        n_bytes = sum(array.nbytes for array in self.arrays.values())
        return SourceIdentity(
            kind="table", name="the lab", n_bytes=n_bytes, sha256=digest.hexdigest()
        )

    def stamp(self) -> tuple[int, ...]:
        return (0,)

    def row_facts(self) -> RowFacts:
        columns: dict[str, Any] = {
            "split": self.split,
            "scene": self.scene,
            "scene_type": self.scene_type,
            "size": np.tile(np.array((HEIGHT, WIDTH), "<u2"), (self.n_rows, 1)),
            "rgb_file": [f"rgb/{row:03d} µ.png" for row in range(self.n_rows)],
        }
        if self.dataset.camera is not None:
            box = self.dataset.crop_box(self._crop)
            shares = self.dataset.camera.as_shares(box)
            columns["camera"] = np.tile(np.array(shares, "<f4"), (self.n_rows, 1))
        scenes = [f"room {k}" for k in range(int(self.scene.max()) + 1)]
        return RowFacts(columns=columns, scenes=scenes, dataset=self.dataset)

    def resolved(self, settings: ConversionSettings) -> ConversionSettings:
        return settings.of_source(list(self.fields.values()), self.n_rows)

    def readers(self, fields: Sequence[str]) -> list[RowReader]:
        return [FieldReader(name, f"the {name} camera", self.rows_of(name)) for name in fields]

    def rows_of(self, field: str) -> MemoryReader:
        return MemoryReader(self.arrays[field], GROUP_ROWS[field])

    def highest_id(self, field: str) -> int | None:
        return HIGHEST_LABEL if field == "label" else None

    def check_crop(self, crop: str) -> None:
        self.dataset.crop_box(crop)
        if crop != self._crop:
            raise WrongSetting("crop", crop, f"this source was made with {self._crop}")

    def close(self) -> None:
        """Nothing is open."""


def made_up_arrays(n_rows: int) -> dict[str, np.ndarray]:
    """Of each field [n, [3,] W, H]; its thermal picture is 0 where nothing is labelled."""
    rng = np.random.default_rng(7)
    plane = (n_rows, WIDTH, HEIGHT)
    coarse = rng.integers(0, HIGHEST_LABEL + 1, (n_rows, WIDTH // 6, HEIGHT // 6))
    label = coarse.repeat(6, axis=1).repeat(6, axis=2).astype("<u2")
    metres = rng.uniform(0.4, 9.5, plane).astype(np.float32)
    metres[rng.random(plane) < 0.2] = 0
    warmth = np.where(label == 0, 0, label * 20 + rng.integers(0, 50, plane))
    return {
        "rgb": rng.integers(0, 256, (n_rows, 3, WIDTH, HEIGHT), np.uint8),
        "depth": metres,
        "label": label,
        "thermal": warmth.astype(np.uint8),
        "infrared": rng.integers(0, 1 << 16, plane).astype("<u2"),
    }


def made_up_rows(
    dataset: DatasetSpec, n_rows: int, splits: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns scene_type, split and scene. Every fifth row has no type; three rows are a scene.

    Scenes are dealt to the splits in turn, every other one to the first.
    """
    n_types = len(dataset.scene_types)
    rows = np.arange(n_rows)
    scene = rows // 3
    has_type = (rows % 5 != 1) & (n_types > 0)
    scene_type = np.where(has_type, rows % max(1, n_types), NO_SCENE_TYPE)
    turn = np.where(scene % 2 == 0, 0, 1 + scene // 2 % max(1, len(splits) - 1))
    numbers = np.array([SPLITS.index(name) for name in splits])
    split = numbers[np.minimum(turn, len(splits) - 1)]
    return scene_type.astype("<u2"), split.astype("|u1"), scene.astype("<u4")
