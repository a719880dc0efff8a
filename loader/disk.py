"""How much this thread has waited for a disk, by the kernel's own count.

Both numbers are exact, and cost a microsecond to ask for. What is in memory counts in neither.
"""

from dataclasses import dataclass

try:
    import resource
except ImportError:  # no Unix: nothing is known
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Of this thread so far; of the whole process where the system does not tell them apart.

    n_faults: how often it touched mapped memory that had to be read, and waited.
    n_blocks: of 512 bytes, that were read from a block device because it asked.
    """

    n_faults: int
    n_blocks: int


NOTHING_KNOWN = DiskUse(0, 0)


def disk_use() -> DiskUse:
    """What it is now."""
    if resource is None:
        return NOTHING_KNOWN
    usage = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))
    return DiskUse(usage.ru_majflt, usage.ru_inblock)
