"""python -m convert run|verify|inspect|push|pull|sample: parse, call one function, print."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from shards import format as fmt
from shards.format import FIELDS, Settings, UserError

INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended


def run(args: argparse.Namespace) -> None:
    from convert.pipeline import convert
    from convert.repack import codecs_of, repack
    from convert.session import prepare
    from stores.http import READERS, Remote

    fields = tuple(args.fields.split(","))
    settings = Settings(fields, args.size, args.crop, args.depth_resize, args.rows_per_shard, args.axes)
    if isinstance(args.source, Path) and args.source.is_dir() and args.source.suffix != ".mat":
        print(repack(fmt.resolve_set(args.source), args.out, settings, args.format, args.codec))
        return
    codecs = codecs_of(args.format, args.codec, settings.fields)
    workers = args.workers or (READERS if isinstance(args.source, Remote) else None)
    if args.source and not args.drive:
        made = convert(args.source, args.out, settings, workers, codecs, repair=args.repair)
    else:
        made = prepare(args.source, args.out, settings, args.drive, args.url, workers, codecs)
    if isinstance(args.source, Remote):
        print(args.source.report(), file=sys.stderr)
    print(made)


def verify(args: argparse.Namespace) -> None:
    from convert.verify import against_source, verify_all

    directory = fmt.resolve_set(args.directory)
    print(f"{directory}: {verify_all(directory)} files, every byte as the manifest says")
    if args.against:
        print(f"{against_source(directory, args.against, args.rows)} random rows are what {args.against} gives")


def inspect(args: argparse.Namespace) -> None:
    from convert.inspect import describe, picture

    directory = fmt.resolve_set(args.directory)
    print(describe(directory))
    if args.picture:
        picture(directory, args.picture, args.rows)
        print(f"picture: {args.picture}")


def push(args: argparse.Namespace) -> None:
    from convert.transfer import push

    print(push(fmt.resolve_set(args.directory), args.drive))


def pull(args: argparse.Namespace) -> None:
    from convert.transfer import pull

    print(pull(fmt.resolve_set(args.drive), args.root))


def sample(args: argparse.Namespace) -> None:
    from convert.sample import write_sample

    write_sample(args.file, args.rows)
    print(args.file)


def _source(text: str) -> object:
    from stores.http import Remote

    return Remote(text) if text.startswith(("http://", "https://")) else path(text)


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. Run: {self.prog} --help\n")


def path(text: str) -> Path:
    """An empty one is a variable that was never set, and not this directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def number(most: int) -> Callable[[str], int]:
    """A type of arguments: 1 to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = 0
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: choose 1 to {most}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    top = _Parser("python -m convert", description=__doc__, epilog="example: python -m convert run X.mat --out data")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], None], text: str, example: str, *paths: str) -> _Parser:
        verb = function.__name__
        p = commands.add_parser(verb, help=text, epilog=f"example: python -m convert {verb} {example}")
        p.set_defaults(function=function)
        for name in paths:
            p.add_argument(name, type=path, metavar=name.upper())
        return p

    p = command(run, "convert a .mat into shards, or a finished set into another format", "X.mat --out data")
    p.add_argument("source", type=_source, nargs="?", help=".mat, URL or finished set (default: found, else fetched)")
    p.add_argument("--drive", type=path, metavar="DIR", help="take a finished set from there, or leave one there")
    p.add_argument("--url", help="where to fetch the .mat (default: its home at NYU)")
    p.add_argument("--out", type=path, required=True, metavar="ROOT")
    p.add_argument("--format", choices=("npy", "zarr"), default="npy")
    p.add_argument("--codec", default="none", metavar="none|zstd|blosc", help="with zarr; or depth=blosc,label=zstd")
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--fields", default=",".join(FIELDS), help="default: %(default)s")
    p.add_argument("--crop", default="none", metavar="none|border|eigen")
    p.add_argument("--depth-resize", default="nearest", metavar="nearest|area")
    p.add_argument("--rows-per-shard", type=int, default=128)
    p.add_argument(
        "--axes", default="auto", metavar="wh|hw", help="how square pictures lie; others are wider than tall"
    )
    p.add_argument("--workers", type=number(256), metavar="N", help="processes (default: one a core)")
    p.add_argument("--repair", action="store_true", help="redo the shards of a finished set that are wrong")

    p = command(verify, "check every byte of a set", "data", "directory")
    p.add_argument("--against", type=path, metavar="SOURCE", help="also compare random rows with the .mat")
    p.add_argument("--rows", type=number(1_000_000), default=16, help="how many (default: %(default)s)")

    p = command(inspect, "what is in a set", "data --picture a.png", "directory")
    p.add_argument("--picture", type=path, metavar="FILE.png", help="also draw a contact sheet")
    p.add_argument("--rows", type=number(100), default=8, help="rows in the picture")

    command(push, "copy a set to Drive", "data /content/drive/MyDrive/nyuv2", "directory", "drive")
    command(pull, "copy a set from Drive", "/content/drive/MyDrive/nyuv2 data", "drive", "root")

    p = command(sample, "write a small .mat of made-up rooms", "rooms.mat", "file")
    p.add_argument("--rows", type=number(10_000), default=48)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; a mistake in it is one line and status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be UTF-8
    _end_as_by_ctrl_c()
    try:
        args = parser().parse_args(argv)
        args.function(args)
        return 0
    except KeyboardInterrupt:
        status, message = INTERRUPTED, "interrupted: what is finished is kept. Run the same command again to go on"
    except MemoryError:
        status, message = 2, "out of memory: what is finished is kept. Run the same command with fewer --workers"
    except UserError as error:
        status, message = 2, str(error)
    except BrokenPipeError:  # such as | head: whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        status, message = 2, f"{error}. What is finished is kept: mend that, then run the same command again"
    if sys.stderr:  # else it would go to standard output, where the set's path is read
        print(message.replace("\n", " "), file=sys.stderr)
    return status


def _end_as_by_ctrl_c() -> None:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt, but not those that are ignored, as under nohup."""
    if threading.current_thread() is not threading.main_thread():
        return
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, signal.default_int_handler)


def _exit(status: int) -> NoReturn:
    """After Ctrl-C at once: a thread that waits for a server would be waited for. Files were left right before."""
    if status == INTERRUPTED:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _exit(main())
