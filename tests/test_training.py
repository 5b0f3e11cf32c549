"""Recipes, optimizers, schedules and the training loop, against values worked out by hand."""

import json
import math
import platform
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import pytest
import torch
from tiny import Tiny, assert_same, each_forward, recipe
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import my_utils
from my_utils import Augmentation, Recipe, batches, build_optimizers, build_scheduler, evaluate, pick_precision

fit = partial(my_utils.fit, run="test/tiny", plot=False)
pytestmark = pytest.mark.usefixtures("store")
MUON = {"learning_rate": 0.02, "weight_decay": 0.1}
REST = {"optimizer": "adamw", "learning_rate": 0.01}


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


def first_weights(build_model, seed=0):
    """Return the weights that a model starts training with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model().state_dict()


def checkpoint_of(store):
    [path] = store.glob("**/checkpoint.pt")
    return torch.load(path, weights_only=True)


# --- Recipe ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"augmentation": Augmentation(crop=4, flip="alternating", rotation=15, cutout=8)},
        {"optimizer": "adamw", "optimizer_args": {"weight_decay": 0.05, "betas": [0.9, 0.99]}, "label_smoothing": 0.1},
        {"schedule": "step", "schedule_args": {"epochs": 10, "gamma": 0.1}, "weight_averaging": 0.99},
        {"optimizer": "muon", "overrides": {"*.bias": REST, "conv.*": {"weight_decay": 0.0}}, "precision": "bfloat16"},
    ],
)
def test_recipe_survives_json(settings):
    before = Recipe(epochs=3, **settings)
    after = Recipe(**json.loads(json.dumps(asdict(before))))
    assert after == before
    assert isinstance(after.augmentation, Augmentation)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0; it may be from 1"),
        ({"epochs": 1.5}, TypeError, r"epochs is 1.5 \(float\); it must be"),
        ({"epochs": True}, TypeError, r"epochs is True \(bool\); it must be"),
        ({"batch_size": 0}, ValueError, "batch_size is 0; it may be from 1"),
        ({"batch_size": "128"}, TypeError, r"batch_size is '128' \(str\); it must be"),
        (
            {"optimizer": "lion"},
            ValueError,
            "optimizer is 'lion'; it may be one of sgd, adam, adamw, muon, normalized_muon",
        ),
        ({"optimizer": ["sgd"]}, ValueError, "optimizer is .* one of sgd"),
        ({"optimizer_args": None}, TypeError, "optimizer_args is None"),
        ({"learning_rate": -0.1}, ValueError, "learning_rate is -0.1; it may be from 0"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate is nan; it may be from 0"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate is inf; it may be from 0"),
        ({"learning_rate": None}, TypeError, "learning_rate is None .* must be a number"),
        ({"overrides": None}, TypeError, "overrides is None"),
        ({"overrides": {"*.bias": 0.0}}, TypeError, r"overrides\['\*\.bias'\] is 0.0"),
        ({"overrides": {"a": {"optimizer": "lion", "learning_rate": 1}}}, ValueError, r"overrides\['a'\].* one of sgd"),
        ({"overrides": {"a": {"optimizer": "sgd"}}}, TypeError, r"overrides\['a'\]\['learning_rate'\] is None"),
        ({"schedule": "linear"}, ValueError, "schedule is 'linear'; it may be one of constant, step, cosine, onecycle"),
        ({"schedule": "step"}, TypeError, r"schedule_args\['epochs'\] is None .* must be a whole number"),
        ({"schedule": "step", "schedule_args": {"epochs": 0}}, ValueError, r"schedule_args\['epochs'\] is 0; .*from 1"),
        ({"schedule_args": None}, TypeError, "schedule_args is None"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; it may be from 0 to 0.99"),
        ({"augmentation": "flip"}, TypeError, "augmentation is 'flip'; it must be an Augmentation"),
        ({"augmentation": {"crop": 17}}, ValueError, "crop is 17; it may be from 0 to 16"),
        ({"weight_averaging": 1.1}, ValueError, "weight_averaging is 1.1; it may be from 0 to 0.99999"),
        ({"weight_averaging": "0.9"}, TypeError, "weight_averaging is '0.9' .* must be a number"),
        ({"precision": "half"}, ValueError, "precision is 'half'; it may be one of auto, float32, bfloat16, float16"),
    ],
)
def test_recipe_names_a_bad_argument(settings, error, says):
    with pytest.raises(error, match=says):
        Recipe(**{"epochs": 1} | settings)


# --- Optimizers ---


def options_of(model, optimizers):
    """Return {parameter name: (optimizer class, its group)}, having checked that each parameter is there once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(p)], (type(o), g)) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_overrides_change_the_parameters_they_fit_and_the_last_wins():
    model = Tiny()
    overrides = {"*.bias": {"weight_decay": 0.0}, "head.*": {"learning_rate": 0.5, "weight_decay": 0.25}}
    found = options_of(
        model,
        build_optimizers(model, recipe(optimizer_args={"momentum": 0.9, "weight_decay": 0.1}, overrides=overrides)),
    )
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert {group["momentum"] for _, group in found.values()} == {0.9}
    rates_and_decays = {name: (group["lr"], group["weight_decay"]) for name, (_, group) in found.items()}
    assert rates_and_decays == {
        "conv.weight": (0.05, 0.1),
        "conv.bias": (0.05, 0.0),
        "norm.weight": (0.05, 0.1),
        "norm.bias": (0.05, 0.0),
        "head.weight": (0.5, 0.25),
        "head.bias": (0.5, 0.25),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "muon", "overrides": dict.fromkeys(["conv.*", "norm.*", "*.bias"], REST)},
        {"optimizer": "adamw", "overrides": {"head.weight": {"optimizer": "muon", **MUON}}},
    ],
)
def test_muon_takes_the_matrices_and_the_second_optimizer_the_rest(settings):
    model = Tiny()
    optimizers = build_optimizers(model, recipe(**settings))
    assert type(optimizers[0]) is my_utils.OPTIMIZERS[settings["optimizer"]]
    found = options_of(model, optimizers)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert found[name][0] is (my_utils.Muon if parameter.ndim == 2 else torch.optim.AdamW), name


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32, torch.float16])
def test_muon_steps_as_torchs_does_in_the_number_type_that_is_fast(monkeypatch, seeded, fast):
    monkeypatch.setattr(my_utils, "pick_precision", lambda device: fast)
    first, gradients = torch.randn(6, 20), torch.randn(3, 6, 20)
    weights, multiplied = {}, set()

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                multiplied.add(args[-1].dtype)
            return function(*args, **(kwargs or {}))

    for kind in (torch.optim.Muon, my_utils.Muon):
        weights[kind] = nn.Parameter(first.clone())
        optimizer = kind([weights[kind]], lr=0.1, weight_decay=0.1)
        multiplied.clear()
        for gradient in gradients:
            weights[kind].grad = gradient.clone()
            with Look():
                optimizer.step()
            assert torch.equal(weights[kind].grad, gradient)
    assert multiplied == {torch.bfloat16 if fast == torch.bfloat16 else torch.float32}
    torch.testing.assert_close(weights[my_utils.Muon], weights[torch.optim.Muon], rtol=0, atol=0.01)
    assert (weights[my_utils.Muon] - first).abs().max() > 0.1


