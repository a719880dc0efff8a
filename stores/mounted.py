"""What training does with a mounted Drive: it leaves copies of its files there; it reads no shards from it unasked."""

import os
import shutil
import threading
from pathlib import Path

from shards.format import UserError, log, one_line, write_atomically

MOUNTS = Path("/proc/self/mountinfo")


def refuse_remote(path: Path) -> None:
    """Raise UserError for a set on a FUSE mount (Google Drive): each page would be a request over the network."""
    kind = kind_of_mount(path)
    if kind.startswith("fuse"):
        raise UserError(
            f"{path} is on a mounted Drive ({kind}): training would read it over the network, row by row. "
            f"Run: make pull DRIVE={path.parent} (or insist: --allow-remote)"
        )


def kind_of_mount(path: Path) -> str:
    """The file system's type, such as "ext4"; "" where nothing tells: no /proc, or no such path."""
    try:
        device = os.stat(path).st_dev
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    at = f"{os.major(device)}:{os.minor(device)}"
    return next((words[words.index("-") + 1] for words in map(str.split, lines) if words[2] == at), "")


def copy_file(source: Path, target: Path) -> None:
    with open(source, "rb") as file:  # stays the same file when a newer one takes its name
        write_atomically(target, lambda copy: shutil.copyfileobj(file, copy, 1 << 20))


class Mirror:
    """Copies a run to --mirror in a thread of its own: a failing Drive is announced, a hanging one left behind."""

    def __init__(self, source: str, target: str | None) -> None:
        self.source, self.target = source, target
        self.thread = threading.Thread()
        self.thread.start()

    def copy(self, *names: str, wait_s: float = 0.0) -> None:
        """Start copying, unless the last copy is still under way: then the next checkpoint's will do."""
        if not self.target:
            return
        self.thread.join(wait_s)
        if not self.thread.is_alive():
            self.thread = threading.Thread(target=self._copy, args=(self.target, names), daemon=True)
            self.thread.start()
            self.thread.join(wait_s)
        if wait_s and self.thread.is_alive():
            log(f"--mirror {self.target}: not done after {wait_s:.0f} s; the run is whole in {self.source}")

    def _copy(self, target: str, names: tuple[str, ...]) -> None:
        try:
            Path(target).mkdir(parents=True, exist_ok=True)
            for name in names:
                copy_file(Path(self.source, name), Path(target, name))
        except Exception as error:  # a mounted Drive fails in many ways
            log(f"--mirror {target}: {one_line(error)}; training goes on, the run is whole in {self.source}")
