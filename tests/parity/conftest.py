"""The reference packages; a parity test is skipped where one of them is not installed."""

import importlib.util

import pytest

from tools import bench_worker


@pytest.fixture(scope="session", autouse=True)
def torchvision():
    """Import torchvision, which timm needs."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    return bench_worker.torchvision()


@pytest.fixture(autouse=True)
def seeded(torchvision):
    """Make PyTorch draw the same weights in every run."""
    importlib.import_module("torch").manual_seed(0)


@pytest.fixture(scope="session")
def timm(torchvision):
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers")
