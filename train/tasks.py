"""The standard tasks: classification and regression, as a `train.config.Task` of pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from train.config import Apply, Batch, Evaluated, Task


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], *, smoothing: float = 0.0
) -> Float[Array, "*batch"]:
    """Return the cross entropy, in float32 or better, with `smoothing` of the target spread over all classes."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def classification(
    num_classes: int,
    *,
    inputs: Sequence[str] = ("image",),
    label: str = "label",
    keywords: Mapping[str, str] | None = None,
    label_smoothing: float = 0.0,
    logits: Callable[[Any], Any] | None = None,
) -> Task:
    """Return the task of predicting one of `num_classes` labels; it measures `loss` and `accuracy`.

    Args:
      num_classes: number of classes, at least 2.
      inputs: fields of the record passed to the model, in order.
      label: field with the integer class.
      keywords: fields passed by keyword, `{"mask": "is_present"}`.
      label_smoothing: share of the target that is spread evenly over the classes, in [0, 1); in training only.
      logits: picks the logits `[batch, num_classes]` from the model's output; `None` = the output itself.

    Raises:
      ValueError: on too few classes or a share outside [0, 1).
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2; set num_classes, or use regression")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1); set label_smoothing")
    take = logits or _identity

    def measure(apply: Apply, batch: Batch) -> tuple[Any, Any]:
        scores = take(apply(*_pick(batch, inputs), **_pick_named(batch, keywords)))
        if scores.shape != (*batch[label].shape, num_classes):
            raise ValueError(
                f"the model's logits have shape {scores.shape}, which must be "
                f"{(*batch[label].shape, num_classes)} for num_classes={num_classes}; set the model's num_classes"
            )
        return scores, jnp.argmax(scores, axis=-1)

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        del key
        scores, prediction = measure(apply, batch)
        accuracy = (prediction == batch[label]).astype(jnp.float32)
        return cross_entropy(scores, batch[label], smoothing=label_smoothing), {"accuracy": accuracy}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        scores, prediction = measure(apply, batch)
        accuracy = (prediction == batch[label]).astype(jnp.float32)
        metrics = {"loss": cross_entropy(scores, batch[label]), "accuracy": accuracy}
        return Evaluated(metrics, truth=batch[label], prediction=prediction)

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
    keywords: Mapping[str, str] | None = None,
    prediction: Callable[[Any], Any] | None = None,
) -> Task:
    """Return the task of predicting `target` with least squares; it measures `mse`, `mae`, `rmse` and `r2`.

    Several targets per example are averaged; `r2` is one minus `mse` over the variance of the targets about one mean.

    Args:
      inputs: fields of the record passed to the model, in order.
      target: field with the numbers to predict, `[batch]` or `[batch, ...]`.
      keywords: fields passed by keyword.
      prediction: picks the prediction from the model's output; a trailing axis of one is dropped to match the target.
    """
    take = prediction or _identity

    def residual(apply: Apply, batch: Batch) -> Any:
        found, wanted = take(apply(*_pick(batch, inputs), **_pick_named(batch, keywords))), batch[target]
        if found.shape == (*wanted.shape, 1):
            found = found[..., 0]
        if found.shape != wanted.shape:
            raise ValueError(
                f"the model's prediction has shape {found.shape}, which must be that of {target!r}, {wanted.shape}; "
                "set the model's out_features"
            )
        return found.astype(jnp.promote_types(found.dtype, jnp.float32)) - wanted

    def loss(apply: Apply, batch: Batch, key: Any) -> tuple[Any, Mapping[str, Any]]:
        del key
        error = residual(apply, batch)
        return _per_example(jnp.square(error)), {"mae": _per_example(jnp.abs(error))}

    def evaluate(apply: Apply, batch: Batch) -> Evaluated:
        error = residual(apply, batch)
        wanted = batch[target].astype(error.dtype)
        return Evaluated(
            {
                "mse": _per_example(jnp.square(error)),
                "mae": _per_example(jnp.abs(error)),
                "target_mean": _per_example(wanted),
                "target_square": _per_example(jnp.square(wanted)),
            }
        )

    def finish(means: Mapping[str, float]) -> Mapping[str, float]:
        variance = means["target_square"] - means["target_mean"] ** 2
        return {
            "loss": means["mse"],
            "mse": means["mse"],
            "mae": means["mae"],
            "rmse": means["mse"] ** 0.5,
            "r2": 1 - means["mse"] / variance if variance > 0 else float("nan"),
        }

    return Task(
        inputs=lambda batch: _pick(batch, inputs),
        keywords=lambda batch: _pick_named(batch, keywords),
        loss=loss,
        evaluate=evaluate,
        finish=finish,
        logits=take,
    )


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


def _per_example(x: Array) -> Array:
    return x if x.ndim == 1 else jnp.mean(x, axis=tuple(range(1, x.ndim)))
