"""Hopular: no leakage, retrieval, masks and losses against NumPy twins, and stored outputs of the reference code."""

import functools
import math
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlayers.core import axes
from jaxlayers.hopfield.hopfield import Hopfield
from jaxlayers.hopfield.hopular import (
    VARIANTS,
    Hopular,
    HopularBlock,
    HopularEmbedding,
    HopularSummary,
    augment_table,
    column_losses,
    feature_weight_at,
    from_reference,
    hopular_lookup,
    hopular_loss,
)
from jaxlayers.hopfield.streaming import Streaming
from jaxlayers.hopfield.tabular import (
    CategoricalColumn,
    ContinuousColumn,
    TableSchema,
    decode_table,
    encode_table,
    table_statistics,
)
from jaxlayers.testing import BadInput, Case, Symmetric, Symmetry

GOLDEN = Path(__file__).parents[1] / "golden" / "hopular_parity.npz"
NUMBER = ContinuousColumn()
# A number, three classes, a number and a target of two classes.
SCHEMA = TableSchema((NUMBER, CategoricalColumn(3), NUMBER, CategoricalColumn(2)))
REGRESSION = TableSchema((NUMBER, CategoricalColumn(3), NUMBER))
LOOKUP = hopular_lookup(2, dropout_rate=0.0)
SMALL = {"features": 8, "depth": 2, "sample": LOOKUP, "feature": LOOKUP}


def table(rng, schema, *shape):
    """Return random encoded rows."""
    columns = [
        rng.integers(0, column.num_classes, shape) if isinstance(column, CategoricalColumn) else rng.normal(size=shape)
        for column in schema.columns
    ]
    return np.stack(columns, axis=-1).astype(np.float32)


def tables(schema, *shapes):
    return lambda rng: tuple(table(rng, schema, *shape) for shape in shapes)


def arrays(*shapes):
    return lambda rng: tuple(rng.normal(size=shape) for shape in shapes)


SHIFT_OF_LOGITS = {"key/bias": "one constant added to all logits of a state leaves their softmax as it is"}
CASES = (
    Case(
        name="hopular",
        module=Hopular(SCHEMA, **SMALL),
        inputs=tables(SCHEMA, (2, 5), (2, 7)),
        symmetries=(
            Symmetry(
                Symmetric(7), (None, "set"), "scalar", control=lambda x, memory: x * jnp.cumsum(memory, -2)[:, :5]
            ),
            Symmetry(Symmetric(5), ("set", None), "set", control=lambda x, _: jnp.cumsum(x, axis=-2)),
        ),
        zero_gradients=SHIFT_OF_LOGITS,
        bad_inputs=(
            BadInput(match=r"depth=0 must be at least 1; set depth", module=Hopular(SCHEMA, depth=0)),
            BadInput(match=r"features=0 must be at least 1; set features", module=Hopular(SCHEMA, features=0)),
            BadInput(
                match=r"features=20 must be divisible by num_heads=8",
                module=Hopular(SCHEMA, features=5, depth=1),
            ),
            BadInput(
                match=r"inputs has shape \(2, 5, 3\) and must have width 4", inputs=tables(REGRESSION, (2, 5), (2, 7))
            ),
            BadInput(match=r"memory has 0 rows and must have at least 1", inputs=tables(SCHEMA, (2, 5), (2, 0))),
            BadInput(match=r"inputs has shape \(4,\) and must be \[\*batch", inputs=tables(SCHEMA, (), (7,))),
        ),
    ),
    Case(
        name="hopular_embedding",
        module=HopularEmbedding(SCHEMA, features=8),
        inputs=tables(SCHEMA, (2, 5)),
        leading_axes=True,
        within="hopular",
        bad_inputs=(
            BadInput(match="features=0 must be at least 1", module=HopularEmbedding(SCHEMA, features=0)),
            BadInput(match=r"must have width 4 by the schema", inputs=tables(REGRESSION, (2, 5))),
        ),
    ),
    Case(
        name="hopular_block",
        module=HopularBlock(LOOKUP, LOOKUP),
        inputs=arrays((2, 4, 3, 8), (2, 5, 3, 8), (2, 4, 3, 8)),
        zero_gradients=SHIFT_OF_LOGITS,
        within="hopular",
        bad_inputs=(
            BadInput(match=r"must have the columns and features", inputs=arrays((4, 3, 8), (5, 2, 8), (4, 3, 8))),
            BadInput(match=r"and the shape of original", inputs=arrays((4, 3, 8), (5, 3, 8), (3, 3, 8))),
            BadInput(match=r"add axes", inputs=arrays((3, 8), (5, 3, 8), (3, 8))),
        ),
    ),
    Case(
        name="hopular_summary",
        module=HopularSummary(SCHEMA),
        inputs=arrays((2, 5, 4, 8)),
        leading_axes=True,
        within="hopular",
        bad_inputs=(
            BadInput(match=r"inputs has shape \(2, 5, 3\) and must have width 4", inputs=arrays((2, 5, 3, 8))),
            BadInput(match=r"add an axis", inputs=arrays((8,))),
        ),
    ),
)


