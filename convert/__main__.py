"""`python -m convert COMMAND`: parse, call one function, print."""

import argparse
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from convert.next_command import command_of, is_of_frames, with_next_command
from convert.parser import LOCAL, OWN, kinds_of, parser, settings_of, source_options_of
from shards.addresses import without_secrets
from shards.copy import codecs_of, copy_into, copy_set, name_of_copy
from shards.dataset import (
    DIRECTORY_NAME,
    LITTER,
    SetInStore,
    ShardSet,
    StoredSet,
    finished_sets,
    litter_in,
    open_in,
    resolve_set,
)
from shards.errors import (
    ConflictingSettings,
    NeedsSetting,
    OldSet,
    UserError,
    WrongSetting,
    WrongSource,
    printable,
)
from shards.files import LocalFolder, log
from shards.flags import as_typed
from shards.manifest import MANIFEST, read_manifest
from shards.spec import Codecs, ConversionSettings
from stores.http import READERS, RemoteFile
from stores.places import folder_at, resolve_in, root_at, store_at

if TYPE_CHECKING:
    from convert.pipeline import Execution

INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended
NOBODY_READS = 141  # and one whose lines nobody takes any more
MOST_NAMES = 8  # in a command that is printed


def run(args: argparse.Namespace) -> None:
    """Convert a source, or copy a finished set into another format."""
    settings = settings_of(args)
    _check_who_makes_it(args)
    if _is_set(args.source):
        _refuse_for_a_set(args)
        made: Path | str | None = _copied(args, settings)
    elif is_of_frames(args):
        _check_out(args)
        made = _converted_frames(args, settings)
    else:
        made = _converted(args, settings)
    if made is not None:
        print(made)


def _check_who_makes_it(args: argparse.Namespace) -> None:
    """Raise NeedsSetting for flags that do not go together."""
    if args.report is not None and args.scheduler == LOCAL:
        raise NeedsSetting("report", args.report, "scheduler", OWN)
    if args.drive is not None and args.part is not None:
        raise ConflictingSettings("part", args.part, "drive", args.drive)
    if args.drive is not None and args.scheduler != LOCAL:
        raise ConflictingSettings("scheduler", args.scheduler, "drive", args.drive)
    if args.repair and args.part is not None:
        raise ConflictingSettings("part", args.part, "repair", True)
    if args.source is None and (args.part is not None or args.scheduler != LOCAL):
        name = "part" if args.part is not None else "scheduler"
        raise WrongSetting(name, getattr(args, name), "name the source, which is not fetched then")


def _check_out(args: argparse.Namespace) -> None:
    """Raise WrongSetting where sets would lie among the pictures that they are made of."""
    source, out = args.source, args.out
    if isinstance(out, Path) and source.is_dir() and source.resolve() == out.resolve():
        raise WrongSetting("out", out, "is the source itself: choose a folder of its own")


def _refuse_for_a_set(args: argparse.Namespace) -> None:
    """A finished set is copied by this machine, as a whole."""
    if args.part is not None:
        raise WrongSetting("part", args.part, f"{args.source} is a finished set, copied as a whole")
    if args.scheduler != LOCAL:
        what = f"{args.source} is a finished set, copied on this machine"
        raise WrongSetting("scheduler", args.scheduler, what)


def _is_set(source: object) -> bool:
    """Whether it is a finished set, or a folder of some; a directory of frames is neither.

    An address is that of a set: a .mat on a web server is a RemoteFile by now.
    """
    if isinstance(source, str):
        return True
    if not isinstance(source, Path) or not source.is_dir():
        return False
    if DIRECTORY_NAME.fullmatch(source.name) or (source / MANIFEST).exists():
        return True
    sets = finished_sets(source)
    if sets:
        _refuse_a_set_beside_pictures(source, sets[0])
    return bool(sets)


def _refuse_a_set_beside_pictures(source: Path, found: Path) -> None:
    """Raise WrongSource for a folder of pictures into which a set of them was written."""
    others = [each.name for each in source.iterdir() if each.is_dir() and each.name[0] != "."]
    foreign = sorted(name for name in others if not DIRECTORY_NAME.fullmatch(name))
    if foreign:
        what = f"holds a finished set, {found.name}, beside other folders such as {foreign[0]}"
        raise WrongSource(source, what, "Name the set, or move it to a folder of its own")


def _copied(args: argparse.Namespace, settings: ConversionSettings) -> Path | str:
    """A copy of a finished set; one of version 1 with these settings is upgraded first."""
    found = _set_to_copy(args.source, settings)
    codecs = codecs_of(args.format, args.codec, found.manifest.fields)
    if isinstance(args.out, Path):
        return copy_set(found, args.out, codecs).path
    root = root_at(args.out, replaces=args.repair)
    return copy_into(found, root.child(name_of_copy(found, codecs)), codecs).address


