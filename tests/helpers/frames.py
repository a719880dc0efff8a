"""Tables and directories of frames for tests: written, read in plain ways, and converted.

A test file that imports this one is skipped whole where Pillow or pyarrow is missing.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs pillow")
pytest.importorskip("pyarrow", reason="needs pyarrow")

from PIL import Image, ImageOps

from convert import pipeline
from convert.resize import Resizer, nearest_indices
from convert.sample_frames import npy, png, pnm, write_frames
from convert.sources.layouts import LAYOUTS
from convert.sources.listings import Wanted
from convert.sources.opening import SourceOptions, open_source
from convert.sources.tables import NONE
from shards.dataset import ShardSet, open_set
from shards.spec import SPLITS, Codecs, ConversionSettings, Field

SIZES_WH = ((48, 36), (40, 32), (36, 48))  # of made-up rooms: small
SETTINGS = ConversionSettings(size=16, rows_per_shard=7)
AS_IS = ConversionSettings(size=8, rows_per_shard=4)  # pictures of 8x8 are stored as they are
SIDE = 8
Row = dict[str, str]  # a line of a table, by column


# ---------------------------------------------------------------------------------------- writing


def write_file(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.name


def write_table(path: Path, rows: Sequence[Row]) -> Path:
    """As what its suffix says; columns are those of the first row."""
    names = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        text = io.StringIO()
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(text, names, delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue())
    return path


def read_csv(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def picture_of(number: int) -> dict[str, np.ndarray]:
    """An rgb, a depth in millimetres and a label of 8x8 pixels; each number has others."""
    rng = np.random.default_rng(number)
    return {
        "rgb": rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
        "depth": rng.integers(0, 9001, (SIDE, SIDE), dtype=np.uint16),
        "label": rng.integers(0, 5, (SIDE, SIDE), dtype=np.uint8),
    }


def write_frames_of(folder: Path, n_rows: int, **more: str) -> list[Row]:
    """Rows of 8x8 PNGs, and their lines; `more`: further cells of every line."""
    rows = []
    for number in range(n_rows):
        row = {}
        for field, picture in picture_of(number).items():
            row[field] = f"{field}/{number:03d}.png"
            write_file(folder / row[field], png(picture))
        rows.append({**row, **more})
    return rows


def made_up_rooms(made: Path, n_rows: int, *, bad: bool = False) -> Path:
    """A small directory of `convert sample --layout frames`, inside of this one."""
    folder = made / "rooms"
    write_frames(folder, n_rows, sizes_wh=SIZES_WH, bad=bad)
    return folder


# ------------------------------------------------------------------------- read again, in plain ways


def image_at(path: Path) -> Any:
    """Pillow's, as stored; its file is closed."""
    return Image.open(io.BytesIO(path.read_bytes()))


def read_plainly(path: Path, field: str) -> np.ndarray:
    """The pixels of a file upright, by Pillow and numpy alone; depth of it in millimetres."""
    if path.suffix == ".npy":
        samples = np.load(path)
    else:
        image: Any = ImageOps.exif_transpose(image_at(path))
        samples = np.asarray(image.convert("RGB") if field == "rgb" else image)
    if field == "depth" and samples.dtype.kind == "f":
        return np.rint(samples.astype(np.float64) * 1000).astype(np.uint16)
    return samples.astype(np.uint8 if field == "rgb" else np.uint16)


def as_fraction(stored: float) -> Fraction:
    return Fraction(float(stored))


# ------------------------------------------------------------------------------------- converting


def convert_frames(
    source: Path,
    root: Path,
    settings: ConversionSettings = SETTINGS,
    options: SourceOptions | None = None,
    **how: Any,
) -> Path:
    """`convert.pipeline.convert` of a table or directory, its path as a Path."""
    codecs: Codecs = how.pop("codecs", None)
    with closing(open_source(source, settings, options)) as opened:
        return Path(pipeline.convert(opened, root, settings, codecs=codecs, **how))


def converted(
    source: Path, root: Path, settings: ConversionSettings = AS_IS, **how: Any
) -> ShardSet:
    """The same, opened."""
    return open_set(convert_frames(source, root, settings, **how))


def stored(found: ShardSet, field: str) -> np.ndarray:
    """[N, ...] all rows of a field."""
    return np.concatenate(found.shards(field))


def by_line(found: ShardSet, field: str) -> dict[int, np.ndarray]:
    """Each row of a field, by its line in the table."""
    lines = found.column("row").tolist()
    return dict(zip(lines, stored(found, field), strict=True))


def resized(field: Field, picture: np.ndarray, size: int) -> np.ndarray:
    """A picture (H, W[, 3]) as the rules of sizes make it."""
    return Resizer(field=replace(field, statistics=None), size=size, is_hw=True)(picture)


def raw_pgm(readings: np.ndarray) -> bytes:
    """A PGM whose bytes lie as in NYU's raw depths."""
    return pnm(readings.byteswap())


def as_npy(array: Any, dtype: str) -> bytes:
    return npy(np.asarray(array, dtype))


def statuses(found: ShardSet) -> Mapping[int, int]:
    """By line."""
    return dict(zip(found.column("row").tolist(), found.column("status").tolist(), strict=True))


# ---------------------------------------------------------------------------------------- layouts


def lines_of(source: Path, layout: str, kinds: Mapping[str, str] | None = None) -> list[Row]:
    """The table that a layout makes of a source: a dictionary a line, without empty cells but of
    pictures.
    """
    table = LAYOUTS[layout].read(source, Wanted(kinds=kinds or {})).table
    lines = []
    for k in range(table.n_rows):
        line = {field: paths[k] for field, paths in table.paths.items()}
        if table.split is not None:
            line["split"] = SPLITS[table.split[k]]
        for name, column in table.columns.items():
            if column.numbers[k] != NONE:
                line[name] = column.names[column.numbers[k]]
        lines.append(line)
    return lines


def stored_pixels(small: np.ndarray, shape_hw: tuple[int, int]) -> np.ndarray:
    """(H, W) of a picture that was stored at the longer of its sides: every pixel of it once."""
    size = small.shape[-1]
    rows, columns = (np.searchsorted(nearest_indices(n, size), np.arange(n)) for n in shape_hw)
    return small[np.ix_(rows, columns)]
