"""SE(3)-Transformer: attention over neighbours between features of every degree, in one pass or moving the points."""

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
from jaxtyping import Array, Bool, Float, Shaped

from jaxlayers.core import axes, dialects
from jaxlayers.core.dtypes import at_least_float32, compute_dtype
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.safe import safe_norm
from jaxlayers.core.types import Dtype, Initializer, ModuleFactory
from jaxlayers.equivariant.fibers import (
    Edges,
    Fiber,
    check_channels,
    check_fiber,
    constrain_fiber,
    edges_of,
    fiber_invariants,
    over_chunks,
    pool_fiber,
    present,
    products_along,
    radial_inputs,
)
from jaxlayers.equivariant.tensor_field import (
    FiberLinear,
    FiberNormNonlinearity,
    RadialKernel,
    basis_factors,
    radial_kernel_from_reference,
    radial_networks,
    stacked_he_uniform,
)
from jaxlayers.nn.multi_head import attention_weights
from jaxlayers.ops.neighbours import Neighbours, everyone, gather, k_nearest

RELATIVE = ("none", "add", "subtract", "concatenate")


class Moved(NamedTuple):
    """What an `SE3Transformer` returns.

    Attributes:
      positions: `[*batch, points, 3]`, moved by the first vector of each iteration; zero where padded.
      features: degree to features `[*batch, points, channels, 2 degree + 1]`; zero where padded.
    """

    positions: Shaped[Array, "..."]
    features: dict[int, Shaped[Array, "..."]]


