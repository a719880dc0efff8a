"""channels_last only where no kernel of oneDNN writes beyond its memory in it (uxlfoundation/oneDNN
6035).
"""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.commands import Run
from torch import nn

from train.job import make_setup, new_run
from train.model import TwoStreamResNet, compiled, layout_for, overruns
from train.settings import Settings

LAST, PLAIN, CPU = torch.channels_last, torch.contiguous_format, torch.device("cpu")


@pytest.mark.parametrize(
    ("width", "layout"),
    [
        (4, PLAIN),
        (8, PLAIN),
        (12, PLAIN),
        (15, PLAIN),
        (16, LAST),
        (17, PLAIN),
        (24, PLAIN),
        (32, LAST),
    ],
)
def test_the_built_in_network_is_in_channels_last_where_its_channels_are_whole_blocks_or_many(
    width: int, layout: torch.memory_format, small_set: Path
) -> None:
    setup = make_setup(Settings(str(small_set), "", width=width, size=32), CPU)
    run = new_run(setup)
    weight = run.model.rgb.layer1[0].conv1.weight
    assert run.layout is layout
    assert weight.is_contiguous(memory_format=layout)


def test_on_a_gpu_every_width_keeps_it() -> None:
    assert layout_for(TwoStreamResNet(10, width=8), torch.device("cuda")) is LAST


@pytest.mark.parametrize(
    ("layer", "is_unsafe"),
    [
        (nn.Conv2d(8, 16, 1, 2), True),
        (nn.Conv2d(15, 16, 1, (1, 2)), True),
        (nn.Conv2d(32, 64, 1, 2, groups=4), True),
        (
            nn.ConvTranspose2d(64, 8, 1, 2),
            True,
        ),  # its weights' gradient is that of a convolution from 8 to 64
        (nn.Conv2d(17, 32, 1, 2), True),  # a margin: it was seen to stay inside
        (nn.Conv2d(16, 32, 1, 2), False),
        (nn.Conv2d(33, 64, 1, 2), False),
        (nn.Conv2d(64, 64, 1, 2, groups=4), False),
        (nn.Conv2d(8, 16, 1), False),
        (nn.Conv2d(8, 16, 3, 2), False),
        (nn.Linear(8, 16), False),
    ],
)
def test_strided_1x1_convolutions_of_few_channels_are_found_in_any_network(
    layer: nn.Module, is_unsafe: bool
) -> None:
    assert overruns(layer) is is_unsafe
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ModuleDict({"inside": layer}))
    assert (layout_for(network, CPU) is PLAIN) is is_unsafe


def test_compiling_leaves_an_unsafe_network_in_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(torch, "compile", lambda net, options: given.append(options))
    compiled(TwoStreamResNet(10, width=8))
    compiled(TwoStreamResNet(10, width=16))
    assert given == [{"layout_optimization": False}, None]


@pytest.mark.stress
def test_width_8_trains_at_224_pixels(small_set: Path, tmp_path: Path, command: Run) -> None:
    flags = [
        "--width",
        8,
        "--size",
        224,
        "--batch-size",
        16,
        "--epochs",
        1,
        "--inputs",
        "rgb",
        "--num-workers",
        0,
    ]
    done = command("train", "--data", small_set, "--out", tmp_path / "run", *flags)
    assert done.returncode == 0, (done.returncode, done.stderr)
