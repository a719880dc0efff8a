"""Copies of a training's files, left in another folder while it goes on."""

import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shards.errors import one_line
from shards.files import UNFINISHED, log, write_atomically

BLOCK_BYTES = 1 << 20
ABANDONED_S = 3600.0  # without a byte written, a copy is nobody's any more


def copy_file(source: Path, target: Path) -> None:
    """Copy one file, whole or not at all. Raises OSError."""
    with open(source, "rb") as file:  # stays the same file when a newer one takes its name
        write_atomically(target, lambda copy: shutil.copyfileobj(file, copy, BLOCK_BYTES))


def _remove_unfinished(folder: Path, names: Sequence[str]) -> None:
    """Copies of these files that nobody goes on with: their process was killed."""
    for path in folder.glob(UNFINISHED):
        is_ours = path.name.startswith(tuple(f".{name}." for name in names))
        with suppress(OSError):
            if is_ours and time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()


class Mirror:
    """Copies a run to another folder in a thread of its own.

    A Drive that fails is announced, one that hangs is left behind.
    """

    def __init__(self, source: str, target: str | None) -> None:
        """source, target: folders. Without a target nothing is ever copied."""
        self.source = source
        self.target = target
        self._thread: threading.Thread | None = None  # of the last copy

    def copy(self, *names: str, wait_s: float = 0.0) -> None:
        """Start copying, unless the last copy is under way: then the next checkpoint's will do.

        wait_s: how long the last copy, and then this one, are waited for.
        """
        if not self.target:
            return
        is_busy = self._is_copying(wait_s)
        if not is_busy:
            arguments = (self.target, names)
            self._thread = threading.Thread(target=self._copy, args=arguments, daemon=True)
            self._thread.start()
            is_busy = self._is_copying(wait_s)
        if wait_s and is_busy:
            what = f"not done after {wait_s:.0f} s; the run is whole in {self.source}"
            log(f"mirror {self.target}: {what}")

    def _is_copying(self, wait_s: float) -> bool:
        """Whether a copy is still under way, after it was waited for."""
        if self._thread is None:
            return False
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def _copy(self, target: str, names: tuple[str, ...]) -> None:
        try:
            Path(target).mkdir(parents=True, exist_ok=True)
            _remove_unfinished(Path(target), names)
            for name in names:
                copy_file(Path(self.source, name), Path(target, name))
        except Exception as error:  # a mounted Drive fails in many ways
            what = f"{one_line(error)}; training goes on, the run is whole in {self.source}"
            log(f"mirror {target}: {what}")