class SE3Attention(nn.Module):
    """Attend over neighbours with equivariant keys and values and invariant weights.

    k_ij = sum_k W_K(x_j - x_i) f_j, v_ij = sum_k W_V(x_j - x_i) f_j, q_i = W_Q f_i;
    a_ij = softmax over j of <q_i, k_ij> / sqrt(n), the product taken over all degrees and n the size of the key fiber;
    out_i = project(sum_j a_ij v_ij, f_i): attention beside the input, channel by channel, and mixed by `project`.

    Symmetry:
      Exactly equivariant to rotations, translations and permutations: SE(3) and S_n. Reflections are not respected,
      since kernels of odd k + l + J make axial features of polar ones; with scalars only they are.

    Attributes:
      features: channels of each degree of the output; 0 leaves it out.
      num_heads: heads, which split the channels of every degree.
      bottleneck: keys and values have `features // bottleneck` channels.
      relative: what to do with the vector x_j - x_i besides its kernels: `"add"` it to the first vector of each
        neighbour, `"subtract"` it from the first of several (what the reference calls add), `"concatenate"` it as one
        more vector, or `"none"`.
      project: takes channels and dtypes, makes the layer that mixes channels at the end: `FiberLinear` or
        `AttentiveSelfInteraction`.
      hidden_features: width of the radial perceptrons.
      chunk: points whose edges are looked at together, see `over_chunks`; `None` = all.
      dtype: compute dtype; `None` infers it from input and parameters. Harmonics and softmax are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the radial kernels.
      bias_init: initialiser of the radial biases.

    Cost:
      That of `RadialKernel` for keys and for values. Memory for each edge: channels_k features_l (2 min(k, l) + 1) over
      all pairs of degrees (k, l), of all edges or those of one chunk.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.se3_transformer import SE3Attention
      >>> from jaxlayers.equivariant.fibers import edges_of
      >>> from jaxlayers.ops.neighbours import everyone
      >>> x = jax.random.normal(jax.random.key(0), (5, 3))
      >>> nodes, edges = {0: jnp.ones((5, 2, 1))}, edges_of(x, everyone(5))
      >>> jax.eval_shape(SE3Attention((8, 4)).init_with_output, jax.random.key(1), nodes, edges)[0][1].shape
      (5, 4, 3)

    Source:
      Fuchs et al., SE(3)-Transformers: 3D Roto-Translation Equivariant Attention Networks, NeurIPS 2020, equations 9 to
      11; reference code FabianFuchsML/se3-transformer-public, `GSE3Res`.

    Differs:
      Vectors point to the neighbour (x_j - x_i), in the reference from it: the sign is absorbed by weights.
      With `relative="add"`, new here, it is added, to a lone vector channel too. A point without neighbours gets zero
      attention.
    """

    features: tuple[int, ...]
    num_heads: int = 1
    bottleneck: int = 4
    relative: str = "none"
    project: ModuleFactory = FiberLinear
    hidden_features: int = 32
    chunk: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = stacked_he_uniform
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(self, nodes: Fiber, edges: Edges) -> dict[int, Shaped[Array, "..."]]:
        """Attend.

        Args:
          nodes: the fiber.
          edges: from `edges_of`.

        Returns:
          The fiber of `features`.

        Raises:
          ValueError: if the shapes do not fit, heads do not divide channels, or an option is unknown.
        """
        check_fiber(nodes, edges)
        check_channels("features", self.features)
        if self.relative not in RELATIVE:
            raise ValueError(f"relative={self.relative!r} is unknown; use one of {RELATIVE}")
        if self.bottleneck < 1 or self.num_heads < 1:
            raise ValueError(f"bottleneck={self.bottleneck} and num_heads={self.num_heads} must be positive; set them")
        values = tuple(count // self.bottleneck for count in self.features)
        for count, value in zip(self.features, values, strict=True):
            if count and (not value or value % self.num_heads):
                raise ValueError(
                    f"features={self.features} // bottleneck={self.bottleneck} = {values} must be divisible by "
                    f"num_heads={self.num_heads} and not zero where features are not; set one of them"
                )
        # Queries are projections of the input and have its degrees.
        keys = tuple(count if degree in nodes else 0 for degree, count in enumerate(values))
        if not any(keys):
            raise ValueError(
                f"features={self.features} must share a degree with the input of degrees {sorted(nodes)}, for queries "
                "to meet keys in; add one"
            )
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        query = FiberLinear(keys, name="query", **common)(nodes)
        body = _EdgeAttention(
            keys,
            values,
            self.num_heads,
            self.relative,
            self.hidden_features,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="edges",
            **common,
        )
        out = over_chunks(body, nodes, edges, query, self.chunk)
        joined = {
            degree: jnp.concatenate([x, nodes[degree].astype(x.dtype)], axis=-2) if degree in nodes else x
            for degree, x in out.items()
        }
        return constrain_fiber(self.project(self.features, name="project", **common)(joined))


class _EdgeAttention(nn.Module):
    """Keys, values, weights and their sum, for some of the points."""

    keys: tuple[int, ...]
    values: tuple[int, ...]
    num_heads: int
    relative: str
    hidden_features: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, nodes: Fiber, edges: Edges, query: Fiber) -> dict[int, Shaped[Array, "..."]]:
        sources = {degree: gather(x, edges.neighbours.indices) for degree, x in nodes.items()}
        vectors = edges.vectors[..., None, :]
        if self.relative == "concatenate":
            present_vectors = [sources[1], vectors.astype(sources[1].dtype)] if 1 in sources else [vectors]
            sources[1] = jnp.concatenate(present_vectors, axis=-2)
        elif self.relative == "add" and 1 in sources:
            sources[1] = _first_moved(sources[1], vectors)
        elif self.relative == "subtract" and 1 in sources and sources[1].shape[-2] > 1:
            sources[1] = _first_moved(sources[1], -vectors)
        dtype = self.dtype or jnp.promote_types(compute_dtype(*sources.values()), self.param_dtype)
        products = products_along(sources, edges, self.values, dtype)
        radial = radial_inputs(edges)
        kernels = (self.hidden_features, self.dtype, self.param_dtype, self.kernel_init, self.bias_init)
        key = self._heads(RadialKernel(self.keys, *kernels, name="key")(products, radial))
        value = RadialKernel(self.values, *kernels, name="value")(products, radial)
        queries = self._heads(query)
        size = sum(count * (2 * degree + 1) for degree, count in present(self.keys))
        logits = jnp.einsum("...hc,...khc->...hk", queries, key) / math.sqrt(size)
        weights = attention_weights(logits, mask=edges.neighbours.mask[..., None, :])
        out = {}
        for degree, x in value.items():
            split = x.reshape(*x.shape[:-2], self.num_heads, -1, x.shape[-1])
            summed = jnp.einsum("...hk,...khci->...hci", weights.astype(x.dtype), split)
            out[degree] = summed.reshape(*summed.shape[:-3], -1, summed.shape[-1])
        return out

    def _heads(self, fiber: Fiber) -> jax.Array:
        """Return all degrees in a row for each head, `[..., heads, entries]`."""
        parts = [x.reshape(*x.shape[:-2], self.num_heads, -1) for _, x in sorted(fiber.items())]
        return jnp.concatenate(parts, axis=-1)


