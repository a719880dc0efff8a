"""The published tables: 894 class names and their 40 and 13 groups, the 464 official scenes, the 27 scene types."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.nyu_mat import Mat
from shards.files import FileEntry

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


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file as its authors published it, and where it is to be had.

    by_hand: what to do where `url` does not give it, for people to read.
    """

    name: str
    url: str
    content: FileEntry
    md5: str
    by_hand: str


NYU_DOWNLOAD = PublishedFile(
    name="nyu_depth_v2_labeled.mat",
    url="https://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
    content=FileEntry(
        2_972_037_809, "2d724b0c0ab358aa1ce5df855e5bd14a2279ab7202efe22f32a30d612dcb86aa"
    ),
    md5="520609c519fba3ba5ac58c8fefcc3530",
    by_hand="""by hand, any one of:
  the data set's page    https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html
  a mirror               academictorrents.com 47a9a46bb784b394e398228d4c85a8d61d01dfa8
                         kaggle.com rmzhang0526/nyu-depth-v2-labeled
  somebody's copy        2972037809 bytes, md5 520609c519fba3ba5ac58c8fefcc3530
then put it into your Drive folder as nyu_depth_v2_labeled.mat, or say where it is with MAT=""",
)