def _set_to_copy(source: Path | str, settings: ConversionSettings) -> StoredSet:
    from convert.upgrade import read_version_1, upgrade

    folder = resolve_in(folder_at(source))
    try:
        found = open_in(folder)
    except OldSet:
        if not isinstance(folder, LocalFolder):
            raise
        _check_settings(folder.path, settings, read_version_1(folder.path).settings)
        return upgrade(folder.path)
    _check_settings(found.address, settings, found.settings)
    return found


def _converted(args: argparse.Namespace, settings: ConversionSettings) -> Path | str | None:
    """The set of a given source, or the cheapest way to one; None of a part of it."""
    from convert.pipeline import convert_to_set
    from convert.session import SetRequest, prepare
    from convert.sources.opening import refuse_frames_options

    codecs = codecs_of(args.format, args.codec, settings.fields)
    is_remote = isinstance(args.source, RemoteFile)
    workers = args.workers or (READERS if is_remote else None)
    refuse_frames_options(source_options_of(args), settings)
    if args.source and not args.drive:
        execution = _execution_of(args, workers, codecs)
        found = convert_to_set(args.source, args.out, settings, execution)
        made = None if found is None else found.address
    else:
        _check_on_this_machine(args)
        request = SetRequest(
            root=args.out,
            settings=settings,
            source=args.source,
            drive=args.drive,
            url=args.url,
            workers=workers,
            codecs=codecs,
        )
        made = _to_train_on(prepare(request))
    if is_remote:
        print(args.source.report(), file=sys.stderr)
    return made


def _check_on_this_machine(args: argparse.Namespace) -> None:
    """Raise WrongSetting where a set is to be found or kept by a session, which needs a disk."""
    if isinstance(args.out, str):
        choices = "an address takes a source that is named, and no folder of Drive"
        raise WrongSetting("out", without_secrets(args.out), choices)


def _execution_of(args: argparse.Namespace, workers: int | None, codecs: Codecs) -> "Execution":
    """Who makes the shards, and how."""
    from convert.cluster import Cluster
    from convert.pipeline import Execution

    cluster = None
    if args.scheduler != LOCAL:
        cluster = Cluster(scheduler=args.scheduler, workers=args.workers, report=args.report)
    return Execution(
        workers=workers,
        codecs=codecs,
        repair=args.repair,
        max_failed=args.max_failed,
        part=args.part,
        cluster=cluster,
    )


def _converted_frames(args: argparse.Namespace, settings: ConversionSettings) -> Path | str | None:
    """The set of a table, or of a directory of frames; None of a part. Raises WrongSetting."""
    from convert.pipeline import convert_to_set
    from convert.session import SetRequest, prepare
    from convert.sources.opening import open_source

    if args.url is not None:
        raise NeedsSetting("url", args.url, "layout", "nyu")
    if args.drive:
        _check_on_this_machine(args)
    # The set may be all that is left of it.
    if not args.source.exists() and isinstance(args.out, Path):
        return _found_by_name(args, settings)
    with closing(open_source(args.source, settings, source_options_of(args))) as source:
        resolved = source.resolved(settings)
        codecs = codecs_of(args.format, args.codec, resolved.fields)
        if args.drive:
            request = SetRequest(
                root=args.out,
                settings=resolved,
                source=source,
                drive=args.drive,
                workers=args.workers,
                codecs=codecs,
                max_failed=args.max_failed,
            )
            return prepare(request)
        execution = _execution_of(args, args.workers, codecs)
        made = convert_to_set(source, args.out, settings, execution)
        return None if made is None else made.address


def _found_by_name(args: argparse.Namespace, settings: ConversionSettings) -> Path:
    """The finished set of a table or directory that is not there. Raises WrongSource."""
    from convert.session import SetRequest, existing_sets, prepare

    request = SetRequest(root=args.out, settings=settings, source=args.source, drive=args.drive)
    existing = existing_sets(request)
    if existing.local is None and existing.on_drive is None:
        raise WrongSource(
            args.source, "is not there, nor is a finished set of it", "Check its path"
        )
    log(f"{args.source} is not there: taken is the set of what had its name")
    return prepare(request)


def _to_train_on(made: Path) -> Path:
    """Say which it is where there are others: `make train` finds one that is alone by itself."""
    if len(finished_sets(made.parent)) > 1:
        log(
            f"{made.parent} has other sets too, which are kept. "
            f"Train on this one with: make train DATA={made}"
        )
    return made


