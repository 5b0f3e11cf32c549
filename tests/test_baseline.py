"""Notebook 01: the picture of a block."""

import itertools

import pytest
from matplotlib.transforms import Bbox

import my_utils as utils

BLOCKS = {
    "parallel": {"branches": [["3×3 conv"]] * 3, "gate": "$a = W m + b$", "after": ["ReLU", "max pool"]},
    "paths": {"branches": [["3×3 conv", "BatchNorm", "ReLU", "SE"]] * 4, "gate": "FC", "skip": "1×1 conv"},
    "chain": {"branches": [["3×3 conv", "ReLU", "BatchNorm"]] * 3, "gate": "2 FC, softmax", "skip": "1×1 conv"},
    "chain without a gate": {"branches": [["3×3 conv", "BatchNorm", "sigmoid"]] * 3},
    "one": {"branches": [["3×3 conv"]]},
}


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
    colours = {text.get_text(): text.get_bbox_patch().get_facecolor() for text in texts}
    orange = {name for name, (red, _, blue, _) in colours.items() if red > blue + 0.3}
    assert orange == {"ReLU", "sigmoid", "SE", "max pool"} & set(expected)
    assert figure.get_size_inches()[0] <= 7  # then 10 points are 8 pixels on a telephone
