"""Every dialect of the window family beside Swin's: there and back."""

import functools

import jax
import pytest

from jaxlayers import create_model, pretrained
from jaxlayers.core import dialects
from jaxlayers.window.att_swin_unet import AttSwinUNet, CrossContextualAttention
from jaxlayers.window.axial_resnet import AxialResNet
from jaxlayers.window.crossvit import CrossViT
from jaxlayers.window.cvt import Cvt
from jaxlayers.window.drct import DRCT, ResidualDenseGroup
from jaxlayers.window.hiera import Hiera
from jaxlayers.window.maxim import Maxim
from jaxlayers.window.maxvit import MaxViT
from jaxlayers.window.rmt import RMT
from jaxlayers.window.shiftvit import ShiftViT
from jaxlayers.window.simmim import SimMIM
from jaxlayers.window.styleswin import StyleSwin
from jaxlayers.window.styleswin_discriminator import WaveletDiscriminator
from jaxlayers.window.swin import Swin
from jaxlayers.window.swin3d import Swin3D
from jaxlayers.window.swin_unetr import SwinUNETR
from jaxlayers.window.swin_v2 import SwinV2
from jaxlayers.window.swinface import SwinFace
from jaxlayers.window.tnt import TNT
from jaxlayers.window.vit_resnas import ViTResNAS
from tests.round_trip import as_tensors, check_dialect, random_tensors

ENCODER = {"num_classes": 0, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 3}
CROSS = CrossViT(
    image_size=(60, 60),
    num_classes=7,
    image_scale=(1.0, 0.8),
    embed_dim=(16, 32),
    depths=(1, 2),
    num_heads=(2, 4),
    num_encoders=2,
)
CVT = Cvt(
    num_classes=7,
    patch_size=(7, 3),
    strides=(4, 2),
    embed_dim=(8, 16),
    depths=(2, 2),
    num_heads=(2, 4),
    drop_path_rate=(0.0, 0.0),
)
HIERA = Hiera(image_size=(64, 96), embed_dim=8, depths=(1, 2, 2, 1), num_heads=2, num_classes=7)
VIDEO = HIERA.clone(image_size=(6, 64, 32), patch_size=(3, 7, 7), patch_stride=(2, 4, 4), mask_unit_size=(1, 8, 8))
GRIDS = MaxViT(
    num_classes=7, stem_features=8, embed_dim=(8, 16), depths=(1, 1), head_dim=8, window_size=(2, 3), grid_size=(3, 2)
)
WORDS = TNT(image_size=48, embed_dim=(8, 24), depth=2, num_heads=(2, 3), num_classes=7)
VOLUMES = SwinUNETR(num_classes=3, embed_dim=4, num_heads=(1, 1, 2, 2), window_size=(2, 2, 2), stage_convolutions=True)
RETENTION = RMT(
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
SHIFTS = ShiftViT(num_classes=7, embed_dim=10, depths=(2, 3), mlp_ratio=2.0, divisions=5)
SEARCHED = ViTResNAS(
    num_classes=7,
    image_size=56,
    stem_features=8,
    embed_dim=(12, 16, 24),
    head_dim=(4, 6, 8),
    num_heads=((3, 3), (3,), (2, 2)),
    hidden_features=((20, 20), (24,), (40, 40)),
    patch_output=True,
)
AXES = AxialResNet(num_classes=7, embed_dim=8, depths=(1, 2, 1, 1), num_heads=4)
CROSSED = AttSwinUNet(
    num_classes=9,
    embed_dim=8,
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 4, 4),
    window_size=2,
    mlp_ratio=2.0,
    skip="cross_contextual",
    cross_attention=functools.partial(CrossContextualAttention, first_token=True),
)
DENSE = DRCT(
    scale=4,
    embed_dim=8,
    num_groups=1,
    num_heads=2,
    window_size=4,
    group=functools.partial(ResidualDenseGroup, growth=3),
)
FACES = SwinFace(
    Swin(num_classes=0, patch_size=2, depths=(1, 2, 1, 1), window_size=4),
    groups=((("first", 2),), (("second", 1), ("third", 2))),
    embedding_features=16,
)
SMALL_FACES = SwinFace(
    Swin(**{**ENCODER, "patch_size": 2}),
    groups=((("one", 1),), (("two", 2),)),
    features=12,
    embedding_features=5,
    reduction=2,
)
GATED = Maxim(features=4, window_size=(4, 2), grid_size=(4, 2), num_stages=3, num_scales=2, depth=2, bottleneck_depth=2)
STYLE = StyleSwin(
    features=(8, 4), num_heads=(2, 2), style_features=6, mapping_depth=2, depth=1, window_size=4, mlp_ratio=2.0
)
SPARSE = Swin3D(
    num_classes=5,
    embed_dim=(8, 8, 16),
    depths=(2, 2, 1),
    num_heads=(1, 2, 2),
    window_sizes=(3, 3, 2),
    strides=(3, 2),
    quant_sizes=(2, 4, 4),
    chunk_size=16,
)
COUNT = "norm.num_batches_tracked"
INDEX = "layers.0.blocks.0.attn.relative_position_index"

