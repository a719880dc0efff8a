"""Paths of a table lead to files, members of archives and addresses; none leads out of its root."""

import io
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPO
from helpers.servers import Server, serving

from convert.sources import archives, roots
from convert.sources.archives import Archive, TarArchive, ZipArchive
from convert.sources.errors import BadRow
from convert.sources.roots import Roots
from shards.errors import StoreFailed, UserError, WrongSetting, WrongSource
from stores import http, mounted


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounted, "PAUSES", (0.001, 0.002))
    monkeypatch.setattr(http, "PAUSES", (0.001, 0.002))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a table's files, and one beside it that is not theirs."""
    files = {
        "table/rgb/1.jpg": b"one",
        "table/rgb/a b%20#1.jpg": b"odd",
        "table/r\\2.jpg": b"backslash",
        "table/empty.png": b"",
        "other/depth/1.png": b"deep",
        "other/rgb/1.jpg": b"other",
        "secret": b"secret",
    }
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("rgb/1.jpg", b"one"),
        ("./rgb//1.jpg", b"one"),
        ("/rgb/1.jpg", b"one"),  # as BTS's lists have it
        ("rgb/../rgb/1.jpg", b"one"),
        ("rgb\\1.jpg", b"one"),  # a table from Windows
        ("\\rgb\\1.jpg", b"one"),
        ("r\\2.jpg", b"backslash"),  # but a file of that very name comes first
        ("rgb/a b%20#1.jpg", b"odd"),
    ],
)
def test_a_path_is_relative_to_the_table(path: str, data: bytes, place: Path) -> None:
    found = Roots(place / "table")
    assert found.read("rgb", path) == data
    assert found.file("rgb", path).read_bytes() == data


def test_an_absolute_path_is_taken_where_it_exists(place: Path) -> None:
    assert Roots(place / "table").read("rgb", str(place / "other/rgb/1.jpg")) == b"other"


def test_a_root_is_for_all_fields_or_for_one(place: Path) -> None:
    given = [str(place / "other"), f"rgb={place / 'table'}"]
    found = Roots(place, given)
    assert found.read("depth", "depth/1.png") == b"deep"
    assert found.read("rgb", "rgb/1.jpg") == b"one"
    assert found.fields == ("rgb",)
    one_alone = Roots(place / "table", [f"depth={place / 'other'}"])
    assert one_alone.read("rgb", "rgb/1.jpg") == b"one"
    assert one_alone.read("depth", "depth/1.png") == b"deep"


def test_a_folder_with_an_equals_sign_is_no_field(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "table").rename(place / "day=1")
    monkeypatch.chdir(place)
    assert Roots(place, ["day=1"]).read("rgb", "rgb/1.jpg") == b"one"


