"""SUNRGBD2Dseg.mat: a label picture a row, of which one is read at a time.

It is a file of MATLAB v7.3 whose 10,335 pictures, twice, as doubles, take some 60 GB where they are
loaded together. `SUNRGBD2Dseg/seglabel` is (rows, 1) references, each to one picture (W, H).
"""

from pathlib import Path

import h5py

from convert.sources.hdf5 import NOT_THE_FILES, in_hdf5_thread
from convert.sources.listings import Found, found_at
from shards.errors import WrongSource, one_line

CELLS = "SUNRGBD2Dseg/seglabel"


def label_planes(file: Path, n_rows: int) -> list[Found]:
    """The label of each row, as a table names a plane of a file.

    Raises WrongSource where the file is damaged, or not one of so many rows.
    """
    n_cells = _n_cells(file)
    if n_cells != n_rows:
        what = f"has {n_cells} labels, and allsplit.mat {n_rows} rows"
        raise WrongSource(file, what, "They come in one archive: take both from it")
    whole = found_at(file.parent, file.name)
    return [
        Found(f"{file.name}#{CELLS}[{row}]", whole.n_bytes, whole.changed_ns)
        for row in range(n_rows)
    ]


@in_hdf5_thread
def _n_cells(file: Path) -> int:
    """Raises WrongSource."""
    try:
        with h5py.File(file, "r", locking=False) as opened:
            cells = opened.get(CELLS)
            is_cells = isinstance(cells, h5py.Dataset)
            if is_cells and h5py.check_ref_dtype(cells.dtype) is h5py.Reference:
                return int(cells.size or 0)
    except NOT_THE_FILES:
        raise
    except Exception as error:
        what = f"cannot be read as MATLAB v7.3 ({one_line(error)})"
        raise WrongSource(file, what, "Copy or download it again") from None
    raise WrongSource(file, f"has no cell array {CELLS}", "Copy or download it again")
