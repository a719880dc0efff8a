"""verify: is every byte right, and is it what the source gives."""

import json
import shlex
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from shards import format as fmt
from shards.format import Settings, UserError

if TYPE_CHECKING:
    from convert.sources.chunks import Reader


def verify_all(directory: Path) -> int:
    """Check every file; raises UserError naming the wrong ones and the command. Returns how many are right."""
    manifest = fmt.read_manifest(directory)
    files = fmt.all_files(manifest)
    checking = tqdm(fmt.verify(directory), total=len(files), desc="verify", unit="file", disable=None)
    if wrong := {name: problem for name, problem in checking if problem}:
        said = [f"{directory / name} {problem}" for name, problem in wrong.items()]
        more = f" (and {len(said) - 3} more)" if len(said) > 3 else ""
        foreign = [str(directory / name) for name in wrong if name not in files]
        commands = [["rm", "-r", *foreign]] if foreign else []
        commands.append(repair_command(directory, manifest))
        raise UserError(f"{'; '.join(said[:3])}{more}. Run: {' && '.join(shlex.join(c) for c in commands)}")
    return len(files)


def repair_command(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """What makes the wrong shards of this set again."""
    try:
        source = json.loads((directory / fmt.PROVENANCE).read_text())["source_path"]
    except (OSError, ValueError, KeyError, TypeError):
        source = manifest["source"]["name"]
    command = ["python", "-m", "convert", "run", source, "--out", str(directory.parent), "--repair"]
    if codecs := manifest.get("codecs"):
        command += ["--format", "zarr", "--codec", ",".join(f"{k}={v}" for k, v in codecs.items())]
    for key, value in manifest["settings"].items():
        if value != Settings().to_dict().get(key):
            command += [f"--{key.replace('_', '-')}", ",".join(value) if key == "fields" else str(value)]
    return command


def against_source(directory: Path, source: Path, n_rows: int) -> int:
    """Re-read random rows from the source and compare them with the stored ones, byte for byte."""
    from convert.sources.nyu_mat import Mat, check_opens, sampled_identity

    found = fmt.open_set(directory)
    check_opens(source)
    if sampled_identity(source)["sampled_sha256"] != found.manifest["source"]["sampled_sha256"]:
        raise UserError(f"{source} is not what {directory} was made from. Run: make convert MAT={source}")
    with closing(Mat(source, found.settings.fields, found.settings.axes)) as mat:
        rows = np.random.default_rng().choice(found.n_rows, min(n_rows, found.n_rows), replace=False)
        for name in found.settings.fields:
            with closing(mat.reader(name)) as reader:
                _compare(found, name, reader, source, sorted(rows.tolist()))
    return len(rows)


def _compare(found: fmt.ShardSet, name: str, reader: "Reader", source: Path, rows: list[int]) -> None:
    from convert.decode import blaming
    from convert.resize import resize
    from convert.sources.nyu_mat import KEYS, LOOK_FIRST

    settings, shards = found.settings, found.shards(name)
    with blaming(str(source), KEYS[name], None, LOOK_FIRST):
        reader.read_index()
        if reader.needs_scratch:
            reader.fill_scratch(Path(tempfile.gettempdir()))
    for row in rows:
        with blaming(str(source), KEYS[name], row, LOOK_FIRST):
            large = reader.read_group(row // reader.group_rows)[row % reader.group_rows]
            small = resize(name, large, settings.size, settings.crop, settings.depth_resize)
        shard, offset = divmod(row, settings.rows_per_shard)
        if not np.array_equal(small, shards[shard][offset]):
            file = found.path / fmt.shard_name(name, shard, found.codecs is not None)
            what = f"row {row} is not what {source} gives. Delete {found.path}, then run: make convert"
            raise UserError(f"{file}: {what}")
