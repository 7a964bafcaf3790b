"""ShiftViT beside the authors' code, run once with random parameters; its numbers are stored."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.window import ShiftViT, shiftvit

GOLDEN = Path(__file__).parent.parent / "golden" / "shiftvit_parity.npz"
MODEL = ShiftViT(num_classes=7, embed_dim=10, depths=(2, 3), mlp_ratio=2.0, divisions=5, drop_path_rate=0.0)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        assert "microsoft/SPACH" in str(stored["provenance"])
        return dict(stored)


def run(model, golden):
    tensors = {
        name.removeprefix("parameter:"): value for name, value in golden.items() if name.startswith("parameter:")
    }
    params = shiftvit.from_reference(tensors, model)
    x = jnp.asarray(np.moveaxis(golden["images"], 1, -1))
    both = jax.jit(lambda v, x: (model.apply(v, x), nn.apply(ShiftViT.features, model)(v, x)))
    logits, levels = both({"params": params}, x)
    return logits, [level.array for level in levels]


def test_logits_and_maps_equal_the_authors_code(golden):
    logits, maps = run(MODEL, golden)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5 * np.abs(golden["logits"]).max())
    for index, found in enumerate(maps):
        expected = np.moveaxis(golden[f"map_{index}"], 1, -1)
        error = np.abs(found - expected).max()
        print(f"map {index}: max |error| {error:.1e}, max |value| {np.abs(expected).max():.2f}")
        assert error < 1e-5 * np.abs(expected).max()
    print(f"logits: max |error| {np.abs(logits - golden['logits']).max():.1e}")
    assert np.std(golden["logits"]) > 0.1


def test_another_division_is_another_network(golden):
    # Negative control: parameters fit, only which features move differs.
    logits, _ = run(MODEL.clone(divisions=10), golden)
    assert np.abs(logits - golden["logits"]).max() > 0.05
