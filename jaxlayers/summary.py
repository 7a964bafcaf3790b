"""A table of a model's modules with shapes, parameters and multiply-accumulates, from shapes alone."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One module of a model.

    Attributes:
      path: names from the model down to the module, empty for the model itself.
      kind: class of the module.
      outputs: shapes of the output's leaves, at the first call.
      parameters: number of parameters of the module and everything in it.
      macs: multiply-accumulates of matrix products and convolutions in it.
    """

    path: tuple[str, ...]
    kind: str
    outputs: tuple[tuple[int, ...], ...]
    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summarize` returns.

    Attributes:
      rows: one row a module, in calling order, the model itself first.
    """

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return self.rows[0].parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass."""
        return self.rows[0].macs

    def table(self, *, depth: int = 2) -> Table:
        """Return the rows down to `depth` as a rich table."""
        table = Table("module", "class", "output", "parameters", "MACs", header_style="bold")
        for column in table.columns[3:]:
            column.justify = "right"
        for row in self.rows:
            if len(row.path) <= depth:
                label = "  " * len(row.path) + (row.path[-1] if row.path else "(model)")
                shapes = " ".join("x".join(map(str, shape)) or "()" for shape in row.outputs)
                table.add_row(label, row.kind, shapes, f"{row.parameters:,}", f"{row.macs:,}")
        return table


def summarize(model: nn.Module, *inputs: Any, **keywords: Any) -> Summary:
    """Count a model's parameters and multiply-accumulates module by module, without running it.

    Multiply-accumulates are those of `dot_general` and convolutions in the traced program (a scanned body counts
    once for each turn, a `while` body once, a conditional by its dearest branch); additions, norms and softmax are
    not counted, as is usual in the papers' figures.

    Args:
      model: an unbound Linen module.
      *inputs: positional inputs, arrays or `jax.ShapeDtypeStruct`s.
      **keywords: static keyword arguments of the call.

    Returns:
      A `Summary`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxlayers import summarize
      >>> summary = summarize(nn.Dense(4), jax.ShapeDtypeStruct((2, 3), jnp.float32))
      >>> summary.parameters, summary.macs
      (16, 24)
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
    variables = jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args, **keywords), *shapes)
    calls: dict[tuple[str, ...], tuple[str, tuple[tuple[int, ...], ...]]] = {}

    def record(call, args, kwargs, context):
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        # Reserve the place before the call, so that a module stands above its parts.
        path = context.module.path
        calls.setdefault(path, (type(context.module).__name__, ()))
        output = call(*args, **kwargs)
        if not calls[path][1]:
            leaves = tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(output) if hasattr(leaf, "shape"))
            calls[path] = (calls[path][0], leaves)
        return output

    def apply(variables, *args):
        with nn.intercept_methods(record):
            return model.apply(variables, *args, **keywords)

    jaxpr = jax.make_jaxpr(apply)(variables, *shapes)
    macs: dict[tuple[str, ...], int] = defaultdict(int)
    for scope, count in _macs(jaxpr.jaxpr, None):
        for end in range(len(scope) + 1):
            macs[scope[:end]] += count
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get("params", {})):
        names = tuple(str(key.key) for key in path)
        for end in range(len(names)):
            counts[names[:end]] += math.prod(leaf.shape)
    return Summary(tuple(Row(path, kind, outputs, counts[path], macs[path]) for path, (kind, outputs) in calls.items()))


def count_macs(function: Callable[..., Any], *inputs: Any) -> int:
    """Return the multiply-accumulates of a function of arrays (or their shapes), counted as `summarize` does.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlayers.summary import count_macs
      >>> x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
      >>> count_macs(lambda x: x @ x.T, x), count_macs(jax.grad(lambda x: (x @ x.T).sum()), x)
      (12, 36)
    """
    return sum(count for _, count in _macs(jax.make_jaxpr(function)(*inputs).jaxpr, ()))


def _macs(jaxpr: Jaxpr, outer: tuple[str, ...] | None) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield (module path, multiply-accumulates) of every product in a program; `outer` is `None` at the top."""
    for equation in jaxpr.eqns:
        names = _module_path(str(equation.source_info.name_stack))
        # The outermost scope is the model's class; the scopes of an inner program go on from its caller's.
        scope = names[1:] if outer is None else outer + names
        name = equation.primitive.name
        if name == "dot_general":
            yield scope, _dot_macs(equation)
        elif name == "conv_general_dilated":
            yield scope, _conv_macs(equation)
        elif name == "pallas_call" and equation.params["cost_estimate"] is not None:
            # The program of one block; how often it runs, and what of it is padding, the kernel itself says.
            yield scope, equation.params["cost_estimate"].flops // 2
        elif name == "cond":
            branches = [list(_macs(branch.jaxpr, scope)) for branch in equation.params["branches"]]
            yield from max(branches, key=lambda found: sum(count for _, count in found))
        else:
            turns = equation.params["length"] if name == "scan" else 1
            for inner in _inner_programs(list(equation.params.values())):
                for path, count in _macs(inner, scope):
                    yield path, turns * count


def _module_path(stack: str) -> tuple[str, ...]:
    """Return the module names in a scope string such as `Swin/stage_0/block_1/up`."""
    path: list[str] = []
    method = ""
    for name in stack.split("/"):
        if not name or "(" in name:  # transformations appear as `jvp(...)`
            continue
        outer_method, (module, _, method) = method, name.partition(".")
        # A method opens `Swin/Swin.features`, a lifted call `block.<lambda>/block`: one module each.
        if not (path and path[-1] == module and (method or outer_method)):
            path.append(module)
    return tuple(path)


def _inner_programs(values: Sequence[Any]) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner_programs(value)


def _dot_macs(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv_macs(equation: Any) -> int:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return math.prod(equation.outvars[0].aval.shape) * per_output
