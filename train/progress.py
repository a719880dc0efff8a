"""What is said while something takes long: a bar on a terminal, elsewhere a line now and then.

Elsewhere is a pipe, a scheduler's log, the cell of a notebook: a bar would fill them.
"""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

from shards.files import log

UNKNOWN_COLUMNS = 80
UNKNOWN_LINES = 24
SILENT_S = 5.0  # after so long somebody begins to wonder


class Voice:
    """When this process last said something that shows that it works."""

    def __init__(self) -> None:
        self._spoke_at = time.perf_counter()

    def has_spoken(self) -> None:
        """What was printed by others counts too."""
        self._spoke_at = time.perf_counter()

    def is_due(self) -> bool:
        """Whether it was silent for too long."""
        return time.perf_counter() - self._spoke_at >= SILENT_S


VOICE = Voice()  # one for all bars: a short one begins where another has ended


def _shape() -> dict[str, int]:
    """Columns and lines, for tqdm, which shows nothing on a terminal that does not know its own (0,
    in containers and schedulers). Empty: those of the terminal.
    """
    try:
        is_known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # no terminal
        return {}
    return {} if is_known else {"ncols": UNKNOWN_COLUMNS, "nrows": UNKNOWN_LINES}


class Progress:
    """How far something is; a context manager.

    what: is being done, as "epoch 3/40". unit: of what is counted, in the plural. total: of them.
    n_done: where it begins. is_shown: False in all ranks but the first.
    """

    def __init__(
        self, what: str, unit: str, total: int, *, n_done: int = 0, is_shown: bool = True
    ) -> None:
        self.what = what
        self.unit = unit
        self.total = total
        self.n_done = float(n_done)
        # Meter asks this before it reads the loss, which waits for the device.
        self.disable = not is_shown
        self._postfix = ""
        # disable=None: a bar on a terminal alone.
        self._bar: Any = tqdm(
            total=total,
            initial=n_done,
            desc=what,
            unit=unit.removesuffix("s"),
            leave=False,
            **_shape(),
            disable=None if is_shown else True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, n: float = 1) -> None:
        """So many more are done; a part of one is shown once it is whole."""
        self.n_done += n
        n_whole = int(self.n_done + 1e-6)
        self._bar.update(n_whole - self._bar.n)
        is_wanted = self._bar.disable and not self.disable
        # At the end whoever counts has something to say.
        if is_wanted and n_whole < self.total and VOICE.is_due():
            VOICE.has_spoken()
            log(f"{self.what}: {n_whole} of {self.total} {self.unit}{self._postfix}")

    def set_postfix_str(self, text: str) -> None:
        """What else is to be seen, such as the loss."""
        self._postfix = f", {text}"
        self._bar.set_postfix_str(text)
