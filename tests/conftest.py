"""One small made-up set, converted once a session, for every test that only reads."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

pytest.register_assert_rewrite("helpers")  # before any of them is imported

from helpers.commands import REPO, Run
from helpers.sets import SMALL, convert

from convert.sample import write_sample

SHARED = REPO.parent / "shared"
# Tests that run side by side have the cores already: torch's threads would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's `&` ignores Ctrl-C, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# What is given to this make (PYTHON=..., ARGS=...) is not for those that tests start.
for name in re.findall(r"^([A-Z]+) \?=", (REPO / "Makefile").read_text(), re.M):
    os.environ.pop(name, None)
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "GNUMAKEFLAGS"):
    os.environ.pop(name, None)
# How long an example takes is the machine's affair, which may have other work.
hypothesis.settings.register_profile("usual", deadline=None)
hypothesis.settings.load_profile("usual")
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")


@pytest.fixture(scope="session")
def mat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 rows of 64x48 pictures in the real layout."""
    path = tmp_path_factory.mktemp("mat") / "rooms.mat"
    write_sample(path, 36, size_wh=(64, 48))
    return path


@pytest.fixture(scope="session")
def small_set(mat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(mat, tmp_path_factory.mktemp("root"), SMALL)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small are slower with a thread a core where the cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command() -> Run:
    """Run `python -m MODULE ARGS` as a user does."""

    def run(
        *args: object, cwd: Path = REPO, timeout: int = 120
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *map(str, args)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def shared(name: str) -> Path:
    """A file of the reference material beside the checkout; the test skips where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference material {name} is not beside this checkout")
    return path
