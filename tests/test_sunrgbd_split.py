"""allsplit.mat: paths that end, begin and repeat slashes as they like; and bytes that are damaged."""

import csv
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from helpers.sunrgbd import splits_of

from convert.sample_sunrgbd import (
    N_REAL,
    SUBSETS,
    allsplit,
    cell_array,
    made_up_rows,
    matlab_5,
    meta,
    text_cell,
)
from convert.sources.errors import BadRow
from convert.sources.matlab5 import arrays_in, reading, struct_texts
from convert.sources.nyu_tables import split_of
from convert.sources.sunrgbd_rows import NO_NYU_ROW, SunRow, read_split, sequence_of
from convert.sources.sunrgbd_tables import nyu_scenes
from shards.errors import WrongSource
from shards.spec import SPLITS

NYU = "kv1/NYUdata/NYU0001"
LISTS = "rgbd_samples/sunrgbd_lists"


# ------------------------------------------------------------------------------------ the real one


def real_rows() -> list[dict[str, str]]:
    """The rows of SUNRGBDMeta.mat, by number, as several public lists have them."""
    with open(shared(f"{LISTS}/sunrgbd_rows.tsv"), newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def real_split() -> tuple[SunRow, ...]:
    return read_split(shared(f"{LISTS}/allsplit.mat").read_bytes(), "allsplit.mat")


def test_the_real_split_is_the_rows_of_the_public_lists_in_their_order() -> None:
    ours = [(row.split, row.subset, f"SUNRGBD/{row.sequence}") for row in real_split()]
    theirs = [(row["split"], row["subset"], row["sequence"]) for row in real_rows()]
    assert len(ours) == 10_335
    assert ours == theirs
    nyu = [0 if row.nyu_row == NO_NYU_ROW else row.nyu_row + 1 for row in real_split()]
    assert nyu == [int(row["nyu_index1"] or 0) for row in real_rows()]


def test_nyus_own_split_is_kept_in_the_real_one_row_by_row() -> None:
    rows = [row for row in real_split() if row.nyu_row != NO_NYU_ROW]
    assert len(rows) == 1449
    assert [SPLITS[split_of(row.place)[0]] for row in rows] == [row.split for row in rows]


def test_44_sequences_of_sun3d_are_in_both_halves_of_the_real_one() -> None:
    halves: dict[str, set[str]] = {}
    for row in real_split():
        halves.setdefault(row.place, set()).add(row.split)
    shared_places = {place for place, splits in halves.items() if len(splits) == 2}
    rows = [row.split for row in real_split() if row.place in shared_places]
    assert len(shared_places) == 44
    assert all(place.startswith("xtion/sun3ddata/") for place in shared_places)
    assert (rows.count("test"), rows.count("train")) == (458, 305)


def test_the_made_up_rows_are_as_many_in_each_subset_as_the_real_ones() -> None:
    made = made_up_rows(N_REAL)
    for subset in SUBSETS:
        splits = [row.split for row in made if row.subset == subset]
        assert (splits.count("test"), splits.count("train")) == (subset.n_test, subset.n_train)
    assert len({row.path for row in made}) == N_REAL
    real = [row.subset for row in real_split()]
    assert [row.subset.name for row in made] == real


# ------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "path",
    [
        "/n/fs/sun3d/data/SUNRGBD/kv1/NYUdata/NYU0001/",
        "/n/fs/sun3d/data/SUNRGBD/kv1/NYUdata/NYU0001",
        "/n/fs/sun3d/data//SUNRGBD//kv1///NYUdata/NYU0001//",
        "SUNRGBD//kv1/NYUdata/NYU0001",
        "/home/SUNRGBD/copy/SUNRGBD/kv1/NYUdata/NYU0001/",
    ],
)
def test_a_row_is_what_follows_the_last_sunrgbd(path: str) -> None:
    assert sequence_of(path) == NYU


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/n/fs/sun3d/data/kv1/NYUdata/NYU0001/",
        "/data/SUNRGBD/",
        "/data/SUNRGBD/kv1/NYUdata",
        "/data/SUNRGBD/kv3/NYUdata/NYU0001",
        "/data/SUNRGBD/kv1/../../NYU0001",
        "/data/SUNRGBD/kv1/NYUdata/.NYU0001",
        "/data/SUNRGBD/kv1/NYUdata/NYU\n0001",
    ],
)
def test_a_path_that_is_no_row_is_refused(path: str) -> None:
    with pytest.raises(BadRow, match="is no row of SUN RGB-D"):
        sequence_of(path)


def test_a_place_is_nyus_scene_the_sequence_of_sun3d_else_the_row() -> None:
    def place(sequence: str) -> str:
        return SunRow(sequence=sequence, split="train").place

    assert place(NYU) == nyu_scenes()[0] == "kitchen_0004"
    assert place("kv1/NYUdata/NYU1450") == "kv1/NYUdata/NYU1450"  # the .mat has 1,449
    assert place("xtion/sun3ddata/mit_32/d507_1/0000008-12") == "xtion/sun3ddata/mit_32/d507_1"
    assert place("realsense/lg/2014_10_24") == "realsense/lg/2014_10_24"


