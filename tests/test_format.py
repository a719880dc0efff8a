"""docs/format.md is enough to read a set by: the reader in it reads the set of every version.

Sets that were made by each version are in fixtures/, for good; what this version makes of the same
rows is held to the last of them.
"""

import ast
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO
from helpers.sets import FIELDS, convert, flip, manifest_json, verify, write_manifest_json

from convert.sample import write_sample
from convert.upgrade import RENAMED_COLUMNS, upgrade
from shards.copy import codecs_of
from shards.dataset import open_set
from shards.manifest import COLUMNS, MANIFEST, MANIFEST_KEYS
from shards.spec import (
    FORMAT_VERSION,
    KINDS,
    NO_SCENE_TYPE,
    OF_EVERY_SET,
    OF_TABLES,
    SPLITS,
    ConversionSettings,
    DatasetSpec,
)

PAGE = REPO / "docs" / "format.md"
FIXTURES = REPO / "tests" / "fixtures"
SETS = sorted(path.parent for path in FIXTURES.glob(f"version-*/*/{MANIFEST}"))
NPY_SETS = [path for path in SETS if path.suffix == ""]
ZARR_SETS = [path for path in SETS if path.suffix == ".zarr"]
THIS_VERSION = FIXTURES / f"version-{FORMAT_VERSION}"

# How the sets of every version were made.
N_ROWS = 12
SETTINGS = ConversionSettings(size=8, rows_per_shard=5)
CODECS = "rgb=none,depth=zstd,raw_depth=blosc,label=zstd,instance=blosc"

ReadSet = Callable[
    [Path], tuple[dict[str, Any], dict[str, list[np.ndarray]], dict[str, np.ndarray]]
]


def name_of(path: Path) -> str:
    return path.relative_to(FIXTURES).as_posix()


@pytest.fixture(scope="module")
def code() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return block


@pytest.fixture(scope="module")
def read_set(code: str) -> ReadSet:
    """The page's reader."""
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    reader: ReadSet = names["read_set"]
    return reader


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The rows of the fixtures, converted now: by suffix, "" and ".zarr"."""
    root = tmp_path_factory.mktemp("made")
    mat = root / "rooms.mat"
    write_sample(mat, N_ROWS, size_wh=(64, 48))
    codecs = codecs_of("zarr", CODECS, FIELDS)
    return {"": convert(mat, root, SETTINGS), ".zarr": convert(mat, root, SETTINGS, codecs=codecs)}


# -------------------------------------------------------------------------------------- the reader


def test_there_is_a_fixture_of_every_version_in_both_containers() -> None:
    versions = {manifest_json(path)["format_version"] for path in SETS}
    assert versions == set(range(1, FORMAT_VERSION + 1))
    for version in versions:
        forms = {path.suffix for path in SETS if path.parent.name == f"version-{version}"}
        assert forms == {"", ".zarr"}


def test_the_reader_needs_numpy_and_the_standard_library_alone(code: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy"}


def assert_read_as_ours(read_set: ReadSet, path: Path, ours: Path) -> None:
    """The page's reader gives of `path` what shards.dataset gives of `ours`."""
    expected = open_set(ours)
    manifest, fields, columns = read_set(path)
    assert manifest["fingerprint"] == expected.manifest.fingerprint
    assert fields.keys() == expected.manifest.fields.keys()
    for name, shards in fields.items():
        assert [rows.tobytes() for rows in shards] == [
            rows.tobytes() for rows in expected.shards(name)
        ], name
        assert {rows.dtype for rows in shards} == {np.dtype(expected.field(name).dtype)}
    renamed = RENAMED_COLUMNS if manifest["format_version"] == 1 else {}
    assert columns
    for name, values in columns.items():
        theirs = expected.column(renamed.get(name, name))
        assert values.dtype.kind == theirs.dtype.kind, name
        np.testing.assert_array_equal(values, theirs)


@pytest.mark.parametrize("path", NPY_SETS, ids=name_of)
def test_the_reader_of_the_page_reads_the_set_of_every_version(
    path: Path, read_set: ReadSet, tmp_path: Path
) -> None:
    ours = Path(shutil.copytree(path, tmp_path / path.name))
    upgrade(ours)  # of a set of this version the manifest is read
    assert_read_as_ours(read_set, path, ours)


def test_the_reader_of_the_page_reads_a_set_made_now(
    read_set: ReadSet, made: dict[str, Path], small_set: Path
) -> None:
    assert_read_as_ours(read_set, made[""], made[""])
    assert_read_as_ours(read_set, small_set, small_set)
    assert read_set(made[""])[2].keys() == COLUMNS.keys()


