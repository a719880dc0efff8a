"""What not every system or Python has: each with what is done without it."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

BLOCK = 1 << 20
PROC = Path("/proc")


def n_cores() -> int:
    """Cores that this process may use; where the system does not say (macOS), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_memory(n_bytes: int) -> int:
    """A descriptor of that much memory without a name, to be mapped by several processes. Raises OSError.

    Without memfd_create (macOS, and the Pythons of uv and conda) it is a file without a name, written once: a page of
    a file that the disk has no room for would end the process when it is touched.
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


def drop_from_cache(handle: int) -> None:
    """So that the next read comes from where the file lies; a hint, which some systems do not take."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of(processes: list[int]) -> int | None:
    """Bytes in memory: of all of these now, shared pages once, or the most that the first one ever had.

    None where the system does not tell (no /proc).
    """
    try:
        now = sum([_kb(PROC / str(pid) / "smaps_rollup", "Pss:") for pid in processes])
        return 1024 * max(now, _kb(PROC / str(processes[0]) / "status", "VmHWM:"))
    except (OSError, LookupError):  # a process that ends has no sizes any more
        return None


def _kb(path: Path, key: str) -> int:
    lines = {
        words[0]: words[1]
        for words in map(str.split, path.read_text().splitlines())
        if len(words) > 1
    }
    return int(lines[key])
