"""The Pallas kernels against their jnp twin: interpreted on CPU in value and gradient, and compiled for a TPU."""

import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlayers.core import axes
from jaxlayers.kernels.streamed_association import streamed_association
from train.collectives import collectives

# Blocks are of 128 patterns at least, and no more than 256 states.
CHUNK = 128


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def chosen(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.6)


def differentiated(kernel, **keywords):
    """Return a function of (state, stored, values, beta) that gives the results and gradients of a sum over them."""

    def total(*operands):
        state, stored, values, beta = operands
        found = streamed_association(state, stored, values, beta=beta, kernel=kernel, chunk_size=CHUNK, **keywords)
        finite = jnp.where(jnp.isfinite(found.log_sum_exp), found.log_sum_exp, 0)
        return jnp.sum(jnp.sin(found.values)) + jnp.sum(jnp.cos(finite)), found

    def both(*operands):
        given = tuple(place for place, x in enumerate(operands) if x is not None)
        return jax.value_and_grad(total, argnums=given, has_aux=True)(*operands)

    return jax.jit(both)


def assert_equal(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        scale = max(1.0, float(np.max(np.abs(other), where=np.isfinite(other), initial=0)))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * scale)


# Names say what each adds; sizes are no multiples of the blocks but where they are smaller than one.
PROBLEMS = {
    "one-block": (
        (draw(0, 2, 5, 6), draw(1, 24, 6), draw(2, 24, 4), jnp.asarray([0.7, 0.7])),
        {"mask": jnp.asarray([True, False])[:, None, None] & chosen(3, 1, 24)},
    ),
    "batch-shares-a-memory-and-heads-share-values": (
        (draw(0, 2, 3, 5, 6), draw(1, 3, 300, 6), draw(2, 2, 1, 300, 4), jnp.asarray([0.5, 1.0, 0.0])),
        {"mask": chosen(3, 2, 1, 1, 300), "exclude": jnp.asarray([[[3, -1, 299, 128, 0]]])},
    ),
    "patterns-are-values-and-lie-in-rows-of-128": (
        (draw(0, 2, 3, 3, 128), draw(1, 3, 300, 128), None, jnp.asarray([[0.1], [0.2]])),
        {"mask": chosen(4, 2, 1, 3, 1)},
    ),
    "many-states-of-one-memory-with-a-mask-for-each": (
        (draw(0, 3, 300, 6), draw(1, 1, 140, 6), draw(2, 140, 128), jnp.float32(0.7)),
        {"mask": chosen(5, 3, 1, 140), "exclude": jnp.arange(300)},
    ),
}


@functools.cache
def by_kernel(name):
    """Return the function of a problem by kernels, and what it gives."""
    operands, keywords = PROBLEMS[name]
    function = differentiated("pallas", **keywords)
    return function, function(*operands)


@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_equal_their_jnp_twin_in_value_and_gradient(name):
    operands, keywords = PROBLEMS[name]
    expected = differentiated("jnp", **keywords)(*operands)
    function, found = by_kernel(name)
    assert_equal(found, expected)
    # The control: another beta is seen.
    state, stored, values, beta = operands
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_equal(function(state, stored, values, beta + 1e-2), expected)


def test_a_state_that_may_retrieve_nothing_gets_zeros_and_no_gradient():
    (_, found), (by_state, by_stored, _, by_beta) = by_kernel("one-block")[1]
    assert not jnp.any(found.values[1])
    assert jnp.all(found.log_sum_exp[1] == -jnp.inf)
    assert not jnp.any(by_state[1])
    assert by_beta[1] == 0
    # What may be retrieved is, and patterns that no state may retrieve have no gradient.
    seen = PROBLEMS["one-block"][1]["mask"][0, 0]
    assert jnp.all(jnp.isfinite(found.log_sum_exp[0]))
    np.testing.assert_array_equal(jnp.any(by_stored != 0, axis=-1), seen)


def test_bfloat16_is_summed_in_float32():
    state, stored, values = (0.5 * draw(seed, *shape) for seed, shape in enumerate([(5, 16), (300, 16), (300, 4)]))
    operands = (*(x.astype(jnp.bfloat16) for x in (state, stored, values)), jnp.float32(0.7))
    found, expected = (differentiated(kernel)(*operands) for kernel in ("pallas", "jnp"))
    np.testing.assert_allclose(found[0][1].log_sum_exp, expected[0][1].log_sum_exp, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=1e-2 * np.max(np.abs(other)))


