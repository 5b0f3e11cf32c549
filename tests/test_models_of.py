"""`models_of`: the models of one notebook, used in another."""

import nbformat
import pytest
import tiny

import my_utils as utils

PART = """class Part(nn.Module):
    def forward(self, x):
        return {factor} * x


def part(x):
    return {factor} * x
"""
NET = """parts = utils.models_of("parts")
part = parts.part


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 10, 32), nn.Flatten(){module})

    def forward(self, x):
        return {call}
"""
IMPORTS = "from torch import nn\n\n"
BY_MODULE = {"module": ", parts.Part()", "call": "super().forward(x)"}
BY_FUNCTION = {"module": "", "call": "part(super().forward(x))"}


def write(folder, name, *cells, heading="# parts") -> None:
    """Write a notebook whose model cells are `cells`, between prose and another code cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"A badge\n\n{heading}\n\nText.")])
    for text in cells:
        notebook.cells += [nbformat.v4.new_markdown_cell("prose"), nbformat.v4.new_code_cell("raise SystemExit")]
        notebook.cells.append(nbformat.v4.new_code_cell(text, metadata={"tags": ["model"]}))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.mark.parametrize("folder", ["notebooks", "."])
def test_only_the_tagged_cells_run(root, folder):
    write(root / folder, "parts", IMPORTS + PART.format(factor=2), "more = Part()(21)")
    assert utils.models_of("parts").more == 42


def test_a_missing_notebook_is_named(root):
    with pytest.raises(FileNotFoundError, match=r"parts\.ipynb is neither in .*notebooks nor in"):
        utils.models_of("parts")


@pytest.mark.parametrize("name", ["02_parts (1)", "Copy of parts", "x"])
def test_an_uploaded_notebook_is_known_by_its_heading(root, name):
    write(root, "01_others", "more = 1", heading="# 1. Parts and others")
    write(root, name, IMPORTS + PART.format(factor=2), heading="# 2. Parts: two of them")
    (root / "broken.ipynb").write_text("{")
    assert utils.models_of("02_parts").part(1) == 2
    assert utils.models_of("01_parts").more == 1
    with pytest.raises(FileNotFoundError, match=r"03_parts\.ipynb is neither in"):
        utils.models_of("03_parts")


@pytest.mark.parametrize("use", [BY_MODULE, BY_FUNCTION], ids=["module", "function"])
def test_fingerprint_sees_the_other_notebook(root, splits, use):
    found = []
    for factor in (2, 2, 3):
        write(root / "notebooks", "parts", IMPORTS + PART.format(factor=factor))
        write(root / "notebooks", "net", IMPORTS + NET.format(**use))
        net = utils.models_of("net").Net
        found.append(utils.fit(net, splits, tiny.recipe(epochs=1), run="test/net", plot=False).fingerprint)
    assert found[0] == found[1] != found[2]
