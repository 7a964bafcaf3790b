"""What a run takes by its shapes alone: bytes of the state on a chip, operations, and what the backward pass keeps.

Nothing is compiled, so this works everywhere. Parameters, optimiser and batch are exact; operations are those of matrix
products and convolutions, exact; activations are an estimate.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxlayers.core import remat
from jaxlayers.summary import count_macs, summarize
from train import data, program
from train import mesh as meshes
from train import step as steps
from train.config import Config, MeshShape
from train.state import BoundModel


def count(config: Config, mesh: AbstractMesh, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Return the counts of a run, of one device unless they are called total.

    The keys: `parameters` (their number, in all); `bytes` by kind (`parameters`, `optimiser`, `averages`, `other
    state`, `batch`); `model_flops` of a step in all, recomputation not counted; `program_flops`, recomputation
    included; `activation_bytes` (see `kept`); `modules`, the share of the forward pass's operations by module.

    Args:
      config: the run.
      mesh: sizes of the axes.
      batch: shapes of a global batch.

    Raises:
      ValueError: if the batch does not divide over the mesh, or as `train.program.build`.
    """
    program.check_sizes(config, mesh)  # type: ignore[arg-type]
    whole, built = _whole(config, batch)
    with meshes.use(whole):
        ours = count_macs(built.train_step, built.abstract, dict(batch))
        residuals = kept(config, built.abstract, batch)
    parts = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "sequence"))
    leaves = jax.tree.leaves(built.abstract.params)
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves),
        "dtypes": sorted({str(leaf.dtype) for leaf in leaves}),
        "compute_dtype": str(jnp.dtype(getattr(config.model, "dtype", None) or jnp.float32)),
        "bytes": state_bytes(config, built.abstract, mesh, batch),
        "model_flops": model_flops(config, batch, ours),
        "program_flops": 2 * ours,
        "activation_bytes": residuals / parts / config.accumulate,
        "modules": modules(config, batch),
    }


def survey(
    config: Config, batch: Mapping[str, jax.ShapeDtypeStruct], sizes: Sequence[Mapping[str, int]]
) -> dict[str, Any]:
    """Return what a search ranks by: the state's bytes on each mesh, operations and activations by policy.

    `meshes` are the bytes by kind, in the order of `sizes`; `policies` has, by name, `program_flops` and
    `activation_bytes` of the whole batch over all devices, in one piece.
    """
    whole, built = _whole(config, batch)
    found = []
    for each in sizes:
        mesh = AbstractMesh(tuple(each.values()), tuple(each), axis_types=(AxisType.Auto,) * len(each))
        found.append(state_bytes(config, built.abstract, mesh, batch))
    policies: dict[str, dict[str, float]] = {}
    for name in remat.POLICIES:
        chosen = dataclasses.replace(config, remat=name, accumulate=1)
        _, variant = _whole(chosen, batch)
        with meshes.use(whole):
            operations = 2 * count_macs(variant.train_step, variant.abstract, dict(batch))
            policies[name] = {
                "program_flops": operations,
                "activation_bytes": kept(chosen, built.abstract, batch),
            }
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(built.abstract.params)),
        "meshes": found,
        "policies": policies,
        "model_flops": model_flops(config, batch),
    }


