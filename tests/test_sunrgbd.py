"""SUN RGB-D whole: which file is whose, what a pixel means, what is said of rows that are missing."""

import shutil
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs pillow")

from helpers.frames import by_line, convert_frames, converted, read_csv, resized, stored
from helpers.sets import shard_bytes
from helpers.sunrgbd import as_downloaded

from convert.__main__ import main
from convert.failed import FailedRows
from convert.sample_sunrgbd import (
    FAR_MM,
    N_REAL,
    MadeUpRow,
    made_up_rows,
    meta,
    pictures,
    rotated,
    write_sunrgbd,
)
from convert.sources.listings import Wanted
from convert.sources.nyu_tables import nyu
from convert.sources.opening import SourceOptions, is_frames
from convert.sources.sunrgbd import camera_of, list_sunrgbd, scene_type_of, stamp_sunrgbd
from convert.sources.sunrgbd_files import is_sunrgbd
from convert.sources.sunrgbd_tables import nyu_scenes, sunrgbd
from shards.dataset import ShardSet
from shards.errors import UserError, WrongPlace, WrongSetting, WrongSource
from shards.spec import SPLITS, ConversionSettings

N_ROWS = 44
SETTINGS = ConversionSettings(size=24, rows_per_shard=16)
SMALL = ConversionSettings(size=8, fields=("rgb", "depth"))
ROWS = made_up_rows(N_ROWS)
NO_NYU_ROW = 0xFFFFFFFF
OPTIONS = SourceOptions(layout="sunrgbd")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sun") / "rooms"
    write_sunrgbd(folder, N_ROWS)
    return folder


