"""Spatial transformers beside PyTorch's `affine_grid` and `grid_sample`: value and gradients by image and theta."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.equivariant.spatial_transformer import affine_grid
from jaxlayers.ops.grid_sample import grid_sample

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("padding", "name"), [("zeros", "zeros"), ("edge", "border")])
def test_affine_transformer_and_its_gradients_equal_torch(rng, padding, name):
    image = rng.normal(size=(3, 6, 5, 2)).astype(np.float32)
    theta = (np.eye(2, 3) + 0.3 * rng.normal(size=(3, 2, 3))).astype(np.float32)  # on (x, y)
    weight = rng.normal(size=(3, 4, 7, 2)).astype(np.float32)
    torch_image = torch.tensor(np.moveaxis(image, -1, 1).copy(), requires_grad=True)
    torch_theta = torch.tensor(theta, requires_grad=True)
    grid = torch.nn.functional.affine_grid(torch_theta, (3, 2, 4, 7), align_corners=False)
    out = torch.nn.functional.grid_sample(torch_image, grid, padding_mode=name, align_corners=False)
    (out * torch.tensor(np.moveaxis(weight, -1, 1).copy())).sum().backward()

    def warped(image, theta):
        return grid_sample(image, affine_grid(theta[:, ::-1][..., [1, 0, 2]], (4, 7), source=(6, 5)), padding=padding)

    found = warped(jnp.asarray(image), jnp.asarray(theta))
    gradients = jax.grad(lambda *x: jnp.sum(warped(*x) * weight), (0, 1))(jnp.asarray(image), jnp.asarray(theta))
    pairs = {
        "value": (found, np.moveaxis(out.detach().numpy(), 1, -1)),
        "gradient by image": (gradients[0], np.moveaxis(torch_image.grad.numpy(), 1, -1)),
        "gradient by theta": (gradients[1], torch_theta.grad.numpy()),
    }
    for what, (one, other) in pairs.items():
        error = np.abs(one - other).max() / np.abs(other).max()
        print(f"{padding}, {what}: relative error {error:.1e}")
        assert error < 1e-5, what
