"""ResNet-18 as a trunk; parameter names as in the standard checkpoints."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from train.networks.trunk import Trunk, mean_over_rgb

# The name ends in the first 8 digits of the file's SHA-256.
IMAGENET = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or n_in != n_out:
            projection = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(n_out))

    def forward(self, x_bchw: Tensor) -> Tensor:
        """[B, n_in, H, W] -> [B, n_out, H / stride, W / stride]."""
        shortcut = x_bchw if self.downsample is None else self.downsample(x_bchw)
        y_bchw = torch.relu_(self.bn1(self.conv1(x_bchw)))
        return torch.relu_(self.bn2(self.conv2(y_bchw)) + shortcut)


class ResNetTrunk(Trunk):
    """ResNet-18 without its classifier.

    [B, n_in, H, W] -> features at 1/4, 1/8, 1/16 and 1/32 of the resolution. width: channels of the
    first layer; 64 is the standard size, 11.18 M parameters.
    """

    name = "resnet18"
    stem = "conv1.weight"
    classifier = "fc."

    def __init__(self, n_in: int, width: int) -> None:
        super().__init__(widths=(width, 2 * width, 4 * width, 8 * width))
        self.conv1 = nn.Conv2d(n_in, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, stride=2)

    @staticmethod
    def _stage(n_in: int, n_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(n_in, n_out, stride), BasicBlock(n_out, n_out))

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        """One feature map a stage, width to 8 * width channels."""
        stem = self.maxpool(torch.relu_(self.bn1(self.conv1(x_bchw))))
        stage1 = self.layer1(stem)
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        stage4 = self.layer4(stage3)
        return [stage1, stage2, stage3, stage4]

    def layers_of(self, n_maps: int) -> Sequence[nn.Module]:
        """The stem and a stage each."""
        if n_maps == 0:
            return []
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        return [self.conv1, self.bn1, *stages[:n_maps]]

    def imagenet(self) -> Mapping[str, Tensor]:
        """Fetched once, its hash checked. Raises what fetching raises."""
        return torch.hub.load_state_dict_from_url(
            IMAGENET, map_location="cpu", check_hash=True, weights_only=True
        )

    def stem_for(self, n_planes: int, rgb_stem: Tensor) -> Tensor:
        """The mean over RGB."""
        return mean_over_rgb(n_planes, rgb_stem)
