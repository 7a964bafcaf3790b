"""The references' names and layouts of the equivariant models, there and back: random tensors, and the references'.

The references' tensors are those of the golden files, whose own tests say how they were made.
"""

import functools
import json

import flax.linen as nn
import numpy as np
import pytest

from jaxlayers import pretrained
from jaxlayers.equivariant.egnn import EGNN, EGNNLayer
from jaxlayers.equivariant.frame_averaging import FrameGNN, ParticleGNN
from jaxlayers.equivariant.graph_polynomials import PPGN, PPGNBlock
from jaxlayers.equivariant.gta import GTA, PoseBlocks
from jaxlayers.equivariant.lie_conv import LieResNet
from jaxlayers.equivariant.parot import PaRotClassifier, PaRotSegmenter
from jaxlayers.equivariant.repast import RePAST
from jaxlayers.equivariant.risurconv import Level, Rise, RISurConvClassifier, RISurConvSegmenter
from jaxlayers.equivariant.se3_assembly import SE3Assembly, se3_assembly
from jaxlayers.equivariant.set_transformer import SetTransformer
from jaxlayers.equivariant.vn_dgcnn import VNDGCNN, VNDGCNNEncoder, VNDGCNNSegmentation, vn_dgcnn, vn_dgcnn_segmentation
from jaxlayers.equivariant.vn_pointnet import VNPointNet, VNPointNetSegmentation
from jaxlayers.geometry.cameras import Views
from tests.equivariant.vector_neurons_test import reference_weights
from tests.reference_files import check_file, shaped, stored
from tests.round_trip import as_tensors, check_dialect

BATCH_NORM = {"norm": functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)}
PLUS = functools.partial(PPGNBlock, extended=True)
GATED = functools.partial(EGNNLayer, attention=True)

PARTICLES = shaped((2, 5, 3), (2, 5, 1), (2, 5, 3), (2, 5, 4, 2))
MOLECULES = shaped((2, 5, 3), (2, 5, 3))


def seen(views, tokens):
    """Return where tokens of some views sit."""
    return Views(*shaped((2, views, 4, 4), (2, tokens, 2), (2, tokens, 3)))


SELF = (*shaped((2, 12, 12)), seen(3, 12))
CROSS = (*shaped((2, 4, 12)), seen(2, 4), *shaped((2, 12, 10)), seen(3, 12))
POSES, RAYS = GTA(2, PoseBlocks(se3=8, so2=8)), RePAST(2, 6, origin_octaves=(-5, 6), direction_octaves=(0, 6))
SETS = SetTransformer(8, 5, num_outputs=3, num_heads=2, num_inducing=4)
POLYNOMIALS = PPGN(features=6, depth=2, num_outputs=2, block=PLUS)
LIE = LieResNet(2, "SE(3)", (8, 8, 8), norm=None)

# Our module, the name of the dialect, inputs where fields do not show them, and the reference's tensors: a golden file
# and what stands before their names in it.
STORED = {
    "egnn_nbody": (EGNN(12, 3), "nbody", PARTICLES, "egnn", "velocity/weights/"),
    "egnn_clean": (
        EGNN(12, 2, output="both", num_outputs=4, layer=GATED),
        "clean",
        MOLECULES,
        "egnn",
        "clean/weights/",
    ),
    "egnn_qm9": (
        EGNN(12, 2, output="graph", update_positions=False, node_attributes=True, layer=GATED),
        "qm9",
        MOLECULES,
        "egnn",
        "qm9/weights/",
    ),
    "gta": (POSES, "official", SELF, "gta", "weights_only/self/weights/"),
    "gta_cross": (POSES, "official_cross", CROSS, "gta", "weights_only/cross/weights/"),
    "repast": (RAYS, "reimplementation", SELF, "repast", "plain/self/weights/"),
    "repast_values": (RAYS.clone(pose_values=True), "reimplementation", CROSS, "repast", "values/cross/weights/"),
    "frame_averaging": (
        FrameGNN(ParticleGNN(features=12, depth=3)),
        "official",
        shaped((3, 5, 3), (3, 5, 3), (3, 5, 1)),
        "frame_averaging",
        "weights/",
    ),
    "set_transformer": (SETS, "official", shaped((2, 7, 3)), "set_transformer", "plain/weights/"),
    "set_transformer_norms": (
        SETS.clone(norm=functools.partial(nn.LayerNorm, epsilon=1e-5)),
        "official",
        shaped((2, 7, 3)),
        "set_transformer",
        "norm/weights/",
    ),
    "graph_polynomials": (POLYNOMIALS, "official", shaped((2, 5, 5, 3)), "graph_polynomials", "plus/weights/"),
    "lie_conv": (LIE, "official", shaped((2, 5, 3), (2, 5, 3)), "lie_conv", "SE(3)/weights/"),
}


@pytest.mark.parametrize("case", STORED)
def test_weights_of_the_references_there_and_back(case):
    model, name, inputs, file, prefix = STORED[case]
    check_file(stored(file, prefix), model, name, inputs=inputs)
    if case != "lie_conv":  # which has biases that must be zero
        check_dialect(model, name, inputs=inputs, beside=("gcl_0.coords_range",) if "egnn" in case else ())


