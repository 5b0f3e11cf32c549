"""Scores, test-time augmentation and FLOPs, against values worked out by hand."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from tiny import Tiny
from torch import nn

from my_utils import batches, count_flops, evaluate, predict, score


@pytest.fixture
def model():
    """A small network with weights of its own and running statistics that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Tiny()
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    return model


def sure(answers, confidence=0.91) -> torch.Tensor:
    """Return logits that give each answer so much confidence, and the other nine classes equal shares of the rest."""
    logits = torch.full((len(answers), 10), (1 - confidence) / 9)
    logits[torch.arange(len(answers)), torch.tensor(answers)] = confidence
    return logits.log()


# --- Scores ---


def test_scores_of_ten_examples():
    """Eight of ten are right; class 9 is said once too often, and class 3 never."""
    labels = torch.arange(10)
    answers = [0, 1, 2, 9, 4, 5, 6, 7, 9, 9]
    labels[8] = 2
    result = score(sure(answers), labels)
    assert result.top1 == 0.8
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for true, said in zip(labels.tolist(), answers, strict=True):
        expected[true, said] += 1
    assert expected[3, 9] == 1 and expected[9, 3] == 0
    assert result.confusion.dtype == torch.int64 and torch.equal(result.confusion, expected)
    assert result.per_class.tolist() == [1, 1, 0.5, 0, 1, 1, 1, 1, 0, 1]  # no example of class 8
    assert result.nll == pytest.approx(-(8 * math.log(0.91) + 2 * math.log(0.01)) / 10, rel=1e-6)
    assert torch.equal(result.labels, labels) and torch.equal(result.logits, sure(answers))


def test_loss_of_one_example():
    logits = torch.tensor([[1.0, 2.0, 3.0, *[-math.inf] * 7]]).clamp(min=-1e4)
    assert score(logits, torch.tensor([0])).nll == pytest.approx(math.log(1 + math.e + math.e**2), rel=1e-6)
    assert score(logits + 50, torch.tensor([2])).nll == pytest.approx(math.log(1 + 1 / math.e + math.e**-2), rel=1e-6)


@pytest.mark.parametrize(("right", "count"), [(8, 10), (0, 10), (10, 10), (1, 1), (9_400, 10_000)])
def test_wilson_interval(right, count):
    z, p = NormalDist().inv_cdf(0.975), right / count
    middle = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((middle + side) / (1 + z * z / count) for side in (-half, half))
    found = score(sure([0] * right + [1] * (count - right)), torch.zeros(count, dtype=torch.int64)).interval
    assert found == pytest.approx((low, high), abs=1e-9)
    if (right, count) == (8, 10):
        assert found == pytest.approx((0.4902, 0.9433), abs=5e-5)


def test_calibration_error_of_two_bins():
    """Four answers at 0.62, one right; six at 0.68, all right. Of 15 bins they fill two, of 10 they would fill one."""
    logits = torch.cat([sure([1] * 4, 0.62), sure([2] * 6, 0.68)])
    labels = torch.tensor([1, 5, 5, 5, 2, 2, 2, 2, 2, 2])
    assert score(logits, labels).ece == pytest.approx(0.4 * (0.62 - 0.25) + 0.6 * (1 - 0.68), abs=1e-6)


def test_half_precision_is_scored_in_full():
    labels = torch.arange(10)
    result = score(sure(range(10)).half(), labels)
    assert result.logits.dtype == torch.float32
    assert result.nll == pytest.approx(-math.log(0.91), abs=1e-3)


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (torch.zeros(5, 9), torch.zeros(5, dtype=torch.int64), r"logits are \[5, 9\]"),
        (torch.zeros(10), torch.zeros(10, dtype=torch.int64), r"logits are \[10\]"),
        (torch.zeros(5, 10), torch.zeros(4, dtype=torch.int64), r"labels \[4\]; they must be \[N, 10\] and \[N\]"),
        (torch.zeros(5, 10), torch.zeros(5, 1, dtype=torch.int64), r"labels \[5, 1\]"),
        (torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64), "N > 0"),
        (torch.full((5, 10), math.nan), torch.zeros(5, dtype=torch.int64), "not finite"),
        (torch.full((5, 10), math.inf), torch.zeros(5, dtype=torch.int64), "not finite"),
    ],
)
def test_what_cannot_be_scored(logits, labels, says):
    with pytest.raises(ValueError, match=says):
        score(logits, labels)


