"""Scores, predictions and operations, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from tiny import Tiny
from torch import nn
from torch.nn import functional as F

from my_utils import Evaluation, batches, count_flops, evaluate, evaluating, predict


@pytest.fixture
def model(seeded):
    """A small network with weights of its own and running statistics that matter."""
    model = Tiny()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    return model


def sure(answers, confidence=0.91) -> torch.Tensor:
    """Return logits that give each answer so much confidence, and the other nine classes equal shares of the rest."""
    logits = torch.full((len(answers), 10), (1 - confidence) / 9)
    logits[torch.arange(len(answers)), torch.tensor(answers)] = confidence
    return logits.log()


def test_scores_of_ten_examples():
    """Seven of ten are right; class 9 is said twice too often, classes 3 and 8 never, and no example is of class 8."""
    labels, answers = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 2, 9]), [0, 1, 2, 9, 4, 5, 6, 0, 9, 9]
    result = Evaluation(sure(answers).half(), labels)
    assert result.interval == pytest.approx((0.39678, 0.89221), abs=1e-5)  # Wilson, 1927
    assert result.top1 == 0.7 and result.logits.dtype == torch.float32  # scored in full whatever comes in
    pairs = list(zip(labels.tolist(), answers, strict=True))
    assert result.confusion.tolist() == [[pairs.count((t, a)) for a in range(10)] for t in range(10)]
    assert result.nll == pytest.approx(-(7 * math.log(0.91) + 3 * math.log(0.01)) / 10, rel=1e-3)
    assert result.ece == pytest.approx(0.91 - 0.7, abs=1e-3)


@pytest.mark.parametrize("count", [1, 500])
def test_calibration_error_by_hand(seeded, count):
    logits, labels, held = 3 * torch.randn(count, 10), torch.randint(10, (count,)), [[] for _ in range(15)]
    logits[count // 2 :] *= 0.01
    logits[0, labels[0]] = 1000.0  # a confidence of exactly 1
    for row, label in zip(logits.double().softmax(1).tolist(), labels.tolist(), strict=True):
        held[min(14, int(max(row) * 15))].append((max(row), row.index(max(row)) == label))
    held = [np.array(examples, dtype=float) for examples in held if examples]
    gaps, result = [abs(examples[:, 0].sum() - examples[:, 1].sum()) for examples in held], Evaluation(logits, labels)
    assert result.ece == pytest.approx(sum(gaps) / count)
    assert result.nll == pytest.approx(F.cross_entropy(logits.double(), labels).item())


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_logit_that_is_not_finite_is_refused(bad):
    logits = sure([1, 2, 3])
    logits[2, 5] = bad
    with pytest.raises(FloatingPointError):
        Evaluation(logits, torch.tensor([1, 2, 3]))


def test_a_short_last_batch_counts_by_its_images(model, splits):
    """All is summed over images, and no mean of means is taken."""
    [(images, labels)] = batches(splits.test, 100)
    with torch.no_grad():
        logits = model.eval()(images)
    for batch_size in (32, 99):
        found = predict(model, splits.test, precision="float32", batch_size=batch_size)
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    low, result = (evaluate(model, splits.test, precision=precision) for precision in ("bfloat16", "float32"))
    assert result.top1 == (logits.argmax(1) == labels).sum().item() / 100 and result.confusion.sum() == 100
    assert result.nll == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item() / 100, rel=1e-5)
    assert low.logits.dtype == torch.float32 and not torch.equal(low.logits, result.logits)
    torch.testing.assert_close(low.logits, logits, atol=0.05, rtol=0.05)


def test_predicting_and_counting_change_nothing(model, splits):
    model.train().norm.eval()  # a part may be frozen on its own
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = predict(model, splits.val, precision="float32")
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    count_flops(model)
    assert torch.equal(predict(model, splits.val, precision="float32"), first)  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_operations_of_one_image():
    assert count_flops(nn.Flatten()) == 0
    assert count_flops(nn.Conv2d(3, 6, 5, groups=3)) == 2 * (5 * 5) * 6 * (28 * 28)
    assert count_flops(Tiny()) == 2 * 512 * 10 + 2 * (3 * 3 * 3) * 8 * (8 * 8)
