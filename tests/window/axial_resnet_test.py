import functools
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.core import remat
from jaxlayers.core.reference import read_reference
from jaxlayers.summary import count_macs, summarize
from jaxlayers.testing import BadInput, Case
from jaxlayers.window import axial_resnet
from jaxlayers.window.axial_resnet import AxialBottleneck, AxialResNet, PositionSensitiveAttention

GOLDEN = Path(__file__).parents[1] / "golden" / "axial_resnet_parity.npz"
SHIFT = {r"similarity_norm/bias$": "it adds one number to all logits of a query, which the softmax takes out"}
TINY = AxialResNet(num_classes=3, image_size=32, embed_dim=4, depths=(1, 1), num_heads=2)

CASES = (
    Case(
        name="position_sensitive_attention",
        within="axial_resnet",
        module=PositionSensitiveAttention(num_heads=2, max_length=5, axis="width"),
        inputs=lambda rng: (rng.normal(size=(2, 3, 4, 8)),),
        leading_axes=True,
        zero_gradients=SHIFT,
        bad_inputs=(
            BadInput(
                match=r"length 4 along width must not exceed max_length=3 .*; resize the parameters",
                module=PositionSensitiveAttention(2, 3, "width"),
            ),
            BadInput(match="axis='depth' must be one of", module=PositionSensitiveAttention(2, 3, "depth")),
            BadInput(
                match="features=8 must be divisible by twice num_heads=8", module=PositionSensitiveAttention(8, 5)
            ),
            BadInput(match="divisible by twice num_heads=0", module=PositionSensitiveAttention(0, 5)),
            BadInput(match="2 spatial axes needs at least 3 axes", inputs=lambda rng: (np.ones((4, 8)),)),
        ),
    ),
    Case(
        name="axial_bottleneck",
        within="axial_resnet",
        module=AxialBottleneck(features=8, num_heads=2, map_size=(5, 4), stride=2),
        inputs=lambda rng: (rng.normal(size=(2, 5, 4, 6)),),
        leading_axes=True,
        zero_gradients=SHIFT,
        bad_inputs=(
            BadInput(match="features=0, expansion=2 and stride=1 must be", module=AxialBottleneck(0, 2, (5, 4))),
            BadInput(match="stride=0 must be positive", module=AxialBottleneck(8, 2, (5, 4), stride=0)),
            BadInput(match="length 5 along height must not exceed", module=AxialBottleneck(8, 2, (4, 4))),
        ),
    ),
    Case(
        name="axial_resnet",
        module=TINY.clone(depths=(1,)),
        inputs=lambda rng: (rng.normal(size=(2, 18, 15, 3)),),
        leading_axes=True,
        zero_gradients=SHIFT,
        bad_inputs=(
            BadInput(match=r"depths=\(1, 0\) must have one positive entry", module=TINY.clone(depths=(1, 0))),
            BadInput(match="num_classes=-1 must not be negative", module=TINY.clone(num_classes=-1)),
            BadInput(match="embed_dim=0 must be positive", module=TINY.clone(embed_dim=0)),
            BadInput(match="image_size=0 must be positive", module=TINY.clone(image_size=0)),
            BadInput(match="length 9 along height must not exceed", inputs=lambda rng: (np.ones((1, 33, 32, 3)),)),
            BadInput(match="dtype int32 must be of floating", inputs=lambda rng: (np.ones((1, 8, 8, 3), int),)),
            BadInput(match=r"spatial size \(0, 8\) must not be empty", inputs=lambda rng: (np.ones((1, 0, 8, 3)),)),
        ),
    ),
)


