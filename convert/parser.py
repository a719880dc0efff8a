"""The commands of `python -m convert`, their flags, and what a command line asks for with them."""

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

from convert.plan import Part
from convert.sources.opening import LAYOUTS, OF_DIRECTORIES, SourceOptions
from shards.addresses import name_of
from shards.containers import CODECS
from shards.dataset import DIRECTORY_NAME
from shards.errors import WrongSetting
from shards.flags import Parser, as_path, as_place, whole
from shards.spec import KINDS, KNOWN_FIELDS, ConversionSettings
from stores.http import RemoteFile

DESCRIPTION = """\
RGB-D pictures as memory-mapped shards: converted once, trained on ever after.
`run` converts a source or fetches a finished set; `table` lists a directory;
the others check sets, show and copy them. The last line of standard output is
what was made; messages go to standard error."""
SET = "a finished set, or a folder that holds exactly one; a path or an address"
AUTO = "auto"
LOCAL = "local"  # this machine's threads and helper processes
OWN = "dask"  # as convert.cluster has it

Verbs = Mapping[str, Callable[[argparse.Namespace], None]]


def parser(verbs: Verbs) -> argparse.ArgumentParser:
    """verbs: the function of each command, by its name."""
    example = "example: python -m convert run nyu_depth_v2_labeled.mat --out data"
    top = Parser("python -m convert", DESCRIPTION, example)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(verb: str, text: str, *examples: str) -> argparse.ArgumentParser:
        lines = [f"  python -m convert {verb} {example}" for example in examples]
        made = commands.add_parser(
            verb,
            prog=f"python -m convert {verb}",
            help=text[0].lower() + text[1:],
            description=f"{text}.",
            epilog="\n".join(["examples:", *lines]),
        )
        made.set_defaults(function=verbs[verb])
        return made

    _add_run_flags(
        command(
            "run",
            "Convert a source into shards, or a finished set into another format",
            "nyu_depth_v2_labeled.mat --out data",
            "--out data --drive /content/drive/MyDrive/nyuv2",
            "rows.csv --root pictures.zip --out data --depth-encoding tum",
            "my_room --out data --split-by row",
            "data --out packed --format zarr --codec blosc-zstd",
            "rows.csv --out s3://bucket/sets",
        )
    )
    _add_table_flags(
        command(
            "table",
            "Write the table that a directory is converted as, to look at and change",
            "my_room --out rows.csv",
        )
    )
    _add_verify_flags(
        command(
            "verify",
            "Check every byte of a set",
            "data",
            "data --against nyu_depth_v2_labeled.mat --rows 64",
            "data --against rows.csv --root pictures.zip",
        )
    )
    _add_inspect_flags(
        command(
            "inspect",
            "Say what is in a set, and draw it",
            "data",
            "data --picture rows.png",
            "data --rerun rows.rrd --rows 50",
        )
    )
    to_drive = "data /content/drive/MyDrive/nyuv2"
    to_bucket = "data s3://bucket/sets"
    elsewhere = "Drive, a bucket, or any other folder"
    _add_push_flags(command("push", f"Copy a set to {elsewhere}", to_drive, to_bucket))
    from_drive = "/content/drive/MyDrive/nyuv2 data"
    from_web = "https://host/sets/nyuv2-224-feb52342 data"
    _add_pull_flags(command("pull", f"Copy a set from {elsewhere}", from_drive, from_web))
    rooms = "rooms.mat --rows 192"
    frames = "my_rooms --layout frames"
    _add_sample_flags(command("sample", "Write made-up rooms as a small source", rooms, frames))
    return top


# ------------------------------------------------------------------------------------ flags


def _source(text: str) -> object:
    """A .mat on a web server by its file; a set there by the name that sets have."""
    is_of_set = bool(DIRECTORY_NAME.fullmatch(name_of(text.partition("?")[0])))
    if text.startswith(("http://", "https://")) and not is_of_set:
        return RemoteFile(text)
    return as_place(text)


def _whole_or_auto(low: int, high: int) -> Callable[[str], int]:
    parse = whole(low, high)
    return lambda text: 0 if text == AUTO else parse(text)


