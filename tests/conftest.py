"""Fixtures that several test files use."""

import pytest
import torch

import my_utils as utils


@pytest.fixture(scope="session")
def synthetic_splits():
    """The built-in synthetic set, drawn once; treat it as read-only."""
    return utils.load_cifar10(synthetic=True)


@pytest.fixture(scope="session")
def splits(synthetic_splits):
    """A few hundred images, for training in seconds; treat them as read-only."""
    return synthetic_splits.head(200, 100, 100)


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