def random_variables(module, *inputs, seed=0, dtype=np.float32):
    """Random parameters and running statistics in the shape of `module`'s, so that everything shows."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def make(path, leaf):
        name = path[-1].key
        value = 0.4 * rng.normal(size=leaf.shape) + (name == "scale")
        return jnp.asarray(np.exp(value) if name == "var" else value, dtype)

    return jax.tree_util.tree_map_with_path(make, shapes)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def tiny():
    return random_variables(TINY, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))


# Beside the authors' code ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        assert "csrhddlam/axial-deeplab" in str(stored["provenance"])
        return dict(stored)


def drawn(names, seed=1):
    """The tensors that the reference was run with: a frozen stream, in the order of the stored names."""
    stream = np.random.RandomState(seed)
    tensors = {}
    for line in names:
        name, _, size = str(line).partition(" ")
        shape = tuple(int(length) for length in size.split("x"))
        noise = stream.uniform(-1.0, 1.0, shape)
        end = name.rpartition(".")[2]
        if end == "running_var":
            value = 1.0 + 0.5 * noise
        elif len(shape) == 1:
            value = 0.3 * noise + (end == "weight")
        elif end == "relative":
            value = noise
        else:
            value = 1.5 * noise / np.sqrt(np.prod(shape[1:]))
        tensors[name] = value.astype(np.float32)
    return tensors


def stimulus(*shape):
    x = np.random.RandomState(2).uniform(-1.5, 1.5, shape).astype(np.float32)
    return jnp.asarray(np.moveaxis(x, 1, -1))


def read(module, x, tensors, where, prefix, num_heads):
    """Return variables of one part of the model from the reference's tensors of that part."""
    flat = flax.traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), x))
    joined = flax.traverse_util.unflatten_dict({(*where, *path[1:]): leaf for path, leaf in flat.items()})
    split = axial_resnet.split_reference({prefix + name: value for name, value in tensors.items()}, num_heads=num_heads)
    found = flax.traverse_util.flatten_dict(read_reference(split, joined, axial_resnet.REFERENCE_NAMES["official"]))
    return flax.traverse_util.unflatten_dict({path: found[(*where, *path[1:])] for path in flat})


PARTS = {
    "height": (PositionSensitiveAttention(3, 5, "height"), (2, 12, 5, 4), "hight_block."),
    "width": (PositionSensitiveAttention(2, 6, "width"), (2, 16, 4, 6), "width_block."),
    "block": (AxialBottleneck(8, 2, (6, 6), stride=2), (2, 16, 6, 6), ""),
    "plain_block": (AxialBottleneck(8, 2, (6, 6)), (2, 16, 6, 6), ""),
}


def part_of(golden, name):
    module, shape, prefix = PARTS[name]
    x = stimulus(*shape)
    where = ("stages_0", "blocks_0", *([f"{module.axis}_attention"] if prefix else []))
    tensors = drawn(golden[f"{name}/names"])
    return module, read(module, x, tensors, where, f"layer1.0.{prefix}", module.num_heads), x


