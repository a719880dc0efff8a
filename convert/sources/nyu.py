"""The labelled set of NYU Depth v2 as a source: rows of its .mat, with the published facts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.base import FieldReader, RowFacts, RowReader
from convert.sources.nyu_mat import KEYS, LOOK_FIRST, Elsewhere, Mat, sampled_identity
from convert.sources.nyu_tables import NYU_FIELDS, nyu, splits_of, with_names
from shards.errors import WrongSetting
from shards.files import log
from shards.spec import ConversionSettings, Field, SourceIdentity

HIGHEST_LABEL = 894


class NyuSource:
    """An open nyu_depth_v2_labeled.mat, or a file of its layout. See convert.sources.base.Source.

    Raises WrongSource for any other file, and WrongSetting where `axes` or `crop` do not fit it.
    """

    def __init__(self, path: Path | Elsewhere, settings: ConversionSettings) -> None:
        self.path = path
        there = path.absolute() if isinstance(path, Path) else path
        self.opener = partial(type(self), there, settings)  # for other processes
        self.dataset = nyu()
        self.fields: Mapping[str, Field] = NYU_FIELDS
        # Before its rows can be counted: a field that it lacks is refused.
        names = settings.of_source(list(NYU_FIELDS.values()), n_rows=0).fields
        self._mat = Mat(path, names, settings.axes)
        self.n_rows = self._mat.n_rows
        handle = self._mat.handle
        self.handles: tuple[int, ...] | None = (handle,) if isinstance(handle, int) else None
        self.may_hang = self.handles is None
        self.rows_differ = False
        self.decoder: str | None = None
        self.advice = LOOK_FIRST

    def __str__(self) -> str:
        return str(self.path)

    def close(self) -> None:
        self._mat.close()

    def identity(self) -> SourceIdentity:
        return sampled_identity(self.path)

    def stamp(self) -> tuple[int, ...]:
        stat = self.path.stat()
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def resolved(self, settings: ConversionSettings) -> ConversionSettings:
        """Those given, without `axes` where the pictures tell them by themselves."""
        chosen = settings.of_source(list(self.fields.values()), self.n_rows)
        is_square = self._mat.sides[0] == self._mat.sides[1]
        return chosen if is_square else replace(chosen, axes="auto")

    def readers(self, fields: Sequence[str]) -> Sequence[RowReader]:
        return [FieldReader(name, KEYS[name], self._mat.reader(name)) for name in fields]

    def highest_id(self, field: str) -> int | None:
        return HIGHEST_LABEL if field == "label" else None

    def check_crop(self, crop: str) -> None:
        self.dataset.crop_box(crop)
        height, width = sorted(self._mat.sides)
        if crop != "none" and (width, height) != (self.dataset.width, self.dataset.height):
            of = f"{self.dataset.width}x{self.dataset.height}"
            what = f"it is a box of {of} pictures, those of {self.path} are {width}x{height}"
            raise WrongSetting("crop", crop, f"{what}. Leave it out")

    def row_facts(self) -> RowFacts:
        scenes = self._mat.strings("scenes", self.n_rows)
        scene_types = self._mat.strings("sceneTypes", self.n_rows)
        label_names = self._mat.strings("names")
        if len(label_names) < HIGHEST_LABEL:  # each label needs its name
            what = f"names has {len(label_names)} entries, expected {HIGHEST_LABEL}"
            raise self._mat.refuse(what)

        dataset = with_names(label_names, scene_types, log)
        scene_names, scene_numbers = np.unique(np.array(scenes), return_inverse=True)
        type_numbers = {name: k for k, name in enumerate(dataset.scene_types)}
        columns: dict[str, Any] = {
            "split": splits_of(scenes, log),
            "scene": scene_numbers.reshape(-1).astype("<u4"),
            "scene_type": np.array([type_numbers[name] for name in scene_types], "<u2"),
            "accel": self._mat.accel(),
            "rgb_file": self._mat.strings("rawRgbFilenames", self.n_rows),
            "depth_file": self._mat.strings("rawDepthFilenames", self.n_rows),
        }
        return RowFacts(
            columns=columns, scenes=[str(name) for name in scene_names], dataset=dataset
        )
