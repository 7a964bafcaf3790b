"""Layers whose claim is a symmetry: one file a paper."""

from jaxlayers.equivariant.equivariant_transformers import ComposedTransformer as ComposedTransformer
from jaxlayers.equivariant.equivariant_transformers import EquivariantTransformer as EquivariantTransformer
from jaxlayers.equivariant.equivariant_transformers import PosePredictor as PosePredictor
from jaxlayers.equivariant.fernn import ConvCell as ConvCell
from jaxlayers.equivariant.fernn import FlowClassifier as FlowClassifier
from jaxlayers.equivariant.fernn import FlowEquivariantCell as FlowEquivariantCell
from jaxlayers.equivariant.fernn import FlowEquivariantRNN as FlowEquivariantRNN
from jaxlayers.equivariant.fernn import FlowForecaster as FlowForecaster
from jaxlayers.equivariant.frame_averaging import FrameAveraging as FrameAveraging
from jaxlayers.equivariant.frame_averaging import FrameGNN as FrameGNN
from jaxlayers.equivariant.frame_averaging import ParticleGNN as ParticleGNN
from jaxlayers.equivariant.frame_averaging import PointNet as PointNet
from jaxlayers.equivariant.frame_averaging import frame_pointnet as frame_pointnet
from jaxlayers.equivariant.irl_inr import IRLINR as IRLINR
from jaxlayers.equivariant.orthogonal_moments import MomentInvariants as MomentInvariants
from jaxlayers.equivariant.orthogonal_moments import MomentNet as MomentNet
from jaxlayers.equivariant.rics import RICS as RICS
from jaxlayers.equivariant.scattering import DeepScattering as DeepScattering
from jaxlayers.equivariant.scattering import MorletScattering as MorletScattering
from jaxlayers.equivariant.scattering import ScatteringNet as ScatteringNet
from jaxlayers.equivariant.spatial_transformer import SpatialTransformer as SpatialTransformer
