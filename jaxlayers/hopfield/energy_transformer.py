"""Energy Transformer: tokens that descend one energy, of attention and of a Hopfield network, step by step."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float

from jaxlayers.core import axes, dialects
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.types import Dtype, Initializer, Params


def attention_energy(
    g: Float[Array, "*#batch tokens features"],
    query: Float[Array, "features heads head_dim"],
    key: Float[Array, "features heads head_dim"],
    *,
    beta: float,
    mask: Bool[Array, "*#batch #heads #tokens #tokens"] | None = None,
) -> Float[Array, "*#batch"]:
    """Return E = -1/beta sum_h sum_C log sum_B exp(beta K_hB . Q_hC), with Q = g W_Q and K = g W_K.

    Args:
      g: normalised tokens.
      query: W_Q.
      key: W_K.
      beta: inverse temperature, positive.
      mask: True = query token C (the axis before the last) sees key token B. One that sees none has no energy.

    Returns:
      The energy of every batch element, float32 or better.
    """
    q = jnp.einsum("...nd,dhz->...hnz", g, query)
    k = jnp.einsum("...nd,dhz->...hnz", g, key)
    dtype = at_least_float32(g.dtype)
    logits = beta * jnp.einsum("...hcz,...hbz->...hcb", q, k, preferred_element_type=dtype)
    if mask is None:
        terms = jax.nn.logsumexp(logits, axis=-1)
    else:
        allowed = jnp.broadcast_to(mask, logits.shape)
        some = jnp.any(allowed, axis=-1)
        # A query that sees nothing would be -inf, with a gradient of NaN: let it see everything, then take it out.
        terms = jnp.where(some, jax.nn.logsumexp(logits, axis=-1, where=allowed | ~some[..., None]), 0.0)
    return -jnp.sum(terms, axis=(-2, -1)) / beta


def memory_energy(
    g: Float[Array, "*batch tokens features"],
    memories: Float[Array, "features memories"],
    *,
    token_mask: Bool[Array, "*#batch tokens"] | None = None,
) -> Float[Array, "*batch"]:
    """Return E = -1/2 sum_B sum_mu relu(xi_mu . g_B)^2 of tokens beside memories xi_mu, the columns of `memories`.

    Args:
      g: normalised tokens.
      memories: xi.
      token_mask: True = a token; False = padding, which has no energy.

    Returns:
      The energy of every batch element, float32 or better.
    """
    dtype = at_least_float32(g.dtype)
    hidden = jnp.einsum("...nd,dm->...nm", g, memories, preferred_element_type=dtype)
    terms = jnp.sum(jnp.square(jax.nn.relu(hidden)), axis=-1)
    return -0.5 * jnp.sum(terms if token_mask is None else jnp.where(token_mask, terms, 0.0), axis=-1)


class EnergyLayerNorm(nn.Module):
    """Normalise tokens as the gradient of a convex function, which lends them an energy.

    g_i = gamma (x_i - mean(x)) / sqrt(var(x) + epsilon) + delta_i = dL/dx_i with L = D gamma sqrt(var(x) + epsilon) +
    sum_i delta_i x_i over the D features of a token. L is convex for gamma >= 0, which makes steps against dE/dg
    descend in E.

    Symmetry:
      Permutations of the tokens: equivariant. Exact. Adding one number to all features of a token: invariant.

    Attributes:
      use_bias: add delta, one number for each feature.
      epsilon: added to the variance.
      dtype: of the output; `None` = that of inputs and parameters. Statistics are float32 or better.
      param_dtype: of parameters.

    Cost:
      That of a layer normalisation; one parameter `scale` (gamma) besides `bias` (delta).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import EnergyLayerNorm
      >>> x = jnp.arange(12.0).reshape(1, 3, 4)
      >>> g, variables = EnergyLayerNorm().init_with_output(jax.random.key(0), x)
      >>> g.shape, EnergyLayerNorm().apply(variables, x, method="energy").shape
      ((1, 3, 4), (1, 3))

    Source:
      Hoover et al., "Energy Transformer", NeurIPS 2023; code: bhoov/energy-transformer-jax.

    Differs:
      Lagrangian and energy are given for each token (code: of one token, or of a sum of tokens).
    """

    use_bias: bool = True
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __call__(self, inputs: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Normalise over the last axis.

        Args:
          inputs: tokens x.

        Returns:
          g, the gradient of the Lagrangian.

        Raises:
          ValueError: if `epsilon` is negative or the inputs have no features.
        """
        scale, bias = self.scale_and_bias(inputs)
        (dtype,) = {one.dtype for one in promote_dtype(inputs, scale, dtype=self.dtype)}
        return _normalize(inputs, scale, bias, self.epsilon).astype(dtype)

    def lagrangian(self, inputs: Float[Array, "*batch features"]) -> Float[Array, "*batch"]:
        """Return L of every token, of which `__call__` is the gradient."""
        scale, bias = self.scale_and_bias(inputs)
        x = inputs.astype(at_least_float32(inputs.dtype))
        spread = jnp.sqrt(jnp.var(x, axis=-1) + self.epsilon)
        return x.shape[-1] * scale * spread + (0.0 if bias is None else jnp.sum(bias * x, axis=-1))

    def energy(self, inputs: Float[Array, "*batch features"]) -> Float[Array, "*batch"]:
        """Return g . x - L(x) of every token, the Legendre transform of L."""
        scale, bias = self.scale_and_bias(inputs)
        x = inputs.astype(at_least_float32(inputs.dtype))
        g = _normalize(x, scale, bias, self.epsilon)
        return jnp.sum(g * x, axis=-1) - self.lagrangian(inputs)

    @nn.compact
    def scale_and_bias(self, inputs: Float[Array, "*batch features"]) -> tuple[Array, Array | None]:
        """Return gamma and delta (`None` without a bias)."""
        if self.epsilon < 0:
            raise ValueError(f"epsilon={self.epsilon} must be at least 0; set epsilon")
        if inputs.ndim < 1 or inputs.shape[-1] < 1:
            raise ValueError(f"inputs have shape {inputs.shape} and must be [*batch, features]; add an axis")
        scale = self.param("scale", nn.initializers.ones_init(), (), self.param_dtype)
        if not self.use_bias:
            return scale, None
        return scale, self.param("bias", nn.initializers.zeros_init(), inputs.shape[-1:], self.param_dtype)


