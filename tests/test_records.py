"""Records and the tables made from them."""

import errno
import json
import math
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from tiny import Tiny, recipe

import my_utils
from my_utils import History, count_flops, evaluate, percent, record, results_table

fit = partial(my_utils.fit, run="test/tiny", plot=False)

pytestmark = pytest.mark.usefixtures("root")


def written(root, name="tiny", part="build"):
    return json.loads((root / part / "results" / f"{name}.json").read_text())


# --- What a record holds ---


def test_every_value_of_a_record(root, splits):
    run = fit(Tiny, splits, recipe(epochs=3, batch_size=64), seed=4)
    run.history.val_top1 = [0.5, 0.7, 0.6]  # the last epoch counts, not the best
    content = record(
        "tiny", [run], splits, notebook="02", system="S1", published_top1=0.9, published_epochs=200, tta="flip"
    )
    assert content == written(root)
    [entry] = content.pop("seeds")
    assert content == {
        "name": "tiny",
        "notebook": "02",
        "system": "S1",
        "data": "synthetic",
        "run_size": "smoke",
        "device": run.device,
        "versions": my_utils.versions(),
        "parameters": (27 * 8 + 8) + 2 * 8 + (5120 + 10),
        "train_flops": 3 * count_flops(Tiny()) * 3 * 192,  # three epochs of three whole batches
        "epochs": 3,
        "recipe": json.loads(json.dumps(asdict(recipe(epochs=3, batch_size=64)))),
        "published_top1": 0.9,
        "published_epochs": 200,
    }
    assert run.device.endswith("float32")
    test = evaluate(run.model, splits.test, precision="float32")
    flipped = evaluate(run.model, splits.test, precision="float32", tta="flip")
    assert entry == {
        "seed": 4,
        "fingerprint": run.fingerprint,
        "device": run.device,
        "versions": my_utils.versions(),
        "val_top1": 0.6,
        "test_top1": test.top1,
        "test_top1_interval": list(test.interval),
        "test_nll": test.nll,
        "test_ece": test.ece,
        "test_confusion": test.confusion.tolist(),
        "train_seconds": sum(run.history.seconds),
        "history": entry["history"],
        "tta": "flip",
        "test_top1_tta": flipped.top1,
        "test_top1_tta_interval": list(flipped.interval),
    }
    assert len(entry["test_confusion"]) == 10 and sum(map(sum, entry["test_confusion"])) == 100
    assert 0 <= entry["test_top1_interval"][0] < entry["test_top1"] < entry["test_top1_interval"][1] <= 1
    history = asdict(run.history)
    for name in ("step_loss", "step_learning_rate"):
        assert entry["history"].pop(name) == pytest.approx(history.pop(name), rel=1e-4)
    assert entry["history"] == history


def test_what_was_not_asked_for_is_none(splits):
    content = record("tiny", [fit(Tiny, splits, recipe())], splits, notebook="01")
    assert content["system"] is content["published_top1"] is content["published_epochs"] is None
    assert "tta" not in content["seeds"][0]


def test_merged_training_has_no_validation_accuracy(splits):
    merged = splits.with_val_in_train()
    content = record("tiny", [fit(Tiny, merged, recipe())], merged, notebook="03")
    assert content["seeds"][0]["val_top1"] is None
    assert content["seeds"][0]["test_top1"] >= 0
    assert results_table([content])["val top-1 %"].tolist() == ["-"]


def test_the_table_has_test_time_augmentation_where_a_record_has_it(splits):
    run = fit(Tiny, splits, recipe())
    plain = record("plain", [run], splits, notebook="01")
    assert "with TTA %" not in results_table([plain])
    better = record("better", [run], splits, notebook="01", tta="flip")
    expected = ["-", f"{100 * evaluate(run.model, splits.test, tta='flip').top1:.2f}"]
    assert results_table([plain, better])["with TTA %"].tolist() == expected


@pytest.mark.parametrize(
    ("batch_size", "seen"), [(50, 200), (64, 192), (200, 200), (300, 200)], ids=["even", "rest", "one", "short"]
)
def test_training_flops_count_the_images_that_were_seen(splits, batch_size, seen):
    run = fit(Tiny, splits, recipe(batch_size=batch_size))
    assert run.train_flops == 3 * (2 * 27 * 8 * 64 + 2 * 512 * 10) * 2 * seen


