"""The run store: what counts as the same run, and what survives kills, faults and full disks."""

import ast
import contextlib
import errno
import importlib.util
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import Tiny, assert_same, each_forward, recipe
from torch import nn

import my_utils

fit = partial(my_utils.fit, run="test/tiny", plot=False)
pytestmark = pytest.mark.usefixtures("store")


def load(path: Path):
    """Import a Python file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folders(store: Path) -> set[str]:
    return {str(path.parent.relative_to(store)) for path in store.glob("**/checkpoint.pt")}


# --- The same run is loaded, another one is trained ---


@pytest.mark.parametrize("averaging", [None, 0.9])
def test_a_finished_run_is_loaded_without_training(splits, store, capsys, averaging):
    settings = recipe(weight_averaging=averaging)
    trained = fit(Tiny, splits, settings)
    assert "trained before" not in capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in store.glob("**/*") if path.is_file()}
    with each_forward() as calls:
        loaded = fit(Tiny, splits, settings)
    assert calls == []
    assert "test/tiny, seed 0: trained before, loaded from the run store" in capsys.readouterr().out
    assert_same(trained, loaded)
    assert loaded.history.seconds == trained.history.seconds
    assert not loaded.model.training and not trained.model.training
    for name in (
        "name",
        "seed",
        "recipe",
        "identity",
        "fingerprint",
        "parameters",
        "train_flops",
        "device",
        "versions",
    ):
        assert getattr(loaded, name) == getattr(trained, name), name
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_what_the_store_holds(splits, store):
    run = fit(Tiny, splits, recipe(), seed=3)
    folder = store / "smoke" / "test" / "tiny" / f"seed3-{run.fingerprint}"
    assert {"run.json", "weights.safetensors", "checkpoint.pt"} <= {path.name for path in folder.iterdir()}
    stored = json.loads((folder / "run.json").read_text())
    assert my_utils.Recipe(**stored["recipe"]) == recipe()
    assert stored["history"] == asdict(run.history)
    assert run.parameters == sum(p.numel() for p in run.model.parameters())
    assert run.train_flops == 3 * my_utils.count_flops(run.model) * 2 * 200


def changed_pixel(splits):
    images = splits.train.images.clone()
    images[17, 1, 5, 5] ^= 1
    return replace(splits, train=replace(splits.train, images=images))


def changed_label(splits):
    labels = splits.val.labels.clone()
    labels[3] = (labels[3] + 1) % 10
    return replace(splits, val=replace(splits.val, labels=labels))


def changed_normalization(splits):
    return replace(splits, train=replace(splits.train, std=(0.2023, 0.1994, 0.2010)))


@pytest.mark.parametrize(
    "change",
    [
        lambda splits: (splits, recipe(learning_rate=0.051), 0),
        lambda splits: (splits, recipe(epochs=1), 0),
        lambda splits: (splits, recipe(augmentation=my_utils.Augmentation(crop=1)), 0),
        lambda splits: (splits, recipe(), 1),
        lambda splits: (changed_pixel(splits), recipe(), 0),
        lambda splits: (changed_label(splits), recipe(), 0),
        lambda splits: (changed_normalization(splits), recipe(), 0),
        lambda splits: (splits.with_val_in_train(), recipe(), 0),
    ],
    ids=["recipe", "epochs", "augmentation", "seed", "pixel", "label", "normalization", "merged"],
)
def test_another_recipe_seed_or_data_is_another_run(splits, store, change):
    fit(Tiny, splits, recipe())
    before = folders(store)
    other_splits, other_recipe, seed = change(splits)
    with each_forward() as calls:
        fit(Tiny, other_splits, other_recipe, seed=seed)
    assert len(calls) > 0
    assert len(folders(store) - before) == 1 and before < folders(store)


MODEL = '''
import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

SCALE = 1.5
RATES = {"negative": 0.1}
soften = lambda x: x * 0.9
sharpen = lambda x: x * 1.1
left = functools.partial(F.leaky_relu, negative_slope=0.01)
right = functools.partial(F.leaky_relu, negative_slope=0.02)


@dataclass
class Settings:
    """What the network is made of."""

    width: int = 4
    shift: float = 0.5


class Offset:
    """A helper that is no module."""

    def __call__(self, x):
        return x + 0.125


def twice(x):
    """Double it."""
    return x + x


def activate(x, power=SCALE):
    # The sign is lost here.
    return twice(x.abs()) ** power


class Base(nn.Module):
    def finish(self, logits):
        return logits / self.temperature


class Net(Base):
    """A network with all that a fingerprint must see."""

    bonus = 3.0

    def __init__(self, width: int = 4):
        super().__init__()
        self.temperature = 2.0
        self.offset = Offset()
        self.conv = nn.Conv2d(3, width, 3, stride=4)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width * 64, 10)

    @property
    def gain(self):
        return 1.25

    @staticmethod
    def pool(x):
        return x.roll((1, 0), (2, 3)).flatten(1)

    def forward(self, x):
        """Return the logits."""
        x = activate(self.conv(x)) * self.gain  # a comment
        x = right(left(sharpen(soften(self.offset(x)))), inplace=False) * RATES["negative"]
        return self.finish(self.head(self.drop(self.pool(x)))) * SCALE + self.bonus


def make(shift, width=4):
    net = Net(width)

    def build():
        net.head.bias.data += shift
        return net

    return build()


build = functools.partial(make, 0.5)
build_by_settings = lambda: make(Settings().shift, Settings().width)
'''


def identity(tmp_path, splits, source: str, build: str = "build") -> str:
    """Return the fingerprint of a model whose source is written to a file of its own."""
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / f"model{len(list(tmp_path.iterdir()))}.py"
    path.write_text(source)
    return fit(getattr(load(path), build), splits, recipe(epochs=1, batch_size=200)).identity


def replaced(old: str, new: str) -> str:
    assert MODEL.count(old) == 1, old
    return MODEL.replace(old, new)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, splits):
    """The fingerprint of the unchanged model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(tmp_path_factory.mktemp("plain")))
        return identity(tmp_path_factory.mktemp("models"), splits, MODEL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.conv(x)) * self.gain", "self.conv(x)) / self.gain"),
        ("self.temperature = 2.0", "self.temperature = 3.0"),
        ("return x + x", "return x * 2"),
        ("SCALE = 1.5", "SCALE = 1.25"),
        ('RATES = {"negative": 0.1}', 'RATES = {"negative": 0.2}'),
        ("functools.partial(make, 0.5)", "functools.partial(make, 0.25)"),
        ("functools.partial(make, 0.5)", "functools.partial(make, 0.5, width=5)"),
        ("nn.Dropout(0.1)", "nn.Dropout(0.2)"),
        ("stride=4)", "stride=4, padding=1)"),
        ("bonus = 3.0", "bonus = 4.0"),
        ("return 1.25", "return 1.5"),
        ("(1, 0), (2, 3)", "(0, 1), (2, 3)"),
        ("logits / self.temperature", "logits * self.temperature"),
        ("net.head.bias.data += shift", "net.head.bias.data -= shift"),
        ("return x + 0.125", "return x + 0.25"),
        ("lambda x: x * 0.9", "lambda x: x * 0.8"),
        ("lambda x: x * 1.1", "lambda x: x * 1.2"),
        ("negative_slope=0.01", "negative_slope=0.03"),
        ("negative_slope=0.02", "negative_slope=0.03"),
    ],
)
def test_another_model_is_another_run(tmp_path, splits, plain, old, new):
    assert identity(tmp_path / "models", splits, replaced(old, new)) != plain


