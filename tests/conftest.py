"""Settings that must stand before JAX is imported, and fixtures that all tests share."""

import ctypes
import gc
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices; and code that compiles soon rather than runs fast, where nothing is said of either. At level 0 some
# gradients of a maximum are wrong.
for flag, value in (
    ("xla_force_host_platform_device_count", "8"),
    ("xla_backend_optimization_level", "1"),
    ("xla_llvm_disable_expensive_passes", "true"),
):
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}".strip()

import jax
import jaxtyping
import numpy as np
import pytest

MEMORY = 3 * 2**30  # bytes a worker may hold


def pytest_addoption(parser):
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite the stored parameter trees")
    parser.addoption("--costs", metavar="FILE", help="append seconds of the processor and name of every test to a file")


def pytest_ignore_collect(collection_path, config):
    # The parity suite needs PyTorch and its models; it runs only when it is asked for by name.
    asked = any("parity" in argument for argument in config.args)
    return True if collection_path.name == "parity" and not asked else None


LONG = frozenset((Path(__file__).parent / "long.txt").read_text().splitlines())
# Tests of tools that train networks for their tables.
TRAINING = re.compile(
    r"tests/tools/(\w+_table|heterophily|molecules|rotated_\w+|hopfield_figures|symmetry_report)_test\.py"
)


def pytest_collection_modifyitems(items):
    """Leave to the extended suite what takes long: every test of `long.txt`, the tables of tools, and counts.

    `long.txt` has the names of tests that took more than 2 seconds of a processor when they were last measured, by
    `pytest --costs FILE`; 3 where a file would keep less than half of its tests. Of the counts of a family's variants
    the first is made by default: tracing them takes long.
    """
    for item in items:
        name = getattr(item, "originalname", "") or ""
        counts = name.startswith("test_variants_have_") and hasattr(item, "callspec")
        if item.nodeid in LONG or TRAINING.match(item.nodeid) or (counts and any(item.callspec.indices.values())):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    begin = sum(os.times()[:4])  # with the processes that a test has started and waited for
    result = yield
    costs = item.config.getoption("--costs")
    if costs:
        with open(costs, "a") as file:
            file.write(f"{sum(os.times()[:4]) - begin:.2f}\t{item.nodeid}\n")
    return result


def pytest_xdist_make_scheduler(config, log):
    """Keep a file's tests in one worker, and those of a case of the conformance suite: they share compiled programs.

    The plugin's own groups are lost without a word under pytest 9.2, which no longer reads the names it changes.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            case = test.partition("[")[2]
            return f"{file}[{case}" if file.endswith("conformance_test.py") else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def bounded_memory():
    """Let go of compiled programs when a worker has many: thousands of tests would keep them all."""
    yield
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as status:
        resident = int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > MEMORY:
        jax.clear_caches()
        gc.collect()
        # What is freed goes back to the system only when it is asked for.
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def untyped():
    """Switch the shape annotations off, so that a layer's own error is what a wrong input meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