def test_a_root_is_found_again_from_another_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    found = Roots(Path("table"), ["depth=other"])
    monkeypatch.chdir("/")
    assert found.read("rgb", "rgb/1.jpg") == b"one"
    assert found.read("depth", "depth/1.png") == b"deep"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("rgb/2.jpg", "rgb/2.jpg is missing"),
        ("RGB/1.jpg", "is missing"),
        ("rgb/1.jpg/x", "is missing"),
        ("C:\\rgb\\9.jpg", "is missing"),
        ("x" * 5000, "is missing"),
        ("a\0b", "is missing"),
        ("\ud800", "is missing"),
        ("empty.png", "is empty"),
        ("rgb", "is no plain file"),
        ("", "is no plain file"),
        ("pipe", "is no plain file"),
        ("socket", "is "),
        ("/dev/zero", "is no plain file"),
        ("../secret", "leaves"),
        ("rgb/../../secret", "leaves"),
        ("..\\secret", "leaves"),
        ("link", "leaves"),
        ("linked/1.png", "leaves"),
        ("loop", "is missing"),
        ("rgb/..", "is no plain file"),
    ],
)
def test_what_is_no_file_of_the_root_fails_the_row(
    path: str, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = place / "table"
    os.mkfifo(table / "pipe")
    monkeypatch.chdir(table)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    (table / "link").symlink_to(place / "secret")
    (table / "linked").symlink_to(place / "other/depth")
    (table / "loop").symlink_to("loop")
    found = Roots(table)
    for read in (found.read, found.file):
        for _ in range(2):  # what is remembered of folders changes nothing
            with pytest.raises(BadRow, match=said):
                read("rgb", path)


def test_links_are_followed_inside_the_root_and_everywhere_where_that_is_wanted(
    place: Path,
) -> None:
    table = place / "table"
    (table / "inner").symlink_to("rgb")
    (table / "inner.jpg").symlink_to("rgb/1.jpg")
    (table / "link").symlink_to(place / "secret")
    (table / "linked").symlink_to(place / "other/depth")
    found = Roots(table)
    assert found.read("rgb", "inner/1.jpg") == found.read("rgb", "inner.jpg") == b"one"
    everywhere = Roots(table, follow=True)
    assert everywhere.read("rgb", "link") == everywhere.read("rgb", "../secret") == b"secret"
    assert everywhere.read("rgb", "linked/1.png") == b"deep"


def test_a_root_that_is_a_link_is_as_good_as_any(place: Path) -> None:
    (place / "short").symlink_to("table")
    assert Roots(place, [str(place / "short")]).read("rgb", "rgb/1.jpg") == b"one"


def test_a_large_file_is_not_taken_into_memory(place: Path) -> None:
    with open(place / "table/large.png", "wb") as file:
        file.truncate(roots.MAX_FILE_BYTES + 1)
    with pytest.raises(BadRow, match="larger than 512 MB"):
        Roots(place / "table").read("rgb", "large.png")
    assert Roots(place / "table").file("rgb", "large.png") == place / "table/large.png"


def test_a_root_that_is_gone_is_no_fault_of_a_row(place: Path) -> None:
    """A mount that dropped out has no files: 50,000 rows are not missing for that."""
    found = Roots(place / "table")
    (place / "table").rename(place / "away")
    with pytest.raises(StoreFailed, match="is not there any more"):
        found.read("rgb", "rgb/1.jpg")


def test_a_mount_that_drops_out_is_tried_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open
    n_failures = [2]

    def fail(path: str, *args: int) -> int:
        if n_failures[0]:
            n_failures[0] -= 1
            raise OSError(5, "Input/output error", path)
        return opened(path, *args)

    found = Roots(place / "table")
    monkeypatch.setattr(roots.os, "open", fail)
    assert found.read("rgb", "rgb/1.jpg") == b"one"
    n_failures[0] = 99
    with pytest.raises(StoreFailed, match="EIO"):
        found.read("rgb", "rgb/1.jpg")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere"], "root nowhere: there is no such folder or archive"),
        (["depth=nowhere"], "root depth=nowhere: there is no such"),
        (["x.tar.gz"], "root x.tar.gz: it cannot be read in place: unpack it"),
        (["x.tgz"], "cannot be read in place"),
        (["file.txt"], "choose a folder, a URL, a .zip or a .tar"),
        (["s3://bucket/x"], "http:// and https:// are read"),
        (["http://"], "that is no address"),
        (["https://host/x.zip"], "fetch it first"),
        ([".", "."], "one is given for that already"),
        (["depth=.", "depth=/"], "one is given for that already"),
    ],
)
def test_what_can_be_no_root_is_a_wrong_setting(
    given: list[str], said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    for name in ("x.tar.gz", "x.tgz", "file.txt"):
        (place / name).write_bytes(b"x")
    with pytest.raises(WrongSetting) as caught:
        Roots(place, given)
    assert said in str(caught.value)


# ---------------------------------------------------------------- archives

MEMBERS = {
    "rgb/1.jpg": b"one",
    "rgb/a b%20#1.jpg": b"odd" * 999,
    "depth/1.png": random.Random(0).randbytes(70_000),
    "status/2014-12-18_11:31:54.txt": b"a colon",
    "räume/küche.png": b"umlaut",
    "日本.png": b"japan",
    "x" * 300 + "/long.png": b"long",
}
COMPRESSIONS = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}


class Unseekable(io.BytesIO):
    """What a zip is streamed into: sizes stand behind each member."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


def zipped(
    members: dict[str, bytes],
    compression: int = zipfile.ZIP_DEFLATED,
    file: io.BytesIO | None = None,
) -> bytes:
    sink = file or io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as archive:
        archive.mkdir("rgb")
        for name, data in members.items():
            archive.writestr(name, data)
    return sink.getvalue()


def tarred(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def zipped_64(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """As zipfile writes what is larger than 4 GB: all numbers in the further fields."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    data = zipped(MEMBERS)
    assert b"PK\x06\x06" in data
    monkeypatch.undo()
    return data


