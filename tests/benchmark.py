"""Print one table of speeds and memory, each beside the usual way of doing it: `python tests/benchmark.py`.

- batches: random crop with a border of 4 pixels, mirroring and normalisation to float batches of 128, on the CPU, by
  `my_utils.batches`; usual: torchvision's transforms of PIL images in a DataLoader whose two workers are running
  before the clock starts, and kornia's transforms of whole batches, if it is installed.
- fit: training steps of notebook 01's network by `my_utils.fit`, with augmentation, log and progress; usual: a bare
  loop over batches that lie ready, with the same optimizer, precision and memory format.
- bfloat16: training steps of a network of three blocks (64, 256 and 256 channels) on the CPU; usual: float32.
- memory: the most that a process holds that loads all data and trains notebook 01's network for one epoch.

Both sides of a row run in turn, five times; speeds are medians, and so is the ratio of each pair.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import nn
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import my_utils as utils

RECIPE = utils.Recipe(epochs=1, batch_size=32, learning_rate=0.01, augmentation=utils.Augmentation(flip="random"))
CROP_AND_FLIP = utils.Augmentation(crop=4, flip="random")
kornia = importlib.util.find_spec("kornia") and importlib.import_module("kornia.augmentation")


class Pictures(torchvision.datasets.CIFAR10):
    """torchvision's data set of PIL images, over a split that is in memory already."""

    def __init__(self, split):
        self.data, self.targets = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
        augment, normalise = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()], T.Normalize(split.mean, split.std)
        self.transform, self.target_transform = T.Compose([*augment, T.ToTensor(), normalise]), None


def kornia_batches(split):
    crop, flip = kornia.RandomCrop((32, 32), padding=4), kornia.RandomHorizontalFlip()
    transform = nn.Sequential(crop, flip, kornia.Normalize(torch.tensor(split.mean), torch.tensor(split.std)))
    for index in torch.randperm(len(split)).split(128):
        yield transform(split.images[index].float() / 255), split.labels[index]


def read(batches) -> float:
    """Read all batches; return images per second."""
    start = time.perf_counter()
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - start)


def train(model, batches, device, dtype) -> float:
    """Train in a bare loop; return images per second."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    batches = [(images.to(device).contiguous(memory_format=layout), labels.to(device)) for images, labels in batches]
    optimizer = torch.optim.SGD(model.to(device, memory_format=layout).parameters(), RECIPE.learning_rate)
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


def fit(network, splits, seed=0) -> float:
    """Train with `my_utils.fit`, its progress unseen; return images per second."""
    with contextlib.redirect_stderr(io.StringIO()):
        run = utils.fit(network, splits, RECIPE, run="benchmark", seed=seed, watch=True, plot=False)
    return len(run.history.step_loss) * RECIPE.batch_size / run.train_seconds


def convnet():
    layers, before = [], 3
    for channels in (64, 256, 256):
        for inputs in (before, channels):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers, before = [*layers, nn.MaxPool2d(2)], channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def row(name, here="", usual="", unit="", ratio="", target=""):
    print(f"{name:28} {here:>9} {usual:>9}  {unit:8} {ratio:>6}  {target}", flush=True)


def compare(name, target, repeats, here, usual):
    """Print the row of two functions that take the number of the repeat and return images per second."""
    pairs = [(here(repeat), usual(repeat)) for repeat in range(repeats)]
    speeds, ratio = (median(side) for side in zip(*pairs, strict=True)), median(a / b for a, b in pairs)
    row(name, *map("{:,.0f}".format, speeds), "images/s", f"{ratio:.2f}", target)


def table(splits, network, quick):
    repeats, split, device, cpu = 1 if quick else 5, splits.train, utils.pick_device(), torch.device("cpu")
    print(f"{utils.describe_device()}, torch {torch.__version__}, data: {splits.source}\n")
    row("", "here", "usual", "", "ratio", "target")
    loader = torch.utils.data.DataLoader(Pictures(split), 128, shuffle=True, num_workers=2, persistent_workers=True)
    next(iter(loader))  # starts the workers
    here = lambda n: read(utils.batches(split, 128, augmentation=CROP_AND_FLIP, seed=n))  # noqa: E731
    compare("batches, against torchvision", "at least 10", repeats, here, lambda n: read(loader))
    if kornia:
        compare("batches, against kornia", "", repeats, here, lambda n: read(kornia_batches(split)))
    else:
        row("batches, against kornia", target="kornia: not installed")

    part, dtype = splits.head(320 if quick else 9600, val=10, test=10), utils.pick_precision()
    ready = list(utils.batches(part.train, RECIPE.batch_size, seed=0))
    bare = lambda n: train(network(), ready, device, dtype)  # noqa: E731
    compare("fit, against a bare loop", "at least 0.95", repeats, lambda n: fit(network, part, n), bare)

    if utils.pick_precision(device=cpu) == torch.bfloat16:
        ready = list(utils.batches(split[:1280], 128, seed=0))
        sides = (lambda n, d=d: train(convnet(), ready, cpu, d) for d in (torch.bfloat16, torch.float32))
        compare("bfloat16, against float32", "at least 1.6", repeats, *sides)
    else:
        row("bfloat16, against float32", target="not run: not faster on this CPU")

    memory = subprocess.check_output([sys.executable, __file__, "--memory", *["--quick"] * quick], text=True)
    row("memory", memory.split()[-1], unit="GiB", target="below 2")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once and in a tiny size, which measures nothing")
    parser.add_argument("--memory", action="store_true", help="only train, and print the memory of this process")
    arguments = parser.parse_args()
    splits = utils.load_cifar10().head(train=640 if arguments.quick else None)
    with tempfile.TemporaryDirectory() as os.environ["RUNS_DIR"]:  # the measured trainings leave no trace
        network = utils.models_of("01_baseline").BasicNet
        if arguments.memory:
            fit(network, splits)
            peak = importlib.import_module("resource").getrusage(0).ru_maxrss  # in bytes on macOS, in KiB on Linux
            print(f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.2f}")
        else:
            table(splits, network, arguments.quick)
