"""Replay: in full size, each notebook finds every committed record and trains nothing but its small live examples."""

import contextlib
import functools
import json
import os
from pathlib import Path

import nbformat
import pytest
import torch

import my_utils as utils

PATHS = sorted((utils.ROOT / "notebooks").glob("*.ipynb"))
load = functools.cache(utils.load_cifar10)  # the same for all notebooks
DATA = Path(os.environ.get("CIFAR10_ROOT") or utils.ROOT / "data")


def fingerprints(folder: Path, notebook: str) -> dict[str, list[str]]:
    records = (json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("results/*.json"))
    return {r["name"]: [seed["fingerprint"] for seed in r["seeds"]] for r in records if r["notebook"] == notebook}


def train(run, model, splits, *_):
    """Stand in for training: only a live example may get here."""
    assert len(splits.train) <= 5000, f"{run.title} is in no record: {run.fingerprint}"
    run.model, run.history = model, utils.History(*([0.0] for _ in range(6)))


@pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(), reason="needs CIFAR-10")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_record_is_found(path, store, monkeypatch):
    predict = utils.predict
    monkeypatch.setenv("RUN_SIZE", "full")
    few = lambda model, split, **kind: predict(model, split[:100], **kind)[torch.arange(len(split)) % 100]  # noqa: E731
    for name, stand_in in {"train": train, "predict": few, "load_cifar10": load}.items():
        monkeypatch.setattr(utils, name, stand_in)
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    last = max(n for n, cell in enumerate(cells) if "utils.record(" in cell.source or "train_study(" in cell.source)
    notebook = {"__name__": "__main__"}
    for cell in cells[: last + 1]:
        folded = "jupyter" in cell.metadata and "model" not in cell.metadata.get("tags", [])
        with contextlib.suppress(Exception) if folded else contextlib.nullcontext():  # 100 images make poor figures
            exec(compile(cell.source, path.stem, "exec"), notebook)
    assert fingerprints(store.parent / "build", path.stem) == fingerprints(utils.ROOT / "report", path.stem) != {}