def _first_moved(x: jax.Array, vectors: jax.Array) -> jax.Array:
    return jnp.concatenate([x[..., :1, :] + vectors.astype(x.dtype), x[..., 1:, :]], axis=-2)


class SE3Transformer(nn.Module):
    """Let points attend to their neighbours, and move them: the SE(3)-Transformer, once or several times in a row.

    Each iteration has `depth` layers of `SE3Attention`, each followed by a nonlinearity; the last one ends in one more
    attention, to `out_features`. After each iteration x_i <- x_i + the first vector of point i; distances, directions
    and the basis of the kernels are then those of the moved points, and gradients run through them. Features are handed
    from iteration to iteration. One iteration is the single-pass model.

    Symmetry:
      Exactly equivariant to rotations, translations and permutations, SE(3) and S_n, after every iteration: positions
      move along, features of degree l turn by D_l, degree 0 is invariant. Not to reflections: kernels use every path,
      also those that make axial features of polar ones, so that chirality can be told. Lists found by `k_nearest` jump
      where two points are equally far.

    Attributes:
      features: channels of each degree of the hidden layers, from degree 0 on; 0 leaves it out.
      out_features: channels of each degree of the output.
      depth: attention layers of each iteration; at least 1.
      iterations: how often points are moved; at least 1. Each iteration has its own parameters.
      num_heads: heads; the output uses the largest common divisor of it and `out_features`.
      bottleneck: keys and values have `features // bottleneck` channels; in the output they have `out_features`.
      num_neighbours: size of the lists of nearest points, found anew in each iteration; `None` = all other points. Of
        no effect where lists are given.
      relative: see `SE3Attention`.
      project: see `SE3Attention`.
      out_project: the same in the last attention, that of the output; `None` = `project`.
      edge_features: called as `edge_features(distances, edges)` in each iteration, with distances
        `[*batch, points, k, 1]`, and returns the invariants `[*batch, points, k, features]` of the pairs; `None` uses
        the edges given.
      basis_gradient: whether gradients with respect to positions run through the harmonics. Without, they still run
        through distances.
      chunk: points whose edges are looked at together, see `jaxlayers.equivariant.fibers.over_chunks`, and whose
        neighbours are found together; `None` = all at once, and the basis is made once for all layers.
      dtype: compute dtype; `None` infers it from input and parameters. Positions, harmonics and softmax are in float32
        or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the radial kernels.
      bias_init: initialiser of the radial biases.

    Cost:
      See `SE3Attention`; docs/decisions/chunked_edges.md has measured memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import SE3Transformer
      >>> model = SE3Transformer(features=(8, 8), out_features=(3, 1), depth=1, iterations=2)
      >>> x, nodes = jax.random.normal(jax.random.key(0), (5, 3)), {0: jnp.ones((5, 1, 1))}
      >>> out = jax.eval_shape(model.init_with_output, jax.random.key(1), x, nodes)[0]
      >>> out.positions.shape, out.features[0].shape
      ((5, 3), (5, 3, 1))

    Source:
      Fuchs et al., SE(3)-Transformers: 3D Roto-Translation Equivariant Attention Networks, NeurIPS 2020; Fuchs,
      Wagstaff, Dauparas, Posner, Iterative SE(3)-Transformers, GSI 2021. Reference code
      FabianFuchsML/se3-transformer-public, commit a9010df, `SE3TransformerIterative` and `SE3Transformer`.

      Its weights are read by `from_reference` from a state dict and the basis of its kernels, which must be saved with
      it (see `jaxlayers.equivariant.tensor_field.basis_factors`).

    Differs:
      See `SE3Attention`, `FiberNormNonlinearity` and `RadialKernel`. The nearest points are those nearest in space, in
      the reference those of the largest interaction.
    """

    features: tuple[int, ...] = (16, 16, 16)
    out_features: tuple[int, ...] = (0, 1)
    depth: int = 4
    iterations: int = 1
    num_heads: int = 1
    bottleneck: int = 4
    num_neighbours: int | None = None
    relative: str = "add"
    project: ModuleFactory = FiberLinear
    out_project: ModuleFactory | None = None
    edge_features: Callable[[Array, Array | None], Array] | None = None
    basis_gradient: bool = True
    chunk: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = stacked_he_uniform
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points 3"],
        features: Fiber | None = None,
        *,
        edges: Float[Array, "*batch points k edge_features"] | None = None,
        neighbours: Neighbours | None = None,
        mask: Bool[Array, "*batch points"] | None = None,
    ) -> Moved:
        """Move points and return their features.

        Two points in one place have no direction: they see each other by kernels of J = 0 alone. A point without
        neighbours goes on by its own features. Values and gradients stay finite in both cases, and on a line, in a
        plane, or for a single point. A NaN coordinate makes its point NaN, and every point that has it for a neighbour.

        Args:
          positions: in any unit.
          features: degree to `[*batch, points, channels, 2 degree + 1]`; `None` = one scalar, 1.
          edges: invariants of each pair of the lists, see `pair_features`. They need lists that do not change:
            `neighbours`, or all other points by index (`num_neighbours=None`).
          neighbours: lists to use in all iterations; `None` finds them.
          mask: True = a point, False = padding, which nobody attends to and whose output is zero.

        Returns:
          Moved positions, and the features of `out_features`.

        Raises:
          ValueError: if the shapes do not fit, or a size is not positive.
        """
        self._check(positions, features, edges, neighbours)
        positions = positions.astype(at_least_float32(positions.dtype))
        nodes: Fiber = _ones(positions) if features is None else features
        if mask is not None:
            if mask.shape != positions.shape[:-1]:
                raise ValueError(
                    f"mask of shape {mask.shape} must be [*batch, points] of positions {positions.shape}; reshape it"
                )
            positions = jnp.where(mask[..., None], positions, 0)
            nodes = _masked(nodes, mask)
        dtype = compute_dtype(positions, *nodes.values(), dtype=self.dtype)
        nodes = {degree: x.astype(dtype) for degree, x in nodes.items()}
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attention: dict[str, Any] = {
            "relative": self.relative,
            "chunk": self.chunk,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        last = max(len(self.features), len(self.out_features), 2, *(degree + 1 for degree in nodes)) - 1
        for iteration in range(self.iterations):
            lists = self._neighbours(positions, neighbours, mask)
            invariants = edges
            if self.edge_features is not None:
                distances = safe_norm(edges_of(positions, lists).vectors, keepdims=True)
                invariants = self.edge_features(distances, edges)
            pairs = edges_of(
                positions,
                lists,
                invariants,
                max_degree=None if self.chunk is not None else last,
                basis_gradient=self.basis_gradient,
            )
            for layer in range(self.depth):
                name = f"attention_{iteration}_{layer}"
                block = SE3Attention(
                    self.features,
                    self.num_heads,
                    self.bottleneck,
                    project=self.project,
                    name=name,
                    **attention,
                    **common,
                )
                nodes = block(nodes, pairs)
                nodes = FiberNormNonlinearity(name=f"nonlinearity_{iteration}_{layer}", **common)(nodes)
            if iteration == self.iterations - 1:
                heads = math.gcd(self.num_heads, *self.out_features)
                project = self.project if self.out_project is None else self.out_project
                out = SE3Attention(self.out_features, heads, 1, project=project, name="out", **attention, **common)
                nodes = out(nodes, pairs)
            if mask is not None:
                nodes = _masked(nodes, mask)
            if 1 in nodes:
                positions = positions + nodes[1][..., 0, :].astype(positions.dtype)
            positions = axes.constrain_last(positions, axes.BATCH, axes.NODES, None)
            self.sow("intermediates", "positions", positions)
        return Moved(positions, constrain_fiber(nodes))

    def _neighbours(self, positions: jax.Array, neighbours: Neighbours | None, mask: jax.Array | None) -> Neighbours:
        if neighbours is not None:
            return neighbours
        count = positions.shape[-2]
        if self.num_neighbours is not None:
            return k_nearest(positions, min(self.num_neighbours, max(count - 1, 1)), mask=mask, chunk=self.chunk)
        if count == 1:
            # A list of no entries is none that a softmax can be taken over.
            return Neighbours(jnp.zeros((*positions.shape[:-1], 1), int), jnp.zeros((*positions.shape[:-1], 1), bool))
        return everyone(jnp.ones(positions.shape[:-1], bool) if mask is None else mask)

    def _check(
        self, positions: jax.Array, features: Any, edges: jax.Array | None, neighbours: Neighbours | None
    ) -> None:
        if positions.ndim < 2 or positions.shape[-1] != 3 or positions.shape[-2] == 0:
            raise ValueError(f"positions of shape {positions.shape} must be [*batch, points, 3]; reshape them")
        for name in ("features", "out_features"):
            check_channels(name, getattr(self, name))
        if self.depth < 1 or self.iterations < 1:
            raise ValueError(f"depth={self.depth} and iterations={self.iterations} must be positive; set them")
        if self.iterations > 1 and (len(self.features) < 2 or not self.features[1]):
            raise ValueError(
                f"iterations={self.iterations} needs vectors to move points by, but features={self.features} has none; "
                "give it channels of degree 1"
            )
        if self.num_neighbours is not None and self.num_neighbours < 1:
            raise ValueError(f"num_neighbours={self.num_neighbours} must be positive, or None for all; set it")
        if edges is not None and neighbours is None and self.num_neighbours is not None:
            raise ValueError(
                f"edges of shape {edges.shape} belong to lists, but num_neighbours={self.num_neighbours} finds lists "
                "of its own; give neighbours, or set num_neighbours=None"
            )
        if features is not None:
            check_fiber(features)
        for degree, x in ({} if features is None else features).items():
            if x.shape[:-2] != positions.shape[:-1]:
                raise ValueError(
                    f"features of degree {degree} of shape {x.shape} must be [*batch, points, channels, 2 degree + 1] "
                    f"of positions {positions.shape}; reshape them"
                )


class SE3Particles(nn.Module):
    """Predict where charged particles go by an `SE3Transformer`.

    The charge of a particle is a scalar, its velocity a vector, and the product of two charges a feature of their pair;
    the positions that come out are those of the transformer.

    Symmetry:
      That of `SE3Transformer`: exactly equivariant to rotations, translations and permutations.

    Attributes:
      backbone: an `SE3Transformer`, whose `out_features` begin with a vector.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import SE3Particles, SE3Transformer
      >>> model = SE3Particles(SE3Transformer(features=(8, 8), depth=2))
      >>> inputs = jnp.ones((2, 5, 3)), jnp.ones((2, 5, 3)), jnp.ones((2, 5, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)[0].shape
      (2, 5, 3)

    Source:
      Fuchs et al., SE(3)-Transformers, NeurIPS 2020, section 4.1; reference code
      FabianFuchsML/se3-transformer-public, `experiments/nbody/nbody_models.py`.

    Differs:
      Positions only: the reference also predicts velocities. Charges are scalars of the particles too.
    """

    backbone: SE3Transformer

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch n 3"],
        velocities: Float[Array, "*batch n 3"],
        charges: Float[Array, "*batch n charges"],
        *,
        mask: Bool[Array, "*batch n"] | None = None,
    ) -> Float[Array, "*batch n 3"]:
        """Predict positions.

        Args:
          positions: in any unit.
          velocities: in any unit.
          charges: one or more invariant numbers of each particle; pairs see their products.
          mask: True = a particle, False = padding.

        Returns:
          Predicted positions; zero where padded.

        Raises:
          ValueError: if the shapes do not fit, or the backbone finds lists of its own.
        """
        if positions.shape != velocities.shape or positions.shape[:-1] != charges.shape[:-1] or positions.ndim < 2:
            raise ValueError(
                f"positions {positions.shape}, velocities {velocities.shape} and charges {charges.shape} must be "
                "[*batch, n, 3] twice and [*batch, n, charges]; reshape them"
            )
        lists = everyone(positions.shape[-2]) if mask is None else everyone(mask)
        indices, found = (jnp.broadcast_to(x, (*positions.shape[:-1], x.shape[-1])) for x in lists[:2])
        products = gather(charges, indices) * charges[..., :, None, :]
        features = {0: charges[..., None], 1: velocities[..., None, :]}
        # Where padded, products may be anything, also NaN.
        edges = jnp.where(found[..., None], products, 0)
        return self.backbone(
            positions, features, edges=edges, neighbours=Neighbours(indices, found), mask=mask
        ).positions


