"""Swin UNETR and its sliding window beside MONAI's, on the same random weights.

MONAI before 1.5 merged other entries of a neighbourhood. The published weights are of that time, so the merging of
then is rebuilt here on MONAI's own interface for one; the order is that of its release 1.4.0.
"""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers.ops.sliding_window import sliding_window
from jaxlayers.window import swin_unetr
from jaxlayers.window.swin_unetr import SwinUNETR
from tests.parity.maxvit_test import assert_close, randomise, state, to_torch
from tests.reference_files import check_file

torch = pytest.importorskip("torch")


@pytest.fixture(scope="session")
def monai(torchvision):
    return pytest.importorskip("monai.networks.nets.swin_unetr")


def old_merging(monai):
    class OldMerging(monai.PatchMergingV2):
        def forward(self, x):
            taken = ["000", "100", "010", "001", "101", "010", "001", "111"]
            parts = [x[:, int(i[0]) :: 2, int(i[1]) :: 2, int(i[2]) :: 2] for i in taken]
            return self.reduction(self.norm(torch.cat(parts, -1)))

    return OldMerging


# Our merging, and what MONAI calls it.
MERGINGS = {"repeated": old_merging, "complete": lambda monai: "merging", "ordered": lambda monai: "mergingv2"}
SMALL = SwinUNETR(num_classes=3, embed_dim=12, depths=(2, 2, 1, 1), num_heads=(1, 2, 3, 4), window_size=(5, 4, 3))


def small(monai, *, merging="repeated", rank=3, version2=False, window=None):
    return randomise(
        monai.SwinUNETR(
            in_channels=2,
            out_channels=3,
            feature_size=12,
            depths=(2, 2, 1, 1),
            num_heads=(1, 2, 3, 4),
            window_size=window or SMALL.window_size[:rank],
            spatial_dims=rank,
            # In 2-D it took each entry once all along.
            downsample=MERGINGS["complete" if rank == 2 else merging](monai),
            use_v2=version2,
        )
    )


def example(*size, batch=1, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *size, 2)).astype(np.float32)


def channels_last(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def names(levels, *, version2):
    """Our modules and MONAI's."""
    found = {"patch_embed": "swinViT.patch_embed", "bottleneck": "encoder10", "head": "out", "": ""}
    for stage in range(levels):
        found[f"stages_{stage}"] = f"swinViT.layers{stage + 1}.0"
        if version2:
            found[f"stages_{stage}/convolution"] = f"swinViT.layers{stage + 1}c.0"
        found[f"stages_{stage}/blocks_0"] = f"swinViT.layers{stage + 1}.0.blocks.0"
        found[f"stages_{stage}/merge"] = f"swinViT.layers{stage + 1}.0.downsample"
        found[f"skips_{stage}"] = f"encoder{stage + 1}"
    for level in range(levels + 1):
        found[f"ups_{level}"] = f"decoder{level + 1}"
        found[f"ups_{level}/block"] = f"decoder{level + 1}.conv_block"
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "merging", "version2"),
    [
        # Maps of 32 x 32 x 32 to 2 x 2 x 2: multiples of the window, others, and clipped in some axes and in all. An
        # instance norm of two entries would enlarge what rounding does to their difference up to 300 times.
        pytest.param((64, 64, 64), "repeated", False, id="3d"),
        pytest.param((64, 64, 32), "complete", True, id="3d version 2"),
        pytest.param((64, 96), "ordered", False, id="2d"),
    ],
)
def test_model_equals_monai_module_by_module(monai, size, merging, version2):
    reference = small(monai, merging=merging, rank=len(size), version2=version2)
    model = SMALL.clone(merging=merging, stage_convolutions=version2, window_size=SMALL.window_size[: len(size)])
    params, x = swin_unetr.from_reference(state(reference), model), example(*size)
    _, captured = jax.jit(lambda p, x: model.apply({"params": p}, x, capture_intermediates=True))(params, x)
    ours = {
        path.removesuffix("__call__").removesuffix("/"): np.asarray(value[0])
        for path, value in flax.traverse_util.flatten_dict(captured["intermediates"], sep="/").items()
        if path.endswith("__call__")
    }
    modules, theirs = dict(reference.named_modules()), {}
    wanted = names(4, version2=version2)
    for path, name in wanted.items():
        modules[name].register_forward_hook(lambda _, __, out, path=path: theirs.__setitem__(path, out))
    encoded = reference.swinViT(to_torch(x))
    reference(to_torch(x))
    for path in wanted:
        last = path.endswith(("blocks_0", "merge"))  # MONAI's have their features last
        assert_close(ours[path], theirs[path].numpy() if last else channels_last(theirs[path]), path)
    levels = jax.jit(lambda p, x: model.apply({"params": p}, x, method="features"))(params, x)
    for level, expected in zip(levels, encoded, strict=True):
        assert_close(np.asarray(level.array), channels_last(expected), f"level of stride {level.stride}")


