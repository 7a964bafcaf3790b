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
      shape: its shape; the size decides the first axis.
      dtype: its dtype.
      size: what the shape follows from, with its value, such as `"window_size=(7, 7)"`.

    Raises:
      ValueError: if the module is given a parameter of another length.
    """
    stored: Array | None = module.get_variable("params", name)
    # Another width is no matter of size: Flax says so.
    if stored is not None and stored.shape != shape and stored.shape[1:] == shape[1:]:
        raise ValueError(
            f"{size} wants {name} of shape {shape}, but the parameters have {stored.shape}; fit them by the model's "
            f"resize, or set {size.partition('=')[0]} to theirs"
        )
    return module.param(name, initializer, shape, dtype)
