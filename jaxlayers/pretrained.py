"""Weights of references into our models and back: every tensor accounted for, nothing executed."""

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives NumPy the name of bfloat16)
import numpy as np

from jaxlayers.core import dialects as _dialects
from jaxlayers.core.dialects import Dialect, Layout
from jaxlayers.files import Tensors, open_tensors
from jaxlayers.files.tensors import Stored
from jaxlayers.models import abstract_inputs, create_model, list_models, paper_modules, variant_module


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every tensor of a checkpoint and of every parameter of the model.

    Attributes:
      dialect: whose names the checkpoint has.
      prefix: what stood before every name.
      converted: for each tensor that was used, our paths that hold it; empty lists where a dialect that computes with
        weights does not let them be followed.
      ignored: tensors that were left out by rule or by leave, with the reason.
      fresh: our paths that keep initial values, with the reason.
      changed: what was fitted to the model, in words.
    """

    dialect: str
    prefix: str
    converted: Mapping[str, Sequence[str]]
    ignored: Mapping[str, str]
    fresh: Mapping[str, str]
    changed: tuple[str, ...]

    def summary(self) -> str:
        """Return counts, and what did not simply go over, in a few lines."""
        lines = [
            f"{self.dialect}: {len(self.converted)} tensors converted, {len(self.ignored)} ignored, "
            f"{len(self.fresh)} parameters fresh"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in (*self.ignored.items(), *self.fresh.items()):
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {names[0]}{rest}: {reason}")
        return "\n".join([*lines, *(f"  changed: {change}" for change in self.changed)])


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What `convert_tensors` returns.

    Attributes:
      variables: the collections of the model, `params` and, where it has them, running statistics.
      report: what became of every tensor.
      dialect: that of the tensors.
      layout: shape by name of the reference's tensors for the model, as they were in the file but for what was fitted.
    """

    variables: dict[str, Any]
    report: Report
    dialect: Dialect
    layout: Layout


def load_pretrained(
    model: nn.Module,
    path: str | Path,
    *,
    dialect: str | None = None,
    inputs: Sequence[Any] | None = None,
    source: nn.Module | None = None,
    allow: Sequence[str] = (),
    dtype: Any = None,
) -> dict[str, Any]:
    """Return the variables of a model from a checkpoint of a reference, or of ours.

    Nothing that a file holds is executed. See `convert_tensors` for what is done, and for the report.

    Args:
      model: the model that the weights are for.
      path: a file or folder: safetensors, PyTorch (read without PyTorch), `.npz`, msgpack, with or without an index.
      dialect: the name of the reference; `None` tells it by the names of the tensors.
      inputs: inputs of the model, or their shapes; needed where a model's shapes depend on them.
      source: the model as the checkpoint has it, where that differs in window, patch or image size.
      allow: regular expressions of tensors and parameters that may be missing or in excess.
      dtype: of the floating parameters; `None` keeps that of the file.

    Returns:
      The collections of the model.

    Raises:
      ValueError: if the file cannot be trusted, is of no known dialect, or has tensors that are not accounted for.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, numpy as np
      >>> from pathlib import Path
      >>> import jaxlayers
      >>> from jaxlayers.pretrained import load_pretrained, to_reference
      >>> model = jaxlayers.create_model("convnext_atto", widths=(8, 8), depths=(1, 1), num_classes=3)
      >>> image = (jnp.zeros((1, 32, 32, 3)),)
      >>> tensors = to_reference(model, jax.jit(model.init)(jax.random.key(0), *image), "timm", inputs=image)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(Path(folder, "weights.npz"), **tensors)
      ...     variables = load_pretrained(model, Path(folder, "weights.npz"))
      >>> variables["params"]["head"]["kernel"].shape
      (8, 3)
    """
    return convert_tensors(
        open_checkpoint(path), model, dialect=dialect, inputs=inputs, source=source, allow=allow, dtype=dtype
    ).variables


def open_checkpoint(path: str | Path, *, placeholders: bool = False) -> Tensors:
    """Return the tensors of a file or folder, as `jaxlayers.files.open_tensors` does, or of an Orbax checkpoint.

    Args:
      path: the file or folder.
      placeholders: see `jaxlayers.files.open_tensors`.

    Raises:
      ValueError: if there is nothing, or what is there is damaged, forged or of another format.
    """
    path = Path(path)
    if not (path / "_METADATA").is_file():
        return open_tensors(path, placeholders=placeholders)
    # Needed for this format alone.
    ocp = importlib.import_module("orbax.checkpoint")
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(path.absolute())
    flat = flax.traverse_util.flatten_dict(tree, sep=".")
    if "params" not in tree or not all(isinstance(leaf, np.ndarray | jax.Array) for leaf in flat.values()):
        raise ValueError(f"{path} must hold collections of variables with params among them; export a training run")
    stored = {}
    for name, leaf in flat.items():
        array = np.asarray(leaf)
        ours = name.removeprefix("params.") if name.startswith("params.") else f"collections.{name}"
        stored[ours] = Stored(array.shape, array.dtype, functools.partial(np.asarray, array))
    return Tensors(stored, "orbax", {"format": "jax"})


