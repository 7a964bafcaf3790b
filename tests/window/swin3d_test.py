import functools
import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlayers.window.swin3d as swin3d
from jaxlayers.nn.attention import MultiHeadAttention
from jaxlayers.ops.voxels import Voxels, voxelize, window_cells
from jaxlayers.testing import BadInput, Case
from jaxlayers.window.swin3d import SparseWindowAttention, Swin3D, Swin3DBlock


def voxels(rng, count=20, length=24, size=5, kinds=3):
    """Random voxels that all differ, then padding; signals are exact in bfloat16, so that no difference changes row."""
    grid = np.stack(np.unravel_index(rng.permutation(size**3)[:count], (size,) * 3), axis=-1) - size // 2
    coordinates = np.concatenate([grid, rng.integers(-9, 9, (length - count, 3))]).astype(np.int32)
    place = rng.integers(0, 16, (length, 3)) / 16 + 1 / 32
    others = rng.integers(-16, 16, (length, 3 * (kinds - 1))) / 16 + 1 / 32
    return coordinates, np.concatenate([place, others], axis=-1), np.arange(length) < count


def scenes(rng, *counts, features=8, **keywords):
    """Features, coordinates, signals and masks of a batch."""
    batch = [voxels(rng, count=count, **keywords) for count in counts]
    coordinates, signals, mask = (np.stack(leaves) for leaves in zip(*batch, strict=True))
    return rng.normal(size=(*mask.shape, features)), coordinates, signals, mask


def two_scenes(rng):
    return scenes(rng, 20, 13)


def changed(index, value):
    """Return inputs like `two_scenes`, one of them replaced."""
    return lambda rng: tuple(value(one) if at == index else one for at, one in enumerate(two_scenes(rng)))


SHAPE_ERRORS = (
    BadInput(match=r"coordinates must have shape \(2, 24, 3\)", inputs=changed(1, lambda one: one[..., :2])),
    BadInput(match=r"signals must have shape \(2, 24, 9\)", inputs=changed(2, lambda one: one[..., :6])),
    BadInput(match=r"mask must have shape \(2, 24\)", inputs=changed(3, lambda one: one[:, :20])),
)

TINY = Swin3D(
    num_classes=3,
    embed_dim=(4, 8),
    depths=(2, 1),
    num_heads=(1, 2),
    window_sizes=(3, 2),
    strides=(2,),
    quant_sizes=(2, 2, 2),
    down_neighbors=4,
    mlp_ratio=2.0,
)

CASES = (
    Case(
        name="sparse_window_attention",
        within="swin3d",
        # Chunks of 8, so that windows of up to 27 voxels span several.
        module=SparseWindowAttention(num_heads=2, window_size=3, shift_size=1, quant_sizes=(2, 4, 4), chunk_size=8),
        inputs=two_scenes,
        leading_axes=True,
        bad_inputs=(
            *SHAPE_ERRORS,
            BadInput(match="features=8 must be divisible by num_heads=3", module=SparseWindowAttention(num_heads=3)),
            BadInput(match="window_size=0 and", module=SparseWindowAttention(2, window_size=0)),
            BadInput(
                match=r"quant_sizes=\(4, 8, 8, 8\) must", module=SparseWindowAttention(2, quant_sizes=(4, 8, 8, 8))
            ),
            BadInput(match=r"quant_sizes=\(4, 0\) must", module=SparseWindowAttention(2, quant_sizes=(4, 0))),
        ),
    ),
    Case(
        name="swin3d_block",
        within="swin3d",
        module=Swin3DBlock(num_heads=2, window_size=3, quant_sizes=(2, 4, 4), mlp_ratio=2.0),
        inputs=two_scenes,
        leading_axes=True,
        bad_inputs=(
            *SHAPE_ERRORS,
            BadInput(match=r"rate=1.0 must lie in \[0, 1\)", module=Swin3DBlock(2, drop_path_rate=1.0)),
            BadInput(match="hidden_features=0 and", module=Swin3DBlock(2, mlp_ratio=0.0)),
        ),
    ),
    Case(
        name="swin3d",
        # One block a stage, since the checks compile it many times.
        module=TINY.clone(depths=(1, 1)),
        inputs=two_scenes,
        leading_axes=True,
        bad_inputs=(
            *SHAPE_ERRORS,
            BadInput(match=r"depths=\(2,\) must have 2 positive", module=TINY.clone(depths=(2,))),
            BadInput(match=r"num_heads=\(1, 0\) must have 2 positive", module=TINY.clone(num_heads=(1, 0))),
            BadInput(match=r"strides=\(1,\) must have 1 entries of 2", module=TINY.clone(strides=(1,))),
            BadInput(match=r"keep_ratio=1.5 must be one number in \(0, 1\]", module=TINY.clone(keep_ratio=1.5)),
            BadInput(match="num_classes=-1 and", module=TINY.clone(num_classes=-1)),
            BadInput(match="remat='ful' must be one of", module=TINY.clone(remat="ful")),
            BadInput(match="dtype int32 must be of floating", inputs=changed(0, lambda one: one.astype(int))),
        ),
    ),
)


