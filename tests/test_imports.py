"""Who imports whom: `loader` nobody, `train` it and `shards.format`, `drive` only `convert`, `convert` none of them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO, needs_torch

OURS = {"convert", "drive", "loader", "train", "rooms", "pictures", "bench"}
MOUNT = {f"stores.mounted.{name}" for name in ("Mirror", "copy_file", "refuse_remote")}
ALLOWED_IN_FORMAT = {"numpy", "zarr"}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of everything that is imported, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def imported(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text()), path.parent.name))


def foreign(path: Path) -> set[str]:
    """Our other packages that a file imports from."""
    return {n.split(".")[0] for n in imported(path)} & OURS - {path.parent.name}


def files(package: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", sorted((REPO / package).glob("*.py")), ids=lambda p: p.name)


@files("train")
def test_train_imports_only_the_format_and_the_lock_of_convert(path: Path) -> None:
    of_convert = {n for n in imported(path) if n.split(".")[0] == "convert" and not n.startswith("shards.format")}
    allowed = (
        {"convert"} if path.name == "__init__.py" else {"shards.lock", "shards.lock.hold"}
    )  # its check of the machine
    assert of_convert <= allowed
    assert foreign(path) <= {"convert", "loader", "drive", "pictures"}
    assert {n for n in imported(path) if n.startswith("drive.")} <= {"stores.mounted", *MOUNT}
    assert "h5py" not in imported(path)


@files("loader")
def test_the_loader_knows_nothing_of_this_dataset(path: Path) -> None:
    assert foreign(path) == set()
    names = {n.split(".")[0] for n in imported(path)} - {"loader"}
    assert names - set(sys.stdlib_module_names) <= {"numpy", "torch"}


@files("drive")
def test_drive_imports_only_convert(path: Path) -> None:
    assert foreign(path) <= {"convert"}
    if path.name == "mount.py":  # training imports it
        assert {n for n in imported(path) if n.startswith("convert.") and not n.startswith("shards.format")} == set()


@files("convert")
def test_convert_imports_neither_train_nor_drive_but_inside_its_commands(path: Path) -> None:
    in_commands = {"drive", "rooms", "pictures"} if path.name == "__main__.py" else set()
    assert foreign(path) <= in_commands
    top = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.FunctionDef)]
    assert {n.split(".")[0] for n in imports(ast.Module(top, []), "convert")} & OURS <= {"convert"}


def test_the_format_is_a_leaf() -> None:
    names = {n.split(".")[0] for n in imported(REPO / "convert" / "format.py")}
    assert names - set(sys.stdlib_module_names) <= ALLOWED_IN_FORMAT


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        pytest.param("train.data", "h5py", marks=needs_torch),
        pytest.param("train.loop", "h5py", marks=needs_torch),
        pytest.param("loader.loader", "train", marks=needs_torch),
        ("convert.pipeline", "torch"),
        ("convert.__main__", "h5py"),
    ],
)
def test_importing_it_does_not_load(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
