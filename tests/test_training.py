"""Recipes, optimizers, schedules and the training loop, against plain PyTorch and values worked out by hand."""

import math
import random
import warnings
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny import Tiny, assert_same, each_forward, recipe
from torch import nn
from torch.nn import functional as F

import my_utils as utils
from my_utils import Augmentation, Recipe, batches, build_optimizers, evaluate

pytestmark = pytest.mark.usefixtures("store")
fit = partial(utils.fit, run="test/tiny", plot=False)
REST = {"optimizer": "adamw", "learning_rate": 0.01}
MATRIX = {"optimizer": "muon", "overrides": {"[cn]*": REST, "*.bias": REST}}
SGD = {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}}


@pytest.fixture
def precise_muon(monkeypatch):
    """Muon, torch's own as well, multiplies in the number type of the matrix."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)


class Plain(Tiny):
    """Without dropout, and without the bias whose gradient is rounding and nothing else."""

    def __init__(self):
        super().__init__()
        self.drop, self.conv.bias = nn.Identity(), None


def onecycle(step, start=1 / 25, end=1 / 250_000, peak=0.3 * 8 - 1):
    rise, fall = math.pi * step / peak, math.pi * (step - peak) / (7 - peak)
    up, down = start + (1 - start) * (1 - math.cos(rise)) / 2, end + (1 - end) * (1 + math.cos(fall)) / 2
    return up if step <= peak else down


FACTORS = {"step": lambda step: 0.1 ** (step // 4), "cosine": lambda step: (1 + math.cos(math.pi * step / 8)) / 2}
FACTORS |= {"constant": lambda step: 1, "onecycle": onecycle}  # of the learning rate, in 8 steps
CASES = {
    "sgd": SGD | {"schedule": "step", "schedule_args": {"epochs": 1, "gamma": 0.1}},
    "adam": {"optimizer": "adam", "schedule": "cosine", "label_smoothing": 0.2},
    "adamw": REST | {"schedule": "onecycle", "schedule_args": {"cycle_momentum": False}},
    "muon": MATRIX | {"optimizer_args": {"weight_decay": 0.1}, "schedule": "cosine"},
    "normalized_muon": MATRIX | {"optimizer": "normalized_muon", "weight_averaging": 0.6},
    "averaged": SGD | {"weight_averaging": 0.75, "label_smoothing": 0.1},
    "augmented": SGD | {"augmentation": Augmentation(crop=2, flip="alternating", cutout=8)},
}


def by_hand(splits, settings, seed):
    """Train `Plain` in plain PyTorch; return what is kept, the loss of every step and the accuracy of every epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Plain()
    kind = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}.get(settings.optimizer, "Muon")
    matrices = [model.head.weight] if kind == "Muon" else list(model.parameters())
    rest = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    arguments = ({"weight_decay": 0} if kind == "Muon" else {}) | settings.optimizer_args
    optimizers = [getattr(torch.optim, kind)(matrices, lr=settings.learning_rate, **arguments)]
    optimizers += [torch.optim.AdamW(rest, lr=0.01)] if rest else []
    rates, average, losses, right = [o.param_groups[0]["lr"] for o in optimizers], None, [], [0, 0]
    for epoch in range(2):
        for images, labels in batches(splits.train, 50, augmentation=settings.augmentation, seed=seed, epoch=epoch):
            logits = model(images)
            target = F.one_hot(labels, 10) * (1 - settings.label_smoothing) + settings.label_smoothing / 10
            loss = -(target * logits.log_softmax(1)).sum() / 50
            model.zero_grad()
            loss.backward()
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * FACTORS[settings.schedule](len(losses))
                optimizer.step()
            if settings.optimizer == "normalized_muon":
                model.head.weight.data *= 10**0.5 / model.head.weight.data.norm()
            state = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
            decay = settings.weight_averaging or 0
            average = {name: decay * average[name] + (1 - decay) * state[name] for name in state} if average else state
            losses.append(loss.item())
            right[epoch] += (logits.argmax(1) == labels).sum().item()
    model.eval().load_state_dict(average, strict=False)
    return model, losses, [count / 200 for count in right]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_training_computes_what_plain_pytorch_does(splits, precise_muon, changes):
    settings = recipe(**{"learning_rate": 0.02} | changes)
    run = fit(Plain, splits, settings, seed=3)
    model, losses, top1 = by_hand(splits, settings, 3)
    for name, value in run.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)
    history, [(images, labels)] = run.history, batches(splits.val, 100)
    logits = model(images)
    assert history.step_loss == pytest.approx(losses, rel=1e-4) and history.train_top1 == pytest.approx(top1)
    assert history.train_loss == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-4)
    assert history.val_top1[-1] == pytest.approx((logits.argmax(1) == labels).sum().item() / 100)
    assert history.val_loss[-1] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    rates = [settings.learning_rate * FACTORS[settings.schedule](step) for step in range(8)]
    assert history.step_learning_rate == pytest.approx(rates, rel=1e-5)


