"""Hopular: a network whose every block looks up the whole training set, and its objective.

`TableSchema` of `tabular` says what each column of a table holds, `table_statistics` and `encode_table` there make of
raw rows what `Hopular` takes; here `augment_table` and `hopular_loss` are its training task. Longer than most files,
since parts, model, objective and the reference's names belong to one paper.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.core import axes, dialects, remat
from jaxlayers.core.dtypes import at_least_float32
from jaxlayers.core.types import Dtype, Initializer, Params
from jaxlayers.hopfield import hopfield as _hopfield
from jaxlayers.hopfield.hopfield import Hopfield
from jaxlayers.hopfield.tabular import CategoricalColumn, ContinuousColumn, TableSchema, check_width
from jaxlayers.nn.feed_forward import exact_gelu

# Uniform in +-1/sqrt(fan_in), as the reference draws kernels and embeddings.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# E[x^2] - E[x]^2 would leave rounding errors far above so small an epsilon.
_layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-12, use_fast_variance=False)


def hopular_lookup(num_heads: int = 8, *, dropout_rate: float = 0.1) -> Hopfield:
    """Return the `Hopfield` that both lookups of a block use: no norms of its own, as the block has them.

    For another beta, width or form of the association take a copy: `hopular_lookup().clone(beta=2.0)`.

    Args:
      num_heads: memories side by side.
      dropout_rate: rate of associations dropped.
    """
    return Hopfield(
        num_heads=num_heads,
        dropout_rate=dropout_rate,
        state_norm=None,
        stored_norm=None,
        value_norm=None,
        kernel_init=_uniform,
    )


# The network. ---------------------------------------------------------------------------------------------------------


class HopularEmbedding(nn.Module):
    """Embed every entry of every row.

    e_c = W_c norm(gelu(v_c + t_kind(c) + p_c)) + b_c with v_c = x_c u_c for a number x_c, the row of u_c of its class
    for a category, a learned m_c for a masked entry and 0 for a missing one; t and p are learned embeddings of the
    kind and of the column, `norm` a layer norm with parameters of its own for each column.

    Symmetry:
      Permutations of the rows: equivariant. Exact.

    Attributes:
      schema: of the table.
      features: width e of an embedding.
      dropout_rate: dropout before the norm, in [0, 1).
      dtype: of computation; `None` = that of inputs and parameters.
      param_dtype: of parameters.
      kernel_init: of embeddings and of each column's W_c.
      bias_init: of b_c.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Cost:
      columns x features^2 multiply-accumulates a row; categories are looked up, not multiplied.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import CategoricalColumn, ContinuousColumn, HopularEmbedding, TableSchema
      >>> schema = TableSchema((ContinuousColumn(), CategoricalColumn(3)))
      >>> rows = jnp.asarray([[0.5, 2.0], [-1.0, 0.0]])
      >>> HopularEmbedding(schema, features=8).init_with_output(jax.random.key(0), rows)[0].shape
      (2, 2, 8)

    Source:
      Schäfl et al., "Hopular: Modern Hopfield Networks for Tabular Data", 2022; code: ml-jku/hopular, EmbeddingBlock.

    Differs:
      Parameters of all columns lie in one array each (code: a module for each column), and the bias of v_c, which adds
      to p_c, is left out.
    """

    schema: TableSchema
    features: int = 32
    dropout_rate: float = 0.1
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = _uniform
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*batch columns"],
        *,
        present: Bool[Array, "*#batch columns"] | None = None,
        masked: Bool[Array, "*#batch columns"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch columns features"]:
        """Embed rows.

        Args:
          inputs: standardised numbers and codes, as `encode_table` makes them; codes beyond the classes of a column
            count as its nearest.
          present: False = missing: the entry's content has no influence. `None` = all there.
          masked: True = hidden: the same, but the network sees that it is asked for; missing entries stay missing.
            `None` = none.
          deterministic: no dropout.

        Returns:
          One embedding for each entry.

        Raises:
          ValueError: if a field is out of range or the width is not the schema's.
        """
        if self.features < 1:
            raise ValueError(f"features={self.features} must be at least 1; set features")
        sizes, count = self.schema.sizes, len(self.schema.columns)
        check_width("inputs", inputs.shape, count)
        present = jnp.ones(inputs.shape, bool) if present is None else _fit("present", present, inputs.shape)
        masked = jnp.zeros(inputs.shape, bool) if masked is None else _fit("masked", masked, inputs.shape)
        visible = present & ~masked
        values = jnp.where(visible, inputs, 0)

        # The rows of a column: one for a number, or one a class, and one for the mask.
        table = self.param("value_embedding", self._values_init, sizes)
        kinds = self.param("type_embedding", self._embedding_init, 2)
        places = self.param("position_embedding", self._embedding_init, count)
        kernel = self.param("kernel", self._kernels_init, count)
        bias = self.param("bias", self.bias_init, (count, self.features), self.param_dtype)
        numbers, table, kinds, places, kernel, bias = promote_dtype(
            values, table, kinds, places, kernel, bias, dtype=self.dtype
        )
        ends = np.cumsum(np.asarray(sizes) + 1) - 1
        starts = ends - sizes
        categorical = self.schema.categorical
        x = numbers[..., None] * jnp.where(categorical[:, None], 0, table[starts])
        if (coded := np.flatnonzero(categorical)).size:
            codes = jnp.clip(values[..., coded].astype(jnp.int32), 0, np.asarray(sizes)[coded] - 1)
            looked_up = table[starts[coded] + codes] * visible[..., coded, None]
            x = x.at[..., coded, :].set(looked_up, unique_indices=True)
        x = x + table[ends] * (masked & present)[..., None] + (kinds[categorical.astype(int)] + places)

        x = nn.Dropout(self.dropout_rate)(exact_gelu(x), deterministic=deterministic)
        norm = _layer_norm(feature_axes=(-2, -1), dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        return jnp.einsum("...cf,cfg->...cg", norm(x), kernel) + bias

    def _embedding_init(self, key: jax.Array, count: int) -> jax.Array:
        # Of scale 1/sqrt(features), as the reference has it, whatever the number of embeddings.
        return self.kernel_init(key, (self.features, count), self.param_dtype).T

    def _values_init(self, key: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
        keys = jax.random.split(key, len(sizes))
        return jnp.concatenate(
            [self.kernel_init(k, (n + 1, self.features), self.param_dtype) for k, n in zip(keys, sizes, strict=True)]
        )

    def _kernels_init(self, key: jax.Array, count: int) -> jax.Array:
        shape = (self.features, self.features)
        return jnp.stack([self.kernel_init(k, shape, self.param_dtype) for k in jax.random.split(key, count)])


class HopularSummary(nn.Module):
    """Predict every column from the embeddings of all.

    y = W norm(gelu(x)) + b with x the embeddings of a row side by side.

    Symmetry:
      Permutations of the rows: equivariant. Exact.

    Attributes:
      schema: of the table.
      dropout_rate: dropout before the norm, in [0, 1).
      dtype: of computation; `None` = that of inputs and parameters.
      param_dtype: of parameters.
      kernel_init: of W.
      bias_init: of b.

    Collections:
      The RNG stream `dropout`, when `deterministic=False` and the rate is not 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import CategoricalColumn, ContinuousColumn, HopularSummary, TableSchema
      >>> schema = TableSchema((ContinuousColumn(), CategoricalColumn(3)))
      >>> HopularSummary(schema).init_with_output(jax.random.key(0), jnp.ones((5, 2, 8)))[0].shape
      (5, 4)

    Source:
      Schäfl et al., "Hopular: Modern Hopfield Networks for Tabular Data", 2022; code: ml-jku/hopular,
      SummarizationBlock.

    Differs:
      none.
    """

    schema: TableSchema
    dropout_rate: float = 0.01
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = _uniform
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "*batch columns features"], *, deterministic: bool = True
    ) -> Float[Array, "*batch width"]:
        """Predict.

        Args:
          inputs: an embedding for each entry.
          deterministic: no dropout.

        Returns:
          All columns side by side, each at `schema.slice_of(column)`: a standardised number, or logits.

        Raises:
          ValueError: if the columns are not as many as the schema's.
        """
        if inputs.ndim < 2:
            raise ValueError(f"inputs has shape {inputs.shape} and must be [*batch, columns, features]; add an axis")
        check_width("inputs", inputs.shape[:-1], len(self.schema.columns))
        x = exact_gelu(inputs.reshape(*inputs.shape[:-2], -1))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
        x = _layer_norm(dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x)
        return nn.Dense(
            self.schema.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name="out",
        )(x)


class HopularBlock(nn.Module):
    """Refine rows by what they retrieve from the training set, then by what their columns retrieve from the input.

    z = n(x) + H_s(n(x), n(M)), then y = n'(z) + H_f(n'(z), n'(o)). H_s: each row, its embeddings side by side, is a
    state pattern, and the rows of the training set M are the stored patterns (sample-sample). H_f: each column of a row
    is a state pattern, and the columns o of the row as they entered the network are the stored patterns
    (feature-feature and feature-target). n and n' are layer norms, which the residuals leave from.

    Symmetry:
      Permutations of the stored rows (with `own` and `memory_mask`): invariant. Permutations of the rows: equivariant.
      Exact.

    Attributes:
      sample: H_s.
      feature: H_f.
      dtype: of computation; `None` = that of inputs and parameters. `sample` and `feature` have their own.
      param_dtype: of the norms' parameters.

    Collections:
      Those of `Hopfield`, in `sample_sample` and `feature_feature`: what the first sows says which training rows were
      retrieved.

    Cost:
      O(rows x stored x head_dim x num_heads) for H_s, O(rows x columns^2 x head_dim x num_heads) for H_f, and the
      projections of the stored rows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import HopularBlock, hopular_lookup
      >>> block = HopularBlock(hopular_lookup(2), hopular_lookup(2))
      >>> rows, memory = jnp.ones((4, 3, 8)), jnp.ones((9, 3, 8))
      >>> block.init_with_output(jax.random.key(0), rows, memory, rows)[0].shape
      (4, 3, 8)

    Source:
      Schäfl et al., "Hopular: Modern Hopfield Networks for Tabular Data", 2022; code: ml-jku/hopular, HopularBlock.

    Differs:
      A row that may retrieve nothing gets the output bias of H_s (code: NaN).
    """

    sample: Hopfield
    feature: Hopfield
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*batch rows columns features"],
        memory: Float[Array, "*#batch stored columns features"],
        original: Float[Array, "*batch rows columns features"],
        *,
        own: Int[Array, "*#batch rows"] | None = None,
        memory_mask: Bool[Array, "*#batch stored"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch rows columns features"]:
        """Refine rows.

        Args:
          inputs: rows as the block before left them.
          memory: embeddings of the training set.
          original: rows as they entered the first block.
          own: index of the one stored row that a row may not retrieve, since it is itself; -1 = none.
          memory_mask: True = a training row; False = padding.
          deterministic: no dropout.

        Returns:
          Refined rows.

        Raises:
          ValueError: if a field is out of range or shapes don't fit.
        """
        if inputs.ndim < 3 or memory.ndim < 3:
            raise ValueError(
                f"inputs has shape {inputs.shape} and memory {memory.shape}, which must be [*batch, rows, columns, "
                "features]; add axes"
            )
        if inputs.shape[-2:] != memory.shape[-2:] or inputs.shape != original.shape:
            raise ValueError(
                f"inputs of shape {inputs.shape} must have the columns and features of memory {memory.shape} and the "
                f"shape of original {original.shape}; embed all by one table"
            )
        norm = functools.partial(_layer_norm, dtype=self.dtype, param_dtype=self.param_dtype)
        norm_sample, norm_feature = norm(name="norm_sample"), norm(name="norm_feature")
        x = norm_sample(inputs.reshape(*inputs.shape[:-2], -1))
        stored = norm_sample(memory.reshape(*memory.shape[:-2], -1))
        # Copies, since one `Hopfield` given for both would share its parameters.
        sample = self.sample.clone(parent=self, name="sample_sample")
        feature = self.feature.clone(parent=self, name="feature_feature")
        x = x + sample(x, stored, key_mask=memory_mask, exclude=own, deterministic=deterministic)
        x = norm_feature(axes.constrain(x.reshape(inputs.shape), axes.BATCH, None, None))
        return x + feature(x, norm_feature(original), deterministic=deterministic)


class Hopular(nn.Module):
    """Predict every column of rows of a table from their other columns and the whole training set.

    A row with its hidden entries masked and the training rows with all of theirs are embedded, `depth` blocks refine
    the row (see `HopularBlock`), each with the training set before it, and every column is predicted from the result.
    The targets of the rows are always hidden, those of the training rows never.

    Symmetry:
      Permutations of the training rows (with `own` and `memory_mask`): invariant. Permutations of the rows:
      equivariant. Exact. No prediction depends on the row's own hidden entries; if `own` is its place in the training
      set, nor through that.

    Attributes:
      schema: of the table.
      features: width of an embedding.
      depth: number of blocks.
      sample: H_s of each block, where `streaming` splits a large training set and `beta` and `association_fn` say how
        many rows are retrieved at once. With `head_dim=None` it is as wide as columns * features / num_heads.
      feature: H_f of each block.
      input_dropout_rate: dropout of embeddings.
      output_dropout_rate: dropout before the prediction.
      remat: what of each block the backward pass computes anew, a name of `jaxlayers.core.remat.POLICIES`.
      dtype: of computation, also of `sample` and `feature` where they name none; `None` = that of inputs and
        parameters.
      param_dtype: of parameters outside of `sample` and `feature`.
      kernel_init: of embeddings and of the prediction; `sample` and `feature` have their own.
      bias_init: of biases outside of `sample` and `feature`.

    Collections:
      The RNG stream `dropout`, when `deterministic=False`. Those of `HopularBlock`, in `block_<i>`.

    Cost:
      O(depth x rows x stored x columns x features), and the same with columns for `stored`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.hopfield import CategoricalColumn, ContinuousColumn, Hopular, TableSchema
      >>> model = Hopular(TableSchema((ContinuousColumn(), CategoricalColumn(2))), depth=2)
      >>> train = jnp.asarray([[0.5, 1], [-0.3, 0], [0.1, 1]])
      >>> model.init_with_output(jax.random.key(0), train, train, own=jnp.arange(3))[0].shape
      (3, 3)

    Source:
      Schäfl et al., "Hopular: Modern Hopfield Networks for Tabular Data", 2022; code: ml-jku/hopular.

    Differs:
      The target of a row is masked also where it is missing (code: embedded as missing, so that an unlabelled row would
      be seen as another kind of row). Biases begin at zero (code: uniform). See also the parts.
    """

    schema: TableSchema
    features: int = 32
    depth: int = 8
    sample: Hopfield = dataclasses.field(default_factory=hopular_lookup)
    feature: Hopfield = dataclasses.field(default_factory=hopular_lookup)
    input_dropout_rate: float = 0.1
    output_dropout_rate: float = 0.01
    remat: str | bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = _uniform
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "*batch rows columns"],
        memory: Float[Array, "*#batch stored columns"],
        *,
        present: Bool[Array, "*#batch #rows columns"] | None = None,
        masked: Bool[Array, "*#batch #rows columns"] | None = None,
        memory_present: Bool[Array, "*#batch #stored columns"] | None = None,
        memory_mask: Bool[Array, "*#batch stored"] | None = None,
        own: Int[Array, "*#batch rows"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "*batch rows width"]:
        """Predict.

        Args:
          inputs: rows as `encode_table` or `augment_table` make them. What they hold for targets has no influence.
          memory: the training rows, as `encode_table` makes them, with their targets.
          present: False = a missing entry of `inputs`. `None` = all there.
          masked: True = a hidden entry of `inputs`. Targets are hidden anyway.
          memory_present: False = a missing entry of `memory`. `None` = all there.
          memory_mask: True = a training row; False = padding. `None` = no padding. A mask drawn anew at each step of
            training leaves a part of the training set out.
          own: place of each row in `memory`, which it may not retrieve; -1 = it is not there. `None` = none is there.
          deterministic: no dropout.

        Returns:
          All columns side by side, each at `schema.slice_of(column)`: a standardised number, or logits.

        Raises:
          ValueError: if a field is out of range or shapes don't fit.
        """
        if self.depth < 1:
            raise ValueError(f"depth={self.depth} must be at least 1; set depth")
        for name, x in (("inputs", inputs), ("memory", memory)):
            if x.ndim < 2:
                raise ValueError(f"{name} has shape {x.shape} and must be [*batch, rows, columns]; add an axis")
            check_width(name, x.shape, len(self.schema.columns))
        if not memory.shape[-2]:
            raise ValueError("memory has 0 rows and must have at least 1; pass the training set")
        if own is not None:
            if own.shape[-1:] != inputs.shape[-2:-1]:
                raise ValueError(f"own has shape {own.shape} and must be an index for each of {inputs.shape[-2]} rows")
            # A place beyond the memory would exclude nothing. While tracing there is nothing to look at.
            if not isinstance(own, jax.core.Tracer):
                wrong = (np.asarray(own) < -1) | (np.asarray(own) >= memory.shape[-2])
                if wrong.any():
                    raise ValueError(f"own={own} must be in [0, {memory.shape[-2]}), or -1; pass places in memory")
        present = jnp.ones(inputs.shape, bool) if present is None else _fit("present", present, inputs.shape)
        masked = jnp.zeros(inputs.shape, bool) if masked is None else _fit("masked", masked, inputs.shape)
        embed = HopularEmbedding(
            self.schema,
            self.features,
            self.input_dropout_rate,
            self.dtype,
            self.param_dtype,
            self.kernel_init,
            self.bias_init,
            name="embed",
        )
        target = self.schema.is_target
        x = embed(inputs, present=present | target, masked=masked | target, deterministic=deterministic)
        stored = embed(memory, present=memory_present, deterministic=deterministic)
        original = x = axes.constrain(x, axes.BATCH, None, None)
        stored = axes.constrain(stored, axes.PATTERNS, None, None)

        def refine(block: nn.Module, x: Array, stored: Array, original: Array) -> Array:
            return block(x, stored, original, own=own, memory_mask=memory_mask, deterministic=deterministic)

        # Copies without this module as their parent, or all blocks would share one.
        parts = [part.clone(parent=None, dtype=part.dtype or self.dtype) for part in (self.sample, self.feature)]
        for index in range(self.depth):
            block = HopularBlock(*parts, dtype=self.dtype, param_dtype=self.param_dtype, name=f"block_{index}")
            x = remat.remat_block(refine, self.remat)(block, x, stored, original)
        return HopularSummary(
            self.schema,
            self.output_dropout_rate,
            self.dtype,
            self.param_dtype,
            self.kernel_init,
            self.bias_init,
            name="summary",
        )(x, deterministic=deterministic)


# The objective. -------------------------------------------------------------------------------------------------------


class MaskedTable(NamedTuple):
    """What `augment_table` returns.

    Attributes:
      values: rows in which some entries are replaced, `[*batch, rows, columns]`.
      masked: True = hidden from the network, all targets among them, `[*batch, rows, columns]`.
      counted: True = the loss counts the prediction of this entry, `[*batch, rows, columns]`.
    """

    values: Array
    masked: Array
    counted: Array


def augment_table(
    key: jax.Array,
    schema: TableSchema,
    values: Float[Array, "*batch rows columns"],
    present: Bool[Array, "*#batch #rows columns"],
    *,
    select_rate: float = 1.0,
    mask_rate: float = 0.025,
    replace_rate: float = 0.175,
) -> MaskedTable:
    """Hide and replace entries at random, which the network then has to find out (as BERT's language model does).

    Each entry of a feature is selected with probability `select_rate`. Of the selected ones `mask_rate` are masked,
    `replace_rate` get a random value (a class drawn uniformly, the right one too, or a standard normal number) and the
    others stay as they are; the loss counts them all, and every target. Missing entries stay missing and don't count.

    Args:
      key: of the random numbers.
      schema: of the table.
      values: encoded rows.
      present: False = missing.
      select_rate: share of features' entries that the loss counts.
      mask_rate: share of those that are masked.
      replace_rate: share of those that are replaced.

    Raises:
      ValueError: if a rate is outside of [0, 1] or the width is not the schema's.
    """
    check_width("values", values.shape, len(schema.columns))
    for name, rate in (("select_rate", select_rate), ("mask_rate", mask_rate), ("replace_rate", replace_rate)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name}={rate} must be in [0, 1]; set {name}")
    if mask_rate + replace_rate > 1:
        raise ValueError(f"mask_rate={mask_rate} and replace_rate={replace_rate} must add up to at most 1; lower one")
    present = _fit("present", present, values.shape)
    select_key, kind_key, number_key, class_key = jax.random.split(key, 4)
    target, sizes = schema.is_target, np.asarray(schema.sizes)
    selected = (jax.random.uniform(select_key, values.shape) < select_rate) & ~target
    kind = jax.random.uniform(kind_key, values.shape)
    numbers = jax.random.normal(number_key, values.shape, values.dtype)
    classes = jax.random.randint(class_key, values.shape, 0, sizes).astype(values.dtype)
    replaced = selected & (kind >= mask_rate) & (kind < mask_rate + replace_rate)
    values = jnp.where(replaced & present, jnp.where(schema.categorical, classes, numbers), values)
    return MaskedTable(values, (selected & (kind < mask_rate)) | target, (selected | target) & present)


def column_losses(
    schema: TableSchema,
    prediction: Float[Array, "*batch width"],
    values: Float[Array, "*batch columns"],
    counted: Bool[Array, "*#batch columns"],
) -> tuple[Float[Array, " columns"], Int[Array, " columns"]]:
    """Return the mean loss of each column over its counted entries (0 if there are none), and how many there are.

    The loss is (prediction - value)^2 of a standardised number, and the cross-entropy of a category. What is not
    counted has no influence, whatever it holds.

    Args:
      schema: of the table.
      prediction: output of `Hopular`.
      values: encoded rows, as they were before `augment_table`.
      counted: True = counts.

    Raises:
      ValueError: if widths are not the schema's.
    """
    check_width("prediction", prediction.shape, schema.width)
    check_width("values", values.shape, len(schema.columns))
    counted = _fit("counted", counted, values.shape)
    prediction = prediction.astype(at_least_float32(prediction.dtype))
    values = jnp.where(counted, values, 0).astype(prediction.dtype)
    sizes = np.asarray(schema.sizes)
    starts, kinds = np.cumsum(sizes) - sizes, np.where(schema.categorical, sizes, 0)
    losses = jnp.zeros(values.shape, prediction.dtype)
    for classes in np.unique(kinds):  # columns with equally many classes at once
        columns = np.flatnonzero(kinds == classes)
        chosen = counted[..., columns]
        if not classes:
            loss = jnp.square(jnp.where(chosen, prediction[..., starts[columns]], 0) - values[..., columns])
        else:
            logits = prediction[..., starts[columns][:, None] + np.arange(classes)]
            logits = jax.nn.log_softmax(jnp.where(chosen[..., None], logits, 0))
            codes = values[..., columns].astype(jnp.int32)
            loss = -jnp.take_along_axis(logits, codes[..., None], axis=-1, mode="clip")[..., 0]
        losses = losses.at[..., columns].set(jnp.where(chosen, loss, 0), unique_indices=True)
    over = tuple(range(values.ndim - 1))
    counts = jnp.sum(counted, axis=over)
    return jnp.sum(losses, axis=over) / jnp.maximum(counts, 1), counts


class HopularLoss(NamedTuple):
    """What `hopular_loss` returns.

    Attributes:
      total: what training minimises.
      features: mean over the features.
      targets: mean over the targets.
    """

    total: Array
    features: Array
    targets: Array


def hopular_loss(
    schema: TableSchema,
    prediction: Float[Array, "*batch width"],
    values: Float[Array, "*batch columns"],
    counted: Bool[Array, "*#batch columns"],
    *,
    feature_weight: float | int | Float[Array, ""],
) -> HopularLoss:
    """Return a L_features + (1 - a) L_targets, each the mean of the losses of its columns with counted entries.

    Where no feature (no target) has a counted entry, the total is the loss of the targets (of the features) alone.

    Args:
      schema: of the table.
      prediction: output of `Hopular`.
      values: encoded rows, as they were before `augment_table`.
      counted: True = counts, as `augment_table` returns it.
      feature_weight: a, see `feature_weight_at`.

    Raises:
      ValueError: if widths are not the schema's.
    """
    losses, counts = column_losses(schema, prediction, values, counted)

    def mean(columns: np.ndarray) -> tuple[jax.Array, jax.Array]:
        some = (counts > 0) & columns
        return jnp.sum(losses * some) / jnp.maximum(jnp.sum(some), 1), jnp.any(some)

    (features, any_feature), (targets, any_target) = mean(~schema.is_target), mean(schema.is_target)
    weight = jnp.where(any_feature & any_target, feature_weight, jnp.where(any_feature, 1.0, 0.0))
    return HopularLoss(weight * features + (1 - weight) * targets, features, targets)


def feature_weight_at(
    progress: float | int | Float[Array, ""], *, initial: float | int = 1.0, final: float | int = 0.0
) -> Float[Array, ""]:
    """Return the weight of the features' loss: final + (initial - final) (1 + cos(pi progress)) / 2.

    Args:
      progress: share of the annealing that is done; beyond [0, 1] the weight stays. (The reference anneals over 10,000
        epochs and trains 5,000: its weight ends at 1/2.)
      initial: weight at 0.
      final: weight at 1.

    Raises:
      ValueError: if a weight is outside of [0, 1].
    """
    for name, weight in (("initial", initial), ("final", final)):
        if not 0 <= weight <= 1:
            raise ValueError(f"{name}={weight} must be in [0, 1]; set {name}")
    progress = jnp.clip(jnp.asarray(progress, jnp.result_type(float)), 0, 1)
    return final + (initial - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


# What they share. -----------------------------------------------------------------------------------------------------


def _fit(name: str, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if mask.dtype != bool:
        raise ValueError(f"{name} of dtype {mask.dtype} must be bool; compare it with something")
    try:
        return jnp.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"{name} of shape {mask.shape} must broadcast to the rows {shape}; pass one that does"
        ) from None


# The reference code ---------------------------------------------------------------------------------------------------


def from_reference(tensors: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """Return parameters of `Hopular` from the reference code's state dict (its memory is data, and is left out).

    Args:
      tensors: arrays by the reference's names.
      params: parameters of our module (or their shapes, from `jax.eval_shape`), which say what is wanted.

    Returns:
      A parameter tree like `params`.

    Raises:
      ValueError: if names or shapes are not those of `params`.
    """
    left = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    for buffer in ("memory", "memory_ids", "embeddings.feature_types", "embeddings.feature_positions"):
        left.pop(buffer, None)
    wanted = flax.traverse_util.flatten_dict(params, sep="/")
    found: dict[str, Any] = {}
    try:
        columns = range(wanted["embed/position_embedding"].shape[0])
        take = left.pop

        def each(name: str) -> list[np.ndarray]:
            return [take(name.format(column)) for column in columns]

        values = [kernel.T for kernel in each("embeddings.feature_embeddings.{}.0.weight")]
        found["embed/value_embedding"] = np.concatenate(values)
        found["embed/type_embedding"] = take("embeddings.feature_type_embeddings.weight")
        found["embed/position_embedding"] = take("embeddings.feature_position_embeddings.weight") + np.stack(
            each("embeddings.feature_embeddings.{}.0.bias")
        )
        found["embed/norm/scale"] = np.stack(each("embeddings.feature_projections.{}.2.weight"))
        found["embed/norm/bias"] = np.stack(each("embeddings.feature_projections.{}.2.bias"))
        found["embed/kernel"] = np.stack([k.T for k in each("embeddings.feature_projections.{}.3.weight")])
        found["embed/bias"] = np.stack(each("embeddings.feature_projections.{}.3.bias"))
        for name in (name for name in params if name.startswith("block_")):
            theirs = f"hopular_blocks.{name.removeprefix('block_')}"
            for part in ("sample", "feature"):
                lookup = f"{part}_{part}"
                found[f"{name}/norm_{part}/scale"] = take(f"{theirs}.{part}_norm.weight")
                found[f"{name}/norm_{part}/bias"] = take(f"{theirs}.{part}_norm.bias")
                prefix = f"{theirs}.{lookup}_associations.hopfield_lookup."
                names = [one for one in left if one.startswith(prefix)]
                taken = {one.removeprefix(prefix): take(one) for one in names}
                tree = _hopfield.from_reference(taken, params[name][lookup])
                found |= flax.traverse_util.flatten_dict({name: {lookup: tree}}, sep="/")
        found["summary/norm/scale"] = take("summarizations.feature_summarizations.2.weight")
        found["summary/norm/bias"] = take("summarizations.feature_summarizations.2.bias")
        found["summary/out/kernel"] = take("summarizations.feature_summarizations.3.weight").T
        found["summary/out/bias"] = take("summarizations.feature_summarizations.3.bias")
    except KeyError as error:
        raise ValueError(f"the state dict must match the module; {error} is missing; set the module's fields") from None
    wrong = [
        f"{path} {found[path].shape if path in found else 'missing'} for {tuple(wanted[path].shape)}"
        for path in wanted
        if path not in found or tuple(found[path].shape) != tuple(wanted[path].shape)
    ]
    if left or wrong:
        raise ValueError(f"the state dict must match the module; unknown {sorted(left)}, wrong {wrong}; set its fields")
    return flax.traverse_util.unflatten_dict({path: jnp.asarray(found[path]) for path in wanted}, sep="/")


def reference_inputs(model: Hopular) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return inputs of the least size, which show the shapes of a model's parameters."""
    return (jax.ShapeDtypeStruct((1, len(model.schema.columns)), jnp.float32),) * 2


def _layout(model: Hopular, variables: Mapping[str, Any]) -> dialects.Layout:
    params = dict(variables["params"])
    params.pop("embed")
    table = {"summary/norm": f"{_SUMMARY}.2", "summary/out": f"{_SUMMARY}.3"}
    for index in range(model.depth):
        for part in ("sample", "feature"):
            theirs = f"hopular_blocks.{index}.{part}"
            table[f"block_{index}/norm_{part}"] = f"{theirs}_norm"
            for ours, names in _hopfield.REFERENCE_NAMES.items():
                table[f"block_{index}/{part}_{part}/{ours}"] = (
                    f"{theirs}_{part}_associations.hopfield_lookup.{names[0]}"
                )
    width, columns = model.features, len(model.schema.sizes)
    found: dict[str, tuple[int, ...]] = {
        "embeddings.feature_type_embeddings.weight": (2, width),
        "embeddings.feature_position_embeddings.weight": (columns, width),
    }
    for column, size in enumerate(model.schema.sizes):
        found[f"embeddings.feature_embeddings.{column}.0.weight"] = (width, size + 1)  # with a flag of masked ones
        found[f"embeddings.feature_embeddings.{column}.0.bias"] = (width,)
        for place, leaf, shape in ((2, "weight", (width,)), (3, "weight", (width, width))):
            found[f"embeddings.feature_projections.{column}.{place}.{leaf}"] = shape
            found[f"embeddings.feature_projections.{column}.{place}.bias"] = (width,)
    return {**found, **dialects.table_layout(table)(model, {"params": params})}


_SUMMARY = "summarizations.feature_summarizations"
DIALECTS = (
    dialects.Dialect(
        name="official",
        origin="github.com/ml-jku/hopular",
        module=Hopular,
        read=dialects.from_shapes(from_reference),
        marks=(r"^embeddings\.feature_embeddings\.0\.0\.weight$", rf"^{_SUMMARY}\.3\.weight$"),
        ignored={
            r"^memory(_ids)?$": "the rows of the training set, which are an input here",
            r"^embeddings\.feature_(types|positions)$": "numbers of the columns, which follow from the schema",
        },
        layout=_layout,
        one_way="the bias of each column's embedding is added to the embedding of its position",
    ),
)

_BINARY_TABLE = TableSchema((*(ContinuousColumn() for _ in range(30)), CategoricalColumn(2)))
_INPUTS = (jax.ShapeDtypeStruct((1, 31), jnp.float32), jax.ShapeDtypeStruct((256, 31), jnp.float32))

VARIANTS: dict[str, dict[str, Any]] = {
    # The defaults of the reference's command line; thirty numbers and two classes stand for a table.
    "hopular": {"module": Hopular, "inputs": _INPUTS, "schema": _BINARY_TABLE},
    # For tables of less than a thousand rows: the smaller model of the reference's README, without its larger beta.
    "hopular_small": {
        "module": Hopular,
        "inputs": _INPUTS,
        "schema": _BINARY_TABLE,
        "depth": 2,
        "sample": hopular_lookup(4),
        "feature": hopular_lookup(4),
    },
}
