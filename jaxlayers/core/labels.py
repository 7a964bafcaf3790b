"""Label trees of backbones: which parameters do not decay, and how deep each lies."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util
import numpy as np

from jaxlayers.core.types import Params


def label(params: Params, name: Callable[[tuple[str, ...], Any], Any]) -> dict[str, Any]:
    """Return a tree like `params` that holds `name(path, leaf)`, with the path as a tuple of names."""
    flat = flax.traverse_util.flatten_dict(dict(params))
    return flax.traverse_util.unflatten_dict({path: name(path, leaf) for path, leaf in flat.items()})


def no_decay(params: Params) -> dict[str, Any]:
    """Return a tree of booleans, true for parameters without weight decay: all but the kernels.

    Biases, norms, tables of positions, class tokens and scales do not decay.

    Args:
      params: parameters of any model of the library.

    Returns:
      Booleans.
    """
    return label(params, lambda path, leaf: path[-1] != "kernel")


def pyramid_layer_ids(params: Params, depths: Sequence[int]) -> dict[str, Any]:
    """Return a tree of the layer that each parameter of a pyramid belongs to, for layer-wise learning rates.

    The patch embedding is layer 0, block k of the whole model layer k + 1, what leads from a stage to the next belongs
    to the block before it, and final norm and head are layer `sum(depths) + 1`: with decay r the rate is scaled by r
    to the power of `sum(depths) + 1 - id`.

    Args:
      params: parameters named `patch_embed`, `stages_<i>/blocks_<k>/...`, `stages_<i>/...`, or otherwise for the end;
        or `stages_<i>/pairs/<regular or shifted>/...` for two blocks a row of a stacked parameter.
      depths: number of blocks of each stage.

    Returns:
      Integers; for stacked parameters an integer array that broadcasts against them.
    """

    def layer(path: tuple[str, ...], leaf: Any) -> int | np.ndarray:
        if path[0] == "patch_embed":
            return 0
        if not path[0].startswith("stages_"):
            return sum(depths) + 1
        before = sum(depths[: int(path[0].removeprefix("stages_"))])
        if path[1] == "pairs":
            ids = before + 1 + 2 * np.arange(leaf.shape[0]) + (path[2] == "shifted")
            return ids.reshape(-1, *(1,) * (leaf.ndim - 1))
        return before + 1 + int(path[1].removeprefix("blocks_")) if path[1].startswith("blocks_") else before

    return label(params, layer)
