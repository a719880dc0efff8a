"""Networks for --model that are no answer to it."""

from typing import Any

import torch
from torch import Tensor, nn


class Right(nn.Module):
    """A class from the mean colours; the others change one thing in it."""

    n_more = 0

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.head = nn.Linear(4, n_out + self.n_more)

    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        return self.head(torch.cat((rgb, depth), 1).mean((2, 3)))


class Eleven(Right):
    n_more = 1


class OnlyRgb(Right):
    def forward(self, rgb: Tensor) -> Any:
        return self.head(rgb)


class Lazy(Right):
    def __init__(self, n_out: int) -> None:
        super().__init__(n_out)
        self.head = nn.LazyLinear(n_out)


class Pixelwise(Right):
    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        return super().forward(rgb, depth)[:, :, None, None]


class Whole(Right):
    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        return super().forward(rgb, depth).argmax(1, keepdim=True).expand(-1, 10)


class Pair(Right):
    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        return super().forward(rgb, depth), depth


class Cut(Right):
    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        return super().forward(rgb, depth).detach()


class NoArgument(Right):
    def __init__(self) -> None:
        super().__init__(10)


class Frozen(Right):
    def __init__(self, n_out: int) -> None:
        super().__init__(n_out)
        self.requires_grad_(False)


class Empty(nn.Module):
    def __init__(self, n_out: int) -> None:
        super().__init__()


class Turned(Right):
    """Changes the layout itself, before a convolution for which that is not safe."""

    def __init__(self, n_out: int) -> None:
        super().__init__(n_out)
        self.small = nn.Sequential(nn.Conv2d(4, 4, 1, 2))

    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        x = torch.cat((rgb, depth), 1).contiguous(memory_format=torch.channels_last)
        return self.head(self.small(x).mean((2, 3)))


class Normed(Right):
    """One value a channel where the batch has one row."""

    def __init__(self, n_out: int) -> None:
        super().__init__(n_out)
        self.head = nn.Sequential(self.head, nn.BatchNorm1d(n_out))


def breaks(n_out: int) -> nn.Module:
    raise KeyError("weights.pth")


def leaves(n_out: int) -> nn.Module:
    raise SystemExit("usage: wrong.py")