FORMS: dict[str, Callable[[], bytes]] = {
    "stored.zip": lambda: zipped(MEMBERS, zipfile.ZIP_STORED),
    "deflated.zip": lambda: zipped(MEMBERS),
    "STREAMED.ZIP": lambda: zipped(MEMBERS, file=Unseekable()),
    "behind a program.zip": lambda: b"#!/bin/sh\n" * 50 + zipped(MEMBERS),
    "zip64.zip": lambda: zipped_64(pytest.MonkeyPatch()),
    "zip64 behind a program.zip": lambda: b"#" * 99 + zipped_64(pytest.MonkeyPatch()),
    "gnu.tar": lambda: tarred(MEMBERS),
    "pax.tar": lambda: tarred(MEMBERS, tarfile.PAX_FORMAT),
}


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def opened(path: Path) -> Archive:
    return ZipArchive(path) if path.suffix.lower() == ".zip" else TarArchive(path)


@pytest.mark.parametrize("form", FORMS)
def test_members_are_read_in_place(form: str, tmp_path: Path) -> None:
    path = written(tmp_path, form, FORMS[form]())
    found = Roots(tmp_path, [str(path)])
    for name, data in MEMBERS.items():
        assert found.read("rgb", name) == data
        assert found.read("rgb", f"/./{name}") == data
    assert found.read("rgb", "rgb\\1.jpg") == b"one"
    for name, said in (
        ("rgb/2.jpg", "is not in"),
        ("../rgb/1.jpg", "leaves its root"),
        ("rgb", "not in"),
    ):
        with pytest.raises(BadRow, match=said):
            found.read("rgb", name)
    with pytest.raises(BadRow, match="unpack it first"):
        found.file("depth", "depth/1.mat")
    found.close()


@pytest.mark.parametrize("form", ["deflated.zip", "gnu.tar"])
def test_the_one_folder_that_all_members_are_in_may_be_left_out(form: str, tmp_path: Path) -> None:
    members = {f"./SUNRGBD/{name}": data for name, data in MEMBERS.items()}
    members["__MACOSX/._x"] = b"x"
    path = tmp_path / form
    if form == "gnu.tar":
        path.write_bytes(tarred(members))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    found = opened(path)
    for name, data in MEMBERS.items():
        assert found.read(name) == found.read(f"SUNRGBD/{name}") == data
    assert len(found) == len(members)


def test_of_two_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    tar = written(tmp_path, "x.tar", tarred({"a": b"first", "./a": b"last"}))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a", b"first")
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a", b"last")
    assert TarArchive(tar).read("a") == ZipArchive(tmp_path / "x.zip").read("a") == b"last"


def test_names_that_a_zip_does_not_say_the_encoding_of_are_found(tmp_path: Path) -> None:
    """Old programs of Windows write cp437, those of others UTF-8, both without a word."""
    data = zipped({"kueche.png": b"a", "k??che.png": b"b", "windows\\1.png": b"c"})
    data = data.replace(b"kueche", b"k\x81\x81che").replace(b"k??che", "küche".encode())
    archive = ZipArchive(written(tmp_path, "x.zip", data))
    assert archive.read("küüche.png") == b"a"
    assert archive.read("küche.png") == b"b"
    assert archive.read("windows/1.png") == b"c"


def test_an_archive_travels_to_another_process_with_its_list(tmp_path: Path) -> None:
    path = written(tmp_path, "x.zip", FORMS["deflated.zip"]())
    found = Roots(tmp_path, [f"rgb={path}", f"depth={path}"])
    found.read("rgb", "rgb/1.jpg")
    (tmp_path / "roots").write_bytes(pickle.dumps(found))
    code = (
        "import pickle, sys, zlib; from convert.sources.archives import ZipArchive\n"
        "ZipArchive._list = None  # it is not listed again\n"
        "found = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(zlib.crc32(found.read('depth', 'depth/1.png')))\n"
        "assert found._of_field['rgb'] is found._of_field['depth']"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "roots"], cwd=REPO, capture_output=True, text=True
    )
    assert ran.stdout.strip() == str(zlib.crc32(MEMBERS["depth/1.png"])), ran.stderr


@pytest.mark.parametrize("make", [zipped, tarred])
def test_a_list_of_many_members_is_small(
    make: Callable[[dict[str, bytes]], bytes], tmp_path: Path
) -> None:
    members = {
        f"scene_{k % 7}/frame_{k:09d}.png": b"%d" % k for k in range(archives.BLOCK_MEMBERS + 9)
    }
    archive = opened(written(tmp_path, f"x.{make.__name__[:3]}", make(members)))
    assert len(archive) == len(members)
    assert archive.nbytes == len(members) * 32
    assert 286_000 * 32 < 10e6
    for k in (0, 1, 8191, 8192, 8200):
        assert archive.read(f"scene_{k % 7}/frame_{k:09d}.png") == b"%d" % k


