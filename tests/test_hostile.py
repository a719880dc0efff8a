"""Mutations of real layouts: each ends in one line, status 2, without much memory or time, or does
no harm at all.

Every case is a process of its own, with limits on its address space and its CPU seconds. Status 0
is right only where the set that was made has the very bytes of the unharmed file's: a flipped byte
in padding, or in what is not read.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from conftest import REPO, SMALL
from helpers.sets import convert, is_whole, manifest_json, write_manifest_json

from convert.sample import write_sample
from convert.sources.nyu_mat import CELLS, KEYS
from shards.containers import map_file, npy_form
from shards.dataset import open_set
from shards.errors import UserError
from shards.files import sha256_file
from shards.manifest import COLUMNS, MANIFEST

MAX_RESIDENT = 512 << 20
# KiB of address space (torch alone maps 3 GB); CPU seconds
LIMITS = 'ulimit -v 6000000; ulimit -t 10; exec "$@"'
LAUNCH = """import atexit, runpy, sys
from pathlib import Path
atexit.register(lambda: print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]))
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)"""
Change = Callable[[Path, random.Random], Any]


class Outcome(NamedTuple):
    status: int
    errors: str
    resident: int


def limited(*args: object) -> Outcome:
    """Run `python -m ARGS` under the limits. (wait4's largest size would count this process's own,
    as it forks.)
    """
    command = ["sh", "-c", LIMITS, "sh", sys.executable, "-c", LAUNCH, *map(str, args)]
    done = subprocess.run(command, cwd=REPO, capture_output=True)
    last = done.stdout.split()[-1:]
    return Outcome(
        done.returncode, done.stderr.decode(errors="replace"), int(last[0]) * 1024 if last else 0
    )


def complaint(outcome: Outcome) -> str | None:
    """What is not as it should be in a refusal."""
    lines = [
        line for line in outcome.errors.splitlines() if not line.startswith(("shard ", "convert:"))
    ]
    if outcome.status != 2:
        return f"status {outcome.status}: {outcome.errors[-300:]}"
    if (
        "Traceback" in outcome.errors
        or len([x for x in lines if "not in the official" not in x]) > 3
    ):
        return outcome.errors[-600:]
    if not any(words in lines[-1] for words in ("make ", "python -m", "same command")):
        return f"no command: {lines[-1]}"
    return f"{outcome.resident >> 20} MiB" if outcome.resident > MAX_RESIDENT else None


# ---------------------------------------------------------------- the .mat


def edited(change: Callable[[h5py.File, random.Random], Any]) -> Change:
    def edit(path: Path, rng: random.Random) -> None:
        with h5py.File(path, "r+") as file:
            change(file, rng)

    return edit


def any_key(rng: random.Random) -> str:
    return rng.choice(list(KEYS.values()))


def replace(file: h5py.File, key: str, *args: Any, **how: Any) -> None:
    if key in file:
        del file[key]
    file.create_dataset(key, *args, **how)


def corrupt_chunk(file: h5py.File, rng: random.Random) -> None:
    dset = file[any_key(rng)]
    info = dset.id.get_chunk_info(rng.randrange(dset.id.get_num_chunks()))
    data = bytearray(dset.id.read_direct_chunk(info.chunk_offset)[1])
    kind = rng.randrange(3)
    if kind == 0:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)) :]
    else:
        data = bytearray(rng.randbytes(rng.randint(0, 2000)))
    dset.id.write_direct_chunk(info.chunk_offset, bytes(data))


def bomb(file: h5py.File, rng: random.Random) -> None:
    """A chunk that unpacks to far more than it should."""
    import zlib

    dset = file[any_key(rng)]
    dset.id.write_direct_chunk(
        (0,) * dset.ndim, zlib.compress(bytes(rng.choice([1, 64, 300]) << 20), 1)
    )


def absurd_shape(file: h5py.File, rng: random.Random) -> None:
    key = any_key(rng)
    planes = (3,) if key == "images" else ()
    n_rows = rng.choice([0, 1, 37, 36, 10**6, 10**9, 2**40])
    sides = rng.choice(
        [(64, 48), (0, 0), (1, 1), (7, 48), (2**20, 2**20), (8192, 8192), (640, 480)]
    )
    shape = (n_rows, *planes, *sides)
    if shape == (36, *planes, 64, 48):
        shape = (36, 2, *sides) if planes else (36, 1, *sides)
    chunk = tuple(
        max(1, min(s, c)) for s, c in zip(shape, (1, 3, 16, 48)[-len(shape) :], strict=True)
    )
    replace(file, key, shape, file[key].dtype, chunks=chunk if 0 not in shape else None)


def absurd_chunks(file: h5py.File, rng: random.Random) -> None:
    key = any_key(rng)
    shape = (36, *((3,) if key == "images" else ()), 2048, 2048)
    chunk = rng.choice(
        [(1,) * len(shape), shape, (36, *(1,) * (len(shape) - 1)), (*shape[:-2], 1, 2048)]
    )
    replace(file, key, shape, file[key].dtype, chunks=chunk, compression="gzip")


def wrong_dtype(file: h5py.File, rng: random.Random) -> None:
    key = rng.choice([*KEYS.values(), *CELLS])
    shape = file[key].shape
    kinds = [
        "i1",
        "u4",
        "f8",
        "S5",
        "c8",
        "?",
        "i8",
        h5py.ref_dtype,
        np.dtype([("a", "u1"), ("b", "f4")]),
    ]
    replace(file, key, shape, rng.choice(kinds))


def wrong_object(file: h5py.File, rng: random.Random) -> None:
    key = rng.choice([*KEYS.values(), *CELLS])
    original = file[key]
    del file[key]
    kind = rng.randrange(7)
    if kind == 0:
        file.create_group(key)
    elif kind == 1:
        file[key] = h5py.SoftLink("/nowhere")
    elif kind == 2:
        file[key] = h5py.ExternalLink("/etc/passwd", "/x")
    elif kind == 3:
        file[key] = h5py.SoftLink(f"/{key}")  # to itself
    elif kind == 4:
        file[key] = np.dtype("u1")
    elif kind == 5:
        file.create_dataset(
            key, original.shape, original.dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
        )
    else:
        layout = h5py.VirtualLayout(original.shape, original.dtype)
        layout[...] = h5py.VirtualSource("/dev/zero", "x", original.shape)
        file.create_virtual_dataset(key, layout)


def references(file: h5py.File, rng: random.Random) -> None:
    """References to nowhere, to groups, to other data, into the middle of something."""
    key = rng.choice(CELLS)
    cell = file[key]
    values = cell[()]
    kind = rng.randrange(5)
    if kind < 2:
        values[0, rng.randrange(values.shape[1])] = h5py.Reference() if kind else file["#refs#"].ref
    elif kind == 2:
        values[0, :] = file[any_key(rng)].ref
    elif kind == 3:
        values = values[:, : rng.randrange(values.shape[1])] if key != "names" else values[:, :0]
    else:
        values[0, 0] = cell.ref
    replace(file, key, data=values, dtype=h5py.ref_dtype)


def text(file: h5py.File, rng: random.Random) -> None:
    """Character data that is no text."""
    key = rng.choice(CELLS)
    codes: list[np.ndarray] = [
        np.array([[0xD800], [65]], "<u2"),
        np.array([[0]], "<u2"),
        np.array([[27], [91], [50], [74]], "<u2"),
        np.array([[10], [65]], "<u2"),
        np.array([[1.5]], "<f4"),
        np.array([[65]], "<u4"),
        np.full((70_000, 1), 65, "<u2"),
    ]
    made = file["#refs#"].create_dataset(f"bad{rng.random()}", data=rng.choice(codes))
    values = file[key][()]
    values[0, rng.randrange(values.shape[1])] = made.ref
    file[key][...] = values


def value(file: h5py.File, rng: random.Random) -> None:
    """A number that cannot be: NaN, infinite, negative, too far; a label that is no class."""
    row, x, y = rng.randrange(36), rng.randrange(64), rng.randrange(48)
    if rng.random() < 0.3:
        file["labels"][row, x, y] = rng.choice([895, 1000, 40000, 65535])
    else:
        bad = [np.nan, np.inf, -np.inf, -1.0, -1e-30, 32.768, 70.0, 1e30]
        file[rng.choice(["depths", "rawDepths"])][row, x, y] = rng.choice(bad)


def accel(file: h5py.File, rng: random.Random) -> None:
    shape, kind = rng.choice(
        [((4, 35), "f4"), ((36,), "f4"), ((4, 36), "S3"), ((4, 10**12), "f4"), ((0, 36), "f4")]
    )
    replace(
        file,
        "accelData",
        shape,
        kind,
        chunks=tuple(min(s, 36) for s in shape) if 0 not in shape else None,
    )


def no_rows(file: h5py.File, rng: random.Random) -> None:
    for key in KEYS.values():
        shape = (0, *file[key].shape[1:])
        replace(
            file, key, shape, file[key].dtype, maxshape=(None, *shape[1:]), chunks=(1, *shape[1:])
        )
    for key in CELLS[1:]:
        replace(file, key, (1, 0), h5py.ref_dtype)


def missing(file: h5py.File, rng: random.Random) -> None:
    del file[rng.choice([*KEYS.values(), *CELLS])]


def filters(file: h5py.File, rng: random.Random) -> None:
    """A chunk that says its filters were skipped, and is packed all the same."""
    dset = file[any_key(rng)]
    info = dset.id.get_chunk_info(rng.randrange(dset.id.get_num_chunks()))
    data = dset.id.read_direct_chunk(info.chunk_offset)[1]
    dset.id.write_direct_chunk(info.chunk_offset, data, filter_mask=rng.choice([1, 0xFFFFFFFF]))


def metadata_ranges(path: Path) -> list[tuple[int, int]]:
    """Where the file holds no rows: headers, indices, heaps, character codes."""
    with h5py.File(path) as file:
        chunks: list[tuple[int, int]] = []
        for key in KEYS.values():
            if file[key].chunks:
                file[key].id.chunk_iter(
                    lambda c: chunks.append((c.byte_offset, c.byte_offset + c.size))
                )
            else:
                start = file[key].id.get_offset()
                chunks.append((start, start + file[key].id.get_storage_size()))
    ranges, end = [], 0
    for start, stop in [*sorted(chunks), (path.stat().st_size, 0)]:
        if start > end:
            ranges.append((end, start))
        end = stop
    return ranges


def important(path: Path) -> list[tuple[int, int]]:
    """The superblock, the root group, and what the five arrays and the cells begin with."""
    with h5py.File(path) as file:
        base = file.userblock_size
        addresses = [
            h5py.h5o.get_info(file[key].id).addr + base for key in (*KEYS.values(), *CELLS)
        ]
    return [(base, base + 1200), *((a, a + 400) for a in addresses)]


def flips(where: Callable[[Path], list[tuple[int, int]]], most: int) -> Change:
    def flip(path: Path, rng: random.Random) -> None:
        data, ranges = bytearray(path.read_bytes()), where(path)
        for _ in range(rng.randint(1, most)):
            start, stop = rng.choice(ranges)
            at = min(rng.randrange(start, stop), len(data) - 1)
            data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)])
        path.write_bytes(data)

    return flip


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.choice([rng.randrange(path.stat().st_size), rng.randrange(3000)]))


def hole(path: Path, rng: random.Random) -> None:
    """A block of zeros or noise: a download with a part missing."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    block = (bytes if rng.random() < 0.5 else rng.randbytes)(
        min(rng.choice([4096, 65536, 10**6]), len(data) - start)
    )
    path.write_bytes(data[:start] + block + data[start + len(block) :])


