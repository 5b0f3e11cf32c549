"""The run store: one file per run, found again, gone on with to the same bits, and never trusted when it is damaged."""

import contextlib
import errno
import os
import random
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import Tiny, assert_same, each_forward, recipe
from torch import nn

import my_utils

fit = partial(my_utils.fit, run="test/tiny", plot=False)
pytestmark = pytest.mark.usefixtures("store")


@contextlib.contextmanager
def training_steps(count: int):
    """Check that so many steps are taken in epochs."""
    with each_forward() as calls:
        yield
    assert len(calls) == count


def interrupt(*_):
    raise KeyboardInterrupt


def files(store: Path) -> list[Path]:
    """Return the files of a store, without the locks."""
    return sorted(path for path in store.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory):
    """An undisturbed run of three epochs, four steps each, in a store with another seed's; treat it as read-only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(tmp_path_factory.mktemp("whole")))
        fit(Tiny, splits, recipe(epochs=3), seed=1)
        return fit(Tiny, splits, recipe(epochs=3))


@pytest.fixture
def copied(whole, store):
    """Copy that store into this test's own, and return the path of the run's file."""
    return Path(shutil.copytree(whole.path.parent, store / "smoke" / "test" / "tiny")) / whole.path.name


# --- A finished run is found again, another one is trained ---


@pytest.mark.parametrize("averaging", [None, 0.9])
def test_a_finished_run_is_found_where_its_file_was_moved(splits, store, monkeypatch, averaging):
    probe = lambda model: {"tensor": 1.0}  # noqa: E731
    trained = fit(Tiny, splits, recipe(weight_averaging=averaging), seed=3, probe=probe)
    assert files(store) == [store / "smoke" / "test" / "tiny" / f"seed3-{trained.fingerprint}.safetensors"]
    before = trained.path.read_bytes()
    monkeypatch.setenv("RUNS_DIR", str(shutil.move(store, f"{store}-moved")))
    with training_steps(0):
        found = fit(Tiny, splits, trained.recipe, seed=3, probe=probe)
        assert_same(found, trained)
    assert not found.model.training and not trained.model.training
    assert replace(found, path=trained.path) == trained
    assert found.path.read_bytes() == before


def test_several_seeds_are_each_the_run_of_that_seed(splits, monkeypatch):
    identified, shown = [], []
    identify = my_utils.identify
    monkeypatch.setattr(my_utils, "identify", lambda *what: identified.append(what) or identify(*what))
    monkeypatch.setattr(my_utils, "show", lambda *figure, **settings: shown.append(figure))
    runs = my_utils.fit_seeds(Tiny, splits, recipe(), range(3), run="test/tiny", plot=True)
    assert (len(identified), len(shown), len({run.fingerprint for run in runs})) == (1, 1, 3)
    for seed, run in enumerate(runs):
        with training_steps(0):
            assert_same(fit(Tiny, splits, recipe(), seed=seed), run)


def changed(splits, part, **values):
    return {"splits": replace(splits, **{part: replace(getattr(splits, part), **values)})}


CHANGES = {
    "recipe": lambda splits: {"recipe": recipe(epochs=3, learning_rate=0.051)},
    "seed": lambda splits: {"seed": 2},
    "name": lambda splits: {"run": "test/other"},
    "watch": lambda splits: {"watch": True},
    "probe": lambda splits: {"probe": lambda model: {"norm": model.head.weight.norm()}},
    "label": lambda splits: changed(splits, "val", labels=splits.val.labels.roll(1)),
    "merged": lambda splits: {"splits": replace(splits, val=None)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_result_makes_another_file(splits, store, whole, copied, change):
    before = files(store)
    arguments = {"build_model": Tiny, "splits": splits, "recipe": recipe(epochs=3)} | change(splits)
    with training_steps(12):
        run = fit(**arguments)
    assert files(store) == sorted([*before, run.path])
    assert (run.fingerprint == whole.fingerprint) == ("run" in arguments)  # the name is the place alone
    assert len(run.history.test_top1) == 3 * ("watch" in arguments)
    assert len(run.history.probe) == 3 * ("probe" in arguments)


def renamed():
    """Return Tiny with other names."""
    tiny = Tiny()
    return nn.Sequential(tiny.conv, tiny.norm, nn.ReLU(), nn.Flatten(), tiny.drop, tiny.head)


def test_stored_weights_find_their_parts_under_other_names(splits, whole, copied):
    with training_steps(0):
        found = fit(renamed, splits, recipe(epochs=3))
    assert my_utils.evaluate(found.model, splits.val, precision="float32").nll == whole.history.val_loss[-1]


# --- What is stopped goes on to the same bits ---


class Noisy(Tiny):
    """Draws from three generators of random numbers: torch's for dropout, NumPy's and Python's."""

    def forward(self, x):
        return super().forward(x + 0.3 * np.random.rand() * random.random() if self.training else x)