# Models with the name of a dialect, and names that the reference stores beside.
THERE_AND_BACK = {
    "simmim_official": (SimMIM(Swin(**ENCODER)), "official", (f"encoder.{INDEX}",)),
    "simmim_official_v2": (SimMIM(SwinV2(**ENCODER)), "official", ()),
    "simmim_huggingface": (SimMIM(Swin(**ENCODER)), "huggingface", ()),
    "simmim_huggingface_v2": (SimMIM(SwinV2(**ENCODER)), "huggingface", ()),
    "simmim_huggingface_5": (SimMIM(Swin(**ENCODER)), "huggingface_5", ()),
    "crossvit_timm": (CROSS.clone(num_encoders=1), "timm", ()),
    "crossvit_timm_dagger": (CROSS.clone(num_encoders=1, conv_embed=True), "timm", ()),
    "crossvit_official": (CROSS.clone(num_encoders=1), "official", ()),
    "cvt_huggingface": (CVT, "huggingface", (COUNT,)),
    "cvt_official": (CVT, "official", (COUNT,)),
    "hiera_timm": (HIERA, "timm", ()),
    "hiera_timm_video": (VIDEO, "timm", ()),
    "hiera_official": (HIERA, "official", ()),
    "hiera_huggingface": (HIERA, "huggingface", ()),
    "maxvit_timm": (GRIDS, "timm", (COUNT,)),
    "tnt_timm": (WORDS.clone(depth=1), "timm", ()),
    "tnt_official": (WORDS.clone(depth=1), "official", ("outer_tokens",)),
    "swin_unetr_monai": (VOLUMES, "monai", ("swinViT.layers1.0.blocks.0.attn.relative_position_index",)),
    "rmt_official": (RETENTION, "official", (COUNT, "layers.0.Relpos.angle", "layers.0.Relpos.decay")),
    "shiftvit_official": (SHIFTS, "official", ()),
    "vit_resnas_official": (SEARCHED.clone(patch_output=False), "official", (COUNT, "patch_head.weight")),
    "axial_resnet_official": (AXES.clone(depths=(1, 1)), "official", (COUNT, "layer1.0.hight_block.flatten_index")),
    "att_swin_unet_published": (
        CROSSED,
        "published",
        (f"encoder.{INDEX}", "patch_embed.proj.bias", "decoder.norm.bias"),
    ),
    "drct_official": (DENSE.clone(num_groups=2), "official", ("layers.0.swin2.attn_mask",)),
    "drct_official_x3": (DENSE.clone(scale=3), "official", ()),
    "swinface_official": (
        SMALL_FACES,
        "official",
        ("epoch", "state_dict_softmax_fc.weight", "state_dict_backbone.head.bias"),
    ),
    "swinface_official_module": (SMALL_FACES, "official_module", (f"backbone.{INDEX}",)),
    # The other one, of names without what stands before them, is compared with the public code's below.
    "maxim_official": (
        GATED.clone(num_stages=2, num_scales=1, depth=1, bottleneck_depth=1),
        "official",
        ("opt/state/step",),
    ),
    "styleswin_official": (STYLE, "official", ("to_rgbs.1.upsample.kernel", "layers.1.blocks.0.attn_mask2")),
    "styleswin_discriminator_official": (WaveletDiscriminator(features=(4, 6)), "official", ("dwt.ll",)),
    "swin3d_official": (SPARSE, "official", ("classifier.1.num_batches_tracked",)),
}


@pytest.mark.parametrize("case", THERE_AND_BACK)
def test_there_and_back(case):
    model, name, beside = THERE_AND_BACK[case]
    check_dialect(model, name, beside=beside)


def test_configs_of_hugging_face_name_the_model():
    for config, module in (({"model_type": "cvt"}, Cvt), ({"model_type": "hiera"}, Hiera)):
        name, fields = pretrained.from_huggingface(config)
        model = create_model(name, **fields)
        assert type(model) is module
        # What it omits is what transformers has by default.
        published = create_model(name)
        shapes = [
            dialects.shapes_of(one, pretrained.default_inputs(one))
            for one in (model.clone(num_classes=1000), published)
        ]
        assert shapes[0] == shapes[1]
        assert model.num_classes == 2
    with pytest.raises(ValueError, match="must begin with all that are true"):
        pretrained.from_huggingface({"model_type": "hiera", "masked_unit_attention": [False, True]})
    with pytest.raises(ValueError, match="must be alike in all stages"):
        pretrained.from_huggingface({"model_type": "cvt", "stride_kv": [2, 1]})


def test_both_classifiers_and_both_stems_of_crossvit_are_fitted():
    layout = pretrained.layout_of(CROSS, pretrained.find_dialect(None, CROSS, "timm"))
    grey = tuple(jax.ShapeDtypeStruct((*x.shape[:-1], 1), x.dtype) for x in pretrained.default_inputs(CROSS))
    wide = CROSS.clone(num_classes=CROSS.num_classes + 2)
    found = pretrained.convert_tensors(as_tensors(random_tensors(layout)), wide, inputs=grey)
    assert len(found.report.changed) == 3, "classes once for both, a kernel for each"
    fresh = [path for path in found.report.fresh if path.endswith("kernel")]
    assert len(fresh) == 2
    shapes = dialects.shapes_of(wide, grey)
    assert jax.tree.map(lambda leaf: leaf.shape, dict(found.variables)) == jax.tree.map(lambda leaf: leaf.shape, shapes)
