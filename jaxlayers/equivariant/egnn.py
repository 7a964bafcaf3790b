"""E(n) equivariant graph neural networks: messages from distances, positions moved along differences."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects, reference
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import zeros
from jaxlayers.core.safe import safe_norm, safe_normalize
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.ops.neighbours import Neighbours, displacements, everyone, gather

NORMALIZATIONS = (None, "unit", "soft")
AGGREGATIONS = ("mean", "sum")
OUTPUTS = ("positions", "nodes", "both", "graph")

# Xavier's uniform with gain 0.001: an untrained layer hardly moves the points.
_SMALL = nn.initializers.variance_scaling(1e-6, "fan_avg", "uniform")
# The reference's: uniform with a third of LeCun's variance. With all of it, sums of messages grow from layer to layer.
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class _PairDense(nn.Module):
    """Apply one dense layer to (h_i, h_j, e_ij) for every pair, without forming them: the nodes are multiplied once."""

    features: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, nodes: jax.Array, neighbours: Neighbours, pairs: jax.Array) -> jax.Array:
        width = nodes.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (2 * width + pairs.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        nodes, pairs, kernel, bias = promote_dtype(nodes, pairs, kernel, bias, dtype=self.dtype)
        receivers = (nodes @ kernel[:width] + bias)[..., :, None, :]
        senders = gather(nodes @ kernel[width : 2 * width], neighbours.indices)
        return receivers + senders + pairs @ kernel[2 * width :]


class EGNNLayer(nn.Module):
    """Pass messages between neighbours that depend on distances, and move the points along their differences.

    m_ij = phi_e(h_i, h_j, |x_i - x_j|^2, a_ij); x_i <- x_i + phi_v(h_i) v_i + C sum_j (x_i - x_j) phi_x(m_ij);
    h_i <- h_i + phi_h(h_i, sum_j m_ij, b_i), over the neighbours j of i, with features h `[n, features]`, positions x
    and velocities v `[n, d]`, attributes a of the pairs and b of the nodes, perceptrons phi of one hidden layer, and
    C = 1 / number of neighbours of i, or 1. With `attention` m_ij <- sigmoid(w m_ij + b) m_ij.

    Symmetry:
      E(d), for any d: features are invariant, positions turn, reflect and shift with the input, velocities turn as
      vectors; exact. Permutations of the points exactly, if the neighbour lists permute with them.
      Where it breaks: nowhere; mirror images get the same features, so chirality is not seen. A symmetric cloud with
      equal features stays symmetric: coincident points with equal features move together.

    Attributes:
      features: width of the features, in and out, and of all hidden layers; positive.
      activation_fn: the nonlinearity of all perceptrons.
      residual: add phi_h to h; else it takes its place.
      attention: weigh each message by a gate in (0, 1), the paper's inferred edges.
      normalization: of the differences that move the points: `None`, `"unit"` divides by |x_i - x_j| (zero for
        coincident points), `"soft"` by |x_i - x_j| + 1.
      tanh: bound phi_x by a hyperbolic tangent.
      aggregation: `"mean"` or `"sum"` of the moves over the neighbours; messages are summed always.
      update_positions: compute new positions; else they are returned as they are.
      update_features: compute new features; else they are returned as they are.
      dtype: compute dtype; `None` infers it from input and parameters. Positions and distances stay in float32 or
        better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels, a third of LeCun's variance by default; phi_x ends in one of a
        thousandth of Xavier's size.
      bias_init: initialiser of the biases.

    Cost:
      About 2 features^2 multiply-accumulates a pair and 6 features^2 a point; messages of all pairs are held in memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.egnn import EGNNLayer
      >>> from jaxlayers.ops.neighbours import k_nearest
      >>> x, h = jax.random.normal(jax.random.key(0), (2, 5, 3)), jnp.ones((2, 5, 8))
      >>> (features, positions), _ = EGNNLayer(8).init_with_output(jax.random.key(1), h, x, k_nearest(x, 3))
      >>> features.shape, positions.shape
      ((2, 5, 8), (2, 5, 3))

    Source:
      Satorras, Hoogeboom, Welling, E(n) Equivariant Graph Neural Networks, ICML 2021, equations 3 to 6, 7 (velocities)
      and 8 (inferred edges). Reference code vgsatorras/egnn at e9ca6c0, `models/gcl.py` (`E_GCL`, `E_GCL_vel`) and
      `models/egnn_clean/egnn_clean.py`.

    Differs:
      Equation 4 has C = 1 / (n - 1), which is the mean where everyone is a neighbour; for other lists the code's mean
      is over the neighbours there are. The code clamps each coordinate of a move to [-100, 100], which does not turn
      with the points, and takes the length in `"unit"` for a constant when differentiating: here neither.
    """

    features: int
    activation_fn: ActivationFn = nn.silu
    residual: bool = True
    attention: bool = False
    normalization: str | None = None
    tanh: bool = False
    aggregation: str = "mean"
    update_positions: bool = True
    update_features: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = _UNIFORM
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "*batch points features"],
        positions: Float[Array, "*batch points d"],
        neighbours: Neighbours,
        *,
        velocities: Float[Array, "*batch points d"] | None = None,
        edges: Float[Array, "*batch points k edge_features"] | None = None,
        attributes: Float[Array, "*batch points attributes"] | None = None,
    ) -> tuple[Float[Array, "*batch points features"], Float[Array, "*batch points d"]]:
        """Update features and positions.

        Args:
          features: invariant features h.
          positions: in any unit; those of padding must be finite.
          neighbours: their lists; points with an empty one are moved by their velocity only.
          velocities: vectors v that move the points besides.
          edges: invariant attributes a of each entry of the lists; masked ones count for nothing.
          attributes: invariant attributes b of the points that phi_h sees.

        Returns:
          Features and positions; positions in float32 or better. A NaN position spreads NaN to all points that have it
          for a neighbour.

        Raises:
          ValueError: on shapes that do not fit or fields out of range.
        """
        self._check(features, positions, velocities, edges, attributes, neighbours)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        perceptron = functools.partial(FeedForward, self.features, activation_fn=self.activation_fn, **common)
        mask = neighbours.mask[..., None]
        x = positions.astype(at_least_float32(positions.dtype))
        differences = -displacements(x, neighbours)
        pairs = jnp.sum(jnp.square(differences), axis=-1, keepdims=True)
        if edges is not None:
            pairs = jnp.concatenate([pairs, jnp.where(mask, edges, 0).astype(pairs.dtype)], axis=-1)
        messages = self.activation_fn(
            _PairDense(self.features, name="message_up", **common)(features, neighbours, pairs)
        )
        messages = axes.constrain_last(messages, axes.BATCH, axes.NODES, None, None)
        messages = self.activation_fn(nn.Dense(self.features, name="message_down", **common)(messages))
        if self.attention:
            messages = messages * nn.sigmoid(nn.Dense(1, name="gate", **common)(messages))
        if self.update_positions:
            x = x + self._moves(messages, differences, mask, common)
            if velocities is not None:
                speeds = perceptron(out_features=1, name="velocity")(features)
                x = x + speeds.astype(x.dtype) * velocities.astype(x.dtype)
            x = axes.constrain_last(x, axes.BATCH, axes.NODES, None)
        if not self.update_features:
            return features, x
        parts = [features, jnp.sum(jnp.where(mask, messages, 0), axis=-2)]
        if attributes is not None:
            parts.append(attributes)
        dtype = jnp.result_type(*parts)
        update = perceptron(out_features=self.features, name="node")(
            jnp.concatenate([part.astype(dtype) for part in parts], axis=-1)
        )
        features = features.astype(update.dtype) + update if self.residual else update
        return axes.constrain_last(features, axes.BATCH, axes.NODES, None), x

    def _moves(self, messages: jax.Array, differences: jax.Array, mask: jax.Array, common: Any) -> jax.Array:
        """Return the sum or mean over the neighbours of (x_i - x_j) phi_x(m_ij)."""
        hidden = self.activation_fn(nn.Dense(self.features, name="position_up", **common)(messages))
        last = {**common, "kernel_init": _SMALL, "use_bias": False}
        scales = nn.Dense(1, name="position_down", **last)(hidden).astype(differences.dtype)
        if self.tanh:
            scales = nn.tanh(scales)
        if self.normalization == "unit":
            differences = safe_normalize(differences)
        elif self.normalization == "soft":
            differences = differences / (safe_norm(differences, keepdims=True) + 1)
        total = jnp.sum(jnp.where(mask, differences * scales, 0), axis=-2)
        if self.aggregation == "sum":
            return total
        return total / jnp.maximum(jnp.sum(mask, axis=-2), 1)

    def _check(
        self,
        features: jax.Array,
        positions: jax.Array,
        velocities: jax.Array | None,
        edges: jax.Array | None,
        attributes: jax.Array | None,
        neighbours: Neighbours,
    ) -> None:
        if self.normalization not in NORMALIZATIONS or self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"normalization={self.normalization!r} and aggregation={self.aggregation!r} must be one of "
                f"{NORMALIZATIONS} and one of {AGGREGATIONS}; set them"
            )
        if self.features < 1 or (self.residual and self.update_features and features.shape[-1] != self.features):
            raise ValueError(
                f"features={self.features} must be positive and, with residual=True, the width of the features "
                f"{features.shape}; set it, or residual=False"
            )
        _check_points(positions, features, velocities, attributes)
        _check_lists(positions, neighbours, edges)


class EGNN(nn.Module):
    """Predict positions, a vector of numbers for each point or for the whole cloud, with E(n) equivariant messages.

    h_i = W f_i, then depth `EGNNLayer`s on h, x and velocities v. Outputs: positions x; nodes W_out h_i; graph
    head(sum_i readout(h_i)) with perceptrons of one hidden layer.

    Symmetry:
      E(d), for any d, exact: positions move with the input, nodes and graph are invariant (blind to chirality too).
      Permutations of the points exactly, with the neighbour lists; the graph does not change by them.
      Where it breaks: nowhere by itself; lists cut off between equally distant points (`k_nearest`) depend on their
      order.

    Attributes:
      features: width of the layers; positive.
      depth: number of layers; at least 1.
      output: `"positions"`, `"nodes"`, `"both"` (a pair: nodes, positions) or `"graph"`.
      num_outputs: numbers for each node or graph; positive.
      pooling: `"sum"` or `"mean"` over the points for the graph; the sum grows with the cloud, as energies do.
      update_positions: move the points from layer to layer; `False` keeps distances those of the input.
      node_attributes: let every layer see the input features besides h.
      layer: makes the layers, such as `functools.partial(EGNNLayer, attention=True)`.
      activation_fn: the nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters. Positions and distances stay in float32 or
        better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels; the default has a third of LeCun's variance, as the reference.
      bias_init: initialiser of the biases.

    Cost:
      depth times that of a layer, see `EGNNLayer`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.egnn import EGNN
      >>> x = jax.random.normal(jax.random.key(0), (2, 5, 3))
      >>> model = EGNN(features=8, depth=2, output="graph")
      >>> energy, variables = model.init_with_output(jax.random.key(1), x)
      >>> bool(jnp.allclose(energy, model.apply(variables, 1 - x[..., ::-1, ::-1]), atol=1e-5))
      True

    Source:
      Satorras, Hoogeboom, Welling, E(n) Equivariant Graph Neural Networks, ICML 2021, sections 3 and 5.1 (positions,
      `EGNN_vel`), 5.3 (graph). Reference code vgsatorras/egnn at e9ca6c0: `n_body_system/model.py`,
      `models/egnn_clean/egnn_clean.py`, `qm9/models.py`.

    Differs:
      What the last layer computes and no output uses, such as the features when positions are asked for, is left out
      with its parameters. Dense neighbour lists and masks instead of edge lists, so that one compilation serves all
      graphs that fit. Further differences: see `EGNNLayer`.
    """

    features: int = 64
    depth: int = 4
    output: str = "positions"
    num_outputs: int = 1
    pooling: str = "sum"
    update_positions: bool = True
    node_attributes: bool = False
    layer: ModuleFactory = EGNNLayer
    activation_fn: ActivationFn = nn.silu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = _UNIFORM
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch points d"],
        features: Float[Array, "*batch points inputs"] | None = None,
        velocities: Float[Array, "*batch points d"] | None = None,
        edges: Float[Array, "*batch points k edge_features"] | None = None,
        *,
        mask: Bool[Array, "*batch points"] | None = None,
        neighbours: Neighbours | None = None,
    ) -> Any:
        """Run the network.

        Args:
          positions: in any unit; distances of about one suit the initialisation.
          features: invariant numbers of the points; `None` gives each a one.
          velocities: vectors that the positions are moved along, in the layers that move them.
          edges: invariant attributes of the pairs, in the order of the neighbour lists (`everyone` by default: point j
            of point i's list is j, or j + 1 from i on).
          mask: True = a point, False = padding, whose inputs may be anything.
          neighbours: lists of neighbours; `None` takes everyone. Entries of or from padding count for nothing.

        Returns:
          By `output`: positions `[*batch, points, d]` in float32 or better, nodes `[*batch, points, num_outputs]`, both
          `(nodes, positions)`, or graph `[*batch, num_outputs]`. Zero where padded. A NaN coordinate comes out as NaN
          in everything that its neighbours reach, and so in the graph.

        Raises:
          ValueError: on shapes that do not fit or fields out of range.
        """
        self._check()
        features = jnp.ones((*positions.shape[:-1], 1), positions.dtype) if features is None else features
        _check_points(positions, features, velocities, mask if mask is None else mask[..., None])
        present = jnp.ones(positions.shape[:-1], bool) if mask is None else mask
        if neighbours is None:
            neighbours = everyone(present)
        elif mask is not None:
            _check_lists(positions, neighbours, edges)
            real = neighbours.mask & gather(mask, neighbours.indices) & mask[..., None]
            neighbours = neighbours._replace(mask=real, indices=jnp.where(real, neighbours.indices, 0))

        def only(x: jax.Array) -> jax.Array:
            return x if mask is None else jnp.where(mask[..., None], x, 0)

        positions, features = only(positions), only(features)
        velocities = None if velocities is None else only(velocities)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        h = nn.Dense(self.features, name="embedding", **common)(features)
        x = positions.astype(at_least_float32(positions.dtype))
        for index in range(self.depth):
            last = index == self.depth - 1
            h, x = self.layer(
                features=self.features,
                activation_fn=self.activation_fn,
                update_positions=self.update_positions and not (last and self.output in ("nodes", "graph")),
                update_features=not (last and self.output == "positions"),
                name=f"layers_{index}",
                **common,
            )(
                h,
                x,
                neighbours,
                velocities=velocities,
                edges=edges,
                attributes=features if self.node_attributes else None,
            )
        if self.output == "positions":
            return only(x)
        if self.output == "graph":
            return self._pool(h, present, common)
        nodes = only(nn.Dense(self.num_outputs, name="head", **common)(h))
        return (nodes, only(x)) if self.output == "both" else nodes

    def _pool(self, h: jax.Array, present: jax.Array, common: Any) -> jax.Array:
        """Return the numbers of the whole cloud."""
        perceptron = functools.partial(FeedForward, self.features, activation_fn=self.activation_fn, **common)
        h = jnp.where(present[..., None], perceptron(name="readout")(h), 0)
        total = jnp.sum(h.astype(at_least_float32(h.dtype)), axis=-2)
        if self.pooling == "mean":
            total = total / jnp.maximum(jnp.sum(present, axis=-1, keepdims=True), 1)
        return perceptron(out_features=self.num_outputs, name="head")(total.astype(h.dtype))

    def _check(self) -> None:
        if min(self.features, self.depth, self.num_outputs) < 1:
            raise ValueError(
                f"features={self.features}, depth={self.depth} and num_outputs={self.num_outputs} must be positive; "
                "set them"
            )
        if self.output not in OUTPUTS or self.pooling not in ("sum", "mean"):
            raise ValueError(
                f"output={self.output!r} and pooling={self.pooling!r} must be one of {OUTPUTS} and 'sum' or 'mean'; "
                "set them"
            )
        if not self.update_positions and self.output in ("positions", "both"):
            raise ValueError(
                f"output={self.output!r} needs positions that move; set update_positions=True or output='nodes'"
            )


def _check_points(positions: jax.Array, features: jax.Array, velocities: jax.Array | None, other: Any) -> None:
    if positions.ndim < 2 or 0 in positions.shape[-2:]:
        raise ValueError(f"positions of shape {positions.shape} must be [*batch, points, d], none empty; add an axis")
    given = [x.shape[:-1] for x in (features, other) if x is not None]
    if any(shape != positions.shape[:-1] for shape in given):
        raise ValueError(
            f"features, attributes and mask must have the leading axes {positions.shape[:-1]} of the positions, not "
            f"{given}; reshape them"
        )
    if velocities is not None and velocities.shape != positions.shape:
        raise ValueError(
            f"velocities of shape {velocities.shape} must be {positions.shape}, a vector for each position; reshape"
        )


def _check_lists(positions: jax.Array, neighbours: Neighbours, edges: jax.Array | None) -> None:
    if neighbours.indices.shape[:-1] != positions.shape[:-1] or neighbours.mask.shape != neighbours.indices.shape:
        raise ValueError(
            f"neighbours with indices {neighbours.indices.shape} and mask {neighbours.mask.shape} must both be "
            f"[*batch, points, k] for positions {positions.shape}; make them for these points"
        )
    if edges is not None and edges.shape[:-1] != neighbours.indices.shape:
        raise ValueError(
            f"edges of shape {edges.shape} must be [*{neighbours.indices.shape}, edge_features], one entry for each of "
            "the neighbours; reshape them or pass these neighbours"
        )


# Reference checkpoints ------------------------------------------------------------------------------------------------

_LAYER = {
    "layers/message_up": "gcl_{layer}.edge_mlp.0",
    "layers/message_down": "gcl_{layer}.edge_mlp.2",
    "layers/gate": "gcl_{layer}.att_mlp.0",
    "layers/position_up": "gcl_{layer}.coord_mlp.0",
    "layers/position_down": "gcl_{layer}.coord_mlp.2",
    "layers/velocity/up": "gcl_{layer}.coord_mlp_vel.0",
    "layers/velocity/down": "gcl_{layer}.coord_mlp_vel.2",
    "layers/node/up": "gcl_{layer}.node_mlp.0",
    "layers/node/down": "gcl_{layer}.node_mlp.2",
}

# See `jaxlayers.core.reference`.
REFERENCE_NAMES: Mapping[str, Mapping[str, str]] = {
    "nbody": {**_LAYER, "embedding": "embedding"},
    "clean": {**_LAYER, "embedding": "embedding_in", "head": "embedding_out"},
    "qm9": {
        **_LAYER,
        "embedding": "embedding",
        "readout/up": "node_dec.0",
        "readout/down": "node_dec.2",
        "head/up": "graph_dec.0",
        "head/down": "graph_dec.2",
    },
}


def from_reference(
    tensors: Mapping[str, Any], model: EGNN, *inputs: Any, source: str = "nbody", **keywords: Any
) -> dict[str, Any]:
    """Return parameters of `model` from the state dict of the reference's code.

    Args:
      tensors: arrays by the reference's names.
      model: the model they are for.
      inputs: its inputs, or their shapes.
      source: a key of `REFERENCE_NAMES`: `"nbody"` for `EGNN_vel` and `EGNN` of `n_body_system/model.py`, `"clean"` for
        `models/egnn_clean`, `"qm9"` for `qm9/models.py`.
      keywords: keyword inputs.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if the source is unknown, or names or shapes of the tensors are not those of the model.
    """
    if source not in REFERENCE_NAMES:
        raise ValueError(f"source={source!r} must be one of {sorted(REFERENCE_NAMES)}; pass one of them")
    wanted = jax.eval_shape(functools.partial(model.init, jax.random.key(0), **keywords), *inputs)["params"]
    # The reference has all parts in its last layer, used or not, and a range of its tanh that it never applies.
    unused = "node_mlp" if model.output == "positions" else "coord_mlp"
    ignored = [
        name for name in tensors if name.startswith(f"gcl_{model.depth - 1}.{unused}") and model.output != "both"
    ]
    ignored += [name for name in tensors if name.endswith("coords_range")]
    return reference.read_reference(tensors, wanted, REFERENCE_NAMES[source], ignored=ignored)


def reference_inputs(model: EGNN) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return small inputs as in the paper's experiments, on particles or molecules, which show a model's shapes."""
    return _particles(15, 0) if model.output == "graph" else _particles(1, 2)


def _unused(model: EGNN) -> dict[str, str]:
    ignored = {r"\.coords_range$": "the range of a tanh, which the reference never applies"}
    if model.output != "both":
        unused = "node_mlp" if model.output == "positions" else "coord_mlp"
        ignored[rf"^gcl_{model.depth - 1}\.{unused}"] = "the reference's last layer has it, and no output sees it"
    return ignored


# Name: where such files come from, marks, foreign names, the weight of the head.
_MARKS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    "nbody": (
        "github.com/vgsatorras/egnn, n_body_system/model.py",
        (r"^embedding\.weight$", r"^gcl_0\.coord_mlp\.0\."),
        (r"^(node|graph)_dec\.",),
        "",
    ),
    "clean": (
        "github.com/vgsatorras/egnn, models/egnn_clean",
        (r"^embedding_in\.weight$", r"^embedding_out\.weight$", r"^gcl_0\.edge_mlp\.0\."),
        (),
        "embedding_out.weight",
    ),
    "qm9": (
        "github.com/vgsatorras/egnn, qm9/models.py",
        (r"^embedding\.weight$", r"^graph_dec\.2\.weight$", r"^gcl_0\.edge_mlp\.0\."),
        (),
        "graph_dec.2.weight",
    ),
}
DIALECTS = tuple(
    dialects.Dialect(
        name=name,
        origin=origin,
        module=EGNN,
        read=dialects.from_shapes(reference.read_reference, table=REFERENCE_NAMES[name]),
        marks=marks,
        foreign=foreign,
        ignored=_unused,
        layout=dialects.table_layout(REFERENCE_NAMES[name]),
        head=head,
    )
    for name, (origin, marks, foreign, head) in _MARKS.items()
)


def _particles(width: int, k: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    points, shape = 5 if k else 29, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs = [shape((1, points, 3)), shape((1, points, width))]
    if k:
        inputs += [shape((1, points, 3)), shape((1, points, points - 1, k))]
    return tuple(inputs)


def _variant(width: int, k: int, **fields: Any) -> dict[str, Any]:
    return {"module": EGNN, "inputs": _particles(width, k), **fields}


VARIANTS: dict[str, dict[str, Any]] = {
    "egnn_nbody": _variant(1, 2, features=64, depth=4),
    "egnn_qm9": _variant(
        15,
        0,
        features=128,
        depth=7,
        output="graph",
        update_positions=False,
        layer=functools.partial(EGNNLayer, attention=True),
    ),
}
