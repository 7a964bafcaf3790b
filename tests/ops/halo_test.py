"""Windows of split maps equal those of whole ones, on random sizes in one to three dimensions; only halos travel."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlayers.core import axes
from jaxlayers.ops import halo
from train.collectives import collectives


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("a", "b", "c")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def random_case(rng, rank):
    """Return a mesh, how it splits the axes of a map, and size, window and shift that allow it."""
    mesh = mesh_of(*((8,), (2, 4), (4, 2), (2, 2, 2))[rng.integers(4)])
    names = list(rng.permutation(mesh.axis_names))
    split = [()] * rank
    for axis in rng.permutation(rank):
        take = int(rng.integers(0 if any(split) else 1, 3))
        split[axis], names = tuple(map(str, names[:take])), names[take:]
    window = tuple(int(step) for step in rng.integers(1, 5, rank))
    amount = tuple(int(rng.integers(step)) for step in window)
    parts = [int(np.prod([mesh.shape[name] for name in each])) for each in split]
    size = tuple(
        count * (step + int(rng.integers(4))) if count > 1 else int(rng.integers(step, 3 * step + 1))
        for count, step in zip(parts, window, strict=True)
    )
    return mesh, tuple(split), parts, size, window, amount


def mixed(x, size, window, amount, split, mask_padding):
    """Return a map in which each token is a sum over those it may attend to, times itself."""
    windows = halo.cut_windows(x, window, amount, split)
    mask = halo.window_mask(size, window, amount, split, mask_padding=mask_padding)
    mask = jnp.ones((1, windows.shape[-2], windows.shape[-2]), bool) if mask is None else mask
    # Later tokens weigh more, so that places within a window count.
    weight = mask * (1.0 + jnp.arange(mask.shape[-1]))
    return halo.join_windows((1 + weight @ windows) * windows, size, window, amount, split)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_windows_of_a_split_map_are_those_of_the_whole_one_on_random_sizes(rank, seed):
    rng = np.random.default_rng([rank, seed])
    mesh, split, parts, size, window, amount = random_case(rng, rank)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    whole = ((),) * rank
    mask_padding = bool(seed % 2)

    def run(split, x):
        out, pullback = jax.vjp(lambda x: mixed(x, size, window, amount, split, mask_padding), x)
        windows = halo.cut_windows(x, window, amount, split)
        return windows, halo.join_windows(windows, size, window, amount, split), out, pullback(jnp.cos(x))[0]

    expected = jax.jit(functools.partial(run, whole))(x)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P(None, *(each or None for each in split)))
        found = jax.jit(functools.partial(run, split), in_shardings=place)(jax.device_put(x, place))
    # A device has the windows that begin in its part of an axis, in order; the last has what begins in the padding.
    grid = [-(-length // step) for length, step in zip(size, window, strict=True)]
    index = []
    for axis, (length, step, by, count) in enumerate(zip(size, window, amount, parts, strict=True)):
        owners = [min((by + step * n) // (length // count), count - 1) for n in range(grid[axis])]
        slots = found[0].shape[1 + axis] // count
        index.append([owner * slots + owners[:n].count(owner) for n, owner in enumerate(owners)])
    true = found[0][(slice(None), *np.ix_(*index))]
    np.testing.assert_array_equal(true, expected[0].reshape(true.shape))
    np.testing.assert_array_equal(found[1], x)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-5, atol=1e-4)


def compiled(fn, shape, mesh, spec):
    place = NamedSharding(mesh, spec)
    with jax.set_mesh(mesh):
        return jax.jit(fn, in_shardings=place).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()


def test_regular_windows_of_aligned_parts_send_nothing():
    split = (("a",), ("b",))
    mesh = mesh_of(2, 4)
    program = compiled(lambda x: halo.cut_windows(x, (4, 2), (0, 0), split), (1, 16, 16, 3), mesh, P(None, "a", "b"))
    assert collectives(program, mesh) == []
    # Negative control: the windows in one row-major axis, which is how a whole map is cut, do not stay where they are.
    program = compiled(lambda x: halo.cut_windows(x, (4, 2), (0, 0), ((), ())), (1, 16, 16, 3), mesh, P(None, "a", "b"))
    assert collectives(program, mesh)


def test_shifted_windows_of_aligned_parts_send_the_shift_to_the_one_before():
    mesh = mesh_of(2, 4)
    split = (("a",), ("b",))
    program = compiled(lambda x: halo.cut_windows(x, (4, 2), (3, 1), split), (1, 16, 16, 5), mesh, P(None, "a", "b"))
    found = [(each.kind, each.mesh_axes, each.shapes) for each in collectives(program, mesh)]
    assert found == [
        ("collective-permute", ("a",), (("f32", (1, 3, 4, 5)),)),
        ("collective-permute", ("b",), (("f32", (1, 8, 1, 5)),)),
    ]


def test_a_map_is_split_by_the_rules_where_each_part_holds_a_window():
    mesh = mesh_of(2, 4)
    rules = ((axes.HEIGHT, ("a", "b")), (axes.WIDTH, "b"), (axes.TOKENS, "b"), (axes.DEPTH, "a"))

    def split(shape, window, rules=rules, mesh=mesh):
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            return halo.map_split(shape, window)

    assert split((1, 32, 32, 3), (4, 4)) == (("a", "b"), ())
    assert split((32, 32, 3), (4, 4)) == (("a", "b"), ())
    # Not divisible by eight, but by two; the rule keeps the other mesh axis all the same.
    assert split((1, 34, 32, 3), (4, 4)) == (("a",), ())
    # Less than a window for each of eight, but not of two; less for each of two.
    assert split((1, 24, 32, 3), (4, 4)) == (("a",), ())
    assert split((1, 16, 32, 3), (9, 4)) == ((), ())
    assert split((1, 24, 3), (6,)) == (("b",),)
    assert split((1, 8, 12, 16, 3), (4, 3, 4), rules[1:]) == (("a",), (), ("b",))
    assert split((1, 32, 32, 3), (4, 4), ((axes.HEIGHT, "b"),), mesh_of(2, 1)) == ((), ())
    assert split((1, 32, 32, 3), (4, 4), rules=()) == ((), ())
    assert halo.map_split((1, 32, 32, 3), (4, 4)) == ((), ())


def test_windows_have_the_names_of_the_axes_that_they_lie_along():
    assert halo.window_names(((), ())) == (axes.WINDOWS,)
    assert halo.window_names(((), ("a",))) == (axes.HEIGHT, axes.WIDTH)
    assert halo.window_names((("a",), (), ())) == (axes.DEPTH, axes.HEIGHT, axes.WIDTH)
