"""Augmentation: RGB and depth stay together, holes stay holes, the seed decides everything."""

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="needs torch")

import torch
from torch import Tensor

from convert.sources.nyu_tables import nyu
from train import augment as module
from train.augment import (
    WHOLE,
    Draws,
    augment,
    color_jitter,
    random_flip,
    random_resized_crop,
    resize,
    surface,
    to_input,
    views,
)
from train.geometry import rays, window
from train.settings import Settings

STATS = (2.842, 1.417)
HOW = Settings("", "", crop=0.5, jitter=0.4)


def draws(n: int, seed: int = 0) -> Draws:
    return Draws(seed, n)


def nyu_rays(size: int, crop: str) -> tuple[Tensor, Tensor]:
    dataset = nyu()
    assert dataset.camera
    return rays(size, window(dataset, dataset.crop_box(crop)), dataset.camera)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 8, size: int = 48) -> tuple[Tensor, Tensor]:
    """Noise with a quarter of the depth pixels missing, values between 1000 and 32767 mm elsewhere."""
    generator = seeded(7)
    rgb = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    depth = torch.randint(1000, 32768, (n, 1, size, size), generator=generator, dtype=torch.int16)
    return rgb, depth.masked_fill(torch.rand(depth.shape, generator=generator) < 0.25, 0)


