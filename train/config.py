"""The one frozen `Config` of a training run: how to write it, and how `--set` changes it.

**A config file** lives in `configs/` and is named `<family>_<model>_<data>.py` or shorter. It defines one function:

    \"\"\"Train a small transformer on digits.

    Command:  python -m train configs/tiny_digits.py --devices 8
    Expected: accuracy 0.98, two CPU cores, three minutes.
    \"\"\"

    from jaxlayers.geometry.groups import Translation
    from jaxlayers.testing import Symmetry
    from jaxlayers.window.swin import Swin
    from train.config import Config, MeshShape, Optim
    from train.data import digits
    from train.tasks import classification

    def config(smoke: bool = False) -> Config:
        return Config(
            model=Swin(num_classes=10, patch_size=2, embed_dim=48, depths=(2, 2), num_heads=(4, 8), window_size=2),
            task=classification(10, inputs=("image",), label="label", label_smoothing=0.1),
            train_data=digits("train"),
            test_data=digits("test"),
            steps=20 if smoke else 1000,
            batch_size=64,
            optim=Optim(learning_rate=1e-3, warmup_steps=5 if smoke else 100),
            mesh=MeshShape(data=-1, fsdp=2, tensor=2),
            eval_every=10 if smoke else 200,
            metric="accuracy",
            labels=tuple("0123456789"),
            symmetries=(Symmetry(group=Translation(2, cyclic=True), inputs=("image",), output="scalar"),),
            baselines=lambda: {"logistic regression accuracy": 0.95},
        )

- **Data.** `train_data` and `test_data` are random-access sources of records (`train.data.digits`, `arrays`, `tfds`): a
  record is a dict of NumPy arrays without a batch axis. `train_transform(record, generator)` augments a record with
  the NumPy generator it is given (`train.data.random_affine`); `test_transform` has the same form and sees the same
  generator at every evaluation. Batch *k* is a function of `(seed, k)` alone, so a resumed run sees the same batches.
- **Task.** `train.tasks.classification(num_classes, inputs=..., label=...)` and `regression(inputs=..., target=...)`
  say which record fields the model is called with, what is minimised and what is measured. For another task fill in a
  `Task`: its functions see `apply(*inputs, **keywords)`, the model with its variables, RNG streams and
  `deterministic` already bound, and return one number per example; the loop takes exact weighted means.
- **Metrics.** `metric` (with `mode`) names a key of the evaluation, for example `"accuracy"`; the `keep_best` best
  checkpoints by it are kept beside the `keep_last` newest.
- **More test sets.** `extra_tests={"rotated": source}` are evaluated once at the end, as `rotated/accuracy`.
- **Comparison.** `rivals={"bare backbone": PointNet(...)}` are other modules that the same loop trains with the same
  settings (in `<workdir>/rivals/<name>`, resumable too) and evaluates on the same test sets, printed beside the model;
  `baselines` is a function that returns named numbers, for example of a scikit-learn model.
- **Symmetry.** Each entry of `symmetries` (a `jaxlayers.testing.Symmetry`) becomes an error curve of the trained model
  (and of each rival) in the report, over the first `symmetry_examples` test examples; its `inputs` name the
  representation of each input of the model.
- **Mesh.** `MeshShape(data, fsdp, sequence, tensor)`; -1 takes the devices that are left. `batch_size` must divide by
  data * fsdp. Parameters are split by their path (`train/mesh.py`); `rules` adds patterns of your own.
- **Steps.** Everything is counted in optimiser steps: `steps`, `log_every`, `eval_every`, `checkpoint_every`.
- **Memory.** `accumulate=4` takes the batch in four pieces; `remat="attention"` recomputes attention's scores in the
  backward pass (other names in `jaxlayers.core.remat`); `model.dtype=bfloat16` computes in half precision while
  parameters, optimiser and averages stay in float32.
- **Kernels.** `kernels="table"` takes the library's Pallas kernels where they are found faster than what XLA makes of
  the same layer (on TPU; `jaxlayers.kernels.dispatch`); parameters and results stay the same.
- **Averages.** `ema_decay=0.9999` keeps a moving average of the parameters, which is what is evaluated and exported.
- **Starting from weights.** `start_from=StartFrom("runs/pretrained", exclude=("^head/",))` begins with a backbone under
  a new head and logs what was loaded, skipped and left fresh; `Optim(freeze=("^stage_[01]/",))` keeps parts of it,
  `Optim(rates=(("^head/", 10.0),))` or `layer_decay` moves parts faster.
- **When it goes wrong.** `on_nonfinite` skips a step or rolls back to the last good checkpoint, `on_corrupt="skip"`
  replaces records that cannot be read and counts them, a loss that jumps is named in the log, and a process that hangs
  for `hang_seconds` prints its stacks and ends, so that a launcher can start it again.
- **Games.** A task whose `loss` maps submodule names to losses (`train.tasks.adversarial`) trains several players in
  the same loop; `Optim(rates=(("^discriminator/", 4.0),))` gives them two time scales.

**`--set path=value`** replaces one field, by dotted path, before the run: `--set optim.learning_rate=3e-4`,
`--set mesh.tensor=4`, `--set model.depths=(2,2)`, `--set model.stem.features=8` (a module in a module). The value is a
Python literal, else a string. An unknown path is refused with the list of fields and the nearest one, a value of the
wrong type with the type wanted; functions, modules and data are changed in the config file. `<workdir>/config.txt`
lists every path with its value.
"""

