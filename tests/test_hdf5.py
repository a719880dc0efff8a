"""One thread owns HDF5, in every stack; what it cannot read is not told as to be fetched again."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import REPO
from helpers.servers import serving
from helpers.sets import FIELDS, SMALL, convert, repack

from convert.resize import nearest
from convert.sample import write_sample
from convert.session import SetRequest, prepare
from convert.sources.hdf5 import HDF5
from convert.sources.nyu import NyuSource
from convert.sources.nyu_mat import KEYS, LOOK_FIRST, sampled_identity
from shards.errors import DamagedSource, UserError, WrongSetting
from shards.spec import ConversionSettings
from stores import http as remote

# As a conversion does, only more often: text, chunks that only HDF5 can unpack, and indexes.
HAMMER = """
import sys, threading
from pathlib import Path
import numpy as np
from convert.sources.nyu import NyuSource
from convert.sources.nyu_mat import Mat
from shards.spec import KNOWN_FIELDS, ConversionSettings

mat = NyuSource(Path(sys.argv[1]), ConversionSettings())
fields = Mat(Path(sys.argv[1]), tuple(KNOWN_FIELDS))
columns = mat.row_facts().columns
packed = fields.reader("instance")
packed.read_index()
instances = packed.read_group(0)
offsets = {}
wrong = []

def again(n, work):
    try:
        for _ in range(n):
            work()
    except BaseException as error:
        wrong.append(repr(error))

def read_text():
    found = mat.row_facts().columns
    if any(not np.array_equal(found[name], columns[name]) for name in columns):
        wrong.append("a column changed")

def read_chunks():
    if not np.array_equal(packed.read_group(0), instances):
        wrong.append("a chunk changed")

def read_indexes():
    for name in ("rgb", "depth", "raw_depth", "label"):
        reader = fields.reader(name)
        reader.read_index()
        if not np.array_equal(offsets.setdefault(name, reader.index.offset), reader.index.offset):
            wrong.append(f"the index of {name} changed")

work = [(12, read_text)]
work += [(400, read_chunks), (400, read_chunks)]
work += [(120, read_indexes), (120, read_indexes)]
threads = [threading.Thread(target=again, args=each) for each in work]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
mat.close()
sys.exit("; ".join(wrong[:3]) or 0)
"""


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many strings and chunks: what the threads meet over."""
    path = tmp_path_factory.mktemp("many") / "rooms.mat"
    write_sample(path, 300, size_wh=(40, 32))
    with h5py.File(path, "r+") as file:
        values = file["instances"][()]
        del file["instances"]
        file.create_dataset("instances", data=values, chunks=values.shape, compression="lzf")
    return path


@pytest.mark.races
def test_indexes_beside_text_are_right_however_many_threads_ask(many_rows: Path) -> None:
    """A process of its own: where HDF5 is called by two threads it does not always live to tell."""
    done = subprocess.run(
        [sys.executable, "-c", HAMMER, many_rows], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])


def test_a_conversion_calls_h5py_from_one_thread_only(mat: Path, tmp_path: Path) -> None:
    """Chunks in a filter that only HDF5 knows are read too, for several threads that decode."""
    path = Path(shutil.copy(mat, tmp_path / "x.mat"))
    with h5py.File(path, "r+") as file:
        values = file["labels"][()]
        del file["labels"]
        file.create_dataset("labels", data=values, chunks=(1, 16, 48), compression="lzf")
    seen = set[str]()
    inside = os.path.join(os.path.dirname(h5py.__file__), "")

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(inside):
            seen.add(threading.current_thread().name)

    HDF5.run(sys.setprofile, note)
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        convert(path, tmp_path / "out", SMALL, workers=3)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        HDF5.run(sys.setprofile, None)
    assert len(seen) == 1
    assert seen.pop().startswith("hdf5")


def test_a_fork_waits_for_the_call_under_way() -> None:
    """Else the child would hold HDF5 half-way through it."""
    begun, go_on = threading.Event(), threading.Event()
    call = HDF5.submit(lambda: (begun.set(), go_on.wait(30)))
    assert begun.wait(30)
    threading.Timer(0.5, go_on.set).start()
    child = os.fork()
    if not child:
        os._exit(0 if HDF5.run(lambda: 7) == 7 else 1)  # a thread of its own
    assert call.done() or call.result(5)
    assert go_on.is_set()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.races
