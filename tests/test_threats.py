"""What docs/threats.md says of strangers' files and addresses, where no other test file has it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Run
from helpers.servers import serving
from helpers.sets import content, entry_of, manifest_json, repack, write_manifest_json

from shards.addresses import without_secrets
from shards.dataset import open_set
from shards.errors import UserError, printable
from shards.files import log
from shards.manifest import PROVENANCE

# ------------------------------------------------------------------------------------ what is shown


def test_nothing_that_is_shown_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log("a \x1b[2J name\r\u202e of \x9b a stranger, naïve \N{SNOWMAN}\n\tand a line more")
    shown = capsys.readouterr().err
    assert shown == (
        "a \\x1b[2J name\\r\\u202e of \\x9b a stranger, naïve \N{SNOWMAN}\n\tand a line more\n"
    )
    assert printable(shown) == shown


def test_names_in_a_table_are_shown_as_escapes(tmp_path: Path, command: Run) -> None:
    pytest.importorskip("PIL", reason="needs pillow")
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    table = tmp_path / "rows.csv"
    table.write_text("rgb,depth\n\x1b[2Jx.png,\u202ey.png\n")
    done = command("convert", "run", table, "--out", tmp_path / "out", "--size", 8)
    assert done.returncode == 2
    assert "\\x1b[2Jx.png" in done.stderr
    assert "\x1b" not in done.stderr


# ------------------------------------------------------------------------------- addresses as secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a.mat", "https://host/a.mat"),
        ("https://me:word@host:8/a.mat", "https://host:8/a.mat"),
        ("https://host/a.mat?v=2&X-Amz-Signature=1", "https://host/a.mat?v=2&X-Amz-Signature=..."),
        (
            "at 'https://me@host/a?token=v' and s3://bucket/b",
            "at 'https://host/a?token=...' and s3://bucket/b",
        ),
        ("rgb=https://me:word@host/x", "rgb=https://host/x"),
        ("a/b@c?d", "a/b@c?d"),
    ],
)
def test_an_address_is_shown_without_what_gives_access(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_a_signed_address_is_neither_printed_nor_stored(
    mat: Path, tmp_path: Path, command: Run
) -> None:
    pytest.importorskip("fsspec", reason="needs fsspec")
    pytest.importorskip("aiohttp", reason="needs aiohttp")
    with serving(a_mat=mat.read_bytes()) as server:
        server.files["/a.mat?token=WORD"] = server.files["/a.mat"]
        out = tmp_path / "out"
        done = command("convert", "run", server.url("a.mat?token=WORD"), "--out", out, "--size", 16)
        assert done.returncode == 0, done.stderr
        lost = command("convert", "run", server.url("b.mat?token=WORD"), "--out", out, "--size", 16)
        assert lost.returncode == 2
        assert "/b.mat?token=... cannot be read" in lost.stderr
    assert "WORD" not in done.stderr + done.stdout + lost.stderr
    directory = Path(done.stdout.strip())
    assert not [name for name, data in content(directory).items() if b"WORD" in data]
    assert manifest_json(directory)["source"]["name"] == "a.mat"


# --------------------------------------------------------------------------------------- provenance


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[]", "5", '{"command": null, "seconds": {}}', '{"command": "a \'b"}', ""],
)
def test_whatever_says_how_a_set_was_made_it_is_read_and_can_be_mended(
    text: str, small_set: Path, tmp_path: Path, command: Run
) -> None:
    directory = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    (directory / PROVENANCE).write_text(text)
    seen = command("convert", "inspect", directory)
    assert seen.returncode == 0, seen.stderr
    assert "made: unknown" in seen.stdout
    (directory / "rgb-00001.npy").write_bytes(b"")
    wrong = command("convert", "verify", directory)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1), wrong.stderr
    assert "--repair" in wrong.stderr


# ------------------------------------------------------------------------------------ Zarr metadata


def wide(metadata: dict[str, Any]) -> None:
    """300 GB."""
    metadata["shape"][2:] = [100_000, 100_000]
    metadata["chunk_grid"]["configuration"]["chunk_shape"][2:] = [100_000, 100_000]
    metadata["codecs"][0]["configuration"]["chunk_shape"][2:] = [100_000, 100_000]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "wider": lambda metadata: metadata["shape"].__setitem__(3, 33),
    "fewer rows": lambda metadata: metadata["shape"].__setitem__(0, 5),
    "another type": lambda metadata: metadata.update(data_type="uint16"),
    "objects": lambda metadata: metadata.update(data_type="string"),
    "more than memory": wide,
    "unknown codec": lambda metadata: metadata.update(codecs=[{"name": "numcodecs.pickle"}]),
    "no array": lambda metadata: metadata.update(node_type="group"),
    "no metadata": lambda metadata: metadata.clear(),
}


@pytest.fixture(scope="module")
def packed(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repack(small_set, tmp_path_factory.mktemp("packed"), "zarr", "zstd")


@pytest.mark.parametrize("kind", CHANGES)
def test_metadata_of_another_array_are_refused_before_a_row_is_read(
    kind: str, packed: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(packed, tmp_path / packed.name))
    path = directory / "rgb/zarr.json"
    metadata = json.loads(path.read_text())
    CHANGES[kind](metadata)
    path.write_text(json.dumps(metadata))
    manifest = manifest_json(directory)
    manifest["metadata_files"]["rgb/zarr.json"] = entry_of(path)
    write_manifest_json(directory, manifest)
    found = open_set(directory)
    with pytest.raises(UserError, match="rgb is damaged"):
        found.shard("rgb", 0)
