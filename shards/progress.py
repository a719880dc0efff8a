"""How far long work is: a bar on a terminal, elsewhere a line now and then.

A terminal gets one line that is written again and again, and that fits its width. A file, a pipe or
a notebook's cell would keep every one of these: they get a line each LINE_EVERY_S seconds.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from shards.files import log

LINE_EVERY_S = 5.0
WIDE = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left"
NARROW = "{desc} {n_fmt}/{total_fmt} {rate_fmt} {remaining}"
NARROW_BELOW = 60  # columns: a bar beside the numbers would be cut off


def megabytes(n_bytes: float) -> str:
    """For a message: "0.3 MB", "295 MB", "2.97 GB"."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.2f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e7 else f"{n_bytes / 1e6:.1f} MB"


def time_text(seconds: float) -> str:
    """For a message: "7 s", "2 min 05 s", "1 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _Bar(tqdm):
    """A bar that leaves the drawing out where the terminal is narrow."""

    @property
    def format_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().format_dict
        columns = values["ncols"] or 80
        return {**values, "bar_format": NARROW if columns < NARROW_BELOW else WIDE}


def n_rows_text(n_rows: float) -> str:
    """For a message: "1449 rows"."""
    return f"{n_rows:.0f} rows"


class Progress:
    """One piece of work: how much of it is done, how fast, how long the rest will take.

    It is counted in bytes, or in what `unit` and `amount` say.
    """

    def __init__(
        self,
        doing: str,
        n_all: int,
        n_done: int = 0,
        *,
        unit: str = "B",
        amount: Callable[[float], str] = megabytes,
    ) -> None:
        """doing: the first word of each line. n_done: by an earlier run. amount: as text."""
        self.doing = doing
        self.n_all = n_all
        self.n_done = n_done
        self._amount = amount
        self._n_before = n_done
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar = _Bar(
            total=n_all,
            initial=n_done,
            desc=doing,
            unit=unit,
            unit_scale=unit == "B",
            dynamic_ncols=True,
            disable=None,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """The bar stays as it is."""
        self._bar.close()

    def add(self, n: int) -> None:
        """So much more is done."""
        self.n_done += n
        self._bar.update(n)
        if self._bar.disable:
            self._say_now_and_then()

    def _say_now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            log(self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """What is said after so many seconds of the work."""
        done = f"{self._amount(self.n_done)} of {self._amount(self.n_all)}"
        rate = (self.n_done - self._n_before) / max(seconds, 1e-9)
        if rate <= 0:
            return f"{self.doing}: {done}"
        rest = time_text((self.n_all - self.n_done) / rate)
        return f"{self.doing}: {done}, {self._amount(rate)}/s, {rest} left"
