"""What is left of memory is known before it is needed. (What workers hold: test_memory.py.)"""

import os
import sys

import pytest
from helpers.cgroup import memory_group

from loader import memory
from loader.memory import NoRoom, check_room, warn_near_limit


def test_more_than_there_is_left_is_refused_with_what_to_lower() -> None:
    check_room(1, "1 batch")
    with pytest.raises(NoRoom, match="smaller batch size"):
        check_room(1 << 50, "4 batches")


SCRIPT = """
import sys
from loader.memory import check_room, room, warn_near_limit
held = bytearray(b"x") * (int(sys.argv[1]) << 20)
print(room().limit_bytes, room().owner)
warn_near_limit()
warn_near_limit()
check_room(200 << 20, "4 batches of 128 rows")
"""


def test_the_limit_is_the_containers_and_is_warned_of_once() -> None:
    with memory_group(256 << 20) as group:
        done = group.run([sys.executable, "-c", SCRIPT, 236], env={**os.environ}, timeout=60)
    assert done.stdout.split() == [str(256 << 20), "the", "container"]
    assert done.stderr.count("memory: ") == 1
    assert "smaller batch size, or fewer workers" in done.stderr
    assert "NoRoom: 4 batches of 128 rows need 200 MiB of memory, the container has" in done.stderr


def test_nothing_is_said_far_from_the_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "WARN_BELOW", 0.0)
    warn_near_limit()
    assert capsys.readouterr().err == ""