def _part(text: str) -> Part:
    """I/N"""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part = Part(number=int(match[1]), of=int(match[2])) if match else None
    if part is None or not 1 <= part.number <= part.of:
        raise argparse.ArgumentTypeError(f"{text!r}: give I/N, from 1/N to N/N")
    return part


def _scheduler(text: str) -> str:
    if text in (LOCAL, OWN) or re.fullmatch(r"[a-z]+://[^/]+:[0-9]+/?", text):
        return text
    if text.endswith(".json"):
        return str(as_path(text))
    choices = f"choose {LOCAL}, {OWN}, an address such as tcp://10.0.0.1:8786, or a FILE.json"
    raise argparse.ArgumentTypeError(f"{text!r}: {choices}")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: choose 0 to 1")
    return value


def _kind(text: str) -> tuple[str, str]:
    """NAME=KIND"""
    name, _, kind = text.partition("=")
    if not name or kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=KIND, one of {', '.join(KINDS)}")
    return name, kind


def _add_run_flags(p: argparse.ArgumentParser) -> None:
    """What is read, where it goes, and what is stored of it."""
    source_help = (
        ".mat, table (.csv .tsv .jsonl .parquet, or a list .txt), directory of frames, "
        "URL of a .mat, or finished set, or its address (default: the .mat, found, else fetched)"
    )
    p.add_argument("source", type=_source, nargs="?", metavar="SOURCE", help=source_help)
    out_help = (
        "the folder in which the set's own is made, or an address as s3://bucket/sets "
        "(no default: it must be given)"
    )
    p.add_argument("--out", type=as_place, required=True, metavar="ROOT", help=out_help)
    drive_help = "take a finished set from there, or leave one there (default: no Drive)"
    p.add_argument("--drive", type=as_path, metavar="DIR", help=drive_help)
    url_help = "where to fetch the .mat (default: its home at NYU)"
    p.add_argument("--url", metavar="URL", help=url_help)
    _add_storage_flags(p.add_argument_group("what is stored"))
    frames = p.add_argument_group("tables and directories of frames")
    _add_source_flags(frames)
    _add_meaning_flags(frames)
    _add_execution_flags(p.add_argument_group("how it is made"))


def _add_storage_flags(p: Any) -> None:
    format_help = "npy: files that are mapped; zarr: one group (default: %(default)s)"
    p.add_argument("--format", choices=("npy", "zarr"), default="npy", help=format_help)
    codec_help = f"of zarr: {', '.join(CODECS)}, or one a field: depth=blosc (default: %(default)s)"
    p.add_argument("--codec", default="none", metavar="CODEC", help=codec_help)
    size_help = "pictures of N x N pixels (8 to 1024, default: %(default)s)"
    p.add_argument("--size", type=int, default=224, metavar="N", help=size_help)
    fields_help = "which are stored (default: %(default)s, as far as the source has them)"
    p.add_argument("--fields", default=",".join(KNOWN_FIELDS), metavar="A,B,...", help=fields_help)
    crop_help = (
        "before resizing: none, or a crop of the dataset: border, eigen, sunrgbd "
        "(default: %(default)s)"
    )
    p.add_argument("--crop", default="none", metavar="CROP", help=crop_help)
    resize_help = "how depth is made smaller (default: %(default)s)"
    p.add_argument("--depth-resize", default="nearest", metavar="nearest|area", help=resize_help)
    shard_help = "rows in a file (1 to 100000, default: auto: 128, more from 100000 rows on)"
    p.add_argument(
        "--rows-per-shard", type=_whole_or_auto(1, 100_000), default=0, metavar="N", help=shard_help
    )
    axes_help = "how square pictures of a .mat lie (default: %(default)s: wider than tall)"
    p.add_argument("--axes", default="auto", metavar="auto|wh|hw", help=axes_help)


