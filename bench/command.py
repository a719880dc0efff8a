"""What the benchmarks' command lines have in common.

No torch here: the converter's benchmark imports it in the processes that it measures.
"""

import sys
from collections.abc import Callable, Sequence

from bench.cgroup import NoGroup
from loader.memory import NoRoom
from shards.errors import UserError
from shards.flags import Parser, whole

MOST = 10_000  # pairs, steps, rounds: more would be a slip of the keyboard
SET = "a finished set, or a folder that holds exactly one"


def make_parser(name: str, doc: str | None) -> Parser:
    """A parser for `python -m bench.NAME`, which shows the module's docstring as its help."""
    return Parser(f"python -m bench.{name}", doc)


def add_number(parser: Parser, flag: str, default: int, what: str) -> None:
    """A flag that takes a whole number from 1, with its range and default in its help."""
    text = f"{what} (1 to {MOST}, default: %(default)s)"
    parser.add_argument(flag, type=whole(1, MOST), default=default, metavar="N", help=text)


def add_numbers(
    parser: Parser, flag: str, default: Sequence[int], what: str, *, low: int = 1, high: int = MOST
) -> None:
    """A flag that takes one or more of them."""
    shown = " ".join(map(str, default))
    text = f"{what} ({low} to {high}, default: {shown})"
    kind = whole(low, high)
    parser.add_argument(flag, type=kind, nargs="+", default=default, metavar="N", help=text)


def exit_status(run: Callable[[], None]) -> int:
    """0 when it is done; 2, after one line, for what a user can mend."""
    try:
        run()
    except (UserError, NoRoom, NoGroup) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0
