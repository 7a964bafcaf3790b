"""Hierarchical vision transformers and other layers that mix tokens inside windows, one paper a file."""

from jaxlayers.window.swin import PatchMerging as PatchMerging
from jaxlayers.window.swin import Swin as Swin
from jaxlayers.window.swin import SwinBlock as SwinBlock
from jaxlayers.window.swin import WindowAttention as WindowAttention
