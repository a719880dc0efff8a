"""The API reference is made from docstrings: every public module is rendered, without a warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, needs_torch


def render(out: Path, *packages: str) -> str:
    """Render packages with all that is in them. Returns what was warned of, "" for nothing."""
    # h5py asks `uname` for the processor while it is imported; else pdoc holds it back and warns.
    env = {**os.environ, "PYTHONPATH": str(REPO), "PDOC_ALLOW_EXEC": "1"}
    command = [sys.executable, "-m", "pdoc", "--output-directory", str(out), *packages]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def public_modules(package: str) -> set[str]:
    """Their pages; `python -m` of a package has none, as importing it would run it."""
    paths = [path.relative_to(REPO) for path in (REPO / package).rglob("*.py")]
    modules = {
        path.parent if path.name == "__init__.py" else path.with_suffix("") for path in paths
    }
    return {f"{module}.html" for module in modules if module.name != "__main__"}


WITHOUT_TORCH = ["shards", "stores", "convert"]
WITH_TORCH = ["loader", "train"]


@pytest.mark.stress
@pytest.mark.parametrize(
    "packages", [WITHOUT_TORCH, pytest.param(WITH_TORCH, marks=needs_torch)], ids=",".join
)
def test_every_public_module_is_rendered_without_a_warning(
    packages: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("pdoc", reason="needs pdoc")
    assert render(tmp_path, *packages) == ""
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    for package in packages:
        assert public_modules(package) <= made
