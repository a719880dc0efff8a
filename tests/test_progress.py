"""Long work is never silent and never a flood: what a terminal, a narrow one and a file see."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import REPO
from helpers.commands import Run

from shards import progress
from shards.progress import Progress, megabytes, time_text

WORK = """
import time
from shards.progress import Progress
with Progress("writing", 2_966_000_000) as progress:
    for _ in range(20):
        progress.add(148_300_000)
        time.sleep(0.02)
"""


def seen_on_a_terminal(columns: int, command: list[str]) -> str:
    """All that a process writes to a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command, cwd=REPO, env={**env, "PYTHONPATH": str(REPO)}, stderr=theirs, stdout=theirs
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen += data
    os.close(ours)
    assert process.wait(60) == 0, seen
    return seen.decode()


@pytest.mark.parametrize("columns", [40, 64, 100])
def test_a_bar_fits_the_terminal_and_says_bytes_rate_and_rest(columns: int) -> None:
    seen = seen_on_a_terminal(columns, [sys.executable, "-c", WORK])
    frames = [frame.rstrip() for frame in re.split(r"[\r\n]+", seen) if frame.strip()]
    assert len(frames) > 3
    assert max(map(len, frames)) <= columns
    for frame in frames[2:]:
        assert re.search(r"writing.* [\d.]+[GM]/2\.97G,? [\d.]+[GM]B/s,? \d\d:\d\d", frame), frame
        assert ("|" in frame) == (columns >= 64)


def test_verify_on_a_terminal_shows_one_line_of_bytes(small_set: Path) -> None:
    command = [sys.executable, "-m", "convert", "verify", str(small_set)]
    seen = seen_on_a_terminal(100, command)
    assert re.search(r"checking: 100%\|.*MB/s", seen)
    assert seen.splitlines()[-1].endswith("every byte as the manifest says")


def test_without_a_terminal_lines_come_by_the_clock_and_not_by_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for every_s, n_lines in ((1e9, 0), (0.0, 1000)):
        monkeypatch.setattr(progress, "LINE_EVERY_S", every_s)
        with Progress("reading", 1000) as bar:
            for _ in range(1000):
                bar.add(1)
        said = capsys.readouterr().err
        assert said.count("\n") == n_lines
        assert "\r" not in said


def test_a_line_says_bytes_rate_and_the_time_that_is_left() -> None:
    bar = Progress("fetching", 2_972_000_000, 972_000_000)
    assert bar.line(1.0) == "fetching: 972 MB of 2.97 GB"
    bar.add(1_000_000_000)
    assert bar.line(100.0) == "fetching: 1.97 GB of 2.97 GB, 10 MB/s, 1 min 40 s left"


def test_numbers_are_written_as_people_read_them() -> None:
    assert [megabytes(n) for n in (0, 300_000, 295e6, 2.972e9)] == [
        "0.0 MB",
        "0.3 MB",
        "295 MB",
        "2.97 GB",
    ]
    assert [time_text(s) for s in (0.4, 59, 125, 4200)] == [
        "0 s",
        "59 s",
        "2 min 05 s",
        "1 h 10 min",
    ]


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_a_copy_says_before_it_begins_how_much_it_is(
    verb: str, small_set: Path, tmp_path: Path, command: Run
) -> None:
    done = command("convert", verb, small_set, tmp_path / "there")
    doing = "writing" if verb == "push" else "reading"
    assert re.match(rf"{doing}: \d+ files, [\d.]+ MB$", done.stderr.splitlines()[0])


def test_a_copy_into_another_container_says_so_too(
    small_set: Path, tmp_path: Path, command: Run
) -> None:
    done = command("shards.copy", small_set, tmp_path, "--format", "zarr")
    assert re.match(r"copying 4 of 4 shards, [\d.]+ MB as arrays$", done.stderr.splitlines()[0])
