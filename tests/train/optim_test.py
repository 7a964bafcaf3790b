"""Schedules at their corners, and which parameters are decayed, slowed and clipped."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import optim
from train.config import Optim


@pytest.fixture
def params():
    return {
        "embed": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
        "block_0": {"relative_position_bias_table": jnp.ones((9, 2)), "query": {"kernel": jnp.ones((4, 4))}},
        "block_1": {"norm": {"scale": jnp.ones(4)}, "stacked": {"scale": jnp.ones((2, 4))}},
        "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
    }


def by_path(tree):
    return {optim.path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def updates(settings, params, gradients, steps=10):
    transform, _ = optim.build(settings, steps)
    return by_path(transform.update(gradients, transform.init(params), params)[0])


@pytest.mark.parametrize(
    ("name", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0), ("rsqrt", (4 / (4 + 36)) ** 0.5)]
)
def test_schedules_rise_to_the_peak_and_end_where_they_should(name, last):
    rate = optim.schedule(Optim(learning_rate=2.0, schedule=name, warmup_steps=4, final_fraction=0.1), 40)
    values = [float(rate(step)) for step in range(41)]
    np.testing.assert_allclose(values[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[4:]))
    np.testing.assert_allclose(values[40], 2.0 * last, rtol=1e-5)


def test_schedule_without_warmup_starts_at_the_peak_and_one_step_of_warmup_too():
    for warmup in (0, 1):
        assert float(optim.schedule(Optim(learning_rate=2.0, warmup_steps=warmup), 40)(0)) == 2.0


def test_schedule_may_be_a_function_of_the_number_of_steps():
    rate = optim.schedule(Optim(learning_rate=2.0, schedule=lambda steps: lambda step: step / steps), 40)
    assert float(rate(10)) == 0.5


def test_decay_leaves_vectors_tables_and_scales_alone(params):
    zero = jax.tree.map(jnp.zeros_like, params)
    moved = updates(Optim(learning_rate=0.5, weight_decay=0.1, schedule="constant"), params, zero)
    decayed = {path for path, update in moved.items() if np.any(update)}
    assert decayed == {"embed/kernel", "block_0/query/kernel", "head/kernel"}
    np.testing.assert_allclose(moved["head/kernel"], -0.05, rtol=1e-6)


def test_own_rule_says_what_is_not_decayed(params):
    zero = jax.tree.map(jnp.zeros_like, params)
    settings = Optim(no_decay=lambda path, parameter: not path.startswith("head/"))
    moved = updates(settings, params, zero)
    assert {path for path, update in moved.items() if np.any(update)} == {"head/kernel", "head/bias"}


def layer_ids(path):
    return {"embed": 0, "block_0": 1, "block_1": 2, "head": 3}[path.partition("/")[0]]


def test_layer_decay_slows_early_layers_by_a_power(params):
    gradients = jax.tree.map(jnp.ones_like, params)
    settings = Optim(name="sgd", b1=0.0, clip_norm=None, weight_decay=0.1, schedule="constant")
    plain = updates(settings, params, gradients)
    slowed = updates(Optim(**{**vars(settings), "layer_ids": layer_ids, "layer_decay": 0.5}), params, gradients)
    for path, update in plain.items():
        np.testing.assert_allclose(slowed[path], update * 0.5 ** (3 - layer_ids(path)), rtol=1e-6)


def test_clipping_bounds_the_global_norm_and_keeps_the_direction(params):
    gradients = jax.tree.map(lambda leaf: 100.0 * jnp.ones_like(leaf), params)
    base = {"name": "sgd", "b1": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "schedule": "constant"}
    clipped, free = (updates(Optim(**base, clip_norm=norm), params, gradients) for norm in (2.0, None))
    norm = lambda tree: float(optax.global_norm(tree))  # noqa: E731
    np.testing.assert_allclose(norm(clipped), 2.0, rtol=1e-5)
    assert norm(free) > 100
    np.testing.assert_allclose(clipped["head/bias"] * norm(free), free["head/bias"] * norm(clipped), rtol=1e-5)


def test_adamw_equals_optax_adamw(params):
    gradients = jax.tree.map(lambda leaf: 0.01 * jnp.ones_like(leaf), params)
    settings = Optim(learning_rate=0.3, weight_decay=0.2, clip_norm=None, schedule="constant")
    mask = jax.tree_util.tree_map_with_path(lambda p, leaf: not optim.undecayed(optim.path_name(p), leaf), params)
    reference = optax.adamw(0.3, weight_decay=0.2, mask=mask)
    wanted = by_path(reference.update(gradients, reference.init(params), params)[0])
    for path, update in updates(settings, params, gradients).items():
        np.testing.assert_allclose(update, wanted[path], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
@pytest.mark.parametrize("params", [{"x": jnp.asarray([3.0, -2.0])}, {"kernel": jnp.diag(jnp.asarray([1.0, -0.5]))}])
def test_optimisers_descend(name, params):
    transform, _ = optim.build(Optim(name=name, learning_rate=0.05, weight_decay=0.0, schedule="linear"), 200)
    state, update = transform.init(params), jax.jit(transform.update)
    for _ in range(200):
        step, state = update(params, state, params)
        params = optax.apply_updates(params, step)
    assert float(jnp.abs(jax.tree.leaves(params)[0]).max()) < 0.2


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adam(params):
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    settings = {"weight_decay": 0.0, "clip_norm": None, "schedule": "constant", "learning_rate": 1.0}
    moved = updates(Optim(name="muon", **settings), params, gradients)
    adam = updates(Optim(**settings), params, gradients)
    query = moved["block_0/query/kernel"]
    values = np.linalg.svd(query, compute_uv=False)
    assert values.max() / values.min() < 2  # the Newton-Schulz iteration is rough
    assert np.linalg.cond(gradients["block_0"]["query"]["kernel"]) > 4
    assert np.sum(query * gradients["block_0"]["query"]["kernel"]) < 0
    for path in ("embed/bias", "block_0/relative_position_bias_table", "head/kernel", "block_1/stacked/scale"):
        np.testing.assert_allclose(moved[path], adam[path], rtol=1e-5, err_msg=path)


def test_adafactor_keeps_a_row_and_a_column_for_a_large_matrix():
    transform, _ = optim.build(Optim(name="adafactor"), 10)
    shapes = jax.eval_shape(transform.init, {"kernel": jnp.zeros((256, 512))})
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 256 + 512 + 10


def test_rates_multiply_the_first_match(params):
    gradients = jax.tree.map(jnp.ones_like, params)
    plain = updates(Optim(clip_norm=None), params, gradients)
    moved = updates(Optim(clip_norm=None, rates=((r"^head/", 4.0), ("kernel$", 0.5))), params, gradients)
    for path, update in plain.items():
        factor = 4.0 if path.startswith("head/") else 0.5 if path.endswith("kernel") else 1.0
        np.testing.assert_allclose(moved[path], factor * update, rtol=1e-6)


def test_frozen_parameters_neither_move_nor_carry_moments(params):
    gradients = jax.tree.map(jnp.ones_like, params)
    settings = Optim(freeze=("^embed/", "^block_0/"))
    moved = updates(settings, params, gradients)
    assert {path for path, update in moved.items() if not np.any(update)} == {
        path for path in moved if path.startswith(("embed/", "block_0/"))
    }
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(optim.build(one, 10)[0].init(params))) for one in (settings, Optim())
    ]
    fixed = sum(leaf.size for leaf in jax.tree.leaves((params["embed"], params["block_0"])))
    assert sizes[1] - sizes[0] == 2 * fixed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Optim(freeze=("^hed/",)), r"'\^hed/' matches no parameter, for example .*'head/.*set optim.freeze"),
        (Optim(freeze=("",)), "must leave something to train"),
        (Optim(rates=(("^tail/", 2.0),)), r"'\^tail/' matches no parameter.*set optim.rates"),
    ],
)
def test_patterns_that_match_nothing_are_refused(params, settings, message):
    with pytest.raises(ValueError, match=message):
        optim.build(settings, 10)[0].init(params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Optim(schedule="cosin"), "schedule='cosin' must be one of .*'cosine'"),
        (Optim(warmup_steps=10), "warmup_steps=10 must be at least 0 and less than steps=10"),
        (Optim(name="adam"), "name='adam' must be one of .*'adamw'"),
        (Optim(clip_norm=0.0), "clip_norm=0.0 must be positive, or None"),
        (Optim(layer_decay=0.8), "layer_decay=0.8 needs the depth of each parameter; set optim.layer_ids"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        optim.build(settings, 10)
