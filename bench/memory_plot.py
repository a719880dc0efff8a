"""Memory of the process tree by number of workers, as a PNG for the README."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.memory_lines import IN_RAM, SHARDS, Line

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Curve:
    """What is drawn of one method, and how."""

    what: str
    method: str
    color: str
    style: str


CURVES = (
    Curve(IN_RAM, "spawn", "tab:red", "o-"),
    Curve(IN_RAM, "forkserver", "tab:orange", "s--"),
    Curve(IN_RAM, "fork", "tab:purple", "^-"),
    Curve(SHARDS, "fork", "tab:green", "o-"),
    Curve(SHARDS, "spawn", "tab:blue", "s--"),
)


def memory_png(lines: Sequence[Line]) -> bytes:
    """The lines under the largest limit; a cross marks a run that did not get to its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    limit_bytes = max(line.limit_bytes for line in lines)
    for curve in CURVES:
        _draw(axes, curve, [line for line in lines if line.limit_bytes == limit_bytes])

    limit_gb = limit_bytes / 1e9
    axes.axhline(limit_gb, color="grey", linestyle=":")
    what = f"{limit_gb:.1f} GB: killed, or no end (x)"
    axes.text(16, limit_gb, what, ha="right", va="bottom", color="grey")
    axes.set(xlabel="workers", ylabel="memory of all processes, GB")
    axes.set(xticks=[0, 1, 2, 4, 8, 16], ylim=(0, limit_gb * 1.1))
    axes.grid(alpha=0.3)
    axes.legend(loc="center", bbox_to_anchor=(0.5, 0.72))

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw(axes: Axes, curve: Curve, lines: Sequence[Line]) -> None:
    """One curve; where a run did not get to its end, its point is at the limit."""
    points = []
    crosses = []
    for line in lines:
        if (line.what, line.method) != (curve.what, curve.method):
            continue
        if line.measured:
            points.append((line.n_workers, line.measured.pss_bytes / 1e9))
        else:
            crosses.append((line.n_workers, line.limit_bytes / 1e9))

    reached = sorted(points + crosses)
    if not reached:
        return
    label = f"{curve.what}, {curve.method}"
    workers, gb = zip(*reached, strict=True)
    axes.plot(workers, gb, curve.style, color=curve.color, label=label, markersize=4)
    if crosses:
        workers, gb = zip(*crosses, strict=True)
        axes.plot(workers, gb, "x", color=curve.color, markersize=11, markeredgewidth=2.5)