def _add_source_flags(p: Any) -> None:
    """What is needed to open a table again."""
    layout_help = f"what SOURCE is: {', '.join(LAYOUTS)} (default: %(default)s, by its name)"
    p.add_argument("--layout", choices=LAYOUTS, default=AUTO, metavar="NAME", help=layout_help)
    name_help = "what the dataset is called (default: as the file or directory)"
    p.add_argument("--name", metavar="DATASET", help=name_help)
    _add_root_flag(p)
    follow_help = "let paths leave their root by links and .. (default: such rows fail)"
    p.add_argument("--follow", action="store_true", help=follow_help)
    label_names_help = "a file with a name of a label a line, from id 1 on (default: numbers)"
    p.add_argument("--label-names", type=as_path, metavar="FILE", help=label_names_help)


def _add_root_flag(p: Any) -> None:
    root_help = (
        "where paths lead: a folder, URL, .zip or .tar, or FIELD=one of these; may be repeated "
        "(default: the table's own folder)"
    )
    p.add_argument("--root", action="append", default=[], metavar="PLACE", help=root_help)


def _add_meaning_flags(p: Any) -> None:
    """What its pictures mean: part of the fingerprint."""
    _add_field_flag(p)
    encoding_help = (
        "how depth is stored: mm, metres, sunrgbd, tum, matterport, 2d3ds, nyu_raw, hypersim "
        "(default: whole numbers are mm, others metres)"
    )
    p.add_argument("--depth-encoding", metavar="NAME", help=encoding_help)
    scale_help = "or stored units a metre, as 1000 or 5000: divides (default: none)"
    p.add_argument("--depth-scale", type=float, metavar="N", help=scale_help)
    trunc_help = "depth farther than this becomes 0, none (default: all is kept)"
    p.add_argument("--depth-trunc", type=float, metavar="METRES", help=trunc_help)
    void_help = "the label id that is void; 0 is a class then (0 to 65535, default: 0 is void)"
    p.add_argument("--label-void", type=whole(0, 65535), metavar="ID", help=void_help)
    split_help = (
        "scene, row or a column, with shares of train, val, test: scene:0.8,0.1,0.1 "
        "(default: the column split, else scene)"
    )
    p.add_argument("--split-by", metavar="RULE", help=split_help)
    failed_help = "the share of rows that may be unreadable (0 to 1, default: %(default)s)"
    p.add_argument("--max-failed", type=_share, default=0.0, metavar="SHARE", help=failed_help)


def _add_field_flag(p: Any) -> None:
    field_help = (
        f"one more field, of kind {', '.join(KINDS)}; may be repeated "
        "(default: rgb, depth, raw_depth, label, instance alone)"
    )
    p.add_argument(
        "--field", type=_kind, action="append", default=[], metavar="NAME=KIND", help=field_help
    )


def _add_execution_flags(p: Any) -> None:
    workers_help = "processes that convert (1 to 256, default: one a core)"
    p.add_argument("--workers", type=whole(1, 256), metavar="N", help=workers_help)
    scheduler_help = (
        "who makes shards: local, dask (a cluster of this machine), tcp://HOST:PORT or a "
        "scheduler's FILE.json (default: %(default)s)"
    )
    p.add_argument(
        "--scheduler", type=_scheduler, default=LOCAL, metavar="WHERE", help=scheduler_help
    )
    report_help = "an .html of what a Dask cluster did (default: none)"
    p.add_argument("--report", type=as_path, metavar="F.html", help=report_help)
    part_help = (
        "make the I-th of N parts alone, 1/N to N/N; whichever finds all done finishes the set "
        "(default: all of it)"
    )
    p.add_argument("--part", type=_part, metavar="I/N", help=part_help)
    repair_help = "redo the shards of a finished set that are wrong, or have unreadable rows"
    p.add_argument("--repair", action="store_true", help=repair_help)


def _add_table_flags(p: argparse.ArgumentParser) -> None:
    directory_help = "a directory with rgb/ and depth/, or train/rgb/, ..."
    p.add_argument("source", type=as_path, metavar="DIR", help=directory_help)
    out_help = "the .csv to write (no default: it must be given)"
    p.add_argument("--out", type=as_path, required=True, metavar="FILE", help=out_help)
    layout_help = f"how DIR is laid out: {', '.join(OF_DIRECTORIES)} (default: %(default)s)"
    layouts = (AUTO, *OF_DIRECTORIES)
    p.add_argument("--layout", choices=layouts, default=AUTO, metavar="NAME", help=layout_help)
    _add_root_flag(p)
    _add_field_flag(p)