def test_a_child_forked_in_the_middle_of_a_call_converts_by_itself(
    mat: Path, small_set: Path, tmp_path: Path
) -> None:
    reading = NyuSource(mat, ConversionSettings())
    stop = threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            reading.row_facts()

    thread = threading.Thread(target=read_on)
    thread.start()
    try:
        for k in range(8):
            child = os.fork()
            if not child:
                signal.alarm(60)  # one that waits for ever ends as a failure
                made = convert(mat, tmp_path / str(k), SMALL, 1)
                same = all(
                    (made / p.name).read_bytes() == p.read_bytes() for p in small_set.glob("*.npy")
                )
                os._exit(0 if same else 3)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()
        reading.close()


# ---------------------------------------------------------------- what is blamed on the file


def damage_chunk(path: Path, key: str, row: int) -> None:
    with h5py.File(path, "r+") as file:
        file[key].id.write_direct_chunk((row, *(0,) * (file[key].ndim - 1)), b"not what zlib makes")


@pytest.mark.parametrize("row", [0, 7, 35])
def test_a_damaged_chunk_names_its_row_and_asks_to_compare_the_md5_first(
    mat: Path, tmp_path: Path, row: int
) -> None:
    path = Path(shutil.copy(mat, tmp_path / "x.mat"))
    damage_chunk(path, "depths", row)
    with pytest.raises(
        DamagedSource, match=rf"depths row {row}: a compressed chunk is damaged"
    ) as error:
        convert(path, tmp_path / "out", SMALL)
    assert error.value.source == str(path)
    assert error.value.right == LOOK_FIRST
    assert str(error.value).endswith(LOOK_FIRST)


