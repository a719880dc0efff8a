"""What is stored of a table of frames: the pixels of its files, in the dealt order, and its facts."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import sqrt
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers.frames import (
    AS_IS,
    SETTINGS,
    SIDE,
    SIZES_WH,
    as_fraction,
    as_npy,
    by_line,
    convert_frames,
    converted,
    image_at,
    made_up_rooms,
    picture_of,
    raw_pgm,
    read_csv,
    read_plainly,
    resized,
    statuses,
    stored,
    write_file,
    write_frames_of,
    write_table,
)
from helpers.sets import convert, is_whole
from helpers.splitmix import dealt
from PIL import Image

from convert.sample import write_sample
from convert.sample_frames import (
    FAULTS,
    LABEL_NAMES,
    TABLE,
    jpeg,
    label_names,
    npy,
    palette_png,
    png,
    pnm,
    write_frames,
)
from convert.sources import frames
from convert.sources.dealing import dealt_order
from convert.sources.opening import SourceOptions
from shards.dataset import ShardSet, open_set
from shards.errors import UserError, WrongSetting, WrongSource
from shards.manifest import FAILED
from shards.spec import SPLITS, ConversionSettings

N_ROWS = 24  # every type in every split


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_rooms(tmp_path_factory.mktemp("sample"), N_ROWS)


@pytest.fixture(scope="module")
def rooms_set(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    options = SourceOptions(label_names=rooms / LABEL_NAMES)
    root = tmp_path_factory.mktemp("root")
    return open_set(convert_frames(rooms / TABLE, root, options=options))


# ---------------------------------------------------------------- the made-up directory


def test_the_made_up_directory_has_files_of_every_type_and_size(rooms: Path) -> None:
    rows = read_csv(rooms / TABLE)
    assert len(rows) == N_ROWS
    suffixes = {
        field: {Path(row[field]).suffix for row in rows} for field in ("rgb", "depth", "label")
    }
    assert suffixes["rgb"] == {".jpg", ".jpeg", ".png", ".npy", ".ppm"}
    assert suffixes["depth"] == {".png", ".npy", ".pgm"}
    assert suffixes["label"] == {".png", ".npy", ".pgm"}

    sizes = set()
    for row in rows:
        pictures = [read_plainly(rooms / row[field], field) for field in suffixes]
        assert len({picture.shape[:2] for picture in pictures}) == 1, row
        sizes.add(pictures[0].shape[1::-1])
    assert sizes == set(SIZES_WH)
    lying = [row for row in rows if row["rgb"].endswith(".jpeg")]
    assert all(image_at(rooms / row["rgb"]).getexif()[0x0112] == 6 for row in lying)
    png_labels = [rooms / row["label"] for row in rows if row["label"].endswith(".png")]
    assert {image_at(path).mode for path in png_labels} == {"L", "P"}


def test_a_place_is_in_one_split_and_every_type_is_in_each(rooms: Path) -> None:
    rows = read_csv(rooms / TABLE)
    splits_of_place = {row["scene"]: set() for row in rows}
    for row in rows:
        splits_of_place[row["scene"]].add(row["split"])
    assert all(len(splits) == 1 for splits in splits_of_place.values())
    pairs = {(row["split"], row["scene_type"]) for row in rows}
    assert len(pairs) == 3 * len({row["scene_type"] for row in rows}) == 18


def test_the_made_up_directory_is_a_function_of_its_arguments(rooms: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    write_frames(tmp_path / "again", N_ROWS, sizes_wh=SIZES_WH)
    assert content(tmp_path / "again") == content(rooms)
    write_frames(tmp_path / "other", N_ROWS, sizes_wh=SIZES_WH, seed=1)
    assert content(tmp_path / "other").keys() == content(rooms).keys()
    assert content(tmp_path / "other") != content(rooms)


def test_the_made_up_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        write_frames(tmp_path, 1)
    with pytest.raises(UserError, match="choose 1 or more"):
        write_frames(tmp_path / "none", 0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_frames(tmp_path / "file" / "rooms", 1, sizes_wh=SIZES_WH)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_pillow_the_made_up_directory_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(UserError, match=r"needs pillow.*nyuv2-shards\[frames\]"):
        write_frames(tmp_path / "rooms", 1)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- every row, every column


@pytest.mark.parametrize("field", ["rgb", "depth", "label"])
def test_every_row_is_what_the_rules_of_sizes_make_of_its_file(
    field: str, rooms: Path, rooms_set: ShardSet
) -> None:
    rows = read_csv(rooms / TABLE)
    of_line = by_line(rooms_set, field)
    assert sorted(of_line) == list(range(N_ROWS))
    for line, found in of_line.items():
        picture = read_plainly(rooms / rows[line][field], field)
        expected = resized(rooms_set.field(field), picture, SETTINGS.size)
        np.testing.assert_array_equal(found, expected, str(rows[line]))


def test_rows_lie_train_val_test_each_dealt_by_a_hash_of_its_line(
    rooms: Path, rooms_set: ShardSet
) -> None:
    splits = [row["split"] for row in read_csv(rooms / TABLE)]
    assert rooms_set.column("row").tolist() == dealt(splits)
    found = [SPLITS[k] for k in rooms_set.column("split")]
    assert found == ["train"] * 12 + ["val"] * 6 + ["test"] * 6


def test_columns_say_of_each_row_what_its_line_says(rooms: Path, rooms_set: ShardSet) -> None:
    rows = read_csv(rooms / TABLE)
    manifest = rooms_set.manifest
    types = rooms_set.dataset.scene_types
    assert types == tuple(sorted({row["scene_type"] for row in rows}))
    for row, line in enumerate(rooms_set.column("row").tolist()):
        said = rows[line]
        height, width = read_plainly(rooms / said["label"], "label").shape
        assert SPLITS[rooms_set.column("split")[row]] == said["split"]
        assert manifest.scenes[rooms_set.column("scene")[row]] == said["scene"]
        assert types[rooms_set.column("scene_type")[row]] == said["scene_type"]
        assert rooms_set.column("rgb_file")[row] == said["rgb"]
        assert rooms_set.column("depth_file")[row] == said["depth"]
        assert rooms_set.column("size")[row].tolist() == [height, width]
        shares = [
            float(said["fx"]) / width,
            float(said["fy"]) / height,
            (float(said["cx"]) + 0.5) / width,
            (float(said["cy"]) + 0.5) / height,
        ]
        np.testing.assert_allclose(rooms_set.column("camera")[row], shares, rtol=1e-6)
    assert not rooms_set.column("status").any()
    assert rooms_set.dataset.label_names == label_names()
    assert is_whole(rooms_set.path)


def test_the_manifest_names_the_decoder_and_the_rules(rooms_set: ShardSet) -> None:
    assert "pillow " in rooms_set.manifest.decoder
    chosen = rooms_set.settings
    assert (chosen.orientation, chosen.order_version) == ("exif", 1)
    assert chosen.fields == ("rgb", "depth", "label")
    assert rooms_set.dataset.name == "rows"
    assert rooms_set.manifest.source.kind == "table"


def test_statistics_are_those_of_the_train_rows(rooms_set: ShardSet) -> None:
    is_train = rooms_set.column("split") == SPLITS.index("train")
    depth = stored(rooms_set, "depth")[is_train].astype(np.float64)
    measured = depth[depth > 0]
    statistics = rooms_set.field("depth").statistics
    assert statistics.count == (len(measured),)
    np.testing.assert_allclose(statistics.mean, measured.mean())
    np.testing.assert_allclose(statistics.std, measured.std())


# ---------------------------------------------------------------- file types, pixel by pixel

RGB = picture_of(0)["rgb"]
MM = picture_of(0)["depth"]
IDS = picture_of(0)["label"]


def one_row(folder: Path, **files: tuple[str, bytes]) -> Path:
    """A table of one line: of each field a file's name and bytes; an rgb where none is given."""
    given = {"rgb": ("rgb.png", png(RGB)), **files}
    for name, data in given.values():
        write_file(folder / name, data)
    return write_table(folder / "t.csv", [{field: name for field, (name, _) in given.items()}])


