"""Networks of timm as streams, by their names. make test-timm runs these in an environment with it."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch")
timm = pytest.importorskip("timm", reason="needs timm (make test-timm)")

import torch
from helpers.training import settings, weights

from train.errors import WrongNetwork, WrongWeights
from train.loop import train
from train.model import build, scaling_of, start_from, synchronized
from train.networks.streams import StreamNetwork
from train.predict import predict

PLANES = {"rgb": 3, "depth": 5}
SMALL = "timm:resnet10t"
KINDS = ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "efficientnet_lite0", "vgg11"]
FIXED = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def network(name: str, *, dense: bool = False, size: int = 64) -> StreamNetwork:
    torch.manual_seed(0)
    model = build(f"timm:{name}", 7, planes=PLANES, dense=dense, size=size)
    assert isinstance(model, StreamNetwork)
    return model.eval()


def pictures(size: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, n, size, size, generator=generator) for n in PLANES.values()]


@pytest.mark.parametrize("name", [*KINDS, *FIXED])
def test_a_network_by_its_name_answers_about_whole_pictures_from_both_streams(name: str) -> None:
    model = network(name)
    rgb, depth = pictures()
    with torch.no_grad():
        answer = model(rgb, depth)
        assert answer.shape == (2, 7)
        assert not torch.equal(model(rgb + 1, depth), answer)
        assert not torch.equal(model(rgb, depth + 1), answer)


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_answered_at_a_quarter_of_the_resolution(name: str) -> None:
    with torch.no_grad():
        assert network(name, dense=True)(*pictures()).shape == (2, 7, 16, 16)


@pytest.mark.parametrize("name", FIXED)
def test_pixels_are_answered_by_networks_of_patches_too(name: str) -> None:
    with torch.no_grad():
        answer = network(name, dense=True)(*pictures())
    assert answer.shape[:2] == (2, 7)
    assert answer.shape[2] == answer.shape[3] > 1


def test_pooled_features_are_those_of_timm() -> None:
    model = network("mobilenetv3_small_050")
    theirs = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    theirs.load_state_dict(model.trunk("rgb").get_submodule("net").state_dict())
    rgb, _ = pictures()
    with torch.no_grad():
        (pooled,) = model.trunk("rgb")(rgb)
        assert torch.equal(pooled[:, :, 0, 0], theirs(rgb))


@pytest.mark.parametrize("dense", [False, True])
def test_a_local_checkpoint_starts_every_stream_its_stem_fitted_to_the_planes(
    dense: bool, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    source = timm.create_model("resnet10t")
    torch.save(source.state_dict(), tmp_path / "resnet10t.pth")
    model = network("resnet10t", dense=dense)
    head = model.decoder.head.bias.clone() if dense else model.fc.weight.clone()
    start_from(model, str(tmp_path / "resnet10t.pth"))
    given = source.state_dict()
    assert torch.equal(model.decoder.head.bias if dense else model.fc.weight, head)
    for stream, n_planes in PLANES.items():
        own = model.trunk(stream).get_submodule("net").state_dict()
        assert own["conv1.0.weight"].shape[1] == n_planes
        deep = "layer4.0.conv1.weight"
        assert torch.equal(own[deep], given[deep])
    rgb_stem = model.trunk("rgb").get_submodule("net").state_dict()["conv1.0.weight"]
    assert torch.equal(rgb_stem, given["conv1.0.weight"])


def test_a_file_of_safetensors_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = timm.create_model("resnet10t")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = network("resnet10t")
    start_from(model, str(tmp_path / "model.safetensors"))
    key = "layer4.0.conv1.weight"
    own = model.trunk("depth").get_submodule("net").state_dict()
    assert torch.equal(own[key], source.state_dict()[key])


def test_a_checkpoint_of_another_network_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "other.pth")
    with pytest.raises(WrongWeights, match="weights of timm:resnet10t"):
        start_from(network("resnet10t"), str(tmp_path / "other.pth"))


@pytest.mark.parametrize("name", ["resnet18x", "hf-hub:timm/resnet18.a1_in1k", ""])
def test_a_name_that_timm_does_not_have_is_one_line(name: str) -> None:
    with pytest.raises(WrongNetwork, match="has no network"):
        build(f"timm:{name}", 7)
    with pytest.raises(WrongNetwork, match="has no network"):
        scaling_of(f"timm:{name}")


def test_pictures_too_small_for_a_network_are_one_line() -> None:
    with pytest.raises(WrongNetwork, match=r"inception_v3.*input size"):
        build("timm:inception_v3", 7, planes={"rgb": 3}, size=32)


def test_colours_are_scaled_as_the_weights_were_trained() -> None:
    assert scaling_of("timm:resnet18").mean == (0.485, 0.456, 0.406)
    assert scaling_of("timm:vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)


def test_norms_of_all_ranks_together_keep_their_activations() -> None:
    model = network("efficientnet_lite0")
    rgb, depth = pictures()
    with torch.no_grad():
        before = model(rgb, depth)
        synced = synchronized("timm:efficientnet_lite0", model).eval()
        assert any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in synced.modules())
        assert torch.allclose(synced(rgb, depth), before, atol=1e-5)


@pytest.mark.parametrize("task", ["scene", "semantic40"])
def test_a_run_trains_continues_and_answers(task: str, small_set: Path, tmp_path: Path) -> None:
    changes = {"model": SMALL, "task": task, "epochs": 2, "num_workers": 0, "trunk_lr": 0.2}
    whole = settings(small_set, tmp_path / "whole", **changes)
    train(whole)
    cut = settings(small_set, tmp_path / "cut", **{**changes, "epochs": 1})
    train(cut)
    first = weights(tmp_path / "cut")
    assert any(key.startswith("depth.net.") for key in first)
    train(settings(small_set, tmp_path / "cut", **changes))
    predict([str(tmp_path / "whole")])
    assert (tmp_path / "whole" / "predict" / "predictions.csv").exists()
