"""A Drive and a web server that fail as the real ones do. Run as a program, this is the file system: a FUSE mount.

    python tests/flaky.py BACK MOUNT CONTROL.json

CONTROL.json is read before every call: {"chance": 0.02, "kinds": ["ENOTCONN", "EIO", "short", "forget", "stall"]}.
"""

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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

    def __init__(self, base: Path) -> None:
        self.back = base / "back"
        self.mount = base / "my drive"
        self.control = base / "control.json"
        self.back.mkdir(parents=True)
        self.mount.mkdir()
        self.fail(0)
        command = [sys.executable, __file__, *map(str, (self.back, self.mount, self.control))]
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


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; drops, refuses or ignores ranges as the server's attributes say."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server = self.server
        data = server.files.get(self.path)
        with server.lock:
            server.requests.append((self.path, self.headers["Range"]))
            failing = bool(server.fail_next)
            silent = len(server.requests) > server.silent_after
            status = server.fail_next.pop(0) if failing else 0
        if silent:
            server.ended.wait()
            return None
        if data is None or failing:
            return self._send(status or 404, b"no", {})
        start = 0
        stop = len(data)
        if server.ranges and (asked := self.headers["Range"]):
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first)
            stop = min(stop, int(last) + 1) if last else stop
        if start >= server.refuse_from:
            return self._send(503, b"no", {})
        is_partial = server.ranges and self.headers["Range"] is not None
        headers = {"Content-Type": server.content_type}
        if is_partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if server.ranges:
            headers["Accept-Ranges"] = "bytes"
        self._send(206 if is_partial else 200, data[start:stop], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "ETag": '"1"'}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        is_dropped = self._is_to_be_dropped(len(body))
        sent = body[: self.server.drop_after] if is_dropped else body
        try:
            self.wfile.write(sent)
            self.wfile.flush()
        except OSError:
            pass
        with self.server.lock:
            self.server.sent += len(sent)
        if is_dropped:
            self.close_connection = True
            self.connection.close()

    def _is_to_be_dropped(self, n_bytes: int) -> bool:
        server = self.server
        if server.drop_after is None or n_bytes <= server.drop_after:
            return False
        with server.lock:
            is_again = server.requests.count((self.path, self.headers["Range"])) > 1
        if is_again and server.drop_once:
            return False
        return random.random() < server.drop_chance


class Server(ThreadingHTTPServer):
    daemon_threads = True
    ranges = True
    content_type = "application/octet-stream"
    drop_after: int | None = None  # bytes of an answer before the connection drops
    drop_chance = 1.0
    refuse_from = 1 << 60  # ranges that start there are answered with 503
    drop_once = False  # the same request again is answered in full
    silent_after = 1 << 60  # requests: later ones are never answered

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requests: list[tuple[str, str | None]] = []
        self.fail_next: list[int] = []  # answers of the next requests
        self.sent = 0  # bytes
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def handle_error(self, *args: Any) -> None:
        pass

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


@contextmanager
def serving(**files: bytes) -> Iterator[Server]:
    """A server of the files, by name (a_mat=... is served as /a.mat)."""
    server = Server({f"/{name.replace('_mat', '.mat')}": data for name, data in files.items()})
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def file_system(back: str, mount: str, control: str) -> None:
    """Pass every call through to `back`, except those that fail."""
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

    fuse.FUSE(FileSystem(), mount, foreground=True, nothreads=True, direct_io=True, fsname="flaky")


if __name__ == "__main__":
    file_system(*sys.argv[1:])