def assert_close(found, expected, what):
    print(f"{what}: max |error| {np.abs(found - expected).max():.1e}, max |value| {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.std(expected) > 0.1, "the comparison would be empty"


@pytest.mark.parametrize("name", PARTS)
def test_modules_equal_the_authors_code(golden, name):
    module, variables, x = part_of(golden, name)
    found = jax.jit(module.apply)(variables, x)
    if name == "width":
        # The authors' layer also pools.
        found = nn.avg_pool(found, (2, 2), (2, 2))
    assert_close(found, np.moveaxis(golden[f"{name}/output"], 1, -1), name)


def test_training_norms_and_moves_the_statistics_as_the_authors_code(golden):
    module, variables, x = part_of(golden, "width")
    found, state = jax.jit(functools.partial(module.apply, deterministic=False, mutable=["batch_stats"]))(variables, x)
    assert_close(nn.avg_pool(found, (2, 2), (2, 2)), np.moveaxis(golden["width/trained_output"], 1, -1), "training")
    stored = {name.partition(":")[2]: value for name, value in golden.items() if name.startswith("width/trained:")}
    expected = axial_resnet.split_reference(stored, num_heads=2)
    for name, statistics in state["batch_stats"].items():
        before = variables["batch_stats"][name]
        theirs = "bn_similarity" if name == "similarity_norm" else name
        np.testing.assert_allclose(statistics["mean"], expected[f"{theirs}.running_mean"], atol=1e-5)
        # Theirs is the variance of the population: 2 x 4 lines of 6 entries, or 36 pairs.
        samples = 8 * (36 if name == "similarity_norm" else 6)
        batch = (statistics["var"] - 0.9 * before["var"]) * samples / (samples - 1)
        np.testing.assert_allclose(0.9 * before["var"] + batch, expected[f"{theirs}.running_var"], atol=1e-5)


def test_network_equals_the_authors_code(golden):
    model = AxialResNet(num_classes=7, embed_dim=8, depths=(1, 2, 1, 1), num_heads=4)
    tensors = {f"module.{name}": value for name, value in drawn(golden["net/names"]).items()}
    variables = axial_resnet.from_reference(tensors, model)

    @jax.jit
    def run(variables, x):
        levels = nn.apply(AxialResNet.features, model)(variables, x)
        # The logits are the head's on the mean of the last map.
        head = variables["params"]["head"]
        return levels, jnp.mean(levels[-1].array, axis=(1, 2)) @ head["kernel"] + head["bias"]

    levels, logits = run(variables, stimulus(1, 3, 224, 224))
    for index, (level, step) in enumerate(zip(levels, (8, 4, 2, 1), strict=True)):
        expected = np.moveaxis(golden[f"net/map_{index}"], 1, -1)
        assert_close(level.array[:, ::step, ::step], expected, f"map {index}")
    assert_close(logits, golden["net/logits"], "logits")


def test_reference_checkpoints_that_do_not_fit_are_refused(golden):
    model = AxialResNet(num_classes=7, embed_dim=8, depths=(1, 2, 1, 1), num_heads=4)
    tensors = drawn(golden["net/names"])
    with pytest.raises(ValueError, match="source='timm' must be one of"):
        axial_resnet.from_reference(tensors, model, source="timm")
    with pytest.raises(ValueError, match="must hold 'conv1.weight'"):
        axial_resnet.from_reference({}, model)
    extra = {**{name: value for name, value in tensors.items() if name != "fc.bias"}, "extra": np.zeros(1)}
    with pytest.raises(ValueError, match=r"unknown \['extra'\], missing \['fc.bias'\]"):
        axial_resnet.from_reference(extra, model)
    with pytest.raises(ValueError, match=r"_position its shape \(55, 2\), not \(111, 2\)"):
        axial_resnet.from_reference(tensors, model.clone(image_size=112))


# Attention -------------------------------------------------------------------------------------------------------


def twin_norm(variables, name, x):
    part, running = variables["params"][name], variables["batch_stats"][name]
    return (x - running["mean"]) / np.sqrt(running["var"] + 1e-5) * part["scale"] + part["bias"]


def twin_attention(variables, x, num_heads, max_length, axis):
    """Attention on a map [height, width, features], one query at a time."""
    params, features = variables["params"], x.shape[-1]
    dim = features // num_heads
    query, key, value = (
        twin_norm(variables, f"{name}_norm", x @ params[name]["kernel"]) for name in ("query", "key", "value")
    )
    content, position = np.zeros_like(x), np.zeros_like(x)
    for place in np.ndindex(*x.shape[:2]):
        line = [(j, place[1]) if axis == 0 else (place[0], j) for j in range(x.shape[axis])]
        for head in range(num_heads):
            half, whole = slice(head * dim // 2, (head + 1) * dim // 2), slice(head * dim, (head + 1) * dim)
            scores = np.zeros((len(line), 3 * num_heads))
            for j, other in enumerate(line):
                offset = place[axis] - j
                scores[j, head] = query[place][half] @ key[other][half]
                scores[j, num_heads + head] = query[place][half] @ params["query_position"][max_length - 1 + offset]
                scores[j, 2 * num_heads + head] = key[other][half] @ params["key_position"][max_length - 1 - offset]
            logits = twin_norm(variables, "similarity_norm", scores)[:, head::num_heads].sum(-1)
            weights = np.exp(logits) / np.exp(logits).sum()
            for j, other in enumerate(line):
                content[place][whole] += weights[j] * value[other][whole]
                position[place][whole] += weights[j] * params["value_position"][max_length - 1 + place[axis] - j]
    return twin_norm(variables, "content_norm", content) + twin_norm(variables, "position_norm", position)


@pytest.mark.parametrize(("axis", "max_length"), [("height", 4), ("width", 6)])
def test_attention_equals_a_loop_over_queries(axis, max_length):
    # The width is shorter than its tables, so the middle of them counts.
    layer = PositionSensitiveAttention(num_heads=2, max_length=max_length, axis=axis)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 3, 8)))
        variables = random_variables(layer, x, dtype=np.float64)
        found = jax.jit(layer.apply)(variables, x)
        assert found.dtype == jnp.float64
    expected = twin_attention(
        jax.tree.map(np.asarray, variables), np.asarray(x)[0], 2, max_length, int(axis == "width")
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-10)


