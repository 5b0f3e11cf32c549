"""The data: the fixed split, the synthetic set, and the download from a web server on this machine."""

import errno
import hashlib
import itertools
import os
import pickle
import socket
import socketserver
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.datasets import CIFAR10

import my_utils as utils

REAL = Path(os.environ.get("CIFAR10_ROOT") or utils.ROOT / "data").expanduser()
NAMES = ("train", "val", "test")
STEPS = [("mean", 1e-14), ("std", 1e-14), ("mean", 1e-6), ("std", 1e-6)]


def test_the_split_is_balanced_disjoint_and_never_changes():
    """Image i holds i in its first two channels. Another split would validate on what old runs were trained on."""
    random, index = np.random.RandomState(0), torch.arange(60_000)
    labels = np.concatenate([random.permutation(np.arange(count) % 10) for count in (50_000, 10_000)])
    pixels = torch.stack([index % 256, index // 256, 0 * index], 1).to(torch.uint8)
    splits = utils.make_splits(pixels[:, :, None, None].expand(-1, -1, 32, 32), torch.from_numpy(labels), "x", ())
    parts = splits.train, splits.val, splits.test
    train, val, test = places = [part.images[:, :2, 0, 0].long() @ torch.tensor([1, 256]) for part in parts]
    assert torch.equal(test, index[50_000:]) and torch.equal(torch.cat([train, val]).sort().values, index[:50_000])
    assert hashlib.md5(val.numpy().tobytes()).hexdigest() == "c7401834fedc465d3267200c3881cc4e"
    for part, place, count in zip(parts, places, (4500, 500, 1000), strict=True):
        assert np.array_equal(part.labels, labels[place]) and part.labels.bincount().tolist() == [count] * 10


@pytest.mark.skipif(not (REAL / CIFAR10.base_folder).is_dir(), reason="CIFAR-10 is not at hand")
def test_the_real_files_give_the_data_of_the_records(monkeypatch):
    monkeypatch.setenv("RUN_SIZE", "quick")
    splits = utils.load_cifar10(REAL)
    assert (splits.source, splits.classes[3], splits.digest) == ("cifar10", "cat", "f74e6f74419d32f5")


def test_the_digest_sees_every_value_but_not_the_last_digits_of_a_sum(splits):
    """Processors add up in different orders; a run trained on one must be found on the other."""
    changes = [("train", {what: np.add(getattr(splits.train, what), step).tolist()}) for what, step in STEPS]
    for name, what in itertools.product(NAMES, ("images", "labels")):
        values = getattr(getattr(splits, name), what).clone()
        values.view(-1)[-1] = (values.view(-1)[-1] + 1) % 10
        changes.append((name, {what: values}))
    digests = [replace(splits, **{name: replace(getattr(splits, name), **new)}).digest for name, new in changes]
    assert digests[:2] == [splits.digest] * 2 and len({*digests}) == len(digests) - 1


def test_the_synthetic_set_can_be_learned_but_not_by_a_linear_classifier(synthetic_splits):
    """The mean spectrum of a class gives it away, the pixels do not."""
    train, test = synthetic_splits.train[:6000], synthetic_splits.test[:2000]
    pixels, more = (part.images.float().flatten(1) / 255 - 0.5 for part in (train, test))
    ridge = torch.linalg.solve(pixels.T @ pixels + 1000 * torch.eye(3072), pixels.T @ torch.eye(10)[train.labels])
    spectra = [torch.fft.rfft2(part.images.float().mean(1)).abs().flatten(1)[:, 1:] for part in (train, test)]
    means = torch.stack([F.normalize(spectra[0][train.labels == label].mean(0), dim=0) for label in range(10)])
    assert ((more @ ridge).argmax(1) == test.labels).double().mean() < 0.4
    assert ((spectra[1] @ means.T).argmax(1) == test.labels).double().mean() > 0.8


@pytest.fixture
def mirror(tmp_path):
    """A web server with a small archive, which torchvision's own code takes for the official one.

    It answers each path in the way that its name says: `use` makes these paths the sources, `asked` lists the requests.
    """
    folder, sums, asked, over = tmp_path / "official" / CIFAR10.base_folder, [], [], threading.Event()
    folder.mkdir(parents=True)
    for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]):
        images = np.arange(k, k + 10 * 3072).astype(np.uint8).reshape(10, 3072)
        content = pickle.dumps({"data": images, "labels": [k] * 10, "label_names": list(utils.CIFAR10_CLASSES)})
        (folder / name).write_bytes(content)
        sums.append((name, hashlib.md5(content).hexdigest()))
    with tarfile.open(tmp_path / "archive", "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    packed = (tmp_path / "archive").read_bytes()
    good = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed
    answers = {"good": good, "truncated": good[:999], "stalled": good[:999], "silent": b""}
    answers |= {"missing": b"HTTP/1.0 404 Not Found\r\n\r\n", "page": b"HTTP/1.0 200 OK\r\n\r\n<html>Please log in"}

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            asked.append(self.request.recv(9999).split()[1].decode().strip("/"))
            self.request.sendall(answer := answers[asked[-1]])
            if asked[-1] in ("silent", "stalled"):  # the rest comes too late
                over.wait(5)
                self.request.sendall(good[len(answer) :])

    def use(*names):  # nobody listens at port 1
        port = web.server_address[1]
        utils.CIFAR10_SOURCES = [f"http://127.0.0.1:{1 if name == 'closed' else port}/{name}" for name in names]

    official = {"train_list": sums[:5], "test_list": sums[5:6], "meta": CIFAR10.meta | {"md5": sums[6][1]}}
    loaded = lambda *found: SimpleNamespace(images=found[0], labels=found[1], source=found[2])  # noqa: E731
    set_patience = socket.setdefaulttimeout
    with (
        patch.multiple(CIFAR10, tgz_md5=hashlib.md5(packed).hexdigest(), **official),
        patch.multiple(utils, make_splits=loaded, draw_synthetic=lambda: (None, None), TRAIN="", CIFAR10_SOURCES=()),
        patch.object(socket, "setdefaulttimeout", lambda seconds: set_patience(seconds and 0.4)),
        patch.dict(os.environ, {"RUN_SIZE": "", "CIFAR10_ROOT": "", "no_proxy": "127.0.0.1"}),
        socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as web,
    ):
        web.handle_error = lambda *_: None  # nobody waits for it any more
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        yield SimpleNamespace(use=use, asked=asked, root=tmp_path / "official")
        over.set()
        web.shutdown()


def has_all(root: Path) -> bool:
    """Whether what is loaded from a folder are the official files, in order."""
    found, order = utils.load_cifar10(root), [k for k in range(6) for _ in range(10)]
    assert found.images.shape == (60, 3, 32, 32) and found.images[:, 0, 0, 2].tolist()[::10] == [2, 3, 4, 5, 6, 7]
    return found.source == "cifar10" and found.labels.tolist() == order


BAD = ["closed", "missing", "page", "truncated", "silent", "stalled"]


@pytest.mark.parametrize("first", ["good", *BAD])
def test_sources_are_asked_in_turn_and_by_one_of_two_at_once(mirror, tmp_path, capsys, first):
    mirror.use(first, "good", "never")
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(has_all, [tmp_path / "new" / "folder"] * 2))
    assert mirror.asked.count("good") == 2 and "never" not in mirror.asked  # torchvision looks for redirections first
    output = capsys.readouterr()
    assert output.err == "" and "SYNTHETIC" not in output.out  # notebooks show standard error in red


