"""A simulated week: four Colab sessions with a Drive that fails, each with its times, bytes and
messages.

    python tests/week.py [FILE.mat] [--keep]     made-up rooms where no file is given

1. download from a web server that drops connections, convert, push
2. a new machine: pull, train
3. a new machine, Drive half synced and failing at random
4. other settings: another set, the old one kept
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from helpers.drives import Drive, why_no_fuse
from helpers.servers import Server, serving

REPO = Path(__file__).resolve().parent.parent
TRAIN = (
    "--num-classes",
    "10",
    "--epochs",
    "1",
    "--size",
    "64",
    "--width",
    "8",
    "--batch-size",
    "32",
)


def shell(*args: object) -> None:
    """One command, as a user types it; its messages follow, and how long it took."""
    words = ["-m", *map(str, args)]
    print("$ python", *words, flush=True)
    started = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, *words], cwd=REPO, env=env, stderr=subprocess.STDOUT, check=False
    )
    print(f"[exit status {done.returncode}, {time.perf_counter() - started:.1f} s]\n", flush=True)


def size(folder: Path) -> str:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return f"{len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.0f} MB"


def new_machine(base: Path) -> Path:
    shutil.rmtree(base / "machine", ignore_errors=True)
    return base / "machine" / "data"


def week(base: Path, drive: Drive, server: Server, url: str) -> None:
    on_drive = drive.mount / "nyuv2"
    convert = ("convert", "run", "--drive", on_drive, "--url", url, "--rows-per-shard", 16, "--out")
    print("== Monday: nothing anywhere; the web server drops connections")
    root = new_machine(base)
    shell(*convert, root)
    print(
        f"the server sent {server.sent / 1e6:.0f} MB in {len(server.requests)} answers; Drive: {size(drive.back)}\n"
    )

    print("== Wednesday: a new machine")
    server.sent = 0
    root = new_machine(base)
    shell(*convert, root)
    shell("train", "--data", root, "--out", base / "machine" / "run", *TRAIN)
    print(f"the server sent {server.sent / 1e6:.0f} MB\n")

    print("== Friday: a new machine; two files never reached Drive, and it fails at random")
    lost = sorted(
        p
        for p in drive.back.rglob("*")
        if p.is_file() and "rgb" in str(p) and p.name != "zarr.json"
    )[:2]
    for path in lost:
        os.truncate(path, 0)
    drive.fail(0.003, "ENOTCONN", "EIO", "EAGAIN", "short", "forget", "stall")
    root = new_machine(base)
    shell(*convert, root)
    drive.fail(0)
    shell("convert", "verify", root)
    shell("convert", "verify", next(on_drive.glob("nyuv2-*")))

    print("== Sunday: the same machine, other settings")
    shell(*convert, root, "--size", 96, "--fields", "rgb,depth")
    print("on this disk:", *sorted(p.name for p in root.glob("nyuv2-*")))
    print("on Drive:", *sorted(p.name for p in on_drive.glob("nyuv2-*")), size(drive.back))


def main() -> None:
    if reason := why_no_fuse():
        sys.exit(f"no FUSE mount to be had: {reason}")
    given = [Path(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        base = Path(folder)
        if not given:
            shell("convert", "sample", base / "rooms.mat", "--rows", 48)
        drive = Drive(base / "google")
        try:
            data = memoryview(np.memmap(given[0] if given else base / "rooms.mat", mode="r"))
            with serving(nyu_depth_v2_labeled_mat=data) as server:  # type: ignore[arg-type]
                server.drop_after, server.drop_chance = 1_000_000, 0.2
                threading.excepthook = lambda _: None
                week(base, drive, server, server.url("nyu_depth_v2_labeled.mat"))
        finally:
            drive.close()


if __name__ == "__main__":
    main()