SGD = {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9}
BY_SGD = {pattern: SGD for pattern in ("conv.*", "norm.*", "*.bias")}
STEP = {"schedule": "step", "schedule_args": {"epochs": 1, "gamma": 0.3}}
RANDOM = my_utils.Augmentation(crop=2, flip="alternating", rotation=9, brightness=0.2, cutout=8)
RECIPES = {
    "sgd": {"optimizer_args": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, **STEP},
    "adamw": {"optimizer": "adamw", "schedule": "onecycle", "label_smoothing": 0.1, "augmentation": RANDOM},
    "muon": {"optimizer": "muon", "overrides": BY_SGD, "schedule": "cosine", "weight_averaging": 0.5},
    "float16": {"precision": "float16", "optimizer": "adam", "learning_rate": 0.01},
}


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_interrupted_in_every_epoch_ends_with_the_same_bits(splits, store, settings):
    again = partial(fit, Noisy, splits, recipe(epochs=4, **settings))
    reference = again()
    reference.path.unlink()
    for epochs, stop in ((1, 5), (2, 4), (3, 7)):  # in the middle, at the start and at the end of an epoch
        act = lambda call, *_, stop=stop: interrupt() if call == stop else None  # noqa: E731
        with each_forward(act), pytest.raises(KeyboardInterrupt):
            random.random(), np.random.rand(), again()  # the caller's own numbers move
        [path] = files(store)
        assert my_utils.load_run(path)["history"]["val_loss"] == reference.history.val_loss[:epochs]
    with training_steps(4):  # the last epoch alone
        assert_same(again(), reference)


def test_a_run_begun_in_float32_goes_on_in_float16(splits, store, monkeypatch):
    settings, stop = recipe(precision="auto", learning_rate=1e-4), lambda call, *_: interrupt() if call == 4 else None
    with each_forward(stop), pytest.raises(KeyboardInterrupt):
        fit(Tiny, splits, settings)
    monkeypatch.setattr(my_utils, "pick_precision", lambda *_: torch.float16)
    with training_steps(4):
        fit(Tiny, splits, settings)


def bad_gradient(logits):
    """Return the same logits with a gradient that is no number."""
    return logits + 0 * (logits - logits.detach()).sqrt()


STOPS = {
    "interrupt": (True, 5, interrupt, None),
    "interrupt in validation": (False, 1, interrupt, None),
    "nan in the first epoch": (True, 2, lambda logits: logits * torch.nan, "step 2.*learning rate"),
    "inf": (True, 10, lambda logits: logits * 1e38 * 1e38, "learning rate"),
    "weights in the last step": (True, 7, bad_gradient, "learning rate"),
    "nan in validation": (False, 1, lambda logits: logits * torch.nan, "finite"),
}


