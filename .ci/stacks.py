"""The tests on versions that users have: python .ci/stacks.py [--all] [NAME ...].

A stack is a file of pins, tests/stacks/NAME.txt, whose first line names its Python; its venv is
made anew in .stacks/. By default: the tests that need no torch, on the lowest versions that
pyproject.toml allows and on Colab's. --all: every stack, and each with torch too (NAME+torch). What
cannot be made says so in a line and is passed over; what runs on another Python than it should says
so. Ends with a table; the status is 1 where a test failed, or where a stack that was asked for by
name or by default could not be made.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
LISTS = REPO / "tests" / "stacks"
VENVS = REPO / ".stacks"
PREPARED = VENVS / "prepared.json"
NOT_MADE = "not made"
USUAL = ("lowest", "colab")
EXTRAS = ("fast", "show", "remote", "frames")
# Whose tests take long: of the stacks that run every test. Not s3: s3fs wants the fsspec of its own
# day, which is later than the lowest.
WITH_TORCH = ("cluster", "lite")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "setuptools")  # all that tests without torch need
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
LOWEST_PYTHON = (3, 11)
IN_PARALLEL = ("-n", "logical", "--maxprocesses", "4", "--dist", "worksteal")  # as make test
# Files whose outcome no version of a dependency can change, and why: `make test` has run them. They
# are left out of the stacks, but where --tests names them.
NOT_AGAIN = {
    "tests/test_api_reference.py": "docstrings, rendered by one tool",
    "tests/test_clean_tree.py": "what git and make leave in the working tree",
    "tests/test_docs.py": "texts of pages; what they type is in the tests of each command",
    "tests/test_errors.py": "texts of our errors, and the syntax tree of our sources",
    "tests/test_imports.py": "the syntax tree of our sources",
    "tests/test_make.py": "make, pip and venvs, with packages that hold nothing",
    "tests/test_pages.py": "links and trees of pages",
    "tests/test_release.py": "what setuptools packs, which pip fetches for itself",
}
# What versions hardly change, and what takes long: only --all runs these in each stack.
WITH_ALL = {
    "tests/test_bench_frames.py": "tables of a benchmark",
    "tests/test_bench_peers.py": "tables of a benchmark",
    "tests/test_cache_room.py": "sizes that are compared",
    "tests/test_command_lines.py": "how command lines are parsed",
    "tests/test_cut_session.py": "what is copied to a mount, and when",
    "tests/test_damage.py": "damaged sets, which our own code reads",
    "tests/test_frames_runs.py": "whole runs of the command, killed and continued",
    "tests/test_help.py": "texts of --help",
    "tests/test_kill.py": "runs that are killed and continued",
    "tests/test_layouts_bts.py": "names of files, and lists of them",
    "tests/test_layouts_nyu_raw.py": "names of files, and times in them",
    "tests/test_layouts_scannet.py": "names of files, and small texts",
    "tests/test_layouts_tum.py": "names of files, and times in lists",
    "tests/test_litter.py": "names of files",
    "tests/test_mounts.py": "types of file systems",
    "tests/test_opened_once.py": "how often a manifest is opened",
    "tests/test_parts.py": "processes that share the parts of a set",
    "tests/test_progress.py": "bars on terminals",
    "tests/test_roots.py": "paths in folders, archives and on servers",
    "tests/test_sample.py": "made-up rooms",
    "tests/test_session.py": "which copy of a set is taken",
    "tests/test_sunrgbd_split.py": "lists of rows",
    "tests/test_threats.py": "what files and sets of strangers may do",
    "tests/test_transfer.py": "copies to and from a mount that fails",
    "tests/test_versions.py": "how sets of earlier versions are brought up",
    "tests/test_wheel.py": "an order of numbers",
}
Version = tuple[int, int]


class CannotBeMade(Exception):
    """A stack that this machine cannot have, in one line."""


@dataclass
class Result:
    """One row of the table."""

    stack: str
    python: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    remark: str = ""


def parse(version: str) -> Version:
    major, minor = re.findall(r"\d+", version)
    return int(major), int(minor)


def version_of(python: str | Path) -> Version | None:
    """What this Python is, where it really runs: a shim of pyenv may be there and refuse."""
    code = "import sys, venv; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return parse(done.stdout) if done.returncode == 0 else None


def pythons() -> dict[Version, str]:
    """Every Python on this machine that is new enough, by version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(map(str, pyenv.glob("3.*/bin/python")))
    names = [f"python3.{minor}" for minor in range(LOWEST_PYTHON[1], 20)]
    found = {}
    for candidate in (*installed, *names, sys.executable):
        version = version_of(candidate)
        if version and version >= LOWEST_PYTHON:
            found[version] = candidate
    return found


