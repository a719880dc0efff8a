"""Memory of the process tree by number of workers, as a PNG for the README."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

CURVES = [
    ("note", "spawn", "arrays in RAM, spawn", "tab:red", "o-"),
    ("note", "forkserver", "arrays in RAM, forkserver", "tab:orange", "s--"),
    ("note", "fork", "arrays in RAM, fork", "tab:purple", "^-"),
    ("ours", "fork", "shards, fork", "tab:green", "o-"),
    ("ours", "spawn", "shards, spawn", "tab:blue", "s--"),
]


def memory_png(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """`lines` as bench.memory makes them; a cross marks a run that the kernel ended at the limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    limit = max(line["limit"] for line in lines)
    for what, method, label, color, style in CURVES:
        mine = [line for line in lines if (line["what"], line["method"], line["limit"]) == (what, method, limit)]
        ended = [line["workers"] for line in mine if "pss" not in line]
        points = [(line["workers"], line["pss"] / 1e9) for line in mine if "pss" in line]
        points += [(workers, limit / 1e9) for workers in ended]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), style, color=color, label=label, markersize=4)
            axes.plot(ended, [limit / 1e9] * len(ended), "x", color=color, markersize=11, markeredgewidth=2.5)
    axes.axhline(limit / 1e9, color="grey", linestyle=":")
    axes.text(16, limit / 1e9, f"{limit / 1e9:.1f} GB: killed, or no end (x)", ha="right", va="bottom", color="grey")
    axes.set(
        xlabel="workers", ylabel="memory of all processes, GB", xticks=[0, 1, 2, 4, 8, 16], ylim=(0, limit * 1.1 / 1e9)
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center", bbox_to_anchor=(0.5, 0.72))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
