"""The conformance suite: what every layer is held to, as one `Case` and ten checks.

A test file lists `CASES`; a single parametrised test runs `CHECKS` on each. Users run the same checks on their own
Linen modules:

    case = Case(name="mine", module=MyLayer(features=8), inputs=lambda rng: (rng.normal(size=(2, 5, 8)),))
    check_transformations(case)
"""

import contextlib
import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlayers.core import axes
from jaxlayers.testing.symmetry import Symmetry, sample_elements

Inputs = Callable[[np.random.Generator], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class BadInput:
    """A wrong use of a layer that must raise `ValueError`.

    Attributes:
      match: regular expression found in the message.
      module: the module, wrongly set up; `None` takes the case's own.
      inputs: the inputs, wrongly made; `None` takes the case's own.
    """

    match: str
    module: nn.Module | None = None
    inputs: Inputs | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A small instance of a layer, with what it claims.

    Attributes:
      name: unique among all cases; names the stored parameter tree.
      module: an unbound Linen module, as small as shows all its parts.
      inputs: makes the positional inputs from a NumPy generator; floating ones are cast to the dtype under test.
      symmetries: the symmetries it claims, each with its negative control.
      keywords: static keyword arguments of the call.
      batched: axis 0 of every input and output is a batch, whose elements do not influence each other.
      leading_axes: any number of leading axes may stand before the others.
      zero_gradients: regular expressions on parameter paths (`block/key/bias`) whose gradient is zero by
        construction, each with the reason.
      bfloat16_tolerance: error of bfloat16 compute, relative to the largest output.
      sharded_tolerance: error of sharded against unsharded, relative to the largest output.
      bad_inputs: wrong uses, each with the message it must raise.
      tpu: why the TPU compiler cannot take it; empty when it can.
      within: name of the case whose module is made of this one, if there is one: its checks cover this one's
        transformations, so that these may run less often.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    symmetries: tuple[Symmetry, ...] = ()
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batched: bool = True
    leading_axes: bool = False
    zero_gradients: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bfloat16_tolerance: float = 5e-2
    sharded_tolerance: float = 1e-5
    bad_inputs: tuple[BadInput, ...] = ()
    tpu: str = ""
    within: str = ""

    def make_inputs(self, dtype: Any = np.float32, *, seed: int = 0) -> tuple[Any, ...]:
        """Return the inputs with their floating leaves in `dtype`."""
        return jax.tree.map(functools.partial(_cast, dtype=dtype), self.inputs(np.random.default_rng(seed)))

    def apply(self, variables: Any, *inputs: Any, module: nn.Module | None = None) -> Any:
        """Return the output of the case's module (or of a copy of it)."""
        return (module or self.module).apply(variables, *inputs, **self.keywords)

    @functools.cached_property
    def variables(self) -> Any:
        """The variables of the module, moved off their initial values so that no zero or one hides a part."""
        # A jitted initialiser compiles once instead of once an operation, and far faster with this generator.
        initialise = _jit(lambda key, inputs: self.module.init(key, *inputs, **self.keywords))
        variables = initialise(jax.random.key(0, impl="rbg"), self.make_inputs())
        rng = np.random.default_rng(1)

        def move(leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            return leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)

        return {**variables, "params": jax.tree.map(move, variables.get("params", {}))}

    @functools.cached_property
    def compiled(self) -> Any:
        """The output as a jitted function of variables and inputs, which the checks share: it compiles once a dtype."""
        return _jit(self.apply)

    @functools.cached_property
    def compiled_gradient(self) -> Any:
        """Gradient of the projection, and output, as a jitted function of parameters and inputs that checks share."""
        return _jit(functools.partial(_gradient, self), level=1)

    @functools.cached_property
    def output(self) -> Any:
        """The float32 output under `jit`."""
        return self.compiled(self.variables, *self.make_inputs())


# 1 ----------------------------------------------------------------------------------------------------------------


def parameter_tree(case: Case) -> str:
    """Return names, shapes and dtypes of the case's variables as text, from shapes alone."""
    variables = jax.eval_shape(
        lambda *inputs: case.module.init(jax.random.key(0), *inputs, **case.keywords), *case.make_inputs()
    )
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    lines = [f"{path} {'x'.join(map(str, leaf.shape)) or 'scalar'} {leaf.dtype}" for path, leaf in flat.items()]
    return "\n".join(sorted(lines)) + "\n"


def check_parameters(case: Case, stored: str) -> None:
    """Check that the parameter tree, which is the checkpoint contract, is the stored one, and that it can be made."""
    check_tree(case, stored)
    check_output(case)


def check_output(case: Case) -> None:
    """Check that the parameters can be made and that the output is finite."""
    _assert_finite(case.output, f"{case.name}: output")


def check_tree(case: Case, stored: str) -> None:
    """Check that the parameter tree, which is the checkpoint contract, is the stored one, from shapes alone."""
    found = parameter_tree(case)
    if found != stored:
        gone = sorted(set(stored.splitlines()) - set(found.splitlines()))
        new = sorted(set(found.splitlines()) - set(stored.splitlines()))
        raise AssertionError(f"{case.name}: the parameter tree changed; gone {gone}; new {new}")


def check_part(case: Case, whole: Case) -> None:
    """Check that the module of a case occurs inside that of the case that it is said to be within."""
    seen = set()

    def look(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        seen.add(type(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        parameter_tree(whole)
    if case.name == whole.name or type(case.module) not in seen:
        raise AssertionError(f"{case.name}: its module does not occur in {whole.name}, which it is said to be within")


# 2 ----------------------------------------------------------------------------------------------------------------


def check_transformations(case: Case) -> None:
    """Check that jit equals no jit, `vmap` equals the batch, and that leading axes fold into the batch."""
    inputs = case.make_inputs()
    with _least_compilation():
        eager = case.apply(case.variables, *inputs)
    _assert_close(eager, case.output, 1e-5, f"{case.name}: eager against jit")
    if case.batched:

        def single(*inputs):
            output = case.apply(case.variables, *jax.tree.map(lambda leaf: leaf[None], inputs))
            return jax.tree.map(lambda leaf: leaf[0], output)

        _assert_close(_jit(jax.vmap(single))(*inputs), case.output, 1e-5, f"{case.name}: vmap against batch")
    if case.leading_axes:
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), inputs)
        expected = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), case.output)
        found = case.compiled(case.variables, *stacked)
        _assert_close(found, expected, 1e-5, f"{case.name}: one more leading axis")


