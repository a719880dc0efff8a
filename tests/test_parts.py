"""One set made by several commands, as a scheduler's array of jobs runs them: each makes a part,
and the one that finds all of them done finishes the set, whichever that is.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO
from helpers.commands import Run, conversion, running, until_a_shard_is_done
from helpers.sets import committed, convert, is_whole

from convert.failed import FailedRows
from convert.pipeline import Execution, OtherDecoder, convert_to_set
from convert.plan import Part
from convert.sources.opening import open_source
from shards.dataset import open_set
from shards.files import LocalFolder
from shards.manifest import MANIFEST, read_receipt, write_receipt
from shards.spec import ConversionSettings

# 36 rows in 6 shards.
SETTINGS = ConversionSettings(size=16, rows_per_shard=6)
WORDS = ("--size", "16", "--rows-per-shard", "6", "--workers", "1")


@pytest.fixture(scope="module")
def whole(mat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as one command makes it."""
    return convert(mat, tmp_path_factory.mktemp("whole"), SETTINGS)


def part(number: int, of: int) -> Execution:
    return Execution(workers=1, part=Part(number=number, of=of))


def is_finished(directory: Path) -> bool:
    return (directory / MANIFEST).exists()


def has_no_leftovers(root: Path) -> bool:
    hidden = [path for path in root.rglob(".*") if not path.name.endswith(".lock")]
    return not hidden and not list(root.rglob("receipt-*"))


@pytest.mark.parametrize("n_parts", [1, 2, 4, 6, 100])
def test_every_shard_is_of_exactly_one_part(n_parts: int) -> None:
    for n_shards in (0, 1, 2, 5, 6, 97):
        parts = [Part(number=k, of=n_parts).shards(n_shards) for k in range(1, n_parts + 1)]
        assert [k for each in parts for k in each] == list(range(n_shards))


def test_the_last_part_prints_the_set_and_the_others_print_nothing(
    mat: Path, whole: Path, tmp_path: Path, command: Run
) -> None:
    for number, said in ((2, "2 of 6 shards are done"), (3, "4 of 6 shards are done")):
        done = command("convert", "run", mat, "--out", tmp_path, *WORDS, "--part", f"{number}/3")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert said in done.stderr
        assert not is_finished(tmp_path / whole.name)
    done = command("convert", "run", mat, "--out", tmp_path, *WORDS, "--part", "1/3")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / whole.name}\n"), done.stderr
    assert committed(tmp_path / whole.name) == committed(whole)
    assert has_no_leftovers(tmp_path)
    # Any part again: the set is there.
    done = command("convert", "run", mat, "--out", tmp_path, *WORDS, "--part", "2/3")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / whole.name}\n"), done.stderr