def convert_tensors(
    tensors: Tensors,
    model: nn.Module,
    *,
    dialect: str | None = None,
    inputs: Sequence[Any] | None = None,
    source: nn.Module | None = None,
    allow: Sequence[str] = (),
    dtype: Any = None,
) -> Pretrained:
    """Return the variables of a model from the tensors of a reference, and what became of each.

    A classifier of another number of classes begins anew, and a first kernel for another number of channels is fitted
    to the model's; both are reported. See `load_pretrained` for the arguments, and for what is raised.
    """
    for pattern in allow:
        _compiled(pattern)
    if isinstance(tensors, Tensors) and tensors.metadata.get("format") == "jax":
        return _own(tensors, model, allow, dtype, inputs)
    known = [one for one in list_dialects() if one.module is type(model) and dialect in (None, one.name)]
    prefix, outside = _dialects.unwrap(list(tensors), lambda names: any(one.fits(names) for one in known))
    inner = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    chosen = find_dialect(list(inner), model, dialect)
    read_for = model if source is None else source
    given, inputs = inputs, default_inputs(read_for, inputs)
    ignored = dict.fromkeys(outside, f"outside of {prefix!r}, where the weights stand")
    reasons = chosen.reasons(list(inner), read_for)
    ignored |= {inner[name]: reason for name, reason in reasons.items()}
    wanted = {name: whole for name, whole in inner.items() if name not in reasons}
    shapes = {name: _shape(tensors, whole) for name, whole in wanted.items()}

    changed: list[str] = []
    replaced: dict[str, Any] = {}
    new: dict[str, str] = {}
    if chosen.layout is not None:
        variables = _dialects.shapes_of(read_for, inputs)
        expected = dict(chosen.layout(read_for, variables))
        shapes, notes, replaced, new = _fit(chosen, expected, shapes, functools.partial(_value, tensors, wanted))
        changed += notes
        shapes, left_out, made = _account(chosen, expected, shapes, allow, read_for)
        ignored |= {wanted[name]: reason for name, reason in left_out.items()}
        new |= made
    # Before the weights are there: it takes memory too.
    paths: Mapping[str, Sequence[str]] = dict.fromkeys(shapes, ())
    if not chosen.one_way:
        paths = _dialects.sources(chosen, read_for, inputs, shapes)
    lazy = _Chosen(
        {name: None if name in new else replaced.get(name, wanted.get(name)) for name in shapes}, shapes, tensors
    )
    read = dict(chosen.read(lazy, read_for, inputs))
    release = getattr(tensors, "release", None)
    if release is not None:
        release()
    fresh: dict[str, str] = {}
    if new:
        initial = _initial(read_for, inputs)
        flat, start = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (read, initial))
        for name, reason in new.items():
            for path in paths[name]:
                flat[path] = start[path]
                fresh[path] = reason
        read = flax.traverse_util.unflatten_dict(flat, sep="/")
    if source is not None:
        read, note = _resized(read, source, model)
        changed.append(note)
    if dtype is not None:
        read = _cast(read, dtype)
    converted = {wanted[name]: paths[name] for name in shapes if name in wanted and name not in new}
    report = Report(chosen.name, prefix, converted, ignored, fresh, tuple(changed))
    layout = {name: _shape(tensors, wanted[name]) if name in wanted else shape for name, shape in shapes.items()}
    if chosen.layout is not None:
        # As in the file, but for what was fitted.
        final = chosen.layout(model, _dialects.shapes_of(model, default_inputs(model, given)))
        layout = {
            name: layout[name] if name in layout and _squeezed(layout[name]) == _squeezed(shape) else tuple(shape)
            for name, shape in final.items()
        }
    return Pretrained(read, report, chosen, layout)


