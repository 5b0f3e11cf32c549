"""Kills at random moments, wherever they fall: the next call goes on to the same bits. And two processes at once."""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from tiny import Tiny, make_splits, recipe

import my_utils

KILLS, RUNS = 20, 4
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


class Slow(Tiny):
    """A network that takes its time, and says with its first training step that it is time to kill it."""

    pipe = None

    def forward(self, x):
        if self.training and len(x) == 25:
            time.sleep(0.01)
            Slow.pipe and Slow.pipe.close()
        return super().forward(x)


def train(seed: int) -> None:
    """Train and record as a notebook does."""
    settings = recipe(epochs=10, batch_size=25, optimizer="adamw", schedule="onecycle", weight_averaging=0.9)
    splits = make_splits(100, 100, 100)
    run = my_utils.fit(Slow, splits, settings, run="test/slow", seed=seed, plot=False, device="cpu")
    my_utils.record([run], splits, notebook="01")


def work(folder: Path, seed: int, pipe) -> None:
    """Train in another process, where writing takes so long that many kills fall into it."""
    for name in ("fsync", "replace"):
        act = getattr(os, name)
        setattr(os, name, lambda *arguments, act=act: (time.sleep(0.02), act(*arguments), time.sleep(0.02)))
    os.environ |= {"RUNS_DIR": str(folder / "runs"), "RUN_SIZE": "smoke"}
    torch.set_num_threads(1)
    Slow.pipe = pipe
    train(seed)


@pytest.fixture
def start(monkeypatch):
    """Return a function that starts `work` in a process, which imports nothing anew."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context, started = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload([__name__])

    def begin(folder: Path, seed: int):
        receiver, sender = context.Pipe(duplex=False)
        started.append(context.Process(target=work, args=(folder, seed, sender)))
        started[-1].start()
        sender.close()
        assert receiver.poll(120)
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def stored(folder: Path) -> list[dict]:
    """Return what the files of the store hold: every one can be read at any moment."""
    return [my_utils.load_run(path) for path in folder.rglob("seed*.safetensors")]


def outcome(folder: Path) -> tuple:
    """Return all that a run leaves and that does not depend on the time."""
    [run], [text] = stored(folder), [path.read_text() for path in folder.rglob("*.json")]
    seconds = run["history"].pop("seconds")
    for value in (*seconds, sum(seconds)):
        text = text.replace(str(value), "")
    weights = {name: value.tolist() for name, value in run.pop("weights").items()}
    return run, weights, text, sorted(path.relative_to(folder) for path in folder.rglob("*"))


def finish(process) -> float:
    begin = time.monotonic()
    process.join(300)
    assert process.exitcode == 0
    return time.monotonic() - begin


def test_what_is_killed_goes_on_to_the_same_bits(tmp_path, start):
    landed, kept = 0, {}
    lasts = min(finish(start(tmp_path / f"whole{seed}", seed)) for seed in range(RUNS))
    for kill in range(KILLS):
        seed = kill % RUNS
        process = start(tmp_path / f"killed{seed}", seed)
        time.sleep(random.uniform(0, 0.4 * lasts))
        process.kill()
        process.join()
        landed += process.exitcode != 0
        for found in stored(tmp_path / f"killed{seed}"):
            seconds, before = found["history"]["seconds"], kept.get(seed, [])
            assert seconds[: len(before)] == before  # what was stored is not trained again
            kept[seed] = seconds
    assert landed > KILLS / 2 and len(kept) == RUNS  # the others had just ended
    for seed in range(RUNS):
        finish(start(tmp_path / f"killed{seed}", seed))
        assert outcome(tmp_path / f"killed{seed}") == outcome(tmp_path / f"whole{seed}")


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path, start, monkeypatch):
    process = start(tmp_path, 0)
    while not stored(tmp_path):
        assert process.is_alive()
    os.kill(process.pid, signal.SIGSTOP)  # alive, but it does not move
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    before = stored(tmp_path)[0]["history"]
    with pytest.raises(filelock.Timeout):
        train(0)
    assert stored(tmp_path)[0]["history"] == before and len(before["seconds"]) < 10
    process.kill()
    process.join()
    train(0)
    assert len(stored(tmp_path)[0]["history"]["seconds"]) == 10
