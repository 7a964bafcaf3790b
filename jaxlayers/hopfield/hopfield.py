"""Modern Hopfield networks: the energy and its update as plain functions, three layers, and two models built of them.

Patterns are rows here: `stored` is X^T of the paper, `[patterns, features]`, and `state` holds one xi a row. Longer
than most files, since the theory, the retrieval and the three layers belong to one paper.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes, dialects, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, Params
from jaxlayers.hopfield.streaming import Streaming, iterate
from jaxlayers.kernels.streamed_association import check_operands, streamed_association
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads

Beta = float | int | Float[Array, "*#batch"]
AssociationFn = Callable[..., Array]

_PROJECTIONS = ("query", "key", "value", "out")
_layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)


def association(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    association_fn: AssociationFn = attention_weights,
) -> Float[Array, "*#batch states patterns"]:
    """Return p = softmax(beta X^T xi) of every state, computed in float32 or better.

    Args:
      state: state patterns xi.
      stored: stored patterns, the columns of X.
      beta: inverse temperature of at least 0, one number or one for each batch element; 0 gives the uniform p.
      mask: True = may be retrieved. A state that may retrieve nothing gets p = 0.
      association_fn: what stands for the softmax, called as `association_fn(logits, mask=mask)`: the functions of
        `jaxlayers.ops.entmax` give sparse memories.

    Returns:
      One distribution over the stored patterns for each state.

    Raises:
      ValueError: if the widths of the patterns differ or a plain number `beta` is negative.
    """
    logits = _logits(state, stored, beta)
    return association_fn(logits, mask=None if mask is None else _fit_mask(mask, logits.shape))


def update(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    association_fn: AssociationFn = attention_weights,
    streaming: Streaming | None = None,
) -> Float[Array, "*#batch states features"]:
    """Return f(xi) = X softmax(beta X^T xi) (Eq. 3), which never raises the energy.

    Arguments as those of `association`; with `streaming`, the patterns are looked at chunk by chunk.
    """
    if streaming is not None:
        return retrieve(state, stored, beta=beta, mask=mask, association_fn=association_fn, streaming=streaming).state
    return _recall(association(state, stored, beta=beta, mask=mask, association_fn=association_fn), stored)


def energy(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    streaming: Streaming | None = None,
) -> Float[Array, "*#batch states"]:
    """Return E = -lse(beta, X^T xi) + 1/2 xi^T xi + ln(N) / beta + 1/2 M^2 (Eq. 2) of every state.

    lse(beta, z) = ln(sum_i exp(beta z_i)) / beta, N is the number of stored patterns that the mask leaves and M the
    largest norm among them; 0 <= E <= 2 M^2 for states in the convex hull of the patterns. A state that may retrieve
    nothing has E = 1/2 xi^T xi.

    Args:
      state: state patterns xi.
      stored: stored patterns.
      beta: inverse temperature, positive.
      mask: True = may be retrieved.
      streaming: look at the patterns chunk by chunk; `None` = at all together.

    Returns:
      The energy, float32 or better.

    Raises:
      ValueError: if the widths of the patterns differ or a plain number `beta` is not positive.
    """
    if isinstance(beta, int | float) and not beta > 0:
        raise ValueError(f"beta={beta} must be positive for an energy, which divides by it; set beta")
    check_operands(state, stored, beta)
    dtype = at_least_float32(jnp.promote_types(state.dtype, stored.dtype))
    inverse = 1 / jnp.asarray(beta, dtype)
    squares = jnp.sum(jnp.square(stored.astype(dtype)), axis=-1)[..., None, :]
    # What belongs to the memory alone stays of the mask's shape: a mask for all states costs nothing a state.
    count = stored.shape[-2]
    allowed = jnp.ones((1, count), bool) if mask is None else _fit_mask(mask, (*mask.shape[:-1], count))
    some, number = jnp.any(allowed, axis=-1), jnp.sum(allowed, axis=-1).astype(dtype)
    shape = jnp.broadcast_shapes(squares.shape, allowed.shape)
    largest = jnp.max(jnp.broadcast_to(squares, shape), axis=-1, where=allowed, initial=0.0)
    if streaming is None:
        logits = _logits(state, stored, beta)
        # A fully masked row would be -inf + inf, and its gradient NaN: let it see everything, then take it out.
        log_sum_exp = jax.nn.logsumexp(logits, axis=-1, where=_fit_mask(allowed | ~some[..., None], logits.shape))
    else:
        # Values without features: nothing but the normaliser is computed.
        nothing, keywords = jnp.zeros((count, 0), dtype), streaming.on(count) | {"kernel": "jnp"}
        log_sum_exp = streamed_association(state, stored, nothing, beta=beta, mask=mask, **keywords).log_sum_exp
    attraction = inverse[..., None] * (jnp.log(jnp.maximum(number, 1)) - jnp.where(some, log_sum_exp, 0.0))
    quadratic = 0.5 * jnp.sum(jnp.square(state.astype(dtype)), axis=-1)
    return quadratic + jnp.where(some, attraction + 0.5 * largest, 0.0)


def separation(stored: Float[Array, "*batch patterns features"]) -> Float[Array, "*batch patterns"]:
    """Return Delta_i = x_i^T x_i - max over j != i of x_i^T x_j (Eq. 5) of every stored pattern.

    Raises:
      ValueError: if there are fewer than two patterns.
    """
    count = stored.shape[-2]
    if count < 2:
        raise ValueError(f"patterns={count} must be at least 2, since a separation needs another pattern; store more")
    stored = stored.astype(at_least_float32(stored.dtype))
    products = jnp.einsum("...id,...jd->...ij", stored, stored)
    own = jnp.eye(count, dtype=bool)
    return jnp.sum(jnp.square(stored), axis=-1) - jnp.max(products, axis=-1, where=~own, initial=-jnp.inf)


def retrieval_error_bound(
    stored: Float[Array, "*batch patterns features"],
    distance: Float[Array, "*#batch patterns"],
    *,
    beta: float | int,
) -> Float[Array, "*batch patterns"]:
    """Return 2 (N - 1) M exp(-beta (Delta_i - 2 M distance_i)), which ||f(xi) - x_i|| never exceeds (Theorem 5, Eq. 8).

    Args:
      stored: the N patterns x_i; M is their largest norm and Delta_i their `separation`.
      distance: max(||xi - x_i||, ||x_i* - x_i||) for the query xi and the fixed point x_i* near x_i. The proof needs
        the first of the two only; the second makes the bound hold for x_i* as well.
      beta: inverse temperature, positive.

    Returns:
      The bound for each pattern.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive; set beta")
    gaps = separation(stored)
    largest = jnp.sqrt(jnp.max(jnp.sum(jnp.square(stored.astype(gaps.dtype)), axis=-1), axis=-1, keepdims=True))
    return 2 * (stored.shape[-2] - 1) * largest * jnp.exp(-beta * (gaps - 2 * largest * distance))


