"""A row of an array in a MATLAB or HDF5 file is the picture that was put there, upright."""

import errno
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.sources import matlab5
from convert.sources.errors import BadRow
from convert.sources.planes import read_plane, split_reference

RNG = np.random.default_rng(0)
N, H, W = 4, 6, 8
RGB = RNG.integers(0, 256, (N, H, W, 3), dtype=np.uint8)
DEPTH = RNG.random((N, H, W), np.float32)
LABEL = RNG.integers(0, 38, (N, H, W), dtype=np.uint16)


def matlab_7_3(array: np.ndarray) -> np.ndarray:
    """(N, H, W, ...) as MATLAB puts N pictures into HDF5: (N, ..., W, H)."""
    return np.stack([part.T for part in array])


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    path = tmp_path / "nyu.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["images"] = matlab_7_3(RGB)
        file["depths"] = matlab_7_3(DEPTH)
        file["labels"] = matlab_7_3(LABEL)
        file["accelData"] = np.zeros((4, N))
    with path.open("r+b") as opened:
        opened.write(b"MATLAB 7.3 MAT-file")
    return path


@pytest.fixture
def sun(tmp_path: Path) -> Path:
    """As SUNRGBD2Dseg.mat: references to pictures of doubles, in a struct."""
    path = tmp_path / "SUNRGBD2Dseg.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        for name in ("seglabel", "seglabelall"):
            cells = file.create_dataset(f"SUNRGBD2Dseg/{name}", (N, 1), h5py.ref_dtype)
            for row in range(N):
                picture = LABEL[row] + (100 if name == "seglabelall" else 0)
                file[f"#refs#/{name}{row}"] = picture.T.astype(np.float64)
                cells[row, 0] = file[f"#refs#/{name}{row}"].ref
    return path


# ---------------------------------------------------------------- what a cell of a table names


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.mat#7", ("a.mat", "7")),
        ("dir #1/a.MAT#labels[7]", ("dir #1/a.MAT", "labels[7]")),
        ("a.h5#rgb", ("a.h5", "rgb")),
        ("a.hdf5#x/y[3]", ("a.hdf5", "x/y[3]")),
        ("https://host/a.h5#rgb", ("https://host/a.h5", "rgb")),
        ("a.mat", ("a.mat", None)),
        ("a.mat#", ("a.mat#", None)),
        ("a#1.png", ("a#1.png", None)),
        ("a.matter#1", ("a.matter#1", None)),
        ("", ("", None)),
    ],
)
def test_a_reference_is_a_file_and_what_is_meant_of_it(
    path: str, expected: tuple[str, str | None]
) -> None:
    assert split_reference(path) == expected


# ---------------------------------------------------------------- MATLAB 7.3


@pytest.mark.parametrize("row", range(N))
def test_a_row_of_the_labelled_set_is_its_picture(nyu: Path, row: int) -> None:
    np.testing.assert_array_equal(read_plane(nyu, str(row), "rgb", "colour"), RGB[row])
    np.testing.assert_array_equal(read_plane(nyu, str(row), "depth", "depth"), DEPTH[row])
    np.testing.assert_array_equal(read_plane(nyu, str(row), "label", "id"), LABEL[row])
    named = read_plane(nyu, f"depths[{row}]", "anything", "depth")
    np.testing.assert_array_equal(named, DEPTH[row])


def test_a_row_of_suns_labels_is_its_picture(sun: Path) -> None:
    for row in range(N):
        found = read_plane(sun, str(row), "label", "id")
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, LABEL[row])
        every = read_plane(sun, f"SUNRGBD2Dseg/seglabelall[{row}]", "label", "id")
        np.testing.assert_array_equal(every, LABEL[row] + 100)


def test_a_made_up_set_is_read_as_its_own_source_reads_it(mat: Path) -> None:
    with h5py.File(mat, locking=False) as file:
        expected = file["images"][5].transpose(2, 1, 0)
    np.testing.assert_array_equal(read_plane(mat, "5", "rgb", "colour"), expected)


