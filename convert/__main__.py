"""`python -m convert run|verify|inspect|push|pull|sample`: parse, call one function, print."""

import argparse
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from shards.containers import CODECS
from shards.copy import codecs_of, copy_set
from shards.dataset import LITTER, ShardSet, finished_sets, litter_in, open_set, resolve_set
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
    UserError,
    WrongPlace,
    WrongSource,
)
from shards.files import log
from shards.flags import Parser, as_flag, as_path, as_typed, flag_of, upgrade_commands, whole
from shards.manifest import PROVENANCE, read_manifest
from shards.spec import KNOWN_FIELDS, ConversionSettings
from stores.http import READERS, RemoteFile

INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended
SOURCES = (".mat", ".h5", ".hdf5")
MOST_NAMES = 8  # in a command that is printed


def run(args: argparse.Namespace) -> None:
    """Convert a source, or copy a finished set into another format."""
    fields = tuple(args.fields.split(","))
    settings = ConversionSettings(
        fields, args.size, args.crop, args.depth_resize, args.rows_per_shard, args.axes
    )
    is_set = isinstance(args.source, Path) and args.source.is_dir()
    if is_set and args.source.suffix != ".mat":
        print(_copied(args, settings))
    else:
        print(_converted(args, settings))


def _copied(args: argparse.Namespace, settings: ConversionSettings) -> Path:
    """A copy of a finished set; one of version 1 with these settings is upgraded first."""
    from convert.upgrade import read_version_1, upgrade

    path = resolve_set(args.source)
    try:
        found = open_set(path)
    except OldSet:
        _check_settings(path, settings, read_version_1(path).settings)
        found = upgrade(path)
    else:
        _check_settings(path, settings, found.settings)
    codecs = codecs_of(args.format, args.codec, found.manifest.fields)
    return copy_set(found, args.out, codecs).path


def _converted(args: argparse.Namespace, settings: ConversionSettings) -> Path:
    """The set of a given source, or the cheapest way to one."""
    from convert.pipeline import convert
    from convert.session import SetRequest, prepare

    codecs = codecs_of(args.format, args.codec, settings.fields)
    is_remote = isinstance(args.source, RemoteFile)
    workers = args.workers or (READERS if is_remote else None)
    if args.source and not args.drive:
        directory = convert(
            args.source, args.out, settings, workers=workers, codecs=codecs, repair=args.repair
        )
        made = Path(directory)
    else:
        request = SetRequest(
            root=args.out,
            settings=settings,
            source=args.source,
            drive=args.drive,
            url=args.url,
            workers=workers,
            codecs=codecs,
        )
        made = prepare(request)
        _say_which_to_train(made)
    if is_remote:
        print(args.source.report(), file=sys.stderr)
    return made


def _say_which_to_train(made: Path) -> None:
    """`make train` finds a set by itself where it is the only one."""
    if len(finished_sets(made.parent)) > 1:
        log(
            f"{made.parent} has other sets too, which are kept. "
            f"Train on this one with: make train DATA={made}"
        )


def _check_settings(path: Path, asked: ConversionSettings, stored: ConversionSettings) -> None:
    """Raise WrongSource where a finished set is not what is asked for; the defaults ask for any."""
    if not asked.fits(stored) and asked != ConversionSettings():
        what = f"has other settings ({stored})"
        raise WrongSource(path, what, "Convert its source by itself")


def verify(args: argparse.Namespace) -> None:
    """Check every byte of a set, and its columns and random rows against its source."""
    from convert.verify import against_mat, verify_all

    found = read_set(args.directory)
    _warn_of_litter(found)
    print(f"{found.path}: {verify_all(found)} files, every byte as the manifest says")
    if args.against:
        n_rows = against_mat(found, args.against, args.rows)
        print(f"every column and {n_rows} random rows are what {args.against} gives")


def _warn_of_litter(found: ShardSet) -> None:
    """What file managers leave is no damage; it can be removed."""
    names = litter_in(found.path, found.manifest)
    if not names:
        return
    first = str(found.path / names[0]).rstrip()
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    what = "was left by a file manager or file system: no part of the set, and no harm"
    log(f"warning: {first}{more} {what}. To remove: {_rm_litter(found.path, names)}")


