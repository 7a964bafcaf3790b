"""Hopular with the interface of scikit-learn: `HopularClassifier`, `HopularRegressor`, and the optimiser of their fit.

Needs scikit-learn and optax, which `import jaxlayers` does not: `from jaxlayers.hopfield.hopular_estimator import ...`.
Longer than most files, since half of it says what the parameters of the two estimators mean, and the optimiser and the
reading of columns serve nothing else.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlayers.hopfield.hopular import (
    Hopular,
    augment_table,
    feature_weight_at,
    hopular_lookup,
    hopular_loss,
)
from jaxlayers.hopfield.streaming import Streaming
from jaxlayers.hopfield.tabular import (
    CategoricalColumn,
    ContinuousColumn,
    EncodedTable,
    TableSchema,
    decode_table,
    encode_table,
    table_statistics,
)

try:
    import optax
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError(
        f'the estimators of Hopular need scikit-learn and optax ({error}): pip install "jaxlayers[train]"'
    ) from error

_STEPS_PER_CALL = 32  # of the compiled loop, whatever the number of steps
_REFERENCE_STEPS, _REFERENCE_AVERAGE = 5000, 0.005


# The optimiser. -------------------------------------------------------------------------------------------------------


class _Moments(NamedTuple):
    first: Any
    second: Any


def lamb(
    learning_rate: float | Array | Callable[[Any], Any],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-6,
    weight_decay: float | Array = 0.1,
    largest_norm: float = 10.0,
    groups: Mapping[str, np.ndarray] | None = None,
) -> optax.GradientTransformation:
    """Return LAMB as Hopular's reference code has it.

    The step of a tensor p with the moments m and v of its gradient is

        -rate sqrt(1 - b2^t) / (1 - b1^t) min(|p|, largest_norm) / |u| u  with  u = m / (sqrt(v) + epsilon) + decay p.

    `optax.lamb` corrects m and v for their start at zero, of which the quotient of norms leaves nothing; here the
    correction is a factor of the step and so a warmup over some 1 / (1 - b2) steps, and u is uncorrected when the decay
    is added. Norms are also bounded there from below, not from above.

    Args:
      learning_rate: a number, or a function of the number of steps before this one.
      b1: decay of m.
      b2: decay of v.
      epsilon: added to sqrt(v).
      weight_decay: of all parameters.
      largest_norm: bound of |p|.
      groups: for the path of a parameter, `"embed/kernel"`, the tensor that each entry of its leading axis counts to,
        `[entries]`: for parameters that hold many tensors, which have norms of their own. `None` = one a parameter.

    Source:
      You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020; code:
      ml-jku/hopular 3e0c39f, optim.py.
    """
    groups = {} if groups is None else groups

    def init(params: Any) -> _Moments:
        return _Moments(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def direct(updates: Any, state: _Moments, params: Any = None) -> tuple[Any, _Moments]:
        del params
        first = optax.tree_utils.tree_update_moment(updates, state.first, b1, 1)
        second = optax.tree_utils.tree_update_moment(updates, state.second, b2, 2)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), first, second), _Moments(first, second)

    def scaled(path: Any, update: Array, parameter: Array) -> Array:
        # What is no group is one: a tensor of its own.
        members = groups.get(jax.tree_util.keystr(path, simple=True, separator="/"))
        ids = np.zeros(1, int) if members is None else np.asarray(members)

        def norm(x: Array) -> Array:
            squares = jnp.sum(jnp.square(x).reshape(len(ids), -1), axis=-1)
            return jnp.sqrt(jax.ops.segment_sum(squares, ids, num_segments=int(ids.max()) + 1))

        size, weight = norm(update), jnp.minimum(norm(parameter), largest_norm)
        trust = jnp.where((weight == 0) | (size == 0), 1.0, weight / jnp.where(size == 0, 1.0, size))[ids]
        return (update.reshape(len(ids), -1) * trust[:, None]).reshape(update.shape)

    def rate(count: Any) -> Any:
        step = count + 1
        correction = jnp.sqrt(1 - b2**step) / (1 - b1**step)
        return (learning_rate(count) if callable(learning_rate) else learning_rate) * correction

    return optax.chain(
        optax.GradientTransformation(init, direct),
        optax.add_decayed_weights(weight_decay),  # type: ignore[arg-type]
        optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates, params)),
        optax.scale_by_learning_rate(rate),
    )


def column_groups(schema: TableSchema) -> dict[str, np.ndarray]:
    """Return the `groups` of `lamb` for a `Hopular`, whose embedding holds the tensors of all columns in one array."""
    columns = np.arange(len(schema.columns))
    groups = {f"embed/{name}": columns for name in ("kernel", "bias", "norm/scale", "norm/bias")}
    return groups | {"embed/value_embedding": np.repeat(columns, np.asarray(schema.sizes) + 1)}


# What runs compiled: one program for each plan and each size of the padded memory. ------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a compiled program depends on, besides the sizes of its arrays; plain values, so that equal ones share."""

    schema: TableSchema
    features: int
    depth: int
    num_heads: int
    scaling_factor: float
    input_dropout_rate: float
    lookup_dropout_rate: float
    output_dropout_rate: float
    select_rate: float
    mask_rate: float
    replace_rate: float
    feature_weight: float
    chunk_size: int | None

    @property
    def model(self) -> Hopular:
        lookup = hopular_lookup(self.num_heads, dropout_rate=self.lookup_dropout_rate)
        streaming = None if self.chunk_size is None else Streaming(self.chunk_size)
        width = self.features // self.num_heads
        return Hopular(
            self.schema,
            features=self.features,
            depth=self.depth,
            sample=lookup.clone(
                beta=self.scaling_factor / math.sqrt(width * len(self.schema.columns)), streaming=streaming
            ),
            feature=lookup.clone(beta=self.scaling_factor / math.sqrt(width)),
            input_dropout_rate=self.input_dropout_rate,
            output_dropout_rate=self.output_dropout_rate,
        )


