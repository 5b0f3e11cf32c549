"""Runs that differ get different fingerprints, runs that are the same keep theirs, and bad networks are refused."""

import logging
import os
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import my_utils as utils

RECIPE = utils.Recipe(epochs=2)


def identity(build, recipe=RECIPE, data="digest", watch=False, probe=None, training=None):
    return utils.identify(build, recipe, data, watch, probe, training)


class Sparing(utils.Training):
    """Learns from some steps only."""

    every = 2

    def step(self, loss):
        if self.schedulers[0].last_epoch % self.every:
            super().step(loss)
        else:
            self.schedulers[0].step()


class Sparing11(Sparing):
    every = 11


class Net(nn.Module):
    """A small network whose parts can be exchanged."""

    def __init__(self, act=F.relu, first=None, last=None, buffers=(), **attributes):
        super().__init__()
        self.first, self.act, self.last = first or nn.Conv2d(3, 8, 3, stride=2), act, last or nn.Linear(8, 10)
        vars(self).update(attributes)
        for name, value in dict(buffers).items():
            self.register_buffer(name, value)

    def middle(self, x):
        return self.act(x)

    def forward(self, x):
        return self.last(self.middle(self.first(x)).mean(dim=(2, 3)))


def net(middle, base=Net, **options):
    """Return a builder of networks with a method `middle`."""
    return lambda: type("Middle", (base,), {"middle": middle})(**options)


def first(*layers):
    """Return a builder of networks that start with a convolution and these kinds of layers."""
    return lambda: Net(first=nn.Sequential(nn.Conv2d(3, 8, 3), *(layer() for layer in layers)))


def conv(**options):
    return lambda: Net(first=nn.Conv2d(3, 8, 3, **options))


def norm(**options):
    return first(partial(nn.BatchNorm2d, 8, **options))


def two(build, one, other):
    """Return a pair of builders that depend on a value."""
    return build(one), build(other)


def but(change, build=Net):
    """Return a pair of builders, the second of which also changes the new network."""

    def build_changed():
        model = build()
        change(model)
        return model

    return build, build_changed


def configured(make, read=lambda config: config.scale):
    """Return a pair of builders with a configuration as attribute."""
    return two(lambda scale: net(lambda self, x: F.relu(x) * read(self.config), config=make(scale)), 0.1, 0.9)


def buffer(**options):
    scaled = net(lambda self, x: x * self.scale)
    return two(lambda v: but(lambda m: m.register_buffer("scale", torch.tensor(v), **options), scaled)[1], 0.1, 0.9)


def masked(row):
    mask = torch.zeros(8).index_fill(0, torch.tensor(row), -torch.inf)
    return net(lambda self, x: x * self.mask.softmax(0).view(8, 1, 1), buffers={"mask": mask})


def initialised(init, *args):
    return but(lambda m: init(m.last.weight, *args))[1]


def schedule(factor, **attributes):
    """Return a builder of networks with a factor that depends on the number of steps, counted in a buffer."""

    def middle(self, x):
        self.step += self.training
        return F.relu(x) * factor(self, int(self.step))

    return lambda: net(middle, buffers={"step": torch.zeros((), dtype=torch.int64)}, **attributes)()


