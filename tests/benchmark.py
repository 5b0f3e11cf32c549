"""Print one table of speeds, memory and import time, each beside another way of doing it: `python tests/benchmark.py`.

- batches: random crop, mirroring and normalisation to float batches of 128, on the CPU; usual: torchvision's transforms
  of PIL images in a DataLoader whose two workers are running before the clock starts.
- fit: notebook 01's network; usual: a bare loop over batches that lie ready, with the same optimizer and precision.
- bfloat16: training steps of a network of three blocks (64, 256 and 256 channels) on the CPU; usual: float32.
- memory: the most that a process holds that loads all data and trains notebook 01's network for one epoch.
- import: of `my_utils`, in a new process.

`--former FOLDER`, a checkout of an earlier commit, adds rows against its `my_utils` and notebooks: training of notebook
01's network and of the fast one of notebook 03, and the import. `--processes` prints another table: one process, and
two that torchrun starts, on the same global batch of 256 images.

Both sides of a row run in turn, five times; what is printed are medians, and the median of the ratios.
"""

import argparse
import contextlib
import functools
import importlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.environ.get("CODE", str(ROOT)))  # the edition to measure
import torch
import torchvision
from torch import nn
from torchvision import transforms as T

import my_utils as utils

IMPORT = "import time; start = time.perf_counter(); import my_utils; print(time.perf_counter() - start)"
BASIC = {"batch_size": 32, "learning_rate": 0.01, "augmentation": utils.Augmentation(flip="random")}
ADAM = {"optimizer": "adamw", "learning_rate": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.0}
MUON = {"optimizer": "normalized_muon", "learning_rate": 0.17, "momentum": 0.6, "weight_decay": 0.0}
FAST = {  # the recipe of notebook 03's fast model
    "batch_size": 1000,
    "learning_rate": 53.0,
    "optimizer_args": {"momentum": 0.85, "nesterov": True, "weight_decay": 4e-5},
    "overrides": {"*bank": MUON, "*.gate.*": ADAM, "head.*": {"learning_rate": 670.0, "weight_decay": 3e-6}},
    "schedule": "onecycle",
    "schedule_args": {"pct_start": 0.03, "anneal_strategy": "linear", "cycle_momentum": False, "div_factor": 10},
    "label_smoothing": 0.2,
    "augmentation": utils.Augmentation(crop=2, flip="alternating"),
}


def fit(build_model, splits, epochs=1, seed=0, **settings) -> float:
    """Train with `my_utils.fit`, its progress unseen; return images per second, without a first epoch of several."""
    recipe = utils.Recipe(epochs=epochs, **BASIC | settings)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        history = utils.fit(build_model, splits, recipe, run="benchmark", seed=seed, plot=False).history
    return len(history.step_loss) / epochs * recipe.batch_size / median(history.seconds[1:] or history.seconds)


def measure(what: str, quick: bool) -> float:
    """Return images per second of one training, or memory in GiB, of the edition in the environment variable CODE."""
    if what == "memory":
        fit(utils.models_of("01_baseline").BasicNet, utils.load_cifar10().head(640 if quick else None))
        peak = importlib.import_module("resource").getrusage(0).ru_maxrss  # in bytes on macOS, in KiB on Linux
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
    splits, epochs = utils.load_cifar10(synthetic=True), 2 if quick else 4
    if what == "fast":
        final = utils.models_of("03_advanced_training")
        filters = final.parts.whitening_filters(splits.train)
        network = functools.partial(final.FinalNet, filters=filters, widths=(64, 256, 256), norm=True)
        return fit(network, splits.head(1000 if quick else 3000, 10, 10), epochs, **FAST)
    network, batch_size = utils.models_of("01_baseline").BasicNet, 256 if what == "processes" else 32
    return fit(network, splits.head(1280 if quick else 5120, 10, 10), epochs, batch_size=batch_size)


def run(*command, **environment) -> float:
    """Return the number that a new process prints."""
    with tempfile.TemporaryDirectory() as store:  # the measured trainings leave no trace
        environment = os.environ | {"RUN_SIZE": "quick", "RUNS_DIR": store, "CODE": str(ROOT)} | environment
        command = [sys.executable, *map(str, command)]
        return float(subprocess.run(command, env=environment, check=True, text=True, stdout=-1).stdout.split()[-1])


def train(model, batches, device, dtype) -> float:
    """Train in a bare loop; return images per second."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    batches = [(images.to(device).contiguous(memory_format=layout), labels.to(device)) for images, labels in batches]
    optimizer = torch.optim.SGD(model.to(device, memory_format=layout).parameters(), BASIC["learning_rate"])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start = time.perf_counter()
    for images, labels in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        scaler.scale(nn.functional.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    next(model.parameters()).sum().item()  # waits for a GPU
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - start)


def read(batches) -> float:
    """Read all batches; return images per second."""
    start = time.perf_counter()
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - start)


def pictures(split):
    """Return torchvision's data set of PIL images, over a split that is in memory already."""
    data = torchvision.datasets.CIFAR10.__new__(torchvision.datasets.CIFAR10)
    data.data, data.targets = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
    augment, normalise = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()], T.Normalize(split.mean, split.std)
    data.transform, data.target_transform = T.Compose([*augment, T.ToTensor(), normalise]), None
    return data


