"""Fixtures that several test files use, and the solutions of the exercises as further cells of their notebooks."""

import re
from collections import defaultdict
from textwrap import dedent

import pytest
import torch
from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell, IPyNbFile
from tiny import make_splits

import my_utils as utils

# What the solutions of a notebook must lead to, beyond running through.
CHECKS = {
    "01_baseline": """images = torch.randn(2, 3, 8, 8)
torch.testing.assert_close(SoftmaxGate(3, num_convs=3)(images), torch.ones(2, 3))
assert round(1.96**2 * p * (1 - p) / half_width**2) == 129_078"""
}
collect_cells = IPyNbFile.collect


def collect_cells_and_solutions(notebook):
    """Yield the cells of a notebook and, to be run after them in the same kernel, the code of its solutions."""
    yield from collect_cells(notebook)
    text = "\n".join(cell.source for cell in notebook.nb.cells if cell.cell_type == "markdown")
    text = text.partition("<summary>Solutions</summary>")[2].partition("</details>")[0]
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    assert blocks, f"{notebook.path.name} has no solutions"
    for number, code in enumerate([*map(dedent, blocks), CHECKS.get(notebook.path.stem, "")], start=1):
        details = {"cell_num": 100 + number, "cell": new_code_cell(code), "options": defaultdict(bool)}
        yield IPyNbCell.from_parent(notebook, name=f"Solution {number}", **details)


IPyNbFile.collect = collect_cells_and_solutions


@pytest.fixture(scope="session")
def synthetic_splits():
    """The built-in synthetic set, drawn once; treat it as read-only."""
    return utils.load_cifar10(synthetic=True)


@pytest.fixture(scope="session")
def splits():
    """A few hundred images, for training in seconds; treat them as read-only."""
    return make_splits(200, 100, 100)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty run store."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(utils, "TRAIN", "")  # what a test makes of it is undone
    return tmp_path / "runs"


@pytest.fixture
def root(tmp_path, monkeypatch, store):
    """A project folder, with its empty run store."""
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def seeded():
    """The same random numbers whenever the test runs; those of other tests do not move."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
