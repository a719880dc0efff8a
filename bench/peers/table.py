"""Readers in turn with ours and with the limit, and what is said of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.figures import Interval, median_interval
from bench.loader import speed_of
from bench.peers.limit import Memcpy
from bench.peers.process import ReaderProcess

NAME_WIDTH = 39


@dataclass(frozen=True)
class Measured:
    """Of one reader with a number of workers; `ours` is how many times as fast ours is."""

    rows_per_s: Interval
    of_the_limit: Interval
    ours: Interval | None
    wait_ms: Mapping[str, float]


def measure(
    reader: ReaderProcess, ours: ReaderProcess | None, limit: Memcpy, n_turns: int, n_steps: int
) -> Measured:
    """Turns of the reader, ours and the limit, so that a slow moment meets all three.

    ours: with as many workers; None where the reader is ours.
    Raises Failed.
    """
    speed_of(limit)
    rates = []
    shares = []
    times = []
    for _ in range(n_turns):
        rate = reader.ask("speed")
        rates.append(rate)
        if ours is not None:
            times.append(ours.ask("speed") / rate)
        shares.append(rate / speed_of(limit).rows_per_s)
    waits = {step: reader.ask("wait", step, n_steps) for step in ("sleeping", "holding")}
    return Measured(
        rows_per_s=median_interval(rates),
        of_the_limit=median_interval(shares),
        ours=median_interval(times) if times else None,
        wait_ms=waits,
    )


def head() -> str:
    """The first line of the table."""
    cells = f"{'rows/s':>8} {'(95 %)':>15} {'of the limit':>19} {'ours is x times':>20}"
    return f"{'':{NAME_WIDTH}} workers {cells} {'wait ms':>8} {'GIL held':>9}"


def as_text(name: str, n_workers: int, found: Measured) -> str:
    """A line of it."""
    rates = found.rows_per_s
    bounds = f"({rates.low:,.0f}-{rates.high:,.0f})"
    share = with_bounds(found.of_the_limit, 2)
    times = with_bounds(found.ours, 1) if found.ours else ""
    waits = f"{found.wait_ms['sleeping']:8.2f} {found.wait_ms['holding']:9.2f}"
    speed = f"{rates.median:8,.0f} {bounds:>15}"
    return f"{name:{NAME_WIDTH}} {n_workers:7} {speed} {share:>19} {times:>20} {waits}"


def with_bounds(found: Interval, n_digits: int) -> str:
    """Such as 0.97 (0.94-1.00)."""
    low = f"{found.low:.{n_digits}f}"
    high = f"{found.high:.{n_digits}f}"
    return f"{found.median:.{n_digits}f} ({low}-{high})"


def limits_text(make_limit: Callable[[int], Memcpy], n_buffers: int, n_turns: int) -> list[str]:
    """The limit with one buffer and with several, in turn."""
    one = make_limit(1)
    several = make_limit(n_buffers)
    speed_of(one)
    speed_of(several)
    rates: dict[int, list[float]] = {1: [], n_buffers: []}
    shares = []
    for _ in range(n_turns):
        rates[1].append(speed_of(one).rows_per_s)
        rates[n_buffers].append(speed_of(several).rows_per_s)
        shares.append(rates[n_buffers][-1] / rates[1][-1])
    lines = []
    for n, name in ((1, "one buffer"), (n_buffers, f"{n_buffers} buffers in turn")):
        found = median_interval(rates[n])
        bounds = f"({found.low:,.0f}-{found.high:,.0f})"
        share = with_bounds(median_interval(shares), 2) if n > 1 else ""
        title = f"the limit: C memcpy, {name}"
        rate = f"{found.median:8,.0f} {bounds:>15}"
        lines.append(f"{title:{NAME_WIDTH}} {'':7} {rate} {share:>19}")
    return lines
