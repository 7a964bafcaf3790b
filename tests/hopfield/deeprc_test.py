"""DeepRC against a NumPy twin, the stored outputs of the reference, and the claim that one sequence can decide."""

import dataclasses
import functools
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlayers.hopfield.deeprc import (
    AMINO_ACIDS,
    DeepRC,
    SequenceEmbedding,
    encode,
    from_reference,
    input_deviation,
    position_features,
    sequence_attention,
)
from jaxlayers.hopfield.hopfield import Hopfield, HopfieldPooling
from jaxlayers.testing import BadInput, Case, Symmetric, Symmetry

GOLDEN = Path(__file__).parents[1] / "golden" / "deeprc_parity.npz"
NO_NORMS = {"state_norm": None, "stored_norm": None, "value_norm": None}


def ragged(rng, *shape, shortest=1):
    """Return residues `[*shape]` of sequences of different lengths, -1 behind their ends."""
    lengths = rng.integers(shortest, shape[-1] + 1, shape[:-1])
    return np.where(np.arange(shape[-1]) < lengths[..., None], rng.integers(0, 20, shape), -1).astype(np.int8)


def sets(*shape):
    return lambda rng: (ragged(rng, *shape),)


def running_sum(x):
    """Order matters to it: the control of every claim about permutations."""
    return jnp.cumsum(x.astype(jnp.float32), axis=-2)


SMALL = SequenceEmbedding(features=5, kernel_size=3)
IN_FLOAT32 = {"tolerance64": 1e-5}  # with whole numbers for inputs everything is in the parameters' float32
CASES = (
    Case(
        name="sequence_embedding",
        within="deeprc",
        module=SequenceEmbedding(features=5, kernel_size=3, depth=2, chunk_size=2),
        inputs=sets(2, 5, 7),
        symmetries=(Symmetry(Symmetric(5), ("set",), "set", control=running_sum, **IN_FLOAT32),),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="kernel_size=0 must be at least 1; set", module=SequenceEmbedding(kernel_size=0)),
            BadInput(match="chunk_size=0 must be at least 1; set", module=SequenceEmbedding(chunk_size=0)),
            BadInput(match=r"residues of dtype float32 and shape", inputs=lambda rng: (rng.normal(size=(2, 5, 7)),)),
            BadInput(match=r"shape \(7,\) must be integers", inputs=lambda rng: (np.zeros(7, np.int8),)),
            BadInput(
                match=r"lengths of shape \(5,\) must be \(2, 5\), one for each sequence",
                inputs=lambda rng: (np.zeros((2, 5, 7), np.int8), np.ones(5, np.int32)),
            ),
        ),
    ),
    Case(
        name="deeprc",
        module=DeepRC(3, SMALL, key_features=(4, 3), hidden_features=(4,)),
        inputs=sets(2, 5, 7),
        symmetries=(
            Symmetry(
                Symmetric(5), ("set",), "scalar", control=lambda x: jnp.mean(running_sum(x), axis=-2), **IN_FLOAT32
            ),
        ),
        leading_axes=True,
        bad_inputs=(
            BadInput(match="num_classes=-1 must be at least 0", module=DeepRC(-1)),
            BadInput(match=r"key_features=\(4, 0\) must be widths of at least 1", module=DeepRC(key_features=(4, 0))),
            BadInput(match=r"hidden_features=\(0,\) must be", module=DeepRC(hidden_features=(0,))),
            BadInput(match=r"features=0 must be at least 1", module=DeepRC(embedding=SequenceEmbedding(0))),
        ),
    ),
    Case(
        name="deeprc_kept",
        within="deeprc",
        module=DeepRC(2, SMALL, key_features=(4,), kept_fraction=0.6),
        inputs=sets(2, 5, 7),
        symmetries=(
            Symmetry(
                Symmetric(5), ("set",), "scalar", control=lambda x: jnp.mean(running_sum(x), axis=-2), **IN_FLOAT32
            ),
        ),
        leading_axes=True,
        # Rounding to bfloat16 may change the ranking, and so which sequences are seen at all.
        bfloat16_tolerance=0.2,
        bad_inputs=(
            BadInput(match=r"kept_fraction=0.0 must lie in \(0, 1\]; set", module=DeepRC(kept_fraction=0.0)),
            BadInput(match=r"kept_fraction=1.5 must lie in \(0, 1\]; set", module=DeepRC(kept_fraction=1.5)),
        ),
    ),
)