def test_normalized_muon_steps_as_muon_and_keeps_the_norm(seeded):
    first, gradient, weights = torch.randn(6, 20), torch.randn(6, 20), {}
    for kind in (my_utils.Muon, my_utils.NormalizedMuon):
        weights[kind] = nn.Parameter(first.clone())
        optimizer = kind([weights[kind]], lr=0.1, weight_decay=0.0)
        weights[kind].grad = gradient.clone()
        optimizer.step()
    stepped = weights[my_utils.Muon].detach()
    torch.testing.assert_close(weights[my_utils.NormalizedMuon].detach(), stepped * 6**0.5 / stepped.norm())
    zero = nn.Parameter(torch.zeros(6, 20))
    zero.grad = torch.zeros(6, 20)
    my_utils.NormalizedMuon([zero], lr=0.1).step()
    assert torch.equal(zero.detach(), torch.zeros(6, 20))


def test_another_optimizer_brings_its_own_arguments():
    model = Tiny()
    overrides = {"norm.*": {"optimizer": "adam", "learning_rate": 0.003}}
    optimizers = build_optimizers(model, recipe(optimizer_args={"weight_decay": 0.1}, overrides=overrides))
    kind, group = options_of(model, optimizers)["norm.weight"]
    assert (kind, group["lr"], group["weight_decay"]) == (torch.optim.Adam, 0.003, 0)