def as_stored(rgb: np.ndarray) -> np.ndarray:
    return rgb.transpose(2, 0, 1)


def saved(rgb: np.ndarray, path: Path, **how: object) -> bytes:
    Image.fromarray(rgb).save(path, **how)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["png", "ppm", "npy", "bmp", "tiff", "webp"])
def test_colours_of_any_lossless_file_are_its_pixels(suffix: str, tmp_path: Path) -> None:
    how = {"lossless": True, "exact": True} if suffix == "webp" else {}
    data = npy(RGB) if suffix == "npy" else saved(RGB, tmp_path / f"x.{suffix}", **how)
    found = converted(one_row(tmp_path, rgb=(f"x.{suffix}", data)), tmp_path / "out")
    np.testing.assert_array_equal(stored(found, "rgb")[0], as_stored(RGB))


def test_colours_of_a_jpeg_are_as_it_decodes(tmp_path: Path) -> None:
    found = converted(one_row(tmp_path, rgb=("x.jpg", jpeg(RGB))), tmp_path / "out")
    decoded = read_plainly(tmp_path / "x.jpg", "rgb")
    np.testing.assert_array_equal(stored(found, "rgb")[0], as_stored(decoded))


@pytest.mark.parametrize(
    "encode", [png, pnm, npy, lambda mm: as_npy(mm / 1000, "<f4"), lambda mm: as_npy(mm / 1000, "<f8")],
    ids=["png", "pgm", "npy", "metres f4", "metres f8"],
)  # fmt: skip
def test_depths_of_any_file_are_its_millimetres(
    encode: Callable[[np.ndarray], bytes], tmp_path: Path
) -> None:
    found = converted(one_row(tmp_path, depth=("x", encode(MM))), tmp_path / "out")
    np.testing.assert_array_equal(stored(found, "depth")[0], MM)


