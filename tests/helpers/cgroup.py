"""bench.cgroup for tests: where no group can be made, the test is skipped with the reason."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench import cgroup
from bench.cgroup import MemoryGroup, drop_from_cache

__all__ = ["MemoryGroup", "drop_from_cache", "memory_group"]


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A new group with a limit; removed at the end (every process in it must have ended)."""
    try:
        made = cgroup.memory_group(limit_bytes)
        group = made.__enter__()
    except cgroup.NoGroup as error:
        pytest.skip(f"{error}: the limit is not tested")
    try:
        yield group
    finally:
        made.__exit__(None, None, None)