class SE3Classifier(nn.Module):
    """Score a point cloud: an invariant read-out of an `SE3Transformer`.

    logits = W h + b, with h the scalars and the norms of all other channels of the mean over points of the features.

    Symmetry:
      Exactly invariant to rotations, translations and permutations. Chirality can be told.

    Attributes:
      backbone: an `SE3Transformer`; its `out_features` are what is pooled.
      num_classes: number of scores; positive.
      dtype: compute dtype of the head; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W.
      bias_init: initialiser of b.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant import SE3Classifier, SE3Transformer
      >>> model = SE3Classifier(SE3Transformer(features=(8, 8), out_features=(8, 4), depth=1), num_classes=3)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 3)

    Source:
      Fuchs et al., SE(3)-Transformers, NeurIPS 2020, section 4.2.

    Differs:
      The reference pools scalars only and has a perceptron of one hidden layer for a head.
    """

    backbone: SE3Transformer
    num_classes: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points 3"],
        features: Fiber | None = None,
        *,
        mask: Bool[Array, "*batch points"] | None = None,
    ) -> Float[Array, "*batch classes"]:
        """Score the clouds.

        Args:
          positions: in any unit.
          features: as for `SE3Transformer`.
          mask: True = a point, False = padding.

        Returns:
          The scores.

        Raises:
          ValueError: if the shapes do not fit, or a size is not positive.
        """
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} must be positive; set it")
        found = self.backbone(positions, features, mask=mask)
        pooled = fiber_invariants(pool_fiber(found.features, mask))
        return nn.Dense(
            self.num_classes,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="head",
        )(pooled)