def test_rows_of_the_test_half_come_first() -> None:
    train = [f"/SUNRGBD/kv1/NYUdata/NYU{k:04d}/" for k in (3, 4)]
    test = [f"/SUNRGBD/kv1/NYUdata/NYU{k:04d}" for k in (2, 1)]
    rows = read_split(splits_of(alltrain=train, alltest=test), "x")
    assert [(row.sequence[-1], row.split) for row in rows] == [
        ("2", "test"),
        ("1", "test"),
        ("3", "train"),
        ("4", "train"),
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read as MATLAB 5"),
        (b"<html>404</html>".ljust(600), "cannot be read as MATLAB 5 .no mark of its byte order"),
        (splits_of(alltest=[f"/SUNRGBD/{NYU}"]), "has no cell array alltrain"),
        (splits_of(alltrain=[], alltest=[]), "has 0 rows"),
        (splits_of(alltrain=[f"/SUNRGBD/{NYU}"], alltest=[f"/SUNRGBD/{NYU}/"]), f"names {NYU} twice"),
        (splits_of(alltrain=["/x"], alltest=[]), "has /x, which is no row of SUN RGB-D"),
        (matlab_5([text_cell("x"), cell_array([], "alltrain")]), "has no cell array alltest"),
    ],
    ids=["empty", "a page", "half", "no rows", "twice", "elsewhere", "unnamed"],
)  # fmt: skip
def test_what_is_no_split_is_one_line(data: bytes, said: str) -> None:
    with pytest.raises(WrongSource, match=f"^split {said}"):
        read_split(data, "split")


# ------------------------------------------------------------------------------- MATLAB 5 by itself


def test_what_the_sample_writes_is_what_scipy_reads(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    rows = made_up_rows(60)
    path = tmp_path / "allsplit.mat"
    path.write_bytes(allsplit(rows))
    found = io.loadmat(path)
    texts = [str(cell[0, 0][0]) for cell in found["alltest"][0]]
    assert texts == [
        f"/n/fs/sun3d/data/SUNRGBD/{row.path}" + "/" * text.endswith("/")
        for row, text in zip(rows, texts, strict=False)
    ]
    assert {text.endswith("/") for text in texts if "kinect2data" in text} == {True, False}
    parts = found["trainvalsplit"][0, 0]
    assert len(parts["train"]) + len(parts["val"]) == found["alltrain"].size
    path.write_bytes(meta(rows))
    names = [str(name[0]) for name in io.loadmat(path)["SUNRGBDMeta"]["sequenceName"][0]]
    assert names == [f"SUNRGBD//{row.path}" for row in rows]


def test_texts_are_what_scipy_writes(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    texts = ["abc", "", "küche", "x" * 300, "面"]
    cells = np.empty((1, len(texts)), object)
    cells[0] = texts
    nested = np.empty((1, 1), object)
    nested[0, 0] = cells
    for packs in (False, True):
        io.savemat(tmp_path / "a.mat", {"t": cells, "n": nested}, do_compression=packs)
        arrays = arrays_in((tmp_path / "a.mat").read_bytes())
        assert list(arrays["t"].texts()) == texts
        with pytest.raises(BadRow, match="has no text there"):
            list(arrays["n"].texts())


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (text_cell("x"), "has no cell array there"),
        (cell_array([cell_array([])]), "has no text there"),
        (cell_array([text_cell("x" * 5000)]), "a text of type 16 and 5000 bytes"),
    ],
)
def test_what_is_no_cell_array_of_texts_is_said(array: bytes, said: str) -> None:
    (found,) = arrays_in(matlab_5([array])).values()
    with pytest.raises(BadRow, match=said), reading():
        list(found.texts())


def test_cells_that_the_bytes_cannot_hold_are_not_counted_through() -> None:
    array = cell_array([text_cell("x")] * 3, "a")
    many = array.replace(struct.pack("<2i", 1, 3), struct.pack("<2i", 1 << 15, 1 << 15))
    (found,) = arrays_in(matlab_5([many])).values()
    with pytest.raises(BadRow, match="1073741824 cells in"), reading():
        list(found.texts())


def test_a_field_of_structs_is_read_without_what_is_in_the_others(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    structs = np.zeros((1, 50), dtype=[("large", "O"), ("name", "O"), ("boxes", "O")])
    for k in range(50):
        boxes = np.zeros((1, k % 3), dtype=[("label", "O")])
        structs[0, k] = (np.full((90, 130), float(k)), f"row {k}", boxes)
    path = tmp_path / "a.mat"
    for packs in (False, True):
        io.savemat(path, {"x": np.eye(3), "s": structs}, do_compression=packs)
        assert struct_texts(path, "s", "name") == [f"row {k}" for k in range(50)]
        for name, field, said in (
            ("t", "name", "has no array t"),
            ("s", "names", "has no field names"),
            ("s", "large", "a text of 93648 bytes"),
            ("s", "boxes", "has no text there"),
            ("x", "name", "has no array of structs there"),
        ):
            with pytest.raises(BadRow, match=said):
                struct_texts(path, name, field)
        whole = path.read_bytes()
        for n_bytes in range(0, len(whole), len(whole) // 40):
            path.write_bytes(whole[:n_bytes])
            with pytest.raises(BadRow):
                struct_texts(path, "s", "name")


@pytest.mark.parametrize("step", [1, 5])
def test_damaged_structs_are_errors_or_other_texts(step: int, tmp_path: Path) -> None:
    whole = meta(made_up_rows(12))
    path = tmp_path / "meta.mat"
    rng = np.random.default_rng(step)
    for _ in range(100):
        damaged = bytearray(whole)
        for at in rng.integers(124, len(whole), step):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        with suppress(BadRow):
            assert len(struct_texts(path, "SUNRGBDMeta", "sequenceName")) <= 12


@pytest.mark.parametrize("step", [1, 7])
def test_any_damaged_byte_is_an_error_or_another_split(step: int) -> None:
    """No crash, no hang, no memory taken for what is not there."""
    whole = allsplit(made_up_rows(12))
    rng = np.random.default_rng(step)
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(124, len(whole), step):
            damaged[at] = rng.integers(256)
        with suppress(WrongSource):
            assert len(read_split(bytes(damaged), "x")) <= 12
    for n_bytes in range(0, len(whole), 97):
        with pytest.raises(WrongSource):
            read_split(whole[:n_bytes], "x")
