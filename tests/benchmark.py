"""Print one table of speeds, memory and import time, each beside another way of doing it: `python tests/benchmark.py`.

- batches: random crop, mirroring and normalisation to float batches of 128, on the CPU; beside it torchvision's
  transforms of PIL images in a DataLoader whose two workers are running before the clock starts.
- fit: notebook 01's network; beside it a bare loop over batches that lie ready, with the same optimizer and precision.
- bfloat16: such a loop with notebook 03's fast model on the CPU; beside it float32.
- memory: the most that a process holds that loads all data and trains notebook 01's network for one epoch.
- import: of `my_utils`.

`--former FOLDER`, a checkout of an earlier commit, adds rows that put its `my_utils` and its notebooks beside these.
`--processes` prints another table: two processes that torchrun starts beside one, on the same batches of 256 images.

Each number comes from a process of its own. The two of a row run in turn, five times; medians are printed, and the
median of the ratios.
"""

import argparse
import functools
import importlib
import os
import shutil
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

sys.path.insert(0, os.environ.get("CODE", str(Path(__file__).resolve().parents[1])))  # which edition is measured
import my_utils as utils

AUGMENTATION = utils.Augmentation(crop=4, flip="random")
RECIPE = {"batch_size": 32, "learning_rate": 0.01, "augmentation": AUGMENTATION}
ADAM = {"optimizer": "adamw", "learning_rate": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.0}
MUON = {"optimizer": "normalized_muon", "learning_rate": 0.17, "momentum": 0.6, "weight_decay": 0.0}
CYCLE = {"pct_start": 0.03, "anneal_strategy": "linear", "cycle_momentum": False, "div_factor": 10}
FAST = {"batch_size": 1000, "learning_rate": 53.0, "schedule": "onecycle", "schedule_args": CYCLE}
FAST |= {"optimizer_args": {"momentum": 0.85, "nesterov": True, "weight_decay": 4e-5}, "label_smoothing": 0.2}
FAST |= {"overrides": {"*bank": MUON, "*.gate.*": ADAM, "head.*": {"learning_rate": 670.0, "weight_decay": 3e-6}}}
FAST |= {"augmentation": utils.Augmentation(crop=2, flip="alternating")}


def fit(build_model, splits, epochs, **settings) -> float:
    """Train with `my_utils.fit`; return images per second, without a first epoch of several."""
    recipe = utils.Recipe(epochs=epochs, **RECIPE | settings)
    history = utils.fit(build_model, splits, recipe, run="benchmark", plot=False).history
    return len(history.step_loss) / epochs * recipe.batch_size / median(history.seconds[1:] or history.seconds)


def train(model, batches, device, dtype) -> float:
    """Train in a bare loop; return images per second, without the first steps."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    batches = [(images.to(device).contiguous(memory_format=layout), labels.to(device)) for images, labels in batches]
    optimizer = torch.optim.SGD(model.to(device, memory_format=layout).parameters(), RECIPE["learning_rate"])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    for step, (images, labels) in enumerate(batches):
        if step == len(batches) // 4:
            start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        scaler.scale(nn.functional.cross_entropy(logits.float(), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    next(model.parameters()).sum().item()  # waits for a GPU
    return sum(len(labels) for _, labels in batches[len(batches) // 4 :]) / (time.perf_counter() - start)


def read(batches) -> float:
    """Read all batches; return images per second."""
    start = time.perf_counter()
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - start)


def read_pictures(split) -> float:
    """Read torchvision's data set of PIL images, over a split that is in memory already."""
    data = torchvision.datasets.CIFAR10.__new__(torchvision.datasets.CIFAR10)
    data.data, data.targets = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
    augment, normalise = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()], T.Normalize(split.mean, split.std)
    data.transform, data.target_transform = T.Compose([*augment, T.ToTensor(), normalise]), None
    loader = torch.utils.data.DataLoader(data, 128, shuffle=True, num_workers=2, persistent_workers=True)
    next(iter(loader))  # starts the workers
    return read(loader)


