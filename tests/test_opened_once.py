"""A set is found, checked and opened once a run: its manifest is opened once, whatever was asked
for. Python's own audit events count, in a real run of the command.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPO, needs_torch
from helpers.sets import copied

from shards.manifest import MANIFEST

COUNTING = """
import json, sys

opened = []

def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith("manifest.json"):
        opened.append(str(arguments[0]))

sys.addaudithook(note)
sys.argv[0] = "-c"
from {package}.__main__ import main
status = main(sys.argv[1:])
print(json.dumps([status, opened]))
"""
SETTINGS = ("--size", 32, "--rows-per-shard", 10)
TRAINING = ("--epochs", 1, "--size", 32, "--batch-size", 8, "--width", 2, "--num-workers", 0)


def manifests_opened(package: str, *words: object) -> dict[str, int]:
    """Folder of a set -> how often its manifest was opened by `python -m PACKAGE WORDS`."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTING.format(package=package), *map(str, words)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    status, opened = json.loads(done.stdout.splitlines()[-1])
    assert status == 0, done.stderr
    return Counter(path.removesuffix(f"/{MANIFEST}") for path in opened)


@pytest.fixture
def found(small_set: Path, tmp_path: Path) -> Path:
    return copied(small_set, tmp_path / "data" / small_set.name)


@pytest.mark.parametrize("more", [(), ("--repair",)], ids=["again", "repair"])
def test_a_conversion_of_what_is_there_reads_its_manifest_once(
    mat: Path, found: Path, more: tuple[str, ...]
) -> None:
    opened = manifests_opened("convert", "run", mat, "--out", found.parent, *SETTINGS, *more)
    assert opened == {str(found): 1}


def test_so_does_one_whose_source_is_gone(mat: Path, found: Path) -> None:
    gone = found.parent / mat.name
    opened = manifests_opened("convert", "run", gone, "--out", found.parent, *SETTINGS)
    assert opened == {str(found): 1}


def test_a_copy_into_another_container_reads_the_sets_manifest_once(
    found: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    opened = manifests_opened("convert", "run", found, "--out", out, "--format", "zarr")
    assert opened[str(found)] == 1


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_looking_at_a_set_reads_its_manifest_once(found: Path, verb: str) -> None:
    assert manifests_opened("convert", verb, found) == {str(found): 1}


@pytest.mark.stress
@needs_torch
def test_a_training_reads_its_manifest_once_and_so_does_predicting_with_several_runs(
    found: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained = manifests_opened("train", "--data", found, "--out", run, *TRAINING)
    predicted = manifests_opened("train", "predict", run, run)
    assert trained == predicted == {str(found): 1}
