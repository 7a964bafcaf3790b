"""Tasks as a `train.config.Task` of pure functions, all for the one loop.

`classification` and `regression` serve images, sets, graphs, clouds and tables alike: `inputs` and `keywords` name the
fields that the model is called with, such as a mask of what is padding (`keywords={"mask": "is_real"}`; to leave it out
when pooling is the model's affair). With a mask of their own they also measure what belongs to parts of an example:
`regression(mask=...)` a vector at each point, `node_classification` a label at each node, `segmentation` one at each
pixel or voxel. `tabular` reads the raw columns of a table. `masked_image_modelling` and `adversarial` train without
labels.

Whatever is measured over a test set is exact. Evaluation takes means over examples, so a ratio over the whole set (mean
IoU, accuracy of all nodes) is kept as two sums per example, and `Task.finish` divides at the end.

Longer than most files: ten tasks of some sixty lines each on the same few sums.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxlayers.window import simmim
from train.config import Apply, Batch, Evaluated, Records, Task


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
) -> Float[Array, "*batch"]:
    """Return the cross entropy, in float32 or better.

    Args:
      logits: scores.
      labels: classes, or a probability for each class.
      smoothing: share of the target that is spread over all classes.
      class_weights: what the term of each class is multiplied by; `None` = 1.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = optax.smooth_labels(_probabilities(labels, logits), smoothing)
    if class_weights is not None:
        targets = targets * jnp.asarray(class_weights, logits.dtype)
    return optax.softmax_cross_entropy(logits, targets)


def classification(
    num_classes: int,
    *,
    inputs: Sequence[str] = ("image",),
    label: str = "label",
    keywords: Mapping[str, str] | None = None,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    logits: Callable[[Any], Any] | None = None,
) -> Task:
    """Return the task of predicting one of `num_classes` labels.

    It measures `loss`, `accuracy` and, with more than five classes, `top_5_accuracy`. A label is an integer, or a
    probability for each class, as mixup makes them; those count as their likeliest class in the accuracy.

    Args:
      num_classes: number of classes, at least 2.
      inputs: fields of the record passed to the model, in order.
      label: field with the integer class `[batch]` or with probabilities `[batch, num_classes]`.
      keywords: fields passed by keyword, `{"mask": "is_present"}`.
      label_smoothing: share of the target that is spread evenly over the classes, in [0, 1); in training only. It is
        also applied to probabilities, so leave it 0 where a `batch_transform` has smoothed them.
      class_weights: factor of the loss for each class, for sets in which some are rare; in training only.
      logits: picks the logits `[batch, num_classes]` from the model's output; `None` = the output itself.

    Raises:
      ValueError: on too few classes, a share outside [0, 1), or weights that are not one for each class.
    """
    _check_classes(num_classes, label_smoothing, class_weights)
    take = logits or _identity

    def measure(apply: Apply, batch: Batch) -> tuple[Any, Any]:
        scores = take(apply(*_pick(batch, inputs), **_pick_named(batch, keywords)))
        return _check_logits(scores, batch[label], num_classes), jnp.argmax(scores, axis=-1)

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        del key
        scores, prediction = measure(apply, batch)
        accuracy = (prediction == _classes(batch[label])).astype(jnp.float32)
        losses = cross_entropy(scores, batch[label], smoothing=label_smoothing, class_weights=class_weights)
        return losses, {"accuracy": accuracy}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        scores, prediction = measure(apply, batch)
        truth = _classes(batch[label])
        metrics = {
            "loss": cross_entropy(scores, batch[label]),
            "accuracy": (prediction == truth).astype(jnp.float32),
        }
        if num_classes > 5:
            best = jax.lax.top_k(scores, 5)[1]
            metrics["top_5_accuracy"] = jnp.any(best == truth[:, None], axis=-1).astype(jnp.float32)
        return Evaluated(metrics, truth=truth, prediction=prediction)

    return Task(
        inputs=lambda batch: _pick(batch, inputs),
        keywords=lambda batch: _pick_named(batch, keywords),
        loss=loss,
        evaluate=evaluate,
        num_classes=num_classes,
        logits=take,
    )


