"""What README and docs say to type works on a made-up .mat: Python, and what needs no Drive.

It is typed into a fresh shell, after the one line that README says to type first.

Where the pages lead to and what they list is in test_pages.py.
"""

import os
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPO, needs_torch
from helpers.commands import lend_the_packages, make

from convert.sample import write_sample

TORCH = find_spec("torch") is not None
MAT = "nyu_depth_v2_labeled.mat"
QUICK = {"train": ["--epochs", "1", "--size", "32", "--width", "8", "--batch-size", "8"]}
# A server, a Drive, pictures that nobody has here.
ELSEWHERE = re.compile(r"https?://|/machine|/drive/|photos|\.\.\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's clone: the .mat, and make's .venv."""
    path = tmp_path_factory.mktemp("user")
    lend_the_packages(path / ".venv", REPO)
    write_sample(path / MAT, 36, size_wh=(160, 120))
    type_in(path, "-m", "convert", "run", MAT, "--out", "data")
    return path


def first_line() -> str:
    """What README says to type first in every shell."""
    indented = re.findall(r"^    (\S.*)$", (REPO / "README.md").read_text(), re.M)
    at = next(k for k, line in enumerate(indented) if line.startswith("source "))
    own = [line for line in indented[:at] if not line.startswith(("git ", "make "))]
    assert own == [], "something is to be typed before it"
    return indented[at].partition(" #")[0].strip()


def in_a_fresh_shell(
    folder: Path, line: str, first: str | None = None
) -> subprocess.CompletedProcess[str]:
    """What a shell without any of our paths says to this line."""
    kept = ("PATH", "HOME", "TMPDIR", "LANG")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    command = ["bash", "-c", f"{first or first_line()}\n{line}"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def type_in(folder: Path, *words: str) -> None:
    done = in_a_fresh_shell(folder, shlex.join(["python", *words]))
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
WITH_COMMANDS = [
    "README.md",
    "docs/converting.md",
    pytest.param("docs/frames.md", marks=pytest.mark.stress),  # a minute
    "docs/moving-over.md",
    "docs/sunrgbd.md",
    "docs/zarr.md",
    TRAINING,
]
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


# ---------------------------------------------------------------- what programs print


@pytest.mark.parametrize(
    "typed",
    [
        f"python -m convert verify {MAT}",  # a .mat where a set is asked for
        "mkdir -p broken && cp -r data/nyuv2-* broken && truncate -s -9 broken/*/depth-00000.npy"
        " && python -m convert verify broken",
    ],
    ids=["a .mat", "a damaged set"],
)
def test_a_command_that_a_program_prints_works_in_the_same_shell(typed: str, folder: Path) -> None:
    refused = in_a_fresh_shell(folder, typed)
    assert refused.returncode == 2
    (printed,) = re.findall(r" Run: (python -m .*)$", refused.stderr.strip())
    done = in_a_fresh_shell(folder, printed)
    assert done.returncode == 0, f"{printed}\n{done.stderr}"


def test_make_prints_the_line_that_readme_says() -> None:
    assert make(REPO, "help").stdout.splitlines()[-1].endswith(first_line())


def test_the_line_of_a_read_only_checkout_works_anywhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    lend_the_packages(home / "nyuv2-shards" / ".venv")
    said = make(REPO, "help", "WRITABLE=", HOME=str(home)).stdout.splitlines()[-1]
    line = said.removeprefix("once a shell: ")
    done = in_a_fresh_shell(tmp_path, "python -m convert sample rooms.mat --rows 1", line)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rooms.mat").is_file()


def test_on_colab_no_line_is_needed_but_in_a_read_only_checkout() -> None:
    assert "once a shell" not in make(REPO, "help", COLAB_RELEASE_TAG="test").stdout
    read_only = make(REPO, "help", "WRITABLE=", COLAB_RELEASE_TAG="test").stdout
    assert f'export PYTHONPATH="{REPO}"' in read_only.splitlines()[-1]
