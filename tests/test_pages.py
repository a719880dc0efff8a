"""Pages are whole: links lead somewhere, the README's tree is the house, every flag is listed."""

import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import REPO, needs_torch

PACKAGES = ("shards", "loader", "stores", "convert", "train")
USER_PAGES = sorted((REPO / "docs").glob("*.md"))
JOURNAL = sorted((REPO / "docs" / "measurements").glob("*.md"))
ROOT_PAGES = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*ROOT_PAGES, *USER_PAGES, *JOURNAL]
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def name_of(path: Path) -> str:
    """As somebody at the top of the checkout would type it."""
    return path.relative_to(REPO).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# ------------------------------------------------------------------------------------------- links


def links(page: Path) -> Iterator[str]:
    """Where the page leads to within the checkout: pages, pictures, headings."""
    prose = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCED.sub("", page.read_text()), re.M)
    return {anchor(heading) for heading in headings}


def anchor(heading: str) -> str:
    kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
    return "".join(kept).replace(" ", "-")


def is_dead(target: str, page: Path) -> bool:
    """Whether the file is not there, or has no such heading."""
    path, _, heading = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    if not there.is_relative_to(REPO) or not there.exists():
        return True
    return heading != "" and heading not in anchors(there)


@each_page
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert [target for target in links(page) if is_dead(target, page)] == []


def test_every_page_is_named_on_the_first_page_of_its_folder() -> None:
    for pages in (USER_PAGES, JOURNAL):
        first = pages[0].parent / "README.md"
        assert set(links(first)) >= {page.name for page in pages if page != first}


def test_every_page_of_the_journal_has_figures_and_names_what_measures_them() -> None:
    for page in JOURNAL:
        text = page.read_text()
        assert re.search(r"make (bench|stress|train)|python -m bench|tests/week\.py", text), page


def test_a_user_page_leads_to_the_journal_page_of_its_figures() -> None:
    by_name = {page.name: page for page in USER_PAGES}
    for measured in JOURNAL:
        user_page = by_name.get(measured.name, by_name["troubleshooting.md"])
        assert any(f"measurements/{measured.name}" in target for target in links(user_page)), (
            measured
        )


# ------------------------------------------------------------------------------- the README's tree


def tree() -> dict[str, str]:
    """What each file of the README's tree is for: "convert/sources/base.py" -> its phrase."""
    (block,) = re.findall(r"^```text\n(.*?)^```", (REPO / "README.md").read_text(), re.M | re.S)
    phrases = {}
    folders: list[str] = []
    for line in block.splitlines():
        found = re.fullmatch(r"( *)(\S+) +(\S.*)", line)
        assert found, line
        indent, name, phrase = found.groups()
        del folders[len(indent) // 2 :]
        if name.endswith("/"):
            folders.append(name)
        path = "".join(folders) + ("" if name.endswith("/") else name)
        assert path not in phrases, f"{path} is named twice"
        phrases[path] = phrase
    return phrases


def test_the_tree_of_the_readme_is_the_house() -> None:
    named = {path for path in tree() if path.endswith(".py")}
    lying = {
        name_of(path)
        for package in PACKAGES
        for path in (REPO / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert (named - lying, lying - named) == (set(), set()), "(named but absent, not named)"


def test_the_tree_has_the_five_packages_first_and_every_folder_that_it_names() -> None:
    folders = [path for path in tree() if path.endswith("/")]
    assert [name.removesuffix("/") for name in folders if name.count("/") == 1][:5] == list(
        PACKAGES
    )
    assert [name for name in folders if not (REPO / name).is_dir()] == []


@each_page
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Not in the CHANGELOG, which names what was."""
    if page.name == "CHANGELOG.md":
        return
    folders = "|".join((*PACKAGES, "bench", "tests", "docs", "notebooks", r"\.ci", r"\.github"))
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text())
    here = [path for path in named if "NAME" not in path and not path.startswith("docs/api")]
    assert [path for path in here if not (REPO / path).exists()] == []


# ------------------------------------------------------------------------------ the commands' flags


REFERENCE = REPO / "docs" / "commands.md"


@cache
def flags_of(*command: str) -> set[str]:
    """Every long flag that --help shows."""
    done = subprocess.run(
        [sys.executable, "-m", *command, "--help"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", done.stdout)) - {"--help"}


COMMANDS = [("convert", verb) for verb in ("run", "verify", "inspect", "push", "pull", "sample")]
TRAINING = [("train",), ("train", "predict")]
LISTED = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
NOT_OURS = {"--nproc-per-node"}  # of torchrun, in an example


@pytest.mark.parametrize(
    "command",
    [*COMMANDS, *(pytest.param(command, marks=needs_torch) for command in TRAINING)],
    ids=" ".join,
)
def test_the_reference_of_commands_lists_every_flag(command: tuple[str, ...]) -> None:
    listed = set(LISTED.findall(REFERENCE.read_text()))
    assert flags_of(*command) - NOT_OURS - listed == set()


@needs_torch
def test_the_reference_of_commands_lists_no_flag_that_is_none() -> None:
    known = set[str]().union(*(flags_of(*command) for command in [*COMMANDS, *TRAINING]))
    assert set(LISTED.findall(REFERENCE.read_text())) - known - {"--help"} == set()