@pytest.mark.parametrize("form", ["x.zip", "x.tar"])
def test_an_archive_that_is_written_to_meanwhile_is_said(form: str, tmp_path: Path) -> None:
    make = zipped if form == "x.zip" else tarred
    path = written(tmp_path, form, make(MEMBERS))
    archive = opened(path)
    archive.read("rgb/1.jpg")
    path.write_bytes(make({**MEMBERS, "more": b"more"}))
    with pytest.raises(WrongSource, match="was changed while it was read"):
        archive.read("rgb/1.jpg")


SMALL = {"a/1.png": b"one" * 20, "a/2.png": b"", "b.png": random.Random(1).randbytes(50)}


@pytest.mark.parametrize("make", [zipped, tarred])
def test_an_archive_that_is_not_whole_is_refused_when_it_is_opened(
    make: Callable[[dict[str, bytes]], bytes], tmp_path: Path
) -> None:
    whole = make(SMALL)
    # A tar ends in zeros, of which the first block is enough.
    n_needed = len(whole) if make is zipped else len(whole.rstrip(b"\0")) // 512 * 512 + 1024
    step = 7 if make is zipped else 256
    for n_bytes in range(0, min(n_needed, len(whole)), step):
        with pytest.raises(WrongSource):
            opened(written(tmp_path, f"x.{make.__name__[:3]}", whole[:n_bytes]))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_damaged_byte_of_a_zip_never_gives_other_bytes(compression: str, tmp_path: Path) -> None:
    whole = zipped(SMALL, COMPRESSIONS[compression])
    rng = random.Random(2)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= rng.randrange(1, 256)
        path = written(tmp_path, "x.zip", bytes(damaged))
        for name, data in SMALL.items():
            try:
                archive = ZipArchive(path)
                found = archive.read(name)
                archive.close()
            except (BadRow, WrongSource):
                continue
            assert found == data


def test_a_damaged_byte_of_a_tar_is_an_error_or_other_bytes_but_no_other_exception(
    tmp_path: Path,
) -> None:
    """A tar has sums of its headers alone."""
    whole = tarred(SMALL)
    rng = random.Random(3)
    for place in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[place] ^= rng.randrange(1, 256)
        path = written(tmp_path, "x.tar", bytes(damaged))
        for name in SMALL:
            try:
                TarArchive(path).read(name)
            except (BadRow, WrongSource):
                continue


def with_entry(data: bytes, offset: int, value: bytes) -> bytes:
    """A zip with these bytes in the first entry of its central directory."""
    place = data.index(b"PK\1\2") + offset
    return data[:place] + value + data[place + len(value) :]


ONE = {"a.png": b"a" * 5000}


def zipped_alone(compression: int) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as archive:
        for name, data in ONE.items():
            archive.writestr(name, data)
    return sink.getvalue()


WRONG_MEMBERS = {
    "encrypted": (lambda d: with_entry(d, 8, b"\1\0"), "is encrypted"),
    "other method": (lambda _: zipped_alone(zipfile.ZIP_BZIP2), "packed by method 12"),
    "a bomb": (lambda d: with_entry(d, 24, struct.pack("<L", 100)), "is damaged"),
    "more than it is": (lambda d: with_entry(d, 24, struct.pack("<L", 6000)), "is damaged"),
    "too large": (lambda d: with_entry(d, 24, struct.pack("<L", 600 << 20)), "larger than 512 MB"),
    "another sum": (lambda d: with_entry(d, 16, b"1234"), "is damaged"),
    "another place": (
        lambda d: with_entry(d, 42, b"\7\0\0\0"),
        "does not begin where the list says",
    ),
    "another name": (lambda d: d.replace(b"a.png", b"b.png", 1), "another name stands there"),
    "empty": (lambda _: zipped({"a.png": b""}), "is empty"),
}


