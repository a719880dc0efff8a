"""python -m train: learn from a converted set; python -m train predict RUN: what a run says."""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from loader.memory import NoRoom
from shards.dataset import ShardSet
from shards.errors import (
    Busy,
    CacheInUse,
    DamagedSet,
    MissingField,
    MissingSet,
    OldSet,
    RemoteSet,
    SeveralSets,
    UnfinishedSet,
    UserError,
    WrongPlace,
    one_line,
    printable,
)
from shards.files import log
from shards.flags import as_flag, command_that_makes, flag_of, upgrade_commands
from train import ranks
from train.checkpoint import check_run_there
from train.errors import CannotUnpack, CannotWrite, NeedsSet, NoCheckpoint, WrongCheckpoint
from train.job import make_setup, open_set_of
from train.looking import augmentations_png
from train.loop import MIRROR_WAIT_S, training
from train.predict import needed_set, predict, predict_flags
from train.recipe import AUTO, OF_DEPTH, OF_PIXELS, RECIPES, defaults, plan
from train.report import report, write
from train.room import AUTO as AUTO_SHUFFLE
from train.settings import Settings, add_flags
from train.signals import REQUESTS, Stopped

DESCRIPTION = """Train a network on a converted set: on its scenes, the classes of its pixels, or
depth. It leaves checkpoints, scores, tables and pictures in RUN.

What a run says of the test rows, or of other pictures: python -m train predict --help
What augmentation does to pictures, as a page: python -m train look --help"""
USAGE = "python -m train --data DIR|ROOT --out RUN [flags]"
PREDICT_USAGE = "python -m train predict RUN [RUN ...] [flags]"
LOOK_DESCRIPTION = """Draw a page of train rows as they are stored, and as three steps of a
training with these flags would see them: rgb, depth and labels.
Of the flags --crop, --jitter, --size, --task and --seed count."""
LOOK_USAGE = "python -m train look FILE.png --data DIR|ROOT [flags]"
EPILOG = """examples:
  python -m train --data data --out runs/scene
  python -m train --data data --out runs/scene --recipe default
  python -m train --data data --out runs/parts --task semantic40 --batch-size 32
  python -m train --data data --out runs/pretrained --recipe pretrained
  python -m train --data data --out runs/file --weights resnet18-f37072fd.pth --lr 3e-4
  torchrun --nproc-per-node 2 -m train --data data --out runs/two
  python -m train predict runs/scene
  python -m train predict runs/scene --data photos-224-1f3a9c20
  python -m train look augmented.png --data data --crop 0.3

The same command again continues where it stopped."""

FULL_MEMORY = "the memory is full. Use a smaller --batch-size, --size or --width"
FULL_GPU = "the GPU's memory is full. Use a smaller --batch-size"
SAME_COMMAND = "What is saved is kept: mend that, then run the same command again"


class Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: {message}. Run: python -m {self.prog} --help\n")


def make_parser() -> Parser:
    """The flags are the fields of Settings, and which recipe is to be followed."""
    parser = Parser(
        "train",
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    parser.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="train in stages, with settings that are good together instead of the defaults above "
        f"({_of_the_recipes()}); a flag that is given is kept; default none",
    )
    parser.add_argument(
        "--start",
        default=AUTO,
        metavar="auto|RUN",
        help="of a recipe: the run that learns the pixels' classes first, '' for none "
        "(auto: OUT-parts, where the set has them); default auto",
    )
    return parser


