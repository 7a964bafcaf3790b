"""Tensor field networks: fibers convolved by kernels of radial functions and spherical harmonics, and their channels
mixed point by point.

See `jaxlayers.equivariant.fibers` for what a fiber is.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, ones, zeros
from jaxlayers.core.safe import safe_divide, safe_norm
from jaxlayers.core.types import ActivationFn, Dtype, Initializer
from jaxlayers.equivariant.fibers import (
    Edges,
    Factors,
    Fiber,
    Pairs,
    check_channels,
    check_fiber,
    constrain_fiber,
    kernel_basis,
    over_chunks,
    present,
    products_along,
    radial_inputs,
)
from jaxlayers.nn.multi_head import attention_weights
from jaxlayers.ops.neighbours import gather

# He's variance for each member of a stack of kernels.
stacked_he_uniform = nn.initializers.variance_scaling(2.0, "fan_in", "uniform", batch_axis=(0,))


class FiberLinear(nn.Module):
    """Mix the channels of each degree by a matrix: the self-interaction of tensor field networks.

    out_l = W_l f_l, with f_l `[channels, 2 l + 1]` and W_l `[features_l, channels]` for each degree l.

    Symmetry:
      Exactly equivariant to rotations and reflections of the fiber, of any parity, and to permutations of the points.

    Attributes:
      features: channels of each degree of the output; 0 leaves it out.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the matrices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import FiberLinear
      >>> nodes = {0: jnp.ones((5, 2, 1)), 1: jnp.ones((5, 3, 3))}
      >>> out, _ = FiberLinear((4, 1)).init_with_output(jax.random.key(0), nodes)
      >>> {degree: part.shape for degree, part in out.items()}
      {0: (5, 4, 1), 1: (5, 1, 3)}

    Source:
      Thomas et al., Tensor Field Networks, arXiv:1802.08219, 2018, section 4.1.3; reference code
      FabianFuchsML/se3-transformer-public, `G1x1SE3`.

    Differs:
      A degree that the input lacks is an error, not a missing key.
    """

    features: tuple[int, ...]
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, nodes: Fiber) -> dict[int, Shaped[Array, "..."]]:
        """Mix the channels.

        Args:
          nodes: the fiber; degrees that `features` leaves out are dropped.

        Returns:
          The fiber of `features`.

        Raises:
          ValueError: if the input lacks a degree, or is no fiber.
        """
        check_fiber(nodes)
        check_channels("features", self.features)
        out = {}
        for degree, count in present(self.features):
            if degree not in nodes:
                raise ValueError(
                    f"features={self.features} asks for degree {degree}, which the input of degrees {sorted(nodes)} "
                    "lacks; drop it or give it"
                )
            shape = (nodes[degree].shape[-2], count)
            kernel = self.param(f"kernel_{degree}", self.kernel_init, shape, self.param_dtype)
            dtype = compute_dtype(nodes[degree], kernel, dtype=self.dtype)
            out[degree] = jnp.einsum("...ci,cd->...di", nodes[degree].astype(dtype), kernel.astype(dtype))
        return out


class AttentiveSelfInteraction(nn.Module):
    """Mix the channels of each degree by weights that depend on their inner products.

    out_l = softmax(W leaky_relu(layer_norm(f_l f_l^T)) + b) f_l, with f_l `[channels, 2 l + 1]` and the softmax over
    the input channels: each output channel is a convex combination of them.

    Symmetry:
      Exactly equivariant to rotations and reflections of the fiber, of any parity, and to permutations of the points.

    Attributes:
      features: channels of each degree of the output; 0 leaves it out.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W.
      bias_init: initialiser of b.

    Cost:
      channels^3 features_l multiply-accumulates and as many weights for each degree.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import AttentiveSelfInteraction
      >>> nodes = {1: jnp.ones((5, 3, 3))}
      >>> out, _ = AttentiveSelfInteraction((0, 2)).init_with_output(jax.random.key(0), nodes)
      >>> out[1].shape
      (5, 2, 3)

    Source:
      Fuchs et al., SE(3)-Transformers, NeurIPS 2020, section 3.3, attentive self-interaction; reference code
      FabianFuchsML/se3-transformer-public, `GAttentiveSelfInt`.

    Differs:
      none.
    """

    features: tuple[int, ...]
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, nodes: Fiber) -> dict[int, Shaped[Array, "..."]]:
        """Mix the channels.

        Args:
          nodes: the fiber; degrees that `features` leaves out are dropped.

        Returns:
          The fiber of `features`.

        Raises:
          ValueError: if the input lacks a degree, or is no fiber.
        """
        check_fiber(nodes)
        check_channels("features", self.features)
        out = {}
        for degree, count in present(self.features):
            if degree not in nodes:
                raise ValueError(
                    f"features={self.features} asks for degree {degree}, which the input of degrees {sorted(nodes)} "
                    "lacks; drop it or give it"
                )
            x = nodes[degree]
            products = jnp.einsum("...ci,...di->...cd", x, x)
            products = products.reshape(*products.shape[:-2], -1)
            products = nn.LayerNorm(
                epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name=f"norm_{degree}"
            )(products)
            logits = nn.Dense(
                count * x.shape[-2],
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=f"weights_{degree}",
            )(nn.leaky_relu(products))
            weights = attention_weights(logits.reshape(*logits.shape[:-1], count, x.shape[-2]))
            out[degree] = jnp.einsum("...dc,...ci->...di", weights, x.astype(weights.dtype))
        return out


class FiberNormNonlinearity(nn.Module):
    """Apply a nonlinearity to the length of each channel and keep its direction.

    out = activation(n + b) n / (n^2 + epsilon^2) v for a channel v `[2 l + 1]` of length n, with a learned b for each
    channel: activation(n + b) v / n, but for lengths near epsilon and below, where it goes to zero.

    Symmetry:
      Exactly equivariant to rotations and reflections of the fiber, of any parity, and to permutations of the points.
      A channel that a symmetry of the cloud makes zero stays zero up to rounding: v / n alone would blow its rounding
      errors up to length b and lose every equivariance.

    Attributes:
      epsilon: length below which a channel counts as zero; positive.
      activation_fn: of the biased length.
      dtype: compute dtype; `None` infers it from input and parameters. Lengths are taken in float32 or better.
      param_dtype: dtype of the parameters.
      bias_init: initialiser of b.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import FiberNormNonlinearity
      >>> out, _ = FiberNormNonlinearity().init_with_output(jax.random.key(0), {1: jnp.ones((5, 3, 3))})
      >>> out[1].shape
      (5, 3, 3)

    Source:
      Thomas et al., Tensor Field Networks, 2018, section 4.1.4; reference code
      FabianFuchsML/se3-transformer-public, `GNormBias`.

    Differs:
      The factor n^2 / (n^2 + epsilon^2), which is one to 1e-6 from lengths of 0.1 on; the reference divides by the
      length clipped to 1e-12.
    """

    epsilon: float = 1e-4
    activation_fn: ActivationFn = nn.relu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    bias_init: Initializer = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(self, nodes: Fiber) -> dict[int, Shaped[Array, "..."]]:
        """Apply the nonlinearity.

        Args:
          nodes: the fiber.

        Returns:
          A fiber of the same shape.

        Raises:
          ValueError: if the input is no fiber or epsilon is not positive.
        """
        check_fiber(nodes)
        if not self.epsilon > 0:
            raise ValueError(f"epsilon={self.epsilon} must be positive; set it to what counts as zero length")
        out = {}
        for degree, x in sorted(nodes.items()):
            bias = self.param(f"bias_{degree}", self.bias_init, (x.shape[-2],), self.param_dtype)
            dtype = compute_dtype(x, bias, dtype=self.dtype)
            x = x.astype(at_least_float32(dtype))
            norm = safe_norm(x, keepdims=True)
            size = self.activation_fn(norm + bias.astype(x.dtype)[:, None])
            out[degree] = (size * norm / (jnp.square(norm) + self.epsilon**2) * x).astype(dtype)
        return out


class RadialKernel(nn.Module):
    """Mix tensor products over channels and paths by learned functions of the distance.

    out_l = sum over k, c, J of R_J^{kl}(r, w)[d, c] (K_J f_c), divided by the square root of the number of terms, with
    R a perceptron for every pair of degrees (k, l): two hidden layers with layer norm and ReLU.

    Symmetry:
      Exactly equivariant to rotations, since the distance r and the features w of an edge are invariant.

    Attributes:
      features: channels of each degree of the output; 0 leaves it out.
      hidden_features: width of the hidden layers.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the stacked kernels `[pairs, in, out]`.
      bias_init: initialiser of the biases.

    Cost:
      For each edge sum over (k, l) of channels_k features_l (2 min(k, l) + 1) (hidden_features + 2 l + 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import RadialKernel
      >>> products = {(0, 1): jnp.ones((9, 4, 1, 3)), (1, 1): jnp.ones((9, 2, 3, 3))}
      >>> out, _ = RadialKernel((0, 6)).init_with_output(jax.random.key(0), products, jnp.ones((9, 1)))
      >>> out[1].shape
      (9, 6, 3)

    Source:
      Thomas et al., Tensor Field Networks, 2018, equation 8; Fuchs et al., SE(3)-Transformers, NeurIPS 2020, equation
      8; reference code FabianFuchsML/se3-transformer-public, `RadialFunc` and `PairwiseConv`.

    Differs:
      The perceptrons of all pairs are evaluated as one stack. Divided by the square root of the number of terms, so
      that features of variance one stay so.
    """

    features: tuple[int, ...]
    hidden_features: int = 32
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = stacked_he_uniform
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, products: Pairs | Factors, radial_inputs: Float[Array, "*edges inputs"]
    ) -> dict[int, Shaped[Array, "..."]]:
        """Mix the products.

        Args:
          products: (k, l) to `[*edges, channels, paths, 2 l + 1]`, from `tensor_products`; or its factors, which a
            Pallas kernel then multiplies and mixes.
          radial_inputs: invariants of each edge, such as the distance.

        Returns:
          Degree l to `[*edges, features_l, 2 l + 1]`.

        Raises:
          ValueError: if there are no products for a degree of `features`, or a size is not positive.
        """
        check_channels("features", self.features)
        if self.hidden_features < 1:
            raise ValueError(f"hidden_features={self.hidden_features} must be positive; set it")
        wanted = dict(present(self.features))
        if isinstance(products, Factors):
            parts: Mapping[Any, Any] = products.sources
            terms = {pair: parts[pair[0]].shape[-2] * x.shape[-3] for pair, x in products.basis.items()}
        else:
            parts = products
            terms = {pair: x.shape[-3] * x.shape[-2] for pair, x in products.items()}
        pairs = sorted(pair for pair in terms if pair[1] in wanted)
        lacking = set(wanted) - {degree for _, degree in pairs}
        if lacking:
            raise ValueError(
                f"features={self.features} asks for degree {min(lacking)}, but the products lead to degrees "
                f"{sorted({degree for _, degree in terms})} only; set out_degrees of tensor_products"
            )
        dtype = compute_dtype(radial_inputs, *parts.values(), dtype=self.dtype)
        dtype = dtype if self.dtype is not None else jnp.promote_types(dtype, self.param_dtype)
        hidden = radial_inputs.astype(dtype)[..., None, :]
        for layer in range(2):
            shape = (len(pairs), hidden.shape[-1], self.hidden_features)
            kernel = self.param(f"hidden_kernel_{layer}", self.kernel_init, shape, self.param_dtype)
            bias = self.param(f"hidden_bias_{layer}", self.bias_init, (len(pairs), shape[-1]), self.param_dtype)
            scale = self.param(f"norm_scale_{layer}", ones(), (len(pairs), shape[-1]), self.param_dtype)
            shift = self.param(f"norm_bias_{layer}", zeros(), (len(pairs), shape[-1]), self.param_dtype)
            hidden = jnp.broadcast_to(hidden, (*hidden.shape[:-2], len(pairs), hidden.shape[-1]))
            hidden = jnp.einsum("...pi,pih->...ph", hidden, kernel.astype(dtype)) + bias.astype(dtype)
            hidden = nn.relu(_standardised(hidden) * scale.astype(dtype) + shift.astype(dtype))
        widths = [wanted[degree] * terms[k, degree] for k, degree in pairs]
        # One array for all pairs, in their order: many small ones take long to initialise and to compile.
        last = (self.hidden_features, sum(widths))
        kernel = self.param("kernel", _single(self.kernel_init), last, self.param_dtype).astype(dtype)
        bias = self.param("bias", self.bias_init, last[1:], self.param_dtype).astype(dtype)
        if isinstance(products, Factors):
            basis = {pair: products.basis[pair] for pair in pairs}
            # It takes over a second to import.
            from jaxlayers.kernels import pallas_edges

            out = pallas_edges.edge_messages(hidden, kernel, bias, basis, products.sources, wanted)
        else:
            out = _mixed(hidden, kernel, bias, {pair: products[pair].astype(dtype) for pair in pairs}, wanted)
        for degree, mixed in out.items():
            out[degree] = mixed / math.sqrt(sum(terms[pair] for pair in pairs if pair[1] == degree))
        return out


def _mixed(
    hidden: jax.Array, kernel: jax.Array, bias: jax.Array, products: Mapping[tuple[int, int], Any], wanted: Any
) -> dict[int, Any]:
    """Return what `pallas_edges.edge_messages` does, from the products."""
    out: dict[int, Any] = {}
    start = 0
    for index, ((_, degree), product) in enumerate(sorted(products.items())):
        size = product.shape[-3] * product.shape[-2]
        columns = slice(start, start + wanted[degree] * size)
        start = columns.stop
        radial = hidden[..., index, :] @ kernel[:, columns] + bias[columns]
        radial = radial.reshape(*radial.shape[:-1], wanted[degree], size)
        mixed = radial @ product.reshape(*product.shape[:-3], size, product.shape[-1])
        out[degree] = out[degree] + mixed if degree in out else mixed
    return out


class TensorFieldConv(nn.Module):
    """Convolve a fiber over neighbours by equivariant kernels: one layer of a tensor field network.

    out_l,i = mean over neighbours j of sum_k W^{lk}(x_j - x_i) f_k,j + V_l f_l,i, with W^{lk}(x) = sum_J R_J^{kl}(|x|)
    K_J(x) from `kernel_basis` and learned radial functions R.

    Symmetry:
      Exactly equivariant to rotations, translations and permutations. Reflections are not respected: paths of odd
      k + l + J, such as a cross product, make axial features of polar ones.

    Attributes:
      features: channels of each degree of the output; 0 leaves it out.
      self_interaction: add V_l f_l for the degrees that input and output share.
      hidden_features: width of the radial perceptrons.
      chunk: points whose edges are looked at together, see `over_chunks`; `None` = all.
      dtype: compute dtype; `None` infers it from input and parameters. Harmonics are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the radial kernels.
      bias_init: initialiser of the radial biases.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.fibers import edges_of
      >>> from jaxlayers.equivariant.tensor_field import TensorFieldConv
      >>> from jaxlayers.ops.neighbours import k_nearest
      >>> x = jax.random.normal(jax.random.key(0), (5, 3))
      >>> nodes, edges = {0: jnp.ones((5, 2, 1))}, edges_of(x, k_nearest(x, 3))
      >>> out, _ = TensorFieldConv((4, 2)).init_with_output(jax.random.key(1), nodes, edges)
      >>> {degree: part.shape for degree, part in out.items()}
      {0: (5, 4, 1), 1: (5, 2, 3)}

    Source:
      Thomas et al., Tensor Field Networks, arXiv:1802.08219, 2018; reference code
      FabianFuchsML/se3-transformer-public, `GConvSE3`.

    Differs:
      A point without neighbours keeps V_l f_l; the reference gives it zero.
    """

    features: tuple[int, ...]
    self_interaction: bool = True
    hidden_features: int = 32
    chunk: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = stacked_he_uniform
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, nodes: Fiber, edges: Edges) -> dict[int, Shaped[Array, "..."]]:
        """Convolve.

        Args:
          nodes: the fiber.
          edges: from `edges_of`.

        Returns:
          The fiber of `features`.

        Raises:
          ValueError: if the shapes do not fit, or a size is not positive.
        """
        check_fiber(nodes, edges)
        check_channels("features", self.features)
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        body = _Convolution(
            self.features,
            self.hidden_features,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="messages",
            **common,
        )
        out = over_chunks(body, nodes, edges, {}, self.chunk)
        shared = tuple(count if degree in nodes else 0 for degree, count in enumerate(self.features))
        if self.self_interaction and any(shared):
            for degree, part in FiberLinear(shared, name="self", **common)(nodes).items():
                out[degree] = out[degree] + part
        return constrain_fiber(out)


class _Convolution(nn.Module):
    features: tuple[int, ...]
    hidden_features: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, nodes: Fiber, edges: Edges, here: Fiber) -> dict[int, Shaped[Array, "..."]]:
        sources = {degree: gather(x, edges.neighbours.indices) for degree, x in nodes.items()}
        dtype = self.dtype or jnp.promote_types(compute_dtype(*sources.values()), self.param_dtype)
        products = products_along(sources, edges, self.features, dtype)
        kernel = RadialKernel(
            self.features,
            self.hidden_features,
            self.dtype,
            self.param_dtype,
            self.kernel_init,
            self.bias_init,
            name="kernel",
        )
        messages = kernel(products, radial_inputs(edges))
        mask = edges.neighbours.mask
        count = jnp.sum(mask, axis=-1)[..., None, None]
        return {
            degree: safe_divide(jnp.sum(jnp.where(mask[..., None, None], part, 0), axis=-3), count.astype(part.dtype))
            for degree, part in messages.items()
        }


def _single(init: Initializer) -> Initializer:
    """Return the initialiser of one kernel from that of a stack of them."""
    return lambda key, shape, dtype: init(key, (1, *shape), dtype)[0]


def _standardised(x: jax.Array) -> jax.Array:
    """Return `x` with mean zero and variance one over the last axis, computed in float32 or better."""
    wide = x.astype(at_least_float32(x.dtype))
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


# Reference checkpoints ------------------------------------------------------------------------------------------------

_SAVE = (
    "save get_basis of the reference for some directions as basis.* and basis.direction with the weights, where they "
    "were trained (see jaxlayers.equivariant.tensor_field.basis_factors)"
)


def basis_factors(tensors: Mapping[str, Any]) -> dict[tuple[int, int], np.ndarray]:
    """Return what the reference's radial weights are to be multiplied by for our kernels: signs and sizes.

    Its kernels K_J between degrees k and l come from singular vectors, whose signs differ from machine to machine; they
    lie in its `cache/trans_Q`, not in a state dict, and a weight means nothing without them. So save them with it,
    where the model was trained:

        direction = torch.tensor([[0.3, -0.5, 0.8]])
        basis = get_basis(types.SimpleNamespace(edata={"d": direction}), num_degrees - 1, False)
        basis = {"direction": direction, **basis}
        torch.save({**model.state_dict(), **{f"basis.{name}": part for name, part in basis.items()}}, "weights.pt")

    Each K_J must be ours (`kernel_basis`) of the same direction up to a factor; coordinates of features are the same in
    every degree. The factor counts (-1)^J more, since our vectors point to the neighbour and theirs from it.

    Args:
      tensors: arrays by name, of which those of `basis.` are read: `basis.direction` `[n, 3]`, and `basis.k,l` of any
        shape `[n, ..., 2 l + 1, ..., 2 k + 1, paths]`.

    Returns:
      (k, l) to one factor for each of J = |k - l| ... k + l.

    Raises:
      ValueError: if there is no basis, or one that does not fit ours.
    """
    names = {
        (int(found[1]), int(found[2])): name
        for name in tensors
        if (found := re.fullmatch(r"basis\.(\d+),(\d+)", name)) is not None
    }
    if not names or "basis.direction" not in tensors:
        raise ValueError(
            "weights of the reference must come with the basis that they are relative to, whose signs are in no state "
            f"dict; got {sorted(name for name in tensors if name.startswith('basis.'))} of it; {_SAVE}"
        )
    directions = np.asarray(tensors["basis.direction"], np.float64)
    if directions.shape[-1:] != (3,) or not np.all(np.linalg.norm(directions, axis=-1) > 0):
        raise ValueError(
            f"basis.direction must be vectors [n, 3], none of them zero; got {directions.tolist()}; {_SAVE}"
        )
    directions = directions.reshape(-1, 3)
    degrees = sorted({degree for pair in names for degree in pair})
    ours = kernel_basis(jnp.asarray(directions, jnp.float32), degrees, degrees)
    factors = {}
    for (k, degree), name in sorted(names.items()):
        wanted = np.moveaxis(np.asarray(ours[k, degree], np.float64), -3, -1)
        given = np.asarray(tensors[name], np.float64)
        if given.size != wanted.size:
            raise ValueError(
                f"{name} must have the entries of {wanted.shape}, kernels of {len(directions)} directions; got shape "
                f"{given.shape}; {_SAVE}"
            )
        given = given.reshape(wanted.shape)
        found = np.sum(given * wanted, axis=(0, 1, 2)) / np.sum(np.square(wanted), axis=(0, 1, 2))
        error = np.max(np.abs(given - found * wanted), axis=(0, 1, 2)) / np.max(np.abs(wanted), axis=(0, 1, 2))
        # In float32 it is 1e-6.
        if not np.all(error <= 1e-3 * np.abs(found)) or not np.all(found):
            raise ValueError(
                f"{name} must be our kernels of basis.direction up to a factor for each J; it is off by "
                f"{np.round(error, 4).tolist()} with factors {np.round(found, 4).tolist()}; {_SAVE}"
            )
        factors[k, degree] = found * (-1.0) ** np.arange(abs(k - degree), k + degree + 1)
    return factors


def radial_kernel_from_reference(
    tensors: Mapping[str, Any],
    prefix: str,
    in_channels: Mapping[int, int],
    features: Sequence[int],
    factors: Mapping[tuple[int, int], np.ndarray],
    *,
    appended: bool = False,
) -> dict[str, np.ndarray]:
    """Return the parameters of a `RadialKernel` from the reference's networks of all pairs of degrees.

    Args:
      tensors: arrays by the reference's names.
      prefix: of the names, before `kernel_unary`.
      in_channels: of each degree of the input that there is.
      features: of the `RadialKernel`.
      factors: (k, l) to the factors of its last layer's weights, one for each J, see `basis_factors`.
      appended: whether the last vector of the input is that of the edge (`relative="concatenate"`), which points the
        other way in the reference.

    Returns:
      The parameters, in the dtype of the tensors.

    Raises:
      ValueError: if the shapes of the last layers do not fit.
    """
    named = radial_networks(prefix, in_channels, features)
    nets = named.values()
    params: dict[str, np.ndarray] = {}
    for layer, (linear, norm) in enumerate(((0, 1), (3, 4))):
        params[f"hidden_kernel_{layer}"] = np.stack([np.asarray(tensors[f"{net}.{linear}.weight"]).T for net in nets])
        params[f"hidden_bias_{layer}"] = np.stack([tensors[f"{net}.{linear}.bias"] for net in nets])
        params[f"norm_scale_{layer}"] = np.stack([tensors[f"{net}.{norm}.bn.weight"] for net in nets])
        params[f"norm_bias_{layer}"] = np.stack([tensors[f"{net}.{norm}.bn.bias"] for net in nets])
    kernels, biases = [], []
    for (k, degree), net in named.items():
        weight, bias = np.asarray(tensors[f"{net}.6.weight"]), np.asarray(tensors[f"{net}.6.bias"])
        # Ours are divided by the root of the number of terms.
        terms = sum(count * (2 * min(other, degree) + 1) for other, count in in_channels.items())
        scale = np.tile(factors[k, degree] * math.sqrt(terms), (features[degree], in_channels[k], 1))
        if appended and k == 1:
            scale[:, -1] *= -1
        if bias.shape != (scale.size,) or weight.shape[:1] != bias.shape:
            raise ValueError(
                f"{net}.6 must have {scale.size} outputs for {in_channels[k]} channels to {features[degree]}; got "
                f"weights {weight.shape} and biases {bias.shape}; set the model's fields as the reference has them"
            )
        kernels.append((weight.T * scale.reshape(-1)).astype(weight.dtype))
        biases.append((bias * scale.reshape(-1)).astype(bias.dtype))
    return {**params, "kernel": np.concatenate(kernels, axis=1), "bias": np.concatenate(biases)}


def radial_networks(prefix: str, in_channels: Mapping[int, int], features: Sequence[int]) -> dict[tuple[int, int], str]:
    """Return the reference's names of the radial networks of all pairs of degrees, in our order."""
    return {
        (k, degree): f"{prefix}kernel_unary.({k},{degree}).rp.net"
        for k in sorted(in_channels)
        for degree, _ in present(features)
    }
