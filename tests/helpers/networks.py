"""Small networks for --model: no BatchNorm, no dropout; some of them end their process."""

import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """Pictures to 8x8, two layers."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4 * 64, 16), nn.Tanh(), nn.Linear(16, n_out))

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.head(
            nn.functional.adaptive_avg_pool2d(torch.cat((rgb, depth), 1), 8).flatten(1)
        )


class Pixels(nn.Module):
    """A class a pixel, from the colours and the depth of that pixel."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, n_out, 1)

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        return self.head(torch.cat((rgb, depth), 1))


class Normed(Plain):
    """With BatchNorm and dropout, as the real one; killed KILL_AFTER_S after the first step began."""

    def __init__(self, n_out: int) -> None:
        super().__init__(n_out)
        self.head = nn.Sequential(nn.BatchNorm1d(4 * 64), nn.Dropout(0.2), self.head)
        self.timer = threading.Timer(float(os.environ.get("KILL_AFTER_S", "inf")), kill)
        self.timer.daemon = True

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        if self.training and "KILL_AFTER_S" in os.environ and self.timer.ident is None:
            self.timer.start()
        return super().forward(rgb, depth)


class Slow(Normed):
    """Writes the file TRAINING in its seventh step, of the second epoch, and takes SLEEP_S for that
    and the three after it; writes the file EVALUATING, then takes EVAL_SLEEP_S, a batch of the
    evaluation.
    """

    steps = 0

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        self.steps += self.training
        if not self.training and "EVALUATING" in os.environ and len(rgb) > 2:
            Path(os.environ["EVALUATING"]).touch()
            time.sleep(float(os.environ.get("EVAL_SLEEP_S", 0)))
        elif self.training and "TRAINING" in os.environ and self.steps in range(7, 11):
            Path(os.environ["TRAINING"]).touch()
            time.sleep(float(os.environ["SLEEP_S"]))
        return super().forward(rgb, depth)


class Always(nn.Module):
    """Names the class ALWAYS, whatever it sees; a class a pixel where PIXELS is set."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(
            100.0 * nn.functional.one_hot(torch.tensor(int(os.environ["ALWAYS"])), n_out)
        )

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        shape = (len(rgb), len(self.bias), *(rgb.shape[-2:] if "PIXELS" in os.environ else ()))
        return self.bias.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)


class Mortal(Plain):
    """The second rank is killed in its third step."""

    steps = 0

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        self.steps += 1
        if self.steps == 3 and os.environ.get("RANK") == "1":
            kill()
        return super().forward(rgb, depth)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Asking(Plain):
    """The first rank is asked to end, as by a scheduler, in its step ASK_TO_END_IN_STEP."""

    steps = 0

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        self.steps += self.training
        is_first = os.environ.get("RANK", "0") == "0"
        if self.training and is_first and str(self.steps) == os.environ.get("ASK_TO_END_IN_STEP"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(rgb, depth)
