"""Memory of this process and all that it started, with shared pages counted once; and what is left.

The sum of RSS counts a page shared by eight workers eight times; PSS gives each of them an eighth.
Pages that only mirror a file (memory maps) are the kernel's to drop at will: they are kept apart.
All is read from /proc and /sys/fs/cgroup; where there is none, as on macOS, nothing is known.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
MIB = 2**20
SHOW_EVERY_S = 1.0  # each refresh of the bar waits for the device and reads /proc
WARN_BELOW = 0.1  # of the limit
WARNED: set[str] = set()  # whose limit was warned of


class NoRoom(MemoryError):
    """The buffers would need more memory than is left; its text is one line.

    needed_bytes: of the buffers.
    left_bytes: what the machine or the container can still give.
    """

    def __init__(self, text: str, needed_bytes: int = 0, left_bytes: int = 0) -> None:
        super().__init__(text)
        self.needed_bytes = needed_bytes
        self.left_bytes = left_bytes


@dataclass(frozen=True)
class TreeMemory:
    """Bytes held by a process tree: memory of its own, and mapped pages of files."""

    pss_anon: float
    page_cache: float


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory that can still be taken, where least is left."""

    left_bytes: int
    limit_bytes: int
    owner: str  # whose limit it is


UNKNOWN = TreeMemory(math.nan, math.nan)


# ---------------------------------------------------------------- what is held


def tree_memory(pid: int | None = None) -> TreeMemory:
    """Memory of the process (this one by default) and its descendants.

    Resident sizes are taken where the kernel has no PSS; nan where nothing tells: there is no
    /proc.
    """
    processes = [PROC / str(each) for each in tree_of(pid or os.getpid())]
    sizes = [
        sizes_in(process / "status") | sizes_in(process / "smaps_rollup") for process in processes
    ]
    if not sizes[0]:
        return UNKNOWN

    def total(kind: str) -> int:
        return sum(each.get(f"Pss_{kind}", each.get(f"Rss{kind}", 0)) for each in sizes)

    return TreeMemory(pss_anon=total("Anon") + total("Shmem"), page_cache=total("File"))