def _rm_litter(directory: Path, names: Sequence[str]) -> str:
    """The line that removes it; of many, by its patterns."""
    if len(names) <= MOST_NAMES:
        return as_typed(["rm", *(str(directory / name) for name in names)])
    patterns = [word for pattern in LITTER for word in ("-o", "-name", pattern)][1:]
    return as_typed(["find", str(directory), "-type", "f", "(", *patterns, ")", "-delete"])


def read_set(path: Path) -> ShardSet:
    """A finished set of which only the manifest is looked at, as its files are checked later."""
    directory = resolve_set(path)
    return ShardSet(directory, read_manifest(directory))


def inspect(args: argparse.Namespace) -> None:
    """Print what is in a set, and draw a contact sheet."""
    from convert.inspect import describe, picture

    found = open_set(resolve_set(args.directory))
    print(describe(found))
    if args.picture:
        picture(found, args.picture, args.rows)
        print(f"picture: {args.picture}")
    if args.rerun:
        from convert.recording import record

        record(found, args.rerun, args.rows)
        print(f"recording: {args.rerun} (to look at it: rerun {shlex.quote(str(args.rerun))})")


def push(args: argparse.Namespace) -> None:
    """Copy a set to Drive."""
    from convert.transfer import push

    print(push(read_set(args.directory), args.drive).path)


def pull(args: argparse.Namespace) -> None:
    """Copy a set from Drive."""
    from convert.transfer import pull, set_on_mount

    print(pull(set_on_mount(resolve_set(args.drive)), args.root).path)


def sample(args: argparse.Namespace) -> None:
    """Write a small .mat of made-up rooms."""
    from convert.sample import write_sample

    write_sample(args.file, args.rows)
    print(args.file)


def _source(text: str) -> object:
    return RemoteFile(text) if text.startswith(("http://", "https://")) else as_path(text)


DESCRIPTION = """\
RGB-D pictures as memory-mapped shards: converted once, trained on ever after.
`run` converts a source or fetches a finished set; the others check sets, show
and copy them. The last line of standard output is what was made; messages go
to standard error."""


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    example = "example: python -m convert run nyu_depth_v2_labeled.mat --out data"
    top = Parser("python -m convert", DESCRIPTION, example)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(
        function: Callable[[argparse.Namespace], None], text: str, *examples: str
    ) -> argparse.ArgumentParser:
        verb = function.__name__
        lines = [f"  python -m convert {verb} {example}" for example in examples]
        made = commands.add_parser(
            verb,
            prog=f"python -m convert {verb}",
            help=text[0].lower() + text[1:],
            description=f"{text}.",
            epilog="\n".join(["examples:", *lines]),
        )
        made.set_defaults(function=function)
        return made

    _add_run_flags(
        command(
            run,
            "Convert a .mat into shards, or a finished set into another format",
            "nyu_depth_v2_labeled.mat --out data",
            "--out data --drive /content/drive/MyDrive/nyuv2",
            "data --out packed --format zarr --codec blosc-zstd",
        )
    )
    _add_verify_flags(
        command(
            verify,
            "Check every byte of a set",
            "data",
            "data --against nyu_depth_v2_labeled.mat --rows 64",
        )
    )
    _add_inspect_flags(
        command(
            inspect,
            "Say what is in a set, and draw it",
            "data",
            "data --picture rows.png",
            "data --rerun rows.rrd --rows 50",
        )
    )
    to_drive = "data /content/drive/MyDrive/nyuv2"
    _add_push_flags(command(push, "Copy a set to Drive, or into any other folder", to_drive))
    from_drive = "/content/drive/MyDrive/nyuv2 data"
    _add_pull_flags(command(pull, "Copy a set from Drive, or out of any other folder", from_drive))
    rooms = "rooms.mat --rows 192"
    _add_sample_flags(command(sample, "Write a small .mat of made-up rooms", rooms))
    return top


SET = "a finished set, or a folder that holds exactly one"


