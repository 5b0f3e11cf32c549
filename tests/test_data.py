"""The data: splits and their checks, the synthetic set, the official files, and every way a download can fail."""

import errno
import hashlib
import http.server
import math
import os
import pickle
import re
import socket
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pooch
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import my_utils as utils

FOLDER = "cifar-10-batches-py"
PARTS = ("train", "val", "test")

# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def make_split(count=20, **changes):
    """A small split of random images whose labels count 0, 1, 2, ..."""
    images = torch.from_numpy(np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
    values = {"images": images, "labels": torch.arange(count) % 10, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return utils.Split(**values | changes)


def make_splits():
    return utils.Splits(train=make_split(40), val=make_split(20), test=make_split(30), source="synthetic")


def test_sizes_types_and_balance(synthetic_splits):
    assert synthetic_splits.source == "synthetic"
    assert len(synthetic_splits.classes) == len(set(synthetic_splits.classes)) == 10
    for name, count in zip(PARTS, (45_000, 5_000, 10_000), strict=True):
        split = getattr(synthetic_splits, name)
        assert len(split) == count
        assert split.images.shape == (count, 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.labels.shape == (count,) and split.labels.dtype == torch.int64
        assert split.labels.bincount().tolist() == [count // 10] * 10


def test_no_image_is_in_two_splits(synthetic_splits):
    seen = [hash(image.tobytes()) for name in PARTS for image in getattr(synthetic_splits, name).images.numpy()]
    assert len(set(seen)) == 60_000


def test_mean_and_std_are_those_of_the_training_images(synthetic_splits):
    for channel in range(3):
        values = synthetic_splits.train.images[:, channel].numpy().astype(np.float64) / 255
        for name in PARTS:
            split = getattr(synthetic_splits, name)
            assert split.mean[channel] == pytest.approx(values.mean(), abs=1e-9)
            assert split.std[channel] == pytest.approx(values.std(), abs=1e-9)


def test_the_drawing_depends_on_the_seed_alone():
    images, labels = utils.draw_synthetic(200)
    again, same = utils.draw_synthetic(200)
    other, _ = utils.draw_synthetic(200, seed=1)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, other)
    assert utils.draw_synthetic(7)[0].shape == (7, 3, 32, 32)


@pytest.mark.parametrize("count, error", [(0, ValueError), (2.5, TypeError), ("10", TypeError)])
def test_the_drawing_refuses_a_bad_count(count, error):
    with pytest.raises(error, match=rf"count is {count!r}.*(from 1|number)"):
        utils.draw_synthetic(count)


@pytest.mark.parametrize("count", [10, 30, 50])
def test_head_takes_the_first_images_of_each_class(count):
    labels = torch.randint(0, 10, (200,), generator=torch.Generator().manual_seed(0))
    split = make_split(200, labels=labels)
    chosen = [i for i in range(200) if (labels[:i] == labels[i]).sum() < count // 10]
    assert len(chosen) == count  # otherwise the labels above do not suit this test
    assert torch.equal(split.head(count).images, split.images[chosen])
    assert torch.equal(split.head(count).labels, labels[chosen])


def test_head_of_none_and_of_all_is_the_split():
    split = make_split(20)
    assert split.head(None) is split
    assert torch.equal(split.head(20).images, split.images)


def test_head_of_splits_cuts_each_part():
    splits = make_splits()
    assert [len(getattr(splits.head(train=20, test=10), name)) for name in PARTS] == [20, 20, 10]
    assert [len(getattr(splits.head(val=10), name)) for name in PARTS] == [40, 10, 30]
    assert splits.head().digest == splits.digest


def test_validation_images_can_join_the_training_images():
    splits = make_splits()
    merged = splits.with_val_in_train()
    assert merged.val is None
    assert torch.equal(merged.train.images, torch.cat([splits.train.images, splits.val.images]))
    assert torch.equal(merged.train.labels, torch.cat([splits.train.labels, splits.val.labels]))
    assert merged.train.mean == splits.train.mean and merged.test is splits.test
    assert merged.digest != splits.digest
    assert len(splits.val) == 20  # the splits themselves are as they were


def test_head_works_without_a_validation_split():
    merged = make_splits().with_val_in_train().head(train=30)
    assert len(merged.train) == 30 and merged.val is None


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("what", ["images", "labels"])
def test_one_changed_value_changes_the_digest(name, what):
    splits = make_splits()
    split = getattr(splits, name)
    values = getattr(split, what).clone()
    values.view(-1)[3] = (values.view(-1)[3] + 1) % 10
    changed = replace(splits, **{name: replace(split, **{what: values})})
    assert changed.digest != splits.digest == make_splits().digest


def test_the_digest_does_not_depend_on_the_last_digits_of_a_sum():
    """Processors add up in different orders; a run trained on one must be found on the other."""
    splits = make_splits()
    train = splits.train
    near = replace(train, mean=tuple(math.nextafter(m, 1) for m in train.mean), std=tuple(s + 1e-13 for s in train.std))
    far = replace(train, mean=tuple(m + 1e-6 for m in train.mean))
    assert replace(splits, train=near).digest == splits.digest != replace(splits, train=far).digest


def test_the_digest_depends_on_the_source_and_not_on_the_memory_layout():
    splits = make_splits()
    assert replace(splits, source="cifar10").digest != splits.digest
    every_second = splits.train[::2]
    copied = replace(every_second, images=every_second.images.contiguous(), labels=every_second.labels.contiguous())
    assert replace(splits, train=every_second).digest == replace(splits, train=copied).digest


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"images": torch.zeros(20, 3, 32, 32)}, TypeError, r"images are torch\.float32; .* torch\.uint8"),
        ({"images": torch.zeros(20, 32, 32, 3).byte()}, ValueError, r"images .*\[20, 32, 32, 3\]; .*\[N, 3, 32, 32\]"),
        ({"images": torch.zeros(3, 32, 32).byte()}, ValueError, r"images .*\[3, 32, 32\]; .*\[N, 3, 32, 32\]"),
        ({"labels": torch.arange(20).int() % 10}, TypeError, r"labels are torch\.int32; .* torch\.int64"),
        ({"labels": torch.arange(19) % 10}, ValueError, r"labels .*\[19\]; .*\[20\]"),
        ({"labels": torch.zeros(20, 1).long()}, ValueError, r"labels .*\[20, 1\]; .*\[20\]"),
        ({"labels": torch.arange(20) % 11}, ValueError, r"labels go from 0 to 10; .* 0 to 9"),
        ({"labels": torch.arange(20) % 10 - 1}, ValueError, r"labels go from -1 to 8; .* 0 to 9"),
        ({"images": torch.zeros(0, 3, 32, 32).byte(), "labels": torch.arange(0)}, ValueError, r"empty; .* one image"),
    ],
)
def test_a_split_refuses_what_it_cannot_be(changes, error, message):
    with pytest.raises(error, match=message):
        make_split(20, **changes)