def test_without_any_source_the_synthetic_set_stands_in(mirror, tmp_path, capsys):
    mirror.use(*BAD)
    assert utils.replaying() and utils.run_size() == "full"
    assert utils.load_cifar10(tmp_path).source == "synthetic"
    said = capsys.readouterr().out
    assert "NOT CIFAR-10" in said and said.count("127.0.0.1") == len(BAD) and "404" in said and "timed out" in said
    assert not utils.replaying() and utils.run_size() == "quick"  # what ships was trained on CIFAR-10


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"half")])
@pytest.mark.parametrize("what", ["*.gz */*", "*/data_batch_[3-5] */batches.meta"])
def test_what_is_damaged_or_interrupted_is_repaired(mirror, tmp_path, what, damage):
    mirror.use("good")
    root = tmp_path / "data"
    assert has_all(root)
    for path in [path for pattern in what.split() for path in root.glob(pattern)]:
        damage(path)
    assert has_all(root) and (root / CIFAR10.base_folder / "batches.meta").stat().st_size > 4


DISK = ["torchvision.datasets.utils._urlretrieve", "tarfile.TarFile.makefile", "filelock.FileLock.acquire"]


@pytest.mark.parametrize("name", DISK)
def test_a_disk_that_takes_nothing_is_named_in_one_sentence(mirror, tmp_path, name):
    number = errno.EROFS if "Lock" in name else errno.ENOSPC
    mirror.use("good")
    with patch(name, side_effect=OSError(number, os.strerror(number))):
        with pytest.raises(OSError, match="CIFAR10_ROOT") as caught:
            utils.load_cifar10(tmp_path / "data")
        assert has_all(mirror.root)  # reading takes no place
    assert caught.value.errno == number and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert has_all(tmp_path / "data")


def test_smoke_never_tries_the_network_and_a_tilde_is_the_home_folder(mirror, tmp_path):
    mirror.use("good")
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "CIFAR10_ROOT": "~/pictures"}
    with patch.dict(os.environ, home | {"RUN_SIZE": "smoke"}):
        assert utils.load_cifar10().source == "synthetic" and mirror.asked == []
    with patch.dict(os.environ, home):
        assert utils.load_cifar10().source == "cifar10"
    assert (tmp_path / "pictures" / CIFAR10.base_folder / "batches.meta").exists()