@pytest.mark.parametrize(
    "encode", [png, palette_png, pnm, npy, lambda ids: png(ids.astype(np.uint16))],
    ids=["png", "palette", "pgm", "npy", "16 bits"],
)  # fmt: skip
def test_labels_of_any_file_are_its_ids(
    encode: Callable[[np.ndarray], bytes], tmp_path: Path
) -> None:
    found = converted(one_row(tmp_path, label=("x", encode(IDS))), tmp_path / "out")
    np.testing.assert_array_equal(stored(found, "label")[0], IDS)
    assert found.dataset.label_names == ("1", "2", "3", "4")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_that_lie_as_exif_says_are_stored_upright(
    orientation: int, tmp_path: Path
) -> None:
    """The depth of a camera's picture is upright, its JPEG mostly not."""
    upright = np.zeros((12, 8, 3), np.uint8)
    upright[:6, :4] = (250, 20, 20)
    upright[:6, 4:] = (20, 250, 20)
    upright[6:, :4] = (20, 20, 250)
    turned_back = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = np.ascontiguousarray(turned_back[orientation])
    data = saved(lying, tmp_path / "x.png", exif=exif)
    depth = np.arange(96, dtype=np.uint16).reshape(12, 8)
    table = one_row(tmp_path, rgb=("x.png", data), depth=("d.png", png(depth)))
    found = converted(table, tmp_path / "out", replace(AS_IS, size=12))
    assert found.column("size").tolist() == [[12, 8]]
    expected = resized(found.field("rgb"), upright, 12)
    np.testing.assert_array_equal(stored(found, "rgb")[0], expected)


def test_further_fields_are_stored_by_their_kind(tmp_path: Path) -> None:
    thermal = picture_of(1)["rgb"][:, :, 0].copy()
    infrared = picture_of(1)["depth"]
    table = one_row(
        tmp_path,
        thermal=("t.png", png(thermal)),
        infrared=("i.png", png(infrared)),
        normals=("n.png", png(RGB)),
        part=("p.png", palette_png(IDS)),
    )
    kinds = {"thermal": "grey", "infrared": "grey16", "normals": "colour", "part": "id"}
    settings = replace(AS_IS, kinds=kinds, fields=("rgb", *kinds))
    found = converted(table, tmp_path / "out", settings)
    np.testing.assert_array_equal(stored(found, "thermal")[0], thermal)
    np.testing.assert_array_equal(stored(found, "infrared")[0], infrared)
    np.testing.assert_array_equal(stored(found, "normals")[0], as_stored(RGB))
    np.testing.assert_array_equal(stored(found, "part")[0], IDS)


# ---------------------------------------------------------------- encodings of depth

SOME = np.array([0, 1, 7, 8, 512, 1093, 2600, 5000, 8191, 9999, 12_345, 20_000], np.uint16)
SOME_METRES = np.array([0, 0.0004, 0.5, 1.0005, 2.7185, 9.9996, 32.767, np.nan], np.float32)


