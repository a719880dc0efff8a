"""push and pull: verified copies of a finished set to a mounted Google Drive, or back. The manifest goes last.

A mounted Drive drops out (ENOTCONN), answers EIO or EAGAIN under load, refuses over quota, and shows files that never
arrived whole. So every call on it is tried again a few times, every byte is hashed on its way, and what was written is
read back: that proves the mount, not what Google has of it. Plain buffered copies; nothing on a mount is mapped.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from convert.commit import write_receipts
from convert.machine import drop_from_cache
from shards import format as fmt
from shards.format import UserError, log
from shards.lock import only_one

T = TypeVar("T")
Files = dict[str, dict[str, Any]]

BLOCK = 4 << 20
PAUSES = (0.5, 2.0, 8.0)  # seconds before another try
MOUNT = Path("/content/drive")  # where Colab mounts Drive
GONE = {errno.ENOTCONN, errno.ESTALE, errno.ENODEV, errno.ECONNABORTED, errno.ECONNRESET}
FULL = {errno.EDQUOT, errno.ENOSPC}
PASSING = (
    GONE
    | FULL
    | {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.EINTR, errno.EBADMSG}
)


class Incomplete(UserError):
    """A copy on Drive that is not whole: not to be used, but the next push mends it."""


class Progress(tqdm):
    """Bytes on their way: a bar on a terminal, else a line each eighth of it."""

    def __init__(self, doing: str, total: int, initial: int = 0) -> None:
        self.doing, self.size, self.done = doing, total, initial
        super().__init__(
            total=total,
            initial=initial,
            desc=doing,
            unit="B",
            unit_scale=True,
            disable=None,
            miniters=1,
        )

    def add(self, n_bytes: int, what: str = "") -> None:
        self.update(n_bytes)
        before, self.done = self.done, self.done + n_bytes
        if self.disable and 8 * self.done // self.size > 8 * before // self.size:
            log(f"{self.doing}: {what}{self.done / 1e6:.0f} of {self.size / 1e6:.0f} MB")


def patiently(action: Callable[[], T], doing: str, command: str) -> T:
    """Call `action`, again after a pause where a mount answers with an error that passes, then give up with advice."""
    for pause in (*PAUSES, None):
        try:
            return action()
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError) or cause.errno not in PASSING:
                raise
            if pause is None:
                raise _advice(cause.errno, doing, command) from None
            time.sleep(pause)
    raise AssertionError


def _advice(number: int, doing: str, command: str) -> UserError:
    times = len(PAUSES) + 1
    if number == errno.EBADMSG:
        return Incomplete(
            f"{doing} gave other content than the manifest has, {times} times. Run: make verify, {command}"
        )
    what = f"Drive answered {errno.errorcode[number]} {times} times while {doing}"
    if number in FULL:
        return UserError(
            f"{what}: it is full or over its quota. Free space there (also its bin), then: {command}"
        )
    often = "" if number in GONE else " or wait (it may have been asked too much today)"
    return UserError(
        f"{what}. Remount it (drive.mount('{MOUNT}', force_remount=True)){often}, then: {command}"
    )


def check_mounted(drive: Path, command: str) -> None:
    """Refuse a folder that is not on a mounted Drive: what is written there would be lost with the machine."""
    unmounted = drive.is_relative_to(MOUNT) and not os.path.ismount(MOUNT)
    if unmounted or not patiently(
        lambda: exists(drive.parent), f"looking for {drive.parent}", command
    ):
        raise UserError(
            f"{drive.parent} is not there: run drive.mount('{MOUNT}') in a cell of its own, then: {command}"
        )


def size_of(path: Path) -> int:
    """Bytes; -1 where there is nothing. (Path.exists() hides what a mount answers.)"""
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def exists(path: Path) -> bool:
    return size_of(path) >= 0


def not_whole(directory: Path, files: Files, command: str) -> list[str]:
    """The files that are not there or have another size: no byte of them is read."""

    def size(name: str) -> int:  # each file has its own tries
        return patiently(
            lambda: size_of(directory / name), f"looking for {directory / name}", command
        )

    return [name for name, facts in files.items() if size(name) != facts["bytes"]]


def push(source: Path, drive: Path, command: str = "make push") -> Path:
    """Copy a finished set to `drive`: only what is missing or wrong there. Every file is read back."""
    check_mounted(drive, command)
    patiently(lambda: drive.mkdir(exist_ok=True), f"making {drive}", command)
    files = fmt.all_files(fmt.read_manifest(source))
    _copy_files(source, drive / source.name, files, "writing", command)
    _commit(source, drive / source.name, "writing", command)
    log(
        "read back from the mount. It reaches Google later: run drive.flush_and_unmount() in a cell before you close"
    )
    return drive / source.name


def pull(source: Path, root: Path, command: str = "make pull", *, in_part: bool = False) -> Path:
    """Copy a finished set from Drive under `root`: only what is missing or wrong there. Raises Incomplete.

    With `in_part` what is right there is copied, as an unfinished set that a conversion goes on with.
    """
    manifest = patiently(lambda: fmt.read_manifest(source), f"reading {fmt.MANIFEST}", command)
    files, target = fmt.all_files(manifest), root / source.name
    missing = not_whole(source, files, command)
    if missing and not in_part:
        raise Incomplete(
            f"{len(missing)} of {len(files)} files in {source} are missing or short. Run: make push there"
        )
    root.mkdir(parents=True, exist_ok=True)
    with only_one(root, source.name):
        there = {name: facts for name, facts in files.items() if name not in missing}
        wrong = _copy_files(source, target, there, "reading", command, go_on=in_part)
        if in_part:
            write_receipts(target, manifest, wrong.union(missing))
        else:
            _commit(source, target, "reading", command)
    return target


def _copy_files(
    source: Path, target: Path, files: Files, verb: str, command: str, *, go_on: bool = False
) -> set[str]:
    """Copy all but the manifest; with `go_on` past what is wrong in `source`, which is returned."""
    _prepare(source, target, files, command)
    wrong = set()
    with Progress(verb, sum(f["bytes"] for f in files.values())) as progress:
        for k, (name, facts) in enumerate(sorted(files.items()), 1):
            try:
                patiently(
                    partial(_copy, source / name, target / name, facts, verb),
                    f"{verb} {name}",
                    command,
                )
            except Incomplete:
                if not go_on:
                    raise
                wrong.add(name)
            progress.add(facts["bytes"], f"{k} of {len(files)} files, ")
    return wrong


def _commit(source: Path, target: Path, verb: str, command: str) -> None:
    for name in (fmt.PROVENANCE, fmt.MANIFEST):
        if patiently(partial(exists, source / name), f"{verb} {name}", command):
            patiently(
                partial(_copy, source / name, target / name, {}, verb), f"{verb} {name}", command
            )


def _prepare(source: Path, target: Path, files: Files, command: str) -> None:
    """Room for what is missing; no manifest of other content, and nothing that a killed copy left behind."""

    def take_back() -> None:
        target.mkdir(exist_ok=True)
        theirs = target / fmt.MANIFEST
        if exists(theirs) and theirs.read_bytes() != (source / fmt.MANIFEST).read_bytes():
            theirs.unlink()

    def clean(directory: Path) -> None:
        for path in directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    patiently(take_back, f"preparing {target}", command)
    for directory in sorted({(target / name).parent for name in files}):
        patiently(partial(clean, directory), f"preparing {directory}", command)
    need = sum(files[name]["bytes"] for name in not_whole(target, files, command))
    free = patiently(lambda: shutil.disk_usage(target).free, f"preparing {target}", command)
    if need > free:
        raise UserError(
            f"{target} needs {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. Free some and run it again"
        )


def _copy(source: Path, target: Path, facts: dict[str, Any], verb: str) -> None:
    """Copy one file unless it is right already. Other bytes than the manifest's are EBADMSG: try again."""

    def write(file: fmt.HashingFile) -> None:
        try:
            with open(source, "rb") as reading:
                while block := reading.read(BLOCK):
                    file.write(block)
        except FileNotFoundError:  # a mount may list what it cannot open
            raise OSError(errno.EBADMSG, "gone", str(source)) from None
        if facts and file.sha256.hexdigest() != facts["sha256"]:
            raise OSError(errno.EBADMSG, "other content", str(source))

    if not (facts and _is_right(target, facts)):
        target.parent.mkdir(parents=True, exist_ok=True)
        written = fmt.write_atomically(target, write)
        if verb == "writing" and not _is_right(target, written):
            raise OSError(errno.EBADMSG, "other content", str(target))


def _is_right(path: Path, facts: dict[str, Any]) -> bool:
    """Whether the file is what the manifest says, read from where it lies and not from the page cache."""
    try:
        with open(path, "rb") as file:
            drop_from_cache(file.fileno())
            right_size = os.fstat(file.fileno()).st_size == facts["bytes"]
            return right_size and hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]
    except FileNotFoundError:
        return False