DIFFERENT = {
    "namespace": configured(lambda s: SimpleNamespace(scale=s)),
    "array": configured(lambda s: np.full((8, 1, 1), s, dtype=np.float32), torch.from_numpy),
    "tensor": configured(torch.tensor, lambda c: c),
    "environment": two(lambda v: lambda: os.environ.update(S=v) or Net(lambda x: x * float(os.environ["S"])), "1", "2"),
    "buffer": buffer(),
    "non-persistent buffer": buffer(persistent=False),
    "mask of -inf": two(masked, 1, 2),
    "pretrained weights": but(lambda m: m.last.weight.data.copy_(torch.linspace(-1, 1, 80).view(10, 8))),
    "forward hook": but(lambda m: m.first.register_forward_hook(lambda _, x, y: y * 2)),
    "forward pre-hook": but(lambda m: m.last.register_forward_pre_hook(lambda _, x: (x[0] * 2,))),
    "backward hook": but(lambda m: m.last.register_full_backward_pre_hook(lambda _, g: (g[0] * 2,))),
    "gradient hook": but(lambda m: m.first.weight.register_hook(lambda g: g * 0.1)),
    "weight_norm": but(lambda m: parametrizations.weight_norm(m.first)),
    "function of the user": two(lambda low: lambda: Net(lambda x: x.clamp(min=low)), 0, 0.1),
    "partial": two(lambda kind: partial(Net, partial(F.gelu, approximate=kind)), "none", "tanh"),
    "frozen": but(lambda m: m.last.bias.requires_grad_(False)),
    "dropout": two(lambda p: lambda: Net(nn.Dropout(p)), 0.1, 0.11),
    "stochastic depth": two(lambda p: net(lambda m, x: x * (torch.rand(len(x), 1, 1, 1) >= p * m.training)), 0.2, 0.6),
    "eps": two(lambda v: norm(eps=v), 1e-5, 1e-4),
    "running statistics": two(lambda v: norm(track_running_stats=v), True, False),
    "stride": two(lambda v: conv(stride=v), 1, 2),
    "bias": two(lambda v: conv(bias=v), True, False),
    "groups": two(lambda v: first(partial(nn.Conv2d, 8, 8, 3, groups=v)), 1, 2),
    "scale of the first weights": two(lambda std: initialised(nn.init.normal_, 0, std), 0.1, 0.11),
    "distribution": two(initialised, nn.init.xavier_normal_, nn.init.xavier_uniform_),
    "order": (first(nn.ReLU, partial(nn.BatchNorm2d, 8)), first(partial(nn.BatchNorm2d, 8), nn.ReLU)),
    "only in training": (Net, net(lambda self, x: F.relu(x) * (1 + self.training))),
    "only in evaluation": (Net, net(lambda self, x: F.relu(x) * (2 - self.training))),
    "temperature": two(lambda t: lambda: Net(lambda x: (x / t).softmax(1)), 1.0, 1.05),
    "residual": (Net, net(lambda self, x: x + F.relu(x))),
    "detached": (Net, net(lambda self, x: F.relu(x).detach())),
    "in place": (net(lambda self, x: x + x.relu()), net(lambda self, x: x + x.relu_())),
    "step in the code": two(lambda n: schedule(lambda m, s: 1 + (s >= n)), 2000, 8000),
    "step in an attribute": two(lambda n: schedule(lambda m, s: 1 + (s >= m.after), after=n), 5000, 6000),
    "length of a ramp": two(lambda n: schedule(lambda m, s: min(1, s / n)), 5000, 5500),
    "late or never": (schedule(lambda m, s: 1 + (s > 100_000)), schedule(lambda m, s: 1)),
    "later in evaluation": (schedule(lambda m, s: 1 + (s > 900 > 1000 * m.training)), schedule(lambda m, s: 1)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_networks_that_differ_are_told_apart(name):
    one, other = DIFFERENT[name]
    assert identity(one) == identity(one) != identity(other)


RECIPES = [{}, {"epochs": 3}, {"batch_size": 64}, {"optimizer": "adamw"}, {"learning_rate": 0.02}]
RECIPES += [{"optimizer_args": {"momentum": 0.9}}, {"label_smoothing": 0.1}, {"precision": "float32"}]
RECIPES += [{"overrides": {name: {"weight_decay": 0.1}}} for name in ("*.bias", "last.bias")]
RECIPES += [{"schedule": "step", "schedule_args": {"epochs": 1, "gamma": gamma}} for gamma in (0.1, 0.2)]
RECIPES += [{"schedule": "cosine"}, {"augmentation": utils.Augmentation(crop=2)}, {"weight_averaging": 0.99}]
OTHERS = [{"data": "another"}, {"watch": True}, {"probe": len}, {"probe": partial(len)}]
OTHERS += [{"training": kind} for kind in (utils.Training, Sparing, Sparing11)]


def test_the_largest_network_takes_a_few_seconds():
    network, start = utils.models_of("02_intermediate_blocks").S3, time.process_time()
    identity(network)
    assert time.process_time() - start <= 10  # 5 on an idle core


def test_settings_that_differ_are_told_apart():
    recipes = [{"recipe": replace(RECIPE, **options)} for options in RECIPES]
    assert len({identity(Net, **settings) for settings in recipes + OTHERS}) == len(recipes + OTHERS)


class Renamed(nn.Module):
    # `Net`, with other names, another order of definitions, and type hints
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.stem(images))
        return self.head(features.mean(dim=(2, 3)))

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, 10)


