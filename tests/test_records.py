"""Records: what they hold, where they go, how they stand in for training, and the tables made from them."""

import json
import math
import types
from dataclasses import asdict, replace
from functools import partial

import pytest
from matplotlib.figure import Figure
from tiny import Tiny, assert_same, each_forward, recipe
from torch import nn

import my_utils
from my_utils import History, evaluate

fit = partial(my_utils.fit, run="test/tiny", plot=False)
record = partial(my_utils.record, notebook="01")
results_table = my_utils.models_of("01_baseline").results_table
pytestmark = pytest.mark.usefixtures("root")


def written(root, part="build"):
    return json.loads((root / part / "results" / "test_tiny.json").read_text())


# --- What a record holds ---


class Mirrored(nn.Sequential):
    def forward(self, x):
        return super().forward(x.flip(3))


def test_every_value_of_a_record(root, splits):
    settings = recipe(epochs=3, batch_size=64)
    run = fit(Tiny, splits, settings, seed=4)
    run.history.val_top1 = [0.5, 0.7, 0.6]  # the last epoch counts, not the best
    published = {"published_top1": 0.9, "published_epochs": 200}
    content = record([run], splits, system="S1", tta=Mirrored, **published)
    assert content == written(root)
    [entry] = content.pop("seeds")
    where = {"device": run.device, "versions": my_utils.versions()}
    flops = 3 * (2 * 27 * 8 * 64 + 2 * 512 * 10) * 3 * 192  # three epochs of three whole batches
    expected = {"name": "test_tiny", "notebook": "01", "system": "S1", "data": "synthetic", "run_size": "smoke"}
    expected |= {"parameters": 27 * 8 + 8 + 2 * 8 + 5130, "train_flops": flops, "epochs": 3}
    assert content == {**expected, **published, **where, "recipe": json.loads(json.dumps(asdict(settings)))}
    history = entry.pop("history")
    for name, values in asdict(run.history).items():
        assert history[name] == pytest.approx(values, rel=1e-4), name
    test, flipped = (evaluate(model, splits.test) for model in (run.model, Mirrored(run.model)))
    expected = {"seed": 4, "fingerprint": run.fingerprint, "val_top1": 0.6, "train_seconds": sum(run.history.seconds)}
    expected |= {"test_top1": test.top1, "test_top1_interval": list(test.interval), "test_nll": test.nll}
    expected |= {"test_ece": test.ece, "test_confusion": test.confusion.tolist(), "tta": "Mirrored"}
    expected |= {"test_top1_tta": flipped.top1, "test_top1_tta_interval": list(flipped.interval)}
    expected |= {"val_top1_tta": evaluate(Mirrored(run.model), splits.val).top1}
    assert run.test.nll == test.nll
    assert entry == expected | where


def test_merged_training_has_no_validation_accuracy(splits):
    merged = replace(splits, val=None)
    content = record([fit(Tiny, merged, recipe())], merged)
    assert content["seeds"][0]["val_top1"] is None and "tta" not in content["seeds"][0]
    assert results_table({"one": content})["val top-1 %"].tolist() == ["-"]


@pytest.mark.parametrize("steps", [1, 500, 501, 1234])
def test_a_long_history_is_thinned_to_the_same_mean(splits, steps):
    losses = [0.3 + 2 * math.exp(-3 * step / steps) for step in range(steps)]
    history = History(step_loss=losses, step_learning_rate=[0.1] * steps, val_top1=[0.5], seconds=[1.0])
    run = replace(fit(Tiny, splits, recipe(epochs=1)), history=history)
    thinned = record([run], splits)["seeds"][0]["history"]
    assert min(250, steps) <= len(thinned["step_loss"]) == len(thinned["step_learning_rate"]) <= 500
    assert sum(thinned["step_loss"]) / len(thinned["step_loss"]) == pytest.approx(sum(losses) / steps, rel=2e-3)
    assert set(thinned["step_learning_rate"]) == {0.1}
    assert len(history.step_loss) == steps  # the run keeps them all


