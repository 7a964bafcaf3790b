import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxlayers.core import axes

RULES = ((axes.BATCH, "data"), (axes.FEATURES, "tensor"))


def mesh():
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_names_become_the_spec_counted_from_the_right():
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        x = jax.jit(lambda x: axes.constrain(x, axes.BATCH, None, axes.FEATURES))(jnp.ones((3, 8, 5, 4)))
    assert x.sharding.spec == P(None, "data", None, "tensor")


def test_without_a_mesh_or_rules_nothing_happens():
    x = jnp.ones((8, 4))
    assert axes.constrain(x, axes.BATCH, axes.FEATURES) is x


@pytest.mark.parametrize(("names", "match"), [(("btach", None), "'btach' is unknown"), (("batch",) * 3, "rank")])
def test_misspelt_names_and_wrong_ranks_are_refused(names, match):
    # Flax would replicate without a word.
    with pytest.raises(ValueError, match=match):
        axes.constrain(jnp.ones((8, 4)), *names)


def test_an_axis_that_does_not_divide_stays_whole():
    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        x = jax.jit(lambda x: axes.constrain(x, axes.BATCH, axes.FEATURES))(jnp.ones((8, 7)))
    assert x.sharding.spec == P("data")


def test_split_says_what_constrain_does_and_a_map_needs_no_batch():
    rules = ((axes.HEIGHT, ("data", "tensor")), (axes.WIDTH, "tensor"), (axes.BATCH, "data"))
    assert axes.split((8, 8, 8, 3), axes.BATCH, axes.HEIGHT, axes.WIDTH, None) == ((),) * 4
    with jax.set_mesh(mesh()), nn.logical_axis_rules(rules):
        for shape in [(8, 8, 8, 3), (8, 12, 8, 3), (12, 8, 3)]:
            found = axes.split_map(shape)
            # The rule of the height comes first and takes both; of those that do not divide the last is left out.
            assert found == ((("data", "tensor") if shape[-3] == 8 else ("data",)), ())
            spec = jax.jit(axes.constrain_map)(jnp.ones(shape)).sharding.spec
            assert spec == P(*[None] * (len(shape) - 3), found[0] if len(found[0]) > 1 else found[0][0])
