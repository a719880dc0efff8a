"""python -m train: learn from a converted set; python -m train predict RUN: what a run says about other pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from convert.format import UserError
from train import ranks
from train.checkpoint import one_line
from train.loop import train
from train.settings import Settings, add_flags

EPILOG = """examples:
  python -m train --data data --out runs/scene
  python -m train --data data --out runs/parts --task semantic40 --batch-size 32
  python -m train --data data --out runs/pretrained --weights resnet18-f37072fd.pth --lr 3e-4
  torchrun --nproc-per-node 2 -m train --data data --out runs/two
  python -m train predict runs/scene --images photos

The same command again continues where it stopped."""


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. Run: python -m train --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The flags are the fields of Settings."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="train", description=__doc__, epilog=EPILOG, formatter_class=raw)
    add_flags(parser)
    return parser


def _predict(argv: Sequence[str]) -> None:
    from pictures.report import predict

    parser = _Parser(prog="train predict", description="On the test rows, or on a folder of pictures.")
    parser.add_argument("run", metavar="RUN", help="the --out of a run")
    parser.add_argument("--images", metavar="DIR", help="DIR/rgb/NAME.png or .jpg, DIR/depth/NAME.png (16 bit, mm)")
    parser.add_argument("--data", metavar="DIR|ROOT", help="where the run's set is now")
    parser.add_argument("--out", metavar="DIR", help="default: RUN/predict")
    predict(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and turn a user's mistake into one line and status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    who = f"train: rank {ranks.RANK} of {ranks.WORLD}" if ranks.WORLD > 1 else "train"
    try:
        _predict(words[1:]) if words[:1] == ["predict"] else train(Settings(**vars(make_parser().parse_args(words))))
        ranks.leave()
    except UserError as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError:
        print(f"{who}: the GPU's memory is full. Use a smaller --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{who}: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if ranks.WORLD == 1 or not ranks.is_lost(error):
            raise
        print(f"{who}: lost another rank ({one_line(error)}). Run the same command again to continue", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
