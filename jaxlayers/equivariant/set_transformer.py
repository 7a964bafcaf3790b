"""Set Transformer: attention blocks over sets, with inducing points and pooling by attention."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects, reference, remat
from jaxlayers.core.initializers import lecun_normal, xavier_uniform, zeros
from jaxlayers.core.types import ActivationFn, Dtype, Initializer, ModuleFactory
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads


class MAB(nn.Module):
    """Let queries attend to a set, in several heads, with residuals around attention and perceptron.

    H = norm(Q + softmax(Q_h K_h^T / sqrt(features)) V_h joined over the heads h), out = norm(H + act(H W + b)), with Q
    linear in x `[queries, ...]`, K and V linear in y `[points, ...]`, all `[*, features]`.

    Symmetry:
      Exactly equivariant to permutations of the queries and invariant to those of the set (to rounding).

    Attributes:
      features: width; positive.
      num_heads: number of heads; must divide the features.
      norm: makes the normalisations after each residual, or `None` for none, the reference's default.
      activation_fn: the nonlinearity of the perceptron, of one layer.
      dtype: compute dtype; `None` infers it from input and parameters. The softmax is in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      2 (q + n) features^2 + 2 q n features multiply-accumulates for q queries and n points of that width.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.set_transformer import MAB
      >>> layer, inputs = MAB(features=8, num_heads=2), (jnp.ones((1, 3, 4)), jnp.ones((1, 7, 5)))
      >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), *inputs)[0].shape
      (1, 3, 8)

    Source:
      Lee, Lee, Kim, Kosiorek, Choi, Teh, Set Transformer, ICML 2019, equations 6 and 7; reference code
      juho-lee/set_transformer at 73432c6, `modules.py`.

    Differs:
      Masks. A query that may attend to nothing keeps its own value: its attention is zero.
    """

    features: int
    num_heads: int = 4
    norm: ModuleFactory | None = None
    activation_fn: ActivationFn = nn.relu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch queries query_features"],
        y: Float[Array, "*batch points point_features"],
        *,
        mask: Bool[Array, "*batch points"] | None = None,
    ) -> Float[Array, "*batch queries features"]:
        """Attend.

        Args:
          x: what the queries are made of.
          y: the set that they attend to.
          mask: True = a real point of y, False = padding; `None` = all real.

        Returns:
          A vector for each query.

        Raises:
          ValueError: if the heads do not divide the features, or the shapes do not fit.
        """
        if self.num_heads < 1 or self.features < 1 or self.features % self.num_heads:
            raise ValueError(
                f"features={self.features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        if x.ndim < 2 or x.shape[:-2] != y.shape[:-2]:
            raise ValueError(
                f"queries {x.shape} and points {y.shape} must be [*batch, n, features] of the same batch; reshape them"
            )
        y = _without_padding(y, mask)
        common: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(
            nn.Dense, self.features, kernel_init=self.kernel_init, bias_init=self.bias_init, **common
        )
        whole = dense(name="query")(x)
        query, key, value = (
            axes.constrain_heads(split_heads(part, self.num_heads))
            for part in (whole, dense(name="key")(y), dense(name="value")(y))
        )

        def attend(module: nn.Module, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            scale = self.features**-0.5
            attended = None if mask is None else mask[..., None, None, :]
            weights = attention_weights(jnp.matmul(query * scale, jnp.swapaxes(key, -1, -2)), mask=attended)
            module.sow("intermediates", "attention_weights", weights)
            return jnp.matmul(weights, value)

        hidden = whole + merge_heads(axes.constrain_heads(remat.attention(attend, self, query, key, value)))
        if self.norm is not None:
            hidden = self.norm(name="attention_norm", **common)(hidden)
        hidden = hidden + self.activation_fn(dense(name="out")(hidden))
        if self.norm is not None:
            hidden = self.norm(name="out_norm", **common)(hidden)
        return axes.constrain_last(hidden, axes.BATCH, axes.NODES, None)


class SAB(nn.Module):
    """Let the elements of a set attend to one another.

    SAB(x) = MAB(x, x) with x `[points, ...]`.

    Symmetry:
      Exactly equivariant to permutations of the elements (to rounding).

    Attributes:
      features: width; positive.
      num_heads: number of heads; must divide the features.
      norm: makes the normalisations, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      4 n features^2 + 2 n^2 features multiply-accumulates for n elements of that width.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.set_transformer import SAB
      >>> jax.eval_shape(SAB(8).init_with_output, jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 8)

    Source:
      Lee, Lee, Kim, Kosiorek, Choi, Teh, Set Transformer, ICML 2019, equation 8; reference code
      juho-lee/set_transformer at 73432c6, `modules.py`.

    Differs:
      Masks.
    """

    features: int
    num_heads: int = 4
    norm: ModuleFactory | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch points inputs"], *, mask: Bool[Array, "*batch points"] | None = None
    ) -> Float[Array, "*batch points features"]:
        """Attend.

        Args:
          x: elements.
          mask: True = an element, False = padding; `None` = all real.

        Returns:
          A vector for each element; meaningless but finite where padded.

        Raises:
          ValueError: on shapes or heads that do not fit.
        """
        _check(x, mask)
        x = _without_padding(x, mask)
        return _block(self, "block")(x, x, mask=mask)


class ISAB(nn.Module):
    """Let the elements of a set attend to one another through a few learned inducing points.

    ISAB(x) = MAB(x, MAB(I, x)) with x `[points, ...]` and parameters I `[inducing, features]`.

    Symmetry:
      Exactly equivariant to permutations of the elements (to rounding).

    Attributes:
      features: width; positive.
      num_heads: number of heads; must divide the features.
      num_inducing: number of inducing points; positive.
      norm: makes the normalisations, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      About 4 (n + m) features^2 + 4 n m features multiply-accumulates for n elements and m inducing points.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.set_transformer import ISAB
      >>> jax.eval_shape(ISAB(8, num_inducing=3).init_with_output, jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 8)

    Source:
      Lee, Lee, Kim, Kosiorek, Choi, Teh, Set Transformer, ICML 2019, equations 9 and 10; reference code
      juho-lee/set_transformer at 73432c6, `modules.py`.

    Differs:
      Masks. Of an empty set the inducing points see nothing.
    """

    features: int
    num_heads: int = 4
    num_inducing: int = 32
    norm: ModuleFactory | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch points inputs"], *, mask: Bool[Array, "*batch points"] | None = None
    ) -> Float[Array, "*batch points features"]:
        """Attend.

        Args:
          x: elements.
          mask: True = an element, False = padding; `None` = all real.

        Returns:
          A vector for each element; meaningless but finite where padded.

        Raises:
          ValueError: on shapes or heads that do not fit, or without inducing points.
        """
        _check(x, mask)
        if self.num_inducing < 1:
            raise ValueError(f"num_inducing={self.num_inducing} must be positive; set num_inducing, or use SAB")
        x = _without_padding(x, mask)
        inducing = _learned(self, "inducing", self.num_inducing, x)
        summary = _block(self, "gather")(inducing, x, mask=mask)
        return _block(self, "spread")(x, summary)


class PMA(nn.Module):
    """Pool a set into a few vectors, by attention of learned seeds.

    PMA(x) = MAB(S, x) with x `[points, ...]` and parameters S `[seeds, features]`.

    Symmetry:
      Exactly invariant to permutations of the elements (to rounding).

    Attributes:
      features: width; positive.
      num_heads: number of heads; must divide the features.
      num_seeds: number of vectors that come out; positive.
      norm: makes the normalisations, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      About 2 (n + k) features^2 + 2 n k features multiply-accumulates for n elements and k seeds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.set_transformer import PMA
      >>> jax.eval_shape(PMA(8, num_seeds=2).init_with_output, jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 2, 8)

    Source:
      Lee, Lee, Kim, Kosiorek, Choi, Teh, Set Transformer, ICML 2019, equation 11; reference code
      juho-lee/set_transformer at 73432c6, `modules.py`.

    Differs:
      Equation 11 has a perceptron on x first; the code and this layer do not. Masks. An empty set gives what the seeds
      give by themselves.
    """

    features: int
    num_heads: int = 4
    num_seeds: int = 1
    norm: ModuleFactory | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch points inputs"], *, mask: Bool[Array, "*batch points"] | None = None
    ) -> Float[Array, "*batch seeds features"]:
        """Pool.

        Args:
          x: elements.
          mask: True = an element, False = padding; `None` = all real.

        Returns:
          A vector for each seed.

        Raises:
          ValueError: on shapes or heads that do not fit, or without seeds.
        """
        _check(x, mask)
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds={self.num_seeds} must be positive; set num_seeds")
        return _block(self, "block")(_learned(self, "seeds", self.num_seeds, x), x, mask=mask)


class SetTransformer(nn.Module):
    """Compute a few vectors of a set by attention.

    y = W (SAB^k(PMA(ISAB^d(x)))) with x `[points, ...]`: d = `depth` blocks over the elements, pooling into
    `num_outputs` vectors, k = `decoder_depth` blocks over those, a linear layer.

    Symmetry:
      Exactly invariant to permutations of the elements (to rounding).

    Attributes:
      features: width of the blocks; positive.
      out_features: width of the outputs; positive.
      num_outputs: number of vectors that come out; positive.
      num_heads: number of heads; must divide the features.
      num_inducing: number of inducing points of each encoder block; `None` = plain SAB, whose cost is quadratic in the
        number of elements.
      depth: number of encoder blocks.
      decoder_depth: number of blocks after pooling.
      norm: makes the normalisations, or `None` for none.
      dtype: compute dtype; `None` infers it from input and parameters. Softmaxes are in float32 or better.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of the kernels.
      bias_init: initialiser of the biases.

    Cost:
      That of its blocks: linear in the number of elements with inducing points.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.equivariant.set_transformer import SetTransformer
      >>> x = jax.random.normal(jax.random.key(0), (2, 9, 3))
      >>> model = SetTransformer(features=8, out_features=5, num_inducing=4)
      >>> y, variables = model.init_with_output(jax.random.key(1), x)
      >>> y.shape, bool(jnp.allclose(y, model.apply(variables, x[:, ::-1]), atol=1e-5))
      ((2, 1, 5), True)

    Source:
      Lee, Lee, Kim, Kosiorek, Choi, Teh, Set Transformer, ICML 2019, section 3; reference code
      juho-lee/set_transformer at 73432c6, `models.py`, whose depths are the defaults.

    Differs:
      Masks. An empty set has a finite output, the same for all.
    """

    features: int = 128
    out_features: int = 1
    num_outputs: int = 1
    num_heads: int = 4
    num_inducing: int | None = 32
    depth: int = 2
    decoder_depth: int = 2
    norm: ModuleFactory | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch points inputs"], *, mask: Bool[Array, "*batch points"] | None = None
    ) -> Float[Array, "*batch outputs out_features"]:
        """Compute y.

        Args:
          x: elements.
          mask: True = an element, False = padding; `None` = all real.

        Returns:
          `num_outputs` vectors for each set.

        Raises:
          ValueError: on shapes, widths or heads that do not fit.
        """
        if min(self.depth, self.decoder_depth) < 0 or self.out_features < 1 or self.num_outputs < 1:
            raise ValueError(
                f"depth={self.depth} and decoder_depth={self.decoder_depth} must not be negative, "
                f"out_features={self.out_features} and num_outputs={self.num_outputs} must be positive; set them"
            )
        _check(x, mask)
        common: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        block: dict[str, Any] = {"features": self.features, "num_heads": self.num_heads, "norm": self.norm, **common}
        for index in range(self.depth):
            if self.num_inducing is None:
                x = SAB(**block, name=f"encoder_{index}")(x, mask=mask)
            else:
                x = ISAB(**block, num_inducing=self.num_inducing, name=f"encoder_{index}")(x, mask=mask)
        pooled = PMA(**block, num_seeds=self.num_outputs, name="pooling")(x, mask=mask)
        for index in range(self.decoder_depth):
            pooled = SAB(**block, name=f"decoder_{index}")(pooled)
        return nn.Dense(self.out_features, name="head", **common)(pooled)


_PARTS = {
    "query": "fc_q",
    "key": "fc_k",
    "value": "fc_v",
    "out": "fc_o",
    "attention_norm": "ln0",
    "out_norm": "ln1",
}


def _names(depth: int, decoder_depth: int) -> Mapping[str, str]:
    """Return the table of `jaxlayers.core.reference`; the reference counts pooling, blocks and head of its decoder."""
    blocks = {"pooling/block": "dec.0.mab"}
    for index in range(depth):
        parts = {"block": "mab", "gather": "mab0", "spread": "mab1"}
        blocks |= {f"encoder_{index}/{ours}": f"enc.{index}.{theirs}" for ours, theirs in parts.items()}
    blocks |= {f"decoder_{index}/block": f"dec.{index + 1}.mab" for index in range(decoder_depth)}
    return {
        **{f"{ours}/{part}": f"{theirs}.{name}" for ours, theirs in blocks.items() for part, name in _PARTS.items()},
        **{f"encoder_{index}/inducing": f"enc.{index}.I" for index in range(depth)},
        "pooling/seeds": "dec.0.S",
        "head": f"dec.{decoder_depth + 1}",
    }


def from_reference(tensors: Mapping[str, Any], model: SetTransformer, x: Any) -> dict[str, Any]:
    """Return parameters of `model` from the state dict of the reference's `SetTransformer`.

    For normalisations as there, set `norm=functools.partial(nn.LayerNorm, epsilon=1e-5)`.

    Args:
      tensors: arrays by the reference's names.
      model: the model they are for.
      x: its input, or the shape of it.

    Returns:
      A parameter tree of JAX arrays, in the dtype of the tensors.

    Raises:
      ValueError: if names or shapes of the tensors are not those of the model.
    """
    return _read(tensors, model, (x,))["params"]


def _read(tensors: Mapping[str, Any], model: SetTransformer, inputs: Any) -> dict[str, Any]:
    wanted = dialects.shapes_of(model, inputs)["params"]
    # Inducing points and seeds have an axis for the batch there.
    plain = {name: tensor[0] if name.endswith((".I", ".S")) else tensor for name, tensor in tensors.items()}
    return {"params": reference.read_reference(plain, wanted, _names(model.depth, model.decoder_depth))}


def _layout(model: SetTransformer, variables: Mapping[str, Any]) -> dialects.Layout:
    batched = dict.fromkeys(("inducing", "seeds"), dialects.with_ones(before=1))
    return dialects.table_layout(_names(model.depth, model.decoder_depth), shapes=batched)(model, variables)


# Norms must be as there, see `from_reference`.
DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/juho-lee/set_transformer",
        module=SetTransformer,
        read=_read,
        marks=(r"^dec\.0\.S$", r"^enc\.0\.mab0?\.fc_q\.weight$"),
        layout=_layout,
    ),
)


def _block(module: Any, name: str) -> MAB:
    return MAB(
        module.features,
        module.num_heads,
        norm=module.norm,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=module.kernel_init,
        bias_init=module.bias_init,
        name=name,
    )


def _learned(module: Any, name: str, count: int, x: jax.Array) -> jax.Array:
    """Return learned vectors for each set of the batch."""
    vectors = module.param(name, xavier_uniform(), (count, module.features), module.param_dtype)
    return jnp.broadcast_to(vectors.astype(jnp.promote_types(vectors.dtype, x.dtype)), (*x.shape[:-2], *vectors.shape))


def _without_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Return `x` with zeros for padding, so that not even a NaN in it reaches anything."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def _check(x: jax.Array, mask: jax.Array | None) -> None:
    if x.ndim < 2 or (mask is not None and mask.shape != x.shape[:-1]):
        shape = None if mask is None else mask.shape
        raise ValueError(
            f"elements {x.shape} must be [*batch, points, features], with a mask {shape} over batch and points; "
            "reshape them"
        )