def to_jax(*arrays):
    return tuple(jnp.asarray(one, jnp.float32 if np.issubdtype(one.dtype, np.floating) else None) for one in arrays)


def random_variables(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters in the shape of `module`'s; larger than an initialiser's, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            (1.0 if "var" in str(path[-1]) else 0.0) + 0.4 * np.abs(rng.normal(size=leaf.shape))
            if "batch_stats" in str(path[0])
            else 0.4 * rng.normal(size=leaf.shape),
            dtype,
        ),
        shapes,
    )


# Attention -------------------------------------------------------------------------------------------------------

ATTENTION = SparseWindowAttention(num_heads=2, window_size=3, shift_size=1, quant_sizes=(2, 4, 4), chunk_size=16)


def twin_attention(params, x, coordinates, signals, mask, *, heads, window, shift, quant_sizes):
    """The layer on one scene in float64, pair by pair."""
    project = {name: x @ params[name]["kernel"] + params[name]["bias"] for name in ("query", "key", "value")}
    dim = x.shape[-1] // heads
    out, cells = np.zeros_like(x), (coordinates + shift) // window
    for i in np.flatnonzero(mask):
        same = np.flatnonzero(mask & (cells == cells[i]).all(-1))
        for head in range(heads):
            part = np.s_[head * dim : (head + 1) * dim]
            logits, values = [], []
            for j in same:
                table = {"query": 0.0, "key": 0.0, "value": 0.0}
                for kind, (name, steps) in enumerate(zip(("xyz", "rgb", "norm"), quant_sizes, strict=False)):
                    for axis in range(3):
                        a, b = (signals[one, 3 * kind + axis] for one in (i, j))
                        if kind == 0:
                            a, b = a + coordinates[i, axis], b + coordinates[j, axis]
                        for of in table:
                            rows = params[f"{of}_{name}_table"]
                            row = math.floor((a - b) * steps) + rows.shape[1] // 2
                            table[of] = table[of] + rows[axis, min(max(row, 0), rows.shape[1] - 1), head]
                q, k, v = project["query"][i, part] / dim**0.5, project["key"][j, part], project["value"][j, part]
                logits.append(q @ k + q @ table["query"] + k @ table["key"])
                values.append(v + table["value"])
            weights = np.exp(np.array(logits) - max(logits))
            out[i, part] = weights @ np.array(values) / weights.sum()
    return (out @ params["out"]["kernel"] + params["out"]["bias"]) * mask[:, None]


def test_attention_equals_its_twin(rng):
    with jax.enable_x64(True):
        x, coordinates, signals, mask = (jnp.asarray(one[0]) for one in scenes(rng, 40, length=44))
        variables = random_variables(ATTENTION, x, coordinates, signals, mask, dtype=np.float64)
        found = jax.jit(ATTENTION.apply)(variables, x, coordinates, signals, mask)
        assert found.dtype == jnp.float64
    expected = twin_attention(
        jax.tree.map(np.asarray, variables["params"]), *(np.asarray(one) for one in (x, coordinates, signals, mask)),
        heads=2, window=3, shift=1, quant_sizes=(2, 4, 4),
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-11)


