"""Convolutional backbones and convolutions with a twist, one paper a file."""

from jaxlayers.conv.convnext import ConvNeXt as ConvNeXt
from jaxlayers.conv.convnext import ConvNeXtBlock as ConvNeXtBlock
from jaxlayers.conv.convnext import GlobalResponseNorm as GlobalResponseNorm
