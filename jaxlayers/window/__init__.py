"""Hierarchical vision transformers and other layers that mix tokens inside windows, one paper a file."""

from jaxlayers.window.crossvit import CrossFusion as CrossFusion
from jaxlayers.window.crossvit import CrossViT as CrossViT
from jaxlayers.window.cvt import ConvAttention as ConvAttention
from jaxlayers.window.cvt import ConvProjection as ConvProjection
from jaxlayers.window.cvt import ConvTokenEmbed as ConvTokenEmbed
from jaxlayers.window.cvt import Cvt as Cvt
from jaxlayers.window.cvt import CvtBlock as CvtBlock
from jaxlayers.window.shiftvit import ShiftViT as ShiftViT
from jaxlayers.window.shiftvit import ShiftViTBlock as ShiftViTBlock
from jaxlayers.window.simmim import SimMIM as SimMIM
from jaxlayers.window.swin import PatchMerging as PatchMerging
from jaxlayers.window.swin import Swin as Swin
from jaxlayers.window.swin import SwinBlock as SwinBlock
from jaxlayers.window.swin import WindowAttention as WindowAttention
from jaxlayers.window.swin_v2 import ContinuousPositionBias as ContinuousPositionBias
from jaxlayers.window.swin_v2 import CosineWindowAttention as CosineWindowAttention
from jaxlayers.window.swin_v2 import PatchMergingV2 as PatchMergingV2
from jaxlayers.window.swin_v2 import SwinV2 as SwinV2
from jaxlayers.window.swin_v2 import SwinV2Block as SwinV2Block
from jaxlayers.window.tnt import TNT as TNT
from jaxlayers.window.tnt import TNTBlock as TNTBlock
