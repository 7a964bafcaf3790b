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
