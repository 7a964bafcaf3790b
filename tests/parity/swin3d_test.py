"""Swin3D beside the authors' code, run once with random parameters; its numbers are stored."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlayers.window.swin3d as swin3d
from jaxlayers.window.swin3d import Swin3D

GOLDEN = Path(__file__).parent.parent / "golden" / "swin3d_parity.npz"
MODELS = {
    "full": Swin3D(
        num_classes=5,
        embed_dim=(8, 8, 16),
        depths=(2, 2, 1),
        num_heads=(1, 2, 2),
        window_sizes=(3, 3, 2),
        strides=(3, 2),
        quant_sizes=(2, 4, 4),
        chunk_size=16,
    )
}
# Without normals and without attention in the decoder.
MODELS["plain"] = MODELS["full"].clone(quant_sizes=(2, 4), up_attention=False)


def parameters(golden, seed):
    """The tensors of the run: drawn in the order of their names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, text in zip(golden["names"], golden["shapes"], strict=True):
        shape = tuple(int(length) for length in text.split("x"))
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.3 * rng.normal(size=shape) + (1.0 if name.endswith("weight") and len(shape) == 1 else 0.0)
        tensors[str(name)] = value.astype(np.float32)
    return tensors


def padded(golden, length=150):
    """The scenes as padded lists, and where the voxels of each lie in the stored lists."""
    batch = golden["coordinates"][:, 0]
    places = [np.flatnonzero(batch == scene) for scene in range(2)]

    def pad(array):
        return jnp.asarray(np.stack([np.pad(array[one], [(0, length - len(one)), (0, 0)]) for one in places]))

    coordinates = pad(golden["coordinates"][:, 1:].astype(np.int32))
    mask = jnp.stack([jnp.arange(length) < len(one) for one in places])
    return (pad(golden["features"]), coordinates, pad(golden["signals"]), mask), places


@pytest.fixture(scope="module", params=MODELS)
def run(request):
    with np.load(GOLDEN) as stored:
        assert "microsoft/Swin3D" in str(stored["provenance"])
        prefix = f"{request.param}:"
        golden = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    model = MODELS[request.param]
    variables = swin3d.from_reference(parameters(golden, list(MODELS).index(request.param)), model)
    scenes, places = padded(golden)
    both = jax.jit(lambda v, *scene: (model.apply(v, *scene), nn.apply(Swin3D.features, model)(v, *scene)))
    return golden, places, *both(variables, *scenes)


def test_logits_equal_the_authors_code(run):
    golden, places, logits, _ = run
    for scene, one in enumerate(places):
        expected = golden["logits"][one]
        np.testing.assert_allclose(
            logits[scene, : len(one)], expected, rtol=0, atol=1e-5 * np.abs(golden["logits"]).max()
        )
        assert not np.any(logits[scene, len(one) :])


def test_every_stage_has_the_voxels_and_features_of_the_authors_code(run):
    golden, _, _, levels = run
    assert [level.stride for level in levels] == [(1,) * 3, (3,) * 3, (6,) * 3]
    for index, level in enumerate(levels):
        stored = golden[f"level_{index}_coordinates"]
        for scene in range(2):
            theirs = np.flatnonzero(stored[:, 0] == scene)
            expected = {
                tuple(int(c) // level.stride[0] for c in stored[place, 1:]): golden[f"level_{index}_features"][place]
                for place in theirs
            }
            held = np.asarray(level.mask[scene])
            found = {
                tuple(int(c) for c in coordinate): value
                for coordinate, value in zip(
                    np.asarray(level.coordinates[scene])[held], np.asarray(level.array[scene])[held], strict=True
                )
            }
            assert found.keys() == expected.keys()
            largest = max(np.abs(value).max() for value in expected.values())
            for key, value in expected.items():
                np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-5 * largest)
