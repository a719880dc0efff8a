"""Who imports whom: `train` only the format of `convert`, `convert` nothing of `train`, training no h5py."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

ALLOWED_IN_FORMAT = {"numpy", "zarr"}


def imported(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"{path.parent.name}." * bool(node.level) + (node.module or "")
            names |= {base.rstrip(".")} | {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((REPO / "train").glob("*.py")), ids=lambda p: p.name)
def test_train_imports_only_the_format_of_convert(path: Path) -> None:
    foreign = {n for n in imported(path) if n.split(".")[0] == "convert" and not n.startswith("convert.format")}
    assert foreign == set()
    assert "h5py" not in imported(path)


@pytest.mark.parametrize("path", sorted((REPO / "convert").glob("*.py")), ids=lambda p: p.name)
def test_convert_never_imports_train(path: Path) -> None:
    assert {n for n in imported(path) if n.split(".")[0] == "train"} == set()


def test_the_format_is_a_leaf() -> None:
    names = {n.split(".")[0] for n in imported(REPO / "convert" / "format.py")}
    assert names - set(sys.stdlib_module_names) <= ALLOWED_IN_FORMAT


@pytest.mark.parametrize(
    ("module", "absent"), [("train.data", "h5py"), ("convert.write", "torch"), ("train.loop", "h5py")]
)
def test_importing_it_does_not_load(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
