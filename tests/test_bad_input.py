"""Bad input, case by case: each public function names what is wrong, and nothing is trained or written."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny import Tiny, each_forward, recipe
from torch import nn

import my_utils as utils

fit = partial(utils.fit, plot=False, device="cpu")
IMAGES, LABELS = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10
GOOD = {"images": IMAGES, "labels": LABELS, "mean": (0.5,) * 3, "std": (0.25,) * 3}
LOGITS = torch.zeros(20, 10)
SPLIT = utils.Split(**GOOD)
MEAN = torch.full((1, 3, 1, 1), 0.5)
EVERYTHING = utils.Augmentation(2, "random", rotation=9, brightness=0.1, contrast=0.1, saturation=0.1, cutout=4)


def kept(store):
    """What a training leaves behind."""
    return [path for path in store.rglob("*") if path.suffix in (".json", ".pt", ".safetensors")]


# --- Settings ---


@pytest.mark.parametrize("size", ["tiny", "FULL", " full"])
def test_run_size(monkeypatch, size):
    monkeypatch.setenv("RUN_SIZE", size)
    with pytest.raises(ValueError, match=f"RUN_SIZE is '{size}'; it may be one of smoke, quick, full"):
        utils.by_size(smoke=1, quick=2, full=3)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "1e3", "many", " 2", "²"])
def test_seeds(monkeypatch, text):
    monkeypatch.setattr(utils.os, "environ", {"SEEDS": text})  # the real one holds no ² in an ASCII locale
    with pytest.raises(ValueError, match=f"SEEDS is '{text}'; it may be a whole number from 1 up"):
        utils.seeds()


NOTEBOOK = json.dumps({"cells": [{"source": ["raise SystemExit"], "metadata": {"tags": ["model"]}}]})


@pytest.mark.parametrize("name", ["../parts", "/parts", "sub/parts", "..\\parts", "", "..", "a:b"])
@pytest.mark.parametrize("address", ["", "http://127.0.0.1:9"])
def test_models_of_a_name_that_leads_elsewhere(root, name, address):
    """The module of a notebook in another folder would miss in the fingerprint, and one above would be run."""
    for folder in (root, root / "notebooks" / "sub"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "parts.ipynb").write_text(NOTEBOOK)
    with pytest.raises(ValueError, match=r"notebook is .*; it must be the name of a notebook, without folder"):
        utils.models_of(name, address)
    assert not (root / "build").exists()


@pytest.mark.parametrize("content", ["", "<html>", "[]", "{}", '{"cells": 3}', '{"cells": [{"source": "x"}]}'])
def test_models_of_what_is_no_notebook(root, content):
    (root / "parts.ipynb").write_text(content)
    with pytest.raises(ValueError, match=r"parts\.ipynb is no notebook .*; delete it"):
        utils.models_of("parts")
    assert not (root / "build").exists()


# --- Data ---


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


@pytest.mark.parametrize(
    ("index", "error", "says"),
    [
        (5, ValueError, r"images have shape \[3, 32, 32\]; it must be \[N, 3, 32, 32\]"),
        (slice(5, 5), ValueError, "the split is empty"),
        (LABELS > 9, ValueError, "the split is empty"),
        (torch.tensor([20]), IndexError, "index 20 is out of bounds"),
        (torch.ones(19, dtype=torch.bool), IndexError, r"shape of the mask \[19\]"),
    ],
)
def test_an_index_of_a_split(index, error, says):
    with pytest.raises(error, match=says):
        SPLIT[index]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": None}, r"\['NoneType', 'Split', 'Split'\]; they must be Split"),
        ({"test": None}, r"\['Split', 'Split', 'NoneType'\]; they must be Split"),
        ({"val": []}, r"\['Split', 'list', 'Split'\]; they must be Split"),
        ({"train": IMAGES}, r"\['Tensor', 'Split', 'Split'\]; they must be Split"),
    ],
)
def test_splits_of_different_kinds(changes, says):
    with pytest.raises(TypeError, match=says):
        utils.Splits(**{"train": SPLIT, "val": SPLIT, "test": SPLIT, "source": "synthetic"} | changes)


def test_head_of_a_split_that_lacks_a_class():
    split = utils.Split(**GOOD | {"labels": LABELS.clamp(max=8)})
    with pytest.raises(ValueError, match="count is 10; that is 1 of each class, and one has 0"):
        split.head(10)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"synthetic": "no"}, ValueError, "synthetic is 'no'; it may be one of None, True, False"),
        ({"root": 3}, TypeError, "int"),
        ({"sources": []}, utils.DataError, "could not be downloaded"),
        ({"sources": ["mirror"]}, utils.DataError, "mirror: Invalid URL 'mirror'"),
        ({"sources": "ab"}, utils.DataError, "a: Invalid URL 'a'.*\nb: Invalid URL 'b'"),
        ({"sources": ["http://"]}, utils.DataError, "Invalid URL 'http://'"),
        ({"sources": ["ftp://127.0.0.1/x"]}, utils.DataError, "127.0.0.1: No connection adapters"),
    ],
)
def test_loading(tmp_path, arguments, error, says):
    with pytest.raises(error, match=says):
        utils.load_cifar10(**{"root": tmp_path, "synthetic": False} | arguments)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (1.5, TypeError), ("0", TypeError), (None, TypeError), (math.nan, TypeError)]
)
def test_the_seed_of_a_drawing(seed, error):
    with pytest.raises(error, match=f"seed is {seed!r}"):
        utils.draw_synthetic(10, seed)


# --- Batches and augmentation ---


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"part": (2, 2)}, ValueError, r"part\[0\] is 2; it may be from 0 to 1"),
        ({"part": (-1, 2)}, ValueError, r"part\[0\] is -1; it may be from 0 to 1"),
        ({"part": (0.5, 2)}, TypeError, r"part\[0\] is 0.5 .* whole number"),
        ({"part": (0, 0)}, ValueError, r"part\[1\] is 0; it may be from 1"),
        ({"part": (0, "2")}, TypeError, r"part\[1\] is '2' .* whole number"),
        ({"seed": -1}, ValueError, "seed is -1; it may be from 0"),
        ({"seed": 1.5}, TypeError, "seed is 1.5 .* whole number"),
        ({"seed": "0"}, TypeError, "seed is '0' .* whole number"),
        ({"seed": True}, TypeError, "seed is True .* whole number"),
        ({"seed": 0, "epoch": -1}, ValueError, "epoch is -1; it may be from 0"),
        ({"seed": 0, "epoch": 1.5}, TypeError, "epoch is 1.5 .* whole number"),
        ({"seed": 0, "epoch": None}, TypeError, "epoch is None .* whole number"),
        (
            {"seed": 0, "augmentation": {"crop": 2}},
            TypeError,
            "augmentation is {'crop': 2}; it must be an Augmentation",
        ),
    ],
)
def test_batches(arguments, error, says):
    with pytest.raises(error, match=says):
        next(utils.batches(SPLIT, 8, **arguments))


def test_more_parts_than_images():
    """Unusual, but there is a right answer."""
    parts = [torch.cat([labels for _, labels in utils.batches(SPLIT, 20, part=(k, 30))]) for k in range(30)]
    assert torch.equal(torch.cat(parts), LABELS)


@pytest.mark.parametrize(
    ("batch_size", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_steps_per_epoch(batch_size, error):
    with pytest.raises(error, match=f"batch_size is {batch_size}"):
        utils.steps_per_epoch(10, batch_size)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((-1, 0, 0), RuntimeError, "negative dimension -1"),
        ((5, -1, 0), ValueError, "seed is -1"),
        ((5, None, 0), TypeError, "seed is None"),
        ((5, 0, -1), ValueError, "epoch is -1"),
        ((5, 0, 1.5), TypeError, "epoch is 1.5"),
    ],
)
@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_augmentation_draws(flip, arguments, error, says):
    with pytest.raises(error, match=says):
        utils.Augmentation(flip=flip).draw(*arguments)


@pytest.mark.parametrize(
    ("images", "draws", "error", "says"),
    [
        (IMAGES[:5], 5, ValueError, r"images are torch\.uint8 \[5, 3, 32, 32\]; they must be float \[N, 3, 32, 32\]"),
        (torch.zeros(3, 32, 32), 1, ValueError, r"images are torch\.float32 \[3, 32, 32\]"),
        (torch.zeros(5, 32, 32, 3), 5, ValueError, r"images are torch\.float32 \[5, 32, 32, 3\]"),
        (torch.zeros(5, 1, 32, 32), 5, ValueError, r"images are torch\.float32 \[5, 1, 32, 32\]"),
        (torch.zeros(5, 3, 64, 64), 5, ValueError, r"images are torch\.float32 \[5, 3, 64, 64\]"),
        (torch.zeros(5, 3, 32, 32), 4, RuntimeError, "size of tensor"),
        (torch.zeros(5, 3, 32, 32, device="meta"), 5, RuntimeError, "device"),
    ],
)
@pytest.mark.parametrize("augmentation", [utils.Augmentation(flip="random"), EVERYTHING], ids=["flip", "everything"])
def test_augmentation(augmentation, images, draws, error, says):
    with pytest.raises(error, match=says):
        augmentation(images, augmentation.draw(draws, 0, 0), MEAN)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_image_that_is_not_finite_spoils_no_other(seeded, bad):
    images = torch.rand(5, 3, 32, 32)
    spoilt, draws = images.clone(), EVERYTHING.draw(5, 0, 0)
    spoilt[2] = bad
    assert torch.equal(EVERYTHING(spoilt, draws, MEAN)[[0, 1, 3, 4]], EVERYTHING(images, draws, MEAN)[[0, 1, 3, 4]])


# --- Training ---


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"label_smoothing": 1}, ValueError, "label_smoothing is 1; it may be from 0 to 0.99"),
        ({"weight_averaging": 1.0}, ValueError, "weight_averaging is 1.0; it may be from 0 to 0.99999"),
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
    ("steps", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), ("9", TypeError), (math.nan, TypeError)]
)
@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
def test_a_schedule_of_no_steps(schedule, steps, error):
    settings = recipe(schedule=schedule)
    [optimizer] = utils.build_optimizers(Tiny(), settings)
    with pytest.raises(error, match=f"steps is {steps!r}"):
        utils.build_scheduler(optimizer, settings, steps)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_by_its_name(device):
    """Unusual, but there is a right answer."""
    assert utils.describe_device(device) == utils.describe_device(torch.device("cpu"))
    assert utils.pick_precision("auto", device) == utils.pick_precision("auto", torch.device("cpu"))
    for act in (utils.describe_device, partial(utils.pick_precision, "auto")):
        with pytest.raises(RuntimeError, match="device string: gpu"):
            act("gpu")


@pytest.mark.parametrize(
    ("changes", "settings", "says"),
    [
        ({}, {"optimizer_args": {"lr": 0.5}}, "optimizer 'sgd' cannot take {'lr': 0.5}: .*multiple values"),
        ({}, {"overrides": {"*.bias": {"lr": 0.5}}}, "optimizer 'sgd' cannot take {'lr': 0.5}: .*multiple values"),
        ({}, {"optimizer_args": {"params": []}}, r"optimizer 'sgd' cannot take {'params': \[\]}: .*multiple values"),
        ({}, {"optimizer_args": {"momentum": -1}}, "cannot take {'momentum': -1}: Invalid momentum"),
        ({}, {"overrides": {"*.bias": {"weight_decay": -1}}}, "cannot take {'weight_decay': -1}: Invalid weight_decay"),
        ({}, {"optimizer_args": {"momentum": "0.9"}}, "cannot take {'momentum': '0.9'}: "),
        ({}, {"optimizer": "muon"}, "optimizer 'muon' cannot take {}: Muon only supports 2D parameters"),
        ({}, {"schedule": "onecycle", "schedule_args": {"pct_start": 1.5}}, "pct_start"),
        ({}, {"schedule": "onecycle", "schedule_args": {"anneal_strategy": "x"}}, "anneal_strategy must be one of"),
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
    assert not kept(store)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"device": "meta"}, RuntimeError, "meta tensors"),
        ({"device": "gpu"}, RuntimeError, "device string: gpu"),
        ({"recipe": recipe(learning_rate=1e300)}, RuntimeError, "without overflow"),
        ({"recipe": recipe(optimizer_args={"momentum": math.nan})}, FloatingPointError, "the loss is nan at step 2"),
        ({"recipe": recipe(optimizer_args={"weight_decay": math.inf})}, FloatingPointError, "the loss is nan at step"),
        ({"probe": lambda model: {"a": math.nan}}, ValueError, "probe returned {'a': nan}; its numbers must be finite"),
        ({"probe": lambda model: 1.0}, TypeError, "probe returned 1.0; it must return a dict of numbers"),
    ],
)
def test_fit_keeps_nothing(splits, store, arguments, error, says):
    with pytest.raises(error, match=says):
        fit(**{"build_model": Tiny, "splits": splits, "recipe": recipe(), "run": "test/bad"} | arguments)
    assert not kept(store)


class Answer(nn.Module):
    """A linear model, and what becomes of its logits."""

    def __init__(self, change, outputs=10):
        super().__init__()
        self.linear, self.change = nn.Linear(3072, outputs), change

    def forward(self, x):
        return self.change(self.linear(x.flatten(1)))


@pytest.mark.parametrize(
    ("change", "outputs", "says"),
    [
        (nn.Identity(), 9, r"\[50, 9\] for 50 images"),
        (nn.Identity(), 11, r"\[50, 11\] for 50 images"),
        (nn.Identity(), 1000, r"\[50, 1000\] for 50 images"),
        (lambda logits: logits.argmax(1), 10, r"\[50\] for 50 images"),
        (lambda logits: logits[:, :, None], 10, r"\[50, 10, 1\] for 50 images"),
        (lambda logits: logits.flatten(), 10, r"\[500\] for 50 images"),
        (lambda logits: logits[:1], 10, r"\[1, 10\] for 50 images"),
        (lambda logits: (logits, logits), 10, r"\['tuple'\] for 50 images"),
        (lambda logits: None, 10, r"\['NoneType'\] for 50 images"),
    ],
)
def test_logits_of_another_shape(splits, store, change, outputs, says):
    """Without a validation split nothing else would look at them."""
    says = rf"the model's logits are {says}; they must be \[N, 10\]"
    with each_forward(kind=Answer) as calls, pytest.raises(ValueError, match=says):
        fit(lambda: Answer(change, outputs), splits.with_val_in_train(), recipe(), run="test/bad")
    assert calls == [0] and not kept(store)  # the first batch, and no step
    with pytest.raises(ValueError, match=says):
        utils.predict(Answer(change, outputs), splits.test[:50])


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
        (LOGITS.numpy(), LABELS.numpy(), r"labels are int64, 0 to 9; they must be torch\.int64"),
    ],
)
def test_score(logits, labels, says):
    with pytest.raises(ValueError, match=says):
        utils.score(logits, labels)


@pytest.mark.parametrize("batch_size", [0, -5])
def test_predict(splits, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        utils.predict(Tiny(), splits.test, batch_size=batch_size)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: None, TypeError, r"model is None; it must be an nn\.Module"),
        (lambda: Tiny, TypeError, r"model is <class 'tiny\.Tiny'>; it must be an nn\.Module"),
        (lambda: len, TypeError, r"model is <built-in function len>; it must be an nn\.Module"),
        (lambda: Tiny().to("meta"), RuntimeError, "meta tensors"),
        (lambda: Tiny().double(), RuntimeError, "should be the same"),
        (lambda: Answer(lambda logits: logits / 0), ValueError, "logits hold values that are not finite"),
        (lambda: Answer(nn.Identity(), 12), ValueError, r"logits are \[100, 12\] .* must be \[N, 10\]"),
    ],
)
def test_evaluate(splits, build, error, says):
    model = build()
    with pytest.raises(error, match=says):
        utils.evaluate(model, splits.test, precision="float32")


@pytest.mark.parametrize("data", [None, IMAGES, (IMAGES, LABELS), "splits"])
def test_evaluate_on_what_is_no_split(splits, data):
    with pytest.raises(TypeError, match=r"split is a (NoneType|Tensor|tuple|Splits); it must be a Split"):
        utils.evaluate(Tiny(), splits if data == "splits" else data)


def test_flops_of_what_takes_no_images():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Dropout())
    with pytest.raises(RuntimeError, match="to have 1 channels, but got 3 channels"):
        utils.count_flops(model)
    assert all(module.training for module in model.modules())
    assert utils.count_flops(Tiny().to("meta")) == utils.count_flops(Tiny())  # needs no values


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
        ({"published_epochs": -1}, "published_epochs is -1; it may be from 0"),
        ({"published_epochs": math.nan}, "published_epochs is nan"),
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


GOOD_SEED = {"val_top1": 0.5, "test_top1": 0.5, "train_seconds": 1.0}
GOOD_RECORD = {
    "name": "tiny",
    "data": "cifar10",
    "epochs": 10,
    "parameters": 1,
    "train_flops": 1e9,
    "published_top1": None,
    "seeds": [GOOD_SEED],
}


@pytest.mark.parametrize(
    ("records", "error", "says"),
    [
        (GOOD_RECORD, ValueError, "records is a dict; a table needs a list of at least one"),
        ({"tiny": GOOD_RECORD}, ValueError, "records is a dict"),
        ([GOOD_RECORD | {"seeds": []}], ValueError, "values is empty"),
        ([GOOD_RECORD | {"seeds": [{"val_top1": 0.5}]}], ValueError, "a seed of tiny lacks test_top1, train_seconds"),
        ([{"name": "tiny"}], ValueError, "the record lacks seeds, published_top1, epochs"),
        ([GOOD_RECORD | {"parameters": None}], TypeError, "NoneType"),
        ([GOOD_RECORD | {"published_top1": "94 %"}], ValueError, "type 'str'"),
    ],
)
def test_results_table(records, error, says):
    with pytest.raises(error, match=says):
        utils.results_table(records)


def test_an_accuracy_that_is_not_finite_is_seen():
    assert utils.percent([math.nan]) == "nan" and utils.percent([0.5, math.nan]) == "nan ± nan"
    table = utils.results_table([GOOD_RECORD | {"seeds": [GOOD_SEED | {"test_top1": math.nan}]}])
    assert table["test top-1 %"].tolist() == ["nan"]


# --- The run store as a file ---


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda folder: utils.unpack_runs(folder / "missing.zip"), r"missing\.zip"),
        (lambda folder: utils.unpack_runs(folder), "director|denied"),
        (lambda folder: utils.pack_runs(folder), "cannot write .*; what was there before is unchanged"),
    ],
    ids=["missing", "folder", "to a folder"],
)
def test_packs(tmp_path, store, act, says):
    (tmp_path / "here").mkdir()
    with pytest.raises(OSError, match=says):
        act(tmp_path / "here")
    assert not list((tmp_path / "here").iterdir()) and not kept(store)


def test_an_empty_store_can_be_packed(tmp_path, store):
    assert utils.unpack_runs(utils.pack_runs(tmp_path / "runs.zip")) == []


# --- Plots ---

TEN = utils.CIFAR10_CLASSES
FLIP = utils.Augmentation(flip="random")


def of(*curves):
    """A record with these curves, one per seed."""
    return {"tiny": {"seeds": [{"history": {"val_top1": curve, "seconds": curve}} for curve in curves]}}


@pytest.mark.parametrize(
    ("records", "curve", "error", "says"),
    [
        (of([0.1], [0.1, 0.2]), "val_top1", ValueError, r"val_top1 of tiny has \[1, 2\] values; each seed"),
        (of([], []), "val_top1", ValueError, r"val_top1 of tiny has \[0\] values"),
        (of(), "val_top1", ValueError, r"val_top1 of tiny has \[\] values"),
        (of([0.1]), "vall_top1", ValueError, "curve is 'vall_top1'; it may be one of step_loss, "),
        (of([1.0]), "seconds", ValueError, "curve is 'seconds'"),
        ([of([0.1])["tiny"]], "val_top1", TypeError, "records is a list; it must be a dict of records by their labels"),
    ],
)
def test_plot_curves(records, curve, error, says):
    with pytest.raises(error, match=says):
        utils.plot_curves(records, curve, "a title")


@pytest.mark.parametrize(
    ("confusion", "classes", "says"),
    [
        (np.eye(3), TEN, r"confusion is \[3, 3\] for 10 classes; it must be finite counts \[10, 10\] for ten"),
        (np.ones((3, 10)), TEN, r"confusion is \[3, 10\]"),
        (np.ones(10), TEN, r"confusion is \[10\]"),
        ([], TEN, r"confusion is \[0\]"),
        (None, TEN, r"confusion is \[\]"),
        (np.eye(10) * math.nan, TEN, "it must be finite counts"),
        (np.where(np.eye(10), math.inf, 0), TEN, "it must be finite counts"),
        (-np.eye(10), TEN, "it must be finite counts"),
        (np.eye(10), TEN[:9], r"confusion is \[10, 10\] for 9 classes"),
        ([[1, 2], [3]], TEN, "inhomogeneous"),
    ],
)
def test_plot_confusion(confusion, classes, says):
    with pytest.raises(ValueError, match=says):
        utils.plot_confusion(confusion, classes)


RIGHT = utils.score(nn.functional.one_hot(LABELS, 10).float(), LABELS)
NO_PICTURES = "the number of pictures is .*; it may be from 1 to 1000"


@pytest.mark.parametrize(
    ("plot", "says"),
    [
        (lambda: utils.plot_mistakes(RIGHT, SPLIT[:15], TEN), "evaluation has other labels than the split"),
        (lambda: utils.plot_mistakes(RIGHT, SPLIT[1:], TEN), "evaluation has other labels than the split"),
        (lambda: utils.plot_mistakes(RIGHT, replace(SPLIT, labels=9 - LABELS), TEN), "evaluation has other labels"),
        (lambda: utils.plot_mistakes(RIGHT, SPLIT, TEN, count=0), NO_PICTURES),
        (lambda: utils.plot_mistakes(RIGHT, SPLIT, TEN, count=-7), NO_PICTURES),
        (lambda: utils.plot_mistakes(RIGHT, SPLIT, TEN, count=10**9), NO_PICTURES),
        (lambda: utils.plot_classes(SPLIT, TEN, per_class=0), NO_PICTURES),
        (lambda: utils.plot_classes(SPLIT, TEN, per_class=-1), NO_PICTURES),
        (lambda: utils.plot_classes(SPLIT, TEN, per_class=10**9), NO_PICTURES),
        (lambda: utils.plot_augmentation(SPLIT, FLIP, count=0), NO_PICTURES),
        (lambda: utils.plot_augmentation(SPLIT, FLIP, epochs=-1), NO_PICTURES),
        (lambda: utils.plot_augmentation(SPLIT, FLIP, epochs=10**9), NO_PICTURES),
        (lambda: utils.plot_history(utils.History(), math.nan, "a title"), "cannot be NaN or Inf"),
    ],
)
def test_plots(plot, says):
    with pytest.raises(ValueError, match=says):
        plot()


@pytest.mark.parametrize("loss", [[math.nan], [2.0, math.nan]])
def test_a_loss_that_is_not_finite_leaves_a_gap(loss):
    left, _ = utils.plot_history(utils.History(step_loss=loss), 1, "a title").axes
    assert left.get_ylim() == (0, 2.5)


def test_fewer_pictures_than_asked_for():
    """Unusual, but there is a right answer."""
    one = SPLIT[:1]
    assert [bool(axes.images) for axes in utils.plot_augmentation(one, FLIP, epochs=2).axes] == [True] * 3
    assert [bool(axes.images) for axes in utils.plot_classes(one, TEN, per_class=2).axes] == [True] + [False] * 19
    assert not any(axes.images for axes in utils.plot_mistakes(RIGHT, SPLIT, TEN).axes)


@pytest.mark.parametrize("alt", ["", "  ", None])
def test_show_asks_for_words(alt):
    with pytest.raises(ValueError, match=r"alt is .*; it must say in words what the figure shows"):
        utils.show(utils.plot_history(utils.History(), 1, "a title"), alt=alt)


@pytest.mark.parametrize("save", ["../out", "/out", "a\\b", 3])
def test_show_saves_nothing(root, save):
    figure = utils.plot_history(utils.History(), 1, "a title")
    with pytest.raises(ValueError, match=r"save is .*; it must be a name"):
        utils.show(figure, alt="A", save=save)
    assert not (root / "build").exists()