import ast
import collections.abc
import dataclasses
import difflib
import functools
import importlib.util
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxlayers.kernels import dispatch
from jaxlayers.testing import Symmetry

Batch = Mapping[str, Any]
Transform = Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]]
BatchTransform = Callable[[Batch, Any], Batch]


class Records(Protocol):
    """A random-access source of records, as `train.data` makes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Apply(Protocol):
    """The model as a task sees it: variables, RNG streams and `deterministic` are bound."""

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Return the model's output."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What `Task.evaluate` returns for one batch.

    Attributes:
      metrics: one float per example, `[batch]`, under each name; the loop takes their mean over the whole set.
      truth: integer class of each example, `[batch]`, for the confusion matrix; or `None`.
      prediction: integer class that the model gives, `[batch]`; or `None`.
    """

    metrics: Mapping[str, Any]
    truth: Any = None
    prediction: Any = None


Loss = Callable[[Apply, Batch, Any], tuple[Any, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What varies between tasks: the inputs, the loss and the evaluation, as pure functions.

    Attributes:
      inputs: maps a batch to the positional arguments of the model; used to initialise it and for symmetry curves.
      loss: maps `(apply, batch, key)` to the loss of each example, `[batch]`, and to further quantities to log, each
        `[batch]`; `key` is the JAX key of the step, for losses that need noise. Or, for a game, a mapping from a
        top-level name of the parameters (`"generator"`) to the loss that those parameters minimise: every player
        steps on the gradient of its own loss while the others stand still.
      evaluate: maps `(apply, batch)` to an `Evaluated`.
      keywords: maps a batch to the keyword arguments of the model, in the same uses as `inputs`.
      num_classes: size of the confusion matrix; 0 = none.
      finish: turns the means over the whole set into further numbers (`rmse` from `mse`), or `None`.
      logits: picks, from the model's output, what symmetry curves are drawn of.
    """

    inputs: Callable[[Batch], tuple[Any, ...]]
    loss: Loss | Mapping[str, Loss]
    evaluate: Callable[[Apply, Batch], Evaluated]
    keywords: Callable[[Batch], Mapping[str, Any]] = lambda batch: {}
    num_classes: int = 0
    finish: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    logits: Callable[[Any], Any] = lambda outputs: outputs


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser, its schedule, and which parameters are decayed or slowed.

    Attributes:
      name: "adamw", "sgd" (Nesterov momentum `b1`), "lion", "adafactor" (factored second moments, no first) or "muon"
        (orthogonalised momentum for matrices, Adam for the rest).
      learning_rate: its peak.
      schedule: "cosine", "linear", "rsqrt" or "constant" after the warmup; or a function of the number of steps
        that returns an optax schedule (a *factor* of `learning_rate`).
      warmup_steps: linear from zero.
      final_fraction: what is left of the peak at the last step ("cosine" and "linear").
      weight_decay: decoupled, multiplied by the learning rate.
      clip_norm: largest global norm of the gradient; `None` = not clipped.
      b1: decay of the first moment (or the momentum).
      b2: decay of the second moment.
      epsilon: Adam's.
      no_decay: `(path, parameter) -> bool`, path as `"stage_0/query/kernel"`: True = not decayed. `None` = vectors,
        scalars and whatever is named like a bias, scale, embedding table or position.
      layer_ids: `path -> int`, the depth of a parameter; needed with `layer_decay`.
      layer_decay: factor of the learning rate per layer of distance from the last one; 1 = none.
      rates: `(regular expression on the path, factor)`: the first that matches multiplies the learning rate.
      freeze: regular expressions on the path: parameters that match one are not trained and carry no moments.
    """

    name: Literal["adamw", "sgd", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: str | Callable[[int], Callable[[Any], Any]] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    no_decay: Callable[[str, Any], bool] | None = None
    layer_ids: Callable[[str], int] | None = None
    layer_decay: float = 1.0
    rates: tuple[tuple[str, float], ...] = ()
    freeze: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How the devices are laid out; the product must be their number.

    Attributes:
      data: copies of the model, each with its part of the batch; -1 = the devices that are left.
      fsdp: parts of the batch *and* of the parameters and optimiser state.
      sequence: parts of the token, height, window or node axis of activations.
      tensor: parts of the heads and hidden features (the fastest links).
      slices: groups of devices with fast links inside and a slow network between them (TPU slices, nodes of GPUs);
        `data` spans them, and `fsdp` where `data` is too short.
      sequence_parallel: split tokens over `tensor` too, between the pairs of products that it splits: less memory for
        activations, and a reduce-scatter with an all-gather for each all-reduce.
      rules: further `(regular expression on the parameter path, mesh axes of its trailing axes)`, tried before those
        of `train/mesh.py`: `((r"codebook/kernel$", (None, "tensor")),)`.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    slices: int = 1
    sequence_parallel: bool = False
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class StartFrom:
    """Weights that a new run begins with, leaf by leaf: a backbone under a new head.

    What is loaded must have the name and the shape of a parameter of the model; the rest of the model is left freshly
    initialised, and the run's log lists what was loaded, skipped and left fresh.

    Attributes:
      path: a run directory, a directory of checkpoints, one checkpoint in it, or a `.safetensors` file.
      step: the step of the checkpoint; `None` = the newest that is intact.
      ema: take the averaged parameters where the checkpoint has them.
      include: regular expressions on the path *in the model*; only what matches one is loaded. Empty = all.
      exclude: regular expressions on the path in the model; what matches one stays fresh: `(r"^head/",)`.
      rename: `(regular expression, replacement)` pairs that turn a stored path into the model's, applied in turn.
      require: regular expressions on the path in the model; that a match is not loaded is an error.
    """

    path: str
    step: int | None = None
    ema: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    require: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run; the guide is in the module's docstring.

    Attributes:
      model: the Linen module. `deterministic` is passed to its `__call__` where it takes it.
      task: which fields it reads, what is minimised, what is measured.
      train_data: source of training records.
      test_data: source of test records; `None` = no evaluation.
      steps: optimiser steps of the whole run.
      batch_size: examples per step, over all devices and processes.
      seed: of parameters, data order, augmentation and dropout.
      optim: optimiser and schedule.
      mesh: layout of the devices.
      accumulate: pieces that the batch is cut into; their gradients are averaged before the one optimiser step.
      remat: what the backward pass computes anew instead of keeping it, a name of `jaxlayers.core.remat.POLICIES`.
      kernels: "jnp", "pallas", or "table", which takes Pallas kernels where they are found faster; see
        `jaxlayers.kernels.dispatch`.
      ema_decay: per step, of the averaged parameters that are then evaluated in place of the last ones; `None` = off.
      start_from: weights of another run or file that a new run begins with.
      train_transform: `(record, generator) -> record`, the augmentation; `None` = none.
      test_transform: the same for test records.
      batch_transform: `(batch, key) -> batch`, jitted, over the whole global batch (`train.augment.mixup_cutmix`).
      workers: processes that read and augment records; 0 = threads of this process. The batches are the same.
      on_corrupt: "stop" at a record that cannot be read, or "skip" it and count it as `corrupt_records`.
      eval_batch_size: `None` = `batch_size`.
      log_every: steps between lines of metrics.
      eval_every: steps between evaluations; `None` = only at the end.
      checkpoint_every: steps between checkpoints; `None` = as `eval_every`. The last step is always saved.
      keep_last: newest checkpoints that stay on disk.
      keep_best: best ones by `metric` that stay besides.
      keep_every: steps whose multiples stay for good; `None` = none do.
      checkpoint_dir: where checkpoints go, also `gs://...` and other object stores; `None` = the working directory.
      early_stop: evaluations without a better `metric` after which the run ends; `None` = never.
      on_nonfinite: at a loss or gradient that is not finite: "stop", "skip" the step, or "roll_back" to the last good
        checkpoint and go on with the batches after the bad one.
      spike_sigma: a loss this many standard deviations above its running mean is named in the log; `None` = off.
      hang_seconds: without a sign of life for so long the process prints its stacks and ends; `None` = never.
      metric: name of the evaluation metric that ranks checkpoints; `None` = not ranked.
      mode: "max" or "min": which `metric` is best.
      labels: names of the classes for the confusion picture.
      extra_tests: further test sets, evaluated at the end.
      symmetries: `jaxlayers.testing.Symmetry` entries to measure and plot at the end.
      symmetry_examples: test examples that the curves are measured on.
      baselines: returns named numbers to print beside the result.
      rivals: other modules to train and evaluate in the same way.
      title: heads the report; empty = the name of the working directory.
    """

    model: nn.Module
    task: Task
    train_data: Records
    test_data: Records | None
    steps: int
    batch_size: int
    seed: int = 0
    optim: Optim = Optim()
    mesh: MeshShape = MeshShape()
    accumulate: int = 1
    remat: str = "none"
    kernels: dispatch.Choice = "jnp"
    ema_decay: float | None = None
    start_from: StartFrom | None = None
    train_transform: Transform | None = None
    test_transform: Transform | None = None
    batch_transform: BatchTransform | None = None
    workers: int = 0
    on_corrupt: Literal["stop", "skip"] = "stop"
    eval_batch_size: int | None = None
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_last: int = 2
    keep_best: int = 1
    keep_every: int | None = None
    checkpoint_dir: str | None = None
    early_stop: int | None = None
    on_nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    spike_sigma: float | None = 6.0
    hang_seconds: float | None = 1800.0
    metric: str | None = None
    mode: Literal["max", "min"] = "max"
    labels: tuple[str, ...] | None = None
    extra_tests: Mapping[str, Records] = dataclasses.field(default_factory=dict)
    symmetries: Sequence[Symmetry] = ()
    symmetry_examples: int = 16
    baselines: Callable[[], Mapping[str, float]] | None = None
    rivals: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    title: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "keep_last", "symmetry_examples", "accumulate"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_batch_size", "eval_every", "checkpoint_every", "keep_every", "early_stop"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("keep_best", self.keep_best, 0)
        _at_least("workers", self.workers, 0)
        if self.mode not in ("max", "min"):
            raise ValueError(f'mode={self.mode!r} must be "max" or "min"; set mode to how metric is ranked')
        for name, choices in (
            ("on_corrupt", ("stop", "skip")),
            ("on_nonfinite", ("stop", "skip", "roll_back")),
            ("kernels", get_args(dispatch.Choice)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {choices}; set {name}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1), or None for no average; set ema_decay")
        for name in ("spike_sigma", "hang_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or None for none; set {name}")
        if self.early_stop is not None and (self.metric is None or self.eval_every is None):
            raise ValueError(
                f"early_stop={self.early_stop} watches metric at every evaluation; set metric and eval_every"
            )
        if not isinstance(self.model, nn.Module):
            raise ValueError(
                f"model={type(self.model).__name__} must be a flax.linen.Module; pass an instance of one as model"
            )


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}; set {name}")


def load(path: str | Path, *, smoke: bool = False) -> Config:
    """Return what `config(smoke=...)` of the file at `path` returns.

    Raises:
      ValueError: if there is no such file, it has no `config` function, or that returns something else.
    """
    path = Path(path)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("[!_]*.py"))
        near = difflib.get_close_matches(path.name, others, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
        raise ValueError(f"there is no config file {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file; a config file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise ValueError(f"{path} must define `def config(smoke: bool = False) -> Config`")
    result = module.config(smoke=smoke)
    if not isinstance(result, Config):
        raise ValueError(f"config() of {path} must return a train.config.Config; it returned {type(result).__name__}")
    return result


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Return `config` with each `"dotted.path=value"` applied in turn.

    Raises:
      ValueError: on an unknown path, a value of the wrong type, or a field that only the config file can change.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path = path.strip()
        if not equals or not all(part for part in path.split(".")):
            raise ValueError(f"--set {assignment!r} must have the form path=value; for example --set steps=100")
        config = _replace(config, path.split("."), text.strip(), whole=path)
    return config


def _fields(node: Any) -> dict[str, dataclasses.Field[Any]]:
    internal = ("parent", "name") if isinstance(node, nn.Module) else ()
    return {field.name: field for field in dataclasses.fields(node) if field.init and field.name not in internal}


def _replace(node: Any, path: Sequence[str], text: str, *, whole: str) -> Any:
    name, *rest = path
    fields = _fields(node)
    if name not in fields:
        initials = [field for field in fields if "".join(word[:1] for word in field.split("_")) == name]  # lr
        near = initials or difflib.get_close_matches(name, fields, 2) or difflib.get_close_matches(name, fields, 1, 0)
        nearest = f"the nearest is {' or '.join(map(repr, near))}; " if near else ""
        raise ValueError(
            f"--set {whole}: {type(node).__name__} has no field {name!r}; {nearest}its fields are {', '.join(fields)}"
        )
    current = getattr(node, name)
    if rest:
        if not dataclasses.is_dataclass(current) or isinstance(current, type):
            raise ValueError(
                f"--set {whole}: {name!r} is of type {type(current).__name__} and has no field {rest[0]!r}; "
                f"set {whole[: -len('.'.join(rest)) - 1]} itself"
            )
        value = _replace(current, rest, text, whole=whole)
    else:
        value = _parse(node, fields[name], current, text, whole=whole)
    if isinstance(node, nn.Module):
        return node.clone(**{name: value})
    return dataclasses.replace(node, **{name: value})


def _parse(node: Any, field: dataclasses.Field[Any], current: Any, text: str, *, whole: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    hint = _hints(type(node)).get(field.name, field.type)
    if field.name.endswith("dtype") and isinstance(value, str):
        try:
            return jnp.dtype(value)
        except TypeError:
            raise ValueError(f"--set {whole}={text}: {value!r} is not a dtype; use float32, bfloat16, ...") from None
    fits, value = _fit(value, hint)
    if fits and _uninformative(hint) and current is not None and not _same_kind(value, current):
        fits = False
    if not fits:
        if callable(current) or dataclasses.is_dataclass(current) or _holds_code(current):
            raise ValueError(
                f"--set {whole}: {field.name!r} holds {_plain(current)}, which text cannot spell; "
                "change it in the config file"
            )
        wanted = _spell(hint, current)
        raise ValueError(f"--set {whole}={text}: {field.name!r} must be {wanted}; it is {_plain(current)}")
    return value


def _hints(cls: type) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):  # a forward reference that only a type checker can follow
        return {}


def _uninformative(hint: Any) -> bool:
    return hint is Any or isinstance(hint, str) or Any in typing.get_args(hint)


def _same_kind(value: Any, current: Any) -> bool:
    if isinstance(current, bool) or isinstance(value, bool):
        return isinstance(current, bool) and isinstance(value, bool)
    if isinstance(current, int | float):
        return isinstance(value, int | float)
    if isinstance(current, tuple | list):
        return isinstance(value, tuple | list)
    return isinstance(value, type(current))


def _holds_code(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and any(_holds_code(entry) for entry in value.values())
    if isinstance(value, tuple | list):
        return any(_holds_code(entry) for entry in value)
    return value is not None and not isinstance(value, bool | int | float | complex | str | bytes)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Return whether a literal fits an annotation, and the value as that type (2 as 2.0, a list as a tuple)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, str | typing.TypeVar):
        return True, value
    if origin in (typing.Union, types.UnionType):
        # An exact type first, so that 2 stays an int for `float | int`.
        for argument in sorted(arguments, key=lambda a: type(value) is not a):
            fits, converted = _fit(value, argument)
            if fits:
                return True, converted
        return False, value
    if origin is Literal:
        return value in arguments, value
    if hint is None or hint is type(None):
        return value is None, value
    if hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        return ok, float(value) if ok else value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint in (bool, str, bytes, complex):
        return isinstance(value, hint), value
    kind = origin or hint
    if kind in (tuple, list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection):
        if not isinstance(value, tuple | list):
            return False, value
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(arguments) != len(value):
                return False, value
            parts = [_fit(entry, argument) for entry, argument in zip(value, arguments, strict=True)]
        else:
            parts = [_fit(entry, arguments[0] if arguments else Any) for entry in value]
        # A tuple also where a list would do: Linen modules must stay hashable.
        return all(fits for fits, _ in parts), tuple(entry for _, entry in parts)
    if kind in (dict, collections.abc.Mapping) and isinstance(value, dict):
        inner = arguments[1] if len(arguments) == 2 else Any
        parts = [_fit(entry, inner) for entry in value.values()]
        return all(fits for fits, _ in parts), dict(zip(value, (entry for _, entry in parts), strict=True))
    return False, value


def _spell(hint: Any, current: Any) -> str:
    if _uninformative(hint):
        return f"of type {type(current).__name__}"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _plain(value: Any) -> str:
    """Return a `repr` without memory addresses, so that two runs of one config print the same text."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_plain(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, tuple | list):
        inner = ", ".join(_plain(entry) for entry in value)
        return f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, functools.partial):
        arguments = [*map(_plain, value.args), *(f"{key}={_plain(entry)}" for key, entry in value.keywords.items())]
        return f"partial({', '.join([_plain(value.func), *arguments])})"
    if isinstance(value, jnp.dtype):
        return value.name
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, nn.Module) or dataclasses.is_dataclass(value):
        inner = ", ".join(f"{name}={_plain(getattr(value, name, None))}" for name in _fields(value))
        return f"{type(value).__name__}({inner})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if _holds_code(value):
        size = f" of {len(value)}" if hasattr(value, "__len__") else ""
        return f"<{type(value).__name__}{size}>"
    return repr(value)


def describe(config: Config) -> str:
    """Return one `path = value` line per field, with the paths that `override` takes."""

    def walk(node: Any, prefix: str) -> list[str]:
        lines = []
        for name in _fields(node):
            value, path = getattr(node, name, None), f"{prefix}{name}"
            if isinstance(value, nn.Module | Optim | MeshShape | Task | StartFrom):
                lines += [f"{path} = {type(value).__name__}", *walk(value, f"{path}.")]
            else:
                lines.append(f"{path} = {_plain(value)}")
        return lines

    return "\n".join(walk(config, "")) + "\n"
