"""A two-stream RGB-D ResNet-18: one standard ResNet-18 trunk a picture, joined after pooling."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from convert.format import UserError


def _conv3x3(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; parameter names as in the standard checkpoints."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(n_in, n_out, stride)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = _conv3x3(n_out, n_out)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x_bchw: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H / stride, W / stride]."""
        shortcut = x_bchw if self.downsample is None else self.downsample(x_bchw)
        y: Tensor = self.relu(self.bn1(self.conv1(x_bchw)))
        y = self.bn2(self.conv2(y)) + shortcut
        return torch.relu_(y)


def _stage(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(n_in, n_out, stride), BasicBlock(n_out, n_out))


class ResNetTrunk(nn.Module):
    """ResNet-18 without its classifier: [B, n_in, H, W] -> [B, 8 * width] pooled features."""

    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)

    def forward(self, x_bchw: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, 8 * width]."""
        x_bchw = self.maxpool(self.relu(self.bn1(self.conv1(x_bchw))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x_bchw = stage(x_bchw)
        return x_bchw.mean(dim=(2, 3))


class TwoStreamResNet(nn.Module):
    """RGB and depth trunks side by side, their pooled features -> dropout -> fc.

    Width 64 is the standard size, 11.18 M parameters a stream; half the width has a quarter of them.
    """

    def __init__(self, num_classes: int, *, width: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        self.rgb = ResNetTrunk(3, width)
        self.depth = ResNetTrunk(1, width)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, rgb_bchw: Tensor, depth_b1hw: Tensor) -> Tensor:
        """[B, 3, H, W] and [B, 1, H, W] -> logits [B, num_classes]."""
        features = torch.cat((self.rgb(rgb_bchw), self.depth(depth_b1hw)), dim=1)
        logits: Tensor = self.fc(self.dropout(features))
        return logits


def _check_keys(trunk: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming what differs; batch counters may be missing (the oldest checkpoints have none)."""
    expected = trunk.state_dict()
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in expected]
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    parts = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    found = [f"{name}: {', '.join(keys[:8])} ({len(keys)} in all)" for name, keys in parts.items() if keys]
    if found:
        raise ValueError("not the weights of a ResNet-18 of this width; keys " + "; keys ".join(found))


def load_imagenet(model: TwoStreamResNet, state_dict: Mapping[str, Tensor]) -> None:
    """Load a standard ResNet-18 checkpoint into both streams; the depth stem is the mean over the RGB channels.

    The classifier (fc.*) is left as it is. Raises ValueError naming missing, unknown or wrongly shaped keys.
    """
    given = {key: value for key, value in state_dict.items() if not key.startswith("fc.")}
    _check_keys(model.rgb, given)
    model.rgb.load_state_dict(given, strict=False)
    given["conv1.weight"] = given["conv1.weight"].mean(dim=1, keepdim=True)
    model.depth.load_state_dict(given, strict=False)


def build(spec: str, num_classes: int, *, width: int = 64) -> nn.Module:
    """The default "resnet18", or the module that `package.module:callable` returns for num_classes."""
    if spec == "resnet18":
        return TwoStreamResNet(num_classes, width=width)
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UserError(f"--model {spec}: expected resnet18 or package.module:callable, such as my_models:make")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--model {spec}: {error}. Run from the folder that holds {module_name}, or install it"
        ) from error
    model = factory(num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"--model {spec} returned {type(model).__name__}, expected a torch.nn.Module taking (rgb, depth)"
        )
    return model