@pytest.mark.parametrize("steps", [1, 499, 500, 501, 700, 1000, 1234, 5000])
def test_a_long_history_is_thinned_to_the_same_mean(splits, steps):
    losses = [0.3 + 2 * math.exp(-3 * step / steps) for step in range(steps)]
    history = History(step_loss=losses, step_learning_rate=[0.1] * steps, val_top1=[0.5], seconds=[1.0])
    run = replace(fit(Tiny, splits, recipe(epochs=1)), history=history)
    thinned = record("tiny", [run], splits, notebook="01")["seeds"][0]["history"]
    assert len(thinned["step_loss"]) == len(thinned["step_learning_rate"]) <= min(500, steps)
    assert len(thinned["step_loss"]) > min(steps, 250) * 0.99
    assert sum(thinned["step_loss"]) / len(thinned["step_loss"]) == pytest.approx(sum(losses) / steps, rel=2e-3)
    assert set(thinned["step_learning_rate"]) == {0.1}
    assert len(history.step_loss) == steps  # the run keeps them all


# --- Where a record goes ---


@pytest.mark.parametrize(
    ("size", "source", "flag", "part"),
    [
        ("full", "cifar10", "1", "report"),
        ("full", "cifar10", "0", "build"),
        ("full", "cifar10", None, "build"),
        ("quick", "cifar10", "1", "build"),
        ("smoke", "cifar10", "1", "build"),
        ("full", "synthetic", "1", "build"),
    ],
)
def test_only_a_full_run_on_cifar10_is_committed(root, splits, monkeypatch, size, source, flag, part):
    monkeypatch.setenv("RUN_SIZE", size)
    if flag is None:
        monkeypatch.delenv("RECORD", raising=False)
    else:
        monkeypatch.setenv("RECORD", flag)
    data = replace(splits, source=source)
    content = record("tiny", [fit(Tiny, data, recipe(epochs=1))], data, notebook="01")
    assert (content["run_size"], content["data"]) == (size, source)
    found = [path.relative_to(root).as_posix() for path in root.glob("*/results/*.json")]
    assert found == [f"{part}/results/tiny.json"]
    assert written(root, part=part) == content


def test_seeds_accumulate(root, splits):
    runs = {seed: fit(Tiny, splits, recipe(), seed=seed) for seed in (2, 0, 1)}
    assert [e["seed"] for e in record("tiny", [runs[2]], splits, notebook="01")["seeds"]] == [2]
    content = record("tiny", [runs[1], runs[0]], splits, notebook="01")
    assert [entry["seed"] for entry in content["seeds"]] == [0, 1, 2]
    assert [entry["fingerprint"] for entry in content["seeds"]] == [runs[seed].fingerprint for seed in (0, 1, 2)]
    assert record("tiny", [runs[2]], splits, notebook="01") == content == written(root)  # no seed twice
    record("other", [runs[0]], splits, notebook="01")
    assert len(written(root, "other")["seeds"]) == 1


def train_and_record(folder, seed: int, barrier) -> None:
    """What each of two notebooks does that run at the same time."""
    torch.set_num_threads(1)
    my_utils.ROOT = folder
    os.environ |= {"RUNS_DIR": str(folder / "runs"), "RUN_SIZE": "smoke"}
    splits = my_utils.load_cifar10(synthetic=True).head(200, 100, 100)
    barrier.wait(300)
    for epochs in (1, 2, 3):
        run = fit(Tiny, splits, recipe(epochs=epochs), run=f"two/{epochs}", seed=seed, device="cpu")
        record(f"two_{epochs}", [run], splits, notebook="01")


def test_two_notebooks_that_train_and_record_at_the_same_time_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    pair = [context.Process(target=train_and_record, args=(tmp_path, seed, barrier)) for seed in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(300)
    assert [process.exitcode for process in pair] == [0, 0]
    assert len(list(tmp_path.glob("runs/smoke/two/*/*/run.json"))) == 6
    for epochs in (1, 2, 3):
        assert [entry["seed"] for entry in written(tmp_path, f"two_{epochs}")["seeds"]] == [0, 1]


def test_seeds_recorded_at_the_same_time_are_all_kept(root, splits):
    run = fit(Tiny, splits, recipe(epochs=1))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: record("tiny", [replace(run, seed=seed)], splits, notebook="01"), range(8)))
    assert [entry["seed"] for entry in written(root)["seeds"]] == list(range(8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95cos\nsystem\n",
        b'{"seeds": [',
        b"[" * 100_000,
        b'{"seeds": [{"seed": 0, "fingerprint": "0", "history": {"__class__": "os.system"}}]}',
        b'{"seeds": [{"seed": 1e999, "fingerprint": "0", "history": {}}]}',
        b'{"seeds": [{"seed": 0, "fingerprint": 7, "history": {}}]}',
        b'{"seeds": 3}',
        b"{}",
        b'{"seeds": [' + b"9" * 5000 + b"]}",
        None,
    ],
    ids="empty pickle half deep class infinite fingerprint number other digits huge".split(),  # noqa: SIM905
)
def test_what_is_no_record_is_refused_and_left_alone(root, splits, monkeypatch, content):
    run = fit(Tiny, splits, recipe(epochs=1))
    for part in ("build", "report"):
        path = root / part / "results" / "tiny.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(content or b"")
        if content is None:
            os.truncate(path, (64 << 20) + 1)  # takes no space on most disks
    with pytest.raises(ValueError, match=r"tiny\.json is no record"):
        record("tiny", [run], splits, notebook="01")
    monkeypatch.setenv("REUSE_RECORDS", "1")
    with pytest.raises(ValueError, match=r"tiny\.json is no record"):
        fit(Tiny, splits, recipe(epochs=2))
    assert content is None or path.read_bytes() == content


