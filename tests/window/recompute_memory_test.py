"""What training on large pictures and volumes keeps for the backward pass, with and without recomputation.

It is read from a trace: a CPU's compiler plans the same memory with and without, for blocks that do not run in a loop.
A TPU's plan of one of these is in docs/plan.md.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Var

import jaxlayers

GIB = 2**30


def kept_bytes(model, variables, x):
    """Return the bytes of what JAX's linearisation of a sum of squares keeps, besides parameters and input."""

    def pullback(variables, x):
        def loss(variables):
            return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(model.apply(variables, x)))

        return jax.vjp(loss, variables)[1]

    traced = jax.make_jaxpr(pullback)(variables, x).jaxpr
    operands = {*traced.invars, *traced.constvars}
    found = {var for var in traced.outvars if isinstance(var, Var) and var not in operands}
    return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in found)


@pytest.mark.parametrize(
    ("variant", "shape", "most", "times"),
    [
        ("maxim_s1", (1, 1024, 1024, 3), 4.8, 15),
        # Four times as large, which are 1,024 pixels.
        ("drct_x4", (1, 256, 256, 3), 4.4, 11),
        # A generator of 1,024 pixels, from a latent vector.
        ("styleswin_1024", (1, 512), 1.4, 9),
        ("swin_unetr_btcv", (1, 96, 96, 96, 1), 0.9, 9),
    ],
)
def test_large_inputs_train_in_the_stated_memory_when_blocks_are_recomputed(variant, shape, most, times):
    model = jaxlayers.create_model(variant)
    variables = jax.eval_shape(model.init, jax.random.key(0), *jaxlayers.abstract_inputs(variant))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    plain, recomputed = (kept_bytes(model.clone(remat=policy), variables, x) for policy in ("none", "full"))
    assert recomputed < most * GIB
    assert plain > times * recomputed
