"""The streamed association against the plain one: values, gradients, masks, meshes, and what is in memory."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlayers.kernels.streamed_association import moved_association, streamed_association
from train.collectives import collectives


def plain_weights(state, stored, beta, mask=None, exclude=None):
    """The matrix, its logits and what is allowed."""
    logits = jnp.einsum("...sd,...pd->...sp", state, stored) * jnp.asarray(beta)[..., None, None]
    allowed = jnp.ones(logits.shape, bool)
    if mask is not None:
        allowed = allowed & mask
    if exclude is not None:
        allowed = allowed & (jnp.arange(logits.shape[-1]) != exclude[..., None])
    return jax.nn.softmax(logits, axis=-1, where=allowed), logits, allowed


def plain(state, stored, values, beta, **keywords):
    """The definition."""
    weights, logits, allowed = plain_weights(state, stored, beta, **keywords)
    some = jnp.any(allowed, axis=-1)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1, where=allowed | ~some[..., None])
    return jnp.einsum("...sp,...pd->...sd", weights, values), jnp.where(some, log_sum_exp, -jnp.inf)


def stream(state, stored, values, beta, **keywords):
    return streamed_association(state, stored, values, beta=beta, **keywords)


BATCH, HEADS, STATES, PATTERNS, FEATURES, VALUES = 2, 3, 5, 24, 6, 4


@pytest.fixture(scope="module")
def problem():
    """Batch elements share memories, heads share values, one beta is zero, and some states may retrieve nothing."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    mask = rng.random((BATCH, 1, STATES, PATTERNS)) < 0.7
    mask[1, :, 2] = False
    return {
        "operands": (
            draw(BATCH, HEADS, STATES, FEATURES),
            draw(HEADS, PATTERNS, FEATURES),
            draw(BATCH, 1, PATTERNS, VALUES),
            jnp.asarray([0.5, 1.0, 0.0]),
        ),
        "mask": jnp.asarray(mask),
        "exclude": jnp.asarray(rng.integers(-1, PATTERNS, (BATCH, 1, STATES))),
        "weights": (draw(BATCH, HEADS, STATES, VALUES), draw(BATCH, HEADS, STATES)),
    }


def differentiated(associate, problem, **keywords):
    """Return a function of the operands that gives both results and the gradients of a sum over them."""

    def total(*operands):
        found, log_sum_exp = associate(*operands, **keywords)
        by_values, by_sum = problem["weights"]
        finite = jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0)
        return jnp.sum(found * by_values) + jnp.sum(finite * by_sum), (found, log_sum_exp)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))


def assert_equal(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("names", "chunk_size"),
    [((), 1), ((), 4096), (("mask",), 7), (("exclude",), 24), (("mask", "exclude"), 7), (("mask", "exclude"), 9)],
)
def test_equals_the_plain_form_in_value_and_gradient(problem, names, chunk_size):
    keywords = {name: problem[name] for name in names}
    expected = differentiated(plain, problem, **keywords)(*problem["operands"])
    streamed = differentiated(functools.partial(stream, chunk_size=chunk_size), problem, **keywords)
    assert_equal(streamed(*problem["operands"]), expected)
    # The control: one pattern a little off is seen.
    state, stored, values, beta = problem["operands"]
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(streamed(state, stored.at[1, 3].add(0.01), values, beta), expected)


def test_float64_is_kept(problem):
    with jax.enable_x64(True):
        operands = [jnp.asarray(np.asarray(x), jnp.float64) for x in problem["operands"]]
        expected, found = (differentiated(fn, problem)(*operands) for fn in (plain, stream))
        assert found[0][1][0].dtype == jnp.float64
        assert_equal(found, expected, 1e-12)


def test_bfloat16_is_summed_in_float32(problem):
    operands = [x.astype(jnp.bfloat16) for x in problem["operands"][:3]]
    beta = problem["operands"][3]
    found = streamed_association(*operands, beta=beta, chunk_size=7)
    assert found.values.dtype == jnp.bfloat16
    assert found.log_sum_exp.dtype == jnp.float32
    expected = plain(*(x.astype(jnp.float32) for x in operands), beta)
    np.testing.assert_allclose(found.log_sum_exp, expected[1], atol=1e-5)
    np.testing.assert_allclose(found.values.astype(jnp.float32), expected[0], atol=2e-2)


def test_patterns_are_the_values_if_none_are_given(problem):
    state, stored, _, beta = problem["operands"]

    def total(stored, fn):
        return jnp.sum(jnp.sin(fn(stored)[0]))

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    streamed = gradient(stored, lambda x: streamed_association(state, x, beta=beta, chunk_size=7))
    assert_equal(streamed, gradient(stored, lambda x: plain(state, x, x, beta)))


