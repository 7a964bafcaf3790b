"""Sampling and affine coordinates beside PyTorch's, whose coordinates are (x, y) in [-1, 1]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.grid_sample import affine_coordinates, grid_sample

torch = pytest.importorskip("torch")


def half_extent(shape, align_corners):
    """Half of what [-1, 1] spans, in pixels: from centre to centre of the outermost pixels, or from edge to edge."""
    return (np.array(shape) - align_corners) / 2


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("padding", "name"), [("zeros", "zeros"), ("edge", "border")])
def test_values_and_gradients_equal_torch(rng, padding, name, align_corners):
    image = rng.normal(size=(2, 6, 5, 3)).astype(np.float32)
    grid = rng.uniform(-1.6, 1.6, size=(2, 4, 7, 2)).astype(np.float32)  # (x, y)
    weight = rng.normal(size=(2, 4, 7, 3)).astype(np.float32)
    torch_image = torch.tensor(np.moveaxis(image, -1, 1).copy(), requires_grad=True)
    torch_grid = torch.tensor(grid, requires_grad=True)
    out = torch.nn.functional.grid_sample(
        torch_image, torch_grid, mode="bilinear", padding_mode=name, align_corners=align_corners
    )
    (out * torch.tensor(np.moveaxis(weight, -1, 1).copy())).sum().backward()

    def sample(image, grid):
        shape = image.shape[-3:-1]
        places = grid[..., ::-1] * half_extent(shape, align_corners) + (np.array(shape) - 1) / 2
        return grid_sample(image, places.astype(jnp.float32), padding=padding)

    found = sample(jnp.asarray(image), jnp.asarray(grid))
    gradients = jax.grad(lambda *x: jnp.sum(sample(*x) * weight), (0, 1))(jnp.asarray(image), jnp.asarray(grid))
    np.testing.assert_allclose(found, np.moveaxis(out.detach().numpy(), 1, -1), atol=1e-5)
    np.testing.assert_allclose(gradients[0], np.moveaxis(torch_image.grad.numpy(), 1, -1), atol=1e-5)
    np.testing.assert_allclose(gradients[1], torch_grid.grad.numpy(), atol=5e-5)


@pytest.mark.parametrize("align_corners", [False, True])
def test_affine_coordinates_equal_torch(rng, align_corners):
    theta = rng.normal(size=(3, 2, 3)).astype(np.float32)  # on (x, y) in [-1, 1]
    shape, source = (4, 7), (6, 5)
    expected = torch.nn.functional.affine_grid(torch.tensor(theta), (3, 1, *shape), align_corners=align_corners)
    expected = expected.numpy()[..., ::-1] * half_extent(source, align_corners) + (np.array(source) - 1) / 2
    swapped = theta[:, ::-1][..., [1, 0, 2]]
    outer = half_extent(source, align_corners)[:, None]
    scaled = swapped * outer / np.append(half_extent(shape, align_corners), 1)
    found = affine_coordinates(jnp.asarray(scaled, jnp.float32), shape, source=source)
    np.testing.assert_allclose(found, expected, atol=2e-5)