def test_only_the_runs_of_one_variant_make_a_record(root, splits):
    first, second = (fit(Tiny, splits, recipe(), seed=seed) for seed in (0, 1))
    other = fit(Tiny, splits, recipe(learning_rate=0.1))
    for runs, data in (([first, other], splits), ([first], replace(splits, source="cifar10"))):
        with pytest.raises(ValueError, match="one variant"):
            record(runs, data)
    assert not (root / "build").exists()
    assert [entry["seed"] for entry in record([second, first], splits)["seeds"]] == [1, 0]
    assert len(record([first], splits)["seeds"]) == 1  # the seeds of this call, and no others


OTHERS = [{"flag": "0"}, {"size": "quick"}, {"source": "synthetic"}]


@pytest.mark.parametrize("change", [{}, *OTHERS])
def test_only_a_full_run_on_cifar10_is_committed(root, splits, monkeypatch, change):
    size, source, flag = ({"size": "full", "source": "cifar10", "flag": "1"} | change).values()
    part = "build" if change else "report"
    monkeypatch.setenv("RUN_SIZE", size)
    monkeypatch.setenv("RECORD", flag)
    data = replace(splits, source=source)
    run = fit(Tiny, data, recipe(epochs=1))
    before = evaluate(run.model, data.test).nll
    content = record([run], data, ship=True)
    assert change == {} or evaluate(run.model, data.test).nll == before
    my_utils.show(Figure(), alt="nothing", save="empty", runs=[run])
    assert written(root, part) == content
    found = {path.relative_to(root).as_posix() for path in root.glob("*/*/*") if path.suffix}
    shipped = {"report/runs/test_tiny-seed0.safetensors"} if part == "report" else set()
    assert found == {f"{part}/results/test_tiny.json", f"{part}/figures/empty.png"} | shipped


def test_a_project_in_a_read_only_folder_writes_beside_the_runs(splits, root, monkeypatch):
    (root / "file").touch()
    monkeypatch.setattr(my_utils, "ROOT", root / "file" / "project")  # where nothing can be made
    run = fit(Tiny, splits, recipe(epochs=1))
    assert record([run], splits) == written(root)
    my_utils.show(Figure(), alt="nothing", save="empty", runs=[run])
    assert (root / "build" / "figures" / "empty.png").exists()
    monkeypatch.delenv("RUNS_DIR")
    with pytest.raises(OSError, match="RUNS_DIR"):
        record([run], splits)


# --- A record stands in for training ---


@pytest.fixture
def real(splits):
    return replace(splits, source="cifar10")


@pytest.fixture
def committed(root, real, monkeypatch):
    """Two runs and their record, with the first's weights; then an empty store, and replay."""
    monkeypatch.setenv("RUN_SIZE", "full")
    monkeypatch.setenv("RECORD", "1")
    runs = [fit(Tiny, real, recipe(), seed=seed) for seed in (0, 1)]
    content = record(runs, real, ship=True)
    monkeypatch.setenv("RUNS_DIR", str(root / "elsewhere" / "runs"))
    monkeypatch.delenv("RUN_SIZE")
    return runs, content


def test_a_shipped_run_brings_its_weights(root, real, committed):
    [path] = (root / "report" / "runs").iterdir()
    hidden = path.rename(path.with_suffix(".hidden"))
    with each_forward() as calls:
        run = fit(Tiny, real, recipe())
        hidden.rename(path)  # it is read when it is asked for, and not before
        test = evaluate(run.model, real.test, precision="float32")
    assert calls == [] and test.nll == committed[1]["seeds"][0]["test_nll"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=path.name):
        fit(Tiny, real, recipe()).model  # noqa: B018


def test_of_a_shipped_run_only_the_plain_test_accuracy_is_computed_anew(real, committed):
    run, [entry, _] = fit(Tiny, real, recipe()), committed[1]["seeds"]
    run.recorded = entry | {"test_top1": 0.0, "test_top1_tta": 0.5}
    assert record([run], real, tta=nn.Sequential, ship=True)["seeds"] == [entry | {"test_top1_tta": 0.5}]


