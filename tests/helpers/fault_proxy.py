"""A proxy in front of an S3 server or a web server that does to requests what networks and busy
stores do, by a plan that a seed decides.

    proxy = FaultProxy(("127.0.0.1", port_of_the_server), Plan(seed=1, share=0.2))
    with proxy.serving() as url: ...
    proxy.done   # how often each fault was done

It is HTTP/1.1 in plain words: a request is read whole, given on, and the answer read whole, before
anything is done to it.
"""

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What can be done to any request, and to some.
SLOW_DOWN = "503 SlowDown"
INTERNAL = "500"
RESET = "reset before the answer"
DELAY = "late answer"
RESET_INSIDE = "reset inside a body"
CUT = "body cut"
STALE = "stale 404"
STORED_500 = "stored, answered 500"
STORED_RESET = "stored, connection reset"
LOST_LISTING = "empty listing"
LOST_ENTRIES = "listing without some entries"
OF_ANY = (SLOW_DOWN, INTERNAL, RESET, DELAY)
OF_READING = (RESET_INSIDE, CUT, STALE)
OF_WRITING = (STORED_500, STORED_RESET)
OF_LISTING = (LOST_LISTING, LOST_ENTRIES)
ALL = (*OF_ANY, *OF_READING, *OF_WRITING, *OF_LISTING)

NOT_GIVEN_ON = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "expect"}
ENTRY = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
KEY_COUNT = re.compile(rb"<KeyCount>\d+</KeyCount>")
ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>no</Message></Error>'
)


@dataclass
class Plan:
    """Which request gets which fault. share: of all requests, 0 .. 1.

    kinds: those that may be done. Seeded, but requests that race each other may swap theirs.
    after: so many requests are left alone at first. most: faults in all.
    """

    seed: int
    share: float
    kinds: Sequence[str] = ALL
    after: int = 0
    most: int = 1 << 30
    n_requests: int = 0
    n_faults: int = 0
    rng: random.Random = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"faults {self.seed}")

    def fault_of(self, possible: Sequence[str]) -> str | None:
        """None: the request is served."""
        with self.lock:
            self.n_requests += 1
            kinds = [kind for kind in possible if kind in self.kinds]
            is_hit = self.rng.random() < self.share
            kind = self.rng.choice(kinds) if kinds else None
            if not is_hit or self.n_requests <= self.after or self.n_faults >= self.most:
                return None
            self.n_faults += kind is not None
            return kind


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes

    def with_body(self, body: bytes) -> "Answer":
        kept = [(name, value) for name, value in self.headers if name.lower() != "content-length"]
        return Answer(self.status, [*kept, ("Content-Length", str(len(body)))], body)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "FaultProxy"

    def log_message(self, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # whoever asked was killed
            self.close_connection = True

    def _serve(self) -> None:
        body = self._body()
        fault = self.server.plan.fault_of(_possible(self.command, self.path))
        if fault is not None:
            self.server.done[fault] += 1
        if fault == SLOW_DOWN:
            return self._answer(_error(503, "SlowDown"))
        if fault == INTERNAL:
            return self._answer(_error(500, "InternalError"))
        if fault == STALE:
            return self._answer(_error(404, "NoSuchKey"))
        if fault == RESET:
            return self._reset()
        if fault == DELAY:
            time.sleep(0.3)

        answer = self._given_on(body)
        if fault == STORED_500:
            return self._answer(_error(500, "InternalError"))
        if fault == STORED_RESET:
            return self._reset()
        if fault == RESET_INSIDE:
            self._answer(answer, n_sent=len(answer.body) // 2)
            return self._reset()
        if fault == CUT:
            self._answer(answer, n_sent=len(answer.body) // 2)
            self.close_connection = True
            return None
        if fault in OF_LISTING:
            answer = answer.with_body(self._listing(answer.body, is_empty=fault == LOST_LISTING))
        self._answer(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self) -> bytes:
        """As it came: a chunked one with its chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = []
        while True:
            lines.append(self.rfile.readline())
            n_bytes = int(lines[-1].split(b";")[0], 16)
            if n_bytes == 0:
                break
            lines.append(self.rfile.read(n_bytes + 2))
        while lines[-1].strip():  # trailers, and the empty line behind them
            lines.append(self.rfile.readline())
        return b"".join(lines)

    def _given_on(self, body: bytes) -> Answer:
        connection = http.client.HTTPConnection(*self.server.behind, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                is_chunked = name.lower() == "transfer-encoding"
                if name.lower() not in NOT_GIVEN_ON or is_chunked:
                    connection.putheader(name, value)
            connection.endheaders()
            connection.send(body)
            found = connection.getresponse()
            data = found.read()
            headers = [each for each in found.getheaders() if each[0].lower() not in NOT_GIVEN_ON]
            answer = Answer(found.status, headers, data)
            return answer if self.command == "HEAD" else answer.with_body(data)
        finally:
            connection.close()

    def _listing(self, data: bytes, *, is_empty: bool) -> bytes:
        """Of an S3 server: with none of its entries, or without some."""
        rng = self.server.plan.rng
        n_left = 0

        def kept(entry: re.Match[bytes]) -> bytes:
            nonlocal n_left
            if is_empty or rng.random() < 0.3:
                return b""
            n_left += 1
            return entry[0]

        left = ENTRY.sub(kept, data)
        return KEY_COUNT.sub(f"<KeyCount>{n_left}</KeyCount>".encode(), left)

    def _answer(self, answer: Answer, n_sent: int | None = None) -> None:
        """n_sent: bytes of the body that come; None: all."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:n_sent])
        self.wfile.flush()

    def _reset(self) -> None:
        """RST, as of a machine that is gone, and no orderly end."""
        at_once = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.close_connection = True
        self.connection.close()


def _possible(command: str, path: str) -> Sequence[str]:
    """The faults that a request can have."""
    is_listing = "list-type=" in path or "prefix=" in path
    if command in ("PUT", "POST", "DELETE"):
        return (*OF_ANY, *OF_WRITING)
    if is_listing:
        return (*OF_ANY, *OF_LISTING)
    return (*OF_ANY, STALE) if command == "HEAD" else (*OF_ANY, *OF_READING)


def _error(status: int, code: str) -> Answer:
    headers = [("Content-Type", "application/xml")]
    return Answer(status, headers, b"").with_body(ERROR.format(code=code).encode())


@contextmanager
def counted(proxy: "FaultProxy", plan: Plan, told: "Counter[str]") -> Iterator[None]:
    """The proxy does what is planned meanwhile; what it did is added to what was told before."""
    before = Counter(proxy.done)
    proxy.plan = plan
    try:
        yield
    finally:
        proxy.plan = Plan(seed=0, share=0.0)
        told.update(proxy.done - before)


class FaultProxy(ThreadingHTTPServer):
    """Serves in threads of this process. `plan` may be changed while it does."""

    daemon_threads = True

    def __init__(self, behind: tuple[str, int], plan: Plan) -> None:
        """behind: host and port of the right server."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.plan = plan
        self.done: Counter[str] = Counter()

    def handle_error(self, *args: Any) -> None:
        pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def serving(self) -> Iterator[str]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self.url
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


def added(counts: Sequence[Mapping[str, int]]) -> Counter[str]:
    """Of several proxies."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total