# 3 ----------------------------------------------------------------------------------------------------------------


def check_gradients(case: Case) -> None:
    """Check that every parameter gets a finite gradient, non-zero unless the case says why not."""
    gradients, _ = case.compiled_gradient(case.variables["params"], case.make_inputs())
    _assert_finite(gradients, f"{case.name}: gradient")
    sizes = {
        path: float(jnp.max(jnp.abs(leaf)))
        for path, leaf in flax.traverse_util.flatten_dict(gradients, sep="/").items()
    }
    floor = 1e-6 * max(sizes.values(), default=0.0)
    for path, size in sizes.items():
        excused = [pattern for pattern in case.zero_gradients if re.search(pattern, path)]
        if not excused and size <= floor:
            raise AssertionError(f"{case.name}: parameter {path} gets no gradient ({size:.1e} against {floor:.1e})")
        if excused and size > floor:
            raise AssertionError(f"{case.name}: {path} is declared to get no gradient but gets {size:.1e}")


# 4 ----------------------------------------------------------------------------------------------------------------


def check_dtypes(case: Case) -> None:
    """Check bfloat16 compute (finite, near float32, parameters stay float32) and that float64 runs through."""
    half = with_dtype(case.module, jnp.bfloat16)
    inputs = case.make_inputs(jnp.bfloat16)
    initialise = functools.partial(half.init, **case.keywords)
    for leaf in jax.tree.leaves(jax.eval_shape(initialise, jax.random.key(0), *inputs)):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
            raise AssertionError(f"{case.name}: bfloat16 compute must keep float32 parameters; found {leaf.dtype}")
    found = _jit(functools.partial(case.apply, module=half))(case.variables, *inputs)
    _assert_finite(found, f"{case.name}: bfloat16 output")
    _assert_close(found, case.output, case.bfloat16_tolerance, f"{case.name}: bfloat16 against float32")
    with jax.enable_x64(True):
        inputs = case.make_inputs(np.float64)
        found = case.compiled(case.variables, *inputs)
        # Where all inputs are whole numbers, the parameters' float32 is the widest.
        wide = any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(inputs))
        for leaf in jax.tree.leaves(found):
            if wide and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float64:
                raise AssertionError(f"{case.name}: float64 inputs gave {leaf.dtype}; something casts down inside")
        _assert_close(found, case.output, 1e-3, f"{case.name}: float64 against float32")


# 5 ----------------------------------------------------------------------------------------------------------------


