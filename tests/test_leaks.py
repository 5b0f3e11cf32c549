"""A long training and several short ones in one kernel leave nothing behind: no memory, thread, process or file."""

import gc
import json
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from tiny import Tiny, each_forward, make_splits, recipe

import my_utils

CELL = f"""import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(my_utils.__file__).parent)!r}]
import test_leaks
print(test_leaks.train())
"""


def look() -> dict[str, int]:
    """Return what this process holds; threads are native ones, too."""
    gc.collect()
    process, things = psutil.Process(), gc.get_objects()
    return {
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in things),
        "figures": sum(issubclass(type(thing), Figure) for thing in things),
        "memory": process.memory_info().rss,
        "threads": process.num_threads(),
        "processes": len(process.children(recursive=True)),
        "files": len(process.open_files()),
    }


def train() -> str:
    """Train in this kernel, with the curves drawn after every epoch; return what it holds on the way."""
    splits = make_splits(200, 100, 100)
    changes = {"weight_averaging": 0.9, "augmentation": my_utils.Augmentation(crop=2, flip="random")}
    seen, draw = {"one": [], "many": []}, my_utils.Progress.show

    def impatient(progress, *arguments):
        progress.next_figure = 0.0  # else it would draw every few seconds
        draw(progress, *arguments)

    def measure(call, model, logits):
        if call in (3, 9):
            seen["one"].append(look())

    often = patch.multiple(my_utils.Progress, show=impatient, update=lambda *_: False)
    with often, each_forward(measure, training=False):
        run = my_utils.fit(Tiny, splits, recipe(epochs=10, **changes), run="test/long")
    for number in range(6):
        my_utils.fit(Tiny, splits, recipe(**changes), run="test/short", seed=number % 5)  # the last is loaded
        if number in (1, 5):
            seen["many"].append(look())
    return json.dumps(seen | {"epochs": len(run.history.seconds)})


@pytest.mark.usefixtures("store")
def test_training_in_one_kernel_leaves_nothing_behind():
    notebook = new_notebook(cells=[new_code_cell(CELL)])
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    found = json.loads([output.text for output in outputs if output.get("name") == "stdout"][-1].splitlines()[-1])
    assert found["epochs"] == 10 and sum("image/png" in output.get("data", {}) for output in outputs) == 7
    for before, after in (found["one"], found["many"]):
        assert after["tensors"] <= before["tensors"] and after["files"] <= before["files"]
        assert after["memory"] <= 1.05 * before["memory"]
        assert after["figures"] == after["processes"] == 0
        assert after["threads"] <= before["threads"] + 4  # in its first seconds the kernel itself starts three
