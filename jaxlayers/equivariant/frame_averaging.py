"""Frame averaging: any function, averaged over a small frame of group elements, becomes invariant or equivariant.

Longer than most files, since the wrappers, the module, two backbones and the n-body network belong to one paper.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import DenyList
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxlayers.core import axes, dialects, reference
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.initializers import lecun_normal, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory, Params
from jaxlayers.geometry.frames import (
    EUCLIDEAN_GROUPS,
    Frame,
    FrameFunction,
    average,
    distance_keys,
    laplacian_keys,
    permutation_frame,
    product,
    pull,
    sample,
    select,
    weighted_frame,
)
from jaxlayers.nn.feed_forward import FeedForward

GROUPS = (*EUCLIDEAN_GROUPS, "S_n", *(f"S_n x {group}" for group in EUCLIDEAN_GROUPS))

# A branch that only degenerate inputs take must not add to what every call records.
_RECORDS = DenyList(("intermediates", "losses"))

Representations = Sequence[str | None]


# Averaging any callable ---------------------------------------------------------------------------------------------


def frame_average(
    fn: Callable[..., Any],
    frame: Frame,
    *inputs: Any,
    representations: Representations = ("points",),
    output: Any = "scalar",
    mask: Bool[Array, "*batch n"] | None = None,
) -> Any:
    """Return sum_k w_k g_k fn(g_k^-1 inputs), the average of `fn` over a frame.

    `fn` is vectorised over the frame with `jax.vmap`, so it may be any JAX function and sees the shapes it would see
    alone. Elements that only degenerate inputs need are evaluated only if some input of the batch is degenerate.

    Args:
      fn: called as `fn(*inputs)`, or `fn(*inputs, mask=mask)` when there is a mask. Its outputs must begin with the
        batch axes of the frame.
      frame: from `jaxlayers.geometry.frames`; pass `sample(frame, key)` for the one-element estimate.
      inputs: arrays.
      representations: of each input, see `jaxlayers.geometry.frames.pull`; `None` hands an input on as it is.
      output: representation of the output, or a tree of them: `"scalar"` gives an invariant function.
      mask: True = a point, False = padding. Padded points and vectors reach `fn` as zeros.

    Returns:
      The averaged output.

    Raises:
      ValueError: if the numbers of inputs and representations differ, a representation is unknown, or an output does
        not keep the batch axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.frame_averaging import frame_average
      >>> from jaxlayers.geometry.frames import weighted_frame
      >>> points = jax.random.normal(jax.random.key(0), (5, 3))
      >>> first = lambda x: jnp.tanh(x)[0]
      >>> frame_average(first, weighted_frame(points, "SO(d)"), points, output="vector").shape
      (3,)
    """
    _check_representations(inputs, representations)

    def evaluate(part: Frame) -> Any:
        arrays = [index for index, name in enumerate(representations) if name is not None]
        keywords = {} if mask is None else {"mask": pull(part, mask, "nodes")}

        def single(moved: list[jax.Array], keywords: dict[str, jax.Array]) -> Any:
            replaced = dict(zip(arrays, moved, strict=True))
            return fn(*(replaced.get(index, x) for index, x in enumerate(inputs)), **keywords)

        moved = [pull(part, inputs[index], representations[index], mask=mask) for index in arrays]
        return _average_tree(part, jax.vmap(single)(moved, keywords), output)

    result = evaluate(select(frame, 0, frame.principal))
    if frame.size == frame.principal:
        return result
    rest = select(frame, frame.principal, frame.size)
    return jax.lax.cond(
        jnp.any(rest.weights > 0), lambda: jax.tree.map(jnp.add, result, evaluate(rest)), lambda: result
    )


def equivariant(
    fn: Callable[..., Any],
    group: str = "E(d)",
    *,
    output: Any = "points",
    representations: Representations = ("points",),
    frame: FrameFunction = weighted_frame,
    max_orders: int = 24,
) -> Callable[..., Any]:
    """Return the frame average of `fn`: equivariant to `group`, with the frame taken from the inputs.

    Args:
      fn: any JAX function of the inputs (and of the keyword `mask`, when one is given).
      group: one of `GROUPS`.
      output: representation of the output, or a tree of them.
      representations: of each input.
      frame: what gives the Euclidean frame of the first input of representation `"points"`.
      max_orders: number of node orders averaged over, for groups with S_n.

    Returns:
      `averaged(*inputs, mask=None, key=None)`; a JAX `key` gives the one-element estimate instead of the average.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.frame_averaging import equivariant
      >>> points = jax.random.normal(jax.random.key(0), (5, 3))
      >>> turn = jnp.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
      >>> step = equivariant(lambda x: x + jnp.sin(x + 1), "E(d)")
      >>> bool(jnp.allclose(step(points @ turn + 1), step(points) @ turn + 1, atol=1e-5))
      True
    """

    def averaged(*inputs: Any, mask: jax.Array | None = None, key: jax.Array | None = None) -> Any:
        _check_representations(inputs, representations)
        found = frame_of(
            *inputs,
            group=group,
            representations=representations,
            frame=frame,
            max_orders=max_orders,
            mask=mask,
            key=key,
        )
        return frame_average(fn, found, *inputs, representations=representations, output=output, mask=mask)

    return averaged


def invariant(
    fn: Callable[..., Any],
    group: str = "E(d)",
    *,
    representations: Representations = ("points",),
    frame: FrameFunction = weighted_frame,
    max_orders: int = 24,
) -> Callable[..., Any]:
    """Return the frame average of `fn` as an invariant function; see `equivariant`."""
    return equivariant(fn, group, output="scalar", representations=representations, frame=frame, max_orders=max_orders)


def frame_of(
    *inputs: Any,
    group: str = "E(d)",
    representations: Representations = ("points",),
    frame: FrameFunction = weighted_frame,
    max_orders: int = 24,
    mask: Bool[Array, "*batch n"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Frame:
    """Return the frame of `group` for the given inputs.

    The Euclidean part comes from the first input of representation `"points"` and ignores the order of the points. The
    S_n part sorts the nodes by what the Euclidean part leaves alone: `"set"` features, `laplacian_keys` of every
    `"adjacency"`, and distances and lengths of points and vectors (their coordinates, if the group is S_n alone). Each
    part ignores what the other acts on, so their product is a frame of the product group.

    Args:
      inputs: arrays with common batch axes.
      group: one of `GROUPS`.
      representations: of each input.
      frame: what gives the Euclidean frame.
      max_orders: number of node orders.
      mask: True = a point, False = padding.
      key: draw one element for each input of the batch, by weight, from the whole frame.

    Returns:
      The frame, of one element when a `key` is given.

    Raises:
      ValueError: on an unknown group, or if no input can tell its frame.
    """
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is unknown; use one of {GROUPS}")
    symmetric, _, rest = group.partition(" x ")
    euclidean = rest if symmetric == "S_n" else group
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    pose = None
    if euclidean:
        clouds = [x for x, name in zip(inputs, representations, strict=True) if name == "points"]
        if not clouds:
            raise ValueError(
                f"group={group!r} needs an input of representation 'points' to take the frame from; got "
                f"representations={tuple(representations)}"
            )
        pose = frame(clouds[0], euclidean, mask=mask)
        pose = pose if keys[0] is None else sample(pose, keys[0])
    if symmetric != "S_n":
        assert pose is not None
        return pose
    order = permutation_frame(
        _node_keys(inputs, representations, euclidean, mask),
        mask=mask,
        max_orders=max_orders if key is None else 1,
        key=keys[1],
    )
    return order if pose is None else product(pose, order)


def _node_keys(
    inputs: Sequence[Any], representations: Representations, euclidean: str, mask: jax.Array | None
) -> jax.Array:
    """Return what to sort the nodes by, as `[*batch, n, keys]`."""
    keys: list[jax.Array] = []
    for x, name in zip(inputs, representations, strict=True):
        if name == "set" or (name in ("points", "vectors") and not euclidean):
            keys.append(x)
        elif name == "adjacency":
            keys.append(laplacian_keys(x, mask=mask))
        elif name == "points":
            keys.append(distance_keys(x, mask=mask))
        if euclidean and (name == "vectors" or (name == "points" and "E" not in euclidean)):
            keys.append(jnp.linalg.norm(x, axis=-1, keepdims=True))
    if not keys:
        raise ValueError(
            "groups with S_n need an input of representation 'set', 'adjacency', 'points' or 'vectors' to sort the "
            f"nodes by; got representations={tuple(representations)}"
        )
    return jnp.concatenate(keys, axis=-1)


def _check_representations(inputs: Sequence[Any], representations: Representations) -> None:
    if len(inputs) != len(representations):
        raise ValueError(
            f"{len(inputs)} inputs need as many representations; got representations={tuple(representations)}"
        )


def _average_tree(frame: Frame, outputs: Any, output: Any) -> Any:
    """Average outputs whose representations are a tree that is a prefix of theirs."""
    return jax.tree.map(lambda name, part: jax.tree.map(lambda leaf: average(frame, leaf, name), part), output, outputs)


def _average_module(module: nn.Module, frame: Frame, evaluate: Callable[[Any, Frame], Any]) -> Any:
    """Return `evaluate(module, frame)`, a sum over the frame, skipping the elements that no input needs."""
    result = evaluate(module, select(frame, 0, frame.principal))
    if frame.size == frame.principal:
        return result
    rest = select(frame, frame.principal, frame.size)
    return nn.cond(
        jnp.any(rest.weights > 0),
        lambda module, result: jax.tree.map(jnp.add, result, evaluate(module, rest)),
        lambda module, result: result,
        module,
        result,
        variables=_RECORDS,
    )


def _split_batch(x: jax.Array) -> jax.Array:
    """Name the first of several axes as the batch."""
    return axes.constrain(x, axes.BATCH, *(None,) * (x.ndim - 1)) if x.ndim > 1 else x


class FrameAveraging(nn.Module):
    """Make any module invariant or equivariant by averaging it over a frame of its input.

    out = sum_k w_k g_k backbone(g_k^-1 inputs) over the weighted frame {(w_k, g_k)} of the inputs, with
    g^-1 x = (x - t) R for points, R `[d, d]` orthogonal and t `[d]`; the weights are 1 / |F| where the covariance of
    the points has a simple spectrum. With output `"scalar"` the outer g_k drops out and `out` is invariant.

    Symmetry:
      `group` acts on the inputs by `representations` and on the output by `output`: exact, to rounding, for any
      backbone. E(d), SE(d), O(d) and SO(d) frames do not depend on the order of the points, so a permutation-
      equivariant (or -invariant) backbone stays so: that is S_n x E(d) with 2^d elements. `"S_n x E(d)"` averages over
      node orders as well, for backbones that know no permutations.
      Where it breaks: with `frame=principal_frame`, the paper's, nothing holds for repeated covariance eigenvalues
      (cube, tetrahedron, square), and rounding grows as 1 / eigengap near them. The default `weighted_frame` holds
      there too, unless more than `anchors` axis choices tie (a ring of over 64 points): `Frame.exact` of
      `frame_of` tells. For S_n, exactness ends with more than `max_orders` orders of tied nodes.

    Attributes:
      backbone: any module; it must treat leading axes as batch, since it is called on `[frames, *batch, ...]`.
        Keywords `mask` and `deterministic` are handed on if its call takes them.
      group: `"E(d)"`, `"SE(d)"`, `"O(d)"`, `"SO(d)"`, `"S_n"` or `"S_n x ..."` with one of the former.
      output: representation of the backbone's output, or a tree of them: `"scalar"` (invariant), `"points"`,
        `"vectors"`, `"point"`, `"vector"`, `"matrix"`, `"set"`, `"nodes"`, `"adjacency"`, `"edges"`.
      representations: the same for each input; `None` hands an input on as it is, without the axis of frames.
      frame: what gives the Euclidean frame: `weighted_frame`, `anchor_frame` or `principal_frame` of
        `jaxlayers.geometry.frames`, or a `functools.partial` of one.
      max_orders: number of node orders averaged over, for groups with S_n; at least 1.

    Collections:
      The RNG stream `frame`, when `deterministic=False`. The evaluation of elements that only degenerate inputs need
      records nothing in `intermediates` and `losses`.

    Cost:
      2^d evaluations of the backbone (2^(d-1) for SE(d) and SO(d)); if an input of the batch has a relative eigengap
      below 0.05, twice the `anchors` of the frame more (once for proper groups). One in training.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.frame_averaging import FrameAveraging
      >>> layer = FrameAveraging(backbone=nn.Dense(3), group="E(d)", output="points")
      >>> points = jax.random.normal(jax.random.key(0), (2, 5, 3))
      >>> moved, _ = layer.init_with_output(jax.random.key(1), points)
      >>> moved.shape
      (2, 5, 3)

    Source:
      Puny, Atzmon, Ben-Hamu, Misra, Grover, Smith, Lipman, Frame Averaging for Invariant and Equivariant Network
      Design, ICLR 2022, equations 3 and 4, section 3 (frames of E(d), SE(d) and S_n); reference code
      omri1348/Frame-Averaging. Weighted frames: Dym, Lawrence, Siegel, Equivariant Frames and the Impossibility of
      Continuous Canonicalization, ICML 2024.

    Differs:
      Degenerate spectra, where the paper's frame is none, are handled by weighted anchors. Nodes are sorted by
      features besides the Laplacian's eigenspaces, ties are found with a tolerance rather than by rounding, and all
      orders of ties are enumerated if they fit. S_n x E(d) exists as a product frame too.
    """

    backbone: nn.Module
    group: str = "E(d)"
    output: Any = "scalar"
    representations: tuple[str | None, ...] = ("points",)
    frame: FrameFunction = weighted_frame
    max_orders: int = 24

    @nn.compact
    def __call__(self, *inputs: Any, mask: Bool[Array, "*batch n"] | None = None, deterministic: bool = True) -> Any:
        """Average the backbone over the frame of the inputs.

        Args:
          inputs: arrays, one for each of `representations`, with common leading axes `*batch`.
          mask: True = a point, False = padding. Padded points and vectors reach the backbone as zeros.
          deterministic: average over the whole frame; otherwise take one element at random for each input, by weight,
            which is the average in expectation.

        Returns:
          What the backbone returns, without the axis of frames.

        Raises:
          ValueError: on an unknown group or representation, inputs of a wrong shape, dtype or number, or a backbone
            that drops its leading axes.
        """
        _check_representations(inputs, self.representations)
        frame = frame_of(
            *inputs,
            group=self.group,
            representations=self.representations,
            frame=self.frame,
            max_orders=self.max_orders,
            mask=mask,
            key=None if deterministic else self.make_rng("frame"),
        )
        taken = inspect.signature(type(self.backbone).__call__).parameters
        keywords = {"deterministic": deterministic} if "deterministic" in taken else {}

        def evaluate(backbone: Any, part: Frame) -> Any:
            moved = (
                x if name is None else pull(part, x, name, mask=mask)
                for x, name in zip(inputs, self.representations, strict=True)
            )
            masks = {"mask": pull(part, mask, "nodes")} if mask is not None and "mask" in taken else {}
            return _average_tree(part, backbone(*moved, **masks, **keywords), self.output)

        return jax.tree.map(_split_batch, _average_module(self.backbone, frame, evaluate))


# Backbones and models -----------------------------------------------------------------------------------------------


class PointNet(nn.Module):
    """Classify a point cloud by a perceptron of every point, a maximum over the points, and a perceptron of that.

    h_i = act(norm(W_l ... act(norm(W_1 x_i)))), g = max_i h_i, logits = W_head act(norm(W g)), with points x_i `[d]`.

    Symmetry:
      Exactly invariant to permutations of the points. Not to rotations, reflections or translations: wrap it in
      `FrameAveraging` for those, or use it bare as the control.

    Attributes:
      num_classes: number of logits; 0 gives the features before the head.
      features: widths of the perceptron of every point, at least one.
      hidden_features: widths of the perceptron after the maximum; may be empty.
      activation_fn: the nonlinearity.
      norm: makes the normalisation after every dense layer but the head, or `None` for none.
      dropout_rate: dropout before the head, in [0, 1).
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      n x (d x features[0] + features[0] x features[1] + ...) multiply-accumulates.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.frame_averaging import PointNet
      >>> model = PointNet(num_classes=10, features=(8, 16), hidden_features=(8,))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 10)

    Source:
      Qi, Su, Mo, Guibas, PointNet: Deep Learning on Point Sets for 3D Classification and Segmentation, CVPR 2017,
      equation 1; the backbone of Puny et al., ICLR 2022, section 5.1.

    Differs:
      No learned input and feature transforms, as in Puny et al.; layer instead of batch normalisation, so that a
      sample does not depend on its batch.
    """

    num_classes: int = 40
    features: Sequence[int] = (64, 128, 256)
    hidden_features: Sequence[int] = (128,)
    activation_fn: ActivationFn = nn.relu
    norm: ModuleFactory | None = nn.LayerNorm
    dropout_rate: float = 0.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        points: Float[Array, "*batch n d"],
        *,
        mask: Bool[Array, "*batch n"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch outputs"]:
        """Classify clouds.

        Args:
          points: coordinates in any unit; about 1 suits the initialisation.
          mask: True = a point, False = padding.
          deterministic: no dropout.

        Returns:
          Logits, or features if `num_classes` is 0.

        Raises:
          ValueError: if the points are not `[*batch, n, d]`, or there is no positive width in `features`.
        """
        if points.ndim < 2 or 0 in points.shape[-2:]:
            raise ValueError(f"points of shape {points.shape} must be [*batch, n, d]; put the coordinates last")
        widths = (*self.features, *self.hidden_features)
        if not self.features or min(widths) < 1:
            raise ValueError(
                f"features={tuple(self.features)} and hidden_features={tuple(self.hidden_features)} must be positive "
                "and features must not be empty; set them"
            )

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(
                width,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
            )

        def block(x: jax.Array, width: int, name: str) -> jax.Array:
            x = dense(width, name)(x)
            if self.norm is not None:
                x = self.norm(dtype=self.dtype, param_dtype=self.param_dtype, name=f"{name}_norm")(x)
            return self.activation_fn(x)

        x = points
        for index, width in enumerate(self.features):
            x = block(x, width, f"point_{index}")
        if mask is not None:
            x = jnp.where(mask[..., None], x, -jnp.inf)
        x = _split_batch(jnp.max(x, axis=-2))
        if mask is not None:
            # A cloud of padding alone has no maximum.
            x = jnp.where(jnp.any(mask, axis=-1, keepdims=True), x, 0)
        for index, width in enumerate(self.hidden_features):
            x = block(x, width, f"cloud_{index}")
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        return dense(self.num_classes, "head")(x) if self.num_classes else x


def frame_pointnet(
    num_classes: int = 40,
    features: Sequence[int] = (64, 128, 256),
    hidden_features: Sequence[int] = (128,),
    group: str = "E(d)",
    frame: FrameFunction = weighted_frame,
    dropout_rate: float = 0.0,
    dtype: Dtype | None = None,
) -> FrameAveraging:
    """Return a PointNet averaged over frames: point clouds `[*batch, n, d]` to invariant logits.

    Args:
      num_classes: number of logits.
      features: widths of the perceptron of every point.
      hidden_features: widths of the perceptron after the maximum.
      group: `"E(d)"`, `"SE(d)"`, `"O(d)"` or `"SO(d)"`.
      frame: see `FrameAveraging`.
      dropout_rate: dropout before the head.
      dtype: compute dtype of the PointNet; frames are in float32 or better.

    Returns:
      An unbound `FrameAveraging` module.
    """
    backbone = PointNet(num_classes, tuple(features), tuple(hidden_features), dropout_rate=dropout_rate, dtype=dtype)
    return FrameAveraging(backbone=backbone, group=group, frame=frame)


class _ParticleLayer(nn.Module):
    """Let every node gather messages from all others: h_i + node(h_i, sum_j edge(h_i, h_j, e_ij))."""

    features: int
    activation_fn: ActivationFn
    dtype: Dtype | None
    param_dtype: Dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(
        self,
        nodes: Float[Array, "*batch n features"],
        edges: Float[Array, "*#batch n n edge_features"],
        pairs: Bool[Array, "*#batch n n"],
    ) -> Float[Array, "*batch n features"]:
        perceptron = functools.partial(
            FeedForward,
            hidden_features=self.features,
            out_features=self.features,
            activation_fn=self.activation_fn,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )
        *batch, n, features = nodes.shape
        receivers = jnp.broadcast_to(nodes[..., :, None, :], (*batch, n, n, features))
        senders = jnp.broadcast_to(nodes[..., None, :, :], (*batch, n, n, features))
        edges = jnp.broadcast_to(edges.astype(nodes.dtype), (*batch, n, n, edges.shape[-1]))
        messages = self.activation_fn(perceptron(name="edge")(jnp.concatenate([receivers, senders, edges], axis=-1)))
        gathered = jnp.sum(jnp.where(pairs[..., None], messages, 0), axis=-2)
        return nodes + perceptron(name="node")(jnp.concatenate([nodes, gathered], axis=-1))


class ParticleGNN(nn.Module):
    """Predict where charged particles go, by message passing over all pairs on their plain coordinates.

    h_i = W (x_i, v_i); depth times h_i <- h_i + node(h_i, sum_{j != i} edge(h_i, h_j, c_i c_j, |x_i - x_j|^2));
    out_i = decoder(h_i), with positions x and velocities v `[n, d]`, charges c `[n, 1]`, h `[n, features]`, and edge,
    node and decoder perceptrons of one hidden layer.

    Symmetry:
      Exactly equivariant to permutations of the particles. Not to rotations, reflections or translations: use
      `FrameGNN` or `FrameAveraging` for those, or this as the control.

    Attributes:
      features: width of the nodes and of all hidden layers; positive.
      depth: number of message passing layers; at least 1.
      dimensions: of space, d.
      activation_fn: the nonlinearity.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      About depth x 3 features^2 multiply-accumulates for each of the n^2 pairs, which are held in memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.frame_averaging import ParticleGNN
      >>> model = ParticleGNN(features=12, depth=2)
      >>> inputs = jnp.ones((2, 5, 3)), jnp.ones((2, 5, 3)), jnp.ones((2, 5, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)[0].shape
      (2, 5, 3)

    Source:
      The backbone of FA-GNN in Puny et al., ICLR 2022, section 5.3: the message passing network of Satorras,
      Hoogeboom, Welling, E(n) Equivariant Graph Neural Networks, ICML 2021; reference code
      omri1348/Frame-Averaging, `nbody/models/gcl.py`.

    Differs:
      Dense pairs and a mask instead of edge lists, so that one compilation serves graphs of any number of particles.
    """

    features: int = 60
    depth: int = 4
    dimensions: int = 3
    activation_fn: ActivationFn = nn.silu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    def setup(self) -> None:
        """Make the parts, which `FrameGNN` calls one by one."""
        if min(self.features, self.depth, self.dimensions) < 1:
            raise ValueError(
                f"features={self.features}, depth={self.depth} and dimensions={self.dimensions} must be positive; "
                "set them"
            )
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        self.embedding = nn.Dense(self.features, **common)
        self.layers = [_ParticleLayer(self.features, self.activation_fn, **common) for _ in range(self.depth)]
        self.decoder = FeedForward(self.features, self.dimensions, self.activation_fn, **common)

    def __call__(
        self,
        positions: Float[Array, "*batch n d"],
        velocities: Float[Array, "*batch n d"],
        charges: Float[Array, "*batch n charges"],
        *,
        mask: Bool[Array, "*batch n"] | None = None,
    ) -> Float[Array, "*batch n d"]:
        """Predict positions.

        Args:
          positions: in any unit.
          velocities: in any unit.
          charges: one or more invariant numbers of each particle; pairs see their products.
          mask: True = a particle, False = padding, which sends no messages.

        Returns:
          Predicted positions; meaningless where padded.

        Raises:
          ValueError: if the shapes do not fit, or a size is not positive.
        """
        edges, pairs = self.edges(positions, velocities, charges, mask)
        nodes = self.embedding(jnp.concatenate([positions, velocities], axis=-1))
        for layer in self.layers:
            nodes = _split_batch(layer(nodes, edges, pairs))
        return self.decoder(nodes)

    def edges(
        self, positions: jax.Array, velocities: jax.Array, charges: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return what pairs see besides their nodes, which no Euclidean motion changes, and which pairs there are."""
        n, d = positions.shape[-2:]
        fits = positions.shape == velocities.shape and positions.shape[:-1] == charges.shape[:-1]
        if d != self.dimensions or not fits:
            raise ValueError(
                f"positions {positions.shape}, velocities {velocities.shape} and charges {charges.shape} must be "
                f"[*batch, n, {self.dimensions}] twice and [*batch, n, charges]; reshape them or set dimensions"
            )
        positions = positions.astype(at_least_float32(positions.dtype))
        squared = jnp.sum(jnp.square(positions[..., :, None, :] - positions[..., None, :, :]), axis=-1, keepdims=True)
        products = charges[..., :, None, :] * charges[..., None, :, :]
        pairs = jnp.broadcast_to(~jnp.eye(n, dtype=bool), (*positions.shape[:-1], n))
        if mask is not None:
            pairs = pairs & mask[..., :, None] & mask[..., None, :]
        return jnp.concatenate([products.astype(squared.dtype), squared], axis=-1), pairs


class FrameGNN(nn.Module):
    """Predict where charged particles go, equivariantly: message passing in a frame that is taken anew at every layer.

    Every layer of the network runs in each element g of a frame, and its output, read as features / d vectors of each
    particle, is averaged: u_i = mean_g g h_i(g). The next layer's frame is that of all the vectors u. The decoder's
    output is averaged likewise and added to the centroid.

    Symmetry:
      `group` acts on positions, on velocities as vectors, and on the output as positions: exact, to rounding. So do
      permutations of the particles.
      Where it breaks: where a frame does, see `FrameAveraging`. Latent vectors are (nearly) degenerate wherever the
      particles are symmetric.

    Attributes:
      backbone: the message passing network, whose parts are used; its `features` must divide by its `dimensions`.
      group: `"E(d)"`, `"SE(d)"`, `"O(d)"` or `"SO(d)"`.
      frame: what gives the frames, see `FrameAveraging`.

    Cost:
      2^d times the backbone; more if an input of the batch, or its latent vectors, are nearly degenerate.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.frame_averaging import FrameGNN, ParticleGNN
      >>> model = FrameGNN(backbone=ParticleGNN(features=12, depth=2))
      >>> inputs = jnp.ones((2, 5, 3)), jnp.ones((2, 5, 3)), jnp.ones((2, 5, 1))
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), *inputs)[0].shape
      (2, 5, 3)

    Source:
      FA-GNN of Puny et al., ICLR 2022, section 5.3; reference code omri1348/Frame-Averaging,
      `nbody/n_body_system/model_FA.py`.

    Differs:
      Degenerate frames are handled (`frame=principal_frame` is the reference's). Frames have derivatives, unless made
      with `stop_gradient=True` as there.
    """

    backbone: ParticleGNN
    group: str = "E(d)"
    frame: FrameFunction = weighted_frame

    @nn.compact
    def __call__(
        self,
        positions: Float[Array, "*batch n d"],
        velocities: Float[Array, "*batch n d"],
        charges: Float[Array, "*batch n charges"],
        *,
        mask: Bool[Array, "*batch n"] | None = None,
    ) -> Float[Array, "*batch n d"]:
        """Predict positions.

        Args:
          positions: in any unit.
          velocities: in any unit.
          charges: one or more invariant numbers of each particle; pairs see their products.
          mask: True = a particle, False = padding.

        Returns:
          Predicted positions; meaningless where padded.

        Raises:
          ValueError: if the shapes do not fit, the group is unknown, or `features` does not divide by the dimensions.
        """
        features, d = self.backbone.features, self.backbone.dimensions
        if features % d:
            raise ValueError(f"features={features} must be divisible by dimensions={d}; set features of the backbone")
        edges, pairs = self.backbone.edges(positions, velocities, charges, mask)
        *batch, n, _ = positions.shape
        vectors = features // d
        vector_mask = None if mask is None else jnp.repeat(mask, vectors, axis=-1)

        def first(backbone: Any, part: Frame) -> jax.Array:
            pulled = pull(part, positions, "points", mask=mask), pull(part, velocities, "vectors", mask=mask)
            nodes = backbone.embedding(jnp.concatenate(pulled, axis=-1))
            return finish(backbone, part, nodes, 0)

        def further(backbone: Any, part: Frame, latent: jax.Array, index: int) -> jax.Array:
            nodes = pull(part, latent, "points", mask=vector_mask).reshape(part.size, *batch, n, features)
            return finish(backbone, part, nodes, index)

        def finish(backbone: Any, part: Frame, nodes: jax.Array, index: int) -> jax.Array:
            nodes = backbone.layers[index](nodes, edges, pairs)
            if index == backbone.depth - 1:
                return average(part, backbone.decoder(nodes), "vectors")
            return average(part, nodes.reshape(part.size, *batch, n * vectors, d), "vectors")

        frame = self.frame(positions, self.group, mask=mask)
        centroid = frame.translation
        result = _average_module(self.backbone, frame, first)
        for index in range(1, self.backbone.depth):
            frame = self.frame(result, self.group, mask=vector_mask)
            evaluate = functools.partial(further, latent=_split_batch(result), index=index)
            result = _average_module(self.backbone, frame, evaluate)
        return _split_batch(result if centroid is None else result + centroid[..., None, :])


# The reference code ---------------------------------------------------------------------------------------------------

# Our parameters of `ParticleGNN` (below "backbone/" in `FrameGNN`) and those of the reference's `FA_GNN`.
REFERENCE_NAMES: Mapping[str, str] = {
    "embedding": "embedding.0",
    "layers/edge/up": "gcl_{layer}.edge_mlp.0",
    "layers/edge/down": "gcl_{layer}.edge_mlp.2",
    "layers/node/up": "gcl_{layer}.node_mlp.0",
    "layers/node/down": "gcl_{layer}.node_mlp.2",
    "decoder/up": "decoder.0",
    "decoder/down": "decoder.2",
}


def from_reference(tensors: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """Return parameters of `FrameGNN` from the state dict of the reference's n-body model.

    Args:
      tensors: arrays by the reference's names.
      params: parameters of our module (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      A parameter tree like `params`.

    Raises:
      ValueError: if names or shapes are not those of `params`.
    """
    wanted = flax.traverse_util.flatten_dict(params, sep="/")
    names = {path: reference.reference_name(path.removeprefix("backbone/"), REFERENCE_NAMES) for path in wanted}
    missing = sorted(set(names.values()) - set(tensors))
    unknown = sorted(set(tensors) - set(names.values()))
    if missing or unknown:
        raise ValueError(f"the state dict must match the module; missing {missing}, unknown {unknown}; set its fields")
    found = {}
    for path, name in names.items():
        tensor = np.asarray(tensors[name]).T
        if tensor.shape != wanted[path].shape:
            raise ValueError(
                f"{name} must give {path} its shape {wanted[path].shape}, not {tensor.shape}; set the module's fields"
            )
        found[path] = jnp.asarray(tensor)
    return flax.traverse_util.unflatten_dict(found, sep="/")


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/omri1348/Frame-Averaging, nbody",
        module=FrameGNN,
        read=dialects.from_shapes(from_reference),
        marks=(r"^embedding\.0\.weight$", r"^gcl_0\.edge_mlp\.0\.weight$", r"^decoder\.2\.weight$"),
        layout=dialects.table_layout({f"backbone/{ours}": theirs for ours, theirs in REFERENCE_NAMES.items()}),
    ),
)

_CLOUD = jax.ShapeDtypeStruct((1, 1024, 3), jnp.float32)
_PARTICLES = tuple(jax.ShapeDtypeStruct((1, 5, width), jnp.float32) for width in (3, 3, 1))

VARIANTS: dict[str, dict[str, Any]] = {
    "frame_averaging_pointnet": {"module": frame_pointnet, "inputs": (_CLOUD,), "num_classes": 40},
    "frame_averaging_gnn": {"module": FrameGNN, "inputs": _PARTICLES, "backbone": ParticleGNN(features=60, depth=4)},
}
