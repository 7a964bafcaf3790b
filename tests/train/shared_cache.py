"""Compiled programs that the tests of the trainer, and the processes they start, share for the time of one test run."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@functools.cache
def directory() -> str:
    """Return the directory, which is removed at the end of the test run."""
    path = tempfile.mkdtemp(prefix="jaxlayers-compiled-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def settings() -> dict[str, str | float | int]:
    """Return JAX's settings; in upper case they are the names of its environment variables."""
    return {
        "jax_compilation_cache_dir": directory(),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


def environment() -> dict[str, str]:
    """Return the settings as environment variables."""
    return {name.upper(): str(value) for name, value in settings().items()}


@contextlib.contextmanager
def used() -> Iterator[None]:
    """Use the directory in this process; the tests of other files must not depend on it."""
    before = {name: getattr(jax.config, name) for name in settings()}
    for name, value in settings().items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