@pytest.mark.parametrize(("training", "at", "act", "says"), STOPS.values(), ids=STOPS)
def test_what_stops_a_training_leaves_the_epochs_before(splits, store, whole, capsys, training, at, act, says):
    epochs = at // 4 if training else at
    stops = each_forward(lambda call, _, logits: act(logits) if call == at else None, training)
    with stops, pytest.raises(FloatingPointError if says else KeyboardInterrupt, match=says):
        fit(Tiny, splits, recipe(epochs=3))
    assert [len(my_utils.load_run(path)["history"]["seconds"]) for path in files(store)] == [epochs] * (epochs > 0)
    assert f"after epoch {epochs + 1}" not in capsys.readouterr().out
    with training_steps(12 - 4 * epochs):
        assert_same(fit(Tiny, splits, recipe(epochs=3)), whole)


def test_a_run_that_another_process_ends_just_before_the_lock_is_free_is_loaded(splits, whole, copied, monkeypatch):
    lock, hidden = filelock.FileLock, copied.rename(copied.with_suffix(".hidden"))

    def late(*arguments, **options):
        hidden.rename(copied)
        return lock(*arguments, **options)

    monkeypatch.setattr(filelock, "FileLock", late)
    with training_steps(0):
        assert_same(fit(Tiny, splits, recipe(epochs=3)), whole)


# --- Damage ---


DAMAGES = {
    "one byte short": lambda good: good[:-1],
    "start": lambda good: good[:10],
    "empty": lambda good: b"",
    "random": lambda good: random.Random(0).randbytes(len(good)),
    "pickle": lambda good: b"cbuiltins\nopen\n(Vmark\nVw\ntR.",  # opened as a pickle, it writes a file
    "header of 2^60 bytes": lambda good: (1 << 60).to_bytes(8, "little") + good[8:],
    "other tensors": lambda good: safetensors.torch.save({"weight": torch.zeros(3)}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_nothing_else_is_lost(splits, tmp_path, monkeypatch, whole, copied, damage):
    monkeypatch.chdir(tmp_path)
    bad = damage(copied.read_bytes())
    copied.write_bytes(bad)
    with training_steps(0), pytest.raises(ValueError, match=f"{re.escape(str(copied))}.*delete"):
        fit(Tiny, splits, recipe(epochs=3))
    assert copied.read_bytes() == bad and not Path("mark").exists()
    with training_steps(0):
        fit(Tiny, splits, recipe(epochs=3), seed=1)
    copied.unlink()
    assert_same(fit(Tiny, splits, recipe(epochs=3)), whole)


def test_every_flipped_bit_is_seen(copied):
    good, places = copied.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(good[:8], "little")
    for place in [*range(0, header, 5), *places.choices(range(header, len(good)), k=200), len(good) - 1]:
        bad = bytearray(good)
        bad[place] ^= 1 << places.randrange(8)
        copied.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(str(copied))):
            my_utils.load_run(copied)


def test_nothing_is_pickled():
    words = set(re.findall(r"[\w.]+", Path(my_utils.__file__).read_text(encoding="utf-8")))
    assert any(word.startswith("safetensors") for word in words)
    assert not words & {"pickle", "torch.load", "torch.save", "np.load", "np.save", "dill", "joblib", "shelve"}


# --- Disks and folders ---


@pytest.mark.parametrize(("number", "says", "write"), [("ENOSPC", "space", 3), ("EROFS", "writable", 1)])
def test_a_write_that_fails_leaves_the_epoch_before(splits, store, whole, monkeypatch, number, says, write):
    sync, count = os.fsync, []

    def failing(file):
        count.append(file)
        if len(count) == write:
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
        sync(file)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=f"{says}.*RUNS_DIR"):
        fit(Tiny, splits, recipe(epochs=3))
    kept = [len(my_utils.load_run(path)["history"]["seconds"]) for path in files(store)]
    assert kept == [write - 1] * (write > 1)  # and no half-written file
    assert_same(fit(Tiny, splits, recipe(epochs=3)), whole)