def test_a_recorded_run_without_weights_says_how_to_train(real, committed, monkeypatch):
    trained, found = committed[0][1], fit(Tiny, real, recipe(), seed=1)
    assert (found.history.val_top1, found.device) == (trained.history.val_top1, trained.device)
    with pytest.raises(FileNotFoundError, match="TRAIN"):
        found.model  # noqa: B018
    monkeypatch.setattr(my_utils, "TRAIN", "full")
    assert_same(fit(Tiny, real, recipe(), seed=1), trained)
    monkeypatch.setattr(my_utils, "TRAIN", "")
    assert_same(fit(Tiny, real, recipe(), seed=1), trained)  # now in the store


REPLAYED = [{}, {"train": "0"}, {"size": "full"}]
TRAINED = [{"train": "1"}, {"train": "quick"}, {"size": "smoke"}, {"epochs": 3}]


@pytest.mark.parametrize("change", [*REPLAYED, *TRAINED])
def test_when_a_record_stands_in(real, committed, monkeypatch, capsys, change):
    monkeypatch.setattr(my_utils, "TRAIN", change.get("train", ""))
    if "size" in change:
        monkeypatch.setenv("RUN_SIZE", change["size"])
    with each_forward() as calls:
        fit(Tiny, real, recipe(epochs=change.get("epochs", 2)), seed=1)
    assert bool(calls) == (change in TRAINED) != ("records" in capsys.readouterr().out)
    assert change in TRAINED or my_utils.run_size() == "full"


@pytest.mark.parametrize("stopped", [False, True])
def test_a_record_made_again_says_the_same(real, committed, monkeypatch, stopped):
    with monkeypatch.context() as patch, each_forward(lambda call, _, logits: logits / 0 if call % 6 == 5 else None):
        patch.setattr(my_utils, "TRAIN", "full")
        for seed in (0, 1) * stopped:  # what is left of a training that stopped hides no record
            with pytest.raises(FloatingPointError):
                fit(Tiny, real, recipe(), seed=seed)
    found = [fit(Tiny, real, recipe(), seed=seed) for seed in (0, 1)]
    assert record(found, real, ship=True) == committed[1]
    monkeypatch.setenv("RECORD", "0")
    assert record(found[1:], real, ship=True)["seeds"] == committed[1]["seeds"][1:]


def test_a_cell_says_once_that_its_runs_were_found(real, committed, monkeypatch, capsys):
    shell = types.SimpleNamespace(kernel=True, execution_count=1)
    monkeypatch.setitem(my_utils.sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    for shell.execution_count in (1, 2):
        my_utils.fit_seeds(Tiny, real, recipe(), (0, 1), run="test/tiny")
        assert capsys.readouterr().out.count("\n") == 1


def made_up(name, data="cifar10", published=None, **columns):
    seeds = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    content = {"name": name, "data": data, "epochs": 10, "parameters": 1_234_567, "train_flops": 2.5e15}
    return content | {"published_top1": published, "seeds": seeds}


def test_results_table():
    one = made_up("one", val_top1=[0.80], test_top1=[0.79], published=0.9436)
    two = made_up("two", val_top1=[0.9, 0.92], test_top1=[0.88, 0.90])
    table = results_table({"two": two, "one": one})
    columns = "val top-1 %,test top-1 %,published %,epochs,seeds,parameters,train PFLOP"
    assert table.index.name is None and ",".join(table) == columns
    assert table.T.to_dict("list") == {
        "two": ["91.00 ± 1.41", "89.00 ± 1.41", "-", 10, 2, "1,234,567", "2.500"],
        "one": ["80.00", "79.00", "94.36", 10, 1, "1,234,567", "2.500"],
    }
    better = made_up("one", val_top1=[0.80], test_top1=[0.79], test_top1_tta=[0.81])
    assert results_table({"two": two, "one": better})["with TTA %"].tolist() == ["-", "81.00"]
    other = made_up("synthetic", "synthetic", val_top1=[0.5], test_top1=[0.5])
    assert "not CIFAR-10" in results_table({"one": one, "synthetic": other}).index.name
