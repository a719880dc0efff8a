"""A real memory limit: a command in a cgroup (v1 or v2) of its own; page cache counts, as in a container.

    with memory_group(512 << 20) as group:
        done = group.run([sys.executable, "-m", "convert", ...])
        assert done.returncode == 0, done.stderr
        print(group.peak_bytes(), group.anonymous_bytes())

Without the right to make groups: NoGroup.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class NoGroup(Exception):
    """A memory cgroup cannot be made here."""


@dataclass(frozen=True)
class MemoryGroup:
    """One cgroup with a memory limit, swap included."""

    path: Path

    @property
    def is_v2(self) -> bool:
        return (self.path / "memory.max").exists()

    def command(self, command: Sequence[object]) -> list[str]:
        """The command line that enters the group, then becomes `command`: for Popen."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *map(str, command)]

    def run(self, command: Sequence[object], **how: Any) -> subprocess.CompletedProcess[str]:
        """subprocess.run inside the group; status -9 (or 137) where the kernel's OOM killer ended it."""
        return subprocess.run(self.command(command), capture_output=True, text=True, **how)

    def peak_bytes(self) -> int:
        """The most the group ever used, page cache included (so it touches the limit wherever files are read)."""
        return self._number("memory.peak" if self.is_v2 else "memory.max_usage_in_bytes")

    def oom_kills(self) -> int:
        return self._named("memory.events" if self.is_v2 else "memory.oom_control", "oom_kill")

    def anonymous_bytes(self) -> int:
        """What is used now and cannot be dropped: call it while the command runs."""
        return self._named("memory.stat", "anon" if self.is_v2 else "total_rss")

    def _number(self, name: str) -> int:
        return int((self.path / name).read_text())

    def _named(self, name: str, key: str) -> int:
        return int(dict(line.split() for line in (self.path / name).read_text().splitlines())[key])


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group with a limit; removed at the end (every process in it must have ended)."""
    path = _parent() / f"nyuv2-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
    except OSError as error:
        raise NoGroup(f"a memory cgroup cannot be made here ({error})") from None
    try:
        _limit(path, limit_bytes)
        yield MemoryGroup(path)
    finally:
        for pid in (path / "cgroup.procs").read_text().split():  # what outlived a process that was killed
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for attempt in range(100):  # an ended process leaves its group a moment later
            try:
                path.rmdir()
                break
            except OSError:
                if attempt == 99:
                    raise
                time.sleep(0.05)


def drop_from_cache(path: Path) -> None:
    """Forget a file's cached pages, so that whoever reads it next is charged for them."""
    with open(path, "rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _parent() -> Path:
    if not V1.is_dir():
        return V2
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "memory" and (V1 / name.lstrip("/")).is_dir():
            return V1 / name.lstrip("/")
    return V1


def _limit(path: Path, limit_bytes: int) -> None:
    """The limit on memory, and none of it on swap."""
    if (path / "memory.limit_in_bytes").exists():
        limits = {"memory.limit_in_bytes": limit_bytes, "memory.memsw.limit_in_bytes": limit_bytes}  # the sum with swap
    elif (path / "memory.max").exists():
        limits = {"memory.max": limit_bytes, "memory.swap.max": 0}
    else:
        raise NoGroup("the memory controller is not enabled here")
    for name, value in limits.items():
        if (path / name).exists():  # a kernel without swap has no limit for it
            (path / name).write_text(str(value))
