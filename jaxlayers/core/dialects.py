"""Dialects: how a reference names and lays out the weights of a model, as data that conversions read.

A paper's file lists its `DIALECTS`. Each says which names tell it from others, what a reference stores beside the
weights and why it is left out, how its tensors become our variables, and which tensors it would have for ours. The way
back needs no code of its own: reading numbers in place of weights shows where each element goes.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from jaxlayers.core import reference

Layout = Mapping[str, tuple[int, ...]]
Variables = dict[str, Any]

# Names that hold a state dict among other things, in the order in which they are looked for.
WRAPPERS = (
    "params_ema",
    "model_ema",
    "g_ema",
    "model_state_dict",
    "model_state",
    "state_dict",
    "model",
    "net",
    "params",
    "g",
    "d",
    # A canonicaliser beside the network that it serves, alone and in a training checkpoint.
    "canonicalizer.canonicalization_network",
    "state_dict.canonicalizer.canonicalization_network",
)
# What wrappers of modules put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.")
# What PyTorch stores beside the statistics of a batch norm.
COUNTED: Mapping[str, str] = {r"num_batches_tracked$": "a count of batches that nothing reads"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """The names and the layout that a reference gives to the weights of one model.

    Attributes:
      name: of the reference, unique for its module: "official", "timm".
      origin: where such files come from: a repository or package, and the version where layouts changed.
      module: the class whose weights they are.
      read: from tensors by name, a model and its inputs (or `None`), the variables by collection. What the file stores
        in excess is gone before it is called.
      marks: regular expressions, each found in some name of every such file.
      foreign: regular expressions found in no name of such a file.
      ignored: regular expressions of names that a reference stores and we compute or do not use, each with the reason;
        or a function of the model that returns them.
      layout: from a model and the shapes of its variables, shape by name of the tensors that the reference has; `None`
        where a file of the reference must show it.
      head: name of the weight of the classifier, whose first axis is the classes; several where there are several.
      stem: name of the weight whose second axis is the input's channels; several where there are several.
      one_way: why the reference's values cannot be given back exactly; empty where they can.
    """

    name: str
    origin: str
    module: type
    read: Callable[[Mapping[str, Any], Any, Any], Mapping[str, Any]]
    marks: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    ignored: Mapping[str, str] | Callable[[Any], Mapping[str, str]] = dataclasses.field(default_factory=dict)
    layout: Callable[[Any, Mapping[str, Any]], Layout] | None = None
    head: str | tuple[str, ...] = ()
    stem: str | tuple[str, ...] = ()
    one_way: str = ""

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the weights of the classifiers."""
        return (self.head,) if isinstance(self.head, str) else self.head

    @property
    def stems(self) -> tuple[str, ...]:
        """Names of the weights that the input meets first."""
        return (self.stem,) if isinstance(self.stem, str) else self.stem

    def fits(self, names: Sequence[str]) -> bool:
        """Return whether names are those of such a file: all marks, nothing foreign."""
        return all(any(re.search(mark, name) for name in names) for mark in self.marks) and not any(
            re.search(mark, name) for mark in self.foreign for name in names
        )

    def reasons(self, names: Sequence[str], model: Any = None) -> dict[str, str]:
        """Return the names that are left out by rule, with the reason."""
        rules = self.ignored(model) if callable(self.ignored) else self.ignored
        found = {}
        for name in names:
            reason = next((why for pattern, why in rules.items() if re.search(pattern, name)), None)
            if reason is not None:
                found[name] = reason
        return found


def from_params(
    read: Callable[..., Any], **keywords: Any
) -> Callable[[Mapping[str, Any], Any, Any], Mapping[str, Any]]:
    """Return a `Dialect.read` of a function of tensors and model that returns parameters alone."""

    def read_params(tensors: Mapping[str, Any], model: Any, inputs: Any) -> Variables:
        return {"params": read(tensors, model, **keywords)}

    return read_params


def from_variables(
    read: Callable[..., Any], **keywords: Any
) -> Callable[[Mapping[str, Any], Any, Any], Mapping[str, Any]]:
    """Return a `Dialect.read` of a function of tensors and model that returns all collections."""

    def read_all(tensors: Mapping[str, Any], model: Any, inputs: Any) -> Variables:
        return dict(read(tensors, model, **keywords))

    return read_all


def from_shapes(
    read: Callable[..., Any], *, collections: bool = False, **keywords: Any
) -> Callable[[Mapping[str, Any], Any, Any], Mapping[str, Any]]:
    """Return a `Dialect.read` of a function of tensors and the parameters' (or all variables') shapes."""

    def read_shaped(tensors: Mapping[str, Any], model: Any, inputs: Any) -> Variables:
        wanted = shapes_of(model, inputs)
        return (
            dict(read(tensors, wanted, **keywords))
            if collections
            else {"params": read(tensors, wanted["params"], **keywords)}
        )

    return read_shaped


