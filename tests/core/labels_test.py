import numpy as np

from jaxlayers.core.labels import label, no_decay, pyramid_layer_ids

ONE = np.zeros((3, 2))
PARAMS = {
    "patch_embed": {"projection": {"kernel": ONE, "bias": ONE}},
    "stages_0": {"blocks_0": {"norm": {"scale": ONE}}, "blocks_1": {"kernel": ONE}},
    "stages_1": {"merge": {"kernel": ONE}, "pairs": {"regular": {"kernel": ONE}, "shifted": {"kernel": ONE}}},
    "final_norm": {"scale": ONE},
}


def test_kernels_alone_decay():
    labels = no_decay(PARAMS)
    assert labels["patch_embed"]["projection"] == {"kernel": False, "bias": True}
    assert labels["stages_0"]["blocks_0"]["norm"]["scale"] is True
    assert labels["stages_1"]["pairs"]["regular"]["kernel"] is False


def test_layers_are_counted_through_the_pyramid():
    ids = pyramid_layer_ids(PARAMS, depths=(2, 6))
    assert ids["patch_embed"]["projection"]["kernel"] == 0
    assert ids["stages_0"]["blocks_0"]["norm"]["scale"] == 1
    assert ids["stages_0"]["blocks_1"]["kernel"] == 2
    assert ids["stages_1"]["merge"]["kernel"] == 2
    np.testing.assert_array_equal(ids["stages_1"]["pairs"]["regular"]["kernel"], [[3], [5], [7]])
    np.testing.assert_array_equal(ids["stages_1"]["pairs"]["shifted"]["kernel"], [[4], [6], [8]])
    assert ids["final_norm"]["scale"] == 9


def test_label_gives_path_and_leaf():
    assert label({"a": {"b": ONE}}, lambda path, leaf: (path, leaf.shape)) == {"a": {"b": (("a", "b"), (3, 2))}}
