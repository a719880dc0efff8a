"""Scores against torchmetrics and by hand; counts add up; dense targets follow their pictures."""

import csv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("torchmetrics", reason="needs torchmetrics")

import torch
from torch import Tensor
from torchmetrics.functional import classification as reference
from torchmetrics.functional import mean_squared_error

from convert.sources.nyu_tables import nyu
from shards.errors import NeedsSetting
from shards.spec import VOID
from train.augment import normalize_rgb, resize, views
from train.geometry import CropBox, window
from train.job import make_setup, new_run
from train.loop import predict_batch, train_step, training
from train.report import report
from train.settings import Settings
from train.tasks import Classes, Depth

K = 5
PIXELS = Classes([f"c{k}" for k in range(K)], 0.0, "miou")
ROWS = Classes(PIXELS.names, 0.0, "top1")


def box(crop: str) -> CropBox:
    return window(nyu(), nyu().crop_box(crop))


def depth_task(mean_m: float, crop: str) -> Depth:
    return Depth(mean_m, box(crop), box("eigen"))


def pixels(n: int = 6) -> tuple[Tensor, Tensor]:
    """Logits and targets with void; class 4 is never true."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, K - 1, (n, 16, 16), generator=generator)
    logits = torch.randn((n, K, 16, 16), generator=generator)
    logits.scatter_add_(1, target[:, None], torch.full((n, 1, 16, 16), 1.0))
    return logits, target.masked_fill(torch.rand(target.shape, generator=generator) < 0.2, VOID)


def test_classification_scores_are_those_of_torchmetrics() -> None:
    logits, target = pixels()
    counts = PIXELS.count(logits, target)
    settings = {"num_classes": K, "ignore_index": VOID}
    accuracy_k, iou_k = PIXELS.per_class(counts)
    theirs = reference.multiclass_jaccard_index(logits, target, average="none", **settings)
    torch.testing.assert_close(iou_k[:4].float(), theirs[:4])
    theirs = reference.multiclass_accuracy(logits, target, average="none", **settings)
    torch.testing.assert_close(accuracy_k[:4].float(), theirs[:4])
    assert iou_k[4].isnan()  # nothing is truly of it: no part of the mean
    right = reference.multiclass_accuracy(logits, target, average="micro", **settings)
    scores = PIXELS.scores(counts)
    assert scores["pixel_accuracy"] == pytest.approx(float(right))
    assert scores["miou"] == pytest.approx(float(iou_k[:4].mean()))


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    logits, target = pixels()
    parts = sum(PIXELS.count(a, b) for a, b in zip(logits.split(4), target.split(4), strict=True))
    assert torch.equal(parts, PIXELS.count(logits, target))
    loss, weight = PIXELS.loss(logits, target)
    torch.testing.assert_close(
        loss / weight, torch.nn.functional.cross_entropy(logits, target, ignore_index=VOID)
    )


def test_mean_class_accuracy_leaves_out_classes_without_rows() -> None:
    counts = torch.zeros(K, K)
    counts[:3, :3] = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 1, 1]])
    scores = ROWS.scores(counts.flatten().double())
    assert scores == {"top1": pytest.approx(4 / 6), "mean_class": pytest.approx((0.75 + 0.5) / 2)}


def test_a_smoothed_loss_over_the_known_pixels_is_torchs_own() -> None:
    task, (logits, target) = Classes(PIXELS.names, 0.1, "top1"), pixels()
    loss, n_known = task.loss(logits, target)
    theirs = torch.nn.functional.cross_entropy(
        logits, target, ignore_index=VOID, label_smoothing=0.1
    )
    torch.testing.assert_close(loss / n_known, theirs)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_what_an_adjusted_loss_makes_of_rows_that_show_nothing(strength: float) -> None:
    """It is lowest where the answers are as frequent as the classes, or less so, or all alike."""
    n_rows_k = torch.tensor([6, 3, 1, 4, 2])
    target = torch.repeat_interleave(torch.arange(K), n_rows_k)
    logits_k = ((1 - strength) * n_rows_k.log()).requires_grad_()
    loss, _ = ROWS.adjusted(strength, n_rows_k).loss(logits_k.expand(len(target), K), target)
    loss.backward()
    torch.testing.assert_close(logits_k.grad, torch.zeros(K), atol=1e-5, rtol=0)


def test_a_run_adjusts_its_loss_by_the_rows_that_it_learns_from(
    small_set: Path, tmp_path: Path
) -> None:
    known = Settings(str(small_set), str(tmp_path), logit_adjustment=0.5)
    setup = make_setup(known, torch.device("cpu"))
    n_rows_k = np.bincount(setup.train_set.labels(), minlength=setup.task.n_out)
    expected_k = 0.5 * np.log(np.maximum(n_rows_k, 1) / n_rows_k.sum())
    assert isinstance(setup.task, Classes)
    assert setup.task.offsets_k is not None
    np.testing.assert_allclose(setup.task.offsets_k, expected_k, rtol=1e-6)


@pytest.mark.parametrize("task", ["semantic40", "depth"])
def test_classes_of_scenes_alone_can_be_made_up_for(task: str) -> None:
    with pytest.raises(NeedsSetting, match="logit_adjustment"):
        Settings("data", "runs", task=task, logit_adjustment=0.5)


def test_a_class_without_train_rows_leaves_an_adjusted_loss_a_number() -> None:
    task = ROWS.adjusted(1.0, torch.tensor([6, 3, 1, 0, 2]))
    loss, _ = task.loss(torch.zeros(1, K), torch.tensor([3]))
    assert loss.isfinite()


def test_depth_scores_are_averaged_over_pictures_and_leave_out_unmeasured_pixels() -> None:
    generator = torch.Generator().manual_seed(2)
    true = 0.5 + 8 * torch.rand((3, 1, 12, 12), generator=generator, dtype=torch.float64)
    out = (true / 3 * (0.7 + 0.6 * torch.rand(true.shape, generator=generator))).log()
    true[1, 0, :6] = 0
    task = depth_task(3.0, "eigen")
    scores = task.scores(task.count(out, true))
    rmse, abs_rel, delta1 = [], [], []
    for predicted, gold in zip(task.metres(out), true, strict=True):
        a, b = predicted[gold > 0], gold[gold > 0]
        rmse.append(float(mean_squared_error(a, b, squared=False)))
        abs_rel.append(float(((a - b).abs() / b).mean()))
        delta1.append(float((torch.maximum(a / b, b / a) < 1.25).double().mean()))
    for name, values in (("rmse", rmse), ("abs_rel", abs_rel), ("delta1", delta1)):
        assert scores[name] == pytest.approx(sum(values) / 3), name


def test_depth_is_scored_inside_the_eigen_crop_only() -> None:
    true = torch.full((1, 1, 480, 640), 2.0)
    out = torch.full_like(true, 1.0)
    out[:, :, 45:471, 41:601] = 0.0
    task = depth_task(2.0, "none")
    assert task.scores(task.count(out, true)) == {"rmse": 0.0, "abs_rel": 0.0, "delta1": 1.0}
    out[0, 0, 45, 41] = 1.0
    assert task.scores(task.count(out, true))["rmse"] > 0
    # 6 rows and 7 columns before the first one are cut off.
    without_frame = depth_task(2.0, "border")
    out, true = out[:, :, 6:473, 7:632], true[:, :, 6:473, 7:632]
    assert without_frame.scores(without_frame.count(out, true))["rmse"] > 0
    out[0, 0, 45 - 6, 41 - 7] = 0.0
    assert without_frame.scores(without_frame.count(out, true))["rmse"] == 0.0


@pytest.mark.parametrize("task", ["scene", "semantic13"])
def test_a_picture_and_its_mirror_image_get_the_same_answer(task: str, small_set: Path) -> None:
    setup = make_setup(
        Settings(str(small_set), "", task=task, inputs="rgb", width=8, size=32), torch.device("cpu")
    )
    run = new_run(setup)
    net = run.model.eval()
    torch.nn.init.normal_((net.decoder.head if task != "scene" else net.fc).weight)
    rgb, depth, target = setup.train_set.stored(np.arange(4))
    mirrored = rgb.flip(-1), depth.flip(-1), target.flip(-1) if target.ndim > 1 else target
    with torch.inference_mode():
        out, again = (
            predict_batch(run, setup, batch)[0] for batch in ((rgb, depth, target), mirrored)
        )
    assert out.std() > 1e-3
    torch.testing.assert_close(
        again if task == "scene" else again.flip(-1), out, atol=1e-4, rtol=1e-4
    )


def test_an_answer_with_test_time_augmentation_is_the_mean_over_the_picture_and_its_crops(
    small_set: Path,
) -> None:
    setup = make_setup(
        Settings(str(small_set), "", inputs="rgb", width=8, size=32, crop=0.5), torch.device("cpu")
    )
    run = new_run(setup)
    net = run.model.eval()
    torch.nn.init.normal_(net.fc.weight)
    rgb, depth, target = setup.train_set.stored(np.arange(4))
    with torch.inference_mode():
        batch = (rgb, depth, target)
        quick, _ = predict_batch(run, setup, batch, test_time_augmentation=False)
        augmented, _ = predict_batch(run, setup, batch)
        outs = [quick]
        for top, left, side in views(0.5)[1:]:
            small, _ = resize(rgb, [depth], 32, (top, left, side))
            outs += [(net(normalize_rgb(small)) + net(normalize_rgb(small.flip(-1)))) / 2]
    torch.testing.assert_close(augmented, torch.stack(outs).mean(0), atol=1e-4, rtol=1e-4)
    assert (augmented - quick).abs().max() > 1e-2


@pytest.mark.parametrize("task", ["semantic13", "depth"])
def test_dense_outputs_are_scored_as_stored_at_the_end_and_at_training_size_in_between(
    task: str, small_set: Path
) -> None:
    setup = make_setup(
        Settings(str(small_set), "", task=task, width=8, size=48), torch.device("cpu")
    )
    run = new_run(setup)
    run.model.eval()
    batch = setup.train_set.stored(np.arange(4))
    with torch.inference_mode():
        for at_the_end, size in ((False, 48), (True, 32)):
            out, (*_, target) = predict_batch(run, setup, batch, test_time_augmentation=at_the_end)
            assert out.shape[-2:] == target.shape[-2:] == (size, size)


@pytest.mark.parametrize(
    ("task", "score"),
    [
        pytest.param("semantic13", "miou", marks=pytest.mark.stress),
        ("semantic40", "miou"),
        ("depth", "rmse"),
    ],
)
def test_every_task_trains_and_names_its_classes(
    task: str, score: str, small_set: Path, tmp_path: Path
) -> None:
    settings = Settings(
        str(small_set), str(tmp_path), task=task, epochs=2, batch_size=8, width=4, size=32
    )
    with training(settings) as done:
        files = report(done)
    assert {f"train_{score}", f"test_{score}"} <= done.last.keys()
    assert {path.name for path in files} | {"previous.pt", ".lock"} == {
        path.name for path in tmp_path.iterdir()
    }
    assert {"mistakes.png", "curves.png", "predictions.csv"} <= {p.name for p in tmp_path.iterdir()}
    if score == "miou":
        with open(tmp_path / "classes.csv") as file:
            names = [row["class"] for row in csv.DictReader(file)]
        assert len(names) == int(task.removeprefix("semantic"))
        assert "wall" in names


@pytest.mark.parametrize(("task", "unknown"), [("semantic13", VOID), ("depth", 0.0)])
def test_a_batch_in_which_nothing_is_known_leaves_a_network_that_can_go_on(
    task: str, unknown: float, small_set: Path
) -> None:
    setup = make_setup(
        Settings(str(small_set), "", task=task, width=4, size=32), torch.device("cpu")
    )
    run = new_run(setup)
    run.model.train()
    rgb, depth, target = setup.train_set.batch(np.arange(4))
    train_step(run, setup, (rgb, depth, torch.full_like(target, unknown)), slice(None))
    assert all(p.isfinite().all() for p in run.model.parameters())
