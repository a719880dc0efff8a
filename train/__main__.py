"""python -m train: learn from a converted set; python -m train predict RUN: what a run says about other pictures."""

import argparse
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from loader.memory import NoRoom
from shards.format import UserError, one_line
from train import ranks
from train.loop import train
from train.settings import Settings, add_flags
from train.signals import REQUESTS, Stopped

EPILOG = """examples:
  python -m train --data data --out runs/scene
  python -m train --data data --out runs/parts --task semantic40 --batch-size 32
  python -m train --data data --out runs/pretrained --weights resnet18-f37072fd.pth --lr 3e-4
  torchrun --nproc-per-node 2 -m train --data data --out runs/two
  python -m train predict runs/scene --images photos

The same command again continues where it stopped."""

FULL_MEMORY = "the memory is full. Use a smaller --batch-size, --size or --width"


class Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: {message}. Run: python -m {self.prog} --help\n")


def make_parser() -> Parser:
    """The flags are the fields of Settings."""
    parser = Parser("train", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do it, and turn a user's mistake into one line and status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be UTF-8
    with REQUESTS.listening():
        return _do(sys.argv[1:] if argv is None else argv)


def _do(words: Sequence[str]) -> int:
    try:
        if words[:1] == ["predict"]:
            from train.predict import predict, predict_flags

            predict(**vars(predict_flags(Parser("train predict")).parse_args(words[1:])))
        else:
            train(Settings(**vars(make_parser().parse_args(words))))
        return 0
    except UserError as error:
        status, text = 2, str(error)
    except NoRoom as error:
        status, text = 2, f"{error} (--batch-size)"
    except MemoryError:
        status, text = 2, FULL_MEMORY
    except OSError as error:
        status, text = 2, f"{error}. What is saved is kept: mend that, then run the same command again"
    except torch.cuda.OutOfMemoryError:
        status, text = 2, "the GPU's memory is full. Use a smaller --batch-size"
    except Stopped as stop:
        status, text = 130, str(stop)
    except KeyboardInterrupt:
        status, text = 130, "stopped; the same command continues from the last checkpoint"
    except RuntimeError as error:
        if ranks.is_lost(error):
            status, text = 1, f"lost another rank ({one_line(error)}). Run the same command again to continue"
        elif "allocate memory" in str(error):  # of torch on a CPU
            status, text = 2, FULL_MEMORY
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            status, text = 2, f"--compile failed ({one_line(error)}). Run the same command without it"
        else:
            raise
    who = f"train: rank {ranks.RANK} of {ranks.WORLD}" if ranks.WORLD > 1 else "train"
    print(f"{who}: {' '.join(text.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