def test_a_changed_default_argument_is_another_run(tmp_path, splits):
    source = replaced("SCALE = 1.5", "SCALE = 1.5\nPOWER = 1.0").replace("power=SCALE", "power=POWER")
    first = identity(tmp_path / "models", splits, source)
    assert identity(tmp_path / "models", splits, source.replace("POWER = 1.0", "POWER = 0.5")) != first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a comment", ""),
        ("  # a comment", "  # another comment, twice as long"),
        ("    # The sign is lost here.\n", ""),
        ('"""Return the logits."""', '"""Return what the head says."""'),
        ('        """Return the logits."""\n', ""),
        ('"""A network with all that a fingerprint must see."""', '"""A network."""'),
        ("activate(self.conv(x)) * self.gain", "activate( self.conv( x ) )*self.gain"),
        ("\n\ndef make", "\n\nUNUSED = 1\n\n\ndef unused():\n    return 2\n\n\ndef make"),
    ],
)
def test_what_changes_nothing_is_the_same_run(tmp_path, splits, plain, old, new):
    assert identity(tmp_path / "models", splits, replaced(old, new)) == plain


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.temperature = 2.0", 'self.temperature = float(os.environ["SETTING"])'),
        ("nn.Dropout(0.1)", 'nn.Dropout(float(os.environ["SETTING"]))'),
    ],
)
def test_settings_count_wherever_they_come_from(tmp_path, splits, monkeypatch, old, new):
    """The source is the same, the model is not."""
    source = "import os\n" + replaced(old, new)
    found = []
    for setting in ("0.1", "0.2"):
        monkeypatch.setenv("SETTING", setting)
        found.append(identity(tmp_path / "models", splits, source))
    assert found[0] != found[1]


