"""Weights from elsewhere into a model, leaf by leaf, with a report of what was loaded, skipped and left fresh."""

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import checkpoint, export
from train.config import StartFrom
from train.optim import path_name


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What became of every stored and every wanted parameter.

    Attributes:
      source: where the weights came from.
      loaded: paths in the model that hold stored values now.
      skipped: stored paths that were not used, with the reason.
      fresh: paths in the model that keep their initial values.
    """

    source: str
    loaded: tuple[str, ...]
    skipped: Mapping[str, str]
    fresh: tuple[str, ...]

    def summary(self) -> str:
        """Return the counts, and the names by the module at the top, in a few lines."""
        lines = [
            f"{self.source}: {len(self.loaded)} parameters loaded, {len(self.skipped)} skipped, "
            f"{len(self.fresh)} fresh",
            *_grouped("loaded", Counter(path.split("/")[0] for path in self.loaded)),
            *_grouped("fresh", Counter(path.split("/")[0] for path in self.fresh)),
        ]
        shown = [f"  skipped {path}: {reason}" for path, reason in self.skipped.items()]
        rest = [f"  and {len(shown) - MOST_SHOWN} more skipped"] if len(shown) > MOST_SHOWN else []
        return "\n".join([*lines, *shown[:MOST_SHOWN], *rest])


MOST_SHOWN = 8
"""Skipped parameters that the summary names."""


def _grouped(word: str, counts: Mapping[str, int]) -> list[str]:
    text = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return [f"  {word}: {text}"] if text else []


def load_partial(start: StartFrom, params: Any) -> tuple[Any, Transfer]:
    """Return `params` with the stored values where path and shape agree, and the report.

    Only what is used is read, straight onto the sharding of the parameter it replaces, and cast to its dtype. Stored
    values are compared with their digests.

    Args:
      start: where the weights are, and which go where.
      params: the model's parameters, as initialised.

    Raises:
      ValueError: if there is nothing at the path, no parameter fits, a required one stays fresh, or a pattern matches
        nothing.
    """
    targets = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    for field in ("include", "exclude", "require"):
        for pattern in getattr(start, field):
            _check_pattern(field, pattern, targets)
    problems: list[str] = []
    for source in _sources(start):
        chosen, skipped = _choose(start, source.shapes, targets)
        try:
            arrays = source.read({stored: targets[path] for stored, path in chosen.items()})
        except checkpoint.DamageError as damage:
            problems.append(f"{source.name}: {damage}")
            continue
        found = {path: _place(arrays[stored], targets[path]) for stored, path in chosen.items()}
        fresh = tuple(path for path in targets if path not in found)
        needed = [path for path in fresh if any(re.search(pattern, path) for pattern in start.require)]
        if needed:
            raise ValueError(
                f"start_from.require={start.require} wants {needed[0]!r}, which {source.name} does not give"
                f"{_why(needed[0], skipped)}; add a start_from.rename or drop it from require"
            )
        leaves = [found.get(path, leaf) for path, leaf in targets.items()]
        return jax.tree.unflatten(jax.tree.structure(params), leaves), Transfer(
            source.name, tuple(found), skipped, fresh
        )
    raise ValueError(f"start_from.path={start.path!r} must hold intact weights: {'; '.join(problems)}")


@dataclasses.dataclass(frozen=True)
class _Source:
    """Stored parameters: their shapes by path, and a function that reads some of them."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Any


def _sources(start: StartFrom) -> list[_Source]:
    """Return the places that the weights may come from, best first."""
    place = Path(start.path)
    if "://" not in start.path and not place.exists():
        raise ValueError(f"start_from.path={start.path!r} does not exist; set it to a run, a checkpoint or a file")
    if place.suffix == ".safetensors" or (place / export.CONFIG).exists():
        return [_Source(start.path, export.shapes(place), lambda wanted: export.read(place, list(wanted)))]
    return [_checkpoint_source(step, start.ema) for step in checkpoint.find_step(start.path, start.step)]


def _checkpoint_source(step: checkpoint.Step, ema: bool) -> _Source:
    averaged = ema and any(name.startswith("ema/") for name in step.leaves)
    prefix = "ema/" if averaged else "params/"
    shapes = {
        name.removeprefix(prefix): tuple(leaf["shape"]) for name, leaf in step.leaves.items() if name.startswith(prefix)
    }

    def read(wanted: Mapping[str, Any]) -> dict[str, Any]:
        arrays = step.read({prefix + name: leaf for name, leaf in wanted.items()})
        return {name.removeprefix(prefix): array for name, array in arrays.items()}

    return _Source(f"{step.path}{' (average)' if averaged else ''}", shapes, read)


def _choose(
    start: StartFrom, shapes: Mapping[str, tuple[int, ...]], targets: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return which stored path goes to which path in the model, and why others go nowhere."""
    for pattern, _ in start.rename:
        _check_pattern("rename", pattern, shapes)
    chosen: dict[str, str] = {}
    skipped: dict[str, str] = {}
    senders: dict[str, str] = {}
    for stored, shape in shapes.items():
        path = stored
        for pattern, replacement in start.rename:
            path = re.sub(pattern, replacement, path)
        if path not in targets:
            skipped[stored] = "not in the model" + (f" (as {path})" if path != stored else "")
        elif senders.setdefault(path, stored) != stored:
            raise ValueError(
                f"start_from.rename sends both {senders[path]!r} and {stored!r} to {path!r}; make its patterns exact"
            )
        elif start.include and not any(re.search(pattern, path) for pattern in start.include):
            skipped[stored] = "not included"
        elif any(re.search(pattern, path) for pattern in start.exclude):
            skipped[stored] = "excluded"
        elif shape != tuple(targets[path].shape):
            skipped[stored] = f"shape {shape} is not the model's {tuple(targets[path].shape)}"
        else:
            chosen[stored] = path
    if not chosen:
        wanted = next(iter(targets), "")
        near = difflib.get_close_matches(wanted, shapes, 3, 0)
        raise ValueError(
            f"nothing in {start.path!r} fits the model: it wants {wanted!r}, the nearest there are {near}; "
            "set start_from.rename"
        )
    return chosen, skipped


def _check_pattern(field: str, pattern: str, paths: Mapping[str, Any]) -> None:
    if not any(re.search(pattern, path) for path in paths):
        near = difflib.get_close_matches(pattern, paths, 3, 0)
        raise ValueError(f"start_from.{field}: {pattern!r} matches no parameter, for example {near}; set it")


def _why(path: str, skipped: Mapping[str, str]) -> str:
    return f" ({skipped[path]})" if path in skipped else ""


def _place(array: Any, like: jax.Array) -> jax.Array:
    """Return stored values in the dtype and on the devices of a parameter."""
    if isinstance(array, jax.Array) and array.sharding == like.sharding:
        return array if array.dtype == like.dtype else array.astype(like.dtype)
    whole = np.asarray(array)
    cast = whole.astype(like.dtype)
    return jax.make_array_from_callback(cast.shape, like.sharding, lambda index: cast[index])
