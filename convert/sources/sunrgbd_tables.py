"""What is published about SUN RGB-D: its classes and their groups, scene types, and NYU's rows."""

import json
from functools import cache
from pathlib import Path

from convert.sources.nyu_tables import tables as nyu_lists
from shards.spec import DatasetSpec, LabelTable, SceneProtocol

SCENE_TYPES = (  # every word that stands in a scene.txt; idk is one of them
    *("basement", "bathroom", "bedroom", "bookstore", "cafeteria", "classroom", "coffee_room"),
    *("computer_room", "conference_room", "corridor", "dancing_room", "dinette", "dining_area"),
    *("dining_room", "discussion_area", "exhibition", "furniture_store", "gym", "home"),
    *("home_office", "hotel_room", "idk", "indoor_balcony", "kitchen", "lab", "laundromat"),
    *("lecture_theatre", "library", "living_room", "lobby", "mail_room", "music_room", "office"),
    *("office_dining", "office_kitchen", "playroom", "printer_room", "reception"),
    *("reception_room", "recreation_room", "rest_space", "stairs", "storage_room", "study"),
    "study_space",
)
# Of the usual protocol: rows of other types are left out, 4,845 train and 4,659 test rows stay.
SCENE_TYPES_OF_19 = (
    *("bathroom", "bedroom", "classroom", "computer_room", "conference_room", "corridor"),
    *("dining_area", "dining_room", "discussion_area", "furniture_store", "home_office"),
    *("kitchen", "lab", "lecture_theatre", "library", "living_room", "office", "rest_space"),
    "study_space",
)
LABEL_NAMES = (  # of 1..37, which are NYU's first 37 of 40 under other spellings
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
    *("picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror"),
    *("floor_mat", "clothes", "ceiling", "books", "fridge", "tv", "paper", "towel"),
    *("shower_curtain", "box", "whiteboard", "person", "night_stand", "toilet", "sink", "lamp"),
    *("bathtub", "bag"),
)
SENSORS = ("kv1", "kv2", "realsense", "xtion")
DEPTH_ENCODING = "sunrgbd"
SPLIT_FILE = "traintestSUNRGBD/allsplit.mat"
LABELS_FILE = "Metadata/SUNRGBD2Dseg.mat"
META_FILE = "Metadata/SUNRGBDMeta.mat"
HOME = "https://rgbd.cs.princeton.edu/data/SUNRGBDtoolbox.zip"


@cache
def sunrgbd() -> DatasetSpec:
    """The dataset as published."""
    return DatasetSpec(
        name="sunrgbd",
        width=0,  # pictures are of four sizes
        height=0,
        scene_types=SCENE_TYPES,
        protocols=(
            SceneProtocol(classes=SCENE_TYPES_OF_19),
            SceneProtocol(classes=SCENE_TYPES),
        ),
        default_n_classes=19,
        label_names=LABEL_NAMES,
        label_tables=(_thirteen(),),
    )


def _thirteen() -> LabelTable:
    """NYU's 13 classes, by the table that leads there from its 40."""
    lists = nyu_lists()
    group_of = {group40: group13 for group40, group13 in zip(lists.to40, lists.to13, strict=True)}
    ids = (0, *(group_of[k] for k in range(1, len(LABEL_NAMES) + 1)))
    return LabelTable(names=lists.classes13, ids=ids)


@cache
def nyu_scenes() -> tuple[str, ...]:
    """Of each row of nyu_depth_v2_labeled.mat, its scene: `nyu_rows.json` has them by runs."""
    runs = json.loads((Path(__file__).parent / "nyu_rows.json").read_text())
    return tuple(scene for scene, n_rows in runs for _ in range(n_rows))