def random_params(model, rng, *inputs):
    """Return random parameters without compiling an initialiser."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return np.asarray(centre + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Trial:
    """A model with random parameters and a memory of seven rows; every call runs the same compiled program."""

    def __init__(self, schema, seed=0):
        rng = np.random.default_rng(seed)
        self.model = Hopular(schema, **SMALL)
        self.rows, self.memory = (jnp.asarray(table(rng, schema, 7)) for _ in range(2))
        self.params = random_params(self.model, rng, self.rows, self.memory)
        self.compiled = jax.jit(
            lambda inputs, memory, masks: self.model.apply({"params": self.params}, inputs, memory, **masks)
        )

    def masks(self, **given):
        everything = np.ones(self.rows.shape, bool)
        plain = {"present": everything, "masked": ~everything, "memory_present": everything}
        plain |= {"memory_mask": np.ones(7, bool), "own": np.full(7, -1)}
        return jax.tree.map(jnp.asarray, plain | given)

    def __call__(self, inputs=None, memory=None, **masks):
        inputs, memory = self.rows if inputs is None else inputs, self.memory if memory is None else memory
        return np.asarray(self.compiled(jnp.asarray(inputs), jnp.asarray(memory), self.masks(**masks)))


@pytest.fixture(scope="module")
def trial():
    return Trial(SCHEMA)


def with_targets(rows, targets):
    return np.concatenate([rows[:, :-1], np.asarray(targets, rows.dtype)[:, None]], axis=1)


# No leakage. ----------------------------------------------------------------------------------------------------------


def test_gradient_from_a_rows_own_target_to_its_own_prediction_is_exactly_zero():
    trial = Trial(REGRESSION)

    @jax.jit
    def jacobians(own):
        def predicted(target_of_input, target_of_memory):
            rows, memory = (trial.memory.at[:, -1].set(new) for new in (target_of_input, target_of_memory))
            return trial.model.apply({"params": trial.params}, rows, memory, own=own)

        return jax.jacfwd(predicted, argnums=(0, 1))(trial.memory[:, -1], trial.memory[:, -1])

    by_input, by_memory = jax.device_get(jacobians(np.arange(7)))
    assert not np.any(by_input)  # what a row holds at its target is never seen
    itself = np.arange(7)
    assert not np.any(by_memory[itself, :, itself])
    reach = np.abs(by_memory).max(axis=1)
    assert reach[~np.eye(7, dtype=bool)].min() > 1e-5  # every other row's target is seen
    # The control: a row that is not told its place retrieves itself.
    _, leaking = jax.device_get(jacobians(np.full(7, -1)))
    assert np.abs(leaking[itself, :, itself]).max(axis=-1).min() > 1e-4


def test_class_of_a_row_has_no_influence_on_its_own_prediction(trial):
    other = with_targets(trial.memory, [1 - trial.memory[0, -1], *trial.memory[1:, -1]])
    before, after = (trial(rows, rows, own=np.arange(7)) for rows in (trial.memory, other))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.abs(before[1:] - after[1:]).max() > 1e-3
    before, after = (trial(rows, rows) for rows in (trial.memory, other))
    assert np.abs(before[0] - after[0]).max() > 1e-3


def test_a_hidden_target_may_be_missing(trial):
    unlabelled = np.ones(trial.rows.shape, bool)
    unlabelled[:, -1] = False
    np.testing.assert_array_equal(trial(with_targets(trial.rows, [np.nan] * 7), present=unlabelled), trial())


# The memory. ----------------------------------------------------------------------------------------------------------


def test_order_of_the_training_rows_does_not_matter(trial, rng):
    order = rng.permutation(7)
    present = rng.random((7, 4)) < 0.8
    own = np.asarray([2, -1, 0, 3, 6, -1, 5])
    expected = trial(memory_present=present, own=own)
    place = np.where(own < 0, -1, np.argsort(order)[own])
    moved = {"memory": trial.memory[order], "memory_present": present[order]}
    np.testing.assert_allclose(trial(own=place, **moved), expected, atol=1e-5)
    assert np.abs(trial(own=own, **moved) - expected).max() > 1e-3


def test_own_rows_and_padding_are_the_same_as_taken_out(trial, rng):
    shorter = jax.jit(lambda memory: trial.model.apply({"params": trial.params}, trial.rows, memory))
    excluded = trial(own=np.arange(7))
    for index in range(7):
        expected = np.asarray(shorter(np.delete(trial.memory, index, axis=0)))
        np.testing.assert_allclose(excluded[index], expected[index], atol=1e-5)
        padding = np.array(trial.memory)
        padding[index] = table(rng, SCHEMA)
        np.testing.assert_allclose(trial(memory=padding, memory_mask=np.arange(7) != index), expected, atol=1e-5)
        assert np.abs(trial() - expected).max() > 1e-4


def test_a_row_alone_in_the_memory_retrieves_nothing(trial):
    alone = {"memory_mask": np.arange(7) == 0, "own": np.zeros(7, int)}
    found = trial(**alone)
    assert np.all(np.isfinite(found))
    np.testing.assert_array_equal(found, trial(memory=trial.memory[::-1], **alone))


@pytest.mark.slow
def test_streaming_and_recomputation_change_no_gradient(trial):
    weights = np.random.default_rng(1).normal(size=(7, 7)).astype(np.float32)
    masks = trial.masks(own=np.arange(7), memory_mask=np.arange(7) < 6)
    plain = trial.model.clone(depth=1)

    def objective(params, model):
        return jnp.sum(weights * model.apply({"params": params}, trial.rows, trial.memory, **masks))

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(objective, model=model)))(trial.params)
        for model in (plain.clone(sample=LOOKUP.clone(streaming=Streaming(chunk_size=3)), remat="full"), plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), found, expected)


def test_memory_split_over_devices_changes_nothing(trial):
    mesh = jax.make_mesh((8,), ("memory",), axis_types=(AxisType.Auto,))
    model = trial.model.clone(sample=LOOKUP.clone(streaming=Streaming(chunk_size=2)))
    place = NamedSharding(mesh, PartitionSpec("memory"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(((axes.PATTERNS, "memory"),)):
        found = jax.jit(model.apply)(
            {"params": trial.params},
            trial.rows,
            jax.device_put(np.concatenate([trial.memory, trial.rows[:1]]), place),
            memory_mask=jax.device_put(np.arange(8) < 7, place),
            own=jnp.arange(7),
        )
    np.testing.assert_allclose(found, trial(own=np.arange(7)), atol=1e-5)


# The block against its twin: one row and one head at a time, in float64. ----------------------------------------------


def twin_norm(x, params):
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-12)
    return x * params["scale"] + params["bias"]


def twin_lookup(states, stored, params, heads, beta, own=None):
    query, key, value = (
        rows @ params[name]["kernel"] + params[name]["bias"]
        for name, rows in (("query", states), ("key", stored), ("value", stored))
    )
    width = query.shape[-1] // heads
    result = np.zeros_like(query)
    for row in range(len(states)):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = key[:, part] @ query[row, part]
            allowed = np.arange(len(stored)) != (-1 if own is None else own[row])
            if math.isinf(beta):
                weights = np.arange(len(stored)) == np.argmax(np.where(allowed, logits, -np.inf))
            else:
                weights = np.where(allowed, np.exp(beta * (logits - logits[allowed].max())), 0)
            result[row, part] = weights @ value[:, part] / weights.sum()
    return result @ params["out"]["kernel"] + params["out"]["bias"]


def twin_block(x, memory, original, params, heads, beta, own):
    norm = functools.partial(twin_norm, params=params["norm_sample"])
    rows, stored = norm(x.reshape(len(x), -1)), norm(memory.reshape(len(memory), -1))
    rows = rows + twin_lookup(rows, stored, params["sample_sample"], heads, beta, own)
    norm = functools.partial(twin_norm, params=params["norm_feature"])
    rows, original = norm(rows.reshape(x.shape)), norm(original)
    default = 1 / math.sqrt(x.shape[-1] // heads)
    return np.stack(
        [
            row + twin_lookup(row, first, params["feature_feature"], heads, default)
            for row, first in zip(rows, original, strict=True)
        ]
    )


@pytest.mark.parametrize("beta", [0.3, 1e6])
def test_block_equals_its_twin_and_at_large_beta_retrieves_the_one_nearest_training_row(rng, beta):
    """Nearest by the scalar product in the association space of each head, the own row left out."""
    numbers = tuple(rng.normal(size=(count, 3, 8)) for count in (5, 7, 5))
    inputs = tuple(jnp.asarray(one, jnp.float32) for one in numbers)
    own = np.asarray([3, -1, 0, -1, 6])
    layer = HopularBlock(LOOKUP.clone(beta=beta), LOOKUP)
    params = random_params(layer, rng, *inputs)
    apply = jax.jit(functools.partial(layer.apply, mutable="intermediates"))
    found, state = apply({"params": params}, *inputs, own=jnp.asarray(own))
    largest = np.max(state["intermediates"]["sample_sample"]["association"][0], axis=-1)
    nearest = twin_block(*numbers, params, 2, math.inf, own)
    if beta > 1:
        np.testing.assert_allclose(largest, 1.0, atol=1e-6)
        np.testing.assert_allclose(found, nearest, atol=3e-5)
    else:
        np.testing.assert_allclose(found, twin_block(*numbers, params, 2, beta, own), atol=3e-5)
        assert np.abs(found - nearest).max() > 0.1


def test_block_without_projections_returns_the_nearest_row_itself(rng):
    """In the space of normalised rows the largest product is the smallest distance."""
    memory = jnp.asarray(rng.normal(size=(50, 3, 8)), jnp.float32)
    rows = memory[:10] + 0.2 * jnp.asarray(rng.normal(size=(10, 3, 8)), jnp.float32)
    still = {"state_norm": None, "stored_norm": None, "value_norm": None, "projections": ()}
    flat = functools.partial(twin_norm, params={"scale": 1.0, "bias": 0.0})

    def retrieved(own):
        layer = HopularBlock(Hopfield(beta=1e4, **still), LOOKUP)
        params = random_params(layer, rng, rows, memory, rows)
        params["norm_sample"] = {"scale": np.ones(24, np.float32), "bias": np.zeros(24, np.float32)}
        apply = jax.jit(functools.partial(layer.apply, mutable="intermediates", capture_intermediates=True))
        _, state = apply({"params": params}, rows, memory, rows, own=own)
        return state["intermediates"]["sample_sample"]["__call__"][0]

    normalised, queries = flat(np.asarray(memory).reshape(50, -1)), flat(np.asarray(rows).reshape(10, -1))
    distances = np.linalg.norm(queries[:, None] - normalised, axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=-1), np.arange(10))
    np.testing.assert_allclose(retrieved(None), normalised[:10], atol=1e-4)
    distances[np.arange(10), np.arange(10)] = np.inf
    np.testing.assert_allclose(retrieved(jnp.arange(10)), normalised[distances.argmin(axis=-1)], atol=1e-4)


# Missing and masked entries. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["present", "masked", "memory_present"])
def test_content_of_missing_and_masked_entries_has_no_influence(trial, rng, keyword):
    inputs = {"inputs": trial.rows, "memory": trial.memory}
    name = "memory" if keyword.startswith("memory") else "inputs"
    away = rng.random((7, 4)) < 0.5
    away[0] = True, True, False, True
    mask = {keyword: away if keyword == "masked" else ~away}
    expected = trial(**inputs, **mask)
    for content in (np.nan, 1e30, 5.0):
        np.testing.assert_array_equal(
            trial(**(inputs | {name: np.where(away, content, inputs[name])}), **mask), expected
        )
    assert np.abs(trial(**inputs) - expected).max() > 1e-3
    assert np.abs(trial(**(inputs | {name: np.where(away, inputs[name], 1.0)}), **mask) - expected).max() > 1e-3


def test_missing_entries_are_not_masked_entries(trial):
    away = np.zeros((7, 4), bool)
    away[:, 0] = True
    missing, masked = trial(present=~away), trial(masked=away)
    assert np.abs(missing - masked).max() > 1e-3
    np.testing.assert_array_equal(trial(present=~away, masked=away), missing)


def test_rows_do_not_influence_each_other(trial, rng):
    changed = np.concatenate([trial.rows[:1], table(rng, SCHEMA, 6)])
    np.testing.assert_array_equal(trial()[0], trial(changed)[0])


def test_columns_and_their_parameters_may_be_permuted(trial):
    order = [2, 3, 1, 0]
    permuted = TableSchema(tuple(SCHEMA.columns[index] for index in order), targets=(1,))
    flat = np.arange(32).reshape(4, 8)[np.asarray(order)].reshape(-1)
    logits = np.concatenate([np.arange(SCHEMA.width)[SCHEMA.slice_of(index)] for index in order])
    ends = np.cumsum(np.asarray(SCHEMA.sizes) + 1)
    values = np.concatenate([np.arange(ends[i] - SCHEMA.sizes[i] - 1, ends[i]) for i in order])

    def permute(path, leaf):
        if path in ("embed/type_embedding",) or "/feature_feature/" in path or "norm_feature" in path:
            return leaf
        if path == "embed/value_embedding":
            return leaf[values]
        if path.startswith("embed/"):
            return leaf[np.asarray(order)]
        if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            return leaf[flat]
        if "norm" in path or path.endswith("sample_sample/out/bias"):
            return leaf[flat]
        if path.endswith("sample_sample/out/kernel"):
            return leaf[:, flat]
        if path.startswith("summary/out"):
            return leaf[flat][:, logits] if path.endswith("kernel") else leaf[logits]
        assert path.endswith(("query/bias", "key/bias", "value/bias"))
        return leaf

    moved = flax.traverse_util.path_aware_map(lambda path, leaf: permute("/".join(path), leaf), trial.params)
    apply = jax.jit(Hopular(permuted, **SMALL).apply)
    inputs = trial.rows[:, np.asarray(order)], trial.memory[:, np.asarray(order)]
    expected = trial()[:, logits]
    np.testing.assert_allclose(apply({"params": moved}, *inputs), expected, atol=1e-5)
    assert np.abs(apply({"params": trial.params | {"embed": moved["embed"]}}, *inputs) - expected).max() > 0.01


def test_wrong_masks_places_and_rates_are_refused(trial, untyped):
    x, memory = trial.rows[:5], trial.memory
    apply = functools.partial(trial.model.apply, {"params": trial.params}, x, memory)
    for keywords, message in (
        ({"own": jnp.arange(4)}, r"own has shape \(4,\) and must be an index for each of 5 rows"),
        ({"own": jnp.full(5, 7)}, r"must be in \[0, 7\), or -1"),
        ({"own": jnp.full(5, -2)}, r"must be in \[0, 7\), or -1"),
        ({"present": jnp.ones((5, 4))}, r"present of dtype float32 must be bool"),
        ({"masked": jnp.ones((4, 4), bool)}, r"masked of shape \(4, 4\) must broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(**keywords)
    for keywords, message in (
        ({"mask_rate": 1.5}, r"mask_rate=1.5 must be in \[0, 1\]"),
        ({"mask_rate": 0.6, "replace_rate": 0.5}, r"must add up to at most 1"),
        ({"select_rate": -0.1}, r"select_rate=-0.1 must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            augment_table(jax.random.key(0), SCHEMA, x, jnp.ones(x.shape, bool), **keywords)
    with pytest.raises(ValueError, match=r"prediction has shape \(5, 6\) and must have width 7"):
        column_losses(SCHEMA, jnp.ones((5, 6)), x, jnp.ones(x.shape, bool))
    with pytest.raises(ValueError, match=r"prediction has shape \(5, 6\)"):
        decode_table(SCHEMA, table_statistics(SCHEMA, np.asarray(x)), np.ones((5, 6)))
    with pytest.raises(ValueError, match=r"final=-1 must be in \[0, 1\]"):
        feature_weight_at(0.5, final=-1)


# The objective. -------------------------------------------------------------------------------------------------------


# Compiles in a fraction of the time of the default generator.
KEY = jax.random.key(0, impl="rbg")
augment = jax.jit(augment_table, static_argnames=("schema", "select_rate", "mask_rate", "replace_rate"))


def test_augmentation_hides_and_replaces_at_its_rates(rng):
    values = np.tile(np.asarray([[9.0, 2.0, -9.0, 1.0]], np.float32), (40_000, 1))
    present = np.ones(values.shape, bool)
    present[:10_000, 0] = False
    rates = {"select_rate": 0.5, "mask_rate": 0.2, "replace_rate": 0.3}
    found = jax.device_get(augment(KEY, SCHEMA, values, present, **rates))
    changed = found.values != values
    np.testing.assert_allclose(found.masked.mean(axis=0), [0.1, 0.1, 0.1, 1.0], atol=0.01)
    # A third of the random classes are the right one, and the content of a missing entry is left as it is.
    np.testing.assert_allclose(changed.mean(axis=0), [0.75 * 0.15, 0.1, 0.15, 0.0], atol=0.01)
    np.testing.assert_allclose(found.counted.mean(axis=0), [0.75 * 0.5, 0.5, 0.5, 1.0], atol=0.01)
    assert not np.any(changed & found.masked)
    assert not np.any(changed & ~found.counted)
    assert not np.any(found.counted & ~present)
    np.testing.assert_array_equal(np.unique(found.values[:, 1]), [0, 1, 2])
    numbers = found.values[:, 2][changed[:, 2]]
    assert abs(float(numbers.mean())) < 0.05
    assert abs(float(numbers.std()) - 1) < 0.05


def test_without_selection_only_targets_count(rng):
    values = jnp.asarray(table(rng, SCHEMA, 6))
    found = augment(KEY, SCHEMA, values, jnp.ones(values.shape, bool), select_rate=0.0)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.masked, jnp.broadcast_to(SCHEMA.is_target, (6, 4)))
    np.testing.assert_array_equal(found.counted, found.masked)


def twin_losses(schema, prediction, values, counted):
    losses, counts = [], []
    for index, column in enumerate(schema.columns):
        rows = np.flatnonzero(counted[:, index])
        part = prediction[:, schema.slice_of(index)].astype(np.float64)
        if isinstance(column, CategoricalColumn):
            each = [np.log(np.exp(part[r]).sum()) - part[r, int(values[r, index])] for r in rows]
        else:
            each = [(part[r, 0] - values[r, index]) ** 2 for r in rows]
        losses.append(np.mean(each) if each else 0.0)
        counts.append(len(rows))
    return np.asarray(losses), np.asarray(counts)


@pytest.fixture
def predictions(rng):
    values = table(rng, SCHEMA, 12)
    counted = rng.random(values.shape) < 0.5
    counted[:, 2] = False
    return rng.normal(size=(12, SCHEMA.width)).astype(np.float32), values, counted


def test_losses_equal_the_twin(predictions):
    losses, counts = jax.jit(column_losses, static_argnums=0)(SCHEMA, *predictions)
    expected, number = twin_losses(SCHEMA, *predictions)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(counts, number)
    loss = jax.jit(hopular_loss, static_argnums=0)
    found = loss(SCHEMA, *predictions, feature_weight=0.3)
    features, targets = expected[:2].mean(), expected[3]  # the third column counts nowhere
    np.testing.assert_allclose(found, [0.3 * features + 0.7 * targets, features, targets], rtol=1e-5)
    for columns, expected in (([3], targets), ([0, 1, 2], features), ([], 0.0)):
        counted = predictions[2] & np.isin(np.arange(4), columns)
        found = loss(SCHEMA, *predictions[:2], counted, feature_weight=0.3)
        np.testing.assert_allclose(found.total, expected, rtol=1e-5)


def test_what_is_not_counted_does_not_enter_the_loss(predictions):
    prediction, values, counted = predictions

    def total(prediction, values):
        return hopular_loss(SCHEMA, prediction, values, jnp.asarray(counted), feature_weight=0.3).total

    loss = jax.jit(jax.value_and_grad(total))
    wide = np.repeat(counted, SCHEMA.sizes, axis=-1)
    expected, gradient = loss(prediction, values)
    np.testing.assert_array_equal(gradient != 0, wide)
    for content in (np.nan, np.inf, 77.0):
        replaced = np.where(wide, prediction, content), np.where(counted, values, content)
        found, gradient_of_replaced = loss(*(one.astype(np.float32) for one in replaced))
        assert found == expected
        np.testing.assert_array_equal(gradient, gradient_of_replaced)
    assert loss(prediction + 0.5, values)[0] != expected


def test_weight_of_the_features_falls_by_half_a_cosine():
    np.testing.assert_allclose([feature_weight_at(p) for p in (-1, 0, 0.5, 1, 2)], [1, 1, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        [feature_weight_at(p, initial=0.8, final=0.2) for p in (0, 0.25, 1)],
        [0.8, 0.5 + 0.3 * math.cos(math.pi / 4), 0.2],
        rtol=1e-6,
    )


@pytest.mark.slow
def test_training_learns_a_rule_from_the_memory(rng):
    """With new tables at every step only the memory can tell what the two classes mean."""
    schema = TableSchema((NUMBER, CategoricalColumn(2)))
    model = Hopular(schema, features=8, depth=1, sample=LOOKUP, feature=LOOKUP, input_dropout_rate=0.0)

    def batch(key):
        sign, numbers = jax.random.split(key)
        numbers = jax.random.normal(numbers, (16, 24))
        classes = (numbers > 0) ^ jax.random.bernoulli(sign, 0.5, (16, 1))
        return jnp.stack([numbers, classes.astype(jnp.float32)], axis=-1)

    def loss(params, key, blind=False):
        rows = batch(key)
        memory = rows.at[..., -1].set(0) if blind else rows
        prediction = model.apply({"params": params}, rows, memory, own=jnp.tile(jnp.arange(24), (16, 1)))
        return hopular_loss(schema, prediction, rows, jnp.ones(rows.shape, bool), feature_weight=0.0).total

    def step(carry, key):
        params, mean, square = carry
        gradient = jax.grad(loss)(params, key)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
        square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, square, gradient)
        params = jax.tree.map(lambda p, m, v: p - 3e-3 * m / (jnp.sqrt(v) + 1e-8), params, mean, square)
        return (params, mean, square), None

    rows = batch(jax.random.key(0))
    params = model.init(jax.random.key(1), rows, rows)["params"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    keys = jax.random.split(jax.random.key(2), 400)
    (params, _, _), _ = jax.jit(functools.partial(jax.lax.scan, step))((params, zeros, zeros), keys)
    seen, blind = (float(jax.jit(loss, static_argnums=2)(params, jax.random.key(3), flag)) for flag in (False, True))
    assert seen < 0.4
    assert blind > 0.6  # log 2 = 0.69 is what chance gives


# The reference code. --------------------------------------------------------------------------------------------------

REFERENCE = TableSchema((NUMBER, CategoricalColumn(3), NUMBER, CategoricalColumn(2), CategoricalColumn(3)))


@pytest.fixture(scope="module")
def golden():
    stored = dict(np.load(GOLDEN))
    raw, query = stored["raw_train"], stored["raw_query"]
    statistics = table_statistics(REFERENCE, raw)
    train, rows = (jax.device_put(encode_table(REFERENCE, statistics, one)) for one in (raw, query))
    lookup = hopular_lookup(2)
    model = Hopular(REFERENCE, features=8, depth=2, sample=lookup, feature=lookup)
    shapes = jax.eval_shape(model.init, jax.random.key(0), rows.values, train.values)["params"]
    weights = {name.removeprefix("weights/"): stored[name] for name in stored if name.startswith("weights/")}
    return stored, train, rows, model, shapes, weights, from_reference(weights, shapes)


def one_hot(schema, values, seen, masked):
    """Return rows as the reference encodes them: numbers or classes and a flag for each column."""
    parts = []
    for index, size in enumerate(schema.sizes):
        part = np.eye(size)[values[:, index].astype(int)] if schema.categorical[index] else values[:, index, None]
        parts += [part * seen[:, index, None], masked[:, index, None]]
    return np.concatenate(parts, axis=1)


def test_encoding_equals_the_reference(golden):
    stored, train, rows, *_ = golden
    nothing = np.zeros(train.values.shape, bool)
    found = one_hot(REFERENCE, *map(np.asarray, train), nothing)
    np.testing.assert_allclose(found, stored["encoded_memory"], atol=1e-5)
    masked = stored["masked"]
    found = one_hot(REFERENCE, np.asarray(rows.values), np.asarray(rows.present) & ~masked, masked)
    np.testing.assert_allclose(found, stored["encoded_query"], atol=1e-5)


def test_modules_equal_the_reference(golden):
    stored, train, rows, model, _, _, params = golden
    embed = functools.partial(jax.jit(HopularEmbedding(REFERENCE, 8).apply), {"params": params["embed"]})
    found = embed(rows.values, present=rows.present, masked=jnp.asarray(stored["masked"]))
    np.testing.assert_allclose(found, stored["embedded"], atol=1e-5)
    np.testing.assert_allclose(embed(train.values, present=train.present), stored["embedded_memory"], atol=1e-5)
    block = HopularBlock(model.sample, model.feature)
    inputs = [jnp.asarray(stored[name]) for name in ("embedded", "embedded_memory", "embedded")]
    found = jax.jit(block.apply)({"params": params["block_0"]}, *inputs, own=jnp.asarray(stored["own"]))
    np.testing.assert_allclose(found, stored["block"], atol=1e-5)


@pytest.mark.slow
def test_model_and_losses_equal_the_reference(golden):
    stored, train, rows, model, _, _, params = golden
    apply = functools.partial(
        jax.jit(model.apply),
        {"params": params},
        rows.values,
        train.values,
        present=rows.present,
        masked=jnp.asarray(stored["masked"]),
        memory_present=train.present,
    )
    found = apply(own=jnp.asarray(stored["own"]))
    np.testing.assert_allclose(found, stored["prediction"], atol=2e-5)
    np.testing.assert_allclose(apply(), stored["prediction_without_own"], atol=2e-5)
    assert np.abs(stored["prediction"] - stored["prediction_without_own"])[:4].max() > 1e-3
    for counted, losses in ((np.ones_like(stored["partial"]), "losses"), (stored["partial"], "losses_partial")):
        counted = jnp.asarray(counted) & rows.present
        loss = hopular_loss(REFERENCE, found, rows.values, counted, feature_weight=0.5)
        np.testing.assert_allclose((loss.features, loss.targets), stored[losses], rtol=1e-5)


def test_annealing_and_rates_equal_the_reference(golden):
    stored, _, rows, *_ = golden
    found = [feature_weight_at(epoch / 20) for epoch in range(20)]
    np.testing.assert_allclose(found, stored["weights_by_epoch"], atol=1e-6)
    copies = jnp.tile(rows.values[:1], (20_000, 1))
    rates = {"select_rate": 0.5, "mask_rate": 0.2, "replace_rate": 0.3}
    found = jax.device_get(augment(KEY, REFERENCE, copies, jnp.ones(copies.shape, bool), **rates))
    values, masked, counted = found
    np.testing.assert_allclose(masked[:, :4].mean(axis=0), stored["rate_mask"][:4], atol=0.012)
    np.testing.assert_allclose((values != np.asarray(copies)).mean(axis=0), stored["rate_changed"], atol=0.015)
    np.testing.assert_allclose(counted.mean(axis=0), stored["rate_counted"], atol=0.02)


def test_state_dicts_that_do_not_fit_are_refused(golden):
    *_, shapes, weights, _ = golden
    name = "summarizations.feature_summarizations.3.bias"
    with pytest.raises(ValueError, match=rf"{name}.* is missing"):
        from_reference({key: value for key, value in weights.items() if key != name}, shapes)
    with pytest.raises(ValueError, match=r"unknown \['more'\]"):
        from_reference(weights | {"more": np.ones(1)}, shapes)
    with pytest.raises(ValueError, match=r"summary/out/bias \(9,\) for \(10,\)"):
        from_reference(weights | {name: np.ones(9)}, shapes)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_can_be_built(name):
    fields = {key: value for key, value in VARIANTS[name].items() if key not in ("module", "inputs")}
    model = VARIANTS[name]["module"](**fields)
    found, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), *VARIANTS[name]["inputs"])
    assert found.shape == (1, 32)
