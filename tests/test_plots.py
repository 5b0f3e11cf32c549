"""The shared plots: what they show, their labels and the files they are saved to."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tiny import Tiny, recipe

import my_utils
from my_utils import CIFAR10_CLASSES, Augmentation, History, score, show

pytestmark = pytest.mark.usefixtures("root")


HISTORY = History(
    step_loss=[2.4, 2.2, 2.0, 1.8, 1.6, 1.4],
    step_learning_rate=[0.1] * 6,
    train_loss=[2.2, 1.6],
    train_top1=[0.2, 0.4],
    val_loss=[2.1, 1.7],
    val_top1=[0.25, 0.35],
    test_top1=[0.24, 0.34],
    seconds=[1.0, 1.0],
)


def record_of(*val_top1):
    return {"seeds": [{"history": {"val_top1": values, "train_loss": values}} for values in val_top1]}


RECORDS = {"one": record_of([0.1, 0.3], [0.2, 0.5]), "two": record_of([0.6, 0.7])}


def mistakes():
    """Return an evaluation of 20 examples, of which numbers 3, 8 and 15 are wrong with rising confidence."""
    labels = torch.arange(20) % 10
    logits = torch.zeros(20, 10)
    logits[torch.arange(20), labels] = 9.0  # right, and surer than any mistake
    for index, said, confidence in ((3, 4, 0.5), (8, 9, 0.7), (15, 1, 0.9)):
        logits[index] = math.log((1 - confidence) / 9)
        logits[index, said] = math.log(confidence)
    return score(logits, labels)


FIGURES = {
    "history": lambda splits: my_utils.plot_history(HISTORY, 2, "a title"),
    "history of a start": lambda splits: my_utils.plot_history(History([2.3], [0.1]), 2, "a title"),
    "empty history": lambda splits: my_utils.plot_history(History(), 2, "a title"),
    "curves": lambda splits: my_utils.plot_curves(RECORDS, "val_top1", "a title"),
    "classes": lambda splits: my_utils.plot_classes(splits.train, splits.classes, title="a title"),
    "augmentation": lambda splits: my_utils.plot_augmentation(splits.train, Augmentation(crop=4), "a title"),
    "confusion": lambda splits: my_utils.plot_confusion(np.eye(10), CIFAR10_CLASSES, "a title"),
    "mistakes": lambda splits: my_utils.plot_mistakes(mistakes(), splits.test, CIFAR10_CLASSES, title="a title"),
}


def stand_in(fingerprint="ab", source="synthetic"):
    """What `show` looks at of a Run."""
    return SimpleNamespace(name="a run", fingerprint=fingerprint, source=source)


def title_of(figure):
    return figure.get_suptitle() or figure.axes[0].get_title()


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_titled_and_saved_with_an_alternative_text(root, splits, name):
    figure = FIGURES[name](splits)
    assert isinstance(figure, Figure)
    assert title_of(figure) == "a title"
    runs = [stand_in(fingerprint) for fingerprint in ("ab", "cd")]
    assert show(figure, alt="What one sees, in words: 50 %", save="a-figure", runs=runs) is None
    path = root / "build" / "figures" / "a-figure.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        image.load()
        assert image.size == tuple(int(110 * side) for side in figure.get_size_inches())
        assert image.text["Description"] == "What one sees, in words: 50 %"
        assert image.text["Fingerprints"] == "ab cd"
        assert len(image.getcolors(1 << 20)) > 10  # something is drawn


@pytest.mark.parametrize(("source", "part"), [("cifar10", "report"), ("synthetic", "build")])
def test_figures_lie_beside_the_records(root, splits, monkeypatch, source, part):
    monkeypatch.setenv("RUN_SIZE", "full")
    monkeypatch.setenv("RECORD", "1")
    show(FIGURES["confusion"](splits), alt="A", save="a-figure", runs=[stand_in(source=source)])
    assert [path.relative_to(root).as_posix() for path in root.glob("*/figures/*")] == [f"{part}/figures/a-figure.png"]


@pytest.mark.parametrize("runs", [[], [stand_in(), stand_in(source="cifar10")]])
def test_a_saved_figure_names_runs_on_one_data_set(root, splits, runs):
    with pytest.raises(ValueError, match=r"runs are \[.*\]; a figure to be saved shows runs on one data set"):
        show(FIGURES["history"](splits), alt="A", save="a-figure", runs=runs)
    assert list(root.iterdir()) == []


def test_a_figure_that_is_not_saved_writes_nothing(root, splits):
    show(FIGURES["history"](splits), alt="A")
    assert list(root.iterdir()) == []


# --- What the figures show ---


def test_history(splits):
    left, right = FIGURES["history"](splits).axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("step", "loss (nats)")
    assert (right.get_xlabel(), right.get_ylabel()) == ("epoch", "accuracy (%)")
    assert left.lines[0].get_ydata().tolist() == HISTORY.step_loss
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in right.lines}
    assert lines == {
        "train (augmented, running)": ([1, 2], [20, 40]),
        "validation": ([1, 2], [25, 35]),
        "test (watched)": ([1, 2], [24, 34]),
    }
    colours = [line.get_color() for line in right.lines]
    assert len(set(colours)) == 3 and colours[0] == left.lines[0].get_color()  # one colour for one split


def test_curves_are_means_with_a_band(splits):
    [axes] = FIGURES["curves"](splits).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation accuracy (%)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one (2 seeds)", "two (1 seed)"]
    first, second = (line.get_ydata().tolist() for line in axes.lines)
    assert first == pytest.approx([15, 40]) and second == pytest.approx([60, 70])
    band = axes.collections[0].get_paths()[0].vertices
    assert {x: (band[band[:, 0] == x, 1].min(), band[band[:, 0] == x, 1].max()) for x in (1, 2)} == {
        1: pytest.approx((10, 20)),
        2: pytest.approx((30, 50)),
    }


def test_curves_of_a_loss(splits):
    [axes] = my_utils.plot_curves(RECORDS, "train_loss", "a title").axes
    assert axes.get_ylabel() == "training loss (nats)"
    assert axes.lines[1].get_ydata().tolist() == [0.6, 0.7]


def test_confusion_in_per_cent_of_the_true_class():
    confusion = np.zeros((10, 10), dtype=int)
    confusion[0, :2] = 3, 1
    confusion[5, 5] = 7
    figure = my_utils.plot_confusion(torch.from_numpy(confusion), CIFAR10_CLASSES)
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert "per cent of the true class" in (bar.get_ylabel(), bar.get_xlabel())
    shares = np.asarray(axes.collections[0].get_array()).reshape(10, 10)
    assert (shares[0, 0], shares[0, 1], shares[5, 5], shares.sum()) == (75, 25, 100, 200)
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == list(CIFAR10_CLASSES)


def test_one_row_per_class(splits):
    figure = my_utils.plot_classes(splits.train, splits.classes, per_class=3)
    assert len(figure.axes) == 30
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == list(splits.classes)
    for number, axes in enumerate(figure.axes):
        of_class = splits.train.images[splits.train.labels == number // 3]
        assert np.array_equal(axes.images[0].get_array(), of_class[number % 3].permute(1, 2, 0))


def test_augmented_images_stand_beside_the_original(splits):
    figure = my_utils.plot_augmentation(splits.train, Augmentation(crop=4), count=2, epochs=3)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["original", "epoch 1", "epoch 2", "epoch 3", "", "", "", ""]
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    for row in range(2):
        original = splits.train.images[row].permute(1, 2, 0).numpy() / 255
        np.testing.assert_allclose(shown[4 * row], original, atol=1e-6)
    assert not all(np.allclose(shown[0], image) for image in shown[1:4])


def test_mistakes_come_most_confident_first_and_nothing_else(splits):
    figure = FIGURES["mistakes"](splits)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == [
        "said automobile, 90%\nis dog",
        "said truck, 70%\nis ship",
        "said deer, 50%\nis cat",
    ]
    assert titles[3:] == [""] * 7 and not any(axes.images for axes in figure.axes[3:])
    for axes, index in zip(figure.axes, (15, 8, 3), strict=False):
        assert np.array_equal(axes.images[0].get_array(), splits.test.images[index].permute(1, 2, 0))


def test_as_many_mistakes_as_asked_for(splits):
    figure = my_utils.plot_mistakes(mistakes(), splits.test, CIFAR10_CLASSES, count=2)
    assert [bool(axes.images) for axes in figure.axes] == [True, True, False, False, False]


@pytest.mark.parametrize(("source", "flag"), [("synthetic", " (synthetic data)"), ("cifar10", "")])
def test_curves_of_a_stored_run_say_what_they_were_trained_on(splits, monkeypatch, source, flag):
    data = replace(splits, source=source)
    fit = partial(my_utils.fit, Tiny, data, recipe(epochs=1), run="test/tiny", seed=2)
    figures = []
    monkeypatch.setattr(my_utils, "show", lambda figure, **_: figures.append(figure))
    fit()
    fit(plot=False)
    assert figures == []  # nobody watches outside a notebook
    fit()
    assert [figure.get_suptitle() for figure in figures] == [f"test/tiny, seed 2{flag}"]
