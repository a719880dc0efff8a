"""Stores: a file is there whole or not at all, whatever the place answers on the way."""

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from shards import files
from shards.errors import IncompleteCopy, RemoteSet, StoreFailed, UserError
from stores import mounted
from stores.base import Store
from stores.local import LocalStore
from stores.mounted import MountedStore


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounted, "PAUSES", (0.001, 0.002, 0.003))


@pytest.mark.parametrize("kind", [LocalStore, MountedStore])
def test_what_is_put_is_there_by_name_in_ranges_and_until_it_is_deleted(
    tmp_path: Path, kind: type
) -> None:
    store: Store = kind(tmp_path)
    written = store.put("rgb/c/0", b"0123456789")
    assert written.n_bytes == 10
    assert store.put("a.npy", memoryview(b"")).n_bytes == 0
    assert store.name == tmp_path.name
    assert str(store) == str(tmp_path)
    assert (store.size("rgb/c/0"), store.size("a.npy"), store.size("b")) == (10, 0, -1)
    assert store.size("a.npy/c") == -1
    assert store.read("rgb/c/0") == b"0123456789"
    assert store.read("rgb/c/0", 3, 5) == b"34"
    assert store.read("rgb/c/0", 8, 20) == b"89"
    assert sorted(store.sizes()) == ["a.npy", "rgb/c/0"]
    assert store.free_bytes() > 0
    (tmp_path / "rgb" / "c" / ".1.99.tmp").write_text("left by a killed copy")
    store.remove_unfinished()
    store.delete("a.npy")
    store.delete("a.npy")
    assert list(store.sizes()) == ["rgb/c/0"]


def test_what_a_mount_forgot_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = []

    def forgetful(source: Path, target: Path) -> None:
        if not replaced:
            os.truncate(source, 2)
        replaced.append(target)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", forgetful)
    MountedStore(tmp_path).put("a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert len(replaced) == 2


def test_a_mount_that_forgets_every_time_is_told_as_an_incomplete_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(source: Path, target: Path) -> None:
        os.truncate(source, 2)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", forgetful)
    with pytest.raises(IncompleteCopy, match="writing a gave other content"):
        MountedStore(tmp_path).put("a", b"content")


class Piecemeal:
    """A file on a busy mount: nothing the first time, then two bytes at once."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb", buffering=0)
        self.n_reads = 0

    def __enter__(self) -> "Piecemeal":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def seek(self, *place: int) -> int:
        return self.file.seek(*place)

    def read(self, n_bytes: int) -> Any:
        self.n_reads += 1
        return self.file.read(min(2, n_bytes))


def test_a_mount_that_gives_little_at_once_gives_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"01234")
    monkeypatch.setattr(files, "open_plain", Piecemeal)
    assert MountedStore(tmp_path).read("a") == b"01234"
    assert MountedStore(tmp_path).read("a", 1, 4) == b"123"


def test_a_mount_that_gives_nothing_for_now_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"01234")
    opened = []

    class Busy(Piecemeal):
        def read(self, n_bytes: int) -> Any:
            return None if len(opened) == 1 else super().read(n_bytes)

    def open_busy(path: Path) -> Busy:
        opened.append(path)
        return Busy(path)

    monkeypatch.setattr(files, "open_plain", open_busy)
    assert MountedStore(tmp_path).read("a") == b"01234"
    assert len(opened) == 2


def test_what_was_given_up_is_not_tried_again_by_whoever_called() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise OSError(errno.EIO, "as a mount does")

    with pytest.raises(StoreFailed, match="EIO 4 times while inside"):
        mounted.patiently(lambda: mounted.patiently(fails, "inside"), "outside")
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (StoreFailed("it is full", "Free space", full=True), {"full": True, "gone": False}),
        (StoreFailed("it is gone", gone=True), {"full": False, "gone": True}),
        (IncompleteCopy("2 files", missing=["a", "b"]), {"missing": ("a", "b"), "full": False}),
        (RemoteSet("drive/set", "fuse.drivefs"), {"path": "drive/set", "kind": "fuse.drivefs"}),
    ],
)
def test_an_error_of_a_store_has_its_facts_in_another_process_too(
    error: UserError, facts: dict[str, Any]
) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert {name: getattr(copy, name) for name in facts} == facts
