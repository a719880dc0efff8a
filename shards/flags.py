"""How the command lines call a setting: by its flag, in the place of its name in Python.

For `python -m convert`, `train` and `shards.copy` alone. Whatever else names a setting calls it as
in Python; its errors are told with flags here: `error.told(as_flag)`.
"""

import shlex
from typing import Any

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
