"""A user's own network trains, is stored and loads again with equal predictions, or is refused at once in words."""

import copy
import importlib
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from tiny import Tiny, assert_same, each_forward, recipe
from torch import nn

import my_utils as utils

pytestmark = pytest.mark.usefixtures("store")
TEST = {"run": "test/user", "plot": False}
fit = partial(utils.fit, **TEST)


def net(*layers, outputs=10):
    """Return a network around layers that keep the shape [N, 3, 4, 4]."""
    return nn.Sequential(nn.AvgPool2d(8), *layers, nn.Flatten(), nn.Linear(48, outputs))


def one_prelu_at_two_places():
    act = nn.PReLU()
    return net(nn.Conv2d(3, 3, 1), act, nn.Conv2d(3, 3, 1), act)


def tied_weights():
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    return net(one, nn.ReLU(), other)


def views_of_one_tensor():
    one, other, both = nn.Linear(4, 4), nn.Linear(4, 4), torch.rand(8, 4)
    one.weight, other.weight = nn.Parameter(both[:4]), nn.Parameter(both[4:])
    return net(one, other)


def a_block_used_twice():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    return net(block, block)


def partly_frozen():
    return net(nn.Conv2d(3, 3, 1).requires_grad_(False), nn.BatchNorm2d(3))


class Around(nn.Module):
    """Applies a function to a layer and its input."""

    def __init__(self, function, layer):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x):
        return self.function(self.layer, x)


def masked():
    """Return attention that looks back only, by a mask of -inf."""
    query = nn.Linear(4, 4)
    query.mask = nn.Buffer(torch.full((4, 4), -torch.inf).triu(1))
    return net(Around(lambda query, x: (query(x) @ x.mT + query.mask).softmax(-1) @ x, query))


def spectral():
    """Return a convolution by a product of Fourier transforms, with complex weights."""
    weights = nn.ParameterList([torch.randn(3, 3, 4, 3, dtype=torch.complex64) / 3])
    multiply = partial(torch.einsum, "bixy,ioxy->boxy")
    return net(Around(lambda w, x: torch.fft.irfft2(multiply(torch.fft.rfft2(x.float()), w[0])), weights))


def double():
    return net(Around(lambda layer, x: layer(x.double()).float(), nn.Linear(4, 4, dtype=torch.float64)))


def spare():
    """Return a network with tensors that are not stored, not used, or empty."""
    layer = nn.Linear(4, 4)
    layer.unused, layer.empty = nn.Linear(4, 4), nn.Parameter(torch.zeros(0))
    layer.scale, layer.yes = nn.Buffer(torch.arange(4.0), persistent=False), nn.Buffer(torch.tensor(True))
    return net(Around(lambda layer, x: layer(x) * layer.scale, layer))


class Changing(nn.Module):
    """Keeps a state, which each step changes, in a buffer or beside what is stored, and computes with it."""

    def __init__(self, state, change=lambda state, x: state + 1):
        super().__init__()
        self.state, self.change = state, change

    def forward(self, x):
        if self.training:
            self.state = self.change(self.state, x.detach())
        return x * (1 + 0.1 * self.state)


def weighted(function, weight):
    """Return a network with a weight, which a function applies."""
    layer = nn.Module()
    layer.weight = nn.Parameter(weight)
    return net(Around(lambda layer, x: function(x, layer.weight), layer))


BUILDERS = one_prelu_at_two_places, tied_weights, views_of_one_tensor, a_block_used_twice, partly_frozen, spare
GOOD = {build.__name__: build for build in (*BUILDERS, masked, spectral, double)}
GOOD |= {
    "a buffer of whole numbers": lambda: net(Changing(nn.Buffer(torch.tensor(0)))),
    "partial": partial(net, nn.ReLU(inplace=True)),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(3, 3, 8), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10)),
    "compiled": lambda: torch.compile(a_block_used_twice(), backend="eager"),
    "a part compiled": lambda: net(torch.compile(nn.Linear(4, 4), backend="eager")),
    "parametrized": lambda: net(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
    "root of a weight": lambda: weighted(lambda x, weight: x * weight.sqrt(), torch.ones(4)),
    "constant in float32": lambda: weighted(lambda x, w: x * w + torch.ones(4, dtype=torch.float32), torch.ones(4)),
    "autocast": lambda: net(
        Around(lambda layer, x: torch.autocast("cpu", torch.bfloat16)(layer)(x).float(), nn.Linear(4, 4))
    ),
}


