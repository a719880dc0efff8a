"""What a release is made of: everything that runs, its licence and its changes, and no data."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPO
from helpers.commands import program
from packaging.version import Version

PACKAGES = ("shards", "loader", "stores", "convert", "train")
FROM_THE_SDIST = (
    "test_room.py",
    "test_versions.py::test_the_new_columns_say_what_the_old_ones_said",
    "test_pages.py::test_every_relative_link_leads_somewhere",
    "test_pages.py::test_the_tree_of_the_readme_is_the_house",
)
CAN_BUILD = Version(version("setuptools")) >= Version("77.0.3")
LITTER = (
    "data/set/rgb-00000.npy",
    "runs/scene/last.pt",
    "docs/api/index.html",
    "tests/__pycache__/test_x.cpython-311.pyc",
    ".venv/installed",
    "stray.py",
)
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools changes sys.argv
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


@pytest.fixture(scope="module")
def check_dist() -> ModuleType:
    """The program that looks into both."""
    return program("check_dist")


def run_check(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPO / ".ci" / "check_dist.py", folder, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def dist(check_dist: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist and wheel of this checkout, built from a copy in which a user's data lies about."""
    if not CAN_BUILD:
        pytest.skip("needs setuptools 77.0.3 or newer (pip fetches one where it builds)")
    clone = tmp_path_factory.mktemp("clone")
    for folder in (*PACKAGES, *check_dist.FOLDERS):
        no_caches = shutil.ignore_patterns("__pycache__", "api")
        shutil.copytree(REPO / folder, clone / folder, ignore=no_caches)
    for name in check_dist.TOP:
        shutil.copy(REPO / name, clone)
    for litter in LITTER:
        (clone / litter).parent.mkdir(parents=True, exist_ok=True)
        (clone / litter).write_text("")

    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-c", BUILD, out]
    # What a test or torch put into the environment (SETUPTOOLS_USE_DISTUTILS) changes no release.
    names = ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV")
    env = {name: os.environ[name] for name in names if name in os.environ}
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SetuptoolsDeprecationWarning" not in done.stderr
    return out


def test_a_release_of_this_checkout_is_whole_and_has_nothing_else(dist: Path) -> None:
    done = run_check(dist)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing is missing" in done.stdout


@pytest.mark.parametrize(
    "name", ["train/py.typed", "convert/sources/nyu_tables.json", "shards/errors.py"]
)
def test_what_is_missing_in_a_wheel_is_named(name: str, dist: Path, tmp_path: Path) -> None:
    (whole,) = dist.glob("*.whl")
    shutil.copy(next(dist.glob("*.tar.gz")), tmp_path)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / whole.name, "w") as new:
        for info in old.infolist():
            if info.filename != name:
                new.writestr(info, old.read(info))

    done = run_check(tmp_path)
    assert (done.returncode, done.stderr) == (1, f"{whole.name} has no {name}\n")


@pytest.mark.parametrize(
    "name", ["tests/test_x.py", "data/x.txt", "docs/x.png", "train/rows.npy", "runs/scene/x.txt"]
)
def test_what_is_too_much_in_an_sdist_is_named(name: str, dist: Path, tmp_path: Path) -> None:
    (whole,) = dist.glob("*.tar.gz")
    shutil.copy(next(dist.glob("*.whl")), tmp_path)
    with tarfile.open(whole) as old, tarfile.open(tmp_path / whole.name, "w:gz") as new:
        for member in old.getmembers():
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
        new.addfile(tarfile.TarInfo(f"{whole.name.removesuffix('.tar.gz')}/{name}"))

    done = run_check(tmp_path)
    expected = f"{whole.name} has {name}, which is no part of the checkout\n"
    assert (done.returncode, done.stderr) == (1, expected)


@pytest.mark.parametrize("name", ["train/rows.npy", "train/x.png", "convert/x.mat"])
def test_what_is_too_much_in_a_wheel_is_named(name: str, dist: Path, tmp_path: Path) -> None:
    (whole,) = dist.glob("*.whl")
    shutil.copy(next(dist.glob("*.tar.gz")), tmp_path)
    shutil.copy(whole, tmp_path)
    with zipfile.ZipFile(tmp_path / whole.name, "a") as file:
        file.writestr(name, "")

    done = run_check(tmp_path)
    expected = f"{whole.name} has {name}, which is no part of the program\n"
    assert (done.returncode, done.stderr) == (1, expected)


def test_a_wheel_has_what_runs_and_no_tests(dist: Path, check_dist: ModuleType) -> None:
    (wheel,) = dist.glob("*.whl")
    names = check_dist.files_of_wheel(wheel)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= names.keys()
    assert "convert/sources/nyu_tables.json" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_licence_is_said_by_its_spdx_name(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = file.read(name).decode()
    assert re.findall(r"^License-(?:Expression|File): (.*)$", metadata, re.M) == ["MIT", "LICENSE"]


def test_the_tests_run_from_the_unpacked_sdist(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    tests = [f"tests/{name}" for name in FROM_THE_SDIST]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", *tests]
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=usual, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_a_wheel_installs_nothing_beside_the_packages(check_dist: ModuleType) -> None:
    names = ["convert/__init__.py", "x-1.dist-info/RECORD", "helpers/__init__.py", "stray.py"]
    assert list(check_dist.strangers(names)) == [
        "the wheel would install helpers at the top",
        "the wheel would install stray.py at the top",
    ]


def test_two_releases_in_one_folder_are_refused(dist: Path, tmp_path: Path) -> None:
    for path in dist.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "another-0.0.1.tar.gz").touch()
    done = run_check(tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "2 files *.tar.gz, and should have one" in done.stderr


def test_a_tag_is_the_version_and_its_changes_are_written_down(check_dist: ModuleType) -> None:
    changes = "# Changelog\n\n## Unreleased\n\n## 1.2.3 (2026-01-01)\n"
    assert list(check_dist.problems_of_tag("v1.2.3", "1.2.3", changes)) == []
    assert list(check_dist.problems_of_tag("1.2.3", "1.2.3", changes)) == [
        "the tag is 1.2.3, pyproject.toml says v1.2.3"
    ]
    assert list(check_dist.problems_of_tag("v1.2.4", "1.2.4", changes)) == [
        "CHANGELOG.md has no section '## 1.2.4'"
    ]


def test_the_changelog_has_a_section_of_what_comes_and_of_this_version(
    check_dist: ModuleType,
) -> None:
    sections = re.findall(r"^## (\S+)", (REPO / "CHANGELOG.md").read_text(), re.M)
    assert sections[:2] == ["Unreleased", check_dist.VERSION] or sections[0] == check_dist.VERSION


def test_the_hooks_before_a_commit_have_the_linter_that_make_lint_has() -> None:
    hooks = (REPO / ".pre-commit-config.yaml").read_text()
    (of_hook,) = re.findall(r"astral-sh/ruff-pre-commit\n +rev: v(\S+)", hooks)
    (of_make,) = re.findall(r"^ruff==(\S+)$", (REPO / "constraints.txt").read_text(), re.M)
    assert of_hook == of_make
