"""SUN RGB-D for tests: made-up rows in archives as they are downloaded, and an allsplit.mat."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from convert.sample_sunrgbd import cell_array, matlab_5, text_cell

N_ODD_NAMES = 3  # members with a colon in their name, a row


def splits_of(**paths: Sequence[str]) -> bytes:
    """An allsplit.mat of these cell arrays, alltrain=[...], alltest=[...]."""
    arrays = [cell_array(list(map(text_cell, texts)), name) for name, texts in paths.items()]
    return matlab_5(arrays)


def as_downloaded(made: Path, folder: Path, *, top: str = "") -> Path:
    """The two archives of a made-up directory, with members that nothing reads.

    top: a folder that all of SUNRGBD.zip is in, "" as the published one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "SUNRGBD.zip", "w", zipfile.ZIP_DEFLATED) as rows:
        for path in _files(made / "SUNRGBD"):
            name = f"{top}{path.relative_to(made).as_posix()}"
            rows.write(path, name)
            if path.name == "scene.txt":
                beside = name.removesuffix("scene.txt")
                for k in range(N_ODD_NAMES):
                    rows.writestr(f"{beside}status/2014-10-24 09:14:0{k}", b"done")
                rows.writestr(f"{beside}annotation2Dfinal/index.json", b'{"name":""propulsion"')
                rows.writestr(f"{beside}fullres/image.jpg", b"no picture")
                rows.writestr(f"__MACOSX/{beside}image/._x.jpg", b"no picture")
    with zipfile.ZipFile(folder / "SUNRGBDtoolbox.zip", "w") as toolbox:
        for path in _files(made / "SUNRGBDtoolbox"):
            toolbox.write(path, path.relative_to(made))
    return folder


def _files(folder: Path) -> list[Path]:
    return [Path(top) / name for top, _, names in sorted(os.walk(folder)) for name in sorted(names)]
