"""Runs over tables of frames: the same bytes however they are made, bad rows and their mending, and
what a run meets: kills, another run, a full disk, a table that changes.
"""

import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import Run, ends_in_one_line, running, until_a_shard_is_done
from helpers.disks import fill, small_disk
from helpers.frames import (
    AS_IS,
    Row,
    convert_frames,
    converted,
    picture_of,
    read_csv,
    stored,
    write_file,
    write_frames_of,
    write_table,
)
from helpers.sets import committed, files_of, flip, is_whole, shard_bytes

from convert import run
from convert.__main__ import main
from convert.pipeline import make_plan
from convert.plan import Plan
from convert.sample_frames import jpeg, png
from convert.session import SetRequest, prepare
from convert.shard import FullShard
from convert.sources.opening import open_source
from shards.copy import codecs_of, copy_set
from shards.dataset import ShardSet, finished_sets, open_set
from shards.errors import UserError
from shards.files import LocalFolder
from shards.manifest import FAILED, MANIFEST, Receipt, write_receipts
from shards.spec import ConversionSettings

N_ROWS = 21
TINY = ("--size", 8, "--rows-per-shard", 4)
ONE_BY_ONE = ("--size", 8, "--rows-per-shard", 1, "--workers", 1)  # time to do something in between
N_MANY = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames and rows.csv, which names them."""
    made = tmp_path_factory.mktemp("frames")
    rows = write_frames_of(made, N_ROWS)
    for number, row in enumerate(rows):
        row["scene"] = f"room {number // 3}"
        row["split"] = ("train", "train", "val", "test")[number // 3 % 4]
    write_table(made / "rows.csv", rows)
    return made


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return converted(folder / "rows.csv", tmp_path_factory.mktemp("root"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Frames to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "frames"))


@pytest.fixture(scope="module")
def many(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of many lines, in which the frames come again and again."""
    made = tmp_path_factory.mktemp("many")
    for name in ("rgb", "depth", "label"):
        shutil.copytree(folder / name, made / name)
    rows = read_csv(folder / "rows.csv")
    return write_table(made / "many.csv", [rows[k % N_ROWS] for k in range(N_MANY)])


def spoil(table: Path, lines: Sequence[int]) -> None:
    """Empty the rgb of these lines."""
    rows = read_csv(table)
    for line in lines:
        (table.parent / rows[line]["rgb"]).write_bytes(b"")