def check_symmetries(case: Case) -> None:
    """Check each claimed symmetry in float32 and float64, and that its negative control fails."""
    apply = functools.partial(case.compiled, case.variables)
    for symmetry in case.symmetries:
        symmetry.check(apply, case.make_inputs(), tolerance=symmetry.tolerance)
        symmetry.check_control(apply, case.make_inputs())
        with jax.enable_x64(True):
            symmetry.check(apply, case.make_inputs(np.float64), tolerance=symmetry.tolerance64)


def check_trained_symmetries(case: Case) -> None:
    """Check in float64 that each symmetry survives training, and that gradients of the inputs turn with the inputs.

    Training is a few steps of normalised descent of a random projection of the output. The gradient of <w, g^-1 f(g x)>
    is compared with that of <w, f(x)>: they are equal for a symmetry that holds in a neighbourhood of x, not at x
    alone. Symmetries that are approximate in float64 (`tolerance64` above 1e-6), or say `gradients=False`, are checked
    after training alone.
    """
    if not case.symmetries:
        return
    variables = {**case.variables, "params": _trained(case)}
    with jax.enable_x64(True):
        inputs = case.make_inputs(np.float64)
        leaves, tree = jax.tree.flatten(inputs)
        floating = [index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def rebuilt(moving: list[Any], still: list[Any]) -> Any:
            found = list(still)
            for index, leaf in zip(floating, moving, strict=True):
                found[index] = leaf
            return jax.tree.unflatten(tree, found)

        @functools.partial(_jit, level=1)
        def pull(still: list[Any], weights: Any) -> Any:
            moving = [still[index] for index in floating]
            output, back = jax.vjp(lambda moving: case.apply(variables, *rebuilt(moving, still)), moving)
            return output, back(weights)[0]

        for symmetry in case.symmetries:
            symmetry.check(functools.partial(case.compiled, variables), inputs)
            if symmetry.gradients and symmetry.tolerance64 <= 1e-6:
                _check_turned_gradients(case, symmetry, inputs, pull, rebuilt, floating)


def _check_turned_gradients(
    case: Case, symmetry: Symmetry, inputs: Any, pull: Callable[..., Any], rebuilt: Callable[..., Any], floating: Any
) -> None:
    """Compare the gradient of <w, g^-1 f(g x)> with that of <w, f(x)>, chain rule by hand so that f compiles once."""
    still = jax.tree.leaves(inputs)
    weights = symmetry.masked(jax.tree.map(_cotangent, case.compiled(case.variables, *inputs)))
    expected = pull(still, weights)[1]
    for g in sample_elements(symmetry.group, 2, seed=1):
        back = symmetry.group.inverse(g)
        moved, to_inputs = jax.vjp(
            lambda moving, g=g: [
                jax.tree.leaves(symmetry.moved(g, rebuilt(moving, still)))[index] for index in floating
            ],
            [still[index] for index in floating],
        )
        whole = jax.tree.leaves(symmetry.moved(g, inputs))
        for index, leaf in zip(floating, moved, strict=True):
            whole[index] = leaf
        turned = pull(whole, weights)[0]
        _, to_output = jax.vjp(lambda out, back=back: symmetry.moved_output(back, out), turned)
        (found,) = to_inputs(pull(whole, to_output(weights)[0])[1])
        what = f"{case.name}: gradient under {symmetry.group.name}, {symmetry.group.describe(g)}"
        _assert_close(found, expected, 100 * symmetry.tolerance64, what, leafwise=False)


def _trained(case: Case) -> Any:
    """Return the parameters after a few steps of normalised gradient descent."""

    def move(leaf: Any, gradient: Any) -> Any:
        size = jnp.sqrt(jnp.mean(jnp.square(gradient)))
        return leaf - 0.05 * gradient / jnp.where(size > 0, size, 1.0)

    params, inputs = case.variables["params"], case.make_inputs()
    for _ in range(3):
        params = jax.tree.map(move, params, case.compiled_gradient(params, inputs)[0])
    return params


def _cotangent(leaf: Any) -> Any:
    """Return fixed random weights of the output's kind; integers have no cotangent but float0."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return jnp.asarray(np.random.default_rng(3).normal(size=leaf.shape), leaf.dtype)


# 6 ----------------------------------------------------------------------------------------------------------------

_RULES = ((axes.BATCH, "data"), (axes.HIDDEN, "tensor"), (axes.HEADS, "tensor"))
_MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def check_sharding(case: Case) -> None:
    """Check that output and gradient on a mesh of 2 x 2 x 2 devices equal the unsharded ones, and how they lie on it.

    The batch is split over the first axis, the last axis of each parameter over the third, one of the others over the
    second.
    """
    mesh = jax.make_mesh(tuple(_MESH.values()), tuple(_MESH), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    inputs = case.make_inputs()
    if case.batched and any(leaf.shape[0] % _MESH["data"] for leaf in jax.tree.leaves(inputs)):
        inputs = jax.tree.map(lambda leaf: np.concatenate([leaf] * _MESH["data"]), inputs)
    params = case.variables["params"]
    gradient, output = case.compiled_gradient(params, inputs)

    def place(leaf, spec):
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    def split(leaf):
        even = [size % 2 == 0 for size in leaf.shape]
        names = ["tensor" if even[-1] else None] if even else []
        for is_even in even[-2::-1]:
            names.insert(0, "fsdp" if is_even and "fsdp" not in names else None)
        return place(leaf, PartitionSpec(*names))

    batch_spec = PartitionSpec("data") if case.batched else PartitionSpec()
    with jax.set_mesh(mesh), nn.logical_axis_rules(_RULES):
        # Traced anew: the constraints on activations are those of this mesh.
        step = _jit(functools.partial(_gradient, case), level=1)
        found = step(jax.tree.map(split, params), jax.tree.map(lambda leaf: place(leaf, batch_spec), inputs))
    what = f"{case.name}: sharded against unsharded"
    _assert_close(found[1], output, case.sharded_tolerance, what)
    # Against the largest of all gradients: one that is zero by construction is nothing but rounding.
    _assert_close(found[0], gradient, 10 * case.sharded_tolerance, f"{what}, gradient", leafwise=False)
    if case.batched:
        for leaf in jax.tree.leaves(found[1]):
            spec = leaf.sharding.spec
            if not len(spec) or "data" not in np.ravel(spec[0]):
                raise AssertionError(f"{case.name}: the output's batch must stay split over 'data'; it has {spec}")


# 7 ----------------------------------------------------------------------------------------------------------------


def check_round_trips(case: Case, folder: Path) -> None:
    """Check that Orbax, safetensors and NNX each give back the same parameters and output."""
    # Needed here only: users of the symmetry assertions need neither package.
    ocp = importlib.import_module("orbax.checkpoint")
    safetensors = importlib.import_module("safetensors.numpy")

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", case.variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(folder / "orbax", jax.tree.map(_abstract, case.variables))
    chex.assert_trees_all_equal(restored, case.variables)

    flat = flax.traverse_util.flatten_dict(jax.device_get(case.variables), sep="/")
    # safetensors writes the memory as it lies: a transposed view would be scrambled.
    safetensors.save_file({path: np.ascontiguousarray(leaf) for path, leaf in flat.items()}, folder / "weights")
    loaded = flax.traverse_util.unflatten_dict(safetensors.load_file(folder / "weights"), sep="/")
    chex.assert_trees_all_equal(loaded, flax.traverse_util.unflatten_dict(flat, sep="/"))

    def through_nnx(variables, *inputs):
        bridged = nnx.bridge.ToNNX(case.module, rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))
        bridged.lazy_init(*inputs, **case.keywords)
        state = nnx.state(bridged, nnx.Param)
        nnx.replace_by_pure_dict(state, variables["params"])
        nnx.update(bridged, state)
        return bridged(*inputs, **case.keywords)

    found = _jit(through_nnx)(case.variables, *case.make_inputs())
    _assert_close(found, case.output, 1e-5, f"{case.name}: NNX against Linen")


# 8 ----------------------------------------------------------------------------------------------------------------


def check_bad_inputs(case: Case) -> None:
    """Check that every declared wrong use raises the stated `ValueError`, before anything is computed."""
    if not case.bad_inputs:
        raise AssertionError(f"{case.name}: a case must declare at least one wrong use")
    enforced = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for bad in case.bad_inputs:
            _check_bad_input(case, bad)
    finally:
        jaxtyping.config.update("jaxtyping_disable", enforced)


def _check_bad_input(case: Case, bad: BadInput) -> None:
    module = bad.module or case.module
    inputs = (bad.inputs or case.inputs)(np.random.default_rng(0))
    inputs = jax.tree.map(functools.partial(_cast, dtype=np.float32), inputs)
    try:
        jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **case.keywords), *inputs)
    except ValueError as error:
        if not re.search(bad.match, str(error)):
            raise AssertionError(f"{case.name}: expected a message like {bad.match!r}; got {error}") from error
        return
    except Exception as error:
        raise AssertionError(f"{case.name}: expected ValueError {bad.match!r}; got {type(error).__name__}") from error
    raise AssertionError(f"{case.name}: a wrong use was accepted; expected ValueError like {bad.match!r}")


# 9 ----------------------------------------------------------------------------------------------------------------


def check_tpu_lowering(case: Case) -> None:
    """Check that the forward and backward pass lower to a TPU program (no TPU software is needed for that)."""
    _expect_tpu(case, lambda step, args: jax.export.export(jax.jit(step), platforms=["tpu"])(*args))


def check_tpu_compilation(case: Case, topology: str = "v5e:2x2") -> Any:
    """Check that the forward and backward pass compile ahead of time for one TPU chip (needs libtpu).

    Returns:
      The compiled program; `None` where the case says that there is none.
    """
    topologies = importlib.import_module("jax.experimental.topologies")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])

    def compile_step(step, args):
        return jax.jit(step, in_shardings=sharding, out_shardings=sharding).lower(*args).compile()

    return _expect_tpu(case, compile_step)


def _expect_tpu(case: Case, build: Callable[[Any, Any], Any]) -> Any:
    arguments = jax.tree.map(_abstract, (case.variables["params"], case.make_inputs()))
    try:
        built = build(functools.partial(_gradient, case), arguments)
    except Exception as error:
        if not case.tpu:
            raise AssertionError(f"{case.name}: does not compile for TPU: {error}") from error
        return None
    if case.tpu:
        raise AssertionError(f"{case.name}: is declared not to compile for TPU ({case.tpu}) but does")
    return built


# ------------------------------------------------------------------------------------------------------------------


def _jit(fn: Callable[..., Any], *, level: int = 0) -> Any:
    """Return `fn` jitted, on a CPU in the least time: how well code is optimised is not what is checked.

    At level 0 some gradients of a maximum are wrong; where their values are compared, take level 1.
    """
    options = {"xla_backend_optimization_level": level} if jax.default_backend() == "cpu" else None
    return jax.jit(fn, compiler_options=options)


@contextlib.contextmanager
def _least_compilation() -> Iterator[None]:
    """Compile what runs operation by operation in the least time too."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def with_dtype(module: nn.Module, dtype: Any) -> nn.Module:
    """Return a copy of `module` whose compute dtype, and that of every module among its fields, is `dtype`."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        if field.name == "dtype":
            changes["dtype"] = dtype
        elif isinstance(value, nn.Module) and field.name != "parent":
            changes[field.name] = with_dtype(value, dtype)
    return module.clone(**changes) if changes else module


def _projection(case: Case, params: Any, inputs: Any) -> tuple[jax.Array, Any]:
    """Return the sum of the output's floating leaves, each entry weighted by a fixed random number, and the output."""
    output = case.apply({**case.variables, "params": params}, *inputs)
    rng = np.random.default_rng(2)
    leaves = [leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    total = jnp.zeros(())
    for leaf in leaves:
        total = total + jnp.sum(leaf.astype(jnp.float32) * rng.normal(size=leaf.shape).astype(np.float32))
    return total, output


def _gradient(case: Case, params: Any, inputs: Any) -> tuple[Any, Any]:
    """Return the gradient of the projection with respect to the parameters, and the output."""
    return jax.grad(functools.partial(_projection, case), has_aux=True)(params, inputs)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _cast(leaf: Any, dtype: Any) -> Any:
    leaf = np.asarray(leaf)
    return jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.asarray(leaf)


def _assert_finite(tree: Any, what: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not bool(jnp.all(jnp.isfinite(leaf))):
            raise AssertionError(f"{what}{jax.tree_util.keystr(path)} is not finite")


def _assert_close(found: Any, expected: Any, tolerance: float, what: str, *, leafwise: bool = True) -> None:
    """Compare two trees; the tolerance is relative to the largest entry of each expected leaf, or of all."""
    found, expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (found, expected))
    chex.assert_trees_all_equal_shapes(found, expected)
    scales = jax.tree.map(lambda leaf: max(float(np.max(np.abs(leaf), initial=0.0)), 1e-6), expected)
    if not leafwise:
        largest = max(jax.tree.leaves(scales), default=1.0)
        scales = jax.tree.map(lambda _: largest, scales)
    scaled = [jax.tree.map(np.divide, tree, scales) for tree in (found, expected)]
    chex.assert_trees_all_close(*scaled, rtol=0.0, atol=tolerance, custom_message=what)
