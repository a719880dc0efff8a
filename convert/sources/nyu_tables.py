"""The published tables: 894 class names and their 40 and 13 groups, the 464 official scenes, the 27 scene types."""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.nyu_mat import Mat

TRAIN_SHARE = 795 / 1449


@cache
def tables() -> dict[str, Any]:
    """`nyu_tables.json` beside this file."""
    return json.loads((Path(__file__).parent / "nyu_tables.json").read_text())  # type: ignore[no-any-return]


def split_of(scene: str) -> tuple[int, bool]:
    """(0 train | 1 test, whether the scene is official). Others: by the SHA-256 of their name."""
    if scene in _official_splits():
        return _official_splits()[scene], True
    share = int.from_bytes(hashlib.sha256(scene.encode()).digest()[:8], "big") / 2**64
    return int(share >= TRAIN_SHARE), False


@cache
def _official_splits() -> dict[str, int]:
    return {scene: k for k, key in enumerate(("train_scenes", "test_scenes")) for scene in tables()[key]}


def row_columns(mat: Mat, announce: Callable[[str], None]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(one array a per-row fact, the tables of names that their numbers point into)."""
    scenes, types = mat.strings("scenes", mat.n_rows), mat.strings("sceneTypes", mat.n_rows)
    scene_names, scene_index = np.unique(np.array(scenes), return_inverse=True)
    type_names = tables()["scene_types"] + sorted(set(types) - set(tables()["scene_types"]))
    by_scene = {str(name): split_of(str(name)) for name in scene_names}
    if unknown := [name for name, (_, official) in by_scene.items() if not official]:
        announce(f"{len(unknown)} scenes are not official (such as {unknown[0]}): split by a hash of their name")
    columns = {
        "split": np.array([by_scene[s][0] for s in scenes], "|u1"),
        "scene": scene_index.astype("<u4"),
        "scene_type": np.array([type_names.index(t) for t in types], "<u2"),
        "accel": mat.accel(),
        "raw_rgb": np.char.encode(np.array(mat.strings("rawRgbFilenames", mat.n_rows)), "utf-8"),
        "raw_depth": np.char.encode(np.array(mat.strings("rawDepthFilenames", mat.n_rows)), "utf-8"),
    }
    return columns, {"scenes": [str(s) for s in scene_names], "scene_types": type_names, **_label_names(mat, announce)}


def _label_names(mat: Mat, announce: Callable[[str], None]) -> dict[str, Any]:
    """The file's class names and, for each id from 0, its id among the 40 and the 13 (0 = void)."""
    official, names = tables(), mat.strings("names")
    if len(names) < len(official["classes"]):  # labels go up to 894: each needs its name
        raise mat.refuse(f"names has {len(names)} entries, expected {len(official['classes'])}")
    if strange := [name for name in names if name not in official["classes"]]:
        announce(f"{len(strange)} class names are not official (such as {strange[0]}): void among the 40 and the 13")
    same = {key: official[key] for key in ("classes40", "classes13")}
    groups = {}
    for key in ("to40", "to13"):
        ids = dict(zip(official["classes"], official[key], strict=True))
        groups[key] = [0, *(ids.get(name, 0) for name in names)]
    return {"classes": names, **same, **groups}