def rounded(mm: Fraction) -> int:
    """Half to even, as numpy."""
    return round(mm)


def _in_units(a_metre: int) -> Callable[[float], int]:
    return lambda value: rounded(as_fraction(value) * 1000 / a_metre)


def _sunrgbd(value: float) -> int:
    bits = int(value)
    return bits >> 3 | bits << 13 & 0xFFFF


def _nyu_raw(value: float) -> int:
    mm = 351_300 / (1092.5 - value)
    return round(mm) if 0 <= mm <= 10_000 else 0


def _metres(value: float) -> int:
    return 0 if np.isnan(value) else rounded(as_fraction(value) * 1000)


READINGS = np.array([0, 400, 900, 1040, 1057, 1058, 1092, 1093, 2047], np.uint16)
# Stored values, how they are written, and what one of them is in millimetres.
ENCODED: dict[str, tuple[np.ndarray, Callable, Callable[[float], int]]] = {
    "mm": (SOME, png, int),
    "metres": (SOME_METRES, npy, _metres),
    "sunrgbd": (np.array([0, 8, 16000, 21_336, 24_000, 65_528, 1, 2, 3], np.uint16), png, _sunrgbd),
    "tum": (SOME, png, _in_units(5000)),
    "matterport": (SOME, png, _in_units(4000)),
    "2d3ds": (
        np.append(SOME[:10], np.uint16(65535)),
        png,
        lambda value: 0 if value == 65535 else _in_units(512)(value),
    ),
    "nyu_raw": (READINGS, raw_pgm, _nyu_raw),
}


def filled(values: np.ndarray) -> np.ndarray:
    """A picture of 8x8 of these values."""
    return np.resize(values, (SIDE, SIDE))


def expected_mm(encoding: str) -> np.ndarray:
    values, _, to_mm = ENCODED[encoding]
    return np.array([to_mm(value) for value in filled(values).ravel()]).reshape(SIDE, SIDE)


@pytest.mark.parametrize("encoding", ENCODED)
def test_an_encoding_that_is_named_for_all_rows_decodes_every_pixel(
    encoding: str, tmp_path: Path
) -> None:
    values, encode, _ = ENCODED[encoding]
    table = one_row(tmp_path, depth=("d", encode(filled(values))))
    found = converted(table, tmp_path / "out", replace(AS_IS, depth_encoding=encoding))
    np.testing.assert_array_equal(stored(found, "depth")[0], expected_mm(encoding))


def test_each_row_may_have_an_encoding_of_its_own(tmp_path: Path) -> None:
    rows = []
    for encoding, (values, encode, _) in ENCODED.items():
        write_file(tmp_path / "rgb.png", png(RGB))
        write_file(tmp_path / f"{encoding}.d", encode(filled(values)))
        row = {"rgb": "rgb.png", "depth": f"{encoding}.d", "depth_encoding": encoding}
        rows.append({**row, "split": "train"})
    rows.append({**rows[0], "depth_encoding": ""})
    found = converted(write_table(tmp_path / "t.csv", rows), tmp_path / "out")
    of_line = by_line(found, "depth")
    for line, row in enumerate(rows):
        encoding = row["depth_encoding"] or "mm"
        np.testing.assert_array_equal(of_line[line], expected_mm(encoding), encoding)


def test_depths_along_the_ray_become_those_along_the_axis(tmp_path: Path) -> None:
    """Hypersim: of a wall at right angles to the camera, 3 m away, every ray is longer."""
    focal = 886.81 / 1024 * SIDE
    along_ray = np.empty((SIDE, SIDE))
    for y in range(SIDE):
        for x in range(SIDE):
            off_axis = (x + 0.5 - SIDE / 2) ** 2 + (y + 0.5 - SIDE / 2) ** 2
            along_ray[y, x] = 3 * sqrt(off_axis + focal**2) / focal
    table = one_row(tmp_path, depth=("d", as_npy(along_ray, "<f8")))
    found = converted(table, tmp_path / "out", replace(AS_IS, depth_encoding="hypersim"))
    assert (stored(found, "depth") == 3000).all()


