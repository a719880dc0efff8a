"""Rows of any set of the right size, for a network that learnt from another one.

Classes go by their names: what this set calls as the run does is known of its rows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shards.dataset import ShardSet
from shards.errors import UserError
from shards.files import log
from shards.manifest import RIGHT_ROW
from shards.spec import NO_SCENE_TYPE, SPLITS, VOID, DatasetSpec
from train.data import CAMERA
from train.errors import MissingDepth, OtherSize
from train.inputs import Batch
from train.job import NetworkSetup
from train.split_rows import MM_A_METRE

ROWS_AT_ONCE = 16
N_IDS = 1 << 16  # of labels


@dataclass(frozen=True, kw_only=True)
class AskedRows:
    """Some rows, numbered as in the set: `setup.batch_fields` and the target as stored, what the
    network is asked with, and those of them, [n] bool, that it can be asked about.
    """

    rows: np.ndarray
    batch: Batch
    setup: NetworkSetup
    can_be_asked: np.ndarray


class AnySet:
    """The right rows of a set, whatever their split.

    names: of every row of the set, the file that its colours are from. Raises OtherSize,
    MissingDepth and MissingField for a set that the network cannot be asked about.
    """

    def __init__(self, setup: NetworkSetup, found: ShardSet) -> None:
        _check_fits(setup, found)
        self.found = found
        self.rows = np.flatnonzero(found.column("status") == RIGHT_ROW)
        self.names = _names(found)
        self._setup = setup
        self._batch_setup = asked_setup(setup)
        self._size = found.settings.size
        self._depth = _depth_field(setup, found)
        self._target = _target_field(setup, found)
        self._class_of_id = _class_of_id(setup, found)
        further = setup.settings.further_fields
        fields = {"rgb", self._depth, self._target, *further} - {None}
        self._gather = found.gather([str(name) for name in fields])
        # A column is read and hashed whenever it is asked for: once.
        self._scene_types = found.column("scene_type")
        self._splits = found.column("split")
        self._cameras = _cameras(found)
        if setup.sees_surfaces:
            self._say_whose_camera()

    def __len__(self) -> int:
        return len(self.rows)

    def split_of(self, rows: np.ndarray) -> list[str]:
        """What the source says of rows; "" where they were only dealt to splits."""
        if self.found.settings.split_by is not None:
            return [""] * len(rows)
        return [SPLITS[number] for number in self._splits[rows]]

    def asked(self) -> Iterator[AskedRows]:
        """All of them, a few at a time."""
        for start in range(0, len(self.rows), ROWS_AT_ONCE):
            rows = self.rows[start : start + ROWS_AT_ONCE]
            depth = self._depth_of(rows)
            can_be_asked = np.ones(len(rows), bool)
            if self._setup.sees_depth:
                can_be_asked = depth.flatten(1).any(dim=1).numpy()
            further = self._setup.settings.further_fields
            batch = (
                self._stored("rgb", rows),
                depth,
                *(self._stored(name, rows) for name in further),
                *self._cameras_of(rows),
                self._targets(rows),
            )
            yield AskedRows(
                rows=rows, batch=batch, setup=self._batch_setup, can_be_asked=can_be_asked
            )

    # ------------------------------------------------------------------ pictures

    def _stored(self, field: str, rows: np.ndarray) -> Tensor:
        """[n, C, S, S], depth as int16 millimetres."""
        stored = self.found.field(field)
        planes = stored.planes or (1,)
        dtype = "i2" if stored.kind == "depth" else stored.dtype
        found = self._gather.into((field,), rows).view(dtype)
        return torch.from_numpy(found.reshape(len(rows), *planes, self._size, self._size))

    def _depth_of(self, rows: np.ndarray) -> Tensor:
        if self._depth is None:
            return torch.zeros((len(rows), 1, self._size, self._size), dtype=torch.int16)
        return self._stored(self._depth, rows)

    # ------------------------------------------------------------------ what is known of them

    def _targets(self, rows: np.ndarray) -> Tensor:
        """As a dataset of the task gives them; VOID, and of depth 0, where nothing is known."""
        plane = (self._size, self._size)
        if self._setup.settings.task == "scene":
            return torch.from_numpy(self._class_of_id[self._scene_types[rows]])
        if self._setup.learns_depth:
            if self._target is None:
                return torch.zeros((len(rows), 1, *plane))
            return self._stored(self._target, rows).float() / MM_A_METRE
        if self._target is None:
            return torch.full((len(rows), *plane), VOID, dtype=torch.int64)
        ids_1hw = self._stored(self._target, rows)
        return torch.from_numpy(self._class_of_id[ids_1hw[:, 0].numpy()])

    # ------------------------------------------------------------------ cameras

    def _cameras_of(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        """[n, 4] where the network sees surfaces, else nothing; the run's where none is known."""
        if not self._setup.sees_surfaces:
            return ()
        cameras = self._cameras[rows].astype(np.float32)
        is_unknown = ~(cameras[:, :2] > 0).all(axis=1)
        cameras[is_unknown] = self._setup.learnt.usual_camera
        return (torch.from_numpy(cameras),)

    def _say_whose_camera(self) -> None:
        n_unknown = int(np.sum(~(self._cameras[self.rows][:, :2] > 0).all(axis=1)))
        if n_unknown:
            those = f"of {n_unknown} of {len(self.rows)} pictures no camera is known"
            log(f"{self.found.path}: {those}: that of the run's set is taken")


