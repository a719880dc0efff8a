"""Memory of this process and everything it started, from /proc, with shared pages counted once; and what is left.

The sum of RSS counts a page shared by eight workers eight times; PSS gives each of them an eighth. Pages that only
mirror a file (memory maps) are the kernel's to drop at will, so they are kept apart.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
SHOW_EVERY_S = 1.0  # each refresh of the bar waits for the device and reads /proc
WARN_BELOW = 0.1  # of the limit
WARNED: set[str] = set()  # whose limit was warned of


class NoRoom(MemoryError):
    """The buffers would need more memory than is left; its text is one line."""


class TreeMemory(NamedTuple):
    """Bytes held by a process tree: memory of its own, and mapped pages of files."""

    pss_anon: float
    page_cache: float


UNKNOWN = TreeMemory(math.nan, math.nan)


def larger(a: float, b: float) -> float:
    """Of what is known."""
    return b if math.isnan(a) or b > a else a


def tree_of(root: int) -> list[int]:
    """The process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in PROC.glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])  # the name may hold spaces
        except OSError:  # ended meanwhile
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def sizes_in(path: Path) -> dict[str, int]:
    """The `Name:  12 kB` lines of a file in /proc, in bytes; nothing where there is no such file (any more)."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def tree_memory(pid: int | None = None) -> TreeMemory:
    """Memory of the process (this one by default) and its descendants, resident sizes where the kernel has no PSS; nan
    where nothing tells: there is no /proc, as on macOS."""
    found = [PROC / str(each) for each in tree_of(pid or os.getpid())]
    sizes = [sizes_in(process / "status") | sizes_in(process / "smaps_rollup") for process in found]
    if not sizes[0]:
        return UNKNOWN
    own, shared, files = (
        sum(each.get(f"Pss_{kind}", each.get(f"Rss{kind}", 0)) for each in sizes) for kind in ("Anon", "Shmem", "File")
    )
    return TreeMemory(own + shared, files)


def room() -> tuple[int, int, str] | None:
    """(bytes that can still be taken, the limit, whose limit) where least is left; None where nothing tells."""
    machine = sizes_in(PROC / "meminfo")
    found = [(machine["MemAvailable"], machine["MemTotal"], "the machine")] if "MemAvailable" in machine else []
    for group in _groups():
        try:
            is_v2 = (group / "memory.max").exists()
            names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            limit, used = (int((group / name).read_text()) for name in names)
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not a memory group, or "max": no limit
            continue
        prefix = "" if is_v2 else "total_"
        used -= int(stat[f"{prefix}active_file"]) + int(stat[f"{prefix}inactive_file"])  # the kernel drops these first
        found.append((limit - used, limit, "the container"))
    return min(found, default=None)


def _groups() -> set[Path]:
    """This process's memory cgroup and those around it, v1 and v2; inside a container the mount's root is its own."""
    found = {GROUPS, GROUPS / "memory"}
    with suppress(OSError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "memory"):
                at = Path(name[1:])
                found |= {GROUPS / controllers / parent for parent in (at, *at.parents)}
    return found


def check_room(n_bytes: int, what: str) -> None:
    """Raise NoRoom where there is less memory than that. Shared slots are memory too, and no part of /dev/shm."""
    left = room()
    if left and n_bytes > left[0]:
        raise NoRoom(
            f"{what} need {n_bytes / 2**20:.0f} MiB of memory, {left[2]} has {left[0] / 2**20:.0f} MiB left. "
            "Use a smaller batch size"
        )


def warn_near_limit() -> None:
    """Say once a limit, on standard error, when less than a tenth of it is left, and what to lower."""
    left = room()
    if left and left[0] < WARN_BELOW * left[1] and left[2] not in WARNED:
        WARNED.add(left[2])
        held = tree_memory()
        print(
            f"memory: {left[0] / 2**20:.0f} MiB left of the {left[1] / 2**20:.0f} of {left[2]}; this run holds "
            f"{held.pss_anon / 2**20:.0f} (its page cache, {held.page_cache / 2**20:.0f} MiB, does not count). "
            "Use a smaller batch size, or fewer workers, before the kernel ends it",
            file=sys.stderr,
        )


class Meter:
    """Speed and memory of this process's part of an epoch; the bar asks once a second, as reading a loss waits.

    Memory is nan where nothing tells it.
    """

    def __init__(self, bar: Any, n_processes: int = 1) -> None:
        self.bar, self.n_processes = bar, n_processes
        self.rows, self.memory = 0, UNKNOWN
        self.started = self.shown = time.perf_counter()

    def values(self) -> dict[str, float]:
        rate = self.rows * self.n_processes / (time.perf_counter() - self.started)
        return {"samples_per_s": rate, "memory_bytes": self.memory[0], "page_cache_bytes": self.memory[1]}

    def show(self, n_rows: int, is_last: bool, loss: Callable[[], float]) -> None:
        """Measure the memory (the largest is kept) and refresh the bar, at most once a second, and at the end."""
        self.rows += n_rows
        self.bar.update()
        if time.perf_counter() - self.shown < SHOW_EVERY_S and not is_last:
            return
        self.shown = time.perf_counter()
        self.memory = TreeMemory(*map(larger, self.memory, tree_memory()))
        warn_near_limit()
        if not self.bar.disable:
            held = "" if math.isnan(self.memory[0]) else f", mem {self.memory[0] / 2**30:.2f} GiB"
            self.bar.set_postfix_str(f"loss {loss():.3f}, {self.values()['samples_per_s']:.0f}/s{held}")