@pytest.mark.parametrize("averaging", [None, 0.9])
@pytest.mark.parametrize("build_model", GOOD.values(), ids=GOOD)
def test_it_trains_and_loads_again_with_equal_predictions(splits, build_model, averaging):
    settings = recipe(epochs=2, weight_averaging=averaging)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = fit(build_model, splits, settings)
    expected = utils.predict(run.model, splits.test, precision="float32")
    with each_forward(kind=nn.Module) as calls:
        loaded = fit(build_model, splits, settings)
        found = utils.predict(loaded.model, splits.test, precision="float32")
    assert not calls and torch.equal(found, expected) and run.history == loaded.history
    assert not [str(warning.message) for warning in said if "torch.compile" not in str(warning.message)]


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_a_model_compiled_with_the_defaults_trains(splits):
    compiled, plain = (fit(build, splits, recipe(epochs=1)) for build in (lambda: torch.compile(net()), net))
    assert compiled.history.step_loss == pytest.approx(plain.history.step_loss, rel=1e-3)


ONCE, UNSEEDED = net(), np.random.default_rng()
BAD = {
    "a model": (net(), "without"),
    "what was trained": (lambda: ONCE, "same"),
    "a shared part": (partial(net, nn.BatchNorm2d(3)), "same"),
    "everything frozen": (lambda: net().requires_grad_(False), "requires_grad"),
    "no parameter": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((1, 10)), nn.Flatten(), nn.MaxPool1d(3)), "parameter"),
    "no model": (lambda: None, "nn.Module"),
    "too many outputs": (lambda: net(outputs=12), "12.*10"),
    "too few outputs": (lambda: net(outputs=5), "5.*10"),
    "images": (lambda: nn.Conv2d(3, 3, 1), "32.*10"),
    "a tuple": (lambda: Around(lambda net, x: (net(x), 0), net()), "tuple.*10"),
    "a dict": (lambda: Around(lambda net, x: {"logits": net(x)}, net()), "dict.*10"),
    "twice in one place": (lambda: nn.Sequential(ONCE), "same"),
    "a counter that is not stored": (lambda: net(Changing(0)), "register_buffer"),
    "a mean that is not stored": (lambda: net(Changing(torch.zeros(()), lambda m, x: m + x.mean())), "register_buffer"),
    "unseeded random numbers": (lambda: net(Changing(0, lambda *_: UNSEEDED.random())), "register_buffer"),
    "unseeded weights": (lambda: weighted(torch.mul, torch.tensor(UNSEEDED.random())), "other weights"),
}


@pytest.mark.parametrize(("build_model", "says"), BAD.values(), ids=BAD)
def test_it_is_refused_before_training(splits, store, build_model, says):
    with each_forward(kind=nn.Module) as calls, pytest.raises((TypeError, ValueError), match=says):
        fit(build_model, splits, recipe())
    assert not calls and not list(store.rglob("*.safetensors"))


def test_trained_weights_can_be_trained_further_as_a_copy(splits):
    first = fit(net, splits, recipe())
    before = copy.deepcopy(first.model.state_dict())
    losses = [fit(lambda: copy.deepcopy(first.model), splits, recipe(), seed=s).history.step_loss for s in (0, 1)]
    assert losses[0] != losses[1] and max(map(sum, losses)) < sum(first.history.step_loss)
    assert all(torch.equal(value, before[name]) for name, value in first.model.state_dict().items())
    with pytest.raises(ValueError, match="same"):
        fit(lambda: first.model, splits, recipe())


def test_my_utils_can_be_loaded_again(splits):
    old, settings = dict(vars(utils)), recipe(augmentation=utils.Augmentation(crop=2))
    try:
        importlib.reload(utils)
        assert utils.Recipe is not old["Recipe"]
        run = utils.fit(Tiny, splits, settings, **TEST)
        assert recipe(augmentation=settings.augmentation).augmentation.crop == 2
    finally:
        vars(utils).update(old)
    assert_same(fit(Tiny, splits, settings), run)