CHANGES: dict[str, Change] = {
    "corrupt chunk": edited(corrupt_chunk),
    "bomb": edited(bomb),
    "absurd shape": edited(absurd_shape),
    "absurd chunks": edited(absurd_chunks),
    "wrong dtype": edited(wrong_dtype),
    "wrong object": edited(wrong_object),
    "references": edited(references),
    "text": edited(text),
    "value": edited(value),
    "accel": edited(accel),
    "no rows": edited(no_rows),
    "missing": edited(missing),
    "filters": edited(filters),
    "flips in metadata": flips(metadata_ranges, 8),
    "flips in headers": flips(important, 3),
    "one flip in headers": flips(important, 1),
    "cut": cut,
    "hole": hole,
}
MAY_BE_HARMLESS = {
    "flips in metadata",
    "flips in headers",
    "one flip in headers",
    "hole",
    "corrupt chunk",
    "filters",
}


@pytest.fixture(scope="module")
def layouts(mat: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same rows in the layouts that there are."""
    paths = [mat]
    for chunks in ("resaved", "none"):
        paths.append(tmp_path_factory.mktemp("layout") / f"{chunks}.mat")
        write_sample(paths[-1], 36, size_wh=(64, 48), chunks=chunks)  # type: ignore[arg-type]
    return paths


def cases(n: int) -> Iterator[tuple[int, str]]:
    for k in range(n):
        yield k, list(CHANGES)[k % len(CHANGES)]


def hostile(n: int, layouts: list[Path], small_set: Path, root: Path) -> dict[str, int]:
    """Run `n` cases, two at a time; fails with the list of those that ended badly."""
    counts = {"refused": 0, "harmless": 0, "rows changed": 0}
    right = {p.name: p.read_bytes() for p in small_set.glob("*.npy")}

    def one(case: tuple[int, str]) -> str | None:
        (k, name), rng = case, random.Random(f"hostile {case[0]}")
        path, out = root / f"{k}.mat", root / f"{k}"
        shutil.copy(
            layouts[0]
            if name in ("corrupt chunk", "bomb", "filters")
            else layouts[k % len(layouts)],
            path,
        )
        CHANGES[name](path, rng)
        outcome = limited(
            "convert", "run", path, "--out", out, "--size", 32, "--rows-per-shard", 10
        )
        made = [p for p in out.glob("*") if (p / MANIFEST).exists()]
        wrong = complaint(outcome) if outcome.status else None
        if outcome.status == 0 and name in MAY_BE_HARMLESS:
            same = {p.name: p.read_bytes() for p in made[0].glob("*.npy")} == right
            counts["harmless" if same else "rows changed"] += 1
            if not same:
                print(k, name, "gave other rows")
        elif outcome.status == 0:
            wrong = "was accepted"
        else:
            counts["refused"] += 1
            if made or list(out.rglob(".*.tmp")):
                wrong = "left something behind"
        shutil.rmtree(out, ignore_errors=True)
        if not wrong:
            path.unlink()
        if k % 60 == 59:
            print(k + 1, "cases", counts, flush=True)
        return wrong and f"{k} {name}: {wrong}"

    with ThreadPoolExecutor(2) as pool:
        bad = [line for line in pool.map(one, cases(n)) if line]
    print(counts)
    assert not bad, "\n".join(bad)
    return counts


def test_hostile_sources_are_one_line_within_the_limits(
    layouts: list[Path], small_set: Path, tmp_path: Path
) -> None:
    assert hostile(2 * len(CHANGES), layouts, small_set, tmp_path)["refused"] > len(CHANGES)


@pytest.mark.stress
def test_540_hostile_sources(layouts: list[Path], small_set: Path, tmp_path: Path) -> None:
    hostile(30 * len(CHANGES), layouts, small_set, tmp_path)


# ---------------------------------------------------------------- the set


def remake(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A manifest changed by somebody who knows how to sign it."""

    def edit(directory: Path) -> None:
        manifest = manifest_json(directory)
        change(manifest)
        write_manifest_json(directory, manifest)

    return edit


def rename_file(manifest: dict[str, Any], old: str, new: str) -> None:
    for files in (manifest["column_files"], *(s["files"] for s in manifest["shards"])):
        if old in files:
            files[new] = files.pop(old)


def pickled(directory: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(directory.parent / "pwned"),)

    path = directory / "rows-split.npy"
    np.save(path, np.array([Evil()], object), allow_pickle=True)
    manifest = manifest_json(directory)
    manifest["column_files"]["rows-split.npy"] = {
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
    }
    write_manifest_json(directory, manifest)


def replaced_by(make: Callable[[Path], Any], name: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return edit


SETS: dict[str, Callable[[Path], Any]] = {
    "path upwards": remake(lambda m: rename_file(m, "rgb-00000.npy", "../rgb-00000.npy")),
    "absolute path": remake(lambda m: rename_file(m, "rows-split.npy", "/etc/passwd")),
    "another name": remake(lambda m: rename_file(m, "rgb-00000.npy", "rgb-00009.npy")),
    "pickled column": pickled,
    "rows": remake(lambda m: m.update(rows=10**12)),
    "no rows": remake(lambda m: m.update(rows=0, shards=[])),
    "negative rows": remake(lambda m: m.update(rows=-5)),
    "rows as text": remake(lambda m: m.update(rows="36")),
    "shards as text": remake(lambda m: m.update(shards="x")),
    "size": remake(lambda m: m["settings"].update(size=2**31)),
    "settings as a list": remake(lambda m: m.update(settings=[])),
    "unknown setting": remake(lambda m: m["settings"].update(x=1)),
    "version": remake(lambda m: m.update(format_version=99)),
    "fields": remake(lambda m: m["fields"].pop("rgb")),
    "names": remake(lambda m: m.update(scenes=[])),
    "bytes": remake(lambda m: m["column_files"]["rows-split.npy"].update(bytes="x")),
    "deep": lambda d: (d / MANIFEST).write_text("[" * 100_000),
    "not text": lambda d: (d / MANIFEST).write_bytes(b"\xff\xfe\x00"),
    "a list": lambda d: (d / MANIFEST).write_text("[]"),
    "empty": lambda d: (d / MANIFEST).write_text(""),
    "manifest is a directory": replaced_by(Path.mkdir, MANIFEST),
    "manifest is a pipe": replaced_by(os.mkfifo, MANIFEST),
    "manifest is a link": replaced_by(lambda p: p.symlink_to("/etc/passwd"), MANIFEST),
    "shard is a link": replaced_by(lambda p: p.symlink_to("/etc/passwd"), "rgb-00000.npy"),
    "shard is a pipe": replaced_by(os.mkfifo, "depth-00001.npy"),
    "column is a directory": replaced_by(Path.mkdir, "rows-split.npy"),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_hostile_set_is_one_line_to_every_reader(
    kind: str, small_set: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    SETS[kind](directory)
    outcome = limited("convert", "inspect", directory)
    assert complaint(outcome) is None
    assert outcome.errors.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


def test_a_manifest_of_any_values_is_refused_or_read(small_set: Path, tmp_path: Path) -> None:
    """Every value replaced by every strange one, signed: a UserError, or a set whose shards and
    columns are read.
    """
    whole, strange = (
        manifest_json(small_set),
        [None, -1, 2**70, 1e300, "", "../x", [], {}, [[]], True],
    )
    directory = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    paths = list(leaves(whole))
    for k in range(400):
        rng = random.Random(k)
        manifest = json.loads(json.dumps(whole))
        *parents, last = rng.choice(paths)
        inside = manifest
        for key in parents:
            inside = inside[key]
        inside[last] = rng.choice(strange)
        write_manifest_json(directory, manifest)
        with suppress(UserError):
            found = open_set(directory)
            for field in found.manifest.fields:
                found.shards(field)
            for name in COLUMNS:
                found.column(name)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything is in a JSON value, each list by its first two."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:2])
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


def test_a_shard_of_objects_is_never_loaded(small_set: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    np.save(directory / "label-00000.npy", np.array([{}] * 10, object), allow_pickle=True)
    with pytest.raises(UserError):
        open_set(directory)
    with pytest.raises(UserError):
        map_file(directory / "label-00000.npy", npy_form("<u2", (10, 32, 32)))


def test_a_failure_in_the_middle_keeps_what_is_done(
    mat: Path, small_set: Path, tmp_path: Path
) -> None:
    """The thread that inflates row 35 raises: one line, nothing temporary, finished shards kept."""
    path = tmp_path / "x.mat"
    shutil.copy(mat, path)
    with h5py.File(path, "r+") as file:
        file["depths"].id.write_direct_chunk((35, 0, 0), b"not zlib")
    with pytest.raises(UserError, match="depths row 35"):
        convert(path, tmp_path / "out", SMALL, 1)
    assert list(tmp_path.glob("out/*/receipt-*"))
    assert not list(tmp_path.glob("out/*/.*"))


# ---------------------------------------------------------------- tables and pictures


def flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def grown(path: Path, rng: random.Random) -> None:
    """Far beyond what memory holds, with nothing in it."""
    os.truncate(path, 8 << 30)


def strewn(path: Path, rng: random.Random) -> None:
    """Strange bytes put into the middle."""
    strange = (
        b"\0",
        b"\xff\xfe",
        b'"',
        b"\r",
        b"\n\n",
        b"," * 50,
        b"x" * 10_000,
        b"../" * 20,
        b"#" * 9,
    )
    data = path.read_bytes()
    at = rng.randrange(len(data))
    path.write_bytes(data[:at] + rng.choice(strange) + data[at:])


def put_in_place(make: Callable[[Path], Any]) -> Change:
    def edit(path: Path, rng: random.Random) -> None:
        path.unlink()
        make(path)

    return edit


OF_A_FILE: dict[str, Change] = {
    "flipped": flipped,
    "cut": cut,
    "strewn": strewn,
    "grown": grown,
    "random": lambda path, rng: path.write_bytes(rng.randbytes(rng.randrange(1, 4096))),
    "a folder": put_in_place(Path.mkdir),
    "a pipe": put_in_place(os.mkfifo),
    "a link out": put_in_place(lambda path: path.symlink_to("/etc/passwd")),
    "a link to itself": put_in_place(lambda path: path.symlink_to(path.name)),
    "a link to a device": put_in_place(lambda path: path.symlink_to("/dev/zero")),
}


def hostile_frames(name: str, number: int, rooms: Path, folder: Path) -> str | None:
    """What is not as it should be once one file of a directory was changed: mostly a picture, and
    each third time the table.
    """
    copy = Path(shutil.copytree(rooms, folder / f"{number}"))
    rng = random.Random(number)
    pictures = sorted(path for path in copy.glob("*/*/*") if path.is_file())
    is_table = number % 3 == 0
    OF_A_FILE[name](copy / "rows.csv" if is_table else rng.choice(pictures), rng)
    source = copy if number % 2 else copy / "rows.csv"
    root = folder / f"{number} out"
    outcome = limited(
        "convert", "run", source, "--out", root, "--size", 16, "--max-failed", 1, "--workers", 2
    )
    made = list(root.glob("*/manifest.json"))
    problem = frames_complaint(outcome, made)
    shutil.rmtree(copy)
    shutil.rmtree(root, ignore_errors=True)
    return problem and f"{name} {number}: {problem}"


def frames_complaint(outcome: Outcome, made: list[Path]) -> str | None:
    if outcome.status not in (0, 2) or "Traceback" in outcome.errors:
        return f"status {outcome.status}: {outcome.errors[-600:]}"
    if outcome.status == 2 and (made or not outcome.errors.strip()):
        return f"published, or silent: {outcome.errors[-300:]}"
    if outcome.status == 0:
        (manifest,) = made
        if not is_whole(manifest.parent):
            return "a set that is not whole"
    return f"{outcome.resident >> 20} MiB" if outcome.resident > MAX_RESIDENT else None


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL", reason="needs pillow")
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    from convert.sample_frames import write_frames

    folder = tmp_path_factory.mktemp("sample") / "rooms"
    write_frames(folder, 8, sizes_wh=((48, 36),), bad=True)
    return folder


@pytest.mark.parametrize("name", ["strewn", "grown", "a pipe", "a link out"])
def test_a_hostile_file_among_frames_is_a_failed_row_or_one_line(
    name: str, rooms: Path, tmp_path: Path
) -> None:
    number = list(OF_A_FILE).index(name)
    assert hostile_frames(name, number, rooms, tmp_path) is None


@pytest.mark.stress
def test_300_hostile_files_among_frames(rooms: Path, tmp_path: Path) -> None:
    names = list(OF_A_FILE)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(
            lambda k: hostile_frames(names[k % len(names)], k, rooms, tmp_path), range(300)
        )
        assert not [problem for problem in found if problem]