def _add_run_flags(p: argparse.ArgumentParser) -> None:
    """What is read, where it goes, and what is stored of it."""
    source_help = ".mat, URL or finished set (default: found, else fetched)"
    p.add_argument("source", type=_source, nargs="?", metavar="SOURCE", help=source_help)
    out_help = "the folder in which the set's own is made (no default: it must be given)"
    p.add_argument("--out", type=as_path, required=True, metavar="ROOT", help=out_help)
    drive_help = "take a finished set from there, or leave one there (default: no Drive)"
    p.add_argument("--drive", type=as_path, metavar="DIR", help=drive_help)
    url_help = "where to fetch the .mat (default: its home at NYU)"
    p.add_argument("--url", metavar="URL", help=url_help)
    format_help = "npy: files that are mapped; zarr: one group (default: %(default)s)"
    p.add_argument("--format", choices=("npy", "zarr"), default="npy", help=format_help)
    codec_help = f"of zarr: {', '.join(CODECS)}, or one a field: depth=blosc (default: %(default)s)"
    p.add_argument("--codec", default="none", metavar="CODEC", help=codec_help)

    size_help = "pictures of N x N pixels (8 to 1024, default: %(default)s)"
    p.add_argument("--size", type=int, default=224, metavar="N", help=size_help)
    fields_help = "which are stored (default: %(default)s, as far as the source has them)"
    p.add_argument("--fields", default=",".join(KNOWN_FIELDS), metavar="A,B,...", help=fields_help)
    crop_help = (
        "before resizing: none, or a crop of the dataset: border, eigen (default: %(default)s)"
    )
    p.add_argument("--crop", default="none", metavar="CROP", help=crop_help)
    resize_help = "how depth is made smaller (default: %(default)s)"
    p.add_argument("--depth-resize", default="nearest", metavar="nearest|area", help=resize_help)
    shard_help = "rows in a file (1 to 100000, default: %(default)s)"
    p.add_argument("--rows-per-shard", type=int, default=128, metavar="N", help=shard_help)
    axes_help = "how square pictures lie; others are wider than tall (default: %(default)s)"
    p.add_argument("--axes", default="auto", metavar="auto|wh|hw", help=axes_help)

    workers_help = "processes that convert (1 to 256, default: one a core)"
    p.add_argument("--workers", type=whole(1, 256), metavar="N", help=workers_help)
    repair_help = "redo the shards of a finished set that are wrong"
    p.add_argument("--repair", action="store_true", help=repair_help)


def _add_verify_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=as_path, metavar="SET", help=SET)
    against_help = "also compare columns and random rows with this .mat (default: bytes alone)"
    p.add_argument("--against", type=as_path, metavar="SOURCE", help=against_help)
    rows_help = "how many rows are compared (1 to 1000000, default: %(default)s)"
    p.add_argument("--rows", type=whole(1, 1_000_000), default=16, metavar="N", help=rows_help)


def _add_inspect_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=as_path, metavar="SET", help=SET)
    picture_help = "also draw rows into this .png, .jpg, .svg or .pdf (default: text alone)"
    p.add_argument("--picture", type=as_path, metavar="FILE", help=picture_help)
    rerun_help = "also write rows as a recording of rerun.io, .rrd (default: none)"
    p.add_argument("--rerun", type=as_path, metavar="FILE", help=rerun_help)
    rows_help = "rows in picture and recording (1 to 100, default: %(default)s)"
    p.add_argument("--rows", type=whole(1, 100), default=8, metavar="N", help=rows_help)


def _add_push_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=as_path, metavar="SET", help=SET)
    p.add_argument("drive", type=as_path, metavar="DRIVE", help="the folder to copy it into")


def _add_pull_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("drive", type=as_path, metavar="DRIVE", help=SET)
    p.add_argument("root", type=as_path, metavar="ROOT", help="the folder to copy it into")


def _add_sample_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "file", type=as_path, metavar="FILE", help="the .mat to write; it must not exist"
    )
    rows_help = "rooms in it (1 to 10000, default: %(default)s)"
    p.add_argument("--rows", type=whole(1, 10_000), default=48, metavar="N", help=rows_help)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; a mistake in it is one line and status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be UTF-8
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own has it
    _end_as_by_ctrl_c()
    args: argparse.Namespace | None = None  # an address among them is opened while they are parsed
    try:
        args = parser().parse_args(argv)
        args.function(args)
        return 0
    except BrokenPipeError:  # such as | head: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, MemoryError, UserError, OSError) as error:
        if sys.stderr:  # else it would go to standard output, where the set's path is read
            print(explained(error, args).replace("\n", " "), file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2


def explained(error: BaseException, args: argparse.Namespace | None) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, UserError):
        return with_next_command(error, _as_typed(args))
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: what is finished is kept. Run the same command again to go on"
    if isinstance(error, MemoryError):
        return "out of memory: what is finished is kept. Run the same command with fewer --workers"
    return f"{error}. What is finished is kept: mend that, then run the same command again"


