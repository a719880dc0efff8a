"""Size, writing and decoding of a set's fields in each container and codec.

    python -m bench.pack DIR [--rounds 3]

Writing: rows in the page cache -> shard files, encoded, hashed, fsynced, renamed. Decoding: shard
files in the page cache -> arrays in memory (of what is mapped: one pass over the pages). The
containers take turns; figures are medians.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.command import SET, add_number, exit_status, make_parser
from shards.containers import CODECS, ShardForm, write_field
from shards.dataset import ShardSet, open_set, resolve_set
from shards.files import FileEntry, LocalFolder
from shards.flags import Parser, as_path
from shards.manifest import read_manifest
from shards.spec import Codecs
from shards.writing import commit

REST = "rest"  # what belongs to no field: columns, metadata
Figures = dict[str, float]  # of each field, and of the rest


@dataclass(frozen=True, kw_only=True)
class Container:
    """.npy, or Zarr with one codec for every field."""

    name: str
    codecs: Codecs


@dataclass(frozen=True, kw_only=True)
class Round:
    """One container, written and decoded once."""

    write_s: Figures
    decode_s: Figures
    size_mb: Figures


def containers_for(fields: Sequence[str]) -> list[Container]:
    """All that there are."""
    found = [Container(name="npy", codecs=None)]
    for codec in CODECS:
        found.append(Container(name=f"zarr {codec}", codecs=dict.fromkeys(fields, codec)))
    return found


def write(found: ShardSet, directory: Path, codecs: Codecs) -> Figures:
    """Write the set into `directory`; seconds a field, and of the rest."""
    form = ShardForm(codecs=codecs, n_slots=found.settings.rows_per_shard)
    folder = LocalFolder(directory)
    files_of_shard: list[dict[str, FileEntry]] = [{} for _ in found.manifest.shards]
    write_s: Figures = {}
    for name, field in found.manifest.fields.items():
        rows = [np.array(shard) for shard in found.shards(name)]  # in memory: reading is not timed
        started = time.perf_counter()
        for k, files in enumerate(files_of_shard):
            files |= write_field(folder, field, k, rows[k], form)
        write_s[name] = time.perf_counter() - started

    started = time.perf_counter()
    shards = [
        replace(shard, files=files)
        for shard, files in zip(found.manifest.shards, files_of_shard, strict=True)
    ]
    manifest = replace(found.manifest.without_files(), shards=shards, codecs=codecs)
    commit(folder, manifest, {name: found.values(name) for name in manifest.columns})
    write_s[REST] = time.perf_counter() - started
    return write_s


def decode(directory: Path) -> Figures:
    """Every row of every field, touched once; seconds a field."""
    found = open_set(directory)
    decode_s: Figures = {REST: 0.0}
    for field in found.manifest.fields:
        started = time.perf_counter()
        for k in range(found.n_shards):
            found.shard(field, k).max()
        decode_s[field] = time.perf_counter() - started
    return decode_s


def sizes(directory: Path) -> Figures:
    """MB a field, and of the rest."""
    manifest = read_manifest(directory)
    size_mb: Figures = defaultdict(float)
    for name, entry in manifest.files.items():
        first = name.split("/")[0].split("-")[0]  # rgb-00000.npy, rgb/c/0/0/0/0
        is_of_field = first in manifest.fields and "zarr.json" not in name
        size_mb[first if is_of_field else REST] += entry.n_bytes / 1e6
    return size_mb


def run_round(found: ShardSet, container: Container, disk: Path | None) -> Round:
    """In a folder of its own, which is removed."""
    directory = Path(tempfile.mkdtemp(dir=disk))
    try:
        return Round(
            write_s=write(found, directory, container.codecs),
            decode_s=decode(directory),
            size_mb=sizes(directory),
        )
    finally:
        shutil.rmtree(directory)


def print_medians(name: str, rounds: Sequence[Figures], columns: Sequence[str]) -> None:
    """A line of the table: each column's median, and that of the rounds' sums."""
    cells = [[figures[column] for column in columns] for figures in rounds]
    with_sums = [[*each, sum(each)] for each in cells]
    medians = np.median(with_sums, axis=0)
    print(f"{name:26}" + "".join(f"{value:10.2f}" for value in medians))


def print_table(rounds_of: Mapping[str, Sequence[Round]], columns: Sequence[str]) -> None:
    """Three lines a container."""
    print(f"{'':26}" + "".join(f"{column:>10}" for column in (*columns, "all")))
    for name, rounds in rounds_of.items():
        print_medians(f"{name:16} write s", [each.write_s for each in rounds], columns)
        print_medians(f"{name:16} decode s", [each.decode_s for each in rounds], columns)
        print_medians(f"{name:16} MB", [each.size_mb for each in rounds], columns)


def report(args: argparse.Namespace) -> None:
    """Every container in turn, then the table."""
    found = open_set(resolve_set(args.data))
    fields = list(found.manifest.fields)
    rounds_of: dict[str, list[Round]] = defaultdict(list)
    for _ in range(args.rounds):
        for container in containers_for(fields):
            rounds_of[container.name].append(run_round(found, container, args.out))
    print_table(rounds_of, [*fields, REST])


def make_flags() -> Parser:
    """Those of the command line."""
    parser = make_parser("pack", __doc__)
    parser.add_argument("data", type=as_path, metavar="SET", help=SET)
    add_number(parser, "--rounds", 3, "how often each container is written and read")
    out_help = "the disk to write to (default: that of temporary files)"
    parser.add_argument("--out", type=as_path, metavar="DIR", help=out_help)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