def test_settings_may_be_a_dataclass(tmp_path, splits):
    first = identity(tmp_path / "models", splits, MODEL, "build_by_settings")
    other = replaced("shift: float = 0.5", "shift: float = 0.25")
    assert identity(tmp_path / "models", splits, other, "build_by_settings") != first


def test_a_model_without_source_is_refused(splits):
    names = {"nn": nn}
    exec("def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))", names)
    with pytest.raises(ValueError, match="source of build cannot be read"):
        fit(names["build"], splits, recipe())


def test_a_probe_belongs_to_the_run(splits):
    def probe(model):
        return {"size": model.head.weight.norm().item()}

    plain, probed = fit(Tiny, splits, recipe()), fit(Tiny, splits, recipe(), probe=probe)
    assert plain.identity != probed.identity
    assert len(probed.history.probe) == 2
    assert probed.history.probe[-1] == {"size": probed.model.head.weight.norm().item()}
    with each_forward() as calls:
        assert fit(Tiny, splits, recipe(), probe=probe).history == probed.history
    assert calls == []
    probed.history.probe = []
    assert_same(plain, probed)


def test_a_probe_sees_what_is_evaluated(splits):
    """With averaged weights that is the averaged model, and a forward pass in a probe moves nothing."""
    images = next(my_utils.batches(splits.val, 100))[0]

    def probe(model):
        return {"size": model.head.weight.norm().item(), "mean": model(images).mean().item()}

    settings = recipe(weight_averaging=0.9)
    plain, probed = fit(Tiny, splits, settings), fit(Tiny, splits, settings, probe=probe)
    assert probed.history.probe[-1] == pytest.approx(probe(probed.model))
    probed.history.probe = []
    assert_same(plain, probed)


# --- Kills ---

