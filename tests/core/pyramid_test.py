import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxlayers.core.pyramid import Level


def test_level_passes_through_jit_with_its_stride():
    level = jax.jit(lambda x: Level(2 * x, (4, 2)))(jnp.ones((1, 3, 3, 5)))
    assert level.stride == (4, 2)
    assert level.channels == 5
    assert float(level.array[0, 0, 0, 0]) == 2.0
    assert len(jax.tree.leaves(level)) == 1


def test_level_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Level(jnp.ones((1, 2)), (1,)).stride = (2,)
