"""Dense associative memories: binary states with steep interactions, and the continuous networks of two layers.

Patterns are rows, `[patterns, neurons]`; a binary state is a row of +-1 in a floating dtype. No parameters are learned
here, so everything is a function.

Source:
  Krotov and Hopfield, "Dense Associative Memory for Pattern Recognition", NeurIPS 2016. Demircigil et al., "On a Model
  of Associative Memory with Huge Storage Capacity", J. Stat. Phys. 2017. Krotov and Hopfield, "Large Associative Memory
  Problem in Neurobiology and Machine Learning", ICLR 2021.

Differs:
  Energies are compared after a scaling that all terms share, so that no power or exponential overflows; a tie keeps the
  neuron as it is. The duality with feed-forward classifiers of the first paper is left out.
"""

import functools
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxlayers.core import safe
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.hopfield.binary_hopfield import Settled, settle

Lagrangian = Callable[[Array], Array]

_HIGHEST = jax.lax.Precision.HIGHEST


class Interaction(NamedTuple):
    """The function F of the energy -sum_mu F(xi^mu . sigma).

    Attributes:
      function: F, element by element.
      contrast: called as `contrast(plus, minus)` with overlaps `[*batch, patterns]`; returns something `[*batch]` of
        the sign of sum_mu F(plus_mu) - F(minus_mu) that neither overflows nor vanishes.
      log_function: log F, -inf where F is zero; `None` if F may be negative.
    """

    function: Callable[[Array], Array]
    contrast: Callable[[Array, Array], Array]
    log_function: Callable[[Array], Array] | None


@functools.cache
def polynomial(degree: int) -> Interaction:
    """Return F(x) = x^n (Krotov and Hopfield, 2016); n = 2 is the binary Hopfield network.

    Raises:
      ValueError: if the degree is below 2.
    """
    _check_degree(degree)

    def function(x: Array) -> Array:
        return x**degree

    def log_function(x: Array) -> Array:
        return degree * jnp.log(jnp.abs(x))

    return Interaction(function, _of_scaled(function), None if degree % 2 else log_function)


@functools.cache
def rectified_polynomial(degree: int) -> Interaction:
    """Return F(x) = max(x, 0)^n (Krotov and Hopfield, 2016), to which mirror images of patterns are no memories.

    Raises:
      ValueError: if the degree is below 2.
    """
    _check_degree(degree)

    def function(x: Array) -> Array:
        return jnp.maximum(x, 0.0) ** degree

    def log_function(x: Array) -> Array:
        return degree * jnp.log(jnp.maximum(x, 0.0))

    return Interaction(function, _of_scaled(function), log_function)


