"""The optimiser of an `Optim`: schedule, clipping, which parameters are decayed, and a learning rate per depth."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import Optim

UNDECAYED = re.compile(r"(bias|scale|beta|gamma|embedding|_table|pos_embed|position|cls|token|temperature)s?$")
"""Names that are not decayed by default: what shifts, scales or looks up rather than mixes."""


def undecayed(path: str, parameter: Any) -> bool:
    """Return True for parameters of at most one axis and those named like a bias, scale, table or position."""
    return parameter.ndim <= 1 or UNDECAYED.search(path.rsplit("/", 1)[-1]) is not None


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Raises:
      ValueError: on an unknown name, or a warmup that does not end within the run.
    """
    if callable(optim.schedule):
        factor: optax.Schedule = optim.schedule(steps)
        return lambda step: optim.learning_rate * factor(step)
    if not 0 <= optim.warmup_steps < steps:
        raise ValueError(
            f"warmup_steps={optim.warmup_steps} must be at least 0 and less than steps={steps}; "
            "set optim.warmup_steps or steps"
        )
    peak, final = optim.learning_rate, optim.learning_rate * optim.final_fraction
    rest = steps - optim.warmup_steps
    after: dict[str, Callable[[], optax.Schedule]] = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=optim.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "rsqrt": lambda: _rsqrt(peak, max(optim.warmup_steps, 1)),
    }
    if optim.schedule not in after:
        names = sorted(after)
        raise ValueError(f"schedule={optim.schedule!r} must be one of {names} or a function; set optim.schedule")
    if optim.warmup_steps == 0:
        return after[optim.schedule]()
    # The first step takes 1/warmup of the peak, not zero: no step is wasted.
    warmup = optax.linear_schedule(peak / optim.warmup_steps, peak, max(optim.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after[optim.schedule]()], [optim.warmup_steps])


def _rsqrt(peak: float, timescale: int) -> optax.Schedule:
    # `join_schedules` asks for steps before the first one too, and drops what it gets.
    return lambda step: peak * (timescale / (timescale + jnp.maximum(step, 0))) ** 0.5


def build(optim: Optim, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the gradient transformation and the schedule inside it.

    Raises:
      ValueError: on a field that no optimiser can be made of.
    """
    rate = schedule(optim, steps)
    if optim.clip_norm is not None and optim.clip_norm <= 0:
        raise ValueError(f"clip_norm={optim.clip_norm} must be positive, or None for no clipping; set optim.clip_norm")
    moments = {
        "adamw": lambda: optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.epsilon),
        "lion": lambda: optax.scale_by_lion(b1=optim.b1, b2=optim.b2),
        "sgd": lambda: optax.trace(decay=optim.b1, nesterov=True),
    }
    if optim.name not in moments:
        raise ValueError(f"name={optim.name!r} must be one of {sorted(moments)}; set optim.name")
    skip = optim.no_decay or undecayed

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: not skip(path_name(path), leaf), params)

    parts = [
        *([] if optim.clip_norm is None else [optax.clip_by_global_norm(optim.clip_norm)]),
        moments[optim.name](),
        optax.add_decayed_weights(optim.weight_decay, mask=decayed),
        *([] if optim.layer_decay == 1.0 else [_layer_decay(optim)]),
        optax.scale_by_learning_rate(rate),
    ]
    return optax.chain(*parts), rate


def _layer_decay(optim: Optim) -> optax.GradientTransformation:
    """Scale the update of a parameter `n` layers before the last by `layer_decay ** n`."""
    if optim.layer_ids is None:
        raise ValueError(
            f"layer_decay={optim.layer_decay} needs the depth of each parameter; set optim.layer_ids or layer_decay=1"
        )
    layer_ids, decay = optim.layer_ids, optim.layer_decay

    def scale(updates: Any, params: Any) -> Any:
        del params
        depths = jax.tree_util.tree_map_with_path(lambda path, _: layer_ids(path_name(path)), updates)
        last = max(jax.tree.leaves(depths))
        return jax.tree.map(lambda update, depth: update * decay ** (last - depth), updates, depths)

    return optax.stateless(scale)


def path_name(path: tuple[Any, ...]) -> str:
    """Return the path of a leaf as `"stage_0/query/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
