"""inspect --rerun: what is in the file is what is in the set, read back by Rerun's own reader."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.sets import manifest_json, write_manifest_json

from convert.__main__ import main
from shards.dataset import ShardSet, open_set

NEEDS = "needs rerun-sdk (the extra view), in a version that reads recordings"


def columns_of(path: Path) -> dict[str, dict[int | None, Any]]:
    """ "/entity:component" -> the first value at each row of the timeline; None: static."""
    reader = pytest.importorskip("rerun.chunk", reason=NEEDS).RrdReader
    found: dict[str, dict[int | None, Any]] = {}
    for chunk in reader(path).stream():
        table = chunk.to_record_batch()
        times = (
            table.column("row").to_pylist() if "row" in table.schema.names else [None] * len(table)
        )
        for name in table.schema.names:
            for row, value in zip(times, table.column(name), strict=True):
                if value.is_valid and value.type.num_fields == 1:
                    found.setdefault(f"{chunk.entity_path}:{name}", {})[row] = value.as_py()[0]
    return found


def of(columns: dict[str, dict[int | None, Any]], *words: str) -> dict[int | None, Any]:
    """The values of the one kind of column with these words in its name, of all scenes together."""
    found: dict[int | None, Any] = {}
    for name, values in columns.items():
        if all(word in name for word in words):
            found |= values
    return found


@pytest.fixture
def opened(small_set: Path) -> ShardSet:
    return open_set(small_set)


def test_rows_are_in_the_file_as_in_the_set_and_in_space(opened: ShardSet, tmp_path: Path) -> None:
    pytest.importorskip("rerun", reason=NEEDS)
    out = tmp_path / "new" / "rows.rrd"
    assert main(["inspect", str(opened.path), "--rerun", str(out), "--rows", "3"]) == 0
    columns = columns_of(out)
    rows = [0, 17, 35]
    size = opened.settings.size
    for field, shape in (
        ("rgb", (size, size, 3)),
        ("depth", (size, size)),
        ("label", (size, size)),
    ):
        stored = opened.shard(field, 0).dtype
        pictures = of(columns, f"camera/{field}:", "buffer")
        assert sorted(pictures, key=str) == sorted(rows, key=str)
        for row, data in pictures.items():
            assert row is not None
            shard, place = divmod(row, opened.settings.rows_per_shard)
            there = np.frombuffer(bytes(data), stored).reshape(shape)
            here = opened.shard(field, shard)[place]
            assert np.array_equal(there, here.transpose(1, 2, 0) if field == "rgb" else here)
    assert set(of(columns, "camera/depth:", "meter").values()) == {1000.0}

    cameras = of(columns, "camera:", "image_from_camera")
    for row in rows:
        fx, fy, cx, cy = opened.column("camera")[row] * size
        assert np.allclose(cameras[row], [fx, 0, 0, 0, fy, 0, cx, cy, 1], rtol=1e-5)


def test_classes_have_their_names(opened: ShardSet, tmp_path: Path) -> None:
    pytest.importorskip("rerun", reason=NEEDS)
    out = tmp_path / "rows.rrd"
    assert main(["inspect", str(opened.path), "--rerun", str(out), "--rows", "1"]) == 0
    (classes,) = of(columns_of(out), "context").values()
    names = [each["class_description"]["info"]["label"] for each in classes]
    assert names == ["unlabelled", *opened.dataset.label_names]
    colours = {each["class_description"]["info"]["color"] for each in classes}
    assert len(colours) > len(names) // 2


def test_each_scene_has_its_place_and_is_cleared_by_the_next(
    opened: ShardSet, tmp_path: Path
) -> None:
    pytest.importorskip("rerun", reason=NEEDS)
    out = tmp_path / "rows.rrd"
    assert main(["inspect", str(opened.path), "--rerun", str(out), "--rows", "36"]) == 0
    columns = columns_of(out)
    places = {name.partition("/camera")[0] for name in columns if "/camera/rgb:" in name}
    scene = opened.column("scene")
    assert len(places) == len(np.unique(scene)) == len(opened.manifest.scenes)
    n_changes = int(np.sum(scene[1:] != scene[:-1]))
    cleared = [row for name, rows in columns.items() if "is_recursive" in name for row in rows]
    assert len(cleared) == n_changes


def test_an_unknown_camera_is_left_out_and_said(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rerun", reason=NEEDS)
    import hashlib

    copy = Path(shutil.copytree(small_set, tmp_path / small_set.name))
    data = bytearray((copy / "rows-camera.npy").read_bytes())
    data[-36 * 16 :] = bytes(36 * 16)
    (copy / "rows-camera.npy").write_bytes(data)
    manifest = manifest_json(copy)
    manifest["column_files"]["rows-camera.npy"]["sha256"] = hashlib.sha256(data).hexdigest()
    write_manifest_json(copy, manifest)
    out = tmp_path / "rows.rrd"
    assert main(["inspect", str(copy), "--rerun", str(out), "--rows", "2"]) == 0
    assert "of 2 of 2 rows the camera is not known" in capsys.readouterr().err
    columns = columns_of(out)
    assert of(columns, "camera/depth:", "buffer")
    assert not of(columns, "image_from_camera")


def test_a_recording_of_another_suffix_is_refused(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(small_set), "--rerun", str(tmp_path / "rows.png")]) == 2
    assert "Choose .rrd" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_extra_is_named(
    small_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rerun", None)
    assert main(["inspect", str(small_set), "--rerun", str(tmp_path / "rows.rrd")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'nyuv2-shards[view]'" in said
    assert "pip install 'rerun-sdk'" in said
