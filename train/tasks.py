"""What is learnt, and how it is scored: scene or pixel classes, or depth.

Counts are float64 sums that add up over batches and ranks; scores are made of them at the end.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.spec import VOID
from train.geometry import CropBox
from train.learnt import Learnt
from train.settings import Settings

NEAREST_M = 1e-3
DEEPEST_M = 10.0
Scores = dict[str, float]


@dataclass(frozen=True)
class Classes:
    """Cross entropy; the counts are a confusion matrix [true, predicted], flat.

    names: of the classes. smoothing: of the target. main: the score to judge by. offsets_k: [K],
    added to the logits of rows in the loss alone, see `adjusted`; None: nothing.
    """

    names: list[str]
    smoothing: float
    main: str
    offsets_k: Tensor | None = None

    @property
    def n_out(self) -> int:
        """Outputs of the network: one a class."""
        return len(self.names)

    @property
    def n_counts(self) -> int:
        """Numbers in `count`."""
        return self.n_out**2

    def adjusted(self, strength: float, n_rows_k: Tensor) -> "Classes":
        """To learn from so many rows of each class, [K], without a habit of naming the frequent
        ones: the loss adds to the logits what the network would say of a row that it cannot see.

        strength: 1 makes it answer as if all classes were equally frequent. A. Menon et al.:
        Long-tail learning via logit adjustment (ICLR 2021).
        """
        share_k = n_rows_k.clamp(min=1) / n_rows_k.sum()
        return replace(self, offsets_k=strength * share_k.log())

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Sum, and the number of rows or pixels to divide it by."""
        if self.offsets_k is not None:
            logits = logits + self.offsets_k
        loss = F.cross_entropy(
            logits, target, label_smoothing=self.smoothing, ignore_index=VOID, reduction="sum"
        )
        return loss, (target != VOID).sum()

    def count(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits [B,K,...] and class ids [B,...] -> the confusion matrix of these, flat [K * K]."""
        known = target != VOID
        pairs = target[known] * self.n_out + logits.argmax(dim=1)[known]
        return torch.bincount(pairs, minlength=self.n_counts).double()

    def scores(self, counts: Tensor) -> Scores:
        """Share of the right answers, and means over the classes that have true rows or pixels."""
        accuracy_k, iou_k = self.per_class(counts)
        mean_class = float(accuracy_k.nanmean())
        miou = float(iou_k.nanmean())
        right = float(counts.view(self.n_out, -1).trace() / counts.sum())
        if self.main == "top1":
            return {"top1": right, "mean_class": mean_class}
        return {"miou": miou, "pixel_accuracy": right, "mean_class": mean_class}

    def per_class(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and intersection over union of each class; nan where nothing is truly of it."""
        counts_kk = counts.double().view(self.n_out, -1)
        right_k = counts_kk.diagonal()
        true_k = counts_kk.sum(1)
        predicted_k = counts_kk.sum(0)
        iou_k = torch.where(true_k > 0, right_k / (true_k + predicted_k - right_k), torch.nan)
        return right_k / true_k, iou_k


@dataclass(frozen=True)
class Depth:
    """The network gives log(metres / mean); errors are averaged a picture, then over pictures.

    mean_m: of the train rows. stored_box, scored_box: the windows of the sensor's picture that are
    stored, and in which errors count.
    """

    mean_m: float
    stored_box: CropBox
    scored_box: CropBox
    names: tuple[str, ...] = ()
    main: str = "rmse"
    n_out: int = 1
    n_counts: int = 4

    def metres(self, out_b1hw: Tensor) -> Tensor:
        """What the network gives -> metres, limited to what is scored."""
        return (self.mean_m * out_b1hw.exp()).clamp(NEAREST_M, DEEPEST_M)

    def loss(self, out_b1hw: Tensor, metres_b1hw: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of |log error| over the measured pixels, and their number."""
        known = metres_b1hw > 0
        log_true = (metres_b1hw[known] / self.mean_m).log()
        return (out_b1hw[known] - log_true).abs().sum(), known.sum()

    def count(self, out_b1hw: Tensor, metres_b1hw: Tensor) -> Tensor:
        """Pictures, and sums over them of RMSE, absolute relative error, share within 1.25 times.

        A picture of which nothing is known counts as none.
        """
        in_range = (metres_b1hw > NEAREST_M) & (metres_b1hw < DEEPEST_M)
        known = self._inside(metres_b1hw) & in_range

        true = metres_b1hw.double().clamp(min=NEAREST_M)
        predicted = self.metres(out_b1hw).double()
        ratio = torch.maximum(true / predicted, predicted / true)
        squared = (true - predicted) ** 2
        relative = (true - predicted).abs() / true
        errors_3b1hw = torch.stack((squared, relative, (ratio < 1.25).double()))

        n_pixels_b = known.sum(dim=(1, 2, 3))
        has_pixels_b = n_pixels_b > 0
        sums_3b = (errors_3b1hw * known).sum(dim=(2, 3, 4))
        means_3b = sums_3b[:, has_pixels_b] / n_pixels_b[has_pixels_b]
        means_3b[0] = means_3b[0].sqrt()

        n_pictures = means_3b.new_tensor([means_3b.shape[1]])
        return torch.cat((n_pictures, means_3b.sum(dim=1)))

    def _inside(self, like_b1hw: Tensor) -> Tensor:
        """[H, W]: whether a stored pixel's centre lies in the scored window."""
        height, width = like_b1hw.shape[-2:]
        y_h = self.stored_box.rows_at(
            (torch.arange(height, device=like_b1hw.device) + 0.5) / height
        )
        x_w = self.stored_box.columns_at(
            (torch.arange(width, device=like_b1hw.device) + 0.5) / width
        )

        box = self.scored_box
        is_row = (y_h >= box.top) & (y_h < box.bottom)
        is_column = (x_w >= box.left) & (x_w < box.right)
        return is_row[:, None] & is_column

    def scores(self, counts: Tensor) -> Scores:
        """Means over the pictures; nan where there is none."""
        rmse, abs_rel, delta1 = (counts[1:] / counts[0]).tolist()
        return {"rmse": rmse, "abs_rel": abs_rel, "delta1": delta1}


Task = Classes | Depth


def make_task(settings: Settings, learnt: Learnt) -> Task:
    """The task of these settings on what is known of the set."""
    if settings.task == "depth":
        return Depth(learnt.depth_mean_m, learnt.stored_box, learnt.scored_box)
    main = "top1" if settings.task == "scene" else "miou"
    return Classes(list(learnt.classes), settings.label_smoothing, main)
