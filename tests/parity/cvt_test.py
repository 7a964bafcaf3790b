"""CvT beside Hugging Face transformers, on the same random weights and running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.nn.feed_forward import exact_gelu
from jaxlayers.window import Cvt, cvt
from tests.reference_files import check_file, guessed

torch = pytest.importorskip("torch")


SMALL = Cvt(
    num_classes=7,
    patch_size=(7, 3),
    strides=(4, 2),
    embed_dim=(8, 16),
    depths=(2, 2),
    num_heads=(2, 4),
    drop_path_rate=(0.0, 0.0),
    activation_fn=exact_gelu,
)


def randomise(model):
    """Draw every parameter and statistic at a scale at which it shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                # Scales and variances start at one, biases and means at zero.
                tensor.add_(0.2 * noise).abs_() if tensor.min() == 1 else tensor.add_(0.3 * noise)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model.eval()


def state(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def images(*size, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def assert_close(found, expected, what=""):
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    print(f"{what} max |error| {np.abs(found - expected).max():.1e}, max |value| {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=what)
    assert np.std(expected) > 0.1, "the comparison would be empty"


@pytest.fixture
def reference(transformers):
    config = transformers.CvtConfig(
        num_labels=7,
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[8, 16],
        num_heads=[2, 4],
        depth=[2, 2],
        mlp_ratio=[4.0, 4.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    )
    return randomise(transformers.CvtForImageClassification(config))


def run(model, variables, x):
    def both(variables, x):
        return model.apply(variables, x), nn.apply(Cvt.features, model)(variables, x)

    logits, levels = jax.jit(both)(variables, jnp.asarray(x))
    return np.asarray(logits), [np.asarray(level.array) for level in levels]


@torch.no_grad()
def test_cvt_13_equals_huggingface(transformers):
    reference = randomise(transformers.CvtForImageClassification(transformers.CvtConfig(num_labels=1000)))
    model = Cvt(activation_fn=exact_gelu)
    x = images(224, 224, batch=1)
    logits, maps = run(model, cvt.from_reference(state(reference), model, source="huggingface"), x)
    expected = reference(to_torch(x), output_hidden_states=True)
    assert_close(logits, expected.logits, "logits")
    for found, hidden in zip(maps, expected.hidden_states, strict=True):
        assert_close(found, hidden.permute(0, 2, 3, 1), f"stage of width {hidden.shape[1]}")


@torch.no_grad()
@pytest.mark.parametrize("size", [(40, 52), (47, 31)])
def test_other_sizes_equal_huggingface(reference, size):
    variables = cvt.from_reference(state(reference), SMALL, source="huggingface")
    logits, maps = run(SMALL, variables, images(*size))
    expected = reference(to_torch(images(*size)), output_hidden_states=True)
    assert_close(logits, expected.logits)
    for found, hidden in zip(maps, expected.hidden_states, strict=True):
        assert_close(found, hidden.permute(0, 2, 3, 1))
    # Negative control: the official nonlinearity is another network.
    other, _ = run(SMALL.clone(activation_fn=cvt.quick_gelu), variables, images(*size))
    assert np.abs(other - expected.logits.numpy()).max() > 1e-3


@torch.no_grad()
def test_sizes_that_the_reference_truncates_equal_it_on_the_padded_image(reference):
    variables = cvt.from_reference(state(reference), SMALL, source="huggingface")
    x = images(41, 50)
    padded = np.pad(x, [(0, 0), (0, 3), (0, 2), (0, 0)])
    logits, maps = run(SMALL, variables, x)
    assert_close(logits, reference(to_torch(padded)).logits)
    assert maps[0].shape[1:3] == (11, 13)
    assert reference(to_torch(x), output_hidden_states=True).hidden_states[0].shape[2:] == (10, 12)


@torch.no_grad()
def test_training_mode_equals_huggingface_in_output_and_statistics(reference):
    variables = cvt.from_reference(state(reference), SMALL, source="huggingface")
    x = images(32, 32, batch=4)
    evaluated = reference(to_torch(x)).logits.numpy()
    reference.train()
    expected = reference(to_torch(x)).logits.numpy()

    @jax.jit
    def train(variables, x):
        return SMALL.apply(variables, x, deterministic=False, mutable=["batch_stats"])

    logits, updated = train(variables, jnp.asarray(x))
    assert_close(np.asarray(logits), expected, "training")
    assert np.abs(expected - evaluated).max() > 0.1, "batch and running statistics would be alike"
    # torch averages the unbiased variance into the running one, Flax the biased: undo that for each norm.
    after = cvt.from_reference(state(reference), SMALL, source="huggingface")["batch_stats"]
    sides = {0: 8, 1: 4}
    for stage, side in sides.items():
        for block in range(2):
            for name in ("query", "key", "value"):
                path = (f"stages_{stage}", f"blocks_{block}", "attention", f"{name}_projection", "norm")
                old, new, theirs = (tree for tree in (variables["batch_stats"], updated["batch_stats"], after))
                for key in path:
                    old, new, theirs = old[key], new[key], theirs[key]
                np.testing.assert_allclose(new["mean"], theirs["mean"], atol=1e-5)
                count = 4 * (side if name == "query" else side // 2) ** 2
                unbiased = 0.9 * old["var"] + (new["var"] - 0.9 * old["var"]) * count / (count - 1)
                np.testing.assert_allclose(unbiased, theirs["var"], atol=1e-4)
                assert np.abs(old["var"] - theirs["var"]).max() > 1e-3


def test_weights_go_back_to_huggingface(transformers, reference):
    check_file(state(reference), SMALL, "huggingface")
    with torch.device("meta"):
        named = transformers.CvtForImageClassification(transformers.CvtConfig(num_labels=21))
    # Weights are alike for both sizes of images, and the classifier may be of other classes.
    assert guessed(named.state_dict()) == [("cvt_13", "huggingface"), ("cvt_13_384", "huggingface")]
