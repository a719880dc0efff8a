"""The order of a table's rows, in Python's whole numbers."""

from collections.abc import Sequence

IN_ORDER = ("train", "val", "test")  # of splits in a set


def splitmix64(number: int) -> int:
    """As its author wrote it."""
    most = 2**64 - 1
    mixed = (number + 0x9E3779B97F4A7C15) & most
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & most
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & most
    return mixed ^ (mixed >> 31)


def dealt(splits: Sequence[str]) -> list[int]:
    """The line of each row of a set, of the split of each line."""
    return sorted(range(len(splits)), key=lambda k: (IN_ORDER.index(splits[k]), splitmix64(k)))