# Compiled once for all tests of a shape.
attend = jax.jit(sequence_attention, static_argnums=0)
spread = jax.jit(input_deviation, static_argnums=1)


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def draw_params(rng, model, *inputs, **keywords):
    """Return parameters of the model, none of them zero."""
    shapes = jax.eval_shape(functools.partial(model.init, **keywords), jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


# Letters. -------------------------------------------------------------------------------------------------------------


def test_letters_become_their_places_in_the_alphabet():
    found = encode(["ACDEFGHIKLMNPQRSTVWY", "", "YA"], length=22)
    assert found.residues.dtype == np.int8
    np.testing.assert_array_equal(found.residues[0], [*range(20), -1, -1])
    np.testing.assert_array_equal(found.residues[2], [19, 0, *[-1] * 20])
    np.testing.assert_array_equal(found.lengths, [20, 0, 2])
    assert encode([]).residues.shape == (0, 0)


@pytest.mark.parametrize("letter", ["X", "*", "c", " "])
def test_letters_that_are_no_amino_acid_are_refused(letter):
    with pytest.raises(ValueError, match=re.escape(f"sequence 1, 'CA{letter}', has the letter '{letter}', which must")):
        encode(["CAS", f"CA{letter}"])


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="length=2 must be at least 3, the longest sequence"):
        encode(["CAS"], length=2)


# The twin: one sequence and one place at a time, in float64. ----------------------------------------------------------


def selu(x):
    return 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0)))


