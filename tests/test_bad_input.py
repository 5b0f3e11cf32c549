"""Bad input, case by case: each public function names what is wrong, and nothing is trained or written."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import Tiny, each_forward, recipe
from torch import nn

import my_utils as utils

fit = partial(utils.fit, plot=False, device="cpu")
IMAGES, LABELS = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10
GOOD = {"images": IMAGES, "labels": LABELS, "mean": (0.5,) * 3, "std": (0.25,) * 3}
LOGITS = torch.zeros(20, 10)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"images": [1, 2]}, TypeError, "images are list; they must be torch.uint8"),
        ({"images": IMAGES.numpy()}, TypeError, "images are uint8; they must be torch.uint8"),
        ({"images": IMAGES.float() * math.nan}, TypeError, r"images are torch\.float32"),
        ({"images": IMAGES.float() + math.inf}, TypeError, r"images are torch\.float32"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, ValueError, "the split is empty"),
        ({"labels": LABELS.tolist()}, TypeError, r"labels are list; they must be torch\.int64"),
        ({"labels": LABELS + 1}, ValueError, "labels go from 1 to 10"),
        ({"images": IMAGES.to("meta")}, ValueError, "images are on meta, labels on cpu"),
        ({"mean": (0.5, 0.5)}, ValueError, r"mean is \(0.5, 0.5\); it must be three finite numbers"),
        ({"mean": (0.5, 0.5, math.nan)}, ValueError, "mean is .*three finite numbers"),
        ({"std": (0.25, 0.25, 0.0)}, ValueError, "std is .*above 0"),
        ({"std": (0.25, 0.25, -0.1)}, ValueError, "std is .*above 0"),
        ({"std": (0.25, 0.25, math.inf)}, ValueError, "std is .*finite"),
    ],
)
def test_a_split(changes, error, says):
    with pytest.raises(error, match=says):
        utils.Split(**GOOD | changes)


def test_head_of_a_split_that_lacks_a_class():
    split = utils.Split(**GOOD | {"labels": LABELS.clamp(max=8)})
    with pytest.raises(ValueError, match="count is 10; that is 1 of each class, and one has 0"):
        split.head(10)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"epochs": 10**9}, ValueError, "epochs is 1000000000; it may be from 1 to 100000"),
        ({"batch_size": 10**30}, ValueError, "batch_size is 10+; it may be from 1 to 1000000"),
        ({"optimizer_args": {"learning_rate": 0.3}}, ValueError, "optimizer_args holds .* fields of their own"),
        ({"optimizer_args": {"optimizer": "adam"}}, ValueError, "optimizer_args holds .* fields of their own"),
        ({"overrides": {"*": {"learning_rate": -1}}}, ValueError, r"overrides\['\*'\]\['learning_rate'\] is -1"),
        ({"overrides": {"*": {"learning_rate": math.nan}}}, ValueError, r"overrides\['\*'\]\['learning_rate'\] is nan"),
        ({"schedule_args": {"gamma": 0.1}}, ValueError, "argument of schedule constant is 'gamma'"),
        ({"schedule": "cosine", "schedule_args": {"gamma": 1}}, ValueError, "schedule cosine is 'gamma'; .* eta_min"),
        ({"schedule": "cosine", "schedule_args": {"eta_min": -1}}, ValueError, r"schedule_args\['eta_min'\] is -1"),
        ({"schedule": "step", "schedule_args": {"epochs": 1, "gamma": -0.1}}, ValueError, r"\['gamma'\] is -0.1"),
        ({"schedule": "step", "schedule_args": {"epochs": 1, "gamma": "0.1"}}, TypeError, r"\['gamma'\] is '0.1'"),
        ({"schedule": "onecycle", "schedule_args": {"div_factor": 0}}, ValueError, r"\['div_factor'\] is 0"),
        ({"schedule": "onecycle", "schedule_args": {"max_lr": 1}}, ValueError, "schedule onecycle is 'max_lr'"),
    ],
)
def test_a_recipe(settings, error, says):
    with pytest.raises(error, match=says):
        recipe(**settings)


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({}, {"optimizer_args": {"lr": 0.5}}, "optimizer 'sgd' cannot take {'lr': 0.5}: .*multiple values"),
        ({}, {"overrides": {"*.bias": {"lr": 0.5}}}, "optimizer 'sgd' cannot take {'lr': 0.5}: .*multiple values"),
        ({}, {"optimizer_args": {"params": []}}, r"optimizer 'sgd' cannot take {'params': \[\]}: .*multiple values"),
        ({}, {"optimizer_args": {"momentum": -1}}, "cannot take {'momentum': -1}: Invalid momentum"),
        ({}, {"overrides": {"*.bias": {"weight_decay": -1}}}, "cannot take {'weight_decay': -1}: Invalid weight_decay"),
        ({}, {"schedule": "onecycle", "schedule_args": {"pct_start": 1.5}}, "pct_start"),
        ({"run": "../out"}, {}, r"run is '\.\./out'; it must be a name"),
        ({"run": "/tmp/out"}, {}, "run is '/tmp/out'; it must be a name"),
        ({"run": ""}, {}, "run is ''; it must be a name"),
        ({"run": "a\\b"}, {}, "run is .*; it must be a name"),
        ({"run": None}, {}, "run is None; it must be a name"),
        ({"seed": 2**64}, {}, "seed is 18446744073709551616; it may be from 0"),
        ({"build_model": nn.Flatten}, {}, "optimizer is 'sgd'"),
    ],
)
def test_fit_trains_nothing(splits, store, changes, settings, says):
    arguments = {"build_model": Tiny, "run": "test/bad"} | changes
    with each_forward() as calls, pytest.raises(ValueError, match=says):
        fit(arguments.pop("build_model"), splits, recipe(**settings), **arguments)
    assert calls == []
    assert not [path for path in store.rglob("*") if path.suffix in (".json", ".pt", ".safetensors")]


def test_splits_of_one_image_and_a_batch_larger_than_all(splits, store):
    """Unusual, but there is a right answer."""
    one = replace(splits, val=splits.val[:1], test=splits.test[:1])
    run = fit(Tiny, one, recipe(batch_size=1_000_000), run="test/huge")
    assert len(run.history.step_loss) == 2 and run.history.val_top1[-1] in (0.0, 1.0)
    assert utils.evaluate(run.model, one.test).logits.shape == (1, 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    assert len(fit(lambda: model, replace(one, train=splits.train[:1]), recipe(), run="test/one").history.seconds) == 2


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (LOGITS, LABELS[:0], r"logits are \[20, 10\], labels \[0\]"),
        (LOGITS[:0], LABELS[:0], "N > 0"),
        (LOGITS[:, :9], LABELS, r"logits are \[20, 9\]"),
        (LOGITS[0], LABELS, r"logits are \[10\]"),
        (LOGITS * math.nan, LABELS, "not finite"),
        (LOGITS - math.inf, LABELS, "not finite"),
        (LOGITS, LABELS + 1, r"labels are torch\.int64, 1 to 10"),
        (LOGITS, LABELS - 1, r"labels are torch\.int64, -1 to 8"),
        (LOGITS, LABELS.float(), r"labels are torch\.float32"),
    ],
)
def test_score(logits, labels, says):
    with pytest.raises(ValueError, match=says):
        utils.score(logits, labels)


@pytest.mark.parametrize("batch_size", [0, -5])
def test_predict(splits, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        utils.predict(Tiny(), splits.test, batch_size=batch_size)


def test_a_model_without_parameters_can_predict(splits):
    def constant(x):
        return x.flatten(1)[:, :10]

    model = nn.Module()
    model.forward = constant
    assert utils.predict(model, splits.test, precision="float32").shape == (100, 10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "../tiny"}, r"name is '\.\./tiny'"),
        ({"name": ""}, "name is ''"),
        ({"published_top1": 94.36}, "published_top1 is 94.36; it may be from 0 to 1"),
        ({"published_top1": math.nan}, "published_top1 is nan"),
        ({"source": "cifar10"}, "the runs were trained on synthetic, but splits are cifar10"),
        ({"tta": "rotate"}, "tta is 'rotate'"),
    ],
)
def test_record_writes_nothing(root, splits, arguments, says):
    run = fit(Tiny, splits, recipe(), run="test/tiny")
    arguments = {"name": "tiny", "notebook": "01"} | arguments
    data = replace(splits, source=arguments.pop("source", "synthetic"))
    with pytest.raises(ValueError, match=says):
        utils.record(arguments.pop("name"), [run], data, **arguments)
    assert not (root / "build").exists()


@pytest.mark.parametrize(
    ("act", "says"), [(utils.results_table, "records is empty"), (utils.percent, "values is empty")]
)
def test_empty_tables(act, says):
    with pytest.raises(ValueError, match=says):
        act([])
