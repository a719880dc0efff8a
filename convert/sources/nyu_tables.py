"""What is published about NYU Depth v2: classes and their groups, scenes, camera, crops."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from shards.files import FileEntry
from shards.spec import (
    KNOWN_FIELDS,
    SPLITS,
    Box,
    Camera,
    DatasetSpec,
    Field,
    LabelTable,
    SceneProtocol,
)

TRAIN_SHARE = 795 / 1449
SCENE_TYPES_OF_10 = (
    *("bedroom", "kitchen", "living_room", "bathroom", "dining_room", "office"),
    *("home_office", "classroom", "bookstore"),
)
SCENE_TYPES_OF_13 = (*SCENE_TYPES_OF_10, "playroom", "study", "reception_room")
TRAIN = SPLITS.index("train")
TEST = SPLITS.index("test")
NYU_FIELDS: dict[str, Field] = {
    **KNOWN_FIELDS,
    "label": replace(KNOWN_FIELDS["label"], unit="class id 1..894"),
}


@dataclass(frozen=True, kw_only=True)
class NyuTables:
    """What stands in nyu_tables.json. to40, to13: of each of the 894 classes, its group from 1."""

    classes: tuple[str, ...]
    classes40: tuple[str, ...]
    classes13: tuple[str, ...]
    to40: tuple[int, ...]
    to13: tuple[int, ...]
    train_scenes: tuple[str, ...]
    test_scenes: tuple[str, ...]
    scene_types: tuple[str, ...]


@cache
def tables() -> NyuTables:
    """`nyu_tables.json` beside this file."""
    path = Path(__file__).parent / "nyu_tables.json"
    lists = json.loads(path.read_text())
    return NyuTables(**{name: tuple(values) for name, values in lists.items()})


@cache
def nyu() -> DatasetSpec:
    """The dataset as published."""
    official = tables()
    return DatasetSpec(
        name="nyuv2",
        scene_types=official.scene_types,
        protocols=(
            SceneProtocol(classes=SCENE_TYPES_OF_10, others="others"),
            SceneProtocol(classes=SCENE_TYPES_OF_13, others="others"),
        ),
        default_n_classes=13,
        label_names=official.classes,
        label_tables=_label_tables(official.classes),
        width=640,
        height=480,
        crops={
            "border": Box(top=6, bottom=473, left=7, right=632),  # without the white frame
            "eigen": Box(top=45, bottom=471, left=41, right=601),  # of Eigen et al.
            "sunrgbd": Box(top=44, bottom=471, left=40, right=601),  # as SUN RGB-D holds these rows
        },
        depth_crop="eigen",
        camera=Camera(fx=518.86, fy=519.47, cx=325.58, cy=253.74),  # from the set's toolbox
    )


def _label_tables(label_names: Sequence[str]) -> tuple[LabelTable, ...]:
    """The 40 and the 13 classes, of these names; what is not an official name is void."""
    official = tables()
    found = []
    for names, groups in (
        (official.classes40, official.to40),
        (official.classes13, official.to13),
    ):
        group_of = dict(zip(official.classes, groups, strict=True))
        ids = (0, *(group_of.get(name, 0) for name in label_names))
        found.append(LabelTable(names=names, ids=ids))
    return tuple(found)


def with_names(
    label_names: Sequence[str], scene_types: Sequence[str], announce: Callable[[str], None]
) -> DatasetSpec:
    """The dataset with the names that a file has, some of which may not be official."""
    official = nyu()
    strange = [name for name in label_names if name not in official.label_names]
    if strange:
        what = f"{len(strange)} class names are not official (such as {strange[0]})"
        announce(f"{what}: void among the 40 and the 13")
    more_types = sorted(set(scene_types) - set(official.scene_types))
    return replace(
        official,
        scene_types=(*official.scene_types, *more_types),
        label_names=tuple(label_names),
        label_tables=_label_tables(label_names),
    )


def split_of(scene: str) -> tuple[int, bool]:
    """(the number of its split, whether the scene is official); others by a hash of the name."""
    if scene in _official_splits():
        return _official_splits()[scene], True
    share = int.from_bytes(hashlib.sha256(scene.encode()).digest()[:8], "big") / 2**64
    return TRAIN if share < TRAIN_SHARE else TEST, False


@cache
def _official_splits() -> dict[str, int]:
    train = dict.fromkeys(tables().train_scenes, TRAIN)
    test = dict.fromkeys(tables().test_scenes, TEST)
    return train | test


def splits_of(scenes: Sequence[str], announce: Callable[[str], None]) -> np.ndarray:
    """[N] the split of each row, by its scene."""
    found = {scene: split_of(scene) for scene in dict.fromkeys(scenes)}
    unknown = sorted(scene for scene, (_, is_official) in found.items() if not is_official)
    if unknown:
        what = f"{len(unknown)} scenes are not official (such as {unknown[0]})"
        announce(f"{what}: split by a hash of their name")
    return np.array([found[scene][0] for scene in scenes], "|u1")


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
then put it into your Drive folder as nyu_depth_v2_labeled.mat, or give its path""",
)