def test_frozen_parameters_are_left_out():
    model = Tiny()
    model.conv.requires_grad_(False)
    found = options_of(model, build_optimizers(model, recipe()))
    assert found.keys() == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"overrides": {"*.bias": {}, "stem.*": {"weight_decay": 0.0}}}, r"overrides has \['stem\.\*'\]"),
        ({"overrides": {"*": {"optimizer": "adam", "learning_rate": 0.1}}}, "optimizer is 'sgd', but .* no parameter"),
        ({"optimizer_args": {"momentom": 0.9}}, "momentom"),
        ({"overrides": {"*.bias": {"weight_decai": 0.0}}}, "weight_decai"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        build_optimizers(Tiny(), recipe(**settings))


# --- Schedules ---

TURN = [(1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]  # half a cosine wave, from 1 down to almost 0
UP = [(1 - math.cos(math.pi * step / 2)) / 2 for step in range(3)]  # a quarter of 12 steps, the last at the peak
DOWN = [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(1, 10)]


@pytest.mark.parametrize(
    ("schedule", "arguments", "expected"),
    [
        ("constant", {}, [0.2] * 12),
        ("step", {"epochs": 1, "gamma": 0.1}, [0.2] * 4 + [0.02] * 4 + [0.002] * 4),
        ("step", {"epochs": 2, "gamma": 0.5}, [0.2] * 8 + [0.1] * 4),
        ("cosine", {}, [0.2 * part for part in TURN]),
        ("cosine", {"eta_min": 0.1}, [0.1 + 0.1 * part for part in TURN]),
        (
            "onecycle",
            {"pct_start": 0.25, "div_factor": 4, "final_div_factor": 10},  # from 0.05 up to 0.2, then down to 0.005
            [0.05 + 0.15 * part for part in UP] + [0.005 + 0.195 * part for part in DOWN],
        ),
    ],
)
def test_learning_rate_of_every_step(splits, schedule, arguments, expected):
    run = fit(Tiny, splits, recipe(epochs=3, learning_rate=0.2, schedule=schedule, schedule_args=arguments))
    assert run.history.step_learning_rate == pytest.approx(expected, rel=1e-6)


def test_every_group_follows_the_schedule():
    model = Tiny()
    overrides = {"*.bias": {"learning_rate": 1.0}, "head.weight": {"optimizer": "muon", **MUON}}
    settings = recipe(epochs=1, learning_rate=0.1, overrides=overrides, schedule="cosine")
    optimizers = build_optimizers(model, settings)
    schedulers = [build_scheduler(optimizer, settings, 4) for optimizer in optimizers]
    for step in range(4):
        rates = {name: group["lr"] for name, (_, group) in options_of(model, optimizers).items()}
        part = (1 + math.cos(math.pi * step / 4)) / 2
        expected = {"conv.weight": 0.1, "conv.bias": 1.0, "head.weight": 0.02}
        assert {name: rates[name] for name in expected} == pytest.approx({k: v * part for k, v in expected.items()})
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()


def test_fit_moves_every_schedule(splits, store):
    overrides = {"head.weight": {"optimizer": "muon", **MUON}}
    fit(Tiny, splits, recipe(overrides=overrides, schedule="step", schedule_args={"epochs": 1, "gamma": 0.1}))
    rates = [optimizer["param_groups"][0]["lr"] for optimizer in checkpoint_of(store)["optimizers"]]
    assert rates == pytest.approx([0.0005, 0.0002])  # after two epochs


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 10])
@pytest.mark.parametrize("schedule_args", [{}, {"pct_start": 0.1}, {"pct_start": 0.2}, {"pct_start": 0.25}])
def test_onecycle_of_any_length(steps, schedule_args):
    """Tiny runs must not fall over a rise of exactly one step."""
    settings = recipe(epochs=1, schedule="onecycle", schedule_args=schedule_args)
    [optimizer] = build_optimizers(Tiny(), settings)
    scheduler = build_scheduler(optimizer, settings, steps)
    for _ in range(steps):
        assert 0 < optimizer.param_groups[0]["lr"] <= 0.05 * (1 + 1e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", my_utils.SCHEDULES)
@pytest.mark.parametrize("optimizer", my_utils.OPTIMIZERS)
def test_every_optimizer_trains_with_every_schedule(splits, optimizer, schedule):
    arguments = {"epochs": 1} if schedule == "step" else {}
    overrides = dict.fromkeys(["conv.*", "norm.*", "*.bias"], REST) if "muon" in optimizer else {}
    settings = {"optimizer": optimizer, "overrides": overrides, "schedule": schedule, "schedule_args": arguments}
    run = fit(Tiny, splits, recipe(epochs=1, **settings))
    before = first_weights(Tiny)
    for name, parameter in run.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


# --- One step and one epoch by hand ---


def test_one_step_is_the_one_worked_out_by_hand(splits):
    rate, decay = 0.1, 0.01
    run = fit(
        linear, splits, recipe(epochs=1, batch_size=200, learning_rate=rate, optimizer_args={"weight_decay": decay})
    )
    before = {name: value.double() for name, value in first_weights(linear).items()}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (splits.train.mean, splits.train.std))
    x, x_val = (((s.images / 255 - mean) / std).flatten(1).double() for s in (splits.train, splits.val))
    logits = x @ before["1.weight"].T + before["1.bias"]
    error = (logits.softmax(1) - F.one_hot(splits.train.labels, 10)) / 200  # d loss / d logits
    weight = before["1.weight"] - rate * (error.T @ x + decay * before["1.weight"])
    bias = before["1.bias"] - rate * (error.sum(0) + decay * before["1.bias"])
    torch.testing.assert_close(run.model[1].weight.double(), weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(run.model[1].bias.double(), bias, atol=1e-6, rtol=1e-5)

    loss = -logits.log_softmax(1)[torch.arange(200), splits.train.labels].mean().item()
    after = x_val @ weight.T + bias
    history = run.history
    assert history.step_loss == history.train_loss == pytest.approx([loss], rel=1e-5)
    assert history.step_learning_rate == [rate]
    assert history.train_top1 == [(logits.argmax(1) == splits.train.labels).sum().item() / 200]
    assert history.val_top1 == [(after.argmax(1) == splits.val.labels).sum().item() / 100]
    val_loss = -after.log_softmax(1)[torch.arange(100), splits.val.labels].mean().item()
    assert history.val_loss == pytest.approx([val_loss], rel=1e-5)
    assert history.test_top1 == []
    assert len(history.seconds) == 1 and 0 < history.seconds[0] == run.train_seconds


def test_lengths_and_means_of_the_history(splits):
    with each_forward() as calls:
        run = fit(Tiny, splits, recipe(epochs=3, batch_size=64), watch=True)  # 200 images make 3 batches of 64
    history = run.history
    assert len(calls) == len(history.step_loss) == len(history.step_learning_rate) == 9
    for name in ("train_loss", "train_top1", "val_loss", "val_top1", "test_top1", "seconds"):
        assert len(getattr(history, name)) == 3, name
    assert history.train_loss == pytest.approx([sum(history.step_loss[i : i + 3]) / 3 for i in (0, 3, 6)])
    assert all((192 * top1) == pytest.approx(round(192 * top1)) for top1 in history.train_top1)
    for found, split in ((history.val_top1, splits.val), (history.test_top1, splits.test)):
        assert found[-1] == evaluate(run.model, split, precision="float32").top1
    assert history.val_loss[-1] == pytest.approx(evaluate(run.model, splits.val, precision="float32").nll)


def test_training_without_validation(splits):
    run = fit(Tiny, splits.with_val_in_train(), recipe())
    assert (run.history.val_loss, run.history.val_top1) == ([], [])
    assert len(run.history.step_loss) == 2 * 6  # 300 images in batches of 50


def test_augmented_batches_depend_on_seed_and_epoch_alone(splits):
    """The loop trains on the very batches that `batches` shows."""
    augmentation = Augmentation(crop=2, flip="random")
    seen = []
    with each_forward(lambda call, model, logits: seen.append(logits.detach().clone()), kind=nn.Sequential):
        fit(linear, splits, recipe(learning_rate=0.0, augmentation=augmentation), seed=3)
    weights = first_weights(linear, seed=3)
    shown = [b for e in (0, 1) for b in batches(splits.train, 50, augmentation=augmentation, seed=3, epoch=e)]
    for logits, (images, _) in zip(seen, shown, strict=True):
        torch.testing.assert_close(logits, images.flatten(1) @ weights["1.weight"].T + weights["1.bias"])


def test_label_smoothing(splits):
    run = fit(linear, splits, recipe(epochs=1, batch_size=200, label_smoothing=0.2))
    weights = first_weights(linear)
    [(images, labels)] = batches(splits.train, 200)
    log_p = (images.flatten(1) @ weights["1.weight"].T + weights["1.bias"]).log_softmax(1)
    target = 0.8 * F.one_hot(labels, 10) + 0.02
    assert run.history.train_loss == pytest.approx([-(target * log_p).sum(1).mean().item()], rel=1e-5)


def test_weight_averaging_is_an_exponential_moving_average(splits, store):
    """Of the weights after each step, and of the running statistics, which a forward pass moves."""
    decay, seen = 0.75, []

    def look(call, model, logits):
        seen.append({name: value.detach().clone() for name, value in model.state_dict().items()})

    with each_forward(look):
        run = fit(Tiny, splits, recipe(weight_averaging=decay))
    last = checkpoint_of(store)["model"]
    found = run.model.state_dict()
    for name in ("head.weight", "conv.bias", "norm.running_mean", "norm.running_var"):
        after_step = [state[name] for state in (seen if "running" in name else [*seen[1:], last])]
        average = after_step[0]
        for value in after_step[1:]:
            average = decay * average + (1 - decay) * value
        torch.testing.assert_close(found[name], average)
        assert not torch.equal(found[name], last[name])
    assert run.history.val_loss[-1] == pytest.approx(evaluate(run.model, splits.val, precision="float32").nll)


def test_the_loss_goes_down(splits):
    losses = fit(Tiny, splits, recipe(epochs=8, optimizer_args={"momentum": 0.9})).history.train_loss
    assert losses[-1] < 0.5 * losses[0]


# --- Interruptions and faults ---


def test_watching_changes_nothing_else(splits):
    settings = recipe(weight_averaging=0.9, augmentation=Augmentation(flip="random"))
    plain, watched = (fit(Tiny, splits, settings, watch=watch) for watch in (False, True))
    assert plain.history.test_top1 == [] and len(watched.history.test_top1) == 2
    watched.history.test_top1 = []
    assert_same(plain, watched)


def test_the_seed_decides(splits, store, monkeypatch):
    run = fit(Tiny, splits, recipe(), seed=1)
    monkeypatch.setenv("RUNS_DIR", str(store / "again"))
    torch.manual_seed(99)  # the caller's random numbers must not matter
    assert_same(run, fit(Tiny, splits, recipe(), seed=1))
    assert not torch.equal(run.model.head.weight, fit(Tiny, splits, recipe(), seed=2).model.head.weight)


def test_the_callers_random_numbers_stay_the_same(splits):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for _ in range(2):  # trained, then loaded
        fit(Tiny, splits, recipe())
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("merged", [False, True], ids=["validated", "merged"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(splits, store, monkeypatch, capsys, bad, merged):
    splits = splits.with_val_in_train() if merged else splits
    settings = recipe(epochs=3, schedule="step", schedule_args={"epochs": 1, "gamma": 0.1})
    reference = fit(Tiny, splits, settings)
    monkeypatch.setenv("RUNS_DIR", str(store / "faulty"))
    with (
        each_forward(lambda call, model, logits: logits * bad if call >= 6 else None),
        pytest.raises(
            FloatingPointError, match=r"step 6 \(epoch 2\), learning rate 0.005.* ten times smaller"
        ) as caught,
    ):
        fit(Tiny, splits, settings)
    assert "checkpoint of epoch 1 is untouched" in str(caught.value)
    assert len(checkpoint_of(store / "faulty")["history"]["seconds"]) == 1
    capsys.readouterr()
    assert_same(fit(Tiny, splits, settings), reference)  # the fault is gone
    assert "going on after epoch 1 of 3" in capsys.readouterr().out


def test_weights_that_break_in_an_epochs_last_step(splits, store):
    """The loss is still finite then, but nothing that follows is."""
    with pytest.raises(FloatingPointError, match=r"learning rate 1e\+38.* ten times smaller"):
        fit(Tiny, splits, recipe(batch_size=200, learning_rate=1e38))
    assert not list(store.glob("**/checkpoint.pt"))


@pytest.mark.parametrize("averaging", [None, 0.9])
def test_weights_that_break_where_no_validation_shows_it(splits, store, averaging):
    def spoil(optimizer, *_):
        optimizer.param_groups[0]["params"][0].data[0] = math.nan

    settings = recipe(epochs=1, batch_size=300, weight_averaging=averaging)
    hook = register_optimizer_step_post_hook(spoil)
    try:
        with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1 \(epoch 1\).* ten times smaller"):
            fit(Tiny, splits.with_val_in_train(), settings)
    finally:
        hook.remove()
    assert not [path for path in store.rglob("*") if path.suffix in (".pt", ".json", ".safetensors")]


def test_a_model_with_other_outputs_is_named_as_such(splits):
    with pytest.raises(ValueError, match=r"logits are \[50, 12\].* must be \[N, 10\]"):
        fit(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 12)), splits, recipe())


@pytest.mark.parametrize(("training", "at"), [(True, 0), (True, 6), (False, 1)], ids=["start", "batch", "validation"])
def test_an_interrupted_run_goes_on_to_the_same_end(splits, store, monkeypatch, capsys, training, at):
    settings = recipe(
        epochs=3,
        optimizer_args={"momentum": 0.9},
        schedule="cosine",
        augmentation=Augmentation(crop=2, flip="alternating"),
        weight_averaging=0.9,
    )
    reference = fit(Tiny, splits, settings)
    monkeypatch.setenv("RUNS_DIR", str(store / "interrupted"))

    def interrupt(call, model, logits):
        if call == at + (not training):  # the first pass outside training counts the operations
            raise KeyboardInterrupt

    # Validation is done by the averaged weights, a copy of the model.
    with each_forward(interrupt, training=training), pytest.raises(KeyboardInterrupt):
        fit(Tiny, splits, settings)
    [file] = (store / "interrupted").glob("**/interrupted.json")
    history = json.loads(file.read_text())["history"]
    whole_epochs, whole_steps = (at // 4, at) if training else (at + 1, 4 * (at + 1))
    assert history["train_loss"] == reference.history.train_loss[:whole_epochs]
    assert history["step_learning_rate"] == reference.history.step_learning_rate[:whole_steps]
    logged = len(history["step_loss"])  # losses are read from the device a few times per second
    assert 4 * whole_epochs <= logged <= whole_steps
    assert history["step_loss"] == reference.history.step_loss[:logged]
    assert "interrupted; fit again to go on" in capsys.readouterr().out
    assert_same(fit(Tiny, splits, settings), reference)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"seed": -1}, ValueError, "seed is -1; it may be from 0"),
        ({"seed": "0"}, TypeError, r"seed is '0' \(str\); it must be"),
        ({"splits": "cifar10"}, TypeError, "splits is a str; it must be a Splits"),
        ({"build_model": lambda: None}, TypeError, "build_model returned a NoneType; it must return an nn.Module"),
        ({"recipe": {"epochs": 1}}, TypeError, "recipe is a dict; it must be a Recipe"),
    ],
)
def test_fit_names_a_bad_argument(splits, store, arguments, error, says):
    with pytest.raises(error, match=says):
        fit(**{"build_model": Tiny, "splits": splits, "recipe": recipe()} | arguments)
    assert not store.exists()