def test_float32_states_keep_their_precision_with_a_bfloat16_memory():
    state, stored, values = draw(0, 5, 16), draw(1, 300, 16).astype(jnp.bfloat16), draw(2, 300, 4).astype(jnp.bfloat16)
    found, expected = (
        jax.jit(functools.partial(streamed_association, beta=0.7, kernel=kernel))(state, stored, values)
        for kernel in ("pallas", "jnp")
    )
    assert_equal(found, expected)


def test_may_be_mapped():
    state, stored = draw(0, 2, 5, 6), draw(1, 300, 6)
    found, expected = (
        jax.jit(jax.vmap(functools.partial(streamed_association, stored=stored, beta=0.7, kernel=kernel)))(state)
        for kernel in ("pallas", "jnp")
    )
    assert_equal(found, expected)


def largest_array(jaxpr):
    """Return the size of the largest array that a function makes outside of kernels."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        if equation.primitive.name != "pallas_call":
            inner = jax.tree.leaves(list(equation.params.values()))
            sizes += [largest_array(getattr(each, "jaxpr", each)) for each in inner if hasattr(each, "eqns")]
    return max(sizes)


def test_a_memory_is_not_copied_for_each_batch_element():
    state, stored = draw(0, 16, 3, 5, 6), draw(1, 3, 300, 6)
    for memory, copies in ((stored, 1), (jnp.broadcast_to(stored, (16, *stored.shape)), 16)):  # the second: the control
        traced = jax.make_jaxpr(differentiated("pallas"))(state, memory, None, jnp.float32(1))
        assert largest_array(traced.jaxpr) == copies * stored.size


# Over a mesh ----------------------------------------------------------------------------------------------------------

RULES = ((axes.BATCH, "data"), (axes.HEADS, "tensor"))


def test_batch_heads_and_patterns_split_over_a_mesh_give_the_same():
    operands = (draw(0, 4, 2, 5, 6), draw(1, 2, 256, 6), draw(2, 4, 1, 256, 4), jnp.asarray([0.5, 1.0]))
    keywords = {"mask": chosen(3, 4, 1, 1, 256), "exclude": jnp.asarray([[[3, -1, 255, 128, 0]]])}
    expected = differentiated("jnp", **keywords)(*operands)
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        found = differentiated("pallas", axis="sequence", **keywords)(*operands)
    assert_equal(found, expected)
    (_, results), gradients = found
    assert results.values.sharding.spec == PartitionSpec("data", "tensor")
    assert results.log_sum_exp.sharding.spec == PartitionSpec("data", "tensor")
    assert gradients[0].sharding.spec == PartitionSpec("data", "tensor")
    assert gradients[1].sharding.spec == PartitionSpec("tensor", "sequence")


def test_the_batch_may_have_the_mesh_axis_of_the_patterns_and_then_keeps_its_others():
    operands, _ = PROBLEMS["batch-shares-a-memory-and-heads-share-values"]
    state, stored, _, beta = operands
    memory = stored[:, :256]
    expected = streamed_association(state, memory, beta=beta)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules(((axes.BATCH, ("tensor", "data")),)):
        found = jax.jit(functools.partial(streamed_association, beta=beta, axis="data", kernel="pallas"))(state, memory)
    assert_equal(found, expected)
    assert found.values.sharding.spec == PartitionSpec("tensor")


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"dropout_rate": 0.1, "dropout_key": np.zeros(2, np.uint32)}, r"dropout_rate=0.1 .* set kernel='jnp'"),
        ({"mask": np.ones((5, 24), bool)}, r"mask of shape \(5, 24\) .* set kernel='jnp'"),
        ({"kernel": "triton"}, r"kernel='triton' must be one of \('jnp', 'pallas'\)"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(untyped, keywords, match):
    (state, stored, values, beta), _ = PROBLEMS["one-block"]
    with pytest.raises(ValueError, match=match):
        streamed_association(state, stored, values, beta=beta, **{"kernel": "pallas", **keywords})


def test_float16_and_float64_are_refused():
    (state, stored, _, beta), _ = PROBLEMS["one-block"]
    with pytest.raises(ValueError, match=r"patterns of dtype float16 must be .* set kernel='jnp'"):
        streamed_association(state.astype("float16"), stored.astype("float16"), beta=beta, kernel="pallas")
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"patterns of dtype float64 must be"):
        streamed_association(state.astype("float64"), stored, beta=beta, kernel="pallas")


def test_a_gpu_is_refused(monkeypatch):
    (state, stored, _, beta), _ = PROBLEMS["one-block"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=r"kernel='pallas' must run on TPU .* not on gpu; set kernel='jnp'"):
        streamed_association(state, stored, beta=beta, kernel="pallas")


# On a TPU -------------------------------------------------------------------------------------------------------------


def tpu(topology):
    pytest.importorskip("libtpu")
    assert "TPU_WORKER_HOSTNAMES" in os.environ, "run `make test-tpu-all`: libtpu needs its environment"
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def gradients(associate):
    def total(state, stored, beta):
        values, log_sum_exp = associate(state, stored, beta)
        return jnp.sum(jnp.square(values.astype(jnp.float32))) + jnp.sum(log_sum_exp)

    return jax.value_and_grad(total, argnums=(0, 1, 2))


def plain(state, stored, beta):
    logits = jnp.einsum("hsd,hpd->hsp", state, stored, preferred_element_type=jnp.float32) * beta[:, None, None]
    weights = jax.nn.softmax(logits).astype(stored.dtype)
    return jnp.einsum("hsp,hpd->hsd", weights, stored), jax.nn.logsumexp(logits, axis=-1)


HEADS, STATES = 8, 256


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("patterns", "features", "dtype"),
    [(131072, 64, jnp.bfloat16), (100_000, 128, jnp.bfloat16), (65536, 64, jnp.float32), (4096, 2048, jnp.float32)],
)
def test_on_a_tpu_nothing_of_the_size_of_the_weights_or_the_memory_is_in_main_memory(patterns, features, dtype):
    place = SingleDeviceSharding(tpu("v5e:2x2")[0])
    shapes = [((HEADS, STATES, features), dtype), ((HEADS, patterns, features), dtype), ((HEADS,), jnp.float32)]
    operands = [jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind in shapes]

    def by_kernel(state, stored, beta):
        return streamed_association(state, stored, beta=beta, kernel="pallas")

    compiled = jax.jit(gradients(by_kernel)).lower(*operands).compile()
    # Forwards, to the states, and to the memory.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    weights, memory = 4 * HEADS * STATES * patterns, HEADS * patterns * features * dtype(0).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < min(weights, memory) / 8
    if features == 64 and dtype == jnp.bfloat16:
        # The control: the plain form.
        control = jax.jit(gradients(plain)).lower(*operands).compile()
        assert control.memory_analysis().temp_size_in_bytes >= weights


@pytest.mark.tpu
def test_on_a_tpu_patterns_split_over_devices_stay_where_they_are():
    mesh = Mesh(np.array(tpu("v5e:2x2")).reshape(2, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    batch, patterns, features = 4, 65536, 64
    described = (
        ((batch, HEADS, STATES, features), jnp.bfloat16, PartitionSpec("data")),
        ((HEADS, patterns, features), jnp.bfloat16, PartitionSpec(None, "sequence")),
        ((HEADS,), jnp.float32, PartitionSpec()),
    )
    operands = [jax.ShapeDtypeStruct(*each, sharding=NamedSharding(mesh, spec)) for *each, spec in described]

    def by_kernel(state, stored, beta):
        return streamed_association(state, stored, beta=beta, kernel="pallas", axis="sequence")

    with jax.set_mesh(mesh), nn.logical_axis_rules(((axes.BATCH, "data"),)):
        compiled = jax.jit(gradients(by_kernel)).lower(*operands).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    sent = collectives(compiled, mesh)
    assert {each.kind for each in sent} == {"all-reduce"}
    # Over the patterns' axis go results and gradients of states, over the batch's the gradient of the memory, once.
    of_states = 4 * batch // 2 * HEADS * STATES * (features + 2)
    assert all(each.bytes <= of_states for each in sent if each.mesh_axes == ("sequence",))
    of_memory = 2 * HEADS * patterns // 2 * features
    assert sum(each.bytes for each in sent if each.mesh_axes == ("data",)) == pytest.approx(of_memory, rel=1e-3)
