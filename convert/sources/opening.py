"""Which kind of source a path is, and opening it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import NeedsSetting, WrongSetting
from shards.spec import ConversionSettings

if TYPE_CHECKING:  # h5py takes a while, and a command line that only asks need not wait for it
    from convert.sources.base import Source
    from convert.sources.nyu_mat import Elsewhere

# As convert.sources.layouts has them.
OF_DIRECTORIES = ("frames", "sunrgbd", "tum", "scannet", "nyu_raw", "bts")
LAYOUTS = ("auto", "nyu", *OF_DIRECTORIES)
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt", ".lst", ".list")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a table or a directory of frames needs beside the settings.

    layout: of LAYOUTS. name: of the dataset; None: the stem of its file. roots: where paths lead,
    each a folder, URL, .zip or .tar, or FIELD=one of these; empty: the table's folder. follow:
    whether paths may leave their root by symbolic links and "..". label_names: a file with a name
    a line.
    """

    layout: str = "auto"
    name: str | None = None
    roots: tuple[str, ...] = ()
    follow: bool = False
    label_names: Path | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise WrongSetting("layout", self.layout, f"choose one of {', '.join(LAYOUTS)}")

    def from_anywhere(self) -> SourceOptions:
        """The same for a process that has another current folder: no path is relative."""
        label_names = self.label_names.absolute() if self.label_names else None
        return replace(self, roots=tuple(map(_from_anywhere, self.roots)), label_names=label_names)


def open_source(
    path: Path | Elsewhere, settings: ConversionSettings, options: SourceOptions | None = None
) -> Source:
    """The source at that path: a .mat, a table, or a directory of a known layout.

    Raises WrongSource for what is none of them, WrongSetting for settings that do not fit it.
    """
    chosen = options or SourceOptions()
    if is_frames(path, chosen.layout):
        from convert.sources.frames import FramesSource

        assert isinstance(path, Path)
        return FramesSource(path, settings, chosen)
    refuse_frames_options(chosen, settings)
    from convert.sources.nyu import NyuSource

    return NyuSource(path, settings)


def _from_anywhere(root: str) -> str:
    """A place, or FIELD=place, that is no relative path."""
    from convert.sources.roots import IS_URL, parted

    field, place = parted(root)
    there = place if IS_URL.match(place) else str(Path(place).expanduser().absolute())
    return f"{field}={there}" if field else there


def is_frames(path: Path | Elsewhere, layout: str) -> bool:
    """Whether it is to be read as frames: by its layout, else by its name. Raises WrongSource."""
    if layout == "nyu" or not isinstance(path, Path):
        return False
    if layout in OF_DIRECTORIES:
        return True
    with suppress(OSError):  # a name too long: opening it says so
        if path.is_dir() and path.suffix.lower() != ".mat":
            return True
    is_sunrgbd = path.suffix.lower() == ".zip" and path.name.lower().startswith("sunrgbd")
    return is_sunrgbd or path.suffix.lower() in TABLES


def refuse_frames_options(options: SourceOptions, settings: ConversionSettings) -> None:
    """Raise NeedsSetting for what only frames have, so that none of it is left out silently."""
    given = {
        "name": options.name,
        "root": options.roots or None,
        "label_names": options.label_names,
        "follow": options.follow or None,
        "depth_encoding": settings.depth_encoding,
        "depth_scale": settings.depth_scale,
        "depth_trunc": settings.depth_trunc,
        "label_void": settings.label_void,
        "split_by": settings.split_by,
    }
    for name, value in given.items():
        if value is not None:
            raise NeedsSetting(name, value, "layout", "frames")
