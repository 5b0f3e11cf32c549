"""Batches and augmentation, checked against plain arithmetic on hand-made images."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import my_utils as utils

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
FILL = torch.tensor(MEAN).view(1, 3, 1, 1)
EVERYTHING = utils.Augmentation(
    crop=4, flip="random", rotation=15, brightness=0.3, contrast=0.3, saturation=0.3, cutout=8
)
ONE_EACH = [
    utils.Augmentation(crop=4),
    utils.Augmentation(flip="random"),
    utils.Augmentation(flip="alternating"),
    utils.Augmentation(rotation=30),
    utils.Augmentation(brightness=0.5),
    utils.Augmentation(contrast=0.5),
    utils.Augmentation(saturation=0.5),
    utils.Augmentation(cutout=8),
]


def random_images(count):
    """Images as the augmentation sees them: float [N, 3, 32, 32] in 0 .. 1."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def make_split(count):
    """A split of random images; image i tells i by its label and by every pixel of its first row."""
    images = (random_images(count) * 255).round().byte()
    images[:, :, 0] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    return utils.Split(images, torch.arange(count) * 7 % 10, MEAN, STD)


def back(images):
    """Undo the normalisation: bytes again."""
    return ((images * torch.tensor(STD).view(1, 3, 1, 1) + FILL) * 255).round().byte()


def numbers(images):
    """Which image of `make_split` each one is."""
    return back(images)[:, 0, 0, 0].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, sizes", [(4, [4, 4, 2]), (5, [5, 5]), (1, [1] * 10), (64, [10])])
def test_the_plain_view_is_in_order_and_whole(batch_size, sizes):
    split = make_split(10)
    found = list(utils.batches(split, batch_size))
    assert [len(labels) for _, labels in found] == sizes
    images, labels = (torch.cat(part) for part in zip(*found, strict=True))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(labels, split.labels)
    expected = (split.images.numpy() / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(images.numpy(), expected, rtol=0, atol=1e-6)


def test_the_training_images_get_zero_mean_and_unit_deviation(synthetic_splits):
    train = synthetic_splits.train
    images, _ = next(utils.batches(train[torch.arange(0, len(train), 9)], 5_000))
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=0.02)
    assert images.std((0, 2, 3)).tolist() == pytest.approx([1] * 3, abs=0.02)


@pytest.mark.parametrize(
    "count, batch_size, sizes",
    [(103, 10, [10] * 10), (100, 10, [10] * 10), (7, 10, [7]), (10, 10, [10]), (19, 10, [10]), (3, 1, [1] * 3)],
)
def test_the_shuffled_view_drops_the_short_last_batch_unless_it_is_the_only_one(count, batch_size, sizes):
    found = list(utils.batches(make_split(count), batch_size, seed=0))
    assert [len(labels) for _, labels in found] == sizes
    assert utils.steps_per_epoch(count, batch_size) == len(sizes)
    seen = [number for images, _ in found for number in numbers(images)]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(count))


def order(count, batch_size, **key):
    return [number for images, _ in utils.batches(make_split(count), batch_size, **key) for number in numbers(images)]


def test_the_order_depends_on_seed_and_epoch_alone():
    first = order(100, 10, seed=1, epoch=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert order(100, 10, seed=1, epoch=2) == order(100, 25, seed=1, epoch=2) == first
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the caller's random numbers alone
    orders = [first, order(100, 10, seed=1, epoch=3), order(100, 10, seed=2, epoch=2), list(range(100))]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])
    assert all(sorted(one) == list(range(100)) for one in orders)


def test_other_images_are_dropped_every_epoch():
    dropped = [set(range(109)) - set(order(109, 10, seed=0, epoch=epoch)) for epoch in range(4)]
    assert all(len(numbers) == 9 for numbers in dropped)
    assert all(one != other for one, other in pairwise(dropped))


@pytest.mark.parametrize("augmentation", [None, utils.Augmentation(), EVERYTHING])
def test_images_stay_with_their_labels(augmentation):
    split = make_split(100)
    split.images[:] = split.labels.view(-1, 1, 1, 1) * 25  # one grey for each class
    for images, labels in utils.batches(split, 10, augmentation=augmentation, seed=3):
        grey = (images * torch.tensor(STD).view(1, 3, 1, 1) + FILL)[:, :, 16, 16].median(1).values * 255
        if augmentation is EVERYTHING:  # the brightness moves by up to 30 %, and cutout may be in the middle
            grey = torch.where((grey - 127.5).abs() < 0.1, labels * 25, grey)
            assert ((grey - labels * 25).abs() <= 0.31 * labels * 25 + 0.1).all()
        else:
            assert torch.equal(grey.round().long(), labels * 25)


def test_the_default_augmentation_changes_nothing():
    split = make_split(20)
    plain, changed = (list(utils.batches(split, 5, augmentation=a, seed=0)) for a in (None, utils.Augmentation()))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(plain, changed, strict=True))
    assert utils.Augmentation().draw(5, seed=0, epoch=0) == {}


