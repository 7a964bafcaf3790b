"""Named models: found by walking the families for their `VARIANTS` tables, so that adding one needs no registry."""

import dataclasses
import difflib
import fnmatch
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax

_ROOT = Path(__file__).parent
# Floors below the families: they hold no papers.
_NOT_FAMILIES = frozenset({"files", "core", "geometry", "ops", "kernels", "nn", "testing"})
# What Linen adds to every module's own fields.
_LINEN_FIELDS = frozenset({"parent", "name"})


def families() -> list[str]:
    """Return the names of the rooms that hold papers, sorted."""
    packages = [info.name for info in pkgutil.iter_modules([str(_ROOT)]) if info.ispkg]
    return sorted(name for name in packages if name not in _NOT_FAMILIES)


def paper_modules() -> Iterator[ModuleType]:
    """Yield the imported module of every paper's file, family by family, in alphabetic order."""
    for family in families():
        package = importlib.import_module(f"jaxlayers.{family}")
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
            yield importlib.import_module(f"jaxlayers.{family}.{info.name}")


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of all model variants that match a shell-style pattern, sorted.

    Args:
      pattern: for example `"swin_*"`; case is ignored.

    Returns:
      Names that `create_model` takes; empty if none matches.

    Example:
      >>> import jaxlayers
      >>> jaxlayers.list_models("swin_tiny*")
      ['swin_tiny', 'swin_tiny_384']
    """
    return sorted(name for name in _variants() if fnmatch.fnmatchcase(name.lower(), pattern.lower()))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build the module of a named variant, with some of its fields replaced.

    Args:
      name: a variant as `list_models` gives it.
      **overrides: fields of the variant's module, by name.

    Returns:
      An unbound Linen module.

    Raises:
      ValueError: if there is no such variant or field; the message names the nearest ones.

    Example:
      >>> import jaxlayers
      >>> jaxlayers.create_model("swin_tiny", num_classes=10).num_classes
      10
    """
    variant = _variant(name)
    module = variant["module"]
    fields = {key: value for key, value in variant.items() if key not in ("module", "inputs")}
    known = _field_names(module)
    for key in overrides:
        if key not in known:
            raise ValueError(f"{name} has no field {key!r}{nearest(key, known)}; its fields are {sorted(known)}")
    return module(**{**fields, **overrides})


def abstract_inputs(name: str, *, batch_size: int | None = None) -> tuple[Any, ...]:
    """Return a variant's default inputs as `jax.ShapeDtypeStruct`s, without allocating anything.

    They are what `jax.eval_shape`, summaries, export and ahead-of-time compilation start from.

    Args:
      name: a variant as `list_models` gives it.
      batch_size: replaces the leading axis of every input that is as long as the first one's, so not that of a memory
        which all examples share; `None` keeps the variant's own.

    Returns:
      The positional arguments of the model's `__call__`.

    Raises:
      ValueError: if there is no such variant or the batch size is not positive.

    Example:
      >>> import jaxlayers
      >>> jaxlayers.abstract_inputs("swin_tiny", batch_size=8)[0].shape
      (8, 224, 224, 3)
    """
    inputs = _variant(name)["inputs"]
    if batch_size is None:
        return inputs
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1; pass a positive batch_size or None")
    default = jax.tree.leaves(inputs)[0].shape[0]

    def resize(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        rows = batch_size if leaf.shape[0] == default else leaf.shape[0]
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(resize, inputs)


def variant_module(name: str) -> Any:
    """Return the class of a named variant, or the function that makes it.

    Raises:
      ValueError: if there is no such variant.
    """
    return _variant(name)["module"]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a phrase `"; did you mean ...?"` with the closest known words, or an empty string."""
    matches = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


@functools.cache
def _variants() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for module in paper_modules():
        for name, variant in getattr(module, "VARIANTS", {}).items():
            if name in found:
                raise ValueError(f"variant {name!r} of {module.__name__} is taken; variant names must be unique")
            found[name] = variant
    return found


def _variant(name: str) -> Mapping[str, Any]:
    variants = _variants()
    if name not in variants:
        raise ValueError(f"there is no model {name!r}{nearest(name, variants)}; list_models() names all of them")
    return variants[name]


def _field_names(module: Any) -> set[str]:
    if dataclasses.is_dataclass(module):
        return {field.name for field in dataclasses.fields(module) if field.init} - _LINEN_FIELDS
    return set(inspect.signature(module).parameters)
