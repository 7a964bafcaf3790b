"""Reading reference checkpoints: a paper's file holds a table of names, these functions apply it.

A table maps our modules, their numbers left out (`stages/blocks/norm1`), to theirs, with places for the numbers
(`layers.{stage}.blocks.{block}.norm1`). Where one parameter has a name of its own, its whole path may stand in the
table instead (`stages/blocks/layer_scale`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from jaxlayers.core.types import Params

_NUMBERED = re.compile(r"(?<![^/])([a-z_]+?)s_(\d+)(?![^/])")
_WEIGHTS = ("kernel", "scale", "embedding")


def unnumbered(path: str) -> str:
    """Return a path with the numbers of its parts left out: `stages_0/blocks_1/norm` as `stages/blocks/norm`."""
    return _NUMBERED.sub(r"\1s", path)


def reference_name(path: str, table: Mapping[str, str]) -> str:
    """Return the name that a reference gives to the parameter at `path`.

    Args:
      path: our path, such as `stages_0/blocks_1/norm1/scale`.
      table: see the module's docstring. Places: `{stage}` and `{block}`, or the singular of any other numbered part,
        count as ours do; `{before}` = stage - 1, `{even}` = 2 stage, `{odd}` = 2 stage + 1.

    Returns:
      Their name; a module's `kernel`, `scale` or `embedding` is called `weight`.

    Raises:
      ValueError: if the table has neither the parameter nor its module.

    Example:
      >>> from jaxlayers.core.reference import reference_name
      >>> reference_name("stages_1/blocks_2/norm/scale", {"stages/blocks/norm": "features.{odd}.{block}.norm"})
      'features.3.2.norm.weight'
    """
    numbers = {part: int(number) for part, number in _NUMBERED.findall(path)}
    stage = numbers.get("stage", 0)
    numbers = {"before": stage - 1, "even": 2 * stage, "odd": 2 * stage + 1, **numbers}
    plain = unnumbered(path)
    module, _, leaf = plain.rpartition("/")
    if plain in table:
        return table[plain].format(**numbers)
    if module not in table:
        raise ValueError(
            f"the reference has no counterpart of {path}; set the model's fields as the reference has them"
        )
    return f"{table[module].format(**numbers)}.{'weight' if leaf in _WEIGHTS else leaf}"


def choose_table(
    names: Mapping[str, Mapping[str, str]], source: str, tensors: Mapping[str, Any], kernel: str
) -> tuple[Mapping[str, str], int]:
    """Return the table of a source, and the number of input channels of a checkpoint.

    Args:
      names: a table for each source.
      source: one of them.
      tensors: arrays by the reference's names.
      kernel: our path of the kernel that images meet first.

    Raises:
      ValueError: if the source is unknown, or the checkpoint has no such kernel.
    """
    if source not in names:
        raise ValueError(f"source={source!r} must be one of {sorted(names)}; pass one of them")
    name = reference_name(kernel, names[source])
    if name not in tensors:
        raise ValueError(f"a checkpoint of source={source!r} must hold {name!r}; pass the source it comes from")
    return names[source], np.shape(tensors[name])[1]


def split_fused(
    tensors: Mapping[str, Any], fused: str = "qkv", parts: Sequence[str] = ("query", "key", "value")
) -> dict[str, Any]:
    """Return the tensors with each `<module>.<fused>.<leaf>` cut in equal rows `<module>.<part>.<leaf>`."""
    split = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith(f".{fused}"):
            for part, rows in zip(parts, np.split(np.asarray(tensor), len(parts)), strict=True):
                split[f"{module.removesuffix(fused)}{part}.{leaf}"] = rows
        else:
            split[name] = tensor
    return split


def read_variables(
    tensors: Mapping[str, Any], wanted: Mapping[str, Any], table: Mapping[str, str], *, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """Return all collections of a model with running statistics, as `read_reference` does its parameters.

    Args:
      tensors: see `read_reference`; the numbers of batches that PyTorch's norms count are left out.
      wanted: shapes by collection, as `jax.eval_shape` of `init` gives them.
      table: see `read_reference`.
      ignored: see `read_reference`.
    """
    flat = flax.traverse_util.flatten_dict(dict(wanted))
    # A norm's statistics have names beside those of its parameters, so the collections are read as one tree.
    joined = flax.traverse_util.unflatten_dict({path[1:]: leaf for path, leaf in flat.items()})
    read = read_reference(tensors, joined, table, ignored=("num_batches_tracked", *ignored))
    found = flax.traverse_util.flatten_dict(read)
    return flax.traverse_util.unflatten_dict({path: found[path[1:]] for path in flat})


def read_reference(
    tensors: Mapping[str, Any], wanted: Params, table: Mapping[str, str], *, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """Return parameters from the tensors of a PyTorch checkpoint.

    Linear kernels are transposed; convolution kernels get their output features last, and become matrices where ours
    are; other tensors lose axes of length one where ours do not have them.

    Args:
      tensors: arrays by the reference's names (a state dict, converted to NumPy).
      wanted: the parameters' shapes, as `jax.eval_shape` of `init` gives them.
      table: see the module's docstring.
      ignored: endings of names that the reference stores and we compute.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if names or shapes of the tensors are not those of the model.
    """
    flat = flax.traverse_util.flatten_dict(dict(wanted), sep="/")
    names = {path: reference_name(path, table) for path in flat}
    unknown = sorted(name for name in tensors if name not in names.values() and not name.endswith(tuple(ignored)))
    missing = sorted(name for name in names.values() if name not in tensors)
    if unknown or missing:
        raise ValueError(
            f"the checkpoint must have the model's tensors; unknown {unknown}, missing {missing}; set its fields"
        )
    found = {}
    for path, leaf in flat.items():
        value = _from_torch(np.asarray(tensors[names[path]]), leaf.shape, is_kernel=path.endswith("kernel"))
        if value.shape != leaf.shape:
            raise ValueError(
                f"{names[path]} must give {path} its shape {leaf.shape}, not {value.shape}; set the fields alike"
            )
        found[path] = jnp.asarray(value)
    return flax.traverse_util.unflatten_dict(found, sep="/")


def _from_torch(tensor: np.ndarray, shape: tuple[int, ...], *, is_kernel: bool) -> np.ndarray:
    if is_kernel:
        # [out, in, *space] to [*space, in, out].
        tensor = np.moveaxis(tensor, (1, 0), (-2, -1))
        return tensor.reshape(-1, tensor.shape[-1]) if len(shape) == 2 else tensor
    return tensor.squeeze() if tensor.squeeze().shape == shape else tensor
