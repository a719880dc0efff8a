"""Pictures of a run, as PNG bytes; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shards.spec import class_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FARTHEST_M = 8.0  # one scale for every depth picture
Panel = npt.NDArray[Any]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def curves_png(history: Sequence[Mapping[str, float]], baseline: float | None) -> bytes:
    """Loss, and each score by epoch; the dashed line is the top-1 of always naming the most frequent class."""
    from matplotlib.figure import Figure

    epochs, marker = [row["epoch"] for row in history], "." if len(history) < 20 else None
    names = [key.removeprefix("test_") for key in history[-1] if key.startswith("test_") and key != "test_loss"]
    figure = Figure(figsize=(4.6 * (1 + len(names)), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, 1 + len(names)), ["loss", *names], strict=True):
        for split in ("train", "test"):
            if f"{split}_{name}" in history[-1]:
                axes.plot(epochs, [row[f"{split}_{name}"] for row in history], label=split, marker=marker)
        if name == "top1" and baseline is not None:
            axes.axhline(baseline, color="grey", linestyle="--", label="most frequent class")
        axes.set(
            xlabel="epoch", title=name.replace("_", " "), ylim=(0, None if name in ("loss", "rmse", "abs_rel") else 1)
        )
        axes.grid(alpha=0.3)
        axes.legend()
    return _png(figure)


def confusion_png(counts_kk: npt.NDArray[np.int64], names: Sequence[str]) -> bytes:
    """By true class (down) and named class (across); colour and digits are per cent of the true class."""
    from matplotlib.figure import Figure

    share = counts_kk / np.maximum(counts_kk.sum(axis=1, keepdims=True), 1)
    side = 3 + 0.36 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    counted = counts_kk.sum() < 10_000  # rows are counted, pixels are given in per cent
    for row, column in zip(*np.nonzero(counts_kk if counted else share >= 0.005), strict=True):
        text = str(counts_kk[row, column]) if counted else f"{100 * share[row, column]:.0f}"
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="named", ylabel="true", title="test rows" if counted else "test pixels, per cent of the true class")
    return _png(figure)


def depth_colours(metres_hw: Panel) -> Panel:
    """RGB floats: near is warm, far is cold, no measurement is black."""
    from matplotlib import colormaps

    colours: Panel = colormaps["turbo_r"](np.clip(metres_hw / FARTHEST_M, 0, 1))[..., :3]
    return np.where(metres_hw[..., None] > 0, colours, 0.0)


def label_colours(ids_hw: Panel, n_classes: int) -> Panel:
    """RGB floats of classes 0..n-1; anything else is void."""
    return class_colours(n_classes)[np.where((ids_hw >= 0) & (ids_hw < n_classes), ids_hw + 1, 0)]


def page_png(
    title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Panel]]], legend: Mapping[str, Panel]
) -> bytes:
    """Rows of panels, each row under its caption, several rows abreast; `legend`: name -> colour."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    n, abreast = len(heads), max(1, 8 // len(heads))
    lines = max(1, -(-len(rows) // abreast))
    figure = Figure(figsize=(2.1 * n * abreast, 2.45 * lines + 0.6 + 0.25 * -(-len(legend) // 8)), layout="constrained")
    cells = figure.subplots(lines, n * abreast, squeeze=False)
    for axes in cells.flat:
        axes.axis("off")
    for k, (caption, panels) in enumerate(rows):
        for axes, head, panel in zip(cells[k // abreast][k % abreast * n :], heads, panels, strict=False):
            axes.imshow(panel, interpolation="nearest")
            axes.set_title(caption if head == heads[0] else head, fontsize=8, loc="left")
    figure.suptitle(f"{title}: {', '.join(heads)}", fontsize=11)
    if legend:
        patches = [Patch(color=tuple(colour), label=name) for name, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return _png(figure)