def convnet():
    layers, before = [], 3
    for channels in (64, 256, 256):
        for inputs in (before, channels):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers, before = [*layers, nn.MaxPool2d(2)], channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def compare(name, target, repeats, here, usual=lambda repeat: None, form="{:,.0f} images/s"):
    """Print the row of two functions of the number of the repeat."""
    pairs = [(here(repeat), usual(repeat)) for repeat in range(repeats)]
    ones, others = zip(*pairs, strict=True)
    texts = [
        form.format(median(ones)),
        *([form.format(median(others)), f"{median(a / b for a, b in pairs):.2f}"] if others[0] else ["", ""]),
    ]
    print("{:30}{:>18}{:>18}{:>7}  {}".format(name, *texts, target), flush=True)


def table(quick: bool, former: Path | None) -> None:
    repeats, splits, device, cpu = 1 if quick else 5, utils.load_cifar10(), utils.pick_device(), torch.device("cpu")
    print(f"{utils.describe_device()}, torch {torch.__version__}, data: {splits.source}\n")
    print("{:30}{:>18}{:>18}{:>7}  {}".format("", "here", "usual", "ratio", "target"))
    split, augmentation = splits.train[: 640 if quick else None], utils.Augmentation(crop=4, flip="random")
    loader = torch.utils.data.DataLoader(pictures(split), 128, shuffle=True, num_workers=2, persistent_workers=True)
    next(iter(loader))  # starts the workers
    here = lambda n: read(utils.batches(split, 128, augmentation=augmentation, seed=n))  # noqa: E731
    compare("batches, torchvision's", "at least 10", repeats, here, lambda n: read(loader))

    part, network = splits.head(320 if quick else 9600, 10, 10), utils.models_of("01_baseline").BasicNet
    ready, dtype = list(utils.batches(part.train, BASIC["batch_size"], seed=0)), utils.pick_precision()
    bare = lambda n: train(network(), ready, device, dtype)  # noqa: E731
    compare("fit, a bare loop", "at least 0.95", repeats, lambda n: fit(network, part, seed=n), bare)

    ready = list(utils.batches(split[: 128 if quick else 1280], 128, seed=0))
    sides = (lambda n, d=d: train(convnet(), ready, cpu, d) for d in (torch.bfloat16, torch.float32))
    fast = utils.pick_precision(device=cpu) == torch.bfloat16
    compare("bfloat16, float32", "at least 1.6" if fast else "none: float32 is taken here", repeats, *sides)
    compare("memory", "below 2", 1, lambda n: run(__file__, "memory", *["--quick"] * quick), form="{:.2f} GiB")

    with tempfile.TemporaryDirectory() as copies:  # nothing is written into the checkouts
        for name, folder in {"here": ROOT, "former": former}.items():
            if folder:
                shutil.copytree(folder / "notebooks", Path(copies, name, "notebooks"))
                shutil.copy(folder / "my_utils.py", Path(copies, name))
        here, usual = ({"CODE": f"{copies}/{name}", "PYTHONPATH": f"{copies}/{name}"} for name in ("here", "former"))
        if not former:
            return compare("import", "", repeats, lambda n: run("-c", IMPORT, **here), form="{:.2f} s")
        for what, name in {"basic": "fit of notebook 01, former", "fast": "fit of the fast model, former"}.items():
            command = [__file__, what, *["--quick"] * quick]
            sides = (lambda n, side=side: run(*command, **side) for side in (here, usual))
            compare(name, "at least 0.98", repeats, *sides)
        sides = (lambda n, side=side: run("-c", IMPORT, **side) for side in (here, usual))
        compare("import, former", "at most 1", repeats, *sides, form="{:.2f} s")


def table_of_processes(quick: bool) -> None:
    """On a CPU a process gets one thread, and a row of one process with two threads, as without torchrun, is added."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    rows = {"1 process": ([], 1), "2 processes": (launcher, 1)}
    if not torch.cuda.is_available():
        rows["1 process, 2 threads"] = ([], 2)
    speeds = {name: [] for name in rows}
    for _ in range(1 if quick else 5):
        for name, (start, threads) in rows.items():
            command = [*start, __file__, "processes", *["--quick"] * quick]
            speeds[name].append(run(*command, OMP_NUM_THREADS=str(threads)))
    for name, values in speeds.items():
        ratio = median(a / b for a, b in zip(values, speeds["1 process"], strict=True))
        print(f"{name:30}{median(values):>9,.0f} images/s{ratio:>7.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help="only measure: basic, fast, processes or memory, and print the number")
    parser.add_argument("--former", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--processes", action="store_true", help="one process and two")
    parser.add_argument("--quick", action="store_true", help="once and in a tiny size, which measures nothing")
    arguments = parser.parse_args()
    if arguments.what:
        print(measure(arguments.what, arguments.quick))
    elif arguments.processes:
        table_of_processes(arguments.quick)
    else:
        with tempfile.TemporaryDirectory() as os.environ["RUNS_DIR"]:
            table(arguments.quick, arguments.former)