def test_huge_logits_stay_finite(problem):
    state, stored, values, _ = problem["operands"]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def total(*operands):
        return jnp.sum(streamed_association(*operands, beta=1e6, chunk_size=7).values)

    found, gradients = total(state, stored, values)
    best = jnp.argmax(jnp.einsum("...sd,...pd->...sp", state, stored), axis=-1)
    nearest = jnp.take_along_axis(jnp.broadcast_to(values, (BATCH, HEADS, PATTERNS, VALUES)), best[..., None], axis=-2)
    np.testing.assert_allclose(found, jnp.sum(nearest), rtol=1e-5)
    assert all(bool(jnp.all(jnp.isfinite(each))) for each in gradients)


def test_a_state_that_may_retrieve_nothing_gets_zeros_and_no_gradient(problem):
    state, stored, values, beta = problem["operands"]
    nothing = jnp.zeros((1, PATTERNS), bool)
    found = streamed_association(state, stored, values, beta=beta, mask=nothing)
    assert not jnp.any(found.values)
    assert jnp.all(found.log_sum_exp == -jnp.inf)
    gradients = differentiated(stream, problem, mask=nothing)(*problem["operands"])[1]
    assert not any(bool(jnp.any(each)) for each in gradients)


# Over a mesh ----------------------------------------------------------------------------------------------------------


def mesh_of(*shape):
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("axis", ["model", ("data", "model"), ("model", "data")], ids=str)
def test_patterns_may_lie_split_over_devices(problem, axis):
    keywords = {name: problem[name] for name in ("mask", "exclude")}
    expected = differentiated(plain, problem, **keywords)(*problem["operands"])
    with jax.set_mesh(mesh_of(2, 4)):
        found = differentiated(functools.partial(stream, chunk_size=2, axis=axis), problem, **keywords)(
            *problem["operands"]
        )
    assert_equal(found, expected)
    # Each device has the gradient of its own patterns and no more.
    for place in (1, 2):
        spec = found[1][place].sharding.spec
        assert spec[found[1][place].ndim - 2] in (axis, (axis,))


def on_devices(mesh, patterns, chunk_size, axis, *, states=4, features=8, values=5):
    """Return the compiled value and gradient for that many patterns, split over the axis."""
    split = NamedSharding(mesh, PartitionSpec(axis))
    whole = NamedSharding(mesh, PartitionSpec())

    def total(state, stored, values):
        found = streamed_association(state, stored, values, beta=1.0, chunk_size=chunk_size, axis=axis)
        return jnp.sum(jnp.sin(found.values)) + jnp.sum(found.log_sum_exp)

    shapes = ((states, features), (patterns, features), (patterns, values))
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    step = jax.jit(
        jax.value_and_grad(total, argnums=(0, 1, 2)),
        in_shardings=(whole, split, split),
        out_shardings=(whole, (whole, split, split)),
    )
    with jax.set_mesh(mesh):
        return step.lower(*operands).compile()


def largest_rows(compiled):
    """Return the largest size of an axis of any array in the program."""
    sizes = re.findall(r"\b(?:f32|bf16|s32|u32|pred|f64)\[([\d,]+)\]", compiled.as_text())
    return max(int(size) for sizes_of_one in sizes for size in sizes_of_one.split(","))


def test_no_pattern_travels_and_no_device_holds_all():
    mesh, patterns = mesh_of(8), 8192
    compiled = on_devices(mesh, patterns, 256, "data")
    sent = collectives(compiled, mesh)
    assert {each.kind for each in sent} == {"all-reduce"}
    # A maximum; a sum and values by it; then the gradient of the states and of beta.
    assert sum(each.bytes for each in sent) <= 4 * (4 + 4 * (1 + 5) + 4 * 8 + 1)
    assert largest_rows(compiled) == patterns // 8
    # The control: the plain form on patterns that lie split by rule needs the whole softmax's row.
    assert largest_rows(on_devices(mesh_of(1), patterns, 256, ())) == patterns


def test_memory_besides_the_patterns_does_not_grow_with_them():
    spare = [on_devices(mesh_of(1), patterns, 512, ()).memory_analysis() for patterns in (4096, 65536)]
    assert spare[1].argument_size_in_bytes > 15 * spare[0].argument_size_in_bytes
    assert spare[1].temp_size_in_bytes < 1.1 * spare[0].temp_size_in_bytes + 4096
    # The control: in one chunk it does.
    whole = on_devices(mesh_of(1), 65536, 65536, ()).memory_analysis()
    assert whole.temp_size_in_bytes > 10 * spare[1].temp_size_in_bytes


