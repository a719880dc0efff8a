"""inspect: what is in a set, for eyes, as text and as a contact sheet."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from shards.format import (
    FIELDS,
    PROVENANCE,
    SPLITS,
    ShardSet,
    UserError,
    all_files,
    mebibytes,
    open_set,
    row_shape,
    write_atomically,
)

INK, VOID_GREY = "#1c1f24", 0.13


def describe(directory: Path) -> str:
    """Rows, splits, class counts, depth range, void share, provenance, as text."""
    found = open_set(directory)
    manifest, files = found.manifest, all_files(found.manifest)
    split, scene, types = (found.column(name) for name in ("split", "scene", "scene_type"))
    shared = len(np.intersect1d(scene[split == 0], scene[split == 1]))
    lines = [
        str(directory),
        f"  rows      {found.n_rows}: {np.sum(split == 0)} train, {np.sum(split == 1)} test, "
        f"{len(manifest['names']['scenes'])} scenes ({shared} in both splits)",
        f"  settings  {json.dumps(manifest['settings'])}",
        f"  source    {manifest['source']['name']}, {manifest['source']['bytes']} bytes",
        f"  files     {len(files)}, {sum(f['bytes'] for f in files.values()) / 1e6:.0f} MB",
        *(_field_line(found, name) for name in manifest["fields"]),
        "  scene type            train   test",
    ]
    for k, name in enumerate(manifest["names"]["scene_types"]):
        counts = [int(np.sum((types == k) & (split == s))) for s in (0, 1)]
        if any(counts):
            lines.append(f"    {name:<18} {counts[0]:>6} {counts[1]:>6}")
    return "\n".join([*lines, _provenance_line(directory)])


def _field_line(found: ShardSet, name: str) -> str:
    facts = found.manifest["fields"][name]
    text = f"  {name:<9} {facts['dtype']} {tuple(facts['shape'])}, {facts['unit']}"
    if FIELDS[name]["dtype"] != "<u2":
        return text
    counts = np.sum([np.bincount(s.ravel(), minlength=1 << 16) for s in found.shards(name)], axis=0)
    present, none = np.flatnonzero(counts[1:]) + 1, counts[0] / counts.sum()
    if name == "label":
        return f"{text}: {len(present)} classes present, {none:.1%} void"
    low, high = present[[0, -1]] if len(present) else (0, 0)
    return f"{text}: {low} .. {high}, {none:.1%} without a measurement"


def _provenance_line(directory: Path) -> str:
    try:
        made = json.loads((directory / PROVENANCE).read_text())
        cost = f"{made['seconds']} s, peak memory {mebibytes(made['peak_memory_bytes'])}"
        return f"  made {made['when']} in {cost}: {made['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "  made: unknown (no provenance.json)"


def picture(directory: Path, out: Path, n_rows: int) -> None:
    """A contact sheet of rows spread over the set."""
    found = open_set(directory)
    rows = np.linspace(0, found.n_rows - 1, min(n_rows, found.n_rows)).astype(int)
    rgb, depth, label = (_stored(found, field, rows) for field in ("rgb", "depth", "label"))
    names = found.manifest["names"]
    scene, types, split = (found.column(c) for c in ("scene", "scene_type", "split"))
    captions = [
        f"row {r}: {names['scenes'][scene[r]]} ({names['scene_types'][types[r]]}, {SPLITS[split[r]]})" for r in rows
    ]
    contact_sheet(rgb, depth, label, names["classes"], captions, out)


def _stored(found: ShardSet, field: str, rows: np.ndarray) -> np.ndarray:
    """These rows of a field; of one that the set does not have, nothing but zeros."""
    if field not in found.settings.fields:
        return np.zeros((len(rows), *row_shape(field, found.settings.size)), np.uint8)
    shards, step = found.shards(field), found.settings.rows_per_shard
    return np.stack([shards[r // step][r % step] for r in rows])


def contact_sheet(
    rgb_nchw_u8: np.ndarray, depth_nhw_mm: np.ndarray, label_nhw: np.ndarray, class_names: list[str],
    captions: list[str], out: Path,
) -> None:  # fmt: skip
    """One line a row: picture, depth (holes black), classes. `class_names[0]` is class 1; writes a PNG."""
    inch = 1 / (3.3 * len(rgb_nchw_u8) + 1.2)
    figure, cells = _new_sheet(len(rgb_nchw_u8), inch, out)
    measured = depth_nhw_mm[depth_nhw_mm > 0]
    low, high = np.percentile(measured, (1, 99)) / 1000 if measured.size else (0, 10)  # one scale for the sheet
    for line, rgb, depth, label, caption in zip(cells, rgb_nchw_u8, depth_nhw_mm, label_nhw, captions, strict=True):
        line[0].imshow(rgb.transpose(1, 2, 0), interpolation="lanczos")
        line[0].set_title(caption, loc="left", fontsize=10, color=INK, pad=5)
        line[1].set_facecolor("black")
        metres = np.ma.masked_equal(depth, 0) / 1000
        shown = line[1].imshow(metres, cmap="turbo_r", vmin=low, vmax=max(high, low + 0.1), interpolation="nearest")
        _draw_labels(line[2], label, class_names)
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#c8ccd2", linewidth=0.6)
    _legend(figure, cells, shown, inch)
    _save(figure, out)


def _new_sheet(n: int, inch: float, out: Path) -> tuple[Any, Any]:
    """A figure of n lines of three cells; `inch` is one inch as a fraction of its height."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"{out.name}: drawing needs matplotlib. Run: pip install -e .[show]") from None
    figure = FigureCanvasAgg(Figure(figsize=(9.6, 1 / inch), dpi=110)).figure
    cells = figure.subplots(n, 3, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.13})
    figure.subplots_adjust(left=0.015, right=0.985, top=1 - 0.58 * inch, bottom=0.62 * inch)
    return figure, cells