def test_another_variant_replaces_the_seeds(root, splits):
    record("tiny", [fit(Tiny, splits, recipe(), seed=seed) for seed in (0, 1)], splits, notebook="01")
    other = fit(Tiny, splits, recipe(learning_rate=0.01), seed=1)
    record("tiny", [other], splits, notebook="01")
    assert [entry["fingerprint"] for entry in written(root)["seeds"]] == [other.fingerprint]
    assert written(root)["recipe"]["learning_rate"] == 0.01


def test_a_failing_write_leaves_the_old_record(root, splits, monkeypatch):
    runs = [fit(Tiny, splits, recipe(), seed=seed) for seed in (0, 1)]
    before = record("tiny", runs[:1], splits, notebook="01")

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write tiny\.json.* free some space"):
            record("tiny", runs, splits, notebook="01")
    assert written(root) == before
    assert not [path for path in (root / "build" / "results").iterdir() if path.name.endswith(".part")]
    assert len(record("tiny", runs, splits, notebook="01")["seeds"]) == 2


@pytest.mark.parametrize(
    ("choose", "arguments", "says"),
    [
        (lambda a, b: [], {}, r"runs are \[\]; they must be one variant's runs, at least one"),
        (lambda a, b: [a, b], {}, "runs are .*one variant's runs"),
        (lambda a, b: [a], {"system": "S9"}, "system is 'S9'; it may be one of None, S0, S1, S2, S3, S4"),
    ],
    ids=["none", "mixed", "system"],
)
def test_what_cannot_be_recorded(root, splits, choose, arguments, says):
    one, other = (fit(Tiny, splits, recipe(epochs=1, learning_rate=rate)) for rate in (0.1, 0.2))
    with pytest.raises(ValueError, match=says):
        record("tiny", choose(one, other), splits, **{"notebook": "01"} | arguments)
    assert not (root / "build").exists()


# --- Tables ---


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.9], "90.00"),
        ([0.87654], "87.65"),
        ([0.9, 0.92], "91.00 ± 1.41"),  # 2 / sqrt(2)
        ([0.90, 0.91, 0.95], "92.00 ± 2.65"),  # sqrt((4 + 1 + 9) / 2)
        ([0.5, 0.5], "50.00 ± 0.00"),
        ([None], "-"),
        ([0.9, None], "-"),
    ],
)
def test_per_cent(values, text):
    assert percent(values) == text


def made_up(name, data="cifar10", published=None, **columns):
    seeds = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {
        "name": name,
        "data": data,
        "epochs": 10,
        "parameters": 1_234_567,
        "train_flops": 2.5e15,
        "published_top1": published,
        "seeds": seeds,
    }


def test_results_table():
    one = made_up("one", val_top1=[0.80], test_top1=[0.79], train_seconds=[61.6], published=0.9436)
    two = made_up("two", val_top1=[0.9, 0.92], test_top1=[0.88, 0.90], train_seconds=[100, 200])
    table = results_table([two, one])
    assert table.index.name == "name"
    assert table.index.tolist() == ["two", "one"]
    assert table.to_dict("index") == {
        "one": {
            "val top-1 %": "80.00",
            "test top-1 %": "79.00",
            "published %": "94.36",
            "epochs": 10,
            "seeds": 1,
            "parameters": "1,234,567",
            "train PFLOP": "2.500",
            "seconds": "62",
        },
        "two": {
            "val top-1 %": "91.00 ± 1.41",
            "test top-1 %": "89.00 ± 1.41",
            "published %": "-",
            "epochs": 10,
            "seeds": 2,
            "parameters": "1,234,567",
            "train PFLOP": "2.500",
            "seconds": "100",
        },
    }


def test_a_table_of_synthetic_data_says_so():
    real, other = (made_up(d, d, val_top1=[0.5], test_top1=[0.5], train_seconds=[1]) for d in ("cifar10", "synthetic"))
    assert results_table([real, other]).index.name == "synthetic data, not CIFAR-10"
