import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core.reference import choose_table, read_reference, read_variables, reference_name, split_fused

TABLE = {
    "stages/merge": "layers.{before}.down",
    "stages/blocks/norm": "layers.{stage}.{block}.{even}.{odd}",
    "stages/blocks/up": "l{stage}.b{block}.fc",
    "stages/blocks/up/bias": "l{stage}.b{block}.offset",
    "embed": "stem",
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("stages_2/merge/kernel", "layers.1.down.weight"),
        ("stages_2/blocks_13/norm/scale", "layers.2.13.4.5.weight"),
        ("stages_0/blocks_1/up/kernel", "l0.b1.fc.weight"),
        ("stages_0/blocks_1/up/bias", "l0.b1.offset"),
        ("embed/bias", "stem.bias"),
        ("embed/table", "stem.table"),
    ],
)
def test_names_are_translated_with_their_numbers(path, expected):
    assert reference_name(path, TABLE) == expected


def test_a_parameter_without_counterpart_is_named():
    with pytest.raises(ValueError, match="no counterpart of stages_0/extra/kernel; set the model's fields"):
        reference_name("stages_0/extra/kernel", TABLE)


WANTED = {
    "linear": {"kernel": (2, 3)},
    "patch": {"kernel": (8, 5)},
    "conv": {"kernel": (3, 1, 4, 5)},
    "norm": {"scale": (4,)},
    "one": {"scale": (1,)},
}
NAMES = {name: name for name in WANTED}


@pytest.fixture
def wanted():
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), WANTED, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.fixture
def tensors(rng):
    shapes = {"linear": (3, 2), "patch": (5, 2, 2, 2), "conv": (5, 4, 3, 1), "norm": (4, 1, 1), "one": (1,)}
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_tensors_get_our_layout(wanted, tensors):
    found = read_reference(tensors, wanted, NAMES)
    assert jax.tree.map(jnp.shape, found) == WANTED
    np.testing.assert_array_equal(found["linear"]["kernel"], tensors["linear.weight"].T)
    np.testing.assert_array_equal(found["norm"]["scale"], tensors["norm.weight"][:, 0, 0])
    for index in np.ndindex(5, 4, 3, 1):
        out, into, row, column = index
        assert found["conv"]["kernel"][row, column, into, out] == tensors["conv.weight"][index]
    # A patch kernel's rows are pixels in row-major order, features fastest.
    for index in np.ndindex(5, 2, 2, 2):
        out, into, row, column = index
        assert found["patch"]["kernel"][(row * 2 + column) * 2 + into, out] == tensors["patch.weight"][index]


def test_what_does_not_fit_is_named(wanted, tensors):
    with pytest.raises(ValueError, match=r"unknown \['more'\], missing \[\]; set its fields"):
        read_reference({**tensors, "more": np.ones(1)}, wanted, NAMES)
    read_reference({**tensors, "more": np.ones(1)}, wanted, NAMES, ignored=("more",))
    with pytest.raises(ValueError, match=r"unknown \[\], missing \['norm.weight'\]"):
        read_reference({name: value for name, value in tensors.items() if "norm" not in name}, wanted, NAMES)
    with pytest.raises(ValueError, match=r"norm.weight must give norm/scale its shape \(4,\), not \(3,\)"):
        read_reference({**tensors, "norm.weight": np.ones(3)}, wanted, NAMES)


def test_fused_projections_are_cut_by_rows():
    fused = {"a.qkv.weight": np.arange(12).reshape(6, 2), "a.qkv.bias": np.arange(6), "b.weight": np.ones(1)}
    found = split_fused(fused)
    assert set(found) == {f"a.{part}.{leaf}" for part in ("query", "key", "value") for leaf in ("weight", "bias")} | {
        "b.weight"
    }
    np.testing.assert_array_equal(found["a.key.weight"], [[4, 5], [6, 7]])
    np.testing.assert_array_equal(found["a.value.bias"], [4, 5])


def test_the_source_is_checked_and_the_channels_are_counted(tensors):
    names = {"one": NAMES}
    assert choose_table(names, "one", tensors, "linear/kernel") == (NAMES, 2)
    with pytest.raises(ValueError, match=r"source='two' must be one of \['one'\]"):
        choose_table(names, "two", tensors, "linear/kernel")
    with pytest.raises(ValueError, match=r"source='one' must hold 'linear.weight'; pass the source it comes from"):
        choose_table(names, "one", {}, "linear/kernel")


def test_statistics_are_read_into_their_own_collection(rng):
    shape = jax.ShapeDtypeStruct((3,), np.float32)
    wanted = {"params": {"norm": {"scale": shape}}, "batch_stats": {"norm": {"mean": shape}}}
    table = {"norm": "bn", "norm/mean": "bn.running_mean"}
    tensors = {name: rng.normal(size=3).astype(np.float32) for name in ("bn.weight", "bn.running_mean")}
    found = read_variables({**tensors, "bn.num_batches_tracked": np.ones(())}, wanted, table)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    np.testing.assert_array_equal(found["params"]["norm"]["scale"], tensors["bn.weight"])
    np.testing.assert_array_equal(found["batch_stats"]["norm"]["mean"], tensors["bn.running_mean"])
