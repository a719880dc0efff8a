"""Rows of a set as a recording of Rerun (rerun.io), to be turned and walked through.

    /                     the names and colours of the classes
    /SCENE/camera         the pinhole camera: what lies below it is shown in space too
    /SCENE/camera/rgb     the picture
    /SCENE/camera/depth   metres; where nothing was measured there is no point
    /SCENE/camera/label   classes

Timeline `row`. What a scene showed is cleared where the next one begins.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.inspect import spread_rows, stored_row
from shards.dataset import StoredSet
from shards.errors import UserError, WrongPlace, how_to_install
from shards.files import fsync, fsync_dir, log
from shards.spec import class_colours

SUFFIX = ".rrd"
MM_A_METRE = 1000.0


def record(found: StoredSet, out: Path, n_rows: int) -> None:
    """Write `n_rows` rows, spread over the set, as a recording; folders are made.

    Raises WrongPlace, also for another suffix than .rrd, and UserError without rerun-sdk.
    """
    if out.suffix.lower() != SUFFIX:
        raise WrongPlace(out, "has not the suffix of a recording", f"Choose {SUFFIX}")
    rerun = _rerun(out)
    rows = spread_rows(found, n_rows)
    cameras = _cameras(found)
    without = [row for row in rows if not cameras[row].any()]
    if without:
        what = f"of {len(without)} of {len(rows)} rows the camera is not known"
        log(f"{out}: {what}: they are shown as pictures, not in space")

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(rerun, found, temporary, rows, cameras)
        with open(temporary, "rb") as file:
            fsync(file.fileno())
        os.replace(temporary, out)
        fsync_dir(out.parent)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise WrongPlace(out, what, "Choose another place for it") from error
    finally:
        temporary.unlink(missing_ok=True)


def _rerun(out: Path) -> Any:
    try:
        import rerun
    except ImportError:
        what = f"{out.name}: a recording needs rerun-sdk"
        raise UserError(what, how_to_install("view", "rerun-sdk")) from None
    return rerun


def _cameras(found: StoredSet) -> np.ndarray:
    """[N, 4]: fx, fy, cx, cy as shares of the stored picture; 0: not known."""
    if "camera" not in found.manifest.columns:
        return np.zeros((found.n_rows, 4), np.float32)
    return found.column("camera")


def _write(rerun: Any, found: StoredSet, path: Path, rows: list[int], cameras: np.ndarray) -> None:
    path.touch()  # the place can be written to: rerun only says so in its log
    recording = rerun.RecordingStream(found.folder.name, recording_id=found.manifest.fingerprint)
    recording.save(path)
    recording.log("/", rerun.AnnotationContext(_classes(found)), static=True)
    scenes = found.column("scene")
    shown = ""
    for row in rows:
        entity = _entity(rerun, found.manifest.scenes[scenes[row]])
        recording.set_time("row", sequence=row)
        if shown and shown != entity:
            recording.log(shown, rerun.Clear(recursive=True))
        shown = entity
        if cameras[row].any():
            recording.log(entity, _pinhole(rerun, cameras[row], found.settings.size))
        for name, picture in _pictures(rerun, found, row):
            recording.log(f"{entity}/{name}", picture)
    recording.flush()
    recording.disconnect()


def _classes(found: StoredSet) -> list[tuple[int, str, tuple[int, ...]]]:
    """(number, name, colour) of every class; 0 is no class."""
    names = ["unlabelled", *found.dataset.label_names]
    colours = np.rint(255 * class_colours(len(names) - 1)).astype(int)
    return [(number, name, tuple(colours[number].tolist())) for number, name in enumerate(names)]


def _entity(rerun: Any, scene: str) -> str:
    return f"/{rerun.escape_entity_path_part(scene or 'scene')}/camera"


def _pinhole(rerun: Any, shares: np.ndarray, size: int) -> Any:
    """The camera of a stored picture: squeezed to a square, so its two focal lengths differ."""
    fx, fy, cx, cy = (float(share) * size for share in shares)
    return rerun.Pinhole(focal_length=[fx, fy], principal_point=[cx, cy], width=size, height=size)


def _pictures(rerun: Any, found: StoredSet, row: int) -> Iterator[tuple[str, Any]]:
    """(name, what is shown) of those fields that the set has."""
    fields = found.manifest.fields
    if "rgb" in fields:
        yield "rgb", rerun.Image(stored_row(found, "rgb", row).transpose(1, 2, 0))
    if "depth" in fields:
        yield "depth", rerun.DepthImage(stored_row(found, "depth", row), meter=MM_A_METRE)
    if "label" in fields:
        yield "label", rerun.SegmentationImage(stored_row(found, "label", row))
