"""A Drive that fails as the real one does. Run as a program, this is the file system: a FUSE mount.

    python tests/helpers/drives.py BACK MOUNT CONTROL.json [SUBTYPE]

CONTROL.json is read before every call: {"chance": 0.02, "kinds": ["ENOTCONN", "EIO", "short",
"forget", "stall"]}.
"""

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ERRORS = ["ENOTCONN", "EIO", "EAGAIN", "EDQUOT", "ESTALE", "ETIMEDOUT"]


def why_no_fuse() -> str:
    """Empty where a FUSE mount can be had, else the reason."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no /dev/fuse on this machine"
    if not any((Path(p) / "fusermount3").exists() for p in os.environ["PATH"].split(":")):
        return "fusermount3 is missing: apt-get install fuse3"
    done = subprocess.run([sys.executable, "-c", "import mfusepy"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"mfusepy: {done.stderr.splitlines()[-1]}"


class Drive:
    """A mounted folder whose faults can be switched; `back` is what is really stored."""

    def __init__(self, base: Path, subtype: str = "") -> None:
        self.back = base / "back"
        self.mount = base / "my drive"
        self.control = base / "control.json"
        self.back.mkdir(parents=True)
        self.mount.mkdir()
        self.fail(0)
        command = [sys.executable, __file__, *map(str, (self.back, self.mount, self.control))]
        command += [subtype] if subtype else []
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 20
        while not os.path.ismount(self.mount):
            assert self.process.poll() is None, "the file system did not start"
            assert time.monotonic() < end, "the file system did not mount"
            time.sleep(0.01)

    def fail(self, chance: float, *kinds: str) -> None:
        new = self.control.with_suffix(".new")
        new.write_text(json.dumps({"chance": chance, "kinds": kinds, "change": time.monotonic()}))
        os.replace(new, self.control)

    def close(self) -> None:
        subprocess.run(["fusermount3", "-uz", str(self.mount)], check=False, capture_output=True)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def file_system(back: str, mount: str, control: str, subtype: str = "") -> None:
    """Pass every call through to `back`, except those that fail.

    subtype: X for a mount of the type fuse.X; "": its type is plain fuse.
    """
    import mfusepy as fuse

    kind = ""  # of the fault in the call that runs now

    def faulty(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def run(self: Any, path: str, *args: Any) -> Any:
            nonlocal kind
            faults, kind = json.loads(Path(control).read_text()), ""
            if random.random() < faults["chance"]:
                kind = random.choice(faults["kinds"])
                if kind == "stall":
                    time.sleep(random.random() / 5)
                elif kind.startswith("E"):
                    raise fuse.FuseOSError(getattr(errno, kind))
            return call(self, back + path, *args)

        return run

    class FileSystem(fuse.Operations):
        use_ns = True

        @faulty
        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            st = os.lstat(path)
            names = ("st_mode", "st_size", "st_nlink", "st_uid", "st_gid", "st_mtime_ns", "st_ino")
            return {name.removesuffix("_ns"): getattr(st, name) for name in names}

        @faulty
        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *os.listdir(path)]

        @faulty
        def statfs(self, path: str) -> dict[str, int]:
            st = os.statvfs(path)
            return {
                k: getattr(st, k)
                for k in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_namemax")
            }

        @faulty
        def open(self, path: str, flags: int) -> int:
            return os.open(path, flags)

        @faulty
        def create(self, path: str, mode: int, fi: Any = None) -> int:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

        @faulty
        def read(self, path: str, n: int, offset: int, fh: int) -> bytes:
            data = os.pread(fh, n, offset)
            return data[: len(data) // 2] if kind == "short" else data

        @faulty
        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            if kind != "forget":
                os.pwrite(fh, data, offset)
            return len(data)

        @faulty
        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            os.truncate(path, length)

        @faulty
        def mkdir(self, path: str, mode: int) -> None:
            os.mkdir(path, mode)

        @faulty
        def rename(self, old: str, new: str) -> None:
            os.rename(old, back + new)

        @faulty
        def fsync(self, path: str, datasync: int, fh: int) -> None:
            os.fsync(fh)

        @faulty
        def unlink(self, path: str) -> None:
            os.unlink(path)

        @faulty
        def rmdir(self, path: str) -> None:
            os.rmdir(path)

        def release(self, path: str, fh: int) -> None:
            os.close(fh)

    options: dict[str, Any] = {"fsname": "flaky", "direct_io": True}
    if subtype:
        del options["direct_io"]  # else nothing on it can be mapped
        options["subtype"] = subtype
    fuse.FUSE(FileSystem(), mount, foreground=True, nothreads=True, **options)


if __name__ == "__main__":
    file_system(*sys.argv[1:])
