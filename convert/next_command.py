"""What to type next, said behind what went wrong: the command line's part of an error."""

import argparse
import shlex
from contextlib import suppress
from typing import Any

from convert.cluster import NotThere, ShardsFailed
from convert.failed import FailedRows
from convert.sources.opening import is_frames
from shards.addresses import is_address, parent_of
from shards.dataset import ShardSet, StoredSet
from shards.errors import (
    Busy,
    DamagedSet,
    IncompleteCopy,
    IncompleteDownload,
    MissingField,
    MissingSet,
    NewerSet,
    OldSet,
    OtherSet,
    SeveralSets,
    StoreFailed,
    UnfinishedSet,
    UserError,
    WrongPlace,
    WrongSource,
)
from shards.flags import as_flag, as_typed, command_that_makes, flag_of, upgrade_commands
from shards.manifest import read_provenance
from shards.spec import ConversionSettings

THE_SAME = "the same command"

WITH_THE_FILE = "make convert MAT=/path/to/nyu_depth_v2_labeled.mat"

# What to type next, by what went wrong; the first that fits counts.
NEXT: tuple[tuple[type[UserError], str], ...] = (
    (NewerSet, "Run: make convert OUT=/another/folder, or install that version"),
    (Busy, "Wait for it, then run: make convert"),
    (OtherSet, "Then run: make convert"),
    (DamagedSet, "Run: make convert ARGS=--repair, or make pull"),
)


def command_of(args: argparse.Namespace | None) -> str:
    """The command that was run, as it is typed with make, which knows the .mat alone."""
    if args is None:
        return "make convert"
    verb = args.function.__name__
    if verb == "table" or (verb == "run" and is_of_frames(args)) or _has_address(args):
        return THE_SAME
    if verb != "run":
        return f"make {verb}"
    return "make convert" + (f" DRIVE={shlex.quote(str(args.drive))}" if args.drive else "")


def is_of_frames(args: argparse.Namespace) -> bool:
    """Whether a command is about a table or a directory of frames."""
    source = args.source
    return source is not None and is_frames(source, args.layout)


def _has_address(args: argparse.Namespace) -> bool:
    """Whether a place of a command lies in a store, of which make knows nothing."""
    places = ("source", "out", "directory", "drive")
    return any(is_address(getattr(args, name, None)) for name in places)


def with_next_command(error: UserError, command: str) -> str:
    """The error in one line, with settings as flags, and what to type next.

    command: the one that was run.
    """
    from convert.verify import WrongFiles

    text = error.told(as_flag)
    if isinstance(error, WrongFiles):
        return f"{text}. {_mending(error)}"
    if is_address(getattr(error, "path", None)):
        return f"{text}{_next_in_a_store(error)}"
    if isinstance(error, OldSet):
        return f"{text}. Run: {upgrade_commands(error)}"
    if isinstance(error, MissingField):
        fields = ",".join((*error.fields, error.field))
        return f"{text}. Run: make convert ARGS='--fields {fields}'"
    if isinstance(error, SeveralSets):
        return f"{text} (with make: DATA={error.found[0]})"
    if isinstance(error, IncompleteCopy):
        if command == THE_SAME:
            there = "Run again there what wrote it, then" if error.missing else "Run"
            return f"{text}. {there}: {command}"
        then = "make push there" if error.missing else f"make verify, {command}"
        return f"{text}. Run: {then}"
    if isinstance(error, IncompleteDownload):
        return f"{text}. Run: make convert (it resumes), or {WITH_THE_FILE}"
    if isinstance(error, ShardsFailed | NotThere):
        return f"{text}. Run the same command again to go on"
    if isinstance(error, StoreFailed):
        return f"{text}, then: {command}"
    if isinstance(error, UnfinishedSet):
        return f"{text}. Run: make convert"
    if isinstance(error, MissingSet):
        return text if error.right else f"{text}. {command_that_makes(str(error.path))}"
    if isinstance(error, WrongPlace):
        is_of_run = command.startswith("make convert")
        return f"{text}. Run: make convert OUT=/another/disk" if is_of_run else text
    if isinstance(error, FailedRows):
        return text
    if isinstance(error, WrongSource):
        if error.right:
            return f"{text}, then run: {THE_SAME if command == THE_SAME else 'make convert'}"
        return text if command == THE_SAME else f"{text}. Run: {WITH_THE_FILE}"
    advice = next((then for kind, then in NEXT if isinstance(error, kind)), "")
    return f"{text}. {advice}" if advice else text


OF_THE_SOURCE = ("kinds", "orientation", "order_version")  # settings that have no flag


def _next_in_a_store(error: UserError) -> str:
    """Behind the text of an error about a set in a store; "" where that says it all."""
    if isinstance(error, OldSet):
        return ". Copy it to a disk with the tools of that store: there it is brought to this one"
    if isinstance(error, UnfinishedSet):
        return f". Run: {THE_SAME} that began it"
    if isinstance(error, DamagedSet):
        return ". Run what wrote it again, with --repair where that was a conversion"
    return ""


def _mending(error: Any) -> str:
    """What to type where files of a set are wrong, or are no part of it."""
    found: StoredSet = error.found
    if isinstance(found, ShardSet):
        return f"Run: {repair_commands(error)}"
    steps = []
    if error.foreign:
        steps.append("Remove what is no part of it with the tools of that store")
    if len(error.foreign) < len(error.wrong):
        steps.append(f"Run: {as_typed(repair_command(found))}")
    return ", then: ".join(steps)


def repair_commands(error: Any) -> str:
    """What makes the wrong shards of a set again, after what is no part of it is removed."""
    found: ShardSet = error.found
    commands = []
    if error.foreign:
        commands.append(["rm", "-r", *(str(found.path / name) for name in error.foreign)])
    commands.append(repair_command(found))
    return " && ".join(map(as_typed, commands))


def repair_command(found: StoredSet) -> list[str]:
    """The command that makes the wrong shards of a set again."""
    source = found.manifest.source.name
    words: list[str] = []
    made = read_provenance(found.folder)
    with suppress(ValueError):  # whoever made it may have written anything
        if made is not None:
            words = shlex.split(made.text("command"))
            source = made.text("source_path")
    if found.manifest.source.kind == "table" and "run" in words:  # roots and names are there alone
        return ["python", "-m", "convert", *words[words.index("run") :], "--repair"]
    out = str(parent_of(found.address))
    command = ["python", "-m", "convert", "run", source, "--out", out, "--repair"]
    if found.codecs:
        codecs = ",".join(f"{field}={codec}" for field, codec in found.codecs.items())
        command += ["--format", "zarr", "--codec", codecs]
    defaults = ConversionSettings().to_json()
    for name, value in found.settings.to_json().items():
        if value != defaults.get(name) and name not in OF_THE_SOURCE:
            text = ",".join(value) if name == "fields" else str(value)
            command += [flag_of(name), text]
    for name, kind in found.settings.kinds.items():
        command += [flag_of("kinds"), f"{name}={kind}"]
    return command