def twin_features(sequence, count):
    """Return `[length, 23]` from a list of numbers."""
    rows = np.zeros((len(sequence), 23))
    last = max(len(sequence) - 1, 1)
    for place, residue in enumerate(sequence):
        rows[place, residue] = count
        far = abs(1 - 2 * place / last)
        rows[place, 20 if place < (len(sequence) + 1) // 2 else 21] = far
        rows[place, 22] = 1 - far
    return rows


def twin_embedding(features, params, depth, kernel_size):
    x = np.concatenate([features, np.zeros((depth * (kernel_size - 1), 23))])
    for index in range(depth):
        kernel, bias = (np.asarray(params[f"convs_{index}"][name], np.float64) for name in ("kernel", "bias"))
        number = len(x) - kernel_size + 1
        x = selu(np.stack([np.einsum("jc,jcf->f", x[i : i + kernel_size], kernel) + bias for i in range(number)]))
    return x[: max(len(features), 1)].max(axis=0)


def twin(params, bag, counts, model):
    """Return the logits of one bag, a list of lists of numbers, and the attention of each sequence."""
    features = [twin_features(sequence, count) for sequence, count in zip(bag, counts, strict=True)]
    deviation = np.concatenate(features).std(ddof=1)
    sizes = model.embedding.depth, model.embedding.kernel_size
    embedded = np.stack([twin_embedding(x / deviation, params["embedding"], *sizes) for x in features])

    def dense(x, name):
        return x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"], np.float64)

    key = embedded
    for index in range(len(model.key_features)):
        key = selu(dense(key, f"keys_{index}"))
    logits = key @ np.asarray(params["pooling"]["state_patterns"], np.float64)[0] / np.sqrt(key.shape[-1])
    number = max(1, int(len(bag) * model.kept_fraction))
    kept = np.argsort(-logits)[:number]
    weights = np.zeros(len(bag))
    weights[kept] = np.exp(logits[kept] - logits.max())
    weights /= weights.sum()
    x = weights @ embedded
    for index in range(len(model.hidden_features)):
        x = selu(dense(x, f"outputs_{index}"))
    return dense(x, "head"), weights


TWINS = {
    "plain": DeepRC(3, SMALL, key_features=(4, 3), hidden_features=(4,)),
    "deep": DeepRC(2, SequenceEmbedding(5, 4, depth=2, chunk_size=4), key_features=()),
    "kept": DeepRC(2, SMALL, key_features=(4,), kept_fraction=0.4),
}


@pytest.mark.parametrize("name", TWINS)
def test_equals_the_twin(rng, name):
    model = TWINS[name]
    residues = ragged(rng, 3, 11, 9)
    lengths = (residues >= 0).sum(-1)
    mask = np.arange(11) < np.array([11, 7, 1])[:, None]
    counts = rng.uniform(0.5, 2, (3, 11))
    # What stands behind the ends, in sequences and in bags, must not matter.
    noise = np.where(residues < 0, rng.integers(-3, 25, residues.shape), residues)
    inputs = (jnp.asarray(noise), jnp.asarray(lengths, jnp.int32))
    keywords = {"counts": jnp.asarray(counts, jnp.float32), "mask": jnp.asarray(mask)}
    params = draw_params(rng, model, *inputs, **keywords)
    found = compiled(model)({"params": params}, *inputs, **keywords)
    weights = attend(model, {"params": params}, inputs[0], lengths=inputs[1], **keywords)
    assert weights.shape == (3, 1, 1, 11)
    for b in range(3):
        bag = [list(residues[b, s, : lengths[b, s]]) for s in range(11) if mask[b, s]]
        expected, expected_weights = twin(params, bag, counts[b][mask[b]], model)
        np.testing.assert_allclose(found[b], expected, atol=1e-5)
        np.testing.assert_allclose(weights[b, 0, 0, : len(bag)], expected_weights, atol=1e-5)
        np.testing.assert_array_equal(weights[b, 0, 0, len(bag) :], 0)


def test_deviation_is_that_of_the_features(rng):
    lengths = rng.integers(1, 10, (2, 6))
    counts, mask = rng.uniform(0.5, 2, (2, 6)), np.arange(6) < np.array([[6], [4]])
    expected = []
    for b in range(2):
        rows = [twin_features([0] * lengths[b, s], counts[b, s]) for s in range(6) if mask[b, s]]
        expected.append(np.concatenate(rows).std(ddof=1))
    arrays = {"counts": jnp.asarray(counts, jnp.float32), "mask": jnp.asarray(mask)}
    np.testing.assert_allclose(spread(jnp.asarray(lengths), 12, **arrays), expected, rtol=1e-5)


# Padding. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_padding_has_no_influence(rng, name):
    model = TWINS[name]
    residues = ragged(rng, 2, 8, 6, shortest=0)
    params = draw_params(rng, model, jnp.asarray(residues))
    expected = compiled(model)({"params": params}, jnp.asarray(residues))
    longer = np.pad(residues, ((0, 0), (0, 3), (0, 4)), constant_values=-1)
    longer[:, 8:] = rng.integers(0, 20, (2, 3, 10))  # no sequences, as the mask says
    mask = jnp.broadcast_to(jnp.arange(11) < 8, (2, 11))
    found = compiled(model)({"params": params}, jnp.asarray(longer), mask=mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(compiled(model)({"params": params}, jnp.asarray(longer)) - expected).max() > 1e-3  # without the mask


def test_no_gradient_reaches_padding(rng):
    model = TWINS["plain"]
    residues, mask = jnp.asarray(ragged(rng, 2, 8, 6)), jnp.asarray(np.arange(8) < np.array([[8], [5]]))
    counts = jnp.asarray(rng.uniform(0.5, 2, (2, 8)), jnp.float32)
    params = draw_params(rng, model, residues)
    total = jax.jit(jax.grad(lambda c: jnp.sum(model.apply({"params": params}, residues, counts=c, mask=mask))))
    gradient = total(counts)
    assert np.all(gradient[mask] != 0)
    assert np.all(gradient[~mask] == 0)


def test_an_empty_bag_gives_the_bias_and_no_gradient(rng):
    for model in (DeepRC(2, SMALL, key_features=(4,)), DeepRC(2, SMALL, key_features=(4,), kept_fraction=0.5)):
        residues, mask = jnp.asarray(ragged(rng, 1, 6, 5)), jnp.zeros((1, 6), bool)
        params = draw_params(rng, model, residues, mask=mask)

        def total(params, model=model, residues=residues, mask=mask):
            found = model.apply({"params": params}, residues, mask=mask)
            return jnp.sum(found), found

        gradient, found = jax.jit(jax.grad(total, has_aux=True))(params)
        np.testing.assert_allclose(found[0], params["head"]["bias"], atol=1e-6)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        assert np.all(gradient["embedding"]["convs_0"]["kernel"] == 0)


# Large bags. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [4, 20])
def test_chunks_change_neither_value_nor_gradient(rng, chunk_size):
    residues = jnp.asarray(ragged(rng, 2, 9, 6))
    whole = DeepRC(2, SequenceEmbedding(5, 3, depth=2), key_features=(4,))
    chunked = whole.clone(embedding=whole.embedding.clone(chunk_size=chunk_size))
    params = draw_params(rng, whole, residues)

    def result(model):
        def total(params):
            return jnp.sum(model.apply({"params": params}, residues)[:, 0])

        return jax.jit(jax.value_and_grad(total))(params)

    for found, expected in zip(*map(jax.tree.leaves, (result(chunked), result(whole))), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def temporary_bytes(model, sequences):
    """Return what the compiled gradient holds besides inputs and outputs."""
    residues = jax.ShapeDtypeStruct((1, sequences, 16), jnp.int8)
    params = jax.eval_shape(model.init, jax.random.key(0), residues)
    gradient = jax.jit(jax.grad(lambda params, residues: jnp.sum(model.apply(params, residues))))
    return gradient.lower(params, residues).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_chunks_grows_by_the_embeddings_alone():
    model = DeepRC(2, SequenceEmbedding(8, 5, chunk_size=500), key_features=())
    embeddings = 4000 * 8 * 4
    growth = temporary_bytes(model, 8000) - temporary_bytes(model, 4000)
    assert (
        growth < 10 * embeddings
    )  # embeddings, their gradients and the association; the features alone are 57 times as large
    whole = model.clone(embedding=model.embedding.clone(chunk_size=None))
    assert temporary_bytes(whole, 8000) - temporary_bytes(whole, 4000) > 30 * embeddings


# The ranking. ---------------------------------------------------------------------------------------------------------


def test_ranking_sees_the_highest_attended_alone(rng):
    full = DeepRC(2, SMALL, key_features=(4,), kept_fraction=1.0)
    model = full.clone(kept_fraction=0.3)
    residues = jnp.asarray(ragged(rng, 2, 10, 6))
    params = draw_params(rng, full, residues)
    order = np.argsort(-attend(full, {"params": params}, residues)[:, 0, 0], axis=-1)
    attention = np.asarray(attend(model, {"params": params}, residues)[:, 0, 0])
    # The deviation stays that of the whole bag, so the rest of the bag may only be masked in a second look.
    deviation = spread(jnp.sum(residues >= 0, axis=-1), 6)

    def restricted(params, kept):
        chosen = jnp.take_along_axis(residues, jnp.asarray(kept)[..., None], axis=-2)
        z = full.embedding.apply({"params": params["embedding"]}, chosen, deviation=deviation)
        key = jax.nn.selu(z @ params["keys_0"]["kernel"] + params["keys_0"]["bias"])
        weights = jax.nn.softmax(key @ params["pooling"]["state_patterns"][0] / 2, axis=-1)
        return jnp.einsum("bs,bsf->bf", weights, z) @ params["head"]["kernel"] + params["head"]["bias"]

    def value_and_gradient(fn):
        return jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.sin(fn(params)))))(params)

    found = value_and_gradient(lambda params: model.apply({"params": params}, residues))
    highest = value_and_gradient(lambda params: restricted(params, order[:, :3]))
    lowest = value_and_gradient(lambda params: restricted(params, order[:, -3:]))
    for ours, expected in zip(*map(jax.tree.leaves, (found, highest)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert abs(found[0] - lowest[0]) > 1e-2
    for b in range(2):
        assert set(np.flatnonzero(attention[b])) == set(order[b, :3])
    np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=1e-6)


def test_ranking_costs_a_forward_pass_in_place_of_a_backward_pass():
    def flops(model):
        residues = jax.ShapeDtypeStruct((1, 2000, 16), jnp.int8)
        params = jax.eval_shape(model.init, jax.random.key(0), residues)
        gradient = jax.jit(jax.grad(lambda params, residues: jnp.sum(model.apply(params, residues))))
        return gradient.lower(params, residues).compile().cost_analysis()["flops"]

    full = DeepRC(2, SequenceEmbedding(8, 5), key_features=(8,))
    assert flops(full.clone(kept_fraction=0.1)) < 0.75 * flops(full)


def test_a_pooling_that_tells_no_association_cannot_rank(rng):
    class Mean(nn.Module):
        def __call__(self, keys, values, *, key_mask=None, deterministic=True):
            return jnp.mean(values, axis=-2, keepdims=True)

    residues = jnp.asarray(ragged(rng, 2, 10, 6))
    model = DeepRC(2, SMALL, pooling=Mean(), key_features=())
    params = draw_params(rng, model, residues)
    assert model.apply({"params": params}, residues).shape == (2, 2)
    with pytest.raises(ValueError, match="the pooling must sow its association"):
        model.clone(kept_fraction=0.5).apply({"params": params}, residues)


def test_several_heads_and_states_are_ranked_by_the_highest(rng):
    pooling = HopfieldPooling(Hopfield(num_heads=2, head_dim=3, projections=("query", "key"), **NO_NORMS), num_states=2)
    model = DeepRC(2, SMALL, pooling, key_features=(4,), kept_fraction=0.3)
    residues = jnp.asarray(ragged(rng, 2, 10, 6))
    params = draw_params(rng, model, residues)
    full = attend(model.clone(kept_fraction=1.0), {"params": params}, residues)
    kept = attend(model, {"params": params}, residues)
    assert full.shape == kept.shape == (2, 2, 2, 10)
    highest = np.argsort(-np.max(full, axis=(1, 2)), axis=-1)[:, :3]
    for b in range(2):
        assert set(np.flatnonzero(kept[b, 0, 0])) == set(highest[b])


# One sequence decides. ------------------------------------------------------------------------------------------------


def bags_with_one_witness(rng, sequences, motif="CWWC"):
    """Return a bag without and one with the motif, in a single sequence; cysteine occurs nowhere else."""
    letters = [number for number, letter in enumerate(AMINO_ACIDS) if letter != "C"]
    bags = np.repeat(rng.choice(letters, (1, sequences, 12)), 2, axis=0)
    bags[1, sequences // 3, 3:7] = encode([motif]).residues[0]
    return jnp.asarray(bags, jnp.int8)


def motif_detector(motif="CWWC", sharpness=30.0):
    """Return parameters whose only kernel answers selu(1) to the motif and less than half to anything else."""
    kernel = np.zeros((4, 23, 1))
    kernel[np.arange(4), encode([motif]).residues[0], 0] = 1.0
    return {
        "embedding": {"convs_0": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray([-15.0])}},
        "pooling": {"state_patterns": jnp.full((1, 1), sharpness)},
        "head": {"kernel": jnp.asarray([[0.0, 1.0]]), "bias": jnp.zeros(2)},
    }


def signal(beta, sequences, rng):
    """Return by how much the witness moves the logit."""
    pooling = HopfieldPooling(Hopfield(projections=(), beta=beta, **NO_NORMS))
    model = DeepRC(2, SequenceEmbedding(1, 4), pooling, key_features=())
    found = compiled(model)({"params": motif_detector()}, bags_with_one_witness(rng, sequences))
    return float(found[1, 1] - found[0, 1])


def test_one_witness_decides_however_many_sequences_there_are(rng):
    attended = [signal(1.0, sequences, rng) for sequences in (10, 100, 10_000)]
    averaged = [signal(0.0, sequences, rng) for sequences in (10, 100, 10_000)]
    assert min(attended) > 0.9 * max(attended) > 0
    assert averaged[2] < 1e-2 * averaged[0]  # the mean forgets it


@pytest.mark.slow
def test_trained_attention_finds_the_one_sequence_with_the_motif(tmp_path):
    from train import config as configs
    from train import loop

    run = configs.load(Path(__file__).parents[2] / "configs" / "hopfield_repertoire.py")
    task = sys.modules["config_hopfield_repertoire"]
    alone = dataclasses.replace(run, rivals={}, baselines=None, extra_tests={})
    trained = loop.train(alone, tmp_path, devices=jax.devices()[:1], silent=True).state.params
    drawn = task.draw(100, seed=1, rate=0.001)
    positive = np.flatnonzero(drawn.labels)
    residues = jnp.asarray(drawn.residues[positive])

    def hits(params):
        """Return how often the most attended of the thousand sequences carries the motif."""
        attention = attend(run.model, {"params": params}, residues)[:, 0, 0]
        highest = np.argmax(np.asarray(attention), axis=-1)
        return np.take_along_axis(drawn.witnesses[positive], highest[:, None], axis=-1).mean()

    assert hits(trained) > 0.8
    untrained = jax.jit(run.model.init)(jax.random.key(0), residues[:2])["params"]
    assert hits(untrained) < 0.1


# Gradients. -----------------------------------------------------------------------------------------------------------


def test_gradients_agree_with_differences(rng):
    model = DeepRC(2, SequenceEmbedding(3, 3, chunk_size=2), key_features=(3,))
    residues = jnp.asarray(ragged(rng, 1, 5, 4))
    with jax.enable_x64(True):
        shapes = jax.eval_shape(model.init, jax.random.key(0), residues)["params"]
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float64), shapes)
        counts = jnp.asarray(rng.uniform(0.5, 2, (1, 5)))

        def fn(params, counts):
            return model.apply({"params": params}, residues, counts=counts)

        check_grads(jax.jit(fn), (params, counts), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


# The reference code, whose outputs are stored. ------------------------------------------------------------------------

# Our module, and the arguments that the reference was given.
PARITY = {
    # kernel_size=3, n_kernels=6; n_layers=2, n_units=5; n_output_features=1; sequence_reduction_fraction=2, so off
    "all": DeepRC(1, SequenceEmbedding(6, 3), key_features=(5, 5)),
    # n_layers=2; n_layers=1; n_layers=2, n_units=4, n_output_features=3
    "deep": DeepRC(3, SequenceEmbedding(6, 3, depth=2), key_features=(5,), hidden_features=(4,)),
    # kernel_size=4; sequence_reduction_fraction=0.1 of 30 sequences
    "kept": DeepRC(1, SequenceEmbedding(6, 4), key_features=(5, 5), kept_fraction=0.1),
    "counts": DeepRC(2, SequenceEmbedding(6, 3), key_features=(5,)),  # consider_seq_counts=True
    "ragged": DeepRC(1, SequenceEmbedding(6, 3), key_features=(5, 5)),
}


def stored_case(name):
    with np.load(GOLDEN) as stored:
        own = {key.removeprefix(f"{name}/"): stored[key] for key in stored.files if key.startswith(f"{name}/")}
    tensors = {key.removeprefix("parameter/"): value for key, value in own.items() if key.startswith("parameter/")}
    residues, lengths, counts = (jnp.asarray(own[key]) for key in ("residues", "lengths", "counts"))
    shapes = jax.eval_shape(PARITY[name].init, jax.random.key(0), residues, lengths)["params"]
    return tensors, shapes, residues, lengths, (counts if name == "counts" else None), own


@pytest.mark.parametrize("name", ["all", "deep", "kept", "counts"])
def test_equals_the_reference_on_its_parameters(name):
    tensors, shapes, residues, lengths, counts, own = stored_case(name)
    model, params = PARITY[name], from_reference(tensors, shapes)
    found = compiled(model)({"params": params}, residues, lengths, counts=counts)
    np.testing.assert_allclose(found, own["output"], atol=1e-5)
    attention = attend(model, {"params": params}, residues, lengths=lengths, counts=counts)[:, 0, 0]
    if name == "kept":  # theirs in order of rank
        attention = -np.sort(-np.asarray(attention), axis=-1)[:, :3]
    else:
        deviation = spread(lengths, residues.shape[-1], counts=counts)
        embedded = compiled(model.embedding)(
            {"params": params["embedding"]}, residues, lengths, counts=counts, deviation=deviation
        )
        np.testing.assert_allclose(embedded, own["embedded"], atol=1e-5)
    np.testing.assert_allclose(attention, own["attention"], atol=1e-5)


def test_reference_parity_sees_a_wrong_parameter():
    tensors, shapes, residues, lengths, _, own = stored_case("all")
    tensors["attention_nn.attention_nn.4.weight"] = -tensors["attention_nn.attention_nn.4.weight"]
    found = compiled(PARITY["all"])({"params": from_reference(tensors, shapes)}, residues, lengths)
    assert np.abs(found - own["output"]).max() > 1e-2


def test_positions_are_those_of_the_reference():
    with np.load(GOLDEN) as stored:
        np.testing.assert_allclose(position_features(jnp.arange(10), 9), stored["positions"], atol=1e-6)


def test_the_reference_lets_kernels_start_on_padding_and_we_do_not():
    tensors, shapes, residues, lengths, _, own = stored_case("ragged")
    variables = {"params": from_reference(tensors, shapes)["embedding"]}
    ones = np.take_along_axis(own["features"], np.maximum(own["residues"], 0)[..., None], axis=-1)[:, 0, 0, 0]
    embed = functools.partial(compiled(PARITY["ragged"].embedding), variables, deviation=jnp.asarray(1 / ones))
    padding = embed(residues, jnp.zeros_like(lengths))
    shorter = np.asarray(lengths <= 7)  # the first sequences are as long as the array: there theirs sees less
    ours = np.asarray(embed(residues, lengths))
    np.testing.assert_allclose(np.maximum(ours, padding)[shorter], own["embedded"][shorter], atol=1e-5)
    assert np.abs(ours - own["embedded"])[shorter].max() > 0.1
    # Its deviation counts the padding.
    assert np.all(1 / ones < 0.95 * spread(lengths, residues.shape[-1]))


def test_conversion_refuses_what_does_not_fit():
    tensors, shapes, *_ = stored_case("all")
    with pytest.raises(ValueError, match=r"unknown \['sequence_embedding.network.1.weight'\]"):
        from_reference({**tensors, "sequence_embedding.network.2.weight": np.ones((6, 6, 3))}, shapes)
    left = {name: tensor for name, tensor in tensors.items() if name != "attention_nn.attention_nn.0.bias"}
    with pytest.raises(ValueError, match=r"missing \['attention_nn.attention_nn.0.bias'\]"):
        from_reference(left, shapes)
    with pytest.raises(ValueError, match=r"must give embedding/convs_0/kernel its shape"):
        from_reference({**tensors, "sequence_embedding.network.0.weight": np.ones((6, 23, 5))}, shapes)
