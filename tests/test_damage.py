"""Whatever happens to a set's files is found, named with the command that mends it, and mended by
that command.
"""

import io
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO, SMALL
from helpers.commands import Run
from helpers.sets import convert, entry_of, manifest_json, write_manifest_json

from convert.__main__ import read_set
from convert.next_command import with_next_command
from convert.sources.opening import SourceOptions
from convert.verify import OtherRows, against, verify_all
from shards.containers import npy_header
from shards.dataset import open_set
from shards.errors import UserError
from shards.manifest import MANIFEST, PROVENANCE
from shards.spec import NO_SCENE_TYPE

Damage = Callable[[Path, random.Random], Path]


def a_file(directory: Path, rng: random.Random) -> Path:
    """Any file of the set, the manifest as often as four others together."""
    files = sorted(p for p in directory.iterdir() if p.name not in (PROVENANCE, MANIFEST))
    return rng.choice([*files, *[directory / MANIFEST] * 4])


def flip(directory: Path, rng: random.Random) -> Path:
    path = a_file(directory, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path


def shorten(directory: Path, rng: random.Random) -> Path:
    path = a_file(directory, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return path


def lengthen(directory: Path, rng: random.Random) -> Path:
    path = a_file(directory, rng)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 300)))
    return path


def overwrite(directory: Path, rng: random.Random) -> Path:
    """A block of zeros, or of noise, as a bad disk or a lost page leaves it."""
    path = a_file(directory, rng)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    block = (bytes if rng.random() < 0.5 else rng.randbytes)(min(512, len(data) - start))
    changed = data[:start] + block + data[start + len(block) :]
    path.write_bytes(changed if changed != data else changed[:-1])
    return path


def remove(directory: Path, rng: random.Random) -> Path:
    path = a_file(directory, rng)
    path.unlink()
    return path


def rename(directory: Path, rng: random.Random) -> Path:
    path = a_file(directory, rng)
    path.rename(path.with_name(f"{path.stem} ({rng.randint(1, 9)}){path.suffix}"))
    return path


def swap(directory: Path, rng: random.Random) -> Path:
    shards = [p for p in sorted(directory.glob("*-0*.npy")) if not p.name.endswith("3.npy")]
    first = rng.choice(shards)
    same = [
        p
        for p in shards
        if p.stat().st_size == first.stat().st_size and p.read_bytes() != first.read_bytes()
    ]
    second = rng.choice(same)
    first.rename(directory / "t")
    second.rename(first)
    (directory / "t").rename(second)
    return first


def add(directory: Path, rng: random.Random) -> Path:
    path = directory / rng.choice(
        ["rgb-00009.npy", "notes.txt", ".rgb-00000.npy.7.tmp", "manifest.json.bak", "a b.npy"]
    )
    path.write_bytes(rng.randbytes(rng.randint(0, 99)))
    return path