# ---------------------------------------------------------------- what a set offers


def asked_setup(setup: NetworkSetup) -> NetworkSetup:
    """What a network is asked with about rows of any set."""
    return replace(setup, batch_fields=_batch_fields(setup), rays=())


def _check_fits(setup: NetworkSetup, found: ShardSet) -> None:
    if found.settings.size != setup.learnt.size:
        raise OtherSize(found.path, found.settings.size, setup.learnt.size)
    if setup.sees_depth and "depth" not in found.manifest.fields:
        raise MissingDepth(found.path)
    found.field("rgb")
    for further in setup.learnt.further:
        kind = found.field(further.name).kind
        if kind != further.kind:
            what = f"{further.name} of {found.path} is {kind}, the run learnt from {further.kind}"
            raise UserError(what, f"Convert its source with {further.name} as {further.kind}")
    if setup.learnt.crop != found.settings.crop:
        learnt = _called(setup.learnt.crop)
        here = _called(found.settings.crop)
        log(f"{found.path}: the run learnt from {learnt}, here are {here}: it may answer worse")


def _batch_fields(setup: NetworkSetup) -> tuple[str, ...]:
    """What is handed over before the target: a camera a row where the network sees surfaces."""
    camera = (CAMERA.name,) if setup.sees_surfaces else ()
    return ("rgb", "depth", *setup.settings.further_fields, *camera)


def _called(crop: str) -> str:
    return "whole pictures" if crop == "none" else f"those of the crop {crop}"


def _names(found: ShardSet) -> list[str]:
    """Of each row of the set: its file, or its number where none is known."""
    files = found.texts("rgb_file")
    return [file or f"row {row}" for row, file in enumerate(files)]


def _depth_field(setup: NetworkSetup, found: ShardSet) -> str | None:
    """What is handed over as depth: where depth is learnt, what tells which pixels were measured.

    None where the set has none.
    """
    names = ("raw_depth", "depth") if setup.learns_depth else ("depth",)
    return next((name for name in names if name in found.manifest.fields), None)


def _target_field(setup: NetworkSetup, found: ShardSet) -> str | None:
    """Where what the run learns is stored; None: in a column, or nowhere."""
    if setup.settings.task == "scene":
        return None
    name = "depth" if setup.learns_depth else "label"
    return name if name in found.manifest.fields else None


def _class_of_id(setup: NetworkSetup, found: ShardSet) -> np.ndarray:
    """[N_IDS] int64: the run's class of each stored type of scene, or label; VOID: none of its."""
    classes = tuple(setup.task.names)
    spec = found.dataset
    found_classes = np.full(N_IDS, VOID, np.int64)
    if setup.settings.task == "scene":
        ids = _scene_classes(classes, spec)
        found_classes[: len(ids)] = np.where(ids >= 0, ids, VOID)
        found_classes[NO_SCENE_TYPE] = VOID
        return found_classes

    for table in spec.label_tables:
        if table.names == classes:
            ids = np.array(table.ids, np.int64)
            found_classes[: len(ids)] = np.where(ids > 0, ids - 1, VOID)
            return found_classes
    number_of = {name: k for k, name in enumerate(classes)}
    for k, name in enumerate(spec.label_names):
        found_classes[k + 1] = number_of.get(name, VOID)
    return found_classes


def _scene_classes(classes: tuple[str, ...], spec: DatasetSpec) -> np.ndarray:
    """[T] int64 of each type of scene; -1: no class of these."""
    for protocol in spec.protocols:
        if protocol.names == classes:
            ids: np.ndarray = protocol.ids_of(spec.scene_types)
            return ids
    number_of = {name: k for k, name in enumerate(classes)}
    return np.array([number_of.get(name, -1) for name in spec.scene_types], np.int64)


def _cameras(found: ShardSet) -> np.ndarray:
    """[N, 4]: focal lengths and centres as shares of the stored pictures, 0 where unknown."""
    if "camera" not in found.manifest.columns:
        return np.zeros((found.n_rows, 4), np.float32)
    return found.column("camera")


# ---------------------------------------------------------------- names of files


MAX_PART = 120  # bytes of a folder's or file's name that are kept; a file system takes 255


def answer_file(name: str) -> Path:
    """A relative path for the answer about a picture: no two names have the same one, and none
    leads out of the folder that it is put into.
    """
    *folders, file = (_safe_part(part) for part in name.split("/"))
    # A folder must not be called as a file is.
    parts = [f"{part}%" if part.endswith(".png") else part for part in folders]
    return Path(*parts, f"{file}.png")


def _safe_part(part: str) -> str:
    """Letters, digits and a few signs stay; of long names the start and a hash."""
    kept = "".join(c if c.isalnum() or c in " _-+=,@()." else _escaped(c) for c in part)
    if not kept.strip("."):  # nothing, "." and ".."
        kept = kept.replace(".", "%2E") or "%"
    if len(kept.encode()) > MAX_PART:
        start = kept.encode()[:MAX_PART].decode(errors="ignore")
        kept = f"{start}%{hashlib.sha256(part.encode()).hexdigest()[:16]}"
    return kept


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())
