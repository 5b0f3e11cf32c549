"""A long run leaves nothing behind: no memory, no thread, no process, no figure."""

import gc
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from tiny import Tiny, each_forward, recipe

import my_utils


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def memory() -> int:
    """Return the resident memory of this process in bytes, where it is easily known."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.usefixtures("store")
def test_fifty_epochs(splits):
    settings = recipe(epochs=50, weight_averaging=0.9, augmentation=my_utils.Augmentation(crop=2, flip="random"))
    threads, seen = threading.active_count(), []

    def look(call, model, logits):
        if call in (10, 50):  # call 0 counts the operations, the others validate
            seen.append((tensors(), memory()))

    with each_forward(look, training=False):
        run = my_utils.fit(Tiny, splits, settings, run="test/long")
    assert len(run.history.seconds) == 50
    (first, before), (last, after) = seen
    assert last <= first
    assert after <= 1.05 * before
    assert threading.active_count() == threads and multiprocessing.active_children() == []
    assert plt.get_fignums() == []
