"""A real memory limit: a command in a cgroup (v1 or v2) of its own.

Page cache counts, as in a container.

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

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
N_TRIES = 100  # of removing a group, RETRY_S apart
RETRY_S = 0.05


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
        return [
            "sh",
            "-c",
            'echo $$ > "$0" && exec "$@"',
            str(self.path / "cgroup.procs"),
            *map(str, command),
        ]

    def run(self, command: Sequence[object], **how: Any) -> subprocess.CompletedProcess[str]:
        """subprocess.run inside the group; status -9 (or 137) where the OOM killer ended it."""
        return subprocess.run(self.command(command), capture_output=True, text=True, **how)

    def peak_bytes(self) -> int:
        """The most the group ever used.

        Page cache is included, so it touches the limit wherever files are read.
        """
        name = "memory.peak" if self.is_v2 else "memory.max_usage_in_bytes"
        return int((self.path / name).read_text())

    def oom_kills(self) -> int:
        """How many of its processes the kernel ended for want of memory."""
        name = "memory.events" if self.is_v2 else "memory.oom_control"
        return self._read_entry(name, "oom_kill")

    def anonymous_bytes(self) -> int:
        """What is used now and cannot be dropped: call it while the command runs."""
        key = "anon" if self.is_v2 else "total_rss"
        return self._read_entry("memory.stat", key)

    def _read_entry(self, name: str, key: str) -> int:
        """Of a file with one `key number` a line."""
        lines = (self.path / name).read_text().splitlines()
        entries = dict(line.split() for line in lines)
        return int(entries[key])


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group with a limit; removed at the end. Raises NoGroup where none can be made."""
    path = _parent() / f"nyuv2-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
    except OSError as error:
        raise NoGroup(f"a memory cgroup cannot be made here ({error})") from None
    try:
        _limit(path, limit_bytes)
        yield MemoryGroup(path)
    finally:
        _kill_what_is_left(path)
        _remove(path)


def drop_from_cache(path: Path) -> None:
    """Forget a file's cached pages, so that whoever reads it next is charged for them."""
    with open(path, "rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _parent() -> Path:
    """The group that new ones are made in: in v1 this process's own, if it is seen from here."""
    if not V1.is_dir():
        return V2
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        group = V1 / name.lstrip("/")
        if controllers == "memory" and group.is_dir():
            return group
    return V1


def _limit(path: Path, limit_bytes: int) -> None:
    """The limit on memory, and none of it on swap."""
    if (path / "memory.limit_in_bytes").exists():
        # memsw: the sum of memory and swap.
        limits = {"memory.limit_in_bytes": limit_bytes, "memory.memsw.limit_in_bytes": limit_bytes}
    elif (path / "memory.max").exists():
        limits = {"memory.max": limit_bytes, "memory.swap.max": 0}
    else:
        raise NoGroup("the memory controller is not enabled here")
    for name, value in limits.items():
        if (path / name).exists():  # a kernel without swap has no limit for it
            (path / name).write_text(str(value))


def _kill_what_is_left(path: Path) -> None:
    """What outlived a process that was killed."""
    for pid in (path / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _remove(path: Path) -> None:
    """An ended process leaves its group a moment later: until then it cannot be removed."""
    for _ in range(N_TRIES - 1):
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(RETRY_S)
    path.rmdir()