def regression(
    *,
    inputs: Sequence[str] = ("features",),
    target: str = "target",
    mask: str | None = None,
    keywords: Mapping[str, str] | None = None,
    prediction: Callable[[Any], Any] | None = None,
) -> Task:
    """Return the task of predicting `target` with least squares; it measures `mse`, `mae`, `rmse` and `r2`.

    Several targets per example are averaged; `r2` is one minus `mse` over the variance of the targets about one mean.
    With `mask` every true entry (a point of a cloud, with its vector) counts once in what is measured; in training an
    example's loss is the mean over its true entries.

    Args:
      inputs: fields of the record passed to the model, in order.
      target: field with the numbers to predict, `[batch]` or `[batch, ...]`.
      mask: field that is true where a target is real, `[batch, points]` for targets `[batch, points, ...]`; `None` =
        everywhere. To pass it to the model too, name it in `keywords`.
      keywords: fields passed by keyword.
      prediction: picks the prediction from the model's output; a trailing axis of one is dropped to match the target.
    """
    take = prediction or _identity

    def residual(apply: Apply, batch: Batch) -> tuple[Any, Any, Any]:
        """Return error and target, 0 where masked, and how many numbers of each example count."""
        found, wanted = take(apply(*_pick(batch, inputs), **_pick_named(batch, keywords))), batch[target]
        if found.shape == (*wanted.shape, 1):
            found = found[..., 0]
        if found.shape != wanted.shape:
            raise ValueError(
                f"the model's prediction has shape {found.shape}, which must be that of {target!r}, {wanted.shape}; "
                "set the model's out_features"
            )
        error = found.astype(jnp.promote_types(found.dtype, jnp.float32)) - wanted
        wanted = wanted.astype(error.dtype)
        if mask is None:
            return error, wanted, _count(jnp.ones(wanted.shape, bool))
        real = _pick(batch, (mask,))[0]
        if real.shape != wanted.shape[: real.ndim] or real.ndim < 2:
            raise ValueError(
                f"mask {mask!r} of shape {real.shape} must be [batch, points], the leading axes of {target!r}, "
                f"{wanted.shape}; set the task's mask"
            )
        chosen = jnp.broadcast_to((real > 0).reshape(*real.shape, *(1,) * (wanted.ndim - real.ndim)), wanted.shape)
        return jnp.where(chosen, error, 0), jnp.where(chosen, wanted, 0), _count(chosen)

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        del key
        error, _, count = residual(apply, batch)
        count = jnp.maximum(count, 1)
        return _total(jnp.square(error)) / count, {"mae": _total(jnp.abs(error)) / count}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        error, wanted, count = residual(apply, batch)
        return Evaluated(
            {
                "count": count,
                "square": _total(jnp.square(error)),
                "absolute": _total(jnp.abs(error)),
                "target": _total(wanted),
                "target_square": _total(jnp.square(wanted)),
            }
        )

    def finish(means: Mapping[str, float]) -> Mapping[str, float]:
        mse, mae, mean, square = (
            _ratio(means[name], means["count"]) for name in ("square", "absolute", "target", "target_square")
        )
        variance = square - mean**2
        return {"loss": mse, "mse": mse, "mae": mae, "rmse": mse**0.5, "r2": 1 - _ratio(mse, variance)}

    return Task(
        inputs=lambda batch: _pick(batch, inputs),
        keywords=lambda batch: _pick_named(batch, keywords),
        loss=loss,
        evaluate=evaluate,
        finish=finish,
        logits=take,
    )


