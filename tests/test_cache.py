"""Sets that lie elsewhere, through a cache: the batches of the set itself, within a limit, and
nothing fetched twice that there was room for.
"""

import gc
import os
import pickle
import signal
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.caches import (
    HOW,
    MostBytes,
    Nursery,
    batches_in,
    fetched,
    fetchers,
    folder_of,
    has_ended,
    right_sums,
    rows_asked,
    serving_set,
    shard_bytes_in,
    shuffle_of,
    sum_of,
    sums,
)
from helpers.made_up import LAB, LabSource
from helpers.servers import Server
from helpers.sets import convert, copied, flip, repack

from loader.loader import Loader
from shards.dataset import open_set
from shards.errors import CacheInUse, DamagedSet, StoreFailed, UserError, WrongPlace
from shards.spec import ConversionSettings
from stores import mounted
from stores.cache import MARK, START, STATE, CacheState, Reader, begin_reading
from train.__main__ import main
from train.data import ShardDataset, create_dataloaders
from train.errors import CacheTooSmall

N_ROWS = 96
SETTINGS = ConversionSettings(size=16, rows_per_shard=2)
LIMIT_GB = 90_000 / 1e9  # of 132 KB that are read
ROOMY_GB = 0.01
# Requests for a row alone: a loader looks at one row first, to know how large a batch is.
OF_FIRST_ROW = 4
KINDS: list[dict[str, Any]] = [{}, {"prefetch": False}, {"num_workers": 2}]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 shards of two rows."""
    source = LabSource(n_rows=N_ROWS, splits=("train", "val"))
    return convert(source, tmp_path_factory.mktemp("small"), SETTINGS, workers=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another dataset's, of 15 shards."""
    source = LabSource(dataset=replace(LAB, name="office"), splits=("train", "val"))
    return convert(source, tmp_path_factory.mktemp("other"), SETTINGS, workers=1)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    found = Nursery(tmp_path_factory.mktemp("nursery"))
    yield found
    found.close()


@pytest.fixture
def server(small: Path) -> Iterator[Server]:
    with serving_set(small) as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """When the test has ended, so has whatever fetched."""
    yield tmp_path / "cache"
    assert has_ended(tmp_path / "cache")


def opened(server: Server, small: Path, cache: Path, **how: Any) -> tuple[Loader, Loader]:
    settings = {**HOW, "cache_limit_gb": ROOMY_GB, **how}
    return create_dataloaders(server.url(small.name), cache_dir=cache, **settings)


# ------------------------------------------------------------------------------------- the batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit_gb", [ROOMY_GB, LIMIT_GB])
def test_batches_are_those_of_the_set_itself_and_the_limit_holds_at_every_moment(
    limit_gb: float, kind: dict[str, Any], server: Server, small: Path, cache: Path
) -> None:
    with MostBytes(cache) as most:
        loaders = opened(server, small, cache, cache_limit_gb=limit_gb, **kind)
        found = [[], []]  # type: list[list[list[str]]]
        for _ in range(3):
            for of_loader, loader in zip(found, loaders, strict=True):
                of_loader += sums(loader)
        shuffle = shuffle_of(loaders[0])
        del loaders, loader
    assert found == right_sums(small, shuffle, 3)
    assert shuffle.startswith("wheel") == (limit_gb == LIMIT_GB)
    assert 0 < most.n_bytes <= limit_gb * 1e9


def test_a_wheel_that_is_asked_for_is_that_of_the_set_itself(
    server: Server, small: Path, cache: Path
) -> None:
    train, _ = opened(server, small, cache, shuffle="wheel:3", cache_limit_gb=LIMIT_GB)
    assert sums(train, 2) == right_sums(small, "wheel:3", 2)[0]


def test_where_all_fits_each_shard_is_fetched_once_and_the_next_run_fetches_none(
    server: Server, small: Path, cache: Path
) -> None:
    for loader in opened(server, small, cache):
        sums(loader, 2)
    assert set(fetched(server).values()) == {1}
    assert len(fetched(server)) == 2 * 48
    server.requests.clear()
    for loader in opened(server, small, cache):
        sums(loader)
    assert not fetched(server)
    assert len(rows_asked(server)) <= OF_FIRST_ROW


