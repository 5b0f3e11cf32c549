"""Fixtures that several test files use."""

import pytest

import my_utils as utils


@pytest.fixture(scope="session")
def synthetic_splits():
    """The built-in synthetic set, drawn once; treat it as read-only."""
    return utils.load_cifar10(synthetic=True)
