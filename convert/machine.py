"""What not every system or Python has: each with what is done without it."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

BLOCK = 1 << 20
PROC = Path("/proc")


def n_cores() -> int:
    """Cores that this process may use; all there are where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def shared_memory(n_bytes: int) -> int:
    """A descriptor of that much nameless memory, which several processes map. Raises OSError.

    Without memfd_create (macOS, and the Pythons of uv and conda) it is a file without a name,
    written once: a page of a file that the disk has no room for would end the process when it is
    touched.
    """
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a kernel or a sandbox may refuse what Python has
            handle = os.memfd_create("shards")
            os.ftruncate(handle, n_bytes)
            return handle
    with tempfile.TemporaryFile(buffering=0) as file:
        for start in range(0, n_bytes, BLOCK):
            file.write(bytes(min(BLOCK, n_bytes - start)))
        return os.dup(file.fileno())


def memory_of(processes: list[int]) -> int | None:
    """Bytes in memory: of all of these now, shared pages once, or the most that the first ever had.

    None where the system does not tell (no /proc).
    """
    try:
        now_kb = sum(_kb(PROC / str(pid) / "smaps_rollup", "Pss:") for pid in processes)
        most_kb = _kb(PROC / str(processes[0]) / "status", "VmHWM:")
    except (OSError, LookupError):  # a process that ends has no sizes any more
        return None
    return 1024 * max(now_kb, most_kb)


def _kb(path: Path, key: str) -> int:
    """The number behind `key` in a file of /proc: lines such as "VmHWM:  12345 kB"."""
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == key:
            return int(words[1])
    raise LookupError(f"{path} has no {key}")