# --- Precision ---


@pytest.mark.skipif(not torch.set_flush_denormal(True), reason="this CPU cannot")
def test_numbers_that_slow_a_cpu_down_count_as_zero():
    script = "import my_utils, torch; print((torch.full((1 << 20,), 1e-20) * 1e-20).count_nonzero().item())"
    assert subprocess.check_output([sys.executable, "-c", script], cwd=my_utils.ROOT, text=True) == "0\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own setting")
def test_a_process_keeps_the_memory_of_freed_tensors():
    script = """
import resource
import my_utils, torch

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(20):
    torch.ones(1 << 25)  # 128 MiB, freed at once
before = page_faults()
for _ in range(10):
    torch.ones(1 << 25)
print((page_faults() - before) / (10 * (128 << 20) / resource.getpagesize()))
"""
    assert float(subprocess.check_output([sys.executable, "-c", script], cwd=my_utils.ROOT, text=True)) < 0.05


@pytest.mark.parametrize(
    ("wanted", "device", "capability", "expected"),
    [
        ("auto", "cuda", (7, 5), torch.float16),  # a T4
        ("auto", "cuda", (8, 0), torch.bfloat16),  # an A100
        ("auto", "cuda", (9, 0), torch.bfloat16),
        ("auto", "cpu", {"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ("auto", "cpu", {"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, torch.float32),
        ("auto", "cpu", {"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ("auto", "cpu", {"avx512_bf16": True}, torch.float32),
        ("auto", "cpu", {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ("auto", "cpu", {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("auto", "cpu", {}, torch.float32),
        ("auto", "mps", {}, torch.float32),
        ("float32", "cuda", (8, 0), torch.float32),
        ("bfloat16", "cuda", (7, 5), torch.bfloat16),
        ("float16", "cpu", {}, torch.float16),
    ],
)
def test_mixed_precision_where_it_is_fast(monkeypatch, wanted, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # what torch says of a T4 too
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability, raising=False)
    assert pick_precision(wanted, torch.device(device)) == expected


def test_an_older_torch_trains_in_float32_on_a_cpu(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_precision("auto", torch.device("cpu")) == torch.float32


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="precision is 'half'; it may be one of auto, float32, bfloat16, float16"):
        pick_precision("half")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_goes_on(splits, store, monkeypatch, precision):
    settings = recipe(epochs=4, precision=precision, optimizer_args={"momentum": 0.9})
    seen = []
    with each_forward(lambda call, model, logits: seen.append(logits.dtype)):
        reference = fit(Tiny, splits, settings)
    assert set(seen) == {getattr(torch, precision)}
    assert reference.model.head.weight.dtype == torch.float32
    assert reference.history.train_loss[-1] < reference.history.train_loss[0]
    scaler = checkpoint_of(store)["scaler"]

    def interrupt(call, model, logits):
        if call == 9:
            raise KeyboardInterrupt

    monkeypatch.setenv("RUNS_DIR", str(store / "interrupted"))
    with each_forward(interrupt), pytest.raises(KeyboardInterrupt):
        fit(Tiny, splits, settings)
    assert_same(fit(Tiny, splits, settings), reference)
    assert checkpoint_of(store / "interrupted")["scaler"] == scaler