def test_the_split_is_left_as_it_was():
    split = make_split(20)
    for images, labels in utils.batches(split, 20, augmentation=EVERYTHING, seed=0):
        images.zero_()
        labels.zero_()
    for images, _ in utils.batches(split, 20):
        images.zero_()
    assert torch.equal(split.images, make_split(20).images) and torch.equal(split.labels, make_split(20).labels)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"batch_size": 0}, ValueError, r"batch_size is 0; .* from 1"),
        ({"batch_size": -3}, ValueError, r"batch_size is -3; .* from 1"),
        ({"batch_size": True}, TypeError, r"batch_size is True .* whole number"),
        ({"batch_size": "8"}, TypeError, r"batch_size is '8' .* whole number"),
        ({"batch_size": 8.0}, TypeError, r"batch_size is 8\.0 .* whole number"),
        ({"batch_size": None}, TypeError, r"batch_size is None .* whole number"),
        ({"batch_size": 8, "augmentation": utils.Augmentation()}, ValueError, r"seed is None; .* number"),
    ],
)
def test_batches_refuse_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        next(utils.batches(make_split(20), **arguments))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: what each change does
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [1, 4, 16])
def test_a_crop_is_a_window_of_the_mirrored_image(crop):
    augmentation, images = utils.Augmentation(crop=crop), random_images(300)
    draws = augmentation.draw(300, seed=0, epoch=0)
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (crop, crop), (crop, crop)], mode="reflect")
    expected = np.stack(
        [image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, draws["crop"].tolist(), strict=True)]
    )
    np.testing.assert_array_equal(augmentation(images, draws, FILL).numpy(), expected)
    assert set(draws["crop"].flatten().tolist()) == set(range(2 * crop + 1))  # every offset occurs
    assert len(draws["crop"].unique(dim=0)) > 2 * crop + 1  # rows and columns move on their own
    centre = {"crop": torch.full((300, 2), crop)}
    assert torch.equal(augmentation(images, centre, FILL), images)


def test_a_random_flip_mirrors_the_drawn_images():
    augmentation, images = utils.Augmentation(flip="random"), random_images(400)
    draws = augmentation.draw(400, seed=0, epoch=0)
    for image, mirrored, found in zip(images, draws["flip"], augmentation(images, draws, FILL), strict=True):
        assert torch.equal(found, image[:, :, range(31, -1, -1)] if mirrored else image)
    assert 160 < draws["flip"].sum() < 240


def test_an_alternating_flip_mirrors_each_image_in_every_second_epoch():
    split = make_split(40)
    split.images[:, :, 1:, :16], split.images[:, :, 1:, 16:] = 0, 255
    augmentation, mirrored = utils.Augmentation(flip="alternating"), []
    for epoch in range(6):
        found = {}
        for images, _ in utils.batches(split, 8, augmentation=augmentation, seed=0, epoch=epoch):
            found |= dict(zip(numbers(images), (images[:, 0, 16, 0] > 0).tolist(), strict=True))
        mirrored.append([found[number] for number in range(40)])
    assert 10 < sum(mirrored[0]) < 30
    for one, other in pairwise(mirrored):
        assert all(a != b for a, b in zip(one, other, strict=True))
    assert not torch.equal(augmentation.draw(40, seed=1, epoch=0)["flip"], torch.tensor(mirrored[0]))