def measure(what: str, quick: bool) -> float:
    """Return images per second of one way, or memory in GiB."""
    splits, cpu = utils.load_cifar10(synthetic=None if what == "memory" else True), torch.device("cpu")
    basic, part = utils.models_of("01_baseline").BasicNet, splits.head(1280 if quick else 6400, 10, 10)
    if what == "memory":
        fit(basic, splits.head(640 if quick else None), epochs=1)
        peak = importlib.import_module("resource").getrusage(0).ru_maxrss  # in bytes on macOS, in KiB on Linux
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
    if what == "batches":
        return read(utils.batches(splits.train, 128, augmentation=AUGMENTATION, seed=0))
    if what == "pictures":
        return read_pictures(splits.train[: 1280 if quick else None])
    if what == "bare":
        ready = list(utils.batches(part.train, RECIPE["batch_size"], seed=0))
        return train(basic(), ready, utils.pick_device(), utils.pick_precision())
    if what in ("fit", "processes"):
        return fit(basic, part, 2 if quick else 4, **{"batch_size": 256} if what == "processes" else {})
    final = utils.models_of("03_advanced_training")
    filters = final.parts.whitening_filters(splits.train)
    network = functools.partial(final.FinalNet, filters=filters, widths=(64, 256, 256), norm=True)
    if what == "fast":
        return fit(network, splits.head(1000 if quick else 3000, 10, 10), 2 if quick else 4, **FAST)
    return train(network(), list(utils.batches(part.train, 128, seed=0))[:10], cpu, getattr(torch, what))


def run(*command, **environment) -> float:
    """Return the number that another process prints last; its training leaves no trace."""
    with tempfile.TemporaryDirectory() as store:
        environment = os.environ | {"RUN_SIZE": "quick", "RUNS_DIR": store} | environment
        answer = subprocess.run([sys.executable, *command], env=environment, check=True, text=True, stdout=-1)
    return float(answer.stdout.split()[-1])


def compare(quick: bool, name: str, target: str, here, usual=None, unit="{:,.0f} images/s") -> None:
    """Print the row of two ways, or of one."""
    pairs = [(here(), usual() if usual else 1) for _ in range(1 if quick else 5)]
    texts = [unit.format(median(values)) for values in zip(*pairs, strict=True)]
    texts = [*texts, f"{median(a / b for a, b in pairs):.2f}"] if usual else [texts[0], "", ""]
    print("{:32}{:>18}{:>18}{:>7}  {}".format(name, *texts, target), flush=True)


def main(quick: bool, former: Path | None, processes: bool) -> None:
    def way(what, *launcher, code="", **environment):
        if what == "import":
            clock = "import time; start = time.perf_counter(); import my_utils; print(time.perf_counter() - start)"
            return functools.partial(run, "-c", clock, PYTHONPATH=code or sys.path[0])
        environment |= {"CODE": str(code or sys.path[0])}
        return functools.partial(run, *launcher, __file__, what, *["--quick"] * quick, **environment)

    row = functools.partial(compare, quick)
    print(f"{utils.describe_device()}, torch {torch.__version__}\n{'':40}here{'beside it':>22}  ratio  target")
    if processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        for threads in (1, 2):
            one = way("processes", OMP_NUM_THREADS=str(threads))
            row(
                f"2 processes, 1 with {threads} thread{'s' * (threads > 1)}",
                "",
                way("processes", *launcher, OMP_NUM_THREADS="1"),
                one,
            )
        return
    row("batches, torchvision's", "at least 10", way("batches"), way("pictures"))
    row("fit, a bare loop", "at least 0.95", way("fit"), way("bare"))
    row("bfloat16, float32", "at least 1.6 where it is taken", way("bfloat16"), way("float32"))
    row("memory", "below 2", way("memory"), unit="{:.2f} GiB")
    row("import", "", way("import"), unit="{:.2f} s")
    with tempfile.TemporaryDirectory() as copy:
        if former:  # a copy, for it may write where it stands
            shutil.copy(former / "my_utils.py", copy)
            shutil.copytree(former / "notebooks", Path(copy, "notebooks"))
            row("fit, former", "at least 0.98", way("fit"), way("fit", code=copy))
            row("fit of the fast model, former", "at least 0.98", way("fast"), way("fast", code=copy))
            row("import, former", "at most 1", way("import"), way("import", code=copy), unit="{:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help=argparse.SUPPRESS)  # what this process measures
    parser.add_argument("--quick", action="store_true", help="once and in a tiny size, which measures nothing")
    parser.add_argument("--former", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--processes", action="store_true", help="two processes beside one")
    arguments = vars(parser.parse_args())
    if what := arguments.pop("what"):
        print(measure(what, arguments["quick"]))
    else:
        main(**arguments)
