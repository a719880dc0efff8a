"""Trunks side by side, a field each, joined after pooling or by a light decoder."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.networks.resnet import ResNetTrunk
from train.networks.trunk import Trunk, init_convolutions


class StreamNetwork(nn.Module):
    """A trunk for each of `streams`, then pooled features -> dropout -> fc, or (dense) the decoder.

    trunks: by the field that each sees, in the order of the pictures; with as many maps each.
    n_out: classes, or 1 for depth. dense: an answer a pixel. n_decoder: channels inside the
    decoder.
    """

    def __init__(
        self, trunks: Mapping[str, Trunk], n_out: int, *, dense: bool = False, n_decoder: int = 128
    ) -> None:
        super().__init__()
        self.streams = tuple(map(stream_of, trunks))
        self.dense = dense
        for stream, trunk in zip(self.streams, trunks.values(), strict=True):
            self.add_module(stream, trunk)

        maps = zip(*(trunk.widths for trunk in trunks.values()), strict=True)
        widths = [sum(of_streams) for of_streams in maps]
        if dense:
            self.decoder = Decoder(widths, n_decoder, n_out)
        else:
            self.dropout = nn.Dropout(0.5)
            self.fc = nn.Linear(widths[-1], n_out)

        for trunk in trunks.values():
            trunk.init_weights()
        if dense:
            init_convolutions(self.decoder)
            nn.init.zeros_(self.decoder.head.weight)

    def forward(self, *pictures_bchw: Tensor) -> Tensor:
        """A picture of each stream, [B, its planes, H, W] -> logits.

        [B, n_out]; dense ones [B, n_out, h, w] at the resolution of the finest map, mostly a
        quarter.
        """
        pairs = zip(self.streams, pictures_bchw, strict=True)
        features = [self.get_submodule(stream)(picture) for stream, picture in pairs]
        stages = [torch.cat(maps, dim=1) for maps in zip(*features, strict=True)]
        if self.dense:
            logits: Tensor = self.decoder(stages)
            return logits
        pooled_bc = stages[-1].mean(dim=(2, 3))
        logits = self.fc(self.dropout(pooled_bc))
        return logits

    def trunk(self, stream: str) -> Trunk:
        """Of one of `streams`."""
        found = self.get_submodule(stream)
        assert isinstance(found, Trunk)
        return found

    def trunks(self) -> list[Trunk]:
        """In the order of `streams`."""
        return [self.trunk(stream) for stream in self.streams]


class TwoStreamResNet(StreamNetwork):
    """Of ResNet-18 trunks, 11.18 M parameters each at width 64; half the width has a quarter.

    planes: of each field that it sees, in their order; None: RGB and plain depth. Dense answers are
    at a quarter of the resolution.
    """

    def __init__(
        self,
        n_out: int,
        *,
        width: int = 64,
        planes: Mapping[str, int] | None = None,
        dense: bool = False,
    ) -> None:
        planes = planes or {"rgb": 3, "depth": 1}
        trunks = {field: ResNetTrunk(n_planes, width) for field, n_planes in planes.items()}
        super().__init__(trunks, n_out, dense=dense, n_decoder=2 * width)


def stream_of(field: str) -> str:
    """What the trunk that sees a field is called in a network, where "training" is not free."""
    return field if field in ("rgb", "depth") else f"field_{field}"


class Decoder(nn.Module):
    """A feature pyramid: each stage is enlarged and added to the next finer one.

    widths: channels of the stages, fine to coarse. n_channels: inside. Logits come at the
    resolution of the finest.
    """

    def __init__(self, widths: list[int], n_channels: int, n_out: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(n_in, n_channels, 1) for n_in in widths)
        self.smooth = nn.Sequential(
            nn.Conv2d(n_channels, n_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_channels),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(n_channels, n_out, 1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Feature maps, fine to coarse -> [B, n_out, h, w] as the finest."""
        y_bchw = self.lateral[-1](stages[-1])
        for k in reversed(range(len(stages) - 1)):
            size = stages[k].shape[-2:]
            larger = F.interpolate(y_bchw, size, mode="bilinear", align_corners=False)
            y_bchw = larger + self.lateral[k](stages[k])
        logits: Tensor = self.head(self.smooth(y_bchw))
        return logits
