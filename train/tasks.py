"""What is learnt, and how it is scored: scene or pixel classes, or depth. Counts add up over batches and ranks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.format import CROP_BOXES, VOID
from train.data import ShardDataset
from train.settings import Settings

DEEPEST_M = 10.0
Scores = dict[str, float]


@dataclass(frozen=True)
class Classes:
    """Cross entropy; the counts are a confusion matrix [true, named], flat."""

    names: list[str]
    smoothing: float
    main: str  # the score to judge by

    @property
    def n_out(self) -> int:
        return len(self.names)

    @property
    def n_counts(self) -> int:
        return self.n_out**2

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum, and the number of rows or pixels to divide it by."""
        how: dict[str, Any] = {"label_smoothing": self.smoothing, "ignore_index": VOID, "reduction": "sum"}
        return F.cross_entropy(logits, target, **how), (target != VOID).sum()

    def count(self, logits: Tensor, target: Tensor) -> Tensor:
        known = target != VOID
        pairs = target[known] * self.n_out + logits.argmax(dim=1)[known]
        return torch.bincount(pairs, minlength=self.n_counts).double()

    def scores(self, counts: Tensor) -> Scores:
        """Share of the right answers, and means over the classes that have true rows or pixels."""
        mean_class, miou = (float(values_k.nanmean()) for values_k in self.per_class(counts))
        right = float(counts.view(self.n_out, -1).trace() / counts.sum())
        if self.main == "top1":
            return {"top1": right, "mean_class": mean_class}
        return {"miou": miou, "pixel_accuracy": right, "mean_class": mean_class}

    def per_class(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and intersection over union of each class; nan where nothing is truly of it."""
        counts_kk = counts.double().view(self.n_out, -1)
        right, true, named = counts_kk.diagonal(), counts_kk.sum(1), counts_kk.sum(0)
        iou_k = torch.where(true > 0, right / (true + named - right), torch.nan)
        return right / true, iou_k


@dataclass(frozen=True)
class Depth:
    """The network gives log(metres / mean); errors inside the Eigen crop, averaged a picture, then over pictures."""

    mean_m: float
    crop: str  # of the stored pictures
    names: tuple[str, ...] = ()
    main: str = "rmse"
    n_out: int = 1
    n_counts: int = 4

    def metres(self, out_b1hw: Tensor) -> Tensor:
        return (self.mean_m * out_b1hw.exp()).clamp(1e-3, DEEPEST_M)

    def loss(self, out_b1hw: Tensor, metres_b1hw: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of |log error| over the measured pixels, and their number."""
        known = metres_b1hw > 0
        return (out_b1hw[known] - (metres_b1hw[known] / self.mean_m).log()).abs().sum(), known.sum()

    def count(self, out_b1hw: Tensor, metres_b1hw: Tensor) -> Tensor:
        """Pictures, and the sums of their RMSE, absolute relative error and share within a factor of 1.25."""
        known = self._inside(metres_b1hw) & (metres_b1hw > 1e-3) & (metres_b1hw < DEEPEST_M)
        true, named = metres_b1hw.double().clamp(min=1e-3), self.metres(out_b1hw).double()
        ratio = torch.maximum(true / named, named / true)
        errors = torch.stack(((true - named) ** 2, (true - named).abs() / true, (ratio < 1.25).double()))
        pixels_b = known.sum(dim=(1, 2, 3))
        means_3b = (errors * known).sum(dim=(2, 3, 4))[:, pixels_b > 0] / pixels_b[pixels_b > 0]
        means_3b[0] = means_3b[0].sqrt()
        return torch.cat((means_3b.new_tensor([means_3b.shape[1]]), means_3b.sum(dim=1)))

    def _inside(self, like_b1hw: Tensor) -> Tensor:
        """Pixels whose centre lies in [45:471, 41:601] of the 640x480 picture."""
        top, bottom, left, right = CROP_BOXES[self.crop]
        y, x = ((torch.arange(n, device=like_b1hw.device) + 0.5) / n for n in like_b1hw.shape[-2:])
        y, x = top + (bottom - top) * y, left + (right - left) * x
        top, bottom, left, right = CROP_BOXES["eigen"]
        return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))

    def scores(self, counts: Tensor) -> Scores:
        return dict(zip(("rmse", "abs_rel", "delta1"), (counts[1:] / counts[0]).tolist(), strict=True))


Task = Classes | Depth


def make_task(settings: Settings, train_set: ShardDataset) -> Task:
    """The task of these settings on a dataset."""
    if settings.task == "depth":
        return Depth(train_set.depth_mean, train_set.crop)
    return Classes(train_set.classes, settings.label_smoothing, "top1" if settings.task == "scene" else "miou")
