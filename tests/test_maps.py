"""Shards are mapped when a row is wanted, without a descriptor each, and never elsewhere than in
addresses of their own.
"""

import copy
import ctypes
import gc
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO

pytest.importorskip("torch", reason="needs torch")

import torch

from bench.many import make_sparse
from shards import maps
from shards.containers import ShardForm, write_field
from shards.dataset import ShardSet, open_set
from shards.errors import DamagedSet, UserError
from shards.files import LocalFolder
from shards.gather import JoinedShards, RowGather, take_rows
from shards.manifest import COLUMNS, Manifest, ShardEntry, bounds_of
from shards.maps import AddressRange, CannotReserve
from shards.spec import KNOWN_FIELDS, Codecs, ConversionSettings, DatasetSpec, SourceIdentity
from shards.texts import Texts
from shards.writing import commit, set_name
from train.data import ShardDataset

SIZE = 8
FIELDS = ("rgb", "depth", "label")
N_SHARDS = 200
ROWS_PER_SHARD = 2
N_ROWS = ROWS_PER_SHARD * N_SHARDS - 1  # the last shard has a row less
N_DESCRIPTORS = 64
Pictures = dict[str, np.ndarray]


def pictures(n_rows: int = N_ROWS) -> Pictures:
    """Noise: no two rows are alike."""
    rng = np.random.default_rng(n_rows)
    found = {}
    for name in FIELDS:
        field = KNOWN_FIELDS[name]
        values = rng.integers(0, 255, (n_rows, *field.row_shape(SIZE)))
        found[name] = values.astype(field.dtype)
    return found


def write_set(root: Path, codecs: Codecs = None, n_rows: int = N_ROWS) -> Path:
    """A finished set of `pictures`."""
    settings = ConversionSettings(fields=FIELDS, size=SIZE, rows_per_shard=ROWS_PER_SHARD)
    source = SourceIdentity(kind="table", name="noise.csv", n_bytes=0, sha256="0" * 64)
    spec = DatasetSpec(name="noise", width=0, height=0, scene_types=("hall", "yard"))
    fields = {name: KNOWN_FIELDS[name] for name in FIELDS}
    form = ShardForm(codecs=codecs, n_slots=ROWS_PER_SHARD)
    manifest = Manifest(
        dataset=spec, source=source, settings=settings, n_rows=n_rows, fields=fields,
        shards=[], scenes=["here"], codecs=codecs,
    )  # fmt: skip
    directory = root / set_name(spec.name, SIZE, manifest.fingerprint, codecs)
    stored = pictures(n_rows)
    shards = []
    folder = LocalFolder(directory)
    for k, (start, stop) in enumerate(bounds_of(n_rows, ROWS_PER_SHARD)):
        files = {}
        for name, field in fields.items():
            files |= write_field(folder, field, k, stored[name][start:stop], form)
        sums = {name: ((1, 1, 1),) * (0 if name == "label" else 1) for name in FIELDS}
        shards.append(ShardEntry(start=start, stop=stop, files=files, sums=sums))
    columns = {
        name: Texts.empty(n_rows)
        if column.dtype == "text"
        else np.zeros((n_rows, *column.shape), column.dtype)
        for name, column in COLUMNS.items()
    }
    whole = Manifest(**{**vars(manifest), "shards": shards})
    commit(folder, whole, columns)
    return directory


@pytest.fixture(scope="module")
def npy_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never changed: 200 shards of three fields."""
    return write_set(tmp_path_factory.mktemp("npy"))


@pytest.fixture(scope="module")
def zarr_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("zarr"), dict.fromkeys(FIELDS, "none"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A few shards, to be damaged."""
    return write_set(tmp_path, n_rows=10)


def gather_of(path: Path) -> RowGather:
    return RowGather(open_set(path).maps(FIELDS), SIZE)


def files_mapped(path: Path) -> list[str]:
    """The names of the set's files that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted(line.rpartition("/")[2] for line in lines if f"{path}/" in line)


def expected(rows: np.ndarray, stored: Pictures | None = None) -> bytes:
    stored = stored or pictures()
    return take_rows({name: [stored[name]] for name in FIELDS}, FIELDS, rows)


# --------------------------------------------------------------------------- descriptors and maps

MANY_SHARDS = """
import os, sys
import numpy as np
from loader.loader import Loader
from train.data import ShardDataset
from train.order import Batches

