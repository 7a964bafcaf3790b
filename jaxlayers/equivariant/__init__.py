"""Layers whose claim is a symmetry: one file a paper."""

from jaxlayers.equivariant.equivariant_transformers import ComposedTransformer as ComposedTransformer
from jaxlayers.equivariant.equivariant_transformers import EquivariantTransformer as EquivariantTransformer
from jaxlayers.equivariant.equivariant_transformers import PosePredictor as PosePredictor
from jaxlayers.equivariant.frame_averaging import FrameAveraging as FrameAveraging
from jaxlayers.equivariant.frame_averaging import FrameGNN as FrameGNN
from jaxlayers.equivariant.frame_averaging import ParticleGNN as ParticleGNN
from jaxlayers.equivariant.frame_averaging import PointNet as PointNet
from jaxlayers.equivariant.frame_averaging import frame_pointnet as frame_pointnet
from jaxlayers.equivariant.rics import RICS as RICS
from jaxlayers.equivariant.spatial_transformer import SpatialTransformer as SpatialTransformer
