"""The shared plots: the numbers that they show, their labels, and the files that they are saved to."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Tiny, recipe

import my_utils as utils
from my_utils import CIFAR10_CLASSES, History

pytestmark = pytest.mark.usefixtures("root")
baseline = utils.models_of("01_baseline")
HISTORY = History(
    [2.4, 2.2, 2.0, 1.8, 1.6, 1.4], [0.1] * 6, [2.2, 1.6], [0.2, 0.4], [2.1, 1.7], [0.25, 0.35], [0.24, 0.34], [1, 1]
)


def record_of(*curves):
    return {"seeds": [{"history": {"val_top1": values, "train_loss": values}} for values in curves]}


RECORDS = {"one": record_of([0.1, 0.3], [0.2, 0.5]), "two": record_of([0.6, 0.7])}
FIGURES = {
    "history": partial(utils.plot_history, HISTORY, 2, done=2),
    "empty history": partial(utils.plot_history, History(), 2, done=0),
    "curves": partial(baseline.plot_curves, RECORDS, "val_top1"),
    "confusion": partial(baseline.plot_confusion, np.eye(10), CIFAR10_CLASSES),
}


def run_on(source, fingerprint="ab"):
    """Return what `show` looks at of a Run."""
    return SimpleNamespace(name="a run", fingerprint=fingerprint, source=source)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_titled_and_saved_with_an_alternative_text(root, name):
    figure = FIGURES[name](title="a title")
    assert "a title" in (figure.get_suptitle(), figure.axes[0].get_title())
    runs = (run_on("synthetic", fingerprint) for fingerprint in ("ab", "cd"))
    assert utils.show(figure, alt="What one sees, in words: 50 %", save="a-figure", runs=runs) is None
    utils.show(figure, alt="A")  # which writes nothing
    path = root / "build" / "figures" / "a-figure.png"
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == tuple(int(110 * side) for side in figure.get_size_inches())
        assert image.text["Description"] == "What one sees, in words: 50 %" and image.text["Fingerprints"] == "ab cd"
        assert len(image.getcolors(1 << 20)) > 10  # something is drawn
    assert [found for found in root.rglob("*") if found.is_file()] == [path] and plt.get_fignums() == []


def test_history():
    left, right = FIGURES["history"](title="").axes
    assert left.get_ylabel() == "loss (nats)" and right.get_ylabel() == "accuracy (%)"
    assert left.lines[0].get_ydata().tolist() == HISTORY.step_loss
    assert left.lines[0].get_xdata().tolist() == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2])
    assert left.lines[1].get_ydata()[2] == pytest.approx((2.4 + 2.2 + 2.0) / 3)
    assert [list(line.get_ydata()) for line in right.lines] == [[20, 40], [25, 35], [24, 34]]
    assert [line.get_label().split()[0] for line in right.lines] == ["train", "validation", "test"]


@pytest.mark.parametrize(("curve", "scale", "label"), [("val_top1", 100, "validation.*%"), ("train_loss", 1, "nats")])
def test_curves_are_means_with_a_band(curve, scale, label):
    [axes] = baseline.plot_curves(RECORDS, curve, "").axes
    assert axes.get_xlabel() == "epoch" and re.search(label, axes.get_ylabel())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one (2 seeds)", "two (1 seed)"]
    first, second = (line.get_ydata() / scale for line in axes.lines)
    assert first.tolist() == pytest.approx([0.15, 0.4]) and second.tolist() == pytest.approx([0.6, 0.7])
    x, y = axes.collections[0].get_paths()[0].vertices.T
    assert [y[x == epoch].min() / scale for epoch in (1, 2)] == pytest.approx([0.1, 0.3])
    assert [y[x == epoch].max() / scale for epoch in (1, 2)] == pytest.approx([0.2, 0.5])


def test_confusion_in_per_cent_of_the_true_class():
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion[0, :2], confusion[5, 5] = torch.tensor([3, 1]), 7
    axes, _ = baseline.plot_confusion(confusion, CIFAR10_CLASSES).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    shares = axes.collections[0].get_array().reshape(10, 10)
    assert (shares[0, 1], shares.sum()) == (25, 25) and shares.mask.diagonal().all()
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert (written[0.5, 0.5], written[1.5, 0.5], written[5.5, 5.5]) == ("75", "25", "100")


@pytest.mark.parametrize(("source", "flag"), [("synthetic", "synthetic"), ("cifar10", "seed 2")])
def test_curves_of_a_run_are_shown_again_and_say_what_it_was_trained_on(splits, monkeypatch, source, flag):
    fit = partial(utils.fit, Tiny, replace(splits, source=source), recipe(epochs=1), run="test/tiny", seed=2)
    figures = []
    monkeypatch.setattr(utils, "show", lambda figure, **_: figures.append(figure))
    fit(plot=False)
    assert figures == []
    fit()
    [figure] = figures
    assert figure.get_suptitle().startswith("test/tiny, seed 2") and flag in figure.get_suptitle()
