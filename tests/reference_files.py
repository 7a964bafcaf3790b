"""What a dialect is held to beside its reference: a state dict that the reference itself made, there and back."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlayers import pretrained
from jaxlayers.files.tensors import Stored, Tensors
from tests.round_trip import as_tensors, random_tensors


def shaped(*shapes):
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def stored(file, prefix):
    """Return the arrays of a golden file below a prefix."""
    with np.load(Path(__file__).parent / "golden" / f"{file}_parity.npz") as arrays:
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


def check_file(state, model, name, *, inputs=None, only=True, written=lambda name, tensor: tensor):
    """Check that a file of a reference is told, that our layout is its own, and that it comes back bit for bit.

    Args:
      state: arrays by name as the reference has them, or shapes, of which arrays are drawn.
      model: the same model of ours.
      name: the dialect's.
      inputs: see `Dialect.read`.
      only: no dialect of another model may fit the names.
      written: what of a tensor comes back, the rest of it being of no use.

    Returns:
      What `convert_tensors` returned.
    """
    if isinstance(next(iter(state.values())), tuple):
        state = random_tensors(state)
    fitting = {(one.module, one.name) for one in pretrained.recognise(state)}
    assert fitting == {(type(model), name)} if only else (type(model), name) in fitting, fitting
    found = pretrained.convert_tensors(as_tensors(state), model, inputs=inputs)
    assert found.dialect.name == name
    kept = {key: np.asarray(value) for key, value in state.items() if key not in found.report.ignored}
    assert not found.report.fresh
    assert not found.report.changed
    if found.dialect.layout is not None:
        layout = found.dialect.layout(model, found.variables)
        assert {key: tuple(shape) for key, shape in layout.items()} == {key: value.shape for key, value in kept.items()}
    if found.dialect.one_way:
        return found
    back = pretrained.to_reference(model, found.variables, name, inputs=inputs)
    assert set(back) == set(kept)
    for key, value in kept.items():
        assert back[key].shape == value.shape, key
        assert back[key].dtype == value.dtype, key
        np.testing.assert_array_equal(back[key], written(key, value), err_msg=key)
    return found


def guessed(state):
    """Return model and dialect by name, as `guess` tells them of tensors of which only shapes are read."""
    stored = {name: Stored(tuple(tensor.shape), np.dtype(np.float32), lambda: None) for name, tensor in state.items()}
    return [(model, dialect.name) for model, dialect in pretrained.guess(Tensors(stored, "torch"))]