@torch.no_grad()
def test_the_published_window_at_the_published_size_equals_monai(monai):
    # 96 -> 48, 24, 12, 6: the last stage's maps are smaller than the window of 7, as in the published weights.
    reference = small(monai, rank=2, window=(7, 7))
    model = SMALL.clone(window_size=(7, 7))
    params, x = swin_unetr.from_reference(state(reference), model), example(96, 96)
    expected = channels_last(reference(to_torch(x)))
    assert_close(np.asarray(jax.jit(model.apply)({"params": params}, x)), expected)
    # Negative control: with true offsets in clipped windows the logits are others.
    found = jax.jit(model.clone(table_prefix=False).apply)({"params": params}, x)
    assert np.abs(np.asarray(found) - expected).max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("merging", ["repeated", "ordered"])
def test_the_entries_that_are_merged_show(monai, merging):
    reference = small(monai, merging=merging)
    model = SMALL.clone(merging=merging)
    params, x = swin_unetr.from_reference(state(reference), model), example(64, 32, 32)
    expected = [channels_last(level) for level in reference.swinViT(to_torch(x))]
    for name in MERGINGS:
        apply = jax.jit(lambda p, x, name=name: model.clone(merging=name).apply({"params": p}, x, method="features"))
        found = [np.asarray(level.array) for level in apply(params, x)]
        assert_close(found[0], expected[0])
        if name == merging:
            assert_close(found[1], expected[1])
        else:
            assert np.abs(found[1] - expected[1]).max() > 1e-2


def test_monai_refuses_what_ours_pads(monai):
    reference = small(monai, rank=2)
    with pytest.raises(ValueError, match="must be divisible by"), torch.no_grad():
        reference(to_torch(example(64, 40)))
    model = SMALL.clone(window_size=SMALL.window_size[:2])
    params = swin_unetr.from_reference(state(reference), model)
    assert jax.eval_shape(model.apply, {"params": params}, example(64, 40)).shape == (1, 64, 40, 3)


def test_a_checkpoint_of_another_model_is_refused(monai):
    tensors = state(small(monai, rank=2))
    model = SMALL.clone(window_size=SMALL.window_size[:2])
    with pytest.raises(ValueError, match="missing"):
        swin_unetr.from_reference(tensors, model.clone(stage_convolutions=True))
    with pytest.raises(ValueError, match="source='timm' must be one of"):
        swin_unetr.from_reference(tensors, model, source="timm")


@torch.no_grad()
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
@pytest.mark.parametrize(
    ("space", "size", "overlap"),
    [((20, 17), (8, 8), 0.5), ((11, 12, 9), (4, 6, 5), 0.25), ((5, 13, 7), (8, 4, 7), 0.6)],
    ids=str,
)
def test_sliding_window_equals_monai(mode, space, size, overlap):
    inferers = pytest.importorskip("monai.inferers")
    x, ramp = example(*space, batch=2), example(*size)

    def theirs(patch):
        return torch.sin(patch * to_torch(ramp))

    expected = inferers.sliding_window_inference(
        to_torch(x), size, sw_batch_size=3, predictor=theirs, overlap=overlap, mode=mode
    )
    found = sliding_window(
        lambda patch: jnp.sin(patch * ramp), jnp.asarray(x), size, overlap=overlap, mode=mode, batch=3
    )
    error = np.abs(np.asarray(found) - channels_last(expected)).max()
    print(f"max |error| {error:.1e}")
    assert error < 1e-5


def test_weights_go_back_to_monai(monai):
    volumes = (jax.ShapeDtypeStruct((1, 64, 64, 64, 2), jnp.float32),)
    check_file(state(small(monai)), SMALL, "monai", inputs=volumes)
    # Two axes, and convolutions before the stages.
    plane = SMALL.clone(window_size=SMALL.window_size[:2], stage_convolutions=True)
    reference = small(monai, rank=2, version2=True)
    check_file(state(reference), plane, "monai", inputs=(jax.ShapeDtypeStruct((1, 64, 64, 2), jnp.float32),))
