"""SimMIM beside Hugging Face transformers, on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.window import SimMIM, Swin, SwinV2, simmim
from tests.parity.swin_test import randomise, state, to_torch
from tests.reference_files import check_file

torch = pytest.importorskip("torch")

SIZE = 64
SHAPE = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 5}
# Our encoder, their name, the source of the names in memory.
KINDS = {"v1": (Swin, "Swin", "huggingface_5"), "v2": (SwinV2, "Swinv2", "huggingface")}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def reference(transformers, kind):
    config = getattr(transformers, f"{kind[1]}Config")(image_size=SIZE, num_channels=3, encoder_stride=8, **SHAPE)
    return randomise(getattr(transformers, f"{kind[1]}ForMaskedImageModeling")(config))


@pytest.fixture(scope="module")
def found(reference, kind):
    """Return images, masks, and our reconstruction from the reference's weights."""
    model = SimMIM(kind[0](num_classes=0, **SHAPE))
    params = simmim.from_reference(state(reference), model, source=kind[2])
    x = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    masked = simmim.random_mask(jax.random.key(0), (2,), (SIZE, SIZE), mask_patch_size=16)
    return x, masked, jax.jit(model.apply)({"params": params}, jnp.asarray(x), masked)


def theirs(reference, x, masked):
    tokens = torch.from_numpy(np.array(masked).reshape(len(x), -1))
    with torch.no_grad():
        return reference(to_torch(x), bool_masked_pos=tokens)


def test_reconstruction_and_loss_equal_huggingface(reference, found):
    x, masked, out = found
    expected = theirs(reference, x, masked)
    picture = np.moveaxis(expected.reconstruction.numpy(), 1, -1)
    print(f"reconstruction: max |error| {np.abs(out - picture).max():.1e}, max |value| {np.abs(picture).max():.2f}")
    np.testing.assert_allclose(out, picture, rtol=0, atol=1e-5)
    assert np.std(picture) > 0.1, "the comparison would be empty"
    loss = float(simmim.masked_l1(jnp.asarray(x), out, masked).mean())
    print(f"loss: {loss:.7f} and {float(expected.loss):.7f}")
    assert loss == pytest.approx(float(expected.loss), abs=1e-5)


def test_another_mask_is_another_reconstruction(reference, found):
    # Negative control: the comparison above tells masks apart.
    x, masked, out = found
    other = np.moveaxis(theirs(reference, x, ~np.asarray(masked)).reconstruction.numpy(), 1, -1)
    assert np.abs(out - other).max() > 0.1


def test_weights_go_back_to_huggingface(reference, kind):
    check_file(state(reference), SimMIM(kind[0](num_classes=0, **SHAPE)), kind[2])


def test_files_that_huggingface_writes_go_back(reference, kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    reference.save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    check_file(tensors, SimMIM(kind[0](num_classes=0, **SHAPE)), "huggingface")
