"""A checkout stays clean: what make leaves in it is what .gitignore is meant to hide, and nothing
else.
"""

import os
import re
from pathlib import Path

import pytest
from conftest import needs_torch
from helpers.commands import REPO, git, git_copy_of_the_checkout, lend_the_packages, make

# All that may be left behind, as `git status --ignored` shows it.
HIDDEN = [
    r"\.venv/",
    r"(.+/)?__pycache__/",
    r"\.hypothesis/",  # examples that failed once
]
OF_THE_DEMO = [*HIDDEN, r"demo/"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the files of this one, whose .venv has what this Python has."""
    repo = git_copy_of_the_checkout(tmp_path / "clone")
    lend_the_packages(repo / ".venv")
    return repo


@pytest.fixture(scope="module")
def common_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for tests that leave it as it was."""
    repo = git_copy_of_the_checkout(tmp_path_factory.mktemp("common") / "clone")
    lend_the_packages(repo / ".venv")
    return repo


def left_behind(repo: Path) -> list[str]:
    """Every line of git's status; changed and unknown files are in it beside the ignored ones."""
    return git(repo, "status", "--porcelain", "--ignored").splitlines()


def not_meant(lines: list[str], hidden: list[str]) -> list[str]:
    expected = re.compile("!! (" + "|".join(hidden) + ")")
    return [line for line in lines if not expected.fullmatch(line)]


def test_after_make_test_the_working_tree_is_clean(checkout: Path) -> None:
    assert not_meant(left_behind(checkout), HIDDEN) == []
    done = make(checkout, "test", "ARGS=tests/test_order.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not_meant(left_behind(checkout), HIDDEN) == []


@pytest.mark.stress
@needs_torch
def test_after_make_demo_the_working_tree_is_clean_and_make_clean_takes_the_demo(
    checkout: Path,
) -> None:
    done = make(checkout, "demo", timeout_s=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "!! demo/" in left_behind(checkout)
    assert not_meant(left_behind(checkout), OF_THE_DEMO) == []
    assert make(checkout, "clean").returncode == 0
    assert not_meant(left_behind(checkout), HIDDEN) == []


def test_what_is_left_behind_is_seen(checkout: Path) -> None:
    (checkout / "nohup.out").touch()
    (checkout / "README.md").write_text("")
    (checkout / "demo").mkdir()
    (checkout / "demo" / "rooms.mat").touch()
    seen = not_meant(left_behind(checkout), HIDDEN)
    assert seen == [" M README.md", "?? nohup.out", "!! demo/"]


@pytest.mark.parametrize(
    "name",
    [
        "data/x.npy",
        "runs/x.pt",
        "demo/x.png",
        ".installed-colab",
        "docs/api/index.html",
        "build/x.py",
        "dist/x.whl",
    ],
)
def test_what_make_makes_is_hidden(name: str, common_checkout: Path) -> None:
    path = common_checkout / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        assert all(line.startswith("!! ") for line in left_behind(common_checkout))
    finally:
        path.unlink()


@pytest.mark.skipif(not os.path.exists(REPO / ".git"), reason="needs a checkout made by git")
def test_nothing_that_is_tracked_is_ignored() -> None:
    assert git(REPO, "ls-files", "--cached", "--ignored", "--exclude-standard") == ""