def ramps(n: int = 64, size: int = 64) -> tuple[Tensor, Tensor]:
    """Depth holds the pixel's number (x + size * y + 1), RGB its x and its y."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    rgb = torch.stack((x, y, x)).to(torch.uint8).expand(n, -1, -1, -1)
    return rgb, (x + size * y + 1).to(torch.int16).expand(n, 1, -1, -1)


def test_normalisation_has_the_stated_scale_and_maps_holes_to_exactly_zero() -> None:
    rgb_u8, depth_mm = batch()
    rgb, depth = to_input(rgb_u8, [depth_mm], STATS)
    assert rgb.dtype == depth.dtype == torch.float32
    for channel in range(3):
        expected = (rgb_u8[:, channel] / 255 - module.IMAGENET_MEAN[channel]) / module.IMAGENET_STD[
            channel
        ]
        torch.testing.assert_close(rgb[:, channel], expected)
    valid = depth_mm > 0
    torch.testing.assert_close(depth[valid], (depth_mm[valid] / 1000 - STATS[0]) / STATS[1])
    assert (depth[~valid] == 0.0).all()


def test_a_surface_has_its_height_and_its_normal_also_in_a_mirrored_picture() -> None:
    x, y = (plane[None] for plane in nyu_rays(64, "none"))
    far = torch.full_like(x, 8.0)
    # 1 m to the right, 1.2 m below.
    wall, floor = (
        torch.where(x > 0.2, 1 / x, far),
        torch.where(y > 0.2, 1.2 / y, far),
    )
    wall_mm, floor_mm, front_mm = ((1000 * z).round().to(torch.int16) for z in (wall, floor, far))
    right, low, flat = (
        (slice(None), slice(52, 62)),
        (slice(52, 62), slice(None)),
        (slice(None), slice(None)),
    )
    for depth_mm, region, normal in [
        (wall_mm, right, (-1.0, 0.0, 0.0)),
        (floor_mm, low, (0.0, -1.0, 0.0)),
        (front_mm, flat, (0.0, 0.0, -1.0)),
    ]:
        planes = surface(depth_mm, x, y, STATS)[0]
        expected = torch.tensor(normal)[:, None, None].expand_as(planes[2:])
        torch.testing.assert_close(planes[2:, *region], expected[:, *region], atol=0.05, rtol=0)
        mirrored = surface(depth_mm.flip(-1), x.flip(-1), y.flip(-1), STATS)[0]
        opposite = torch.stack(
            (mirrored[0], mirrored[1], -mirrored[2], mirrored[3], mirrored[4])
        ).flip(-1)
        torch.testing.assert_close(opposite, planes, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        surface(floor_mm, x, y, STATS)[0, 1, 52:], torch.full((12, 64), 1.2), atol=1e-2, rtol=0
    )


@pytest.mark.parametrize(
    ("crop", "x", "y"), [("none", -0.62474, -0.48642), ("eigen", -0.54604, -0.39998)]
)
def test_the_ray_of_the_first_stored_pixel_is_that_of_its_place_in_the_sensors_picture(
    crop: str, x: float, y: float
) -> None:
    found = [float(plane[0, 0, 0]) for plane in nyu_rays(224, crop)]
    assert found == pytest.approx([x, y], abs=1e-4)


def test_a_hole_does_not_bend_the_surface_beside_it() -> None:
    depth, (x, y) = (
        torch.full((1, 1, 64, 64), 2000, dtype=torch.int16),
        (plane[None] for plane in nyu_rays(64, "none")),
    )
    depth[..., 10:13, 20:40] = depth[..., 40, ::3] = 0
    normals = surface(depth, x, y, STATS)[0, 2:]
    beside = (depth[0, 0] > 0) & (normals[2] != 0)
    assert beside.float().mean() > 0.9
    assert normals[2][beside].max() < -0.98


def test_a_pixel_without_a_measurement_is_zero_in_every_plane_of_a_surface() -> None:
    depth = batch()[1]
    planes = surface(depth, *(plane.expand_as(depth) for plane in nyu_rays(48, "border")), STATS)
    assert planes.shape == (8, 5, 48, 48)
    assert not planes.isnan().any()
    assert (planes.transpose(0, 1)[:, depth[:, 0] == 0] == 0).all()


@pytest.mark.parametrize("size", [20, 48, 77])
def test_a_crop_never_averages_depth_and_keeps_holes(size: int) -> None:
    rgb, depth = batch()
    cropped_rgb, (cropped,) = random_resized_crop(rgb, [depth], draws(8), size, 0.5)
    assert cropped_rgb.shape == (8, 3, size, size)
    assert cropped.shape == (8, 1, size, size)
    assert cropped.dtype == torch.int16
    for one, source in zip(cropped, depth, strict=True):
        assert torch.isin(one, source).all()
    holes = cropped == 0
    assert 0.15 < holes.float().mean() < 0.35
    assert torch.equal(to_input(cropped_rgb, [cropped], STATS)[1] == 0.0, holes)


def test_rgb_and_depth_are_cropped_at_the_same_place() -> None:
    size = 64
    rgb, depth = ramps(size=size)
    rgb, (depth,) = random_resized_crop(rgb, [depth], draws(64), 64, 0.5)
    x, y = (depth.long() - 1) % size, (depth.long() - 1) // size
    assert (rgb[:, :1] - x).abs().max() <= 0.51
    assert (rgb[:, 1:2] - y).abs().max() <= 0.51


def test_the_crop_covers_the_share_of_the_area_asked_for() -> None:
    rgb, _ = random_resized_crop(ramps(n=256)[0], [], draws(256), 64, 0.5)
    spans = [rgb[:, channel].flatten(1) for channel in (0, 1)]
    wide, high = ((span.amax(1) - span.amin(1)) / 63 for span in spans)
    assert (wide * high).min() > 0.4
    assert (wide * high).mean() < 0.85
    rgb, depth = ramps(n=1)
    whole, (whole_depth,) = random_resized_crop(rgb, [depth], draws(1), 64, 1.0)
    assert (whole - rgb).abs().max() < 16  # another aspect ratio at most
    assert whole_depth.shape == depth.shape


def test_a_flip_mirrors_rgb_and_depth_of_the_same_samples() -> None:
    rgb, depth = batch(64)
    flipped_rgb, (flipped_depth,) = random_flip(rgb, [depth], draws(64))
    n_flipped = 0
    for i in range(64):
        flipped = torch.equal(flipped_rgb[i], rgb[i].flip(-1))
        n_flipped += flipped
        assert torch.equal(flipped_rgb[i], rgb[i].flip(-1) if flipped else rgb[i])
        assert torch.equal(flipped_depth[i], depth[i].flip(-1) if flipped else depth[i])
    assert 16 < n_flipped < 48


def test_jitter_stays_in_range_and_changes_each_sample_by_itself() -> None:
    rgb = torch.full((16, 3, 8, 8), 100, dtype=torch.uint8)
    out = color_jitter(rgb, draws(16), 0.4)
    assert out.min() >= 0
    assert out.max() <= 255
    assert len({round(v, 3) for v in out.mean(dim=(1, 2, 3)).tolist()}) == 16
    torch.testing.assert_close(color_jitter(rgb, draws(16), 0.0), rgb.float())


def test_dense_targets_follow_their_pictures_and_void_stays_void() -> None:
    size, n = 64, 16
    rgb, number = ramps(n=n, size=size)
    target = (
        number[:, 0].long().masked_fill(torch.rand((n, size, size), generator=seeded()) < 0.2, -100)
    )
    moved, (depth, labels, metres) = augment(
        rgb, [number, target, number / 1000], draws(n), size, replace(HOW, jitter=0.0)
    )
    assert labels.dtype == torch.int64
    known = labels != -100
    assert torch.equal(labels[known], depth[:, 0].long()[known])
    assert 0.1 < (~known).float().mean() < 0.3
    torch.testing.assert_close(metres, depth / 1000)
    assert (moved[:, 0] - (depth[:, 0].long() - 1) % size).abs().max() <= 0.51


def test_the_same_seed_gives_the_same_batch_and_another_seed_another() -> None:
    rgb, depth = batch()
    first, again, other = (augment(rgb, [depth], draws(8, seed), 32, HOW) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1][0], again[1][0])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1][0], other[1][0])


def test_a_picture_is_the_same_whatever_the_number_of_ranks() -> None:
    rgb, depth = batch()
    whole_rgb, (whole,) = augment(rgb, [depth], draws(8), 32, HOW)
    for mine in ([0, 2, 5], [1, 3, 4, 6, 7]):
        part_rgb, (part,) = augment(rgb[mine], [depth[mine]], Draws(0, 8, mine), 32, HOW)
        torch.testing.assert_close(part_rgb, whole_rgb[mine])
        assert torch.equal(part, whole[mine])


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    before = torch.get_rng_state()
    rgb, depth = batch()
    augment(rgb, [depth], draws(8), 32, HOW)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_picture_skips_no_pixel_of_a_large_one() -> None:
    stripes = torch.zeros((1, 3, 224, 224), dtype=torch.uint8)
    stripes[..., ::2] = 200
    for size in (32, 64, 75, 96, 111):
        assert (resize(stripes, [], size)[0] - 100).abs().max() < 1e-3


def test_resize_takes_the_depth_pixel_under_each_centre() -> None:
    rgb, depth = batch(size=48)
    small_rgb, (small,) = resize(rgb, [depth], 20)
    index = ((torch.arange(20) + 0.5) * 48 / 20).floor().long()
    assert torch.equal(small, depth[:, :, index][:, :, :, index])
    assert small_rgb.shape == (8, 3, 20, 20)
    assert resize(rgb, [depth], 48)[0] is rgb


def test_views_are_the_whole_picture_once_and_five_crops_inside_it() -> None:
    assert views(1.0) == [WHOLE]
    whole, *crops = views(0.5)
    assert whole == WHOLE
    assert len(set(crops)) == 5
    assert all(
        min(top, left) >= 0 and max(top, left) + side <= 1 + 1e-9 for top, left, side in crops
    )
    assert [side**2 for *_, side in crops] == pytest.approx([0.75] * 5)


def test_a_view_is_that_part_of_every_picture() -> None:
    depth = torch.arange(2 * 40 * 40, dtype=torch.int16).view(2, 1, 40, 40)
    rgb = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    part, (part_depth,) = resize(rgb, [depth], 20, (0.25, 0.5, 0.5))
    assert torch.equal(part_depth, depth[..., 10:30, 20:40])
    torch.testing.assert_close(part, rgb[..., 10:30, 20:40].float(), atol=0.01, rtol=0)
