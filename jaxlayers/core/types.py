"""Type names that the whole library shares."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.typing import Dtype, Initializer, PrecisionLike

Array = jax.Array
PRNGKey = jax.Array
Shape = tuple[int, ...]
PyTree = Any
Params = Mapping[str, Any]
ActivationFn = Callable[[jax.Array], jax.Array]
ModuleFactory = Callable[..., Any]

__all__ = [
    "ActivationFn",
    "Array",
    "Dtype",
    "Initializer",
    "ModuleFactory",
    "PRNGKey",
    "Params",
    "PrecisionLike",
    "PyTree",
    "Shape",
]
