"""Every dialect of ConvNeXt and ConvNeXt V2, there and back."""

import pytest

from jaxlayers.conv import ConvNeXt, GlobalResponseNorm, convnext
from tests.round_trip import check_dialect

FIRST = ConvNeXt(num_classes=3, depths=(1, 2), widths=(8, 12), patch_size=2)
SECOND = FIRST.clone(layer_scale=None, response_norm=GlobalResponseNorm)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *((FIRST, name) for name in ("timm", "official", "torchvision", "huggingface")),
        *((SECOND, name) for name in ("timm", "official", "huggingface_v2")),
    ],
)
def test_there_and_back(model, name):
    check_dialect(model, name)


def test_names_alone_tell_the_dialects():
    assert {one.name for one in convnext.DIALECTS} == set(convnext.REFERENCE_NAMES)
    # Negative control: names of one are not those of another.
    dialects = {one.name: one for one in convnext.DIALECTS}
    timm = ["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"]
    assert dialects["timm"].fits(timm)
    assert not any(one.fits(timm) for name, one in dialects.items() if name != "timm")
