"""DeepRC: immune repertoires, sets of hundreds of thousands of receptor sequences, classified by the few that matter.

A bag is a repertoire, `[sequences, length]` residues; which class it has depends on a motif that one sequence in a
thousand may carry.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxlayers.core import axes, dialects
from jaxlayers.core.reference import read_reference
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.hopfield.hopfield import Hopfield, HopfieldPooling

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
"""The twenty letters, in the order of their numbers."""

_CHANNELS = len(AMINO_ACIDS) + 3  # one for each amino acid, three for the position


class Encoded(NamedTuple):
    """What `encode` returns.

    Attributes:
      residues: numbers of the amino acids, int8 `[sequences, length]`, -1 behind the end of a sequence.
      lengths: int32 `[sequences]`.
    """

    residues: np.ndarray
    lengths: np.ndarray


def encode(sequences: Sequence[str], *, length: int | None = None) -> Encoded:
    """Return amino-acid sequences as numbers, the place of each letter in `AMINO_ACIDS`.

    Args:
      sequences: strings of capital letters.
      length: columns of the result, at least the longest sequence; `None` = the longest.

    Raises:
      ValueError: on a letter that is no amino acid, or a sequence longer than `length`.

    Example:
      >>> from jaxlayers.hopfield.deeprc import encode
      >>> encode(["CASSL", "CAT"]).residues.tolist()
      [[1, 0, 15, 15, 9], [1, 0, 16, -1, -1]]
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    longest = int(lengths.max(initial=0))
    if length is not None and length < longest:
        raise ValueError(f"length={length} must be at least {longest}, the longest sequence; set length, or cut it")
    residues = np.full((len(sequences), longest if length is None else length), -1, np.int8)
    numbers = {letter: number for number, letter in enumerate(AMINO_ACIDS)}
    for row, sequence in enumerate(sequences):
        unknown = [letter for letter in sequence if letter not in numbers]
        if unknown:
            raise ValueError(
                f"sequence {row}, {sequence!r}, has the letter {unknown[0]!r}, which must be one of {AMINO_ACIDS}; "
                "leave the sequence out or replace the letter"
            )
        residues[row, : len(sequence)] = [numbers[letter] for letter in sequence]
    return Encoded(residues, lengths)


def position_features(lengths: Integer[Array, "*batch"], length: int) -> Float[Array, "*batch {length} 3"]:
    """Return three features of each place i in a sequence of L residues: near its start, its end, its middle.

    With c = |1 - 2 i / (L - 1)| they are c in the first half (of odd L with the middle) and else 0, c in the second
    half and else 0, and 1 - c. Behind the end of the sequence all are 0.

    Args:
      lengths: L of each sequence, at most `length`.
      length: number of places.
    """
    places, lengths = jnp.arange(length), lengths[..., None]
    inside = places < lengths
    c = jnp.abs(1 - 2 * places / jnp.maximum(lengths - 1, 1))
    first = places < (lengths + 1) // 2
    return jnp.where(inside[..., None], jnp.stack([jnp.where(first, c, 0), jnp.where(first, 0, c), 1 - c], axis=-1), 0)


