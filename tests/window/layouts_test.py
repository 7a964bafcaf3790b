"""The layouts that dialects of the window family tell beside those that the references' own code made.

Names and shapes are in `golden/layouts`, where the first line of each file says how it was made, and beside the golden
outputs of the models' own tests. What is on PyPI is compared live, in `tests/parity`.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlayers.core import dialects
from jaxlayers.window import hiera, styleswin, styleswin_discriminator, swin3d
from jaxlayers.window.simmim import SimMIM
from jaxlayers.window.styleswin import StyleSwin
from jaxlayers.window.styleswin_discriminator import WaveletDiscriminator
from jaxlayers.window.swin import Swin
from tests.reference_files import check_file
from tests.window.dialects_test import (
    AXES,
    CROSS,
    CROSSED,
    CVT,
    DENSE,
    FACES,
    GATED,
    HIERA,
    RETENTION,
    SEARCHED,
    SHIFTS,
    SPARSE,
    VIDEO,
    WORDS,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def layout_file(name):
    """Return the shapes by name that a public code made; see the file's first line."""
    lines = (GOLDEN / "layouts" / f"{name}.txt").read_text().splitlines()
    assert lines[0].startswith("# github.com/")
    fields = (line.split(" ") for line in lines[1:])
    return {name: () if shape == "-" else tuple(map(int, shape.split("x"))) for name, shape, _ in fields}


def beside_outputs(name):
    """Return the shapes by name in the golden file of a model, as its own test reads them."""
    with np.load(GOLDEN / f"{name}_parity.npz") as stored:
        if name in ("rmt", "shiftvit", "vit_resnas"):
            kind = "parameter:"
            return {key.removeprefix(kind): stored[key].shape for key in stored.files if key.startswith(kind)}
        if name == "att_swin_unet":
            return {key: tuple(shape) for key, shape in json.loads(stored["shapes"].tobytes()).items()}
        if name == "drct":
            pairs = zip(stored["names"].tolist(), stored["shapes"].tolist(), strict=True)
        elif name == "swin3d":
            pairs = zip(stored["full:names"].tolist(), stored["full:shapes"].tolist(), strict=True)
        else:
            names = stored["net/names" if name == "axial_resnet" else "names"].tolist()
            pairs = (line.split(" ") for line in names)
        return {key: tuple(map(int, shape.replace(",", "x").split("x"))) for key, shape in pairs}


FILES = {
    "simmim_official": (
        SimMIM(Swin(num_classes=0, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=5)),
        None,
    ),
    "crossvit_official": (CROSS, None),
    "crossvit_official_dagger": (CROSS.clone(conv_embed=True), None),
    "cvt_official": (CVT, None),
    "hiera_official": (HIERA, None),
    "hiera_official_video": (VIDEO, None),
    "tnt_official": (WORDS, None),
    "rmt": (RETENTION, None),
    "shiftvit": (SHIFTS, None),
    "vit_resnas": (SEARCHED, None),
    "axial_resnet": (AXES, None),
    "att_swin_unet": (CROSSED, None),
    "drct": (DENSE, None),
    "swinface": (FACES, None),
    "maxim": (GATED, None),
    # Scenes of six features.
    "swin3d": (SPARSE, 6),
}


@pytest.mark.parametrize("name", FILES)
def test_layouts_are_those_of_the_public_code(name):
    model, channels = FILES[name]
    shapes = layout_file(name) if "official" in name else beside_outputs(name)
    inputs = None if channels is None else swin3d.scene_inputs(model, channels)
    dialect = {"att_swin_unet": "published", "maxim": "official_tree", "swinface": "official_module"}.get(
        name, "official"
    )
    check_file(shapes, model, dialect, inputs=inputs)
    if name == "att_swin_unet":
        plain = {key: shape for key, shape in shapes.items() if "Crossvit" not in key}
        check_file(plain, model.clone(skip="concatenation"), dialect)


@pytest.mark.parametrize(
    ("name", "file", "model"),
    [
        (
            "styleswin_official",
            styleswin,
            StyleSwin(features=(512,) * 4, num_heads=(16,) * 4, style_features=16, mapping_depth=3),
        ),
        ("styleswin_discriminator_official", styleswin_discriminator, WaveletDiscriminator(features=(512,) * 3)),
    ],
)
def test_layouts_of_styleswin_are_those_of_the_public_code(name, file, model):
    # Shapes alone: the public code has no narrow models.
    shapes = layout_file(name)
    dialect = file.DIALECTS[0]
    left_out = dialect.reasons(list(shapes), model)
    wanted = dialects.shapes_of(model, file.reference_inputs(model))
    assert left_out, "there are filters and masks"
    assert dialect.layout(model, wanted) == {key: shape for key, shape in shapes.items() if key not in left_out}


def test_another_layout_is_told():
    # Negative control: a transposed projection, and a classifier that stands elsewhere.
    shapes = layout_file("hiera_official")
    with pytest.raises(ValueError, match=r"mlp.fc1.weight \[8, 32\] for \[32, 8\]"):
        check_file({**shapes, "blocks.0.mlp.fc1.weight": (8, 32)}, HIERA, "official")
    moved = {key.replace("head.projection", "head.fc"): shape for key, shape in shapes.items()}
    with pytest.raises(ValueError, match="unexpected .*head.fc.bias"):
        check_file(moved, HIERA, "official")
    assert hiera.DIALECTS[0].name == "timm"
    assert not hiera.DIALECTS[0].fits(list(shapes))