def to_reference(
    model: nn.Module,
    variables: Mapping[str, Any],
    dialect: str,
    *,
    inputs: Sequence[Any] | None = None,
    layout: Layout | None = None,
) -> dict[str, np.ndarray]:
    """Return the tensors that a reference would have for the variables of a model, bit for bit.

    Args:
      model: whose variables they are.
      variables: by collection.
      dialect: name of the reference.
      inputs: inputs of the model, or their shapes; needed where a model's shapes depend on them.
      layout: shape by name as a file of the reference has them; needed for dialects without a layout of their own.

    Returns:
      Arrays by the reference's names.

    Raises:
      ValueError: if there is no such dialect, or it cannot write.
    """
    return _dialects.to_reference(
        find_dialect(None, model, dialect), model, variables, inputs=default_inputs(model, inputs), layout=layout
    )


# Dialects -------------------------------------------------------------------------------------------------------------


@functools.cache
def list_dialects() -> tuple[Dialect, ...]:
    """Return all dialects, by module and name."""
    found = [dialect for module in paper_modules() for dialect in getattr(module, "DIALECTS", ())]
    return tuple(sorted(found, key=lambda one: (one.module.__name__, one.name)))


def recognise(names: Iterable[str]) -> tuple[Dialect, ...]:
    """Return the dialects that a checkpoint's names may be of, whatever stands before them.

    Args:
      names: all names of a file.
    """
    names = list(names)
    prefix, _ = _dialects.unwrap(names, lambda inner: any(one.fits(inner) for one in list_dialects()))
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return tuple(one for one in list_dialects() if one.fits(inner))


def guess(tensors: Tensors) -> tuple[tuple[str, Dialect], ...]:
    """Return the named models, each with a dialect, whose tensors a checkpoint has, but for a classifier's classes."""
    prefix, _ = _dialects.unwrap(list(tensors), lambda inner: any(one.fits(inner) for one in list_dialects()))
    inner = {name.removeprefix(prefix): _shape(tensors, name) for name in tensors if name.startswith(prefix)}
    found = []
    for dialect in recognise(tensors):
        if dialect.layout is None:
            continue
        for name in list_models():
            if class_of(name) is not dialect.module:
                continue
            model, inputs = create_model(name), abstract_inputs(name)
            try:
                expected = dict(dialect.layout(model, _dialects.shapes_of(model, inputs)))
            except ValueError:
                continue
            left = {key: shape for key, shape in inner.items() if key not in dialect.reasons(list(inner), model)}
            heads = {head.rpartition(".")[0] for head in dialect.heads}
            if set(left) == set(expected) and all(
                _squeezed(shape) == _squeezed(expected[key]) or key.rpartition(".")[0] in heads
                for key, shape in left.items()
            ):
                found.append((name, dialect))
    return tuple(found)


def find_dialect(names: Sequence[str] | None, model: Any, name: str | None) -> Dialect:
    """Return the dialect of a model by its name, or by the names of the tensors.

    Raises:
      ValueError: if the model has none of the name, or none or several fit the tensors.
    """
    module = type(model)
    known = [one for one in list_dialects() if one.module is module]
    if not known:
        raise ValueError(f"{module.__name__} must have a reference whose weights can be read; it has none")
    if name is not None:
        chosen = [one for one in known if one.name == name]
        if not chosen:
            raise ValueError(f"dialect={name!r} of {module.__name__} must be one of {[one.name for one in known]}")
        return chosen[0]
    fitting = [one for one in known if one.fits(names or ())]
    if len(fitting) != 1:
        others = sorted({f"{one.module.__name__}/{one.name}" for one in list_dialects() if one.fits(names or ())})
        raise ValueError(
            f"the tensors must be of one dialect of {module.__name__}, which has {[one.name for one in known]}; they "
            f"look like {[one.name for one in fitting] or others or 'none'}; pass dialect= or another model"
        )
    return fitting[0]


def layout_of(model: nn.Module, dialect: Dialect, inputs: Sequence[Any] | None = None) -> Layout:
    """Return shape by name of the tensors that a reference would have for a model.

    Raises:
      ValueError: if the dialect cannot tell, or needs inputs.
    """
    return _dialects.layout_of(dialect, model, _dialects.shapes_of(model, default_inputs(model, inputs)))


def layout_in(tensors: Tensors, found: Pretrained, dialect: str | None = None) -> Layout:
    """Return shape by name of the weights in a file of a reference, without what it stores in excess.

    Args:
      tensors: the file's.
      found: a conversion to the same model.
      dialect: the file's; `None` takes that of the conversion.

    Raises:
      ValueError: if the file is of another dialect.
    """
    module = found.dialect.module
    fitting = [one for one in list_dialects() if one.module is module and dialect in (None, one.name)]
    prefix, _ = _dialects.unwrap(list(tensors), lambda names: any(one.fits(names) for one in fitting))
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    chosen = next((one for one in fitting if one.fits(names)), None)
    if chosen is None:
        raise ValueError(f"the file must have the names of {[one.name for one in fitting]}; pass another")
    left_out = chosen.reasons(names)
    return {name: _shape(tensors, prefix + name) for name in names if name not in left_out}


