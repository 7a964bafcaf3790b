import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.resample import cubic_matrix, resample, resample_patch_kernel, resample_relative_table

LENGTHS = [(13, 23), (7, 13), (13, 7), (5, 5), (1, 4), (4, 1), (8, 3)]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("source", "target"), LENGTHS)
def test_constants_are_kept_and_the_matrix_is_symmetric(source, target, antialias):
    matrix = cubic_matrix(source, target, antialias=antialias)
    assert matrix.shape == (target, source)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)


@pytest.mark.parametrize(("source", "target"), LENGTHS)
def test_antialiased_equals_jax_image(source, target):
    # Independent twin: JAX's own resizing uses Keys' kernel with a = -0.5 too.
    expected = jax.image.resize(jnp.eye(source), (target, source), "cubic", antialias=True)
    np.testing.assert_allclose(cubic_matrix(source, target, antialias=True), expected, atol=1e-5)


@pytest.mark.parametrize(("source", "target"), [(13, 23), (13, 7)])
def test_plain_cubic_equals_a_loop(source, target):
    signal = np.random.default_rng(0).normal(size=source)
    for row, found in enumerate(cubic_matrix(source, target) @ signal):
        centre = (row + 0.5) * source / target - 0.5
        total = 0.0
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            t = abs(tap - centre)
            weight = 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            total += weight * signal[min(max(tap, 0), source - 1)]
        np.testing.assert_allclose(found, total, atol=1e-12)


def test_axes_are_resampled_one_after_the_other(rng):
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    found = resample(jnp.asarray(x), (7, 6))
    expected = np.einsum("ph,qw,bhwc->bpqc", cubic_matrix(5, 7), cubic_matrix(4, 6), x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(resample(jnp.asarray(x), (5, 4)), x)


def test_table_keeps_its_centre_and_mirror_symmetry(rng):
    half = rng.normal(size=(13, 7, 2))
    table = half + half[::-1, ::-1]
    found = resample_relative_table(jnp.asarray(table.reshape(-1, 2), jnp.float32), (7, 4), (12, 3))
    grid = np.asarray(found).reshape(23, 5, 2)
    np.testing.assert_allclose(grid, grid[::-1, ::-1], atol=1e-5)
    np.testing.assert_allclose(grid[11, 2], table[6, 3], atol=0.2 * np.abs(table).max())


def test_stacked_tables_are_resampled_one_by_one(rng):
    tables = jnp.asarray(rng.normal(size=(3, 9, 2)), jnp.float32)
    found = resample_relative_table(tables, (2, 2), (3, 3))
    np.testing.assert_allclose(found[1], resample_relative_table(tables[1], (2, 2), (3, 3)), atol=1e-6)


def test_grown_kernel_gives_resized_patches_the_same_embedding(rng):
    kernel = rng.normal(size=(4, 2, 3, 5)).astype(np.float32)
    patch = rng.normal(size=(4, 2, 3)).astype(np.float32)
    grown = np.asarray(resample_patch_kernel(jnp.asarray(kernel), (6, 4)))
    assert grown.shape == (6, 4, 3, 5)
    resized = np.asarray(resample(jnp.asarray(patch), (6, 4), antialias=True))
    expected = np.einsum("hwc,hwcf->f", patch, kernel)
    np.testing.assert_allclose(np.einsum("hwc,hwcf->f", resized, grown), expected, atol=1e-4)
    # Negative control: resizing the kernel like an image does not.
    plain = np.asarray(resample(jnp.asarray(kernel.reshape(4, 2, -1)), (6, 4), antialias=True)).reshape(6, 4, 3, 5)
    assert np.abs(np.einsum("hwc,hwcf->f", resized, plain) - expected).max() > 0.1


def test_clear_errors():
    with pytest.raises(ValueError, match="source=0 and target=3 must be positive"):
        cubic_matrix(0, 3)
    with pytest.raises(ValueError, match=r"window=\(3, 3\) must have 25 rows, not shape \(9, 2\)"):
        resample_relative_table(jnp.ones((9, 2)), (3, 3), (4, 4))
    with pytest.raises(ValueError, match=r"size=\(2, 2\) needs an array of at least 3 axes"):
        resample(jnp.ones((4, 4)), (2, 2))
