"""Print the training speed of one process and of several: `python tests/benchmark_processes.py --processes 2`.

Each row trains notebook 01's network by `my_utils.fit` on the same global batch of 256 images. On a CPU a process gets
one thread, and a row of one process with as many threads, as a script without torchrun has them, stands beside it. The
rows run in turn, three times; speeds are medians over the epochs after the first, which warms up.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
BATCH = 256


def train(quick: bool) -> None:
    """Train in this process, which torchrun may have started with others, and print images per second."""
    import my_utils as utils

    splits = utils.load_cifar10(synthetic=True).head(1280, 10, 10)
    recipe = utils.Recipe(epochs=2 if quick else 4, batch_size=BATCH, augmentation=utils.Augmentation(flip="random"))
    network = utils.models_of("01_baseline").BasicNet
    seconds = utils.fit(network, splits, recipe, run="benchmark", plot=False).history.seconds[1:]
    print("speed", len(splits.train) / median(seconds))


def speed(count: int, threads: int, quick: bool) -> float:
    """Return the images per second of so many processes with so many threads each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, __file__, "--train", *["--quick"] * quick]
    with tempfile.TemporaryDirectory() as store:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RUNS_DIR": store, "RUN_SIZE": "quick"}
        said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    [line] = [line for line in said.splitlines() if line.startswith("speed ")]
    return float(line.split()[1])


def table(count: int, quick: bool) -> None:
    import torch

    gpus = torch.cuda.is_available()
    rows = {"1 process": (1, 1)} if gpus else {"1 process, 1 thread": (1, 1), f"1 process, {count} threads": (1, count)}
    rows[f"{count} processes"] = (count, 1)
    speeds = {name: [] for name in rows}
    for _ in range(1 if quick else 3):
        for name, (processes, threads) in rows.items():
            speeds[name].append(speed(processes, threads, quick))
    first = median(next(iter(speeds.values())))
    print(f"torch {torch.__version__}, {'GPUs' if gpus else 'CPU'}, global batch {BATCH}\n")
    for name, values in speeds.items():
        print(f"{name:24} {median(values):>9,.0f} images/s  {median(values) / first:>5.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="at most one per GPU, or per CPU core")
    parser.add_argument("--quick", action="store_true", help="once and with fewer epochs, which measures little")
    parser.add_argument("--train", action="store_true", help="only train, and print the speed")
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.quick)
    else:
        table(arguments.processes, arguments.quick)