@pytest.mark.parametrize(("steps", "arguments"), [(1, {}), (5, {"pct_start": 0.2}), (10, {"pct_start": 0.1})], ids=str)
def test_onecycle_of_any_length(steps, arguments):
    """Not even a rise of exactly one step divides by zero."""
    settings = recipe(epochs=1, schedule="onecycle", schedule_args=arguments)
    [optimizer] = build_optimizers(Tiny(), settings)
    scheduler = utils.build_scheduler(optimizer, settings, steps)
    for _ in range(steps):
        assert 0 < optimizer.param_groups[0]["lr"] <= 0.05 * (1 + 1e-6)
        optimizer.step()
        scheduler.step()


def test_history_of_watched_and_probed_training(splits):
    splits, settings, modes = replace(splits, train=splits.train[:190]), recipe(epochs=3, batch_size=60), []

    def probe(model):
        modes.append(model.training)
        return {"norm": model.head.weight.norm(), "drawn": torch.rand(1) + random.random()}

    plain, run = fit(Tiny, splits, settings), fit(Tiny, splits, settings, watch=True, probe=probe)
    history = run.history
    assert plain.history.test_top1 == plain.history.probe == [] and modes == [False] * 3
    lengths = [len(getattr(history, field.name)) for field in fields(history)]
    assert lengths == [9, 9, 3, 3, 3, 3, 3, 3, 3]  # 3 batches of 60; 10 images are left out
    assert all(180 * top1 == pytest.approx(round(180 * top1)) for top1 in history.train_top1)
    assert history.test_top1[-1] == evaluate(run.model, splits.test, precision="float32").top1
    assert history.probe[-1]["norm"] == pytest.approx(run.model.head.weight.norm().item())
    assert min(history.seconds) > 0
    history.test_top1, history.probe = [], []
    assert_same(plain, run)  # watching and probing change nothing else


class Noisy(Tiny):
    """Draws all three kinds of random numbers, in evaluation mode, too."""

    def forward(self, x):
        return super().forward(x) + 0.1 * torch.rand(1) + 0.1 * np.random.rand() + 0.1 * random.random()


@pytest.mark.parametrize("build_model", [Tiny, Noisy])
def test_the_seed_decides_and_the_callers_random_numbers_stay(splits, build_model):
    def fit_anew(seed, disturbed):
        for seed_all in (torch.manual_seed, np.random.seed, random.seed):
            seed_all(disturbed)
        states = torch.get_rng_state().tolist(), np.random.get_state()[1:], random.getstate()
        run = fit(build_model, splits, recipe(), seed=seed)
        now = torch.get_rng_state().tolist(), np.random.get_state()[1:], random.getstate()
        assert str(now) == str(states)
        run.path.unlink()
        return run

    run = fit_anew(1, disturbed=5)
    assert_same(fit_anew(1, disturbed=6), run)
    other = fit_anew(2, disturbed=5)
    assert other.fingerprint != run.fingerprint and other.history.step_loss[0] != run.history.step_loss[0]
    assert not torch.equal(other.model.head.weight, run.model.head.weight)


def test_overrides_change_the_parameters_they_fit_and_the_last_wins():
    model = Tiny()
    model.conv.weight.requires_grad_(False)
    overrides = {"*.bias": {"weight_decay": 0.0}, "head.*": {"weight_decay": 0.25}, "head.bias": {"learning_rate": 0.5}}
    overrides |= {"norm.weight": {"optimizer": "adam", "learning_rate": 0.3}, "head.weight": REST}
    arguments = {"momentum": 0.9, "weight_decay": 0.1}
    optimizers = build_optimizers(model, recipe(optimizer_args=arguments, overrides=overrides))
    names, found = {id(parameter): name for name, parameter in model.named_parameters()}, []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            values = group["lr"], group["weight_decay"], group.get("momentum")
            found += [(names[id(parameter)], type(optimizer).__name__, *values) for parameter in group["params"]]
    assert found[0][1] == "SGD" and sorted(found) == [  # the main optimizer first, each trained parameter once
        ("conv.bias", "SGD", 0.05, 0.0, 0.9),
        ("head.bias", "SGD", 0.5, 0.25, 0.9),
        ("head.weight", "AdamW", 0.01, 0.01, None),  # with its own arguments
        ("norm.bias", "SGD", 0.05, 0.0, 0.9),
        ("norm.weight", "Adam", 0.3, 0, None),
    ]