def _ones(positions: jax.Array) -> dict[int, jax.Array]:
    return {0: jnp.ones((*positions.shape[:-1], 1, 1), positions.dtype)}


def _masked(nodes: Fiber, mask: jax.Array) -> dict[int, jax.Array]:
    return {degree: jnp.where(mask[..., None, None], x, 0) for degree, x in nodes.items()}


# Reference checkpoints ------------------------------------------------------------------------------------------------

# Our layers and theirs, `{block}` counting attentions and nonlinearities.
REFERENCE_NAMES: Mapping[str, str] = {"nbody": "Gblock.{block}", "iterative": "blocks.{iteration}.{block}"}
# What the points have in the reference's data: channels of each degree.
_GIVEN: Mapping[str, dict[int, int]] = {"nbody": {1: 1}, "iterative": {0: 1}}


def from_reference(tensors: Mapping[str, Any], model: SE3Transformer, *, source: str = "nbody") -> dict[str, Any]:
    """Return parameters of `model` from the state dict of the reference's code, and its basis.

    `"nbody"` is `SE3Transformer` of `experiments/nbody`, which sees velocities (`features={1: ...}`) and products of
    charges (`edges`), and whose output is `features[1]`; `"iterative"` is `SE3TransformerIterative` of
    `experiments/toy_optimisation`, which sees the energies of the pairs (`edge_features`). That of `experiments/qm9`
    has other nonlinearities, and no counterpart here.

    Args:
      tensors: arrays by the reference's names, with those of the basis (see `basis_factors`).
      model: the model they are for: `features=(num_channels,) * num_degrees`, `out_features=(0, 2)` or `(0, 1)`,
        `depth=num_layers`, `iterations=num_iter`, `num_heads=n_heads`, `bottleneck=div`, `project` and `out_project`
        `FiberLinear` for 1x1 and `AttentiveSelfInteraction` for att of `si_m` and `si_e`, and `relative` `"subtract"`
        for add, `"concatenate"` for cat and `"none"` for None of `x_ij`.
      source: a key of `REFERENCE_NAMES`.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the basis is missing or does not fit, names or shapes of the tensors are not those of the model, or
        its fields are not of the reference.
    """
    if source not in REFERENCE_NAMES:
        raise ValueError(f"source={source!r} must be one of {sorted(REFERENCE_NAMES)}; pass one of them")
    if model.relative == "add":
        raise ValueError(f"relative={model.relative!r} must be 'subtract' for the reference's add; set relative")
    heads = math.gcd(model.num_heads, *model.out_features)
    if heads != min(model.num_heads, 2):
        raise ValueError(
            f"num_heads={model.num_heads} must leave min(num_heads, 2) heads to the output, as the reference does, not "
            f"{heads} for out_features={model.out_features}; set num_heads"
        )
    factors = basis_factors(tensors)
    points, pairs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3), (2, 1, 1)))
    given = {k: jax.ShapeDtypeStruct((2, count, 2 * k + 1), jnp.float32) for k, count in _GIVEN[source].items()}
    plain = model.clone(num_neighbours=None, edge_features=None, chunk=None)
    started = jax.eval_shape(lambda x, f, w: plain.init(jax.random.key(0), x, f, edges=w), points, given, pairs)
    flat = flax.traverse_util.flatten_dict(dict(started["params"]), sep="/")
    layers = _reference_layers(model, source)
    kernels = _reference_kernels(model, source, layers)
    names = {path: _reference_name(path, layers) for path in flat if "/edges/" not in path}
    nets = [
        net for prefix, met, features in kernels.values() for net in radial_networks(prefix, met, features).values()
    ]
    expected = {*names.values(), *(f"{net}.{end}" for net in nets for end in _RADIAL)}
    expected |= {f"basis.{k},{degree}" for net in nets for k, degree in re.findall(r"\((\d+),(\d+)\)", net)}
    unknown = sorted(name for name in tensors if name not in expected and not name.startswith("basis."))
    missing = sorted(name for name in expected if name not in tensors)
    if unknown or missing:
        raise ValueError(
            f"the checkpoint must have the model's tensors and their basis; unknown {unknown[:6]}, missing "
            f"{missing[:6]}; set the model's fields as the reference has them"
        )
    found = {path: _plain(np.asarray(tensors[name]), path) for path, name in names.items()}
    for ours, (prefix, met, features) in kernels.items():
        read = radial_kernel_from_reference(
            tensors, prefix, met, features, factors, appended=model.relative == "concatenate"
        )
        found |= {f"{ours}/{leaf}": value for leaf, value in read.items()}
    wrong = [
        f"{path} {found[path].shape} for {leaf.shape}" for path, leaf in flat.items() if found[path].shape != leaf.shape
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint's tensors must have the model's shapes, not {wrong[:6]}; set its fields as the reference "
            "has them"
        )
    return flax.traverse_util.unflatten_dict({path: jnp.asarray(found[path]) for path in flat}, sep="/")


