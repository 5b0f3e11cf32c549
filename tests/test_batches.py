"""Batches and augmentation, against plain arithmetic, NumPy and torchvision on hand-made images."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

import my_utils as utils
from my_utils import Augmentation, batches

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
FILL, SCALE = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
COLOURS = {name: getattr(v2.functional, f"adjust_{name}") for name in ("brightness", "contrast", "saturation")}
EVERYTHING = Augmentation(4, "random", 15, brightness=0.3, contrast=0.3, saturation=0.3, cutout=8)
ONE_EACH = [Augmentation(crop=4), Augmentation(flip="random"), Augmentation(flip="alternating"), Augmentation(cutout=8)]
ONE_EACH += [Augmentation(**{name: 0.5}) for name in COLOURS] + [Augmentation(rotation=30)]


def random_images(count):
    """Return images as the augmentation sees them: float [N, 3, 32, 32] in 0 .. 1."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def make_split(count):
    """Return a split of random images; image i tells i by its label and by every pixel of its first row."""
    images = (random_images(count) * 255).round().byte()
    images[:, :, 0] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    return utils.Split(images, torch.arange(count) * 7 % 10, MEAN, STD)


def numbers(images):
    """Return which image of `make_split` each one is."""
    return ((images * SCALE + FILL) * 255).round()[:, 0, 0, 0].int().tolist()


def order(count, batch_size, **key):
    return [number for images, _ in batches(make_split(count), batch_size, **key) for number in numbers(images)]


def test_the_head_holds_the_first_images_of_each_class(synthetic_splits):
    whole = synthetic_splits.val
    for count in (10, 250, None):
        head = whole.head(count)
        places = [(whole.labels == label).nonzero()[:, 0][: count and count // 10] for label in range(10)]
        places = torch.cat(places).sort().values
        assert torch.equal(head.images, whole.images[places]) and torch.equal(head.labels, whole.labels[places])
    parts = synthetic_splits.head(30, 20, 10)
    assert [len(split) for split in (parts.train, parts.val, parts.test)] == [30, 20, 10]
    for count in (0, 15, 5_010):
        with pytest.raises(ValueError, match=str(count)):
            whole.head(count)


@pytest.mark.parametrize("batch_size, sizes", [(4, [4, 4, 2]), (5, [5, 5]), (64, [10])])
def test_without_a_seed_they_are_in_order_unchanged_and_whole(batch_size, sizes):
    split = make_split(10)
    found = list(batches(split, batch_size))
    assert [len(labels) for _, labels in found] == sizes
    images, labels = (torch.cat(part) for part in zip(*found, strict=True))
    assert images.dtype == torch.float32 and torch.equal(labels, split.labels) and labels.dtype == torch.int64
    reference = v2.functional.normalize(split.images / 255, MEAN, STD)
    torch.testing.assert_close(images, reference, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count, batch_size, sizes", [(103, 10, [10] * 10), (7, 10, [7]), (3, 1, [1] * 3)])
def test_shuffled_they_drop_a_short_last_batch_unless_it_is_the_only_one(count, batch_size, sizes):
    found = list(batches(make_split(count), batch_size, seed=0))
    assert [len(labels) for _, labels in found] == sizes
    seen = [number for images, _ in found for number in numbers(images)]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(count))


def test_the_order_depends_on_seed_and_epoch_alone():
    first = order(109, 10, seed=1, epoch=2)
    assert order(109, 10, seed=1, epoch=2) == first and first[:100] == order(109, 25, seed=1, epoch=2)[:100]
    for other in (order(109, 10, seed=1, epoch=3), order(109, 10, seed=2, epoch=2), list(range(100))):
        assert set(first) != set(other) and first[:5] != other[:5]  # other images are dropped


@pytest.mark.parametrize("count", [1, 3, 7])
def test_parts_of_batches_and_larger_batches_hold_the_same_images(count):
    view = partial(batches, make_split(20), augmentation=EVERYTHING, seed=3, epoch=1)
    whole, parts = list(view(10)), [view(10, part=(number, count)) for number in range(count)]
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        sizes = [len(share[1]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)
        torch.testing.assert_close(torch.cat([share[0] for share in shares]), images, rtol=0, atol=1e-5)
    [(images, _)] = view(20)
    torch.testing.assert_close(torch.cat([images for images, _ in whole]), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("augmentation", [None, EVERYTHING])
def test_images_stay_with_their_labels_and_the_split_stays_as_it_was(augmentation):
    split = make_split(100)
    split.images[:] = split.labels.view(-1, 1, 1, 1) * 25  # one grey for each class
    before = split.images.clone()
    for images, labels in batches(split, 10, augmentation=augmentation, seed=3):
        grey = (images * SCALE + FILL).flatten(2).median(2).values.median(1).values * 255  # cutout hides no median
        assert ((grey - labels * 25).abs() <= 0.31 * (augmentation is EVERYTHING) * labels * 25 + 0.1).all()
        images.zero_(), labels.zero_()
    assert torch.equal(split.images, before) and torch.equal(split.labels, make_split(100).labels)


@pytest.mark.parametrize("crop", [1, 16])
def test_a_crop_is_a_window_of_the_mirrored_image(crop):
    augmentation, images = Augmentation(crop=crop), random_images(300)
    draws = augmentation.draw(300, seed=0, epoch=0)
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (crop, crop), (crop, crop)], mode="reflect")
    corners = zip(padded, draws["crop"].tolist(), strict=True)
    expected = np.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in corners])
    np.testing.assert_array_equal(augmentation(images, draws, FILL).numpy(), expected)
    assert [set(side.tolist()) for side in draws["crop"].T] == 2 * [set(range(2 * crop + 1))]  # every place occurs
    assert len(draws["crop"].unique(dim=0)) > 2 * crop + 1  # rows and columns move on their own


