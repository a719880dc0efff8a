"""What people call the folder of a field."""

FOLDERS = {
    "rgb": ("rgb", "image", "images", "color", "colour"),
    "depth": ("depth", "depths"),
    "raw_depth": ("raw_depth", "depth_raw"),
    "label": ("label", "labels", "semantic", "seg", "masks"),
    "instance": ("instance", "instances"),
}
FIELD_OF = {name: field for field, names in FOLDERS.items() for name in names}


def field_of(path: str) -> str | None:
    """The field that the folders of a path tell, the innermost first; None: they tell none."""
    for folder in reversed(path.replace("\\", "/").split("/")[:-1]):
        field = FIELD_OF.get(folder.casefold())
        if field is not None:
            return field
    return None


def rgb_is_first(first: str, second: str) -> bool | None:
    """Which of two paths of a line is the rgb picture, and which the depth; None: not told."""
    fields = (field_of(first), field_of(second))
    if fields == ("rgb", "depth"):
        return True
    if fields == ("depth", "rgb"):
        return False
    return None