def test_a_rotation_by_a_quarter_turn_is_exact():
    augmentation, images = utils.Augmentation(rotation=90), random_images(5)
    quarters = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0])
    found = augmentation(images, {"rotation": quarters * math.pi / 2}, FILL)
    left, right = images.rot90(1, (2, 3)), images.rot90(-1, (2, 3))
    if (found[1] - right[1]).abs().max() < (found[1] - left[1]).abs().max():
        left, right = right, left  # either sense of turning is fine, but opposite angles turn opposite ways
    expected = torch.stack([images[0], left[1], right[2], images[3].flip(1, 2), images[4]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_rotation_draws_angles_up_to_the_given_one():
    angles = utils.Augmentation(rotation=15).draw(1000, seed=0, epoch=0)["rotation"].rad2deg()
    assert -15 <= angles.min() < -14 and 14 < angles.max() <= 15
    assert abs(angles.mean()) < 1


def test_a_rotated_image_has_no_black_corners():
    white = torch.ones(2, 3, 32, 32)
    found = utils.Augmentation(rotation=45)(white, {"rotation": torch.tensor([0.7, -0.3])}, FILL)
    torch.testing.assert_close(found, white)


def grey(image):
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


FORMULAS = {
    "brightness": lambda image, factor: factor * image,
    "contrast": lambda image, factor: grey(image).mean() + factor * (image - grey(image).mean()),
    "saturation": lambda image, factor: grey(image) + factor * (image - grey(image)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_colours_follow_their_formula(name):
    augmentation, images = utils.Augmentation(**{name: 1.0}), random_images(6)
    factors = torch.tensor([0.0, 0.5, 0.9, 1.0, 1.3, 2.0])
    found = augmentation(images, {name: factors}, FILL)
    for image, factor, changed in zip(images.double().numpy(), factors.tolist(), found, strict=True):
        expected = np.clip(FORMULAS[name](image, factor), 0, 1)
        np.testing.assert_allclose(changed.numpy(), expected, rtol=0, atol=1e-6)
    assert (found[5] - images[5]).abs().max() > 0.1
    torch.testing.assert_close(found[3], images[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("value", [0.2, 1])
def test_colour_factors_are_drawn_around_one(name, value):
    factors = utils.Augmentation(**{name: value}).draw(1000, seed=0, epoch=0)[name]
    assert 1 - value <= factors.min() < 1 - 0.95 * value and 1 + 0.95 * value < factors.max() <= 1 + value
    assert abs(factors.mean() - 1) < 0.1 * value


@pytest.mark.parametrize("side", [1, 8, 5, 32])
def test_cutout_fills_a_square_with_the_mean(side):
    augmentation, images = utils.Augmentation(cutout=side), random_images(300)
    draws = augmentation.draw(300, seed=0, epoch=0)
    expected = images.clone()
    for image, (y, x) in zip(expected, draws["cutout"].tolist(), strict=True):
        top, left = y - side // 2, x - side // 2
        image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = FILL[0]
    found = augmentation(images, draws, FILL)
    assert torch.equal(found, expected)
    area = (found != images).all(1).sum((1, 2))
    assert area.min() >= 1 and (area.max() == side**2 or side == 32)  # at the border a part is outside
    assert set(draws["cutout"].flatten().tolist()) == set(range(32))


def test_the_network_sees_zeros_in_the_cut_out_square():
    split = make_split(20)
    split.images[:] = 0
    for images, _ in utils.batches(split, 5, augmentation=utils.Augmentation(cutout=8), seed=0):
        zero = (images == 0).all(1)
        assert (zero.sum((1, 2)) >= 16).all() and (zero.sum((1, 2)) <= 64).all()
        assert (images[:, :, 0, 0][~zero[:, 0, 0]] < -1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: how it is drawn
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ONE_EACH, ids=repr)
def test_each_image_gets_its_own_draw(augmentation):
    images = random_images(1).expand(20, -1, -1, -1)
    found = augmentation(images, augmentation.draw(20, seed=0, epoch=0), FILL)
    different = len(found.flatten(1).unique(dim=0))
    assert different == 2 if augmentation.flip != "none" else different > 15


@pytest.mark.parametrize("augmentation", ONE_EACH, ids=repr)
def test_draws_depend_on_seed_and_epoch_alone(augmentation):
    (first,) = augmentation.draw(50, seed=1, epoch=2).values()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    (again,) = augmentation.draw(50, seed=1, epoch=2).values()
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    for key in ({"seed": 1, "epoch": 3}, {"seed": 2, "epoch": 2}):
        (other,) = augmentation.draw(50, **key).values()
        assert not torch.equal(first, other)


def test_an_image_keeps_its_draw_whatever_the_batch_size():
    split, found = make_split(40), []
    for batch_size in (8, 8, 20):
        pairs = list(utils.batches(split, batch_size, augmentation=EVERYTHING, seed=0, epoch=1))
        found.append(torch.cat([images for images, _ in pairs]))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    other = torch.cat([images for images, _ in utils.batches(split, 8, augmentation=EVERYTHING, seed=0, epoch=2)])
    assert not torch.allclose(found[0], other)


@pytest.mark.parametrize("images", [random_images(50), random_images(50).round()], ids=["random", "black and white"])
def test_values_stay_between_zero_and_one(images):
    strong = utils.Augmentation(16, "random", 180, brightness=1, contrast=1, saturation=1, cutout=16)
    found = strong(images, strong.draw(50, seed=0, epoch=0), FILL)
    assert found.shape == images.shape and found.dtype == torch.float32
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6


def test_augmentation_leaves_its_input_alone():
    images = random_images(10)
    EVERYTHING(images, EVERYTHING.draw(10, seed=0, epoch=0), FILL)
    assert torch.equal(images, random_images(10))


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        *[("crop", value, ValueError, "from 0 to 16") for value in (-1, 17)],
        *[("crop", value, TypeError, "whole number") for value in (1.5, True, "4", None)],
        *[("flip", value, ValueError, "none, random, alternating") for value in ("yes", True, None, 0.5)],
        *[("rotation", value, ValueError, "from 0 to 180") for value in (-1, 181, math.nan, math.inf)],
        *[("rotation", value, TypeError, "number") for value in ("15", None, (0, 15), False)],
        *[(name, -0.1, ValueError, "from 0 to 1") for name in FORMULAS],
        *[(name, 1.5, ValueError, "from 0 to 1") for name in FORMULAS],
        *[(name, "0.2", TypeError, "number") for name in FORMULAS],
        *[("cutout", value, ValueError, "from 0 to 32") for value in (-1, 33)],
        *[("cutout", value, TypeError, "whole number") for value in (2.5, True, "8")],
    ],
)
def test_augmentation_refuses_bad_arguments(name, value, error, message):
    with pytest.raises(error, match=f"^{name} is .*{message}"):
        utils.Augmentation(**{name: value})