REFUSED = [({"overrides": {"*.bias": {}, "stem.*": {"weight_decay": 0.0}}}, "stem"), ({"schedule": "step"}, "epochs")]
REFUSED += [({"optimizer_args": {"momentom": 0.9}}, "momentom"), ({"optimizer_args": {"lr": 0.9}}, "lr")]
REFUSED += [({"overrides": {"*.bias": {"weight_decai": 0}}}, "weight_decai"), ({"optimizer": "muon"}, "conv|matri")]
REFUSED += [({"overrides": {"*.bias": {"optimizer": "lion", "learning_rate": 0.1}}}, "lion")]
REFUSED += [({"overrides": {"*.bias": {"optimizer": "adam"}}}, "learning_rate")]


@pytest.mark.parametrize(("settings", "says"), REFUSED, ids=str)
def test_settings_that_would_do_nothing_or_break_later_are_refused(splits, settings, says):
    with each_forward() as calls, pytest.raises((ValueError, TypeError, KeyError), match=says):
        fit(Tiny, splits, recipe(**settings))
    assert not calls


WRONG = [*(("epochs", n) for n in (0, 1.5, True)), *(("learning_rate", r) for r in (math.nan, -0.1)), ("momentum", 0.9)]
WRONG += [("augmentation", None), ("batch_size", "128"), ("optimizer", "lion"), ("overrides", {"*.bias": 0.0})]
WRONG += [("label_smoothing", 1.0), ("image_sides", []), ("image_sides", [33]), ("precision", "half")]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_recipe_names_a_wrong_field(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        Recipe(**{"epochs": 1} | {field: value})


class AnySize(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def test_each_part_of_the_training_sees_images_of_its_own_size(splits, monkeypatch):
    sides, settings = [], recipe(epochs=5, image_sides=[8, 32])  # 200 images, 4 batches in an epoch

    def forward(model, x):
        if model.training and len(x) == 50:
            sides.append(x.shape[-1])
        return nn.Sequential.forward(model, x)

    monkeypatch.setattr(AnySize, "forward", forward)
    run = fit(AnySize, splits, settings)
    assert sides == [8] * 12 + [32] * 8
    forward = [2 * 27 * 8 * side**2 + 2 * 80 for side in (8, 32)]
    assert run.train_flops == 3 * 200 * (3 * forward[0] + 2 * forward[1])


FAST, AMD, INTEL = {"avx512_bf16": True, "amx_bf16": False}, {"cpu_name": "AMD EPYC"}, {"cpu_name": "Intel Xeon"}
AUTO = [("cuda", (7, 5), torch.float16), ("cuda", (8, 0), torch.bfloat16)]  # a T4, an A100
AUTO += [("cpu", FAST | AMD, torch.bfloat16), ("cpu", INTEL | {"amx_bf16": True}, torch.bfloat16)]
AUTO += [("cpu", FAST | INTEL, torch.float32), ("mps", FAST | AMD, torch.float32)]


@pytest.mark.parametrize(("device", "found", "expected"), AUTO)
def test_16_bits_where_they_are_fast(monkeypatch, device, found, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # what torch says of a T4, too
    monkeypatch.setattr(utils, "CPU", found)
    assert [utils.pick_precision(wanted, device) for wanted in ("auto", "float32")] == [expected, torch.float32]


def test_the_set_up_cell_can_be_changed_and_run_again(store, monkeypatch):
    monkeypatch.delenv("RUN_SIZE", raising=False)
    for train, size in (("quick", "quick"), (False, "full")):
        utils.describe_setup(train)
        assert (utils.run_size(), utils.replaying()) == (size, not train)
    with pytest.raises(ValueError, match="Full"):
        utils.describe_setup("Full")


@pytest.mark.parametrize(("cuda", "mps", "expected"), [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_fastest_device_is_picked(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device = utils.pick_device()
    assert device.type == expected
    assert {"cuda": "T4", "mps": "Apple", "cpu": "core"}[expected] in utils.describe_device()
    assert (utils.layout(device) == torch.channels_last) == (expected != "mps")


def test_a_first_float16_step_that_overflows_is_left_out_without_a_word(splits):
    """Losses are scaled by a number that is too large at first; torch halves it until the gradients are finite."""
    seen, settings = [], recipe(epochs=1, precision="float16", schedule="cosine", learning_rate=1e-4)

    def look(call, model, logits):
        assert logits.dtype == torch.float16 and model.head.weight.dtype == torch.float32
        seen.append(model.head.weight.detach().clone())
        return logits * 1000

    with each_forward(look), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(Tiny, splits, settings)
    assert torch.equal(seen[0], seen[1]) and not [str(warning.message) for warning in said]