class StorageCapacity(NamedTuple):
    """What `storage_capacity` returns.

    Attributes:
      constant: c of Theorem 3.
      patterns: sqrt(p) c^((d - 1) / 4), the number of random patterns that can be stored with probability 1 - p.
    """

    constant: float
    patterns: float


def storage_capacity(
    features: int, *, beta: float, radius_factor: float, failure_probability: float
) -> StorageCapacity:
    """Return how many random patterns on a sphere are proved to be storable, exponential in their width (Eq. 4).

    Args:
      features: width d of the patterns.
      beta: inverse temperature.
      radius_factor: K; the sphere has radius M = K sqrt(d - 1).
      failure_probability: p.

    Returns:
      The constant c and the number of patterns.

    Raises:
      ValueError: if an argument is out of range, or c is below (2 / sqrt(p))^(4 / (d - 1)), where it is silent.

    Example:
      >>> from jaxlayers.hopfield.hopfield import storage_capacity
      >>> round(storage_capacity(20, beta=1.0, radius_factor=3.0, failure_probability=0.001).constant, 4)
      3.1546
    """
    if features < 2 or beta <= 0 or radius_factor <= 0 or not 0 < failure_probability <= 1:
        raise ValueError(
            f"features={features}, beta={beta}, radius_factor={radius_factor}, failure_probability="
            f"{failure_probability} must be at least 2, positive, positive and in (0, 1]; set the one that is not"
        )
    spread = 2 * beta * radius_factor**2
    a = 2 / (features - 1) * (1 + math.log(spread * failure_probability * (features - 1)))
    b = spread / 5
    constant = b / _lambert_w(math.exp(a + math.log(b)))
    least = (2 / math.sqrt(failure_probability)) ** (4 / (features - 1))
    if constant < least:
        raise ValueError(
            f"the theorem needs c={constant:.4f} of at least {least:.4f}; set a larger features, beta or radius_factor"
        )
    return StorageCapacity(constant, math.sqrt(failure_probability) * constant ** ((features - 1) / 4))


class Retrieval(NamedTuple):
    """What `retrieve` returns.

    Attributes:
      state: state patterns after the last update, `[*batch, states, features]`.
      association: p of the last update, `[*batch, states, patterns]`; `state` is its mean of the stored patterns.
        `None` if streamed.
      steps: number of updates that each state took, `[*batch, states]`.
    """

    state: Array
    association: Array | None
    steps: Array


def retrieve(
    state: Float[Array, "*#batch states features"],
    stored: Float[Array, "*#batch patterns features"],
    *,
    beta: Beta,
    mask: Bool[Array, "*#batch #states #patterns"] | None = None,
    update_steps: int = 1,
    tolerance: float | None = None,
    association_fn: AssociationFn = attention_weights,
    streaming: Streaming | None = None,
) -> Retrieval:
    """Iterate the update from `state`, a fixed number of times or until each state has settled.

    Without `tolerance`, all states take exactly `update_steps` updates, and gradients run through all of them.

    With `tolerance`, each state stops on its own once an update moves its association p by at most `tolerance`
    (Euclidean norm; p sums to one, so this has no unit), and takes `update_steps` updates at the most. What the other
    states of the batch do has no influence on it. Gradients are those of the fixed point (implicit differentiation,
    memory independent of the number of steps, forward and reverse mode): `state`, from which the fixed point was
    found but on which it does not depend, gets gradient zero. For a state that ran into `update_steps` before it
    settled they are those of a fixed point at the place it reached.

    Args:
      state: state patterns xi.
      stored: stored patterns.
      beta: inverse temperature of at least 0, one number or one for each batch element.
      mask: True = may be retrieved. A state that may retrieve nothing becomes zero.
      update_steps: updates, at least 1; with `tolerance` the most there may be, at least 2.
      tolerance: `None`, or the largest movement of p at which a state stops, at least 0.
      association_fn: see `association`.
      streaming: look at the patterns chunk by chunk, which may lie split over devices; `None` = at all together. Values
        and gradients are the same, those with a tolerance in reverse mode only.

    Returns:
      The states reached, their associations and their number of updates.

    Raises:
      ValueError: if the widths of the patterns differ or an argument is out of its range.
    """
    if streaming is not None:
        _check_streaming(association_fn)
        _check_steps(update_steps, tolerance)
        state = state.astype(at_least_float32(jnp.promote_types(state.dtype, stored.dtype)))
        found, steps = iterate(
            state, stored, streaming=streaming, beta=beta, mask=mask, update_steps=update_steps, tolerance=tolerance
        )
        return Retrieval(found.values, None, steps)
    weights, steps = _iterate(state, stored, beta, mask, update_steps, tolerance, association_fn)
    return Retrieval(_recall(weights, stored), weights, steps)


