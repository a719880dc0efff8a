"""The Colab notebook runs from top to bottom in a fresh kernel, and again in the next session."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("torch", "nbclient", "ipykernel"):
    pytest.importorskip(needed, reason=f"needs {needed}")

import nbformat
from conftest import REPO
from helpers.commands import copy_of_the_checkout
from nbclient import NotebookClient

from convert.sample import write_sample

NOTEBOOK = REPO / "notebooks" / "colab.ipynb"
SETUP = """
class drive:
    flush_and_unmount = staticmethod(lambda: print("unmounted"))

DRIVE = {drive!r}
SETTINGS = "--size 64 --rows-per-shard 12"
TRAIN = "--num-classes 10 --epochs 2 --size 64 --width 8 --batch-size 8"
%cd {repo}
"""


def test_the_notebook_is_short_and_carries_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) <= 12
    code = [c for c in cells if c["cell_type"] == "code"]
    assert not [c for c in code if c["outputs"] or c["execution_count"]]
    assert "drive.mount" in "".join(code[0]["source"])


def test_the_readme_opens_the_notebook_in_colab() -> None:
    badge = "https://colab.research.google.com/github/OWNER/nyuv2-shards/blob/main/notebooks/colab.ipynb"
    assert badge in (REPO / "README.md").read_text()


def run(repo: Path, drive: Path) -> str:
    """Execute the notebook in a fresh kernel, with a local folder as Drive. Returns all the text it
    printed.
    """
    book = nbformat.read(NOTEBOOK, 4)
    setup = next(c for c in book.cells if "setup" in c.metadata.get("tags", ()))
    setup.source = SETUP.format(drive=str(drive), repo=repo)
    NotebookClient(
        book, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(repo)}}
    ).execute()
    outputs: list[Any] = [o for c in book.cells for o in c.get("outputs", ())]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(images) == 4
    return "".join(o["text"] for o in outputs if o["output_type"] == "stream")


def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("COLAB_RELEASE_TAG", "test")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    repo, drive = copy_of_the_checkout(tmp_path / "my repo"), tmp_path / "My Drive" / "nyuv2"
    drive.parent.mkdir()
    write_sample(drive.parent / "nyu_depth_v2_labeled.mat", 36, size_wh=(160, 120))
    return repo, drive


@pytest.mark.filterwarnings("ignore")  # of the kernel's client, not ours
def test_the_notebook_runs_from_a_fresh_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run(*session(tmp_path, monkeypatch))
    assert "converting" in text
    assert "gets a copy" in text
    assert len(text) < 30_000  # what the cells show does not flood


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore")
def test_the_next_session_needs_only_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, drive = session(tmp_path, monkeypatch)
    run(repo, drive)
    for name in ("data", "runs", "rooms.png", "my_network.py"):  # the machine is gone
        path = repo / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (drive.parent / "nyu_depth_v2_labeled.mat").unlink()
    assert "pulled and verified" in run(repo, drive)
