"""Masks for comparing moved images; the interpolation itself is held to its order in `groups_test`."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.geometry.images import disk_mask, resample_image


def test_disk_mask_is_kept_by_quarter_turns_and_drops_the_corners():
    for shape in ((7, 7), (8, 8), (6, 9)):
        mask = disk_mask(*shape)
        assert mask.shape == (*shape, 1)
        assert mask[0, 0, 0] == 0.0
        assert 0.0 < mask.mean() < 1.0
    np.testing.assert_array_equal(np.rot90(disk_mask(8, 8)), disk_mask(8, 8))
    assert disk_mask(9, 9, margin=2.0).sum() < disk_mask(9, 9).sum()
    with pytest.raises(ValueError, match=r"margin=9\.0 leaves no pixel of a 9 x 9 image"):
        disk_mask(9, 9, margin=9.0)


def test_whole_pixel_moves_are_exact_in_both_namespaces(rng):
    x = rng.normal(size=(2, 5, 6, 3))
    moved = resample_image(x, np.eye(2), np.array([1.0, -2.0]))
    np.testing.assert_allclose(moved[:, 1:, :-2], x[:, :-1, 2:], atol=1e-12)
    found = resample_image(jnp.asarray(x, jnp.float32), np.eye(2), np.array([1.0, -2.0]))
    np.testing.assert_allclose(found, moved, atol=1e-6)
