"""verify and inspect: is every byte right, is it what the source gives, and what is in there."""

import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import format as fmt
from .format import Settings, ShardSet, UserError


def verify_all(directory: Path) -> int:
    """Check every file; raises UserError naming the wrong ones and the command. Returns how many are right."""
    manifest = fmt.read_manifest(directory)
    files, wrong = fmt.all_files(manifest), {}
    for name, problem in tqdm(fmt.verify(directory), total=len(files), desc="verify", unit="file", disable=None):
        if problem:
            wrong[name] = problem
    if wrong:
        said = [f"{directory / name} {problem}" for name, problem in wrong.items()]
        more = f" (and {len(said) - 3} more)" if len(said) > 3 else ""
        foreign = [str(directory / name) for name in wrong if name not in files]
        again = ["python", "-m", "convert", "verify", str(directory)]
        commands = [["rm", "-r", *foreign]] if foreign else []
        commands += [repair_command(directory, manifest)] if len(foreign) < len(wrong) else [again]
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
        if value != Settings().to_dict()[key]:
            command += [f"--{key.replace('_', '-')}", ",".join(value) if key == "fields" else str(value)]
    return command


def against_source(directory: Path, source: Path, n_rows: int) -> int:
    """Re-read random rows from the source and compare them with the stored ones, byte for byte."""
    from .mat import Mat, sampled_identity
    from .resize import resize

    found = fmt.open_set(directory)
    settings = Settings.from_dict(found.manifest["settings"])
    mat = Mat(source, settings.fields)
    try:
        if sampled_identity(source)["sampled_sha256"] != found.manifest["source"]["sampled_sha256"]:
            raise UserError(f"{source} is not what {directory} was made from. Run: make convert MAT={source}")
        rows = np.random.default_rng().choice(found.n_rows, min(n_rows, found.n_rows), replace=False)
        for name in settings.fields:
            reader, shards = mat.reader(name), found.shards(name)
            if reader.needs_scratch:
                reader.fill_scratch(Path(tempfile.gettempdir()))
            for row in sorted(int(r) for r in rows):
                group = reader.read_group(row // reader.group_rows)
                small = resize(
                    name, group[row % reader.group_rows], settings.size, settings.crop, settings.depth_resize
                )
                shard, offset = divmod(row, settings.rows_per_shard)
                if not np.array_equal(small, shards[shard][offset]):
                    file = directory / fmt.shard_name(name, shard)
                    raise UserError(
                        f"{file}: row {row} is not what {source} gives. Delete {directory}, then run: make convert"
                    )
    finally:
        mat.close()
    return len(rows)


def describe(directory: Path) -> str:
    """Rows, splits, class counts, depth range, void share, provenance, as text."""
    found = fmt.open_set(directory)
    split, types = found.column("split"), found.column("scene_type")
    n_bytes = sum(f["bytes"] for f in fmt.all_files(found.manifest).values())
    lines = [
        str(directory),
        f"  rows      {found.n_rows}: {np.sum(split == 0)} train, {np.sum(split == 1)} test, "
        f"{len(found.manifest['names']['scenes'])} scenes ({_shared_scenes(found)} in both splits)",
        f"  settings  {json.dumps(found.manifest['settings'])}",
        f"  source    {found.manifest['source']['name']}, {found.manifest['source']['bytes']} bytes",
        f"  files     {len(fmt.all_files(found.manifest))}, {n_bytes / 1e6:.0f} MB",
    ]
    lines += _field_lines(found)
    lines.append("  scene type            train   test")
    for k, name in enumerate(found.manifest["names"]["scene_types"]):
        counts = [int(np.sum((types == k) & (split == s))) for s in (0, 1)]
        if any(counts):
            lines.append(f"    {name:<18} {counts[0]:>6} {counts[1]:>6}")
    return "\n".join(lines + _provenance_lines(directory))


def _shared_scenes(found: ShardSet) -> int:
    split, scene = found.column("split"), found.column("scene")
    return len(np.intersect1d(scene[split == 0], scene[split == 1]))


def _field_lines(found: ShardSet) -> list[str]:
    lines = []
    for name, facts in found.manifest["fields"].items():
        text = f"  {name:<9} {facts['dtype']} {tuple(facts['shape'])}, {facts['unit']}"
        if name in ("depth", "raw_depth"):
            shards = found.shards(name)
            low = min(int(s[s > 0].min()) if (s > 0).any() else 0 for s in shards)
            holes = sum(int((s == 0).sum()) for s in shards) / sum(s.size for s in shards)
            text += f": {low} .. {max(int(s.max()) for s in shards)}, {holes:.1%} without a measurement"
        if name == "label":
            shards = found.shards(name)
            counts = np.sum([np.bincount(s.ravel(), minlength=1024) for s in shards], axis=0)
            present = int(np.count_nonzero(counts[1:]))
            text += f": {present} classes present, {counts[0] / counts.sum():.1%} void"
        lines.append(text)
    return lines


def _provenance_lines(directory: Path) -> list[str]:
    try:
        made = json.loads((directory / fmt.PROVENANCE).read_text())
        cost = f"{made['seconds']} s, peak memory {made['peak_memory_bytes'] / 2**20:.0f} MiB"
        return [f"  made {made['when']} in {cost}: {made['command']}"]
    except (OSError, ValueError, KeyError):
        return ["  made: unknown (no provenance.json)"]


def picture(directory: Path, out: Path, n_rows: int) -> None:
    """A contact sheet of rows spread over the set: rgb | depth | labels."""
    from pictures.sheet import contact_sheet

    found = fmt.open_set(directory)
    rows = np.linspace(0, found.n_rows - 1, min(n_rows, found.n_rows)).astype(int)
    step = found.manifest["settings"]["rows_per_shard"]
    rgb, depth, label = (
        np.stack([shards[r // step][r % step] for r in rows])
        for shards in (found.shards(field) for field in ("rgb", "depth", "label"))
    )
    names = found.manifest["names"]
    scene, types, split = (found.column(c) for c in ("scene", "scene_type", "split"))
    captions = [
        f"row {r}: {names['scenes'][scene[r]]} ({names['scene_types'][types[r]]}, {fmt.SPLITS[split[r]]})" for r in rows
    ]
    contact_sheet(rgb, depth, label, names["classes"], captions, out)