def test_one_window_around_the_scene_is_dense_attention(rng):
    inputs = to_jax(*scenes(rng, 20, 13))
    layer = ATTENTION.clone(window_size=16, shift_size=8)
    params = random_variables(layer, *inputs)["params"]
    params = {name: leaf * 0 if name.endswith("table") else leaf for name, leaf in params.items()}
    found = jax.jit(layer.apply)({"params": params}, *inputs)
    dense = {name: leaf for name, leaf in params.items() if not name.endswith("table")}
    x, _, _, mask = inputs
    expected = MultiHeadAttention(num_heads=2).apply({"params": dense}, x, mask=mask[:, None, None, :])
    np.testing.assert_allclose(found, np.where(mask[..., None], expected, 0), atol=1e-5)
    # Negative control: with windows of 3 voxels it is another thing.
    narrow = layer.clone(window_size=3)
    rows = {name: leaf[:, :12] if "xyz" in name else leaf for name, leaf in params.items()}
    local = jax.jit(narrow.apply)({"params": rows}, *inputs)
    assert np.abs(local - expected)[mask].max() > 1e-2


def test_chunks_change_neither_value_nor_gradient(rng):
    inputs = to_jax(*scenes(rng, 60, 0, 31, length=64))
    variables = random_variables(ATTENTION, *inputs)

    def both(layer):
        return jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(layer.apply(v, *inputs)))))(variables)

    # In one piece: every logit of the scene, masked.
    expected, found = both(ATTENTION.clone(chunk_size=64)), both(ATTENTION.clone(chunk_size=7))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


def test_windows_do_not_meet_and_every_voxel_of_a_window_is_reached(rng):
    x, coordinates, signals, mask = (one[0] for one in to_jax(*scenes(rng, 21)))
    block = Swin3DBlock(2, window_size=3, quant_sizes=(2, 4, 4), mlp_ratio=1.0, chunk_size=8)
    variables = random_variables(block, x, coordinates, signals, mask)
    jacobian = jax.jit(jax.jacobian(lambda x: block.apply(variables, x, coordinates, signals, mask)))(x)
    heard = np.any(np.asarray(jacobian) != 0, axis=(1, 3))
    window = np.asarray(coordinates // 3)
    mask = np.asarray(mask)
    together = (window[:, None] == window[None]).all(-1) & mask[:, None] & mask[None]
    assert together.sum() > mask.sum()
    np.testing.assert_array_equal(heard, together)


def test_repeated_voxels_beyond_a_full_window_are_not_left_out_in_silence(rng):
    x, _, signals, mask = to_jax(*scenes(rng, 20, 13))
    layer = ATTENTION.clone(window_size=2, shift_size=0)
    apply = jax.jit(
        functools.partial(layer.apply, random_variables(layer, x, np.zeros((2, 24, 3), int), signals, mask))
    )
    coordinates = np.stack([voxels(rng, count=20)[0], np.zeros((24, 3), np.int32)])
    # Thirteen voxels at one place, where a window has eight.
    found = apply(x, coordinates, signals, mask)
    assert np.all(np.isfinite(found[0]))
    assert np.all(np.isnan(found[1]))
    assert np.all(np.isfinite(apply(x, coordinates, signals, mask & (np.arange(24) < 8))))


def test_memory_of_attention_is_linear_in_the_voxels():
    layer = ATTENTION.clone(window_size=4, shift_size=2, chunk_size=32)

    def bytes_of(length, cell_attention):
        scene = tuple(
            jax.ShapeDtypeStruct((length, *last), dtype)
            for last, dtype in (((8,), jnp.float32), ((3,), jnp.int32), ((9,), jnp.float32), ((), jnp.bool_))
        )
        variables = jax.eval_shape(layer.init, jax.random.key(0), *scene)

        def loss(variables, *scene):
            return jnp.sum(jnp.sin(cell_attention.apply(variables, *scene)))

        program = jax.jit(jax.grad(loss)).lower(variables, *scene).compile()
        return program.memory_analysis().temp_size_in_bytes

    small, large = bytes_of(512, layer), bytes_of(1024, layer)
    assert 0 < large <= 2.1 * small
    # Negative control: in one piece all voxels meet all.
    assert bytes_of(1024, layer.clone(chunk_size=1024)) > 3 * large


# Model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """Variables, and the compiled model, for lists of 64."""
    inputs = to_jax(*scenes(np.random.default_rng(0), 60, 31, length=64, size=7))
    variables = random_variables(TINY, *inputs)
    return variables, jax.jit(functools.partial(TINY.apply, variables)), inputs


def test_order_of_the_list_does_not_matter(tiny, rng):
    _, apply, inputs = tiny
    order = rng.permutation(64)
    expected = apply(*inputs)[:, order]
    # Sorted, the lists are the same, so the results are equal to the bit.
    np.testing.assert_array_equal(apply(*(one[:, order] for one in inputs)), expected)
    # Negative control: features alone permuted.
    assert np.abs(apply(inputs[0][:, order], *inputs[1:]) - expected).max() > 1e-2


@pytest.fixture(scope="module")
def gradient(tiny):
    """The compiled gradient of a number made of all logits."""

    def loss(params, *scene):
        return jnp.sum(jnp.sin(TINY.apply({**tiny[0], "params": params}, *scene)))

    return functools.partial(jax.jit(jax.grad(loss)), tiny[0]["params"])


def garbage(rng, *shape):
    """Padding that would be seen."""
    return (
        np.full((*shape, 8), np.nan, np.float32),
        rng.integers(-3, 3, (*shape, 3)).astype(np.int32),
        np.full((*shape, 9), 77.0, np.float32),
        np.zeros(shape, bool),
    )


def test_padding_changes_nothing(tiny, rng):
    variables, apply, inputs = tiny
    expected = np.asarray(apply(*inputs))
    longer = [np.concatenate(pair, axis=1) for pair in zip(inputs, garbage(rng, 2, 13), strict=True)]
    found = np.asarray(jax.jit(TINY.apply)(variables, *longer))
    np.testing.assert_allclose(found[:, :64], expected, atol=1e-5)
    assert not np.any(found[:, 64:])
    assert not np.any(expected[~np.asarray(inputs[3])])


def test_gradients_do_not_see_padding_and_stay_finite_with_an_empty_scene(tiny, gradient, rng):
    _, _, inputs = tiny
    filled = [
        np.where(np.asarray(inputs[3]).reshape(2, 64, *(1,) * (one.ndim - 2)), one, other)
        for one, other in zip(inputs, garbage(rng, 2, 64), strict=True)
    ]
    expected = gradient(*inputs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient(*filled), expected)
    empty = np.asarray(inputs[3]) & np.array([[True], [False]])
    alone = gradient(*filled[:3], empty)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(alone))
    # The full scene gives what it gives twice, halved.
    twice = gradient(*(np.stack([one[0], one[0]]) for one in filled))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 2, rtol=1e-3, atol=1e-3), alone, twice)


