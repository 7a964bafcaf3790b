"""RMT beside the authors' code, run once with random parameters; its numbers are stored."""

from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.window import rmt
from jaxlayers.window.rmt import RMT, log_gammas, rotate_by_index

GOLDEN = Path(__file__).parent.parent / "golden" / "rmt_parity.npz"
MODEL = RMT(
    num_classes=5,
    embed_dim=(8, 12, 16),
    depths=(1, 2, 1),
    num_heads=(2, 3, 4),
    mlp_ratio=(2.0, 1.5, 1.0),
    decomposed=(True, False, True),
    decays=((2.0, 4.0), (1.0, 5.0), (2.0, 6.0)),
    layer_scale=(None, 1e-6, None),
    head_features=20,
)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        assert "qhfan/RMT" in str(stored["provenance"])
        return dict(stored)


def part(golden, kind):
    return {name.removeprefix(kind): value for name, value in golden.items() if name.startswith(kind)}


@pytest.fixture(scope="module")
def variables(golden):
    return rmt.from_reference(part(golden, "parameter:"), MODEL)


@pytest.fixture(scope="module")
def run(golden, variables):
    """Logits, pyramid and what every module gives."""

    @jax.jit
    def both(variables, x):
        logits, state = MODEL.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        return logits, nn.apply(RMT.features, MODEL)(variables, x), state["intermediates"]

    logits, levels, captured = both(variables, jnp.asarray(golden["images"]))
    flat = flax.traverse_util.flatten_dict(captured, sep="/")
    outputs = {path.removesuffix("/__call__"): one[0] for path, one in flat.items() if path.endswith("__call__")}
    return logits, levels, outputs


def assert_near(found, expected, what):
    error, scale = np.abs(np.asarray(found) - expected).max(), np.abs(expected).max()
    print(f"{what}: max |error| {error:.1e}, max |value| {scale:.2f}")
    assert error < 1e-5 * scale, what


def test_logits_and_maps_equal_the_authors_code(golden, run):
    logits, levels, _ = run
    assert_near(logits, golden["logits"], "logits")
    for level, name in zip(levels, ("stages_0/blocks_0", "stages_1/blocks_1", "stages_2/blocks_0"), strict=True):
        assert_near(level.array, golden[f"output:{name}"], name)
    assert np.std(golden["logits"]) > 0.1


def test_every_module_equals_the_authors(golden, run):
    expected = part(golden, "output:")
    kinds = {"patch_embed", "downsample", "position", "attention", "feed_forward", "blocks_0", "blocks_1", "projection"}
    assert {name.rpartition("/")[2] for name in expected} == kinds
    for name, value in expected.items():
        assert_near(run[2][name], value, name)


def test_gammas_and_angles_equal_the_authors(golden):
    for stage, (heads, decay) in enumerate(zip(MODEL.num_heads, MODEL.decays, strict=True)):
        stored = golden[f"parameter:layers.{stage}.Relpos.decay"]
        np.testing.assert_allclose(log_gammas(heads, decay), stored, rtol=2e-6)
        angles = golden[f"parameter:layers.{stage}.Relpos.angle"]
        # The second token of a row is turned by the angles themselves.
        pairs = jnp.tile(jnp.array([1.0, 0.0]), angles.size // 2)
        found = np.asarray(rotate_by_index(jnp.stack([pairs, pairs])[None, None, :, None]))[0, 0, 1, 0]
        np.testing.assert_allclose(found[::2], np.cos(angles[::2]), atol=1e-6)
        np.testing.assert_allclose(found[1::2], np.sin(angles[1::2]), atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"decomposed": (True, True, True)},
        {"decay_after_softmax": True},
        {"decays": ((2.0, 4.0), (2.0, 5.0), (2.0, 6.0))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_choice_is_another_network(golden, variables, change):
    # Negative controls: the parameters fit, only what follows from the fields differs.
    logits = jax.jit(MODEL.clone(**change).apply)(variables, jnp.asarray(golden["images"]))
    assert np.abs(logits - golden["logits"]).max() > 1e-3 * np.abs(golden["logits"]).max()
