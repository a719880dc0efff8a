"""What a network is made of, one for each field that it sees: planes in, feature maps out.

    picture [B, n_planes, H, W] -> Trunk -> maps, fine to coarse, [B, widths[k], h, w] each

A further kind of trunk says its widths, which layers its maps come from, the names of its first and
last layers in the checkpoints that are usual for it, and where its ImageNet weights come from.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Trunk(nn.Module):
    """A network without its classifier.

    widths: channels of the feature maps, fine to coarse. The head for whole pictures sees the mean
    over the coarsest one; the decoder of dense tasks sees all of them.
    """

    name: str  # of the network, as the setting `model` says it
    # The first layer's weights, and what the names of the classifier's begin with: as they are
    # called in a standard checkpoint.
    stem: str
    classifier: str

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self._n_kept = 0  # maps

    def init_weights(self) -> None:
        """Fresh random weights of its convolutions."""
        init_convolutions(self)

    def freeze_norms(self) -> None:
        """BatchNorm uses the statistics that it has, and learns none; until the next `train()`."""
        for layer in self.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()

    def layers_of(self, n_maps: int) -> Sequence[nn.Module]:
        """Those that the first maps, fine to coarse, come from."""
        raise NotImplementedError

    def keep_layers_of(self, n_maps: int) -> None:
        """Those layers learn nothing from now on, and their BatchNorm uses the statistics that it
        has: no gradient goes through them, which is most of a step's time.
        """
        self._n_kept = n_maps
        for layer in self.layers_of(n_maps):
            layer.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As of any module; layers that are kept stay in evaluation mode."""
        super().train(mode)
        if self._n_kept:
            for layer in self.layers_of(self._n_kept):
                layer.eval()
        return self

    def imagenet(self) -> Mapping[str, Tensor]:
        """The standard checkpoint. What reading or fetching raises; UserError where the package
        that holds it is not installed.
        """
        raise NotImplementedError

    def load_imagenet(self) -> None:
        """Start from `imagenet`. Raises what that raises."""
        self.load_standard(self.imagenet())

    def load_own(self, state_dict: Mapping[str, Tensor]) -> None:
        """From a trunk like it. Raises RuntimeError naming missing, unknown or wrong keys."""
        # The oldest standard checkpoints have no counters of batches.
        own = self.state_dict()
        counters = {key: own[key] for key in own if key.endswith("num_batches_tracked")}
        self.load_state_dict(counters | dict(state_dict))

    def load_standard(self, state_dict: Mapping[str, Tensor]) -> None:
        """From a network that sees RGB; its classifier is left out. Raises as `load_own` does."""
        given = {
            key: value for key, value in state_dict.items() if not key.startswith(self.classifier)
        }
        n_planes = self.get_parameter(self.stem).shape[1]
        stem = given.get(self.stem)
        if stem is not None and stem.shape[1] != n_planes:
            given[self.stem] = self.stem_for(n_planes, stem)
        self.load_own(given)

    def stem_for(self, n_planes: int, rgb_stem: Tensor) -> Tensor:
        """First weights [C, 3, k, k] of RGB for other planes: [C, n_planes, k, k]."""
        raise NotImplementedError


def init_convolutions(module: nn.Module) -> None:
    """He's normal weights for all of them, by the number of their outputs."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def mean_over_rgb(n_planes: int, rgb_stem: Tensor) -> Tensor:
    """Each plane gets the mean over the colours: all of them are seen as one grey picture is."""
    mean = rgb_stem.mean(dim=1, keepdim=True)
    return mean.expand(-1, n_planes, -1, -1)


def colours_in_turn(n_planes: int, rgb_stem: Tensor) -> Tensor:
    """Plane k gets the weights of colour k % 3, together as strong as three are: what told colours
    apart tells the planes apart.
    """
    colours = torch.arange(n_planes) % rgb_stem.shape[1]
    return rgb_stem[:, colours] * (rgb_stem.shape[1] / n_planes)
