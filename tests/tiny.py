"""What the tests of the shared parts train: a network and a recipe so small that an epoch takes milliseconds."""

import contextlib
from dataclasses import asdict
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

import my_utils


class Tiny(nn.Module):
    """One convolution and one linear layer, with the two kinds of state that are easy to lose: buffers and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1)  # [N, 3, 32, 32] -> [N, 8, 8, 8]
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(512, 10)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).flatten(1)))


def recipe(**changes) -> my_utils.Recipe:
    """Return a recipe of two epochs, four batches each on 200 images."""
    settings = {"epochs": 2, "batch_size": 50, "learning_rate": 0.05, "precision": "float32"}
    return my_utils.Recipe(**settings | changes)


def make_splits(*counts: int) -> my_utils.Splits:
    """Return so many synthetic images for training, validation and testing."""
    images, labels = my_utils.draw_synthetic(sum(counts))
    parts = zip(images.split(counts), labels.split(counts), strict=True)
    return my_utils.Splits(*(my_utils.Split(*part, (0.5,) * 3, (0.25,) * 3) for part in parts), "synthetic")


@contextlib.contextmanager
def each_forward(act=lambda call, model, logits: None, training=True, kind=Tiny):
    """Call act(number of the call, model, logits) in every forward pass of a mode; what it returns replaces the logits.

    Only passes of epochs count, not those that find out what a network computes and how long it takes. Yields the
    list of the calls' numbers.
    """
    calls, inside = [], []

    def hook(model, _, logits):
        if inside and isinstance(model, kind) and model.training == training:
            calls.append(len(calls))
            return act(calls[-1], model, logits)

    def within(function):
        def watched(*args, **arguments):
            inside.append(function)
            try:
                return function(*args, **arguments)
            finally:
                inside.pop()

        return watched

    handle = register_module_forward_hook(hook)
    try:
        names = ("train_epoch", "evaluate_epoch")
        with patch.multiple(my_utils, **{name: within(getattr(my_utils, name)) for name in names}):
            yield calls
    finally:
        handle.remove()


def assert_same(one, other):
    """Check that two runs ended with the same bits and logged the same values; only the times may differ."""
    weights, others = one.model.state_dict(), other.model.state_dict()
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name
    assert asdict(one.history) | {"seconds": []} == asdict(other.history) | {"seconds": []}