@functools.cache
def exponential(beta: float = 1.0) -> Interaction:
    """Return F(x) = exp(beta x) (Demircigil et al., 2017, with beta = 1).

    Raises:
      ValueError: if beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive; set beta")

    def contrast(plus: Array, minus: Array) -> Array:
        top = jnp.max(jnp.maximum(plus, minus), axis=-1, keepdims=True, initial=-jnp.inf)
        return _sum_or_tie(jnp.exp(beta * (plus - top)) - jnp.exp(beta * (minus - top)))

    return Interaction(lambda x: jnp.exp(beta * x), contrast, lambda x: beta * x)


def energy(
    state: Float[Array, "*batch neurons"],
    patterns: Float[Array, "patterns neurons"],
    interaction: Interaction,
) -> Float[Array, "*batch"]:
    """Return E = -sum_mu F(xi^mu . sigma) of every state; steep interactions overflow float32, see `log_energy`.

    Args:
      state: states sigma of +-1.
      patterns: stored patterns xi^mu; no row gives E = 0.
      interaction: F.

    Returns:
      The energy, float32 or better.

    Raises:
      ValueError: if the widths differ.
    """
    state, patterns = _promote(state, patterns)
    return -jnp.sum(interaction.function(_products(state, patterns)), axis=-1)


def log_energy(
    state: Float[Array, "*batch neurons"],
    patterns: Float[Array, "patterns neurons"],
    interaction: Interaction,
) -> Float[Array, "*batch"]:
    """Return -log(-E) = -log sum_mu F(xi^mu . sigma), which falls where the energy E falls and does not overflow.

    Arguments as `energy`.

    Raises:
      ValueError: if the widths differ, or F may be negative, as x^3.
    """
    if interaction.log_function is None:
        raise ValueError("interaction has negative values, whose sum may have no logarithm; use energy")
    state, patterns = _promote(state, patterns)
    terms = interaction.log_function(_products(state, patterns))
    return -jax.nn.logsumexp(terms, axis=-1) if terms.shape[-1] else jnp.full(state.shape[:-1], jnp.inf, terms.dtype)


def update_synchronously(
    state: Float[Array, "*batch neurons"],
    patterns: Float[Array, "patterns neurons"],
    interaction: Interaction,
) -> Float[Array, "*batch neurons"]:
    """Return all neurons updated at once: sigma_i <- sign(E(sigma_i = -1) - E(sigma_i = +1)).

    The difference of energies is sum_mu F(xi_i + sum_(j != i) xi_j sigma_j) - F(-xi_i + sum_(j != i) xi_j sigma_j);
    one of zero, to within rounding, leaves the neuron as it is. This may raise the energy and alternate between two
    states. Arguments as `energy`.
    """
    spins, patterns = _promote(state, patterns)
    products = _products(spins, patterns)

    def one(i: Array) -> Array:
        return _decide(spins[..., i], products, patterns[:, i], interaction)[0]

    new = jax.lax.map(one, jnp.arange(spins.shape[-1]))
    return jnp.moveaxis(new, 0, -1).astype(state.dtype)


def update_asynchronously(
    state: Float[Array, "*batch neurons"],
    patterns: Float[Array, "patterns neurons"],
    interaction: Interaction,
    *,
    order: Int[Array, " updates"] | None = None,
) -> Float[Array, "*batch neurons"]:
    """Return the state after each neuron in turn took the value of lower energy; never raises the energy.

    One sweep costs O(patterns * neurons) for each state, since the overlaps are kept up to date. They are whole numbers
    and exact in float32.

    Args:
      state: states of +-1.
      patterns: stored patterns.
      interaction: F.
      order: the neurons to update, in this order, the same for all states. `None` = each once, first to last.

    Returns:
      States of +-1 in the dtype of `state`.

    Raises:
      ValueError: if the widths differ.
    """
    spins, patterns = _promote(state, patterns)
    order = jnp.arange(spins.shape[-1]) if order is None else order

    def visit(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        spins, products = carry
        i = order[step]
        own, products = _decide(spins[..., i], products, patterns[:, i], interaction)
        return spins.at[..., i].set(own), products

    spins, _ = jax.lax.fori_loop(0, order.shape[0], visit, (spins, _products(spins, patterns)))
    return spins.astype(state.dtype)


def retrieve(
    state: Float[Array, "*batch neurons"],
    patterns: Float[Array, "patterns neurons"],
    interaction: Interaction,
    *,
    key: PRNGKeyArray | None = None,
    synchronous: bool = False,
    max_steps: int = 100,
) -> Settled:
    """Update states until they no longer change.

    Args:
      state: states of +-1, such as stored patterns with some neurons turned.
      patterns: stored patterns. Without any, every state stays.
      interaction: F.
      key: asynchronous sweeps in a new random order each, the same for all states. `None` = first to last neuron.
      synchronous: update all neurons at once, which may end in a cycle of two states.
      max_steps: updates (sweeps) allowed.

    Returns:
      States, numbers of sweeps and periods, see `Settled`.

    Raises:
      ValueError: if the widths differ, `max_steps` is below 1, or a key is given to synchronous updates.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield.dense_associative_memory import exponential, retrieve
      >>> patterns = jax.random.rademacher(jax.random.key(0), (200, 40), jnp.float32)  # five times its neurons
      >>> found = retrieve(patterns.at[:, :6].multiply(-1), patterns, exponential())
      >>> bool(jnp.all(found.state == patterns))
      True
    """
    if synchronous and key is not None:
        raise ValueError("key orders asynchronous updates, and synchronous=True has no order; pass key=None")
    _promote(state, patterns)

    def update(states: Array, step: Array) -> Array:
        if synchronous:
            return update_synchronously(states, patterns, interaction)
        order = None if key is None else jax.random.permutation(jax.random.fold_in(key, step), state.shape[-1])
        return update_asynchronously(states, patterns, interaction, order=order)

    return settle(update, state, max_steps=max_steps)


# Capacity. ------------------------------------------------------------------------------------------------------------


def error_probability(neurons: int, patterns: float | int, degree: int) -> float:
    """Return how likely a neuron of a stored pattern is unstable with F = x^n, for large N and random patterns.

    P = 1/2 erfc(sqrt(N^(n-1) / (2 K (2n-3)!!))): a signal of 2 n N^(n-1) against noise of variance
    4 n^2 (2n-3)!! K N^(n-1) from the K other patterns, in the first update.

    Raises:
      ValueError: if an argument is out of range.
    """
    if patterns < 1:
        raise ValueError(f"patterns={patterns} must be at least 1; set patterns")
    noise = 2 * patterns * _double_factorial(neurons, degree)
    return 0.5 * math.erfc(math.sqrt(neurons ** (degree - 1) / noise))


def polynomial_capacity(neurons: int, degree: int, *, error: float = 0.005) -> float:
    """Return K = alpha_n N^(n-1), at which a neuron of a stored pattern is unstable with probability `error`.

    alpha_n = 1 / (z^2 (2n-3)!!) with P(normal > z) = `error`. For n = 2 and 0.5 % this is 0.151 N, the load that the
    first update bears; the errors which it leaves cause others, and the fixed point bears 0.138 N (`critical_load` of
    the binary network).

    Args:
      neurons: N.
      degree: n.
      error: probability tolerated, above 0 and below 0.5.

    Returns:
      The number of patterns.

    Raises:
      ValueError: if an argument is out of range.
    """
    if not 0 < error < 0.5:
        raise ValueError(f"error={error} must lie between 0 and 0.5; set error")
    z = statistics.NormalDist().inv_cdf(1 - error)
    return neurons ** (degree - 1) / (z**2 * _double_factorial(neurons, degree))


def errorless_capacity(neurons: int, degree: int, *, all_patterns: bool = False) -> float:
    """Return K = N^(n-1) / (2 (2n-3)!! ln N), below which a stored pattern is fixed in all neurons, for large N.

    Args:
      neurons: N, at least 2.
      degree: n.
      all_patterns: not one pattern but all of them, which there are N^(n-1) of: this takes n times fewer.

    Returns:
      The number of patterns.

    Raises:
      ValueError: if an argument is out of range.
    """
    if neurons < 2:
        raise ValueError(f"neurons={neurons} must be at least 2; set neurons")
    one = neurons ** (degree - 1) / (2 * _double_factorial(neurons, degree) * math.log(neurons))
    return one / degree if all_patterns else one


def exponential_capacity(neurons: int, *, fraction: float = 0.0) -> float:
    """Return exp(N I(1 - 2 rho) / 2), the patterns that F = exp holds while a part rho of the neurons is turned.

    I(x) = ((1 + x) ln(1 + x) + (1 - x) ln(1 - x)) / 2, so 2^(N/2) for rho = 0. With fewer, by a factor exponential in
    N, one update of all neurons restores a random pattern with a probability that goes to 1.

    Args:
      neurons: N.
      fraction: rho, at least 0 and below 0.5.

    Returns:
      The number of patterns.

    Raises:
      ValueError: if an argument is out of range.
    """
    if neurons < 1 or not 0 <= fraction < 0.5:
        raise ValueError(
            f"neurons={neurons} and fraction={fraction} must be at least 1 and in [0, 0.5); set the one that is not"
        )
    terms = [one * math.log(one) for one in (2 - 2 * fraction, 2 * fraction) if one > 0]
    return math.exp(neurons * sum(terms) / 4)


# Two layers. ----------------------------------------------------------------------------------------------------------


def quadratic(x: Float[Array, "*batch neurons"]) -> Float[Array, "*batch"]:
    """Return L = 1/2 sum_i x_i^2, whose neurons put out their state; the feature layer of model B."""
    return 0.5 * jnp.sum(jnp.square(x), axis=-1)


def absolute(x: Float[Array, "*batch neurons"]) -> Float[Array, "*batch"]:
    """Return L = sum_i |x_i|, whose neurons put out their sign; the feature layer of model A."""
    return jnp.sum(jnp.abs(x), axis=-1)


def spherical(x: Float[Array, "*batch neurons"]) -> Float[Array, "*batch"]:
    """Return L = |x|, whose neurons put out the direction x / |x|; the feature layer of model C."""
    return safe.safe_norm(x)


@functools.cache
def log_sum_exp(beta: float = 1.0) -> Lagrangian:
    """Return L = ln(sum_mu exp(beta x_mu)) / beta, whose neurons put out softmax(beta x); the memories of model B.

    Raises:
      ValueError: if beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive; set beta")
    return lambda x: jax.nn.logsumexp(beta * x, axis=-1) / beta