def input_deviation(
    lengths: Integer[Array, "*batch sequences"],
    length: int,
    *,
    counts: Float[Array, "*batch sequences"] | None = None,
    mask: Bool[Array, "*batch sequences"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the standard deviation of all input features of a bag, 23 at each residue, without forming them.

    Args:
      lengths: of the sequences, at most `length`.
      length: number of places.
      counts: what each sequence's one-hot features are multiplied by; `None` = 1.
      mask: True = a sequence; the others do not count.

    Returns:
      One number a bag; 1 for a bag of fewer than two features, or of equal ones.
    """
    table = position_features(jnp.arange(length + 1), length)
    sums, squares = jnp.sum(table, axis=(-2, -1)), jnp.sum(jnp.square(table), axis=(-2, -1))
    real = jnp.ones(lengths.shape, bool) if mask is None else mask
    factor = jnp.ones((), sums.dtype) if counts is None else counts.astype(jnp.promote_types(counts.dtype, sums.dtype))

    def total(each: Array) -> Array:
        return jnp.sum(each, axis=-1, where=real)

    number = _CHANNELS * total(lengths).astype(sums.dtype)
    mean = total(factor * lengths + sums[lengths]) / jnp.maximum(number, 1)
    square = total(jnp.square(factor) * lengths + squares[lengths]) / jnp.maximum(number, 1)
    variance = (square - jnp.square(mean)) * number / jnp.maximum(number - 1, 1)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 1)


class SequenceEmbedding(nn.Module):
    """Embed amino-acid sequences by a convolution whose strongest response over each sequence is kept.

    z_f = max over i of selu(b_f + sum_{j, c} x[i + j, c] W[j, c, f]) for i = 0 ... L - 1, where x `[L, 23]` holds a one
    for the amino acid at each place, and its `position_features`; behind the end of the sequence x is zero. Further
    layers convolve the responses of the one before, and the maximum is that of the last.

    Symmetry:
      Permutations of the sequences: equivariant. Exact.

    Attributes:
      features: width of an embedding, the number of kernels in each layer.
      kernel_size: residues that a kernel spans.
      depth: convolutions.
      chunk_size: sequences of a bag that are embedded at a time, and again in the backward pass, so that no more than
        these are held as features and responses. `None` = all at once.
      dtype: of computation; `None` = that of the parameters.
      param_dtype: of parameters.
      kernel_init: of the kernels.
      bias_init: of their biases.

    Cost:
      O(length kernel_size 23 features) multiply-accumulates for a sequence, and twice that with `chunk_size` in the
      forward pass of a gradient. Memory for its gradient O(length features) a sequence; with `chunk_size` O(features).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import SequenceEmbedding
      >>> from jaxlayers.hopfield.deeprc import encode
      >>> residues = jnp.asarray(encode(["CASSLGQAYEQYF", "CASSF"]).residues)
      >>> z, variables = SequenceEmbedding(features=8, kernel_size=5).init_with_output(jax.random.key(0), residues)
      >>> z.shape
      (2, 8)

    Source:
      Widrich et al., "Modern Hopfield Networks and Attention for Immune Repertoire Classification", NeurIPS 2020; code:
      ml-jku/DeepRC.

    Differs:
      A kernel starts at the residues of the sequence and at no other place, whatever it is padded to: the code lets it
      start wherever it fits into the longest sequence of a minibatch, on padding too, so that others decide about a
      sequence. Positions are float32 (code: rounded to float16). The LSTM of the code is left out.
    """

    features: int = 32
    kernel_size: int = 9
    depth: int = 1
    chunk_size: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        residues: Integer[Array, "*batch sequences length"],
        lengths: Integer[Array, "*batch sequences"] | None = None,
        *,
        counts: Float[Array, "*batch sequences"] | None = None,
        deviation: Float[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch sequences features"]:
        """Embed each sequence.

        Args:
          residues: numbers of amino acids, 0 to 19; any other is an unknown residue, with zeros for its amino acid.
          lengths: residues of each sequence; what stands behind has no influence. `None` = those of at least 0. A
            sequence of none gets what the kernels answer to zeros.
          counts: what each sequence's one-hot features are multiplied by; `None` = 1.
          deviation: what all features of a bag are divided by; `None` = 1.

        Returns:
          One embedding for each sequence.

        Raises:
          ValueError: if a field is out of range or shapes don't fit.
        """
        for name in ("features", "kernel_size", "depth", "chunk_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} must be at least 1; set {name}")
        lengths = _lengths(residues, lengths)
        _check_each("counts", counts, lengths)
        inverse = None if deviation is None else jnp.broadcast_to(1 / deviation[..., None], lengths.shape)
        parts = (residues, lengths, counts, inverse)
        number = residues.shape[-2]
        chunk_size = self.chunk_size
        if chunk_size is None or chunk_size >= number:
            return self._embed(*parts)

        chunks = -(-number // chunk_size)

        def cut(x: Array) -> Array:
            """Return `[chunks, *batch, chunk_size, ...]`; sequences that fill up the last chunk have no residues."""
            axis = lengths.ndim - 1
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, chunks * chunk_size - number)
            x = jnp.pad(x, widths)
            return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, chunk_size, *x.shape[axis + 1 :]), axis, 0)

        def embed(module: SequenceEmbedding, carry: None, parts: tuple[Any, ...]) -> tuple[None, Array]:
            return carry, nn.remat(SequenceEmbedding._embed, prevent_cse=False)(module, *parts)

        scan = nn.scan(embed, variable_broadcast="params", split_rngs={"params": False})
        found = jnp.moveaxis(scan(self, None, jax.tree.map(cut, parts))[1], 0, -3)
        return found.reshape(*found.shape[:-3], -1, self.features)[..., :number, :]

    def _embed(
        self, residues: Array, lengths: Array, counts: Array | None = None, inverse: Array | None = None
    ) -> Array:
        length = residues.shape[-1]
        inside = jnp.arange(length) < lengths[..., None]
        letters = jax.nn.one_hot(jnp.where(inside, residues, -1), len(AMINO_ACIDS), dtype=jnp.result_type(float))
        if counts is not None:
            letters = letters * counts[..., None, None]
        x = jnp.concatenate([letters, position_features(lengths, length).astype(letters.dtype)], axis=-1)
        if inverse is not None:
            x = x * inverse[..., None, None]
        # Every layer shortens the map by what is added here, so that a kernel can start at every residue.
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, self.depth * (self.kernel_size - 1)), (0, 0)])
        for index in range(self.depth):
            x = nn.selu(x) if index else x
            x = nn.Conv(
                self.features,
                (self.kernel_size,),
                padding="VALID",
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=f"convs_{index}",
            )(x)
        # selu rises everywhere: the maximum may be taken before it. An empty sequence keeps its first response.
        starts = jnp.arange(length) < jnp.maximum(lengths, 1)[..., None]
        return nn.selu(jnp.max(x, axis=-2, where=starts[..., None], initial=-jnp.inf))


def _pooling() -> HopfieldPooling:
    """Return the paper's pooling: keys are made by a network and values are embeddings, so nothing is projected."""
    association = Hopfield(projections=(), state_norm=None, stored_norm=None, value_norm=None, parent=None)
    return HopfieldPooling(association, patterns_init=nn.initializers.normal(1.0), parent=None)


class DeepRC(nn.Module):
    """Classify sets of sequences by the few that an attention picks out.

    logits = o(sum_s p_s z_s) with p = softmax(beta xi^T k(z_s)) over the sequences s of a bag: z_s is the embedding of
    a sequence, k a network of selu layers that makes its key, xi a learned state pattern, beta = 1 / sqrt(width of a
    key) and o the output network. So the bag is a modern Hopfield network that stores all keys and is asked once.

    With `kept_fraction` below 1 all sequences are embedded and ranked by p without gradient; softmax, output and
    gradient then see the highest of them alone.

    Symmetry:
      Permutations of the sequences (with their lengths, counts and mask): invariant. Exact; with `kept_fraction` below
      1 up to ties in the ranking.

    Attributes:
      num_classes: width of the output; 0 = no output network, the pooled embedding instead.
      embedding: of a sequence.
      pooling: of the sequences: called with keys, embeddings, `key_mask` and `deterministic`, it returns
        `[*batch, states, features]`. The default is that of the paper.
      key_features: widths of the layers of k; `()` = the embeddings are the keys.
      hidden_features: widths of the hidden layers of o.
      kept_fraction: share of the sequences of each bag, rounded down but at least one, that is kept after the ranking,
        in (0, 1]; 1 = all, without ranking. The paper's is 0.1.
      dtype: of computation; `None` = that of inputs and parameters.
      param_dtype: of parameters.
      kernel_init: of k, o and the head.
      bias_init: of their biases.

    Collections:
      Those of `Hopfield`, in `pooling/hopfield`; its `association` tells which sequences decide. With `kept_fraction`
      below 1 sows into `intermediates` the places `kept` `[*batch, kept]` of the sequences that it is about, highest
      first. `sequence_attention` puts the two together.

    Cost:
      That of embedding all sequences; with `kept_fraction` f the share f of it again and its gradient.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import DeepRC, SequenceEmbedding
      >>> residues = jnp.zeros((2, 50, 14), jnp.int8)  # 2 repertoires of 50 sequences
      >>> model = DeepRC(2, SequenceEmbedding(features=8, kernel_size=5), key_features=(8,))
      >>> logits, variables = model.init_with_output(jax.random.key(0), residues)
      >>> logits.shape
      (2, 2)

    Source:
      Widrich et al., "Modern Hopfield Networks and Attention for Immune Repertoire Classification", NeurIPS 2020; code:
      ml-jku/DeepRC.

    Differs:
      The code's attention is a linear map to one number, which is beta xi^T k and a bias that the softmax does not see.
      Features are divided by their deviation over the residues of the bag (code: over its padding too, which depends on
      the rest of the minibatch). The share that is kept is at least one sequence. Weights start at the scale that selu
      asks for, 1 / inputs of a unit (code: 1 / entries of the matrix). Two classes have two logits (code: one).
    """

    num_classes: int = 2
    # Made without parent, and not as attributes of the class: Flax's NNX bridge takes those for methods.
    embedding: SequenceEmbedding = dataclasses.field(default_factory=lambda: SequenceEmbedding(parent=None))
    pooling: nn.Module = dataclasses.field(default_factory=_pooling)
    key_features: tuple[int, ...] = (32, 32)
    hidden_features: tuple[int, ...] = ()
    kept_fraction: float = 1.0
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        residues: Integer[Array, "*batch sequences length"],
        lengths: Integer[Array, "*batch sequences"] | None = None,
        *,
        counts: Float[Array, "*batch sequences"] | None = None,
        mask: Bool[Array, "*batch sequences"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch classes"]:
        """Classify each bag.

        Args:
          residues: numbers of amino acids, 0 to 19, as `encode` makes them.
          lengths: residues of each sequence; what stands behind has no influence. `None` = those of at least 0.
          counts: what each sequence's one-hot features are multiplied by; `None` = 1. The reference passes
            log(max(count, 1)), which blanks sequences found once.
          mask: True = a sequence; False = padding of a smaller bag, which has no influence. `None` = all are.
          deterministic: no dropout in the pooling.

        Returns:
          Logits, or pooled embeddings if `num_classes` is 0.

        Raises:
          ValueError: if a field is out of range or shapes don't fit.
        """
        for name in ("key_features", "hidden_features"):
            if any(width < 1 for width in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be widths of at least 1; set {name}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must be at least 0; set num_classes")
        if not 0 < self.kept_fraction <= 1:
            raise ValueError(f"kept_fraction={self.kept_fraction} must lie in (0, 1]; set kept_fraction")
        lengths = _lengths(residues, lengths)
        _check_each("counts", counts, lengths)
        _check_each("mask", mask, lengths)
        deviation = input_deviation(lengths, residues.shape[-1], counts=counts, mask=mask)
        keys = [self._dense(f"keys_{index}", width) for index, width in enumerate(self.key_features)]

        def embed(residues: Array, lengths: Array, counts: Array | None) -> tuple[Array, Array]:
            embedded = key = self.embedding(residues, lengths, counts=counts, deviation=deviation)
            for dense in keys:
                key = nn.selu(dense(key))
            return key, embedded

        if self.kept_fraction < 1:
            most = max(1, int(residues.shape[-2] * self.kept_fraction))
            if self.is_initializing():  # nothing to rank by, and all parameters are made below
                kept = jnp.broadcast_to(jnp.arange(most), (*lengths.shape[:-1], most))
            else:
                ranks = self._ranks(*embed(residues, lengths, counts), mask)
                kept = jax.lax.top_k(jax.lax.stop_gradient(ranks), most)[1]
            self.sow("intermediates", "kept", kept)
            mask = _kept_mask(kept, mask, self.kept_fraction)
            residues = jnp.take_along_axis(residues, kept[..., None], axis=-2)
            lengths = jnp.take_along_axis(lengths, kept, axis=-1)
            counts = None if counts is None else jnp.take_along_axis(counts, kept, axis=-1)
        key, embedded = embed(residues, lengths, counts)
        x = self.pooling(key, embedded, key_mask=mask, deterministic=deterministic)
        x = axes.constrain(x.reshape(*x.shape[:-2], -1), axes.BATCH, None) if x.ndim > 2 else x.reshape(-1)
        if not self.num_classes:
            return x
        for index, width in enumerate(self.hidden_features):
            x = nn.selu(self._dense(f"outputs_{index}", width)(x))
        return self._dense("head", self.num_classes)(x)

    def _ranks(self, key: Array, embedded: Array, mask: Array | None) -> Array:
        """Return the largest association of each sequence over heads and states; that of padding is below all."""
        variables = {"params": self.pooling.variables.get("params", {})}
        pooling = self.pooling.clone(parent=None, name=None)
        sown = pooling.apply(variables, key, embedded, key_mask=mask, mutable="intermediates")[1]
        weights = _sown_association(sown.get("intermediates", {}))
        ranks = jnp.max(weights, axis=(-3, -2))
        return ranks if mask is None else jnp.where(mask, ranks, -1)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name=name,
            parent=self,
        )


def sequence_attention(
    model: DeepRC, variables: Mapping[str, Any], residues: Integer[Array, "*batch sequences length"], **inputs: Any
) -> Float[Array, "*batch heads states sequences"]:
    """Return the association of each sequence, 0 for one that was not kept: those with the most decide the class.

    Args:
      model: with a pooling that sows its association.
      variables: of the model.
      residues: as for the model.
      **inputs: its other inputs, by name.

    Raises:
      ValueError: if the pooling sows no association.
    """
    sown = model.apply(variables, residues, **inputs, mutable="intermediates")[1].get("intermediates", {})
    weights = _sown_association(sown.get("pooling", {}))
    if "kept" not in sown:
        return weights
    kept = jnp.broadcast_to(sown["kept"][0][..., None, None, :], weights.shape)
    nothing = jnp.zeros((*weights.shape[:-1], residues.shape[-2]), weights.dtype)
    return jnp.put_along_axis(nothing, kept, weights, axis=-1, inplace=False)


def _sown_association(intermediates: Mapping[str, Any]) -> Array:
    for path, sown in flax.traverse_util.flatten_dict(dict(intermediates)).items():
        if path[-1] == "association":
            return sown[0]
    raise ValueError("the pooling must sow its association, by which sequences are ranked; set another pooling")


def _kept_mask(kept: Array, mask: Array | None, fraction: float) -> Array | None:
    """Return which of the kept belong: a bag with padding keeps fewer than one without."""
    if mask is None:
        return None
    # From a table in double precision: 0.1 * 30 must not depend on the rounding of a device.
    numbers = np.arange(mask.shape[-1] + 1)
    allowed = np.maximum(1, (numbers * fraction).astype(np.int32)) * (numbers > 0)
    number = jnp.asarray(allowed, jnp.int32)[jnp.sum(mask, axis=-1)]
    return jnp.arange(kept.shape[-1]) < number[..., None]


def _lengths(residues: Array, lengths: Array | None) -> Array:
    """Return the lengths, at most that of the array."""
    if residues.ndim < 2 or not jnp.issubdtype(residues.dtype, jnp.integer):
        raise ValueError(
            f"residues of dtype {residues.dtype} and shape {residues.shape} must be integers, [*batch, sequences, "
            "length]; pass what encode returns"
        )
    if lengths is None:
        return jnp.sum(residues >= 0, axis=-1, dtype=jnp.int32)
    _check_each("lengths", lengths, residues[..., 0])
    return jnp.clip(lengths, 0, residues.shape[-1])


def _check_each(name: str, x: Array | None, each: Array) -> None:
    if x is not None and x.shape != each.shape:
        raise ValueError(f"{name} of shape {x.shape} must be {each.shape}, one for each sequence; pass as many")


# The reference code ---------------------------------------------------------------------------------------------------

REFERENCE_NAMES: Mapping[str, str] = {
    "embedding/convs": "sequence_embedding.network.{conv}",
    "keys": "attention_nn.attention_nn.{key}",
    "outputs": "output_nn.output_nn.{output}",
    "pooling/state_patterns": "attention",
    "head": "head",
}
"""Ours to theirs, with linear layers counted one by one where they count activations between them."""


def from_reference(tensors: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """Return parameters of `DeepRC` from the reference code's state dict.

    Args:
      tensors: arrays by the reference's names.
      params: parameters of our module (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      A parameter tree like `params`.

    Raises:
      ValueError: if names or shapes are not those of `params`.
    """
    found = {}
    last = {
        part: max((int(name.split(".")[2]) for name in tensors if name.startswith(part)), default=-1)
        for part in ("attention_nn.attention_nn.", "output_nn.output_nn.")
    }
    for name, tensor in tensors.items():
        place = re.fullmatch(r"(.+\.)(\d+)\.(\w+)", name)
        if place is None:
            found[name] = tensor  # To be refused by its name.
            continue
        part, index, leaf = place.groups()
        if int(index) != last.get(part):
            found[f"{part}{int(index) // 2}.{leaf}"] = np.asarray(tensor)
        elif part.startswith("output"):
            found[f"head.{leaf}"] = np.asarray(tensor)
        elif leaf == "weight":
            # beta xi = w; the bias adds the same to every sequence.
            found["attention"] = np.asarray(tensor) * math.sqrt(np.shape(tensor)[-1])
    return read_reference(found, params, REFERENCE_NAMES)


def reference_inputs(model: DeepRC) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of a small size, which show the shapes of a model's parameters."""
    length = model.embedding.depth * model.embedding.kernel_size
    return (jax.ShapeDtypeStruct((1, 2, length), jnp.int8),)


def _layout(model: DeepRC, variables: Mapping[str, Any]) -> dialects.Layout:
    table = {
        **REFERENCE_NAMES,
        "pooling/state_patterns": f"attention_nn.attention_nn.{len(model.key_features)}.weight",
        "head": f"output_nn.output_nn.{len(model.hidden_features)}",
    }
    # They count the activations between layers, too.
    counted = dialects.table_layout(
        table, rename=lambda name: re.sub(r"\.(\d+)\.", lambda place: f".{2 * int(place[1])}.", name)
    )
    return counted(model, variables)


def _ignored(model: DeepRC) -> dict[str, str]:
    last = 2 * len(model.key_features)
    return {rf"^attention_nn\.attention_nn\.{last}\.bias$": "it adds the same to the attention of every sequence"}


DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/ml-jku/DeepRC",
        module=DeepRC,
        read=dialects.from_shapes(from_reference),
        marks=(r"^sequence_embedding\.network\.0\.weight$", r"^attention_nn\.attention_nn\.0\.weight$"),
        ignored=_ignored,
        layout=_layout,
        one_way="the vector of the attention is scaled by the root of its length",
    ),
)


VARIANTS: dict[str, dict[str, Any]] = {
    # The settings of the reference's examples, for its four kinds of data.
    "deeprc": {
        "module": DeepRC,
        "inputs": (jax.ShapeDtypeStruct((1, 100, 16), jnp.int8),),
        "num_classes": 2,
        "embedding": SequenceEmbedding(features=32, kernel_size=9, chunk_size=50_000),
        "key_features": (32, 32),
        "kept_fraction": 0.1,
    },
}
