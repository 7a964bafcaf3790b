"""Neural sheaf diffusion: heat flow on a graph whose edges carry learned linear maps between the nodes' spaces."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes, dialects
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, Params
from jaxlayers.ops.segments import check_undirected, clean_graph, gather_nodes, segment_sum

MAPS = ("diagonal", "householder", "cayley", "general")


class SheafLaplacian(NamedTuple):
    """Blocks of a normalised sheaf Laplacian, `d x d` or, for diagonal maps, their diagonals `d`.

    Attributes:
      edges: block in the row of each edge's receiver and the column of its sender; zero where masked.
      nodes: block on the diagonal.
    """

    edges: Float[Array, "..."]
    nodes: Float[Array, "..."]


@jax.custom_jvp
def inverse_root(matrices: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Return A^-1/2 of symmetric positive definite matrices, with a gradient that equal eigenvalues do not break.

    The derivative is taken by divided differences of the eigenvalues, not through the eigenvectors; it is exact once.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.graph.sheaf_diffusion import inverse_root
      >>> inverse_root(4 * jnp.eye(2)).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    values, vectors = jnp.linalg.eigh(matrices)
    return (vectors * jax.lax.rsqrt(values)[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)


@inverse_root.defjvp
def _inverse_root_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(primals[0])
    back = jnp.swapaxes(vectors, -1, -2)
    roots = jnp.sqrt(values)
    first, second = roots[..., :, None], roots[..., None, :]
    turned = back @ (tangents[0] + jnp.swapaxes(tangents[0], -1, -2)) @ vectors / 2
    tangent = vectors @ (-turned / (first * second * (first + second))) @ back
    return (vectors / roots[..., None, :]) @ back, tangent


def orthogonal(parameters: Float[Array, "*batch entries"], size: int, kind: str) -> Float[Array, "*batch d d"]:
    """Return orthogonal matrices from the entries below the diagonal of a matrix, row by row.

    Args:
      parameters: d (d - 1) / 2 numbers each.
      size: d, at least 2.
      kind: `"householder"`, the product of the reflections along the columns of the unit lower triangular matrix, or
        `"cayley"`, (I - S / 2)^-1 (I + S / 2) of the skew matrix S, which gives rotations only.

    Returns:
      Matrices of float32 or better.

    Raises:
      ValueError: on another kind, or numbers that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.graph.sheaf_diffusion import orthogonal
      >>> orthogonal(jnp.zeros(1), 2, "cayley").tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    if size < 2 or parameters.shape[-1:] != (size * (size - 1) // 2,) or kind not in ("householder", "cayley"):
        raise ValueError(
            f"kind={kind!r} must be 'householder' or 'cayley' and parameters {parameters.shape} end in d (d - 1) / 2 "
            f"for d=size={size}, at least 2; set them"
        )
    parameters = parameters.astype(at_least_float32(parameters.dtype))
    rows, columns = np.tril_indices(size, -1)
    lower = jnp.zeros((*parameters.shape[:-1], size, size), parameters.dtype).at[..., rows, columns].set(parameters)
    eye = jnp.eye(size, dtype=parameters.dtype)
    if kind == "cayley":
        skew = (lower - jnp.swapaxes(lower, -1, -2)) / 2
        return jnp.linalg.solve(eye - skew, eye + skew)
    found = jnp.broadcast_to(eye, lower.shape)
    for column in range(size):
        v = (lower + eye)[..., :, column]
        scale = 2 / jnp.sum(jnp.square(v), axis=-1)[..., None, None]
        found = found - scale * (found @ v[..., None]) * v[..., None, :]
    return found


def sheaf_laplacian(
    own: Float[Array, "..."],
    other: Float[Array, "..."],
    senders: Int[Array, "*batch edges"],
    receivers: Int[Array, "*batch edges"],
    count: int,
    *,
    diagonal: bool = False,
    mask: Bool[Array, "*batch edges"] | None = None,
) -> SheafLaplacian:
    """Return the blocks of (D + I)^-1/2 L (D + I)^-1/2, with L = delta^T delta and D its diagonal blocks.

    (delta x)_e = F_v x_v - F_u x_u for an edge e between v and u, so that L_vv = sum_e F_v^T F_v and
    L_vu = -F_v^T F_u. Its eigenvalues are in [0, 2).

    Args:
      own: map F_v of each edge at its receiver v, `[*batch, edges, d, d]`, or the diagonal of it.
      other: map F_u at its sender u; the maps of the edge back are the same two, exchanged.
      senders: u.
      receivers: v.
      count: number of nodes.
      diagonal: the maps are given by their diagonals `[*batch, edges, d]`.
      mask: True = a real edge; loops are taken out: their coboundary is zero.

    Returns:
      Blocks, or diagonals, in float32 or better.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.graph.sheaf_diffusion import sheaf_laplacian
      >>> one, ends = jnp.ones((2, 1)), (jnp.array([0, 1]), jnp.array([1, 0]))
      >>> found = sheaf_laplacian(one, one, *ends, 2, diagonal=True)
      >>> found.nodes.round(3).tolist(), found.edges.round(3).tolist()
      ([[0.5], [0.5]], [[-0.5], [-0.5]])
    """
    real = senders != receivers
    if mask is not None:
        real = real & mask
    dtype = at_least_float32(jnp.result_type(own, other))
    own, other = own.astype(dtype), other.astype(dtype)
    if diagonal:
        sums = segment_sum(jnp.square(own), receivers, count, mask=real)
        scales = jax.lax.rsqrt(1 + sums)
        edges = -own * other * gather_nodes(scales, receivers) * gather_nodes(scales, senders)
        return SheafLaplacian(jnp.where(real[..., None], edges, 0), jnp.square(scales) * sums)
    transposed = jnp.swapaxes(own, -1, -2)
    sums = segment_sum(transposed @ own, receivers, count, mask=real)
    roots = inverse_root(sums + jnp.eye(own.shape[-1], dtype=dtype))
    edges = -gather_nodes(roots, receivers) @ transposed @ other @ gather_nodes(roots, senders)
    return SheafLaplacian(jnp.where(real[..., None, None], edges, 0), roots @ sums @ roots)


def apply_laplacian(
    laplacian: SheafLaplacian,
    x: Float[Array, "*batch nodes d features"],
    senders: Int[Array, "*batch edges"],
    receivers: Int[Array, "*batch edges"],
) -> Float[Array, "*batch nodes d features"]:
    """Return the product of the Laplacian with node features that have `d` components in each channel.

    Args:
      laplacian: from `sheaf_laplacian`.
      x: features.
      senders: as the Laplacian was made with.
      receivers: likewise.

    Returns:
      Features of the same shape, in the dtype that both promote to.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlayers.graph.sheaf_diffusion import apply_laplacian, sheaf_laplacian
      >>> one, ends = jnp.ones((2, 1)), (jnp.array([0, 1]), jnp.array([1, 0]))
      >>> laplacian = sheaf_laplacian(one, one, *ends, 2, diagonal=True)
      >>> apply_laplacian(laplacian, jnp.array([[[1.0]], [[3.0]]]), *ends).round(3).tolist()
      [[[-1.0]], [[1.0]]]
    """
    x = x.astype(jnp.result_type(x, laplacian.nodes))

    def product(blocks: jax.Array, x: jax.Array) -> jax.Array:
        return blocks[..., None] * x if blocks.ndim == x.ndim - 1 else blocks @ x

    received = segment_sum(product(laplacian.edges, gather_nodes(x, senders)), receivers, x.shape[-3])
    return product(laplacian.nodes, x) + received


class _SheafLearner(nn.Module):
    """Predict the maps of every edge from the features of its ends, tanh(W [x_v, x_u]), and build the Laplacian."""

    maps: str
    stalk_size: int
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(
        self, x: jax.Array, senders: jax.Array, receivers: jax.Array, edge_mask: jax.Array | None
    ) -> SheafLaplacian:
        d = self.stalk_size
        entries = {"diagonal": d, "general": d * d}.get(self.maps, d * (d - 1) // 2)
        kernel = self.param("kernel", self.kernel_init, (2 * x.shape[-1], entries), self.param_dtype)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        # The nodes are multiplied once, not the edges.
        first, second = x @ kernel[: x.shape[-1]], x @ kernel[x.shape[-1] :]
        own, other = (self._maps(first, second, *ends) for ends in ((receivers, senders), (senders, receivers)))
        diagonal = self.maps == "diagonal"
        return sheaf_laplacian(own, other, senders, receivers, x.shape[-2], diagonal=diagonal, mask=edge_mask)

    def _maps(self, first: jax.Array, second: jax.Array, near: jax.Array, far: jax.Array) -> jax.Array:
        entry = jnp.tanh(gather_nodes(first, near) + gather_nodes(second, far))
        entry = entry.astype(at_least_float32(entry.dtype))
        if self.maps == "general":
            return entry.reshape(*entry.shape[:-1], self.stalk_size, self.stalk_size)
        return entry if self.maps == "diagonal" else orthogonal(entry, self.stalk_size, self.maps)


class SheafDiffusionLayer(nn.Module):
    """Take one step of heat flow along a sheaf that is predicted from the features.

    X <- (1 + tanh(epsilon)) X - act(Delta (I kron W_1) X W_2), with X of d components and f channels at each node,
    W_1 `[d, d]`, W_2 `[f, f]`, epsilon `[d]`, and the normalised sheaf Laplacian Delta of the maps
    F_v = tanh(W [x_v, x_u]) of each edge between v and u, see `sheaf_laplacian`; the maps are d x d, general, diagonal
    or orthogonal.

    Symmetry:
      Permutations of the nodes, with the ends of the edges renumbered: exactly equivariant. The order of the edges:
      exactly invariant.

    Attributes:
      stalk_size: d; positive, and at least 2 for orthogonal maps.
      maps: `"diagonal"`, `"householder"` or `"cayley"` (orthogonal), or `"general"`.
      left_weights: learn W_1, from the identity; else it is the identity.
      right_weights: learn W_2; else it is the identity.
      activation_fn: act.
      dtype: compute dtype; `None` infers it from input and parameters. Maps and Laplacian are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of W; W_2 begins orthogonal.

    Cost:
      2 d f entries multiply-accumulates a node for the maps, d f (d + f) for W_1 and W_2, d^2 f an edge for Delta
      (d f for diagonal maps), and for general maps an eigendecomposition of d x d for each node.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.graph import SheafDiffusionLayer
      >>> senders, receivers = jnp.array([[0, 1, 1, 2], [1, 0, 2, 1]])
      >>> layer = SheafDiffusionLayer(stalk_size=2, maps="cayley")
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((3, 8)), senders, receivers)[0].shape
      (3, 8)

    Source:
      Bodnar, Di Giovanni, Chamberlain, Lio, Bronstein, Neural Sheaf Diffusion: A Topological Perspective on
      Heterophily and Oversmoothing in GNNs, NeurIPS 2022, section 4, equations 4 and 5. Reference code
      twitter-research/neural-sheaf-diffusion at 11e21b5, `models/disc_models.py`, `models/laplacian_builders.py`.

    Differs:
      As the code, D + I in the place of D in the normalisation and the factor 1 + tanh(epsilon). For general maps the
      code takes the root by a singular value decomposition, shifts D at random in training to keep its gradient finite
      and cuts entries to [-1, 1]: here the gradient is exact without. The Cayley transform has no unused parameters
      for the diagonal. Learned weights of the edges and fixed low- and high-pass components are not there.
    """

    stalk_size: int = 2
    maps: str = "diagonal"
    left_weights: bool = True
    right_weights: bool = True
    activation_fn: ActivationFn = nn.elu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()

    @nn.compact
    def __call__(
        self,
        nodes: Float[Array, "*batch nodes features"],
        senders: Int[Array, "*batch edges"],
        receivers: Int[Array, "*batch edges"],
        *,
        laplacian: SheafLaplacian | None = None,
        mask: Bool[Array, "*batch nodes"] | None = None,
        edge_mask: Bool[Array, "*batch edges"] | None = None,
    ) -> Float[Array, "*batch nodes features"]:
        """Take the step.

        Args:
          nodes: features X, `d x f` of them, component by component.
          senders: node that each edge leaves.
          receivers: node that each edge enters; every edge is there in both directions.
          laplacian: of a sheaf that is known; `None` predicts it.
          mask: True = a real node.
          edge_mask: True = a real edge.

        Returns:
          Features of the same width; zero where padded. A node alone keeps (1 + tanh(epsilon)) X.

        Raises:
          ValueError: on shapes that do not fit, ids that are no nodes, concrete edges without the one back, or fields
            out of range.
        """
        _check_maps(self.maps, self.stalk_size)
        width = nodes.shape[-1]
        if width < self.stalk_size or width % self.stalk_size:
            raise ValueError(
                f"stalk_size={self.stalk_size} must divide the width of the nodes {nodes.shape}; set stalk_size"
            )
        nodes, edge_mask = clean_graph(nodes, senders, receivers, mask=mask, edge_mask=edge_mask)
        check_undirected(senders, receivers, mask=edge_mask)
        if laplacian is None:
            learner = _SheafLearner(
                self.maps, self.stalk_size, self.dtype, self.param_dtype, self.kernel_init, name="sheaf"
            )
            laplacian = learner(nodes, senders, receivers, edge_mask)
        stalks = (*nodes.shape[:-1], self.stalk_size, width // self.stalk_size)
        x = nodes.reshape(stalks)
        plain: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.left_weights:
            x = jnp.swapaxes(x, -1, -2)
            x = nn.Dense(self.stalk_size, kernel_init=_identity, name="left", **plain)(x)
            x = jnp.swapaxes(x, -1, -2)
        if self.right_weights:
            x = nn.Dense(stalks[-1], kernel_init=nn.initializers.orthogonal(), name="right", **plain)(x)
        dtype = x.dtype
        x = self.activation_fn(apply_laplacian(laplacian, x, senders, receivers).astype(dtype))
        epsilon = self.param("epsilon", zeros(), (self.stalk_size,), self.param_dtype)
        kept = (1 + jnp.tanh(epsilon.astype(dtype)))[:, None] * nodes.reshape(stalks).astype(dtype)
        x = axes.constrain_last((kept - x).reshape(nodes.shape), axes.BATCH, axes.NODES, None)
        return x if mask is None else jnp.where(mask[..., None], x, 0)


class SheafDiffusion(nn.Module):
    """Classify nodes by heat flow along a learned sheaf.

    X_0 = act(X W + b), `d x f` features at each node; depth `SheafDiffusionLayer`s; logits = X_depth W_out + b_out.

    Symmetry:
      As `SheafDiffusionLayer`.

    Attributes:
      num_classes: numbers for each node; 0 gives the features X_depth.
      features: f, channels of each component; positive.
      stalk_size: d, components of each channel; positive, and at least 2 for orthogonal maps.
      depth: number of steps, 0 or more.
      maps: `"diagonal"`, `"householder"` or `"cayley"` (orthogonal), or `"general"`.
      left_weights: learn W_1 of each step.
      right_weights: learn W_2 of each step.
      learn_every_step: predict a sheaf in every step, else once from X_0.
      activation_fn: act, after the first layer and in the steps.
      dropout_rate: dropout of X_0 and of the input of each step, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters. Maps and Laplacian are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels but W_1 (identity) and W_2 (orthogonal).
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      depth times that of a step, see `SheafDiffusionLayer`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.graph import SheafDiffusion
      >>> senders, receivers = jnp.array([[0, 1, 1, 2], [1, 0, 2, 1]])
      >>> model = SheafDiffusion(num_classes=5, features=4, stalk_size=2, maps="general")
      >>> model.init_with_output(jax.random.key(0), jnp.ones((3, 6)), senders, receivers)[0].shape
      (3, 5)

    Source:
      Bodnar, Di Giovanni, Chamberlain, Lio, Bronstein, Neural Sheaf Diffusion: A Topological Perspective on
      Heterophily and Oversmoothing in GNNs, NeurIPS 2022, section 4. Reference code
      twitter-research/neural-sheaf-diffusion at 11e21b5, `models/disc_models.py`.

    Differs:
      Logits, not their log softmax. One rate of dropout, and the maps see the features without it. Further
      differences: see `SheafDiffusionLayer`.
    """

    num_classes: int
    features: int = 16
    stalk_size: int = 2
    depth: int = 2
    maps: str = "diagonal"
    left_weights: bool = True
    right_weights: bool = True
    learn_every_step: bool = True
    activation_fn: ActivationFn = nn.elu
    dropout_rate: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        nodes: Float[Array, "*batch nodes features"],
        senders: Int[Array, "*batch edges"],
        receivers: Int[Array, "*batch edges"],
        *,
        mask: Bool[Array, "*batch nodes"] | None = None,
        edge_mask: Bool[Array, "*batch edges"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch nodes out"]:
        """Classify the nodes.

        Args:
          nodes: features.
          senders: node that each edge leaves.
          receivers: node that each edge enters; every edge is there in both directions.
          mask: True = a real node.
          edge_mask: True = a real edge.
          deterministic: no dropout.

        Returns:
          Logits, or features; zero where padded.

        Raises:
          ValueError: on shapes that do not fit, ids that are no nodes, concrete edges without the one back, or fields
            out of range.
        """
        _check_maps(self.maps, self.stalk_size)
        if self.features < 1 or self.depth < 0 or self.num_classes < 0:
            raise ValueError(
                f"features={self.features} must be positive and depth={self.depth} and num_classes={self.num_classes} "
                "not negative; set them"
            )
        nodes, edge_mask = clean_graph(nodes, senders, receivers, mask=mask, edge_mask=edge_mask)
        check_undirected(senders, receivers, mask=edge_mask)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
        }
        dropout = nn.Dropout(self.dropout_rate)
        x = nn.Dense(self.stalk_size * self.features, bias_init=self.bias_init, name="encode", **common)(nodes)
        x = dropout(self.activation_fn(x), deterministic=deterministic)
        laplacian = None
        if not self.learn_every_step and self.depth > 0:
            laplacian = _SheafLearner(self.maps, self.stalk_size, name="sheaf", **common)(
                x, senders, receivers, edge_mask
            )
        for index in range(self.depth):
            layer = SheafDiffusionLayer(
                self.stalk_size,
                self.maps,
                self.left_weights,
                self.right_weights,
                self.activation_fn,
                name=f"layers_{index}",
                **common,
            )
            x = dropout(x, deterministic=deterministic)
            x = layer(x, senders, receivers, laplacian=laplacian, mask=mask, edge_mask=edge_mask)
        if self.num_classes:
            x = nn.Dense(self.num_classes, bias_init=self.bias_init, name="head", **common)(x)
        return x if mask is None else jnp.where(mask[..., None], x, 0)


def from_reference(tensors: Mapping[str, Any], model: SheafDiffusion) -> Params:
    """Return the parameters of a `SheafDiffusion` from those of the reference's `Discrete...SheafDiffusion`.

    Args:
      tensors: arrays by the reference's names, such as `lin_right_weights.0.weight`; of a model without the second
        linear layer, the sparse learner, edge weights and fixed components.
      model: the model they are for.

    Returns:
      Parameters.

    Raises:
      ValueError: if names are missing or unknown.
    """
    left = dict(tensors)

    def take(name: str) -> np.ndarray:
        if name not in left:
            raise ValueError(f"tensors must hold {name!r}; set the model's fields as the reference has them")
        return np.asarray(left.pop(name))

    def learner(index: int) -> dict[str, jax.Array]:
        weight = take(f"sheaf_learners.{index}.linear1.weight")
        if model.maps == "cayley":  # the diagonal of their triangle has no effect
            rows, columns = np.tril_indices(model.stalk_size)
            weight = weight[rows != columns]
        return {"kernel": jnp.asarray(weight.T)}

    params: dict[str, Any] = {}
    for ours, theirs in (("encode", "lin1"), ("head", "lin2")):
        params[ours] = {
            "kernel": jnp.asarray(take(f"{theirs}.weight").T),
            "bias": jnp.asarray(take(f"{theirs}.bias")),
        }
    if not model.learn_every_step:
        params["sheaf"] = learner(0)
    for index in range(model.depth):
        layer: dict[str, Any] = {"epsilon": jnp.asarray(take(f"epsilons.{index}")[:, 0])}
        if model.left_weights:
            layer["left"] = {"kernel": jnp.asarray(take(f"lin_left_weights.{index}.weight").T)}
        if model.right_weights:
            layer["right"] = {"kernel": jnp.asarray(take(f"lin_right_weights.{index}.weight").T)}
        if model.learn_every_step:
            layer["sheaf"] = learner(index)
        params[f"layers_{index}"] = layer
    if left:
        raise ValueError(f"tensors must be known; unknown {sorted(left)}; set the model's fields as the reference has")
    return params


# Ours to theirs, see `jaxlayers.core.reference`.
REFERENCE_NAMES: Mapping[str, str] = {
    "encode": "lin1",
    "head": "lin2",
    "sheaf": "sheaf_learners.0.linear1",
    "layers/sheaf": "sheaf_learners.{layer}.linear1",
    "layers/left": "lin_left_weights.{layer}",
    "layers/right": "lin_right_weights.{layer}",
    "layers/epsilon": "epsilons.{layer}",
}


def _learner(model: SheafDiffusion, ours: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of their learner, whose triangles for Cayley maps have a diagonal, which has no effect."""
    size = model.stalk_size
    return (size * (size + 1) // 2 if model.maps == "cayley" else ours[1], ours[0])


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/twitter-research/neural-sheaf-diffusion, models/disc_models.py",
        module=SheafDiffusion,
        read=lambda tensors, model, inputs: {"params": from_reference(tensors, model)},
        marks=(r"^sheaf_learners\.0\.linear1\.weight$", r"^epsilons\.0$", r"^lin1\.weight$"),
        layout=dialects.table_layout(
            REFERENCE_NAMES, shapes={"sheaf/kernel": _learner, "layers/epsilon": dialects.with_ones(after=1)}
        ),
        head="lin2.weight",
    ),
)


def _identity(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    return jnp.eye(shape[0], shape[1], dtype=dtype)


def _check_maps(maps: str, stalk_size: int) -> None:
    if maps not in MAPS or stalk_size < (1 if maps == "diagonal" else 2):
        raise ValueError(
            f"maps={maps!r} must be one of {MAPS} and stalk_size={stalk_size} at least 2, or 1 for diagonal maps; set "
            "them"
        )
