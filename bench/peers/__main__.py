"""How fast other people's readers deliver the same rows, beside ours and the limit.

    python -m bench.peers [SET] [--install DIR] [--turns 9]

Each reader gets the rows of the set (rgb, depth and a number) in a store of its own, written as it
recommends for arrays, and is compared with the set byte by byte before it is timed. Timed are
whole epochs of shuffled batches of 128 as torch tensors, files in the page cache, with 0, 1 and 2
workers, each reader in a process of its own. A turn is an epoch of the reader, one of ours with as
many workers, and one of the limit: C's memcpy of the same rows by one thread into one buffer. The
figures are medians over the turns with 95 % bootstrap intervals. A wait is the median for a batch
beside a step of 10 ms that sleeps, or that holds Python's lock.

WebDataset shuffles within 1000 rows, MosaicML Streaming and LitData within and across their files,
all others the whole set. A reader that does not install or run is named with the reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.command import SET, add_number, exit_status, make_parser
from bench.peers.limit import Memcpy
from bench.peers.places import OURS, PEERS, NotInstalled, Peer, Place, install, version_of
from bench.peers.process import Failed, ReaderProcess
from bench.peers.rows import BATCH, Rows
from bench.peers.table import NAME_WIDTH, as_text, head, limits_text, measure
from loader.buffers import N_BUFFERS
from shards.dataset import resolve_set
from shards.errors import UserError
from shards.flags import Parser, as_path, whole
from train.order import Batches

WORKERS = (0, 1, 2)
MOST_WORKERS = 64
N_MADE_UP = 1449  # rows, as many as the labelled set of NYU Depth V2 has
IDLE = 0.2  # load a core up to which nothing else is said to run


@dataclass(frozen=True)
class Bench:
    """What every measurement needs. ours: a running reader by its number of workers."""

    rows: Rows
    out: Path
    n_turns: int
    n_steps: int
    limit: Memcpy
    ours: dict[int, ReaderProcess]

    def start(self, place: Place, n_workers: int) -> ReaderProcess:
        """A reader's process, whose words go to a file beside the stores."""
        log = self.out / f"{place.peer.key}-{n_workers}.log"
        return ReaderProcess(place, self.rows.path, n_workers, log)


# ------------------------------------------------------------------------------------ the readers


def lines_of_ours(bench: Bench) -> Iterator[str]:
    """Ours, with each number of workers."""
    for n_workers, reader in bench.ours.items():
        reader.ask("check")
        found = measure(reader, None, bench.limit, bench.n_turns, bench.n_steps)
        yield as_text(OURS.name, n_workers, found)


def lines_of(peer: Peer, bench: Bench, environments: Path | None) -> Iterator[str]:
    """A peer's lines; one with the reason where it did not install, build, or run."""
    name = peer.name
    try:
        python = Path(sys.executable)
        if peer.needs is not None:
            name = f"{peer.name} ({version_of(peer.needs).split()[-1]})"
            if environments is None:
                raise NotInstalled("no folder to install it into was given")
            python = install(peer.needs, environments)
        place = Place(peer, python, bench.out / peer.key)
        with bench.start(place, 0) as builder:
            builder.ask("build")
    except (NotInstalled, Failed) as error:
        yield f"{name:{NAME_WIDTH}} left out: {error}"
        return

    for n_workers in bench.ours:
        try:
            with bench.start(place, n_workers) as reader:
                reader.ask("check")
                ours = bench.ours[n_workers]
                found = measure(reader, ours, bench.limit, bench.n_turns, bench.n_steps)
            yield as_text(name, n_workers, found)
        except Failed as error:
            yield f"{name:{NAME_WIDTH}} {n_workers:7} left out: {error}"
    shutil.rmtree(place.store, ignore_errors=True)


# -------------------------------------------------------------------------------------- the table