WRONG = {
    "none": (("--part", "0/4"), "--part: '0/4': give I/N, from 1/N to N/N"),
    "beyond": (("--part", "5/4"), "--part: '5/4': give I/N, from 1/N to N/N"),
    "no number": (("--part", "a"), "--part: 'a': give I/N, from 1/N to N/N"),
    "no parts": (("--part", "1/0"), "--part: '1/0': give I/N, from 1/N to N/N"),
    "negative": (("--part", "-1/4"), "--part"),
    "Drive": (("--part", "1/4", "--drive", "d"), "--part 1/4 does not go with --drive d"),
    "repair": (("--part", "1/4", "--repair"), "--part 1/4 does not go with --repair"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_part_is_one_line(mat: Path, tmp_path: Path, command: Run, case: str) -> None:
    words, said = WRONG[case]
    done = command("convert", "run", mat, "--out", tmp_path / "out", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_part_needs_a_source_that_is_named_and_is_no_set(
    whole: Path, tmp_path: Path, command: Run
) -> None:
    done = command("convert", "run", "--out", tmp_path, "--part", "1/2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--part 1/2: name the source" in done.stderr
    done = command("convert", "run", whole, "--out", tmp_path, "--part", "1/2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is a finished set, copied as a whole" in done.stderr


def start(mat: Path, root: Path, which: str) -> subprocess.Popen[str]:
    command = conversion(mat, root, *WORDS, "--part", which)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPO, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("n_parts", [2, pytest.param(8, marks=pytest.mark.stress)])
def test_parts_at_once_and_twice_make_one_right_set(
    mat: Path, whole: Path, tmp_path: Path, n_parts: int
) -> None:
    """8 parts of 6 shards: two of them are empty."""
    which = [f"{k}/{n_parts}" for k in range(1, n_parts + 1)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(start(mat, tmp_path, each)) for each in (*which, which[-1])
        ]
        said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    printed = [out for out, _ in said if out]
    assert printed  # by one of them at least: those that end later find the set
    assert set(printed) == {f"{tmp_path / whole.name}\n"}
    assert committed(tmp_path / whole.name) == committed(whole)
    assert has_no_leftovers(tmp_path)


def test_a_whole_run_and_a_part_keep_each_other_out(
    mat: Path, tmp_path: Path, command: Run
) -> None:
    with start(mat, tmp_path, "1/2") as process:
        until_a_shard_is_done(process, tmp_path)
        os.kill(process.pid, signal.SIGSTOP)
        done = command("convert", "run", mat, "--out", tmp_path, *WORDS)
        assert done.returncode == 2
        assert "is being converted by" in done.stderr
        process.kill()
    root = tmp_path / "other"
    with running(mat, root, *WORDS) as process:
        until_a_shard_is_done(process, root)
        os.kill(process.pid, signal.SIGSTOP)
        done = command("convert", "run", mat, "--out", root, *WORDS, "--part", "1/2")
        assert done.returncode == 2
        assert f"is being converted by pid {process.pid} on" in done.stderr


def test_a_part_that_was_killed_is_run_again(
    mat: Path, whole: Path, tmp_path: Path, command: Run
) -> None:
    with start(mat, tmp_path, "1/2") as process:
        until_a_shard_is_done(process, tmp_path)
        process.kill()
    leftover = tmp_path / whole.name / ".rgb-00000.npy.00-1.tmp"
    leftover.write_bytes(b"half of a shard")
    for which in ("2/2", "1/2"):
        done = command("convert", "run", mat, "--out", tmp_path, *WORDS, "--part", which)
        assert done.returncode == 0, done.stderr
    assert committed(tmp_path / whole.name) == committed(whole)
    assert has_no_leftovers(tmp_path)


def test_sources_copied_later_are_the_same_source(mat: Path, whole: Path, tmp_path: Path) -> None:
    """Each machine has a copy of its own, with the time of the copying."""
    root = tmp_path / "out"
    for number in (1, 2, 3):
        copy = tmp_path / str(number) / mat.name
        copy.parent.mkdir()
        shutil.copy(mat, copy)
        later = time.time() + 1000 * number
        os.utime(copy, (later, later))
        made = convert_to_set(copy, root, SETTINGS, part(number, 3))
        assert (made is not None) == (number == 3)
    assert committed(root / whole.name) == committed(whole)


def test_a_part_killed_in_the_commit_leaves_it_to_another(
    mat: Path, whole: Path, tmp_path: Path
) -> None:
    root = tmp_path
    convert_to_set(mat, root, SETTINGS, part(1, 2))
    convert_to_set(mat, root, SETTINGS, part(2, 2))
    directory = root / whole.name
    expected = committed(directory)
    # As it is where power fails between the manifest and the end: receipts are left behind.
    folder = LocalFolder(directory)
    (directory / MANIFEST).unlink()
    convert_to_set(mat, root, SETTINGS, part(1, 2))  # makes its receipts again
    assert not is_finished(directory)
    receipt = read_receipt(folder, 0)
    assert receipt is not None
    made = convert_to_set(mat, root, SETTINGS, part(2, 2))
    assert made is not None
    write_receipt(folder, 0, receipt)
    assert convert_to_set(mat, root, SETTINGS, part(1, 2)) is not None
    assert committed(directory) == expected == committed(whole)


def test_an_empty_part_finishes_what_others_have_made(
    mat: Path, whole: Path, tmp_path: Path
) -> None:
    directory = tmp_path / whole.name
    assert convert_to_set(mat, tmp_path, SETTINGS, part(1, 8)) is None  # 0 of 6 shards
    assert not list(directory.glob("receipt-*"))
    for number in range(2, 8):
        convert_to_set(mat, tmp_path, SETTINGS, part(number, 8))
    made = convert_to_set(mat, tmp_path, SETTINGS, part(8, 8))
    assert made is not None
    assert committed(directory) == committed(whole)


def test_parts_of_two_decoders_say_so_and_do_not_wait_for_each_other(
    mat: Path, whole: Path, tmp_path: Path
) -> None:
    convert_to_set(mat, tmp_path, SETTINGS, part(1, 2))
    folder = LocalFolder(tmp_path / whole.name)
    for k in range(3):
        receipt = read_receipt(folder, k)
        assert receipt is not None
        write_receipt(folder, k, replace(receipt, decoder="another 1.0"))
    with pytest.raises(OtherDecoder, match=r"3 of its shards were decoded by another 1\.0, here"):
        convert_to_set(mat, tmp_path, SETTINGS, part(2, 2))
    assert convert_to_set(mat, tmp_path, SETTINGS, part(1, 2)) is not None
    assert committed(tmp_path / whole.name) == committed(whole)


def test_failed_rows_that_the_last_part_counts_are_tried_again_by_every_part(
    tmp_path: Path,
) -> None:
    """One may fail of 12. Each half has one that does, and by itself would let it pass."""
    pytest.importorskip("PIL", reason="needs pillow")
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    from helpers.frames import AS_IS, convert_frames, write_frames_of, write_table

    rows = write_frames_of(tmp_path, 12, split="train")
    table = write_table(tmp_path / "rows.csv", rows)
    expected = convert_frames(table, tmp_path / "whole", AS_IS)
    lines = open_set(expected).column("row").tolist()
    damaged = [tmp_path / rows[lines[k]]["rgb"] for k in (1, 11)]
    pictures = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(b"no picture")

    def make(number: int) -> bool:
        how = replace(part(number, 2), max_failed=0.1)
        with closing(open_source(table, AS_IS)) as source:
            return convert_to_set(source, tmp_path / "out", AS_IS, how) is not None

    assert not make(1)
    with pytest.raises(FailedRows, match="2 of 12 rows cannot be read"):
        make(2)
    directory = tmp_path / "out" / expected.name
    assert (directory / "failed.csv").read_text().count("\n") == 3
    for path, picture in zip(damaged, pictures, strict=True):
        path.write_bytes(picture)
    assert make(1)  # the row of the other half alone may fail
    assert (directory / "failed.csv").read_text().count("\n") == 2
    assert is_whole(directory)
