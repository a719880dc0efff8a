"""Is every byte of a set right, and is it what the source gives."""

import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert.decode import blaming
from convert.resize import Resizer
from convert.sources.base import Source
from convert.sources.nyu import NyuSource
from convert.sources.nyu_mat import check_opens, sampled_identity
from shards.dataset import ShardSet, verify
from shards.errors import DamagedSet, OtherSet, WrongSource
from shards.manifest import shard_file

SHOWN = 3  # of the wrong files


class WrongFiles(DamagedSet):
    """Files of a set that are not as its manifest says, and those that are no part of it.

    wrong: file -> what is wrong. foreign: those of them that are not part of the set.
    """

    def __init__(self, found: ShardSet, wrong: Mapping[str, str]) -> None:
        said = [f"{found.path / name} {problem}" for name, problem in wrong.items()]
        more = f" (and {len(said) - SHOWN} more)" if len(said) > SHOWN else ""
        first_name, first_problem = next(iter(wrong.items()))
        problems = "; ".join([first_problem, *said[1:SHOWN]])
        super().__init__(found.path, f"{problems}{more}", subject=str(found.path / first_name))
        self.found = found
        self.wrong = dict(wrong)
        self.foreign = [name for name in wrong if name not in found.manifest.files]


class OtherRows(OtherSet):
    """Rows that are not what the source gives, in a set whose every byte is as it was written."""


def verify_all(found: ShardSet) -> int:
    """Check every file; how many are right. Raises WrongFiles."""
    checking = tqdm(
        verify(found),
        total=len(found.manifest.files),
        desc="verify",
        unit="file",
        disable=None,
    )
    wrong = {name: problem for name, problem in checking if problem}
    if wrong:
        raise WrongFiles(found, wrong)
    return len(found.manifest.files)


def against_mat(found: ShardSet, path: Path, n_rows: int) -> int:
    """`against_source` for the .mat at `path`. Raises WrongSource where it is not the set's."""
    check_opens(path)
    if sampled_identity(path).content() != found.manifest.source.content():
        raise WrongSource(path, f"is not what {found.path} was made from", "Convert it by itself")
    with closing(NyuSource(path, found.settings)) as source:
        return against_source(found, source, n_rows)


def against_source(found: ShardSet, source: Source, n_rows: int) -> int:
    """Re-read random rows from the source and compare them with the stored ones, byte for byte.

    Returns how many rows were compared; raises OtherRows for the first one that differs.
    """
    n_compared = min(n_rows, found.n_rows)
    rows = np.random.default_rng().choice(found.n_rows, n_compared, replace=False)
    for field in found.manifest.fields:
        _compare(found, field, source, sorted(rows.tolist()))
    return n_compared


def _compare(found: ShardSet, field: str, source: Source, rows: list[int]) -> None:
    called = source.name_of(field)
    resizer = _resizer(found, field, source)
    shards = found.shards(field)
    with closing(source.reader(field)) as reader:
        with blaming(str(source), called, None, source.advice):
            reader.read_index()
            if reader.scratch_bytes:
                reader.fill_scratch(Path(tempfile.gettempdir()))
        for row in rows:
            with blaming(str(source), called, row, source.advice):
                group, place_in_group = divmod(row, reader.group_rows)
                large = reader.read_group(group)[place_in_group]
                small = resizer(large)
            shard, place = divmod(row, found.settings.rows_per_shard)
            if not np.array_equal(small, shards[shard][place]):
                file = shard_file(found.field(field), shard, found.manifest.is_zarr)
                what = f"row {row} is not what {source} gives"
                subject = f"{found.path / file}:"
                raise OtherRows(found.path, what, f"Delete {found.path}", subject=subject)


def _resizer(found: ShardSet, field: str, source: Source) -> Resizer:
    crop = found.settings.crop
    return Resizer(
        field=replace(found.field(field), statistics=None),
        size=found.settings.size,
        box=None if crop == "none" else found.dataset.crop_box(crop),
        depth_resize=found.settings.depth_resize,
        highest_id=source.highest_id(field),
    )