SCRIPT = '''
import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import my_utils
from my_utils import Augmentation, Recipe, Split, Splits

less = partial(F.leaky_relu, negative_slope=0.01)
more = partial(F.leaky_relu, negative_slope=0.2)
double = lambda x: 2 * x
shift = lambda x: x + 0.25


class Slow(nn.Module):
    """A small network with every kind of state, so slow to train that it can be killed in time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(512, 10)

    def forward(self, x):
        if self.training:
            time.sleep(0.05)
        x = less(shift(more(double(self.norm(self.conv(x))))))
        return self.head(self.drop(x.flatten(1)))


def train():
    images, labels = my_utils.draw_synthetic(300)
    make = partial(Split, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    parts = [make(images[start : start + 100], labels[start : start + 100]) for start in (0, 100, 200)]
    recipe = Recipe(
        epochs=6,
        batch_size=25,
        optimizer="muon",
        learning_rate=0.02,
        overrides=dict.fromkeys(
            ["conv.*", "norm.*", "*.bias"],
            {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
        ),
        schedule="onecycle",
        augmentation=Augmentation(crop=2, flip="alternating", cutout=8),
        weight_averaging=0.8,
        precision="float32",
    )
    return my_utils.fit(Slow, Splits(*parts, "synthetic"), recipe, run="test/slow", plot=False)


if __name__ == "__main__":
    train()
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train_slowly.py"
    path.write_text(SCRIPT)
    return path


def written(store: Path) -> set[int]:
    """When the checkpoints were written; empty while one is being replaced."""
    with contextlib.suppress(FileNotFoundError):
        return {path.stat().st_mtime_ns for path in store.glob("**/checkpoint.pt")}
    return set()


@contextlib.contextmanager
def running(script: Path, store: Path):
    """Start the script, yield its process after the next checkpoint, and kill it at the end."""
    before = written(store)
    environment = {"PYTHONPATH": str(Path(my_utils.__file__).parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen([sys.executable, script], env=os.environ | environment, stderr=subprocess.PIPE) as process:
        try:
            while written(store) in (before, set()):
                assert process.poll() is None, process.stderr.read().decode()
                time.sleep(0.005)
            yield process
        finally:
            process.kill()
    killed = 1 if sys.platform == "win32" else -signal.SIGKILL
    assert process.returncode == killed, "the script ended before it was killed"


def test_killed_three_times_ends_with_the_same_bits(script, store, monkeypatch, capsys):
    seed = random.randrange(2**32)
    print("seed of the moments", seed)  # pytest shows it if the test fails
    moments = random.Random(seed)
    for _ in range(3):
        with running(script, store):
            time.sleep(moments.uniform(0, 0.25))  # an epoch takes 0.2 seconds
    killed = load(script).train()
    output = capsys.readouterr().out
    print(output)
    assert len(list(store.glob("**/checkpoint.pt"))) == 1  # every process knew the run again
    assert "going on after epoch" in output and "going on after epoch 6" not in output
    monkeypatch.setenv("RUNS_DIR", str(store / "uninterrupted"))
    whole = load(script).train()
    assert_same(killed, whole)
    files = [next((store / part).glob("**/weights.safetensors")) for part in ("smoke", "uninterrupted")]
    assert files[0].read_bytes() == files[1].read_bytes()
    stored = [json.loads(path.with_name("run.json").read_text()) for path in files]
    for content in stored:
        assert len(content["history"].pop("seconds")) == 6
    assert stored[0] == stored[1]


def test_two_at_once_are_refused_and_a_dead_one_holds_nothing(script, store):
    with running(script, store) as process:
        says = rf"run test/slow, seed 0 is being used by process {process.pid} on "
        with pytest.raises(RuntimeError, match=says):
            load(script).train()
    assert list(store.glob("**/lock"))
    assert len(load(script).train().history.seconds) == 6


# --- Damage ---


class Payload:
    """A pickle that would run a command when it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def flipped(good: bytes, share: float) -> bytes:
    """Flip one bit, so far into the bytes."""
    bad = bytearray(good)
    bad[int(share * len(good))] ^= 16
    return bytes(bad)


def flipped_inside(good: bytes) -> bytes:
    """Flip one bit of the largest tensor in a checkpoint."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda item: item.file_size))
    return good.replace(tensor, flipped(tensor, 0.5))


def bomb(good: bytes) -> bytes:
    """The same archive, whose first tensor unpacks to 1 GiB of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            if item.filename.endswith("data/0"):
                with target.open(item.filename, "w") as file:
                    for _ in range(1024):
                        file.write(bytes(1 << 20))
            else:
                target.writestr(item.filename, source.read(item))
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("before", [False, True], ids=["alone", "with the one before"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda good, mark: good[: len(good) // 2],
        lambda good, mark: good[:-1],
        lambda good, mark: good[:10],
        lambda good, mark: b"",
        lambda good, mark: b"\0" * len(good),
        lambda good, mark: b"hello world\n" * 100,
        lambda good, mark: random.Random(0).randbytes(2000),
        lambda good, mark: pickle.dumps(Payload(mark)),
        lambda good, mark: pickle.dumps(Payload(mark), protocol=2),
        lambda good, mark: saved({"model": Payload(mark)}),
        lambda good, mark: saved({"weights": torch.zeros(3)}),
        lambda good, mark: saved([1, 2, 3]),
        lambda good, mark: flipped_inside(good),
        lambda good, mark: bomb(good),
        lambda good, mark: saved({"model": Zeros()}),
    ],
    ids=[
        *(
            "half",
            "short",
            "start",
            "empty",
            "zeros",
            "text",
            "random",
            "pickle",
            "pickle2",
            "archive",
            "other",
            "list",
        ),
        *("flip", "bomb", "zeros made while reading"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_never_run(splits, store, tmp_path, capsys, damage, before):
    reference = fit(Tiny, splits, recipe())
    [checkpoint] = store.glob("**/checkpoint.pt")
    checkpoint.with_name("run.json").unlink()  # as if it had been stopped before its end
    mark = tmp_path / "mark"
    checkpoint.write_bytes(damage(checkpoint.read_bytes(), mark))
    if before:
        capsys.readouterr()
        assert_same(fit(Tiny, splits, recipe()), reference)
        printed = capsys.readouterr().out
        assert f"{checkpoint} is damaged, so the one before is used" in printed
        assert "going on after epoch 1 of 2" in printed and not mark.exists()
        return
    checkpoint.with_name("checkpoint.previous.pt").unlink()
    with pytest.raises(RuntimeError, match="test/tiny, seed 0, is damaged") as caught:
        fit(Tiny, splits, recipe())
    assert f"Delete {checkpoint} to train this run again from the start" in str(caught.value)
    assert not mark.exists()
    checkpoint.unlink()
    assert_same(fit(Tiny, splits, recipe()), reference)


def test_every_flipped_bit_is_harmless_or_refused(splits, store):
    """The checksums of the archive cover all that is read, for checkpoints of any age."""
    fit(Tiny, splits, recipe())
    [checkpoint] = store.glob("**/checkpoint.pt")
    good, cpu = checkpoint.read_bytes(), torch.device("cpu")
    expected, places, refused = saved(my_utils._open_checkpoint(good, cpu)), random.Random(0), 0
    for _ in range(100):
        bad = flipped(good, places.random())
        try:
            found = my_utils._open_checkpoint(bad, cpu)
        except Exception:
            refused += 1
        else:
            assert saved(found) == expected
    assert refused > 50  # the others fell between the parts of the archive


class Zeros:
    """Unpickled, it becomes 64 MiB of zeros: a function that torch allows, with a number that can be anything."""

    def __reduce__(self):
        return bytearray, (1 << 26,)


@pytest.mark.parametrize("content", [saved({"model": Zeros()}), None], ids=["made while reading", "a huge file"])
def test_a_hostile_checkpoint_takes_no_memory(splits, store, content):
    fit(Tiny, splits, recipe())
    [checkpoint] = store.glob("**/checkpoint.pt")
    for name in ("run.json", "checkpoint.previous.pt"):
        checkpoint.with_name(name).unlink()
    checkpoint.write_bytes(content or b"")
    if content is None:
        os.truncate(checkpoint, 1 << 28)  # takes no space on most disks
    tracemalloc.start()
    try:
        with pytest.raises(RuntimeError, match="is damaged") as caught:
            fit(Tiny, splits, recipe())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    says = "holds __builtin__ bytearray, which no tensor needs" if content else "larger than 67,"
    assert says in str(caught.value.__cause__)
    assert peak < 1 << 25


def test_a_checkpoint_that_declares_too_much_takes_no_memory(splits, store):
    fit(Tiny, splits, recipe())
    [checkpoint] = store.glob("**/checkpoint.pt")
    with pytest.raises(ValueError, match="declares more than it holds"):
        my_utils._open_checkpoint(bomb(checkpoint.read_bytes()), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run.json", lambda good: good[: len(good) // 2]),
        ("run.json", lambda good: b""),
        ("run.json", lambda good: b'{"history": {"__class__": "os.system"}}'),
        ("run.json", lambda good: b'{"history": {}}'),
        ("run.json", lambda good: b"[" * 100_000),
        ("run.json", lambda good: good.replace(b'"device"', b'"advice"')),
        ("weights.safetensors", lambda good: safetensors.torch.save({"conv.weight": torch.zeros(3)})),
        ("weights.safetensors", lambda good: flipped(good, 0.7)),
        ("weights.safetensors", lambda good: good[:-9]),
        ("weights.safetensors", lambda good: (1 << 60).to_bytes(8, "little") + good[8:]),  # a header without an end
    ],
)
def test_a_damaged_finished_run_is_made_again_from_its_checkpoint(splits, store, name, damage):
    reference = fit(Tiny, splits, recipe())
    [path] = store.glob(f"**/{name}")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with each_forward() as calls, pytest.warns(UserWarning, match="holds a damaged run"):
        assert_same(fit(Tiny, splits, recipe()), reference)
    assert calls == []  # nothing was trained
    with each_forward() as calls:
        assert_same(fit(Tiny, splits, recipe()), reference)
    assert path.read_bytes() == good


def test_a_run_finished_before_weights_had_a_digest_is_loaded(splits, store):
    reference = fit(Tiny, splits, recipe())
    [path] = store.glob("**/run.json")
    stored = json.loads(path.read_text())
    del stored["weights_sha256"]
    path.write_text(json.dumps(stored))
    with each_forward() as calls:
        assert_same(fit(Tiny, splits, recipe()), reference)
        weights = path.with_name("weights.safetensors")
        weights.write_bytes((1 << 60).to_bytes(8, "little") + weights.read_bytes()[8:])  # a header without an end
        with pytest.warns(UserWarning, match="holds a damaged run"):
            assert_same(fit(Tiny, splits, recipe()), reference)
    assert calls == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_leaves_the_checkpoint_before(splits, store, monkeypatch, number):
    reference = fit(Tiny, splits, recipe())
    monkeypatch.setenv("RUNS_DIR", str(store / "locked"))
    calls = []

    def locked(path, mode):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        return open(path, mode)

    monkeypatch.setattr(my_utils, "open", locked, raising=False)
    with pytest.raises(OSError, match=r"cannot write checkpoint.pt.* make the folder writable, .*RUNS_DIR"):
        fit(Tiny, splits, recipe())
    [checkpoint] = (store / "locked").glob("**/checkpoint*.pt")
    assert len(torch.load(checkpoint, weights_only=True)["history"]["seconds"]) == 1
    assert_same(fit(Tiny, splits, recipe()), reference)


def test_the_payload_is_a_real_one(tmp_path):
    """Else the test above could not fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def test_nothing_is_unpickled_blindly():
    calls = [
        (ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for node in ast.walk(ast.parse(Path(my_utils.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    loads = [keywords for name, keywords in calls if name == "torch.load"]
    assert loads and all(keywords.get("weights_only") == "True" for keywords in loads)
    assert not {name for name, _ in calls} & {"pickle.load", "pickle.loads", "np.load", "load", "eval", "exec"}


@pytest.mark.parametrize("call", [1, 2, 3, 4], ids=["first epoch", "second epoch", "weights", "end"])
def test_a_full_disk_leaves_the_checkpoint_before(splits, store, monkeypatch, call):
    settings = recipe(weight_averaging=0.9)
    reference = fit(Tiny, splits, settings)
    monkeypatch.setenv("RUNS_DIR", str(store / "full"))
    fsync, calls, kept = os.fsync, [], []

    def full(file):
        calls.append(file)
        if len(calls) == call:
            kept.extend(path.read_bytes() for path in (store / "full").glob("**/checkpoint.pt"))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.* free some space, .*RUNS_DIR") as caught:
        fit(Tiny, splits, settings)
    assert caught.value.errno == errno.ENOSPC
    assert [path.read_bytes() for path in (store / "full").glob("**/checkpoint.pt")] == kept
    assert len(kept) == (call > 1)
    assert not list(store.glob("**/.*.part"))
    assert_same(fit(Tiny, splits, settings), reference)  # there is space again


# --- Committed records ---


def test_a_committed_record_stands_in_for_training(splits, store, tmp_path, monkeypatch, capsys):
    real = replace(splits, source="cifar10")
    monkeypatch.setattr(my_utils, "ROOT", tmp_path)
    monkeypatch.setenv("RUN_SIZE", "full")
    monkeypatch.setenv("RECORD", "1")
    trained = fit(Tiny, real, recipe())
    written = my_utils.record("tiny", [trained], real, notebook="01")
    assert (tmp_path / "report" / "results" / "tiny.json").exists()

    monkeypatch.setenv("RUNS_DIR", str(store / "elsewhere"))
    monkeypatch.setenv("REUSE_RECORDS", "1")
    capsys.readouterr()
    with each_forward() as calls:
        reused = fit(Tiny, real, recipe())
    assert calls == [] and reused.model is None
    assert "taken from the record tiny.json" in capsys.readouterr().out
    assert reused.fingerprint == trained.fingerprint
    assert reused.history.val_top1 == trained.history.val_top1
    assert my_utils.record("tiny", [reused], real, notebook="01") == written

    with each_forward() as calls:
        assert fit(Tiny, real, recipe(), seed=1).model is not None  # not in the record
    assert len(calls) > 0
    assert_same(fit(Tiny, real, recipe(), need_model=True), trained)


def test_without_being_asked_a_record_does_not_stand_in(splits, store, tmp_path, monkeypatch):
    real = replace(splits, source="cifar10")
    monkeypatch.setattr(my_utils, "ROOT", tmp_path)
    monkeypatch.setenv("RUN_SIZE", "full")
    monkeypatch.setenv("RECORD", "1")
    my_utils.record("tiny", [fit(Tiny, real, recipe())], real, notebook="01")
    monkeypatch.setenv("RUNS_DIR", str(store / "elsewhere"))
    assert fit(Tiny, real, recipe()).model is not None