# --- Predictions ---


@pytest.mark.parametrize("batch_size", [1, 32, 99, 100])
def test_a_short_last_batch_counts_fully(model, splits, batch_size):
    whole = predict(model, splits.test, precision="float32")
    assert whole.shape == (100, 10) and whole.dtype == torch.float32
    found = predict(model, splits.test, precision="float32", batch_size=batch_size)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert score(found, splits.test.labels).confusion.sum() == 100


@pytest.mark.parametrize("training", [True, False])
def test_predicting_changes_nothing(model, splits, training):
    model.train(training)
    model.norm.eval()  # a part may be frozen on its own
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = predict(model, splits.val, precision="float32")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(predict(model, splits.val, precision="float32"), first)  # no dropout
    assert not first.requires_grad


def test_evaluation_is_the_score_of_the_predictions(model, splits):
    result = evaluate(model, splits.val, precision="float32")
    with torch.no_grad():
        logits = model.eval()(next(batches(splits.val, 100))[0])
    torch.testing.assert_close(result.logits, logits, atol=1e-5, rtol=1e-5)
    assert result.top1 == (logits.argmax(1) == splits.val.labels).sum().item() / 100


def test_lower_precision_is_close(model, splits):
    whole, low = (predict(model, splits.val, precision=precision) for precision in ("float32", "bfloat16"))
    assert low.dtype == torch.float32
    assert not torch.equal(low, whole)
    torch.testing.assert_close(low, whole, atol=0.05, rtol=0.05)


# --- Test-time augmentation ---


def test_augmented_predictions_are_the_average_worked_out_by_hand(splits):
    """A linear model takes a mirrored or moved image for another one."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    weight, bias = (parameter.detach().double().numpy() for parameter in model[1].parameters())
    mean, std = (np.array(value).reshape(3, 1, 1) for value in (splits.val.mean, splits.val.std))
    images = (splits.val.images.numpy() / 255 - mean) / std

    def logits(images):
        return images.reshape(len(images), -1) @ weight.T + bias

    def both(images):
        return (logits(images) + logits(images[..., ::-1])) / 2

    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    expected = {
        "none": logits(images),
        "flip": both(images),
        "flip+translate": both(images) / 2 + (both(padded[..., :32, :32]) + both(padded[..., 2:, 2:])) / 4,
    }
    found = {tta: predict(model, splits.val, tta=tta, precision="float32", batch_size=30) for tta in expected}
    for tta, values in expected.items():
        np.testing.assert_allclose(found[tta], values, atol=1e-4)
    assert not np.allclose(expected["none"], expected["flip"], atol=1e-2)
    assert not np.allclose(expected["flip"], expected["flip+translate"], atol=1e-2)
    assert torch.equal(predict(model, splits.val, precision="float32", batch_size=30), found["none"])
    assert torch.equal(
        evaluate(model, splits.val, tta="flip", precision="float32").logits.argmax(1), found["flip"].argmax(1)
    )


def test_unknown_test_time_augmentation_is_named(model, splits):
    with pytest.raises(ValueError, match=r"tta is 'mirror'; it may be one of none, flip, flip\+translate"):
        predict(model, splits.val, tta="mirror")


# --- FLOPs ---

LINEAR = 2 * 512 * 10


@pytest.mark.parametrize(
    ("model", "flops"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), 2 * 3072 * 10),
        (lambda: nn.Conv2d(3, 8, 3, stride=4, padding=1), 2 * (3 * 3 * 3) * 8 * (8 * 8)),
        (lambda: nn.Conv2d(3, 6, 5, groups=3), 2 * (5 * 5) * 6 * (28 * 28)),
        (Tiny, 2 * (3 * 3 * 3) * 8 * (8 * 8) + LINEAR),
        (nn.Flatten, 0),
    ],
    ids=["linear", "convolution", "grouped", "both", "nothing"],
)
def test_flops_of_one_image(model, flops):
    assert count_flops(model()) == flops


@pytest.mark.parametrize("training", [True, False])
def test_counting_changes_nothing(model, training):
    model.train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model)
    assert model.training == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