def test_an_error_of_this_program_blames_no_file(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives as what it is."""

    def broken(*_: object) -> np.ndarray:
        raise TypeError("a fault of ours")

    monkeypatch.setattr("convert.resize.nearest", broken)
    with pytest.raises(TypeError, match="a fault of ours"):
        convert(mat, tmp_path, SMALL)


def test_a_disk_that_does_not_answer_blames_the_disk(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pread

    def failing(handle: int, n_bytes: int, offset: int) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(5, "Input/output error")
        return real(handle, n_bytes, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(UserError, match=r"could not be read \(.*Input/output error\)") as error:
        convert(mat, tmp_path, SMALL)
    assert "fetch" not in str(error.value)
    assert "md5" not in str(error.value)


def test_a_chunk_of_absurd_size_is_named_by_its_row(mat: Path, tmp_path: Path) -> None:
    """Those that pack worst are looked at first: they are named in their turn all the same."""
    path = Path(shutil.copy(mat, tmp_path / "x.mat"))
    with h5py.File(path, "r+") as file:
        file["depths"].id.write_direct_chunk((20, 0, 0), b"x" * 200_000)
    with pytest.raises(UserError, match="depths row 20: a chunk claims 200000 compressed bytes"):
        convert(path, tmp_path / "out", SMALL)


def test_bombs_in_every_chunk_are_one_line_and_are_never_unpacked(
    mat: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(mat, tmp_path / "x.mat"))
    with h5py.File(path, "r+") as file:
        bomb = zlib.compress(bytes(16 << 20), 9)
        dset = file["depths"].id
        places = [dset.get_chunk_info(k).chunk_offset for k in range(dset.get_num_chunks())]
        for place in places:
            dset.write_direct_chunk(place, bomb)
    for module in ("nothing", "deflate"):  # with libdeflate, and without
        code = f"import sys; sys.modules[{module!r}] = None; "
        code += "from convert.__main__ import main; main(); "
        code += (
            "from convert.machine import memory_of; import os; print(memory_of([os.getpid()]) or 0)"
        )
        words = [sys.executable, "-c", code, "run", str(path), "--out", str(tmp_path / module)]
        done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
        assert "depths: none of the chunks that were looked at can be unpacked" in done.stderr
        assert "Traceback" not in done.stderr
        # Not ru_maxrss, which counts the parent that forked.
        assert int(done.stdout.split()[-1]) < 200 << 20


def test_a_field_that_is_the_same_everywhere_is_read_right(mat: Path, tmp_path: Path) -> None:
    """Its chunks would be found with the user block and without: HDF5 reads them."""
    path = Path(shutil.copy(mat, tmp_path / "x.mat"))
    with h5py.File(path, "r+") as file:
        file["instances"][...] = 3
        shape = file["instances"].shape
        del file["rawDepths"]
        file.create_dataset("rawDepths", shape, "<f4", chunks=(1, 2, 8), compression="gzip")
        file["rawDepths"][...] = 2.5
        file["rawDepths"][35, 63, 47] = 2.75
    made = convert(path, tmp_path / "out", SMALL)
    rows = rows_of(made)
    assert set(np.unique(rows["instance"])) == {3}
    assert set(np.unique(rows["raw_depth"])) == {2500, 2750}


def test_a_crop_that_does_not_fit_blames_the_crop(mat: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WrongSetting, match=r"crop eigen: .* box of 640x480 pictures, those of .* 64x48"
    ) as error:
        convert(mat, tmp_path, ConversionSettings(crop="eigen"))
    assert "md5" not in str(error.value)


def test_verify_against_a_source_that_was_damaged_since_is_one_line(
    tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = tmp_path / "x.mat"
    write_sample(path, 24, size_wh=(320, 240))
    made = convert(path, tmp_path / "out", SMALL)
    before = sampled_identity(path)
    whole = path.read_bytes()
    for place in range(len(whole) // 4, len(whole), 50_000):
        damaged = whole[:place] + b"damage" + whole[place + 6 :]
        path.write_bytes(damaged)
        if sampled_identity(path) == before:  # outside the blocks that it is made from
            whole = damaged
    path.write_bytes(whole)
    done = command("convert", "verify", made, "--against", path, "--rows", "24")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "compare its md5" in done.stderr


# ---------------------------------------------------------------- servers


def test_a_server_that_drops_everything_blames_the_network(
    mat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.002))
    with serving(x_mat=mat.read_bytes()) as server:
        source = remote.RemoteFile(server.url("x.mat"))
        server.drop_after = 0
        with pytest.raises((ConnectionError, UserError)) as error:
            convert(source, tmp_path, SMALL)
    assert "md5" not in str(error.value)
    assert "h5py" not in str(error.value)


@pytest.mark.parametrize("silent_after", [2, 4, 12])
def test_ctrl_c_ends_a_conversion_whose_server_says_nothing_any_more(
    mat: Path, tmp_path: Path, silent_after: int
) -> None:
    with serving(x_mat=mat.read_bytes()) as server:
        server.silent_after = silent_after
        words = [
            sys.executable,
            "-m",
            "convert",
            "run",
            server.url("x.mat"),
            "--out",
            str(tmp_path / "out"),
        ]
        with subprocess.Popen(words, cwd=REPO, stderr=subprocess.PIPE, text=True) as process:
            while len(server.requests) <= silent_after:
                assert process.poll() is None, process.communicate()
                time.sleep(0.01)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///x", "http://x:abc/", "http://[::1", "http://ü..x/", "x", "ftp://x/y"],
)
def test_what_is_no_address_is_said_at_once(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no address of a file"):
        remote.RemoteFile(url)


# ---------------------------------------------------------------- axes


def other_order(path: Path, mat: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    shutil.copy(mat, path)
    with h5py.File(path, "r+") as file:
        for key in KEYS.values():
            values = change(file[key][()])
            del file[key]
            file.create_dataset(key, data=values, chunks=(1, *values.shape[1:]), compression="gzip")
    return path


def rows_of(made: Path) -> dict[str, np.ndarray]:
    return {
        name: np.concatenate([np.load(p) for p in sorted(made.glob(f"{name}-*.npy"))])
        for name in FIELDS
    }


@pytest.mark.parametrize("axes", ["auto", "hw"])
def test_pictures_stored_in_the_other_order_give_the_same_bytes(
    mat: Path, small_set: Path, tmp_path: Path, axes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = other_order(tmp_path / "hw.mat", mat, lambda values: values.swapaxes(-1, -2))
    made = convert(
        path, tmp_path / "out", ConversionSettings(size=32, rows_per_shard=10, axes=axes)
    )
    for file in small_set.glob("*.npy"):
        assert (made / file.name).read_bytes() == file.read_bytes()
    assert "taken as height x width" in capsys.readouterr().err
    # The same set whether it was said or seen.
    assert made.name == convert(path, tmp_path / "out", SMALL).name


def test_axes_that_were_said_and_seen_find_the_same_set_everywhere(
    mat: Path, tmp_path: Path
) -> None:
    said = ConversionSettings(size=32, rows_per_shard=10, axes="wh")
    path = Path(shutil.copy(mat, tmp_path / "x.mat"))
    (tmp_path / "drive").mkdir()
    made = prepare(
        SetRequest(root=tmp_path / "here", settings=said, source=path, drive=tmp_path / "drive")
    )
    assert list((tmp_path / "drive").glob("*.zarr/manifest.json"))
    assert repack(made, tmp_path / "zarr", "zarr", "none").suffix == ".zarr"
    path.unlink()
    assert convert(path, tmp_path / "here", said) == made
    assert (
        prepare(SetRequest(root=tmp_path / "there", settings=said, drive=tmp_path / "drive")).name
        == made.name
    )


def test_axes_that_the_pictures_contradict_are_refused(mat: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongSetting, match=r"axes hw: .*wider than tall: choose wh, or auto"):
        convert(mat, tmp_path, ConversionSettings(size=32, axes="hw"))


def test_square_pictures_need_axes_and_the_two_answers_are_each_others_transpose(
    mat: Path, tmp_path: Path
) -> None:
    path = other_order(tmp_path / "square.mat", mat, lambda values: values[..., :48, :])
    with pytest.raises(
        WrongSetting, match=r"axes auto: .*: choose wh \(as MATLAB writes pictures\), or hw"
    ):
        convert(path, tmp_path / "out", SMALL)
    made = [
        convert(path, tmp_path / "out", ConversionSettings(size=32, rows_per_shard=10, axes=a))
        for a in ("wh", "hw")
    ]
    assert made[0] != made[1]
    one, other = (rows_of(directory) for directory in made)
    for name in FIELDS:
        if name == "rgb":  # it is averaged across first, then down
            assert np.abs(one[name].astype(int) - other[name].swapaxes(-1, -2)).max() <= 1
        else:
            np.testing.assert_array_equal(one[name], other[name].swapaxes(-1, -2))
    with h5py.File(path) as file:
        np.testing.assert_array_equal(one["label"][0], nearest(file["labels"][0], 32))


def test_a_verify_against_the_source_knows_the_axes(
    mat: Path, tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = other_order(tmp_path / "square.mat", mat, lambda values: values[..., :48, :])
    made = convert(
        path, tmp_path / "out", ConversionSettings(size=32, rows_per_shard=10, axes="hw")
    )
    done = command("convert", "verify", made, "--against", path)
    assert done.returncode == 0, done.stderr
    (made / "depth-00000.npy").write_bytes(b"")
    assert "--axes hw" in command("convert", "verify", made).stderr  # the command that mends it


# ---------------------------------------------------------------- signals


def test_a_hang_up_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup. It is sent again and again while the conversion goes on to its end."""
    write_sample(tmp_path / "x.mat", 24, size_wh=(640, 480))
    words = [
        sys.executable,
        "-m",
        "convert",
        "run",
        str(tmp_path / "x.mat"),
        "--out",
        str(tmp_path / "out"),
    ]
    words += ["--rows-per-shard", "4"]
    how: dict[str, Any] = {
        "cwd": REPO,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(["nohup", *words], **how) as process:
        sent = 0
        while process.poll() is None:
            if list(tmp_path.glob("out/*/receipt-*")):
                process.send_signal(signal.SIGHUP)
                sent += 1
            time.sleep(0.005)
        assert sent > 0
        assert process.returncode == 0, process.communicate()