class EnergyAttention(nn.Module):
    """Attend by an energy, whose gradient is attention from each token and to each token.

    E = -1/beta sum_h sum_C log sum_B exp(beta K_hB . Q_hC) with Q = g W_Q, K = g W_K, W_Q and W_K `[features, heads,
    head_dim]`. The layer returns -dE/dg: with p_hC = softmax_B(beta K_hB . Q_hC), token A gets
    sum_h W_Q sum_B p_hAB K_hB, an attention with values W_Q K, and sum_h W_K sum_C p_hCA Q_hC, from the tokens that
    attend to it.

    Symmetry:
      Permutations of the tokens (with their masks): energy invariant, output equivariant. Exact.

    Attributes:
      num_heads: attentions side by side, whose energies add.
      head_dim: width of queries and keys in one head.
      beta: inverse temperature, positive. `None` = 1/sqrt(head_dim).
      self_attention: a token sees itself (the code). False leaves it out of its own sum (the paper's B != C).
      dtype: of computation; `None` = that of inputs and parameters. Energies are float32 or better.
      param_dtype: of parameters.
      kernel_init: of W_Q and W_K.

    Cost:
      O(tokens^2 heads head_dim), about that of attention; half of its parameters, as there are no values and no output.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import EnergyAttention
      >>> layer, g = EnergyAttention(num_heads=2, head_dim=4), jnp.ones((3, 5, 8))
      >>> step, variables = layer.init_with_output(jax.random.key(0), g)
      >>> step.shape, layer.apply(variables, g, method="energy").shape
      ((3, 5, 8), (3,))

    Source:
      Hoover et al., "Energy Transformer", NeurIPS 2023; code: bhoov/energy-transformer-jax.

    Differs:
      Kernels are stored as those of dense layers, `[features, heads * head_dim]` (code: `[heads, head_dim, features]`).
      Masks are ours. The initial spread is that of the code of the experiments, 0.002 (tidied code: 1).
    """

    num_heads: int = 12
    head_dim: int = 64
    beta: float | None = None
    self_attention: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.002)

    def __call__(
        self,
        inputs: Float[Array, "*batch tokens features"],
        *,
        mask: Bool[Array, "*#batch #heads #tokens #tokens"] | None = None,
        token_mask: Bool[Array, "*#batch tokens"] | None = None,
    ) -> Float[Array, "*batch tokens features"]:
        """Return the step -dE/dg that lowers the energy.

        Args:
          inputs: normalised tokens g.
          mask: True = the query token (axis before the last) sees the key token, in that head.
          token_mask: True = a token; False = padding, which is not seen and sees nothing: its step is zero.

        Returns:
          One step for each token.

        Raises:
          ValueError: if a field is out of range or shapes don't fit.
        """
        query, key = self.kernels(inputs)
        g, query, key = promote_dtype(inputs, query, key, dtype=self.dtype)
        mask = self.visible(g, mask, token_mask)
        return -jax.grad(lambda g: jnp.sum(attention_energy(g, query, key, beta=self.inverse_temperature, mask=mask)))(
            g
        )

    def energy(
        self,
        inputs: Float[Array, "*batch tokens features"],
        *,
        mask: Bool[Array, "*#batch #heads #tokens #tokens"] | None = None,
        token_mask: Bool[Array, "*#batch tokens"] | None = None,
    ) -> Float[Array, "*batch"]:
        """Return E of every batch element; arguments as `__call__`."""
        query, key = self.kernels(inputs)
        g, query, key = promote_dtype(inputs, query, key, dtype=self.dtype)
        mask = self.visible(g, mask, token_mask)
        return attention_energy(g, query, key, beta=self.inverse_temperature, mask=mask)

    @property
    def inverse_temperature(self) -> float:
        """The beta in use."""
        return 1 / math.sqrt(self.head_dim) if self.beta is None else self.beta

    @nn.compact
    def kernels(self, inputs: Float[Array, "*batch tokens features"]) -> tuple[Array, Array]:
        """Return W_Q and W_K, each `[features, heads, head_dim]`."""
        for name in ("num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; set {name}")
        if not 0 < self.inverse_temperature < math.inf:
            raise ValueError(f"beta={self.beta} must be positive and finite; set beta")
        _check_tokens(inputs)
        shape = (inputs.shape[-1], self.num_heads * self.head_dim)
        query, key = (_Kernel(shape, self.kernel_init, self.param_dtype, name=name)() for name in ("query", "key"))
        split = (shape[0], self.num_heads, self.head_dim)
        return query.reshape(split), key.reshape(split)

    def visible(
        self, g: Float[Array, "*batch tokens features"], mask: Array | None, token_mask: Array | None
    ) -> Array | None:
        """Return one mask, `[*batch, heads, queries, keys]`, from both of `__call__` and `self_attention`."""
        tokens = g.shape[-2]
        if mask is not None:
            try:
                np.broadcast_shapes(mask.shape[-2:], (tokens, tokens))
            except ValueError as error:
                raise ValueError(
                    f"mask of shape {mask.shape} must broadcast to [*batch, heads, {tokens}, {tokens}]; pass such one"
                ) from error
        if token_mask is not None:
            if token_mask.shape[-1] != tokens:
                raise ValueError(
                    f"token_mask has {token_mask.shape[-1]} entries for {tokens} tokens; pass one for each"
                )
            pairs = token_mask[..., None, :, None] & token_mask[..., None, None, :]
            mask = pairs if mask is None else mask & pairs
        if not self.self_attention:
            others = ~jnp.eye(tokens, dtype=bool)
            mask = others[None] if mask is None else mask & others
        return mask


