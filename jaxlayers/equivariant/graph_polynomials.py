"""Equivariant graph polynomials: layers that learn on a basis of them, and networks of matrix products beside them."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects, reference
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, xavier_uniform, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.ops.multigraphs import Multigraph, check_edges, evaluate, multigraphs, polynomial_features
from jaxlayers.ops.permutation_maps import node_mask
from jaxlayers.ops.pooling import masked_max

OUTPUTS = ("graph", "nodes", "edges")
POOLINGS = ("mean", "max")


def _join(edges: jax.Array, nodes: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    """Return edges with the features of the nodes on the diagonals of further channels, zero where padded."""
    check_edges(edges, mask)
    if nodes is not None:
        if nodes.shape[:-1] != edges.shape[:-2]:
            raise ValueError(
                f"nodes of shape {nodes.shape} must be [*{edges.shape[:-2]}, features] beside edges {edges.shape}; "
                "reshape them"
            )
        diagonal = (
            jnp.eye(nodes.shape[-2], dtype=nodes.dtype)[..., None]
            * jnp.where(True if mask is None else mask[..., None], nodes, 0)[..., None, :]
        )
        dtype = jnp.result_type(edges, nodes)
        edges = jnp.concatenate([edges.astype(dtype), diagonal.astype(dtype)], axis=-1)
    return edges if mask is None else jnp.where(node_mask(mask, 2)[..., None], edges, 0)


class GraphPolynomials(nn.Module):
    """Compute learned equivariant polynomials of a graph: linear combinations of a whole basis.

    Y = sum_H w_H P_H(X) over the multigraphs H of `multigraphs(degree, order)`, with P_H(X)_{j_a j_b} = sum over all j
    but those of the marks a and b of prod_{(r, s, c) in H} X_{j_r j_s c}. X `[n, n, channels]` holds the edges, and the
    features of the nodes on the diagonals of further channels; w_H `[features]`.

    Symmetry:
      S_n: an order-0 output is invariant, those of order 1 and 2 permute with the nodes; exact. With the whole basis
      every equivariant polynomial of that degree is reached.
      Where it breaks: nowhere.

    Attributes:
      features: width of the output; positive.
      degree: largest degree; at least 0.
      order: node axes of the output: 0, 1 or 2.
      directed: `False` for symmetric X, checked where it is concrete: fewer multigraphs.
      simple: only multigraphs without loops and parallel edges, for adjacency matrices of simple graphs.
      connected: only connected multigraphs; a perceptron on top can multiply them.
      normalize: means over assignments in place of sums, which grow as n^(vertices of H).
      dtype: compute dtype of the combination; `None` infers it. Polynomials are computed in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the w_H.

    Cost:
      The sum over H of n^(w + 1) with the width w of H; of degree 2, order 2 and one channel that is 134 contractions.
      `contraction` tells each. Found once for each H and n.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.graph_polynomials import GraphPolynomials
      >>> layer = GraphPolynomials(features=4, degree=1, order=2)
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 5, 1))
      >>> y, variables = layer.init_with_output(jax.random.key(1), x)
      >>> y.shape, variables["params"]["coefficients"]["kernel"].shape
      ((2, 5, 5, 4), (17, 4))

    Source:
      Puny, Lim, Kiani, Maron, Lipman, Equivariant Polynomials for Graph Neural Networks, ICML 2023, section 3
      (basis) and 4 (contraction). Reference code omri1348/Equivariant-Polynomaials at 8262feb,
      `equivariant_polynomials.py`.

    Differs:
      The code has simple connected graphs with marks at different vertices only, from published lists; here they are
      enumerated, with loops, directions, parallel edges and channels on request. Contractions are planned by
      opt_einsum, which also merges edges before it sums, not vertex by vertex. Means in place of sums are an addition.
    """

    features: int = 32
    degree: int = 2
    order: int = 1
    directed: bool = True
    simple: bool = False
    connected: bool = False
    normalize: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self,
        edges: Float[Array, "*batch nodes nodes channels"],
        nodes: Float[Array, "*batch nodes node_features"] | None = None,
        *,
        mask: Bool[Array, "*batch nodes"] | None = None,
    ) -> jax.Array:
        """Compute the polynomials.

        Args:
          edges: X.
          nodes: features of the nodes.
          mask: True = a node, False = padding, whose entries may be anything.

        Returns:
          `[*batch, *(nodes,) * order, features]`, zero where padded.

        Raises:
          ValueError: on shapes that do not fit or fields out of range.
        """
        if self.features < 1:
            raise ValueError(f"features={self.features} must be positive; set features")
        x = _join(edges, nodes, mask)
        if not self.directed and not isinstance(x, jax.core.Tracer) and bool(jnp.any(x != jnp.swapaxes(x, -2, -3))):
            raise ValueError(
                f"directed=False needs symmetric edges, which those of shape {edges.shape} are not; set directed=True"
            )
        graphs = multigraphs(
            self.degree,
            self.order,
            directed=self.directed,
            channels=x.shape[-1],
            simple=self.simple,
            connected=self.connected,
        )
        values = polynomial_features(graphs, x, mask=mask, normalize=self.normalize)
        out = nn.Dense(
            self.features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            name="coefficients",
        )(values.astype(edges.dtype) if self.dtype is None else values)
        return axes.constrain_last(out, axes.BATCH, *(axes.NODES, None)[: self.order], None)


class PPGNBlock(nn.Module):
    """Multiply two learned matrices of a graph, for each feature, and mix the product with the input.

    Y_ij = W [X_ij, sum_k m_1(X)_ik m_2(X)_kj], with X `[n, n, inputs]`, perceptrons m_1 and m_2 of `depth` layers on
    each pair. With `extended` (PPGN++) X_ij is joined by [i = j], and m_1 sees [X_ij, X_ji].

    Symmetry:
      S_n permutes both node axes of input and output, exact. Where it breaks: nowhere.
      As strong as the test with pairs of nodes (2-FWL, also called 3-WL); the polynomials computed have width at most 2
      (`width`).

    Attributes:
      features: width of the output and of the perceptrons; positive.
      depth: layers of each perceptron, each with the nonlinearity; at least 1.
      extended: PPGN++: add the identity matrix and, in m_1, the transpose, so that transposes, diagonals and row
        sums, and with them all polynomials of width 2, can be had.
      normalize: divide the product by the number of nodes, so that values do not grow with the graph.
      activation_fn: the nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters. The product is summed in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, Xavier's uniform by default.
      bias_init: initialiser of the biases.

    Cost:
      features n^3 + about (2 depth + 2) features^2 n^2 multiply-accumulates; n^2 values for each feature in memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.graph_polynomials import PPGNBlock
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
      >>> PPGNBlock(8, extended=True).init_with_output(jax.random.key(1), x)[0].shape
      (2, 5, 5, 8)

    Source:
      Maron, Ben-Hamu, Serviansky, Lipman, Provably Powerful Graph Networks, NeurIPS 2019, section 6; Puny et al.,
      Equivariant Polynomials for Graph Neural Networks, ICML 2023, section 5 (PPGN++). Reference code
      hadarser/ProvablyPowerfulGraphNetworks_torch at 4576eff, `layers/modules.py`, and
      omri1348/Equivariant-Polynomaials at 8262feb, `models/ppgn.py`.

    Differs:
      none; `normalize` is an addition, off by default.
    """

    features: int
    depth: int = 2
    extended: bool = False
    normalize: bool = False
    activation_fn: ActivationFn = nn.relu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = xavier_uniform()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        edges: Float[Array, "*batch nodes nodes features"],
        *,
        mask: Bool[Array, "*batch nodes"] | None = None,
    ) -> Float[Array, "*batch nodes nodes out_features"]:
        """Apply the block.

        Args:
          edges: X.
          mask: True = a node, False = padding, whose entries may be anything.

        Returns:
          Y, zero where padded.

        Raises:
          ValueError: on shapes that do not fit or fields out of range.
        """
        if self.features < 1 or self.depth < 1:
            raise ValueError(f"features={self.features} and depth={self.depth} must be positive; set them")
        check_edges(edges, mask)
        pairs = None if mask is None else node_mask(mask, 2)[..., None]
        n = edges.shape[-2]

        def only(x: jax.Array) -> jax.Array:
            return x if pairs is None else jnp.where(pairs, x, 0)

        x = only(edges)
        if self.extended:
            one = jnp.broadcast_to(jnp.eye(n, dtype=x.dtype)[..., None], (*x.shape[:-1], 1))
            x = only(jnp.concatenate([x, one], axis=-1))
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }

        def perceptron(values: jax.Array, name: str) -> jax.Array:
            for index in range(self.depth):
                values = self.activation_fn(nn.Dense(self.features, name=f"{name}_{index}", **common)(values))
            return only(values)

        left = jnp.concatenate([x, jnp.swapaxes(x, -2, -3)], axis=-1) if self.extended else x
        left, right = perceptron(left, "left"), perceptron(x, "right")
        product = jnp.einsum("...ikf,...kjf->...ijf", left, right, preferred_element_type=at_least_float32(left.dtype))
        if self.normalize:
            real = jnp.asarray(n if mask is None else jnp.maximum(jnp.sum(mask, axis=-1), 1), product.dtype)
            product = product / real.reshape(*real.shape, 1, 1, 1)
        joined = jnp.concatenate([x.astype(left.dtype), product.astype(left.dtype)], axis=-1)
        out = only(nn.Dense(self.features, name="skip", **common)(joined))
        return axes.constrain_last(out, axes.BATCH, axes.NODES, None, None)


class PPGN(nn.Module):
    """Predict numbers for a graph, its nodes or its pairs, with matrix products and, on request, further polynomials.

    X = [edges, diagonals of node features, P_H(edges) for H in `polynomials`], then depth blocks, then a perceptron of
    one hidden layer on pooled diagonal and off-diagonal entries (graph), on X_ii and the means of X_ij and of X_ji over
    j != i (nodes), or on X_ij (edges). PPGN++ is `block=functools.partial(PPGNBlock, extended=True)`.

    Symmetry:
      S_n, exact: graph outputs are invariant, those of nodes and pairs permute with the nodes.
      Where it breaks: nowhere. Pairs of graphs that 2-FWL (3-WL) cannot tell apart get the same output without
      `polynomials`, such as the two strongly regular graphs with parameters (16, 6, 2, 2); with
      `beyond_matrix_products(6)` those differ.

    Attributes:
      features: width of the blocks and of the head; positive.
      depth: number of blocks; at least 1.
      output: `"graph"`, `"nodes"` or `"edges"`.
      num_outputs: numbers for each; positive.
      pooling: `"mean"` (PPGN++) or `"max"` (PPGN) over diagonal and off-diagonal entries, for the graph.
      polynomials: multigraphs whose polynomials of the first channels join the input: those of the nodes along rows, of
        the graph everywhere.
      block: makes the blocks.
      activation_fn: the nonlinearity of the head.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, Xavier's uniform by default.
      bias_init: initialiser of the biases.

    Cost:
      depth times that of a block; the polynomials cost n^(w + 1) each, see `contraction`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.graph_polynomials import PPGN
      >>> adjacency = (1 - jnp.eye(5))[..., None]
      >>> PPGN(features=8, depth=2).init_with_output(jax.random.key(0), adjacency)[0].shape
      (1,)

    Source:
      Maron et al., Provably Powerful Graph Networks, NeurIPS 2019; Puny et al., Equivariant Polynomials for Graph
      Neural Networks, ICML 2023, section 5. Reference code as of `PPGNBlock`.

    Differs:
      Node and pair outputs are additions. The head has one hidden layer, as that of PPGN++; PPGN's code sums over the
      pools of all blocks or has two. Off-diagonal means of a single node are 0, not NaN. Polynomials are
      computed in the call, not ahead of it.
    """

    features: int = 32
    depth: int = 3
    output: str = "graph"
    num_outputs: int = 1
    pooling: str = "mean"
    polynomials: tuple[Multigraph, ...] = ()
    block: ModuleFactory = PPGNBlock
    activation_fn: ActivationFn = nn.relu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = xavier_uniform()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        edges: Float[Array, "*batch nodes nodes channels"],
        nodes: Float[Array, "*batch nodes node_features"] | None = None,
        *,
        mask: Bool[Array, "*batch nodes"] | None = None,
    ) -> jax.Array:
        """Run the network.

        Args:
          edges: features of the pairs, such as the adjacency matrix.
          nodes: features of the nodes.
          mask: True = a node, False = padding, whose entries may be anything.

        Returns:
          By `output`, `[*batch, num_outputs]`, `[*batch, nodes, num_outputs]` or `[*batch, nodes, nodes, num_outputs]`;
          zero where padded.

        Raises:
          ValueError: on shapes that do not fit or fields out of range.
        """
        self._check()
        x = _join(edges, nodes, mask)
        if self.polynomials:
            x = jnp.concatenate(
                [x, *(self._spread(graph, edges, mask).astype(x.dtype) for graph in self.polynomials)], -1
            )
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        for index in range(self.depth):
            x = self.block(features=self.features, name=f"blocks_{index}", **common)(x, mask=mask)
        head = FeedForward(self.features, self.num_outputs, activation_fn=self.activation_fn, name="head", **common)
        if self.output == "graph":
            return head(_pool_pairs(x, mask, self.pooling))
        if self.output == "nodes":
            present = jnp.ones(x.shape[:-2], bool) if mask is None else mask
            apart = _apart(present)[..., None]
            others = jnp.maximum(jnp.sum(present, axis=-1) - 1, 1)[..., None, None]
            wide = jnp.where(apart, x, 0).astype(at_least_float32(x.dtype))
            means = [(jnp.sum(wide, axis=axis) / others).astype(x.dtype) for axis in (-2, -3)]
            x = jnp.concatenate([_diagonal(x), *means], axis=-1)
        out = head(x)
        return out if mask is None else jnp.where(node_mask(mask, 1 + (self.output == "edges"))[..., None], out, 0)

    def _spread(self, graph: Multigraph, edges: jax.Array, mask: jax.Array | None) -> jax.Array:
        value = evaluate(graph, edges, mask=mask)
        for _ in range(2 - graph.order):
            value = value[..., None]
        value = jnp.broadcast_to(value, edges.shape[:-1])[..., None]
        return value if mask is None else jnp.where(node_mask(mask, 2)[..., None], value, 0)

    def _check(self) -> None:
        if min(self.features, self.depth, self.num_outputs) < 1:
            raise ValueError(
                f"features={self.features}, depth={self.depth} and num_outputs={self.num_outputs} must be positive; "
                "set them"
            )
        if self.output not in OUTPUTS or self.pooling not in POOLINGS:
            raise ValueError(
                f"output={self.output!r} and pooling={self.pooling!r} must be one of {OUTPUTS} and one of {POOLINGS}; "
                "set them"
            )


def _diagonal(x: jax.Array) -> jax.Array:
    return jnp.einsum("...iif->...if", x)


def _apart(present: jax.Array) -> jax.Array:
    """Return the pairs of two different real nodes."""
    return node_mask(present, 2) & ~jnp.eye(present.shape[-1], dtype=bool)


def _pool_pairs(x: jax.Array, mask: jax.Array | None, pooling: str) -> jax.Array:
    """Return the pooled diagonal entries beside the pooled others, `[*batch, 2 features]`."""
    present = jnp.ones(x.shape[:-2], bool) if mask is None else mask
    flat = (*x.shape[:-3], -1)
    parts = (
        (_diagonal(x), present),
        (x.reshape(*flat, x.shape[-1]), _apart(present).reshape(flat)),
    )
    if pooling == "max":
        return jnp.concatenate([masked_max(values, chosen) for values, chosen in parts], axis=-1)
    wide = at_least_float32(x.dtype)
    sums = [
        jnp.sum(jnp.where(chosen[..., None], values, 0), axis=-2, dtype=wide)
        / jnp.maximum(jnp.sum(chosen, axis=-1, keepdims=True), 1)
        for values, chosen in parts
    ]
    return jnp.concatenate(sums, axis=-1).astype(x.dtype)


REFERENCE_NAMES: Mapping[str, str] = {
    **{
        f"blocks/{side}_{index}": f"reg_blocks.{{block}}.{theirs}.convs.{index}"
        for side, theirs in (("left", "mlp1"), ("right", "mlp2"))
        for index in range(4)
    },
    "blocks/skip": "reg_blocks.{block}.skip.conv",
    "head/up": "fc_layers.0.fc",
    "head/down": "fc_layers.1.fc",
}


def from_reference(tensors: Mapping[str, Any], model: PPGN, *inputs: Any) -> dict[str, Any]:
    """Return parameters of `model` from a state dict of PPGN++, `models/ppgn.py` of omri1348/Equivariant-Polynomaials.

    Args:
      tensors: arrays by the reference's names.
      model: with `block=functools.partial(PPGNBlock, extended=True)`, and fields as the reference has them.
      inputs: its inputs, or their shapes.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if names or shapes of the tensors are not those of the model.
    """
    wanted = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), *inputs)["params"]
    return reference.read_reference(tensors, wanted, REFERENCE_NAMES)


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/omri1348/Equivariant-Polynomaials, models/ppgn.py",
        module=PPGN,
        read=dialects.from_shapes(reference.read_reference, table=REFERENCE_NAMES),
        marks=(r"^reg_blocks\.0\.mlp1\.convs\.0\.weight$", r"^fc_layers\.0\.fc\.weight$"),
        layout=dialects.table_layout(
            REFERENCE_NAMES,
            shapes={
                ours.removeprefix("blocks/") + "/kernel": dialects.pointwise()
                for ours in REFERENCE_NAMES
                if "blocks" in ours
            },
        ),
        head="fc_layers.1.fc.weight",
    ),
)
