"""Group convolutions: exact on legal grids, equal to turned filters, and better with resolution at other angles."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.field_layers import (
    FieldNorm,
    NormNonlinearity,
)
from jaxlayers.equivariant.group_conv import (
    VARIANTS,
    GroupCNN,
    GroupCNNBlock,
    SteerableConv,
)
from jaxlayers.geometry.groups import Cyclic, Dihedral, Group, Turn
from jaxlayers.geometry.planar_fields import (
    FieldType,
    exact_sizes,
    expand_filters,
    filter_factors,
    group_size,
    irrep_names,
)
from jaxlayers.testing import BadInput, Case, Symmetry, assert_equivariant, assert_invariant

C4, C8, D4 = Cyclic(4), Cyclic(8), Dihedral(4)
IMAGE = FieldType.trivial(C4, 2)
REGULAR = FieldType.regular(C4, 2)
MIXED = FieldType(D4, (("trivial", 1), ("regular", 1), ("irrep_1_1", 1)))
TURNING = FieldType(C4, (("trivial", 1), ("irrep_1", 2)))


class Fields(Group):
    """A planar group that also mixes the channels of an image, by the first field type with as many."""

    def __init__(self, *types):
        self.types, self.group = types, types[0].group
        self.has_improper = self.group.has_improper

    @property
    def name(self):
        return f"{self.group.name} on fields"

    def act(self, g, x, representation):
        if representation != "image":
            return self.group.act(g, x, representation)
        return next(fields for fields in self.types if fields.channels == x.shape[-1]).act(g, x)

    def sample(self, rng, *, scale=1.0):
        return self.group.sample(rng, scale=scale)

    def identity(self):
        return self.group.identity()

    def compose(self, g, h):
        return self.group.compose(g, h)

    def inverse(self, g):
        return self.group.inverse(g)

    def magnitude(self, g):
        return self.group.magnitude(g)

    def is_proper(self, g):
        return self.group.is_proper(g)


def plain(module, *inputs):
    """A control: some plain layer with parameters of its own, of another size for each channel."""
    variables = module.init(jax.random.key(0), *map(jnp.asarray, inputs))
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * np.random.default_rng(0).normal(size=leaf.shape), variables)
    return module.apply(variables, *map(jnp.asarray, inputs))


def maps(channels, size=5):
    return lambda rng: (rng.normal(size=(2, size, size, channels)),)


def claim(fields, output, control, **options):
    return Symmetry(Fields(fields, output), ("image",), "image", control=control, **options)


def conv(channels, **options):
    return functools.partial(plain, nn.Conv(channels, (3, 3), **options))


WRONG_CHANNELS = BadInput(
    match=r"a map of shape \(2, 5, 5, 7\) must be \[\*batch, height, width, \d+\] for fields=.* set the field type",
    inputs=maps(7),
)

CASES = (
    Case(
        name="steerable_conv",
        within="group_cnn",
        module=SteerableConv(MIXED, MIXED),
        inputs=maps(MIXED.channels),
        symmetries=(claim(MIXED, MIXED, conv(MIXED.channels)),),
        leading_axes=True,
        bad_inputs=(
            WRONG_CHANNELS,
            BadInput(match=r"inputs of D4 and outputs of C4 must have one group", module=SteerableConv(MIXED, REGULAR)),
            BadInput(match=r"a map of shape \(5, 11\) must be", inputs=lambda rng: (rng.normal(size=(5, 11)),)),
            BadInput(match=r"must be of floating point; got int", inputs=lambda rng: (np.ones((5, 5, 11), np.int32),)),
            BadInput(match=r"kernel_size=0 must be positive", module=SteerableConv(MIXED, MIXED, kernel_size=0)),
            BadInput(match=r"stride=0 must be positive", module=SteerableConv(MIXED, MIXED, stride=0)),
            BadInput(match=r"padding='same' must be one of", module=SteerableConv(MIXED, MIXED, padding="same")),
            BadInput(
                match=r"a map of length 5 must hold kernel_size=7",
                module=SteerableConv(MIXED, MIXED, kernel_size=7, padding="VALID"),
            ),
            BadInput(
                match=r"kernel_size=1 .* leave no filter from \(\('trivial', 3\),\) to 'irrep_1'",
                module=SteerableConv(FieldType.trivial(C4, 3), FieldType(C4, (("irrep_1", 1),)), kernel_size=1),
                inputs=maps(3),
            ),
        ),
    ),
    Case(
        name="steerable_conv_lifting",
        within="group_cnn",
        module=SteerableConv(IMAGE, REGULAR, kernel_size=4, stride=2),
        inputs=maps(2, 6),
        symmetries=(claim(IMAGE, REGULAR, conv(8, strides=2, padding=1)),),
        leading_axes=True,
        bad_inputs=(WRONG_CHANNELS,),
    ),
    Case(
        name="group_cnn_block",
        within="group_cnn",
        module=GroupCNNBlock(REGULAR, TURNING),
        inputs=maps(8),
        symmetries=(claim(REGULAR, TURNING, conv(5)),),
        leading_axes=True,
        bad_inputs=(
            WRONG_CHANNELS,
            BadInput(match=r"kernel_size=4 must be odd", module=GroupCNNBlock(REGULAR, TURNING, kernel_size=4)),
        ),
    ),
    Case(
        name="group_cnn",
        module=GroupCNN(num_classes=3, group=D4, widths=(1, 3), depths=(1, 1)),
        inputs=maps(1, 6),
        symmetries=(
            Symmetry(D4, ("image",), control=lambda x: jnp.mean(conv(3)(x), axis=(1, 2)) ** 2),
            Symmetry(D4, ("image",), control=lambda x: jnp.max(nn.relu(conv(3)(x)), axis=(1, 2))),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"images of shape \(6, 1\) must be", inputs=lambda rng: (rng.normal(size=(6, 1)),)),
            BadInput(match=r"images of shape \(0, 6, 1\) must be", inputs=lambda rng: (np.ones((0, 6, 1)),)),
            BadInput(match=r"widths=\(1, 2\) and depths=\(1,\) must have one", module=GroupCNN(3, D4, (1, 2), (1,))),
            BadInput(match=r"num_classes=-1 must not be negative", module=GroupCNN(-1)),
            BadInput(match=r"kernel_size=4 must be odd", module=GroupCNN(kernel_size=4)),
            BadInput(match=r"representation='quotient' must be", module=GroupCNN(representation="quotient")),
            BadInput(match=r"downsample='max' must be 'pool' or 'stride'", module=GroupCNN(downsample="max")),
        ),
    ),
)


# Compiles in the least time: how well code is optimised is not what is tested.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def initialise(module, *inputs):
    return quick(module.init)(jax.random.key(0, impl="rbg"), *inputs)


# The twin -------------------------------------------------------------------------------------------------------------


def elements(group):
    flips = (0, 1) if isinstance(group, Dihedral) else (0,)
    return [(steps, flip) for flip in flips for steps in range(group.order)]


def turn_filter(filters, g):
    """Return the filters k(g^-1 x) of `[size, size, ...]`, by turning the picture of the taps."""
    steps, flip = g
    return np.rot90(filters[:, ::-1] if flip else filters, steps)


def group_convolution(x, filters, group):
    """Return the group convolution [height, width, fields, |G|] of x `[height, width, fields, |G|]`, by loops.

    out(x, h) = sum over d and h' of filters(h^-1 d, h^-1 h') f(x + d, h'), with filters `[k, k, fields, |G|, fields]`.
    """
    every = elements(group)
    n, size = group.order, len(filters)
    padded = np.pad(x, ((size // 2,) * 2, (size // 2,) * 2, (0, 0), (0, 0)))
    result = np.zeros((*x.shape[:2], filters.shape[-1], len(every)))
    for index, (steps, flip) in enumerate(every):
        turned = turn_filter(filters, (steps, flip))
        for there, (steps_in, flip_in) in enumerate(every):
            # h^-1 h' for h = rotate(steps) flip^flip.
            relative = ((1 - 2 * flip) * (steps_in - steps) % n, flip ^ flip_in)
            taps = turned[:, :, :, every.index(relative)]
            for row, column in np.ndindex(size, size):
                shifted = padded[row : row + x.shape[0], column : column + x.shape[1], :, there]
                result[..., index] += shifted @ taps[row, column]
    return result


@pytest.mark.parametrize("group", [C4, D4], ids=lambda group: group.name)
def test_group_convolution_equals_explicitly_turned_filters(group, rng):
    size = group_size(group)
    inputs, outputs = FieldType.regular(group, 2), FieldType.regular(group, 3)
    x = rng.normal(size=(6, 6, inputs.channels))
    with jax.enable_x64(True):
        layer = SteerableConv(inputs, outputs, use_bias=False, param_dtype=jnp.float64)
        weights = rng.normal(size=(2 * 9 * size, 3))
        found = layer.apply({"params": {"regular": {"kernel": jnp.asarray(weights)}}}, jnp.asarray(x))
        kernel = expand_filters(jnp.asarray(weights.reshape(2, -1, 3)), group, "regular", "regular", 3)
    # One filter for the identity's channel says all; the twin turns it for the others.
    filters = np.asarray(kernel).reshape(3, 3, 2, size, 3, size)[..., 0]
    expected = group_convolution(x.reshape(6, 6, 2, size), filters, group)
    np.testing.assert_allclose(found, expected.reshape(6, 6, -1), atol=1e-11)
    wrong = group_convolution(x.reshape(6, 6, 2, size), np.rot90(filters), group)
    assert np.max(np.abs(wrong - expected)) > 0.1


@pytest.mark.parametrize("group", [C4, D4], ids=lambda group: group.name)
def test_lifting_equals_plain_convolutions_with_turned_filters(group, rng):
    x = rng.normal(size=(1, 6, 6, 2)).astype(np.float32)
    layer = SteerableConv(FieldType.trivial(group, 2), FieldType.regular(group, 1), use_bias=False)
    kernel = rng.normal(size=(18, 1)).astype(np.float32)
    found = layer.apply({"params": {"regular": {"kernel": jnp.asarray(kernel)}}}, jnp.asarray(x))
    filters = expand_filters(jnp.asarray(kernel.reshape(2, 9, 1)), group, "trivial", "regular", 3)[..., :1]
    for index, g in enumerate(elements(group)):
        turned = jnp.asarray(turn_filter(np.asarray(filters), g).copy())
        one = nn.Conv(1, (3, 3), use_bias=False).apply({"params": {"kernel": turned}}, jnp.asarray(x))
        np.testing.assert_allclose(found[..., index], one[..., 0], atol=1e-5)


def test_trivial_fields_with_one_tap_are_a_dense_layer(rng):
    fields = FieldType.trivial(C8, 3)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)
    layer = SteerableConv(fields, FieldType.trivial(C8, 5), kernel_size=1)
    params = initialise(layer, x)["params"]
    dense = nn.Dense(5).apply({"params": params["trivial"]}, x)
    np.testing.assert_allclose(layer.apply({"params": params}, x), dense, atol=1e-5)


# Exactness ------------------------------------------------------------------------------------------------------------

WIDE = {
    "C2": FieldType.regular(Cyclic(2), 1) + FieldType.irreps(Cyclic(2), 1),
    "C4": FieldType.regular(C4, 1) + FieldType.irreps(C4, 2),
    "D1": FieldType.regular(Dihedral(1), 1) + FieldType.irreps(Dihedral(1), 1),
    "D4": FieldType.regular(D4, 1) + FieldType.irreps(D4, 1),
}


@pytest.mark.parametrize(("name", "precise"), [("C4", False), ("D1", True), ("D4", True)])
def test_any_fields_turn_exactly_and_plain_convolutions_do_not(name, precise, rng):
    fields, dtype = WIDE[name], np.float64 if precise else np.float32
    x = rng.normal(size=(6, 6, fields.channels)).astype(dtype)
    check = functools.partial(assert_equivariant, representations=["image"], output="image")
    with jax.enable_x64(precise):
        layer = SteerableConv(fields, fields, padding="CIRCULAR")
        variables = initialise(layer, jnp.asarray(x))
        apply = quick(layer.apply)
        check(lambda x: apply(variables, jnp.asarray(x)), Fields(fields), x, tolerance=1e-10 if precise else 1e-5)
        with pytest.raises(AssertionError):
            check(conv(fields.channels, padding="CIRCULAR"), Fields(fields), x)


def test_gradient_of_invariant_logits_turns_with_the_image(rng):
    model = GroupCNN(num_classes=2, group=D4, widths=(3,), depths=(1,))
    x = rng.normal(size=(6, 6, 1)).astype(np.float32)
    variables = initialise(model, jnp.asarray(x))
    gradient = quick(jax.grad(lambda x: model.apply(variables, x)[0]))
    assert_equivariant(lambda x: gradient(jnp.asarray(x)), D4, x, representations=["image"], output="image")


def test_symmetry_survives_training(rng):
    model = GroupCNN(num_classes=2, group=C4, widths=(3,), depths=(1,))
    x = jnp.asarray(rng.normal(size=(16, 7, 7, 1)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 2, size=16))
    params = initialise(model, x)["params"]

    def loss(params):
        logits = jax.nn.log_softmax(model.apply({"params": params}, x))
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    @quick
    def step(params):
        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda leaf, slope: leaf - 0.3 * slope, params, gradient)

    losses = []
    for _ in range(40):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    apply = quick(model.apply)
    assert_invariant(lambda x: apply({"params": params}, jnp.asarray(x)), C4, np.asarray(x), representations=["image"])


# Legal sizes ----------------------------------------------------------------------------------------------------------


def measured(apply, x, fields):
    """Return the largest relative error over the elements of C4."""
    y = np.asarray(apply(jnp.asarray(x)))
    moved = [np.asarray(apply(jnp.asarray(fields[0].act(np.asarray(g), x)))) for g in (1, 2, 3)]
    expected = [fields[1].act(np.asarray(g), y) if len(fields) > 1 else y for g in (1, 2, 3)]
    return max(np.max(np.abs(a - b)) for a, b in zip(moved, expected, strict=True)) / np.max(np.abs(y))


GRIDS = [
    *itertools.product((6, 7, 8), (2, 3), (1, 2), ("SAME", "VALID")),
    *itertools.product((7, 8), (3, 4), (2,), ("CIRCULAR", 1)),
]


def test_layer_is_exact_on_exactly_the_grids_it_reports(rng):
    fields = FieldType.trivial(C4, 1), FieldType.regular(C4, 1)
    verdicts = []
    for size, kernel_size, stride, padding in GRIDS:
        layer = SteerableConv(*fields, kernel_size, stride, padding, use_bias=False)
        x = rng.normal(size=(size, size, 1)).astype(np.float32)
        report = layer.grid_report(size)
        taps = math.prod(filter_factors(C4, "trivial", "regular", kernel_size).shape)
        variables = {"params": {"regular": {"kernel": jnp.asarray(rng.normal(size=(taps, 1)), jnp.float32)}}}
        error = measured(quick(functools.partial(layer.apply, variables)), x, fields)
        assert report.exact == (error < 1e-5), (str(report), error)
        assert report.exact or error > 1e-2
        verdicts.append(report.exact)
    assert 5 < sum(verdicts) < len(verdicts) - 5


def test_pooling_with_windows_of_matching_parity_is_exact_at_every_size_and_strides_are_not(rng):
    fields = (FieldType.trivial(C4, 1),)
    exact = {"pool": [], "stride": []}
    for downsample, found in exact.items():
        model = GroupCNN(2, C4, (1, 3), (1, 1), downsample=downsample)
        variables = initialise(model, jnp.ones((9, 9, 1)))
        for size in (8, 9, 10, 11):
            x = rng.normal(size=(size, size, 1)).astype(np.float32)
            reports = model.grid_report(size)
            error = measured(quick(functools.partial(model.apply, variables)), x, fields)
            assert all(report.exact for report in reports) == (error < 1e-5), (size, error)
            assert len(reports) == (4 if downsample == "pool" else 3)
            if error < 1e-5:
                found.append(size)
    assert exact == {"pool": [8, 9, 10, 11], "stride": [9, 11]}
    assert exact_sizes([(3, 1, "SAME"), (3, 1, 1), (3, 2, 1)], range(8, 12)) == (9, 11)


# Other angles ---------------------------------------------------------------------------------------------------------


def pictures(resolution, angle, count=32):
    """Return the middles, 15 pixels wide, of smooth pictures of a resolution, turned exactly: waves, not pixels."""
    rng = np.random.default_rng(3)
    places = 2 * np.arange(-7, 8) / resolution
    cosine, sine = np.cos(angle), np.sin(angle)
    points = np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1) @ np.array([[cosine, -sine], [sine, cosine]])
    waves = [
        sum(rng.normal() * np.cos(points @ rng.normal(size=2) * 5 + rng.uniform(0, 6)) for _ in range(8))
        for _ in range(count)
    ]
    return jnp.asarray(np.stack(waves)[..., None], jnp.float32)


@pytest.mark.parametrize(("group", "size"), [(C8, 5), (Cyclic(16), 3), (Dihedral(8), 3)], ids=str)
def test_error_at_other_angles_falls_with_the_square_of_the_resolution(group, size):
    image, fields = FieldType.trivial(group, 1), FieldType.regular(group, 4)
    layers = {
        "steerable": (SteerableConv(image, fields, size), SteerableConv(fields, fields, size)),
        "plain": (nn.Conv(8, (size, size)), nn.Conv(8, (size, size))),
    }
    g = Turn(np.asarray(1), np.asarray(0)) if isinstance(group, Dihedral) else np.asarray(1)
    errors = {}
    for name, (first, second) in layers.items():

        @quick
        def middle(x, variables, first=first, second=second):
            return second.apply(variables[1], nn.gelu(first.apply(variables[0], x)))[:, 7, 7]

        one = initialise(first, pictures(31, 0.0))
        both = one, initialise(second, first.apply(one, pictures(31, 0.0)))
        found = []
        for resolution in (31, 61, 121):
            still = np.asarray(middle(pictures(resolution, 0.0), both))
            turned = np.asarray(middle(pictures(resolution, 2 * np.pi / group.order), both))
            # The control's channels are taken for numbers, which no turn changes.
            expected = still @ fields.matrix(g).T if name == "steerable" else still
            found.append(np.sqrt(np.mean((turned - expected) ** 2) / np.mean(still**2)))
        errors[name] = np.array(found)
    falls = {name: found[:-1] / found[1:] for name, found in errors.items()}
    assert errors["steerable"][-1] < 3e-3
    assert np.all(falls["steerable"] > 3.3)
    assert errors["plain"][-1] > 0.03
    assert np.all(falls["plain"] < 2.3)


def smooth(size, angle):
    """Return smooth pictures under a bell, turned exactly, `[8, size, size, 1]`."""
    places = 2 * (np.arange(size) - (size - 1) / 2) / size
    points = np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1)
    bell = np.exp(-np.sum((points / 0.4) ** 2, axis=-1))
    cosine, sine = np.cos(angle), np.sin(angle)
    points = points @ np.array([[cosine, -sine], [sine, cosine]])
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        waves = (rng.normal() * np.cos(points @ rng.normal(size=2) * 5 + rng.uniform(0, 6)) for _ in range(8))
        found.append(bell * sum(waves))
    return jnp.asarray(np.stack(found)[..., None], jnp.float32)


def logit_errors(model, sizes, angle):
    """Return how far logits move when pictures are turned, relative to their spread over pictures."""
    variables = initialise(model, smooth(29, 0.0))
    errors = []
    for size in sizes:
        apply = jax.jit(functools.partial(model.apply, variables))
        still, turned = (np.asarray(apply(smooth(size, each))) for each in (0.0, angle))
        errors.append(np.sqrt(np.mean((still - turned) ** 2)) / np.mean(np.std(still, axis=0)))
    return np.array(errors)


@pytest.mark.slow
def test_whole_model_on_illegal_sizes_and_other_angles_errs_as_documented():
    strided, pooled = (GroupCNN(group=C4, widths=(4, 8, 16), downsample=each) for each in ("stride", "pool"))
    assert np.all(logit_errors(pooled, (28, 29), np.pi / 2) < 1e-4)
    illegal, legal = logit_errors(strided, (28, 29), np.pi / 2)
    assert illegal > 0.3
    assert legal < 1e-4
    eighth, quarter = (
        logit_errors(GroupCNN(group=group, widths=(4, 8), depths=(1, 1), kernel_size=5), (28, 56, 112), np.pi / 4)
        for group in (C8, C4)
    )
    assert np.all(eighth[:-1] > 1.4 * eighth[1:])
    assert np.all(eighth < 0.55 * quarter)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [WIDE["D4"], FieldType.regular(C8, 8)], ids=["mixed", "regular"])
def test_initial_weights_keep_the_variance(fields, rng):
    x = jnp.asarray(rng.normal(size=(8, 12, 12, fields.channels)), jnp.float32)
    layer = SteerableConv(
        fields, FieldType(fields.group, tuple((name, 8) for name, _ in fields.fields)), 3, padding="CIRCULAR"
    )
    y, _ = quick(layer.init_with_output)(jax.random.key(0), x)
    for run in layer.outputs.runs:
        assert 0.6 < float(jnp.var(y[..., run.start : run.stop])) < 1.6


def test_max_frequency_zero_leaves_filters_that_no_turn_changes(rng):
    fields = FieldType.trivial(C8, 1)
    layer = SteerableConv(fields, FieldType.regular(C8, 1), 5, max_frequency=0, use_bias=False)
    x = jnp.asarray(rng.normal(size=(9, 9, 1)), jnp.float32)
    y, _ = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, jnp.broadcast_to(y[..., :1], y.shape), atol=1e-5)


def test_constant_and_zero_images_have_finite_values_and_gradients():
    for options in ({}, {"representation": "irreps", "norm": functools.partial(FieldNorm, over="pixel")}):
        model = GroupCNN(2, Cyclic(2), (3,), (1,), **options)
        variables = initialise(model, jnp.ones((6, 6, 1)))

        def total(variables, x, model=model):
            return jnp.sum(model.apply(variables, x) ** 2)

        both = quick(jax.value_and_grad(total, argnums=(0, 1)))
        for value in (0.0, 1.0):
            for leaf in jax.tree.leaves(both(variables, jnp.full((6, 6, 1), value))):
                assert np.all(np.isfinite(leaf))
    biases = {name: {"bias": jnp.ones(count)} for name, count in TURNING.fields}
    norms = quick(jax.grad(lambda x: jnp.sum(NormNonlinearity(TURNING).apply({"params": biases}, x))))
    assert np.all(np.asarray(norms(jnp.zeros((3, 3, 5)))) == 0)


def test_filters_are_one_plain_convolution():
    fields = FieldType.regular(C8, 2)
    layer = SteerableConv(fields, fields, 5)
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 9, 9, 16)))
    text = str(jax.make_jaxpr(layer.apply)(variables, jnp.ones((1, 9, 9, 16))))
    assert text.count("conv_general_dilated[") == 1
    sizes = [np.size(constant) for constant in jax.make_jaxpr(layer.apply)(variables, jnp.ones((1, 9, 9, 16))).consts]
    assert sum(sizes) < 5000  # the basis itself would be 200000 numbers


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_exact_at_their_own_size(name):
    fields = {key: value for key, value in VARIANTS[name].items() if key not in ("module", "inputs")}
    model = VARIANTS[name]["module"](**fields)
    (image,) = VARIANTS[name]["inputs"]
    assert all(report.exact for report in model.grid_report(image.shape[1], image.shape[2]))
    assert jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0].shape == (1, 10)


def test_irreps_of_the_model_are_those_a_filter_can_reach():
    names = [name for name, _ in GroupCNN(group=D4, representation="irreps").stage_fields()[0].fields]
    assert names == [name for name in irrep_names(D4) if name != "irrep_1_0"]