def class_colours(n: int) -> np.ndarray:
    """(n + 1, 3) RGB 0..1: void dark grey, then hues a golden angle apart so that close ids differ."""
    from matplotlib.colors import hsv_to_rgb

    k = np.arange(n + 1)
    hsv = np.stack([k * 0.618034 % 1, 0.42 + 0.3 * (k * 0.7548777 % 1), 0.62 + 0.33 * (k * 0.5698403 % 1)], -1)
    return np.where(k[:, None] > 0, hsv_to_rgb(hsv), VOID_GREY)


def _draw_labels(axes: Any, label: np.ndarray, class_names: list[str], most: int = 6) -> None:
    """The classes in colour, with the names of the largest where they lie."""
    from matplotlib.patheffects import withStroke

    label = np.where(label <= len(class_names), label, 0)  # of a damaged set
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
    (h, w), (y, x) = mask.shape, np.nonzero(mask)
    score = -6 * np.hypot((y - y.mean()) / h, (x - x.mean()) / w)
    for reach in (1, 2, 4, 8, 16):  # how much of ever wider crosses is inside
        padded = np.pad(mask, reach)
        for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
            score += padded[y + dy * reach, x + dx * reach]
    score -= 10 * (np.minimum(y, h - 1 - y) < h * 0.05)
    for other_y, other_x in taken:
        score -= 25 * ((np.abs(y - other_y) < h * 0.08) & (np.abs(x - other_x) < w * 0.3))
    return float(y[score.argmax()]), float(x[score.argmax()])


def _legend(figure: Any, cells: Any, shown: Any, inch: float) -> None:
    """The names of the columns above the first line's caption, the scale of the depths below the last line."""
    figure.canvas.draw()
    for axes, name in zip(cells[0], ("rgb", "depth (black: no measurement)", "label (dark: unlabelled)"), strict=True):
        box = axes.get_position()
        figure.text(box.x0, box.y1 + 0.34 * inch, name, fontsize=10.5, weight="bold", color=INK, va="bottom")
    box = cells[-1][1].get_position()
    bar = figure.add_axes((box.x0, box.y0 - 0.2 * inch, box.width, 0.1 * inch))
    scale = figure.colorbar(shown, cax=bar, orientation="horizontal", format="%g m")
    scale.ax.tick_params(labelsize=8, length=2, colors=INK)
    scale.outline.set_visible(False)


def _save(figure: Any, out: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda file: file.write(buffer.getvalue()))
    except OSError as error:
        hint = "Choose another place: python -m convert inspect DIR --picture FILE.png"
        raise UserError(f"{out} cannot be written ({error.strerror or error}). {hint}") from error
