"""What the folders of NYU's recordings are called: `kitchen_0028b` is of the scene kitchen_0028."""

import re

FOLDER = re.compile(r"((.+)_\d{4})[a-z]?")


def scene_of(folder: str) -> str:
    """The scene as the .mat has it: recordings of one have a letter behind its name."""
    match = FOLDER.fullmatch(folder)
    return match[1] if match else folder


def type_of(folder: str) -> str:
    """The type of its scene; "" where the name does not tell."""
    match = FOLDER.fullmatch(folder)
    return match[2] if match else ""
