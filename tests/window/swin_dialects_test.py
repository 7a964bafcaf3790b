"""Every dialect of Swin and Swin V2, there and back."""

import pytest

from jaxlayers.window import Swin, SwinV2
from tests.round_trip import check_dialect

SMALL = {"embed_dim": 8, "depths": (1, 2), "num_heads": (2, 2), "window_size": 2, "patch_size": 2, "num_classes": 3}


@pytest.mark.parametrize("name", ["timm", "official", "torchvision", "huggingface", "huggingface_5"])
def test_swin_there_and_back(name):
    check_dialect(Swin(**SMALL), name, beside=("layers.0.blocks.0.attn.relative_position_index",))


@pytest.mark.parametrize("name", ["timm", "official", "huggingface"])
def test_swin_v2_there_and_back(name):
    check_dialect(SwinV2(**SMALL), name, beside=("layers.0.blocks.0.attn.relative_coords_table",))
