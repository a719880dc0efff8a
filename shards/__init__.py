"""The contract on disk: what a set is, how it is written, opened and checked."""

import os
import sys


def _check_machine() -> None:
    """One line where nothing can work.

    Here, since a package's first lines run before its modules are read, and `convert` and `train`
    import this package first. Every Python 3 must be able to read these lines.
    """
    problem = ""
    command = ""
    if sys.version_info < (3, 11):  # noqa: UP036 (these lines are read by any Python 3)
        found = ".".join(map(str, sys.version_info[:2]))
        problem = "Python 3.11 or newer is needed, this is " + found
        command = "Run: make PYTHON=python3.12"
    if os.name == "nt":
        problem = "Windows itself will not do"
        command = "Run the same in WSL: https://learn.microsoft.com/windows/wsl/install"
    if problem and sys.argv[0] == "-m":  # the command line, not an import
        print("nyuv2-shards: " + problem + ". " + command, file=sys.stderr)
        raise SystemExit(2)
    if problem:
        raise ImportError(problem)


_check_machine()
