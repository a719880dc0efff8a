"""The network: standard parameter names, and ImageNet weights in both streams."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from conftest import REPO
from torch import Tensor, nn

from shards.errors import UserError
from shards.files import sha256_file
from train.model import TwoStreamResNet, build, load_trunks, read_weights

STAGES = ((1, 64, 64), (2, 64, 128), (3, 128, 256), (4, 256, 512))


def standard_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a standard ResNet-18 checkpoint without batch counters and fc, written out
    on their own.
    """
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    norms = {"bn1": 64}
    for stage, n_in, n_out in STAGES:
        for block in (0, 1):
            prefix = f"layer{stage}.{block}"
            shapes[f"{prefix}.conv1.weight"] = (n_out, n_out if block else n_in, 3, 3)
            shapes[f"{prefix}.conv2.weight"] = (n_out, n_out, 3, 3)
            norms |= {f"{prefix}.bn1": n_out, f"{prefix}.bn2": n_out}
        if stage > 1:
            shapes[f"layer{stage}.0.downsample.0.weight"] = (n_out, n_in, 1, 1)
            norms[f"layer{stage}.0.downsample.1"] = n_out
    for name, n in norms.items():
        shapes |= {
            f"{name}.{part}": (n,) for part in ("weight", "bias", "running_mean", "running_var")
        }
    return shapes


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(shape, generator=generator) for name, shape in standard_shapes().items()
    }
    return state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def test_stream_parameters_are_named_and_counted_as_in_the_standard_checkpoint() -> None:
    trunk = TwoStreamResNet(13).rgb
    own = {
        key: tuple(value.shape)
        for key, value in trunk.state_dict().items()
        if "num_batches" not in key
    }
    assert own == standard_shapes()
    assert sum(p.numel() for p in trunk.parameters()) == 11_176_512


@pytest.mark.parametrize("n_planes", [1, 5])
def test_both_streams_get_the_checkpoint_and_the_depth_stem_its_mean(
    checkpoint: dict[str, Tensor], n_planes: int
) -> None:
    model = TwoStreamResNet(13, planes={"rgb": 3, "depth": n_planes})
    head = model.fc.weight.clone()
    load_trunks(model, checkpoint)
    for key in standard_shapes():
        assert torch.equal(model.rgb.state_dict()[key], checkpoint[key]), key
        if key != "conv1.weight":
            assert torch.equal(model.depth.state_dict()[key], checkpoint[key]), key
    stem = model.depth.conv1.weight
    assert torch.equal(stem, checkpoint["conv1.weight"].mean(1, keepdim=True).expand_as(stem))
    assert stem.shape[1] == n_planes
    assert torch.equal(model.fc.weight, head)


def test_a_new_task_starts_from_the_trunks_of_another_run() -> None:
    parts, scenes = TwoStreamResNet(40, width=8, dense=True), TwoStreamResNet(13, width=8)
    head = {
        key: value.clone() for key, value in scenes.state_dict().items() if key.startswith("fc.")
    }
    load_trunks(scenes, parts.state_dict())
    for key, value in scenes.state_dict().items():
        assert torch.equal(value, head[key] if key in head else parts.state_dict()[key]), key
    rgb = TwoStreamResNet(13, width=8, planes={"rgb": 3})
    load_trunks(rgb, parts.state_dict())
    assert torch.equal(rgb.rgb.conv1.weight, parts.rgb.conv1.weight)
    with pytest.raises(RuntimeError, match=r"Missing.*conv1"):
        load_trunks(scenes, rgb.state_dict())


def test_a_checkpoint_that_does_not_fit_is_refused_by_key(checkpoint: dict[str, Tensor]) -> None:
    model = TwoStreamResNet(13)
    lacking = {key: value for key, value in checkpoint.items() if key != "layer3.0.conv2.weight"}
    with pytest.raises(RuntimeError, match=r"Missing.*layer3\.0\.conv2\.weight"):
        load_trunks(model, lacking)
    with pytest.raises(RuntimeError, match=r"Unexpected.*layer1\.0\.conv3\.weight"):
        load_trunks(model, checkpoint | {"layer1.0.conv3.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for bn1\.weight"):
        load_trunks(TwoStreamResNet(13, width=32), checkpoint)


def test_logits_depend_on_both_streams() -> None:
    torch.manual_seed(0)
    model = TwoStreamResNet(10, width=8).eval()
    rgb, depth = torch.randn(2, 3, 64, 64), torch.randn(2, 1, 64, 64)
    logits = model(rgb, depth)
    assert logits.shape == (2, 10)
    assert not torch.equal(model(rgb + 1, depth), logits)
    assert not torch.equal(model(rgb, depth + 1), logits)


def test_build_takes_a_callable_by_name_and_refuses_others() -> None:
    assert isinstance(build("resnet18", 13, width=8), TwoStreamResNet)
    assert isinstance(build("torch.nn:BatchNorm2d", 13), nn.Module)
    for spec, reason in (
        ("resnet50", "expected resnet18, lite0, timm:NAME or package"),
        ("no_such_module:make", "No module named"),
        ("train.model:nothing", "has no attribute"),
        ("my network", "expected resnet18, lite0, timm:NAME or package"),
        ("torch", "returned module"),
        ("builtins:range", r"returned range, expected a torch\.nn\.Module"),
    ):
        with pytest.raises(UserError, match=reason):
            build(spec, 13)


def test_a_hash_in_the_name_of_the_weights_is_checked(
    checkpoint: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(checkpoint, tmp_path / "plain.pth")
    digest = sha256_file(tmp_path / "plain.pth")[:8]
    good, bad = tmp_path / f"resnet18-{digest}.pth", tmp_path / "resnet18-f37072fd.pth"
    for path in (good, bad):
        shutil.copy(tmp_path / "plain.pth", path)
    assert (
        read_weights(str(good)).keys()
        == read_weights(str(tmp_path / "plain.pth")).keys()
        == checkpoint.keys()
    )
    with pytest.raises(ValueError, match=f"f37072fd.*{digest}"):
        read_weights(str(bad))


@pytest.mark.parametrize("fields", ["rgb depth", "rgb", "depth", "rgb depth training"])
def test_a_dense_network_answers_at_a_quarter_of_the_resolution(fields: str) -> None:
    planes = {name: 3 if name == "rgb" else 1 for name in fields.split()}
    model = TwoStreamResNet(40, width=8, planes=planes, dense=True).eval()
    pictures = [torch.randn(2, n, 64, 96) for n in planes.values()]
    assert model(*pictures).shape == (2, 40, 16, 24)
    assert len(model.streams) == len(planes)


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HOW_MANY_ARE_LARGE = """
import re, train, torch
from pathlib import Path
kept = torch.ones(64 << 20, dtype=torch.uint8)
print(re.search(r"AnonHugePages: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1])
"""


@pytest.mark.skipif(
    not HUGE.exists() or "[madvise]" not in HUGE.read_text(),
    reason="Linux does not give large pages when asked, and only then",
)
def test_large_memory_of_torch_comes_in_large_pages_unless_told_otherwise() -> None:
    n_kb = {}
    for asked in (None, "0"):
        env = {key: value for key, value in os.environ.items() if not key.startswith("THP_")}
        env |= {"THP_MEM_ALLOC_ENABLE": asked} if asked else {}
        command = [sys.executable, "-c", HOW_MANY_ARE_LARGE]
        found = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
        n_kb[asked] = int(found.stdout)
    # Some: memory in pieces has no 64 MiB of them at any time.
    assert n_kb[None] > n_kb["0"]
