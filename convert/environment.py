"""What decides bytes beside plan and source, and must be the same wherever shards are made."""

import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from convert.plan import Plan
from convert.sources.pictures import decoder_name
from shards.errors import UserError

OURS = ("shards", "stores", "convert")
DISTRIBUTION = "nyuv2-shards"
NOT_COMPRESSED = "none"


class OtherVersions(UserError):
    """A process has other versions than the one that collects the shards.

    where: what the process is called. there, here: what it has, and what it should have.
    """

    def __init__(self, where: str, what: str, there: str, here: str) -> None:
        problem = f"the worker {where} has {what} {there}, this program {here}"
        super().__init__(problem, "Give every worker the same installation")
        self.where = where
        self.there = there
        self.here = here


def environment_of(plan: Plan) -> dict[str, str]:
    """Names and versions of what decides bytes of this plan, in this process.

    Raises UserError where its pictures cannot be decoded here.
    """
    found = {
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "numpy": np.__version__,
        "this package": f"{_version_of(DISTRIBUTION)}, sources {sources_sha256()[:12]}",
    }
    if plan.decoder is not None:
        found["decoders"] = decoder_name()
    if plan.codecs is not None and set(plan.codecs.values()) != {NOT_COMPRESSED}:
        found["numcodecs"] = _version_of("numcodecs")
    return found


def check_environment(where: str, here: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Raise OtherVersions for the first thing that differs. `there`: of the process `where`."""
    for what, right in here.items():
        if there[what] != right:
            raise OtherVersions(where, what, there[what], right)


@cache
def sources_sha256() -> str:
    """Over the source files of what makes shards: a version says nothing of a changed checkout."""
    digest = hashlib.sha256()
    top = Path(__file__).resolve().parents[1]
    for package in OURS:
        for path in sorted((top / package).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(f"{path.relative_to(top)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@cache
def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
