"""Several processes: torchrun starts 2 or 3 of them on this CPU, and they end where one process without it ends.

This file is also the script that torchrun starts; `main` is what each process does. Two jobs do everything: that of two
processes is killed in the middle of a run, and that of three goes on with it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
import torch
from tiny import make_splits, recipe
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import my_utils as utils

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torch has no torchrun for Windows")
fit = partial(utils.fit, plot=False, device="cpu")
SETTINGS = {"label_smoothing": 0.1, "augmentation": utils.Augmentation(crop=2, flip="random")}
CASES = {"even": (198, 66), "uneven": (200, 50), "short only batch": (5, 50)}  # images, batch size


class Exact(nn.Module):
    """A network of which parts of a batch give what the whole batch gives: no BatchNorm, no dropout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(392, 10))
        self.spare = nn.Parameter(torch.zeros(3))  # never used, so it gets no gradient

    def forward(self, x):
        return self.net(x)


class Noisy(nn.Module):
    """A network whose processes drift apart unless they are held together: BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10))

    def forward(self, x):
        return self.head(self.norm(x))


class Slow(Exact):
    def forward(self, x):
        time.sleep(float(os.environ.get("PAUSE", 0)) * self.training)
        return super().forward(x)


def images_and_more(count: int) -> utils.Splits:
    """Return `count` training images, 33 for validation and 51 for testing, which no number of processes divides."""
    return make_splits(count, 33, 51)


def train_exactly(name: str, case: str) -> dict:
    """Train one of the CASES; return the gradients of every step, too."""
    (images, batch_size), gradients = CASES[case], []

    def keep(optimizer, *_):
        gradients.append([p.grad if p.grad is None else p.grad.clone() for p in optimizer.param_groups[0]["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    settings = recipe(batch_size=batch_size, optimizer_args={"momentum": 0.9}, **SETTINGS)
    run = fit(Exact, images_and_more(images), settings, run=f"{name}/{case}", watch=True)
    handle.remove()
    return {"gradients": gradients} | outcome(run)


def outcome(run: utils.Run) -> dict:
    return {"weights": run.model.state_dict(), "history": asdict(run.history) | {"seconds": []}}


def train_slowly() -> utils.Run:
    return fit(Slow, images_and_more(200), recipe(epochs=8, batch_size=20), run="slow")


def main(folder: Path) -> None:
    """Do everything in one of the processes of a job."""
    me, (rank, count) = os.environ["RANK"], utils.processes()
    os.environ["RUNS_DIR"] = str(folder / f"disk{me}" / "runs")  # as on machines that share no disk
    results = {"who": (rank, count), "resumed": asdict(train_slowly().history) if count == 3 else None}
    results |= {case: train_exactly(str(count), case) for case in CASES}
    splits, settings = images_and_more(200), recipe(weight_averaging=0.8, **SETTINGS)
    for name in ("trained", "loaded"):
        run = fit(Noisy, splits, settings, run=f"{count}/noisy", probe=lambda model: {"size": model.norm.bias.norm()})
        results[name] = outcome(run)
    results["record"] = utils.record([run], splits, notebook="01")
    one_step = fit(Noisy, splits, recipe(epochs=1, batch_size=200), run=f"{count}/one_step")
    results["running mean"] = one_step.model.norm.running_mean
    print(f"said by process {me}")
    torch.save(results, folder / f"{count}-{me}.pt")
    if count == 2:
        (folder / f"pid{me}").write_text(str(os.getpid()))
        train_slowly()


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", "--standalone"]


@contextlib.contextmanager
def torchrun(folder: Path, count: int, **environment):
    """Start a job, yield its launcher, and end it; what it says is in log<count>."""
    command, environment = [*TORCHRUN, f"--nproc-per-node={count}", __file__, folder], ENVIRONMENT | environment
    with (
        open(folder / f"log{count}", "w") as log,
        subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log) as launcher,
    ):
        try:
            yield launcher
        finally:
            launcher.terminate()  # which ends its processes, too


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """What one process without torchrun did (`alone`), and for 2 and 3 processes what each of them did."""
    folder = tmp_path_factory.mktemp("jobs")
    log = {count: folder / f"log{count}" for count in (2, 3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(folder / "alone"))
        found = SimpleNamespace(folder=folder, alone={case: train_exactly("alone", case) for case in CASES})
        patch.setenv("RUNS_DIR", str(folder / "disk0" / "runs"))
        with torchrun(folder, 2, PAUSE="0.1") as launcher:
            while not (stored := list(folder.glob("disk0/**/slow/*.safetensors"))):
                assert launcher.poll() is None, log[2].read_text()
                time.sleep(0.05)
            with pytest.raises(filelock.Timeout):
                train_slowly()  # a second job
            os.kill(int((folder / "pid1").read_text()), signal.SIGKILL)
            found.killed_code = launcher.wait(60)
        found.epochs_before = len(utils.load_run(*stored)["history"]["seconds"])
        with torchrun(folder, 3) as launcher:
            assert launcher.wait(300) == 0, log[3].read_text()
    found.logs = {count: path.read_text() for count, path in log.items()}
    load = partial(torch.load, weights_only=True)
    found.each = {count: [load(folder / f"{count}-{me}.pt") for me in range(count)] for count in log}
    return found


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_several_processes_train_as_one_does(jobs, case, count):
    """The same gradients in every step, the same weights, and every image counts once."""
    expected, (images, batch_size) = jobs.alone[case], CASES[case]
    for found in (results[case] for results in jobs.each[count]):
        assert len(found["gradients"]) == len(expected["gradients"]) == 2 * max(1, images // batch_size)
        for step, other in zip(found["gradients"], expected["gradients"], strict=True):
            assert step.count(None) == 1
            assert_close(step, other)
        assert_close(found["weights"].values(), expected["weights"].values())
        for name, values in expected["history"].items():
            assert found["history"][name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize("count", [2, 3])
def test_all_processes_end_with_the_same_bits(jobs, count):
    """Though each has its own batch statistics and dropout; also when the run is loaded."""
    first = jobs.each[count][0]
    for me, results in enumerate(jobs.each[count]):
        assert results["who"] == (me, count)
        for name in ("trained", "loaded"):
            weights = results[name]["weights"]
            assert all(torch.equal(weights[key], value) for key, value in first["trained"]["weights"].items())
            assert results[name]["history"] == first["trained"]["history"]
        assert results["record"] == first["record"]


@pytest.mark.parametrize("count", [2, 3])
def test_the_statistics_of_batchnorm_are_those_of_process_0(jobs, count):
    images, _ = next(utils.batches(images_and_more(200).train, 200, seed=0, part=(0, count)))
    for results in jobs.each[count]:
        torch.testing.assert_close(results["running mean"], 0.1 * images.mean((0, 2, 3)))


@pytest.mark.parametrize("count", [2, 3])
def test_process_0_alone_writes_and_prints(jobs, count):
    log = jobs.logs[count]
    assert not [path for path in jobs.folder.glob("disk[12]/**/*") if path.is_file()]
    assert "said by process 0" in log and "said by process 1" not in log and "said by process 2" not in log
    assert log.count("found in the run store") == 1
    assert (jobs.folder / "disk0" / "build" / "results" / f"{count}_noisy.json").exists()
    assert jobs.each[count][0]["record"]["device"].startswith(f"{count} x ")


def test_a_killed_process_ends_the_job_and_another_number_goes_on(jobs):
    assert jobs.killed_code != 0 and 1 <= jobs.epochs_before < 8
    assert f"going on after epoch {jobs.epochs_before} of 8" in jobs.logs[3]
    for results in jobs.each[3]:
        assert len(results["resumed"]["seconds"]) == 8 and len(results["resumed"]["step_loss"]) == 80


if __name__ == "__main__":
    main(Path(sys.argv[1]))
