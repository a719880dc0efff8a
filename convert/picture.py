"""A contact sheet: what is in a set, for eyes."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from convert.format import UserError, write_atomically

INK, PAPER, VOID_GREY = "#1c1f24", "#ffffff", 0.13
DPI = 110


def contact_sheet(
    rgb_nchw_u8: np.ndarray,
    depth_nhw_mm: np.ndarray,
    label_nhw: np.ndarray,
    class_names: list[str],
    captions: list[str],
    out: Path,
) -> None:
    """One line a row: picture, depth (holes black), classes. `class_names[0]` is class 1; writes a PNG."""
    inch = 1 / (3.3 * len(rgb_nchw_u8) + 1.2)
    figure, cells = _new_sheet(len(rgb_nchw_u8), inch, out)
    depth_range_m = _depth_range_m(depth_nhw_mm)
    for line, rgb, depth, label, caption in zip(cells, rgb_nchw_u8, depth_nhw_mm, label_nhw, captions, strict=True):
        line[0].imshow(rgb.transpose(1, 2, 0), interpolation="lanczos")
        shown = _draw_depth(line[1], depth, depth_range_m)
        _draw_labels(line[2], label, class_names)
        line[0].set_title(caption, loc="left", fontsize=10, color=INK, pad=5)
        for axes in line:
            _strip(axes)
    _head(figure, cells[0])
    _scale_bar(figure, cells[-1][1], shown, inch)
    _save(figure, out)


def _new_sheet(n: int, inch: float, out: Path) -> tuple[Any, Any]:
    """A figure of n lines of three cells; `inch` is one inch as a fraction of its height."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"{out.name}: drawing needs matplotlib. Run: pip install -e .[show]") from None
    figure = Figure(figsize=(9.6, 1 / inch), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    cells = figure.subplots(n, 3, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.13})
    figure.subplots_adjust(left=0.015, right=0.985, top=1 - 0.58 * inch, bottom=0.62 * inch)
    return figure, cells


def _depth_range_m(depth_mm: np.ndarray) -> tuple[float, float]:
    """One scale for the sheet: the 1st to the 99th percentile of what was measured."""
    measured = depth_mm[depth_mm > 0]
    if measured.size == 0:
        return 0.0, 10.0
    low, high = np.percentile(measured, (1, 99)) / 1000
    return float(low), float(max(high, low + 0.1))


def _draw_depth(axes: Any, depth_mm: np.ndarray, range_m: tuple[float, float]) -> Any:
    from matplotlib import colormaps

    colours = colormaps["turbo_r"].with_extremes(bad="black")
    metres = np.ma.masked_equal(depth_mm, 0).astype(np.float32) / 1000
    return axes.imshow(metres, cmap=colours, vmin=range_m[0], vmax=range_m[1], interpolation="nearest")


def class_colours(n: int) -> np.ndarray:
    """(n + 1, 3) RGB 0..1: void dark grey, then hues a golden angle apart so that close ids differ."""
    from matplotlib.colors import hsv_to_rgb

    k = np.arange(n + 1)
    hsv = np.stack([k * 0.618034 % 1, 0.42 + 0.3 * (k * 0.7548777 % 1), 0.62 + 0.33 * (k * 0.5698403 % 1)], -1)
    colours = hsv_to_rgb(hsv)
    colours[0] = VOID_GREY
    return colours


def _draw_labels(axes: Any, label: np.ndarray, class_names: list[str], most: int = 6) -> None:
    """The classes in colour, with the names of the largest where they lie."""
    from matplotlib.patheffects import withStroke

    axes.imshow(class_colours(len(class_names))[label], interpolation="nearest")
    ids, counts = np.unique(label[label > 0], return_counts=True)
    largest = ids[np.argsort(-counts, kind="stable")][:most]
    taken: list[tuple[float, float]] = []
    for i in (i for i in largest if (label == i).mean() > 0.01):
        y, x = _inside(label == i, taken)
        taken.append((y, x))
        side = "left" if x < label.shape[1] * 0.18 else "right" if x > label.shape[1] * 0.82 else "center"
        outline = [withStroke(linewidth=2.2, foreground=INK)]
        axes.text(x, y, class_names[i - 1], color="white", fontsize=8.5, ha=side, va="center", path_effects=outline)


def _inside(mask: np.ndarray, taken: list[tuple[float, float]]) -> tuple[float, float]:
    """A pixel of the mask well inside it and away from the names already written."""
    h, w = mask.shape
    depth = mask.astype(np.float32)
    for reach in (1, 2, 4, 8, 16):  # a rough distance to the outside: how much of ever wider crosses is inside
        padded = np.pad(mask, reach)
        rows, columns = slice(reach, reach + h), slice(reach, reach + w)
        cross = (padded[: -2 * reach, columns], padded[2 * reach :, columns], padded[rows, : -2 * reach])
        depth += mask * (sum(c.astype(np.float32) for c in cross) + padded[rows, 2 * reach :])
    y, x = np.nonzero(mask)
    score = depth[y, x] - 6 * np.hypot((y - y.mean()) / h, (x - x.mean()) / w)
    score -= 10 * (np.minimum(np.minimum(y, h - 1 - y) / h, 0.05) < 0.05)
    for other_y, other_x in taken:
        score -= 25 * ((np.abs(y - other_y) < h * 0.08) & (np.abs(x - other_x) < w * 0.3))
    best = int(score.argmax())
    return float(y[best]), float(x[best])


def _strip(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for edge in axes.spines.values():
        edge.set(color="#c8ccd2", linewidth=0.6)


def _head(figure: Any, first_line: Any) -> None:
    """The names of the three columns, above the first line's caption."""
    figure.canvas.draw()
    names = ("rgb", "depth (black: no measurement)", "label (dark: unlabelled)")
    for axes, name in zip(first_line, names, strict=True):
        box = axes.get_position()
        y = box.y1 + 0.34 / figure.get_figheight()
        figure.text(box.x0, y, name, fontsize=10.5, weight="bold", color=INK, va="bottom")


def _scale_bar(figure: Any, above: Any, shown: Any, inch: float) -> None:
    box = above.get_position()
    bar = figure.add_axes((box.x0, box.y0 - 0.2 * inch, box.width, 0.1 * inch))
    scale = figure.colorbar(shown, cax=bar, orientation="horizontal")
    scale.ax.tick_params(labelsize=8, length=2, colors=INK)
    scale.outline.set_visible(False)
    scale.ax.xaxis.set_major_formatter(lambda metres, _: f"{metres:g} m")


def _save(figure: Any, out: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=PAPER)

    def write(file: Any) -> None:
        file.write(buffer.getvalue())

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, write)
    except OSError as error:
        hint = "Choose another place: python -m convert inspect DIR --picture FILE.png"
        raise UserError(f"{out} cannot be written ({error.strerror or error}). {hint}") from error
