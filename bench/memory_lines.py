"""The lines of the table of memory, which bench.memory measures and bench.memory_plot draws."""

from dataclasses import dataclass

SHARDS = "shards"
IN_RAM = "arrays in RAM"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of two epochs in a process of its own: bytes of its whole tree, workers still alive."""

    rows_per_s: float
    epoch_s: float
    private_bytes: float  # memory that only one process has written to, summed over the processes
    pss_bytes: float  # with what is shared, counted once
    page_cache_bytes: (
        float  # mapped pages of the shards' files, which the kernel drops when it needs to
    )


@dataclass(frozen=True, kw_only=True)
class Line:
    """One way of reading, within one limit."""

    what: str  # SHARDS | IN_RAM
    limit_bytes: int
    method: str  # how workers are started
    n_workers: int
    outcome: str = "yes"  # whether it is safe to do, or how it ended
    measured: Measured | None = None  # None where it did not get to its end