@pytest.mark.parametrize("case", WRONG_MEMBERS)
def test_a_member_that_cannot_be_read_fails_its_row(case: str, tmp_path: Path) -> None:
    change, said = WRONG_MEMBERS[case]
    path = written(tmp_path, "x.zip", change(zipped_alone(zipfile.ZIP_DEFLATED)))
    with pytest.raises(BadRow, match=said):
        ZipArchive(path).read("a.png")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_a_link_or_sparse_file_in_a_tar_is_refused_alone(kind: bytes, tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("odd")
        info.type = kind
        info.linkname = "/etc/passwd"
        archive.addfile(info)
        info = tarfile.TarInfo("right")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
    found = TarArchive(written(tmp_path, "x.tar", sink.getvalue()))
    with pytest.raises(BadRow, match="unpack it"):
        found.read("odd")
    assert found.read("right") == b"one"


def test_a_compressed_tar_under_a_plain_name_is_said(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    with pytest.raises(WrongSource, match="is no plain tar, or not whole"):
        Roots(tmp_path, [str(written(tmp_path, "x.tar", sink.getvalue()))])


# ---------------------------------------------------------------- web servers


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.files.update(
            {
                "/data/rgb/1.jpg": b"one",
                "/data/rgb/a%20b%2520%231.jpg": b"odd",
                "/data/empty": b"",
                "/data/s?token=1": b"signed",
                "/secret": b"secret",
            }
        )
        yield server


def test_files_of_a_server_are_read_under_its_address(server: Server, tmp_path: Path) -> None:
    found = Roots(tmp_path, [server.url("data/")])
    assert found.read("rgb", "rgb/1.jpg") == found.read("rgb", "/rgb/1.jpg") == b"one"
    assert found.read("rgb", "rgb/a b%20#1.jpg") == b"odd"
    assert Roots(tmp_path, [server.url("data?token=1")]).read("rgb", "s") == b"signed"
    assert Roots(tmp_path, [f"depth={server.url('data')}"]).read("depth", "rgb/1.jpg") == b"one"
    n_before = len(server.requests)
    found.read("rgb", "rgb/1.jpg")
    assert len(server.requests) == n_before + 1


def test_a_path_that_is_an_address_is_read_whatever_the_root(
    server: Server, tmp_path: Path
) -> None:
    assert Roots(tmp_path).read("rgb", server.url("data/rgb/1.jpg")) == b"one"
    assert Roots(tmp_path).read("rgb", server.url("data/rgb/a%20b%2520%231.jpg")) == b"odd"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("rgb/2.jpg", "is missing"),
        ("../secret", "leaves its root"),
        ("empty", "is empty"),
        ("http://", "is no address"),
        ("http://[", "is no address"),
    ],
)
def test_what_a_server_does_not_have_fails_the_row(
    path: str, said: str, server: Server, tmp_path: Path
) -> None:
    found = Roots(tmp_path, [server.url("data")])
    with pytest.raises(BadRow, match=said):
        found.read("rgb", path)
    with pytest.raises(BadRow, match="fetch it first"):
        found.file("rgb", "rgb/1.jpg")


def test_a_server_that_fails_is_asked_again_and_then_fails_the_task(
    server: Server, tmp_path: Path
) -> None:
    found = Roots(tmp_path, [server.url("data")])
    server.fail_next = [503, 500]
    assert found.read("rgb", "rgb/1.jpg") == b"one"
    server.drop_after = 1
    server.drop_once = True
    server.requests.clear()
    assert found.read("rgb", "rgb/1.jpg") == b"one"
    server.fail_next = [503] * 9
    with pytest.raises(StoreFailed, match="503"):
        found.read("rgb", "rgb/1.jpg")
    server.fail_next = [403]
    with pytest.raises(StoreFailed, match="403"):
        found.read("rgb", "rgb/1.jpg")
    server.fail_next = [410]
    with pytest.raises(BadRow, match="is missing"):
        found.read("rgb", "rgb/1.jpg")


def test_a_server_that_is_not_there_fails_the_task(tmp_path: Path) -> None:
    with serving() as server:
        url = server.url("data")
    with pytest.raises(StoreFailed, match="cannot be read"):
        Roots(tmp_path, [url]).read("rgb", "rgb/1.jpg")


def test_a_server_without_ranges_is_read_too(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ranges = False
    found = Roots(tmp_path, [server.url("data")])
    assert found.read("rgb", "rgb/1.jpg") == b"one"
    with pytest.raises(BadRow, match="is empty"):
        found.read("rgb", "empty")
    monkeypatch.setattr(roots, "MAX_FILE_BYTES", 2)
    with pytest.raises(BadRow, match="larger than"):
        found.read("rgb", "rgb/1.jpg")


def test_errors_of_roots_are_a_users(place: Path) -> None:
    assert issubclass(StoreFailed, UserError)
    assert not issubclass(BadRow, UserError | OSError | ValueError)