_RADIAL = tuple(f"{layer}.{leaf}" for layer in ("0", "1.bn", "3", "4.bn", "6") for leaf in ("weight", "bias"))
# Parts of our layers to theirs, `#` for the degree.
_PARTS = {
    "query/kernel_#": "GMAB.q.transform.#",
    "project/kernel_#": "project.transform.#",
    "project/norm_#/scale": "project.transform.#.0.weight",
    "project/norm_#/bias": "project.transform.#.0.bias",
    "project/weights_#/kernel": "project.transform.#.2.weight",
    "project/weights_#/bias": "project.transform.#.2.bias",
    "bias_#": "bias.#",
}


def _reference_layers(model: SE3Transformer, source: str) -> dict[str, str]:
    """Return our layers, in their order, with their names there."""
    layers = {}
    for iteration in range(model.iterations):
        name = functools.partial(REFERENCE_NAMES[source].format, iteration=iteration)
        for layer in range(model.depth):
            layers[f"attention_{iteration}_{layer}"] = name(block=2 * layer)
            layers[f"nonlinearity_{iteration}_{layer}"] = name(block=2 * layer + 1)
    return {**layers, "out": name(block=2 * model.depth)}


def _reference_kernels(
    model: SE3Transformer, source: str, layers: Mapping[str, str]
) -> dict[str, tuple[str, dict[int, int], tuple[int, ...]]]:
    """Return our radial kernels with the beginning of their names there, the channels that they meet, and theirs."""
    kernels = {}
    channels = _GIVEN[source]
    for ours, theirs in layers.items():
        if ours.startswith("nonlinearity"):
            continue
        values = model.out_features if ours == "out" else tuple(count // model.bottleneck for count in model.features)
        keys = tuple(count if degree in channels else 0 for degree, count in enumerate(values))
        met = {**channels, 1: channels.get(1, 0) + 1} if model.relative == "concatenate" else channels
        kernels[f"{ours}/edges/key"] = (f"{theirs}.GMAB.k.", met, keys)
        kernels[f"{ours}/edges/value"] = (f"{theirs}.GMAB.v.", met, values)
        channels = dict(present(model.features))
    return kernels


def _reference_name(path: str, layers: Mapping[str, str]) -> str:
    layer, _, part = path.partition("/")
    degree = re.findall(r"_(\d+)", part)[-1:]
    theirs = _PARTS.get(part.replace(f"_{degree[0]}", "_#")) if degree else None
    if theirs is None:
        raise ValueError(
            f"the reference has no counterpart of {path}; set project and out_project to FiberLinear or "
            "AttentiveSelfInteraction"
        )
    return f"{layers[layer]}.{theirs.replace('#', degree[0])}"


def _plain(tensor: np.ndarray, path: str) -> np.ndarray:
    if "nonlinearity" in path:
        return tensor.reshape(-1)
    return tensor.T if "kernel" in path else tensor


DIALECTS = tuple(
    # Without a layout: a file that lacks the basis is to be told what to save, not which names are missing.
    dialects.Dialect(
        name=name,
        origin=f"github.com/FabianFuchsML/se3-transformer-public, experiments/{folder}, with its basis",
        module=SE3Transformer,
        read=dialects.from_params(from_reference, source=name),
        marks=(rf"^{first}0\.GMAB\.q\.transform\.", rf"^{first}1\.bias\."),
        foreign=(r"^FCblock\.",),
        one_way="weights are multiplied by signs and sizes that their basis says, which a state dict does not have",
    )
    for name, folder, first in (
        ("nbody", "nbody", r"Gblock\."),
        ("iterative", "toy_optimisation", r"blocks\.0\."),
    )
)

_PARTICLES = tuple(jax.ShapeDtypeStruct((1, 5, width), jnp.float32) for width in (3, 3, 1))

VARIANTS: dict[str, dict[str, Any]] = {
    "se3_particles": {
        "module": SE3Particles,
        "inputs": _PARTICLES,
        "backbone": SE3Transformer(features=(16, 16, 16), depth=4, num_heads=2),
    },
    "se3_classifier": {
        "module": SE3Classifier,
        "inputs": (jax.ShapeDtypeStruct((1, 64, 3), jnp.float32),),
        "backbone": SE3Transformer((16, 16, 16), (32, 8), depth=4, num_heads=4, num_neighbours=16, chunk=16),
        "num_classes": 10,
    },
}
