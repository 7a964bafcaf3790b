"""The optimiser of an `Optim`: schedule, clipping, which parameters are decayed, and a learning rate per depth."""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

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
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "muon": lambda: _muon(optim),
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
        *([_rates(optim.rates)] if optim.rates else []),
        optax.scale_by_learning_rate(rate),
    ]
    if not optim.freeze:
        return optax.chain(*parts), rate
    kinds = {"trained": optax.chain(*parts), "frozen": optax.set_to_zero()}
    return optax.partition(kinds, lambda params: _labels(optim, params)), rate


def frozen(optim: Optim, params: Any) -> Any:
    """Return a tree of booleans: True where a pattern of `optim.freeze` matches the parameter's path.

    Raises:
      ValueError: if a pattern matches nothing, or nothing is left to train.
    """
    _check_patterns("freeze", optim.freeze, params)
    fixed = jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern in optim.freeze), params
    )
    if optim.freeze and all(jax.tree.leaves(fixed)):
        raise ValueError(f"freeze={optim.freeze} must leave something to train; set optim.freeze to fewer parameters")
    return fixed


def _labels(optim: Optim, params: Any) -> Any:
    return jax.tree.map(lambda fixed: "frozen" if fixed else "trained", frozen(optim, params))


def _check_patterns(field: str, patterns: Sequence[str], params: Any) -> None:
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, 3, 0)
            raise ValueError(f"{pattern!r} matches no parameter, for example {near}; set optim.{field}")


def _rates(rates: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiply the update of a parameter by the factor of the first pattern that its path matches."""

    def init(params: Any) -> Any:
        _check_patterns("rates", [pattern for pattern, _ in rates], params)
        return optax.EmptyState()

    def factor(path: tuple[Any, ...]) -> float:
        return next((factor for pattern, factor in rates if re.search(pattern, path_name(path))), 1.0)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * factor(path), updates), state

    return optax.GradientTransformation(init, update)


def _muon(optim: Optim) -> optax.GradientTransformation:
    """Orthogonalise the momentum of every decayed matrix but the head's; take Adam's step elsewhere.

    An orthogonal step is scaled to the root mean square of Adam's, `0.2`, so that one learning rate serves both
    (Liu et al., "Muon is Scalable for LLM Training", 2025, eq. 4).
    """
    skip = optim.no_decay or undecayed

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> str:
        name = path_name(path)
        plain = leaf.ndim < 2 or skip(name, leaf) or re.search(r"(^|/)head/", name)
        return "adam" if plain else "muon"

    def summed(leaf: Any) -> tuple[int, ...]:
        # A convolution sums over its window too; a stack of matrices, as scanned blocks have, is taken one by one.
        return tuple(range(leaf.ndim - 1)) if leaf.ndim > 3 else (leaf.ndim - 2,)

    def numbers(params: Any) -> Any:
        return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(summed(leaf), (leaf.ndim - 1,)), params)

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        sides = lambda leaf: (math.prod(leaf.shape[axis] for axis in summed(leaf)), leaf.shape[-1])  # noqa: E731
        return jax.tree.map(lambda leaf: leaf * 0.2 * max(sides(leaf)) ** 0.5, updates)

    orthogonal = optax.contrib.scale_by_muon(beta=optim.b1, eps=optim.epsilon, weight_dimension_numbers=numbers)
    kinds = {
        "muon": optax.chain(orthogonal, optax.stateless(scale)),
        "adam": optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.epsilon),
    }
    return optax.partition(kinds, lambda params: jax.tree_util.tree_map_with_path(is_matrix, params))


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