def test_translations_by_the_period_change_nothing_and_others_do(tiny):
    _, apply, (x, coordinates, signals, mask) = tiny
    assert TINY.period == 12
    expected = apply(x, coordinates, signals, mask)
    for by in ([12, 0, 0], [-24, 12, 1200]):
        np.testing.assert_array_equal(apply(x, coordinates + np.array(by, np.int32), signals, mask), expected)
    # Negative controls: by one voxel, and by a whole window of one stage alone.
    for by in ([1, 0, 0], [0, 3, 0], [0, 0, 4]):
        assert np.abs(apply(x, coordinates + np.array(by, np.int32), signals, mask) - expected).max() > 1e-2


def test_one_program_serves_all_scenes_of_a_length(tiny, rng):
    _, apply, inputs = tiny
    apply(*inputs)
    programs = apply._cache_size()
    for counts in ((60, 3), (64, 64), (1, 0)):
        logits = apply(*to_jax(*scenes(rng, *counts, length=64, size=7)))
        assert np.all(np.isfinite(logits))
        assert np.any(logits[0, 0])
    assert apply._cache_size() == programs
    # An empty scene among others: zeros.
    assert not np.any(logits[1])


@pytest.mark.slow
def test_an_empty_scene_leaves_training_finite_and_out_of_the_statistics(tiny):
    variables, _, inputs = tiny
    model = TINY.clone(drop_path_rate=0.5)

    @jax.jit
    def train(mask):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params},
                *inputs[:3],
                mask,
                deterministic=False,
                rngs={"dropout": jax.random.key(1)},
                mutable=["batch_stats"],
            )
            return jnp.sum(jnp.square(logits)), updates

        return jax.grad(loss, has_aux=True)(variables["params"])

    gradient, updates = train(inputs[3] & np.array([[True], [False]]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((gradient, updates)))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    # Only true voxels count for the statistics.
    _, both = train(inputs[3])
    assert np.abs(both["batch_stats"]["head_norm"]["mean"] - updates["batch_stats"]["head_norm"]["mean"]).max() > 1e-3


@pytest.mark.slow
def test_levels_hold_the_occupied_cells(tiny):
    variables, _, inputs = tiny
    levels = jax.jit(nn.apply(Swin3D.features, TINY))(variables, *inputs)
    np.testing.assert_array_equal(levels[0].coordinates, inputs[1])
    for scene, mask in enumerate(inputs[3]):
        cells = np.unique(inputs[1][scene][mask] // 2, axis=0)
        np.testing.assert_array_equal(levels[1].coordinates[scene][np.asarray(levels[1].mask[scene])], cells)


def test_features_are_a_pyramid(tiny):
    variables, _, inputs = tiny
    levels = jax.eval_shape(nn.apply(Swin3D.features, TINY), variables, *inputs)
    assert [(level.stride, level.channels) for level in levels] == [((1,) * 3, 4), ((2,) * 3, 8)]
    # The encoder alone.
    shapes = jax.eval_shape(functools.partial(TINY.init, method=Swin3D.features), jax.random.key(0), *inputs)
    assert set(shapes["params"]) == {"patch_embed", "stages_0", "stages_1"}


@pytest.mark.slow
def test_too_few_places_for_merged_voxels_are_not_passed_over(tiny):
    variables, apply, inputs = tiny
    cells = [len(np.unique(one[mask] // 2, axis=0)) for one, mask in zip(inputs[1], inputs[3], strict=True)]
    assert cells[1] < cells[0]
    expected = apply(*inputs)
    found = jax.jit(TINY.clone(keep_ratio=cells[1] / 64).apply)(variables, *inputs)
    assert np.all(np.isnan(found[0][inputs[3][0]]))
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.slow
def test_pooling_by_cells_without_neighbours(tiny):
    variables, apply, inputs = tiny
    model = TINY.clone(down_neighbors=0, up_attention=False)
    params = {**variables["params"], "upsamples_0": dict(variables["params"]["upsamples_0"])}
    del params["upsamples_0"]["block"]
    found = jax.jit(model.apply)({**variables, "params": params}, *inputs)
    assert found.shape == (2, 64, 3)
    assert np.abs(found - apply(*inputs)).max() > 1e-2


def test_no_array_of_the_model_grows_faster_than_the_list():
    def largest(length):
        scene = tuple(
            jax.ShapeDtypeStruct((1, length, *last), dtype)
            for last, dtype in (((8,), jnp.float32), ((3,), jnp.int32), ((9,), jnp.float32), ((), jnp.bool_))
        )
        variables = jax.eval_shape(TINY.init, jax.random.key(0), *scene)
        program = jax.make_jaxpr(jax.grad(lambda v: jnp.sum(TINY.apply(v, *scene_of(v, scene)))))(variables)
        return max(sizes(program.jaxpr))

    def scene_of(variables, scene):
        # Shapes alone: zeros that depend on nothing.
        return tuple(jnp.zeros(one.shape, one.dtype) for one in scene)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

    assert largest(4096) == 2 * largest(2048)


def test_recomputation_is_in_the_program(tiny):
    variables, _, inputs = tiny

    def count(name):
        model = TINY.clone(remat=name)
        text = str(jax.make_jaxpr(jax.grad(lambda v: jnp.sum(model.apply(v, *inputs))))(variables))
        return text.count("remat") + text.count("checkpoint")

    # The attention's own recomputation is there in any case.
    assert 0 < count(False) < count(True)


@pytest.mark.slow
def test_recomputation_changes_no_gradient(tiny, gradient):
    variables, _, inputs = tiny
    model = TINY.clone(remat=True)

    def loss(params):
        return jnp.sum(jnp.sin(model.apply({**variables, "params": params}, *inputs)))

    found, expected = jax.jit(jax.grad(loss))(variables["params"]), gradient(*inputs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)


def test_drop_path_rates_grow_with_depth_and_drop_voxels(rng):
    model = TINY.clone(depths=(2, 3), drop_path_rate=0.8, up_drop_path_rate=0.3)
    bound = model.bind({})
    np.testing.assert_allclose(bound.stages[0].rates + bound.stages[1].rates, [0.0, 0.2, 0.4, 0.6, 0.8])
    assert bound.upsamples[0].block.keywords["drop_path_rate"] == 0.3
    x, coordinates, signals, mask = to_jax(*scenes(rng, 20, 13))
    block = Swin3DBlock(2, window_size=3, quant_sizes=(2, 4, 4), mlp_ratio=1.0, drop_path_rate=0.5)
    variables = random_variables(block, x, coordinates, signals, mask)
    keys = {"dropout": jax.random.key(0)}
    train = jax.jit(functools.partial(block.apply, deterministic=False))
    found = train(variables, x, coordinates, signals, mask, rngs=keys)
    kept = np.all(np.asarray(found) == np.asarray(x), axis=-1)[np.asarray(mask)]
    # Some voxels lose both branches, whatever their scene.
    assert 0 < kept.sum() < kept.size


# Parameters of the authors' `Swin3DUNet`, instantiated with stand-ins for MinkowskiEngine's convolution (27 x in x out)
# and batch norm (2 x out): all, and those of its encoder (stem and layers). The README's 23.57M and 60.75M are not the
# sizes of these.
PUBLISHED = {
    "swin3d_small": (28_228_004, 11_760 + 24_637_632),
    "swin3d_large": (71_126_020, 19_600 + 62_039_360),
    "swin3d_small_rgb": (26_495_773, 7_872 + 23_116_992),
    "swin3d_large_rgb": (68_238_973, 13_120 + 59_504_960),
}


@pytest.mark.parametrize("name", swin3d.VARIANTS)
def test_variants_have_the_parameters_of_the_authors_code(name):
    variant = swin3d.VARIANTS[name]
    model = variant["module"](**{key: value for key, value in variant.items() if key not in ("module", "inputs")})
    # All blocks of a stage are alike: count one and multiply.
    shapes = jax.eval_shape(model.clone(depths=(1,) * 5).init, jax.random.key(0), *variant["inputs"])["params"]

    def count(path, leaf):
        in_block = path[1].startswith("blocks_")
        return math.prod(leaf.shape) * (model.depths[int(path[0].removeprefix("stages_"))] if in_block else 1)

    counts = {path: count(path, leaf) for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
    encoder = sum(number for path, number in counts.items() if path[0].startswith(("patch_embed", "stages_")))
    assert (sum(counts.values()), encoder) == PUBLISHED[name]


# Parameter trees -------------------------------------------------------------------------------------------------


def test_no_decay_marks_all_but_the_kernels(tiny):
    flat = flax.traverse_util.flatten_dict(swin3d.no_decay(tiny[0]["params"]), sep="/")
    assert {path.split("/")[-1] for path, without in flat.items() if not without} == {"kernel"}
    assert "stages_0/blocks_0/attention/query_xyz_table" in flat


def test_layer_ids_count_blocks_from_the_voxels_to_the_head(tiny):
    ids = swin3d.layer_ids(tiny[0]["params"], TINY)

    def of(tree):
        return set(jax.tree.leaves(tree))

    assert of(ids["patch_embed"]) == {0}
    assert [of(ids["stages_0"][f"blocks_{index}"]) for index in range(2)] == [{1}, {2}]
    assert of(ids["stages_1"]["downsample"]) == {2}
    assert of(ids["stages_1"]["blocks_0"]) == {3}
    assert of([ids[name] for name in ("upsamples_0", "head_hidden", "head_norm", "head")]) == {4}


def to_reference(variables):
    """Write our variables the way the authors' code stores them."""
    tensors = {}
    for path, leaf in flax.traverse_util.flatten_dict(variables).items():
        leaf = np.asarray(leaf)
        name = swin3d.reference.reference_name("/".join(path[1:]), swin3d.REFERENCE_NAMES["official"])
        tensors[name] = leaf.T if path[-1] == "kernel" and leaf.ndim == 2 else leaf
    for name in [name for name in tensors if ".qkv.query." in name]:
        parts = [tensors.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        tensors[name.replace(".query", "")] = np.concatenate(parts)
    tensors["classifier.1.num_batches_tracked"] = np.zeros(())
    return tensors


def test_reference_names_cover_every_parameter(tiny):
    found = swin3d.from_reference(to_reference(tiny[0]), TINY)
    jax.tree.map(np.testing.assert_array_equal, found, tiny[0])


def test_reference_checkpoints_that_do_not_fit_are_refused(tiny):
    tensors = to_reference(tiny[0])
    with pytest.raises(ValueError, match="source='pointcept' must be one of"):
        swin3d.from_reference(tensors, TINY, source="pointcept")
    with pytest.raises(ValueError, match=r"must hold 'stem_layer.conv_layers.0.kernel'"):
        swin3d.from_reference({}, TINY)
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['classifier.3.bias'\]"):
        incomplete = {name: value for name, value in tensors.items() if name != "classifier.3.bias"}
        swin3d.from_reference({**incomplete, "extra": np.zeros(1)}, TINY)
    with pytest.raises(ValueError, match="to have|must give .* its shape"):
        swin3d.from_reference(tensors, TINY.clone(window_sizes=(2, 2)))


# Rooms -----------------------------------------------------------------------------------------------------------


def room(rng, points=900, length=320):
    """A floor, two walls and a box, coloured with noise; the label is the surface: floor, wall, box."""
    width, depth = rng.uniform(6, 8, 2)
    label = rng.integers(0, 3, points)
    u, v = rng.uniform(0, 1, (2, points))
    floor = np.stack([u * width, v * depth, 0 * u], axis=-1)
    sides = rng.uniform(size=points) < 0.5
    wall = np.where(
        sides[:, None],
        np.stack([0 * u, u * depth, v * 4], axis=-1),
        np.stack([u * width, 0 * u, v * 4], axis=-1),
    )
    corner, edges = rng.uniform(2, 3, 3) * [1, 1, 0], rng.uniform(1.5, 2.5, 3)
    box = rng.uniform(0, 1, (points, 3))
    axis = rng.integers(0, 3, points)
    box[np.arange(points), axis] = np.round(box[np.arange(points), axis])
    xyz = np.select([label[:, None] == 0, label[:, None] == 1], [floor, wall], corner + box * edges)
    # All surfaces share their colours: shape alone tells them apart.
    colours = rng.uniform(-0.5, 0.5, (points, 3))
    found, index, count = voxelize(
        jnp.asarray(xyz, jnp.float32), jnp.asarray(colours, jnp.float32), size=0.7, capacity=length
    )
    assert count <= length
    votes = np.zeros((length, 3))
    np.add.at(votes, (np.asarray(index), label), 1)
    return found, votes.argmax(-1)


@pytest.mark.slow
def test_a_tiny_model_learns_the_surfaces_of_rooms():
    rng = np.random.default_rng(0)
    rooms = [room(rng) for _ in range(6)]
    scene = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one for one, _ in rooms))
    assert isinstance(scene, Voxels)
    labels = np.stack([label for _, label in rooms])
    model = Swin3D(
        num_classes=3, embed_dim=(8, 16), depths=(1, 1), num_heads=(1, 2), window_sizes=(4, 4), strides=(2,),
        quant_sizes=(2, 2), down_neighbors=8, mlp_ratio=2.0, drop_path_rate=0.0, up_drop_path_rate=0.0,
    )  # fmt: skip
    inputs = (scene.signals, scene.coordinates, scene.signals, scene.mask)
    train, test = (jax.tree.map(lambda leaf, part=part: leaf[part], inputs) for part in (np.s_[:4], np.s_[4:]))
    variables = jax.jit(model.init)(jax.random.key(0), *train)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, *train, deterministic=False, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[:4])
            return jnp.mean(losses, where=train[3]), updates

        (value, updates), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, state = optimizer.update(gradient, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], change), **updates}, state, value

    state = optimizer.init(variables["params"])
    values = []
    for _ in range(40):
        variables, state, value = step(variables, state)
        values.append(float(value))
    assert values[-1] < 0.4 * values[0]
    # On rooms it has not seen.
    right = np.argmax(model.apply(variables, *test), axis=-1) == labels[4:]
    assert right[np.asarray(test[3])].mean() > 0.75


def test_shifted_windows_are_windows_of_shifted_voxels(rng):
    coordinates, _, mask = voxels(rng)
    shifted = window_cells(jnp.asarray(coordinates), jnp.asarray(mask), 3, 1)
    moved = window_cells(jnp.asarray(coordinates) + 1, jnp.asarray(mask), 3)
    np.testing.assert_array_equal(shifted.index, moved.index)