def choose_python(wanted: Version, available: dict[Version, str]) -> tuple[Version, str]:
    """The version asked for, else the newest there is and a remark that says so."""
    if wanted in available:
        return wanted, ""
    instead = max(available)
    return instead, f"no Python {dotted(wanted)} on this machine, run on {dotted(instead)} instead"


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def requirements(with_torch: bool) -> list[str]:
    """What pyproject.toml asks for."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    chosen = (*EXTRAS, *WITH_TORCH) if with_torch else EXTRAS
    wanted = project["dependencies"] + [line for name in chosen for line in extras[name]]
    tools = (
        extras["dev"] if with_torch else [line for line in extras["dev"] if name_of(line) in TOOLS]
    )
    return [line for line in wanted + tools if with_torch or name_of(line) != "torch"]


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()  # type: ignore[index]


def make_venv(name: str, pins: Path, python: str, with_torch: bool) -> Path:
    """A venv with the stack's versions, made anew. Returns its Python. Raises CannotBeMade."""
    folder = VENVS / name
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    inside = folder / "bin" / "python"
    wheels = ["--extra-index-url", CPU_WHEELS] if with_torch else []
    command = [
        inside,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--only-binary",
        ":all:",
        *wheels,
        "-c",
        pins,
    ]
    done = subprocess.run([*command, *requirements(with_torch)], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise CannotBeMade(
            (errors or done.stderr.splitlines() or ["pip failed"])[0].removeprefix("ERROR: ")
        )
    return inside


def run_tests(python: Path, report: Path, arguments: list[str]) -> int:
    """pytest as a user of this stack would run it. Returns its status, negative where a signal
    ended it.
    """
    print("$", python, "-m pytest", *arguments, flush=True)
    command = [
        python,
        "-m",
        "pytest",
        *IN_PARALLEL,
        "-rs",
        f"--junitxml={report}",
        "-o",
        "junit_logging=no",
        *arguments,
    ]
    return subprocess.run(command, cwd=REPO).returncode


def count(result: Result, report: Path, status: int) -> None:
    """Add what pytest reported; a process that died leaves no report, and is a failure."""
    if status not in (0, 1) or not report.exists():
        result.failed += 1
        result.remark += f" pytest ended with status {status}"
        return
    suite = next(ElementTree.parse(report).iter("testsuite")).attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    result.passed += int(suite["tests"]) - failed - skipped
    result.failed += failed
    result.skipped += skipped


def to_run(tests: Sequence[str], with_all: bool) -> list[str]:
    """What pytest is given: the tests that were asked for, else all but NOT_AGAIN and WITH_ALL."""
    left_out = NOT_AGAIN if with_all else {**NOT_AGAIN, **WITH_ALL}
    return list(tests) or [f"--ignore={name}" for name in left_out]


def prepare(name: str, available: dict[Version, str]) -> Result:
    """The stack's venv, made anew; the remark says where another one was made, or none."""
    with_torch = name.endswith("+torch")
    pins = LISTS / f"{name.removesuffix('+torch')}.txt"
    first_line = pins.read_text().splitlines()[0]
    wanted = parse(first_line.removeprefix("# Python "))
    version, remark = choose_python(wanted, available)
    result = Result(name, dotted(version), remark=remark)
    try:
        make_venv(name, pins, available[version], with_torch)
    except CannotBeMade as error:
        result.remark = f"{NOT_MADE}: {error}"
    return result


def run_stack(result: Result, races: int, arguments: list[str]) -> None:
    """The counts of a stack that was prepared; its tests of races are repeated."""
    name = result.stack
    began = time.monotonic()
    print(f"\n{name}, Python {result.python} {result.remark}".rstrip(), flush=True)
    if result.remark.startswith(NOT_MADE):
        return
    python = VENVS / name / "bin" / "python"
    report = VENVS / f"{name}.xml"
    for more in [arguments, *([[*arguments, "-m", "races and not stress"]] * races)]:
        report.unlink(missing_ok=True)
        count(result, report, run_tests(python, report, more))
    result.seconds = time.monotonic() - began


def prepare_all(names: Sequence[str]) -> list[Result]:
    """Two at a time, as pip uses one core."""
    available = pythons()
    print(
        "Pythons:",
        *(f"{dotted(version)} ({path})" for version, path in sorted(available.items())),
        flush=True,
    )
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(prepare, names, repeat(available)))
    VENVS.mkdir(exist_ok=True)
    PREPARED.write_text(json.dumps([asdict(result) for result in results]))
    return results


def prepared(names: Sequence[str]) -> list[Result]:
    """Those that an earlier run with --prepare made."""
    results = [Result(**each) for each in json.loads(PREPARED.read_text())]
    assert [result.stack for result in results] == list(names)
    return results


HEADS = ("stack", "Python", "passed", "failed", "skipped", "seconds", "")
WIDTHS = (-18, -7, 7, 7, 8, 8, 0)  # negative: from the left


def table_line(cells: Sequence[object]) -> str:
    padded = []
    for cell, width in zip(cells, WIDTHS, strict=True):
        text = str(cell)
        padded.append(text.ljust(-width) if width <= 0 else text.rjust(width))
    return " ".join(padded).rstrip()


def show(results: list[Result]) -> None:
    print("\n" + table_line(HEADS))
    for result in results:
        counts = (result.passed, result.failed, result.skipped)
        seconds = f"{result.seconds:.0f}"
        print(table_line((result.stack, result.python, *counts, seconds, result.remark)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of a file in tests/stacks; NAME+torch: all tests"
    )
    parser.add_argument("--all", action="store_true", help="every stack, also with torch")
    parser.add_argument(
        "--races", type=int, default=5, help="how often the tests of races are repeated (5)"
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--prepare", action="store_true", help="make the venvs, and nothing else")
    steps.add_argument("--prepared", action="store_true", help="run in those that are made")
    parser.add_argument(
        "--tests",
        nargs="*",
        default=[],
        help="what to hand to pytest instead of all that are chosen",
    )
    args = parser.parse_args()
    every = sorted(path.stem for path in LISTS.glob("*.txt"))
    names = args.names or (
        [n + t for t in ("", "+torch") for n in every] if args.all else list(USUAL)
    )
    results = prepared(names) if args.prepared else prepare_all(names)
    if args.prepare:
        return 0
    arguments = to_run(args.tests, args.all)
    for result in results:
        run_stack(result, args.races, arguments)
    show(results)
    required = [r for r in results if not args.all]
    return int(any(r.failed for r in results) or any(not r.passed for r in required))


if __name__ == "__main__":
    sys.exit(main())