class Mixed(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.banks = nn.Parameter(torch.randn(4, 8, 3, 3, 3) / 5)
        self.gate, self.last, self.mix = nn.Linear(3, 4), nn.Linear(8, 10), mix

    def forward(self, x):
        a = self.gate(x.mean(dim=(2, 3))).softmax(1)  # [N, 4]
        return self.last(F.relu(self.mix(x, a, self.banks)).mean(dim=(2, 3)))


MIX = {
    "outputs": lambda x, a, w: (F.conv2d(x, w.flatten(0, 1)).unflatten(1, (4, 8)) * a[..., None, None, None]).sum(1),
    "loop": lambda x, a, w: sum(a[:, k, None, None, None] * F.conv2d(x, w[k]) for k in range(4)),
    "einsum": lambda x, a, w: torch.einsum("nk,kcd,nds->ncs", a, w.flatten(2), F.unfold(x, 3)).view(-1, 8, 30, 30),
    "kernels": lambda x, a, w: F.conv2d(
        x.reshape(1, -1, 32, 32), torch.einsum("nk,kcdij->ncdij", a, w).flatten(0, 1), groups=len(x)
    ).view(-1, 8, 30, 30),
}


def log(self, x):
    self.calls, self.largest = self.calls + 1, float(x.detach().max())
    logging.getLogger("net").debug("call %d", self.calls)
    return F.relu(x)


def noise(seed):
    """Change each weight by one part in 10 million, as another processor does."""

    def change(model):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data *= 1 + 1e-7 * torch.randn(parameter.shape, generator=generator)

    return but(change, norm())


SAME = {
    "names, order, comments, type hints": (Net, Renamed),
    "module": (Net, lambda: Net(nn.ReLU())),
    "clamp": (Net, lambda: Net(lambda x: x.clamp(min=0))),
    "in place": (Net, lambda: Net(F.relu_)),
    **{name: (partial(Mixed, MIX["outputs"]), partial(Mixed, mix)) for name, mix in MIX.items()},
    "fewer operations": (lambda: Net(lambda x: x * 2 / 4), lambda: Net(lambda x: x / 2)),
    "partial or subclass": (partial(Net, F.silu), net(lambda self, x: F.silu(x))),
    "channels_last": but(lambda m: m.to(memory_format=torch.channels_last)),
    "evaluation mode": but(lambda m: m.eval(), norm()),
    "compiled": (Net, lambda: torch.compile(Net(), backend=lambda *_: 1 / 0)),
    "compiled in place": but(lambda m: m.compile(backend=lambda *_: 1 / 0)),
    "compiled inside": but(lambda m: setattr(m, "last", torch.compile(m.last, backend=lambda *_: 1 / 0))),
    "logging and harmless counters": (Net, net(log, calls=0)),
    "lock": but(lambda m: setattr(m, "lock", threading.Lock())),
    "no source": (Net, eval("lambda: Net(lambda x: F.relu(x))")),
    "renamed attribute": (schedule(lambda m, s: s / m.a, a=500), schedule(lambda m, s: s / m.warm_up, warm_up=500)),
    **{f"noise {seed}": noise(seed) for seed in range(10)},
}


@pytest.mark.parametrize("name", SAME)
def test_networks_that_are_the_same_keep_their_fingerprint(name):
    one, other = SAME[name]
    assert identity(one) == identity(other)


def test_overrides_count_as_what_they_do():
    decay, last = {"weight_decay": 0.1}, replace(RECIPE, overrides={"last.*": {"weight_decay": 0.1}})
    assert identity(Net, last) == identity(Renamed, replace(RECIPE, overrides={"head.*": decay}))
    all_of_them = identity(Net, replace(RECIPE, overrides={"*": decay}))
    assert all_of_them == identity(Net, replace(RECIPE, optimizer_args=decay))


def test_the_number_of_threads_does_not_count_and_the_callers_settings_stay():
    found, threads = set(), torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        with torch.no_grad():
            found.add(identity(lambda: Net(nn.Dropout(0.5))))
            assert not torch.is_grad_enabled()
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (count, torch.float32)
    torch.set_num_threads(threads)
    assert len(found) == 1


def set_by_sine():
    model = norm(eps=1e-3)()
    for parameter in model.parameters():
        parameter.data = torch.arange(parameter.numel()).view(parameter.shape).sin() / 3
    return model


def drawn():
    model = first(partial(nn.BatchNorm2d, 8), nn.GELU, partial(nn.Dropout, 0.3), partial(nn.Conv2d, 8, 8, 3))()
    nn.init.orthogonal_(model.last.weight)
    nn.init.kaiming_normal_(model.first[0].weight)
    return model


GOLDEN = {
    set_by_sine: "7826e211162d562b",
    drawn: "e9342bc6c5cd69e6",
    schedule(lambda m, s: min(1, s / m.after), after=1000): "39be6cf4fdef0a73",
}


@pytest.mark.parametrize("build", GOLDEN)
def test_every_machine_and_version_finds_the_same(build):
    assert identity(build) == GOLDEN[build]
