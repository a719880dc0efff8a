"""The flags of `python -m train` for a benchmark of training, beside its own."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from train.settings import Settings, add_flags


def parse_with_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, **defaults: Any
) -> tuple[Settings, argparse.Namespace]:
    """(the settings of a training, the values of the parser's own flags).

    From `argv`, or from the command line.

    `defaults`: settings that the benchmark has other defaults for. --out may be left out: nothing
    is written there. Raises UserError for settings that no training can start from.
    """
    add_flags(parser)
    parser.set_defaults(**defaults)
    words = sys.argv[1:] if argv is None else argv
    values = vars(parser.parse_args(["--out", tempfile.gettempdir(), *words]))
    of_settings = {field.name: values.pop(field.name) for field in fields(Settings)}
    return Settings(**of_settings), argparse.Namespace(**values)
