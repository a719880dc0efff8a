"""The table of other people's readers: what is compared, what is left out and why.

Nothing is installed here and no speed is looked at: the readers are ours and torch's own.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import numpy as np
import torch
from conftest import REPO
from helpers.commands import Run
from helpers.made_up import SMALL, LabSource
from helpers.sets import convert

from bench.peers import __main__ as peers
from bench.peers.limit import Memcpy
from bench.peers.places import NEEDS, PEERS, NotInstalled, Peer, install
from bench.peers.rows import BATCH, Batch, Rows, WrongRows, check_epoch


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two batches and more; some of its rows have no class, and no reader gets them."""
    source = LabSource(n_rows=480)
    return convert(source, tmp_path_factory.mktemp("lab"), SMALL, workers=1)


@pytest.fixture
def rows(lab: Path) -> Rows:
    found = Rows(lab)
    assert 2 * BATCH <= len(found) < 3 * BATCH
    return found


def epoch_of(rows: Rows, numbers: np.ndarray) -> list[Batch]:
    """Batches of these rows, right in every byte."""
    batches = []
    for some in np.array_split(numbers, len(numbers) // BATCH or 1):
        rgb = np.stack([rows[number].rgb for number in some.tolist()])
        depth = np.stack([rows[number].depth for number in some.tolist()])
        batches.append((torch.from_numpy(rgb), torch.from_numpy(depth), torch.from_numpy(some)))
    return batches


@pytest.fixture
def shuffled(rows: Rows) -> np.ndarray:
    return np.random.default_rng(0).permutation(len(rows))


# ------------------------------------------------------------------------------------- the table


@pytest.mark.stress
def test_readers_that_need_nothing_are_built_checked_and_timed_beside_ours(
    lab: Path, tmp_path: Path, command: Run
) -> None:
    few = ["--turns", 1, "--steps", 2, "--workers", 1, "--only", "memmap", "lmdb"]
    done = command("bench.peers", lab, *few, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, _, *table = done.stdout.splitlines()
    assert f"{len(Rows(lab))} rows of 32x32" in first
    assert re.search(r"\d+ cores?, load [\d.]+ in the last minute: ", second)
    lines = {line[:39].strip(): line for line in table}
    for name in ("ours", "DataLoader, np.memmap, a row an item"):
        figures = re.findall(r"[\d.,]+ +\([\d.,]+-[\d.,]+\)", lines[name])
        assert len(figures) == (2 if name == "ours" else 3), lines[name]
    assert "left out: no folder to install it into was given" in lines["LMDB (3.0.0)"]
    assert "the limit: C memcpy, one buffer" in lines
    assert "the limit: C memcpy, 4 buffers in turn" in lines
    assert list(tmp_path.iterdir()) == []  # the stores are gone


def test_a_reader_that_does_not_run_is_named_with_the_reason(rows: Rows, tmp_path: Path) -> None:
    limit = Memcpy(rows, [np.arange(BATCH)], 1)
    bench = peers.Bench(rows, tmp_path, 1, 1, limit, {})
    (line,) = peers.lines_of(Peer("Nobody", "bench.peers.with_nobody"), bench, None)
    assert re.match(r"Nobody +left out: ModuleNotFoundError: No module named .*nobody'$", line)


def test_a_set_too_small_for_an_order_is_one_line(
    small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main([str(small_set)]) == 2
    assert f"Use a set with {2 * BATCH} or more" in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------- what is compared


def test_an_epoch_that_is_right_passes_and_may_lack_a_part_of_a_batch(
    rows: Rows, shuffled: np.ndarray
) -> None:
    assert check_epoch(rows, epoch_of(rows, shuffled), 0) == len(rows)
    enough = len(rows) - BATCH + 1
    assert check_epoch(rows, epoch_of(rows, shuffled[:enough]), 0) == enough


def wrong_epochs(rows: Rows, shuffled: np.ndarray) -> Iterator[tuple[str, list[Batch]]]:
    """Each with words of what is said of it."""
    for part, name in ((0, "picture"), (1, "depth")):
        batches = epoch_of(rows, shuffled)
        batches[1][part][5].view(-1)[7] ^= 1
        yield f"the {name} of row {int(batches[1][2][5])} has other bytes", batches
    twice = shuffled.copy()
    twice[3] = twice[200]
    yield "1 rows came twice", epoch_of(rows, twice)
    yield f"{BATCH} rows in an epoch, of {len(rows)}", epoch_of(rows, shuffled[:BATCH])
    yield "nothing was shuffled", epoch_of(rows, np.arange(len(rows)))


def test_other_bytes_rows_twice_too_few_and_no_order_are_seen(
    rows: Rows, shuffled: np.ndarray
) -> None:
    for said, batches in wrong_epochs(rows, shuffled):
        with pytest.raises(WrongRows, match=said):
            check_epoch(rows, batches, 0)


def test_the_limit_copies_the_rows_of_a_batch_into_each_buffer_in_turn(
    rows: Rows, shuffled: np.ndarray
) -> None:
    batches = np.split(shuffled[:255], 3)
    limit = Memcpy(rows, batches, 2)
    assert limit() == 255
    for numbers, buffer in ((batches[2], limit.buffers[0]), (batches[1], limit.buffers[1])):
        ((rgb, depth, _),) = epoch_of(rows, numbers)
        assert buffer.tobytes() == rgb.numpy().tobytes() + depth.numpy().tobytes()


# ------------------------------------------------------------------------------ what is installed


def test_every_list_pins_each_package_and_brings_no_torch() -> None:
    named = {f"{peer.needs}.txt" for peer in PEERS if peer.needs}
    assert named == {path.name for path in NEEDS.iterdir()}
    for path in NEEDS.iterdir():
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"[A-Za-z][\w-]*==[\w.]+", line), (path, line)
            assert not re.match("torch|nvidia|cuda|triton", line), (path, line)


def test_what_pip_cannot_bring_is_one_line_and_the_environment_has_our_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(NotInstalled, match="ERROR: No matching distribution found for lmdb"):
        install("lmdb", tmp_path / "peers")
    python = tmp_path / "peers" / "lmdb" / "bin" / "python"
    told = [python, "-c", "import sys, numpy; print(sys.prefix, numpy.__version__)"]
    said = subprocess.run(told, cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(tmp_path / "peers" / "lmdb"), np.__version__]
    assert sys.prefix not in said
