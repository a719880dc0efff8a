"""A web server that fails as real ones do."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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
