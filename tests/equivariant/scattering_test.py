"""Scattering: distances do not grow, shifts matter less with depth, and the coefficients are as defined."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.scattering import (
    NONLINEARITIES,
    DeepScattering,
    FilterBank,
    MorletScattering,
    ScatteringNet,
    Stage,
    admissibility,
    delta_bank,
    gabor_bank,
    modulus,
    morlet_bank,
    morlet_net,
    morlet_scattering,
    scatter,
    spatial_bank,
    tight_bank,
)
from jaxlayers.geometry.groups import Cyclic, Translation
from jaxlayers.testing import BadInput, Case, Symmetry, assert_equivariant, assert_invariant

tight_gabor = functools.partial(tight_bank, bank=gabor_bank)
tight_morlet = functools.partial(tight_bank, bank=morlet_bank, real=True)
edges = functools.partial(
    spatial_bank,
    filters=np.array([[[1.0, -1.0], [1.0, -1.0]], [[1.0, 1.0], [-1.0, -1.0]]]),
    low_pass=np.ones((2, 2)) / 4,
)
SHIFTS = Translation(2, cyclic=True, extent=5.0)


def images(rng, size=6, channels=1, batch=2):
    return rng.normal(size=(batch, size, size, channels))


def padded_with_zeros(x):
    """The control: a plain convolution whose border shows."""
    kernel = jnp.asarray(np.random.default_rng(3).normal(size=(3, 3, x.shape[-1], 2)), x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


CASES = (
    Case(
        name="deep_scattering",
        within="scattering_net",
        module=DeepScattering((Stage(edges, "relu"), Stage(functools.partial(gabor_bank, channels=2), "modulus"))),
        inputs=lambda rng: (images(rng),),
        symmetries=(
            Symmetry(
                SHIFTS,
                ("image",),
                ("image",) * 3,
                control=lambda x: (padded_with_zeros(x),) * 3,
                reason="without pooling every shift is exact",
            ),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match=r"inputs of shape \(6, 6\) must be", inputs=lambda rng: (rng.normal(size=(6, 6)),)),
            BadInput(match="rank=3 must be 1 or 2", module=DeepScattering(rank=3)),
            BadInput(match="stages=\\(\\) must not be empty", module=DeepScattering(())),
            BadInput(match="factor=4 of stage 0 must divide its grid", module=DeepScattering((Stage(factor=4),))),
            BadInput(match="nonlinearity='sign' is unknown", module=DeepScattering((Stage(nonlinearity="sign"),))),
            BadInput(match="pooling='median' is unknown", module=DeepScattering((Stage(pooling="median"),))),
            BadInput(match="condition='hope' is unknown", module=DeepScattering(condition="hope")),
            BadInput(
                match=r"stage 0 must satisfy max\(B, B R\^2 L\^2\) <= 1, but its constant is 16",
                module=DeepScattering((Stage(edges),), condition="check"),
            ),
            BadInput(
                match="support \\(2, 2\\) must fit a grid of size \\(1, 1\\)",
                module=DeepScattering((Stage(edges),)),
                inputs=lambda rng: (rng.normal(size=(1, 1, 1, 1)),),
            ),
            BadInput(
                match="channels=1 must be at least 2",
                module=DeepScattering((Stage(functools.partial(gabor_bank, channels=1)),)),
            ),
        ),
    ),
    Case(
        name="deep_scattering_sequence",
        within="scattering_net",
        module=DeepScattering(
            (Stage(tight_gabor, "modulus", "average", 2), Stage(gabor_bank, "tanh", "max", 2)), rank=1
        ),
        inputs=lambda rng: (rng.normal(size=(2, 16, 2)),),
        bad_inputs=(
            BadInput(match="factor=2 of stage 1 must divide its grid", inputs=lambda rng: (np.ones((1, 2, 1)),)),
        ),
    ),
    Case(
        name="morlet_scattering",
        module=MorletScattering(scales=2, orientations=2, normalize=True),
        inputs=lambda rng: (images(rng, size=8),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="6 x 6 pixels must be a multiple of 2\\^scales=4", inputs=lambda rng: (images(rng),)),
            BadInput(match="padding='same' is unknown", module=MorletScattering(padding="same")),
            BadInput(match="order=3 must be 0, 1 or 2", module=MorletScattering(order=3)),
            BadInput(match="scales=0", module=MorletScattering(scales=0)),
            BadInput(
                match="8 x 8 pixels is too small to reflect", module=MorletScattering(scales=4, padding="reflect")
            ),
            BadInput(match=r"image of shape \(8, 8\) must be", inputs=lambda rng: (rng.normal(size=(8, 8)),)),
        ),
    ),
    Case(
        name="scattering_net",
        module=ScatteringNet(DeepScattering((Stage(edges),)), num_classes=3, hidden_features=(4,)),
        inputs=lambda rng: (images(rng),),
        symmetries=(Symmetry(SHIFTS, ("image",), control=Cyclic(4), reason="the filters know directions"),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="pooling='max' is unknown", module=ScatteringNet(pooling="max")),
            BadInput(match="hidden_features=\\(0,\\) must be positive", module=ScatteringNet(hidden_features=(0,))),
        ),
    ),
)


# Filter banks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bank", "size", "real"),
    [
        (morlet_bank, (32,), True),
        (morlet_bank, (12, 16), True),
        (gabor_bank, (32,), False),
        (gabor_bank, (8, 12), False),
    ],
)
def test_frame_bounds_hold_and_are_attained(rng, bank, size, real):
    made = bank(size)
    lower, upper = made.bounds(real=real)

    def energy(signal):
        spectrum = np.fft.fftn(signal)
        parts = [np.fft.ifftn(spectrum * h) for h in (*made.band, made.low_pass)]
        return sum(np.sum(np.abs(part) ** 2) for part in parts) / np.sum(np.abs(signal) ** 2)

    def draw():
        signal = rng.normal(size=size)
        return signal if real else signal + 1j * rng.normal(size=size)

    assert all(lower <= energy(draw()) <= upper for _ in range(20))
    total = made.littlewood_paley(real=real)
    for place, bound in ((np.argmin(total), lower), (np.argmax(total), upper)):
        spectrum = np.zeros(size, complex)
        spectrum.flat[place] = 1
        wave = np.fft.ifftn(spectrum)
        assert abs(energy(wave.real if real else wave) - bound) < 1e-9
    assert 0 < lower < upper


def test_morlet_wavelets_have_no_mean_and_peak_at_their_frequency():
    made = morlet_bank((64, 64), scales=3, orientations=8)
    np.testing.assert_allclose(made.band[:, 0, 0], 0, atol=1e-12)
    assert abs(made.low_pass[0, 0] - 1) < 1e-9
    for j in range(3):
        # The fourth angle is zero: along the rows.
        row, column = np.unravel_index(np.argmax(made.band[8 * j + 3]), (64, 64))
        assert abs(row * 2 * np.pi / 64 - 0.75 * np.pi / 2**j) < 0.2
        assert column == 0


def test_tight_banks_have_bounds_one():
    for bank, real in ((tight_gabor, False), (tight_morlet, True)):
        np.testing.assert_allclose(bank((24,)).bounds(real=real), (1, 1), atol=1e-12)
    with pytest.raises(ValueError, match="the bank must be a frame, but its Littlewood-Paley sum falls to"):
        tight_bank((4, 4), bank=edges)


# The general network ------------------------------------------------------------------------------------------------


def convolve(signal, response):
    """Circular convolution as the definition has it, with the filter in space."""
    taps, n = np.fft.ifft(response), len(signal)
    return np.array([sum(signal[m] * taps[(k - m) % n] for m in range(n)) for k in range(n)])


def brute_force(signal, stages, last):
    def rule(x, name):
        if name == "modulus":
            return np.abs(x)
        parts = {"relu": lambda t: np.maximum(t, 0), "tanh": np.tanh, "logistic": lambda t: 1 / (1 + np.exp(-t)) - 0.5}
        return parts[name](x.real) + 1j * parts[name](x.imag)

    def pool(x, name, s):
        blocks = [x[k : k + s] for k in range(0, len(x), s)]
        kinds = {"subsample": lambda b: b[0], "average": np.mean, "max": lambda b: np.max(np.abs(b))}
        return np.array([kinds[name](block) for block in blocks])

    paths, out = [signal], []
    for stage in stages:
        bank = stage.bank((len(paths[0]),))
        out.append([convolve(u, bank.low_pass) for u in paths])
        paths = [
            pool(rule(convolve(u, g), stage.nonlinearity), stage.pooling, stage.factor)
            for u in paths
            for g in bank.band
        ]
    low_pass = last((len(paths[0]),)).low_pass
    return [*out, [convolve(u, low_pass) for u in paths]]


@pytest.mark.parametrize("first", [("modulus", "max"), ("relu", "average"), ("tanh", "subsample"), ("logistic", "max")])
def test_features_equal_brute_force(rng, first):
    signal = rng.normal(size=12)
    filters = functools.partial(spatial_bank, filters=rng.normal(size=(2, 3)), low_pass=np.ones(2) / 2)
    stages = (Stage(gabor_bank, *first, 2), Stage(filters, "relu", "average", 3))
    with jax.enable_x64(True):
        found = scatter(jnp.asarray(signal)[None], stages, rank=1, last=gabor_bank, condition="ignore")
    for a, b in zip(found, brute_force(signal, stages, gabor_bank), strict=True):
        np.testing.assert_allclose(a[0], b, atol=1e-12)


def norm(features):
    return jnp.sqrt(sum(jnp.sum(jnp.abs(x) ** 2) for x in features))


NETWORKS = {
    "modulus": (Stage(gabor_bank, "modulus", "subsample", 2), Stage(gabor_bank, "modulus", "subsample", 2)),
    "rectified": (Stage(gabor_bank, "relu", "average", 2), Stage(tight_gabor, "relu", "max", 2)),
    "bounded": (Stage(tight_gabor, "tanh"), Stage(gabor_bank, "logistic", "max", 4)),
    "wavelets": (Stage(morlet_bank, "modulus", "max", 2), Stage(morlet_bank, "relu")),
}


def expansion(stages, condition, steps=30):
    """Largest ratio of distances over random pairs, and over pairs found by gradient ascent."""

    def transform(f):
        return scatter(f[None], stages, rank=1, condition=condition)

    def ratio(f, h):
        difference = [a - b for a, b in zip(transform(f), transform(h), strict=True)]
        return norm(difference) / jnp.linalg.norm(f - h)

    @jax.jit
    def climb(f, h):
        def step(_, pair):
            slope = jax.grad(lambda pair: jnp.log(ratio(*pair)))(pair)
            size = jnp.sqrt(sum(jnp.sum(x**2) for x in slope))
            return jax.tree.map(lambda x, g: x + 0.3 * g / size, pair, slope)

        return ratio(f, h), ratio(*jax.lax.fori_loop(0, steps, step, (f, h)))

    rng = np.random.default_rng(0)
    f = rng.normal(size=(6, 16))
    h = f + rng.normal(size=f.shape) * np.array([3, 1, 0.3, 0.1, 0.03, 3])[:, None]
    return np.max(np.array(jax.vmap(climb)(jnp.asarray(f), jnp.asarray(h))), axis=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_distances_do_not_grow(name):
    with jax.enable_x64(True):
        drawn, found = expansion(NETWORKS[name], "normalize")
    assert 0.01 < drawn <= found <= 1 + 1e-12


def test_distances_grow_where_the_condition_is_broken():
    loud = functools.partial(lambda size: gabor_bank(size).scaled(1.3))
    stages = (Stage(loud), Stage(loud))
    assert admissibility((16,), stages)[0].constant > 1.6
    with jax.enable_x64(True):
        assert expansion(stages, "ignore")[1] > 1.1
        assert expansion(stages, "normalize")[1] <= 1 + 1e-12
    steep = Stage(tight_gabor, steeper("tanh", 1.5))
    assert abs(admissibility((16,), (steep,))[0].constant - 2.25) < 1e-9


def steeper(name, factor):
    """A steeper version of a nonlinearity, with its constant."""
    rule = NONLINEARITIES[name]
    return type(rule)(lambda x: rule.function(factor * x), factor * rule.lipschitz)


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_lipschitz_constants_are_bounds_and_attained(rng, name):
    rule = NONLINEARITIES[name]
    a = rng.normal(size=4000) + 1j * rng.normal(size=4000)
    a[-2:] = 0.001, 0.001j
    b = a + 1e-3 * np.exp(2j * np.pi * rng.random(4000))
    b[-2:] = 0
    with jax.enable_x64(True):
        ratio = np.abs(rule.function(jnp.asarray(a)) - rule.function(jnp.asarray(b))) / np.abs(a - b)
        assert float(jnp.max(jnp.abs(rule.function(jnp.zeros(2))))) == 0
    assert 0.99 * rule.lipschitz < np.max(ratio) <= rule.lipschitz + 1e-9


@pytest.mark.slow
def test_energy_is_kept_by_tight_frames_and_lost_with_depth(rng):
    with jax.enable_x64(True):
        signal = jnp.asarray(rng.normal(size=(1, 32)))
        total = float(jnp.sum(signal**2))
        remaining = []
        for depth in (1, 2, 3):
            features = scatter(signal, (Stage(tight_gabor),) * depth, rank=1, last=delta_bank)
            assert abs(float(norm(features)) ** 2 / total - 1) < 1e-12
            remaining.append(float(jnp.sum(jnp.abs(features[-1]) ** 2)) / total)
    # What the paths of one depth still carry falls: the modulus brings energy to the low frequencies.
    assert all(after < 0.7 * before for before, after in itertools.pairwise(remaining)), remaining


def sensitivity(factor, depth, shift=8, size=256):
    """Relative change of the features of each depth by a shift."""
    signal = jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)[None]
    bank = functools.partial(tight_bank, bank=functools.partial(gabor_bank, channels=8))
    transform = jax.jit(functools.partial(scatter, stages=(Stage(bank, factor=factor),) * depth, rank=1))
    before, after = transform(signal), transform(jnp.roll(signal, shift))
    return [float(norm([a - b]) / norm([b])) for a, b in zip(after, before, strict=True)]


def test_features_are_less_sensitive_to_shifts_with_depth_and_with_the_pooling_factor():
    two, four = sensitivity(2, 3), sensitivity(4, 1)
    # Every stage halves the shift on its grid.
    assert all(after < 0.6 * before for before, after in itertools.pairwise(two)), two
    assert four[1] < 0.6 * two[1]
    # The control: without pooling depth does not help.
    one = sensitivity(1, 2)
    assert one[2] > 0.9 * one[1] > 2 * two[2]


def test_a_shift_by_the_product_of_the_factors_moves_the_features(rng):
    stages = (Stage(tight_gabor, "relu", "max", 2), Stage(gabor_bank, "modulus", "average", 3))
    with jax.enable_x64(True):
        signal = jnp.asarray(rng.normal(size=(1, 24)))
        before, after, other = (scatter(jnp.roll(signal, shift), stages, rank=1) for shift in (0, 6, 3))
        for x, y, shift in zip(before, after, (6, 3, 1), strict=True):
            np.testing.assert_allclose(jnp.roll(x, shift, axis=-1), y, atol=1e-12)
        # The control: three samples are one and a half of the first grid.
        assert min(float(jnp.max(jnp.abs(jnp.roll(before[1], k, axis=-1) - other[1]))) for k in range(12)) > 1e-2


def test_small_deformations_change_features_in_proportion_and_less_than_the_signal():
    t = np.arange(256) / 256

    def signal(amount):
        warped = t + amount * np.sin(2 * np.pi * t) / (2 * np.pi)
        return jnp.asarray(np.cos(2 * np.pi * 24 * warped) + 0.5 * np.sin(2 * np.pi * 40 * warped), jnp.float32)[None]

    bank = functools.partial(tight_bank, bank=functools.partial(morlet_bank, scales=4), real=True)
    transform = jax.jit(functools.partial(scatter, stages=(Stage(bank, "modulus", "average", 2),) * 2, rank=1))

    def change(amount):
        a, b = signal(amount), signal(0.0)
        difference = [x - y for x, y in zip(transform(a), transform(b), strict=True)]
        return float(norm(difference) / jnp.linalg.norm(b)), float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))

    features, raw = zip(*[change(amount) for amount in (0.005, 0.01, 0.02, 0.04)], strict=True)
    assert all(1.7 < after / before < 2.1 for before, after in itertools.pairwise(features)), features
    assert all(x < 0.1 * y for x, y in zip(features, raw, strict=True)), (features, raw)


# Morlet scattering --------------------------------------------------------------------------------------------------


def brute_force_morlet(image, scales, orientations):
    """The definition by direct sums: filter, keep every 2^j-th pixel, take the modulus, filter, keep."""
    bank = morlet_bank(image.shape, scales=scales, orientations=orientations)

    def filtered(x, response):
        # On a coarser grid a filter is what it is at the frequencies that the grid has.
        n = len(x)
        frequency = np.round(np.fft.fftfreq(n) * n).astype(int) % len(response)
        taps = np.fft.ifft2(response[np.ix_(frequency, frequency)])
        out = np.zeros((n, n), complex)
        for i, j in itertools.product(range(n), repeat=2):
            out += x[i, j] * np.roll(taps, (i, j), (0, 1))
        return out

    def low(x, level):
        stride = 2 ** (scales - level)
        return np.real(filtered(x, bank.low_pass))[::stride, ::stride]

    def deeper(x, level, least):
        for k, g in enumerate(bank.band):
            j = k // orientations
            if j >= least:
                stride = 2 ** (j - level)
                yield j, np.abs(filtered(x, g))[::stride, ::stride]

    first = list(deeper(image, 0, 0))
    second = [low(u, k) for j, v in first for k, u in deeper(v, j, j + 1)]
    return np.stack([low(image, 0), *(low(u, j) for j, u in first), *second], axis=-1)


@pytest.mark.slow
def test_morlet_coefficients_equal_brute_force(rng):
    image = rng.normal(size=(16, 16))
    with jax.enable_x64(True):
        found = morlet_scattering(jnp.asarray(image)[..., None], scales=3, orientations=2)[..., 0, :]
    assert found.shape == (2, 2, 1 + 6 + 12)
    np.testing.assert_allclose(found, brute_force_morlet(image, 3, 2), atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_shifts_by_the_stride_are_exact(rng, order):
    with jax.enable_x64(True):
        image = jnp.asarray(rng.normal(size=(8, 16, 2)))
        transform = jax.jit(functools.partial(morlet_scattering, scales=2, orientations=2, order=order))
        before, after, other = (transform(jnp.roll(image, shift, (0, 1))) for shift in ((0, 0), (4, -8), (2, 0)))
        np.testing.assert_allclose(jnp.roll(before, (1, -2), (0, 1)), after, atol=1e-12)
        assert float(jnp.max(jnp.abs(before - other))) > 1e-3


def test_larger_scales_are_less_sensitive_to_shifts(rng):
    image = jnp.asarray(rng.normal(size=(32, 32, 1)), jnp.float32)
    changes = []
    for scales in (1, 2, 3, 4):
        transform = jax.jit(functools.partial(morlet_scattering, scales=scales, orientations=4, order=1))
        before, after = (transform(x)[..., 1:] for x in (image, jnp.roll(image, 1, 0)))
        changes.append(float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before)))
    assert all(after < 0.75 * before for before, after in itertools.pairwise(changes)), changes


def test_normalized_morlet_scattering_does_not_expand_distances(rng):
    transform = functools.partial(morlet_scattering, scales=3, orientations=4, normalize=True)

    @jax.jit
    def ratio(f, h):
        return jnp.linalg.norm(transform(f) - transform(h)) / jnp.linalg.norm(f - h)

    smooth = jnp.ones((16, 16, 1))
    for f, h in (
        (smooth, 0.5 * smooth),
        *(jnp.asarray(rng.normal(size=(2, 16, 16, 1)), jnp.float32) for _ in range(4)),
    ):
        assert float(ratio(f, h)) <= 1


def test_constant_images_have_finite_gradients_and_nan_stays_in_its_channel(rng):
    transform = jax.jit(functools.partial(morlet_scattering, scales=1, orientations=2))
    for image in (jnp.zeros((8, 8, 1)), jnp.ones((8, 8, 1))):
        out, slope = jax.value_and_grad(lambda x: jnp.sum(transform(x) ** 2))(image)
        assert bool(jnp.isfinite(out) & jnp.all(jnp.isfinite(slope)))
    np.testing.assert_allclose(transform(jnp.ones((8, 8, 1)))[0, 0, 0], [1, 0, 0], atol=2e-5)
    image = jnp.asarray(rng.normal(size=(8, 8, 2)), jnp.float32).at[1, 1, 0].set(jnp.nan)
    out = transform(image)
    assert bool(jnp.all(jnp.isnan(out[..., 0, :])))
    assert bool(jnp.all(jnp.isfinite(out[..., 1, :])))


def test_modulus_has_gradient_zero_at_zero():
    assert float(jax.grad(lambda x: modulus(x * (1 + 2j)))(0.0)) == 0
    assert float(jax.grad(modulus)(-3.0)) == -1


def test_banks_that_do_not_fit_are_refused(untyped):
    with pytest.raises(ValueError, match="the bank must have 2 x 8 band filters with real responses"):
        morlet_scattering(jnp.ones((8, 8, 1)), bank=lambda size: FilterBank(np.ones((3, *size)), np.ones(size)))
    with pytest.raises(ValueError, match="must have one or two axes"):
        gabor_bank((2, 2, 2))


# The classifier -----------------------------------------------------------------------------------------------------


def test_mean_pooling_is_invariant_to_shifts_and_flattening_is_not(rng):
    inputs = images(rng, size=8).astype(np.float32)
    for pooling in ("mean", "flatten"):
        model = morlet_net(3, scales=1, orientations=2, pooling=pooling)
        apply = jax.jit(functools.partial(model.apply, jax.jit(model.init)(jax.random.key(0), inputs)))
        check = functools.partial(
            assert_invariant, apply, Translation(2, cyclic=True), inputs, representations=["image"]
        )
        elements = [2 * np.array(shift) for shift in ((1, 0), (0, 3), (2, 1))]
        if pooling == "mean":
            check(elements=elements, samples=3)
        else:
            with pytest.raises(AssertionError):
                check(elements=elements, samples=3)
    # The control: one pixel is half a stride.
    with pytest.raises(AssertionError):
        check(elements=[np.array([1, 0])], samples=1)


def test_unpooled_features_move_with_every_shift_in_both_ranks(rng):
    sequence = rng.normal(size=(2, 15, 1)).astype(np.float32)
    layer = DeepScattering((Stage(functools.partial(tight_morlet), "modulus"), Stage(gabor_bank, "tanh")), rank=1)
    assert_equivariant(
        jax.jit(functools.partial(layer.apply, {})),
        Translation(1, cyclic=True, extent=7.0),
        sequence,
        representations=["set"],
        output=("set",) * 3,
    )
