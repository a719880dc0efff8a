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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.command import exit_status, make_parser
from convert.repack import CODECS, Codecs, write_rest, write_shard
from shards import format as fmt

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


def write(found: fmt.ShardSet, directory: Path, codecs: Codecs) -> Figures:
    """Write the set into `directory`; seconds a field, and of the rest."""
    manifest = {k: v for k, v in found.manifest.items() if k not in ("codecs", "metadata")}
    manifest["shards"] = [{"rows": shard["rows"], "files": {}} for shard in manifest["shards"]]
    n_slots = found.settings.rows_per_shard
    write_s: Figures = {}
    for field in manifest["fields"]:
        rows = [np.array(shard) for shard in found.shards(field)]  # in memory: reading is not timed
        started = time.perf_counter()
        for k, shard in enumerate(manifest["shards"]):
            shard["files"] |= write_shard(directory, field, k, rows[k], n_slots, codecs)
        write_s[field] = time.perf_counter() - started

    started = time.perf_counter()
    columns = {name: found.column(name) for name in fmt.COLUMNS}
    write_rest(directory, manifest, columns, codecs)
    write_s[REST] = time.perf_counter() - started
    return write_s


def decode(directory: Path) -> Figures:
    """Every row of every field, touched once; seconds a field."""
    found = fmt.open_set(directory)
    decode_s: Figures = {REST: 0.0}
    for field in found.manifest["fields"]:
        started = time.perf_counter()
        for k in range(len(found.manifest["shards"])):
            found.shard(field, k).max()
        decode_s[field] = time.perf_counter() - started
    return decode_s


def sizes(directory: Path) -> Figures:
    """MB a field, and of the rest."""
    manifest = fmt.read_manifest(directory)
    size_mb: Figures = defaultdict(float)
    for name, facts in fmt.all_files(manifest).items():
        first = name.split("/")[0].split("-")[0]  # rgb-00000.npy, rgb/c/0/0/0/0
        is_fields = first in manifest["fields"] and "zarr.json" not in name
        size_mb[first if is_fields else REST] += facts["bytes"] / 1e6
    return size_mb


def run_round(found: fmt.ShardSet, container: Container, disk: Path | None) -> Round:
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
    found = fmt.open_set(fmt.resolve_set(args.data))
    fields = list(found.manifest["fields"])
    rounds_of: dict[str, list[Round]] = defaultdict(list)
    for _ in range(args.rounds):
        for container in containers_for(fields):
            rounds_of[container.name].append(run_round(found, container, args.out))
    print_table(rounds_of, [*fields, REST])


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("pack", __doc__)
    parser.add_argument("data", type=Path, metavar="DIR|ROOT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, help="the disk to write to (default: that of temporary files)"
    )
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
