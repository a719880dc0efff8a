"""What the command lines have in common: flags in the place of names in Python, and their values.

For `python -m convert`, `train`, `shards.copy` and `bench` alone, as is the one command that two of
them name. Whatever else names a setting calls it as in Python; its errors are told with flags here:
`error.told(as_flag)`.
"""

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shards.addresses import is_address, path_of, without_secrets
from shards.errors import OldSet

# Those that are called otherwise in Python.
FLAGS = {
    "cache_dir": "--cache",
    "cache_limit_gb": "--cache-limit",
    "codecs": "--codec",
    "container": "--format",
    "dataset_path": "--data",
    "kinds": "--field",
    "roots": "--root",
    "target": "--task",
}


def flag_of(name: str) -> str:
    """A setting's name -> its flag."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def as_flag(name: str, value: Any = ...) -> str:
    """As it is typed: `--batch-size`, `--batch-size 64`, `--reset`; "no --weights" for None."""
    flag = flag_of(name)
    if value is ... or value is True:
        return flag
    if value is None or value is False:
        return f"no {flag}"
    return f"{flag} {shlex.quote(str(value))}"


class Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage block; texts are shown as they are written."""

    def __init__(
        self, prog: str, description: str | None = None, epilog: str = "", **more: Any
    ) -> None:
        """more: what a later Python gives to the parsers of commands."""
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=as_written, **more)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and end with status 2."""
        one_line = without_secrets(" ".join(message.split()))
        self.exit(2, f"{self.prog}: {one_line}. Run: {self.prog} --help\n")


def as_typed(words: Sequence[str]) -> str:
    """A command as it is typed in bash or zsh, in one line whatever its names hold."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    letters = [c if c.isprintable() and c not in "\\'" else _escaped(c) for c in word]
    return f"$'{''.join(letters)}'"


def _escaped(letter: str) -> str:
    if letter in "\\'":
        return "\\" + letter
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(letter))


def as_path(text: str) -> Path:
    """A path of the command line; an empty one is a variable that was never set, not this folder.

    The shell leaves the ~ of --out=~/x as it is.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    if is_address(text):
        shown = without_secrets(text)
        raise argparse.ArgumentTypeError(f"{shown} is an address: give a path of this machine")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} can be the name of no file") from None
    except RuntimeError:  # a user that this machine does not have: then it is a name like any other
        return Path(text)


def as_place(text: str) -> Path | str:
    """A path of the command line, or the address of a store, such as s3://bucket/sets."""
    place = path_of(text)
    return as_path(text) if place == Path(text) else place


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a flag that takes a whole number, `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: choose {low} to {high}")
        return value

    return parse


def upgrade_commands(error: OldSet) -> str:
    """What brings this very set to this version: `make convert` alone is for the usual settings."""
    there = Path(str(error.path)).resolve()
    before = ""
    if not os.access(there, os.W_OK):
        copy = Path("/another/disk") / there.name
        before = f"cp -r {shlex.quote(str(there))} {copy.parent} && chmod -R u+w {copy} && "
        there = copy
    words = ["make", "convert", f"MAT={there}", f"OUT={there.parent}"]
    if error.codecs is not None:
        codecs = ",".join(f"{field}={codec}" for field, codec in error.codecs.items())
        words.append(f"ARGS=--format zarr --codec {codecs}")
    return before + shlex.join(words)


def command_that_makes(path: str) -> str:
    """What to do where no set was found."""
    if is_address(path):
        return "Look whether that is its address"
    place = Path(path)
    convert = f"python -m convert run {shlex.quote(path)} --out data"
    if place.suffix in (".mat", ".h5", ".hdf5"):  # a source was given, not what is made of it
        return f"Run: {convert}"
    if path == "data":  # where make has it
        return "Run: make convert"
    if not place.exists():
        return "Look whether that is its path; or run: make convert"
    if place.is_dir() and any(place.iterdir()):
        return f"If it holds pictures, run: {convert}; else: make convert"
    return "Run: make convert"