def made_up_set(folder: Path) -> Path:
    """A set of made-up rooms, for who has none at hand."""
    mat = folder / "rooms.mat"
    python = sys.executable
    print(f"no set was given: {N_MADE_UP} rooms are made up, which takes a minute", flush=True)
    sample = [python, "-m", "convert", "sample", str(mat), "--rows", str(N_MADE_UP)]
    subprocess.run(sample, check=True, capture_output=True)
    run = [python, "-m", "convert", "run", str(mat), "--out", str(folder / "rooms")]
    subprocess.run(run, check=True, capture_output=True)
    mat.unlink()
    return resolve_set(folder / "rooms")


def machine_line() -> str:
    """Whether the cores are free, as far as the load of the last minute tells."""
    n_cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    what = "nothing else runs" if load <= IDLE * n_cores else "the cores are NOT free"
    return f"{n_cores} cores, load {load:.2f} in the last minute: {what}"


def report(args: argparse.Namespace) -> None:
    """Build, check, time and print, reader by reader."""
    loaded = machine_line()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="bench-peers-", dir=args.out)
        out = Path(folder)
        if not args.keep:
            stack.callback(shutil.rmtree, out, ignore_errors=True)
        path = resolve_set(args.data) if args.data else made_up_set(out)
        rows = Rows(path)
        if len(rows) < 2 * BATCH:
            raise UserError(f"{path} has {len(rows)} rows. Use a set with {2 * BATCH} or more")

        n_epoch = len(rows) // BATCH * BATCH
        print(f"{path}: {len(rows)} rows of {rows.size}x{rows.size}, {rows.row_bytes} bytes each")
        print(f"batches of {BATCH}, {n_epoch} rows an epoch, {args.turns} turns; {loaded}\n")
        make_limit = partial(Memcpy, rows, Batches(len(rows), BATCH, 0)(0))
        bench = Bench(rows, out, args.turns, args.steps, make_limit(1), {})
        place = Place(OURS, Path(sys.executable), out / OURS.key)
        for n_workers in args.workers:
            bench.ours[n_workers] = stack.enter_context(bench.start(place, n_workers))
        print(head(), flush=True)
        print_lines(lines_of_ours(bench))
        for peer in PEERS:
            if args.only and peer.key not in args.only:
                continue
            print_lines(lines_of(peer, bench, args.install))
        print("\n".join(limits_text(make_limit, N_BUFFERS, args.turns)))
        if args.keep:
            print(f"stores: {out}")


def print_lines(lines: Iterator[str]) -> None:
    """Each as soon as it is there."""
    for line in lines:
        print(line, flush=True)


def make_flags() -> Parser:
    """Those of the command line."""
    parser = make_parser("peers", __doc__)
    set_help = f"{SET} (default: {N_MADE_UP} made-up rooms)"
    parser.add_argument("data", type=as_path, nargs="?", metavar="SET", help=set_help)
    install_help = (
        "install the readers that pip brings there, each in an environment of its own "
        "(default: only those that need nothing)"
    )
    parser.add_argument("--install", type=as_path, metavar="DIR", help=install_help)
    only_help = "measure these beside ours (default: all)"
    keys = [peer.key for peer in PEERS]
    parser.add_argument("--only", nargs="+", choices=keys, metavar="NAME", help=only_help)
    workers_help = f"numbers of workers (0 to {MOST_WORKERS} each, default: 0 1 2)"
    parser.add_argument(
        "--workers",
        nargs="+",
        type=whole(0, MOST_WORKERS),
        default=WORKERS,
        metavar="N",
        help=workers_help,
    )
    out_help = "where the stores are written (default: the folder for temporary files)"
    parser.add_argument("--out", type=as_path, metavar="DIR", help=out_help)
    keep_help = "leave what was written, logs included (default: it is removed)"
    parser.add_argument("--keep", action="store_true", help=keep_help)
    add_number(parser, "--turns", 9, "epochs of each reader, in turn with ours and the limit")
    add_number(parser, "--steps", 60, "steps of 10 ms for each wait")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    args = make_flags().parse_args(argv)
    return exit_status(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