def test_a_random_flip_mirrors_half_of_the_images():
    augmentation, images = Augmentation(flip="random"), random_images(400)
    found = augmentation(images, augmentation.draw(400, seed=0, epoch=0), FILL)
    same, mirrored = ((found == view).all(1).all(1).all(1) for view in (images, v2.functional.horizontal_flip(images)))
    assert (same ^ mirrored).all() and 160 < mirrored.sum() < 240


def test_an_alternating_flip_mirrors_each_image_in_every_second_epoch():
    split, mirrored = make_split(40), []
    split.images[:, :, 1:, :16], split.images[:, :, 1:, 16:] = 0, 255
    for epoch in range(6):
        found = {}
        for images, _ in batches(split, 8, augmentation=Augmentation(flip="alternating"), seed=0, epoch=epoch):
            found |= dict(zip(numbers(images), (images[:, 0, 16, 0] > 0).tolist(), strict=True))
        mirrored.append([found[number] for number in range(40)])
    assert 10 < sum(mirrored[0]) < 30
    assert all(a != b for one, other in pairwise(mirrored) for a, b in zip(one, other, strict=True))


def test_a_rotation_turns_about_the_middle_and_mirrors_what_is_missing():
    angles, images = [0.0, 90.0, 17.0, -17.0, 40.0], random_images(5)
    found = Augmentation(rotation=90)(images, {"rotation": torch.tensor(angles).deg2rad()}, FILL)
    turn, inside, errors = partial(v2.functional.rotate, interpolation=v2.InterpolationMode.BILINEAR), slice(6, 26), []
    for sense in (1, -1):  # either is fine, but the same for all
        expected = torch.stack([turn(image, sense * angle) for image, angle in zip(images, angles, strict=True)])
        errors.append((found - expected)[:, :, inside, inside].abs().max())
    assert min(errors) < 1e-4  # inside of what is seen at every angle
    white = torch.ones(5, 3, 32, 32)
    torch.testing.assert_close(Augmentation(rotation=45)(white, {"rotation": torch.tensor(angles)}, FILL), white)


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_torchvision(name):
    images, factors = random_images(6), torch.tensor([0.0, 0.5, 0.9, 1.0, 1.3, 2.0])
    found = Augmentation(**{name: 1.0})(images, {name: factors}, FILL)
    expected = [COLOURS[name](image, factor) for image, factor in zip(images, factors.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-3)  # it rounds the weights of grey


@pytest.mark.parametrize("side", [1, 8, 5])
def test_cutout_fills_a_square_with_the_mean(side):
    augmentation, images = Augmentation(cutout=side), random_images(300)
    draws = augmentation.draw(300, seed=0, epoch=0)
    expected = images.clone()
    for image, (y, x) in zip(expected, draws["cutout"].tolist(), strict=True):
        top, left = y - side // 2, x - side // 2
        image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = FILL[0]
    assert torch.equal(augmentation(images, draws, FILL), expected)
    assert [set(place.tolist()) for place in draws["cutout"].T] == 2 * [set(range(32))]


@pytest.mark.parametrize("augmentation", ONE_EACH, ids=repr)
def test_each_image_gets_its_own_draw_that_depends_on_seed_and_epoch_alone(augmentation):
    images, state = random_images(1).expand(20, -1, -1, -1), torch.get_rng_state()
    keys = [{"seed": 1, "epoch": 2}, {"seed": 1, "epoch": 2}, {"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 2}]
    found = [augmentation(images, augmentation.draw(20, **key), FILL) for key in keys]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers stay
    assert [torch.equal(one, found[0]) for one in found] == [True, True, False, False]
    different = len(found[0].flatten(1).unique(dim=0))
    assert different == 2 if augmentation.flip != "none" else different > 15
    assert torch.equal(images[7], random_images(1)[0])  # what came in is left alone


@pytest.mark.parametrize("name", [*COLOURS, "rotation"])
def test_draws_fill_their_range_evenly(name, value=0.2):
    draws = Augmentation(**{name: value}).draw(1000, seed=0, epoch=0)[name]
    draws = draws.rad2deg() if name == "rotation" else draws - 1
    assert -value <= draws.min() < -0.95 * value and 0.95 * value < draws.max() <= value
    assert abs(draws.mean()) < 0.1 * value and abs(draws.abs().mean() - value / 2) < 0.05 * value


WRONG = [("crop", -1), ("crop", 17), ("crop", 1.5), ("flip", "yes"), ("rotation", 181), ("rotation", math.nan)]
WRONG += [("cutout", 33), ("cutout", True), *((name, 1.5) for name in COLOURS)]


@pytest.mark.parametrize("name, value", WRONG)
def test_an_augmentation_names_a_wrong_field(name, value):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        Augmentation(**{name: value})
