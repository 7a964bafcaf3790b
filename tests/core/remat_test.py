"""Named recomputation policies: what each keeps, that none changes a value, and how they reach blocks and models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxlayers.core import remat

TOKENS, FEATURES = 24, 8


class Attend(nn.Module):
    """One attention with dropout, and a product before and after."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(FEATURES, name="query")(x))

        def core(module, x):
            weights = nn.softmax(jnp.tanh(x @ x.T))
            return nn.Dropout(self.rate)(weights, deterministic=not self.rate) @ x

        return nn.gelu(nn.Dense(FEATURES, name="out")(remat.attention(core, self, x)))


class Stack(nn.Module):
    """A model with the field `remat`."""

    remat: str | bool = False

    @nn.compact
    def __call__(self, x):
        for index in range(2):
            x = remat.remat_block(lambda block, x: block(x), self.remat)(Attend(name=f"block_{index}"), x)
        return x


class Wrapper(nn.Module):
    """A model around a model."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner(x)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (TOKENS, FEATURES))


def kept(fn, *arguments):
    """Return the shapes of what the backward pass of `fn` keeps, besides its arguments."""
    _, pullback = jax.vjp(fn, *arguments)
    given = {id(leaf) for leaf in jax.tree.leaves(arguments)}
    return [leaf.shape for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape") and id(leaf) not in given]


def scores(shapes):
    return sum(shape == (TOKENS, TOKENS) for shape in shapes)


def forward(module, variables, name):
    return remat.remat(lambda variables, x: module.apply(variables, x), name)


def test_unknown_names_are_refused_with_the_list():
    for call in (
        lambda: remat.policy("atention"),
        lambda: remat.remat(jnp.sin, "atention"),
        lambda: remat.of_model(Attend(), "atention"),
        lambda: Stack("atention").init(jax.random.key(0), jnp.ones((2, 8))),
    ):
        with pytest.raises(
            ValueError, match=r"remat='atention' must be one of \['none', 'attention', 'dots', 'full'\]"
        ):
            call()
    assert remat.policy(True) is remat.POLICIES["full"]
    assert remat.policy(False) is remat.POLICIES["none"]


def test_each_policy_keeps_what_it_says(x):
    module = Attend()
    variables = module.init(jax.random.key(0), x)
    found = {name: kept(forward(module, variables, name), variables, x) for name in remat.POLICIES}
    assert scores(found["none"]) >= 2
    assert scores(found["attention"]) == 0
    # All else is kept: besides scores the two differ by a transposed copy of what these are made of.
    rest = {
        name: sum(int(np.prod(shape)) for shape in shapes if shape != (TOKENS, TOKENS))
        for name, shapes in found.items()
    }
    assert 0 <= rest["none"] - rest["attention"] <= TOKENS * FEATURES + 4 * TOKENS
    assert scores(found["dots"]) >= 1  # scores without a batch axis look like a product with weights
    assert found["full"] == []


def test_a_name_cannot_draw_the_boundary(x):
    # Negative control: why attention cores are checkpoints of their own.
    def core(x):
        return checkpoint_name(nn.softmax(checkpoint_name(x @ x.T, "scores")), "weights") @ x

    but_names = jax.checkpoint_policies.save_anything_except_these_names("scores", "weights")
    assert scores(kept(jax.checkpoint(core, policy=but_names), x)) > 0
    assert scores(kept(jax.checkpoint(core), x)) == 0


@pytest.mark.parametrize("name", [*remat.POLICIES, True, False])
def test_no_policy_changes_values_gradients_or_dropout(name, x):
    module = Attend(rate=0.4)
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def loss(variables, x, name="none"):
        run = remat.remat(lambda v, x: module.apply(v, x, rngs={"dropout": jax.random.key(2)}), name)
        return jnp.sum(run(variables, x) ** 2)

    plain = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, x)
    other = jax.jit(jax.value_and_grad(lambda *a: loss(*a, name=name), argnums=(0, 1)))(variables, x)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(a)))
    assert jax.tree.structure(plain) == jax.tree.structure(other)


def test_another_policy_traces_a_jitted_function_again(x):
    # The boundary hangs on a context, of which a cache that overlooked it would know nothing.
    module = Attend()
    variables = module.init(jax.random.key(0), x)
    run = jax.jit(module.apply)
    assert scores(kept(run, variables, x)) >= 2
    assert scores(kept(remat.remat(run, "attention"), variables, x)) == 0
    assert scores(kept(run, variables, x)) >= 2


def test_a_model_with_the_field_recomputes_block_by_block(x):
    plain, wrapped = Stack(), Wrapper(Stack())
    for model, found in ((plain, lambda m: m.remat), (wrapped, lambda m: m.inner.remat)):
        for name in ("attention", "dots", "full"):
            configured, wrap = remat.of_model(model, name)
            assert found(configured) == name
            assert found(model) is False
            fn = configured.apply
            assert wrap(fn) == fn
        assert remat.of_model(model, "none")[0] is model
    variables = plain.init(jax.random.key(0), x)
    assert jax.tree.structure(Stack("full").init(jax.random.key(0), x)) == jax.tree.structure(variables)
    full = remat.of_model(plain, "full")[0]
    # The input of the second block is kept, and nothing of what is inside.
    assert kept(full.apply, variables, x).count((TOKENS, FEATURES)) == 1
    assert scores(kept(full.apply, variables, x)) == 0


def test_a_model_without_the_field_is_one_block(x):
    model, wrap = remat.of_model(Attend(), "full")
    assert model == Attend()
    variables = model.init(jax.random.key(0), x)
    assert kept(wrap(model.apply), variables, x) == []
    assert scores(kept(remat.of_model(model, "attention")[1](model.apply), variables, x)) == 0


def test_none_leaves_the_choice_of_the_model():
    assert remat.of_model(Stack("dots"), "none")[0].remat == "dots"