def test_a_scale_divides_and_a_cut_makes_what_is_farther_nothing(tmp_path: Path) -> None:
    values = np.array([0, 1, 2, 999, 4000, 8001, 60_000], np.uint16)
    table = one_row(tmp_path, depth=("d", png(filled(values))))
    settings = replace(AS_IS, depth_scale=2000.0, depth_trunc=4.0)
    found = converted(table, tmp_path / "out", settings)
    of_value = {
        0: 0,
        1: 0,
        2: 1,
        999: 500,
        4000: 2000,
        8001: 0,
        60_000: 0,
    }  # 0.5 and 499.5: to even
    expected = [of_value[value] for value in filled(values).ravel().tolist()]
    assert stored(found, "depth").ravel().tolist() == expected


@pytest.mark.parametrize(
    ("stored_hw", "named"),
    [
        (filled(np.arange(12_000, 20_000, 8, dtype=np.uint16)), "sunrgbd"),
        (filled(np.arange(11_005, 20_000, 5, dtype=np.uint16)), "tum"),
        (filled(READINGS[[0, 1, 2, 8]]), "nyu_raw"),
    ],
)
def test_depth_that_looks_undecoded_is_refused_with_the_name_to_give(
    stored_hw: np.ndarray, named: str, tmp_path: Path
) -> None:
    table = one_row(tmp_path, depth=("d.png", png(stored_hw)))
    with pytest.raises(WrongSetting, match=f"looks like {named}"):
        converted(table, tmp_path / "out")
    assert not list((tmp_path).glob("out/*"))
    found = converted(table, tmp_path / "out", replace(AS_IS, depth_encoding="mm"))
    np.testing.assert_array_equal(stored(found, "depth")[0], stored_hw)


def test_the_median_pixel_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = one_row(tmp_path, depth=("d.png", png(np.full((SIDE, SIDE), 5000, np.uint16))))
    converted(table, tmp_path / "out", replace(AS_IS, depth_encoding="tum"))
    assert "a median pixel of depth is 5000 in its file, 1.000 m here" in capsys.readouterr().err


# ---------------------------------------------------------------- labels, empty cells


def test_another_void_moves_the_ids_up_by_one(tmp_path: Path) -> None:
    ids = filled(np.array([0, 1, 2, 255], np.uint8))
    table = one_row(tmp_path, label=("l.png", png(ids)))
    (tmp_path / "names.txt").write_text("wall\nfloor\nbed\n")
    options = SourceOptions(label_names=tmp_path / "names.txt")
    found = converted(table, tmp_path / "out", replace(AS_IS, label_void=255), options=options)
    moved = np.where(ids == 255, 0, ids.astype(np.uint16) + 1)
    np.testing.assert_array_equal(stored(found, "label")[0], moved)
    assert found.dataset.label_names == ("wall", "floor", "bed")


def test_a_label_beyond_the_names_is_refused_or_called_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_frames_of(tmp_path, 3, split="train")
    last = int(dealt_order(np.zeros(3, np.uint8))[-1])
    write_file(tmp_path / rows[last]["label"], png(np.full((SIDE, SIDE), 6, np.uint8)))
    (tmp_path / "names.txt").write_text("wall\nfloor\nbed\nlamp\n")
    options = SourceOptions(label_names=tmp_path / "names.txt")
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(WrongSetting, match="has the label 6, beyond the 4 names"):
        converted(table, tmp_path / "out", options=options)

    monkeypatch.setattr(frames, "PROBED_ROWS", 1)  # so that it is not seen beforehand
    found = converted(table, tmp_path / "out", options=options)
    assert statuses(found) == {0: 0, 1: 0, 2: 0}
    assert found.dataset.label_names == ("wall", "floor", "bed", "lamp", "5", "6")


def test_an_empty_cell_is_a_field_of_zeros_and_no_failure(tmp_path: Path) -> None:
    rows = write_frames_of(tmp_path, 3, split="train")
    rows[1]["depth"] = ""
    rows[2]["label"] = "None"
    found = converted(write_table(tmp_path / "t.csv", rows), tmp_path / "out")
    depth = by_line(found, "depth")
    label = by_line(found, "label")
    assert not depth[1].any()
    assert not label[2].any()
    np.testing.assert_array_equal(depth[2], picture_of(2)["depth"])
    np.testing.assert_array_equal(label[1], picture_of(1)["label"])
    assert not found.column("status").any()


# ---------------------------------------------------------------- beside the .mat