ENCODER = VNDGCNNEncoder(stages=((4,), (4, 4)), embed_features=4, num_neighbors=6)
WIDTHS = {
    "embed_features": 8,
    "transform_features": (6, 6),
    "transform_hidden": (6,),
    "hidden_features": (12, 12),
    "num_neighbors": 6,
}
FINER = {"levels": (Level(5, 4, 8),), "hidden_features": (8,), "normal_neighbours": 4, **BATCH_NORM}
PATCHES = {
    "patches": 4,
    "patch_size": 5,
    "global_points": 4,
    "neighbours": 3,
    "features": 8,
    "pose_features": 4,
    "inter_features": (8,),
    "hidden_features": (6,),
    "canonicalizer": None,
    **BATCH_NORM,
}
CLOUD, CATEGORY = shaped((2, 9, 3), (2, 16))
# A small module of each network of point clouds, its inputs, and what lies beside the weights.
SMALL = {
    "vn_dgcnn": (VNDGCNN(3, ENCODER, hidden_features=(8, 8)), None, "conv1.batchnorm.bn.num_batches_tracked"),
    "vn_dgcnn_segmentation": (VNDGCNNSegmentation(3, ENCODER), None, "bn8.running_mean"),
    "vn_pointnet": (VNPointNet(3, features=(6, 6, 6), **WIDTHS), None, "bn1.num_batches_tracked"),
    "vn_pointnet_segmentation": (
        VNPointNetSegmentation(3, features=(6,) * 5, **WIDTHS),
        None,
        "bns1.num_batches_tracked",
    ),
    "se3_assembly": (
        SE3Assembly(ENCODER, hidden_features=(16, 12)),
        None,
        "encoder.conv1.batchnorm.bn.num_batches_tracked",
    ),
    "risurconv": (
        RISurConvClassifier(3, out_features=8, depth=0, **FINER),
        (CLOUD, CLOUD),
        "sc0.risurconv.1.num_batches_tracked",
    ),
    "risurconv_segmenter": (
        RISurConvSegmenter(3, rises=(Rise(3, 8, 0),), **FINER),
        (CLOUD, CLOUD),
        "sa0.risurconv.1.num_batches_tracked",
    ),
    "parot": (PaRotClassifier(3, **PATCHES), (CLOUD,), "classifier.cls.1.num_batches_tracked"),
    "parot_segmenter": (PaRotSegmenter(3, **PATCHES), (CLOUD, CATEGORY), "classifier.bn1.num_batches_tracked"),
}


@pytest.mark.parametrize("case", SMALL)
def test_small_networks_of_point_clouds_there_and_back(case):
    model, inputs, beside = SMALL[case]
    check_dialect(model, "official", inputs=inputs, beside=(beside,))


LARGE = {
    "dgcnn": vn_dgcnn,
    "dgcnn_segmentation": functools.partial(vn_dgcnn_segmentation, pooling="max"),
    "pointnet": functools.partial(VNPointNet, 40, pooling="max"),
    "pointnet_segmentation": functools.partial(VNPointNetSegmentation, 50),
    "se3_assembly": functools.partial(se3_assembly, correlation=False, stable=False),
}


@pytest.mark.parametrize("case", LARGE)
def test_vector_neurons_of_the_reference_size_there_and_back(case):
    own = "shapes" if case == "se3_assembly" else case
    shapes = json.loads(str(stored("se3_assembly" if own == "shapes" else "vector_neurons", "")["shapes"]))
    check_file(reference_weights(shapes if own == "shapes" else shapes[case]), LARGE[case](), "official")


RINGS = (Level(24, 6, 32), Level(16, 7, 64), Level(12, 8, 128), Level(9, 9, 256))
WIDE = (Level(24, 6, 64), Level(16, 7, 128), Level(12, 8, 256), Level(9, 9, 512))
RISES = (Rise(9, 512, 512), Rise(6, 512, 256), Rise(6, 256, 128), Rise(6, 128, 0))
PLACES = {**BATCH_NORM, "patches": 10, "patch_size": 7, "neighbours": 5, "global_points": 6, "canonicalizer": None}
LISTED = {
    "risurconv/cls": (RISurConvClassifier(7, RINGS, **BATCH_NORM), (2, 32), ()),
    "risurconv/seg": (RISurConvSegmenter(6, WIDE, RISES, **BATCH_NORM), (2, 32), (16,)),
    "parot/cls": (PaRotClassifier(7, inter_features=(256, 512, 48), **PLACES), (1, 24), ()),
    "parot/seg": (PaRotSegmenter(50, nearest_patches=4, **PLACES), (1, 24), (16,)),
}


def without_unused_rows(name, tensor):
    """A lone token needs no queries and keys."""
    if ".in_proj_" not in name:
        return tensor
    return np.concatenate([np.zeros_like(tensor[: 2 * len(tensor) // 3]), tensor[2 * len(tensor) // 3 :]])


@pytest.mark.parametrize("case", LISTED)
def test_networks_of_listed_tensors_there_and_back(case):
    (model, (clouds, points), category), (file, kind) = LISTED[case], case.split("/")
    lines = (line.split() for line in str(stored(file, f"{kind}_")["names"]).splitlines())
    rng = np.random.default_rng(0)
    tensors = {name: rng.random(tuple(map(int, sizes.split(","))), np.float32) for name, sizes in lines}
    inputs = shaped(*((1, points, 3),) * clouds, *((1, size) for size in category))
    check_file(tensors, model, "official", inputs=inputs, written=without_unused_rows)


def test_turned_features_are_refused():
    model = GTA(2, PoseBlocks(trivial=1, se3=8, so3=8, so2=8, t2=3))
    with pytest.raises(ValueError, match=r"blocks.so3=8 must be 0 here"):
        pretrained.convert_tensors(as_tensors(stored("gta", "dot/self/weights/")), model, inputs=SELF)


def test_biases_that_are_divided_there_are_refused():
    tensors = stored("lie_conv", "SE(3)/weights/")
    tensors["net.1.conv.linear.bias"] = tensors["net.1.conv.linear.bias"] + 1
    with pytest.raises(ValueError, match=r"net.1.conv.linear.bias must be zero"):
        pretrained.convert_tensors(as_tensors(tensors), LIE, inputs=shaped((2, 5, 3), (2, 5, 3)))