def test_without_positions_and_norms_it_is_plain_attention_along_the_axis():
    layer = PositionSensitiveAttention(num_heads=2, max_length=5, axis="height")
    x = normal(2, 5, 3, 8)
    variables = random_variables(layer, x)
    # Norms that do nothing, but for dividing the logits by the root of the width of a query.
    neutral = {"mean": 0.0, "var": 1.0 - 1e-5, "scale": 1.0, "bias": 0.0}

    def plain(path, leaf):
        name = path[-1].key
        if name.endswith("_position"):
            return jnp.zeros_like(leaf)
        if name == "kernel":
            return leaf
        root = 2**-0.5 if name == "scale" and path[-2].key == "similarity_norm" else 1.0
        return jnp.full_like(leaf, neutral[name] * root)

    silent = jax.tree_util.tree_map_with_path(plain, variables)
    apply = jax.jit(layer.apply)

    def heads(name):
        return (x @ variables["params"][name]["kernel"]).swapaxes(1, 2).reshape(2, 3, 5, 2, -1)

    expected = nn.dot_product_attention(heads("query"), heads("key"), heads("value")).reshape(2, 3, 5, 8)
    np.testing.assert_allclose(apply(silent, x), expected.swapaxes(1, 2), atol=1e-5)
    # It then knows no order; with the tables it does.
    order = jnp.asarray([3, 0, 4, 1, 2])
    np.testing.assert_allclose(apply(silent, x[:, order]), apply(silent, x)[:, order], atol=1e-5)
    assert np.abs(apply(variables, x[:, order]) - apply(variables, x)[:, order]).max() > 0.1


@pytest.mark.parametrize("axis", ["height", "width"])
def test_an_entry_hears_its_own_line_and_all_of_it(axis):
    layer = PositionSensitiveAttention(num_heads=2, max_length=7, axis=axis)
    x = normal(1, 5, 6, 4)
    apply = jax.jit(functools.partial(layer.apply, random_variables(layer, x)))
    heard = np.any(np.asarray(apply(x.at[0, 1, 2].add(1.0)) != apply(x))[0], axis=-1)
    expected = np.zeros((5, 6), bool)
    expected[(slice(None), 2) if axis == "height" else (1, slice(None))] = True
    np.testing.assert_array_equal(heard, expected)


def test_lines_may_be_permuted():
    layer = PositionSensitiveAttention(num_heads=2, max_length=6, axis="width")
    x = normal(1, 5, 6, 4)
    apply = jax.jit(functools.partial(layer.apply, random_variables(layer, x)))
    order = jnp.asarray([3, 0, 4, 1, 2])
    np.testing.assert_allclose(apply(x[:, order]), apply(x)[:, order], atol=1e-5)
    # Negative control: entries of a line may not, nor be moved cyclically.
    assert np.abs(apply(jnp.roll(x, 1, 2)) - jnp.roll(apply(x), 1, 2)).max() > 0.1


def test_cost_grows_with_the_length_of_a_line():
    for height, width in ((4, 8), (8, 8), (8, 16)):
        x = jax.ShapeDtypeStruct((1, height, width, 8), jnp.float32)
        layer = PositionSensitiveAttention(num_heads=2, max_length=16, axis="width")
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
        entries = height * width
        assert count_macs(layer.apply, variables, x) == 2 * entries * 8**2 + entries * width * 8 * 7 // 2


# Blocks and the model --------------------------------------------------------------------------------------------


def test_a_block_reaches_the_whole_map_and_pools_what_is_there():
    block = AxialBottleneck(features=8, num_heads=2, map_size=(7, 6), stride=2)
    x = normal(1, 5, 3, 6)
    variables = random_variables(block, x)

    @jax.jit
    def run(x):
        kept = ("width_attention", "skip_norm", "norm2")
        out, state = block.apply(
            variables, x, capture_intermediates=lambda module, _: module.name in kept, mutable=["intermediates"]
        )
        return out, {name: state["intermediates"][name]["__call__"][0] for name in kept}

    out, parts = run(x)
    assert out.shape == (1, 3, 2, 16)
    np.testing.assert_allclose(out, np.maximum(parts["norm2"] + parts["skip_norm"], 0), atol=1e-6)
    _, changed = run(x.at[0, 1, 2, 3].add(1.0))
    assert np.all(np.any(changed["width_attention"] != parts["width_attention"], axis=-1))
    # The last row of an odd map is averaged by itself.
    pooled = [[parts["width_attention"][0, i : i + 2, j : j + 2].mean((0, 1)) for j in (0, 2)] for i in (0, 2, 4)]
    params = variables["params"]
    expected = np.maximum(np.asarray(pooled), 0) @ params["expand"]["kernel"]
    part, running = params["norm2"], variables["batch_stats"]["norm2"]
    expected = (expected - running["mean"]) / np.sqrt(running["var"] + 1e-5) * part["scale"] + part["bias"]
    np.testing.assert_allclose(parts["norm2"][0], expected, atol=1e-4)


