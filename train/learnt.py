"""What a network's answers mean and how its inputs are made: kept in checkpoints, so that a run
answers about any pictures without the set that it learnt from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError
from shards.files import log
from shards.manifest import RIGHT_ROW
from shards.spec import Box, Camera
from train.augment import SMALLEST_STD, normalize_depth, normalize_levels
from train.data import CAMERA, ShardDataset
from train.geometry import CropBox, crop_box_of, rays, scored_box_of
from train.split_rows import MM_A_METRE

RowCamera = tuple[float, float, float, float]  # fx, fy, cx, cy


@dataclass(frozen=True, kw_only=True)
class FurtherField:
    """A field beyond rgb and depth that a network sees. kind: as stored. mean, std: of the train
    rows, one number a plane; of depths in millimetres.
    """

    name: str
    kind: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def n_planes(self) -> int:
        return len(self.mean)

    @classmethod
    def of(cls, train_set: ShardDataset, name: str) -> "FurtherField":
        """Raises MissingField, and UserError where it is not to be seen or has no statistics."""
        field = train_set.shard_set.field(name)
        if field.kind == "id":
            raise UserError(f"{name} holds ids, which are learnt, not seen", "Leave it out")
        if field.statistics is None:
            what = f"{name} of {train_set.path} has no statistics to normalise by"
            raise UserError(what, "Convert a source that has train rows with it")
        return cls(
            name=name,
            kind=field.kind,
            mean=field.statistics.mean,
            std=field.statistics.std,
        )

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> "FurtherField":
        """Raises TypeError or KeyError where it is none."""
        mean = tuple(map(float, value["mean"]))
        std = tuple(map(float, value["std"]))
        return cls(name=str(value["name"]), kind=str(value["kind"]), mean=mean, std=std)

    def normalized(self, stored_bchw: Tensor) -> Tensor:
        """Levels or millimetres [B,C,H,W] -> float32; 0 where no depth was measured."""
        if self.kind == "depth":
            std_m = max(self.std[0] / MM_A_METRE, SMALLEST_STD)
            return normalize_depth(stored_bchw, self.mean[0] / MM_A_METRE, std_m)
        return normalize_levels(stored_bchw, self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """Facts of the set that a run learnt from.

    classes: names by their ids; none where depth is learnt. size: of the stored pictures. crop: its
    name. depth_mean_m, depth_std_m: of the train rows, nan where they have no depth. stored_box,
    scored_box: the windows of the sensor's picture that are stored, and in which depth is scored.
    camera: where it is one for all rows; in pixels of the whole picture. row_camera: where each row
    has its own: the medians of the train rows, for a picture whose own is not known; as shares of
    the stored picture. further: what the network sees beyond rgb and depth.
    """

    classes: tuple[str, ...]
    size: int
    crop: str
    depth_mean_m: float
    depth_std_m: float
    stored_box: CropBox
    scored_box: CropBox
    camera: Camera | None
    row_camera: RowCamera | None = None
    further: tuple[FurtherField, ...] = ()

    @classmethod
    def of(cls, train_set: ShardDataset, further: Sequence[str] = ()) -> "Learnt":
        """further: names of fields of the set. Raises MissingField and UserError."""
        return cls(
            classes=tuple(train_set.classes),
            size=train_set.size,
            crop=train_set.crop,
            depth_mean_m=train_set.depth_mean,
            depth_std_m=train_set.depth_std,
            stored_box=crop_box_of(train_set),
            scored_box=scored_box_of(train_set),
            camera=train_set.camera,
            row_camera=None if train_set.camera else _row_camera(train_set),
            further=tuple(FurtherField.of(train_set, name) for name in further),
        )

    @property
    def depth_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation in metres."""
        return self.depth_mean_m, self.depth_std_m

    def rays(self, device: torch.device) -> tuple[Tensor, ...]:
        """Of the stored pixels, x and y, [1, size, size] each; () where they have no one camera."""
        if self.camera is None:
            return ()
        planes = rays(self.size, self.stored_box, self.camera)
        return tuple(plane.to(device) for plane in planes)

    @property
    def has_surfaces(self) -> bool:
        """Whether depth can be seen as surfaces: a camera is known of every row."""
        return self.camera is not None or self.row_camera is not None

    @property
    def usual_camera(self) -> RowCamera | None:
        """Of a picture whose own is not known, as shares of the stored picture."""
        if self.camera is None:
            return self.row_camera
        edges = asdict(self.stored_box)
        box = Box(**{name: int(edges[name]) for name in ("top", "bottom", "left", "right")})
        return self.camera.as_shares(box)

    def to_plain(self) -> dict[str, Any]:
        """Numbers, texts, lists and dictionaries of these, as a checkpoint can hold them."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> "Learnt":
        """Raises TypeError or KeyError where it is none."""
        camera = value["camera"]
        row_camera = value.get("row_camera")  # earlier versions knew no such thing
        given = {
            **value,
            "classes": tuple(map(str, value["classes"])),
            "stored_box": CropBox(**value["stored_box"]),
            "scored_box": CropBox(**value["scored_box"]),
            "camera": None if camera is None else Camera(**camera),
            "row_camera": None if row_camera is None else tuple(map(float, row_camera)),
            "further": tuple(FurtherField.from_plain(each) for each in value.get("further", ())),
        }
        return cls(**given)


def _row_camera(train_set: ShardDataset) -> RowCamera | None:
    """The medians of the train rows' cameras; None where not every right row of the set has one."""
    found = train_set.shard_set
    if CAMERA.name not in found.manifest.columns:
        return None
    cameras = found.column(CAMERA.name)
    is_right = found.column("status") == RIGHT_ROW
    is_known = (cameras[is_right][:, :2] > 0).all(axis=1)
    if not is_known.all():
        n_unknown = int(np.sum(~is_known))
        if n_unknown < len(is_known):
            those = f"of {n_unknown} of {len(is_known)} rows no camera is known"
            log(f"{found.path}: {those}: depth is seen as one plane, without surfaces")
        return None
    fx, fy, cx, cy = np.median(cameras[train_set.rows], axis=0).tolist()
    return fx, fy, cx, cy
