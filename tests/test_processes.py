"""Several processes: torchrun starts two of them on this CPU, and they end where one process ends.

This file is also the script that torchrun starts; `main` is what each process does.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from nbconvert import ScriptExporter
from tiny import Tiny, recipe
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import my_utils
from my_utils import Augmentation, Split, Splits

fit = partial(my_utils.fit, plot=False, device="cpu")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torch has no torchrun for Windows")
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "01_baseline.ipynb"
BATCHES = {"even": 50, "uneven": 33}  # two processes get 25 and 25, or 17 and 16 images


class Exact(nn.Module):
    """A network of which a part of a batch gives what the whole batch gives: float64, and no batch statistics."""

    def __init__(self):
        super().__init__()
        self.net = Tiny().double()
        self.net.drop = nn.Identity()
        self.spare = nn.Parameter(torch.zeros(3, dtype=torch.float64))  # never used, so it gets no gradient

    def train(self, mode=True):
        super().train(mode)
        self.net.norm.eval()
        return self

    def forward(self, x):
        return self.net(x.double())


class Slow(Tiny):
    def forward(self, x):
        if self.training:
            time.sleep(0.05)
        return super().forward(x)


def odd_splits() -> Splits:
    """Splits of 200, 33 and 51 images: two processes cannot share the last two evenly."""
    images, labels = my_utils.draw_synthetic(284)
    make = partial(Split, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    ends = ((0, 200), (200, 233), (233, 284))
    return Splits(*(make(images[start:end], labels[start:end]) for start, end in ends), "synthetic")


def train_exactly(case: str) -> dict:
    """Train in float64 and return the gradients of every step, the weights and the history."""
    gradients = []

    def keep(optimizer, *_):
        [group] = optimizer.param_groups
        gradients.append([p.grad if p.grad is None else p.grad.clone() for p in group["params"]])

    settings = recipe(batch_size=BATCHES[case], optimizer_args={"momentum": 0.9}, label_smoothing=0.1)
    handle = register_optimizer_step_pre_hook(keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        run = fit(Exact, odd_splits(), settings, run=case, watch=True)
    handle.remove()
    return {"gradients": gradients, "weights": run.model.state_dict(), "history": asdict(run.history)}


def probe(model):
    return {"size": model.head.weight.norm().item(), "rank": int(os.environ["RANK"])}


def train_slowly():
    return fit(Slow, odd_splits(), recipe(epochs=8, batch_size=20), run="slow")


def main(folder: Path, what: str, rank: int) -> None:
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if what == "slow":
        train_slowly()
        return
    # As on machines that share no disk: what a process writes stays visible.
    my_utils.ROOT = folder / f"root{rank}"
    os.environ["RUNS_DIR"] = str(folder / f"root{rank}" / "runs")
    results = {case: train_exactly(case) for case in BATCHES}
    splits = odd_splits()
    settings = recipe(weight_averaging=0.8, augmentation=Augmentation(crop=2, flip="random"))
    for name in ("trained", "loaded"):
        run = fit(Tiny, splits, settings, run="tiny", watch=True, probe=probe)
        results[name] = {"weights": run.model.state_dict(), "history": asdict(run.history)}
    results["record"] = my_utils.record("tiny", [run], splits, notebook="01")
    my_utils.show(Figure(), alt="Nothing", save="figure", runs=[run])
    print(f"printed by process {rank}")

    errors = results["errors"] = {}
    full = pytest.MonkeyPatch()
    for name, changes, error in (
        ("disagree", {"learning_rate": 0.1 + rank}, RuntimeError),
        ("few", {"batch_size": 1}, ValueError),
        ("full", {"epochs": 1}, OSError),
    ):
        if name == "full" and rank == 0:
            full.setattr(os, "fsync", lambda file: os.write(-1, b""))
        with pytest.raises(error) as caught:
            fit(Tiny, splits, recipe(**changes), run=name)
        errors[name] = str(caught.value)
    full.undo()
    torch.save(results, folder / f"results{rank}.pt")


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1"]


@contextlib.contextmanager
def torchrun(folder: Path, what: str):
    """Start two processes, yield the launcher and what it says, and kill the launcher at the end."""
    environment, command = ENVIRONMENT, [*TORCHRUN, "--standalone", "--nproc-per-node=2", __file__, folder, what]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log) as process,
    ):
        try:
            yield SimpleNamespace(process=process, log=lambda: (folder / "log").read_text())
        finally:
            process.terminate()  # which ends its processes too


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What two processes did, each of them: a list of two, and `log`, `folder`."""
    folder = tmp_path_factory.mktemp("job")
    with torchrun(folder, "everything") as running:
        assert running.process.wait(timeout=500) == 0, running.log()
    both = [torch.load(folder / f"results{rank}.pt", weights_only=True) for rank in (0, 1)]
    return SimpleNamespace(folder=folder, log=running.log(), both=both)


