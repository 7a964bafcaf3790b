"""The window block on volumes beside torchvision's Video Swin block, on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.window import SwinBlock
from tests.parity.swin_test import assert_close, randomise

torch = pytest.importorskip("torch")

WINDOW = (2, 4, 3)


def ours(block):
    """Return the parameters of torchvision's block under our names."""
    tensors = {name: tensor.numpy() for name, tensor in block.state_dict().items()}

    def dense(weight, bias):
        return {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}

    def norm(name):
        return {"scale": jnp.asarray(tensors[f"{name}.weight"]), "bias": jnp.asarray(tensors[f"{name}.bias"])}

    thirds = zip(
        ("query", "key", "value"),
        np.split(tensors["attn.qkv.weight"], 3),
        np.split(tensors["attn.qkv.bias"], 3),
        strict=True,
    )
    attention = {name: dense(weight, bias) for name, weight, bias in thirds}
    attention["out"] = dense(tensors["attn.proj.weight"], tensors["attn.proj.bias"])
    attention["relative_position_bias_table"] = jnp.asarray(tensors["attn.relative_position_bias_table"])
    return {
        "norm1": norm("norm1"),
        "attention": attention,
        "norm2": norm("norm2"),
        "feed_forward": {
            "up": dense(tensors["mlp.0.weight"], tensors["mlp.0.bias"]),
            "down": dense(tensors["mlp.3.weight"], tensors["mlp.3.bias"]),
        },
    }


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 1)])
@pytest.mark.parametrize("size", [(4, 8, 6), (5, 9, 7), (2, 6, 5)], ids=str)
@torch.no_grad()
def test_block_on_volumes_equals_torchvision(torchvision, shift, size):
    """Sizes that are multiples of the window, are not, and one whose first axis is no longer than the window."""
    video = pytest.importorskip("torchvision.models.video.swin_transformer")
    image = pytest.importorskip("torchvision.models.swin_transformer")
    reference = randomise(
        image.SwinTransformerBlock(
            dim=12,
            num_heads=3,
            window_size=list(WINDOW),
            shift_size=list(shift),
            attn_layer=video.ShiftedWindowAttention3d,
        )
    )
    block = SwinBlock(num_heads=3, window_size=WINDOW, shift_size=shift)
    x = np.random.default_rng(0).normal(size=(2, *size, 12)).astype(np.float32)
    found = jax.jit(block.apply)({"params": ours(reference)}, jnp.asarray(x))
    assert_close(np.asarray(found), reference(torch.from_numpy(x)), f"{size} shifted by {shift}")