def shapes_of(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Return the shapes of a model's variables, without making them.

    Raises:
      ValueError: if there are no inputs to tell them from.
    """
    if inputs is None:
        raise ValueError(f"{type(model).__name__} must be shown inputs to know its shapes; pass inputs=")
    leaves, structure = jax.tree.flatten(tuple(inputs))
    leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf for leaf in leaves]
    try:
        return dict(_traced(model, tuple(leaves), structure))
    except TypeError:  # of a field that cannot be hashed
        return dict(_traced.__wrapped__(model, tuple(leaves), structure))


@functools.lru_cache(maxsize=4)
def _traced(model: nn.Module, leaves: tuple[Any, ...], structure: Any) -> Mapping[str, Any]:
    """Return the shapes of a model's variables; a conversion asks several times, and tracing is what takes its time."""
    return jax.eval_shape(functools.partial(model.init, jax.random.key(0)), *jax.tree.unflatten(structure, leaves))


def table_layout(
    table: Mapping[str, str],
    *,
    shapes: Mapping[str, Callable[[Any, tuple[int, ...]], tuple[int, ...]]] | None = None,
    fused: Mapping[str, str] | None = None,
    extra: Callable[[Any, Mapping[str, Any]], Layout] | None = None,
    rename: Callable[[str], str] | None = None,
) -> Callable[[Any, Mapping[str, Any]], Layout]:
    """Return a `Dialect.layout` from a table of names (see `jaxlayers.core.reference`).

    Kernels are taken to be `[out, in, *space]` there, all other tensors as they are with us.

    Args:
      table: modules or parameters of ours to theirs.
      shapes: for parameters that are laid out otherwise, by our path with numbers left out
        (`patch_embed/projection/kernel`) or its ending, a function of the model and of our shape that returns theirs.
      fused: endings of modules that stand in one tensor there, one below the other, with the ending of that:
        `{"query": "qkv", "key": "qkv", "value": "qkv"}`. Names that the table gives to several parameters of ours are
        joined so as well.
      extra: tensors that the table does not have.
      rename: of names last of all.
    """

    def layout(model: Any, variables: Mapping[str, Any]) -> Layout:
        flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
        found: dict[str, tuple[int, ...]] = {}
        for whole, leaf in flat.items():
            path = whole.split("/", 1)[1]
            name = reference.reference_name(path, table)
            plain = reference.unnumbered(path)
            rule = next((rule for ours, rule in (shapes or {}).items() if _ends(plain, ours)), None)
            if rule is not None:
                shape = tuple(rule(model, tuple(leaf.shape)))
            elif path.endswith("kernel") and len(leaf.shape) > 1:
                shape = (leaf.shape[-1], leaf.shape[-2], *leaf.shape[:-2])
            else:
                shape = tuple(leaf.shape)
            module, _, end = name.rpartition(".")
            part = next((part for part in fused or {} if _ends(module, part, ".")), None)
            if part is not None and fused is not None:
                name = f"{module.removesuffix(part)}{fused[part]}.{end}"
            name = rename(name) if rename else name
            # One below the other.
            found[name] = (found[name][0] + shape[0], *shape[1:]) if name in found else shape
        return {**found, **(extra(model, variables) if extra else {})}

    return layout


def _ends(name: str, ending: str, separator: str = "/") -> bool:
    return name == ending or name.endswith(f"{separator}{ending}")


def patches(size: str = "patch_size", *, rank: int = 2) -> Callable[[Any, tuple[int, ...]], tuple[int, ...]]:
    """Return a rule of `table_layout`: our matrix `[space x in, out]` is a convolution `[out, in, *space]` there.

    Args:
      size: the model's field that says the space, a number or one an axis.
      rank: how many axes.
    """

    def shape(model: Any, ours: tuple[int, ...]) -> tuple[int, ...]:
        value = getattr(model, size)
        space = (value,) * rank if isinstance(value, int) else tuple(value)
        return (ours[1], ours[0] // int(np.prod(space)), *space)

    return shape


def pointwise(rank: int = 2) -> Callable[[Any, tuple[int, ...]], tuple[int, ...]]:
    """Return a rule of `table_layout`: our matrix `[in, out]` is a convolution of size one there."""
    return lambda model, ours: (ours[-1], ours[-2], *(1,) * rank)


def with_ones(before: int = 0, after: int = 0) -> Callable[[Any, tuple[int, ...]], tuple[int, ...]]:
    """Return a rule of `table_layout`: the tensor has more axes of length one there."""
    return lambda model, ours: (1,) * before + ours + (1,) * after


# ------------------------------------------------------------------------------------------------------------------


def unwrap(names: Sequence[str], fits: Callable[[Sequence[str]], bool]) -> tuple[str, list[str]]:
    """Return what stands before the names of the weights in a file, and the names of what is not below it.

    Training checkpoints hold a state dict beside an optimiser's; wrappers of modules put a word before every name.

    Args:
      names: all names of a file.
      fits: whether names, without what stands before them, are those that are looked for.
    """
    for wrapper in ("", *(f"{word}." for word in WRAPPERS)):
        prefix, inside = wrapper, [name for name in names if name.startswith(wrapper)]
        for before in ("", *PREFIXES):
            if inside and all(name.startswith(prefix + before) for name in inside):
                prefix += before
                if fits([name.removeprefix(prefix) for name in inside]):
                    return prefix, [name for name in names if not name.startswith(prefix)]
    return "", []


def plan_back(dialect: Dialect, model: Any, inputs: Any, layout: Layout) -> tuple[Variables, dict[str, int]]:
    """Return, for each element of our variables, the number of the reference's element that it is read from.

    Args:
      dialect: whose.
      model: which.
      inputs: see `Dialect.read`.
      layout: shape by name.

    Returns:
      The variables with numbers for weights, and the number of each tensor's first element.

    Raises:
      ValueError: if the dialect goes one way only.
    """
    if dialect.one_way:
        raise ValueError(f"the dialect {dialect.name!r} must be only read, since {dialect.one_way}; choose another")
    starts, count = {}, 0
    for name, shape in layout.items():
        starts[name] = count
        count += int(np.prod(shape))
    dtype = np.int32 if count < 2**31 else np.int64
    with jax.enable_x64(dtype is np.int64):
        numbers = {
            name: np.arange(starts[name], starts[name] + int(np.prod(shape)), dtype=dtype).reshape(shape)
            for name, shape in layout.items()
        }
        read = dialect.read(numbers, model, inputs)
    return jax.tree.map(np.asarray, dict(read)), starts


def to_reference(
    dialect: Dialect,
    model: Any,
    variables: Mapping[str, Any],
    *,
    inputs: Any = None,
    layout: Layout | None = None,
) -> dict[str, np.ndarray]:
    """Return the tensors that a reference would have for our variables, bit for bit those that were read.

    Args:
      dialect: whose.
      model: which.
      variables: by collection.
      inputs: see `Dialect.read`.
      layout: shape by name, as a file of the reference has them; `None` takes the dialect's own.

    Returns:
      Arrays by the reference's names. What the reference has in excess of our weights is not among them; elements of
      its tensors that we do not use are zero.

    Raises:
      ValueError: if the dialect goes one way only, has no layout of its own, or one that does not fit.
    """
    if layout is None:
        layout = layout_of(dialect, model, variables)
    plan, starts = plan_back(dialect, model, inputs, layout)
    ours = flax.traverse_util.flatten_dict({name: dict(tree) for name, tree in variables.items()}, sep="/")
    places = flax.traverse_util.flatten_dict(plan, sep="/")
    missing = sorted(set(places) ^ set(ours))
    if missing:
        raise ValueError(f"the variables must be those of the model; {missing[:5]} are not in both; set its fields")
    # Which of ours each of theirs is made of.
    bounds = np.array([*starts.values()])
    names = list(starts)
    found: dict[str, np.ndarray] = {}
    for path, place in places.items():
        value = np.asarray(ours[path])
        if value.shape != place.shape:
            raise ValueError(f"{path} must have shape {place.shape}, not {value.shape}; set the model's fields")
        if not value.size:
            continue
        flat, place = value.reshape(-1), place.reshape(-1)
        first, last = np.searchsorted(bounds, (place.min(), place.max()), side="right") - 1
        for number in range(first, last + 1):
            name = names[number]
            mine = slice(None) if first == last else np.searchsorted(bounds, place, side="right") - 1 == number
            if not np.size(place[mine]):
                continue
            if name not in found:
                found[name] = np.zeros(layout[name], value.dtype)
            found[name].reshape(-1)[place[mine] - starts[name]] = flat[mine]
    unused = sorted(name for name in layout if name not in found and np.prod(layout[name]))
    if unused:
        raise ValueError(f"the layout must have no tensors that the model does not use, such as {unused[:5]}")
    return {name: found.get(name, np.zeros(layout[name], np.float32)) for name in layout}


def layout_of(dialect: Dialect, model: Any, variables: Mapping[str, Any]) -> Layout:
    """Return shape by name of the tensors that a reference would have.

    Raises:
      ValueError: if the dialect cannot tell.
    """
    if dialect.layout is None:
        raise ValueError(f"the dialect {dialect.name!r} must be shown a file of the reference for its layout; pass one")
    return dialect.layout(model, variables)


def sources(dialect: Dialect, model: Any, inputs: Any, shapes: Layout) -> dict[str, list[str]]:
    """Return, for each of the reference's tensors, the paths of ours that hold any element of it.

    Reads the number of a tensor in place of its weights, so that it costs two bytes an element while it runs.

    Args:
      dialect: whose; one that computes with weights (`one_way`) cannot be followed.
      model: which.
      inputs: see `Dialect.read`.
      shapes: shape by name of the tensors that are read.
    """
    dtype = np.int16 if len(shapes) < 2**15 else np.int32
    tags = {name: np.broadcast_to(np.asarray(tag, dtype), shape) for tag, (name, shape) in enumerate(shapes.items())}
    read = flax.traverse_util.flatten_dict(dict(dialect.read(tags, model, inputs)), sep="/")
    names = list(shapes)
    found: dict[str, list[str]] = {name: [] for name in names}
    for path, leaf in read.items():
        for tag in np.unique(np.asarray(leaf)):
            found[names[int(tag)]].append(path)
    return found
