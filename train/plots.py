"""Pictures of a run, as PNG bytes; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shards.spec import class_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FARTHEST_M = 8.0  # one scale for every depth picture
LARGEST_COUNTED = 10_000  # rows are counted, pixels (always more of them) are given in per cent
SHARE_SHOWN = 0.005  # per cent below this stay blank
ERRORS = ("loss", "rmse", "abs_rel")  # these may exceed 1; other scores are shares
PANELS_ABREAST = 8
EVALUATED = ("val_", "test_")  # one of them, in metrics.csv
LEGEND_COLUMNS = 8
# Of a page, in inches. A cell holds a panel and three lines of text above it.
CELL_WIDTH = 2.1
CELL_HEIGHT = 2.45
PANEL_SIDE = 1.95  # at most
TITLE_HEIGHT = 0.47
CAPTION_LETTERS = 26  # a panel
TITLE_GAP = 0.04
HEAD_HEIGHT = 0.4
LEGEND_HEIGHT = 0.25
Panel = npt.NDArray[Any]  # [H, W, 3], or what imshow takes


def check_drawing() -> None:
    """Raises ModuleNotFoundError where pictures cannot be drawn."""
    import matplotlib.figure  # noqa: F401 (as the functions below do)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


# ---------------------------------------------------------------- curves


def curves_png(history: Sequence[Mapping[str, float]], baseline: float | None) -> bytes:
    """Loss, and each score by epoch.

    history: rows of metrics.csv. baseline: top-1 of always naming the most frequent class, a dashed
    line; None where there is none.
    """
    from matplotlib.figure import Figure

    scored = [column.partition("_")[2] for column in history[-1] if column.startswith(EVALUATED)]
    names = ["loss", *(name for name in scored if name != "loss")]
    figure = Figure(figsize=(4.6 * len(names), 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(names))
    for axes, name in zip(all_axes, names, strict=True):
        _draw_curve(axes, history, name)
        if name == "top1" and baseline is not None:
            axes.axhline(baseline, color="grey", linestyle="--", label="most frequent class")
        axes.legend()
    return _png(figure)


def _draw_curve(axes: Axes, history: Sequence[Mapping[str, float]], name: str) -> None:
    """One score of both splits, where they have it."""
    epochs = [row["epoch"] for row in history]
    marker = "." if len(history) < 20 else None
    for split in ("train", "val", "test"):
        column = f"{split}_{name}"
        if column in history[-1]:
            axes.plot(
                epochs, [row.get(column, math.nan) for row in history], label=split, marker=marker
            )
    top = None if name in ERRORS else 1
    axes.set(xlabel="epoch", title=name.replace("_", " "), ylim=(0, top))
    axes.grid(alpha=0.3)


# ---------------------------------------------------------------- the confusion matrix


def confusion_png(
    counts_kk: npt.NDArray[np.int64], names: Sequence[str], split: str = "test"
) -> bytes:
    """By true class (down) and predicted class (across); colour is the share of the true class.

    counts_kk: [true, predicted], rows or pixels. Digits are the rows' counts, or the pixels' per
    cent of the true class.
    """
    from matplotlib.figure import Figure

    n_true_k1 = counts_kk.sum(axis=1, keepdims=True)
    share_kk = counts_kk / np.maximum(n_true_k1, 1)
    are_rows = bool(counts_kk.sum() < LARGEST_COUNTED)

    side = 3 + 0.36 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share_kk, cmap="Blues", vmin=0, vmax=1)

    is_shown_kk = counts_kk > 0 if are_rows else share_kk >= SHARE_SHOWN
    for row, column in zip(*np.nonzero(is_shown_kk), strict=True):
        share = share_kk[row, column]
        text = str(counts_kk[row, column]) if are_rows else f"{100 * share:.0f}"
        color = "white" if share > 0.5 else "black"
        digits = axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        digits.set_in_layout(False)  # inside the axes as it is; measuring them all took seconds

    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    title = f"{split} rows" if are_rows else f"{split} pixels, per cent of the true class"
    axes.set(xlabel="predicted", ylabel="true", title=title)
    return _png(figure)


# ---------------------------------------------------------------- pages of pictures


def depth_colours(depth_m_hw: Panel) -> Panel:
    """RGB floats [H, W, 3]: near is warm, far is cold, no measurement is black."""
    from matplotlib import colormaps

    share_hw = np.clip(depth_m_hw / FARTHEST_M, 0, 1)
    colours: Panel = colormaps["turbo_r"](share_hw)[..., :3]
    return np.where(depth_m_hw[..., None] > 0, colours, 0.0)


def label_colours(ids_hw: Panel, n_classes: int) -> Panel:
    """RGB floats [H, W, 3] of classes 0..n-1; anything else is void."""
    is_class = (ids_hw >= 0) & (ids_hw < n_classes)
    colour_of_id = class_colours(n_classes)  # the first is of void
    return colour_of_id[np.where(is_class, ids_hw + 1, 0)]


@dataclass(frozen=True, kw_only=True)
class CaptionedPanels:
    """What a page shows of one picture: a caption above the first of its panels."""

    caption: str
    panels: Sequence[Panel]


def page_png(
    title: str,
    heads: Sequence[str],
    pictures: Sequence[CaptionedPanels],
    legend: Mapping[str, Panel],
) -> bytes:
    """Each picture's panels side by side under its caption, several pictures abreast.

    heads: of the panels, as many as each picture has. legend: name -> RGB colour; may be empty.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    n_panels = len(heads)
    n_abreast = max(1, PANELS_ABREAST // n_panels)
    n_lines = max(1, -(-len(pictures) // n_abreast))  # rounded up
    n_legend_lines = -(-len(legend) // LEGEND_COLUMNS)
    width = CELL_WIDTH * n_panels * n_abreast
    height = CELL_HEIGHT * n_lines + HEAD_HEIGHT + LEGEND_HEIGHT * n_legend_lines

    # One pair of axes, in inches from the upper left corner: with one for every panel, and all laid
    # out by matplotlib, a page took five times as long.
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for k, picture in enumerate(pictures):
        top = HEAD_HEIGHT + CELL_HEIGHT * (k // n_abreast)
        left = CELL_WIDTH * n_panels * (k % n_abreast)
        _draw_panels(axes, left, top, heads, picture)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")

    figure.suptitle(title, fontsize=11, y=1 - 0.08 / height, va="top", parse_math=False)
    if legend:
        patches = [Patch(color=tuple(colour), label=name) for name, colour in legend.items()]
        figure.legend(
            handles=patches,
            loc="lower center",
            ncols=LEGEND_COLUMNS,
            fontsize=8,
            frameon=False,
        )
    return _png(figure)


def _shortened(line: str, n_panels: int) -> str:
    """A line of a caption as it fits above the panels: of a long one both its ends."""
    n_most = CAPTION_LETTERS * n_panels
    if len(line) <= n_most:
        return line
    n_first = n_most // 3
    return f"{line[:n_first]}...{line[len(line) - (n_most - n_first - 3) :]}"


def _draw_panels(
    axes: Axes, left: float, top: float, heads: Sequence[str], picture: CaptionedPanels
) -> None:
    """Each as large as its cell allows, below its title."""
    caption = "\n".join(_shortened(line, len(heads)) for line in picture.caption.splitlines())
    titles = [caption, *heads[1:]]
    for k, (text, panel) in enumerate(zip(titles, picture.panels, strict=False)):
        n_high, n_wide = panel.shape[:2]
        inches = min(PANEL_SIDE / n_high, PANEL_SIDE / n_wide)
        x = left + CELL_WIDTH * k + (CELL_WIDTH - inches * n_wide) / 2
        y = top + TITLE_HEIGHT
        extent = (x, x + inches * n_wide, y + inches * n_high, y)
        axes.imshow(panel, interpolation="nearest", extent=extent)
        # A $ in the name of a file begins no formula.
        axes.text(x, y - TITLE_GAP, text, fontsize=8, va="bottom", parse_math=False)
