"""Notebook 01: the picture of a block, and the solutions of the exercises."""

import itertools
import re

import nbformat
import pytest
import torch
from matplotlib.patches import FancyBboxPatch
from matplotlib.transforms import Bbox

import my_utils as utils

CELLS = nbformat.read(utils.ROOT / "notebooks" / "01_baseline.ipynb", as_version=4).cells
TEXT = "\n\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")
SOLUTIONS = re.split(r"^\d+\. ", TEXT.split("<summary>Solutions</summary>")[1], flags=re.MULTILINE)[1:]
BLOCKS = {
    "parallel": {"branches": [["3×3 conv"]] * 3, "gate": "$a = W m + b$", "after": ["ReLU", "max pool"]},
    "paths": {"branches": [["3×3 conv", "BatchNorm", "ReLU", "SE"]] * 4, "gate": "FC", "skip": "1×1 conv"},
    "chain": {"branches": [["3×3 conv", "ReLU", "BatchNorm"]] * 3, "gate": "2 FC, softmax", "skip": "1×1 conv"},
    "chain without a gate": {"branches": [["3×3 conv", "BatchNorm", "sigmoid"]] * 3},
    "no gate": {"branches": [["3×3 conv"], ["1×1 conv", "BatchNorm"]], "skip": "identity"},
    "one": {"branches": [["3×3 conv"]]},
}
ORANGE = (0.976, 0.773, 0.553)


@pytest.fixture
def names(synthetic_splits, store):
    """What the notebook defines before its exercises, on a few images and without a training."""
    names = {"utils": utils, "splits": synthetic_splits}
    for cell in CELLS:
        if "model" in cell.metadata.get("tags", []) or "augmentation = " in cell.source or "recipe = " in cell.source:
            exec(cell.source, names)
    [live] = [cell.source for cell in CELLS if 'run="01/live"' in cell.source]
    exec(live.split("live = ")[0], names)
    return names


@pytest.mark.parametrize("number", range(1, 1 + len(SOLUTIONS)))
def test_solutions_run(names, number, capsys):
    code = re.findall(r"```python\n(.*?)```", SOLUTIONS[number - 1], flags=re.DOTALL)
    assert code
    for block in code:
        lines = [line.removeprefix("   ") for line in block.splitlines()]
        assert max(map(len, lines)) <= 88
        exec("\n".join(lines), names)
    said = capsys.readouterr().out
    if "fit(" in code[-1]:
        assert "epoch 3" in said
    if number == 5:
        assert said == "129,078 images\n"


def test_the_mended_softmax_starts_as_a_plain_sum(names):
    [code] = re.findall(r"```python\n(.*?)```", SOLUTIONS[3], flags=re.DOTALL)
    exec("\n".join(line.removeprefix("   ") for line in code.splitlines()), names)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(names["SoftmaxGate"](3, num_convs=3)(x), torch.ones(2, 3))


@pytest.fixture(scope="module")
def models():
    return utils.models_of("01_baseline")


@pytest.mark.parametrize("name", BLOCKS)
def test_picture_of_a_block(models, name):
    """Every operation has its box, no box touches another or leaves the figure, and the nonlinear ones are orange."""
    block = BLOCKS[name]
    figure = models.draw_block(**block, chain="chain" in name, title="a title")
    figure.draw_without_rendering()
    [axes] = figure.axes
    assert axes.get_title() == "a title"
    texts = [text for text in axes.texts if text.get_text()]
    expected = ["input $x$", *itertools.chain(*block["branches"]), "sum", *block.get("after", []), "output"]
    if "gate" in block:
        expected += ["channel means", block["gate"], *(f"× $a_{k}$" for k, _ in enumerate(block["branches"], 1))]
    if "skip" in block:
        expected.append(block["skip"])
    assert sorted(text.get_text() for text in texts) == sorted(expected)
    boxes = [text.get_bbox_patch().get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max)
        assert not [other for other in boxes[:i] if Bbox.intersection(box, other)]
    orange = {text.get_text() for text in texts if is_orange(text.get_bbox_patch())}
    assert orange == {"ReLU", "sigmoid", "SE", "max pool"} & set(expected)
    assert figure.get_size_inches()[0] <= 7  # then 10 points are 8 pixels on a telephone


def is_orange(patch: FancyBboxPatch) -> bool:
    return patch.get_facecolor()[:3] == pytest.approx(ORANGE, abs=0.01)


def test_blocks_are_drawn_side_by_side(models):
    figure, grid = models.image_grid(1, 2, side=5)
    for axes, block in zip(grid.flat, BLOCKS.values(), strict=False):
        assert models.draw_block(**block, axes=axes) is figure
    assert all(axes.texts for axes in figure.axes)
