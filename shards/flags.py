"""How the command lines call a setting: by its flag, in the place of its name in Python.

For `python -m convert`, `train` and `shards.copy` alone, as is the one command that two of them
name. Whatever else names a setting calls it as in Python; its errors are told with flags here:
`error.told(as_flag)`.
"""

import os
import shlex
from pathlib import Path
from typing import Any

from shards.errors import OldSet

# Those that are called otherwise in Python.
FLAGS = {
    "codecs": "--codec",
    "container": "--format",
    "dataset_path": "--data",
    "field": "--fields",
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