def from_huggingface(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a named model, and the fields that differ from it, for the `config.json` of a Hugging Face folder.

    Args:
      config: its content.

    Raises:
      ValueError: if the type of model is not known.
    """
    readers = {
        kind: reader for module in paper_modules() for kind, reader in getattr(module, "HUGGINGFACE", {}).items()
    }
    kind = config.get("model_type")
    if kind not in readers:
        raise ValueError(f"model_type={kind!r} must be one of {sorted(readers)}; pass the model by name")
    try:
        return readers[kind](config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json must have the settings of a {kind} ({error!r}); fetch it again") from error


# ------------------------------------------------------------------------------------------------------------------


class _Chosen(Mapping):
    """The tensors to be read, under the reference's plain names; each is looked up in the file when it is read."""

    def __init__(self, places: Mapping[str, Any], shapes: Layout, tensors: Mapping[str, np.ndarray]) -> None:
        self.places, self.shapes, self.tensors = places, shapes, tensors

    def __getitem__(self, name: str) -> np.ndarray:
        place = self.places[name]
        if place is None:
            return np.broadcast_to(np.float32(0), self.shapes[name])
        return self.tensors[place] if isinstance(place, str) else place

    def __iter__(self) -> Any:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    stored = getattr(tensors, "stored", None)
    return tuple(stored[name].shape if stored is not None else np.shape(tensors[name]))


def _value(tensors: Mapping[str, np.ndarray], places: Mapping[str, str], name: str) -> np.ndarray:
    return np.asarray(tensors[places[name]])


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"allow={pattern!r} must be a regular expression ({error}); write dots as \\.") from error


def default_inputs(model: nn.Module, inputs: Sequence[Any] | None = None) -> Sequence[Any] | None:
    """Return the inputs, or, where none are given, small ones that show a model's shapes; `None` if none are known."""
    if inputs is not None:
        return tuple(inputs)
    maker = getattr(_file(model), "reference_inputs", None)
    if maker is not None:
        return tuple(maker(model))
    name = next((name for name in list_models() if class_of(name) is type(model)), None)
    return abstract_inputs(name) if name else None


@functools.cache
def class_of(name: str) -> type:
    """Return the class of a named model, which a function may make."""
    module = variant_module(name)
    return module if isinstance(module, type) else type(create_model(name))


def _file(model: nn.Module) -> Any:
    return importlib.import_module(type(model).__module__)


def _fit(
    dialect: Dialect, expected: Layout, shapes: dict[str, tuple[int, ...]], value: Any
) -> tuple[dict[str, tuple[int, ...]], list[str], dict[str, Any], dict[str, str]]:
    """Fit classifier and first kernel to the model; return shapes, notes, new tensors and names to begin anew."""
    notes: list[str] = []
    replaced: dict[str, Any] = {}
    new: dict[str, str] = {}
    shapes = dict(shapes)
    for head in dialect.heads:
        if head not in expected or head not in shapes or shapes[head] == expected[head]:
            continue
        reason = f"the classifier of {shapes[head][0]} classes begins anew for {expected[head][0]}"
        for name in (head, f"{head.rpartition('.')[0]}.bias"):
            if name in shapes and name in expected:
                shapes[name], replaced[name], new[name] = expected[name], None, reason
        if reason not in notes:
            notes.append(reason)
    for stem in dialect.stems:
        if stem not in expected or stem not in shapes or shapes[stem] == expected[stem]:
            continue
        old, wanted = shapes[stem], expected[stem]
        if (old[0], *old[2:]) == (wanted[0], *wanted[2:]):
            notes.append(f"the first kernel for {old[1]} channels is spread over {wanted[1]}, its response kept")
            kernel = np.asarray(value(stem)).mean(axis=1, keepdims=True, dtype=np.float32) * (old[1] / wanted[1])
            replaced[stem] = np.broadcast_to(kernel, wanted).astype(value(stem).dtype)
            shapes[stem] = wanted
    return shapes, notes, replaced, new


