"""Settings that must stand before JAX is imported, and fixtures that all tests share."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jaxtyping
import numpy as np
import pytest


def pytest_addoption(parser):
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite the stored parameter trees")


def pytest_ignore_collect(collection_path, config):
    # The parity suite needs PyTorch and its models; it runs only when it is asked for by name.
    asked = any("parity" in argument for argument in config.args)
    return True if collection_path.name == "parity" and not asked else None


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def untyped():
    """Switch the shape annotations off, so that a layer's own error is what a wrong input meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
