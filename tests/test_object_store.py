"""Sets in a bucket (moto's server, over HTTP), on a web server and in fsspec's memory."""

import json
import os
import pickle
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("RangeHTTPServer", reason="needs rangehttpserver")

from helpers.buckets import KEY_ID, SECRET, Bucket, Requests, serving_buckets
from helpers.commands import REPO, conversion
from helpers.servers import serving
from helpers.sets import committed, convert, repack
from RangeHTTPServer import RangeRequestHandler

from convert import pipeline
from convert.__main__ import main
from convert.sample_frames import write_frames
from convert.transfer import push
from shards.addresses import without_secrets
from shards.dataset import StoredSet, open_in, open_set, verify
from shards.errors import OtherBytes, StoreFailed, UserError, WrongPlace
from shards.files import FileEntry
from shards.flags import as_flag
from shards.manifest import MANIFEST, PROVENANCE
from shards.spec import Codecs, ConversionSettings
from stores import backends, http, object_store
from stores.base import Store
from stores.object_store import ObjectStore
from stores.places import folder_at, resolve_in, root_at, store_at
from stores.web import WebFolder

# Each request takes the server 10 ms: few shards, few fields.
FEW = ConversionSettings(fields=("rgb", "depth"), size=8, rows_per_shard=10)
AS_FEW = ("--fields", "rgb,depth", "--size", 8, "--rows-per-shard", 10)
BUCKETS = count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, Requests]]:
    with serving_buckets() as found:
        yield found


@pytest.fixture
def bucket(server: tuple[Any, Requests]) -> Bucket:
    client, requests = server
    requests.asked.clear()
    return Bucket(client, f"bucket-{next(BUCKETS)}", requests)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL", reason="needs pillow")
    path = tmp_path_factory.mktemp("frames") / "rooms"
    write_frames(path, 10, sizes_wh=((40, 32),))
    return path


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PAUSES", (0.001, 0.002, 0.003))
    monkeypatch.setattr(http, "PAUSES", (0.001, 0.002, 0.003))


