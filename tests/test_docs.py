"""What README and docs say to type works on a made-up .mat: Python, and what needs no Drive.

Where the pages lead to and what they list is in test_pages.py.
"""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPO, needs_torch

from convert.sample import write_sample

TORCH = find_spec("torch") is not None
MAT = "nyu_depth_v2_labeled.mat"
QUICK = {"train": ["--epochs", "1", "--size", "32", "--width", "8", "--batch-size", "8"]}
# A server, a Drive, pictures that nobody has here.
ELSEWHERE = re.compile(r"https?://|/machine|/drive/|photos|\.\.\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the .mat, and nothing else."""
    path = tmp_path_factory.mktemp("user")
    write_sample(path / MAT, 36, size_wh=(160, 120))
    type_in(path, "-m", "convert", "run", MAT, "--out", "data")
    return path


def type_in(folder: Path, *words: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{words}\n{done.stderr}"


def text_of(document: str, folder: Path) -> str:
    """The document, as if written on this machine for this set."""
    name = next(p.name for p in (folder / "data").glob("nyuv2-*") if p.suffix == "")
    return (
        (REPO / document)
        .read_text()
        .replace("nyuv2-224-feb52342", name)
        .replace("/content/", f"{folder}/")
    )


TRAINING = pytest.param("docs/training.md", marks=pytest.mark.stress)  # a minute
WITH_COMMANDS = ["README.md", "docs/converting.md", "docs/moving-over.md", "docs/zarr.md", TRAINING]
WITH_PYTHON = [
    "README.md",
    "docs/loading.md",
    "docs/moving-over.md",
    "docs/python.md",
    "docs/zarr.md",
]


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands_of_the_documents_work(document: str, folder: Path) -> None:
    typed = re.findall(
        r"^    (?:\$ )?python (-m (?:convert|train) .*)$", text_of(document, folder), re.M
    )
    here = [shlex.split(line, comments=True) for line in typed if not ELSEWHERE.search(line)]
    assert here
    possible = here if TORCH else [words for words in here if words[1] != "train"]
    for words in possible:
        type_in(folder, *words, *(QUICK.get(words[1], []) if "predict" not in words else []))
    if possible != here:
        pytest.skip(f"needs torch: the other {len(here) - len(possible)} of {len(here)} commands")


@needs_torch
@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_of_the_documents_works(document: str, folder: Path) -> None:
    text = text_of(document, folder).replace(f"{folder}/drive/MyDrive/", "")
    indented = re.findall(
        r"^(?:    (?:from train|import ).*\n)(?:    .*\n|\n(?=    ))*", text, re.M
    )
    fenced = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    lines = [
        line.removeprefix("    ") for block in [*indented, *fenced] for line in block.splitlines()
    ]
    code = "\n".join(line for line in lines if line[:1] != "!" and "your own module" not in line)
    if document == "docs/zarr.md":
        type_in(folder, "-m", "convert", "run", MAT, "--out", "data", "--format", "zarr")
    assert "import" in code
    type_in(folder, "-W", "ignore", "-c", code)