def test_the_only_array_needs_no_name(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    with h5py.File(path, "w") as file:
        file["whatever"] = matlab_7_3(LABEL)
        file["a_number"] = np.ones((1, 1))
        file["text"] = np.full((9, 2), 65, np.uint16)
        file["text"].attrs["MATLAB_class"] = np.bytes_("char")
    np.testing.assert_array_equal(read_plane(path, "2", "label", "id"), LABEL[2])


def test_an_array_of_one_picture_needs_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    with h5py.File(path, "w") as file:
        file["label"] = LABEL[0].T
        file["rgb"] = RGB[0].T
    for what in ("label", "label[0]", "0"):
        np.testing.assert_array_equal(read_plane(path, what, "label", "id"), LABEL[0])
    for what in ("rgb", "0"):
        np.testing.assert_array_equal(read_plane(path, what, "rgb", "colour"), RGB[0])


# ---------------------------------------------------------------- HDF5 of others


def test_axes_of_other_files_lie_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["depth"] = DEPTH[0]
        file["rgb"] = RGB[0].transpose(2, 0, 1)
        file["last"] = RGB[0]
        file["group/labels"] = LABEL
        file["planes"] = RGB.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(read_plane(path, "depth", "depth", "depth"), DEPTH[0])
    for name in ("rgb", "last"):
        np.testing.assert_array_equal(read_plane(path, name, "rgb", "colour"), RGB[0])
    found = read_plane(path, "group/labels[3]", "label", "id")
    np.testing.assert_array_equal(found, LABEL[3])
    np.testing.assert_array_equal(read_plane(path, "planes[2]", "rgb", "colour"), RGB[2])


def test_a_real_picture_of_hypersim_is_a_room() -> None:
    folder = shared("rgbd_samples/hypersim/ai_037_002/images/scene_cam_00_geometry_hdf5")
    found = read_plane(folder / "frame.0000.depth_meters.hdf5", "dataset", "depth", "depth")
    assert (found.shape, found.dtype) == ((768, 1024), np.float16)
    assert 2.9 < np.nanmin(found) < np.nanmax(found) < 13.3


def test_a_real_file_of_fast_depth_has_its_axes() -> None:
    for name, shape in (("1", (6, 4)), ("2", (4, 3))):
        path = shared(f"rgbd_samples/fastdepth_h5/{name}.h5")
        assert read_plane(path, "depth", "depth", "depth").shape == shape
        with pytest.raises(BadRow, match="has samples of type float64"):  # made up, of ones
            read_plane(path, "rgb", "rgb", "colour")


# ---------------------------------------------------------------- MATLAB 5


@pytest.fixture
def matlab_5(tmp_path: Path) -> Path:
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    cells = np.empty((N, 1), object)
    for row in range(N):
        cells[row, 0] = LABEL[row].astype(np.float64)
    arrays = {
        "images": RGB.transpose(1, 2, 3, 0),
        "depths": DEPTH.transpose(1, 2, 0),
        "seglabel": cells,
        "one": LABEL[1],
        "names": np.array(["a", "b"], object),
    }
    path = tmp_path / "a.mat"
    io.savemat(path, arrays, do_compression=True)
    return path


def test_rows_of_matlab_5_are_its_pictures(matlab_5: Path) -> None:
    for row in range(N):
        what = str(row)
        np.testing.assert_array_equal(read_plane(matlab_5, what, "rgb", "colour"), RGB[row])
        np.testing.assert_array_equal(read_plane(matlab_5, what, "depth", "depth"), DEPTH[row])
        np.testing.assert_array_equal(read_plane(matlab_5, what, "label", "id"), LABEL[row])
    np.testing.assert_array_equal(read_plane(matlab_5, "one", "label", "id"), LABEL[1])


def test_a_file_of_matlab_5_that_was_written_again_is_read_again(matlab_5: Path) -> None:
    from scipy.io import savemat

    read_plane(matlab_5, "0", "depth", "depth")
    savemat(matlab_5, {"depths": DEPTH.transpose(1, 2, 0) + 1})
    found = read_plane(matlab_5, "0", "depth", "depth")
    np.testing.assert_array_equal(found, DEPTH[0] + 1)


def test_the_real_split_of_sun_has_no_pictures() -> None:
    path = shared("rgbd_samples/sunrgbd_lists/allsplit.mat")
    for what in ("alltrain[3]", "0", "nothing"):
        with pytest.raises(BadRow):
            read_plane(path, what, "label", "id")


def test_any_array_of_numbers_is_what_scipy_reads(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    arrays = {f"of_{kind}": (LABEL % 100).astype(kind) for kind in (*"bBhHiIqQ", "f4", "f8")}
    arrays["small"] = np.eye(2, dtype=np.uint8)  # of 4 bytes: they lie in the element's head
    arrays["logical"] = LABEL > 9
    for packs in (False, True):
        path = tmp_path / f"{packs}.mat"
        io.savemat(path, arrays, do_compression=packs)
        assert set(matlab5.array_names(path)) == set(arrays)
        for name, expected in arrays.items():
            found = matlab5.read_array(path, name).numbers().T
            assert found.dtype == (np.uint8 if name == "logical" else expected.dtype)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(found, io.loadmat(path)[name])


def test_big_endian_files_are_read(tmp_path: Path) -> None:
    """By hand: MATLAB on such machines is long gone, its files are not."""

    def element(kind: int, body: bytes) -> bytes:
        return struct.pack(">II", kind, len(body)) + body.ljust(-(-len(body) // 8) * 8, b"\0")

    parts = [element(6, struct.pack(">II", 11, 0)), element(5, struct.pack(">ii", H, W))]
    parts += [element(1, b"label"), element(4, LABEL[0].T.astype(">u2").tobytes())]
    path = tmp_path / "a.mat"
    head = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI"
    path.write_bytes(head + element(14, b"".join(parts)))
    np.testing.assert_array_equal(read_plane(path, "label", "label", "id"), LABEL[0])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("what", "field", "kind", "said"),
    [
        ("4", "depth", "depth", "has no row 4: the last one is 3"),
        ("999999999", "rgb", "colour", "has no row 999999999: the last one is 3"),
        ("depths", "depth", "depth", "has 4 rows, and none is named"),
        ("nothing[0]", "depth", "depth", "has no array nothing (there: accelData, depths, images, lab"),
        ("0", "thermal", "grey", "has no array thermal (there: "),
        ("images[0]", "depth", "depth", "is a colour picture, and a depth is one channel"),
        ("images[0]", "label", "id", "is a colour picture: its labels are colours, not ids"),
        ("depths[0]", "label", "id", "has ids that are not whole"),
        ("-1", "depth", "depth", "has no array -1"),
        ("[2]", "normals", "colour", "has no array normals"),
        ("images/x[0]", "rgb", "colour", "has no array images/x"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said(nyu: Path, what: str, field: str, kind: str, said: str) -> None:
    with pytest.raises(BadRow) as caught:
        read_plane(nyu, what, field, kind)
    assert str(caught.value).startswith(said)


def test_nothing_leads_to_another_file(tmp_path: Path, nyu: Path) -> None:
    path = tmp_path / "a.h5"
    layout = h5py.VirtualLayout((4, N), "f8")
    layout[:] = h5py.VirtualSource(nyu, "accelData", (4, N))
    with h5py.File(path, "w") as file:
        file["link"] = h5py.ExternalLink(nyu, "depths")
        file["soft"] = h5py.SoftLink("/link")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("outside", (H, W), "u1", external=[(tmp_path / "raw", 0, H * W)])
    (tmp_path / "raw").write_bytes(bytes(H * W))
    for what in ("link[0]", "soft[0]"):
        with pytest.raises(BadRow, match="has no array"):
            read_plane(path, what, "depth", "depth")
    for what in ("outside", "virtual"):
        with pytest.raises(BadRow, match="has its data in another file"):
            read_plane(path, what, "depth", "depth")


def test_what_a_file_cannot_hold_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("huge", (60_000, 60_000), "f8", chunks=(8, 8))
        file.create_dataset("large", (9_000, 9_000), "f8", chunks=(8, 8))
        file.create_dataset("chunk", (8, 8), "f8", chunks=(8, 8), maxshape=(None, None))
        file.create_dataset("text", (3, 3), h5py.string_dtype())
        file.create_dataset("cube", (3, 3, 3, 3), "u1")
        file.create_dataset("none", (0, 0), "u1")
    for name, said in (
        ("huge", "says that it has 60000 x 60000 pixels"),
        ("large", "more than [0-9]+ bytes can hold"),
        ("text", "no picture"),
        ("cube", "no picture"),
        ("none", "says that it has 0 x 0 pixels"),
    ):
        with pytest.raises(BadRow, match=said):
            read_plane(path, name, "depth", "depth")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"<html>", "is no file of MATLAB or HDF5"),
        (b"MATLAB 5.0 MAT-file".ljust(600), "cannot be read as MATLAB 5"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "cannot be read as HDF5"),
    ],
)
def test_no_file_of_its_kind_is_one_phrase(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(data)
    with pytest.raises(BadRow) as caught:
        read_plane(path, "0", "label", "id")
    assert str(caught.value).startswith(said)


def test_a_file_that_is_not_there_is_the_disks_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_plane(tmp_path / "a.mat", "0", "label", "id")


def test_a_disk_that_fails_is_no_fault_of_the_row(tmp_path: Path) -> None:
    from convert.sources.planes import _reading

    said = "Can't read data (file read failed: time = x, errno = 5, error message = 'Input/output error')"
    with pytest.raises(OSError, match=r"Input/output error") as caught, _reading(tmp_path / "a.h5"):
        raise OSError(said)
    assert caught.value.errno == errno.EIO


def test_real_files_of_matlab_are_a_picture_or_one_phrase() -> None:
    n_files = 0
    for path in sorted(shared("matlab73").glob("*.mat")):
        check(path)
        n_files += 1
    assert n_files > 30


def check(path: Path) -> None:
    for what in ("0", "1", "cell[0]", "images[0]", "a2x2x2[1]"):
        try:
            n_axes = read_plane(path, what, "label", "id").ndim
            said = "a picture"
        except BadRow as error:
            n_axes = 2
            said = str(error)
        assert n_axes == 2
        assert 0 < len(said) < 500
        assert "\n" not in said


@given(where=st.floats(0, 0.9999), patch=st.binary(min_size=1, max_size=4), end=st.floats(0.2, 1))
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_a_picture_or_one_phrase(
    tmp_path_factory: pytest.TempPathFactory, where: float, patch: bytes, end: float
) -> None:
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    folder = tmp_path_factory.mktemp("damaged")
    with h5py.File(folder / "h5.mat", "w") as file:
        file.create_dataset("images", data=matlab_7_3(LABEL), chunks=(1, W, H), compression=4)
    io.savemat(folder / "m5.mat", {"images": LABEL.transpose(1, 2, 0)}, do_compression=True)
    for path in (folder / "h5.mat", folder / "m5.mat"):
        data = bytearray(path.read_bytes())
        at = int(where * len(data))
        data[at : at + len(patch)] = patch
        path.write_bytes(data[: int(end * len(data))])
        check(path)