@pytest.fixture(scope="module")
def few_set(mat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(mat, tmp_path_factory.mktemp("few"), FEW)


def tried(*words: object) -> int:
    """The status of a command line, in this process."""
    try:
        return main([str(word) for word in words])
    except SystemExit as error:  # a mistake in it
        return int(error.code or 0)


def to_bucket(source: Path, bucket: Bucket, *more: object) -> list[str]:
    """The command line of a conversion into it."""
    words = conversion(source, Path(), *more)
    words[words.index("--out") + 1] = bucket.address()
    return words


def opened(address: str) -> StoredSet:
    return open_in(resolve_in(folder_at(address)))


# ----------------------------------------------------------------------------------- one store


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_what_is_put_is_there_by_name_in_ranges_and_until_it_is_deleted(
    bucket: Bucket, kind: str
) -> None:
    store: Store = store_at(bucket.address("a/b") if kind == "s3" else "memory://of-this-test/b")
    assert store.sizes() == {}
    written = store.put("rgb/c/0", b"01234", memoryview(b"56789"))
    assert written == FileEntry(
        10, "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    )
    assert store.put("a.npy", b"").n_bytes == 0
    assert store.name == "b"
    assert (store.size("rgb/c/0"), store.size("a.npy"), store.size("rgb"), store.size("b")) == (
        *(10, 0),
        *(-1, -1),
    )
    assert store.read("rgb/c/0") == b"0123456789"
    assert store.read("rgb/c/0", 3, 5) == b"34"
    assert store.read("rgb/c/0", 8, 20) == b"89"
    assert store.read("rgb/c/0", 30, 40) == b""
    assert store.read("a.npy") == b""
    assert store.sizes() == {"a.npy": 0, "rgb/c/0": 10}
    assert store.read("rgb/c/0") == b"0123456789"  # by its listed size
    store.remove_unfinished()
    store.delete("a.npy", "none")
    store.delete("a.npy")
    assert list(store.sizes() or ()) == ["rgb/c/0"]
    again = pickle.loads(pickle.dumps(store.child("rgb")))
    assert again.read("c/0") == b"0123456789"
    assert len(pickle.dumps(store)) < 200
    assert isinstance(store, ObjectStore)
    assert 10 < store.n_requests < 25


def test_a_large_object_is_one_request_there_and_ranges_back(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(object_store, "RANGE_BYTES", 1 << 20)
    data = np.random.default_rng(0).bytes(9 << 20)
    store = ObjectStore(bucket.address())
    entry = store.put("rgb-00000.npy", data)
    assert bucket.requests.count("PUT", "rgb-00000.npy") == 1
    assert bucket.requests.count("POST") == 0
    assert store.what_is_wrong("rgb-00000.npy", entry) is None
    store.download("rgb-00000.npy", tmp_path / "a", entry)
    assert (tmp_path / "a").read_bytes() == data
    bucket.put("sets/rgb-00000.npy", data[:-1] + b"!")
    assert "SHA-256" in str(store.what_is_wrong("rgb-00000.npy", entry))
    for wrong in (data[:-1], data + b"!"):  # by no more than a byte
        bucket.put("sets/rgb-00000.npy", wrong)
        assert f"has {len(wrong)} bytes" in str(store.what_is_wrong("rgb-00000.npy", entry))


def test_an_object_is_created_once_and_other_bytes_are_an_error(bucket: Bucket) -> None:
    store = ObjectStore(bucket.address())
    for each in (store, store, ObjectStore(bucket.address())):
        each.put("a.npy", b"right")
    for other in (b"wrong", b"of another length"):
        with pytest.raises(OtherBytes) as caught:
            store.put("a.npy", other)
    assert bucket.get("sets/a.npy") == b"right"
    assert "a.npy holds other bytes already" in str(caught.value)
    assert "repair=True" in str(caught.value)
    assert "--repair" in caught.value.told(as_flag)
    ObjectStore(bucket.address(), replaces=True).put("a.npy", b"wrong")
    assert bucket.get("sets/a.npy") == b"wrong"


def test_of_an_object_without_a_checksum_the_bytes_are_compared(bucket: Bucket) -> None:
    bucket.put("sets/a.npy", b"right")
    store = ObjectStore(bucket.address())
    store.put("a.npy", b"right")
    with pytest.raises(OtherBytes):
        store.put("a.npy", b"wrong")


def test_where_the_answer_to_a_put_is_lost_the_object_is_taken_as_ours(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = backends.S3Backend.put
    lost = []

    def loses(self: Any, *args: Any, **more: Any) -> None:
        put(self, *args, **more)
        if not lost:
            lost.append(args)
            raise TimeoutError("no answer")

    monkeypatch.setattr(backends.S3Backend, "put", loses)
    ObjectStore(bucket.address()).put("a.npy", b"right")
    assert lost
    assert bucket.get("sets/a.npy") == b"right"


def test_how_a_set_was_made_may_be_written_again(bucket: Bucket) -> None:
    store = ObjectStore(bucket.address())
    for name in (PROVENANCE, "failed.csv", "receipt-00000.json"):
        store.put(name, b"once")
        store.put(name, b"again")
        assert bucket.get(f"sets/{name}") == b"again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_reads_and_writes_by_connections_of_its_own(bucket: Bucket) -> None:
    store = ObjectStore(bucket.address())
    store.put("a", b"of the parent")
    pid = os.fork()
    if not pid:
        try:
            is_right = store.read("a") == b"of the parent"
            store.put("b", b"of the child")
            os._exit(0 if is_right else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert store.read("b") == b"of the child"


def answer(status: int, code: str) -> Exception:
    from botocore.exceptions import ClientError

    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    cause = ClientError(response, "GetObject")  # type: ignore[arg-type]
    error = OSError("as s3fs translates it")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("status", "code", "is_tried_again"),
    [
        *((500, "InternalError", True), (503, "SlowDown", True), (429, "", True)),
        *((400, "RequestTimeout", True), (409, "ConditionalRequestConflict", True)),
        *((403, "AccessDenied", False), (404, "NoSuchBucket", False), (400, "Bad", False)),
        (301, "PermanentRedirect", False),
    ],
)
def test_what_passes_is_known_by_its_status_and_code(
    status: int, code: str, is_tried_again: bool
) -> None:
    assert backends.passes(answer(status, code)) is is_tried_again


def test_a_body_that_is_cut_passes_whatever_its_status_says() -> None:
    """aiohttp gives such an error one that its server never sent."""
    from aiohttp.http_exceptions import ContentLengthError

    error = OSError("as s3fs translates it")
    error.__cause__ = ContentLengthError("not enough data")
    assert backends.passes(error)
    assert backends.passes(ContentLengthError("not enough data"))


@pytest.mark.parametrize(("code", "n_tries"), [("SlowDown", 4), ("AccessDenied", 1)])
def test_what_fails_each_time_is_one_line_and_what_cannot_pass_is_tried_once(
    code: str, n_tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fails(self: Any, *args: Any) -> None:
        asked.append(args)
        raise answer(503 if n_tries > 1 else 403, code)

    monkeypatch.setattr(backends.S3Backend, "find", fails)
    with pytest.raises(StoreFailed) as caught:
        ObjectStore("s3://bucket/sets").sizes()
    assert len(asked) == n_tries
    assert str(caught.value).startswith("s3://bucket/sets: listing it failed")
    assert code in str(caught.value)


def test_a_bucket_that_is_not_there_is_one_line(
    bucket: Bucket, mat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tried("run", mat, "--out", "s3://no-such-bucket/sets", "--size", 8) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "NoSuchBucket" in last
    assert last.endswith("Make that bucket, or mend its name, then: the same command")


# ------------------------------------------------------------------------------------ conversions


@pytest.mark.parametrize(
    ("kind", "codecs"), [("mat", None), ("frames", {"rgb": "none", "depth": "zstd"})]
)
def test_a_set_in_a_bucket_is_byte_for_byte_the_one_on_a_disk(
    bucket: Bucket, mat: Path, frames: Path, tmp_path: Path, kind: str, codecs: Codecs
) -> None:
    source = {"mat": mat, "frames": frames}[kind]
    local = convert(source, tmp_path, FEW, codecs=codecs)
    address = pipeline.convert(source, bucket.address(), FEW, codecs=codecs)
    assert address == f"{bucket.address()}/{local.name}"
    found = bucket.content(address)
    del found[PROVENANCE]
    assert found == committed(local)
    there = opened(bucket.address())  # the only one in it
    assert [name for name, problem in verify(there) if problem] == []
    here = open_set(local)
    for field in here.manifest.fields:
        for ours, theirs in zip(there.shards(field), here.shards(field), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(there.row(field, 7), here.row(field, 7))
    assert list(there.texts("rgb_file")) == list(here.texts("rgb_file"))
    assert json.loads(there.folder.read(PROVENANCE))["source_path"] == str(source)
    assert pipeline.convert(source, bucket.address(), FEW, codecs=codecs) == address


def test_a_conversion_asks_for_each_object_once_and_lists_twice(bucket: Bucket, mat: Path) -> None:
    address = pipeline.convert(mat, bucket.address(), FEW)
    requests = bucket.requests
    n_objects = len(bucket.content(address))
    n_receipts = 4
    assert requests.count("PUT", "/sets/") == n_objects + n_receipts
    assert requests.count("POST") == 2  # failed.csv, and the receipts at the end
    n_manifest = requests.count("HEAD", MANIFEST)
    # An empty listing is asked thrice by s3fs.
    assert requests.count("GET", "list-type=2") <= 4
    assert n_manifest <= 2
    assert requests.count("HEAD") <= n_manifest + 1


def test_a_command_that_was_killed_leaves_whole_objects_and_goes_on(
    bucket: Bucket, mat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = convert(mat, tmp_path, replace(FEW, rows_per_shard=2))
    line = ("--fields", "rgb,depth", "--size", 8, "--rows-per-shard", 2)
    there = f"{bucket.address()}/{local.name}"
    with subprocess.Popen(to_bucket(mat, bucket, *line), cwd=REPO, stderr=-1) as process:
        while bucket.requests.count("PUT", "/receipt-") < 3:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.002)
        process.kill()
    found = bucket.content(there)
    receipts = {name for name in found if name.startswith("receipt-")}
    expected = committed(local)
    assert MANIFEST not in found
    assert all(found[name] == expected[name] for name in found.keys() - receipts)
    with pytest.raises(UserError, match="conversion did not finish"):
        opened(there)
    bucket.requests.asked.clear()
    assert tried("run", mat, "--out", bucket.address(), *line) == 0
    assert f"{len(receipts)} of 18 shards are done already" in capsys.readouterr().err
    assert bucket.requests.count("PUT", "/rgb-") <= 18 - len(receipts)
    found = bucket.content(there)
    del found[PROVENANCE]
    assert found == expected


def test_two_writers_at_once_end_in_one_right_set(bucket: Bucket, mat: Path, few_set: Path) -> None:
    words = to_bucket(mat, bucket, *AS_FEW)
    start = partial(subprocess.Popen, words, cwd=REPO, stdout=-1, stderr=-1, text=True)
    both = [start(), start()]
    for process in both:
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert out.splitlines()[-1] == f"{bucket.address()}/{few_set.name}"
    found = bucket.content(f"{bucket.address()}/{few_set.name}")
    expected = committed(few_set)
    assert {name: found[name] for name in expected} == expected
    # Of the slower one, of a shard that the other had done: no part of the set.
    left = {f"receipt-{k:05d}.json" for k in range(4)}
    assert found.keys() - {*expected, PROVENANCE} <= left


def test_other_bytes_in_the_place_of_a_shard_stay_unless_it_is_repaired(
    bucket: Bucket, mat: Path, few_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = few_set.name
    other = b"of somebody else"
    bucket.put(f"sets/{name}/depth-00003.npy", other)
    line = ("run", mat, "--out", bucket.address(), *AS_FEW)
    assert tried(*line) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "depth-00003.npy holds other bytes already" in told
    assert "--repair" in told
    assert bucket.get(f"sets/{name}/depth-00003.npy") == other
    assert f"sets/{name}/{MANIFEST}" not in bucket.names()
    assert tried(*line, "--repair") == 0
    found = bucket.content(f"{bucket.address()}/{name}")
    del found[PROVENANCE]
    assert found == committed(few_set)


def test_a_damaged_set_is_told_and_mended_where_it_lies(
    bucket: Bucket, mat: Path, few_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = committed(few_set)
    address = str(push(open_set(few_set), store_at(bucket.address())).address)
    name = address.removeprefix(f"s3://{bucket.name}/")
    bucket.put(f"{name}/rgb-00001.npy", expected["rgb-00001.npy"][::-1])
    bucket.delete(f"{name}/rows-scene.npy")
    bucket.put(f"{name}/notes.txt", b"mine")
    assert tried("verify", bucket.address()) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    for part in ("rgb-00001.npy has other content", "rows-scene.npy is missing", "notes.txt"):
        assert part in told
    assert f"--out {bucket.address()} --repair" in told
    assert tried("inspect", address) == 2
    assert "is missing" in capsys.readouterr().err.splitlines()[-1]
    assert pipeline.convert(mat, bucket.address(), FEW, repair=True) == address
    found = bucket.content(address)
    assert found.pop("notes.txt") == b"mine"
    del found[PROVENANCE]
    assert found == expected


def test_rows_that_failed_are_tried_again_once_they_are_mended(
    bucket: Bucket, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their shards hold other bytes then, and are of a set that was never finished."""
    source = tmp_path / "rooms.csv"
    broken = next(path for path in frames.rglob("rgb/**/*") if path.is_file())
    whole = broken.read_bytes()
    assert tried("table", frames, "--out", source) == 0
    line = ("run", source, "--root", frames, *AS_FEW, "--out")
    assert tried(*line, tmp_path / "right") == 0
    try:
        broken.write_bytes(bytes(len(whole)))
        assert tried(*line, bucket.address()) == 2
        assert "1 of 10 rows cannot be read" in capsys.readouterr().err
    finally:
        broken.write_bytes(whole)
    assert tried(*line, bucket.address()) == 0
    (right,) = (tmp_path / "right").glob("rooms-*")
    found = bucket.content(f"{bucket.address()}/{right.name}")
    del found[PROVENANCE]
    assert found == committed(right)


# --------------------------------------------------------------------------------------- commands


def test_verify_inspect_pull_and_run_take_addresses(
    bucket: Bucket, mat: Path, few_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tried("push", few_set, bucket.address()) == 0
    there = f"{bucket.address()}/{few_set.name}"
    assert capsys.readouterr().out.splitlines()[-1] == there
    expected = committed(few_set)
    found = bucket.content(there)
    assert {name: found[name] for name in expected} == expected
    bucket.requests.asked.clear()
    assert tried("push", few_set, bucket.address()) == 0
    assert bucket.requests.count("PUT", "/sets/") == 1  # how it was made
    assert bucket.requests.count("GET", "/sets/rgb") == 0  # their SHA-256 is asked for

    assert tried("verify", bucket.address(), "--against", mat, "--rows", 3) == 0
    out = capsys.readouterr().out
    assert f"{there}: {len(expected) - 1} files, every byte as the manifest says" in out
    assert tried("inspect", there) == 0
    assert capsys.readouterr().out.startswith(f"{there}\n  rows      36: ")
    assert tried("pull", bucket.address(), tmp_path / "pulled") == 0
    pulled = tmp_path / "pulled" / few_set.name
    assert capsys.readouterr().out.splitlines()[-1] == str(pulled)
    assert committed(pulled) == expected

    packed = bucket.address("packed")
    made = ("--format", "zarr", "--codec", "zstd", *AS_FEW)
    assert tried("run", there, "--out", packed, *made) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{packed}/{few_set.name}.zarr"
    here = repack(few_set, tmp_path / "packed", "zarr", "zstd")
    found = bucket.content(f"{packed}/{few_set.name}.zarr")
    assert {name: found[name] for name in committed(here)} == committed(here)
    assert tried("run", packed, "--out", tmp_path / "unpacked") == 0
    assert committed(tmp_path / "unpacked" / few_set.name) == expected


def test_a_copy_reads_each_object_once(bucket: Bucket, few_set: Path, tmp_path: Path) -> None:
    push(open_set(few_set), store_at(bucket.address()))
    bucket.requests.asked.clear()
    assert tried("run", bucket.address(), "--out", tmp_path) == 0
    assert committed(tmp_path / few_set.name) == committed(few_set)
    shards = [path.name for path in few_set.glob("rgb-*.npy")]
    assert [bucket.requests.count("GET", name) for name in shards] == [1] * len(shards)
    bucket.put(f"sets/{few_set.name}/rgb-00002.npy", (few_set / "rgb-00001.npy").read_bytes())
    assert tried("run", bucket.address(), "--out", tmp_path / "b") == 2


def test_one_row_of_an_uncompressed_set_is_fetched_by_itself(bucket: Bucket, few_set: Path) -> None:
    push(open_set(few_set), store_at(bucket.address()))
    found = opened(bucket.address())
    bucket.requests.asked.clear()
    np.testing.assert_array_equal(found.row("rgb", 17), open_set(few_set).row("rgb", 17))
    assert bucket.requests.count("GET") == 1


def test_a_push_replaces_no_other_set(
    bucket: Bucket, few_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = push(open_set(few_set), store_at(bucket.address())).address
    manifest = bucket.get(f"sets/{few_set.name}/{MANIFEST}")
    other = manifest.replace(b"rgb", b"RGB")
    bucket.put(f"sets/{few_set.name}/{MANIFEST}", other)
    assert tried("push", few_set, bucket.address()) == 2
    assert f"{address}/{MANIFEST} holds other bytes" in capsys.readouterr().err
    assert bucket.get(f"sets/{few_set.name}/{MANIFEST}") == other


def test_several_sets_in_a_bucket_are_named_and_none_is_taken(
    bucket: Bucket, mat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ConversionSettings(fields=("rgb",), size=8, rows_per_shard=36)
    other = ConversionSettings(fields=("rgb",), size=9, rows_per_shard=36)
    both = [pipeline.convert(mat, bucket.address(), each) for each in (few, other)]
    assert tried("verify", bucket.address()) == 2
    told = capsys.readouterr().err
    assert all(address.rpartition("/")[2] in told for address in both)
    assert f"Use {min(both)}" in told
    assert tried("verify", bucket.address("nothing")) == 2
    assert "is not a finished set, nor is one in it" in capsys.readouterr().err


def test_credentials_are_in_no_message_and_no_object(
    bucket: Bucket, mat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("run", mat, "--size", 8, "--rows-per-shard", 36, "--fields", "rgb", "--out")
    assert tried(*line, f"s3://{KEY_ID}:{SECRET}@{bucket.name}/sets") == 2
    assert tried(*line, bucket.address()) == 0
    assert tried("verify", f"https://someone:{SECRET}@127.0.0.1:1/sets/a-8-01234567") == 2
    assert tried("run", f"https://someone:{SECRET[7:]}@127.0.0.1:1/a.mat", "--out", mat.parent) == 2
    assert tried("verify", f"sftp://someone:{SECRET}@host/sets") == 2
    assert tried("pull", bucket.address(), f"s3://{KEY_ID}:{SECRET}@other/sets") == 2
    said = "".join(capsys.readouterr())
    for name in bucket.names():
        said += bucket.get(name).decode(errors="replace")
    for secret in (KEY_ID, SECRET, SECRET[:6], SECRET[7:], "someone"):
        assert secret not in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a@b:c/d", "s3://bucket/a@b:c/d"),
        ("s3://id:se/cr+et@bucket/a", "s3://bucket/a"),
        ("at https://user:pass@host/a?b=c.", "at https://host/a?b=c."),
        ("https://token@host/a", "https://host/a"),
        ("abfs://container@account/a", "abfs://container@account/a"),
        ("https://h/a?X-Amz-Signature=ab12&x=1", "https://h/a?X-Amz-Signature=...&x=1"),
        ("https://h/a?sv=1&sig=a%2Fb", "https://h/a?sv=1&sig=..."),
    ],
)
def test_an_address_is_shown_without_its_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


# ----------------------------------------------------------------------- the web, memory, this disk


class Quiet(RangeRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class WithoutRanges(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(params=[Quiet, WithoutRanges], ids=["ranges", "no ranges"])
def on_the_web(small_set: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    handler = partial(request.param, directory=str(small_set.parent))
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_address[1]}/{small_set.name}"
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


def test_a_set_on_a_web_server_is_verified_pulled_and_copied(
    on_the_web: str,
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stores import web

    monkeypatch.setattr(web, "RANGE_BYTES", 10_000)
    expected = committed(small_set)
    assert tried("verify", on_the_web) == 0
    assert "every byte as the manifest says" in capsys.readouterr().out
    assert tried("pull", on_the_web, tmp_path) == 0
    assert committed(tmp_path / small_set.name) == expected
    assert tried("run", on_the_web, "--out", tmp_path, "--format", "zarr") == 0
    here = repack(small_set, tmp_path / "b", "zarr", "none")
    assert committed(tmp_path / f"{small_set.name}.zarr") == committed(here)
    found = opened(on_the_web)
    np.testing.assert_array_equal(found.row("depth", 35), open_set(small_set).row("depth", 35))


def test_a_web_server_is_only_read(capsys: pytest.CaptureFixture[str], small_set: Path) -> None:
    for line in (
        ("run", small_set, "--out", "https://host/sets"),
        ("push", small_set, "https://host/sets"),
    ):
        assert tried(*line) == 2
        assert "https://host/sets can only be read" in capsys.readouterr().err
    with pytest.raises(WrongPlace, match="can only be read"):
        WebFolder("https://host/sets").put("a", b"")


def test_an_answer_that_was_cut_short_is_asked_for_again(small_set: Path, tmp_path: Path) -> None:
    with serving(a=bytes(range(250))) as server:
        server.drop_after = 100
        server.drop_once = True
        folder = WebFolder(server.url("").rstrip("/"))
        assert folder.read("a") == bytes(range(250))
        assert folder.read("a", 5, 9) == bytes(range(5, 9))
        assert (folder.size("a"), folder.size("b")) == (250, -1)
        server.drop_once = False
        with pytest.raises(StoreFailed, match="reading a failed"):
            folder.read("a", 0, 240)


def test_memory_holds_sets_within_a_process(mat: Path, few_set: Path) -> None:
    address = pipeline.convert(mat, "memory://sets-of-a-test", FEW)
    assert address == f"memory://sets-of-a-test/{few_set.name}"
    there = opened("memory://sets-of-a-test")
    assert [name for name, problem in verify(there) if problem] == []
    files = there.manifest.files
    assert {name: there.folder.read(name) for name in files} == {
        name: (few_set / name).read_bytes() for name in files
    }


def test_an_address_of_this_machine_is_its_path(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tried("run", f"file://{small_set}", "--out", f"file://{tmp_path}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / small_set.name)
    assert str(root_at(f"file://{tmp_path}/a%20b")) == f"{tmp_path}/a b"


def test_a_place_that_shows_halves_is_not_written_to() -> None:
    """As fsspec's own way to write a file does: it is closed by the error that ended it."""
    from fsspec.implementations.local import LocalFileSystem

    assert not backends.Backend(LocalFileSystem()).puts_whole


def test_a_package_that_is_absent_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **more: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", fails)
    with pytest.raises(UserError, match=r"nyuv2-shards\[s3\]"):
        ObjectStore("s3://bucket/sets").sizes()
