"""A bucket of moto's server on this machine, asked over HTTP as a real one is."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="needs s3fs")
pytest.importorskip("moto", reason="needs moto")
boto3 = pytest.importorskip("boto3", reason="needs boto3")

import botocore.session

KEY_ID = "AKIAEXAMPLEOFANID"
SECRET = "secret/of+the-bucket"  # in no message, no file and no object
ASKED = re.compile(r'"(?:\x1b\[[0-9;]*m)*([A-Z]+) (\S+) HTTP')


class Requests(logging.Handler):
    """What the server was asked: (method, path with query), in order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = ASKED.search(record.getMessage())
        if found:
            self.asked.append((found[1], found[2]))

    def count(self, method: str, part: str = "") -> int:
        """How many of these have `part` in their path."""
        return sum(asked == method and part in path for asked, path in self.asked)


class Bucket:
    """One on the server, by its own client: not through what is tested."""

    def __init__(self, client: Any, name: str, requests: Requests) -> None:
        client.create_bucket(Bucket=name)
        self.name = name
        self.requests = requests
        self._client = client

    def address(self, name: str = "sets") -> str:
        return f"s3://{self.name}/{name}"

    def names(self, prefix: str = "") -> list[str]:
        found = self._client.list_objects_v2(Bucket=self.name, Prefix=prefix)
        return [each["Key"] for each in found.get("Contents", [])]

    def get(self, name: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=self.name, Key=name)["Body"].read()
        return data

    def put(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=name, Body=data)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self.name, Key=name)

    def content(self, address: str) -> dict[str, bytes]:
        """Every object under an address, by its name in there."""
        before = address.removeprefix(f"s3://{self.name}/") + "/"
        return {name.removeprefix(before): self.get(name) for name in self.names(before)}


@contextmanager
def serving_buckets() -> Iterator[tuple[Any, Requests]]:
    """A client of the server, and what that is asked; the environment leads everybody there."""
    from moto.server import ThreadedMotoServer

    requests = Requests()
    log = logging.getLogger("werkzeug")
    log.addHandler(requests)
    log.setLevel(logging.INFO)
    log.propagate = False
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        # Every client reads what S3 is from files: 0.2 s each.
        patch.setattr(botocore.session, "create_loader", cache(botocore.session.create_loader))
        try:
            yield boto3.client("s3"), requests
        finally:
            server.stop()
            log.removeHandler(requests)