def look_parser() -> Parser:
    """The flags of a training, of which those of augmentation count, and the picture to write."""
    parser = Parser(
        "train look",
        usage=LOOK_USAGE,
        description=LOOK_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("picture", metavar="FILE.png", help="the page to write; required")
    add_flags(parser, needs_out=False)
    return parser


def _of_the_recipes() -> str:
    all_values = {
        **RECIPES,
        "with --inputs depth": OF_DEPTH,
        "with --task semantic or depth": OF_PIXELS,
    }
    return "; ".join(f"{name}: {_as_flags(values)}" for name, values in all_values.items())


def _as_flags(values: dict[str, Any]) -> str:
    return ", ".join(f"{flag_of(name)} {value}" for name, value in values.items())


def parse(words: Sequence[str]) -> tuple[Settings, str | None, str]:
    """The settings, the recipe and the run that it starts from. Raises UserError, or SystemExit."""
    parser = make_parser()
    given = parser.parse_args(words)
    recipe: str | None = given.recipe
    parser.set_defaults(**defaults(recipe, given.model, given.task, given.inputs))

    values = vars(parser.parse_args(words))
    del values["recipe"]
    start: str = values.pop("start")
    return Settings(**values), recipe, start


# ---------------------------------------------------------------- what is done


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do it, and turn a user's mistake into one line and status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be UTF-8
    words = sys.argv[1:] if argv is None else argv
    with REQUESTS.listening():
        try:
            _do(words)
        except (Exception, KeyboardInterrupt) as error:
            explained = explain(error)
            if explained is None:
                raise
            status, text = explained
            print(printable(f"{_who()}: {' '.join(text.split())}"), file=sys.stderr)
            return status
    return 0


def _do(words: Sequence[str]) -> None:
    if words[:1] == ["predict"]:
        parser = predict_flags(Parser("train predict", usage=PREDICT_USAGE))
        _predict(vars(parser.parse_args(words[1:])))
        return

    if words[:1] == ["look"]:
        look(words[1:])
        return

    settings, recipe, start = parse(words)
    settings.check_out()
    found = open_set_of(settings)
    stages = plan(settings, found, recipe, start)
    device = ranks.join()
    if len(stages) > 1:  # what ends the last one is told before the first
        last = make_setup(stages[-1].settings, device, found)
        fingerprint = last.train_set.fingerprint
        ranks.broadcast_from_first(lambda: check_run_there(last.settings, fingerprint))
    for k, stage in enumerate(stages):
        is_done = ranks.broadcast_from_first(stage.is_done)
        if len(stages) > 1 and ranks.RANK == 0:
            what = f"{stage.settings.task} in {stage.settings.out}"
            log(f"stage {k + 1} of {len(stages)}: {what}{' is done' if is_done else ''}")
        if not is_done:
            train_and_report(stage.settings, found)


def look(words: Sequence[str]) -> None:
    """Draw what augmentation does with these settings. Raises UserError, CannotWrite."""
    values = vars(look_parser().parse_args(words))
    picture: str = os.path.expanduser(values.pop("picture"))
    settings = Settings(**values)
    if not picture.endswith(".png"):
        raise UserError(f"{picture!r} is no name for the page", "Use one that ends in .png")
    found = open_set_of(settings)
    try:
        page = augmentations_png(settings, found)
    except ModuleNotFoundError as error:
        install = "Install the extra show: pip install 'nyuv2-shards[show]'"
        raise UserError(f"no picture: {error.name} is not installed", install) from None
    write(Path(picture), page)
    print(picture)


def _predict(values: dict[str, Any]) -> None:
    if values.pop("needs"):
        print(shlex.join(_flags_of_set(needed_set(values["run"], ""))))
    else:
        predict(**values)


def train_and_report(settings: Settings, found: ShardSet | None = None) -> None:
    """A training, of a set that may be open already, then its pictures and tables.

    They go to the mirror with the rest. The run's directory is this process's until then.
    """
    with training(settings, found) as result:
        if ranks.RANK > 0:
            return
        files = report(result)
        n_more = result.n_trained or result.epochs
        again = command(result.setup.settings, epochs=result.epochs + n_more)
        print("continue:", again, flush=True)
        result.mirror.copy(*(path.name for path in files), wait_s=MIRROR_WAIT_S)


def command(settings: Settings, **changes: Any) -> str:
    """The command line of these settings, defaults left out."""
    # A run that is continued is shuffled as it was begun.
    values = {**asdict(settings), "reset": False, "shuffle": AUTO_SHUFFLE, **changes}
    words = ["python", "-m", "train"]
    for each in fields(settings):
        value = values[each.name]
        if value == each.default:
            continue
        for one in value if isinstance(value, tuple) else [value]:
            words.append(flag_of(each.name))
            if one is not True:
                words.append(str(one))
    return shlex.join(words)


# ---------------------------------------------------------------- what went wrong


def explain(error: BaseException) -> tuple[int, str] | None:
    """The exit status and the line for an error; None for one that is a fault of this program.

    2: a user's mistake, or a machine too small. 130: stopped. 1: another process was lost.
    """
    if isinstance(error, UserError):
        return 2, with_command(error)
    if isinstance(error, Stopped):
        return 130, f"{error}; the same command continues there"
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped; the same command continues from the last checkpoint"
    if isinstance(error, NoRoom):
        return 2, f"{error} (--batch-size)"
    if isinstance(error, MemoryError):
        return 2, FULL_MEMORY
    if isinstance(error, OSError):
        return 2, f"{error}. {SAME_COMMAND}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return 2, FULL_GPU
    if isinstance(error, RuntimeError):
        return _explain_torch(error)
    return None


def _explain_torch(error: RuntimeError) -> tuple[int, str] | None:
    """Errors of torch are told apart by their texts, or by where they come from."""
    if ranks.is_lost(error):
        return 1, f"lost another rank ({one_line(error)}). Run the same command again to continue"
    if "allocate memory" in str(error):  # on a CPU
        return 2, FULL_MEMORY
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 2, f"--compile failed ({one_line(error)}). Run the same command without it"
    return None


def _who() -> str:
    if ranks.WORLD == 1:
        return "train"
    return f"train: rank {ranks.RANK} of {ranks.WORLD}"


def _after_missing(error: MissingSet) -> str:
    return "" if error.right else command_that_makes(str(error.path))


def _after_missing_field(error: MissingField) -> str:
    return f"Run: make convert ARGS='--fields {','.join((*error.fields, error.field))}'"


def _after_remote(error: RemoteSet) -> str:
    drive = shlex.quote(str(Path(str(error.path)).parent))
    return f"Run: make pull DRIVE={drive} (or insist: --allow-remote)"


def _flags_of_set(needed: NeedsSet) -> list[str]:
    """With which a set that a run is asked about is converted, whatever of it is unreadable."""
    fields = [flag_of("fields"), needed.fields] if needed.fields else []
    return [flag_of("size"), str(needed.size), *fields, flag_of("max_failed"), "1"]


def _after_images(error: NeedsSet) -> str:
    root = str(Path(error.runs[0], "images"))
    words = shlex.join([error.images, "--out", root, *_flags_of_set(error)])
    ask = f'python -m train predict {shlex.join(error.runs)} --data "$set"'
    return f"Run: set=$(python -m convert run {words}) && {ask}"


def _after_unpacking(error: CannotUnpack) -> str:
    words = ["python", "-m", "shards.copy", str(error.path), str(error.root)]
    return f"To see it again: {shlex.join(words)}"


# What to run after an error of the library, which itself knows no commands: the first that fits.
COMMANDS: tuple[tuple[type[UserError], Callable[[Any], str]], ...] = (
    (UnfinishedSet, lambda error: "Run: make convert"),
    (MissingSet, _after_missing),
    (SeveralSets, lambda error: f"With make: DATA={error.found[0]}"),
    (OldSet, lambda error: f"Run: {upgrade_commands(error)}"),
    (DamagedSet, lambda error: "Run: make convert ARGS=--repair, or make pull"),
    (MissingField, _after_missing_field),
    (CacheInUse, lambda error: "With this command: another --cache"),
    (Busy, lambda error: "Wait for it, or use another --out"),
    (RemoteSet, _after_remote),
    (CannotUnpack, _after_unpacking),
    (WrongPlace, lambda error: "" if error.right else "Use another --out"),
    (NeedsSet, _after_images),
    (NoCheckpoint, lambda error: f"Run: make train RUN={error.run}"),
    (WrongCheckpoint, lambda error: f"Run: make train RUN={error.run} ARGS=--reset"),
    (CannotWrite, lambda error: "Then run the same command again"),
)


def with_command(error: UserError) -> str:
    """The error's text, with settings as flags, and the command to run next where there is one."""
    text = error.told(as_flag)
    for kind, command_after in COMMANDS:
        if isinstance(error, kind):
            return ". ".join(filter(None, [text, command_after(error)]))
    return text


if __name__ == "__main__":
    sys.exit(main())