@pytest.mark.tpu
def test_no_device_of_a_pod_slice_holds_all_patterns():
    pytest.importorskip("libtpu")
    assert "TPU_WORKER_HOSTNAMES" in os.environ, "run `make test-tpu-all`: libtpu needs its environment"
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x8").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    patterns, features, values = 2**25, 64, 64
    compiled = on_devices(mesh, patterns, 4096, "data", states=128, features=features, values=values)
    assert largest_rows(compiled) < patterns
    memory = compiled.memory_analysis()
    # Half a GiB of patterns and values a device; their copies in bfloat16, for the matrix unit, are half of that.
    share = 4 * 2 * patterns * features // 32
    assert memory.argument_size_in_bytes < 1.1 * share
    assert memory.temp_size_in_bytes < 0.6 * share
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())


# The rest -------------------------------------------------------------------------------------------------------------


def test_dropout_drops_the_same_weights_in_both_passes(problem):
    state, stored, values, beta = problem["operands"]
    key = jax.random.key(1, impl="unsafe_rbg")

    @jax.jit
    def total(*operands):
        found = streamed_association(*operands, beta=beta, chunk_size=7, dropout_rate=0.5, dropout_key=key)
        return jnp.sum(jnp.sin(found.values))

    with jax.enable_x64(True):
        operands = [jnp.asarray(np.asarray(x), jnp.float64) for x in (state, stored, values)]
        directions = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in operands]
        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*operands)
        expected = sum(jnp.vdot(a, b) for a, b in zip(gradients, directions, strict=True))
        ahead, behind = (
            total(*(x + step * d for x, d in zip(operands, directions, strict=True))) for step in (1e-6, -1e-6)
        )
        np.testing.assert_allclose((ahead - behind) / 2e-6, expected, rtol=1e-6)


def test_dropout_keeps_the_mean(problem):
    state, stored, values, beta = problem["operands"]

    def draw(key):
        return streamed_association(
            state, stored, values, beta=beta, chunk_size=7, dropout_rate=0.3, dropout_key=key
        ).values

    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 2000))
    expected = plain(state, stored, values, beta)[0]
    spread = jnp.std(drawn, axis=0) / np.sqrt(2000)
    assert jnp.all(jnp.std(drawn, axis=0) > 0)
    assert jnp.max(jnp.abs(jnp.mean(drawn, axis=0) - expected) / spread) < 5


def test_movement_is_the_distance_of_the_associations(problem):
    state, stored, _, beta = problem["operands"]
    conditions = {name: problem[name] for name in ("mask", "exclude")}
    new_state = state + 0.1
    one, other = (plain_weights(x, stored, beta, **conditions)[0] for x in (state, new_state))
    expected = jnp.linalg.norm(other - one, axis=-1)

    def move(**keywords):
        keywords = {"beta": beta, **conditions, **keywords}
        total = jax.jit(lambda x: streamed_association(x, stored, **keywords).log_sum_exp)
        found = [total(x) for x in (state, new_state)]
        return moved_association(state, found[0], new_state, found[1], stored, **keywords)

    np.testing.assert_allclose(move(chunk_size=7), expected, atol=1e-6)
    with jax.set_mesh(mesh_of(8)):
        np.testing.assert_allclose(move(chunk_size=2, axis="data"), expected, atol=1e-6)
    assert float(jnp.max(expected)) > 0.01


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"stored": jnp.zeros((0, 3))}, "patterns=0 must be at least 1: an empty memory"),
        ({"stored": jnp.zeros((4, 2))}, "state patterns have 3 features and stored patterns 2, which must be equal"),
        ({"values": jnp.zeros((3, 2))}, "values has 3 rows for 4 stored patterns"),
        ({"beta": -1.0}, "beta=-1.0 must be finite and at least 0"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"dropout_rate": 1.0}, r"dropout_rate=1.0 must be in \[0, 1\)"),
        ({"dropout_rate": 0.5}, "dropout_rate=0.5 needs a dropout_key"),
        ({"mask": jnp.zeros((2, 4))}, "mask of dtype float32 must be bool"),
        ({"mask": jnp.zeros((2, 3), bool)}, r"mask of shape \(2, 3\) must end in 4 stored patterns"),
        ({"axis": "nowhere"}, "axis 'nowhere' must be one of the mesh in scope"),
        ({"axis": "data"}, r"patterns=4 must divide by the 8 devices along \('data',\)"),
    ],
    ids=str,
)
def test_refuses_what_does_not_fit(keywords, match):
    arguments = {"state": jnp.zeros((2, 3)), "stored": jnp.zeros((4, 3)), "beta": 1.0} | keywords
    with jax.set_mesh(mesh_of(8)), pytest.raises(ValueError, match=match):
        streamed_association(**arguments)