@functools.cache
def additive(interaction: Interaction) -> Lagrangian:
    """Return L = sum_mu F(x_mu), whose neurons put out F'(x); the memories of models A and C."""
    return lambda x: jnp.sum(interaction.function(x), axis=-1)


def outputs(lagrangian: Lagrangian, x: Float[Array, "*batch neurons"]) -> Float[Array, "*batch neurons"]:
    """Return dL/dx, what neurons in state x put out."""
    return jax.grad(lambda x: jnp.sum(lagrangian(x)))(x)


def two_layer_energy(
    features: Float[Array, "*batch neurons"],
    memories: Float[Array, "*batch patterns"],
    patterns: Float[Array, "patterns neurons"],
    *,
    feature_lagrangian: Lagrangian,
    memory_lagrangian: Lagrangian,
    inputs: Float[Array, "*#batch neurons"] | None = None,
) -> Float[Array, "*batch"]:
    """Return E = (v - I) . g - L_v + h . f - L_h - f^T xi g, with g = dL_v/dv and f = dL_h/dh.

    Args:
      features: states v of the feature neurons.
      memories: states h of the memory neurons, one for each pattern.
      patterns: xi, the weights between the layers.
      feature_lagrangian: L_v, which maps `[*batch, neurons]` to `[*batch]`; convex, or the energy may rise.
      memory_lagrangian: L_h, the same.
      inputs: the constant input currents I. `None` = 0.

    Returns:
      The energy, float32 or better.

    Raises:
      ValueError: if the widths differ.
    """
    v, patterns = _promote(features, patterns)
    if memories.shape[-1] != patterns.shape[0]:
        raise ValueError(
            f"memories have {memories.shape[-1]} neurons and must have one for each of {patterns.shape[0]} patterns; "
            "pass memories of that width"
        )
    h = memories.astype(v.dtype)
    g, f = outputs(feature_lagrangian, v), outputs(memory_lagrangian, h)
    driven = v if inputs is None else v - inputs
    visible = jnp.sum(driven * g, axis=-1) - feature_lagrangian(v)
    hidden = jnp.sum(h * f, axis=-1) - memory_lagrangian(h)
    return visible + hidden - jnp.sum(f * _products(g, patterns), axis=-1)


