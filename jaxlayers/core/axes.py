"""Logical names of activation axes, and the one function that applies them.

Layers say *what* an axis is; `train/mesh.py` says where it goes on the device mesh.
"""

import math
from collections.abc import Sequence
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

# The axes of a map with one to three spatial axes, coarsest first.
SPACE = {1: (TOKENS,), 2: (HEIGHT, WIDTH), 3: (DEPTH, HEIGHT, WIDTH)}

_A = TypeVar("_A", bound=jax.Array)


def constrain(x: _A, *names: str | None) -> _A:
    """Tell the partitioner which logical axes `x` has, counted from the right.

    Fewer names than axes leave the leading axes open: the partitioner decides. Without a mesh (`jax.set_mesh`) and
    logical rules (`flax.linen.logical_axis_rules`) in scope it returns `x` itself. Rules are tried in their order, and
    a mesh axis splits one array axis only: where `HEADS` or `HIDDEN` has taken it, a later rule for `TOKENS` that
    names it too is passed over. Of several mesh axes that do not divide an axis, the last ones are left out, down to
    none: the maps of a pyramid halve until they no longer divide. Flax replicates silently on a misspelt name or a
    list of the wrong rank; this function refuses both.

    Args:
      x: array of any rank.
      names: one of the constants of this module, or `None` for an axis that is not split, for each trailing axis.

    Returns:
      `x` with the sharding constraint.

    Raises:
      ValueError: on an unknown name, or more names than axes.
    """
    found = split(x.shape, *names)
    if not nn.get_logical_axis_rules() or jax.sharding.get_abstract_mesh().empty:
        return x
    entries = (entry if len(entry) > 1 else next(iter(entry), None) for entry in found)
    leading = (jax.sharding.PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(names))
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*leading, *entries))


def split(shape: Sequence[int], *names: str | None) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes that `constrain` splits each named axis of an array of that shape over; `()` for none.

    Raises:
      ValueError: on an unknown name, or more names than axes.
    """
    unknown = [name for name in names if name is not None and name not in NAMES]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} is unknown; use one of {sorted(NAMES)}")
    if len(names) > len(shape):
        raise ValueError(
            f"{len(names)} axis names {names} need an array of at least that rank; got shape {tuple(shape)}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    if not nn.get_logical_axis_rules() or mesh.empty:
        return ((),) * len(names)
    spec = nn.logical_to_mesh_axes(names) or ()
    sizes = shape[len(shape) - len(names) :]
    return tuple(_dividing(entry, size, mesh) for entry, size in zip(spec, sizes, strict=True))


def _dividing(entry: str | tuple[str, ...] | None, size: int, mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Return the first of the mesh axes of one array axis, as many as divide its size."""
    mesh_axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    while mesh_axes and size % math.prod(mesh.shape[axis] for axis in mesh_axes):
        mesh_axes = mesh_axes[:-1]
    return mesh_axes


def constrain_last(x: _A, *names: str | None) -> _A:
    """Do as `constrain` with the last of the names, as many as `x` has axes: without a batch, its name is dropped."""
    return constrain(x, *_last(x.ndim, names))


def _last(ndim: int, names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return names[-min(ndim, len(names)) :]


def constrain_map(x: _A, rank: int = 2) -> _A:
    """Constrain a map `[*batch, *space, features]` with `rank` spatial axes."""
    return constrain_last(x, BATCH, *SPACE[rank], FEATURES)


def split_map(shape: Sequence[int], rank: int = 2) -> tuple[tuple[str, ...], ...]:
    """Return the mesh axes that `constrain_map` splits each spatial axis over, see `split`."""
    return split(shape, *_last(len(shape), (BATCH, *SPACE[rank], FEATURES)))[-1 - rank : -1]


def constrain_tokens(x: _A, *groups: str) -> _A:
    """Constrain tokens `[*batch, *groups, tokens, features]`; those of one group stay together."""
    return constrain_last(x, BATCH, *groups, None if groups else TOKENS, FEATURES)


def constrain_heads(x: _A, *groups: str) -> _A:
    """Constrain what each head sees, `[*batch, *groups, heads, tokens, dim]`, such as windows for groups."""
    return constrain_last(x, BATCH, *groups, HEADS, None, None)