class Hopfield(nn.Module):
    """Associate state patterns with stored patterns and return the values of what was retrieved.

    Z = softmax(beta Xi X^T) V W_O in each head and concatenated, with Xi = R W_Q after `update_steps` - 1 updates
    xi <- X softmax(beta X^T xi), X = Y W_K and V = Y W_V; R (`inputs_q`) are S raw state patterns, Y (`inputs_k`) N
    raw stored patterns, V the values, by default of Y (`inputs_v`). One update with beta = 1/sqrt(head_dim) is
    attention.

    Symmetry:
      Permutations of the stored patterns (with their values and masks): invariant. Permutations of the state
      patterns: equivariant. So self-association, `Hopfield()(x)`, is equivariant. In static mode without norms also
      equivariant to rotations and reflections of the pattern space. Exact.

    Attributes:
      num_heads: associations side by side.
      head_dim: width of a pattern in the association space of one head, which sets the storage capacity. `None` = the
        width of whichever of state and stored patterns is not projected, else state features / `num_heads`.
      value_dim: width of a projected value in one head. `None` = `head_dim`.
      out_features: width of the output. `None` = as the state patterns (or, without `"out"`, the heads in a row).
      projections: which of `"query"`, `"key"`, `"value"`, `"out"` are learned linear maps. Patterns that are not
        projected enter every head whole; `()` is static mode, a memory without projections.
      beta: inverse temperature of at least 0: one for all heads, a tuple with one a head, or `None` = 1/sqrt(head_dim).
        0 averages all patterns, larger values give metastable averages of some, then single patterns.
      learn_beta: train one beta a head, from `beta` on, through its logarithm (parameter `log_beta`).
      update_steps: number of updates, 1 = attention; with `tolerance` the most there may be.
      tolerance: `None` = exactly `update_steps` updates, differentiated through. Else each state of each head stops on
        its own once an update moves its association by at most this much, and gradients are those of the fixed point
        (see `retrieve`): none reach the state patterns.
      association_fn: what stands for the softmax, called as `association_fn(logits, mask=mask)`; see `association`.
      streaming: compute associations chunk by chunk, for memories that are large or lie split over devices; from a
        thousand patterns on, training on a CPU is quicker so too, in chunks of some hundreds. `None` = as one matrix.
      state_norm: makes the normalisation of raw state patterns, called with dtype, param_dtype and name. `None` = none.
      stored_norm: the same for raw stored patterns.
      value_norm: the same for raw values.
      dropout_rate: rate of associations dropped after the last update.
      use_bias: whether projections add a bias.
      dtype: of computation; `None` = that of inputs and parameters. Associations are float32 or better.
      param_dtype: of parameters.
      kernel_init: of projections.
      bias_init: of their biases.

    Collections:
      `dropout` stream, if `dropout_rate` > 0 and not deterministic. Sows into `intermediates` the `association`
      `[*batch, heads, states, patterns]` before dropout (streamed: the logarithm of its normaliser, `log_sum_exp`
      `[*batch, heads, states]`) and the number of updates `steps` `[*batch, heads, states]`.

    Cost:
      O(S N head_dim num_heads) multiply-accumulates per update, and memory O(S N num_heads), times `update_steps` for
      the gradient without `tolerance`; streamed, the N in it is `streaming.chunk_size`, and is not multiplied.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import Hopfield
      >>> layer = Hopfield(num_heads=2, update_steps=3)
      >>> x = jnp.ones((4, 7, 16))
      >>> y, variables = layer.init_with_output(jax.random.key(0), x)
      >>> y.shape
      (4, 7, 16)

    Source:
      Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, Eqs. 1-10; code: ml-jku/hopfield-layers.

    Differs:
      Values are V = Y W_V (the default of the reference code) where Eq. 10 has Y W_K W_V. A state stops alone, where
      the code stops a head when the worst sample of the batch has settled. `update_steps` counts updates, the code's
      `update_steps_max` those after the first. `beta=None` is 1/sqrt(head_dim) in static mode too (code: 1). A beta for
      each head scales that head (the code tiles the vector over features, so that heads get mixtures), and unprojected
      patterns with several heads stay in their own sample (the code interleaves heads and samples of a batch). A state
      that may retrieve nothing gives the output bias (code: NaN). Normalisation in the association space is left out.
    """

    num_heads: int = 1
    head_dim: int | None = None
    value_dim: int | None = None
    out_features: int | None = None
    projections: tuple[str, ...] = _PROJECTIONS
    beta: float | int | tuple[float | int, ...] | None = None
    learn_beta: bool = False
    update_steps: int = 1
    tolerance: float | None = None
    association_fn: AssociationFn = attention_weights
    streaming: Streaming | None = None
    state_norm: Callable[..., nn.Module] | None = _layer_norm
    stored_norm: Callable[..., nn.Module] | None = _layer_norm
    value_norm: Callable[..., nn.Module] | None = _layer_norm
    dropout_rate: float = 0.0
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "*#batch states state_features"],
        inputs_k: Float[Array, "*#batch patterns stored_features"] | None = None,
        inputs_v: Float[Array, "*#batch patterns value_features"] | None = None,
        *,
        mask: Bool[Array, "*#batch #heads #states #patterns"] | None = None,
        key_mask: Bool[Array, "*#batch patterns"] | None = None,
        exclude: Int[Array, "*#batch states"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*#batch states out_features"]:
        """Retrieve for every state pattern.

        Args:
          inputs_q: raw state patterns R; batch axes broadcast against those of the stored patterns.
          inputs_k: raw stored patterns Y. `None` = `inputs_q`.
          inputs_v: raw values, one for each stored pattern. `None` = `inputs_k`.
          mask: True = the state may retrieve the pattern, in that head.
          key_mask: True = a pattern; False = padding of a smaller set, whose (finite) content has no influence.
          exclude: index of the one stored pattern that a state may not retrieve, such as itself; -1 = none.
          deterministic: no dropout.

        Returns:
          One result for each state pattern.

        Raises:
          ValueError: if a field is out of range or widths don't fit.
        """
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        for name, x in (("inputs_q", inputs_q), ("inputs_k", inputs_k), ("inputs_v", inputs_v)):
            if x.ndim < 2:
                raise ValueError(f"{name} has shape {x.shape} and must be [*batch, patterns, features]; add an axis")
        if inputs_k.shape[-2] != inputs_v.shape[-2]:
            raise ValueError(
                f"inputs_v has {inputs_v.shape[-2]} values and inputs_k {inputs_k.shape[-2]} stored patterns, which "
                "must be equally many; pass one value for each pattern"
            )
        head_dim, value_dim, out_features = self._widths(inputs_q.shape[-1], inputs_k.shape[-1], inputs_v.shape[-1])
        query = self._heads("query", head_dim, self.state_norm, "norm_state", inputs_q)
        key = self._heads("key", head_dim, self.stored_norm, "norm_stored", inputs_k)
        value = self._heads("value", value_dim, self.value_norm, "norm_value", inputs_v)
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)
        if key_mask is not None:
            key_mask = _fit_mask(key_mask, (*key_mask.shape[:-1], inputs_k.shape[-2]))
            mask = key_mask[..., None, None, :] if mask is None else mask & key_mask[..., None, None, :]

        if exclude is not None:
            exclude = exclude[..., None, :]
            if self.streaming is None:
                others = jnp.arange(inputs_k.shape[-2]) != exclude[..., None]
                mask = others if mask is None else mask & others
        if self.streaming is not None:
            _check_streaming(self.association_fn)
        _check_steps(self.update_steps, self.tolerance)

        dropout_rate = 0.0 if deterministic else self.dropout_rate

        def stream_values(
            streaming: Streaming, module: nn.Module, query: Array, key: Array, value: Array, betas: Array
        ) -> Array:
            found, steps = iterate(
                *(query, key, value),
                streaming=streaming,
                beta=betas,
                mask=mask,
                exclude=exclude,
                update_steps=self.update_steps,
                tolerance=self.tolerance,
                dropout_rate=dropout_rate,
                dropout_key=module.make_rng("dropout") if dropout_rate else None,
            )
            module.sow("intermediates", "log_sum_exp", found.log_sum_exp)
            module.sow("intermediates", "steps", steps)
            return found.values

        def retrieve_values(module: nn.Module, query: Array, key: Array, value: Array, betas: Array) -> Array:
            weights, steps = _iterate(query, key, betas, mask, self.update_steps, self.tolerance, self.association_fn)
            module.sow("intermediates", "association", weights)
            module.sow("intermediates", "steps", steps)
            weights = nn.Dropout(self.dropout_rate)(weights, deterministic=deterministic)
            return jnp.einsum("...sp,...pd->...sd", weights.astype(value.dtype), value)

        streaming = self.streaming
        recall = retrieve_values if streaming is None else functools.partial(stream_values, streaming)
        result = merge_heads(remat.attention(recall, self, query, key, value, self._betas(head_dim)))
        if "out" in self.projections:
            result = _dense(self, "out", out_features)(result)
        return axes.constrain(result, axes.BATCH, None, None) if result.ndim > 2 else result

    def _heads(
        self, name: str, width: int, norm: Callable[..., nn.Module] | None, norm_name: str, x: jax.Array
    ) -> jax.Array:
        """Return `x` normalised, projected if `name` is a projection, with an axis of heads."""
        if norm is not None:
            x = norm(dtype=self.dtype, param_dtype=self.param_dtype, name=norm_name)(x)
        if name not in self.projections:
            return jnp.broadcast_to(x[..., None, :, :], (*x.shape[:-2], self.num_heads, *x.shape[-2:]))
        heads = split_heads(_dense(self, name, self.num_heads * width)(x), self.num_heads)
        return axes.constrain(heads, axes.HEADS, None if name == "query" else axes.PATTERNS, None)

    def _widths(self, state: int, stored: int, value: int) -> tuple[int, int, int]:
        """Return the widths of the association space, of a value and of the output."""
        unknown = [name for name in self.projections if name not in _PROJECTIONS]
        if unknown:
            raise ValueError(f"projections names {unknown[0]!r}, which must be one of {_PROJECTIONS}; set projections")
        for name in ("num_heads", "head_dim", "value_dim", "out_features"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1; set {name}")
        static = {name: width for name, width in (("query", state), ("key", stored)) if name not in self.projections}
        if self.head_dim is not None:
            head_dim = self.head_dim
        elif static:
            head_dim = next(iter(static.values()))
        elif state % self.num_heads:
            raise ValueError(
                f"state features={state} must be divisible by num_heads={self.num_heads}; set num_heads or head_dim"
            )
        else:
            head_dim = state // self.num_heads
        for name, width in static.items():
            if width != head_dim:
                raise ValueError(
                    f"unprojected {name} patterns have {width} features and must have head_dim={head_dim}; "
                    f"set head_dim, or add {name!r} to projections"
                )
        value_dim = head_dim if self.value_dim is None else self.value_dim
        if "value" not in self.projections:
            if self.value_dim not in (None, value):
                raise ValueError(
                    f"value_dim={self.value_dim} must be the {value} features of values that are not projected; "
                    "set value_dim=None, or add 'value' to projections"
                )
            value_dim = value
        in_a_row = self.num_heads * value_dim
        if "out" in self.projections:
            return head_dim, value_dim, state if self.out_features is None else self.out_features
        if self.out_features not in (None, in_a_row):
            raise ValueError(
                f"out_features={self.out_features} must be num_heads * value_dim={in_a_row} without an out projection; "
                "set out_features=None, or add 'out' to projections"
            )
        return head_dim, value_dim, in_a_row

    def _betas(self, head_dim: int) -> jax.Array:
        """Return beta of every head."""
        beta = 1 / math.sqrt(head_dim) if self.beta is None else self.beta
        betas = tuple(beta) if isinstance(beta, tuple | list) else (beta,) * self.num_heads
        if len(betas) != self.num_heads:
            raise ValueError(f"beta={self.beta} must have one entry for each of num_heads={self.num_heads}; set beta")
        if not all(0 <= one < math.inf for one in betas):
            raise ValueError(f"beta={self.beta} must be finite and at least 0; set beta")
        if not self.learn_beta:
            return jnp.asarray(betas, jnp.result_type(float))
        if not all(betas):
            raise ValueError(f"beta={self.beta} must be positive to be learned through its logarithm; set beta")
        return jnp.exp(self.param("log_beta", lambda _: jnp.log(jnp.asarray(betas, self.param_dtype))))


class HopfieldPooling(nn.Module):
    """Pool a set into what learned state patterns retrieve from it.

    Z = Hopfield(R, Y) with learned R `[num_states, features]`; the members of the set are the stored patterns Y. The
    pattern most similar to the learned prototype passes (beta large), or the mean of the set (beta small).

    Symmetry:
      Permutations of the set (with its mask): invariant. Exact.

    Attributes:
      hopfield: the association, with its heads, beta and update steps.
      num_states: learned state patterns, each giving one row of the output.
      patterns_init: of the state patterns.
      param_dtype: of the state patterns.

    Collections:
      Those of `Hopfield`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import Hopfield, HopfieldPooling
      >>> pool = HopfieldPooling(Hopfield(num_heads=4))
      >>> bags, members = jnp.ones((8, 30, 16)), jnp.arange(30) < jnp.arange(1, 9)[:, None]
      >>> pooled, variables = pool.init_with_output(jax.random.key(0), bags, key_mask=members)
      >>> pooled.shape
      (8, 1, 16)

    Source:
      Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, section 3; code: ml-jku/hopfield-layers.

    Differs:
      The rows of several state patterns stay an axis (code: flattened). Freezing the patterns is left to the optimiser.
    """

    hopfield: Hopfield
    num_states: int = 1
    patterns_init: Initializer = nn.initializers.normal(0.02)
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*batch patterns features"],
        inputs_v: Float[Array, "*batch patterns value_features"] | None = None,
        *,
        key_mask: Bool[Array, "*#batch patterns"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch states out_features"]:
        """Pool over the axis before the last.

        Args:
          inputs: members of the sets.
          inputs_v: their values. `None` = `inputs`.
          key_mask: True = a member; False = padding. An empty set gives the output bias.
          deterministic: no dropout.

        Returns:
          One row for each learned state pattern.

        Raises:
          ValueError: if a field is out of range or widths don't fit.
        """
        if self.num_states < 1:
            raise ValueError(f"num_states={self.num_states} must be at least 1; set num_states")
        width = _pattern_width("query", self.hopfield, inputs.shape[-1])
        states = self.param("state_patterns", self.patterns_init, (self.num_states, width), self.param_dtype)
        return self.hopfield(states, inputs, inputs_v, key_mask=key_mask, deterministic=deterministic)


class HopfieldLayer(nn.Module):
    """Look up every input in a learned memory.

    Z = Hopfield(R, Y, V) with the inputs as state patterns R and learned stored patterns Y `[num_patterns, features]`,
    which are also the values V unless these are learned apart. The memory can begin as data: let `patterns_init`
    return a training set.

    Symmetry:
      Permutations of the inputs: equivariant. Permutations of the memory: invariant. Exact.

    Attributes:
      hopfield: the association, with its heads, beta and update steps.
      num_patterns: size of the memory.
      value_features: width of values learned apart from the patterns. `None` = the patterns are the values.
      patterns_init: of stored patterns and values.
      param_dtype: of stored patterns and values.

    Collections:
      Those of `Hopfield`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import Hopfield, HopfieldLayer
      >>> memory = HopfieldLayer(Hopfield(num_heads=2), num_patterns=10)
      >>> y, variables = memory.init_with_output(jax.random.key(0), jnp.ones((4, 7, 16)))
      >>> y.shape, variables["params"]["stored_patterns"].shape
      ((4, 7, 16), (10, 16))

    Source:
      Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, section 3; code: ml-jku/hopfield-layers.

    Differs:
      The memory is stored once and not tiled over the batch. Freezing it is left to the optimiser.
    """

    hopfield: Hopfield
    num_patterns: int
    value_features: int | None = None
    patterns_init: Initializer = nn.initializers.normal(0.02)
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*batch states features"],
        *,
        mask: Bool[Array, "*#batch #heads #states #patterns"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch states out_features"]:
        """Look up the inputs.

        Args:
          inputs: state patterns.
          mask: True = the state may retrieve the pattern, in that head.
          deterministic: no dropout.

        Returns:
          One result for each input.

        Raises:
          ValueError: if a field is out of range or widths don't fit.
        """
        if self.num_patterns < 1:
            raise ValueError(f"num_patterns={self.num_patterns} must be at least 1; set num_patterns")
        width = _pattern_width("key", self.hopfield, inputs.shape[-1])
        shape = (self.num_patterns, width)
        patterns = self.param("stored_patterns", self.patterns_init, shape, self.param_dtype)
        values = None
        if self.value_features is not None:
            shape = (self.num_patterns, self.value_features)
            values = self.param("stored_values", self.patterns_init, shape, self.param_dtype)
        return self.hopfield(inputs, patterns, values, mask=mask, deterministic=deterministic)


class HopfieldClassifier(nn.Module):
    """Classify rows of a table by what they retrieve from learned prototypes.

    h_0 = x W_E, h_{l+1} = h_l + memory_l(h_l) for l < `depth`, logits = norm(h_depth) W_C.

    Symmetry:
      Permutations of a memory's stored patterns, as `HopfieldLayer`: invariant. None on the columns of the table.

    Attributes:
      num_classes: width of the output; 0 = no head, the normalised features instead.
      features: width of h.
      memory: the lookup; every layer has its own copy. `head_dim` or `num_heads` must fit `features`.
      depth: number of lookups.
      norm: makes the normalisation before the head, called with dtype, param_dtype and name. `None` = none.
      dtype: of computation; `None` = that of inputs and parameters.
      param_dtype: of parameters.
      kernel_init: of embedding and head.
      bias_init: of their biases.

    Collections:
      Those of `Hopfield`, in `memory_0/hopfield` and so on.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import Hopfield, HopfieldClassifier, HopfieldLayer
      >>> model = HopfieldClassifier(2, 16, HopfieldLayer(Hopfield(num_heads=4), num_patterns=8))
      >>> logits, variables = model.init_with_output(jax.random.key(0), jnp.ones((5, 30)))
      >>> logits.shape
      (5, 2)

    Source:
      Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, section 4 (UCI benchmarks), where Hopfield layers
      are put into a network for small tables.

    Differs:
      The paper selects an architecture for each data set; this is one residual design of our own.
    """

    num_classes: int
    features: int
    memory: HopfieldLayer
    depth: int = 2
    norm: Callable[..., nn.Module] | None = _layer_norm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch columns"], *, deterministic: bool = True
    ) -> Float[Array, "*batch classes"]:
        """Classify each row.

        Args:
          inputs: standardised numbers, one row a sample.
          deterministic: no dropout.

        Returns:
          Logits, or features if `num_classes` is 0.

        Raises:
          ValueError: if a field is out of range or widths don't fit.
        """
        if self.depth < 0:
            raise ValueError(f"depth={self.depth} must be at least 0; set depth")
        if self.features < 1:
            raise ValueError(f"features={self.features} must be at least 1; set features")
        x = _dense(self, "embed", self.features)(inputs)[..., None, :]
        for index in range(self.depth):
            # The copy must not keep `self.memory`'s own association, or all layers would share one.
            memory = self.memory.clone(parent=self, name=f"memory_{index}", hopfield=self.memory.hopfield.clone())
            x = x + memory(x, deterministic=deterministic)
        return _read_out(self, x[..., 0, :])


class HopfieldBagClassifier(nn.Module):
    """Classify sets of instances, of which a few may decide (multiple-instance learning).

    logits = norm(pooling(a(x_1 W_E), ..., a(x_N W_E))) W_C with the activation a, the rows of several pooled states
    side by side.

    Symmetry:
      Permutations of the instances (with their mask): invariant. Exact.

    Attributes:
      num_classes: width of the output; 0 = no head, the pooled features instead.
      features: width of embedded instances.
      pooling: what turns them into `pooling.num_states` rows.
      activation_fn: of embedded instances.
      norm: makes the normalisation before the head, called with dtype, param_dtype and name. `None` = none.
      dtype: of computation; `None` = that of inputs and parameters.
      param_dtype: of parameters.
      kernel_init: of embedding and head.
      bias_init: of their biases.

    Collections:
      Those of `Hopfield`, in `pooling/hopfield`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import Hopfield, HopfieldBagClassifier, HopfieldPooling
      >>> model = HopfieldBagClassifier(2, 16, HopfieldPooling(Hopfield(num_heads=4)))
      >>> logits, variables = model.init_with_output(jax.random.key(0), jnp.ones((5, 12, 8)))
      >>> logits.shape
      (5, 2)

    Source:
      Ramsauer et al., "Hopfield Networks is All You Need", ICLR 2021, section 4 (multiple-instance learning).

    Differs:
      One linear embedding stands for the data set's own instance encoder.
    """

    num_classes: int
    features: int
    pooling: HopfieldPooling
    activation_fn: ActivationFn = nn.relu
    norm: Callable[..., nn.Module] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*batch instances features"],
        *,
        key_mask: Bool[Array, "*#batch instances"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch classes"]:
        """Classify each set.

        Args:
          inputs: instances.
          key_mask: True = an instance; False = padding.
          deterministic: no dropout.

        Returns:
          Logits, or features if `num_classes` is 0.

        Raises:
          ValueError: if a field is out of range or widths don't fit.
        """
        if self.features < 1:
            raise ValueError(f"features={self.features} must be at least 1; set features")
        x = self.activation_fn(_dense(self, "embed", self.features)(inputs))
        x = self.pooling(x, key_mask=key_mask, deterministic=deterministic)
        return _read_out(self, x.reshape(*x.shape[:-2], -1))


def _dense(module: Any, name: str, features: int) -> nn.Dense:
    """Return a linear map with the module's dtypes, initialisers and, where it has one, its choice of biases."""
    return nn.Dense(
        features,
        use_bias=getattr(module, "use_bias", True),
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=module.kernel_init,
        bias_init=module.bias_init,
        name=name,
        parent=module,
    )


def _read_out(module: HopfieldClassifier | HopfieldBagClassifier, x: jax.Array) -> jax.Array:
    if module.num_classes < 0:
        raise ValueError(f"num_classes={module.num_classes} must be at least 0; set num_classes")
    if module.norm is not None:
        x = module.norm(dtype=module.dtype, param_dtype=module.param_dtype, name="final_norm", parent=module)(x)
    return _dense(module, "head", module.num_classes)(x) if module.num_classes else x


def _pattern_width(name: str, hopfield: Hopfield, features: int) -> int:
    """Return the width of learned patterns: that of the inputs, or `head_dim` if they are not projected."""
    return features if name in hopfield.projections or hopfield.head_dim is None else hopfield.head_dim


def _recall(weights: jax.Array, stored: jax.Array) -> jax.Array:
    return jnp.einsum("...sp,...pd->...sd", weights, stored.astype(weights.dtype))


def _logits(state: jax.Array, stored: jax.Array, beta: Any) -> jax.Array:
    """Return beta X^T xi in float32 or better."""
    check_operands(state, stored, beta)
    dtype = at_least_float32(jnp.promote_types(state.dtype, stored.dtype))
    products = jnp.einsum("...sd,...pd->...sp", state, stored, preferred_element_type=dtype)
    return products * jnp.asarray(beta, dtype)[..., None, None]


def _check_streaming(association_fn: AssociationFn) -> None:
    if association_fn is not attention_weights:
        raise ValueError(
            f"association_fn={association_fn} must be the default softmax when streamed, since others need all "
            "logits of a state together; set streaming=None"
        )


def _check_steps(update_steps: int, tolerance: float | None) -> None:
    if update_steps < 1:
        raise ValueError(f"update_steps={update_steps} must be at least 1; set update_steps")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be at least 0; set tolerance")
    if tolerance is not None and update_steps < 2:
        raise ValueError(
            f"update_steps={update_steps} must be at least 2 with a tolerance, which compares two updates; set "
            "update_steps to the most there may be"
        )


def _fit_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return `mask` broadcast to `shape`; a float mask, which elsewhere may be one that is added, is refused."""
    if mask.dtype != bool:
        raise ValueError(f"mask of dtype {mask.dtype} must be bool, True = may be retrieved; pass mask > 0 or the like")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"mask of shape {mask.shape} must broadcast to {shape}, states and patterns last; pass one that does"
        ) from None


def _iterate(
    state: jax.Array,
    stored: jax.Array,
    beta: Any,
    mask: jax.Array | None,
    update_steps: int,
    tolerance: float | None,
    association_fn: AssociationFn,
) -> tuple[Float[Array, "*#batch states patterns"], Int[Array, "*#batch states"]]:
    """Return the association of the last update and the number of updates; the rest of `retrieve` is one product."""
    _check_steps(update_steps, tolerance)
    if update_steps == 1:
        weights = association(state, stored, beta=beta, mask=mask, association_fn=association_fn)
        return weights, jnp.ones(weights.shape[:-1], jnp.int32)

    # Rounding adds up over updates, so these run in float32 or better whatever the inputs are in.
    dtype = at_least_float32(jnp.promote_types(state.dtype, stored.dtype))
    state, stored = state.astype(dtype), stored.astype(dtype)
    associate = functools.partial(association, stored=stored, beta=beta, mask=mask, association_fn=association_fn)
    shape = jax.eval_shape(associate, state).shape[:-1]
    state = jnp.broadcast_to(state, (*shape, state.shape[-1]))
    if tolerance is None:
        state = jax.lax.fori_loop(0, update_steps - 1, lambda _, xi: _recall(associate(xi), stored), state)
        return associate(state), jnp.full(shape, update_steps, jnp.int32)

    def residual(xi: jax.Array) -> jax.Array:
        return _recall(associate(xi), stored) - xi

    def settle(_: Any, xi: jax.Array) -> tuple[jax.Array, jax.Array]:
        def unsettled(carry: Any) -> jax.Array:
            return jnp.any(carry[2]) & (jnp.max(carry[3]) < update_steps)

        def step(carry: Any) -> Any:
            xi, weights, active, steps = carry
            moved_xi = jnp.where(active[..., None], _recall(weights, stored), xi)
            moved = associate(moved_xi)
            distance = jnp.linalg.norm(moved - weights, axis=-1)
            return moved_xi, moved, active & (distance > tolerance), steps + active

        start = (xi, associate(xi), jnp.ones(shape, bool), jnp.ones(shape, jnp.int32))
        xi, _, _, steps = jax.lax.while_loop(unsettled, step, start)
        # custom_root gives its auxiliary output a zero tangent of the same dtype, which integers cannot have.
        return xi, steps.astype(dtype)

    def solve_tangent(linear: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
        # `linear` is J - 1 with J = beta X (diag(p) - p p^T) X^T (for a sparse p its like on the support), symmetric
        # and, at a minimum of the energy, below 1:
        # the series u <- J u - y converges as fast as the iteration did.
        return jax.lax.custom_linear_solve(linear, y, solve=series, symmetric=True)

    def series(linear: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
        def step(carry: Any) -> Any:
            u, active, count = carry
            new = jnp.where(active[..., None], linear(u) + u - y, u)
            change, size = (jnp.linalg.norm(array, axis=-1) for array in (new - u, new))
            return new, active & (change > tolerance * size), count + 1

        def unsettled(carry: Any) -> jax.Array:
            return jnp.any(carry[1]) & (carry[2] < update_steps)

        return jax.lax.while_loop(unsettled, step, (-y, jnp.ones(shape, bool), jnp.int32(0)))[0]

    state, steps = jax.lax.custom_root(residual, state, settle, solve_tangent, has_aux=True)
    return associate(state), steps.astype(jnp.int32)


def _lambert_w(x: float) -> float:
    """Return the upper branch of w e^w = x, for x > 0, by Newton's method."""
    w = math.log1p(x)
    for _ in range(100):
        change = (w - x * math.exp(-w)) / (1 + w)
        w -= change
        if abs(change) <= 1e-15 * abs(w):
            break
    return w


# The reference code ---------------------------------------------------------------------------------------------------

# Our parameters, without "hopfield/", and theirs, without "hopfield."; of two names a state dict has one. An `in_proj`
# tensor holds the rows of query, key and value one after the other. `scaling` is no parameter there but an argument.
REFERENCE_NAMES: Mapping[str, tuple[str, ...]] = {
    "query/kernel": ("association_core.q_proj_weight", "association_core.in_proj_weight"),
    "key/kernel": ("association_core.k_proj_weight", "association_core.in_proj_weight"),
    "value/kernel": ("association_core.v_proj_weight", "association_core.in_proj_weight"),
    "query/bias": ("association_core.in_proj_bias",),
    "key/bias": ("association_core.in_proj_bias",),
    "value/bias": ("association_core.in_proj_bias",),
    "out/kernel": ("association_core.out_proj.weight",),
    "out/bias": ("association_core.out_proj.bias",),
    "norm_state/scale": ("norm_state_pattern.weight",),
    "norm_state/bias": ("norm_state_pattern.bias",),
    "norm_stored/scale": ("norm_stored_pattern.weight",),
    "norm_stored/bias": ("norm_stored_pattern.bias",),
    "norm_value/scale": ("norm_pattern_projection.weight",),
    "norm_value/bias": ("norm_pattern_projection.bias",),
    "state_patterns": ("pooling_weights",),
    "stored_patterns": ("lookup_weights",),
    "stored_values": ("target_weights",),
}


def from_reference(tensors: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """Return parameters of `Hopfield`, `HopfieldPooling` or `HopfieldLayer` from the reference code's state dict.

    Args:
      tensors: arrays by the reference's names.
      params: parameters of our module (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      A parameter tree like `params`.

    Raises:
      ValueError: if names or shapes are not those of `params`.
    """
    left = {name.removeprefix("hopfield."): np.asarray(tensor) for name, tensor in tensors.items()}
    wanted = flax.traverse_util.flatten_dict(params, sep="/")
    found, taken = {}, dict.fromkeys(left, 0)
    # Rows of fused tensors are cut off in the order of the table.
    for ours, theirs in REFERENCE_NAMES.items():
        path = next((path for path in (ours, f"hopfield/{ours}") if path in wanted), None)
        name = next((name for name in theirs if name in left), None)
        if path is None or name is None:
            continue
        tensor, shape = left[name], tuple(wanted[path].shape)
        if ".in_proj_" in name:
            tensor = tensor[taken[name] : taken[name] + shape[-1]]
        elif tensor.ndim == 3:
            tensor = tensor[0]
        taken[name] += tensor.shape[0]
        tensor = tensor.T if ours.endswith("kernel") else tensor
        if tensor.shape != shape:
            raise ValueError(f"{name} must give {path} its shape {shape}, not {tensor.shape}; set the module's fields")
        found[path] = jnp.asarray(tensor)
    missing = sorted(set(wanted) - set(found))
    # The reference keeps bias rows for values that it doesn't project.
    spare = {"association_core.in_proj_bias"} if not any(path.endswith("value/kernel") for path in wanted) else set()
    rows = {name: tensor.shape[-2] if tensor.ndim == 3 else tensor.shape[0] for name, tensor in left.items()}
    unknown = sorted(name for name in left if taken[name] != rows[name] and name not in spare)
    if missing or unknown:
        raise ValueError(f"the state dict must match the module; missing {missing}, unknown {unknown}; set its fields")
    return flax.traverse_util.unflatten_dict(found, sep="/")


def _spare_rows(model: Any, variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the fused bias, which has rows there for values that are not projected."""
    params = flax.traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    outer = "" if isinstance(model, Hopfield) else "hopfield"
    rows = [leaf.shape[0] for path, leaf in params.items() if re.search(r"(query|key|value)/bias$", path)]
    if not rows or any(path.endswith("value/kernel") for path in params):
        return {}
    return {".".join(filter(None, (outer, "association_core.in_proj_bias"))): (sum(rows) + rows[0],)}


def _layout(*, separate: bool) -> Callable[[Any, Mapping[str, Any]], dialects.Layout]:
    table = {ours: theirs[0 if separate else -1] for ours, theirs in REFERENCE_NAMES.items()}
    return dialects.table_layout(
        {**table, **{f"hopfield/{ours}": f"hopfield.{theirs}" for ours, theirs in table.items()}},
        shapes=dict.fromkeys(("state_patterns", "stored_patterns", "stored_values"), dialects.with_ones(before=1)),
        extra=_spare_rows,
    )


_OWN = r"^(association_core|norm_state_pattern|norm_stored_pattern|norm_pattern_projection)\."
_SEPARATE = r"^(hopfield\.)?association_core\.[qkv]_proj_weight$"
# Projections of one width stand there in one tensor, others (and those of a layer with `pattern_size`) in three.
DIALECTS = tuple(
    dialects.Dialect(
        name="official_separate" if separate else "official",
        origin="github.com/ml-jku/hopfield-layers (hflayers 1.0.2)",
        module=module,
        read=dialects.from_shapes(from_reference),
        marks=(mark, _SEPARATE) if separate else (mark,),
        foreign=foreign if separate else (*foreign, _SEPARATE),
        layout=_layout(separate=separate),
    )
    for module, mark, foreign in (
        (Hopfield, _OWN, (r"^(?!association_core\.|norm_)",)),
        (HopfieldPooling, r"^pooling_weights$", (r"^(?!pooling_weights$|hopfield\.)",)),
        (HopfieldLayer, r"^lookup_weights$", (r"^(?!lookup_weights$|target_weights$|hopfield\.)",)),
    )
    for separate in (False, True)
)

VARIANTS: dict[str, dict[str, Any]] = {
    # A memory without parameters: noisy patterns in, the stored ones out.
    "hopfield_memory": {
        "module": Hopfield,
        "inputs": (jax.ShapeDtypeStruct((1, 1, 64), jnp.float32), jax.ShapeDtypeStruct((1, 256, 64), jnp.float32)),
        "projections": (),
        "beta": 16.0,
        "update_steps": 32,
        "tolerance": 1e-4,
        "state_norm": None,
        "stored_norm": None,
        "value_norm": None,
    },
    "hopfield_pooling_bag": {
        "module": HopfieldBagClassifier,
        "inputs": (jax.ShapeDtypeStruct((1, 16, 8), jnp.float32),),
        "num_classes": 2,
        "features": 32,
        "pooling": HopfieldPooling(Hopfield(num_heads=8, beta=0.25, update_steps=4)),
    },
    "hopfield_prototypes_tabular": {
        "module": HopfieldClassifier,
        "inputs": (jax.ShapeDtypeStruct((1, 30), jnp.float32),),
        "num_classes": 2,
        "features": 32,
        "memory": HopfieldLayer(Hopfield(num_heads=4, learn_beta=True), num_patterns=16, value_features=32),
    },
}