@pytest.mark.parametrize("path", ZARR_SETS, ids=name_of)
def test_the_reader_of_the_page_refuses_what_it_cannot_read(path: Path, read_set: ReadSet) -> None:
    with pytest.raises(ValueError, match=r"\.npy"):
        read_set(path)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1])
def test_the_reader_of_the_page_refuses_other_versions(
    version: int, read_set: ReadSet, made: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made[""], tmp_path / "set"))
    write_manifest_json(copy, {**manifest_json(copy), "format_version": version})
    with pytest.raises(ValueError, match="version 1 and 2"):
        read_set(copy)


@pytest.mark.parametrize("file", [MANIFEST, "rows-split.npy", "rows-rgb_file-bytes.npy"])
def test_the_reader_of_the_page_checks_the_signature_and_the_columns(
    file: str, read_set: ReadSet, made: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made[""], tmp_path / "set"))
    flip(copy / file)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        read_set(copy)


# ------------------------------------------------------------------------------- the last fixture


@pytest.mark.parametrize("form", ["", ".zarr"])
def test_a_set_of_this_version_is_whole(form: str) -> None:
    (path,) = THIS_VERSION.glob(f"*-????????{form}")
    open_set(path)
    assert [name for name, problem in verify(path) if problem] == []


def arrays_of(path: Path) -> dict[str, bytes]:
    """The content of every shard and every column's array, by its file."""
    found = open_set(path).manifest
    files = [*found.column_files, *(name for shard in found.shards for name in shard.files)]
    return {name: (path / name).read_bytes() for name in files}


def test_the_same_rows_converted_now_have_the_bytes_of_the_fixture(made: dict[str, Path]) -> None:
    """The .mat differs with the version of h5py that wrote it, and the set's name with that."""
    (path,) = THIS_VERSION.glob("*-????????")
    assert arrays_of(made[""]) == arrays_of(path)


def test_the_same_rows_as_zarr_have_the_bytes_of_the_fixture_where_no_library_packs_them(
    made: dict[str, Path],
) -> None:
    """A compressor of another version may pack otherwise: those shards are compared unpacked."""
    (path,) = THIS_VERSION.glob("*.zarr")
    packed = tuple(
        f"{name}/" for name, codec in (open_set(path).codecs or {}).items() if codec != "none"
    )
    now, then = arrays_of(made[".zarr"]), arrays_of(path)
    assert now.keys() == then.keys()
    assert [name for name in now if now[name] != then[name] and not name.startswith(packed)] == []
    for name in FIELDS:
        shards = zip(open_set(made[".zarr"]).shards(name), open_set(path).shards(name), strict=True)
        assert all(np.array_equal(ours, theirs) for ours, theirs in shards)


def test_what_the_manifest_says_of_the_same_rows_is_what_the_fixture_says(
    made: dict[str, Path],
) -> None:
    (path,) = THIS_VERSION.glob("*-????????")
    now, then = manifest_json(made[""]), manifest_json(path)
    assert now.keys() == then.keys()
    assert [
        key for key in now if now[key] != then[key] and key not in ("source", "fingerprint")
    ] == []


# ------------------------------------------------------------------------------------ what it says


def first_cells(heading: str) -> set[str]:
    """What stands in the first column of the tables under a heading, the names in code alone."""
    section = PAGE.read_text().partition(f"# {heading}\n")[2]
    section = re.split(r"^#", section, flags=re.M)[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z0-9_]+)`", cell)}


def test_the_page_has_every_key_column_kind_and_number() -> None:
    found = manifest_json(NPY_SETS[-1])
    of_parts = {*OF_EVERY_SET, "axes", "kinds", *OF_TABLES}
    assert first_cells("manifest.json") == {*MANIFEST_KEYS, "sha256", *of_parts}
    assert first_cells("The dataset") == set(DatasetSpec.__dataclass_fields__)
    assert first_cells("Fields and statistics") == found["fields"]["rgb"].keys()
    assert first_cells("Shards and files") == found["shards"][0].keys()
    assert first_cells("Columns") == COLUMNS.keys()
    assert first_cells("Fields") == KINDS.keys()
    words = PAGE.read_text()
    assert ", ".join(f"{number} {name}" for number, name in enumerate(SPLITS)) in words
    assert str(NO_SCENE_TYPE) in words