def segmentation(
    num_classes: int,
    *,
    inputs: Sequence[str] = ("image",),
    label: str = "label",
    keywords: Mapping[str, str] | None = None,
    ignore_label: int | None = None,
    dice_weight: float = 0.0,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    logits: Callable[[Any], Any] | None = None,
) -> Task:
    """Return the task of predicting a label for each pixel or voxel.

    It measures, over all pixels of the set and not as a mean over images, `loss` (cross entropy), `pixel_accuracy`,
    `mean_iou` and `mean_dice` (over the classes that occur), and `iou_0`, `dice_0`, ... of each class.

    Args:
      num_classes: number of classes, at least 2, with the background.
      inputs: fields of the record passed to the model, in order.
      label: field with the integer class of each pixel, `[batch, *space]`; the logits are `[batch, *space, classes]`.
      keywords: fields passed by keyword.
      ignore_label: a label whose pixels count nowhere; `None` = none is ignored.
      dice_weight: factor of the soft Dice loss (the mean over classes of an image), which is added to the cross entropy
        in training.
      label_smoothing: share of the target that is spread evenly over the classes, in [0, 1); in training only.
      class_weights: factor of the loss for each class; in training only.
      logits: picks the logits from the model's output; `None` = the output itself.

    Raises:
      ValueError: on too few classes, a share outside [0, 1), or weights that are not one for each class.
    """
    if dice_weight < 0:
        raise ValueError(f"dice_weight={dice_weight} must not be negative; set dice_weight (0 for no Dice loss)")

    def labelled(batch: Batch) -> tuple[Array, Array]:
        truth = _pick(batch, (label,))[0]
        return truth, jnp.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label

    def dice(scores: Array, truth: Array, valid: Array) -> Array:
        # One pixel added above and below, so that a class that is neither there nor predicted costs nothing.
        axes = tuple(range(1, truth.ndim))
        chosen = valid[..., None].astype(scores.dtype)
        predicted = jax.nn.softmax(scores) * chosen
        present = jax.nn.one_hot(truth, num_classes, dtype=scores.dtype) * chosen
        overlap, size = jnp.sum(predicted * present, axes), jnp.sum(predicted + present, axes)
        return dice_weight * jnp.mean(1 - (2 * overlap + 1) / (size + 1), axis=-1)

    def regions(truth: Array, prediction: Array, valid: Array) -> dict[str, Array]:
        counts = {}
        for index in range(num_classes):
            there, found = (truth == index) & valid, (prediction == index) & valid
            counts[f"intersection_{index}"] = _count(there & found)
            counts[f"size_{index}"] = _count(there) + _count(found)
        return counts

    def finish(means: Mapping[str, float]) -> Mapping[str, float]:
        overlap = [means[f"intersection_{index}"] for index in range(num_classes)]
        size = [means[f"size_{index}"] for index in range(num_classes)]
        iou = [_ratio(one, both - one) for one, both in zip(overlap, size, strict=True)]
        dice = [_ratio(2 * one, both) for one, both in zip(overlap, size, strict=True)]
        occur = [index for index in range(num_classes) if size[index] > 0]
        return {
            "loss": _ratio(means["loss"], means["count"]),
            "pixel_accuracy": _ratio(means["correct"], means["count"]),
            "mean_iou": _ratio(sum(iou[index] for index in occur), len(occur)),
            "mean_dice": _ratio(sum(dice[index] for index in occur), len(occur)),
            **{f"iou_{index}": value for index, value in enumerate(iou)},
            **{f"dice_{index}": value for index, value in enumerate(dice)},
        }

    return _dense(
        num_classes,
        inputs=inputs,
        keywords=keywords,
        labelled=labelled,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        logits=logits,
        accuracy="pixel_accuracy",
        further_loss=dice if dice_weight else None,
        further_counts=regions,
        finish=finish,
    )


def node_classification(
    num_classes: int,
    *,
    inputs: Sequence[str] = ("nodes", "adjacency"),
    label: str = "label",
    mask: str | None = "mask",
    keywords: Mapping[str, str] | None = None,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    logits: Callable[[Any], Any] | None = None,
) -> Task:
    """Return the task of predicting a label for each node of a graph, or each element of a set.

    It measures `loss` and `accuracy`; every node that the mask marks counts once, however many its graph has. In
    training a graph's loss is the mean over its marked nodes. For one large graph of which some nodes are for training,
    make a record with the mask of those and a test record with the mask of the others.

    Args:
      num_classes: number of classes, at least 2.
      inputs: fields of the record passed to the model, in order.
      label: field with the integer class of each node, `[batch, nodes]`; the logits are `[batch, nodes, classes]`.
      mask: field that is true for the nodes that count, `[batch, nodes]`; `None` = all do. To pass it to the model too,
        name it in `keywords`.
      keywords: fields passed by keyword.
      label_smoothing: share of the target that is spread evenly over the classes, in [0, 1); in training only.
      class_weights: factor of the loss for each class; in training only.
      logits: picks the logits from the model's output; `None` = the output itself.

    Raises:
      ValueError: on too few classes, a share outside [0, 1), or weights that are not one for each class.
    """

    def labelled(batch: Batch) -> tuple[Array, Array]:
        truth = _pick(batch, (label,))[0]
        if mask is None:
            return truth, jnp.ones(truth.shape, bool)
        real = _pick(batch, (mask,))[0]
        if real.shape != truth.shape:
            raise ValueError(
                f"mask {mask!r} of shape {real.shape} must have that of {label!r}, {truth.shape}; set the task's mask"
            )
        return truth, real > 0

    def finish(means: Mapping[str, float]) -> Mapping[str, float]:
        return {
            "loss": _ratio(means["loss"], means["count"]),
            "accuracy": _ratio(means["correct"], means["count"]),
        }

    return _dense(
        num_classes,
        inputs=inputs,
        keywords=keywords,
        labelled=labelled,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        logits=logits,
        accuracy="accuracy",
        finish=finish,
    )


