"""Planes in .mat and .h5 files."""

from pathlib import Path

import numpy as np


def split_reference(path: str) -> tuple[str, str | None]:
    """The file, and what in it."""
    return path, None


def read_plane(file: Path, what: str, field: str, kind: str) -> np.ndarray:
    """One plane."""
    raise NotImplementedError