def test_the_rows_of_a_mat_saved_as_pngs_give_the_bytes_of_its_own_set(tmp_path: Path) -> None:
    mat = tmp_path / "rooms.mat"
    write_sample(mat, 6, size_wh=(64, 48))
    settings = ConversionSettings(size=24, rows_per_shard=4)
    of_mat = open_set(convert(mat, tmp_path / "mat", settings))

    rows = []
    with h5py.File(mat) as file:
        for k in range(6):
            pictures = {
                "rgb": file["images"][k].transpose(2, 1, 0),
                "depth": np.rint(file["depths"][k].T.astype(np.float64) * 1000).astype(np.uint16),
                "raw_depth": np.rint(file["rawDepths"][k].T.astype(np.float64) * 1000).astype(
                    np.uint16
                ),
                "label": file["labels"][k].T.astype(np.uint16),
                "instance": file["instances"][k].T,
            }
            row = {field: f"{field}/{k}.png" for field in pictures}
            for field, picture in pictures.items():
                write_file(tmp_path / row[field], png(np.ascontiguousarray(picture)))
            rows.append(row)
    table = write_table(tmp_path / "rows.csv", rows)
    of_table = converted(table, tmp_path / "table", settings)
    for field in of_mat.manifest.fields:
        by_row = by_line(of_table, field)
        for k, expected in enumerate(stored(of_mat, field)):
            assert by_row[k].tobytes() == expected.tobytes(), (field, k)


# ---------------------------------------------------------------- bad rows


@pytest.fixture(scope="module")
def bad_rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_rooms(tmp_path_factory.mktemp("bad"), 6, bad=True)


PROBLEMS = {
    "missing": "missing.jpg is missing",
    "empty": "empty.jpg is empty",
    "truncated": "it ends too early",
    "jpeg_depth": "compressed with loss",
    "colour_label": "its labels are colours, not ids",
    "other_size": "depth is 46x34, rgb 48x36 pixels",
    "depth_of_8_bits": "8-bit depth needs a named encoding",
    "bomb": "60000 x 60000 pixels",
    "text": "no picture of a known format",
    "outside": "../outside.jpg leaves ",
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_kind_of_bad_file_fails_its_row_alone(
    name: str, bad_rooms: Path, tmp_path: Path
) -> None:
    lines = read_csv(bad_rooms / TABLE)
    place = list(FAULTS).index(name)
    rows = [*lines[:3], lines[6 + place], *lines[3:6]]
    table = write_table(bad_rooms / f"{name}.csv", rows)
    with pytest.raises(UserError, match="1 of 7 rows cannot be read"):
        converted(table, tmp_path, SETTINGS)
    found = converted(table, tmp_path, SETTINGS, max_failed=0.2)

    assert statuses(found) == {line: int(line == 3) for line in range(7)}
    failed = read_csv(found.path / FAILED)
    assert len(failed) == 1
    row = found.column("row").tolist().index(3)
    assert (failed[0]["set_row"], failed[0]["row"]) == (str(row), "3")
    assert failed[0]["rgb_file"] == rows[3]["rgb"]
    assert PROBLEMS[name] in failed[0]["problem"]
    named = f"{FAULTS[name].field}/broken_0001/{name}"
    assert failed[0]["problem"].count("../outside.jpg" if name == "outside" else named) == 1
    for field in ("rgb", "depth", "label"):
        assert not stored(found, field)[row].any()
    assert found.column("size")[row].tolist() == [0, 0]
    assert not found.column("camera")[row].any()


def test_statistics_leave_failed_rows_out(bad_rooms: Path, tmp_path: Path) -> None:
    rows = read_csv(bad_rooms / TABLE)
    right = write_table(bad_rooms / "right.csv", rows[:6])
    found = converted(bad_rooms / TABLE, tmp_path / "bad", SETTINGS, max_failed=1)
    alone = converted(right, tmp_path / "right", SETTINGS)
    for field in ("rgb", "depth"):
        assert found.field(field).statistics.count == alone.field(field).statistics.count
        np.testing.assert_allclose(
            found.field(field).statistics.mean, alone.field(field).statistics.mean
        )


def test_a_table_of_which_nothing_can_be_read_is_one_line(tmp_path: Path) -> None:
    rows = [{"rgb": f"nowhere/{k}.jpg"} for k in range(20)]
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(WrongSource, match="has no row that can be read, of 8 tried: row "):
        converted(table, tmp_path / "out", max_failed=1)
