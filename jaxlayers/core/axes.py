"""Logical names of activation axes, and the one function that applies them.

Layers say *what* an axis is; `train/mesh.py` says where it goes on the device mesh.
"""

from typing import TypeVar

import flax.linen as nn
import jax

BATCH = "batch"
HEIGHT = "height"
WIDTH = "width"
DEPTH = "depth"
WINDOWS = "windows"
TOKENS = "tokens"
NODES = "nodes"
PATTERNS = "patterns"
HEADS = "heads"
FEATURES = "features"
HIDDEN = "hidden"

NAMES = frozenset({BATCH, HEIGHT, WIDTH, DEPTH, WINDOWS, TOKENS, NODES, PATTERNS, HEADS, FEATURES, HIDDEN})

_A = TypeVar("_A", bound=jax.Array)


def constrain(x: _A, *names: str | None) -> _A:
    """Tell the partitioner which logical axes `x` has, counted from the right.

    Fewer names than axes leave the leading axes open. Without a mesh (`jax.set_mesh`) and logical rules
    (`flax.linen.logical_axis_rules`) in scope it returns `x` itself. Flax replicates silently on a misspelt name
    or a list of the wrong rank; this function refuses both.

    Args:
      x: array of any rank.
      names: one of the constants of this module, or `None` for an axis that is not split, for each trailing axis.

    Returns:
      `x` with the sharding constraint.

    Raises:
      ValueError: on an unknown name, or more names than axes.
    """
    unknown = [name for name in names if name is not None and name not in NAMES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} is unknown; use one of {sorted(NAMES)}")
    if len(names) > x.ndim:
        raise ValueError(f"{len(names)} axis names {names} need an array of at least that rank; got shape {x.shape}")
    if not nn.get_logical_axis_rules():
        return x
    leading = (None,) * (x.ndim - len(names))
    return nn.with_logical_constraint(x, (*leading, *names))