class Trajectory(NamedTuple):
    """What `two_layer_trajectory` returns.

    Attributes:
      features: v at the end, `[*batch, neurons]`.
      memories: h at the end, `[*batch, patterns]`.
      energies: the energy at the start and after every step, `[steps + 1, *batch]`.
    """

    features: Array
    memories: Array
    energies: Array


def two_layer_trajectory(
    features: Float[Array, "*batch neurons"],
    patterns: Float[Array, "patterns neurons"],
    *,
    feature_lagrangian: Lagrangian,
    memory_lagrangian: Lagrangian,
    steps: int,
    step_size: float,
    feature_time: float = 1.0,
    memory_time: float = 0.0,
    inputs: Float[Array, "*#batch neurons"] | None = None,
    memories: Float[Array, "*batch patterns"] | None = None,
) -> Trajectory:
    """Follow tau_v dv/dt = xi^T f(h) - v + I and tau_h dh/dt = xi g(v) - h in small steps (Euler's).

    The energy falls along the differential equation whenever both Lagrangians are convex; along the steps, if these are
    small. With `log_sum_exp(beta)`, `quadratic` and memory neurons that follow at once, one step of size `feature_time`
    is the update of a modern Hopfield network, v <- xi^T softmax(beta xi v).

    Args:
      features: v at the start.
      patterns: xi.
      feature_lagrangian: L_v, with g = dL_v/dv.
      memory_lagrangian: L_h, with f = dL_h/dh.
      steps: number of steps, at least 1.
      step_size: of time, positive.
      feature_time: tau_v, positive.
      memory_time: tau_h; 0 = the memory neurons follow at once, h = xi g(v).
      inputs: I. `None` = 0.
      memories: h at the start. `None` = xi g(v).

    Returns:
      Both layers at the end and the energies on the way.

    Raises:
      ValueError: if the widths differ or an argument is out of range.
    """
    if steps < 1 or not step_size > 0 or not feature_time > 0 or memory_time < 0:
        raise ValueError(
            f"steps={steps}, step_size={step_size}, feature_time={feature_time} and memory_time={memory_time} must be "
            "at least 1, positive, positive and at least 0; set the one that is not"
        )
    if memories is not None and memory_time == 0:
        raise ValueError("memories need memory_time above 0, since at 0 they follow from the features; set memory_time")
    v, patterns = _promote(features, patterns)
    energy_of = functools.partial(
        two_layer_energy,
        patterns=patterns,
        feature_lagrangian=feature_lagrangian,
        memory_lagrangian=memory_lagrangian,
        inputs=inputs,
    )

    def driven(v: Array) -> Array:
        return _products(outputs(feature_lagrangian, v), patterns)

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        v, h = carry
        current = jnp.matmul(outputs(memory_lagrangian, h), patterns, precision=_HIGHEST)
        flow = current - v if inputs is None else current - v + inputs
        # The whole step comes out as the state it leads to, and not as that state plus what rounding left of v.
        part = step_size / feature_time
        new = (1 - part) * v + part * (flow + v)
        if memory_time == 0:
            h = driven(new)
        else:
            h = h + step_size / memory_time * (driven(v) - h)
        return (new, h), energy_of(new, h)

    h = driven(v) if memories is None else memories.astype(v.dtype)
    first = energy_of(v, h)
    (v, h), rest = jax.lax.scan(step, (v, h), length=steps)
    return Trajectory(v, h, jnp.concatenate([first[None], rest]))