dataset = ShardDataset(sys.argv[1], split="all")
at_first = len(os.listdir("/proc/self/fd"))
sums = np.zeros(3)
for n_workers in (0, 2):
    loader = Loader(dataset, Batches(len(dataset), 50, None), n_workers, "fork")
    for batch in loader:
        sums += [part.double().sum().item() for part in batch]
print(at_first, len(os.listdir("/proc/self/fd")), *sums)
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (N_DESCRIPTORS, N_DESCRIPTORS))


@pytest.mark.parametrize("kind", ["npy_set", pytest.param("zarr_set", marks=pytest.mark.stress)])
def test_a_set_of_600_files_is_read_with_64_descriptors(
    kind: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    done = subprocess.run(
        [sys.executable, "-c", MANY_SHARDS, str(path)],
        cwd=REPO, capture_output=True, text=True, preexec_fn=limited, timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # a GPU has descriptors of its own
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    at_first, in_the_end, *sums = (float(word) for word in done.stdout.split())
    stored = pictures()
    assert sums == [2 * stored["rgb"].sum(dtype=np.int64), 2 * stored["depth"].sum(), 0]
    assert at_first < 20
    assert in_the_end < 32


def test_opening_maps_nothing_and_a_batch_maps_its_own_shards(npy_set: Path) -> None:
    gather = gather_of(npy_set)
    assert files_mapped(npy_set) == []
    gather.into(("depth",), np.array([7, 6, 300]))
    assert files_mapped(npy_set) == ["depth-00003.npy", "depth-00150.npy"]
    gather.into(("depth", "rgb"), np.array([7, N_ROWS - 1]))
    later = ["depth-00003.npy", "depth-00150.npy", "depth-00199.npy"]
    assert files_mapped(npy_set) == [*later, "rgb-00003.npy", "rgb-00199.npy"]


def test_what_is_mapped_goes_with_the_dataset(npy_set: Path) -> None:
    dataset = ShardDataset(npy_set, split="all")
    dataset.batch(np.arange(len(dataset)))
    assert len(files_mapped(npy_set)) == 2 * N_SHARDS
    del dataset
    gc.collect()
    assert files_mapped(npy_set) == []


def test_an_array_of_a_shard_keeps_it_mapped(npy_set: Path) -> None:
    shards = open_set(npy_set).shards("rgb")
    some = [shards[3], shards[-1], *shards[5:7]]
    del shards
    gc.collect()
    stored = pictures()["rgb"]
    for array, start in zip(some, (6, N_ROWS - 1, 10, 12), strict=True):
        np.testing.assert_array_equal(array, stored[start : start + len(array)])
        assert not array.flags.writeable
    assert len(files_mapped(npy_set)) == 4
    del some, array
    gc.collect()
    assert files_mapped(npy_set) == []


def test_shards_are_a_sequence_of_arrays(npy_set: Path, zarr_set: Path) -> None:
    for path in (npy_set, zarr_set):
        for name, stored in pictures().items():
            shards = open_set(path).shards(name)
            assert len(shards) == N_SHARDS
            np.testing.assert_array_equal(np.concatenate(shards), stored)
            with pytest.raises(IndexError):
                shards[N_SHARDS]


# ---------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("kind", ["npy_set", "zarr_set"])
def test_any_rows_are_what_plain_indexing_gives(kind: str, request: pytest.FixtureRequest) -> None:
    gather = gather_of(request.getfixturevalue(kind))
    rng = np.random.default_rng(0)
    for n_rows in (1, 3, 50, 700):
        rows = rng.integers(0, N_ROWS, n_rows)
        assert gather.into(FIELDS, rows).tobytes() == expected(rows)


@pytest.mark.parametrize("kind", ["npy_set", "zarr_set"])
def test_spans_are_where_the_rows_lie(kind: str, request: pytest.FixtureRequest) -> None:
    gather = gather_of(request.getfixturevalue(kind))
    rows = np.array([398, 0, 77])
    addresses, n_bytes = gather.row_spans(("label", "rgb"), rows)
    assert (addresses.dtype, n_bytes.dtype) == (np.int64, np.int64)
    stored = pictures()
    wanted = [stored[name][row].tobytes() for name in ("label", "rgb") for row in rows]
    spans = zip(addresses.tolist(), n_bytes.tolist(), strict=True)
    assert [ctypes.string_at(address, n) for address, n in spans] == wanted
    none, _ = gather.row_spans(("label",), rows[:0])
    assert len(none) == 0


def test_where_there_are_no_such_ranges_numpy_maps(
    npy_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_here() -> None:
        raise CannotReserve("another system")

    monkeypatch.setattr(maps, "_kernel_calls", not_here)
    gather = gather_of(npy_set)
    assert all(type(shard) is np.memmap for shard in open_set(npy_set).shards("rgb"))
    rows = np.array([398, 0, 77])
    assert gather.into(FIELDS, rows).tobytes() == expected(rows)


def test_compressed_fields_are_gathered_beside_mapped_ones(tmp_path: Path) -> None:
    codecs = {"rgb": "zstd", "depth": "none", "label": "blosc"}
    path = write_set(tmp_path, codecs, n_rows=11)
    stored = pictures(11)
    rows = np.array([10, 0, 4])
    assert gather_of(path).into(FIELDS, rows).tobytes() == expected(rows, stored)
    np.testing.assert_array_equal(open_set(path).shards("rgb")[-1], stored["rgb"][10:])


# ---------------------------------------------------------------------------------- page tables


def page_table_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmPTE"))


def tables_after_reading(path: Path) -> int:
    """How many bytes of page tables it takes to read every eighth row."""
    gather = RowGather(open_set(path).maps(["rgb"]), SPARSE_SIZE)
    rows = np.arange(0, N_SPARSE_ROWS, 8)
    before = page_table_bytes()
    for some in np.array_split(np.random.default_rng(0).permutation(rows), 20):
        gather.expect_no_order(["rgb"], some)
        assert not gather.into(["rgb"], some).any()
    return page_table_bytes() - before


N_SPARSE_ROWS = 128 * 40
SPARSE_SIZE = 224


def test_page_tables_do_not_grow_with_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_sparse(tmp_path, ("rgb",), N_SPARSE_ROWS, SPARSE_SIZE)
    assert tables_after_reading(path) > 350 * 4096
    monkeypatch.setattr(maps, "MOST_TABLES", 40)
    assert tables_after_reading(path) < 180 * 4096  # shards' ends share some with their neighbours


def test_shards_that_are_mapped_anew_give_the_same_rows_and_are_read_alike(
    npy_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "MOST_TABLES", 7)
    gather = gather_of(npy_set)
    rng = np.random.default_rng(0)
    for _ in range(40):
        rows = rng.integers(0, N_ROWS, 30)
        gather.expect_no_order(FIELDS, rows)
        assert gather.into(FIELDS, rows).tobytes() == expected(rows)
    blocks = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    )
    flags = [block.partition("VmFlags:")[2].split() for block in blocks if f"{npy_set}/" in block]
    assert len(flags) > 300
    assert all("rr" in each for each in flags)  # read as it is touched, and no more


def test_two_sets_that_are_read_as_one_are_mapped_alike(
    npy_set: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "MOST_TABLES", 2)
    parts = [open_set(path).maps(FIELDS) for path in (npy_set, small)]
    first_rows = np.array([0, N_ROWS, N_ROWS + 10])
    joined = {name: JoinedShards([part[name] for part in parts], first_rows) for name in FIELDS}
    gather = RowGather(joined, SIZE)
    both = {name: np.concatenate([pictures()[name], pictures(10)[name]]) for name in FIELDS}
    for rows in (np.array([N_ROWS, 3, N_ROWS + 9, 7]), np.array([N_ROWS + 4]), np.arange(50)):
        gather.expect_no_order(FIELDS, rows)
        assert gather.into(FIELDS, rows).tobytes() == expected(rows, both)
    assert "depth-00004.npy" in files_mapped(small)


@pytest.mark.parametrize("is_replaced", [False, True], ids=["gone", "replaced"])
def test_what_was_mapped_stays_when_its_file_goes(
    is_replaced: bool, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "MOST_TABLES", 1)
    gather = gather_of(small)
    rows = np.arange(10)
    gather.into(FIELDS, rows)
    for path in small.glob("*-0*.npy"):
        data = path.read_bytes()
        path.unlink()
        if is_replaced:
            path.write_bytes(data[:-16] + bytes(16))
    for _ in range(3):
        assert gather.into(FIELDS, rows).tobytes() == expected(rows, pictures(10))


# ------------------------------------------------------------------------- processes and threads


def test_a_forked_child_maps_further_shards_for_itself(npy_set: Path) -> None:
    stored = pictures()["rgb"]
    dataset = ShardDataset(npy_set, split="all", fields=("rgb",))
    dataset.batch(np.arange(50))
    child = os.fork()
    if not child:
        rgb, _ = dataset.batch(np.arange(40, 120))
        is_right = rgb.numpy().tobytes() == stored[40:120].tobytes()
        n_mapped = len(files_mapped(npy_set))
        del dataset  # what it lets go is its own
        gc.collect()
        os._exit(0 if is_right and n_mapped == 60 and not files_mapped(npy_set) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(files_mapped(npy_set)) == 25
    rgb, _ = dataset.batch(np.arange(20, 200))
    assert torch.equal(rgb, torch.from_numpy(stored[20:200]))


def test_threads_that_come_at_once_all_get_their_rows(npy_set: Path) -> None:
    for seed in range(3):
        gather = gather_of(npy_set)
        wrong = []
        barrier = threading.Barrier(6)

        def read(
            number: int, gather: RowGather = gather, barrier: threading.Barrier = barrier
        ) -> None:
            rng = np.random.default_rng([seed, number])  # noqa: B023
            barrier.wait()
            for _ in range(12):
                rows = rng.integers(0, N_ROWS, 40)
                if gather.into(FIELDS, rows).tobytes() != expected(rows):
                    wrong.append(number)  # noqa: B023

        threads = [threading.Thread(target=read, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert len(files_mapped(npy_set)) <= N_SHARDS * len(FIELDS)


IN_ANOTHER_PROCESS = """
import pickle, sys
import numpy as np

with open(sys.argv[1], "rb") as file:
    dataset = pickle.load(file)
rgb, depth, _ = dataset.batch(np.arange(100, 300))
sys.stdout.buffer.write(rgb.numpy().tobytes() + depth.numpy().tobytes())
"""


def test_a_pickled_dataset_maps_them_anew_wherever_it_lands(npy_set: Path, tmp_path: Path) -> None:
    dataset = ShardDataset(npy_set, split="all")
    dataset.batch(np.arange(100))
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 4000
    (tmp_path / "pickle").write_bytes(pickled)
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "pickle")],
        cwd=REPO, capture_output=True, preexec_fn=limited, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored = pictures()
    assert done.stdout == stored["rgb"][100:300].tobytes() + stored["depth"][100:300].tobytes()


def test_addresses_are_never_copied() -> None:
    addresses = AddressRange(1 << 20)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="one process"):
            attempt(addresses)


# --------------------------------------------------------------------------------------- damage


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def with_another_header(path: Path) -> None:
    data = path.read_bytes().replace(b"<u2", b"<i2", 1)
    path.write_bytes(data)


def linked(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    path.symlink_to(path.with_suffix(".old"))


AFTER_OPENING = {
    "has 383 bytes, the manifest says 384": truncated,
    "is damaged": with_another_header,
    "is missing": os.remove,
    "is not a plain file": linked,
}


@pytest.mark.parametrize("words", AFTER_OPENING)
def test_a_shard_that_changes_before_it_is_mapped_is_one_line(words: str, small: Path) -> None:
    dataset = ShardDataset(small, split="all")
    dataset.batch([0, 1])
    AFTER_OPENING[words](small / "depth-00002.npy")
    with pytest.raises(DamagedSet, match=f"depth-00002.npy {words}") as error:
        dataset.batch([3, 4, 9])
    assert "\n" not in str(error.value)
    rgb, _, _ = dataset.batch([0, 8])  # the others are still read
    np.testing.assert_array_equal(rgb.numpy(), pictures(10)["rgb"][[0, 8]])


@pytest.mark.parametrize("words", AFTER_OPENING)
def test_the_same_damage_is_refused_at_opening(words: str, small: Path) -> None:
    AFTER_OPENING[words](small / "depth-00002.npy")
    with pytest.raises(DamagedSet, match=f"depth-00002.npy {words}"):
        open_set(small)


@pytest.fixture
def few_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that allows no more maps than a process of torch's has without shards."""
    limit = tmp_path / "max_map_count"
    limit.write_text(f"{maps.SPARE_MAPS + 14}\n")
    monkeypatch.setattr(maps, "MAX_MAPS", limit)


@pytest.mark.usefixtures("few_maps")
def test_more_shards_than_the_machine_maps_are_an_error_before_the_first_row(small: Path) -> None:
    found = open_set(small)
    with pytest.raises(UserError, match=r"15 files .* allows a process 4110 maps.*vm\.max_map"):
        found.maps(FIELDS)
    assert isinstance(found, ShardSet)
    assert len(found.maps(FIELDS[:2])) == 2


def test_a_range_that_is_larger_than_all_addresses_is_not_to_be_had() -> None:
    with pytest.raises(CannotReserve):
        AddressRange(1 << 60)
