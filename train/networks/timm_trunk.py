"""Any backbone of timm as a trunk (extra `timm`), by its name there.

    whole pictures   the network with its own pooling     -> one map of 1x1
    dense            its `features_only`                  -> maps from 1/4 of the resolution on

timm itself fits the first layer to the number of planes, and the pictures' size where a network has
a fixed one; its weights are read by it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError, how_to_install, one_line
from train.augment import IMAGENET_SCALING, Scaling
from train.errors import WrongNetwork
from train.networks.trunk import Trunk
from train.settings import TIMM

FINEST = 4  # pixels of the picture a pixel of the finest map that the decoder sees


def imported(spec: str) -> ModuleType:
    """timm. Raises WrongNetwork where it, or torchvision, which it imports, is not there."""
    try:
        import timm
    except ModuleNotFoundError as error:
        how = how_to_install("timm", "timm")
        raise WrongNetwork(spec, f": {error.name} is not installed", how) from error
    except Exception as error:  # torchvision of another torch
        how = "Install the torchvision that fits this torch"
        raise WrongNetwork(spec, f": timm does not load: {one_line(error)}", how) from error
    return timm


def config_of(spec: str) -> Any:
    """What timm says of the weights that it has for this name. Raises WrongNetwork."""
    timm = imported(spec)
    name = spec.removeprefix(TIMM)
    if not timm.is_model(name):
        raise WrongNetwork(spec, f": timm {timm.__version__} has no network {name!r}")
    return timm.get_pretrained_cfg(name)


def scaling_of(spec: str) -> Scaling:
    """How it wants its colours: as its weights were trained. Raises WrongNetwork."""
    config = config_of(spec)
    if config is None or len(config.mean) != 3:
        return IMAGENET_SCALING
    return Scaling(mean=tuple(config.mean), std=tuple(config.std))


def synchronized(spec: str, model: nn.Module) -> nn.Module:
    """BatchNorm as that of all ranks together. torch's own function would lose the activations that
    timm's norms have inside them.
    """
    converted: nn.Module = imported(spec).layers.convert_sync_batchnorm(model)
    return converted


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a network is made for: n_in planes of size x size; dense: an answer a pixel."""

    n_in: int
    dense: bool
    size: int


class TimmTrunk(Trunk):
    """[B, n_in, size, size] -> maps, fine to coarse; of whole pictures one of 1x1.

    spec: "timm:NAME". Raises WrongNetwork where timm has no such network, or none for this use.
    """

    classifier = ""

    def __init__(self, spec: str, use: Use) -> None:
        try:
            net = _create(spec, use)
            maps = _maps_of(net, torch.zeros(1, use.n_in, use.size, use.size))
        except UserError:
            raise
        except Exception as error:  # of timm: no feature maps, pictures too small, ...
            raise WrongNetwork(spec, f": {one_line(error)}") from error
        super().__init__(widths=tuple(each.shape[1] for each in maps))
        self.name = spec
        self.use = use
        self.net = net

    def forward(self, x_bchw: Tensor) -> list[Tensor]:
        """As many maps as `widths`."""
        return _chosen(self.net, self.net(x_bchw))

    def init_weights(self) -> None:
        """As timm made them."""

    def load_imagenet(self) -> None:
        """The weights that timm has for this name, fetched by it. Raises what that raises."""
        self._load()

    def load_standard(self, state_dict: Mapping[str, Any]) -> None:
        """From a checkpoint of this network, as timm stores it. Raises what timm raises, and
        ValueError where it is of another one.
        """
        given = state_dict.get("state_dict", state_dict)  # of timm's own training script
        self._load(pretrained_cfg_overlay={"state_dict": dict(given)})

    def _load(self, **source: Any) -> None:
        """Raises ValueError where timm leaves a layer as it was: it says so in its log alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = _create(self.name, self.use)
            torch.manual_seed(0)
            found = _create(self.name, self.use, pretrained=True, **source)
        drawn = dict(fresh.named_parameters())
        for key, parameter in found.named_parameters():
            if _is_random(parameter) and torch.equal(parameter, drawn[key]):
                raise ValueError(f"they have no {key} for it")
        self.net.load_state_dict(found.state_dict())


def _is_random(parameter: nn.Parameter) -> bool:
    """Whether its fresh values were drawn: no norm's or bias's, no fixed table of positions."""
    is_learnt_matrix = parameter.requires_grad and parameter.ndim > 1
    return is_learnt_matrix and float(parameter.detach().std()) > 0


def _create(spec: str, use: Use, **pretrained: Any) -> nn.Module:
    """What timm makes of a name. Raises WrongNetwork, and whatever timm raises."""
    config = config_of(spec)
    shape: dict[str, Any] = {"features_only": True} if use.dense else {"num_classes": 0}
    if config is not None and config.fixed_input_size and config.input_size[-1] != use.size:
        shape["img_size"] = use.size
    name = spec.removeprefix(TIMM)
    net = imported(spec).create_model(name, in_chans=use.n_in, **shape, **pretrained)
    assert isinstance(net, nn.Module)
    return net


@torch.no_grad()
def _maps_of(net: nn.Module, picture: Tensor) -> list[Tensor]:
    """Asked in evaluation mode, which leaves the network as it is."""
    net.eval()
    maps = _chosen(net, net(picture))
    net.train()
    return maps


def _chosen(net: nn.Module, answer: Tensor | list[Tensor]) -> list[Tensor]:
    """What it answers as maps [B, C, h, w], without those that are finer than the decoder needs."""
    if isinstance(answer, Tensor):
        return [answer[:, :, None, None]]
    info: Any = net.feature_info
    channels = info.channels()
    maps = []
    for k, reduction in enumerate(info.reduction()):
        if reduction < FINEST:
            continue
        is_channels_first = answer[k].shape[1] == channels[k]
        maps.append(answer[k] if is_channels_first else answer[k].permute(0, 3, 1, 2))
    return maps
