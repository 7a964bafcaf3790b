"""The contract of feature pyramids: what every hierarchical model's `features` returns."""

import dataclasses
import functools
from typing import Any

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["stride"])
@dataclasses.dataclass(frozen=True)
class Level:
    """One level of a feature pyramid; a pyramid is a tuple of levels, finest first.

    It is a pytree whose only leaf is the array, so that it passes through `jit`, `vmap` and `grad`.

    Attributes:
      array: features, channels last: `[*batch, *space, channels]`.
      stride: input pixels to one entry, along each spatial axis. An input whose size is not a multiple of the
        stride is padded at its end, so the size is `ceil(input / stride)`.
    """

    # Transformations put shapes, specs or None in an array's place.
    array: Any
    stride: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of features, the length of the last axis."""
        return self.array.shape[-1]
