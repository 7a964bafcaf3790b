"""A plain pre-norm transformer of the library's parts, small enough to count by hand, and its gradients on any mesh."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlayers.core import axes, remat
from jaxlayers.nn.feed_forward import FeedForward
from jaxlayers.nn.multi_head import attention_weights, merge_heads, split_heads
from train import mesh as meshes


class Block(nn.Module):
    """Attention and feed-forward network, each after a norm, with dropout where Megatron has it."""

    num_heads: int
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        """Return tokens like `x` `[batch, tokens, features]`."""
        features = x.shape[-1]
        dense = functools.partial(nn.Dense, features, dtype=self.dtype)
        y = nn.LayerNorm(dtype=self.dtype, name="norm1")(x)
        query, key, value = (
            axes.constrain(split_heads(dense(name=name)(y), self.num_heads), axes.BATCH, axes.HEADS, axes.TOKENS, None)
            for name in ("query", "key", "value")
        )

        def attend(module, query, key, value):
            logits = query @ jnp.swapaxes(key, -1, -2) * (features // self.num_heads) ** -0.5
            weights = nn.Dropout(self.dropout_rate)(attention_weights(logits), deterministic=deterministic)
            return weights @ value

        y = merge_heads(remat.attention(attend, self, query, key, value))
        y = dense(name="out")(axes.constrain(y, axes.BATCH, axes.TOKENS, axes.HIDDEN))
        x = x + nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)
        x = axes.constrain(x, axes.BATCH, axes.TOKENS, axes.FEATURES)
        y = nn.LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = FeedForward(4 * features, dtype=self.dtype, name="feed_forward")(y)
        x = x + nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)
        return axes.constrain(x, axes.BATCH, axes.TOKENS, axes.FEATURES)


class Plain(nn.Module):
    """Blocks, and the mean of the last tokens."""

    depth: int = 1
    num_heads: int = 4
    dropout_rate: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str | bool = "none"
    scan: bool = False

    @nn.compact
    def __call__(self, x, *, deterministic=True):
        """Return `[batch, features]` of tokens `[batch, tokens, features]`."""

        def body(block, x):
            call = remat.remat_block(lambda block, x: block(x, deterministic=deterministic), self.remat, in_loop=True)
            return call(block, x), None

        x = axes.constrain(x, axes.BATCH, axes.TOKENS, axes.FEATURES)
        if self.scan:
            loop = nn.scan(
                body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=self.depth
            )
            x, _ = loop(Block(self.num_heads, self.dropout_rate, self.dtype, name="blocks"), x)
        for index in range(0 if self.scan else self.depth):
            block = Block(self.num_heads, self.dropout_rate, self.dtype, name=f"block_{index}")
            call = remat.remat_block(lambda block, x: block(x, deterministic=deterministic), self.remat)
            x = call(block, x)
        return jnp.mean(x, axis=-2)


def example(batch=8, tokens=16, features=32, dtype=jnp.float32):
    """Return a batch of noise."""
    return jax.random.normal(jax.random.key(7), (batch, tokens, features), dtype)


def loss(model, params, x):
    """Return the mean square of the output; dropout is on if the model has any."""
    rate = model.dropout_rate
    rngs = {"dropout": jax.random.key(3, impl="threefry2x32")} if rate else {}
    return jnp.mean(jnp.square(model.apply({"params": params}, x, deterministic=not rate, rngs=rngs)))


def parameters(model, x):
    """Return the parameters."""
    return jax.jit(model.init)(jax.random.key(0), x)["params"]


def gradients(model, mesh, x, *, sequence_parallel=False, rules=()):
    """Return the compiled `(params, x) -> (loss, gradients)` on the mesh, and the shardings of the parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    places = meshes.shardings(shapes, mesh, rules)
    with meshes.use(mesh, sequence_parallel=sequence_parallel):
        compiled = (
            jax.jit(
                jax.value_and_grad(functools.partial(loss, model)),
                in_shardings=(places, meshes.batch_sharding(mesh)),
                out_shardings=(meshes.replicated(mesh), places),
            )
            .lower(shapes, jax.ShapeDtypeStruct(x.shape, x.dtype))
            .compile()
        )
    return compiled, places