def relative_error(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", BATCHES)
def test_two_processes_train_as_one_does(store, job, case):
    expected = train_exactly(case)
    for found in (both[case] for both in job.both):
        assert len(found["gradients"]) == len(expected["gradients"]) == 2 * (200 // BATCHES[case])
        for step, other in zip(found["gradients"], expected["gradients"], strict=True):
            assert [g is None for g in step] == [g is None for g in other] and step.count(None) == 1
            for gradient, wanted in zip(step, other, strict=True):
                assert gradient is None or relative_error(gradient, wanted) < 1e-10
        for name, value in expected["weights"].items():
            if value.is_floating_point() and value.any():
                assert relative_error(found["weights"][name], value) < 1e-10, name


@pytest.mark.parametrize("case", BATCHES)
def test_every_image_counts_once(store, job, case):
    expected = train_exactly(case)["history"]
    for found in (both[case]["history"] for both in job.both):
        for name in ("train_top1", "val_top1", "test_top1", "step_learning_rate"):
            assert found[name] == expected[name], name
        for name in ("step_loss", "train_loss", "val_loss"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def test_both_processes_end_with_the_same_bits(job):
    """Also where each had other images in its batch statistics and other dropout, and when the run is loaded."""
    first = job.both[0]["trained"]
    assert first["weights"]["norm.running_mean"].any()
    for result in (job.both[1]["trained"], job.both[0]["loaded"], job.both[1]["loaded"]):
        assert result["weights"].keys() == first["weights"].keys()
        for name, value in result["weights"].items():
            assert torch.equal(value, first["weights"][name]), name
        assert result["history"] | {"seconds": []} == first["history"] | {"seconds": []}
    assert [values["rank"] for values in first["history"]["probe"]] == [0, 0]
    assert job.both[0]["record"] == job.both[1]["record"]


def test_process_0_alone_writes_and_prints(job):
    assert not (job.folder / "root1").exists()
    names = {path.name for path in (job.folder / "root0").glob("**/*") if path.is_file()}
    assert {"checkpoint.pt", "run.json", "weights.safetensors", "tiny.json", "figure.png"} <= names
    [stored] = (job.folder / "root0" / "runs").glob("smoke/tiny/*/run.json")
    assert json.loads(stored.read_text())["device"].startswith("2 x ")
    assert job.log.count("tiny, seed 0: trained before, loaded from the run store") == 1
    assert "printed by process 0" in job.log and "printed by process 1" not in job.log
    assert job.log.count("tiny, seed 0:   0%") == 1  # where the progress begins


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("disagree", "the processes disagree about run disagree: their model, recipe, data or seed differ"),
        ("few", "a batch has 1 images; 2 processes need at least one each"),
        ("full", "cannot write checkpoint.pt in "),
    ],
)
def test_an_error_of_one_process_stops_all(job, name, says):
    first, second = (both["errors"][name] for both in job.both)
    assert first == second and says in first


def test_parts_of_a_batch_make_the_batch(splits):
    settings = {"augmentation": Augmentation(crop=2, flip="random", cutout=8), "seed": 3, "epoch": 1}
    for count, batch_size in ((2, 50), (3, 50), (4, 7)):
        parts = [list(my_utils.batches(splits.train, batch_size, part=(k, count), **settings)) for k in range(count)]
        for whole, *shares in zip(my_utils.batches(splits.train, batch_size, **settings), *parts, strict=True):
            for together, pieces in zip(whole, zip(*shares, strict=True), strict=True):
                torch.testing.assert_close(torch.cat(pieces), together)
            sizes = [len(labels) for _, labels in shares]
            assert max(sizes) - min(sizes) <= 1


def epochs_done(store: Path) -> int:
    """The number of whole epochs in the run store's one checkpoint."""
    with contextlib.suppress(FileNotFoundError):  # it is being replaced
        for path in store.glob("**/checkpoint.pt"):
            return len(torch.load(path, weights_only=True)["history"]["seconds"])
    return 0


def test_a_killed_process_ends_the_job_which_goes_on_with_any_number(store, tmp_path, capsys):
    before = 0
    for victim in (1, 0):  # the second job goes on with two processes
        with torchrun(tmp_path, "slow") as running:
            while (done := epochs_done(store)) <= before:
                assert running.process.poll() is None, running.log()
                time.sleep(0.05)
            pid = int((tmp_path / f"pid{victim}").read_text())
            os.kill(pid, signal.SIGKILL)
            assert running.process.wait(timeout=30) != 0
        assert f"Signal 9 (SIGKILL) received by PID {pid}" in running.log()
        assert "going on after epoch" in running.log() or before == 0
        before = done
    run = train_slowly()  # and one process ends it
    assert "going on after epoch" in capsys.readouterr().out
    assert len(run.history.seconds) == 8 and len(run.history.step_loss) == 80


def test_an_exported_notebook_runs_unchanged_on_two_nodes(store, tmp_path):
    """Two launchers, as on two machines that share a disk, with one process each."""
    script, _ = ScriptExporter().from_filename(NOTEBOOK)
    path = tmp_path / "exported.py"
    path.write_text(script, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", endpoint, path]
    arguments = {"cwd": NOTEBOOK.parent, "env": os.environ | ENVIRONMENT, "stderr": subprocess.STDOUT}
    with contextlib.ExitStack() as held:
        nodes = []
        for node in range(2):
            log = held.enter_context(open(tmp_path / f"log{node}", "w"))
            nodes.append(held.enter_context(subprocess.Popen(command, stdout=log, **arguments)))
            held.callback(nodes[-1].terminate)
        codes = [process.wait(timeout=500) for process in nodes]
    logs = [(tmp_path / f"log{node}").read_text() for node in range(2)]
    assert codes == [0, 0], logs
    assert sorted(log.count("run size  smoke") for log in logs) == [0, 1]  # only process 0 prints
    [stored] = store.glob("**/run.json")
    assert json.loads(stored.read_text())["device"].startswith("2 x ")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"]))
