"""inspect: what is in a set, for eyes, as text and as a contact sheet."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.dataset import StoredSet
from shards.errors import UserError, WrongPlace, how_to_install
from shards.files import mebibytes, write_atomically
from shards.manifest import FAILED, PROVENANCE, RIGHT_ROW, read_provenance
from shards.spec import NO_SCENE_TYPE, SPLITS, DatasetSpec, Field, class_colours

INK = "#1c1f24"
PICTURE_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".svg": "svg", ".pdf": "pdf"}


def describe(found: StoredSet) -> str:
    """Rows, splits, class counts, depth range, void share, provenance, as text."""
    manifest = found.manifest
    n_bytes = sum(entry.n_bytes for entry in manifest.files.values())
    lines = [
        str(found.address),
        f"  rows      {found.n_rows}: {_splits_text(found)}",
        *_failed_lines(found),
        f"  settings  {json.dumps(found.settings.to_json())}",
        f"  source    {manifest.source.name}, {manifest.source.n_bytes} bytes",
        f"  files     {len(manifest.files)}, {n_bytes / 1e6:.0f} MB",
        *(_field_line(found, field) for field in manifest.fields.values()),
        *_scene_type_lines(found),
        _provenance_line(found),
    ]
    return "\n".join([*lines, *(f"  note      {warning}" for warning in found.dataset.warnings)])


def _splits_there(found: StoredSet) -> list[str]:
    """train and test, and val where it has rows."""
    split = found.column("split")
    has_val = bool(np.any(split == SPLITS.index("val")))
    return ["train", "val", "test"] if has_val else ["train", "test"]


def _splits_text(found: StoredSet) -> str:
    split = found.column("split")
    scene = found.column("scene")
    counts = [f"{np.sum(split == SPLITS.index(name))} {name}" for name in _splits_there(found)]
    of_split = [np.unique(scene[split == k]) for k in range(len(SPLITS))]
    n_splits_of_scene = np.bincount(np.concatenate(of_split).astype(np.int64))
    n_shared = int(np.sum(n_splits_of_scene > 1))
    several = "both splits" if len(counts) == 2 else "several splits"
    n_scenes = len(found.manifest.scenes)
    return f"{', '.join(counts)}, {n_scenes} scenes ({n_shared} in {several})"


def _failed_lines(found: StoredSet) -> list[str]:
    """How many rows could not be read, where any could not."""
    n_failed = int(np.sum(found.column("status") != RIGHT_ROW))
    if not n_failed:
        return []
    return [f"  failed    {n_failed} rows are empty and left out of training: see {FAILED}"]


def _scene_type_lines(found: StoredSet) -> list[str]:
    """How many rows of each type are in each split."""
    split = found.column("split")
    types = found.column("scene_type")
    names = _splits_there(found)
    lines = [f"  {'scene type':<20}" + "".join(f"{name:>7}" for name in names)]
    every = [*enumerate(found.dataset.scene_types), (NO_SCENE_TYPE, "(none)")]
    for k, name in every:
        counts = [int(np.sum((types == k) & (split == SPLITS.index(of)))) for of in names]
        if any(counts):
            lines.append(f"    {name:<18}" + "".join(f"{count:>7}" for count in counts))
    return lines


def _field_line(found: StoredSet, field: Field) -> str:
    shape = field.row_shape(found.settings.size)
    text = f"  {field.name:<9} {field.dtype} {shape}, {field.unit}"
    if field.dtype != "<u2" or field.kind == "grey16":
        return text
    counts = np.zeros(1 << 16, np.int64)
    for shard in found.shards(field.name):
        counts += np.bincount(shard.ravel(), minlength=1 << 16)
    present = np.flatnonzero(counts[1:]) + 1
    share_of_none = counts[0] / counts.sum()
    if field.kind == "id":
        return f"{text}: {len(present)} classes present, {share_of_none:.1%} void"
    low, high = (present[0], present[-1]) if len(present) else (0, 0)
    return f"{text}: {low} .. {high}, {share_of_none:.1%} without a measurement"


def _provenance_line(found: StoredSet) -> str:
    made = read_provenance(found.folder)
    unknown = f"  made: unknown (no {PROVENANCE})"
    if made is None:
        return unknown
    try:
        memory = mebibytes(made.whole_or_none("peak_memory_bytes"))
        cost = f"{made.number('seconds')} s, peak memory {memory}"
        return f"  made {made.text('when')} in {cost}: {made.text('command')}"
    except ValueError:
        return unknown


def picture(found: StoredSet, out: Path, n_rows: int) -> None:
    """Write a contact sheet of rows spread over the set, as what the suffix of `out` says.

    Folders are made. Raises WrongPlace, also for a suffix that no picture has.
    """
    _format_of(out)
    rows = np.array(spread_rows(found, n_rows))
    scene = found.column("scene")
    types = found.column("scene_type")
    split = found.column("split")
    captions = []
    for row in rows:
        place = found.manifest.scenes[scene[row]]
        kind = _type_name(found.dataset, types[row])
        captions.append(f"row {row}: {place} ({kind}, {SPLITS[split[row]]})")
    drawn = SheetRows(
        rgb_nchw_u8=_stored(found, "rgb", rows, planes=(3,)),
        depth_nhw_mm=_stored(found, "depth", rows),
        label_nhw=_stored(found, "label", rows),
        captions=captions,
        label_names=found.dataset.label_names,
    )
    contact_sheet(drawn, out)


def _type_name(dataset: DatasetSpec, number: int) -> str:
    return "no type" if number == NO_SCENE_TYPE else dataset.scene_types[number]


def _stored(
    found: StoredSet, field: str, rows: np.ndarray, planes: tuple[int, ...] = ()
) -> np.ndarray:
    """These rows of a field; of one that the set does not have, nothing but zeros."""
    size = found.settings.size
    if field not in found.manifest.fields:
        return np.zeros((len(rows), *planes, size, size), np.uint8)
    return np.stack([stored_row(found, field, int(row)) for row in rows])


def spread_rows(found: StoredSet, n_rows: int) -> list[int]:
    """So many rows, or all there are, spread over the set."""
    n_shown = min(n_rows, found.n_rows)
    return [int(row) for row in np.linspace(0, found.n_rows - 1, n_shown)]


def stored_row(found: StoredSet, field: str, row: int) -> np.ndarray:
    """One row of a field, as it is stored."""
    return found.row(field, row)


@dataclass(frozen=True, kw_only=True)
class SheetRows:
    """Rows to be drawn: pictures, depth (0: no measurement), labels (0: unlabelled).

    captions: one a row. label_names: of the labels, from 1.
    """

    rgb_nchw_u8: np.ndarray
    depth_nhw_mm: np.ndarray
    label_nhw: np.ndarray
    captions: Sequence[str]
    label_names: Sequence[str]


def contact_sheet(rows: SheetRows, out: Path) -> None:
    """Write a picture, one line a row: rgb, depth (holes black), labels in colour with names.

    Raises WrongPlace where it cannot be written, and UserError without matplotlib.
    """
    n_rows = len(rows.captions)
    inch = 1 / (3.3 * n_rows + 1.2)
    figure, cells = _new_sheet(n_rows, inch, out)
    measured = rows.depth_nhw_mm[rows.depth_nhw_mm > 0]
    # One scale for the sheet.
    low, high = np.percentile(measured, (1, 99)) / 1000 if measured.size else (0, 10)
    for line, rgb, depth, label, caption in zip(
        cells, rows.rgb_nchw_u8, rows.depth_nhw_mm, rows.label_nhw, rows.captions, strict=True
    ):
        line[0].imshow(rgb.transpose(1, 2, 0), interpolation="lanczos")
        line[0].set_title(caption, loc="left", fontsize=10, color=INK, pad=5)
        line[1].set_facecolor("black")
        metres = np.ma.masked_equal(depth, 0) / 1000
        shown = line[1].imshow(
            metres, cmap="turbo_r", vmin=low, vmax=max(high, low + 0.1), interpolation="nearest"
        )
        _draw_labels(line[2], label, rows.label_names)
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
        what = f"{out.name}: drawing needs matplotlib"
        raise UserError(what, how_to_install("show", "matplotlib")) from None
    figure = FigureCanvasAgg(Figure(figsize=(9.6, 1 / inch), dpi=110)).figure
    cells = figure.subplots(n, 3, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.13})
    figure.subplots_adjust(left=0.015, right=0.985, top=1 - 0.58 * inch, bottom=0.62 * inch)
    return figure, cells


def _draw_labels(axes: Any, label: np.ndarray, label_names: Sequence[str], most: int = 6) -> None:
    """The classes in colour, with the names of the largest where they lie."""
    from matplotlib.patheffects import withStroke

    label = np.where(label <= len(label_names), label, 0)  # of a damaged set
    axes.imshow(class_colours(len(label_names))[label], interpolation="nearest")
    ids, counts = np.unique(label[label > 0], return_counts=True)
    largest = ids[np.argsort(-counts, kind="stable")][:most]
    taken: list[tuple[float, float]] = []
    for i in largest:
        is_i = label == i
        if is_i.mean() <= 0.01:
            continue
        y, x = _inside(is_i, taken)
        taken.append((y, x))
        axes.text(
            x,
            y,
            label_names[i - 1],
            color="white",
            fontsize=8.5,
            ha=_side_with_room(x / label.shape[1]),
            va="center",
            path_effects=[withStroke(linewidth=2.2, foreground=INK)],
        )


def _side_with_room(share_of_width: float) -> str:
    """Which side of a name stands at this place, so that it does not reach over an edge."""
    if share_of_width < 0.18:
        return "left"
    return "right" if share_of_width > 0.82 else "center"


def _inside(mask: np.ndarray, taken: list[tuple[float, float]]) -> tuple[float, float]:
    """A pixel of the mask well inside it and away from the names already written."""
    h, w = mask.shape
    y, x = np.nonzero(mask)
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
    """The names of the columns above the first line, the scale of the depths below the last."""
    figure.canvas.draw()
    for axes, name in zip(
        cells[0], ("rgb", "depth (black: no measurement)", "label (dark: unlabelled)"), strict=True
    ):
        box = axes.get_position()
        figure.text(
            box.x0, box.y1 + 0.34 * inch, name, fontsize=10.5, weight="bold", color=INK, va="bottom"
        )
    box = cells[-1][1].get_position()
    bar = figure.add_axes((box.x0, box.y0 - 0.2 * inch, box.width, 0.1 * inch))
    scale = figure.colorbar(shown, cax=bar, orientation="horizontal", format="%g m")
    scale.ax.tick_params(labelsize=8, length=2, colors=INK)
    scale.outline.set_visible(False)


def _format_of(out: Path) -> str:
    """What is to be written, by the suffix. Raises WrongPlace."""
    found = PICTURE_FORMATS.get(out.suffix.lower())
    if found is None:
        what = "has not the suffix of a picture"
        raise WrongPlace(out, what, f"Choose one of {', '.join(PICTURE_FORMATS)}")
    return found


def _save(figure: Any, out: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=_format_of(out), facecolor="white")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda file: file.write(buffer.getvalue()))
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise WrongPlace(out, what, "Choose another place for it") from error
