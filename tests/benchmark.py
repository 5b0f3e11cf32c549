"""Print one table of speeds, memory and import time, each beside another way: `python tests/benchmark.py`.

batches: crop, mirroring and normalisation; beside it torchvision's for PIL images, in a DataLoader with two workers
fit: notebook 01's network; beside it a bare loop over batches that lie ready
bfloat16: a bare loop with notebook 03's fast model on the CPU; beside it float32
steps: those of a whole training of notebook 03's fast model; beside it airbench94's, the recipe of the speed record
memory: the most that a process holds that loads all data and trains notebook 01's network for one epoch
--former FOLDER, a checkout of an earlier commit, adds rows against its `my_utils` and notebooks. --processes prints
another table: two processes that torchrun starts beside one, on the same batches of 256 images. Each number comes from
a process of its own; the two of a row run in turn, five times; what is printed are medians.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torchvision
from torchvision import transforms as T

sys.path.insert(0, os.environ.get("CODE", str(Path(__file__).resolve().parents[1])))  # which edition is measured
import my_utils as utils

CROP_AND_FLIP = utils.Augmentation(crop=4, flip="random")
ADAM = {"optimizer": "adamw", "learning_rate": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.0}
MUON = {"optimizer": "normalized_muon", "learning_rate": 0.17, "momentum": 0.6, "weight_decay": 0.0}
HEAD = {"learning_rate": 670.0, "weight_decay": 3e-6}
FAST = {"batch_size": 1000, "learning_rate": 53.0, "augmentation": utils.Augmentation(crop=2, flip="alternating")}
FAST |= {"schedule": "onecycle", "schedule_args": {"pct_start": 0.03, "cycle_momentum": False, "div_factor": 10}}
FAST |= {"optimizer_args": {"momentum": 0.85, "nesterov": True, "weight_decay": 4e-5}, "label_smoothing": 0.2}
FAST |= {"overrides": {"*bank": MUON, "*.gate.*": ADAM, "head.*": HEAD}}
STEPS = FAST | {"epochs": 12, "image_sides": [24, 28, 32]}
STEPS["overrides"] = {"*bank": MUON, "head.*": HEAD}
# Jordan, 2024, in its current version with Muon: https://github.com/KellerJordan/cifar10-airbench
AIRBENCH = FAST | {"epochs": 8, "batch_size": 2000, "learning_rate": 106.0}
AIRBENCH["overrides"] = {"*bank": MUON | {"learning_rate": 0.24}, "head.*": HEAD | {"learning_rate": 1340.0}}


def fit(build_model, splits, epochs, **settings) -> float:
    """Train with `my_utils.fit`; return images per second, without a first epoch of several."""
    recipe = utils.Recipe(epochs=epochs, **{"batch_size": 32, "augmentation": CROP_AND_FLIP} | settings)
    history = utils.fit(build_model, splits, recipe, run="benchmark", plot=False).history
    return len(history.step_loss) / epochs * recipe.batch_size / median(history.seconds[1:] or history.seconds)


def train(model, batches, device, dtype) -> float:
    """Train in a bare loop; return images per second."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    batches = [(images.to(device).contiguous(memory_format=layout), labels.to(device)) for images, labels in batches]
    optimizer = torch.optim.SGD(model.to(device, memory_format=layout).parameters(), 0.01)
    start = time.perf_counter()
    for images, labels in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    next(model.parameters()).sum().item()  # waits for a GPU
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - start)


def seconds(training: utils.Training, rounds: int) -> float:
    """Return what all steps of a training take, from `rounds` times four steps with each size of image."""
    recipe, device, total = training.recipe, training.device, 0.0
    labels = torch.randint(0, 10, (recipe.batch_size,), device=device)
    for side, epochs in Counter(map(recipe.image_side, range(recipe.epochs))).items():
        images = torch.randn(recipe.batch_size, 3, side, side, device=device)
        images, times = images.contiguous(memory_format=utils.layout(device)), []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for _ in range(4):  # in one of which fast's proxy learns
                training.learn(images, labels)
            next(training.model.parameters()).sum().item()  # waits for a GPU
            times.append((time.perf_counter() - start) / 4)
        total += epochs * training.steps * median(times[1:])
    return total


def read(batches) -> float:
    """Read all batches; return images per second."""
    start = time.perf_counter()
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - start)


def pictures(split) -> torch.utils.data.DataLoader:
    """Return running workers that read torchvision's data set of PIL images, over a split in memory."""
    data = torchvision.datasets.CIFAR10.__new__(torchvision.datasets.CIFAR10)
    data.data, data.targets = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
    augment, normalise = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()], T.Normalize(split.mean, split.std)
    data.transform, data.target_transform = T.Compose([*augment, T.ToTensor(), normalise]), None
    loader = torch.utils.data.DataLoader(data, 128, shuffle=True, num_workers=2, persistent_workers=True)
    next(iter(loader))
    return loader


