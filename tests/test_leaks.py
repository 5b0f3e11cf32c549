"""A long run in one kernel leaves nothing behind: no memory, no thread, no process, no figure."""

import gc
import json
from pathlib import Path

import psutil
import pytest
import torch
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from tiny import Tiny, each_forward, recipe

import my_utils

CELL = f"""import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(my_utils.__file__).parent)!r}]
import test_leaks
print(test_leaks.fifty_epochs())
"""


def look() -> dict[str, int]:
    """What this process holds: tensors, figures, bytes of memory, threads (native ones too), other processes."""
    gc.collect()
    process, things = psutil.Process(), gc.get_objects()
    return {
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in things),
        "figures": sum(issubclass(type(thing), Figure) for thing in things),
        "memory": process.memory_info().rss,
        "threads": process.num_threads(),
        "processes": len(process.children(recursive=True)),
    }


def fifty_epochs() -> str:
    """Train in this kernel with the curves redrawn after every epoch; return what it held after epochs 10 and 50."""
    splits = my_utils.load_cifar10(synthetic=True).head(200, 100, 100)
    settings = recipe(epochs=50, weight_averaging=0.9, augmentation=my_utils.Augmentation(crop=2, flip="random"))
    seen, pictures, draw = [], [], my_utils.show

    def show(figure, **arguments):
        pictures.append(arguments["alt"])
        return draw(figure, **arguments)

    def impatient(live, history, draw=my_utils._LivePlot.draw):
        live.next = 0  # else it would draw every few seconds
        draw(live, history)

    def measure(call, model, logits):
        if call in (10, 50):  # call 0 counts the operations, the others validate
            seen.append(look())

    my_utils.show, my_utils._LivePlot.draw = show, impatient
    with each_forward(measure, training=False):
        run = my_utils.fit(Tiny, splits, settings, run="test/long")
    return json.dumps({"epochs": len(run.history.seconds), "pictures": len(pictures), "seen": [*seen, look()]})


@pytest.mark.usefixtures("store")
def test_fifty_epochs_in_one_kernel():
    notebook = new_notebook(cells=[new_code_cell(CELL)])
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    [text] = [output.text for output in notebook.cells[0].outputs if output.get("name") == "stdout"]
    found = json.loads(text.splitlines()[-1])
    assert found["epochs"] == 50 and found["pictures"] >= 50
    before, after, left = found["seen"]
    assert after["tensors"] <= before["tensors"]
    assert max(after["memory"], left["memory"]) <= 1.05 * before["memory"]
    assert [kept["figures"] for kept in found["seen"]] == [0] * 3
    assert [kept["processes"] for kept in found["seen"]] == [0] * 3
    # In its first seconds the kernel itself starts a thread, and two for its messages; 40 epochs would leave more.
    assert max(after["threads"], left["threads"]) <= before["threads"] + 4
