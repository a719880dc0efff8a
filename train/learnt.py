"""What a network's answers mean and how its inputs are made: kept in checkpoints, so that a run
answers about any pictures without the set that it learnt from.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shards.spec import Camera
from train.data import ShardDataset
from train.geometry import CropBox, crop_box_of, rays, scored_box_of


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """Facts of the set that a run learnt from.

    classes: names by their ids; none where depth is learnt. size: of the stored pictures. crop: its
    name. depth_mean_m, depth_std_m: of the train rows, nan where they have no depth. stored_box,
    scored_box: the windows of the sensor's picture that are stored, and in which depth is scored.
    camera: where it is one for all rows; in pixels of the whole picture.
    """

    classes: tuple[str, ...]
    size: int
    crop: str
    depth_mean_m: float
    depth_std_m: float
    stored_box: CropBox
    scored_box: CropBox
    camera: Camera | None

    @classmethod
    def of(cls, train_set: ShardDataset) -> "Learnt":
        return cls(
            classes=tuple(train_set.classes),
            size=train_set.size,
            crop=train_set.crop,
            depth_mean_m=train_set.depth_mean,
            depth_std_m=train_set.depth_std,
            stored_box=crop_box_of(train_set),
            scored_box=scored_box_of(train_set),
            camera=train_set.camera,
        )

    @property
    def depth_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation in metres."""
        return self.depth_mean_m, self.depth_std_m

    def rays(self, device: torch.device) -> tuple[Tensor, ...]:
        """Of the stored pixels, x and y, [1, size, size] each; () where no camera is known."""
        if self.camera is None:
            return ()
        planes = rays(self.size, self.stored_box, self.camera)
        return tuple(plane.to(device) for plane in planes)

    def to_plain(self) -> dict[str, Any]:
        """Numbers, texts, lists and dictionaries of these, as a checkpoint can hold them."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> "Learnt":
        """Raises TypeError or KeyError where it is none."""
        camera = value["camera"]
        given = {
            **value,
            "classes": tuple(map(str, value["classes"])),
            "stored_box": CropBox(**value["stored_box"]),
            "scored_box": CropBox(**value["scored_box"]),
            "camera": None if camera is None else Camera(**camera),
        }
        return cls(**given)