def mend(table: Path, lines: Sequence[int]) -> None:
    """As it was before."""
    rows = read_csv(table)
    for line in lines:
        (table.parent / rows[line]["rgb"]).write_bytes(png(picture_of(line)["rgb"]))


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    ("workers", "in_helpers"), [(1, False), (3, False), (2, True)], ids=["1", "3", "2 helpers"]
)
def test_any_number_of_workers_gives_the_same_bytes(
    workers: int,
    in_helpers: bool,
    folder: Path,
    whole: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if in_helpers:
        monkeypatch.setattr("convert.executors.HELPERS_FROM", 0)
    made = convert_frames(folder / "rows.csv", tmp_path, AS_IS, workers=workers)
    assert made.name == whole.path.name
    assert committed(made) == committed(whole.path)


def test_zarr_has_the_same_rows_from_any_number_of_workers(
    folder: Path, whole: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zarr", reason="needs zarr")
    codecs = {"rgb": "none", "depth": "blosc", "label": "zstd"}
    table = folder / "rows.csv"
    one = converted(table, tmp_path / "one", workers=1, codecs=codecs)
    monkeypatch.setattr("convert.executors.HELPERS_FROM", 0)
    two = converted(table, tmp_path / "two", workers=2, codecs=codecs)
    assert one.path.name == f"{whole.path.name}.zarr"
    assert files_of(one.path) == files_of(two.path)
    for field in whole.manifest.fields:
        np.testing.assert_array_equal(stored(one, field), stored(whole, field), field)
    for name in whole.manifest.columns:
        np.testing.assert_array_equal(one.column(name), whole.column(name), name)


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_the_same_lines_in_another_form_are_the_same_set(
    suffix: str, folder: Path, whole: ShardSet, tmp_path: Path
) -> None:
    table = write_table(folder / f"rows{suffix}", read_csv(folder / "rows.csv"))
    made = convert_frames(table, tmp_path, AS_IS)
    assert made.name == whole.path.name
    assert shard_bytes(made) == shard_bytes(whole.path)


def test_a_list_without_a_header_has_the_pictures_of_the_table(
    folder: Path, whole: ShardSet, tmp_path: Path
) -> None:
    rows = read_csv(folder / "rows.csv")
    lines = [f"{row['rgb']} {row['depth']} {row['label']}\n" for row in rows]
    (folder / "rows.txt").write_text("".join(lines))
    found = converted(folder / "rows.txt", tmp_path, replace(AS_IS, split_by="row:1,0,0"))
    order = np.argsort(found.column("row"))
    order_of_whole = np.argsort(whole.column("row"))
    for field in whole.manifest.fields:
        ours = stored(found, field)[order]
        np.testing.assert_array_equal(ours, stored(whole, field)[order_of_whole])


def fingerprint(table: Path, settings: ConversionSettings, codecs: dict | None = None) -> str:
    with closing(open_source(table, settings)) as source:
        return make_plan(source, settings, codecs).fingerprint


OTHERS = {
    "encoding": {"depth_encoding": "mm"},
    "scale": {"depth_scale": 1000.0},
    "cut": {"depth_trunc": 5.0},
    "void": {"label_void": 4},
    "split": {"split_by": "row"},
    "shares": {"split_by": "scene:0.5,0.25,0.25"},
    "size": {"size": 16},
    "fields": {"fields": ("rgb", "depth")},
    "shards": {"rows_per_shard": 5},
    "depth made smaller": {"depth_resize": "area"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_that_can_change_a_byte_names_another_directory(
    name: str, folder: Path, whole: ShardSet
) -> None:
    other = fingerprint(folder / "rows.csv", replace(AS_IS, **OTHERS[name]))
    assert other != whole.manifest.fingerprint


def changed(rows: list[Row], change: str) -> list[Row]:
    if change == "order":
        return rows[::-1]
    if change == "a path as written":
        return [{**rows[0], "rgb": f"./{rows[0]['rgb']}"}, *rows[1:]]
    if change == "a split":
        return [{**rows[0], "split": "test"}, *rows[1:]]
    if change == "a column more":
        return [{**row, "scene_type": "office"} for row in rows]
    return rows[:-1]


@pytest.mark.parametrize(
    "change", ["order", "a path as written", "a split", "a column more", "a line less"]
)
def test_other_lines_name_another_directory(change: str, folder: Path, whole: ShardSet) -> None:
    rows = changed(read_csv(folder / "rows.csv"), change)
    table = write_table(folder / "other.csv", rows)
    assert fingerprint(table, AS_IS) != whole.manifest.fingerprint


def test_what_changes_no_byte_keeps_the_directory(folder: Path, whole: ShardSet) -> None:
    table = folder / "rows.csv"
    blosc = dict.fromkeys(whole.manifest.fields, "blosc")
    same = whole.manifest.fingerprint
    assert fingerprint(table, AS_IS, blosc) == same
    rows = [{**row, "note": "not read"} for row in read_csv(table)]
    assert fingerprint(write_table(folder / "noted.csv", rows), AS_IS) == same


# ---------------------------------------------------------------- bad rows


def test_without_leave_nothing_with_bad_rows_is_published_and_the_line_says_how_to_go_on(
    copy: Path, tmp_path: Path, command: Run
) -> None:
    spoil(copy / "rows.csv", [3, 11])
    words = ("convert", "run", copy / "rows.csv", "--out", tmp_path / "out", *TINY)
    done = command(*words)
    assert done.returncode == 2
    assert not done.stdout
    last = done.stderr.splitlines()[-1]
    assert "2 of 21 rows cannot be read: row " in last
    assert "rgb/003.png is empty" in last
    assert "or go without: --max-failed 0.0953" in last
    (directory,) = (tmp_path / "out").glob("rows-*")
    assert not (directory / MANIFEST).exists()
    failed = {line["row"]: line for line in read_csv(directory / FAILED)}
    assert failed.keys() == {"3", "11"}
    assert str(directory / FAILED) in last

    leave = command(*words, "--max-failed", "0.0953")
    assert leave.returncode == 0, leave.stderr
    assert leave.stdout.strip() == str(directory)
    assert "2 of 21 rows are left empty, and out of training" in leave.stderr
    found = open_set(directory)
    is_failed = found.column("status") == 1
    assert sorted(found.column("row")[is_failed].tolist()) == [3, 11]
    assert is_whole(directory)
    assert len(read_csv(directory / FAILED)) == 2


def test_the_share_that_the_line_names_is_enough(copy: Path, tmp_path: Path) -> None:
    spoil(copy / "rows.csv", range(0, 21, 3))
    with pytest.raises(UserError, match=r"7 of 21 rows.*max_failed=(0\.\d+)") as error:
        converted(copy / "rows.csv", tmp_path / "out")
    share = float(str(error.value).rpartition("max_failed=")[2])
    found = converted(copy / "rows.csv", tmp_path / "out", max_failed=share)
    assert found.column("status").sum() == 7


def test_failed_rows_are_the_same_from_helpers(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(copy / "rows.csv", [0, 3, 11, 20])
    one = convert_frames(copy / "rows.csv", tmp_path / "one", AS_IS, max_failed=1, workers=1)
    monkeypatch.setattr("convert.executors.HELPERS_FROM", 0)
    two = convert_frames(copy / "rows.csv", tmp_path / "two", AS_IS, max_failed=1, workers=2)
    assert committed(one) == committed(two)
    assert FAILED in committed(one)


def test_repair_after_mending_reads_only_those_shards_and_ends_as_if_nothing_had_been_wrong(
    copy: Path, whole: ShardSet, tmp_path: Path
) -> None:
    table = copy / "rows.csv"
    spoil(table, [3, 11])
    found = converted(table, tmp_path / "out", max_failed=0.5)
    of_line = found.column("row").tolist()
    made_again = {of_line.index(line) // AS_IS.rows_per_shard for line in (3, 11)}
    assert len(made_again) < len(found.manifest.shards) - 2

    mend(table, [3, 11])
    rows = read_csv(table)
    kept_away = [
        copy / rows[line]["rgb"]
        for row, line in enumerate(of_line)
        if row // AS_IS.rows_per_shard not in made_again
    ]
    for path in kept_away:
        path.unlink()
    repaired = convert_frames(table, tmp_path / "out", AS_IS, repair=True)
    assert committed(repaired) == committed(whole.path)
    assert not (repaired / FAILED).exists()


def test_repair_of_rows_that_are_still_bad_leaves_the_set_as_it_was(
    copy: Path, tmp_path: Path
) -> None:
    table = copy / "rows.csv"
    spoil(table, [3, 11])
    made = convert_frames(table, tmp_path / "out", AS_IS, max_failed=0.5)
    before = committed(made)
    assert convert_frames(table, tmp_path / "out", AS_IS, max_failed=0.5, repair=True) == made
    assert committed(made) == before


def test_an_unfinished_set_tries_its_failed_rows_again_by_itself(
    copy: Path, whole: ShardSet, tmp_path: Path
) -> None:
    table = copy / "rows.csv"
    spoil(table, [3])
    with pytest.raises(UserError, match="1 of 21 rows cannot be read"):
        converted(table, tmp_path / "out")
    mend(table, [3])
    made = convert_frames(table, tmp_path / "out", AS_IS)
    assert committed(made) == committed(whole.path)


def test_a_copy_takes_no_row_from_a_conversion_that_could_not_read_it(
    copy: Path, whole: ShardSet, tmp_path: Path
) -> None:
    pytest.importorskip("zarr", reason="needs zarr")
    elsewhere = copy_set(
        whole, tmp_path / "elsewhere", codecs_of("zarr", "none", whole.settings.fields)
    )
    spoil(copy / "rows.csv", [3, 11])
    with pytest.raises(UserError, match="2 of 21 rows cannot be read"):
        converted(copy / "rows.csv", tmp_path / "here")
    assert committed(copy_set(elsewhere, tmp_path / "here", None).path) == committed(whole.path)


def test_a_copy_takes_no_shard_of_another_decoder(
    folder: Path, whole: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = convert_frames(folder / "rows.csv", tmp_path, AS_IS)
    write_receipts(LocalFolder(made), replace(whole.manifest, decoder="another 1.0"), [], {})
    flip(made / "rgb-00001.npy")
    (made / MANIFEST).unlink()
    copied = copy_set(whole, tmp_path, None).path
    assert committed(copied) == committed(whole.path)


def test_a_session_whose_rows_cannot_be_read_keeps_its_shards_on_drive(
    copy: Path, whole: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is mended after it comes to Drive, not what was packed of it before."""
    table = copy / "rows.csv"
    drive = tmp_path / "mount" / "drive"
    drive.parent.mkdir()
    spoil(table, [3, 11])

    n_others = len(whole.manifest.shards) - 1
    write = run.write_shard

    def write_the_last_when_the_others_are_on_drive(
        plan: Plan, shard: FullShard, *more: Any
    ) -> Receipt:
        while shard.number == n_others and len(receipts()) < n_others:
            time.sleep(0.01)
        return write(plan, shard, *more)

    def receipts() -> list[Path]:
        return list(drive.glob("*/receipt-*.json"))

    def session() -> Path:
        with closing(open_source(table, AS_IS)) as source:
            return prepare(SetRequest(root=tmp_path, settings=AS_IS, source=source, drive=drive))

    monkeypatch.setattr(run, "write_shard", write_the_last_when_the_others_are_on_drive)
    with pytest.raises(UserError, match="2 of 21 rows cannot be read"):
        session()
    assert len(receipts()) >= n_others
    monkeypatch.undo()
    mend(table, [3, 11])
    assert committed(session()) == committed(whole.path)
    (on_drive,) = finished_sets(drive)
    assert committed(copy_set(open_set(on_drive), tmp_path / "b", None).path) == committed(
        whole.path
    )


def test_a_table_that_is_written_again_as_it_was_keeps_its_shards(
    copy: Path, whole: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = copy / "rows.csv"
    spoil(table, [3])
    with pytest.raises(UserError, match="1 of 21 rows cannot be read"):
        converted(table, tmp_path / "out")
    table.write_bytes(table.read_bytes())
    mend(table, [3])
    capsys.readouterr()
    made = convert_frames(table, tmp_path / "out", AS_IS)
    n_shards = len(whole.manifest.shards)
    assert f"{n_shards} of {n_shards} shards are done already" in capsys.readouterr().err
    assert committed(made) == committed(whole.path)


def test_a_hundred_failures_too_many_end_it_early(folder: Path, tmp_path: Path) -> None:
    """The last row can be read, so that not every row tried beforehand fails."""
    right = {**read_csv(folder / "rows.csv")[0], "split": "test"}
    wrong = [{**right, "split": "train", "rgb": f"nowhere/{k}.png"} for k in range(500)]
    table = write_table(folder / "nowhere.csv", [right, *wrong])
    settings = replace(AS_IS, rows_per_shard=32)
    with pytest.raises(
        UserError, match=r"the rest was not tried.*Check where its paths lead"
    ) as error:
        converted(table, tmp_path, settings, workers=1)
    n_failed = int(str(error.value).partition(" rows cannot be read")[0].split()[-1])
    assert 100 < n_failed <= 132
    (listed,) = tmp_path.glob(f"*/{FAILED}")
    assert len(read_csv(listed)) == n_failed
    assert not list(tmp_path.glob(f"*/{MANIFEST}"))


# ---------------------------------------------------------------- what a run meets


def test_a_set_of_another_table_of_that_name_is_not_taken_in_silence(
    folder: Path, whole: ShardSet, command: Run
) -> None:
    mistyped = folder / "kitchne" / "rows.csv"
    done = command("convert", "run", mistyped, "--out", whole.path.parent, *TINY)
    assert done.stdout.strip() == str(whole.path)
    assert f"{mistyped} is not there: taken is the set of what had its name" in done.stderr


def test_a_run_whose_lines_nobody_reads_does_not_end_as_if_all_were_done(
    many: Path, tmp_path: Path
) -> None:
    with running(many, tmp_path, *ONE_BY_ONE) as process:
        assert process.stderr is not None
        process.stderr.close()
        status = process.wait()
    assert (status == 0) is bool(list(tmp_path.glob(f"*/{MANIFEST}")))


def test_a_killed_run_goes_on_and_ends_byte_identical(many: Path, tmp_path: Path) -> None:
    expected = convert_frames(many, tmp_path / "expected", replace(AS_IS, rows_per_shard=1))
    with running(many, tmp_path / "out", *ONE_BY_ONE) as process:
        until_a_shard_is_done(process, tmp_path / "out")
        process.kill()
        process.wait()
    assert not list(tmp_path.glob(f"out/*/{MANIFEST}"))
    assert list(tmp_path.glob("out/*/receipt-*"))
    made = convert_frames(many, tmp_path / "out", replace(AS_IS, rows_per_shard=1))
    assert committed(made) == committed(expected)
    assert not [path for path in made.rglob(".*") if not path.name.endswith(".lock")]


def test_of_two_runs_one_works_and_the_other_says_who(
    many: Path, tmp_path: Path, command: Run
) -> None:
    with running(many, tmp_path, *ONE_BY_ONE) as process:
        until_a_shard_is_done(process, tmp_path)
        process.send_signal(signal.SIGSTOP)
        other = command("convert", "run", many, "--out", tmp_path, *ONE_BY_ONE)
        assert other.returncode == 2
        assert f"is being converted by pid {process.pid} on " in other.stderr
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    (made,) = tmp_path.glob("many-*")
    assert is_whole(made)


def test_a_disk_that_fills_up_ends_in_one_line_and_the_next_run_goes_on(
    many: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 32 << 20) as disk:
        with running(many, disk / "out", *ONE_BY_ONE) as process:
            until_a_shard_is_done(process, disk / "out")
            fill(disk)
            assert "No space left on device" in ends_in_one_line(process, 2)
        assert list(disk.glob("out/*/receipt-*"))
        (disk / "filler").unlink()
        assert is_whole(convert_frames(many, disk / "out", replace(AS_IS, rows_per_shard=1)))


def test_a_table_that_changes_while_it_is_read_is_not_published(many: Path, tmp_path: Path) -> None:
    table = Path(shutil.copy(many, many.parent / "changing.csv"))
    with running(table, tmp_path, *ONE_BY_ONE) as process:
        until_a_shard_is_done(process, tmp_path)
        with open(table, "a") as file:
            file.write("rgb/000.png,depth/000.png,label/000.png,room 0,train\n")
        assert "changed while it was read" in ends_in_one_line(process, 2)
    assert not list(tmp_path.glob("*/receipt-*"))
    assert not list(tmp_path.glob(f"*/{MANIFEST}"))


def test_a_directory_that_gets_a_picture_meanwhile_is_not_published(
    copy: Path, tmp_path: Path
) -> None:
    for name in ("rgb", "depth", "label"):
        for number in range(N_ROWS, N_MANY):
            source = copy / name / f"{number % N_ROWS:03d}.png"
            os.link(source, copy / name / f"{number:03d}.png")
    with running(copy, tmp_path / "out", *ONE_BY_ONE) as process:
        until_a_shard_is_done(process, tmp_path / "out")
        write_file(copy / "rgb" / "later.png", png(picture_of(0)["rgb"]))
        assert "changed while it was read" in ends_in_one_line(process, 2)
    assert not list(tmp_path.glob(f"out/*/{MANIFEST}"))


def test_ctrl_c_is_one_line_and_leaves_no_temporary_file(many: Path, tmp_path: Path) -> None:
    with running(many, tmp_path, *ONE_BY_ONE) as process:
        until_a_shard_is_done(process, tmp_path)
        process.send_signal(signal.SIGINT)
        assert ends_in_one_line(process, 130).startswith("interrupted: what is finished is kept")
    assert not [path for path in tmp_path.rglob(".*") if not path.name.endswith(".lock")]


def test_a_second_run_does_nothing(
    folder: Path, whole: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.path.iterdir()}
    assert convert_frames(folder / "rows.csv", whole.path.parent, AS_IS) == whole.path
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.path.iterdir()} == before


# ---------------------------------------------------------------- verify, copies, looking at it


def verified(found: ShardSet, table: Path, *more: object) -> int:
    """The status of the command."""
    words = ["verify", found.path, "--against", table, "--rows", "1000", *more]
    return main([str(word) for word in words])


def test_verify_reads_every_row_again(
    folder: Path, whole: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verified(whole, folder / "rows.csv") == 0
    assert f"every column and {N_ROWS} random rows are what" in capsys.readouterr().out


def test_verify_names_the_row_whose_picture_is_another_one(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = converted(copy / "rows.csv", tmp_path / "out")
    row = found.column("row").tolist().index(5)
    write_file(copy / "label" / "005.png", png(picture_of(99)["label"]))
    assert verified(found, copy / "rows.csv") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    shard = row // AS_IS.rows_per_shard
    assert f"label-{shard:05d}.npy: row {row} is not what" in line


def test_verify_compares_statuses(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = copy / "rows.csv"
    spoil(table, [5])
    found = converted(table, tmp_path / "out", max_failed=0.5)
    assert verified(found, table) == 0
    mend(table, [5])
    capsys.readouterr()
    assert verified(found, table) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "is not what" in line or "column status" in line

    right = converted(table, tmp_path / "right")
    spoil(table, [5])
    assert verified(right, table) == 2


def test_verify_of_another_table_says_that_the_set_is_not_of_it(
    folder: Path, whole: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = changed(read_csv(folder / "rows.csv"), "a split")
    table = write_table(folder / "another.csv", rows)
    assert verified(whole, table) == 2
    assert "is not what" in capsys.readouterr().err.splitlines()[-1]


def test_another_decoder_is_one_line_and_leaves_a_finished_set_alone(
    folder: Path,
    whole: ShardSet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("convert.sources.frames.decoder_name", lambda: "another 1.0")
    assert convert_frames(folder / "rows.csv", whole.path.parent, AS_IS) == whole.path
    capsys.readouterr()
    assert verified(whole, folder / "rows.csv") == 2
    errors = capsys.readouterr().err.splitlines()
    assert f"is decoded by another 1.0 here, {whole.path} was by " in errors[-1]
    assert len([line for line in errors if "median pixel" not in line]) == 1


def test_shards_of_another_decoder_are_made_again(
    copy: Path, whole: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(copy / "rows.csv", [3])
    with monkeypatch.context() as patch:
        patch.setattr("convert.sources.frames.decoder_name", lambda: "another 1.0")
        with pytest.raises(UserError, match="1 of 21 rows"):
            converted(copy / "rows.csv", tmp_path / "out")
    mend(copy / "rows.csv", [3])
    made = convert_frames(copy / "rows.csv", tmp_path / "out", AS_IS)
    assert committed(made) == committed(whole.path)


@pytest.mark.parametrize("name", ["depth-00002.npy", "rows-size.npy", "rows-status.npy"])
def test_a_damaged_set_is_mended_by_the_command_that_verify_prints(
    name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    words = ["run", copy / "rows.csv", "--out", tmp_path, *TINY, "--depth-trunc", "8"]
    assert main([str(word) for word in words]) == 0
    made = Path(capsys.readouterr().out.strip())
    before = committed(made)
    flip(made / name)
    assert main(["verify", str(made)]) == 2
    printed = capsys.readouterr().err.strip().partition("Run: ")[2]
    assert printed.startswith("python -m convert run ")
    assert main(shlex.split(printed)[3:]) == 0
    assert committed(made) == before


def test_a_set_of_frames_is_pushed_pulled_repacked_and_looked_at(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("zarr", reason="needs zarr")
    spoiled = Path(shutil.copytree(folder, tmp_path / "frames"))
    spoil(spoiled / "rows.csv", [2])

    def made(*words: object) -> Path:
        assert main([str(word) for word in words]) == 0
        return Path(capsys.readouterr().out.splitlines()[-1])

    first = made("run", spoiled / "rows.csv", "--out", tmp_path / "a", *TINY, "--max-failed", 0.1)
    pushed = made("push", first, tmp_path / "drive")
    pulled = made("pull", tmp_path / "drive", tmp_path / "b")
    assert is_whole(pushed)
    assert committed(pulled) == committed(first)
    packed = made("run", first, "--out", tmp_path / "c", "--format", "zarr", "--codec", "blosc")
    back = made("run", packed, "--out", tmp_path / "d")
    assert committed(back) == committed(first)
    assert verified(open_set(packed), spoiled / "rows.csv") == 0

    capsys.readouterr()
    assert main(["inspect", str(packed)]) == 0
    said = capsys.readouterr().out
    assert "rows      21: 12 train, 6 val, 3 test, 7 scenes (0 in several splits)" in said
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    made("inspect", first, "--picture", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_what_stands_in_the_way_of_a_table_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    cases = {
        "no column of rgb paths": [tmp_path / "x.csv"],
        "choose one of mm, metres": [folder / "rows.csv", "--depth-encoding", "kinect"],
        "mm says it already": [
            folder / "rows.csv",
            "--depth-encoding",
            "mm",
            "--depth-scale",
            "5",
        ],
        "has no column a": [folder / "rows.csv", "--split-by", "a"],
        "have no box in common": [folder / "rows.csv", "--crop", "border"],
        "no column thermal": [folder / "rows.csv", "--field", "thermal=grey"],
        "is colour already": [folder / "rows.csv", "--field", "rgb=grey"],
        "choose a name of": [folder / "rows.csv", "--name", "My Rooms"],
        "cannot be read as UTF-8": [folder / "rows.csv", "--label-names", folder / "none.txt"],
        "is not there": [folder / "gone.csv"],
    }
    wrong = {}
    for expected, words in cases.items():
        status = main(["run", *map(str, words), "--out", str(tmp_path / "out")])
        errors = capsys.readouterr().err.splitlines()
        if status != 2 or len(errors) > 2 or expected not in errors[-1]:
            wrong[expected] = (status, errors)
    assert not wrong
    assert not (tmp_path / "out").exists()


def test_jpeg_rgb_and_png_depth_of_one_size_convert_from_a_path_as_python_gives_it(
    tmp_path: Path,
) -> None:
    """`convert()` takes the path of a table."""
    from convert.pipeline import convert

    write_file(tmp_path / "a.jpg", jpeg(picture_of(0)["rgb"]))
    write_file(tmp_path / "a.png", png(picture_of(0)["depth"]))
    table = write_table(tmp_path / "t.csv", [{"rgb": "a.jpg", "depth": "a.png"}])
    found = open_set(Path(convert(str(table), tmp_path / "out", AS_IS)))
    np.testing.assert_array_equal(stored(found, "depth")[0], picture_of(0)["depth"])


def test_sets_do_not_lie_among_the_pictures_that_they_are_made_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rooms = Path(shutil.copytree(folder, tmp_path / "rooms"))
    words = ["--size", "8", "--workers", "1"]
    assert main(["run", str(rooms), "--out", str(rooms), *words]) == 2
    assert "is the source itself: choose a folder of its own" in capsys.readouterr().err
    # Made of a table that lies there, one may; which of both a folder stands for is asked then.
    assert main(["run", str(rooms / "rows.csv"), "--out", str(rooms), *words]) == 0
    made = Path(capsys.readouterr().out.strip())
    assert main(["run", str(rooms), "--out", str(tmp_path / "out")]) == 2
    assert f"holds a finished set, {made.name}, beside other folders" in capsys.readouterr().err
    assert main(["run", str(made), "--out", str(tmp_path / "out")]) == 0
