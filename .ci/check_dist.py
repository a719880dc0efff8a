"""What is in a release, and what is not: python .ci/check_dist.py dist [--tag v1.2.3]

Reads the one sdist and the one wheel in a folder and builds nothing. The wheel has what runs, the
sdist has the checkout: what its tests need, and the pages. With --tag: the tag is the
version of pyproject.toml, and CHANGELOG.md has a section of it. Every problem is one line; the
status is 1 where there is one.
"""

import argparse
import re
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PACKAGES = [name.replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]]
VERSION = PROJECT["project"]["version"]
IN_WHEEL = {"convert/sources/nyu_tables.json", "convert/sources/nyu_rows.json"}
TOP = {
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "pyproject.toml",
    "constraints.txt",
}
TOP |= {"Makefile", "MANIFEST.in", ".editorconfig", ".gitignore", ".markdownlint.yaml"}
TOP |= {".pre-commit-config.yaml"}
FOLDERS = (
    ".ci",
    ".github",
    "bench",
    "docs",
    "notebooks",
    "tests",
)  # of the sdist, beside the packages
MADE = re.compile(r"PKG-INFO|setup\.cfg|\w+\.egg-info/.*")  # by whoever builds it
NOT_OF_THE_CHECKOUT = re.compile(r"(^|/)(__pycache__|\.DS_Store)(/|$)|^docs/api/")
NEVER_IN = {"tests", "data", "runs", "demo", "bench", "notebooks", "pictures"}
NEVER_ENDS_IN = {".mat", ".npy", ".zarr", ".pt", ".png", ".jpg", ".csv", ".pyc"}
LARGEST = 1 << 20  # bytes of one file: no data is that small, no source that large


def only_one(folder: Path, ending: str) -> Path:
    """The one file of this ending. Raises SystemExit where there is none, or a second one."""
    found = sorted(folder.glob(f"*{ending}"))
    if len(found) != 1:
        sys.exit(f"{folder} has {len(found)} files *{ending}, and should have one")
    return found[0]


def files_of_wheel(path: Path) -> dict[str, int]:
    """Bytes by name."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}


def files_of_sdist(path: Path) -> dict[str, int]:
    """Bytes by name, without the folder that all lie in."""
    with tarfile.open(path) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
    return {member.name.partition("/")[2]: member.size for member in files}


def sources() -> set[str]:
    """Every Python file of the packages, as it lies in the checkout."""
    paths = [path for package in PACKAGES for path in (REPO / package).glob("*.py")]
    return {path.relative_to(REPO).as_posix() for path in paths}


def typed() -> set[str]:
    """The markers that tell type checkers to read the packages' annotations."""
    return {f"{package}/py.typed" for package in PACKAGES if "/" not in package}


def of_checkout() -> set[str]:
    """Every file that lies in the checkout and belongs to it."""
    paths = [path for folder in FOLDERS for path in (REPO / folder).rglob("*") if path.is_file()]
    names = {path.relative_to(REPO).as_posix() for path in paths}
    return TOP | {name for name in names if not NOT_OF_THE_CHECKOUT.search(name)}


def is_unwanted(name: str, n_bytes: int) -> bool:
    """Whether a file of a wheel is test, data, run or picture, and not part of the program."""
    path = PurePosixPath(name)
    return path.parts[0] in NEVER_IN or path.suffix in NEVER_ENDS_IN or n_bytes > LARGEST


def problems_of_wheel(what: str, files: dict[str, int], wanted: set[str]) -> Iterator[str]:
    """One line for each file that is absent or should be."""
    yield from (f"{what} has no {name}" for name in sorted(wanted - files.keys()))
    unwanted = [name for name, n_bytes in files.items() if is_unwanted(name, n_bytes)]
    yield from (f"{what} has {name}, which is no part of the program" for name in sorted(unwanted))
    yield from strangers(files)


def problems_of_sdist(what: str, files: dict[str, int], wanted: set[str]) -> Iterator[str]:
    """One line for each file that is absent, is in no checkout, or is too large to be source."""
    yield from (f"{what} has no {name}" for name in sorted(wanted - files.keys()))
    for name in sorted(files):
        is_known = name in wanted or MADE.fullmatch(name)
        if not is_known or files[name] > LARGEST:
            yield f"{what} has {name}, which is no part of the checkout"


def strangers(files: Iterable[str]) -> Iterator[str]:
    """One line for each name that the wheel would install beside our packages."""
    ours = {package.partition("/")[0] for package in PACKAGES}
    tops = {name.partition("/")[0] for name in files}
    for top in sorted(tops - ours):
        if not top.endswith(".dist-info"):
            yield f"the wheel would install {top} at the top"


def problems_of_tag(tag: str, version: str, changelog: str) -> Iterator[str]:
    """One line where the tag is of another version, one where its changes are not written down."""
    if tag != f"v{version}":
        yield f"the tag is {tag}, pyproject.toml says v{version}"
    if not re.search(rf"^## {re.escape(version)}( |$)", changelog, re.M):
        yield f"CHANGELOG.md has no section '## {version}'"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the sdist and the wheel are")
    parser.add_argument("--tag", help="vX.Y.Z, of the release")
    args = parser.parse_args()

    wheel = only_one(args.folder, ".whl")
    sdist = only_one(args.folder, ".tar.gz")
    in_wheel = files_of_wheel(wheel)
    in_sdist = files_of_sdist(sdist)

    of_program = sources() | typed() | IN_WHEEL
    found = list(problems_of_wheel(wheel.name, in_wheel, of_program))
    found += problems_of_sdist(sdist.name, in_sdist, of_program | of_checkout())
    if args.tag:
        found += problems_of_tag(args.tag, VERSION, (REPO / "CHANGELOG.md").read_text())

    for line in found:
        print(line, file=sys.stderr)
    if not found:
        print(
            f"{wheel.name}: {len(in_wheel)} files, {sdist.name}: {len(in_sdist)} files. "
            "Nothing is missing, nothing is too much"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