def test_a_new_block_is_its_skip_connection():
    block = AxialBottleneck(features=4, num_heads=2, map_size=(4, 4))
    x = normal(1, 4, 4, 8)
    variables = jax.jit(block.init)(jax.random.key(0), x)
    np.testing.assert_array_equal(jax.jit(block.apply)(variables, x), np.maximum(x, 0))


# Counted in the authors' code; the paper's repository says 5.9 M for 26-S.
PUBLISHED = {
    "axial_resnet26_small": (5_944_936, 1811.876),
    "axial_resnet50_small": (11_586_216, 2842.942),
    "axial_resnet50_medium": (25_179_400, 5955.144),
    "axial_resnet50_large": (43_973_480, 10194.500),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", axial_resnet.VARIANTS)
def test_variants_have_the_published_parameters_and_multiply_accumulates(name):
    variant = axial_resnet.VARIANTS[name]
    model = variant["module"](**{key: value for key, value in variant.items() if key not in ("module", "inputs")})
    # From the second on all blocks of a stage are alike: count one and multiply.
    short = model.clone(depths=tuple(min(depth, 2) for depth in model.depths))
    summary = summarize(short, *variant["inputs"])
    repeated = {(f"stages_{stage}", "blocks_1"): depth - 2 for stage, depth in enumerate(model.depths) if depth > 2}
    rows = [(repeated[row.path], row) for row in summary.rows if row.path in repeated]
    assert len(rows) == len(repeated)
    parameters = summary.parameters + sum(times * row.parameters for times, row in rows)
    macs = summary.macs + sum(times * row.macs for times, row in rows)
    assert parameters == PUBLISHED[name][0]
    np.testing.assert_allclose(macs / 1e6, PUBLISHED[name][1], rtol=2e-2)


def test_features_are_a_pyramid_of_every_stage(tiny):
    x = jax.ShapeDtypeStruct((2, 27, 18, 3), jnp.float32)
    levels = jax.eval_shape(nn.apply(AxialResNet.features, TINY), tiny, x)
    assert [level.array.shape for level in levels] == [(2, 7, 5, 16), (2, 4, 3, 32)]
    assert [level.stride for level in levels] == [(4, 4), (8, 8)]


@pytest.mark.slow
def test_one_tree_serves_every_size_up_to_its_own(tiny, untyped):
    shapes = jax.tree.map(jnp.shape, tiny)
    for size in [(32, 32), (1, 30), (31, 17)]:
        x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        assert jax.tree.map(jnp.shape, jax.eval_shape(TINY.init, jax.random.key(0), x)) == shapes
        assert jax.eval_shape(TINY.apply, tiny, x).shape == (1, 3)
    with pytest.raises(ValueError, match="length 9 along width must not exceed max_length=8 of the position tables"):
        TINY.apply(tiny, jnp.ones((1, 32, 33, 3)))


def test_a_smaller_image_reads_the_middle_of_the_tables(tiny):
    # Tables cut to their middle for the smaller size give the same logits.
    small = TINY.clone(image_size=(20, 12))
    maps = [axial_resnet.block_maps(model) for model in (TINY, small)]
    assert maps == [[[(8, 8)], [(8, 8)]], [[(5, 3)], [(5, 3)]]]

    def cut(path, leaf):
        names = [key.key for key in path]
        if not names[-1].endswith("_position"):
            return leaf
        length = 5 if names[-2] == "height_attention" else 3
        return leaf[8 - length : 8 + length - 1]

    params = jax.tree_util.tree_map_with_path(cut, tiny["params"])
    x = normal(1, 20, 12, 3)
    expected = jax.jit(TINY.apply)(tiny, x)
    np.testing.assert_allclose(jax.jit(small.apply)({**tiny, "params": params}, x), expected, atol=1e-5)
    assert np.std(expected) > 0.01


def test_resized_tables_serve_larger_images_and_keep_their_course(tiny):
    wide = TINY.clone(image_size=(64, 32))
    offsets = {length: np.arange(1 - length, length) / length for length in (8, 16)}
    # A slow wave along the offsets must come out as the same wave.
    params = flax.traverse_util.flatten_dict(tiny["params"])
    wave = {
        path: jnp.asarray(np.broadcast_to(np.sin(2 * offsets[8])[:, None], leaf.shape), jnp.float32)
        if path[-1].endswith("_position")
        else leaf
        for path, leaf in params.items()
    }
    found = axial_resnet.resize(flax.traverse_util.unflatten_dict(wave), TINY, wide)
    shapes = jax.eval_shape(wide.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, shapes["params"])
    for path, leaf in flax.traverse_util.flatten_dict(found).items():
        if path[-1].endswith("_position") and path[2] == "height_attention":
            inner = np.abs(offsets[16]) < 0.8
            np.testing.assert_allclose(leaf[inner, 0], np.sin(2 * offsets[16])[inner], atol=0.05)
        else:
            assert leaf is wave[path]
    with pytest.raises(ValueError, match="num_heads=4 must equal the num_heads=2 of the parameters"):
        axial_resnet.resize(tiny["params"], TINY, wide.clone(num_heads=4))


def test_training_updates_every_statistic():
    x = normal(3, 16, 12, 3)
    model = TINY.clone(image_size=16, embed_dim=2, depths=(1,), num_heads=1)
    variables = random_variables(model, x)
    train = jax.jit(functools.partial(model.apply, deterministic=False, mutable=["batch_stats"]))
    _, state = train(variables, x)
    moved = jax.tree.map(lambda old, new: bool(np.all(old != new)), variables["batch_stats"], state["batch_stats"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_recomputation_changes_neither_gradients_nor_statistics():
    layer = PositionSensitiveAttention(num_heads=1, max_length=3)
    x = normal(2, 3, 2, 4)
    variables = random_variables(layer, x)

    def run(policy):
        def forward(params, x):
            return layer.apply({**variables, "params": params}, x, deterministic=False, mutable=["batch_stats"])

        def loss(params):
            out, state = remat.remat(forward, policy)(params, x)
            return jnp.sum(jnp.sin(out)), state

        return jax.value_and_grad(loss, has_aux=True)

    plain, found = (jax.jit(run(policy))(variables["params"]) for policy in ("none", "attention"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max())), found, plain)
    assert "remat" in str(jax.make_jaxpr(run("attention"))(variables["params"]))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "attention"])
