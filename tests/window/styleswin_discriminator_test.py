"""StyleSwin's wavelet discriminator; the golden arrays are those of `tests/window/styleswin_test.py`."""

from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core.reference import reference_name
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import styleswin_discriminator
from jaxlayers.window.styleswin_discriminator import WaveletDiscriminator

GOLDEN = Path(__file__).parents[1] / "golden" / "styleswin_parity.npz"
SMALL = WaveletDiscriminator(features=(4, 6), stddev_group=0)
TINY = WaveletDiscriminator(features=(16, 16, 16))

CASES = (
    Case(
        name="wavelet_discriminator",
        module=SMALL,
        inputs=lambda rng: (rng.normal(size=(2, 16, 16, 3)),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"size \(16, 8\) must have .* = 16 pixels", inputs=lambda rng: (np.ones((2, 16, 8, 3)),)),
            BadInput(match="must have .* at least 16", module=WaveletDiscriminator(features=(4,))),
            BadInput(match="stddev_group=-1 must divide the 2", module=SMALL.clone(stddev_group=-1)),
            BadInput(
                match="stddev_group=2 must divide the 3 pictures",
                module=SMALL.clone(stddev_group=2),
                inputs=lambda rng: (np.ones((3, 16, 16, 3)),),
            ),
            BadInput(match="remat='ful' must be one of", module=SMALL.clone(remat="ful")),
        ),
    ),
)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_params(module, x, *, seed=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(seed)
    flat = sorted(flax.traverse_util.flatten_dict(shapes, sep="/").items())
    found = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in flat}
    return flax.traverse_util.unflatten_dict(found, sep="/")


def to_reference(params):
    """Write our parameters the way the official code stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        name, leaf = reference_name(path, styleswin_discriminator.REFERENCE_NAMES), np.asarray(leaf)
        if path == "hidden/kernel":
            leaf = np.moveaxis(leaf.T.reshape(leaf.shape[1], 4, 4, -1), -1, 1).reshape(leaf.shape[1], -1)
        elif path.endswith("kernel"):
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        tensors[name] = leaf
    return tensors


def test_scores_and_their_gradient_equal_the_public_ones():
    golden = dict(np.load(GOLDEN))
    x = noise(8, 32, 32, 3, seed=4)
    params = random_params(TINY, x)
    scores, gradient = jax.jit(jax.value_and_grad(lambda x: TINY.apply({"params": params}, x).sum()))(x)
    np.testing.assert_allclose(jax.jit(TINY.apply)({"params": params}, x), golden["scores"], atol=1e-5)
    np.testing.assert_allclose(scores, golden["scores"].sum(), atol=1e-4)
    np.testing.assert_allclose(gradient, golden["gradient"], atol=1e-4 * np.abs(golden["gradient"]).max())


def test_parameters_go_to_the_public_names_and_back():
    params = random_params(TINY, noise(4, 32, 32, 3))
    tensors = to_reference(params)
    tensors["dwt.ll"] = tensors["convs.0.conv2.0.kernel"] = np.zeros(())
    jax.tree.map(np.testing.assert_array_equal, styleswin_discriminator.from_reference(tensors, TINY), params)
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['final_linear.1.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "final_linear.1.bias"}
        styleswin_discriminator.from_reference({**incomplete, "extra": np.zeros(1)}, TINY)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("styleswin_discriminator_256", 26_211_073), ("styleswin_discriminator_1024", 27_736_129)],
)
def test_named_models_have_the_size_of_the_public_ones(name, parameters):
    variant = styleswin_discriminator.VARIANTS[name]
    model = WaveletDiscriminator(features=variant["features"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *variant["inputs"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def scores(group, x):
    params = random_params(SMALL, x[:1])
    return jax.jit(SMALL.clone(stddev_group=group).apply)({"params": params}, x)


def test_groups_couple_scores_and_no_group_leaves_each_alone():
    x = noise(8, 16, 16, 3)
    moved = x.at[0].add(1.0)
    changed = {group: np.flatnonzero(scores(group, x) != scores(group, moved)).tolist() for group in (0, 2, 4, 8)}
    # Members of a group are strided over the batch.
    assert changed == {0: [0], 2: [0, 4], 4: [0, 2, 4, 6], 8: list(range(8))}


def test_r1_of_pictures_alone_is_that_of_each_picture_and_of_groups_holds_the_others():
    x = noise(4, 16, 16, 3)
    params = random_params(SMALL, x)

    def gradient(group, x):
        model = SMALL.clone(stddev_group=group)
        return jax.jit(jax.grad(lambda x: model.apply({"params": params}, x).sum()))(x)

    alone = jnp.concatenate([gradient(0, one[None]) for one in x])
    np.testing.assert_allclose(gradient(0, x), alone, atol=1e-5)
    together = gradient(4, x)
    assert np.abs(together - alone).max() > 1e-2 * np.abs(alone).max()
    # Where all pictures of a group are the same, the deviation is a minimum, whose gradient is finite and zero.
    same = jnp.broadcast_to(x[:1], x.shape)
    np.testing.assert_allclose(gradient(4, same), gradient(0, same), atol=1e-5)

    def r1(params):
        model = SMALL.clone(stddev_group=4)
        return jnp.sum(jnp.square(jax.grad(lambda x: model.apply({"params": params}, x).sum())(x)))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(r1))(params)):
        assert np.isfinite(leaf).all()


def test_recomputation_changes_no_gradient():
    x = noise(2, 16, 16, 3)
    params = random_params(SMALL, x)

    def gradient(name):
        model = SMALL.clone(remat=name)
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x) ** 2)))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient("full"), gradient("none")
    )
