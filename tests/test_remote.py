"""Fetching the .mat: resumed, retried, checked; and reading one in place."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO
from helpers.servers import serving
from helpers.sets import convert

from convert import transfer
from convert.sample import write_sample
from convert.transfer import fetch
from shards.errors import Busy, IncompleteDownload, UserError, WrongSource
from shards.spec import ConversionSettings
from stores import http as remote
from stores.http import READERS, Download, RemoteFile

DATA = os.urandom(3_000_000)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.002, 0.003))
    monkeypatch.setattr(remote, "RANGE_BYTES", 100_000)


def test_a_server_that_drops_connections_is_asked_again(tmp_path: Path) -> None:
    with serving(x_mat=DATA) as server:
        server.drop_after, server.drop_once = 40_000, True
        fetch(server.url("x.mat"), tmp_path / "x.mat")
        assert len(server.requests) == 1 + 2 * 30  # the probe, and each range twice
    assert (tmp_path / "x.mat").read_bytes() == DATA
    assert os.listdir(tmp_path) == ["x.mat"]


def test_a_later_run_goes_on_where_the_first_was_cut(tmp_path: Path) -> None:
    with serving(x_mat=DATA) as server:
        server.refuse_from = 2_000_000
        with pytest.raises(IncompleteDownload, match="What was fetched is kept"):
            fetch(server.url("x.mat"), tmp_path / "x.mat")
        assert not (tmp_path / "x.mat").exists()
        server.refuse_from, server.sent = len(DATA), 0
        fetch(server.url("x.mat"), tmp_path / "x.mat")
        assert server.sent <= 1_000_001 + 3 * 100_000
    assert (tmp_path / "x.mat").read_bytes() == DATA


def test_another_file_at_the_address_is_not_glued_to_the_old_part(tmp_path: Path) -> None:
    part = tmp_path / ".x.mat.00000000.part"
    part.write_bytes(b"of another version")
    with serving(x_mat=DATA) as server:
        fetch(server.url("x.mat"), tmp_path / "x.mat")
    assert (tmp_path / "x.mat").read_bytes() == DATA


def test_a_second_process_that_fetches_the_same_file_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "x.mat"
    with serving(x_mat=DATA) as server:
        first = Download(RemoteFile(server.url("x.mat")), path)
        with first.held():
            with pytest.raises(Busy, match=r"x\.mat is being fetched by another process"):
                fetch(server.url("x.mat"), path)
            first.fetch_rest(lambda _: None)
            assert first.finish().read_bytes() == DATA
        assert os.listdir(tmp_path) == ["x.mat"]
        fetch(server.url("x.mat"), path)
    assert path.read_bytes() == DATA


def test_ctrl_c_ends_a_fetch_from_a_server_that_says_nothing(tmp_path: Path) -> None:
    with serving(x_mat=DATA) as server:
        server.silent_after = 1  # only the probe is answered
        words = ["run", "--url", server.url("x.mat"), "--out", str(tmp_path / "data")]
        command = [sys.executable, "-m", "convert", *words]
        with subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True) as process:
            while len(server.requests) < 2:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)  # a request is waited for 30 s, and again
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.part"))


def test_busy_answers_are_tried_again(tmp_path: Path) -> None:
    with serving(x_mat=DATA) as server:
        server.fail_next = [503, 429, 500]
        fetch(server.url("x.mat"), tmp_path / "x.mat")
    assert (tmp_path / "x.mat").read_bytes() == DATA


@pytest.mark.parametrize("kind", ["host down", "not found", "web page", "always drops"])
def test_what_cannot_be_fetched_is_one_line_and_leaves_no_mat(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(x_mat=DATA) as server:
        url = {"host down": "http://127.0.0.1:9/x.mat", "not found": server.url("y.mat")}.get(
            kind, server.url("x.mat")
        )
        server.content_type = "text/html" if kind == "web page" else server.content_type
        server.drop_after = 0 if kind == "always drops" else None
        with pytest.raises(UserError) as error:
            fetch(url, tmp_path / "x.mat")
    assert "\n" not in str(error.value)
    assert "by hand" in capsys.readouterr().err
    assert not (tmp_path / "x.mat").exists()


def test_the_original_is_held_against_its_size_and_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(x_mat=DATA) as server:
        published = replace(transfer.NYU_DOWNLOAD, url=server.url("x.mat"))
        monkeypatch.setattr(transfer, "NYU_DOWNLOAD", published)
        with pytest.raises(WrongSource, match="SHA-256"):
            fetch(published.url, tmp_path / "x.mat")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- reading in place


def test_converting_from_a_url_gives_the_same_set_and_reads_only_what_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sample(tmp_path / "x.mat", 24)
    data = (tmp_path / "x.mat").read_bytes()
    settings = ConversionSettings(fields=("label",), size=64, rows_per_shard=8)
    expected = Path(convert(tmp_path / "x.mat", tmp_path / "local", settings))
    with serving(x_mat=data) as server:
        server.drop_after, server.drop_chance, server.drop_once = 20_000, 0.2, True
        server.fail_next = [503]
        source = RemoteFile(server.url("x.mat"))
        made = Path(convert(source, tmp_path / "remote", settings, workers=READERS))
    assert made.name == expected.name  # the same fingerprint: the same identity
    for path in expected.glob("*.npy"):
        assert (made / path.name).read_bytes() == path.read_bytes()
    # A small file: mostly its index, in blocks of 64 KB.
    assert source.n_bytes_read < 0.7 * len(data)
    assert "MB" in source.report()


def test_a_server_without_ranges_is_one_line(tmp_path: Path) -> None:
    with serving(x_mat=DATA) as server:
        server.ranges = False
        with pytest.raises(WrongSource, match=r"gives no ranges\. Fetch it whole, as with curl -O"):
            RemoteFile(server.url("x.mat"))


def test_a_server_that_is_down_is_one_line() -> None:
    with pytest.raises(WrongSource, match=r"cannot be read .*refused"):
        RemoteFile("http://127.0.0.1:9/x.mat")


def test_the_command_converts_from_a_url_and_says_what_it_read(
    mat: Path,
    small_set: Path,
    tmp_path: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    with serving(x_mat=mat.read_bytes()) as server:
        done = command(
            "convert",
            "run",
            server.url("x.mat"),
            "--out",
            tmp_path,
            "--size",
            32,
            "--rows-per-shard",
            10,
        )
    assert done.stdout == f"{tmp_path / small_set.name}\n", done.stderr
    assert "requests" in done.stderr