def test_models_recompute_what_their_field_says(tiny, policy):
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

    def gradient(policy):
        def loss(params, x):
            model = TINY.clone(remat=policy, depths=(1,))
            return model.apply({**tiny, "params": params}, x, deterministic=False, mutable=["batch_stats"])[0].sum()

        params = {name: value for name, value in tiny["params"].items() if name != "stages_1"}
        head = {"kernel": params["head"]["kernel"][:16], "bias": params["head"]["bias"]}
        return str(jax.make_jaxpr(jax.grad(loss))({**params, "head": head}, x))

    assert "remat" in gradient(policy)
    assert "remat" not in gradient("none")


def test_without_a_head_the_output_is_the_mean_of_the_last_map(tiny):
    x = normal(1, 16, 16, 3)
    params = {name: value for name, value in tiny["params"].items() if name != "head"}

    @jax.jit
    def run(params):
        model, variables = TINY.clone(num_classes=0), {**tiny, "params": params}
        return model.apply(variables, x), nn.apply(AxialResNet.features, model)(variables, x)[-1].array

    pooled, level = run(params)
    np.testing.assert_allclose(pooled, level.mean((1, 2)), atol=1e-6)


# Parameter trees -------------------------------------------------------------------------------------------------


def test_no_decay_marks_all_but_the_kernels(tiny):
    flat = flax.traverse_util.flatten_dict(axial_resnet.no_decay(tiny["params"]))
    tables = {"query_position", "key_position", "value_position"}
    assert {path[-1] for path, without in flat.items() if without} == {"bias", "scale"} | tables
    assert {path[-1] for path, without in flat.items() if not without} == {"kernel"}


def test_layer_ids_count_blocks_from_the_stem_to_the_head(tiny):
    ids = axial_resnet.layer_ids(tiny["params"], TINY)

    def of(tree):
        return set(jax.tree.leaves(tree))

    assert of(ids["patch_embed"]) == {0}
    assert [of(ids[f"stages_{index}"]["blocks_0"]) for index in range(2)] == [{1}, {2}]
    assert of(ids["head"]) == {3}