def _check_settings(
    place: Path | str, asked: ConversionSettings, stored: ConversionSettings
) -> None:
    """Raise WrongSource where a finished set is not what is asked for; the defaults ask for any."""
    if not asked.fits(stored) and asked != ConversionSettings():
        what = f"has other settings ({stored})"
        raise WrongSource(place, what, "Convert its source by itself")


def table(args: argparse.Namespace) -> None:
    """Write the table that a directory of frames is converted as."""
    from convert.sources.layouts import write_table
    from convert.sources.listings import Wanted

    wanted = Wanted(kinds=kinds_of(args), roots=tuple(args.root))
    n_rows, roots = write_table(args.source, args.layout, wanted, args.out)
    given = as_typed([word for root in roots for word in ("--root", root)])
    where = "the same --root" if args.root else given
    log(f"{n_rows} rows; convert them with {where}")
    print(args.out)


def verify(args: argparse.Namespace) -> None:
    """Check every byte of a set, and its columns and random rows against its source."""
    from convert.verify import against, verify_all

    found = read_set(args.directory)
    if isinstance(found, ShardSet):
        _warn_of_litter(found)
    print(f"{found.address}: {verify_all(found)} files, every byte as the manifest says")
    if args.against:
        n_rows = against(found, args.against, source_options_of(args), args.rows)
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


def read_set(place: Path | str) -> StoredSet:
    """A finished set of which only the manifest is looked at, as its files are checked later."""
    folder = resolve_in(folder_at(place))
    manifest = read_manifest(folder)
    if isinstance(folder, LocalFolder):
        return ShardSet(folder.path, manifest)
    return SetInStore(folder, manifest)


def inspect(args: argparse.Namespace) -> None:
    """Print what is in a set, and draw a contact sheet."""
    from convert.inspect import describe, picture

    found = open_in(resolve_in(folder_at(args.directory)))
    print(printable(describe(found)))
    if args.picture:
        picture(found, args.picture, args.rows)
        print(f"picture: {args.picture}")
    if args.rerun:
        from convert.recording import record

        record(found, args.rerun, args.rows)
        print(f"recording: {args.rerun} (to look at it: rerun {shlex.quote(str(args.rerun))})")


def push(args: argparse.Namespace) -> None:
    """Copy a set to Drive, or into a store."""
    from convert.transfer import push

    directory = resolve_set(args.directory)
    place = args.drive if isinstance(args.drive, Path) else store_at(args.drive)
    print(push(ShardSet(directory, read_manifest(directory)), place).address)


def pull(args: argparse.Namespace) -> None:
    """Copy a set from Drive, or out of a store."""
    from convert.transfer import pull, set_on_mount

    if isinstance(args.drive, Path):
        found: StoredSet = set_on_mount(resolve_set(args.drive))
    else:
        found = read_set(args.drive)
    print(pull(found, args.root).path)


def sample(args: argparse.Namespace) -> None:
    """Write made-up rooms: a small .mat, or a directory of a known layout."""
    from convert.sample import write_sample
    from convert.sample_frames import write_frames
    from convert.sample_sunrgbd import write_sunrgbd
    from convert.sample_tum import write_tum

    writers: dict[str, Callable[[Path, int], None]]
    writers = {"nyu": write_sample, "frames": write_frames, "tum": write_tum}
    writers["sunrgbd"] = write_sunrgbd
    writers[args.layout](args.file, args.rows)
    print(args.file)


VERBS = {each.__name__: each for each in (run, table, verify, inspect, push, pull, sample)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; a mistake in it is one line and status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be UTF-8
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own has it
    _end_as_by_ctrl_c()
    args: argparse.Namespace | None = None  # an address among them is opened while they are parsed
    try:
        args = parser(VERBS).parse_args(argv)
        args.function(args)
        return 0
    except BrokenPipeError:  # such as | head: whoever read has enough, and all is left as it is
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS
    except (KeyboardInterrupt, MemoryError, UserError, OSError) as error:
        if sys.stderr:  # else it would go to standard output, where the set's path is read
            print(printable(explained(error, args).replace("\n", " ")), file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2


def explained(error: BaseException, args: argparse.Namespace | None) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, UserError):
        return with_next_command(error, command_of(args))
    if isinstance(error, KeyboardInterrupt):
        return "interrupted: what is finished is kept. Run the same command again to go on"
    if isinstance(error, MemoryError):
        return "out of memory: what is finished is kept. Run the same command with fewer --workers"
    return f"{error}. What is finished is kept: mend that, then run the same command again"


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