def measure(what: str, quick: bool) -> float:
    """Return images per second of one way, or memory in GiB."""
    splits, cpu = utils.load_cifar10(synthetic=what != "memory"), torch.device("cpu")
    part, epochs = splits.head(1280 if quick else 3200, 10, 10), 2 if quick else 4
    basic, advanced = (utils.models_of(name) for name in ("01_baseline", "03_advanced_training"))
    if what == "memory":
        fit(basic.BasicNet, splits.head(640 if quick else None), 1)
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, KiB on Linux
        return importlib.import_module("resource").getrusage(0).ru_maxrss / unit
    filters = advanced.parts.whitening_filters(splits.train)
    fast = partial(advanced.ExpertNet, filters=filters, widths=(64, 256, 256), norm=True)
    if what in ("steps", "airbench94"):  # the same network
        switches = {"scale": False, "activation": torch.nn.GELU, "identity": True, "max_features": True}
        switches |= {"small_logits": True, "mixture": advanced.Conv}
        network, recipe = partial(fast, **switches), utils.Recipe(**(STEPS if what == "steps" else AIRBENCH))
        settings = {"recipe": recipe, "images": 50_000, "device": utils.pick_device()}
        if what == "steps":
            proxy = {"proxy": partial(network, widths=(32, 64, 64)), "proxy_recipe": recipe}
            training = advanced.HarderHalf(network(), **settings, **proxy)
        else:
            utils.orthogonalize = partial(utils.orthogonalize, steps=3)
            training = utils.Training(network(), **settings)
        return seconds(training, 1 if quick else 5)
    ready = partial(utils.batches, part.train, seed=0)
    return {
        "batches": lambda: read(utils.batches(splits.train, 128, augmentation=CROP_AND_FLIP, seed=0)),
        "pictures": lambda: read(pictures(splits.train[: 1280 if quick else None])),
        "fit": lambda: fit(basic.BasicNet, part, epochs),
        "processes": lambda: fit(basic.BasicNet, part, epochs, batch_size=256),
        "fast": lambda: fit(fast, part, epochs, **FAST),
        "bare": lambda: train(basic.BasicNet(), ready(32), utils.pick_device(), utils.pick_precision()),
        "bfloat16": lambda: train(fast(), ready(128), cpu, torch.bfloat16),
        "float32": lambda: train(fast(), ready(128), cpu, torch.float32),
    }[what]()


def run(*command, **environment) -> float:
    """Return the number that another process prints last; its training leaves no trace."""
    with tempfile.TemporaryDirectory() as store:
        environment |= {"RUN_SIZE": "quick", "RUNS_DIR": store}
        said = subprocess.run([sys.executable, *command], env=os.environ | environment, capture_output=True, text=True)
    return float(said.stdout.split()[-1]) if said.returncode == 0 else sys.exit(said.stderr)


def main(quick: bool, former: Path | None, processes: bool) -> None:
    def way(what, *launcher, code=sys.path[0], threads=None):
        environment = {"CODE": code, "PYTHONPATH": code} | ({"OMP_NUM_THREADS": threads} if threads else {})
        clock = "import time; start = time.perf_counter(); import my_utils; print(time.perf_counter() - start)"
        command = ["-c", clock] if what == "import" else [*launcher, __file__, what, *["--quick"] * quick]
        return partial(run, *command, **environment)

    def row(name, target, here, beside=None, unit="{:,.0f} images/s"):
        pairs = [(here(), beside() if beside else 1) for _ in range(1 if quick else 5)]
        one, other = (unit.format(median(values)) for values in zip(*pairs, strict=True))
        other = f"{other:>18}{median(a / b for a, b in pairs):>7.2f}" if beside else " " * 25
        print(f"{name:32}{one:>18}{other}  {target}", flush=True)

    print(f"{utils.describe_device()}, torch {torch.__version__}\n{'':46}here{'beside it':>18}  ratio  target")
    if processes:
        two = way("processes", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", threads="1")
        for threads in ("1", "2"):  # on a CPU each of the two processes has one thread
            row(f"2 processes, 1 with threads: {threads}", "", two, way("processes", threads=threads))
        return
    row("batches, torchvision's", "at least 10", way("batches"), way("pictures"))
    row("fit, a bare loop", "at least 0.95", way("fit"), way("bare"))
    row("bfloat16, float32", "at least 1.6 where it is taken", way("bfloat16"), way("float32"))
    row("steps of fast, of airbench94", "at most 0.8", way("steps"), way("airbench94"), "{:.0f} s")
    row("memory", "below 2", way("memory"), unit="{:.2f} GiB")
    row("import", "", way("import"), unit="{:.2f} s")
    if former:
        with tempfile.TemporaryDirectory() as copy:  # for a former edition may write where it stands
            shutil.copy(former / "my_utils.py", copy)
            shutil.copytree(former / "notebooks", Path(copy, "notebooks"))
            row("fit, former", "at least 0.98", way("fit"), way("fit", code=copy))
            row("fit of the fast model, former", "at least 0.98", way("fast"), way("fast", code=copy))
            row("import, former", "at most 1", way("import"), way("import", code=copy), "{:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help=argparse.SUPPRESS)  # to measure in this process
    parser.add_argument("--quick", action="store_true", help="once and in a tiny size, which measures nothing")
    parser.add_argument("--former", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--processes", action="store_true", help="two processes beside one")
    a = parser.parse_args()
    print(measure(a.what, a.quick)) if a.what else main(a.quick, a.former, a.processes)