WITH_THE_FILE = "make convert MAT=/path/to/nyu_depth_v2_labeled.mat"

# What to type next, by what went wrong; the first that fits counts.
NEXT: tuple[tuple[type[UserError], str], ...] = (
    (NewerSet, "Run: make convert OUT=/another/folder, or install that version"),
    (MissingSet, "Run: make convert"),
    (Busy, "Wait for it, then run: make convert"),
    (OtherSet, "Then run: make convert"),
    (DamagedSet, "Run: make convert ARGS=--repair, or make pull"),
)


def _as_typed(args: argparse.Namespace | None) -> str:
    """The command that was run, as it is typed with make."""
    if args is None:
        return "make convert"
    verb = args.function.__name__
    if verb != "run":
        return f"make {verb}"
    return "make convert" + (f" DRIVE={shlex.quote(str(args.drive))}" if args.drive else "")


def with_next_command(error: UserError, command: str) -> str:
    """The error in one line, with settings as flags, and what to type next.

    command: the one that was run.
    """
    from convert.verify import WrongFiles

    text = error.told(as_flag)
    if isinstance(error, WrongFiles):
        return f"{text}. Run: {repair_commands(error)}"
    if isinstance(error, OldSet):
        return f"{text}. Run: {upgrade_commands(error)}"
    if isinstance(error, MissingField):
        fields = ",".join((*error.fields, error.field))
        return f"{text}. Run: make convert ARGS='--fields {fields}'"
    if isinstance(error, SeveralSets):
        return f"{text} (with make: DATA={error.found[0]})"
    if isinstance(error, IncompleteCopy):
        then = "make push there" if error.missing else f"make verify, {command}"
        return f"{text}. Run: {then}"
    if isinstance(error, IncompleteDownload):
        return f"{text}. Run: make convert (it resumes), or {WITH_THE_FILE}"
    if isinstance(error, StoreFailed):
        return f"{text}, then: {command}"
    if isinstance(error, MissingSet) and Path(error.path).suffix in SOURCES:
        return f"{text}. Run: python -m convert run {shlex.quote(str(error.path))} --out data"
    if isinstance(error, WrongPlace):
        is_of_run = command.startswith("make convert")
        return f"{text}. Run: make convert OUT=/another/disk" if is_of_run else text
    if isinstance(error, WrongSource):
        if error.right:
            return f"{text}, then run: make convert"
        return f"{text}. Run: {WITH_THE_FILE}"
    advice = next((then for kind, then in NEXT if isinstance(error, kind)), "")
    return f"{text}. {advice}" if advice else text


def repair_commands(error: Any) -> str:
    """What makes the wrong shards of a set again, after what is no part of it is removed."""
    found: ShardSet = error.found
    commands = []
    if error.foreign:
        commands.append(["rm", "-r", *(str(found.path / name) for name in error.foreign)])
    commands.append(repair_command(found))
    return " && ".join(map(as_typed, commands))


def repair_command(found: ShardSet) -> list[str]:
    """The command that makes the wrong shards of a set again."""
    try:
        source = json.loads((found.path / PROVENANCE).read_text())["source_path"]
    except (OSError, ValueError, KeyError, TypeError):
        source = found.manifest.source.name
    out = str(found.path.parent)
    command = ["python", "-m", "convert", "run", source, "--out", out, "--repair"]
    if found.codecs:
        codecs = ",".join(f"{field}={codec}" for field, codec in found.codecs.items())
        command += ["--format", "zarr", "--codec", codecs]
    defaults = ConversionSettings().to_json()
    for name, value in found.settings.to_json().items():
        if value != defaults.get(name) and name != "kinds":
            text = ",".join(value) if name == "fields" else str(value)
            command += [flag_of(name), text]
    return command


def _end_as_by_ctrl_c() -> None:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt, unless they are ignored, as under nohup."""
    if threading.current_thread() is not threading.main_thread():
        return
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, signal.default_int_handler)


def _exit(status: int) -> NoReturn:
    """After Ctrl-C at once: else a thread that waits for a server would be waited for."""
    if status == INTERRUPTED:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _exit(main())
