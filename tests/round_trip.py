"""What every dialect is held to, without its reference: from random tensors of its layout to our model and back."""

import re

import jax
import numpy as np
import pytest

from jaxlayers import pretrained
from jaxlayers.core import dialects
from jaxlayers.files.tensors import Stored, Tensors


def as_tensors(arrays):
    """Return arrays as an opened file has them."""
    stored = {
        name: Stored(array.shape, array.dtype, lambda array=array: array)
        for name, array in ((name, np.asarray(array)) for name, array in arrays.items())
    }
    return Tensors(stored, "torch")


def random_tensors(layout, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in layout.items()}


def check_dialect(model, name, *, layout=None, inputs=None, beside=()):
    """Check one dialect of a small model.

    Its names are told from all other dialects of the model; tensors come back bit for bit, though their names stand
    below a wrapper and things to be ignored lie beside them; a tensor too many or too few stops the conversion by name.

    Args:
      model: a small model that has every part.
      name: the dialect's.
      layout: shape by name, where the dialect has none of its own.
      inputs: see `Dialect.read`.
      beside: names that the reference stores and that are to be ignored.
    """
    dialect = pretrained.find_dialect(None, model, name)
    inputs = pretrained.default_inputs(model, inputs)
    if layout is None:
        layout = dialect.layout(model, dialects.shapes_of(model, inputs))
    given = random_tensors(layout)
    assert pretrained.find_dialect(list(given), model, None).name == name

    noise = {one: np.zeros((2,), np.float32) for one in beside}
    wrapped = {f"state_dict.module.{key}": array for key, array in {**given, **noise}.items()}
    wrapped["optimizer.state.0.exp_avg"] = np.zeros((3,), np.float32)
    found = pretrained.convert_tensors(as_tensors(wrapped), model, inputs=inputs)
    assert set(found.report.converted) == {f"state_dict.module.{key}" for key in given}
    assert set(found.report.ignored) == {"optimizer.state.0.exp_avg"} | {f"state_dict.module.{key}" for key in beside}
    assert all(found.report.ignored.values())
    wanted = dialects.shapes_of(model, inputs)
    assert jax.tree.map(lambda leaf: leaf.shape, dict(found.variables)) == jax.tree.map(lambda leaf: leaf.shape, wanted)
    if dialect.one_way:
        return
    assert all(found.report.converted.values()), "every tensor reaches a parameter"
    back = pretrained.to_reference(model, found.variables, name, inputs=inputs, layout=layout)
    assert set(back) == set(given)
    for key, array in given.items():
        assert back[key].dtype == array.dtype
        np.testing.assert_array_equal(back[key], array, err_msg=key)

    first = next(iter(given))
    without = {key: array for key, array in given.items() if key != first}
    for wrong, part in (({**given, "one.too_many": np.zeros(1)}, "too_many"), (without, first)):
        with pytest.raises(ValueError, match=re.escape(part)):
            pretrained.convert_tensors(as_tensors(wrong), model, dialect=name, inputs=inputs)
