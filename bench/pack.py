"""Size, writing and decoding of a set's fields in each container and codec: python -m bench.pack DIR [--rounds 3]

Writing: rows in the page cache -> shard files, encoded, hashed, fsynced, renamed. Decoding: shard files in the page
cache -> arrays in memory (of what is mapped: one pass over the pages). The containers take turns; figures are medians.
"""

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from convert.repack import CODECS, Codecs, write_rest, write_shard
from shards import format as fmt


def write(found: fmt.ShardSet, directory: Path, codecs: Codecs) -> dict[str, float]:
    """Write the set into `directory`; seconds a field, and of the rest."""
    seconds, manifest = {}, {k: v for k, v in found.manifest.items() if k not in ("codecs", "metadata")}
    manifest["shards"] = [{"rows": shard["rows"], "files": {}} for shard in manifest["shards"]]
    for field in manifest["fields"]:
        rows = [np.array(shard) for shard in found.shards(field)]
        started = time.perf_counter()
        for k, shard in enumerate(manifest["shards"]):
            n_slots = manifest["settings"]["rows_per_shard"]
            shard["files"] |= write_shard(directory, field, k, rows[k], n_slots, codecs)
        seconds[field] = time.perf_counter() - started
    started = time.perf_counter()
    write_rest(directory, manifest, {name: found.column(name) for name in fmt.COLUMNS}, codecs)
    return {**seconds, "rest": time.perf_counter() - started}


def decode(directory: Path) -> dict[str, float]:
    found, seconds = fmt.open_set(directory), {}
    for field in found.manifest["fields"]:
        started = time.perf_counter()
        for k in range(len(found.manifest["shards"])):
            found.shard(field, k).max()
        seconds[field] = time.perf_counter() - started
    return {**seconds, "rest": 0.0}


def sizes(directory: Path) -> dict[str, float]:
    """MB a field, and of the rest."""
    n_bytes: dict[str, float] = defaultdict(float)
    manifest = fmt.read_manifest(directory)
    for name, facts in fmt.all_files(manifest).items():
        field = name.split("/")[0].split("-")[0]
        n_bytes[field if field in manifest["fields"] and "zarr.json" not in name else "rest"] += facts["bytes"] / 1e6
    return n_bytes


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.pack", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path, metavar="DIR|ROOT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the disk to write to (default: that of temporary files)")
    args = parser.parse_args()
    found = fmt.open_set(fmt.resolve_set(args.data))
    columns = [*found.manifest["fields"], "rest"]
    ways: dict[str, Codecs] = {"npy": None} | {f"zarr {c}": dict.fromkeys(columns[:-1], c) for c in CODECS}
    times: dict[str, list[list[float]]] = defaultdict(list)
    for _ in range(args.rounds):
        for way, codecs in ways.items():
            directory = Path(tempfile.mkdtemp(dir=args.out))
            try:
                for what, cells in (("write s", write(found, directory, codecs)), ("decode s", decode(directory))):
                    times[f"{way:16} {what}"].append([cells[c] for c in columns])
                size = sizes(directory)
                times[f"{way:16} MB"].append([size[c] for c in columns])
            finally:
                shutil.rmtree(directory)
    print(f"{'':26}" + "".join(f"{c:>10}" for c in (*columns, "all")))
    for name, rounds in times.items():
        middle = np.median([[*cells, sum(cells)] for cells in rounds], axis=0)
        print(f"{name:26}" + "".join(f"{value:10.2f}" for value in middle))


if __name__ == "__main__":
    main()