def _account(
    dialect: Dialect, expected: Layout, shapes: dict[str, tuple[int, ...]], allow: Sequence[str], model: Any
) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]:
    """Compare names and shapes with the expected; return those to be read, those left out, those to begin anew."""

    def allowed(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in allow)

    left_out = {name: "in excess, by leave" for name in shapes if name not in expected and allowed(name)}
    new = {name: "missing in the checkpoint, by leave" for name in expected if name not in shapes and allowed(name)}
    missing = sorted(name for name in expected if name not in shapes and name not in new)
    excess = sorted(name for name in shapes if name not in expected and name not in left_out)
    wrong = [
        f"{name} {list(shapes[name])} for {list(expected[name])}"
        for name in expected
        if name in shapes and _squeezed(shapes[name]) != _squeezed(expected[name])
    ]
    if missing or excess or wrong:
        raise ValueError(
            f"the checkpoint ({dialect.name}) must have the tensors of {type(model).__name__}; "
            f"missing {_some(missing)}, unexpected {_some(excess)}, of another shape {_some(wrong)}; set the model's "
            "fields, pass source= for another window or size, or allow= what may differ"
        )
    kept = {name: shape for name, shape in shapes.items() if name not in left_out}
    return {**kept, **{name: tuple(expected[name]) for name in new}}, left_out, new


def _squeezed(shape: Sequence[int]) -> list[int]:
    """Return a shape without axes of length one: linear layers and convolutions of size one take each other's place."""
    return [length for length in shape if length != 1]


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"


def _initial(model: nn.Module, inputs: Sequence[Any] | None) -> dict[str, Any]:
    if inputs is None:
        raise ValueError(f"{type(model).__name__} must be shown inputs to begin parts anew; pass inputs=")
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tuple(inputs))
    return dict(jax.jit(model.init)(jax.random.key(0), *zeros))


def _cast(read: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the floating leaves in a dtype, one by one, so that never both of all are held."""
    leaves, tree = jax.tree.flatten(read)
    read.clear()
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaves[index] = leaf.astype(dtype)
    return jax.tree.unflatten(tree, leaves)


def _resized(read: dict[str, Any], source: nn.Module, model: nn.Module) -> tuple[dict[str, Any], str]:
    resize = getattr(_file(model), "resize", None)
    differ = [
        f"{field.name} {getattr(source, field.name)} to {getattr(model, field.name)}"
        for field in dataclasses.fields(model)
        if field.init
        and field.name not in ("parent", "name")
        and getattr(source, field.name) != getattr(model, field.name)
    ]
    if resize is None:
        raise ValueError(f"{type(model).__name__} must be loaded as it was, since it has no resize: {differ}")
    first = next(iter(inspect.signature(resize).parameters))
    if first == "params":
        read = {**read, "params": resize(read["params"], source, model)}
    else:
        read = dict(resize(read, source, model))
    return read, f"resized: {', '.join(differ) or 'nothing'}"


def _own(
    tensors: Tensors, model: nn.Module, allow: Sequence[str], dtype: Any, inputs: Sequence[Any] | None
) -> Pretrained:
    """Read one of our own files, whose names are our paths with dots."""
    flat: dict[str, Any] = {}
    for name in tensors:
        path = name.removeprefix("collections.") if name.startswith("collections.") else f"params/{name}"
        value = jnp.asarray(tensors[name])
        cast = dtype is not None and jnp.issubdtype(value.dtype, jnp.floating)
        flat[path.replace(".", "/")] = value.astype(dtype) if cast else value
    own = Dialect(name="jaxlayers", origin="this library", module=type(model), read=lambda *_: {}, marks=())
    converted = {path: [path] for path in flat}
    left_out: dict[str, str] = {}
    fresh: dict[str, str] = {}
    shown = default_inputs(model, inputs)
    if shown is not None:
        wanted = flax.traverse_util.flatten_dict(_dialects.shapes_of(model, shown), sep="/")
        expected = {path: tuple(leaf.shape) for path, leaf in wanted.items()}
        found = {path: tuple(value.shape) for path, value in flat.items()}
        if inputs is None:
            # Inputs that were not given may have other channels than those that the weights are for.
            expected = {path: found.get(path, shape) for path, shape in expected.items()}
        _, left_out, fresh = _account(own, expected, found, allow, model)
        if fresh:
            start = flax.traverse_util.flatten_dict(_initial(model, shown), sep="/")
            flat |= {path: start[path] for path in fresh}
        flat = {path: value for path, value in flat.items() if path not in left_out}
        converted = {path: [path] for path in converted if path not in left_out}
    report = Report("jaxlayers", "", converted, left_out, fresh, ())
    return Pretrained(flax.traverse_util.unflatten_dict(flat, sep="/"), report, own, {})
