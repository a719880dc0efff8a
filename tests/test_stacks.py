"""The stacks of users: lists of versions are what they say, tests say what they need, whose
warnings are errors.
"""

import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from conftest import REPO, needs_torch, shared
from helpers.commands import program
from packaging.requirements import Requirement
from packaging.version import Version

LISTS = sorted((REPO / "tests" / "stacks").glob("*.txt"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PACKAGES = {*PROJECT["tool"]["setuptools"]["packages"], "bench"}
# All that these test needs torch. Any other file runs where there is none, and skips single tests.
WHOLE_FILES_NEED_TORCH = {
    f"tests/test_{name}.py"
    for name in (
        "any_dataset",
        "any_source",
        "arguments",
        "augment",
        "bench_peers",
        "cache",
        "cache_faults",
        "data",
        "ddp",
        "forks",
        "frames_training",
        "gather",
        "inputs",
        "joined",
        "layout",
        "lite",
        "loader",
        "loop",
        "maps",
        "memory",
        "mistakes",
        "model",
        "notebook",
        "orders",
        "other_systems",
        "payload",
        "predict",
        "readahead",
        "recipe",
        "results",
        "resume",
        "signals",
        "sunrgbd_training",
        "targets",
        "tasks",
        "timm",
        "torch_habits",
        "training_progress",
        "unpack",
    )
}


@pytest.fixture(scope="module")
def stacks() -> ModuleType:
    """The program that runs them."""
    return program("stacks")


def pins(path: Path) -> dict[str, Version]:
    lines = [
        line.partition("==") for line in path.read_text().splitlines() if not line.startswith("#")
    ]
    return {name: Version(version) for name, _, version in lines}


# ---------------------------------------------------------------- versions


def test_the_lowest_stack_is_what_pyproject_allows() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["project"]["dependencies"] + [
        line for extra in extras.values() for line in extra
    ]
    floors = {r.name: Version(str(r.specifier).removeprefix(">=")) for r in map(Requirement, lines)}
    for linter in ("ruff", "mypy"):
        del floors[linter]
    assert pins(REPO / "tests" / "stacks" / "lowest.txt") == floors
    lowest_python = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert (
        (REPO / "tests" / "stacks" / "lowest.txt")
        .read_text()
        .startswith(f"# Python {lowest_python}\n")
    )


def test_colabs_stack_is_what_colab_publishes() -> None:
    published = shared("colab/pip-freeze.txt").read_text()
    assert (
        f"Python {(REPO / 'tests/stacks/colab.txt').read_text().split()[2]}."
        in shared("colab/os-info.txt").read_text()
    )
    found = dict(re.findall(r"^([\w-]+)==(\S+)$", published, re.M))
    found["torch"] = re.findall(r"/torch-([\d.]+)", published)[0]
    ours = pins(REPO / "tests" / "stacks" / "colab.txt")
    assert {name: str(version) for name, version in ours.items()} == {
        name: found[name] for name in ours
    }


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_a_stack_keeps_what_pyproject_asks_for(path: Path) -> None:
    assert re.match(r"# Python 3\.\d+\n", path.read_text())
    extras = PROJECT["project"]["optional-dependencies"].values()
    asked = map(
        Requirement,
        PROJECT["project"]["dependencies"] + [line for extra in extras for line in extra],
    )
    versions = pins(path)
    assert {"torch", "h5py", "numpy"} <= versions.keys()
    assert [r for r in asked if r.name in versions and versions[r.name] not in r.specifier] == []


def test_a_python_that_is_there_and_refuses_is_not_taken(
    tmp_path: Path, stacks: ModuleType
) -> None:
    shim = tmp_path / "python3.13"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    assert stacks.version_of(shim) is None
    assert stacks.version_of(tmp_path / "python3.14") is None
    assert stacks.version_of(sys.executable) == sys.version_info[:2]
    assert stacks.pythons()[sys.version_info[:2]]


def test_a_stack_on_another_python_says_so(stacks: ModuleType) -> None:
    assert stacks.choose_python((3, 13), {(3, 11): "a", (3, 13): "b"}) == ((3, 13), "")
    assert stacks.choose_python((3, 13), {(3, 11): "a", (3, 12): "b"}) == (
        (3, 12),
        "no Python 3.13 on this machine, run on 3.12 instead",
    )


def test_a_suite_that_dies_or_is_empty_is_a_failure(tmp_path: Path, stacks: ModuleType) -> None:
    for status in (-11, 5, 1):
        result = stacks.Result("x", "3.11")
        stacks.count(result, tmp_path / "no report", status)
        assert (result.passed, result.failed, str(status) in result.remark) == (0, 1, True)


# ---------------------------------------------------------------- what is not run again

VARIED = {"torch", "h5py", "numpy", "zarr", "numcodecs", "deflate", "fsspec", "matplotlib", "PIL"}


def test_a_stack_runs_all_but_the_list_unless_it_is_told_what(stacks: ModuleType) -> None:
    never = [f"--ignore={name}" for name in stacks.NOT_AGAIN]
    seldom = [f"--ignore={name}" for name in stacks.WITH_ALL]
    assert stacks.to_run([], True) == never
    assert stacks.to_run([], False) == [*never, *seldom]
    assert stacks.to_run(["tests/test_pages.py"], False) == ["tests/test_pages.py"]
    assert all((REPO / name).exists() for name in stacks.WITH_ALL)


def test_a_file_that_is_not_run_again_is_there_and_uses_nothing_that_the_stacks_vary(
    stacks: ModuleType,
) -> None:
    for name, reason in stacks.NOT_AGAIN.items():
        text = (REPO / name).read_text()
        imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
        assert imported & VARIED == set(), name
        assert "@pytest.mark.races" not in text, name  # those are repeated in every stack
        assert len(reason) > 10


# ---------------------------------------------------------------- what tests need

COLLECT = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-rs", "-m", "", *sys.argv[2:]]))
"""


def collected(absent: Sequence[str], without: Iterable[str]) -> tuple[set[str], dict[str, str]]:
    """Names of all tests but those of some files, and reasons by file that is skipped, where these
    packages are not installed.
    """
    ignored = [f"--ignore={name}" for name in without]
    command = [sys.executable, "-c", COLLECT, " ".join(absent), *ignored]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    skipped = dict(re.findall(r"^SKIPPED \[1\] (\S+?):\d+: (.*)$", done.stdout, re.M))
    return set(re.findall(r"^tests/\S+::.*$", done.stdout, re.M)), skipped


@needs_torch
@pytest.mark.stress  # the stacks themselves show it
def test_without_torch_every_test_is_collected_but_those_of_the_files_that_need_it() -> None:
    absent = (
        "torch",
        "torchmetrics",
        "xarray",
        "tensorstore",
        "mfusepy",
        "nbclient",
        "nbformat",
        "ipykernel",
    )
    every, _ = collected((), WHOLE_FILES_NEED_TORCH)
    without, skipped = collected(absent, ())
    assert skipped == dict.fromkeys(WHOLE_FILES_NEED_TORCH, "needs torch")
    assert without == every
    assert len(without) > 350


def test_a_file_that_is_skipped_whole_imports_what_needs_torch() -> None:
    use_it_elsewhere = {
        f"tests/test_{name}.py"  # in the commands that they start
        for name in (
            "cache_faults",
            "frames_training",
            "notebook",
            "other_systems",
            "results",
            "sunrgbd_training",
        )
    }
    for name in WHOLE_FILES_NEED_TORCH - use_it_elsewhere:
        assert re.search(r"^import torch$", (REPO / name).read_text(), re.M), name


# ---------------------------------------------------------------- warnings


def warn_in(module: str) -> None:
    exec("import warnings; warnings.warn('old')", {"__name__": module})


OURS = {*PACKAGES, *(f"{package}.x" for package in PACKAGES)}
OURS |= {path.stem for path in (REPO / "tests").glob("*.py")} | {"helpers.x", "__main__"}


@pytest.mark.parametrize("module", sorted(OURS))
def test_a_warning_in_a_module_of_ours_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="old"):
        warn_in(module)


@pytest.mark.parametrize(
    "module", ["matplotlib._mathtext", "torch.utils.data", "converter", "trainer.x", "a.convert"]
)
def test_a_warning_inside_another_package_is_not(module: str) -> None:
    with warnings.catch_warnings(record=True) as seen:  # keeps the filters of this suite
        warn_in(module)
    assert [str(w.message) for w in seen] in (["old"], [])


def test_our_code_is_warned_of_what_it_calls_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebodys.py").write_text(
        "import warnings\ndef old(): warnings.warn('old', DeprecationWarning, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import somebodys

    with pytest.raises(DeprecationWarning):
        somebodys.old()