# Parts. ---------------------------------------------------------------------------------------------------------------


def _check_degree(degree: int) -> None:
    if degree < 2:
        raise ValueError(f"degree={degree} must be at least 2; set degree")


def _of_scaled(function: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Return the contrast of a homogeneous F: scaling by a power of two rounds nothing and keeps the terms below 1."""

    def contrast(plus: Array, minus: Array) -> Array:
        top = jnp.max(jnp.maximum(jnp.abs(plus), jnp.abs(minus)), axis=-1, keepdims=True, initial=0.0)
        exponent = -jnp.frexp(top)[1]
        return _sum_or_tie(function(jnp.ldexp(plus, exponent)) - function(jnp.ldexp(minus, exponent)))

    return contrast


def _sum_or_tie(terms: Array) -> Array:
    """Return the sum over the last axis, exactly zero where rounding decides its sign."""
    total, size = jnp.sum(terms, axis=-1), jnp.sum(jnp.abs(terms), axis=-1)
    return jnp.where(jnp.abs(total) > 4 * jnp.finfo(terms.dtype).eps * size, total, 0.0)


def _decide(own: Array, products: Array, column: Array, interaction: Interaction) -> tuple[Array, Array]:
    """Return the value of lower energy for one neuron, and the products xi . sigma with it.

    Args:
      own: the neuron's value now, `[*batch]`.
      products: xi . sigma, `[*batch, patterns]`.
      column: the neuron's value in every pattern, `[patterns]`.
      interaction: F.
    """
    rest = products - column * own[..., None]
    difference = interaction.contrast(rest + column, rest - column)
    own = jnp.where(difference == 0, own, jnp.sign(difference))
    return own, rest + column * own[..., None]


def _products(state: Array, patterns: Array) -> Array:
    return jnp.matmul(state, patterns.T, precision=_HIGHEST)


def _promote(state: Array, patterns: Array) -> tuple[Array, Array]:
    """Return both in one dtype of float32 or better, after a check of their shapes."""
    if patterns.ndim != 2 or state.ndim < 1 or state.shape[-1] != patterns.shape[-1]:
        raise ValueError(
            f"states of shape {state.shape} and patterns of shape {patterns.shape} must be [*batch, neurons] and "
            "[patterns, neurons] of as many neurons; pass patterns of the width of the states"
        )
    dtype = at_least_float32(jnp.promote_types(state.dtype, patterns.dtype))
    return state.astype(dtype), patterns.astype(dtype)


def _double_factorial(neurons: int, degree: int) -> int:
    """Return (2n - 3)!! for n = degree."""
    _check_degree(degree)
    if neurons < 1:
        raise ValueError(f"neurons={neurons} must be at least 1; set neurons")
    return math.prod(range(1, 2 * degree - 2, 2))
