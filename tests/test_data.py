"""The data: the fixed split, the synthetic set, and the download from a web server on this machine."""

import errno
import hashlib
import math
import os
import pickle
import socket
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http import server
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import CIFAR10

import my_utils as utils

FOLDER, ARCHIVE = CIFAR10.base_folder, CIFAR10.filename
REAL = Path(os.environ.get("CIFAR10_ROOT") or utils.ROOT / "data").expanduser()


def parts(splits):
    return splits.train, splits.val, splits.test


def test_the_split_is_balanced_disjoint_and_never_changes():
    """Image i holds i in its first two channels. Another split would validate on what old runs were trained on."""
    random, index = np.random.RandomState(0), torch.arange(60_000)
    labels = np.concatenate([random.permutation(np.arange(count) % 10) for count in (50_000, 10_000)])
    pixels = torch.stack([index % 256, index // 256, 0 * index], 1).to(torch.uint8)
    splits = utils.make_splits(pixels[:, :, None, None].expand(-1, -1, 32, 32), torch.from_numpy(labels), "x", ())
    train, val, test = (s.images[:, 0, 0, 0].long() + 256 * s.images[:, 1, 0, 0].long() for s in parts(splits))
    assert torch.equal(test, index[50_000:]) and torch.equal(torch.cat([train, val]).sort().values, index[:50_000])
    assert hashlib.md5(val.numpy().tobytes()).hexdigest() == "c7401834fedc465d3267200c3881cc4e"
    for split, positions in zip(parts(splits), (train, val, test), strict=True):
        assert np.array_equal(split.labels, labels[positions])
        assert split.labels.bincount().tolist() == [len(split) // 10] * 10
    values = pixels[train].double() / 255
    for split in parts(splits):
        np.testing.assert_allclose(split.mean, values.mean(0), atol=1e-9)
        np.testing.assert_allclose(split.std, values.std(0, correction=0), atol=1e-9)


@pytest.mark.skipif(not (REAL / FOLDER).is_dir(), reason="CIFAR-10 is not at hand")
def test_the_real_files_give_the_split_of_the_records(monkeypatch):
    monkeypatch.setenv("RUN_SIZE", "quick")
    splits = utils.load_cifar10(REAL)
    assert (splits.source, splits.classes[3], splits.digest) == ("cifar10", "cat", "f74e6f74419d32f5")
    np.testing.assert_allclose(splits.train.mean, (0.4914, 0.4822, 0.4465), atol=1e-3)
    np.testing.assert_allclose(splits.train.std, (0.247, 0.243, 0.262), atol=1e-3)


@pytest.fixture
def small():
    """Splits of 40, 20 and 30 images."""
    images, labels = utils.draw_synthetic(90)
    ends = {"train": (0, 40), "val": (40, 60), "test": (60, 90)}
    split = {name: utils.Split(images[a:b], labels[a:b], (0.5,) * 3, (0.25,) * 3) for name, (a, b) in ends.items()}
    return utils.Splits(**split, source="synthetic")


@pytest.mark.parametrize("name", ["train", "val", "test"])
@pytest.mark.parametrize("what", ["images", "labels"])
def test_the_digest_sees_every_value(small, name, what):
    split = getattr(small, name)
    values = getattr(split, what).clone()
    values.view(-1)[-1] = (values.view(-1)[-1] + 1) % 10
    assert replace(small, **{name: replace(split, **{what: values})}).digest != small.digest


def test_the_digest_does_not_depend_on_the_last_digits_of_a_sum(small):
    """Processors add up in different orders; a run trained on one must be found on the other."""
    train = small.train
    near = replace(train, mean=tuple(math.nextafter(m, 1) for m in train.mean), std=tuple(s + 1e-13 for s in train.std))
    far = replace(train, mean=tuple(m + 1e-6 for m in train.mean))
    assert replace(small, train=near).digest == small.digest != replace(small, train=far).digest


def test_splits_can_be_cut_and_joined(small):
    cut, joined = small.head(train=20, test=10), small.with_val_in_train()
    assert [len(split) for split in parts(cut)] == [20, 20, 10] and joined.val is None
    assert torch.equal(joined.train.images, torch.cat([small.train.images, small.val.images]))
    shuffled = small.train[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    seen = [int((shuffled.labels[:i] == label).sum()) for i, label in enumerate(shuffled.labels)]
    assert torch.equal(shuffled.head(20).images, shuffled.images[torch.tensor(seen) < 2])
    for count in (0, 7, 50):
        with pytest.raises(ValueError, match=f"{count}.*multiple of 10"):
            small.train.head(count)


def test_a_convolution_learns_the_synthetic_set_and_a_linear_classifier_does_not(synthetic_splits, store):
    def convolutions():
        layers = [nn.Conv2d(3, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5)]
        return nn.Sequential(
            *layers, nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
        )

    def linear():
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

    splits, recipe = (
        synthetic_splits.head(5000, 1000, 10),
        utils.Recipe(epochs=2, batch_size=32, optimizer="adam", learning_rate=0.003),
    )
    top1 = [
        utils.fit(net, splits, recipe, run=net.__name__, plot=False).history.val_top1[-1]
        for net in (convolutions, linear)
    ]
    assert top1[0] > 0.8 and top1[1] < 0.4, top1


# The download. torchvision's own code fetches a small archive, whose sums stand in for the official ones


def write_archive(folder: Path) -> list[tuple[str, str]]:
    """Write ten images per file in the official format; return the names and MD5s."""
    (folder / FOLDER).mkdir()
    contents = {"batches.meta": {"label_names": list(utils.CIFAR10_CLASSES)}}
    for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        data = np.arange(k, k + 10 * 3072).astype(np.uint8).reshape(10, 3072)
        contents[name] = {"data": data, "labels": [k] * 10}
    for name, content in contents.items():
        (folder / FOLDER / name).write_bytes(pickle.dumps(content))
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        archive.add(folder / FOLDER, FOLDER)
    return [(name, hashlib.md5((folder / FOLDER / name).read_bytes()).hexdigest()) for name in contents]


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A web server that answers each path in the way its name says; `asked` counts the paths that were asked for."""
    official = tmp_path / "official"
    official.mkdir()
    meta, *lists = write_archive(official)
    packed = (official / ARCHIVE).read_bytes()
    monkeypatch.setattr(CIFAR10, "train_list", [list(pair) for pair in lists[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [list(lists[5])])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": meta[1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "")  # which the download sets
    monkeypatch.setattr(utils, "TRAIN", "")
    monkeypatch.setattr(
        utils,
        "make_splits",
        lambda images, labels, *about: SimpleNamespace(images=images, labels=labels, source=about[0]),
    )
    monkeypatch.setattr(utils, "draw_synthetic", lambda: (None, None))
    patience = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patience(seconds and min(seconds, 0.4)))
    for name, value in {
        "RUN_SIZE": "",
        "TRAIN": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "CIFAR10_ROOT": "",
    }.items():
        monkeypatch.setenv(name, value)
    asked, over = [], threading.Event()

    class Handler(server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            kind = self.path.strip("/")
            asked.append(kind)
            self.close_connection = True
            if kind == "missing":
                return self.send_error(404)
            if kind == "silent":
                return over.wait(10)
            if kind == "babble":
                return self.wfile.write(b"hello\r\n\r\n")
            body = b"<!DOCTYPE html><title>Please log in</title>" if kind == "page" else packed
            cut = kind in ("truncated", "stalled", "chunked")
            self.send_response(200)
            self.send_header(*("Transfer-Encoding", "chunked") if kind == "chunked" else ("Content-Length", len(body)))
            self.end_headers()
            self.wfile.write(b"ffff\r\n" * (kind == "chunked") + body[: len(body) // (1 + cut)])
            if kind == "stalled":
                over.wait(10)

        def log_message(self, *_):
            pass

    with server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http, socket.socket() as unused:
        http.handle_error = lambda *_: None
        unused.bind(("127.0.0.1", 0))  # a port on which nobody listens
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        ports = {"closed": unused.getsockname()[1]}

        def use(*kinds):
            urls = tuple(f"http://127.0.0.1:{ports.get(kind, http.server_port)}/{kind}" for kind in kinds)
            monkeypatch.setattr(utils, "CIFAR10_SOURCES", urls)

        yield SimpleNamespace(use=use, asked=asked, official=official / FOLDER)
        over.set()
        http.shutdown()


def is_whole(mirror, root: Path) -> bool:
    return all(path.read_bytes() == (root / FOLDER / path.name).read_bytes() for path in mirror.official.iterdir())


BAD = ["closed", "missing", "page", "truncated", "silent", "stalled", "chunked", "babble"]


@pytest.mark.parametrize("bad", [None, *BAD])
def test_the_next_source_helps_and_the_images_come_in_order(mirror, tmp_path, capsys, bad):
    root = tmp_path / "new" / "folder"
    mirror.use(*[bad] * (bad is not None), "good", "never")
    found = utils.load_cifar10(root)
    assert found.source == "cifar10" and is_whole(mirror, root) and "never" not in mirror.asked
    assert found.images[10 * 5 + 1, 0, 0, :3].tolist() == [5, 6, 7] and found.images.shape == (60, 3, 32, 32)
    assert found.labels.tolist() == [k for k in range(6) for _ in range(10)]
    output = capsys.readouterr()
    assert output.err == "" and "SYNTHETIC" not in output.out  # notebooks show standard error in red
    mirror.use()
    assert utils.load_cifar10(root).source == "cifar10"  # without asking anybody


def test_without_any_source_the_synthetic_set_stands_in(mirror, tmp_path, capsys, monkeypatch):
    mirror.use(*BAD)
    assert utils.replaying() and utils.run_size() == "full"
    assert utils.load_cifar10(tmp_path).source == "synthetic"
    said = capsys.readouterr().out
    assert "NOT CIFAR-10" in said and said.count("127.0.0.1") == len(BAD) and "404" in said and "timed out" in said
    assert not utils.replaying() and utils.run_size() == "quick"  # what ships was trained on CIFAR-10
    with pytest.raises(ConnectionError, match="404"):
        utils.load_cifar10(tmp_path, synthetic=False)


def test_smoke_never_tries_the_network(mirror, tmp_path, monkeypatch):
    mirror.use("good")
    monkeypatch.setenv("RUN_SIZE", "smoke")
    assert utils.load_cifar10(tmp_path).source == "synthetic" and mirror.asked == []
    assert utils.load_cifar10(tmp_path, synthetic=False).source == "cifar10"


@pytest.mark.parametrize("left", ["half an archive", "half a folder", "data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("missing", [False, True])
def test_what_is_damaged_or_interrupted_is_repaired(mirror, tmp_path, left, missing):
    mirror.use("good")
    assert utils.download_cifar10(tmp_path) == ""
    archive, folder = tmp_path / ARCHIVE, tmp_path / FOLDER
    damaged = {"half an archive": [archive, *folder.iterdir()], "half a folder": list(folder.iterdir())[2:]}
    for path in damaged.get(left, [folder / left]):
        content = path.read_bytes()
        path.unlink()
        if not missing:
            path.write_bytes(content[: len(content) // 2])
    assert utils.load_cifar10(tmp_path).source == "cifar10" and is_whole(mirror, tmp_path)


def failing(number):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        ("torchvision.datasets.utils", "open", errno.ENOSPC),  # while the archive comes
        ("tarfile.TarFile", "makefile", errno.ENOSPC),  # while it is unpacked
        ("pathlib.Path", "mkdir", errno.EACCES),
        ("filelock.FileLock", "acquire", errno.EROFS),
    ],
)
def test_a_disk_that_takes_nothing_is_named_in_one_sentence(mirror, tmp_path, monkeypatch, owner, name, number):
    mirror.use("good")
    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{name}", failing(number), raising=False)
        with pytest.raises(OSError, match="CIFAR10_ROOT") as caught:
            utils.load_cifar10(tmp_path / "data")
    assert caught.value.errno == number and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert utils.load_cifar10(tmp_path / "data").source == "cifar10"


def test_good_files_in_a_read_only_folder_are_read(mirror, monkeypatch):
    monkeypatch.setattr(filelock.FileLock, "acquire", failing(errno.EROFS))
    assert utils.load_cifar10(mirror.official.parent).source == "cifar10"


def test_two_at_once_download_once(mirror, tmp_path):
    mirror.use("good")
    utils.download_cifar10(tmp_path / "alone")
    count = len(mirror.asked)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(utils.download_cifar10, [tmp_path] * 2)) == ["", ""]
    assert len(mirror.asked) == 2 * count


def test_a_tilde_means_the_home_folder(mirror, tmp_path, monkeypatch):
    mirror.use("good")
    for name, value in {"HOME": tmp_path, "USERPROFILE": tmp_path, "CIFAR10_ROOT": "~/pictures"}.items():
        monkeypatch.setenv(name, str(value))
    assert utils.load_cifar10().source == "cifar10" and is_whole(mirror, tmp_path / "pictures")