@pytest.fixture(scope="module")
def found(made: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return converted(made, tmp_path_factory.mktemp("out"), SETTINGS)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """To be spoilt."""
    return shutil.copytree(made, tmp_path / "rooms")


def folder_of(copy: Path, row: MadeUpRow) -> Path:
    return copy / "SUNRGBD" / row.path


def rows_in(name: str) -> list[MadeUpRow]:
    return [row for row in ROWS if row.subset.name == name]


def by_rows(found: ShardSet, column: str) -> list[object]:
    """A column in the order of the rows of SUNRGBDMeta.mat."""
    values = found.column(column)
    lines = found.column("row").tolist()
    return [values[lines.index(k)] for k in range(len(lines))]


# -------------------------------------------------------------------------------------------- rows


def test_lines_are_the_rows_of_meta_and_are_dealt_as_those_of_any_table(found: ShardSet) -> None:
    assert found.column("row").tolist() != sorted(found.column("row").tolist())
    assert found.column("split").tolist() == sorted(found.column("split").tolist())
    files = [str(path).partition("/image/")[0] for path in by_rows(found, "rgb_file")]
    assert files == [row.path for row in ROWS]
    splits = [SPLITS[int(str(number))] for number in by_rows(found, "split")]
    assert splits == [row.split for row in ROWS]


def test_the_one_file_of_a_folder_is_taken_whatever_it_is_called(found: ShardSet) -> None:
    names = [str(path).rpartition("/")[2] for path in by_rows(found, "depth_file")]
    assert names == [f"{row.depth_name}.png" for row in ROWS]
    assert any(name.endswith("_abs.png") for name in names)


def test_types_are_the_words_of_scene_txt_which_has_no_line_break(
    found: ShardSet, made: Path
) -> None:
    assert (folder_of(made, ROWS[0]) / "scene.txt").read_bytes() == ROWS[0].scene_type.encode()
    types = [found.dataset.scene_types[int(str(k))] for k in by_rows(found, "scene_type")]
    assert types == [row.scene_type for row in ROWS]
    assert "idk" in types


def test_places_are_nyus_scenes_sequences_of_sun3d_else_rows(found: ShardSet) -> None:
    scenes = [found.manifest.scenes[int(str(number))] for number in by_rows(found, "scene")]
    for row, scene in zip(ROWS, scenes, strict=True):
        if row.subset.name == "kv1/NYUdata":
            assert scene == nyu_scenes()[int(row.sequence[3:]) - 1]
            assert scene in nyu_scenes()
        elif row.subset.name == "xtion/sun3ddata":
            assert scene == row.path.rpartition("/")[0]
        else:
            assert scene == row.path


def test_rows_of_nyu_say_which_they_are(found: ShardSet) -> None:
    numbers = by_rows(found, "row_of_nyuv2")
    assert found.manifest.columns["row_of_nyuv2"].dtype == "<u4"
    for row, number in zip(ROWS, numbers, strict=True):
        is_nyu = row.subset.name == "kv1/NYUdata"
        assert number == (int(row.sequence[3:]) - 1 if is_nyu else NO_NYU_ROW)
    assert Counter(number == NO_NYU_ROW for number in numbers)[False] == len(rows_in("kv1/NYUdata"))


def test_places_in_both_halves_are_reported_and_no_error(found: ShardSet) -> None:
    halves: dict[str, set[str]] = {}
    for row in rows_in("xtion/sun3ddata"):
        halves.setdefault(row.path.rpartition("/")[0], set()).add(row.split)
    n_shared = sum(len(splits) == 2 for splits in halves.values())
    assert n_shared >= 1
    (warning,) = found.dataset.warnings
    assert warning.startswith(f"{n_shared} places are in more than one split")


# ---------------------------------------------------------------------------------- what is stored


def test_depth_is_bfx_and_raw_depth_what_was_measured_in_millimetres(found: ShardSet) -> None:
    for field in ("depth", "raw_depth"):
        planes = by_line(found, field)
        for row in ROWS:
            right = resized(found.field(field), pictures(row)[field], SETTINGS.size)
            np.testing.assert_array_equal(planes[row.number], right)
    assert stored(found, "depth").min() > 0
    assert stored(found, "raw_depth").min() == 0
    assert stored(found, "raw_depth").max() == stored(found, "depth").max() == FAR_MM > 8191


def test_the_low_three_bits_hold_what_is_beyond_8191_mm() -> None:
    assert rotated(np.array([0, 1, 8191, 8192, 9000], "u2")).tolist() == [0, 8, 65528, 1, 6465]


def test_a_label_is_the_plane_of_its_row_turned_upright(found: ShardSet) -> None:
    planes = by_line(found, "label")
    for row in ROWS:
        right = resized(found.field("label"), pictures(row)["label"], SETTINGS.size)
        np.testing.assert_array_equal(planes[row.number], right)
    assert 1 <= stored(found, "label").max() <= 37


def test_a_camera_is_a_share_of_its_own_picture(found: ShardSet) -> None:
    sizes = by_rows(found, "size")
    cameras = by_rows(found, "camera")
    for row, size, camera in zip(ROWS, sizes, cameras, strict=True):
        width, height = row.size_wh
        assert np.asarray(size).tolist() == [height, width]
        focal = 519 / 640 * width
        right = (focal / width, focal / height, 0.5 + 0.5 / width, 0.5 + 0.5 / height)
        np.testing.assert_allclose(np.asarray(camera), right, rtol=1e-5)
    assert len({tuple(np.asarray(size).tolist()) for size in sizes}) == 4


def test_19_types_are_learnt_by_default_and_45_on_demand(found: ShardSet) -> None:
    spec = found.dataset
    assert len(spec.protocol(None).names) == 19
    assert len(spec.protocol(45).names) == len(spec.scene_types) == 45
    left_out = spec.protocol(None).ids_of(spec.scene_types) == -1
    assert left_out.sum() == 45 - 19
    with pytest.raises(WrongSetting, match="choose 19 or 45"):
        spec.protocol(13)


def test_37_labels_become_13_as_nyus_40_do() -> None:
    spec = sunrgbd()
    spec.check()
    assert len(spec.label_table(None).names) == 37
    forty, thirteen = nyu().label_tables
    group13 = {k: thirteen.ids[forty.ids.index(k)] for k in range(1, 38)}
    assert spec.label_table(13).ids == (0, *group13.values())
    named = dict(zip(spec.label_names, spec.label_table(13).ids[1:], strict=True))
    of_13 = {name: thirteen.names[k - 1] for name, k in named.items()}
    assert (of_13["fridge"], of_13["night_stand"], of_13["tv"]) == ("furniture", "furniture", "tv")
    assert (of_13["door"], of_13["blinds"], of_13["floor_mat"]) == ("wall", "window", "floor")


# ------------------------------------------------------------------------------------ where it lies


def test_archives_as_downloaded_give_the_same_set_without_being_unpacked(
    made: Path, tmp_path: Path
) -> None:
    unpacked = converted(made, tmp_path / "a", SMALL)
    for k, top in enumerate(("", "data/")):
        folder = as_downloaded(made, tmp_path / f"zip{k}", top=top)
        there = sorted(folder.iterdir())
        for path in (folder, folder / "SUNRGBD.zip"):
            packed = converted(path, tmp_path / f"b{k}{path.suffix}", SMALL)
            assert packed.path.name == unpacked.path.name
            assert shard_bytes(packed.path) == shard_bytes(unpacked.path)
        assert sorted(folder.iterdir()) == there


def test_labels_in_an_archive_are_told_to_be_unpacked_and_then_taken(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_downloaded(made, tmp_path / "zip")
    without = converted(folder, tmp_path / "a", SETTINGS)
    assert "label" not in without.manifest.fields
    assert (
        "no labels: they are Metadata/SUNRGBD2Dseg.mat of SUNRGBDtoolbox.zip, and have to be"
        in (capsys.readouterr().err)
    )
    shutil.copy(made / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat", folder)
    with_labels = converted(folder, tmp_path / "b", SETTINGS)
    of_tree = converted(made, tmp_path / "c", SETTINGS)
    assert shard_bytes(with_labels.path) == shard_bytes(of_tree.path)


def test_the_folder_of_the_rows_itself_will_do_and_may_be_called_otherwise(
    made: Path, copy: Path, found: ShardSet, tmp_path: Path
) -> None:
    (copy / "SUNRGBD").rename(copy / "sun")
    for path, options in ((made / "SUNRGBD", None), (copy / "sun", OPTIONS)):
        again = converted(path, tmp_path / path.name, SETTINGS, options=options)
        assert shard_bytes(again.path) == shard_bytes(found.path)
        assert again.path.name == found.path.name


def test_it_is_recognised_by_what_lies_in_it(made: Path, tmp_path: Path) -> None:
    for path in (made, made / "SUNRGBD"):
        assert is_sunrgbd(path)
    assert not is_sunrgbd(made / "SUNRGBDtoolbox")
    (tmp_path / "SUNRGBD.zip").write_bytes(b"")
    (tmp_path / "other.zip").write_bytes(b"")
    assert is_sunrgbd(tmp_path)
    assert is_frames(tmp_path / "SUNRGBD.zip", "auto")
    assert not is_frames(tmp_path / "other.zip", "auto")
    (tmp_path / "room" / "kv1").mkdir(parents=True)
    assert not is_sunrgbd(tmp_path / "room")


def test_without_a_split_one_line_says_where_it_comes_from(copy: Path) -> None:
    shutil.rmtree(copy / "SUNRGBDtoolbox")
    with pytest.raises(WrongSource) as caught:
        list_sunrgbd(copy, Wanted())
    assert "has no allsplit.mat, which says what is train and test" in str(caught.value)
    assert "https://rgbd.cs.princeton.edu/data/SUNRGBDtoolbox.zip" in str(caught.value)
    assert "\n" not in str(caught.value)
    (copy / "SUNRGBDtoolbox.zip").write_bytes(b"PK\5\6" + bytes(18))
    with pytest.raises(WrongSource, match=r"SUNRGBDtoolbox.zip has no allsplit.mat"):
        list_sunrgbd(copy, Wanted())


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongSource, match=r"has no SUNRGBD/ with kv1/, kv2/, \.\.\. in it"):
        list_sunrgbd(tmp_path, Wanted())


# ------------------------------------------------------------------------------- rows that are missing


def test_of_a_sample_the_rows_that_are_there_are_converted(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [rows_in("kv2/kinect2data")[1], rows_in("kv1/b3dodata")[0]]
    for row in ROWS:
        if row not in kept:
            shutil.rmtree(folder_of(copy, row))
    for name in {row.subset.name for row in kept}:
        assert len(rows_in(name)) > 2 or len(rows_in(name)) == 2
    whole = {row.subset.name for row in kept if len(rows_in(row.subset.name)) <= 2}
    failing = sum(len(rows_in(name)) - 1 for name in whole)
    part = converted(copy, tmp_path / "out", SMALL, max_failed=0.6)
    said = capsys.readouterr().err
    n = 2 + failing
    assert f"a part of SUN RGB-D: {n} of its {N_ROWS} rows are there" in said
    files = [str(path).partition("/image")[0] for path in part.column("rgb_file")]
    assert {row.path for row in kept} <= set(files)
    assert len(files) == n


def test_a_subset_that_is_absent_is_left_out(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "SUNRGBD/kv2/kinect2data")
    part = converted(copy, tmp_path / "out", SETTINGS)
    others = [row for row in ROWS if row.subset.name != "kv2/kinect2data"]
    assert part.n_rows == len(others)
    counts = Counter(row.split for row in others)
    of_all = Counter(row.split for row in ROWS)
    said = f"{counts['test']} of {of_all['test']} test and {counts['train']} of {of_all['train']}"
    assert said in capsys.readouterr().err
    labels = by_line(part, "label")  # those of its own row in the file, not of its line
    for line, row in enumerate(others):
        right = resized(part.field("label"), pictures(row)["label"], SETTINGS.size)
        np.testing.assert_array_equal(labels[line], right)


def test_a_row_that_is_missing_in_a_whole_subset_fails(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = rows_in("kv2/kinect2data")[3]
    shutil.rmtree(folder_of(copy, gone))
    with pytest.raises(FailedRows):
        convert_frames(copy, tmp_path / "out", SMALL)
    assert f"1 rows are missing and will fail, such as {gone.path}" in capsys.readouterr().err
    made = converted(copy, tmp_path / "out", SMALL, max_failed=0.1)
    assert made.n_rows == N_ROWS
    assert [int(str(number)) for number in by_rows(made, "status")].index(1) == gone.number


def test_a_row_without_a_picture_or_with_two_fails_and_is_named(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without, double = rows_in("kv2/kinect2data")[:2]
    shutil.rmtree(folder_of(copy, without) / "depth_bfx")
    image = next((folder_of(copy, double) / "image").iterdir())
    shutil.copy(image, image.with_name("again.jpg"))
    (image.parent / "Thumbs.db").write_bytes(b"x")
    (image.parent / "._x.jpg").write_bytes(b"x")
    made = converted(copy, tmp_path / "out", SMALL, max_failed=0.1)
    assert f"1 rows will fail, as image/ has several pictures: {double.path}" in (
        capsys.readouterr().err
    )
    status = [int(str(number)) for number in by_rows(made, "status")]
    assert [k for k, number in enumerate(status) if number] == [without.number, double.number]


def test_a_set_without_raw_depth_anywhere_has_no_such_field(copy: Path, tmp_path: Path) -> None:
    for row in ROWS:
        shutil.rmtree(folder_of(copy, row) / "depth")
    made = converted(copy, tmp_path / "out", SETTINGS)
    assert tuple(made.manifest.fields) == ("rgb", "depth", "label")


def test_what_is_not_known_of_a_row_is_counted_and_left_open(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent, blind, strange = ROWS[:3]
    (folder_of(copy, silent) / "scene.txt").unlink()
    (folder_of(copy, blind) / "intrinsics.txt").write_text("no numbers")
    (folder_of(copy, strange) / "scene.txt").write_text("wine_cellar\n")
    made = converted(copy, tmp_path / "out", SMALL)
    said = capsys.readouterr().err
    assert f"1 rows are without a scene type, such as {silent.path}" in said
    assert f"1 rows are without a camera, such as {blind.path}" in said
    assert "1 scene types are not among the 45 published, such as wine_cellar" in said
    assert by_rows(made, "scene_type")[:3] == [65535, *by_rows(made, "scene_type")[1:2], 45]
    assert made.dataset.scene_types[45] == "wine_cellar"
    assert np.asarray(by_rows(made, "camera")[1]).tolist() == [0, 0, 0, 0]
    assert len(made.dataset.protocol(45).names) == 45


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"office", "office"),
        (b" rest_space\r\n", "rest_space"),
        (None, ""),
        (b"", ""),
        (b"two words", ""),
        (b"\xff\xfe", ""),
        (b"x" * 4096, ""),
    ],
)
def test_a_scene_type_is_one_word(data: bytes | None, word: str) -> None:
    assert scene_type_of(data) == word


@pytest.mark.parametrize(
    ("data", "camera"),
    [
        (b"529.5 0.0 365.0\n0.0 530.5 265.0\n0.0 0.0 1.0\n", (529.5, 530.5, 365.0, 265.0)),
        (b"529.5 0 365 0 530.5 265 0 0 1 ", (529.5, 530.5, 365.0, 265.0)),
        (b"529.5 0 365", (0, 0, 0, 0)),
        (b"nan 0 365 0 530.5 265 0 0 1", (0, 0, 0, 0)),
        (b"-1 0 365 0 530.5 265 0 0 1", (0, 0, 0, 0)),
        (b"<html>", (0, 0, 0, 0)),
        (None, (0, 0, 0, 0)),
    ],
)
def test_a_camera_is_nine_numbers_row_by_row(
    data: bytes | None, camera: tuple[float, float, float, float]
) -> None:
    assert camera_of(data) == camera


# ------------------------------------------------------------------------------------------- labels


def test_labels_of_another_number_of_rows_are_refused(copy: Path) -> None:
    path = copy / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat"
    with h5py.File(path, "r+") as file:
        cells = file["SUNRGBD2Dseg/seglabel"][:-1]
        del file["SUNRGBD2Dseg/seglabel"]
        file.create_dataset("SUNRGBD2Dseg/seglabel", data=cells, dtype=h5py.ref_dtype)
    with pytest.raises(
        WrongSource, match=f"has {N_ROWS - 1} labels, and allsplit.mat {N_ROWS} rows"
    ):
        list_sunrgbd(copy, Wanted())
    assert "label" not in list_sunrgbd(copy, Wanted(known=("rgb", "depth"))).table.paths


@pytest.mark.parametrize("data", [b"", b"MATLAB 5.0", b"\x89HDF\r\n\x1a\n" + bytes(600)])
def test_labels_that_are_damaged_are_refused_in_one_line(copy: Path, data: bytes) -> None:
    path = copy / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat"
    path.write_bytes(data)
    with pytest.raises(WrongSource, match=r"SUNRGBD2Dseg.mat cannot be read as MATLAB v7.3"):
        list_sunrgbd(copy, Wanted())
    with h5py.File(path, "w") as file:
        file["SUNRGBD2Dseg/seglabel"] = np.zeros(3)
    with pytest.raises(WrongSource, match="has no cell array SUNRGBD2Dseg/seglabel"):
        list_sunrgbd(copy, Wanted())


def test_labels_are_in_the_order_of_meta_where_that_is_another(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n_turned = sum(row.split == "test" for row in rows_in("kv2/kinect2data"))  # of one size
    turned = [*reversed(ROWS[:n_turned]), *ROWS[n_turned:]]
    (copy / "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat").write_bytes(meta(turned))
    made = converted(copy, tmp_path / "out", SETTINGS)
    said = "rows are in the order of SUNRGBDMeta.mat, not of allsplit.mat"
    assert said in capsys.readouterr().err
    labels = by_line(made, "label")
    files = by_rows(made, "rgb_file")
    for line, row in enumerate(turned):
        assert str(files[line]).startswith(row.path)
        right = resized(made.field("label"), pictures(ROWS[line])["label"], SETTINGS.size)
        np.testing.assert_array_equal(labels[line], right)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cannot be read as MATLAB 5"),
        (meta(ROWS)[:-40], "cannot be read as MATLAB 5"),
        (meta(ROWS[1:]), "has other rows"),
    ],
    ids=["empty", "cut", "other rows"],
)
def test_a_meta_that_is_damaged_or_of_other_rows_does_not_count(
    copy: Path, data: bytes, said: str
) -> None:
    before = list_sunrgbd(copy, Wanted())
    (copy / "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat").write_bytes(data)
    after = list_sunrgbd(copy, Wanted())
    assert before.notes == ()
    assert said in after.notes[0]
    assert "order" in after.notes[0]
    assert after.table.sha256 == before.table.sha256


# ---------------------------------------------------------------------------------------- the rest


def test_a_change_of_any_file_that_is_read_is_noticed(copy: Path) -> None:
    stamps = {list_sunrgbd(copy, Wanted()).stamp}
    assert stamps == {stamp_sunrgbd(copy, Wanted())}
    row = folder_of(copy, ROWS[0])
    changed = [
        next((row / "image").iterdir()),
        next((row / "depth_bfx").iterdir()),
        row / "scene.txt",
        row / "intrinsics.txt",
        copy / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat",
        copy / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat",
    ]
    for path in changed:
        path.write_bytes(path.read_bytes())
        stamps.add(stamp_sunrgbd(copy, Wanted()))
    assert len(stamps) == 1 + len(changed)
    (row / "extrinsics" / "more.txt").write_text("is not read")
    assert stamp_sunrgbd(copy, Wanted()) in stamps


def test_its_table_leads_to_the_same_pixels(
    made: Path, found: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    out = tmp_path / "rows.csv"
    assert main(["table", str(made), "--layout", "sunrgbd", "--out", str(out)]) == 0
    assert f"{N_ROWS} rows; convert them with --root {made}" in capsys.readouterr().err
    lines = read_csv(out)
    assert [line["rgb"].split("/image/")[0] for line in lines] == [
        f"SUNRGBD/{row.path}" for row in ROWS
    ]
    assert lines[7]["label"].startswith("SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat#")
    options = SourceOptions(roots=(str(made),))
    again = converted(out, tmp_path / "out", SETTINGS, options=options)
    for field in found.manifest.fields:
        np.testing.assert_array_equal(stored(again, field), stored(found, field))
    for column in ("split", "row", "camera", "scene"):
        np.testing.assert_array_equal(again.column(column), found.column(column))
    assert again.manifest.scenes == found.manifest.scenes


def test_a_set_is_verified_against_what_it_was_made_of(
    made: Path, found: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(found.path), "--against", str(made), "--rows", "10"]
    assert main(command) == 0
    assert f"every column and 10 random rows are what {made} gives" in capsys.readouterr().out


def test_further_fields_are_refused(made: Path, tmp_path: Path) -> None:
    settings = ConversionSettings(fields=("rgb", "thermal"), kinds={"thermal": "grey"})
    with pytest.raises(WrongSource, match="has no thermal in its layout"):
        convert_frames(made, tmp_path, settings)


def test_a_sample_is_a_function_of_its_arguments(made: Path, tmp_path: Path) -> None:
    write_sunrgbd(tmp_path / "again", N_ROWS)
    for path in sorted(made.rglob("*")):
        if path.is_file() and path.name != "SUNRGBD2Dseg.mat":  # HDF5 notes the time
            assert (tmp_path / "again" / path.relative_to(made)).read_bytes() == path.read_bytes()
    assert is_sunrgbd(tmp_path / "again")


def test_a_sample_is_not_written_over_anything(tmp_path: Path) -> None:
    with pytest.raises(WrongPlace, match="exists already"):
        write_sunrgbd(tmp_path, 3)
    for n_rows in (0, N_REAL + 1):
        with pytest.raises(UserError, match="choose 1 to 10335"):
            write_sunrgbd(tmp_path / "x", n_rows)
    (tmp_path / "file").write_text("x")
    with pytest.raises(WrongPlace, match="cannot be written"):
        write_sunrgbd(tmp_path / "file" / "x", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.stress
def test_all_10335_rows_are_those_of_the_published_split(tmp_path: Path) -> None:
    """Unpacked and in archives: rows, halves, and types by the 19 of the usual protocol."""
    made = tmp_path / "all"
    write_sunrgbd(made, N_REAL)
    whole = converted(made, tmp_path / "a", ConversionSettings(size=16))
    assert whole.n_rows == N_REAL
    splits = Counter(SPLITS[k] for k in whole.column("split").tolist())
    assert splits == {"train": 5285, "test": 5050}
    assert np.count_nonzero(whole.column("row_of_nyuv2") != NO_NYU_ROW) == 1449
    of_19 = whole.dataset.protocol(None).ids_of(whole.dataset.scene_types)
    assert np.all(np.bincount(of_19[whole.column("scene_type")] + 1)[1:] > 0)
    packed = as_downloaded(made, tmp_path / "zip")
    shutil.copy(made / "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat", packed)
    again = converted(packed, tmp_path / "b", ConversionSettings(size=16))
    assert shard_bytes(again.path) == shard_bytes(whole.path)
