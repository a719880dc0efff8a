"""The memory limit of the other tests is real: too much is killed, page cache is not too much."""

import sys
from pathlib import Path

from helpers.cgroup import drop_from_cache, memory_group

LIMIT = 64 << 20


def test_a_command_that_takes_more_than_its_group_allows_is_killed() -> None:
    with memory_group(LIMIT) as group:
        done = group.run(
            [sys.executable, "-c", "x = bytearray(1 << 20) * 200; print(len(x))"], timeout=60
        )
        assert done.returncode == -9
        assert group.oom_kills() == 1


def test_reading_a_file_larger_than_the_group_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(1 << 20) * 100)
    drop_from_cache(path)
    code = "import sys\nwith open(sys.argv[1], 'rb') as f:\n    while f.read(1 << 20): pass"
    with memory_group(LIMIT) as group:
        done = group.run([sys.executable, "-c", code, path], timeout=60)
        assert done.returncode == 0, done.stderr
        assert 0 < group.peak_bytes() <= LIMIT
        assert group.oom_kills() == 0
