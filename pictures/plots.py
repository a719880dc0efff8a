"""The two pictures of a finished run, as PNG bytes; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def curves_png(history: Sequence[Mapping[str, float]], baseline: float) -> bytes:
    """Loss and accuracy by epoch; the dashed line is the accuracy of always naming the most frequent class."""
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, label in (("train_loss", "train"), ("test_loss", "test")):
        left.plot(epochs, [row[key] for row in history], label=label, marker="." if len(epochs) < 20 else None)
    for key, label in (("train_top1", "train"), ("test_top1", "test"), ("test_mean_class", "test, mean over classes")):
        right.plot(epochs, [row[key] for row in history], label=label, marker="." if len(epochs) < 20 else None)
    right.axhline(baseline, color="grey", linestyle="--", label="most frequent class")
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return _png(figure)


def confusion_png(counts_kk: npt.NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Test rows by true class (down) and named class (across); colour is the share of the true class."""
    from matplotlib.figure import Figure

    share = counts_kk / np.maximum(counts_kk.sum(axis=1, keepdims=True), 1)
    side = 3 + 0.4 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts_kk), strict=True):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts_kk[row, column]), ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="named", ylabel="true")
    return _png(figure)