def _dense(
    num_classes: int,
    *,
    inputs: Sequence[str],
    keywords: Mapping[str, str] | None,
    labelled: Callable[[Batch], tuple[Array, Array]],
    label_smoothing: float,
    class_weights: Sequence[float] | None,
    logits: Callable[[Any], Any] | None,
    accuracy: str,
    finish: Callable[[Mapping[str, float]], Mapping[str, float]],
    further_loss: Callable[[Array, Array, Array], Array] | None = None,
    further_counts: Callable[[Array, Array, Array], Mapping[str, Array]] | None = None,
) -> Task:
    """Return the task of labelling the parts of an example; `labelled` gives labels and where they count."""
    _check_classes(num_classes, label_smoothing, class_weights)
    take = logits or _identity

    def measure(apply: Apply, batch: Batch) -> tuple[Array, Array, Array, Array]:
        truth, valid = labelled(batch)
        scores = take(apply(*_pick(batch, inputs), **_pick_named(batch, keywords)))
        if truth.ndim < 2 or not jnp.issubdtype(truth.dtype, jnp.integer):
            raise ValueError(
                f"the labels must be an integer for each part of an example, [batch, parts]; they are {truth.dtype} "
                f"of shape {truth.shape}; set the task's label, or use classification"
            )
        scores = _check_logits(scores, truth, num_classes)
        # Scores that do not count may be anything, and must not reach the gradient as 0 * nan.
        scores = jnp.where(valid[..., None], scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), 0)
        return scores, jnp.where(valid, truth, 0), valid, jnp.argmax(scores, axis=-1)

    def mean(values: Array, valid: Array) -> Array:
        return _total(jnp.where(valid, values, 0)) / jnp.maximum(_count(valid), 1)

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        del key
        scores, truth, valid, prediction = measure(apply, batch)
        entropy = cross_entropy(scores, truth, smoothing=label_smoothing, class_weights=class_weights)
        losses = mean(entropy, valid)
        if further_loss is not None:
            losses = losses + further_loss(scores, truth, valid)
        return losses, {accuracy: mean((prediction == truth).astype(jnp.float32), valid)}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        scores, truth, valid, prediction = measure(apply, batch)
        metrics = {
            "count": _count(valid),
            "loss": _total(jnp.where(valid, cross_entropy(scores, truth), 0)),
            "correct": _count((prediction == truth) & valid),
        }
        return Evaluated(metrics | dict(further_counts(truth, prediction, valid) if further_counts else {}))

    return Task(
        inputs=lambda batch: _pick(batch, inputs),
        keywords=lambda batch: _pick_named(batch, keywords),
        loss=loss,
        evaluate=evaluate,
        finish=finish,
        logits=take,
    )


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """How the columns of a table enter a model: what is learned from the training rows, and from them alone.

    Attributes:
      numeric: names of the fields of numbers, a column or several each.
      categorical: names of the fields of integer codes.
      mean: of each numeric column, over the training rows that have a value.
      deviation: of each numeric column; 1 where the column is constant.
      gaps: positions of the numeric columns in which a training row has no value (is not a number).
      codes: the codes of each categorical column that the training rows hold, sorted.
    """

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    gaps: tuple[int, ...]
    codes: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        """Length of the model's first input: numeric columns, and one more for each that has gaps."""
        return len(self.mean) + len(self.gaps)

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Rows that an embedding of each categorical column needs; row 0 is for codes not seen in training."""
        return tuple(len(codes) + 1 for codes in self.codes)

    def encode(self, batch: Batch) -> dict[str, Array]:
        """Return the model's inputs for a batch of raw columns.

        Returns:
          `"columns"`, float32 `[batch, width]`: numbers standardised, 0 where there is none, then 1 where a column with
          gaps has none; and `"categories"`, int32 `[batch, columns]`; each if there are any.
        """
        encoded = {}
        if self.numeric:
            numbers = jnp.asarray(_columns(batch, self.numeric), jnp.float32)
            absent = jnp.isnan(numbers)
            standardised = (numbers - jnp.asarray(self.mean)) / jnp.asarray(self.deviation)
            marks = absent[:, jnp.asarray(self.gaps, jnp.int32)].astype(jnp.float32)
            encoded["columns"] = jnp.concatenate([jnp.where(absent, 0, standardised), marks], axis=-1)
        if self.categorical:
            found = []
            for values, codes in zip(_columns(batch, self.categorical).T, self.codes, strict=True):
                known = jnp.asarray(codes, jnp.int32)
                place = jnp.minimum(jnp.searchsorted(known, values), len(codes) - 1)
                found.append(jnp.where(known[place] == values, place + 1, 0))
            encoded["categories"] = jnp.stack(found, axis=-1).astype(jnp.int32)
        return encoded


def fit_table(source: Records, *, numeric: Sequence[str] = (), categorical: Sequence[str] = ()) -> Table:
    """Return the `Table` of the training rows, such as `train.data.table` or `arrays` gives.

    Args:
      source: the training rows, one record each.
      numeric: names of the fields of numbers, one or a vector of them a row; not a number means that there is no value.
      categorical: names of the fields of integer codes, one or a vector of them a row.

    Raises:
      ValueError: if no field is named, one does not exist, a column has no value, or a field is not of its kind.
    """
    if not numeric and not categorical:
        raise ValueError("a table needs columns; set numeric or categorical")
    rows = [source[index] for index in range(len(source))]
    fields = {name: np.stack([_pick(row, (name,))[0] for row in rows]) for name in (*numeric, *categorical)}
    for name, field in fields.items():
        wanted = np.integer if name in categorical else np.number
        if field.ndim > 2 or not np.issubdtype(field.dtype, wanted):
            kind = "integer codes" if name in categorical else "numbers"
            raise ValueError(
                f"field {name!r} must hold {kind}, one or a vector a row; it is {field.dtype} of shape "
                f"{field.shape[1:]}; encode it when the source is made"
            )
    numbers = np.asarray(_columns(fields, numeric), np.float64) if numeric else np.zeros((len(rows), 0))
    codes = np.asarray(_columns(fields, categorical)).T if categorical else ()
    absent = np.isnan(numbers)
    if absent.all(axis=0).any():
        index = int(np.argmax(absent.all(axis=0)))
        raise ValueError(f"numeric column {index} of {tuple(numeric)} has no value in any training row; leave it out")
    deviation = np.nanstd(numbers, axis=0)
    return Table(
        numeric=tuple(numeric),
        categorical=tuple(categorical),
        mean=tuple(np.nanmean(numbers, axis=0).tolist()),
        deviation=tuple(np.where(deviation > 0, deviation, 1.0).tolist()),
        gaps=tuple(np.flatnonzero(absent.any(axis=0)).tolist()),
        codes=tuple(tuple(np.unique(column).tolist()) for column in codes),
    )


def _columns(batch: Batch, names: Sequence[str]) -> Any:
    """Return the named fields, `[rows]` or `[rows, columns]` each, side by side."""
    fields = [field if field.ndim == 2 else field[:, None] for field in _pick(batch, names)]
    return np.concatenate(fields, axis=-1) if isinstance(fields[0], np.ndarray) else jnp.concatenate(fields, axis=-1)


def tabular(
    table: Table,
    *,
    target: str,
    num_classes: int = 0,
    label_smoothing: float = 0.0,
    target_mean: float = 0.0,
    target_scale: float = 1.0,
) -> Task:
    """Return the task of predicting a column from raw columns, as classification or regression.

    The model is called as `model(columns, categories)` with what `Table.encode` makes of a batch; of a table without
    one of the two kinds, with the other alone.

    Args:
      table: of the training rows, from `fit_table`.
      target: the column to predict: an integer class, or a number.
      num_classes: number of classes, or 0 to predict a number.
      label_smoothing: as in `classification`.
      target_mean: what is added to the model's prediction of a number: the mean of the training targets.
      target_scale: what it is multiplied by before: their deviation. The loss that is minimised is in the model's
        units, everything that is measured is in the target's.

    Raises:
      ValueError: on settings that `classification` refuses, or a scale that is not positive.
    """
    if not target_scale > 0:
        raise ValueError(f"target_scale={target_scale} must be positive; set target_scale")
    names = (*(("columns",) if table.numeric else ()), *(("categories",) if table.categorical else ()))
    if num_classes:
        task = classification(num_classes, inputs=names, label=target, label_smoothing=label_smoothing)
    else:
        task = regression(inputs=names, target=target, prediction=lambda found: found * target_scale + target_mean)

    def encode(batch: Batch) -> Batch:
        return {**table.encode(batch), target: _pick(batch, (target,))[0]}

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        losses, measured = task.loss(apply, encode(batch), key)  # type: ignore[operator]
        return losses if num_classes else losses / target_scale**2, measured

    return dataclasses.replace(
        task,
        inputs=lambda batch: task.inputs(encode(batch)),
        loss=loss,
        evaluate=lambda apply, batch: task.evaluate(apply, encode(batch)),
    )


# Without labels -------------------------------------------------------------------------------------------------------


def masked_image_modelling(
    *,
    inputs: Sequence[str] = ("image",),
    patch_size: int = 4,
    mask_patch_size: int = 32,
    mask_ratio: float = 0.6,
) -> Task:
    """Return the task of predicting the hidden pixels of an image (SimMIM); it measures `loss`, their mean L1 error.

    The model is called as `model(image, masked)`, as `jaxlayers.window.SimMIM` is. Each step draws its masks from its
    key. A test image's mask is drawn from its own pixels: the same at every evaluation, on any mesh and for any batch
    size.

    Args:
      inputs: the field with the images, `[batch, height, width, channels]`.
      patch_size: pixels of the encoder's patches along each axis.
      mask_patch_size: pixels of what is hidden or seen as a whole.
      mask_ratio: share that is hidden, in (0, 1].

    Raises:
      ValueError: if a mask of such patches is not possible.
    """
    if len(inputs) != 1:
        raise ValueError(f"inputs={tuple(inputs)} must name the field with the images alone; set inputs")

    def draw(key: Any, images: Any, batch: tuple[int, ...]) -> Array:
        return simmim.random_mask(
            key,
            batch,
            images.shape[-3:-1],
            patch_size=patch_size,
            mask_patch_size=mask_patch_size,
            mask_ratio=mask_ratio,
        )

    # What does not fit together is refused when the config is made, not when the loss is traced.
    one = jax.ShapeDtypeStruct((mask_patch_size, mask_patch_size, 1), jnp.float32)
    jax.eval_shape(lambda key: draw(key, one, ()), jax.random.key(0))

    def error(apply: Apply, images: Array, masked: Array) -> Array:
        return simmim.masked_l1(images, apply(images, masked), masked, patch_size=patch_size)

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        (images,) = _pick(batch, inputs)
        return error(apply, images, draw(key, images, images.shape[:1])), {}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        (images,) = _pick(batch, inputs)
        # A sum of integers does not depend on its order, so every device and mesh finds the same number.
        bits = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32)
        numbers = jnp.sum(bits, axis=tuple(range(1, bits.ndim)), dtype=jnp.uint32)
        keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(0), number))(numbers)
        return Evaluated({"loss": error(apply, images, jax.vmap(lambda key: draw(key, images, ()))(keys))})

    def given(batch: Batch) -> tuple[Any, ...]:
        (images,) = _pick(batch, inputs)
        return images, draw(jax.random.key(0), images, images.shape[:1])

    return Task(inputs=given, loss=loss, evaluate=evaluate)


def adversarial(
    latent_features: int,
    *,
    real: str = "image",
    r1_gamma: float = 1.0,
    reference: np.ndarray | None = None,
    projections: int = 128,
    num_samples: int = 256,
) -> Task:
    """Return the game of a generator against a discriminator, with the non-saturating loss and the R1 penalty.

    generator: softplus(-D(G(z))); discriminator: softplus(D(G(z))) + softplus(-D(x)) + gamma / 2 |grad_x D(x)|^2, with
    z a standard normal drawn from the step's key.

    The model is one Linen module with submodules `generator` and `discriminator` and methods `generate(latent)`,
    `discriminate(x)` (scores `[batch]` or `[batch, 1]`, each of its own example alone) and `__call__(x, latent)`, which
    calls both once. Two time scales are `Optim(rates=((r"^discriminator/", 4.0),))`.

    Training logs `fake_score`, `real_score` and `r1` (the squared gradient); evaluation measures `real_score`,
    `fake_score` and, given a reference, `sliced_wasserstein`, the distance between it and as many generated samples.
    Its latents and directions are fixed, so it depends on the parameters alone.

    Args:
      latent_features: length of z.
      real: the field with real examples.
      r1_gamma: weight of the penalty; 0 = none.
      reference: real examples to compare generated ones with, `[samples, ...]` in memory; a few thousand at most.
      projections: directions of the sliced distance.
      num_samples: generated samples in an evaluation without a reference.

    Raises:
      ValueError: on a number that is not positive, or a negative weight.
    """
    for name, value in {
        "latent_features": latent_features,
        "projections": projections,
        "num_samples": num_samples,
    }.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1; set {name}")
    if r1_gamma < 0:
        raise ValueError(f"r1_gamma={r1_gamma} must not be negative; set r1_gamma (0 for no penalty)")
    if reference is not None and len(reference) < 2:
        raise ValueError(f"reference of {len(reference)} examples must have at least 2; pass more, or None")
    if reference is not None:
        # In NumPy and once: the compiler would sort a constant for minutes.
        reference = np.asarray(reference, np.float32)
        directions = _directions(reference.shape[1:], projections, seed=0)
        ranked = _ranked(reference, directions)

    def latent(key: Any, count: int) -> Array:
        return jax.random.normal(key, (count, latent_features))

    def score(apply: Apply, examples: Array) -> Array:
        found = apply(examples, method="discriminate")
        if found.shape not in ((len(examples),), (len(examples), 1)):
            raise ValueError(
                f"discriminate must return one score an example, of shape {(len(examples),)}; it has {found.shape}; "
                "let its last layer have one feature"
            )
        return found.reshape(-1).astype(jnp.promote_types(found.dtype, jnp.float32))

    def generator(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        (examples,) = _pick(batch, (real,))
        made = apply(latent(jax.random.fold_in(key, 0), len(examples)), method="generate")
        if made.shape != examples.shape:
            raise ValueError(
                f"generate must return what looks like {real!r}, of shape {examples.shape}; it has {made.shape}; set "
                "the generator's sizes"
            )
        fake = score(apply, made)
        return jax.nn.softplus(-fake), {"fake_score": fake}

    def discriminator(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        (examples,) = _pick(batch, (real,))
        made = apply(latent(jax.random.fold_in(key, 1), len(examples)), method="generate")
        fake = score(apply, jax.lax.stop_gradient(made))
        if not r1_gamma:
            found = score(apply, examples)
            return jax.nn.softplus(fake) + jax.nn.softplus(-found), {"real_score": found}
        if getattr(apply, "collections", None):
            raise ValueError(
                f"r1_gamma={r1_gamma} differentiates scores by example, which running statistics do not allow; norm "
                "each example alone, or set r1_gamma=0"
            )

        def summed(examples: Array) -> tuple[Array, Array]:
            found = score(apply, examples)
            return jnp.sum(found), found

        gradient, found = jax.grad(summed, has_aux=True)(examples)
        r1 = jnp.sum(jnp.square(gradient), axis=tuple(range(1, gradient.ndim)))
        losses = jax.nn.softplus(fake) + jax.nn.softplus(-found) + 0.5 * r1_gamma * r1
        return losses, {"real_score": found, "r1": r1}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        (examples,) = _pick(batch, (real,))
        made = apply(
            latent(jax.random.key(0), len(reference) if reference is not None else num_samples), method="generate"
        )
        # The same number for every example: its mean is the number.
        every = jnp.ones(len(examples), jnp.float32)
        metrics = {"real_score": score(apply, examples), "fake_score": every * jnp.mean(score(apply, made))}
        if reference is not None:
            if made.shape != reference.shape:
                raise ValueError(
                    f"reference of shape {reference.shape} must be like what generate returns, {made.shape}; set either"
                )
            metrics["sliced_wasserstein"] = every * _distance(_ranked(made, directions), ranked, made.shape[1:])
        return Evaluated(metrics)

    def given(batch: Batch) -> tuple[Any, ...]:
        (examples,) = _pick(batch, (real,))
        return examples, latent(jax.random.key(0), len(examples))

    return Task(inputs=given, loss={"generator": generator, "discriminator": discriminator}, evaluate=evaluate)


def sliced_wasserstein(
    x: Float[Array, "samples ..."], y: Float[Array, "samples ..."], *, projections: int = 128, seed: int = 0
) -> Float[Array, ""]:
    """Return the sliced Wasserstein-2 distance between two equally large samples.

    It is the root of the mean, over random directions, of the squared Wasserstein-2 distance between the samples'
    projections, times the number of dimensions: equal to the distance itself for samples that a translation maps onto
    each other, in expectation over the directions.

    Raises:
      ValueError: if the samples differ in shape.
    """
    if x.shape != y.shape:
        raise ValueError(f"the samples have shapes {x.shape} and {y.shape}, which must be equal; draw equally many")
    directions = _directions(x.shape[1:], projections, seed)
    return _distance(_ranked(x, directions), _ranked(y, directions), x.shape[1:])


def _directions(shape: Sequence[int], projections: int, seed: int) -> np.ndarray:
    normal = np.random.RandomState(seed).normal(size=(int(np.prod(shape)), projections))
    return (normal / np.linalg.norm(normal, axis=0)).astype(np.float32)


def _ranked(samples: Any, directions: np.ndarray) -> Any:
    """Return the sorted projections `[samples, projections]`, NumPy arrays as NumPy."""
    projected = samples.reshape(len(samples), -1) @ directions
    return np.sort(projected, axis=0) if isinstance(projected, np.ndarray) else jnp.sort(projected, axis=0)


def _distance(x: Any, y: Any, shape: Sequence[int]) -> Array:
    return jnp.sqrt(int(np.prod(shape)) * jnp.mean(jnp.square(x - y)))


# Parts ----------------------------------------------------------------------------------------------------------------


def _identity(outputs: Any) -> Any:
    return outputs


def _pick(batch: Batch, names: Sequence[str]) -> tuple[Any, ...]:
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(f"the records have no field {missing[0]!r}; set the task's fields to some of {sorted(batch)}")
    return tuple(batch[name] for name in names)


def _pick_named(batch: Batch, keywords: Mapping[str, str] | None) -> Mapping[str, Any]:
    named = keywords or {}
    return dict(zip(named, _pick(batch, list(named.values())), strict=True))


def _check_classes(num_classes: int, smoothing: float, weights: Sequence[float] | None) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2; set num_classes, or use regression")
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing={smoothing} must lie in [0, 1); set label_smoothing")
    if weights is not None and (len(weights) != num_classes or min(weights) < 0):
        raise ValueError(
            f"class_weights={tuple(weights)} must be num_classes={num_classes} numbers of at least 0; set class_weights"
        )


def _check_logits(scores: Array, labels: Array, num_classes: int) -> Array:
    soft = jnp.issubdtype(labels.dtype, jnp.floating)
    if soft and (labels.ndim < 2 or labels.shape[-1] != num_classes):
        raise ValueError(
            f"labels of dtype {labels.dtype} and shape {labels.shape} must be integers, or {num_classes} probabilities "
            "on the last axis; set the task's label or num_classes"
        )
    wanted = labels.shape if soft else (*labels.shape, num_classes)
    if scores.shape != wanted:
        raise ValueError(
            f"the model's logits have shape {scores.shape}, which must be {wanted} for num_classes={num_classes}; "
            "set the model's num_classes"
        )
    return scores


def _probabilities(labels: Array, logits: Array) -> Array:
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return labels.astype(logits.dtype)
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def _classes(labels: Array) -> Array:
    return jnp.argmax(labels, axis=-1) if jnp.issubdtype(labels.dtype, jnp.floating) else labels


def _total(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _count(x: Bool[Array, "batch ..."]) -> Float[Array, "batch"]:
    return _total(x.astype(jnp.float32))


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else float("nan")
