"""python -m train: scene classification from a converted set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from convert.format import UserError
from train.checkpoint import Settings
from train.loop import train

EPILOG = """examples:
  python -m train --data data --out runs/scene
  python -m train --data data --out runs/quick --epochs 5 --size 64 --batch-size 32
  python -m train --data data --out runs/pretrained --weights resnet18.pth --lr 3e-4
  python -m train --data data --out runs/mine --model my_models:make

The same command again continues where it stopped. In --out: last.pt, metrics.csv, curves.png, confusion.png."""


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. Run: python -m train --help\n")


def _workers(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="DIR|ROOT", help="a converted set, or a directory that holds exactly one")
    add("--out", required=True, metavar="RUN", help="directory of this run; a run found there is continued")
    add("--task", default="scene", choices=["scene"], help="what to learn")
    add("--num-classes", type=int, default=13, choices=[10, 13, 27], help="which scene classes")
    add("--size", type=int, default=128, help="training resolution, 0 = as stored")
    add("--num-workers", type=_workers, default="auto", metavar="N|auto", help="loader processes")
    add("--mirror", metavar="DIR", help="copy the checkpoint there now and then, and start from it (such as a Drive)")
    add("--reset", action="store_true", help="forget the checkpoints in --out and start over")


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=int, default=90, help="passes over the train rows")
    add("--batch-size", type=int, default=128, help="rows a step")
    add("--model", default="resnet18", metavar="NAME", help="resnet18, or package.module:callable(num_classes)")
    add("--width", type=int, default=0, help="channels of the first layer, 0 = 64 with --weights, else 32")
    add("--weights", metavar="FILE", help="ResNet-18 ImageNet state_dict, for both streams")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.05, help="of AdamW, on weights but not on biases and norms")
    add("--warmup-epochs", type=int, default=5, help="rising learning rate, a quarter of --epochs at most")
    add("--label-smoothing", type=float, default=0.1, help="share of the target spread over all classes")
    add("--class-balance", type=float, default=0.0, help="loss weight = class frequency ** -X, 0 = off, 1 = full")
    add("--seed", type=int, default=0, help="of everything random")


def make_parser() -> argparse.ArgumentParser:
    """The flags are the fields of Settings; a test can compare the two."""
    parser = _Parser(
        prog="train",
        description="Train a two-stream RGB-D network on a converted set.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data(parser)
    _add_training(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and turn a user's mistake into one line and status 2."""
    settings = Settings(**vars(make_parser().parse_args(argv)))
    try:
        train(settings)
    except UserError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        print(
            f"train: the GPU's memory is full. Use a smaller --batch-size than {settings.batch_size}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("train: stopped; finished epochs are kept, the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