def link(directory: Path, rng: random.Random) -> Path:
    """The right bytes, but elsewhere."""
    path = a_file(directory, rng)
    shutil.move(path, directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")
    return path


def older(directory: Path, rng: random.Random) -> Path:
    """A byte of depth that only the hash can tell: one millimetre more in one pixel."""
    path = rng.choice(sorted(directory.glob("depth-*.npy")))
    rows = np.lib.format.open_memmap(path, mode="r+")
    rows[0, rng.randrange(32), rng.randrange(32)] += 1
    rows.flush()
    return path


DAMAGES: list[Damage] = [
    flip,
    flip,
    flip,
    shorten,
    lengthen,
    overwrite,
    remove,
    rename,
    swap,
    add,
    link,
    older,
]


def untouched(directory: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.glob("*.npy")}


def damage_and_mend(mat: Path, small_set: Path, root: Path, n: int, mend_every: int) -> int:
    """Returns how many of `n` random damages verify named. Some are mended: only what was wrong is
    written again.
    """
    rng, n_found = random.Random(n), 0
    right = {p.name: p.read_bytes() for p in small_set.iterdir() if p.name != PROVENANCE}
    for k in range(n):
        directory = Path(shutil.copytree(small_set, root / f"{k}" / small_set.name))
        before = untouched(directory)
        path = DAMAGES[k % len(DAMAGES)](directory, rng)
        with pytest.raises(UserError) as error:
            verify_all(read_set(directory))
        message = with_next_command(error.value, "make verify")
        assert "\n" not in message
        assert "Run: " in message
        n_found += path.name in message
        if k % mend_every == 0:
            for foreign in {p.name for p in directory.iterdir()} - set(right) - {PROVENANCE}:
                (directory / foreign).unlink()
            wrong = {p for p, data in right.items() if not is_plain_with(directory / p, data)}
            assert convert(mat, directory.parent, SMALL, repair=True) == directory
            assert verify_all(read_set(directory)) == len(right) - 1
            assert {
                p.name: p.read_bytes() for p in directory.iterdir() if p.name != PROVENANCE
            } == right
            after = untouched(directory)
            assert {name for name in before if after[name] != before[name]} <= wrong
        shutil.rmtree(directory.parent)
    return n_found


def is_plain_with(path: Path, data: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == data


def test_every_damage_is_found_and_named_and_mended(
    mat: Path, small_set: Path, tmp_path: Path
) -> None:
    assert damage_and_mend(mat, small_set, tmp_path, 48, 5) == 48


@pytest.mark.stress
def test_1000_of_1000_random_damages_are_found(mat: Path, small_set: Path, tmp_path: Path) -> None:
    n_found = damage_and_mend(mat, small_set, tmp_path, 1000, 5)
    print(f"{n_found} of 1000 found")
    assert n_found == 1000


def test_the_command_that_verify_names_mends_the_set(
    mat: Path, small_set: Path, tmp_path: Path, command: Run
) -> None:
    directory = Path(shutil.copytree(small_set, tmp_path / "a root" / small_set.name))
    (directory / "notes.txt").write_text("")
    os.truncate(directory / "rgb-00002.npy", 300)
    wrong = command("convert", "verify", directory)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    mend = wrong.stderr.partition("Run: ")[2].replace("python ", f"{shlex.quote(sys.executable)} ")
    mended = subprocess.run(["sh", "-c", mend], cwd=REPO, capture_output=True, text=True)
    assert mended.returncode == 0, mended.stderr
    assert verify_all(read_set(directory))
    again = command(
        "convert",
        "run",
        mat,
        "--out",
        directory.parent,
        "--size",
        32,
        "--rows-per-shard",
        10,
        "--repair",
    )
    assert "nothing to do" in again.stderr


def test_verify_against_finds_what_its_own_hashes_cannot(
    mat: Path, small_set: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    assert against(open_set(directory), mat, SourceOptions(), 36) == 36
    path = older(directory, random.Random(0))
    manifest = manifest_json(directory)
    for shard in manifest["shards"]:
        if path.name in shard["files"]:
            shard["files"][path.name] = entry_of(path)
    write_manifest_json(directory, manifest)
    verify_all(read_set(directory))
    with pytest.raises(UserError, match=f"{path.name}: row .* is not what"):
        against(open_set(directory), mat, SourceOptions(), 36)


def changed_column(directory: Path, array: str, row: int, value: object) -> Path:
    """Another value in one array of a column, and the manifest signed again: every hash is right."""
    path = directory / f"{array}.npy"
    values = np.load(path)
    values[row] = value
    np.save(path, values)
    manifest = manifest_json(directory)
    manifest["column_files"][path.name] = entry_of(path)
    write_manifest_json(directory, manifest)
    return directory


def changed_names(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Other names in a manifest that is signed again."""
    manifest = manifest_json(directory)
    change(manifest)
    write_manifest_json(directory, manifest)
    return directory


def rename_scene(manifest: dict[str, Any]) -> None:
    manifest["scenes"][0] = "attic_0001"


def rename_scene_types(manifest: dict[str, Any]) -> None:
    types = manifest["dataset"]["scene_types"]
    first, second = types.index("bedroom"), types.index("kitchen")
    types[first], types[second] = "kitchen", "bedroom"


def rename_label(manifest: dict[str, Any]) -> None:
    manifest["dataset"]["label_names"][4] = "sofa of another"


# What is changed, and what of it the line says. Of a text the first letter of the first row's.
CHANGED_COLUMNS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "floats": (
        lambda d: changed_column(d, "rows-accel", 7, 0.5),
        r"column accel, row 7, says \[0.5, 0.5, 0.5, 0.5\], \S+rooms.mat says \[",
    ),
    "NaN": (
        lambda d: changed_column(d, "rows-camera", 7, np.nan),
        r"column camera, row 7, says \[nan, nan, nan, nan\], \S+rooms.mat says \[0.8",
    ),
    "integers": (
        lambda d: changed_column(d, "rows-row", 35, 3),
        r"column row, row 35, says 3, \S+rooms.mat says 35\.",
    ),
    "status": (
        lambda d: changed_column(d, "rows-status", 2, 1),
        r"column status, row 2, says 1, \S+rooms.mat says 0\.",
    ),
    "text": (
        lambda d: changed_column(d, "rows-rgb_file-bytes", 0, ord("#")),
        r"column rgb_file, row 0, says '#\S+', \S+rooms.mat says '[^#]\S+'\.",
    ),
    "split": (
        lambda d: changed_column(d, "rows-split", 3, 2),
        r"column split, row 3, says 'val', \S+rooms.mat says '(train|test)'\.",
    ),
    "scene type": (
        lambda d: changed_column(d, "rows-scene_type", 5, NO_SCENE_TYPE),
        r"column scene_type, row 5, says no type, \S+rooms.mat says '\w+'\.",
    ),
    "scene types' names": (
        lambda d: changed_names(d, rename_scene_types),
        r"column scene_type, row \d+, says '(bedroom|kitchen)', \S+rooms.mat says '(?!\1)",
    ),
    "scenes' names": (
        lambda d: changed_names(d, rename_scene),
        r"column scene, row \d+, says 'attic_0001', \S+rooms.mat says '\w+'\.",
    ),
    "label names": (
        lambda d: changed_names(d, rename_label),
        r"the name of label 5 says 'sofa of another', \S+rooms.mat says '[^']+'\.",
    ),
}


@pytest.mark.parametrize("kind", CHANGED_COLUMNS)
def test_verify_against_names_a_column_that_was_changed_and_signed_again(
    kind: str, mat: Path, small_set: Path, tmp_path: Path
) -> None:
    change, line = CHANGED_COLUMNS[kind]
    directory = change(Path(shutil.copytree(small_set, tmp_path / small_set.name)))
    verify_all(read_set(directory))
    with pytest.raises(OtherRows, match=line):
        against(open_set(directory), mat, SourceOptions(), 1)


def test_verify_against_ends_with_the_first_difference_in_one_line_and_status_2(
    mat: Path, small_set: Path, tmp_path: Path, command: Run
) -> None:
    directory = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    scene = np.load(directory / "rows-scene.npy")
    names = manifest_json(directory)["scenes"]
    row = int(np.flatnonzero(scene != scene[0])[0])
    changed_column(directory, "rows-scene", row, scene[0])
    changed_column(directory, "rows-row", 35, 3)
    done = command("convert", "verify", directory, "--against", mat)
    says = f"column scene, row {row}, says '{names[scene[0]]}', {mat} says '{names[scene[row]]}'"
    assert done.returncode == 2
    assert f"{directory}: {says}. Give the flags that the set was made with" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_against_takes_scenes_by_name_whatever_their_numbers(
    mat: Path, small_set: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    scene = np.load(directory / "rows-scene.npy")
    names = manifest_json(directory)["scenes"]
    np.save(directory / "rows-scene.npy", (len(names) - 1 - scene).astype("<u4"))
    manifest = manifest_json(directory)
    manifest["scenes"] = names[::-1]
    manifest["column_files"]["rows-scene.npy"] = entry_of(directory / "rows-scene.npy")
    write_manifest_json(directory, manifest)
    assert against(open_set(directory), mat, SourceOptions(), 1) == 1


@pytest.mark.parametrize("damage", ["header", "size", "link", "missing"])
def test_opening_finds_a_shard_of_another_header_or_size(
    small_set: Path, tmp_path: Path, damage: str
) -> None:
    directory = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    path = directory / "depth-00001.npy"
    if damage == "header":
        np.save(path, np.load(path).view("<i2"))
    elif damage == "size":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"depth-00001\.npy"):
        open_set(directory)


def test_the_header_written_here_is_numpys() -> None:
    for dtype, shape in (
        ("|u1", (128, 3, 224, 224)),
        ("<u2", (100_000, 480, 480)),
        ("<f4", (1449, 4)),
        ("|S70", (9,)),
    ):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype, "fortran_order": False, "shape": shape}
        )
        assert npy_header(dtype, shape) == file.getvalue()
