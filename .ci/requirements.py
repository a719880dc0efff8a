"""For the Makefile, run by the Python that is installed into: what is there and what is needed.

python .ci/requirements.py pins   NAME==VERSION of all that is installed, for pip's -c
python .ci/requirements.py all EXTRA ...      what pyproject.toml asks for
python .ci/requirements.py missing EXTRA ...  what of it is not there, or too old
"""

import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

# Colab's Python, before anything is installed, has pip and perhaps no packaging of its own.
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import InvalidVersion, Version

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def installed() -> dict[str, str]:
    """Version by name; of two on the path the first, which is the one imported. (`pip list` dies of
    an odd version.)
    """
    found: dict[str, str] = {}
    for distribution in distributions():
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
        if name and is_version(version):
            found.setdefault(canonicalize_name(name), version)
    return found


def is_version(text: str | None) -> bool:
    """Whether pip takes it in a pin: versions of the old kinds it does not."""
    try:
        Version(text or "")
    except InvalidVersion:
        return False
    return True


def requirements(extras: list[str]) -> list[Requirement]:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lines = project["dependencies"] + [
        line for extra in extras for line in project["optional-dependencies"][extra]
    ]
    found = map(Requirement, lines)
    return [r for r in found if r.marker is None or r.marker.evaluate()]


def is_missing(requirement: Requirement, there: dict[str, str]) -> bool:
    """What is asked for with an extra counts as missing: pip looks whether the extra is there."""
    version = there.get(canonicalize_name(requirement.name))
    fits = version is not None and requirement.specifier.contains(version, prereleases=True)
    return bool(requirement.extras) or not fits


def main(what: str, *extras: str) -> None:
    if what == "pins":
        own = canonicalize_name(tomllib.loads(PYPROJECT.read_text())["project"]["name"])
        print(
            *(f"{name}=={version}" for name, version in installed().items() if name != own),
            sep="\n",
        )
        return
    wanted = requirements(list(extras))
    if what == "missing":
        there = installed()
        wanted = [r for r in wanted if is_missing(r, there)]
    for requirement in wanted:
        requirement.marker = None
    print(*(str(r).replace(" ", "") for r in wanted))


if __name__ == "__main__":
    main(*sys.argv[1:])