def tree_of(root: int) -> list[int]:
    """The process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in PROC.glob("[0-9]*/stat"):
        try:
            text = entry.read_text(errors="replace")
        except OSError:  # ended meanwhile
            continue
        after_name = text.rpartition(")")[2]  # the name may hold spaces
        parent = int(after_name.split()[1])
        children.setdefault(parent, []).append(int(entry.parent.name))

    found = [root]
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def sizes_in(path: Path) -> dict[str, int]:
    """The `Name:  12 kB` lines of a file in /proc, in bytes.

    Nothing where there is no such file (any more).
    """
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}

    sizes: dict[str, int] = {}
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            sizes[words[0].removesuffix(":")] = int(words[1]) * 1024
    return sizes


def larger(a: float, b: float) -> float:
    """Of what is known."""
    return b if math.isnan(a) or b > a else a


# ---------------------------------------------------------------- what is left


def room() -> Room | None:
    """What the machine or a container around it can still give; None where nothing tells."""
    found = []
    machine = sizes_in(PROC / "meminfo")
    if "MemAvailable" in machine:
        left_bytes = machine["MemAvailable"]
        limit_bytes = machine["MemTotal"]
        found.append(Room(left_bytes=left_bytes, limit_bytes=limit_bytes, owner="the machine"))
    for group in _groups():
        group_room = _room_in(group)
        if group_room is not None:
            found.append(group_room)
    return min(
        found, key=lambda each: (each.left_bytes, each.limit_bytes, each.owner), default=None
    )


def _room_in(group: Path) -> Room | None:
    """None where it is no memory group, or has no limit."""
    is_v2 = (group / "memory.max").exists()
    limit_name = "memory.max" if is_v2 else "memory.limit_in_bytes"
    used_name = "memory.current" if is_v2 else "memory.usage_in_bytes"
    prefix = "" if is_v2 else "total_"
    try:
        limit_bytes = int((group / limit_name).read_text())
        used_bytes = int((group / used_name).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None

    # The kernel drops these first.
    files_bytes = int(stat[f"{prefix}active_file"]) + int(stat[f"{prefix}inactive_file"])
    left_bytes = limit_bytes - (used_bytes - files_bytes)
    return Room(left_bytes=left_bytes, limit_bytes=limit_bytes, owner="the container")


def _groups() -> set[Path]:
    """This process's memory cgroup and those around it, v1 and v2.

    Inside a container the mount's root is its own.
    """
    found = {GROUPS, GROUPS / "memory"}
    with suppress(OSError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "memory"):
                at = Path(name[1:])
                found |= {GROUPS / controllers / parent for parent in (at, *at.parents)}
    return found


def check_room(n_bytes: int, what: str) -> None:
    """Raise NoRoom where there is less memory than that.

    Shared buffers are memory too, and no part of /dev/shm.
    """
    left = room()
    if left and n_bytes > left.left_bytes:
        text = (
            f"{what} need {n_bytes / MIB:.0f} MiB of memory, "
            f"{left.owner} has {left.left_bytes / MIB:.0f} MiB left. Use a smaller batch size"
        )
        raise NoRoom(text, n_bytes, left.left_bytes)


def warn_near_limit() -> None:
    """Say once a limit, on standard error, when less than a tenth of it is left."""
    left = room()
    if left is None or left.owner in WARNED or left.left_bytes >= WARN_BELOW * left.limit_bytes:
        return

    WARNED.add(left.owner)
    held = tree_memory()
    print(
        f"memory: {left.left_bytes / MIB:.0f} MiB left of the {left.limit_bytes / MIB:.0f} of "
        f"{left.owner}; this run holds {held.pss_anon / MIB:.0f} (its page cache, "
        f"{held.page_cache / MIB:.0f} MiB, does not count). "
        "Use a smaller batch size, or fewer workers, before the kernel ends it",
        file=sys.stderr,
    )


# ---------------------------------------------------------------- while a training runs


class Meter:
    """Speed and memory of this process's part of an epoch.

    bar: a progress bar as tqdm makes them: `update`, `disable`, `set_postfix_str`.
    n_processes: how many train alike; the speed is that of all of them.
    """

    def __init__(self, bar: Any, n_processes: int = 1) -> None:
        self.bar = bar
        self.n_processes = n_processes
        self.n_rows = 0
        self.memory = UNKNOWN  # the largest seen
        self.started = time.perf_counter()
        self.shown = self.started

    def values(self) -> dict[str, float]:
        """Samples a second, and the most memory seen in bytes; nan where nothing tells it."""
        seconds = time.perf_counter() - self.started
        return {
            "samples_per_s": self.n_rows * self.n_processes / seconds,
            "memory_bytes": self.memory.pss_anon,
            "page_cache_bytes": self.memory.page_cache,
        }

    def show(self, n_rows: int, is_last: bool, loss: Callable[[], float]) -> None:
        """Count these rows; at most once a second, and at the end, refresh what is shown.

        n_rows: of the step that is done.
        loss: asked for when it is shown, as reading it waits for the device.
        """
        self.n_rows += n_rows
        self.bar.update()
        if time.perf_counter() - self.shown < SHOW_EVERY_S and not is_last:
            return

        self.shown = time.perf_counter()
        self._measure()
        warn_near_limit()
        if not self.bar.disable:
            rate = self.values()["samples_per_s"]
            self.bar.set_postfix_str(f"loss {loss():.3f}, {rate:.0f}/s{self._memory_text()}")

    def _measure(self) -> None:
        now = tree_memory()
        self.memory = TreeMemory(
            pss_anon=larger(self.memory.pss_anon, now.pss_anon),
            page_cache=larger(self.memory.page_cache, now.page_cache),
        )

    def _memory_text(self) -> str:
        if math.isnan(self.memory.pss_anon):
            return ""
        return f", mem {self.memory.pss_anon / 2**30:.2f} GiB"
