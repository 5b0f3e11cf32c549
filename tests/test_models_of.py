"""`models_of`: the models of one notebook, used in another."""

import nbformat
import pytest

import my_utils as utils

PARTS = "from torch import nn\n\ndef part(x):\n    return {factor} * x\n"


def write(path, heading, *cells) -> None:
    """Write a notebook whose model cells are `cells`, each after a cell that must not run."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {heading}")])
    for text in cells:
        model = nbformat.v4.new_code_cell(text, metadata={"tags": ["model"]})
        notebook.cells += [nbformat.v4.new_code_cell("raise SystemExit"), model]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


@pytest.mark.parametrize("path", ["notebooks/01_parts.ipynb", "01_parts.ipynb", "Copy of 01_parts (2).ipynb"])
def test_the_tagged_cells_run_in_order_and_nothing_is_written(root, path):
    for number in range(2, 10):
        write(root / f"0{number}_others.ipynb", f"{number}. Others", "answer = 0")
    write(root / path, "1. Parts", PARTS.format(factor=2), "answer = part(21), utils.run_size()")
    files = {*root.rglob("*")}
    assert utils.models_of("01_parts").answer == (42, "smoke") and {*root.rglob("*")} == files


def test_a_missing_notebook_is_named(root):
    with pytest.raises(FileNotFoundError, match=r"01_parts\.ipynb"):
        utils.models_of("01_parts")