def _add_verify_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=as_place, metavar="SET", help=SET)
    against_help = "also compare columns and random rows with this source (default: bytes alone)"
    p.add_argument("--against", type=as_path, metavar="SOURCE", help=against_help)
    rows_help = "how many rows are compared (1 to 1000000, default: %(default)s)"
    p.add_argument("--rows", type=whole(1, 1_000_000), default=16, metavar="N", help=rows_help)
    _add_source_flags(p.add_argument_group("the source, where it is a table or directory"))


def _add_inspect_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("directory", type=as_place, metavar="SET", help=SET)
    picture_help = "also draw rows into this .png, .jpg, .svg or .pdf (default: text alone)"
    p.add_argument("--picture", type=as_path, metavar="FILE", help=picture_help)
    rerun_help = "also write rows as a recording of rerun.io, .rrd (default: none)"
    p.add_argument("--rerun", type=as_path, metavar="FILE", help=rerun_help)
    rows_help = "rows in picture and recording (1 to 100, default: %(default)s)"
    p.add_argument("--rows", type=whole(1, 100), default=8, metavar="N", help=rows_help)


def _add_push_flags(p: argparse.ArgumentParser) -> None:
    set_help = "a finished set of this machine, or a folder that holds exactly one"
    p.add_argument("directory", type=as_path, metavar="SET", help=set_help)
    drive_help = "the folder to copy it into, or an address as s3://bucket/sets"
    p.add_argument("drive", type=as_place, metavar="DRIVE", help=drive_help)


def _add_pull_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("drive", type=as_place, metavar="DRIVE", help=SET)
    p.add_argument("root", type=as_path, metavar="ROOT", help="the folder to copy it into")


def _add_sample_flags(p: argparse.ArgumentParser) -> None:
    out_help = "the .mat, or the directory, to write; it must not exist"
    p.add_argument("file", type=as_path, metavar="OUT", help=out_help)
    layout_help = (
        "nyu: a .mat; frames: a directory of pictures; tum: recordings; sunrgbd: that, whole "
        "(default: %(default)s)"
    )
    layouts = ("nyu", "frames", "sunrgbd", "tum")
    p.add_argument("--layout", choices=layouts, default="nyu", metavar="NAME", help=layout_help)
    rows_help = "rooms in it (1 to 10335, default: %(default)s)"
    p.add_argument("--rows", type=whole(1, 10_335), default=48, metavar="N", help=rows_help)


# ------------------------------------------------------------------------------ what is asked for


def settings_of(args: argparse.Namespace) -> ConversionSettings:
    """What `run` is to store. Raises WrongSetting."""
    kinds = kinds_of(args)
    fields = tuple(args.fields.split(","))
    return ConversionSettings(
        fields=(*fields, *(name for name in kinds if name not in fields)),
        size=args.size,
        crop=args.crop,
        depth_resize=args.depth_resize,
        rows_per_shard=args.rows_per_shard,
        axes=args.axes,
        kinds=kinds,
        depth_encoding=args.depth_encoding,
        depth_scale=args.depth_scale,
        depth_trunc=args.depth_trunc,
        label_void=args.label_void,
        split_by=args.split_by,
    )


def kinds_of(args: argparse.Namespace) -> dict[str, str]:
    """The kinds of the fields that were added, by name. Raises WrongSetting."""
    kinds = dict(args.field)
    for name in kinds:
        if name in KNOWN_FIELDS:
            raise WrongSetting("field", name, f"is {KNOWN_FIELDS[name].kind} already")
    return kinds


def source_options_of(args: argparse.Namespace) -> SourceOptions:
    """How a table or a directory is to be opened."""
    return SourceOptions(
        layout=args.layout,
        name=args.name,
        roots=tuple(args.root),
        follow=args.follow,
        label_names=args.label_names,
    )
