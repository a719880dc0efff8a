"""Helper processes: what goes wrong in one is told as if it had gone wrong here, and none is left
behind.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import REPO, SMALL
from helpers.commands import all_gone, ends_in_one_line
from helpers.sets import convert, verify

from convert.sample import write_sample
from shards.errors import UserError
from shards.spec import ConversionSettings

WITH_HELPERS = "import sys, convert.executors as w; w.HELPERS_FROM = 0; from convert.__main__ import main; sys.exit(main())"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes a second or two."""
    path = tmp_path_factory.mktemp("large") / "rooms.mat"
    write_sample(path, 48, size_wh=(640, 480))
    return path


@pytest.fixture
def copy(mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file to damage, for which helpers are started all the same."""
    monkeypatch.setattr("convert.executors.HELPERS_FROM", 0)
    return Path(shutil.copy(mat, tmp_path / "x.mat"))


@contextmanager
def running(mat: Path, root: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A conversion under way, with its helpers."""
    command = [
        sys.executable,
        "-c",
        WITH_HELPERS,
        "run",
        str(mat),
        "--out",
        str(root),
        "--rows-per-shard",
        "4",
    ]
    command += ["--workers", "2"]
    with subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not list(root.glob("*/receipt-*")):
                assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
                time.sleep(0.002)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            helpers = [int(pid) for pid in children]
            assert len(helpers) == 2
            yield process, helpers
        finally:
            process.kill()


def test_a_killed_helper_ends_the_run_in_one_line_and_the_next_run_goes_on(
    large: Path, tmp_path: Path
) -> None:
    with running(large, tmp_path) as (process, helpers):
        os.kill(helpers[0], signal.SIGKILL)
        assert "a helper process was killed by signal 9" in ends_in_one_line(process, 2)
        assert all_gone(helpers, 10)
    assert not list(tmp_path.glob("*/manifest.json"))
    assert list(tmp_path.glob("*/receipt-*"))
    made = convert(large, tmp_path, ConversionSettings(rows_per_shard=4))
    assert not [problem for _, problem in verify(made) if problem]


def test_helpers_do_not_outlive_a_killed_parent(large: Path, tmp_path: Path) -> None:
    with running(large, tmp_path) as (process, helpers):
        process.kill()
        assert all_gone(helpers, 10)


def test_ctrl_c_ends_the_helpers_and_says_one_line(large: Path, tmp_path: Path) -> None:
    with running(large, tmp_path) as (process, helpers):
        process.send_signal(signal.SIGINT)
        assert "interrupted" in ends_in_one_line(process, 130)
        assert all_gone(helpers, 10)


def test_damage_found_by_a_helper_names_the_field_and_the_row(copy: Path, tmp_path: Path) -> None:
    with h5py.File(copy, "r+") as file:
        file["depths"].id.write_direct_chunk((7, 0, 0), b"not what zlib makes")
    with pytest.raises(UserError, match=r"depths row 7: .*damaged"):
        convert(copy, tmp_path / "out", SMALL)


def test_a_damaged_chunk_index_names_the_field_before_any_helper_reads_it(
    copy: Path, tmp_path: Path
) -> None:
    with h5py.File(copy, "r+") as file:
        depths = file["depths"]
        n_bytes = depths.id.get_chunk_info(0).size + 4 * int(np.prod(depths.chunks)) * 4 + 8192
        depths.id.write_direct_chunk((0, 0, 0), b"x" * n_bytes)
    with pytest.raises(UserError, match=r"depths row 0: a chunk claims "):
        convert(copy, tmp_path / "out", SMALL, 2)
    assert not list((tmp_path / "out").glob("*/manifest.json"))
