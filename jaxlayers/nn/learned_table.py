"""Parameters whose shape follows from the size of a window or an image."""

import flax.linen as nn
from jaxtyping import Array

from jaxlayers.core.types import Dtype, Initializer


def learned_table(
    module: nn.Module, name: str, initializer: Initializer, shape: tuple[int, ...], dtype: Dtype, *, size: str
) -> Array:
    """Return a parameter of `module`, and where the one it is given was made for another size say what fits it.

    Args:
      module: the module, in `setup` or a compact method.
      name: name of the parameter.
      initializer: makes it.
      shape: its shape.
      dtype: its dtype.
      size: what the shape follows from, with its value, such as `"window_size=(7, 7)"`.

    Raises:
      ValueError: if the module is given a parameter of another shape.
    """
    stored: Array | None = module.get_variable("params", name)
    if stored is not None and stored.shape != shape:
        raise ValueError(
            f"{size} wants {name} of shape {shape}, but the parameters have {stored.shape}; fit them by the model's "
            f"resize, or set {size.partition('=')[0]} to theirs"
        )
    return module.param(name, initializer, shape, dtype)
