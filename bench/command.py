"""What the benchmarks' command lines have in common.

No torch here: the converter's benchmark imports it in the processes that it measures.
"""

import argparse
import sys
from collections.abc import Callable

from bench.cgroup import NoGroup
from loader.memory import NoRoom
from shards.errors import UserError


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m bench.NAME`, which shows the module's docstring as its help."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"bench.{name}", description=doc, formatter_class=raw)


def exit_status(run: Callable[[], None]) -> int:
    """0 when it is done; 2, after one line, for what a user can mend."""
    try:
        run()
    except (UserError, NoRoom, NoGroup) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0