def _whole(config: Config, batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[Mesh, program.Program]:
    """Return a mesh of one device and the program on it: what a constraint splits changes no global shape."""
    mesh = meshes.build(MeshShape(data=1), jax.devices("cpu")[:1])
    return mesh, program.build(config, mesh, batch)


def state_bytes(config: Config, state: Any, mesh: AbstractMesh, batch: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of state and batch that one device of a mesh holds, by kind."""
    placed = steps.abstract(state, meshes.shardings(state, mesh, config.mesh.rules))  # type: ignore[arg-type]
    rows = steps.abstract(dict(batch), meshes.batch_shardings(batch, mesh))  # type: ignore[arg-type]
    return {
        "parameters": meshes.bytes_per_device(placed.params),
        "optimiser": meshes.bytes_per_device(placed.opt_state),
        "averages": meshes.bytes_per_device(placed.ema),
        "other state": meshes.bytes_per_device((placed.collections, placed.rng, placed.step)),
        "batch": meshes.bytes_per_device(rows),
    }


def model_flops(config: Config, batch: Mapping[str, Any], known_macs: int | None = None) -> int:
    """Return the operations of a step without any recomputation, over all devices."""
    plain = dataclasses.replace(
        config, model=without_recomputation(config.model), remat="none", kernels="jnp", accumulate=1
    )
    if known_macs is not None and plain == config:
        return 2 * known_macs
    whole, built = _whole(plain, batch)
    with meshes.use(whole):
        return 2 * count_macs(built.train_step, built.abstract, dict(batch))


def kept(config: Config, state: Any, batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Return the bytes that the backward pass of the whole batch needs of the forward pass, over all devices.

    They are the residuals of JAX's linearisation under the config's recomputation policy. A compiler keeps less where
    it recomputes cheap operations or keeps half-precision copies, and more where it pads. Of a game it is the player
    that keeps most.
    """
    model, recompute = remat.of_model(config.model, config.remat)
    fields = {name: leaf for name, leaf in batch.items() if name != data.CORRUPT}
    key = jax.eval_shape(lambda: jax.random.key(0))
    if config.batch_transform is not None:
        fields = dict(jax.eval_shape(config.batch_transform, fields, key))
    losses = config.task.loss
    players = losses if isinstance(losses, Mapping) else {"": losses}
    most = 0
    collections = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.collections)
    for name, loss in players.items():
        own = state.params[name] if name else state.params

        def pullback(own: Any, params: Any, fields: Any, key: Any, name: str = name, loss: Any = loss) -> Any:
            def objective(own: Any) -> Any:
                trained = {**params, name: own} if name else own
                apply = BoundModel(model, trained, collections, key, recompute)
                values, means = loss(apply, fields, key)
                return jnp.mean(values), (means, apply.collections)

            return jax.vjp(objective, own, has_aux=True)[1]

        traced = jax.make_jaxpr(pullback)(own, state.params, fields, key).jaxpr
        given = set(traced.invars) | set(traced.constvars)
        found = {var for var in traced.outvars if isinstance(var, Var) and var not in given}
        most = max(most, sum(_bytes(var.aval) for var in found))
    return most


def _bytes(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ())) * getattr(getattr(aval, "dtype", None), "itemsize", 0)


def without_recomputation(model: nn.Module) -> nn.Module:
    """Return the model with every field `remat`, its own or a part's, set to "none"."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name, None)
        if field.name == "remat":
            changed["remat"] = "none"
        elif field.name != "parent" and isinstance(value, nn.Module):
            changed[field.name] = without_recomputation(value)
    return model.clone(**changed) if changed else model


def modules(config: Config, batch: Mapping[str, jax.ShapeDtypeStruct], depth: int = 2) -> dict[str, float]:
    """Return the share of the forward pass's operations of each module down to a depth.

    A module's own share is what its parts at that depth do not have. Empty where the model takes arrays as keywords.
    """
    fields = {name: leaf for name, leaf in batch.items() if name != data.CORRUPT}
    inputs, keywords = jax.eval_shape(lambda rows: (config.task.inputs(rows), config.task.keywords(rows)), fields)
    if jax.tree.leaves(keywords):
        return {}
    found = summarize(config.model, *inputs)
    if not found.macs:
        return {}
    shares: dict[str, float] = {}
    for row in found.rows:
        if len(row.path) > depth:
            continue
        inner = [other for other in found.rows if len(other.path) == len(row.path) + 1 <= depth]
        rest = row.macs - sum(other.macs for other in inner if other.path[: len(row.path)] == row.path)
        if rest > 0:
            shares["/".join(row.path) or "(model)"] = rest / found.macs
    return shares
