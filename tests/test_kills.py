"""Kills while downloading, training, checkpointing and recording: the next call goes on to the same end.

KILLS says how many (default 4, one in each): `KILLS=20 pytest tests/test_kills.py`.
"""

import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torchvision
from tiny import Tiny, recipe

import my_utils
from my_utils import Augmentation, Split, Splits

PHASES = {"download": 0.6, "training": 0.3, "checkpoint": 0.06, "record": 0.12}  # seconds, about how long each lasts
KILLS = int(os.environ.get("KILLS") or len(PHASES))
FILES = {f"cifar-10-batches-py/{name}": name.encode() * 50_000 for name in ("first", "second", "third")}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


class Slow(Tiny):
    def forward(self, x):
        if self.training:
            time.sleep(0.02)
        return super().forward(x)


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in FILES.items():
            (item := tarfile.TarInfo(name)).size = len(content)
            tar.addfile(item, io.BytesIO(content))
    return buffer.getvalue()


def work(folder: Path, seed: int, url: str, md5: str) -> None:
    """Download, train and record as a notebook does, each so slowly that a kill finds it, and tell what comes next."""
    torch.set_num_threads(1)
    my_utils.ROOT, my_utils.ARCHIVE_MD5 = folder, md5
    os.environ |= {"RUNS_DIR": str(folder / "runs"), "RUN_SIZE": "smoke", "NO_PROXY": "127.0.0.1"}
    sync, replace = os.fsync, os.replace

    def slowly(act, *arguments):
        time.sleep(0.02)
        act(*arguments)
        time.sleep(0.02)

    os.fsync, os.replace = functools.partial(slowly, sync), functools.partial(slowly, replace)
    tell = lambda phase: (folder / "phase").write_text(phase)  # noqa: E731

    tell("download")
    if not (folder / "data" / torchvision.datasets.CIFAR10.base_folder).exists():
        my_utils._download_cifar10(folder / "data", [url])
    images, labels = my_utils.draw_synthetic(300)
    make = functools.partial(Split, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    splits = Splits(*(make(images[i : i + 100], labels[i : i + 100]) for i in (0, 100, 200)), "synthetic")
    checkpoint, train_epoch = my_utils._Trainer.checkpoint, my_utils._Trainer.train_epoch

    def told(trainer):
        tell("checkpoint")
        checkpoint(trainer)
        log(f"kept {len(trainer.history.seconds)}")
        tell("training")

    def logged(trainer, epoch, *more):
        log(f"from {epoch}")
        train_epoch(trainer, epoch, *more)

    def log(line):
        with open(folder / "epochs", "a") as file:
            file.write(f"{line}\n")

    my_utils._Trainer.checkpoint, my_utils._Trainer.train_epoch = told, logged
    tell("training")
    settings = recipe(epochs=4, batch_size=20, weight_averaging=0.9, augmentation=Augmentation(crop=2, flip="random"))
    run = my_utils.fit(Slow, splits, settings, run="slow", seed=seed, plot=False, device="cpu")
    tell("record")
    my_utils.record("slow", [run], splits, notebook="01")


@pytest.fixture
def source():
    """A web server that sends the archive in small pieces: its address, and the archive's MD5."""
    content = archive()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            try:
                for start in range(0, len(content), len(content) // 20):
                    self.wfile.write(content[start : start + len(content) // 20])
                    time.sleep(0.02)
            except OSError:
                pass  # the process that asked is dead

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/archive", hashlib.md5(content).hexdigest()
        server.shutdown()


def start(folder: Path, seed: int, source):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "torchmetrics", "seaborn"])  # imported once, for all
    folder.mkdir(exist_ok=True)
    (folder / "phase").write_text("")
    process = context.Process(target=work, args=(folder, seed, *source))
    process.start()
    return process


def finish(folder: Path, seed: int, source) -> None:
    process = start(folder, seed, source)
    process.join(300)
    assert process.exitcode == 0


def kept(folder: Path) -> dict:
    """Everything that a run leaves and that does not depend on the time."""
    [weights] = folder.glob("runs/smoke/slow/*/weights.safetensors")
    contents = [json.loads(path.read_text()) for path in (weights.with_name("run.json"), *folder.glob("build/*/*"))]
    for content in (contents[0], *contents[1]["seeds"]):
        content["history"].pop("seconds")
        content.pop("train_seconds", None)
    data = {path.relative_to(folder / "data").as_posix(): path for path in (folder / "data").glob("*/*")}
    return {"weights": weights.read_bytes(), "json": contents, "data": {n: p.read_bytes() for n, p in data.items()}}


def went_on(folder: Path) -> None:
    """Check that no epoch was trained again whose checkpoint had been written."""
    kept = 0
    for line in (folder / "epochs").read_text().split("\n")[:-1]:
        what, number = line.split()
        if what == "kept":
            kept = int(number)
        else:
            assert int(number) in (kept, kept + 1)  # one more: killed after the checkpoint, before it was noted


def test_what_is_killed_goes_on_to_the_same_end(tmp_path, source):
    number = random.randrange(2**32)
    print("seed of the moments", number)  # pytest shows it if the test fails
    moments, before = random.Random(number), {}
    for seed, begin in enumerate(range(0, KILLS, len(PHASES))):
        folder = tmp_path / f"killed{seed}"
        for phase, seconds in list(PHASES.items())[: KILLS - begin]:
            process = start(folder, seed, source)
            deadline = time.monotonic() + 300
            while (folder / "phase").read_text() != phase:
                assert process.is_alive() and time.monotonic() < deadline, phase
                time.sleep(0.002)
            time.sleep(moments.uniform(0, seconds))
            process.kill()
            process.join()
            before[phase] = before.get(phase, 0) + (process.exitcode != 0)
        finish(folder, seed, source)
        finish(tmp_path / f"whole{seed}", seed, source)
        killed, whole = kept(folder), kept(tmp_path / f"whole{seed}")
        assert killed == whole
        assert killed["data"] == FILES
        went_on(folder)
        left = {path.name for path in folder.rglob("*") if path.name.startswith(".") and path.name.endswith(".part")}
        assert not left and not list((folder / "data").glob(".part-*/*"))
    assert sum(before.values()) > KILLS / 2  # the others had just ended