class _Rates(NamedTuple):
    """Numbers that the compiled program takes as arguments, so that another one compiles nothing."""

    learning_rate: Any
    weight_decay: Any
    clip_norm: Any
    average_rate: Any
    cycle: Any  # steps in which learning rate and feature weight would reach zero


class _State(NamedTuple):
    """Parameters are one vector here: an optimiser of some forty tensors takes most of the time to compile."""

    params: Any
    averaged: Any
    optimiser: Any


class _Memory(NamedTuple):
    """Stored rows, padded at the end to a size that memories of nearly as many rows share."""

    values: Any
    present: Any
    count: Any


@functools.cache
def _shapes(plan: _Plan) -> Any:
    row = jax.ShapeDtypeStruct((1, len(plan.schema.columns)), jnp.float32)
    return jax.eval_shape(plan.model.init, jax.random.key(0), row, row)["params"]


def _vector(tree: Any) -> Any:
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def _tree(plan: _Plan, vector: Any) -> Any:
    """Return the parameters that a vector holds."""
    leaves, structure = jax.tree.flatten(_shapes(plan))
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = [vector[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(structure, parts)


@functools.cache
def _members(plan: _Plan) -> np.ndarray:
    """Return which tensor each entry of the vector belongs to, where an array of `column_groups` holds many."""
    groups, found, first = column_groups(plan.schema), [], 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(_shapes(plan))[0]:
        ids = groups.get(jax.tree_util.keystr(path, simple=True, separator="/"), np.zeros(1, int))
        found.append(first + np.repeat(ids, leaf.size // len(ids)))
        first = found[-1][-1] + 1
    return np.concatenate(found)


def _optimiser(plan: _Plan, rates: _Rates) -> optax.GradientTransformation:
    def learning_rate(count: Any) -> Any:
        progress = jnp.minimum((count + 1) / rates.cycle, 1)
        return rates.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return optax.chain(
        optax.clip_by_global_norm(rates.clip_norm),
        lamb(learning_rate, weight_decay=rates.weight_decay, groups={"": _members(plan)}),
    )


@functools.partial(jax.jit, static_argnums=0)
def _initial(plan: _Plan, key: Any, rates: _Rates) -> _State:
    row = jnp.zeros((1, len(plan.schema.columns)))
    params = _vector(plan.model.init(key, row, row)["params"])
    return _State(params, params, _optimiser(plan, rates).init(params))


@functools.partial(jax.jit, static_argnums=0)
def _train(
    plan: _Plan,
    state: _State,
    key: Any,
    memory: _Memory,
    batches: Any,
    drawn: Any,
    first: Any,
    stop: Any,
    rates: _Rates,
) -> tuple[_State, Any]:
    """Take the steps `first`, ..., `stop` - 1 and return the state and the mean losses (total, features, targets).

    Args:
      plan: of the program.
      state: before.
      key: of the whole fit.
      memory: the training rows.
      batches: indices of the rows of each step, -1 = padding, `[steps, batch]`.
      drawn: indices of the rows that each step has in memory, `[steps, rows]`; `None` = all.
      first: number of steps taken before.
      stop: number of steps taken after.
      rates: numbers of the optimiser.
    """
    model, optimiser = plan.model, _optimiser(plan, rates)
    stored = memory.values.shape[0]

    def step(index: Any, carry: tuple[_State, Any]) -> tuple[_State, Any]:
        state, total = carry
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, first + index))
        rows = batches[index]
        values, present = memory.values[rows], memory.present[rows]
        masked = augment_table(
            augment_key,
            plan.schema,
            values,
            present,
            select_rate=plan.select_rate,
            mask_rate=plan.mask_rate,
            replace_rate=plan.replace_rate,
        )
        if drawn is None:
            places, chosen = jnp.arange(stored), slice(None)
            memory_mask = places < memory.count
        else:
            chosen = drawn[index]
            places = jnp.full(stored, -1).at[chosen].set(jnp.arange(chosen.shape[0]))
            memory_mask = None

        def loss(params: Any) -> tuple[Any, Any]:
            prediction: Any = model.apply(
                {"params": params},
                masked.values,
                memory.values[chosen],
                present=present,
                masked=masked.masked,
                memory_present=memory.present[chosen],
                memory_mask=memory_mask,
                own=jnp.where(rows < 0, -1, places[rows]),
                deterministic=False,
                rngs={"dropout": dropout_key},
            )
            weight = feature_weight_at((first + index) / rates.cycle, initial=plan.feature_weight)
            counted = masked.counted & (rows >= 0)[:, None]
            found = hopular_loss(plan.schema, prediction, values, counted, feature_weight=weight)
            return found.total, jnp.stack(found)

        gradients, losses = jax.grad(loss, has_aux=True)(_tree(plan, state.params))
        updates, moments = optimiser.update(_vector(gradients), state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        averaged = optax.incremental_update(params, state.averaged, rates.average_rate)
        return _State(params, averaged, moments), total + losses

    state, total = jax.lax.fori_loop(0, stop - first, step, (state, jnp.zeros(3)))
    return state, total / (stop - first)


@functools.partial(jax.jit, static_argnums=0)
def _predict(plan: _Plan, vector: Any, memory: _Memory, values: Any, present: Any, own: Any) -> Any:
    return plan.model.apply(
        {"params": _tree(plan, vector)},
        values,
        memory.values,
        present=present,
        memory_present=memory.present,
        memory_mask=jnp.arange(memory.values.shape[0]) < memory.count,
        own=own,
    )


# The estimators. ------------------------------------------------------------------------------------------------------


class _HopularEstimator(BaseEstimator):
    """What classifier and regressor share: reading tables, the fit, and prediction from the stored rows."""

    def __init__(
        self,
        *,
        features: int = 16,
        depth: int = 4,
        num_heads: int = 4,
        scaling_factor: float = 1.0,
        steps: int = 500,
        batch_size: int = 128,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.1,
        clip_norm: float | None = 1.0,
        average_rate: float | None = None,
        cycle: float = 2.0,
        feature_weight: float = 1.0,
        select_rate: float = 1.0,
        mask_rate: float = 0.025,
        replace_rate: float = 0.175,
        input_dropout_rate: float = 0.1,
        lookup_dropout_rate: float = 0.1,
        output_dropout_rate: float = 0.01,
        memory_size: int | None = None,
        chunk_size: int | None = None,
        categorical_features: Literal["auto"] | Sequence[Any] | np.ndarray | None = "auto",
        validation_fraction: float = 0.0,
        validate_every: int = 10,
        patience: int | None = None,
        random_state: Any = None,
        verbose: bool | int = False,
    ) -> None:
        self.features = features
        self.depth = depth
        self.num_heads = num_heads
        self.scaling_factor = scaling_factor
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.average_rate = average_rate
        self.cycle = cycle
        self.feature_weight = feature_weight
        self.select_rate = select_rate
        self.mask_rate = mask_rate
        self.replace_rate = replace_rate
        self.input_dropout_rate = input_dropout_rate
        self.lookup_dropout_rate = lookup_dropout_rate
        self.output_dropout_rate = output_dropout_rate
        self.memory_size = memory_size
        self.chunk_size = chunk_size
        self.categorical_features = categorical_features
        self.validation_fraction = validation_fraction
        self.validate_every = validate_every
        self.patience = patience
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.categorical = tags.input_tags.string = True
        return tags

    # Tables.

    def _rows(self, X: Any, targets: np.ndarray | None = None) -> np.ndarray:
        """Return a validated table as numbers, codes and NaN, with a last column for the target (NaN if unknown)."""
        features = [
            _numbers(column, index) if categories is None else _codes(column, categories)
            for index, (column, categories) in enumerate(zip(X.T, self.categories_, strict=True))
        ]
        return np.stack([*features, np.full(len(X), np.nan) if targets is None else targets], axis=1)

    def _encoded(self, X: Any) -> EncodedTable:
        """Return rows to predict as the network takes them."""
        X = validate_data(self, X, reset=False, dtype=None, ensure_all_finite="allow-nan")
        return encode_table(self.schema_, self.statistics_, self._rows(X))

    # The fit.

    def _fit(self, X: Any, frame: Any, targets: np.ndarray, target: ContinuousColumn | CategoricalColumn) -> None:
        """Fit to a validated table whose last column is to be `targets`."""
        self._check_parameters()
        chosen = _categorical(self.categorical_features, X, frame, getattr(self, "feature_names_in_", None))
        self.categories_ = [_categories(column) if one else None for column, one in zip(X.T, chosen, strict=True)]
        columns = [ContinuousColumn() if c is None else CategoricalColumn(max(len(c), 1)) for c in self.categories_]
        self.schema_ = TableSchema((*columns, target))
        rows = self._rows(X, targets)
        random = check_random_state(self.random_state)
        train, held_out = self._split(random, targets)
        self.statistics_ = table_statistics(self.schema_, rows[train])
        self.memory_ = encode_table(self.schema_, self.statistics_, rows[train])
        self._learn(random, rows[held_out])

    def _split(self, random: np.random.RandomState, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        everything = np.arange(len(targets))
        if not self.validation_fraction:
            return everything, everything[:0]
        strata = None
        if self.schema_.categorical[-1]:
            count = math.ceil(self.validation_fraction * len(targets))
            sizes = np.bincount(targets.astype(int))
            enough = min(count, len(targets) - count) >= len(sizes)
            strata = targets if enough and sizes.min() >= 2 else None
        train, held_out = train_test_split(
            everything, test_size=self.validation_fraction, random_state=random, stratify=strata
        )
        return train, held_out

    def _learn(self, random: np.random.RandomState, held_out: np.ndarray) -> None:
        key = jax.random.key(random.randint(2**31 - 1))
        count, rates = len(self.memory_.values), self._rates()
        batch, memory = self._batch(), _padded(self.memory_)
        batches = _batches(random, count, batch)
        size = self.memory_size
        drawn = None if size is None or size >= count else _drawn(random, count, size)
        state = _initial(self._plan, jax.random.fold_in(key, 0), rates)
        key = jax.random.fold_in(key, 1)
        best: tuple[float, int, Any] | None = None  # Score, step and weights.
        taken = 0
        self.loss_curve_, self.validation_curve_ = [], []
        while taken < self.steps:
            stop = min(taken + _STEPS_PER_CALL, self.steps)
            if len(held_out):
                stop = min(stop, (taken // self.validate_every + 1) * self.validate_every)
            state, losses = _train(
                self._plan,
                state,
                key,
                memory,
                _taken(batches, stop - taken),
                None if drawn is None else _taken(drawn, stop - taken),
                taken,
                stop,
                rates,
            )
            taken = stop
            self.loss_curve_.append(tuple(float(one) for one in losses))
            report = "step {}: loss {:.4f}, features {:.4f}, targets {:.4f}".format(taken, *self.loss_curve_[-1])
            if len(held_out) and (taken % self.validate_every == 0 or taken == self.steps):
                score = self._validate(state.averaged, held_out)
                self.validation_curve_.append((taken, score))
                report += f", validation score {score:.4f}"
                if best is None or score > best[0]:
                    best = score, taken, state.averaged
            if self.verbose:
                print(report)
            if best is not None and self.patience is not None and taken - best[1] >= self.patience:
                break
        self.n_steps_, self.best_step_ = taken, None if best is None else best[1]
        # As NumPy arrays, the fitted estimator can be pickled and read where there is another device.
        params = _tree(self._plan, state.averaged if best is None else best[2])
        self.params_ = jax.tree.map(np.asarray, params)

    @property
    def _plan(self) -> _Plan:
        fields = {field.name for field in dataclasses.fields(_Plan)} - {"schema"}
        return _Plan(self.schema_, **{name: getattr(self, name) for name in fields})

    def _rates(self) -> _Rates:
        average = self.average_rate
        if average is None:
            average = min(_REFERENCE_AVERAGE * _REFERENCE_STEPS / self.steps, 1.0)
        clip_norm = math.inf if self.clip_norm is None else self.clip_norm
        numbers = self.learning_rate, self.weight_decay, clip_norm, average, self.cycle * self.steps
        return _Rates(*(np.float32(number) for number in numbers))

    def _batch(self) -> int:
        return min(self.batch_size, _size(len(self.memory_.values)))

    def _validate(self, params: Any, held_out: np.ndarray) -> float:
        """Return the accuracy, or the negative mean squared error in the target's units."""
        hidden = np.array(held_out)
        hidden[:, -1] = np.nan
        logits = self._predicted(encode_table(self.schema_, self.statistics_, hidden), params)
        found = decode_table(self.schema_, self.statistics_, logits)[:, -1]
        right = found == held_out[:, -1] if self.schema_.categorical[-1] else -np.square(found - held_out[:, -1])
        return float(np.mean(right))

    def _predicted(self, table: EncodedTable, params: Any = None, own: np.ndarray | None = None) -> np.ndarray:
        """Return the network's output for rows, `[rows, width]`, in batches of one size, so that it compiles once."""
        params = jnp.asarray(_vector(self.params_)) if params is None else params
        memory, size = jax.device_put(_padded(self.memory_)), self._batch()
        own = np.full(len(table.values), -1) if own is None else own
        found = []
        for start in range(0, len(table.values), size):
            values, present, places = (one[start : start + size] for one in (*table, own))
            padding = ((0, size - len(values)), (0, 0))
            logits = _predict(
                self._plan,
                params,
                memory,
                np.pad(values, padding),
                np.pad(present, padding),
                np.pad(places, padding[0], constant_values=-1).astype(np.int32),
            )
            found.append(np.asarray(logits)[: len(values)])
        return np.concatenate(found)

    def _check_parameters(self) -> None:
        """Refuse what no network or optimiser can be made of; the layers check the rest."""
        for name in ("features", "depth", "num_heads", "steps", "batch_size", "validate_every"):
            _check_count(name, getattr(self, name))
        for name in ("memory_size", "chunk_size", "patience"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.features % self.num_heads:
            raise ValueError(
                f"features={self.features} must be divisible by num_heads={self.num_heads}; set num_heads or features"
            )
        for name in ("scaling_factor", "learning_rate", "cycle", "clip_norm"):
            value = getattr(self, name)
            if not (name == "clip_norm" and value is None) and not value > 0:
                raise ValueError(f"{name}={value} must be positive; set {name}")
        for name in ("input_dropout_rate", "lookup_dropout_rate", "output_dropout_rate", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1); set {name}")
        for name in ("select_rate", "mask_rate", "replace_rate", "feature_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]; set {name}")
        if self.average_rate is not None and not 0 < self.average_rate <= 1:
            raise ValueError(f"average_rate={self.average_rate} must lie in (0, 1], or None; set average_rate")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0; set weight_decay")


class HopularClassifier(ClassifierMixin, _HopularEstimator):
    """Classify rows of a table by what they retrieve from the training rows, with scikit-learn's interface.

    `fit` trains a `Hopular` and keeps the training rows, which every prediction looks up. Columns of numbers are
    standardised by the training rows; NaN (of a category also None) is a missing entry; columns of strings, those of
    pandas' type `category` and those named are categories, of which one that `fit` has not seen counts as missing.
    Equal `random_state` gives equal results.

    The fit is that of the reference code: entries of the features are masked and replaced at random, all columns are
    predicted, and the weight moves from the features to the target; LAMB with a cosine schedule, gradients clipped;
    weights are averaged over steps. What is proportional to the length of a run follows `steps`. The reference's own
    sizes are `features=32, depth=8, num_heads=8, steps=5000, learning_rate=1e-3` with `batch_size` and `memory_size`
    of the whole table, hours on a CPU; the defaults are for a minute.

    Args:
      features: width of the embedding of an entry, divisible by `num_heads`.
      depth: number of blocks, each of which looks up all training rows.
      num_heads: lookups side by side.
      scaling_factor: beta sqrt(head_dim) of all lookups; larger ones retrieve fewer rows.
      steps: of the optimiser.
      batch_size: rows a step, of tables with more; also rows predicted at once.
      learning_rate: at the start.
      weight_decay: of LAMB, of all parameters.
      clip_norm: largest norm of a step's gradient; `None` = not clipped.
      average_rate: share of the newest weights in their average, which is what predicts; `None` = 25 / `steps`, the
        reference's 0.005 of its 5,000 steps.
      cycle: runs in which learning rate and feature weight would fall to zero by half a cosine; with the reference's 2
        they end at one half.
      feature_weight: weight of the features' loss at the start, in [0, 1]; 0 = only the target is predicted.
      select_rate: share of the features' entries that the loss counts.
      mask_rate: share of those that are masked.
      replace_rate: share of those that are replaced by random values.
      input_dropout_rate: dropout of embeddings.
      lookup_dropout_rate: dropout of associations.
      output_dropout_rate: dropout before the prediction.
      memory_size: rows in memory in each training step, drawn anew; `None` = all. Predictions look up all rows.
      chunk_size: rows of the memory that are looked at together, for tables too large for a matrix of all associations;
        `None` = all.
      categorical_features: `"auto"` = columns of strings and of pandas' type `category`; or indices, names or a mask of
        columns; `None` = none.
      validation_fraction: share of the rows that are held out, neither trained on nor stored, to choose the step whose
        averaged weights are kept, by the score on them; 0 = the last step's are.
      validate_every: steps between validations.
      patience: steps without a better validation after which the fit ends; `None` = it never ends early.
      random_state: of initial weights, batches, noise and validation rows.
      verbose: print losses.

    Attributes:
      classes_: labels, sorted.
      n_features_in_: number of columns.
      feature_names_in_: names of columns, where `X` had some.
      categories_: for each column, its categories, or `None` for numbers.
      schema_: the `TableSchema`; its last column is the target.
      statistics_: of the training rows.
      memory_: training rows as they are stored.
      params_: parameters of the network, NumPy arrays.
      loss_curve_: mean losses `(total, features, targets)` of every 32 steps.
      validation_curve_: pairs `(step, score)`.
      best_step_: step whose weights are kept, or `None` without validation.
      n_steps_: steps taken.

    Example:
      >>> import numpy as np
      >>> from jaxlayers.hopfield.hopular_estimator import HopularClassifier
      >>> X, y = np.asarray([[0.0], [0.1], [0.9], [1.0]]), ["no", "no", "yes", "yes"]
      >>> model = HopularClassifier(features=4, depth=1, num_heads=1, steps=1, random_state=0).fit(X, y)
      >>> model.classes_.tolist(), model.predict_proba(X).shape
      (['no', 'yes'], (4, 2))

    Source:
      Schäfl et al., "Hopular: Modern Hopfield Networks for Tabular Data", 2022; code: ml-jku/hopular 3e0c39f,
      interactive.py.

    Differs:
      The average of the weights follows the number of steps. Batches may be smaller than the table. With only one
      class, nothing is trained, and that class is predicted. A drawn memory need not hold the rows of the batch.
    """

    def fit(self, X: Any, y: Any) -> "HopularClassifier":
        """Train on a table.

        Args:
          X: rows, `[rows, columns]`: an array, or a data frame.
          y: labels, `[rows]`: numbers or strings.

        Returns:
          Itself.

        Raises:
          ValueError: if the arguments don't fit together or a parameter is out of range.
        """
        frame = X
        X, y = validate_data(self, X, y, dtype=None, ensure_all_finite="allow-nan")
        check_classification_targets(y)
        self.classes_, codes = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        # A network needs two classes, though there is only one to predict.
        target = CategoricalColumn(max(len(self.classes_), 2))
        self._fit(X, frame, codes.astype(float), target)
        return self

    def _learn(self, random: np.random.RandomState, held_out: np.ndarray) -> None:
        if len(self.classes_) > 1:
            super()._learn(random, held_out)
        else:
            self.params_, self.n_steps_, self.best_step_ = {}, 0, None
            self.loss_curve_, self.validation_curve_ = [], []

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, `[rows, classes]`, in the order of `classes_`.

        Args:
          X: rows with the columns of the training rows.
        """
        check_is_fitted(self)
        return self._probabilities(self._encoded(X))

    def predict(self, X: Any) -> np.ndarray:
        """Return the likeliest label of each row, `[rows]`; arguments as `predict_proba`."""
        likeliest = np.argmax(self.predict_proba(X), axis=-1)
        return self.classes_[likeliest]

    def leave_one_out(self) -> np.ndarray:
        """Return `predict_proba` of the training rows, each with all others in memory but not itself.

        The network's weights did see the row's label in `fit`. Validation rows are not among the training rows.
        """
        check_is_fitted(self)
        return self._probabilities(self.memory_, np.arange(len(self.memory_.values)))

    def _probabilities(self, table: EncodedTable, own: np.ndarray | None = None) -> np.ndarray:
        if len(self.classes_) == 1:
            return np.ones((len(table.values), 1))
        logits = self._predicted(table, own=own)[:, self.schema_.slice_of(-1)].astype(np.float64)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)


class HopularRegressor(RegressorMixin, _HopularEstimator):
    """Predict a number for rows of a table by what they retrieve from the training rows, with scikit-learn's interface.

    As `HopularClassifier`, with which it shares arguments and attributes (but `classes_`). Targets are standardised by
    the training rows, and predictions are in their units. Validation goes by the mean squared error.

    Example:
      >>> import numpy as np
      >>> from jaxlayers.hopfield.hopular_estimator import HopularRegressor
      >>> X, y = np.asarray([[0.0], [0.1], [0.9], [np.nan]]), [1000.0, 1001.0, 1009.0, 1003.0]
      >>> model = HopularRegressor(features=4, depth=1, num_heads=1, steps=1, random_state=0).fit(X, y)
      >>> bool((abs(model.predict(X) - 1003) < 20).all())
      True

    Source:
      Schäfl et al., "Hopular: Modern Hopfield Networks for Tabular Data", 2022; code: ml-jku/hopular 3e0c39f,
      interactive.py.

    Differs:
      See `HopularClassifier`.
    """

    def fit(self, X: Any, y: Any) -> "HopularRegressor":
        """Train on a table.

        Args:
          X: rows, `[rows, columns]`: an array, or a data frame.
          y: numbers, `[rows]`.

        Returns:
          Itself.

        Raises:
          ValueError: if the arguments don't fit together or a parameter is out of range.
        """
        frame = X
        X, y = validate_data(self, X, y, dtype=None, ensure_all_finite="allow-nan", y_numeric=True)
        self._fit(X, frame, column_or_1d(y, warn=True).astype(float), ContinuousColumn())
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the predicted number of each row, `[rows]`.

        Args:
          X: rows with the columns of the training rows.
        """
        check_is_fitted(self)
        return self._numbers(self._encoded(X))

    def leave_one_out(self) -> np.ndarray:
        """Return `predict` of the training rows, each with all others in memory but not itself.

        The network's weights did see the row's target in `fit`. Validation rows are not among the training rows.
        """
        check_is_fitted(self)
        return self._numbers(self.memory_, np.arange(len(self.memory_.values)))

    def _numbers(self, table: EncodedTable, own: np.ndarray | None = None) -> np.ndarray:
        return decode_table(self.schema_, self.statistics_, self._predicted(table, own=own))[:, -1]


# Columns. -------------------------------------------------------------------------------------------------------------


def _categorical(chosen: Any, X: np.ndarray, frame: Any, names: np.ndarray | None) -> np.ndarray:
    """Return which columns are categorical, `[columns]`."""
    count = X.shape[1]
    found = np.zeros(count, bool)
    if chosen is None:
        return found
    if isinstance(chosen, str):
        if chosen != "auto":
            raise ValueError(
                f'categorical_features={chosen!r} must be "auto", None, or a sequence of columns; set '
                "categorical_features"
            )
        if X.dtype.kind in "OUS":
            found |= [any(isinstance(_entry(entry), str) for entry in column) for column in X.T]
        kinds = getattr(frame, "dtypes", None)
        if kinds is not None:
            found |= [str(kind).lower().startswith("categor") for kind in kinds]
        return found
    given = np.asarray(chosen)
    if given.dtype == bool:
        if given.shape != (count,):
            raise ValueError(f"categorical_features has shape {given.shape} and must be ({count},), one flag a column")
        return given
    for one in given.tolist():
        if isinstance(one, str):
            if names is None or one not in names:
                raise ValueError(
                    f"categorical_features names {one!r}, but the columns are {'unnamed' if names is None else names}; "
                    "set categorical_features"
                )
            found[np.flatnonzero(names == one)] = True
        elif not isinstance(one, int) or not -count <= one < count:
            raise ValueError(
                f"categorical_features names {one!r}, but there are {count} columns; set categorical_features"
            )
        else:
            found[one] = True
    return found


def _entry(entry: Any) -> float | str | None:
    """Return a number as float, so that 1 and 1.0 are one category, anything else by its text, and `None` if missing.

    NaN, NaT and pandas' NA differ from themselves, or cannot tell.
    """
    if entry is None:
        return None
    if isinstance(entry, str):
        return str(entry)
    try:
        if entry != entry:
            return None
    except (TypeError, ValueError):
        return None
    return float(entry) if isinstance(entry, numbers.Real | np.bool_) else str(entry)


def _categories(column: np.ndarray) -> list[float | str]:
    """Return the categories that occur, numbers before texts, sorted."""
    entries = np.unique(column) if column.dtype.kind not in "OUS" else column
    return sorted({one for one in map(_entry, entries) if one is not None}, key=lambda one: (isinstance(one, str), one))


def _codes(column: np.ndarray, categories: Sequence[float | str]) -> np.ndarray:
    """Return the place of each entry among the categories; NaN if it is missing or none of them."""
    places = {category: float(code) for code, category in enumerate(categories)}
    return np.asarray([places.get(_entry(entry), np.nan) for entry in column])  # type: ignore[arg-type]


def _numbers(column: np.ndarray, index: int) -> np.ndarray:
    if column.dtype.kind not in "OUS":
        return column.astype(float)
    entries = [_entry(entry) for entry in column]
    texts = [entry for entry in entries if isinstance(entry, str)]
    if texts:
        raise ValueError(
            f"column {index} holds {texts[0]!r}, but is one of numbers; name it in categorical_features, or replace it"
        )
    return np.asarray([np.nan if entry is None else entry for entry in entries], float)


# Batches and padding. -------------------------------------------------------------------------------------------------


def _size(count: int) -> int:
    """Return the rows that a memory is padded to: few sizes (an eighth apart), so that those of folds share one."""
    unit = 1 << max((count - 1).bit_length() - 3, 6)
    return -(-count // unit) * unit


def _padded(table: EncodedTable) -> _Memory:
    count = len(table.values)
    padding = ((0, _size(count) - count), (0, 0))
    return _Memory(np.pad(table.values, padding), np.pad(table.present, padding), np.int32(count))


def _batches(random: np.random.RandomState, count: int, batch: int) -> Iterator[np.ndarray]:
    """Yield indices of rows without end: epochs in an order of their own, or all rows where they fit a batch."""
    everything = np.arange(batch)
    if count <= batch:
        while True:
            yield np.where(everything < count, everything, -1)
    left = everything[:0]
    while True:
        while len(left) < batch:
            left = np.concatenate([left, random.permutation(count)])
        yield left[:batch]
        left = left[batch:]


def _drawn(random: np.random.RandomState, count: int, size: int) -> Iterator[np.ndarray]:
    """Yield the rows that a step has in memory, without end."""
    while True:
        yield random.choice(count, size, replace=False)


def _taken(arrays: Iterator[np.ndarray], count: int) -> np.ndarray:
    """Return the next `count` arrays as one, with as many steps as a compiled loop has place for."""
    found = [next(arrays) for _ in range(count)]
    return np.stack(found + found[:1] * (_STEPS_PER_CALL - count)).astype(np.int32)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1; set {name}")
