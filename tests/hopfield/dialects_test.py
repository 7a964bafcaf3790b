"""The references' names and layouts of the Hopfield models, there and back: random tensors, and the references'.

The references' tensors are those of the golden files, whose own tests say how they were made.
"""

import jax
import numpy as np
import pytest

from jaxlayers import abstract_inputs, create_model, pretrained
from jaxlayers.core import dialects
from jaxlayers.hopfield.deeprc import DeepRC, SequenceEmbedding
from jaxlayers.hopfield.energy_transformer import EnergyTransformerBlock
from jaxlayers.hopfield.hopfield import Hopfield, HopfieldLayer, HopfieldPooling
from jaxlayers.hopfield.hopular import Hopular, hopular_lookup
from jaxlayers.hopfield.tabular import CategoricalColumn, ContinuousColumn, TableSchema
from tests.reference_files import check_file, shaped, stored
from tests.round_trip import as_tensors, check_dialect

NO_NORMS = {"state_norm": None, "stored_norm": None, "value_norm": None}
NUMBER = ContinuousColumn()
SCHEMA = TableSchema((NUMBER, CategoricalColumn(3), NUMBER, CategoricalColumn(2), CategoricalColumn(3)))


HOPFIELD = {
    "self": (Hopfield(num_heads=2), "official"),
    "no_norm": (Hopfield(num_heads=2, use_bias=False, **NO_NORMS), "official"),
    "dimensions": (Hopfield(num_heads=2, head_dim=3, value_dim=5, out_features=4), "official_separate"),
    "static_state": (Hopfield(projections=("key", "value", "out")), "official"),
    "pooling": (HopfieldPooling(Hopfield(num_heads=2), num_states=3), "official"),
    "lookup": (HopfieldLayer(Hopfield(num_heads=2), num_patterns=5), "official"),
    "lookup_values": (
        HopfieldLayer(Hopfield(num_heads=2, head_dim=6), num_patterns=5, value_features=3),
        "official_separate",
    ),
}


@pytest.mark.parametrize("case", HOPFIELD)
def test_hopfield_layers_there_and_back(case):
    (model, name), tensors = HOPFIELD[case], stored("hopfield", f"{case}/")
    inputs = [x for key, x in sorted(tensors.items()) if key.startswith("input/")]
    if len(inputs) == 3:  # stored, state, projection there
        inputs = [inputs[1], inputs[0], inputs[2]]
    tensors = stored("hopfield", f"{case}/parameter/")
    check_dialect(model, name, inputs=inputs)
    check_file(tensors, model, name, inputs=inputs)


def test_biases_of_unprojected_values_are_written_as_zeros():
    model = Hopfield(num_heads=2, projections=("query", "key", "out"), **NO_NORMS)
    inputs = shaped((1, 3, 4))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), dialects.shapes_of(model, inputs))
    back = pretrained.to_reference(model, variables, "official", inputs=inputs)
    assert back["association_core.in_proj_weight"].shape == (8, 4)
    np.testing.assert_array_equal(back["association_core.in_proj_bias"], np.repeat([1, 1, 0], 4))


OTHERS = {
    "hopular": (
        Hopular(SCHEMA, features=8, depth=2, sample=hopular_lookup(2), feature=hopular_lookup(2)),
        None,
        ("memory", "memory_ids", "embeddings.feature_types"),
        stored("hopular", "weights/"),
    ),
    "deeprc": (
        DeepRC(3, SequenceEmbedding(6, 3, depth=2), key_features=(5,), hidden_features=(4,)),
        None,
        ("attention_nn.attention_nn.2.bias",),
        stored("deeprc", "deep/parameter/"),
    ),
    "energy_transformer": (
        EnergyTransformerBlock(num_heads=3, head_dim=4, mlp_ratio=2.5),
        shaped((1, 7, 12)),
        ("Wenc", "Bdec", "CLS_token", "POS_embed"),
        {name: x.astype(np.float32) for name, x in stored("energy_transformer", "parameter/").items()},
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_models_there_and_back(case):
    model, inputs, beside, tensors = OTHERS[case]
    check_dialect(model, "official", inputs=inputs, beside=beside)
    check_file(tensors, model, "official", inputs=inputs)


def test_the_variant_of_a_checkpoint_is_told():
    model, inputs = create_model("hopular_small"), abstract_inputs("hopular_small")
    dialect = pretrained.find_dialect(None, model, "official")
    layout = dialect.layout(model, jax.eval_shape(model.init, jax.random.key(0), *inputs))
    found = pretrained.guess(as_tensors({name: np.zeros(shape, np.float32) for name, shape in layout.items()}))
    assert found == (("hopular_small", dialect),)
