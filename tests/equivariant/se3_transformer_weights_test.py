"""Weights of the SE(3)-Transformer's reference, read with the basis that they are relative to: the same outputs.

The stored file says which code was run, and how: whole models of its experiments with particles and energies.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlayers import pretrained
from jaxlayers.equivariant.se3_transformer import SE3Transformer
from jaxlayers.equivariant.tensor_field import AttentiveSelfInteraction, basis_factors
from tests.equivariant.vector_neurons_test import reference_weights
from tests.reference_files import check_file, stored
from tests.round_trip import as_tensors

GOLDEN = stored("se3_transformer_weights", "")
BASIS = {name: part for name, part in GOLDEN.items() if name.startswith("basis.")}


def potential(distances, parameters):
    """The energies that the reference's toy problem tells the network."""
    x = distances - parameters - 1
    return x**4 - x**2 + 0.1 * x + 0.321919


PARTICLES = SE3Transformer((4, 4), (0, 2), depth=1, bottleneck=2, relative="concatenate")
MODELS = {
    "add": PARTICLES.clone(features=(4, 4, 4), num_heads=2, relative="subtract", out_project=AttentiveSelfInteraction),
    "cat": PARTICLES,
    "iterative": PARTICLES.clone(out_features=(0, 1), iterations=2, relative="subtract", edge_features=potential),
}


def state(name):
    """The weights that the stored outputs were computed with, and the basis."""
    return {**reference_weights(json.loads(str(GOLDEN["shapes"]))[name]), **BASIS}


def convert(tensors, model=PARTICLES):
    return pretrained.convert_tensors(as_tensors(tensors), model).variables


def run(model, variables):
    x = jnp.asarray(GOLDEN["positions"])
    if model.edge_features is not None:
        return jax.jit(model.apply)(variables, x, edges=jnp.asarray(GOLDEN["potential"])).positions
    others = [[j for j in range(4) if j != i] for i in range(4)]
    charges = jnp.asarray(GOLDEN["charges"])
    edges = charges[:, None] * charges[jnp.asarray(others)]
    return jax.jit(model.apply)(variables, x, {1: jnp.asarray(GOLDEN["velocities"])}, edges=edges).features[1]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_those_of_the_reference(name):
    found = check_file(state(name), MODELS[name], "iterative" if name == "iterative" else "nbody")
    expected = GOLDEN[f"{name}/out"]
    value = run(MODELS[name], found.variables)
    np.testing.assert_allclose(value, expected, atol=1e-4 * np.abs(expected).max())


def flipped(tensors, pair, path, *, weights, basis):
    """Return the file of a machine whose decomposition gave one kernel the other sign; or half of such a file."""
    paths = 2 * min(pair) + 1
    tensors = dict(tensors)
    for name, value in tensors.items():
        if weights and re.search(rf"\({pair[0]},{pair[1]}\)\.rp\.net\.6\.", name):
            value = value.copy().reshape(-1, paths, *value.shape[1:])
            value[:, path] *= -1
            tensors[name] = value.reshape(tensors[name].shape)
    if basis:
        name = f"basis.{pair[0]},{pair[1]}"
        tensors[name] = tensors[name] * np.where(np.arange(paths) == path, -1, 1).astype(np.float32)
    return tensors


def test_signs_of_the_basis_say_those_of_the_weights():
    plain = convert(state("cat"))
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    other = convert(flipped(state("cat"), (1, 1), 1, weights=True, basis=True))
    same(other, plain)
    # The control: either alone is another function.
    alone = [convert(flipped(state("cat"), (1, 1), 1, weights=weights, basis=not weights)) for weights in (True, False)]
    same(*alone)
    expected = GOLDEN["cat/out"]
    assert np.max(np.abs(run(PARTICLES, alone[0]) - expected)) > 1e-2 * np.abs(expected).max()


def test_size_of_the_basis_and_number_of_its_directions_do_not_matter():
    factors = basis_factors(BASIS)
    both = {name: np.concatenate([part, part]) for name, part in BASIS.items()}
    both["basis.direction"] = both["basis.direction"] * [[1.0], [7.0]]
    again = basis_factors({**both, "basis.1,2": -2 * both["basis.1,2"]})
    for pair, factor in factors.items():
        np.testing.assert_allclose(again[pair], -2 * factor if pair == (1, 2) else factor, rtol=1e-5)


def test_file_without_the_basis_says_what_to_save():
    bare = {name: tensor for name, tensor in state("cat").items() if name not in BASIS}
    with pytest.raises(ValueError, match=r"whose signs are in no state dict; got \[\] of it; save get_basis of"):
        convert(bare)
    with pytest.raises(ValueError, match=r"missing \['basis.1,1'\]"):
        convert({name: tensor for name, tensor in state("cat").items() if name != "basis.1,1"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("basis.direction", lambda part: part[:, ::-1], r"basis.0,1 must be our kernels .* it is off by"),
        ("basis.direction", lambda part: 0 * part, r"basis.direction must be vectors \[n, 3\], none of them zero"),
        ("basis.1,1", lambda part: part[..., ::-1], r"basis.1,1 must be our kernels"),
        ("basis.1,1", lambda part: 0 * part, r"with factors \[0.0, 0.0, 0.0\]"),
        ("basis.1,1", lambda part: np.nan * part, r"basis.1,1 must be our kernels"),
        ("basis.1,1", lambda part: part[..., :1], r"basis.1,1 must have the entries of \(1, 3, 3, 3\)"),
    ],
    ids=["other_direction", "zero_direction", "other_order", "zero", "nan", "size"],
)
def test_basis_that_does_not_fit_is_refused(name, change, message):
    tensors = state("cat")
    with pytest.raises(ValueError, match=message):
        convert({**tensors, name: np.ascontiguousarray(change(tensors[name]))})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relative": "add"}, r"relative='add' must be 'subtract'"),
        ({"relative": "subtract"}, r"rp.net.6 must have 6 outputs for 1 channels to 2; got"),
        ({"num_heads": 3, "bottleneck": 1}, r"num_heads=3 must leave min\(num_heads, 2\) heads"),
        ({"depth": 2}, r"missing \['Gblock.2.GMAB"),
        ({"features": (8, 8)}, r"set (the model's|its) fields as the reference has them"),
        ({"project": functools.partial(AttentiveSelfInteraction)}, r"missing \['Gblock.0.project.transform.0.0"),
        ({"out_features": (2, 2)}, r"missing \['Gblock.2.GMAB.k.kernel_unary.\(0,0\)"),
    ],
    ids=["add", "relative", "heads", "depth", "features", "project", "out_features"],
)
def test_fields_that_are_not_the_references_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        convert(state("cat"), PARTICLES.clone(**fields))


def test_one_way_is_said():
    with pytest.raises(ValueError, match="must be only read, since weights are multiplied by signs and sizes"):
        pretrained.to_reference(PARTICLES, {"params": {}}, "nbody", layout={})