@pytest.mark.parametrize("count", [7, 0, -10, 30, True, "10", 2.5])
def test_head_refuses_a_bad_count(count):
    with pytest.raises((ValueError, TypeError), match=rf"count is {count!r}.*multiple of 10 up to 20"):
        make_split(20).head(count)


# ---------------------------------------------------------------------------------------------------------------------
# The synthetic set can be learned, but not by a linear classifier
# ---------------------------------------------------------------------------------------------------------------------


class ConvNet(nn.Sequential):
    def __init__(self):
        super().__init__()
        for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
            self.extend([nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)])
        self.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)])


@pytest.fixture(scope="module")
def small_splits(synthetic_splits):
    return synthetic_splits.head(train=5_000, val=500, test=2_000)


def test_a_small_convnet_learns_the_synthetic_set(small_splits, tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    recipe = utils.Recipe(
        epochs=2, batch_size=32, optimizer="adam", learning_rate=3e-3, schedule="onecycle", precision="float32"
    )
    run = utils.fit(ConvNet, small_splits, recipe, run="convnet", plot=False, device="cpu")
    assert utils.evaluate(run.model, small_splits.test, precision="float32").top1 > 0.8


def test_logistic_regression_does_not_learn_the_synthetic_set(small_splits):
    (train, labels), (test, test_labels) = (
        next(utils.batches(split, len(split))) for split in (small_splits.train, small_splits.test)
    )
    model = nn.Linear(3 * 32 * 32, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(model(train.flatten(1)), labels)
        value.backward()
        return value

    optimizer.step(loss)
    top1 = [(model(x.flatten(1)).argmax(1) == y).double().mean() for x, y in ((train, labels), (test, test_labels))]
    assert top1[0] > 0.9  # it did train
    assert top1[1] < 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Official files and downloads: a made-up archive in CIFAR-10's format, from a web server on this machine
# ---------------------------------------------------------------------------------------------------------------------


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A made-up CIFAR-10 in the official format, which the loader takes for the real one.

    Image i holds i in its red (i % 256, growing by row) and green (i // 256, growing by column) planes.
    """
    root = tmp_path_factory.mktemp("official")
    random = np.random.RandomState(0)
    labels = np.concatenate([random.permutation(np.arange(count) % 10) for count in (50_000, 10_000)])
    index, ramp = np.arange(60_000), np.arange(32, dtype=np.uint8)
    images = np.empty((60_000, 3, 32, 32), dtype=np.uint8)
    images[:, 0] = (index % 256).astype(np.uint8)[:, None, None] + ramp[:, None]
    images[:, 1] = (index // 256).astype(np.uint8)[:, None, None] + ramp
    images[:, 2] = (20 * labels).astype(np.uint8)[:, None, None]
    contents = {"batches.meta": {"label_names": list(utils.CIFAR10_CLASSES)}}
    for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(10_000 * k, 10_000 * (k + 1))
        contents[name] = {"data": images[part].reshape(10_000, 3_072), "labels": labels[part].tolist()}
    (root / FOLDER).mkdir()
    sums = {}
    for name, content in contents.items():
        (root / FOLDER / name).write_bytes(text := pickle.dumps(content))
        sums[name] = md5(text)
    path = tmp_path_factory.mktemp("archive") / "archive.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(root / FOLDER, FOLDER)
    packed = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        dataset = torchvision.datasets.CIFAR10
        patch.setattr(dataset, "train_list", [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)])
        patch.setattr(dataset, "test_list", [["test_batch", sums["test_batch"]]])
        patch.setattr(dataset, "meta", {**dataset.meta, "md5": sums["batches.meta"]})
        patch.setattr(utils, "ARCHIVE_MD5", md5(packed))
        patch.setattr(utils, "ARCHIVE_BYTES", len(packed))
        patch.setenv("RUN_SIZE", "quick")
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.delenv("CIFAR10_ROOT", raising=False)
        images, labels = torch.from_numpy(images), torch.from_numpy(labels)
        yield SimpleNamespace(root=root, images=images, labels=labels, packed=packed)


@pytest.fixture
def mirror(official, monkeypatch):
    """A web server that answers each path in the way its name says; `asked` lists the paths that were asked for."""
    monkeypatch.setattr(utils, "STALL_TIMEOUT", 0.5)
    asked, over = [], threading.Event()
    flipped = bytearray(official.packed)
    flipped[len(flipped) // 2] ^= 1
    bodies = {"flipped": bytes(flipped), "page": b"<!DOCTYPE html><title>Please log in</title>"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.strip("/")
            asked.append(kind)
            if kind == "missing":
                return self.send_error(404)
            if kind == "silent":
                return over.wait(10)
            if kind == "slow":
                time.sleep(0.3)
            body = bodies.get(kind, official.packed)
            self.send_response(200)
            if kind != "unsized":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if kind in ("truncated", "unsized", "stalled") else body)
            if kind == "stalled":
                over.wait(10)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # a port on which nobody listens
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def url(kind):
            return f"http://127.0.0.1:{(unused if kind == 'closed' else server.socket).getsockname()[1]}/{kind}"

        yield SimpleNamespace(asked=asked, url=url)
        over.set()
        server.shutdown()


def listing(root):
    """The names in a folder but for the lock, which holds nothing."""
    return sorted({path.name for path in root.iterdir()} - {".download.lock"})


def positions(split):
    """The number that each made-up image holds."""
    return split.images[:, 0, 0, 0].long() + 256 * split.images[:, 1, 0, 0].long()


def test_official_files_are_read_and_split(official, mirror, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(official.root))
    splits = utils.load_cifar10(sources=[mirror.url("good")])
    assert mirror.asked == []
    assert splits.source == "cifar10" and splits.classes == utils.CIFAR10_CLASSES
    assert [len(getattr(splits, name)) for name in PARTS] == [45_000, 5_000, 10_000]
    for name in PARTS:
        split = getattr(splits, name)
        found = positions(split)
        assert torch.equal(split.images, official.images[found])
        assert torch.equal(split.labels, official.labels[found])
        assert split.labels.bincount().tolist() == [len(split) // 10] * 10
    train, val = positions(splits.train), positions(splits.val)
    assert torch.equal(positions(splits.test), torch.arange(50_000, 60_000))
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(50_000))
    # Drawn once and for all: with another split, old results would have been validated on what is now trained on.
    assert val[:5].tolist() == [5, 11, 16, 34, 46]
    assert md5(val.numpy().tobytes()) == "c7401834fedc465d3267200c3881cc4e"


def test_an_argument_goes_before_the_environment(official, monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR10_ROOT", str(official.root))
    with pytest.raises(utils.DataError, match=re.escape(str(tmp_path))):
        utils.load_cifar10(tmp_path, sources=[], synthetic=False)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_file_is_named(official, tmp_path, name, missing):
    folder = tmp_path / FOLDER
    folder.mkdir()
    for path in (official.root / FOLDER).iterdir():
        (folder / path.name).symlink_to(path)
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    expected = md5(content)
    if not missing:
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    with pytest.raises(utils.DataError) as caught:
        utils.load_cifar10(tmp_path, sources=[])
    found = "no such file" if missing else md5(content)
    what, advice = f"{folder / name} is not the official file", f"Delete the folder {folder}"
    for part in (what, f"found {found}", f"expected MD5 {expected}", advice):
        assert part in str(caught.value)


def test_a_download_passes_over_bad_mirrors(official, mirror, tmp_path, capsys):
    bad = ["closed", "missing", "stalled", "truncated", "page", "flipped"]
    root = tmp_path / "new" / "folder"
    splits = utils.load_cifar10(root, sources=[mirror.url(kind) for kind in [*bad, "good", "never"]])
    assert mirror.asked == [*bad[1:], "good"]
    assert splits.source == "cifar10" and torch.equal(splits.test.images, official.images[50_000:])
    assert listing(root) == [FOLDER]
    for path in (official.root / FOLDER).iterdir():
        assert (root / FOLDER / path.name).read_bytes() == path.read_bytes()
    printed = capsys.readouterr().out
    assert printed.count("CIFAR-10: trying 127.0.0.1:") == 7 and "SYNTHETIC" not in printed

    assert utils.load_cifar10(root, sources=[mirror.url("good")]).digest == splits.digest
    assert mirror.asked == [*bad[1:], "good"]
    assert "trying" not in capsys.readouterr().out


UNREACHABLE = {
    "closed": "no connection",
    "missing": "HTTP status 404",
    "silent": "nothing came for 0.5 s",
    "stalled": "nothing came for 0.5 s",
}
WRONG = {
    "truncated": "truncated: the connection closed before the {size} expected bytes had come",
    "unsized": "of {half} bytes, expected MD5 {sum} of {size} bytes",
    "page": "found an HTML page of 43 bytes, expected MD5 {sum} of {size} bytes",
    "flipped": "of {size} bytes, expected MD5 {sum} of {size} bytes",
}


@pytest.mark.parametrize("kind", [*UNREACHABLE, *WRONG])
def test_a_failed_download_says_why_and_leaves_nothing(official, mirror, tmp_path, kind):
    size = len(official.packed)
    problem = (UNREACHABLE | WRONG)[kind].format(size=f"{size:,}", half=f"{size // 2:,}", sum=md5(official.packed))
    # Wrong data are an error in any case; a network that is away is one only where no synthetic set may stand in.
    with pytest.raises(utils.DataError, match=re.escape(problem)) as caught:
        utils.load_cifar10(tmp_path, sources=[mirror.url(kind)], synthetic=None if kind in WRONG else False)
    assert f"put the folder {FOLDER} into {tmp_path}" in str(caught.value)
    assert mirror.asked == ([] if kind == "closed" else [kind])
    assert listing(tmp_path) == []


def test_every_mirror_is_named_when_all_fail(mirror, tmp_path):
    with pytest.raises(utils.DataError) as caught:
        utils.load_cifar10(tmp_path, sources=[mirror.url(kind) for kind in ("flipped", "missing", "page", "closed")])
    text = str(caught.value)
    hosts = [mirror.url(kind).split("/")[2] for kind in ("flipped", "missing", "page", "closed")]
    problems = ["found MD5", "HTTP status 404", "found an HTML page", "no connection"]
    assert re.search(".*\n".join(f"{host}: {re.escape(p)}" for host, p in zip(hosts, problems, strict=True)), text)
    assert listing(tmp_path) == []


def test_without_a_network_the_synthetic_set_stands_in(mirror, tmp_path, capsys, synthetic_splits):
    sources = [mirror.url(kind) for kind in ("closed", "missing", "stalled")]
    splits = utils.load_cifar10(tmp_path, sources=sources)
    printed = capsys.readouterr().out
    for part in ("NOT CIFAR-10", "SYNTHETIC", "no connection", "HTTP status 404", "nothing came for 0.5 s", FOLDER):
        assert part in printed
    assert splits.source == "synthetic" and splits.digest == synthetic_splits.digest
    assert listing(tmp_path) == []


def test_smoke_never_tries_the_network(official, mirror, tmp_path, monkeypatch, capsys, synthetic_splits):
    monkeypatch.setenv("RUN_SIZE", "smoke")
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "new"))
    assert utils.load_cifar10(sources=[mirror.url("good")]).digest == synthetic_splits.digest
    assert mirror.asked == [] and not (tmp_path / "new").exists()
    assert capsys.readouterr().out == ""


def fail(number):
    def call(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    "owner, name, number",
    [
        (pooch.downloaders, "open", errno.ENOSPC),  # while the archive comes
        (tarfile.TarFile, "makefile", errno.ENOSPC),  # while it is unpacked
        (os, "replace", errno.ENOSPC),  # at the end
        (tempfile, "mkdtemp", errno.EROFS),
        (tempfile, "mkdtemp", errno.EACCES),
        (Path, "mkdir", errno.EACCES),
    ],
)
def test_a_disk_that_takes_nothing_is_named(mirror, tmp_path, monkeypatch, owner, name, number):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail(number), raising=False)
        with pytest.raises(utils.DataError) as caught:
            utils.load_cifar10(tmp_path, sources=[mirror.url("good")])
    for part in (str(tmp_path), os.strerror(number), "MB free", "Free some space", "CIFAR10_ROOT"):
        assert part in str(caught.value)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("below", [".", "data"])
def test_a_file_in_the_place_of_the_folder_is_named(mirror, tmp_path, below):
    root = tmp_path / "file" / below
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(utils.DataError, match=re.escape(str(root)) + ".*CIFAR10_ROOT"):
        utils.load_cifar10(root, sources=[mirror.url("good")])
    assert mirror.asked == []
    assert (tmp_path / "file").read_text() == "not a folder"


def test_two_downloads_at_once_make_one_copy(official, mirror, tmp_path):
    def load(_):
        return utils.load_cifar10(tmp_path, sources=[mirror.url("slow")])

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, range(2))
    assert mirror.asked == ["slow"]
    assert first.source == "cifar10" and first.digest == second.digest
    assert listing(tmp_path) == [FOLDER]


def test_an_interrupted_download_is_not_trusted(official, mirror, tmp_path):
    """What a killed process leaves behind, half an archive and half a folder, is not taken for the data."""
    part = tmp_path / ".part-killed" / FOLDER
    part.mkdir(parents=True)
    (part / "data_batch_1").write_bytes(b"half")
    (tmp_path / ".download.lock").touch()
    splits = utils.load_cifar10(tmp_path, sources=[mirror.url("good")])
    assert mirror.asked == ["good"] and torch.equal(splits.test.images, official.images[50_000:])
    assert listing(tmp_path) == [FOLDER]  # nor is it kept