class EnergyTransformerBlock(nn.Module):
    """Move tokens down the energy of attention and of a Hopfield network, several steps with one set of weights.

    x <- x - alpha dE/dg, `num_steps` times, with g = EnergyLayerNorm(x) and E = E_attention(g) + E_memory(g):
    E_attention = -1/beta sum_h sum_C log sum_B exp(beta K_hB . Q_hC) and E_memory = -1/2 sum_B sum_mu
    relu(xi_mu . g_B)^2 with memories xi `[features, memories]`. The energy falls along dx/dt = -dE/dg, as the
    normalisation is the gradient of a convex function while its scale is not negative, and so for small alpha. That of
    the memories alone, which is concave in g, falls for any alpha.

    Symmetry:
      Permutations of the tokens (with their masks): equivariant; the energy is invariant. Exact.

    Attributes:
      num_heads: attentions side by side.
      head_dim: width of queries and keys in one head.
      mlp_ratio: number of memories over features.
      num_steps: steps taken, the depth that the block stands for.
      step_size: alpha.
      beta: inverse temperature of the attention. `None` = 1/sqrt(head_dim).
      self_attention: a token attends to itself too (the code); False is the paper's equation.
      use_bias: of the normalisation.
      epsilon: of the normalisation.
      dtype: of computation; `None` = that of inputs and parameters. Energies are float32 or better.
      param_dtype: of parameters.
      kernel_init: of W_Q and W_K.
      memory_init: of the memories.

    Collections:
      Sows into `intermediates` the `energy` at the start and after every step, `[num_steps + 1, *batch]`.

    Cost:
      A step costs about two transformer blocks without value and output projections, as it is a gradient; memory for
      training grows with `num_steps`. Parameters: (2 heads head_dim + mlp_ratio features + 1) features + 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import EnergyTransformerBlock
      >>> block, x = EnergyTransformerBlock(num_heads=2, head_dim=4, num_steps=3), jnp.ones((3, 5, 8))
      >>> y, variables = block.init_with_output(jax.random.key(0), x)
      >>> y.shape, block.apply(variables, y, method="energy").shape
      ((3, 5, 8), (3,))

    Source:
      Hoover et al., "Energy Transformer", NeurIPS 2023; code: bhoov/energy-transformer-jax.

    Differs:
      Masks are ours. The tokens come back before the normalisation, as in the code; a decoder normalises them. Patches,
      positions, class and mask tokens of the paper's image model are left to the caller.
    """

    num_heads: int = 12
    head_dim: int = 64
    mlp_ratio: float = 4.0
    num_steps: int = 12
    step_size: float = 0.1
    beta: float | None = None
    self_attention: bool = True
    use_bias: bool = True
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.002)
    memory_init: Initializer = nn.initializers.normal(0.02)

    def __call__(
        self,
        inputs: Float[Array, "*batch tokens features"],
        *,
        mask: Bool[Array, "*#batch #heads #tokens #tokens"] | None = None,
        token_mask: Bool[Array, "*#batch tokens"] | None = None,
    ) -> Float[Array, "*batch tokens features"]:
        """Take the steps.

        Args:
          inputs: tokens x.
          mask: True = the query token (axis before the last) sees the key token, in that head.
          token_mask: True = a token; False = padding, which has no influence and stays as it is.

        Returns:
          The tokens after the last step, not normalised.

        Raises:
          ValueError: if a field is out of range or shapes don't fit.
        """
        x, normalize, energy_of = self._descent(inputs, mask, token_mask)

        def total(g: Array) -> tuple[Array, Array]:
            energies = energy_of(g)
            return jnp.sum(energies), energies

        def step(x: Array, _: None) -> tuple[Array, Array]:
            (_, energies), gradient = jax.value_and_grad(total, has_aux=True)(normalize(x))
            return x - self.step_size * gradient, energies

        x, energies = jax.lax.scan(step, x, length=self.num_steps)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "energy", jnp.concatenate([energies, energy_of(normalize(x))[None]]))
        return axes.constrain(x, axes.BATCH, None, None) if x.ndim > 2 else x

    def energy(
        self,
        inputs: Float[Array, "*batch tokens features"],
        *,
        mask: Bool[Array, "*#batch #heads #tokens #tokens"] | None = None,
        token_mask: Bool[Array, "*#batch tokens"] | None = None,
    ) -> Float[Array, "*batch"]:
        """Return E(g(x)) of every batch element, before any step; arguments as `__call__`."""
        x, normalize, energy_of = self._descent(inputs, mask, token_mask)
        return energy_of(normalize(x))

    @nn.compact
    def _descent(self, inputs: Array, mask: Array | None, token_mask: Array | None) -> tuple[Array, Any, Any]:
        """Return x, the normalisation and the energy as functions of arrays, which JAX may transform."""
        for name, least in (("num_steps", 1), ("step_size", 0), ("mlp_ratio", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}; set {name}")
        _check_tokens(inputs)
        features = inputs.shape[-1]
        attention = EnergyAttention(
            self.num_heads,
            self.head_dim,
            self.beta,
            self.self_attention,
            self.dtype,
            self.param_dtype,
            self.kernel_init,
            name="attention",
        )
        norm = EnergyLayerNorm(self.use_bias, self.epsilon, self.dtype, self.param_dtype, name="norm")
        memories = _Kernel((features, int(self.mlp_ratio * features)), self.memory_init, self.param_dtype, name="up")()
        query, key = attention.kernels(inputs)
        scale, bias = norm.scale_and_bias(inputs)
        x, query, key, memories = promote_dtype(inputs, query, key, memories, dtype=self.dtype)
        visible = attention.visible(x, mask, token_mask)

        def normalize(x: Array) -> Array:
            return _normalize(x, scale, bias, self.epsilon).astype(x.dtype)

        def energy_of(g: Array) -> Array:
            attended = attention_energy(g, query, key, beta=attention.inverse_temperature, mask=visible)
            return attended + memory_energy(g, memories, token_mask=token_mask)

        return x, normalize, energy_of


class _Kernel(nn.Module):
    """A matrix stored like that of a dense layer."""

    shape: tuple[int, ...]
    kernel_init: Initializer
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", self.kernel_init, self.shape, self.param_dtype)


def _check_tokens(inputs: Array) -> None:
    if inputs.ndim < 2:
        raise ValueError(f"inputs have shape {inputs.shape} and must be [*batch, tokens, features]; add an axis")


def _normalize(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """Return g in float32 or better."""
    x = x.astype(at_least_float32(x.dtype))
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    g = scale * centred / jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return g if bias is None else g + bias


# Our parameter: the reference's, in its tidied code's checkpoint.
REFERENCE_NAMES = {
    "attention/query/kernel": "Wq",
    "attention/key/kernel": "Wk",
    "up/kernel": "Xi",
    "norm/scale": "LNORM_gamma",
    "norm/bias": "LNORM_bias",
}


def from_reference(tensors: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """Return parameters of `EnergyTransformerBlock` from arrays of the reference code's checkpoint.

    The image model around the block (encoder, decoder, tokens, positions), which a whole checkpoint also holds, is
    passed over.

    Args:
      tensors: arrays by the reference's names.
      params: parameters of our block (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      A parameter tree like `params`.

    Raises:
      ValueError: if an array is missing or has another size.
    """
    wanted = flax.traverse_util.flatten_dict(params, sep="/")
    missing = sorted(REFERENCE_NAMES[path] for path in wanted if REFERENCE_NAMES[path] not in tensors)
    if missing:
        raise ValueError(f"the checkpoint must hold {missing}; pass one of an Energy Transformer, or set use_bias")
    found = {}
    for path, leaf in wanted.items():
        tensor = np.asarray(tensors[REFERENCE_NAMES[path]])
        if tensor.ndim == 3:  # heads, head_dim, features
            tensor = tensor.transpose(2, 0, 1).reshape(tensor.shape[2], -1)
        if tensor.shape != tuple(leaf.shape):
            raise ValueError(
                f"{REFERENCE_NAMES[path]} must give {path} its shape {tuple(leaf.shape)}, not {tensor.shape}; set the "
                "fields of the block"
            )
        found[path] = jnp.asarray(tensor)
    return flax.traverse_util.unflatten_dict(found, sep="/")


def _layout(model: EnergyTransformerBlock, variables: Mapping[str, Any]) -> dialects.Layout:
    def heads(_: Any, ours: tuple[int, ...]) -> tuple[int, ...]:
        return (model.num_heads, model.head_dim, ours[0])

    shapes = {"query/kernel": heads, "key/kernel": heads, "up/kernel": lambda _, ours: ours}
    return dialects.table_layout(REFERENCE_NAMES, shapes=shapes)(model, variables)


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/bhoov/energy-transformer-jax, checkpoints/plaindict_ckpt.npz",
        module=EnergyTransformerBlock,
        read=dialects.from_shapes(from_reference),
        marks=("^Wq$", "^Wk$", "^Xi$"),
        ignored={
            "^[WB](enc|dec)$": "a projection of patches, outside of the block",
            "^(CLS_token|MASK_token|POS_embed)$": "a token or the positions of the image model around the block",
        },
        layout=_layout,
    ),
)

VARIANTS: dict[str, dict[str, Any]] = {
    # The block of the paper's image model: 14 x 14 patches and a class token.
    "energy_transformer_base": {
        "module": EnergyTransformerBlock,
        "inputs": (jax.ShapeDtypeStruct((1, 197, 768), jnp.float32),),
        "num_heads": 12,
        "head_dim": 64,
        "mlp_ratio": 4.0,
        "num_steps": 12,
        "step_size": 0.1,
    },
}