def test_a_shard_comes_once_in_a_turn_of_the_ring_and_what_is_needed_soon_stays(
    server: Server, small: Path, cache: Path
) -> None:
    train, _ = opened(server, small, cache, cache_limit_gb=LIMIT_GB)
    in_play = int(shuffle_of(train).removeprefix("wheel:"))
    before = fetched(server)
    n_fetched = []
    for _ in range(3):
        sums(train)
        after = fetched(server)
        of_epoch = after - before
        before = after
        n_fetched.append(of_epoch.total())
        assert max(of_epoch.values()) <= 2
        assert sum(n == 2 for n in of_epoch.values()) <= 2 * in_play  # two files a shard
    n_read = 2 * len(set(train.dataset.rows // SETTINGS.rows_per_shard))  # type: ignore[attr-defined]
    assert sum(n_fetched[1:]) < 0.8 * 2 * n_read
    assert len(rows_asked(server)) <= OF_FIRST_ROW


def test_two_ranks_have_every_shard_fetched_once(
    server: Server, small: Path, cache: Path, nursery: Nursery
) -> None:
    url = server.url(small.name)
    how = {"world": 2, "cache_limit_gb": ROOMY_GB}
    both = [nursery.start(url, cache, 2, 0, rank=rank, **how) for rank in range(2)]
    for rank, process in enumerate(both):
        assert process.ended(60) == 0, process.said()
        said, _ = process.said()
        found = batches_in(said)
        right = right_sums(small, "full", 2, rank=rank, world=2)
        for (which, epoch, step), each in found.items():
            assert right[which][epoch][step] == each
        assert len(found) == sum(len(epoch) for loader in right for epoch in loader)
    assert set(fetched(server).values()) == {1}


def test_several_sets_are_read_through_one_cache(
    server: Server, small: Path, cache: Path, other: Path
) -> None:
    with serving_set(small, other) as both:
        urls = [both.url(small.name), both.url(other.name)]
        for limit_gb in (ROOMY_GB, LIMIT_GB):
            train, val = create_dataloaders(urls, cache_dir=cache, cache_limit_gb=limit_gb, **HOW)
            found = [sums(train, 2), sums(val, 2)]
            local = create_dataloaders([small, other], shuffle=shuffle_of(train), **HOW)
            assert found == [sums(loader, 2) for loader in local]
            while shard_bytes_in(cache) > limit_gb * 1e9:  # what an earlier run left goes soon
                time.sleep(0.02)


def test_a_set_of_this_machine_beside_one_that_lies_elsewhere(
    server: Server, small: Path, cache: Path, other: Path
) -> None:
    paths = [server.url(small.name), open_set(other)]
    train, _ = create_dataloaders(paths, cache_dir=cache, cache_limit_gb=LIMIT_GB, **HOW)
    local, _ = create_dataloaders([small, other], shuffle=shuffle_of(train), **HOW)
    assert sums(train, 2) == sums(local, 2)


# ------------------------------------------------------------------- loaders as people use them


def test_an_epoch_that_is_left_early_and_one_begun_elsewhere(
    server: Server, small: Path, cache: Path
) -> None:
    train, val = opened(server, small, cache, cache_limit_gb=LIMIT_GB)
    right = right_sums(small, shuffle_of(train), 8)
    assert sum_of(next(iter(train))) == right[0][0][0]
    assert [sum_of(batch) for batch in train] == right[0][0]  # again: it was left
    train.set_epoch(7, 5)
    assert [sum_of(batch) for batch in train] == right[0][7][5:]
    train.set_epoch(2)
    for (mine, other), wanted in zip(
        zip(train, val, strict=False), zip(right[0][2], right[1][0], strict=False), strict=False
    ):
        assert (sum_of(mine), sum_of(other)) == wanted
    train.set_epoch(2)
    first = iter(train)
    next(first)
    assert [sum_of(batch) for batch in iter(train)] == right[0][2]
    with pytest.raises(RuntimeError, match="make two loaders"):
        next(first)
    assert len(rows_asked(server)) <= OF_FIRST_ROW  # wherever it begins, who fetches is told first


def test_loaders_that_are_made_again_take_the_place_of_those_before(
    server: Server, small: Path, cache: Path
) -> None:
    before, _ = opened(server, small, cache, cache_limit_gb=LIMIT_GB)
    right = right_sums(small, shuffle_of(before), 1)[0]
    begun = iter(before)
    found = [sum_of(next(begun)) for _ in range(3)]
    after, _ = opened(server, small, cache, cache_limit_gb=LIMIT_GB, seed=1)
    assert sums(after) == right_sums(small, shuffle_of(after), 1, seed=1)[0]
    assert found + [sum_of(batch) for batch in begun] == right[0]


@pytest.mark.parametrize("limit_gb", [ROOMY_GB, LIMIT_GB])
def test_loaders_of_other_fields_take_the_place_of_those_before_which_read_on(
    limit_gb: float,
    server: Server,
    small: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields: list[tuple[str, ...]] = [("rgb",), ("rgb", "depth"), ("rgb",)]
    loaders = []
    for each in fields:
        how = {"fields": each, "target": "scene"}
        train, _ = opened(server, small, cache, cache_limit_gb=limit_gb, **how)
        expected = right_sums(small, shuffle_of(train), 1, **how)[0]
        assert sums(train) == expected
        loaders.append((train, expected))
    assert "loaders of other fields that were made before" in capsys.readouterr().err
    for train, (expected,) in loaders:
        train.set_epoch(0)
        assert [sum_of(batch) for batch in train] == expected


def test_a_dataset_outlives_its_loaders(server: Server, small: Path, cache: Path) -> None:
    train, _ = opened(server, small, cache, cache_limit_gb=LIMIT_GB)
    next(iter(train))
    dataset = train.dataset
    del train, _
    assert has_ended(cache)
    local = ShardDataset(small, target="depth", split="train")
    for position in range(len(local)):
        assert sum_of(dataset[position]) == sum_of(local[position])  # type: ignore[index]


def test_rows_of_a_set_that_nobody_fetches_are_read_one_by_one(
    server: Server, small: Path, cache: Path
) -> None:
    train, _ = opened(server, small, cache)
    found = train.dataset.shard_set  # type: ignore[attr-defined]
    del train, _
    gc.collect()
    before = len(server.requests)
    there = ShardDataset(found, split="all", fields=("rgb",), target="semantic")
    here = ShardDataset(small, split="all", fields=("rgb",), target="semantic")
    for position in (0, 17, N_ROWS - 1):
        assert sum_of(there[position]) == sum_of(here[position])
    assert len(server.requests) > before


def test_a_set_in_a_bucket(other: Path, cache: Path) -> None:
    buckets = pytest.importorskip("helpers.buckets", reason="needs s3fs and moto")
    with buckets.serving_buckets() as (client, requests):
        bucket = buckets.Bucket(client, "sets", requests)
        for path in other.iterdir():
            bucket.put(f"{other.name}/{path.name}", path.read_bytes())
        address = bucket.address(other.name)
        train, _ = create_dataloaders(address, cache_dir=cache, cache_limit_gb=ROOMY_GB, **HOW)
        alone = ShardDataset(train.dataset.shard_set, target="depth")  # type: ignore[attr-defined]
        assert sum_of(alone[3]) == sum_of(ShardDataset(other, target="depth")[3])
        assert sums(train) == right_sums(other, "full", 1)[0]


def test_pickles_copies_and_forked_children_read_the_same_rows(
    server: Server, small: Path, cache: Path
) -> None:
    train, _ = opened(server, small, cache, cache_limit_gb=LIMIT_GB)
    right = right_sums(small, shuffle_of(train), 2)[0]
    begun = iter(train)
    next(begun)
    assert sums(pickle.loads(pickle.dumps(train))) == right[:1]
    assert sums(deepcopy(train)) == right[:1]
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if sums(train) == right[:1] else 3
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert [sum_of(batch) for batch in begun] == right[0][1:]


class Fails(Exception):
    pass


def fails(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    raise Fails


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_transform_raises_comes_out_and_leaves_nothing(
    workers: int, server: Server, small: Path, cache: Path
) -> None:
    train, val = opened(server, small, cache, transform=fails, num_workers=workers)
    with pytest.raises(Fails):
        next(iter(train))
    assert sums(val) == right_sums(small, "full", 1)[1]
    del train, val
    assert has_ended(cache)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_while_a_shard_is_waited_for_ends_everything(
    workers: int, server: Server, small: Path, cache: Path, nursery: Nursery
) -> None:
    server.silent_after = 30  # within the first shards
    how = {"num_workers": workers, "cache_limit_gb": ROOMY_GB}
    process = nursery.start(server.url(small.name), cache, 1, 0, **how)
    while len(server.requests) <= server.silent_after and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.ended(30) == 130, process.said()
    assert "done" not in process.said()[0]
    assert has_ended(cache)
    assert not list(cache.glob("*/.*.tmp"))


# --------------------------------------------------------------------------------- what is refused


def test_too_small_a_limit_is_refused_with_one_that_works(
    server: Server, small: Path, cache: Path
) -> None:
    with pytest.raises(CacheTooSmall) as caught:
        opened(server, small, cache, cache_limit_gb=1e-6)
    needed = caught.value.needed_bytes / 1e9
    train, _ = opened(server, small, cache, cache_limit_gb=needed)
    assert sums(train, 2) == right_sums(small, shuffle_of(train), 2)[0]
    assert len(rows_asked(server)) <= OF_FIRST_ROW


def test_a_folder_with_files_of_others_is_refused_and_keeps_them(
    server: Server, small: Path, cache: Path
) -> None:
    folder = cache / open_set(small).manifest.fingerprint
    folder.mkdir(parents=True)
    (folder / "rgb-00000.npy").write_bytes(b"mine")
    with pytest.raises(WrongPlace, match="holds files that are not of a cache"):
        opened(server, small, cache)
    assert [path.name for path in folder.iterdir() if path.name[0] != "."] == ["rgb-00000.npy"]
    (folder / "rgb-00000.npy").rename(folder / f".{MARK}.of-a-writer-that-was-killed.tmp")
    train, _ = opened(server, small, cache)
    assert sums(train) == right_sums(small, "full", 1)[0]


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.gcsfuse"])
def test_a_folder_that_is_on_a_network_is_refused(
    kind: str, server: Server, small: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    table = cache.parent / "mountinfo"
    table.write_text(f"1 0 0:1 / {cache} rw shared:1 - {kind} server:/data rw\n")
    monkeypatch.setattr(mounted, "MOUNTS", table)
    with pytest.raises(WrongPlace, match=r"over a network. Choose a folder on a disk"):
        opened(server, small, cache)
    assert list(cache.iterdir()) == []


def test_nothing_is_removed_from_a_folder_that_has_lost_its_mark(
    server: Server, small: Path, cache: Path
) -> None:
    for loader in opened(server, small, cache):
        sums(loader)
    folder = folder_of(cache)
    train, _ = opened(server, small, cache, cache_limit_gb=LIMIT_GB)
    (folder / MARK).unlink()
    names = {path.name for path in folder.glob("*.npy")}
    sums(train)
    assert names <= {path.name for path in folder.glob("*.npy")}


def test_a_second_training_is_refused_where_shards_have_to_go(
    server: Server, small: Path, cache: Path
) -> None:
    opened(server, small, cache)
    gc.collect()
    other = Reader(job="another", feed=7, fields="depth,rgb", removes=False, pid=4711)
    reading = begin_reading(folder_of(cache), other)
    train, _ = opened(server, small, cache)  # nothing goes: both may read
    assert sums(train) == right_sums(small, "full", 1)[0]
    with pytest.raises(CacheInUse, match="process 4711"):
        opened(server, small, cache, cache_limit_gb=LIMIT_GB)
    reading.close()


def test_a_second_training_is_refused_where_it_reads_other_fields(
    server: Server, small: Path, cache: Path
) -> None:
    opened(server, small, cache)
    gc.collect()
    other = Reader(job="another", feed=7, fields="rgb", removes=False, pid=4711)
    reading = begin_reading(folder_of(cache), other)
    with pytest.raises(CacheInUse, match="process 4711"):
        opened(server, small, cache)
    reading.close()
    train, _ = opened(server, small, cache)
    assert sums(train) == right_sums(small, "full", 1)[0]


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_zarr_set_is_read_through_a_cache_unless_it_is_compressed(
    codec: str, other: Path, cache: Path, tmp_path: Path
) -> None:
    pytest.importorskip("zarr", reason="needs zarr")
    packed = repack(other, tmp_path / "packed", "zarr", codec)
    if codec == "none":
        train, _ = create_dataloaders(packed, cache_dir=cache, cache_limit_gb=ROOMY_GB, **HOW)
        assert sums(train) == right_sums(other, "full", 1)[0]
    else:
        with pytest.raises(UserError, match="is compressed: it cannot be read in part"):
            create_dataloaders(packed, cache_dir=cache, cache_limit_gb=ROOMY_GB, **HOW)


# ---------------------------------------------------------------------------------- what is damaged


def test_a_shard_that_is_cut_short_is_fetched_anew_and_one_of_the_right_size_is_trusted(
    server: Server, small: Path, cache: Path
) -> None:
    for loader in opened(server, small, cache):
        sums(loader)
    folder = folder_of(cache)
    short = folder / "rgb-00003.npy"
    short.write_bytes(short.read_bytes()[:-1])
    flip(folder / "depth-00005.npy", -1)
    server.requests.clear()
    del loader
    gc.collect()
    found = [sums(loader) for loader in opened(server, small, cache)]
    assert fetched(server) == {f"/{small.name}/rgb-00003.npy": 1}
    wrong = copied(small, cache.parent / "wrong")
    flip(wrong / "depth-00005.npy", -1)
    assert found == right_sums(wrong, "full", 1) != right_sums(small, "full", 1)


def test_what_was_there_before_the_machine_was_started_anew_is_read_and_fetched_anew_where_wrong(
    server: Server, small: Path, cache: Path
) -> None:
    for loader in opened(server, small, cache):
        sums(loader)
    folder = folder_of(cache)
    flip(folder / "depth-00005.npy", -1)
    n_shards = CacheState.n_shards((folder / STATE).stat().st_size)
    CacheState(folder / STATE, n_shards, writes=True).numbers[START] += 1
    server.requests.clear()
    del loader
    gc.collect()
    found = [sums(loader) for loader in opened(server, small, cache)]
    assert fetched(server) == {f"/{small.name}/depth-00005.npy": 1}
    assert found == right_sums(small, "full", 1)


def test_a_shard_that_is_removed_under_a_training_is_one_line(
    server: Server, small: Path, cache: Path
) -> None:
    train, val = opened(server, small, cache)
    sums(val)
    for path in folder_of(cache).glob("rgb-*.npy"):
        path.unlink()
    with pytest.raises(DamagedSet, match=r"rgb-000.*is missing"):
        sums(train)


def test_a_shard_that_is_wrong_where_the_set_lies_ends_a_training_with_one_line(
    server: Server, small: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"/{small.name}/rgb-00040.npy"
    data = bytearray(server.files[name])
    data[-5] ^= 1
    server.files[name] = bytes(data)
    words = ["--data", server.url(small.name), "--cache", cache, "--cache-limit", "0.01"]
    words += ["--out", tmp_path / "run", "--epochs", "1", "--batch-size", "4", "--width", "4"]
    words += ["--size", "0", "--num-workers", "0"]
    assert main([str(word) for word in words]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "rgb-00040.npy has other content than the manifest has" in last


@pytest.mark.parametrize("workers", [0, 2])
def test_where_fetching_has_failed_every_loader_says_so(
    workers: int, server: Server, small: Path, cache: Path
) -> None:
    for name in [name for name in server.files if "depth-0004" in name]:
        del server.files[name]
    train, val = opened(server, small, cache, num_workers=workers)
    for loader in (train, val, train):
        with pytest.raises(StoreFailed, match=r"depth-0004\d.npy is missing"):
            sums(loader)
    assert not fetchers(cache)


@pytest.mark.parametrize("damaged", [0, 1])
def test_where_fetching_one_of_several_sets_has_failed_their_loader_says_so(
    damaged: int, small: Path, other: Path, cache: Path
) -> None:
    with serving_set(small, other) as both:
        sets = [small, other]
        del both.files[f"/{sets[damaged].name}/depth-00003.npy"]
        urls = [both.url(each.name) for each in sets]
        train, _ = create_dataloaders(urls, cache_dir=cache, cache_limit_gb=ROOMY_GB, **HOW)
        with pytest.raises(StoreFailed, match=r"depth-00003.npy is missing"):
            sums(train)
